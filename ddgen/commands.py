"""The commands: settings in, rooms wired together, exit code out."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from ddgen.autoencoder import autoencoder as autoencoders
from ddgen.autoencoder.autoencoder import Autoencoder, check_fits, to_images
from ddgen.autoencoder.latents import LatentCache, build_latent_cache
from ddgen.autoencoder.training import build as build_autoencoder
from ddgen.autoencoder.training import psnr, train_autoencoder
from ddgen.checkpoint import latest_checkpoint, read_json, write_bytes, write_json
from ddgen.config import (
    DataConfig,
    EvaluateConfig,
    ObserverConfig,
    SampleConfig,
    TrainConfig,
    TrainObserverConfig,
    from_flat_dict,
    read_yaml,
    to_flat_dict,
    write_yaml,
)
from ddgen.data import ImageDataset, check_class_order, load_dataset, native_image_size
from ddgen.diffusion.generator import Generator, check_sampling, load_generator, save_generator
from ddgen.diffusion.training import Stopped, micro_batches, train_diffusion
from ddgen.diffusion.unet import build_unet
from ddgen.distill.dataset import DistilledDataset, update_results
from ddgen.distill.pool import CandidatePool
from ddgen.distill.relabel import soft_labels
from ddgen.distill.select import select_most_realistic, select_random
from ddgen.errors import UserError
from ddgen.evaluation.curve import draw_fid_curve
from ddgen.evaluation.evaluate import evaluate as evaluate_students
from ddgen.evaluation.frechet import DistanceMonitor, inception_extractor, observer_extractor
from ddgen.evaluation.report import format_table
from ddgen.launch import asked_for_cpu
from ddgen.observer.networks import build_network
from ddgen.observer.observer import Observer
from ddgen.observer.realism import RealismScores, check_observer, measure_accuracy, realism_losses
from ddgen.observer.training import train_observer
from ddgen.precision import resolve_precision

RUNS_DIR = Path("runs")
RANKING_BATCH_SIZE = 256


# ---------------------------------------------------------------------------------------------------------
# train


def train(config: TrainConfig) -> int:
    """Trains observer, autoencoder and diffusion model; ``runs/<dataset>/generator`` is what comes out."""
    output_dir, resume_from = _run_folder(config)
    accelerator, precision = _accelerator(config.optimizer.mixed_precision, config.monitor.report_to, output_dir)
    say = accelerator.print
    dataset = _load_on_all(accelerator, config.data, "train")
    given = _check_training(config, dataset, accelerator, precision)
    if config.run.dry_run:
        say(_describe_training(config, dataset, given, output_dir, accelerator, precision))
        return 0
    extractor = inception_extractor(config.monitor.inception_weights)  # a wrong file is found now
    if accelerator.is_main_process:
        _write_run_facts(config, dataset, output_dir)
    accelerator.wait_for_everyone()
    say(f"{dataset.name}: {len(dataset):,} training images, {dataset.num_classes} classes, {dataset.image_size} px")
    if accelerator.num_processes > 1:
        say(f"{accelerator.num_processes} processes")

    observer = _observer_of_run(config, given, dataset, output_dir / "observer", accelerator, precision)
    say(f"observer: {observer.network}, {observer.accuracy:.1%} on held-out real images")
    autoencoder, latents = _autoencoder_of_run(config, given, dataset, observer, output_dir, accelerator, precision)

    monitor = None
    if config.monitor.fid_every and accelerator.is_main_process:
        monitor = DistanceMonitor(
            dataset,
            extractor or observer_extractor(observer),
            num_images=config.monitor.fid_num_images,
            cache_dir=output_dir / "reference",
            device=accelerator.device,
            precision=precision,
            seed=config.run.seed,
        )
    if config.monitor.report_to != "none":
        accelerator.init_trackers("ddgen", config=_tracker_config(config))
    try:
        generator = train_diffusion(
            config,
            latents,
            dataset.labels,
            autoencoder,
            dataset.class_names,
            dataset.image_size,
            accelerator=accelerator,
            precision=precision,
            output_dir=output_dir,
            resume_from=resume_from,
            monitor=monitor,
            on_metrics=partial(draw_fid_curve, png_path=output_dir / "fid_curve.png"),
        )
    except Stopped as stopped:
        say(str(stopped))
        accelerator.end_training()
        return 128 + stopped.signal_number
    if accelerator.is_main_process:
        card = _generator_card(config, dataset, generator)
        save_generator(generator, output_dir / "generator", card, replace_existing=True)
    accelerator.wait_for_everyone()
    say(f"generator:   {output_dir / 'generator'}")
    if config.monitor.fid_every:
        say(f"FID curve:   {output_dir / 'fid_curve.png'}")
    say(f"samples:     {output_dir / 'samples'}")
    say(f"next:        python sample.py --run_dir {shlex.quote(str(output_dir))} --ipc 10")
    accelerator.end_training()
    return 0


def train_observer_alone(config: TrainObserverConfig) -> int:
    """Trains an observer and writes it to --output_dir; default runs/<dataset>-observer."""
    name = _dataset_name(config.data)
    output_dir = Path(config.output_dir or RUNS_DIR / f"{name}-observer")
    if output_dir.exists():
        raise UserError(f"--output_dir {output_dir}: exists already; choose another, or remove it")
    if config.observer.observer is not None:
        raise UserError(f"--observer {config.observer.observer}: this command trains one; use --observer_network")
    accelerator, precision = _accelerator(config.mixed_precision)
    dataset = _load_on_all(accelerator, config.data, "train")
    if config.dry_run:
        accelerator.print(f"would train {config.observer.observer_network} on {len(dataset):,} images -> {output_dir}")
        return 0
    observer = _train_observer(config.observer, config.data, dataset, output_dir, accelerator, precision, config.seed)
    accelerator.print(f"{observer.accuracy:.1%} on held-out real images; use it with --observer {output_dir}")
    return 0


@dataclass(frozen=True)
class _Given:
    """What the user brings instead of having it trained; loaded before anything is written."""

    observer: Observer | None
    autoencoder: Autoencoder | None


def _run_folder(config: TrainConfig) -> tuple[Path, Path | None]:
    """Returns the run's folder and the checkpoint to go on from."""
    output_dir = Path(config.run.output_dir or RUNS_DIR / _dataset_name(config.data))
    resume = config.run.resume_from_checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; choose another")
    if resume is None:
        if output_dir.exists() and any(output_dir.iterdir()):
            raise UserError(
                f"--output_dir {output_dir}: not empty; add --resume_from_checkpoint latest to go on, or choose another"
            )
        return output_dir, None
    _check_same_recipe(config, output_dir)
    if resume == "latest":
        return output_dir, latest_checkpoint(output_dir / "checkpoints")
    if not Path(resume).is_dir():
        raise UserError(
            f"--resume_from_checkpoint {resume}: no such folder; give `latest` or a checkpoints/step-* folder"
        )
    return output_dir, Path(resume)


