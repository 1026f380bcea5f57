"""What a training run tells while it runs: progress bar, metrics.jsonl, trackers, sample grids, FID curve."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from ddgen.config import Sampler, TrainConfig
from ddgen.diffusion.flops import TRAINING_FORWARDS, flops_per_image
from ddgen.diffusion.generator import Generator
from ddgen.diffusion.objective import learning_rate, micro_batch
from ddgen.diffusion.posthoc import Snapshots, take_weights
from ddgen.diffusion.run import TrainingRun
from ddgen.errors import UserError
from ddgen.grids import image_grid
from ddgen.hardware import device_name, peak_flops, readable_flops
from ddgen.resume import LossWatch, full_disk_explained, name_images
from ddgen.seeds import batch_indices

Monitor = Callable[[Tensor, Tensor], dict[str, float]]
GRID_COLUMNS, GRID_ROWS = 8, 10
MAX_GRIDS, GRID_SHARE = 10, 0.02
MONITOR_SAMPLER: Sampler = "dpmsolver++"
"""Samples the FID curve and the grids, in few steps: docs/recipe.md compares it with DDIM."""


def grid_steps(config: TrainConfig, num_classes: int) -> frozenset[int]:
    """Returns the steps of the sample grids that are there to look at while there is no point of the FID curve.

    Ten at most, evenly spread, as many as cost `GRID_SHARE` of training, counted as forward passes.

    Args:
        config: Settings.
        num_classes: Of the data.
    """
    optim = config.optimizer
    grid = _rows(num_classes) * GRID_COLUMNS * config.monitor.fid_num_inference_steps
    training = TRAINING_FORWARDS * optim.train_batch_size * optim.max_train_steps
    count = min(MAX_GRIDS, int(GRID_SHARE * training / grid), optim.max_train_steps)
    return frozenset(round(optim.max_train_steps * (i + 1) / count) for i in range(count))


def _rows(num_classes: int) -> int:
    return min(num_classes, GRID_ROWS)


def _is_due(every: int, step: int, last: bool) -> bool:
    return bool(every) and (step % every == 0 or last)


class Report:
    """Progress bar, metrics.jsonl, trackers, sample grids and the FID curve."""

    def __init__(
        self,
        config: TrainConfig,
        run: TrainingRun,
        sampled: Generator,
        accelerator: Accelerator,
        fid_every: int,
        monitor: Monitor | None,
        on_metrics: Callable[[Path], None] | None,
        *,
        num_images: int,
    ) -> None:
        """Starts where the run stands.

        Args:
            config: Settings.
            run: What is reported on.
            sampled: A generator of its own, whose weights are replaced by an average before it samples.
            accelerator: Processes and trackers.
            fid_every: See `train_diffusion`.
            monitor: See `train_diffusion`.
            on_metrics: See `train_diffusion`.
            num_images: How many images there are to train on.
        """
        self.config, self.run, self.accelerator = config, run, accelerator
        self.fid_every, self.monitor, self.on_metrics = fid_every, monitor, on_metrics
        self.metrics_path = run.output_dir / "metrics.jsonl"
        self.sampled = sampled
        self.num_images = num_images
        self.grid_steps = grid_steps(config, len(sampled.class_names))
        self.watch = LossWatch(accelerator, self._not_finite)
        self.norm = torch.zeros(())
        self.flops = flops_per_image(sampled.unet)
        self.peak = peak_flops(device_name(accelerator.device), sampled.precision)
        self.clock, self.clock_step = time.perf_counter(), run.step
        self.started, self.curve_seconds = self.clock, 0.0
        self.bar = tqdm(
            total=config.optimizer.max_train_steps * config.optimizer.train_batch_size,
            initial=run.step * config.optimizer.train_batch_size,
            desc="diffusion",
            unit="img",
            unit_scale=True,
            disable=not accelerator.is_main_process,
        )
        if accelerator.is_main_process:
            _remember_distances(self.metrics_path, run)

    def after_step(self, losses: list[Tensor], norm: Tensor) -> None:
        """Takes a step's loss of every micro-batch and its gradient norm, all scalars, and does what is due at it."""
        monitor, step = self.config.monitor, self.run.step
        self.norm = norm
        # The scaler of fp16 skips a step whose gradient is not finite; elsewhere the weights are lost with it.
        self.watch.add(torch.stack(losses if self.run.scaler is not None else [*losses, norm]))
        self.bar.update(self.config.optimizer.train_batch_size)
        last = step == self.config.optimizer.max_train_steps
        if step % monitor.log_every == 0 or last:
            self._log_loss()
        measure = _is_due(self.fid_every, step, last)
        if monitor.sample_every is None:
            sample = measure or step in self.grid_steps
        else:
            sample = _is_due(monitor.sample_every, step, last)
        if sample or measure:
            self.settle(step)
        if sample:
            self._without_clock(self._save_grid)
        if measure:
            self.curve_seconds += self._without_clock(self._measure_distance)
            if last and self.accelerator.is_main_process:
                share = self.curve_seconds / (time.perf_counter() - self.started)
                self.bar.write(f"the FID curve took {share:.1%} of the training time".replace("%", " %"))

    def generator(self, ema_std: float) -> Generator:
        """Returns a generator with one average of the weights; under FSDP every process must call this."""
        self.run.ema.copy_to(ema_std, list(self.sampled.unet.parameters()))
        return replace(self.sampled, ema_std=ema_std)

    def close(self) -> None:
        """Ends the progress bar."""
        self.bar.close()

    def settle(self, step: int) -> None:
        """Looks at the losses and gradient norms of the steps since the last look; `step` have been done.

        Raises:
            UserError: One is not finite.
        """
        rows = self.watch.settle(step)[..., : self.config.optimizer.gradient_accumulation_steps]
        self.run.open_losses += rows.sum(2).mean(1).tolist()  # of (n, world, micro-batches)

    def _not_finite(self, step: int, process: int, column: int) -> UserError:
        """Names what went into a value that is not finite; the last column is the gradient norm, of the whole batch."""
        optim, world = self.config.optimizer, self.accelerator.num_processes
        batch_size, count = optim.train_batch_size, optim.gradient_accumulation_steps
        where, part, what = slice(0, batch_size), "", "gradient norm"
        if column < count:
            where = micro_batch(batch_size // (count * world), column, process, world)
            part = f"micro-batch {column + 1} of {count}, process {process} of {world}, "
            what = "loss"
        start = (step - 1) * batch_size
        chosen = batch_indices(self.config.run.seed, "diffusion", start, batch_size, self.num_images)[where].tolist()
        cure = "a lower --learning_rate in another --output_dir"
        if self.sampled.precision != "no":
            cure = f"--resume_from_checkpoint latest --mixed_precision no, or {cure}"
        return UserError(
            f"step {step}: the {what} is not finite for {name_images(chosen)} ({part}positions {start + where.start} to"
            f" {start + where.stop - 1} of the order); last good checkpoint: {self.run.checkpoints.latest() or 'none'};"
            f" try {cure}"
        )

    def _log_loss(self) -> None:
        self.settle(self.run.step)
        value = math.fsum(self.run.open_losses) / len(self.run.open_losses)
        self.run.open_losses = []
        steps, seconds = self.run.step - self.clock_step, time.perf_counter() - self.clock
        rate = steps * self.config.optimizer.train_batch_size / max(seconds, 1e-9)
        self.clock, self.clock_step = time.perf_counter(), self.run.step
        flops = rate * self.flops / self.accelerator.num_processes
        speed = readable_flops(flops, self.peak)
        self.bar.set_postfix_str(f"step {self.run.step}, loss {value:.4f}, {speed}", refresh=False)
        lr = learning_rate(self.config.optimizer, self.run.step - 1)
        norm = float(self.norm)
        self._write(
            {
                "loss": value,
                "lr": lr,
                "grad_norm": norm if math.isfinite(norm) else None,
                "images_per_second": rate,
                "tflops": flops / 1e12,  # of one process
            }
        )

    def _without_clock(self, work: Callable[[], None]) -> float:
        """Runs `work` without counting its time against the training rate; returns its seconds."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # the steps still queued are training's
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        self.clock += seconds
        return seconds

    def _save_grid(self) -> None:
        num_classes = len(self.sampled.class_names)
        classes = torch.linspace(0, num_classes - 1, _rows(num_classes)).round().long()
        generator = self.generator(self.config.optimizer.ema_stds[0])
        if not self.accelerator.is_main_process:
            return
        labels = classes.repeat_interleave(GRID_COLUMNS)
        indices = torch.arange(GRID_COLUMNS).repeat(len(classes))
        few = generator.with_sampling(
            num_inference_steps=self.config.monitor.fid_num_inference_steps, sampler=MONITOR_SAMPLER, eta=0.0
        )
        pixels = few.sample(labels, indices, self.config.run.seed)
        path = self.run.output_dir / "samples" / f"step-{self.run.step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        image_grid(pixels, GRID_COLUMNS).save(path)

    def _measure_distance(self) -> None:
        values: dict[str, float] = {}
        for std in self.run.ema.averages:
            measured = self._distances_of(self.generator(std))
            if not measured:
                continue
            metric, distance = next(iter(measured.items()))
            self.run.add_distance(metric, std, self.run.step, distance)
            values |= {f"{name}/ema_{std}": value for name, value in measured.items()}
        if self.accelerator.is_main_process:
            self._write(values | self._best())
            now = ", ".join(f"{at[-1][1]:.4g} ({name})" for name, at in self.run.distances.items())
            self.bar.write(f"step {self.run.step}: {self.run.metric} {now}")
            if self.on_metrics is not None:
                self.on_metrics(self.metrics_path)
        self.accelerator.wait_for_everyone()

    def _best(self) -> dict[str, float]:
        points = [
            (distance, step, std)
            for std in self.run.ema.averages
            for step, distance in self.run.distances[f"ema_{std}"]
        ]
        distance, step, std = min(points)
        return {f"best/{self.run.metric}": distance, "best/step": step, "best/ema_std": std}

    def choose_width(self, snapshots: Snapshots, tracked: float) -> Generator:
        """Measures averages of other widths, put together from snapshots, and returns the generator of the best.

        Args:
            snapshots: Of the whole training.
            tracked: The best of the tracked averages.
        """
        main = self.accelerator.is_main_process
        found = {tracked: self.run.distances[f"ema_{tracked}"][-1][1]} if main else {}
        for std in self.config.optimizer.posthoc_ema_stds:
            if std in self.run.ema.averages:
                continue
            measured = self._distances_of(self._posthoc(snapshots, std))
            if main:
                found[std] = next(iter(measured.values()))
                self._write({f"{name}/posthoc_{std}": value for name, value in measured.items()})
        best = [min(found, key=found.__getitem__) if main else tracked]
        broadcast_object_list(best)
        if main:
            text = ", ".join(f"{std} {value:.3f}" for std, value in sorted(found.items()))
            self.bar.write(f"width of the average: {text}; chosen {best[0]}")
        return self.generator(tracked) if best[0] == tracked else self._posthoc(snapshots, best[0])

    def _posthoc(self, snapshots: Snapshots, std: float) -> Generator:
        weights = snapshots.average(std, self.run.step) if self.accelerator.is_main_process else None
        take_weights(self.sampled.unet, weights, self.accelerator.num_processes)
        return replace(self.sampled, ema_std=std)

    def _distances_of(self, generator: Generator) -> dict[str, float]:
        """Returns named distances of generated from real images; nothing but on the main process."""
        pixels, labels = self._sample_for_distance(generator)
        if not self.accelerator.is_main_process:
            return {}
        assert self.monitor is not None
        return self.monitor(pixels, labels)

    def _sample_for_distance(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """Generates the images of one point of the curve, the work shared among the processes, and their classes."""
        count = self.config.monitor.fid_num_images
        labels = torch.arange(count) % len(generator.class_names)
        indices = torch.arange(count) // len(generator.class_names)
        generator = generator.with_sampling(
            num_inference_steps=self.config.monitor.fid_num_inference_steps,
            guidance_scale=1.0,
            sampler=MONITOR_SAMPLER,
            eta=0.0,
        )
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = torch.arange(rank, math.ceil(count / world) * world, world) % count
        parts = [generator.sample(labels[i], indices[i], self.config.run.seed) for i in mine.split(128)]
        pixels = torch.cat(parts)
        if world > 1:
            gathered = self.accelerator.gather(pixels.to(self.accelerator.device)).cpu()
            pixels = gathered.reshape(world, len(mine), *pixels.shape[1:]).transpose(0, 1).flatten(0, 1)[:count]
        return pixels, labels

    def _write(self, values: Mapping[str, float | None]) -> None:
        if not self.accelerator.is_main_process:
            return
        line = json.dumps({"step": self.run.step, **values}, allow_nan=False) + "\n"
        with (
            full_disk_explained(self.run.output_dir, len(line)),
            open(self.metrics_path, "a", encoding="utf-8") as file,
        ):
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.accelerator.log({k: v for k, v in values.items() if v is not None}, step=self.run.step)


def _remember_distances(path: Path, run: TrainingRun) -> None:
    """Reads the points of the FID curve so far."""
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        for std in run.ema.averages:
            names = [name for name in values if name.endswith(f"/ema_{std}")]
            if names:
                run.add_distance(names[0].removesuffix(f"/ema_{std}"), std, values["step"], values[names[0]])
