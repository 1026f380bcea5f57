"""Randomness as a function of (seed, purpose, position)."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from ddgen import seeds

DERIVED = 5858681329433569406
PERMUTATION = [1, 5, 4, 2, 0, 3]


def test_every_part_of_the_key_matters_and_nothing_else() -> None:
    keys: list[tuple[int, tuple[str | int, ...]]] = [
        (0, ("noise", 0)),
        (1, ("noise", 0)),
        (0, ("order", 0)),
        (0, ("noise", 1)),
        (0, ("noise", 0, 0)),
        (0, ("noise",)),
    ]
    derived = [seeds.derive(seed, *key) for seed, key in keys]
    assert len(set(derived)) == len(keys)
    assert all(0 <= value < 2**63 for value in derived)
    assert seeds.derive(3, "x", 7) == seeds.derive(3, "x", 7) == seeds.derive(np.int64(3), "x", np.int64(7))  # type: ignore[arg-type]


def test_values_never_change() -> None:
    """A changed value would silently change every resumed run and every published seed."""
    assert seeds.derive(0, "noise", 0) == DERIVED
    assert seeds.numpy_generator(0, "order", 0).permutation(6).tolist() == PERMUTATION


def test_generators_do_not_share_state() -> None:
    first = torch.randn(3, generator=seeds.torch_generator(0, "noise", 5))
    torch.randn(100, generator=seeds.torch_generator(0, "noise", 6))
    assert torch.equal(first, torch.randn(3, generator=seeds.torch_generator(0, "noise", 5)))
    one, other = seeds.numpy_generator(0, "a").random(3), seeds.numpy_generator(0, "b").random(3)
    assert not np.array_equal(one, other)


def test_the_stream_does_not_depend_on_the_batches() -> None:
    whole = seeds.batch_indices(0, "train", 0, 35, 10)
    pieces = [seeds.batch_indices(0, "train", start, 7, 10) for start in range(0, 35, 7)]
    assert np.array_equal(whole, np.concatenate(pieces))
    assert np.array_equal(seeds.batch_indices(0, "train", 23, 5, 10), whole[23:28])


def test_every_epoch_is_another_permutation() -> None:
    epochs = seeds.batch_indices(0, "train", 0, 40, 10).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(epochs, 2))
    assert not np.array_equal(epochs[0], seeds.batch_indices(0, "other", 0, 10, 10))
