"""Rank correlation of accuracies, with a bootstrap interval: does a set order candidates as real training does?

After Ding et al., "Calibrated Dataset Condensation for Faster Hyperparameter Search" (HCDC), 2024, which asks this of
condensed graphs and images. What trains the candidates is in `ddgen.evaluation.ranking`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

CONFIDENCE = 0.95
RESAMPLES = 10_000

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Values (..., n) and (..., n) -> (...), NaN where all values of a side are equal."""


@dataclass(frozen=True)
class Correlation:
    """A rank correlation and its percentile interval; None where all values of a side are equal.

    Attributes:
        value: -1 to 1.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Candidate:
    """A student to choose or not.

    Attributes:
        network: Name for `build_network`.
        lr_factor: Times the learning rate of the recipe.
    """

    network: str
    lr_factor: float

    @property
    def name(self) -> str:
        """What people call it."""
        return self.network if self.lr_factor == 1 else f"{self.network}, learning rate x {self.lr_factor:g}"


@dataclass(frozen=True)
class RankedSet:
    """How one set of images orders the candidates.

    Attributes:
        images: One of `IMAGE_SOURCES`.
        epochs: Epochs trained, the most where networks differ.
        accuracies: Top-1 fraction of every candidate on the real test images after the last epoch.
        spearman: Of these accuracies and those after real training.
        kendall: The same, tau-b.
    """

    images: str
    epochs: int
    accuracies: tuple[float, ...]
    spearman: Correlation
    kendall: Correlation


@dataclass(frozen=True)
class Ranking:
    """How sets of images order candidates, next to how all real training images do.

    Attributes:
        protocol: Name of the recipe.
        teacher: Who labels online; None where nobody does.
        candidates: What is ordered.
        real_epochs: Epochs on all real images.
        real_accuracies: As `RankedSet.accuracies`, after training on all real images.
        sets: The distilled images, then the baselines.
        diverged: Students whose loss was not finite, which count as chance.
        seconds: Wall-clock time of all students.
    """

    protocol: str
    teacher: str | None
    candidates: tuple[Candidate, ...]
    real_epochs: int
    real_accuracies: tuple[float, ...]
    sets: tuple[RankedSet, ...]
    diverged: tuple[str, ...]
    seconds: float


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rho: the correlation of the ranks, ties at their mean rank."""
    ranks = [rankdata(values, axis=-1) for values in (a, b)]
    x, y = (rank - rank.mean(axis=-1, keepdims=True) for rank in ranks)
    return _ratio((x * y).sum(-1), (x**2).sum(-1), (y**2).sum(-1))


def kendall(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kendall's tau-b: agreeing pairs minus disagreeing ones, over the pairs that are no ties."""
    x, y = (np.sign(values[..., :, None] - values[..., None, :]).astype(np.int8) for values in (a, b))
    both = (x * y).sum(axis=(-2, -1), dtype=np.int64)
    return _ratio(both, np.count_nonzero(x, axis=(-2, -1)), np.count_nonzero(y, axis=(-2, -1)))


def with_interval(
    statistic: Statistic, a: np.ndarray, b: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Correlation:
    """Returns a statistic with its percentile bootstrap interval over the candidates (Efron, 1979).

    Candidates are drawn with replacement, each with both its values. Draws in which all values of a side are equal have
    no correlation and are left out.

    Args:
        statistic: `spearman` or `kendall`.
        a: Float (n,).
        b: Float (n,), of the same candidates.
        rng: Draws.
        resamples: How many draws.
    """
    value = float(statistic(a, b))
    if np.isnan(value):
        return Correlation(None, None, None)
    drawn = rng.integers(0, len(a), (resamples, len(a)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile(statistic(a[drawn], b[drawn]), [tail, 100 - tail])
    return Correlation(value, float(low), float(high))


def _ratio(product: np.ndarray, square_a: np.ndarray, square_b: np.ndarray) -> np.ndarray:
    """Returns product / sqrt(square_a * square_b), NaN for 0 / 0."""
    size = np.sqrt(np.asarray(square_a, dtype=np.float64) * np.asarray(square_b, dtype=np.float64))
    return np.divide(product, size, out=np.full_like(size, np.nan), where=size > 0)
