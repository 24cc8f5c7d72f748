"""Tables and folders as people have them: every row is read or reported, or the whole is refused by a sentence."""

import csv
import io
import json
import os
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minivlm2vec.files import sources
from minivlm2vec.files.rows import as_json, plain_rows
from minivlm2vec.files.sources import JsonLines, open_table
from tests.support.files_data import checkpoint, left_behind, read_jsonl, run, save_pictures, write_jsonl

__all__ = ["checkpoint"]


def read(path, part_rows: int = 2) -> list:
    """Every row, by parts that are read in two goes, and checked against the index."""
    table = open_table(path)
    index = table.index(part_rows)
    numbers = range(-(-index.num_rows // part_rows))
    halves = [*table.parts(index, numbers[::2], part_rows), *table.parts(index, numbers[1::2], part_rows)]
    rows = [row for _, rows in sorted(halves, key=lambda part: part[0]) for row in rows]
    assert [row.number for row in rows] == list(range(index.num_rows))
    return rows


@pytest.fixture
def pa():
    pytest.importorskip("pyarrow.parquet")
    return pytest.importorskip("pyarrow")


def values(rows) -> list:
    return [list(row.columns.values()) if row.error is None else None for row in rows]


def embed(source, out, checkpoint, *more):
    code, _, err = run("embed", source, "-o", out, "--model", checkpoint, "--device", "cpu", "--quiet", *more)
    return code, err


# Rows that were read and rows that were reported add up

FIELD = st.text("ab \"',\té写", max_size=6)
# Not behind a quote: there an unclosed one could end, and the file would be another one that is well-formed.
LINES = st.text('ab ",\té\n\r', max_size=8).map(lambda text: re.sub(r"(?<![ab])[\n\r]", "", text))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(FIELD, LINES), max_size=12),
    broken=st.integers(0, 12), end=st.sampled_from(["\n", "\r\n", "\r"]), bom=st.booleans(), size=st.integers(1, 5),
)  # fmt: skip
def test_csv_of_any_writer_with_a_quote_that_is_never_closed(tmp_path_factory, rows, broken, end, bom, size):
    """One line with an unclosed quote is one bad row; all others are what was written."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["one", "two"])
    for n, row in enumerate(rows):
        writer.writerow(row) if n != broken else text.write(f'"x","unclosed{end}')
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.getvalue().encode())
    assert values(read(path, size)) == [list(row) if n != broken else None for n, row in enumerate(rows)]


@settings(max_examples=200, deadline=None)
@given(text=st.text('ab,\t"\n\r', max_size=60), suffix=st.sampled_from([".csv", ".tsv"]), size=st.integers(1, 4))
@example(text='a,b\n1,"open\n2,x\n3,y"z\n4,"', suffix=".csv", size=2)
@example(text='a\tb\n1\t"he said\n2\tshe said"\n', suffix=".tsv", size=1)
def test_every_line_of_any_table_is_of_one_row(tmp_path_factory, text, suffix, size):
    """Each line that is not blank belongs to one row, and a row that was read is made of its lines alone."""
    path = tmp_path_factory.mktemp("any") / f"t{suffix}"
    path.write_bytes(("one,two\n" if suffix == ".csv" else "one\ttwo\n").encode() + text.encode())
    rows = read(path, size)
    lines = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$", path.read_bytes().decode())
    ends = [row.line for row in rows[1:]] + [len(lines) + 1] * bool(rows)
    assert [row.line for row in rows] == sorted({row.line for row in rows})
    assert all(lines[n].strip("\r\n") == "" for n in range(1, rows[0].line - 1 if rows else len(lines)))
    for row, end in zip(rows, ends, strict=True):
        own = lines[row.line - 1 : end - 1]
        if row.error is not None:
            assert not "".join(own[1:]).strip("\r\n"), "no more than one line is given up"
        kept = "".join(row.columns.values())
        assert all(kept.count(c) <= "".join(own).count(c) for c in "ab")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(
    st.dictionaries(st.sampled_from(["text", "n"]), st.one_of(st.none(), st.floats(), st.text(max_size=5)), max_size=2),
    st.sampled_from([b"{", b"[1]", b"\xff", b'{"a": "\\ud800"}', b"x" * 50]),
), max_size=10), st.sampled_from([b"\n", b"\r\n", b"\r"]))  # fmt: skip
def test_jsonl_of_any_line_ends(tmp_path_factory, rows, end):
    path = tmp_path_factory.mktemp("jsonl") / "t.jsonl"
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + end for row in rows))
    found = read(path)
    assert [row.error is None for row in found] == [isinstance(row, dict) for row in rows]
    assert [as_json(r.columns) for r in found if not r.error] == [as_json(r) for r in rows if isinstance(r, dict)]


def test_a_thousand_rows_behind_an_unclosed_quote(checkpoint, tmp_path):
    lines = ["id,text", "1,ok", '2,"unclosed', *(f"{n},row {n}" for n in range(3, 600)), '600,"fine, this"', '601,"a"b']
    (tmp_path / "t.csv").write_text("\n".join(lines))
    code, err = embed(tmp_path / "t.csv", tmp_path / "out.npy", checkpoint)
    assert code == 3 and "line 3 (row): not CSV: " in err
    assert np.isnan(np.load(tmp_path / "out.npy")).any(axis=1).nonzero()[0].tolist() == [1, 600]
    assert [bad["line"] for bad in read_jsonl(tmp_path / "out.npy.errors.jsonl")] == [3, 602]


def test_quotes_of_tsv_are_literal_unless_they_quote(tmp_path):
    text = 'id\ttext\n1\t"hello\n2\tworld"\n3\t"a ""b"""\n4\t"two\nlines"\n5\t5" disk\n6\t"x" y\n7\t"open\n\n8\tend'
    (tmp_path / "t.tsv").write_text(text)
    found = [row.columns["text"] for row in read(tmp_path / "t.tsv")]
    assert found == ['"hello', 'world"', 'a "b"', "two\nlines", '5" disk', '"x" y', '"open', "end"]


