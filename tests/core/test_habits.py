"""What people call `encode` with: one input, iterables of every kind, and the options of sentence-transformers."""

import re
from collections import UserDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm2vec import Embedder, InputError, prompts
from minivlm2vec.errors import OptionError
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.packing import pack_by_length
from tests.core import typed_habits
from tests.support.golden import synth_image

TEXTS = ["a cat", "a longer text about a dog", "ünïcode 🐈"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("tiny") / "m", preset="tiny", seed=5)


@pytest.fixture(scope="module")
def e(folder) -> Embedder:
    return Embedder.from_pretrained(folder, device="cpu", show_progress=False)


@pytest.fixture(scope="module")
def expected(e) -> np.ndarray:
    return e.encode(TEXTS)


def photo() -> Image.Image:
    return Image.fromarray(synth_image(80, 60, 1))


def close(got, expected) -> None:
    assert got.shape == expected.shape
    assert np.abs(np.asarray(got) - np.asarray(expected)).max() <= 2e-6


# ------------------------------------------------------------------------------------------------------ one input


@pytest.mark.parametrize("one", [
    "a cat", "", np.str_("a cat"), photo(), {"text": "what?", "image": photo()}, {"image": photo()},
    UserDict(text="a cat"),
], ids=["text", "empty", "numpy text", "image", "both", "image in a dict", "mapping"])  # fmt: skip
def test_one_input_gives_one_vector(e, one):
    listed = e.encode([one])
    assert listed.shape == (1, e.dimension)
    close(e.encode(one), listed[0])
    for encode in (e.encode_query, e.encode_document):
        close(encode(one, prompt_name="vqa"), encode([one], prompt_name="vqa")[0])
    as_tensor = e.encode(one, convert_to="torch", normalize=False)
    assert isinstance(as_tensor, torch.Tensor) and as_tensor.shape == (e.dimension,)


def test_one_bad_input_has_no_index(e):
    """It is named, and no place in a list is made up."""
    for one, message in (
        ({"image": b"no image"}, r"8 bytes: "),
        ({"text": 3}, "text: 'text' is a str, got int"),
        ({}, "neither text nor image"),
    ):
        with pytest.raises(InputError, match=message) as error:
            e.encode(one)
        assert error.value.index is None and "input 0" not in str(error.value)
        with pytest.raises(InputError, match="input 0 ") as error:
            e.encode([one])
        assert error.value.index == 0


def test_vectors_that_are_not_finite_are_named_for_one_input_too(e, monkeypatch):
    real = e.embed
    monkeypatch.setattr(e, "embed", lambda items, **k: real(items, **k) * float("nan"))
    with pytest.raises(InputError, match="NaN or infinite") as error:
        e.encode("a")
    assert error.value.index is None


# ------------------------------------------------------------------------------------------------ many inputs


def many():
    yield "tuple", lambda: tuple(TEXTS)
    yield "generator", lambda: (text for text in TEXTS)
    yield "iterator", lambda: iter(TEXTS)
    yield "map", lambda: map(str, TEXTS)
    yield "values", lambda: dict(enumerate(TEXTS)).values()
    yield "keys", lambda: dict.fromkeys(TEXTS).keys()
    yield "deque", lambda: deque(TEXTS)
    yield "array", lambda: np.array(TEXTS)
    yield "array of objects", lambda: np.array(TEXTS, dtype=object)
    yield "Series", lambda: pytest.importorskip("pandas").Series(TEXTS, index=[7, 1, 4])
    yield "Series of Arrow", lambda: pytest.importorskip("pandas").Series(TEXTS, dtype="string")
    yield "Index", lambda: pytest.importorskip("pandas").Index(TEXTS)
    yield "Arrow", lambda: pytest.importorskip("pyarrow").array(TEXTS)
    yield "chunked Arrow", lambda: pytest.importorskip("pyarrow").chunked_array([TEXTS[:1], TEXTS[1:]])
    yield "column of datasets", lambda: pytest.importorskip("datasets").Dataset.from_dict({"t": TEXTS})["t"]
    yield "rows of datasets", lambda: pytest.importorskip("datasets").Dataset.from_dict({"text": TEXTS})


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in many()])
def test_whatever_has_an_order_is_a_list(e, expected, make):
    close(e.encode(make()), expected)


