"""What all parts of the page use: tables, lists, and words for what nobody recorded."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

MISSING = "not recorded"


def table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Returns a markdown table."""
    lines = [heads, ["---"] * len(heads), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def join(values: Iterable[object]) -> str:
    """Returns the different values, in order, with commas."""
    return ", ".join(MISSING if value is None else str(value) for value in dict.fromkeys(values))


def first(*values: Any) -> Any:
    """Returns the first that is not None."""
    return next((value for value in values if value is not None), None)


def count(number: int, what: str) -> str:
    """Returns ``1 epoch`` or ``30 epochs``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def shorten(command: str) -> str:
    """Replaces a command's absolute paths by their last names: where a disk is mounted is nobody's business."""
    return shlex.join(map(shorten_path, shlex.split(command)))


def shorten_path(word: str) -> str:
    """Replaces an absolute path, alone or after ``--setting=``, by its last name."""
    return re.sub(r"^(--\w+=)?/(?:.*/)?([^/]+)/?$", r"\1/path/to/\2", word)
