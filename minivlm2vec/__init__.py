"""VLM2Vec-Full in plain PyTorch and Triton: any mix of text and images to one vector."""

from typing import TYPE_CHECKING

from .lazy import lazy_names

if TYPE_CHECKING:
    from .batch import PackedBatch
    from .config import VLM2VecConfig
    from .embedder import Embedder
    from .errors import CheckpointError, InputError
    from .model import VLM2Vec
    from .processor import Processor
    from .registry import load_plugin, register

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Embedder",
    "InputError",
    "PackedBatch",
    "Processor",
    "VLM2Vec",
    "VLM2VecConfig",
    "load_plugin",
    "register",
]
_HOMES = {
    "CheckpointError": "errors",
    "Embedder": "embedder",
    "InputError": "errors",
    "PackedBatch": "batch",
    "Processor": "processor",
    "VLM2Vec": "model",
    "VLM2VecConfig": "config",
    "load_plugin": "registry",
    "register": "registry",
}

__getattr__ = lazy_names(__name__, _HOMES)  # `import minivlm2vec` does not import torch


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
