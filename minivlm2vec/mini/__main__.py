"""python -m minivlm2vec.mini DIR: what `mini` was trained from: its own tokenizer and random weights."""

import argparse
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from ..mmeb.mini import sources
from ..mmeb.mini.concepts import World, load_world
from ..mmeb.mini.tasks import CROP, INSTRUCTIONS, PICTURE, SETS, TRAIN
from ..new_checkpoint import new_checkpoint, phi3_tokenizer

VOCAB_SIZE = 4096
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 3, "num_key_value_heads": 3, "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "sliding_window": None,
    "rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "img_processor": {
        "image_dim_out": 128, "num_img_tokens": 4,
        "vision_config": {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 512,
                          "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
    },
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minivlm2vec.mini", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--tarballs", type=Path, default=Path("outputs/tarballs"), help="npm packages (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        world, _ = load_world(sources.fetch(args.tarballs, print), seed=0)
        tokenizer = train_tokenizer(sentences(world), VOCAB_SIZE)
        new_checkpoint(args.folder, preset="tiny", config=CONFIG, seed=args.seed, tokenizer=tokenizer)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written to {args.folder}")
    return 0


def sentences(world: World, rows: int = 400) -> Iterator[str]:
    """What the training sets say, so that common words are one token: names, tags and instructions."""
    for concept in world.concepts:
        yield from (concept.phrase, concept.subgroup, concept.group, *concept.tags)
    yield from itertools.chain((PICTURE, CROP), *INSTRUCTIONS.values())
    for name in TRAIN:
        for i in range(rows):
            row = SETS[name].row(world, random.Random(f"tokenizer/{name}/{i}"))
            yield from (row.query.text, row.positive.text)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-pair encoding (arXiv 1508.07909) of words with the space in front, in the published tokenizer's format."""
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    special = len(phi3_tokenizer((), ()).get_vocab())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size - special, show_progress=False, min_frequency=2)
    learner.train_from_iterator((text.replace("<|image_1|>", "") for text in texts), trainer)
    vocab = learner.get_vocab()
    merges = _merges(learner)
    return phi3_tokenizer(sorted(vocab, key=vocab.get), merges)


def _merges(tokenizer: tokenizers.Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


if __name__ == "__main__":
    sys.exit(main())
