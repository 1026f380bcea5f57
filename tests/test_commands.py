"""The commands, run as a user runs them, on a small piece of the digits."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

import evaluate
import sample
import train_ldm
from ddgen import cli
from ddgen.commands import estimate
from ddgen.commands import sample as sample_command
from ddgen.distill.dataset import DistilledDataset
from ddgen.errors import UserError

ROOT = Path(__file__).parents[1]
SMALL = [
    *["--dataset", "digits", "--image_size", "16", "--num_classes", "3", "--mixed_precision", "no"],
    *["--vae_downsample", "4", "--vae_patch", "4", "--vae_channels", "16", "--vae_train_steps", "4"],
    *["--unet_channels", "32", "32", "--unet_layers_per_block", "1"],
    *["--observer_network", "convnet2", "--observer_epochs", "3", "--observer_batch_size", "32"],
    *["--observer_learning_rate", "0.05", "--train_batch_size", "8", "--max_train_steps", "8"],
    *["--lr_warmup_steps", "2", "--log_every", "1", "--checkpointing_steps", "4", "--num_inference_steps", "4"],
    *["--fid_every", "4", "--fid_num_images", "12", "--fid_num_inference_steps", "3"],
]
OBSERVER_ONLY = [*SMALL[:8], *SMALL[SMALL.index("--observer_network") : SMALL.index("--train_batch_size")]]


def run_train(output_dir: Path, *extra: str) -> int:
    return train_ldm.main([*SMALL, "--output_dir", str(output_dir), *extra])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that tests read, and never change."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    assert run_train(path) == 0
    return path


@pytest.fixture
def own_run(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(run_dir, tmp_path / "runs" / "digits"))


def metrics(path: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "tflops")} for line in lines]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "generator" / "unet" / "diffusion_pytorch_model.safetensors")


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a user is shown."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ddgen: ")]
    assert len(lines) == 1
    return lines[0]


# --- the chain


def test_training_leaves_everything_the_design_names(run_dir: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "fid_curve.png", "generator/model_index.json", "generator/pipeline.py",
                 "generator/README.md", "observer/config.json", "samples/step-00000008.png",
                 "samples/nearest_training.png", "checkpoints/step-00000008/state.json"):  # fmt: skip
        assert (run_dir / name).is_file(), name
    lines = metrics(run_dir)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    points = [line for line in lines if any(name.startswith("fd_convnet2_12/") for name in line)]
    assert [point["step"] for point in points] == [4, 8]
    kinds = ("fd", "kid", "precision", "recall", "density", "coverage", "memorised", "consistency")
    best = {"best/fd_convnet2_12", "best/step", "best/ema_std"}
    assert set(points[0]) == {"step"} | best | {f"{m}_convnet2_12/ema_{e}" for m in kinds for e in ("0.05", "0.1")}
    lowest = min((p[f"fd_convnet2_12/ema_{e}"], p["step"], e) for p in points for e in (0.05, 0.1))
    assert (points[-1]["best/fd_convnet2_12"], points[-1]["best/step"], points[-1]["best/ema_std"]) == lowest
    chosen = min(("0.05", "0.1"), key=lambda std: points[-1][f"fd_convnet2_12/ema_{std}"])
    average = load_file(run_dir / "checkpoints" / "step-00000008" / f"ema_{chosen}.safetensors")
    assert all(torch.equal(tensor, average[name]) for name, tensor in weights(run_dir).items())
    assert np.load(run_dir / "latents" / "mean.npy", mmap_mode="r").shape[1] == 1  # digits have no mirror images
    index = json.loads((run_dir / "generator" / "model_index.json").read_text())
    assert index["class_names"] == ["0", "1", "2"]
    with Image.open(run_dir / "samples" / "step-00000008.png") as grid:
        assert grid.width / grid.height == pytest.approx(8 / 3, rel=0.05)


def test_the_three_commands_end_in_a_table(
    own_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(own_run.parents[1])
    assert sample.main(["--ipc", "2", "--mixed_precision", "no"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^run +runs/digits \(the newest of 1 finished under runs/\)$", out, re.MULTILINE)
    assert re.search(r"^candidates +24: 2 of 8 kept in each class$", out, re.MULTILINE)
    assert (
        "first image after " in out
        and "rejected 18: " in out
        and re.search(r"ranking [\d.]+ s \([\d.,]+ images/s\)", out)
    )
    assert "kept 6 of 24 candidates" in out
    dataset = DistilledDataset.load(own_run / "distilled" / "ipc2")
    assert dataset.class_names == ("0", "1", "2") and dataset.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert not (own_run / "pool").exists() or not list((own_run / "pool").iterdir())
    selection = dataset.provenance["selection"]
    assert selection["mean_realism_loss_kept"] < selection["mean_realism_loss_pool"]
    assert dataset.realism.double().mean().item() == pytest.approx(selection["mean_realism_loss_kept"], rel=1e-6)
    rejected = load_file(own_run / "baselines" / "best-rejected-ipc2.safetensors")
    assert rejected["labels"].bincount().tolist() == [6, 6, 6]  # of 8 candidates a class, 2 are kept
    for label in range(3):
        assert rejected["realism"][rejected["labels"] == label].min() >= dataset.realism[dataset.labels == label].max()
    assert evaluate.main(["--epochs", "1", "--repeats", "1", "--mixed_precision", "no"]) == 0
    assert "Best rejected candidates" in (own_run / "report.html").read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert "random generated" in out and "random real" in out and "distilled" in out
    results = json.loads((own_run / "evaluation" / "ipc2" / "results.json").read_text())
    kinds = ["distilled", "random generated", "random real", "rded real"]
    assert [(row["protocol"], row["images"]) for row in results["rows"]] == [
        (protocol, images) for protocol in ("rded", "hard") for images in kinds
    ]
    assert (own_run / "evaluation" / "ipc2" / "accuracy.png").is_file()
    assert "| distilled |" in (own_run / "distilled" / "ipc2" / "README.md").read_text()
    DistilledDataset.load(own_run / "distilled" / "ipc2")


def test_the_same_sample_command_twice_gives_the_same_bytes(own_run: Path, tmp_path: Path) -> None:
    args = ["--run_dir", str(own_run), "--ipc", "2", "--mixed_precision", "no", "--output_dir"]
    assert sample.main([*args, str(tmp_path / "a")]) == 0
    assert sample.main([*args, str(tmp_path / "b")]) == 0
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) >= 6 + 6
    for name in files:
        if name.name in ("README.md", "manifest.json"):  # they name the command, which names the folder
            continue
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_sample_keeps_by_a_rule_and_makes_grids(own_run: Path, tmp_path: Path) -> None:
    rule = ["--ipc", "2", "--factor", "2", "--selection", "diverse-realism", "--output_dir", str(tmp_path / "grids")]
    assert sample.main(["--run_dir", str(own_run), "--mixed_precision", "no", *rule]) == 0
    dataset = DistilledDataset.load(tmp_path / "grids")
    assert dataset.factor == 2 and dataset.pixels.shape == (6, 3, 16, 16)
    selection = dataset.provenance["selection"]
    assert selection["rule"] == "diverse-realism" and selection["candidates"] == 3 * 2 * 4 * 4
    assert selection["kept_per_class"] == [8, 8] and 0 <= selection["table"]["kept"]["coverage"] <= 1
    assert "](selection.png)" in (tmp_path / "grids" / "README.md").read_text()


def test_without_the_real_images_only_rules_that_need_none_keep(
    own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: object) -> NoReturn:
        raise UserError("--data_dir photos: no such folder")

    monkeypatch.setattr(sample_command, "load_on_all", gone)
    args = ["--run_dir", str(own_run), "--ipc", "1", "--mixed_precision", "no", "--output_dir", str(tmp_path / "one")]
    assert sample.main(args) == 2
    assert "--data_dir photos: no such folder); bring them back, or take --selection realism" in capsys.readouterr().err
    for others in (["--selection", "realism"], ["--ipc", "0", "--budget_seconds", "5", "--overwrite"]):
        assert sample.main([*args, *others]) == 0
        assert "coverage    not measured, without the real images" in capsys.readouterr().out


def test_batch_size_does_not_change_the_images(own_run: Path, tmp_path: Path) -> None:
    args = ["--run_dir", str(own_run), "--ipc", "8", "--candidates_per_image", "1", "--mixed_precision", "no"]
    for size in ("8", "32"):
        assert sample.main([*args, "--sample_batch_size", size, "--output_dir", str(tmp_path / size)]) == 0
    a, b = (DistilledDataset.load(tmp_path / size) for size in ("8", "32"))
    order_a, order_b = (torch.argsort(d.labels * 1000 + d.indices) for d in (a, b))
    assert (a.pixels[order_a].int() - b.pixels[order_b].int()).abs().max() <= 1


def test_a_kept_pool_is_not_sampled_again(own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["--run_dir", str(own_run), "--mixed_precision", "no", "--keep_pool"]
    everything = ["--ipc", "8", "--candidates_per_image", "1"]
    assert sample.main([*args, *everything, "--output_dir", str(tmp_path / "a")]) == 0

    def never(*_: object, **__: object) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr("ddgen.diffusion.generator.Generator.sample", never)
    assert sample.main([*args[:-1], "--ipc", "1", "--output_dir", str(tmp_path / "b")]) == 0
    large, small = DistilledDataset.load(tmp_path / "a"), DistilledDataset.load(tmp_path / "b")
    assert len(small) == 3 and len(large) == 24
    assert all((large.pixels == image).flatten(1).all(1).any() for image in small.pixels)
    assert list((own_run / "pool").iterdir())  # it was kept on purpose, so it stays


def test_a_budget_without_ipc_gives_all_that_time_allows(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--run_dir", str(own_run), "--mixed_precision", "no", "--ipc", "0", "--budget_seconds", "5"]
    assert sample.main(args) == 0
    dataset = DistilledDataset.load(own_run / "distilled" / "ipc0")
    counts = dataset.labels.bincount()
    assert counts.max() - counts.min() <= 1 and counts.min() >= 1
    assert dataset.indices.tolist() != sorted(dataset.indices.tolist())  # best first
    assert all(sorted(dataset.indices[dataset.labels == c].tolist()) == list(range(counts[c])) for c in range(3))
    assert re.search(r"^candidates +as many as 5 s allow, all kept$", capsys.readouterr().out, re.MULTILINE)


def test_a_smaller_request_leaves_the_unfinished_larger_one_alone(own_run: Path, tmp_path: Path) -> None:
    args = ["--run_dir", str(own_run), "--mixed_precision", "no"]
    assert sample.main([*args, "--ipc", "2", "--keep_pool", "--output_dir", str(tmp_path / "a")]) == 0
    (pool,) = (own_run / "pool").iterdir()
    (pool / "keep").unlink()  # as a run that was interrupted before it had ranked leaves it
    assert sample.main([*args, "--ipc", "1", "--output_dir", str(tmp_path / "b")]) == 0
    assert pool.is_dir()
    assert sample.main([*args, "--ipc", "2", "--output_dir", str(tmp_path / "c")]) == 0
    assert not pool.exists()


# --- guidance


def test_sample_says_what_it_guides_away_from_and_writes_it_down(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = own_run / "generator" / "guide"
    assert json.loads((guide / "guide.json").read_text())["step"] == 2  # a fifth of 8, to the next step
    average = load_file(own_run / "guide.safetensors")
    std = json.loads((own_run / "generator" / "model_index.json").read_text())["ema_std"]
    for name, value in load_file(guide / "diffusion_pytorch_model.safetensors").items():
        assert value.dtype == torch.float16 and torch.equal(value, average[f"{std}/{name}"])
    assert "`guide/` holds its own weights after 2 of 8 steps." in (own_run / "generator" / "README.md").read_text()
    args = ["--run_dir", str(own_run), "--ipc", "1", "--mixed_precision", "no"]
    away = {"auto": "its own weights after 2 of 8 steps (fingerprint ", "none": "the model without a class"}
    fingerprints = {}
    for choice, told in away.items():
        capsys.readouterr()
        out = own_run / "distilled" / choice
        assert sample.main([*args, "--guide", choice, "--output_dir", str(out)]) == 0
        line = rf"^guidance +1\.5 in 0\.3 to 0\.85, away from {re.escape(told)}"
        assert re.search(line, capsys.readouterr().out, re.MULTILINE)
        assert f"away from {told}" in (out / "README.md").read_text()
        fingerprints[choice] = DistilledDataset.load(out).provenance["candidates"]["guide"]
    assert fingerprints["none"] is None and fingerprints["auto"] is not None


def test_a_run_begun_before_guides_were_kept_is_finished_and_samples(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(own_run / "generator")
    (own_run / "guide.safetensors").unlink()
    config = own_run / "config.yaml"
    config.write_text(re.sub(r"^guide_fraction: .*\n", "", config.read_text(), flags=re.MULTILINE))
    assert run_train(own_run) == 0
    told = capsys.readouterr().out
    assert f"no guide:    {own_run / 'checkpoints' / 'step-00000008'} is past step 2, after which one is kept" in told
    assert not (own_run / "generator" / "guide").exists()
    card = (own_run / "generator" / "README.md").read_text()
    assert "guide/" not in card and "| guide | none |" in card
    args = ["--run_dir", str(own_run), "--ipc", "1", "--mixed_precision", "no", "--guide", "auto"]
    assert sample.main([*args, "--output_dir", str(own_run / "distilled" / "set")]) == 0
    assert "away from the model without a class" in capsys.readouterr().out


# --- batches


def test_accumulated_micro_batches_are_one_batch(run_dir: Path, tmp_path: Path) -> None:
    assert run_train(tmp_path / "digits", "--gradient_accumulation_steps", "4", "--fid_every", "0") == 0
    ours = [line["loss"] for line in metrics(tmp_path / "digits")]
    theirs = [line["loss"] for line in metrics(run_dir) if "loss" in line]
    assert ours == pytest.approx(theirs, rel=1e-4)


# --- processes


def test_two_processes_train_and_sample_like_one(run_dir: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu",
              "--num_cpu_threads_per_process", "1"]  # fmt: skip

    def run(script: str, *args: str) -> str:
        done = subprocess.run(
            [*launch, str(ROOT / script), *args], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "2 processes\n" in run("train_ldm.py", *SMALL, "--output_dir", "two")
    ours = [line["loss"] for line in metrics(tmp_path / "two") if "loss" in line]
    theirs = [line["loss"] for line in metrics(run_dir) if "loss" in line]
    assert ours == pytest.approx(theirs, rel=1e-3)

    options = ["--ipc", "2", "--modes", "2", "--mixed_precision", "no"]
    assert "2 processes\n" in run("sample.py", "--run_dir", str(tmp_path / "two"), *options, "--output_dir", "by-two")
    assert sample.main(["--run_dir", str(tmp_path / "two"), *options, "--output_dir", str(tmp_path / "by-one")]) == 0
    two, one = DistilledDataset.load(tmp_path / "by-two"), DistilledDataset.load(tmp_path / "by-one")
    assert torch.equal(two.indices, one.indices)
    assert (two.pixels.int() - one.pixels.int()).abs().max() <= 1


# --- other ways to train


def colour_folder(path: Path) -> Path:
    """Two classes that anyone can tell apart, as class folders: dark and bright noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for name, low in (("bright", 170), ("dark", 0)):
            folder = path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(low, low + 85, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return path


def test_own_images_become_a_dataset_of_the_right_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole chain on a folder; it would fail if labels and latents were out of step anywhere."""
    data = ["--dataset", "imagefolder", "--data_dir", str(colour_folder(tmp_path / "photos")), "--image_size", "16"]
    options = [*SMALL[6:], "--max_train_steps", "150", "--learning_rate", "5e-3", "--ema_stds", "0.05"]
    options += ["--checkpointing_steps", "150", "--fid_every", "150", "--train_batch_size", "16", "--log_every", "150"]
    options += ["--observer_epochs", "15"]
    run = tmp_path / "run"
    assert train_ldm.main([*data, *options, "--output_dir", str(run)]) == 0
    assert sample.main(["--run_dir", str(run), "--ipc", "4", "--mixed_precision", "no", "--guidance_scale", "1"]) == 0
    dataset = DistilledDataset.load(run / "distilled" / "ipc4")
    assert dataset.class_names == ("bright", "dark")
    brightness = dataset.pixels.float().mean((1, 2, 3))
    assert brightness[dataset.labels == 0].mean() - brightness[dataset.labels == 1].mean() > 60
    unselected = load_file(run / "baselines" / "random-generated-ipc4.safetensors")
    brightness = unselected["pixels"].float().mean((1, 2, 3))
    assert brightness[unselected["labels"] == 0].mean() - brightness[unselected["labels"] == 1].mean() > 60
    capsys.readouterr()
    scores = ["--epochs", "15", "--repeats", "1", "--protocols", "rded", "--mixed_precision", "no"]
    assert evaluate.main(["--run_dir", str(run), *scores]) == 0
    results = json.loads((run / "evaluation" / "ipc4" / "results.json").read_text())
    assert {row["images"]: row["mean"] for row in results["rows"]}["distilled"] == 1.0


def test_gradients_are_clipped_to_the_norm(run_dir: Path, tmp_path: Path) -> None:
    """Clipped far below Adam's epsilon, they move nothing: the output layer stays at zero."""
    stay = ["--max_grad_norm", "1e-12", "--max_train_steps", "2", "--fid_every", "0"]
    assert run_train(tmp_path / "digits", *stay, "--observer", str(run_dir / "observer")) == 0
    still = load_file(tmp_path / "digits" / "checkpoints" / "step-00000002" / "unet.safetensors")
    moved = load_file(run_dir / "checkpoints" / "step-00000008" / "unet.safetensors")
    assert still["conv_out.weight"].abs().max() < 1e-6 < 1e-4 < moved["conv_out.weight"].abs().max()


def test_bf16_is_computed_and_float32_is_stored(
    run_dir: Path, tmp_path: Path, forget_accelerator: Callable[[], None]
) -> None:
    short = ["--max_train_steps", "2", "--fid_every", "0", "--observer", str(run_dir / "observer")]
    assert run_train(tmp_path / "no", *short) == 0
    forget_accelerator()  # its precision is chosen once a process
    assert run_train(tmp_path / "bf16", *short, "--mixed_precision", "bf16") == 0
    coarse, exact = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("bf16", "no"))
    assert coarse != exact and coarse == pytest.approx(exact, rel=2e-2)
    stored = load_file(tmp_path / "bf16" / "checkpoints" / "step-00000002" / "unet.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_the_curve_says_what_it_costs(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One point costs more than the 7 % that eight tiny steps allow, so there is one, at the end."""
    options = [*SMALL[: SMALL.index("--fid_every")], "--fid_num_images", "12", "--fid_num_inference_steps", "3"]
    options += ["--observer", str(run_dir / "observer")]
    assert train_ldm.main([*options, "--output_dir", str(tmp_path / "digits")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"430 real images in the features of convnet2 \(\d+ s\); 12 of them are at [\d.]+ themselves", out)
    assert re.search(r"FID curve: one point, after the last step, about [\d.]+ % of training\n", out)
    assert re.search(r"the FID curve took \d+\.\d % of the training time\n", out)
    best = re.search(r"best: +fd_convnet2_12 ([\d.]+) at step 8, (ema_[\d.]+)\n", out)
    (point,) = [line for line in metrics(tmp_path / "digits") if "best/step" in line]
    assert best and float(best[1]) == pytest.approx(point[f"fd_convnet2_12/{best[2]}"], rel=1e-3)


def test_distances_in_the_features_of_a_backbone(run_dir: Path, tmp_path: Path) -> None:
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    Dinov2Model(config).save_pretrained(tmp_path / "tiny-dino")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "tiny-dino")
    options = ["--fd_network", str(tmp_path / "tiny-dino"), "--observer", str(run_dir / "observer")]
    assert run_train(tmp_path / "digits", *options, "--fid_every", "8") == 0
    (point,) = [line for line in metrics(tmp_path / "digits") if "best/step" in line]
    assert {"fd_tiny-dino_12/ema_0.05", "kid_tiny-dino_12/ema_0.1", "consistency_convnet2_12/ema_0.1"} <= set(point)


def test_tensorboard_receives_the_metrics(run_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "digits"
    assert (
        run_train(path, "--report_to", "tensorboard", "--observer", str(run_dir / "observer"), "--fid_every", "8") == 0
    )
    accumulator = EventAccumulator(str(path / "ddgen"))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == list(range(1, 9))
    assert [event.step for event in accumulator.Scalars("fd_convnet2_12/ema_0.05")] == [8]
    assert [event.value for event in accumulator.Scalars("best/step")] == [8]


def test_an_observer_alone_serves_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["observer", *OBSERVER_ONLY, "--output_dir", str(tmp_path / "observer")]) == 0
    assert "on held-out real images" in capsys.readouterr().out
    assert run_train(tmp_path / "run", "--observer", str(tmp_path / "observer"), "--max_train_steps", "1") == 0
    ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "observer", tmp_path / "run" / "observer"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- what goes wrong


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            ["--train_batch_size", "9", "--gradient_accumulation_steps", "2"],
            "--train_batch_size 9: must be a multiple of 2",
        ),
        (["--mixed_precision", "fp16"], "--mixed_precision fp16: CPUs silently run float32"),
        (["--classes", "1,eleven"], "eleven"),
        (["--num_classes", "11"], "--num_classes 11"),
        (["--vae", "no/such/autoencoder"], "--vae no/such/autoencoder"),
        (["--observer_network", "convnet9"], "--observer_network convnet9"),
        (["--log_every", "0"], "--log_every 0: give 1 or more"),
        (["--ema_stds", "0"], "--ema_stds 0.0: give 0.005 to 0.25"),
        (["--fid_num_inference_steps", "1001"], "1001: give 1 to 1000"),
        (["--guidance_interval", "0.9", "0.1"], "--guidance_interval 0.9 0.1: give the smaller number first"),
        (["--sampler", "unipc", "--eta", "0.5"], "--eta 0.5: only ddim takes fresh noise, not unipc"),
        (["--eta", "1.5"], "--eta 1.5: give 0 to 1"),
        (["--report_to", "trackio"], "--report_to trackio: not installed; pip install trackio"),
        (["--inception_weights", "nowhere.pth"], "--inception_weights nowhere.pth: no such file"),
        (["--fd_network", "./nowhere"], "--fd_network ./nowhere: no such folder"),
        (["--fid_num_images", "5"], "--fid_num_images 5: give 6 or more"),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere: no such folder"),
        (["--observer", "./nowhere"], "--observer ./nowhere: no such folder"),
        (["--unet_channels", "32", "32", "32", "32"], "4 resolutions do not fit 4 x 4 latents"),
    ],
)
def test_impossible_settings_stop_before_training(
    extra: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_train(tmp_path / "digits", *extra) == 2
    assert expected in complaint(capsys)
    assert not (tmp_path / "digits").exists()


def test_an_observer_near_chance_can_be_trained_again_in_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weak = ["--observer_learning_rate", "1e-9", "--observer_epochs", "1"]
    assert run_train(tmp_path / "digits", *weak) == 2
    assert "on real held-out images, chance is 33.3%" in complaint(capsys)
    assert run_train(tmp_path / "digits", "--resume_from_checkpoint", "latest", "--max_train_steps", "8") == 0


def test_a_file_for_a_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert run_train(tmp_path / "taken") == 2
    assert "taken: is a file" in complaint(capsys)
    assert run_train(tmp_path / "taken" / "below") == 2
    assert "Not a directory" in complaint(capsys)


def test_no_dataset_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_ldm.main([]) == 2
    assert "--dataset: not set" in complaint(capsys)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--run_dir", "nowhere"], "--run_dir nowhere: no finished run"),
        ([], "--run_dir: no finished run under runs/"),
        (["--ipc", "0"], "--ipc 0"),
    ],
)
def test_sampling_without_a_run_says_so(
    argv: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sample.main(argv) == 2
    assert expected in complaint(capsys)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--num_inference_steps", "1001"], "--num_inference_steps 1001: give 1 to 1000"),
        (["--guidance_interval", "0.9", "0.1"], "--guidance_interval 0.9 0.1"),
        (["--sampler", "euler"], "euler"),
        (["--soft_label_temperature", "0"], "--soft_label_temperature 0"),
        (
            ["--budget_seconds", "9", "--candidates_per_image", "2"],
            "--candidates_per_image 2: --budget_seconds decides",
        ),
        (["--ipc", "0"], "--ipc 0: keeps every candidate, so say with --budget_seconds"),
    ],
)
def test_impossible_sampling_is_named(
    argv: list[str], expected: str, own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample.main(["--run_dir", str(own_run), "--ipc", "1", "--mixed_precision", "no", *argv]) == 2
    assert expected in complaint(capsys)
    assert not (own_run / "distilled").exists()


def test_an_existing_distilled_dataset_is_replaced_only_when_asked(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--run_dir", str(own_run), "--ipc", "1", "--mixed_precision", "no"]
    assert sample.main(args) == 0
    assert sample.main(args) == 2
    assert "exists already; give another, or --overwrite" in complaint(capsys)
    assert sample.main([*args, "--overwrite", "--seed", "1"]) == 0
    assert set(DistilledDataset.load(own_run / "distilled" / "ipc1").seeds.tolist()) == {1}


def test_another_class_order_is_refused(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = own_run / "observer" / "config.json"
    observer = json.loads(config.read_text())
    observer["class_names"] = ["0", "2", "1"]
    config.write_text(json.dumps(observer))
    assert sample.main(["--run_dir", str(own_run), "--ipc", "1"]) == 2
    message = complaint(capsys)
    assert "1" in message and "2" in message and "--observer" in message


def test_evaluating_without_a_distilled_dataset_says_so(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--run_dir", str(own_run)]) == 2
    assert "no distilled dataset in it yet" in complaint(capsys)
    assert evaluate.main(["--distilled_dir", str(own_run), "--output_dir", str(own_run / "out")]) == 2
    assert "no manifest.json" in complaint(capsys)


def test_pixels_are_what_the_files_hold(own_run: Path) -> None:
    assert sample.main(["--run_dir", str(own_run), "--ipc", "1", "--mixed_precision", "no"]) == 0
    folder = own_run / "distilled" / "ipc1"
    dataset = DistilledDataset.load(folder)
    with Image.open(folder / "train" / "0" / "00000.png") as image:
        first = np.asarray(image)
    assert np.array_equal(first, dataset.pixels[0].permute(1, 2, 0).numpy())


# --- what a run says of itself


def test_first_lines_are_the_same_for_a_dry_run_and_a_real_one(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--fid_every", "0", "--max_train_steps", "1", "--observer", str(run_dir / "observer"))
    assert run_train(tmp_path / "digits", *options, "--dry_run") == 0
    dry = capsys.readouterr().out.splitlines()
    assert dry[-1] == "dry run: the settings and the data are fine; nothing was written"
    assert not (tmp_path / "digits").exists()
    assert run_train(tmp_path / "digits", *options) == 0
    out = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(dry) if line.startswith("ddgen 0"))
    names = ["device", "numbers", "data", "observer", "autoencoder", "denoiser", "training", "time", "disk", "output"]
    assert [line.split()[0] for line in dry[start + 1 : -1]] == [*names, "resume"]
    same = [line for line in dry[start:-1] if not line.startswith(("time", "disk"))]
    assert all(line in out for line in same)
    text = "\n".join(dry)
    assert "1 thread, 1 process" in text and "3 classes of 1" in text and "latents 4 x 4 x 4" in text
    assert "1 step of 8 images (1 process x 8 x 1 accumulated)" in text
    assert re.search(r"^time +about [\d.]+ s: autoencoder [\d.]+ s, denoiser [\d.]+ s$", text, re.MULTILINE)
    assert out[-2].startswith("peak memory: ") and out[-1].startswith("next: ")


def test_model_card_shows_what_was_reached_and_its_pictures(run_dir: Path) -> None:
    card = (run_dir / "generator" / "README.md").read_text()
    points = [line for line in metrics(run_dir) if "fd_convnet2_12/ema_0.05" in line]
    ends = {std: points[-1][f"fd_convnet2_12/ema_{std}"] for std in ("0.05", "0.1")}
    kept = min(ends, key=ends.__getitem__)
    assert f"| `fd_convnet2_12` | {ends[kept]:.4g} | 8 |" in card
    assert f"| `recall_convnet2_12` | {points[-1][f'recall_convnet2_12/ema_{kept}']:.4g} | 8 |" in card
    lowest = min(value for point in points for name, value in point.items() if name.startswith("fd_"))
    assert f"Lowest `fd_convnet2_12` of the run: {lowest:.4g} at step " in card
    assert f"| weights kept | power-function average of relative width {kept} |" in card
    assert json.loads((run_dir / "dataset.json").read_text())["fingerprint"] in card
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card)
    assert shown[:3] == ["step-00000008.png", "fid_curve.png", "reconstructions.png"]
    for name in shown:
        assert (run_dir / "generator" / name).read_bytes() == next(run_dir.rglob(name)).read_bytes()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "diffusers"
    assert "| seed | 0 |" in card and "8 steps of 8 images" in card and "## Limits" in card


def test_a_step_is_timed_with_no_more_images_than_a_few_seconds_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock.now)
    counts: list[int] = []

    def step(count: int) -> None:
        counts.append(count)
        clock.now += 0.5 * count + (100 if len(counts) == 1 else 0)

    assert estimate.seconds_per_image(step, 128, torch.device("cpu")) == pytest.approx(0.5)
    assert counts == [4, 4, 4, 4]
    counts.clear()
    assert estimate.seconds_per_image(lambda count: step(count // 4), 16, torch.device("cpu")) == pytest.approx(0.125)
    assert counts[-1] == 12 // 4
