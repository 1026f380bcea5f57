"""Accuracy: all rows of a run's evaluations, beside each other, and what papers have published of the same recipe."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddgen.evaluation.protocols import PROTOCOLS
from ddgen.evaluation.rows import FULL_REAL, IMAGE_SOURCES
from ddgen.page.run import EvaluatedSet, RunRecord
from results_page.small import count, join, table

OURS = "distilled"
PROTOCOLS_IN_A_TABLE = 2


@dataclass(frozen=True)
class Published:
    """Numbers from a paper's table, in percent.

    Attributes:
        title: Of the row.
        protocol: Of the students.
        student: Network, whose kind is also the observer's.
        data: Name, classes and side in pixels of the dataset.
        scores: Images per class -> accuracy.
    """

    title: str
    protocol: str
    student: str
    data: tuple[str, int, int]
    scores: Mapping[int, float]


_CIFAR10, _CIFAR100, _TINY = ("cifar10", 10, 32), ("cifar100", 100, 32), ("tinyimagenet", 200, 64)
_RDED = "published RDED (full-scale observer{})"
_WINNER = "published, rank 1 of the challenge"
# Sun et al., "On the Diversity and Realism of Distilled Dataset", CVPR 2024: its tables and the accuracy of its
# observers; the ranking of the First Dataset Distillation Challenge, ECCV 2024. Other papers' recipes are not one of
# our protocols throughout, so their numbers do not belong beside ours.
PUBLISHED = (
    Published(_RDED.format(", 82.2"), "rded", "convnet3", _CIFAR10, {1: 23.5, 10: 50.2, 50: 68.4}),
    Published(_RDED.format(", 61.3"), "rded", "convnet3", _CIFAR100, {1: 19.6, 10: 48.1, 50: 57.0}),
    Published(_RDED.format(", 49.7"), "rded", "convnet4", _TINY, {1: 12.0, 10: 39.6, 50: 47.6}),
    Published(_RDED.format(", 93.9"), "rded", "resnet18", _CIFAR10, {1: 22.9, 10: 37.1, 50: 62.1}),
    Published(_RDED.format(", 72.3"), "rded", "resnet18", _CIFAR100, {1: 11.0, 10: 42.6, 50: 62.6}),
    Published(_RDED.format(", 62.0"), "rded", "resnet18", _TINY, {1: 9.7, 10: 41.9, 50: 58.2}),
    Published(_RDED.format(""), "rded", "resnet18", ("imagenet1k", 1000, 224), {1: 6.6, 10: 42.0, 50: 56.5}),
    Published(_WINNER, "eccv2024-track1", "convnet3", _CIFAR100, {10: 40.6}),
    Published(_WINNER, "eccv2024-track1", "convnet3", _TINY, {10: 18.3}),
)


@dataclass(frozen=True)
class Recipe:
    """What heads the columns of a table: how students were trained, but for the images.

    Attributes:
        protocol: Its name.
        teacher: Who labels online, or None.
        epochs: `--epochs` where they are not the protocol's own; otherwise None.
    """

    protocol: str
    teacher: str | None
    epochs: int | None

    @property
    def order(self) -> tuple[object, ...]:
        """Sorts recipes, whatever their epochs: as the protocols are listed in the product."""
        names = list(PROTOCOLS)
        place = names.index(self.protocol) if self.protocol in names else len(names)
        return place, self.protocol, self.teacher or ""


Column = tuple[Recipe, int]
"""A recipe and the images per class."""


@dataclass(frozen=True)
class Scores:
    """All rows of one network.

    Attributes:
        student: The network.
        cells: Title of the images -> column -> row of results.json.
        published: Title -> column -> percent.
    """

    student: str
    cells: dict[str, dict[Column, Mapping[str, Any]]]
    published: dict[str, dict[Column, float]]

    @property
    def columns(self) -> list[Column]:
        """In the order of the page."""
        found = {column for row in self.cells.values() for column in row}
        return sorted(found, key=lambda column: (column[0].order, column[1], column[0].epochs or 0))

    @property
    def recipes(self) -> list[Recipe]:
        """In the order of the page."""
        return list(dict.fromkeys(recipe for recipe, _ in self.columns))

    @property
    def panels(self) -> list[list[Column]]:
        """Columns that one picture can hold: of one protocol and teacher, and every ipc once."""
        groups: dict[tuple[object, ...], list[Column]] = {}
        for column in self.columns:
            groups.setdefault(column[0].order, []).append(column)
        panels = []
        for alike in groups.values():
            if len({ipc for _, ipc in alike}) == len(alike):
                panels.append(alike)
            else:
                recipes = dict.fromkeys(recipe for recipe, _ in alike)
                panels += [[column for column in alike if column[0] == recipe] for recipe in recipes]
        return panels

    @property
    def repeats(self) -> int:
        """Students of most cells."""
        return statistics.mode(sorted(len(row["scores"]) for cells in self.cells.values() for row in cells.values()))


def collect(run: RunRecord) -> list[Scores]:
    """Returns the rows of all evaluations of a run, by network.

    Two evaluations of the same images by the same recipe with other scores are both told, each under its name.
    """
    found: dict[str, Scores] = {}
    for shown in run.sets:
        for row in shown.results.get("rows", ()):
            scores = found.setdefault(row["student"], Scores(row["student"], {}, {}))
            changed = row["protocol"] in shown.results.get("epochs_changed", ())
            epochs = shown.results.get("epochs_override") if changed else None
            recipe = Recipe(row["protocol"], _teacher(row, shown.results), epochs)
            column, title = (recipe, shown.results["ipc"]), _row_title(row, shown)
            before = scores.cells.get(title, {}).get(column)
            if before is not None and before["scores"] != row["scores"]:
                title = f"{title} [{shown.name}]"
            scores.cells.setdefault(title, {})[column] = row
            for known in PUBLISHED:
                if column[1] in known.scores and _comparable(known, row["student"], recipe, shown.results):
                    scores.published.setdefault(known.title, {})[column] = known.scores[column[1]]
    ordered = sorted(found.values(), key=lambda scores: scores.student)
    return [replace(scores, cells={title: scores.cells[title] for title in _order(scores.cells)}) for scores in ordered]


def _order(titles: Iterable[str]) -> list[str]:
    """Sorts titles of rows: as sources are listed in the product, then by name."""

    def place(title: str) -> int:
        known = [i for i, source in enumerate(IMAGE_SOURCES) if re.match(re.escape(source) + r"( [\[(]|$)", title)]
        return known[0] if known else len(IMAGE_SOURCES)

    return sorted(titles, key=lambda title: (place(title), title))


def _row_title(row: Mapping[str, Any], shown: EvaluatedSet) -> str:
    """Names the images; of distilled sets beside the plain one, what their folder's name has beside the number."""
    if row["images"] != OURS:
        return str(row["images"])
    folder = Path(shown.provenance.get("distilled_dir", shown.name)).name
    rest = re.sub(r"(^|[-_])ipc\d+", "", folder).strip("-_")
    return f"{OURS} ({rest})" if rest else OURS


