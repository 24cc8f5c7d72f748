"""What the bundled checkpoint is trained from: rows drawn without end, its tokenizer, its configuration."""

import copy
import io
import json
import random
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm2vec import Embedder
from minivlm2vec.cli import main
from minivlm2vec.cli.mini import main as mini_main
from minivlm2vec.config import VLM2VecConfig
from minivlm2vec.mini import CHECKPOINT, bundled, card, start
from minivlm2vec.mini.drawn import DrawnRows
from minivlm2vec.mini.world import concepts, stream, tasks
from minivlm2vec.mini.world import sources as packages
from minivlm2vec.mini.world.more_styles import add_styles
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.rows import Images, read_jsonl
from minivlm2vec.tokenizer import Tokenizer
from minivlm2vec.train.config import DataConfig, TrainConfig, read_config
from minivlm2vec.train.data import content_id
from minivlm2vec.train.trainer import Trainer
from minivlm2vec.weights import load_model
from tests.mini.test_world import tarballs, worlds  # noqa: F401 (fixtures)

SOURCE = "minivlm2vec.mini.drawn:DrawnRows"
NOTHING = stream.Variation().scaled(0)
LEAST = 0.5  # P@1 in the style of training; the card has what was measured


@pytest.fixture(scope="module")
def world(worlds):  # noqa: F811
    return worlds[0]


@pytest.fixture(scope="module")
def data(world):
    return DrawnRows(DataConfig(source=SOURCE, sub_batch=2, workers=1), seed=3, world=world)


def test_a_row_depends_on_its_number_alone(world):
    one, *_ = stream.rows(world, "Grid-Where", [5, 6], stream.Variation(), "seed")
    again = stream.rows(world, "Grid-Where", [9, 5], stream.Variation(), "seed")[1]
    other = stream.rows(world, "Grid-Where", [5], stream.Variation(), "another seed")[0]
    assert one.query.text == again.query.text and one.query.image.tobytes() == again.query.image.tobytes()
    assert other.query.image.tobytes() != one.query.image.tobytes()


def test_without_variation_rows_are_those_of_the_files(world):
    (row,) = stream.rows(world, "Scene-Isolate", [7], None, "s")
    rng = random.Random("s/Scene-Isolate/7")
    expected = tasks.SETS["Scene-Isolate"].row(world, rng, rng.randrange(len(tasks.INSTRUCTIONS["Scene-Isolate"])))
    assert row.query.text == expected.query.text and row.query.image.tobytes() == expected.query.image.tobytes()


def test_a_drawing_that_comes_twice_in_a_row_is_the_same(world):
    """The crop of a thing is a piece of the scene."""
    (row,) = stream.rows(world, "Scene-Isolate", [1], stream.Variation(), "s")
    scene, crop = np.asarray(row.query.image), np.asarray(row.positive.image)
    windows = np.lib.stride_tricks.sliding_window_view(scene, crop.shape)
    assert (windows == crop).all(axis=(-1, -2, -3)).any()


def test_variation_of_nothing_changes_nothing():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    image = Image.fromarray(pixels, "RGBA")
    same = stream.vary(image, NOTHING, random.Random(0))
    assert np.abs(np.asarray(same).astype(int) - np.asarray(image)).max() <= 1


def test_a_strength_beyond_its_bounds_is_refused(world):
    with pytest.raises(ValueError, match=r"variation is 3.5; it lies between 0 and 3"):
        DrawnRows(DataConfig(source=SOURCE, options={"variation": 3.5}), world=world)


def test_an_unknown_option_is_named(world):
    with pytest.raises(ValueError, match=r"no setting is named data.options.variatoin; did you mean variation\?"):
        DrawnRows(DataConfig(source=SOURCE, options={"variatoin": 1.0}), world=world)


