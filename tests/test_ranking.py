"""Rank correlation of candidates between a set and real training: statistics, the whole of it, what is told of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from evaluation_cases import CPU, colour_observer, colours
from test_report_page import Page

import evaluate as evaluate_command
from ddgen.data import ImageDataset
from ddgen.distill.dataset import DistilledDataset
from ddgen.errors import UserError
from ddgen.evaluation import cells, ranking
from ddgen.evaluation.evaluate import evaluate
from ddgen.evaluation.protocols import HARD, RDED, STORED, STRONG, Special
from ddgen.evaluation.rank_correlation import Correlation, Statistic, kendall, spearman, with_interval
from ddgen.evaluation.ranking import RankingPlan, compare, default_networks
from ddgen.evaluation.report import Results, format_table
from ddgen.evaluation.request import Request
from ddgen.observer.networks import build_network
from ddgen.page.ranking import ranking_parts

PLAN = RankingPlan(("convnet1w4", "convnet1w8", "convnet2w4"), (1.0, 10.0), 2)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- statistics


@pytest.mark.parametrize("levels", [4, 1000], ids=["ties", "none"])
def test_correlations_are_scipys(levels: int) -> None:
    a, b = rng(1).integers(0, levels, (2, 30, 9))
    b[:15] += a[:15]
    rho, tau = spearman(a, b), kendall(a, b)
    for row in range(30):
        assert rho[row] == pytest.approx(scipy.stats.spearmanr(a[row], b[row]).statistic, abs=1e-12)
        assert tau[row] == pytest.approx(scipy.stats.kendalltau(a[row], b[row]).statistic, abs=1e-12)


@pytest.mark.parametrize("statistic", [spearman, kendall])
def test_the_interval_is_scipys_percentile_bootstrap(statistic: Statistic) -> None:
    a = rng(2).normal(size=12)
    b = a + rng(3).normal(size=12)
    found = with_interval(statistic, a, b, rng(4), 500)
    reference = scipy.stats.bootstrap(
        (a, b), lambda x, y: float(statistic(x, y)), paired=True, vectorized=False, n_resamples=500,
        method="percentile", confidence_level=0.95, rng=rng(4),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert found.value == float(statistic(a, b)) and found.low is not None and found.low < found.value


def test_intervals_by_hand() -> None:
    one, two, equal = np.array([0.1, 0.2]), np.array([0.7, 0.3]), np.array([0.5, 0.5])
    # Half of the draws hold one candidate twice and have no correlation; the rest are the two in some order.
    assert with_interval(spearman, one, two, rng()) == Correlation(-1.0, -1.0, -1.0)
    assert with_interval(kendall, one, one, rng()) == Correlation(1.0, 1.0, 1.0)
    assert with_interval(kendall, one, equal, rng()) == Correlation(None, None, None)


def test_of_shuffled_accuracies_the_correlation_is_about_zero() -> None:
    real = np.linspace(0.2, 0.8, 12)
    found = [with_interval(spearman, rng(seed).permutation(real), real, rng(seed), 200) for seed in range(200)]
    values = [one.value for one in found if one.value is not None]
    # The standard error of one is 1 / sqrt(11), of the mean of 200 0.021.
    assert abs(np.mean(values)) < 0.06 and np.std(values) == pytest.approx(11**-0.5, abs=0.05)
    inside = [one.low < 0 < one.high for one in found if one.low is not None and one.high is not None]
    assert np.mean(inside) > 0.85
    far = with_interval(spearman, rng(0).permutation(2000) / 2000, np.arange(2000) / 2000, rng(0), 200)
    assert far.value == pytest.approx(0, abs=0.07)


# --- the whole


def distilled(dataset: ImageDataset) -> DistilledDataset:
    n = len(dataset)
    return DistilledDataset(
        pixels=dataset.pixels, labels=dataset.labels, soft_labels=F.one_hot(dataset.labels, 3).half(),
        realism=torch.zeros(n), seeds=torch.zeros(n, dtype=torch.int64), indices=torch.arange(n),
        class_names=dataset.class_names,
    )  # fmt: skip


def run(output_dir: Path, **changes: Any) -> Results:
    train = colours(6, "train")
    settings: dict[str, Any] = {
        "rounds": [distilled(train)], "train": train, "test": colours(20, "test"), "observers": [colour_observer()],
        "students": ("convnet1w8",), "protocols": ("rded",), "baselines": (), "repeats": 1, "epochs": 2, "seed": 0,
        "device": CPU, "precision": "no", "output_dir": output_dir, "ranking": PLAN, "progress": False,
    }  # fmt: skip
    return evaluate(Request(**{**settings, **changes}))


def test_identical_sets_give_one_and_finished_students_are_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run(tmp_path, baselines=("random-real",))
    assert "ranking: 6 candidates by rded, each on distilled, random real, full real: 18 students, about" in (
        capsys.readouterr().out
    )
    found = results.ranking
    assert found is not None and len(set(found.real_accuracies)) > 2 and found.teacher == "convnet1"
    assert [one.images for one in found.sets] == ["distilled", "random real"]  # the latter: the same in another order
    assert found.sets[0].accuracies == found.real_accuracies
    assert found.sets[0].spearman == found.sets[0].kendall == Correlation(1.0, 1.0, 1.0)
    assert found.real_accuracies[2] == found.sets[0].accuracies[2] == results.rows[0].scores[0]  # convnet1w8, rate x 1
    assert len(list((tmp_path / "cells").iterdir())) == 18  # and none of the two rows beside
    stored = json.loads((tmp_path / "results.json").read_text())["ranking"]
    assert stored["sets"][0]["spearman"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert stored["candidates"][3] == {"network": "convnet1w8", "lr_factor": 10.0}
    table = format_table(results)
    assert "of the test accuracies of 6 candidates" in table and "1.00 to 1.00" in table
    monkeypatch.setattr(cells, "train_student", lambda *args, **kwargs: pytest.fail("trained again"))
    assert run(tmp_path, baselines=("random-real",)) == results
    assert "18 students, 18 of them there already\n" in capsys.readouterr().out


def test_scores_are_what_they_are_without_a_ranking(tmp_path: Path) -> None:
    assert run(tmp_path / "a").rows[0].scores == run(tmp_path / "b", ranking=None).rows[0].scores
    assert "ranking" not in json.loads((tmp_path / "b" / "results.json").read_text())


def test_a_student_that_diverges_counts_as_chance(tmp_path: Path) -> None:
    plan = RankingPlan(("convnet1w4", "convnet1w8"), (1.0, 1e30), 2)
    results = run(tmp_path, protocols=("hard",), observers=[], ranking=plan)
    found = results.ranking
    assert found is not None and found.real_accuracies[1] == found.real_accuracies[3] == pytest.approx(1 / 3)
    assert found.diverged[0] == "convnet1w4, learning rate x 1e+30, on distilled" and len(found.diverged) == 4
    assert "convnet1w8, learning rate x 1e+30, on full real: the loss diverged, which counts as chance" in format_table(
        results
    )


def test_the_time_is_epochs_times_images_and_scorings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(ranking, "_time_batches", lambda job: (0.5, None))
    monkeypatch.setattr(ranking, "_time_steps", lambda job, batch: 3.0 if job.network == "convnet2w4" else 0.3)
    monkeypatch.setattr(ranking, "readable_seconds", lambda seconds: seen.append(seconds) or "x")
    run(tmp_path, epochs=4)
    # 18 images, for 4 epochs on the set and 2 on all; scored after every epoch, on 60 test images
    small, large = (18 * (0.5 + step) * (4 + 2) + (4 + 2) * 60 * step / 3 for step in (0.3, 3.0))
    assert seen == [pytest.approx(4 * small + 2 * large)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranking": replace(PLAN, lr_factors=(1.0, 1.0))}, "--rank_models: 3 candidates with --rank_lr_factors"),
        ({"ranking": replace(PLAN, networks=("a", "b", "c", "d"))}, "--rank_models a: unknown network"),
        ({"ranking": replace(PLAN, networks=("convnet9",) * 4, lr_factors=(1, 2, 3, 4))}, "--rank_models convnet9"),
        ({"protocols": ("stored", "hard")}, "--with_ranking: by the first of --protocols, stored, which needs"),
        ({"protocols": ("fixed-soft",), "observers": []}, "the baselines have no soft labels stored; give --observer"),
    ],
)  # fmt: skip
def test_refused_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(cells, "train_student", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(UserError) as error:
        run(tmp_path, **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_all_learning_rates_of_a_recipe_are_multiplied() -> None:
    special = replace(RDED, specials=(Special(dataset="x", learning_rate=2e-3), *RDED.specials))
    for recipe in (special, HARD, STRONG, STORED):
        assert recipe.times_learning_rate(1.0) is recipe
        for dataset in ("x", "cifar100", "digits"):
            for network in ("convnet3", "vgg11", "vit"):
                own, ten = (r.peak_learning_rate(dataset=dataset, network=network) for r in (recipe, recipe.times_learning_rate(10)))  # fmt: skip  # noqa: E501
                assert ten == pytest.approx(10 * own)
        batch = {"dataset": "cifar100", "network": "convnet3"}
        assert recipe.times_learning_rate(10).batch_size(10, 100, **batch) == recipe.batch_size(10, 100, **batch)


@pytest.mark.parametrize("size", [8, 16, 32, 64, 224])
def test_default_networks_fit_the_images(size: int) -> None:
    networks = default_networks(size)
    assert len(set(networks)) == 4
    for network in networks:
        build_network(network, 2, size)


# --- the page and the command


def test_the_page_draws_a_point_per_candidate_and_tells_everything() -> None:
    real = (0.2, 0.4, 0.6, 0.8)
    rising = compare("distilled", 300, (0.1, 0.2, 0.3, 0.4), real, 0)
    flat = compare("random real", 300, (0.3, 0.3, 0.3, 0.3), real, 0)
    found: dict[str, Any] = {
        "confidence": 0.95, "protocol": "rded", "teacher": "<o>", "real_epochs": 5, "real_accuracies": real,
        "candidates": [{"network": f"convnet{d}", "lr_factor": 0.1} for d in range(4)], "diverged": ["<vit>"],
        "sets": [json.loads(json.dumps(one, default=vars)) for one in (rising, flat)],
    }  # fmt: skip
    page = Page("".join(ranking_parts(found)))
    assert ["distilled", "300", "1.001.00 to 1.00", "1.001.00 to 1.00"] in page.rows
    assert ["random real", "300", "-", "-"] in page.rows and ["convnet2", "0.1", "60.0", "30.0", "30.0"] in page.rows
    assert "rded by <o>" in page.words and "<vit>: the loss diverged" in page.words and "5 epochs on all" in page.words
    points = [(float(str(c["cx"])), float(str(c["cy"]))) for c in page.named("circle")]
    assert len(points) == 8
    across, up = zip(*points[:4], strict=True)
    assert np.ptp(np.diff(across)) < 0.2 and np.ptp(np.diff(up)) < 0.2 and across[0] < across[3] and up[0] > up[3]
    assert {y for _, y in points[4:]} == {points[2][1]}  # 30 percent, on the same axis
    assert all(0 < x < 240 and 0 < y < 240 for x, y in points)
    middles = [float(str(t["x"])) for t in page.named("text") if t.get("text-anchor") == "middle"]
    assert max(middles) <= 240 - 12  # half of "100"
    assert "distilled, Spearman 1.00" in str(page.named("svg")[0]["aria-label"])
    assert ranking_parts(None) == []


def test_the_page_stands_candidates_that_are_all_equal() -> None:
    """As at chance, which is a round number for ten classes."""
    flat = compare("distilled", 300, (0.1,) * 4, (0.1,) * 4, 0)
    found: dict[str, Any] = {
        "confidence": 0.95, "protocol": "rded", "teacher": None, "real_epochs": 5, "real_accuracies": (0.1,) * 4,
        "candidates": [{"network": f"convnet{d}", "lr_factor": 1.0} for d in range(4)], "diverged": [],
        "sets": [json.loads(json.dumps(flat, default=vars))],
    }  # fmt: skip
    page = Page("".join(ranking_parts(found)))
    assert ["distilled", "300", "-", "-"] in page.rows and len(page.named("circle")) == 4


def test_the_command_ranks_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("0", "1"):
        (tmp_path / "set" / label).mkdir(parents=True)
        evaluate_picture(tmp_path / "set" / label / "a.png", int(label))
    args = ["--dataset", "digits", "--num_classes", "2", "--image_size", "8", "--mixed_precision", "no", "--protocols",
            "hard", "--students", "convnet1", "--repeats", "1", "--epochs", "1", "--baselines", "--rank_epochs", "1",
            "--distilled_dir", str(tmp_path / "set"), "--output_dir", str(tmp_path / "out")]  # fmt: skip
    assert evaluate_command.main(args) == 2
    assert "--rank_epochs: nothing is ranked without --with_ranking" in capsys.readouterr().err
    args[args.index("--rank_epochs") + 1] = "2"
    assert evaluate_command.main([*args, "--with_ranking", "--rank_models", "convnet1w4", "convnet2w4",
                                  "--rank_lr_factors", "1", "5"]) == 0  # fmt: skip
    assert "4 candidates by hard, each on distilled, full real: 8 students" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())["ranking"]
    assert len(found["candidates"]) == 4 and found["real_epochs"] == 1  # --epochs 1 is less
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Choosing models" in Page(page).words and "students of the ranking" in page


def evaluate_picture(path: Path, label: int) -> None:
    from PIL import Image

    Image.new("L", (8, 8), 200 * label).save(path)
