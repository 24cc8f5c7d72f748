"""What a run writes: step-000500/ with the model or the adapter, ready for use, and in the newest one training/,
from which the run goes on exactly. Safetensors and JSON alone.

    training/state.safetensors   parameter/NAME, optimizer/KEY/NAME; buffer/NAME and random/DEVICE of every process
    training/state.json          step, settings, the optimizer's values that are no tensors
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic import replacing
from ..distributed import Ranks
from ..errors import some
from ..lora import LoraConfig, adapter_tensors, whole_tensors
from ..model import VLM2Vec
from ..weights import under_keys
from . import engine


@dataclass(frozen=True)
class RunState:
    """What must be equal for a run to go on exactly, besides its settings.

    Fields:
        parameters: those that are trained, by name; of the model and of the loss.
        buffers: the persistent ones of both.
        optimizer: of these parameters.
        device: whose random numbers are kept, besides the CPU's.
    """

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    device: torch.device
    ranks: Ranks

    def collect(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """Tensors, whole and on the host (in the first process; elsewhere they are empty), and the optimizer's other
        values by parameter. To be called by all processes."""
        tensors = {"random/cpu": self._of_all(torch.get_rng_state())}
        if self.device.type == "cuda":
            tensors["random/cuda"] = self._of_all(torch.cuda.get_rng_state(self.device))
        tensors |= {f"buffer/{name}": self._of_all(b) for name, b in self.buffers.items()}
        values: dict[str, dict[str, Any]] = {}
        for name, p in self.parameters.items():
            tensors[f"parameter/{name}"] = _on_host(p, self.ranks)
            for key, value in self.optimizer.state[p].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{key}/{name}"] = _on_host(value, self.ranks)
                elif value is None or isinstance(value, (bool, int, float, str)):
                    values.setdefault(name, {})[key] = value
                else:
                    kind = f"{type(self.optimizer).__name__}'s {key}, a {type(value).__name__},"
                    raise ValueError(f"{kind} cannot be saved: tensors and plain values can")
        return tensors, values

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Puts back what `collect` gave. Raises ValueError where it is not of these parameters and processes."""
        values = _read_json(folder)["optimizer"]
        with safe_open(folder / "training/state.safetensors", framework="pt") as file:
            self._check(folder, file)
            read = file.get_tensor  # one after the other: together they may be more than the host has for each process
            own = self.ranks.rank
            for name, p in self.parameters.items():
                p.copy_(engine.as_held(read(f"parameter/{name}"), p))
            for name, b in self.buffers.items():
                b.copy_(read(f"buffer/{name}")[own])
            state = self._optimizer_state(list(file.keys()), read, values)
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            torch.set_rng_state(read("random/cpu")[own].clone())  # it reads the storage, not the view
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(read("random/cuda")[own].clone(), self.device)

    def _optimizer_state(
        self, keys: list[str], read: Callable[[str], Tensor], values: dict[str, dict[str, Any]]
    ) -> dict[int, dict[str, Any]]:
        """As `Optimizer.load_state_dict` takes it: by the parameters' places in the groups."""
        names = {id(p): name for name, p in self.parameters.items()}
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        found: dict[str, dict[str, str]] = {}
        for full in keys:
            if full.startswith("optimizer/"):
                _, key, name = full.split("/", 2)
                found.setdefault(name, {})[key] = full
        for i, p in enumerate(ordered):
            name = names[id(p)]
            own = {key: engine.as_held(read(full), p) for key, full in found.get(name, {}).items()}
            own |= values.get(name, {})
            if own:
                state[i] = own
        return state

    def _check(self, folder: Path, file: Any) -> None:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no dict)
        world = shapes["random/cpu"][0]
        if world != self.ranks.world:
            raise ValueError(f"{folder} was written by {world} processes, these are {self.ranks.world}; a run goes "
                             "on exactly with as many")  # fmt: skip
        here = {f"parameter/{name}": tuple(p.shape) for name, p in self.parameters.items()}
        here |= {f"buffer/{name}": (world, *b.shape) for name, b in self.buffers.items()}
        there = {key: shape for key, shape in shapes.items() if key.startswith(("parameter/", "buffer/"))}
        missing, unexpected = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
        both = sorted(here.keys() & there.keys())
        reshaped = [f"{k} {list(there[k])}, here {list(here[k])}" for k in both if here[k] != there[k]]
        found = {"it lacks": missing, "only it has": unexpected, "of another shape is": reshaped}
        said = [f"{what} {some(names)}" for what, names in found.items() if names]
        if said:
            raise ValueError(f"{folder} is the state of another model or loss: {'; '.join(said)}")

    def _of_all(self, x: Tensor) -> Tensor:  # [...] -> [processes, ...]
        return self.ranks.gather(x.detach().to(self.device)[None]).cpu()


