"""A perceptual distance in the observer's features: what the classifier sees, at every depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddgen.observer.observer import Observer

SMALLEST_MAP = 2  # a map of one position says no more than the features at the end


class PerceptualLoss:
    """Distance of two batches of images in an observer's features, built as LPIPS is.

    The last feature map of each resolution is normalised at every position over its channels, and the squared
    differences are averaged over positions and layers (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep
    Features as a Perceptual Metric", eq. 1, with all channels weighed alike). The penultimate features, which decide
    what the observer says in the end, are one more layer. A network without maps, such as a vision transformer, has
    only these.

    Args:
        observer: In eval mode, its weights fixed.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.layers = _last_of_each_resolution(observer)

    def __call__(self, restored: Tensor, original: Tensor) -> Tensor:
        """Returns the mean distance, a scalar.

        Args:
            restored: Images in [-1, 1], float32 (b, 3, h, w); gradients flow through these.
            original: Likewise, without gradients.
        """
        with torch.no_grad():
            wanted = self._features(original)
        found = self._features(restored)
        distances = [(a - b).square().sum(1).mean() for a, b in zip(found, wanted, strict=True)]
        return torch.stack(distances).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        maps: dict[int, Tensor] = {}

        def keep(_: nn.Module, __: object, output: Tensor) -> None:
            maps[output.shape[-1]] = output.clone()  # activations may work in place; of several calls the last counts

        hooks = [layer.register_forward_hook(keep) for layer in self.layers]
        try:
            features = self.observer.features((images + 1) / 2)
        finally:
            for hook in hooks:
                hook.remove()
        return [F.normalize(value, dim=1) for value in (*maps.values(), features)]


@torch.no_grad()
def _last_of_each_resolution(observer: Observer) -> list[nn.Module]:
    """Returns the modules whose output is the last feature map of its size, from one forward of an empty image."""
    last: dict[int, nn.Module] = {}

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] >= SMALLEST_MAP:
            last[output.shape[-1]] = module

    leaves = [module for module in observer.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    device = next(observer.parameters()).device
    try:
        observer.features(torch.zeros(1, 3, observer.input_size, observer.input_size, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(last.values()))
