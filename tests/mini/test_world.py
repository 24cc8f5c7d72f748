"""The mini-MMEB builder, on drawings made here; and the trimmed copy that the package ships.

Every made-up emoji is a square of its own colour, so that what a picture shows can be read off its pixels.
"""

import io
import itertools
import json
import os
import random
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from minivlm2vec.cli import mini_world as command
from minivlm2vec.mini import bundled
from minivlm2vec.mini.world import build, concepts, drawing, sources, tasks, words
from minivlm2vec.mmeb.dataset import Dataset

PLAN = build.Plan(eval_rows=12, train_rows=10, candidates=20, jsonl=True)
SUBGROUPS = {"animal-mammal": ("mammals", 3), "food-fruit": ("fruit", 4), "tool": ("tools", 7), "drink": ("drink", 4)}
NAMES = [
    "".join(parts) for parts in itertools.product(("ba", "do", "ki", "mu", "ra"), ("lop", "tin", "sum", "ger", "nak"))
]


@pytest.fixture(scope="module")
def tarballs(tmp_path_factory):
    """The four packages, in small: 4 subgroups of 20 things, variants of one of them, and two that look alike."""
    folder = tmp_path_factory.mktemp("tarballs")
    entries, colours = [], {}
    shades = itertools.product((10, 70, 130, 190, 250), (10, 70, 130, 190, 250), (30, 100, 170, 240))
    for number, (subgroup, name) in enumerate(itertools.product(range(4), NAMES[:20])):
        code = f"1F{0x500 + number:03X}"
        colours[code] = next(shades)
        entries.append(entry(code, f"{name} {'abcd'[subgroup]}", subgroup))
    base = entries[0]["hexcode"]
    for suffix in ("-1F3FB", "-200D-2640-FE0F", "-200D-2642-FE0F", "-200D-27A1-FE0F"):
        colours[base + suffix] = (2, 2, 2)
        entries.append(entry(base + suffix, f"variant {suffix}", 0))
    colours["1F9FF"] = colours[entries[5]["hexcode"]]
    entries.append(entry("1F9FF", "lookalike", 1))
    for order, one in enumerate(entries):
        one["order"] = order
    return write_tarballs(folder, entries, colours)


def entry(code, label, subgroup):
    group = list(SUBGROUPS.values())[subgroup][1]
    tags = [f"{label} {word}" for word in ("one", "two", "three", "four")]
    tags = [tag.replace(label, f"tag{zlib.crc32(code.encode()) % 9}") for tag in tags]
    return {"hexcode": code, "label": label, "tags": tags, "group": group, "subgroup": subgroup}


def write_tarballs(folder, entries, colours):
    groups = ["smileys & emotion", "people & body", "components", "animals & nature", "food & drink",
              "travel & places", "activities", "objects"]  # fmt: skip
    messages = {
        "groups": [{"order": i, "message": name} for i, name in enumerate(groups)],
        "subgroups": [{"order": i, "key": k, "message": m} for i, (k, (m, _)) in enumerate(SUBGROUPS.items())],
    }
    licence = ("package/LICENSE", b"MIT, or so")
    names = [("package/en/data.json", json.dumps(entries).encode()),
             ("package/en/messages.json", json.dumps(messages).encode())]  # fmt: skip
    files = {
        sources.EMOJIBASE: [licence, *names],
        sources.NOTO: [licence],
        sources.TWEMOJI: [licence],
        sources.FLUENT: [],
    }
    for code, colour in colours.items():
        noto, twemoji, fluent = (picture(colour, edge) for edge in ((0, 0, 0), (90, 90, 90), (160, 160, 160)))
        files[sources.NOTO].append((f"package/img/google/64/{code.lower()}.png", encoded(noto, "PNG")))
        files[sources.TWEMOJI].append((f"package/img/twitter/64/{code.lower()}.png", encoded(twemoji, "PNG")))
        large = fluent.resize((256, 256))
        files[sources.FLUENT].append((f"package/assets/{code.lower()}.webp", encoded(large, "WEBP")))
    paths = {}
    for package, members in files.items():
        paths[package] = folder / package.filename
        with tarfile.open(paths[package], "w:gz") as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return paths


