"""The sampler and the diffusers pipeline that travels with the weights; imports nothing of ddgen.

from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipe(class_labels=[0, 1, 2]).images
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, ImagePipelineOutput, UniPCMultistepScheduler
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Schedule:
    """Training timesteps, from the cleanest, of ``x = alpha x0 + sigma noise``.

    Attributes:
        alphas: float64 (num_timesteps,).
        sigmas: float64 (num_timesteps,).
        times: What the UNet is told at each timestep, float64 (num_timesteps,), as diffusers counts: 0 to 999 for a
            variance-preserving schedule, 1000 sigma for rectified flow.
        prediction_type: What the UNet's output means: "v_prediction", "epsilon" or "flow_prediction".
    """

    alphas: Tensor
    sigmas: Tensor
    times: Tensor
    prediction_type: str

    @classmethod
    def of(cls, scheduler: Any) -> Schedule:
        """Reads the schedule out of diffusers' DDIMScheduler or FlowMatchEulerDiscreteScheduler."""
        if hasattr(scheduler, "alphas_cumprod"):
            a = scheduler.alphas_cumprod.cpu().double()
            times = torch.arange(len(a), dtype=torch.float64)
            return cls(a.sqrt(), (1 - a).sqrt(), times, scheduler.config.prediction_type)
        u = torch.arange(1, scheduler.config.num_train_timesteps + 1, dtype=torch.float64) / (
            scheduler.config.num_train_timesteps
        )
        shift = scheduler.config.shift  # Esser et al. 2024, eq. 23
        sigmas = shift * u / (1 + (shift - 1) * u)
        return cls(1 - sigmas, sigmas, sigmas * len(u), "flow_prediction")

    def to(self, device: torch.device, dtype: torch.dtype) -> Schedule:
        """Returns the schedule as tensors of another kind."""
        tables = {name: getattr(self, name).to(device, dtype) for name in ("alphas", "sigmas", "times")}
        return replace(self, **tables)

    def level(self, time: float) -> float:
        """Returns the noise level of a time of the UNet: the schedule's own time, above 0, clean, to 1, noise."""
        return (time + (self.prediction_type != "flow_prediction")) / len(self.times)


def ddim_timesteps(num_train_timesteps: int, num_inference_steps: int) -> list[int]:
    """Returns "trailing" timesteps, from the noisiest, for any number of steps up to `num_train_timesteps`.

    They are spread evenly and always start at the last training timestep (Lin et al. 2024, "Common Diffusion Noise
    Schedules and Sample Steps Are Flawed", Table 2).
    """
    return [
        round(num_train_timesteps * (num_inference_steps - i) / num_inference_steps) - 1
        for i in range(num_inference_steps)
    ]


