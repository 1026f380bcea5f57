"""Diffusion room: schedule, objective, samplers, guidance, averages, the exported generator."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ddgen.autoencoder.autoencoder import identity, wrap
from ddgen.autoencoder.patch_autoencoder import PatchAutoencoderKL
from ddgen.config import DenoiserConfig, GuidanceConfig, OptimizerConfig
from ddgen.diffusion.ema import PowerEMA, std_to_gamma
from ddgen.diffusion.generator import Generator, load_generator, save_generator
from ddgen.diffusion.objective import add_noise, build_scheduler, draw, learning_rate, loss_weights, target
from ddgen.diffusion.pipeline import Schedule, ddim, ddim_timesteps, guide, solve, to_x0_and_noise
from ddgen.diffusion.training import best_ema
from ddgen.diffusion.unet import build_unet
from ddgen.errors import UserError

CPU = torch.device("cpu")
CONFIG = DenoiserConfig(preset="xs", unet_channels=(32, 32), unet_layers_per_block=1)


KINDS = ["v_prediction", "epsilon", "flow_prediction"]
MEAN = torch.tensor([1.5, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)


def scheduler_of(prediction_type: str, **settings: float):
    return build_scheduler(DenoiserConfig(prediction_type=prediction_type, **settings))  # type: ignore[arg-type]


def gaussian_denoiser(schedule: Schedule):
    """The optimal denoiser when the two channels of the data are N(MEAN, COVARIANCE), in closed form."""

    def denoise(x: Tensor, time: float) -> Tensor:
        alpha, sigma = (
            torch.tensor(np.interp(time, schedule.times, table)) for table in (schedule.alphas, schedule.sigmas)
        )
        gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2))
        mean = MEAN[:, None, None]
        x0 = mean + torch.einsum("ij,bjhw->bihw", gain, x.double() - alpha * mean)
        return target(x0, (x - alpha * x0) / sigma, alpha, sigma, schedule.prediction_type)

    return denoise


def gaussian_flow(noise: Tensor, schedule: Schedule) -> Tensor:
    """Where that denoiser takes noise in infinitely many steps: from the last timestep's marginal to the data's.

    Along the eigenvectors of the covariance the flow is MEAN + s (x - alpha MEAN) / sqrt(alpha^2 s^2 + sigma^2).
    """
    values, vectors = torch.linalg.eigh(COVARIANCE)
    alpha, sigma = schedule.alphas[-1], schedule.sigmas[-1]
    centred = torch.einsum("ji,bjhw->bihw", vectors, noise - alpha * MEAN[:, None, None])
    scaled = centred * (values / (alpha**2 * values + sigma**2)).sqrt()[:, None, None]
    return MEAN[:, None, None] + torch.einsum("ij,bjhw->bihw", vectors, scaled)


def test_cosine_schedule_is_the_papers_formula() -> None:
    ours = scheduler_of("v_prediction").alphas_cumprod.double()
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    betas = [min(1 - f[t + 1] / f[t], 0.999) for t in range(1000)]
    expected = torch.tensor(np.cumprod(1 - np.array(betas)))
    assert torch.allclose(ours, expected, rtol=2e-4, atol=1e-9)


def test_noise_is_predicted_on_a_schedule_that_keeps_some_signal() -> None:
    schedule = Schedule.of(scheduler_of("epsilon"))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert np.allclose(schedule.alphas, np.sqrt(np.cumprod(1 - betas)), rtol=1e-4)
    assert schedule.alphas[-1].item() == pytest.approx(0.0683, abs=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rectified_flow_is_diffusers_flow(shift: float) -> None:
    scheduler = scheduler_of("flow_prediction", flow_shift=shift)
    schedule = Schedule.of(scheduler)
    assert torch.allclose(schedule.sigmas.flip(0).float(), scheduler.sigmas)
    assert torch.allclose(schedule.times.flip(0).float(), scheduler.timesteps)
    assert torch.equal(schedule.alphas + schedule.sigmas, torch.ones(1000, dtype=torch.float64))
    middle = schedule.sigmas[499].item()
    assert middle == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))
    assert schedule.level(float(schedule.times[499])) == pytest.approx(middle)
    x0, noise = torch.randn(2, 3, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([0, 499, 999])
    ours = add_noise(x0, noise, schedule.alphas[at].float(), schedule.sigmas[at].float())
    assert torch.allclose(ours, scheduler.scale_noise(x0, scheduler.timesteps[999 - at], noise), atol=1e-6)


def test_a_shift_without_flow_is_refused() -> None:
    with pytest.raises(UserError, match=r"--flow_shift 3\.0: only for --prediction_type flow_prediction"):
        scheduler_of("v_prediction", flow_shift=3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_target_is_what_recovers_clean_latents_and_noise(kind: str) -> None:
    x0, noise = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.4, 0.6, 0.8, 0.95])
    alpha = 1 - sigma if kind == "flow_prediction" else (1 - sigma**2).sqrt()
    x = add_noise(x0, noise, alpha, sigma)
    output = target(x0, noise, alpha, sigma, kind)
    shaped = (alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1))
    got_x0, got_noise = to_x0_and_noise(output, x, *shaped, kind)
    assert torch.allclose(got_x0, x0, atol=1e-5) and torch.allclose(got_noise, noise, atol=1e-5)


def test_noising_and_velocity_agree_with_diffusers() -> None:
    scheduler = scheduler_of("v_prediction")
    schedule = Schedule.of(scheduler).to(CPU, torch.float32)
    x0, noise = torch.randn(2, 6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 10, 300, 700, 990, 999])
    alpha, sigma = schedule.alphas[t], schedule.sigmas[t]
    assert torch.allclose(add_noise(x0, noise, alpha, sigma), scheduler.add_noise(x0, noise, t), atol=1e-6)
    velocity = target(x0, noise, alpha, sigma, "v_prediction")
    assert torch.allclose(velocity, scheduler.get_velocity(x0, noise, t), atol=1e-6)


def test_min_snr_weights_by_hand() -> None:
    a = torch.tensor([0.9, 0.5])  # snr 9 and 1
    preserving = (a.sqrt(), (1 - a).sqrt())
    assert loss_weights(*preserving, "v_prediction", 5.0).tolist() == pytest.approx([5 / 10, 1 / 2])
    assert loss_weights(*preserving, "epsilon", 5.0).tolist() == pytest.approx([5 / 9, 1])
    assert loss_weights(*preserving, "v_prediction", None).tolist() == [1.0, 1.0]
    t = torch.tensor([0.25, 0.5, 0.8])  # snr 9, 1 and 1/16
    assert loss_weights(1 - t, t, "flow_prediction", 5.0).tolist() == pytest.approx([5 / 16, 1 / 4, 0.04])


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_error_of_x0_alike_for_every_prediction(kind: str) -> None:
    """The same error of x0 costs min(snr, gamma) whatever the network predicts."""
    x0, noise, wrong = torch.randn(3, 1, 4, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for sigma in (0.2, 0.5, 0.9):
        sigma_t = torch.tensor([sigma], dtype=torch.float64)
        alpha = 1 - sigma_t if kind == "flow_prediction" else (1 - sigma_t**2).sqrt()
        x = add_noise(x0, noise, alpha, sigma_t)
        output = target(x0, noise, alpha, sigma_t, kind) + wrong
        got, _ = to_x0_and_noise(output, x, alpha, sigma_t, kind)
        cost = loss_weights(alpha, sigma_t, kind, 5.0) * wrong.square().mean()
        snr = (alpha / sigma_t).item() ** 2
        assert cost.item() == pytest.approx(min(snr, 5.0) * (got - x0).square().mean().item(), rel=1e-9)


def test_logit_normal_timesteps_have_the_stated_quantiles() -> None:
    config = DenoiserConfig(logit_mean=0.5, logit_std=0.8, class_dropout=0.1)
    draws = draw(config, 0, 3, (20_000, 1, 1, 1), 1000)
    for quantile, z in ((0.5, 0.0), (0.8413447, 1.0), (0.1586553, -1.0)):
        expected = 1000 / (1 + math.exp(-(0.5 + 0.8 * z)))
        assert torch.quantile(draws.timesteps.float(), quantile).item() == pytest.approx(expected, abs=12)
    assert draws.dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert draws.mirrored.float().mean().item() == pytest.approx(0.5, abs=0.02)
    again = draw(config, 0, 3, (20_000, 1, 1, 1), 1000)
    other = draw(config, 0, 4, (20_000, 1, 1, 1), 1000)
    assert torch.equal(again.noise, draws.noise) and not torch.equal(other.noise, draws.noise)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 333, 999, 1000])
def test_timesteps_start_at_the_noisiest_and_never_repeat(steps: int) -> None:
    timesteps = ddim_timesteps(1000, steps)
    assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0
    assert all(later < earlier for earlier, later in itertools.pairwise(timesteps))


WEIGHTS = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3


def some_denoiser(x: Tensor, time: float) -> Tensor:
    return torch.tanh(torch.einsum("ij,bjhw->bihw", WEIGHTS.to(x.dtype), x) + time / 1000)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_ddim_is_diffusers_ddim_at_50_steps(kind: str) -> None:
    scheduler = scheduler_of(kind)
    noise = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = ddim(some_denoiser, noise, Schedule.of(scheduler), 50)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == ddim_timesteps(1000, 50)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(some_denoiser(x, float(t)), t, x).prev_sample
    assert torch.allclose(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_ddim_of_a_flow_is_diffusers_euler(shift: float) -> None:
    scheduler = scheduler_of("flow_prediction", flow_shift=shift)
    noise = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    ours = ddim(some_denoiser, noise, Schedule.of(scheduler), 40)
    scheduler.set_timesteps(sigmas=[(40 - i) / 40 for i in range(40)])  # diffusers shifts them
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(some_denoiser(x, float(t)), t, x).prev_sample
    assert torch.allclose(ours, x, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "unipc"])
@pytest.mark.parametrize("kind", KINDS)
def test_samplers_reach_an_analytic_gaussian(kind: str, sampler: str) -> None:
    scheduler = scheduler_of(kind)
    schedule = Schedule.of(scheduler)
    noise = torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    flat = noise.flatten(1)
    flat = (flat - flat.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(flat.T.cov(correction=0)).T)
    noise = flat.reshape(noise.shape)  # mean exactly 0, covariance exactly 1
    errors = []
    for steps in (10, 100):
        x = solve(gaussian_denoiser(schedule), noise, scheduler, steps, sampler)
        errors.append((x - gaussian_flow(noise, schedule)).square().mean().sqrt().item())
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 2
    x = x.flatten(1)
    drift = schedule.alphas[-1].item()  # the last timestep is not quite noise, and sampling starts as if it were
    assert (x.mean(0) - MEAN).abs().max() < 0.02 + 1.5 * drift
    assert (x.T.cov(correction=0) - COVARIANCE).abs().max() < 0.02 + drift**2


@pytest.mark.parametrize(("kind", "shift"), [("v_prediction", 1.0), ("flow_prediction", 1.0), ("flow_prediction", 3.0)])
def test_dpm_solver_is_diffusers_own(kind: str, shift: float) -> None:
    scheduler = scheduler_of(kind, flow_shift=shift)
    flow = kind == "flow_prediction"
    reference = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=kind, timestep_spacing="trailing", use_flow_sigmas=flow,
        flow_shift=shift,
    )  # fmt: skip
    noise = torch.randn(8, 2, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    denoise = gaussian_denoiser(Schedule.of(scheduler))
    ours = solve(denoise, noise, scheduler, 12, "dpmsolver++")
    reference.set_timesteps(12)
    times = reference.sigmas[:-1] * 1000 if flow else reference.timesteps
    x = noise
    for t, time in zip(reference.timesteps, times, strict=True):
        x = reference.step(denoise(x, float(time)), t, x).prev_sample
    assert torch.allclose(ours, x)


class CountingUNet:
    """Outputs the class label everywhere and counts what it is asked."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> SimpleNamespace:
        self.batches.append(len(latents))
        return SimpleNamespace(sample=labels.reshape(-1, 1, 1, 1).expand_as(latents).float())


