"""What ``sample`` makes of the kept candidates, and what it says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddgen.checkpoint import read_json
from ddgen.commands.runs import command_line, read_run_config
from ddgen.config import SampleConfig
from ddgen.diffusion.foreign import ForeignGenerator
from ddgen.distill.dataset import DistilledDataset
from ddgen.distill.pool import CandidateSource
from ddgen.distill.relabel import describe_teachers, label_ranked
from ddgen.distill.selection_report import SelectionReport
from ddgen.distill.streaming import SelectedClass, rejections
from ddgen.observer.inference import batch_size_of
from ddgen.observer.observer import Observer
from ddgen.timing import Clock


def build_dataset(
    config: SampleConfig,
    source: CandidateSource,
    classes: Sequence[SelectedClass],
    soft: Tensor,
    *,
    run_dir: Path,
    observer: Observer,
    teachers: Sequence[Observer],
    precision: str,
    seconds: Mapping[str, float],
    machine: Mapping[str, Any],
    num_made: int,
) -> DistilledDataset:
    """Puts together what all classes keep.

    Args:
        config: Settings.
        source: What made the candidates.
        classes: In label order.
        soft: Their soft labels, float16 (n, k).
        run_dir: The training run.
        observer: What ranked them.
        teachers: What labelled them.
        precision: Resolved.
        seconds: Stage -> how long it took this process.
        machine: As `made_with` says.
        num_made: Candidates that this process made in that time; others were there already.
    """
    labels = torch.cat([torch.full((len(found.loss),), label) for label, found in enumerate(classes)])
    return DistilledDataset(
        pixels=torch.cat([found.pixels for found in classes]),
        labels=labels,
        soft_labels=soft,
        realism=torch.cat([found.loss for found in classes]),
        seeds=torch.full((len(labels),), config.seed),
        indices=torch.cat([found.index[: len(found.loss)] for found in classes]),
        class_names=source.class_names,
        provenance={
            **_source_facts(run_dir),
            "command": command_line(),
            "seed": config.seed,
            "candidates": source.settings(),
            "foreign_generator": source.credit() if isinstance(source, ForeignGenerator) else None,
            "observer_fingerprint": observer.fingerprint,
            "teacher_fingerprints": [teacher.fingerprint for teacher in teachers],
            "factor": config.factor,
            "selection": selection_report(config, source, classes).to_dict() | selection_facts(config, classes),
            "seconds": dict(seconds),
            "made_with": dict(machine),
            "candidates_made": num_made,
            "recipe": _recipe(config, source, classes, run_dir, observer, teachers, precision),
        },
    )


def label_kept(
    config: SampleConfig,
    classes: Sequence[SelectedClass],
    observer: Observer,
    teachers: Sequence[Observer],
    device: torch.device,
    precision: str,
) -> Tensor:
    """Returns the soft labels that the teachers give to what all classes keep, float16 (n, k)."""
    logits, pixels = (torch.cat([getattr(found, name) for found in classes]) for name in ("logits", "pixels"))
    return label_ranked(
        observer, logits, teachers, pixels, temperature=config.soft_label_temperature,
        batch_size=batch_size_of(device), device=device, precision=precision,
    )  # fmt: skip


def random_generated(classes: Sequence[SelectedClass], labels: Tensor) -> dict[str, Tensor]:
    """Returns as many candidates as are kept, drawn at random: pixels uint8 (n, 3, h, w) and labels int64 (n,)."""
    return {"pixels": torch.cat([found.random for found in classes]), "labels": labels.contiguous()}


def best_rejected(classes: Sequence[SelectedClass]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the best candidates that were not kept: pixels uint8 (n, 3, h, w), labels int64 (n,), losses (n,)."""
    labels = torch.cat([torch.full((len(found.rejected),), label) for label, found in enumerate(classes)])
    pixels = torch.cat([found.rejected for found in classes])
    return pixels, labels, torch.cat([found.rejected_loss for found in classes])


def selection_report(
    config: SampleConfig, source: CandidateSource, classes: Sequence[SelectedClass]
) -> SelectionReport:
    """Returns what the rule did to all classes."""
    return SelectionReport(config.rule, source.class_names, [found.report for found in classes])


