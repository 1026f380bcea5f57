"""A training run: weights, optimizer, averages and step, and how they are written and read back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from ddgen.autoencoder.latents import LatentCache
from ddgen.config import OptimizerConfig, TrainConfig
from ddgen.diffusion.ema import PowerEMA
from ddgen.diffusion.unet import build_unet
from ddgen.precision import memory_format
from ddgen.resume import METRICS_NAME, Checkpoints, Snapshot
from ddgen.seeds import derive
from ddgen.sharding import is_sharded, load_optimizer_state, part_of, uses_fsdp, whole, whole_optimizer_state


@dataclass
class TrainingRun:
    """Everything that changes while training runs, and where it is written.

    Attributes:
        unet: The denoiser, float32.
        optimizer: AdamW.
        ema: Averages of the denoiser's weights.
        output_dir: The run folder.
        checkpoints: Where it is saved, and what must be the same in a run and in its resumption.
        step: Optimizer steps done.
        scaler: Loss scaler of fp16, otherwise None.
        metric: Name of the distance that the FID curve shows.
        open_losses: Loss of every step since the last line of metrics.jsonl, as far as anyone has looked.
        distances: "ema_<std>" -> (step, distance from the real images) of every point of the FID curve.
    """

    unet: UNet2DModel
    optimizer: torch.optim.Optimizer
    ema: PowerEMA
    output_dir: Path
    checkpoints: Checkpoints
    step: int = 0
    scaler: Any = None
    metric: str = ""
    open_losses: list[float] = field(default_factory=list)
    distances: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        config: TrainConfig,
        latents: LatentCache,
        class_names: tuple[str, ...],
        *,
        accelerator: Accelerator,
        precision: str,
        output_dir: Path,
    ) -> TrainingRun:
        """Returns a run at step 0: weights drawn from the seed, on the accelerator's device."""
        torch.manual_seed(derive(config.run.seed, "diffusion", "weights"))
        # FSDP takes contiguous weights only.
        layout = torch.contiguous_format if uses_fsdp(accelerator) else memory_format(accelerator.device, precision)
        unet = build_unet(
            config.denoiser,
            latent_channels=latents.mean.shape[2],
            latent_size=latents.mean.shape[3],
            num_classes=len(class_names),
        ).to(accelerator.device, memory_format=layout)
        optim = config.optimizer
        optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=optim.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=optim.adam_weight_decay,
            fused=True,
        )
        ema = PowerEMA(list(unet.parameters()), optim.ema_stds)
        checkpoints = Checkpoints(
            output_dir / "checkpoints",
            _identity(config, latents, class_names),
            metrics_path=output_dir / METRICS_NAME,
            keep=config.run.checkpoints_total_limit,
        )
        return cls(unet, optimizer, ema, output_dir, checkpoints, scaler=accelerator.scaler)

    def follow(self, optim: OptimizerConfig) -> None:
        """Averages the weights that there are after `Accelerator.prepare`, which replaces them under FSDP."""
        if is_sharded(self.unet):
            self.ema = PowerEMA(list(self.unet.parameters()), optim.ema_stds)

    def snapshot(self) -> Snapshot:
        """Returns what a checkpoint holds; under FSDP every process must call this."""
        names = [name for name, _ in self.unet.named_parameters()]
        tensors = {"unet": {name: whole(tensor) for name, tensor in self.unet.state_dict().items()}}
        for std, average in self.ema.averages.items():
            tensors[f"ema_{std}"] = {name: whole(tensor) for name, tensor in zip(names, average, strict=True)}
        scaler = self.scaler.state_dict() if self.scaler is not None else None
        latents = [self.unet.config.in_channels, self.unet.config.sample_size]  # read by autoguidance.py
        facts = {"scaler": scaler, "open_losses": self.open_losses, "latents": latents}
        return Snapshot(self.step, tensors, whole_optimizer_state(self.optimizer), facts)

    def add_distance(self, metric: str, std: float, step: int, distance: float) -> None:
        """Adds a point to the FID curve; one of another distance starts it anew, since they do not compare."""
        if metric != self.metric:
            self.metric, self.distances = metric, {}
        self.distances.setdefault(f"ema_{std}", []).append((step, distance))

    def go_back(self, saved: Snapshot) -> None:
        """Takes everything from a snapshot."""
        state = self.unet.state_dict()
        self.unet.load_state_dict({name: part_of(saved.tensors["unet"][name], part) for name, part in state.items()})
        names = [name for name, _ in self.unet.named_parameters()]
        for std, average in self.ema.averages.items():
            for name, tensor in zip(names, average, strict=True):
                tensor.copy_(part_of(saved.tensors[f"ema_{std}"][name], tensor))
        load_optimizer_state(self.optimizer, saved.optimizer)
        if self.scaler is not None and saved.facts["scaler"]:
            self.scaler.load_state_dict(saved.facts["scaler"])
        self.open_losses = list(saved.facts["open_losses"])
        self.step = saved.step


def _identity(config: TrainConfig, latents: LatentCache, class_names: tuple[str, ...]) -> dict[str, Any]:
    """What must be the same in a run and in its resumption; how the work is spread over hardware may change."""
    settings = {**dataclasses.asdict(config.denoiser), **dataclasses.asdict(config.optimizer)}
    spread = ("mixed_precision", "gradient_accumulation_steps", "gradient_checkpointing", "torch_compile")
    for name in (*spread, "guide_fraction"):  # the guide is kept beside what is trained, and does not change it
        del settings[name]
    return settings | {"seed": config.run.seed, "class_names": class_names, "latents": latents.fingerprint}
