"""How fast the diffusion model trains: our loop against the bare network, and against a plain loop; ratios of one run.

    python benchmarks/training.py

Four things take turns (A B C D A B C D ...), with the same UNet, batch size and number of threads:

- loop: ddgen's `train_diffusion` as a user runs it: latents from the cache, logging, two averages, progress bar. What
  happens once a run is not counted: the images per second are those it writes to metrics.jsonl.
- bare: forward, backward and AdamW step of the same UNet on tensors that are ready.
- optimizer: the AdamW step alone.
- plain: a loop in the way of diffusers' unconditional training example, with an autoencoder before the UNet: PNG files
  opened and augmented by a DataLoader in the training process (its default), encoded at every step, float32, default
  memory layout, AdamW as it is built there, EMAModel, the loss read at every step.

Goals: loop / bare at least 0.90, loop / plain at least 2.5 on a CPU. Measured once, in processor time, with one thread
of a CPU without AMX (float32 on both sides), which other work shared:

    case         loop / bare          loop / plain
    64px         0.94 (0.92-0.96)     2.57 (2.54-2.60)
    cifar10_cpu  0.95 (0.87-0.99)     1.30 (1.06-1.40)

In the second case the autoencoder is so small (a quarter of a step of the UNet) that encoding at every step costs a
plain loop little; what is left to gain is the number format, which needs a CPU with AMX.
"""

from __future__ import annotations

import dataclasses
import json
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
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from ddgen.autoencoder.autoencoder import Autoencoder, wrap
from ddgen.autoencoder.latents import LatentCache
from ddgen.autoencoder.training import build as build_autoencoder
from ddgen.config import AutoencoderConfig, TrainConfig, from_flat_dict
from ddgen.diffusion.training import train_diffusion
from ddgen.diffusion.unet import build_unet
from ddgen.hardware import device_name, number_format, peak_memory
from ddgen.precision import autocast, memory_format, resolve_precision

NUM_IMAGES, NUM_CLASSES = 2048, 10


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    cases: tuple[str, ...] = ("cifar10_cpu", "64px")
    """Which cases."""
    rounds: int = 4
    """Counted turns of every contestant; one before them is not counted."""
    steps: int = 3
    """Steps of a turn."""
    batch_size: int = 128
    """Images per step."""
    preset: str = "xs"
    """Preset of the UNet."""


CASES: dict[str, tuple[int, AutoencoderConfig]] = {
    # image size and autoencoder: as configs/cifar10_cpu.yaml, and what 64 px images get by default
    "cifar10_cpu": (
        32,
        AutoencoderConfig(vae_downsample=4, vae_latent_channels=12, vae_patch=4, vae_channels=(128,)),
    ),
    "64px": (64, AutoencoderConfig()),
}


