"""Several processes and machines: the same latents and the same training as one process.

This file is also the script that the processes run: `python -m torch.distributed.run tests/test_scale.py JOB FOLDER`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from ddgen.autoencoder import latents as latents_module
from ddgen.launch import start_asked_for_processes

ROOT = Path(__file__).parents[1]
NUM_IMAGES, NUM_CLASSES = 60, 3


# --- what the processes do


def train(folder: Path) -> None:
    """Trains in `folder` and, if TEST_RESUME names a checkpoint, goes on from it in `folder`/again."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    from ddgen.commands.runs import start_accelerator
    from ddgen.sharding import check_supported

    accelerator, _ = start_accelerator("no")
    if "TEST_FSDP" in os.environ:  # accelerate offers it on GPUs only; torch does it on CPUs too
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["ResnetBlock2D", "Attention"],
        )
        check_supported(accelerator)
    train_once(folder, None, accelerator)
    if "TEST_RESUME" in os.environ:
        train_once(folder / "again", Path(os.environ["TEST_RESUME"]), accelerator)
    accelerator.end_training()


def train_once(folder: Path, resume_from: Path | None, accelerator: Accelerator) -> None:
    """Caches the latents of made-up images in four shards and trains on them; leaves losses and weights in `folder`."""
    from ddgen.autoencoder.autoencoder import wrap
    from ddgen.autoencoder.patch_autoencoder import PatchAutoencoderKL
    from ddgen.autoencoder.pca import fit_pca
    from ddgen.config import TrainConfig, from_flat_dict
    from ddgen.diffusion.training import train_diffusion

    latents_module.shard_size_of = lambda _: 16
    latents_module.batch_size_of = lambda *_: 8
    noise = torch.randn(NUM_IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels = (torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2) * 120 + 128).clamp(0, 255).to(torch.uint8)
    model = PatchAutoencoderKL(latent_channels=6, downsample=4, block_out_channels=())
    model.set_pca(*fit_pca(pixels, 4, 6, seed=0))
    autoencoder, latents = latents_module.build_latent_cache(
        wrap(model, accelerator.device, "no"),
        pixels,
        folder / "latents",
        flip=True,
        fingerprint="x",
        accelerator=accelerator,
    )
    settings = {"unet_channels": [32, 32], "unet_layers_per_block": 1, "train_batch_size": 12, "max_train_steps": 6}
    settings |= {"fid_every": 0, "sample_every": 6, "log_every": 1, "checkpointing_steps": 3, "lr_warmup_steps": 2}
    settings |= {"fid_num_inference_steps": 2, **json.loads(os.environ.get("TEST_SETTINGS", "{}"))}
    generator = train_diffusion(
        from_flat_dict(TrainConfig, settings, "test"),
        latents,
        torch.arange(NUM_IMAGES) % NUM_CLASSES,
        autoencoder,
        ("a", "b", "c"),
        16,
        accelerator=accelerator,
        precision="no",
        output_dir=folder,
        resume_from=resume_from,
    )
    if accelerator.is_main_process:
        tensors = {name: tensor.contiguous() for name, tensor in generator.unet.state_dict().items()}
        save_file(tensors, folder / "generator.safetensors")


def load(folder: Path) -> None:
    """Loads a dataset with the cache of its own machine, and says who did what."""
    from ddgen.commands.runs import check_shared, load_on_all, start_accelerator
    from ddgen.config import DataConfig

    accelerator, _ = start_accelerator("no")
    dataset = load_on_all(accelerator, DataConfig(dataset="digits", image_size=16, num_classes=2), "test")
    if accelerator.is_main_process:
        (folder / "written").touch()
    check_shared(folder / "written", accelerator)
    said = {"processes": accelerator.num_processes, "local": accelerator.local_process_index, "images": len(dataset)}
    (folder / f"process{accelerator.process_index}.json").write_text(json.dumps(said))
    accelerator.end_training()


# --- the tests


