"""docs/tasks.md and README's "Tasks": their lines run, and all instructions are there."""

import re

import pytest

from minivlm2vec import Embedder
from minivlm2vec.cli import main
from minivlm2vec.mmeb.subsets import MMEB
from minivlm2vec.prompts import DATASETS, TASKS, task
from tests.support.helpers import ROOT

DOCS = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README[README.index("## Tasks") : README.index("## What goes in")]


@pytest.fixture
def place(tmp_path, monkeypatch, picture, emoji, mini):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Embedder, "from_pretrained", lambda *a, **o: mini)
    picture("Scene-Change/image_0.webp").save("photo.jpg")
    (tmp_path / "photos").mkdir()
    for name, image in zip(("a.png", "b.png", "other.jpg", "photos/a.png"), emoji, strict=False):
        image.save(tmp_path / name)
    return tmp_path


def test_the_lines_of_the_page_run(place, capsys):
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 6 and len(capsys.readouterr().out.splitlines()) == 6
    assert (place / "labels.csv").read_text().startswith("image,label,") and (place / "found.png").exists()


def test_readmes_examples_run(place, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    exec(block, {})
    assert len(capsys.readouterr().out.splitlines()) == 1 + 1 + 3 and (place / "found.png").exists()


def test_readmes_commands_run(place, capsys):
    import shlex

    (block,) = re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [line[1] for line in lines] == ["classify", "answer", "rank", "ground"]
    for line in lines:
        top = ["--top", "1"] if line[1] == "rank" else []
        assert main([*line[1:], *top, "--model", "mini", "--device", "cpu"]) == 0, capsys.readouterr().err


def test_the_page_has_the_instruction_of_every_dataset():
    assert set(MMEB) == set(DATASETS) and set(DATASETS.values()) == set(TASKS)
    assert sum(one.averaged for one in MMEB.values()) == 36
    rows = {row.split("|")[1].strip(" `"): row for row in DOCS.splitlines() if row.startswith("| `")}
    for dataset, name in DATASETS.items():
        query, document = (text.replace("\n", "\\n") for text in (TASKS[name].query, TASKS[name].document))
        assert f"`{query}`" in rows[name] and f"`{document}`" in rows[name] and dataset in rows[name]
        assert task(dataset) == TASKS[name]
