"""Labels: ensembles, stored views, observers of earlier epochs, and the choice among them."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_commands import ROOT, SMALL, complaint

import evaluate
import sample
import train_ldm
from ddgen import cli
from ddgen.config import ObserverConfig
from ddgen.data import ImageDataset, split_holdout
from ddgen.distill.dataset import DistilledDataset, read_manifest
from ddgen.distill.relabel import ensemble_logits, relabel, soft_labels
from ddgen.distill.view_labels import bytes_needed, make_views
from ddgen.distill.views import VIEWS_PATH, StoredViews, compress
from ddgen.errors import Stopped, UserError
from ddgen.evaluation import teacher_epoch
from ddgen.evaluation.batches import TrainingImages, view_augmenter
from ddgen.evaluation.evaluate import evaluate as evaluate_students
from ddgen.evaluation.protocols import ECCV2024_TRACK1, HARD, RDED, STORED, Protocol
from ddgen.evaluation.request import Request
from ddgen.evaluation.students import IMAGENET_LOOK, Job, train_student
from ddgen.evaluation.teacher_epoch import EpochScore, best_epoch, format_scores, score_epochs, student_network
from ddgen.observer.epochs import epoch_dir, kept_epochs, list_epochs, read_confidences, read_training
from ddgen.observer.networks import build_network
from ddgen.observer.observer import Observer
from ddgen.observer.realism import measure_accuracy
from ddgen.observer.training import train_observer
from ddgen.resume import Keeper

CPU = torch.device("cpu")
SIZE, CLASSES = 8, ("red", "green", "blue")


def colours(per_class: int, split: str = "train") -> ImageDataset:
    """An easy dataset: the class is the brightest channel."""
    generator = torch.Generator().manual_seed(per_class + len(split))
    labels = torch.arange(3).repeat_interleave(per_class)
    pixels = torch.randint(0, 150, (len(labels), 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(len(labels)), labels] += 80
    return ImageDataset(pixels, labels, CLASSES, "colours", split, f"colours-{per_class}-{split}")


def observer_of(weight: float, accuracy: float = 0.9) -> Observer:
    """Its logits are `weight` times the mean of each channel: right on `colours` where that is positive."""
    network = build_network("convnet1", 3, SIZE, width=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.body[1].weight.fill_(1.0)
        for channel in range(3):
            network.body[0].weight[channel, channel, 1, 1] = 1.0
            network.head.weight[channel].view(3, -1)[channel] = weight / (SIZE // 2) ** 2
    return Observer(
        network, network="convnet1", class_names=CLASSES, input_size=SIZE, mean=(0, 0, 0), std=(1, 1, 1),
        accuracy=accuracy,
    ).eval()  # fmt: skip


LOOK, MIRRORLESS = IMAGENET_LOOK, replace(IMAGENET_LOOK, flip=False)
AUGMENT = view_augmenter(HARD, LOOK, 1)  # crops, mirrors, jitters, lights and mixes


def views_of(dataset: ImageDataset, **changes: Any) -> StoredViews:
    settings: dict[str, Any] = {
        "augmentation": HARD.augmentation(1, True), "epochs": range(4), "batch_size": 5, "temperature": 4.0, "seed": 3,
        "device": CPU, "precision": "no", "progress": False,
    }  # fmt: skip
    teachers = changes.pop("teachers", [observer_of(20.0)])
    return make_views(dataset.pixels, changes.pop("augment", AUGMENT), teachers, **{**settings, **changes})


def whole_stream(views: StoredViews, dataset: ImageDataset, batch_size: int, epochs: int) -> tuple[torch.Tensor, ...]:
    batches = list(views.stream(dataset.pixels, AUGMENT, epochs=epochs, batch_size=batch_size, seed=1))
    assert all(len(images) == len(logits) <= batch_size for images, logits in batches)
    images, logits = (torch.cat(part) for part in zip(*batches, strict=True))
    return images, logits


# --- one label an image


def test_an_ensemble_labels_with_the_mean_probability() -> None:
    first, second = torch.tensor([[2.0, 0.0, -4.0]]), torch.tensor([[0.0, 6.0, 1.0]])
    for temperature in (1.0, 20.0):
        mean = ((first / temperature).softmax(1) + (second / temperature).softmax(1)) / 2
        together = ensemble_logits([first, second], temperature)
        torch.testing.assert_close((together / temperature).softmax(1), mean)
        torch.testing.assert_close(soft_labels(together, temperature), mean.half(), rtol=0, atol=1e-3)
    assert ensemble_logits([first], 3.0) is first
    far = ensemble_logits([torch.tensor([[300.0, -300.0]]), torch.tensor([[-300.0, 300.0]])], 1.0)
    torch.testing.assert_close(far.softmax(1), torch.tensor([[0.5, 0.5]]))


def test_images_are_relabelled_by_all_observers() -> None:
    dataset, teachers = colours(4), [observer_of(20.0), observer_of(-3.0)]
    labels = relabel(teachers, dataset.pixels, temperature=2.0, batch_size=5, device=CPU, precision="no")
    brightness = (dataset.pixels / 255).relu().mean((2, 3)) / math.sqrt(1 + 1e-5)  # batch norm's epsilon
    mean = ((20 * brightness / 2).softmax(1) + (-3 * brightness / 2).softmax(1)) / 2
    torch.testing.assert_close(labels, mean.half(), rtol=0, atol=2e-3)


# --- stored views


def test_the_largest_logits_stay_and_the_probability_of_the_rest_is_spread_evenly() -> None:
    logits = torch.tensor([[1.0, 4.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0]])
    values, indices, rest = compress(logits, 2, temperature=2.0)
    assert values.tolist() == [[4.0, 1.0], [3.0, 0.0]] and indices[:, 0].tolist() == [1, 2]
    assert (values.dtype, indices.dtype, rest.dtype) == (torch.float16, torch.uint8, torch.float16)
    by_hand = [2 * math.log((math.exp(0) + math.exp(-1 / 2)) / 2), 0.0]
    assert rest.tolist() == pytest.approx(by_hand, abs=1e-3)
    dataset = colours(4)
    whole = views_of(dataset)
    top = whole.keep_top(1)
    for position in range(4):
        before = (whole.logits(position, slice(None)) / 4).softmax(1)
        after = (top.logits(position, slice(None)) / 4).softmax(1)
        torch.testing.assert_close(after.max(1), before.max(1), rtol=0, atol=1e-3)
        low, middle = after.sort(1).values[:, :2].unbind(1)
        assert torch.equal(low, middle)  # evenly
    assert top.values.shape == (4, 12, 1)
    made = views_of(dataset, top_k=1)
    assert torch.equal(made.values, top.values) and torch.equal(made.indices, top.indices)
    with pytest.raises(UserError, match="--top_k 3: the views have 3 logits each; give fewer"):
        whole.keep_top(3)
    assert compress(torch.zeros(1, 300), 2, 1.0)[1].dtype == torch.int16


def test_a_student_sees_exactly_what_was_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, teacher = colours(4), observer_of(20.0)
    seen: list[torch.Tensor] = []
    outputs = Observer.outputs
    monkeypatch.setattr(Observer, "outputs", lambda self, x: seen.append(x.clone()) or outputs(self, x))
    views = views_of(dataset, teachers=[teacher], epochs=range(2), label_batch_size=7)
    labelled = torch.cat(seen)  # two epochs of 12 views, in batches of 5, labelled 10 and 2 at once
    assert [len(part) for part in seen] == [10, 2, 10, 2]
    with torch.no_grad():
        logits = torch.cat([outputs(teacher, part)[0] for part in seen])
    assert torch.equal(views.values.flatten(0, 1), logits.half())
    assert len(labelled.flatten(1).unique(dim=0)) == 24
    rows = {image.numpy().tobytes(): logit.half() for image, logit in zip(labelled, logits, strict=True)}
    images, stored = whole_stream(views, dataset, batch_size=5, epochs=8)
    for image, logit in zip(images, stored, strict=True):
        assert torch.equal(rows[image.numpy().tobytes()], logit.half())
    even = images.view(4, 2, 12, -1)[:, 0]  # every other epoch is the first stored one again, its batches shuffled
    assert all(torch.equal(epoch.unique(dim=0), even[0].unique(dim=0)) for epoch in even)
    assert any(not torch.equal(epoch, even[0]) for epoch in even)


REPLAY = """
import sys, torch
from pathlib import Path
from ddgen.distill.views import StoredViews
from ddgen.evaluation.batches import view_augmenter
from ddgen.evaluation.protocols import HARD
from ddgen.evaluation.students import IMAGENET_LOOK