def picture(colour, edge):
    image = Image.new("RGBA", (64, 64), (*edge, 255))
    image.paste((*colour, 255), (3, 3, 61, 61))
    return image


def encoded(image, form):
    file = io.BytesIO()
    image.save(file, form, **({"lossless": True} if form == "WEBP" else {}))
    return file.getvalue()


@pytest.fixture(scope="module")
def worlds(tarballs):
    return concepts.load_world(tarballs, seed=0)


@pytest.fixture(scope="module")
def built(tarballs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    build.write(folder, PLAN, tarballs)
    return folder


# --- concepts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "same"),
    [
        ("1F9D1-1F3FD-200D-1F680", "1F9D1-200D-1F680"),  # skin
        ("1F469-200D-1F680", "1F9D1-200D-1F680"),  # woman astronaut
        ("1F3C3-200D-2640-200D-27A1", "1F3C3"),  # woman running, facing right
        ("1F467", "1F9D2"),  # girl, child
        ("1F478", "1FAC5"),  # princess, person with crown
        ("1F468-200D-1F469-200D-1F467", "1F46A"),  # a family
        ("1F468-200D-2764-200D-1F468", "1F491"),  # couple with heart
        ("1F436", "1F436"),
    ],
)
def test_variants_have_one_code(code, same):
    assert concepts.neutral(code) == same


def test_variants_and_lookalikes_are_one_concept_on_one_side(worlds):
    train, held_out = worlds
    labels = Counter(one.label for world in worlds for one in world.concepts)
    assert len(labels) == 80 and set(labels.values()) == {1}
    assert not any("variant" in label or label == "lookalike" for label in labels)
    assert not {one.code for one in train.concepts} & {one.code for one in held_out.concepts}
    assert Counter(one.subgroup for one in held_out.concepts) == dict.fromkeys(("mammal", "fruit", "tool", "drink"), 5)


def test_the_seed_decides_the_split(tarballs, worlds):
    again, other = (concepts.load_world(tarballs, seed)[1] for seed in (0, 1))
    assert again.concepts == worlds[1].concepts != other.concepts


@pytest.mark.parametrize(
    ("rgb", "name"),
    [((220, 30, 30), "red"), ((250, 150, 30), "orange"), ((250, 220, 50), "yellow"), ((40, 160, 60), "green"),
     ((40, 90, 220), "blue"), ((140, 50, 200), "purple"), ((250, 160, 190), "pink"), ((130, 80, 40), "brown"),
     ((15, 15, 15), "black"), ((128, 128, 130), "gray"), ((250, 250, 250), "white")],
)  # fmt: skip
def test_colour_names(rgb, name):
    assert concepts.colour_name(*rgb) == name


def test_words():
    assert words.with_article("apple") == "an apple" and words.with_article("unicorn") == "a unicorn"
    plurals = {"dog": "dogs", "box": "boxes", "cherry": "cherries", "key": "keys", "wolf": "wolves", "fish": "fish",
               "rice ball": "rice balls", "computer mouse": "computer mice"}  # fmt: skip
    assert {noun: words.plural(noun) for noun in plurals} == plurals
    assert words.is_countable("hot dog") and words.is_countable("bus")
    assert not any(map(words.is_countable, ("grapes", "cooked rice", "flag: Chad", "camera with flash", "two-thirty")))


# --- what the rows say -----------------------------------------------------------------------------------


def seen_at(world, image, x, y):
    """The label of the concept whose colour is at a place, or None."""
    pixel = image.getpixel((int(x), int(y)))
    by_colour = {world.drawings["noto", one.code].getpixel((32, 32))[:3]: one.label for one in world.concepts}
    return by_colour.get(pixel)


def sampled(world, name, number=40):
    for i in range(number):
        yield tasks.SETS[name].sample(world, random.Random(f"{name}/{i}"))


