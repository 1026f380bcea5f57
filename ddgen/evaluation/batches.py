"""What a student is shown: augmented and mixed batches, made on the device, with the labels of its recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ddgen.distill.views import StoredViews
from ddgen.evaluation.augment import (
    color_jitter,
    cutmix,
    draw_crops,
    draw_cutmix,
    dsa,
    lighting,
    random_flip,
    resized_crop,
    shuffle_patches,
)
from ddgen.evaluation.protocols import Protocol
from ddgen.hardware import put
from ddgen.observer.networks import uses_channels_last
from ddgen.observer.observer import to_images01
from ddgen.precision import autocast
from ddgen.seeds import numpy_generator

AHEAD_PIXELS = 512 * 32 * 32  # so many pixels of mixed images go through the teachers together


@dataclass(frozen=True)
class TrainingImages:
    """Images that students train on.

    Attributes:
        pixels: uint8 (n, 3, s, s).
        labels: int64 (n,).
        soft_labels: Probabilities (n, k) that belong to the images, for recipes with stored labels.
        factor: Images are grids of factor x factor patches.
        views: Labelled views of the images, for recipes with those.
    """

    pixels: Tensor
    labels: Tensor
    soft_labels: Tensor | None = None
    factor: int = 1
    views: StoredViews | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> TrainingImages:
        """Returns the same on a device."""
        soft = None if self.soft_labels is None else self.soft_labels.to(device)
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device), soft_labels=soft)


@dataclass(frozen=True)
class Look:
    """How images reach a network.

    Attributes:
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
        flip: Whether a mirrored image is still of its class.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool = True


@dataclass(frozen=True)
class Batch:
    """A mixed batch: images (b, 3, s, s) in [0, 1], and both labels with the weight of the first.

    Attributes:
        images: Mixed images.
        labels: int64 (b,).
        pasted_labels: int64 (b,), of what was pasted in.
        own: Weight of `labels`.
        soft_labels: Probabilities (b, k) that were stored with the images, mixed alike.
        teacher_logits: Of the mixed images, (b, k).
    """

    images: Tensor
    labels: Tensor
    pasted_labels: Tensor
    own: float
    soft_labels: Tensor | None = None
    teacher_logits: Tensor | None = None


def stream(
    images: TrainingImages, protocol: Protocol, epochs: int, batch_size: int, seed: int, look: Look
) -> Iterator[Batch]:
    """Yields the mixed batches of all epochs; the last of an epoch may be smaller.

    What a batch holds is a function of (seed, epoch, position).
    """
    for epoch in range(epochs):
        rng = numpy_generator(seed, "student", "epoch", epoch)
        order = put(torch.from_numpy(rng.permutation(len(images))), images.pixels.device)
        for indices in order.split(batch_size):
            batch = to_images01(images.pixels[indices], images.pixels.device)
            mixed, paste, own = _augment_and_mix(batch, protocol, look, images.factor, rng)
            labels, soft = images.labels[indices], None
            if images.soft_labels is not None:
                whole = images.soft_labels[indices].float()
                soft = own * whole + (1.0 - own) * whole[paste]
            yield Batch(mixed, labels, labels[paste], own, soft)


def stored_views(
    images: TrainingImages, protocol: Protocol, epochs: int, batch_size: int, seed: int, look: Look
) -> Iterator[Batch]:
    """Yields the batches of all epochs of the images' stored views; class indices are the labels' most probable."""
    assert images.views is not None
    augmenter = view_augmenter(protocol, look, images.factor)
    found = images.views.stream(images.pixels, augmenter, epochs=epochs, batch_size=batch_size, seed=seed)
    for views, logits in found:
        named = logits.argmax(1)
        yield Batch(views, named, named, 1.0, teacher_logits=logits)


def view_augmenter(protocol: Protocol, look: Look, factor: int) -> Callable[[Tensor, np.random.Generator], Tensor]:
    """Returns what makes a batch (b, 3, s, s) of stored views: the protocol's augmentation and mixing."""
    return lambda images01, rng: _augment_and_mix(images01, protocol, look, factor, rng)[0]


def _augment_and_mix(
    images01: Tensor, protocol: Protocol, look: Look, factor: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, float]:
    """Returns mixed images (b, 3, s, s), whom each was pasted from (b,), and the part that is still its own."""
    batch = augment(images01, protocol, look, factor, rng)
    if not protocol.cutmix_alpha:
        return batch, torch.arange(len(batch), device=batch.device), 1.0
    paste = put(torch.from_numpy(rng.permutation(len(batch))), batch.device)
    mixed, own = cutmix(batch, paste, draw_cutmix(rng, batch.shape[-1], protocol.cutmix_alpha))
    return mixed, paste, own


def augment(images: Tensor, protocol: Protocol, look: Look, factor: int, rng: np.random.Generator) -> Tensor:
    """Augments images (b, 3, s, s) in [0, 1], grids of factor x factor patches, before they are mixed."""
    if factor > 1 and protocol.shuffle:
        images = shuffle_patches(images, factor, rng)
    scale = protocol.crop_scale(factor)
    if scale[0] < 1.0:  # of area one only the whole image fits
        images = resized_crop(images, draw_crops(rng, len(images), images.shape[-1], scale))
    if look.flip and protocol.flip:
        images = random_flip(images, rng)
    if protocol.color_jitter:
        images = color_jitter(images, protocol.color_jitter, rng)
    if protocol.lighting_std:
        images = lighting(images, protocol.lighting_std, rng)
    if protocol.dsa:
        operations = [operation for operation in protocol.dsa if look.flip or operation != "flip"]
        mean, std = (images.new_tensor(values)[:, None, None] for values in (look.mean, look.std))
        images = dsa((images - mean) / std, operations, rng) * std + mean
    return images


def with_teachers(
    batches: Iterator[Batch], teachers: Sequence[nn.Module], device: torch.device, precision: str
) -> Iterator[Batch]:
    """Adds the mean of the teachers' logits, several small batches in one forward: they depend on no student."""
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(w.images) for w in waiting) * batch.images.shape[-1] ** 2 >= AHEAD_PIXELS:
            yield from _label(waiting, teachers, device, precision)
            waiting = []
    if waiting:
        yield from _label(waiting, teachers, device, precision)


def _label(batches: list[Batch], teachers: Sequence[nn.Module], device: torch.device, precision: str) -> list[Batch]:
    together = torch.cat([batch.images for batch in batches])
    logits = torch.stack([_logits(teacher, together, device, precision) for teacher in teachers]).mean(0)
    parts = logits.split([len(batch.images) for batch in batches])
    return [replace(batch, teacher_logits=part) for batch, part in zip(batches, parts, strict=True)]


def _logits(teacher: nn.Module, images: Tensor, device: torch.device, precision: str) -> Tensor:
    memory_format = torch.channels_last if uses_channels_last(teacher, device) else torch.contiguous_format
    with torch.no_grad(), autocast(device, precision):
        logits: Tensor = teacher(images.contiguous(memory_format=memory_format))
    return logits.float()
