"""Students: small classifiers trained on a distilled dataset and scored on the real test set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddgen.data import ImageDataset
from ddgen.distill.views import StoredViews
from ddgen.errors import UserError
from ddgen.evaluation.batches import Batch, Look, TrainingImages, stored_views, stream, with_teachers
from ddgen.evaluation.protocols import STORED, Protocol
from ddgen.evaluation.scoring import Scores, score, scored_epochs
from ddgen.observer.networks import build_network, uses_channels_last
from ddgen.precision import autocast
from ddgen.seeds import derive

# RDED normalises every dataset with these of ImageNet.
IMAGENET_LOOK = Look((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


LOOK_EVERY = 10  # epochs between looks at the loss, for which a GPU has to be waited for


class Diverged(UserError):
    """The loss of a student is not finite."""


@dataclass(frozen=True)
class StudentResult:
    """What one student reached.

    Attributes:
        accuracy_last: Top-1 fraction after the last epoch: the score.
        accuracy_best: The best among the epochs that were scored; chosen on the test set, so not a score.
        top5_last: Top-5 fraction after the last epoch; None for five classes or fewer.
        recall: Top-1 fraction of every class after the last epoch; 0 for one without test images.
        confusion: Test images of class i named j after the last epoch; None above `MAX_CONFUSION_CLASSES` classes.
        curve: (epochs done, top-1 fraction) of the scored epochs.
        epochs: Epochs trained.
        seconds: Wall-clock time with scoring.
        images_per_second: Training images per second of training alone.
    """

    accuracy_last: float
    accuracy_best: float
    top5_last: float | None
    recall: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    curve: tuple[tuple[int, float], ...]
    epochs: int
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Job:
    """One student to train.

    Attributes:
        network: Name for `build_network`.
        protocol: The recipe.
        images: What it trains on.
        num_classes: Number of classes k.
        ipc: Images per class, which the recipe's batch size and epochs depend on.
        test: Real images of the same classes in the same order.
        teachers: Observers in eval mode, images in [0, 1] -> logits (b, k), whose logits are averaged; recipes with
            soft labels need one.
        device: Where everything runs.
        precision: "no", "bf16" or "fp16".
        seed: Of initial weights, order and augmentation.
        epochs: Instead of the protocol's.
        look: Normalisation, and whether images may be mirrored.
        scorings: How often it is scored, evenly, the last epoch among them. Default: as often as costs little.
    """

    network: str
    protocol: Protocol
    images: TrainingImages
    num_classes: int
    ipc: int
    test: ImageDataset
    teachers: Sequence[nn.Module]
    device: torch.device
    precision: str
    seed: int
    epochs: int | None = None
    look: Look = IMAGENET_LOOK
    scorings: int | None = None

    @property
    def num_epochs(self) -> int:
        """Epochs to train."""
        own = self.protocol.epochs(self.ipc, dataset=self.test.name, network=self.network)
        return own if self.epochs is None else self.epochs

    @property
    def batch_size(self) -> int:
        """Images per step."""
        size = self.protocol.batch_size(self.ipc, self.num_classes, dataset=self.test.name, network=self.network)
        return min(len(self.images), size)

    @property
    def peak_learning_rate(self) -> float:
        """Learning rate of the first epoch."""
        return self.protocol.peak_learning_rate(dataset=self.test.name, network=self.network)


class Student(nn.Module):
    """A network that takes images in [0, 1] (b, 3, s, s), in whatever memory format is fast for it.

    Args:
        network: Normalised images -> logits (b, k).
        device: Where it runs.
        look: Its normalisation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, device: torch.device, look: Look) -> None:
        super().__init__()
        fast = uses_channels_last(network, device)
        self.memory_format = torch.channels_last if fast else torch.contiguous_format
        self.network = network.to(device).to(memory_format=self.memory_format)
        self.register_buffer("mean", torch.tensor(look.mean, device=device)[:, None, None])
        self.register_buffer("std", torch.tensor(look.std, device=device)[:, None, None])

    def forward(self, images01: Tensor) -> Tensor:
        """Returns logits (b, k)."""
        images = ((images01 - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        logits: Tensor = self.network(images)
        return logits


def train_student(job: Job, on_epoch: Callable[[int, float | None], None] | None = None) -> StudentResult:
    """Trains a student and scores it on the real test images.

    Args:
        job: What to train on what.
        on_epoch: Called after every epoch with the epochs done and, when it was scored, the accuracy.

    Raises:
        UserError: Labels that the recipe needs and nobody has.
        Diverged: A loss that is not finite.
    """
    job = with_labels(job)
    scored = set(scored_epochs(job.num_epochs, len(job.images), len(job.test), job.scorings))
    curve: list[tuple[int, float]] = []
    train_seconds = 0.0
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[job.device] if job.device.type == "cuda" else []):
        torch.manual_seed(derive(job.seed, "student", "weights"))
        learner, batches = Learner(job), make_batches(job)
        since = time.perf_counter()
        for epoch in range(job.num_epochs):
            learner.begin_epoch(epoch)
            for _ in range(-(-len(job.images) // job.batch_size)):
                loss = learner.step(next(batches))
            accuracy = None
            if epoch + 1 in scored or (epoch + 1) % LOOK_EVERY == 0:
                _check_finite(loss, job, epoch)
            if epoch + 1 in scored:
                train_seconds += time.perf_counter() - since
                scores = learner.score()
                accuracy = scores.top1
                curve.append((epoch + 1, accuracy))
                since = time.perf_counter()
            if on_epoch is not None:
                on_epoch(epoch + 1, accuracy)
    return StudentResult(
        accuracy_last=scores.top1,
        accuracy_best=max(accuracy for _, accuracy in curve),
        top5_last=scores.top5,
        recall=scores.recall,
        confusion=scores.confusion,
        curve=tuple(curve),
        epochs=job.num_epochs,
        seconds=time.perf_counter() - started,
        images_per_second=job.num_epochs * len(job.images) / train_seconds,
    )


def with_labels(job: Job) -> Job:
    """Refuses a recipe whose labels nobody has; returns the job at the temperature of its stored views, if it has them.

    Raises:
        UserError: Says what is missing.
    """
    if job.protocol.labels == "soft" and not job.teachers:
        raise UserError(f"--protocols {job.protocol.name}: soft labels need a teacher; give --observer")
    if job.protocol.labels == "stored" and job.images.soft_labels is None:
        raise UserError(f"--protocols {job.protocol.name}: these images have no stored soft labels; give --observer")
    if job.protocol.labels != "views":
        return job
    views = check_views(job.images.views, job.protocol, job.images.factor, job.look.flip)
    return replace(job, protocol=replace(job.protocol, temperature=views.header.temperature))


def check_views(views: StoredViews | None, protocol: Protocol, factor: int, flip: bool) -> StoredViews:
    """Returns stored views that a recipe can use.

    Raises:
        UserError: There are none, or they were augmented otherwise.
    """
    if views is None:
        raise UserError(f"--protocols {protocol.name}: no stored views; make them with ddgen label")
    made = views.header.augmentation
    cure = "run ddgen label --overwrite"
    if protocol.augmentation(factor, flip) != STORED.augmentation(factor, flip):
        cure = f"ddgen label makes views by the augmentation of {STORED.name} only"
    for name, value in protocol.augmentation(factor, flip).items():
        if made.get(name) != value:
            raise UserError(
                f"--protocols {protocol.name}: the stored views were made with {name} {made.get(name)}, not {value};"
                f" {cure}"
            )
    return views


def make_batches(job: Job) -> Iterator[Batch]:
    """Returns all batches of a student's training, with the labels of its recipe."""
    make = stored_views if job.protocol.labels == "views" else stream
    batches = make(job.images.to(job.device), job.protocol, job.num_epochs, job.batch_size, job.seed, job.look)
    if job.protocol.labels != "soft":
        return batches
    return with_teachers(batches, [t.to(job.device).eval() for t in job.teachers], job.device, job.precision)


class Learner:
    """A student in training.

    Args:
        job: What to train on what; weights are drawn from torch's global generator.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        size = job.images.pixels.shape[-1]
        network = build_network(job.network, job.num_classes, size, norm=job.protocol.norm, setting="--students")
        self.student = Student(network, job.device, job.look)
        self.average: AveragedModel | None = None
        if job.protocol.ema_decay:
            self.average = AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(job.protocol.ema_decay))
        self.optimizer = make_optimizer(self.student, job.protocol, job.peak_learning_rate)
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=job.precision == "fp16")

    def begin_epoch(self, epoch: int) -> None:
        """Sets the learning rate of an epoch, counted from 0, and makes the optimizer anew where the recipe does."""
        job, protocol = self.job, self.job.protocol
        steps = [protocol.steps_before(at, job.num_epochs) for at in (epoch - 1, epoch)]
        if protocol.fresh_optimizer and steps[1] > steps[0]:
            self.optimizer = make_optimizer(self.student, protocol, job.peak_learning_rate)
        set_learning_rate(self.optimizer, protocol.learning_rate_at(epoch, job.num_epochs, job.peak_learning_rate))

    def step(self, batch: Batch) -> Tensor:
        """Runs the student once, so that its batch-norm statistics move once, and updates it; returns the loss."""
        with autocast(self.job.device, self.job.precision):
            logits = self.student(batch.images)
        loss = batch_loss(logits.float(), batch, self.job.protocol)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.student)
        return loss.detach()

    def score(self) -> Scores:
        """Scores the weights, or their average where the recipe takes one, on the real test images."""
        job = self.job
        network = self.student if self.average is None else self.average
        return score(
            network, job.test, job.num_classes, job.protocol.test_resize, device=job.device, precision=job.precision
        )


def batch_loss(logits: Tensor, batch: Batch, protocol: Protocol) -> Tensor:
    """Returns the recipe's loss of float32 logits (b, k)."""
    if protocol.labels == "hard":
        return mixed_cross_entropy(logits, batch.labels, batch.pasted_labels, batch.own)
    if protocol.labels == "stored":
        assert batch.soft_labels is not None
        loss = F.cross_entropy(logits, batch.soft_labels)
    else:
        assert batch.teacher_logits is not None
        if protocol.loss == "mse":
            loss = F.mse_loss(logits, batch.teacher_logits)
        else:
            loss = soft_loss(logits, batch.teacher_logits, protocol.temperature)
    if protocol.hard_weight:
        loss = loss + protocol.hard_weight * mixed_cross_entropy(logits, batch.labels, batch.pasted_labels, batch.own)
    return loss


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
    if own == 1.0:
        return F.cross_entropy(logits, labels)
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


def _check_finite(loss: Tensor, job: Job, epoch: int) -> None:
    if not torch.isfinite(loss):
        raise Diverged(
            f"--protocols {job.protocol.name}: the loss of student {job.network} is not finite after epoch "
            f"{epoch + 1}; --mixed_precision {job.precision} may be too coarse, try no"
        )