# What a resumed run may do otherwise than the run it resumes: where things are, what is watched, how it is spread.
_MAY_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "dry_run", "data_dir", "cache_dir", "skip_bad_images"),
    *("checkpointing_steps", "checkpoints_total_limit", "log_every", "report_to", "sample_every", "fid_every"),
    *("fid_num_images", "fid_num_inference_steps", "inception_weights", "mixed_precision"),
    *("gradient_accumulation_steps", "num_inference_steps", "guidance_scale", "guidance_interval", "sampler"),
}
_OF_OBSERVER = {"observer", *(name for name in vars(ObserverConfig()) if name.startswith("observer_"))}


def _check_same_recipe(config: TrainConfig, output_dir: Path) -> None:
    """Refuses to go on with other settings than the run was started with."""
    if not (output_dir / "config.yaml").is_file():
        return
    before, now = to_flat_dict(_run_config(output_dir)), to_flat_dict(config)
    # Without an observer in the run yet, one that was too weak may be trained otherwise.
    free = _MAY_CHANGE | (set() if (output_dir / "observer").is_dir() else _OF_OBSERVER)
    for name in sorted(now.keys() - free):
        if before[name] != now[name]:
            raise UserError(
                f"--{name} {now[name]}: {output_dir} was started with {before[name]}; use that, or another --output_dir"
            )


