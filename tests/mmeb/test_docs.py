"""docs/mmeb.md's Python, run as it is printed there, on the bundled data and a tiny model."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minivlm2vec
import minivlm2vec.mmeb
from minivlm2vec import Embedder
from minivlm2vec.checkpoint import resolve
from minivlm2vec.lora import LoraConfig, add_lora, save_adapter
from minivlm2vec.mini import bundled
from minivlm2vec.mmeb import EvaluateOptions, evaluate
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.weights import load_model

DOCS = (Path(__file__).parents[2] / "docs/mmeb.md").read_text(encoding="utf-8")
EVALUATION, MTEB, SENTENCE_TRANSFORMERS = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)


def test_an_evaluation_in_python(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow")
    tiny = Embedder.from_pretrained(new_checkpoint(tmp_path / "m"), device="cpu", show_progress=False)

    class Tiny:
        @staticmethod
        def from_pretrained(name):
            assert name == "TIGER-Lab/VLM2Vec-Full"
            return tiny

    def here(embedder, data, out, options, **more):
        assert (data, out) == ("MMEB-eval", "outputs/mmeb") and options.num_crops == 4
        assert (options.subsets, options.image_dir) == (["VOC2007", "CIRR"], "eval_images")
        few = EvaluateOptions(subsets=["Emoji-Group", "Emoji-t2i"], num_crops=1, limit=4, allow_collapsed=True)
        results = evaluate(embedder, bundled() / "MMEB-eval", tmp_path / "out", few, **more)
        results.figures["CIRR"] = results.figures["Emoji-t2i"]
        return results

    monkeypatch.setattr(minivlm2vec, "Embedder", Tiny)
    monkeypatch.setattr(minivlm2vec.mmeb, "evaluate", here)
    exec(EVALUATION, {})
    out, err = capsys.readouterr()
    assert "Emoji-Group" in out and set(eval(out.splitlines()[-1])) == {"mean", "low", "high"}
    assert "Emoji-t2i [2/2]: 100%" in err
    for name in ("results.json", "table.html", "Emoji-t2i_pred.parquet", "Emoji-t2i_score.json"):
        assert (tmp_path / "out" / name).exists()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The folder of a tiny model and of an adapter for it, which stand for those on the Hub."""
    folder, config = new_checkpoint(tmp_path / "m"), LoraConfig(r=2, target_modules=("qkv_proj",))
    save_adapter(add_lora(load_model(folder), config), tmp_path / "lora", config)
    names = {
        "TIGER-Lab/VLM2Vec-Full": folder,
        "microsoft/Phi-3.5-vision-instruct": folder,
        "TIGER-Lab/VLM2Vec-LoRA": tmp_path / "lora",
    }
    monkeypatch.setattr(
        "minivlm2vec.embedder.resolve", lambda name, **options: names.get(name) or resolve(name, **options)
    )
    return folder


def test_mteb(published, monkeypatch):
    mteb = pytest.importorskip("mteb")
    monkeypatch.setattr(mteb, "get_benchmark", lambda name: name)
    monkeypatch.setattr(mteb, "evaluate", lambda model, tasks: (model.mteb_model_meta, tasks))
    exec(MTEB, names := {})
    meta, tasks = names["results"]
    assert tasks == "MIEB(lite)"
    assert (meta.name, meta.adapted_from) == ("TIGER-Lab/VLM2Vec-LoRA", "microsoft/Phi-3.5-vision-instruct")


def test_sentence_transformers(published, tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    for name in ("cat.jpg", "dog.jpg"):
        Image.effect_noise((60, 40), 50).save(name)
    exec(SENTENCE_TRANSFORMERS, names := {})
    inputs = ["a cat", {"image": "cat.jpg"}]
    trained = names["model"].encode(inputs)
    assert np.abs(names["again"].encode(inputs) - trained).max() < 2e-6
    ours = Embedder.from_pretrained("outputs/trained", show_progress=False).encode(inputs)
    assert np.abs(ours - trained).max() < 2e-6
    assert np.abs(Embedder.from_pretrained(published).encode(inputs) - trained).max() > 1e-5
