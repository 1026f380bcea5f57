"""``distill``: real images in, a distilled dataset out (RDED)."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddgen.commands.history import made_with
from ddgen.commands.runs import (
    command_line,
    data_of_run,
    dataset_name,
    find_run,
    load_on_all,
    observer_dir,
    start_accelerator,
)
from ddgen.commands.teachers import check_teachers, load_teachers
from ddgen.config import DataConfig, DistillConfig
from ddgen.data import ImageDataset
from ddgen.distill.dataset import DistilledDataset
from ddgen.distill.rded import CropPlan, plan_crops, rank_class
from ddgen.distill.relabel import describe_teachers, label_ranked
from ddgen.distill.selection_report import ClassReport, SelectionReport, compared_classes, report_class
from ddgen.errors import UserError
from ddgen.observer.observer import Observer
from ddgen.observer.realism import real_class_scores, realism_scores


def distill(config: DistillConfig) -> int:
    """Crops real images, ranks the crops, stitches and relabels the best: writes a distilled dataset."""
    run_dir = _run(config)
    data = data_of_run(config.data, run_dir)
    output_dir = _output_dir(config, run_dir, dataset_name(data))
    accelerator, precision = start_accelerator(config.mixed_precision)
    if accelerator.num_processes > 1:
        raise UserError(f"distill runs in one process, not {accelerator.num_processes}: start it with python -m ddgen")
    dataset = load_on_all(accelerator, data, "train")
    sources = _observers(config, run_dir, dataset.name)
    load = partial(
        load_teachers, sources, dataset.class_names, ipc=config.ipc, data=data, accelerator=accelerator,
        precision=precision,
    )  # fmt: skip
    observers = load(None)
    check_teachers(observers, data, accelerator, precision)
    if config.factor > dataset.image_size // 4:
        raise UserError(f"--factor {config.factor}: crops of {dataset.image_size} px images would be under 4 pixels")
    members = dataset.indices_by_class()
    plans = _plans(config, dataset, members)
    crops = sum(len(plan.numbers) * plan.num_crop for plan in plans)
    if config.dry_run:
        print(f"dry run: {crops:,} crops of {sum(len(plan.numbers) for plan in plans):,} real images -> {output_dir}")
        return 0
    teachers = observers
    if config.teacher_epoch is not None:
        teachers = load(config.teacher_epoch)
        check_teachers(teachers, data, accelerator, precision)
    started = time.perf_counter()
    kept = _keep(config, dataset, observers[0], members, plans, accelerator.device, precision)
    report = SelectionReport(config.selection, dataset.class_names, [one.report for one in kept])
    distilled = _distilled(
        config, dataset, observers[0], teachers, kept, report, crops, accelerator.device, precision
    )  # fmt: skip
    seconds = {"cropping, ranking and relabelling": time.perf_counter() - started}
    distilled.provenance.update(seconds=seconds, made_with=made_with(accelerator, precision))
    distilled.save(output_dir, overwrite=config.overwrite, selection_png=report.draw())
    print("\n".join(report.lines()))
    print(f"{crops:,} crops in {time.perf_counter() - started:.0f} s")
    print(f"distilled dataset: {output_dir}")
    print(f"preview:           {output_dir / 'preview.png'}")
    print(f"selection:         {output_dir / 'selection.png'}")
    print(f"next:              {_next(config, run_dir, output_dir, sources)}")
    return 0


@dataclass(frozen=True)
class _Kept:
    """Of a class: images uint8 (ipc, 3, s, s), candidate numbers of their first cells int64 (ipc,), and the report."""

    pixels: Tensor
    indices: Tensor
    report: ClassReport


def _run(config: DistillConfig) -> Path | None:
    """Returns the run whose data and observer are used, or None where both are given."""
    if config.run_dir is None and config.data.dataset is not None:
        return None
    run_dir, chosen = find_run(config.run_dir, with_generator=False)
    print(f"run: {run_dir} ({chosen})")
    return run_dir


def _output_dir(config: DistillConfig, run_dir: Path | None, name: str) -> Path:
    parent = Path("runs") / f"{name}-distilled" if run_dir is None else run_dir / "distilled"
    output_dir = Path(config.output_dir) if config.output_dir else parent / f"real-ipc{config.ipc}"
    if output_dir.exists() and not config.overwrite:
        raise UserError(f"--output_dir {output_dir}: exists already; give another, or --overwrite to replace it")
    return output_dir


def _observers(config: DistillConfig, run_dir: Path | None, name: str) -> list[str]:
    if config.observer:
        return list(config.observer)
    if run_dir is None:
        raise UserError(
            f"--observer: not set; train one with python -m ddgen observer --dataset {name}, or name a run by --run_dir"
        )
    return [str(observer_dir(run_dir))]


def _next(config: DistillConfig, run_dir: Path | None, output_dir: Path, observers: Sequence[str]) -> str:
    """Returns the command that scores the images; outside a run it has to be told what a run knows."""
    words = ["python", "evaluate.py", "--distilled_dir", str(output_dir)]
    if run_dir is not None:
        inside = output_dir.parent.resolve() == (run_dir / "distilled").resolve()
        return shlex.join(words if inside else [*words, "--run_dir", str(run_dir)])
    default, data = DataConfig(), config.data
    given = {name: value for name, value in vars(data).items() if value != getattr(default, name)}
    for name, value in given.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", str(value)]
    words += ["--observer", *observers, "--output_dir", f"{output_dir}-evaluation"]
    return shlex.join(words)


def _plans(config: DistillConfig, dataset: ImageDataset, members: list[Tensor]) -> list[CropPlan]:
    """Plans every class before any is cropped, and says which have too few images."""
    plans = [
        plan_crops(
            len(indices),
            class_name=dataset.class_names[label],
            label=label,
            ipc=config.ipc,
            factor=config.factor,
            mipc=config.mipc,
            num_crop=config.num_crop,
            seed=config.seed,
        )
        for label, indices in enumerate(members)
    ]
    for label, plan in enumerate(plans):
        if plan.kept_crops > 1:
            print(
                f"class {dataset.class_names[label]} has {len(plan.numbers)} images for {plan.quota} crops: up to "
                f"{plan.kept_crops} crops of the same image are kept, of {plan.num_crop} each"
            )
    return plans


def _keep(
    config: DistillConfig,
    dataset: ImageDataset,
    observer: Observer,
    members: list[Tensor],
    plans: list[CropPlan],
    device: torch.device,
    precision: str,
) -> list[_Kept]:
    """Goes through the classes one by one; of each only the kept images stay in memory."""
    compared = set(compared_classes(config.selection, dataset.num_classes))
    kept: list[_Kept] = []
    for label, plan in enumerate(tqdm(plans, desc="ranking", unit="class", leave=False)):
        real = None
        if label in compared:
            real = real_class_scores(observer, dataset, label, config.seed, device=device, precision=precision)
        ranked = rank_class(
            observer,
            dataset,
            members[label],
            label,
            plan,
            factor=config.factor,
            rule=config.selection,
            real=real,
            seed=config.seed,
            device=device,
            precision=precision,
        )
        pixels = ranked.images(config.factor, dataset.image_size)
        numbers = ranked.candidates.numbers[ranked.kept[: config.ipc]]
        kept.append(_Kept(pixels, numbers, report_class(ranked.candidates, ranked.kept)))
    return kept


def _distilled(
    config: DistillConfig,
    dataset: ImageDataset,
    observer: Observer,
    teachers: Sequence[Observer],
    kept: list[_Kept],
    report: SelectionReport,
    num_crops: int,
    device: torch.device,
    precision: str,
) -> DistilledDataset:
    """Relabels the images as they now are: grids are other images than the crops that were ranked."""
    pixels = torch.cat([one.pixels for one in kept])
    labels = torch.arange(dataset.num_classes).repeat_interleave(config.ipc)
    scores = realism_scores(observer, pixels, labels, batch_size=256, device=device, precision=precision)
    soft = label_ranked(
        observer, scores.logits, teachers, pixels, temperature=config.soft_label_temperature, batch_size=256,
        device=device, precision=precision,
    )  # fmt: skip
    return DistilledDataset(
        pixels=pixels,
        labels=labels,
        soft_labels=soft,
        realism=scores.loss,
        seeds=torch.full((len(labels),), config.seed),
        indices=torch.cat([one.indices for one in kept]),
        class_names=dataset.class_names,
        provenance=_provenance(config, dataset, observer, teachers, report, num_crops, precision),
    )


def _provenance(
    config: DistillConfig,
    dataset: ImageDataset,
    observer: Observer,
    teachers: Sequence[Observer],
    report: SelectionReport,
    num_crops: int,
    precision: str,
) -> dict[str, Any]:
    rule = "lowest realism loss of the observer (RDED)" if config.selection == "realism" else config.selection
    return {
        "source": "real",
        "factor": config.factor,
        "dataset": dataset.name,
        "dataset_fingerprint": dataset.fingerprint,
        "licence": dataset.licence,
        "num_source_images": len(dataset),
        "skipped_source_images": dataset.skipped,
        "command": command_line(),
        "seed": config.seed,
        "observer_fingerprint": observer.fingerprint,
        "teacher_fingerprints": [teacher.fingerprint for teacher in teachers],
        "selection": report.to_dict() | {"crops": num_crops},
        "recipe": {
            "images": "crops of real training images (RDED)",
            "images per class": config.ipc,
            "crops along a side of an image": config.factor,
            "real images cropped per class": config.mipc,
            "crops of each": config.num_crop,
            "selection": rule,
            "observer": f"{observer.network}, {observer.accuracy:.1%} on held-out real images",
            "soft labels": describe_teachers(teachers),
            "soft label temperature": config.soft_label_temperature,
            "precision": precision,
            "seed": config.seed,
        },
    }
