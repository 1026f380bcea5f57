"""DSA (Zhao and Bilen, 2021): each operation by a property that it must have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from ddgen.evaluation import augment
from ddgen.evaluation.batches import Look
from ddgen.evaluation.batches import augment as augment_batch
from ddgen.evaluation.protocols import ECCV2024_TRACK1


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_published_strengths() -> None:
    assert (augment.DSA_BRIGHTNESS, augment.DSA_SATURATION, augment.DSA_CONTRAST) == (1.0, 2.0, 0.5)
    assert (augment.DSA_CROP_PAD, augment.DSA_CUTOUT, augment.DSA_SCALE) == (0.125, 0.5, 1.2)
    assert augment.DSA_ROTATE_DEGREES == 15.0


def test_rotation_is_torchvisions() -> None:
    images = torch.rand(4, 3, 16, 16)
    degrees = np.array([0.0, 7.0, -15.0, 90.0])
    for image, angle, found in zip(images, degrees, augment.rotate(images, degrees), strict=True):
        expected = TF.rotate(image, float(angle), InterpolationMode.BILINEAR)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_rotation_angles_fill_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(augment, "rotate", lambda images, degrees: drawn.append(degrees))
    augment.dsa_rotate(torch.zeros(2000, 1, 2, 2), rng())
    assert -15 <= drawn[0].min() < -14.8 and 14.8 < drawn[0].max() <= 15


def test_scale_is_affine_around_the_middle() -> None:
    images = torch.rand(3, 3, 12, 12)
    expected = []
    generator = rng(5)
    x, y = generator.uniform(1 / 1.2, 1.2, (3, 1)), generator.uniform(1 / 1.2, 1.2, (3, 1))
    for image, sx, sy in zip(images, x[:, 0], y[:, 0], strict=True):
        theta = torch.tensor([[[sx, 0, 0], [0, sy, 0]]], dtype=torch.float32)
        grid = F.affine_grid(theta, [1, 3, 12, 12], align_corners=False)
        expected.append(F.grid_sample(image[None], grid, align_corners=False)[0])
    torch.testing.assert_close(augment.dsa_scale(images, rng(5)), torch.stack(expected))


def test_crop_is_a_shift_with_zeros_beyond_the_border() -> None:
    image = torch.arange(1.0, 257.0).view(1, 1, 16, 16)
    seen = set()
    for found in augment.dsa_crop(image.expand(400, 1, 16, 16), rng())[:, 0]:
        matches = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.equal(found, F.pad(image, [2] * 4)[0, 0, 2 + down : 18 + down, 2 + right : 18 + right])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 25  # an eighth of 16 px each way


@pytest.mark.parametrize("size", [8, 9])
def test_cutout_is_one_square_of_half_the_side_cut_at_the_borders(size: int) -> None:
    side = int(size / 2 + 0.5)
    holes = augment.dsa_cutout(torch.ones(500, 2, size, size), rng()) == 0
    assert torch.equal(holes[:, 0], holes[:, 1])
    areas = holes[:, 0].sum((1, 2))
    assert int(areas.max()) == side**2 and int(areas.min()) >= (side // 2) ** 2
    for hole in holes[:20, 0]:
        inside = hole.nonzero()
        height, width = (inside.max(0).values - inside.min(0).values + 1).tolist()
        assert height * width == len(inside) and max(height, width) <= side
    assert 0.3 < float(holes[:, 0, 0, 0].float().mean()) / float(holes[:, 0, size // 2, size // 2].float().mean()) < 0.8


def test_flip_mirrors_a_known_image() -> None:
    images = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(300, 1, 2, 2)
    flipped = augment.dsa(images, ["flip"], rng())[:, 0]
    mirrored = (flipped == torch.tensor([[2.0, 1.0], [4.0, 3.0]])).all((1, 2))
    assert ((flipped == images[:, 0]).all((1, 2)) ^ mirrored).all() and 100 < int(mirrored.sum()) < 200


def test_colour_changes_mean_contrast_and_saturation_within_their_ranges() -> None:
    images = torch.randn(3000, 3, 4, 4)
    found = augment.dsa_color(images, rng())
    shift = found.mean((1, 2, 3)) - images.mean((1, 2, 3))  # saturation and contrast keep the mean
    assert -0.5 <= float(shift.min()) < -0.49 and 0.49 < float(shift.max()) <= 0.5
    grey = [batch.mean(1) - batch.mean((1, 2, 3))[:, None, None] for batch in (images, found)]
    contrast = grey[1].norm(dim=(1, 2)) / grey[0].norm(dim=(1, 2))
    assert 0.5 - 1e-3 <= float(contrast.min()) < 0.51 and 1.49 < float(contrast.max()) <= 1.5 + 1e-3
    colour = [(batch - batch.mean(1, keepdim=True)).flatten(1).norm(dim=1) for batch in (images, found)]
    saturation = colour[1] / colour[0] / contrast
    assert 0 <= float(saturation.min()) < 0.02 and 1.98 < float(saturation.max()) <= 2.001


def test_one_operation_a_batch_all_equally_often() -> None:
    counts = dict.fromkeys(augment._DSA, 0)
    generator = rng()
    names = list(counts)
    for _ in range(1200):
        counts[names[int(generator.integers(6))]] += 1
    assert min(counts.values()) > 150
    images = torch.rand(2, 3, 8, 8)
    generator, again = rng(3), rng(3)
    operation = names[int(again.integers(6))]
    assert torch.equal(augment.dsa(images, names, generator), augment._DSA[operation](images, again))
    assert augment.dsa(images, (), generator) is images


def test_it_works_on_normalised_images() -> None:
    """What a shift uncovers is zero after normalising: the mean colour."""
    look = Look((0.2, 0.4, 0.6), (0.1, 0.2, 0.3))
    crop = replace(ECCV2024_TRACK1, dsa=("crop",))
    found = augment_batch(torch.ones(60, 3, 8, 8), crop, look, 1, rng())
    corners = found[:, :, 0, 0]
    uncovered = corners[(corners[:, 0] - 1).abs() > 0.1]
    assert 0 < len(uncovered) < 60
    torch.testing.assert_close(uncovered, torch.tensor(look.mean).expand_as(uncovered), atol=1e-6, rtol=0)


def test_no_mirroring_where_it_makes_another_class() -> None:
    only = replace(ECCV2024_TRACK1, dsa=("flip",))
    look = Look((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    images = torch.rand(50, 3, 4, 4)
    torch.testing.assert_close(augment_batch(images, only, replace(look, flip=False), 1, rng()), images)
    assert not torch.allclose(augment_batch(images, only, look, 1, rng()), images, atol=1e-3)
