"""Distances between real and generated images in a network's features: Fréchet and kernel.

They are called FID and KID-Inception only with the 2015-12-05 Inception weights; in an observer's features they
carry its name. The number of generated images is always part of the name, since the Fréchet distance is biased
upwards at small n.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ddgen.checkpoint import write_bytes
from ddgen.data import ImageDataset
from ddgen.errors import UserError
from ddgen.observer.observer import Observer, predict_pixels
from ddgen.seeds import numpy_generator

INCEPTION = "inception"
INCEPTION_SHA256_PREFIX = "6726825d"  # part of the published file's name
INCEPTION_DIMENSIONS = "2048"
MAX_REAL_IMAGES = 50_000
KID_REAL_IMAGES = 2_000
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1_000
BATCH_SIZE = 250

Indices = np.ndarray


@dataclass(frozen=True)
class Extractor:
    """A network that turns pixels into features.

    Attributes:
        name: What its distances are called after.
        fingerprint: Hex digest of everything that decides the features.
        extract: (pixels uint8 (b, 3, h, w), device, precision) -> float32 (b, d) on the CPU.
    """

    name: str
    fingerprint: str
    extract: Callable[[Tensor, torch.device, str], Tensor]

    @property
    def is_inception(self) -> bool:
        """Whether distances in these features may be called FID."""
        return self.name == INCEPTION


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
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace = _trace_of_root(root @ cov_2 @ root)
    return _distance(mean_1, cov_1.trace(), mean_2, cov_2.trace(), trace)


def frechet_to_features(reference: FeatureStatistics, features: Tensor) -> float:
    """Returns `frechet_distance` between a reference and features (n, d), fast where n is below d.

    With ``C2 = X^T X`` the products ``C1 C2`` (d, d) and ``X C1 X^T`` (n, n) have the same non-zero eigenvalues.
    """
    if len(features) >= features.shape[1]:
        statistics = FeatureStatistics.of(features)
        return frechet_distance(reference.mean, reference.cov, statistics.mean, statistics.cov)
    mean, centred = _centred(features)
    scaled = centred / (len(features) - 1) ** 0.5  # (n, d)
    trace = _trace_of_root(scaled @ reference.cov @ scaled.T)
    return _distance(reference.mean, reference.cov.trace(), mean, scaled.square().sum(), trace)


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
    within_1, within_2 = _polynomial_kernel(first, first), _polynomial_kernel(second, second)
    across = _polynomial_kernel(first, second)
    total = 0.0
    for rows, columns in kid_subsets(len(first), len(second), size, num_subsets, seed):
        sum_1, sum_2 = _off_diagonal_sum(within_1, rows), _off_diagonal_sum(within_2, columns)
        sum_across = float(across[rows][:, columns].sum())
        total += (sum_1 + sum_2) / (size * (size - 1)) - 2 * sum_across / size**2
    return total / num_subsets


def kid_subsets(num_1: int, num_2: int, size: int, num_subsets: int, seed: int) -> list[tuple[Indices, Indices]]:
    """Returns the subsets of `kernel_distance`: pairs of `size` indices, none twice within a subset."""
    generator = numpy_generator(seed, "kid")
    return [(generator.permutation(num_1)[:size], generator.permutation(num_2)[:size]) for _ in range(num_subsets)]


def _polynomial_kernel(first: Tensor, second: Tensor) -> np.ndarray:
    kernel: np.ndarray = (first @ second.T / first.shape[1] + 1).pow(3).numpy()
    return kernel


def _off_diagonal_sum(kernel: np.ndarray, chosen: Indices) -> float:
    return float(kernel[chosen][:, chosen].sum() - kernel[chosen, chosen].sum())


def observer_extractor(observer: Observer) -> Extractor:
    """Returns the penultimate features of an observer."""
    short = observer.network.rstrip("/").split("/")[-1] if ":" in observer.network else observer.network
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", short.removeprefix("torchvision:").removeprefix("transformers:"))

    def extract(pixels: Tensor, device: torch.device, precision: str) -> Tensor:
        return predict_pixels(
            observer, pixels, what="features", batch_size=BATCH_SIZE, device=device, precision=precision
        )

    return Extractor(name=name, fingerprint=observer.fingerprint, extract=extract)


def inception_extractor(weights_path: str | None) -> Extractor | None:
    """Returns the 2015-12-05 Inception of torch-fidelity, or None where its weights are not at hand.

    Nothing is downloaded: the weights are `weights_path`, or the file torch-fidelity left in torch hub's cache.
    The network resizes as TensorFlow 1 did (bilinear, not antialiased) and computes in float32.

    Args:
        weights_path: ``--inception_weights``.

    Raises:
        UserError: The file is missing or is another one.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    file_name = Path(urlparse(URL_INCEPTION_V3).path).name
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    path = Path(weights_path) if weights_path is not None else cached
    if weights_path is None and not path.is_file():
        return None
    digest = _check_inception_file(path, file_name)
    network = FeatureExtractorInceptionV3(INCEPTION, [INCEPTION_DIMENSIONS], feature_extractor_weights_path=str(path))

    def extract(pixels: Tensor, device: torch.device, precision: str) -> Tensor:
        network.to(device)
        with torch.inference_mode():
            parts = [network(part.to(device))[0].float().cpu() for part in torch.split(pixels, 50)]
        return torch.cat(parts)

    return Extractor(name=INCEPTION, fingerprint=digest, extract=extract)


