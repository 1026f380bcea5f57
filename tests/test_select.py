"""Selection rules: each by hand, and what all of them promise; what the report says of them."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import typing

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddgen.config import Selection
from ddgen.distill.select import Candidates, select, select_most_realistic, select_random, selection_needs
from ddgen.distill.selection_report import (
    COMPARED_CLASSES,
    ClassReport,
    SelectionReport,
    compared_classes,
    report_class,
)
from ddgen.errors import UserError
from ddgen.evaluation.neighbours import compare_supports
from ddgen.observer.realism import RealismScores
from ddgen.observer.supports import coverage, mean_distance

RULES: tuple[Selection, ...] = typing.get_args(Selection)
NESTED: tuple[Selection, ...] = (
    "realism",
    "random",
    "confident-correct",
    "least-confident-correct",
    "middle",
    "herding",
    "k-center",
)


def scores(losses: object, correct: object = None, features: object = None) -> RealismScores:
    """Scores in class 0 of two; the logits play no part."""
    loss = torch.as_tensor(losses, dtype=torch.float32)
    named = torch.ones(len(loss), dtype=torch.bool) if correct is None else torch.as_tensor(correct, dtype=torch.bool)
    found = None if features is None else torch.as_tensor(features, dtype=torch.float32)
    return RealismScores(loss, (~named).long(), torch.zeros(len(loss), 2), found)


def candidates(found: RealismScores, real: RealismScores | None = None, seed: int = 0) -> Candidates:
    return Candidates(found, torch.arange(len(found)), 0, seed, real)


def drawn(seed: int, m: int = 40, r: int = 60) -> Candidates:
    """Candidates as they come: some equal in loss, some in features too, some named wrongly."""
    rng = np.random.default_rng(seed)
    losses = rng.exponential(size=m).round(1)
    features = rng.normal(size=(m, 5)).round(1)
    features[1], losses[1] = features[0], losses[0]
    real = scores(rng.exponential(size=r), features=rng.normal(size=(r, 5)))
    return candidates(scores(losses, rng.random(m) < 0.7, features), real, seed)


def kept(rule: Selection, found: Candidates, ipc: int) -> list[int]:
    return select(rule, found, ipc).tolist()


# --- what every rule promises


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_the_quota_is_filled_no_image_twice_whatever_the_order(rule: Selection, seed: int) -> None:
    found = drawn(seed)
    for ipc in (1, 7, 20, len(found)):
        chosen = kept(rule, found, ipc)
        assert len(chosen) == ipc == len(set(chosen)) and set(chosen) <= set(range(len(found)))
        assert chosen == kept(rule, found, ipc)
        shuffle = torch.from_numpy(np.random.default_rng(seed + 100).permutation(len(found)))
        assert shuffle[select(rule, found.rows(shuffle), ipc)].tolist() == chosen


@pytest.mark.parametrize("rule", NESTED)
def test_a_larger_ipc_keeps_all_that_a_smaller_one_keeps(rule: Selection) -> None:
    found = drawn(5)
    assert kept(rule, found, 25)[:10] == kept(rule, found, 10)


@pytest.mark.parametrize("rule", RULES)
def test_numbers_that_do_not_start_at_zero_and_equal_candidates(rule: Selection) -> None:
    same = scores([0.5] * 6, features=[[1.0, 1.0]] * 6)
    found = Candidates(same, torch.tensor([50, 40, 30, 20, 10, 60]), 0, 0, scores([0.5] * 6, features=[[1.0, 1.0]] * 6))
    numbers = found.numbers[select(rule, found, 6)].tolist()
    assert sorted(numbers) == [10, 20, 30, 40, 50, 60]
    if rule in ("realism", "confident-correct", "least-confident-correct", "herding", "k-center", "diverse-realism"):
        assert numbers == [10, 20, 30, 40, 50, 60]  # nothing but the number tells them apart


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_asks_for_no_more_than_it_says(rule: Selection) -> None:
    needs, whole = selection_needs(rule), drawn(1)
    assert whole.real is not None
    features = whole.scores.features if needs.features else None
    real = dataclasses.replace(whole.real, features=whole.real.features if needs.features else None)
    bare = dataclasses.replace(
        whole, scores=dataclasses.replace(whole.scores, features=features), real=real if needs.real else None
    )
    assert kept(rule, bare, 9) == kept(rule, whole, 9)
    if needs.real:
        with pytest.raises(ValueError, match=f"{rule}: needs the scores of real images"):
            select(rule, dataclasses.replace(whole, real=None), 9)
    if needs.features:
        with pytest.raises(ValueError, match=f"{rule}: needs features"):
            select(rule, dataclasses.replace(whole, scores=dataclasses.replace(whole.scores, features=None)), 9)


def test_what_cannot_be_selected_from_is_refused() -> None:
    found = drawn(0, m=4)
    with pytest.raises(UserError, match="--ipc 5: only 4 candidates of a class; raise --candidates_per_image"):
        select("middle", found, 5)
    with pytest.raises(UserError, match="--ipc 0"):
        select("middle", found, 0)
    with pytest.raises(ValueError, match="loss is not finite"):
        select("random", candidates(scores([0.1, math.nan])), 1)
    with pytest.raises(ValueError, match="feature is not finite"):
        select("k-center", candidates(scores([0.1, 0.2], features=[[0.0], [math.inf]])), 1)
    with pytest.raises(ValueError, match="have the same"):
        select("realism", dataclasses.replace(found, numbers=torch.tensor([0, 1, 1, 2])), 1)


# --- the rules


def test_realism_and_random_are_the_functions_of_the_baseline() -> None:
    found = drawn(3)
    shuffle = torch.from_numpy(np.random.default_rng(0).permutation(len(found)))
    moved = found.rows(shuffle)
    assert kept("realism", moved, 9) == select_most_realistic(moved.scores.loss, 9, moved.numbers).tolist()
    assert moved.numbers[select("random", moved, 9)].tolist() == select_random(len(found), 9, 3, 0).tolist()


def test_correctness_rules_by_hand() -> None:
    found = candidates(scores([0.7, 0.2, 0.9, 0.5, 0.3], correct=[True, False, True, True, False]))
    assert kept("confident-correct", found, 3) == [3, 0, 2]
    assert kept("least-confident-correct", found, 3) == [2, 0, 3]
    # three are named rightly, so the others fill up by realism
    assert kept("confident-correct", found, 5) == [3, 0, 2, 1, 4]
    assert kept("least-confident-correct", found, 5) == [2, 0, 3, 1, 4]


def test_the_middle_by_hand() -> None:
    assert kept("middle", candidates(scores([0.5, 0.1, 0.4, 0.2, 0.3])), 5) == [4, 3, 2, 1, 0]
    assert kept("middle", candidates(scores([0.4, 0.1, 0.3, 0.2])), 3) == [3, 2, 1]


def test_difficulty_match_by_hand() -> None:
    real = scores(np.exp([0.0, 1.0, 2.0, 3.0, 4.0]))  # log losses whose quarters are at 1 and 3
    found = candidates(scores(np.exp([9.0, 2.9, 2.0, 1.2, 0.9, -9.0])), real)
    assert kept("difficulty-match", found, 2) == [4, 1]
    assert kept("difficulty-match", found, 1) == [2]


@pytest.mark.parametrize("seed", range(4))
def test_difficulty_match_is_the_best_of_all_choices(seed: int) -> None:
    found = drawn(seed, m=9, r=15)
    assert found.real is not None
    log = np.log(np.maximum(found.scores.loss.double().numpy(), 1e-6))
    wanted = np.quantile(np.log(np.maximum(found.real.loss.double().numpy(), 1e-6)), [1 / 8, 3 / 8, 5 / 8, 7 / 8])
    # on a line, the cheapest matching pairs the sorted with the sorted

    def cost(chosen: typing.Iterable[int]) -> float:
        return float(np.abs(np.sort(log[list(chosen)]) - wanted).sum())

    best = min(map(cost, itertools.combinations(range(9), 4)))
    assert cost(kept("difficulty-match", found, 4)) == pytest.approx(best, rel=1e-9)


def test_herding_by_hand() -> None:
    """The mean lies between east and north, nearer to east: w = (0.8, 0.6) takes 4, then what that lacks."""
    east, north, west, between, south = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.8, 0.6), (0.0, -1.0)
    real = scores([0.0] * 1, features=[(1.6, 1.2)])  # its length does not matter
    found = candidates(scores([0.0] * 5, features=[east, north, west, south, between]), real)
    # w: (0.8, 0.6) -> 4; (0.8, 0.6) -> 0; (0.6, 1.2) -> 1; (1.4, 0.8): 2 gives -1.4 and 3 gives -0.8
    assert kept("herding", found, 5) == [4, 0, 1, 3, 2]


def test_herding_keeps_the_mean_better_than_chance() -> None:
    found = drawn(2, m=100)
    assert found.scores.features is not None and found.real is not None and found.real.features is not None
    unit = torch.nn.functional.normalize(found.scores.features, dim=1)
    mean = torch.nn.functional.normalize(found.real.features, dim=1).mean(0)

    def error(positions: Tensor) -> float:
        return float((unit[positions].mean(0) - mean).norm())

    ours = error(select("herding", found, 10))
    assert ours < 0.6 * min(error(select_random(100, 10, seed, 0)) for seed in range(20))


def test_k_center_by_hand() -> None:
    """On a line: 2 is nearest to the mean 4.8, 11 farthest from 2, then 0; 1 and 10 are as far, and 1 comes first."""
    found = candidates(scores([0.0] * 5, features=[[0.0], [1.0], [2.0], [10.0], [11.0]]))
    assert kept("k-center", found, 5) == [2, 4, 0, 1, 3]


@pytest.mark.parametrize("seed", range(3))
def test_k_center_leaves_no_candidate_farther_than_twice_the_best(seed: int) -> None:
    found = drawn(seed, m=12)
    distance = torch.cdist(*[found.scores.features.double()] * 2)  # type: ignore[union-attr]

    def radius(chosen: typing.Iterable[int]) -> float:
        return float(distance[:, list(chosen)].min(dim=1).values.max())

    assert radius(kept("k-center", found, 4)) <= 2 * min(map(radius, itertools.combinations(range(12), 4)))


def test_diverse_realism_takes_the_best_of_both_kinds() -> None:
    """Two kinds of real images; the easiest candidates are all of one kind, and the oddest is below the floor."""
    real = scores([0.1] * 10, features=[(1.0, 0.0)] * 6 + [(0.0, 1.0)] * 4)
    features = [(1.0, 0.0), (1.0, 0.1), (1.0, 0.2), (0.1, 1.0), (0.0, 1.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5)]
    losses = [0.1, 0.2, 0.3, 0.4, 0.35, 0.9, 0.8, 0.7]
    correct = [True, True, True, True, False, True, True, True]  # 4 would fit best, but passes for another class
    found = candidates(scores(losses, correct, features), real)
    assert kept("realism", found, 2) == [0, 1]
    assert kept("diverse-realism", found, 2) == [2, 0]  # the better half has no other kind: 0, 1, 2 and the wrong 4
    losses[3] = 0.25
    found = candidates(scores(losses, correct, features), real)
    # 2 stands for both kinds: 6 * 1.98 + 4 * 1.20 is the largest sum; then 3, which it is far from
    assert kept("diverse-realism", found, 2) == [2, 3]
    # the better half has four that are named rightly; the next of these, 7, joins where five are wanted
    assert set(kept("diverse-realism", found, 5)) == {0, 1, 2, 3, 7}


@pytest.mark.parametrize("seed", range(3))
def test_diverse_realism_reaches_what_greedy_must(seed: int) -> None:
    found = drawn(seed, m=20)
    assert found.scores.features is not None and found.real is not None and found.real.features is not None
    half = set(found.scores.loss.argsort(stable=True)[:10].tolist())
    above = [i for i in range(20) if i in half and found.scores.predicted[i] == 0]
    assert len(above) > 3
    unit = torch.nn.functional.normalize
    similarity = 1 + unit(found.real.features.double(), dim=1) @ unit(found.scores.features.double(), dim=1).T

    def value(chosen: typing.Iterable[int]) -> float:
        return float(similarity[:, list(chosen)].max(dim=1).values.sum())

    ours = kept("diverse-realism", found, 3)
    assert set(ours) <= set(above)
    best = max(map(value, itertools.combinations(above, 3)))
    assert (1 - 1 / math.e) * best <= value(ours) <= best + 1e-9
    assert value(ours) > value(above[:3]) or value(above[:3]) == pytest.approx(best)


# --- the report


def test_coverage_is_that_of_the_curve_and_needs_few_points() -> None:
    generator = torch.Generator().manual_seed(0)
    real, other = torch.randn(80, 4, generator=generator), 0.5 * torch.randn(30, 4, generator=generator)
    assert coverage(real, other) == compare_supports(real, other)["coverage"]
    line = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # reach to the farthest: 10, 9, 8, 10
    assert coverage(line, torch.tensor([[10.5]])) == 1 / 4
    assert coverage(line, torch.tensor([[10.0]])) == 1.0
    assert mean_distance(line) == pytest.approx((1 + 2 + 10 + 1 + 9 + 8) / 6)
    assert mean_distance(line[:1]) is None


def test_the_report_by_hand() -> None:
    real = scores([0.5, 1.5, 1.0], [True, False, True], [[0.0], [1.0], [2.0]])
    first = candidates(scores([0.1, 0.3, 0.8], [True, True, False], [[0.0], [3.0], [9.0]]), real)
    second = dataclasses.replace(candidates(scores([1.0, 2.0], features=[[0.0], [1.0]])), class_index=1)
    classes = [report_class(first, torch.tensor([1, 0])), report_class(second, torch.tensor([0, 1]))]
    report = SelectionReport("middle", ("cat", "dog"), classes)  # of the second none is named: predicted is 0
    found = report.to_dict()
    assert found["rule"] == "middle" and found["candidates"] == 5 and found["kept_per_class"] == [2, 2]
    assert found["mean_realism_loss_kept"] == pytest.approx((0.2 + 1.5) / 2)
    assert found["mean_realism_loss_pool"] == pytest.approx((0.4 + 1.5) / 2)
    assert found["class_named_kept"] == 0.5 and found["class_named_pool"] == pytest.approx((2 / 3 + 0) / 2)
    assert (found["class_named_least"], found["class_named_least_class"]) == (0.0, "dog")
    table = found["table"]
    assert table["kept"]["distance"] == pytest.approx((3 + 1) / 2)
    assert table["all candidates"]["distance"] == pytest.approx((6 + 1) / 2)
    assert table["kept"]["coverage"] == 1.0 and found["compared_classes"] == 1
    assert table["real images"] == {
        "loss": 1.0,
        "class_named": 2 / 3,
        "distance": pytest.approx(4 / 3),
        "coverage": None,
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    lines = report.lines()
    assert lines[0].startswith("selection middle") and lines[-1].strip().startswith("2 kept of each class")
    assert [line.split()[-4:] for line in lines[1:2]] == [["0.850", "50.0%", "2.00", "100.0%"]]
    assert len({len(line) for line in lines[:-1]}) == 1


def test_the_random_column_is_the_random_baseline() -> None:
    found = drawn(4)
    report = SelectionReport("realism", ("cat",), [report_class(found, select("realism", found, 6))])
    expected = found.scores.loss[select_random(len(found), 6, 4, 0)].double().mean()
    assert report.to_dict()["table"]["as many at random"]["loss"] == pytest.approx(float(expected))


def test_the_picture_opens_and_is_the_same_again() -> None:
    def draw(ipc: int, with_real: bool) -> bytes:
        classes = []
        for seed in range(4):
            found = dataclasses.replace(drawn(seed), class_index=seed)
            found = found if with_real else dataclasses.replace(found, real=None)
            classes.append(report_class(found, select("realism", found, ipc)))
        # as processes that share the classes hand them over
        classes = [ClassReport.from_tensors(one.label, one.to_tensors()) for one in classes]
        return SelectionReport("realism", tuple("abcd"), classes).draw()

    data = draw(1, True)
    assert data == draw(1, True)
    with Image.open(io.BytesIO(data)) as wide, Image.open(io.BytesIO(draw(3, False))) as narrow:
        assert wide.width > 2.5 * narrow.width and wide.height == narrow.height


def test_real_images_are_scored_where_the_rule_or_the_report_looks() -> None:
    assert compared_classes("realism", 7) == list(range(7))
    few = compared_classes("k-center", 1000)
    assert len(set(few)) == COMPARED_CLASSES and (few[0], few[-1]) == (0, 999)
    assert compared_classes("herding", 1000) == list(range(1000))
