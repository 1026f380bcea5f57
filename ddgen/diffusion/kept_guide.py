"""The guide that a training keeps of itself: the averages of its weights after a part of the steps.

Source: Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself"; docs/sampling.md measures it.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from safetensors import SafetensorError, safe_open

from ddgen.checkpoint import read_json, write_bytes
from ddgen.config import OptimizerConfig
from ddgen.diffusion.generator import Generator, KeptGuide
from ddgen.diffusion.posthoc import halved
from ddgen.diffusion.run import TrainingRun
from ddgen.errors import UserError
from ddgen.resume import full_disk_explained, on_main

GUIDE_NAME = "guide.safetensors"


def keep_guide(run: TrainingRun, optim: OptimizerConfig, accelerator: Accelerator) -> None:
    """Writes all averages, float16, into the run folder if this is the step for it; whole or not at all.

    A run that goes on from before that step comes by here again and writes the same bytes.

    Args:
        run: What is trained.
        optim: Says after which step.
        accelerator: Every process must call this.

    Raises:
        UserError: The disk is full.
    """
    if run.step != optim.guide_step:
        return
    tensors = halved(run.ema, [name for name, _ in run.unet.named_parameters()])

    def write() -> None:
        data = safetensors.torch.save(tensors, {"step": str(run.step)})
        with full_disk_explained(run.output_dir, len(data)):
            write_bytes(run.output_dir / GUIDE_NAME, data)

    on_main(accelerator, write)


def take_along(checkpoint: Path, output_dir: Path, accelerator: Accelerator) -> None:
    """Copies the guide of the run that a checkpoint is of, if it is another run's than the one that goes on from it.

    Raises:
        UserError: The disk is full.
    """
    source, own = _beside(checkpoint), output_dir / GUIDE_NAME

    def copy() -> None:
        if source.is_file() and not own.exists():
            with full_disk_explained(output_dir, source.stat().st_size):
                write_bytes(own, source.read_bytes())

    on_main(accelerator, copy)


def is_missed(optim: OptimizerConfig, output_dir: Path, checkpoint: Path) -> bool:
    """Whether a run that goes on from a checkpoint will have no guide: it is past the step, and none was kept."""
    if not optim.guide_step or not (checkpoint / "state.json").is_file():
        return False
    past = read_json(checkpoint / "state.json")["step"] >= optim.guide_step
    return past and not any(_is_of(path, optim.guide_step) for path in (output_dir / GUIDE_NAME, _beside(checkpoint)))


def kept_guide(optim: OptimizerConfig, output_dir: Path, generator: Generator) -> KeptGuide | None:
    """Returns the guide of a finished training: the average that the generator is, if it was tracked, or the first.

    Args:
        optim: Settings of the training.
        output_dir: Its run folder.
        generator: What came out.

    Returns:
        None if none was asked for, or the run went on from a checkpoint that knew of none.
    """
    path, step = output_dir / GUIDE_NAME, optim.guide_step
    if not step or not _is_of(path, step):
        return None
    std = generator.ema_std if generator.ema_std in optim.ema_stds else optim.ema_stds[0]
    with torch.device("meta"):
        unet = UNet2DModel.from_config(generator.unet.config)
    with safe_open(path, framework="pt") as file:
        unet.load_state_dict({name: file.get_tensor(f"{std}/{name}") for name in unet.state_dict()}, assign=True)
    return KeptGuide(unet.eval().requires_grad_(False), step, optim.max_train_steps, std)


def _beside(checkpoint: Path) -> Path:
    """Returns where the run of a checkpoint, RUN/checkpoints/step-*, keeps its guide."""
    return checkpoint.absolute().parent.parent / GUIDE_NAME


def _is_of(path: Path, step: int) -> bool:
    """Whether a guide is there and was kept after `step` steps; refuses half of one, as a copied run may have."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return bool(file.metadata() == {"step": str(step)})
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); copy it again, or delete it and go on without a guide") from None
