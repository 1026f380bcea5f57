"""RDED on real images: crops, ranking, grids, and the command that does it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from ddgen import cli
from ddgen.config import DataConfig, Selection
from ddgen.data import ImageDataset
from ddgen.data.load import load_dataset
from ddgen.distill.compose import cell_edges, compose
from ddgen.distill.dataset import DistilledDataset
from ddgen.distill.rded import RankedCrops, crop, draw_boxes, pad_to, plan_crops, rank_class
from ddgen.distill.select import select_random
from ddgen.errors import UserError
from ddgen.evaluation.augment import shuffle_patches
from ddgen.evaluation.baselines import rded_real
from ddgen.evaluation.evaluate import evaluate as evaluate_students
from ddgen.evaluation.evaluate import make_sources
from ddgen.evaluation.request import Request
from ddgen.evaluation.sources import Source, baseline_sources
from ddgen.evaluation.students import Job, StudentResult, train_student
from ddgen.observer.epochs import epoch_dir
from ddgen.observer.networks import Classifier
from ddgen.observer.observer import Observer, predict_both, predict_pixels, to_images01
from ddgen.observer.realism import REAL_IMAGES, real_class_scores, realism_scores
from ddgen.seeds import derive, numpy_generator

CPU = torch.device("cpu")
NAMES = ("a", "b", "c")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def noise(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """Random blobs, so that crops of an image differ."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (255 * F.interpolate(coarse, size=(size, size), mode="bilinear")).round().to(torch.uint8)


def dataset(counts: tuple[int, ...] = (12, 12, 3), size: int = 16) -> ImageDataset:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    return ImageDataset(noise(len(labels), size), labels[mixed], NAMES, "blobs", "train", "blobs")


def observer(size: int = 16, gain: float = 3.0) -> Observer:
    """Its features are the mean of each channel of what it receives, its logits a known linear function of them."""
    head = nn.Linear(3, 3)
    with torch.no_grad():
        head.weight.copy_(gain * torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0], [-1.0, 0.0, 1.0]]))
        head.bias.copy_(torch.tensor([0.1, 0.0, -0.1]))
    body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    known = Observer(Classifier(body, head), network="known", class_names=NAMES, input_size=size, mean=MEAN, std=STD)
    return known.eval()


def rank(
    data: ImageDataset,
    label: int = 0,
    *,
    ipc: int = 4,
    factor: int = 1,
    mipc: int = 300,
    num_crop: int = 5,
    rule: Selection = "realism",
    seed: int = 0,
    by: Observer | None = None,
) -> RankedCrops:
    members = data.indices_by_class()[label]
    plan = plan_crops(
        len(members), class_name="a", label=label, ipc=ipc, factor=factor, mipc=mipc, num_crop=num_crop, seed=seed
    )
    known = by or observer(data.image_size)
    real = real_class_scores(known, data, label, seed, device=CPU, precision="no")
    return rank_class(
        known, data, members, label, plan, factor=factor, rule=rule, real=real, seed=seed, device=CPU, precision="no"
    )


# --- crops


