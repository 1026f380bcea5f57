"""What students train on: the distilled images, the baselines, and all real images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ddgen.checkpoint import read_json, write_bytes, write_json
from ddgen.config import DistillConfig
from ddgen.data import ImageDataset
from ddgen.distill.dataset import DistilledDataset, encode_png
from ddgen.distill.foreign_dataset import ForeignDataset
from ddgen.distill.views import StoredViews
from ddgen.evaluation.baselines import BY_FEATURES, by_features, random_real, rded_real
from ddgen.evaluation.batches import TrainingImages
from ddgen.evaluation.cells import Setting, Teacher, digest
from ddgen.evaluation.protocols import Protocol
from ddgen.evaluation.rows import FULL_REAL
from ddgen.observer.observer import Observer, predict_pixels
from ddgen.seeds import derive

FULL_EPOCHS = 30  # of students on all real images; the protocols' own are made for a few images a class
CHOICE_FORMAT = 2  # of the baselines that choose: raise it when the same settings would choose others
_MEASURED_IMAGES = 1000


@dataclass(frozen=True)
class Source:
    """Images for the students of one row.

    Attributes:
        name: One of `IMAGE_SOURCES`.
        draw: repeat -> images.
        ipc: Images per class, the most where classes differ.
        content: What stands for the images in a cell's key; None digests them.
        repeats: At most so many students.
        epochs: At most so many epochs.
    """

    name: str
    draw: Callable[[int], TrainingImages]
    ipc: int
    content: str | None = None
    repeats: int | None = None
    epochs: int | None = None


def distilled_source(rounds: Sequence[DistilledDataset | ForeignDataset], views: Sequence[StoredViews]) -> Source:
    """Returns the images to judge; where a generator ran several rounds, repeat r takes the r-th.

    Args:
        rounds: The datasets.
        views: The stored views of each, or none.
    """

    def draw(repeat: int) -> TrainingImages:
        which = repeat % len(rounds)
        found = rounds[which]
        own_views = views[which] if views else None
        return TrainingImages(found.pixels, found.labels, found.soft_labels, found.factor, own_views)

    return Source("distilled", draw, rounds[0].ipc)


def baseline_sources(
    names: Sequence[str],
    distilled: DistilledDataset | ForeignDataset,
    random_generated: tuple[Tensor, Tensor] | None,
    train: ImageDataset,
    observer: Observer | None,
    *,
    seed: int,
    device: torch.device,
    precision: str,
    cache_dir: Path,
    progress: bool,
) -> list[Source]:
    """Returns the baselines, each with as many images of every class as the distilled dataset.

    Args:
        names: Of baselines, as in `EvaluateConfig.baselines`.
        distilled: The dataset to judge.
        random_generated: Generated images that nobody selected, or None where there are none.
        train: Real training images.
        observer: In whose features herding and k-center work, and by which RDED ranks crops.
        seed: Of random draws.
        device: Where features are computed.
        precision: Autocast precision.
        cache_dir: Where it is kept what the observer chose.
        progress: Show a bar while RDED ranks crops.

    Raises:
        UserError: A class of the real images is too small.
    """
    counts = torch.bincount(distilled.labels, minlength=len(distilled.class_names)).tolist()
    ipc, found = distilled.ipc, []
    if "random-generated" in names and random_generated is not None:
        generated = TrainingImages(*random_generated)
        found.append(Source("random generated", lambda repeat: generated, ipc))
    if "random-real" in names:

        def draw(repeat: int) -> TrainingImages:
            return TrainingImages(*random_real(train, counts, derive(seed, "repeat", repeat)))

        draw(0)  # a class that is too small is found now
        found.append(Source("random real", draw, ipc))
    for name in BY_FEATURES:
        if name in names:
            assert observer is not None
            chosen = _chosen(name, train, counts, observer, device, precision, cache_dir)
            images = TrainingImages(train.pixels[chosen].clone(), train.labels[chosen].clone())
            found.append(Source(name, lambda repeat, images=images: images, ipc))  # type: ignore[misc]
    if "rded-real" in names:
        assert observer is not None
        drawn = _DrawnRded(train, counts, distilled.factor, observer, seed, device, precision, cache_dir, progress)
        found.append(Source("rded real", drawn, ipc))
    return found


def full_source(train: ImageDataset) -> Source:
    """Returns all real training images; one student, and few epochs, which the report states."""
    images = TrainingImages(train.pixels, train.labels)
    ipc = max(1, len(train) // train.num_classes)
    return Source(FULL_REAL, lambda repeat: images, ipc, train.fingerprint, repeats=1, epochs=FULL_EPOCHS)


def labelled(images: TrainingImages, recipe: Protocol, teachers: Sequence[Teacher], setting: Setting) -> TrainingImages:
    """Gives images the labels that the recipe stores, and no others.

    Images without stored soft labels get the first observer's probabilities, as sample.py gives them to the kept ones
    at temperature 1.
    """
    images = replace(
        images,
        soft_labels=images.soft_labels if recipe.labels == "stored" else None,
        views=images.views if recipe.labels == "views" else None,
    )
    if recipe.labels != "stored" or images.soft_labels is not None:
        return images
    logits = predict_pixels(
        teachers[0].observer, images.pixels, what="logits", batch_size=256, device=setting.device,
        precision=setting.precision,
    )  # fmt: skip
    return replace(images, soft_labels=torch.softmax(logits.double(), dim=1).half())


def num_epochs(source: Source, recipe: Protocol, network: str, setting: Setting) -> int:
    """Returns for how many epochs a network trains on a source."""
    epochs = setting.epochs or recipe.epochs(source.ipc, dataset=setting.test.name, network=network)
    return min(epochs, source.epochs or epochs)


def png_bytes(pixels: Tensor) -> int:
    """Returns what images uint8 (n, 3, h, w) take as PNG files, one each, written as the distilled folder's are.

    Of more than a thousand, a thousand evenly spread ones are measured.
    """
    step = max(1, len(pixels) // _MEASURED_IMAGES)
    measured = pixels[::step]
    return round(sum(len(encode_png(image)) for image in measured) * len(pixels) / len(measured))


@dataclass(frozen=True)
class _DrawnRded:
    """RDED on real images, drawn anew for every student: repeat -> images.

    Ranking 1,500 crops of every class costs a part of what a student costs, so each repeat is a distillation of its
    own, as each of random real is a draw of its own. The pixels are kept: grids of crops are no images that could be
    looked up, and all recipes and students take the same ones.
    """

    train: ImageDataset
    counts: list[int]
    factor: int
    observer: Observer
    seed: int
    device: torch.device
    precision: str
    cache_dir: Path
    progress: bool

    def __call__(self, repeat: int) -> TrainingImages:
        train, observer, seed = self.train, self.observer, derive(self.seed, "repeat", repeat)
        key = [CHOICE_FORMAT, "rded-real", train.fingerprint, observer.fingerprint, self.counts, self.factor, seed,
               DistillConfig.mipc, DistillConfig.num_crop, self.precision, self.device.type]  # fmt: skip
        path = self.cache_dir / f"rded-real-{digest(json.dumps(key).encode())}.safetensors"
        if not path.is_file():
            pixels, labels = rded_real(
                train, self.counts, self.factor, observer, seed, device=self.device, precision=self.precision,
                progress=self.progress,
            )  # fmt: skip
            write_bytes(path, save({"pixels": pixels, "labels": labels}))
        kept = load_file(path)
        return TrainingImages(kept["pixels"], kept["labels"], factor=self.factor)


def _chosen(
    name: str,
    train: ImageDataset,
    counts: list[int],
    observer: Observer,
    device: torch.device,
    precision: str,
    cache_dir: Path,
) -> Tensor:
    key = [CHOICE_FORMAT, name, train.fingerprint, observer.fingerprint, counts, precision, device.type]
    path = cache_dir / f"{name}-{digest(json.dumps(key).encode())}.json"
    if not path.is_file():
        chosen = by_features(train, counts, name, observer, device=device, precision=precision)
        write_json(path, {"key": key, "chosen": chosen.tolist()})
    return torch.tensor(read_json(path)["chosen"], dtype=torch.int64)
