"""What the denoiser is trained on: noisy latents, timesteps, targets and weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from ddgen.config import DenoiserConfig, OptimizerConfig
from ddgen.precision import autocast
from ddgen.seeds import torch_generator


@dataclass(frozen=True)
class Draws:
    """Everything random in one optimizer step, for the whole global batch (b,), on the CPU.

    Attributes:
        timesteps: int64 (b,).
        noise: Standard normal (b, d, h, w), added to the latents.
        posterior_noise: Standard normal (b, d, h, w), draws latents from the encoder's posterior.
        dropped: bool (b,), whose labels become the null class.
        mirrored: bool (b,), which images are mirrored.
    """

    timesteps: Tensor
    noise: Tensor
    posterior_noise: Tensor
    dropped: Tensor
    mirrored: Tensor

    def part(self, where: slice) -> Draws:
        """Returns the draws of some positions."""
        return Draws(*(getattr(self, name)[where] for name in self.__dataclass_fields__))

    def to(self, device: torch.device) -> Draws:
        """Returns the draws on a device."""
        return Draws(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


def build_scheduler() -> DDIMScheduler:
    """Returns the cosine variance-preserving schedule (Nichol & Dhariwal 2021, eq. 17), 1000 timesteps."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def draw(config: DenoiserConfig, seed: int, step: int, shape: tuple[int, ...], num_timesteps: int) -> Draws:
    """Draws the randomness of optimizer step `step` for a global batch of latents of `shape` (b, d, h, w)."""
    source = torch_generator(seed, "diffusion", "step", step)
    b = shape[0]
    if config.timestep_sampling == "logit_normal":  # Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 19
        level = torch.sigmoid(config.logit_mean + config.logit_std * torch.randn(b, generator=source))
    else:
        level = torch.rand(b, generator=source)
    return Draws(
        timesteps=(level * num_timesteps).long().clamp_(0, num_timesteps - 1),
        noise=torch.randn(shape, generator=source),
        posterior_noise=torch.randn(shape, generator=source),
        dropped=torch.rand(b, generator=source) < config.class_dropout,
        mirrored=torch.rand(b, generator=source) < 0.5,
    )


def add_noise(latents: Tensor, noise: Tensor, alpha_cumprod: Tensor) -> Tensor:
    """Returns alpha x0 + sigma noise in float32; `alpha_cumprod` is (b,)."""
    a = alpha_cumprod.reshape(-1, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def velocity(latents: Tensor, noise: Tensor, alpha_cumprod: Tensor) -> Tensor:
    """Returns what the denoiser should output for ``add_noise(latents, noise, alpha_cumprod)``: alpha noise - sigma x0.

    Source: Salimans & Ho 2022, "Progressive Distillation", appendix D. Predicting the noise itself is no option here:
    at the last timestep of the cosine schedule alpha is 5e-5, and x0 would be its error times 20,000.
    """
    a = alpha_cumprod.reshape(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * latents


def loss_weights(alpha_cumprod: Tensor, snr_gamma: float | None) -> Tensor:
    """Returns the weight of each sample's loss, (b,): one, or min-SNR for v-prediction (Hang et al. 2023, sec. 3.4)."""
    if snr_gamma is None:
        return torch.ones_like(alpha_cumprod)
    snr = alpha_cumprod / (1 - alpha_cumprod)
    return snr.clamp(max=snr_gamma) / (snr + 1)


@dataclass(frozen=True)
class DiffusionLoss:
    """The loss of the denoiser on a batch of latents; noise and loss are float32 whatever the network computes in.

    Attributes:
        config: Settings of the objective.
        alphas_cumprod: Of the training schedule, (num_timesteps,), on the device.
        null_label: Class that stands for "no class".
        precision: Autocast precision of the network, resolved.
    """

    config: DenoiserConfig
    alphas_cumprod: Tensor
    null_label: int
    precision: str

    def __call__(self, unet: nn.Module, latents: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """Returns the mean loss, a scalar.

        Args:
            unet: Maps (noisy latents, timesteps, labels) to an output with ``sample``.
            latents: Standardised, float32 (b, d, h, w).
            labels: int64 (b,).
            draws: The randomness of this batch, on the device.
        """
        alpha = self.alphas_cumprod[draws.timesteps]
        noisy = add_noise(latents, draws.noise, alpha)
        kept = torch.where(draws.dropped, self.null_label, labels)
        with autocast(latents.device, self.precision):
            output = unet(noisy, draws.timesteps, kept).sample
        wanted = velocity(latents, draws.noise, alpha)
        error = F.mse_loss(output.float(), wanted, reduction="none").mean((1, 2, 3))
        return (loss_weights(alpha, self.config.snr_gamma) * error).mean()


def learning_rate(optim: OptimizerConfig, step: int) -> float:
    """Returns the learning rate of optimizer step `step`: linear warm-up, constant, linear fall to zero at the end."""
    warm = min(1.0, (step + 1) / max(optim.lr_warmup_steps, 1))
    decay_steps = max(optim.lr_decay_fraction * optim.max_train_steps, 1)
    return optim.learning_rate * warm * min(1.0, (optim.max_train_steps - step) / decay_steps)
