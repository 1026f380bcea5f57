"""Kept images beside the real image closest to each: are they new, or copies?"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ddgen.checkpoint import write_bytes
from ddgen.data import ImageDataset
from ddgen.distill.dataset import DistilledDataset
from ddgen.distill.foreign_dataset import ForeignDataset
from ddgen.observer.observer import Observer, predict_pixels
from ddgen.page.html import paragraph
from ddgen.page.pictures import MOST_CLASSES, Caption, evenly, images_by_class

NEIGHBOURS_NAME = "neighbours.safetensors"
MOST_PAIRS = 3  # of a class


def save_neighbours(
    dataset: DistilledDataset | ForeignDataset,
    train: ImageDataset,
    observer: Observer,
    path: Path,
    *,
    device: torch.device,
) -> None:
    """Finds, for the images that the page shows first, the closest real image of the same class.

    Closeness is the cosine of the observer's features, in which two views of one thing are near each other; in pixels
    the nearest image is the one with the least contrast.

    Args:
        dataset: Distilled images.
        train: The real images they stand in for.
        observer: Whose features are compared.
        path: Receives `kept` and `real`, pixels uint8 (m, 3, h, w), `labels` int64 (m,) and `cosine` float32 (m,).
        device: Where features are computed.
    """

    def features(pixels: Tensor) -> Tensor:
        found = predict_pixels(observer, pixels, what="features", batch_size=256, device=device, precision="no")
        return torch.nn.functional.normalize(found, dim=1)

    found: dict[str, list[Tensor]] = {"kept": [], "real": [], "labels": [], "cosine": []}
    for label in evenly(len(dataset.class_names), MOST_CLASSES):
        kept = dataset.pixels[dataset.labels == label][:MOST_PAIRS]
        real = train.pixels[train.labels == label]
        if not len(kept) or not len(real):
            continue
        cosine, nearest = (features(kept) @ features(real).T).max(dim=1)
        found["kept"].append(kept)
        found["real"].append(real[nearest])
        found["labels"].append(torch.full((len(kept),), label))
        found["cosine"].append(cosine)
    write_bytes(path, save({name: torch.cat(parts).contiguous() for name, parts in found.items()}))


def neighbours_of(evaluation_dir: Path, dataset: DistilledDataset) -> str:
    """Returns the pairs by class, or nothing where none are stored."""
    path = evaluation_dir / NEIGHBOURS_NAME
    if not path.is_file():
        return ""
    try:
        stored = load_file(path)
        pairs = torch.stack([stored["kept"], stored["real"]], dim=1).flatten(0, 1)
        labels = stored["labels"].repeat_interleave(2)
        captions = [
            caption
            for cosine in stored["cosine"].tolist()
            for caption in (
                Caption("kept"),
                Caption(f"real, {cosine:.2f}", f", the real image closest to the one before, cosine {cosine:.2f}"),
            )
        ]
    except (SafetensorError, KeyError, RuntimeError):
        return ""
    told = paragraph(
        "Each kept image is followed by the training image of its class that is closest to it in the observer's "
        "features, with the cosine between the two."
    )
    return told + images_by_class(pairs, labels, captions, dataset.class_names, "image", css="images pairs")