def test_guidance_by_hand_and_only_inside_its_interval() -> None:
    unet, labels, latents = CountingUNet(), torch.tensor([2, 4]), torch.zeros(2, 1, 1, 1)
    denoise = guide(
        unet, labels, null_label=10, guidance_scale=3.0, guidance_interval=(0.3, 0.8),
        schedule=Schedule.of(scheduler_of("v_prediction")),
    )  # fmt: skip
    inside = denoise(latents, 499).flatten().tolist()
    assert inside == [10 + 3 * (2 - 10), 10 + 3 * (4 - 10)]
    for outside in (298, 800):
        assert denoise(latents, outside).flatten().tolist() == [2, 4]
    denoise(latents, 299), denoise(latents, 799)
    assert unet.batches == [4, 2, 2, 4, 4]


def test_the_interval_of_a_flow_is_its_own_time_and_starts_at_pure_noise() -> None:
    unet = CountingUNet()
    schedule = Schedule.of(scheduler_of("flow_prediction"))
    denoise = guide(unet, torch.tensor([1]), 3, 2.0, (0.5, 1.0), schedule)
    for time in (499.0, 500.0, 1000.0):
        denoise(torch.zeros(1, 1, 1, 1), time)
    assert unet.batches == [1, 2, 2]


def test_guidance_of_one_is_one_forward() -> None:
    unet = CountingUNet()
    denoise = guide(
        unet, torch.tensor([1]), null_label=3, guidance_scale=1.0, guidance_interval=(0, 1),
        schedule=Schedule.of(scheduler_of("v_prediction")),
    )  # fmt: skip
    assert denoise(torch.zeros(1, 1, 1, 1), 500).item() == 1
    assert unet.batches == [1]


