"""What is known of the real images in a network's features: measured once, kept under a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ddgen.checkpoint import write_bytes
from ddgen.evaluation.frechet import FeatureStatistics
from ddgen.evaluation.neighbours import TrainingNeighbours, project

PART = 2_000  # images whose features are held at once


@dataclass(frozen=True)
class Reference:
    """Features of the real images, as far as the measures need them.

    Attributes:
        statistics: Of all.
        features: Of the first ones, float32 (m, d).
        neighbours: Of all, projected.
    """

    statistics: FeatureStatistics
    features: Tensor
    neighbours: TrainingNeighbours


def measure_reference(
    pixels: Tensor, order: Tensor, extract: Callable[[Tensor], Tensor], num_features: int
) -> Reference:
    """Measures real images, `PART` at a time.

    Args:
        pixels: uint8 (n, 3, h, w).
        order: Which of them, and in which order, int64 (m,).
        extract: Pixels to features, float32 (b, d).
        num_features: Of how many the features are kept.
    """
    kept: list[Tensor] = []
    projected: list[Tensor] = []
    shift = total = outer = torch.zeros(())
    for start in range(0, len(order), PART):
        features = extract(pixels[order[start : start + PART]])
        if start == 0:
            shift = features.double().mean(dim=0)  # near the mean, so that the sums below lose no digits
            total, outer = torch.zeros_like(shift), torch.zeros(len(shift), len(shift), dtype=torch.float64)
        if start < num_features:
            kept.append(features[: num_features - start])
        projected.append(project(features))
        centred = features.double() - shift
        total += centred.sum(dim=0)
        outer.addmm_(centred.T, centred)
    n = len(order)
    cov = (outer - torch.outer(total, total) / n) / (n - 1)
    statistics = FeatureStatistics(mean=shift + total / n, cov=cov, n=n)
    return Reference(statistics, torch.cat(kept), TrainingNeighbours.of(torch.cat(projected)))


def write_reference(path: Path, fingerprint: str, reference: Reference) -> None:
    """Writes a reference whole, with the fingerprint of what it was measured on and a digest of its own content."""
    tensors = {
        "mean": reference.statistics.mean,
        "cov": reference.statistics.cov,
        "features": reference.features.contiguous(),
        "projected": reference.neighbours.points.contiguous(),
        "threshold": torch.tensor(reference.neighbours.threshold, dtype=torch.float64),
    }
    metadata = {"fingerprint": fingerprint, "content": _digest(tensors), "n": str(reference.statistics.n)}
    write_bytes(path, safetensors.torch.save(tensors, metadata))


def read_reference(path: Path, fingerprint: str) -> Reference | str | None:
    """Returns what `write_reference` wrote for exactly this fingerprint, why it must not be used, or None."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except SafetensorError as error:
        return f"damaged, {' '.join(str(error).split())[:100]}"
    if metadata.get("fingerprint") != fingerprint:
        return "measured on other images or with another network"
    if metadata.get("content") != _digest(tensors):
        return "its numbers are not the ones that were measured"
    return Reference(
        FeatureStatistics(mean=tensors["mean"], cov=tensors["cov"], n=int(metadata["n"])),
        tensors["features"],
        TrainingNeighbours(tensors["projected"], float(tensors["threshold"])),
    )


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
