"""The candidate pool: generated images on disk, from which the distilled dataset is chosen.

Every image is named by (seed, class, index) and depends on nothing else, so a pool can be filled by any number of
processes, interrupted, continued and enlarged; a larger pool contains the smaller one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from ddgen.checkpoint import read_json, write_bytes, write_json
from ddgen.errors import UserError

SHARD_NAME = re.compile(r"^(\d{8})-(\d{8})\.safetensors$")

SampleFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Labels int64 (b,) and indices int64 (b,) in, pixels uint8 (b, 3, h, w) out."""


@dataclass(frozen=True)
class CandidatePool:
    """A folder of candidates; make one with `CandidatePool.open`.

    ``pool.json`` says what the candidates are; ``class-00003/00000010-00000019.safetensors`` holds candidates 10 to 19
    of class 3: `pixels` uint8 (m, 3, h, w) and `index` int64 (m,).
    """

    directory: Path
    class_names: tuple[str, ...]
    image_size: int
    seed: int

    @classmethod
    def open(
        cls, directory: Path, *, class_names: Sequence[str], image_size: int, seed: int, settings: Mapping[str, Any]
    ) -> CandidatePool:
        """Opens a pool, or creates it.

        Args:
            directory: The pool's folder.
            class_names: Names of the generator's classes, in its order.
            image_size: Side of the images in pixels.
            seed: Seed of the candidates.
            settings: Everything else an image depends on, as JSON values: the generator's fingerprint, the sampler's
                settings, the precision.

        Raises:
            UserError: The folder holds candidates of other classes, seed or settings.
        """
        wanted = {"class_names": list(class_names), "image_size": image_size, "seed": seed, **settings}
        wanted = json.loads(json.dumps(wanted))
        header = directory / "pool.json"
        if header.is_file():
            _check_same(directory, read_json(header), wanted)
        else:
            write_json(header, wanted)
        return cls(directory, tuple(class_names), image_size, seed)

    def missing(self, class_index: int, count: int) -> list[int]:
        """Returns which of the candidates ``0 .. count - 1`` of a class are not on disk yet."""
        present = {index for first, last, _ in self._shards(class_index) for index in range(first, last + 1)}
        return [index for index in range(count) if index not in present]

    def num_stored(self) -> int:
        """Returns how many candidates of all classes are on disk."""
        spans = [(first, last) for label in range(len(self.class_names)) for first, last, _ in self._shards(label)]
        return sum(last + 1 - first for first, last in spans)

    def fill(
        self,
        sample_fn: SampleFunction,
        count_per_class: int,
        *,
        batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        classes: Sequence[int] | None = None,
        progress: bool = True,
    ) -> int:
        """Generates what is missing of candidates ``0 .. count_per_class - 1`` of this process's classes.

        Class `c` belongs to process ``c % num_processes``. Batches run across class borders, so all but the last are
        full; each is on disk before the next begins.

        Args:
            sample_fn: Generates one batch; an image must depend on its label and index only.
            count_per_class: Candidates per class.
            batch_size: Images per call of `sample_fn`.
            process_index: This process's number.
            num_processes: How many processes share the work.
            classes: Only these classes, all by this process.
            progress: Show a progress bar.

        Returns:
            How many images were generated.
        """
        mine = classes or range(process_index, len(self.class_names), num_processes)
        todo = [(label, index) for label in mine for index in self.missing(label, count_per_class)]
        total = len(mine) * count_per_class
        with tqdm(total=total, initial=total - len(todo), unit="image", desc="Candidates", disable=not progress) as bar:
            for start in range(0, len(todo), batch_size):
                batch = torch.tensor(todo[start : start + batch_size])  # (b, 2)
                labels, indices = batch.unbind(1)
                self._store(labels, indices, sample_fn(labels, indices))
                bar.update(len(batch))
        return len(todo)

    def read(self, class_index: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads candidates ``0 .. count - 1`` of one class.

        Returns:
            Pixels uint8 (count, 3, h, w) and indices int64 (count,), in the order of the indices.

        Raises:
            UserError: Candidates are missing, or a file was damaged or exchanged.
        """
        missing = self.missing(class_index, count)
        if missing:
            raise UserError(
                f"pool {self.directory}: class {self.class_names[class_index]!r} has {count - len(missing)} of {count} "
                "candidates; run sample.py again to make the rest"
            )
        pixels = torch.empty(count, 3, self.image_size, self.image_size, dtype=torch.uint8)
        for first, last, path in self._shards(class_index):
            if first < count:
                stop = min(last + 1, count)
                pixels[first:stop] = self._read_shard(path, class_index)[: stop - first]
        return pixels, torch.arange(count)

    def _class_dir(self, class_index: int) -> Path:
        return self.directory / f"class-{class_index:05d}"

    def _shards(self, class_index: int) -> Iterator[tuple[int, int, Path]]:
        folder = self._class_dir(class_index)
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            match = SHARD_NAME.match(path.name)
            if match:
                yield int(match[1]), int(match[2]), path

    def _store(self, labels: torch.Tensor, indices: torch.Tensor, pixels: torch.Tensor) -> None:
        expected = (len(labels), 3, self.image_size, self.image_size)
        if pixels.dtype != torch.uint8 or tuple(pixels.shape) != expected:
            raise ValueError(f"expected uint8 {expected} from the sampler, got {pixels.dtype} {tuple(pixels.shape)}")
        for part in _consecutive(labels, indices):
            self._write_shard(int(labels[part][0]), indices[part], pixels[part].cpu().contiguous())

    def _write_shard(self, class_index: int, indices: torch.Tensor, pixels: torch.Tensor) -> None:
        name = f"{int(indices[0]):08d}-{int(indices[-1]):08d}.safetensors"
        metadata = {"seed": str(self.seed), "class": self.class_names[class_index]}
        tensors = {"pixels": pixels, "index": indices.contiguous()}
        write_bytes(self._class_dir(class_index) / name, save(tensors, metadata))

    def _read_shard(self, path: Path, class_index: int) -> torch.Tensor:
        try:
            with safe_open(path, framework="pt") as shard:
                metadata = shard.metadata()
                pixels: torch.Tensor = shard.get_tensor("pixels")
        except Exception as error:  # safetensors raises its own type, and OSError
            raise UserError(
                f"pool {self.directory}: {path.name} is unreadable ({error}); delete it and sample again"
            ) from None
        if metadata != {"seed": str(self.seed), "class": self.class_names[class_index]}:
            raise UserError(f"pool {self.directory}: {path} is of {metadata}; delete it and sample again")
        return pixels


def _consecutive(labels: torch.Tensor, indices: torch.Tensor) -> Iterator[slice]:
    """Yields the runs of a batch in which the class stays and the index counts up by one."""
    starts = [0] + [i for i in range(1, len(labels)) if labels[i] != labels[i - 1] or indices[i] != indices[i - 1] + 1]
    for start, stop in zip(starts, [*starts[1:], len(labels)], strict=True):
        yield slice(start, stop)


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
