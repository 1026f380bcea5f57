"""Samplers and guidance: against closed forms and diffusers, number of evaluations, order of the error."""

from __future__ import annotations

import itertools
import math
import typing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from ddgen.config import DenoiserConfig, Sampler
from ddgen.diffusion.guidance import guided_denoiser
from ddgen.diffusion.objective import build_scheduler, target
from ddgen.diffusion.samplers import CLEAN, Level, Schedule, follow, num_evaluations, solve, trailing_timesteps

KINDS = ["v_prediction", "epsilon", "flow_prediction"]
SAMPLERS = typing.get_args(Sampler)
MEAN = torch.tensor([1.5, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
WEIGHTS = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3


def scheduler_of(prediction_type: str, **settings: float):
    return build_scheduler(DenoiserConfig(prediction_type=prediction_type, **settings))  # type: ignore[arg-type]


def schedule_of(prediction_type: str) -> Schedule:
    return Schedule.of(scheduler_of(prediction_type))


def gaussian_denoiser(alpha_sigma, kind: str):
    """The optimal denoiser when the two channels of the data are N(MEAN, COVARIANCE), in closed form.

    `alpha_sigma` maps a time to the noise level.
    """

    def denoise(x: Tensor, time: float) -> Tensor:
        alpha, sigma = (torch.tensor(value, dtype=torch.float64) for value in alpha_sigma(time))
        gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2))
        mean = MEAN[:, None, None]
        x0 = mean + torch.einsum("ij,bjhw->bihw", gain, x.double() - alpha * mean)
        return target(x0, (x - alpha * x0) / sigma, alpha, sigma, kind)

    return denoise


def denoiser_on(schedule: Schedule):
    tables = (schedule.alphas.numpy(), schedule.sigmas.numpy())
    return gaussian_denoiser(
        lambda time: [np.interp(time, schedule.times.numpy(), table) for table in tables], schedule.prediction_type
    )


def gaussian_flow(x: Tensor, start: Level, end: Level = CLEAN) -> Tensor:
    """Where that denoiser takes latents in infinitely many steps.

    Along the eigenvectors of the covariance, of variance s^2, the flow keeps (x - alpha MEAN) in proportion to
    sqrt(alpha^2 s^2 + sigma^2).
    """
    values, vectors = torch.linalg.eigh(COVARIANCE)
    spread = [(level.alpha**2 * values + level.sigma**2).sqrt()[:, None, None] for level in (start, end)]
    mean = MEAN[:, None, None]
    centred = torch.einsum("ji,bjhw->bihw", vectors, x - start.alpha * mean)
    return end.alpha * mean + torch.einsum("ij,bjhw->bihw", vectors, centred * spread[1] / spread[0])


def standard_noise(count: int) -> Tensor:
    """Noise (count, 2, 1, 1) whose mean is exactly 0 and whose covariance is exactly 1."""
    flat = torch.randn(count, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    flat = (flat - flat.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(flat.T.cov(correction=0)).T)
    return flat.reshape(count, 2, 1, 1)


def some_denoiser(x: Tensor, time: float) -> Tensor:
    return torch.tanh(torch.einsum("ij,bjhw->bihw", WEIGHTS.to(x.dtype), x) + time / 1000)


# --- steps


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 333, 999, 1000])
def test_timesteps_start_at_the_noisiest_and_never_repeat(steps: int) -> None:
    timesteps = trailing_timesteps(1000, steps)
    assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0
    assert all(later < earlier for earlier, later in itertools.pairwise(timesteps))


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps {steps}: expected 1 to 1000"):
        solve(some_denoiser, torch.zeros(1, 4, 1, 1), schedule_of("v_prediction"), steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_number_of_steps_is_finite_and_costs_what_it_says(sampler: str, kind: str) -> None:
    schedule, asked = schedule_of(kind), list[float]()

    def counted(x: Tensor, time: float) -> Tensor:
        asked.append(time)
        return some_denoiser(x, time)

    noise = torch.randn(2, 4, 1, 1, generator=torch.Generator().manual_seed(1))
    for steps in (1, 2, 3, 7, 333, 999, 1000) if kind == "v_prediction" else (1, 2, 3, 7, 333):
        asked.clear()
        latents = solve(counted, noise, schedule, steps, sampler)
        assert latents.isfinite().all() and latents.dtype == torch.float32
        assert len(asked) == num_evaluations(sampler, steps) == (2 * steps - 1 if sampler == "heun" else steps)
        assert len(set(asked)) == steps and asked[0] == schedule.times[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_step_is_the_estimate_of_the_clean_latents(kind: str) -> None:
    schedule, noise = schedule_of(kind), standard_noise(5)
    alpha, sigma = schedule.alphas[-1], schedule.sigmas[-1]
    gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2))
    expected = MEAN + (noise.flatten(1) - alpha * MEAN) @ gain.T
    for sampler in SAMPLERS:
        found = solve(denoiser_on(schedule), noise, schedule, 1, sampler)
        assert torch.allclose(found.flatten(1), expected, atol=1e-9)


