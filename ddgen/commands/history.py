"""history.jsonl in a run folder: what was started there, on what computer, and how long every stage took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ddgen.checkpoint import write_bytes
from ddgen.commands.runs import command_line
from ddgen.distill.dataset import versions
from ddgen.hardware import device_name
from ddgen.launch import num_cores
from ddgen.page.run import HISTORY_NAME


def made_with(accelerator: Accelerator, precision: str) -> dict[str, Any]:
    """Returns what a time means nothing without: the device, what of it was used, and in which numbers.

    Args:
        accelerator: Device and processes.
        precision: Resolved.
    """
    return {
        "device": device_name(accelerator.device),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "precision": precision,
    }


class History:
    """Adds lines to history.jsonl: one as work starts, one as each stage ends, one as all is done.

    A run may be stopped and gone on with, so there may be several of each. Only the main process writes.

    Args:
        folder: The run folder.
        accelerator: Device and processes.
        precision: Resolved.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, precision: str) -> None:
        self.path, self.accelerator, self.precision = folder / HISTORY_NAME, accelerator, precision

    def start(self) -> None:
        """Writes what was started, where and with what; call it when the folder is this process's own."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        machine = made_with(self.accelerator, self.precision)
        self._add({"event": "start", "at": at, "command": command_line(), "made_with": machine, "versions": versions()})

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a stage; one that is interrupted is written too, as not done, where the disk takes it.

        What interrupted it, a full disk for instance, is what the user has to see.
        """
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            with suppress(OSError):
                self.add_stage(name, time.perf_counter() - started, done=False)
            raise
        self.add_stage(name, time.perf_counter() - started)

    def add_stage(self, name: str, seconds: float, *, done: bool = True) -> None:
        """Writes a stage that was measured already."""
        self._add({"event": "stage", "stage": name, "seconds": seconds, "done": done})

    def finish(self) -> None:
        """Writes that this process got to the end; a start without it was stopped or killed."""
        self._add({"event": "finish"})

    def _add(self, line: dict[str, Any]) -> None:
        """Writes all lines anew: one that a killed process left half-written would make the file unreadable."""
        if not self.accelerator.is_main_process:
            return
        before = self.path.read_bytes() if self.path.is_file() else b""
        write_bytes(self.path, before + json.dumps(line, allow_nan=False).encode() + b"\n")
