"""What the commands share: run folders, the accelerator, the data of a run."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import accelerate
import diffusers
import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import gather_object

import ddgen
from ddgen.config import (
    DataConfig,
    TrainConfig,
    from_flat_dict,
    read_yaml,
)
from ddgen.data import ImageDataset, load_dataset, native_image_size
from ddgen.errors import UserError
from ddgen.hardware import share_gpus, tune
from ddgen.launch import asked_for_cpu, threads_to_use
from ddgen.observer.observer import Observer
from ddgen.observer.realism import measure_accuracy
from ddgen.precision import resolve_precision
from ddgen.sharding import check_supported

RUNS_DIR = Path("runs")


def start_accelerator(
    mixed_precision: str | None, report_to: str = "none", project_dir: Path | None = None
) -> tuple[Accelerator, str]:
    """Starts accelerate on the device and processes that were asked for.

    Args:
        mixed_precision: ``--mixed_precision``.
        report_to: ``--report_to``.
        project_dir: Where a tracker writes.

    Returns:
        The accelerator and the resolved precision.

    Raises:
        UserError: A tracker that is not installed, a precision the device lacks, or a way to spread the model that
            training does not know.
    """
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UserError(f"--report_to {report_to}: not installed; pip install {report_to}, or leave it out")
    patience = timedelta(hours=24)  # the others wait while the first process trains the observer
    started = int(os.environ.get("WORLD_SIZE", "1"))
    # Without a GPU, accelerate takes every process that torchrun started for the only one, unless told "cpu".
    cpu = asked_for_cpu() or (started > 1 and not torch.accelerator.is_available())
    # NCCL refuses two processes of one GPU; accelerate gives them its GPUs in turn.
    state = PartialState(cpu=cpu, timeout=patience, **({"backend": "gloo"} if share_gpus() and not cpu else {}))
    if state.num_processes < started:
        raise UserError(
            f"WORLD_SIZE: {started} processes were started, of which each would work alone;"
            " use accelerate launch --num_processes N, on a machine without GPUs with --cpu"
        )
    device = state.device
    threads = threads_to_use() if device.type == "cpu" else None
    if threads is not None:
        torch.set_num_threads(threads)
    tune(device)
    precision = resolve_precision(mixed_precision, device)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=None if report_to == "none" else report_to,
        project_dir=project_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)],
    )
    check_supported(accelerator)
    return accelerator, precision


def load_on_all(accelerator: Accelerator, data: DataConfig, split: Literal["train", "test"]) -> ImageDataset:
    """Loads a split; the first process of every machine decodes it, the others read its cache.

    Raises:
        UserError: As `load_dataset`; or the machines do not have the same images.
    """
    dataset_name(data)
    with accelerator.local_main_process_first():
        dataset = load_dataset(data, split, progress=accelerator.is_main_process)
    found = gather_object([dataset.fingerprint])
    others = [rank for rank, fingerprint in enumerate(found) if fingerprint != found[0]]
    if others:
        raise UserError(
            f"--data_dir {data.data_dir}: process {others[0]} has other {split} images than process 0;"
            " give all machines the same data"
        )
    return dataset


def check_shared(path: Path, accelerator: Accelerator, patience_seconds: float = 90.0) -> None:
    """Checks that every process sees a file or folder that the main process has just written.

    Args:
        path: The file or folder.
        accelerator: Processes; every one must call this.
        patience_seconds: How long to look for it: a network disk may show a new file to other machines a minute late.

    Raises:
        UserError: A process does not see it.
    """
    accelerator.wait_for_everyone()
    end = time.monotonic() + patience_seconds
    while not path.exists():
        if time.monotonic() > end:
            raise UserError(
                f"--output_dir {path.parent}: process {accelerator.process_index} on {platform.node()} does not see"
                f" {path.name}, which process 0 wrote; give a folder that all machines share"
            )
        time.sleep(min(1.0, patience_seconds / 10))
    accelerator.wait_for_everyone()


def dataset_name(data: DataConfig) -> str:
    """Returns ``--dataset``, which has no default."""
    if data.dataset is None:
        raise UserError(
            "--dataset: not set; for instance --dataset tinyimagenet, or imagefolder with --data_dir FOLDER"
        )
    native_image_size(data.dataset)
    return data.dataset


def versions_line() -> str:
    """Returns the versions that matter."""
    ours = f"ddgen {ddgen.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"{ours}, accelerate {accelerate.__version__}, Python {platform.python_version()}"


def command_line() -> str:
    """Returns the command that started this process, as a user would type it."""
    program = Path(sys.argv[0]).name
    start = {"__main__.py": ["python", "-m", "ddgen"], "ddgen": ["ddgen"]}.get(program, ["python", program])
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by accelerate launch
        world = os.environ.get("WORLD_SIZE", "1")
        options = ["--num_processes", world, *(["--cpu"] if asked_for_cpu() else [])] if world != "1" else []
        start = ["accelerate", "launch", *options, *(["-m", "ddgen"] if program == "__main__.py" else [program])]
    return shlex.join([*start, *sys.argv[1:]])


def find_run(run_dir: str | None, *, with_generator: bool = True) -> tuple[Path, str]:
    """Returns a finished run and how it was chosen.

    Args:
        run_dir: ``--run_dir``; None takes the newest.
        with_generator: Without, an observer that was trained alone will do.
    """
    if run_dir is not None:
        path = Path(run_dir)
        if with_generator and not (path / "generator" / "model_index.json").is_file():
            cure = ", or give --generator to use only its observer" if _has_observer(path) else ""
            raise UserError(
                f"--run_dir {path}: no finished run (generator/model_index.json); train with train_ldm.py{cure}"
            )
        if not with_generator and not _has_observer(path):
            raise UserError(
                f"--run_dir {path}: no observer and dataset.json in it; train with train_ldm.py or ddgen observer"
            )
        return path, "--run_dir"
    found = list(RUNS_DIR.glob("*/generator/model_index.json"))
    if not with_generator:  # an unfinished run has both files too, but one level down
        found += [path for path in RUNS_DIR.glob("*/config.json") if _has_observer(path.parent)]
    if not found:
        cure = " or ddgen observer" if not with_generator else ""
        raise UserError(f"--run_dir: no finished run under {RUNS_DIR}/; train with train_ldm.py{cure}, or name one")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    run = newest.parent if newest.name == "config.json" else newest.parent.parent
    return run, f"the newest of {len(found)} finished under {RUNS_DIR}/"


def observer_dir(run_dir: Path) -> Path:
    """Returns where a run's observer is: one that was trained alone is its own run folder."""
    return run_dir if (run_dir / "config.json").is_file() else run_dir / "observer"