def selection_facts(config: SampleConfig, classes: Sequence[SelectedClass]) -> dict[str, Any]:
    """Returns what selection did, as JSON; means over the pool are means of the classes' means."""
    named_kept = torch.cat([found.predicted == label for label, found in enumerate(classes)])
    return {
        "candidates": sum(len(found.all_loss) for found in classes),
        "mean_realism_loss_pool": _mean([found.all_loss[~found.blank].double().mean().item() for found in classes]),
        "mean_realism_loss_kept": torch.cat([found.loss for found in classes]).double().mean().item(),
        "class_named_pool": _mean(
            [(found.all_predicted == label).double().mean().item() for label, found in enumerate(classes)]
        ),
        "class_named_kept": named_kept.double().mean().item(),
        "rejected": rejections(classes, config.rule),
    }


def kept_line(dataset: DistilledDataset) -> str:
    """Says how much was kept and how it compares with the rest."""
    facts, pieces = dataset.provenance["selection"], dataset.factor**2
    of_what = "" if pieces == 1 else f", {pieces} in each of {len(dataset):,} images"
    return (
        f"kept {len(dataset) * pieces:,} of {facts['candidates']:,} candidates{of_what}: mean realism loss"
        f" {facts['mean_realism_loss_kept']:.3f} (pool {facts['mean_realism_loss_pool']:.3f}); the observer names the"
        f" class of {facts['class_named_kept']:.1%} (pool {facts['class_named_pool']:.1%})"
    )


def rejected_line(config: SampleConfig, classes: Sequence[SelectedClass]) -> str:
    """Says how many candidates were rejected and why."""
    reasons = rejections(classes, config.rule)
    text = "; ".join(f"{reason}: {count:,}" for reason, count in reasons.items())
    return f"rejected {sum(reasons.values()):,}: {text}"


def time_line(clock: Clock, images: Mapping[str, int], num_processes: int) -> str:
    """Says how long each stage took.

    Args:
        clock: Of this process.
        images: Stage -> images that went through it.
        num_processes: How many processes there were.
    """
    parts = []
    for stage, seconds in clock.seconds.items():
        rate = f" ({images[stage] / seconds:,.1f} images/s)" if images.get(stage) and seconds else ""
        parts.append(f"{stage} {seconds:,.1f} s{rate}")
    whose = "time: " if num_processes == 1 else f"time of process 1 of {num_processes}: "
    return whose + ", ".join(parts)


def _recipe(
    config: SampleConfig,
    source: CandidateSource,
    classes: Sequence[SelectedClass],
    run_dir: Path,
    observer: Observer,
    teachers: Sequence[Observer],
    precision: str,
) -> dict[str, Any]:
    counts = sorted(len(found.all_loss) for found in classes)
    per_class = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
    if config.budget_seconds is not None:
        per_class += f", as many as {config.budget_seconds:g} s allowed"
    optim = read_run_config(run_dir).optimizer
    own = {"generator training": f"{optim.max_train_steps} steps of {optim.train_batch_size}"}
    rule: str = config.selection if config.ipc else "none: every candidate is kept"
    if rule == "realism":
        rule = "lowest realism loss of the observer (RDED)"
    return {
        "images per class": config.ipc or "all candidates",
        **({"candidates along a side of an image": config.factor} if config.factor > 1 else {}),
        "candidates per class": per_class,
        "selection": rule,
        **source.describe(),
        **(own if config.generator is None else {}),
        "observer": f"{observer.network}, {observer.accuracy:.1%} on held-out real images",
        "soft labels": describe_teachers(teachers),
        "soft label temperature": config.soft_label_temperature,
        "precision": precision,
        "seed": config.seed,
    }


def _source_facts(run_dir: Path) -> dict[str, Any]:
    real = read_json(run_dir / "dataset.json")
    return {
        "dataset": real["name"],
        "dataset_fingerprint": real["fingerprint"],
        "licence": real["licence"],
        "num_source_images": real["num_images"],
        "skipped_source_images": real["skipped"],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
