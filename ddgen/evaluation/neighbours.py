"""Are generated images plausible, varied, or copies? Answers from nearest neighbours in a network's features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddgen.observer.supports import COVERAGE_NEIGHBOURS, ROWS, radii
from ddgen.seeds import torch_generator

PRECISION_NEIGHBOURS = 3
FEWEST = COVERAGE_NEIGHBOURS + 1  # points among which a point has that many neighbours
COPY_NEIGHBOURS = 50
COPY_LEVEL = 0.01  # part of real images that pass for copies
CALIBRATION_IMAGES = 2_000
PROJECTED_DIMENSIONS = 256


def compare_supports(real: Tensor, generated: Tensor) -> dict[str, float]:
    """Returns precision, recall, density and coverage.

    Around every point lies a ball that reaches to its k-th nearest neighbour in its own set. Precision is the part
    of the generated points inside any real ball, recall the part of the real points inside any generated one
    (Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models", 2019; k = 3).
    Density counts how many real balls a generated point is in, over k; coverage is the part of the real balls that
    hold a generated point (Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020;
    k = 5). Of equal distributions and as many points of each, density expects 1 and coverage about 1 - 2^-k.

    Args:
        real: (n, d), n at least `FEWEST`.
        generated: (m, d), m at least `FEWEST`.
    """
    centre = real.mean(dim=0)  # distances are taken from products, which lose digits far from the origin
    real, generated = real - centre, generated - centre
    near, far = PRECISION_NEIGHBOURS, COVERAGE_NEIGHBOURS
    real_radii, generated_radii = radii(real, (near, far)), radii(generated, (near,))
    plausible, inside = 0, 0
    reached = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    for start in range(0, len(generated), ROWS):
        rows = slice(start, start + ROWS)
        distances = torch.cdist(generated[rows], real)  # (b, n)
        plausible += int((distances <= real_radii[:, 0]).any(dim=1).sum())
        reached |= (distances <= generated_radii[rows]).any(dim=0)
        held = distances <= real_radii[:, 1]
        inside += int(held.sum())
        covered |= held.any(dim=0)
    return {
        "precision": plausible / len(generated),
        "recall": int(reached.sum()) / len(real),
        "density": inside / (far * len(generated)),
        "coverage": int(covered.sum()) / len(real),
    }


@dataclass(frozen=True)
class TrainingNeighbours:
    """Finds the training images that generated ones are suspiciously near to.

    The measure is an image's distance to the nearest training image over its mean distance to the nearest 50
    (Carlini et al., "Extracting training data from diffusion models", 2023): a copy is near 0 even where training
    images lie sparsely, and a bland image among many of its kind is near 1. It passes for a copy below the value
    below which 1 % of real images are, each measured against all others; so held-out real images give 0.01.

    Distances are taken in 256 random projections of the features, which keep them to a few percent (Johnson and
    Lindenstrauss, 1984), so that all training images can be searched, not a sample that would miss most copies.

    Attributes:
        points: The training images' projected features, float32 (n, p).
        threshold: The measure at and below which an image passes for a copy.
    """

    points: Tensor
    threshold: float

    @classmethod
    def of(cls, points: Tensor) -> TrainingNeighbours:
        """Calibrates on the first 2,000 of the points (n, p), n at least 3."""
        ratios, _ = _nearness(points[:CALIBRATION_IMAGES], points, are_first=True)
        rank = max(1, int(COPY_LEVEL * (len(ratios) + 1)))  # a fresh one is below it with rank / (count + 1)
        return cls(points, float(ratios.sort().values[rank - 1]))

    def nearness(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns of features (m, d) the measure, (m,), and the nearest training images, nearest first, (m, 50)."""
        return _nearness(project(features), self.points)


def project(features: Tensor) -> Tensor:
    """Projects features (n, d) to at most 256 dimensions, always the same way."""
    dimensions = features.shape[1]
    if dimensions <= PROJECTED_DIMENSIONS:
        return features
    generator = torch_generator(0, "projection")
    directions = torch.randn(dimensions, PROJECTED_DIMENSIONS, generator=generator)
    return features @ directions / PROJECTED_DIMENSIONS**0.5


def _nearness(queries: Tensor, points: Tensor, *, are_first: bool = False) -> tuple[Tensor, Tensor]:
    """Returns nearest over mean distance, and the neighbours; queries that are the first points skip themselves."""
    centre = points.mean(dim=0)
    centred = points - centre
    count = min(COPY_NEIGHBOURS, len(points) - are_first)
    ratios, neighbours = [], []
    for start in range(0, len(queries), ROWS):
        rows = queries[start : start + ROWS] - centre
        distances = torch.cdist(rows, centred)  # (b, n)
        if are_first:
            itself = torch.arange(len(rows))
            distances[itself, start + itself] = torch.inf
        near = distances.topk(count, dim=1, largest=False)
        nearest = (rows - centred[near.indices[:, 0]]).norm(dim=1)  # exact where it is near 0
        ratios.append(nearest / near.values.mean(dim=1).clamp(min=1e-12))
        neighbours.append(near.indices)
    return torch.cat(ratios), torch.cat(neighbours)