def _has_observer(path: Path) -> bool:
    return (observer_dir(path) / "config.json").is_file() and (path / "dataset.json").is_file()


def read_run_config(run_dir: Path) -> TrainConfig:
    """Returns the settings a run was trained with."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"--run_dir {run_dir}: config.yaml is missing; give a folder that train_ldm.py wrote")
    return from_flat_dict(TrainConfig, read_yaml(path), str(path))


def data_of_run(given: DataConfig, run_dir: Path | None) -> DataConfig:
    """Returns a run's data settings, under those that were given."""
    if run_dir is None:
        return given
    changed = {name: value for name, value in vars(given).items() if value != getattr(DataConfig(), name)}
    return replace(read_run_config(run_dir).data, **changed)


def held_out_accuracy(observer: Observer, data: DataConfig, accelerator: Accelerator, precision: str) -> float:
    """Measures, on the real test images, an observer that ddgen did not train."""
    test = load_on_all(accelerator, data, "test")
    return measure_accuracy(observer, test, device=accelerator.device, precision=precision)


def random_generated_path(run_dir: Path, distilled_dir: Path) -> Path:
    """Where sample.py leaves as many candidates, drawn at random, for the report's random-generated rows."""
    return run_dir / "baselines" / f"random-generated-{distilled_dir.name}.safetensors"
