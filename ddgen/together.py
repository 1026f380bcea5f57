"""Processes that work side by side, none waiting for another, until all are done or one has to stop all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from ddgen.errors import Stopped, UserError

HALT_NAME = "halt"


class Halt:
    """A file by which one process tells the others to stop, where none of them waits for another.

    Args:
        directory: The folder they all write to.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / HALT_NAME

    def clear(self) -> None:
        """Forgets what an earlier run has left; before any process starts to work."""
        self.path.unlink(missing_ok=True)

    def call(self) -> None:
        """Tells the others; where that cannot be written, they go on to their end."""
        with suppress(OSError):
            self.path.touch()

    def called(self) -> bool:
        """Whether a process wants all to stop."""
        return self.path.exists()


def together(accelerator: Accelerator, halt: Halt, work: Callable[[], None]) -> None:
    """Runs work on every process, which has to look at `halt` now and then; returns when all are done.

    Raises:
        UserError: A mistake that any process has found, on all of them; or one of them is gone.
        Stopped: SIGTERM or Ctrl-C on any process, on all of them.
    """
    failed: UserError | Stopped | None = None
    try:
        work()
    except (UserError, Stopped) as error:
        failed = error
        halt.call()
    except BaseException:
        halt.call()
        raise
    try:
        found = [error for error in gather_object([failed]) if error is not None]
    except RuntimeError as error:  # of the connection: a process has crashed, or was killed
        cause = " ".join(str(error).split())[:160]
        raise failed or UserError(f"another process has ended too early; the same command goes on ({cause})") from None
    if found:
        raise found[0]


def claim(path: Path) -> bool:
    """Whether this process is the first to ask for a task, of which the file, in a folder that all see, is the sign."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
