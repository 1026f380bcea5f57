"""Score students trained on a distilled dataset: ``python evaluate.py``."""

from __future__ import annotations

import sys

from ddgen.cli import run


def main(argv: list[str] | None = None) -> int:
    """Runs ``ddgen evaluate`` and returns its exit code."""
    return run("evaluate", argv, prog="evaluate.py")


if __name__ == "__main__":
    sys.exit(main())
