"""Filling a candidate pool: which candidates come next, sampling them, and storing them meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ddgen.checkpoint import read_json, write_json
from ddgen.distill.batching import BatchSizes, Budget
from ddgen.distill.pool import CandidatePool, CandidateSource
from ddgen.errors import Stopped, UserError
from ddgen.resume import full_disk_explained
from ddgen.stopping import note_signals
from ddgen.timing import Clock
from ddgen.together import Halt

Key = tuple[int, int]
"""Class and index of a candidate."""
WAITING = 2
"""Batches that may wait to be stored while the next is sampled."""
SPENT = ("seconds", "seconds_per_image")


def missing_keys(pool: CandidatePool, labels: Iterable[int], count: int) -> Iterator[Key]:
    """Yields the candidates ``0 .. count - 1`` that classes lack, class by class."""
    for label in labels:
        yield from ((label, index) for index in pool.missing(label, count))


def keys_in_turn(pool: CandidatePool, process_index: int = 0, num_processes: int = 1) -> Iterator[Key]:
    """Yields what is missing of index 0 of all classes, then of index 1, and so on without an end.

    Processes take turns, so that a round is done at about the same time everywhere.
    """
    num_classes, number = len(pool.class_names), process_index
    while True:
        index, label = divmod(number, num_classes)
        if not pool.has(label, index):
            yield label, index
        number += num_processes


class _Storing:
    """Stores batches in the background, at most `WAITING` at a time; what fails there is raised here."""

    def __init__(self, store: Callable[..., None]) -> None:
        self.store = store
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="storing")
        self.waiting: deque[Future[None]] = deque()

    def put(self, *batch: Any) -> None:
        while len(self.waiting) >= WAITING:
            self.waiting.popleft().result()
        self.waiting.append(self.thread.submit(self.store, *batch))

    def __enter__(self) -> _Storing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.thread.shutdown(wait=True)
        while self.waiting:
            future = self.waiting.popleft()
            if kind is None or issubclass(kind, Stopped):  # otherwise the first error is the one to be told
                future.result()


def fill(
    pool: CandidatePool,
    source: CandidateSource,
    keys: Iterable[Key],
    *,
    sizes: BatchSizes,
    clock: Clock,
    budget: Budget | None = None,
    on_batch: Callable[[Tensor, Tensor], None] = lambda labels, pixels: None,
    halt: Halt | None = None,
    process_index: int = 0,
) -> int:
    """Samples candidates and stores them, until there are no more keys, or the time is up, or someone stops it.

    Args:
        pool: Receives them.
        source: Makes them.
        keys: Which ones, in order.
        sizes: How many at a time.
        clock: Receives the seconds of "sampling" and "decoding".
        budget: Seconds for it; None has no limit.
        on_batch: Called with labels (b,) and pixels (b, 3, h, w) of every batch when it is on its way to the disk.
        halt: By which other processes can stop this one.
        process_index: This process's number, under which it notes what it spent of the budget.

    Returns:
        How many images were made.

    Raises:
        Stopped: SIGTERM or Ctrl-C; what was sampled is stored.
        UserError: A single image does not fit into memory, or the disk is full.
    """

    def store(labels: Tensor, indices: Tensor, pixels: Tensor, spent: dict[str, float] | None) -> None:
        with full_disk_explained(pool.directory, pixels.nbytes):
            pool.store(labels, indices, pixels)
            if spent is not None:
                write_json(pool.directory / f"spent-{process_index}.json", spent)

    made, keys = 0, iter(keys)
    with note_signals() as noted, _Storing(store) as storing:
        while not (halt and halt.called()):
            batch = list(islice(keys, sizes.size))
            if not batch or (budget and not budget.allows(len(batch))):
                break
            labels, indices = torch.tensor(batch).unbind(1)
            pixels = _sample(pool, source, labels, indices, sizes, clock, budget)
            if pixels is None:
                sizes.failed(len(batch))
                keys = chain(batch, keys)
                continue
            storing.put(labels, indices, pixels, _facts(budget) if budget else None)
            made += len(batch)
            on_batch(labels, pixels)
            if noted.number:
                raise Stopped(noted.number, f"stopped after {made:,} more images; the same command goes on")
    return made


def budget_left(pool: CandidatePool, seconds: float) -> Budget:
    """Returns a budget of which earlier runs have spent a part: each process spends all, so as much as any did.

    Raises:
        UserError: What they spent cannot be read.
    """
    try:
        facts = [read_json(path) for path in pool.directory.glob("spent-*.json")]
        spent, per_image = (max((float(fact[name]) for fact in facts), default=0.0) for name in SPENT)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"pool {pool.directory}: a spent-*.json is damaged; delete it and sample again") from None
    return Budget(seconds, spent, per_image)


def _facts(budget: Budget) -> dict[str, float]:
    return dict(zip(SPENT, (budget.spent, budget.seconds_per_image), strict=True))


def _sample(
    pool: CandidatePool,
    source: CandidateSource,
    labels: Tensor,
    indices: Tensor,
    sizes: BatchSizes,
    clock: Clock,
    budget: Budget | None,
) -> Tensor | None:
    """Samples a batch; None if it does not fit into memory, which takes time from the budget all the same."""
    sizes.before()
    start = clock.now()
    try:
        pixels = source.sample(labels, indices, pool.seed, timed=clock)
    except torch.OutOfMemoryError:
        pixels = None
    seconds = clock.now() - start
    if budget:
        budget.spend(0 if pixels is None else len(labels), seconds)
    if pixels is not None:
        sizes.after(len(labels), seconds)
    return pixels