def _check_training(config: TrainConfig, dataset: ImageDataset, accelerator: Accelerator, precision: str) -> _Given:
    """Finds settings that cannot be honoured before anything is trained or written."""
    processes, optim = accelerator.num_processes, config.optimizer
    micro_batches(optim.train_batch_size, optim.gradient_accumulation_steps, accelerator)
    check_sampling(config.guidance)
    check_sampling(replace(config.guidance, num_inference_steps=config.monitor.fid_num_inference_steps))
    autoencoder = None
    if config.autoencoder.vae is not None:
        autoencoder = autoencoders.load_pretrained(config.autoencoder.vae, accelerator.device, precision)
        check_fits(autoencoder, config.autoencoder.vae, dataset.pixels[:2])
    elif config.autoencoder.vae_batch_size % processes:
        raise UserError(
            f"--vae_batch_size {config.autoencoder.vae_batch_size}: must be a multiple of the {processes} processes"
        )
    d, side = _latent_shape(config, autoencoder, dataset)
    build_unet(config.denoiser, latent_channels=d, latent_size=side, num_classes=dataset.num_classes)
    observer = None
    if config.observer.observer is not None:
        observer = Observer.load(config.observer.observer, dataset.class_names)
    else:
        size = config.observer.observer_input_size or dataset.image_size
        build_network(config.observer.observer_network, dataset.num_classes, size)
    return _Given(observer, autoencoder)


def _latent_shape(config: TrainConfig, given: Autoencoder | None, dataset: ImageDataset) -> tuple[int, int]:
    if given is not None:
        mean, _ = given.encode(to_images(dataset.pixels[:1]))
        return mean.shape[1], mean.shape[2]
    vae = build_autoencoder(config.autoencoder, dataset.image_size)
    return vae.config.latent_channels, dataset.image_size // vae.config.downsample