def test_one_element_is_still_a_list(e, expected):
    for inputs in (TEXTS[:1], tuple(TEXTS[:1]), iter(TEXTS[:1]), np.array(TEXTS[:1])):
        close(e.encode(inputs), expected[:1])
    for nothing in ([], (), iter([]), {}.values(), np.array([], dtype=str)):
        assert e.encode(nothing).shape == (0, e.dimension)


async def asynchronous():
    yield "a"


@pytest.mark.parametrize(("inputs", "message"), [
    (3, "got int; an input is a text, a PIL image, or a dict"),
    (None, "got NoneType; an input is a text"),
    (b"x", 'got bytes; the bytes of an image go in as {"image": bytes}'),
    (bytearray(b"x"), 'got bytearray; the bytes of an image go in as {"image": bytes}'),
    (Path("x.jpg"), 'the path of an image goes in as {"image": path}'),
    ({"a", "b"}, "got set; a set has no order"),
    (frozenset("a"), "got frozenset; a set has no order"),
    (np.zeros((4, 5, 3), np.uint8), 'uint8 [4, 5, 3] is no list of texts; an image goes in as {"image": array'),
    (np.array([["a", "b"]]), "<U1 [1, 2] is no list of texts"),
    (np.array("a"), "<U1 [] is no list of texts"),
    (torch.zeros(2, 3), "torch.float32 [2, 3] is no list of texts"),
    (asynchronous(), "got async_generator; collect it first"),
])  # fmt: skip
def test_what_is_no_list_says_what_to_pass(e, inputs, message):
    with pytest.raises(TypeError, match=r"inputs is one input or a list of inputs, got \w+; ") as error:
        e.encode(inputs)
    assert message in str(error.value)


def test_a_table_is_not_read_as_the_names_of_its_columns(e):
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    for table in (pandas.DataFrame({"text": TEXTS}), pyarrow.table({"text": TEXTS})):
        with pytest.raises(TypeError, match="of a table, pass one column, or its rows as dicts"):
            e.encode(table)
        rows = table.to_dict("records") if isinstance(table, pandas.DataFrame) else table.to_pylist()
        assert e.encode(rows).shape == (3, e.dimension)


@pytest.mark.parametrize(("item", "message"), [
    (Path("x.jpg"), 'got PosixPath; the path of an image goes in as {"image": path}'),
    (b"x", 'got bytes; the bytes of an image go in as {"image": bytes}'),
    (np.zeros((4, 5, 3), np.uint8), 'an image goes in as {"image": array uint8 [H, W, 3]}'),
    (float("nan"), "got float"), (None, "got NoneType"), (["a"], "got list"),
])  # fmt: skip
def test_a_bad_element_has_its_place(e, item, message):
    with pytest.raises(InputError) as error:
        e.encode(iter(["a", item]))
    assert message in str(error.value).replace("WindowsPath", "PosixPath") and error.value.index == 1


# ---------------------------------------------------------------------------------------------------- prompt_name


def test_prompt_name_in_encode(e):
    image = photo()
    for name, task in prompts.TASKS.items():
        assert prompts.instruction(name) == prompts.instruction(f"{name}-query") == task.query
        assert prompts.instruction(f"{name}-document") == task.document
    close(e.encode("a cat", prompt_name="t2i"), e.encode_query("a cat", prompt_name="t2i"))
    close(e.encode([image], prompt_name="t2i-document"), e.encode_document([image], prompt_name="t2i"))
    assert np.abs(e.encode("a", prompt_name="t2i") - e.encode("a")).max() > 1e-4
    with pytest.raises(ValueError, match="no task is named 'query'; there are classify"):
        e.encode("a", prompt_name="query")
    with pytest.raises(ValueError, match="no task is named 'nope'"):
        e.encode("a", prompt_name="nope-document")
    with pytest.raises(ValueError, match="prompt and prompt_name are both given"):
        e.encode("a", prompt_name="t2i", prompt="b")


