"""Somebody else's generator: any diffusers pipeline that draws images of a class label or of a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ddgen.diffusion.class_map import label_numbers, prompts, read_class_map, words_of
from ddgen.diffusion.foreign_files import PipelineFiles, load_pipeline, one_line
from ddgen.diffusion.foreign_kinds import (
    Kind,
    call_arguments,
    call_parameters,
    correct_null_class,
    exchanged_scheduler,
    kind_of,
    label_names,
    num_labels_of,
)
from ddgen.errors import UserError
from ddgen.precision import DTYPES
from ddgen.seeds import torch_generator
from ddgen.timing import Timed, untimed

DEFAULT_PROMPT = "a photo of a {class}"
SHOWN_CLASSES = 10
LARGEST_REDRAWS = 20
"""How often an image that the safety checker blackens is drawn anew."""


@dataclass(frozen=True)
class ForeignGenerator:
    """A diffusers pipeline as a source of candidates.

    Attributes:
        pipeline: The pipeline, on its device.
        files: Where it came from.
        kind: The argument that says what to draw.
        conditions: Its value for every class, in label order: label numbers or prompts.
        class_names: Name of every class, in label order.
        image_size: Side of the images that come out, in pixels.
        precision: Of the weights: "no", "bf16" or "fp16".
        arguments: Further arguments of every call.
        words: What stands for every class in the card: its label number, or the words in the prompt.
        template: The prompt template; None for labels.
        files_hash: Of the pipeline's files.
        rejected: Reason -> how many images were drawn anew for it.
    """

    pipeline: Any
    files: PipelineFiles
    kind: Kind
    conditions: tuple[int | str, ...]
    class_names: tuple[str, ...]
    image_size: int
    precision: str
    arguments: dict[str, Any]
    words: tuple[str, ...]
    template: str | None
    files_hash: str
    rejected: Counter[str] = field(default_factory=Counter)

    def sample(self, labels: Tensor, indices: Tensor, seed: int, *, timed: Timed = untimed) -> Tensor:
        """Draws one image for every (class, index).

        An image depends on the seed, its class and its index only, not on what is sampled with it. One that the
        pipeline's safety checker blackens is drawn anew, from noise that depends on these and on the attempt.

        Args:
            labels: int64 (b,).
            indices: int64 (b,), which image of the class.
            seed: Seed of the pool.
            timed: Measures "sampling", which includes decoding here.

        Returns:
            Pixels, uint8 (b, 3, h, w), on the CPU: the middle square, resized with antialias.

        Raises:
            UserError: The pipeline fails, gives no finite RGB images, draws noise that is not ours, or the safety
                checker refuses every attempt.
        """
        keys = list(zip(labels.tolist(), indices.tolist(), strict=True))
        pixels = torch.empty(len(keys), 3, self.image_size, self.image_size, dtype=torch.uint8)
        todo = list(range(len(keys)))
        for attempt in range(LARGEST_REDRAWS + 1):
            wanted = [keys[i] for i in todo]
            again = [torch_generator(seed, "sample", c, i, *([attempt] if attempt else [])) for c, i in wanted]
            with timed("sampling"):
                images, flagged = self._call([self.conditions[c] for c, _ in wanted], again)
            pixels[todo] = square_pixels(images, self.image_size)
            todo = [i for i, bad in zip(todo, flagged, strict=True) if bad]
            if not todo:
                return pixels
            self.rejected["safety checker"] += len(todo)
        name = self.class_names[keys[todo[0]][0]]
        raise UserError(
            f"--generator {self.files.source}: its safety checker refused class {name!r} {LARGEST_REDRAWS + 1} times in"
            " a row; say it in other words with --class_map or --prompt"
        )

    def fingerprint(self) -> str:
        """Returns a hash of all weights, configurations, vocabularies and code."""
        return self.files_hash

    def settings(self) -> dict[str, Any]:
        """Returns everything an image depends on beside (seed, class, index), as JSON values."""
        return {
            "generator": self.fingerprint(),
            "conditions": list(self.conditions),
            "sampler": self._scheduler,
            **{name: self.arguments.get(name) for name in ("num_inference_steps", "guidance_scale")},
            "precision": self.precision,
            "device": self.pipeline.device.type,
        }

    def describe(self) -> dict[str, str]:
        """Returns rows of a distilled dataset's card."""
        defaults = {name: p.default for name, p in call_parameters(type(self.pipeline)).items()}
        used = {
            name: self.arguments.get(name, defaults.get(name)) for name in ("num_inference_steps", "guidance_scale")
        }
        rows = {
            "generator": f"{self.files.source} ({type(self.pipeline).__name__}), not trained for this dataset",
            "generator's licence": self.files.licence,
            "sampler": f"{self._scheduler}, {used['num_inference_steps']} steps",
            "guidance": str(used["guidance_scale"]),
            "precision": self.precision,
        }
        if self.template is not None:
            rows["prompt"] = self.template
        pairs = [f"{name}: {word}" for name, word in zip(self.class_names, self.words, strict=True)]
        more = [f"and {len(pairs) - SHOWN_CLASSES} more"] if len(pairs) > SHOWN_CLASSES else []
        return rows | {"class map": "; ".join(pairs[:SHOWN_CLASSES] + more)}

    def credit(self) -> dict[str, Any]:
        """Returns whose generator it is and what it calls the classes, for a card, as JSON values."""
        class_map = dict(zip(self.class_names, self.words, strict=True))
        return {"source": self.files.source, "licence": self.files.licence, "class_map": class_map}

    @property
    def _scheduler(self) -> str:
        return type(getattr(self.pipeline, "scheduler", None)).__name__

    def _call(self, conditions: list[int | str], generators: list[torch.Generator]) -> tuple[Tensor, list[bool]]:
        """Returns images (b, 3, h, w) in [0, 1], and which of them the safety checker has blackened."""
        arguments = dict(self.arguments)
        if "batch_size" in call_parameters(type(self.pipeline)):  # as ConsistencyModelPipeline wants to be told
            arguments["batch_size"] = len(conditions)
        before = _random_states(self.pipeline.device)
        try:
            output = self.pipeline(**{self.kind: conditions}, generator=generators, output_type="np", **arguments)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ImportError, OSError) as error:
            cause = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"--generator {self.files.source}: the pipeline fails ({cause})") from None
        if not _same(before, _random_states(self.pipeline.device)):
            raise UserError(
                f"--generator {self.files.source}: with {self._scheduler} it draws noise of its"
                " own, so that an image would depend on what was drawn before; give --sampler ddim or dpmsolver++"
            )
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(conditions)
        return self._checked(getattr(output, "images", None), len(conditions)), [bool(bad) for bad in flagged]

    def _checked(self, images: Any, count: int) -> Tensor:
        array = np.asarray(images) if isinstance(images, (np.ndarray, list)) else None
        if array is None or array.dtype.kind != "f" or array.ndim != 4 or len(array) != count or array.shape[3] != 3:
            shape = "no images" if array is None else f"{array.dtype} {array.shape}"
            raise UserError(
                f"--generator {self.files.source}: {type(self.pipeline).__name__} gives {shape}, where {count} RGB"
                " images were asked for; choose a pipeline that draws one image for every label or text"
            )
        if not np.isfinite(array).all():
            raise UserError(
                f"--generator {self.files.source}: images that are not finite in {self.precision}; give"
                " --mixed_precision bf16 or no"
            )
        return torch.from_numpy(array.astype(np.float32)).permute(0, 3, 1, 2)


