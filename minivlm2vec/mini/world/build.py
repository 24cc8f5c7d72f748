"""Writes mini-MMEB: evaluation and training sets in MMEB's own files, pictures, attribution.

    DIR/MMEB-eval/<Set>/test-00000-of-00001.parquet     qry_text, qry_img_path, tgt_text[], tgt_img_path[]
    DIR/MMEB-eval/images.zip
    DIR/MMEB-train/<Set>/original-00000-of-00001.parquet, diverse_instruction-…
                                                        qry, qry_image_path, pos_text, pos_image_path, neg_*
    DIR/MMEB-train/images_zip/<Set>.zip
    DIR/MMEB-eval/pictures.jsonl, pictures_seen.jsonl   the single emoji, held out and seen in training:
                                                        path, label, class, style
    DIR/*/subsets.json                                  meta-task, IND/OOD, concepts and styles of each set
    DIR/ATTRIBUTION.md, DIR/licenses/

The same seed gives the same bytes with the same Pillow and pyarrow (their compressors may change), and the
same rows and pixels with any.
"""

import hashlib
import io
import json
import logging
import random
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from . import drawing, sources, tasks
from .concepts import World, load_world

log = logging.getLogger(__name__)
LICENCES = Path(__file__).parents[1] / "data" / "licenses"
NOT_IN_PACKAGES = ("Apache-2.0.txt", "CC-BY-4.0.txt", "fluent-emoji.txt")  # of LICENCES


@dataclass(frozen=True)
class Plan:
    """How much to build."""

    seed: int = 0
    eval_rows: int = 400
    train_rows: int = 1000
    candidates: int = 1000  # at most, per row
    seen_candidates: int = 300  # the same, where concepts are those of training; each means something else
    jsonl: bool = False  # rows as JSON lines, readable without pyarrow
    webp: bool = False  # pictures as lossy WebP, a third of the size
    concepts: int | None = None  # of each split; None: all
    seen: tuple[str, ...] | None = None  # which evaluation sets over seen concepts; None: all


TRIMMED = Plan(
    eval_rows=24,
    train_rows=32,
    candidates=24,
    jsonl=True,
    webp=True,
    concepts=120,
    seen=(
        "Seen-Grid-Where",
        "Seen-Scene-Isolate",
        "Seen-Fluent-Subgroup",
        "Seen-Fluent-Where",
        "Seen-Fluent-t2i",
        "Seen-Fluent-Isolate",
        "Seen-Fluent-i2t",
        "Seen-Fluent-Beside",
        "Seen-Fluent-Position",
    ),
)


def write(folder: Path, plan: Plan, tarballs: dict[sources.Package, Path]) -> None:
    """Builds everything into `folder`, and logs what is done. Raises FileExistsError where it is already there."""
    for name in ("MMEB-eval", "MMEB-train"):
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} exists; remove it or choose another folder")
    train, held_out = load_world(tarballs, plan.seed)
    if plan.concepts is not None:
        train, held_out = (world.trimmed(plan.concepts, plan.seed) for world in (train, held_out))
    write_eval(folder / "MMEB-eval", train, held_out, plan)
    write_train(folder / "MMEB-train", train, plan)
    write_attribution(folder, plan, tarballs)


# --- evaluation ------------------------------------------------------------------------------------------


def write_eval(folder: Path, train: World, held_out: World, plan: Plan) -> None:
    about = {}
    with Pictures(folder / "images.zip", plan.webp) as pictures:
        for spec in eval_sets(plan):
            rows = eval_rows(spec, held_out if spec.concepts == "held-out" else train, plan, pictures)
            _write_rows(folder / spec.name / "test", rows, plan.jsonl)
            about[spec.name] = _about(spec, rows)
            widths = [len(row["tgt_text"]) for row in rows]
            log.info(f"eval  {spec.name:20} {len(rows):5} rows, {min(widths)} to {max(widths)} candidates")
        for stem, world in (("pictures", held_out), ("pictures_seen", train)):
            _write_rows(folder / stem, list(_catalogue(world, pictures)), jsonl=True)
    _write_json(folder / "subsets.json", about)


def eval_sets(plan: Plan) -> list[tasks.EvalSet]:
    """The evaluation sets that the plan has."""
    return [one for one in tasks.EVAL if one.concepts == "held-out" or plan.seen is None or one.name in plan.seen]


