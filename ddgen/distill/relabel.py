"""Soft labels of the kept images, by one observer or by several."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddgen.errors import UserError
from ddgen.observer.observer import Observer, predict_pixels


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


def ensemble_logits(logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Returns logits whose softmax at a temperature is the mean of the observers' softmaxes at that temperature.

    Args:
        logits: One (n, k) an observer; those of a single one come back as they are.
        temperature: Of the labels that will be made of them.
    """
    if len(logits) == 1:
        return logits[0]
    each = torch.stack([torch.log_softmax(z.double() / temperature, dim=1) for z in logits])
    return (temperature * (each.logsumexp(0) - math.log(len(logits)))).float()


def relabel(
    teachers: Sequence[Observer],
    pixels: Tensor,
    *,
    temperature: float,
    batch_size: int,
    device: torch.device,
    precision: str,
) -> Tensor:
    """Gives every image one soft label: the observers' mean probabilities.

    Args:
        teachers: Observers of the same classes.
        pixels: uint8 (n, 3, h, w).
        temperature: See `soft_labels`.
        batch_size: Images per forward pass.
        device: Where to compute.
        precision: See `ddgen.precision`.

    Returns:
        Probabilities float16 (n, k).
    """
    logits = [
        predict_pixels(teacher, pixels, what="logits", batch_size=batch_size, device=device, precision=precision)
        for teacher in teachers
    ]
    return soft_labels(ensemble_logits(logits, temperature), temperature)


def label_ranked(
    observer: Observer,
    logits: Tensor,
    teachers: Sequence[Observer],
    pixels: Tensor,
    *,
    temperature: float,
    batch_size: int,
    device: torch.device,
    precision: str,
) -> Tensor:
    """Labels images that an observer has looked at: where it labels alone, by what it said of them.

    Args:
        observer: What ranked the images.
        logits: What it said of them, (n, k).
        teachers, pixels, temperature, batch_size, device, precision: See `relabel`.

    Returns:
        Probabilities float16 (n, k).
    """
    if [teacher.fingerprint for teacher in teachers] == [observer.fingerprint]:
        return soft_labels(logits, temperature)
    return relabel(teachers, pixels, temperature=temperature, batch_size=batch_size, device=device, precision=precision)


def describe_teachers(teachers: Sequence[Observer]) -> str:
    """Returns the observers in a line of a card: names and accuracies on real held-out images."""
    named = [
        teacher.network
        if teacher.accuracy is None
        else f"{teacher.network} ({teacher.accuracy:.1%} on held-out images)"
        for teacher in teachers
    ]
    return named[0] if len(named) == 1 else f"mean probability of {', '.join(named)}"
