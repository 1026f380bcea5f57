"""What a person sees while candidates are made: a bar, the time to the first image, a picture of the latest ones."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddgen.checkpoint import write_bytes
from ddgen.distill.batching import Budget
from ddgen.distill.preview import draw_candidates, thumbnail
from ddgen.timing import Clock

ROWS, COLUMNS = 12, 8
SECONDS_BETWEEN_PICTURES = 10.0


class LatestCandidates:
    """A picture of the latest candidates, drawn anew every ten seconds, and for each of the first classes.

    Args:
        path: The file.
        class_names: In label order.
        now: The time in seconds.
    """

    def __init__(self, path: Path, class_names: Sequence[str], now: Callable[[], float] = time.monotonic) -> None:
        self.path, self.class_names, self.now = path, class_names, now
        self._rows: dict[int, deque[Image.Image]] = {}  # the class of the latest candidate is the last
        self._seen: set[int] = set()
        self._drawn_at = -SECONDS_BETWEEN_PICTURES
        self._stale = False

    def add(self, labels: Tensor, pixels: Tensor) -> None:
        """Takes a batch: labels int64 (b,), pixels uint8 (b, 3, h, w)."""
        in_batch = labels.tolist()
        for label in list(dict.fromkeys(in_batch))[-ROWS:]:
            row = self._rows.pop(label, deque(maxlen=COLUMNS))
            own = [position for position, other in enumerate(in_batch) if other == label]
            row.extend(thumbnail(pixels[position]) for position in own[-COLUMNS:])
            self._rows[label] = row
        while len(self._rows) > ROWS:
            del self._rows[next(iter(self._rows))]
        new = len(self._seen) < ROWS and not self._seen.issuperset(in_batch)
        self._seen.update(in_batch)
        self._stale = True
        if new or self.now() - self._drawn_at >= SECONDS_BETWEEN_PICTURES:
            self.draw()

    def draw(self) -> None:
        """Writes the picture, if there is something new to see."""
        if not self._stale:
            return
        rows = [(self.class_names[label], list(row)) for label, row in sorted(self._rows.items())]
        title = f"The latest candidates of {len(rows)} of {len(self.class_names)} classes"
        buffer = io.BytesIO()
        draw_candidates(rows, title).save(buffer, format="PNG", compress_level=1)
        write_bytes(self.path, buffer.getvalue())
        self._drawn_at, self._stale = self.now(), False


class Watch:
    """Progress of sampling.

    Args:
        num_images: Images this process is to make; None if time decides.
        num_done: How many of them are there already.
        budget: The time it has, if time decides.
        clock: Says how long each stage took.
        latest: The picture; None for none.
        shown: Whether anything is shown.
        title: Stands before the bar.
        first: Whether no image has been made before.
    """

    def __init__(
        self,
        *,
        num_images: int | None,
        num_done: int = 0,
        budget: Budget | None = None,
        clock: Clock,
        latest: LatestCandidates | None = None,
        shown: bool = True,
        title: str = "Candidates",
        first: bool = True,
    ) -> None:
        self.clock, self.budget, self.latest, self.shown, self.first = clock, budget, latest, shown, first
        self.num_made = 0
        self.bar = tqdm(total=num_images, initial=num_done, unit="image", desc=title, disable=not shown, smoothing=0.1)

    def batch(self, labels: Tensor, pixels: Tensor) -> None:
        """Takes a batch that was made: labels int64 (b,), pixels uint8 (b, 3, h, w)."""
        if self.shown and self.first and not self.num_made:
            tqdm.write(f"first image after {seconds_since_start():.1f} s")
        self.num_made += len(labels)
        left = f"{max(0.0, self.budget.seconds - self.budget.spent):,.0f} s left, " if self.budget else ""
        self.bar.set_postfix_str(left + self.clock.shares(without="loading"), refresh=False)
        self.bar.update(len(labels))
        if self.latest is not None:
            self.latest.add(labels, pixels)

    def close(self) -> None:
        """Draws what is new and ends the bar."""
        if self.latest is not None:
            self.latest.draw()
        self.bar.close()


def seconds_since_start() -> float:
    """Returns the age of this process: what passed since the command was given."""
    return max(0.0, time.time() - psutil.Process().create_time())
