"""Pictures made of many small images."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

PADDING = 2
PAPER = (255, 255, 255)


def to_pil(pixels: torch.Tensor, scale: int = 1) -> Image.Image:
    """Turns one image into a Pillow image, enlarged without smoothing.

    Args:
        pixels: uint8 (3, h, w).
        scale: Whole factor of enlargement.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels.cpu().permute(1, 2, 0).numpy()))
    return image if scale == 1 else image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def enlargement(side: int, wanted: int) -> int:
    """Returns the smallest whole factor that brings `side` pixels to at least `wanted`."""
    return max(1, math.ceil(wanted / side))


def image_grid(pixels: torch.Tensor, num_columns: int, *, min_side: int = 64) -> Image.Image:
    """Lays images out row by row on white, with a thin gap.

    Args:
        pixels: uint8 (n, 3, h, w), n >= 1.
        num_columns: Images per row; the last row may be shorter.
        min_side: Smaller images are enlarged to at least this many pixels by a whole factor.

    Raises:
        ValueError: `pixels` is not a batch of uint8 RGB images, or empty.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[0] == 0:
        raise ValueError(f"expected uint8 (n, 3, h, w), got {pixels.dtype} {tuple(pixels.shape)}")
    scale = enlargement(min(pixels.shape[-2:]), min_side)
    height, width = pixels.shape[-2] * scale + PADDING, pixels.shape[-1] * scale + PADDING
    columns = min(num_columns, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    grid = Image.new("RGB", (columns * width + PADDING, rows * height + PADDING), PAPER)
    for position, image in enumerate(pixels):
        row, column = divmod(position, columns)
        grid.paste(to_pil(image, scale), (PADDING + column * width, PADDING + row * height))
    return grid
