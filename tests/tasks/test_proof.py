"""The four functions give the evaluator's figures on the same rows of mini-MMEB, and grounding beats chance."""

import io
import json
import zipfile

import numpy as np
import pytest

from minivlm2vec.mini import bundled
from minivlm2vec.mini.grounding import SETS, locate, measure_grounding, read
from minivlm2vec.mini.world.tasks import INSTRUCTIONS, own_part
from minivlm2vec.mmeb.dataset import Dataset
from minivlm2vec.mmeb.evaluation import EvaluateOptions, evaluate
from minivlm2vec.prompts import Task
from minivlm2vec.rows import MINI
from minivlm2vec.tasks import Classifier, answer, ground, rank
from minivlm2vec.tasks.boxes import iou

METRICS = ("precision@1", "mrr", "recall@5", "recall@10")


@pytest.fixture(scope="module")
def dataset():
    return Dataset(bundled() / "MMEB-eval")


def figures(ranks):
    ranks = np.array(ranks)
    means = 100 * np.array([(ranks == 1).mean(), (1 / ranks).mean(), (ranks <= 5).mean(), (ranks <= 10).mean()])
    return dict(zip(METRICS, means.round(4), strict=True))


def evaluated(mini, data, name, out):
    pytest.importorskip("pyarrow")
    results = evaluate(mini, data, out, EvaluateOptions(subsets=[name]))
    return {m: results.figures[name].as_dict()[m]["mean"] for m in METRICS}


def own_instruction(instruction):
    """A mini-MMEB instruction as a Task."""
    return Task(instruction.removeprefix("<|image_1|>\n").replace("{}", "{text}"), "{text}")


def as_item(dataset, pair):
    return {"image": dataset.images.source(pair.image)}


@pytest.mark.parametrize("name", ["Emoji-Group", "Emoji-Subgroup", "Seen-Fluent-Subgroup"])
def test_classify(mini, dataset, tmp_path, name):
    rows = list(dataset.rows(dataset.subsets[name]))
    task = own_instruction(rows[0].query.text)
    ranks = []
    for row in rows:
        right, *others = (pair.text for pair in row.targets)
        classifier = Classifier(mini, [*sorted(others), right], instruction=task)  # the right one not in front
        ranks.append(classifier([as_item(dataset, row.query)], top=None)[0].rank_of(right))
    assert figures(ranks) == evaluated(mini, "mini", name, tmp_path)


@pytest.mark.parametrize("name", ["Grid-Where", "Seen-Fluent-Where", "Grid-Color"])
def test_answer(mini, dataset, tmp_path, name):
    ranks = []
    for row in dataset.rows(dataset.subsets[name]):
        question = own_part(INSTRUCTIONS["VQA"][0], row.query.text)
        right, *others = (pair.text for pair in row.targets)
        found = answer(mini, dataset.images.source(row.query.image), question, [*sorted(others), right])
        ranks.append(found.rank_of(right))
    assert figures(ranks) == evaluated(mini, "mini", name, tmp_path)


@pytest.mark.parametrize("name, instruction", [("Emoji-t2i", "t2i"), ("Emoji-i2t", "i2t"), ("Scene-Change", "change")])
def test_rank(mini, dataset, tmp_path, name, instruction):
    ranks = []
    for row in dataset.rows(dataset.subsets[name]):
        text = own_part(INSTRUCTIONS[name][0], row.query.text)
        query = (as_item(dataset, row.query) if row.query.image else {}) | {"text": text}
        candidates = [as_item(dataset, pair) if pair.image else pair.text for pair in row.targets[::-1]]
        found = rank(mini, query, candidates, instruction=instruction, right=len(candidates) - 1)
        ranks.append(found.right_rank)
    assert figures(ranks) == evaluated(mini, "mini", name, tmp_path)


@pytest.mark.parametrize("name, instruction", [("Seen-Scene-Isolate", "ground"), ("Scene-Refer", "refer")])
def test_ground_among_boxes(mini, dataset, tmp_path, name, instruction):
    """Rows whose candidates are the picture's own objects, cut from it without loss."""
    ranks, lines, pictures = [], [], {}
    for n, row in enumerate(dataset.rows(dataset.subsets[name], limit=12)):
        picture, boxes = read(dataset.images, row.query.image), []
        for pair in row.targets:
            try:
                boxes.append(locate(picture, read(dataset.images, pair.image)))
            except ValueError:  # of another picture
                continue
        assert len(boxes) >= 4
        text = own_part(INSTRUCTIONS[name.removeprefix("Seen-")][0], row.query.text)
        found = ground(mini, picture, text, boxes=boxes[::-1], instruction=instruction)
        ranks.append(found.rank_of(len(boxes) - 1))
        pictures |= {f"{n}.png": picture} | {f"{n}-{i}.png": picture.crop(box) for i, box in enumerate(boxes)}
        paths = list(dict.fromkeys(f"{n}-{boxes.index(box)}.png" for box in boxes))
        texts = [row.targets[0].text] * len(paths)
        lines.append({"qry_text": row.query.text, "qry_img_path": f"{n}.png", "tgt_text": texts, "tgt_img_path": paths})
    (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / name / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with zipfile.ZipFile(tmp_path / "data" / "images.zip", "w") as archive:
        for path, picture in pictures.items():
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            archive.writestr(path, buffer.getvalue())
    assert figures(ranks) == evaluated(mini, tmp_path / "data", name, tmp_path / "out")


def test_a_crop_is_located_where_it_was_cut(dataset):
    row = next(iter(dataset.rows(dataset.subsets["Scene-Isolate"])))
    picture = read(dataset.images, row.query.image)
    assert locate(picture, picture.crop((31, 40, 71, 90))) == (31, 40, 71, 90)
    with pytest.raises(ValueError, match="500 at most is expected"):
        locate(picture, picture.crop((31, 40, 71, 90)).rotate(180).point(lambda x: 255 - x))


def test_grounding_without_boxes_finds_more_than_chance(mini, dataset):
    found = measure_grounding(mini, dataset, limit=2)["sets"]["Seen-Scene-Isolate"]
    assert found["rows"] == 2 and found["chance"] < found["found"]["mean"] and found["reachable"] == 100
    assert found["crops"][0] > 300


def test_the_card_shows_the_measured_grounding():
    measured = json.loads((MINI.parent / "checkpoint" / "grounding.json").read_text())
    card = (MINI.parent / "checkpoint" / "README.md").read_text()
    assert list(measured["sets"]) == list(SETS)
    for name, one in measured["sets"].items():
        assert one["found"]["mean"] > (10 if name.startswith("Seen") else 1) * one["chance"]
        assert f"| {one['chance']:.1f} | {one['reachable']:.1f} | {one['iou']:.2f} |" in card


def test_the_overlap_of_half_a_box_is_a_half():
    assert iou(np.array([(0, 0, 10, 10)]), np.array([(0, 0, 10, 5)]))[0, 0] == 0.5
