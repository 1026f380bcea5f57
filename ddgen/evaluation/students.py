"""Students: small classifiers trained on a distilled dataset and scored on the real test set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddgen.data import ImageDataset
from ddgen.distill.views import StoredViews
from ddgen.errors import UserError
from ddgen.evaluation.augment import (
    color_jitter,
    cutmix,
    draw_crops,
    draw_cutmix,
    lighting,
    random_flip,
    resized_crop,
    shuffle_patches,
)
from ddgen.evaluation.protocols import Protocol
from ddgen.observer.networks import build_network, uses_channels_last
from ddgen.observer.observer import to_images01
from ddgen.precision import autocast
from ddgen.seeds import derive, numpy_generator

# RDED normalises every dataset with ImageNet's mean and standard deviation; so does every protocol here.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MIN_SCORINGS, MAX_SCORINGS = 4, 10
_AHEAD_PIXELS = 512 * 32 * 32  # so many pixels of mixed images go through the teacher together
_TEST_PIXELS = 512 * 32 * 32


@dataclass(frozen=True)
class StudentResult:
    """What one student reached.

    Attributes:
        accuracy_last: Top-1 fraction after the last epoch: the score.
        accuracy_best: The best among the epochs that were scored; chosen on the test set, so not a score.
        curve: (epochs done, top-1 fraction) of the scored epochs.
        epochs: Epochs trained.
        seconds: Wall-clock time with scoring.
        images_per_second: Training images per second of training alone.
    """

    accuracy_last: float
    accuracy_best: float
    curve: tuple[tuple[int, float], ...]
    epochs: int
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class _Batch:
    """A mixed batch: images (b, 3, s, s) in [0, 1], and both labels with the weight of the first."""

    images: Tensor
    labels: Tensor
    pasted_labels: Tensor
    own: float
    teacher_logits: Tensor | None = None


class Student(nn.Module):
    """A network that takes images in [0, 1] (b, 3, s, s), in whatever memory format is fast for it.

    Args:
        network: Normalised images -> logits (b, k).
        device: Where it runs.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        fast = uses_channels_last(network, device)
        self.memory_format = torch.channels_last if fast else torch.contiguous_format
        self.network = network.to(device).to(memory_format=self.memory_format)
        self.register_buffer("mean", torch.tensor(MEAN, device=device)[:, None, None])
        self.register_buffer("std", torch.tensor(STD, device=device)[:, None, None])

    def forward(self, images01: Tensor) -> Tensor:
        """Returns logits (b, k)."""
        images = ((images01 - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        logits: Tensor = self.network(images)
        return logits


def train_student(
    network: str,
    protocol: Protocol,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    ipc: int,
    test: ImageDataset,
    teacher: nn.Module | None,
    device: torch.device,
    precision: str,
    seed: int,
    epochs: int | None = None,
    factor: int = 1,
    flip: bool = True,
    stored: StoredViews | None = None,
    on_epoch: Callable[[int, float | None], None] | None = None,
) -> StudentResult:
    """Trains a student and scores it on the real test images.

    Args:
        network: Name for `build_network`.
        protocol: The recipe.
        images: Pixels uint8 (n, 3, s, s).
        labels: int64 (n,).
        num_classes: Number of classes k.
        ipc: Images per class, which the recipe's batch size and epochs depend on.
        test: Real images of the same classes in the same order.
        teacher: Observer in eval mode, images in [0, 1] -> logits (b, k); soft protocols need one.
        device: Where everything runs.
        precision: "no", "bf16" or "fp16".
        seed: Of initial weights, order and augmentation.
        epochs: Instead of the protocol's.
        factor: Images are grids of factor x factor patches.
        flip: Mirror images, as the protocols do; false where a mirror image is another class, as for digits.
        stored: Labelled views of `images`, which protocols with stored labels need.
        on_epoch: Called after every epoch with the epochs done and, when it was scored, the accuracy.

    Raises:
        UserError: A soft protocol without a teacher, a stored one without views of these images, or a loss that is not
            finite.
    """
    if protocol.labels == "soft" and teacher is None:
        raise UserError(f"--protocols {protocol.name}: soft labels need a teacher; give --observer")
    if protocol.labels == "views":
        protocol = replace(protocol, temperature=_check_stored(stored, protocol, factor, flip).header.temperature)
    num_epochs = protocol.epochs(ipc) if epochs is None else epochs
    dataset = test.name
    batch_size = min(len(images), protocol.batch_size(ipc, num_classes, dataset=dataset, network=network))
    peak = protocol.peak_learning_rate(dataset=dataset, network=network)
    scored = set(scored_epochs(num_epochs, len(images), len(test)))
    curve: list[tuple[int, float]] = []
    train_seconds = 0.0
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "student", "weights"))
        student = Student(
            build_network(network, num_classes, images.shape[-1], norm=protocol.norm, setting="--students"), device
        )
        optimizer = make_optimizer(student, protocol, peak)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        batches = _stream(images.to(device), labels.to(device), protocol, num_epochs, batch_size, seed, factor, flip)
        if protocol.labels == "soft" and teacher is not None:
            batches = _with_teacher(batches, teacher.to(device).eval(), device, precision)
        if protocol.labels == "views" and stored is not None:
            augment = view_augmenter(protocol, factor, flip)
            views = stored.stream(images.to(device), augment, epochs=num_epochs, batch_size=batch_size, seed=seed)
            batches = (_Batch(view, (own := logits.argmax(1)), own, 1.0, logits) for view, logits in views)
        for epoch in range(num_epochs):
            epoch_started = time.perf_counter()
            set_learning_rate(optimizer, protocol.learning_rate_at(epoch, num_epochs, peak))
            for _ in range(-(-len(images) // batch_size)):
                loss = _step(student, next(batches), protocol, optimizer, scaler, device, precision)
            _check_finite(loss, protocol, network, epoch, precision)
            train_seconds += time.perf_counter() - epoch_started
            accuracy = None
            if epoch + 1 in scored:
                accuracy = score(student, test, protocol, device=device, precision=precision)
                curve.append((epoch + 1, accuracy))
            if on_epoch is not None:
                on_epoch(epoch + 1, accuracy)
    return StudentResult(
        accuracy_last=curve[-1][1],
        accuracy_best=max(accuracy for _, accuracy in curve),
        curve=tuple(curve),
        epochs=num_epochs,
        seconds=time.perf_counter() - started,
        images_per_second=num_epochs * len(images) / train_seconds,
    )


def _check_stored(stored: StoredViews | None, protocol: Protocol, factor: int, flip: bool) -> StoredViews:
    if stored is None:
        raise UserError(f"--protocols {protocol.name}: no stored views; make them with ddgen label")
    made, asked = stored.header.augmentation, protocol.augmentation(factor, flip)
    for name, value in asked.items():
        if made.get(name) != value:
            raise UserError(
                f"--protocols {protocol.name}: the stored views were made with {name} {made.get(name)}, not {value};"
                " run ddgen label --overwrite"
            )
    return stored


def _check_finite(loss: Tensor, protocol: Protocol, network: str, epoch: int, precision: str) -> None:
    if not torch.isfinite(loss):
        raise UserError(
            f"--protocols {protocol.name}: the loss of student {network} is not finite after epoch "
            f"{epoch + 1}; --mixed_precision {precision} may be too coarse, try no"
        )


def scored_epochs(epochs: int, num_images: int, num_test: int) -> list[int]:
    """Returns after which epochs, counted from 1, the student is scored: evenly spaced, the last among them.

    Ten of them, or fewer where scoring would take longer than a part of training; never fewer than four.
    """
    affordable = epochs * num_images // (2 * num_test)
    count = min(epochs, max(MIN_SCORINGS, min(MAX_SCORINGS, affordable)))
    return [epochs * (i + 1) // count for i in range(count)]


@torch.no_grad()
def score(student: nn.Module, test: ImageDataset, protocol: Protocol, *, device: torch.device, precision: str) -> float:
    """Returns the student's top-1 accuracy on real images as a fraction; leaves it in training mode."""
    student.eval()
    size = test.pixels.shape[-1]
    batch_size = max(32, _TEST_PIXELS // size**2)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(test), batch_size):
        images = to_images01(test.pixels[start : start + batch_size], device)
        if protocol.test_resize:
            images = enlarge_and_crop(images)
        with autocast(device, precision):
            logits = student(images)
        correct += (logits.argmax(1) == test.labels[start : start + batch_size].to(device)).sum()
    student.train()
    return float(correct) / len(test)


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


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) at a temperature, mean over the batch, without a factor T^2 (RDED).

    Args:
        student_logits: (b, k).
        teacher_logits: (b, k).
        temperature: Divides both.
    """
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, teacher, reduction="batchmean")


def mixed_cross_entropy(logits: Tensor, labels: Tensor, pasted_labels: Tensor, own: float) -> Tensor:
    """Cross-entropy of a CutMix batch: `own` of the image's label, the rest of the pasted one's."""
    logits = logits.float()
    return own * F.cross_entropy(logits, labels) + (1.0 - own) * F.cross_entropy(logits, pasted_labels)


def make_optimizer(student: nn.Module, protocol: Protocol, peak: float) -> torch.optim.Optimizer:
    """Returns the protocol's optimizer; where `decay_vectors` is false 1-D parameters are not decayed."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    decayed = [p for p in parameters if protocol.decay_vectors or p.ndim > 1]
    rest = [p for p in parameters if not (protocol.decay_vectors or p.ndim > 1)]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": protocol.weight_decay}]
    if rest:
        groups.append({"params": rest, "weight_decay": 0.0})
    if protocol.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=peak, betas=protocol.betas, fused=True)
    return torch.optim.SGD(groups, lr=peak, momentum=protocol.momentum, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _augment(images: Tensor, protocol: Protocol, factor: int, flip: bool, rng: np.random.Generator) -> Tensor:
    """Augments images (b, 3, s, s) in [0, 1] one by one, before they are mixed."""
    if factor > 1:
        images = shuffle_patches(images, factor, rng)
    scale = protocol.crop_scale(factor)
    if scale[0] < 1.0:  # of area one only the whole image fits
        images = resized_crop(images, draw_crops(rng, len(images), images.shape[-1], scale))
    if flip:
        images = random_flip(images, rng)
    if protocol.color_jitter:
        images = color_jitter(images, protocol.color_jitter, rng)
    if protocol.lighting_std:
        images = lighting(images, protocol.lighting_std, rng)
    return images


def view_augmenter(protocol: Protocol, factor: int, flip: bool) -> Callable[[Tensor, np.random.Generator], Tensor]:
    """Returns what makes a batch (b, 3, s, s) of stored views: the protocol's augmentation and mixing."""
    return lambda images01, rng: _augment_and_mix(images01, protocol, factor, flip, rng)[0]


def _augment_and_mix(
    images01: Tensor, protocol: Protocol, factor: int, flip: bool, rng: np.random.Generator
) -> tuple[Tensor, Tensor, float]:
    """Returns mixed images (b, 3, s, s), whom each was pasted from (b,), and the part that is still its own."""
    batch = _augment(images01, protocol, factor, flip, rng)
    paste = torch.from_numpy(rng.permutation(len(batch))).to(batch.device)
    mixed, own = cutmix(batch, paste, draw_cutmix(rng, batch.shape[-1], protocol.cutmix_alpha))
    return mixed, paste, own


def _stream(
    images: Tensor, labels: Tensor, protocol: Protocol, epochs: int, batch_size: int, seed: int, factor: int, flip: bool
) -> Iterator[_Batch]:
    """Yields the mixed batches of all epochs; the last of an epoch may be smaller."""
    for epoch in range(epochs):
        rng = numpy_generator(seed, "student", "epoch", epoch)
        order = torch.from_numpy(rng.permutation(len(images))).to(images.device)
        for indices in order.split(batch_size):
            images01 = to_images01(images[indices], images.device)
            mixed, paste, own = _augment_and_mix(images01, protocol, factor, flip, rng)
            own_labels = labels[indices]
            yield _Batch(mixed, own_labels, own_labels[paste], own)


def _with_teacher(
    batches: Iterator[_Batch], teacher: nn.Module, device: torch.device, precision: str
) -> Iterator[_Batch]:
    """Adds the teacher's logits, several small batches in one forward: it does not depend on the student."""
    waiting: list[_Batch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(w.images.shape[0] for w in waiting) * batch.images.shape[-1] ** 2 >= _AHEAD_PIXELS:
            yield from _label(waiting, teacher, device, precision)
            waiting = []
    yield from _label(waiting, teacher, device, precision)


def _label(batches: list[_Batch], teacher: nn.Module, device: torch.device, precision: str) -> list[_Batch]:
    if not batches:
        return []
    memory_format = torch.channels_last if uses_channels_last(teacher, device) else torch.contiguous_format
    together = torch.cat([batch.images for batch in batches]).contiguous(memory_format=memory_format)
    with torch.no_grad(), autocast(device, precision):
        logits = teacher(together).float()
    parts = logits.split([len(batch.images) for batch in batches])
    return [
        _Batch(batch.images, batch.labels, batch.pasted_labels, batch.own, part)
        for batch, part in zip(batches, parts, strict=True)
    ]


def _step(
    student: nn.Module,
    batch: _Batch,
    protocol: Protocol,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    precision: str,
) -> Tensor:
    """Runs the student once, so that its batch-norm statistics move once, and updates it; returns the loss."""
    with autocast(device, precision):
        logits = student(batch.images)
    if batch.teacher_logits is not None:
        loss = soft_loss(logits, batch.teacher_logits, protocol.temperature)
    else:
        loss = mixed_cross_entropy(logits, batch.labels, batch.pasted_labels, batch.own)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()
