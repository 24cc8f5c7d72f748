"""What a run writes: step-000500/ with the model or the adapter, ready for use, and in the newest one training/,
from which the run goes on exactly. Safetensors and JSON alone.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..lora import LoraConfig, adapter_tensors, write_adapter
from ..model import VLM2Vec
from ..weights import keys_of
from . import engine

COPIED = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


def newest(out: Path) -> Path | None:
    """The checkpoint that a run can go on from."""
    found = [
        p for p in out.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / "training/state.json").exists()
    ]
    return max(found, key=lambda p: int(p.name[5:]), default=None)


def write(
    out: Path,
    step: int,
    model: VLM2Vec,
    *,
    source: Path,
    lora: LoraConfig | None,
    base_model: str,
    parameters: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    config: dict[str, Any],
) -> Path:
    """Writes step-<step>/; to be called by all processes, of which the first writes. It appears when it is whole.

    source: the checkpoint folder of the base, whose config and tokenizer a full model is written with.
    """
    state = _training_state(parameters, optimizer, device)
    weights = {name: _on_host(t) for name, t in adapter_tensors(model)} if lora else _weights(model)
    folder = out / f"step-{step:06d}"
    if engine.rank() == 0:
        work = out / f".{folder.name}.tmp"
        shutil.rmtree(work, ignore_errors=True)
        (work / "training").mkdir(parents=True)
        if lora is not None:
            write_adapter(weights, work, lora, base_model=base_model)
        else:
            _write_model(work, weights, source)
        save_file(state, work / "training/state.safetensors")
        (work / "training/state.json").write_text(json.dumps({"step": step, "config": config}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
        for other in out.glob("step-*/training"):
            if other.parent != folder:
                shutil.rmtree(other)
    engine.barrier()
    return folder


def read_config_of(folder: Path) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint, and the settings of its run."""
    state = json.loads((folder / "training/state.json").read_text(encoding="utf-8"))
    return state["step"], state["config"]


@torch.no_grad()
def restore(
    folder: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """Puts back parameters, AdamW's moments and random states. Raises ValueError where they are not this run's."""
    with safe_open(folder / "training/state.safetensors", framework="pt") as file:
        read = file.get_tensor  # one tensor after the other: all of them may be more than the host has for each process
        ranks, own = len(read("random/cpu")), engine.rank()
        if ranks != engine.world_size():
            raise ValueError(f"{folder} was written by {ranks} processes, these are {engine.world_size()}; a run goes "
                             "on exactly with as many")  # fmt: skip
        for name, p in parameters.items():
            p.copy_(engine.as_held(read(f"parameter/{name}"), p))
            moments = {k: engine.as_held(read(f"{k}/{name}"), p) for k in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": read(f"step/{name}").to(p.device), **moments}
        torch.set_rng_state(read("random/cpu")[own].clone())  # it reads the storage, not the view
        if device.type == "cuda":
            torch.cuda.set_rng_state(read("random/cuda")[own].clone(), device)


def _training_state(
    parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Tensor]:
    state = {"random/cpu": _everyones(torch.get_rng_state(), device)}
    if device.type == "cuda":
        state["random/cuda"] = _everyones(torch.cuda.get_rng_state(device), device)
    for name, p in parameters.items():
        state[f"parameter/{name}"] = _on_host(p)
        state |= {f"{key}/{name}": _on_host(value) for key, value in optimizer.state[p].items()}
    return state


def _everyones(x: Tensor, device: torch.device) -> Tensor:  # [n] -> [processes, n]
    return engine.gather_rows(x.to(device)[None]).cpu()


def _on_host(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole tensor, a copy, in the first process, which writes it; the others get an empty one."""
    x = engine.whole(x.detach())
    return torch.empty_like(x, device="cpu", dtype=dtype).copy_(x) if engine.rank() == 0 else torch.empty(0)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters under the checkpoint's keys, in the dtype of its config."""
    dtype, weights = getattr(torch, model.config.dtype), {}
    for name, p in model.named_parameters():
        keys = keys_of(name)
        value = _on_host(p, dtype)
        weights |= {key: part.contiguous() for key, part in zip(keys, value.tensor_split(len(keys)), strict=True)}
    return weights


def _write_model(folder: Path, weights: dict[str, Tensor], source: Path) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