@pytest.mark.parametrize("part", ["turn", "hue", "colour", "shade"])
def test_variation_stays_within_its_bounds(part):
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((200, 80, 60, 255), (8, 24, 56, 40))
    only = {f: getattr(stream.Variation(), f) if f == part else getattr(NOTHING, f) for f in vars(NOTHING)}
    changed = [np.asarray(stream.vary(image, stream.Variation(**only), random.Random(i))) for i in range(30)]
    assert len({x.tobytes() for x in changed}) > 10
    for x in changed:
        inside = x[x[..., 3] > 250][:, :3].astype(float)
        red, green, blue = inside.mean(0)
        if part == "turn":
            assert (abs(inside - (200, 80, 60)) <= 2).all() and 0.9 < len(inside) / (48 * 16) < 1.1
        if part == "hue":
            assert red > max(green, blue) and abs(inside.mean() - 340 / 3) < 3  # grey stays
        if part == "colour":
            assert red > max(green, blue)
        if part == "shade":
            assert 0.65 * 200 < red <= 200
    if part == "shade":  # one side is darker
        assert sum(np.ptp(x[24:40, 8:56, 0]) > 4 for x in changed) > 15


@pytest.fixture
def more_styles(world, tmp_path):
    """One more style, which knows three things: one by another name, one in one word, one only mirrored."""
    pytest.importorskip("resvg_py")
    first, second, third = (concept.label.replace(" ", "-") for concept in world.concepts[:3])
    square = '<path fill="#0a0" d="M0 0h32v32H0z"/>'
    icons = {
        "width": 32, "height": 32,
        "icons": {"other": {"body": square}, second.replace("-", ""): {"body": square}},
        "aliases": {first: {"parent": "other"}, third: {"parent": "other", "hFlip": True}},
    }  # fmt: skip
    path = tmp_path / "icons.tgz"
    with tarfile.open(path, "w:gz") as archive:
        content = json.dumps(icons).encode()
        info = tarfile.TarInfo("package/icons.json")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return add_styles(world, {packages.FXEMOJI: path})


def test_more_styles_are_found_by_name(world, more_styles):
    new = packages.FXEMOJI.name
    assert more_styles.styles == (*world.styles, new) and new not in world.styles
    assert {code for style, code in more_styles.drawings if style == new} == {c.code for c in world.concepts[:2]}
    drawing = more_styles.drawings[new, world.concepts[0].code]
    assert drawing.size == (64, 64) and drawing.getpixel((32, 32)) == (0, 170, 0, 255)


def test_what_a_style_lacks_is_drawn_in_one_of_mini_mmebs(world, more_styles):
    code, new = world.concepts[5].code, packages.FXEMOJI.name
    shown = {stream.VariedDrawings(more_styles, NOTHING, str(i))[new, code].tobytes() for i in range(20)}
    assert shown <= {world.drawings[style, code].tobytes() for style in concepts.SEEN_STYLES} and len(shown) == 2
    for name in tasks.TRAIN:
        assert len(stream.rows(more_styles, name, range(8), stream.Variation(), "s")) == 8


def test_batches_depend_on_the_step_alone_and_mix_blocks_of_sets(data, world):
    again = DrawnRows(DataConfig(source=SOURCE, sub_batch=2, workers=1), seed=3, world=world)
    names = lambda rows: [row.name for row in rows]  # noqa: E731
    assert names(data.batch(4, 8)) == names(again.batch(4, 8)) != names(data.batch(5, 8))
    assert names(data.batch(4, 8, slice(3, 6))) == names(data.batch(4, 8))[3:6]
    rows = [row for step in range(13) for row in data.batch(step, 8)]  # 52 blocks: four rounds of 13 sets
    sets = [row.name.split(",")[0] for row in rows]
    assert sets[::2] == sets[1::2] and {name: sets.count(name) for name in tasks.TRAIN} == dict.fromkeys(tasks.TRAIN, 8)
    assert len(set(names(rows))) == len(rows)
    other = DrawnRows(DataConfig(source=SOURCE, sub_batch=2, workers=1), seed=4, world=world)
    assert names(other.batch(4, 8)) != names(data.batch(4, 8))