def _write_run_facts(config: TrainConfig, dataset: ImageDataset, output_dir: Path) -> None:
    """Writes the settings, and what later commands must know of the data without having it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    data_dir = None if config.data.data_dir is None else str(Path(config.data.data_dir).resolve())
    run = replace(config.run, resume_from_checkpoint=None, dry_run=False)
    write_yaml(output_dir / "config.yaml", replace(config, run=run, data=replace(config.data, data_dir=data_dir)))
    facts = {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "licence": dataset.licence,
        "num_images": len(dataset),
        "class_names": list(dataset.class_names),
        "skipped": dataset.skipped,
    }
    write_json(output_dir / "dataset.json", facts)


def _observer_of_run(
    config: TrainConfig, given: _Given, dataset: ImageDataset, path: Path, accelerator: Accelerator, precision: str
) -> Observer:
    """Loads the observer that the run already has, or takes the one that was given; otherwise trains one."""
    exists = path.is_dir()
    accelerator.wait_for_everyone()  # all have looked before anyone writes
    if exists:
        observer = Observer.load(path, dataset.class_names)
    elif given.observer is not None:
        observer = given.observer
        if observer.accuracy is None:
            observer.accuracy = _held_out_accuracy(observer, config.data, accelerator, precision)
        check_observer(observer, dataset.class_names)
        if accelerator.is_main_process:
            observer.save(path)
    else:
        observer = _train_observer(config.observer, config.data, dataset, path, accelerator, precision, config.run.seed)
    accelerator.wait_for_everyone()
    try:
        check_observer(observer, dataset.class_names)
    except UserError:
        if accelerator.is_main_process:
            shutil.rmtree(path)  # so that the same run can go on with a better one
        raise
    return observer.to(accelerator.device).requires_grad_(False)


def _held_out_accuracy(observer: Observer, data: DataConfig, accelerator: Accelerator, precision: str) -> float:
    test = _load_on_all(accelerator, data, "test")
    return measure_accuracy(observer, test, device=accelerator.device, precision=precision)


def _train_observer(
    config: Any,
    data: DataConfig,
    dataset: ImageDataset,
    path: Path,
    accelerator: Accelerator,
    precision: str,
    seed: int,
) -> Observer:
    if accelerator.is_main_process:
        train_observer(
            config,
            dataset,
            output_dir=path,
            device=accelerator.device,
            precision=precision,
            seed=seed,
            flip=data.may_flip,
        )
    accelerator.wait_for_everyone()
    return Observer.load(path, dataset.class_names).to(accelerator.device)


def _autoencoder_of_run(
    config: TrainConfig,
    given: _Given,
    dataset: ImageDataset,
    observer: Observer,
    output_dir: Path,
    accelerator: Accelerator,
    precision: str,
) -> tuple[Autoencoder, LatentCache]:
    """Takes the autoencoder that the run has or was given, or trains one, and encodes every training image."""
    path, device = output_dir / "autoencoder", accelerator.device
    exists = path.is_dir()
    accelerator.wait_for_everyone()  # all have looked before anyone writes
    if not exists:
        if given.autoencoder is not None:
            autoencoder = given.autoencoder
            report = {"psnr": psnr(autoencoder, dataset.pixels[:: max(len(dataset) // 512, 1)][:512])}
        else:
            autoencoder, report = train_autoencoder(
                config.autoencoder,
                dataset.pixels,
                accelerator=accelerator,
                precision=precision,
                seed=config.run.seed,
                flip=config.data.may_flip,
                perceptual=_perceptual_loss(observer) if config.autoencoder.vae_perceptual_weight else None,
            )
        floor = f" (patch PCA {report['psnr_pca']:.2f})" if "psnr_pca" in report else ""
        accelerator.print(f"autoencoder: {report['psnr']:.2f} dB on held-out images{floor}")
        if accelerator.is_main_process:
            autoencoders.save(autoencoder, path, **report)
        accelerator.wait_for_everyone()
    autoencoder = autoencoders.load(path, device, precision)
    with accelerator.main_process_first():
        return build_latent_cache(
            autoencoder,
            dataset.pixels,
            output_dir / "latents",
            flip=config.data.may_flip,
            fingerprint=f"{autoencoder.fingerprint()}-{dataset.fingerprint}",
        )


def _perceptual_loss(observer: Observer) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(restored: Tensor, original: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.normalize(observer.features((original + 1) / 2), dim=1)
        found = F.normalize(observer.features((restored + 1) / 2), dim=1)
        return (found - wanted).square().sum(1).mean()

    return loss


def _describe_training(
    config: TrainConfig,
    dataset: ImageDataset,
    given: _Given,
    output_dir: Path,
    accelerator: Accelerator,
    precision: str,
) -> str:
    d, side = _latent_shape(config, given.autoencoder, dataset)
    unet = build_unet(config.denoiser, latent_channels=d, latent_size=side, num_classes=dataset.num_classes)
    optim = config.optimizer
    epochs = optim.max_train_steps * optim.train_batch_size / len(dataset)
    size = f"{dataset.image_size} px"
    return "\n".join(
        [
            "dry run: the settings and the data are fine; nothing was written",
            f"  data         {dataset.name}, {len(dataset):,} images, {dataset.num_classes} classes, {size}",
            f"  observer     {config.observer.observer or config.observer.observer_network}",
            f"  autoencoder  {config.autoencoder.vae or 'trained from patch PCA'}, latents {d} x {side} x {side}",
            f"  denoiser     {sum(p.numel() for p in unet.parameters()) / 1e6:.1f}M parameters",
            f"  training     {optim.max_train_steps:,} steps of {optim.train_batch_size} images, {epochs:.1f} epochs",
            f"  device       {accelerator.device}, {accelerator.num_processes} process(es), precision {precision}",
            f"  output       {output_dir}",
        ]
    )


def _tracker_config(config: TrainConfig) -> dict[str, Any]:
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in to_flat_dict(config).items()
    }


def _generator_card(config: TrainConfig, dataset: ImageDataset, generator: Generator) -> str:
    names = ", ".join(dataset.class_names[:10]) + (", ..." if dataset.num_classes > 10 else "")
    return f"""---
