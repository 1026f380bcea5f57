"""Source: labelled images as they lie on disk, not yet decoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddgen.data.decode import Encoded


class Item(NamedTuple):
    """One image of a source: where it is, for messages, and its encoded content."""

    name: str
    data: Encoded


@dataclass(frozen=True)
class Source:
    """Labelled images on disk.

    Attributes:
        class_names: The order of classes.
        labels: int64 (n,).
        read: Ascending row numbers -> their items, in that order; streams.
        identity: Digest of the files (where, names, sizes, times): changes whenever the images may have.
        where: The folder or file, for messages.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    read: Callable[[np.ndarray], Iterator[Item]]
    identity: str
    where: Path

    def take(self, rows: np.ndarray) -> Source:
        """Returns the source of only these ascending rows."""
        return replace(
            self,
            labels=self.labels[rows],
            read=lambda wanted: self.read(rows[wanted]),
            identity=digest(self.identity, hashlib.sha256(rows.astype(np.int64).tobytes()).hexdigest()),
        )


def digest(*parts: object) -> str:
    """Returns a hex digest of the parts' text."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def files_identity(root: Path, paths: Sequence[Path]) -> str:
    """Digest of where the files are and of their names, sizes and modification times."""
    state = hashlib.sha256(str(root.resolve()).encode("utf-8", "surrogateescape"))
    for path in paths:
        stat = _stat(path)
        line = f"\0{path.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}"
        state.update(line.encode("utf-8", "surrogateescape"))
    return state.hexdigest()[:32]


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        return path.lstat()  # a link to nowhere: listed as a broken image when it is read