# --- accuracy


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_samplers_reach_an_analytic_gaussian(kind: str, sampler: str) -> None:
    schedule, noise = schedule_of(kind), standard_noise(500)
    start = schedule.path(1)[0]
    errors = []
    for steps in (10, 100):
        x = solve(denoiser_on(schedule), noise, schedule, steps, sampler)
        errors.append((x - gaussian_flow(noise, start)).square().mean().sqrt().item())
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / (4 if sampler == "ddim" else 8)
    x = x.flatten(1)
    drift = schedule.alphas[-1].item()  # the last timestep is not quite noise, and sampling starts as if it were
    assert (x.mean(0) - MEAN).abs().max() < 0.02 + 1.5 * drift
    assert (x.T.cov(correction=0) - COVARIANCE).abs().max() < 0.02 + drift**2


ORDERS = {"ddim": 1, "dpmsolver++": 2, "unipc": 3, "heun": 2, "ipndm": 2}  # UniC raises UniP's order by one


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction"])
def test_error_falls_at_the_order_of_the_method(kind: str, sampler: str) -> None:
    """Between two noise levels, not to the noiseless end, where every sampler jumps from a level that steps change."""

    def alpha_sigma(time: float) -> tuple[float, float]:
        u = time / 1000
        return (1 - u, u) if kind == "flow_prediction" else (math.cos(u * math.pi / 2), math.sin(u * math.pi / 2))

    x, errors = standard_noise(50), []
    counts = [20, 40, 80, 160]
    for steps in counts:
        times = [1000 * (0.9 - 0.8 * i / steps) for i in range(steps + 1)]
        path = [Level(*alpha_sigma(time), time) for time in times]
        found = follow(gaussian_denoiser(alpha_sigma, kind), x, path, kind, sampler)
        errors.append((found - gaussian_flow(x, path[0], path[-1])).square().mean().sqrt().item())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - ORDERS[sampler]) < 0.25


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_float32_is_enough_from_the_noisiest_timestep_on(sampler: str, kind: str) -> None:
    """Sigma / alpha is 20,000 there on the cosine schedule, infinite in rectified flow: no step may multiply by it."""
    noise, schedule = torch.randn(50, 4, 1, 1, generator=torch.Generator().manual_seed(3)), schedule_of(kind)
    for steps in (2, 10, 200):
        rough, fine = (solve(some_denoiser, x, schedule, steps, sampler) for x in (noise, noise.double()))
        assert torch.allclose(rough, fine.float(), rtol=1e-3, atol=1e-3 * float(fine.std()))


# --- randomness


@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction"])
def test_stochastic_ddim_keeps_the_covariance(kind: str) -> None:
    schedule, count = schedule_of(kind), 4000
    source = torch.Generator().manual_seed(5)

    def draw() -> Tensor:
        return torch.randn(count, 2, 1, 1, generator=source, dtype=torch.float64)

    x = solve(denoiser_on(schedule), draw(), schedule, 150, eta=1.0, draw=draw).flatten(1)
    bars = (torch.outer(COVARIANCE.diag(), COVARIANCE.diag()) + COVARIANCE**2).div(count).sqrt()  # of a covariance
    assert ((x.T.cov() - COVARIANCE).abs() < 4 * bars + 0.01).all()
    assert (x.mean(0) - MEAN).abs().max() < 4 * (0.5 / count) ** 0.5 + 0.01


