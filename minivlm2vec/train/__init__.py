"""Contrastive training of a VLM2Vec model, on one device or many: `minivlm2vec train CONFIG.toml`.

    folder = train(read_config("CONFIG.toml"))
    trainer = Trainer(TrainConfig(...), loss=my_loss, optimizer=my_optimizer)

config       CONFIG.toml -> frozen dataclasses
trainer      the recipe; its parts can be replaced
data         rows, in files or from a source of your own
inputs       rows -> tokens and crops
model        what of the model is trained
loss         InfoNCE
gradcache    the gradient of a large batch in the memory of a small one
engine       one process, DDP or FSDP
checkpoint   what is written, and read to go on
log          log.jsonl, TensorBoard
pictures     sheets of queries and their nearest targets
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .config import DataConfig, LogConfig, LossConfig, OptimConfig, TrainConfig, read_config
    from .trainer import Trainer, TrainingError, check_data, train

_HOMES = {
    "DataConfig": "config",
    "LogConfig": "config",
    "LossConfig": "config",
    "OptimConfig": "config",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "TrainingError": "trainer",
    "check_data": "trainer",
    "read_config": "config",
    "train": "trainer",
}
__all__ = [
    "DataConfig",
    "LogConfig",
    "LossConfig",
    "OptimConfig",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "check_data",
    "read_config",
    "train",
]

__getattr__ = lazy_names(__name__, _HOMES)  # a process that only draws rows needs no torch
