"""What commands that load a model share: its arguments, and how it is loaded."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..files import ModelSpec


def add_model_arguments(parser: argparse.ArgumentParser, *, positional: bool = False) -> None:
    """--model and how to load it; shared by the commands that embed."""
    if positional:
        parser.add_argument("model", metavar="MODEL", help='a checkpoint folder, a Hub name, or "mini"')
    else:
        parser.add_argument(
            "--model", default="TIGER-Lab/VLM2Vec-Full", help='folder, Hub name, or "mini" (%(default)s)'
        )
    parser.add_argument("--adapter", metavar="NAME", help="a LoRA or DoRA in PEFT's format: folder or Hub name")
    parser.add_argument("--device", help="cuda, cuda:1, mps, cpu (default: the best there is)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    parser.add_argument("--num-crops", type=int, help="the most crops an image is cut into (default: the checkpoint's)")
    parser.add_argument("--dimensions", dest="truncate_dim", type=int, metavar="N",
                        help="cut vectors to N numbers, of a model trained for it (Matryoshka)")  # fmt: skip
    parser.add_argument("--force-dimensions", action="store_true", help="also of a model that was not")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")
    parser.add_argument("--backend", choices=["auto", "triton", "torch"], help="kernels (default: auto)")
    add_plugin_argument(parser)


def add_plugin_argument(parser: argparse.ArgumentParser) -> None:
    """--plugin, which is obeyed while the arguments are parsed: what it registers is known to all that follows."""
    parser.add_argument("--plugin", action="append", default=[], type=_plugin, metavar="FILE.py",
                        help="run a Python file of your own, which registers parts of the model")  # fmt: skip


def _plugin(path: str) -> str:
    from ..registry import load_plugin

    try:
        load_plugin(path)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return path


def load_embedder(args: argparse.Namespace, **options: Any):
    """The Embedder that `add_model_arguments` describes."""
    from ..embedder import Embedder

    return Embedder.from_pretrained(
        args.model,
        adapter=args.adapter,
        device=args.device,
        dtype=args.dtype,
        num_crops=args.num_crops,
        truncate_dim=args.truncate_dim,
        force_dimensions=args.force_dimensions,
        revision=args.revision,
        local_files_only=args.local_files_only,
        backend=args.backend,
        **options,
    )


def model_spec(args: argparse.Namespace, *, show_progress: bool) -> "ModelSpec":
    """What `add_model_arguments` describes, for the commands that load it only when it is needed."""
    from ..files import ModelSpec

    names = ("adapter", "revision", "dtype", "num_crops", "truncate_dim", "force_dimensions", "local_files_only",
             "device", "backend")  # fmt: skip
    return ModelSpec(args.model, **{name: getattr(args, name) for name in names}, show_progress=show_progress)
