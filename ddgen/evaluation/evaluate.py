"""Evaluation: the same recipes on a distilled dataset and on the baselines that it has to beat."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddgen.checkpoint import read_json, write_json
from ddgen.data import ImageDataset
from ddgen.data.classes import check_class_order
from ddgen.distill.dataset import DistilledDataset, encode_png
from ddgen.distill.views import StoredViews
from ddgen.errors import UserError
from ddgen.evaluation.baselines import random_real
from ddgen.evaluation.protocols import Protocol, get_protocol
from ddgen.evaluation.report import Results, Row, draw_accuracy, write_results
from ddgen.evaluation.students import StudentResult, train_student
from ddgen.observer.networks import build_network
from ddgen.observer.observer import Observer
from ddgen.observer.realism import check_observer, measure_accuracy
from ddgen.seeds import derive

CELL_FORMAT = 1  # raise it when the same settings would give another number


@dataclass(frozen=True)
class _Source:
    """Images for the students of one row; `draw(repeat)` returns pixels (n, 3, s, s) and labels (n,)."""

    name: str
    draw: Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Setting:
    """What all cells share."""

    test: ImageDataset
    observer: Observer | None
    num_classes: int
    ipc: int
    epochs: int | None
    repeats: int
    seed: int
    device: torch.device
    precision: str
    cells_dir: Path
    flip: bool
    progress: bool
    stored: StoredViews | None


def evaluate(
    distilled: DistilledDataset,
    train: ImageDataset,
    test: ImageDataset,
    *,
    observer: Observer | None,
    students: Sequence[str],
    protocols: Sequence[str],
    repeats: int,
    epochs: int | None,
    seed: int,
    device: torch.device,
    precision: str,
    output_dir: Path,
    random_generated: tuple[Tensor, Tensor] | None = None,
    stored: StoredViews | None = None,
    flip: bool = True,
    progress: bool = True,
) -> Results:
    """Trains students on the distilled images and on the baselines, and scores them on the real test images.

    Every finished student is kept in ``output_dir/cells``, so an interrupted evaluation goes on where it stopped.
    Row for row, repeat r starts from the same weights, so rows differ by their images.

    Args:
        distilled: The dataset to judge.
        train: Real training images, from which random real ones are drawn, anew for every repeat.
        test: Real test images.
        observer: Teacher of soft protocols.
        students: Names of networks.
        protocols: Names of protocols.
        repeats: Students per row.
        epochs: Instead of the protocols' own.
        seed: Of students and random draws.
        device: Where students train.
        precision: "no", "bf16" or "fp16".
        output_dir: Receives results.json, accuracy.png and cells/.
        random_generated: Generated images that nobody selected: pixels uint8 (n, 3, s, s), labels (n,).
        stored: Labelled views of the distilled images; stored protocols have a row for these images only.
        flip: Mirror training images, as the protocols do; false where a mirror image is another class.
        progress: Show a bar per row.

    Returns:
        The rows, written to ``output_dir`` too.

    Raises:
        UserError: Before any training: artefacts whose classes or sizes do not match, settings that cannot be honoured.
    """
    recipes = [get_protocol(name) for name in protocols]
    if stored is None and any(recipe.labels == "views" for recipe in recipes):
        raise UserError("--protocols stored: the dataset has no stored views; make them with ddgen label")
    ipc = _check(distilled, train, test, observer, recipes, students, repeats, epochs, random_generated)
    sources = _sources(distilled, random_generated, train, ipc, seed)
    setting = _Setting(
        test, observer, len(distilled.class_names), ipc, epochs, repeats, seed, device, precision,
        output_dir / "cells", flip, progress, stored,
    )  # fmt: skip
    image_bytes = {source.name: png_bytes(source.draw(0)[0]) for source in sources}
    teacher_accuracy = _teacher_accuracy(setting)
    rows = [
        _row(source, recipe, student, setting, image_bytes[source.name])
        for student in students
        for recipe in recipes
        for source in sources
        if recipe.labels != "views" or source.name == "distilled"
    ]
    results = Results(
        rows=tuple(rows),
        dataset=test.name,
        num_classes=setting.num_classes,
        num_test=len(test),
        image_size=test.image_size,
        ipc=ipc,
        repeats=repeats,
        seed=seed,
        epochs_override=epochs,
        flip=flip,
        teacher=None if observer is None else observer.network,
        teacher_accuracy=teacher_accuracy,
        precision=precision,
        device=device.type,
    )
    write_results(results, output_dir / "results.json")
    draw_accuracy(results, output_dir / "accuracy.png")
    return results


def _sources(
    distilled: DistilledDataset,
    random_generated: tuple[Tensor, Tensor] | None,
    train: ImageDataset,
    ipc: int,
    seed: int,
) -> list[_Source]:
    """Returns the images of every kind of row; a class too small for the random real ones is found now."""
    sources = [_Source("distilled", lambda repeat: (distilled.pixels, distilled.labels))]
    if random_generated is not None:
        sources.append(_Source("random generated", lambda repeat: random_generated))
    sources.append(_Source("random real", lambda repeat: random_real(train, ipc, derive(seed, "repeat", repeat))))
    sources[-1].draw(0)
    return sources


def png_bytes(pixels: Tensor) -> int:
    """Returns what images uint8 (n, 3, h, w) take as PNG files, one each, written as the distilled folder's are."""
    return sum(len(encode_png(image)) for image in pixels)