def test_fresh_noise_belongs_to_ddim() -> None:
    schedule, noise = schedule_of("v_prediction"), torch.zeros(1, 4, 1, 1)
    with pytest.raises(ValueError, match=r"eta 0\.5: only ddim"):
        solve(some_denoiser, noise, schedule, 5, "unipc", eta=0.5, draw=lambda: noise)
    with pytest.raises(ValueError, match="where to draw it from"):
        solve(some_denoiser, noise, schedule, 5, "ddim", eta=0.5)
    with pytest.raises(ValueError, match="sampler plms: unknown; one of ddim"):
        solve(some_denoiser, noise, schedule, 5, "plms")


# --- against diffusers


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_ddim_is_diffusers_ddim_at_50_steps(kind: str, eta: float) -> None:
    scheduler = scheduler_of(kind)
    drawn = torch.randn(50, 3, 4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fresh = iter(drawn[1:])
    ours = solve(some_denoiser, drawn[0], Schedule.of(scheduler), 50, eta=eta, draw=lambda: next(fresh))
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == trailing_timesteps(1000, 50)
    x, fresh = drawn[0], iter([*drawn[1:], torch.zeros_like(drawn[0])])
    for t in scheduler.timesteps:
        noise = next(fresh) if eta else None
        x = scheduler.step(some_denoiser(x, float(t)), t, x, eta=eta, variance_noise=noise).prev_sample
    assert torch.allclose(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_ddim_of_a_flow_is_diffusers_euler(shift: float) -> None:
    scheduler = scheduler_of("flow_prediction", flow_shift=shift)
    noise = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    ours = solve(some_denoiser, noise, Schedule.of(scheduler), 40)
    scheduler.set_timesteps(sigmas=[(40 - i) / 40 for i in range(40)])  # diffusers shifts them
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(some_denoiser(x, float(t)), t, x).prev_sample
    assert torch.allclose(ours, x, atol=1e-5)


def levels_of(reference, kind: str) -> list[Level]:
    """The noise levels of one of diffusers' solvers, as our path; theirs of a flow are not trailing ones."""
    path = []
    for i, sigma in enumerate(dict.fromkeys(reference.sigmas.double().tolist())):  # Heun's stand there twice
        alpha = 1 - sigma if kind == "flow_prediction" else 1 / math.sqrt(1 + sigma**2)
        time = 1000 * sigma if kind == "flow_prediction" else float(reference.timesteps[min(i, 11)])
        path.append(Level(alpha, sigma if kind == "flow_prediction" else alpha * sigma, time) if sigma else CLEAN)
    return path


# diffusers' solvers make a NumPy array of a tensor, and torch's Tensor.__array__ takes no `copy`
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize(("kind", "shift"), [("v_prediction", 1.0), ("flow_prediction", 1.0), ("flow_prediction", 3.0)])
@pytest.mark.parametrize("sampler", ["dpmsolver++", "unipc"])
def test_multistep_solvers_are_diffusers_own(sampler: str, kind: str, shift: float) -> None:
    flow = kind == "flow_prediction"
    solver = {"dpmsolver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[sampler]
    reference = solver(
        beta_schedule="squaredcos_cap_v2", prediction_type=kind, timestep_spacing="trailing", use_flow_sigmas=flow,
        flow_shift=shift, solver_order=2, final_sigmas_type="zero",
    )  # fmt: skip
    reference.set_timesteps(12)
    path = levels_of(reference, kind)
    if not flow:
        ours = schedule_of(kind).path(12)
        assert [level.time for level in path[:-1]] == [level.time for level in ours[:-1]]
        assert np.allclose([level.sigma for level in path], [level.sigma for level in ours], atol=1e-6)
    x = noise = torch.randn(8, 2, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    denoise = denoiser_on(schedule_of(kind))
    found = follow(denoise, noise, path, kind, sampler)
    for t, level in zip(reference.timesteps, path[:-1], strict=True):
        x = reference.step(denoise(x, level.time), t, x).prev_sample
    assert torch.allclose(found, x, rtol=1e-4, atol=1e-5)


def test_heun_of_a_flow_is_diffusers_own() -> None:
    reference = FlowMatchHeunDiscreteScheduler(shift=2.0)
    reference.set_timesteps(12)
    path = levels_of(reference, "flow_prediction")
    x = noise = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = follow(some_denoiser, noise, path, "flow_prediction", "heun")
    for t in reference.timesteps:
        x = reference.step(some_denoiser(x, float(t)), t, x).prev_sample
    assert len(reference.timesteps) == num_evaluations("heun", 12)
    assert torch.allclose(found, x, rtol=1e-4, atol=1e-4)


def test_ipndm_is_diffusers_own() -> None:
    """Its "trained betas" are the sigmas. Not from the noisiest level, where its float32 alpha is 0."""
    path = schedule_of("v_prediction").path(13)[1:]
    reference = IPNDMScheduler(trained_betas=[level.sigma for level in path])
    reference.set_timesteps(12)
    x = noise = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = follow(some_denoiser, noise, [*path[:-1], Level(1.0, 0.0, -1.0)], "v_prediction", "ipndm")
    for t, level in zip(reference.timesteps, path[:-1], strict=True):
        x = reference.step(some_denoiser(x, level.time), t, x).prev_sample
    assert torch.allclose(found, x, rtol=1e-4, atol=1e-4)


# --- guidance


class CountingUNet:
    """Outputs the class label, times a factor, everywhere, and counts what it is asked."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.batches = factor, list[int]()

    def __call__(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> SimpleNamespace:
        self.batches.append(len(latents))
        return SimpleNamespace(sample=self.factor * labels.reshape(-1, 1, 1, 1).expand_as(latents).float())


def guided(unet: CountingUNet, labels: list[int], null: int, scale: float, interval, kind="v_prediction", guide=None):
    schedule = schedule_of(kind)
    return guided_denoiser(
        unet, torch.tensor(labels), null_label=null, scale=scale, interval=interval, schedule=schedule, guide=guide
    )


def test_guidance_by_hand_and_only_inside_its_interval() -> None:
    unet, latents = CountingUNet(), torch.zeros(2, 1, 1, 1)
    denoise = guided(unet, [2, 4], 10, 3.0, (0.3, 0.8))
    inside = denoise(latents, 499).flatten().tolist()
    assert inside == [10 + 3 * (2 - 10), 10 + 3 * (4 - 10)]
    for outside in (298, 800):
        assert denoise(latents, outside).flatten().tolist() == [2, 4]
    denoise(latents, 299), denoise(latents, 799)
    assert unet.batches == [4, 2, 2, 4, 4]


def test_autoguidance_by_hand_and_only_inside_its_interval() -> None:
    unet, guide, latents = CountingUNet(), CountingUNet(0.5), torch.zeros(2, 1, 1, 1)
    denoise = guided(unet, [2, 4], 10, 3.0, (0.3, 0.8), guide=guide)
    assert denoise(latents, 499).flatten().tolist() == [1 + 3 * (2 - 1), 2 + 3 * (4 - 2)]
    assert denoise(latents, 298).flatten().tolist() == [2, 4]
    assert unet.batches == [2, 2] and guide.batches == [2]


def test_the_interval_of_a_flow_is_its_own_time_and_starts_at_pure_noise() -> None:
    unet = CountingUNet()
    denoise = guided(unet, [1], 3, 2.0, (0.5, 1.0), "flow_prediction")
    for time in (499.0, 500.0, 1000.0):
        denoise(torch.zeros(1, 1, 1, 1), time)
    assert unet.batches == [1, 2, 2]


def test_guidance_of_one_is_one_forward() -> None:
    unet, guide = CountingUNet(), CountingUNet()
    assert guided(unet, [1], 3, 1.0, (0, 1))(torch.zeros(1, 1, 1, 1), 500).item() == 1
    assert guided(unet, [1], 3, 1.0, (0, 1), guide=guide)(torch.zeros(1, 1, 1, 1), 500).item() == 1
    assert unet.batches == [1, 1] and not guide.batches
