"""The candidate pool: generated images on disk, from which the distilled dataset is chosen.

Every image is named by (seed, class, index) and depends on nothing else, so a pool can be filled by any number of
processes, interrupted, continued and enlarged; a larger pool contains the smaller one.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ddgen.checkpoint import is_unused, read_json, remove_dir, remove_leftovers, write_bytes, write_json
from ddgen.errors import UserError
from ddgen.timing import Timed, untimed

KEEP_NAME = "keep"


class CandidateSource(Protocol):
    """What emits candidates: our own generator, or a foreign one."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in label order."""
        ...

    @property
    def image_size(self) -> int:
        """Side of the emitted images in pixels."""
        ...

    def sample(self, labels: Tensor, indices: Tensor, seed: int, *, timed: Timed = untimed) -> Tensor:
        """Generates one image for every (class, index), which decide it together with the seed.

        Args:
            labels: int64 (b,).
            indices: int64 (b,), which image of the class.
            seed: Of the pool.
            timed: Put around the stages "sampling" and "decoding".

        Returns:
            Pixels, uint8 (b, 3, h, w), on the CPU.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """Returns everything else that an image depends on, as JSON values."""
        ...

    def describe(self) -> dict[str, str]:
        """Returns rows for the distilled dataset's card."""
        ...


class _Place(NamedTuple):
    path: Path
    row: int


