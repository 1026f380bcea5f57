"""RDED on real images: crops of them, ranked by the observer and stitched (Sun et al., CVPR 2024).

"On the Diversity and Realism of Distilled Dataset", sections 3 and 4, without the published code's defects: every
crop is a function of (seed, class, image), images are rounded, small classes fill their quota, losses are finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddgen.config import Selection
from ddgen.data import ImageDataset
from ddgen.distill.compose import compose
from ddgen.distill.select import Candidates, select
from ddgen.errors import UserError
from ddgen.hardware import exact_products
from ddgen.observer.observer import Observer, predict_both, to_images01
from ddgen.observer.realism import RealismScores, scores_of
from ddgen.seeds import numpy_generator

SCALE = (0.08, 1.0)  # area of a crop as a fraction of the image's
BATCH_SIZE = 256


@dataclass(frozen=True)
class CropPlan:
    """How the images of one class are cropped, and how many crops are kept.

    Attributes:
        numbers: Which images of the class, ascending int64 (n,).
        num_crop: Crops of each.
        kept_crops: How many of an image's crops are candidates: its most realistic, more only in small classes.
        quota: Crops kept, ipc * factor ** 2.
    """

    numbers: Tensor
    num_crop: int
    kept_crops: int
    quota: int


@dataclass(frozen=True)
class RankedCrops:
    """The candidates of a class and which of them are kept.

    Attributes:
        patches: uint8 (m, 3, p, p).
        candidates: Their scores; number = image * crops of each + crop.
        kept: Positions, int64 (quota,), the preferred first.
    """

    patches: Tensor
    candidates: Candidates
    kept: Tensor

    def images(self, factor: int, size: int) -> Tensor:
        """Stitches the kept crops: uint8 (quota / factor ** 2, 3, size, size); see `compose`."""
        return compose(self.patches[self.kept], factor, size)


def plan_crops(
    num_images: int, *, class_name: str, label: int, ipc: int, factor: int, mipc: int, num_crop: int, seed: int
) -> CropPlan:
    """Draws which images of a class are cropped, and says how often.

    A larger `mipc` takes all that a smaller one takes. A class with fewer images than crops are wanted gives further
    crops of the same images.

    Args:
        num_images: Images of the class.
        class_name: For the error.
        label: Number of the class.
        ipc: Images per class to make.
        factor: Cells along a side of an image.
        mipc: Images cropped, if there are as many.
        num_crop: Crops of each, if they suffice.
        seed: Of the draw.

    Raises:
        UserError: No image, or `mipc` smaller than what the class could give and the images need.
    """
    if ipc < 1:
        raise UserError(f"--ipc {ipc}: keep at least 1 image per class")
    quota = ipc * factor**2
    if num_images == 0:
        raise UserError(f"--data_dir: class {class_name} has no training images; leave it out with --classes")
    if mipc < min(quota, num_images):
        raise UserError(
            f"--mipc {mipc}: {ipc} images per class of {factor} x {factor} crops need {quota} images of each class; "
            f"give --mipc {quota} or more"
        )
    order = numpy_generator(seed, "rded images", label).permutation(num_images)
    numbers = torch.from_numpy(np.sort(order[:mipc]))
    kept_crops = -(-quota // len(numbers))
    return CropPlan(numbers, max(num_crop, kept_crops), kept_crops, quota)


def rank_class(
    observer: Observer,
    dataset: ImageDataset,
    members: Tensor,
    label: int,
    plan: CropPlan,
    *,
    factor: int,
    rule: Selection,
    real: RealismScores | None,
    seed: int,
    device: torch.device,
    precision: str,
) -> RankedCrops:
    """Crops the images of one class, keeps each image's most realistic crop, and of those the quota.

    Of the dataset only a block of the class's images is read at a time. Where an image gives more than one
    crop, since the class is small, all best crops are kept before any second best one.

    Args:
        observer: Scores the crops.
        dataset: Real images with the observer's classes.
        members: Where the images of the class are in the dataset, int64.
        label: Number of the class.
        plan: See `plan_crops`.
        factor: Cells along a side of an image.
        rule: What keeps the quota; RDED's is "realism".
        real: Scores of real images of the class, for rules that need them.
        seed: Of the crops, and of rules that draw.
        device: Where to compute.
        precision: See `ddgen.precision`.

    Raises:
        UserError: Logits that are not finite.
    """
    patches, scores, crops = _best_crops(
        observer, dataset, members, label, plan, factor=factor, seed=seed, device=device, precision=precision
    )
    numbers = (plan.numbers[:, None] * plan.num_crop + crops).flatten()
    candidates = Candidates(scores, numbers, label, seed, real)
    kept: list[Tensor] = []
    for turn in range(plan.kept_crops):  # position: image * kept_crops + turn
        positions = torch.arange(turn, len(candidates), plan.kept_crops)
        count = min(len(positions), plan.quota - sum(map(len, kept)))
        kept.append(positions[select(rule, candidates.rows(positions), count)])
    return RankedCrops(patches, candidates, torch.cat(kept))


def _best_crops(
    observer: Observer,
    dataset: ImageDataset,
    members: Tensor,
    label: int,
    plan: CropPlan,
    *,
    factor: int,
    seed: int,
    device: torch.device,
    precision: str,
) -> tuple[Tensor, RealismScores, Tensor]:
    """Returns patches (m, 3, p, p), their scores and crop numbers (n, kept_crops): image by image, the best first."""
    size, side = dataset.image_size, dataset.image_size // factor
    patches, logits, features, chosen = [], [], [], []
    for numbers in plan.numbers.split(max(1, BATCH_SIZE // plan.num_crop)):
        boxes = torch.stack([draw_boxes(seed, label, int(i), plan.num_crop, size) for i in numbers])
        cut = crop(dataset.pixels[members[numbers]].to(device), boxes.to(device), side)  # (b * c, 3, p, p)
        both = [
            predict_both(observer, images, device=device, precision=precision)
            for images in _padded(cut, size, observer)
        ]
        scores = scores_of(torch.cat([part[0] for part in both]), torch.full((len(cut),), label), precision)
        best = scores.loss.view(len(numbers), -1).argsort(dim=1, stable=True)[:, : plan.kept_crops]
        rows = (best + torch.arange(len(numbers))[:, None] * plan.num_crop).flatten()
        patches.append(cut[rows.to(device)].cpu())
        logits.append(scores.logits[rows])
        features.append(torch.cat([part[1] for part in both])[rows])
        chosen.append(best)
    labels = torch.full((len(plan.numbers) * plan.kept_crops,), label)
    return torch.cat(patches), scores_of(torch.cat(logits), labels, precision, torch.cat(features)), torch.cat(chosen)


def _padded(patches: Tensor, size: int, observer: Observer) -> Iterator[Tensor]:
    for part in patches.split(BATCH_SIZE):
        yield pad_to(to_images01(part, part.device), size, observer.mean)


def draw_boxes(seed: int, label: int, number: int, count: int, size: int) -> Tensor:
    """Draws square crops of one image as torchvision's RandomResizedCrop does with scale (0.08, 1) and ratio 1.

    Args:
        seed: The user's.
        label: Class of the image.
        number: Number of the image within its class.
        count: How many; more begin with the same.
        size: Side of the image.

    Returns:
        int64 (count, 3): top, left, side.
    """
    uniform = numpy_generator(seed, "rded crops", label, number).random((count, 3))
    area = size**2 * (SCALE[0] + (SCALE[1] - SCALE[0]) * uniform[:, 0])
    side = np.rint(np.sqrt(area)).astype(np.int64)
    corner = np.floor(uniform[:, 1:] * (size - side + 1)[:, None]).astype(np.int64)
    return torch.from_numpy(np.concatenate([corner, side[:, None]], axis=1))


def crop(pixels: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Cuts square boxes out of images and resizes them (bilinear, antialiased), all in two matrix products.

    Resizing commutes with normalising, so what comes out is what RDED makes of normalised images, rounded
    to the 8 bits in which it is stored; the score is then that of the stored image.

    Args:
        pixels: uint8 (b, 3, s, s).
        boxes: int64 (b, c, 3): top, left, side.
        side: Side p of what comes out.

    Returns:
        uint8 (b * c, 3, p, p).
    """
    b, c = boxes.shape[:2]
    size = pixels.shape[-1]
    boxes = boxes.flatten(0, 1)
    rows = _weights(boxes[:, 0], boxes[:, 2], side, size)  # (b * c, p, s)
    columns = _weights(boxes[:, 1], boxes[:, 2], side, size)
    images = pixels.float().permute(0, 2, 1, 3).reshape(b, size, 3 * size)  # rows of all channels side by side
    with exact_products():  # in TF32 one pixel in fifty would be rounded otherwise
        low = torch.bmm(rows.view(b, c * side, size), images)  # (b, c * p, 3 * s)
        low = low.view(b * c, side * 3, size)
        out = torch.bmm(low, columns.transpose(1, 2)).view(b * c, side, 3, side)
    return out.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 1, 3).contiguous()


def _weights(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """Returns the weights (n, side, size) of the pixels of a line in each of `side` pixels of a resized piece of it."""
    scale = length.float() / side
    reach = scale.clamp(min=1.0)[:, None, None]  # of the triangle: a pixel of the output, never less than one of input
    step = torch.arange(side, device=start.device) + 0.5
    centre = (start[:, None] + step * scale[:, None])[:, :, None]
    pixel = torch.arange(size, device=start.device)
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    weights = (1.0 - (pixel + 0.5 - centre).abs() / reach).clamp(min=0.0) * inside[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


def pad_to(images01: Tensor, size: int, colour: tuple[float, float, float]) -> Tensor:
    """Puts images (b, 3, p, p) into the middle of larger ones (b, 3, size, size) of one colour.

    With the observer's mean colour this is RDED's zero-padding of normalised images.
    """
    missing = size - images01.shape[-1]
    if missing == 0:
        return images01
    before, after = missing // 2, missing - missing // 2
    mean = images01.new_tensor(colour)[:, None, None]
    return F.pad(images01 - mean, (before, after, before, after)) + mean
