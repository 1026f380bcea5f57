"""Cells: one trained student each, kept by the hash of everything that its number depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddgen.checkpoint import read_json, write_bytes
from ddgen.data import ImageDataset
from ddgen.evaluation.batches import Look, TrainingImages
from ddgen.evaluation.protocols import Protocol
from ddgen.evaluation.students import Job, StudentResult, train_student
from ddgen.observer.observer import Observer
from ddgen.seeds import derive

CELL_FORMAT = 2  # raise it when the same settings would give another number, or results hold other fields


@dataclass(frozen=True)
class Teacher:
    """An observer in a report.

    Attributes:
        name: Of its network, with a number where several have the same.
        observer: The observer.
        accuracy: Its top-1 fraction on the real test images.
    """

    name: str
    observer: Observer
    accuracy: float


@dataclass(frozen=True)
class Setting:
    """What all cells share.

    Attributes:
        test: Real test images.
        num_classes: Number of classes k.
        repeats: Students per row.
        epochs: Instead of the protocols' own.
        seed: The user's.
        device: Where students train.
        precision: Autocast precision.
        cells_dir: Where finished cells are kept.
        looks: Normalisation by name, as in `Protocol.normalization`.
        progress: Show a bar per row.
    """

    test: ImageDataset
    num_classes: int
    repeats: int
    epochs: int | None
    seed: int
    device: torch.device
    precision: str
    cells_dir: Path
    looks: dict[str, Look]
    progress: bool


@dataclass(frozen=True)
class Cell:
    """One student.

    Attributes:
        source: Name of its images, for people.
        images: What it trains on.
        content: What stands for the images in the key; None digests them.
        protocol: The recipe.
        student: Name of its network.
        teachers: Who labels online.
        ipc: Images per class.
        epochs: Epochs to train.
        repeat: Which of the row's students.
    """

    source: str
    images: TrainingImages
    content: str | None
    protocol: Protocol
    student: str
    teachers: tuple[Teacher, ...]
    ipc: int
    epochs: int
    repeat: int


def run_cell(cell: Cell, setting: Setting, on_epoch: Callable[[int, float | None], None]) -> tuple[StudentResult, bool]:
    """Trains one student, or takes the number of the same student trained before.

    Returns:
        The result, and whether it was there already.
    """
    key = _key(cell, setting)
    path = _path(key, setting)
    done = _read(path)
    if done is not None:
        return done, True
    result = train_student(job_of(cell, setting), on_epoch)
    stored = {"key": key, "images": cell.source, "result": dataclasses.asdict(result)}
    write_bytes(path, json.dumps(stored, allow_nan=False).encode())
    return result, False


def is_done(cell: Cell, setting: Setting) -> bool:
    """Whether the number of a cell is there already."""
    return _path(_key(cell, setting), setting).exists()


def job_of(cell: Cell, setting: Setting) -> Job:
    """Returns what a cell trains."""
    return Job(
        network=cell.student,
        protocol=cell.protocol,
        images=cell.images,
        num_classes=setting.num_classes,
        ipc=cell.ipc,
        test=setting.test,
        teachers=tuple(teacher.observer for teacher in cell.teachers),
        device=setting.device,
        precision=setting.precision,
        seed=derive(setting.seed, "repeat", cell.repeat),
        epochs=cell.epochs,
        look=setting.looks[cell.protocol.normalization],
    )


def _path(key: dict[str, Any], setting: Setting) -> Path:
    return setting.cells_dir / f"{digest(json.dumps(key, sort_keys=True).encode())}.json"


def _key(cell: Cell, setting: Setting) -> dict[str, Any]:
    """Everything that the number of a cell depends on."""
    images = cell.images
    soft = [] if images.soft_labels is None else list(bytes_of(images.soft_labels))
    content = [*bytes_of(images.pixels), *bytes_of(images.labels)] if cell.content is None else [cell.content.encode()]
    return {
        "format": CELL_FORMAT,
        "images": digest(*content, *soft),
        "factor": images.factor,
        **({} if images.views is None else {"views": images.views.digest}),
        "protocol": repr(cell.protocol),
        "student": cell.student,
        "ipc": cell.ipc,
        "epochs": cell.epochs,
        "look": repr(setting.looks[cell.protocol.normalization]),
        "seed": setting.seed,
        "repeat": cell.repeat,
        "test": setting.test.fingerprint,
        "teachers": [teacher.observer.fingerprint for teacher in cell.teachers],
        "precision": setting.precision,
        "device": setting.device.type,
    }


def bytes_of(tensor: Tensor) -> Iterator[bytes]:
    """Yields what identifies a tensor: shape, type and values."""
    yield repr((tuple(tensor.shape), tensor.dtype)).encode()
    yield tensor.contiguous().numpy().tobytes()


def digest(*parts: bytes) -> str:
    """Returns a hex digest of bytes."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def _read(path: Path) -> StudentResult | None:
    if not path.exists():
        return None
    values = read_json(path)["result"]
    for name in ("curve", "confusion"):
        if values[name] is not None:
            values[name] = tuple(map(tuple, values[name]))
    values["recall"] = tuple(values["recall"])
    return StudentResult(**values)
