"""Scores of a checkpoint on mini-MMEB: baselines with known answers, the card, and what the seen sets may hold."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from minivlm2vec.cli.mini import main
from minivlm2vec.mini import bundled, card, pixels, scores
from minivlm2vec.mini.world import build, concepts, drawing, tasks
from minivlm2vec.mmeb.dataset import Dataset, Row, Rows
from minivlm2vec.mmeb.subsets import Subset
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.rows import Images, Pair

EVAL = bundled() / "MMEB-eval"
TRAINING = {"commands": ["minivlm2vec train mini.toml"], "sets": ["Emoji-t2i", "Emoji-i2t", "Emoji-t2i"],
            "runs": [{"config": "mini.toml", "steps": 1200, "batch_size": 256},
                     {"config": "more.toml", "steps": 10, "batch_size": 32}],
            "seed": 7, "hardware": "one core", "wall_time_s": 5400,
            "precision": "float32", "commit": "abc1234", "torch": "2.13.0", "more_styles": True,
            "notes": ["resumed once"]}  # fmt: skip


def rows_of(*triples):
    """(query, candidates), each a text or (text, picture)."""
    rows = Rows(Subset("Made-up", "vqa", "IND"))
    pair = lambda one: Pair(one, "") if isinstance(one, str) else Pair(*one)  # noqa: E731
    for number, (query, *targets) in enumerate(triples):
        rows.add(Row(number, pair(query), tuple(map(pair, targets))))
    return rows


@pytest.fixture
def read(tmp_path):
    """Plain grey pictures: "40.png" has the value 40 everywhere."""
    for value in (0, 30, 40, 100, 110, 250):
        Image.new("RGB", (20, 12), (value,) * 3).save(tmp_path / f"{value}.png")
    return pixels.SmallPictures(Images(tmp_path))


def labelled(*pairs):
    pictures = np.stack([np.full(pixels.SIDE**2 * 3, value, np.uint8) for value, _ in pairs])
    return pixels.LabelledPictures(pictures, np.array([text for _, text in pairs]))


# --- baselines -------------------------------------------------------------------------------------------


def test_chance_is_one_in_the_candidates_that_differ():
    rows = rows_of(("q", "a", "b", "c", "d"), ("r", "a", "b"), ("s", "a", "b", "a", "a", "c", "b"))
    np.testing.assert_allclose(pixels.chance(rows), [1 / 4, 1 / 2, 1 / 4])


def test_the_nearest_picture_is_chosen(read):
    pic = lambda value: ("?", f"{value}.png")  # noqa: E731
    rows = rows_of(
        (pic(30), pic(40), pic(0), pic(250)),  # 10 away, then 30
        (pic(110), pic(40), pic(100)),  # 70 away, beaten by 10
        (pic(30), ("one", "40.png"), ("two", "40.png"), pic(250)),  # the same picture under two texts
    )
    np.testing.assert_array_equal(pixels.nearest(rows, read, None), [1, 0, 0.5])


def test_the_nearest_training_picture_answers_with_its_label(read):
    ask = lambda value: ("what?", f"{value}.png")  # noqa: E731
    known = labelled((30, "dog"), (100, "cat"), (250, "cat"), (5, "owl"))
    rows = rows_of(
        (ask(40), "dog", "cat"),  # 30 is nearest
        (ask(0), "dog", "cat"),  # 5 is nearer, but "owl" is no candidate
        (ask(110), "dog", "cat"),  # the nearest says "cat"
        (ask(110), "ant", "dog", "cat"),  # "ant" is no label, so it never wins
        (ask(110), "ant", "bee"),  # neither is a label: one in two
    )
    np.testing.assert_array_equal(pixels.nearest(rows, read, known), [1, 1, 0, 0, 0.5])


def test_where_pixels_have_no_answer(read):
    known = labelled((30, "dog"))
    picture = ("?", "30.png")
    assert pixels.nearest(rows_of(("a text", picture, ("?", "40.png"))), read, known) is None
    assert pixels.nearest(rows_of((picture, "ant", "dog")), read, known) is None  # the right answer is no label
    assert pixels.nearest(rows_of((picture, "dog", "ant")), read, None) is None  # a task without training
    assert pixels.nearest(rows_of((picture, "dog", "ant")), read, known) is not None


def test_distances_are_exact():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (n, 3072), dtype=np.uint8) for n in (3, 5))
    expected = ((a[:, None].astype(np.int64) - b[None].astype(np.int64)) ** 2).sum(-1)
    np.testing.assert_array_equal(pixels.squared_distances(a, b), expected)


def test_labelled_pictures_are_training_pictures_in_the_styles_of_training():
    found = pixels.read_labelled(bundled())
    assert set(found) == {"Emoji-Subgroup", "Emoji-Group", "Emoji-i2t", "Grid-Where", "Grid-Count", "Grid-Color",
                          "Grid-Beside", "Scene-i2t"}  # fmt: skip
    catalogue = read_lines(EVAL / "pictures_seen.jsonl")
    held_out = {one["label"] for one in read_lines(EVAL / "pictures.jsonl")}
    names = found["Emoji-i2t"].texts
    assert len(names) == 32 + 2 * 120 and not set(names) & held_out
    fluent = pixels.SmallPictures(Dataset(EVAL).images)([one["path"] for one in catalogue if one["style"] == "fluent"])
    assert not {one.tobytes() for one in fluent} & {one.tobytes() for one in found["Emoji-i2t"].pictures}


# --- sets over seen concepts -----------------------------------------------------------------------------


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_seen_sets_hold_only_training_concepts_and_their_own_styles():
    """By the pictures themselves: every single emoji of a fluent set is a fluent drawing of a seen concept."""
    about = json.loads((EVAL / "subsets.json").read_text(encoding="utf-8"))
    seen = read_lines(EVAL / "pictures_seen.jsonl")
    held_out = read_lines(EVAL / "pictures.jsonl")
    names = {one["label"] for one in seen}
    assert len(names) == 120 and not names & {one["label"] for one in held_out}
    assert not {one["path"] for one in seen} & {one["path"] for one in held_out}
    fluent = {one["path"]: one["label"] for one in seen if one["style"] == "fluent"}
    sets = [name for name, one in about.items() if one["concepts"] == "seen"]
    assert len(sets) == 9 and all(name.startswith("Seen-") for name in sets)
    assert not any(about[name]["averaged"] for name in sets)
    for name in ("Seen-Fluent-t2i", "Seen-Fluent-i2t", "Seen-Fluent-Where", "Seen-Fluent-Beside", "Seen-Grid-Where"):
        for row in read_lines(EVAL / name / "test.jsonl"):
            paths = {path for path in (row["qry_img_path"], *row["tgt_img_path"]) if path}
            if name in ("Seen-Fluent-t2i", "Seen-Fluent-i2t"):
                assert paths <= set(fluent)
            texts = [text for text in row["tgt_text"] if not text.startswith("<|image_1|>")]
            assert set(texts) <= names
            if name == "Seen-Fluent-t2i":
                asked = row["qry_text"].removeprefix("Find me an everyday image that matches the given caption: ")
                assert asked.strip() == fluent[row["tgt_img_path"][0]]
                assert len({fluent[path] for path in row["tgt_img_path"]}) == 24
            if name == "Seen-Fluent-i2t":
                assert fluent[row["qry_img_path"]] == row["tgt_text"][0]


def test_no_evaluation_row_equals_a_training_row():
    """Neither by text and pixels of query and target; single emoji of seen concepts are shipped in fluent only."""
    trained = set()
    with zipfile.ZipFile(bundled() / "MMEB-train" / "images.zip") as archive:
        for path in (bundled() / "MMEB-train").glob("*/*.jsonl"):
            for row in read_lines(path):
                trained.add(key(archive, row["qry"], row["qry_image_path"], row["pos_text"], row["pos_image_path"]))
    with zipfile.ZipFile(EVAL / "images.zip") as archive:
        for path in EVAL.glob("*/test.jsonl"):
            for row in read_lines(path):
                mine = (row["qry_text"], row["qry_img_path"], row["tgt_text"][0], row["tgt_img_path"][0])
                assert key(archive, *mine) not in trained, (path, mine)
    assert len(trained) > 500


def key(archive, query, query_image, target, target_image):
    images = [pixels_of(archive, path) if path else b"" for path in (query_image, target_image)]
    return query, images[0], target, images[1]


def pixels_of(archive, path):
    return Image.open(io.BytesIO(archive.read(path))).tobytes()


@pytest.fixture(scope="module")
def worlds():
    """A world to train on and one held out, of 40 made-up things. A drawing is one colour: green tells the world, blue
    the style."""
    made = {}
    for side, kind in enumerate(("seen", "held-out")):
        names = [f"{'ab'[side]}thing {one}ax" for one in "abcdefghijklmnopqrstuvwxyzabcdefghijklmn"]
        things = [
            concepts.Concept(f"{side}{i}", f"{name[:-1]}{'xyz'[i % 3]}", ("one", "two", "three"), "objects",
                             f"class {i % 4}", ("red",) * 3)
            for i, name in enumerate(names)
        ]  # fmt: skip
        drawings = {
            (style, one.code): Image.new("RGBA", (64, 64), (6 * i, 100 * side, 80 * number, 255))
            for i, one in enumerate(things)
            for number, style in enumerate(concepts.STYLES)
        }
        made[kind] = concepts.World(things, drawings, concepts.SEEN_STYLES)
    return made


class Kept:
    """In the place of `build.Pictures`."""

    def __init__(self):
        self.images = {}

    def add(self, image, folder):
        return self.images.setdefault(image.tobytes(), (f"{folder}/{len(self.images)}", image))[0]


@pytest.mark.parametrize("spec", tasks.EVAL, ids=lambda one: one.name)
def test_every_set_draws_from_its_own_world_in_its_own_styles(worlds, spec):
    kept, plan = Kept(), build.Plan(eval_rows=4, seen_candidates=15)
    rows = build.eval_rows(spec, worlds[spec.concepts], plan, kept)
    colours = {colour for _, image in kept.images.values() for _, colour in image.getcolors(1 << 14)}
    colours -= set(drawing.BACKGROUNDS)
    assert {green for _, green, _ in colours} == {100 * (spec.concepts == "held-out")}
    blues = {blue for *_, blue in colours}
    assert (
        blues == {160} if spec.styles == ("fluent",) else blues <= {80 * "ntf".index(s[0]) for s in spec.styles or "nt"}
    )
    assert all(len(row["tgt_text"]) <= 15 for row in rows) or spec.concepts == "held-out"


def test_seen_rows_are_none_of_the_held_out_seeds(worlds):
    """The same world gives other rows as "seen" than as "held-out", and others than in training."""
    specs = [scores.SETS[name] for name in ("Grid-Where", "Seen-Grid-Where")]
    first, second = (build.eval_rows(one, worlds["seen"], build.Plan(eval_rows=5), Kept()) for one in specs)
    trained, _ = build._train_rows("Grid-Where", worlds["seen"], build.Plan(train_rows=5), Kept())
    asked = [[(row["qry_text"], row["tgt_text"][0]) for row in rows] for rows in (first, second)]
    asked.append([(row["qry"], row["pos_text"]) for row in trained])
    assert all(len(set(one)) >= 4 for one in asked)
    assert not set(asked[0]) & set(asked[1]) and not set(asked[1]) & set(asked[2])


# --- scores and card -------------------------------------------------------------------------------------


class Counting:
    def __init__(self):
        self.asked = []

    def encode(self, inputs, **options):
        self.asked += inputs
        return np.arange(len(self.asked) - len(inputs), len(self.asked), dtype=np.float32)[:, None]


def test_equal_inputs_are_encoded_once():
    inner = Counting()
    outer = scores.CachedEncoder(inner)
    pictures = [np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2, 3), np.uint8)]
    inputs = ["a", {"text": "a", "image": b"x"}, "a", {"text": "a", "image": b"x"}, {"text": "a", "image": b"y"},
              {"text": "b", "image": b"x"}, *({"text": "a", "image": one} for one in pictures)]  # fmt: skip
    np.testing.assert_array_equal(outer.encode(inputs, max_length=9)[:, 0], [0, 1, 0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(outer.encode(inputs[:2], max_length=9)[:, 0], [0, 1])
    assert len(inner.asked) == 6
    outer.encode(["a"], max_length=8)
    assert len(inner.asked) == 7


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A random checkpoint with its scores and card."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("card") / "random"
    new_checkpoint(folder, seed=3)
    (folder / "training.json").write_text(json.dumps(TRAINING))
    (folder / "mini.toml").write_text('model = "start"\nseed = 7\n')
    (folder / "more.toml").write_text('model = "mini"\n')
    assert main(["card", str(folder), str(bundled()), "--limit", "6", "--quiet", "--allow-collapsed"]) == 0
    return folder


def test_the_card_says_what_was_measured(scored):
    found = json.loads((scored / "scores.json").read_text())
    text = (scored / "README.md").read_text()
    assert set(found["sets"]) == {one.name for one in build.eval_sets(build.TRIMMED)}
    for name, one in found["sets"].items():
        p = one["precision@1"]
        assert one["rows"] == 6 and 0 <= p["low"] <= p["mean"] <= p["high"] <= 100
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {name}") and "| 6 |" in line)
        assert f"| {p['mean']:.1f} [{p['low']:.1f}, {p['high']:.1f}] |" in line
        assert ("†" in line) == (one["task"] not in TRAINING["sets"])
        assert ("n/a" in line) == (one["pixels"] is None) and f"| {one['chance']:.1f} |" in line
    assert found["sets"]["Grid-Position"]["chance"] == 25 and found["sets"]["Grid-Position"]["pixels"] is None
    assert found["sets"]["Scene-Matching"]["pixels"]["mean"] == 25  # all candidates have the query's own picture
    assert found["sets"]["Emoji-t2i"]["pixels"] is None and found["sets"]["Fluent-i2i"]["pixels"]["mean"] > 30
    for fact in ("wall time | 90 minutes", "1,200 of 256 pairs, then 10 of 32 pairs: 307,520",
                 "`abc1234`", "| seed | 7 |", "- resumed once",
                 "Emoji-t2i (x2), Emoji-i2t |", "\nminivlm2vec train mini.toml\n",
                 'model = "start"', "CC BY 4.0", "EmojiOne v2", "258,496 parameters",
                 "only the first 6 rows"):  # fmt: skip
        assert fact in text, fact
    assert text.startswith("---\nlicense: apache-2.0\n") and "# random:" in text


def test_averages_are_plain_means(scored):
    found = json.loads((scored / "scores.json").read_text())
    for group, means in found["averages"].items():
        members = [one for one in found["sets"].values() if one["group"] == group]
        for kind, mean in means.items():
            mine = [one for one in members if kind in ("all", one["meta_task"])]
            assert mean["sets"] == len(mine)
            expected = np.mean([one["precision@1"]["mean"] for one in mine])
            assert mean["precision@1"]["mean"] == pytest.approx(expected, abs=1e-3)
            assert mean["chance"] == pytest.approx(np.mean([one["chance"] for one in mine]), abs=1e-3)
    assert set(found["averages"]) == set(scores.GROUPS)


def test_the_same_scores_give_the_same_card(scored, tmp_path):
    (tmp_path / "scores.json").write_bytes((scored / "scores.json").read_bytes())
    assert main(["card", str(scored), "-o", str(tmp_path), "--name", "random"]) == 0
    assert (tmp_path / "README.md").read_bytes() == (scored / "README.md").read_bytes()


def test_what_is_wrong_is_named_before_scoring(scored, tmp_path, capsys):
    assert main(["card", str(scored), "-o", str(tmp_path)]) == 1
    assert "scores.json, which does not exist" in capsys.readouterr().err
    new_checkpoint(tmp_path / "one")
    path = tmp_path / "one" / "training.json"
    path.write_text(json.dumps({key: value for key, value in TRAINING.items() if key not in ("seed", "commit")}))
    assert main(["card", str(tmp_path / "one"), str(bundled())]) == 1
    assert f"{path} lacks seed, commit" in capsys.readouterr().err
    path.write_text(json.dumps(TRAINING))
    assert main(["card", str(tmp_path / "one"), str(bundled())]) == 1
    assert "names the config mini.toml, more.toml, which is not beside it" in capsys.readouterr().err


def test_a_checkpoint_without_a_record_has_a_card_that_says_so(scored):
    found = json.loads((scored / "scores.json").read_text())
    text = card.card("mini", found, None, [])
    assert "Not recorded" in text and not any(line.startswith("|") and "†" in line for line in text.splitlines())


def test_data_that_is_not_mini_mmeb_is_refused(scored, tmp_path):
    (tmp_path / "MMEB-eval" / "CIRR").mkdir(parents=True)
    row = {"qry_text": "a", "qry_img_path": "", "tgt_text": ["b"], "tgt_img_path": [""]}
    (tmp_path / "MMEB-eval" / "CIRR" / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="holds CIRR, which is no set of mini-MMEB"):
        scores.measure(scored, tmp_path, tmp_path / "work")
