"""The recipe's choices through the commands: pixel space, prediction types, reconstruction, averages chosen last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sample
import train_ldm
from benchmarks import recipe
from ddgen.distill.dataset import DistilledDataset

SMALL = [
    *["--dataset", "digits", "--image_size", "16", "--num_classes", "3", "--mixed_precision", "no"],
    *["--unet_channels", "32", "32", "--unet_layers_per_block", "1"],
    *["--observer_network", "convnet2", "--observer_epochs", "3", "--observer_batch_size", "32"],
    *["--observer_learning_rate", "0.05", "--train_batch_size", "8", "--max_train_steps", "4"],
    *["--lr_warmup_steps", "2", "--log_every", "1", "--checkpointing_steps", "4", "--num_inference_steps", "4"],
    *["--fid_every", "4", "--fid_num_images", "12", "--fid_num_inference_steps", "3"],
]
PATCH = ["--vae_downsample", "4", "--vae_patch", "4", "--vae_channels", "16", "--vae_train_steps", "4"]


def test_a_flow_of_pixels_is_trained_and_distilled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    flags = ["--space", "pixel", "--prediction_type", "flow_prediction", "--flow_shift", "1.5"]
    assert train_ldm.main([*SMALL, *flags, "--output_dir", str(run_dir)]) == 0
    assert "autoencoder: none, pixels are diffused" in capsys.readouterr().out
    index = json.loads((run_dir / "generator" / "model_index.json").read_text())
    assert index["vae"] == ["identity_autoencoder", "IdentityAutoencoder"]
    assert index["scheduler"][1] == "FlowMatchEulerDiscreteScheduler"
    assert json.loads((run_dir / "generator" / "scheduler" / "scheduler_config.json").read_text())["shift"] == 1.5
    for sampler in ("ddim", "dpmsolver++", "unipc"):
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
