"""The model that a run trains: what of it is trained, and how its layers compute meanwhile."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import VLM2VecConfig
from ..lora import LoraConfig, add_lora, exclude_frozen, with_new_parts
from ..model import VLM2Vec
from ..weights import described, load_model
from .config import TrainConfig


def trainable_model(
    config: TrainConfig, source: Path, device: torch.device, model: VLM2Vec | None = None
) -> tuple[VLM2Vec, VLM2VecConfig, LoraConfig | None]:
    """The model of a run, what its checkpoints say of it, and its adapters.

    model: the user's own, in which what does not require gradients stays frozen. By default all of `source` is
    trained, with the parts that `config.parts` names. `config.freeze` and `config.lora` apply to either.

    Raises ValueError for a model that could not be loaded again from its checkpoints (`weights.described`).
    """
    cuda, written = device.type == "cuda", VLM2VecConfig.from_json(source)
    if model is None:
        dtype = torch.bfloat16 if config.lora and cuda else torch.float32
        wanted = written.with_parts(**config.parts)
        model = load_model(source, config=wanted, skip=config.skip, device=device, dtype=dtype)
        model.requires_grad_(True)
    elif config.parts:
        raise ValueError(f"model.{next(iter(config.parts))} chooses a part of the model that is loaded, and a model is "
                         "given")  # fmt: skip
    recorded = described(model)
    model = model.to(device)
    _freeze(model, config.freeze)
    lora = config.lora and with_new_parts(exclude_frozen(config.lora, model), model, written)
    if lora:
        add_lora(model, lora, generator=torch.Generator().manual_seed(config.seed))
    if cuda:
        for p in model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data.to(torch.bfloat16)
    if config.gradient_checkpointing:
        _checkpoint_layers(model)
    if not any(p.requires_grad for p in model.vision.parameters()):
        _without_gradient(model.vision)
    return model, recorded, lora


def set_training(module: nn.Module) -> None:
    """`train()` for what has something to train; `eval()` for modules whose parameters are all frozen, so that their
    dropout stays off and their running statistics stay as they are. Modules without parameters go with their parent."""
    module.train(any(p.requires_grad for p in module.parameters()))
    for child in module.children():
        if next(child.parameters(), None) is not None:
            set_training(child)


def _freeze(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        try:
            model.get_submodule(name).requires_grad_(False)
        except AttributeError:
            known = ", ".join(n for n, _ in model.named_children())
            raise ValueError(f"freeze: the model has no module {name!r}; there are {known} and their parts") from None
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"freeze: nothing is left to train without {', '.join(names)}")


def _checkpoint_layers(model: VLM2Vec) -> None:
    """From now on the layers' activations are computed again in the backward pass instead of kept."""
    for part in (model.vision, model.decoder):
        for layer in getattr(part, "layers", ()):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def _without_gradient(module: nn.Module) -> None:
    """From now on the module computes as in inference, in its own dtype."""
    forward = module.forward

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return forward(x, *args, **kwargs)

    module.forward = call  # type: ignore[method-assign]
