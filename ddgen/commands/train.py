"""``train`` and ``observer``: real images in, a run folder out."""

from __future__ import annotations

import os
import shlex
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ddgen.autoencoder import autoencoder as autoencoders
from ddgen.autoencoder.autoencoder import Autoencoder
from ddgen.autoencoder.latents import LatentCache, build_latent_cache
from ddgen.autoencoder.training import psnr, train_autoencoder
from ddgen.checkpoint import checkpoint_step, locked, remove_leftovers, write_json
from ddgen.commands.first_lines import first_lines
from ddgen.commands.history import History
from ddgen.commands.model_card import card_pictures, render_model_card
from ddgen.commands.runs import (
    RUNS_DIR,
    check_shared,
    dataset_name,
    held_out_accuracy,
    load_on_all,
    start_accelerator,
)
from ddgen.commands.train_checks import (
    Given,
    RunFolder,
    check_same_images,
    check_training,
    run_folder,
)
from ddgen.commands.train_curve import draw_curve, fid_every_of_run, monitor_of_run
from ddgen.config import (
    DataConfig,
    ObserverConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    TrainObserverConfig,
    to_flat_dict,
    write_yaml,
)
from ddgen.data import ImageDataset, split_holdout
from ddgen.diffusion.generator import save_generator
from ddgen.diffusion.kept_guide import is_missed, kept_guide
from ddgen.diffusion.training import train_diffusion
from ddgen.errors import Stopped, UserError
from ddgen.evaluation.curve import best_point
from ddgen.evaluation.extractors import Extractor, choose_extractor, observer_extractor
from ddgen.evaluation.reconstruction import report_reconstruction
from ddgen.hardware import peak_memory
from ddgen.observer.epochs import TRAINING_NAME
from ddgen.observer.observer import Observer
from ddgen.observer.perceptual import PerceptualLoss
from ddgen.observer.realism import check_observer
from ddgen.observer.training import train_observer
from ddgen.page.run import AUTOENCODER_STAGE, OBSERVER_STAGE
from ddgen.resume import Checkpoints, on_main
from ddgen.stopping import stop_at_once


def train(config: TrainConfig) -> int:
    """Trains observer, autoencoder and diffusion model; ``runs/<dataset>/generator`` is what comes out."""
    folder = run_folder(config)
    if folder.finished:
        if os.environ.get("RANK", "0") == "0":
            print(f"{folder.path}: this run is finished; another --output_dir trains anew")
        return 0
    report_to = config.monitor.report_to
    with stop_at_once(), ExitStack() as held:
        accelerator, precision = start_accelerator(config.optimizer.mixed_precision, report_to, folder.path)
        try:
            return _train(config, folder, accelerator, precision, held)
        except Stopped as stopped:
            accelerator.print(str(stopped))
            accelerator.end_training()
            return 128 + stopped.signal_number