torch.set_num_threads(1)
folder = Path(sys.argv[1])
pixels, augment = torch.load(folder / "pixels.pt"), view_augmenter(HARD, IMAGENET_LOOK, 1)
batches = StoredViews.load(folder).stream(pixels, augment, epochs=3, batch_size=7, seed=1)
torch.save([torch.cat(part) for part in zip(*batches)], folder / "replayed.pt")
"""


def test_views_come_back_bit_for_bit_in_another_process_and_another_batch_size(tmp_path: Path) -> None:
    dataset = colours(4)
    views = views_of(dataset)
    path = views.save(tmp_path)
    assert path == tmp_path / VIEWS_PATH
    loaded = StoredViews.load(tmp_path)
    assert loaded.header == views.header and loaded.digest == views.digest
    assert torch.equal(loaded.values, views.values) and loaded.values.dtype == torch.float16
    torch.save(dataset.pixels, tmp_path / "pixels.pt")
    done = subprocess.run(
        [sys.executable, "-c", REPLAY, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    here, there = whole_stream(views, dataset, 5, 3), torch.load(tmp_path / "replayed.pt")
    assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])
    assert torch.equal(views_of(dataset, label_batch_size=1).seeds, views.seeds)


def test_every_second_epoch_can_be_dropped_and_the_bytes_are_counted(tmp_path: Path) -> None:
    dataset = colours(4)
    views = views_of(dataset)
    half = views.keep_every(2)
    assert half.header.epochs == (0, 2)
    assert views_of(dataset, epochs=(0, 2)).digest == half.digest  # a view depends on its epoch's number alone
    assert torch.equal(half.batch(dataset.pixels, AUGMENT, 1, 0)[0], views.batch(dataset.pixels, AUGMENT, 2, 0)[0])
    assert half.keep_every(2).header.epochs == (0,)
    seeds, sketch = 4 * (1 + 3) * 8, 5 * 4
    assert views.num_bytes == 4 * 12 * 3 * 2 + seeds + sketch == bytes_needed(12, 3, 4, None) + seeds + sketch
    assert views.keep_top(2).num_bytes == bytes_needed(12, 3, 4, 2) + seeds + sketch
    assert bytes_needed(12, 3, 4, 2) == 4 * 12 * (2 * (2 + 1) + 2)
    assert 0 <= views.save(tmp_path).stat().st_size - views.num_bytes < 2000


def test_views_of_other_images_or_another_augmentation_are_refused(tmp_path: Path) -> None:
    dataset = colours(4)
    views = views_of(dataset)
    with pytest.raises(UserError, match="the images are not those that were labelled"):
        next(views.stream(colours(4, "test").pixels, AUGMENT, epochs=1, batch_size=5, seed=0))
    for other in (view_augmenter(HARD, MIRRORLESS, 1), view_augmenter(RDED, LOOK, 1)):
        with pytest.raises(UserError, match="the views do not come back as they were labelled"):
            next(views.stream(dataset.pixels, other, epochs=1, batch_size=5, seed=0))
    with pytest.raises(UserError, match="no stored views; make them with ddgen label"):
        StoredViews.load(tmp_path)
    path = views.save(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="is damaged"):
        StoredViews.load(tmp_path)


def student(stored: StoredViews | None, **changes: Any) -> float:
    dataset = colours(4)
    settings: dict[str, Any] = {
        "images": TrainingImages(dataset.pixels, dataset.labels, views=stored), "num_classes": 3, "ipc": 4,
        "test": colours(30, "test"), "teachers": (), "device": CPU, "precision": "no", "seed": 0, "epochs": 12,
    }  # fmt: skip
    return train_student(Job(network="convnet1", protocol=STORED, **{**settings, **changes})).accuracy_last


def test_a_student_learns_from_stored_views_without_a_teacher() -> None:
    augment, facts = view_augmenter(STORED, LOOK, 1), STORED.augmentation(1, True)
    views = views_of(colours(4), augment=augment, augmentation=facts, epochs=range(6))
    assert student(views) > 0.9
    wrong = views_of(colours(4), augment=augment, augmentation=facts, epochs=range(6), teachers=[observer_of(-20.0)])
    assert student(wrong) < 0.2  # what the labels say is what is learned
    with pytest.raises(UserError, match="--protocols stored: no stored views"):
        student(None)
    with pytest.raises(UserError, match="the stored views were made with flip True, not False"):
        student(views, look=MIRRORLESS)
    assert replace(RDED, name=STORED.name, title=STORED.title, source=STORED.source, labels=STORED.labels) == STORED
    for network in ("convnet3", "resnet18"):
        sizes = [p.batch_size(10, 100, dataset="cifar100", network=network) for p in (RDED, STORED)]
        assert sizes[0] == sizes[1]


def test_each_round_is_judged_by_its_own_views_and_baselines_by_none(tmp_path: Path) -> None:
    facts = STORED.augmentation(2, True)
    augment = view_augmenter(STORED, LOOK, 2)
    rounds, views = [], []
    for name in ("train", "another"):
        dataset = colours(4, name)
        rounds.append(DistilledDataset(
            pixels=dataset.pixels, labels=dataset.labels, soft_labels=torch.ones(12, 3).half() / 3,
            realism=torch.zeros(12), seeds=torch.zeros(12, dtype=torch.int64), indices=torch.arange(12),
            class_names=CLASSES, provenance={"factor": 2},
        ))  # fmt: skip
        views.append(views_of(dataset, augment=augment, augmentation=facts))
    request = Request(
        rounds=rounds, train=colours(10), test=colours(30, "test"), observers=(), students=("convnet1",),
        protocols=("stored", "hard"), baselines=("random-real",), repeats=2, epochs=1, seed=0, device=CPU,
        precision="no", output_dir=tmp_path, views=views, progress=False,
    )  # fmt: skip
    rows = evaluate_students(request).rows
    assert [(row.images, row.protocol) for row in rows] == [
        ("distilled", "stored"), ("distilled", "hard"), ("random real", "hard"),
    ]  # fmt: skip
    assert rows[0].label_bytes == views[0].num_bytes and rows[1].label_bytes == 12
    keys = [json.loads(path.read_text())["key"] for path in (tmp_path / "cells").iterdir()]
    assert {key["views"] for key in keys if "views" in key} == {found.digest for found in views}
    with pytest.raises(UserError, match="the stored views were made with flip True, not False"):
        evaluate_students(replace(request, flip=False, output_dir=tmp_path / "b"))
    with pytest.raises(UserError, match="the images are not those that were labelled"):
        evaluate_students(replace(request, views=views[::-1], output_dir=tmp_path / "c"))
    with pytest.raises(UserError, match="--protocols stored: no stored views; make them with ddgen label"):
        evaluate_students(replace(request, views=()))


def test_an_augmentation_is_told_by_all_that_decides_it() -> None:
    def told(protocol: Protocol, flip: bool = True) -> dict[str, Any]:
        return protocol.augmentation(1, flip)

    assert told(ECCV2024_TRACK1)["dsa"] == ["color", "crop", "cutout", "flip", "scale", "rotate"]
    assert told(ECCV2024_TRACK1, flip=False)["dsa"] == ["color", "crop", "cutout", "scale", "rotate"]
    assert told(HARD)["flip"] is True and told(replace(HARD, flip=False)) == told(HARD, flip=False)


# --- observers of earlier epochs


@pytest.mark.parametrize(
    ("epochs", "given", "expected"),
    [
        (30, None, (1, 2, 3, 5, 8, 12, 18, 27)),
        (27, None, (1, 2, 3, 5, 8, 12, 18)),
        (1, None, ()),
        (9, (4, 9, 2), (2, 4)),
        (9, (), ()),
    ],
)
def test_epochs_that_are_kept(epochs: int, given: tuple[int, ...] | None, expected: tuple[int, ...]) -> None:
    assert kept_epochs(ObserverConfig(observer_epochs=epochs, observer_keep_epochs=given)) == expected
    with pytest.raises(UserError, match=rf"--observer_keep_epochs {epochs + 1}: training ends after {epochs}"):
        kept_epochs(ObserverConfig(observer_epochs=epochs, observer_keep_epochs=(epochs + 1,)))


def train(path: Path, **changes: Any) -> Observer:
    config = ObserverConfig(observer_network="convnet1", observer_epochs=4, observer_batch_size=16)
    return train_observer(
        replace(config, **changes), colours(40), output_dir=path, device=CPU, precision="no", seed=0, progress=False
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "observer"
    train(path)
    return path


def test_confidences_are_those_of_a_direct_evaluation(trained: Path) -> None:
    dataset = colours(40)
    table = read_confidences(trained)
    assert table.shape == (4, 120) and table.dtype == np.float16
    assert list_epochs(trained) == [1, 2, 3]
    held_out = split_holdout(dataset, 0.1, 0)[1]
    lines = [json.loads(line) for line in (trained.parent / "observer_metrics.jsonl").read_text().splitlines()]
    for epoch in (1, 2, 3, 4):
        observer = Observer.load(trained if epoch == 4 else epoch_dir(trained, epoch), CLASSES)
        with torch.no_grad():
            direct = observer(dataset.pixels / 255).softmax(1)[torch.arange(120), dataset.labels]
        torch.testing.assert_close(torch.from_numpy(table[epoch - 1].copy()), direct.half(), rtol=0, atol=1e-3)
        accuracy = measure_accuracy(observer, dataset, indices=held_out, device=CPU, precision="no")
        assert accuracy == observer.accuracy == lines[epoch - 1]["holdout_accuracy"]
    facts = {"seed": 0, "observer_holdout": 0.1, "epochs": 4, "images": "colours-40-train"}
    assert read_training(trained) == facts


def test_what_is_kept_does_not_change_the_observer(trained: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", observer_keep_epochs=(2,), observer_confidences=False)
    assert plain.fingerprint == Observer.load(trained).fingerprint
    assert list_epochs(tmp_path / "plain") == [2]
    assert (
        Observer.load(epoch_dir(tmp_path / "plain", 2)).fingerprint == Observer.load(epoch_dir(trained, 2)).fingerprint
    )
    with pytest.raises(UserError, match="train the observer with --observer_confidences"):
        read_confidences(tmp_path / "plain")


def test_a_stopped_training_keeps_the_same_bytes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within an epoch, right after one, and killed after an epoch was kept but before its checkpoint."""
    after_step = Keeper.after_step

    def stopping_at(stop: int, kill: bool) -> Callable[[Keeper, int], None]:
        def stop_there(self: Keeper, step: int) -> None:
            if step == stop and kill:
                raise KeyboardInterrupt  # nothing is saved any more
            if step == stop:
                self.noted.number = signal.SIGTERM
            after_step(self, step)

        return stop_there

    for stop, kill in ((5, False), (7, False), (14, True), (20, False)):  # epochs end at steps 7, 14, 21 and 27
        monkeypatch.setattr(Keeper, "after_step", stopping_at(stop, kill))
        with pytest.raises((Stopped, KeyboardInterrupt)):
            train(tmp_path / "observer")
        assert not (tmp_path / "observer").exists()
    monkeypatch.setattr(Keeper, "after_step", after_step)
    train(tmp_path / "observer")
    names = sorted(str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file())
    assert len(names) == 4 + 3 * 2
    for name in names:
        assert (tmp_path / "observer" / name).read_bytes() == (trained / name).read_bytes(), name
    assert not (tmp_path / "observer_checkpoints").exists()


