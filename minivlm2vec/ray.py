"""`minivlm2vec.files.ray`, under the shorter name that it had first."""

from .files.ray import EmbedBatch

__all__ = ["EmbedBatch"]
