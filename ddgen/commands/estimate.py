"""About how long a training run takes and how much disk it fills, from a few timed steps and the sizes of things."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ddgen.autoencoder.training import build as build_autoencoder
from ddgen.config import TrainConfig
from ddgen.data import ImageDataset
from ddgen.diffusion.posthoc import NUM_SNAPSHOTS
from ddgen.diffusion.unet import build_unet
from ddgen.evaluation.cost import SHARE
from ddgen.observer.networks import build_network
from ddgen.precision import autocast, memory_format

BUDGET_SECONDS = 3.0  # for timing one network
LatentShape = tuple[int, int]


def estimate_seconds(
    config: TrainConfig,
    dataset: ImageDataset,
    latent_shape: LatentShape,
    output_dir: Path,
    steps_done: int,
    accelerator: Accelerator,
    precision: str,
) -> dict[str, float]:
    """Times a few steps of every network that is to be trained, on random numbers, and scales them up.

    Not counted: loading data, the features behind the FD curve, and what compilation costs and gains.

    Args:
        config: Settings.
        dataset: Training images.
        latent_shape: Channels and side of the latents.
        output_dir: The run folder; what it already holds takes no time.
        steps_done: Steps of the denoiser before this run goes on.
        accelerator: Device and processes.
        precision: Autocast precision, resolved.

    Returns:
        Seconds of "observer", "autoencoder" with encoding, "denoiser" and "curve".
    """
    device, world = accelerator.device, accelerator.num_processes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        seconds = _denoiser_seconds(config, dataset, latent_shape, steps_done, device, precision, world)
        if config.observer.observer is None and not (output_dir / "observer").is_dir():
            images = len(dataset) * (1 - config.observer.observer_holdout) * config.observer.observer_epochs
            seconds["observer"] = images * _time_observer(config, dataset, device, precision)
        trained_here = config.autoencoder.space == "latent" and config.autoencoder.vae is None
        if trained_here and not (output_dir / "latents" / "meta.json").is_file():
            trained = (output_dir / "autoencoder").is_dir()
            images = 0.0 if trained else config.autoencoder.vae_train_steps * config.autoencoder.vae_batch_size
            # Encoding is the forward of half the network: a sixth of a training step.
            images += len(dataset) * (2 if config.data.may_flip else 1) / 6
            seconds["autoencoder"] = images / world * _time_autoencoder(config, dataset, device, precision)
    order = ("observer", "autoencoder", "denoiser", "curve")
    return {name: seconds[name] for name in order if seconds.get(name)}


def estimate_bytes(config: TrainConfig, dataset: ImageDataset, latent_shape: LatentShape, num_parameters: int) -> int:
    """Returns what a run leaves on disk: checkpoints and the one being written, latents, averages, the generator."""
    checkpoint = 4 * num_parameters * (1 + 2 + len(config.optimizer.ema_stds))  # weights, Adam's two moments, averages
    d, side = latent_shape
    latents = 2 * 2 * len(dataset) * (2 if config.data.may_flip else 1) * d * side * side  # mean and std, float16
    snapshots = NUM_SNAPSHOTS * 2 * num_parameters * len(config.optimizer.ema_stds)
    snapshots *= bool(config.optimizer.posthoc_ema_stds)
    generator = 4 * num_parameters
    if config.optimizer.guide_step:
        snapshots += 2 * num_parameters * len(config.optimizer.ema_stds)
        generator += 2 * num_parameters
    return checkpoint * (config.run.checkpoints_total_limit + 1) + latents + snapshots + generator


def seconds_per_image(step: Callable[[int], None], batch_size: int, device: torch.device) -> float:
    """Times `step`, which takes a number of images, with as many of `batch_size` images as a few seconds allow."""
    small = 4  # batch normalisation needs two or more
    _timed(step, small, device)  # the first time is never like the others
    each = _timed(step, small, device) / small
    count = max(small, min(batch_size, int(BUDGET_SECONDS / 2 / each)))
    return statistics.median(_timed(step, count, device) for _ in range(2)) / count


def _timed(step: Callable[[int], None], count: int, device: torch.device) -> float:
    start = time.perf_counter()
    step(count)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _denoiser_seconds(
    config: TrainConfig,
    dataset: ImageDataset,
    latent_shape: LatentShape,
    steps_done: int,
    device: torch.device,
    precision: str,
    world: int,
) -> dict[str, float]:
    optim, monitor = config.optimizer, config.monitor
    d, side = latent_shape
    unet = build_unet(config.denoiser, latent_channels=d, latent_size=side, num_classes=dataset.num_classes)
    unet = unet.to(device, memory_format=memory_format(device, precision))

    def forward(count: int) -> Tensor:
        index = torch.zeros(count, dtype=torch.long, device=device)
        with autocast(device, precision):
            sample: Tensor = unet(torch.randn(count, d, side, side, device=device), index, index).sample
        return sample

    def sample(count: int) -> None:
        with torch.inference_mode():
            forward(count)

    micro_batch = max(1, optim.train_batch_size // (world * optim.gradient_accumulation_steps))
    train = seconds_per_image(lambda count: forward(count).float().square().mean().backward(), micro_batch, device)
    steps = max(optim.max_train_steps - steps_done, 0)
    seconds = {"denoiser": steps * optim.train_batch_size / world * train, "curve": 0.0}
    if monitor.fid_every != 0:
        forwards = len(optim.ema_stds) * monitor.fid_num_images * monitor.fid_num_inference_steps / world
        point = forwards * seconds_per_image(sample, 128, device)
        # Derived, the curve takes its share of training, but there is one point at least.
        share = max(SHARE * seconds["denoiser"], point)
        seconds["curve"] = share if monitor.fid_every is None else math.ceil(steps / monitor.fid_every) * point
    return seconds


def _time_observer(config: TrainConfig, dataset: ImageDataset, device: torch.device, precision: str) -> float:
    size = config.observer.observer_input_size or dataset.image_size
    network = build_network(config.observer.observer_network, dataset.num_classes, size).to(device).train()
    return _time_training(network, size, config.observer.observer_batch_size, device, precision)


def _time_autoencoder(config: TrainConfig, dataset: ImageDataset, device: torch.device, precision: str) -> float:
    if not config.autoencoder.vae_train_steps:
        return 0.0  # patch PCA, in closed form
    vae = build_autoencoder(config.autoencoder, dataset.image_size).to(device)

    def restore(images: Tensor) -> Tensor:
        restored: Tensor = vae.decode(vae.encode(images).latent_dist.mean).sample
        return restored

    return _time_training(restore, dataset.image_size, config.autoencoder.vae_batch_size, device, precision)


def _time_training(
    network: Callable[[Tensor], Tensor], size: int, batch_size: int, device: torch.device, precision: str
) -> float:
    """Times forward and backward of a network that takes images (b, 3, size, size); returns seconds an image."""

    def step(count: int) -> None:
        with autocast(device, precision):
            output = network(torch.rand(count, 3, size, size, device=device))
        output.float().square().mean().backward()

    return seconds_per_image(step, batch_size, device)
