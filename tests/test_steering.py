"""Steering: the modes of a class, what they do to a denoiser's estimates, and what an image then depends on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_generator import CPU, NAMES, random_unet, scheduler_of
from torch import Tensor

from ddgen.autoencoder.autoencoder import wrap
from ddgen.autoencoder.latents import LatentCache
from ddgen.autoencoder.patch_autoencoder import PatchAutoencoderKL
from ddgen.cli import run
from ddgen.config import GuidanceConfig
from ddgen.diffusion.generator import Generator, Guide
from ddgen.diffusion.modes import find_modes, load_modes, save_modes
from ddgen.diffusion.samplers import Schedule, solve, to_x0_and_noise
from ddgen.diffusion.steering import Modes, Steering, steered_denoiser, to_output_shift, x0_shift
from ddgen.diffusion.unet import with_contiguous_attention
from ddgen.errors import UserError
from ddgen.precision import memory_format

KINDS = ("v_prediction", "epsilon", "flow_prediction")
SAMPLERS = ("ddim", "dpmsolver++", "unipc", "heun", "ipndm")
VARIANCE = 0.04


def mixture() -> Modes:
    """Two classes of three clusters each, in two dimensions, (2, 3, 2, 1, 1), of unequal weight."""
    corners = torch.tensor([[[2.0, 0.0], [-1.0, 1.5], [-1.0, -1.5]], [[0.0, 2.0], [1.5, -1.0], [-1.5, -1.0]]])
    weights = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2]], dtype=torch.float64)
    return Modes(corners[..., None, None].double(), weights, torch.full((2,), VARIANCE, dtype=torch.float64))


def exact_x0(x: Tensor, alpha: float, sigma: float, modes: Modes, label: int, only: int | None = None) -> Tensor:
    """The mean of x0 given x and class, or given x and one cluster, of the mixture; float64, by Bayes' rule."""
    variance = alpha**2 * VARIANCE + sigma**2
    centres = modes.centres[label]
    given_cluster = [(sigma**2 * centre + alpha * VARIANCE * x) / variance for centre in centres]
    if only is not None:
        return given_cluster[only]
    density = torch.stack([
        w * torch.exp(-(x - alpha * centre).square().sum((1, 2, 3)) / (2 * variance))
        for w, centre in zip(modes.weights[label], centres, strict=True)
    ])  # fmt: skip
    density = density / density.sum(0)
    return sum(p[:, None, None, None] * mean for p, mean in zip(density, given_cluster, strict=True))


def exact_denoiser(schedule: Schedule, modes: Modes, label: int, only: int | None = None):
    """A perfect denoiser of a class, or of one cluster, in the words of the schedule's prediction type."""
    table = {t: i for i, t in enumerate(schedule.times.tolist())}

    def denoise(x: Tensor, time: float) -> Tensor:
        alpha, sigma = (float(values[table[time]]) for values in (schedule.alphas, schedule.sigmas))
        x0 = exact_x0(x, alpha, sigma, modes, label, only)
        noise = (x - alpha * x0) / sigma
        return {"v_prediction": alpha * noise - sigma * x0, "epsilon": noise, "flow_prediction": noise - x0}[
            schedule.prediction_type
        ]

    return denoise


# --- what is done to an estimate


