"""The autoencoder ddgen trains: `AutoencoderKL`'s networks as residuals on a patch PCA.

This file imports nothing of ddgen, so that it can travel with the weights: diffusers loads it from the folder of a
saved generator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, DiagonalGaussianDistribution, Encoder
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F


class PatchAutoencoderKL(ModelMixin, ConfigMixin):
    """Linear patch autoencoder plus convolutional residuals with a Gaussian posterior.

    Encoder and decoder are each the sum of a strided linear map of pixel patches, which `set_pca` fills with the
    closed-form optimum, and a network of the `AutoencoderKL` kind whose last layer starts at zero. Training therefore
    starts at patch PCA's error and goes down from there.

    Args:
        in_channels: Channels of the images.
        latent_channels: Channels of the latents (d).
        downsample: Pixels per latent along a side (f).
        patch: Pixels per side folded into channels before the residual networks; divides `downsample`.
        block_out_channels: Widths of the residual networks, one for each of log2(f / patch) + 1 resolutions.
            Empty: no residual networks, patch PCA alone.
        layers_per_block: Residual blocks per resolution.
        norm_num_groups: Groups of the group norms.
        initial_logvar: Log variance of the posterior before training, in units of the whitened latents.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 4,
        downsample: int = 4,
        patch: int = 1,
        block_out_channels: tuple[int, ...] = (64, 128, 128),
        layers_per_block: int = 1,
        norm_num_groups: int = 16,
        initial_logvar: float = -8.0,
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        if levels and patch * 2 ** (levels - 1) != downsample:
            raise ValueError(
                f"{levels} widths and patch {patch} give f = {patch * 2 ** (levels - 1)}, not {downsample}"
            )
        self.linear_encoder = nn.Conv2d(in_channels, latent_channels, downsample, stride=downsample)
        self.linear_decoder = nn.ConvTranspose2d(latent_channels, in_channels, downsample, stride=downsample)
        if not levels:
            return
        self.encoder = Encoder(
            in_channels=in_channels * patch**2,
            out_channels=latent_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=False,
        )
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=in_channels * patch**2,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=False,
        )
        for last in (self.encoder.conv_out, self.decoder.conv_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @torch.no_grad()
    def set_pca(self, mean: Tensor, components: Tensor, stds: Tensor) -> None:
        """Fills the linear maps with whitened patch PCA.

        Args:
            mean: Mean patch, (c * f * f,), of images in [-1, 1].
            components: Orthonormal rows, (d, c * f * f).
            stds: Standard deviation of the patches along each component, (d,).
        """
        f, c = self.config.downsample, self.config.in_channels
        whitened = components / stds[:, None]
        self.linear_encoder.weight.copy_(whitened.reshape(-1, c, f, f))
        self.linear_encoder.bias = nn.Parameter(-whitened @ mean)
        self.linear_decoder.weight.copy_((components * stds[:, None]).reshape(-1, c, f, f))
        # One bias a channel cannot hold a mean that varies inside the patch, so `fit_pca` gives a mean that does not.
        self.linear_decoder.bias = nn.Parameter(mean.reshape(c, f * f).mean(1))

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encodes images (b, c, h, w) in [-1, 1] to a posterior over latents (b, d, h / f, w / f)."""
        mean = self.linear_encoder(x)
        logvar = torch.full_like(mean, self.config.initial_logvar)
        if self.config.block_out_channels:
            residual = self.encoder(F.pixel_unshuffle(x, self.config.patch))
            shift, log_scale = residual.chunk(2, dim=1)
            mean, logvar = mean + shift, logvar + log_scale
        posterior = DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1).float())
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decodes latents (b, d, h, w) to images (b, c, h * f, w * f), about [-1, 1], not clamped."""
        images = self.linear_decoder(z)
        if self.config.block_out_channels:
            images = images + F.pixel_shuffle(self.decoder(z), self.config.patch)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(
        self, x: Tensor, noise: Tensor, transform: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, DiagonalGaussianDistribution, Tensor | None]:
        """Reconstructs images for training.

        Args:
            x: Images (b, c, h, w).
            noise: Standard normal (b, d, h / f, w / f), draws the latents from the posterior.
            transform: Of latents.

        Returns:
            The reconstructions, the posterior and, with a transform, what the transformed latents are decoded to.
        """
        (posterior,) = self.encode(x, return_dict=False)
        latents = posterior.mean + posterior.std * noise
        (images,) = self.decode(latents, return_dict=False)
        (moved,) = (None,) if transform is None else self.decode(transform(latents), return_dict=False)
        return images, posterior, moved
