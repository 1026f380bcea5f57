"""Distances between features: analytic cases and reference implementations."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.metric_kid import kernel_mmd
from torchmetrics.image.fid import _compute_fid

from ddgen.evaluation.frechet import (
    FeatureStatistics,
    frechet_distance,
    frechet_to_features,
    kernel_distance,
    kid_subsets,
)

POLYNOMIAL = {
    "kid_kernel": "poly",
    "kid_kernel_poly_degree": 3,
    "kid_kernel_poly_gamma": None,
    "kid_kernel_poly_coef0": 1,
}


def features(count: int, dimensions: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated, skewed features."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(99))
    return (torch.randn(count, dimensions, generator=generator) @ mixing / dimensions**0.5 + shift).relu()


# --- Fréchet


def test_two_gaussians_worked_by_hand() -> None:
    """Diagonal: |m|^2 + sum (s1 - s2)^2 = 25 + (1-3)^2 + (2-2)^2."""
    value = frechet_distance(
        torch.tensor([0.0, 0.0]), torch.diag(torch.tensor([1.0, 4.0])),
        torch.tensor([3.0, 4.0]), torch.diag(torch.tensor([9.0, 4.0])),
    )  # fmt: skip
    assert value == pytest.approx(29.0, abs=1e-10)


def test_rotation_of_a_singular_gaussian() -> None:
    """A line turned by 45 degrees: C1 = diag(1, 0), C2 = 1/2 everywhere; tr (C1 C2)^(1/2) = 1/sqrt 2."""
    zero = torch.zeros(2)
    value = frechet_distance(zero, torch.diag(torch.tensor([1.0, 0.0])), zero, torch.full((2, 2), 0.5))
    assert value == pytest.approx(2 - 2**0.5, abs=1e-7)


def test_frechet_against_scipy_and_torchmetrics() -> None:
    first, second = FeatureStatistics.of(features(300, 24, 0)), FeatureStatistics.of(features(200, 24, 1, 0.2))
    root = scipy.linalg.sqrtm(first.cov.numpy() @ second.cov.numpy()).real
    expected = (first.mean - second.mean).square().sum() + (first.cov + second.cov).trace() - 2 * np.trace(root)
    ours = frechet_distance(first.mean, first.cov, second.mean, second.cov)
    assert ours == pytest.approx(float(expected), rel=1e-8)
    assert ours == pytest.approx(float(_compute_fid(first.mean, first.cov, second.mean, second.cov)), rel=1e-8)
    assert frechet_distance(second.mean, second.cov, first.mean, first.cov) == pytest.approx(ours, rel=1e-9)
    assert frechet_distance(first.mean, first.cov, first.mean, first.cov) == pytest.approx(0, abs=1e-10)


def test_statistics_match_numpy() -> None:
    values = features(50, 6, 0)
    statistics = FeatureStatistics.of(values)
    np.testing.assert_allclose(statistics.cov, np.cov(values.double().numpy(), rowvar=False), rtol=1e-10)
    assert (statistics.n, statistics.cov.dtype) == (50, torch.float64)


@pytest.mark.parametrize("count", [10, 16, 40])
def test_fewer_images_than_dimensions(count: int) -> None:
    reference, few = FeatureStatistics.of(features(300, 16, 0)), features(count, 16, 1, 0.1)
    statistics = FeatureStatistics.of(few)
    slow = frechet_distance(reference.mean, reference.cov, statistics.mean, statistics.cov)
    assert frechet_to_features(reference, few) == pytest.approx(slow, rel=1e-6)


# --- kernel


def test_kernel_distance_of_single_points_by_hand() -> None:
    """x = 1, 1; y = 0, 0 in one dimension: k(x, x) = 8, k(y, y) = k(x, y) = 1, so 8 + 1 - 2."""
    assert kernel_distance(torch.ones(2, 1), torch.zeros(2, 1), num_subsets=3) == pytest.approx(7.0)


def test_kernel_distance_against_torch_fidelity() -> None:
    first, second = features(60, 12, 0), features(45, 12, 1, 0.3)
    expected = np.mean(
        [
            kernel_mmd(first.double().numpy()[rows], second.double().numpy()[columns], **POLYNOMIAL)
            for rows, columns in kid_subsets(60, 45, 20, 5, seed=3)
        ]
    )
    assert kernel_distance(first, second, num_subsets=5, subset_size=20, seed=3) == pytest.approx(expected, rel=1e-10)
    whole = kernel_mmd(first[:45].double().numpy(), second.double().numpy(), **POLYNOMIAL)
    assert kernel_distance(first[:45], second, num_subsets=2) == pytest.approx(whole, rel=1e-10)


def test_kernel_distance_is_seeded_and_unbiased() -> None:
    first, second = features(400, 8, 0), features(400, 8, 1)
    kwargs = {"num_subsets": 50, "subset_size": 50}
    assert kernel_distance(first, second, seed=1, **kwargs) == kernel_distance(first, second, seed=1, **kwargs)
    assert kernel_distance(first, second, seed=1, **kwargs) != kernel_distance(first, second, seed=2, **kwargs)
    same = abs(kernel_distance(first, second, **kwargs))
    assert same < 0.1 * kernel_distance(first, features(400, 8, 1, 0.5), **kwargs)