def eval_rows(spec: tasks.EvalSet, world: World, plan: Plan, pictures: "Pictures") -> list[dict]:
    """Rows of one set: candidates are the positive, its hard negatives, then others at random."""
    one = tasks.SETS[spec.set]
    world = world.restyled(spec.styles, spec.target_style)
    kind = "eval" if spec.concepts == "held-out" else "eval/seen"
    seed = f"{plan.seed}/{kind}/{one.family or spec.set}/{spec.styles}"
    sampled = list(_distinct(one, world, plan.eval_rows, seed, pictures, spec.name))
    if one.classes is not None:
        pool = [_stored(item, pictures, spec.name) for item in one.classes(world)]
    else:
        pool = [item for _, positive, hard_negatives in sampled for item in (positive, *hard_negatives)]
    pool = list(dict.fromkeys(pool))
    rng = random.Random(f"{seed}/candidates")
    if spec.concepts == "held-out":
        return [_eval_row(*row, pool, plan.candidates, rng) for row in sampled]
    most = min(plan.candidates, plan.seen_candidates)
    return [_eval_row(*row, pool, most, rng, distinct_meanings=True) for row in sampled]


@dataclass(frozen=True)
class Stored:
    """An item whose picture is in the zip, at `path`."""

    text: str
    path: str
    meaning: object


def _stored(item: tasks.Item, pictures: "Pictures", name: str) -> Stored:
    return Stored(item.text, pictures.add(item.image, name) if item.image else "", item.meaning)


def _distinct(
    one: tasks.TaskSet, world: World, number: int, seed: str, pictures: "Pictures", name: str
) -> Iterable[tuple[Stored, Stored, tuple[Stored, ...]]]:
    """Up to `number` rows with different queries: fewer where there are not so many."""
    seen: set[tuple[str, str]] = set()
    for i in range(50 * number):
        if len(seen) == number:
            return
        row = one.row(world, random.Random(f"{seed}/{i}"))
        query = _stored(row.query, pictures, name)
        if (query.text, query.path) not in seen:
            seen.add((query.text, query.path))
            yield (
                query,
                _stored(row.positive, pictures, name),
                tuple(_stored(item, pictures, name) for item in row.hard_negatives),
            )


def _eval_row(
    query: Stored,
    positive: Stored,
    hard_negatives: tuple,
    pool: list,
    most: int,
    rng: random.Random,
    distinct_meanings: bool = False,
) -> dict:
    """`distinct_meanings`: no two of the candidates that are added mean the same (as two drawings of a dog do)."""
    chosen = [positive, *hard_negatives]
    taken = {(item.text, item.path) for item in chosen}
    means = {positive.meaning, *((item.meaning for item in hard_negatives) if distinct_meanings else ())}
    for item in rng.sample(pool, len(pool)):
        if len(chosen) == most:
            break
        if item.meaning not in means and (item.text, item.path) not in taken:
            chosen.append(item)
            if distinct_meanings:
                means.add(item.meaning)
    return {
        "qry_text": query.text,
        "qry_img_path": query.path,
        "tgt_text": [item.text for item in chosen],
        "tgt_img_path": [item.path for item in chosen],
    }


def _catalogue(world: World, pictures: "Pictures") -> Iterator[dict]:
    """Every concept in every style, with its words: a small picture collection to search in."""
    for concept in world.concepts:
        for style in tasks.STYLES:
            path = pictures.add(drawing.single(world, style, concept), "Emoji")
            yield {"path": path, "label": concept.phrase, "class": concept.subgroup, "style": style}


def _about(spec: tasks.EvalSet, rows: list[dict]) -> dict:
    return {
        "meta_task": tasks.SETS[spec.set].meta_task,
        "domain": spec.domain,
        "about": tasks.SETS[spec.set].about,
        "styles": list(spec.styles or tasks.STYLES[:2]),
        "concepts": spec.concepts,
        "averaged": spec.concepts == "held-out",
        "rows": len(rows),
    }


# --- training --------------------------------------------------------------------------------------------


def write_train(folder: Path, world: World, plan: Plan) -> None:
    """Each set twice: `original` instructions, and the same rows with one of the paraphrases."""
    shared = Pictures(folder / "images.zip", plan.webp) if plan.jsonl else None
    for name in tasks.TRAIN:
        pictures = shared or Pictures(folder / "images_zip" / f"{name}.zip", plan.webp)
        original, diverse = _train_rows(name, world, plan, pictures)
        _write_rows(folder / name / "original", original, plan.jsonl)
        _write_rows(folder / name / "diverse_instruction", diverse, plan.jsonl)
        log.info(f"train {name:16} {len(original):5} rows")
        if shared is None:
            pictures.close()
    if shared is not None:
        shared.close()
    about = {name: {"meta_task": tasks.SETS[name].meta_task, "about": tasks.SETS[name].about} for name in tasks.TRAIN}
    _write_json(folder / "subsets.json", about)


