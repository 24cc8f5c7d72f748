"""`minivlm2vec train`: contrastive training from a TOML file."""

import argparse
import logging
from pathlib import Path

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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains or checks as the arguments say. Errors are raised, for the caller to print."""
    from ..train.config import read_config

    config = read_config(args.config)
    _print_messages("minivlm2vec.mini")  # its rows may have to be fetched
    if args.check:
        from ..train.data import NONE, open_data

        data = open_data(config.data, seed=config.seed)
        data.check(thoroughly=True)
        data.batch(0, config.optim.batch_size, NONE)
        print(f"{data} can be used")
        return 0
    from ..train.engine import rank
    from ..train.trainer import Trainer

    folder = Trainer(config, device=args.device).run()
    if rank() == 0:
        print(f"wrote {folder}")
    return 0


class _Printer(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


def _print_messages(name: str) -> None:
    """What the logger of this name is told appears on stdout."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        logger.addHandler(_Printer())
        logger.setLevel(logging.INFO)
