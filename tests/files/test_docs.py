"""The lines of docs/files.md, run as they are printed there."""

import re
from pathlib import Path

import numpy as np

from minivlm2vec import files
from minivlm2vec.files.writers import WRITERS
from tests.support.files_data import left_behind, save_pictures, write_jsonl

DOCS = (Path(__file__).parents[2] / "docs/files.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)


def test_the_lines_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path, ["photos/beach.jpg", *(f"photos/{i}.png" for i in range(5))])
    write_jsonl(tmp_path / "items.jsonl", [{"caption": "a dog"}, {"caption": None}])
    names: dict = {}
    for block in BLOCKS:
        exec(block, names)
    printed = capsys.readouterr().out
    assert len(BLOCKS) == 4 and [line.split()[0] for line in printed.splitlines()[:6]] == list("123456")
    assert "2 1 items.safetensors.errors.jsonl" in printed and "1 parts to compute" in printed and "......" in printed
    assert files.open_vectors("items.safetensors").settings["num_crops"] == 2
    assert len(names["hits"]) == 5 and names["alike"][0].score > 0
    assert (tmp_path / "hits.html").stat().st_size > 1000 and (tmp_path / "gallery.html").stat().st_size > 1000
    assert (np.load("steps.npy") == np.load("photos.npy")).all() and not left_behind(tmp_path)


def test_it_names_every_format_and_option():
    for name in WRITERS:
        assert f"`{name}`" in DOCS
    for name in re.findall(r"files\.(\w+)", "".join(BLOCKS)):
        assert name in files.__all__, name
