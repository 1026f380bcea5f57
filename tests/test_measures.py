"""Baselines by features, measures by hand, and reports of several observers, rounds and recipes."""

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

from ddgen.distill.dataset import DistilledDataset
from ddgen.distill.foreign_dataset import ForeignDataset
from ddgen.errors import UserError
from ddgen.evaluation import cells
from ddgen.evaluation.baselines import by_features, random_real
from ddgen.evaluation.batches import TrainingImages, stream
from ddgen.evaluation.evaluate import evaluate
from ddgen.evaluation.measures import augmentation_robust_score, dd_ranking, label_robust_score
from ddgen.evaluation.protocols import ECCV2024_TRACK1, FIXED_SOFT, HARD, RDED, STRONG
from ddgen.evaluation.report import Results, format_table
from ddgen.evaluation.request import Request
from ddgen.evaluation.rows import Row
from ddgen.evaluation.scoring import score
from ddgen.evaluation.students import IMAGENET_LOOK, Job, Learner, batch_loss, train_student
from ddgen.memory import keep_freed_memory
from ddgen.observer.observer import Observer, predict_pixels


@pytest.fixture(scope="module")
def teacher() -> Observer:
    return colour_observer()


def distilled(counts: tuple[int, ...] = (4, 4, 4)) -> DistilledDataset:
    pixels, labels = random_real(colours(12, "train"), counts, seed=5)
    n = len(labels)
    return DistilledDataset(
        pixels, labels, F.one_hot(labels, 3).half(), torch.zeros(n), torch.zeros(n, dtype=torch.int64),
        torch.arange(n), colours(1, "train").class_names,
    )  # fmt: skip


def run(output_dir: Path, teacher: Observer, **changes: Any) -> Results:
    settings: dict[str, Any] = {
        "rounds": [distilled()], "train": colours(12, "train"), "test": colours(20, "test"), "observers": [teacher],
        "students": ("convnet1w8",), "protocols": ("rded",), "baselines": (), "repeats": 1, "epochs": 1, "seed": 0,
        "device": CPU, "precision": "no", "output_dir": output_dir, "progress": False,
    }  # fmt: skip
    return evaluate(Request(**{**settings, **changes}))


def job(**changes: Any) -> Job:
    images = TrainingImages(distilled().pixels, distilled().labels)
    settings: dict[str, Any] = {
        "network": "convnet1w8", "protocol": HARD, "images": images, "num_classes": 3, "ipc": 4, "device": CPU,
        "test": colours(20, "test"), "teachers": (), "precision": "no", "seed": 0, "epochs": 4,
    }  # fmt: skip
    return Job(**{**settings, **changes})


# --- baselines


def test_choosing_by_features_is_per_class(teacher: Observer) -> None:
    """The first is nearest to its class's mean: by direction for herding, by distance for k-center."""
    train = colours(9, "train")
    green = predict_pixels(teacher, train.pixels[9:18], what="features", batch_size=9, device=CPU, precision="no")

    def chosen_alone(method: str) -> int:
        points = F.normalize(green, dim=1) if method == "herding" else green
        mean = points.mean(0)
        return 9 + int((points @ mean).argmax() if method == "herding" else (points - mean).norm(dim=1).argmin())

    for method in ("herding", "k-center"):
        chosen = by_features(train, (1, 3, 2), method, teacher, device=CPU, precision="no")
        assert train.labels[chosen].tolist() == [0, 1, 1, 1, 2, 2] and len(set(chosen.tolist())) == 6
        assert chosen[1] == chosen_alone(method)
    with pytest.raises(UserError, match=r"--ipc 10: class red .* only 9 training images for the herding baseline"):
        by_features(train, 10, "herding", teacher, device=CPU, precision="no")


def test_what_was_chosen_is_kept(tmp_path: Path, teacher: Observer) -> None:
    results = run(tmp_path, teacher, baselines=("herding", "k-center"))
    assert [row.images for row in results.rows] == ["distilled", "herding", "k-center"]
    kept = {path.name: path.read_bytes() for path in (tmp_path / "baselines").iterdir()}
    assert len(kept) == 2
    assert run(tmp_path, teacher, baselines=("herding", "k-center")) == results
    assert {path.name: path.read_bytes() for path in (tmp_path / "baselines").iterdir()} == kept


def test_other_settings_choose_anew(tmp_path: Path, teacher: Observer) -> None:
    """One output folder: another observer, other training images and other counts never take what was chosen before."""
    other = colour_observer()
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    for number, changes in enumerate(
        ({}, {"observers": [other]}, {"train": colours(11, "train")}, {"rounds": [distilled((3, 3, 3))]}), start=1
    ):
        run(tmp_path, teacher, baselines=("herding",), **changes)
        assert len(list((tmp_path / "baselines").iterdir())) == number


# --- measures


def test_label_robust_score_by_hand() -> None:
    # HLR 0.4 and IOR 0.1 give alpha -0.15: (e^-0.15 - e^-1) / (e - e^-1)
    assert label_robust_score(0.4, 0.1) == pytest.approx((0.860708 - 0.367879) / (2.718282 - 0.367879), abs=1e-6)
    assert label_robust_score(-1.0, 1.0) == pytest.approx(1.0) and label_robust_score(1.0, -1.0) == pytest.approx(0.0)
    assert augmentation_robust_score(0.2, 0.1) == pytest.approx((math.exp(0.15) - math.exp(-1)) / (math.e - 1 / math.e))


