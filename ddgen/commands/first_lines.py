"""What a training run says before it starts: what will be trained, on what, where it goes, how long it takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from ddgen.checkpoint import read_json
from ddgen.commands.estimate import estimate_bytes, estimate_seconds
from ddgen.commands.runs import versions_line
from ddgen.commands.train_checks import Given, latent_shape
from ddgen.config import TrainConfig
from ddgen.data import ImageDataset
from ddgen.diffusion.flops import flops_per_image
from ddgen.diffusion.unet import build_unet
from ddgen.hardware import device_name, number_format
from ddgen.launch import num_cores
from ddgen.units import readable_memory, readable_seconds

_NAME_WIDTH = 14


def first_lines(
    config: TrainConfig,
    dataset: ImageDataset,
    given: Given,
    output_dir: Path,
    resume_from: Path | None,
    accelerator: Accelerator,
    precision: str,
) -> str:
    """Returns the lines; takes some seconds, in which a few steps of every network are timed.

    Args:
        config: Settings.
        dataset: Training images.
        given: What the user brings.
        output_dir: The run folder.
        resume_from: The checkpoint that the run goes on from.
        accelerator: Device and processes; every one must call this.
        precision: Autocast precision, resolved.
    """
    shape = latent_shape(config, given.autoencoder, dataset)
    with torch.device("meta"):
        unet = build_unet(
            config.denoiser, latent_channels=shape[0], latent_size=shape[1], num_classes=dataset.num_classes
        )
    flops = flops_per_image(unet)
    num_parameters = sum(p.numel() for p in unet.parameters())
    compiled = ", compiled" if config.optimizer.compiles_on(accelerator.device.type) else ""
    done = 0 if resume_from is None else int(read_json(resume_from / "state.json")["step"])
    seconds = estimate_seconds(config, dataset, shape, output_dir, done, accelerator, precision)
    parts = ", ".join(f"{name} {readable_seconds(value)}" for name, value in seconds.items())
    latents = f"latents {shape[0]} x {shape[1]} x {shape[1]}"
    mirrored = ", mirrored too" if config.data.may_flip else ""
    facts = {
        "device": _device(accelerator),
        "numbers": number_format(accelerator.device, precision) + compiled,
        "data": f"{dataset.name}: {len(dataset):,} images, {_classes(dataset)}, {dataset.image_size} px{mirrored}",
        "observer": config.observer.observer or _observer(config),
        "autoencoder": f"{_autoencoder(config)}; {latents}",
        "denoiser": f"{num_parameters / 1e6:.1f}M parameters, {flops / 1e9:.3g} GFLOP an image to train",
        "training": _training(config, len(dataset), accelerator.num_processes),
        "time": f"about {readable_seconds(sum(seconds.values()))}: {parts}",
        "disk": f"about {_disk(config, dataset, shape, num_parameters, output_dir)}",
        "output": str(output_dir),
        "resume": "the same command" if resume_from is None else f"from {resume_from.name}, {done:,} steps done",
    }
    return "\n".join([versions_line(), *(f"{name:<{_NAME_WIDTH}}{text}" for name, text in facts.items())])


def _device(accelerator: Accelerator) -> str:
    count = accelerator.num_processes
    text = device_name(accelerator.device)
    if accelerator.device.type == "cpu":
        text += f", {_plural(num_cores(), 'core')}, {_plural(torch.get_num_threads(), 'thread')}"
    return f"{text}, {_plural(count, 'process', 'processes')}"


def _classes(dataset: ImageDataset) -> str:
    counts = torch.bincount(dataset.labels, minlength=dataset.num_classes)
    low, high = int(counts.min()), int(counts.max())
    return f"{_plural(dataset.num_classes, 'class', 'classes')} of {low:,}" + (f" to {high:,}" if high > low else "")


def _observer(config: TrainConfig) -> str:
    return f"{config.observer.observer_network}, {_plural(config.observer.observer_epochs, 'epoch')}"


def _autoencoder(config: TrainConfig) -> str:
    if config.autoencoder.space == "pixel":
        return "none, pixels are diffused"
    steps, size = config.autoencoder.vae_train_steps, config.autoencoder.vae_batch_size
    if config.autoencoder.vae is not None:
        return config.autoencoder.vae
    return f"from patch PCA, {steps:,} steps of {size} images" if steps else "patch PCA"


def _training(config: TrainConfig, num_images: int, num_processes: int) -> str:
    optim = config.optimizer
    steps, batch, parts = optim.max_train_steps, optim.train_batch_size, optim.gradient_accumulation_steps
    micro = batch // (num_processes * parts)
    return (
        f"{_plural(steps, 'step')} of {batch} images"
        f" ({_plural(num_processes, 'process', 'processes')} x {micro} x {parts} accumulated),"
        f" {steps * batch / num_images:.1f} epochs"
    )


def _disk(
    config: TrainConfig, dataset: ImageDataset, shape: tuple[int, int], num_parameters: int, output_dir: Path
) -> str:
    needed = estimate_bytes(config, dataset, shape, num_parameters)
    existing = next(folder for folder in (output_dir.absolute(), *output_dir.absolute().parents) if folder.exists())
    return f"{readable_memory(needed)}; {readable_memory(shutil.disk_usage(existing).free)} free"


def _plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
