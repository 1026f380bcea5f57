"""A training run: weights, optimizer, averages and step, and how they are written and read back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddgen.autoencoder.latents import LatentCache
from ddgen.checkpoint import atomic_dir, checkpoint_dir, read_json, write_json
from ddgen.config import OptimizerConfig, TrainConfig
from ddgen.diffusion.ema import PowerEMA
from ddgen.diffusion.unet import build_unet
from ddgen.errors import UserError
from ddgen.precision import memory_format
from ddgen.seeds import derive
from ddgen.sharding import is_sharded, load_optimizer_state, part_of, uses_fsdp, whole, whole_optimizer_state


@dataclass
class TrainingRun:
    """Everything that changes while training runs, and where it is written.

    Attributes:
        unet: The denoiser, float32.
        optimizer: AdamW.
        ema: Averages of the denoiser's weights.
        step: Optimizer steps done.
        output_dir: The run folder.
        identity: What must be the same in a run and in its resumption.
        scaler: Loss scaler of fp16, otherwise None.
        metric: Name of the distance that the FID curve shows.
        distances: "ema_<std>" -> (step, distance from the real images) of every point of the FID curve.
    """

    unet: UNet2DModel
    optimizer: torch.optim.Optimizer
    ema: PowerEMA
    output_dir: Path
    identity: dict[str, Any]
    step: int = 0
    scaler: Any = None
    metric: str = ""
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
        identity = _identity(config, latents, class_names)
        return cls(unet, optimizer, ema, output_dir, identity, scaler=accelerator.scaler)

    @property
    def checkpoints_dir(self) -> Path:
        return self.output_dir / "checkpoints"

    def follow(self, optim: OptimizerConfig) -> None:
        """Averages the weights that there are after `Accelerator.prepare`, which replaces them under FSDP."""
        if is_sharded(self.unet):
            self.ema = PowerEMA(list(self.unet.parameters()), optim.ema_stds)

    def save(self, *, write: bool) -> None:
        """Writes a checkpoint; complete or not at all.

        Args:
            write: Whether this is the process that writes. Under FSDP the others must call this too.
        """
        path = checkpoint_dir(self.checkpoints_dir, self.step)
        if not write and not is_sharded(self.unet):
            return
        names = [name for name, _ in self.unet.named_parameters()]
        tensors = {"unet": {name: whole(tensor) for name, tensor in self.unet.state_dict().items()}}
        for std, average in self.ema.averages.items():
            tensors[f"ema_{std}"] = {name: whole(tensor) for name, tensor in zip(names, average, strict=True)}
        optimizer = whole_optimizer_state(self.optimizer)
        if not write or path.exists():
            return
        with atomic_dir(path) as temporary:
            for name, values in tensors.items():
                _save_tensors(values, temporary / f"{name}.safetensors")
            torch.save(optimizer, temporary / "optimizer.pt")
            scaler = self.scaler.state_dict() if self.scaler is not None else None
            write_json(temporary / "state.json", {"step": self.step, "identity": self.identity, "scaler": scaler})

    def add_distance(self, metric: str, std: float, step: int, distance: float) -> None:
        """Adds a point to the FID curve; one of another distance starts it anew, since they do not compare."""
        if metric != self.metric:
            self.metric, self.distances = metric, {}
        self.distances.setdefault(f"ema_{std}", []).append((step, distance))

    def load(self, path: Path) -> None:
        """Goes back to a checkpoint.

        Raises:
            UserError: It is not a checkpoint, or of another run.
        """
        if not (path / "state.json").is_file():
            raise UserError(
                f"--resume_from_checkpoint {path}: not a checkpoint; give `latest` or a checkpoints/step-* folder"
            )
        state = read_json(path / "state.json")
        for name, value in self.identity.items():
            if state["identity"].get(name) != value:
                raise UserError(
                    f"--resume_from_checkpoint {path}: was made with {name} {state['identity'].get(name)}, not {value};"
                    " use the same settings, or another --output_dir for a new run"
                )
        try:
            self._load_tensors(path)
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            cause = " ".join(str(error).split())[:160]
            raise UserError(
                f"--resume_from_checkpoint {path}: damaged ({cause}); delete it, go on from another"
            ) from None
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    def _load_tensors(self, path: Path) -> None:
        saved = load_file(path / "unet.safetensors")
        state = self.unet.state_dict()
        self.unet.load_state_dict({name: part_of(saved[name], tensor) for name, tensor in state.items()})
        names = [name for name, _ in self.unet.named_parameters()]
        for std, average in self.ema.averages.items():
            saved = load_file(path / f"ema_{std}.safetensors")
            for name, tensor in zip(names, average, strict=True):
                tensor.copy_(part_of(saved[name], tensor))
        state = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
        load_optimizer_state(self.optimizer, state)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes safetensors, which hold no channels-last layout."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _identity(config: TrainConfig, latents: LatentCache, class_names: tuple[str, ...]) -> dict[str, Any]:
    """What must be the same in a run and in its resumption; how the work is spread over hardware may change."""
    settings = {**dataclasses.asdict(config.denoiser), **dataclasses.asdict(config.optimizer)}
    for name in ("mixed_precision", "gradient_accumulation_steps", "gradient_checkpointing", "torch_compile"):
        del settings[name]
    settings |= {
        "seed": config.run.seed,
        "class_names": class_names,
        "latents": latents.fingerprint,
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