def test_leftovers_of_a_training_without_a_checkpoint_are_not_taken_over(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "epochs", tmp_path / "observer_checkpoints" / "kept" / "epochs")
    train(tmp_path / "observer", observer_keep_epochs=(3,))
    assert list_epochs(tmp_path / "observer") == [3]


# --- the choice of an epoch


def test_the_epoch_that_teaches_best_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_epoch, "IMAGES_SEEN", 240)
    dataset = colours(30)
    training, held_out = split_holdout(dataset, 0.2, 0)
    candidates = {
        8: partial(observer_of, 0.0), 2: partial(observer_of, -20.0), 5: partial(observer_of, 20.0, 0.4),
        3: partial(observer_of, 0.0),
    }  # fmt: skip
    students: list[int] = []
    scores = score_epochs(
        candidates, dataset, training, held_out, ipc=4, device=CPU, precision="no", seed=0, flip=True,
        on_student=lambda: students.append(1),
    )  # fmt: skip
    assert [score.epoch for score in scores] == [2, 3, 5, 8] and len(students) == 8
    assert scores[2].student_accuracy > 0.8 and scores[0].student_accuracy < 0.3
    assert scores[1].student_accuracy == scores[3].student_accuracy  # only the teacher differs
    assert best_epoch(scores) == 5
    table = format_scores(scores, 4).splitlines()
    assert table[4].split()[:2] == ["5", "40.0"] and table[4].endswith("<- chosen")
    assert sum("chosen" in line for line in table) == 1
    assert best_epoch([EpochScore(1, None, 0.5), EpochScore(2, None, 0.5), EpochScore(3, None, 0.4)]) == 2
    with pytest.raises(UserError, match=r"--teacher_epoch auto: class red has only 24 training images"):
        score_epochs(candidates, dataset, training, held_out, ipc=25, device=CPU, precision="no", seed=0, flip=True)