def test_unet_starts_at_zero_and_knows_the_null_class() -> None:
    torch.manual_seed(0)
    unet = build_unet(DenoiserConfig(preset="xs"), latent_channels=4, latent_size=8, num_classes=3)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    assert unet(x, t, torch.tensor([0, 3])).sample.abs().max() == 0
    assert unet.class_embedding.weight.shape[0] == 4
    assert unet.class_embedding.weight.std().item() == pytest.approx(0.02, rel=0.2)
    from diffusers.models.attention_processor import Attention

    attention = [module for module in unet.modules() if isinstance(module, Attention)]
    assert {module.inner_dim // module.heads for module in attention} == {64}
    assert all(module.to_out[0].weight.abs().max() == 0 for module in attention)
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(4.95e6, rel=0.02)


@pytest.mark.parametrize(
    ("size", "channels", "attended"),
    [
        (8, (64, 128, 128), [4, 2]),
        (16, (64, 128, 128), [8, 4]),
        (32, (64, 128, 128), [16, 8]),
        (64, (64, 128, 128, 128), [16, 8]),
    ],
)
def test_presets_end_at_8_px_or_below_and_attend_from_16_px(size: int, channels: tuple, attended: list[int]) -> None:
    unet = build_unet(DenoiserConfig(preset="xs"), latent_channels=3, latent_size=size, num_classes=3)
    assert unet.config.block_out_channels == channels
    kinds = unet.config.down_block_types
    assert [size >> i for i, kind in enumerate(kinds) if kind == "AttnDownBlock2D"] == attended


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unet_channels": (48,)}, "--unet_channels 48: widths must be multiples of 32"),
        ({"unet_channels": (32, 32, 32, 32, 32)}, "5 resolutions do not fit 8 x 8 latents"),
        ({"unet_attention_levels": (3,)}, "--unet_attention_levels 3: resolutions are 0 to 2"),
    ],
)
def test_wrong_unet_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_unet(DenoiserConfig(preset="xs", **settings), latent_channels=4, latent_size=8, num_classes=3)
    assert message in str(error.value)


