"""The generator of a run, as ``sample`` is told to use it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ddgen.config import FAST, STEPS, SampleConfig
from ddgen.diffusion.autoguidance import find_guide
from ddgen.diffusion.generator import Generator, check_sampling, load_generator
from ddgen.errors import UserError


def own_generator(config: SampleConfig, path: Path, device: torch.device, precision: str) -> Generator:
    """Loads a generator that ddgen trained, sampling as the settings say, guided and compiled.

    Args:
        config: Settings; those that are None are the run's.
        path: The generator's folder.
        device: Where to sample.
        precision: Resolved.

    Raises:
        UserError: There is no generator, or the settings do not fit each other or it.
    """
    generator = load_generator(path, device, precision)
    if config.fast:
        generator = generator.with_sampling(**FAST)
    elif config.sampler not in (None, generator.sampling.sampler):
        generator = generator.with_sampling(num_inference_steps=STEPS[config.sampler])
    generator = generator.with_sampling(
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        guidance_interval=config.guidance_interval,
        sampler=config.sampler,
        eta=config.eta,
    )
    check_sampling(generator.sampling, generator.scheduler.config.num_train_timesteps)
    if generator.sampling.guidance_scale != 1:
        generator = replace(generator, guide=find_guide(config.guide, path, generator))
    elif config.guide not in ("auto", "none"):
        raise UserError(f"--guide {config.guide}: does nothing at --guidance_scale 1; give another scale")
    batch_size = config.batch_size_on(device.type)
    if batch_size is not None and config.compiles_on(device.type):
        generator = generator.compiled(batch_size)
    return generator
