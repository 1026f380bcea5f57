"""Evaluation: the same recipes on a distilled dataset and on the baselines that it has to beat."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from ddgen.evaluation.batches import Look, TrainingImages
from ddgen.evaluation.cells import Setting, Teacher, run_cell
from ddgen.evaluation.figure import draw_accuracy
from ddgen.evaluation.planned import Planned
from ddgen.evaluation.protocol_files import get_protocol
from ddgen.evaluation.protocols import Protocol
from ddgen.evaluation.ranking import Contest, announce, rank
from ddgen.evaluation.report import Results, write_results
from ddgen.evaluation.request import Request, check_request, students_by_recipe
from ddgen.evaluation.rows import FULL_REAL, Row
from ddgen.evaluation.sources import (
    Source,
    baseline_sources,
    distilled_source,
    full_source,
    labelled,
    num_epochs,
    png_bytes,
)
from ddgen.evaluation.students import IMAGENET_LOOK, StudentResult
from ddgen.observer.realism import check_observer, measure_accuracy
from ddgen.observer.training import channel_statistics

# As the literature normalises them; others by the statistics of their training images.
_LOOKS = {
    "cifar10": Look((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Look((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tinyimagenet": IMAGENET_LOOK,
}


@dataclass(frozen=True)
class Plan:
    """What an evaluation trains.

    Attributes:
        request: What to judge, and how.
        recipes: The request's.
        teachers: All observers.
        setting: What all students share.
        sources: What they train on.
        rows: The students of every row.
        contest: What is to be ranked, if anything.
    """

    request: Request
    recipes: Sequence[Protocol]
    teachers: Sequence[Teacher]
    setting: Setting
    sources: Sequence[Source]
    rows: Sequence[Sequence[Planned]]
    contest: Contest | None


def evaluate(request: Request) -> Results:
    """Trains students on the distilled images and on the baselines, and scores them on the real test images.

    Every finished student is kept in ``output_dir/cells``, so an interrupted evaluation goes on where it stopped.
    Row for row, repeat r starts from the same weights, so rows differ by their images.

    Returns:
        The rows, written to ``output_dir`` too.

    Raises:
        UserError: Before any training: artefacts whose classes or sizes do not match, settings that cannot be honoured.
    """
    plan = make_plan(request, lambda: make_sources(request))
    if plan.contest is not None:
        print(announce(plan.contest))
    return results_of(plan)


def make_plan(request: Request, get_sources: Callable[[], list[Source]]) -> Plan:
    """Checks a request, measures its observers and chooses the images of the baselines.

    Args:
        request: What to judge, and how.
        get_sources: Calls `make_sources`; only if the request is found right.

    Raises:
        UserError: As `evaluate`.
    """
    recipes = [get_protocol(name) for name in request.protocols]
    pairs = students_by_recipe(request, recipes)
    check_request(request, recipes, pairs)
    setting = Setting(
        request.test, len(request.class_names), request.repeats, request.epochs, request.seed, request.device,
        request.precision, request.output_dir / "cells", _looks(request, recipes), request.progress,
    )  # fmt: skip
    teachers = _teachers(request)
    sources = get_sources()
    contest = _contest(request, recipes[0], sources, teachers, setting)
    rows = [
        _planned_row(source, recipe, student, online, setting)
        for student, recipe in pairs
        for online in _online(recipe, teachers)
        for source in sources
        if recipe.labels != "views" or source.name == "distilled"
    ]
    return Plan(request, recipes, teachers, setting, sources, rows, contest)


def results_of(plan: Plan) -> Results:
    """Trains the students that are not there yet, and writes ``results.json`` and ``accuracy.png``."""
    request, setting = plan.request, plan.setting
    image_bytes = {source.name: png_bytes(source.draw(0).pixels) for source in plan.sources}
    results = Results(
        rows=tuple(_row(row, plan.teachers, setting, image_bytes[row[0].source.name]) for row in plan.rows),
        dataset=request.test.name,
        num_classes=setting.num_classes,
        num_test=len(request.test),
        image_size=request.test.image_size,
        ipc=request.rounds[0].ipc,
        num_images=len(request.rounds[0]),
        repeats=request.repeats,
        seed=request.seed,
        epochs_override=request.epochs,
        flip=request.flip,
        teachers=tuple((teacher.name, teacher.accuracy) for teacher in plan.teachers),
        recipes=tuple(plan.recipes),
        precision=request.precision,
        device=request.device.type,
        ranking=None if plan.contest is None else rank(plan.contest),
    )
    write_results(results, request.output_dir / "results.json")
    draw_accuracy(results, request.output_dir / "accuracy.png")
    return results


def make_sources(request: Request) -> list[Source]:
    """Returns the distilled images, the baselines, and all real images if they were asked for.

    What an observer chooses is kept in ``output_dir/baselines``.

    Raises:
        UserError: A class of the real images is too small.
    """
    ranker = request.ranker or next(iter(request.observers), None)
    baselines = baseline_sources(
        request.baselines, request.rounds[0], request.random_generated, request.train, ranker,
        seed=request.seed, device=request.device, precision=request.precision,
        cache_dir=request.output_dir / "baselines", progress=request.progress,
    )  # fmt: skip
    full = [full_source(request.train)] if request.with_full else []
    return [distilled_source(request.rounds, request.views), *baselines, *full]


def _contest(
    request: Request,
    recipe: Protocol,
    sources: Sequence[Source],
    teachers: Sequence[Teacher],
    setting: Setting,
) -> Contest | None:
    """Returns what is to be ranked, if anything: by every set of the report, and by all real images in few epochs."""
    plan = request.ranking
    if plan is None:
        return None
    sets = [source for source in sources if source.name != FULL_REAL]
    real = replace(full_source(request.train), epochs=plan.real_epochs)
    candidates = plan.candidates(request.test.image_size)
    return Contest(candidates, (*sets, real), recipe, _online(recipe, teachers)[0], teachers, setting)


def _looks(request: Request, recipes: Sequence[Protocol]) -> dict[str, Look]:
    looks = {"imagenet": replace(IMAGENET_LOOK, flip=request.flip)}
    if any(recipe.normalization == "dataset" for recipe in recipes):
        known = _LOOKS.get(request.train.name)
        look = known or Look(*channel_statistics(request.train.pixels, torch.arange(len(request.train))))
        looks["dataset"] = replace(look, flip=request.flip)
    return looks


def _online(recipe: Protocol, teachers: Sequence[Teacher]) -> list[tuple[Teacher, ...]]:
    """Returns who labels online, once per set of rows: every observer by itself, all together, or nobody."""
    if recipe.labels != "soft":
        return [()]
    return [tuple(teachers)] if recipe.ensemble else [(teacher,) for teacher in teachers]


def _teachers(request: Request) -> list[Teacher]:
    """Measures the observers on the real test images, and refuses one that is near chance there."""
    networks = [observer.network for observer in request.observers]
    teachers: list[Teacher] = []
    for index, observer in enumerate(request.observers):
        measured = copy.copy(observer)
        measured.accuracy = measure_accuracy(observer, request.test, device=request.device, precision=request.precision)
        check_observer(measured, request.test.class_names)
        same = networks[:index].count(observer.network)
        name = f"{observer.network} #{same + 1}" if networks.count(observer.network) > 1 else observer.network
        teachers.append(Teacher(name, observer, measured.accuracy))
    return teachers


def _planned_row(
    source: Source, recipe: Protocol, student: str, online: tuple[Teacher, ...], setting: Setting
) -> list[Planned]:
    epochs = num_epochs(source, recipe, student, setting)
    repeats = min(setting.repeats, source.repeats or setting.repeats)
    return [Planned(source, recipe, student, online, epochs, repeat) for repeat in range(repeats)]


def _row(row: Sequence[Planned], teachers: Sequence[Teacher], setting: Setting, image_bytes: int) -> Row:
    source, recipe, student, online = row[0].source, row[0].recipe, row[0].network, row[0].online
    teacher = " + ".join(t.name for t in online) or None
    results: list[StudentResult] = []
    with tqdm(
        total=sum(planned.epochs for planned in row),
        desc=" ".join(filter(None, (f"{source.name:<16}", f"{recipe.name:<4}", student, teacher and f"by {teacher}"))),
        unit="epoch",
        disable=not setting.progress,
        dynamic_ncols=True,
        bar_format="{desc} |{bar:20}| {percentage:3.0f}% [{elapsed}<{remaining}]{postfix}",
    ) as bar:
        for planned in row:

            def on_epoch(_: int, accuracy: float | None, repeat: int = planned.repeat) -> None:
                bar.update(1)
                if accuracy is not None:
                    bar.set_postfix_str(f"student {repeat + 1}/{len(row)} at {100 * accuracy:.1f}")

            images = labelled(source.draw(planned.repeat), recipe, teachers, setting)
            result, there = run_cell(planned.cell(images), setting, on_epoch)
            bar.update(result.epochs if there else 0)
            results.append(result)
            bar.set_postfix_str(f"last epoch {' '.join(f'{100 * r.accuracy_last:.1f}' for r in results)}")
    return _summary(source.name, recipe, student, teacher, results, image_bytes, _label_bytes(images, recipe, online))


def _summary(
    name: str,
    recipe: Protocol,
    student: str,
    teacher: str | None,
    results: Sequence[StudentResult],
    image_bytes: int,
    label_bytes: int,
) -> Row:
    top5 = [result.top5_last for result in results if result.top5_last is not None]
    confusions = [torch.tensor(result.confusion) for result in results if result.confusion is not None]
    recall = torch.tensor([result.recall for result in results], dtype=torch.float64).mean(0)
    return Row(
        images=name,
        protocol=recipe.name,
        student=student,
        epochs=results[0].epochs,
        scores=tuple(result.accuracy_last for result in results),
        best_scores=tuple(result.accuracy_best for result in results),
        image_bytes=image_bytes,
        label_bytes=label_bytes,
        seconds=sum(result.seconds for result in results),
        teacher=teacher,
        top5_scores=tuple(top5) or None,
        recall=tuple(round(value, 6) for value in recall.tolist()),
        confusion=tuple(map(tuple, torch.stack(confusions).sum(0).tolist())) if confusions else None,
    )


def _label_bytes(images: TrainingImages, recipe: Protocol, online: Sequence[Teacher]) -> int:
    """Bytes that the recipe needs beside the images: the teachers' weights, stored labels, or class numbers."""
    if online:
        states = [teacher.observer.state_dict() for teacher in online]
        return sum(value.numel() * value.element_size() for state in states for value in state.values())
    if images.views is not None:
        return images.views.num_bytes
    if images.soft_labels is not None:
        return images.soft_labels.numel() * images.soft_labels.element_size()
    num_classes = int(images.labels.max()) + 1
    return len(images) * max(1, ((num_classes - 1).bit_length() + 7) // 8)
