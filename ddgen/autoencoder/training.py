"""Trains the autoencoder: patch PCA first, then the residual networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ddgen.autoencoder.autoencoder import Autoencoder, to_images, to_pixels, wrap
from ddgen.autoencoder.equivariance import Transform, draw_transform
from ddgen.autoencoder.patch_autoencoder import PatchAutoencoderKL
from ddgen.autoencoder.pca import fit_pca
from ddgen.config import AutoencoderConfig
from ddgen.errors import UserError
from ddgen.precision import autocast
from ddgen.resume import Checkpoints, Keeper, LossWatch, Snapshot, fix_order_of_sums, name_images
from ddgen.seeds import batch_indices, derive, numpy_generator, torch_generator
from ddgen.sharding import replicate
from ddgen.stopping import note_signals

PerceptualLoss = Callable[[Tensor, Tensor], Tensor]
NUM_VALIDATION_IMAGES = 512
LOOK_EVERY = 20  # steps between looks at the loss


def check_space(config: AutoencoderConfig) -> None:
    """Refuses settings of an autoencoder where there is none.

    Raises:
        UserError: --space pixel together with a setting of the autoencoder.
    """
    if config.space == "latent":
        return
    for name, default in asdict(AutoencoderConfig()).items():
        if name != "space" and getattr(config, name) != default:
            raise UserError(
                f"--{name} {getattr(config, name)}: --space pixel has no autoencoder; leave one of them out"
            )


def default_downsample(image_size: int) -> int:
    """Returns f: 2 up to 32 px, 4 up to 64 px, 8 above."""
    return 2 if image_size <= 32 else 4 if image_size <= 64 else 8


def build(config: AutoencoderConfig, image_size: int) -> PatchAutoencoderKL:
    """Builds the untrained autoencoder for images of a size.

    Raises:
        UserError: Settings that do not fit each other or the image size.
    """
    f = default_downsample(image_size) if config.vae_downsample is None else config.vae_downsample
    default_channels = 8 if 32 < image_size <= 64 else 4
    d = default_channels if config.vae_latent_channels is None else config.vae_latent_channels
    if image_size % f:
        raise UserError(
            f"--vae_downsample {f}: does not divide the image size {image_size}; use a power of two that does"
        )
    if d > 3 * f * f:
        raise UserError(f"--vae_latent_channels {d}: more than the {3 * f * f} values of a patch; use fewer")
    if f % config.vae_patch or not math.log2(f // config.vae_patch).is_integer():
        raise UserError(f"--vae_patch {config.vae_patch}: --vae_downsample {f} must be this times a power of two")
    levels = int(math.log2(f // config.vae_patch)) + 1
    channels = config.vae_channels or (64, 128, 128, 128, 128)[:levels]
    if len(channels) != levels:
        raise UserError(
            f"--vae_channels {' '.join(map(str, channels))}: {levels} widths are needed for"
            f" --vae_downsample {f} with --vae_patch {config.vae_patch}"
        )
    if any(width % 16 for width in channels):
        raise UserError(f"--vae_channels {' '.join(map(str, channels))}: widths must be multiples of 16")
    return PatchAutoencoderKL(
        latent_channels=d,
        downsample=f,
        patch=config.vae_patch,
        block_out_channels=tuple(channels) if config.vae_train_steps else (),
    )


def reconstruct(vae: Autoencoder, pixels: Tensor) -> Tensor:
    """Returns `pixels`, uint8 (n, 3, h, w), encoded to posterior means, decoded and rounded, on the CPU."""
    parts = [vae.decode(vae.standardise(vae.encode(to_images(batch))[0])) for batch in pixels.split(64)]
    return torch.cat([to_pixels(part).cpu() for part in parts])


def psnr_of(restored: Tensor, pixels: Tensor) -> float:
    """Returns the peak signal-to-noise ratio in dB of the mean squared error, both uint8 (n, 3, h, w)."""
    parts = zip(restored.split(64), pixels.split(64), strict=True)
    squared = sum((a.double() - b.double()).square().sum().item() for a, b in parts)
    return 10 * math.log10(255**2 / max(squared / pixels.numel(), 1e-12))


def psnr(vae: Autoencoder, pixels: Tensor) -> float:
    """Returns `psnr_of` reconstructions of `pixels`, uint8 (n, 3, h, w)."""
    return psnr_of(reconstruct(vae, pixels), pixels)


def train_autoencoder(
    config: AutoencoderConfig,
    pixels: Tensor,
    *,
    accelerator: Accelerator,
    precision: str,
    seed: int,
    flip: bool,
    checkpoints: Checkpoints,
    perceptual: PerceptualLoss | None = None,
) -> tuple[Autoencoder, dict[str, float]]:
    """Trains an autoencoder on real images.

    The loss is the mean squared error (float32, images in [-1, 1]) plus weighted Kullback-Leibler, perceptual and
    equivariance terms, on images and, with `flip`, their mirror images. The weights kept are an exponential average.
    Trained for the squared error alone they never reconstruct held-out images worse than patch PCA does: if training
    should end below it, the closed form is kept.

    Args:
        config: Settings.
        pixels: Real training images, uint8 (n, 3, h, w).
        accelerator: Device and processes.
        precision: Autocast precision, resolved.
        seed: The user's ``--seed``.
        flip: Train on mirror images too.
        checkpoints: Where training is saved now and then, and goes on from; to be removed once the result is safe.
        perceptual: Maps (reconstructions, originals), both (b, 3, h, w) in [-1, 1], to a scalar.

    Returns:
        The autoencoder, without latent statistics, and {"psnr", "psnr_pca"} in dB on held-out training images.

    Raises:
        UserError: A loss that is not finite, checkpoints of another training, or a full disk.
        Stopped: SIGTERM or Ctrl-C; a checkpoint has been written.
    """
    device = accelerator.device
    torch.manual_seed(derive(seed, "autoencoder", "weights"))
    model = build(config, pixels.shape[-1])
    f, d = model.config.downsample, model.config.latent_channels
    order = torch.from_numpy(numpy_generator(seed, "autoencoder", "holdout").permutation(len(pixels)))
    num_validation = min(NUM_VALIDATION_IMAGES, max(1, len(pixels) // 10))
    validation = pixels[order[:num_validation].sort().values]
    training = order[num_validation:].sort().values
    model.set_pca(*fit_pca(pixels, f, d, seed=seed))
    report = {"psnr_pca": psnr(wrap(model, device, precision), validation)}
    if config.vae_train_steps:
        start = {name: value.clone() for name, value in model.state_dict().items()}
        averaged = _fit(model, config, pixels, training, accelerator, precision, seed, flip, checkpoints, perceptual)
        model.load_state_dict(averaged)
        report["psnr"] = psnr(wrap(model, device, precision), validation)
        squared_error_alone = not (config.vae_perceptual_weight or config.vae_equivariance_weight)
        if report["psnr"] < report["psnr_pca"] and squared_error_alone:
            accelerator.print(f"autoencoder: training ended below patch PCA ({report['psnr']:.2f} dB); keeping the PCA")
            model.load_state_dict(start)
    report["psnr"] = psnr(wrap(model, device, precision), validation)
    return wrap(model, device, precision), report


def _fit(
    model: PatchAutoencoderKL,
    config: AutoencoderConfig,
    pixels: Tensor,
    training: Tensor,
    accelerator: Accelerator,
    precision: str,
    seed: int,
    flip: bool,
    checkpoints: Checkpoints,
    perceptual: PerceptualLoss | None,
) -> dict[str, Tensor]:
    device, world = accelerator.device, accelerator.num_processes
    batch_size, steps = config.vae_batch_size, config.vae_train_steps
    if batch_size % world:
        raise UserError(f"--vae_batch_size {batch_size}: must be a multiple of the {world} processes")
    mine = slice(accelerator.process_index * batch_size // world, (accelerator.process_index + 1) * batch_size // world)
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.vae_learning_rate, weight_decay=0.0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(min(0.999, 1 - 10 / max(steps, 20))))
    scaler = accelerator.scaler
    first_scale = scaler.state_dict() if scaler is not None else None
    state = _State(model, optimizer, average, scaler)
    begin = checkpoints.go_on(state.go_back)
    if begin:
        accelerator.print(f"autoencoder: going on at step {begin} of {steps}")
    ddp, optimizer = replicate(accelerator, model, optimizer)

    def chosen_at(step: int) -> Tensor:
        return training[batch_indices(seed, "autoencoder", step * batch_size, batch_size, len(training))]

    def not_finite(step: int, process: int, _: int) -> UserError:
        share = batch_size // world
        part = chosen_at(step - 1)[process * share : (process + 1) * share].tolist()
        return UserError(
            f"--vae_learning_rate {config.vae_learning_rate}: the autoencoder's loss is not finite at step {step}, for"
            f" {name_images(part)}; lower it; last good checkpoint: {checkpoints.latest() or 'none'}"
        )

    watch = LossWatch(accelerator, not_finite)
    latent_size = pixels.shape[-1] // model.config.downsample

    def any_loss() -> Tensor:
        noise = torch.zeros(1, model.config.latent_channels, latent_size, latent_size, device=device)
        restored, posterior, _ = ddp(torch.zeros(1, *pixels.shape[1:], device=device), noise, None)
        return restored.float().mean() + posterior.kl().mean()

    fix_order_of_sums(accelerator, ddp, any_loss)
    shown = accelerator.is_main_process
    bar = tqdm(initial=begin, total=steps, desc="autoencoder", unit="step", disable=not shown)
    with note_signals() as noted, bar:
        keeper = Keeper(checkpoints, state.snapshot, watch.settle, noted, accelerator, last=steps)
        for step in range(begin, steps):
            for group in optimizer.param_groups:
                warm = min(1.0, (step + 1) / 100)
                group["lr"] = config.vae_learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            batch = _draw_batch(model, config, pixels, chosen_at(step), mine, step, seed, flip, device)
            with autocast(device, precision):
                restored, posterior, moved = ddp(batch.images, batch.noise, batch.transform)
            error = F.mse_loss(restored.float(), batch.images)
            loss = error + config.vae_kl_weight * posterior.kl().mean()
            if perceptual is not None and config.vae_perceptual_weight:
                loss = loss + config.vae_perceptual_weight * perceptual(restored.float(), batch.images)
            if batch.transform is not None:
                wanted = batch.transform(batch.images, model.config.downsample)
                loss = loss + config.vae_equivariance_weight * F.mse_loss(moved.float(), wanted)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update_parameters(model)
            watch.add(loss.reshape(1))
            bar.update()
            if step % LOOK_EVERY == 0 or step + 1 == steps:
                watch.settle(step + 1)
                bar.set_postfix(psnr=f"{10 * math.log10(4 / max(error.item(), 1e-9)):.2f} dB")
            keeper.after_step(step + 1)
    if scaler is not None:
        scaler.load_state_dict(first_scale)  # the next training starts from it, whether this one ran before or not
    return average.module.state_dict()


@dataclass(frozen=True)
class _Batch:
    """Images (b, 3, h, w) in [-1, 1], standard normal noise for their posteriors, and the equivariance transform."""

    images: Tensor
    noise: Tensor
    transform: Transform | None


def _draw_batch(
    model: PatchAutoencoderKL,
    config: AutoencoderConfig,
    pixels: Tensor,
    chosen: Tensor,
    mine: slice,
    step: int,
    seed: int,
    flip: bool,
    device: torch.device,
) -> _Batch:
    """Returns this process's part of the batch of a step; everything random in it is a function of seed and step."""
    draws, size = torch_generator(seed, "autoencoder", "noise", step), pixels.shape[-1] // model.config.downsample
    mirrored = (torch.rand(len(chosen), generator=draws) < 0.5) & flip
    noise = torch.randn(len(chosen), model.config.latent_channels, size, size, generator=draws)
    images = to_images(pixels[chosen[mine]])
    images = torch.where(mirrored[mine, None, None, None], images.flip(-1), images)
    transform = None
    if config.vae_equivariance_weight:
        transform = draw_transform(size, torch_generator(seed, "autoencoder", "transform", step))
    return _Batch(images.to(device), noise[mine].to(device), transform)


@dataclass
class _State:
    """What changes while the autoencoder is trained; `scaler` is the accelerator's, of fp16."""

    model: PatchAutoencoderKL
    optimizer: torch.optim.Optimizer
    average: AveragedModel
    scaler: Any

    def snapshot(self, step: int) -> Snapshot:
        """Returns what a checkpoint holds."""
        scale = self.scaler.state_dict() if self.scaler is not None else None
        tensors = {"autoencoder": self.model.state_dict(), "average": self.average.state_dict()}
        return Snapshot(step, tensors, self.optimizer.state_dict(), {"scaler": scale})

    def go_back(self, saved: Snapshot) -> None:
        """Takes everything from a snapshot."""
        self.model.load_state_dict(saved.tensors["autoencoder"])
        self.average.load_state_dict(saved.tensors["average"])
        self.optimizer.load_state_dict(saved.optimizer)
        if self.scaler is not None and saved.facts["scaler"]:
            self.scaler.load_state_dict(saved.facts["scaler"])