def test_several_processes_draw_the_same(data, world):
    several = DrawnRows(DataConfig(source=SOURCE, sub_batch=2, workers=2), seed=3, world=world)
    for ours, theirs in zip(data.batch(1, 16), several.batch(1, 16), strict=True):
        assert (ours.name, ours.pairs) == (theirs.name, theirs.pairs)
        assert {n: p.tobytes() for n, p in ours.images.drawings.items()} == {
            n: p.tobytes() for n, p in theirs.images.drawings.items()
        }


def test_a_set_that_is_named_twice_comes_twice_as_often(world):
    config = DataConfig(source=SOURCE, sets=("Emoji-t2i", "Emoji-t2i", "Grid-Count"), workers=1)
    rows = DrawnRows(config, world=world).batch(0, 30)
    assert sum(row.name.startswith("Emoji-t2i") for row in rows) == 20
    with pytest.raises(ValueError, match=r"Emoji-t2t is no training set; there are Emoji-Subgroup"):
        DrawnRows(DataConfig(source=SOURCE, sets=("Emoji-t2t",)), world=world)


def test_drawn_rows_show_training_concepts_in_training_styles(worlds):  # noqa: F811
    world, held_out = worlds
    asked = set()

    class Watched(dict):
        def __getitem__(self, key):
            asked.add(key)
            return super().__getitem__(key)

    watched = copy.copy(world)
    watched.drawings = Watched(world.drawings)
    DrawnRows(DataConfig(source=SOURCE, sub_batch=4, workers=1), world=watched).batch(0, 4 * 26)
    assert {style for style, _ in asked} == set(concepts.SEEN_STYLES)
    assert not {code for _, code in asked} & {one.code for one in held_out.concepts}


def test_no_picture_is_a_wrong_answer_for_its_equal(data, world):
    """Two drawings of one thing have one content id, so that `mask_duplicates` keeps them apart from wrong ones."""
    rows = DrawnRows(DataConfig(source=SOURCE, sets=("Emoji-t2i",), workers=1), world=world).batch(0, 150)
    by_text = {}
    for row in rows:
        name = row.query.text.split(":")[-1].split("?")[-1].strip()
        by_text.setdefault(name, set()).add(content_id(row.positives[0], row.images))
    assert len(rows) > 2 * len(by_text) > 20 and all(len(ids) == 1 for ids in by_text.values())
    assert len(set().union(*by_text.values())) == len(by_text)
    for row in data.batch(0, 26):
        assert not set(row.positives) & set(row.negatives)


def test_texts_are_all_hard_negatives_and_pictures_one(data):
    rows = {row.name.split(",")[0]: row for row in data.batch(0, 26)}
    assert len(rows["Grid-Where"].negatives) == 3 and not any(n.image for n in rows["Grid-Where"].negatives)
    assert len(rows["Scene-Change"].negatives) == 1 and rows["Scene-Change"].negatives[0].image


def test_the_tokenizer_has_a_token_for_an_instruction(world, tmp_path):
    start.train_tokenizer(world, start.VOCAB_SIZE).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert len(tokenizer) <= start.VOCAB_SIZE
    for text in ("\nRepresent the given image.\n", "\nRepresent the given image for classification\n"):
        assert len(tokenizer(text)) <= 3  # with the BOS, and perhaps the line's end
    for text in (world.concepts[0].phrase, "Grüße, 猫 & co.\n", "  two  spaces", "what is in the top left corner?"):
        assert tokenizer.tokenizer.decode(tokenizer(text)) == text
    assert len(tokenizer(world.concepts[0].phrase)) < len(world.concepts[0].phrase)


