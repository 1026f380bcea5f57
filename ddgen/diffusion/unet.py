"""The denoiser: diffusers' `UNet2DModel` with attention and class embedding, initialised as it should be."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ddgen.config import DenoiserConfig
from ddgen.errors import UserError

# preset: widths at up to three resolutions, residual blocks per resolution
PRESETS: dict[str, tuple[tuple[int, ...], int]] = {
    "xs": ((64, 128, 128), 1),
    "s": ((128, 256, 256), 2),
    "b": ((192, 384, 576), 2),
}
COARSEST = 8  # the last width is repeated until the coarsest resolution is this or smaller
LARGEST_ATTENTION = 16  # attention's cost grows with the fourth power of the side


def build_unet(config: DenoiserConfig, *, latent_channels: int, latent_size: int, num_classes: int) -> UNet2DModel:
    """Builds the denoiser of standardised latents; class `num_classes` is the null class.

    Raises:
        UserError: Settings that do not fit each other or the latents.
    """
    channels, layers = PRESETS[config.preset]
    while latent_size >> (len(channels) - 1) > COARSEST:
        channels = (*channels, channels[-1])
    channels = channels if config.unet_channels is None else config.unet_channels
    layers = layers if config.unet_layers_per_block is None else config.unet_layers_per_block
    levels = len(channels)
    attention = config.unet_attention_levels
    if attention is None:
        attention = tuple(i for i in range(1, levels) if latent_size >> i <= LARGEST_ATTENTION) or (levels - 1,)
    if any(width % 32 for width in channels):
        raise UserError(f"--unet_channels {_text(channels)}: widths must be multiples of 32")
    if latent_size % 2 ** (levels - 1):
        raise UserError(
            f"--unet_channels {_text(channels)}: {levels} resolutions do not fit {latent_size} x {latent_size} latents;"
            " use fewer widths"
        )
    if any(not 0 <= level < levels for level in attention):
        raise UserError(f"--unet_attention_levels {_text(attention)}: resolutions are 0 to {levels - 1}")
    unet = UNet2DModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=tuple("AttnDownBlock2D" if i in attention else "DownBlock2D" for i in range(levels)),
        up_block_types=tuple("AttnUpBlock2D" if i in attention else "UpBlock2D" for i in reversed(range(levels))),
        attention_head_dim=min(64, *channels),
        dropout=config.unet_dropout,
        resnet_time_scale_shift="scale_shift",  # Dhariwal & Nichol 2021, section 4; docs/recipe.md has what it gains
        num_class_embeds=num_classes + 1,
    )
    _initialise(unet)
    return unet


@torch.no_grad()
def _initialise(unet: UNet2DModel) -> None:
    """Zeroes what should start as the identity, which diffusers does not."""
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    nn.init.normal_(unet.class_embedding.weight, std=0.02)
    for module in unet.modules():
        last = module.conv2 if isinstance(module, ResnetBlock2D) else None
        if isinstance(module, Attention):
            last = module.to_out[0]
        if last is not None:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)


def _text(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


def with_contiguous_attention(unet: UNet2DModel) -> UNet2DModel:
    """Has attention's queries, keys and values computed of all images at once, not image by image; for a CPU.

    The group norm in front of them leaves a transposed tensor, of which a linear layer makes one small product per
    image. Made contiguous, preset xs samples 1.2 times as fast on two cores (float32, batch 64).
    """
    for module in unet.modules():
        if isinstance(module, Attention):
            for layer in (module.to_q, module.to_k, module.to_v):
                layer.register_forward_pre_hook(_contiguous)
    return unet


def _contiguous(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (given[0].contiguous(), *given[1:])
