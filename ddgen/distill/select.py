"""Which candidates of a class are kept."""

from __future__ import annotations

import torch

from ddgen.errors import UserError
from ddgen.seeds import numpy_generator


def select_most_realistic(losses: torch.Tensor, ipc: int, indices: torch.Tensor | None = None) -> torch.Tensor:
    """Keeps the candidates with the lowest realism loss (RDED's rule, Sun et al., CVPR 2024, section 4).

    Args:
        losses: Realism loss of each candidate of one class, float (m,); lower is more realistic.
        ipc: How many to keep.
        indices: Numbers of the candidates, int64 (m,), which decide between equal losses, so that the
            order in which candidates arrive is irrelevant. Default: their positions.

    Returns:
        Positions in `losses`, int64 (ipc,), the most realistic first.

    Raises:
        UserError: There are fewer candidates than `ipc`.
        ValueError: A loss is not finite.
    """
    _check_enough(len(losses), ipc)
    if not torch.isfinite(losses).all():
        raise ValueError("a realism loss is not finite")
    by_index = torch.arange(len(losses)) if indices is None else indices.cpu().argsort()
    return by_index[losses.cpu()[by_index].argsort(stable=True)][:ipc]


def select_random(num_candidates: int, ipc: int, seed: int, class_index: int) -> torch.Tensor:
    """Keeps candidates at random: the baseline every selection rule has to beat.

    A larger `ipc` keeps all that a smaller one keeps.

    Returns:
        Positions, int64 (ipc,), no position twice.

    Raises:
        UserError: There are fewer candidates than `ipc`.
    """
    _check_enough(num_candidates, ipc)
    order = numpy_generator(seed, "select_random", class_index).permutation(num_candidates)
    return torch.from_numpy(order[:ipc].copy())


def _check_enough(num_candidates: int, ipc: int) -> None:
    if ipc < 1:
        raise UserError(f"--ipc {ipc}: keep at least 1 image per class")
    if num_candidates < ipc:
        raise UserError(f"--ipc {ipc}: only {num_candidates} candidates of a class; raise --candidates_per_image")
