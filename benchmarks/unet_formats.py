"""How fast the UNet trains and samples in each number format and memory layout, as ratios within one run.

    python benchmarks/unet_formats.py

The variants take turns (A B C A B C ...), and the medians are compared with float32, contiguous. This is what
`ddgen.precision.resolve_precision` and `memory_format` follow.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

from ddgen.config import DenoiserConfig
from ddgen.diffusion.unet import build_unet
from ddgen.precision import autocast

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    preset: str = "xs"
    """Preset of the UNet."""
    latent_channels: int = 12
    """Channels of the latents."""
    latent_size: int = 8
    """Side of the latents."""
    batch_size: int = 128
    """Images per step."""
    rounds: int = 7
    """Turns of every variant; the first is not counted."""


def main(argv: list[str] | None = None) -> int:
    """Measures and prints a table."""
    settings = tyro.cli(Settings, args=argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    variants = [(precision, layout) for precision in ("no", "bf16") for layout in LAYOUTS]
    steps = {variant: _steps(settings, device, *variant) for variant in variants}
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {variant: [] for variant in variants}
    for round_number in range(settings.rounds):
        for variant, (train, sample) in steps.items():
            timed = (_timed(train, device), _timed(sample, device))
            if round_number:
                seconds[variant].append(timed)
    medians = {v: [statistics.median(kind) for kind in zip(*times, strict=True)] for v, times in seconds.items()}
    base = medians["no", "contiguous"]
    print(f"preset {settings.preset}, batch {settings.batch_size}, {device.type}, {torch.get_num_threads()} threads")
    print(f"{'precision':<10}{'layout':<15}{'train':>8}{'sample':>8}   (times as fast as float32, contiguous)")
    for (precision, layout), (train_seconds, sample_seconds) in medians.items():
        print(f"{precision:<10}{layout:<15}{base[0] / train_seconds:>8.2f}{base[1] / sample_seconds:>8.2f}")
    return 0


def _steps(
    settings: Settings, device: torch.device, precision: str, layout: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Returns one training step and one sampling step of a variant."""
    torch.manual_seed(0)
    config = DenoiserConfig(preset=settings.preset)  # type: ignore[arg-type]
    shape = {"latent_channels": settings.latent_channels, "latent_size": settings.latent_size}
    unet = build_unet(config, **shape, num_classes=10).to(device, memory_format=LAYOUTS[layout])
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    latents = torch.randn(settings.batch_size, settings.latent_channels, *[settings.latent_size] * 2, device=device)
    timesteps = torch.randint(0, 1000, (settings.batch_size,), device=device)
    labels = torch.randint(0, 10, (settings.batch_size,), device=device)

    def train() -> None:
        with autocast(device, precision):
            output = unet(latents, timesteps, labels).sample
        (output.float() - latents).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def sample() -> None:
        with torch.inference_mode(), autocast(device, precision):
            unet(latents, timesteps, labels)

    return train, sample


def _timed(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
