"""The optimizer and its rates: AdamW with linear warm-up and decay, or what takes their places."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .config import OptimConfig

LOSS = "loss."  # before the names of the loss' own parameters

# The trained parameters by name -> any of torch's optimizers, or one that keeps its state as they do. Each of its
# groups keeps a rate of its own, which the schedule multiplies.
MakeOptimizer = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
# How many steps are done -> the factor of every group's rate in the next one.
Schedule = Callable[[int], float]


def adamw(config: OptimConfig) -> MakeOptimizer:
    """AdamW of the whole model; the loss' parameters do not decay."""

    def make(parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        model = [p for name, p in parameters.items() if not name.startswith(LOSS)]
        loss = [p for name, p in parameters.items() if name.startswith(LOSS)]
        groups = [{"params": model, "weight_decay": config.weight_decay}]
        groups += [{"params": loss, "weight_decay": 0.0}] if loss else []
        fused = model[0].device.type in ("cuda", "cpu")
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)

    return make


def linear(config: OptimConfig) -> Schedule:
    """Rises linearly from 0 to 1 at `warmup` steps, falls linearly to 0 at `steps`."""

    def factor(step: int) -> float:
        if step < config.warmup:
            return step / config.warmup
        return max(0.0, (config.steps - step) / max(1, config.steps - config.warmup))

    return factor


def described_groups(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """What a run that goes on must have in common: each group's parameters and plain settings, its rate the first one.

    names: of parameters, by their ids.
    """
    found = {}
    for number, group in enumerate(optimizer.param_groups):
        inside = [names[id(p)] for p in group["params"]]
        digest = hashlib.sha256("\n".join(inside).encode()).hexdigest()[:8]
        rest = {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr") and is_plain(v)}
        rate = group.get("initial_lr", group["lr"])
        found[str(number)] = {"parameters": f"{len(inside)} ({digest})", "lr": float(rate)} | rest
    return found


def is_plain(value: Any) -> bool:
    """Whether a setting is a number, a text, nothing, or a sequence of these."""
    return isinstance(value, (int, float, str, type(None))) or (
        isinstance(value, (list, tuple)) and all(map(is_plain, value))
    )


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's rate is its first one, times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
