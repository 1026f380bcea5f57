"""Where candidates come from, and whether the observer recognises the first of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from ddgen.checkpoint import read_json
from ddgen.commands.own_generator import own_generator
from ddgen.commands.runs import read_run_config
from ddgen.commands.steering import check_steering, steered
from ddgen.config import SampleConfig, TrainConfig
from ddgen.data import check_class_order, native_image_size
from ddgen.diffusion.foreign import ForeignGenerator, load_foreign
from ddgen.diffusion.foreign_files import find_pipeline
from ddgen.diffusion.generator import Generator
from ddgen.errors import UserError
from ddgen.observer.observer import Observer
from ddgen.observer.realism import RealismScores, candidate_problem

PROBE_IMAGES = 64
OWN_ONLY = ("fast", "guidance_interval", "eta", "guide", "torch_compile", "modes")
"""Settings that no diffusers pipeline has."""
HONOURED = {"guide": ("auto", "none")}
"""Values of theirs that any pipeline honours: it has no guide of its own."""
FOREIGN_ONLY = ("prompt", "class_map")


def candidate_source(
    config: SampleConfig, run_dir: Path, accelerator: Accelerator, precision: str
) -> Generator | ForeignGenerator:
    """Loads the generator that is asked for: the run's own, another that ddgen trained, or any diffusers pipeline.

    Args:
        config: The command's settings.
        run_dir: The training run, or the folder of an observer that was trained alone.
        accelerator: Device to sample on.
        precision: Resolved.

    Raises:
        UserError: It cannot be loaded, knows other classes, or cannot honour a setting.
    """
    check_steering(config)
    class_names = read_json(run_dir / "dataset.json")["class_names"]
    image_size = dataset_image_size(read_run_config(run_dir))
    files = None
    if config.generator is not None:
        files = find_pipeline(config.generator, trust_remote_code=config.trust_remote_code)
    if files is None or files.is_own:
        folder = files.folder if files else run_dir / "generator"
        for name in FOREIGN_ONLY:
            if getattr(config, name) is not None:
                raise UserError(f"--{name}: a generator that ddgen trained knows its classes; leave it out")
        generator = own_generator(config, folder, accelerator.device, precision)
        _check_same_images(config, generator, class_names, image_size)
        return generator if config.modes is None else steered(config, run_dir, generator, accelerator)
    for name in OWN_ONLY:
        if getattr(config, name) not in HONOURED.get(name, (None, False)):
            raise UserError(f"--{name}: only ddgen's own generators have it, not {config.generator}; leave it out")
    return load_foreign(
        files,
        class_names,
        image_size,
        accelerator.device,
        precision,
        prompt=config.prompt,
        class_map_path=config.class_map,
        trust_remote_code=config.trust_remote_code,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        sampler=config.sampler,
    )


def dataset_image_size(run_config: TrainConfig) -> int:
    """Returns the side of the run's images in pixels."""
    data = run_config.data
    if data.image_size is not None or data.dataset is None:
        return data.image_size or 0
    return native_image_size(data.dataset)


def probe_classes(num_classes: int, candidates_per_class: int | None) -> tuple[list[int], int]:
    """Chooses the candidates that are made and looked at before all others.

    Args:
        num_classes: How many classes there are.
        candidates_per_class: How many candidates each will have; None if time decides.

    Returns:
        Up to 64 classes, spread evenly, and how many candidates of each, from index 0: as many as make 64 images, if
        there are so many.
    """
    chosen = min(num_classes, PROBE_IMAGES)
    classes = [i * num_classes // chosen for i in range(chosen)]
    count = math.ceil(PROBE_IMAGES / chosen)
    return classes, count if candidates_per_class is None else min(count, candidates_per_class)


def check_probe(
    config: SampleConfig,
    scores: RealismScores,
    labels: torch.Tensor,
    observer: Observer,
    say: Callable[[str], None],
) -> None:
    """Judges what the observer says of the first candidates.

    Args:
        config: The command's settings.
        scores: Of the candidates of `probe_classes`, n.
        labels: Their classes, int64 (n,).
        observer: Has scored them.
        say: Prints a line.

    Raises:
        UserError: It recognises hardly any, and the generator was given by the user; the run's own may just be weak.
    """
    problem = candidate_problem(scores.predicted, labels, observer.class_names)
    if problem is None:
        return
    if config.generator is None:
        say(f"warning: {problem}; the generator is weak, or --observer knows other images")
        return
    raise UserError(
        f"--generator {config.generator}: {problem}; most likely its labels are in another order (check --class_map and"
        " --prompt), or its images are unlike the real ones"
    )


def _check_same_images(config: SampleConfig, generator: Generator, class_names: Sequence[str], image_size: int) -> None:
    check_class_order(
        class_names, generator.class_names, expected_name="the training images", found_name="the generator"
    )
    if generator.image_size != image_size:
        raise UserError(
            f"--generator {config.generator}: it makes images of {generator.image_size} pixels, and the run's are of"
            f" {image_size}; give a --run_dir of that --image_size"
        )
