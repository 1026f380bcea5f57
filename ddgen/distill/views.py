"""Stored labels of augmented views: students see exactly what the observer labelled, and need no observer.

Fast knowledge distillation (Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV
2022), as SRe2L uses it (Yin et al., NeurIPS 2023, "relabel"). An epoch of views shows every image once, in batches of a
fixed size, within which CutMix pastes. Crops, flips, CutMix partners and boxes of a batch follow from one stored seed,
so a view is made again, bit for bit, by whatever process and for students of whatever batch size; the observer's logits
are stored in float16, all of them or the k largest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ddgen.checkpoint import write_bytes
from ddgen.errors import UserError
from ddgen.observer.observer import to_images01
from ddgen.resume import full_disk_explained
from ddgen.seeds import numpy_generator

FORMAT, FORMAT_VERSION = "ddgen-stored-views", 1
VIEWS_PATH = "stored_views.safetensors"
SKETCH_TOLERANCE = 1e-3  # devices round differently; a view of another crop or mirrored is off by more

Augment = Callable[[Tensor, np.random.Generator], Tensor]
"""Images (b, 3, s, s) in [0, 1] of a batch in, its mixed views (b, 3, s, s) out; draws from the generator only."""


@dataclass(frozen=True)
class ViewsHeader:
    """What the views are, as it stands in the file.

    Attributes:
        images: Digest of the images that the views show.
        num_images: How many these are, n.
        num_classes: k.
        batch_size: Views that are augmented and mixed together.
        epochs: Numbers of the stored epochs, rising.
        augmentation: Whatever decides how views are drawn, as JSON.
        observers: Network, fingerprint and held-out accuracy of each.
        temperature: At which students compare with the logits.
        seed: Of the views.
        top_k: How many logits of a view are stored; None is all. The probability of the others, at the temperature,
            is stored as one number and spread evenly.
    """

    images: str
    num_images: int
    num_classes: int
    batch_size: int
    epochs: tuple[int, ...]
    augmentation: dict[str, Any]
    observers: tuple[dict[str, Any], ...]
    temperature: float
    seed: int
    top_k: int | None = None


@dataclass(frozen=True, eq=False)
class StoredViews:
    """Seeds and labels of e epochs of views, in the order in which an epoch shows the images.

    Attributes:
        header: What they are.
        seeds: int64 (e, 1 + m): of an epoch's order, then of its m batches.
        values: Logits float16 (e, n, k), or the top ones (e, n, top_k), falling.
        indices: Classes of the top logits (e, n, top_k), or empty.
        rest: float16 (e, n): the logit that stands for every other class, or empty.
        sketch: Of the first batch of epoch 0, float32 (b,); see `sketch_of`.
    """

    header: ViewsHeader
    seeds: Tensor
    values: Tensor
    indices: Tensor
    rest: Tensor
    sketch: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of everything stored, but for the file's header."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def digest(self) -> str:
        """Digest of the header and of everything stored."""
        digest = hashlib.blake2b(json.dumps(asdict(self.header), sort_keys=True).encode(), digest_size=16)
        for tensor in self._tensors().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def order(self, position: int) -> Tensor:
        """Returns which images the stored epoch at `position` shows, int64 (n,)."""
        seed = int(self.seeds[position, 0])
        return torch.from_numpy(numpy_generator(seed).permutation(self.header.num_images))

    def logits(self, position: int, rows: slice) -> Tensor:
        """Returns the labels of some views of the stored epoch at `position`, float32 (b, k)."""
        values = self.values[position, rows].float()
        if self.header.top_k is None:
            return values
        full = self.rest[position, rows].float()[:, None].repeat(1, self.header.num_classes)
        return full.scatter_(1, self.indices[position, rows].long(), values)

    def batch(self, pixels: Tensor, augment: Augment, position: int, number: int) -> tuple[Tensor, Tensor]:
        """Makes a batch of views again.

        Args:
            pixels: The images uint8 (n, 3, s, s), on the device where views are wanted.
            augment: As it was when the views were labelled.
            position: Which stored epoch.
            number: Which of its batches.

        Returns:
            Views (b, 3, s, s) in [0, 1] and their logits float32 (b, k).
        """
        size = self.header.batch_size
        rows = slice(number * size, (number + 1) * size)
        views = draw_batch(pixels, augment, self.order(position)[rows], int(self.seeds[position, 1 + number]))
        return views, self.logits(position, rows).to(pixels.device)

    def stream(
        self, pixels: Tensor, augment: Augment, *, epochs: int, batch_size: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of a student's training, going round the stored epochs.

        Args:
            pixels: As `batch`.
            augment: As `batch`.
            epochs: Of the student.
            batch_size: Of the student; only where it is the stored one does a student's batch share one CutMix box.
            seed: Of the order in which the batches of an epoch come.

        Raises:
            UserError: These are not the images that were labelled, or the views do not come back as they were.
        """
        self.check(pixels, augment)
        for epoch in range(epochs):
            position = epoch % len(self.header.epochs)
            numbers = numpy_generator(seed, "student", "stored views", epoch).permutation(self.seeds.shape[1] - 1)
            stored = (self.batch(pixels, augment, position, int(number)) for number in numbers)
            yield from _cut_anew(stored, batch_size)

    def check(self, pixels: Tensor, augment: Augment) -> None:
        """Refuses images that are not those that were labelled, and views that do not come back.

        Raises:
            UserError: Either.
        """
        if digest_of(pixels) != self.header.images:
            raise UserError(f"{VIEWS_PATH}: the images are not those that were labelled; run ddgen label --overwrite")
        found = sketch_of(self.batch(pixels, augment, 0, 0)[0]).cpu()
        if not torch.allclose(found, self.sketch, rtol=0, atol=SKETCH_TOLERANCE):
            raise UserError(
                f"{VIEWS_PATH}: the views do not come back as they were labelled, with other versions of numpy or torch"
                " or another augmentation; run ddgen label --overwrite"
            )

    def keep_every(self, every: int) -> StoredViews:
        """Keeps the first of every `every` stored epochs."""
        header = replace(self.header, epochs=self.header.epochs[::every])
        kept = {name: getattr(self, name)[::every] for name in ("seeds", "values", "indices", "rest")}
        return replace(self, header=header, **kept)

    def keep_top(self, k: int) -> StoredViews:
        """Keeps the k largest logits of every view; see `compress`.

        Raises:
            UserError: There are no more than k to begin with.
        """
        have = self.header.top_k or self.header.num_classes
        if k >= have:
            raise UserError(f"--top_k {k}: the views have {have} logits each; give fewer")
        parts = []
        for position in range(len(self.header.epochs)):
            whole = self.logits(position, slice(None))
            parts.append(compress(whole, k, self.header.temperature))
        values, indices, rest = (torch.stack(part) for part in zip(*parts, strict=True))
        return StoredViews(replace(self.header, top_k=k), self.seeds, values, indices, rest, self.sketch)

    def save(self, folder: Path) -> Path:
        """Writes the file into a distilled dataset's folder, whole or not at all.

        Raises:
            UserError: The disk is full.
        """
        header = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self.header)}, sort_keys=True)
        path = folder / VIEWS_PATH
        with full_disk_explained(folder, self.num_bytes):
            write_bytes(path, save({k: v.contiguous() for k, v in self._tensors().items()}, {"header": header}))
        return path

    @classmethod
    def load(cls, folder: Path) -> StoredViews:
        """Reads the file of a distilled dataset's folder.

        Raises:
            UserError: There is none, or it is damaged, or of another version.
        """
        path = folder / VIEWS_PATH
        if not path.is_file():
            raise UserError(f"--distilled_dir {folder}: no stored views; make them with ddgen label")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("header", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"--distilled_dir {folder}: {VIEWS_PATH} is damaged ({error}); label it again") from None
        if (header.pop("format", None), header.pop("format_version", None)) != (FORMAT, FORMAT_VERSION):
            raise UserError(f"--distilled_dir {folder}: {VIEWS_PATH} is of another version of ddgen; label it again")
        header |= {"epochs": tuple(header["epochs"]), "observers": tuple(header["observers"])}
        return cls(ViewsHeader(**header), **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        names = ("seeds", "values", "indices", "rest", "sketch")
        return {name: getattr(self, name) for name in names}


def compress(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the k largest logits of every row, and the probability of the rest.

    Args:
        logits: float (n, c).
        k: Fewer than c.
        temperature: At which the probability of the rest is what it was.

    Returns:
        The largest, float16 (n, k); their classes, in the smallest integers that hold c (n, k); and the one logit that,
        given to each of the other classes, keeps their probability together, float16 (n,).
    """
    count = logits.shape[1]
    top = logits.float().topk(k, dim=1)
    others = logits.float().scatter(1, top.indices, float("-inf"))
    rest = temperature * ((others / temperature).logsumexp(1) - np.log(count - k))
    return top.values.half(), top.indices.to(index_type(count)), rest.half()


def draw_batch(pixels: Tensor, augment: Augment, indices: Tensor, seed: int) -> Tensor:
    """Returns the views (b, 3, s, s) of the images `indices` that follow from a seed."""
    return augment(to_images01(pixels[indices.to(pixels.device)], pixels.device), numpy_generator(seed))


def sketch_of(views: Tensor) -> Tensor:
    """Returns one number for each view (b, 3, h, w) that another crop, or a mirror image, would change."""
    height, width = views.shape[-2:]
    rows = torch.linspace(0, 1, height, device=views.device)[:, None]
    columns = torch.linspace(0, 2, width, device=views.device)[None, :]
    return (views.float() * (rows + columns)).mean(dim=(1, 2, 3))


def digest_of(pixels: Tensor) -> str:
    """Returns a digest of images uint8 (n, 3, h, w)."""
    digest = hashlib.blake2b(repr(tuple(pixels.shape)).encode(), digest_size=16)
    for part in pixels.split(1024):
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def index_type(num_classes: int) -> torch.dtype:
    """Returns the smallest integers that hold every class."""
    if num_classes <= 2**8:
        return torch.uint8
    return torch.int16 if num_classes <= 2**15 else torch.int32


def _cut_anew(batches: Iterator[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts a stream of (views, logits) into batches of another size; the last may be smaller."""
    views, logits = next(batches)
    for more_views, more_logits in batches:
        while len(views) >= size:
            yield views[:size], logits[:size]
            views, logits = views[size:], logits[size:]
        views, logits = torch.cat([views, more_views]), torch.cat([logits, more_logits])
    yield from zip(views.split(size), logits.split(size), strict=True)
