"""Architectures that take small images: ConvNet-d, ResNetAP-10, and the usual networks with a stem that fits.

torchvision's networks are made for 224 px: their first layers shrink an image by 4 to 8, which leaves nothing of 32 px.
Below `SMALL_BELOW` pixels the stem therefore keeps the resolution; from there on they are torchvision's own.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torchvision import models
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vgg import cfgs, make_layers
from torchvision.models.vision_transformer import VisionTransformer

Norm = Literal["batch", "instance", "none"]

SMALL_BELOW = 128  # pixels


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """Returns the normalisation of (b, channels, h, w) that goes by a name."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "instance":
        return nn.GroupNorm(channels, channels)  # affine, as in dataset distillation's ConvNet
    return nn.Identity()


def replace_batch_norm(network: nn.Module, norm: Norm) -> nn.Module:
    """Puts other normalisation in the place of a network's batch norms; layer norms stay what they are."""
    if norm != "batch":
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                parent, _, attribute = name.rpartition(".")
                setattr(network.get_submodule(parent), attribute, norm_layer(norm, module.num_features))
    return network


def convnet(depth: int, num_classes: int, image_size: int, norm: Norm, width: int) -> nn.Sequential:
    """ConvNet-d (Gidaris and Komodakis, 2018; Zhao et al., 2021): d blocks of conv, norm, ReLU, average pool.

    Returns:
        A network (b, 3, s, s) -> (b, k) that ends in its only linear layer; s must be at least ``2**depth``.
    """
    side = image_size >> depth
    layers: list[nn.Module] = []
    for block in range(depth):
        layers.append(nn.Conv2d(3 if block == 0 else width, width, kernel_size=3, padding=1))
        layers.append(norm_layer(norm, width))
        layers.append(nn.ReLU(inplace=True))
        layers.append(nn.AvgPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, num_classes))


def resnet(depth: int, num_classes: int, image_size: int, norm: Norm) -> nn.Module:
    """ResNet-18 or -50 (He et al., 2016); small images get a 3x3 stride-1 stem without max-pool ("modified")."""
    build = {18: models.resnet18, 50: models.resnet50}[depth]
    network = build(weights=None, num_classes=num_classes, norm_layer=partial(norm_layer, norm))
    if image_size < SMALL_BELOW:
        network.conv1 = _stem(3, 64)
        network.maxpool = nn.Identity()
    return network


def mobilenet_v2(num_classes: int, image_size: int, norm: Norm) -> nn.Module:
    """MobileNet-V2 (Sandler et al., 2018); small images get a stride-1 stem: 1/16 of the side remains, as in RDED."""
    network = models.mobilenet_v2(weights=None, num_classes=num_classes)
    if image_size < SMALL_BELOW:
        network.features[0][0] = _stem(3, 32)
    return replace_batch_norm(network, norm)


def efficientnet_b0(num_classes: int, image_size: int, norm: Norm) -> nn.Module:
    """EfficientNet-B0 (Tan and Le, 2019); small images get a stride-1 stem: 1/16 of the side remains, as in RDED."""
    network = models.efficientnet_b0(weights=None, num_classes=num_classes)
    if image_size < SMALL_BELOW:
        network.features[0][0] = _stem(3, 32)
    return replace_batch_norm(network, norm)


def vgg11(num_classes: int, image_size: int, norm: Norm) -> nn.Module:
    """VGG-11 (Simonyan and Zisserman, 2015) with normalisation; small images get one linear layer instead of three.

    Its three linear layers hold 93 % of the parameters and stretch what is left of 32 px, one pixel, to 7 x 7.
    """
    if image_size >= SMALL_BELOW:
        build = models.vgg11 if norm == "none" else models.vgg11_bn
        return replace_batch_norm(build(weights=None, num_classes=num_classes), norm)
    features = make_layers(cfgs["A"], batch_norm=norm != "none")
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    replace_batch_norm(features, norm)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


def resnet_ap10(num_classes: int, image_size: int, norm: Norm) -> nn.Module:
    """ResNetAP-10 (Kim et al., 2022): four residual blocks of 64 to 512 channels that shrink by average pooling.

    The stem is theirs: 3x3 up to 64 px, 3x3 and a 2x2 pool up to 128 px, 7x7 and a 4x4 pool above.
    """
    kernel, pool = (3, 1) if image_size <= 64 else (3, 2) if image_size <= 128 else (7, 4)
    layers: list[nn.Module] = [_conv(3, 64, kernel), norm_layer(norm, 64), nn.ReLU(inplace=True)]
    if pool > 1:
        layers.append(nn.AvgPool2d(pool))
    for before, after in ((64, 64), (64, 128), (128, 256), (256, 512)):
        layers.append(_PoolingBlock(before, after, norm))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


class _PoolingBlock(nn.Module):
    """A basic residual block; where channels change, both its branches halve the side by average pooling."""

    def __init__(self, before: int, after: int, norm: Norm) -> None:
        super().__init__()
        shrink: nn.Module = nn.Identity() if before == after else nn.AvgPool2d(2)
        self.branch = nn.Sequential(
            _conv(before, after, 3), norm_layer(norm, after), nn.ReLU(inplace=True), shrink,
            _conv(after, after, 3), norm_layer(norm, after),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(_conv(before, after, 1), nn.AvgPool2d(2), norm_layer(norm, after))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, before, h, w) to (b, after, h, w), or half of h and w."""
        y: Tensor = self.activation(self.branch(x) + self.shortcut(x))
        return y


def vit(num_classes: int, image_size: int) -> nn.Module:
    """ViT of DeiT-Ti's size (Touvron et al., 2021): 12 layers, width 192, 3 heads.

    Below 128 px the patch is an eighth of the side, at least 4 px, so 32, 64 and 96 px all give 8 x 8 tokens; from
    there on it is 16 px.
    """
    patch = 16 if image_size >= SMALL_BELOW else max(4, image_size // 8)
    return VisionTransformer(
        image_size=image_size, patch_size=patch, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768,
        num_classes=num_classes,
    )  # fmt: skip


def swin(num_classes: int, image_size: int) -> nn.Module:
    """Swin-T (Liu et al., 2021); small images get patches of 2 px (4 from 64 px on) and windows of 4 x 4 tokens."""
    if image_size >= SMALL_BELOW:
        return models.swin_t(weights=None, num_classes=num_classes)
    patch = 2 if image_size < 64 else 4
    return SwinTransformer(
        patch_size=[patch, patch], embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=[4, 4],
        stochastic_depth_prob=0.2, num_classes=num_classes,
    )  # fmt: skip


class TransformersLogits(nn.Module):
    """A transformers image classifier as a plain network: images (b, 3, s, s) -> logits (b, k).

    Args:
        model: An ``AutoModelForImageClassification``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Returns the model's logits."""
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def _conv(before: int, after: int, kernel: int) -> nn.Conv2d:
    convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
    nn.init.normal_(convolution.weight, 0.0, math.sqrt(2 / (kernel**2 * after)))
    return convolution


def _stem(before: int, after: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the resolution, with the weights torchvision draws for the one it replaces."""
    convolution = nn.Conv2d(before, after, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
