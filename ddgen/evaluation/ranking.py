"""Is a set good for choosing models? Candidates, trained on it and on all real images, scored on the real test images.

The accuracies are only compared with each other: no row of the report is chosen by them.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from ddgen.errors import UserError
from ddgen.evaluation.batches import AHEAD_PIXELS, Batch
from ddgen.evaluation.cells import Cell, Setting, Teacher, is_done, job_of, run_cell
from ddgen.evaluation.planned import Planned
from ddgen.evaluation.protocols import Protocol
from ddgen.evaluation.rank_correlation import Candidate, RankedSet, Ranking, kendall, spearman, with_interval
from ddgen.evaluation.scoring import scored_epochs
from ddgen.evaluation.sources import Source, labelled, num_epochs
from ddgen.evaluation.students import Diverged, Job, Learner, make_batches
from ddgen.evaluation.teacher_epoch import student_network
from ddgen.observer.networks import build_network
from ddgen.seeds import numpy_generator
from ddgen.units import readable_seconds

MIN_CANDIDATES = 4
TIMED_SECONDS = 0.5  # for timing the steps of one network


@dataclass(frozen=True)
class RankingPlan:
    """Which candidates, and how long they train on all real images.

    Attributes:
        networks: Names; None takes `default_networks`.
        lr_factors: Learning rates, as multiples of the recipe's, with each network.
        real_epochs: Epochs on all real images, at most the recipe's.
    """

    networks: tuple[str, ...] | None
    lr_factors: tuple[float, ...]
    real_epochs: int

    def candidates(self, image_size: int) -> tuple[Candidate, ...]:
        """Returns every network with every learning rate, for images of this side."""
        networks = default_networks(image_size) if self.networks is None else self.networks
        return tuple(dict.fromkeys(itertools.starmap(Candidate, itertools.product(networks, self.lr_factors))))


@dataclass(frozen=True)
class Contest:
    """Candidates and the sets that order them.

    Attributes:
        candidates: What is ordered.
        sources: The sets; the last holds all real images.
        recipe: By which all train.
        online: Who labels online.
        teachers: All observers.
        setting: What all cells share.
    """

    candidates: tuple[Candidate, ...]
    sources: tuple[Source, ...]
    recipe: Protocol
    online: tuple[Teacher, ...]
    teachers: Sequence[Teacher]
    setting: Setting

    def planned(self, source: Source) -> list[Planned]:
        """Returns the students of one set, one per candidate."""
        return [
            Planned(
                source, self.recipe.times_learning_rate(candidate.lr_factor), candidate.network, self.online,
                num_epochs(source, self.recipe, candidate.network, self.setting), repeat=0, may_diverge=True,
            )
            for candidate in self.candidates
        ]  # fmt: skip

    def cells(self, source: Source) -> list[Cell]:
        """Returns the students of one set with their images, which are the same."""
        images = labelled(source.draw(0), self.recipe, self.teachers, self.setting)
        return [planned.cell(images) for planned in self.planned(source)]


def default_networks(image_size: int) -> tuple[str, ...]:
    """Returns four ConvNets that fit images of this side: two depths, three widths, none wider than the usual one."""
    usual = student_network(image_size)
    depth = int(usual.removeprefix("convnet"))
    other = depth - 1 if depth > 1 else 2
    return (f"convnet{other}w64", f"convnet{depth}w16", f"convnet{depth}w64", usual)


def check_plan(plan: RankingPlan, recipe: Protocol, num_classes: int, image_size: int) -> None:
    """Refuses what cannot be ranked.

    Raises:
        UserError: Too few candidates, a network that cannot be, or a recipe for which real images have no labels.
    """
    if recipe.labels == "views":
        raise UserError(
            f"--with_ranking: by the first of --protocols, {recipe.name}, which needs stored views that real images do"
            " not have; name another first"
        )
    found = plan.candidates(image_size)
    if len(found) < MIN_CANDIDATES:
        raise UserError(
            f"--rank_models: {len(found)} candidates with --rank_lr_factors; a rank correlation takes {MIN_CANDIDATES}"
            " or more"
        )
    for network in dict.fromkeys(candidate.network for candidate in found):
        build_network(network, num_classes, image_size, norm=recipe.norm, setting="--rank_models")


def announce(contest: Contest, num_processes: int = 1) -> str:
    """Says how many students a contest trains and about how long that takes, after timing a few steps of each kind.

    Args:
        contest: Candidates and sets.
        num_processes: That share the students.
    """
    cells = [cell for source in contest.sources for cell in contest.cells(source)]
    missing = [cell for cell in cells if not is_done(cell, contest.setting)]
    names = ", ".join(source.name for source in contest.sources)
    text = f"ranking: {len(contest.candidates)} candidates by {contest.recipe.name}, each on {names}"
    text += f": {len(cells)} students"
    if len(missing) < len(cells):
        text += f", {len(cells) - len(missing)} of them there already"
    if not missing:
        return text
    processes = f" on {num_processes} processes" if num_processes > 1 else ""
    return f"{text}, about {readable_seconds(estimate_seconds(missing, contest.setting) / num_processes)}{processes}"


def rank(contest: Contest) -> Ranking:
    """Trains the candidates on every set, one student each, and compares the orders.

    Of a candidate only images and labels differ between the sets: weights are drawn from the same seed.
    """
    setting, diverged = contest.setting, list[str]()
    found = [_train(contest, source, diverged) for source in contest.sources]
    *sets, (_, real_epochs, real, _) = found
    return Ranking(
        protocol=contest.recipe.name,
        teacher=" + ".join(teacher.name for teacher in contest.online) or None,
        candidates=contest.candidates,
        real_epochs=real_epochs,
        real_accuracies=real,
        sets=tuple(compare(name, epochs, own, real, setting.seed) for name, epochs, own, _ in sets),
        diverged=tuple(diverged),
        seconds=sum(seconds for *_, seconds in found),
    )


def compare(
    images: str, epochs: int, accuracies: tuple[float, ...], real_accuracies: tuple[float, ...], seed: int
) -> RankedSet:
    """Returns a set with the correlations of its accuracies and those after real training, (n,) fractions each."""
    pair = np.array(accuracies), np.array(real_accuracies)
    rho, tau = (with_interval(s, *pair, numpy_generator(seed, "ranking bootstrap")) for s in (spearman, kendall))
    return RankedSet(images, epochs, accuracies, rho, tau)


def _train(contest: Contest, source: Source, diverged: list[str]) -> tuple[str, int, tuple[float, ...], float]:
    """Returns name, epochs, the accuracy of every candidate, and seconds; adds the students without finite loss."""
    cells, setting = contest.cells(source), contest.setting
    accuracies, seconds = [], 0.0
    with tqdm(
        total=sum(cell.epochs for cell in cells), desc=f"{source.name:<16} ranking", unit="epoch",
        disable=not setting.progress, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        for candidate, cell in zip(contest.candidates, cells, strict=True):
            bar.set_postfix_str(candidate.name)
            try:
                result, there = run_cell(cell, setting, lambda *_: bar.update(1))
            except Diverged:
                diverged.append(f"{candidate.name}, on {source.name}")
                accuracies.append(1 / setting.num_classes)
                continue
            bar.update(cell.epochs if there else 0)
            accuracies.append(result.accuracy_last)
            seconds += result.seconds
    return source.name, max(cell.epochs for cell in cells), tuple(accuracies), seconds


def estimate_seconds(cells: Sequence[Cell], setting: Setting) -> float:
    """Times a few steps of every network on the images of the last cell, and scales them up.

    Args:
        cells: Students to train, at least one.
        setting: What they share.
    """
    jobs = [job_of(cell, setting) for cell in cells]
    steps: dict[str, float] = {}
    with torch.random.fork_rng(devices=[setting.device] if setting.device.type == "cuda" else []):
        torch.manual_seed(0)
        making, batch = _time_batches(jobs[-1])
        for job in jobs:
            if job.network not in steps:
                steps[job.network] = _time_steps(replace(jobs[-1], network=job.network), batch)
    seconds = 0.0
    for job in jobs:
        scorings = len(scored_epochs(job.num_epochs, len(job.images), len(job.test)))
        seconds += job.num_epochs * len(job.images) * (making + steps[job.network])
        seconds += scorings * len(job.test) * steps[job.network] / 3  # a forward is a third of a step
    return seconds


def _time_batches(job: Job) -> tuple[float, Batch]:
    """Returns the seconds that a labelled image takes, and a batch; teachers label several batches ahead."""
    size = job.images.pixels.shape[-1]
    count = math.ceil(AHEAD_PIXELS / (size**2 * job.batch_size))
    started = time.perf_counter()
    found = list(itertools.islice(make_batches(job), count))
    seconds = time.perf_counter() - started
    return seconds / sum(len(batch.images) for batch in found), found[0]


def _time_steps(job: Job, batch: Batch) -> float:
    """Returns the seconds that an image takes in a step; the first step, which sets things up, is not counted."""
    learner = Learner(job)
    learner.begin_epoch(0)
    float(learner.step(batch))
    count, started = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - started < TIMED_SECONDS:
        float(learner.step(batch))
        count += 1
    return (time.perf_counter() - started) / count / len(batch.images)
