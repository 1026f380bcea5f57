"""Which number format the networks compute in."""

from __future__ import annotations

import contextlib
from typing import ContextManager

import torch

from ddgen.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(requested: str | None, device: torch.device) -> str:
    """Returns "no", "bf16" or "fp16"; without a request bf16.

    Raises:
        UserError: A format the device computes wrongly or not at all.
    """
    precision = requested or "bf16"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed_precision fp16: CPUs silently run float32 instead; use bf16 or no")
    return precision


def autocast(device: torch.device, precision: str) -> ContextManager[object]:
    """Returns the autocast context for a resolved precision; weights stay float32."""
    if precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])
