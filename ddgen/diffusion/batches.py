"""The batches of training: a function of the step, made ahead of time where a GPU would otherwise wait for them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ddgen.autoencoder.latents import LatentCache
from ddgen.config import TrainConfig
from ddgen.diffusion.objective import Draws, draw
from ddgen.seeds import batch_indices

GPU_SHARE = 0.25  # of its free memory, that the latents may take


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward is computed on.

    Attributes:
        latents: Standardised, float32 (b, d, h, w).
        labels: int64 (b,).
        draws: Noise, timesteps and dropped labels.
    """

    latents: Tensor
    labels: Tensor
    draws: Draws


# Indices of the images, their latents unless they are on the GPU, where they are looked up, and the draws.
Prepared = tuple[Tensor, Tensor | None, Draws]


class Batches:
    """Gives the micro-batches of any step; a step's numbers depend on seed and step only, not on the device.

    On a GPU everything random is drawn on the CPU by a thread, one step ahead, and copied without waiting for the GPU.
    On a CPU, where it takes less than a hundredth of a step and would compete for the same cores, it is done in turn.
    """

    def __init__(
        self,
        config: TrainConfig,
        latents: LatentCache,
        labels: Tensor,
        slices: list[slice],
        num_timesteps: int,
        device: torch.device,
        *,
        ahead: bool | None = None,
    ) -> None:
        """Puts latents and labels where they are used from.

        Args:
            config: Settings.
            latents: Of all n training images.
            labels: Their classes, int64 (n,).
            slices: This process's micro-batches of the global batch.
            num_timesteps: Of the training schedule.
            device: Where batches are needed.
            ahead: Prepare the next step in a thread. Default: on a GPU.
        """
        self.config, self.slices, self.num_timesteps = config, slices, num_timesteps
        self.shape = (config.optimizer.train_batch_size, *latents.mean.shape[2:])
        self.latents, self.labels, self.device = place(latents, device), labels.to(device), device
        ahead = device.type == "cuda" if ahead is None else ahead
        self.thread = ThreadPoolExecutor(1, "batches") if ahead else None
        self.next: tuple[int, Future[list[Prepared]]] | None = None

    def at(self, step: int) -> list[MicroBatch]:
        """Returns the micro-batches of optimizer step `step`, on the device; with a thread, starts the next step's."""
        if self.thread is None:
            return [self._on_device(*part) for part in self._prepare(step)]
        parts = self.next[1].result() if self.next and self.next[0] == step else self._prepare(step)
        self.next = step + 1, self.thread.submit(self._prepare, step + 1)
        return [self._on_device(*part) for part in parts]

    def close(self) -> None:
        """Ends the thread."""
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)

    def _prepare(self, step: int) -> list[Prepared]:
        """Does what needs no GPU: the draws, and the latents where they are in host memory."""
        b, seed = self.shape[0], self.config.run.seed
        chosen = torch.from_numpy(batch_indices(seed, "diffusion", step * b, b, len(self.labels)))
        draws = draw(self.config.denoiser, seed, step, self.shape, self.num_timesteps)
        on_cpu = self.latents.mean.device.type == "cpu"
        parts = []
        for where in self.slices:
            indices, here = chosen[where], draws.part(where)
            x0 = self.latents.batch(indices, here.mirrored, here.posterior_noise) if on_cpu else None
            parts.append((indices, x0, here))
        return [self._pin(*part) for part in parts] if self.device.type == "cuda" else parts

    @staticmethod
    def _pin(indices: Tensor, x0: Tensor | None, draws: Draws) -> Prepared:
        """Copies to page-locked memory, from which a GPU fetches without anyone waiting."""
        pinned = Draws(*(getattr(draws, name).pin_memory() for name in draws.__dataclass_fields__))
        return indices.pin_memory(), None if x0 is None else x0.pin_memory(), pinned

    def _on_device(self, indices: Tensor, x0: Tensor | None, draws: Draws) -> MicroBatch:
        indices, draws = indices.to(self.device, non_blocking=True), draws.to(self.device)
        if x0 is None:
            x0 = self.latents.batch(indices, draws.mirrored, draws.posterior_noise)
        return MicroBatch(x0.to(self.device, non_blocking=True), self.labels[indices], draws)


def place(latents: LatentCache, device: torch.device) -> LatentCache:
    """Returns the latents on the GPU if they fit into a quarter of its free memory, otherwise where they are."""
    if device.type != "cuda":
        return latents
    fits = latents.num_bytes <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    return latents.to(device) if fits else latents
