"""Small images and networks that tests of evaluation share."""

from __future__ import annotations

import torch
from torch import Tensor

from ddgen.data import ImageDataset
from ddgen.evaluation.extractors import Extractor
from ddgen.observer.networks import build_network
from ddgen.observer.observer import Observer

CPU = torch.device("cpu")
SIZE, CLASSES = 8, ("red", "green", "blue")


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


def colours(per_class: int, split: str, class_names: tuple[str, ...] = CLASSES) -> ImageDataset:
    """An easy dataset: the class is the brightest channel."""
    generator = torch.Generator().manual_seed(len(split) + per_class)
    labels = torch.arange(len(class_names)).repeat_interleave(per_class)
    pixels = torch.randint(0, 120, (len(labels), 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(len(labels)), labels] += 110
    return ImageDataset(pixels, labels, class_names, "colours", split, f"{split}{per_class}", {}, "CC0")


def colour_observer() -> Observer:
    """Its logits are the mean of each channel: it is right on `colours` without training."""
    network = build_network("convnet1", 3, SIZE, width=3)
    convolution, norm = network.body[0], network.body[1]
    with torch.no_grad():
        convolution.weight.zero_()
        for channel in range(3):
            convolution.weight[channel, channel, 1, 1] = 1.0
        network.head.weight.zero_()
        for channel in range(3):
            network.head.weight[channel].view(3, -1)[channel] = 20.0 / (SIZE // 2) ** 2
        network.head.bias.zero_()
        convolution.bias.zero_()
        norm.running_mean.zero_()
    return Observer(
        network,
        network="convnet1",
        class_names=CLASSES,
        input_size=SIZE,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        accuracy=1.0,
    ).eval()
