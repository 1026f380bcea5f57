"""What all tests share: an own cache, one thread, float32, no hub, accelerate's state fresh in every test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from ddgen import precision

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("DDGEN_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def _float32_unless_asked() -> Iterator[None]:
    """So that tests compute the same on processors with and without fast bf16."""
    patch = pytest.MonkeyPatch()
    patch.setattr(precision, "fast_bf16", lambda device: False)
    yield
    patch.undo()


def _forget() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(autouse=True)
def forget_accelerator() -> Iterator[Callable[[], None]]:
    """Accelerate's state is one a process: fresh in every test, and whenever a test calls this."""
    yield _forget
    _forget()
