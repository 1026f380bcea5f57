"""Baselines: what a distilled dataset has to beat."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddgen.data import ImageDataset
from ddgen.errors import UserError
from ddgen.seeds import numpy_generator


def random_real(dataset: ImageDataset, ipc: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws `ipc` real images per class, without replacement.

    A smaller `ipc` takes the first of what a larger one takes.

    Args:
        dataset: Real training images.
        ipc: Images per class.
        seed: Of the draw.

    Returns:
        Pixels uint8 (k * ipc, 3, h, w) class by class, and labels int64 (k * ipc,).

    Raises:
        UserError: A class has fewer images than `ipc`.
    """
    chosen = []
    for label, indices in enumerate(dataset.indices_by_class()):
        if len(indices) < ipc:
            raise UserError(
                f"--ipc {ipc}: class {dataset.class_names[label]} of {dataset.name} has only {len(indices)} training "
                f"images for the random-real baseline; take a smaller --ipc"
            )
        order = numpy_generator(seed, "random real", label).permutation(len(indices))
        chosen.append(np.asarray(indices)[order[:ipc]])
    index = torch.from_numpy(np.concatenate(chosen))
    return dataset.pixels[index].clone(), dataset.labels[index].clone()
