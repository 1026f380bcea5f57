"""What a table of scores says beyond its rows: cross-architecture tables and DD-Ranking's scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddgen.evaluation.protocols import PLAIN, Protocol
from ddgen.evaluation.rows import FULL_REAL, Row


@dataclass(frozen=True)
class CrossTable:
    """Scores by observer and student, of one recipe on the distilled images.

    Attributes:
        protocol: Name of the recipe.
        teachers: Observers that label, down.
        students: Networks, across.
        rows: The row of every pair, (teachers, students).
    """

    protocol: str
    teachers: tuple[str, ...]
    students: tuple[str, ...]
    rows: tuple[tuple[Row, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON: fractions."""
        return {
            "protocol": self.protocol,
            "images": "distilled",
            "observers": list(self.teachers),
            "students": list(self.students),
            "mean": [[row.mean for row in line] for line in self.rows],
            "std": [[row.std for row in line] for line in self.rows],
        }


def cross_architecture(rows: Sequence[Row]) -> list[CrossTable]:
    """Returns the tables of the recipes for which several observers label, observers down and students across."""
    tables = []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        cells = {
            (row.teacher, row.student): row
            for row in rows
            if row.protocol == protocol and row.images == "distilled" and row.teacher is not None
        }
        teachers = tuple(dict.fromkeys(teacher for teacher, _ in cells if teacher is not None))
        students = tuple(dict.fromkeys(student for _, student in cells))
        if len(teachers) > 1 and len(cells) == len(teachers) * len(students):
            lines = tuple(tuple(cells[teacher, student] for student in students) for teacher in teachers)
            tables.append(CrossTable(protocol, teachers, students, lines))
    return tables


@dataclass(frozen=True)
class Robustness:
    """DD-Ranking's scores of one student; all accuracies are fractions, which its code takes in percent.

    Li et al., "DD-Ranking: Rethinking the Evaluation of Dataset Distillation", 2025. What the rows at hand do not give
    is None.

    Attributes:
        student: The network.
        protocol: The recipe by which distilled images are compared with random real ones ("any").
        teacher: Who labels in it.
        hard_protocol: The recipe with hard labels by which they are compared with the full real data.
        hlr: Hard label recovery: accuracy(full real, hard) - accuracy(distilled, hard); low is good.
        ior: Improvement over random: accuracy(distilled, any) - accuracy(random real, any).
        lrs: Label-robust score in [0, 1].
        ars: Augmentation-robust score in [0, 1].
    """

    student: str
    protocol: str
    teacher: str | None
    hard_protocol: str | None
    hlr: float | None
    ior: float
    lrs: float | None
    ars: float | None


def normalised(difference: float) -> float:
    """Maps a difference of fractions, -1 to 1, to [0, 1]: `(e^x - e^-1) / (e - e^-1)`."""
    return (math.exp(difference) - math.exp(-1)) / (math.e - math.exp(-1))


def label_robust_score(hlr: float, ior: float) -> float:
    """Returns LRS, of equal weight on both: `alpha = (IOR - HLR) / 2`, normalised."""
    return normalised((ior - hlr) / 2)


def augmentation_robust_score(ior: float, ior_plain: float) -> float:
    """Returns ARS: the mean of the improvement over random with augmentation and without, normalised."""
    return normalised((ior + ior_plain) / 2)


def dd_ranking(rows: Sequence[Row], recipes: Sequence[Protocol]) -> list[Robustness]:
    """Returns DD-Ranking's scores of every student and recipe with distilled and random real rows.

    LRS needs the row of the full real data under a recipe with hard labels (``--with_full``), ARS the same recipe
    without augmentation (``--protocols hard hard-plain``).
    """
    means = {(row.student, row.protocol, row.teacher, row.images): row.mean for row in rows}
    hard = [recipe.name for recipe in recipes if recipe.labels == "hard" and not recipe.name.endswith(PLAIN)]
    found = []
    for student, protocol, teacher in dict.fromkeys((row.student, row.protocol, row.teacher) for row in rows):
        if protocol.endswith(PLAIN):
            continue
        ior = _difference(means, (student, protocol, teacher), "distilled", "random real")
        if ior is None:
            continue
        recoveries = {name: _difference(means, (student, name, None), FULL_REAL, "distilled") for name in hard}
        hard_protocol = next((name for name, value in recoveries.items() if value is not None), None)
        hlr = None if hard_protocol is None else recoveries[hard_protocol]
        plain = _difference(means, (student, protocol + PLAIN, teacher), "distilled", "random real")
        lrs = None if hlr is None else label_robust_score(hlr, ior)
        ars = None if plain is None else augmentation_robust_score(ior, plain)
        found.append(Robustness(student, protocol, teacher, hard_protocol, hlr, ior, lrs, ars))
    return found


def _difference(
    means: dict[tuple[str, str, str | None, str], float], of: tuple[str, str, str | None], first: str, second: str
) -> float | None:
    a, b = means.get((*of, first)), means.get((*of, second))
    return None if a is None or b is None else a - b
