"""The results of an evaluation: a table for people, results.json for programs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddgen.checkpoint import write_bytes
from ddgen.evaluation.measures import CrossTable, Robustness, cross_architecture, dd_ranking
from ddgen.evaluation.protocol_files import to_plain
from ddgen.evaluation.protocols import Protocol
from ddgen.evaluation.rank_correlation import CONFIDENCE, Correlation, Ranking
from ddgen.evaluation.rows import FULL_REAL, Row
from ddgen.units import readable_bytes


@dataclass(frozen=True)
class Results:
    """All rows and what they were measured on.

    Attributes:
        rows: The table.
        dataset: Name of the real dataset.
        num_classes: Its classes k.
        num_test: Real test images scored.
        image_size: Side in pixels.
        ipc: Images per class, the most where classes differ.
        num_images: Images distilled.
        repeats: Students per row.
        seed: The user's seed.
        epochs_override: `--epochs`, or None where the protocols' own epochs were used.
        flip: Whether training images were mirrored, as the protocols do.
        teachers: Name and top-1 fraction on the same test images of every observer.
        recipes: The protocols.
        precision: Autocast precision.
        device: Kind of device.
        ranking: How the sets order candidates, where that was asked for.
    """

    rows: tuple[Row, ...]
    dataset: str
    num_classes: int
    num_test: int
    image_size: int
    ipc: int
    num_images: int
    repeats: int
    seed: int
    epochs_override: int | None
    flip: bool
    teachers: tuple[tuple[str, float], ...]
    recipes: tuple[Protocol, ...]
    precision: str
    device: str
    ranking: Ranking | None = None

    def recipe(self, name: str) -> Protocol:
        """Returns the protocol of a row."""
        return next(recipe for recipe in self.recipes if recipe.name == name)

    @property
    def epochs_changed(self) -> tuple[str, ...]:
        """Protocols whose own number of epochs is not that of `--epochs`."""
        asked = self.epochs_override
        return tuple(recipe.name for recipe in self.recipes if asked not in (None, _own_epochs(self, recipe)))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON: fractions, bytes and seconds."""
        own = ("rows", "teachers", "recipes", "ranking")
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in own}
        plain["score"] = "top-1 fraction on the real test images after the last epoch"
        plain["epochs_changed"] = list(self.epochs_changed)
        plain["teachers"] = dict(self.teachers)
        plain["protocols"] = {recipe.name: to_plain(recipe) for recipe in self.recipes}
        plain["rows"] = [
            {
                **dataclasses.asdict(row),
                "mean": row.mean,
                "std": row.std,
                "best_epoch_mean": row.best_epoch_mean,
                "top5_mean": row.top5_mean,
            }
            for row in self.rows
        ]
        plain["cross_architecture"] = [table.to_dict() for table in cross_architecture(self.rows)]
        plain["dd_ranking"] = [dataclasses.asdict(score) for score in dd_ranking(self.rows, self.recipes)]
        if self.ranking is not None:
            plain["ranking"] = {"confidence": CONFIDENCE, **dataclasses.asdict(self.ranking)}
        return plain


def write_results(results: Results, path: Path) -> None:
    """Writes results.json, whole or not at all; lists of numbers, as a confusion matrix has, take a line each."""
    text = json.dumps(results.to_dict(), indent=2, allow_nan=False)
    text = re.sub(r"\[[\s\d.,eE+-]+\]", lambda found: " ".join(found[0].split()), text)
    write_bytes(path, (text + "\n").encode())


def format_score(row: Row) -> str:
    """Returns the score in percent, with the spread where there is one."""
    spread = "" if row.std is None else f" ± {100 * row.std:.1f}"
    return f"{100 * row.mean:.1f}{spread}"


def format_table(results: Results) -> str:
    """Returns the tables with their heading and what must be known to read them, as plain text."""
    with_top5 = any(row.top5_scores is not None for row in results.rows)
    several = len({row.teacher for row in results.rows if row.teacher is not None}) > 1
    names = ("images", "protocol", "student", *(("teacher",) if several else ()))
    numbers = ("last epoch", *(("top-5",) if with_top5 else ()), "best epoch", "epochs", "image bytes", "label bytes")
    lines: list[tuple[str, ...]] = [(*names, *numbers)]
    gaps = set()
    previous: Row | None = None
    for row in results.rows:
        group = (row.protocol, row.student, row.teacher)
        if previous is not None and group != (previous.protocol, previous.student, previous.teacher):
            gaps.add(len(lines))
        lines.append(_cells(row, results, several, with_top5))
        previous = row
    blocks = [_heading(results), _align(lines, gaps, len(names))]
    blocks += [_cross_lines(table) for table in cross_architecture(results.rows)]
    scores = [s for s in dd_ranking(results.rows, results.recipes) if s.lrs is not None or s.ars is not None]
    blocks += [_robustness_lines(scores)] if scores else []
    blocks += [_ranking_lines(results.ranking)] if results.ranking is not None else []
    return "\n".join("\n".join(block) + "\n" for block in blocks) + "\n" + "\n".join(_notes(results))


