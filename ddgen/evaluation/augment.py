"""Augmentation of whole batches on the device; every sample its own crop, flip and colours.

Random numbers are drawn by numpy from a generator handed in, a few per sample, so that what a batch becomes is a
function of (seed, epoch) on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddgen.distill.compose import cell_edges
from ddgen.hardware import put

_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10
# PCA of ImageNet's colours (Krizhevsky et al., 2012, section 4.1).
_LIGHTING_VALUES = (0.2175, 0.0188, 0.0045)
_LIGHTING_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def _put(values: np.ndarray, like: Tensor) -> Tensor:
    return put(torch.from_numpy(np.ascontiguousarray(values)), like.device)


def draw_crops(rng: np.random.Generator, count: int, size: int, scale: tuple[float, float]) -> np.ndarray:
    """Draws boxes as torchvision's RandomResizedCrop does for square images.

    Args:
        rng: Where randomness comes from.
        count: How many boxes.
        size: Side of the images.
        scale: Smallest and largest area as a fraction of the image's.

    Returns:
        int64 (count, 4): top, left, height, width; the whole image where ten attempts did not fit.
    """
    area = size * size * rng.uniform(scale[0], scale[1], (_ATTEMPTS, count))
    ratio = np.exp(rng.uniform(np.log(_RATIO[0]), np.log(_RATIO[1]), (_ATTEMPTS, count)))
    widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (widths <= size) & (heights <= size) & (widths > 0) & (heights > 0)
    first, columns = fits.argmax(axis=0), np.arange(count)
    found = fits.any(axis=0)
    width = np.where(found, widths[first, columns], size)
    height = np.where(found, heights[first, columns], size)
    return np.stack([rng.integers(0, size - height + 1), rng.integers(0, size - width + 1), height, width], axis=1)


def resized_crop(images: Tensor, boxes: np.ndarray) -> Tensor:
    """Cuts a box out of every image and enlarges it bilinearly to the image's size.

    Args:
        images: Square float images (b, c, s, s).
        boxes: int64 (b, 4): top, left, height, width.

    Returns:
        (b, c, s, s), the same as cropping and interpolating one by one.
    """
    size = images.shape[-1]
    starts, lengths = boxes[:, :2, None].astype(np.float32), boxes[:, 2:, None].astype(np.float32)
    steps = np.arange(size, dtype=np.float32) + 0.5
    inside = np.clip(steps * lengths / size - 0.5, 0.0, lengths - 1.0)
    at = _put((2.0 * (starts + inside) + 1.0) / size - 1.0, images)  # (b, 2, s): rows, columns, in [-1, 1]
    rows = at[:, 0, :, None].expand(-1, -1, size)
    columns = at[:, 1, None, :].expand(-1, size, -1)
    grid = torch.stack([columns, rows], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def random_flip(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Mirrors every image (b, c, h, w) left to right with probability one half."""
    flip = _put(rng.random(len(images)) < 0.5, images)
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def shuffle_patches(images: Tensor, factor: int, rng: np.random.Generator) -> Tensor:
    """Shuffles the columns, then the rows, of the factor x factor grid that each image (b, c, s, s) is made of."""
    edges = cell_edges(images.shape[-1], factor)
    spans = [np.arange(edges[i], edges[i + 1]) for i in range(factor)]
    out = []
    for image in images:
        columns = np.concatenate([spans[i] for i in rng.permutation(factor)])
        rows = np.concatenate([spans[i] for i in rng.permutation(factor)])
        out.append(image[:, _put(rows, image)][:, :, _put(columns, image)])
    return torch.stack(out)


