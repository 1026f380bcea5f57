"""Writing so that nothing half-written is ever taken for a whole: temporary name, sync, rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ddgen.errors import UserError

CHECKPOINT_NAME = re.compile(r"^step-(\d{8})$")
LOCK_NAME = ".lock"
_LEFTOVER = re.compile(r"^\..+\.(tmp|old)-.+-\d+$")


@contextlib.contextmanager
def atomic_dir(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling folder that becomes `path` when the block ends without an error.

    Args:
        path: The folder to create.
        replace: Put it in the place of an existing folder, which is moved aside, whole, only once the new one is
            complete, and put back if the exchange fails.

    Raises:
        FileExistsError: `path` exists and `replace` is false.
    """
    if path.exists() and not replace:
        raise FileExistsError(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _own_name(path, "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        if replace and path.exists():
            _exchange(temporary, path)
        else:
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_path(path.parent)


def _exchange(new: Path, path: Path) -> None:
    old = _move_aside(path)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def remove_dir(path: Path) -> None:
    """Deletes a folder; killed halfway, it leaves nothing under the folder's name."""
    shutil.rmtree(_move_aside(path))


def _move_aside(path: Path) -> Path:
    old = _own_name(path, "old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    return old


def _own_name(path: Path, kind: str) -> Path:
    """Returns a hidden sibling that no other process uses, on no other machine that shares the disk."""
    return path.parent / f".{path.name}.{kind}-{platform.node()}-{os.getpid()}"


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _own_name(path, "tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all; numbers that are not finite are refused."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


class DamagedJson(UserError, ValueError):
    """A file that should be JSON is not."""


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote.

    Raises:
        DamagedJson: It was cut off, or edited wrongly.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedJson(f"{path} is damaged, not readable as JSON ({error}); bring back a whole copy") from None


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed processes left half-written directly in a folder, where no other process is writing now."""
    for path in folder.iterdir():
        if _LEFTOVER.match(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_unused(folder: Path) -> bool:
    """Whether a folder does not exist, or holds nothing but what a process killed at its very start left there."""
    return not folder.exists() or all(
        path.name == LOCK_NAME or _LEFTOVER.match(path.name) is not None for path in folder.iterdir()
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process from training in a folder; the lock ends with the process, however that ends.

    Raises:
        UserError: Another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_NAME, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"--output_dir {folder}: another process is training in it; wait for it, or choose another"
                ) from None
            # a file system without locks: nothing that the user could set otherwise
        yield


def checkpoint_step(path: Path) -> int:
    """Returns after how many optimizer steps a checkpoint was written; 0 for what is not named like one."""
    match = CHECKPOINT_NAME.match(path.name)
    return int(match[1]) if match else 0


def latest_checkpoint(checkpoints_dir: Path) -> Path | None:
    """Returns the complete checkpoint of the highest step, or None."""
    found = _checkpoints(checkpoints_dir)
    return found[-1] if found else None


def prune_checkpoints(checkpoints_dir: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints, and what killed runs left unfinished.

    Call it after the newest one is complete, from one process.
    """
    for path in _checkpoints(checkpoints_dir)[: -max(keep, 1)]:
        remove_dir(path)
    for path in checkpoints_dir.glob(".step-*"):
        shutil.rmtree(path)


def checkpoint_dir(checkpoints_dir: Path, step: int) -> Path:
    """Returns the folder of the checkpoint after `step` optimizer steps."""
    return checkpoints_dir / f"step-{step:08d}"


def _checkpoints(checkpoints_dir: Path) -> list[Path]:
    if not checkpoints_dir.is_dir():
        return []
    return sorted(path for path in checkpoints_dir.iterdir() if CHECKPOINT_NAME.match(path.name))


def _sync_tree(root: Path) -> None:
    """Syncs a folder; many files at a time, since a disk syncs them together in little more than the time of one."""
    for folder, _, files in os.walk(root):
        paths = [Path(folder) / name for name in files]
        if len(paths) > 1:
            with ThreadPoolExecutor(16) as threads:
                list(threads.map(_sync_path, paths))
        else:
            for path in paths:
                _sync_path(path)
        _sync_path(Path(folder))


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
