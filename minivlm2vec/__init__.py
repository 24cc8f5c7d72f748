"""VLM2Vec-Full in plain PyTorch and Triton: any mix of text and images to one vector."""

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
