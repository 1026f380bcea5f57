"""The observer: a classifier with its class names, its own normalisation and its measured accuracy."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from ddgen.checkpoint import atomic_dir, read_json, write_json
from ddgen.data.classes import check_class_order
from ddgen.errors import UserError
from ddgen.observer.networks import Classifier, build_network, last_linear, uses_channels_last
from ddgen.precision import autocast

FORMAT = "ddgen-observer"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

Triple = tuple[float, float, float]


class TransformersClassifier(nn.Module):
    """A transformers image-classification model as normalised images (b, 3, h, w) -> logits (b, k).

    Args:
        model: An ``AutoModelForImageClassification``.
        processor: Its image processor, kept so that the model can be saved whole.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model = model
        self.processor = processor

    def features(self, x: Tensor) -> Tensor:
        """Returns what the model's last linear layer receives, (b, d)."""
        return self.outputs(x)[1]

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits (b, k) and what the model's last linear layer receives, (b, d), of one pass."""
        found = last_linear(self.model, self.model.config.num_labels)
        if found is None:
            raise UserError("--observer: the transformers model ends in no linear layer, so it has no features")
        captured: list[Tensor] = []
        hook = found[1].register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
        try:
            logits: Tensor = self.model(pixel_values=x).logits
        finally:
            hook.remove()
        return logits, captured[-1].flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (b, k)."""
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


class Observer(nn.Module):
    """A classifier that takes pixels in [0, 1] and knows its classes, its normalisation and its accuracy.

    Args:
        classifier: Normalised images (b, 3, s, s) -> logits (b, k), with ``features``.
        network: Its name, as in `build_network`, or ``transformers:<path or hub id>``.
        class_names: Names of its k classes, in the order of its logits.
        input_size: Side s to which images are resized.
        mean: Per-channel mean of pixels in [0, 1].
        std: Per-channel standard deviation of pixels in [0, 1].
        accuracy: Top-1 fraction on real held-out images; None when nobody has measured it.
    """

    mean_buffer: Tensor
    std_buffer: Tensor

    def __init__(
        self,
        classifier: Classifier | TransformersClassifier,
        *,
        network: str,
        class_names: Sequence[str],
        input_size: int,
        mean: Triple,
        std: Triple,
        accuracy: float | None = None,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.network = network
        self.class_names = tuple(class_names)
        self.input_size = input_size
        self.mean, self.std = mean, std
        self.accuracy = accuracy
        self.register_buffer("mean_buffer", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std_buffer", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def prepare(self, images01: Tensor) -> Tensor:
        """Resizes (bilinear, antialiased) to the input size if needed, and normalises.

        Args:
            images01: (b, 3, h, w) in [0, 1].

        Returns:
            (b, 3, s, s) normalised.
        """
        size = (self.input_size, self.input_size)
        if images01.shape[-2:] != size:
            images01 = F.interpolate(images01, size=size, mode="bilinear", align_corners=False, antialias=True)
        return (images01 - self.mean_buffer) / self.std_buffer

    def forward(self, images01: Tensor) -> Tensor:
        """Returns the logits (b, k) of images (b, 3, h, w) in [0, 1]."""
        logits: Tensor = self.classifier(self.prepare(images01))
        return logits

    def features(self, images01: Tensor) -> Tensor:
        """Returns the penultimate features (b, d) of images (b, 3, h, w) in [0, 1]."""
        return self.classifier.features(self.prepare(images01))

    def outputs(self, images01: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits (b, k) and penultimate features (b, d) of images (b, 3, h, w) in [0, 1], in one pass."""
        if isinstance(self.classifier, TransformersClassifier):
            return self.classifier.outputs(self.prepare(images01))
        features = self.classifier.features(self.prepare(images01))
        return self.classifier.head(features), features

    @property
    def fingerprint(self) -> str:
        """Hex digest of the weights and of everything else that decides the logits."""
        settings = [self.network, self.class_names, self.input_size, self.mean, self.std]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for name, value in sorted(self.classifier.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path, *, beside: Path | None = None) -> None:
        """Writes a folder that `load` reads, whole or not at all.

        A transformers model is written in transformers' own layout, so that it stays one.

        Args:
            path: The folder to create.
            beside: A folder whose contents are copied next to the weights: what training left.

        Raises:
            UserError: The folder exists.
        """
        if path.exists():
            raise UserError(f"--output_dir {path}: an observer is there already; choose another folder or remove it")
        with atomic_dir(path) as folder:
            if beside is not None:
                shutil.copytree(beside, folder, dirs_exist_ok=True)
            if isinstance(self.classifier, TransformersClassifier):
                self.classifier.model.config.ddgen_accuracy = self.accuracy
                self.classifier.model.config.ddgen_network = self.network
                self.classifier.model.save_pretrained(folder)
                self.classifier.processor.save_pretrained(folder)
                return
            state = {name: value.detach().cpu().contiguous() for name, value in self.classifier.state_dict().items()}
            safetensors.torch.save_file(state, folder / WEIGHTS_NAME)
            write_json(folder / CONFIG_NAME, self._config())

    def _config(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": 1,
            "network": self.network,
            "norm": "batch",
            "input_size": self.input_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "accuracy": self.accuracy,
            "class_names": list(self.class_names),
        }

    @classmethod
    def load(cls, source: str | Path, class_names: Sequence[str] | None = None) -> Observer:
        """Loads an observer, in eval mode.

        Args:
            source: Folder written by `save`, or path or hub id of a transformers image classifier.
            class_names: The dataset's classes; the observer must have the same ones in the same order.

        Raises:
            UserError: Nothing usable there, or another class order.
        """
        config_path = Path(source) / CONFIG_NAME
        config = _read_config(source, config_path) if config_path.is_file() else None
        if config is not None and config.get("format") == FORMAT:
            observer = _load_own(Path(source), config)
        else:
            observer = _load_transformers(str(source))
        if class_names is not None:
            check_class_order(
                class_names, observer.class_names, expected_name="the dataset", found_name=f"--observer {source}"
            )
        return observer.eval()


