"""The recipe's choices through the commands: pixel space, prediction types, reconstruction, averages chosen last."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import normalize

import sample
import train_ldm
from benchmarks import recipe
from ddgen.autoencoder.autoencoder import Autoencoder, identity, to_images, wrap
from ddgen.autoencoder.patch_autoencoder import PatchAutoencoderKL
from ddgen.autoencoder.pca import fit_pca
from ddgen.autoencoder.training import psnr, reconstruct, train_autoencoder
from ddgen.config import AutoencoderConfig, DataConfig, ObserverConfig
from ddgen.data import ImageDataset, load_dataset
from ddgen.diffusion.ema import PowerEMA, std_to_gamma
from ddgen.diffusion.posthoc import Snapshots, combination
from ddgen.distill.dataset import DistilledDataset
from ddgen.evaluation.extractors import observer_extractor
from ddgen.evaluation.reconstruction import measure_reconstruction, report_reconstruction
from ddgen.observer.networks import build_network
from ddgen.observer.observer import Observer, predict_pixels
from ddgen.observer.perceptual import PerceptualLoss
from ddgen.observer.training import train_observer
from ddgen.resume import Checkpoints

CPU = torch.device("cpu")
SMALL = [
    *["--dataset", "digits", "--image_size", "16", "--num_classes", "3", "--mixed_precision", "no"],
    *["--unet_channels", "32", "32", "--unet_layers_per_block", "1"],
    *["--observer_network", "convnet2", "--observer_epochs", "3", "--observer_batch_size", "32"],
    *["--observer_learning_rate", "0.05", "--train_batch_size", "8", "--max_train_steps", "4"],
    *["--lr_warmup_steps", "2", "--log_every", "1", "--checkpointing_steps", "4", "--num_inference_steps", "4"],
    *["--fid_every", "4", "--fid_num_images", "12", "--fid_num_inference_steps", "3"],
]
PATCH = ["--vae_downsample", "4", "--vae_patch", "4", "--vae_channels", "16", "--vae_train_steps", "4"]


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset(DataConfig(dataset="digits", image_size=16), "train")


@pytest.fixture(scope="module")
def observer(digits: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> Observer:
    config = ObserverConfig(observer_network="convnet2", observer_epochs=3, observer_learning_rate=0.05)
    path = tmp_path_factory.mktemp("observer") / "observer"
    trained = train_observer(config, digits, output_dir=path, device=CPU, precision="no", seed=0, progress=False)
    return trained.requires_grad_(False)


def patch_pca(pixels: torch.Tensor, f: int, d: int) -> Autoencoder:
    model = PatchAutoencoderKL(latent_channels=d, downsample=f, block_out_channels=())
    model.set_pca(*fit_pca(pixels, f, d, seed=0))
    return wrap(model, CPU, "no")


# --- perceptual term


def test_perceptual_distance_is_lpips_in_the_observers_features(observer: Observer, digits: ImageDataset) -> None:
    a, b = to_images(digits.pixels[:8]), to_images(digits.pixels[8:16])
    loss = PerceptualLoss(observer)
    assert loss(a, a) == 0
    body, expected = observer.classifier.body, []
    x, y = (observer.prepare((side + 1) / 2) for side in (a, b))
    pools = [layer for layer in body if isinstance(layer, torch.nn.AvgPool2d)]
    for layer in body:  # conv, norm, ReLU, pool, twice; flatten; where the linear layer was
        x, y = layer(x), layer(y)
        if isinstance(layer, torch.nn.ReLU) or layer in (pools[-1], body[-1]):
            expected.append((normalize(x, dim=1) - normalize(y, dim=1)).square().sum(1).mean())
    assert len(expected) == 4
    assert loss(a, b).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_perceptual_term_works_for_networks_of_all_kinds() -> None:
    torch.manual_seed(0)
    for network, layers in (("resnet18", 4), ("torchvision:densenet121", 4), ("torchvision:vit_b_32", 1)):
        size = 32
        made = Observer(
            build_network(network, 3, size), network=network, class_names=("a", "b", "c"), input_size=size,
            mean=(0.5,) * 3, std=(0.5,) * 3,
        ).eval().requires_grad_(False)  # fmt: skip
        restored = torch.rand(2, 3, size, size, requires_grad=True)
        loss = PerceptualLoss(made)
        loss(restored, torch.rand(2, 3, size, size)).backward()
        assert restored.grad is not None and restored.grad.abs().sum() > 0, network
        assert len(loss.layers) >= layers - 1, network


def test_perceptual_term_makes_the_observer_agree_more_at_equal_steps(
    observer: Observer, digits: ImageDataset, tmp_path: Path
) -> None:
    pixels, agreement = digits.pixels[:300], {}
    before = predict_pixels(observer, pixels, what="logits", batch_size=300, device=CPU, precision="no").argmax(1)
    for weight in (0.0, 1.0):
        config = AutoencoderConfig(
            vae_downsample=8, vae_latent_channels=3, vae_patch=8, vae_channels=(32,), vae_train_steps=40,
            vae_batch_size=32, vae_learning_rate=3e-3, vae_perceptual_weight=weight,
        )  # fmt: skip
        vae, _ = train_autoencoder(
            config, digits.pixels, accelerator=Accelerator(cpu=True), precision="no", seed=0, flip=False,
            checkpoints=Checkpoints(tmp_path / str(weight), {}), perceptual=PerceptualLoss(observer),
        )  # fmt: skip
        restored = reconstruct(vae, pixels)
        after = predict_pixels(observer, restored, what="logits", batch_size=300, device=CPU, precision="no").argmax(1)
        agreement[weight] = (after == before).double().mean().item()
    assert agreement[1.0] > agreement[0.0] + 0.02


# --- what is told of the autoencoder before the UNet starts


def test_a_perfect_autoencoder_loses_nothing_and_a_worse_one_more(
    observer: Observer, digits: ImageDataset, tmp_path: Path
) -> None:
    indices, features = torch.arange(0, len(digits), 7), observer_extractor(observer)
    found = {}
    for name, vae in (("none", identity(CPU, "no")), ("d6", patch_pca(digits.pixels, 4, 6)),
                      ("d2", patch_pca(digits.pixels, 4, 2))):  # fmt: skip
        found[name] = measure_reconstruction(
            reconstruct(vae, digits.pixels[indices]), digits, indices, observer, features, device=CPU, precision="no"
        )
    rfd = f"rfd_convnet2_{len(indices)}"
    assert found["none"][rfd] == pytest.approx(0, abs=1e-6)
    assert found["none"]["accuracy"] == found["none"]["accuracy_reconstructed"] > 0.8
    assert 0 < found["d6"][rfd] < found["d2"][rfd]
    assert found["d6"]["psnr"] > found["d2"]["psnr"] + 1
    assert found["d2"]["accuracy"] == found["none"]["accuracy"] > found["d2"]["accuracy_reconstructed"]
    assert found["d6"]["psnr"] == pytest.approx(psnr(patch_pca(digits.pixels, 4, 6), digits.pixels[indices]))


def test_reconstruction_report_is_written_before_training(
    observer: Observer, digits: ImageDataset, tmp_path: Path
) -> None:
    vae, indices = patch_pca(digits.pixels, 4, 3), torch.arange(25)
    line = report_reconstruction(vae, digits, indices, observer, observer_extractor(observer), tmp_path, precision="no")
    found = json.loads((tmp_path / "reconstruction.json").read_text())
    assert found["num_images"] == 25
    assert f"{found['psnr']:.2f} dB, rfd_convnet2_25 {found['rfd_convnet2_25']:.3f}" in line
    with Image.open(tmp_path / "samples" / "reconstructions.png") as grid:
        columns, rows = grid.width // 66, grid.height // 66
        assert (columns, rows) == (10, 5)  # 10 over 10, 10 over 10, and 5 beside 5
        original = torch.tensor(np.asarray(grid.crop((2, 2, 66, 66)))[::4, ::4]).permute(2, 0, 1)
    assert torch.equal(original, digits.pixels[0])


# --- averages chosen after training


def test_combination_is_the_least_squares_fit_of_the_profiles() -> None:
    """Karras et al. 2024, algorithm 3, against a fit of the profiles as they are drawn on a fine grid."""
    steps, stds = np.repeat([30, 60, 90, 120], 2), np.tile([0.05, 0.10], 4)
    grid = (np.arange(24_000) + 0.5) / 200

    def profile(step: int, std: float) -> np.ndarray:
        gamma = std_to_gamma(std)
        inside = grid <= step
        return np.where(inside, (gamma + 1) / step * (np.minimum(grid, step) / step) ** gamma, 0)

    drawn = np.stack([profile(*pair) for pair in zip(steps.tolist(), stds.tolist(), strict=True)], axis=1)
    for std in (0.07, 0.15, 0.2):
        expected = np.linalg.lstsq(drawn, profile(120, std), rcond=None)[0]
        assert combination(steps, stds, 120, std) == pytest.approx(expected, abs=2e-3)
    assert combination(steps, stds, 120, 0.1) == pytest.approx([0] * 7 + [1], abs=1e-6)


def test_averages_put_together_afterwards_are_those_tracked_all_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight, steps = torch.nn.Parameter(torch.randn(500) * 0.05), 800
    stds = (0.05, 0.10)
    ema, direct = PowerEMA([weight], stds), PowerEMA([weight], (0.03, 0.04, 0.07, 0.15, 0.2))
    snapshots = Snapshots(tmp_path, ["w"], stds, steps)
    drift = torch.randn(500)
    for step in range(1, steps + 1):
        with torch.no_grad():
            weight += 0.002 * torch.randn(500) * min(1, (steps - step) / 300) + (drift - weight) / 1000
        ema.update(step), direct.update(step)
        snapshots.save(ema, step)
    assert len(list(tmp_path.iterdir())) == 16
    assert torch.equal(snapshots.average(0.10, steps)["w"].half(), ema.averages[0.10][0].half())
    for std, limit in ((0.03, 0.01), (0.04, 0.002), (0.07, 0.002), (0.15, 0.002), (0.2, 0.005)):
        wanted = direct.averages[std][0]
        error = ((snapshots.average(std, steps)["w"] - wanted).norm() / wanted.norm()).item()
        nearest = min(((ema.averages[s][0] - wanted).norm() / wanted.norm()).item() for s in stds)
        assert error < limit and error < nearest / 3, std


def test_the_width_with_the_lowest_distance_becomes_the_generator(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = ["--posthoc_ema_stds", "0.07", "0.1", "0.2", "--learning_rate", "0.01", "--output_dir", str(run_dir)]
    assert train_ldm.main([*SMALL, *PATCH, *flags]) == 0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    distances = {key.split("_")[-1]: value for line in lines for key, value in line.items() if key.startswith("fd_")}
    assert set(distances) == {"0.05", "0.1", "0.07", "0.2"}
    best = min(distances, key=lambda std: distances[std])
    unet = load_file(run_dir / "generator" / "unet" / "diffusion_pytorch_model.safetensors")
    snapshots = Snapshots(run_dir / "ema_snapshots", sorted(unet), (0.05, 0.1), 4)

    def difference(std: str) -> float:
        average = snapshots.average(float(std), 4)
        return max((unet[name] - average[name]).abs().max().item() for name in unet)

    assert min(distances, key=difference) == best
    assert difference(best) < 2e-3  # snapshots are float16


# --- pixel space and prediction types through the commands


def test_a_flow_of_pixels_is_trained_and_distilled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    flags = ["--space", "pixel", "--prediction_type", "flow_prediction", "--flow_shift", "1.5"]
    assert train_ldm.main([*SMALL, *flags, "--output_dir", str(run_dir)]) == 0
    assert "autoencoder: none, pixels are diffused" in capsys.readouterr().out
    index = json.loads((run_dir / "generator" / "model_index.json").read_text())
    assert index["vae"] == ["identity_autoencoder", "IdentityAutoencoder"]
    assert index["scheduler"][1] == "FlowMatchEulerDiscreteScheduler"
    assert json.loads((run_dir / "generator" / "scheduler" / "scheduler_config.json").read_text())["shift"] == 1.5
    for sampler in ("ddim", "unipc", "heun"):
        out = tmp_path / sampler.strip("+")
        flags = ["--run_dir", str(run_dir), "--ipc", "1", "--candidates_per_image", "2", "--mixed_precision", "no"]
        assert sample.main([*flags, "--sampler", sampler, "--output_dir", str(out)]) == 0
        assert DistilledDataset.load(out).pixels.shape == (3, 3, 16, 16)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--space", "pixel", "--vae_kl_weight", "1"], "--vae_kl_weight 1.0: --space pixel has no autoencoder"),
        (["--flow_shift", "2"], "--flow_shift 2.0: only for --prediction_type flow_prediction"),
        (["--prediction_type", "noise"], "--prediction_type"),
        (["--posthoc_ema_stds", "0.2", "--fid_every", "0"], "--posthoc_ema_stds: widths are chosen by their FD"),
        (["--posthoc_ema_stds", "0.01"], "--posthoc_ema_stds 0.01: give 0.03 to 0.25"),
    ],
)
def test_settings_that_do_not_go_together_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert train_ldm.main([*SMALL, *flags, "--output_dir", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_benchmark_compares_variations_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = [*SMALL, *PATCH, "--output_dir", str(tmp_path / "recipe"), "--points", "2", "--images", "32"]
    names = "v; flow: prediction_type=flow_prediction, unet_channels=32 64"
    assert recipe.main([*base, "--variations", names]) == 0
    table = capsys.readouterr().out
    assert "| flow | prediction_type=flow_prediction, unet_channels=32 64 |" in table
    results = {r["name"]: r for r in map(json.loads, (tmp_path / "recipe" / "results.jsonl").read_text().splitlines())}
    assert set(results) == {"v", "flow"}
    assert results["flow"]["parameters"] > results["v"]["parameters"]
    for result in results.values():
        assert result["metric"] == "fd_convnet2_12" and set(result["curve"]) == {"ema_0.05", "ema_0.1"}
        assert [point[0] for point in result["curve"]["ema_0.1"]] == [16, 32]
        assert result["images_per_second"] == pytest.approx(32 / result["seconds"])
    assert len(list((tmp_path / "recipe" / "autoencoders").iterdir())) == 1
    monkeypatch.setattr(recipe, "train_diffusion", None)
    assert recipe.main([*base, "--variations", names]) == 0
    assert "flow: measured before" in capsys.readouterr().out
    assert recipe.main([*base, "--variations", "v: preset=xs"]) == 2
    assert "--variations v: " in capsys.readouterr().err


def test_the_benchmark_counts_training_seconds_only(tmp_path: Path) -> None:
    lines = [
        {"step": 2, "loss": 1.0, "images_per_second": 10.0},
        {"step": 3, "fd_x_5/ema_0.1": 7.0, "kid_x_5/ema_0.1": 0.1},
        {"step": 4, "loss": 1.0, "images_per_second": 20.0},
        {"step": 4, "fd_x_5/ema_0.1": 5.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = recipe.read_metrics(tmp_path / "metrics.jsonl", batch_size=10)
    assert found["seconds"] == pytest.approx(2 + 1) and found["images_per_second"] == pytest.approx(40 / 3)
    assert found["metric"] == "fd_x_5"
    assert found["curve"] == {"ema_0.1": [[30, pytest.approx(2.5), 7.0], [40, pytest.approx(3.0), 5.0]]}


@pytest.mark.parametrize(
    ("variations", "message"),
    [
        ("a: learning_rat=1", "learning_rat"),
        ("a; a: preset=s", "--variations a: names must differ"),
        ("a: unet_dropout=2", "--unet_dropout 2.0: give 0 to 1"),
    ],
)
def test_wrong_variations_are_named(capsys: pytest.CaptureFixture[str], variations: str, message: str) -> None:
    assert recipe.main([*SMALL, "--images", "32", "--variations", variations]) == 2
    assert message in capsys.readouterr().err
