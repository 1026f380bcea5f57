"""Guidance: what a sampler asks instead of the bare denoiser; imports nothing of ddgen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .samplers import Denoise, Schedule


def guided_denoiser(
    unet: Any,
    class_labels: Tensor,
    *,
    null_label: int,
    scale: float,
    interval: tuple[float, float],
    schedule: Schedule,
    guide: Any = None,
) -> Denoise:
    """Returns a denoiser that goes away from a worse one: worse + scale (unet - worse).

    The worse one is the UNet without a class (classifier-free guidance, Ho & Salimans 2022, eq. 6, w = scale - 1), both
    in one forward; or, if there is one, `guide` with the same class (Karras et al. 2024, "Guiding a Diffusion Model
    with a Bad Version of Itself", eq. 3). Outside the interval of noise levels, and with scale 1, only the UNet with
    its class runs (Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval").

    Args:
        unet: Maps (latents, times, class labels) to an output with ``sample``.
        class_labels: int64 (b,).
        null_label: Index of the null class.
        scale: 1 is no guidance.
        interval: Lowest and highest noise level, in the schedule's time, in which to guide.
        schedule: Of training.
        guide: A smaller or less trained UNet of the same latents, schedule and classes.
    """
    low, high = interval
    twice = torch.cat([class_labels, torch.full_like(class_labels, null_label)])

    def denoise(latents: Tensor, time: float) -> Tensor:
        if scale == 1 or not low <= schedule.level(time) <= high:
            return _output(unet, latents, time, class_labels)
        if guide is not None:
            better, worse = (_output(network, latents, time, class_labels) for network in (unet, guide))
        else:
            better, worse = _output(unet, torch.cat([latents, latents]), time, twice).chunk(2)
        return worse + scale * (better - worse)

    return denoise


def _output(unet: Any, latents: Tensor, time: float, labels: Tensor) -> Tensor:
    """Asks a UNet in its own number format; the answer is float32, (b, d, h, w)."""
    times = torch.full(labels.shape, time, device=latents.device)
    output: Tensor = unet(latents.to(getattr(unet, "dtype", latents.dtype)), times, labels).sample
    return output.float()