@pytest.mark.parametrize("size", start.SIZES)
def test_the_configurations_are_of_3_to_8_million_parameters_and_12_megabytes(size, tmp_path):
    folder = new_checkpoint(tmp_path / "m", config=start.SIZES[size])
    parameters = sum(p.numel() for p in load_model(folder).parameters())
    assert 3e6 < parameters < 8e6 and 2 * parameters < 11.6e6  # the tokenizer takes the rest
    assert VLM2VecConfig.from_json(folder).vision.image_size == 32


def test_the_checked_in_runs_are_readable():
    first, second, third, fourth = (read_config(CHECKPOINT / f"train-{i}.toml") for i in (1, 2, 3, 4))
    assert third.model == f"{second.out}/step-{second.optim.steps:06d}" and third.data.sets == second.data.sets
    assert fourth.model == f"{third.out}/step-{third.optim.steps:06d}" and fourth.data.sets == third.data.sets
    assert set(read_config(CHECKPOINT / "train-gpu.toml").data.sets) == set(tasks.TRAIN)
    assert set(first.data.sets) < set(second.data.sets) == set(tasks.TRAIN)
    assert (
        second.model == f"{first.out}/step-{first.optim.steps // 2:06d}"
        and first.optim.steps // 2 % first.log.save == 0
    )


def test_check_of_drawn_rows(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minivlm2vec.mini.drawn._training_world", lambda options: world)
    for spelling in ('root = "mini-drawn"', f'source = "{SOURCE}"'):
        (tmp_path / "c.toml").write_text(f'model = "m"\nout = "o"\n[data]\n{spelling}\n')
        assert main(["train", str(tmp_path / "c.toml"), "--check"]) == 0
        assert capsys.readouterr().out == "rows without end of 13 sets can be used\n"


def test_the_short_spelling_of_drawn_rows(tmp_path):
    """`root = "mini-drawn"` and the keys beside it, as TOML files had them before sources had names."""
    (tmp_path / "c.toml").write_text(
        'model = "m"\nout = "o"\n[data]\nroot = "mini-drawn"\nvariation = 2\nmore_styles = true\nimages = "kept"\n'
        "workers = 3\n"
    )
    options = {"variation": 2, "more_styles": True, "tarballs": "kept"}
    assert read_config(tmp_path / "c.toml").data == DataConfig(source=SOURCE, options=options, workers=3)


def test_what_is_fetched_is_told(tarballs, tmp_path, monkeypatch, capsys):  # noqa: F811
    def fetch(folder):
        packages.log.info(f"npm pack into {folder}")
        return tarballs

    monkeypatch.setattr(packages, "fetch", fetch)
    (tmp_path / "c.toml").write_text('model = "m"\nout = "o"\n[data]\nroot = "mini-drawn"\nimages = "kept"\n')
    assert main(["train", str(tmp_path / "c.toml"), "--check"]) == 0
    assert capsys.readouterr().out == "npm pack into kept\nrows without end of 13 sets can be used\n"


def test_it_trains_on_drawn_rows_and_goes_on_exactly(world, tmp_path, monkeypatch):
    monkeypatch.setattr("minivlm2vec.mini.drawn._training_world", lambda options: world)
    new_checkpoint(tmp_path / "start", preset="tiny")
    whole, halves = (_train(tmp_path, name, stops) for name, stops in (("whole", [4]), ("halves", [2, 4])))
    for name, p in whole.model.named_parameters():
        assert torch.equal(p, halves.model.get_parameter(name)), name
    assert (tmp_path / "whole/pictures/step-000004.png").exists()


def _train(folder, name, stops):
    config = {
        "model": str(folder / "start"), "out": str(folder / name), "autocast": True,
        "data": DataConfig(source=SOURCE, sub_batch=2, num_crops=1, workers=1),
    }  # fmt: skip
    from minivlm2vec.train.config import LogConfig, OptimConfig

    for stop in stops:
        optim = OptimConfig(batch_size=6, chunk_size=5, steps=4, lr=1e-3, warmup=1)
        log = LogConfig(save=2, pictures=4, picture_rows=9)
        trainer = Trainer(TrainConfig(**config, optim=optim, log=log), device="cpu")
        if stop == 4:
            trainer.run()
        else:
            for step in range(stop):
                trainer.train_step(trainer.loader.prepare(trainer.own_rows(step)))
            trainer.save()
    return trainer


def test_packaging_halves_the_file_and_keeps_the_vectors(tmp_path):
    trained = new_checkpoint(tmp_path / "trained", config={"torch_dtype": "float32"})
    assert mini_main(["package", str(trained), str(tmp_path / "packaged")]) == 0
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (trained, tmp_path / "packaged")]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    a, b = (
        Embedder.from_pretrained(str(f), device="cpu").encode(["a cat"])[0] for f in (trained, tmp_path / "packaged")
    )
    assert a.dtype == b.dtype == np.float32 and float(a @ b) > 0.99999
    assert mini_main(["package", str(tmp_path / "absent"), str(tmp_path / "x")]) == 1