library_name: diffusers
tags: [dataset-distillation, class-conditional-generation, ddgen]
---

# Class-conditional latent diffusion model of {dataset.name}

{dataset.num_classes} classes ({names}), {dataset.image_size} x {dataset.image_size} pixels. Trained with ddgen on
{len(dataset):,} images for {config.optimizer.max_train_steps:,} steps of {config.optimizer.train_batch_size}.
Licence of the images it was trained on: {dataset.licence}.

```python
from diffusers import DiffusionPipeline

folder = "path/to/this/folder"
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipe(class_labels=[0, 1, 2]).images
```

Samples with {generator.sampling.sampler}, {generator.sampling.num_inference_steps} steps, guidance
{generator.sampling.guidance_scale} at noise levels {generator.sampling.guidance_interval[0]} to
{generator.sampling.guidance_interval[1]}, unless told otherwise.
"""


# ---------------------------------------------------------------------------------------------------------
# sample


def sample(config: SampleConfig) -> int:
    """Candidates, ranking, relabelling: writes a distilled dataset."""
    if config.ipc < 1 or config.candidates_per_image < 1:
        raise UserError(
            f"--ipc {config.ipc}, --candidates_per_image {config.candidates_per_image}: give at least 1 each"
        )
    run_dir, chosen = _find_run(config.run_dir)
    output_dir = Path(config.output_dir or run_dir / "distilled" / f"ipc{config.ipc}")
    if output_dir.exists() and not config.overwrite:
        raise UserError(f"--output_dir {output_dir}: exists already; give another, or --overwrite to replace it")
    accelerator, precision = _accelerator(config.mixed_precision)
    say = accelerator.print
    say(f"run: {run_dir} ({chosen})")
    clock = _Clock(say)
    run_config = _run_config(run_dir)
    generator = load_generator(run_dir / "generator", accelerator.device, precision).with_sampling(
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        guidance_interval=config.guidance_interval,
        sampler=config.sampler,
    )
    check_sampling(generator.sampling, generator.scheduler.config.num_train_timesteps)
    observer = Observer.load(config.observer or run_dir / "observer", generator.class_names)
    if observer.accuracy is None:
        observer.accuracy = _held_out_accuracy(observer, run_config.data, accelerator, precision)
    check_observer(observer, generator.class_names)
    count = config.ipc * config.candidates_per_image
    total = count * len(generator.class_names)
    if config.dry_run:
        say(f"dry run: {total:,} candidates, {config.ipc} of {count} kept in each class -> {output_dir}")
        return 0

    settings = _pool_settings(generator, precision, accelerator.device)
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
    with clock("sampling"):
        pool.fill(
            lambda labels, indices: generator.sample(labels, indices, config.seed),
            count,
            batch_size=config.sample_batch_size,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            progress=accelerator.is_main_process,
        )
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _distill(config, run_dir, run_config, generator, observer, pool, count, output_dir, precision, clock)
        if not (pool_dir / "keep").exists():
            shutil.rmtree(pool_dir)
    accelerator.wait_for_everyone()
    return 0


def _distill(
    config: SampleConfig,
    run_dir: Path,
    run_config: TrainConfig,
    generator: Generator,
    observer: Observer,
    pool: CandidatePool,
    count: int,
    output_dir: Path,
    precision: str,
    clock: _Clock,
) -> None:
    """Ranks the pool class by class, keeps the best, relabels them and writes everything."""
    scores = partial(
        realism_losses, observer, batch_size=RANKING_BATCH_SIZE, device=generator.unet.device, precision=precision
    )
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
        write_bytes(_random_generated_path(run_dir, output_dir), save(baseline))
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
    generator: Generator,
    observer: Observer,
    precision: str,
    selection: dict[str, float],
) -> dict[str, Any]:
    real = read_json(run_dir / "dataset.json")
    check_class_order(
        real["class_names"], generator.class_names, expected_name="the training images", found_name="the generator"
    )
    sampling, optim = generator.sampling, run_config.optimizer
    return {
        "dataset": real["name"],
        "dataset_fingerprint": real["fingerprint"],
        "licence": real["licence"],
        "num_source_images": real["num_images"],
        "skipped_source_images": real["skipped"],
        "command": _command_line(),
        "seed": config.seed,
        "generator_fingerprint": generator.fingerprint(),
        "observer_fingerprint": observer.fingerprint,
        "selection": selection,
        "recipe": {
            "images per class": config.ipc,
            "candidates per image kept": config.candidates_per_image,
            "selection": "lowest realism loss of the observer (RDED)",
            "sampler": f"{sampling.sampler}, {sampling.num_inference_steps} steps",
            "guidance": "{} in {} to {}".format(sampling.guidance_scale, *sampling.guidance_interval),
            "generator training": f"{optim.max_train_steps} steps of {optim.train_batch_size}",
            "observer": f"{observer.network}, {observer.accuracy:.1%} on held-out real images",
            "soft label temperature": config.soft_label_temperature,
            "precision": precision,
            "seed": config.seed,
        },
    }


def _pool_settings(generator: Generator, precision: str, device: torch.device) -> dict[str, Any]:
    sampling = generator.sampling
    return {
        "generator": generator.fingerprint(),
        "sampler": sampling.sampler,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "guidance_interval": list(sampling.guidance_interval),
        "precision": precision,
        "device": device.type,
    }


# ---------------------------------------------------------------------------------------------------------
# evaluate


def evaluate(config: EvaluateConfig) -> int:
    """Trains students on the distilled images and on the baselines; writes results.json, a table and a figure."""
    run_dir, distilled_dir = _what_to_evaluate(config)
    output_dir = _evaluation_dir(config, run_dir, distilled_dir)
    accelerator, precision = _accelerator(config.mixed_precision)
    if accelerator.num_processes > 1:
        raise UserError(f"evaluate.py runs in one process, not {accelerator.num_processes}: start it with python")
    distilled = DistilledDataset.load(distilled_dir)
    data = _evaluation_data(config, run_dir)
    train_images, test_images = (_load_on_all(accelerator, data, split) for split in ("train", "test"))
    source = config.observer or (run_dir / "observer" if run_dir is not None else None)
    observer = Observer.load(source, distilled.class_names) if source is not None else None
    students = config.students or _default_students(observer)
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
        random_generated=(generated["pixels"], generated["labels"]) if generated else None,
    )
    update_results(distilled_dir, results.to_dict())
    print(format_table(results))
    print(f"results:           {output_dir / 'results.json'}")
    print(f"figure:            {output_dir / 'accuracy.png'}")
    print(f"distilled dataset: {distilled_dir}")
    print(f"preview:           {distilled_dir / 'preview.png'}")
    return 0


def _random_generated_path(run_dir: Path, distilled_dir: Path) -> Path:
    """Where sample.py leaves as many candidates, drawn at random, for the report's random-generated rows."""
    return run_dir / "baselines" / f"random-generated-{distilled_dir.name}.safetensors"


