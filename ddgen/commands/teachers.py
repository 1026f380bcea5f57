"""The observers that label: those given or the run's, fully trained or as they were after an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from tqdm import tqdm

from ddgen.checkpoint import read_json, write_json
from ddgen.commands.runs import held_out_accuracy, load_on_all
from ddgen.config import DataConfig
from ddgen.data import split_holdout
from ddgen.errors import UserError
from ddgen.evaluation.teacher_epoch import NUM_STUDENTS, EpochScore, best_epoch, format_scores, score_epochs
from ddgen.observer.epochs import epoch_dir, list_epochs, read_training
from ddgen.observer.observer import Observer
from ddgen.observer.realism import check_observer
from ddgen.resume import on_main

CHOICES_NAME = "teacher_epochs.json"
CHOICE_FORMAT = 2  # raise it when the same settings would give other numbers


def load_teachers(
    sources: Sequence[str | Path],
    class_names: Sequence[str],
    teacher_epoch: int | Literal["auto"] | None,
    *,
    ipc: int,
    data: DataConfig,
    accelerator: Accelerator,
    precision: str,
) -> list[Observer]:
    """Loads the observers that label.

    Args:
        sources: ``--observer``: folders or hub ids.
        class_names: Of the images, in label order.
        teacher_epoch: ``--teacher_epoch``.
        ipc: Images per class, for which `auto` chooses.
        data: Settings of the real images, which `auto` needs.
        accelerator: Processes; every one must call this.
        precision: See `ddgen.precision`.

    Raises:
        UserError: No observer there, another class order, or an epoch after which none was kept.
    """
    folders = list(map(Path, sources))
    if teacher_epoch is not None:
        folders = [_at_epoch(folder, teacher_epoch, ipc, data, accelerator, precision) for folder in folders]
    return [Observer.load(folder, class_names).to(accelerator.device) for folder in folders]


def check_teachers(teachers: Sequence[Observer], data: DataConfig, accelerator: Accelerator, precision: str) -> None:
    """Refuses observers near chance, after measuring those whose accuracy nobody knows.

    Raises:
        UserError: One of them is near chance.
    """
    for teacher in teachers:
        if teacher.accuracy is None:
            teacher.accuracy = held_out_accuracy(teacher, data, accelerator, precision)
        check_observer(teacher, teacher.class_names)


def _at_epoch(
    folder: Path, epoch: int | str, ipc: int, data: DataConfig, accelerator: Accelerator, precision: str
) -> Path:
    """Returns the folder of an observer as it was after an epoch."""
    last = int(str(read_training(folder)["epochs"]))
    known = [*list_epochs(folder), last]
    if epoch == "auto":
        epoch = _choose(folder, known, ipc, data, accelerator, precision)
    if epoch not in known:
        raise UserError(
            f"--teacher_epoch {epoch}: {folder} was kept after epochs {' '.join(map(str, known))}; give one of these,"
            " or auto, or train another with --observer_keep_epochs"
        )
    return folder if epoch == last else epoch_dir(folder, int(epoch))


def _choose(
    folder: Path, known: list[int], ipc: int, data: DataConfig, accelerator: Accelerator, precision: str
) -> int:
    """Returns the epoch that teaches best, from the observer's folder if it has been found before."""
    if ipc < 1:
        raise UserError(
            f"--teacher_epoch auto: chooses for a number of images per class, and --ipc is {ipc}; give an epoch"
        )
    settings = {"format": CHOICE_FORMAT, "ipc": ipc, "epochs": known, "flip": data.may_flip}
    found = _read_choice(folder, settings)
    accelerator.wait_for_everyone()  # all have looked before anyone writes
    if found is None:
        dataset = load_on_all(accelerator, data, "train")
        training = read_training(folder)
        if training["images"] != dataset.fingerprint:
            raise UserError(
                f"--teacher_epoch auto: {folder} was trained on other images than these of {dataset.name}; give the"
                " settings of its data, or an epoch"
            )
        seed = int(str(training["seed"]))
        split = split_holdout(dataset, float(str(training["observer_holdout"])), seed)
        candidates = {
            epoch: partial(Observer.load, folder if epoch == known[-1] else epoch_dir(folder, epoch)) for epoch in known
        }

        def work() -> None:
            with tqdm(total=len(known) * NUM_STUDENTS, desc="Teacher epochs", unit="student") as bar:
                scores = score_epochs(
                    candidates, dataset, *split, ipc=ipc, device=accelerator.device, precision=precision, seed=seed,
                    flip=data.may_flip, on_student=bar.update,
                )  # fmt: skip
            _write_choice(folder, settings, scores)

        on_main(accelerator, work)
        accelerator.wait_for_everyone()
        found = _read_choice(folder, settings)
        assert found is not None
    accelerator.print(format_scores(found, ipc))
    return best_epoch(found)


def _read_choice(folder: Path, settings: dict[str, Any]) -> list[EpochScore] | None:
    path = folder / CHOICES_NAME
    for choice in read_json(path) if path.is_file() else []:
        if choice["settings"] == settings:
            return [EpochScore(**score) for score in choice["scores"]]
    return None


def _write_choice(folder: Path, settings: dict[str, Any], scores: list[EpochScore]) -> None:
    path = folder / CHOICES_NAME
    earlier = read_json(path) if path.is_file() else []
    choice = {"settings": settings, "epoch": best_epoch(scores), "scores": [asdict(score) for score in scores]}
    write_json(path, [*earlier, choice])
