"""What is found out before anything is trained or written: impossible settings, and what the user brings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator

from ddgen.autoencoder import autoencoder as autoencoders
from ddgen.autoencoder.autoencoder import Autoencoder, check_fits, identity, to_images
from ddgen.autoencoder.training import build as build_autoencoder
from ddgen.autoencoder.training import check_space
from ddgen.checkpoint import latest_checkpoint
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


def run_folder(config: TrainConfig) -> tuple[Path, Path | None]:
    """Returns the run's folder and the checkpoint to go on from."""
    output_dir = Path(config.run.output_dir or RUNS_DIR / dataset_name(config.data))
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
    *("fid_num_images", "fid_num_inference_steps", "fd_network", "inception_weights", "mixed_precision"),
    "torch_compile",
    *("gradient_accumulation_steps", "num_inference_steps", "guidance_scale", "guidance_interval", "sampler"),
    "gradient_checkpointing",
}
_OF_OBSERVER = {"observer", *(name for name in vars(ObserverConfig()) if name.startswith("observer_"))}


def _check_same_recipe(config: TrainConfig, output_dir: Path) -> None:
    """Refuses to go on with other settings than the run was started with."""
    if not (output_dir / "config.yaml").is_file():
        return
    before, now = to_flat_dict(read_run_config(output_dir)), to_flat_dict(config)
    # Without an observer in the run yet, one that was too weak may be trained otherwise.
    free = _MAY_CHANGE | (set() if (output_dir / "observer").is_dir() else _OF_OBSERVER)
    for name in sorted(now.keys() - free):
        if before[name] != now[name]:
            raise UserError(
                f"--{name} {now[name]}: {output_dir} was started with {before[name]}; use that, or another --output_dir"
            )


def check_training(config: TrainConfig, dataset: ImageDataset, accelerator: Accelerator, precision: str) -> Given:
    """Finds settings that cannot be honoured before anything is trained or written."""
    processes, optim = accelerator.num_processes, config.optimizer
    micro_batches(optim.train_batch_size, optim.gradient_accumulation_steps, accelerator)
    build_scheduler(config.denoiser)
    for steps in (config.guidance.num_inference_steps, config.monitor.fid_num_inference_steps):
        check_sampling(replace(config.guidance, num_inference_steps=steps), config.denoiser.prediction_type)
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