def color_jitter(images: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Changes brightness, contrast and saturation of images in [0, 1] by factors 1 +- strength.

    Every image (b, 3, h, w) has its own factors; the order of the three is drawn once a batch.
    """
    factors = rng.uniform(1 - strength, 1 + strength, (3, len(images), 1, 1, 1)).astype(np.float32)
    for kind in rng.permutation(3):
        if kind == 0:
            base: Tensor | float = 0.0
        else:
            weights = images.new_tensor([0.299, 0.587, 0.114])[:, None, None]
            grey = (images * weights).sum(1, keepdim=True)
            base = grey.mean((2, 3), keepdim=True) if kind == 1 else grey
        factor = _put(factors[kind], images)
        images = factor * images + (1 - factor) * base
    return images


def lighting(images: Tensor, std: float, rng: np.random.Generator) -> Tensor:
    """Adds to every image (b, 3, h, w) in [0, 1] noise along the principal components of natural colours."""
    amounts = rng.normal(0.0, std, (len(images), 3)) * np.array(_LIGHTING_VALUES)
    shift = (amounts @ np.array(_LIGHTING_VECTORS).T).astype(np.float32)
    return images + _put(shift, images)[:, :, None, None]


def draw_cutmix(rng: np.random.Generator, size: int, alpha: float) -> tuple[int, int, int, int]:
    """Draws the box of CutMix (Yun et al., ICCV 2019): its area is 1 - Beta(alpha, alpha), cut at the borders.

    Returns:
        top, bottom, left, right.
    """
    side = int(size * np.sqrt(1.0 - rng.beta(alpha, alpha)))
    middle_row, middle_column = rng.integers(0, size, 2)
    low = np.maximum([middle_row - side // 2, middle_column - side // 2], 0)
    high = np.minimum([middle_row + side // 2, middle_column + side // 2], size)
    return int(low[0]), int(high[0]), int(low[1]), int(high[1])


def cutmix(images: Tensor, order: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, float]:
    """Pastes the box of the images in `order` into `images`, which stay as they are.

    Args:
        images: (b, c, s, s).
        order: int64 (b,), the image that each one receives the box from.
        box: top, bottom, left, right.

    Returns:
        The mixed images, and the fraction of each that is still its own: its label's weight.
    """
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right][order]
    return mixed, 1.0 - (bottom - top) * (right - left) / (images.shape[-1] * images.shape[-2])


# DSA: Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021; its published
# strengths. It works on normalised images, so what it fills with zeros has the mean colour.
DSA_BRIGHTNESS, DSA_SATURATION, DSA_CONTRAST = 1.0, 2.0, 0.5
DSA_CROP_PAD, DSA_CUTOUT, DSA_SCALE, DSA_ROTATE_DEGREES = 0.125, 0.5, 1.2, 15.0


def dsa(images: Tensor, operations: Sequence[str], rng: np.random.Generator) -> Tensor:
    """Augments a batch by one operation of DSA, drawn anew for every batch, each image with its own strength.

    Args:
        images: Normalised (b, 3, s, s).
        operations: Some of `color`, `crop`, `cutout`, `flip`, `scale`, `rotate`; images stay as they are without any.
        rng: Where randomness comes from.
    """
    if not operations:
        return images
    return _DSA[operations[int(rng.integers(len(operations)))]](images, rng)


def dsa_color(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness by up to +-0.5, saturation by a factor of 0 to 2, contrast by one of 0.5 to 1.5, in this order."""
    brightness, saturation, contrast = _put(rng.random((3, len(images), 1, 1, 1), dtype=np.float32), images)
    images = images + (brightness - 0.5) * DSA_BRIGHTNESS
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (saturation * DSA_SATURATION) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + DSA_CONTRAST) + mean


def dsa_crop(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Shifts every image by up to an eighth of its side, filling with zeros."""
    b, c, _, size = images.shape
    pad = int(size * DSA_CROP_PAD + 0.5)
    top, left = rng.integers(0, 2 * pad + 1, (2, b, 1))
    rows, columns = _put(top + np.arange(size), images), _put(left + np.arange(size), images)
    padded = F.pad(images, [pad] * 4)
    first = torch.arange(b, device=images.device)[:, None, None, None]
    channels = torch.arange(c, device=images.device)[None, :, None, None]
    return padded[first, channels, rows[:, None, :, None], columns[:, None, None, :]]


def dsa_cutout(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Sets a square of half the side, its middle anywhere in the image and itself cut at the borders, to zero."""
    b, size = len(images), images.shape[-1]
    side = int(size * DSA_CUTOUT + 0.5)
    starts = rng.integers(0, size + 1 - side % 2, (2, b, 1)) - side // 2
    inside = (np.arange(size) >= starts) & (np.arange(size) < starts + side)
    rows, columns = _put(inside, images)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def dsa_scale(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Shrinks or enlarges both sides, each by its own factor of 1 / 1.2 to 1.2, around the middle."""
    return affine(images, np.stack([_diagonal(rng, len(images)), _diagonal(rng, len(images))], axis=1) * np.eye(2))


def dsa_rotate(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Turns every image by up to 15 degrees."""
    return rotate(images, rng.uniform(-DSA_ROTATE_DEGREES, DSA_ROTATE_DEGREES, len(images)))


def rotate(images: Tensor, degrees: np.ndarray) -> Tensor:
    """Turns images (b, c, s, s) counter-clockwise by angles (b,) in degrees, bilinearly, filling with zeros."""
    angles = np.deg2rad(degrees)
    sin, cos = np.sin(angles), np.cos(angles)
    return affine(images, np.stack([np.stack([cos, -sin], 1), np.stack([sin, cos], 1)], axis=1))


def affine(images: Tensor, matrices: np.ndarray) -> Tensor:
    """Takes every position of images (b, c, s, s) from where a matrix (b, 2, 2) sends it, around the middle."""
    theta = np.concatenate([matrices, np.zeros((len(matrices), 2, 1))], axis=2).astype(np.float32)
    grid = F.affine_grid(_put(theta, images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _diagonal(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.uniform(1 / DSA_SCALE, DSA_SCALE, (count, 1))


_DSA: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "color": dsa_color,
    "crop": dsa_crop,
    "cutout": dsa_cutout,
    "flip": random_flip,
    "scale": dsa_scale,
    "rotate": dsa_rotate,
}