def _cells(row: Row, results: Results, several: bool, with_top5: bool) -> tuple[str, ...]:
    starred = row.protocol in results.epochs_changed or row.images == FULL_REAL
    top5 = "-" if row.top5_mean is None else f"{100 * row.top5_mean:.1f}"
    return (
        row.images,
        row.protocol,
        row.student,
        *((row.teacher or "-",) if several else ()),
        format_score(row),
        *((top5,) if with_top5 else ()),
        f"({100 * row.best_epoch_mean:.1f})",
        f"{row.epochs}{'*' if starred else ''}",
        readable_bytes(row.image_bytes),
        readable_bytes(row.label_bytes),
    )


def _align(lines: list[tuple[str, ...]], gaps: set[int], num_names: int) -> list[str]:
    """Names to the left, numbers to the right, a rule under the header and a blank line before each in `gaps`."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    out = []
    for index, line in enumerate(lines):
        if index in gaps:
            out.append("")
        cells = [
            cell.ljust(width) if column < num_names else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
        if index == 0:
            out.append("  ".join("-" * width for width in widths))
    return out


def _cross_lines(table: CrossTable) -> list[str]:
    lines = [("observer", *table.students)]
    lines += [
        (teacher, *(format_score(row) for row in rows))
        for teacher, rows in zip(table.teachers, table.rows, strict=True)
    ]
    return [f"{table.protocol} on the distilled images: observers down, students across", *_align(lines, set(), 1)]


def _robustness_lines(scores: Sequence[Robustness]) -> list[str]:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    lines: list[tuple[str, ...]] = [("student", "protocol", "teacher", "HLR", "IOR", "LRS", "ARS")]
    for s in scores:
        numbers = (text(value) for value in (s.hlr, s.ior, s.lrs, s.ars))
        lines.append((s.student, s.protocol, s.teacher or "-", *numbers))
    title = "DD-Ranking's scores, of fractions: the lower HLR, the higher the others, the better"
    return [title, *_align(lines, set(), 3)]


def _ranking_lines(ranking: Ranking) -> list[str]:
    lines: list[tuple[str, ...]] = [("images", "epochs", "Spearman", "interval", "Kendall", "interval")]
    for one in ranking.sets:
        lines.append((one.images, str(one.epochs), *_correlation(one.spearman), *_correlation(one.kendall)))
    by = f" by {ranking.teacher}" if ranking.teacher else ""
    return [
        f"Rank correlation with {ranking.real_epochs} epochs on all real images, of the test accuracies of "
        f"{len(ranking.candidates)} candidates",
        f"{ranking.protocol}{by}, one student each; {CONFIDENCE:.0%} bootstrap interval over the candidates",
        *_align(lines, set(), 1),
        *(f"{name}: the loss diverged, which counts as chance" for name in ranking.diverged),
    ]


def _correlation(found: Correlation) -> tuple[str, str]:
    if found.value is None:
        return "-", "-"
    return f"{found.value:.2f}", f"{found.low:.2f} to {found.high:.2f}"


def _heading(results: Results) -> list[str]:
    repeats = "1 student per row" if results.repeats == 1 else f"{results.repeats} students per row, mean ± std"
    images = f"{results.ipc} image{'s' if results.ipc != 1 else ''} per class"
    if results.num_images != results.ipc * results.num_classes:
        images = f"up to {images} ({results.num_images:,} in all)"
    lines = [
        f"Top-1 accuracy in percent on the {results.num_test:,} real test images of {results.dataset}",
        f"{results.num_classes} classes, {images} of {results.image_size} x {results.image_size} px, {repeats}, "
        f"seed {results.seed}",
    ]
    for name, accuracy in results.teachers:
        lines.append(f"Teacher: {name}, {100 * accuracy:.1f} on the same test images")
    return lines


def _notes(results: Results) -> list[str]:
    notes = [f"{recipe.name}: {recipe.title}" for recipe in results.recipes]
    notes.append(
        "The score is the last epoch's. The best epoch, of at most ten scored, is chosen on the test set: not a score."
    )
    if results.epochs_changed:
        changed = map(results.recipe, results.epochs_changed)
        own = ", ".join(f"{_own_epochs(results, recipe)} of {recipe.name}" for recipe in changed)
        notes.append(f"* --epochs {results.epochs_override} instead of {own}: not comparable with published numbers.")
    if any(row.images == FULL_REAL for row in results.rows):
        notes.append("* On all real images students train for fewer epochs than the protocol's.")
    for recipe in results.recipes:
        others = {row.student for row in results.rows if row.protocol == recipe.name} - {recipe.student}
        if recipe.student and others:
            notes.append(f"{recipe.name} prescribes {recipe.student}; {', '.join(sorted(others))} is not comparable.")
    if not results.flip:
        notes.append("Without the protocols' mirroring: a mirror image would be another class.")
    if any(recipe.labels == "soft" for recipe in results.recipes):
        notes.append("Label bytes of soft labels made online are the teacher's weights. Image bytes are PNG files.")
    if any(row.images == FULL_REAL and len(row.scores) < results.repeats for row in results.rows):
        notes.append("One student is trained on all real images.")
    if results.repeats > 1 and any(row.images == "random real" for row in results.rows):
        notes.append("Random real images are drawn anew for every student.")
    if any(row.images == "rded real" for row in results.rows):
        notes.append("rded real: crops of real images by RDED, with the first observer, drawn anew for every student.")
    return notes


def _own_epochs(results: Results, recipe: Protocol) -> int:
    student = next((row.student for row in results.rows if row.protocol == recipe.name), "")
    return recipe.epochs(results.ipc, dataset=results.dataset, network=student)
