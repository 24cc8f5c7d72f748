"""Embedder: the invariant, the options, and what happens to bad inputs in a list of good ones."""

import base64
import copy
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm2vec import CheckpointError, Embedder, InputError, prompts
from minivlm2vec.errors import OptionError
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.weights import load_model
from tests.support.golden import synth_image


@pytest.fixture(scope="module")
def e(tmp_path_factory) -> Embedder:
    folder = new_checkpoint(tmp_path_factory.mktemp("tiny") / "m", preset="tiny", seed=5)
    return Embedder.from_pretrained(folder, device="cpu", show_progress=False)


def photo(width=80, height=60, seed=0) -> Image.Image:
    return Image.fromarray(synth_image(width, height, seed))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def mixed():
    """Texts and images of many lengths; one is beyond `original_max_position_embeddings` (512)."""
    return [
        "a cat", "", "x" * 700, {"text": "what is left of the dog?", "image": photo(seed=1)}, photo(200, 30, 2),
        {"text": "<|image_2|> or <|image_1|>", "images": [photo(30, 90, 3), photo(31, 31, 4)]}, "ünïcode 🐈 text",
        {"text": "no tag", "images": [photo(5, 5, 5)]}, "b" * 300,
    ]  # fmt: skip


def test_a_vector_does_not_depend_on_its_neighbours(e, mixed):
    """Alone, in any pack, in any order, at any batch_tokens."""
    alone = np.concatenate([e.encode([x]) for x in mixed])
    worst = 0.0
    for seed, batch_tokens in enumerate([1, 64, 700, 1100, 16384]):
        order = np.random.default_rng(seed).permutation(len(mixed))
        vectors = e.encode([mixed[i] for i in order], batch_tokens=batch_tokens)
        worst = max(worst, np.abs(vectors - alone[order]).max())
    print(f"max abs difference {worst:.2g}")
    assert worst <= 2e-6
    assert np.abs(np.linalg.norm(alone, axis=1) - 1).max() < 1e-6


def test_a_dtype_in_words(tmp_path):
    folder = new_checkpoint(tmp_path / "m", preset="tiny", seed=5)

    def load(dtype, **options) -> Embedder:
        return Embedder.from_pretrained(folder, device="cpu", dtype=dtype, show_progress=False, **options)

    for dtype in ("float16", "torch.float16", torch.float16):
        assert load(dtype).model.dtype == torch.float16 == load_model(folder, dtype=dtype).dtype
    assert load("bfloat16", precision="bf16").model.dtype == torch.bfloat16
    for dtype in ("float16", torch.float16):
        with pytest.raises(ValueError, match=r"'bf16' and dtype=torch\.float16 exclude each other"):
            load(dtype, precision="bf16")
    with pytest.raises(ValueError, match="fp8"):
        load("float32", precision="fp8")
    for dtype in ("half precision", "int8", torch.int8, "auto", "Tensor", 16, "float8_e4m3fn"):
        with pytest.raises(OptionError, match=r"dtype is .*; bfloat16, float16 or float32 is needed"):
            load(dtype)


def test_a_tokenizer_is_read_before_the_weights(tmp_path):
    folder = new_checkpoint(tmp_path / "m", preset="tiny", seed=5)
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist"):
        Embedder.from_pretrained(folder, device="cpu", show_progress=False)


def test_different_inputs_have_different_vectors(e, mixed):
    scores = e.similarity(e.encode(mixed), e.encode(mixed))
    assert (scores - np.eye(len(mixed)) < 0.9999).all()


def test_every_kind_of_image_source_is_the_same_input(e, tmp_path):
    image = photo()
    image.save(tmp_path / "p.png")
    uri = "data:image/png;base64," + base64.b64encode(png(image)).decode()
    sources = [tmp_path / "p.png", str(tmp_path / "p.png"), image, np.asarray(image), png(image), uri]
    vectors = e.encode([{"text": "hi", "image": s} for s in sources])
    assert np.abs(vectors - vectors[0]).max() <= 2e-6


def test_a_string_is_never_a_path(e, tmp_path):
    photo().save(tmp_path / "p.png")
    path = str(tmp_path / "p.png")
    assert len(e.plan(path).sources) == 0
    assert len(e.plan(path)) > 5


