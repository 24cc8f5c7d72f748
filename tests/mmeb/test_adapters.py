"""The model inside mteb and inside sentence-transformers, each against plain `Embedder.encode`."""

import copy
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm2vec import Embedder, InputError
from minivlm2vec.lora import LoraConfig, add_lora, save_adapter
from minivlm2vec.mini import bundled
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.weights import load_model


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
    assert set(meta.modalities) == {"text", "image"}
    with pytest.raises(ValueError, match="instructions is one of task, fixed, got 'none'"):
        VLM2VecModel("tiny", embedder=embedder, instructions="none")


@pytest.mark.parametrize("options", [{"optimize": False}, {"prepack": True}, {"prepack": False}, {"precision": "fp8"}])
def test_mteb_model_knows_its_size_however_it_is_stored(mteb, checkpoint, options):
    from minivlm2vec.mmeb.mteb_model import VLM2VecModel

    dtype = torch.bfloat16 if "precision" in options else None
    plain = Embedder.from_pretrained(checkpoint, device="cpu", optimize=False, show_progress=False, dtype=dtype).model
    count = sum(p.numel() for p in plain.parameters())
    meta = VLM2VecModel(checkpoint, device="cpu", show_progress=False, dtype=dtype, **options).mteb_model_meta
    assert (meta.n_parameters, meta.n_embedding_parameters) == (count, plain.decoder.embed_tokens.weight.numel())
    whole = count * plain.dtype.itemsize / 2**20
    assert meta.memory_usage_mb == pytest.approx(whole, rel=1e-6) if dtype is None else 0 < meta.memory_usage_mb < whole


def with_lora(checkpoint, folder):
    """An adapter that changes vectors."""
    config = LoraConfig(r=2, target_modules=("qkv_proj", "down_proj"))
    model = add_lora(load_model(checkpoint), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    save_adapter(model, folder, config)
    return folder


def test_mteb_keeps_results_of_different_models_apart(mteb, checkpoint, tmp_path):
    """Two runs' checkpoints of one name, an adapter, every option that changes vectors, and weights changed in memory
    have revisions of their own; the same model, plain, fast or loaded again, has one."""
    from minivlm2vec.mmeb.mteb_model import VLM2VecModel

    first, second = (
        new_checkpoint(tmp_path / run / "step-000500", preset="tiny", seed=i) for i, run in enumerate("ab")
    )
    moved = shutil.copytree(first, tmp_path / "c" / "step-000500")
    lora = with_lora(first, tmp_path / "lora")

    def made(folder=first, **options):
        return VLM2VecModel(str(folder), device="cpu", show_progress=False, **options).mteb_model_meta

    same = [made(), made(moved), made(optimize=False), made(prepack=False), made(share_prefixes=False)]
    assert len({(m.name, m.revision) for m in same}) == 1 and same[0].name == "local/step-000500"
    trained = Embedder.from_pretrained(first, device="cpu", optimize=False, show_progress=False)
    with torch.no_grad():
        trained.model.decoder.norm.weight.mul_(1.5)
    mean = Embedder.from_pretrained(first, device="cpu", optimize=False, show_progress=False)
    mean.model.causal = False
    others = [
        same[0], made(second), made(adapter=lora), made(adapter=lora, optimize=False, num_crops=2), made(num_crops=1),
        made(max_length=None), made(instructions="fixed"), made(prompts_dict={"X": "a"}), made(prompts_dict={"X": "b"}),
        made(dtype=torch.bfloat16), made(dtype=torch.bfloat16, precision="fp8"), made(exif_transpose=True),
        made(revision="main"), made(truncate_dim=8, force_dimensions=True), made(embedder=trained), made(embedder=mean),
    ]  # fmt: skip
    assert len({m.revision for m in others}) == len(others)
    adapted = made(adapter=lora)
    assert (adapted.name, adapted.adapted_from) == ("local/lora", "local/step-000500")
    loaded = Embedder.from_pretrained(first, adapter=lora, device="cpu", show_progress=False)
    by_hand = VLM2VecModel(embedder=loaded).mteb_model_meta
    assert (by_hand.name, by_hand.adapted_from, by_hand.revision) == (
        "local/lora",
        adapted.adapted_from,
        adapted.revision,
    )


def test_mteb_cache_does_not_give_one_models_results_to_another(mteb, checkpoint, tmp_path):
    from minivlm2vec.mmeb.mteb_model import VLM2VecModel

    texts, images, encoded, scores = [f"picture {i}" for i in range(12)], pictures(12), [], []

    class Counting(VLM2VecModel):
        def encode(self, *args, **kwargs):
            encoded[-1] = True
            return super().encode(*args, **kwargs)

    folders = [new_checkpoint(tmp_path / run / "step-000500", preset="tiny", seed=i) for i, run in enumerate("ab")]
    for folder in (*folders, folders[0]):
        encoded.append(False)
        model = Counting(str(folder), num_crops=1, device="cpu", show_progress=False)
        result = mteb.evaluate(model, tiny_task(mteb, texts, images), show_progress_bar=False, co2_tracker=False)
        scores.append(result.task_results[0].scores["test"][0]["ndcg_at_10"])
    assert encoded == [True, True, False]  # the last is read from the cache
    assert scores[0] == scores[2] != scores[1]


class Recording:
    """An embedder that keeps what it is given."""

    def __init__(self, embedder):
        self.model, self.dimension, self.inputs = embedder.model, embedder.dimension, []
        self.processor, self.fingerprint = embedder.processor, embedder.fingerprint

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


def test_sentence_module_cuts_as_its_embedder_does(checkpoint, embedder, tmp_path):
    pytest.importorskip("sentence_transformers")
    from minivlm2vec.mmeb.sentence_module import VLM2VecModule

    module = VLM2VecModule(checkpoint, num_crops=1, device="cpu", show_progress=False, truncate_dim=8,
                           force_dimensions=True)  # fmt: skip
    vectors = module(module.preprocess(["a cat"]))["sentence_embedding"].detach().numpy()
    assert module.get_embedding_dimension() == 8
    expected = embedder.encode(["a cat"])[:, :8]
    np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected), atol=2e-6)
    module.save(str(tmp_path))
    again = VLM2VecModule.load(str(tmp_path))
    np.testing.assert_array_equal(again(again.preprocess(["a cat"]))["sentence_embedding"].detach().numpy(), vectors)


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


