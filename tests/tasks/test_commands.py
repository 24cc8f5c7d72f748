"""`minivlm2vec classify`, `answer`, `rank`, `similarity`, `ground`, as a user calls them."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from minivlm2vec import files
from minivlm2vec.cli import main
from minivlm2vec.tasks import answer, classify, ground, rank

LABELS = "animals & nature,food & drink,flags,objects"
MODEL = ["--model", "mini", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path, emoji):
    place = tmp_path / "pictures"
    (place / "below").mkdir(parents=True)
    for i, image in enumerate(emoji):
        image.save(place / ("below" if i > 3 else ".") / f"{i}.png")
    (place / "note.txt").write_text("no image")
    return place


def run(capsys, *args, code=0):
    assert main(list(map(str, args))) == code
    return capsys.readouterr()


def test_classify_prints_tables_json_and_csv(mini, folder, emoji, capsys, tmp_path, monkeypatch):
    expected = classify(mini, emoji, LABELS.split(","))
    out = run(capsys, "classify", folder, "--labels", LABELS, "--json", *MODEL).out
    found = [json.loads(line) for line in out.splitlines()]
    assert [one["image"] for one in found] == [str(folder / f"{i}.png") for i in range(4)] + [
        str(folder / "below" / f"{i}.png") for i in (4, 5)
    ]
    assert [one["labels"][0]["text"] for one in found] == [one.label for one in expected]
    (tmp_path / "labels.txt").write_text(LABELS.replace(",", "\n") + "\n\n")
    args = ["classify", "-", folder / "1.png", "--labels", tmp_path / "labels.txt", *MODEL]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{folder / '0.png'}\n\n"))
    rows = list(csv.DictReader(io.StringIO(run(capsys, *args, "--csv").out)))
    assert [row["label"] for row in rows] == [one.label for one in expected[:2]]
    assert float(rows[0]["probability"]) == pytest.approx(expected[0].probability, abs=1e-4)
    monkeypatch.chdir(folder)  # a long path would be cut
    table = run(capsys, "classify", "0.png", "--labels", LABELS, "--top", 2, *MODEL).out
    assert table.splitlines()[0] == f"0.png: {expected[0].label}" and len(table.splitlines()) == 3


def test_classify_goes_on_after_an_image_that_cannot_be_read(folder, capsys):
    (folder / "2.png").write_bytes(b"no image")
    said = run(capsys, "classify", folder, "--labels", LABELS, "--csv", *MODEL, code=3)
    assert len(said.out.splitlines()) == 1 + 5 and f"no label for {folder / '2.png'}: " in said.err
    assert "none of 1 images" in run(capsys, "classify", folder / "2.png", "--labels", LABELS, *MODEL, code=1).err


class Killed(BaseException):
    pass


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_classify_into_a_file_resumes_and_keeps_its_vectors(mini, folder, emoji, tmp_path, ending, monkeypatch):
    out, labels = tmp_path / f"labels.{ending}", LABELS.split(",")
    options = files.EmbedOptions(part_rows=1)
    encoded = []
    real = mini.embed

    class Dies(files.Progress):
        def advanced(self, rows):
            if len(encoded) >= 3:
                raise Killed

    monkeypatch.setattr(mini, "embed", lambda items, **o: (encoded.extend(_images(items)), real(items, **o))[1])
    with pytest.raises(Killed):
        files.classify(folder, out, labels, mini, options, Dies())
    assert not out.exists()
    before = len(encoded)
    files.classify(folder, out, labels, mini, options)
    assert before < 8 and len(encoded) - before < 6, "what was finished is not computed again"
    expected = {p: one.label for p, one in zip(_names(), classify(mini, emoji, labels), strict=True)}
    assert dict(_read(out)) == expected
    again = len(encoded)
    files.classify(folder, out, [*labels[::-1], "symbols"], mini, options)
    assert len(encoded) == again, "other labels need no image again"


def _images(items):
    grids = items.grids if hasattr(items, "grids") else [x for x in items if x.crops]
    return list(grids)


def _names():
    return [f"{i}.png" for i in range(4)] + [f"below/{i}.png" for i in (4, 5)]


def _read(path):
    if path.suffix == ".csv":
        return [(row["image"], row["label"]) for row in csv.DictReader(path.open())]
    rows = [json.loads(line) for line in path.open()]
    return [(row["image"], row["labels"][0]["text"] if row["labels"] else "") for row in rows]


def test_the_command_writes_a_file_and_names_what_has_no_label(folder, capsys, tmp_path):
    (folder / "2.png").write_bytes(b"no image")
    out = tmp_path / "out.csv"
    said = run(capsys, "classify", folder, "--labels", LABELS, "-o", out, "--quiet", *MODEL, code=3)
    assert "1 of them have no label" in said.err and len(_read(out)) == 6
    assert [name for name, label in _read(out) if not label] == ["2.png"]
    said = run(capsys, "classify", folder, "--labels", LABELS, "-o", tmp_path / "out.txt", *MODEL, code=1)
    assert "-o" in said.err and "ends in '.txt'; it ends in .csv or .jsonl" in said.err


def test_answer(mini, folder, picture, tmp_path, capsys):
    picture("Grid-Where/image_0.webp").save(tmp_path / "grid.png")
    question, choices = "what is in the bottom left corner?", ["wolf", "feather", "hibiscus"]
    expected = answer(mini, tmp_path / "grid.png", question, choices)
    args = ["answer", tmp_path / "grid.png", "--question", question, *MODEL, "--choices"]
    assert run(capsys, *args, ",".join(choices)).out.strip() == str(expected)
    found = json.loads(run(capsys, *args, *choices, "--json").out)
    assert [one["text"] for one in found["choices"]] == [one.text for one in expected.choices]
    rows = list(csv.DictReader(io.StringIO(run(capsys, *args, ",".join(choices), "--csv").out)))
    assert [(row["question"], row["choice"]) for row in rows] == [(question, expected.choice)]


def test_rank_takes_over_similarity(mini, folder, emoji, capsys):
    out = run(capsys, "rank", "--query-text", "a flag", folder, "--right", 2, "--json", "--top", 3, *MODEL).out
    expected = rank(mini, "a flag", emoji, right=2)
    found = json.loads(out)
    names = [str(folder / name) for name in _names()]
    assert [one["target"] for one in found["targets"]] == [names[hit.index] for hit in expected.hits[:3]]
    assert found["right_rank"] == expected.right_rank and found["query"] == {"text": "a flag"}
    args = ["--query-text", "a flag", "--target-text", "b", "--target-image", names[0], *MODEL]
    old = json.loads(run(capsys, "similarity", *args, "--json").out)
    image = {"text": "Represent the given image.\n", "image": names[0]}
    scores = mini.similarity(mini.encode(["a flag"]), mini.encode(["b", image]))[0]
    by_kind = {one["kind"]: one["score"] for one in old["targets"]}
    np.testing.assert_allclose([by_kind["text"], by_kind["image"]], scores, atol=1e-6)
    assert set(old) == {"query", "targets"}
    rows = list(csv.DictReader(io.StringIO(run(capsys, "rank", *args, "--csv").out)))
    assert {row["kind"] for row in rows} == {"text", "image"}


def test_ground_draws(mini, picture, tmp_path, capsys):
    scene = picture("Scene-Change/image_0.webp")
    scene.save(tmp_path / "scene.png")
    boxes = ["10,10,60,60", "64,0,128,64"]
    args = ["ground", tmp_path / "scene.png", "sailboat", *MODEL, "--box", boxes[0], "--box", boxes[1]]
    found = json.loads(run(capsys, *args, "--json", "-o", tmp_path / "drawn.png").out)
    expected = ground(mini, scene, "sailboat", boxes=[(10, 10, 60, 60), (64, 0, 128, 64)])
    assert [one["index"] for one in found["boxes"]] == [one.index for one in expected.boxes]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "drawn.png")), np.asarray(expected.draw()))
    assert run(capsys, *args).out.splitlines()[1].split()[0] == f"{expected.score:.4f}"
    assert "box 0: (5, 5, 5, 9) has no area" in run(capsys, *args[:3], *MODEL, "--box", "5,5,5,9", code=1).err
    assert "--box 'a': four numbers" in run(capsys, *args[:3], *MODEL, "--box", "a", code=1).err
    assert "which is no image that can be written" in run(capsys, *args, "-o", tmp_path / "x.txt", code=1).err


REFUSED = [
    (["classify", "x.png", "--labels", ""], "labels: none is given; 2 are needed at least, got 0"),
    (["classify", "x.png", "--labels", "a"], "labels: only 'a' is given; 2 are needed at least, got 1"),
    (["classify", "x.png", "--labels", "a,b,a"], "label 2: 'a' is label 0 too"),
    (["classify", "x.png", "--labels", "a,,b"], "label 1: is empty: ''"),
    (["classify", "x.png", "--labels", "a,b", "--top", "0"], "--top is 0; at least 1 is needed"),
    (["classify", "x.png", "--labels", "a,b", "--top", "6"], "--top is 6; there are 2 labels"),
    (["classify", "x.png", "--labels", "a,b", "--instruction", "x"], "--instruction is 'x'; there are classify,"),
    (["classify", "x.png", "y.png", "--labels", "a,b", "-o", "z.csv"], "-o is for one folder or table, got 2"),
    (["answer", "x.png", "--question", "q", "--choices", "a"], "choices: only 'a' is given; 2 are needed at least"),
    (["rank", "--query-text", "q", "--target-text", "a", "--top", "2"], "--top is 2; there are 1 targets"),
    (["rank", "--query-text", "q", "--target-text", "a", "--right", "1"], "--right is 1; the 1 candidates have"),
    (["rank", "--query-text", "q"], "at least one --target-text or --target-image is needed"),
    (["rank", "--target-text", "q"], "--query-text or --query-image is needed"),
    (["classify", "x.png", "--labels", "a,b", "--quiet"], "--quiet needs -o"),
    (["classify", "x.png", "--labels", "a,b", "--overwrite"], "--overwrite needs -o"),
    (["classify", "x", "--labels", "a,b", "-o", "x.csv", "--json"], "--json is for what is printed; OUT's ending"),
    (["classify", "x", "--labels", "a,b", "-o", "x.csv", "--csv"], "--csv is for what is printed; OUT's ending"),
    (["classify", "x", "--labels", "a,b", "--instruction", "t2i"], "every image: has no text, and the instruction"),
    (["classify", "", "--labels", "a,b"], "image 0 is ''; a path is needed"),
    (["classify", "nowhere.png", "--labels", "a,b"], "nowhere.png: no such file"),
    (["answer", "nowhere.png", "--question", "q", "--choices", "a,b"], "nowhere.png: no such file"),
    (["answer", "", "--question", "q", "--choices", "a,b"], "image 0 is ''; a path is needed"),
    (["rank", "--query-text", "a", "nowhere.png"], "nowhere.png: no such file"),
    (["ground", "nowhere.png", "a"], "nowhere.png: no such file"),
    (["ground", "x.png", "a", "--draw", "2"], "--draw 2 needs -o"),
    (["ground", "x.png", "a", "--draw", "0"], "--draw is 0; at least 1 is needed"),
]


@pytest.mark.parametrize("args, said", REFUSED)
def test_bad_arguments_are_named_before_a_model_is_loaded(args, said, capsys):
    assert main([*args, "--model", "no/such-model"]) == 1
    assert said in capsys.readouterr().err


def test_an_empty_folder_is_named_before_a_model_is_loaded(tmp_path, capsys):
    said = run(capsys, "classify", tmp_path, "--labels", "a,b", "--model", "/nowhere", code=1).err
    assert f"{tmp_path} holds no image" in said


def test_no_instruction_has_the_same_name_in_every_command(mini, folder, picture, tmp_path, capsys):
    path = folder / "0.png"
    out = run(capsys, "classify", path, "--labels", LABELS, "--instruction", "none", "--json", *MODEL).out
    expected = classify(mini, [path], LABELS.split(","), instruction=None)[0]
    assert json.loads(out)["labels"][0]["score"] == pytest.approx(expected.score, abs=1e-5)
    args = ["answer", path, "--question", "which?", "--choices", LABELS, "--instruction", "none", "--json", *MODEL]
    chosen = answer(mini, path, "which?", LABELS.split(","), instruction=None)
    assert json.loads(run(capsys, *args).out)["choices"][0]["score"] == pytest.approx(chosen.score, abs=1e-5)


def test_rank_as_csv_says_the_rank_of_the_right_target(folder, capsys):
    args = ["rank", "--query-text", "a", folder, "--right", 2, *MODEL]
    told = run(capsys, *args).out.splitlines()[-1]
    said = run(capsys, *args, "--csv")
    assert told.startswith("target 2 has rank ") and told in said.err and told not in said.out
