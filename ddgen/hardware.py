"""What the computer is, what it can do at best, and what was used of it."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ddgen.precision import fast_bf16
from ddgen.units import readable_memory

# Dense bf16 TFLOP/s with float32 accumulation, by torch's name of the device, matched whole. Source: NVIDIA's data
# sheets of the H100, H200 and A100 tensor core GPUs (half of what they give "with sparsity"), and the Ada architecture
# white paper, appendix A. Parts of a device (MIG) and other models have other peaks, so they are not guessed.
BF16_PEAKS: dict[str, float] = {
    r"NVIDIA H100 80GB HBM3": 989.4,
    r"NVIDIA H100 PCIe": 756.5,
    r"NVIDIA H100 NVL": 835.5,
    r"NVIDIA H200": 989.4,
    r"(NVIDIA )?A100-(SXM4|SXM|PCIE)-[48]0GB": 311.9,
    r"NVIDIA A100 80GB PCIe": 311.9,
    r"NVIDIA GeForce RTX 4090": 165.2,
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Returns the dense floating-point operations per second that a GPU can do at best, None if not known.

    Args:
        device_name: As torch names it.
        precision: Resolved; only the peaks of bf16 and fp16, which are equal, are known.
    """
    if precision == "no":
        return None
    peaks = [peak for pattern, peak in BF16_PEAKS.items() if re.fullmatch(pattern, device_name)]
    return peaks[0] * 1e12 if peaks else None


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU or of this computer's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def number_format(device: torch.device, precision: str) -> str:
    """Says in which numbers the networks really compute, and why where that may surprise."""
    if precision == "no" and device.type == "cuda":
        return "float32 (products in TF32)"
    if precision == "no":
        return "float32" if fast_bf16(device) else f"float32: this {device.type.upper()} has no fast bf16"
    slow = precision == "bf16" and not fast_bf16(device)
    emulated = f", which this {device.type.upper()} emulates: --mixed_precision no is faster" if slow else ""
    return f"{precision}, with float32 weights and loss{emulated}"


def tune(device: torch.device) -> None:
    """Sets what makes a GPU faster at no cost to a run's exact resumption.

    Float32 products that are left run in TF32. cuDNN's timing of algorithms stays off, and algorithms that add in no
    fixed order are not used: a resumed run could choose others, and end in other weights.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.deterministic = True


@contextmanager
def exact_products() -> Iterator[None]:
    """Has float32 products computed in float32, not in TF32, on a GPU as on a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def share_gpus() -> bool:
    """Whether more processes were started on this machine than it has GPUs, so that some compute on the same one."""
    return 0 < torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of host memory to a device, without waiting for what the device has still to do."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def peak_memory(device: torch.device) -> str:
    """Returns the most memory that this process has used, of the host and of the GPU, as text."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    text = f"{readable_memory(host)} of the host"
    if device.type == "cuda":
        text += f", {readable_memory(torch.cuda.max_memory_allocated(device))} of the GPU"
    return text


def readable_flops(rate: float, peak: float | None = None) -> str:
    """Returns a rate such as "98 GFLOP/s", or "346 TFLOP/s, 35 % of peak" where the peak is known."""
    text = f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"
    return text if peak is None else f"{text}, {rate / peak:.0%} of peak".replace("%", " %")