def test_conversions_and_types(e):
    as_numpy, as_torch = e.encode(["a", "b"]), e.encode(["a", "b"], convert_to="torch")
    assert as_numpy.dtype == np.float32 and as_numpy.shape == (2, e.dimension)
    assert as_torch.dtype == torch.float32
    np.testing.assert_array_equal(as_numpy, as_torch.numpy())
    assert e.encode([]).shape == (0, e.dimension) and e.encode([]).dtype == np.float32


def test_normalize_false_keeps_the_direction(e):
    raw, unit = e.encode(["a cat"], normalize=False), e.encode(["a cat"])
    assert abs(np.linalg.norm(raw) - 1) > 1e-3
    np.testing.assert_allclose(raw / np.linalg.norm(raw), unit, atol=1e-6)


def test_similarity(e):
    a, b = e.encode(["a", "b", "c"]), e.encode(["a", "d"], normalize=False)
    scores = e.similarity(a, b)
    assert scores.shape == (3, 2) and scores.dtype == np.float32
    assert scores[0, 0] == pytest.approx(1, abs=1e-6) and scores.max() <= 1 + 1e-6
    assert isinstance(e.similarity(torch.from_numpy(a), b), torch.Tensor)
    with pytest.raises(ValueError, match=r"\[3, 64\] and \[2, 5\]"):
        e.similarity(a, np.zeros((2, 5), np.float32))


def test_num_crops_is_an_option_of_the_call(e):
    few, many = e.plan({"image": photo()}, num_crops=1), e.plan({"image": photo()}, num_crops=9)
    assert len(few) < len(many)
    a, b = e.encode([photo()], num_crops=1), e.encode([photo()], num_crops=9)
    assert np.abs(a - b).max() > 1e-4


def test_named_instructions(e):
    named = e.encode_query(["A cat and a dog."], prompt_name="t2i")
    text = "Find me an everyday image that matches the given caption: A cat and a dog.\n"
    np.testing.assert_array_equal(named, e.encode([text]))
    document = e.encode_document([photo()], prompt_name="t2i")
    written = e.encode([{"text": "<|image_1|>\nRepresent the given image.\n", "image": photo()}])
    np.testing.assert_array_equal(document, written)
    with pytest.raises(ValueError, match="no task is named 'nope'; there are classify"):
        e.encode_query(["x"], prompt_name="nope")
    with pytest.raises(ValueError, match="both given"):
        e.encode_query(["x"], prompt_name="t2i", prompt="y")
    for task in prompts.TASKS.values():
        assert task.query.endswith(("\n", "{text}\n")) and "<|image" not in task.query + task.document


@pytest.mark.parametrize("options, message", [
    ({"batch_tokens": 0}, "batch_tokens is 0"), ({"max_length": 0}, "max_length is 0"),
    ({"num_crops": 0}, "num_crops is 0"), ({"convert_to": "list"}, "'list'"),
])  # fmt: skip
def test_options_are_checked(e, options, message):
    with pytest.raises(ValueError, match=message):
        e.encode(["x"], **options)


