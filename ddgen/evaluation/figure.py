"""The picture of an evaluation, accuracy.png: bars of every recipe and student, and observers against students."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ddgen.checkpoint import write_bytes
from ddgen.evaluation.measures import CrossTable, cross_architecture
from ddgen.evaluation.report import Results, format_score
from ddgen.evaluation.rows import FULL_REAL, IMAGE_SOURCES, Row

# Blue and green for what is generated, greys and browns for what is real: apart for colour-blind readers too.
COLOURS = {
    "distilled": "#2a6fbb",
    "random generated": "#63b4a3",
    "random real": "#a3a7ae",
    "herding": "#c9a66b",
    "k-center": "#8a6d3b",
    "rded real": "#b58db6",
    FULL_REAL: "#4d535b",
}
INK, FAINT = "#24292f", "#d9dce0"
_DARK = ("distilled", "k-center", FULL_REAL)


def draw_accuracy(results: Results, path: Path) -> None:
    """Draws accuracy.png: bars per recipe and student, the spread, every single student, the teacher and chance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row.protocol, row.student, row.teacher) for row in results.rows))
    tables = cross_architecture(results.rows)
    bars = sum(len({row.images for row in results.rows if row.protocol == group[0]}) for group in groups)
    heights = [4.2, *(1.3 + 0.45 * len(table.teachers) for table in tables)]
    figure = Figure(figsize=(max(6.0, 2.2 + 1.1 * bars), sum(heights)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_bars(panels[0], results, groups)
    for axes, table in zip(panels[1:], tables, strict=True):
        _draw_table(axes, table)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())


def _draw_bars(axes: Any, results: Results, groups: list[tuple[str, str, str | None]]) -> None:
    sources = [source for source in IMAGE_SOURCES if any(row.images == source for row in results.rows)]
    width = 0.8 / len(sources)
    highest = max([*(accuracy for _, accuracy in results.teachers), *(max(row.scores) for row in results.rows)])
    height = max(1.0, min(103.0, 108 * highest))
    for row in results.rows:
        group = groups.index((row.protocol, row.student, row.teacher))
        center = group + (sources.index(row.images) - (len(sources) - 1) / 2) * width
        _draw_bar(axes, row, center, 0.9 * width, height)
    _draw_lines(axes, results, len(groups))
    several = len({teacher for _, _, teacher in groups if teacher is not None}) > 1
    axes.set_xticks(range(len(groups)), [_group_label(results, *group, several) for group in groups])
    axes.set_ylabel("top-1 accuracy on real test images (%)")
    axes.set_ylim(0, height)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= min(100, height)])
    axes.set_title(_figure_title(results), loc="left", fontsize=10.5, color=INK, pad=26)
    _finish(axes, sources)


def _draw_table(axes: Any, table: CrossTable) -> None:
    """Draws observers down and students across, the better the darker, every cell with its score."""
    from matplotlib.colors import LinearSegmentedColormap

    means = [[100 * row.mean for row in line] for line in table.rows]
    shades = LinearSegmentedColormap.from_list("shades", ["#eef3f9", COLOURS["distilled"]])
    axes.imshow(means, cmap=shades, aspect="auto")
    middle = (min(map(min, means)) + max(map(max, means))) / 2
    for i, line in enumerate(table.rows):
        for j, row in enumerate(line):
            colour = "white" if means[i][j] > middle else INK
            axes.text(j, i, format_score(row), ha="center", va="center", fontsize=9.5, color=colour)
    axes.set_xticks(range(len(table.students)), table.students)
    axes.set_yticks(range(len(table.teachers)), table.teachers)
    axes.set_title(f"{table.protocol}, distilled: observers down, students across", loc="left", fontsize=10, color=INK)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _group_label(results: Results, protocol: str, student: str, teacher: str | None, several: bool) -> str:
    labels = results.recipe(protocol).labels
    recipe = f"{labels} labels" if labels == protocol else f"{labels} labels ({protocol})"
    return "\n".join([student, recipe, *([f"by {teacher}"] if several and teacher else [])])


def _figure_title(results: Results) -> str:
    epochs = "" if results.epochs_override is None else f", {results.epochs_override} epochs (--epochs)"
    repeats = "" if results.repeats == 1 else f", mean ± std of {results.repeats}"
    return f"{results.dataset}, {results.ipc} per class{epochs}; last epoch{repeats}"


def _draw_bar(axes: Any, row: Row, center: float, width: float, height: float) -> None:
    mean, std = 100 * row.mean, 100 * (row.std or 0.0)
    axes.bar(center, mean, width, color=COLOURS[row.images], zorder=2)
    if row.std is not None:
        axes.errorbar(center, mean, std, color=INK, capsize=3, linewidth=1.1, zorder=4)
        spots = [center + width * 0.3 * (i / (len(row.scores) - 1) - 0.5) for i in range(len(row.scores))]
        axes.scatter(spots, [100 * s for s in row.scores], s=9, color="white", edgecolor=INK, linewidth=0.6, zorder=5)
    spread = [mean - std, mean + std, *(100 * score for score in row.scores)]
    inside = min(spread) > 0.15 * height  # the number stands in the bar, clear of the teacher's line, if it fits
    axes.annotate(
        f"{mean:.1f}",
        (center, min(spread) if inside else max(spread)),
        (0, -6 if inside else 4),
        textcoords="offset points",
        ha="center",
        va="top" if inside else "bottom",
        fontsize=9.5,
        color="white" if inside and row.images in _DARK else INK,
        zorder=6,
    )


def _draw_lines(axes: Any, results: Results, num_groups: int) -> None:
    lines = [("chance", 1 / results.num_classes, ":")]
    for name, accuracy in results.teachers:
        title = "teacher" if len(results.teachers) == 1 else name
        lines.append((f"{title} {100 * accuracy:.1f}", accuracy, "--"))
    axes.set_xlim(-0.55, num_groups - 1 + 0.55)
    for text, level, style in lines:
        axes.axhline(100 * level, color=INK, linewidth=0.9, linestyle=style, zorder=3)
        axes.annotate(
            text, (1.0, 100 * level), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", fontsize=8.5, color=INK, annotation_clip=False,
        )  # fmt: skip


def _finish(axes: Any, sources: list[str]) -> None:
    from matplotlib.patches import Patch

    axes.grid(axis="y", color=FAINT, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(
        handles=[Patch(color=COLOURS[source], label=source) for source in sources],
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(sources), frameon=False, fontsize=9,
        borderaxespad=0.2, handlelength=1.0, columnspacing=1.4,
    )  # fmt: skip