@pytest.mark.parametrize(("size", "side"), [(32, 32), (32, 16), (32, 10), (45, 22)])
def test_crops_are_torchvisions_resized_crops(size: int, side: int) -> None:
    pixels = torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8)
    boxes = torch.stack([draw_boxes(0, 0, number, 5, size) for number in range(6)])
    boxes[0, 0] = torch.tensor([0, 0, size])
    ours = crop(pixels, boxes, side)
    assert ours.shape == (30, 3, side, side) and ours.dtype == torch.uint8
    for position in range(30):
        image, (top, left, length) = pixels[position // 5].float(), boxes[position // 5, position % 5].tolist()
        theirs = tv.resized_crop(image, top, left, length, length, [side, side], antialias=True)
        assert (ours[position].float() - theirs).abs().max() <= 0.5 + 1e-3  # rounding, and nothing else
    if size == side:
        assert torch.equal(ours[0], pixels[0])


def test_boxes_are_what_random_resized_crop_draws() -> None:
    boxes = torch.cat([draw_boxes(0, 1, number, 50, 32) for number in range(200)])
    top, left, side = boxes.T
    assert side.min() == 9 and side.max() == 32  # sqrt(0.08) of 32 is 9.05
    assert (top + side).max() == 32 == (left + side).max() and top.min() == 0 == left.min()
    assert float((side.double() ** 2).mean()) / 32**2 == pytest.approx(0.54, abs=0.01)  # the area is uniform
    free = 32 - side
    assert float((top[free > 0] / free[free > 0]).mean()) == pytest.approx(0.5, abs=0.01)
    assert np.corrcoef(top[free > 8], left[free > 8])[0, 1] < 0.4  # both grow with the room, and are drawn apart


def test_a_box_depends_on_seed_class_and_image_alone() -> None:
    five = draw_boxes(7, 1, 3, 5, 32)
    assert torch.equal(draw_boxes(7, 1, 3, 9, 32)[:5], five)
    for other in ((8, 1, 3), (7, 2, 3), (7, 1, 4)):
        assert not torch.equal(draw_boxes(*other, 5, 32), five)


def test_padding_is_zero_after_normalisation() -> None:
    known, patches = observer(11), torch.rand(4, 3, 5, 5)
    padded = known.prepare(pad_to(patches, 11, known.mean))
    normalised = (patches - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(padded, F.pad(normalised, (3, 3, 3, 3)), atol=1e-6, rtol=0)
    even = pad_to(patches, 8, (0.0, 0.0, 0.0))
    assert torch.equal(even, F.pad(patches, (1, 2, 1, 2)))  # RDED: the smaller half comes first


# --- ranking


@torch.no_grad()
@pytest.mark.parametrize("factor", [1, 2])
def test_ranking_is_the_formula_worked_by_hand(factor: int) -> None:
    data, known, label = dataset(), observer(), 1
    ranked = rank(data, label, ipc=2, factor=factor, mipc=9)
    members = (data.labels == label).nonzero().flatten()
    images = np.sort(numpy_generator(0, "rded images", label).permutation(12)[:9])
    best = []
    for number in images:
        found = []
        for which, (top, left, length) in enumerate(draw_boxes(0, label, int(number), 5, 16).tolist()):
            image = data.pixels[members[number]].float()
            patch = tv.resized_crop(image, top, left, length, length, [16 // factor] * 2, antialias=True).round()
            normalised = (patch / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
            room = 16 - 16 // factor
            logits = known.classifier(F.pad(normalised, (room // 2, room - room // 2) * 2)[None])[0].double()
            loss = float(torch.logsumexp(logits, 0) - logits[label])  # -log softmax(logits)[y]
            found.append((loss, int(number) * 5 + which, patch.to(torch.uint8)))
        best.append(min(found, key=lambda one: one[:2]))
    best.sort(key=lambda one: one[:2])
    wanted = best[: 2 * factor**2]
    assert ranked.candidates.numbers[ranked.kept].tolist() == [number for _, number, _ in wanted]
    losses = ranked.candidates.scores.loss[ranked.kept].tolist()
    assert losses == pytest.approx([loss for loss, *_ in wanted], abs=1e-5)
    assert torch.equal(ranked.patches[ranked.kept], torch.stack([patch for *_, patch in wanted]))
    assert len(ranked.candidates) == 9


def test_a_class_does_not_depend_on_the_others_nor_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset()
    whole = rank(data, 1)
    alone = ImageDataset(data.pixels[data.labels == 1], torch.ones(12, dtype=torch.int64), NAMES, "b", "train", "b")
    assert torch.equal(rank(alone, 1).patches, whole.patches)
    monkeypatch.setattr("ddgen.distill.rded.BATCH_SIZE", 7)
    small = rank(data, 1)
    assert torch.equal(small.patches, whole.patches) and torch.equal(small.kept, whole.kept)
    assert not torch.equal(rank(data, 1, seed=1).patches, whole.patches)


def test_a_larger_mipc_takes_all_that_a_smaller_one_takes() -> None:
    def numbers(mipc: int) -> set[int]:
        drawn = plan_crops(100, class_name="a", label=2, ipc=5, factor=1, mipc=mipc, num_crop=5, seed=0).numbers
        assert drawn.tolist() == sorted(set(drawn.tolist()))
        return set(drawn.tolist())

    assert len(numbers(20)) == 20 and numbers(20) < numbers(50) and numbers(300) == set(range(100))


def test_a_small_class_gives_further_crops_of_its_images() -> None:
    """Three images for 8 crops: the best of each first, then the second best, then two of the third best."""
    ranked = rank(dataset(), 2, ipc=2, factor=2, num_crop=2)
    numbers = ranked.candidates.numbers[ranked.kept]
    assert len(numbers) == 8 == len(set(numbers.tolist()))
    assert [sorted(set((numbers[i : i + 3] // 3).tolist())) for i in (0, 3)] == [[0, 1, 2], [0, 1, 2]]
    losses = ranked.candidates.scores.loss
    for start, stop in ((0, 3), (3, 6), (6, 8)):
        part = losses[ranked.kept[start:stop]]
        assert torch.equal(part, part.sort().values)
    for image in range(3):  # three crops of each were needed, more than --num_crop
        own = losses[numbers_of(ranked, image)]
        assert len(own) == 3 and torch.equal(own, own.sort().values)


def numbers_of(ranked: RankedCrops, image: int) -> Tensor:
    return ranked.candidates.numbers // 3 == image


def test_plans_refuse_what_cannot_be_filled() -> None:
    plan: dict[str, Any] = {"class_name": "cat", "label": 0, "num_crop": 5, "seed": 0}
    with pytest.raises(UserError, match=r"--mipc 300: 100 images .* need 400 images of each class; give --mipc 400"):
        plan_crops(500, ipc=100, factor=2, mipc=300, **plan)
    with pytest.raises(UserError, match="--data_dir: class cat has no training images"):
        plan_crops(0, ipc=1, factor=1, mipc=300, **plan)
    assert plan_crops(40, ipc=100, factor=2, mipc=300, **plan).kept_crops == 10


def test_losses_stay_finite_where_a_probability_underflows() -> None:
    ranked = rank(dataset(), by=observer(gain=1e5))
    assert torch.isfinite(ranked.candidates.scores.loss).all() and ranked.candidates.scores.loss.max() > 1e3
    with pytest.raises(UserError, match="logits are not finite"):
        rank(dataset(), by=observer(gain=float("inf")))


def test_any_rule_ranks_the_crops() -> None:
    data = dataset()
    ranked = rank(data, rule="random")
    by_number = ranked.candidates.numbers.argsort()
    assert ranked.kept.tolist() == by_number[select_random(12, 4, 0, 0)].tolist()
    assert rank(data, rule="middle").kept.tolist() != rank(data).kept.tolist()
    assert len(set(rank(data, 2, ipc=5, rule="diverse-realism").kept.tolist())) == 5


def test_only_the_images_of_a_block_are_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk:
        """Pixels that count what is read of them."""

        def __init__(self, pixels: Tensor) -> None:
            self.pixels, self.shape, self.read = pixels, pixels.shape, []  # type: ignore[var-annotated]

        def __getitem__(self, index: Tensor) -> Tensor:
            self.read.append(len(index))
            return self.pixels[index]

    data = dataset((40, 12, 3))
    disk = Disk(data.pixels)
    object.__setattr__(data, "pixels", disk)
    monkeypatch.setattr("ddgen.distill.rded.BATCH_SIZE", 50)
    monkeypatch.setattr("ddgen.observer.realism.REAL_IMAGES", 8)
    rank(data, mipc=25)
    assert disk.read == [8, 10, 10, 5]


# --- the observer's side


def test_one_pass_gives_logits_and_features() -> None:
    known, pixels = observer(), noise(10)
    logits, features = predict_both(known, to_images01(pixels, CPU), device=CPU, precision="no")
    for what, found in (("logits", logits), ("features", features)):
        alone = predict_pixels(known, pixels, what=what, batch_size=4, device=CPU, precision="no")  # type: ignore[arg-type]
        torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)
    scores = realism_scores(known, pixels, torch.ones(10).long(), batch_size=4, device=CPU, precision="no")
    other = realism_scores(known, pixels, torch.ones(10).long(), batch_size=10, device=CPU, precision="no")
    torch.testing.assert_close(scores.loss, other.loss, atol=1e-6, rtol=0)
    assert torch.equal(scores.predicted, other.predicted)
    assert scores.features is not None and other.features is not None
    torch.testing.assert_close(scores.features, features, atol=1e-6, rtol=0)


def test_real_scores_are_of_the_class_alone() -> None:
    data = dataset((REAL_IMAGES + 40, 5, 3))
    many = real_class_scores(observer(), data, 0, 0, device=CPU, precision="no")
    few = real_class_scores(observer(), data, 2, 0, device=CPU, precision="no")
    assert len(many) == REAL_IMAGES and len(few) == 3
    expected = realism_scores(
        observer(), data.pixels[data.labels == 2], torch.full((3,), 2), batch_size=3, device=CPU, precision="no"
    )
    torch.testing.assert_close(few.loss, expected.loss, atol=1e-6, rtol=0)


# --- grids


def flat(values: list[int], side: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, side, side).contiguous()


def test_grids_by_hand() -> None:
    assert torch.equal(compose(noise(3), 1, 16), noise(3))
    # patch k * 2 + i goes to cell k of image i
    two = compose(flat(list(range(8)), 2), 2, 4)
    assert two.shape == (2, 3, 4, 4)
    assert two[0, 1].tolist() == [[0, 0, 2, 2], [0, 0, 2, 2], [4, 4, 6, 6], [4, 4, 6, 6]]
    assert two[1, 1].tolist() == [[1, 1, 3, 3], [1, 1, 3, 3], [5, 5, 7, 7], [5, 5, 7, 7]]
    # 8 pixels for three cells: 3, 3 and 2, into which patches of 2 pixels are resized
    three = compose(flat([10 * i for i in range(9)], 2), 3, 8)
    assert three[0, 0, 0].tolist() == [0, 0, 0, 10, 10, 10, 20, 20]
    assert three[0, 0, :, 0].tolist() == [0, 0, 0, 30, 30, 30, 60, 60]
    with pytest.raises(ValueError, match="7 patches"):
        compose(flat(list(range(7)), 2), 2, 4)


def test_whole_candidates_are_resized_into_their_cells() -> None:
    images = noise(4)
    grid = compose(images, 2, 16)
    expected = tv.resize(images.float(), [8, 8], antialias=True).round().to(torch.uint8)
    assert torch.equal(grid[0, :, :8, 8:], expected[1]) and torch.equal(grid[0, :, 8:, :8], expected[2])


@pytest.mark.parametrize(("size", "factor"), [(32, 3), (32, 2), (17, 4), (16, 1)])
def test_students_shuffle_the_cells_that_were_composed(size: int, factor: int) -> None:
    edges = cell_edges(size, factor)
    lengths = np.diff(edges).tolist()
    assert (edges[0], edges[-1]) == (0, size) and lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1
    grid = compose(flat(list(range(factor**2)), size // factor), factor, size).float()
    shuffled = shuffle_patches(grid, factor, np.random.default_rng(3))[0, 0]
    for value in range(factor**2):
        rows, columns = (shuffled == value).nonzero(as_tuple=True)
        assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)  # still in one piece


def test_evaluation_trains_grids_as_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factors: list[int] = []

    def student(job: Job, *args: Any, **settings: Any) -> StudentResult:
        factors.append(job.images.factor)
        return train_student(job, *args, **settings)

    monkeypatch.setattr("ddgen.evaluation.cells.train_student", student)
    data, labels = dataset((4, 4, 4)), torch.arange(3).repeat_interleave(2)
    for factor in (1, 2, 2):
        distilled = DistilledDataset(
            pixels=noise(6, seed=5),
            labels=labels,
            soft_labels=torch.full((6, 3), 1 / 3).half(),
            realism=torch.ones(6),
            seeds=torch.zeros(6, dtype=torch.int64),
            indices=torch.arange(6),
            class_names=NAMES,
            provenance={"factor": factor} if factor > 1 else {},
        )
        evaluate_students(
            Request(
                rounds=[distilled], train=data, test=data, observers=[], students=["convnet2"], protocols=["hard"],
                baselines=["random-real"], repeats=1, epochs=1, seed=0, device=CPU, precision="no",
                output_dir=tmp_path, progress=False,
            )
        )  # fmt: skip
    # distilled and random real; the latter is known by the second time, and all by the third
    assert factors == [1, 1, 2]


def test_the_baseline_is_drawn_anew_for_every_student_and_once_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, labels = dataset(), torch.tensor([0, 0, 1, 1, 1, 2])
    judged = DistilledDataset(
        pixels=noise(6), labels=labels, soft_labels=torch.full((6, 3), 1 / 3).half(), realism=torch.ones(6),
        seeds=torch.zeros(6, dtype=torch.int64), indices=torch.arange(6), class_names=NAMES, provenance={"factor": 2},
    )  # fmt: skip

    def source(judged: DistilledDataset = judged, known: Observer | None = None, seed: int = 3) -> Source:
        (found,) = baseline_sources(
            ["rded-real"], judged, None, data, known or observer(), seed=seed, device=CPU, precision="no",
            cache_dir=tmp_path, progress=False,
        )  # fmt: skip
        return found

    drawn = [source().draw(repeat) for repeat in (0, 1)]
    assert source().name == "rded real" and not torch.equal(drawn[0].pixels, drawn[1].pixels)
    for repeat, images in enumerate(drawn):
        assert images.labels.tolist() == labels.tolist() and images.factor == 2
        ranked = rank(data, 1, ipc=3, factor=2, seed=derive(3, "repeat", repeat))
        assert torch.equal(images.pixels[2:5], compose(ranked.patches[ranked.kept], 2, 16))
    other = observer()
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    whole = replace(judged, provenance={"factor": 1})
    fewer = replace(judged, **{name: getattr(judged, name)[1:] for name in
                               ("pixels", "labels", "soft_labels", "realism", "seeds", "indices")})  # fmt: skip
    for changed in (source(whole), source(fewer), source(known=other), source(seed=4)):
        changed.draw(0)  # is not taken for what was drawn before
    assert len(list(tmp_path.iterdir())) == 2 + 4
    monkeypatch.setattr("ddgen.evaluation.sources.rded_real", lambda *args, **settings: pytest.fail("ranked again"))
    assert all(torch.equal(source().draw(repeat).pixels, drawn[repeat].pixels) for repeat in (0, 1))


def test_teachers_that_were_stopped_early_do_not_choose_the_baselines(tmp_path: Path) -> None:
    trained, stopped_early = observer(), observer(gain=-3.0)
    judged = DistilledDataset(
        pixels=noise(6), labels=torch.arange(3).repeat_interleave(2), soft_labels=torch.full((6, 3), 1 / 3).half(),
        realism=torch.ones(6), seeds=torch.zeros(6, dtype=torch.int64), indices=torch.arange(6), class_names=NAMES,
        provenance={},
    )  # fmt: skip

    def drawn(teacher: Observer, ranker: Observer | None) -> Tensor:
        request = Request(
            rounds=[judged], train=dataset(), test=dataset(), observers=[teacher], students=["convnet2"],
            protocols=["rded"], baselines=["rded-real"], repeats=1, epochs=1, seed=0, device=CPU, precision="no",
            output_dir=tmp_path, ranker=ranker, progress=False,
        )  # fmt: skip
        return make_sources(request)[1].draw(0).pixels

    assert torch.equal(drawn(stopped_early, trained), drawn(trained, None))
    assert not torch.equal(drawn(stopped_early, trained), drawn(stopped_early, None))


# --- the command


DIGITS = ["--dataset", "digits", "--image_size", "16", "--num_classes", "3", "--mixed_precision", "no"]


@pytest.fixture(scope="module")
def digits_observer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("observer") / "digits"
    train = ["--observer_network", "convnet2", "--observer_epochs", "3", "--observer_learning_rate", "0.05"]
    assert cli.main(["observer", *DIGITS, *train, "--observer_batch_size", "32", "--output_dir", str(path)]) == 0
    return str(path)


def run(digits_observer: str, path: Path, *extra: str) -> int:
    given = ["--observer", digits_observer, "--output_dir", str(path), "--mipc", "20"]
    return cli.main(["distill", "--source", "real", *DIGITS, *given, *extra])


def test_the_command_writes_a_dataset_that_evaluate_reads(
    digits_observer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], forget_accelerator: Callable[[], None]
) -> None:
    assert run(digits_observer, tmp_path / "two", "--ipc", "3", "--factor", "2") == 0
    out = capsys.readouterr().out
    assert "300 crops in" in out and "selection realism" in out and "as many at random" in out
    distilled = DistilledDataset.load(tmp_path / "two")
    assert distilled.pixels.shape == (9, 3, 16, 16) and distilled.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert distilled.factor == 2 and distilled.provenance["source"] == "real"
    assert len(set(distilled.indices[:3].tolist())) == 3
    selection = distilled.provenance["selection"]
    assert selection["candidates"] == 60 and selection["crops"] == 300 and selection["kept_per_class"] == [12, 12]
    assert selection["mean_realism_loss_kept"] < selection["mean_realism_loss_pool"]
    # the labels are of the grids, not of the crops
    known = Observer.load(digits_observer)
    scores = realism_scores(known, distilled.pixels, distilled.labels, batch_size=9, device=CPU, precision="no")
    torch.testing.assert_close(distilled.realism, scores.loss)
    torch.testing.assert_close(distilled.soft_labels.float(), scores.logits.softmax(1), atol=1e-3, rtol=0)
    card = (tmp_path / "two" / "README.md").read_text()
    assert (
        "generated" not in card.lower() and "](selection.png)" in card and "Each shows 4 crops of real images" in card
    )
    assert "synthetic" not in card and "diffusion" not in card
    assert "selection.png" in json.loads((tmp_path / "two" / "manifest.json").read_text())["files"]
    forget_accelerator()
    evaluate = ["--distilled_dir", str(tmp_path / "two"), "--observer", digits_observer, "--epochs", "1"]
    assert cli.main(["evaluate", *DIGITS, *evaluate, "--repeats", "1", "--output_dir", str(tmp_path / "scores")]) == 0
    out = capsys.readouterr().out
    assert "distilled" in out and "rded real" in out
    forget_accelerator()
    assert cli.main(["evaluate", *DIGITS, *evaluate, "--repeats", "2", "--output_dir", str(tmp_path / "scores")]) == 2
    assert "students that are trained already stay" in capsys.readouterr().err


def test_the_next_command_it_names_runs(
    digits_observer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], forget_accelerator: Callable[[], None]
) -> None:
    assert run(digits_observer, tmp_path / "two", "--ipc", "2") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next:")]
    words = shlex.split(line.removeprefix("next:"))
    assert words[:2] == ["python", "evaluate.py"]
    forget_accelerator()
    assert cli.main(["evaluate", *words[2:], "--mixed_precision", "no", "--dry_run"]) == 0
    assert "dry run: convnet2 x rded, hard x 3" in capsys.readouterr().out


def test_an_observer_alone_is_a_run_and_several_label_together(
    digits_observer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["distill", "--run_dir", digits_observer, "--ipc", "2", "--mipc", "20", "--mixed_precision", "no"]
    path, early = tmp_path / "alone", epoch_dir(Path(digits_observer), 1)
    assert cli.main([*settings, "--output_dir", str(path)]) == 0
    assert f"evaluate.py --distilled_dir {path} --run_dir {digits_observer}" in capsys.readouterr().out
    alone, known, young = DistilledDataset.load(path), Observer.load(digits_observer), Observer.load(early)
    with torch.no_grad():
        said = [observer(alone.pixels / 255).softmax(1) for observer in (known, young)]
    for name, extra, expected in (
        ("both", ["--observer", digits_observer, str(early)], (said[0] + said[1]) / 2),
        ("early", ["--teacher_epoch", "1"], said[1]),
    ):
        assert cli.main([*settings, *extra, "--output_dir", str(tmp_path / name)]) == 0
        found = DistilledDataset.load(tmp_path / name)
        assert torch.equal(found.pixels, alone.pixels)  # ranked by the same
        torch.testing.assert_close(found.soft_labels, expected.half(), rtol=0, atol=2e-3)
        assert not torch.equal(found.soft_labels, alone.soft_labels)


def test_the_baseline_is_what_the_command_makes(digits_observer: str, tmp_path: Path) -> None:
    assert run(digits_observer, tmp_path / "two", "--ipc", "3", "--factor", "2", "--mipc", "300", "--seed", "5") == 0
    distilled, known = DistilledDataset.load(tmp_path / "two"), Observer.load(digits_observer)
    data = load_dataset(DataConfig(dataset="digits", image_size=16, num_classes=3), "train")
    pixels, labels = rded_real(data, [3, 3, 3], 2, known, 5, device=CPU, precision="no", progress=False)
    assert torch.equal(pixels, distilled.pixels) and torch.equal(labels, distilled.labels)
    uneven, labels = rded_real(data, [3, 0, 1], 2, known, 5, device=CPU, precision="no", progress=False)
    assert torch.equal(uneven[:3], pixels[:3]) and labels.tolist() == [0, 0, 0, 2]


def test_the_same_command_gives_the_same_bytes_and_another_rule_others(
    digits_observer: str, tmp_path: Path, forget_accelerator: Callable[[], None]
) -> None:
    for name, extra in (("a", []), ("b", []), ("c", ["--selection", "diverse-realism"]), ("d", ["--seed", "1"])):
        forget_accelerator()
        assert run(digits_observer, tmp_path / name, "--ipc", "4", *extra) == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) >= 12 + 7
    for name in files:
        if name.name not in ("README.md", "manifest.json"):  # they name the command, which names the folder
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    a, c, d = (DistilledDataset.load(tmp_path / name) for name in "acd")
    assert not torch.equal(a.indices, c.indices) and not torch.equal(a.pixels, d.pixels)
    assert "chose by the rule diverse-realism" in (tmp_path / "c" / "README.md").read_text()
    # uncomposed images are crops of the class's real images, ranked
    assert a.realism[:4].tolist() == sorted(a.realism[:4].tolist())


def test_small_classes_are_told(digits_observer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(digits_observer, tmp_path / "x", "--ipc", "200", "--mipc", "200", "--num_crop", "2") == 0
    assert "images for 200 crops: up to 2 crops of the same image are kept, of 2 each" in capsys.readouterr().out
    distilled = DistilledDataset.load(tmp_path / "x")
    pairs = list(zip(distilled.labels.tolist(), distilled.indices.tolist(), strict=True))
    assert len(pairs) == 600 == len(set(pairs))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--ipc", "10", "--factor", "2"],
            "--mipc 20: 10 images per class of 2 x 2 crops need 40 images of each class",
        ),
        (["--factor", "5"], "--factor 5: crops of 16 px images would be under 4 pixels"),
        (["--factor", "0"], "--factor 0: give 1 or more"),
        (["--selection", "best"], "realism"),
    ],
)
def test_mistakes_are_told_in_one_line(
    digits_observer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert run(digits_observer, tmp_path / "x", *extra) == 2
    complaints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ddgen: ")]
    assert len(complaints) == 1 and message in complaints[0]
    assert not (tmp_path / "x").exists()


def test_what_is_missing_or_in_the_way_is_told(
    digits_observer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], forget_accelerator: Callable[[], None]
) -> None:
    assert run(digits_observer, tmp_path / "x", "--dry_run") == 0
    assert "dry run: 300 crops of 60 real images" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()
    (tmp_path / "x").mkdir()
    assert run(digits_observer, tmp_path / "x") == 2
    assert "--output_dir" in capsys.readouterr().err
    forget_accelerator()
    assert cli.main(["distill", *DIGITS, "--output_dir", str(tmp_path / "y")]) == 2
    assert "--observer: not set; train one with python -m ddgen observer --dataset digits" in capsys.readouterr().err
