"""``evaluate``: a distilled dataset in, scores next to baselines out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ddgen.commands.runs import (
    find_run,
    load_on_all,
    observer_dir,
    random_generated_path,
    read_run_config,
    start_accelerator,
)
from ddgen.commands.teachers import load_teachers
from ddgen.config import (
    DataConfig,
    EvaluateConfig,
)
from ddgen.distill.dataset import DistilledDataset, update_results
from ddgen.distill.views import StoredViews
from ddgen.errors import UserError
from ddgen.evaluation.evaluate import evaluate as evaluate_students
from ddgen.evaluation.report import format_table
from ddgen.observer.observer import Observer


def evaluate(config: EvaluateConfig) -> int:
    """Trains students on the distilled images and on the baselines; writes results.json, a table and a figure."""
    run_dir, distilled_dir = which_dataset(config.run_dir, config.ipc, config.distilled_dir)
    output_dir = _evaluation_dir(config, run_dir, distilled_dir)
    accelerator, precision = start_accelerator(config.mixed_precision)
    if accelerator.num_processes > 1:
        raise UserError(f"evaluate.py runs in one process, not {accelerator.num_processes}: start it with python")
    distilled = DistilledDataset.load(distilled_dir)
    data = data_of_run(config.data, run_dir)
    train_images, test_images = (load_on_all(accelerator, data, split) for split in ("train", "test"))
    source = config.observer or (observer_dir(run_dir) if run_dir is not None else None)
    observer = None
    if source is not None:
        (observer,) = load_teachers(
            [source], distilled.class_names, None if config.dry_run else config.teacher_epoch,
            ipc=distilled.ipc, data=data, accelerator=accelerator, precision=precision,
        )  # fmt: skip
    students = config.students or default_students(observer)
    if config.dry_run:
        print(f"dry run: {', '.join(students)} x {', '.join(config.protocols)} x {config.repeats} on {distilled_dir}")
        return 0
    print(f"evaluating {distilled_dir} on the {len(test_images):,} test images of {test_images.name}")
    generated = _load_random_generated(run_dir, distilled_dir)
    results = evaluate_students(
        distilled,
        train_images,
        test_images,
        observer=observer,
        students=students,
        protocols=config.protocols,
        repeats=config.repeats,
        epochs=config.epochs,
        seed=config.seed,
        device=accelerator.device,
        precision=precision,
        flip=data.may_flip,
        output_dir=output_dir,
        stored=StoredViews.load(distilled_dir) if "stored" in config.protocols else None,
        random_generated=(generated["pixels"], generated["labels"]) if generated else None,
    )
    update_results(distilled_dir, results.to_dict())
    print(format_table(results))
    print(f"results:           {output_dir / 'results.json'}")
    print(f"figure:            {output_dir / 'accuracy.png'}")
    print(f"distilled dataset: {distilled_dir}")
    print(f"preview:           {distilled_dir / 'preview.png'}")
    return 0


def _load_random_generated(run_dir: Path | None, distilled_dir: Path) -> dict[str, Tensor] | None:
    path = None if run_dir is None else random_generated_path(run_dir, distilled_dir)
    if path is None or not path.is_file():
        print("no random-generated rows: sample.py left no unselected candidates of this dataset")
        return None
    return load_file(path)


def which_dataset(given_run: str | None, ipc: int | None, given_dataset: str | None) -> tuple[Path | None, Path]:
    """Returns the run, if there is one, and the distilled dataset that settings of these names mean.

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
    print(f"run: {run_dir} ({chosen})")
    if ipc is not None:
        return run_dir, run_dir / "distilled" / f"ipc{ipc}"
    found = sorted((run_dir / "distilled").glob("*/class_names.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"--run_dir {run_dir}: no distilled dataset in it yet; make one with python sample.py --ipc 10")
    return run_dir, found[-1].parent


def _evaluation_dir(config: EvaluateConfig, run_dir: Path | None, distilled_dir: Path) -> Path:
    if config.output_dir is None and run_dir is None:
        raise UserError("--output_dir: not set; say where the results of a dataset outside any run go")
    output_dir = Path(config.output_dir or (run_dir or Path()) / "evaluation" / distilled_dir.name)
    if (output_dir / "results.json").exists() and not config.overwrite:
        raise UserError(f"--output_dir {output_dir}: has results already; give another, or --overwrite to replace them")
    return output_dir


def data_of_run(data: DataConfig, run_dir: Path | None) -> DataConfig:
    """Returns the run's data settings, under those that were given."""
    if run_dir is None:
        return data
    given = {name: value for name, value in vars(data).items() if value != getattr(DataConfig(), name)}
    return replace(read_run_config(run_dir).data, **given)


def default_students(observer: Observer | None) -> tuple[str, ...]:
    """Returns the observer's own network, where ddgen builds such students."""
    if observer is not None and ":" not in observer.network:  # a ConvNet or a ResNet that ddgen builds
        return (observer.network,)
    return ("convnet3",)
