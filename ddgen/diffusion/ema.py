"""Power-function averages of the weights.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ddgen.sharding import local, whole


def std_to_gamma(std: float) -> float:
    """Returns the exponent whose profile t^gamma has a relative standard deviation (their appendix C, eq. 126)."""
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(roots.real.max())


class PowerEMA:
    """One average per relative width, float32.

    Args:
        parameters: The weights to follow, in a fixed order.
        stds: Relative widths of the averaging profile, for instance 0.05 and 0.10.
    """

    def __init__(self, parameters: list[nn.Parameter], stds: tuple[float, ...]) -> None:
        self.parameters = parameters
        self.gammas = {std: std_to_gamma(std) for std in stds}
        self.averages: dict[float, list[Tensor]] = {
            std: [p.detach().float().clone() for p in parameters] for std in stds
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves every average towards the weights after optimizer step number `step`, counted from 1 (eq. 121)."""
        live = [local(p.detach()).float() for p in self.parameters]
        for std, average in self.averages.items():
            torch._foreach_lerp_(
                [local(tensor) for tensor in average], live, 1 - (1 - 1 / step) ** (self.gammas[std] + 1)
            )

    @torch.no_grad()
    def copy_to(self, std: float, parameters: list[nn.Parameter]) -> None:
        """Writes one average into another model's parameters, same order; under FSDP every process must call this."""
        for parameter, average in zip(parameters, self.averages[std], strict=True):
            parameter.copy_(whole(average))
