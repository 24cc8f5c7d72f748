"""Damaged configurations, tokenizers, indices and safetensors headers, through all that reads a checkpoint:

    python -m tests.support.fuzz_configs --count 2000 --seed 0

Each is made of its seed and number alone, so one that failed can be run again (`--first N --count 1`). Nothing but this
package's errors may come out, and a model that loads gives vectors, within limits of time and memory.
"""

import argparse
import copy
import json
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from minivlm2vec import CheckpointError, Embedder, InputError, VLM2VecConfig, lora
from minivlm2vec.checkpoint import fingerprint
from minivlm2vec.errors import OptionError
from minivlm2vec.info import module_rows
from minivlm2vec.lora import LoraConfig, add_lora, save_adapter
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.weights import load_model
from tests.support.fuzzing import Found, peak_megabytes

SECONDS = 20.0  # for one case, on a busy machine
MEGABYTES = 400  # more than before
TABLES = ("config.json", "config.json", "config.json", "preprocessor_config.json", "tokenizer.json",
          "adapter/adapter_config.json", "adapter/adapter_config.json", "model.safetensors.index.json")  # fmt: skip
HEADERS = ("model.safetensors", "model-00002-of-00002.safetensors", "adapter/adapter_model.safetensors")
DEEP = json.loads("[" * 400 + "]" * 400)
VALUES = (
    None, True, False, 0, 1, 2, -1, 3, 64, 0.5, 1e-300, 1e308, float("nan"), float("inf"), -float("inf"), 10**9, 2**63,
    10**400, "", "x", "su", "default", "float16", "F4", "\0", "\ud800", "../x", "(", "((.|.)*)*#", "x" * 9999, [], {},
    [None], [[]], [0, 0], [2**64, 1], {"": ""}, {"a": {"b": []}}, DEEP,
)  # fmt: skip
KEYS = (
    "rope_parameters", "rope_scaling", "rope_type", "full_attention", "attention_factor", "factor", "short_factor",
    "partial_rotary_factor", "head_dim", "sliding_window", "layer_types", "quantization_config", "dtype", "torch_dtype",
    "vision_config", "minivlm2vec", "pooling", "layer_idx", "attention_bias", "weight_map", "rank_pattern", "o_proj",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "target_modules", "exclude_modules", "modules_to_save",
    "use_dora", "data_offsets", "shape", "__metadata__", "lm_head.weight", "post_processor", "normalizer", "", "\ud800",
)  # fmt: skip


