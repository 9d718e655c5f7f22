"""The curves of a run, drawn by matplotlib from its metrics.jsonl.

The package is optional: where it is absent a line says so, and the run goes on without curves.
"""

import functools
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

from scipy.ndimage import uniform_filter1d

METRICS_FILE, CURVES_FILE = "metrics.jsonl", "curves.png"

LOSSES = ("class", "mask", "dice", "text")

SMOOTHED_POINTS = 50  # a longer curve is drawn pale under its running mean


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a line that a killed run was writing is skipped."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


@functools.cache
def has_matplotlib() -> bool:
    """Says it once where the package is absent."""
    if importlib.util.find_spec("matplotlib"):
        return True
    print(f"{CURVES_FILE} needs matplotlib: pip install matplotlib")
    return False


def draw_metrics(out: Path) -> None:
    """OUT/curves.png: losses of every stage and, where there were validations, their scores."""
    if not has_matplotlib():
        return
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    records, charts = read_metrics(out / METRICS_FILE), []
    for stage in sorted({record["stage"] for record in records}):
        of_stage = [record for record in records if record["stage"] == stage]
        charts.append((f"stage {stage}", of_stage, ("loss", *LOSSES)))
        scores = [record | record["validation"] for record in of_stage if "validation" in record]
        if scores:
            charts.append((f"stage {stage}, validation", scores, list(scores[0]["validation"])))
    figure = Figure(figsize=(9, 4.8 * len(charts)), layout="constrained")
    rows = figure.subplots(len(charts), squeeze=False)[:, 0]
    for axes, (title, records, names) in zip(rows, charts, strict=True):
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        if "loss" in names:
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_major_formatter(LogFormatter())  # 20 instead of 2 × 10¹
            axes.yaxis.set_minor_formatter(LogFormatter())
        draw_curves(axes, records, names)
    figure.savefig(out / CURVES_FILE)


def draw_curves(axes, records: list[dict], names: Iterable[str]) -> None:
    """The figures of these names against the step, of those that have any, and a legend."""
    curves = {}
    for name in names:
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if points:
            curves[name] = tuple(zip(*points, strict=True))
    for number, (name, (steps, values)) in enumerate(curves.items()):
        colour, marker = f"C{number}", "."  # of matplotlib's palette, which begins again
        if len(steps) > SMOOTHED_POINTS:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1, zorder=1)
            values, marker = uniform_filter1d(values, max(5, len(values) // 20), mode="nearest"), ""
        axes.plot(steps, values, color=colour, marker=marker, linewidth=2, label=name)
    if curves:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