def _check(
    distilled: DistilledDataset,
    train: ImageDataset,
    test: ImageDataset,
    observer: Observer | None,
    recipes: Sequence[Protocol],
    students: Sequence[str],
    repeats: int,
    epochs: int | None,
    random_generated: tuple[Tensor, Tensor] | None,
) -> int:
    """Refuses what cannot be evaluated, before any training; returns the images per class."""
    names = distilled.class_names
    for found, title in ((train, "training images"), (test, "test images")):
        check_class_order(
            names, found.class_names, expected_name="the distilled dataset", found_name=f"the {title} of {found.name}"
        )
    if observer is not None:
        check_class_order(names, observer.class_names, expected_name="the distilled dataset", found_name="the observer")
    elif any(recipe.labels == "soft" for recipe in recipes):
        raise UserError("--protocols rded: soft labels need a teacher; give --observer")
    if not recipes:
        raise UserError("--protocols: empty; name rded, hard or both")
    if not students:
        raise UserError("--students: empty; name a network, for instance convnet3")
    if repeats < 1:
        raise UserError(f"--repeats {repeats}: must be at least 1")
    if epochs is not None and epochs < 1:
        raise UserError(f"--epochs {epochs}: must be at least 1")
    _check_sizes(distilled, train, test, random_generated)
    for student in students:
        for recipe in recipes:
            build_network(student, len(names), test.image_size, norm=recipe.norm, setting="--students")
    return _images_per_class(distilled.labels, len(names), "the distilled dataset")


def _check_sizes(
    distilled: DistilledDataset,
    train: ImageDataset,
    test: ImageDataset,
    random_generated: tuple[Tensor, Tensor] | None,
) -> None:
    size = distilled.pixels.shape[-1]
    for found in (train, test):
        if found.image_size != size:
            raise UserError(
                f"--image_size {found.image_size}: the distilled images have {size} px, the {found.split} images of "
                f"{found.name} {found.image_size}; set --image_size {size}"
            )
    if random_generated is not None and random_generated[0].shape != distilled.pixels.shape:
        raise UserError(
            f"random generated images {tuple(random_generated[0].shape)} and distilled images "
            f"{tuple(distilled.pixels.shape)} differ in number or size; sample both with the same settings"
        )


def _images_per_class(labels: Tensor, num_classes: int, title: str) -> int:
    counts = torch.bincount(labels, minlength=num_classes)
    if len(counts) != num_classes or int(counts.min()) != int(counts.max()):
        raise UserError(
            f"{title} has {int(counts.min())} to {int(counts.max())} images per class; expected equally many"
        )
    return int(counts[0])


def _teacher_accuracy(setting: _Setting) -> float | None:
    """Measures the observer on the real test images, and refuses one that is near chance there."""
    if setting.observer is None:
        return None
    measured = copy.copy(setting.observer)
    measured.accuracy = measure_accuracy(
        setting.observer, setting.test, device=setting.device, precision=setting.precision
    )
    check_observer(measured, setting.test.class_names)
    return measured.accuracy