class CandidatePool:
    """A folder of candidates; make one with `CandidatePool.open`.

    ``pool.json`` says what the candidates are. Each file of ``candidates/`` holds what was sampled together: `pixels`
    uint8 (b, 3, h, w), `label` and `index` int64 (b,), and a checksum of every image; its name is its first image.

    Attributes:
        directory: The folder.
        class_names: In label order.
        image_size: Side of the images in pixels.
        seed: Of the candidates.
    """

    def __init__(self, directory: Path, class_names: Sequence[str], image_size: int, seed: int, identity: str) -> None:
        self.directory, self.class_names = directory, tuple(class_names)
        self.image_size, self.seed = image_size, seed
        self._metadata = {"pool": identity}
        self.refresh()

    @classmethod
    def open(
        cls, directory: Path, *, class_names: Sequence[str], image_size: int, seed: int, settings: Mapping[str, Any]
    ) -> CandidatePool:
        """Opens a pool, or creates it.

        Args:
            directory: The pool's folder.
            class_names: Names of the source's classes, in its order.
            image_size: Side of the images in pixels.
            seed: Seed of the candidates.
            settings: Everything else an image depends on; see `CandidateSource.settings`.

        Raises:
            UserError: The folder holds candidates of other classes, seed or settings, or damaged ones.
        """
        wanted = {"class_names": list(class_names), "image_size": image_size, "seed": seed, **settings}
        wanted = json.loads(json.dumps(wanted))
        header = directory / "pool.json"
        if header.is_file():
            _check_same(directory, read_json(header), wanted)
        else:
            write_json(header, wanted)
        return cls(directory, class_names, image_size, seed, short_hash(wanted))

    def refresh(self) -> None:
        """Looks at what is on disk, which other processes may have written."""
        self._places: list[dict[int, _Place]] = [{} for _ in self.class_names]
        self._labels_in: dict[Path, set[int]] = {}
        folder = self.directory / "candidates"
        for path in sorted(folder.glob("[0-9]*.safetensors")) if folder.is_dir() else ():
            self._enter(path, *self._keys(path))

    def has(self, class_index: int, index: int) -> bool:
        """Whether a candidate is on disk."""
        return index in self._places[class_index]

    def missing(self, class_index: int, count: int) -> list[int]:
        """Returns which of the candidates ``0 .. count - 1`` of a class are not on disk yet."""
        return [index for index in range(count) if index not in self._places[class_index]]

    def num_stored(self, class_index: int | None = None) -> int:
        """Returns how many candidates of a class, or of all classes, are on disk."""
        return sum(map(len, self._places)) if class_index is None else len(self._places[class_index])

    def num_bytes(self) -> int:
        """Returns the size of the candidates on disk."""
        return sum(path.stat().st_size for path in self._labels_in)

    def balanced_counts(self) -> list[int]:
        """Returns how many candidates of each class to use so that no two classes differ by more than one.

        Candidates of a class count from index 0 to the first one that is missing.
        """
        counts = []
        for places in self._places:
            counts.append(next(index for index in range(len(places) + 1) if index not in places))
        return [min(count, min(counts) + 1) for count in counts]

    def store(self, labels: Tensor, indices: Tensor, pixels: Tensor) -> None:
        """Writes candidates, all or none of them.

        Args:
            labels: int64 (b,).
            indices: int64 (b,).
            pixels: uint8 (b, 3, h, w).
        """
        expected = (len(labels), 3, self.image_size, self.image_size)
        if pixels.dtype != torch.uint8 or tuple(pixels.shape) != expected:
            raise ValueError(f"expected uint8 {expected} from the sampler, got {pixels.dtype} {tuple(pixels.shape)}")
        pixels, keys = pixels.cpu().contiguous(), list(zip(labels.tolist(), indices.tolist(), strict=True))
        sums = [_checksum(key, image) for key, image in zip(keys, pixels, strict=True)]
        tensors = {"pixels": pixels, "label": labels, "index": indices, "checksum": torch.tensor(sums)}
        path = self._path(*keys[0])
        write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, self._metadata))
        self._enter(path, [label for label, _ in keys], [index for _, index in keys])

    def read(self, class_index: int, indices: Tensor) -> Tensor:
        """Reads candidates of one class.

        Args:
            class_index: The class.
            indices: int64 (m,), which ones.

        Returns:
            Pixels uint8 (m, 3, h, w), in the order of `indices`.

        Raises:
            UserError: A candidate is missing, or its file was damaged or exchanged.
        """
        pixels = torch.empty(len(indices), 3, self.image_size, self.image_size, dtype=torch.uint8)
        wanted: dict[Path, list[tuple[int, int, int]]] = {}  # position here, row there, index
        for position, index in enumerate(indices.tolist()):
            place = self._places[class_index].get(index)
            if place is None:
                name = self.class_names[class_index]
                raise UserError(f"pool {self.directory}: candidate {index} of {name!r} is missing; sample again")
            wanted.setdefault(place.path, []).append((position, place.row, index))
        for path, entries in wanted.items():
            try:
                self._read_rows(path, class_index, entries, pixels)
            except Exception as error:  # safetensors raises its own type, and OSError
                raise self._damaged(path, error) from None
        return pixels

    def remove(self, class_index: int) -> None:
        """Forgets the candidates of a class, and deletes the files that hold no other's."""
        for path in {place.path for place in self._places[class_index].values()}:
            self._labels_in[path].discard(class_index)
            if not self._labels_in[path]:
                path.unlink(missing_ok=True)
                del self._labels_in[path]
        self._places[class_index] = {}

    def _path(self, label: int, index: int) -> Path:
        return self.directory / "candidates" / f"{label:05d}-{index:08d}.safetensors"

    def _enter(self, path: Path, labels: list[int], indices: list[int]) -> None:
        self._labels_in[path] = set(labels)
        for row, (label, index) in enumerate(zip(labels, indices, strict=True)):
            self._places[label][index] = _Place(path, row)

    def _keys(self, path: Path) -> tuple[list[int], list[int]]:
        """Returns labels and indices of a file's images."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                labels, indices = file.get_tensor("label").tolist(), file.get_tensor("index").tolist()
            if metadata != self._metadata or self._path(labels[0], indices[0]) != path:
                raise ValueError("it is another pool's, or was renamed")
            if not set(labels) <= set(range(len(self.class_names))):
                raise ValueError("it names classes that do not exist")
        except Exception as error:  # safetensors raises its own type, and OSError
            raise self._damaged(path, error) from None
        return labels, indices

    def _read_rows(self, path: Path, label: int, entries: list[tuple[int, int, int]], out: Tensor) -> None:
        with safe_open(path, framework="pt") as file:
            stored, sums = file.get_slice("pixels"), file.get_tensor("checksum").tolist()
            for start, stop in _runs([row for _, row, _ in entries]):
                first = entries[start][1]
                part = stored[first : first + stop - start]
                for (position, row, index), image in zip(entries[start:stop], part, strict=True):
                    if _checksum((label, index), image) != sums[row]:
                        raise ValueError(f"checksum of image {row} differs")
                    out[position] = image

    def _damaged(self, path: Path, error: Exception) -> UserError:
        return UserError(f"pool {self.directory}: {path.name} is unreadable ({error}); delete it and sample again")


def tidy(directory: Path) -> None:
    """Deletes what killed processes left half-written in a pool, before any process works in it."""
    if directory.is_dir():
        remove_leftovers(directory)
        for folder in directory.iterdir():
            if folder.is_dir():
                remove_leftovers(folder)


def remove_if_done(directory: Path) -> bool:
    """Deletes a pool that nobody wants to keep and that no unfinished request has work in; returns whether it did."""
    folders = [path for path in directory.iterdir() if path.is_dir() and not is_unused(path)]
    if (directory / KEEP_NAME).exists() or folders:
        return False
    remove_dir(directory)
    return True


def short_hash(value: Any) -> str:
    """Returns ten letters that name JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def _checksum(key: tuple[int, int], image: Tensor) -> int:
    return zlib.crc32(image.numpy().data, zlib.crc32(struct.pack("<qq", *key)))


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of the parts in which numbers count up by one."""
    starts = [0] + [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1]
    yield from zip(starts, [*starts[1:], len(rows)], strict=True)


def _check_same(directory: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"pool {directory}: made with {name} {_short(found.get(name))}, now {_short(wanted.get(name))}; "
                "delete that folder, or go back to its settings"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
