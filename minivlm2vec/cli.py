"""The `minivlm2vec` command."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand. Returns its exit code: 0 done, 1 a user's error (named on stderr), 2 wrong arguments."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError, ImportError, RuntimeError) as e:
        print(f"minivlm2vec {args.command}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    # The optional parts import what their extras bring only when they run.
    from .demo.cli import add_arguments as demo_arguments
    from .files.cli import add_embed_arguments, add_search_arguments
    from .mmeb.cli import add_arguments as mmeb_arguments
    from .mmeb.cli import run as run_mmeb
    from .serve.cli import add_arguments as serve_arguments
    from .train.cli import add_arguments as train_arguments

    parser = argparse.ArgumentParser(prog="minivlm2vec", description="Text and images to vectors, with VLM2Vec-Full.")
    parser.add_argument("--version", action="version", version=f"minivlm2vec {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo_arguments(commands.add_parser("demo", help="see what it does, with the bundled model and pictures"))
    _similarity_arguments(commands.add_parser("similarity", help="score targets against queries"))
    add_embed_arguments(commands.add_parser("embed", help="folders and tables to files of vectors"))
    add_search_arguments(commands.add_parser("search", help="find rows by text, image or likeness"))
    serve_arguments(commands.add_parser("serve", help="answer OpenAI's embeddings API"))
    mmeb = commands.add_parser("mmeb", help="evaluate on MMEB, or on data in its format")
    mmeb_arguments(mmeb)
    mmeb.set_defaults(run=run_mmeb)
    train_arguments(commands.add_parser("train", help="train by contrast, wholly or with LoRA"))
    _info_arguments(commands.add_parser("info", help="print a checkpoint's architecture"))
    _new_checkpoint_arguments(commands.add_parser("new-checkpoint", help="write a randomly initialised checkpoint"))
    return parser


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
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")
    parser.add_argument("--backend", choices=["auto", "triton", "torch"], help="kernels (default: auto)")


def load_embedder(args: argparse.Namespace, **options: Any):
    """The Embedder that `add_model_arguments` describes."""
    import torch

    from .embedder import Embedder

    return Embedder.from_pretrained(
        args.model,
        adapter=args.adapter,
        device=args.device,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        num_crops=args.num_crops,
        revision=args.revision,
        local_files_only=args.local_files_only,
        backend=args.backend,
        **options,
    )


def _similarity_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Embeds one query and any number of targets and prints the targets, the nearest first."
    add_model_arguments(parser)
    parser.add_argument("--query-text", help="may hold <|image_1|>; without it the image comes first")
    parser.add_argument("--query-image", metavar="PATH")
    parser.add_argument("--target-text", action="append", default=[], metavar="TEXT", help="repeatable")
    parser.add_argument("--target-image", action="append", default=[], metavar="PATH", help="repeatable")
    parser.add_argument("--target-prompt", default="Represent the given image.\n",
                        help="instruction for target images (default: %(default)r)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=_similarity)


def _similarity(args: argparse.Namespace) -> int:
    if args.query_text is None and args.query_image is None:
        raise ValueError("--query-text or --query-image is needed")
    if not args.target_text and not args.target_image:
        raise ValueError("at least one --target-text or --target-image is needed")
    query = {"text": args.query_text, "image": args.query_image}
    texts = [{"text": text} for text in args.target_text]
    images = [{"text": args.target_prompt, "image": path} for path in args.target_image]
    embedder = load_embedder(args, show_progress=not args.json and sys.stderr.isatty())
    vectors = embedder.encode([query, *texts, *images])
    scores = embedder.similarity(vectors[:1], vectors[1:])[0]
    names = [("text", t) for t in args.target_text] + [("image", p) for p in args.target_image]
    order = sorted(range(len(names)), key=lambda i: -scores[i])
    rows = [{"score": float(scores[i]), "kind": names[i][0], "target": names[i][1]} for i in order]
    if args.json:
        print(json.dumps({"query": {k: v for k, v in query.items() if v is not None}, "targets": rows}, indent=2))
    else:
        print("  score  kind   target")
        for row in rows:
            print(f"{row['score']:>7.4f}  {row['kind']:<5}  {_one_line(row['target'])}")
    return 0


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints modules, shapes, parameters, bytes and FLOPs. Reads config.json alone."
    parser.add_argument("path", metavar="PATH", help='a checkpoint folder, a config.json, a Hub name, or "mini"')
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> int:
    from . import info
    from .config import VLM2VecConfig
    from .weights import resolve

    path = Path(args.path)
    config = VLM2VecConfig.from_json(path if path.is_file() else resolve(args.path, config_only=True))
    print(json.dumps(info.report(config), indent=2) if args.json else info.as_text(config))
    return 0


def _new_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    from .new_checkpoint import PRESETS

    parser.description = "Writes a randomly initialised checkpoint in the published layout."
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--config", metavar="JSON", help="file with keys of config.json that replace the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json to copy (default: one of bytes)")
    parser.set_defaults(run=_new_checkpoint)


def _new_checkpoint(args: argparse.Namespace) -> int:
    from .new_checkpoint import new_checkpoint

    config = json.loads(Path(args.config).read_text(encoding="utf-8")) if args.config else None
    path = new_checkpoint(
        args.path, preset=args.preset, config=config, seed=args.seed, dtype=args.dtype, tokenizer=args.tokenizer,
        show_progress=True,
    )  # fmt: skip
    print(f"wrote {path}")
    return 0


def _one_line(text: str, width: int = 100) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= width else text[: width - 1] + "…"


if __name__ == "__main__":
    sys.exit(main())
