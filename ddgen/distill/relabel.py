"""Soft labels of the kept images."""

from __future__ import annotations

import torch

from ddgen.errors import UserError


def soft_labels(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Turns the observer's logits into probabilities that are stored with the images.

    Args:
        logits: Observer's logits, float (n, k).
        temperature: Above 1 flattens the labels, below 1 sharpens them.

    Returns:
        Probabilities float16 (n, k); rows sum to 1 within float16's rounding.

    Raises:
        UserError: The temperature is not a positive number.
        ValueError: A logit is not finite.
    """
    if not 0 < temperature < float("inf"):
        raise UserError(f"--soft_label_temperature {temperature}: give a number above 0; 1 keeps the observer's own")
    if not torch.isfinite(logits).all():
        raise ValueError("a logit of the observer is not finite")
    return torch.softmax(logits.double() / temperature, dim=1).half()
