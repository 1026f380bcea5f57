"""How fast students train: our loop against a plain one, same network and recipe; ratios of one run.

    python benchmarks/students.py

Two loops take turns (A B A B ...) at RDED's protocol: ConvNet-3, 10 classes, soft labels by a ConvNet-3 on every CutMix
batch. Their numbers are equally many images; both count teacher, student and optimizer.

- ours: `Learner` and `make_batches` as evaluate.py runs them: images in memory, augmented in batches, several batches
  in one forward of the teacher, number format and layout that suit the device, freed memory kept.
- plain: PNG files opened, cropped, mirrored and normalised one by one with PIL and torchvision by a DataLoader in the
  training process (its default), float32, default layout, the teacher once a batch, AdamW as it is built there.

Seconds are processor time on a CPU, so other work on the computer counts little. Goal: 3. Measured once, with one
thread of a CPU without AMX (float32 on both sides), which other work shared: 195 and 141 images/s, ratio 1.38 (1.25 to
2.62). Convolutions are nearly all of it there: a batch of 50 takes 20 GFLOP, so no loop in float32 reaches 3; what is
left to gain is the number format, which needs a CPU with AMX.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ddgen.data import ImageDataset
from ddgen.evaluation.batches import TrainingImages
from ddgen.evaluation.protocols import RDED
from ddgen.evaluation.students import IMAGENET_LOOK, Job, Learner, make_batches
from ddgen.hardware import device_name, number_format, peak_memory
from ddgen.memory import keep_freed_memory
from ddgen.observer.networks import build_network
from ddgen.observer.observer import Observer
from ddgen.precision import resolve_precision

NUM_CLASSES = 10
NAMES = tuple(str(label) for label in range(NUM_CLASSES))


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    rounds: int = 5
    """Counted turns of either loop; one before them is not counted."""
    epochs: int = 6
    """Epochs of a turn."""
    ipc: int = 10
    """Images per class."""
    image_size: int = 32
    """Side of the images."""
    network: str = "convnet3"
    """Student and teacher."""


def main(argv: list[str] | None = None) -> int:
    """Measures both loops and prints their ratio."""
    settings = tyro.cli(Settings, args=argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(None, device)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, {number_format(device, precision)}")
    with tempfile.TemporaryDirectory() as folder:
        job = _job(settings, device, precision)
        loops = {"ours": _ours(job, settings.epochs), "plain": _plain(job, settings.epochs, Path(folder))}
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for number in range(settings.rounds + 1):
            for name, turn in loops.items():
                keep_freed_memory(name == "ours" and device.type == "cpu")
                spent = _timed(turn, device)
                if number:
                    seconds[name].append(spent)
    images = settings.epochs * len(job.images)
    for name, times in seconds.items():
        print(f"  {name:<6}{images / statistics.median(times):>9.1f} images/s")
    ratios = [plain / ours for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True)]
    print(f"  ours / plain {statistics.median(ratios):.2f}   (goal 3; {min(ratios):.2f} to {max(ratios):.2f})")
    print(f"peak memory: {peak_memory(device)}")
    return 0


def _timed(turn: Callable[[], None], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    turn()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def _job(settings: Settings, device: torch.device, precision: str) -> Job:
    generator = torch.Generator().manual_seed(0)
    size = settings.image_size
    labels = torch.arange(NUM_CLASSES).repeat_interleave(settings.ipc)
    pixels = torch.randint(0, 256, (len(labels), 3, size, size), dtype=torch.uint8, generator=generator)
    test = ImageDataset(pixels, labels, NAMES, "random", "test", "random")
    network = build_network(settings.network, NUM_CLASSES, size)
    teacher = Observer(
        network, network=settings.network, class_names=NAMES, input_size=size, mean=IMAGENET_LOOK.mean,
        std=IMAGENET_LOOK.std,
    ).eval()  # fmt: skip
    return Job(
        settings.network, RDED, TrainingImages(pixels, labels), NUM_CLASSES, settings.ipc, test, (teacher,), device,
        precision, seed=0, epochs=10**6,
    )  # fmt: skip


def _ours(job: Job, epochs: int) -> Callable[[], None]:
    """Returns a turn of our loop."""
    learner, batches = Learner(job), make_batches(job)
    steps = epochs * -(-len(job.images) // job.batch_size)

    def turn() -> None:
        learner.begin_epoch(0)
        for _ in range(steps):
            loss = learner.step(next(batches))
        assert torch.isfinite(loss)

    return turn


class _Files(Dataset[tuple[Tensor, int]]):
    """PNG files, opened and augmented one by one as RDED's training does."""

    def __init__(self, images: TrainingImages, folder: Path) -> None:
        self.labels = images.labels.tolist()
        self.paths = [folder / f"{index:05d}.png" for index in range(len(images))]
        for path, image in zip(self.paths, images.pixels, strict=True):
            Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(path)
        self.augment = transforms.Compose(
            [
                transforms.RandomResizedCrop(images.pixels.shape[-1], scale=(1.0, 1.0), antialias=True),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_LOOK.mean, IMAGENET_LOOK.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            pixels: Tensor = self.augment(image.convert("RGB"))
        return pixels, self.labels[index]


def _plain(job: Job, epochs: int, folder: Path) -> Callable[[], None]:
    """Returns a turn of the plain loop."""
    size = job.test.image_size
    student = build_network(job.network, NUM_CLASSES, size).to(job.device).train()
    teacher = copy.deepcopy(job.teachers[0].classifier).to(job.device, memory_format=torch.contiguous_format).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.01)
    loader = DataLoader(_Files(job.images, folder), batch_size=job.batch_size, shuffle=True)

    def step(images: Tensor) -> None:
        images = _cutmix(images.to(job.device))
        with torch.no_grad():
            wanted = F.softmax(teacher(images) / job.protocol.temperature, dim=1)
        given = F.log_softmax(student(images) / job.protocol.temperature, dim=1)
        loss = F.kl_div(given, wanted, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert np.isfinite(loss.item())

    def turn() -> None:
        for _ in range(epochs):
            for images, _labels in loader:
                step(images)

    return turn


def _cutmix(images: Tensor) -> Tensor:
    size = images.shape[-1]
    side = int(size * np.sqrt(1 - np.random.beta(1.0, 1.0)))
    row, column = np.random.randint(size, size=2)
    top, bottom = np.clip([row - side // 2, row + side // 2], 0, size)
    left, right = np.clip([column - side // 2, column + side // 2], 0, size)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[torch.randperm(len(images)), :, top:bottom, left:right]
    return mixed


if __name__ == "__main__":
    sys.exit(main())
