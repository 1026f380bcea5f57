"""What an observer leaves of its training: itself after chosen epochs, and how sure it was of every image.

An observer's folder holds ``epochs/epoch-0005/``, an observer of its own like any other, and ``confidences.npy``. A
teacher stopped early labels better where a class has few images (Qin et al., "A Label is Worth a Thousand Images in
Dataset Distillation", NeurIPS 2024, section 4).
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddgen.checkpoint import read_json, remove_dir, remove_leftovers, write_bytes, write_json
from ddgen.config import ObserverConfig
from ddgen.data import ImageDataset
from ddgen.errors import UserError
from ddgen.observer.observer import Observer, predict_pixels

EPOCHS_NAME, CONFIDENCES_NAME, TRAINING_NAME = "epochs", "confidences.npy", "training.json"
_EPOCH_NAME = re.compile(r"^epoch-(\d{4,})$")
_BATCH_SIZE = 256


def kept_epochs(config: ObserverConfig) -> tuple[int, ...]:
    """Returns after which epochs, counted from 1, the observer is kept; the last is the observer itself.

    Raises:
        UserError: An epoch that training does not reach.
    """
    if config.observer_keep_epochs is not None:
        for epoch in config.observer_keep_epochs:
            if epoch > config.observer_epochs:
                raise UserError(
                    f"--observer_keep_epochs {epoch}: training ends after {config.observer_epochs}; leave it out, or"
                    " raise --observer_epochs"
                )
        return tuple(sorted({*config.observer_keep_epochs} - {config.observer_epochs}))
    epochs, epoch = [], 1
    while epoch < config.observer_epochs:
        epochs.append(epoch)
        epoch = -(-3 * epoch // 2)
    return tuple(epochs)


class EpochLog:
    """Writes what an observer leaves of its training while that runs, into a folder that survives a stop.

    Every epoch writes the same bytes again when it is trained again, so a training that goes on from a checkpoint
    leaves what an uninterrupted one leaves.

    Args:
        folder: Where to write.
        config: Which epochs are kept, and whether confidences are.
        num_images: Images n of the dataset.
    """

    def __init__(self, folder: Path, config: ObserverConfig, num_images: int) -> None:
        self.folder, self.kept = folder, kept_epochs(config)
        self.shape = (config.observer_epochs, num_images) if config.observer_confidences else None

    def start(self, training: dict[str, object], *, anew: bool) -> None:
        """Makes the folder; anew: what an earlier training left there goes.

        Args:
            training: Facts of the training as JSON; see `read_training`.
            anew: Whether training begins at its first step.
        """
        if anew and self.folder.is_dir():
            remove_dir(self.folder)
        (self.folder / EPOCHS_NAME).mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.folder / EPOCHS_NAME):
            remove_leftovers(folder)
        write_json(self.folder / TRAINING_NAME, training)

    def after_epoch(self, epoch: int, observer: Observer, confidences: Tensor) -> None:
        """Keeps the observer, if it is to be kept after `epoch`, and its confidences.

        Args:
            epoch: Epochs done.
            observer: As it is now.
            confidences: p(true class) of all images, float16 (n,); ignored where they are not logged.
        """
        path = epoch_dir(self.folder, epoch)
        if epoch in self.kept and not path.is_dir():
            observer.save(path)
        if self.shape is not None:
            path = self.folder / CONFIDENCES_NAME
            table = np.load(path) if path.is_file() else np.full(self.shape, np.nan, dtype=np.float16)
            table[epoch - 1] = confidences.numpy()
            buffer = io.BytesIO()
            np.save(buffer, table)
            write_bytes(path, buffer.getvalue())


def epoch_dir(observer_dir: Path, epoch: int) -> Path:
    """Returns where the observer is kept as it was after an epoch."""
    return observer_dir / EPOCHS_NAME / f"epoch-{epoch:04d}"


def list_epochs(observer_dir: Path) -> list[int]:
    """Returns the epochs after which an observer was kept, rising."""
    folder = observer_dir / EPOCHS_NAME
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in map(_EPOCH_NAME.match, names) if match)


def read_training(observer_dir: Path) -> dict[str, object]:
    """Returns what is known of an observer's training: `seed`, `observer_holdout`, `epochs`, `images` (a fingerprint).

    Raises:
        UserError: Nothing is.
    """
    path = observer_dir / TRAINING_NAME
    if not path.is_file():
        raise UserError(
            f"--teacher_epoch: {observer_dir} kept nothing of its training; train an observer with ddgen observer"
        )
    facts: dict[str, object] = read_json(path)
    return facts


def read_confidences(observer_dir: Path) -> np.ndarray:
    """Returns p(true class) of every training image after every epoch, float16 (epochs, n), memory-mapped.

    Rows follow the dataset's order; held-out images are among them.

    Raises:
        UserError: They were not logged.
    """
    path = observer_dir / CONFIDENCES_NAME
    if not path.is_file():
        raise UserError(f"{path}: not there; train the observer with --observer_confidences")
    table: np.ndarray = np.load(path, mmap_mode="r")
    return table


def true_class_probabilities(
    observer: Observer, dataset: ImageDataset, indices: Tensor, *, device: torch.device, precision: str
) -> tuple[Tensor, Tensor]:
    """Runs the observer in eval mode over real images as they are.

    Args:
        observer: Moved to `device`.
        dataset: Real images.
        indices: int64 (m,), which of them.
        device: Where to compute.
        precision: See `ddgen.precision`.

    Returns:
        p(true class) float16 (m,), and whether the true class is the most probable one, bool (m,).
    """
    probabilities, hits = [], []
    for part in indices.split(_BATCH_SIZE):
        logits = predict_pixels(
            observer, dataset.pixels[part], what="logits", batch_size=_BATCH_SIZE, device=device, precision=precision
        )
        labels = dataset.labels[part]
        probabilities.append(logits.softmax(1).gather(1, labels[:, None])[:, 0].half())
        hits.append(logits.argmax(1) == labels)
    return torch.cat(probabilities), torch.cat(hits)
