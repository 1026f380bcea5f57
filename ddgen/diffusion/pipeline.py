"""The diffusers pipeline that travels with the weights, beside samplers.py and guidance.py; imports nothing of ddgen.

from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipe(class_labels=[0, 1, 2]).images
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from .guidance import guided_denoiser
from .samplers import Schedule, solve


class LatentDiffusionPipeline(DiffusionPipeline):
    """Class labels in, images out.

    Args:
        unet: Class-conditional denoiser of standardised latents; its last class is the null class.
        vae: Any diffusers autoencoder.
        scheduler: Holds the training schedule.
        latents_mean: Mean of the raw latents per channel, d numbers.
        latents_std: Standard deviation of the raw latents per channel, d numbers.
        class_names: Name of every class, in label order.
        image_size: Side of the images in pixels.
        sampling: Default settings: num_inference_steps, guidance_scale, guidance_interval, sampler, eta.
        ema_std: Relative width of the average over training that the UNet's weights are, if known.
    """

    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        unet: Any,
        vae: Any,
        scheduler: Any,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        class_names: list[str] | None = None,
        image_size: int | None = None,
        sampling: dict | None = None,
        ema_std: float | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)
        self.register_to_config(
            latents_mean=latents_mean,
            latents_std=latents_std,
            class_names=class_names,
            image_size=image_size,
            sampling=sampling,
            ema_std=ema_std,
        )

    @torch.no_grad()
    def sample_latents(
        self, class_labels: Tensor, noise: Tensor, draw: Callable[[], Tensor] | None = None, **overrides: Any
    ) -> Tensor:
        """Turns noise into standardised latents.

        Args:
            class_labels: int64 (b,).
            noise: Standard normal, float32 (b, d, h, w).
            draw: Returns fresh noise like it, for DDIM with `eta` above 0.
            overrides: Settings that replace the defaults of ``config.sampling``.

        Returns:
            float32 (b, d, h, w).
        """
        settings = {**(self.config.sampling or {}), **overrides}
        schedule = Schedule.of(self.scheduler)
        denoise = guided_denoiser(
            self.unet,
            class_labels,
            null_label=self.unet.config.num_class_embeds - 1,
            scale=settings["guidance_scale"],
            interval=tuple(settings["guidance_interval"]),
            schedule=schedule,
        )
        steps, sampler = settings["num_inference_steps"], settings["sampler"]
        return solve(denoise, noise, schedule, steps, sampler, eta=settings.get("eta", 0.0), draw=draw)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decodes standardised latents (b, d, h, w) to images (b, 3, h * f, w * f), clamped to [-1, 1]."""
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).reshape(-1, 1, 1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        return self.vae.decode((latents * std + mean).to(self.vae.dtype)).sample.float().clamp(-1, 1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int | str] | Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generates one image for every label.

        Args:
            class_labels: Class indices or names.
            num_inference_steps: Steps of the sampler, 1 to 1000; a step of "heun" asks the UNet twice.
            guidance_scale: Classifier-free guidance; 1 is none.
            guidance_interval: Noise levels, in the schedule's time from 0, clean, to 1, noise, in which it acts.
            sampler: "ddim", "dpmsolver++", "unipc", "heun" or "ipndm".
            eta: Randomness of "ddim", 0 to 1.
            generator: One for all images, or one for each.
            output_type: "pil", "np" (b, h, w, 3) in [0, 1], "pt" (b, 3, h, w) in [0, 1], or "latent".

        Raises:
            ValueError: An unknown class or sampler, or settings that do not go together.
        """
        device = self._execution_device
        labels = torch.tensor([self._index(label) for label in class_labels], device=device)
        shape = (self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size)
        generators = generator if isinstance(generator, list) else [generator] * len(labels)
        if len(generators) != len(labels):
            raise ValueError(f"{len(generators)} generators for {len(labels)} labels")

        def draw() -> Tensor:
            parts = [torch.randn(shape, generator=g, device=g.device if g else "cpu") for g in generators]
            return torch.stack(parts).to(device)

        given = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "sampler": sampler,
            "eta": eta,
        }
        overrides = {name: value for name, value in given.items() if value is not None}
        latents = self.sample_latents(labels, draw(), draw, **overrides)
        images: Any = latents if output_type == "latent" else self.decode_latents(latents).add(1).div(2)
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(np.asarray(images))
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _index(self, label: int | str | Tensor) -> int:
        names = self.config.class_names or []
        if isinstance(label, str):
            if label not in names:
                raise ValueError(f"class {label}: unknown; one of {', '.join(names[:10])} ...")
            return names.index(label)
        index, count = int(label), self.unet.config.num_class_embeds - 1
        if not 0 <= index < count:
            raise ValueError(f"class {index}: expected 0 to {count - 1}")
        return index
