"""From a source of candidates to what each class keeps, on one or more processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ddgen.checkpoint import read_json, write_json
from ddgen.config import SampleConfig
from ddgen.distill.batching import BatchSizes, Budget, memory_of
from ddgen.distill.filling import Key, budget_left, fill, keys_in_turn, missing_keys
from ddgen.distill.pool import KEEP_NAME, CandidatePool, CandidateSource, remove_if_done, short_hash, tidy
from ddgen.distill.progress import LatestCandidates, Watch
from ddgen.distill.streaming import RealScores, Score, SelectedClass, StreamingSelection, no_real_images
from ddgen.errors import UserError
from ddgen.resume import on_main
from ddgen.timing import Clock
from ddgen.together import Halt, together

PREVIEW_NAME, PROBED_NAME = "preview.png", "probed.json"


@dataclass
class SamplingWork:
    """The work of ``sample``: candidates are made, ranked and, but for the kept ones, thrown away.

    Attributes:
        config: Settings.
        source: Makes candidates.
        score: The observer.
        score_settings: What its scores depend on, as JSON values.
        run_dir: Holds the pool.
        accelerator: Device and processes; every one does this.
        clock: Receives the seconds of each stage.
        real: What the observer says of real images, where the rule or its report looks at them.
        num_made: Candidates that this process has made.
        num_ranked: Candidates that it has ranked.
    """

    config: SampleConfig
    source: CandidateSource
    score: Score
    score_settings: dict[str, str]
    run_dir: Path
    accelerator: Accelerator
    clock: Clock
    real: RealScores = no_real_images
    num_made: int = field(default=0, init=False)
    num_ranked: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.settings = self.source.settings()
        self.pool_dir = self.run_dir / "pool" / f"seed{self.config.seed}-{short_hash(self.settings)}"
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        self._mine = range(process, len(self.source.class_names), processes)

    def open(self) -> None:
        """Opens or creates the pool.

        Raises:
            UserError: It is of other settings, or damaged.
        """
        on_main(self.accelerator, self._prepare)
        self.pool = self._open_pool()
        budget = self.config.budget_seconds is not None
        self.selection = StreamingSelection(
            self.pool,
            self.score,
            ipc=self.config.ipc,
            settings={**self.score_settings, "count": self.config.num_candidates},
            rule=self.config.rule,
            factor=self.config.factor,
            real=self.real,
            # What time was spent on is kept until every class is ranked: how much there is decides what each may keep.
            keep_candidates=self._kept() or budget,
            exact=not budget,
        )
        self._budget = budget_left(self.pool, self.config.budget_seconds or 0.0)
        self.halt = Halt(self.pool_dir)
        self.accelerator.wait_for_everyone()  # all have looked before anyone writes

    def probe(self, classes: Sequence[int], count: int, look: Callable[[Tensor, Tensor], None]) -> None:
        """Has the first candidates looked at before the others are made; once for a pool and an observer.

        Args:
            classes: Which classes.
            count: How many candidates of each.
            look: Gets their pixels uint8 (n, 3, h, w) and labels int64 (n,), and raises what is wrong with them.

        Raises:
            Stopped: As `run`.
            UserError: What `look` has found.
        """
        marker = self.pool_dir / PROBED_NAME
        if marker.is_file() and read_json(marker) == self.score_settings:
            return

        def work() -> None:
            keys = [(label, index) for label in classes for index in range(count) if not self.pool.has(label, index)]
            watch = self._watch(len(keys), 0, None, title="First candidates")
            try:
                self._fill(keys, self._budget if self.config.budget_seconds is not None else None, watch.batch)
            finally:
                watch.close()
            if self.halt.called() or not all(self.pool.has(label, count - 1) for label in classes):
                return  # another process has failed, or the time is up
            pixels = torch.cat([self.pool.read(label, torch.arange(count)) for label in classes])
            look(pixels, torch.tensor(classes).repeat_interleave(count))
            write_json(marker, self.score_settings)

        together(self.accelerator, self.halt, work if self.accelerator.is_main_process else lambda: None)
        self.pool.refresh()
        self.accelerator.wait_for_everyone()

    def run(self) -> list[int]:
        """Makes what is missing and ranks it; returns how many candidates each class has had.

        Raises:
            Stopped: SIGTERM or Ctrl-C on any process; what was made is on disk.
            UserError: A mistake that any process has found.
        """
        count = self.config.num_candidates
        if count is not None:
            together(self.accelerator, self.halt, lambda: self._fill_by_count(count))
            return [count] * len(self.pool.class_names)
        together(self.accelerator, self.halt, self._fill_by_time)
        self.pool.refresh()
        counts = self.pool.balanced_counts()
        if not min(counts):
            raise UserError(
                f"--budget_seconds {self.config.budget_seconds:g}: {sum(map(bool, counts)):,} of {len(counts):,}"
                " classes got an image in that time; give more, the same command goes on"
            )
        together(self.accelerator, self.halt, lambda: self._rank(counts))
        return counts

    def gather(self, counts: list[int]) -> list[SelectedClass]:
        """Returns what all classes keep, in label order."""
        return [self.selection.load(label, count) for label, count in enumerate(counts)]

    def finish(self, counts: list[int]) -> str:
        """Deletes what is no longer needed, and says what of the pool is left; "" if nothing is."""
        self.pool.refresh()
        if not self._kept():
            for label, count in enumerate(counts):
                if self.config.budget_seconds is not None or self.pool.num_stored(label) <= count:
                    self.pool.remove(label)
            for path in self.pool.directory.glob("spent-*.json"):
                path.unlink()
            self.selection.remove()
        if remove_if_done(self.pool_dir):
            return ""
        return f"{self.pool_dir}, {self.pool.num_stored():,} candidates, {self.pool.num_bytes() / 1e6:,.1f} MB"

    def _prepare(self) -> None:
        tidy(self.pool_dir)
        Halt(self.pool_dir).clear()
        self._open_pool()
        if self.config.keep_pool:
            (self.pool_dir / KEEP_NAME).touch()

    def _open_pool(self) -> CandidatePool:
        return CandidatePool.open(
            self.pool_dir,
            class_names=self.source.class_names,
            image_size=self.source.image_size,
            seed=self.config.seed,
            settings=self.settings,
        )

    def _kept(self) -> bool:
        return (self.pool_dir / KEEP_NAME).exists()

    def _fill_by_count(self, count: int) -> None:
        done = [label for label in self._mine if self.selection.is_done(label, count)]
        for label in done:
            self.selection.release(label, count)
        pending = deque(label for label in self._mine if label not in set(done))
        missing = list(missing_keys(self.pool, pending, count))
        total = count * len(self._mine)
        watch = self._watch(total, total - len(missing), None)

        def rank_whole_ones() -> None:
            while pending and not self.pool.missing(pending[0], count):
                self._rank_one(pending.popleft(), count)

        def on_batch(labels: Tensor, pixels: Tensor) -> None:
            watch.batch(labels, pixels)
            rank_whole_ones()

        try:
            rank_whole_ones()
            self._fill(missing, None, on_batch)
            rank_whole_ones()
        finally:
            watch.close()

    def _fill_by_time(self) -> None:
        watch = self._watch(None, self.pool.num_stored(), self._budget)
        keys = keys_in_turn(self.pool, self.accelerator.process_index, self.accelerator.num_processes)
        try:
            self._fill(keys, self._budget, watch.batch)
        finally:
            watch.close()

    def _fill(self, keys: Iterable[Key], budget: Budget | None, on_batch: Callable[[Tensor, Tensor], None]) -> None:
        device, here = self.accelerator.device, self.accelerator.num_processes
        self.num_made += fill(
            self.pool,
            self.source,
            keys,
            sizes=BatchSizes(self.config.batch_size_on(device.type), memory_of(device, here)),
            clock=self.clock,
            budget=budget,
            on_batch=on_batch,
            halt=self.halt,
            process_index=self.accelerator.process_index,
        )

    def _rank(self, counts: list[int]) -> None:
        for label in self._mine:
            if self.halt.called():
                return
            if not self.selection.is_done(label, counts[label]):
                self._rank_one(label, counts[label])

    def _rank_one(self, label: int, count: int) -> None:
        with self.clock("ranking"):
            self.selection.rank(label, count)
        self.num_ranked += count

    def _watch(self, total: int | None, done: int, budget: Budget | None, title: str = "") -> Watch:
        processes = self.accelerator.num_processes
        main = self.accelerator.is_main_process
        return Watch(
            num_images=total,
            num_done=done,
            budget=budget,
            clock=self.clock,
            latest=LatestCandidates(self.pool_dir / PREVIEW_NAME, self.pool.class_names) if main else None,
            shown=main,
            title=title or ("Candidates" if processes == 1 else f"Candidates of process 1 of {processes}"),
            first=self.num_made == 0,
        )


def cuda_wait(device: torch.device) -> Callable[[], None]:
    """Returns what waits for everything a device has been given to do."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
