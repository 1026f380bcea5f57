"""Class folders: train/<class>/*, and Tiny ImageNet's official tree."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ddgen.data.classes import did_you_mean
from ddgen.data.source import Item, Source, files_identity
from ddgen.errors import UserError

# fmt: off
IMAGE_SUFFIXES = frozenset([
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".avif", ".tga",
])
# fmt: on
_IGNORED = {"__MACOSX"}


def subfolders(folder: Path) -> list[Path]:
    """Returns the visible folders inside a folder, sorted by name as ImageFolder sorts them."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return [folder / name for name in sorted(names) if name not in _IGNORED]


def images_below(folder: Path) -> list[Path]:
    """Returns every file below a folder that is named like an image, in sorted order."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _IGNORED)
        visible = (name for name in sorted(files) if not name.startswith("."))
        found.extend(Path(parent, name) for name in visible if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    return found


def class_folder_names(folder: Path) -> tuple[str, ...]:
    """Returns the names of the class folders, sorted; a class is a folder that directly or deeper holds images."""
    return tuple(path.name for path in subfolders(folder))


def read_class_folders(folder: Path, class_names: Sequence[str], *, complete: bool) -> Source:
    """Reads <folder>/<class>/**.

    Args:
        folder: Holds one folder per class.
        class_names: The order of classes.
        complete: Whether every class must have images (the training split).

    Raises:
        UserError: A folder that is no class, or a class without images.
    """
    found = class_folder_names(folder)
    for name in found:
        if name not in class_names:
            raise UserError(f"--data_dir {folder}: class folder {name} is not among the training classes"
                            f"{did_you_mean(name, class_names)}")  # fmt: skip
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        images = images_below(folder / name) if name in found else []
        if complete and not images:
            raise UserError(f"--data_dir {folder}: class folder {name} holds no image; fill or remove it")
        paths += images
        labels += [label] * len(images)
    return _source(folder, paths, labels, class_names)


def is_annotated(folder: Path) -> bool:
    """Whether a folder is Tiny ImageNet's official validation split: images and val_annotations.txt."""
    return (folder / "val_annotations.txt").is_file() and (folder / "images").is_dir()


def read_annotated(folder: Path, class_names: Sequence[str]) -> Source:
    """Reads Tiny ImageNet's official validation split: <folder>/images/* with labels in val_annotations.txt.

    Raises:
        UserError: A line without image or class, or a class that is not in training.
    """
    annotations = folder / "val_annotations.txt"
    index = {name: label for label, name in enumerate(class_names)}
    paths: list[Path] = []
    labels: list[int] = []
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in index:
            raise UserError(f"--data_dir {annotations}: line {number} names no training class: {line[:80]!r}")
        paths.append(folder / "images" / fields[0])
        labels.append(index[fields[1]])
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"--data_dir {annotations}: {len(missing)} of {len(paths)} images are missing, first {missing[0]}"
        )
    return _source(folder, paths, labels, class_names)


def _source(folder: Path, paths: list[Path], labels: list[int], class_names: Sequence[str]) -> Source:
    def read(rows: np.ndarray) -> Iterator[Item]:
        for row in rows:
            yield Item(str(paths[row]), paths[row])

    return Source(
        class_names=tuple(class_names),
        labels=np.asarray(labels, dtype=np.int64),
        read=read,
        identity=files_identity(folder, paths),
        where=folder,
    )
