"""Evaluation: augmentation, losses, students, baselines, the report and the whole of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_cases import CPU, colour_observer, colours
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from ddgen.data.dataset import ImageDataset
from ddgen.distill.dataset import DistilledDataset
from ddgen.errors import UserError
from ddgen.evaluation import augment, batches, cells, scoring, students
from ddgen.evaluation.baselines import random_real
from ddgen.evaluation.batches import TrainingImages
from ddgen.evaluation.evaluate import evaluate
from ddgen.evaluation.figure import draw_accuracy
from ddgen.evaluation.protocols import ECCV2024_TRACK1, HARD, RDED, Protocol
from ddgen.evaluation.report import Results, format_table, write_results
from ddgen.evaluation.request import Request
from ddgen.evaluation.rows import Row
from ddgen.evaluation.students import IMAGENET_LOOK, Job, StudentResult, train_student
from ddgen.observer.networks import build_network
from ddgen.observer.observer import Observer

SIZE = 8


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def distilled_from(dataset: ImageDataset, ipc: int) -> DistilledDataset:
    pixels, labels = random_real(dataset, ipc, seed=5)
    n = len(labels)
    return DistilledDataset(
        pixels=pixels,
        labels=labels,
        soft_labels=F.one_hot(labels, dataset.num_classes).half(),
        realism=torch.zeros(n),
        seeds=torch.zeros(n, dtype=torch.int64),
        indices=torch.arange(n),
        class_names=dataset.class_names,
    )


@pytest.fixture(scope="module")
def teacher() -> Observer:
    return colour_observer()


def train(protocol: Protocol, teacher: Observer | None, **changes: Any) -> StudentResult:
    return train_student(job(protocol, teacher, **changes))


def job(protocol: Protocol, teacher: Observer | None, **changes: Any) -> Job:
    settings: dict[str, Any] = {
        "network": "convnet1", "protocol": protocol, "num_classes": 3, "ipc": 4, "device": CPU, "precision": "no",
        "images": TrainingImages(*random_real(colours(12, "train"), 4, seed=0)), "test": colours(20, "test"),
        "teachers": () if teacher is None else (teacher,), "seed": 0, "epochs": 10,
    }  # fmt: skip
    return Job(**{**settings, **changes})


# --- augmentation -----------------------------------------------------------------------------------------


def test_resized_crop_is_crop_then_interpolate() -> None:
    images = torch.rand(5, 3, 9, 9)
    boxes = np.array([[0, 0, 9, 9], [2, 3, 4, 6], [0, 4, 9, 5], [8, 8, 1, 1], [1, 0, 7, 3]])
    cropped = augment.resized_crop(images, boxes)
    for image, (top, left, height, width), found in zip(images, boxes, cropped, strict=True):
        window = image[None, :, top : top + height, left : left + width]
        expected = F.interpolate(window, size=(9, 9), mode="bilinear", align_corners=False, antialias=True)
        torch.testing.assert_close(found[None], expected, atol=1e-5, rtol=0)


def test_crops_are_distributed_as_torchvisions() -> None:
    boxes = augment.draw_crops(rng(), 4000, 64, (0.5, 1.0))
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 64).all() and (left + width <= 64).all()
    torch.manual_seed(0)
    image = torch.zeros(3, 64, 64)
    draw = RandomResizedCrop.get_params
    reference = np.array([draw(image, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    np.testing.assert_allclose(boxes.mean(0), reference.mean(0), atol=0.6)
    np.testing.assert_allclose(boxes.std(0), reference.std(0), atol=0.6)
    assert (boxes[:, 2] * boxes[:, 3] / 64**2).mean() == pytest.approx(
        (reference[:, 2] * reference[:, 3] / 64**2).mean(), abs=0.01
    )


def test_crop_of_area_one_is_the_image() -> None:
    assert (augment.draw_crops(rng(), 100, 32, (1.0, 1.0)) == [0, 0, 32, 32]).all()


def test_flip_mirrors_half_of_the_images() -> None:
    images = torch.rand(400, 1, 2, 3)
    flipped = augment.random_flip(images, rng())
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert ((flipped == images).flatten(1).all(1) ^ mirrored).all()
    assert 160 < int(mirrored.sum()) < 240


def test_shuffled_patches_are_the_same_patches() -> None:
    images = torch.arange(64.0).view(1, 1, 8, 8)
    patches = {tuple(images[0, 0, r : r + 4, c : c + 4].flatten().tolist()) for r in (0, 4) for c in (0, 4)}
    seen = set()
    for seed in range(20):
        shuffled = augment.shuffle_patches(images, 2, rng(seed))[0, 0]
        assert {tuple(shuffled[r : r + 4, c : c + 4].flatten().tolist()) for r in (0, 4) for c in (0, 4)} == patches
        seen.add(tuple(shuffled.flatten().tolist()))
    assert len(seen) == 4  # columns swapped or not, rows swapped or not


def test_only_recipes_that_shuffle_touch_the_patches_of_composed_images() -> None:
    images = torch.rand(6, 3, 8, 8)
    look = replace(IMAGENET_LOOK, flip=False)
    for recipe in (RDED.without_augmentation(), replace(ECCV2024_TRACK1, dsa=())):
        assert torch.equal(batches.augment(images, recipe, look, 2, rng()), images)
    whole = replace(RDED.without_augmentation(), shuffle=True)
    assert not torch.equal(batches.augment(images, whole, look, 2, rng()), images)


def test_color_jitter_of_grey_images_stays_grey_and_bounded() -> None:
    images = torch.rand(64, 1, 4, 4).expand(-1, 3, -1, -1)
    jittered = augment.color_jitter(images, 0.4, rng())
    torch.testing.assert_close(jittered[:, 0], jittered[:, 1], atol=1e-5, rtol=0)
    ratio = jittered.mean((1, 2, 3)) / images.mean((1, 2, 3))  # contrast and saturation keep the mean of grey
    assert ratio.min() >= 0.6 - 1e-4 and ratio.max() <= 1.4 + 1e-4 and ratio.std() > 0.15
    assert torch.equal(augment.color_jitter(images, 0.0, rng()), images.contiguous())


def test_lighting_has_the_covariance_of_its_components() -> None:
    shift = augment.lighting(torch.zeros(40_000, 3, 1, 1), 0.1, rng())[:, :, 0, 0].double()
    vectors = np.array(augment._LIGHTING_VECTORS)
    expected = vectors @ np.diag((0.1 * np.array(augment._LIGHTING_VALUES)) ** 2) @ vectors.T
    np.testing.assert_allclose(np.cov(shift.numpy().T), expected, atol=1.2e-5)


def test_cutmix_weight_is_the_area_that_stays_and_the_input_is_left_alone() -> None:
    generator = rng(3)
    images = torch.zeros(2, 3, 16, 16)
    images[1] = 1.0
    before = images.clone()
    weights = []
    for _ in range(200):
        box = augment.draw_cutmix(generator, 16, 1.0)
        mixed, own = augment.cutmix(images, torch.tensor([1, 0]), box)
        assert own == pytest.approx(1.0 - float(mixed[0].mean()), abs=1e-6)
        assert own == pytest.approx(float(mixed[1].mean()), abs=1e-6)
        inside = mixed[0, 0].nonzero()
        if len(inside):  # one rectangle
            height, width = (inside.max(0).values - inside.min(0).values + 1).tolist()
            assert height * width == len(inside)
        weights.append(own)
    assert torch.equal(images, before)
    assert min(weights) < 0.3 and max(weights) > 0.95


# --- losses, optimizer, scoring ---------------------------------------------------------------------------


def test_soft_loss_by_hand() -> None:
    # At temperature 20 the teacher's (20 ln 3, 0) is (3/4, 1/4); the student's equal logits are (1/2, 1/2).
    teacher_logits = torch.tensor([[20 * math.log(3), 0.0], [0.0, 0.0]])
    student_logits = torch.tensor([[7.0, 7.0], [1.0, 1.0]])
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5) + 0.0) / 2
    assert float(students.soft_loss(student_logits, teacher_logits, 20.0)) == pytest.approx(expected, rel=1e-5)


def test_soft_loss_is_finite_where_probabilities_underflow() -> None:
    logits = torch.tensor([[2000.0, -2000.0]])
    assert torch.isfinite(students.soft_loss(-logits, logits, 1.0))


def test_mixed_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[math.log(3), 0.0]])
    loss = students.mixed_cross_entropy(logits, torch.tensor([0]), torch.tensor([1]), own=0.7)
    assert float(loss) == pytest.approx(-0.7 * math.log(0.75) - 0.3 * math.log(0.25), rel=1e-5)


def test_only_rded_spares_vectors_from_decay() -> None:
    network = build_network("convnet1", 3, SIZE, width=4)
    decayed, spared = students.make_optimizer(network, RDED, 1e-3).param_groups
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in spared["params"])
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    (group,) = students.make_optimizer(network, HARD, 0.01).param_groups
    assert (len(group["params"]), group["weight_decay"], group["momentum"]) == (6, 5e-4, 0.9)


def test_test_images_are_enlarged_and_cropped() -> None:
    image = torch.rand(1, 3, 64, 64)
    expected = F.interpolate(image, size=(72, 72), mode="bilinear", antialias=True)[:, :, 4:68, 4:68]
    torch.testing.assert_close(scoring.enlarge_and_crop(image), expected)
    small = torch.rand(1, 3, 32, 32)  # 32 // 7 * 8 = 32
    assert scoring.enlarge_and_crop(small) is small


@pytest.mark.parametrize(
    ("epochs", "num_images", "num_test", "expected"),
    [
        (300, 100, 359, [30, 60, 90, 120, 150, 180, 210, 240, 270, 300]),
        (300, 100, 10_000, [75, 150, 225, 300]),
        (3, 100, 10, [1, 2, 3]),
    ],
)
def test_scored_epochs_end_with_the_last(epochs: int, num_images: int, num_test: int, expected: list[int]) -> None:
    assert scoring.scored_epochs(epochs, num_images, num_test) == expected


# --- students ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [RDED, HARD], ids=["rded", "hard"])
def test_student_learns_an_easy_dataset(protocol: Protocol, teacher: Observer) -> None:
    result = train(protocol, teacher, epochs=30)
    assert result.accuracy_last > 0.9 and result.accuracy_best >= result.accuracy_last
    assert result.curve[-1] == (30, result.accuracy_last) and result.epochs == 30


@pytest.mark.parametrize("protocol", [RDED, HARD], ids=["rded", "hard"])
def test_same_seed_same_student_other_seed_another(
    protocol: Protocol, teacher: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = _record_students(monkeypatch)
    torch.manual_seed(1)
    first = train(protocol, teacher, epochs=2)
    torch.manual_seed(2)
    torch.rand(5)
    second = train(protocol, teacher, epochs=2)
    train(protocol, teacher, epochs=2, seed=1)
    assert first.curve == second.curve
    states = [network.state_dict() for network in built]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def test_global_randomness_is_left_alone(teacher: Observer) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    train(RDED, teacher, epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_batch_norm_statistics_move_once_a_step(teacher: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    built = _record_students(monkeypatch)
    train(replace(RDED, batch_sizes=((1, 5),)), teacher, epochs=4)
    (norm,) = [module for module in built[0].modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert int(norm.num_batches_tracked) == 4 * 3  # 12 images in batches of 5, 5 and 2


def test_teacher_labels_each_mixed_batch_as_if_alone(teacher: Observer) -> None:
    images = TrainingImages(*random_real(colours(12, "train"), 4, seed=0))
    stream = list(batches.stream(images, RDED, 2, 5, 0, students.IMAGENET_LOOK))
    labelled = list(batches.with_teachers(iter(stream), [teacher], CPU, "no"))
    assert [len(batch.images) for batch in labelled] == [5, 5, 2] * 2
    for batch in labelled:
        assert batch.teacher_logits is not None
        torch.testing.assert_close(batch.teacher_logits, teacher(batch.images).detach())


def test_images_are_mirrored_only_if_asked(teacher: Observer) -> None:
    images = torch.zeros(6, 3, SIZE, SIZE, dtype=torch.uint8)
    images[..., 0] = 255
    plain = replace(RDED, cutmix_alpha=1e-4)  # boxes of next to no area, or of all of it
    for flip, sides in ((True, 2), (False, 1)):
        look = replace(students.IMAGENET_LOOK, flip=flip)
        stream = batches.stream(TrainingImages(images, torch.arange(6)), plain, 5, 6, 0, look)
        assert len({int(image[0, 0].argmax()) for batch in stream for image in batch.images}) == sides


def test_students_see_the_schedule_of_the_epochs_asked_for(teacher: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    monkeypatch.setattr(students, "set_learning_rate", lambda optimizer, rate: rates.append(rate))
    train(HARD, teacher, epochs=6)
    assert rates == pytest.approx([0.01] * 4 + [0.002, 0.0004])


def test_soft_protocol_needs_a_teacher() -> None:
    with pytest.raises(UserError, match="soft labels need a teacher; give --observer"):
        train(RDED, None)


def test_a_loss_that_is_not_finite_stops_the_student(teacher: Observer) -> None:
    with pytest.raises(UserError, match="loss of student convnet1 is not finite"):
        train(replace(HARD, learning_rate=1e30), None)


def _record_students(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    built: list[torch.nn.Module] = []

    def build(*args: Any, **kwargs: Any) -> torch.nn.Module:
        built.append(build_network(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(students, "build_network", build)
    return built


# --- baselines --------------------------------------------------------------------------------------------


def test_random_real_draws_distinct_images_class_by_class() -> None:
    dataset = colours(7, "train")
    pixels, labels = random_real(dataset, 5, seed=0)
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    for label in range(3):
        of_class = {image.numpy().tobytes() for image in dataset.pixels[dataset.labels == label]}
        drawn = [image.numpy().tobytes() for image in pixels[labels == label]]
        assert len(set(drawn)) == 5 and set(drawn) <= of_class
    assert torch.equal(random_real(dataset, 5, seed=0)[0], pixels)
    assert not torch.equal(random_real(dataset, 5, seed=1)[0], pixels)
    assert torch.equal(random_real(dataset, 2, seed=0)[0], pixels.view(3, 5, 3, SIZE, SIZE)[:, :2].flatten(0, 1))


def test_class_smaller_than_ipc() -> None:
    with pytest.raises(UserError, match="--ipc 8: class red of colours has only 7 training images"):
        random_real(colours(7, "train"), 8, seed=0)


# --- the whole --------------------------------------------------------------------------------------------


def run(output_dir: Path, teacher: Observer | None, **changes: Any) -> Results:
    train_set = colours(12, "train")
    settings: dict[str, Any] = {
        "rounds": [distilled_from(train_set, 4)], "train": train_set, "test": colours(20, "test"),
        "observers": [teacher], "students": ("convnet1",), "protocols": ("rded", "hard"), "repeats": 2, "epochs": 3,
        "baselines": ("random-generated", "random-real"), "seed": 0, "device": CPU, "precision": "no",
        "output_dir": output_dir, "progress": False,
    }  # fmt: skip
    return evaluate(Request(**{**settings, **changes}))


def generated() -> tuple[Tensor, Tensor]:
    dataset = colours(4, "generated")
    return dataset.pixels, dataset.labels


def test_evaluate_writes_rows_that_add_up(tmp_path: Path, teacher: Observer) -> None:
    results = run(tmp_path, teacher, random_generated=generated())
    assert [(row.protocol, row.images) for row in results.rows] == [
        (protocol, images)
        for protocol in ("rded", "hard")
        for images in ("distilled", "random generated", "random real")
    ]
    assert (results.ipc, results.num_test, results.teachers) == (4, 60, (("convnet1", 1.0),))
    assert all(len(row.scores) == 2 and row.epochs == 3 for row in results.rows)
    weights = sum(value.numel() * value.element_size() for value in teacher.state_dict().values())
    assert results.rows[0].label_bytes == weights and results.rows[-1].label_bytes == 12
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["rows"][0]["mean"] == pytest.approx(np.mean(results.rows[0].scores))
    assert stored["rows"][0]["std"] == pytest.approx(np.std(results.rows[0].scores, ddof=1))
    assert stored["epochs_override"] == 3
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.width > 600 and np.asarray(picture.convert("RGB")).std() > 10


def test_second_call_trains_nothing(tmp_path: Path, teacher: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, teacher)
    monkeypatch.setattr(cells, "train_student", lambda *args, **kwargs: pytest.fail("trained again"))
    assert run(tmp_path, teacher) == first


def test_more_repeats_and_protocols_train_only_what_is_new(
    tmp_path: Path, teacher: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path, teacher, protocols=("rded",), repeats=1)
    new: list[tuple[str, int]] = []

    def noted(job: Job, *args: Any, **kwargs: Any) -> StudentResult:
        new.append((job.protocol.name, job.seed))
        return train_student(job, *args, **kwargs)

    monkeypatch.setattr(cells, "train_student", noted)
    both = run(tmp_path, teacher, protocols=("rded", "hard"), repeats=2)
    assert len(new) == len(set(new)) * len(first.rows) == 3 * len(first.rows)  # rded's second, and both of hard
    assert [row.scores[0] for row in both.rows[: len(first.rows)]] == [row.scores[0] for row in first.rows]


def test_interrupted_evaluation_goes_on(tmp_path: Path, teacher: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(*args: Any, **kwargs: Any) -> StudentResult:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args[0].network)
        return train_student(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "train_student", counted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "a", teacher)
    assert len(list((tmp_path / "a" / "cells").glob("*.json"))) == 3
    resumed, whole = run(tmp_path / "a", teacher), run(tmp_path / "b", teacher)
    assert [row.scores for row in resumed.rows] == [row.scores for row in whole.rows]


@pytest.mark.parametrize("change", [{"seed": 1}, {"epochs": 4}, {"flip": False}])
def test_another_setting_is_another_cell(tmp_path: Path, teacher: Observer, change: dict[str, Any]) -> None:
    run(tmp_path, teacher, protocols=("rded",), repeats=1)
    run(tmp_path, teacher, protocols=("rded",), repeats=1, **change)
    assert len(list((tmp_path / "cells").glob("*.json"))) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": colours(20, "test", ("red", "blue", "green"))}, "class 1 is 'green' in the distilled dataset but"),
        ({"train": colours(12, "train", ("green", "red", "blue"))}, "class 0 is 'red' in the distilled dataset but"),
        ({"train": colours(3, "train")}, "--ipc 4: class red of colours has only 3 training images"),
        ({"students": ("convnet9",)}, "--students convnet9"),
        ({"students": ("convent3",)}, "--students convent3: unknown network"),
        ({"students": ()}, "--students: empty"),
        ({"protocols": ("soft",)}, "--protocols soft: unknown"),
        ({"repeats": 0}, "--repeats 0: must be at least 1"),
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"observers": []}, "--protocols rded: soft labels need a teacher"),
        ({"random_generated": (torch.zeros(3, 3, 8, 8).byte(), torch.arange(3))}, "differ in number or size"),
    ],
)  # fmt: skip
def test_refused_before_any_training(
    tmp_path: Path, teacher: Observer, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(cells, "train_student", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(UserError) as error:
        run(tmp_path, teacher, **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_observer_with_another_class_order(tmp_path: Path, teacher: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "train_student", lambda *args, **kwargs: pytest.fail("trained"))
    monkeypatch.setattr(teacher, "class_names", ("blue", "green", "red"))
    with pytest.raises(UserError, match="class 0 is 'red' in the distilled dataset but 'blue' in the observer"):
        run(tmp_path, teacher)


def test_observer_near_chance_on_the_real_test_images(tmp_path: Path, teacher: Observer) -> None:
    test = colours(20, "test")
    shifted = replace(test, labels=(test.labels + 1) % 3)
    with pytest.raises(UserError, match="class order"):
        run(tmp_path, teacher, test=shifted)


# --- report -----------------------------------------------------------------------------------------------


def results(epochs_override: int | None = 60, repeats: int = 3) -> Results:
    def row(images: str, protocol: str, *scores: float) -> Row:
        chosen = scores[:repeats]
        best = tuple(score + 0.01 for score in chosen)
        return Row(images, protocol, "convnet3", 60, chosen, best, 41_300, 10 if protocol == "hard" else 1_284_000, 9.0)

    rows = (
        row("distilled", "rded", 0.921, 0.931, 0.941),
        row("random generated", "rded", 0.902, 0.899, 0.911),
        row("random real", "rded", 0.914, 0.922, 0.919),
        row("distilled", "hard", 0.861, 0.851, 0.872),
        row("random generated", "hard", 0.803, 0.822, 0.811),
        row("random real", "hard", 0.842, 0.853, 0.829),
    )
    return Results(
        rows, "digits", 10, 359, 32, 10, 100, repeats, 0, epochs_override, True, (("convnet3", 0.986),), (RDED, HARD),
        "bf16", "cpu",
    )  # fmt: skip


def test_table_states_what_must_be_known() -> None:
    table = format_table(results())
    lines = table.splitlines()
    assert "on the 359 real test images of digits" in lines[0]
    assert "10 images per class" in table and "3 students per row, mean ± std" in table
    assert "Teacher: convnet3, 98.6 on the same test images" in table
    assert "--epochs 60 instead of 300 of rded, 2000 of hard: not comparable with published numbers" in table
    assert "The score is the last epoch's." in table
    (line,) = [line for line in lines if line.startswith("distilled") and "rded" in line]
    assert " ".join(line.split()) == "distilled rded convnet3 93.1 ± 1.0 (94.1) 60* 41.3 kB 1.3 MB"
    assert len({len(line) for line in lines if "convnet3  " in line and "±" in line}) == 1
    assert max(map(len, lines)) <= 120


def test_epochs_that_are_the_protocols_own_change_nothing(tmp_path: Path) -> None:
    asked = results(epochs_override=300)
    table = format_table(asked)
    assert "--epochs 300 instead of 2000 of hard: not comparable" in table and "of rded" not in table
    (soft,) = [line for line in table.splitlines() if line.startswith("distilled") and "rded" in line]
    (hard,) = [line for line in table.splitlines() if line.startswith("distilled") and "hard" in line]
    assert "60*" in hard and "60*" not in soft
    full = format_table(replace(asked, rows=(*asked.rows, replace(asked.rows[0], images="full real"))))
    assert "instead of 2000 of hard" in full and "* On all real images students train for fewer epochs" in full
    write_results(asked, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["epochs_changed"] == ["hard"]


def test_table_without_override_and_of_one_repeat_claims_no_spread() -> None:
    table = format_table(results(epochs_override=None, repeats=1))
    assert "mirror" not in table
    assert "Without the protocols' mirroring" in format_table(replace(results(), flip=False))
    assert "*" not in table and "±" not in table and "1 student per row" in table


def test_results_survive_writing(tmp_path: Path) -> None:
    write_results(results(), tmp_path / "results.json")
    stored = json.loads((tmp_path / "results.json").read_text())
    row = stored["rows"][0]
    assert [row["mean"], row["std"], row["best_epoch_mean"]] == pytest.approx([0.931, 0.01, 0.941])


@pytest.mark.parametrize("repeats", [1, 3])
def test_figure_is_drawn(tmp_path: Path, repeats: int) -> None:
    draw_accuracy(results(repeats=repeats), tmp_path / "accuracy.png")
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height > 400
