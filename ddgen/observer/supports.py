"""How much of a set of points another set reaches, and how far apart its points lie, in a network's features."""

from __future__ import annotations

import torch
from torch import Tensor

COVERAGE_NEIGHBOURS = 5
ROWS = 500  # distances held at once, times the number of the other images
MOST_POINTS = 500  # whose pairs are counted


def coverage(real: Tensor, points: Tensor) -> float:
    """Returns the part of the real points' balls that hold one of the other points.

    Around every real point lies a ball that reaches to its fifth nearest real neighbour (Naeem et al., "Reliable
    fidelity and diversity metrics for generative models", 2020). Few points cover little: compare with
    as many others.

    Args:
        real: (n, d), n at least 2; up to five points have the farthest neighbour that there is.
        points: (m, d), m at least 1.
    """
    centre = real.mean(dim=0)  # distances are taken from products, which lose digits far from the origin
    real, points = real - centre, points - centre
    reach = radii(real, (min(COVERAGE_NEIGHBOURS, len(real) - 1),))[:, 0]
    held = torch.zeros(len(real), dtype=torch.bool)
    for part in points.split(ROWS):
        held |= (torch.cdist(part, real) <= reach).any(dim=0)
    return int(held.sum()) / len(real)


def radii(points: Tensor, neighbours: tuple[int, ...]) -> Tensor:
    """Returns every point's distance to its k-th nearest other point, (n, len(neighbours)); n above every k."""
    found = []
    for start in range(0, len(points), ROWS):
        distances = torch.cdist(points[start : start + ROWS], points)
        nearest = distances.topk(max(neighbours) + 1, dim=1, largest=False).values  # the first is the point itself
        found.append(nearest[:, list(neighbours)])
    return torch.cat(found)


def mean_distance(points: Tensor) -> float | None:
    """Returns the mean distance between two points of (n, d), of the first 500 alone; None where there are no two."""
    if len(points) < 2:
        return None
    return float(torch.pdist(points[:MOST_POINTS].double()).mean())
