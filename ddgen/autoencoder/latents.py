"""The latent cache: every training image, and its mirror image, encoded once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddgen.autoencoder.autoencoder import Autoencoder, to_images
from ddgen.checkpoint import atomic_dir, read_json, write_json


@dataclass(frozen=True)
class LatentCache:
    """Posterior moments of all training images, standardised per channel.

    Attributes:
        mean: float16 (s, n, d, h, w), standardised; [0] of the images, [1], if there, of their mirror images.
        std: float16, likewise, standard deviation of the posterior; None for an autoencoder without one.
        fingerprint: Identifies the autoencoder, the images and their order.
    """

    mean: Tensor
    std: Tensor | None
    fingerprint: str

    def batch(self, indices: Tensor, mirrored: Tensor, noise: Tensor) -> Tensor:
        """Draws latents from the posteriors.

        Args:
            indices: Which images, int64 (b,).
            mirrored: Whether to take the mirror image, bool (b,); ignored if mirror images are not cached.
            noise: Standard normal, (b, d, h, w).

        Returns:
            Standardised latents, float32 (b, d, h, w), on the cache's device.
        """
        side = mirrored.long() * (len(self.mean) - 1)
        mean = self.mean[side, indices].float()
        return mean if self.std is None else mean + self.std[side, indices].float() * noise


def build_latent_cache(
    autoencoder: Autoencoder, pixels: Tensor, path: Path, *, flip: bool, fingerprint: str, batch_size: int = 256
) -> tuple[Autoencoder, LatentCache]:
    """Encodes all images, and their mirror images, or reads them back if `path` holds exactly these.

    Args:
        autoencoder: Encoder; its latent statistics are not used.
        pixels: uint8 (n, 3, h, w).
        path: Folder of the cache; written atomically.
        flip: Encode mirror images too.
        fingerprint: Identifies autoencoder and images.
        batch_size: Images per forward.

    Returns:
        The autoencoder with the statistics of these latents, and the cache, memory-mapped.
    """
    fingerprint = f"{fingerprint}-{'flip' if flip else 'noflip'}"
    if not _is_current(path, fingerprint):
        with atomic_dir(path, replace=True) as temporary:
            _encode_all(autoencoder, pixels, temporary, batch_size, 2 if flip else 1)
            write_json(temporary / "meta.json", {"fingerprint": fingerprint})
    meta = read_json(path / "statistics.json")
    mean, std = torch.tensor(meta["latents_mean"]), torch.tensor(meta["latents_std"])
    arrays = [torch.from_numpy(np.load(path / f"{name}.npy", mmap_mode="c")) for name in ("mean", "std")]
    return autoencoder.with_statistics(mean, std), LatentCache(
        arrays[0], arrays[1] if meta["has_std"] else None, fingerprint
    )


def _is_current(path: Path, fingerprint: str) -> bool:
    meta = path / "meta.json"
    return meta.is_file() and read_json(meta)["fingerprint"] == fingerprint


def _encode_all(autoencoder: Autoencoder, pixels: Tensor, path: Path, batch_size: int, num_sides: int) -> None:
    n = len(pixels)
    first, _ = autoencoder.encode(to_images(pixels[:1]))
    shape = (num_sides, n, *first.shape[1:])
    means, stds = (
        np.lib.format.open_memmap(path / f"{name}.npy", mode="w+", dtype=np.float16, shape=shape)
        for name in ("mean", "std")
    )
    moments = _ChannelMoments(first.shape[1])
    bar = tqdm(total=num_sides * n, desc="latents", unit="img", unit_scale=True)
    for side in range(num_sides):
        for start in range(0, n, batch_size):
            images = to_images(pixels[start : start + batch_size])
            mean, std = autoencoder.encode(images.flip(-1) if side else images)
            moments.add(mean, std)
            means[side, start : start + len(images)] = mean.cpu().numpy()
            stds[side, start : start + len(images)] = std.cpu().numpy()
            bar.update(len(images))
    bar.close()
    channel_mean, channel_std = moments.result()
    _standardise_in_place(means, stds, channel_mean.numpy(), channel_std.numpy())
    statistics = {
        "latents_mean": channel_mean.tolist(),
        "latents_std": channel_std.tolist(),
        "has_std": bool(moments.has_std),
    }
    write_json(path / "statistics.json", statistics)


def _standardise_in_place(means: np.memmap, stds: np.memmap, channel_mean: np.ndarray, channel_std: np.ndarray) -> None:
    centre, scale = channel_mean[:, None, None].astype(np.float32), channel_std[:, None, None].astype(np.float32)
    for side in range(len(means)):
        for start in range(0, means.shape[1], 4096):
            part = slice(start, start + 4096)
            means[side, part] = (means[side, part].astype(np.float32) - centre) / scale
            stds[side, part] = stds[side, part].astype(np.float32) / scale
    means.flush()
    stds.flush()


class _ChannelMoments:
    """Float64 mean and standard deviation per channel of latents drawn from the posteriors."""

    def __init__(self, num_channels: int) -> None:
        self.count, self.has_std = 0, False
        self.total = torch.zeros(num_channels, dtype=torch.float64)
        self.square = torch.zeros(num_channels, dtype=torch.float64)

    def add(self, mean: Tensor, std: Tensor) -> None:
        mean, std = mean.double().cpu(), std.double().cpu()
        self.count += mean.shape[0] * mean.shape[2] * mean.shape[3]
        self.total += mean.sum((0, 2, 3))
        self.square += (mean.square() + std.square()).sum((0, 2, 3))
        self.has_std |= bool((std > 0).any())

    def result(self) -> tuple[Tensor, Tensor]:
        mean = self.total / self.count
        return mean, (self.square / self.count - mean.square()).clamp_min(1e-12).sqrt()
