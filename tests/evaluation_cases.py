"""Small images, and networks with drawn weights, that the tests of the FID curve share."""

from __future__ import annotations

import torch
from torch import Tensor

from ddgen.data import ImageDataset
from ddgen.evaluation.extractors import Extractor
from ddgen.observer.networks import build_network
from ddgen.observer.observer import Observer

CPU = torch.device("cpu")


def images(count: int, seed: int, side: int = 8) -> ImageDataset:
    """Noise of random contrast, in two classes."""
    generator = torch.Generator().manual_seed(seed)
    contrast = torch.rand(count, 3, 1, 1, generator=generator)
    noise = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return ImageDataset(
        pixels=(noise * contrast).to(torch.uint8),
        labels=torch.arange(count) % 2,
        class_names=("a", "b"),
        name="noise",
        split="train",
        fingerprint=f"noise-{count}-{seed}",
    )


def observer(seed: int = 0) -> Observer:
    """A ConvNet-3 for 8 px images."""
    torch.manual_seed(seed)
    network = build_network("convnet3", 2, 8, width=8)
    mean = (0.5, 0.5, 0.5)
    return Observer(network, network="convnet3", class_names=("a", "b"), input_size=8, mean=mean, std=mean).eval()


class Counting:
    """An extractor's function that counts the images it sees: the mean colour of each."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, pixels: Tensor, device: torch.device) -> Tensor:
        self.seen += len(pixels)
        return pixels.float().mean(dim=(2, 3)) / 255

    def extractor(self, fingerprint: str = "1") -> Extractor:
        return Extractor("mean", fingerprint, self)