def _train(config: TrainConfig, folder: RunFolder, accelerator: Accelerator, precision: str, held: ExitStack) -> int:
    """Does the work of `train`; `held` gets the lock on the run folder."""
    say, output_dir, last = accelerator.print, folder.path, config.optimizer.max_train_steps
    if folder.goes_on:
        done = checkpoint_step(folder.resume_from) if folder.resume_from is not None else 0
        say(f"going on with {output_dir} at step {done:,} of {last:,}")
    if folder.resume_from is not None and is_missed(config.optimizer, output_dir, folder.resume_from):
        kept_at = config.optimizer.guide_step
        say(f"no guide:    {folder.resume_from} is past step {kept_at:,}, after which one is kept, and there is none")
    dataset = load_on_all(accelerator, config.data, "train")
    check_same_images(output_dir, dataset)
    given = check_training(config, dataset, accelerator, precision)
    extractor = None
    if config.monitor.fid_every != 0 and accelerator.is_main_process:  # what cannot be had is found now
        extractor = choose_extractor(config.monitor.fd_network, config.monitor.inception_weights)
    say(first_lines(config, dataset, given, output_dir, folder.resume_from, accelerator, precision))
    if config.run.dry_run:
        say("dry run: the settings and the data are fine; nothing was written")
        return 0
    on_main(accelerator, lambda: held.enter_context(locked(output_dir)))
    on_main(accelerator, lambda: _write_run_facts(config, dataset, output_dir))
    check_shared(output_dir / "dataset.json", accelerator)
    history = History(output_dir, accelerator, precision)
    history.start()
    with history.stage(OBSERVER_STAGE):
        observer = observer_of_run(config, given, dataset, output_dir / "observer", accelerator, precision)
    say(f"observer: {observer.network}, {observer.accuracy:.1%} on held-out real images")
    with history.stage(AUTOENCODER_STAGE):
        autoencoder, latents = autoencoder_of_run(config, given, dataset, observer, output_dir, accelerator, precision)
    if accelerator.is_main_process and not (output_dir / "reconstruction.json").is_file():
        say(_reconstruction(config, dataset, autoencoder, observer, extractor, output_dir, precision))
    accelerator.wait_for_everyone()

    with history.stage("diffusion model and its curve"):
        monitor, fid_every = None, 0
        if config.monitor.fid_every != 0:
            if accelerator.is_main_process:
                monitor = monitor_of_run(config, dataset, observer, extractor, output_dir, accelerator)
            fid_every = fid_every_of_run(config, latents, autoencoder, monitor, accelerator)
        if config.monitor.report_to != "none":
            accelerator.init_trackers("ddgen", config=_tracker_config(config))
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
            resume_from=folder.resume_from,
            fid_every=fid_every,
            monitor=monitor,
            on_metrics=partial(draw_curve, monitor, output_dir),
        )
    if accelerator.is_main_process:
        guide, pictures = kept_guide(config.optimizer, output_dir, generator), card_pictures(output_dir)
        card = render_model_card(config, dataset, generator, guide, output_dir, precision)
        path = output_dir / "generator"
        save_generator(generator, path, card, guide=guide, pictures=pictures, replace_existing=True)
    history.finish()
    accelerator.wait_for_everyone()
    say(f"generator:   {output_dir / 'generator'}")
    best = best_point(output_dir / "metrics.jsonl") if fid_every and accelerator.is_main_process else None
    if best is not None:
        metric, step, average, value = best
        say(f"best:        {metric} {value:.4g} at step {step:,.0f}, {average}")
        say(f"FID curve:   {output_dir / 'fid_curve.png'}")
    say(f"samples:     {output_dir / 'samples'}")
    say(f"peak memory: {peak_memory(accelerator.device)}")
    say(f"next:        python sample.py --run_dir {shlex.quote(str(output_dir))} --ipc 10")
    accelerator.end_training()
    return 0


def train_observer_alone(config: TrainObserverConfig) -> int:
    """Trains an observer and writes it to --output_dir; default runs/<dataset>-observer."""
    name = dataset_name(config.data)
    output_dir = Path(config.output_dir or RUNS_DIR / f"{name}-observer")
    if output_dir.exists():
        raise UserError(f"--output_dir {output_dir}: exists already; choose another, or remove it")
    if config.observer.observer is not None:
        raise UserError(f"--observer {config.observer.observer}: this command trains one; use --observer_network")
    accelerator, precision = start_accelerator(config.mixed_precision)
    dataset = load_on_all(accelerator, config.data, "train")
    if config.dry_run:
        accelerator.print(f"would train {config.observer.observer_network} on {len(dataset):,} images -> {output_dir}")
        return 0
    started = time.perf_counter()
    with stop_at_once():
        seed = config.seed
        observer = _train_observer(config.observer, config.data, dataset, output_dir, accelerator, precision, seed)
    seconds = time.perf_counter() - started
    run = TrainConfig(
        run=RunConfig(output_dir=str(output_dir), seed=seed),
        data=config.data,
        observer=config.observer,
        optimizer=OptimizerConfig(mixed_precision=config.mixed_precision),
    )
    on_main(accelerator, lambda: _write_run_facts(run, dataset, output_dir))
    history = History(output_dir, accelerator, precision)  # not before: an observer's folder may not exist
    history.start()
    history.add_stage(OBSERVER_STAGE, seconds)
    history.finish()
    accelerator.print(
        f"{observer.accuracy:.1%} on held-out real images; use it with --observer {output_dir}, or with anybody's"
        f" generator: python sample.py --run_dir {shlex.quote(str(output_dir))} --generator PATH_OR_HUB_ID"
    )
    return 0


