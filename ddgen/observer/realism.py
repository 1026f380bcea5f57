"""Realism: how readily the observer sees the class an image was made for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from ddgen.data import ImageDataset
from ddgen.data.classes import check_class_order
from ddgen.errors import UserError
from ddgen.observer.observer import Observer, predict_both, predict_pixels, to_images01
from ddgen.seeds import numpy_generator


@dataclass(frozen=True)
class RealismScores:
    """What the observer says of n images.

    Attributes:
        loss: float32 (n,), cross-entropy of the true class; lower is more realistic.
        predicted: int64 (n,), the class it names.
        logits: float32 (n, k).
        features: Penultimate features, float32 (n, d), where they were asked for.
    """

    loss: Tensor
    predicted: Tensor
    logits: Tensor
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.loss)

    def rows(self, index: Tensor) -> RealismScores:
        """Returns what is said of some of the images, int64 (m,) positions or bool (n,)."""
        features = None if self.features is None else self.features[index]
        return RealismScores(self.loss[index], self.predicted[index], self.logits[index], features)


def realism_scores(
    observer: Observer, pixels: Tensor, labels: Tensor, *, batch_size: int, device: torch.device, precision: str
) -> RealismScores:
    """Scores images by RDED's realism (Sun et al., CVPR 2024, section 3.3): ``-log softmax(logits)[y]``.

    The features of the same pass are kept too: selection rules and reports compare them.

    Args:
        observer: Moved to `device`.
        pixels: uint8 (n, 3, h, w), n at least 1.
        labels: int64 (n,), the classes the images were made for.
        batch_size: Images per forward pass.
        device: Where to compute.
        precision: See `ddgen.precision`.

    Raises:
        UserError: Logits that are not finite.
    """
    parts = [
        predict_both(observer, to_images01(part, device), device=device, precision=precision)
        for part in pixels.split(batch_size)
    ]
    logits, features = (torch.cat([part[i] for part in parts]) for i in range(2))
    return scores_of(logits, labels.cpu(), precision, features)


def scores_of(logits: Tensor, labels: Tensor, precision: str, features: Tensor | None = None) -> RealismScores:
    """Turns logits into scores.

    Args:
        logits: float32 (n, k).
        labels: int64 (n,).
        precision: What they were computed in, for the error.
        features: float32 (n, d), to keep with them.

    Raises:
        UserError: Logits that are not finite.
    """
    if not bool(logits.isfinite().all()):
        raise UserError(f"--mixed_precision {precision}: the observer's logits are not finite; use bf16 or no")
    # log_softmax in float32, not log(softmax): the latter is infinite where the probability underflows.
    loss = -logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
    return RealismScores(loss, logits.argmax(dim=1), logits, features)


REAL_IMAGES = 300  # of a class: as many as RDED takes


def real_class_scores(
    observer: Observer, dataset: ImageDataset, label: int, seed: int, *, device: torch.device, precision: str
) -> RealismScores:
    """Scores real images of one class, at most `REAL_IMAGES` of them drawn at random, with features.

    Selection rules and reports compare candidates with them. They are training images, which an observer trained on
    them finds easier than new ones.

    Args:
        observer: Moved to `device`.
        dataset: Real images with the observer's classes, of which the class's drawn images alone are read.
        label: Which class; it must have an image.
        seed: Of the draw.
        device: Where to compute.
        precision: See `ddgen.precision`.
    """
    members = (dataset.labels == label).nonzero().flatten()
    order = numpy_generator(seed, "real class", label).permutation(len(members))[:REAL_IMAGES]
    drawn = members[torch.from_numpy(np.sort(order))]
    return realism_scores(
        observer, dataset.pixels[drawn], dataset.labels[drawn], batch_size=256, device=device, precision=precision
    )


def measure_accuracy(
    observer: Observer,
    dataset: ImageDataset,
    *,
    indices: Tensor | None = None,
    batch_size: int = 256,
    device: torch.device,
    precision: str,
) -> float:
    """Returns the top-1 fraction on real images.

    Args:
        observer: Moved to `device`.
        dataset: Real images with the observer's classes.
        indices: int64 (m,), which images; all when None.
        batch_size: Images per forward pass.
        device: Where to compute.
        precision: See `ddgen.precision`.
    """
    chosen = torch.arange(len(dataset)) if indices is None else indices
    hits = 0
    for part in chosen.split(batch_size):
        logits = predict_pixels(
            observer, dataset.pixels[part], what="logits", batch_size=batch_size, device=device, precision=precision
        )
        hits += int((logits.argmax(dim=1) == dataset.labels[part]).sum())
    return hits / max(1, len(chosen))


def check_observer(observer: Observer, dataset_classes: Sequence[str], *, min_ratio: float = 2.0) -> None:
    """Refuses an observer that knows other classes, or that is hardly better than guessing on real images.

    Args:
        observer: Its `accuracy` must have been measured (`measure_accuracy`).
        dataset_classes: Class names of the images to be scored, in label order.
        min_ratio: Accuracy in multiples of chance that is asked for.

    Raises:
        UserError: Another class order, or accuracy near chance.
    """
    check_class_order(
        dataset_classes, observer.class_names, expected_name="the dataset", found_name=f"--observer {observer.network}"
    )
    if observer.accuracy is None:
        raise ValueError("check_observer: observer.accuracy is None; measure_accuracy first")
    chance = 1 / len(observer.class_names)
    if observer.accuracy < _bar(chance, min_ratio):
        raise UserError(
            f"--observer {observer.network}: accuracy {observer.accuracy:.1%} on real held-out images, chance is "
            f"{chance:.1%}; most likely its class order differs from the dataset's, or it needs more --observer_epochs"
        )


def candidate_problem(predicted: Tensor, labels: Tensor, class_names: Sequence[str]) -> str | None:
    """Tells whether the observer recognises generated images no better than by guessing.

    It must do so above the bar of `check_observer`, and so often that guessing would do as well in less than one of a
    hundred cases (binomial), which asks for more when there are few images.

    Args:
        predicted: int64 (n,), the classes that the observer names.
        labels: int64 (n,), the classes that the images were made for.
        class_names: In label order.

    Returns:
        What is wrong, with the most frequent confusions; None if nothing is.
    """
    hits, count, chance = int((predicted == labels).sum()), len(labels), 1 / len(class_names)
    if hits >= _bar(chance) * count and binom.sf(hits - 1, count, chance) < 0.01:
        return None
    made = Counter(labels.tolist())
    pairs = zip(labels.tolist(), predicted.tolist(), strict=True)
    confused = Counter((label, seen) for label, seen in pairs if label != seen).most_common(3)
    examples = ", ".join(
        f"{class_names[label]!r} seen as {class_names[seen]!r} ({n} of {made[label]})" for (label, seen), n in confused
    )
    return (
        f"the observer names the class of {hits} of the first {count} images ({hits / count:.1%}; chance is"
        f" {chance:.1%}), with {examples}"
    )


def _bar(chance: float, min_ratio: float = 2.0) -> float:
    """Accuracy above which a classifier does more than guess.

    A multiple of chance, but never more than a quarter of the way from chance to perfect, so that two or three classes
    have one that can be passed.
    """
    return min(min_ratio * chance, chance + (1 - chance) / 4)
