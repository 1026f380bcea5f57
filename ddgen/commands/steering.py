"""``sample --modes``: the generator of a run, steered to modes of the real latents that the run has kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ddgen.autoencoder.latents import LatentCache, read_latent_cache
from ddgen.commands.runs import load_on_all, read_run_config
from ddgen.config import SampleConfig
from ddgen.diffusion.generator import Generator
from ddgen.diffusion.modes import VERSION, find_modes, load_modes, save_modes
from ddgen.diffusion.steering import Modes, Steering
from ddgen.errors import UserError
from ddgen.resume import on_main

STRENGTHS = ("mode_strength", "diversity_strength", "steer_until")


def check_steering(config: SampleConfig) -> None:
    """Refuses settings of steering that do nothing.

    Raises:
        UserError: Naming the setting.
    """
    if config.modes == "auto" and config.ipc == 0:
        raise UserError("--modes auto: as many as --ipc, which is 0; give a number")
    for name in STRENGTHS if config.modes is None else ():
        value = getattr(config, name)
        if value != getattr(SampleConfig(), name):
            raise UserError(
                f"--{name} {value:g}: does nothing without --modes; give that too, for instance --modes auto"
            )


def steered(config: SampleConfig, run_dir: Path, generator: Generator, accelerator: Accelerator) -> Generator:
    """Returns a generator steered as the settings say; the run's folder keeps the modes that are found.

    Args:
        config: With `modes`.
        run_dir: The training run, whose latents are clustered.
        generator: Of these latents.
        accelerator: Processes; every one must call this.

    Raises:
        UserError: There are no latents, they are not the generator's, or a class has fewer images than modes.
    """
    latents = _latents_of(config, run_dir, generator)
    count = config.ipc if config.modes == "auto" else int(config.modes or 0)
    path = run_dir / "modes" / f"{count}-seed{config.seed}.safetensors"
    key = f"{latents.fingerprint}-{VERSION}"
    found: list[Any] = [None]

    def read() -> None:
        found[0] = load_modes(path, key)

    on_main(accelerator, read)
    modes: Modes | None = broadcast_object_list(found)[0]
    if modes is None:
        accelerator.print(f"{'modes':<12}finding {count} of each class in its real latents")
        labels = _labels_of(config, run_dir, latents, accelerator)

        def find() -> None:
            found[0] = find_modes(latents, labels, generator.class_names, count, config.seed)
            if not config.dry_run:
                save_modes(path, found[0], key)

        on_main(accelerator, find)
        modes = broadcast_object_list(found)[0]
    assert modes is not None
    steering = Steering(modes, config.mode_strength, config.diversity_strength, config.steer_until)
    return replace(generator, steering=steering.to(generator.unet.device))


def _latents_of(config: SampleConfig, run_dir: Path, generator: Generator) -> LatentCache:
    """Opens the run's latents, and checks that they are what the generator makes."""
    found = read_latent_cache(run_dir / "latents")
    if found is None:
        raise UserError(
            f"--modes {config.modes}: {run_dir} has no latents of real images to find modes in; give the --run_dir of a"
            " whole training run, or leave it out"
        )
    latents, statistics = found
    autoencoder = generator.autoencoder
    own = torch.stack([autoencoder.latents_mean, autoencoder.latents_std]).flatten(1).cpu()
    same = latents.fingerprint.split("-")[0] == autoencoder.fingerprint()  # of the autoencoder, of the images, ...
    if not same or own.shape != statistics.shape or (own - statistics).abs().max() > 1e-4 * statistics.abs().max():
        raise UserError(
            f"--modes {config.modes}: the latents in {run_dir} are of another autoencoder than the generator's; give"
            " the --run_dir that the generator was trained in"
        )
    return latents


def _labels_of(config: SampleConfig, run_dir: Path, latents: LatentCache, accelerator: Accelerator) -> Tensor:
    """Reads the classes of the images that the latents are of, int64 (n,)."""
    dataset = load_on_all(accelerator, read_run_config(run_dir).data, "train")
    if dataset.fingerprint not in latents.fingerprint:
        raise UserError(
            f"--modes {config.modes}: the latents in {run_dir} are of other images than {dataset.name} has now; give"
            " back the images that it was trained on"
        )
    return dataset.labels