def _load_random_generated(run_dir: Path | None, distilled_dir: Path) -> dict[str, Tensor] | None:
    path = None if run_dir is None else _random_generated_path(run_dir, distilled_dir)
    if path is None or not path.is_file():
        print("no random-generated rows: sample.py left no unselected candidates of this dataset")
        return None
    return load_file(path)


def _what_to_evaluate(config: EvaluateConfig) -> tuple[Path | None, Path]:
    if config.distilled_dir is not None:
        path = Path(config.distilled_dir)
        run_dir = Path(config.run_dir) if config.run_dir else None
        if run_dir is None and path.parent.name == "distilled" and (path.parent.parent / "config.yaml").is_file():
            run_dir = path.parent.parent
        return run_dir, path
    run_dir, chosen = _find_run(config.run_dir)
    print(f"run: {run_dir} ({chosen})")
    if config.ipc is not None:
        return run_dir, run_dir / "distilled" / f"ipc{config.ipc}"
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


def _evaluation_data(config: EvaluateConfig, run_dir: Path | None) -> DataConfig:
    """The run's data settings, under those that were given."""
    if run_dir is None:
        return config.data
    given = {name: value for name, value in vars(config.data).items() if value != getattr(DataConfig(), name)}
    return replace(_run_config(run_dir).data, **given)


