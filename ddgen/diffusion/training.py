"""The training loop of the diffusion model, top to bottom: set up, load, loop, report, save."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ddgen.autoencoder.autoencoder import Autoencoder
from ddgen.autoencoder.latents import LatentCache
from ddgen.checkpoint import (
    atomic_dir,
    checkpoint_dir,
    latest_checkpoint,
    prune_checkpoints,
    read_json,
    write_bytes,
    write_json,
)
from ddgen.config import TrainConfig
from ddgen.diffusion.ema import PowerEMA
from ddgen.diffusion.generator import Generator
from ddgen.diffusion.objective import add_noise, build_scheduler, draw, loss_weights, velocity
from ddgen.diffusion.unet import build_unet
from ddgen.errors import UserError
from ddgen.grids import image_grid
from ddgen.precision import autocast, memory_format
from ddgen.seeds import batch_indices, derive

Monitor = Callable[[Tensor], dict[str, float]]
GRID_COLUMNS, GRID_ROWS = 8, 10


class Stopped(Exception):
    """Training was asked to stop and has saved a checkpoint.

    Attributes:
        signal_number: The signal that asked, for the exit code 128 + signal_number.
    """

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped; go on with the same command and --resume_from_checkpoint latest ({checkpoint.name})"
        )
        self.signal_number = signal_number


@dataclass
class TrainingRun:
    """Everything that changes while training runs, and where it is written.

    Attributes:
        unet: The denoiser, float32.
        optimizer: AdamW.
        ema: Averages of the denoiser's weights.
        step: Optimizer steps done.
        output_dir: The run folder.
    """

    unet: UNet2DModel
    optimizer: torch.optim.Optimizer
    ema: PowerEMA
    output_dir: Path
    identity: dict[str, Any]
    step: int = 0
    scaler: Any = None
    distances: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def checkpoints_dir(self) -> Path:
        return self.output_dir / "checkpoints"

    def save(self) -> Path:
        """Writes a checkpoint; complete or not at all."""
        path = checkpoint_dir(self.checkpoints_dir, self.step)
        if path.exists():
            return path
        with atomic_dir(path) as temporary:
            _save_tensors(self.unet.state_dict(), temporary / "unet.safetensors")
            names = [name for name, _ in self.unet.named_parameters()]
            for std, average in self.ema.averages.items():
                _save_tensors(dict(zip(names, average, strict=True)), temporary / f"ema_{std}.safetensors")
            torch.save(self.optimizer.state_dict(), temporary / "optimizer.pt")
            scaler = self.scaler.state_dict() if self.scaler is not None else None
            write_json(temporary / "state.json", {"step": self.step, "identity": self.identity, "scaler": scaler})
        return path

    def load(self, path: Path) -> None:
        """Goes back to a checkpoint.

        Raises:
            UserError: It is not a checkpoint, or of another run.
        """
        if not (path / "state.json").is_file():
            raise UserError(
                f"--resume_from_checkpoint {path}: not a checkpoint; give `latest` or a checkpoints/step-* folder"
            )
        state = read_json(path / "state.json")
        for name, value in self.identity.items():
            if state["identity"].get(name) != value:
                raise UserError(
                    f"--resume_from_checkpoint {path}: was made with {name} {state['identity'].get(name)}, not {value};"
                    " use the same settings, or another --output_dir for a new run"
                )
        try:
            self._load_tensors(path)
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            cause = " ".join(str(error).split())[:160]
            raise UserError(
                f"--resume_from_checkpoint {path}: damaged ({cause}); delete it, go on from another"
            ) from None
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    def _load_tensors(self, path: Path) -> None:
        self.unet.load_state_dict(load_file(path / "unet.safetensors"))
        names = [name for name, _ in self.unet.named_parameters()]
        for std, average in self.ema.averages.items():
            saved = load_file(path / f"ema_{std}.safetensors")
            for name, tensor in zip(names, average, strict=True):
                tensor.copy_(saved[name])
        self.optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"))


def train_diffusion(
    config: TrainConfig,
    latents: LatentCache,
    labels: Tensor,
    autoencoder: Autoencoder,
    class_names: tuple[str, ...],
    image_size: int,
    *,
    accelerator: Accelerator,
    precision: str,
    output_dir: Path,
    resume_from: Path | None,
    monitor: Monitor | None = None,
    on_metrics: Callable[[Path], None] | None = None,
) -> Generator:
    """Trains the denoiser and returns the generator of the best average of its weights.

    Args:
        config: Settings.
        latents: The training images' latents.
        labels: Their classes, int64 (n,).
        autoencoder: Decodes samples.
        class_names: In label order.
        image_size: Side of the images in pixels.
        accelerator: Device, processes, trackers.
        precision: Autocast precision, resolved.
        output_dir: The run folder; gets metrics.jsonl, samples/, checkpoints/.
        resume_from: A checkpoint to go on from.
        monitor: Maps generated pixels, uint8 (m, 3, h, w), to named distances from the real images. The first is the
            one by which the average is chosen. Needed on the main process unless --fid_every is 0.
        on_metrics: Called with the path of metrics.jsonl after every point of the FID curve.

    Returns:
        The generator, in eval mode.

    Raises:
        UserError: Settings that cannot be honoured, or a loss that is not finite.
        Stopped: SIGTERM or Ctrl-C; a checkpoint has been written.
    """
    # --- set up
    device, main = accelerator.device, accelerator.is_main_process
    torch.manual_seed(derive(config.run.seed, "diffusion", "weights"))
    unet = build_unet(
        config.denoiser,
        latent_channels=latents.mean.shape[2],
        latent_size=latents.mean.shape[3],
        num_classes=len(class_names),
    ).to(device, memory_format=memory_format(device, precision))
    optim = config.optimizer
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=optim.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=optim.adam_weight_decay,
        fused=True,
    )
    ema = PowerEMA(list(unet.parameters()), optim.ema_stds)
    run = TrainingRun(unet, optimizer, ema, output_dir, _identity(config, latents, class_names))
    run.scaler = accelerator.scaler
    scheduler = build_scheduler()
    alphas_cumprod = scheduler.alphas_cumprod.to(device)
    slices = micro_batches(optim.train_batch_size, optim.gradient_accumulation_steps, accelerator)
    shape = (optim.train_batch_size, *latents.mean.shape[2:])

    # --- load
    if resume_from is not None:
        run.load(resume_from)
        accelerator.print(f"resumed from {resume_from.name}")
    report = _Report(
        config, run, autoencoder, class_names, image_size, scheduler, precision, accelerator, monitor, on_metrics
    )
    ddp, prepared = accelerator.prepare(unet, optimizer)
    unet.train()

    # --- loop
    with _stop_signals() as stopping, closing(report):
        while run.step < optim.max_train_steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(optim.learning_rate, run.step, config)
            chosen = torch.from_numpy(
                batch_indices(config.run.seed, "diffusion", run.step * shape[0], shape[0], len(labels))
            )
            draws = draw(config.denoiser, config.run.seed, run.step, shape, len(alphas_cumprod))
            total = torch.zeros((), device=device)
            for number, where in enumerate(slices):
                here = draws.part(where)
                x0 = latents.batch(chosen[where], here.mirrored, here.posterior_noise).to(device)
                here = here.to(device)
                y = torch.where(here.dropped, len(class_names), labels[chosen[where]].to(device))
                alpha = alphas_cumprod[here.timesteps]
                noisy = add_noise(x0, here.noise, alpha)
                last = number == len(slices) - 1
                with _maybe_no_sync(accelerator, ddp, not last):
                    with autocast(device, precision):
                        output = ddp(noisy, here.timesteps, y).sample
                    wanted = velocity(x0, here.noise, alpha)
                    error = F.mse_loss(output.float(), wanted, reduction="none").mean((1, 2, 3))
                    weights = loss_weights(alpha, config.denoiser.snr_gamma)
                    loss = (weights * error).mean() / len(slices)
                    accelerator.backward(loss)
                total += loss.detach()
            norm = accelerator.clip_grad_norm_(unet.parameters(), optim.max_grad_norm)
            prepared.step()
            optimizer.zero_grad(set_to_none=True)
            run.step += 1
            ema.update(run.step)

            # --- report and save
            report.after_step(total, norm)
            stop = _any_process(accelerator, stopping.get("signal", 0)) if report.at_boundary() else 0
            if run.step % config.run.checkpointing_steps == 0 or run.step == optim.max_train_steps or stop:
                if main:
                    run.save()
                    prune_checkpoints(run.checkpoints_dir, config.run.checkpoints_total_limit)
                accelerator.wait_for_everyone()
            if stop:
                raise Stopped(stop, latest_checkpoint(run.checkpoints_dir) or output_dir)
    return report.generator(best_ema(run.distances, optim.ema_stds))


def learning_rate(peak: float, step: int, config: TrainConfig) -> float:
    """Returns the learning rate of optimizer step `step`: linear warm-up, constant, linear fall to zero at the end."""
    optim = config.optimizer
    warm = min(1.0, (step + 1) / max(optim.lr_warmup_steps, 1))
    decay_steps = max(optim.lr_decay_fraction * optim.max_train_steps, 1)
    return peak * warm * min(1.0, (optim.max_train_steps - step) / decay_steps)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes safetensors, which hold no channels-last layout."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def best_ema(distances: dict[str, list[tuple[int, float]]], stds: tuple[float, ...]) -> float:
    """Returns the relative width of the average with the lowest last distance; the first without any distance."""
    measured = {std: distances[f"ema_{std}"][-1][1] for std in stds if distances.get(f"ema_{std}")}
    return min(measured, key=measured.__getitem__) if measured else stds[0]


def _identity(config: TrainConfig, latents: LatentCache, class_names: tuple[str, ...]) -> dict[str, Any]:
    """What must be the same in a run and in its resumption; how the work is spread over hardware may change."""
    settings = {**dataclasses.asdict(config.denoiser), **dataclasses.asdict(config.optimizer)}
    for name in ("mixed_precision", "gradient_accumulation_steps"):
        del settings[name]
    settings |= {
        "seed": config.run.seed,
        "class_names": class_names,
        "latents": latents.fingerprint,
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def micro_batches(batch_size: int, accumulation: int, accelerator: Accelerator) -> list[slice]:
    """Returns this process's part of the global batch, cut into micro-batches."""
    parts = accumulation * accelerator.num_processes
    if batch_size % parts:
        raise UserError(
            f"--train_batch_size {batch_size}: must be a multiple of {parts}"
            f" ({accelerator.num_processes} processes x {accumulation} accumulation steps)"
        )
    size, rank = batch_size // parts, accelerator.process_index
    starts = [(number * accelerator.num_processes + rank) * size for number in range(accumulation)]
    return [slice(start, start + size) for start in starts]