def test_start_writes_a_checkpoint_with_its_own_tokenizer(tarballs, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(packages, "fetch", lambda folder: tarballs)
    assert mini_main(["start", str(tmp_path / "start")]) == 0
    assert (
        len(Embedder.from_pretrained(str(tmp_path / "start"), device="cpu").encode(["Represent the given image."])) == 1
    )


# --- the bundled checkpoint itself ---


@pytest.fixture(scope="module")
def mini():
    return Embedder.from_pretrained("mini", device="cpu", show_progress=False)


def test_the_package_holds_at_most_12_megabytes_of_it():
    files = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir() if path.is_file()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json", "README.md"} <= set(files)
    assert sum(files.values()) < 12e6


def test_its_size(mini):
    assert 3e6 < sum(p.numel() for p in load_model(CHECKPOINT).parameters()) < 8e6
    assert mini.encode(["a cat"]).dtype == np.float32


def test_its_card_is_made_from_its_scores(tmp_path):
    """And so no number in it was typed by hand."""
    for name in ("scores.json", "grounding.json"):
        shutil.copy(CHECKPOINT / name, tmp_path)
    card.write_card(CHECKPOINT, tmp_path, name="mini")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (CHECKPOINT / "README.md").read_text(
        encoding="utf-8"
    )


def test_its_training_record_is_that_of_the_configs():
    training, _ = card.read_training(CHECKPOINT)
    configs = [read_config(CHECKPOINT / run["config"]) for run in training["runs"]]
    assert [run["batch_size"] for run in training["runs"]] == [c.optim.batch_size for c in configs]
    assert all(run["steps"] <= c.optim.steps for run, c in zip(training["runs"], configs, strict=True))
    assert sorted(training["sets"]) == sorted(name for c in configs for name in c.data.sets)
    assert training["more_styles"] == any(c.data.options.get("more_styles", False) for c in configs)


def test_it_finds_pictures_by_name_and_names_by_picture(mini):
    """Concepts that it knows, in a style that it was trained on: 120 candidates."""
    rows = [row for row in _catalogue("pictures_seen.jsonl") if row["style"] == "twemoji"]
    images = Images(bundled() / "MMEB-eval" / "images.zip")
    pictures = [images.source(row["path"]) for row in rows]
    names = [row["label"] for row in rows]
    found = {
        "text to image": (
            mini.encode([tasks.INSTRUCTIONS["Emoji-t2i"][0].format(name) for name in names]),
            mini.encode([{"text": tasks.PICTURE, "image": picture} for picture in pictures]),
        ),
        "image to text": (
            mini.encode([{"text": tasks.INSTRUCTIONS["Emoji-i2t"][0], "image": picture} for picture in pictures]),
            mini.encode(names),
        ),
    }
    for what, (queries, targets) in found.items():
        right = ((queries @ targets.T).argmax(1) == np.arange(len(rows))).mean()
        print(f"{what}: {100 * right:.0f} %")
        assert right > LEAST


def _catalogue(name):
    return read_jsonl(bundled() / "MMEB-eval" / name)
