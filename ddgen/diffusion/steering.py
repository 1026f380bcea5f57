"""Steering: a denoiser whose estimates are moved towards modes of the class and away from those of other images.

Nothing is trained. A class's modes are the centres of clusters of its real latents (`ddgen.diffusion.modes`), and the
image with index i of a class belongs to mode i mod m. At a noise level x = alpha x0 + sigma noise the estimate of x0
is moved by

    gain (mode_strength (own - x0) + diversity_strength (own - sum_j r_j mode_j)),
    gain = sigma^2 / (sigma^2 + alpha^2 variance).

The first term is representativeness, the pull of MGD3 (Chan-Santiago et al. 2025, "MGD3: Mode-Guided Dataset
Distillation using Diffusion Models") on the estimate of x0. It draws images to the middle of their cluster.

The second is diversity: it leads away from the modes that the other images of the class are steered to, from each as
far as the image is there (r_j, the probability of cluster j given x). For a class that is a mixture of Gaussian
clusters of that variance, strength 1 turns the estimate given the class into the estimate given the cluster: it is
classifier guidance (Dhariwal & Nichol 2021, eq. 10) by the classifier that Bayes' rule makes of the clusters, and
spreads images over the clusters without narrowing any.

Minimax (Gu et al., CVPR 2024) and particle guidance (Corso et al. 2024) push images away from those drawn with them.
Here they are pushed from where the others are sent, which is known beforehand: an image stays a function of seed, class
and index, in whatever batch and on however many processes, and no pool has to be sampled in any order. What that leaves
out: two images of the same mode do not see each other. They differ by their noise; with as many modes as candidates
there are none.

Steering ends at a noise level (the stop guidance of MGD3), below which only details are made.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddgen.diffusion.samplers import Denoise, Factor, Schedule, to_x0_and_noise


@dataclass(frozen=True)
class Modes:
    """Clusters of the real latents of every class.

    Attributes:
        centres: Standardised latents, float32 (k, m, d, h, w); of each class the largest cluster first.
        weights: Part of the class that is in each cluster, float32 (k, m).
        variance: Mean square distance of a latent's values to those of its centre, float32 (k,).
    """

    centres: Tensor
    weights: Tensor
    variance: Tensor

    @property
    def count(self) -> int:
        """Modes of a class, m."""
        return self.weights.shape[1]

    def to(self, device: torch.device) -> Modes:
        """Returns the modes on a device."""
        return Modes(self.centres.to(device), self.weights.to(device), self.variance.to(device))

    def fingerprint(self) -> str:
        """Returns a hash of all values."""
        digest = hashlib.sha256()
        for values in (self.centres, self.weights, self.variance):
            digest.update(values.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Steering:
    """Where to, how strongly and for how long.

    Attributes:
        modes: Of every class.
        mode_strength: Pull towards an image's own mode.
        diversity_strength: Push away from the others.
        until: Noise level in the schedule's time, from 0, clean, to 1, noise, at and below which nothing is steered.
    """

    modes: Modes
    mode_strength: float
    diversity_strength: float
    until: float

    def to(self, device: torch.device) -> Steering:
        """Returns it with its modes on a device."""
        return replace(self, modes=self.modes.to(device))

    def settings(self) -> dict[str, Any]:
        """Returns, as JSON, what an image depends on."""
        return {
            "modes": self.modes.count,
            "fingerprint": self.modes.fingerprint(),
            "mode_strength": self.mode_strength,
            "diversity_strength": self.diversity_strength,
            "steer_until": self.until,
        }

    def describe(self) -> str:
        """Returns what it does, for a card."""
        modes = "1 mode" if self.modes.count == 1 else f"{self.modes.count} modes"
        strengths = f"pull {self.mode_strength:g}, push from the others' {self.diversity_strength:g}"
        return f"to {modes} of each class, {strengths}, above noise level {self.until:g}"


def steered_denoiser(
    denoise: Denoise, labels: Tensor, indices: Tensor, schedule: Schedule, steering: Steering
) -> Denoise:
    """Returns a denoiser whose estimates of x0 are moved as the text above says.

    It is the same for every sampler and prediction type: the UNet's output is what is changed, by as much as moves x0.

    Args:
        denoise: The guided denoiser.
        labels: Classes, int64 (b,), on the device of the latents.
        indices: Which image of its class each is, int64 (b,), likewise.
        schedule: Of training.
        steering: With modes on the device of the latents.
    """
    if not steering.mode_strength and not steering.diversity_strength:
        return denoise
    kind = schedule.prediction_type
    factors = zip(schedule.alphas.tolist(), schedule.sigmas.tolist(), strict=True)
    factors_at = dict(zip(schedule.times.tolist(), factors, strict=True))

    def steered(latents: Tensor, time: float) -> Tensor:
        output = denoise(latents, time)
        if schedule.level(time) <= steering.until:
            return output
        alpha, sigma = factors_at[time]
        x0, _ = to_x0_and_noise(output, latents, alpha, sigma, kind)
        shift = x0_shift(latents, x0, alpha, sigma, labels, indices, steering)
        return output + to_output_shift(shift, alpha, sigma, kind)

    return steered


def x0_shift(
    x: Tensor, x0: Tensor, alpha: float, sigma: float, labels: Tensor, indices: Tensor, steering: Steering
) -> Tensor:
    """Returns by how much estimates of x0 are moved; see the text above.

    Everything is computed image by image, a mode at a time: rounding, too, depends on no other image, and memory does
    not grow with the number of modes.

    Args:
        x: Latents, (b, d, h, w).
        x0: Estimates, likewise.
        alpha: Factor of x0 in x.
        sigma: Factor of the noise in x.
        labels: int64 (b,).
        indices: int64 (b,).
        steering: What is wanted.

    Returns:
        (b, d, h, w).
    """
    modes = steering.modes
    own = modes.centres[labels, indices % modes.count]
    variance = sigma**2 + alpha**2 * modes.variance[labels]  # (b,), of a value of x around alpha times its centre
    shift = torch.zeros_like(x0)
    if steering.mode_strength:
        shift = shift + steering.mode_strength * (own - x0)
    if steering.diversity_strength:
        others = expected_mode(x, alpha, variance, modes, labels)
        shift = shift + steering.diversity_strength * (own - others)
    return _each(sigma**2 / variance, x0) * shift


def expected_mode(x: Tensor, alpha: float, variance: Tensor, modes: Modes, labels: Tensor) -> Tensor:
    """Returns the mean of a class's modes, by the probability of each cluster given the noisy latents.

    Args:
        x: Latents, (b, d, h, w).
        alpha: Factor of x0 in x.
        variance: Of a value of x around alpha times its centre, (b,).
        modes: Of all classes.
        labels: int64 (b,).

    Returns:
        (b, d, h, w).
    """
    distances = [(x - alpha * modes.centres[labels, j]).flatten(1).square().sum(1) for j in range(modes.count)]
    logits = modes.weights[labels].log() - torch.stack(distances, 1) / (2 * variance[:, None])  # (b, m)
    probabilities = logits.softmax(1)
    mean = torch.zeros_like(x)
    for j in range(modes.count):
        mean = mean + _each(probabilities[:, j], x) * modes.centres[labels, j]
    return mean


def to_output_shift(shift: Tensor, alpha: Factor, sigma: Factor, prediction_type: str) -> Tensor:
    """Converts a change of x0 at given latents to that of the UNet's output: `to_x0_and_noise` turned round."""
    return -shift * (alpha / sigma if prediction_type == "epsilon" else 1 / sigma)


def _each(values: Tensor, like: Tensor) -> Tensor:
    """Shapes one value an image, (b,), so that it multiplies `like`, (b, d, h, w)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
