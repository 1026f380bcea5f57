"""The pictures of the report page: images by class, the curve of the Fréchet distance, files of the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ddgen.checkpoint import write_bytes
from ddgen.distill.dataset import DistilledDataset
from ddgen.distill.preview import percent
from ddgen.evaluation.curve import LOWER_IS_BETTER, Series, describe
from ddgen.grids import to_pil
from ddgen.page.html import data_uri, esc, figure

MOST_CLASSES = 12
MOST_IMAGES = 10  # of a class
LARGEST_SIDE = 128
LOSSLESS_SIDE = 64  # up to it, images are stored as they are
SMALL_SIDE = 40  # up to it, their pixels are shown as squares
WIDEST = 1400  # of a picture of the run
COLOURS = ("--accent", "--second", "--third", "--fourth")
DASHES = ("", "7 4", "2 4", "9 3 2 3")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 240, 52, 12, 12, 40  # of the curve, in units of its own


@dataclass(frozen=True)
class Caption:
    """What is told of one image.

    Attributes:
        below: Text below it.
        more: Added to its alternative text.
        other: Whether the observer sees another class in it.
    """

    below: str
    more: str = ""
    other: bool = False


def images_by_class(
    pixels: Tensor,
    labels: Tensor,
    captions: Sequence[Caption],
    class_names: Sequence[str],
    what: str,
    css: str = "images",
) -> str:
    """Returns the first images of every class, or of evenly chosen classes where they are many.

    Args:
        pixels: uint8 (n, 3, h, w).
        labels: int64 (n,).
        captions: Of each image.
        class_names: Names of the k classes.
        what: Kind of image, for the alternative text, for instance ``kept image``.
        css: Class of the lists in the page; "images pairs" keeps two that belong together in one line.
    """
    rows = []
    for label in evenly(len(class_names), MOST_CLASSES):
        members = (labels == label).nonzero().flatten().tolist()[:MOST_IMAGES]
        if not members:
            continue
        items = [
            _item(pixels[i], captions[i], f"{class_names[label]}, {what} {place + 1} of {len(members)} shown")
            for place, i in enumerate(members)
        ]
        rows.append(
            f'<div class="class"><h4>{esc(class_names[label])}</h4>\n<ul class="{css}">\n'
            + "\n".join(items)
            + "\n</ul></div>"
        )
    return "\n".join(rows)


def kept_captions(dataset: DistilledDataset) -> list[Caption]:
    """Returns the captions of a distilled dataset's images: the observer's probability of the class."""
    seen = dataset.soft_labels.float().argmax(1)
    captions = []
    for loss, label, favoured in zip(dataset.realism, dataset.labels.tolist(), seen.tolist(), strict=True):
        probability = percent(float(torch.exp(-loss.double())))
        other = favoured != label
        more = f", which the observer takes for {dataset.class_names[favoured]}" if other else ""
        captions.append(Caption(probability, f", probability {probability}{more}", other))
    return captions


def rejected_path(run_dir: Path, distilled_dir: Path) -> Path:
    """Where the most realistic of the candidates that were not kept are looked for."""
    return run_dir / "baselines" / f"best-rejected-{distilled_dir.name}.safetensors"


def save_rejected(path: Path, pixels: Tensor, labels: Tensor, realism: Tensor) -> None:
    """Writes the best rejected candidates for the report.

    Args:
        path: See `rejected_path`.
        pixels: uint8 (n, 3, h, w).
        labels: int64 (n,).
        realism: Realism loss -log p(class), float32 (n,).
    """
    tensors = {"pixels": pixels, "labels": labels, "realism": realism}
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def best_rejected(path: Path, class_names: Sequence[str]) -> str:
    """Returns the best rejected candidates by class, or nothing where none are stored."""
    if not path.is_file():
        return ""
    try:
        stored = load_file(path)
        probabilities = [percent(float(torch.exp(-loss.double()))) for loss in stored["realism"]]
        pixels, labels = stored["pixels"], stored["labels"]
    except (SafetensorError, KeyError):
        return ""
    captions = [Caption(probability, f", probability {probability}") for probability in probabilities]
    return images_by_class(pixels, labels, captions, class_names, "rejected candidate")


def picture(path: Path, alt: str, caption: str) -> str:
    """Returns a picture of the run, no wider than a screen, or nothing where there is none."""
    if not path.is_file():
        return ""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    return figure(data_uri(image, lossless=False), alt, caption, image.size)


def curve(metric: str, averages: Series, lowest: str) -> str:
    """Draws a measure against training steps as SVG, in the colours of the page.

    Args:
        metric: Its name, as in metrics.jsonl.
        averages: Average of the weights -> [(step, value)], in order.
        lowest: Sentence about the best point, plain text.
    """
    values = [y for points in averages.values() for _, y in points]
    steps = [x for points in averages.values() for x, _ in points]
    log = min(values) > 0 and max(values) / min(values) > 10
    ticks = (
        _log_ticks(min(values), max(values))
        if log
        else round_ticks(0 if min(values) >= 0 else min(values), max(values))
    )
    low, high = (min(*ticks, *values), max(*ticks, *values))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x / max(steps)) if max(steps) else 0.5
        up = math.log(y / low) / math.log(high / low) if log else (y - low) / ((high - low) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_grid_line(place(0, tick)[1], tick) for tick in ticks]
    parts += [_step_label(place(step, low)[0], step) for step in round_ticks(0, max(steps)) if step <= max(steps)]
    for index, points in enumerate(averages.values()):
        parts.append(_line([place(*point) for point in points], index))
    first, last = next(iter(averages.values()))[0], next(iter(averages.values()))[-1]
    spoken = f"{describe(metric)}: from {first[1]:.4g} at step {first[0]:,.0f} to {last[1]:.4g} at step {last[0]:,.0f}"
    good = "lower" if metric.split("_")[0] in LOWER_IS_BETTER else "higher"
    keys = "".join(_key(name, index) for index, name in enumerate(averages)) if len(averages) > 1 else ""
    return (
        f'<figure class="curve"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(spoken)}">'
        + "".join(parts)
        + f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle" font-size="12" '
        'fill="currentColor">training step</text></svg>'
        f"<figcaption>{esc(describe(metric))}; {good} is better. {esc(lowest)} {keys}</figcaption></figure>"
    )


def average_name(name: str) -> str:
    """Spells out an average of the weights, such as ``ema_0.05``."""
    return name.replace("posthoc_", "afterwards, EMA ").replace("ema_", "EMA ") or "model"


def _item(pixels: Tensor, caption: Caption, alt: str) -> str:
    image = to_pil(pixels)
    if max(image.size) > LARGEST_SIDE:
        ratio = LARGEST_SIDE / max(image.size)
        image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.LANCZOS)
    css = ' class="small"' if max(image.size) <= SMALL_SIDE else ""
    data = data_uri(image, lossless=max(image.size) <= LOSSLESS_SIDE)
    below = f"<span>{esc(caption.below)}</span>"
    if caption.other:
        below = f'<span class="other">{esc(caption.below)} &ne;</span>'
    size = f'width="{image.width}" height="{image.height}"'
    return f'<li><img{css} src="{data}" alt="{esc(alt + caption.more)}" {size}>{below}</li>'


def evenly(count: int, most: int) -> list[int]:
    """Returns at most `most` of the numbers 0 .. count - 1, evenly spread and with both ends."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def round_ticks(low: float, high: float) -> list[float]:
    """Returns about four round numbers from `low` to just above `high`, and never fewer than two."""
    span = (high - low) or abs(high) or 1.0
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [round(step * i, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside[:: math.ceil(len(inside) / 6)]


def _grid_line(y: float, tick: float) -> str:
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--rule)"/>'
        f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end" font-size="12" fill="currentColor">{tick:g}</text>'
    )


def _step_label(x: float, step: float) -> str:
    y = HEIGHT - BOTTOM + 17
    anchor = "middle" if x < WIDTH - RIGHT - 14 else "end"
    return (
        f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-size="12" fill="currentColor">{_thousands(step)}</text>'
    )


def _thousands(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 10_000 else f"{step:,.0f}"


def _line(points: Iterable[tuple[float, float]], index: int) -> str:
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    places = list(points)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="var({colour})"/>' for x, y in places)
    return (
        f'<polyline points="{path}" fill="none" stroke="var({colour})" stroke-width="2" stroke-dasharray="{dash}"/>'
        + (dots if len(places) <= 60 else "")
    )


def _key(name: str, index: int) -> str:
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    return (
        '<span class="key"><svg width="26" height="8" aria-hidden="true"><line x1="0" x2="26" y1="4" y2="4" '
        f'stroke="var({colour})" stroke-width="2" stroke-dasharray="{dash}"/></svg>{esc(average_name(name))}</span> '
    )