def _teacher(row: Mapping[str, Any], results: Mapping[str, Any]) -> str | None:
    """Who labels online; earlier files name one for all rows."""
    labels = results.get("protocols", {}).get(row["protocol"], {}).get("labels")
    if "teacher" in row:
        return row["teacher"]
    return results.get("teacher") if labels == "soft" or row["protocol"] in ("rded", "strong") else None


def _comparable(known: Published, student: str, recipe: Recipe, results: Mapping[str, Any]) -> bool:
    data = (results["dataset"], results["num_classes"], results.get("image_size"))
    same = (known.protocol, known.student, known.data) == (recipe.protocol, student, data)
    return same and recipe.epochs is None and recipe.teacher in (None, student)


def accuracy_parts(run: RunRecord, scores: Scores) -> list[str]:
    """Returns tables of at most two protocols each, what they compare, and what must be known to read them."""
    protocols = list(dict.fromkeys(recipe.protocol for recipe in scores.recipes))
    parts = []
    for start in range(0, len(protocols), PROTOCOLS_IN_A_TABLE):
        chosen = protocols[start : start + PROTOCOLS_IN_A_TABLE]
        columns = [column for column in scores.columns if column[0].protocol in chosen]
        parts += [_score_table(scores, columns), _difference_table(scores, columns)]
    return [*parts, "\n".join(f"- {note}" for note in _notes(run, scores))]


def _score_table(scores: Scores, columns: list[Column]) -> str:
    body = []
    for title, row in scores.cells.items():
        cells = [_score(row[column], scores.repeats) if column in row else "" for column in columns]
        if any(cells):
            body.append((title, *cells))
    for title, known in scores.published.items():
        cells = [f"*{known[column]:.1f}*" if column in known else "" for column in columns]
        if any(cells):
            body.append((f"*{title}*", *cells))
    return table(("images", *(_column_title(scores, column) for column in columns)), body)


