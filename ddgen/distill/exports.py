"""A distilled dataset in the formats of others: the ECCV 2024 challenge's file, DD-Ranking's folder."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from ddgen.checkpoint import atomic_dir, write_bytes
from ddgen.distill.challenge import ENTRIES, IMAGES_PER_CLASS, normalise
from ddgen.distill.dataset import DistilledDataset, folder_names
from ddgen.distill.foreign_dataset import IMAGES_NAME, LABELS_NAME
from ddgen.errors import UserError


def export_challenge(dataset: DistilledDataset, path: Path, *, overwrite: bool = False) -> None:
    """Writes ``cifar100.pt`` or ``tinyimagenet.pt`` as the scorer of the ECCV 2024 challenge reads it.

    Args:
        dataset: Of all classes of CIFAR-100 or Tiny ImageNet, 10 images each.
        path: The file.
        overwrite: Replace an existing file.

    Raises:
        UserError: Another dataset, other classes, counts or sizes than the challenge's, or the file exists.
    """
    name = str(dataset.provenance.get("dataset"))
    entry = ENTRIES.get(name)
    if entry is None:
        raise UserError(f"--format challenge: the challenge is about {' and '.join(ENTRIES)}, not {name}")
    counts = dataset.labels.bincount(minlength=len(dataset.class_names))
    if len(counts) != entry.num_classes:
        raise UserError(f"--format challenge: {len(counts)} classes; the challenge takes all {entry.num_classes}")
    wrong = (counts != IMAGES_PER_CLASS).nonzero().flatten()
    if len(wrong):
        label = int(wrong[0])
        raise UserError(
            f"--format challenge: class {dataset.class_names[label]} has {int(counts[label])} images; the challenge "
            f"takes exactly {IMAGES_PER_CLASS} of each: sample with --ipc {IMAGES_PER_CLASS}"
        )
    size = tuple(dataset.pixels.shape[2:])
    if size != (entry.image_size, entry.image_size):
        raise UserError(f"--format challenge: images of {size[1]} x {size[0]} px; {name} takes {entry.image_size}")
    if path.exists() and not overwrite:
        raise UserError(f"--output {path}: exists already; give another, or --overwrite to replace it")
    write_bytes(path, _saved(normalise(dataset.pixels, entry)))


def export_dd_ranking(dataset: DistilledDataset, path: Path, *, overwrite: bool = False) -> None:
    """Writes what DD-Ranking takes as ``image_path`` and ``soft_labels``.

    ``images/<class>/<number>.png`` is a torchvision ImageFolder; row i of ``labels.pt``, float32 (n, k), belongs to
    image i of that folder. DD-Ranking's losses take the softmax of the labels they are given, so they are logarithms of
    the stored probabilities: their softmax is the soft label.

    Args:
        dataset: Any.
        path: The folder to create.
        overwrite: Replace an earlier export.

    Raises:
        UserError: The folder exists, or is something else.
    """
    if path.exists() and not overwrite:
        raise UserError(f"--output {path}: exists already; give another, or --overwrite to replace it")
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / LABELS_NAME).is_file()):
        raise UserError(f"--output {path}: not an earlier export, so --overwrite leaves it alone; give another")
    folders = folder_names(dataset.class_names)
    counts = [0] * len(folders)
    with atomic_dir(path, replace=overwrite) as root:
        for label, png in zip(dataset.labels.tolist(), dataset.png_images, strict=True):
            file = root / IMAGES_NAME / folders[label] / f"{counts[label]:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png)
            counts[label] += 1
        write_bytes(root / LABELS_NAME, _saved(_logits(dataset.soft_labels)))


def _logits(soft_labels: Tensor) -> Tensor:
    """Logarithms of probabilities, of which those below float16's smallest are taken for half of it."""
    smallest = torch.finfo(torch.float16).smallest_normal / 2**10
    return soft_labels.float().clamp_min(smallest / 2).log()


def _saved(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor.contiguous(), buffer)
    return buffer.getvalue()
