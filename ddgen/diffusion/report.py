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

from ddgen.checkpoint import latest_checkpoint, write_bytes
from ddgen.config import TrainConfig
from ddgen.diffusion.flops import flops_per_image
from ddgen.diffusion.generator import Generator
from ddgen.diffusion.objective import learning_rate
from ddgen.diffusion.posthoc import Snapshots, take_weights
from ddgen.diffusion.run import TrainingRun
from ddgen.errors import UserError
from ddgen.grids import image_grid
from ddgen.hardware import device_name, peak_flops, readable_flops

Monitor = Callable[[Tensor, Tensor], dict[str, float]]
GRID_COLUMNS, GRID_ROWS = 8, 10


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
        """
        self.config, self.run, self.accelerator = config, run, accelerator
        self.fid_every, self.monitor, self.on_metrics = fid_every, monitor, on_metrics
        self.metrics_path = run.output_dir / "metrics.jsonl"
        self.sampled = sampled
        self.losses: list[Tensor] = []
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
            _truncate_metrics(self.metrics_path, run)

    def at_boundary(self) -> bool:
        """Whether processes may talk to each other at this step without slowing training down."""
        return self.accelerator.num_processes == 1 or self.run.step % 10 == 0

    def after_step(self, loss: Tensor, norm: Tensor) -> None:
        """Takes the loss and the gradient norm of a step, and does what is due at it."""
        monitor, step = self.config.monitor, self.run.step
        self.losses.append(loss)
        self.norm = norm
        self.bar.update(self.config.optimizer.train_batch_size)
        last = step == self.config.optimizer.max_train_steps
        if step % monitor.log_every == 0 or last:
            self._log_loss()
        every = monitor.sample_every if monitor.sample_every is not None else self.fid_every
        if every and (step % every == 0 or last):
            self._without_clock(self._save_grid)
        if self.fid_every and (step % self.fid_every == 0 or last):
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

    def _log_loss(self) -> None:
        mean = torch.stack(self.losses).mean()
        if self.accelerator.num_processes > 1:
            mean = self.accelerator.reduce(mean, reduction="mean")
        value = mean.item()
        if not math.isfinite(value):
            last_good = latest_checkpoint(self.run.checkpoints_dir)
            raise UserError(
                f"loss {value} in steps {self.run.step - len(self.losses) + 1} to {self.run.step}:"
                f" lower --learning_rate or use --mixed_precision no; last good checkpoint: {last_good or 'none'}"
            )
        steps, seconds = self.run.step - self.clock_step, time.perf_counter() - self.clock
        rate = steps * self.config.optimizer.train_batch_size / max(seconds, 1e-9)
        self.losses, self.clock, self.clock_step = [], time.perf_counter(), self.run.step
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
        classes = torch.linspace(0, num_classes - 1, min(num_classes, GRID_ROWS)).round().long()
        generator = self.generator(self.config.optimizer.ema_stds[0])
        if not self.accelerator.is_main_process:
            return
        labels = classes.repeat_interleave(GRID_COLUMNS)
        indices = torch.arange(GRID_COLUMNS).repeat(len(classes))
        few = generator.with_sampling(num_inference_steps=self.config.monitor.fid_num_inference_steps)
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
            num_inference_steps=self.config.monitor.fid_num_inference_steps, guidance_scale=1.0
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
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.run.step, **values}, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.accelerator.log({k: v for k, v in values.items() if v is not None}, step=self.run.step)


def _truncate_metrics(path: Path, run: TrainingRun) -> None:
    """Drops the lines of metrics.jsonl that a resumed run will write again, and remembers the distances before it."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that was being written when the run was killed
        if values["step"] <= run.step:
            kept.append(line)
            for std in run.ema.averages:
                names = [n for n in values if n.endswith(f"/ema_{std}")]
                if names:
                    run.add_distance(names[0].removesuffix(f"/ema_{std}"), std, values["step"], values[names[0]])
    write_bytes(path, "".join(line + "\n" for line in kept).encode())