def _column_title(scores: Scores, column: Column) -> str:
    recipe, ipc = column
    several = len({other.teacher for other in scores.recipes if other.protocol == recipe.protocol}) > 1
    by = f" by {recipe.teacher}" if several and recipe.teacher else ""
    epochs = f" ({count(recipe.epochs, 'epoch')})" if recipe.epochs is not None else ""
    return f"{recipe.protocol}{by}{epochs}, ipc {ipc}"


def _score(row: Mapping[str, Any], repeats: int) -> str:
    """Returns the score in percent, its spread, and how many students where that is not the table's number."""
    spread = "" if row.get("std") is None else f" ± {100 * row['std']:.1f}"
    number = len(row["scores"])
    return f"{100 * row['mean']:.1f}{spread}" + (f" (n = {number})" if number != repeats else "")


def _difference_table(scores: Scores, columns: list[Column]) -> str:
    """Says in plain words where distilled images are above or below a baseline."""
    body = []
    for ours in [title for title in scores.cells if title.startswith(OURS)]:
        for other in [source for source in IMAGE_SOURCES if source not in (OURS, FULL_REAL)]:
            theirs = scores.cells.get(other, {})
            cells = [_difference(scores.cells[ours].get(column), theirs.get(column)) for column in columns]
            if any(cells):
                body.append((f"{ours} minus {other}", *cells))
    return table(("difference, points", *(_column_title(scores, column) for column in columns)), body) if body else ""


def _difference(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> str:
    if ours is None or theirs is None:
        return ""
    points = 100 * (ours["mean"] - theirs["mean"])
    text = f"{round(points, 1) + 0.0:+.1f}"  # never -0.0
    if ours.get("std") is None or theirs.get("std") is None:
        return text
    if abs(points) <= 100 * (ours["std"] + theirs["std"]):
        return f"{text} within the spread"
    return f"{text} {'above' if points > 0 else 'below'}"


def _notes(run: RunRecord, scores: Scores) -> list[str]:
    """Returns what must be known to read the tables of a network."""
    rows = [row for cells in scores.cells.values() for row in cells.values()]
    evaluated = [shown.results for shown in run.sets if shown.results.get("rows")]
    seeds = join(found.get("seed") for found in evaluated)
    notes = [f"{count(scores.repeats, 'student')} a cell unless it says otherwise; seed {seeds}."]
    if any(row["images"] == "rded real" for row in rows):
        notes.append("rded real: crops of real images, distilled by RDED with the first observer.")
    if any(row.get("std") is not None for row in rows):
        notes.append(
            "Above or below: by more than both standard deviations together. They are of training students, and of"
            " drawing random real and rded real images anew; the distilled images are one set, from one generator."
        )
    if any(row.get("std") is None for row in rows):
        notes.append("A difference without a word is one whose spread is not known: of one student.")
    for protocol in dict.fromkeys(recipe.protocol for recipe in scores.recipes):
        full = [row["epochs"] for row in rows if row["protocol"] == protocol and row["images"] == FULL_REAL]
        own = [row["epochs"] for row in rows if row["protocol"] == protocol and row["images"] != FULL_REAL]
        text = PROTOCOLS[protocol].title if protocol in PROTOCOLS else "a protocol from a file"
        extra = f"; {join(full)} on all real images" if full else ""
        notes.append(f"`{protocol}`: {text}. Epochs: {join(own)}{extra}.")
    for name, accuracy in teachers_of(run).items():
        notes.append(f"Teacher {name}: {100 * accuracy:.1f} on the same test images.")
    if any(recipe.epochs is not None for recipe in scores.recipes):
        notes.append("Epochs in a heading are `--epochs`, not the protocol's: not comparable with published numbers.")
    if any(found.get("flip") is False for found in evaluated):
        notes.append("Without the protocols' mirroring: a mirror image would be another class.")
    if scores.published:
        notes.append("Published rows stand for the method on the original data; they were not measured here.")
    return notes


def teachers_of(run: RunRecord) -> dict[str, float]:
    """Returns the top-1 fraction of every observer that labelled, on the real test images."""
    found: dict[str, float] = {}
    for shown in run.sets:
        earlier = {shown.results["teacher"]: shown.results["teacher_accuracy"]} if "teacher" in shown.results else {}
        found |= shown.results.get("teachers", earlier)
    return {name: accuracy for name, accuracy in found.items() if name and accuracy is not None}
