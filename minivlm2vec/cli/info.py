"""`minivlm2vec info`: what a checkpoint is made of."""

import argparse
import json
from pathlib import Path

from .arguments import add_plugin_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints modules, shapes, parameters, bytes and FLOPs. Reads config.json alone."
    parser.add_argument("path", metavar="PATH", help='a checkpoint folder, a config.json, a Hub name, or "mini"')
    parser.add_argument("--json", action="store_true", help="for machines")
    add_plugin_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from .. import info
    from ..checkpoint import resolve
    from ..config import VLM2VecConfig

    path = Path(args.path)
    config = VLM2VecConfig.from_json(path if path.is_file() else resolve(args.path, config_only=True))
    print(json.dumps(info.report(config), indent=2) if args.json else info.as_text(config))
    return 0
