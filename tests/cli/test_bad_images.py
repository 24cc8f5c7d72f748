"""One image that nothing can read, through every command: it is named, and the others go on."""

import io
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivlm2vec import Embedder, InputError
from minivlm2vec.rows import Images, Pair
from minivlm2vec.train.pictures import draw_sheet
from tests.support.files_data import checkpoint, read_jsonl, run
from tests.support.fuzz_images import broken_avif
from tests.support.golden import synth_image

__all__ = ["checkpoint"]


def in_format(format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(synth_image(60, 50, 2)).save(file, format)
    return file.getvalue()


BAD = {
    "zeros in an AVIF": (broken_avif, "cannot be decoded"),
    "half a PNG": (lambda: in_format("PNG")[:1500], "cannot be decoded"),
    "PostScript": (lambda: in_format("EPS"), "it begins as EPS"),
    "FITS": (lambda: b"SIMPLE  =                    T".ljust(2880), "it begins as FITS"),
    "HEIC": (lambda: b"\0\0\0\x14ftypheic\0\0\0\0mif1", "pillow-heif"),
    "tiny tiles": (lambda: b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 324, 4, 10**6, 0) + bytes(4), "pieces"),
}


@pytest.fixture(params=BAD)
def photos(request, tmp_path, monkeypatch) -> tuple[Path, str]:
    """Four photos, of which 2.png is none, and what is to be said of it."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    make, reason = BAD[request.param]
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(4):
        Image.fromarray(synth_image(60 + n, 50, n)).save(folder / f"{n}.png")
    (folder / "2.png").write_bytes(make())
    return folder, reason


def test_encode_gives_index_and_name(photos, checkpoint):
    folder, reason = photos
    e = Embedder.from_pretrained(checkpoint, device="cpu", show_progress=False)
    data = (folder / "2.png").read_bytes()
    for source, name in ((folder / "2.png", str(folder / "2.png")), (data, f"{len(data)} bytes")):
        with pytest.raises(InputError, match=reason) as error:
            e.encode(["a", {"image": folder / "0.png"}, {"text": "b", "image": source}, "c"])
        assert (error.value.index, error.value.name) == (2, name)


def test_encode_names_an_image_that_was_closed(checkpoint, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        pass
    e = Embedder.from_pretrained(checkpoint, device="cpu", show_progress=False)
    with pytest.raises(InputError, match="it was closed before") as error:
        e.encode(["a", {"image": image}])
    assert error.value.index == 1 and error.value.name.endswith("x.png")


def test_embed_has_one_bad_row_and_search_shows_why(photos, checkpoint, tmp_path):
    folder, reason = photos
    out = tmp_path / "out.npy"
    code, _, err = run("embed", folder, "-o", out, "--model", checkpoint, "--device", "cpu", "--quiet")
    assert code == 3, err
    (bad,) = read_jsonl(tmp_path / "out.npy.errors.jsonl")
    assert bad["row"] == 2 and bad["name"].endswith("2.png") and reason in bad["reason"]
    assert np.isnan(np.load(out)).all(axis=1).tolist() == [False, False, True, False]
    assert run("search", out, "--html", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 3 and reason in page


def test_mmeb_leaves_out_the_rows_that_need_it(photos, checkpoint, tmp_path):
    pytest.importorskip("pyarrow")
    folder, reason = photos
    row = {"qry_text": "<|image_1|>\nq\n", "tgt_text": ["a", "b"], "tgt_img_path": ["", ""]}
    rows = [row | {"qry_img_path": f"{n}.png"} for n in range(4)]
    (folder / "Mine").mkdir()
    (folder / "Mine/test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = ["mmeb", "--model", checkpoint, "--data", folder, "-o", tmp_path / "out", "--device", "cpu"]
    code, _, err = run(*command)
    assert code == 1 and "2.png" in err and reason in err
    code, out, err = run(*command, "--skip-damaged", "--allow-collapsed")
    assert code == 0, err
    out = " ".join(out.split())  # the table breaks its lines
    assert "damaged rows left out" in out and "Mine, row 2: 2.png: " in out and reason in out


def test_train_check_names_the_row(photos, tmp_path):
    pytest.importorskip("pyarrow")
    folder, reason = photos
    rows = [{"qry": "q", "qry_image_path": f"{n}.png", "pos_text": "p", "pos_image_path": ""} for n in range(4)]
    (folder / "Mine").mkdir()
    (folder / "Mine/original.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = tmp_path / "c.toml"
    config.write_text(f'model = "none/there"\nout = "o"\n[data]\nroot = "{folder}"\n[optim]\nbatch_size = 2\n')
    code, _, err = run("train", config, "--check")
    assert code == 1 and "1 rows cannot be used" in err and "Mine, row 2: 2.png: " in err and reason in err


def test_a_line_of_a_picture_is_drawn_while_training(tmp_path):
    Image.new("RGB", (600, 1), "red").save(tmp_path / "line.png")
    sheet = draw_sheet([(Pair("a line", "line.png"), Images(tmp_path))], [[]])
    assert (np.asarray(sheet) == (255, 0, 0)).all(axis=2).sum() >= 150
