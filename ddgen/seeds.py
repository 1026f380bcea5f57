"""Pure functions from (seed, purpose, position) to randomness.

Nothing here keeps state: the same arguments give the same numbers whatever was drawn before, on whatever
number of processes and in whatever batches. A resumed run is therefore a step number plus tensors.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch


def derive(seed: int, *key: str | int) -> int:
    """Returns a 63-bit seed that depends on every part of ``(seed, *key)``.

    Args:
        seed: The user's ``--seed``.
        key: A purpose (``"noise"``, ``"order"``, ...) followed by positions such as a step, or a class and an index.
    """
    text = "/".join([str(int(seed)), *(str(part) for part in key)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def torch_generator(seed: int, *key: str | int) -> torch.Generator:
    """Returns a CPU generator for ``(seed, *key)``; see `derive`."""
    return torch.Generator().manual_seed(derive(seed, *key))


def numpy_generator(seed: int, *key: str | int) -> np.random.Generator:
    """Returns a numpy generator for ``(seed, *key)``; see `derive`."""
    return np.random.Generator(np.random.Philox(derive(seed, *key)))


@lru_cache(maxsize=4)
def _epoch_order(seed: int, purpose: str, epoch: int, num_items: int) -> np.ndarray:
    return numpy_generator(seed, purpose, epoch).permutation(num_items)


def batch_indices(seed: int, purpose: str, start: int, count: int, num_items: int) -> np.ndarray:
    """Returns which items stand at positions ``start .. start + count - 1`` of an endless shuffled stream.

    Each epoch is one permutation of all items; batches run across epoch borders, so no item is dropped.

    Args:
        seed: The user's ``--seed``.
        purpose: Names the stream; two purposes give unrelated orders.
        start: Position of the first item, counted from the start of training.
        count: How many items.
        num_items: Size of the dataset.

    Returns:
        int64 indices, shape (count,).
    """
    positions = np.arange(start, start + count)
    epochs, offsets = np.divmod(positions, num_items)
    out = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        at = epochs == epoch
        out[at] = _epoch_order(seed, purpose, int(epoch), num_items)[offsets[at]]
    return out
