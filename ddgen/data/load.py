"""load_dataset: settings in, ImageDataset out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ddgen.config import DataConfig
from ddgen.data.classes import choose_classes, did_you_mean
from ddgen.data.dataset import ImageDataset
from ddgen.data.layouts import NAMED, find_source
from ddgen.data.pack import pack
from ddgen.data.source import Source, digest
from ddgen.errors import UserError

MIN_IMAGE_SIZE = 8


def load_dataset(data: DataConfig, split: Literal["train", "test"], *, progress: bool = True) -> ImageDataset:
    """Loads one split of a dataset, decoding it into the cache the first time.

    Args:
        data: Which dataset, where, which classes, at which size.
        split: ``train`` or ``test``; what a dataset publishes as validation is its test split where its real
            test labels are not public.
        progress: Whether to show a bar and notes on stderr.

    Raises:
        UserError: No such data, unreadable images, unknown classes, too little disk.
    """
    name = _name(data)
    image_size = native_image_size(name) if data.image_size is None else data.image_size
    if image_size < MIN_IMAGE_SIZE:
        raise UserError(f"--image_size {image_size}: give at least {MIN_IMAGE_SIZE} pixels")
    cache_dir = cache_root(data)
    try:
        source = find_source(name, data.data_dir, split, cache_dir, progress=progress)
    except PermissionError as error:
        raise UserError(f"--data_dir {error.filename}: {error.strerror}; make it readable") from None
    source = _subset(source, choose_classes(source.class_names, data.classes, data.num_classes))
    if not len(source.labels):
        raise UserError(f"--data_dir {source.where}: no {split} images of the classes chosen")
    packed = pack(
        source,
        image_size,
        cache_dir,
        title=f"{name} {split}",
        skip_bad_images=data.skip_bad_images,
        progress=progress,
    )
    return ImageDataset(
        pixels=torch.from_numpy(packed.pixels),
        labels=torch.from_numpy(packed.labels),
        class_names=source.class_names,
        name=name,
        split=split,
        fingerprint=packed.meta["fingerprint"],
        skipped=dict(packed.meta["skipped"]),
        licence=NAMED[name].licence,
    )


def native_image_size(dataset: str) -> int:
    """Returns the side in pixels to which a dataset's images are brought when --image_size is not given."""
    return NAMED[dataset].image_size


def cache_root(data: DataConfig) -> Path:
    """Returns the cache folder: --cache_dir, $DDGEN_CACHE, or ~/.cache/ddgen."""
    return Path(data.cache_dir or os.environ.get("DDGEN_CACHE") or "~/.cache/ddgen").expanduser()


def _name(data: DataConfig) -> str:
    if data.dataset is None:
        raise UserError(f"--dataset: not given; one of {', '.join(NAMED)}")
    if data.dataset not in NAMED:
        raise UserError(f"--dataset {data.dataset}: unknown{did_you_mean(data.dataset, list(NAMED))}")
    return data.dataset


def _subset(source: Source, chosen: list[int]) -> Source:
    """Keeps the chosen classes, in the order chosen."""
    if chosen == list(range(len(source.class_names))):
        return source
    position = np.full(len(source.class_names), -1, dtype=np.int64)
    position[chosen] = np.arange(len(chosen))
    kept = source.take(np.flatnonzero(position[source.labels] >= 0))
    return Source(
        class_names=tuple(source.class_names[label] for label in chosen),
        labels=position[kept.labels],
        read=kept.read,
        identity=digest(kept.identity, *chosen),
        where=kept.where,
    )