def test_dd_ranking_takes_the_rows_that_are_there() -> None:
    def row(images: str, protocol: str, score: float, teacher: str | None = None) -> Row:
        return Row(images, protocol, "convnet3", 1, (score,), (score,), 1, 1, 1.0, teacher)

    rows = [
        row("distilled", "rded", 0.50, "o"), row("random real", "rded", 0.45, "o"),
        row("distilled", "hard", 0.40), row("random real", "hard", 0.30), row("full real", "hard", 0.80),
        row("distilled", "hard-plain", 0.35), row("random real", "hard-plain", 0.27),
    ]  # fmt: skip
    soft, hard = dd_ranking(rows, [RDED, HARD, HARD.without_augmentation()])
    assert (soft.protocol, soft.hard_protocol, soft.ars) == ("rded", "hard", None)
    assert (soft.hlr, soft.ior) == (pytest.approx(0.40), pytest.approx(0.05))
    assert soft.lrs == pytest.approx(label_robust_score(0.40, 0.05))
    assert hard.ars == pytest.approx(augmentation_robust_score(0.10, 0.08))
    (without_full,) = dd_ranking(rows[:2], [RDED])
    assert without_full.hlr is None and without_full.lrs is None


def test_scores_by_hand() -> None:
    """A network that always names class 0 first, then 1, 2, ...: top-5 holds the first five classes."""
    pixels, labels = torch.zeros(14, 3, 8, 8).byte(), torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 6, 6, 0, 1, 2, 3])
    test = replace(colours(2, "test"), pixels=pixels, labels=labels, class_names=tuple("abcdefg"))

    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -torch.arange(7.0).expand(len(x), 7)

    found = score(Constant(), test, 7, False, device=CPU, precision="no")
    assert (found.top1, found.top5) == (pytest.approx(3 / 14), pytest.approx(10 / 14))
    assert found.recall == (1.0, 0, 0, 0, 0, 0, 0)
    assert found.confusion is not None and [line[0] for line in found.confusion] == [3, 2, 2, 2, 1, 1, 3]
    assert sum(map(sum, found.confusion)) == 14


# --- recipes


def test_strong_loss_and_average_by_hand(teacher: Observer) -> None:
    logits, wanted = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.0, 0.0, 5.0]])
    images = TrainingImages(distilled().pixels[:1], torch.tensor([2]))
    batch = next(stream(images, replace(STRONG, cutmix_alpha=0.0), 1, 1, 0, IMAGENET_LOOK))
    loss = batch_loss(logits, replace(batch, teacher_logits=wanted), STRONG)
    cross_entropy = math.log(math.e + 1 + math.e**2) - 2
    assert float(loss) == pytest.approx((1 + 0 + 9) / 3 + 0.025 * cross_entropy, rel=1e-5)
    learner = Learner(job(protocol=STRONG, teachers=(teacher,)))
    weights = []
    for _ in range(3):
        learner.step(replace(batch, teacher_logits=wanted))
        weights.append(learner.student.network.head.weight.detach().clone())
    assert learner.average is not None
    expected = 0.99 * (0.99 * weights[0] + 0.01 * weights[1]) + 0.01 * weights[2]
    torch.testing.assert_close(learner.average.module.network.head.weight, expected)


def test_a_fresh_optimizer_forgets_its_momentum() -> None:
    learner = Learner(job(protocol=replace(ECCV2024_TRACK1, step_at=((1, 2),)), epochs=4))
    batch = next(stream(learner.job.images, HARD, 1, 4, 0, IMAGENET_LOOK))
    held, rates = [], []
    for epoch in range(4):
        learner.begin_epoch(epoch)
        held.append(len(learner.optimizer.state))
        rates.append(learner.optimizer.param_groups[0]["lr"])
        learner.step(batch)
    assert held == [0, 6, 0, 6] and rates == pytest.approx([0.01, 0.01, 0.001, 0.001])


