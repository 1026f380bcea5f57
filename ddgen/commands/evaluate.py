"""``evaluate``: a distilled dataset in, scores next to baselines out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from ddgen.checkpoint import write_json
from ddgen.commands.history import made_with
from ddgen.commands.runs import (
    check_shared,
    command_line,
    data_of_run,
    find_run,
    load_on_all,
    observer_dir,
    random_generated_path,
    start_accelerator,
)
from ddgen.commands.teachers import load_teachers
from ddgen.config import EvaluateConfig
from ddgen.data import ImageDataset
from ddgen.distill.dataset import DistilledDataset, read_manifest, update_results, versions
from ddgen.distill.foreign_dataset import ForeignDataset, check_source, read_dataset
from ddgen.distill.views import StoredViews
from ddgen.errors import Stopped, UserError
from ddgen.evaluation.evaluate import evaluate as evaluate_students
from ddgen.evaluation.protocol_files import get_protocol
from ddgen.evaluation.ranking import RankingPlan
from ddgen.evaluation.report import Results, format_table
from ddgen.evaluation.request import Request
from ddgen.evaluation.sharing import Claims, evaluate_together
from ddgen.memory import keep_freed_memory
from ddgen.observer.observer import Observer
from ddgen.page.neighbours import NEIGHBOURS_NAME, save_neighbours
from ddgen.page.page import write_page_of
from ddgen.page.run import PROVENANCE_NAME
from ddgen.stopping import stop_at_once


def evaluate(config: EvaluateConfig) -> int:
    """Trains students on the distilled images and on the baselines; writes results.json, a table, a figure, a page."""
    ranking = _ranking(config)
    with stop_at_once():
        accelerator, precision = start_accelerator(config.mixed_precision)
        try:
            _evaluate(config, ranking, accelerator, precision)
        except Stopped as stopped:
            if not accelerator.is_main_process:
                return 128 + stopped.signal_number  # the main process says it
            raise
    return 0


def _evaluate(config: EvaluateConfig, ranking: RankingPlan | None, accelerator: Accelerator, precision: str) -> None:
    started, say = time.perf_counter(), accelerator.print
    run_dir, distilled_dir = which_dataset(config.run_dir, config.ipc, config.distilled_dir, say)
    source = config.distilled_dir or str(distilled_dir)
    check_source(source) if config.distilled_dir is not None else read_manifest(distilled_dir)
    output_dir = _evaluation_dir(config, run_dir, distilled_dir)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    data = data_of_run(config.data, run_dir)
    train_images, test_images = (load_on_all(accelerator, data, split) for split in ("train", "test"))
    rounds = [read_dataset(source, train_images), *(_read_round(path, train_images) for path in config.rounds)]
    recipes = [get_protocol(name) for name in config.protocols]
    own = () if run_dir is None else (observer_dir(run_dir),)
    load = partial(
        load_teachers, config.observer or own, train_images.class_names, ipc=rounds[0].ipc, data=data,
        accelerator=accelerator, precision=precision,
    )  # fmt: skip
    rankers = load(None)
    observers = rankers if config.dry_run or config.teacher_epoch is None else load(config.teacher_epoch)
    if config.dry_run:
        students = ", ".join(config.students or (default_student(observers),))
        say(f"dry run: {students} x {', '.join(config.protocols)} x {config.repeats} on {source}")
        return
    for remark in _remarks(rounds):
        say(f"{source}: {remark}")
    say(f"evaluating {source} on the {len(test_images):,} test images of {test_images.name}")
    with_views = any(recipe.labels == "views" for recipe in recipes)
    baselines = default_baselines(observers) if config.baselines is None else config.baselines
    request = Request(
        rounds=rounds,
        train=train_images,
        test=test_images,
        observers=observers,
        students=config.students,
        protocols=config.protocols,
        baselines=baselines,
        repeats=config.repeats,
        epochs=config.epochs,
        seed=config.seed,
        device=accelerator.device,
        precision=precision,
        output_dir=output_dir,
        ranker=next(iter(rankers), None),
        random_generated=_random_generated(baselines, rounds[0], run_dir, distilled_dir, say),
        views=[StoredViews.load(Path(path)) for path in (source, *config.rounds)] if with_views else (),
        with_full=config.with_full,
        ranking=ranking,
        default_student=default_student(observers),
        flip=data.may_flip,
        progress=accelerator.is_main_process,
    )

    def write(results: Results) -> None:
        facts = {"made_with": made_with(accelerator, precision), "seconds": time.perf_counter() - started}
        write_json(output_dir / PROVENANCE_NAME, _provenance(source, rounds) | facts)
        _write(results, request, run_dir, distilled_dir, source)

    if accelerator.num_processes == 1:
        write(evaluate_students(request))
        return
    claims = Claims(output_dir, accelerator)
    check_shared(claims.folder, accelerator)
    evaluate_together(request, claims, write)


def _write(results: Results, request: Request, run_dir: Path | None, distilled_dir: Path, source: str) -> None:
    """Writes what is made of the results, and says where it is."""
    output_dir, judged = request.output_dir, request.rounds[0]
    if isinstance(judged, DistilledDataset):
        update_results(distilled_dir, results.to_dict())
        if request.observers:
            neighbours = output_dir / NEIGHBOURS_NAME
            save_neighbours(judged, request.train, request.observers[0], neighbours, device=request.device)
    page = write_page_of(run_dir, output_dir)
    print(format_table(results))
    print(f"results:           {output_dir / 'results.json'}")
    print(f"figure:            {output_dir / 'accuracy.png'}")
    print(f"report:            {page}")
    print(f"distilled dataset: {source}")


def _ranking(config: EvaluateConfig) -> RankingPlan | None:
    if config.with_ranking:
        return RankingPlan(config.rank_models, config.rank_lr_factors, config.rank_epochs)
    for name in ("rank_models", "rank_lr_factors", "rank_epochs"):
        if getattr(config, name) != getattr(EvaluateConfig, name):
            raise UserError(f"--{name}: nothing is ranked without --with_ranking")
    return None


def _read_round(path: str, train_images: ImageDataset) -> DistilledDataset | ForeignDataset:
    try:
        return read_dataset(path, train_images)
    except UserError as error:  # that reader was asked for --distilled_dir
        raise UserError(str(error).replace("--distilled_dir", "--rounds", 1)) from None


def _remarks(rounds: Sequence[DistilledDataset | ForeignDataset]) -> list[str]:
    found = [remark for dataset in rounds if isinstance(dataset, ForeignDataset) for remark in dataset.remarks]
    return list(dict.fromkeys(found))


def _provenance(source: str, rounds: Sequence[DistilledDataset | ForeignDataset]) -> dict[str, Any]:
    """What the page tells of an evaluation beside its results."""
    return {
        "distilled_dir": source,
        "remarks": _remarks(rounds),
        "command": command_line(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def _random_generated(
    baselines: Sequence[str],
    judged: DistilledDataset | ForeignDataset,
    run_dir: Path | None,
    distilled_dir: Path,
    say: Callable[[str], None],
) -> tuple[Tensor, Tensor] | None:
    """Returns pixels and labels of the run's candidates that nobody selected, if they are asked for and there."""
    if "random-generated" not in baselines:
        return None
    ours = isinstance(judged, DistilledDataset)
    path = random_generated_path(run_dir, distilled_dir) if run_dir is not None and ours else None
    if path is None or not path.is_file():
        say("no random-generated rows: sample.py left no unselected candidates of this dataset")
        return None
    found = load_file(path)
    return found["pixels"], found["labels"]


