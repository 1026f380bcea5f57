"""Encoded images of other people's datasets, and labels of their tables."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from ddgen.data import ImageDataset, check_class_order
from ddgen.data.classes import did_you_mean
from ddgen.data.decode import BadImageError, Encoded, decode_image
from ddgen.errors import UserError

IMAGE_COLUMNS = ("image", "img", "images")
LABEL_COLUMNS = ("label", "fine_label", "labels")
SOFT_LABEL_COLUMNS = ("soft_label", "soft_labels")


def decode_all(items: Sequence[tuple[str, Encoded]], image_size: int) -> tuple[Tensor, tuple[str, ...]]:
    """Decodes images: of one square size, as they are; of several, brought to the real images' as those were.

    Args:
        items: Name, for messages, and content of each image.
        image_size: Side of the real images.

    Returns:
        Pixels uint8 (n, 3, s, s), and a remark if images were resized.

    Raises:
        UserError: Images that cannot be read.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    bad: list[str] = []
    for name, data in items:
        try:
            sizes[_size(data)] += 1
        except (OSError, SyntaxError, ValueError) as error:
            bad.append(f"{name} ({error})")
    if bad:
        raise UserError(f"--distilled_dir: {len(bad)} of {len(items)} images cannot be read, first {bad[0]}")
    width, height = next(iter(sizes))
    alike = len(sizes) == 1 and width == height
    side = width if alike else image_size
    pixels = torch.empty(len(items), 3, side, side, dtype=torch.uint8)
    for row, (name, data) in enumerate(items):
        try:
            pixels[row] = torch.from_numpy(decode_image(data, side))
        except BadImageError as error:
            raise UserError(f"--distilled_dir: {name} cannot be read ({error})") from None
    resized = len(items) - sizes[side, side]
    remark = f"{resized:,} of {len(items):,} images were cropped to a square and resized to {side} px."
    return pixels, (remark,) if resized else ()


def parquet_table(where: Path, shards: Sequence[Path]) -> datasets.Dataset:
    """Opens parquet files of one split, with the hub's features where they hold them.

    Raises:
        UserError: A file that is not parquet.
    """
    try:
        return datasets.Dataset(pa.concat_tables([pq.read_table(path) for path in shards]))
    except (pa.ArrowException, OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise UserError(f"--distilled_dir {where}: not readable parquet files ({cause})") from None


def hub_table(source: str) -> datasets.Dataset:
    """Downloads the training split of a dataset of the hub, or takes it from the cache.

    Raises:
        UserError: No such folder, and no such dataset or no connection.
    """
    try:
        return datasets.load_dataset(source, split="train")
    except (OSError, ValueError, RuntimeError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"--distilled_dir {source}: no such folder, and the hub has no train split of that name ({cause})"
        ) from None


def read_table(
    table: datasets.Dataset, where: str, real: ImageDataset
) -> tuple[Tensor, Tensor, Tensor | None, tuple[str, ...]]:
    """Reads images, labels and, where there is such a column, soft labels, in the order of the table.

    Args:
        table: With an image and a label column.
        where: For messages.
        real: Real images, whose order of classes decides.

    Returns:
        Pixels uint8 (n, 3, s, s), labels int64 (n,), soft labels float16 (n, k) or None, remarks.

    Raises:
        UserError: Missing columns, another order of classes, labels outside it, images that cannot be read.
    """
    image = _column(table, IMAGE_COLUMNS, datasets.Image, "image", where)
    label = _column(table, LABEL_COLUMNS, datasets.ClassLabel, "label", where)
    labels, remark = _labels(table, label, where, real)
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    items = [(f"{where}:{row}", _content(value)) for row, value in enumerate(table[image])]
    pixels, resized = decode_all(items, real.image_size)
    soft = next((name for name in SOFT_LABEL_COLUMNS if name in table.column_names), None)
    soft_labels = None if soft is None else _soft_labels(table, soft, where, len(real.class_names))
    return pixels, labels, soft_labels, (remark, *resized)


def _size(data: Encoded) -> tuple[int, int]:
    if isinstance(data, np.ndarray):
        return data.shape[1], data.shape[0]
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        return image.size


def _column(table: datasets.Dataset, usual: tuple[str, ...], kind: type, what: str, where: str) -> str:
    typed = [name for name, feature in table.features.items() if isinstance(feature, kind)]
    named = [name for name in usual if name in table.column_names]
    found = [*named, *typed]
    if not found:
        raise UserError(
            f"--distilled_dir {where}: no {what} column among {', '.join(table.column_names)}; call it {usual[0]}"
        )
    return found[0]


def _labels(table: datasets.Dataset, column: str, where: str, real: ImageDataset) -> tuple[Tensor, str]:
    """Returns labels as positions in the real order of classes, int64 (n,), and how they were taken."""
    feature, values = table.features[column], table[column]
    if isinstance(feature, datasets.ClassLabel):
        check_class_order(
            real.class_names, feature.names, expected_name=f"the real images of {real.name}",
            found_name=f"--distilled_dir {where}",
        )  # fmt: skip
        remark = "Labels are the table's, whose class names are those of the real images, in the same order."
    elif len(values) and isinstance(values[0], str):
        unknown = sorted(set(values) - set(real.class_names))
        if unknown:
            raise UserError(f"--distilled_dir {where}: {unknown[0]} is no class of {real.name}"
                            f"{did_you_mean(unknown[0], real.class_names)}")  # fmt: skip
        values = [real.class_names.index(value) for value in values]
        remark = "Labels are the class names in the table."
    else:
        remark = f"The table names no classes: labels are taken in the order of the classes of {real.name}."
    labels = torch.tensor(list(values))
    k = len(real.class_names)
    if labels.dtype != torch.int64 or not len(labels) or labels.min() < 0 or labels.max() >= k:
        raise UserError(f"--distilled_dir {where}: {column} is not a class number from 0 to {k - 1} everywhere")
    return labels, remark


def _content(value: Any) -> bytes | Path:
    """The file of an image as `datasets` keeps it: its bytes, or where it is."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return Path(value)
    return value if isinstance(value, bytes) else b""


def _soft_labels(table: datasets.Dataset, column: str, where: str, num_classes: int) -> Tensor:
    rows = [list(row) for row in table[column]]
    if any(len(row) != num_classes for row in rows):
        raise UserError(f"--distilled_dir {where}: {column} is not a list of {num_classes} probabilities everywhere")
    soft = torch.tensor(rows, dtype=torch.float32)
    if not torch.isfinite(soft).all() or soft.min() < 0 or (soft.sum(1) - 1).abs().max() > 0.01:
        raise UserError(f"--distilled_dir {where}: {column} is not probabilities that sum to 1")
    return soft.half()
