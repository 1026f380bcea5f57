"""What kinds of diffusers pipelines there are, and how each is asked; told from their signatures, not their names."""

from __future__ import annotations

import inspect
import typing
from typing import Any, Literal

import diffusers
from diffusers import DiTPipeline

from ddgen.diffusion.foreign_files import PipelineFiles
from ddgen.errors import UserError

Kind = Literal["class_labels", "prompt"]
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""``--sampler`` -> diffusers' scheduler: those that start from unit noise. `DiTPipeline` gives its scheduler no other,
whatever that asks for, so that with Heun's, say, its images would be noise."""
NOT_IMAGES = {"num_frames", "frames", "video", "audio", "audio_length_in_s", "audio_end_in_s"}
WANTS_AN_IMAGE = {"image", "images", "mask_image", "control_image"}


def kind_of(pipeline_class: type, source: str) -> Kind:
    """Tells from the signature what a pipeline is asked with.

    Raises:
        UserError: Neither class labels nor a text alone give an image.
    """
    parameters, name = call_parameters(pipeline_class), pipeline_class.__name__
    kind: Kind | None = next((kind for kind in typing.get_args(Kind) if kind in parameters), None)
    if kind is None:
        raise UserError(
            f"--generator {source}: {name} takes neither class_labels nor a prompt; choose a class-conditional or a"
            " text-to-image pipeline"
        )
    needed = [n for n, p in parameters.items() if p.default is p.empty and n != kind]
    needed += [n for n, p in parameters.items() if n in WANTS_AN_IMAGE and p.default is None and not _may_be_none(p)]
    if needed:
        raise UserError(f"--generator {source}: {name} also needs {needed[0]}; choose one that needs only {kind}")
    if other := NOT_IMAGES & parameters.keys():
        raise UserError(f"--generator {source}: {name} makes no single images (it takes {min(other)}); choose another")
    if "generator" not in parameters or "output_type" not in parameters:
        raise UserError(f"--generator {source}: {name} takes no generator and output_type, as diffusers' pipelines do")
    return kind


def label_names(pipeline: Any, files: PipelineFiles) -> dict[int, str]:
    """Returns the names that a class-conditional pipeline has for its labels, as far as it tells them."""
    for names in (files.index.get("id2label"), files.index.get("class_names"), getattr(pipeline, "id2label", None)):
        if isinstance(names, dict):  # not the pipeline's `labels`: of two labels with one name it keeps one
            return {int(number): str(name) for number, name in names.items()}
        if isinstance(names, list):
            return dict(enumerate(map(str, names)))
    found: dict[int, str] = {}
    for name, number in (getattr(pipeline, "labels", None) or {}).items():
        found[int(number)] = f"{found[int(number)]}, {name}" if int(number) in found else str(name)
    return found


def num_labels_of(pipeline: Any, names: dict[int, str]) -> int | None:
    if names:
        return max(names) + 1
    for model in (getattr(pipeline, "transformer", None), getattr(pipeline, "unet", None)):
        for setting in ("num_embeds_ada_norm", "num_class_embeds", "num_classes"):
            number = getattr(model, "config", {}).get(setting)
            if isinstance(number, int):
                return number
    return None


def exchanged_scheduler(pipeline: Any, sampler: str, source: str) -> Any:
    """Builds the scheduler of that name with the settings the pipeline was trained with."""
    own = getattr(pipeline, "scheduler", None)
    kind = getattr(diffusers, SCHEDULERS.get(sampler, ""), None)
    if own is None or kind is None or kind not in own.compatibles:
        raise UserError(
            f"--sampler {sampler}: the {type(own).__name__} of {source} cannot be exchanged for it; leave it out"
        )
    overrides: dict[str, Any] = {}
    if "clip_sample" not in own.config:
        overrides["clip_sample"] = False  # DDIM would clip latents to +-1
    if str(own.config.get("variance_type")).startswith("learned"):
        overrides["variance_type"] = None  # pipelines take the mean out of the network's output themselves
    return kind.from_config(own.config, **overrides)


def call_arguments(pipeline: Any, source: str, num_inference_steps: int | None, guidance_scale: float | None) -> dict:
    arguments = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    for name, value in arguments.items():
        if name not in call_parameters(type(pipeline)):
            raise UserError(
                f"--{name} {value}: {type(pipeline).__name__} of {source} has no such setting; leave it out"
            )
    return arguments


def correct_null_class(pipeline: Any, arguments: dict[str, Any]) -> None:
    """Gives a DiT its own null class: `DiTPipeline` writes 1000, ImageNet's, into the second half of a guided batch."""
    if not isinstance(pipeline, DiTPipeline):
        return
    null = pipeline.transformer.config.num_embeds_ada_norm
    default = call_parameters(type(pipeline))["guidance_scale"].default
    if null == 1000 or arguments.get("guidance_scale", default) <= 1:
        return

    def correct(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        labels = kwargs["class_labels"].clone()
        labels[len(labels) // 2 :] = null
        return args, {**kwargs, "class_labels": labels}

    pipeline.transformer.register_forward_pre_hook(correct, with_kwargs=True)


def call_parameters(pipeline_class: Any) -> dict[str, inspect.Parameter]:
    """Returns what a pipeline can be called with."""
    parameters = dict(inspect.signature(pipeline_class.__call__).parameters)
    return {name: p for name, p in parameters.items() if name not in ("self", "args", "kwargs")}


def _may_be_none(parameter: inspect.Parameter) -> bool:
    """Whether the annotation says so; `image: Image = None` is how diffusers writes what it cannot do without."""
    if isinstance(parameter.annotation, str):
        return "None" in parameter.annotation or "Optional" in parameter.annotation
    return type(None) in typing.get_args(parameter.annotation)