def _write_run_facts(config: TrainConfig, dataset: ImageDataset, output_dir: Path) -> None:
    """Writes the settings, and what later commands must know of the data without having it."""
    remove_leftovers(output_dir)
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


def observer_of_run(
    config: TrainConfig, given: Given, dataset: ImageDataset, path: Path, accelerator: Accelerator, precision: str
) -> Observer:
    """Loads the observer that the run already has, or takes the one that was given; otherwise trains one."""
    exists = path.is_dir()
    accelerator.wait_for_everyone()  # all have looked before anyone writes
    if exists:
        observer = Observer.load(path, dataset.class_names)
        on_main(accelerator, Checkpoints(path.with_name("observer_checkpoints"), {}).remove)  # killed before that
    elif given.observer is not None:
        observer = given.observer
        if observer.accuracy is None:
            observer.accuracy = held_out_accuracy(observer, config.data, accelerator, precision)
        check_observer(observer, dataset.class_names)
        source = Path(str(config.observer.observer))
        if accelerator.is_main_process:
            observer.save(path, beside=source if (source / TRAINING_NAME).is_file() else None)
        accelerator.wait_for_everyone()
    else:
        observer = _train_observer(config.observer, config.data, dataset, path, accelerator, precision, config.run.seed)
    check_observer(observer, dataset.class_names)
    return observer.to(accelerator.device).requires_grad_(False)


def _train_observer(
    config: ObserverConfig,
    data: DataConfig,
    dataset: ImageDataset,
    path: Path,
    accelerator: Accelerator,
    precision: str,
    seed: int,
) -> Observer:
    work = partial(
        train_observer,
        config,
        dataset,
        output_dir=path,
        device=accelerator.device,
        precision=precision,
        seed=seed,
        flip=data.may_flip,
    )
    on_main(accelerator, work)
    return Observer.load(path, dataset.class_names).to(accelerator.device)


def autoencoder_of_run(
    config: TrainConfig,
    given: Given,
    dataset: ImageDataset,
    observer: Observer,
    output_dir: Path,
    accelerator: Accelerator,
    precision: str,
) -> tuple[Autoencoder, LatentCache]:
    """Takes the autoencoder that the run has or was given, or trains one, and encodes every training image."""
    path, device, seed = output_dir / "autoencoder", accelerator.device, config.run.seed
    perceptual = PerceptualLoss(observer) if config.autoencoder.vae_perceptual_weight else None
    identity = {**asdict(config.autoencoder), "seed": seed, "flip": config.data.may_flip}
    identity |= {"images": dataset.fingerprint, "perceptual": observer.fingerprint if perceptual else None}
    checkpoints = Checkpoints(output_dir / "autoencoder_checkpoints", identity)
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
                seed=seed,
                flip=config.data.may_flip,
                checkpoints=checkpoints,
                perceptual=perceptual,
            )
        floor = f" (patch PCA {report['psnr_pca']:.2f})" if "psnr_pca" in report else ""
        if config.autoencoder.space == "latent":
            accelerator.print(f"autoencoder: {report['psnr']:.2f} dB on held-out images{floor}")
        if accelerator.is_main_process:
            autoencoders.save(autoencoder, path, **report)
        accelerator.wait_for_everyone()
    on_main(accelerator, checkpoints.remove)
    autoencoder = autoencoders.load(path, device, precision)
    return build_latent_cache(
        autoencoder,
        dataset.pixels,
        output_dir / "latents",
        flip=config.data.may_flip,
        fingerprint=f"{autoencoder.fingerprint()}-{dataset.fingerprint}",
        accelerator=accelerator,
    )


def _reconstruction(
    config: TrainConfig,
    dataset: ImageDataset,
    autoencoder: Autoencoder,
    observer: Observer,
    extractor: Extractor | None,
    output_dir: Path,
    precision: str,
) -> str:
    if config.autoencoder.space == "pixel":
        return "autoencoder: none, pixels are diffused"
    _, held_out = split_holdout(dataset, config.observer.observer_holdout, config.run.seed)
    features = extractor or observer_extractor(observer)
    return report_reconstruction(autoencoder, dataset, held_out, observer, features, output_dir, precision=precision)


def _tracker_config(config: TrainConfig) -> dict[str, Any]:
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in to_flat_dict(config).items()
    }
