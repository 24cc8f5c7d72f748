"""`minivlm2vec train`: contrastive training from a TOML file."""

import argparse
from pathlib import Path

from .arguments import add_plugin_argument
from .messages import printed

EXAMPLES = """\
all of CONFIG.toml that has no default:
  model = "microsoft/Phi-3.5-vision-instruct"
  out = "outputs/run"
  [data]
  root = "MMEB-train"
the rows and every picture, before anything is computed:
  minivlm2vec train CONFIG.toml --check
on eight GPUs:
  torchrun --nproc-per-node 8 -m minivlm2vec train CONFIG.toml
adapters alone: add a table with PEFT's names, such as
  [lora]
  r = 8
An interrupted run goes on where it was when the same command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="see minivlm2vec/train/config.py")
    parser.add_argument("--check", action="store_true", help="read every row and decode every picture, then stop")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the best there is)")
    add_plugin_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains or checks as the arguments say. Errors are raised, for the caller to print."""
    from ..distributed import Ranks
    from ..train import check_data, read_config, train

    config = read_config(args.config)
    with printed("minivlm2vec.mini.world.sources"):  # drawn rows may have to fetch what they are drawn from
        if args.check:
            print(f"{check_data(config)} can be used")
            return 0
        with Ranks() as ranks:
            folder = train(config, device=args.device)
            if ranks.first:
                print(f"wrote {folder}")
    return 0
