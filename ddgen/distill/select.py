"""Which candidates of a class are kept: the rules of the literature and our own, behind one function.

A rule sees the candidates of one class and nothing of the others, sorted by their numbers, so the order in which they
arrive cannot matter. It returns all positions that it would keep in order of preference, no position twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ddgen.config import Selection
from ddgen.errors import UserError
from ddgen.observer.realism import RealismScores
from ddgen.seeds import numpy_generator

LEAST_LOSS = 1e-6  # below it, a loss is rounding


@dataclass(frozen=True)
class Candidates:
    """The scored candidates of one class.

    Attributes:
        scores: What the observer says of the m candidates.
        numbers: Each candidate's number within its class, int64 (m,), no number twice; decides between equals.
        class_index: Which class.
        seed: Of rules that draw.
        real: What the observer says of real images of the class, where it was asked.
    """

    scores: RealismScores
    numbers: Tensor
    class_index: int
    seed: int
    real: RealismScores | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def rows(self, index: Tensor) -> Candidates:
        """Returns some of the candidates, int64 (n,) positions."""
        return dataclasses.replace(self, scores=self.scores.rows(index), numbers=self.numbers[index])


@dataclass(frozen=True)
class SelectionNeeds:
    """What a rule looks at beside the losses: features of the candidates, scores with features of real images."""

    features: bool
    real: bool


def selection_needs(rule: Selection) -> SelectionNeeds:
    """Returns what has to be at hand for a rule."""
    return SelectionNeeds(
        features=rule in ("herding", "k-center", "diverse-realism"),
        real=rule in ("difficulty-match", "herding", "diverse-realism"),
    )


def select(rule: Selection, candidates: Candidates, ipc: int) -> Tensor:
    """Keeps `ipc` candidates of a class by a rule.

    Args:
        rule: Name of the rule.
        candidates: Of one class, with what `selection_needs` names.
        ipc: How many to keep.

    Returns:
        Positions in `candidates`, int64 (ipc,), no position twice, the preferred first.

    Raises:
        UserError: There are fewer candidates than `ipc`.
        ValueError: A number is not finite or stands twice, or something that the rule needs is missing.
    """
    _check_enough(len(candidates), ipc)
    if not torch.isfinite(candidates.scores.loss).all():
        raise ValueError("a realism loss is not finite")
    if len(candidates.numbers.unique()) != len(candidates):
        raise ValueError("numbers: two candidates of a class have the same")
    by_number = candidates.numbers.cpu().argsort()
    return by_number[_RULES[rule](candidates.rows(by_number), ipc)[:ipc]]


def select_most_realistic(losses: Tensor, ipc: int, indices: Tensor | None = None) -> Tensor:
    """Keeps the candidates with the lowest realism loss (RDED's rule, Sun et al., CVPR 2024, section 4).

    Args:
        losses: Realism loss of each candidate of one class, float (m,); lower is more realistic.
        ipc: How many to keep.
        indices: Numbers of the candidates, int64 (m,), which decide between equal losses, so that the
            order in which candidates arrive is irrelevant. Default: their positions.

    Returns:
        Positions in `losses`, int64 (ipc,), the most realistic first.

    Raises:
        UserError: There are fewer candidates than `ipc`.
        ValueError: A loss is not finite.
    """
    _check_enough(len(losses), ipc)
    if not torch.isfinite(losses).all():
        raise ValueError("a realism loss is not finite")
    by_index = torch.arange(len(losses)) if indices is None else indices.cpu().argsort()
    return by_index[losses.cpu()[by_index].argsort(stable=True)][:ipc]


def select_random(num_candidates: int, ipc: int, seed: int, class_index: int) -> Tensor:
    """Keeps candidates at random: the baseline every selection rule has to beat.

    A larger `ipc` keeps all that a smaller one keeps.

    Returns:
        Positions, int64 (ipc,), no position twice.

    Raises:
        UserError: There are fewer candidates than `ipc`.
    """
    _check_enough(num_candidates, ipc)
    order = numpy_generator(seed, "select_random", class_index).permutation(num_candidates)
    return torch.from_numpy(order[:ipc].copy())


def _realism(candidates: Candidates, ipc: int) -> Tensor:
    """The most realistic first: see `select_most_realistic`."""
    return candidates.scores.loss.argsort(stable=True)


def _random(candidates: Candidates, ipc: int) -> Tensor:
    """At random: see `select_random`."""
    return select_random(len(candidates), ipc, candidates.seed, candidates.class_index)


def _confident_correct(candidates: Candidates, ipc: int) -> Tensor:
    """Those that the observer names rightly, the surest first; then the others by realism.

    Wang et al., "CaO2: Rectifying Inconsistencies in Diffusion-Based Dataset Distillation", ICCV 2025, which takes
    this rule for 10 images per class.
    """
    order = _realism(candidates, ipc)
    correct = _correct(candidates)[order]
    return torch.cat([order[correct], order[~correct]])


def _least_confident_correct(candidates: Candidates, ipc: int) -> Tensor:
    """Those that the observer names rightly, the least sure first; then the others by realism.

    CaO2's rule for 50 images per class.
    """
    order = candidates.scores.loss.argsort(stable=True, descending=True)
    rest = _realism(candidates, ipc)
    correct = _correct(candidates)
    return torch.cat([order[correct[order]], rest[~correct[rest]]])


def _middle(candidates: Candidates, ipc: int) -> Tensor:
    """The middle of the ranking by realism, outwards; of two as far out, the more realistic first.

    Shen et al., "DELT: A Simple Diversity-driven EarlyLate Training for Dataset Distillation", CVPR 2025, takes
    patches of median score.
    """
    order = _realism(candidates, ipc)
    outwards = (2 * torch.arange(len(order)) - (len(order) - 1)).abs().argsort(stable=True)
    return order[outwards]


def _difficulty_match(candidates: Candidates, ipc: int) -> Tensor:
    """Those whose losses are distributed like the real images' losses, the most realistic first.

    Li et al., "Task-Specific Generative Dataset Distillation with Difficulty-Guided Sampling", 2025, fill a histogram
    of the real images' difficulty, on a logarithmic scale. Here it has `ipc` bins of equal mass with one image each:
    of all choices, the one whose log losses have the least total distance to the middles of the bins.
    """
    real = _real(candidates, "difficulty-match")
    middles = (torch.arange(ipc, dtype=torch.float64) + 0.5) / ipc
    wanted = _log_loss(real.loss).quantile(middles)
    cost = (wanted[:, None] - _log_loss(candidates.scores.loss)[None]).abs()
    _, chosen = linear_sum_assignment(cost.numpy())
    kept = torch.from_numpy(chosen).sort().values
    return kept[candidates.scores.loss[kept].argsort(stable=True)]


def _herding(candidates: Candidates, ipc: int) -> Tensor:
    """Those whose mean feature follows the real class's: see `herding`."""
    return herding(_features(candidates.scores, "herding"), _features(_real(candidates, "herding"), "herding"), ipc)


def herding(features: Tensor, target: Tensor, count: int) -> Tensor:
    """Takes, one after another, those whose mean feature follows another set's.

    Welling, "Herding dynamical weights to learn", ICML 2009: keep the x with the largest
    <w, f(x)>, then w <- w + mean - f(x), from w = mean; here no x twice. Features have length one, so that
    a large one has no advantage.

    Args:
        features: Of those to choose from, (n, d).
        target: Whose mean is followed, (r, d).
        count: How many to take, at most n.

    Returns:
        Positions, int64 (count,), in the order in which they are taken.
    """
    directions, mean = _directions(features), _directions(target).mean(axis=0)
    weight, free = mean.copy(), np.zeros(len(directions))
    chosen: list[int] = []
    for _ in range(count):
        best = int(np.argmax(directions @ weight + free))  # the first of equals
        chosen.append(best)
        free[best] = -np.inf
        weight += mean - directions[best]
    return torch.tensor(chosen, dtype=torch.int64)


def _k_center(candidates: Candidates, ipc: int) -> Tensor:
    """Those from which no candidate is far: see `k_center`."""
    return k_center(_features(candidates.scores, "k-center"), ipc)


def k_center(features: Tensor, count: int) -> Tensor:
    """Takes, one after another, the farthest from those before, beginning with the one nearest to the mean.

    Sener and Savarese, "Active learning for convolutional neural networks: a core-set approach", ICLR 2018,
    algorithm 1: greedily, at most twice the smallest possible radius around `count` of them that holds all.

    Args:
        features: (n, d).
        count: How many to take, at most n.

    Returns:
        Positions, int64 (count,), in the order in which they are taken.
    """
    points = features.double().numpy()
    first = int(np.argmin(((points - points.mean(axis=0)) ** 2).sum(axis=1)))
    chosen: list[int] = []
    distance = np.full(len(points), np.inf)
    for _ in range(count):
        best = int(np.argmax(distance)) if chosen else first
        chosen.append(best)
        distance = np.minimum(distance, ((points - points[best]) ** 2).sum(axis=1))
        distance[chosen] = -1.0  # equal images have distance 0, and none is kept twice
    return torch.tensor(chosen, dtype=torch.int64)


def _diverse_realism(candidates: Candidates, ipc: int) -> Tensor:
    """Realism and diversity together: candidates above a realism floor that together stand for the real class.

    The floor: named rightly, and in the better half of the ranking; where fewer than `ipc` are above it, the next
    of `confident-correct` join them. Among them the greedy maximum of facility location, the sum over the real
    images' features of the largest cosine with a kept image's (Mirzasoleiman et al., "Distributed submodular
    maximization", NeurIPS 2013; greedily at least 1 - 1/e of the best, Nemhauser et al., 1978). Realism alone
    keeps many of one easy kind, diversity alone keeps the odd ones.
    """
    half = torch.zeros(len(candidates), dtype=torch.bool)
    half[_realism(candidates, ipc)[: -(-len(candidates) // 2)]] = True
    count = max(ipc, int((half & _correct(candidates)).sum()))
    floor = _confident_correct(candidates, ipc)[:count]  # by realism, so that it decides between equals
    kept = _directions(_features(candidates.scores, "diverse-realism"))[floor.numpy()]
    real = _directions(_features(_real(candidates, "diverse-realism"), "diverse-realism"))
    similarity = 1.0 + real @ kept.T  # (r, count), not negative
    chosen: list[int] = []
    reached = np.zeros(len(real))
    for _ in range(ipc):
        gains = np.maximum(similarity - reached[:, None], 0.0).sum(axis=0)
        gains[chosen] = -1.0
        chosen.append(int(np.argmax(gains)))
        reached = np.maximum(reached, similarity[:, chosen[-1]])
    return floor[torch.tensor(chosen)]


_RULES: dict[Selection, Callable[[Candidates, int], Tensor]] = {
    "realism": _realism,
    "random": _random,
    "confident-correct": _confident_correct,
    "least-confident-correct": _least_confident_correct,
    "middle": _middle,
    "difficulty-match": _difficulty_match,
    "herding": _herding,
    "k-center": _k_center,
    "diverse-realism": _diverse_realism,
}


def _correct(candidates: Candidates) -> Tensor:
    return candidates.scores.predicted == candidates.class_index


def _real(candidates: Candidates, rule: str) -> RealismScores:
    if candidates.real is None:
        raise ValueError(f"{rule}: needs the scores of real images of the class")
    return candidates.real


def _features(scores: RealismScores, rule: str) -> Tensor:
    if scores.features is None:
        raise ValueError(f"{rule}: needs features")
    if not torch.isfinite(scores.features).all():
        raise ValueError("a feature is not finite")
    return scores.features


def _directions(features: Tensor) -> np.ndarray:
    """Returns features (n, d) at length one, float64; zeros stay zeros."""
    directions: np.ndarray = torch.nn.functional.normalize(features.double(), dim=1).numpy()
    return directions


def _log_loss(losses: Tensor) -> Tensor:
    return losses.double().clamp(min=LEAST_LOSS).log()


def _check_enough(num_candidates: int, ipc: int) -> None:
    if ipc < 1:
        raise UserError(f"--ipc {ipc}: keep at least 1 image per class")
    if num_candidates < ipc:
        raise UserError(f"--ipc {ipc}: only {num_candidates} candidates of a class; raise --candidates_per_image")
