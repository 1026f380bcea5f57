"""Where the guide of autoguidance comes from: a worse denoiser of the same latents and classes.

Source: Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself". A good guide is smaller, or
trained less, than what it guides.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddgen.checkpoint import read_json
from ddgen.config import DenoiserConfig
from ddgen.diffusion.generator import GUIDE_DIR, Generator, Guide, add_weights, load_generator
from ddgen.diffusion.objective import build_scheduler
from ddgen.diffusion.samplers import Schedule
from ddgen.diffusion.unet import build_unet, with_contiguous_attention
from ddgen.errors import UserError
from ddgen.precision import cast, memory_format


@dataclass(frozen=True)
class Nature:
    """What a denoiser and its guide must have in common.

    Attributes:
        schedule: Of training.
        latent_shape: Channels and side of the latents.
        class_names: In label order.
        autoencoder: Fingerprint of what made the latents.
        statistics: Mean and standard deviation of the raw latents, (2, d); None where the fingerprint has to do.
    """

    schedule: Schedule
    latent_shape: tuple[int, int]
    class_names: tuple[str, ...]
    autoencoder: str
    statistics: Tensor | None = None


def find_guide(guide: str, folder: Path, generator: Generator) -> Guide | None:
    """Returns what a generator is to be guided away from.

    Args:
        guide: `none`, `auto` or a path, as --guide takes it.
        folder: Where the generator is from.
        generator: What is to be guided.

    Returns:
        None for the model without a class (classifier-free guidance).

    Raises:
        UserError: What is named is no guide of this generator.
    """
    if guide == "none":
        return None
    return own_guide(folder, generator) if guide == "auto" else load_guide(Path(guide).expanduser(), generator)


def own_guide(folder: Path, generator: Generator) -> Guide | None:
    """Loads the guide that travels with a generator; None if none does.

    Args:
        folder: The generator's.
        generator: Loaded from there.

    Raises:
        UserError: It is damaged, or another generator's.
    """
    path = folder / GUIDE_DIR
    if not path.is_dir():
        return None
    try:
        facts = read_json(path / "guide.json")
        name = f"its own weights after {facts['step']:,} of {facts['max_train_steps']:,} steps"
        unet = UNet2DModel.from_pretrained(path, use_safetensors=True, torch_dtype=torch.float32)
        for what in ("in_channels", "sample_size", "num_class_embeds"):
            theirs, ours = unet.config[what], generator.unet.config[what]
            if theirs != ours:
                raise ValueError(f"of another generator: {what} {theirs}, not {ours}")
        return _guide(unet, generator, name)  # raises where weights are missing, which diffusers only mentions
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"--guide auto: {path}: damaged ({_one_line(error)}); copy the generator again, or use --guide none"
        ) from None


def load_guide(path: Path, generator: Generator) -> Guide:
    """Loads a guide for a generator, on its device and in its number format.

    Args:
        path: A generator's folder, the folder of a finished run, or a checkpoint of our training.
        generator: What is to be guided.

    Raises:
        UserError: It is none of these, or differs from the generator in what both must have in common.
    """
    if (path / "state.json").is_file():
        unet, nature = _of_checkpoint(path, generator)
    else:
        folder = path if (path / "model_index.json").is_file() else path / "generator"
        if not (folder / "model_index.json").is_file():
            raise UserError(
                f"--guide {path}: neither a generator, a finished run nor a checkpoint; give a folder with"
                " model_index.json, generator/ or state.json"
            )
        loaded = load_generator(folder, torch.device("cpu"), "no")
        unet, nature = loaded.unet, _nature_of(loaded)
    _check_alike(path, nature, _nature_of(generator))
    return _guide(unet, generator, path.name)


def _guide(unet: UNet2DModel, generator: Generator, name: str) -> Guide:
    """Puts a guide, float32, where the generator is, in its number format."""
    digest = hashlib.sha256()
    add_weights(digest, unet)
    fingerprint = digest.hexdigest()[:32]
    device = generator.unet.device
    unet = unet.to(device, memory_format=memory_format(device, generator.precision)).eval().requires_grad_(False)
    if device.type == "cpu":
        unet = with_contiguous_attention(unet)
    if generator.unet.dtype != torch.float32:
        cast(unet, generator.precision)
    return Guide(unet, fingerprint, f"{name} (fingerprint {fingerprint[:12]})")


def _nature_of(generator: Generator) -> Nature:
    statistics = torch.stack([generator.autoencoder.latents_mean, generator.autoencoder.latents_std]).flatten(1)
    return Nature(
        Schedule.of(generator.scheduler),
        (generator.unet.config.in_channels, generator.unet.config.sample_size),
        generator.class_names,
        generator.autoencoder.fingerprint(),
        statistics.cpu(),
    )


def _of_checkpoint(path: Path, generator: Generator) -> tuple[UNet2DModel, Nature]:
    """Builds the denoiser of a checkpoint, with the average that the generator is, if it is there, or the first."""
    state = read_json(path / "state.json")
    identity: dict[str, Any] = state["identity"]
    settings = [field.name for field in fields(DenoiserConfig)]
    if not {*settings, "latents", "ema_stds"} <= identity.keys() or "latents" not in state["facts"]:
        raise UserError(
            f"--guide {path}: not a checkpoint of a diffusion model, or of another version of ddgen; give"
            " checkpoints/step-* of a run"
        )
    values: dict[str, Any] = {name: tuple(v) if isinstance(v := identity[name], list) else v for name in settings}
    config, names = DenoiserConfig(**values), tuple(identity["class_names"])
    channels, size = state["facts"]["latents"]
    unet = build_unet(config, latent_channels=channels, latent_size=size, num_classes=len(names))
    stds = identity["ema_stds"]
    std = generator.ema_std if generator.ema_std in stds else stds[0]
    try:
        unet.load_state_dict(load_file(path / f"ema_{std}.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--guide {path}: damaged ({_one_line(error)}); give another") from None
    autoencoder = str(identity["latents"]).split("-")[0]  # fingerprint of the latents: autoencoder-images-...
    return unet, Nature(Schedule.of(build_scheduler(config)), (channels, size), names, autoencoder)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _check_alike(path: Path, guide: Nature, own: Nature) -> None:
    """Refuses a guide that speaks of other latents, noise levels or classes."""

    def refuse(what: str, theirs: object, ours: object) -> UserError:
        return UserError(
            f"--guide {path}: {what} {theirs}, the generator's {ours}; give an earlier checkpoint of"
            " the same run, or a smaller model trained on the same latents"
        )

    kinds = (guide.schedule.prediction_type, own.schedule.prediction_type)
    if kinds[0] != kinds[1]:
        raise refuse("predicts", *kinds)
    if len(guide.schedule.sigmas) != len(own.schedule.sigmas) or not torch.allclose(
        guide.schedule.sigmas, own.schedule.sigmas
    ):
        middles = [f"sigma {s.sigmas[len(s.sigmas) // 2]:.3f} halfway" for s in (guide.schedule, own.schedule)]
        raise refuse("has another noise schedule,", *middles)
    if guide.latent_shape != own.latent_shape:
        raise refuse("has latents of channels, side", guide.latent_shape, own.latent_shape)
    if len(guide.class_names) != len(own.class_names):
        raise refuse("number of classes", len(guide.class_names), len(own.class_names))
    for theirs, ours in zip(guide.class_names, own.class_names, strict=True):
        if theirs != ours:
            raise refuse(f"class {own.class_names.index(ours)} is", theirs, ours)
    if guide.autoencoder != own.autoencoder:
        raise refuse("autoencoder", guide.autoencoder[:12], own.autoencoder[:12])
    if guide.statistics is not None and own.statistics is not None:
        gap = (guide.statistics - own.statistics).abs().max()
        if gap > 1e-4 * own.statistics.abs().max():
            raise refuse("latents have mean and deviation", guide.statistics.tolist(), own.statistics.tolist())