QUARTERS = {"top left corner": (32, 32), "top right corner": (96, 32),
            "bottom left corner": (32, 96), "bottom right corner": (96, 96)}  # fmt: skip


def test_where_position_and_beside_are_true(worlds):
    world = worlds[1]
    asked = Counter()
    for row in sampled(world, "Grid-Where"):
        corner = row.query.text.removeprefix("what is in the ").removesuffix("?")
        assert seen_at(world, row.query.image, *QUARTERS[corner]) == row.positive.text
        assert row.positive.text not in [item.text for item in row.hard_negatives] and len(row.hard_negatives) == 3
    for row in sampled(world, "Grid-Position"):
        name = row.query.text.removeprefix("where is the ").removesuffix("?")
        assert seen_at(world, row.query.image, *QUARTERS[row.positive.text]) == name
    moves = {"to the left of": (-64, 0), "to the right of": (64, 0), "above": (0, -64), "below": (0, 64)}
    for row in sampled(world, "Grid-Beside"):
        relation, name = row.query.text.removeprefix("what is ").removesuffix("?").split(" the ", 1)
        if relation == "to":
            relation, name = row.query.text.removeprefix("what is ").removesuffix("?").rsplit(" the ", 1)
        asked[relation] += 1
        (x, y) = next(place for place in QUARTERS.values() if seen_at(world, row.query.image, *place) == name)
        dx, dy = moves[relation]
        assert seen_at(world, row.query.image, x + dx, y + dy) == row.positive.text
    assert set(asked) == set(moves)


def test_counts_and_colours_are_true(worlds):
    world = worlds[1]
    cells = [(x, y) for x in (21, 63, 105) for y in (21, 63, 105)]
    for row in sampled(world, "Grid-Count"):
        noun = row.query.text.removeprefix("how many ").removesuffix(" are there?")
        shown = Counter(seen_at(world, row.query.image, *cell) for cell in cells)
        (label,) = (one.label for one in world.concepts if words.plural(one.label) == noun)
        assert words.NUMBERS[shown[label]] == row.positive.text
    for row in sampled(world, "Grid-Color"):
        label = row.query.text.removeprefix("what color is the ").removesuffix("?")
        (place,) = (xy for xy in QUARTERS.values() if seen_at(world, row.query.image, *xy) == label)
        assert concepts.colour_name(*row.query.image.getpixel(place)) == row.positive.text


def test_crops_show_what_is_asked_for(worlds):
    world = worlds[1]
    classes = {one.label: one.subgroup for one in world.concepts}
    for name in ("Scene-Isolate", "Scene-Point"):
        for row in sampled(world, name):
            shown, *others = (
                seen_at(world, x.image, *(s / 2 for s in x.image.size)) for x in (row.positive, *row.hard_negatives)
            )
            assert len(others) == 3 and shown not in others
            if name == "Scene-Isolate":
                assert shown == row.query.text
            else:
                asked = row.query.text.split('"')[1]
                assert classes[shown] == asked and asked not in {classes[other] for other in others}


def test_the_left_one_is_on_the_left(worlds):
    """The two of a kind differ in their edges (they are drawn in two styles), so the crop can be told apart."""
    world = worlds[1]
    for row in sampled(world, "Scene-Refer"):
        image, crop, twin = row.query.image, row.positive.image, row.hard_negatives[0].image
        place, other = (next(found(image, part)) for part in (crop, twin))
        axis, sign = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}[row.query.text.split()[-1]]
        assert sign * (place[axis] - other[axis]) > 0
        assert crop.resize((16, 16)).tobytes() != twin.resize((16, 16)).tobytes()


