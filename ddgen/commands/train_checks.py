"""What is found out before anything is trained or written: impossible settings, and what the user brings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ddgen.autoencoder import autoencoder as autoencoders
from ddgen.autoencoder.autoencoder import Autoencoder, check_fits, identity, to_images
from ddgen.autoencoder.training import build as build_autoencoder
from ddgen.autoencoder.training import check_space
from ddgen.checkpoint import checkpoint_step, is_unused, latest_checkpoint, read_json
from ddgen.commands.runs import (
    RUNS_DIR,
    dataset_name,
    read_run_config,
)
from ddgen.config import (
    ObserverConfig,
    TrainConfig,
    to_flat_dict,
)
from ddgen.data import ImageDataset
from ddgen.diffusion.generator import check_sampling
from ddgen.diffusion.objective import build_scheduler
from ddgen.diffusion.report import MONITOR_SAMPLER
from ddgen.diffusion.training import micro_batches
from ddgen.diffusion.unet import build_unet
from ddgen.errors import UserError
from ddgen.observer.networks import build_network
from ddgen.observer.observer import Observer


@dataclass(frozen=True)
class Given:
    """What the user brings instead of having it trained; loaded before anything is written."""

    observer: Observer | None
    autoencoder: Autoencoder | None


@dataclass(frozen=True)
class RunFolder:
    """Where a run is written, and what is there already.

    Attributes:
        path: The folder.
        resume_from: The checkpoint to go on from.
        goes_on: Whether a run has been started in it.
        finished: Whether that run is finished, with exactly these settings.
    """

    path: Path
    resume_from: Path | None = None
    goes_on: bool = False
    finished: bool = False


def run_folder(config: TrainConfig) -> RunFolder:
    """Finds out what the output folder holds.

    Raises:
        UserError: Another run, or anything else but a run; or a checkpoint that cannot be gone on from there.
    """
    path = Path(config.run.output_dir or RUNS_DIR / dataset_name(config.data))
    resume = config.run.resume_from_checkpoint
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path}: is a file; choose another")
    goes_on = (path / "config.yaml").is_file()
    if not goes_on and not is_unused(path):
        raise UserError(f"--output_dir {path}: not empty, and not a run (no config.yaml); choose another")
    changed = _changed_settings(config, path) if goes_on else {}
    if changed:
        _check_may_change(config, path, changed)
    latest = latest_checkpoint(path / "checkpoints")
    if resume not in (None, "latest"):
        return RunFolder(path, _explicit_checkpoint(Path(str(resume)), path, latest), goes_on)
    finished = not changed and (path / "generator" / "model_index.json").is_file()
    return RunFolder(path, latest, goes_on, finished)


def _explicit_checkpoint(resume: Path, path: Path, latest: Path | None) -> Path:
    if not resume.is_dir():
        raise UserError(
            f"--resume_from_checkpoint {resume}: no such folder; give `latest` or a checkpoints/step-* folder"
        )
    state = resume / "state.json"
    if latest is not None and state.is_file() and checkpoint_step(latest) > read_json(state)["step"]:
        raise UserError(
            f"--resume_from_checkpoint {resume}: {latest} is later, and would be taken next time;"
            " use another --output_dir, or delete what is later"
        )
    return resume


# What a resumed run may do otherwise than the run it resumes: where things are, what is watched, how it is spread.
_MAY_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "dry_run", "data_dir", "cache_dir", "skip_bad_images"),
    *("checkpointing_steps", "checkpoints_total_limit", "log_every", "report_to", "sample_every", "fid_every"),
    *("fid_num_images", "fid_num_inference_steps", "fd_network", "inception_weights", "mixed_precision"),
    "torch_compile",
    *("gradient_accumulation_steps", "num_inference_steps", "guidance_scale", "guidance_interval", "sampler", "eta"),
    "gradient_checkpointing",
}
_OF_OBSERVER = {"observer", *(name for name in vars(ObserverConfig()) if name.startswith("observer_"))}


def _changed_settings(config: TrainConfig, path: Path) -> dict[str, tuple[Any, Any]]:
    """Returns what a run was started with and what is asked for now, where they differ; where things are may differ."""
    before, now = to_flat_dict(read_run_config(path)), to_flat_dict(config)
    names = sorted(now.keys() - {"output_dir", "resume_from_checkpoint", "dry_run", "data_dir", "cache_dir"})
    return {name: (before[name], now[name]) for name in names if before[name] != now[name]}


def _check_may_change(config: TrainConfig, path: Path, changed: dict[str, tuple[Any, Any]]) -> None:
    """Refuses to go on with other settings than the run was started with, or without being asked to."""
    # Without anything of an observer in the run yet, one that was too weak may be trained otherwise.
    begun = (path / "observer").is_dir() or latest_checkpoint(path / "observer_checkpoints") is not None
    free = _MAY_CHANGE | (set() if begun else _OF_OBSERVER)
    for name, (before, now) in changed.items():
        if name not in free:
            raise UserError(
                f"--{name} {now}: {path} was started with {before}; use that, or another --output_dir for a new run"
            )
    if config.run.resume_from_checkpoint is None:
        name, (before, now) = next(iter(changed.items()))
        raise UserError(
            f"--{name} {now}: {path} was started with {before}; add --resume_from_checkpoint latest to go on otherwise,"
            " or use another --output_dir for a new run"
        )


def check_same_images(path: Path, dataset: ImageDataset) -> None:
    """Refuses to go on with other images than the run was started with."""
    facts = path / "dataset.json"
    if facts.is_file() and read_json(facts)["fingerprint"] != dataset.fingerprint:
        raise UserError(
            f"--dataset {dataset.name}: other images than {path} was started with; use those, or another --output_dir"
        )


def check_training(config: TrainConfig, dataset: ImageDataset, accelerator: Accelerator, precision: str) -> Given:
    """Finds settings that cannot be honoured before anything is trained or written."""
    processes, optim = accelerator.num_processes, config.optimizer
    micro_batches(optim.train_batch_size, optim.gradient_accumulation_steps, accelerator)
    build_scheduler(config.denoiser)
    steps = config.monitor.fid_num_inference_steps
    for sampling in (
        config.guidance,
        replace(config.guidance, num_inference_steps=steps, sampler=MONITOR_SAMPLER, eta=0.0),
    ):
        check_sampling(sampling)
    autoencoder = None
    if optim.posthoc_ema_stds and config.monitor.fid_every == 0:
        raise UserError("--posthoc_ema_stds: widths are chosen by their FD; set --fid_every, or leave them out")
    check_space(config.autoencoder)
    if config.autoencoder.space == "pixel":
        autoencoder = identity(accelerator.device, precision)
    elif config.autoencoder.vae is not None:
        autoencoder = autoencoders.load_pretrained(config.autoencoder.vae, accelerator.device, precision)
        check_fits(autoencoder, config.autoencoder.vae, dataset.pixels[:2])
    elif config.autoencoder.vae_batch_size % processes:
        raise UserError(
            f"--vae_batch_size {config.autoencoder.vae_batch_size}: must be a multiple of the {processes} processes"
        )
    d, side = latent_shape(config, autoencoder, dataset)
    build_unet(config.denoiser, latent_channels=d, latent_size=side, num_classes=dataset.num_classes)
    observer = None
    if config.observer.observer is not None:
        observer = Observer.load(config.observer.observer, dataset.class_names)
    else:
        size = config.observer.observer_input_size or dataset.image_size
        build_network(config.observer.observer_network, dataset.num_classes, size)
    return Given(observer, autoencoder)


def latent_shape(config: TrainConfig, given: Autoencoder | None, dataset: ImageDataset) -> tuple[int, int]:
    """Returns channels and side of the latents that a run will have."""
    if given is not None:
        mean, _ = given.encode(to_images(dataset.pixels[:1]))
        return mean.shape[1], mean.shape[2]
    vae = build_autoencoder(config.autoencoder, dataset.image_size)
    return vae.config.latent_channels, dataset.image_size // vae.config.downsample
