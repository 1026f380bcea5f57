"""The results of an evaluation: a table for people, results.json for programs, accuracy.png for papers."""

from __future__ import annotations

import dataclasses
import io
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddgen.checkpoint import write_bytes, write_json
from ddgen.evaluation.protocols import get_protocol

IMAGE_SOURCES = ("distilled", "random generated", "random real")
# Blue, green and grey of a palette that stays apart for colour-blind readers.
_COLOURS = {"distilled": "#2a6fbb", "random generated": "#63b4a3", "random real": "#a3a7ae"}
_ON_BAR = {"distilled": "white", "random generated": "#24292f", "random real": "#24292f"}
_INK, _FAINT = "#24292f", "#d9dce0"


@dataclass(frozen=True)
class Row:
    """One line of the table: the students of one recipe on one set of images.

    Attributes:
        images: One of `IMAGE_SOURCES`.
        protocol: Name of the protocol.
        student: Name of the network.
        epochs: Epochs trained.
        scores: Top-1 fraction after the last epoch, one per repeat: the score.
        best_scores: Best of the scored epochs, one per repeat; chosen on the test set, so not a score.
        image_bytes: The images as PNG files.
        label_bytes: What the labels take: class numbers, or the weights of the teacher that labels online.
        seconds: Wall-clock time of all repeats.
    """

    images: str
    protocol: str
    student: str
    epochs: int
    scores: tuple[float, ...]
    best_scores: tuple[float, ...]
    image_bytes: int
    label_bytes: int
    seconds: float

    @property
    def mean(self) -> float:
        """Mean score over the repeats."""
        return statistics.fmean(self.scores)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the repeats; None for a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def best_epoch_mean(self) -> float:
        """Mean over the repeats of the best scored epoch."""
        return statistics.fmean(self.best_scores)


@dataclass(frozen=True)
class Results:
    """All rows and what they were measured on.

    Attributes:
        rows: The table.
        dataset: Name of the real dataset.
        num_classes: Its classes k.
        num_test: Real test images scored.
        image_size: Side in pixels.
        ipc: Images per class.
        repeats: Students per row.
        seed: The user's seed.
        epochs_override: `--epochs`, or None where the protocols' own epochs were used.
        flip: Whether training images were mirrored, as the protocols do.
        teacher: Name of the observer's network, or None.
        teacher_accuracy: Its top-1 fraction on the same test images.
        precision: Autocast precision.
        device: Kind of device.
    """

    rows: tuple[Row, ...]
    dataset: str
    num_classes: int
    num_test: int
    image_size: int
    ipc: int
    repeats: int
    seed: int
    epochs_override: int | None
    flip: bool
    teacher: str | None
    teacher_accuracy: float | None
    precision: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON: fractions, bytes and seconds."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "rows"}
        plain["score"] = "top-1 fraction on the real test images after the last epoch"
        plain["rows"] = [
            {**dataclasses.asdict(row), "mean": row.mean, "std": row.std, "best_epoch_mean": row.best_epoch_mean}
            for row in self.rows
        ]
        return plain


def write_results(results: Results, path: Path) -> None:
    """Writes results.json, whole or not at all."""
    write_json(path, results.to_dict())