def test_a_quote_that_joins_lines_to_no_row_gives_up_one_line(tmp_path):
    (tmp_path / "t.csv").write_text('a,b\n1,"open\n2,x\n3,", y"\n4,"two\nlines"\n')
    bad, *good = read(tmp_path / "t.csv")
    assert bad.error == ("not CSV: a quote that is opened here is closed in line 4, and makes 3 fields where the "
                         "header has 2")  # fmt: skip
    assert values(good) == [["2", "x"], ["3", ", y"], ["4", "two\nlines"]]


def test_a_line_that_is_too_long_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE", 1000)
    for name, long in (("t.jsonl", '{"text": "' + "x" * 3000 + '"}'), ("t.csv", "x" * 3000), ("t.tsv", "x" * 3000)):
        first, last = ("text", "a") if name != "t.jsonl" else ('{"text": "a"}', '{"text": "b"}')
        (tmp_path / name).write_text(f"{first}\n{long}\n{last}\n")
        rows = read(tmp_path / name)
        assert [r.error for r in rows if r.error] and "longer than 1,000 bytes" in next(
            r.error for r in rows if r.error
        )
        assert rows[-1].error is None and len(rows) == (3 if name == "t.jsonl" else 2)


# What a table is not


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [("t.csv", "text,price\na cat,1\n".encode("utf-16"), "is in UTF-16"),
     ("t.csv", "text,price\na cat,1\n".encode("utf-16-be"), "is in UTF-16"),
     ("t.jsonl", '{"text": "a"}\n'.encode("utf-16"), "is in UTF-16"), ("t.csv", "text".encode("utf-32"), "in UTF-32"),
     ("t.csv", b"PK\x03\x04rest", "a zip, as .xlsx is"), ("t.jsonl", b"\x1f\x8b\x08rest", "compressed"),
     ("t.csv", b"text,gr\xf6\xdfe\na,1\n", "the name of column 2 is not in UTF-8 (in Latin-1 it is 'größe')"),
     ("t.csv", b"text,a,,\na cat,1,,\n", "columns 3, 4 without a name"),
     ("t.csv", b"text,a,a\x1b,a,a\x1b\n", "names a column twice: a, a\\x1b"),
     ("t.csv", b'"text,b\na,1\n', "the header, line 1, is not CSV")],
)  # fmt: skip
def test_other_encodings_and_headers_are_named(checkpoint, tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    code, err = embed(tmp_path / name, tmp_path / "out.npy", checkpoint)
    assert code == 1 and words in err and "\x1b" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize(
    ("name", "header", "words"),
    [("t.csv", "text;image", "has text;image. Is ';' what parts its fields? A .csv has commas there"),
     ("t.csv", "text\timage", "Is '\\t' what parts"), ("t.tsv", "text,image", "Is ',' what parts"),
     ("t.csv", "sep=,\ntext,image", "Its first line is a note for Excel: remove it")],
)  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--text-column", "text"]])
def test_another_delimiter_is_guessed(checkpoint, tmp_path, name, header, words, more):
    (tmp_path / name).write_text(f"{header}\na,b.png\n")
    code, err = embed(tmp_path / name, tmp_path / "out.npy", checkpoint, *more)
    assert code == 1 and words in err, err


@pytest.mark.parametrize(("name", "data"), [("t.csv", ""), ("t.tsv", "text\n"), ("t.jsonl", "\n")])
def test_a_table_without_rows_is_told(checkpoint, tmp_path, name, data):
    (tmp_path / name).write_text(data)
    code, err = embed(tmp_path / name, tmp_path / "out.npy", checkpoint)
    assert code == 0 and f"{name} has no rows: {tmp_path / 'out.npy'} holds no vector" in err, err


def test_addresses_in_a_table_are_no_paths(checkpoint, tmp_path):
    urls = ["file:///tmp/x.png", "s3://b/x.png", "HTTPS://x/y.png"]
    source = write_jsonl(tmp_path / "t.jsonl", [{"image": url} for url in urls])
    assert embed(source, tmp_path / "out.npy", checkpoint)[0] == 3
    bad = read_jsonl(tmp_path / "out.npy.errors.jsonl")
    assert [b["name"] for b in bad] == urls and all("is a URL; only files are read" in b["reason"] for b in bad)


def test_one_column_without_a_name_is_that_of_pandas(tmp_path):
    (tmp_path / "t.csv").write_text(",text\n0,a\n")
    assert read(tmp_path / "t.csv")[0].columns == {"": "0", "text": "a"}


def test_a_pipe_is_no_table(checkpoint, tmp_path):
    os.mkfifo(tmp_path / "t.jsonl")
    code, err = embed(tmp_path / "t.jsonl", tmp_path / "out.npy", checkpoint)
    assert code == 1 and "neither a folder nor an ordinary file" in err


def test_a_text_of_50_mb_is_a_row(checkpoint, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a" * 50_000_000}) + '\n{"text": "b"}\n')
    code, err = embed(tmp_path / "t.jsonl", tmp_path / "out.npy", checkpoint)
    assert code == 3 and "50,000,000 characters are more than the" in err
    code, err = embed(tmp_path / "t.jsonl", tmp_path / "cut.npy", checkpoint, "--max-length", 20)
    assert code == 0, err


# Parquet


def bad_strings(pa, *values: bytes):
    raw = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(values), raw.buffers()[1], raw.buffers()[2])


def test_values_that_python_cannot_hold(checkpoint, tmp_path, pa):
    far, far_list = pa.array([0, 3_000_000], pa.date32()), pa.array([None, [3_000_000]], pa.list_(pa.date32()))
    table = pa.table({
        "text": ["a", "b"], "far": far, "list": far_list, "deep": pa.StructArray.from_arrays([far], ["d"]),
        "index": far.dictionary_encode(), "map": pa.array([[], [("k", 3_000_000)]], pa.map_(pa.string(), pa.date32())),
        "seconds": pa.array([0, 10**18], pa.duration("s")), "note": bad_strings(pa, b"ok", b"caf\xe9"),
        "price": [1.5, float("nan")],
    })  # fmt: skip
    expected = {
        "text": "b", "far": "10183-09-21", "list": ["10183-09-21"], "deep": {"d": "10183-09-21"},
        "index": "10183-09-21", "map": [{"key": "k", "value": "10183-09-21"}], "seconds": "1000000000000000000",
        "note": "caf\udce9", "price": None,
    }  # fmt: skip
    assert json.loads(as_json(plain_rows(table)[1])) == expected
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    for suffix in (".npy", ".parquet"):
        code, err = embed(tmp_path / "t.parquet", tmp_path / f"out{suffix}", checkpoint)
        assert code == 0, err
        code, out, err = run("search", tmp_path / f"out{suffix}", "--text", "b", "--device", "cpu", "--json")
        hits = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["hits"]
        assert code == 0 and [hit["columns"] for hit in hits if hit["row"] == 1] == [expected]
    assert pa.parquet.read_table(tmp_path / "out.parquet")["far"].cast(pa.int32()).to_pylist() == [0, 3_000_000]


def test_one_bad_byte_in_the_texts_is_a_row(checkpoint, tmp_path, pa):
    pa.parquet.write_table(pa.table({"text": bad_strings(pa, b"ok", b"caf\xe9", b"ok")}), tmp_path / "t.parquet")
    code, err = embed(tmp_path / "t.parquet", tmp_path / "out.npy", checkpoint)
    assert code == 3 and [bad["row"] for bad in read_jsonl(tmp_path / "out.npy.errors.jsonl")] == [1], err


def test_a_folder_of_parquet_is_one_table(checkpoint, tmp_path, pa):
    folder, save = tmp_path / "items.parquet", pa.parquet.write_table
    (folder / "deeper").mkdir(parents=True)
    save_pictures(folder, ["deeper/0.picture.png"])
    (folder / "deeper/0.picture.png").rename(folder / "deeper/0.picture")
    save(pa.table({"text": ["a", "b"], "n": [1, 2]}), folder / "1.parquet", row_group_size=1)
    save(pa.table({"n": pa.array([3], pa.int32()), "text": pa.array(["c"], pa.large_string())}), folder / "2.parquet")
    save(pa.table({"text": ["d"], "image": ["deeper/0.picture"]}), folder / "deeper/3.parquet")
    (folder / "_SUCCESS").write_text("")
    (folder / "_metadata.parquet").write_text("no rows are in here")
    for part_rows in (1, 3, 100):
        out = tmp_path / f"{part_rows}.parquet"
        code, err = embed(folder, out, checkpoint, "--part-rows", part_rows)
        assert code == 0 and "3 Parquet files; 3 other files left out" in err, err
        got = pa.parquet.read_table(out)
        assert got["text"].to_pylist() == list("abcd") and got["n"].to_pylist() == [1, 2, 3, None]
        assert got["image"].to_pylist() == [None] * 3 + ["deeper/0.picture"]
    assert "finished already" in embed(folder, out, checkpoint, "--part-rows", 100)[1]
    save(pa.table({"text": [1.5], "n": ["x"]}), folder / "9.parquet")
    code, err = embed(folder, tmp_path / "other.npy", checkpoint)
    assert code == 1 and "9.parquet has other columns than" in err
    (folder / "9.parquet").unlink()
    (folder / "colour=red").mkdir()
    (folder / "1.parquet").rename(folder / "colour=red/1.parquet")
    code, err = embed(folder, tmp_path / "hive.npy", checkpoint)
    assert code == 1 and "partitioned by names of folders (colour=red/1.parquet)" in err


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [([1, 2**53 + 1], [2.5, 3.5], "1.parquet: its column 'x' is int64, and double in "), ([1, 2**53], [2.5, 3.5], None),
     ([2.5, 3.5], [1, -(2**60) - 1], "2.parquet: its column 'x' is int64, and double in ")],
)  # fmt: skip
def test_values_that_files_of_a_folder_cannot_share_are_named(checkpoint, tmp_path, pa, monkeypatch, one, other, words):
    folder = tmp_path / "items"
    folder.mkdir()
    for number, values in enumerate((one, other), 1):
        pa.parquet.write_table(pa.table({"text": ["a", "b"], "x": values}), folder / f"{number}.parquet")
    if words is not None:
        monkeypatch.setattr("minivlm2vec.files.embedding.compute", None)
    code, err = embed(folder, tmp_path / "out.npy", checkpoint)
    if words is None:
        assert code == 0 and [row["x"] for row in read_jsonl(tmp_path / "out.npy.rows.jsonl")] == [1, 2**53, 2.5, 3.5]
    else:
        assert code == 1 and words in err and "ArrowInvalid" not in err and not left_behind(tmp_path), err


