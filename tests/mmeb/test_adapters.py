"""The model inside mteb and inside sentence-transformers, each against plain `Embedder.encode`."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm2vec import Embedder
from minivlm2vec.mini import bundled
from minivlm2vec.new_checkpoint import new_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return new_checkpoint(path, preset="tiny")


@pytest.fixture(scope="module")
def embedder(checkpoint):
    return Embedder.from_pretrained(checkpoint, device="cpu", show_progress=False)


def pictures(number):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 60 + i, 3), np.uint8)) for i in range(number)]


# --- mteb ------------------------------------------------------------------------------------------------


@pytest.fixture
def mteb(monkeypatch, tmp_path):
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "mteb"))
    return pytest.importorskip("mteb")


def tiny_task(mteb, texts, images):
    """Text to image retrieval over a handful of pictures, held in memory."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class TinyRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="TinyRetrieval",
            description="A few pictures.",
            dataset={"path": "none/none", "revision": "1"},
            type="Any2AnyRetrieval",
            category="t2i",
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **kwargs):
            queries = Dataset.from_dict({"id": [f"q{i}" for i in range(len(texts))], "text": texts,
                                         "modality": ["text"] * len(texts)})  # fmt: skip
            corpus = Dataset.from_dict({"id": [f"d{i}" for i in range(len(images))], "image": images,
                                        "modality": ["image"] * len(images)})  # fmt: skip
            relevant = {f"q{i}": {f"d{i}": 1} for i in range(len(texts))}
            split = {"queries": queries, "corpus": corpus, "relevant_docs": relevant, "top_ranked": None}
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return TinyRetrieval()


def test_mteb_runs_a_task_and_scores_as_computed_here(mteb, embedder, tmp_path):
    from minivlm2vec.mmeb.mteb_model import VLM2VecModel

    texts, images = [f"picture {i}" for i in range(12)], pictures(12)
    model = VLM2VecModel("tiny", embedder=embedder, num_crops=1)
    task = tiny_task(mteb, texts, images)
    result = mteb.evaluate(model, task, cache=None, show_progress_bar=False, co2_tracker=False)
    (scores,) = result.task_results[0].scores["test"]

    options = {"num_crops": 1, "max_length": 256}
    queries = embedder.encode(
        [f"Find me an everyday image that matches the given caption: {t}\n" for t in texts], **options
    )
    documents = embedder.encode(
        [{"text": "<|image_1|>\nRepresent the given image.\n", "image": i} for i in images], **options
    )
    cosines = queries @ documents.T
    ranks = (cosines > np.diag(cosines)[:, None]).sum(axis=1)
    assert scores["hit_rate_at_1"] == pytest.approx((ranks == 0).mean(), abs=1e-4)
    ndcg = np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean()
    assert scores["ndcg_at_10"] == pytest.approx(ndcg, abs=1e-4)


def test_mteb_model_describes_itself(mteb, embedder):
    from minivlm2vec.mmeb.mteb_model import VLM2VecModel

    meta = VLM2VecModel("some/folder/tiny", embedder=embedder).mteb_model_meta
    assert meta.name == "local/tiny" and meta.embed_dim == embedder.dimension
    assert meta.n_parameters == sum(p.numel() for p in embedder.model.parameters())
    assert set(meta.modalities) == {"text", "image"}
    with pytest.raises(ValueError, match="instructions is one of task, fixed, got 'none'"):
        VLM2VecModel("tiny", embedder=embedder, instructions="none")


class Recording:
    """An embedder that keeps what it is given."""

    def __init__(self, embedder):
        self.model, self.dimension, self.inputs = embedder.model, embedder.dimension, []

    def encode(self, inputs, **options):
        self.inputs += inputs
        return np.ones((len(inputs), self.dimension), np.float32)


def test_mteb_inputs_are_wrapped_by_task(mteb, embedder):
    from minivlm2vec.mmeb.mteb_model import VLM2VecModel

    (image,) = pictures(1)
    about = SimpleNamespace(name="X", type="Any2AnyRetrieval", category="it2t")
    query, document = mteb.types.PromptType.query, mteb.types.PromptType.document

    def wrapped(batch, prompt_type, **options):
        recording = Recording(embedder)
        model = VLM2VecModel("tiny", embedder=recording, **options)
        vectors = model.encode([batch], task_metadata=about, prompt_type=prompt_type)
        assert vectors.shape == (len(recording.inputs), embedder.dimension)
        return recording.inputs

    both = {"text": ["where {text} is it?"], "image": [image]}
    question = "Represent the given image with the following question: {}\n"
    assert wrapped(both, query) == [{"text": question.format("where {text} is it?"), "image": image}]
    assert wrapped({"text": ["here", "there"]}, document) == ["here", "there"]
    fixed = wrapped({"image": [image]}, document, instructions="fixed")
    assert fixed == [{"text": "<|image_1|> Represent the given image.", "image": image}]
    mixed = {"text": ["a", ""], "image": [None, image]}
    assert wrapped(mixed, document) == ["a", {"text": "Represent the given image.\n", "image": image}]
    own = wrapped({"text": ["a"]}, query, prompts_dict={"X": "look: "})
    assert own == ["look: a"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("ZeroShotClassification", "i2t", None, False, True), "Represent the given image for classification\n"),
        (("ZeroShotClassification", "i2t", None, True, False), "{text}"),
        (("Any2AnyRetrieval", "i2i", "query", False, True),
         "Find a day-to-day image that looks similar to the provided image.\n"),
        (("Any2AnyRetrieval", "i2i", "document", False, True), "Represent the given image.\n"),
        (("DocumentUnderstanding", "t2i", "query", True, False),
         "Find the document image that can answer the given query: {text}\n"),
        (("Any2AnyRetrieval", "it2i", "query", True, True),
         "Given an image, find a similar everyday image with the described changes: {text}\n"),
        (("Any2AnyRetrieval", "t2it", "document", True, True),
         "Represent the given Wikipedia image with related text information: {text}\n"),
        (("STS", "t2t", None, True, False), "{text}"),
    ],
)  # fmt: skip
def test_mteb_instructions(mteb, given, expected):
    from minivlm2vec.mmeb.mteb_model import instruction

    task_type, category, prompt_type, has_text, has_image = given
    assert instruction(task_type, category, prompt_type, has_text=has_text, has_image=has_image) == expected


