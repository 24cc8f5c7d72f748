"""An image that several inputs of a call show is decoded once, computed once in a pack, and gives the same vectors."""

import numpy as np
import pytest

from minivlm2vec.tasks import answer

QUESTIONS = ["what is in the top left corner?", "what is below?", "what color is it?", "how many are there?"]


@pytest.fixture
def seen(mini, monkeypatch):
    """What is loaded, and how many images each pack has."""
    loaded, packs = [], []
    load, prepare = mini.processor.load, mini.processor.pack
    monkeypatch.setattr(mini.processor, "load", lambda plan: (loaded.append(plan), load(plan))[1])
    monkeypatch.setattr(mini.processor, "pack", lambda items: (packs.append(prepare(items)), packs[-1])[1])
    return loaded, packs


def test_many_questions_share_the_image(mini, picture, seen, tmp_path):
    loaded, packs = seen
    picture("Grid-Where/image_0.webp").save(tmp_path / "grid.png")
    answers = answer(mini, tmp_path / "grid.png", QUESTIONS, ["a cat", "a dog"])
    assert sum(bool(plan.sources) for plan in loaded) == 1 and [len(p.grids) for p in packs if p.grids] == [1]
    for question, one in zip(QUESTIONS, answers, strict=True):
        alone = answer(mini, tmp_path / "grid.png", question, ["a cat", "a dog"])
        assert one.choice == alone.choice and one.score == pytest.approx(alone.score, abs=1e-6)


def test_other_images_between_them_keep_their_places(mini, emoji, seen):
    a, b, c = emoji[:3]
    inputs = [{"image": a, "text": "x"}, {"image": b, "text": "yy"}, "a text", {"image": a, "text": "zz z"},
              {"images": [a, c], "text": "<|image_2|> and <|image_1|>"}, {"images": [c, a]}, {"images": [a, c]},
              {"image": b}]  # fmt: skip
    together = mini.encode(inputs)
    _, packs = seen
    (pack,) = packs
    assert len(pack.grids) == 6, "a, b, (a, c), (c, a)"
    alone = np.concatenate([mini.encode([one]) for one in inputs])
    np.testing.assert_allclose(together, alone, atol=2e-6)


def test_other_num_crops_or_another_object_are_other_images(mini, emoji, seen):
    loaded, packs = seen
    mini.encode([{"image": emoji[0]}, {"image": emoji[0].copy()}])
    assert len(loaded) == 2 and len(packs[0].grids) == 2


def test_packs_that_are_too_small_to_share_give_the_same_vectors(mini, emoji):
    inputs = [{"image": emoji[i % 2], "text": text} for i, text in enumerate(QUESTIONS)]
    np.testing.assert_allclose(mini.encode(inputs, batch_tokens=1), mini.encode(inputs), atol=2e-6)
