"""The fastest settings of a sweep, and their way into the source.

    python -m bench.winners find     # bench/results/<gpu>-sweep.csv -> bench/results/winners.json
    python -m bench.winners apply    # winners.json -> the settings tables of kernels/minivlm2vec_kernels
    python -m bench.winners apply --dry-run

A table's row serves many shapes: the setting wins that is fastest over all of them (the least geometric mean of its
time by the best one's) among those that were right in each, where it beats the setting in use by 2 %. Tiles of
attention depend on lengths: what wins is listed for each case, under "by hand". After `apply`: python -m
tests.kernels.aot --write, the tests, and the benches again.
"""

import argparse
import ast
import json
import math
import re
import sys
from pathlib import Path

from bench import common

KERNELS = Path(__file__).parents[1] / "kernels" / "minivlm2vec_kernels"
WINNERS = "winners.json"
GAIN = 1.02  # below, the setting in use stays
ROW = re.compile(r"BM(\d+) w(\d+)")
FEATURES = re.compile(r"BF(\d+) w(\d+)")
TILES = re.compile(r"(tma|pointer) (\d+)x(\d+)x(\d+) w(\d+) s(\d+) r(\d+)")
TABLES = {  # kernel of the sweep -> file, table, key, pattern of its providers
    "add_rms_norm": ("launch", "ROW_SETTINGS", 4096, ROW),
    "add_rms_norm_backward": ("rms_norm_triton", "BACKWARD_SETTINGS", 4096, ROW),
    "add_layer_norm": ("launch", "ROW_SETTINGS", 1024, ROW),
    **{name: ("activation_triton", "SETTINGS", name, FEATURES) for name in ("silu_mul", "quick_gelu")},
    "silu_mul_backward": ("activation_triton", "SETTINGS", "silu_mul_backward", FEATURES),
    "linear_quick_gelu": ("linear_triton", "CANDIDATES", "quick_gelu", TILES),
    "linear_silu_mul": ("linear_triton", "CANDIDATES", "silu_mul", TILES),
}
Rows = list[dict[str, str]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("find", "apply"))
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--kernels", type=Path, default=KERNELS)
    parser.add_argument("--dry-run", action="store_true", help="say what would change, and change nothing")
    args = parser.parse_args(argv)
    path = args.results / WINNERS
    if args.what == "find":
        rows = [row for file in sorted(args.results.glob("*-sweep.csv")) for row in common.read_rows(file)]
        found = find(rows)
        path.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{len(found['rows'])} rows of tables and {len(found['by hand'])} by hand, in {path.name}")
        return 0
    if not path.is_file():
        parser.error(f"there is no {path.name}: python -m bench.winners find")
    for winner in json.loads(path.read_text())["rows"]:
        file = args.kernels / f"{winner['file']}.py"
        before = file.read_text()
        after = applied(before, winner)
        verb = "already" if after == before else "would be" if args.dry_run else "now"
        print(
            f"{winner['file']}.{winner['table']}[{winner['key']!r}]: {verb} {winner['value']} ({winner['gain']:.2f}x)"
        )
        if not args.dry_run:
            file.write_text(after)
    return 0


def find(rows: Rows) -> dict[str, list[dict]]:
    """rows: of a sweep's csv; of each case, dtype and provider the last counts."""
    times: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    for row in rows:
        times.setdefault(row["kernel"], {}).setdefault((row["case"], row["dtype"]), {})[row["provider"]] = float(
            row["ms"]
        )
    found: dict[str, list[dict]] = {"rows": [], "by hand": []}
    for kernel, cases in times.items():
        if kernel not in TABLES:
            for (case, dtype), ms in cases.items():
                best = min((p for p in ms if p != common.REFERENCE), key=lambda p: ms[p], default=None)
                if best and best != common.OURS:
                    gain = ms[common.OURS] / ms[best] if common.OURS in ms else None
                    found["by hand"].append(
                        {"kernel": kernel, "case": case, "dtype": dtype, "best": best, "gain": gain}
                    )
            continue
        file, table, key, pattern = TABLES[kernel]
        for path in ("tma", "pointer") if pattern is TILES else (None,):
            names = [p for p in _in_all(cases) if pattern.fullmatch(p) and (path is None or p.startswith(path))]
            if not names:
                continue
            name = min(names, key=lambda p: _slowness(cases, p))
            now = _in_use(cases, names, file, table, (key, path) if path else key)
            gain = _slowness(cases, now) / _slowness(cases, name) if now else None
            if gain is not None and gain < GAIN:
                continue
            value = [int(n) for n in pattern.fullmatch(name).groups() if n.isdigit()]
            full = [key, path] if path else key
            found["rows"].append({"file": file, "table": table, "key": full, "value": value, "gain": gain or 1.0,
                                  "kernel": kernel, "provider": name})  # fmt: skip
    return found


def _in_all(cases: dict) -> list[str]:
    """Providers that were right, and so timed, in every case."""
    return list(set.intersection(*(set(ms) for ms in cases.values())))


def _slowness(cases: dict, provider: str) -> float:
    """Geometric mean of its time by the best of each case."""
    logs = [math.log(ms[provider] / min(ms.values())) for ms in cases.values()]
    return math.exp(sum(logs) / len(logs))


def _in_use(cases: dict, names: list[str], file: str, table: str, key: object) -> str | None:
    """The provider that is the setting of the source: of row kernels "triton" is that."""
    if table != "CANDIDATES":
        return common.OURS if common.OURS in _in_all(cases) else None
    node = _entry((KERNELS / f"{file}.py").read_text(), table, key)
    first = [ast.literal_eval(a) for a in node.elts[0].args]  # type: ignore[attr-defined]
    return next((n for n in names if [int(x) for x in TILES.fullmatch(n).groups()[1:]] == first[:6]), None)  # type: ignore[union-attr]


def _entry(source: str, table: str, key: object) -> ast.expr:
    """The value of a key of a dict that is assigned to a name at the top of a file."""
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if any(isinstance(t, ast.Name) and t.id == table for t in targets) and isinstance(node.value, ast.Dict):
            for k, value in zip(node.value.keys, node.value.values, strict=True):
                if k is not None and ast.literal_eval(k) == key:
                    return value
    raise ValueError(f"there is no {table}[{key!r}] to be changed")


def applied(source: str, winner: dict) -> str:
    """A file's text with the winner in its table; of a list of candidates it becomes the first."""
    key = tuple(winner["key"]) if isinstance(winner["key"], list) else winner["key"]
    node = _entry(source, winner["table"], key)
    if not isinstance(node, ast.List):
        return _replaced(source, node, f"({', '.join(map(str, winner['value']))})")
    parts = [ast.get_source_segment(source, e) or "" for e in node.elts]
    values = [[ast.literal_eval(a) for a in e.args][:6] for e in node.elts]  # type: ignore[attr-defined]
    if winner["value"] not in values:
        raise ValueError(f"{winner['value']} is no candidate of {winner['table']}[{key!r}]")
    first = values.index(winner["value"])
    for element, text in reversed(
        list(zip(node.elts, [parts[first], *parts[:first], *parts[first + 1 :]], strict=True))
    ):
        source = _replaced(source, element, text)
    return source


def _replaced(source: str, node: ast.expr, text: str) -> str:
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    data = source.encode()
    begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
    return (data[:begin] + text.encode() + data[end:]).decode()


if __name__ == "__main__":
    sys.exit(main())