def format_bytes(count: int) -> str:
    """Returns a size such as ``41.3 kB`` (decimal units)."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def format_score(row: Row) -> str:
    """Returns the score in percent, with the spread where there is one."""
    spread = "" if row.std is None else f" ± {100 * row.std:.1f}"
    return f"{100 * row.mean:.1f}{spread}"


def format_table(results: Results) -> str:
    """Returns the table with its heading and what must be known to read it, as plain text."""
    header = ("images", "protocol", "student", "last epoch", "best epoch", "epochs", "image bytes", "label bytes")
    lines: list[tuple[str, ...]] = [header]
    gaps = set()
    previous: Row | None = None
    for row in results.rows:
        if previous is not None and (row.protocol, row.student) != (previous.protocol, previous.student):
            gaps.add(len(lines))
        lines.append(_cells(row, results))
        previous = row
    return "\n".join([*_heading(results), "", *_align(lines, gaps), "", *_notes(results)])


def _cells(row: Row, results: Results) -> tuple[str, ...]:
    return (
        row.images,
        row.protocol,
        row.student,
        format_score(row),
        f"({100 * row.best_epoch_mean:.1f})",
        f"{row.epochs}{'*' if results.epochs_override is not None else ''}",
        format_bytes(row.image_bytes),
        format_bytes(row.label_bytes),
    )


def _align(lines: list[tuple[str, ...]], gaps: set[int]) -> list[str]:
    """Names to the left, numbers to the right, a rule under the header and a blank line before each in `gaps`."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    out = []
    for index, line in enumerate(lines):
        if index in gaps:
            out.append("")
        cells = [
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
        if index == 0:
            out.append("  ".join("-" * width for width in widths))
    return out


def _heading(results: Results) -> list[str]:
    repeats = "1 student per row" if results.repeats == 1 else f"{results.repeats} students per row, mean ± std"
    lines = [
        f"Top-1 accuracy in percent on the {results.num_test:,} real test images of {results.dataset}",
        f"{results.num_classes} classes, {results.ipc} image{'s' if results.ipc != 1 else ''} per class of "
        f"{results.image_size} x {results.image_size} px, {repeats}, seed {results.seed}",
    ]
    if results.teacher is not None and results.teacher_accuracy is not None:
        lines.append(f"Teacher: {results.teacher}, {100 * results.teacher_accuracy:.1f} on the same test images")
    return lines


def _notes(results: Results) -> list[str]:
    protocols = list(dict.fromkeys(row.protocol for row in results.rows))
    notes = [f"{name}: {get_protocol(name).title}" for name in protocols]
    notes.append(
        "The score is the last epoch's. The best epoch, of at most ten scored, is chosen on the test set: not a score."
    )
    if results.epochs_override is not None:
        own = ", ".join(f"{get_protocol(name).epochs(results.ipc)} of {name}" for name in protocols)
        notes.append(f"* --epochs {results.epochs_override} instead of {own}: not comparable with published numbers.")
    if not results.flip:
        notes.append("Without the protocols' mirroring: a mirror image would be another class.")
    if any(get_protocol(name).labels == "soft" for name in protocols):
        notes.append("Label bytes of soft labels made online are the teacher's weights. Image bytes are PNG files.")
    if results.repeats > 1:
        notes.append("Random real images are drawn anew for every student.")
    return notes


def draw_accuracy(results: Results, path: Path) -> None:
    """Draws accuracy.png: bars per recipe and student, the spread, every single student, the teacher and chance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row.protocol, row.student) for row in results.rows))
    sources = [source for source in IMAGE_SOURCES if any(row.images == source for row in results.rows)]
    figure = Figure(figsize=(max(6.0, 2.2 + 1.1 * len(groups) * len(sources)), 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(sources)
    highest = max([results.teacher_accuracy or 0.0, *(max(row.scores) for row in results.rows)])
    height = max(1.0, min(103.0, 108 * highest))
    for row in results.rows:
        center = (
            groups.index((row.protocol, row.student)) + (sources.index(row.images) - (len(sources) - 1) / 2) * width
        )
        _draw_bar(axes, row, center, 0.9 * width, height)
    _draw_lines(axes, results, len(groups))
    axes.set_xticks(range(len(groups)), [f"{student}\n{_protocol_label(protocol)}" for protocol, student in groups])
    axes.set_ylabel("top-1 accuracy on real test images (%)")
    axes.set_ylim(0, height)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= min(100, height)])
    axes.set_title(_figure_title(results), loc="left", fontsize=10.5, color=_INK, pad=26)
    _finish(axes, sources)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())


def _protocol_label(name: str) -> str:
    labels = get_protocol(name).labels
    return f"{labels} labels" if labels == name else f"{labels} labels ({name})"


def _figure_title(results: Results) -> str:
    epochs = "" if results.epochs_override is None else f", {results.epochs_override} epochs (--epochs)"
    repeats = "" if results.repeats == 1 else f", mean ± std of {results.repeats}"
    return f"{results.dataset}, {results.ipc} per class{epochs}; last epoch{repeats}"


def _draw_bar(axes: Any, row: Row, center: float, width: float, height: float) -> None:
    mean, std = 100 * row.mean, 100 * (row.std or 0.0)
    axes.bar(center, mean, width, color=_COLOURS[row.images], zorder=2)
    if row.std is not None:
        axes.errorbar(center, mean, std, color=_INK, capsize=3, linewidth=1.1, zorder=4)
        spots = [center + width * 0.3 * (i / (len(row.scores) - 1) - 0.5) for i in range(len(row.scores))]
        axes.scatter(spots, [100 * s for s in row.scores], s=9, color="white", edgecolor=_INK, linewidth=0.6, zorder=5)
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
        color=_ON_BAR[row.images] if inside else _INK,
        zorder=6,
    )


def _draw_lines(axes: Any, results: Results, num_groups: int) -> None:
    lines = [("chance", 1 / results.num_classes, ":")]
    if results.teacher_accuracy is not None:
        lines.append((f"teacher {100 * results.teacher_accuracy:.1f}", results.teacher_accuracy, "--"))
    axes.set_xlim(-0.55, num_groups - 1 + 0.55)
    for text, level, style in lines:
        axes.axhline(100 * level, color=_INK, linewidth=0.9, linestyle=style, zorder=3)
        axes.annotate(
            text, (1.0, 100 * level), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", fontsize=8.5, color=_INK, annotation_clip=False,
        )  # fmt: skip


def _finish(axes: Any, sources: list[str]) -> None:
    from matplotlib.patches import Patch

    axes.grid(axis="y", color=_FAINT, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(
        handles=[Patch(color=_COLOURS[source], label=source) for source in sources],
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(sources), frameon=False, fontsize=9,
        borderaxespad=0.2, handlelength=1.0, columnspacing=1.4,
    )  # fmt: skip
