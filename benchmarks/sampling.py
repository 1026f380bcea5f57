"""How fast candidates are made: sample.py's way against the stock way, on the same weights; ratios of one run.

    python benchmarks/sampling.py                            # a generator with random weights: the cost is the same
    python benchmarks/sampling.py --run_dir runs/cifar10     # a trained one; benchmarks/samplers.py has its distances

Contestants take turns (A B C A B C ...), with the same number of threads:

- stock: the loop of a diffusers pipeline: float32, DDIM with 50 steps and guidance at every one, one class at a time,
  `--stock_batch_size` images together, decoded, and saved as PNG files.
- default: sample.py's own way with its default sampler: candidates of all classes in batches, guided inside the run's
  interval, stored in a pool.
- fast: the same with `--fast`.

Ranking is not part of it: the stock way has none. Goal on a CPU: default or fast at least 6 times stock, at no greater
distance from the real images (benchmarks/samplers.py).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from ddgen.autoencoder.autoencoder import wrap
from ddgen.autoencoder.training import build as build_autoencoder
from ddgen.config import FAST, AutoencoderConfig, DenoiserConfig, GuidanceConfig
from ddgen.diffusion.generator import Generator, load_generator
from ddgen.diffusion.objective import build_scheduler
from ddgen.diffusion.unet import build_unet
from ddgen.distill.batching import BatchSizes, memory_of
from ddgen.distill.filling import fill, missing_keys
from ddgen.distill.pool import CandidatePool
from ddgen.hardware import device_name, number_format
from ddgen.precision import memory_format, resolve_precision
from ddgen.timing import Clock


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    run_dir: str | None = None
    """A finished run. Default: a generator with random weights, built as configs/cifar10_cpu.yaml says."""
    rounds: int = 3
    """Counted turns of every contestant; one before them is not counted."""
    num_images: int = 80
    """Images of a turn of the stock way; ours make `ours_factor` times as many."""
    ours_factor: int = 4
    """How many times more images ours make in a turn, so that turns take about as long."""
    stock_batch_size: int = 40
    """Images of one class that the stock way samples together: 4 candidates each for ipc 10."""


def main(argv: list[str] | None = None) -> int:
    """Measures and prints ratios."""
    settings = tyro.cli(Settings, args=argv, use_underscores=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(None, device)
    generator = _generator(settings, device, precision)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads; ours: {number_format(device, precision)}")
    ours = settings.num_images * settings.ours_factor
    default = {"sampler": GuidanceConfig().sampler, "num_inference_steps": GuidanceConfig().steps}
    with tempfile.TemporaryDirectory() as folder:
        contestants: dict[str, tuple[int, Callable[[int], None]]] = {
            "stock": (settings.num_images, _stock(generator, settings, Path(folder), device)),
            "default": (ours, _ours(generator.with_sampling(**default), ours, Path(folder) / "default")),
            "fast": (ours, _ours(generator.with_sampling(**FAST), ours, Path(folder) / "fast")),
        }
        rates, processor = _race(contestants, settings.rounds)
    for name in contestants:
        print(f"  {name:<8}{statistics.median(rates[name]):>9.2f} images/s")
    for measured, kind in ((rates, "wall clock"), (processor, "processor time")):
        for name in ("default", "fast"):
            ratios = [a / b for a, b in zip(measured[name], measured["stock"], strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"  {name} / stock, {kind}: {statistics.median(ratios):.2f}   (goal 6 for one of them; {spread})")
    return 0


def _race(
    contestants: dict[str, tuple[int, Callable[[int], None]]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Returns images per second of wall-clock and of processor time, of every contestant and round."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    processor: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(rounds + 1):
        for name, (count, turn) in contestants.items():
            start, spent = time.perf_counter(), time.process_time()
            turn(round_number)
            if round_number:
                rates[name].append(count / (time.perf_counter() - start))
                processor[name].append(count / (time.process_time() - spent))
    return rates, processor


def _generator(settings: Settings, device: torch.device, precision: str) -> Generator:
    if settings.run_dir is not None:
        return load_generator(Path(settings.run_dir) / "generator", device, precision)
    torch.manual_seed(0)
    vae = build_autoencoder(
        AutoencoderConfig(vae_downsample=4, vae_latent_channels=12, vae_patch=4, vae_channels=(64,)), 32
    )
    config = DenoiserConfig(preset="xs")
    unet = build_unet(config, latent_channels=12, latent_size=8, num_classes=10)
    autoencoder = wrap(vae, device, precision).with_statistics(torch.zeros(12), torch.ones(12))
    names = tuple(f"class {label}" for label in range(10))
    sampling = replace(GuidanceConfig(), guidance_scale=2.0, guidance_interval=(0.2, 0.9))
    unet = unet.to(device, memory_format=memory_format(device, precision)).eval().requires_grad_(False)
    return Generator(unet, autoencoder, build_scheduler(config), names, 32, sampling, precision)


def _ours(generator: Generator, count: int, folder: Path) -> Callable[[int], None]:
    classes = len(generator.class_names)

    def turn(round_number: int) -> None:
        pool = CandidatePool.open(
            folder / str(round_number),
            class_names=generator.class_names,
            image_size=generator.image_size,
            seed=round_number,
            settings=generator.settings(),
        )
        keys = missing_keys(pool, range(classes), count // classes)
        sizes = BatchSizes(None, memory_of(generator.unet.device, 1))
        fill(pool, generator, keys, sizes=sizes, clock=Clock())

    return turn


def _stock(generator: Generator, settings: Settings, folder: Path, device: torch.device) -> Callable[[int], None]:
    """The loop of a diffusers pipeline, as its documentation shows it."""
    unet: UNet2DModel = generator.unet
    vae: AutoencoderKL = generator.autoencoder.vae
    scheduler = DDIMScheduler.from_config(generator.scheduler.config)
    mean, std = generator.autoencoder.latents_mean, generator.autoencoder.latents_std
    null, scale = unet.config.num_class_embeds - 1, generator.sampling.guidance_scale
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)

    @torch.no_grad()
    def batch(label: int, count: int, random: torch.Generator) -> Tensor:
        scheduler.set_timesteps(50)
        x = torch.randn((count, *shape), generator=random).to(device)
        labels = torch.tensor([label] * count + [null] * count, device=device)
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(torch.cat([x] * 2), t)
            conditional, unconditional = unet(inputs, t, labels).sample.chunk(2)
            x = scheduler.step(unconditional + scale * (conditional - unconditional), t, x).prev_sample
        return vae.decode(x * std + mean).sample

    def turn(round_number: int) -> None:
        random = torch.Generator().manual_seed(round_number)
        done = 0
        while done < settings.num_images:
            label = done // settings.stock_batch_size % len(generator.class_names)
            images = (batch(label, settings.stock_batch_size, random) / 2 + 0.5).clamp(0, 1)
            for array in (images.permute(0, 2, 3, 1).cpu().float().numpy() * 255).round().astype("uint8"):
                path = folder / "stock" / str(round_number) / f"{label:03d}" / f"{done:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
                done += 1

    return turn


if __name__ == "__main__":
    sys.exit(main())
