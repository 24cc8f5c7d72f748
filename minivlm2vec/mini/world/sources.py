"""The npm packages that mini-MMEB is drawn from: names, versions, checksums, licences, fetching.

Packages are fetched by npm itself (so the user's registry and proxy settings hold) and read without being
unpacked. A tarball whose SHA-512 is not the pinned one is refused.
"""

import base64
import hashlib
import logging
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    integrity: str  # npm's own form: "sha512-" + base64
    licence: str
    credit: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def credit_row(self) -> str:
        """Of a table: work, package, licence."""
        return f"| {self.credit} | npm `{self.spec}` | {self.licence} |"

    @property
    def filename(self) -> str:
        """The name `npm pack` gives the tarball."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


NOTO = Package(
    "emoji-datasource-google",
    "16.0.0",
    "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    "Apache-2.0 (drawings), MIT (packaging)",
    "Noto Emoji v2.048, Copyright Google LLC; packaged by Cal Henderson",
)
TWEMOJI = Package(
    "emoji-datasource-twitter",
    "16.0.0",
    "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
    "CC BY 4.0 (drawings), MIT (packaging)",
    "Twemoji v16.0.1, Copyright Twitter, Inc and other contributors; packaged by Cal Henderson",
)
FLUENT = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    "MIT",
    "Fluent Emoji, Copyright Microsoft Corporation; packaged by LobeHub",
)
EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "MIT",
    "Emojibase (names, tags, groups), Copyright Miles Johnson",
)
PACKAGES = (NOTO, TWEMOJI, FLUENT, EMOJIBASE)
NOTO_V1 = Package(
    "@iconify-json/noto-v1",
    "1.2.2",
    "sha512-DJ2GjmrPtztncsNbgPaYBRW8e3Y6TFxIdEp6XmtvpcTc11EcwVXikeNazCV26zCHFtO/UkyBaGHn9IxEA2ihtA==",
    "Apache-2.0",
    "Noto Emoji v1, Copyright Google LLC; packaged by Iconify",
)
FXEMOJI = Package(
    "@iconify-json/fxemoji",
    "1.2.2",
    "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    "Apache-2.0",
    "Firefox OS Emoji, Copyright Mozilla; packaged by Iconify",
)
EMOJIONE = Package(
    "@iconify-json/emojione",
    "1.2.3",
    "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    "CC BY 4.0",
    "EmojiOne v2, Copyright EmojiOne; packaged by Iconify",
)
MORE_STYLES = (NOTO_V1, FXEMOJI, EMOJIONE)  # for training alone, where it asks for them


def fetch(folder: Path, packages: Sequence[Package] = PACKAGES) -> dict[Package, Path]:
    """Tarball of every package in `folder`, fetched through npm where it is not there yet (then logged), each verified.

    Raises RuntimeError where npm is missing or fails, ValueError where a checksum differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tarballs = {}
    for package in packages:
        path = folder / package.filename
        if not path.exists():
            log.info(f"npm pack {package.spec}")
            _npm_pack(package, folder)
        verify(package, path)
        tarballs[package] = path
    return tarballs


def verify(package: Package, path: Path) -> None:
    """Raises ValueError, naming both sums, unless the tarball is the pinned one."""
    digest = hashlib.sha512()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = "sha512-" + base64.b64encode(digest.digest()).decode()
    if found != package.integrity:
        raise ValueError(f"{path}: checksum {found}, but {package.spec} has {package.integrity}")


def members(tarball: Path, prefix: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(name after `prefix`, content) of each regular file `prefix*suffix`, in the tarball's order."""
    with tarfile.open(tarball) as archive:
        for member in archive:
            if member.isfile() and member.name.startswith(prefix) and member.name.endswith(suffix):
                file = archive.extractfile(member)
                assert file is not None, "of a regular file"
                yield member.name[len(prefix) :], file.read()


def _npm_pack(package: Package, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"npm is not installed; install it, or put {package.filename} into {folder}")
    command = [npm, "pack", package.spec, "--pack-destination", str(folder), "--silent"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not (folder / package.filename).exists():
        raise RuntimeError(f"npm pack {package.spec} failed ({done.returncode}): {done.stderr.strip()[-500:]}")
