"""Entry points: parse the settings, call the command, turn what went wrong into one line and an exit code.

Heavy libraries are imported after parsing, so ``--help`` and a mistyped flag answer at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from ddgen.config import (
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    LabelConfig,
    ReportConfig,
    SampleConfig,
    TrainConfig,
    TrainObserverConfig,
    parse,
)
from ddgen.errors import Stopped, UserError
from ddgen.launch import close_connection, start_asked_for_processes, stop_with_launcher

COMMANDS: dict[str, tuple[type, str, str]] = {
    "train": (TrainConfig, "train:train", "train the observer, the autoencoder and the diffusion model"),
    "observer": (TrainObserverConfig, "train:train_observer_alone", "train an observer alone"),
    "sample": (SampleConfig, "sample:sample", "generate candidates, keep the best, relabel them"),
    "distill": (
        DistillConfig,
        "distill:distill",
        "crop real images, keep the best crops, relabel them (RDED)",
    ),
    "label": (LabelConfig, "label:label", "store the observer's labels of augmented views beside a distilled dataset"),
    "evaluate": (EvaluateConfig, "evaluate:evaluate", "score students trained on a distilled dataset on real images"),
    "report": (ReportConfig, "report:report", "write a run's report, one HTML page"),
    "export": (ExportConfig, "export:export", "write a distilled dataset in the format of a challenge or benchmark"),
}
"""Name -> settings, where the function is in ddgen.commands, and what it does."""


def run(command: str, argv: list[str] | None = None, prog: str | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for a mistake of the user's, 130 or 143 when stopped."""
    try:
        config: Any = parse(COMMANDS[command][0], argv, prog or f"ddgen {command}")
        if argv is None:
            stop_with_launcher()
            start_asked_for_processes()
        code = _command(command)(config)
        if argv is None:
            close_connection()
        return code
    except UserError as error:
        return _complain(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(UserError(f"{where}{error.strerror or error}"))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``ddgen`` and ``python -m ddgen``: the first argument names the command."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print("usage: ddgen COMMAND [settings]   (ddgen COMMAND --help lists the settings)\n")
        for name, (*_, text) in COMMANDS.items():
            print(f"  {name:<10}{text}")
        return 0 if args else 2
    if args[0] not in COMMANDS:
        return _complain(UserError(f"{args[0]}: unknown command; one of {', '.join(COMMANDS)}"))
    try:
        if argv is None:
            stop_with_launcher()
            start_asked_for_processes()
    except UserError as error:
        return _complain(error)
    code = run(args[0], args[1:])
    if argv is None:
        close_connection()
    return code


def _command(name: str) -> Callable[[Any], int]:
    """Imports one command, and with it only what that command needs."""
    module, function = COMMANDS[name][1].split(":")
    command: Callable[[Any], int] = getattr(importlib.import_module(f"ddgen.commands.{module}"), function)
    return command


def _complain(error: UserError) -> int:
    rank = int(os.environ.get("RANK", "0"))
    name = f"ddgen (process {rank})" if rank else "ddgen"  # a mistake that only one process sees must not be silent
    print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
