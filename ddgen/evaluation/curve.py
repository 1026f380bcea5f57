"""The FID curve: distance to the real images, and what goes with it, against training steps, as a picture."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import textwrap
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ddgen.checkpoint import write_bytes
from ddgen.evaluation.neighbours import COPY_LEVEL

PANELS = (("fid", "fd"), ("kid",), ("precision", "recall"), ("density", "coverage"), ("consistency",), ("memorised",))
METRIC = re.compile(rf"^(?P<metric>(?P<kind>{'|'.join(sum(PANELS, ()))})_(?P<rest>[^/]+))(?:/(?P<average>.+))?$")
LOWER_IS_BETTER = {"fid", "fd", "kid", "memorised"}
COLUMNS, TITLE_WIDTH = 3, 55  # panels, letters
LOG_SCALE_ABOVE = 10.0  # ratio of largest to smallest value
COLOURS = ("#1f6f8b", "#d1603d", "#5b8c3a", "#7a5195")
DASHES: tuple[Literal["-", "--"], ...] = ("-", "--")  # of the measures in a panel
GREY, FAINT = "#5a5a5a", "#e3e3e3"

Series = dict[str, list[tuple[float, float]]]


def draw_fid_curve(metrics_path: Path, png_path: Path) -> None:
    """Draws the measures of a run against its step: related ones share a panel, one colour an average of the weights.

    The best step by Fréchet distance is marked in every panel. Nothing is written while there is nothing to draw.

    Args:
        metrics_path: ``metrics.jsonl``: one JSON object a line, with ``step``; averages are told apart by a suffix
            such as ``fid_1000/ema_0.05``.
        png_path: The picture, replaced whole.
    """
    metrics = read_curves(metrics_path)
    if not metrics:
        return
    panels = _panels(metrics)
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    best = best_point(metrics_path)
    for axes, names in zip(grid, panels, strict=False):
        _draw_panel(axes, {name: metrics[name] for name in names}, best)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(png_path, buffer.getvalue())


def read_curves(metrics_path: Path) -> dict[str, Series]:
    """Returns metric -> average -> [(step, value)], Fréchet distances first; a resumed run's later line wins."""
    points: dict[str, dict[str, dict[float, float]]] = {}
    for record in _read_records(metrics_path):
        for key, value in record.items():
            match = METRIC.match(key)
            if match and "step" in record and isinstance(value, (int, float)):
                average = points.setdefault(match["metric"], {}).setdefault(match["average"] or "", {})
                average[float(record["step"])] = float(value)
    kinds = [kind for panel in PANELS for kind in panel]
    ordered = sorted(points, key=lambda metric: (kinds.index(_kind(metric)), metric))
    return {metric: {name: sorted(at.items()) for name, at in points[metric].items()} for metric in ordered}


def best_point(metrics_path: Path) -> tuple[str, float, str, float] | None:
    """Returns metric, step, average and value of the lowest Fréchet distance, of the one measured last; or None."""
    curves = {name: series for name, series in read_curves(metrics_path).items() if _kind(name) in PANELS[0]}
    if not curves:
        return None
    metric = max(curves, key=lambda name: max(points[-1][0] for points in curves[name].values()))
    points = [(value, step, average) for average, at in curves[metric].items() for step, value in at]
    value, step, average = min(points)
    return metric, step, average, value


def _read_records(metrics_path: Path) -> list[dict[str, Any]]:
    lines = metrics_path.read_text(encoding="utf-8").split("\n")
    # What follows the last newline is empty, or a line that is being written at this moment.
    records = [json.loads(line) for line in lines[:-1] if line.strip()]
    return [record for record in records if isinstance(record, dict)]


def _kind(metric: str) -> str:
    return metric.split("_")[0]


def _panels(metrics: dict[str, Series]) -> list[list[str]]:
    """Groups metrics that belong in one panel: related kinds, of the same network and number of images."""
    grouped: dict[tuple[int, str], list[str]] = {}
    for name in metrics:
        number = next(i for i, kinds in enumerate(PANELS) if _kind(name) in kinds)
        rest = name if number == 0 else name.split("_", 1)[1]
        grouped.setdefault((number, rest), []).append(name)
    return [grouped[key] for key in sorted(grouped)]


