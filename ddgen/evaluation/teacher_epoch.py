"""Which epoch of an observer teaches best: short students of real images, scored on held-out real images.

An observer that was stopped early labels better where a class has few images (Qin et al., "A Label is Worth a Thousand
Images in Dataset Distillation", NeurIPS 2024). The test images have no part in the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddgen.data import ImageDataset
from ddgen.errors import UserError
from ddgen.evaluation.batches import TrainingImages
from ddgen.evaluation.protocols import RDED
from ddgen.evaluation.students import IMAGENET_LOOK, Job, train_student
from ddgen.observer.observer import Observer
from ddgen.seeds import derive, numpy_generator

NUM_STUDENTS = 2
NUM_HELD_OUT = 1000
MAX_IMAGES, MIN_CLASSES = 2000, 10  # with more images than that, a part of the classes decides
IMAGES_SEEN, MIN_EPOCHS, MAX_EPOCHS = 3000, 10, 300  # of a student; at ipc 1, 100 epochs chose by chance


@dataclass(frozen=True)
class EpochScore:
    """How well an observer teaches as it was after an epoch.

    Attributes:
        epoch: Epochs of the observer.
        observer_accuracy: Its own top-1 fraction on held-out images, where it is known.
        student_accuracy: Mean top-1 fraction of its students on held-out images.
    """

    epoch: int
    observer_accuracy: float | None
    student_accuracy: float


def score_epochs(
    candidates: Mapping[int, Callable[[], Observer]],
    train: ImageDataset,
    training: Tensor,
    held_out: Tensor,
    *,
    ipc: int,
    device: torch.device,
    precision: str,
    seed: int,
    flip: bool,
    on_student: Callable[[], None] = lambda: None,
) -> list[EpochScore]:
    """Trains short students on a few real images per class, labelled online by each candidate (RDED's recipe).

    Students of different candidates differ by their teacher only: images, weights, order and augmentation are the same.

    Args:
        candidates: Epoch -> loads the observer of that epoch.
        train: Real training images.
        training: int64 (m,), which of them the observer was trained on; students take theirs among these.
        held_out: int64 (h,), which of them it was not trained on; students are scored on a sample of these.
        ipc: Images per class.
        device: Where everything runs.
        precision: See `ddgen.precision`.
        seed: Of images and students.
        flip: Mirror images.
        on_student: Called after every student.

    Returns:
        The scores, by rising epoch.

    Raises:
        UserError: A class has fewer training images than `ipc`.
    """
    classes = _classes(train.num_classes, ipc, seed)
    scored_on = _held_out(train, held_out, classes, seed)
    draws = [_few_images(train, training, classes, ipc, derive(seed, "teacher epoch", r)) for r in range(NUM_STUDENTS)]
    epochs = min(max(IMAGES_SEEN // len(draws[0]), MIN_EPOCHS), MAX_EPOCHS)
    scores = []
    for epoch in sorted(candidates):
        teacher = candidates[epoch]()
        total = 0.0
        for repeat, indices in enumerate(draws):
            job = Job(
                network=student_network(train.image_size),
                protocol=RDED,
                images=TrainingImages(train.pixels[indices], train.labels[indices]),
                num_classes=train.num_classes,
                ipc=ipc,
                test=scored_on,
                teachers=(teacher,),
                device=device,
                precision=precision,
                seed=derive(seed, "teacher epoch", repeat),
                epochs=epochs,
                look=replace(IMAGENET_LOOK, flip=flip),
                scorings=1,
            )
            total += train_student(job).accuracy_last
            on_student()
        scores.append(EpochScore(epoch, teacher.accuracy, total / NUM_STUDENTS))
    return scores


def best_epoch(scores: list[EpochScore]) -> int:
    """Returns the epoch of the highest student accuracy, of equal ones the last."""
    return max(scores, key=lambda score: (score.student_accuracy, score.epoch)).epoch


def student_network(image_size: int) -> str:
    """Returns the ConvNet that the literature trains at a size: three blocks at 32 px, four at 64 px, at most six."""
    return f"convnet{min(max(image_size.bit_length() - 3, 1), 6)}"


def format_scores(scores: list[EpochScore], ipc: int) -> str:
    """Returns the scores as a table, the chosen epoch marked."""
    lines = [
        f"teacher epoch for ipc {ipc}: students of real training images, scored on held-out ones, in percent",
        " epoch  observer  student",
    ]
    for score in scores:
        observer = "" if score.observer_accuracy is None else f"{100 * score.observer_accuracy:.1f}"
        chosen = "  <- chosen" if score.epoch == best_epoch(scores) else ""
        lines.append(f"{score.epoch:>6}{observer:>10}{100 * score.student_accuracy:>9.1f}{chosen}")
    return "\n".join(lines)


def _classes(num_classes: int, ipc: int, seed: int) -> Tensor:
    """Returns the classes that decide, rising: all, unless that would take too many images."""
    count = max(MIN_CLASSES, MAX_IMAGES // ipc)
    order = numpy_generator(seed, "teacher epoch", "classes").permutation(num_classes)
    return torch.from_numpy(order[:count]).sort().values


def _held_out(train: ImageDataset, held_out: Tensor, classes: Tensor, seed: int) -> ImageDataset:
    of_classes = held_out[torch.isin(train.labels[held_out], classes)]
    order = numpy_generator(seed, "teacher epoch", "held out").permutation(len(of_classes))
    chosen = of_classes[torch.from_numpy(order[:NUM_HELD_OUT])]
    return ImageDataset(
        pixels=train.pixels[chosen],
        labels=train.labels[chosen],
        class_names=train.class_names,
        name=train.name,
        split="held-out train",
        fingerprint=train.fingerprint,
    )


def _few_images(train: ImageDataset, training: Tensor, classes: Tensor, ipc: int, seed: int) -> Tensor:
    """Returns `ipc` training images of each of these classes, int64 (len(classes) * ipc,)."""
    labels, chosen = train.labels[training], []
    for label in classes.tolist():
        members = training[labels == label]
        if len(members) < ipc:
            raise UserError(
                f"--teacher_epoch auto: class {train.class_names[label]} has only {len(members)} training images, fewer"
                f" than ipc {ipc}; give an epoch instead"
            )
        order = numpy_generator(seed, "images", label).permutation(len(members))
        chosen.append(members[torch.from_numpy(order[:ipc])])
    return torch.cat(chosen)
