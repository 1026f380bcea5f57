"""The hub's parquet layout: shards named after their split, an image column and a label column."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ddgen.data.classes import did_you_mean
from ddgen.data.source import Item, Source, files_identity
from ddgen.errors import UserError

_IMAGE_COLUMNS = ("image", "img", "images")
_LABEL_COLUMNS = ("label", "fine_label", "labels")
_SPLIT_SEPARATORS = "-_."


def split_shards(root: Path, split_names: tuple[str, ...]) -> list[Path]:
    """Returns the shards of the first of `split_names` that has any, sorted by name.

    Shards are <split>-*.parquet or <split>/*.parquet in `root` or up to two folders below it.

    Raises:
        UserError: Shards of the split lie in several folders, which may be several datasets.
    """
    files = sorted(path for depth in ("", "*/", "*/*/") for path in root.glob(f"{depth}*.parquet") if path.is_file())
    for split in split_names:
        shards = [path for path in files if _is_split(path, root, split)]
        folders = sorted({path.parent for path in shards})
        if len(folders) > 1:
            listed = ", ".join(str(folder) for folder in folders)
            raise UserError(f"--data_dir {root}: {split} shards in several folders ({listed}); give one of them")
        if shards:
            return shards
    return []


def read_parquet(root: Path, shards: list[Path], class_names: tuple[str, ...] | None) -> Source:
    """Reads labelled images from parquet shards.

    Args:
        root: The folder of the dataset.
        shards: Files of one split, in order.
        class_names: The order of classes decided by the training split; None takes the shards' own ClassLabel.

    Raises:
        UserError: No image or label column, labels outside the classes, other ClassLabel names than in training.
    """
    tables = [_open(path) for path in shards]
    raw = [_labels(table) for table in tables]
    names = _class_names(tables[0], raw) if class_names is None else class_names
    labels = np.concatenate([_to_positions(table, values, names) for table, values in zip(tables, raw, strict=True)])
    return Source(
        class_names=names,
        labels=labels,
        read=lambda rows: _read_rows(tables, rows),
        identity=files_identity(root, shards),
        where=root,
    )


@dataclass(frozen=True)
class _Shard:
    path: Path
    num_rows: int
    image_column: str
    label_column: str
    label_names: tuple[str, ...] | None  # the ClassLabel's, where the file has one


def _is_split(path: Path, root: Path, split: str) -> bool:
    stem = path.name.removesuffix(".parquet")
    named = stem == split or (stem.startswith(split) and stem[len(split)] in _SPLIT_SEPARATORS)
    return named or (path.parent != root and path.parent.name == split)


def _open(path: Path) -> _Shard:
    try:
        with pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    features = _features(schema)
    image = _column(path, schema, _IMAGE_COLUMNS, "image", features, "Image")
    label = _column(path, schema, _LABEL_COLUMNS, "label", features, "ClassLabel")
    names = features.get(label, {}).get("names")
    return _Shard(path, num_rows, image, label, tuple(map(str, names)) if names else None)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"--data_dir {path}: not a readable parquet file ({' '.join(str(error).split())})")


def _features(schema: pa.Schema) -> dict[str, Any]:
    text = (schema.metadata or {}).get(b"huggingface")
    if not text:
        return {}
    try:
        return dict(json.loads(text)["info"]["features"])
    except (ValueError, KeyError, TypeError):
        return {}


def _column(
    path: Path, schema: pa.Schema, usual: tuple[str, ...], what: str, features: dict[str, Any], kind: str
) -> str:
    for name in usual:
        if name in schema.names:
            return name
    typed = [name for name in schema.names if features.get(name, {}).get("_type") == kind]
    if len(typed) == 1:
        return typed[0]
    raise UserError(
        f"--data_dir {path}: no {what} column among {', '.join(schema.names)}; call it {' or '.join(usual[:2])}"
    )


def _labels(shard: _Shard) -> pa.ChunkedArray:
    try:
        with pq.ParquetFile(shard.path) as file:
            values = file.read(columns=[shard.label_column]).column(0)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(shard.path, error) from None
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if values.null_count:
        raise UserError(f"--data_dir {shard.path}: {values.null_count} rows have no {shard.label_column}")
    if not (pa.types.is_integer(values.type) or _is_text(values.type)):
        raise UserError(f"--data_dir {shard.path}: {shard.label_column} is {values.type}; expected integers or names")
    return values


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _class_names(first: _Shard, labels: list[pa.ChunkedArray]) -> tuple[str, ...]:
    if first.label_names is not None:
        return first.label_names
    if _is_text(labels[0].type):
        return tuple(sorted({name for values in labels for name in pc.unique(values).to_pylist()}))
    largest = max((pc.max(values).as_py() for values in labels if len(values)), default=-1)
    return tuple(str(label) for label in range(largest + 1))


def _to_positions(shard: _Shard, values: pa.ChunkedArray, names: tuple[str, ...]) -> np.ndarray:
    """Returns the labels as positions in `names`, int64 (rows,)."""
    if _is_text(values.type):
        index = {name: position for position, name in enumerate(names)}
        unknown = [name for name in pc.unique(values).to_pylist() if name not in index]
        if unknown:
            raise UserError(f"--data_dir {shard.path}: label {unknown[0]} is not among the training classes"
                            f"{did_you_mean(unknown[0], names)}")  # fmt: skip
        return np.array([index[name] for name in values.to_pylist()], dtype=np.int64)
    labels = values.to_numpy().astype(np.int64)
    wrong = labels[(labels < 0) | (labels >= len(names))]
    if len(wrong):
        raise UserError(
            f"--data_dir {shard.path}: {len(wrong)} rows have labels outside 0..{len(names) - 1}, first {wrong[0]}; "
            "a shard without labels cannot be used"
        )
    if shard.label_names is not None and shard.label_names != names:
        return _by_name(shard, labels, names)
    return labels


def _by_name(shard: _Shard, labels: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Translates a ClassLabel in another order than the training split's."""
    own = shard.label_names or ()
    unknown = [name for name in own if name not in names]
    if unknown:
        raise UserError(f"--data_dir {shard.path}: class {unknown[0]} is not among the training classes"
                        f"{did_you_mean(unknown[0], names)}")  # fmt: skip
    return np.array([names.index(name) for name in own], dtype=np.int64)[labels]


def _read_rows(shards: list[_Shard], rows: np.ndarray) -> Iterator[Item]:
    start = 0
    for shard in shards:
        inside = rows[(rows >= start) & (rows < start + shard.num_rows)] - start
        try:
            if len(inside):
                yield from _read_shard(shard, inside)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(shard.path, error) from None
        start += shard.num_rows


def _read_shard(shard: _Shard, rows: np.ndarray) -> Iterator[Item]:
    """Streams the wanted rows; row groups without any are not read."""
    with pq.ParquetFile(shard.path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        groups = sorted(set((np.searchsorted(starts, rows, side="right") - 1).tolist()))
        wanted = set(rows.tolist())
        for group in groups:
            row = int(starts[group])
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[shard.image_column]):
                for value in batch.column(0):
                    if row in wanted:
                        yield _item(shard, row, value.as_py())
                    row += 1


def _item(shard: _Shard, row: int, value: Any) -> Item:
    name = f"{shard.path}:{row}"
    if isinstance(value, dict):
        name = f"{name} ({value['path']})" if value.get("path") else name
        value = value.get("bytes")
    return Item(name, value if isinstance(value, bytes) else b"")
