"""The latent cache: every training image, and its mirror image, encoded once, by all processes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from ddgen.autoencoder.autoencoder import Autoencoder, to_images
from ddgen.checkpoint import atomic_dir, read_json, remove_dir, write_json
from ddgen.data.archive import check_free_space
from ddgen.data.pack import map_array
from ddgen.errors import UserError

CACHE_VERSION = 2
"""Raise it when what is stored changes, so that older caches are not taken."""
NUM_SAMPLED_IMAGES = 256
"""Images, evenly spread over the data, that tell beforehand about where the latents lie and whether posteriors are
negligible. Latents are stored relative to that, so that float16 fits any autoencoder; the exact statistics follow."""
NEGLIGIBLE_STD = 1e-3
"""Posteriors narrower than this part of their channel are stored as points, at half the size. The least noise that
training ever adds is 0.0064 (the cosine schedule's first timestep); together with 0.001 that is 0.0065."""
_HEADER_BYTES = 4096


@dataclass(frozen=True)
class LatentCache:
    """Posterior moments of all training images.

    Attributes:
        mean: float16 (n, s, d, h, w), about standardised; [:, 0] of the images, [:, 1], if there, of their mirror
            images.
        std: float16, likewise, standard deviation of the posterior; None where it is zero or negligible.
        fingerprint: Identifies the autoencoder, the images and their order.
        scale: float32 (d, 1, 1); what is stored, times this plus `shift`, is standardised. None: it is already.
        shift: float32 (d, 1, 1), likewise.
    """

    mean: Tensor
    std: Tensor | None
    fingerprint: str
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Size in memory, in bytes."""
        return self.mean.nbytes + (0 if self.std is None else self.std.nbytes)

    def to(self, device: torch.device) -> LatentCache:
        """Returns the whole cache on a device."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def batch(self, indices: Tensor, mirrored: Tensor, noise: Tensor) -> Tensor:
        """Draws latents from the posteriors.

        Args:
            indices: Which images, int64 (b,).
            mirrored: Whether to take the mirror image, bool (b,); ignored if mirror images are not cached.
            noise: Standard normal, (b, d, h, w).

        Returns:
            Standardised latents, float32 (b, d, h, w), on the cache's device.
        """
        sides = self.mean.shape[1]
        rows = (indices * sides + mirrored * (sides - 1)).to(self.mean.device)
        # Twice as fast as self.mean[indices, side], which copies value by value.
        latents = self.mean.flatten(0, 1).index_select(0, rows).float()
        if self.std is not None:
            latents.addcmul_(self.std.flatten(0, 1).index_select(0, rows).float(), noise.to(latents.device))
        if self.scale is None or self.shift is None:
            return latents
        return torch.addcmul(self.shift.to(latents.device), latents, self.scale.to(latents.device))


def build_latent_cache(
    autoencoder: Autoencoder, pixels: Tensor, path: Path, *, flip: bool, fingerprint: str, accelerator: Accelerator
) -> tuple[Autoencoder, LatentCache]:
    """Encodes all images, and their mirror images, or reads them back if `path` holds exactly these.

    The images are cut into shards, and the shards are dealt out to the processes. Each is written into its own part of
    one file, synced, and only then marked as done, so a run that was killed goes on with the shards that are missing.
    What is written depends on neither the number of processes nor on where it was interrupted.

    Args:
        autoencoder: Encoder; its latent statistics are not used.
        pixels: uint8 (n, 3, h, w).
        path: Folder of the cache, the same for all processes.
        flip: Encode mirror images too.
        fingerprint: Identifies autoencoder and images.
        accelerator: Processes; every one must call this.

    Returns:
        The autoencoder with the statistics of these latents, and the cache, memory-mapped.

    Raises:
        UserError: Too little disk, or latents that are not finite.
    """
    fingerprint = f"{fingerprint}-{'flip' if flip else 'noflip'}-{CACHE_VERSION}"
    # Only the main process looks, and tells the others: on a network disk they would look at what is not there yet,
    # and remember that.
    told: list[Any] = [None]
    if accelerator.is_main_process:
        told[0] = _open_or_begin(autoencoder, pixels, path, 2 if flip else 1, fingerprint, accelerator)
    meta, missing = broadcast_object_list(told)[0]
    if not meta["complete"]:
        about = autoencoder.with_statistics(torch.tensor(meta["sampled_mean"]), torch.tensor(meta["sampled_std"]))
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        _encode_shards(about, pixels, path, meta, mine, progress=accelerator.is_main_process)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            told[0] = _finish(path, meta)
        meta = broadcast_object_list(told)[0]
    cache, statistics = _open(path, meta)
    return autoencoder.with_statistics(*statistics), cache


def read_latent_cache(path: Path) -> tuple[LatentCache, Tensor] | None:
    """Opens what `build_latent_cache` has finished.

    Args:
        path: Folder of the cache.

    Returns:
        The cache, memory-mapped, and mean and standard deviation per channel that the latents are standardised by,
        float32 (2, d); None if there is no finished cache.
    """
    meta = read_json(path / "meta.json") if (path / "meta.json").is_file() else {}
    return _open(path, meta) if meta.get("complete") else None


def _open(path: Path, meta: dict[str, Any]) -> tuple[LatentCache, Tensor]:
    mean = torch.from_numpy(map_array(path / "mean.npy"))
    std = torch.from_numpy(map_array(path / "std.npy")) if meta["has_std"] else None
    latents_mean, latents_std = torch.tensor(meta["latents_mean"]), torch.tensor(meta["latents_std"])
    scale = torch.tensor(meta["sampled_std"]) / latents_std
    shift = (torch.tensor(meta["sampled_mean"]) - latents_mean) / latents_std
    cache = LatentCache(mean, std, meta["fingerprint"], scale.reshape(-1, 1, 1), shift.reshape(-1, 1, 1))
    return cache, torch.stack([latents_mean, latents_std])


def batch_size_of(image_size: int, device: torch.device) -> int:
    """Returns how many images are encoded at once: 32 of 64 px on a CPU, where more are not faster; 256 elsewhere."""
    num_pixels = 2**17 if device.type == "cpu" else 2**20
    return min(512, _power_of_two(num_pixels // image_size**2))


def shard_size_of(image_size: int) -> int:
    """Returns how many images are lost at most when a process is killed: 2048 up to 64 px, 256 from 182 px on.

    A power of two, so that shards are whole batches, and begin where a page of the disk begins.
    """
    return max(256, min(2048, _power_of_two(2**23 // image_size**2)))


def _power_of_two(number: int) -> int:
    """Returns the largest power of two that is not above a number; 1 for 0."""
    return 1 << max(0, number.bit_length() - 1)


def _open_or_begin(
    autoencoder: Autoencoder, pixels: Tensor, path: Path, num_sides: int, fingerprint: str, accelerator: Accelerator
) -> tuple[dict[str, Any], list[int]]:
    """Returns what meta.json says, and which shards are missing; begins a cache where none can be gone on with."""
    size = pixels.shape[-1]
    identity = {
        "fingerprint": fingerprint,
        # What else an unfinished cache must share with what it is finished with, for every value to be the same.
        "precision": autoencoder.precision,
        "device": autoencoder.device.type,
        "batch_size": batch_size_of(size, autoencoder.device),
        "shard_size": shard_size_of(size),
    }
    meta = read_json(path / "meta.json") if (path / "meta.json").is_file() else {}
    if meta.get("complete") and meta["fingerprint"] == fingerprint:
        return meta, []
    if any(meta.get(name) != value for name, value in identity.items()):
        meta = _begin(autoencoder, pixels, path, num_sides, identity, accelerator)
    total = -(-len(pixels) // meta["shard_size"])
    missing = [shard for shard in range(total) if not _marker(path, shard).exists()]
    if len(missing) < total:
        accelerator.print(f"latents: {total - len(missing)} of {total} parts are there already")
    return meta, missing


def _begin(
    autoencoder: Autoencoder,
    pixels: Tensor,
    path: Path,
    num_sides: int,
    identity: dict[str, Any],
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Makes an empty cache: what a sample tells, and arrays without content yet, which take no disk."""
    channel_mean, channel_std, widest, latent_shape = _sample(autoencoder, pixels, num_sides)
    shape = (len(pixels), num_sides, *latent_shape)
    meta = identity | {
        "shape": shape,
        "sampled_mean": channel_mean.tolist(),
        "sampled_std": channel_std.tolist(),
        "has_std": widest >= NEGLIGIBLE_STD,
        "complete": False,
    }
    names = ("mean", "std") if meta["has_std"] else ("mean",)
    num_bytes = 2 * int(np.prod(shape)) * len(names)
    what = f"latents of {len(pixels):,} images{' and their mirror images' if num_sides == 2 else ''}"
    check_free_space(path, int(1.02 * num_bytes) + 2**20, f"caching {what}", "--output_dir")
    accelerator.print(f"{what}: {num_bytes / 1e9:.2f} GB in {path}")
    with atomic_dir(path, replace=True) as temporary:
        for name in names:
            _create_array(temporary / f"{name}.npy", shape)
        (temporary / "shards").mkdir()
        write_json(temporary / "meta.json", meta)
    return meta


def _sample(autoencoder: Autoencoder, pixels: Tensor, num_sides: int) -> tuple[Tensor, Tensor, float, tuple[int, ...]]:
    """Measures latents drawn from the posteriors of some images, in float64.

    Returns:
        Mean and standard deviation per channel, (d,); the root mean square width of the posteriors as a part of the
        latter, of the channel where it is largest; the shape of a latent.
    """
    n, batch_size = len(pixels), batch_size_of(pixels.shape[-1], autoencoder.device)
    chosen = torch.arange(min(n, NUM_SAMPLED_IMAGES)) * n // min(n, NUM_SAMPLED_IMAGES)
    moments = []
    for part in chosen.split(batch_size):
        images = to_images(pixels[part].to(autoencoder.device))
        moments += [autoencoder.encode(images.flip(-1) if side else images) for side in range(num_sides)]
    means, stds = (torch.cat(tensors).double().cpu() for tensors in zip(*moments, strict=True))
    _check_finite(means + stds, "the training images")
    posterior = stds.square().mean((0, 2, 3))
    variance = (means.square().mean((0, 2, 3)) + posterior - means.mean((0, 2, 3)).square()).clamp_min(1e-12)
    widest = (posterior / variance).max().sqrt().item()
    return means.mean((0, 2, 3)), variance.sqrt(), widest, tuple(means.shape[1:])


def _create_array(path: Path, shape: tuple[int, ...]) -> None:
    """Makes a float16 .npy file full of zeros that take no disk.

    Its header fills a page, so that no two shards share one: two machines that write to the same page of a network
    disk may undo each other's work.
    """
    header = repr({"descr": "<f2", "fortran_order": False, "shape": shape}).encode()
    length = _HEADER_BYTES - 10
    with open(path, "wb") as file:
        file.write(b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + header.ljust(length - 1) + b"\n")
        file.truncate(_HEADER_BYTES + 2 * int(np.prod(shape)))


def _marker(path: Path, shard: int) -> Path:
    """Where a shard's sums stand once it is written."""
    return path / "shards" / f"{shard:06d}.json"


def _finish(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Puts the exact statistics of the latents together from the shards', in float64, and marks the cache as whole."""
    sums = [read_json(marker) for marker in sorted((path / "shards").glob("*.json"))]
    n, num_sides, _, height, width = meta["shape"]
    first, second = (np.sum([shard[name] for shard in sums], axis=0) / (n * num_sides * height * width)
                     for name in ("sum", "sum_of_squares"))  # fmt: skip
    sampled_mean, sampled_std = np.array(meta["sampled_mean"]), np.array(meta["sampled_std"])
    exact = {
        "latents_mean": (sampled_mean + sampled_std * first).tolist(),
        "latents_std": (sampled_std * np.sqrt(np.maximum(second - first**2, 1e-12))).tolist(),
        "complete": True,
    }
    write_json(path / "meta.json", meta | exact)
    remove_dir(path / "shards")
    return meta | exact


def _encode_shards(
    autoencoder: Autoencoder, pixels: Tensor, path: Path, meta: dict[str, Any], shards: list[int], *, progress: bool
) -> None:
    """Encodes and writes some shards; the next images are read, and the last shard is written, meanwhile."""
    num_sides, size = meta["shape"][1], meta["shard_size"]
    bounds = [(shard * size, min((shard + 1) * size, len(pixels))) for shard in shards]
    slices = (
        slice(start, min(start + meta["batch_size"], end))
        for first, end in bounds
        for start in range(first, end, meta["batch_size"])
    )
    total = num_sides * sum(end - first for first, end in bounds)
    bar = tqdm(total=total, desc="latents", unit="img", unit_scale=True, disable=not progress)
    with bar, ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        batches = _read_ahead(reader, pixels, slices, autoencoder.device)
        for shard, (first, end) in zip(shards, bounds, strict=True):
            parts: list[tuple[Tensor, Tensor | None]] = []
            for _ in range(first, end, meta["batch_size"]):
                images = to_images(next(batches))
                parts.append(_encode(autoencoder, images, num_sides, keep_std=meta["has_std"]))
                bar.update(num_sides * len(images))
            if writing is not None:
                writing.result()
            writing = writer.submit(partial(_write_shard, path, shard, first, parts))
        if writing is not None:
            writing.result()


def _read_ahead(
    reader: ThreadPoolExecutor, pixels: Tensor, slices: Iterable[slice], device: torch.device
) -> Iterator[Tensor]:
    """Yields batches of pixels on the device, two being read meanwhile."""

    def read(where: slice) -> Tensor:
        batch = pixels[where]
        return batch.pin_memory() if device.type == "cuda" else batch.clone()

    waiting: deque[Future[Tensor]] = deque()
    for where in slices:
        waiting.append(reader.submit(read, where))
        if len(waiting) > 2:
            yield waiting.popleft().result().to(device, non_blocking=True)
    while waiting:
        yield waiting.popleft().result().to(device, non_blocking=True)


@torch.inference_mode()
def _encode(
    autoencoder: Autoencoder, images: Tensor, num_sides: int, *, keep_std: bool
) -> tuple[Tensor, Tensor | None]:
    """Encodes images and their mirror images to standardised float16 moments (b, s, d, h, w), on the device."""
    sides = [autoencoder.encode(images.flip(-1) if side else images) for side in range(num_sides)]
    mean = torch.stack([autoencoder.standardise(mean).half() for mean, _ in sides], dim=1)
    if not keep_std:
        return mean, None
    scale = autoencoder.latents_std.to(mean.device)
    return mean, torch.stack([(std / scale).half() for _, std in sides], dim=1)


def _write_shard(path: Path, shard: int, first: int, parts: list[tuple[Tensor, Tensor | None]]) -> None:
    """Writes a shard into its place in the arrays and, once it is on the disk, the sums that say that it is there."""
    means, stds = zip(*parts, strict=True)
    sums = torch.zeros(2, means[0].shape[2], dtype=torch.float64)
    for name, tensors in (("mean", means), ("std", stds)):
        if tensors[0] is None:
            continue
        values = torch.cat(tensors).cpu()
        _check_finite(values, f"images {first} to {first + len(values) - 1}")
        for few in values.split(256):
            exact = few.float()  # summed in float32 over a latent's positions, in float64 over images
            sums[0] += exact.sum((3, 4)).double().sum((0, 1)) * (name == "mean")
            sums[1] += exact.square().sum((3, 4)).double().sum((0, 1))
        with open(path / f"{name}.npy", "r+b") as file:
            file.seek(_HEADER_BYTES + first * values[0].nbytes)
            file.write(values.numpy().data)
            file.flush()
            os.fsync(file.fileno())
    write_json(_marker(path, shard), {"sum": sums[0].tolist(), "sum_of_squares": sums[1].tolist()})


def _check_finite(values: Tensor, what: str) -> None:
    if not bool(values.isfinite().all()):
        raise UserError(
            f"--vae: the latents of {what} are not finite; use --mixed_precision no, or another autoencoder"
        )