def main(argv: list[str] | None = None) -> int:
    """Measures every case and prints its ratios."""
    settings = tyro.cli(Settings, args=argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(None, device)
    accelerator = Accelerator(mixed_precision=precision)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, {number_format(device, precision)}")
    for case in settings.cases:
        with tempfile.TemporaryDirectory() as folder:
            _measure(case, settings, accelerator, precision, Path(folder))
    print(f"peak memory: {peak_memory(device)}")
    return 0


def _measure(case: str, settings: Settings, accelerator: Accelerator, precision: str, folder: Path) -> None:
    image_size, vae_config = CASES[case]
    device = accelerator.device
    vae = wrap(build_autoencoder(vae_config, image_size), device, precision)
    d, side = vae.vae.config.latent_channels, image_size // vae.vae.config.downsample
    config = from_flat_dict(
        TrainConfig,
        {
            "dataset": "cifar10",
            "preset": settings.preset,
            "train_batch_size": settings.batch_size,
            "fid_every": 0,
            "checkpointing_steps": 10**9,
        },
        "benchmark",
    )
    contestants = {
        "loop": _our_loop(config, vae, image_size, settings.steps, accelerator, precision, folder),
        "bare": _bare(config, (d, side), settings.steps, device, precision),
        "optimizer": _optimizer_alone(config, (d, side), settings.steps, device),
        "plain": _plain_loop(config, vae, image_size, settings.steps, device, folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(settings.rounds + 1):
        for name, turn in contestants.items():
            spent = turn()
            if round_number:
                seconds[name].append(spent)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rates = {name: settings.batch_size / median for name, median in medians.items()}
    print(f"\n{case}: {image_size} px, latents {side} x {side} x {d}, preset {settings.preset}")
    for name in ("loop", "bare", "plain"):
        print(f"  {name:<10}{rates[name]:>9.1f} images/s")
    print(f"  the optimizer takes {medians['optimizer'] / medians['bare']:.1%} of a bare step")
    # Each round's own ratio, then the median: what else the computer does hits neighbours in time alike.
    for other, goal in (("bare", 0.90), ("plain", 2.5)):
        ratios = [b / a for a, b in zip(seconds["loop"], seconds[other], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"  loop / {other:<6}{statistics.median(ratios):>6.2f}   (goal {goal}; {spread})")


def _our_loop(
    config: TrainConfig,
    vae: Autoencoder,
    image_size: int,
    steps: int,
    accelerator: Accelerator,
    precision: str,
    folder: Path,
) -> Callable[[], float]:
    """Returns a turn of `train_diffusion`; seconds a step are its own account of all steps but the first two."""
    d, side = vae.vae.config.latent_channels, image_size // vae.vae.config.downsample
    moments = [torch.randn(NUM_IMAGES, 2, d, side, side).half() for _ in range(2)]
    latents = LatentCache(moments[0], moments[1].abs() / 10, "random")
    labels = torch.arange(NUM_IMAGES) % NUM_CLASSES
    warm_up = 2
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, max_train_steps=warm_up + steps),
        monitor=dataclasses.replace(config.monitor, log_every=1),
    )
    turns = 0

    def turn() -> float:
        nonlocal turns
        turns += 1
        output_dir = folder / f"run-{turns}"
        output_dir.mkdir()
        names = tuple(str(label) for label in range(NUM_CLASSES))
        train_diffusion(
            config, latents, labels, vae, names, image_size,
            accelerator=accelerator, precision=precision, output_dir=output_dir, resume_from=None,
        )  # fmt: skip
        lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        times = [config.optimizer.train_batch_size / line["images_per_second"] for line in lines]
        return sum(times[warm_up:]) / steps

    return turn


def _new_unet(config: TrainConfig, latent_shape: tuple[int, int], device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    d, side = latent_shape
    return build_unet(config.denoiser, latent_channels=d, latent_size=side, num_classes=NUM_CLASSES).to(device)


def _timed(work: Callable[[], None], steps: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def _bare(
    config: TrainConfig, latent_shape: tuple[int, int], steps: int, device: torch.device, precision: str
) -> Callable[[], float]:
    """Returns a turn of nothing but the network and the optimizer, in our precision, layout and compilation."""
    b, (d, side) = config.optimizer.train_batch_size, latent_shape
    unet = _new_unet(config, latent_shape, device).to(memory_format=memory_format(device, precision))
    if config.optimizer.compiles_on(device.type):
        unet.compile()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    x, wanted = torch.randn(2, b, d, side, side, device=device)
    timesteps = torch.randint(0, 1000, (b,), device=device)
    labels = torch.randint(0, NUM_CLASSES, (b,), device=device)

    def step() -> None:
        with autocast(device, precision):
            output = unet(x, timesteps, labels).sample
        F.mse_loss(output.float(), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()

    def turn() -> float:
        _timed(step, 1, device)
        return _timed(step, steps, device)

    return turn


def _optimizer_alone(
    config: TrainConfig, latent_shape: tuple[int, int], steps: int, device: torch.device
) -> Callable[[], float]:
    unet = _new_unet(config, latent_shape, device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    for parameter in unet.parameters():
        parameter.grad = torch.randn_like(parameter)

    def turn() -> float:
        _timed(lambda: optimizer.step(), 1, device)
        return _timed(lambda: optimizer.step(), steps, device)

    return turn


class _Files(Dataset[tuple[Tensor, int]]):
    """Class folders of PNG files, opened by Pillow, with the example's transforms."""

    def __init__(self, folder: Path, image_size: int) -> None:
        source = torch.Generator().manual_seed(0)
        folder.mkdir()
        self.paths = [folder / f"{number:05d}.png" for number in range(512)]
        for path in self.paths:
            pixels = torch.randint(0, 256, (image_size, image_size, 3), dtype=torch.uint8, generator=source)
            Image.fromarray(pixels.numpy()).save(path)
        self.augment = transforms.Compose(
            [
                transforms.Resize(image_size, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(image_size),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            pixels: Tensor = self.augment(image.convert("RGB"))
        return pixels, index % NUM_CLASSES


def _plain_loop(
    config: TrainConfig, vae: Autoencoder, image_size: int, steps: int, device: torch.device, folder: Path
) -> Callable[[], float]:
    """Returns a turn of the plain loop: the example's lines, in its order, with its defaults."""
    d, side = vae.vae.config.latent_channels, image_size // vae.vae.config.downsample
    unet = _new_unet(config, (d, side), device).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-08)
    schedule = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=10_000)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    files = _Files(folder / "files", image_size)
    loader = DataLoader(files, batch_size=config.optimizer.train_batch_size, shuffle=True, drop_last=True)
    batches = (batch for _ in iter(int, 1) for batch in loader)
    bar = tqdm(disable=None, desc="plain")

    def step() -> None:
        images, labels = (part.to(device) for part in next(batches))
        with torch.no_grad():
            clean = vae.vae.encode(images).latent_dist.sample()
        noise = torch.randn(clean.shape, device=device)
        timesteps = torch.randint(0, 1000, (len(clean),), device=device)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        loss = F.mse_loss(unet(noisy, timesteps, labels).sample.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        bar.update()
        bar.set_postfix(loss=loss.detach().item(), lr=schedule.get_last_lr()[0])

    def turn() -> float:
        _timed(step, 1, device)
        return _timed(step, steps, device)

    return turn


if __name__ == "__main__":
    sys.exit(main())
