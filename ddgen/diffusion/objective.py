"""What the denoiser is trained on: noisy latents, timesteps, targets and weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from ddgen.config import DenoiserConfig, OptimizerConfig
from ddgen.diffusion.samplers import Schedule
from ddgen.errors import UserError
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


def build_scheduler(config: DenoiserConfig) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """Returns the training schedule, 1000 timesteps, as the diffusers scheduler that is saved with the weights.

    - v_prediction: cosine (Nichol & Dhariwal 2021, eq. 17).
    - epsilon: Stable Diffusion's "scaled linear" (Rombach et al. 2022). Its last alpha is 0.07; the cosine's is 5e-5,
      where x0 would be the error in the noise times 20,000.
    - flow_prediction: rectified flow, x = (1 - t) x0 + t noise (Liu et al. 2023; Lipman et al. 2023).

    Raises:
        UserError: --flow_shift without rectified flow.
    """
    if config.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=config.flow_shift)
    if config.flow_shift != 1:
        raise UserError(
            f"--flow_shift {config.flow_shift}: only for --prediction_type flow_prediction; --logit_mean moves the"
            " training timesteps of the others"
        )
    epsilon = config.prediction_type == "epsilon"
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(
        num_train_timesteps=1000,
        **(betas if epsilon else {"beta_schedule": "squaredcos_cap_v2"}),
        prediction_type=config.prediction_type,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def micro_batch(size: int, number: int, process: int, num_processes: int) -> slice:
    """Returns where in the global batch a process's micro-batch `number` of `size` images stands."""
    start = (number * num_processes + process) * size
    return slice(start, start + size)


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


def add_noise(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns alpha x0 + sigma noise in float32; `alpha` and `sigma` are (b,)."""
    return alpha.reshape(-1, 1, 1, 1) * latents + sigma.reshape(-1, 1, 1, 1) * noise


def target(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """Returns what the denoiser should output for ``add_noise(latents, noise, alpha, sigma)``.

    Source: Salimans & Ho 2022, "Progressive Distillation", appendix D (v_prediction: alpha noise - sigma x0); Ho et al.
    2020, eq. 14 (epsilon: the noise); Liu et al. 2023, "Flow Straight and Fast", eq. 1 (flow_prediction: noise - x0).
    """
    if prediction_type == "v_prediction":
        return alpha.reshape(-1, 1, 1, 1) * noise - sigma.reshape(-1, 1, 1, 1) * latents
    return noise - latents if prediction_type == "flow_prediction" else noise


def loss_weights(alpha: Tensor, sigma: Tensor, prediction_type: str, snr_gamma: float | None) -> Tensor:
    """Returns the weight of each sample's loss, (b,): one, or min-SNR (Hang et al. 2023, sec. 3.4).

    Min-SNR weighs the squared error of x0 by min(SNR, gamma), SNR = (alpha / sigma)^2. That error is (sigma / alpha)^2
    times the noise's, and sigma^2 times the velocity's, in rectified flow too.
    """
    if snr_gamma is None:
        return torch.ones_like(alpha)
    snr = (alpha / sigma).square()
    if prediction_type == "epsilon":
        return (snr_gamma / snr).clamp(max=1)
    return sigma.square() * snr.clamp(max=snr_gamma)


@dataclass(frozen=True)
class DiffusionLoss:
    """The loss of the denoiser on a batch of latents; noise and loss are float32 whatever the network computes in.

    Attributes:
        config: Settings of the objective.
        schedule: Of training, float32, on the device.
        null_label: Class that stands for "no class".
        precision: Autocast precision of the network, resolved.
    """

    config: DenoiserConfig
    schedule: Schedule
    null_label: int
    precision: str

    def __call__(self, unet: nn.Module, latents: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """Returns the mean loss, a scalar.

        Args:
            unet: Maps (noisy latents, times, labels) to an output with ``sample``.
            latents: Standardised, float32 (b, d, h, w).
            labels: int64 (b,).
            draws: The randomness of this batch, on the device.
        """
        alpha, sigma = self.schedule.alphas[draws.timesteps], self.schedule.sigmas[draws.timesteps]
        noisy = add_noise(latents, draws.noise, alpha, sigma)
        kept = torch.where(draws.dropped, self.null_label, labels)
        with autocast(latents.device, self.precision):
            output = unet(noisy, self.schedule.times[draws.timesteps], kept).sample
        kind = self.schedule.prediction_type
        wanted = target(latents, draws.noise, alpha, sigma, kind)
        error = F.mse_loss(output.float(), wanted, reduction="none").mean((1, 2, 3))
        return (loss_weights(alpha, sigma, kind, self.config.snr_gamma) * error).mean()


def learning_rate(optim: OptimizerConfig, step: int) -> float:
    """Returns the learning rate of optimizer step `step`: linear warm-up, constant, linear fall to zero at the end."""
    warm = min(1.0, (step + 1) / max(optim.lr_warmup_steps, 1))
    decay_steps = max(optim.lr_decay_fraction * optim.max_train_steps, 1)
    return optim.learning_rate * warm * min(1.0, (optim.max_train_steps - step) / decay_steps)