def start(command: list[str], job: str, folder: Path, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, "-m", *command, __file__, job, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    try:
        out, _ = process.communicate(timeout=300)  # seconds where the machine has nothing else to do
    finally:
        process.kill()
    assert process.returncode == 0, out[-3000:]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a run has learned: the generator, and weights, averages and moments of its last checkpoint."""
    checkpoint = folder / "checkpoints" / "step-00000006"
    found = {"generator": torch.cat([t.flatten() for t in load_file(folder / "generator.safetensors").values()])}
    for name in ("unet", "ema_0.05", "ema_0.1"):
        tensors = load_file(checkpoint / f"{name}.safetensors")
        found[name] = torch.cat([tensors[key].flatten() for key in sorted(tensors)])
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    found["exp_avg"] = torch.cat([state[number]["exp_avg"].flatten() for number in sorted(state)])
    return found


def assert_same(ours: Path, theirs: Path) -> None:
    """Of weights that moved by 1e-3 each. The mean, since Adam blows up the rounding of gradients that are zero."""
    found, expected = weights(ours), weights(theirs)
    for name in expected:
        assert (found[name] - expected[name]).abs().mean() < 1e-6, name


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents_module, "shard_size_of", latents_module.shard_size_of)  # which `train_once` replaces
        patch.setattr(latents_module, "batch_size_of", latents_module.batch_size_of)
        train_once(folder, None, Accelerator(cpu=True))
    return folder


def test_three_processes_with_two_micro_batches_each_train_like_one(by_one: Path, tmp_path: Path) -> None:
    command = ["torch.distributed.run", "--nproc_per_node", "3", "--master_port", free_port()]
    finish(start(command, "train", tmp_path, TEST_SETTINGS=json.dumps({"gradient_accumulation_steps": 2})))
    for name in ("mean.npy", "std.npy", "meta.json"):
        assert (tmp_path / "latents" / name).read_bytes() == (by_one / "latents" / name).read_bytes()
    assert losses(tmp_path) == pytest.approx(losses(by_one), rel=1e-4)
    assert_same(tmp_path, by_one)


def test_sharded_weights_train_like_whole_ones(by_one: Path, tmp_path: Path) -> None:
    """FSDP, from scratch, and resumed from a checkpoint that was made without it."""
    command = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    checkpoint = str(by_one / "checkpoints" / "step-00000003")
    finish(start(command, "train", tmp_path, TEST_FSDP="1", TEST_RESUME=checkpoint))
    assert losses(tmp_path) == pytest.approx(losses(by_one), rel=1e-4)
    assert losses(tmp_path / "again") == pytest.approx(losses(by_one), rel=1e-4)  # the first three came with it
    assert_same(tmp_path, by_one)
    assert_same(tmp_path / "again", by_one)
    for folder in (tmp_path, tmp_path / "again"):
        assert (folder / "samples" / "step-00000006.png").is_file()
    ours, theirs = (load_file(folder / "guide.safetensors") for folder in (tmp_path, by_one))
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), rtol=2e-3, atol=1e-5) for name in theirs)
    assert (tmp_path / "again" / "guide.safetensors").read_bytes() == (by_one / "guide.safetensors").read_bytes()


def test_two_machines_are_one_run_with_a_data_cache_each(tmp_path: Path) -> None:
    port = free_port()
    machines = []
    for rank in (0, 1):
        launch = ["accelerate.commands.launch", "--cpu", "--num_machines", "2", "--num_processes", "2"]
        launch += ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        launch += ["--num_cpu_threads_per_process", "1"]
        machines.append(start(launch, "load", tmp_path, DDGEN_CACHE=str(tmp_path / f"cache{rank}")))
    for machine in machines:
        finish(machine)
    said = [json.loads((tmp_path / f"process{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1] and said[0]["processes"] == 2 and said[0]["local"] == 0
    for rank in (0, 1):
        assert len(list((tmp_path / f"cache{rank}" / "packed").glob("*/pixels.npy"))) == 1


if __name__ == "__main__":
    start_asked_for_processes()
    {"train": train, "load": load}[sys.argv[1]](Path(sys.argv[2]))
