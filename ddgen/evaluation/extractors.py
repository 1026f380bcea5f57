"""Networks whose features images are compared in: Inception, the observer, any transformers vision backbone.

Distances are called FID only with the 2015-12-05 Inception weights; in another network's features they carry its
name. All compute in float32 whatever ``--mixed_precision`` says, so that figures compare between machines.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from ddgen.errors import UserError
from ddgen.observer.observer import Observer, predict_pixels, probe_processor, to_images01

INCEPTION = "inception"
OBSERVER = "observer"
INCEPTION_SHA256_PREFIX = "6726825d"  # part of the published file's name
INCEPTION_DIMENSIONS = "2048"
BATCH_SIZE = 250
LARGE_BATCH_SIZE = 50  # of networks that see images at 224 pixels and more


@dataclass(frozen=True)
class Extractor:
    """A network that turns pixels into features.

    Attributes:
        name: What its distances are called after.
        fingerprint: Hex digest of everything that decides the features.
        extract: (pixels uint8 (b, 3, h, w), device) -> float32 (b, d) on the CPU.
    """

    name: str
    fingerprint: str
    extract: Callable[[Tensor, torch.device], Tensor]

    @property
    def is_inception(self) -> bool:
        """Whether distances in these features may be called FID."""
        return self.name == INCEPTION


def choose_extractor(network: str | None, inception_weights: str | None) -> Extractor | None:
    """Returns the network that was asked for, or None for the observer, which may not be trained yet.

    Args:
        network: ``--fd_network``.
        inception_weights: ``--inception_weights``.

    Raises:
        UserError: It cannot be had, or the two settings contradict each other.
    """
    if network not in (None, INCEPTION) and inception_weights is not None:
        raise UserError(f"--inception_weights {inception_weights}: --fd_network {network} has no use for it; drop one")
    if network == OBSERVER:
        return None
    if network in (None, INCEPTION):
        return inception_extractor(inception_weights, download=network == INCEPTION)
    return backbone_extractor(network)


def observer_extractor(observer: Observer) -> Extractor:
    """Returns the penultimate features of an observer."""

    def extract(pixels: Tensor, device: torch.device) -> Tensor:
        return predict_pixels(observer, pixels, what="features", batch_size=BATCH_SIZE, device=device, precision="no")

    return Extractor(name=short_name(observer.network), fingerprint=observer.fingerprint, extract=extract)


def short_name(network: str) -> str:
    """Returns a network's name as part of a metric's: without its origin, folders, and anything but letters."""
    short = network.rstrip("/").split("/")[-1] if ":" in network else network
    return re.sub(r"[^A-Za-z0-9.-]+", "-", short.removeprefix("torchvision:").removeprefix("transformers:"))


# --- Inception


def inception_extractor(weights_path: str | None, *, download: bool = False) -> Extractor | None:
    """Returns the 2015-12-05 Inception of torch-fidelity, or None where its weights are not at hand.

    The weights are `weights_path`, or the file that torch-fidelity leaves in torch hub's cache. The network resizes
    as TensorFlow 1 did (bilinear, not antialiased).

    Args:
        weights_path: ``--inception_weights``.
        download: Fetch them into torch hub's cache if they are not at hand.

    Raises:
        UserError: The file is missing or is another one, or cannot be downloaded.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    file_name = Path(urlparse(URL_INCEPTION_V3).path).name
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    path = Path(weights_path) if weights_path is not None else cached
    if weights_path is None and not path.is_file():
        if not download:
            return None
        _download(URL_INCEPTION_V3, path)
    digest = _check_inception_file(path, file_name)
    network = FeatureExtractorInceptionV3(INCEPTION, [INCEPTION_DIMENSIONS], feature_extractor_weights_path=str(path))

    def extract(pixels: Tensor, device: torch.device) -> Tensor:
        network.to(device)
        with torch.inference_mode():
            parts = [network(part.to(device))[0].float().cpu() for part in torch.split(pixels, LARGE_BATCH_SIZE)]
        return torch.cat(parts)

    return Extractor(name=INCEPTION, fingerprint=digest, extract=extract)


def _download(url: str, path: Path) -> None:
    """Fetches a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=INCEPTION_SHA256_PREFIX)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: another file than expected
        raise UserError(
            f"--fd_network {INCEPTION}: the weights cannot be downloaded ({_one_line(error)}); fetch {url} where you "
            "can and give --inception_weights FILE, or use --fd_network observer"
        ) from None


def _check_inception_file(path: Path, file_name: str) -> str:
    """Returns the file's sha256, once it is known to be the right weights and to hold nothing but tensors."""
    if not path.is_file():
        raise UserError(f"--inception_weights {path}: no such file; expected {file_name}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    wrong = UserError(
        f"--inception_weights {path}: not the 2015-12-05 Inception weights (sha256 begins {digest[:8]}, not "
        f"{INCEPTION_SHA256_PREFIX}); expected {file_name}"
    )
    if not digest.startswith(INCEPTION_SHA256_PREFIX):
        raise wrong
    try:
        torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError):
        raise wrong from None
    return digest


