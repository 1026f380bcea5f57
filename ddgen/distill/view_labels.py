"""Labelling of augmented views: draws them, asks the observers, keeps what they say in float16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddgen.distill.relabel import ensemble_logits
from ddgen.distill.views import (
    VIEWS_PATH,
    Augment,
    StoredViews,
    ViewsHeader,
    compress,
    digest_of,
    draw_batch,
    index_type,
    sketch_of,
)
from ddgen.errors import UserError
from ddgen.observer.observer import Observer, predict_both
from ddgen.seeds import derive


def make_views(
    pixels: Tensor,
    augment: Augment,
    teachers: Sequence[Observer],
    *,
    augmentation: dict[str, Any],
    epochs: Sequence[int],
    batch_size: int,
    temperature: float,
    seed: int,
    device: torch.device,
    precision: str,
    top_k: int | None = None,
    label_batch_size: int = 512,
    progress: bool = True,
) -> StoredViews:
    """Draws views of images and labels them.

    Args:
        pixels: uint8 (n, 3, s, s).
        augment: Makes a batch of views; see `Augment`.
        teachers: Observers; see `ensemble_logits` for several.
        augmentation: What decides what `augment` does, as JSON.
        epochs: Numbers of the epochs to store, beginning with 0; a view depends on its epoch's number.
        batch_size: Views that are augmented together.
        temperature: See `ViewsHeader`.
        seed: Of the views.
        device: Where to compute.
        precision: See `ddgen.precision`.
        top_k: Store the largest logits only.
        label_batch_size: Views per forward pass of the observers, at least.
        progress: Show a progress bar.
    """
    n, k = len(pixels), len(teachers[0].class_names)
    batches = -(-n // batch_size)
    header = ViewsHeader(
        images=digest_of(pixels),
        num_images=n,
        num_classes=k,
        batch_size=batch_size,
        epochs=tuple(epochs),
        augmentation=augmentation,
        observers=tuple({"network": t.network, "fingerprint": t.fingerprint, "accuracy": t.accuracy} for t in teachers),
        temperature=temperature,
        seed=seed,
        top_k=top_k,
    )
    rows = [[derive(seed, "views", e, "order"), *(derive(seed, "views", e, b) for b in range(batches))] for e in epochs]
    views = _empty(header, torch.tensor(rows))
    pixels = pixels.to(device)
    with tqdm(total=len(epochs) * n, unit="view", unit_scale=True, desc="Labelling", disable=not progress) as bar:
        for position in range(len(epochs)):
            for first, images in _together(views, pixels, augment, position, label_batch_size):
                rows_here = slice(first, first + len(images))
                logits = [predict_both(t, images, device=device, precision=precision)[0] for t in teachers]
                _put(views, position, rows_here, ensemble_logits(logits, temperature))
                bar.update(len(images))
    sketch = sketch_of(draw_batch(pixels, augment, views.order(0)[:batch_size], int(views.seeds[0, 1]))).cpu()
    return replace(views, sketch=sketch)


def bytes_needed(num_images: int, num_classes: int, num_epochs: int, top_k: int | None) -> int:
    """Returns what labels of so many views take, but for seeds and header."""
    if top_k is None:
        return num_images * num_epochs * num_classes * 2
    width = torch.empty(0, dtype=index_type(num_classes)).element_size()
    return num_images * num_epochs * (top_k * (2 + width) + 2)


def _empty(header: ViewsHeader, seeds: Tensor) -> StoredViews:
    shape = (len(header.epochs), header.num_images)
    sparse = header.top_k is not None
    return StoredViews(
        header,
        seeds,
        values=torch.empty(*shape, header.top_k or header.num_classes, dtype=torch.float16),
        indices=torch.empty(*shape, header.top_k or 0, dtype=index_type(header.num_classes)),
        rest=torch.empty(shape if sparse else (shape[0], 0), dtype=torch.float16),
        sketch=torch.empty(0),
    )


def _put(views: StoredViews, position: int, rows: slice, logits: Tensor) -> None:
    header = views.header
    if not bool(logits.half().isfinite().all()):
        raise UserError(f"{VIEWS_PATH}: the observer's logits do not fit float16; use --mixed_precision no")
    if header.top_k is None:
        views.values[position, rows] = logits.half()
        return
    values, indices, rest = compress(logits, header.top_k, header.temperature)
    views.values[position, rows], views.indices[position, rows], views.rest[position, rows] = values, indices, rest


def _together(
    views: StoredViews, pixels: Tensor, augment: Augment, position: int, at_least: int
) -> Iterator[tuple[int, Tensor]]:
    """Yields the views of an epoch in order, several batches at once, with the place of the first."""
    size, order = views.header.batch_size, views.order(position)
    waiting: list[Tensor] = []
    first = 0
    for number in range(views.seeds.shape[1] - 1):
        rows = order[number * size : (number + 1) * size]
        waiting.append(draw_batch(pixels, augment, rows, int(views.seeds[position, 1 + number])))
        count = sum(map(len, waiting))
        if count >= at_least or first + count == len(order):
            yield first, torch.cat(waiting)
            first, waiting = first + count, []
