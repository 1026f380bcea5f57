"""Several kept images in one: grids of factor x factor cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cell_edges(size: int, factor: int) -> list[int]:
    """Returns where the cells of a side begin and end, factor + 1 positions; the first ones take the pixels left over.

    Where 3 does not divide 32 the cells have 11, 11 and 10 pixels.
    """
    side, left_over = divmod(size, factor)
    return [cell * side + min(cell, left_over) for cell in range(factor + 1)]


def compose(patches: Tensor, factor: int, size: int) -> Tensor:
    """Stitches ranked patches of one class into grids (Sun et al., CVPR 2024, section 4).

    Patch number ``k * n + i`` goes to cell k of image i, cells counted row by row, so every image has one of the n
    best patches, one of the n next, and so on. Patches of another size than their cell's are resized
    (bilinear, antialiased).

    Args:
        patches: uint8 (n * factor ** 2, 3, h, w), the best first.
        factor: Cells along a side.
        size: Side of the images.

    Returns:
        uint8 (n, 3, size, size).
    """
    if len(patches) % factor**2:
        raise ValueError(f"{len(patches)} patches do not fill grids of {factor} x {factor}")
    ranks = patches.chunk(factor**2)
    edges = cell_edges(size, factor)
    out = patches.new_empty((len(ranks[0]), 3, size, size))
    for cell, images in enumerate(ranks):
        row, column = divmod(cell, factor)
        top, bottom, left, right = edges[row], edges[row + 1], edges[column], edges[column + 1]
        out[:, :, top:bottom, left:right] = _resize(images, bottom - top, right - left)
    return out


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    resized = F.interpolate(images.float(), size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