def test_ema_exponents_are_the_papers() -> None:
    # Karras et al. 2024, section 3.1: "sigma_rel 0.05 and 0.10 ... gamma of 16.97 and 6.94".
    assert std_to_gamma(0.05) == pytest.approx(16.97, abs=0.01)
    assert std_to_gamma(0.10) == pytest.approx(6.94, abs=0.01)


def test_power_ema_is_the_weighted_mean_of_all_weights() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = PowerEMA([weight], (0.1,))
    values = np.random.default_rng(0).normal(size=400)
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            weight.fill_(value)
        ema.update(step)
    profile = np.arange(1, 401) ** std_to_gamma(0.1)
    assert ema.averages[0.1][0].item() == pytest.approx((profile * values).sum() / profile.sum(), abs=0.02)
    copied = torch.nn.Parameter(torch.zeros(1))
    ema.copy_to(0.1, [copied])
    assert copied.item() == ema.averages[0.1][0].item()


def test_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    optim = OptimizerConfig(learning_rate=1.0, max_train_steps=100, lr_warmup_steps=10, lr_decay_fraction=0.4)
    rates = [learning_rate(optim, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[60] == 1.0
    assert rates[80] == pytest.approx(0.5) and rates[99] == pytest.approx(1 / 40) and rates[100] == 0


def test_best_ema_is_the_one_with_the_lowest_last_distance() -> None:
    distances = {"ema_0.05": [(1, 9.0), (2, 5.0)], "ema_0.1": [(1, 4.0), (2, 6.0)]}
    assert best_ema(distances, (0.05, 0.1)) == 0.05
    assert best_ema({}, (0.05, 0.1)) == 0.05


@pytest.fixture
def generator() -> Generator:
    """A small random generator with outputs that depend on class and noise."""
    torch.manual_seed(0)
    unet = build_unet(CONFIG, latent_channels=4, latent_size=4, num_classes=3)
    for parameter in unet.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    torch.nn.init.normal_(unet.class_embedding.weight)
    vae = PatchAutoencoderKL(latent_channels=4, downsample=4, block_out_channels=())
    autoencoder = wrap(vae, CPU, "no").with_statistics(torch.arange(4.0) / 10, torch.arange(1.0, 5.0))
    sampling = GuidanceConfig(num_inference_steps=6, guidance_scale=2.0)
    return Generator(
        unet.eval().requires_grad_(False),
        autoencoder,
        scheduler_of("v_prediction"),
        ("ant", "bee", "cat"),
        16,
        sampling,
        "no",
    )


def test_an_image_depends_on_seed_class_and_index_only(generator: Generator) -> None:
    labels, indices = torch.arange(32) % 3, torch.arange(32) // 3
    together = generator.sample(labels, indices, seed=0)
    apart = torch.cat([generator.sample(a, b, seed=0) for a, b in zip(labels.split(8), indices.split(8), strict=True)])
    assert (together.int() - apart.int()).abs().max() <= 1
    assert torch.equal(together, generator.sample(labels, indices, seed=0))
    other = generator.sample(labels, indices, seed=1)
    assert (together.int() - other.int()).abs().float().mean() > 5
    assert not torch.equal(together[0], together[1]) and not torch.equal(together[0], together[3])
    assert generator.image_size == together.shape[-1] == 16


def test_saved_generator_is_the_same_generator(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path / "generator", "card")
    loaded = load_generator(tmp_path / "generator", CPU, "no")
    assert loaded.fingerprint() == generator.fingerprint()
    assert loaded.class_names == generator.class_names and loaded.sampling == generator.sampling
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(loaded.sample(labels, labels, 5), generator.sample(labels, labels, 5))


def test_a_generator_of_pixels_loads_without_ddgen(generator: Generator, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = build_unet(CONFIG, latent_channels=3, latent_size=16, num_classes=3).eval()
    autoencoder = identity(CPU, "no").with_statistics(torch.zeros(3), torch.ones(3))
    generator = replace(generator, unet=unet, autoencoder=autoencoder)
    save_generator(generator, tmp_path / "generator", "card")
    images = images_without_ddgen(tmp_path / "generator", tmp_path)
    noise = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    latents = ddim(lambda x, _: torch.zeros_like(x), noise, Schedule.of(generator.scheduler), 6)  # the UNet gives zeros
    assert torch.allclose(images, (latents.clamp(-1, 1) + 1) / 2, atol=1e-5)


def test_a_saved_flow_samples_with_diffusers_scheduler_alone(generator: Generator, tmp_path: Path) -> None:
    """UNet and scheduler of the folder, used as diffusers' own examples do."""
    generator = replace(generator, scheduler=scheduler_of("flow_prediction", flow_shift=2.0))
    save_generator(generator, tmp_path / "generator", "card")
    loaded = load_generator(tmp_path / "generator", CPU, "no")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "generator" / "scheduler")
    scheduler.set_timesteps(sigmas=[(5 - i) / 5 for i in range(5)])
    noise, labels = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(loaded.unet(x, t, labels).sample, t, x).prev_sample
    schedule = Schedule.of(loaded.scheduler)
    assert torch.allclose(ddim(guide(loaded.unet, labels, 3, 1.0, (0, 1), schedule), noise, schedule, 5), x, atol=1e-4)


def images_without_ddgen(folder: Path, tmp_path: Path) -> Tensor:
    """Images of classes 0, 1, 2 with seeds 0, 1, 2, in [0, 1], by a process that does not have ddgen."""
    script = f"""
import sys, torch
from diffusers import DiffusionPipeline
folder = {str(folder)!r}
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
assert "ddgen" not in sys.modules
generators = [torch.Generator().manual_seed(i) for i in range(3)]
images = pipe(class_labels=["ant", 1, "cat"], generator=generators).images
assert images[0].size == (16, 16)
pixels = pipe(class_labels=[0, 1, 2], generator=[torch.Generator().manual_seed(i) for i in range(3)], output_type="pt")
torch.save(pixels.images, {str(tmp_path / "images.pt")!r})
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images: Tensor = torch.load(tmp_path / "images.pt")
    return images


@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction"])
def test_generator_loads_and_samples_without_ddgen(generator: Generator, tmp_path: Path, kind: str) -> None:
    generator = replace(generator, scheduler=scheduler_of(kind))
    save_generator(generator, tmp_path / "generator", "card")
    images = images_without_ddgen(tmp_path / "generator", tmp_path)
    noise = torch.stack([torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    labels = torch.tensor([0, 1, 2])
    denoise = guide(
        generator.unet, labels, 3, 2.0, generator.sampling.guidance_interval, Schedule.of(generator.scheduler)
    )
    latents = solve(denoise, noise, generator.scheduler, 6, "ddim")
    expected = (generator.autoencoder.decode(latents) + 1) / 2
    assert torch.allclose(images, expected, atol=1e-4)


def test_unfinished_generator_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_index\.json is missing.*train_ldm"):
        load_generator(tmp_path, CPU, "no")


def test_gradient_checkpointing_gives_the_same_gradients_in_less_memory() -> None:
    config = DenoiserConfig(preset="xs", unet_channels=(32, 64), unet_layers_per_block=2, unet_dropout=0.1)
    torch.manual_seed(0)
    unet = build_unet(config, latent_channels=4, latent_size=8, num_classes=3).train()
    torch.nn.init.normal_(unet.conv_out.weight)
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 9, 500, 999]), torch.tensor([0, 1, 2, 3])

    def gradients_and_bytes() -> tuple[list[Tensor], int]:
        kept = dict[int, int]()
        weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        torch.manual_seed(1)  # of the dropout
        unet.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = unet(x, t, y).sample.square().mean()
        count = sum(kept.values())
        loss.backward()
        return [p.grad.clone() for p in unet.parameters()], count

    expected, before = gradients_and_bytes()
    unet.enable_gradient_checkpointing()
    found, after = gradients_and_bytes()
    assert after < 0.5 * before
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
