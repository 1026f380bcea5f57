"""The rows of a report: the students of one recipe on one set of images."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

FULL_REAL = "full real"
IMAGE_SOURCES = ("distilled", "random generated", "random real", "herding", "k-center", "rded real", FULL_REAL)


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
        label_bytes: What the labels take: class numbers, stored soft labels, or the weights of the teachers that label
            online.
        seconds: Wall-clock time of all repeats.
        teacher: Who labels online; None where nobody does.
        top5_scores: Top-5 fraction after the last epoch, one per repeat; None for five classes or fewer.
        recall: Of every class after the last epoch, mean over the repeats.
        confusion: Test images of class i named j after the last epoch, summed over the repeats; None for too many
            classes.
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
    teacher: str | None = None
    top5_scores: tuple[float, ...] | None = None
    recall: tuple[float, ...] = ()
    confusion: tuple[tuple[int, ...], ...] | None = None

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

    @property
    def top5_mean(self) -> float | None:
        """Mean top-5 fraction over the repeats; None for five classes or fewer."""
        return None if self.top5_scores is None else statistics.fmean(self.top5_scores)