# -------------------------------------------------------------------------------- options of sentence-transformers


def test_options_by_their_names(e, expected, capsys):
    raw = e.encode(TEXTS, normalize=False)
    close(e.encode(TEXTS, normalize_embeddings=True), expected)
    close(e.encode(TEXTS, normalize_embeddings=False), raw)
    got = e.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(got, torch.Tensor)
    close(got, expected)
    assert isinstance(e.encode(TEXTS, convert_to_tensor=True, convert_to_numpy=False), torch.Tensor)
    assert isinstance(e.encode(TEXTS, convert_to_tensor=False, convert_to_numpy=True), np.ndarray)
    assert isinstance(e.encode_query("a", prompt_name="t2i", convert_to_tensor=True), torch.Tensor)
    defaults = {"precision": "float32", "output_value": "sentence_embedding", "pool": None, "chunk_size": None,
                "device": None, "show_progress_bar": None}  # fmt: skip
    close(e.encode(TEXTS, **defaults), expected)
    for device in ("cpu", torch.device("cpu")):
        close(e.encode(TEXTS, device=device), expected)
    assert "Embedding" not in capsys.readouterr().err
    e.encode(TEXTS, show_progress_bar=True)
    assert "Embedding" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    ({"normalize": False, "normalize_embeddings": True}, "normalize is False and normalize_embeddings is True"),
    ({"normalize_embeddings": None}, "normalize_embeddings is None; True or False is needed"),
    ({"convert_to_tensor": "yes"}, "convert_to_tensor is 'yes'; True or False"),
    ({"convert_to_numpy": False}, "convert_to='torch' gives one tensor"),
    ({"precision": "int8"}, "precision is 'int8'; only 'float32' is possible"),
    ({"output_value": "token_embeddings"}, "model.trace gives hidden states"),
    ({"pool": {}}, "torchrun"), ({"chunk_size": 5}, "torchrun"),
    ({"device": "cuda"}, "device is 'cuda', and the model is on cpu"),
    ({"device": ["cpu", "cpu"]}, r"device is \['cpu', 'cpu'\], and the model is on cpu"),
    ({"device": "nonsense"}, "device is 'nonsense'"),
    ({"processing_kwargs": {"text": {}}}, "num_crops and max_length are options of encode"),
    ({"task": "query"}, "prompt_name names a task's instruction"),
    ({"batch_size": 0}, "batch_size is 0; at least 1"), ({"batch_size": 1.5}, "batch_size is 1.5; a whole number"),
])  # fmt: skip
def test_options_that_have_no_meaning_say_what_has(e, options, message):
    with pytest.raises(OptionError, match=message):
        e.encode(TEXTS, **options)


def test_an_unknown_option_is_named(e):
    with pytest.raises(TypeError, match=r"encode has no option 'normalise'; did you mean normalize\?"):
        e.encode(TEXTS, normalise=True)
    with pytest.raises(TypeError, match="did you mean convert_to_tensor"):
        e.encode_query(TEXTS, convert_to_tensors=True)
    with pytest.raises(TypeError, match=r"encode has no option 'xyzzy'$"):
        e.encode(TEXTS, xyzzy=True)


def test_batch_size_bounds_a_pack(e, expected, monkeypatch):
    sizes, real = [], e.prepare
    monkeypatch.setattr(e, "prepare", lambda items: sizes.append(len(items)) or real(items))
    close(e.encode(TEXTS, batch_size=2), expected)
    assert sizes == [2, 1]
    assert pack_by_length([3, 3, 3, 3, 9], 7, batch_size=None) == [[4], [0, 1], [2, 3]]
    assert pack_by_length([3, 3, 3, 3, 9], 100, batch_size=3) == [[4, 0, 1], [2, 3]]


