"""python -m minivlm2vec.mini: what the bundled checkpoint is trained from, and how it comes into the package."""

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file

from ..new_checkpoint import merged, new_checkpoint, phi3_tokenizer
from .world import sources
from .world.concepts import World, load_world
from .world.tasks import CORNERS, CROP, INSTRUCTIONS, PICTURE
from .world.words import plural

VOCAB_SIZE = 4096
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 3, "num_key_value_heads": 3, "torch_dtype": "float32",
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "sliding_window": None,
    "rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "img_processor": {
        "image_dim_out": 192, "num_img_tokens": 1,
        "vision_config": {"hidden_size": 192, "num_hidden_layers": 4, "intermediate_size": 768,
                          "num_attention_heads": 3, "image_size": 32, "patch_size": 16},
    },
}  # fmt: skip

FINER: dict[str, Any] = {  # for a GPU: 64 patches a picture instead of 16, and wider
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4,
    "img_processor": {"num_img_tokens": 4, "vision_config": {"num_hidden_layers": 5, "patch_size": 8}},
}  # fmt: skip
SIZES = {"cpu": CONFIG, "gpu": merged(CONFIG, FINER)}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written to {args.folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m minivlm2vec.mini", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    start = commands.add_parser("start", help="write what training begins from: tokenizer, config, random weights")
    start.add_argument("folder", type=Path, metavar="DIR")
    start.add_argument("--tarballs", type=Path, default=Path("outputs/tarballs"), help="npm packages (%(default)s)")
    start.add_argument("--size", choices=SIZES, default="cpu", help="what it is to be trained on (%(default)s)")
    start.add_argument("--seed", type=int, default=0)
    start.set_defaults(run=_start)
    package = commands.add_parser("package", help="copy a trained checkpoint in half its size")
    package.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    package.add_argument("folder", type=Path, metavar="DIR")
    package.set_defaults(run=_package)
    return parser


def _start(args: argparse.Namespace) -> None:
    world, _ = load_world(sources.fetch(args.tarballs, print), seed=0)
    tokenizer = train_tokenizer(world, VOCAB_SIZE)
    new_checkpoint(args.folder, preset="tiny", config=SIZES[args.size], seed=args.seed, tokenizer=tokenizer)


def _package(args: argparse.Namespace) -> None:
    """Weights in float16, which keeps 3 bits more of these than bfloat16. Run in float32, as config.json says: not
    every CPU has instructions for less."""
    weights = load_file(args.checkpoint / "model.safetensors")
    args.folder.mkdir(parents=True, exist_ok=True)
    halves = {key: value.to(torch.float16) for key, value in weights.items()}
    save_file(halves, args.folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        shutil.copyfile(args.checkpoint / name, args.folder / name)


def train_tokenizer(world: World, vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-pair encoding (arXiv 1508.07909) of the words in names and tags, in the published tokenizer's format. Then
    the instructions, which every row repeats, become a token each: words are joined from the left, which that format
    allows."""
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    special, joined = len(phi3_tokenizer((), ()).get_vocab()), 600
    size = vocab_size - special - joined
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, show_progress=False, max_token_length=24)
    learner.train_from_iterator(_words(world), trainer)
    pieces, merges = sorted(learner.get_vocab(), key=learner.get_vocab().get), _merges(learner)
    for phrase in PHRASES:
        tokens = phi3_tokenizer(pieces, merges).encode(phrase, add_special_tokens=False).tokens
        for i in range(1, len(tokens)):
            merges.append(("".join(tokens[:i]), tokens[i]))
            pieces.append("".join(tokens[: i + 1]))
    return phi3_tokenizer(list(dict.fromkeys(pieces))[: vocab_size - special], merges)


def _words(world: World) -> Iterator[str]:
    """Names count more than tags, and plurals are seen too."""
    for concept in world.concepts:
        yield from (concept.phrase, concept.phrase, concept.subgroup, concept.group, *concept.tags)
    for thing in world.things:
        yield from (plural(thing.phrase), f'"{thing.phrase}"')
    yield from PHRASES


def _phrases() -> Iterator[str]:
    """What instructions and questions say besides names, as the tokenizer gets it: text between tags and names."""
    for text in (PICTURE, CROP, *itertools.chain(*INSTRUCTIONS.values())):
        yield text.split("{}")[0].removeprefix("<|image_1|>").rstrip(' "')
    yield from (f"what is in the {corner}?" for corner in CORNERS)
    yield from ("what is to the left of the", "what is to the right of the", "what is above the", "what is below the")
    yield from ("how many", "what color is the", "replace the", "with a", "are there?")


PHRASES = tuple(dict.fromkeys(_phrases()))


def _merges(tokenizer: tokenizers.Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


if __name__ == "__main__":
    sys.exit(main())