def found(image, part):
    """Centres of the places where `part` lies in `image`."""
    (w, h), (W, H) = part.size, image.size
    for x, y in itertools.product(range(W - w + 1), range(H - h + 1)):
        same_centre = image.getpixel((x + w // 2, y + h // 2)) == part.getpixel((w // 2, h // 2))
        if same_centre and image.crop((x, y, x + w, y + h)).tobytes() == part.tobytes():
            yield x + w / 2, y + h / 2


def test_changes_change_one_thing(worlds):
    world = worlds[1]
    for row in sampled(world, "Scene-Change"):
        old, new = row.query.text.removeprefix("replace the ").split(" with a", 1)
        new = new.removeprefix("n ").strip()
        before, after = (Counter(shown(world, x.image)) for x in (row.query, row.positive))
        assert before - after == Counter([old]) and after - before == Counter([new])
        assert row.hard_negatives[0].image.tobytes() == row.query.image.tobytes()
        assert len({x.image.tobytes() for x in (row.positive, *row.hard_negatives)}) == 4


def shown(world, image):
    """Labels in a picture, by whether a 20 x 20 block of the concept's colour is there."""
    pixels = Counter({colour: number for number, colour in image.getcolors(1 << 16)})
    return [
        one.label for one in world.concepts if pixels[world.drawings["noto", one.code].getpixel((32, 32))[:3]] >= 400
    ]


def test_captions_tell_what_is_shown(worlds):
    world = worlds[1]
    for row in sampled(world, "Scene-i2t"):
        caption = row.positive.text.removesuffix(".")
        parts = caption.replace(" and ", ", ").split(", ")
        labels = {one.label for one in world.concepts for part in parts if part.split(" ", 1)[1] in
                  (one.label, words.plural(one.label))}  # fmt: skip
        assert labels == set(shown(world, row.query.image))
        assert row.hard_negatives[0].text != row.positive.text


# --- what is written -------------------------------------------------------------------------------------


def test_evaluation_sets_are_in_mmebs_format(built):
    data = Dataset(built / "MMEB-eval")
    assert len(data.subsets) >= 16
    assert {one.meta_task for one in data.subsets.values()} == {"classification", "vqa", "retrieval", "grounding"}
    for one in data.subsets.values():
        rows = data.rows(one, skip_damaged=True)
        assert rows.damaged == [] and 5 <= len(rows) <= 12, one.name
        assert len({row.query for row in rows}) == len(rows)
        for row in rows:
            assert len(set(row.targets)) == len(row.targets) <= 20, one.name
            assert (row.query.image != "") == row.query.text.startswith("<|image_1|>\n")
            assert all((x.image != "") == x.text.startswith("<|image_1|>\n") for x in row.targets)
            assert row.query.text.endswith("\n")


@pytest.mark.parametrize("name", ["Emoji-t2i", "Emoji-i2i", "Tag-t2i", "Scene-Isolate", "Scene-Point", "Fluent-i2i"])
def test_no_wrong_candidate_shows_the_right_thing(built, name):
    """Also not in the other style, or cut from another row's scene."""
    data = Dataset(built / "MMEB-eval")

    def colour(pair):
        image = Image.open(io.BytesIO(data.images.source(pair.image)))
        return image.getpixel((image.width // 2, image.height // 2))

    for row in data.rows(data.subsets[name]):
        right, *wrong = map(colour, row.targets)
        assert len(wrong) >= 9 and right not in wrong


def test_every_meta_task_has_held_out_tasks_and_the_held_out_style(built):
    about = json.loads((built / "MMEB-eval" / "subsets.json").read_text())
    for task in ("classification", "vqa", "retrieval", "grounding"):
        sets = [one for one in about.values() if one["meta_task"] == task]
        assert any("fluent" in one["styles"] for one in sets)
        assert {one["domain"] for one in sets} == {"IND", "OOD"}
    assert all(one["domain"] == "OOD" for one in about.values() if "fluent" in one["styles"])


def test_training_sets_are_in_mmebs_format(built):
    folder = built / "MMEB-train"
    with zipfile.ZipFile(folder / "images.zip") as archive:
        stored = set(archive.namelist())
    names = [one.name for one in folder.iterdir() if one.is_dir()]
    assert len(names) >= 8
    for name in names:
        original, diverse = (
            [json.loads(line) for line in (folder / name / f"{split}.jsonl").read_text().splitlines()]
            for split in ("original", "diverse_instruction")
        )
        assert len(original) == len(diverse) == 10
        assert [row | {"qry": ""} for row in original] == [row | {"qry": ""} for row in diverse]
        assert {row["qry"] for row in original} != {row["qry"] for row in diverse}
        for row in (*original, *diverse):
            assert {"qry", "qry_image_path", "pos_text", "pos_image_path"} <= set(row)
            assert {path for key, path in row.items() if key.endswith("path") and path} <= stored
            assert (row["qry_image_path"] != "") == row["qry"].startswith("<|image_1|>\n")


def test_no_evaluation_drawing_is_in_the_training_pictures(built, worlds):
    held_out = {worlds[1].drawings["noto", one.code].getpixel((32, 32))[:3] for one in worlds[1].concepts}
    with zipfile.ZipFile(built / "MMEB-train" / "images.zip") as archive:
        assert archive.namelist()
        for name in archive.namelist():
            image = Image.open(io.BytesIO(archive.read(name)))
            assert not {colour for count, colour in image.getcolors(1 << 16) if count >= 100} & held_out, name


def test_the_same_seed_writes_the_same_bytes(built, tarballs, tmp_path):
    build.write(tmp_path / "again", PLAN, tarballs)
    files = sorted(path.relative_to(built) for path in built.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for path in files:
        assert (built / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path
    with pytest.raises(FileExistsError, match="MMEB-eval exists"):
        build.write(built, PLAN, tarballs)


def test_parquet_files_are_named_as_in_mmeb(worlds, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    plan = build.Plan(eval_rows=3, train_rows=3, candidates=5)
    build.write_eval(tmp_path / "eval", *worlds, plan)
    table = parquet.read_table(tmp_path / "eval" / "Scene-Change" / "test-00000-of-00001.parquet")
    assert table.column_names == ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]
    assert str(table.schema.field("tgt_text").type).startswith("list<") and table.num_rows == 3
    build.write_train(tmp_path / "train", worlds[0], plan)
    folder = tmp_path / "train"
    for split in ("original", "diverse_instruction"):
        path = folder / "Scene-Change" / f"{split}-00000-of-00001.parquet"
        rows = parquet.read_table(path).to_pylist()
        assert set(rows[0]) == {"qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"}
        with zipfile.ZipFile(folder / "images_zip" / "Scene-Change.zip") as archive:
            assert rows[0]["neg_image_path"] in archive.namelist()
        assert rows[0]["qry_image_path"].startswith("images/Scene-Change/Train/image_")


def test_the_command_tells_what_it_does(tarballs, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(sources, "fetch", lambda folder: tarballs)
    arguments = ["--eval-rows", "2", "--train-rows", "2", "--candidates", "5", "--seed", "3"]
    assert command.main([str(tmp_path / "built"), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\[ *\d+\.\d s\] \S", line) for line in lines)
    told = [line.split("] ")[1] for line in lines]
    assert told[:2] == ["reading names", "reading drawings"] and told[-1] == f"written to {tmp_path / 'built'}"
    assert len(told) == 4 + len(tasks.EVAL) + len(tasks.TRAIN)
    assert command.main([str(tmp_path / "built"), *arguments]) == 1
    assert "MMEB-eval exists" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--eval-rows must be at least 1, got 0"):
        command.main([str(tmp_path), "--eval-rows", "0"])


def test_default_sizes_are_those_promised():
    plan = build.Plan()
    assert 300 <= plan.eval_rows <= 1000 and 300 <= plan.train_rows <= 1000
    assert len(tasks.EVAL) >= 16 and len(tasks.TRAIN) >= 8
    assert drawing.CANVAS <= 168 and drawing.SINGLE <= 72


# --- fetching --------------------------------------------------------------------------------------------


def test_a_changed_tarball_is_refused(tmp_path):
    (tmp_path / sources.NOTO.filename).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"checksum sha512-.* but emoji-datasource-google@16\.0\.0 has sha512-ZRexf"):
        sources.fetch(tmp_path)


def test_npm_is_asked_for_the_pinned_version(tmp_path, monkeypatch, capsys):
    fake = tmp_path / "bin" / "npm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@" > "$4/asked"\necho broken >&2\nexit 3\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match=r"npm pack emoji-datasource-google@16\.0\.0 failed \(3\): broken"):
        sources.fetch(tmp_path / "tarballs")
    asked = (tmp_path / "tarballs" / "asked").read_text().split()
    assert asked[:3] == ["pack", "emoji-datasource-google@16.0.0", "--pack-destination"]
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert command.main([str(tmp_path / "out"), "--tarballs", str(tmp_path / "tarballs")]) == 1
    assert "npm is not installed" in capsys.readouterr().err


def test_tarball_names_are_npms():
    assert [one.filename for one in sources.PACKAGES] == [
        "emoji-datasource-google-16.0.0.tgz", "emoji-datasource-twitter-16.0.0.tgz",
        "lobehub-fluent-emoji-3d-1.1.0.tgz", "emojibase-data-17.0.0.tgz",
    ]  # fmt: skip


# --- the trimmed copy ------------------------------------------------------------------------------------


def test_the_shipped_copy_is_small_whole_and_licensed():
    files = [path for path in bundled().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    text = (bundled() / "ATTRIBUTION.md").read_text()
    for credit in (
        "Noto Emoji",
        "Twemoji",
        "Fluent Emoji",
        "Emojibase",
        "Apache-2.0",
        "CC BY 4.0",
        "creativecommons.org",
    ):
        assert credit in text
    assert "Apache License" in (bundled() / "licenses" / "Apache-2.0.txt").read_text()
    assert "Microsoft" in (bundled() / "licenses" / "fluent-emoji.txt").read_text()
    data = Dataset(bundled() / "MMEB-eval")
    assert list(data.subsets) == [one.name for one in build.eval_sets(build.TRIMMED)]
    for one in data.subsets.values():
        rows = data.rows(one, skip_damaged=True)  # decodes every picture
        assert rows.damaged == [] and len(rows) == 24
    trained = [one.name for one in (bundled() / "MMEB-train").iterdir() if one.is_dir()]
    assert sorted(trained) == sorted(tasks.TRAIN)


def test_every_licence_is_told_once():
    """pyproject.toml names each text in data/licenses, by content, and no text twice."""
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    told = [(root / name).read_bytes() for name in project["license-files"]]
    assert len(set(told)) == len(told)
    shipped = [path.read_bytes() for path in (bundled() / "licenses").iterdir()]
    assert set(shipped) <= set(told) and len(set(shipped)) == len(shipped)
    for licence in ("Apache-2.0", "CC-BY-4.0", "MIT"):
        assert licence in project["license"].split(" AND ")


def test_the_shipped_copy_keeps_concepts_apart():
    pictures = [json.loads(line) for line in (bundled() / "MMEB-eval" / "pictures.jsonl").read_text().splitlines()]
    held_out = {one["label"] for one in pictures}
    assert len(pictures) == 360 and len(held_out) == 120
    lines = (bundled() / "MMEB-train" / "Emoji-i2t" / "original.jsonl").read_text().splitlines()
    assert len(lines) == 32 and not {json.loads(line)["pos_text"] for line in lines} & held_out


@pytest.mark.skipif("MINIVLM2VEC_NPM_TARBALLS" not in os.environ, reason="needs the npm tarballs (156 MB)")
def test_the_shipped_copy_is_what_the_builder_writes(tmp_path):
    """Rows byte for byte; pictures only by name, since encoders change."""
    tarballs = sources.fetch(Path(os.environ["MINIVLM2VEC_NPM_TARBALLS"]))
    build.write(tmp_path, build.TRIMMED, tarballs)
    for path in (path for path in bundled().rglob("*") if path.is_file()):
        again = tmp_path / path.relative_to(bundled())
        if path.suffix == ".zip":
            assert zipfile.ZipFile(path).namelist() == zipfile.ZipFile(again).namelist()
        else:
            assert path.read_bytes() == again.read_bytes(), path
