"""The training loop of the diffusion model, top to bottom: set up, load, loop, report, save."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ddgen.autoencoder.autoencoder import Autoencoder
from ddgen.autoencoder.latents import LatentCache
from ddgen.checkpoint import latest_checkpoint, prune_checkpoints
from ddgen.config import TrainConfig
from ddgen.diffusion.batches import Batches
from ddgen.diffusion.generator import Generator
from ddgen.diffusion.objective import DiffusionLoss, build_scheduler, learning_rate
from ddgen.diffusion.pipeline import Schedule
from ddgen.diffusion.posthoc import Snapshots
from ddgen.diffusion.report import Monitor, Report
from ddgen.diffusion.run import TrainingRun
from ddgen.errors import UserError
from ddgen.sharding import uses_fsdp, whole


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
    fid_every: int = 0,
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
        fid_every: Steps between points of the FID curve; 0 for none.
        monitor: Maps generated pixels, uint8 (m, 3, h, w), and the classes they were made for, int64 (m,), to named
            distances from the real images. The first is the one by which the average is chosen. Needed on the main
            process unless `fid_every` is 0.
        on_metrics: Called with the path of metrics.jsonl after every point of the FID curve.

    Returns:
        The generator, in eval mode.

    Raises:
        UserError: Settings that cannot be honoured, or a loss that is not finite.
        Stopped: SIGTERM or Ctrl-C; a checkpoint has been written.
    """
    # --- set up
    device, optim = accelerator.device, config.optimizer
    run = TrainingRun.start(
        config, latents, class_names, accelerator=accelerator, precision=precision, output_dir=output_dir
    )
    scheduler = build_scheduler(config.denoiser)
    schedule = Schedule.of(scheduler).to(device, torch.float32)
    objective = DiffusionLoss(config.denoiser, schedule, null_label=len(class_names), precision=precision)
    slices = micro_batches(optim.train_batch_size, optim.gradient_accumulation_steps, accelerator)
    batches = Batches(config, latents, labels, slices, len(schedule.times), device)

    # --- load
    copied = copy.deepcopy(run.unet).eval().requires_grad_(False)
    sampled = Generator(copied, autoencoder, scheduler, class_names, image_size, config.guidance, precision)
    if optim.gradient_checkpointing:
        run.unet.enable_gradient_checkpointing()
    if optim.compiles_on(device.type) and not (optim.torch_compile is None and uses_fsdp(accelerator)):
        run.unet.compile()  # in place: names of the weights stay; the copy that samples was made before
    unet, optimizer = accelerator.prepare(run.unet, run.optimizer)
    run.follow(optim)
    if resume_from is not None:
        run.load(resume_from)
        accelerator.print(f"resumed from {resume_from.name}")
    report = Report(config, run, sampled, accelerator, fid_every, monitor, on_metrics)
    names = [name for name, _ in run.unet.named_parameters()]
    snapshots = Snapshots(output_dir / "ema_snapshots", names, optim.ema_stds, optim.max_train_steps)
    unet.train()

    # --- loop
    with _stop_signals() as stopping, closing(report), closing(batches):
        while run.step < optim.max_train_steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(optim, run.step)
            total = torch.zeros((), device=device)
            parts = batches.at(run.step)
            for number, part in enumerate(parts):
                with accelerator.no_sync(unet) if number < len(parts) - 1 else nullcontext():
                    loss = objective(unet, part.latents, part.labels, part.draws) / len(parts)
                    accelerator.backward(loss)
                total += loss.detach()
            norm = whole(accelerator.clip_grad_norm_(run.unet.parameters(), optim.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step += 1
            run.ema.update(run.step)

            # --- report and save
            if optim.posthoc_ema_stds:
                snapshots.save(run.ema, run.step, write=accelerator.is_main_process)
            report.after_step(total, norm)
            stop = _any_process(accelerator, stopping.get("signal", 0)) if report.at_boundary() else 0
            if run.step % config.run.checkpointing_steps == 0 or run.step == optim.max_train_steps or stop:
                run.save(write=accelerator.is_main_process)
                if accelerator.is_main_process:
                    prune_checkpoints(run.checkpoints_dir, config.run.checkpoints_total_limit)
                accelerator.wait_for_everyone()
            if stop:
                raise Stopped(stop, latest_checkpoint(run.checkpoints_dir) or output_dir)
    # Only the main process knows the distances, and under FSDP all of them put the average together.
    best = broadcast_object_list([best_ema(run.distances, optim.ema_stds)])[0]
    return report.choose_width(snapshots, best) if optim.posthoc_ema_stds else report.generator(best)


def best_ema(distances: dict[str, list[tuple[int, float]]], stds: tuple[float, ...]) -> float:
    """Returns the relative width of the average with the lowest last distance; the first without any distance."""
    measured = {std: distances[f"ema_{std}"][-1][1] for std in stds if distances.get(f"ema_{std}")}
    return min(measured, key=measured.__getitem__) if measured else stds[0]


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