def load_foreign(
    files: PipelineFiles,
    class_names: Sequence[str],
    image_size: int,
    device: torch.device,
    precision: str,
    *,
    prompt: str | None = None,
    class_map_path: str | None = None,
    trust_remote_code: bool = False,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
) -> ForeignGenerator:
    """Loads a pipeline and finds out how to ask it for every class.

    Args:
        files: From `find_pipeline`.
        class_names: The dataset's classes, in label order.
        image_size: Side of the images to make, in pixels.
        device: Where to compute.
        precision: Of the weights: "no", "bf16" or "fp16".
        prompt: ``--prompt``; for text-to-image pipelines only.
        class_map_path: ``--class_map``.
        trust_remote_code: Whether Python files beside the weights may be run.
        num_inference_steps: Steps; None takes the pipeline's own number.
        guidance_scale: Guidance; None takes the pipeline's own.
        sampler: Scheduler in the place of the pipeline's own.

    Raises:
        UserError: As `load_pipeline`, `label_numbers` and `prompts`; or a kind of pipeline, or a setting for it, that
            will not do.
    """
    # whatever can be wrong is found out before gigabytes are read, if diffusers knows the pipeline without its code
    class_map = read_class_map(class_map_path, class_names) if class_map_path else {}
    known = getattr(diffusers, str(files.index["_class_name"]), None)
    kind = None if known is None else kind_of(known, files.source)
    if kind == "prompt":
        prompts(prompt or DEFAULT_PROMPT, words_of(class_names, class_map, class_map_path=class_map_path))
    pipeline = load_pipeline(files, DTYPES.get(precision, torch.float32), trust_remote_code=trust_remote_code)
    kind = kind_of(type(pipeline), files.source)
    if prompt is not None and kind == "class_labels":
        raise UserError(f"--prompt {prompt!r}: {files.source} takes class labels, not text; leave it out")
    template = (prompt or DEFAULT_PROMPT) if kind == "prompt" else None
    conditions: Sequence[int | str]
    if template is not None:
        words = words_of(class_names, class_map, class_map_path=class_map_path)
        conditions = prompts(template, words)
    else:
        names = label_names(pipeline, files)
        conditions = label_numbers(
            class_names, names, num_labels_of(pipeline, names), class_map,
            generator=files.source, class_map_path=class_map_path,
        )  # fmt: skip
        words = [str(number) for number in conditions]
    if sampler is not None:
        pipeline.scheduler = exchanged_scheduler(pipeline, sampler, files.source)
    arguments = call_arguments(pipeline, files.source, num_inference_steps, guidance_scale)
    correct_null_class(pipeline, arguments)
    return ForeignGenerator(
        pipeline=pipeline.to(device),
        files=files,
        kind=kind,
        conditions=tuple(conditions),
        class_names=tuple(class_names),
        image_size=image_size,
        precision=precision,
        arguments=arguments,
        words=tuple(words),
        template=template,
        files_hash=files.fingerprint(),
    )


def square_pixels(images: Tensor, size: int) -> Tensor:
    """Cuts out the middle square and resizes it with antialias.

    Args:
        images: float (b, 3, h, w) in [0, 1].
        size: Side to resize to, in pixels.

    Returns:
        uint8 (b, 3, size, size), rounded.
    """
    side = min(images.shape[-2:])
    images = F.center_crop(images, [side, side])
    if side != size:
        images = F.resize(images, [size, size], antialias=True)
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