def mixed(images):
    """Texts, pictures, and both: a picture named twice and out of order, several of a sample, none."""
    both = {"text": "<|image_2|> beside <|image_1|>, then <|image_2|>?", "images": images[:2]}
    return ["a text", images[2], both, "a longer text than the first", {"text": "what?", "image": images[3]}, "b"]


def gradients(model, loss, features):
    model.zero_grad()
    value = loss([dict(f) for f in features], None)
    value.backward()
    return value.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cut", [{"mini_batch_size": 2}, {"mini_batch_size": 1}, {"mini_batch_num_tokens": 60}])
def test_sentence_transformer_cached_loss_is_the_standard_loss(sentence_model, cut):
    """Value and every gradient, of samples with several images, one, and none in each smaller batch."""
    from sentence_transformers.sentence_transformer import losses

    inputs = mixed(pictures(4))
    features = [sentence_model.preprocess(inputs), sentence_model.preprocess(inputs[::-1])]
    value, expected = gradients(sentence_model, losses.MultipleNegativesRankingLoss(sentence_model), features)
    cached = losses.CachedMultipleNegativesRankingLoss(sentence_model, **cut)
    got, grads = gradients(sentence_model, cached, features)
    assert got == pytest.approx(value, abs=1e-5) and value > 0.1
    assert grads.keys() == expected.keys() == dict(sentence_model.named_parameters()).keys()
    for name, grad in grads.items():
        np.testing.assert_allclose(
            grad, expected[name], atol=1e-5 * float(expected[name].abs().max() + 1), err_msg=name
        )