# -------------------------------------------------------------------------------------------------------- similarity


def test_similarity_pairwise(e, expected):
    other = e.encode(["x", "y", "z"], normalize=False)
    got = e.similarity_pairwise(expected, other)
    assert got.dtype == np.float32 and got.shape == (3,)
    np.testing.assert_allclose(got, np.diag(e.similarity(expected, other)), atol=1e-6)
    tensors = e.similarity_pairwise(torch.from_numpy(expected), other)
    assert isinstance(tensors, torch.Tensor)
    np.testing.assert_allclose(tensors.numpy(), got, atol=1e-6)
    assert e.similarity_pairwise(expected[:0], other[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"\[N, D\] and \[N, D\], got \[3, 64\] and \[2, 64\]"):
        e.similarity_pairwise(expected, other[:2])


def test_one_vector_is_a_row(e, expected):
    one = e.encode(TEXTS[0])
    np.testing.assert_allclose(e.similarity(one, expected), e.similarity(expected[:1], expected), atol=1e-6)
    assert e.similarity(expected, one).shape == (3, 1)
    assert e.similarity_pairwise(one, one) == pytest.approx([1], abs=1e-6)
    for bad in (expected[None], np.float32(3)):
        with pytest.raises(ValueError, match=r"vectors are \[N, D\], or one is \[D\], got"):
            e.similarity(bad, expected)
    with pytest.raises(ValueError, match="vectors are an array or a tensor, got str"):
        e.similarity("a", expected)


# --------------------------------------------------------------------------------------------------- one line changes

SCRIPT = """
query = model.encode("a cat", prompt_name="vqa", normalize_embeddings=True)
pairs = model.encode(texts, batch_size=2, show_progress_bar=False, normalize_embeddings=True)
tensors = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
mixed = model.encode([image, {"text": "what?", "image": image}, "a text"], prompt="Read it: ")
cut = model.encode(texts, truncate_dim=16, normalize_embeddings=True)
array = model.encode(np.array(texts))
asked = model.encode_query(texts[0], prompt="Find it: ")
found = model.encode_document([image], prompt="Represent it.", convert_to_tensor=True)
scores = model.similarity(torch.from_numpy(pairs), tensors)
one = model.similarity(tensors[0], tensors)
same = model.similarity_pairwise(tensors, tensors)
size = model.get_embedding_dimension()
empty = model.encode([], convert_to_tensor=True)
"""


def test_a_user_of_sentence_transformers_changes_one_line(folder):
    """The same script runs with either model, and gives the same."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    from minivlm2vec.mmeb.sentence_module import VLM2VecModule

    model = VLM2VecModule(folder, device="cpu", show_progress=False)
    named = {name: task.query for name, task in prompts.TASKS.items() if "{text}" not in task.query}
    named["vqa"] = prompts.TASKS["vqa"].query  # the module knows where the text goes
    theirs = SentenceTransformer(modules=[model], prompts=named, device="cpu")
    ours = Embedder.from_pretrained(folder, device="cpu", force_dimensions=True, show_progress=False)
    results = []
    for model in (theirs, ours):
        names = {"model": model, "texts": TEXTS, "image": photo(), "np": np, "torch": torch}
        exec(SCRIPT, names)
        results.append({name: names[name] for name in re.findall(r"^(\w+) =", SCRIPT, re.MULTILINE)})
    for name, expected in results[0].items():
        got = results[1][name]
        assert type(got) is type(expected), name
        if name == "empty":
            assert len(got) == len(expected) == 0
        elif name == "size":
            assert got == expected
        else:
            close(got, expected)


def test_what_type_checkers_are_told_is_so(e):
    """`typed_habits` is in mypy's files: there the types are checked, here the values."""
    typed_habits.check(e)
