"""ImageDataset: real images of one split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ddgen.errors import UserError
from ddgen.seeds import numpy_generator


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Real images of one split, decoded.

    Attributes:
        pixels: uint8 (n, 3, h, w), 0..255, memory-mapped; writing to it changes this process's copy only.
        labels: int64 (n,), positions in `class_names`.
        class_names: The one order of classes.
        name: Name of the dataset.
        split: ``train`` or ``test``.
        fingerprint: Hex digest of exactly these pixels, labels and class order, wherever they came from.
        skipped: Class name -> number of unreadable images left out.
        licence: What is known of the licence of the images.
    """

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str
    split: str
    fingerprint: str
    skipped: dict[str, int] = field(default_factory=dict)
    licence: str = "unknown"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes k."""
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return int(self.pixels.shape[-1])

    def indices_by_class(self) -> list[Tensor]:
        """Returns for each class the ascending int64 indices of its images."""
        return [torch.nonzero(self.labels == label).flatten() for label in range(self.num_classes)]


def split_holdout(dataset: ImageDataset, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Splits the images into a part to train on and a part kept aside, class by class.

    Args:
        dataset: The images.
        fraction: Part kept aside, in (0, 1). Every class of two images or more has at least one on either side.
        seed: The split is a function of this seed and the labels.

    Returns:
        Ascending int64 indices of the training part and of the part kept aside.

    Raises:
        UserError: The fraction is not inside (0, 1), or no class has two images.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--observer_holdout {fraction}: give a fraction between 0 and 1, such as 0.1")
    keys = [str(label) for label in range(dataset.num_classes)]
    aside = stratified(dataset.labels.numpy(), keys, fraction, seed, "holdout")
    if not aside.any():
        raise UserError(f"--observer_holdout {fraction}: no class of {dataset.name} has two images to split")
    return torch.from_numpy(np.flatnonzero(~aside)), torch.from_numpy(np.flatnonzero(aside))


def stratified(labels: np.ndarray, keys: Sequence[str], fraction: float, seed: int, purpose: str) -> np.ndarray:
    """Returns a boolean mask (n,) that is true for about `fraction` of every class.

    Args:
        labels: int64 (n,).
        keys: What identifies each class in the seed; a class's draw depends on no other class.
        fraction: In (0, 1).
        seed: Seed of the draw.
        purpose: Names the draw; see `ddgen.seeds.derive`.
    """
    mask = np.zeros(len(labels), dtype=bool)
    for label, key in enumerate(keys):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            continue
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        mask[members[numpy_generator(seed, purpose, key).permutation(len(members))[:count]]] = True
    return mask
