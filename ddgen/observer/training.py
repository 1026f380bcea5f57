"""Training of an observer on the real images: setup, loop, save."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ddgen.config import ObserverConfig
from ddgen.data import ImageDataset, split_holdout
from ddgen.errors import UserError
from ddgen.hardware import put
from ddgen.observer.epochs import EpochLog, kept_epochs, true_class_probabilities
from ddgen.observer.networks import build_network, uses_channels_last
from ddgen.observer.observer import Observer, Triple
from ddgen.observer.realism import check_observer
from ddgen.precision import autocast
from ddgen.resume import Checkpoints, Keeper, LossWatch, Snapshot, name_images
from ddgen.seeds import batch_indices, derive, torch_generator
from ddgen.stopping import note_signals

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
WARMUP_FRACTION = 0.2
CROP_PADDING = 4 / 32  # pixels of shift per pixel of side
STATISTICS_IMAGES = 10_000
GPU_PIXELS_FRACTION = 0.5  # of the free memory of a GPU


def train_observer(
    config: ObserverConfig,
    dataset: ImageDataset,
    *,
    output_dir: Path,
    device: torch.device,
    precision: str,
    seed: int,
    flip: bool = True,
    progress: bool = True,
) -> Observer:
    """Trains a classifier on real images and measures it on a held-out part of them.

    The same seed gives the same weights: order and augmentation are functions of (seed, step), the initial
    weights and dropout come from a seeded generator that leaves torch's global one as it was.

    Args:
        config: Network, epochs, batch size, learning rate, input size, held-out part.
        dataset: The real training split.
        output_dir: Folder to create, with what `ddgen.observer.epochs` keeps; one line per epoch goes to
            ``<output_dir>_metrics.jsonl`` beside it. A training that was stopped left its checkpoints in
            ``<output_dir>_checkpoints`` and goes on from there.
        device: Where to train.
        precision: See `ddgen.precision`; weights are float32.
        seed: The user's seed.
        flip: Mirror half of the images; False for classes that a mirror changes.
        progress: Show a progress bar.

    Returns:
        The observer, in eval mode on `device`, with `accuracy`.

    Raises:
        UserError: Impossible settings, a folder that exists, a loss that is not finite, an accuracy near chance,
            checkpoints of another training, or a full disk.
        Stopped: SIGTERM or Ctrl-C; a checkpoint has been written.
    """
    _check_settings(config, output_dir)
    kept_epochs(config)
    train_indices, holdout_indices = split_holdout(dataset, config.observer_holdout, seed)
    if len(holdout_indices) == 0 or len(train_indices) == 0:
        raise UserError(
            f"--observer_holdout {config.observer_holdout}: leaves {len(train_indices)} images to train and "
            f"{len(holdout_indices)} to measure of {len(dataset)}; choose another fraction"
        )
    cuda = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False),
    ):
        torch.manual_seed(derive(seed, "observer-weights"))
        observer = _new_observer(config, dataset, train_indices).to(device)
        run = _Run(config, dataset, train_indices, holdout_indices, device, precision, seed, flip)
        checkpoints = Checkpoints(
            output_dir.with_name(output_dir.name + "_checkpoints"),
            {**asdict(config), "seed": seed, "flip": flip, "images": dataset.fingerprint},
            metrics_path=output_dir.with_name(output_dir.name + "_metrics.jsonl"),
        )
        log = EpochLog(checkpoints.folder / "kept", config, len(dataset))
        _loop(run, observer, checkpoints, log, progress)
    observer.eval()
    try:
        check_observer(observer, dataset.class_names)  # before it is saved: a run goes on with the observer it finds
    except UserError:
        checkpoints.remove()  # going on would end here again
        raise
    observer.save(output_dir, beside=log.folder)
    checkpoints.remove()
    return observer


@dataclass(frozen=True)
class _Run:
    """What does not change during training."""

    config: ObserverConfig
    dataset: ImageDataset
    train_indices: Tensor
    holdout_indices: Tensor
    device: torch.device
    precision: str
    seed: int
    flip: bool

    @property
    def batch_size(self) -> int:
        return min(self.config.observer_batch_size, len(self.train_indices))

    def steps_until(self, epoch: int) -> int:
        """Optimizer steps when `epoch` epochs are over; batches run across the border between two."""
        return math.ceil(epoch * len(self.train_indices) / self.batch_size)

    @property
    def num_steps(self) -> int:
        return self.steps_until(self.config.observer_epochs)

    @property
    def facts(self) -> dict[str, object]:
        """What `read_training` gives back."""
        return {
            "seed": self.seed,
            "observer_holdout": self.config.observer_holdout,
            "epochs": self.config.observer_epochs,
            "images": self.dataset.fingerprint,
        }

    def batch(self, step: int) -> Tensor:
        """Returns which images of the dataset optimizer step `step` takes, int64 (b,)."""
        start, count = step * self.batch_size, len(self.train_indices)
        positions = batch_indices(self.seed, "observer-order", start, self.batch_size, count)
        return self.train_indices[torch.from_numpy(positions)]


def one_cycle(step: int, num_steps: int, peak: float) -> float:
    """Returns the learning rate: linear up over the first fifth, cosine down to zero (Smith and Topin, 2018)."""
    progress = (step + 1) / (num_steps + 1)
    if progress < WARMUP_FRACTION:
        return peak * progress / WARMUP_FRACTION
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP_FRACTION) / (1 - WARMUP_FRACTION)))


def augment(pixels: Tensor, indices: Tensor, generator: torch.Generator, *, flip: bool = True) -> Tensor:
    """Gathers images, each shifted by up to 4 px per 32 px (edges reflected) and half of them mirrored.

    One indexing operation does all three, for the whole batch, where the pixels are.

    Args:
        pixels: uint8 (n, 3, h, w).
        indices: int64 (b,), which images.
        generator: On the CPU, so that every device shifts alike.
        flip: Whether to mirror.

    Returns:
        uint8 (b, 3, h, w) on the device of `pixels`.
    """
    batch, (channels, height, width) = len(indices), pixels.shape[1:]
    device = pixels.device
    rows = _shifted(batch, height, generator)  # (b, h)
    columns = _shifted(batch, width, generator)  # (b, w)
    mirrored = torch.rand(batch, 1, generator=generator) < (0.5 if flip else 0.0)
    columns = torch.where(mirrored, columns.flip(1), columns)
    # Reading (b, h, w, c) and permuting gives channels-last memory, which the batch-norm networks train fastest in.
    return pixels[
        put(indices, device)[:, None, None, None],
        torch.arange(channels, device=device),
        put(rows, device)[:, :, None, None],
        put(columns, device)[:, None, :, None],
    ].permute(0, 3, 1, 2)


def _shifted(batch: int, size: int, generator: torch.Generator) -> Tensor:
    """Returns (b, size) positions shifted per sample, reflected at both ends."""
    padding = min(round(size * CROP_PADDING), size - 1)
    shift = torch.randint(-padding, padding + 1, (batch, 1), generator=generator)
    last = size - 1
    return last - (last - (torch.arange(size) + shift).abs()).abs()


def _check_settings(config: ObserverConfig, output_dir: Path) -> None:
    if output_dir.exists():
        raise UserError(f"--output_dir {output_dir}: an observer is there already; choose another folder or remove it")
    for name in ("observer_epochs", "observer_batch_size", "observer_learning_rate"):
        if not getattr(config, name) > 0:
            raise UserError(f"--{name} {getattr(config, name)}: must be above 0")
    if config.observer_batch_size < 2:
        raise UserError(f"--observer_batch_size {config.observer_batch_size}: batch norm needs at least 2")
    if config.observer_input_size is not None and config.observer_input_size < 1:
        raise UserError(f"--observer_input_size {config.observer_input_size}: must be above 0")
    if not 0 < config.observer_holdout < 1:
        raise UserError(f"--observer_holdout {config.observer_holdout}: must be between 0 and 1, for instance 0.1")


def _new_observer(config: ObserverConfig, dataset: ImageDataset, train_indices: Tensor) -> Observer:
    size = config.observer_input_size or dataset.image_size
    mean, std = channel_statistics(dataset.pixels, train_indices)
    return Observer(
        build_network(config.observer_network, dataset.num_classes, size),
        network=config.observer_network,
        class_names=dataset.class_names,
        input_size=size,
        mean=mean,
        std=std,
    )


def channel_statistics(pixels: Tensor, indices: Tensor) -> tuple[Triple, Triple]:
    """Returns per-channel mean and std of pixels in [0, 1], over at most 10,000 images evenly spread.

    Args:
        pixels: uint8 (n, 3, h, w).
        indices: int64 (m,), which images.
    """
    chosen = indices[:: max(1, len(indices) // STATISTICS_IMAGES)]
    total, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for part in chosen.split(256):
        values = pixels[part].double() / 255
        total += values.mean(dim=(2, 3)).sum(dim=0)
        squares += values.square().mean(dim=(2, 3)).sum(dim=0)
    mean = total / len(chosen)
    std = (squares / len(chosen) - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3)
    rounded = [[round(float(value), 6) for value in row] for row in (mean, std)]
    return (rounded[0][0], rounded[0][1], rounded[0][2]), (rounded[1][0], rounded[1][1], rounded[1][2])


@dataclass
class _State:
    """What changes during training.

    Attributes:
        observer: In training mode.
        optimizer: Of its weights.
        scaler: Loss scaler of fp16.
        watch: Losses that nobody has looked at yet.
        epoch_loss: Sum of the current epoch's losses that have been looked at.
    """

    observer: Observer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    watch: LossWatch
    epoch_loss: float = 0.0

    def settle(self, step: int) -> None:
        """Looks at the losses up to `step`; raises if one is not finite."""
        for loss in self.watch.settle(step).flatten().tolist():
            self.epoch_loss += loss

    def snapshot(self, step: int) -> Snapshot:
        """Returns what a checkpoint holds."""
        facts = {
            "scaler": self.scaler.state_dict(),
            "epoch_loss": self.epoch_loss,
            "accuracy": self.observer.accuracy,
        }
        return Snapshot(step, {"observer": self.observer.state_dict()}, self.optimizer.state_dict(), facts)

    def go_back(self, saved: Snapshot) -> None:
        """Takes everything from a snapshot."""
        self.observer.load_state_dict(saved.tensors["observer"])
        self.optimizer.load_state_dict(saved.optimizer)
        if saved.facts["scaler"]:
            self.scaler.load_state_dict(saved.facts["scaler"])
        self.epoch_loss, self.observer.accuracy = saved.facts["epoch_loss"], saved.facts["accuracy"]


def _loop(run: _Run, observer: Observer, checkpoints: Checkpoints, log: EpochLog, progress: bool) -> None:
    pixels = _place(run.dataset.pixels, run.device)
    memory_format = torch.channels_last if uses_channels_last(observer, run.device) else torch.contiguous_format
    observer.to(memory_format=memory_format).train()
    optimizer = torch.optim.SGD(
        observer.parameters(), lr=0.0, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")
    watch = LossWatch(None, lambda step, *_: _not_finite(run, step, checkpoints))
    state = _State(observer, optimizer, scaler, watch)
    begin = checkpoints.go_on(state.go_back)
    checkpoints.tidy(checkpoints.latest())
    log.start(run.facts, anew=begin == 0)
    if begin and progress:
        print(f"observer: going on at step {begin} of {run.num_steps}")
    bar = tqdm(
        initial=begin * run.batch_size,
        total=run.num_steps * run.batch_size,
        desc=f"observer {run.config.observer_network}",
        unit="img",
        unit_scale=True,
        disable=not progress,
    )
    with note_signals() as noted, bar:
        keeper = Keeper(checkpoints, state.snapshot, state.settle, noted, None, last=run.num_steps)
        for epoch in range(1, run.config.observer_epochs + 1):
            steps = range(run.steps_until(epoch - 1), run.steps_until(epoch))
            if steps.stop <= begin:
                continue
            record = _epoch(run, state, pixels, steps[max(begin - steps.start, 0) :], keeper, bar)
            record["loss"] = state.epoch_loss / len(steps)
            state.epoch_loss = 0.0
            observer.accuracy, confidences = _judge(run, observer)
            record["holdout_accuracy"] = observer.accuracy
            log.after_epoch(epoch, observer, confidences)
            bar.set_postfix(loss=f"{record['loss']:.3f}", accuracy=f"{observer.accuracy:.3f}")
            assert checkpoints.metrics_path is not None
            with open(checkpoints.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"epoch": epoch, "step": steps.stop, **record}) + "\n")
            keeper.after_step(steps.stop)


def _not_finite(run: _Run, step: int, checkpoints: Checkpoints) -> UserError:
    return UserError(
        f"--observer_learning_rate {run.config.observer_learning_rate}: the observer's loss is not finite at step"
        f" {step}, for {name_images(run.batch(step - 1).tolist())}; lower it;"
        f" last good checkpoint: {checkpoints.latest() or 'none'}"
    )


def _epoch(run: _Run, state: _State, pixels: Tensor, steps: range, keeper: Keeper, bar: tqdm[None]) -> dict[str, float]:
    """Trains an epoch, or what is left of one; the keeper is told of all its steps but the last."""
    state.observer.train()
    start = time.perf_counter()
    for step in steps:
        state.watch.add(_step(run, state, pixels, step).reshape(1))
        bar.update(run.batch_size)
        if step + 1 < steps.stop:
            keeper.after_step(step + 1)
    state.settle(steps.stop)
    seconds = time.perf_counter() - start
    return {
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "images_per_second": len(steps) * run.batch_size / seconds,
        "seconds": seconds,
    }


def _judge(run: _Run, observer: Observer) -> tuple[float, Tensor]:
    """Returns the accuracy on held-out images and, where they are logged, the confidences in all images, (n,)."""
    logged = run.config.observer_confidences
    indices = torch.arange(len(run.dataset)) if logged else run.holdout_indices
    confidences, hits = true_class_probabilities(
        observer, run.dataset, indices, device=run.device, precision=run.precision
    )
    held_out = hits[run.holdout_indices] if logged else hits
    return int(held_out.sum()) / len(held_out), confidences


def _step(run: _Run, state: _State, pixels: Tensor, step: int) -> Tensor:
    indices, optimizer = run.batch(step), state.optimizer
    torch.manual_seed(derive(run.seed, "observer-dropout", step))
    batch = augment(pixels, indices, torch_generator(run.seed, "observer-augment", step), flip=run.flip)
    images = batch.to(run.device).float().div_(255)
    labels = put(run.dataset.labels[indices], run.device)
    for group in optimizer.param_groups:
        group["lr"] = one_cycle(step, run.num_steps, run.config.observer_learning_rate)
    with autocast(run.device, run.precision):
        logits = state.observer(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=run.config.observer_label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    state.scaler.step(optimizer)
    state.scaler.update()
    return loss.detach()


def _place(pixels: Tensor, device: torch.device) -> Tensor:
    """Puts the pixels on a GPU that has room for them; on the CPU they stay memory-mapped."""
    if device.type != "cuda":
        return pixels
    free, _ = torch.cuda.mem_get_info(device)
    return pixels.to(device) if pixels.numel() < GPU_PIXELS_FRACTION * free else pixels