def test_a_bad_header_stops_the_call_before_anything_is_computed(e, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(e, "embed", lambda *a, **k: calls.append(1))
    with pytest.raises(InputError, match=r"input 2 \(.*gone.jpg\): no such file") as error:
        e.encode(["a", "b", {"image": tmp_path / "gone.jpg"}, {"image": b""}])
    assert error.value.index == 2 and error.value.name.endswith("gone.jpg") and not calls


def test_truncated_pixels_leave_what_was_finished(e):
    good = ["a" * n for n in range(40, 200, 10)]
    damaged = png(photo(40, 40, 1))
    damaged = damaged[: len(damaged) // 2]
    inputs = [*good, {"text": "x", "image": damaged}]
    with pytest.raises(InputError, match=r"input 16 \(\d+ bytes\): the image cannot be decoded") as error:
        e.encode(inputs, batch_tokens=100)
    partial = error.value.partial
    assert partial, "longer inputs were finished before"
    expected = e.encode(good)
    for i, vector in partial.items():
        assert np.abs(vector - expected[i]).max() <= 2e-6


def test_vectors_that_are_not_finite_are_named(e, monkeypatch):
    real = e.embed
    monkeypatch.setattr(e, "embed", lambda items, **k: real(items, **k) * float("nan"))
    with pytest.raises(InputError, match=r"input 0 \(text\).*NaN or infinite.* 1 more"):
        e.encode(["a", "b"])


def test_image_tokens_that_do_not_fit_are_counted(tmp_path):
    folder = new_checkpoint(tmp_path / "m", preset="tiny", seed=5)
    e = Embedder.from_pretrained(folder, device="cpu", optimize=False, show_progress=False)

    class Short(torch.nn.Module):
        def forward(self, features, grids):
            return torch.zeros(3, e.dimension)

    e.model.projector = Short()
    with pytest.raises(ValueError, match=r"3 image tokens.* 27"):
        e.encode([photo()], num_crops=4)


def test_fast_decode_is_near_and_smaller(e):
    from minivlm2vec.processor import Processor

    image = photo(1600, 1200, 7)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    fast = Processor(e.processor.tokenizer, e.processor.config, fast_decode=True)
    exact = e.processor
    a, b = (p.load(p.plan({"image": buffer.getvalue()})) for p in (fast, exact))
    assert a.planned.grids == b.planned.grids
    difference = np.abs(a.crops[0].astype(int) - b.crops[0].astype(int))
    assert 0 < difference.mean() < 12, difference.mean()


def test_progress_bar(e, capsys):
    e.encode(["a", "b"], show_progress=True)
    assert "Embedding" in capsys.readouterr().err


def test_devices_default_to_what_is_there():
    from minivlm2vec.embedder import default_device

    assert default_device().type in ("cuda", "mps", "cpu")
    if torch.cuda.is_available():
        assert default_device().type == "cuda"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 2.5}, "max_length is 2.5; a whole number is needed"),
        ({"batch_tokens": "9"}, "batch_tokens is '9'; a whole number is needed"),
        ({"num_crops": True}, "num_crops is True; a whole number is needed"),
        ({"prompt": 3}, "prompt is a text, got 3"),
    ],
)
def test_options_of_another_type_are_named(e, options, message):
    with pytest.raises(ValueError, match=message):
        e.encode(["a"], **options)
    assert e.encode(["a"], max_length=np.int64(4)).shape == (1, e.dimension)


# ------------------------------------------------------------------------------------------------ copied and pickled


@pytest.fixture
def plain(e) -> Embedder:
    return Embedder.from_pretrained(e.model.checkpoint, device="cpu", optimize=False, num_crops=2, show_progress=False)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_an_embedder_with_a_plain_model_is_copied_whole(plain, mixed, how):
    before, other = plain.encode(mixed), how(plain)
    with torch.no_grad():
        plain.model.decoder.norm.weight.zero_()
    assert np.array_equal(other.encode(mixed), before)
    assert (other.name, other.processor.num_crops) == (plain.name, 2) and other.fingerprint != plain.fingerprint


def encoded(embedder, inputs, queue) -> None:
    queue.put(embedder.encode(inputs))


def test_an_embedder_goes_to_a_spawned_process(plain):
    context = torch.multiprocessing.get_context("spawn")
    queue, inputs = context.Queue(), ["a cat", {"text": "what?", "image": png(photo())}]
    process = context.Process(target=encoded, args=(plain, inputs, queue))
    process.start()
    assert np.abs(queue.get(timeout=120) - plain.encode(inputs)).max() < 2e-6
    process.join()


@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps])
def test_a_fast_embedder_says_what_to_do_instead(e, how):
    """Its packed weights have no form to be copied in."""
    with pytest.raises(
        RuntimeError, match=r"copied or pickled: load the model with optimize=False, or anew \(from_pretr"
    ):
        how(e)
    other = copy.copy(e)  # the same model with other settings
    assert other.model is e.model and np.array_equal(other.encode(["a"]), e.encode(["a"]))


def test_the_fingerprint_is_that_of_the_weights(e, plain):
    """Alike for the fast and the plain model; another where any tensor, the pooling, causality or precision is."""
    known = {plain.fingerprint}
    assert e.fingerprint in known
    for change in (
        lambda m: m.projector.mlp[2].bias.data.add_(1e-3),
        lambda m: m.vision.layers[0].mlp.fc1.weight.data.mul_(1.001),
        lambda m: setattr(m, "causal", False),
        lambda m: setattr(m, "pooling", torch.nn.Identity()),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.register_buffer("scale", torch.tensor(True)),
    ):
        change(plain.model)
        assert plain.fingerprint not in known
        known.add(plain.fingerprint)
