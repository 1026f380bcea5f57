"""How much arithmetic training does for an image."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

TRAINING_FORWARDS = 3
"""A step's forward and backward, in forwards."""


def flops_per_image(unet: UNet2DModel) -> float:
    """Counts the floating-point operations of one image's forward and backward; multiplying and adding count as two.

    Counted are matrix products, convolutions and attention, as the model needs them: not what gradient checkpointing
    computes a second time. Nothing is computed: the count is made on tensors without data.
    """
    b = 2
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        twin = UNet2DModel.from_config(unet.config)
        size = (b, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        index = torch.zeros(b, dtype=torch.long)
        twin(torch.zeros(size), index, index).sample.sum().backward()
    return counter.get_total_flops() / b
