"""Make a distilled dataset from a finished run: ``python sample.py --ipc 10``."""

from __future__ import annotations

import sys

from ddgen.cli import run


def main(argv: list[str] | None = None) -> int:
    """Runs ``ddgen sample`` and returns its exit code."""
    return run("sample", argv, prog="sample.py")


if __name__ == "__main__":
    sys.exit(main())
