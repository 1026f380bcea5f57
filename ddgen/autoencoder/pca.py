"""The closed-form optimum of a linear patch autoencoder, which training starts from."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ddgen.autoencoder.autoencoder import to_images
from ddgen.seeds import numpy_generator


def fit_pca(
    pixels: Tensor, patch_size: int, num_components: int, *, seed: int, max_images: int = 20_000
) -> tuple[Tensor, Tensor, Tensor]:
    """Principal components of non-overlapping square patches, about each channel's mean.

    Args:
        pixels: uint8 (n, c, h, w).
        patch_size: Side of a patch in pixels (f).
        num_components: How many components to keep (d).
        seed: Chooses the images when there are more than `max_images`.
        max_images: How many images to look at.

    Returns:
        Mean patch (c * f * f,), constant within a channel; orthonormal components (d, c * f * f); their standard
        deviations (d,); float32, for images in [-1, 1].
    """
    chosen = torch.from_numpy(numpy_generator(seed, "pca").permutation(len(pixels))[:max_images]).sort().values
    size = 3 * patch_size**2
    total, moment, count = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64), 0
    for indices in chosen.split(1000):
        patches = rearrange(
            to_images(pixels[indices]), "b c (h i) (w j) -> (b h w) (c i j)", i=patch_size, j=patch_size
        ).double()
        total += patches.sum(0)
        moment += patches.T @ patches
        count += len(patches)
    mean = (total / count).reshape(3, -1).mean(1, keepdim=True).expand(3, patch_size**2).flatten()
    cross = torch.outer(total / count, mean)
    covariance = moment / count - cross - cross.T + torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:num_components], vectors.flip(1).T[:num_components]
    # The sign of an eigenvector is free; fixing it makes the latents the same on every machine.
    signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    stds = values.clamp_min(1e-8).sqrt()
    return mean.float(), (vectors * signs).float(), stds.float()
