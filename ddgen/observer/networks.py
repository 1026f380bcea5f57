"""Classifiers by name: ``convnet<d>``, ``resnet18``, ``torchvision:<name>``; observers and students alike."""

from __future__ import annotations

import difflib
import re
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import models

from ddgen.errors import UserError

Norm = Literal["batch", "instance", "none"]

SMALL_STEM_BELOW = 128  # pixels; below, ResNet-18 keeps the resolution of its input in the stem


class Classifier(nn.Module):
    """A network split before its last linear layer.

    Args:
        body: (b, c, h, w) -> features (b, d).
        head: features (b, d) -> logits (b, k).
    """

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def features(self, x: Tensor) -> Tensor:
        """Returns the penultimate features (b, d) of normalised images (b, 3, h, w)."""
        features: Tensor = self.body(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (b, k) of normalised images (b, 3, h, w)."""
        logits: Tensor = self.head(self.body(x))
        return logits


def build_network(
    name: str,
    num_classes: int,
    image_size: int,
    *,
    norm: Norm = "batch",
    width: int = 128,
    setting: str = "--observer_network",
) -> Classifier:
    """Builds a classifier with freshly drawn weights (from torch's global generator).

    Args:
        name: ``convnet<d>``, ``resnet18`` or ``torchvision:<name>``.
        num_classes: Number of logits.
        image_size: Side of the square images it will see.
        norm: Normalisation layers; torchvision's networks have their own, so only "batch" goes with them.
        width: Channels of a ConvNet.
        setting: The flag an error names.

    Returns:
        A network with ``features(x) -> (b, d)`` and ``forward(x) -> (b, k)`` on normalised images (b, 3, h, w).

    Raises:
        UserError: Unknown name, or a network that cannot take images of this size.
    """
    if match := re.fullmatch(r"convnet(\d+)", name):
        return _convnet(int(match[1]), num_classes, image_size, norm, width, setting)
    if name == "resnet18":
        return _resnet18(num_classes, image_size, norm)
    if name.startswith("torchvision:"):
        if norm != "batch":
            raise UserError(f"{setting} {name}: no {norm}-norm version; use convnet<d> or resnet18")
        return _torchvision(name, num_classes, image_size, setting)
    raise UserError(f"{setting} {name}: unknown network; use convnet<d> (convnet3), resnet18 or torchvision:<name>")


def uses_channels_last(network: nn.Module, device: torch.device) -> bool:
    """Says whether training is faster with channels-last memory.

    On CUDA always. On CPU convolution and batch norm gain 1.4x to 1.6x, GroupNorm loses.
    """
    return device.type == "cuda" or not any(isinstance(module, nn.GroupNorm) for module in network.modules())


def last_linear(network: nn.Module, num_classes: int) -> tuple[str, nn.Linear] | None:
    """Returns name and module of the last linear layer with `num_classes` outputs, or None."""
    found = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_classes
    ]
    return found[-1] if found else None


def _norm_layer(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "instance":
        return nn.GroupNorm(channels, channels)  # affine, as in dataset distillation's ConvNet
    return nn.Identity()


def _convnet(depth: int, num_classes: int, image_size: int, norm: Norm, width: int, setting: str) -> Classifier:
    """ConvNet-d (Gidaris and Komodakis, 2018; Zhao et al., 2021): d blocks of conv, norm, ReLU, average pool."""
    side = image_size >> depth
    if depth < 1 or side < 1:
        most = image_size.bit_length() - 1
        raise UserError(
            f"{setting} convnet{depth}: every block halves the side, so {image_size} px images take 1 to {most} blocks"
            f"; use convnet{max(1, min(depth, most))}"
        )
    layers: list[nn.Module] = []
    for block in range(depth):
        layers.append(nn.Conv2d(3 if block == 0 else width, width, kernel_size=3, padding=1))
        layers.append(_norm_layer(norm, width))
        layers.append(nn.ReLU(inplace=True))
        layers.append(nn.AvgPool2d(2))
    return Classifier(nn.Sequential(*layers, nn.Flatten()), nn.Linear(width * side * side, num_classes))


def _resnet18(num_classes: int, image_size: int, norm: Norm) -> Classifier:
    """ResNet-18 (He et al., 2016); small images get a 3x3 stride-1 stem without max-pool ("modified")."""
    network = models.resnet18(
        weights=None, num_classes=num_classes, norm_layer=lambda channels: _norm_layer(norm, channels)
    )
    if image_size < SMALL_STEM_BELOW:
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return _split(network, network.fc, "fc")


def _torchvision(name: str, num_classes: int, image_size: int, setting: str) -> Classifier:
    short = name.removeprefix("torchvision:")
    known = models.list_models(module=models)
    if short not in known:
        close = difflib.get_close_matches(short, known, n=1)
        hint = f"did you mean torchvision:{close[0]}?" if close else "see torchvision.models.list_models()"
        raise UserError(f"{setting} {name}: not a torchvision classifier; {hint}")
    network = _build_torchvision(name, short, num_classes, image_size, setting)
    head = last_linear(network, num_classes)
    if head is None:
        raise UserError(f"{setting} {name}: it ends in no linear layer, so it has no features; use resnet18")
    classifier = _split(network, head[1], head[0])
    _check_takes(classifier, name, image_size, setting)
    return classifier


def _build_torchvision(name: str, short: str, num_classes: int, image_size: int, setting: str) -> nn.Module:
    extra: dict[str, Any] = {}
    if short in ("googlenet", "inception_v3"):
        extra = {"aux_logits": False, "init_weights": True}  # auxiliary heads would change what forward returns
    elif short.startswith("vit_"):
        extra = {"image_size": image_size}
    elif short == "maxvit_t":
        extra = {"input_size": (image_size, image_size)}
    try:
        network: nn.Module = models.get_model(short, weights=None, num_classes=num_classes, **extra)
    except (AssertionError, ValueError):
        raise _wrong_size(name, image_size, setting) from None
    return network


def _check_takes(classifier: Classifier, name: str, image_size: int, setting: str) -> None:
    """Runs one empty image through, so that a wrong size is found before an epoch is spent."""
    was_training = classifier.training
    try:
        with torch.no_grad():
            classifier.eval()(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError, ValueError):
        raise _wrong_size(name, image_size, setting) from None
    finally:
        classifier.train(was_training)


def _wrong_size(name: str, image_size: int, setting: str) -> UserError:
    return UserError(f"{setting} {name}: it cannot take {image_size} px images; set --observer_input_size (often 224)")


def _split(network: nn.Module, head: nn.Linear, head_name: str) -> Classifier:
    """Takes the last linear layer out of a network."""
    parent_name, _, attribute = head_name.rpartition(".")
    setattr(network.get_submodule(parent_name), attribute, nn.Identity())
    return Classifier(network, head)
