"""docs/mmeb.md's Python, run as it is printed there, on the bundled data and a tiny model."""

import re
from pathlib import Path

import pytest

import minivlm2vec
import minivlm2vec.mmeb
from minivlm2vec import Embedder
from minivlm2vec.mini import bundled
from minivlm2vec.mmeb import EvaluateOptions, evaluate
from minivlm2vec.new_checkpoint import new_checkpoint

DOCS = (Path(__file__).parents[2] / "docs/mmeb.md").read_text(encoding="utf-8")
(BLOCK,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)


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
    exec(BLOCK, {})
    out, err = capsys.readouterr()
    assert "Emoji-Group" in out and set(eval(out.splitlines()[-1])) == {"mean", "low", "high"}
    assert "Emoji-t2i [2/2]: 100%" in err
    for name in ("results.json", "table.html", "Emoji-t2i_pred.parquet", "Emoji-t2i_score.json"):
        assert (tmp_path / "out" / name).exists()
