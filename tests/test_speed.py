"""The hot path of training: batches made ahead, compilation, and what the work is counted as."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddgen import hardware
from ddgen.autoencoder.autoencoder import wrap
from ddgen.autoencoder.latents import LatentCache
from ddgen.autoencoder.patch_autoencoder import PatchAutoencoderKL
from ddgen.config import DenoiserConfig, MonitorConfig, OptimizerConfig, RunConfig, TrainConfig
from ddgen.diffusion import report
from ddgen.diffusion.batches import Batches
from ddgen.diffusion.ema import PowerEMA
from ddgen.diffusion.flops import flops_per_image
from ddgen.diffusion.objective import DiffusionLoss, build_scheduler
from ddgen.diffusion.samplers import Schedule
from ddgen.diffusion.training import train_diffusion
from ddgen.diffusion.unet import build_unet
from ddgen.hardware import peak_flops, readable_flops
from ddgen.precision import fast_bf16

CPU = torch.device("cpu")
CONFIG = DenoiserConfig(preset="xs", unet_channels=(32, 32), unet_layers_per_block=1)


def make_batches(*, ahead: bool, slices: tuple[slice, ...] = (slice(0, 6),), device: torch.device = CPU) -> Batches:
    source = torch.Generator().manual_seed(0)
    moments = [torch.randn(20, 2, 4, 4, 4, generator=source).half() for _ in range(2)]
    labels = torch.randint(0, 3, (20,), generator=source)
    latents = LatentCache(moments[0], moments[1].abs(), "f")
    config = TrainConfig(denoiser=CONFIG, optimizer=OptimizerConfig(train_batch_size=6))
    return Batches(config, latents, labels, list(slices), 1000, device, ahead=ahead)


def schedule_on(device: torch.device) -> Schedule:
    return Schedule.of(build_scheduler(CONFIG)).to(device, torch.float32)


@pytest.mark.parametrize("steps", [(0, 1, 2, 3), (7, 8, 2, 2, 3)], ids=["in-order", "resumed-elsewhere"])
def test_batches_made_ahead_are_the_same_batches(steps: tuple[int, ...]) -> None:
    now, before = make_batches(ahead=False), make_batches(ahead=True)
    for step in steps:
        [a], [b] = now.at(step), before.at(step)
        assert torch.equal(a.latents, b.latents) and torch.equal(a.labels, b.labels)
        assert all(torch.equal(getattr(a.draws, name), getattr(b.draws, name)) for name in vars(a.draws))
    before.close()
    assert before.thread is not None and before.thread._shutdown and now.thread is None


def test_micro_batches_are_parts_of_the_global_batch() -> None:
    [whole] = make_batches(ahead=False).at(4)
    parts = make_batches(ahead=False, slices=(slice(2, 4), slice(0, 2))).at(4)
    for part, where in zip(parts, (slice(2, 4), slice(0, 2)), strict=True):
        assert torch.equal(part.latents, whole.latents[where]) and torch.equal(part.labels, whole.labels[where])
        assert torch.equal(part.draws.timesteps, whole.draws.timesteps[where])
    mean, draws = make_batches(ahead=False).latents, whole.draws
    assert not torch.equal(whole.latents, mean.mean[:6, 0].float()) and draws.noise.shape == (6, 4, 4, 4)


def test_compiled_unet_keeps_its_names_and_its_gradients() -> None:
    """In place, as training does it; inductor would take minutes here, so the graph is run as it was captured."""
    torch.manual_seed(0)
    config = DenoiserConfig(preset="xs", unet_channels=(32,), unet_layers_per_block=1)
    plain = build_unet(config, latent_channels=4, latent_size=4, num_classes=3)
    torch.nn.init.normal_(plain.conv_out.weight, std=0.1)
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="eager", fullgraph=True)
    [part] = make_batches(ahead=False).at(0)
    objective = DiffusionLoss(CONFIG, schedule_on(CPU), null_label=3, precision="no")
    losses = [objective(unet, part.latents, part.labels, part.draws) for unet in (plain, compiled)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6)
    assert copy.deepcopy(compiled)._compiled_call_impl is None  # what samples is never compiled


def test_compilation_is_for_gpus_unless_asked_for() -> None:
    assert OptimizerConfig().compiles_on("cuda") and not OptimizerConfig().compiles_on("cpu")
    assert OptimizerConfig(torch_compile=True).compiles_on("cpu")
    assert not OptimizerConfig(torch_compile=False).compiles_on("cuda")


class _Reads(TorchDispatchMode):
    """Counts how often a tensor's value is asked for, which waits for a GPU to finish what it was given."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")
        return function(*args, **(kwargs or {}))