def which_dataset(
    given_run: str | None, ipc: int | None, given_dataset: str | None, say: Callable[[str], None] = print
) -> tuple[Path | None, Path]:
    """Returns the run, if there is one, and the distilled dataset that settings of these names mean.

    Args:
        given_run: ``--run_dir``.
        ipc: ``--ipc``.
        given_dataset: ``--distilled_dir``.
        say: Prints which run it is.

    Raises:
        UserError: There is none.
    """
    if given_dataset is not None:
        path = Path(given_dataset)
        run_dir = Path(given_run) if given_run else None
        if run_dir is None and path.parent.name == "distilled" and (path.parent.parent / "config.yaml").is_file():
            run_dir = path.parent.parent
        return run_dir, path
    run_dir, chosen = find_run(given_run, with_generator=False)
    say(f"run: {run_dir} ({chosen})")
    if ipc is not None:
        return run_dir, run_dir / "distilled" / f"ipc{ipc}"
    found = sorted((run_dir / "distilled").glob("*/class_names.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"--run_dir {run_dir}: no distilled dataset in it yet; make one with python sample.py --ipc 10")
    return run_dir, found[-1].parent


def _evaluation_dir(config: EvaluateConfig, run_dir: Path | None, distilled_dir: Path) -> Path:
    if config.output_dir is None and run_dir is None:
        raise UserError("--output_dir: not set; say where the results of a dataset outside any run go")
    output_dir = Path(config.output_dir or (run_dir or Path()) / "evaluation" / _evaluation_name(config, distilled_dir))
    if (output_dir / "results.json").exists() and not config.overwrite:
        raise UserError(
            f"--output_dir {output_dir}: has results already; give another, or --overwrite to replace"
            " them: students that are trained already stay, so more --repeats or --protocols cost only what is new"
        )
    return output_dir


def _evaluation_name(config: EvaluateConfig, distilled_dir: Path) -> str:
    """Names the folder of results; a hub id's owner belongs to its name."""
    if config.distilled_dir is not None and not distilled_dir.exists():
        return config.distilled_dir.replace("/", "--")
    return distilled_dir.resolve().stem if distilled_dir.is_file() else distilled_dir.resolve().name


def default_baselines(observers: Sequence[Observer]) -> tuple[str, ...]:
    """Returns what every report compares with; crops of real images need an observer to rank them."""
    return ("random-generated", "random-real", *(("rded-real",) if observers else ()))


def default_student(observers: Sequence[Observer]) -> str:
    """Returns the first observer's own network, where ddgen builds such students."""
    if observers and ":" not in observers[0].network:  # one that ddgen builds
        return observers[0].network
    return "convnet3"
