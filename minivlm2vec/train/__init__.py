"""Contrastive training of a VLM2Vec model, on one device or many: `minivlm2vec train CONFIG.toml`.

    from minivlm2vec.train.config import read_config
    from minivlm2vec.train.trainer import Trainer
    Trainer(read_config("CONFIG.toml")).run()

The pieces stand alone: `contrastive_loss` (loss.py), `cached_backward` (gradcache.py), `TrainingData` (data.py).
Nothing is imported here, so that the command line need not import torch's distributed parts.
"""
