"""SIGTERM and Ctrl-C: a training notes them and saves first; anywhere else they stop the command at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ddgen.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS_OF_ONE_REQUEST = 2.0
"""A launcher passes on the Ctrl-C that the terminal has already sent to every process; both are one request."""


@dataclass
class Noted:
    """The signal that asked a training to stop.

    Attributes:
        number: The first one received, 0 before.
    """

    number: int = 0


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Turns SIGTERM and Ctrl-C into `Stopped`, wherever the program stands."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    with _handled_by(stop):
        yield


@contextmanager
def note_signals() -> Iterator[Noted]:
    """Notes SIGTERM and Ctrl-C, so that a training can save at the next step boundary; a second Ctrl-C does not wait.

    A signal that nobody has acted on when the block ends is sent again, to whoever handles it outside.
    """
    noted, since = Noted(), 0.0

    def note(number: int, _: FrameType | None) -> None:
        nonlocal since
        if not noted.number:
            noted.number, since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - since > SECONDS_OF_ONE_REQUEST:
            raise KeyboardInterrupt

    with _handled_by(note):
        yield noted
    if noted.number:
        signal.raise_signal(noted.number)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