def to_x0_and_noise(
    output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Converts a UNet's output at latents `x` = alpha x0 + sigma noise to estimates of x0 and noise.

    Source: Salimans & Ho 2022, "Progressive Distillation", appendix D (v = alpha noise - sigma x0); Liu et al. 2023,
    "Flow Straight and Fast", eq. 1 (noise - x0, with alpha = 1 - sigma).
    """
    if prediction_type == "v_prediction":
        return alpha * x - sigma * output, sigma * x + alpha * output
    if prediction_type == "flow_prediction":
        return x - sigma * output, x + alpha * output
    return (x - sigma * output) / alpha, output


def ddim(denoise: Denoise, latents: Tensor, schedule: Schedule, num_inference_steps: int) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with eta 0), from noise to the last, noiseless, step.

    For rectified flow the same step is Euler's: (1 - s) x0 + s noise = x + (s - sigma) (noise - x0).

    Args:
        denoise: Maps (latents, time) to the UNet's output.
        latents: Standard normal noise, (b, d, h, w).
        schedule: Of training.
        num_inference_steps: Steps, 1 to the number of training timesteps.

    Returns:
        Latents, (b, d, h, w).
    """
    table = schedule.to(latents.device, latents.dtype)
    timesteps = ddim_timesteps(len(schedule.times), num_inference_steps)
    for now, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        output = denoise(latents, float(schedule.times[now]))
        x0, noise = to_x0_and_noise(output, latents, table.alphas[now], table.sigmas[now], schedule.prediction_type)
        if after is None:
            return x0
        latents = table.alphas[after] * x0 + table.sigmas[after] * noise
    return latents


def guide(
    unet: torch.nn.Module,
    class_labels: Tensor,
    null_label: int,
    guidance_scale: float,
    guidance_interval: tuple[float, float],
    schedule: Schedule,
) -> Denoise:
    """Returns a denoiser with classifier-free guidance (Ho & Salimans 2022, eq. 6, w = guidance_scale - 1).

    Both branches run in one forward. Outside the interval of noise levels only the conditional one runs
    (Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval").

    Args:
        unet: Maps (latents, times, class labels) to an output with ``sample``.
        class_labels: int64 (b,).
        null_label: Index of the null class.
        guidance_scale: 1 is no guidance.
        guidance_interval: Lowest and highest noise level, in the schedule's time, in which to guide.
        schedule: Of training.
    """
    null_labels = torch.full_like(class_labels, null_label)
    low, high = guidance_interval

    def denoise(latents: Tensor, time: float) -> Tensor:
        latents = latents.to(getattr(unet, "dtype", latents.dtype))
        if guidance_scale == 1 or not low <= schedule.level(time) <= high:
            times = torch.full(class_labels.shape, time, device=latents.device)
            return unet(latents, times, class_labels).sample.float()
        times = torch.full((2 * len(class_labels),), time, device=latents.device)
        both = unet(torch.cat([latents, latents]), times, torch.cat([class_labels, null_labels])).sample.float()
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return denoise


def solve(denoise: Denoise, latents: Tensor, scheduler: Any, num_inference_steps: int, sampler: str) -> Tensor:
    """Runs one of the samplers from noise to latents; "ddim", or diffusers' "dpmsolver++" (2M) or "unipc".

    Args:
        denoise: Maps (latents, time) to the UNet's output.
        latents: Standard normal noise, (b, d, h, w).
        scheduler: The diffusers scheduler that holds the training schedule.
        num_inference_steps: Steps.
        sampler: Name of the solver.

    Raises:
        ValueError: An unknown solver.
    """
    schedule = Schedule.of(scheduler)
    if sampler == "ddim":
        return ddim(denoise, latents, schedule, num_inference_steps)
    kinds = {"dpmsolver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
    if sampler not in kinds:
        raise ValueError(f"sampler {sampler}: unknown; one of ddim, {', '.join(kinds)}")
    flow = schedule.prediction_type == "flow_prediction"
    of_training = ("shift",) if flow else ("beta_schedule", "beta_start", "beta_end")
    solver = kinds[sampler].from_config(
        {
            "num_train_timesteps": scheduler.config.num_train_timesteps,
            "prediction_type": schedule.prediction_type,
            "timestep_spacing": "trailing",
            "solver_order": 2,
            "final_sigmas_type": "zero",
            "use_flow_sigmas": flow,
            **{("flow_shift" if name == "shift" else name): scheduler.config[name] for name in of_training},
        }
    )
    if sampler == "dpmsolver++" and not flow:
        timesteps = ddim_timesteps(scheduler.config.num_train_timesteps, num_inference_steps)
        solver.set_timesteps(timesteps=timesteps, device=latents.device)
    else:
        solver.set_timesteps(num_inference_steps, device=latents.device)
    if len(solver.timesteps) != num_inference_steps:  # diffusers' rounding: one step too many, at a negative timestep
        raise ValueError(f"sampler {sampler}: diffusers cannot take exactly {num_inference_steps} steps; try one more")
    for step, timestep in enumerate(solver.timesteps):
        # diffusers cuts a flow's timesteps down to whole numbers; the UNet is told the exact noise level
        time = float(solver.sigmas[step]) * len(schedule.times) if flow else float(timestep)
        latents = solver.step(denoise(latents, time), timestep, latents, return_dict=False)[0]
    return latents


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
        sampling: Default settings: num_inference_steps, guidance_scale, guidance_interval, sampler.
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
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)
        self.register_to_config(
            latents_mean=latents_mean,
            latents_std=latents_std,
            class_names=class_names,
            image_size=image_size,
            sampling=sampling,
        )

    @torch.no_grad()
    def sample_latents(self, class_labels: Tensor, noise: Tensor, **overrides: Any) -> Tensor:
        """Turns noise into standardised latents.

        Args:
            class_labels: int64 (b,).
            noise: Standard normal, float32 (b, d, h, w).
            overrides: Settings that replace the defaults of ``config.sampling``.
        """
        settings = {**(self.config.sampling or {}), **overrides}
        denoise = guide(
            self.unet,
            class_labels,
            self.unet.config.num_class_embeds - 1,
            settings["guidance_scale"],
            tuple(settings["guidance_interval"]),
            Schedule.of(self.scheduler),
        )
        return solve(denoise, noise, self.scheduler, settings["num_inference_steps"], settings["sampler"])

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
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generates one image for every label.

        Args:
            class_labels: Class indices or names.
            num_inference_steps: Steps of the sampler.
            guidance_scale: Classifier-free guidance; 1 is none.
            guidance_interval: Noise levels, in the schedule's time from 0, clean, to 1, noise, in which it acts.
            sampler: "ddim", "dpmsolver++" or "unipc".
            generator: One for all images, or one for each.
            output_type: "pil", "np" (b, h, w, 3) in [0, 1], "pt" (b, 3, h, w) in [0, 1], or "latent".

        Raises:
            ValueError: An unknown class.
        """
        device = self._execution_device
        labels = torch.tensor([self._index(label) for label in class_labels], device=device)
        shape = (self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size)
        generators = generator if isinstance(generator, list) else [generator] * len(labels)
        if len(generators) != len(labels):
            raise ValueError(f"{len(generators)} generators for {len(labels)} labels")
        noise = torch.stack([torch.randn(shape, generator=g, device=g.device if g else "cpu") for g in generators])
        given = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "sampler": sampler,
        }
        overrides = {name: value for name, value in given.items() if value is not None}
        latents = self.sample_latents(labels, noise.to(device), **overrides)
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
