"""VLM2Vec-Full in plain PyTorch and Triton: any mix of text and images to one vector."""

__version__ = "0.1.0"