# --- transformers


def backbone_extractor(source: str) -> Extractor:
    """Returns the pooled features of a transformers vision backbone, for instance DINOv2.

    Stein et al., "Exposing flaws of generative model evaluation metrics" (2023), recommend DINOv2's class token,
    which is its pooled output. In general the features are the model's own pooled output; where it has none, or
    the weights of its pooling are not in the file, its class token after the last layer, otherwise the mean over
    positions. Images are resized to the side its image processor ends at, and normalised as it does.

    Args:
        source: Folder or hub id with safetensors weights and an image processor.

    Raises:
        UserError: It cannot be loaded whole, or cannot take such images.
    """
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise UserError(f"--fd_network {source}: no such folder; give one, a transformers hub id, or observer")
    model, processor, missing = _load_backbone(source)
    size, mean, std = probe_processor(f"--fd_network {source}", processor)
    backbone = _Backbone(model, size, mean, std, processor.resample == 3, pooled=not missing)
    _check_backbone(source, backbone)

    def extract(pixels: Tensor, device: torch.device) -> Tensor:
        backbone.to(device)
        with torch.inference_mode():
            parts = [backbone(to_images01(part, device)).cpu() for part in torch.split(pixels, LARGE_BATCH_SIZE)]
        return torch.cat(parts)

    name = short_name(f"transformers:{source}")
    reserved = {INCEPTION, OBSERVER}
    return Extractor(f"{name}-" if name in reserved else name, backbone.fingerprint(), extract)


def _load_backbone(source: str) -> tuple[nn.Module, Any, list[str]]:
    """Returns the vision network in eval mode, its processor, and which weights of its pooling were not in the file."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        model, loading = AutoModel.from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"--fd_network {source}: no transformers vision backbone that can be loaded: {_one_line(error)}"
        ) from None
    missing = sorted(loading["missing_keys"])
    drawn = [name for name in missing if "pooler" not in name] + sorted(map(str, loading["mismatched_keys"]))
    if drawn:
        raise UserError(f"--fd_network {source}: weights are not in the file ({drawn[0]}); give a whole backbone")
    vision: nn.Module = getattr(model, "vision_model", model)  # CLIP and its like also hold a text network
    return vision.eval().requires_grad_(False), processor, missing


class _Backbone(nn.Module):
    """Images (b, 3, h, w) in [0, 1] -> pooled features, float32 (b, d)."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: Any, size: int, mean: Iterable[float], std: Iterable[float], bicubic: bool, *, pooled: bool
    ) -> None:
        super().__init__()
        self.model, self.size, self.pooled = model, size, pooled
        self.model_config: str = model.config.to_json_string()
        self.mode = "bicubic" if bicubic else "bilinear"
        self.class_token = any(re.search(r"cls_token|class_embedding", name) for name, _ in model.named_parameters())
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(1, 3, 1, 1))

    def forward(self, images01: Tensor) -> Tensor:
        size = (self.size, self.size)
        if images01.shape[-2:] != size:
            images01 = F.interpolate(images01, size=size, mode=self.mode, align_corners=False, antialias=True)
        output = self.model(pixel_values=(images01.clamp(0, 1) - self.mean) / self.std)
        pooled = getattr(output, "pooler_output", None)
        if self.pooled and pooled is not None:
            return pooled.flatten(1).float()
        last: Tensor = output.last_hidden_state  # (b, tokens, d) or (b, d, h, w)
        if last.ndim == 4:
            return last.mean(dim=(2, 3)).float()
        return (last[:, 0] if self.class_token else last.mean(dim=1)).float()

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{type(self.model).__name__} {self.size} {self.mode} {self.pooled}".encode())
        digest.update(self.model_config.encode())
        used = {name: value for name, value in self.state_dict().items() if self.pooled or "pooler" not in name}
        for name, value in sorted(used.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _check_backbone(source: str, backbone: _Backbone) -> None:
    """Runs an image through twice, so that a network that cannot serve is found before anything is trained."""
    image = torch.linspace(0, 1, 3 * backbone.size**2).view(1, 3, backbone.size, backbone.size)
    try:
        with torch.inference_mode():
            first, second = backbone(image), backbone(image)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"--fd_network {source}: it gives no features of an image: {_one_line(error)}") from None
    if not torch.equal(first, second):  # masked autoencoders drop patches at random
        raise UserError(f"--fd_network {source}: it gives other features each time; use another network")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