def newest(out: Path) -> Path | None:
    """The checkpoint that a run can go on from."""
    found = [
        p for p in out.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / "training/state.json").exists()
    ]
    return max(found, key=lambda p: int(p.name[5:]), default=None)


def check_settings(folder: Path, settings: dict[str, Any]) -> int:
    """The step of a checkpoint. Raises ValueError where a run of these settings cannot go on from it: they must be
    those of its run, but that its output may go elsewhere and its steps may be more."""
    about = _read_json(folder)
    differing = _differences(_compared(about["settings"]), _compared(json.loads(json.dumps(settings))))
    if differing:
        raise ValueError(f"{folder} is of a run with other settings: {'; '.join(differing)}. Choose another `out`, "
                         "or restore them")  # fmt: skip
    if about["step"] > settings["optim"]["steps"]:
        raise ValueError(f"{folder} is beyond optim.steps {settings['optim']['steps']}. Choose another `out`, or more "
                         "steps")  # fmt: skip
    return about["step"]


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    optim = {k: v for k, v in settings["optim"].items() if k != "steps"}
    return {k: v for k, v in settings.items() if k not in ("out", "log")} | {"optim": optim}


def _differences(a: Any, b: Any, name: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{name}.{k}".lstrip("."))]
    return [] if a == b else [f"{name} was {a!r} and is {b!r}"]


def write(
    out: Path,
    step: int,
    state: RunState,
    weights: dict[str, Tensor],
    write_weights: Callable[[Path, dict[str, Tensor]], None],
    settings: dict[str, Any],
) -> Path:
    """Writes step-<step>/; to be called by all processes, of which the first writes. It appears when it is whole.

    weights: on the host, of the first process. write_weights(folder, weights) makes of them the files for use.
    """
    tensors, values = state.collect()
    folder = out / f"step-{step:06d}"
    if state.ranks.first:
        for left in out.glob(".step-*.tmp"):  # by a kill
            shutil.rmtree(left)
        out.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as work:
            write_weights(work, weights)
            (work / "training").mkdir()
            save_file(tensors, work / "training/state.safetensors")
            about = {"step": step, "settings": settings, "optimizer": values}
            (work / "training/state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        for other in out.glob("step-*/training"):
            if other.parent != folder:
                shutil.rmtree(other)
    state.ranks.barrier()
    return folder


def adapter_weights(model: nn.Module, lora: LoraConfig, ranks: Ranks) -> dict[str, Tensor]:
    """The adapters' tensors and those of modules that are saved with them, whole and on the host."""
    weights = {name: _on_host(t, ranks) for name, t in adapter_tensors(model)}
    for name, t in whole_tensors(model, lora).items():
        weights |= under_keys(name, _on_host(t, ranks))
    return weights


def model_weights(model: VLM2Vec, ranks: Ranks) -> dict[str, Tensor]:
    """The model's parameters under the checkpoint's keys, in the dtype of its config, and its persistent buffers;
    whole and on the host."""
    dtype: torch.dtype = getattr(torch, model.config.dtype)
    weights: dict[str, Tensor] = {}
    for name, b in persistent_buffers(model).items():
        weights |= under_keys(name, _on_host(b, ranks))
    for name, p in model.named_parameters():
        weights |= under_keys(name, _on_host(p, ranks, dtype))
    return weights


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """By name, those that belong to the module's state."""
    kept = module.state_dict().keys()
    return {name: b for name, b in module.named_buffers() if name in kept}


def _read_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training/state.json").read_text(encoding="utf-8"))


def _on_host(x: Tensor, ranks: Ranks, dtype: torch.dtype | None = None) -> Tensor:
    """The whole tensor, a copy, in the first process, which writes it; the others get an empty one."""
    x = engine.whole(x.detach())
    return torch.empty_like(x, device="cpu", dtype=dtype).copy_(x) if ranks.first else torch.empty(0)
