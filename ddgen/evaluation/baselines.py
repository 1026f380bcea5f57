"""Baselines: what a distilled dataset has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddgen.config import DistillConfig
from ddgen.data import ImageDataset
from ddgen.distill.rded import plan_crops, rank_class
from ddgen.distill.select import herding, k_center
from ddgen.errors import UserError
from ddgen.observer.observer import Observer, predict_pixels
from ddgen.seeds import numpy_generator


def random_real(dataset: ImageDataset, ipc: int | Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """Draws real images of every class, without replacement.

    A smaller `ipc` takes the first of what a larger one takes.

    Args:
        dataset: Real training images.
        ipc: Images per class, or of each class.
        seed: Of the draw.

    Returns:
        Pixels uint8 (n, 3, h, w) class by class, and labels int64 (n,).

    Raises:
        UserError: A class has fewer images than asked for.
    """
    counts = _counts(dataset, ipc, "random-real")
    chosen = []
    for label, indices in enumerate(dataset.indices_by_class()):
        order = numpy_generator(seed, "random real", label).permutation(len(indices))
        chosen.append(np.asarray(indices)[order[: counts[label]]])
    return _take(dataset, np.concatenate(chosen))


def by_features(
    dataset: ImageDataset,
    ipc: int | Sequence[int],
    method: str,
    observer: Observer,
    *,
    device: torch.device,
    precision: str,
) -> np.ndarray:
    """Chooses real images of every class by their penultimate features; no randomness is in it.

    Args:
        dataset: Real training images.
        ipc: Images per class, or of each class.
        method: A key of `BY_FEATURES`.
        observer: Whose features.
        device: Where to compute.
        precision: See `ddgen.precision`.

    Returns:
        int64 (n,), which images, class by class.

    Raises:
        UserError: A class has fewer images than asked for.
    """
    counts = _counts(dataset, ipc, method)
    chosen = []
    for label, indices in enumerate(dataset.indices_by_class()):
        of_class = torch.as_tensor(np.asarray(indices))
        features = predict_pixels(
            observer, dataset.pixels[of_class], what="features", batch_size=256, device=device, precision=precision
        )
        chosen.append(of_class[BY_FEATURES[method](features, counts[label])].numpy())
    return np.concatenate(chosen)


def rded_real(
    dataset: ImageDataset,
    ipc: Sequence[int],
    factor: int,
    observer: Observer,
    seed: int,
    *,
    device: torch.device,
    precision: str,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """Distils the real images by RDED (Sun et al., CVPR 2024), as ``ddgen distill`` does with its defaults.

    Which images are cropped, and where, is drawn by the seed, so that a row's spread holds the draw too.

    Args:
        dataset: Real training images.
        ipc: Images of each class; a class whose images need more crops than it has images gives several of each.
        factor: Each image is a grid of factor x factor crops.
        observer: Ranks the crops.
        seed: Of the draw.
        device: Where to compute.
        precision: See `ddgen.precision`.
        progress: Show a bar.

    Returns:
        Pixels uint8 (n, 3, h, w) class by class, and labels int64 (n,).

    Raises:
        UserError: A class without images, or logits that are not finite.
    """
    found = []
    members = dataset.indices_by_class()
    for label, count in enumerate(tqdm(ipc, desc="ranking crops", unit="class", leave=False, disable=not progress)):
        if count == 0:
            continue
        plan = plan_crops(
            len(members[label]), class_name=dataset.class_names[label], label=label, ipc=count, factor=factor,
            mipc=max(DistillConfig.mipc, count * factor**2), num_crop=DistillConfig.num_crop, seed=seed,
        )  # fmt: skip
        ranked = rank_class(
            observer, dataset, members[label], label, plan, factor=factor, rule="realism", real=None, seed=seed,
            device=device, precision=precision,
        )  # fmt: skip
        found.append(ranked.images(factor, dataset.image_size))
    return torch.cat(found), torch.arange(len(ipc)).repeat_interleave(torch.tensor(list(ipc)))


BY_OBSERVER = ("herding", "k-center", "rded-real")
"""Baselines that an observer chooses."""

BY_FEATURES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "herding": lambda features, count: herding(features, features, count),
    "k-center": k_center,
}
"""Name -> features (n, d) of a class and how many to choose in, positions out: the rules that choose candidates."""


def _counts(dataset: ImageDataset, ipc: int | Sequence[int], name: str) -> list[int]:
    counts = [ipc] * dataset.num_classes if isinstance(ipc, int) else list(ipc)
    for label, indices in enumerate(dataset.indices_by_class()):
        if len(indices) < counts[label]:
            raise UserError(
                f"--ipc {counts[label]}: class {dataset.class_names[label]} of {dataset.name} has only {len(indices)} "
                f"training images for the {name} baseline; take a smaller --ipc, or leave {name} out of --baselines"
            )
    return counts


def _take(dataset: ImageDataset, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    index = torch.from_numpy(chosen)
    return dataset.pixels[index].clone(), dataset.labels[index].clone()