def test_steps_between_two_log_lines_read_no_tensor(
    tmp_path: Path, forget_accelerator: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "flops_per_image", lambda unet: 1.0)
    vae = PatchAutoencoderKL(latent_channels=4, downsample=4, block_out_channels=())
    batches = make_batches(ahead=False)
    counts = []
    for steps in (3, 7):
        forget_accelerator()
        optimizer = OptimizerConfig(max_train_steps=steps, train_batch_size=6, gradient_accumulation_steps=2)
        config = TrainConfig(
            run=RunConfig(checkpointing_steps=100), denoiser=CONFIG, optimizer=optimizer,
            monitor=MonitorConfig(fid_every=0, log_every=100),
        )  # fmt: skip
        (tmp_path / str(steps)).mkdir()
        with _Reads() as reads:
            train_diffusion(
                config, batches.latents, batches.labels, wrap(vae, CPU, "no"), ("a", "b", "c"), 16,
                accelerator=Accelerator(), precision="no", output_dir=tmp_path / str(steps), resume_from=None,
            )  # fmt: skip
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0  # the log line at the end reads the loss


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_never_waits_for_the_gpu() -> None:
    device = torch.device("cuda")
    unet = build_unet(CONFIG, latent_channels=4, latent_size=4, num_classes=3).to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    ema = PowerEMA(list(unet.parameters()), (0.05, 0.1))
    objective = DiffusionLoss(CONFIG, schedule_on(device), null_label=3, precision="bf16")
    batches = make_batches(ahead=True, device=device)
    assert batches.latents.mean.device.type == "cuda"
    try:
        for step in range(4):
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            [part] = batches.at(step)
            objective(unet, part.latents, part.labels, part.draws).backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(step + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        batches.close()


# --- counting


def test_flops_are_those_of_every_convolution_product_and_attention() -> None:
    """A hand count of the forward: the backward is twice that, less the gradients of what is not trained."""
    config = DenoiserConfig(preset="xs", unet_channels=(32, 64), unet_layers_per_block=1)
    unet = build_unet(config, latent_channels=4, latent_size=8, num_classes=3)
    forward: list[float] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            forward.append(2 * output[0].numel() * module.in_channels * math.prod(module.kernel_size))
        elif isinstance(module, nn.Linear):
            forward.append(2 * output[0].numel() * module.in_features)
        elif isinstance(module, Attention):
            tokens = output.shape[2] * output.shape[3]
            forward.append(2 * 2 * tokens * tokens * module.inner_dim)

    for module in unet.modules():
        module.register_forward_hook(count)
    index = torch.tensor([1])
    unet(torch.randn(1, 4, 8, 8), index, index)
    untrained_inputs = 2 * 32 * 8 * 8 * 4 * 9 + 2 * 32 * 128  # conv_in's and the time embedding's
    assert flops_per_image(unet) == pytest.approx(3 * sum(forward) - untrained_inputs, rel=1e-9)
    assert not unet.conv_in.weight.is_meta


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "fp16", 311.9),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090", "no", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets_or_unknown(name: str, precision: str, teraflops: float | None) -> None:
    assert peak_flops(name, precision) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_rates_read_well() -> None:
    assert readable_flops(98.2e9) == "98.2 GFLOP/s"
    assert readable_flops(346.3e12, 989.4e12) == "346 TFLOP/s, 35 % of peak"


def test_real_number_format_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "fast_bf16", lambda device: False)
    assert hardware.number_format(CPU, "no") == "float32: this CPU has no fast bf16"
    assert "emulates" in hardware.number_format(CPU, "bf16")
    monkeypatch.setattr(hardware, "fast_bf16", lambda device: True)
    assert hardware.number_format(CPU, "bf16") == "bf16, with float32 weights and loss"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_peak_memory_is_what_the_kernel_says() -> None:
    number, unit, *_ = hardware.peak_memory(CPU).split()
    kibibytes = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])
    assert float(number) * {"MiB": 1024, "GiB": 1024**2}[unit] == pytest.approx(kibibytes, rel=0.05)


@pytest.mark.parametrize(("amx", "avx512", "expected"), [(0, 0, False), (1, 0, True), (0, 1, True)])
def test_a_cpu_is_fast_at_bf16_that_has_instructions_for_it(
    amx: int, avx512: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    assert fast_bf16(torch.device("cpu")) is expected