# --- sentence-transformers -------------------------------------------------------------------------------


@pytest.fixture
def sentence_model(checkpoint):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from minivlm2vec.mmeb.sentence_module import VLM2VecModule

    module = VLM2VecModule(checkpoint, num_crops=1, device="cpu", show_progress=False)
    return sentence_transformers.SentenceTransformer(modules=[module], device="cpu")


def test_sentence_transformer_gives_the_embedders_vectors(sentence_model, embedder):
    first, second = pictures(2)
    inputs = ["a text", first, {"text": "what is this?\n", "image": second}, "a longer text than the first"]
    got = sentence_model.encode(inputs, batch_size=3)
    assert got.dtype == np.float32 and got.shape == (4, embedder.dimension)
    np.testing.assert_allclose(got, embedder.encode(inputs, num_crops=1), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(sentence_model.similarity(got, got).diagonal(), 1, atol=1e-5)
    assert sentence_model.get_embedding_dimension() == embedder.dimension
    assert sentence_model.supports("image") and sentence_model.supports(("text", "image"))


def test_sentence_module_cuts_as_its_embedder_does(checkpoint, embedder):
    pytest.importorskip("sentence_transformers")
    from minivlm2vec.mmeb.sentence_module import VLM2VecModule

    module = VLM2VecModule(checkpoint, num_crops=1, device="cpu", show_progress=False, truncate_dim=8,
                           force_dimensions=True)  # fmt: skip
    vectors = module(module.preprocess(["a cat"]))["sentence_embedding"].detach().numpy()
    assert module.get_embedding_dimension() == 8
    expected = embedder.encode(["a cat"])[:, :8]
    np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected), atol=2e-6)


def test_sentence_transformer_prompts_messages_and_truncation(sentence_model, embedder):
    (image,) = pictures(1)
    prompt = "Represent the given image with the following question: "
    got = sentence_model.encode([{"text": "how many?", "image": image}], prompt=prompt)
    expected = embedder.encode([{"text": f"<|image_1|>\n{prompt}how many?", "image": image}], num_crops=1)
    np.testing.assert_allclose(got, expected, atol=2e-6)

    content = [{"type": "image", "image": image}, {"type": "text", "text": "how many?"}]
    got = sentence_model.encode([[{"role": "user", "content": content}]])
    expected = embedder.encode([{"text": "how many?", "image": image}], num_crops=1)
    np.testing.assert_allclose(got, expected, atol=2e-6)

    short = sentence_model.encode("a text", truncate_dim=16, normalize_embeddings=True)
    assert short.shape == (16,) and np.linalg.norm(short) == pytest.approx(1, abs=1e-5)
    sentence_model.max_seq_length = 4
    cut = sentence_model.encode(["a text that is too long"])
    np.testing.assert_allclose(cut, embedder.encode(["a text that is too long"], max_length=4), atol=2e-6)


def test_sentence_transformer_trains_and_is_found_again(sentence_model, embedder, tmp_path):
    sentence_model.requires_grad_(True)
    features = sentence_model.preprocess(["a", "b"])
    sentence_model(features)["sentence_embedding"].sum().backward()
    grads = [p.grad for p in sentence_model[0].vlm2vec.decoder.parameters()]
    assert any(g is not None and torch.count_nonzero(g) for g in grads)

    sentence_model.save(str(tmp_path / "saved"))
    again = type(sentence_model)(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(again.encode(["a text"]), embedder.encode(["a text"]), atol=2e-6)


def test_bundled_pictures_are_read_by_both_readers(embedder):
    """The shipped pictures decode through the embedder itself."""
    from minivlm2vec.mmeb.dataset import Dataset

    data = Dataset(bundled() / "MMEB-eval")
    (row,) = data.rows(data.subsets["Emoji-i2i"], limit=1)
    vectors = embedder.encode([{"text": p.text, "image": data.images.source(p.image)} for p in row.targets[:4]])
    assert vectors.shape == (4, embedder.dimension) and len(np.unique(vectors.round(6), axis=0)) == 4
