"""The packed cache: every image of a split decoded once, as one memory-mapped uint8 array."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from ddgen.checkpoint import read_json, write_bytes, write_json
from ddgen.data.archive import check_free_space, publish
from ddgen.data.decode import BadImageError, decode_image
from ddgen.data.source import Item, Source, digest
from ddgen.errors import UserError

PACK_VERSION = 1
"""Raise it when decoding changes, so that older caches are not taken."""
_CHUNK = 64
_LISTED = 20
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


@dataclass(frozen=True)
class Packed:
    """A packed split.

    Attributes:
        pixels: uint8 (n, 3, h, w), memory-mapped copy-on-write.
        labels: int64 (n,).
        meta: fingerprint, class_names, skipped, bad (a list of class, name and cause), ...
    """

    pixels: np.ndarray
    labels: np.ndarray
    meta: dict[str, Any]


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be read."""

    label: int
    name: str
    cause: str


def pack(
    source: Source, image_size: int, cache_dir: Path, *, title: str, skip_bad_images: bool, progress: bool
) -> Packed:
    """Decodes a source into the cache, or opens what is there already.

    Args:
        source: The images.
        image_size: Side of the packed images in pixels.
        cache_dir: The cache.
        title: Name of dataset and split, for the bar and for messages.
        skip_bad_images: Leave unreadable images out instead of stopping.
        progress: Whether to show a bar.

    Raises:
        UserError: Unreadable images, too little disk, or a class left without images.
    """
    key = digest(PACK_VERSION, source.identity, image_size, json.dumps(source.class_names), title)
    folder = cache_dir / "packed" / key
    if not (folder / "meta.json").is_file():
        num_bytes = len(source.labels) * (3 * image_size**2 + 8)
        check_free_space(cache_dir, int(1.02 * num_bytes) + 2**20, f"packing {title}")

        def fill(temporary: Path) -> None:
            bad = _write(temporary, source, image_size, title, progress)
            if bad and not skip_bad_images:
                _refuse(bad, source, cache_dir, key)
            _check_no_class_lost(source, bad)

        publish(folder, fill)
    packed = _open(folder)
    bad = [BadImage(*item) for item in packed.meta["bad"]]
    if bad and not skip_bad_images:
        _refuse(bad, source, cache_dir, key)
    return packed


def _write(folder: Path, source: Source, image_size: int, title: str, progress: bool) -> list[BadImage]:
    """Writes pixels.npy, labels.npy and meta.json; returns what cannot be read."""
    with open(folder / "pixels.npy", "wb") as file:
        state, bad_rows = _write_pixels(file, source, image_size, title, progress)
    bad = [BadImage(int(source.labels[row]), name, cause) for row, (name, cause) in bad_rows.items()]
    labels = np.delete(source.labels, list(bad_rows))
    np.save(folder / "labels.npy", labels)
    meta = {
        "title": title,
        "fingerprint": _fingerprint(state, labels, image_size, source.class_names),
        "class_names": list(source.class_names),
        "skipped": _count_by_class(bad, source.class_names),
        "bad": [[item.label, item.name, item.cause] for item in bad],
        "version": PACK_VERSION,
    }
    write_json(folder / "meta.json", meta)
    return bad


def _write_pixels(
    file: IO[bytes], source: Source, image_size: int, title: str, progress: bool
) -> tuple[Any, dict[int, tuple[str, str]]]:
    """Streams the decoded images into a .npy file; returns their hash and row -> (name, cause) of those it lacks."""
    total, row = len(source.labels), 0
    state, bad = hashlib.sha256(), dict[int, tuple[str, str]]()
    _write_header(file, total, image_size)
    with tqdm(total=total, desc=f"decoding {title}", unit="img", mininterval=0.5, disable=not progress) as bar:
        for results in decode_all(source.read(np.arange(total)), image_size):
            for result in results:
                if isinstance(result, np.ndarray):
                    state.update(result.tobytes())
                    file.write(result.tobytes())
                else:
                    bad[row] = result
                row += 1
            bar.update(len(results))
    if row != total:
        raise UserError(f"--data_dir {source.where}: changed while it was read ({row} of {total} images); run again")
    _write_header(file, total - len(bad), image_size)
    file.flush()
    os.fsync(file.fileno())
    return state, bad


def decode_all(items: Iterable[Item], image_size: int) -> Iterator[list[np.ndarray | tuple[str, str]]]:
    """Decodes a stream of items in threads, in order, a bounded number of chunks ahead.

    Yields:
        Chunks of results: uint8 (3, image_size, image_size), or (name, cause) of an image that cannot be read.
    """
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 32)
    stream, pending = iter(items), deque[Future[list[np.ndarray | tuple[str, str]]]]()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        while True:
            while len(pending) < 2 * workers and (chunk := list(islice(stream, _CHUNK))):
                pending.append(pool.submit(_decode_chunk, chunk, image_size))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_chunk(chunk: list[Item], image_size: int) -> list[np.ndarray | tuple[str, str]]:
    results: list[np.ndarray | tuple[str, str]] = []
    for item in chunk:
        try:
            results.append(decode_image(item.data, image_size))
        except BadImageError as error:
            results.append((item.name, str(error)))
    return results


def _write_header(file: IO[bytes], num_images: int, image_size: int) -> None:
    # numpy leaves room in the header for a longer first dimension, so that it can be written again in place.
    file.seek(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, 3, image_size, image_size)}
    np.lib.format.write_array_header_1_0(file, header)


def _fingerprint(pixels_state: Any, labels: np.ndarray, image_size: int, class_names: Sequence[str]) -> str:
    state = pixels_state.copy()
    state.update(labels.astype("<i8").tobytes())
    state.update(json.dumps([image_size, list(class_names)]).encode())
    return str(state.hexdigest()[:32])


def _open(folder: Path) -> Packed:
    meta = read_json(folder / "meta.json")
    return Packed(map_array(folder / "pixels.npy"), np.load(folder / "labels.npy"), meta)


def map_array(path: Path) -> np.ndarray:
    """Memory-maps a .npy file copy-on-write, without reserving memory for the copy, whatever its size."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
        flags, access = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=access)
    return np.frombuffer(mapped, dtype=dtype, count=int(np.prod(shape)), offset=offset).reshape(shape)


def _refuse(bad: list[BadImage], source: Source, cache_dir: Path, key: str) -> None:
    listing = cache_dir / "bad_images" / f"{key}.txt"
    lines = [f"{item.name}\t{source.class_names[item.label]}\t{item.cause}\n" for item in bad]
    write_bytes(listing, "".join(lines).encode("utf-8", "surrogateescape"))
    shown = "; ".join(f"{item.name} ({item.cause})" for item in bad[:_LISTED])
    more = f"; and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    raise UserError(
        f"--data_dir {source.where}: {len(bad)} of {len(source.labels)} images cannot be read: {shown}{more}; "
        f"all are listed in {listing}; repair or remove them, or give --skip_bad_images"
    )


def _count_by_class(bad: list[BadImage], class_names: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in bad:
        counts[class_names[item.label]] = counts.get(class_names[item.label], 0) + 1
    return counts


def _check_no_class_lost(source: Source, bad: list[BadImage]) -> None:
    left = np.bincount(source.labels, minlength=len(source.class_names))
    for item in bad:
        left[item.label] -= 1
        if not left[item.label]:
            name = source.class_names[item.label]
            raise UserError(f"--skip_bad_images: no readable image is left of class {name} in {source.where}")
