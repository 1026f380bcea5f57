"""The recipe's choices through the commands: pixel space, prediction types, reconstruction, averages chosen last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sample
import train_ldm
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
