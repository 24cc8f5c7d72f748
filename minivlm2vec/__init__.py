"""VLM2Vec-Full in plain PyTorch and Triton: any mix of text and images to one vector."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import PackedBatch
    from .config import VLM2VecConfig
    from .embedder import Embedder
    from .errors import CheckpointError, InputError
    from .model import VLM2Vec
    from .processor import Processor

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Embedder",
    "InputError",
    "PackedBatch",
    "Processor",
    "VLM2Vec",
    "VLM2VecConfig",
]
_HOMES = {
    "CheckpointError": "errors",
    "Embedder": "embedder",
    "InputError": "errors",
    "PackedBatch": "batch",
    "Processor": "processor",
    "VLM2Vec": "model",
    "VLM2VecConfig": "config",
}


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used, so that `import minivlm2vec` does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
