"""What a user sees when something is wrong: one line naming the setting, its value and the cure."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a setting or in the input; entry points print it on one line and exit with code 2."""


class Stopped(BaseException):
    """SIGTERM or Ctrl-C, on its way to the entry point, which exits with code 128 + `signal_number`.

    No `Exception`, so that a library that carries on after any exception does not swallow it.

    Attributes:
        signal_number: The signal that asked.
    """

    def __init__(self, signal_number: int, message: str = "stopped; the same command goes on") -> None:
        super().__init__(signal_number, message)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return str(self.args[1])
