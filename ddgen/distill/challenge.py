"""The ECCV 2024 dataset distillation challenge's file of images: normalised float32, class by class.

The scorer of its first track takes ``cifar100.pt`` (1000, 3, 32, 32) and ``tinyimagenet.pt`` (2000, 3, 64, 64), exactly
10 images a class, each already normalised with the mean and standard deviation of its dataset; an image's label is its
position divided by 10, in the order of the dataset's own classes.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddgen.errors import UserError

IMAGES_PER_CLASS = 10


@dataclass(frozen=True)
class Entry:
    """What the challenge expects of one dataset.

    Attributes:
        num_classes: k.
        image_size: Side in pixels.
        mean: Of each channel of images in [0, 1].
        std: Likewise.
    """

    num_classes: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


ENTRIES = {
    "cifar100": Entry(100, 32, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tinyimagenet": Entry(200, 64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Name of the dataset, and of the file without ``.pt``, -> what is in it."""


def normalise(pixels: Tensor, entry: Entry) -> Tensor:
    """Returns uint8 pixels (n, 3, h, w) as the scorer takes them, float32 (n, 3, h, w)."""
    mean, std = _of_channels(entry.mean), _of_channels(entry.std)
    return (pixels.float() / 255 - mean) / std


def denormalise(images: Tensor, entry: Entry) -> tuple[Tensor, float]:
    """Returns normalised images, float (n, 3, h, w), as pixels.

    Methods that optimise pixels leave the range of a picture; what is outside is clipped.

    Returns:
        Pixels uint8 (n, 3, h, w), and the part of the values that had to be clipped, 0..1.
    """
    values = (images.float() * _of_channels(entry.std) + _of_channels(entry.mean)) * 255
    outside = ((values < -0.5) | (values > 255.5)).float().mean().item()
    return values.round().clamp(0, 255).to(torch.uint8), outside


def read_images(path: Path) -> Tensor:
    """Reads the tensor of a ``.pt`` file, float (n, 3, h, h); nothing in the file is executed.

    Raises:
        UserError: Anything but a normalised tensor of square images.
    """
    try:
        images = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--distilled_dir {path}: not a file of tensors alone ({cause}); save one tensor") from None
    wanted = "one float tensor (n, 3, h, h), normalised, class by class"
    if not isinstance(images, Tensor):
        raise UserError(f"--distilled_dir {path}: holds a {type(images).__name__}; expected {wanted}")
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        found = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        raise UserError(f"--distilled_dir {path}: holds {found}; expected {wanted}")
    if not len(images) or not torch.isfinite(images).all():
        raise UserError(f"--distilled_dir {path}: values that are not finite, or none; expected {wanted}")
    if images.min() >= 0:  # of normalised images, what is darker than the mean colour is negative
        raise UserError(
            f"--distilled_dir {path}: no value is negative, so it is not normalised; expected (x - mean) / std"
        )
    return images


def _of_channels(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)
