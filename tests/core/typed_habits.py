"""Calls of `Embedder`, and of what type a type checker takes the answers to be."""

import numpy as np
from torch import Tensor
from typing_extensions import assert_type

from minivlm2vec import Embedder

Array = np.ndarray


def check(e: Embedder) -> None:
    arrays = [
        assert_type(e.encode("a"), Array),
        assert_type(e.encode(["a"], batch_size=3, normalize_embeddings=False), Array),
        assert_type(e.encode({"text": "a"}, convert_to="numpy"), Array),
        assert_type(e.encode((x for x in "ab"), convert_to_tensor=False), Array),
        assert_type(e.encode_query("a", prompt_name="t2i"), Array),
        assert_type(e.encode_document(["a"], prompt_name="t2i", truncate_dim=None), Array),
        assert_type(e.similarity(e.encode("a"), e.encode("b", convert_to="torch")), Array),
        assert_type(e.similarity_pairwise(e.encode("a"), e.encode("b")), Array),
    ]
    tensors = [
        assert_type(e.encode(["a"], convert_to="torch"), Tensor),
        assert_type(e.encode(["a"], convert_to_tensor=True, prompt_name="t2i"), Tensor),
        assert_type(e.encode_query("a", convert_to_tensor=True), Tensor),
        assert_type(e.encode_document("a", convert_to="torch"), Tensor),
        assert_type(e.similarity(e.encode("a", convert_to="torch"), e.encode("b")), Tensor),
        assert_type(e.similarity_pairwise(e.encode("a", convert_to="torch"), e.encode("b")), Tensor),
    ]
    assert all(isinstance(x, np.ndarray) for x in arrays) and all(isinstance(x, Tensor) for x in tensors)
    try:
        e.encode(3)  # type: ignore[call-overload]
    except TypeError:
        return
    raise AssertionError
