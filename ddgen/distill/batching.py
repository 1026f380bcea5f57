"""How many images are sampled together, and when the time is up."""

from __future__ import annotations

import resource
import sys
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch

from ddgen.errors import UserError

FIRST_SIZE, LARGEST_SIZE = 16, 2048
GAIN = 1.05
"""A batch of twice the size must bring so many times the images per second."""
LONGEST_SECONDS = 10.0
"""No batch is doubled that would take longer, since nothing can be stopped within a batch."""
MEMORY_SHARE = 0.7
"""Part of the free memory that the larger batch may take."""


class Memory(Protocol):
    """What a batch takes of the device's memory."""

    def before(self) -> None:
        """Called before a batch."""
        ...

    def after(self) -> tuple[int, int]:
        """Returns how many bytes the batch took at its peak, at most, and how many are free now."""
        ...

    def release(self) -> None:
        """Gives back what a batch that did not fit has left."""
        ...


class HostMemory:
    """Memory of the computer, of which each of its processes gets its part.

    What a batch took is the peak of the whole process's life less what it had before the batch: too much rather than
    too little.
    """

    def __init__(self, num_processes: int = 1) -> None:
        self.num_processes = num_processes
        self._process = psutil.Process()
        self._before = 0

    def before(self) -> None:
        """Remembers what the process has."""
        self._before = self._process.memory_info().rss

    def after(self) -> tuple[int, int]:
        """Returns how many bytes the batch took at its peak, at most, and how many are free now."""
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return max(peak - self._before, 0), psutil.virtual_memory().available // self.num_processes

    def release(self) -> None:
        """Nothing is held back on a CPU."""


class CudaMemory:
    """Memory of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0

    def before(self) -> None:
        """Starts a new peak."""
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)

    def after(self) -> tuple[int, int]:
        """Returns how many bytes the batch took at its peak, and how many are free, torch's own store included."""
        stored = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + stored
        return torch.cuda.max_memory_allocated(self.device) - self._before, free

    def release(self) -> None:
        """Empties torch's store, whose pieces may be too small for anything."""
        torch.cuda.empty_cache()


def memory_of(device: torch.device, num_processes: int = 1) -> Memory:
    """Returns what watches the memory of a device, which `num_processes` on this machine share if it is a CPU."""
    return CudaMemory(device) if device.type == "cuda" else HostMemory(num_processes)


class BatchSizes:
    """Finds how many images to sample together, while they are sampled.

    The size doubles as long as that brings more than 5 % more images per second and the next would fit; then the best
    one stays. A size that seems to bring nothing is measured a second time: its first batch may have warmed something
    up, or been disturbed.

    Args:
        fixed: Always this size.
        memory: Of the device.

    Attributes:
        size: Of the next batch.
    """

    def __init__(self, fixed: int | None, memory: Memory) -> None:
        self.fixed, self.memory = fixed, memory
        self.size = fixed or FIRST_SIZE
        self._settled = fixed is not None
        self._tried = False
        self._best: tuple[float, int] = (0.0, self.size)  # images per second, size

    def before(self) -> None:
        """To be called before a batch."""
        self.memory.before()

    def after(self, count: int, seconds: float) -> None:
        """Takes what a batch of `count` images has taken, and decides on the size of the next."""
        if self._settled or count != self.size:  # a last, smaller batch says nothing
            return
        rate, best = count / max(seconds, 1e-9), self._best
        if rate <= GAIN * best[0]:
            if self._tried:
                self.size, self._settled = best[1], True
            self._tried = True
            return
        self._best, self._tried = (rate, self.size), False
        taken, free = self.memory.after()
        if 2 * self.size > LARGEST_SIZE or 2 * seconds > LONGEST_SECONDS or 2 * taken > MEMORY_SHARE * free:
            self._settled = True
        else:
            self.size *= 2

    def failed(self, count: int) -> None:
        """Halves the size for good, since `count` images did not fit into memory.

        Raises:
            UserError: A single image does not fit, or the size was the user's.
        """
        self.memory.release()
        if self.fixed is not None and count > 1:
            raise UserError(
                f"--sample_batch_size {self.fixed}: {count} images do not fit into the device's memory;"
                " give a smaller one"
            )
        if count == 1:
            raise UserError("out of memory with a single image; free some, or --mixed_precision bf16 takes less")
        self.size, self._settled = count // 2, True


@dataclass
class Budget:
    """Seconds that may be spent on sampling.

    Attributes:
        seconds: All of them.
        spent: How many are gone.
        seconds_per_image: What an image takes, going by the last batches; 0 if not known.
    """

    seconds: float
    spent: float = 0.0
    seconds_per_image: float = 0.0

    def __post_init__(self) -> None:
        self._last: deque[tuple[int, float]] = deque(maxlen=3)

    def allows(self, count: int) -> bool:
        """Whether `count` more images fit, going by how long the last ones took."""
        return self.spent < self.seconds and self.spent + count * self.seconds_per_image <= self.seconds

    def spend(self, count: int, seconds: float) -> None:
        """Takes off what a batch took; 0 images if it failed."""
        self.spent += seconds
        if count:
            self._last.append((count, seconds))
            self.seconds_per_image = sum(taken for _, taken in self._last) / sum(images for images, _ in self._last)