@contextmanager
def _maybe_no_sync(accelerator: Accelerator, model: nn.Module, skip: bool) -> Iterator[None]:
    if skip:
        with accelerator.no_sync(model):
            yield
    else:
        yield


@contextmanager
def _stop_signals() -> Iterator[dict[str, int]]:
    """Notes SIGTERM and Ctrl-C instead of dying, so that a checkpoint can be written first; a second Ctrl-C kills."""
    received: dict[str, int] = {}

    def note(number: int, _: FrameType | None) -> None:
        if "signal" in received:
            raise KeyboardInterrupt
        received["signal"] = number

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _any_process(accelerator: Accelerator, value: int) -> int:
    if accelerator.num_processes == 1:
        return value
    values = accelerator.gather(torch.tensor([value], device=accelerator.device))
    return int(values.max())


class _Report:
    """Progress bar, metrics.jsonl, trackers, sample grids and the FID curve."""

    def __init__(
        self,
        config: TrainConfig,
        run: TrainingRun,
        autoencoder: Autoencoder,
        class_names: tuple[str, ...],
        image_size: int,
        scheduler: Any,
        precision: str,
        accelerator: Accelerator,
        monitor: Monitor | None,
        on_metrics: Callable[[Path], None] | None,
    ) -> None:
        self.config, self.run, self.accelerator = config, run, accelerator
        self.monitor, self.on_metrics = monitor, on_metrics
        self.metrics_path = run.output_dir / "metrics.jsonl"
        self.sampled = Generator(
            unet=copy.deepcopy(run.unet).eval().requires_grad_(False),
            autoencoder=autoencoder,
            scheduler=scheduler,
            class_names=class_names,
            image_size=image_size,
            sampling=config.guidance,
            precision=precision,
        )
        self.losses: list[Tensor] = []
        self.norm = torch.zeros(())
        self.clock, self.clock_step = time.perf_counter(), run.step
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
        monitor, step = self.config.monitor, self.run.step
        self.losses.append(loss)
        self.norm = norm
        self.bar.update(self.config.optimizer.train_batch_size)
        last = step == self.config.optimizer.max_train_steps
        if step % monitor.log_every == 0 or last:
            self._log_loss()
        every = monitor.sample_every if monitor.sample_every is not None else monitor.fid_every
        if every and (step % every == 0 or last) and self.accelerator.is_main_process:
            self._without_clock(self._save_grid)
        if monitor.fid_every and (step % monitor.fid_every == 0 or last):
            self._without_clock(self._measure_distance)

    def generator(self, ema_std: float) -> Generator:
        """Returns a generator with one average of the weights."""
        self.run.ema.copy_to(ema_std, list(self.sampled.unet.parameters()))
        return self.sampled

    def close(self) -> None:
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
        self.bar.set_postfix(step=self.run.step, loss=f"{value:.4f}", refresh=False)
        lr = learning_rate(self.config.optimizer.learning_rate, self.run.step - 1, self.config)
        norm = float(self.norm)
        self._write(
            {"loss": value, "lr": lr, "grad_norm": norm if math.isfinite(norm) else None, "images_per_second": rate}
        )

    def _without_clock(self, work: Callable[[], None]) -> None:
        """Runs `work` without counting its time against the training rate."""
        start = time.perf_counter()
        work()
        self.clock += time.perf_counter() - start

    def _save_grid(self) -> None:
        num_classes = len(self.sampled.class_names)
        classes = torch.linspace(0, num_classes - 1, min(num_classes, GRID_ROWS)).round().long()
        generator = self.generator(self.config.optimizer.ema_stds[0])
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
            pixels = self._sample_for_distance(self.generator(std))
            if not self.accelerator.is_main_process:
                continue
            assert self.monitor is not None
            measured = self.monitor(pixels)
            self.run.distances.setdefault(f"ema_{std}", []).append((self.run.step, next(iter(measured.values()))))
            values |= {f"{name}/ema_{std}": value for name, value in measured.items()}
        if self.accelerator.is_main_process:
            self._write(values)
            text = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            self.bar.write(f"step {self.run.step}: {text}")
            if self.on_metrics is not None:
                self.on_metrics(self.metrics_path)
        self.accelerator.wait_for_everyone()

    def _sample_for_distance(self, generator: Generator) -> Tensor:
        """Generates the images of one point of the curve, the work shared among the processes."""
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
        return pixels

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
                    run.distances.setdefault(f"ema_{std}", []).append((values["step"], values[names[0]]))
    write_bytes(path, "".join(line + "\n" for line in kept).encode())