def train(model, loss, folder, steps=3, **options):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    columns = {"anchor": [f"picture {i}" for i in range(6)], "positive": pictures(6), "negative": list("uvwxyz")}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=6, learning_rate=3e-3,
        lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_sentence_transformer_trains_and_saves_whole(sentence_model, tmp_path, name):
    """Three steps of the library's own trainer; its checkpoint, read in by sentence-transformers and by `Embedder`, has
    the trained weights."""
    from sentence_transformers.sentence_transformer import losses

    inputs = mixed(pictures(4))
    before = sentence_model.encode(inputs)  # in inference mode: nothing of it may stay in the way of gradients
    options = {"mini_batch_size": 2} if name.startswith("Cached") else {}
    seen = train(
        sentence_model, getattr(losses, name)(sentence_model, **options), tmp_path, prompts={"anchor": "Find: "}
    )
    assert len(seen) == 3 and seen[-1] < seen[0]
    trained = sentence_model.encode(inputs)
    assert np.abs(trained - before).max() > 1e-2
    folder = tmp_path / "checkpoint-3"
    again = type(sentence_model)(str(folder), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(again.encode(inputs), trained, atol=2e-6)
    ours = Embedder.from_pretrained(folder, device="cpu", num_crops=1, show_progress=False)
    np.testing.assert_allclose(ours.encode(inputs), trained, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"bf16": True}, 0.05), ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-4)],
    ids=["autocast", "compiled"],
)
def test_sentence_transformer_trains_with_the_trainers_own_options(sentence_model, tmp_path, options, tolerance):
    """The same losses as without them."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    torch._dynamo.reset()
    losses = [
        train(model, MultipleNegativesRankingLoss(model), tmp_path, steps=2, save_strategy="no", **more)
        for model, more in ((copy.deepcopy(sentence_model), {}), (sentence_model, options))
    ]
    torch._dynamo.reset()
    np.testing.assert_allclose(losses[1], losses[0], rtol=tolerance)
    assert losses[0][1] < 0.8 * losses[0][0]


def test_sentence_transformer_saves_adapter_and_options(checkpoint, tmp_path):
    from sentence_transformers import SentenceTransformer

    from minivlm2vec.mmeb.sentence_module import VLM2VecModule

    options = {"num_crops": 2, "exif_transpose": True, "fast_decode": True, "dtype": torch.bfloat16}
    embedder = Embedder.from_pretrained(
        checkpoint, adapter=with_lora(checkpoint, tmp_path / "lora"), optimize=False, device="cpu", **options
    )
    module = VLM2VecModule(checkpoint, embedder=embedder, max_seq_length=4, normalize=False)
    model = SentenceTransformer(modules=[module], device="cpu", prompts={"query": "Find: "})
    inputs = [*mixed(pictures(4)), "a text that is longer than four tokens"]
    for _ in range(2):  # the second time over what is there
        model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    np.testing.assert_array_equal(again.encode(inputs), model.encode(inputs))
    assert again[0].get_config_dict() == module.get_config_dict() and again.prompts["query"] == "Find: "
    assert again.dtype == torch.bfloat16 and again[0].max_seq_length == 4 and again[0].num_crops == 2
    base = Embedder.from_pretrained(checkpoint, device="cpu", dtype=torch.bfloat16, show_progress=False)
    cut = base.encode(inputs, max_length=4, num_crops=2, normalize=False)
    assert np.abs(cut - again.encode(inputs)).max() > 0.1, "the adapter is in it"
    other = {"num_crops": 1, "dtype": torch.float32}  # options of the moment go before saved ones
    third = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True, model_kwargs=other)
    assert third.dtype == torch.float32 and third[0].num_crops == 1


def test_sentence_transformer_saves_what_the_model_is(sentence_model, tmp_path):
    """Causality and whatever else config.json records of a changed model."""
    causal = sentence_model.encode(["a text of several tokens"])
    sentence_model[0].vlm2vec.causal = False
    sentence_model.save_pretrained(str(tmp_path))
    again = type(sentence_model)(str(tmp_path), device="cpu", trust_remote_code=True)
    got = again.encode(["a text of several tokens"])
    np.testing.assert_array_equal(got, sentence_model.encode(["a text of several tokens"]))
    assert not again[0].vlm2vec.causal and np.abs(got - causal).max() > 1e-3


def test_sentence_transformer_save_leaves_no_older_shards(sentence_model, tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier, larger model")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    sentence_model.save_pretrained(str(tmp_path))
    assert [f.name for f in tmp_path.glob("model*")] == ["model.safetensors"]
    again = type(sentence_model)(str(tmp_path), device="cpu", trust_remote_code=True)
    np.testing.assert_array_equal(again.encode(["a"]), sentence_model.encode(["a"]))


def test_sentence_transformer_says_what_it_cannot_do(checkpoint, sentence_model, tmp_path):
    from minivlm2vec.mmeb.sentence_module import VLM2VecModule

    with pytest.raises(ValueError, match="a model made fast does not allow: load it with optimize=False"):
        VLM2VecModule(checkpoint, optimize=True, device="cpu")
    with pytest.raises(ValueError, match="no gradient checkpointing; a cached loss"):
        sentence_model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="has no processing_kwargs"):
        sentence_model.encode(["a"], processing_kwargs={"num_crops": 2})
    with pytest.raises(InputError, match="an input is a text, a PIL image, or a dict"):
        sentence_model.encode([["a", "pair"]])
    add_lora(sentence_model[0].vlm2vec, LoraConfig(r=2, target_modules=("qkv_proj",)))
    with pytest.raises(ValueError, match="belongs to an adapter: merge it first"):
        sentence_model.save_pretrained(str(tmp_path))
    assert not [f for f in tmp_path.rglob("*") if "safetensors" in f.name]


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_sentence_transformer_is_copied_whole(sentence_model, how):
    """As its pool of processes does. The copy's embedder and its parameters are one model."""
    inputs = mixed(pictures(4))
    expected, other = sentence_model.encode(inputs), how(sentence_model)
    with torch.no_grad():
        sentence_model[0].vlm2vec.decoder.norm.weight.zero_()
    np.testing.assert_array_equal(other.encode(inputs), expected)
    assert other[0].embedder.model is other[0].vlm2vec


def test_bundled_pictures_are_read_by_both_readers(embedder):
    """The shipped pictures decode through the embedder itself."""
    from minivlm2vec.mmeb.dataset import Dataset

    data = Dataset(bundled() / "MMEB-eval")
    (row,) = data.rows(data.subsets["Emoji-i2i"], limit=1)
    vectors = embedder.encode([{"text": p.text, "image": data.images.source(p.image)} for p in row.targets[:4]])
    assert vectors.shape == (4, embedder.dimension) and len(np.unique(vectors.round(6), axis=0)) == 4
