"""ground: given boxes, windows of its own, overlap and suppression, drawing, and what it refuses."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from minivlm2vec.errors import InputError, OptionError
from minivlm2vec.prompts import TASKS
from minivlm2vec.tasks import ground
from minivlm2vec.tasks.boxes import around, iou, suppressed, windows

BOXES = [(10, 10, 60, 60), (64.5, 0, 128, 64), (0, 64, 64, 128), (30, 30, 100, 100)]


@pytest.fixture
def scene(picture):
    return picture("Scene-Change/image_0.webp")


def test_given_boxes_are_compared_by_the_vectors_of_their_crops(mini, scene):
    found = ground(mini, scene, "sailboat", boxes=BOXES)
    query = mini.encode_query([{"image": scene, "text": "sailboat"}], prompt_name="ground")[0]
    whole = [(10, 10, 60, 60), (64, 0, 128, 64), (0, 64, 64, 128), (30, 30, 100, 100)]
    scores = mini.encode([scene.crop(box) for box in whole], prompt=TASKS["ground"].document) @ query
    assert [one.index for one in found.boxes] == np.argsort(-scores).tolist()
    for one in found.boxes:
        assert one.box == tuple(map(float, BOXES[one.index]))
        assert one.score == pytest.approx(scores[one.index], abs=1e-6)
    assert found.crops == 4 and found.rank_of(found.boxes[0].index) == 1
    assert len(ground(mini, scene, "sailboat", boxes=np.array(BOXES), top=2).boxes) == 2


def test_a_box_given_twice_does_not_count_against_itself(mini, scene):
    found = ground(mini, scene, "sailboat", boxes=[BOXES[0], BOXES[1], BOXES[0]])
    best = max(one.score for one in found.boxes)
    assert found.rank_of(0) == found.rank_of(2) == (1 if found.boxes[0].box == BOXES[0] else 2)
    assert found.crops == 2 and found.score == best


def test_without_boxes_the_windows_are_its_own(mini, scene):
    found = ground(mini, scene, "sailboat")
    boxes = np.array([one.box for one in found.boxes])
    assert 1 <= len(boxes) <= 5 and found.crops > len(windows(128, 128))
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 128).all() and (boxes[:, :2] < boxes[:, 2:]).all()
    overlaps = iou(boxes, boxes)[~np.eye(len(boxes), dtype=bool)]
    assert (overlaps <= 0.5).all(), "non-maximum suppression"
    scores = [one.score for one in found.boxes]
    assert scores == sorted(scores, reverse=True)
    again = ground(mini, scene, "sailboat", boxes=[found.box])
    assert again.score == pytest.approx(found.score, abs=1e-6)


def test_refining_never_loses_score(mini, scene):
    coarse = ground(mini, scene, "sailboat", boxes=windows(128, 128))
    assert ground(mini, scene, "sailboat").score >= coarse.score - 1e-6


def test_draw_gives_a_picture_with_boxes(mini, scene):
    before = scene.tobytes()
    found = ground(mini, scene, "sailboat", boxes=BOXES)
    drawn = found.draw(2)
    assert drawn.size == scene.size and scene.tobytes() == before and drawn.tobytes() != before
    left, top, right, _ = map(round, found.box)
    edge = {drawn.getpixel((x, top)) for x in range(left, right)}
    assert (0xE6, 0x19, 0x4B) in edge, "the first box has the first colour"
    large = ground(mini, scene.resize((400, 300)), "sailboat", boxes=[(50, 50, 200, 200)])
    assert large.draw().getpixel((55, 40)) != scene.resize((400, 300)).getpixel((55, 40)), "a label above the box"
    assert json.loads(json.dumps(found.as_dict())) == found.as_dict() and "sailboat" in str(found)


@pytest.mark.parametrize("size", [(128, 128), (1000, 1000), (300, 40), (17, 900), (16, 16)])
def test_windows_lie_within_the_image_and_cover_it(size):
    boxes = windows(*size)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= size).all() and (boxes[:, :2] < boxes[:, 2:]).all()
    assert len(np.unique(boxes, axis=0)) == len(boxes)
    covered = np.zeros(size[::-1], bool)
    for left, top, right, bottom in boxes[: len(boxes) // 2]:
        covered[top:bottom, left:right] = True
    assert covered.all()
    near = around(boxes[:3], *size, 0.25, 1.25)
    assert (near[:, :2] >= 0).all() and (near[:, 2:] <= size).all() and (near[:, :2] < near[:, 2:]).all()


def test_iou_and_suppression_by_hand():
    boxes = np.array([(0, 0, 10, 10), (5, 0, 15, 10), (0, 0, 10, 5), (20, 20, 30, 30)])
    np.testing.assert_allclose(iou(boxes[:1], boxes)[0], [1, 1 / 3, 0.5, 0])
    scores = np.array([0.5, 0.9, 0.9, 0.1])
    assert suppressed(boxes, scores, 0.3) == [1, 2, 3], "equal scores in their order; 0 overlaps both"
    assert suppressed(boxes, scores, 0.5) == [1, 2, 0, 3] and suppressed(boxes, scores, 0.5, 2) == [1, 2]


NAN = float("nan")
REFUSED = {
    "boxes: none is given; 1 is needed at least, got 0": lambda e, x: ground(e, x, "a", boxes=[]),
    "boxes: a list of boxes is needed, got one str": lambda e, x: ground(e, x, "a", boxes="abcd"),
    "boxes: a list of boxes is needed, got one int": lambda e, x: ground(e, x, "a", boxes=4),
    "box 1: four numbers left, top, right, bottom are needed, got 3": lambda e, x: ground(
        e, x, "a", boxes=[BOXES[0], (1, 2, 3)]
    ),
    "box 0: four numbers left, top, right, bottom are needed, got 5": lambda e, x: ground(e, x, "a", boxes=[5]),
    "box 0: four numbers left, top, right, bottom are needed, got 'abcd'": lambda e, x: ground(
        e, x, "a", boxes=["abcd"]
    ),
    "box 0: (1, nan, 5, 5) has a number that is not finite": lambda e, x: ground(e, x, "a", boxes=[(1, NAN, 5, 5)]),
    "box 0: (1, 1, inf, 5) has a number that is not finite": lambda e, x: ground(
        e, x, "a", boxes=[(1, 1, float("inf"), 5)]
    ),
    "box 0: (50, 1, 20, 5) has no area: right is 20, left 50": lambda e, x: ground(e, x, "a", boxes=[(50, 1, 20, 5)]),
    "box 0: (1, 9, 5, 9) has no area: bottom is 9, top 9": lambda e, x: ground(e, x, "a", boxes=[(1, 9, 5, 9)]),
    "box 0: (0, 0, 129, 5) reaches out of the image, which has 128 x 128 pixels": lambda e, x: ground(
        e, x, "a", boxes=[(0, 0, 129, 5)]
    ),
    "box 0: (-1, 0, 9, 5) reaches out of the image, which has 128 x 128": lambda e, x: ground(
        e, x, "a", boxes=[(-1, 0, 9, 5)]
    ),
    "text: has no text": lambda e, x: ground(e, x, "  "),
    "text: a text is needed, got int": lambda e, x: ground(e, x, 5),
    "top is 0; at least 1 is needed": lambda e, x: ground(e, x, "a", top=0),
    "top is 3; there are 2 boxes": lambda e, x: ground(e, x, "a", boxes=BOXES[:2], top=3),
    "instruction is 'find'; there are": lambda e, x: ground(e, x, "a", instruction="find"),
    "PIL image RGB 1x1: the image is smaller than a crop: it has 1 x 1 pixels, and to look for something in it 16 x 16 "
    "are needed": lambda e, x: ground(e, x.resize((1, 1)), "a"),
    "PIL image RGB 15x400: the image is smaller than a crop": lambda e, x: ground(e, x.resize((15, 400)), "a"),
    "nothing.jpg: no such file": lambda e, x: ground(e, "nothing.jpg", "a"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_bad_input_is_named_before_anything_is_computed(scene, said):
    with pytest.raises((InputError, OptionError), match=re.escape(said)):
        REFUSED[said](None, scene)


def test_a_box_may_be_the_whole_of_a_tiny_image(mini):
    found = ground(mini, Image.new("RGB", (1, 1), "red"), "red", boxes=[(0, 0, 1, 1)])
    assert found.crops == 1 and found.draw().size == (1, 1)


def test_crops_of_a_large_image_are_not_in_memory_together(mini, scene, monkeypatch):
    from minivlm2vec.tasks import grounding

    calls = []

    class Counting:
        def encode(self, inputs, **options):
            calls.append(sum(x.width * x.height for x in inputs if isinstance(x, Image.Image)))
            return mini.encode(inputs, **options)

    monkeypatch.setattr(grounding, "PIXELS", 20_000)
    found = ground(Counting(), scene, "sailboat")
    assert len(calls) > 20 and max(calls) <= 20_000
    monkeypatch.undo()
    assert found.box == ground(mini, scene, "sailboat").box