def _check_inception_file(path: Path, file_name: str) -> str:
    """Returns the file's sha256, once it is known to be the right weights and to hold nothing but tensors."""
    if not path.is_file():
        raise UserError(f"--inception_weights {path}: no such file; expected {file_name}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    wrong = UserError(
        f"--inception_weights {path}: not the 2015-12-05 Inception weights (sha256 begins {digest[:8]}, not "
        f"{INCEPTION_SHA256_PREFIX}); expected {file_name}"
    )
    if not digest.startswith(INCEPTION_SHA256_PREFIX):
        raise wrong
    try:
        torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError):
        raise wrong from None
    return digest


class DistanceMonitor:
    """Measures how far generated images are from the real ones: one point of the FID curve a call.

    The statistics of the real images (all of them up to 50,000) are computed at construction, or read from the
    cache when it holds them for exactly this extractor, these images and this precision.

    Args:
        real: Real training images.
        extractor: `inception_extractor` or `observer_extractor`.
        num_images: Generated images a call.
        cache_dir: Where the statistics are kept.
        device: Where to compute features.
        precision: See `ddgen.precision`; Inception computes in float32 whatever it says.
        seed: Which real images are taken where not all are, and the subsets of the kernel distance.
    """

    def __init__(
        self,
        real: ImageDataset,
        extractor: Extractor,
        *,
        num_images: int,
        cache_dir: Path,
        device: torch.device,
        precision: str,
        seed: int,
    ) -> None:
        if num_images < 2:
            raise UserError(f"--fid_num_images {num_images}: a covariance needs at least 2; 1000 is usual")
        self.extractor, self.num_images = extractor, num_images
        self.device, self.precision, self.seed = device, precision, seed
        self.image_shape = tuple(real.pixels.shape[1:])
        self.fingerprint = self._fingerprint(real)
        path = Path(cache_dir) / f"real-{extractor.name}-{self.fingerprint[:16]}.safetensors"
        cached = _read_reference(path, self.fingerprint)
        if cached is None:
            cached = self._measure(real)
            _write_reference(path, self.fingerprint, *cached)
        self.reference, self.real_features = cached

    def __call__(self, pixels: Tensor) -> dict[str, float]:
        """Returns ``fid_<n>`` and ``kid_inception_<n>``, or ``fd_<network>_<n>`` and ``kid_<network>_<n>``.

        Args:
            pixels: Generated images, uint8 (n, 3, h, w), n = `num_images`, sized as the real ones.
        """
        if pixels.dtype != torch.uint8 or tuple(pixels.shape) != (self.num_images, *self.image_shape):
            raise ValueError(
                f"DistanceMonitor: got {pixels.dtype} {tuple(pixels.shape)}, expected uint8 "
                f"{(self.num_images, *self.image_shape)}"
            )
        features = self._extract(pixels)
        name, n = self.extractor.name, self.num_images
        frechet_name = f"fid_{n}" if self.extractor.is_inception else f"fd_{name}_{n}"
        return {
            frechet_name: frechet_to_features(self.reference, features),
            f"kid_{name}_{n}": kernel_distance(self.real_features, features, seed=self.seed),
        }

    def _fingerprint(self, real: ImageDataset) -> str:
        parts = {
            "version": 1,
            "extractor": [self.extractor.name, self.extractor.fingerprint],
            "precision": "no" if self.extractor.is_inception else self.precision,
            "device": self.device.type,
            "images": [real.fingerprint, *self.image_shape],
            "limits": [min(len(real), MAX_REAL_IMAGES), KID_REAL_IMAGES],
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _measure(self, real: ImageDataset) -> tuple[FeatureStatistics, Tensor]:
        if len(real) < 2:
            raise UserError(f"--fid_every: {len(real)} real images are too few for statistics; set it to 0")
        order = torch.from_numpy(numpy_generator(self.seed, "fid-real").permutation(len(real))[:MAX_REAL_IMAGES])
        kept = self._extract(real.pixels[order[:KID_REAL_IMAGES]])
        shift = kept.double().mean(dim=0)  # near the mean, so that the sums below lose no digits
        total = torch.zeros_like(shift)
        outer = torch.zeros(len(shift), len(shift), dtype=torch.float64)
        for start in range(0, len(order), KID_REAL_IMAGES):
            part = order[start : start + KID_REAL_IMAGES]
            features = kept if start == 0 else self._extract(real.pixels[part])
            centred = features.double() - shift
            total += centred.sum(dim=0)
            outer.addmm_(centred.T, centred)
        n = len(order)
        cov = (outer - torch.outer(total, total) / n) / (n - 1)
        return FeatureStatistics(mean=shift + total / n, cov=cov, n=n), kept

    def _extract(self, pixels: Tensor) -> Tensor:
        features = self.extractor.extract(pixels, self.device, self.precision)
        if not bool(features.isfinite().all()):
            raise UserError(f"--mixed_precision {self.precision}: features are not finite; use bf16 or no")
        return features


def _write_reference(path: Path, fingerprint: str, statistics: FeatureStatistics, features: Tensor) -> None:
    tensors = {"mean": statistics.mean, "cov": statistics.cov, "features": features.contiguous()}
    metadata = {"fingerprint": fingerprint, "n": str(statistics.n)}
    write_bytes(path, safetensors.torch.save(tensors, metadata))


def _read_reference(path: Path, fingerprint: str) -> tuple[FeatureStatistics, Tensor] | None:
    """Returns what the cache holds for exactly this fingerprint; anything else is measured again."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                return None
            mean, cov, features = (file.get_tensor(name) for name in ("mean", "cov", "features"))
    except SafetensorError:
        return None
    return FeatureStatistics(mean=mean, cov=cov, n=int(metadata["n"])), features