def test_stored_labels_are_the_loss_and_are_mixed_as_the_images() -> None:
    soft = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    images = TrainingImages(distilled().pixels[:2], torch.tensor([0, 2]), soft)
    batch = next(stream(images, FIXED_SOFT, 1, 2, 0, IMAGENET_LOOK))
    assert batch.soft_labels is not None and sorted(batch.soft_labels.tolist()) == sorted(soft.tolist())
    zero = torch.zeros(2, 3)
    assert float(batch_loss(zero, batch, FIXED_SOFT)) == pytest.approx(math.log(3))
    mixed = next(stream(images, replace(FIXED_SOFT, cutmix_alpha=1.0), 1, 2, 3, IMAGENET_LOOK))
    assert mixed.soft_labels is not None
    for label, own, other in zip(mixed.soft_labels, mixed.labels, mixed.pasted_labels, strict=True):
        expected = mixed.own * soft[int(own) // 2] + (1 - mixed.own) * soft[int(other) // 2]
        torch.testing.assert_close(label, expected)


def test_every_protocol_twice_gives_the_same_number(teacher: Observer) -> None:
    for protocol in (ECCV2024_TRACK1, STRONG, FIXED_SOFT, HARD.without_augmentation()):
        images = replace(job().images, soft_labels=distilled().soft_labels)
        this = job(protocol=protocol, images=images, teachers=(teacher,), epochs=2)
        first, second = train_student(this), train_student(this)
        assert (first.curve, first.confusion) == (second.curve, second.confusion)


# --- reports


def test_observers_down_students_across(tmp_path: Path, teacher: Observer) -> None:
    torch.manual_seed(3)
    other = colour_observer()
    other.classifier.head.weight.data *= 2
    results = run(
        tmp_path, teacher, observers=[teacher, other], students=("convnet1w8", "convnet2w8"),
        protocols=("rded", "hard", "strong"),
    )  # fmt: skip
    found = [(row.student, row.protocol, row.teacher) for row in results.rows]
    assert found == [
        (student, protocol, teacher)
        for student in ("convnet1w8", "convnet2w8")
        for protocol, teacher in (
            ("rded", "convnet1 #1"), ("rded", "convnet1 #2"), ("hard", None), ("strong", "convnet1 #1 + convnet1 #2"),
        )
    ]  # fmt: skip
    stored = json.loads((tmp_path / "results.json").read_text())
    (table,) = stored["cross_architecture"]
    assert (table["observers"], table["students"]) == (["convnet1 #1", "convnet1 #2"], ["convnet1w8", "convnet2w8"])
    assert table["mean"][1][0] == stored["rows"][1]["mean"]
    assert "rded on the distilled images: observers down, students across" in format_table(results)
    assert stored["protocols"]["strong"]["ema_decay"] == 0.99
    assert np.array(stored["rows"][0]["confusion"]).sum() == 60
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.height > 700


def test_all_real_images_are_one_student_of_few_epochs(tmp_path: Path, teacher: Observer) -> None:
    results = run(
        tmp_path, teacher, with_full=True, repeats=2, epochs=40, protocols=("hard",), baselines=("random-real",)
    )
    assert [(row.images, row.epochs, len(row.scores)) for row in results.rows] == [
        ("distilled", 40, 2), ("random real", 40, 2), ("full real", 30, 1),
    ]  # fmt: skip
    table = format_table(results)
    assert "30*" in table and "One student is trained on all real images." in table and "DD-Ranking" in table


def test_rounds_are_one_student_each(tmp_path: Path, teacher: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watched(this: Job, *args: Any) -> Any:
        seen.append(len(this.images))
        return train_student(this, *args)

    monkeypatch.setattr(cells, "train_student", watched)
    rounds = [distilled((2, 3, 4)), distilled((5, 5, 5)), distilled((1, 1, 1))]
    results = run(tmp_path, teacher, rounds=rounds, repeats=3, protocols=("eccv2024-track2",), students=None)
    assert seen == [9, 15, 3] and results.rows[0].student == "convnet3"
    assert "up to 4 images per class (9 in all)" in format_table(results)
    with pytest.raises(UserError, match="--protocols hard: the distilled dataset has 2 to 4 images per class"):
        run(tmp_path, teacher, rounds=rounds, protocols=("eccv2024-track2", "hard"))


def test_stored_labels_of_baselines_come_from_the_observer(tmp_path: Path, teacher: Observer) -> None:
    results = run(tmp_path, teacher, protocols=("fixed-soft",), baselines=("random-real",))
    assert [(row.images, row.teacher, row.label_bytes) for row in results.rows] == [
        ("distilled", None, 12 * 3 * 2), ("random real", None, 12 * 3 * 2),
    ]  # fmt: skip
    with pytest.raises(UserError, match="--protocols fixed-soft: the baselines have no soft labels stored"):
        run(tmp_path, teacher, observers=[], protocols=("fixed-soft",), baselines=("random-real",))
    with pytest.raises(UserError, match="--baselines herding: an observer chooses its images; give --observer"):
        run(tmp_path, teacher, observers=[], protocols=("hard",), baselines=("herding",))


def test_stored_labels_are_not_made_up_for_a_dataset_that_has_none(tmp_path: Path, teacher: Observer) -> None:
    own = distilled((2, 2, 2))
    foreign = ForeignDataset(own.pixels, own.labels, None, own.class_names, ())
    with pytest.raises(UserError, match="--protocols fixed-soft: the dataset has no soft labels; take rded or hard"):
        run(tmp_path, teacher, rounds=[own, foreign], protocols=("fixed-soft",))
    theirs, ours = (run(tmp_path / name, teacher, rounds=[found]) for name, found in (("a", foreign), ("b", own)))
    assert theirs.rows[0].scores == ours.rows[0].scores


def test_freed_memory_is_kept() -> None:
    import resource

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            np.empty(16 << 20, dtype=np.uint8).fill(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    if not keep_freed_memory():
        pytest.skip("no glibc")
    faults()
    assert faults() < 100
    assert keep_freed_memory(False)
