"""Images to standardised latents and back, through any diffusers autoencoder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn

from ddgen.autoencoder.identity_autoencoder import IdentityAutoencoder
from ddgen.autoencoder.patch_autoencoder import PatchAutoencoderKL
from ddgen.checkpoint import atomic_dir, read_json, write_json
from ddgen.errors import UserError
from ddgen.precision import autocast, cast

OWN = {kind.__name__: kind for kind in (PatchAutoencoderKL, IdentityAutoencoder)}
"""Autoencoders that diffusers does not have; their files travel with the weights."""


@dataclass(frozen=True)
class Autoencoder:
    """A diffusers autoencoder and the per-channel statistics of its latents.

    Attributes:
        vae: Anything with diffusers' ``encode`` and ``decode``; in eval mode, on one device; float32 weights, unless
            cast for sampling.
        latents_mean: (d, 1, 1), of the raw latents of the training images.
        latents_std: (d, 1, 1), likewise.
        precision: Autocast precision, resolved.
        stored_fingerprint: Fingerprint of the weights before they were cast; None if they were not.
    """

    vae: Any
    latents_mean: Tensor
    latents_std: Tensor
    precision: str
    stored_fingerprint: str | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.vae.parameters()).device
        return device

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.vae.parameters()).dtype
        return dtype

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images (b, 3, h, w) in [-1, 1] to the raw mean and standard deviation, float32 (b, d, h', w')."""
        with torch.inference_mode(), autocast(self.device, self.precision):
            encoded = self.vae.encode(images.to(self.device, self._dtype))
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
        latents = (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float()
        return latents, torch.zeros_like(latents)

    def standardise(self, raw_latents: Tensor) -> Tensor:
        """Maps raw latents (..., d, h, w) to mean 0 and standard deviation 1 per channel."""
        mean, std = self.latents_mean.to(raw_latents.device), self.latents_std.to(raw_latents.device)
        return (raw_latents - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes standardised latents (b, d, h, w) to images, float32 (b, 3, h * f, w * f), clamped to [-1, 1]."""
        mean, std = self.latents_mean.to(self.device), self.latents_std.to(self.device)
        with torch.inference_mode(), autocast(self.device, self.precision):
            images = self.vae.decode((latents.to(self.device) * std + mean).to(self._dtype)).sample
        return images.float().clamp(-1, 1)

    def with_statistics(self, mean: Tensor, std: Tensor) -> Autoencoder:
        """Returns this autoencoder with per-channel statistics, (d,) each."""
        return replace(self, latents_mean=mean.reshape(-1, 1, 1).float(), latents_std=std.reshape(-1, 1, 1).float())

    def cast(self) -> Autoencoder:
        """Returns this autoencoder for sampling only: its weights themselves in the format that autocast casts to."""
        fingerprint = self.fingerprint()
        return replace(self, vae=cast(self.vae, self.precision), precision="no", stored_fingerprint=fingerprint)

    def fingerprint(self) -> str:
        """Returns a hash of the weights, as they are stored, and of the configuration."""
        if self.stored_fingerprint is not None:
            return self.stored_fingerprint
        config = {name: value for name, value in self.vae.config.items() if not name.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, value in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]


def to_images(pixels: Tensor) -> Tensor:
    """Maps pixels, uint8 (..., c, h, w), to images, float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def to_pixels(images: Tensor) -> Tensor:
    """Maps images in [-1, 1] to pixels, uint8, rounded."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def wrap(vae: nn.Module, device: torch.device, precision: str) -> Autoencoder:
    """Returns an `Autoencoder` in eval mode whose statistics are still 0 and 1."""
    vae = vae.to(device).eval().requires_grad_(False)
    precision = "no" if precision == "fp16" else precision  # many autoencoders overflow in float16
    return Autoencoder(vae, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), precision)


def identity(device: torch.device, precision: str) -> Autoencoder:
    """Returns the autoencoder of pixel space, whose latents are the images."""
    return wrap(IdentityAutoencoder(), device, precision)


def load_pretrained(path_or_id: str, device: torch.device, precision: str) -> Autoencoder:
    """Loads a diffusers autoencoder, or the one of a diffusers pipeline, by path or hub id, from safetensors.

    Raises:
        UserError: There is none, or it is not an autoencoder.
    """
    import diffusers

    try:
        subfolder, config = _find_config(path_or_id)
        name = config.get("_class_name", "")
        kind = OWN.get(name) or getattr(diffusers, name, None)
        if kind is None or not hasattr(kind, "encode"):
            raise UserError(f"--vae {path_or_id}: {name or 'unknown class'} is not a diffusers autoencoder")
        vae = kind.from_pretrained(path_or_id, subfolder=subfolder, use_safetensors=True)
        vae.register_to_config(_name_or_path=None)  # where it was here means nothing where it is saved to
        return wrap(vae, device, precision)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--vae {path_or_id}: {reason}; give a folder with config.json or a hub id") from None


def check_fits(autoencoder: Autoencoder, source: str, pixels: Tensor) -> None:
    """Sends images through an autoencoder that ddgen did not train.

    Args:
        autoencoder: What was loaded.
        source: ``--vae``.
        pixels: A few real images, uint8 (b, 3, s, s).

    Raises:
        UserError: It does not give back finite images of their size.
    """
    try:
        mean, _ = autoencoder.encode(to_images(pixels))
        restored = autoencoder.decode(mean)
    except (RuntimeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--vae {source}: cannot take {pixels.shape[-1]} px RGB images ({reason})") from None
    if restored.shape != pixels.shape:
        raise UserError(
            f"--vae {source}: makes {restored.shape[-1]} px of {pixels.shape[-1]} px images;"
            " use an --image_size it divides"
        )
    if not bool(restored.isfinite().all()):
        raise UserError(f"--vae {source}: images come back not finite; use --mixed_precision bf16 or no")


def _find_config(path_or_id: str) -> tuple[str | None, dict[str, Any]]:
    """Returns the subfolder that holds the autoencoder, and its config.json."""
    if Path(path_or_id).is_dir():
        found = [sub for sub in (None, "vae") if (Path(path_or_id) / (sub or "") / "config.json").is_file()]
        if not found:
            raise OSError("no config.json in it")
        return found[0], read_json(Path(path_or_id) / (found[0] or "") / "config.json")
    try:
        return None, read_json(Path(hf_hub_download(path_or_id, "config.json")))
    except EntryNotFoundError:
        return "vae", read_json(Path(hf_hub_download(path_or_id, "config.json", subfolder="vae")))


def save(autoencoder: Autoencoder, path: Path, **extra: Any) -> None:
    """Writes the autoencoder, diffusers layout, with its statistics in ``latents.json``; atomic."""
    with atomic_dir(path) as temporary:
        autoencoder.vae.save_pretrained(temporary)
        statistics = {
            "latents_mean": autoencoder.latents_mean.flatten().tolist(),
            "latents_std": autoencoder.latents_std.flatten().tolist(),
        }
        write_json(temporary / "latents.json", statistics | extra)


def load(path: Path, device: torch.device, precision: str) -> Autoencoder:
    """Loads what `save` wrote."""
    statistics = read_json(path / "latents.json")
    autoencoder = load_pretrained(str(path), device, precision)
    return autoencoder.with_statistics(
        torch.tensor(statistics["latents_mean"]), torch.tensor(statistics["latents_std"])
    )
