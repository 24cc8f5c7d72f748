"""What is published: the sdist with its tests, the wheel made from it, and what they say about themselves."""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import minivlm2vec

ROOT = Path(__file__).parents[1]
LICENSES = {
    "LICENSE",
    "ATTRIBUTION.md",
    "CC-BY-4.0.txt",
    "emoji-datasource.txt",
    "emojibase-data.txt",
    "fluent-emoji.txt",
}


def python(*args: str, cwd: Path = ROOT) -> str:
    out = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, encoding="utf-8")
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with an sdist, and the wheel that was built from it."""
    pytest.importorskip("build", reason="needs the packages of the extra `test`")
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT))
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(*built.glob("*.whl")) as f:
        yield f


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory) -> Path:
    """The folder that lies in the sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(*built.glob("*.tar.gz")) as f:
        names = f.getnames()
        assert all(not n.startswith("/") and ".." not in n.split("/") for n in names)
        f.extractall(folder)
    (root,) = folder.iterdir()
    return root


def test_the_wheel_has_all_that_the_package_reads(wheel):
    names = set(wheel.namelist())
    for name in (
        "minivlm2vec/py.typed",
        "minivlm2vec_kernels/py.typed",
        "minivlm2vec/html.css",
        "minivlm2vec/files/page.js",
        "minivlm2vec/mini/demo/page.css",
        "minivlm2vec/mini/checkpoint/model.safetensors",
        "minivlm2vec/mini/data/MMEB-eval/images.zip",
    ):
        assert name in names, name
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "minivlm2vec").rglob("*.py")}
    assert {Path(n).as_posix() for n in sources} <= names


def test_the_wheel_has_nothing_else(wheel):
    (info,) = {n.split("/")[0] for n in wheel.namelist() if ".dist-info/" in n}
    assert {n.split("/")[0] for n in wheel.namelist()} == {"minivlm2vec", "minivlm2vec_kernels", info}


def test_no_file_is_in_the_wheel_twice(wheel):
    """But for empty ones, and for licences, which are in the metadata too."""
    files = [i for i in wheel.infolist() if i.file_size and ".dist-info/" not in i.filename]
    sums = {}
    for i in files:
        sums.setdefault((i.CRC, i.file_size), []).append(i.filename)
    assert not [names for names in sums.values() if len(names) > 1]


def test_what_the_wheel_says_about_itself(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    said = email.message_from_bytes(wheel.read(name))
    assert said["Version"] == minivlm2vec.__version__
    assert said["License-Expression"] == "Apache-2.0 AND CC-BY-4.0 AND MIT"
    assert sorted(Path(f).name for f in said.get_all("License-File")) == sorted(LICENSES)
    assert said["Author"] and said.get_all("Project-URL")
    pythons = {c.split(" :: ")[-1] for c in said.get_all("Classifier") if c.startswith("Programming Language")}
    assert {"3.10", "3.11", "3.12", "3.13", "3.14"} <= pythons
    packed = {n.split("/licenses/", 1)[1] for n in wheel.namelist() if ".dist-info/licenses/" in n}
    assert {Path(n).name for n in packed} == LICENSES


def test_the_sdist_has_its_tests(unpacked):
    tracked = {p.relative_to(ROOT) for p in (ROOT / "tests").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    missing = [str(p) for p in tracked if not (unpacked / p).exists()]
    assert not missing
    for name in (
        "bench/README.md",
        "docs/parity.md",
        "CHANGELOG.md",
        "minivlm2vec/mini/data/licenses/Apache-2.0.txt",
        "kernels/minivlm2vec_kernels/ops.py",
    ):
        assert (unpacked / name).exists(), name
    assert not (unpacked / "kernels" / "__init__.py").exists()


def test_the_tests_of_the_sdist_can_be_collected(unpacked):
    """Two folders: one with fixtures and one with kernels, in a fresh process that sees nothing but the sdist."""
    out = python("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/core", "tests/kernels", cwd=unpacked)  # fmt: skip  # noqa: E501
    assert "tests/core/" in out and "tests/kernels/" in out


def test_the_index_would_take_them(built):
    pytest.importorskip("twine")
    python("-m", "twine", "check", "--strict", *map(str, built.iterdir()))


def test_nothing_is_odd_in_the_wheel(built):
    pytest.importorskip("check_wheel_contents")
    python("-m", "check_wheel_contents", *map(str, built.glob("*.whl")))


def test_links_of_the_readme_work_on_an_index():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [part.split(")")[0] for part in text.split("](")[1:]]
    assert targets and all(t.startswith("https://") for t in targets), targets


def test_the_constraints_pin_what_the_core_needs_within_its_ranges():
    """README's commands install through them, so that they do the same every day."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if not x.startswith("#")]
    pins = {r.name.lower().replace("_", "-"): str(r.specifier) for r in map(Requirement, lines)}
    assert all(s.startswith("==") and "+" not in s for s in pins.values())
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (block,) = re.findall(r"^dependencies = \[\n(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert "triton" not in pins, "torch asks for one of its own"
    for requirement in map(Requirement, re.findall(r'"(.*)",', block)):
        if requirement.name == "triton":
            continue
        assert Version(pins[requirement.name][2:]) in requirement.specifier, requirement
    commands = re.findall(r"^python3 -m venv .*", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 2 and all("pip install -c constraints.txt" in c for c in commands)