def checkpoints(work: Path) -> list[Path]:
    """A tiny model in one file, in shards, and in both, each with an adapter in adapter/."""
    one, shards = (new_checkpoint(work / str(n), preset="tiny", max_shard_bytes=n) for n in (10**9, 1_500_000))
    config = LoraConfig(r=2, target_modules=("qkv_proj", "q_proj"), rank_pattern={"q_proj": 3})
    for folder in (one, shards):
        save_adapter(add_lora(load_model(folder), config), folder / "adapter", config)
    both = shutil.copytree(shards, work / "both")
    shutil.copy(one / "model.safetensors", both)
    return [one, shards, both]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where each value of a JSON document stands."""
    yield path
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(child, (*path, key))


def mutated(table: Any, r: random.Random) -> Any:
    """1 to 3 changes of values, keys and places."""
    table = copy.deepcopy(table)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        # mostly near the top: a tokenizer has hundreds of pieces and few settings
        near = [p for p in places(table) if len(p) <= r.choice((1, 2, 3, 9))]
        *owners, key = r.choice(near) or (None,)
        owner = table
        for step in owners:
            owner = owner[step]
        value = r.choice(VALUES)
        if key is None:
            table = (
                value if r.random() < 0.2 else {**table, r.choice(KEYS): value} if isinstance(table, dict) else table
            )
            continue
        r.choice((
            lambda o, k, v: o.__setitem__(k, v),
            lambda o, k, v: o.__setitem__(k, [o[k]]),
            lambda o, k, v: o.__setitem__(k, o[k] * 2 if isinstance(o[k], (int, str, list)) else str(o[k])),
            lambda o, k, v: o.__setitem__(k, {r.choice(KEYS): v, r.choice(KEYS): o[k]}),
            lambda o, k, v: o[k].__setitem__(r.choice(KEYS), v) if isinstance(o[k], dict) else None,
            lambda o, k, v: o.pop(k),
        ))(owner, key, value)  # fmt: skip
    return table


def damaged(data: bytes, r: random.Random, end: int) -> bytes:
    """Bytes before `end` changed, put in or taken out; or the rest cut off."""
    i, n = r.randrange(max(1, min(len(data), end))), r.choice((1, 1, 2, 8, 100))
    return r.choice((
        data[:i] + r.randbytes(n) + data[i + n :], data[:i] + data[i + n :], data[: i + n] + data[i:], data[:i],
        data[:i] + bytes([data[i] ^ 1 << r.randrange(8)]) + data[i + 1 :], data[: r.randrange(len(data))], b"",
    ))  # fmt: skip


def dumped(table: Any) -> bytes:
    return json.dumps(table).encode()


def changed(name: str, data: bytes, r: random.Random) -> bytes:
    """A file of a checkpoint with something wrong in it, mostly such that it can still be parsed."""
    if name in TABLES:
        return dumped(mutated(json.loads(data), r)) if r.random() < 0.85 else damaged(data, r, len(data))
    end = 8 + int.from_bytes(data[:8], "little")
    if r.random() < 0.3:
        return damaged(data, r, end)
    header = dumped(mutated(json.loads(data[8:end]), r))
    length = r.choice((len(header),) * 9 + (0, 1, len(header) + 8, 2**40, 2**64 - 1))
    return length.to_bytes(8, "little") + header + data[end:]


def uses(folder: Path) -> dict[str, Callable[[], Any]]:
    """Everything that reads a checkpoint, by what it is."""

    def embed() -> None:
        e = Embedder.from_pretrained(
            folder, adapter=folder / "adapter", device="cpu", optimize=False, show_progress=False
        )
        assert np.isfinite(e.encode(["a cat", ""])).all()

    return {
        "info": lambda: module_rows(VLM2VecConfig.from_json(folder)),
        "fingerprint": lambda: (fingerprint(folder), fingerprint(folder / "adapter", adapter=True)),
        "embed": embed,
    }


def fuzz(
    count: int, seed: int = 0, first: int = 0, each: Callable[[int, Found], object] = lambda i, found: None
) -> Found:
    """Runs cases number `first` to `first + count - 1`."""
    quiet = patch.object(logging.getLogger("minivlm2vec"), "disabled", True)
    with quiet, tempfile.TemporaryDirectory() as work, patch.object(lora, "PATIENCE", 2.0):
        folders = checkpoints(Path(work))
        for use in (use for folder in folders for use in uses(folder).values()):
            use()  # whole, each is read
        found = Found()
        for i in range(first, first + count):
            r = random.Random(f"{seed} {i}")
            folder = folders[i % 3]
            name = r.choice([name for name in TABLES + HEADERS if (folder / name).is_file()])
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(changed(name, data, r))
            _run(i, name, folder, found)
            (folder / name).write_bytes(data)
            each(i, found)
    return found


def _run(i: int, name: str, folder: Path, found: Found) -> None:
    for what, use in uses(folder).items():
        start = time.perf_counter()
        try:
            use()
            found.outcomes[f"{what}: read"] += 1
        except (CheckpointError, InputError, OptionError) as e:
            found.outcomes[f"{what}: {type(e).__name__}"] += 1
            if "\n" in str(e).strip() or len(str(e)) > 1000:
                found.failures.append(f"number {i} ({name}), {what}: no sentence: {str(e)[:300]}")
        except BaseException as e:  # a panic of a library in Rust is no Exception
            if isinstance(e, KeyboardInterrupt):
                raise
            found.failures.append(f"number {i} ({name}), {what}: {type(e).__name__}: {str(e)[:300]}")
        seconds = time.perf_counter() - start
        found.slowest = max(found.slowest, (seconds, i, f"{name}, {what}"))
        if seconds > SECONDS or peak_megabytes() > found.before + MEGABYTES:
            found.failures.append(f"number {i} ({name}), {what}: {seconds:.1f} s, {peak_megabytes():,} MB")
            found.before = peak_megabytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    found = fuzz(args.count, args.seed, args.first, lambda i, f: i % 200 or print(i, len(f.failures), flush=True))
    print(found)
    raise SystemExit(bool(found.failures))


if __name__ == "__main__":
    main()
