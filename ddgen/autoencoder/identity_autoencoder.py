"""No autoencoder, as an autoencoder: latents are the pixels. For diffusion in pixel space.

This file imports nothing of ddgen, so that it can travel with the weights: diffusers loads it from the folder of a
saved generator.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class IdentityAutoencoder(ModelMixin, ConfigMixin):
    """Gives back what it gets, through the interface of an autoencoder without a posterior.

    Args:
        latent_channels: Channels of the images, which are the latents.
    """

    @register_to_config
    def __init__(self, latent_channels: int = 3) -> None:
        super().__init__()
        # Says which device and number format the model is in, as diffusers reads it off the weights; never used.
        self.placeholder = nn.Parameter(torch.zeros(1))

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Returns images (b, c, h, w) as latents."""
        return AutoencoderTinyOutput(latents=x) if return_dict else (x,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Returns latents (b, c, h, w) as images."""
        return DecoderOutput(sample=z) if return_dict else (z,)
