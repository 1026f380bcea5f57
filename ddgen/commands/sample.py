"""``sample``: a run in, a distilled dataset out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ddgen.checkpoint import read_json, remove_dir, write_bytes
from ddgen.commands.generators import candidate_source, check_probe, probe_classes
from ddgen.commands.runs import (
    command_line,
    find_run,
    held_out_accuracy,
    observer_dir,
    random_generated_path,
    read_run_config,
    start_accelerator,
)
from ddgen.config import (
    SampleConfig,
    TrainConfig,
)
from ddgen.diffusion.foreign import ForeignGenerator
from ddgen.diffusion.generator import Generator
from ddgen.distill.dataset import DistilledDataset
from ddgen.distill.pool import CandidatePool
from ddgen.distill.relabel import soft_labels
from ddgen.distill.select import select_most_realistic, select_random
from ddgen.errors import UserError
from ddgen.observer.observer import Observer
from ddgen.observer.realism import RealismScores, check_observer, realism_losses
from ddgen.resume import on_main

RANKING_BATCH_SIZE = 256


def sample(config: SampleConfig) -> int:
    """Candidates, ranking, relabelling: writes a distilled dataset."""
    run_dir, chosen = find_run(config.run_dir, with_generator=config.generator is None)
    output_dir = Path(config.output_dir or run_dir / "distilled" / f"ipc{config.ipc}")
    if output_dir.exists() and not config.overwrite:
        raise UserError(f"--output_dir {output_dir}: exists already; give another, or --overwrite to replace it")
    accelerator, precision = start_accelerator(config.mixed_precision)
    if accelerator.num_processes > 1:
        accelerator.print(f"{accelerator.num_processes} processes")
    say = accelerator.print
    say(f"run: {run_dir} ({chosen})")
    clock = _Clock(say)
    run_config = read_run_config(run_dir)
    generator = candidate_source(config, run_dir, accelerator, precision)
    observer = Observer.load(config.observer or observer_dir(run_dir), generator.class_names)
    if observer.accuracy is None:
        observer.accuracy = held_out_accuracy(observer, run_config.data, accelerator, precision)
    check_observer(observer, generator.class_names)
    count = config.ipc * config.candidates_per_image
    total = count * len(generator.class_names)
    if config.dry_run:
        say(f"dry run: {total:,} candidates, {config.ipc} of {count} kept in each class -> {output_dir}")
        return 0

    settings = generator.settings()
    pool_dir = run_dir / "pool" / f"seed{config.seed}-{_short_hash(settings)}"
    with accelerator.main_process_first():
        pool = CandidatePool.open(
            pool_dir,
            class_names=generator.class_names,
            image_size=generator.image_size,
            seed=config.seed,
            settings=settings,
        )
    if config.keep_pool and accelerator.is_main_process:
        (pool_dir / "keep").touch()
    sample_fn = partial(generator.sample, seed=config.seed)
    classes, probed = probe_classes(len(generator.class_names), count)

    def probe() -> None:
        pool.fill(sample_fn, probed, batch_size=config.sample_batch_size, classes=classes, progress=False)
        pixels = torch.cat([pool.read(label, probed)[0] for label in classes])
        labels = torch.tensor(classes).repeat_interleave(probed)
        check_probe(config, pixels, labels, observer, accelerator.device, precision, say)

    with clock("sampling"):
        on_main(accelerator, probe)
        pool.fill(
            sample_fn,
            count,
            batch_size=config.sample_batch_size,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            progress=accelerator.is_main_process,
        )
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        facts = (run_dir, run_config, generator, observer)
        _distill(config, *facts, pool, count, output_dir, precision, clock, accelerator.device)
        # One that was kept on purpose stays, and so does what a larger, unfinished, request left.
        if not (pool_dir / "keep").exists() and pool.num_stored() == total:
            remove_dir(pool_dir)
    accelerator.wait_for_everyone()
    return 0


def _distill(
    config: SampleConfig,
    run_dir: Path,
    run_config: TrainConfig,
    generator: Generator | ForeignGenerator,
    observer: Observer,
    pool: CandidatePool,
    count: int,
    output_dir: Path,
    precision: str,
    clock: _Clock,
    device: torch.device,
) -> None:
    """Ranks the pool class by class, keeps the best, relabels them and writes everything."""
    scores = partial(realism_losses, observer, batch_size=RANKING_BATCH_SIZE, device=device, precision=precision)
    parts: list[tuple[Tensor, Tensor, RealismScores, Tensor]] = []
    random: list[Tensor] = []
    pool_loss = pool_correct = 0.0
    with clock("ranking"):
        for label in range(len(pool.class_names)):
            pixels, indices = pool.read(label, count)
            score = scores(pixels=pixels, labels=torch.full((count,), label))
            keep = select_most_realistic(score.loss, config.ipc, indices)
            parts.append((pixels[keep], indices[keep], _rows(score, keep), torch.full((config.ipc,), label)))
            random.append(pixels[select_random(count, config.ipc, config.seed, label)])
            pool_loss += score.loss.double().mean().item() / len(pool.class_names)
            pool_correct += (score.predicted == label).double().mean().item() / len(pool.class_names)
    labels = torch.cat([part[3] for part in parts])
    loss = torch.cat([part[2].loss for part in parts])
    predicted = torch.cat([part[2].predicted for part in parts])
    selection = {
        "candidates": count * len(pool.class_names),
        "mean_realism_loss_pool": pool_loss,
        "mean_realism_loss_kept": loss.double().mean().item(),
        "class_named_pool": pool_correct,
        "class_named_kept": (predicted == labels).double().mean().item(),
    }
    dataset = DistilledDataset(
        pixels=torch.cat([part[0] for part in parts]),
        labels=labels,
        soft_labels=soft_labels(torch.cat([part[2].logits for part in parts]), config.soft_label_temperature),
        realism=loss,
        seeds=torch.full((len(labels),), config.seed),
        indices=torch.cat([part[1] for part in parts]),
        class_names=generator.class_names,
        provenance=_provenance(config, run_dir, run_config, generator, observer, precision, selection),
    )
    with clock("writing"):
        dataset.save(output_dir, overwrite=config.overwrite)
        baseline = {"pixels": torch.cat(random), "labels": labels.contiguous()}
        write_bytes(random_generated_path(run_dir, output_dir), save(baseline))
    clock.say(
        f"kept {len(labels):,} of {selection['candidates']:,} candidates: mean realism loss"
        f" {selection['mean_realism_loss_kept']:.3f} (pool {pool_loss:.3f}); the observer names the class of"
        f" {selection['class_named_kept']:.1%} (pool {pool_correct:.1%})"
    )
    clock.say(f"time: {clock.summary()}")
    clock.say(f"distilled dataset: {output_dir}")
    clock.say(f"preview:           {output_dir / 'preview.png'}")
    clock.say("next:              python evaluate.py")


def _rows(score: RealismScores, keep: Tensor) -> RealismScores:
    return RealismScores(score.loss[keep], score.predicted[keep], score.logits[keep])


def _provenance(
    config: SampleConfig,
    run_dir: Path,
    run_config: TrainConfig,
    generator: Generator | ForeignGenerator,
    observer: Observer,
    precision: str,
    selection: dict[str, float],
) -> dict[str, Any]:
    real = read_json(run_dir / "dataset.json")
    optim = run_config.optimizer
    own = {"generator training": f"{optim.max_train_steps} steps of {optim.train_batch_size}"}
    return {
        "dataset": real["name"],
        "dataset_fingerprint": real["fingerprint"],
        "licence": real["licence"],
        "num_source_images": real["num_images"],
        "skipped_source_images": real["skipped"],
        "command": command_line(),
        "seed": config.seed,
        "generator_fingerprint": generator.fingerprint(),
        "foreign_generator": generator.credit() if isinstance(generator, ForeignGenerator) else None,
        "observer_fingerprint": observer.fingerprint,
        "selection": selection,
        "recipe": {
            "images per class": config.ipc,
            "candidates per image kept": config.candidates_per_image,
            "selection": "lowest realism loss of the observer (RDED)",
            **generator.describe(),
            **(own if config.generator is None else {}),
            "observer": f"{observer.network}, {observer.accuracy:.1%} on held-out real images",
            "soft label temperature": config.soft_label_temperature,
            "seed": config.seed,
        },
    }


def _short_hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


class _Clock:
    """Measures stages and says at the end how long each took."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    def summary(self) -> str:
        return ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self.seconds.items())
