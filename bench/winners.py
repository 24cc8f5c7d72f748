"""The fastest settings of a sweep, and their way into the source.

    python -m bench.winners find     # the latest bench/results/<gpu>-sweep.csv -> bench/results/winners.json
    python -m bench.winners apply    # winners.json -> the settings tables of kernels/minivlm2vec_kernels
    python -m bench.winners apply --dry-run

A table's row serves many shapes: the setting wins that is fastest over all of them (the least geometric mean of its
time by the best one's) among those that were right in each, where it beats the setting in use by 2 %. `apply` compiles
what each winner changes, for every card, and leaves out by name what spills, wants too much shared memory or does not
compile. After it: python -m tests.kernels.aot --write, the tests, and the benches again.
"""

import argparse
import ast
import csv
import json
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench import common

KERNELS = Path(__file__).parents[1] / "kernels" / "minivlm2vec_kernels"
WINNERS = "winners.json"
COLUMNS = {"date", "kernel", "case", "dtype", "provider", "ms"}  # of a sweep, that are read here
GAIN = 1.02  # below, the setting in use stays


class Place(NamedTuple):
    """A row of a settings table, as Python writes it: launch, ROW_SETTINGS[4096]."""

    file: str
    row: str

    def __str__(self) -> str:
        return f"{self.file}.{self.row}"


BY_ROWS = r"B[MFRO](\d+) w(\d+)", "({}, {})"  # a provider's name, and the row's value
BY_WARPS = r"w(\d+)", "{}"
TABLES = {  # kernel of the sweep -> the row, and how its providers are read; attention's rows depend on the case
    "add_rms_norm": [(Place("launch", "ROW_SETTINGS[4096]"), *BY_ROWS)],
    "add_rms_norm_backward": [(Place("rms_norm_triton", "BACKWARD_SETTINGS[4096]"), *BY_ROWS)],
    "add_layer_norm": [(Place("launch", "ROW_SETTINGS[1024]"), *BY_ROWS)],
    "quantize_rows": [(Place("launch", "ROW_SETTINGS[8192]"), *BY_ROWS)],
    **{
        name: [(Place("activation_triton", f"SETTINGS['{name}']"), *BY_ROWS)]
        for name in ("silu_mul", "quick_gelu", "silu_mul_backward")
    },
    "rope": [(Place("rope_triton", "SETTINGS[16384]"), *BY_WARPS)],
    "merge_crops": [(Place("merge_crops_triton", "SETTINGS[4096]"), *BY_ROWS)],
    "pool_last_token": [(Place("pooling_triton", "SETTINGS[8192]"), *BY_WARPS)],
    "image_patches": [(Place("image_patches_triton", "SETTINGS['image_patches']"), *BY_ROWS)],
    **{
        f"linear_{name}": [
            (
                Place("linear_triton", f"CANDIDATES['{name}', '{path}']"),
                rf"{path} (\d+)x(\d+)x(\d+) w(\d+) s(\d+) r(\d+)",
                "Tiles({}, {}, {}, {}, {}, {})",
            )
            for path in ("tma", "pointer")
        ]
        for name in ("quick_gelu", "silu_mul")
    },
}
ATTENTION = re.compile(r"attention(_backward)? (causal|full) (\d+) (tma|pointers|small)")
TILE = r"(\d+)x(\d+) w(\d+) s(\d+)"
Rows = list[dict[str, str]]
Times = dict[str, float]  # of each provider, or of each value of a row, in ms


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("find", "apply"))
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--kernels", type=Path, default=KERNELS)
    parser.add_argument("--dry-run", action="store_true", help="say what would change; compile and change nothing")
    args = parser.parse_args(argv)
    path = args.results / WINNERS
    try:
        if args.what == "apply":
            return apply(read_winners(path), args.kernels, args.dry_run)
        found = find_latest(args.results)
        path.write_text(json.dumps(found, indent=2) + "\n")
    except (OSError, ValueError) as error:
        print(f"bench.winners: {error}", file=sys.stderr)
        return 1
    print(f"{len(found)} rows of tables, in {path.name}")
    return 0


# ------------------------------------------------------------------------------------------------------- which win


