"""The training loop of the diffusion model, top to bottom: set up, load, loop, report, save."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ddgen.autoencoder.autoencoder import Autoencoder
from ddgen.autoencoder.latents import LatentCache
from ddgen.config import OptimizerConfig, TrainConfig
from ddgen.diffusion.batches import Batches, MicroBatch
from ddgen.diffusion.generator import Generator
from ddgen.diffusion.kept_guide import keep_guide, take_along
from ddgen.diffusion.objective import DiffusionLoss, build_scheduler, learning_rate, micro_batch
from ddgen.diffusion.posthoc import Snapshots
from ddgen.diffusion.report import Monitor, Report
from ddgen.diffusion.run import TrainingRun
from ddgen.diffusion.samplers import Schedule
from ddgen.errors import UserError
from ddgen.resume import Keeper, fix_order_of_sums
from ddgen.seeds import derive
from ddgen.sharding import uses_fsdp, whole
from ddgen.stopping import note_signals


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
        output_dir: The run folder; gets metrics.jsonl, samples/, checkpoints/, guide.safetensors.
        resume_from: A checkpoint to go on from.
        fid_every: Steps between points of the FID curve; 0 for none.
        monitor: Maps generated pixels, uint8 (m, 3, h, w), and the classes they were made for, int64 (m,), to named
            distances from the real images. The first is the one by which the average is chosen. Needed on the main
            process unless `fid_every` is 0.
        on_metrics: Called with the path of metrics.jsonl after every point of the FID curve.

    Returns:
        The generator, in eval mode.

    Raises:
        UserError: Settings that cannot be honoured, a loss that is not finite, or a full disk.
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
    unet, optimizer = _prepare(run, optim, accelerator)
    _go_back(run, resume_from, output_dir, accelerator)
    report = Report(config, run, sampled, accelerator, fid_every, monitor, on_metrics, num_images=len(labels))
    snapshots = _snapshots(run, optim, output_dir)
    fix_order_of_sums(accelerator, unet, lambda: _loss(objective, unet, batches.at(run.step)[0]))

    # --- loop
    with note_signals() as noted, closing(report), closing(batches):
        last, every = optim.max_train_steps, config.run.checkpointing_steps
        keeper = Keeper(
            run.checkpoints, lambda _: run.snapshot(), report.settle, noted, accelerator, last=last, every=every
        )
        while run.step < last:
            losses, norm = _take_step(config, run, unet, optimizer, objective, batches.at(run.step), accelerator)

            # --- report and save
            keep_guide(run, optim, accelerator)
            if optim.posthoc_ema_stds:
                snapshots.save(run.ema, run.step, write=accelerator.is_main_process)
            report.after_step(losses, norm)
            keeper.after_step(run.step)
    # Only the main process knows the distances, and under FSDP all of them put the average together.
    best = broadcast_object_list([best_ema(run.distances, optim.ema_stds)])[0]
    return report.choose_width(snapshots, best) if optim.posthoc_ema_stds else report.generator(best)


def _go_back(run: TrainingRun, resume_from: Path | None, output_dir: Path, accelerator: Accelerator) -> None:
    """Puts everything back to where a checkpoint was taken, if there is one, and clears away what came after it."""
    if resume_from is not None:
        run.checkpoints.load(resume_from, run.go_back)
        take_along(resume_from, output_dir, accelerator)
    if accelerator.is_main_process:
        run.checkpoints.tidy(resume_from)


def _snapshots(run: TrainingRun, optim: OptimizerConfig, output_dir: Path) -> Snapshots:
    names = [name for name, _ in run.unet.named_parameters()]
    return Snapshots(output_dir / "ema_snapshots", names, optim.ema_stds, optim.max_train_steps)


def _take_step(
    config: TrainConfig,
    run: TrainingRun,
    unet: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: DiffusionLoss,
    parts: list[MicroBatch],
    accelerator: Accelerator,
) -> tuple[list[Tensor], Tensor]:
    """Takes one optimizer step; returns the losses of its micro-batches and the norm of the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config.optimizer, run.step)
    if config.denoiser.unet_dropout:
        torch.manual_seed(derive(config.run.seed, "diffusion", "dropout", run.step, accelerator.process_index))
    losses = _accumulate_gradients(unet, objective, parts, accelerator)
    norm = whole(accelerator.clip_grad_norm_(run.unet.parameters(), config.optimizer.max_grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.ema.update(run.step)
    return losses, norm


def _prepare(
    run: TrainingRun, optim: OptimizerConfig, accelerator: Accelerator
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Makes the denoiser what is trained: compiled, spread over the processes."""
    if optim.gradient_checkpointing:
        run.unet.enable_gradient_checkpointing()
    if optim.compiles_on(accelerator.device.type) and not (optim.torch_compile is None and uses_fsdp(accelerator)):
        run.unet.compile()  # in place: names of the weights stay; the copy that samples was made before
    unet, optimizer = accelerator.prepare(run.unet, run.optimizer)
    run.follow(optim)
    return unet.train(), optimizer


def _loss(objective: DiffusionLoss, unet: nn.Module, part: MicroBatch) -> Tensor:
    loss: Tensor = objective(unet, part.latents, part.labels, part.draws)
    return loss


def _accumulate_gradients(
    unet: nn.Module, objective: DiffusionLoss, parts: list[MicroBatch], accelerator: Accelerator
) -> list[Tensor]:
    """Returns the loss of every micro-batch, as its part of the step's; processes talk at the last one only."""
    losses = []
    for number, part in enumerate(parts):
        with accelerator.no_sync(unet) if number < len(parts) - 1 else nullcontext():
            loss = _loss(objective, unet, part) / len(parts)
            accelerator.backward(loss)
        losses.append(loss.detach())
    return losses


def best_ema(distances: dict[str, list[tuple[int, float]]], stds: tuple[float, ...]) -> float:
    """Returns the relative width of the average with the lowest last distance; the first without any distance."""
    measured = {std: distances[f"ema_{std}"][-1][1] for std in stds if distances.get(f"ema_{std}")}
    return min(measured, key=measured.__getitem__) if measured else stds[0]


def micro_batches(batch_size: int, accumulation: int, accelerator: Accelerator) -> list[slice]:
    """Returns this process's part of the global batch, cut into micro-batches."""
    world = accelerator.num_processes
    parts = accumulation * world
    if batch_size % parts:
        raise UserError(
            f"--train_batch_size {batch_size}: must be a multiple of {parts}"
            f" ({world} processes x {accumulation} accumulation steps)"
        )
    return [micro_batch(batch_size // parts, n, accelerator.process_index, world) for n in range(accumulation)]
