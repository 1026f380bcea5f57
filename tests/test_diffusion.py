"""Diffusion room: schedule, objective, averages, the UNet."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ddgen.config import DenoiserConfig, OptimizerConfig
from ddgen.diffusion.ema import PowerEMA, std_to_gamma
from ddgen.diffusion.objective import add_noise, build_scheduler, draw, learning_rate, loss_weights, target
from ddgen.diffusion.samplers import Schedule, to_x0_and_noise
from ddgen.diffusion.training import best_ema
from ddgen.diffusion.unet import build_unet
from ddgen.errors import UserError

CPU = torch.device("cpu")
CONFIG = DenoiserConfig(preset="xs", unet_channels=(32, 32), unet_layers_per_block=1)


KINDS = ["v_prediction", "epsilon", "flow_prediction"]


def scheduler_of(prediction_type: str, **settings: float):
    return build_scheduler(DenoiserConfig(prediction_type=prediction_type, **settings))  # type: ignore[arg-type]


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