@pytest.mark.parametrize(
    ("ids", "stored"),
    [([2**53 + 1, 1.5], ["9007199254740993", "1.5"]), ([1.5, 2**53, 2**53 + 1], ["1.5", "9007199254740992",
     "9007199254740993"]), ([1, 2**53 + 1, None], [1, 2**53 + 1, None]), ([2**53, 1.5], [2.0**53, 1.5]),
     ([2**53 + 1, 1, 1.5], ["9007199254740993", "1", "1.5"]), ([-(2**63), 2], [-(2**63), 2]),
     ([2**63, 2], ["9223372036854775808", "2"])],
)  # fmt: skip
def test_integers_beside_floats_stay_what_they_are(tmp_path, pa, ids, stored):
    source = JsonLines(write_jsonl(tmp_path / "t.jsonl", [{"id": i} for i in ids]))
    index = source.index(2)
    tables = source.arrow_tables(index, range(-(-len(ids) // 2)), 2)
    assert [v for table in tables for v in table["id"].to_pylist()] == stored


# Folders


def test_a_folder_without_a_picture_names_what_is_there(checkpoint, tmp_path):
    folder = tmp_path / "iphone"
    folder.mkdir()
    for name in ("1.HEIC", "2.heic", "README", "x.\x1bz"):
        (folder / name).write_text("x")
    code, err = embed(folder, tmp_path / "out.npy", checkpoint)
    assert code == 1 and "2 .heic, 1 " in err and "without an ending" in err and "\\x1bz" in err and "\x1b" not in err


def test_names_that_are_not_utf8_are_rows(checkpoint, tmp_path):
    save_pictures(tmp_path / "ph", ["ok.png", "x.png"])
    os.rename(tmp_path / "ph/x.png", os.fsencode(tmp_path / "ph") + b"/Mu\xf1oz.png")
    code, err = embed(tmp_path / "ph", tmp_path / "out.npy", checkpoint)
    assert code == 3 and "the file's name is not in UTF-8" in err and "Mu\\udcf1oz" in err
    assert np.isnan(np.load(tmp_path / "out.npy")).any(axis=1).tolist() == [True, False]


def test_a_folder_that_cannot_be_read_is_told(checkpoint, tmp_path, monkeypatch):
    save_pictures(tmp_path / "ph", ["a.png", "lost+found/b.png"])
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)  # permissions do not bind root, who may run this
    code, err = embed(tmp_path / "ph", tmp_path / "out.npy", checkpoint)
    assert code == 0 and "left out, as it cannot be read: lost+found: Permission denied" in err
    assert np.load(tmp_path / "out.npy").shape[0] == 1
    monkeypatch.setattr(os, "scandir", lambda path: refused("lost+found"))
    code, err = embed(tmp_path / "ph", tmp_path / "none.npy", checkpoint)
    assert code == 1 and "Permission denied" in err and not left_behind(tmp_path)


# What is told before anything is computed


@pytest.mark.parametrize(
    ("source", "out", "more", "words"),
    [("t.jsonl", "s3://bucket/v.npy", [], "-o s3://bucket/v.npy is an address"),
     ("gs://bucket/t.jsonl", "out.npy", [], "--source gs://bucket/t.jsonl is an address"),
     ("t.jsonl", "out.npy", ["--image-root", "nowhere"], "--image-root nowhere is no folder"),
     ("t.jsonl", "t.jsonl", ["--overwrite"], "OUT ends in"),
     ("t.npy.rows.jsonl", "t.npy", ["--overwrite"], "t.npy would be written over the source")],
)  # fmt: skip
def test_places_are_checked(checkpoint, tmp_path, monkeypatch, source, out, more, words):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / source, [{"text": "a"}]) if "//" not in source else None
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    code, err = embed(source, out, checkpoint, *more)
    assert code == 1 and words in err and {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_source_is_not_written_over(checkpoint, tmp_path, pa):
    pa.parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    code, err = embed(tmp_path / "t.parquet", tmp_path / "t.parquet", checkpoint, "--overwrite")
    assert code == 1 and "would be written over the source" in err


def test_a_link_stays_and_leads_to_the_file(checkpoint, tmp_path):
    source = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b"}])
    (tmp_path / "big").mkdir()
    (tmp_path / "link.npy").symlink_to("big/real.npy")
    code, err = embed(source, tmp_path / "link.npy", checkpoint)
    assert code == 0 and (tmp_path / "link.npy").is_symlink() and np.load(tmp_path / "big/real.npy").shape[0] == 2, err
    code, out, _ = run("search", tmp_path / "link.npy", "--text", "b", "--instruction", "", "--device", "cpu", "--json")
    assert code == 0 and json.loads(out)["hits"][0]["columns"] == {"text": "b"}
