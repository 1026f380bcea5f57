"""How much the autoencoder loses, which caps everything that is trained on its latents; told before the UNet starts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ddgen.autoencoder.autoencoder import Autoencoder
from ddgen.autoencoder.training import psnr_of, reconstruct
from ddgen.checkpoint import write_json
from ddgen.data import ImageDataset
from ddgen.evaluation.extractors import Extractor
from ddgen.evaluation.frechet import FeatureStatistics, frechet_to_features
from ddgen.grids import image_grid
from ddgen.observer.observer import Observer
from ddgen.observer.realism import realism_scores

MAX_IMAGES = 2_000
GRID_COLUMNS, GRID_PAIRS = 10, 4


def measure_reconstruction(
    restored: Tensor,
    images: ImageDataset,
    indices: Tensor,
    observer: Observer,
    extractor: Extractor,
    *,
    device: torch.device,
    precision: str,
) -> dict[str, float]:
    """Compares reconstructions with their originals.

    Args:
        restored: uint8 (n, 3, h, w).
        images: Real images.
        indices: int64 (n,), which of them were reconstructed.
        observer: On `device`.
        extractor: Its features give the Fréchet distance. Both sides are the same n images, so a perfect autoencoder
            has 0, and n can be small; the value is not comparable with distances of generated images.
        device: Where to compute.
        precision: See `ddgen.precision`.

    Returns:
        ``psnr`` in dB; ``rfid_<n>`` or ``rfd_<network>_<n>``; the observer's accuracy as a fraction, ``accuracy`` on
        the originals and ``accuracy_reconstructed``; ``num_images``.
    """
    pixels, labels, n = images.pixels[indices], images.labels[indices], len(indices)
    features = [extractor.extract(side, device) for side in (pixels, restored)]
    distance = frechet_to_features(FeatureStatistics.of(features[0]), features[1])
    name = f"rfid_{n}" if extractor.is_inception else f"rfd_{extractor.name}_{n}"
    accuracies = []
    for side in (pixels, restored):
        scores = realism_scores(observer, side, labels, batch_size=256, device=device, precision=precision)
        accuracies.append((scores.predicted == labels).double().mean().item())
    return {
        "psnr": psnr_of(restored, pixels),
        name: max(distance, 0.0),
        "accuracy": accuracies[0],
        "accuracy_reconstructed": accuracies[1],
        "num_images": n,
    }


def report_reconstruction(
    autoencoder: Autoencoder,
    images: ImageDataset,
    indices: Tensor,
    observer: Observer,
    extractor: Extractor,
    output_dir: Path,
    *,
    precision: str,
) -> str:
    """Measures up to 2,000 reconstructions; writes reconstruction.json and samples/reconstructions.png.

    Args:
        autoencoder: What is measured.
        images: Real images.
        indices: int64 (m,), images that neither side of a comparison should have been fitted to.
        observer: On the autoencoder's device.
        extractor: See `measure_reconstruction`.
        output_dir: The run folder.
        precision: See `ddgen.precision`.

    Returns:
        One line that says what was found.
    """
    chosen = indices[torch.linspace(0, len(indices) - 1, min(len(indices), MAX_IMAGES)).round().long()]
    restored = reconstruct(autoencoder, images.pixels[chosen])
    found = measure_reconstruction(
        restored, images, chosen, observer, extractor, device=autoencoder.device, precision=precision
    )
    write_json(output_dir / "reconstruction.json", found)
    (output_dir / "samples").mkdir(exist_ok=True)
    shown = torch.linspace(0, len(chosen) - 1, min(len(chosen), GRID_COLUMNS * GRID_PAIRS)).round().long()
    rows = zip(images.pixels[chosen[shown]].split(GRID_COLUMNS), restored[shown].split(GRID_COLUMNS), strict=True)
    columns = min(len(shown), GRID_COLUMNS)
    image_grid(torch.cat([side for row in rows for side in row]), columns).save(
        output_dir / "samples" / "reconstructions.png"
    )
    distance = next(name for name in found if name.startswith("rf"))
    return (
        f"reconstruction of {len(chosen):,} images the observer has not seen: {found['psnr']:.2f} dB,"
        f" {distance} {found[distance]:.3f}, observer {found['accuracy']:.1%} on originals,"
        f" {found['accuracy_reconstructed']:.1%} on reconstructions"
    )