def _default_students(observer: Observer | None) -> tuple[str, ...]:
    if observer is not None and ":" not in observer.network:  # a ConvNet or a ResNet that ddgen builds
        return (observer.network,)
    return ("convnet3",)


# ---------------------------------------------------------------------------------------------------------
# shared


def _accelerator(
    mixed_precision: str | None, report_to: str = "none", project_dir: Path | None = None
) -> tuple[Accelerator, str]:
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UserError(f"--report_to {report_to}: not installed; pip install {report_to}, or leave it out")
    patience = timedelta(hours=24)  # the others wait while the first process trains the observer
    device = PartialState(cpu=asked_for_cpu(), timeout=patience).device
    precision = resolve_precision(mixed_precision, device)
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=None if report_to == "none" else report_to,
        project_dir=project_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)],
    )
    return accelerator, precision


def _load_on_all(accelerator: Accelerator, data: DataConfig, split: Literal["train", "test"]) -> ImageDataset:
    """Loads a split; the first process decodes it, the others read its cache."""
    _dataset_name(data)
    with accelerator.main_process_first():
        return load_dataset(data, split, progress=accelerator.is_main_process)


def _dataset_name(data: DataConfig) -> str:
    if data.dataset is None:
        raise UserError(
            "--dataset: not set; for instance --dataset tinyimagenet, or imagefolder with --data_dir FOLDER"
        )
    native_image_size(data.dataset)
    return data.dataset


def _find_run(run_dir: str | None) -> tuple[Path, str]:
    """Returns a finished run and how it was chosen."""
    if run_dir is not None:
        path = Path(run_dir)
        if not (path / "generator" / "model_index.json").is_file():
            raise UserError(f"--run_dir {path}: no finished run (generator/model_index.json); train with train_ldm.py")
        return path, "--run_dir"
    found = sorted(RUNS_DIR.glob("*/generator/model_index.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"--run_dir: no finished run under {RUNS_DIR}/; train with train_ldm.py, or name one")
    return found[-1].parent.parent, f"the newest of {len(found)} finished under {RUNS_DIR}/"


def _run_config(run_dir: Path) -> TrainConfig:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"--run_dir {run_dir}: config.yaml is missing; give a folder that train_ldm.py wrote")
    return from_flat_dict(TrainConfig, read_yaml(path), str(path))


def _command_line() -> str:
    program = Path(sys.argv[0]).name
    return " ".join(["python", *map(shlex.quote, [program, *sys.argv[1:]])])


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