def _draw_panel(axes: Axes, metrics: dict[str, Series], best: tuple[str, float, str, float] | None) -> None:
    for dashes, series in zip(itertools.cycle(DASHES), metrics.values(), strict=False):
        for colour, points in zip(itertools.cycle(COLOURS), series.values(), strict=False):
            steps, heights = zip(*points, strict=True)
            axes.plot(steps, heights, color=colour, linestyle=dashes, marker="o", markersize=3.5, linewidth=1.8)
    kinds = [_kind(name) for name in metrics]
    values = [value for series in metrics.values() for points in series.values() for _, value in points]
    _scale(axes, kinds[0], values)
    if best is not None:
        axes.axvline(best[1], color=GREY, linewidth=0.9, linestyle=":", zorder=0)
        if best[0] in metrics:
            _mark_best(axes, *best)
    if kinds[0] == "memorised":
        axes.axhline(COPY_LEVEL, color=GREY, linewidth=0.9, linestyle="--")
        axes.annotate("held-out real images", (1, COPY_LEVEL), xycoords=("axes fraction", "data"), xytext=(0, 3),
                      textcoords="offset points", ha="right", fontsize=8.5, color=GREY)  # fmt: skip
    axes.set_xlabel("training step")
    axes.set_ylabel(f"{'lower' if kinds[0] in LOWER_IS_BETTER else 'higher'} is better")
    axes.set_title(textwrap.fill(describe(*metrics), TITLE_WIDTH), fontsize=10.5, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(True, which="major", color=FAINT, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(axes, kinds, list(next(iter(metrics.values()))))


def _scale(axes: Axes, kind: str, values: list[float]) -> None:
    """Parts of a whole are drawn from 0; distances that fall far are drawn on a logarithmic scale."""
    axes.margins(x=0.04, y=0.14)
    if kind in ("fid", "fd", "kid"):
        if min(values) > 0 and max(values) / min(values) > LOG_SCALE_ABOVE:
            axes.set_yscale("log")
        return
    top = max(values) if kind != "memorised" else max(*values, COPY_LEVEL)
    axes.set_ylim(-0.03 * top, 1.14 * top if top > 0 else 1)


def _mark_best(axes: Axes, metric: str, step: float, average: str, value: float) -> None:
    axes.plot([step], [value], marker="o", markersize=10, markerfacecolor="none", markeredgecolor=GREY)
    axes.annotate(
        f"best {value:.3g} at step {step:,.0f}",
        (step, value),
        xytext=(0, -10),
        textcoords="offset points",
        ha="right" if step > 0.5 * axes.get_xlim()[1] else "left",
        va="top",
        fontsize=8.5,
        color=GREY,
    )


def _legend(axes: Axes, kinds: list[str], averages: list[str]) -> None:
    """Names the averages by colour, in the first panel alone, and by their line the measures that share a panel."""
    lines = []
    if len(averages) > 1 and kinds[0] in PANELS[0]:
        colours = itertools.cycle(COLOURS)
        lines = [Line2D([], [], color=next(colours), label=_label(average)) for average in averages]
    if len(kinds) > 1:
        lines += [
            Line2D([], [], color=GREY, linestyle=line, label=kind)
            for line, kind in zip(itertools.cycle(DASHES), kinds, strict=False)
        ]
    if lines:
        axes.legend(handles=lines, frameon=False, fontsize=8.5)


def _label(average: str) -> str:
    return average.replace("ema_", "EMA std ").replace("posthoc_", "EMA afterwards, std ") if average else "model"


_WORDS = {
    "fd": "Fréchet distance",
    "kid": "kernel distance",
    "consistency": "images seen as their class by",
    "memorised": "near copies of training images",
}


def describe(*metrics: str) -> str:
    """Spells metrics out: ``fd_convnet3_1000`` is "Fréchet distance in convnet3 features, 1,000 images"."""
    _, *network, count = metrics[0].split("_")
    number = f"{int(count):,} images" if count.isdigit() else count
    kinds = [_kind(metric) for metric in metrics]
    if kinds == ["fid"]:
        return f"FID, {number}"
    what = " and ".join(_WORDS.get(kind, kind) for kind in kinds)
    if kinds == ["consistency"]:
        return f"{what} {'_'.join(network)}, {number}"
    return f"{what} in {'_'.join(network)} features, {number}"
