"""An observer that only has to look: the same scores in less time."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ddgen.observer.networks import uses_channels_last
from ddgen.observer.observer import Observer


def for_inference(observer: Observer, device: torch.device) -> Observer:
    """Returns a copy on a device whose batch norms are part of the convolutions before them.

    Its logits are those of the observer but for rounding, and its fingerprint is not the observer's. A convnet3 on a
    CPU scores images of 64 pixels 1.66 times as fast (measured once, one thread), in batches of `batch_size_of`.
    """
    fused = copy.deepcopy(observer).eval().requires_grad_(False)
    for module in fused.modules():
        if isinstance(module, nn.Sequential):  # only there does the order of modules say what follows what
            _fuse(module)
    layout = torch.channels_last if uses_channels_last(fused, device) else torch.contiguous_format
    return fused.to(device).to(memory_format=layout)


def batch_size_of(device: torch.device) -> int:
    """Returns how many images to score at a time: on a CPU so few that what a layer makes stays in its cache."""
    return 8 if device.type == "cpu" else 256


def _fuse(module: nn.Sequential) -> None:
    for position in range(len(module) - 1):
        convolution, norm = module[position], module[position + 1]
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            module[position] = fuse_conv_bn_eval(convolution, norm)
            module[position + 1] = nn.Identity()
