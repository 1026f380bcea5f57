"""How much of the observer's bare speed is left when it ranks images.

    python benchmarks/ranking.py

Ranking real images reads them, cuts and resizes crops, scores these, keeps their features and chooses; ranking
candidates scores, keeps features and chooses. The bare observer gets the same images as float batches that are
ready. All take turns (A B C A B C ...) on made images, in processor time, which other programs on the machine
disturb least, and the medians are compared.

Goal: at least 0.9 of the bare observer. Measured on one thread of an AMD EPYC in bf16, which other work shared (real
images, candidates; lowest and highest of six turns in brackets): ConvNet-3 by `realism` 0.91 (0.87-0.96) and 0.93
(0.90-0.95), by `diverse-realism` 0.94 (0.91-0.97) and 0.97 (0.94-1.01), of 300 images 0.90 (0.86-0.95) and 0.90
(0.85-0.94); ResNet-18 0.98 (0.96-1.00) and 1.00 (0.97-1.01).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from ddgen.config import Selection
from ddgen.data import ImageDataset
from ddgen.distill.rded import BATCH_SIZE, crop, draw_boxes, plan_crops, rank_class
from ddgen.distill.select import Candidates, select
from ddgen.observer.networks import build_network, uses_channels_last
from ddgen.observer.observer import Observer, to_images01
from ddgen.observer.realism import RealismScores, realism_scores
from ddgen.precision import autocast, resolve_precision


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    network: str = "convnet3"
    """The observer; a slower one hides more."""
    image_size: int = 32
    """Side of the images."""
    num_images: int = 102
    """Real images of the class, of 5 crops each."""
    ipc: int = 10
    """Images kept."""
    selection: Selection = "realism"
    """Rule that keeps them."""
    rounds: int = 7
    """Turns of each; the first is not counted."""


def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    settings = tyro.cli(Settings, args=argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(None, device)
    work, images = _work(settings, device, precision)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(settings.rounds):
        for name, run in work.items():
            taken = _seconds(run, device)
            if number:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{device.type}, {torch.get_num_threads()} threads, {precision}; {settings.network}, {images:,} images of "
        f"{settings.image_size} px, rule {settings.selection}"
    )
    print(f"{'bare observer':<24}{images / medians['bare observer']:10,.0f} images/s")
    for name in list(work)[1:]:
        ratios = [bare / ours for bare, ours in zip(seconds["bare observer"], seconds[name], strict=True)]
        share = medians["bare observer"] / medians[name]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name:<24}{images / medians[name]:10,.0f} images/s, {share:.3f} of it ({spread})")
    return 0


def _work(settings: Settings, device: torch.device, precision: str) -> tuple[dict[str, Callable[[], object]], int]:
    """Returns what takes turns, and the number of images in each."""
    torch.manual_seed(0)
    size, count = settings.image_size, settings.num_images
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    labels = torch.zeros(count, dtype=torch.int64)
    dataset = ImageDataset(pixels, labels, tuple("abcdefghij"), "made", "train", "made")
    half = (0.5, 0.5, 0.5)
    network = build_network(settings.network, 10, size)
    observer = Observer(
        network, network=settings.network, class_names=dataset.class_names, input_size=size, mean=half, std=half
    )
    observer.to(device).eval()
    plan = plan_crops(
        count, class_name="a", label=0, ipc=settings.ipc, factor=1, mipc=max(count, settings.ipc), num_crop=5, seed=0
    )
    boxes = torch.stack([draw_boxes(0, 0, int(i), plan.num_crop, size) for i in plan.numbers])
    crops = crop(pixels, boxes, size)
    memory_format = torch.channels_last if uses_channels_last(observer, device) else torch.contiguous_format
    per_batch = BATCH_SIZE // plan.num_crop * plan.num_crop
    ready = [to_images01(part, device).contiguous(memory_format=memory_format) for part in crops.split(per_batch)]
    real = realism_scores(observer, pixels, labels, batch_size=per_batch, device=device, precision=precision)

    def candidates() -> Tensor:
        scores = realism_scores(
            observer, crops, labels.new_zeros(len(crops)), batch_size=per_batch, device=device, precision=precision
        )
        return _choose(settings, scores, real)

    def crops_of_real() -> object:
        return rank_class(
            observer, dataset, torch.arange(count), 0, plan, factor=1, rule=settings.selection, real=real, seed=0,
            device=device, precision=precision,
        )  # fmt: skip

    work: dict[str, Callable[[], object]] = {
        "bare observer": lambda: _bare(observer, ready, device, precision),
        "ranking real images": crops_of_real,
        "ranking candidates": candidates,
    }
    return work, len(crops)


def _choose(settings: Settings, scores: RealismScores, real: RealismScores) -> Tensor:
    return select(settings.selection, Candidates(scores, torch.arange(len(scores)), 0, 0, real), settings.ipc)


@torch.inference_mode()
def _bare(observer: Observer, batches: list[Tensor], device: torch.device, precision: str) -> None:
    with autocast(device, precision):
        for batch in batches:
            observer(batch)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Returns the processor's seconds, or on a device, which works beside it, those of the clock."""
    timer = time.process_time if device.type == "cpu" else time.perf_counter
    start = timer()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return timer() - start


if __name__ == "__main__":
    sys.exit(main())
