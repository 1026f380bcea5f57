"""What the FID curve costs, in multiplications, and how many points of it training can afford.

Counted, not timed: the steps at which a point is measured are part of a run's metrics, and a resumed run, on
another machine, must write the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddgen.autoencoder.autoencoder import Autoencoder
from ddgen.config import TrainConfig
from ddgen.diffusion.flops import TRAINING_FORWARDS
from ddgen.diffusion.unet import build_unet
from ddgen.evaluation.monitor import DistanceMonitor

SHARE = 0.07  # of training, by count; what is not counted (eigenvalues, neighbours, drawing) must fit below a tenth
MAX_POINTS = 50


@dataclass(frozen=True)
class CurvePlan:
    """When points of the FID curve are measured.

    Attributes:
        every: Steps between points; 0 for none. The last step always is one.
        share: What the points cost, as a part of what training costs, by count.
        num_points: How many.
    """

    every: int
    share: float
    num_points: int

    def __str__(self) -> str:
        when = f"every {self.every:,} steps" if self.num_points > 1 else "one point, after the last step"
        return f"{when}, about {100 * self.share:.{1 if self.share < 0.1 else 0}f} % of training"


def plan_curve(fid_every: int | None, max_train_steps: int, training_flops: float, point_flops: float) -> CurvePlan:
    """Keeps to `fid_every`, or derives it: as many points as cost 7 % of training, at least the one at the end.

    Args:
        fid_every: ``--fid_every``, not 0.
        max_train_steps: Steps of the whole run.
        training_flops: Of the whole run.
        point_flops: Of one point: all averages.
    """
    every = fid_every
    if every is None:
        affordable = int(SHARE * training_flops / point_flops)
        every = _round_up(math.ceil(max_train_steps / min(max(affordable, 1), MAX_POINTS, max_train_steps)))
        every = min(every, max_train_steps)
    num_points = math.ceil(max_train_steps / every)
    return CurvePlan(every, num_points * point_flops / training_flops, num_points)


def plan_of_run(
    config: TrainConfig, latent_shape: tuple[int, int], autoencoder: Autoencoder, monitor: DistanceMonitor
) -> CurvePlan:
    """Plans the curve of a run.

    Args:
        config: Settings.
        latent_shape: Channels and side of the latents.
        autoencoder: Decodes the generated images.
        monitor: Measures them.
    """
    channels, side = latent_shape
    with torch.device("meta"):
        unet = build_unet(config.denoiser, latent_channels=channels, latent_size=side, num_classes=1)
        latents, t = torch.zeros(1, channels, side, side), torch.zeros(1)
        forward = flops(lambda: unet(latents, t, class_labels=torch.zeros(1, dtype=torch.long)))
    pixels = monitor.real.pixels[:1]
    image = flops(lambda: autoencoder.decode(torch.zeros(1, channels, side, side)))
    image += flops(lambda: monitor.extractor.extract(pixels, monitor.device))
    image += flops(lambda: monitor.observer(torch.zeros(pixels.shape, device=monitor.device)))
    watched, optim = config.monitor, config.optimizer
    images = len(optim.ema_stds) * watched.fid_num_images
    return plan_curve(
        watched.fid_every,
        optim.max_train_steps,
        TRAINING_FORWARDS * forward * optim.train_batch_size * optim.max_train_steps,
        images * (watched.fid_num_inference_steps * forward + image),
    )


def flops(call: Callable[[], object]) -> int:
    """Counts the floating-point operations of matrix products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return int(counter.get_total_flops())


def _round_up(value: int) -> int:
    """Rounds up to two leading digits."""
    unit = 10 ** max(0, len(str(value)) - 2)
    return math.ceil(value / unit) * unit
