"""The generator: denoiser, autoencoder and schedule as one folder; class labels in, pixels out."""

from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor, nn

from ddgen.autoencoder.autoencoder import OWN, Autoencoder, load_pretrained, to_pixels
from ddgen.checkpoint import atomic_dir, read_json, write_json
from ddgen.config import GuidanceConfig
from ddgen.diffusion import pipeline
from ddgen.diffusion.pipeline import Schedule, guide, solve
from ddgen.errors import UserError
from ddgen.precision import autocast, memory_format
from ddgen.seeds import torch_generator

SCHEDULERS = {kind.__name__: kind for kind in (DDIMScheduler, FlowMatchEulerDiscreteScheduler)}


@dataclass(frozen=True)
class Generator:
    """Samples images of a class.

    Attributes:
        unet: Denoiser of standardised latents, or anything that is called like one; last class is the null class.
        autoencoder: Decodes the latents.
        scheduler: Holds the training schedule.
        class_names: Name of every class, in label order.
        image_size: Side of the images in pixels.
        sampling: How to sample.
        precision: Autocast precision, resolved.
        ema_std: Relative width of the average that the weights are; None if not known.
    """

    unet: Any
    autoencoder: Autoencoder
    scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler
    class_names: tuple[str, ...]
    image_size: int
    sampling: GuidanceConfig
    precision: str
    ema_std: float | None = None

    def with_sampling(self, **overrides: Any) -> Generator:
        """Returns this generator with some sampling settings replaced; None keeps one."""
        return replace(self, sampling=replace(self.sampling, **{k: v for k, v in overrides.items() if v is not None}))

    @torch.inference_mode()
    def sample(self, labels: Tensor, indices: Tensor, seed: int) -> Tensor:
        """Generates one image for every (class, index).

        An image depends on the seed, its class and its index only, not on what is sampled with it.

        Args:
            labels: int64 (b,).
            indices: int64 (b,), which image of the class.
            seed: Seed of the pool.

        Returns:
            Pixels, uint8 (b, 3, h, w), on the CPU.
        """
        config, device = self.unet.config, self.unet.device
        shape = (config.in_channels, config.sample_size, config.sample_size)
        keys = zip(labels.tolist(), indices.tolist(), strict=True)
        noise = torch.stack([torch.randn(shape, generator=torch_generator(seed, "sample", c, i)) for c, i in keys])
        settings = self.sampling
        denoise = guide(
            self.unet,
            labels.to(device),
            config.num_class_embeds - 1,
            settings.guidance_scale,
            settings.guidance_interval,
            Schedule.of(self.scheduler),
        )
        with autocast(device, self.precision):
            latents = solve(denoise, noise.to(device), self.scheduler, settings.num_inference_steps, settings.sampler)
        return to_pixels(self.autoencoder.decode(latents.float())).cpu()

    def fingerprint(self) -> str:
        """Returns a hash of all weights and of the schedule."""
        digest = hashlib.sha256(self.autoencoder.fingerprint().encode())
        for name, value in sorted(self.unet.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().numpy().tobytes())
        digest.update(self.scheduler.to_json_string().encode())
        return digest.hexdigest()[:32]


def check_sampling(sampling: GuidanceConfig, prediction_type: str, num_train_timesteps: int = 1000) -> None:
    """Refuses settings that no sampler can honour.

    Raises:
        UserError: Naming the setting.
    """
    steps = sampling.num_inference_steps
    if not 1 <= steps <= num_train_timesteps:
        raise UserError(f"--num_inference_steps {steps}: give 1 to {num_train_timesteps}")
    trailing = np.arange(num_train_timesteps, 0, -num_train_timesteps / steps)
    if sampling.sampler == "unipc" and prediction_type != "flow_prediction" and len(trailing) != steps:
        raise UserError(f"--num_inference_steps {steps}: diffusers' unipc cannot take exactly so many; try {steps + 1}")
    low, high = sampling.guidance_interval
    if low > high:
        raise UserError(f"--guidance_interval {low} {high}: give the smaller number first")


def save_generator(
    generator: Generator, path: Path, card: str, *, pictures: Sequence[Path] = (), replace_existing: bool = False
) -> None:
    """Writes a diffusers pipeline folder that loads without ddgen; atomic.

    Args:
        generator: What to save.
        path: Folder to create.
        card: Text of its README.md.
        pictures: Files to put beside it.
        replace_existing: Take the place of an older one.
    """
    vae: nn.Module = generator.autoencoder.vae
    own = Path(inspect.getfile(type(vae))) if type(vae).__name__ in OWN else None
    index = {
        "_class_name": ["pipeline", "LatentDiffusionPipeline"],
        "_diffusers_version": __import__("diffusers").__version__,
        "unet": ["diffusers", "UNet2DModel"],
        "vae": [own.stem if own else "diffusers", type(vae).__name__],
        "scheduler": ["diffusers", type(generator.scheduler).__name__],
        "latents_mean": generator.autoencoder.latents_mean.flatten().tolist(),
        "latents_std": generator.autoencoder.latents_std.flatten().tolist(),
        "class_names": list(generator.class_names),
        "image_size": generator.image_size,
        "sampling": {
            "num_inference_steps": generator.sampling.num_inference_steps,
            "guidance_scale": generator.sampling.guidance_scale,
            "guidance_interval": list(generator.sampling.guidance_interval),
            "sampler": generator.sampling.sampler,
        },
    }
    with atomic_dir(path, replace=replace_existing) as temporary:
        generator.unet.to(memory_format=torch.contiguous_format).save_pretrained(temporary / "unet")
        generator.autoencoder.vae.save_pretrained(temporary / "vae")
        generator.scheduler.save_pretrained(temporary / "scheduler")
        shutil.copy(pipeline.__file__, temporary / "pipeline.py")
        if own:
            shutil.copy(own, temporary / "vae")
        for picture in pictures:
            shutil.copy(picture, temporary / picture.name)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        write_json(temporary / "model_index.json", index)


def load_generator(path: Path, device: torch.device, precision: str) -> Generator:
    """Loads what `save_generator` wrote.

    Raises:
        UserError: The folder holds no finished generator.
    """
    index_path = path / "model_index.json"
    if not index_path.is_file():
        raise UserError(
            f"{path}: no finished generator here (model_index.json is missing); train one with train_ldm.py"
        )
    index = read_json(index_path)
    statistics = (torch.tensor(index["latents_mean"]), torch.tensor(index["latents_std"]))
    sampling = index["sampling"]
    unet = UNet2DModel.from_pretrained(path / "unet", use_safetensors=True)
    return Generator(
        unet=unet.to(device, memory_format=memory_format(device, precision)).eval().requires_grad_(False),
        autoencoder=load_pretrained(str(path / "vae"), device, precision).with_statistics(*statistics),
        scheduler=SCHEDULERS[index["scheduler"][1]].from_pretrained(path / "scheduler"),
        class_names=tuple(index["class_names"]),
        image_size=index["image_size"],
        sampling=GuidanceConfig(**sampling | {"guidance_interval": tuple(sampling["guidance_interval"])}),
        precision=precision,
    )