@pytest.mark.parametrize(("ipc", "epochs"), [(1, 300), (10, 100), (100, 10)])
def test_students_of_the_choice_train_for_300_epochs_or_3000_images(
    monkeypatch: pytest.MonkeyPatch, ipc: int, epochs: int
) -> None:
    jobs: list[Job] = []

    def note(job: Job) -> object:
        jobs.append(job)
        return type("Result", (), {"accuracy_last": 0.5})

    monkeypatch.setattr(teacher_epoch, "train_student", note)
    dataset = colours(130)
    training, held_out = split_holdout(dataset, 0.2, 0)
    candidates = {1: partial(observer_of, 1.0)}
    score_epochs(candidates, dataset, training, held_out, ipc=ipc, device=CPU, precision="no", seed=0, flip=True)
    assert [job.epochs for job in jobs] == [epochs] * 2
    assert {job.scorings for job in jobs} == {1}  # only the last epoch counts


def test_students_of_the_choice_never_see_a_held_out_image(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = colours(30)
    training, held_out = split_holdout(dataset, 0.2, 0)
    trained_on, scored_on = [], []

    def note(job: Job) -> object:
        trained_on.append(job.images.pixels)
        scored_on.append(job.test)
        return type("Result", (), {"accuracy_last": 0.5})

    monkeypatch.setattr(teacher_epoch, "train_student", note)
    monkeypatch.setattr(teacher_epoch, "MAX_IMAGES", 8)
    monkeypatch.setattr(teacher_epoch, "MIN_CLASSES", 1)
    score_epochs(
        {1: partial(observer_of, 1.0)},
        dataset,
        training,
        held_out,
        ipc=4,
        device=CPU,
        precision="no",
        seed=0,
        flip=True,
    )
    known = {row.numpy().tobytes() for row in dataset.pixels[training]}
    assert len(trained_on) == 2 and not torch.equal(*trained_on)
    assert all(len(pixels) == 8 for pixels in trained_on)  # two of three classes, of four images
    assert {row.numpy().tobytes() for pixels in trained_on for row in pixels} <= known
    assert not {row.numpy().tobytes() for row in scored_on[0].pixels} & known
    assert len(scored_on[0]) == 12 and scored_on[0].labels.unique().numel() == 2
    assert [student_network(size) for size in (8, 16, 28, 32, 64, 128, 224, 512)] == [
        "convnet1", "convnet2", "convnet2", "convnet3", "convnet4", "convnet5", "convnet5", "convnet6",
    ]  # fmt: skip


# --- the commands


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "digits"
    assert train_ldm.main([*SMALL, "--fid_every", "0", "--observer_epochs", "4", "--output_dir", str(path)]) == 0
    return path


def test_stored_labels_from_the_first_command_to_the_last(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_epoch, "IMAGES_SEEN", 20)
    folder = tmp_path / "digits"
    plain, given = ["--mixed_precision", "no"], ["--distilled_dir", str(folder), "--run_dir", str(run_dir)]
    observers = [str(run_dir / "observer"), str(epoch_dir(run_dir / "observer", 3))]
    settings = ["--run_dir", str(run_dir), "--ipc", "2", "--output_dir", str(folder), *plain]
    assert sample.main([*settings, "--teacher_epoch", "auto"]) == 0
    out = capsys.readouterr().out
    assert "teacher epoch for ipc 2: students of real training images" in out and out.count("<- chosen") == 1
    choices = json.loads((run_dir / "observer" / "teacher_epochs.json").read_text())
    assert [score["epoch"] for score in choices[0]["scores"]] == [1, 2, 3, 4]
    chosen = choices[0]["epoch"]
    teacher = Observer.load(run_dir / "observer" if chosen == 4 else epoch_dir(run_dir / "observer", chosen))
    distilled = DistilledDataset.load(folder)
    with torch.no_grad():
        expected = teacher(distilled.pixels / 255).softmax(1)
    torch.testing.assert_close(distilled.soft_labels, expected.half(), rtol=0, atol=2e-3)
    monkeypatch.setattr(teacher_epoch, "train_student", pytest.fail)  # chosen once, the choice stands
    assert sample.main([*settings, "--teacher_epoch", "auto", "--overwrite"]) == 0
    assert sample.main([*settings, "--observer", *observers, "--overwrite"]) == 0
    assert "mean probability of convnet2" in (folder / "README.md").read_text()

    label = ["label", *given, *plain, "--views", "4"]
    assert cli.main([*label, "--dry_run"]) == 0
    assert not (folder / VIEWS_PATH).exists()
    assert cli.main([*label, "--observer", *observers]) == 0
    views = StoredViews.load(folder)
    assert len(views.header.observers) == 2 and views.values.shape == (4, 6, 3)
    assert views.header.augmentation["flip"] is False  # digits have no mirror images
    manifest = read_manifest(folder)
    assert manifest["stored_views"]["bytes"] == views.num_bytes and VIEWS_PATH in manifest["files"]
    assert (folder / "README.md").read_text().count("## Stored labels of augmented views") == 1
    capsys.readouterr()
    assert cli.main(label) == 2
    assert "--overwrite replaces, --shrink shrinks them" in complaint(capsys)
    assert cli.main([*label, "--shrink"]) == 2
    assert "--shrink: nothing to do" in complaint(capsys)
    assert cli.main([*label, "--shrink", "--keep_every", "2", "--top_k", "1"]) == 0
    small = StoredViews.load(folder)
    assert small.digest == views.keep_every(2).keep_top(1).digest
    assert read_manifest(folder)["stored_views"]["bytes"] == small.num_bytes < views.num_bytes

    scores = ["--epochs", "2", "--repeats", "1", "--protocols", "stored", "hard", "--output_dir", str(tmp_path / "e")]
    assert evaluate.main([*given, *plain, *scores]) == 0
    rows = json.loads((tmp_path / "e" / "results.json").read_text())["rows"]
    stored = [row for row in rows if row["protocol"] == "stored"]
    assert [(row["images"], row["label_bytes"]) for row in stored] == [("distilled", small.num_bytes)]
    card = (folder / "README.md").read_text()
    assert "| distilled | stored |" in card and card.count("## Stored labels of augmented views") == 1
    DistilledDataset.load(folder)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--teacher_epoch", "9"], "was kept after epochs 1 2 3 4; give one of these, or auto"),
        (["--teacher_epoch", "none"], "'none'"),
        (["--top_k", "3"], "--top_k 3: there are 3 classes; give fewer"),
        (["--shrink", "--top_k", "1"], "no stored views; make them with ddgen label"),
        (["--views", "0"], "--views 0: give 1 or more"),
        (["--run_dir", "none"], "--dataset: not set"),  # outside a run nothing says whether views may be mirrored
    ],
)
def test_impossible_labels_are_one_line(
    extra: list[str], expected: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = colours(2)
    distilled = DistilledDataset(
        pixels=F.interpolate(dataset.pixels, 16), labels=dataset.labels, soft_labels=torch.ones(6, 3).half() / 3,
        realism=torch.zeros(6), seeds=torch.zeros(6, dtype=torch.int64), indices=torch.arange(6),
        class_names=("0", "1", "2"),
    )  # fmt: skip
    distilled.save(tmp_path / "d")
    args = ["--distilled_dir", str(tmp_path / "d"), "--mixed_precision", "no"]
    if extra == ["--run_dir", "none"]:
        extra = ["--observer", str(run_dir / "observer")]
    else:
        args += ["--run_dir", str(run_dir)]
    assert cli.main(["label", *args, *extra]) == 2
    assert expected in complaint(capsys)
    assert not (tmp_path / "d" / VIEWS_PATH).exists()
