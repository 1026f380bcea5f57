"""How fast a network trains and infers in each number format and memory layout, as ratios within one run.

    python benchmarks/formats.py                                        # the UNet
    python benchmarks/formats.py --network convnet3 --batch_size 100    # an observer or student

The variants take turns (A B C A B C ...), and the medians are compared with float32, contiguous. This is what
`ddgen.precision.resolve_precision` and `memory_format`, and `uses_channels_last` of classifiers, follow.
docs/recipe.md has a table.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn

from ddgen.config import DenoiserConfig
from ddgen.diffusion.unet import build_unet
from ddgen.observer.networks import build_network
from ddgen.precision import autocast

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    network: str = "unet"
    """`unet`, or a classifier as --observer_network and --students name it."""
    preset: str = "xs"
    """Preset of the UNet."""
    latent_channels: int = 12
    """Channels of the latents."""
    latent_size: int = 8
    """Side of the latents."""
    image_size: int = 32
    """Side of a classifier's images."""
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
        for variant, (train, infer) in steps.items():
            timed = (_timed(train, device), _timed(infer, device))
            if round_number:
                seconds[variant].append(timed)
    medians = {v: [statistics.median(kind) for kind in zip(*times, strict=True)] for v, times in seconds.items()}
    base = medians["no", "contiguous"]
    name = f"unet {settings.preset}" if settings.network == "unet" else settings.network
    print(f"{name}, batch {settings.batch_size}, {device.type}, {torch.get_num_threads()} threads")
    print(f"{'precision':<10}{'layout':<15}{'train':>8}{'infer':>8}   (times as fast as float32, contiguous)")
    for (precision, layout), (train_seconds, infer_seconds) in medians.items():
        print(f"{precision:<10}{layout:<15}{base[0] / train_seconds:>8.2f}{base[1] / infer_seconds:>8.2f}")
    return 0


def _steps(
    settings: Settings, device: torch.device, precision: str, layout: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Returns one training step and one inference step of a variant."""
    torch.manual_seed(0)
    network, forward = _unet(settings, device) if settings.network == "unet" else _classifier(settings, device, layout)
    network.to(memory_format=LAYOUTS[layout])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def train() -> None:
        network.train()
        with autocast(device, precision):
            output = forward()
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def infer() -> None:
        network.eval()
        with torch.inference_mode(), autocast(device, precision):
            forward()

    return train, infer


def _unet(settings: Settings, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    config = DenoiserConfig(preset=settings.preset)  # type: ignore[arg-type]
    shape = {"latent_channels": settings.latent_channels, "latent_size": settings.latent_size}
    unet = build_unet(config, **shape, num_classes=10).to(device)
    latents = torch.randn(settings.batch_size, settings.latent_channels, *[settings.latent_size] * 2, device=device)
    timesteps = torch.randint(0, 1000, (settings.batch_size,), device=device)
    labels = torch.randint(0, 10, (settings.batch_size,), device=device)
    return unet, lambda: unet(latents, timesteps, labels).sample


def _classifier(settings: Settings, device: torch.device, layout: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    network = build_network(settings.network, 10, settings.image_size, setting="--network").to(device)
    images = torch.randn(settings.batch_size, 3, *[settings.image_size] * 2, device=device)
    images = images.contiguous(memory_format=LAYOUTS[layout])
    return network, lambda: network(images)


def _timed(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