def predict_pixels(
    observer: Observer,
    pixels: Tensor,
    *,
    what: Literal["logits", "features"],
    batch_size: int,
    device: torch.device,
    precision: str,
    mirror: bool = False,
) -> Tensor:
    """Runs the observer in eval mode over many images.

    Args:
        observer: Moved to `device`.
        pixels: uint8 (n, 3, h, w).
        what: ``logits`` (n, k) or ``features`` (n, d).
        batch_size: Images per forward pass; changes results by rounding only.
        device: Where to compute.
        precision: See `ddgen.precision`.
        mirror: Average over each image and its mirror image.

    Returns:
        float32 on the CPU, (n, k) or (n, d).
    """
    function = observer if what == "logits" else observer.features
    outputs: list[Tensor] = []
    with _evaluating(observer, device, precision) as memory_format:
        # At least one pass, so that no images give (0, k).
        for start in range(0, max(1, len(pixels)), batch_size):
            images = to_images01(pixels[start : start + batch_size], device).contiguous(memory_format=memory_format)
            output = function(images).float()
            if mirror:
                output = (output + function(images.flip(-1)).float()) / 2
            outputs.append(output.cpu())
    return torch.cat(outputs)


def predict_both(
    observer: Observer, images01: Tensor, *, device: torch.device, precision: str
) -> tuple[Tensor, Tensor]:
    """Runs the observer in eval mode once over a batch and returns all that it knows of it.

    Args:
        observer: Moved to `device`.
        images01: (b, 3, h, w) in [0, 1].
        device: Where to compute.
        precision: See `ddgen.precision`.

    Returns:
        Logits (b, k) and penultimate features (b, d), float32 on the CPU.
    """
    with _evaluating(observer, device, precision) as memory_format:
        logits, features = observer.outputs(images01.to(device).contiguous(memory_format=memory_format))
        return logits.float().cpu(), features.float().cpu()


