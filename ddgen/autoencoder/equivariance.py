"""Transforms that latents should undergo as images do.

Source: Kouzelis et al. 2025, "EQ-VAE: Equivariance Regularized Latent Space for Improved Generative Image Modeling".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 0.25  # of the side, their section 4.1


@dataclass(frozen=True)
class Transform:
    """Resizing, each side by its own factor, followed by quarter turns.

    Attributes:
        height: Of the resized latents.
        width: Likewise.
        turns: Quarter turns, 0 to 3.
    """

    height: int
    width: int
    turns: int

    def __call__(self, x: Tensor, pixels_per_latent: int = 1) -> Tensor:
        """Transforms latents (b, d, h, w), or images (b, c, h * f, w * f) with f pixels per latent."""
        size = (self.height * pixels_per_latent, self.width * pixels_per_latent)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        return x.rot90(self.turns, (-2, -1))


def draw_transform(side: int, generator: torch.Generator) -> Transform:
    """Draws a transform of latents with this side: to 0.25 to 1 of it along each axis, turned by any quarter."""
    low = max(1, round(SMALLEST * side))
    height, width = (int(torch.randint(low, side + 1, (), generator=generator)) for _ in range(2))
    return Transform(height, width, int(torch.randint(4, (), generator=generator)))
