"""How much of the encoder's bare speed is left when latents are cached, and how fast batches come out of the cache.

    python benchmarks/latent_cache.py

Caching reads pixels, converts them, encodes, rounds, writes and syncs; the bare encoder gets float batches that are
ready. They take turns (A B A B ...), and the medians are compared. The images sampled beforehand, whose
number does not depend on that of all, count as they would for --of_images.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor

from ddgen.autoencoder import latents
from ddgen.autoencoder.autoencoder import Autoencoder, to_images, wrap
from ddgen.autoencoder.patch_autoencoder import PatchAutoencoderKL
from ddgen.precision import autocast, resolve_precision


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    num_images: int = 4096
    """Images to cache, each with its mirror image."""
    of_images: int = 100_000
    """Size of the dataset that they stand for."""
    image_size: int = 64
    """Side of the images."""
    downsample: int = 8
    """Pixels per latent along a side."""
    latent_channels: int = 24
    """Channels of a latent."""
    patch: int = 8
    """Pixels folded into channels before the residual network."""
    channels: tuple[int, ...] = (128,)
    """Widths of the residual network; none: patch PCA alone, the fastest encoder there is."""
    rounds: int = 5
    """Turns of both; the first is not counted."""


def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    settings = tyro.cli(Settings, args=argv)
    accelerator = Accelerator()
    latents.NUM_SAMPLED_IMAGES = max(1, round(latents.NUM_SAMPLED_IMAGES * settings.num_images / settings.of_images))
    model = PatchAutoencoderKL(
        latent_channels=settings.latent_channels,
        downsample=settings.downsample,
        patch=settings.patch,
        block_out_channels=settings.channels,
    )
    autoencoder = wrap(model, accelerator.device, resolve_precision(None, accelerator.device))
    shape = (settings.num_images, 3, settings.image_size, settings.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {"bare": [], "cached": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(settings.rounds):
            path = Path(folder) / str(number)
            timed = {
                "bare": _timed(lambda: _bare(autoencoder, pixels)),
                "cached": _timed(lambda path=path: _cached(autoencoder, pixels, path, accelerator)),  # type: ignore[misc]
            }
            for name, value in timed.items():
                if number:
                    seconds[name].append(value)
        cache = _cached(autoencoder, pixels, Path(folder) / "1", accelerator)
        batch_seconds = _batch_seconds(cache)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rate, ratio = 2 * settings.num_images / medians["bare"], medians["bare"] / medians["cached"]
    ratios = [bare / cached for bare, cached in zip(seconds["bare"], seconds["cached"], strict=True)]
    device = f"{accelerator.device.type}, {torch.get_num_threads()} threads"
    print(f"{device}, {settings.image_size} px, f {settings.downsample}")
    print(f"bare encoder            {rate:,.0f} images/s")
    print(f"caching                 {ratio:.3f} of it ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"a batch of 128 latents  {1e6 * batch_seconds:,.0f} us")
    return 0


@torch.inference_mode()
def _bare(autoencoder: Autoencoder, pixels: Tensor) -> float:
    """Encodes float batches that are ready, as many images as are cached; returns the seconds of encoding alone."""
    batch_size = latents.batch_size_of(pixels.shape[-1], autoencoder.device)
    total = 0.0
    for part in pixels.split(batch_size):
        images = to_images(part.to(autoencoder.device))
        mirrored = images.flip(-1)
        _wait(autoencoder.device)
        start = time.perf_counter()
        with autocast(autoencoder.device, autoencoder.precision):
            autoencoder.vae.encode(images)
            autoencoder.vae.encode(mirrored)
        _wait(autoencoder.device)
        total += time.perf_counter() - start
    return total


def _cached(autoencoder: Autoencoder, pixels: Tensor, path: Path, accelerator: Accelerator) -> latents.LatentCache:
    return latents.build_latent_cache(
        autoencoder, pixels, path, flip=True, fingerprint="benchmark", accelerator=accelerator
    )[1]


def _batch_seconds(cache: latents.LatentCache, repeats: int = 100) -> float:
    chosen, mirrored = torch.randint(0, len(cache.mean), (repeats, 128)), torch.rand(repeats, 128) < 0.5
    noise = torch.randn(128, *cache.mean.shape[2:])
    seconds = [_timed(lambda i=i: cache.batch(chosen[i], mirrored[i], noise)) for i in range(repeats)]  # type: ignore[misc]
    return statistics.median(seconds)


def _timed(work: Callable[[], object]) -> float:
    """Returns the seconds that something took, or that it says it took."""
    start = time.perf_counter()
    result = work()
    return result if isinstance(result, float) else time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
