"""The guide that a training keeps of itself: of which step, and whatever stops the run."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_generator import CONFIG, CPU

from ddgen.autoencoder.autoencoder import wrap
from ddgen.autoencoder.latents import LatentCache
from ddgen.autoencoder.patch_autoencoder import PatchAutoencoderKL
from ddgen.commands.estimate import estimate_bytes
from ddgen.config import MonitorConfig, OptimizerConfig, RunConfig, TrainConfig, parse
from ddgen.diffusion import report
from ddgen.diffusion.generator import Generator
from ddgen.diffusion.kept_guide import GUIDE_NAME, is_missed, kept_guide
from ddgen.diffusion.training import train_diffusion
from ddgen.errors import UserError
from ddgen.resume import Keeper

STEPS, GUIDE_STEP = 6, 3
Train = Callable[..., Generator]


class Killed(Exception):
    """Stands for the end of a process."""


def recipe(**optimizer: object) -> TrainConfig:
    settings = {"max_train_steps": STEPS, "train_batch_size": 6, "lr_warmup_steps": 1, "guide_fraction": 0.5}
    return TrainConfig(
        run=RunConfig(checkpointing_steps=1, checkpoints_total_limit=STEPS),
        denoiser=CONFIG,
        optimizer=OptimizerConfig(**settings | optimizer),  # type: ignore[arg-type]
        monitor=MonitorConfig(fid_every=0, log_every=100),
    )


@pytest.fixture
def train(tmp_path: Path, forget_accelerator: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains in tmp_path/<name>, from a checkpoint, and dies before the checkpoint of a step is written."""
    monkeypatch.setattr(report, "flops_per_image", lambda unet: 1.0)
    noise = torch.randn(12, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    vae = wrap(PatchAutoencoderKL(latent_channels=4, downsample=4, block_out_channels=()), CPU, "no")
    after_step = Keeper.after_step

    def run(name: str, resume_from: Path | None = None, dies_at: int = 0, **optimizer: object) -> Generator:
        def watched(keeper: Keeper, step: int) -> None:
            if step == dies_at:
                raise Killed
            after_step(keeper, step)

        forget_accelerator()
        monkeypatch.setattr(Keeper, "after_step", watched)
        (tmp_path / name).mkdir(exist_ok=True)
        return train_diffusion(
            recipe(**optimizer), LatentCache(noise, None, "made up"), torch.arange(12) % 3, vae, ("a", "b", "c"), 16,
            accelerator=Accelerator(cpu=True), precision="no", output_dir=tmp_path / name, resume_from=resume_from,
        )  # fmt: skip

    return run


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def test_the_averages_of_the_step_are_kept_wherever_the_run_was_killed(train: Train, tmp_path: Path) -> None:
    made = train("whole")
    whole = load_file(tmp_path / "whole" / GUIDE_NAME)
    for std in (0.05, 0.1):
        average = load_file(checkpoint(tmp_path / "whole", GUIDE_STEP) / f"ema_{std}.safetensors")
        last = load_file(checkpoint(tmp_path / "whole", STEPS) / f"ema_{std}.safetensors")
        assert all(torch.equal(whole[f"{std}/{name}"], tensor.half()) for name, tensor in average.items())
        assert any(not torch.equal(whole[f"{std}/{name}"], tensor.half()) for name, tensor in last.items())
    assert len(whole) == 2 * len(average)
    for step in (2, 3, 4):  # before the guide is there, when it is and no checkpoint of that step, after both
        with pytest.raises(Killed):
            train(f"at{step}", dies_at=step)
        assert (tmp_path / f"at{step}" / GUIDE_NAME).is_file() == (step >= GUIDE_STEP)
        train(f"at{step}", checkpoint(tmp_path / f"at{step}", step - 1))
        assert (tmp_path / f"at{step}" / GUIDE_NAME).read_bytes() == (tmp_path / "whole" / GUIDE_NAME).read_bytes()
    for std, expected in ((0.1, 0.1), (0.15, 0.05), (None, 0.05)):  # the first, where its own was not tracked
        found = kept_guide(recipe().optimizer, tmp_path / "whole", replace(made, ema_std=std))
        assert found is not None and (found.step, found.max_train_steps, found.ema_std) == (3, 6, expected)
        assert all(torch.equal(value, whole[f"{expected}/{name}"]) for name, value in found.unet.state_dict().items())


def test_a_run_from_anothers_checkpoint_takes_its_guide_along(train: Train, tmp_path: Path) -> None:
    train("whole")
    late, whole = checkpoint(tmp_path / "whole", 4), tmp_path / "whole" / GUIDE_NAME
    assert not is_missed(recipe().optimizer, tmp_path / "other", late)
    train("other", late)
    assert (tmp_path / "other" / GUIDE_NAME).read_bytes() == whole.read_bytes()


def test_a_run_past_the_step_without_a_guide_goes_on_without(train: Train, tmp_path: Path) -> None:
    """As one that was begun before guides were kept, or wanted none."""
    old, optim, off = tmp_path / "old", recipe().optimizer, recipe(guide_fraction=0.0).optimizer
    made = train("old", guide_fraction=0.0)
    assert not (old / GUIDE_NAME).exists() and kept_guide(off, old, made) is None
    assert [is_missed(optim, old, checkpoint(old, step)) for step in (2, 3, 4)] == [False, True, True]
    assert not is_missed(off, old, checkpoint(old, 4))
    train("late", checkpoint(old, 4))  # the setting is no part of what must be the same
    assert not (tmp_path / "late" / GUIDE_NAME).exists() and kept_guide(optim, tmp_path / "late", made) is None
    train("early", checkpoint(old, 2))
    assert kept_guide(optim, tmp_path / "early", made) is not None
    assert kept_guide(recipe(guide_fraction=0.4).optimizer, tmp_path / "early", made) is None  # it is of another step


def test_a_damaged_guide_is_named(train: Train, tmp_path: Path) -> None:
    run, optim = tmp_path / "run", recipe().optimizer
    made, path = train("run"), run / GUIDE_NAME
    path.write_bytes(path.read_bytes()[:100])
    for ask in (lambda: is_missed(optim, run, checkpoint(run, 4)), lambda: kept_guide(optim, run, made)):
        with pytest.raises(UserError, match=r"run/guide\.safetensors: damaged \(.*\); copy it again, or delete it"):
            ask()
    path.unlink()
    assert is_missed(optim, run, checkpoint(run, 4)) and kept_guide(optim, run, made) is None


def test_a_full_disk_is_named_and_leaves_no_half_of_a_guide(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == GUIDE_NAME:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"full: the disk is full: .* are needed here"):
        train("full")
    assert list((tmp_path / "full").glob("*guide*")) == []


def test_the_estimate_counts_the_guide() -> None:
    images: Any = range(10)
    without, with_guide = (estimate_bytes(recipe(guide_fraction=f), images, (4, 4), 1000) for f in (0.0, 0.2))
    assert with_guide - without == 2 * 1000 * 2 + 2 * 1000  # two averages in the run, one in the generator


@pytest.mark.parametrize(("fraction", "steps", "step"), [(0.2, 4700, 940), (0.2, 1, 1), (0.1, 30, 3), (0.0, 100, 0)])
def test_the_step_of_a_fraction(fraction: float, steps: int, step: int) -> None:
    assert OptimizerConfig(guide_fraction=fraction, max_train_steps=steps).guide_step == step


def test_a_guide_as_good_as_its_generator_is_refused() -> None:
    with pytest.raises(UserError, match=r"--guide_fraction 1\.0: give 0 to 0\.9"):
        parse(TrainConfig, ["--guide_fraction", "1"], "train_ldm.py")
