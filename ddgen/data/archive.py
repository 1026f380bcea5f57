"""Archives: unpacking into the cache, and downloading."""

from __future__ import annotations

import contextlib
import errno
import gzip
import lzma
import os
import shutil
import socket
import sys
import tarfile
import tempfile
import urllib.error
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ddgen.checkpoint import atomic_dir
from ddgen.data.source import digest
from ddgen.errors import UserError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_TIMEOUT_SECONDS = 30.0
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    RuntimeError,  # an encrypted zip, or (as NotImplementedError) an unknown compression
)


@dataclass(frozen=True)
class Download:
    """Where a dataset comes from.

    Attributes:
        url: The archive.
        md5: Its checksum, where its publisher or torchvision states one.
    """

    url: str
    md5: str | None

    @property
    def filename(self) -> str:
        """Name of the archive."""
        return self.url.rsplit("/", 1)[1]


def is_archive(path: Path) -> bool:
    """Whether a file is named like an archive that can be unpacked."""
    return path.is_file() and path.name.lower().endswith(ARCHIVE_SUFFIXES)


def unpack(archive: Path, cache_dir: Path) -> Path:
    """Unpacks a zip or tar once and returns the folder; nothing is written outside it.

    Raises:
        UserError: The archive is broken or unsafe, or the disk is too small.
    """
    stat = archive.stat()
    target = cache_dir / "unpacked" / digest(archive.resolve(), stat.st_size, stat.st_mtime_ns)
    if target.is_dir():
        return target
    try:
        extract = _unpack_zip if zipfile.is_zipfile(archive) else _unpack_tar
        publish(target, lambda folder: extract(archive, folder, cache_dir))
    except _BROKEN as error:
        cause = (str(error) or type(error).__name__).splitlines()[0].rstrip(": ")
        raise UserError(f"--data_dir {archive}: cannot be unpacked ({cause}); download it again") from None
    return target


def download(name: str, source: Download, folder: Path) -> Path:
    """Fetches an archive whole or not at all and returns its path.

    Raises:
        UserError: It cannot be fetched: says where it looked and what to put there.
    """
    from torchvision.datasets.utils import download_url

    target = folder / source.filename
    print(f"ddgen: {name} is not in {folder}; downloading {source.url}", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            with contextlib.redirect_stdout(sys.stderr), _timeout(_TIMEOUT_SECONDS):
                download_url(source.url, temporary, source.filename, source.md5)
            os.replace(Path(temporary) / source.filename, target)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        cause = " ".join(str(getattr(error, "reason", None) or error).split())
        raise UserError(
            f"--dataset {name}: not in {folder}, and {source.url} cannot be downloaded ({cause}); "
            f"put {source.filename} there, or give --data_dir"
        ) from None
    return target


class _LostRaceError(Exception):
    """Another process published the same folder first."""


def publish(path: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder that several processes may make at once: the first one stays, the others' go.

    Args:
        path: The folder.
        fill: Writes its content into the temporary folder it is given.

    Raises:
        UserError: The folder cannot be written.
    """
    try:
        with atomic_dir(path) as temporary:
            fill(temporary)
            if path.exists():
                raise _LostRaceError
    except _LostRaceError:
        return
    except OSError as error:
        if path.is_dir():
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"--cache_dir {path.parent}: the disk is full; free some or choose another") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"--cache_dir {path.parent}: {error.strerror}; choose a folder you can write") from None
        raise


def check_free_space(folder: Path, num_bytes: int, what: str, setting: str = "--cache_dir") -> None:
    """Refuses to start what will not fit on the disk.

    Raises:
        UserError: Less than `num_bytes` are free where `folder` is, or will be.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(
            f"{setting} {folder}: {what} takes {num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            "free some or choose another folder"
        )


def _unpack_zip(archive: Path, folder: Path, cache_dir: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        check_free_space(cache_dir, sum(item.file_size for item in file.infolist()), f"unpacking {archive.name}")
        file.extractall(folder)  # drops drive letters, leading slashes and `..` by itself


def _unpack_tar(archive: Path, folder: Path, cache_dir: Path) -> None:
    # A tar's contents are only known at its end; images hardly compress, so its own size is a fair guess.
    check_free_space(cache_dir, int(1.2 * archive.stat().st_size), f"unpacking {archive.name}")
    folder = folder.resolve()
    with tarfile.open(archive) as file:
        for member in file:  # `extractall(filter="data")` would do, but Python 3.11.2, Debian's, does not know it
            target = (folder / member.name.lstrip("/")).resolve()
            if not target.is_relative_to(folder):
                raise tarfile.TarError(f"{member.name} leads out of it")
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            try:
                content = file.extractfile(member)  # of a link, what it leads to in the archive
            except KeyError:
                content = None
            if content is None:
                raise UserError(
                    f"--data_dir {archive}: {member.name} is neither a file, nor a folder, nor a link to a file in it;"
                    " unpack it yourself and give the folder"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, open(target, "wb") as copy:
                shutil.copyfileobj(content, copy)


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
