"""Pictures of a training while it runs: at which steps, and that they are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from test_generator import CONFIG, CPU

from ddgen.autoencoder.autoencoder import wrap
from ddgen.autoencoder.latents import LatentCache
from ddgen.autoencoder.patch_autoencoder import PatchAutoencoderKL
from ddgen.config import MonitorConfig, OptimizerConfig, TrainConfig
from ddgen.diffusion import report
from ddgen.diffusion.training import train_diffusion


@pytest.mark.parametrize(
    ("steps", "batch", "classes", "expected"),
    [
        (2_800, 64, 10, range(280, 2_801, 280)),  # 2 % of 3 x 179,200 forwards are 13 grids of 80 images in 10 steps
        (480, 64, 10, [240, 480]),  # 1,843 forwards: two grids
        (480, 64, 200, [240, 480]),  # no more than ten classes are shown
        (480, 64, 2, range(48, 481, 48)),  # 16 images a grid
        (100, 64, 10, []),
        (3, 100_000, 10, [1, 2, 3]),
    ],
)
def test_grids_are_cheap_and_evenly_spread(steps: int, batch: int, classes: int, expected: list[int]) -> None:
    config = TrainConfig(optimizer=OptimizerConfig(max_train_steps=steps, train_batch_size=batch))
    assert sorted(report.grid_steps(config, classes)) == list(expected)
    slower = replace(config, monitor=MonitorConfig(fid_num_inference_steps=1_000_000))
    assert not report.grid_steps(slower, classes)


@pytest.mark.parametrize(("sample_every", "expected"), [(None, [2, 4]), (3, [3, 4]), (0, [])])
def test_there_is_something_to_see_without_a_curve(
    sample_every: int | None, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "flops_per_image", lambda unet: 1.0)
    monkeypatch.setattr(report, "MAX_GRIDS", 2)
    monkeypatch.setattr(report, "GRID_SHARE", 1e6)
    config = TrainConfig(
        denoiser=CONFIG,
        optimizer=OptimizerConfig(max_train_steps=4, train_batch_size=6, lr_warmup_steps=1, guide_fraction=0.0),
        monitor=MonitorConfig(fid_every=0, fid_num_inference_steps=1, sample_every=sample_every),
    )
    noise = torch.randn(12, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    vae = wrap(PatchAutoencoderKL(latent_channels=4, downsample=4, block_out_channels=()), CPU, "no")
    train_diffusion(
        config, LatentCache(noise, None, "made up"), torch.arange(12) % 3, vae, ("a", "b", "c"), 16,
        accelerator=Accelerator(cpu=True), precision="no", output_dir=tmp_path, resume_from=None,
    )  # fmt: skip
    pictures = sorted(tmp_path.glob("samples/step-*.png"))
    assert [int(path.stem.split("-")[1]) for path in pictures] == expected
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width > 8 * 16 and picture.height > 3 * 16