def _train_rows(name: str, world: World, plan: Plan, pictures: "Pictures") -> tuple[list[dict], list[dict]]:
    one = tasks.SETS[name]
    seed = f"{plan.seed}/train/{name}"
    original = [
        _train_row(*row) for row in _distinct(one, world, plan.train_rows, seed, pictures, f"images/{name}/Train")
    ]
    rng = random.Random(f"{seed}/paraphrases")
    return original, [row | {"qry": _paraphrased(one, row["qry"], rng)} for row in original]


def _train_row(query: Stored, positive: Stored, hard_negatives: tuple[Stored, ...]) -> dict:
    row = {
        "qry": query.text,
        "qry_image_path": query.path,
        "pos_text": positive.text,
        "pos_image_path": positive.path,
    }
    if hard_negatives:
        row |= {"neg_text": hard_negatives[0].text, "neg_image_path": hard_negatives[0].path}
    return row


def _paraphrased(one: tasks.TaskSet, text: str, rng: random.Random) -> str:
    return rng.choice(one.instructions).format(tasks.own_part(one.instructions[0], text))


# --- files -----------------------------------------------------------------------------------------------


class Pictures:
    """A zip of pictures, each stored once, under the name that it was first given."""

    def __init__(self, path: Path, webp: bool):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self.webp = webp
        self.names: dict[bytes, str] = {}
        self.counts: dict[str, int] = {}

    def add(self, image: Image.Image, folder: str) -> str:
        """Path of the picture inside the zip."""
        key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if key not in self.names:
            number = self.counts.setdefault(folder, 0)
            self.counts[folder] += 1
            name = f"{folder}/image_{number}.{'webp' if self.webp else 'png'}"
            self.archive.writestr(_entry(name), self._encoded(image))
            self.names[key] = name
        return self.names[key]

    def _encoded(self, image: Image.Image) -> bytes:
        file = io.BytesIO()
        if self.webp:
            image.save(file, "WEBP", quality=68, method=6)
        else:
            image.save(file, "PNG")
        return file.getvalue()

    def close(self) -> None:
        self.archive.close()

    def __enter__(self) -> "Pictures":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _entry(name: str) -> zipfile.ZipInfo:
    """A zip entry without clock or platform in it."""
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.create_system, entry.external_attr = 3, 0o644 << 16
    return entry


def _write_rows(stem: Path, rows: list[dict], jsonl: bool) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    if jsonl:
        lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
        stem.with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")
        return
    import pyarrow
    import pyarrow.parquet

    path = stem.parent / f"{stem.name}-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --- attribution -----------------------------------------------------------------------------------------


def write_attribution(folder: Path, plan: Plan, tarballs: dict[sources.Package, Path]) -> None:
    licences = folder / "licenses"
    licences.mkdir(parents=True, exist_ok=True)
    for name in NOT_IN_PACKAGES:
        shutil.copyfile(LICENCES / name, licences / name)
    for package, name in ((sources.NOTO, "emoji-datasource"), (sources.EMOJIBASE, "emojibase-data")):
        (_, text), *_ = sources.members(tarballs[package], "package/LICENSE", "")  # Twemoji's is Noto's
        (licences / f"{name}.txt").write_bytes(text)
    lines = [_ATTRIBUTION, *(package.credit_row for package in sources.PACKAGES)]
    lines.append(f"\nBuilt with seed {plan.seed}.\n")
    (folder / "ATTRIBUTION.md").write_text("\n".join(lines), encoding="utf-8")


_ATTRIBUTION = """# Where the pictures and words come from

Changes made: drawings were resized, put on plain backgrounds, combined into grids and scenes, cropped, and
encoded again; names were put into instructions, questions and captions. No author endorses this use.

The full licence texts are in `licenses/`: Apache-2.0 (Noto Emoji), MIT (Fluent Emoji, Emojibase, and the
packaging of Noto Emoji and Twemoji). Twemoji drawings: Creative Commons Attribution 4.0 International,
https://creativecommons.org/licenses/by/4.0/legalcode

| work | package | licence |
|---|---|---|"""
