"""Classifiers by name, observers and students alike: `NETWORKS`, ``convnet<d>``, ``torchvision:<name>``, and students
by a transformers config."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from ddgen.errors import UserError
from ddgen.observer import architectures
from ddgen.observer.architectures import Norm

NETWORKS: dict[str, Callable[[int, int, Norm], nn.Module]] = {
    "resnet18": partial(architectures.resnet, 18),
    "resnet50": partial(architectures.resnet, 50),
    "resnet_ap10": architectures.resnet_ap10,
    "vgg11": architectures.vgg11,
    "mobilenet_v2": architectures.mobilenet_v2,
    "efficientnet_b0": architectures.efficientnet_b0,
    "vit": lambda num_classes, image_size, norm: architectures.vit(num_classes, image_size),
    "swin": lambda num_classes, image_size, norm: architectures.swin(num_classes, image_size),
}
"""Name -> (number of classes, image size, norm) -> network; vit and swin have layer norms, whatever is asked for."""

CONVNET_WIDTH = 128


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
    width: int = CONVNET_WIDTH,
    setting: str = "--observer_network",
) -> Classifier:
    """Builds a classifier with freshly drawn weights (from torch's global generator).

    Args:
        name: A name of `NETWORKS`, ``convnet<d>`` or ``convnet<d>w<width>``, ``torchvision:<name>``, or, as a student,
            ``transformers:<folder or hub id of a config>``.
        num_classes: Number of logits.
        image_size: Side of the square images it will see.
        norm: What stands where a network has batch norms.
        width: Channels of a ConvNet whose name does not say.
        setting: The flag an error names.

    Returns:
        A network with ``features(x) -> (b, d)`` and ``forward(x) -> (b, k)`` on normalised images (b, 3, h, w).

    Raises:
        UserError: Unknown name, or a network that cannot take images of this size.
    """
    if match := re.fullmatch(r"convnet(\d+)(?:w(\d+))?", name):
        depth = int(match[1])
        _check_depth(name, depth, image_size, setting)
        network: nn.Module = architectures.convnet(depth, num_classes, image_size, norm, int(match[2] or width))
        return _classifier(network, name, num_classes, setting)
    if name in NETWORKS:
        network = _built(partial(NETWORKS[name], num_classes, image_size, norm), name, image_size, setting)
    elif name.startswith("torchvision:"):
        network = architectures.replace_batch_norm(_torchvision(name, num_classes, image_size, setting), norm)
    elif name.startswith("transformers:"):
        network = architectures.replace_batch_norm(_transformers(name, num_classes, image_size, setting), norm)
    else:
        names = f"convnet<d> (convnet3), {', '.join(NETWORKS)} or torchvision:<name>"
        raise UserError(f"{setting} {name}: unknown network; use {names}")
    classifier = _classifier(network, name, num_classes, setting)
    _check_takes(classifier, name, image_size, setting)
    return classifier


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


def _check_depth(name: str, depth: int, image_size: int, setting: str) -> None:
    if depth < 1 or image_size >> depth < 1:
        most = image_size.bit_length() - 1
        raise UserError(
            f"{setting} {name}: every block halves the side, so {image_size} px images take 1 to {most} blocks"
            f"; use convnet{max(1, min(depth, most))}"
        )


def _torchvision(name: str, num_classes: int, image_size: int, setting: str) -> nn.Module:
    short = name.removeprefix("torchvision:")
    known = models.list_models(module=models)
    if short not in known:
        close = difflib.get_close_matches(short, known, n=1)
        hint = f"did you mean torchvision:{close[0]}?" if close else "see torchvision.models.list_models()"
        raise UserError(f"{setting} {name}: not a torchvision classifier; {hint}")
    extra: dict[str, Any] = {}
    if short in ("googlenet", "inception_v3"):
        extra = {"aux_logits": False, "init_weights": True}  # auxiliary heads would change what forward returns
    elif short.startswith("vit_"):
        extra = {"image_size": image_size}
    elif short == "maxvit_t":
        extra = {"input_size": (image_size, image_size)}
    build = partial(models.get_model, short, weights=None, num_classes=num_classes, **extra)
    return _built(build, name, image_size, setting)


def _transformers(name: str, num_classes: int, image_size: int, setting: str) -> nn.Module:
    """Builds a transformers image classifier from its config alone, for the images and classes at hand."""
    source = name.removeprefix("transformers:")
    if setting not in ("--students", "--rank_models"):
        raise UserError(f"{setting} {name}: only students are built from a config; give a trained one with --observer")
    from transformers import AutoConfig, AutoModelForImageClassification

    try:
        config = AutoConfig.from_pretrained(source, num_labels=num_classes)
    except (OSError, ValueError, KeyError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"{setting} {name}: no config of a transformers model there: {cause}") from None
    if hasattr(config, "image_size"):
        config.image_size = image_size
    try:
        model = AutoModelForImageClassification.from_config(config)
    except ValueError:
        raise UserError(f"{setting} {name}: transformers has no image classifier of this config") from None
    return architectures.TransformersLogits(model)


def _built(build: Callable[[], nn.Module], name: str, image_size: int, setting: str) -> nn.Module:
    try:
        return build()
    except (AssertionError, ValueError):
        raise _wrong_size(name, image_size, setting) from None


def _check_takes(classifier: Classifier, name: str, image_size: int, setting: str) -> None:
    """Runs one empty image through, so that a wrong size is found before an epoch is spent.

    Instance norm refuses a single pixel, of which it would make zero.
    """
    was_training = classifier.training
    try:
        with torch.no_grad():
            classifier.eval()(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError, ValueError):
        raise _wrong_size(name, image_size, setting) from None
    finally:
        classifier.train(was_training)


def _wrong_size(name: str, image_size: int, setting: str) -> UserError:
    cure = "set --observer_input_size (often 224)" if setting == "--observer_network" else "take another student"
    return UserError(f"{setting} {name}: it cannot take {image_size} px images; {cure}")


def _classifier(network: nn.Module, name: str, num_classes: int, setting: str) -> Classifier:
    """Takes the last linear layer out of a network."""
    found = last_linear(network, num_classes)
    if found is None:
        raise UserError(f"{setting} {name}: it ends in no linear layer, so it has no features; use resnet18")
    head_name, head = found
    parent_name, _, attribute = head_name.rpartition(".")
    setattr(network.get_submodule(parent_name), attribute, nn.Identity())
    return Classifier(network, head)
