"""Distances between two sets of features: Fréchet and kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ddgen.seeds import numpy_generator

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1_000

Indices = np.ndarray


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean float64 (d,), unbiased covariance float64 (d, d) and number of some features."""

    mean: Tensor
    cov: Tensor
    n: int

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Returns the statistics of features (n, d), n at least 2."""
        mean, centred = _centred(features)
        return cls(mean=mean, cov=centred.T @ centred / (len(features) - 1), n=len(features))

    @cached_property
    def root(self) -> Tensor:
        """The covariance's symmetric square root, float64 (d, d); seconds at d = 2048, so it is kept."""
        return _root(self.cov)


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """Returns the squared 2-Wasserstein distance of two Gaussians (Dowson and Landau, 1982; Heusel et al., 2017).

    ``|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))``; the trace is that of ``(S C2 S)^(1/2)`` with
    ``S = C1^(1/2)``, which is symmetric, so singular covariances need no regularisation.

    Args:
        mean_1: (d,).
        cov_1: (d, d), symmetric positive semi-definite.
        mean_2: (d,).
        cov_2: (d, d), symmetric positive semi-definite.
    """
    mean_1, cov_1, mean_2, cov_2 = (value.double() for value in (mean_1, cov_1, mean_2, cov_2))
    root = _root(cov_1)
    trace = _trace_of_root(root @ cov_2 @ root)
    return _distance(mean_1, cov_1.trace(), mean_2, cov_2.trace(), trace)


def frechet_to_features(reference: FeatureStatistics, features: Tensor) -> float:
    """Returns `frechet_distance` between a reference and features (n, d), fast where n is below d.

    With ``C2 = X^T X`` the products ``C1 C2`` (d, d) and ``X C1 X^T`` (n, n) have the same non-zero eigenvalues.
    """
    if len(features) >= features.shape[1]:
        other = FeatureStatistics.of(features)
        trace = _trace_of_root(reference.root @ other.cov @ reference.root)
        return _distance(reference.mean, reference.cov.trace(), other.mean, other.cov.trace(), trace)
    mean, centred = _centred(features)
    scaled = centred / (len(features) - 1) ** 0.5  # (n, d)
    trace = _trace_of_root(scaled @ reference.cov @ scaled.T)
    return _distance(reference.mean, reference.cov.trace(), mean, scaled.square().sum(), trace)


def _root(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    values = features.double()
    mean = values.mean(dim=0)
    return mean, values - mean


def _trace_of_root(symmetric: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh((symmetric + symmetric.T) / 2)
    trace: Tensor = values.clamp(min=0).sqrt().sum()
    return trace


def _distance(mean_1: Tensor, trace_1: Tensor, mean_2: Tensor, trace_2: Tensor, trace_of_root: Tensor) -> float:
    return float((mean_1 - mean_2).square().sum() + trace_1 + trace_2 - 2 * trace_of_root)


def kernel_distance(
    features_1: Tensor,
    features_2: Tensor,
    *,
    num_subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
) -> float:
    """Returns the unbiased squared maximum mean discrepancy under ``(x.y / d + 1)^3``, averaged over subsets.

    Binkowski et al., "Demystifying MMD GANs" (2018), equation 4: KID in Inception's features. It can be slightly
    negative. The kernel of all pairs is held at once, so keep to a few thousand features.

    Args:
        features_1: (n, d).
        features_2: (m, d).
        num_subsets: Subsets drawn.
        subset_size: Features in a subset, at most the smaller of n and m.
        seed: Of the subsets.
    """
    size = min(subset_size, len(features_1), len(features_2))
    first, second = features_1.double(), features_2.double()
    subsets = kid_subsets(len(first), len(second), size, num_subsets, seed)
    in_1 = _membership([rows for rows, _ in subsets], len(first))
    in_2 = _membership([columns for _, columns in subsets], len(second))
    within = _within(_polynomial_kernel(first, first), in_1) + _within(_polynomial_kernel(second, second), in_2)
    across = float(((in_1 @ _polynomial_kernel(first, second)) * in_2).sum())
    return (within / (size * (size - 1)) - 2 * across / size**2) / num_subsets


def kid_subsets(num_1: int, num_2: int, size: int, num_subsets: int, seed: int) -> list[tuple[Indices, Indices]]:
    """Returns the subsets of `kernel_distance`: pairs of `size` indices, none twice within a subset."""
    generator = numpy_generator(seed, "kid")
    return [(generator.permutation(num_1)[:size], generator.permutation(num_2)[:size]) for _ in range(num_subsets)]


def _membership(subsets: list[Indices], count: int) -> Tensor:
    """Returns float64 (subsets, count): 1 where a feature is in a subset. Sums over subsets are products with it."""
    member = torch.zeros(len(subsets), count, dtype=torch.float64)
    for row, chosen in zip(member, subsets, strict=True):
        row[torch.from_numpy(chosen)] = 1
    return member


def _within(kernel: Tensor, member: Tensor) -> float:
    """Sums the kernel over all pairs of different features of every subset."""
    return float(((member @ kernel) * member).sum() - (member @ kernel.diagonal()).sum())


def _polynomial_kernel(first: Tensor, second: Tensor) -> Tensor:
    kernel: Tensor = (first @ second.T / first.shape[1] + 1).pow(3)
    return kernel