def test_one_step_by_hand() -> None:
    centres = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])[..., None, None]
    modes = Modes(centres, torch.tensor([[0.75, 0.25]]), torch.tensor([0.5]))
    x = torch.tensor([0.5, 1.0]).reshape(1, 2, 1, 1)
    x0 = torch.tensor([0.2, 0.4]).reshape(1, 2, 1, 1)
    alpha, sigma = 0.6, 0.8
    # Of x around alpha times its centre: 0.64 + 0.36 * 0.5 = 0.82, so the gain is 0.64 / 0.82.
    # Square distances: (0.5 - 0.6)^2 + 1 = 1.01 and (0.5 + 0.6)^2 + 1 = 2.21; odds 3 exp(1.2 / 1.64) = 6.2360.
    first = 6.2360 / 7.2360
    for index, mode in ((0, 1.0), (1, -1.0), (4, 1.0)):  # index 4 is of mode 4 mod 2
        pull = torch.tensor([mode - 0.2, -0.4])
        push = torch.tensor([mode - (first - (1 - first)), 0.0])
        expected = 0.64 / 0.82 * (0.1 * pull + 2.0 * push)
        shift = x0_shift(x, x0, alpha, sigma, torch.tensor([0]), torch.tensor([index]), Steering(modes, 0.1, 2.0, 0.5))
        assert torch.allclose(shift.flatten(), expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_to_the_output_moves_x0_and_leaves_the_latents(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, output, shift = (torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=draw) for _ in range(3))
    alpha, sigma = (0.3, 0.7) if kind == "flow_prediction" else (0.6, 0.8)
    before, _ = to_x0_and_noise(output, x, alpha, sigma, kind)
    after, noise = to_x0_and_noise(output + to_output_shift(shift, alpha, sigma, kind), x, alpha, sigma, kind)
    assert torch.allclose(after, before + shift)
    assert torch.allclose(alpha * after + sigma * noise, x)


@pytest.mark.parametrize("kind", KINDS)
def test_diversity_of_strength_1_is_bayes_rule(kind: str) -> None:
    """The exact denoiser of a class, pushed from the other clusters, is the exact denoiser of the one cluster."""
    schedule, modes = Schedule.of(scheduler_of(kind)), mixture()
    x = 1.5 * torch.randn(12, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steering = Steering(modes, 0.0, 1.0, 0.0)
    for label in (0, 1):
        for mode in range(3):
            labels, indices = torch.full((12,), label), torch.full((12,), mode)
            steered = steered_denoiser(exact_denoiser(schedule, modes, label), labels, indices, schedule, steering)
            alone = exact_denoiser(schedule, modes, label, only=mode)
            for level in schedule.path(7)[:-1]:
                assert torch.allclose(steered(x, level.time), alone(x, level.time), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_reach_their_modes_with_every_sampler(kind: str, sampler: str) -> None:
    schedule, modes = Schedule.of(scheduler_of(kind)), mixture()
    noise = torch.randn(300, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, indices = torch.zeros(300, dtype=torch.int64), torch.arange(300)
    plain = exact_denoiser(schedule, modes, 0)

    def ends(mode_strength: float, diversity_strength: float, until: float) -> tuple[Tensor, float, float]:
        """Samples, which part of them is nearest to its own mode, and how far they are from it (per dimension)."""
        steering = Steering(modes, mode_strength, diversity_strength, until)
        x = solve(steered_denoiser(plain, labels, indices, schedule, steering), noise, schedule, 15, sampler)
        distances = (x[:, None] - modes.centres[0]).flatten(2).square().sum(2)  # (n, 3)
        own = distances.gather(1, (indices % 3)[:, None])
        return x, (distances.argmin(1) == indices % 3).double().mean().item(), own.mean().item() / 2

    _, at_home, _ = ends(0.0, 0.0, 0.0)
    assert at_home == pytest.approx(1 / 3, abs=0.08)  # not steered, a third is of its mode by chance
    x, _, spread = ends(0.0, 1.0, 0.0)
    for mode in range(3):  # spread over the clusters as if each were sampled alone: none is narrowed
        alone = solve(exact_denoiser(schedule, modes, 0, only=mode), noise[mode::3], schedule, 15, sampler)
        assert torch.allclose(x[mode::3], alone, atol=1e-6)
    _, at_home, narrower = ends(0.5, 1.0, 0.1)
    assert at_home > 0.97 and narrower < 0.9 * spread  # the pull draws to the middle


def test_nothing_is_steered_at_the_level_and_below() -> None:
    schedule, modes = Schedule.of(scheduler_of("v_prediction")), mixture()
    x, labels, indices = torch.randn(3, 2, 1, 1), torch.zeros(3, dtype=torch.int64), torch.arange(3)
    plain = exact_denoiser(schedule, modes, 0)
    steered = steered_denoiser(plain, labels, indices, schedule, Steering(modes, 0.1, 1.0, 0.5))
    assert schedule.level(499.0) == 0.5
    for time, same in ((0.0, True), (250.0, True), (499.0, True), (500.0, False), (999.0, False)):
        assert torch.equal(steered(x, time), plain(x, time)) == same


# --- modes


def clustered(num_images: int = 60) -> tuple[LatentCache, Tensor, Tensor]:
    """Latents (n, 2, 2, 2, 2) of two classes, each of three tight clusters of unequal size; and the true centres.

    What is stored is not standardised yet, as in a cache that was just written.
    """
    draw = torch.Generator().manual_seed(1)
    centres = 3 * torch.randn(2, 3, 2, 2, 2, generator=draw)
    labels = torch.arange(num_images) % 2
    cluster = torch.tensor([0, 0, 0, 1, 1, 2])[torch.arange(num_images) // 2 % 6]
    noise = 0.01 * torch.randn(num_images, 2, 2, 2, generator=draw)
    latents = centres[labels, cluster] + noise
    mirrored = torch.full_like(latents, 99.0)  # would be found if it were looked at
    scale, shift = torch.full((2, 1, 1), 2.0), torch.tensor([0.5, -0.5])[:, None, None]
    stored = (torch.stack([latents, mirrored], 1) - shift) / scale
    return LatentCache(stored.half(), None, "made up", scale, shift), labels, centres


def test_modes_are_the_centres_of_clusters_the_largest_first() -> None:
    latents, labels, centres = clustered()
    modes = find_modes(latents, labels, ("ant", "bee"), 3, seed=0)
    assert torch.allclose(modes.centres, centres, atol=0.02) and modes.count == 3
    assert torch.allclose(modes.weights, torch.tensor([0.5, 1 / 3, 1 / 6]).expand(2, 3), atol=0.04)
    assert torch.allclose(modes.variance, torch.tensor(1e-4), rtol=0.2)
    means = [2 * latents.mean[labels == label, 0].float().mean(0) + latents.shift for label in (0, 1)]
    assert torch.allclose(
        find_modes(latents, labels, ("ant", "bee"), 1, 0).centres[:, 0], torch.stack(means), atol=1e-6
    )


def test_modes_are_a_function_of_latents_number_and_seed() -> None:
    latents = LatentCache(torch.randn(80, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0)).half(), None, "f")
    labels = torch.arange(80) % 2
    first, again, other = (find_modes(latents, labels, ("a", "b"), 5, seed) for seed in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_modes_are_kept_with_what_they_are_of(tmp_path: Path) -> None:
    latents, labels, _ = clustered()
    modes, path = find_modes(latents, labels, ("ant", "bee"), 3, seed=0), tmp_path / "modes.safetensors"
    assert load_modes(path, "these") is None
    save_modes(path, modes, "these")
    found = load_modes(path, "these")
    assert found is not None and found.fingerprint() == modes.fingerprint()
    assert load_modes(path, "others") is None
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"modes\.safetensors: damaged .*delete it"):
        load_modes(path, "these")


def test_more_modes_than_images_are_refused() -> None:
    latents, labels, _ = clustered(11)
    with pytest.raises(UserError, match="--modes 6: class 'bee' has 5 real images; give at most that"):
        find_modes(latents, labels, ("ant", "bee"), 6, 0)
    alike = replace(latents, mean=torch.ones_like(latents.mean))
    with pytest.raises(UserError, match="--modes 3: class 'ant' has fewer different real images than that"):
        find_modes(alike, labels, ("ant", "bee"), 3, 0)


# --- what an image depends on


@pytest.fixture
def generator() -> Generator:
    unet = with_contiguous_attention(random_unet(0).to(memory_format=memory_format(CPU, "no")))
    vae = PatchAutoencoderKL(latent_channels=4, downsample=4, block_out_channels=())
    sampling = GuidanceConfig(num_inference_steps=4, guidance_scale=2.0)
    return Generator(unet, wrap(vae, CPU, "no"), scheduler_of("v_prediction"), NAMES, 16, sampling, "no")


def steering(**changes: Any) -> Steering:
    draw = torch.Generator().manual_seed(3)
    modes = Modes(torch.randn(3, 5, 4, 4, 4, generator=draw), torch.full((3, 5), 0.2), torch.full((3,), 0.7))
    return replace(Steering(modes, 0.2, 1.0, 0.3), **changes)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_steered_image_depends_on_seed_class_and_index_only(generator: Generator, precision: str) -> None:
    generator = replace(generator, steering=steering(), precision=precision)
    labels, indices = torch.arange(48) % 3, torch.arange(48) // 3
    together = generator.sample(labels, indices, seed=0)
    for size in (1, 7, 16, 31) if precision == "no" else (16,):
        n = min(48, 3 * size)
        pairs = zip(labels[:n].split(size), indices[:n].split(size), strict=True)
        assert torch.equal(torch.cat([generator.sample(a, b, seed=0) for a, b in pairs]), together[:n])
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generator.sample(labels[order], indices[order], seed=0), together[order])
    plain = replace(generator, steering=None).sample(labels, indices, seed=0)
    assert (plain.int() - together.int()).abs().float().mean() > 2


@pytest.mark.parametrize("change", [{}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "heun"}, {"guidance_scale": 1.0}])
def test_without_strength_it_is_the_image_without_steering(generator: Generator, change: dict[str, Any]) -> None:
    generator = generator.with_sampling(**change)
    labels, indices = torch.arange(6) % 3, torch.arange(6) // 3
    plain = generator.sample(labels, indices, 0)
    for none in (steering(mode_strength=0.0, diversity_strength=0.0), steering(until=1.0)):
        assert torch.equal(replace(generator, steering=none).sample(labels, indices, 0), plain)


def test_it_steers_what_autoguidance_gives(generator: Generator) -> None:
    labels = torch.arange(3)
    guided = replace(generator, guide=Guide(random_unet(1), "f", "guide"))
    both = [replace(one, steering=steering()).sample(labels, labels, 0) for one in (generator, guided)]
    assert not torch.equal(both[0], both[1]) and not torch.equal(both[1], guided.sample(labels, labels, 0))


def test_settings_tell_every_difference_and_are_as_before_without(generator: Generator) -> None:
    assert "steering" not in generator.settings() and "steering" not in generator.describe()
    other = steering().modes
    different = [{}, {"mode_strength": 0.3}, {"diversity_strength": 0.0}, {"until": 0.4},
                 {"modes": replace(other, centres=2 * other.centres)}]  # fmt: skip
    made = [replace(generator, steering=steering(**one)).settings() for one in different]
    assert len({json.dumps(one, sort_keys=True) for one in made}) == len(different)
    text = replace(generator, steering=steering()).describe()["steering"]
    assert text == "to 5 modes of each class, pull 0.2, push from the others' 1, above noise level 0.3"


# --- the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seconds on two classes of digits."""
    folder = tmp_path_factory.mktemp("steering") / "run"
    assert run("train", [
        "--dataset", "digits", "--image_size", "16", "--num_classes", "2", "--output_dir", str(folder),
        "--mixed_precision", "no", "--vae_downsample", "4", "--vae_patch", "4", "--vae_channels", "16",
        "--vae_train_steps", "0", "--unet_channels", "32", "32", "--unet_layers_per_block", "1",
        "--max_train_steps", "2", "--train_batch_size", "8", "--fid_every", "0", "--sample_every", "1000",
        "--observer_network", "convnet2", "--observer_epochs", "2", "--observer_batch_size", "32",
        "--observer_learning_rate", "0.05",
    ]) == 0  # fmt: skip
    return folder


def sample(folder: Path, *flags: str) -> int:
    return run("sample", [
        "--run_dir", str(folder), "--ipc", "3", "--candidates_per_image", "2", "--num_inference_steps", "3",
        "--keep_pool", "--overwrite", *flags,
    ])  # fmt: skip


def stored(folder: Path) -> dict[tuple[int, int], bytes]:
    """Every candidate of the only pool that is steered."""
    from safetensors import safe_open

    found = {}
    for header in folder.glob("pool/*/pool.json"):
        if "steering" in json.loads(header.read_text()):
            for path in header.parent.glob("candidates/*.safetensors"):
                with safe_open(path, framework="pt") as file:
                    keys = zip(file.get_tensor("label").tolist(), file.get_tensor("index").tolist(), strict=True)
                    found |= dict(zip(keys, (p.numpy().tobytes() for p in file.get_tensor("pixels")), strict=True))
    return found


def test_the_command_finds_modes_once_and_a_resumed_pool_is_equal(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], forget_accelerator: Any
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        shutil.copytree(trained, folder)
    assert sample(first, "--modes", "auto", "--dry_run") == 0 and not (first / "modes").exists()
    forget_accelerator()
    assert sample(first, "--modes", "auto") == 0
    assert "to 3 modes of each class" in (first / "distilled" / "ipc3" / "README.md").read_text()
    (file,) = (first / "modes").iterdir()
    written = file.stat().st_mtime_ns
    capsys.readouterr()

    forget_accelerator()
    assert sample(second, "--modes", "3", "--sample_batch_size", "5") == 0
    assert "finding 3 of each class in its real latents" in capsys.readouterr().out
    everything = stored(first)
    assert len(everything) == 12 and stored(second) == everything
    for path in second.glob("pool/*/*"):
        if path.is_dir() and path.name != "candidates":
            shutil.rmtree(path)  # what was ranked, so that all candidates are wanted again
    for path in sorted(second.glob("pool/*/candidates/*.safetensors"))[1:]:
        path.unlink()
    assert 0 < len(stored(second)) < 12
    forget_accelerator()
    assert sample(second, "--modes", "3") == 0
    assert "finding" not in capsys.readouterr().out and stored(second) == everything
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode_strength", "0.3"], "--mode_strength 0.3: does nothing without --modes"),
        (["--diversity_strength", "2"], "--diversity_strength 2: does nothing without --modes"),
        (["--steer_until", "0.2"], "--steer_until 0.2: does nothing without --modes"),
        (["--modes", "0"], "--modes 0: give 1 or more"),
        (["--modes", "4", "--mode_strength", "1.5"], "--mode_strength 1.5: give 0 to 1"),
        (["--modes", "auto", "--ipc", "0", "--budget_seconds", "1"], "--modes auto: as many as --ipc, which is 0"),
        (["--modes", "5000"], "--modes 5000: class '"),
    ],
)
def test_what_cannot_be_steered_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    arguments = ["--run_dir", str(trained), *flags]
    if "--ipc" not in flags:
        arguments += ["--ipc", "2"]
    assert run("sample", [*arguments, "--dry_run"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_latents_that_are_missing_or_of_another_autoencoder_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], forget_accelerator: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    meta = folder / "latents" / "meta.json"
    values = json.loads(meta.read_text())
    wrong = [
        (values | {"fingerprint": "0" * 32 + "-images-flip-2"}, "are of another autoencoder than the generator's"),
        (values | {"latents_std": (2 * np.array(values["latents_std"])).tolist()}, "are of another autoencoder"),
        (values | {"fingerprint": values["fingerprint"].split("-")[0] + "-x-flip-2"}, "are of other images than"),
        (values | {"complete": False}, "has no latents of real images to find modes in"),
    ]
    for content, message in wrong:
        meta.write_text(json.dumps(content))
        forget_accelerator()
        assert sample(folder, "--modes", "2") == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error
