"""Modes of classes: the centres of clusters of their real latents, found once and kept in a file."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from ddgen.autoencoder.latents import LatentCache
from ddgen.checkpoint import write_bytes
from ddgen.diffusion.steering import Modes
from ddgen.errors import UserError
from ddgen.seeds import derive

STARTS = 3
"""How often k-means starts; the closest clusters are taken."""
VERSION = 1
"""Raise it when the same latents give other modes, so that older files are not taken."""


def find_modes(latents: LatentCache, labels: Tensor, class_names: tuple[str, ...], count: int, seed: int) -> Modes:
    """Clusters the latents of every class by k-means (k-means++, Arthur & Vassilvitskii 2007, then Lloyd).

    Mirror images are left out: a mode and its mirror image are the same thing to a student that mirrors.

    Args:
        latents: Of the real training images; read class by class.
        labels: Their classes, int64 (n,).
        class_names: In label order.
        count: Modes of a class, m.
        seed: The modes are a function of latents, labels, m and this.

    Raises:
        UserError: A class has fewer images, or fewer different ones.
    """
    members = [torch.nonzero(labels == label).flatten() for label in range(len(class_names))]
    fewest = min(range(len(members)), key=lambda label: len(members[label]))
    if len(members[fewest]) < count:
        raise UserError(
            f"--modes {count}: class {class_names[fewest]!r} has {len(members[fewest]):,} real images; give at most"
            " that"
        )
    found = []
    for label, indices in enumerate(members):
        unmirrored, no_noise = torch.zeros(len(indices), dtype=torch.bool), torch.zeros(1)
        values = latents.batch(indices, unmirrored, no_noise)
        try:
            found.append(_clusters(values, count, derive(seed, "modes", label)))
        except ValueError:
            raise UserError(
                f"--modes {count}: class {class_names[label]!r} has fewer different real images than that; give fewer"
            ) from None
    return Modes(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _clusters(latents: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns centres (m, d, h, w), the part of all that is in each, (m,), and the variance around them, ().

    The centres are computed again from who belongs to which: sums in float64, the same with any number of threads.

    Raises:
        ValueError: A cluster is empty.
    """
    values = latents.flatten(1).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different images than clusters: told below
        belongs = KMeans(count, n_init=STARTS, random_state=seed % 2**32).fit(values).labels_
    sizes = np.bincount(belongs, minlength=count)
    if sizes.min() == 0:
        raise ValueError("an empty cluster")
    largest_first = np.argsort(-sizes, kind="stable")
    centres = np.stack([values[belongs == j].mean(0, dtype=np.float64) for j in largest_first])
    rank = np.argsort(largest_first)
    variance = np.mean([np.square(row - centres[rank[j]]).mean() for row, j in zip(values, belongs, strict=True)])
    shaped = torch.from_numpy(centres).float().reshape(count, *latents.shape[1:])
    return shaped, torch.from_numpy(sizes[largest_first] / len(values)).float(), torch.tensor(variance).float()


def save_modes(path: Path, modes: Modes, key: str) -> None:
    """Writes modes, whole or not at all, with a key that says of what they are."""
    tensors = {name: value.contiguous() for name, value in vars(modes).items()}
    write_bytes(path, save(tensors, {"key": key}))


def load_modes(path: Path, key: str) -> Modes | None:
    """Reads what `save_modes` wrote; None if there is nothing, or it is of something else.

    Raises:
        UserError: The file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return Modes(*(file.get_tensor(name) for name in ("centres", "weights", "variance")))
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); delete it, it is made again") from None