def find_latest(results: Path) -> list[dict]:
    """As `find`, of the sweep in a folder that ended last: of several cards', one. Raises ValueError, which names the
    file, where one cannot be read."""
    if not results.is_dir():
        raise ValueError(f"there is no folder {results}")
    sweeps = {path: read_sweep(path) for path in sorted(results.glob("*-sweep.csv"))}
    if not sweeps:
        return []
    path, rows = max(sweeps.items(), key=lambda item: item[1][-1]["date"])
    try:
        return find(rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_sweep(path: Path) -> Rows:
    """Raises ValueError, which names the file, where there is no row, or one without a time or another of COLUMNS."""
    try:
        rows = list(common.read_rows(path))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no csv file: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no rows")
    if missing := COLUMNS - rows[0].keys():
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
    for number, row in enumerate(rows, 1):
        if missing := {c for c in COLUMNS if not row[c]}:
            raise ValueError(f"{path}, row {number}: {', '.join(sorted(missing))} is empty")
        try:
            right = 0 < float(row["ms"]) < math.inf
        except ValueError:
            right = False
        if not right:
            raise ValueError(f"{path}, row {number}: ms is {row['ms']}, which is no time")
    return rows


def find(rows: Rows) -> list[dict]:
    """rows: of a sweep's csv; of each case, dtype and provider the last counts. Returns the new rows of tables, each
    with file, row, value and gain (the time of the one in use by its own, None where that was not right everywhere)."""
    measured: dict[tuple[str, str, str], Times] = {}
    for row in rows:
        measured.setdefault((row["kernel"], row["case"], row["dtype"]), {})[row["provider"]] = float(row["ms"])
    cases: dict[Place, list[Times]] = {}
    for (kernel, case, _), times in measured.items():
        for place, values in settings(kernel, case, times).items():
            cases.setdefault(place, []).append(values)
    return [winner for place, each in cases.items() if (winner := winner_of(place, each))]


def winner_of(place: Place, cases: list[Times]) -> dict | None:
    values = set.intersection(*map(set, cases))  # right, and so timed, in every case
    now = in_use(place)
    now = now if now in values else common.OURS
    slowness = {v: _mean([times[v] / min(times.values()) for times in cases]) for v in values}
    best = min(values - {common.OURS}, key=slowness.__getitem__, default=now)
    gain = slowness[now] / slowness[best] if now in slowness else None
    if best == now or (gain is not None and gain < GAIN):
        return None
    return {"file": place.file, "row": place.row, "value": best, "gain": gain and round(gain, 4)}


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def settings(kernel: str, case: str, times: Times) -> dict[Place, Times]:
    """The rows that a case's candidates are for: the time of each value of theirs, and of "triton"."""
    attention = ATTENTION.fullmatch(kernel)
    ours = {p: ms for p, ms in times.items() if p == common.OURS}
    found: dict[Place, Times] = {}
    try:
        rows = _attention(attention, case) if attention else TABLES.get(kernel, [])
    except StopIteration:
        raise ValueError(f"no table has a row for {kernel}, {case}") from None
    for place, pattern, value in rows:
        matches = {p: m for p in times if (m := re.fullmatch(pattern, p))}
        if matches:
            found.setdefault(place, dict(ours)).update(
                {value.format(*m.groups()): times[p] for p, m in matches.items()}
            )
    return found


def _attention(kernel: re.Match, case: str) -> list[tuple[Place, str, str]]:
    """As TABLES has it of the others: of a head dim and the longest sequence the row that serves them."""
    from bench.bench_attention import GPU_PROBLEMS, row
    from minivlm2vec_kernels import attention_backward_triton, attention_triton

    H, table, value = int(kernel[3]), kernel[4], "Tile({}, {}, {}, {})"
    if kernel[1]:
        tables = {f"TILES['{p}']": (p, rows) for p, rows in attention_backward_triton.TILES.items()}
        if table == "small":
            tables = {"SMALL_TILES": ("both", attention_backward_triton.SMALL_TILES)}
        return [
            (Place("attention_backward_triton", f"{name}[{next(n for n in rows if n >= H)}]"), f"{pass_} {TILE}", value)
            for name, (pass_, rows) in tables.items()
        ]
    name, limits = row(next(p for p in GPU_PROBLEMS if p.name == case), table)
    key = ", ".join("ANY" if n == attention_triton.ANY else str(n) for n in limits)
    place = Place("attention_triton", f"{name}[{key}]")
    as_triton = r"(?: \(as triton\))?"
    return [
        (place, f"{TILE} pointers{as_triton}", value),
        (place, f"{TILE} tma{as_triton}", "Tile({}, {}, {}, {}, True)"),
    ]


# ----------------------------------------------------------------------------------------------------- the source


def read_winners(path: Path) -> list[dict]:
    """What `find` returned. Raises ValueError, which names the file, where that is not there or is something else."""
    if not path.is_file():
        raise ValueError(f"there is no {path}: python -m bench.winners find")
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    for winner in found if isinstance(found, list) else [None]:
        if not isinstance(winner, dict) or not all(isinstance(winner.get(k), str) for k in ("file", "row", "value")):
            raise ValueError(f"{path} is no list of winners, each with file, row and value: find writes it anew")
        if not isinstance(winner.get("gain"), (int, float, type(None))):
            raise ValueError(f"{path}: the gain of {winner['row']} is {winner['gain']!r}, which is no number")
    return found


def apply(winners: list[dict], kernels: Path, dry_run: bool = False) -> int:
    """Puts winners into the files of a folder, one after another. Returns 1 where one is refused, which is named."""
    from tests.kernels.aot.changed import compile_all_but

    refused, jobs = 0, None
    for winner in winners:
        place = Place(winner["file"], winner["row"])
        file = kernels / f"{place.file}.py"
        try:
            if not (place.file.isidentifier() and file.is_file()):
                raise ValueError(f"{place.file} is no file of the kernels")
            before = file.read_text()
            after = applied(before, place.row, checked(winner["value"]))
            if after != before and not dry_run:
                with tempfile.TemporaryDirectory() as folder:
                    copy = Path(folder) / "minivlm2vec_kernels"
                    shutil.copytree(kernels, copy)
                    jobs = compile_all_but(None, Path(folder))[0] if jobs is None else jobs
                    (copy / file.name).write_text(after)
                    new_jobs, wrong = compile_all_but(jobs, Path(folder))
                if wrong:
                    raise ValueError("; ".join(wrong))
                jobs = new_jobs
                file.write_text(after)
        except ValueError as error:
            print(f"{place} = {winner['value']} is refused: {error}", flush=True)
            refused += 1
            continue
        verb = "already" if after == before else "would be" if dry_run else "now"
        gain = f" ({winner['gain']:.2f}x)" if winner.get("gain") else ""
        print(f"{place}: {verb} {winner['value']}{gain}", flush=True)
    return 1 if refused else 0


def checked(text: str) -> str:
    """A number, a tuple of numbers, or a call of Tile or Tiles, as the source writes it. Raises ValueError for anything
    else, which must not reach the source."""
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        node = None
    parts, types = [node], (int, float)
    if isinstance(node, ast.Tuple):
        parts = node.elts
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("Tile", "Tiles") and not node.keywords:
        parts, types = node.args, (int, float, bool)
    if not all(isinstance(p, ast.Constant) and type(p.value) in types for p in parts):
        raise ValueError("it is no number, no tuple of numbers and no Tile or Tiles of numbers")
    return ast.unparse(node)


def in_use(place: Place) -> str:
    source = (KERNELS / f"{place.file}.py").read_text()
    value = entry(source, place.row)
    return ast.unparse(value.elts[0] if isinstance(value, ast.List) else value)


def entry(source: str, row: str) -> ast.expr:
    """The value of a row, such as TABLE[True, False][ANY, ANY], of a table that a file assigns to a name at its top."""
    keys: list[ast.expr] = []
    try:
        table = ast.parse(row, mode="eval").body
    except SyntaxError:
        raise ValueError(f"{row} is no row of a table") from None
    while isinstance(table, ast.Subscript):
        keys.insert(0, table.slice)
        table = table.value
    assigned = (n for n in ast.parse(source).body if isinstance(n, ast.Assign))
    found = next((n.value for n in assigned if ast.unparse(n.targets[0]) == ast.unparse(table)), None)
    for key in keys:
        rows = zip(found.keys, found.values, strict=True) if isinstance(found, ast.Dict) else ()
        found = next((value for k, value in rows if k and ast.dump(k) == ast.dump(key)), None)
    if found is None:
        raise ValueError(f"there is no {row}")
    return found


def applied(source: str, row: str, value: str) -> str:
    """A file's text with the value in that row; of a list of candidates it becomes the first."""
    node = entry(source, row)
    if not isinstance(node, ast.List):
        if _kind(ast.parse(value, mode="eval").body) != _kind(node):
            raise ValueError("it is of another kind than what is there now, or not of whole numbers above 0")
        return _replaced(source, node, value)
    values = [ast.unparse(e) for e in node.elts]
    if value not in values:
        raise ValueError(f"it is none of the candidates {', '.join(values)}")
    values.remove(value)
    for element, text in reversed(list(zip(node.elts, [value, *values], strict=True))):
        source = _replaced(source, element, text)
    return source


def _kind(node: ast.expr) -> object:
    """One for all whole numbers above 0, one for all pairs of such, one for every call of Tile, and so on."""
    if isinstance(node, ast.Tuple):
        return tuple(map(_kind, node.elts))
    if isinstance(node, ast.Call):
        return ast.unparse(node.func)
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value > 0:
        return int
    return ast.unparse(node)


def _replaced(source: str, node: ast.expr, text: str) -> str:
    if ast.unparse(node) == text:
        return source
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    data = source.encode()
    begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
    return (data[:begin] + text.encode() + data[end:]).decode()


if __name__ == "__main__":
    sys.exit(main())