@contextmanager
def _evaluating(observer: Observer, device: torch.device, precision: str) -> Iterator[torch.memory_format]:
    """Puts the observer on a device in eval mode, without gradients, and gives the memory format that it is fast in."""
    was_training = observer.training
    observer.to(device).eval()
    try:
        with torch.inference_mode(), autocast(device, precision):
            yield torch.channels_last if uses_channels_last(observer, device) else torch.contiguous_format
    finally:
        observer.train(was_training)


def to_images01(pixels: Tensor, device: torch.device) -> Tensor:
    """Turns uint8 (b, 3, h, w) into float32 in [0, 1] on the device."""
    return pixels.to(device).float().div_(255)


def _read_config(source: str | Path, path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
    except (OSError, ValueError):
        raise UserError(f"--observer {source}: {CONFIG_NAME} is not readable JSON; train the observer again") from None
    if not isinstance(config, dict):
        raise UserError(f"--observer {source}: {CONFIG_NAME} is not an observer's; train the observer again")
    return config


def _load_own(folder: Path, config: dict[str, Any]) -> Observer:
    try:
        network = build_network(
            config["network"], len(config["class_names"]), config["input_size"], norm=config["norm"]
        )
        network.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_NAME))
        return Observer(
            network,
            network=config["network"],
            class_names=config["class_names"],
            input_size=config["input_size"],
            mean=_triple(config["mean"]),
            std=_triple(config["std"]),
            accuracy=config["accuracy"],
        )
    except (KeyError, TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"--observer {folder}: damaged observer ({cause}); train the observer again") from None


def _triple(values: Sequence[float]) -> Triple:
    first, second, third = values
    return float(first), float(second), float(third)


def _load_transformers(source: str) -> Observer:
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise UserError(f"--observer {source}: no such folder; give an observer's folder or a transformers hub id")
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        model = AutoModelForImageClassification.from_pretrained(source)
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"--observer {source}: neither an observer's folder (no {CONFIG_NAME} of one) nor a transformers image "
            f"classifier that can be loaded: {cause}"
        ) from None
    id2label = model.config.id2label
    input_size, mean, std = probe_processor(f"--observer {source}", processor)
    return Observer(
        TransformersClassifier(model, processor),
        network=getattr(model.config, "ddgen_network", f"transformers:{source}"),
        class_names=[str(id2label[index]) for index in sorted(id2label)],
        input_size=input_size,
        mean=mean,
        std=std,
        accuracy=getattr(model.config, "ddgen_accuracy", None),
    )


def probe_processor(setting: str, processor: Any) -> tuple[int, Triple, Triple]:
    """Finds input size, mean and std by what the processor makes of black, white and red.

    Processors spell rescaling, normalising and cropping in many ways; what they do to flat images is one
    affine map a channel, whatever the spelling.

    Returns:
        Side, and mean and std such that ``(images01 - mean) / std`` is what the processor computes.
    """
    flats = [Image.new("RGB", (64, 64), colour) for colour in ("black", "white", "red")]
    outputs = np.asarray(processor(images=flats, return_tensors="np")["pixel_values"], dtype=np.float64)
    if outputs.ndim != 4 or outputs.shape[1] != 3 or outputs.shape[2] != outputs.shape[3]:
        raise UserError(f"{setting}: its image processor gives {outputs.shape[1:]}, not square RGB images")
    black, white, red = outputs.mean(axis=(2, 3))
    if np.any(white == black) or not np.allclose(red, [white[0], black[1], black[2]], atol=1e-3):
        raise UserError(f"{setting}: its image processor is no per-channel normalisation of RGB")
    std = 1 / (white - black)
    return int(outputs.shape[-1]), _triple(np.round(-black * std, 6)), _triple(np.round(std, 6))
