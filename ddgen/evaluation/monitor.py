"""One point of the FID curve: everything that is measured on a set of generated images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddgen.data import ImageDataset
from ddgen.errors import UserError
from ddgen.evaluation.extractors import Extractor, short_name
from ddgen.evaluation.frechet import frechet_to_features, kernel_distance
from ddgen.evaluation.neighbours import FEWEST, compare_supports
from ddgen.evaluation.reference import Reference, measure_reference, read_reference, write_reference
from ddgen.grids import PAPER, image_grid
from ddgen.observer.observer import Observer, predict_pixels
from ddgen.seeds import numpy_generator

MAX_REAL_IMAGES = 50_000
KID_REAL_IMAGES = 2_000
MAX_COMPARED = 5_000  # generated, and real, images in the measures that compare all pairs
SUSPECTS, NEIGHBOURS_SHOWN = 8, 7


@dataclass(frozen=True)
class _Suspects:
    """The generated images of one call that are nearest to training images, with these; uint8 (s, [k,] 3, h, w)."""

    distance: float
    generated: Tensor
    nearest: Tensor
    nearness: list[float]


class DistanceMonitor:
    """Measures generated images against the real ones: one average's point of the FID curve a call.

    The real images (all of them up to 50,000) are measured at construction, or read from the cache when it holds
    them for exactly this network and these images; what does not match is measured again, and said.

    Args:
        real: Real training images.
        extractor: The network whose features are compared.
        observer: Names the class of generated images.
        num_images: Generated images a call.
        cache_dir: Where what is known of the real images is kept.
        device: Where to compute features.
        seed: Which real images are taken where not all are, and the subsets of the kernel distance.
        say: Told when the cache is refused.

    Raises:
        UserError: Too few images.
    """

    def __init__(
        self,
        real: ImageDataset,
        extractor: Extractor,
        observer: Observer,
        *,
        num_images: int,
        cache_dir: Path,
        device: torch.device,
        seed: int,
        say: Callable[[str], None] = print,
    ) -> None:
        if num_images < FEWEST:
            raise UserError(f"--fid_num_images {num_images}: neighbours need at least {FEWEST}; 1000 is usual")
        if len(real) < FEWEST:
            raise UserError(f"--fid_every: {len(real)} real images are too few to compare with; set it to 0")
        self.real, self.extractor, self.observer = real, extractor, observer
        self.num_images, self.device, self.seed = num_images, device, seed
        self.order = torch.from_numpy(numpy_generator(seed, "fid-real").permutation(len(real))[:MAX_REAL_IMAGES])
        self.num_features = min(len(self.order), max(KID_REAL_IMAGES, min(num_images, MAX_COMPARED)))
        self.suspects: list[_Suspects] = []
        self.fingerprint = self._fingerprint()
        path = Path(cache_dir) / f"real-{extractor.name}-{self.fingerprint[:16]}.safetensors"
        self.reference = self._read_or_measure(path, say)

    def __call__(self, pixels: Tensor, labels: Tensor) -> dict[str, float]:
        """Returns the distances of images from the real ones, by name, the Fréchet distance first.

        ``fid_<n>`` in Inception's features, otherwise ``fd_<network>_<n>``; then ``kid``, ``precision``, ``recall``,
        ``density``, ``coverage`` and ``memorised``, each ``_<network>_<n>``, and ``consistency_<observer>_<n>``, the
        part of the images in which the observer sees the class they were made for. n is how many generated images
        the number is of: those that compare all pairs take 5,000 at most, against as many real ones.

        Args:
            pixels: Generated images, uint8 (n, 3, h, w), n = `num_images`, sized as the real ones.
            labels: The classes they were made for, int64 (n,).
        """
        wanted = (self.num_images, *self.real.pixels.shape[1:])
        if pixels.dtype != torch.uint8 or tuple(pixels.shape) != wanted:
            raise ValueError(f"DistanceMonitor: got {pixels.dtype} {tuple(pixels.shape)}, expected uint8 {wanted}")
        features, name, n = self._extract(pixels), self.extractor.name, self.num_images
        compared = features[:MAX_COMPARED]
        distance = frechet_to_features(self.reference.statistics, features)
        values = {f"fid_{n}" if self.extractor.is_inception else f"fd_{name}_{n}": distance}
        kid = kernel_distance(self.reference.features, compared, seed=self.seed)
        supports = compare_supports(self.reference.features[: len(compared)], compared)
        values |= {f"{kind}_{name}_{len(compared)}": value for kind, value in {"kid": kid, **supports}.items()}
        values[f"memorised_{name}_{n}"] = self._memorised(features, pixels, distance)
        values[f"consistency_{short_name(self.observer.network)}_{n}"] = self._consistency(pixels, labels)
        return values

    def of_real_images(self) -> tuple[int, float]:
        """Returns how many real images, at most `num_images`, and their own Fréchet distance from all: the floor."""
        some = self.reference.features[: self.num_images]
        return len(some), frechet_to_features(self.reference.statistics, some)

    def save_suspects(self, path: Path) -> None:
        """Draws the images most like copies beside their nearest training images, those of the last point's best
        average, and forgets them."""
        best = min(self.suspects, key=lambda suspects: suspects.distance)
        self.suspects = []
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw_suspects(best, self.reference.neighbours.threshold).save(path)

    def _memorised(self, features: Tensor, pixels: Tensor, distance: float) -> float:
        nearness, neighbours = self.reference.neighbours.nearness(features)
        worst = nearness.argsort(stable=True)[:SUSPECTS]
        nearest = self.real.pixels[self.order[neighbours[worst, :NEIGHBOURS_SHOWN]]]
        self.suspects.append(_Suspects(distance, pixels[worst], nearest, nearness[worst].tolist()))
        return int((nearness <= self.reference.neighbours.threshold).sum()) / len(nearness)

    def _consistency(self, pixels: Tensor, labels: Tensor) -> float:
        logits = predict_pixels(
            self.observer, pixels, what="logits", batch_size=250, device=self.device, precision="no"
        )
        return int((logits.argmax(dim=1) == labels.cpu()).sum()) / len(labels)

    def _fingerprint(self) -> str:
        parts = {
            "version": 2,
            "extractor": [self.extractor.name, self.extractor.fingerprint],
            "device": self.device.type,
            "images": [self.real.fingerprint, *self.real.pixels.shape[1:]],
            "limits": [len(self.order), self.num_features],
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _read_or_measure(self, path: Path, say: Callable[[str], None]) -> Reference:
        reference = read_reference(path, self.fingerprint)
        if isinstance(reference, Reference):
            return reference
        if reference is not None:
            say(f"{path}: refused ({reference}); the real images are measured again")
        measured = measure_reference(self.real.pixels, self.order, self._extract, self.num_features)
        write_reference(path, self.fingerprint, measured)
        return measured

    def _extract(self, pixels: Tensor) -> Tensor:
        features = self.extractor.extract(pixels, self.device)
        if not bool(features.isfinite().all()):
            raise UserError(f"--fd_network {self.extractor.name}: its features are not finite; use another network")
        return features


def _draw_suspects(suspects: _Suspects, threshold: float) -> Image.Image:
    """Draws one suspect a row: its nearness, the generated image, a gap, and its nearest training images."""
    left = image_grid(suspects.generated, 1)
    right = image_grid(suspects.nearest.flatten(0, 1), suspects.nearest.shape[1])
    top, margin, gap = 44, 56, 18
    picture = Image.new("RGB", (margin + left.width + gap + right.width, top + left.height), PAPER)
    picture.paste(left, (margin, top))
    picture.paste(right, (margin + left.width + gap, top))
    draw, font, ink = ImageDraw.Draw(picture), ImageFont.load_default(size=13), (60, 60, 66)
    draw.text((8, 6), "generated images and the training images nearest to them; left: distance to the", ink, font)
    draw.text((8, 24), f"nearest over mean to 50; red: {threshold:.2f} or less, as 1 % of real images have", ink, font)
    pitch = left.height / len(suspects.nearness)
    for row, value in enumerate(suspects.nearness):
        colour = (190, 40, 40) if value <= threshold else ink
        draw.text((margin - 8, top + (row + 0.5) * pitch), f"{value:.2f}", colour, font, anchor="rm")
    return picture
