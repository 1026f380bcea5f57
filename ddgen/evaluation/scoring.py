"""How good a student is: top-1, top-5, recall of every class and what is taken for what, on the real test images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddgen.data import ImageDataset
from ddgen.observer.observer import to_images01
from ddgen.precision import autocast

MIN_SCORINGS, MAX_SCORINGS = 4, 10
MAX_CONFUSION_CLASSES = 200
_TEST_PIXELS = 512 * 32 * 32


@dataclass(frozen=True)
class Scores:
    """A student's answers to the test images.

    Attributes:
        top1: Fraction that it names rightly.
        top5: Fraction whose class is among its first five; None for five classes or fewer.
        recall: Top-1 fraction of every class; 0 for one without test images.
        confusion: Images of class i named j; None above `MAX_CONFUSION_CLASSES` classes.
    """

    top1: float
    top5: float | None
    recall: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...] | None


def scored_epochs(epochs: int, num_images: int, num_test: int, scorings: int | None = None) -> list[int]:
    """Returns after which epochs, counted from 1, the student is scored: evenly spaced, the last among them.

    Ten of them, or fewer where scoring would take longer than a part of training; never fewer than four, unless
    `scorings` says how many.
    """
    affordable = epochs * num_images // (2 * num_test)
    count = min(epochs, scorings or max(MIN_SCORINGS, min(MAX_SCORINGS, affordable)))
    return [epochs * (i + 1) // count for i in range(count)]


@torch.no_grad()
def score(
    student: nn.Module,
    test: ImageDataset,
    num_classes: int,
    test_resize: bool,
    *,
    device: torch.device,
    precision: str,
) -> Scores:
    """Scores a student, images in [0, 1] -> logits (b, k), and leaves it in training mode.

    Args:
        student: On `device`.
        test: Real images.
        num_classes: Number of classes k.
        test_resize: Enlarge the images and take their middle, as `enlarge_and_crop`.
        device: Where to compute.
        precision: Autocast precision.
    """
    student.eval()
    batch_size = max(32, _TEST_PIXELS // test.pixels.shape[-1] ** 2)
    counts = torch.zeros(num_classes**2, dtype=torch.int64, device=device)
    among_five = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(test), batch_size):
        images = to_images01(test.pixels[start : start + batch_size], device)
        labels = test.labels[start : start + batch_size].to(device)
        if test_resize:
            images = enlarge_and_crop(images)
        with autocast(device, precision):
            logits = student(images)
        counts += torch.bincount(labels * num_classes + logits.argmax(1), minlength=num_classes**2)
        if num_classes > 5:
            among_five += (logits.topk(5).indices == labels[:, None]).sum()
    student.train()
    return _scores(counts.view(num_classes, num_classes).cpu(), int(among_five))


def _scores(confusion: Tensor, among_five: int) -> Scores:
    total, right = int(confusion.sum()), confusion.diagonal()
    num_classes = len(confusion)
    recall = right.double() / confusion.sum(1).clamp(min=1)
    rows = tuple(map(tuple, confusion.tolist())) if num_classes <= MAX_CONFUSION_CLASSES else None
    top5 = among_five / total if num_classes > 5 else None
    return Scores(int(right.sum()) / total, top5, tuple(recall.tolist()), rows)


def enlarge_and_crop(images: Tensor) -> Tensor:
    """Enlarges images (b, c, s, s) to `s // 7 * 8` and takes the middle s x s, as RDED's test transform.

    Where `s // 7 * 8` is not above s (32 px), this is the image itself.
    """
    size = images.shape[-1]
    larger = size // 7 * 8
    if larger <= size:
        return images
    enlarged = F.interpolate(images, size=(larger, larger), mode="bilinear", antialias=True, align_corners=False)
    start = (larger - size) // 2
    return enlarged[:, :, start : start + size, start : start + size]
