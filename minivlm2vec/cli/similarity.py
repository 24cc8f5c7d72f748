"""`minivlm2vec similarity`: an alias of `rank`, with no instruction for the query."""

import argparse

from . import rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rank.add_arguments(parser)
    parser.set_defaults(instruction=rank.NONE)
