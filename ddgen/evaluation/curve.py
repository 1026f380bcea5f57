"""The FID curve: distance to the real images against training steps, as a picture."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ddgen.checkpoint import write_bytes

METRIC = re.compile(r"^(?P<metric>(?P<kind>fid|fd|kid)_(?P<rest>[^/]+))(?:/(?P<average>.+))?$")
LOG_SCALE_ABOVE = 10.0  # ratio of largest to smallest value
COLOURS = ("#1f6f8b", "#d1603d", "#5b8c3a", "#7a5195")
GREY = "#5a5a5a"

Series = dict[str, list[tuple[float, float]]]


def draw_fid_curve(metrics_path: Path, png_path: Path) -> None:
    """Draws every ``fid_*``, ``fd_*`` and ``kid_*`` of a run against its step; one panel a metric, one line an EMA.

    Nothing is written while there is nothing to draw.

    Args:
        metrics_path: ``metrics.jsonl``: one JSON object a line, with ``step``; averages are told apart by a suffix
            such as ``fid_1000/ema_0.05``.
        png_path: The picture, replaced whole.
    """
    metrics = read_curves(metrics_path)
    if not metrics:
        return
    figure = Figure(figsize=(5.6 * len(metrics), 3.9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (metric, series) in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics.items(), strict=True):
        _draw_panel(axes, metric, series)
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
    ordered = sorted(points, key=lambda metric: (metric.startswith("kid_"), metric))
    return {metric: {name: sorted(at.items()) for name, at in points[metric].items()} for metric in ordered}


def _read_records(metrics_path: Path) -> list[dict[str, Any]]:
    lines = metrics_path.read_text(encoding="utf-8").split("\n")
    # What follows the last newline is empty, or a line that is being written at this moment.
    records = [json.loads(line) for line in lines[:-1] if line.strip()]
    return [record for record in records if isinstance(record, dict)]


def _draw_panel(axes: Axes, metric: str, series: Series) -> None:
    values = [value for points in series.values() for _, value in points]
    for colour, (name, points) in zip(COLOURS * len(series), series.items(), strict=False):
        steps, heights = zip(*points, strict=True)
        axes.plot(steps, heights, color=colour, marker="o", markersize=3.5, linewidth=1.8, label=_label(name))
    if min(values) > 0 and max(values) / min(values) > LOG_SCALE_ABOVE:
        axes.set_yscale("log")
    _mark_best(axes, series)
    axes.set_xlabel("training step")
    axes.set_ylabel(f"{metric} (lower is better)")
    axes.set_title(describe(metric), fontsize=10.5, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(True, which="major", color="#e3e3e3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.04, y=0.14)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9)


def _mark_best(axes: Axes, series: Series) -> None:
    step, value = min((point for points in series.values() for point in points), key=lambda point: point[1])
    axes.annotate(
        f"best {value:.3g} at step {step:,.0f}",
        (step, value),
        xytext=(0, -8),
        textcoords="offset points",
        ha="right" if step > 0.5 * axes.get_xlim()[1] else "left",
        va="top",
        fontsize=8.5,
        color=GREY,
    )


def _label(average: str) -> str:
    return average.replace("ema_", "EMA std ") if average else "model"


def describe(metric: str) -> str:
    """Spells a metric's name out: ``fd_convnet3_1000`` is "Fréchet distance in convnet3 features, 1,000 images"."""
    kind, *network, count = metric.split("_")
    number = f"{int(count):,} images" if count.isdigit() else count
    if kind == "fid":
        return f"FID, {number}"
    name = "Fréchet distance" if kind == "fd" else "kernel distance"
    return f"{name} in {'_'.join(network)} features, {number}"
