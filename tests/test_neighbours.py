"""Precision, recall, density, coverage and near copies: by hand, by torch-fidelity, and in expectation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_prc import prc_features_to_metric

from ddgen.evaluation import neighbours
from ddgen.evaluation.neighbours import TrainingNeighbours, compare_supports, project


def normal(count: int, dimensions: int, seed: int) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def test_supports_by_hand() -> None:
    """Real 0..7 on a line: radii 3, 2, 2, 2, .. for k = 3 and 5, 4, 3, 3, 3, 3, 4, 5 for k = 5.

    Generated: six at 0.5 and one at 20, two at 100. 0.5 is inside the k = 5 balls of 0 to 3 (of 4 and 5 it is 3.5
    and 4.5 away, of 6 and 7 5.5 and 6.5), so four balls hold it; 20 and 100 are inside none. The six have k = 3
    radius 0, so recall rests on 20 (radius 19.5, down to 0.5: reaches 1 to 7) and 100 (radius 99.5, 0.5 and more).
    """
    real = torch.arange(8.0)[:, None]
    generated = torch.tensor([0.5] * 6 + [20.0, 100.0, 100.0])[:, None]
    found = compare_supports(real, generated)
    assert found["precision"] == pytest.approx(6 / 9)
    assert found["recall"] == pytest.approx(7 / 8)
    assert found["density"] == pytest.approx(6 * 4 / (5 * 9))
    assert found["coverage"] == pytest.approx(4 / 8)


@pytest.mark.parametrize("rows", [500, 32])
def test_precision_and_recall_against_torch_fidelity(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ROWS", rows)
    real, generated = normal(300, 12, 0), 0.9 * normal(200, 12, 1) + 0.3
    theirs = prc_features_to_metric(
        generated, real, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=True, verbose=False
    )
    ours = compare_supports(real, generated)
    assert 0.3 < theirs["precision"] < 0.95 and 0.3 < theirs["recall"] < 0.95
    assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-6)


def test_equal_distributions_give_what_the_paper_expects() -> None:
    """Naeem et al., section 3: density 1, coverage 1 - (n-1)...(n-k) / ((2n-1)...(2n-k)), about 1 - 2^-k."""
    n, found = 1000, compare_supports(normal(1000, 6, 0), normal(1000, 6, 1))
    missed = 1.0
    for i in range(1, 6):
        missed *= (n - i) / (2 * n - i)
    assert missed == pytest.approx(2**-5, rel=0.02)
    assert found["coverage"] == pytest.approx(1 - missed, abs=0.02)
    assert found["density"] == pytest.approx(1, abs=0.06)


def test_supports_tell_what_is_wrong() -> None:
    real, half = normal(400, 6, 0), normal(400, 6, 1)
    half[:, 0] = half[:, 0].abs()  # good images, of half the distribution
    narrow, wide = compare_supports(real, half), compare_supports(real, 3 * normal(400, 6, 2))
    assert narrow["precision"] > 0.8 and narrow["coverage"] < 0.75
    assert wide["precision"] < 0.4 and wide["density"] < 0.2 and wide["recall"] > 0.9


def test_distances_survive_features_far_from_the_origin() -> None:
    real, generated = normal(200, 8, 0), normal(200, 8, 1)
    assert compare_supports(real + 3000, generated + 3000) == pytest.approx(compare_supports(real, generated), abs=0.02)


# --- near copies


def test_held_out_points_are_as_near_as_calibrated() -> None:
    """A fresh point is below the r-th of n calibrated values with probability r / (n + 1): 20 of 2,001."""
    points = normal(4000, 5, 0).pow(3)
    found = TrainingNeighbours.of(points)
    nearness, _ = found.nearness(normal(4000, 5, 1).pow(3))
    part = float((nearness <= found.threshold).float().mean())
    assert part == pytest.approx(20 / 2001, abs=4 * (0.01 / 4000) ** 0.5 + 4 * (0.01 / 2000) ** 0.5 * 0.5)
    assert part > 0


def test_copies_are_found_and_named() -> None:
    points = normal(600, 400, 0)  # more dimensions than are searched in
    found = TrainingNeighbours.of(project(points))
    fresh = normal(50, 400, 1)
    copies = points[100:120] + 0.01 * normal(20, 400, 2)
    nearness, neighbours_found = found.nearness(torch.cat([fresh, copies, points[:5]]))
    assert (nearness[:50] > 0.8).all()
    assert (nearness[50:] < 0.1).all() and found.threshold > 0.5
    assert neighbours_found[50:, 0].tolist() == [*range(100, 120), *range(5)]
    assert nearness[70:].abs().max() == 0
    assert neighbours_found.shape == (75, 50)


def test_nearness_by_hand() -> None:
    """Points 0, 1, 3 on a line, asked for 1.5: distances 0.5, 1.5, 1.5, so 0.5 over their mean."""
    points = torch.tensor([[0.0], [1.0], [3.0]])
    nearness, order = TrainingNeighbours(points, 0.0).nearness(torch.tensor([[1.5]]))
    assert nearness.item() == pytest.approx(0.5 / (3.5 / 3))
    assert order[0, 0] == 1
    # Each point against the two others: 1 / 2, 1 / 1.5, 2 / 2.5; the lowest is the threshold.
    assert TrainingNeighbours.of(points).threshold == pytest.approx(0.5)


def test_projection_keeps_distances() -> None:
    points = normal(40, 2000, 0)
    projected = project(points)
    assert projected.shape == (40, 256) and torch.equal(projected, project(points))
    ratio = torch.pdist(projected) / torch.pdist(points)
    assert abs(ratio.mean() - 1) < 0.02 and ratio.std() < 0.07
    assert torch.equal(project(points[:, :100]), points[:, :100])
