"""Rows of data in MMEB's formats, as evaluation and training read them: files of rows, pairs of text and image, and
where the images are.
"""

import json
import lzma
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from .extras import import_pyarrow
from .images import open_image, to_rgb

MINI = Path(__file__).parent / "mini" / "data"  # the sets that ship with the package: MMEB-eval/ and MMEB-train/


class Pair(NamedTuple):
    """One input: a text and the path of an image. Without an image, <|image_1|> in the text is ordinary text."""

    text: str
    image: str  # path inside the image folder or zip, "" for none


class HasPictures(Protocol):
    """Where the pictures of rows come from."""

    def source(self, path: str, /) -> Any: ...


def as_input(pair: Pair, images: HasPictures) -> str | dict[str, Any]:
    """What `Processor.plan` and `encode` take for it. A text that names <|image_1|> without an image stays as it is."""
    return {"text": pair.text, "image": images.source(pair.image)} if pair.image else pair.text


class Images:
    """Pictures by relative path, in a folder or, read in place, in a zip.

    The paths in the rows may lack a folder at the top of the place (the published zip has been unpacked to
    `images/` by some scripts and not by others); it is found by the first path that needs it.
    """

    def __init__(self, place: Path):
        if not place.exists():
            raise FileNotFoundError(f"image folder or zip {place} does not exist")
        self.place = place
        self.archive = zipfile.ZipFile(place) if zipfile.is_zipfile(place) else None
        if self.archive is None and not place.is_dir():
            raise ValueError(f"{place} is neither a folder nor a zip")
        self.prefix: str | None = None  # not known before the first picture is found
        self._checked: dict[str, int] = {}  # 1: it is there; 2: it can be decoded

    def source(self, path: str) -> Path | bytes:
        """The picture as the embedder takes it. ValueError where the zip is damaged there."""
        found = self._find(path)
        if self.archive is None:
            return self.place / found
        try:
            return self.archive.read(found)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError) as error:
            raise ValueError(f"{found} in {self.place} cannot be read: {error}") from None

    def stamp(self, path: str) -> int:
        """A number that changes with the picture: its CRC in a zip, its size in a folder."""
        found = self._find(path)
        return self.archive.getinfo(found).CRC if self.archive else (self.place / found).stat().st_size

    def check(self, path: str, *, thoroughly: bool = False) -> None:
        """FileNotFoundError where it is missing; thoroughly: ValueError where it cannot be decoded."""
        if self._checked.get(path, False) < (thoroughly + 1):
            found = self._find(path)
            if thoroughly:
                to_rgb(open_image(self.source(path), name=found), name=found)
            self._checked[path] = thoroughly + 1

    def _find(self, path: str) -> str:
        parts = PurePosixPath(path).parts
        if path.startswith("/") or ".." in parts:
            raise ValueError(f"image path {path!r} leaves the image folder")
        plain = "/".join(parts)
        prefixes = ("", *self._top_folders(plain)) if self.prefix is None else (self.prefix,)
        for prefix in prefixes:
            if self._has(prefix + plain):
                self.prefix = prefix
                return prefix + plain
        raise FileNotFoundError(f"image {path} is not in {self.place}")

    def _has(self, name: str) -> bool:
        return name in self.archive.NameToInfo if self.archive else (self.place / name).is_file()

    def _top_folders(self, path: str) -> list[str]:
        if self.archive:
            return [name[: -len(path)] for name in self.archive.NameToInfo if name.endswith("/" + path)]
        return [f"{folder.name}/" for folder in sorted(self.place.iterdir()) if folder.is_dir()]


def row_files(folder: Path, beginning: str) -> list[Path]:
    """The files of rows in a folder whose names begin so, in order."""
    return sorted((*folder.glob(f"{beginning}*.parquet"), *folder.glob(f"{beginning}*.jsonl")))


def read_rows(path: Path) -> Iterator[Any]:
    """The rows of a file of JSON lines or of Parquet, as its name says; errors as of those below."""
    return read_jsonl(path) if path.suffix == ".jsonl" else read_parquet(path)


def read_jsonl(path: Path) -> Iterator[Any]:
    """The values of a file of JSON lines. Raises ValueError naming the line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file. Raises ValueError where it cannot be read."""
    pyarrow = import_pyarrow("to read Parquet")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for batch in file.iter_batches(64):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None


def check_columns(row: Any, columns: Iterable[str]) -> None:
    """Raises ValueError where a value that was read is no row, or lacks one of the columns."""
    if not isinstance(row, dict):
        raise ValueError(f"a row is a JSON object, got {type(row).__name__}")
    for name in columns:
        if name not in row:
            raise ValueError(f"column {name} is missing; there are {', '.join(row)}")


def make_pair(text: Any, path: Any, what: str) -> Pair:
    """The pair of a row's two values; no path (None) means no image. Raises ValueError, naming `what`, where they are
    no strings, or both empty."""
    path = "" if path is None else path
    if not isinstance(text, str) or not isinstance(path, str):
        raise ValueError(f"{what}: text and image path are strings, got {type(text).__name__}, {type(path).__name__}")
    if not text and not path:
        raise ValueError(f"{what} has neither text nor image")
    return Pair(text, path)
