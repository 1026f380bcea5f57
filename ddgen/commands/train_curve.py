"""The FID curve of a training run: what measures it, how often, and its pictures."""

from __future__ import annotations

import time
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ddgen.autoencoder.autoencoder import Autoencoder
from ddgen.autoencoder.latents import LatentCache
from ddgen.config import TrainConfig
from ddgen.data import ImageDataset
from ddgen.evaluation.cost import plan_of_run
from ddgen.evaluation.curve import draw_fid_curve
from ddgen.evaluation.extractors import Extractor, observer_extractor
from ddgen.evaluation.monitor import DistanceMonitor
from ddgen.observer.observer import Observer


def monitor_of_run(
    config: TrainConfig,
    dataset: ImageDataset,
    observer: Observer,
    extractor: Extractor | None,
    output_dir: Path,
    accelerator: Accelerator,
) -> DistanceMonitor:
    """Measures the real images, or reads what is known of them, and says what they are compared in."""
    start = time.perf_counter()
    monitor = DistanceMonitor(
        dataset,
        extractor or observer_extractor(observer),
        observer,
        num_images=config.monitor.fid_num_images,
        cache_dir=output_dir / "reference",
        device=accelerator.device,
        seed=config.run.seed,
        say=accelerator.print,
    )
    all_real, seconds, (count, floor) = len(monitor.order), time.perf_counter() - start, monitor.of_real_images()
    accelerator.print(
        f"compared with {all_real:,} real images in the features of {monitor.extractor.name} ({seconds:.0f} s);"
        f" {count:,} of them are at {floor:.4g} themselves"
    )
    return monitor


def fid_every_of_run(
    config: TrainConfig,
    latents: LatentCache,
    autoencoder: Autoencoder,
    monitor: DistanceMonitor | None,
    accelerator: Accelerator,
) -> int:
    """Says when points of the FID curve are measured and what they cost; returns the steps between them."""
    every = [0]
    if monitor is not None:
        plan = plan_of_run(config, (latents.mean.shape[2], latents.mean.shape[3]), autoencoder, monitor)
        accelerator.print(f"FID curve: {plan}")
        every = [plan.every]
    return int(broadcast_object_list(every)[0])


def draw_curve(monitor: DistanceMonitor | None, output_dir: Path, metrics_path: Path) -> None:
    """Brings the pictures of the FID curve and of suspected copies up to date."""
    draw_fid_curve(metrics_path, output_dir / "fid_curve.png")
    if monitor is not None:
        monitor.save_suspects(output_dir / "samples" / "nearest_training.png")