def _row(source: _Source, recipe: Protocol, student: str, setting: _Setting, image_bytes: int) -> Row:
    results = []
    num_epochs = recipe.epochs(setting.ipc) if setting.epochs is None else setting.epochs
    with tqdm(
        total=setting.repeats * num_epochs,
        desc=f"{source.name:<16} {recipe.name:<4} {student}",
        unit="epoch",
        disable=not setting.progress,
        dynamic_ncols=True,
        bar_format="{desc} |{bar:20}| {percentage:3.0f}% [{elapsed}<{remaining}]{postfix}",
    ) as bar:
        for repeat in range(setting.repeats):
            results.append(_cell(source, recipe, student, repeat, setting, bar))
            scores = [100 * result.accuracy_last for result in results]
            bar.set_postfix_str(f"last epoch {' '.join(f'{score:.1f}' for score in scores)}")
    return Row(
        images=source.name,
        protocol=recipe.name,
        student=student,
        epochs=num_epochs,
        scores=tuple(result.accuracy_last for result in results),
        best_scores=tuple(result.accuracy_best for result in results),
        image_bytes=image_bytes,
        label_bytes=_label_bytes(recipe, setting),
        seconds=sum(result.seconds for result in results),
    )


def _label_bytes(recipe: Protocol, setting: _Setting) -> int:
    """Bytes that the recipe needs beside the images: the teacher's weights, stored views, or whole bytes per number."""
    if recipe.labels == "soft" and setting.observer is not None:
        return sum(value.numel() * value.element_size() for value in setting.observer.state_dict().values())
    if recipe.labels == "views" and setting.stored is not None:
        return setting.stored.num_bytes
    bytes_per_label = max(1, ((setting.num_classes - 1).bit_length() + 7) // 8)
    return setting.num_classes * setting.ipc * bytes_per_label


def _cell(
    source: _Source, recipe: Protocol, student: str, repeat: int, setting: _Setting, bar: tqdm[Any]
) -> StudentResult:
    """Trains one student, or takes the number of the same student trained before."""
    images, labels = source.draw(repeat)
    key = _cell_key(images, labels, recipe, student, repeat, setting)
    path = setting.cells_dir / f"{_digest(json.dumps(key, sort_keys=True).encode())}.json"
    done = _read_cell(path)
    if done is not None:
        bar.update(done.epochs)
        return done

    def on_epoch(epochs_done: int, accuracy: float | None) -> None:
        bar.update(1)
        if accuracy is not None:
            bar.set_postfix_str(f"student {repeat + 1}/{setting.repeats} at {100 * accuracy:.1f}")

    result = train_student(
        student,
        recipe,
        images,
        labels,
        num_classes=setting.num_classes,
        ipc=setting.ipc,
        test=setting.test,
        teacher=setting.observer,
        device=setting.device,
        precision=setting.precision,
        seed=derive(setting.seed, "repeat", repeat),
        epochs=setting.epochs,
        flip=setting.flip,
        stored=setting.stored if recipe.labels == "views" else None,
        on_epoch=on_epoch,
    )
    write_json(path, {"key": key, "images": source.name, "result": dataclasses.asdict(result)})
    return result


def _cell_key(
    images: Tensor, labels: Tensor, recipe: Protocol, student: str, repeat: int, setting: _Setting
) -> dict[str, Any]:
    """Everything that the number of a cell depends on."""
    observer = setting.observer if recipe.labels == "soft" else None
    stored = setting.stored if recipe.labels == "views" else None
    return {
        "format": CELL_FORMAT,
        "images": _digest(*_bytes_of(images), *_bytes_of(labels)),
        "protocol": repr(recipe),
        "student": student,
        "epochs": recipe.epochs(setting.ipc) if setting.epochs is None else setting.epochs,
        "flip": setting.flip,
        "seed": setting.seed,
        "repeat": repeat,
        "test": setting.test.fingerprint,
        "teacher": None if observer is None else observer.fingerprint,
        **({} if stored is None else {"stored": stored.digest}),
        "precision": setting.precision,
        "device": setting.device.type,
    }


def _bytes_of(tensor: Tensor) -> Iterator[bytes]:
    yield repr((tuple(tensor.shape), tensor.dtype)).encode()
    yield tensor.contiguous().numpy().tobytes()


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _read_cell(path: Path) -> StudentResult | None:
    if not path.exists():
        return None
    values = read_json(path)["result"]
    values["curve"] = tuple((epoch, accuracy) for epoch, accuracy in values["curve"])
    return StudentResult(**values)
