"""README's table and a plot from bench/results/<gpu>.csv: python -m bench.report

The table goes between the lines `<!-- bench:begin -->` and `<!-- bench:end -->` of README.md, the plot to
bench/results/<gpu>.png (which needs matplotlib: the extra `dev`). Of each case the latest run counts.
"""

import argparse
import sys
from pathlib import Path

from bench import common

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
HEAD = "| kernel | case | ms | p10 to p90 | rate | of the peak | best baseline | faster by |"
RULE = "|---|---|---:|---:|---:|---:|---|---:|"
CaseRows = list[dict[str, str]]  # one case's row of each provider


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    files = [f for f in sorted(args.results.glob("*.csv")) if f.stem != "cpu" and not f.stem.endswith("-sweep")]
    tables = [table(latest(common.read_rows(file))) for file in files]
    write_between_markers(args.readme, "\n\n".join(tables) or "Not measured on a GPU yet.")
    for file in files:
        plot(latest(common.read_rows(file)), file.with_suffix(".png"))
    return 0


def latest(rows) -> list[CaseRows]:
    """The rows of each case's last run, cases in the order in which they first came."""
    cases: dict[tuple[str, str, str], CaseRows] = {}
    for row in rows:
        found = cases.setdefault((row["kernel"], row["case"], row["dtype"]), [])
        if found and found[0]["date"] != row["date"]:
            found.clear()
        found.append(row)
    return list(cases.values())


def table(cases: list[CaseRows]) -> str:
    first = cases[0][0]
    lines = [
        f"{first['gpu']}, driver {first['driver']}, torch {first['torch']}, triton {first['triton']}, "
        f"cuDNN {first['cudnn']}; peaks in the same run: matmul {float(first['matmul_peak']):.0f} TFLOP/s, "
        f"copy {float(first['copy_peak']):.0f} GB/s; {first['date']}, commit {first['commit']}.",
        "",
        HEAD,
        RULE,
    ]
    return "\n".join(lines + [line(rows) for rows in cases if ours(rows)])


def ours(rows: CaseRows) -> dict[str, str] | None:
    return next((r for r in rows if r["provider"] == common.OURS), None)


def best_baseline(rows: CaseRows) -> dict[str, str] | None:
    """The fastest rival, or the reference where there is none."""
    others = [r for r in rows if r["provider"] != common.OURS]
    rivals = [r for r in others if r["provider"] != common.SHOWN[common.REFERENCE]]
    return min(rivals or others, key=lambda r: float(r["ms"]), default=None)


def line(rows: CaseRows) -> str:
    row, best = ours(rows), best_baseline(rows)
    if row["tflops"]:
        rate, share = f"{float(row['tflops']):.0f} TFLOP/s", f"{float(row['pct_matmul']):.0f} % of matmul"
    else:
        rate, share = f"{float(row['gbs']):.0f} GB/s", f"{float(row['pct_copy']):.0f} % of copy"
    baseline = f"{best['provider']}, {float(best['ms']):.4g} ms" if best else ""
    ratio = f"{float(row['ratio']):.2f}x" if row["ratio"] else ""
    spread = f"{float(row['ms_p10']):.4g} to {float(row['ms_p90']):.4g}"
    cells = [row["kernel"], row["case"], f"{float(row['ms']):.4g}", spread, rate, share, baseline, ratio]
    return f"| {' | '.join(cells)} |"


def write_between_markers(readme: Path, text: str) -> None:
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} needs the lines {BEGIN} and {END}, in this order")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def plot(cases: list[CaseRows], path: Path) -> None:
    """A bar a case: how many times as fast as the best baseline."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed: {path.name} not drawn")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{row['kernel']}, {row['case']}", float(row["ratio"])) for row in map(ours, cases) if row and row["ratio"]
    ]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.25 * len(bars)), layout="constrained")
    drawn = axes.barh([name for name, _ in bars], [ratio for _, ratio in bars], color="#4477aa")
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the best baseline that passes its check")
    axes.set_title(cases[0][0]["gpu"])
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
