"""What the bundled checkpoint is trained from, and how a trained one comes into the package."""

import itertools
import json
import shutil
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


def write_start(folder: Path, tarballs: dict[sources.Package, Path], *, size: str = "cpu", seed: int = 0) -> None:
    """Writes what training begins from: the tokenizer of mini-MMEB's words, a configuration and random weights.

    Args:
        tarballs: see `world.sources.fetch`.
        size: one of SIZES, named by what it is to be trained on.
    """
    world, _ = load_world(tarballs, seed=0)
    tokenizer = train_tokenizer(world, VOCAB_SIZE)
    new_checkpoint(folder, preset="tiny", config=SIZES[size], seed=seed, tokenizer=tokenizer)


def package(checkpoint: Path, folder: Path) -> None:
    """Copies a trained checkpoint in half its size: weights in float16, which keeps 3 bits more of these than
    bfloat16. They run in float32, as config.json says: not every CPU has instructions for less."""
    weights = load_file(checkpoint / "model.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    halves = {key: value.to(torch.float16) for key, value in weights.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        shutil.copyfile(checkpoint / name, folder / name)


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
    vocabulary, merges = learner.get_vocab(), _merges(learner)
    pieces = sorted(vocabulary, key=lambda piece: vocabulary[piece])
    for phrase in PHRASES:
        tokens = phi3_tokenizer(pieces, merges).encode(phrase, add_special_tokens=False).tokens
        for i in range(1, len(tokens)):
            merges.append(("".join(tokens[:i]), tokens[i]))
            pieces.append("".join(tokens[: i + 1]))
    return phi3_tokenizer(list(dict.fromkeys(pieces))[: vocab_size - special], merges)


def _words(world: World) -> Iterator[str]:
    """Text that the tokenizer learns from: names twice, tags once, plurals too."""
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
