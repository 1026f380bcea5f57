"""Distances: analytic cases, reference implementations, the cache of real statistics, and the curve."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_kid import kernel_mmd
from torchmetrics.image.fid import _compute_fid

from ddgen.data import ImageDataset
from ddgen.errors import UserError
from ddgen.evaluation import frechet
from ddgen.evaluation.curve import describe, draw_fid_curve, read_curves
from ddgen.evaluation.frechet import (
    DistanceMonitor,
    Extractor,
    FeatureStatistics,
    frechet_distance,
    frechet_to_features,
    inception_extractor,
    kernel_distance,
    kid_subsets,
    observer_extractor,
)
from ddgen.observer.networks import build_network
from ddgen.observer.observer import Observer

CPU = torch.device("cpu")
POLYNOMIAL = {
    "kid_kernel": "poly",
    "kid_kernel_poly_degree": 3,
    "kid_kernel_poly_gamma": None,
    "kid_kernel_poly_coef0": 1,
}


def features(count: int, dimensions: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated, skewed features."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(99))
    return (torch.randn(count, dimensions, generator=generator) @ mixing / dimensions**0.5 + shift).relu()


def images(count: int, seed: int) -> ImageDataset:
    generator = torch.Generator().manual_seed(seed)
    return ImageDataset(
        pixels=torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator),
        labels=torch.arange(count) % 2,
        class_names=("a", "b"),
        name="noise",
        split="train",
        fingerprint=f"noise-{count}-{seed}",
    )


def observer(seed: int = 0) -> Observer:
    torch.manual_seed(seed)
    network = build_network("convnet3", 2, 8, width=8)
    mean = (0.5, 0.5, 0.5)
    return Observer(network, network="convnet3", class_names=("a", "b"), input_size=8, mean=mean, std=mean).eval()


def monitor(tmp_path: Path, real: ImageDataset, extractor: Extractor, num_images: int = 20) -> DistanceMonitor:
    return DistanceMonitor(
        real, extractor, num_images=num_images, cache_dir=tmp_path, device=CPU, precision="no", seed=0
    )


class Counting:
    """An extractor's function that counts the images it sees: the mean colour of each."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, pixels: Tensor, device: torch.device, precision: str) -> Tensor:
        self.seen += len(pixels)
        return pixels.float().mean(dim=(2, 3)) / 255


# --- Fréchet


def test_two_gaussians_worked_by_hand() -> None:
    """Diagonal: |m|^2 + sum (s1 - s2)^2 = 25 + (1-3)^2 + (2-2)^2."""
    value = frechet_distance(
        torch.tensor([0.0, 0.0]), torch.diag(torch.tensor([1.0, 4.0])),
        torch.tensor([3.0, 4.0]), torch.diag(torch.tensor([9.0, 4.0])),
    )  # fmt: skip
    assert value == pytest.approx(29.0, abs=1e-10)


def test_rotation_of_a_singular_gaussian() -> None:
    """A line turned by 45 degrees: C1 = diag(1, 0), C2 = 1/2 everywhere; tr (C1 C2)^(1/2) = 1/sqrt 2."""
    zero = torch.zeros(2)
    value = frechet_distance(zero, torch.diag(torch.tensor([1.0, 0.0])), zero, torch.full((2, 2), 0.5))
    assert value == pytest.approx(2 - 2**0.5, abs=1e-7)


def test_frechet_against_scipy_and_torchmetrics() -> None:
    first, second = FeatureStatistics.of(features(300, 24, 0)), FeatureStatistics.of(features(200, 24, 1, 0.2))
    root = scipy.linalg.sqrtm(first.cov.numpy() @ second.cov.numpy()).real
    expected = (first.mean - second.mean).square().sum() + (first.cov + second.cov).trace() - 2 * np.trace(root)
    ours = frechet_distance(first.mean, first.cov, second.mean, second.cov)
    assert ours == pytest.approx(float(expected), rel=1e-8)
    assert ours == pytest.approx(float(_compute_fid(first.mean, first.cov, second.mean, second.cov)), rel=1e-8)
    assert frechet_distance(second.mean, second.cov, first.mean, first.cov) == pytest.approx(ours, rel=1e-9)
    assert frechet_distance(first.mean, first.cov, first.mean, first.cov) == pytest.approx(0, abs=1e-10)


def test_statistics_match_numpy() -> None:
    values = features(50, 6, 0)
    statistics = FeatureStatistics.of(values)
    np.testing.assert_allclose(statistics.cov, np.cov(values.double().numpy(), rowvar=False), rtol=1e-10)
    assert (statistics.n, statistics.cov.dtype) == (50, torch.float64)


@pytest.mark.parametrize("count", [10, 16, 40])
def test_fewer_images_than_dimensions(count: int) -> None:
    reference, few = FeatureStatistics.of(features(300, 16, 0)), features(count, 16, 1, 0.1)
    statistics = FeatureStatistics.of(few)
    slow = frechet_distance(reference.mean, reference.cov, statistics.mean, statistics.cov)
    assert frechet_to_features(reference, few) == pytest.approx(slow, rel=1e-6)


# --- kernel


def test_kernel_distance_of_single_points_by_hand() -> None:
    """x = 1, 1; y = 0, 0 in one dimension: k(x, x) = 8, k(y, y) = k(x, y) = 1, so 8 + 1 - 2."""
    assert kernel_distance(torch.ones(2, 1), torch.zeros(2, 1), num_subsets=3) == pytest.approx(7.0)


def test_kernel_distance_against_torch_fidelity() -> None:
    first, second = features(60, 12, 0), features(45, 12, 1, 0.3)
    expected = np.mean(
        [
            kernel_mmd(first.double().numpy()[rows], second.double().numpy()[columns], **POLYNOMIAL)
            for rows, columns in kid_subsets(60, 45, 20, 5, seed=3)
        ]
    )
    assert kernel_distance(first, second, num_subsets=5, subset_size=20, seed=3) == pytest.approx(expected, rel=1e-10)
    whole = kernel_mmd(first[:45].double().numpy(), second.double().numpy(), **POLYNOMIAL)
    assert kernel_distance(first[:45], second, num_subsets=2) == pytest.approx(whole, rel=1e-10)


def test_kernel_distance_is_seeded_and_unbiased() -> None:
    first, second = features(400, 8, 0), features(400, 8, 1)
    kwargs = {"num_subsets": 50, "subset_size": 50}
    assert kernel_distance(first, second, seed=1, **kwargs) == kernel_distance(first, second, seed=1, **kwargs)
    assert kernel_distance(first, second, seed=1, **kwargs) != kernel_distance(first, second, seed=2, **kwargs)
    same = abs(kernel_distance(first, second, **kwargs))
    assert same < 0.1 * kernel_distance(first, features(400, 8, 1, 0.5), **kwargs)


# --- the monitor


def test_monitor_is_the_distance_of_the_features(tmp_path: Path) -> None:
    real, network = images(90, 0), observer()
    generated = images(20, 1).pixels // 2
    values = monitor(tmp_path, real, observer_extractor(network))(generated)
    with torch.no_grad():
        left, right = (network.features(pixels / 255) for pixels in (real.pixels, generated))
    first, second = FeatureStatistics.of(left), FeatureStatistics.of(right)
    expected = float(_compute_fid(first.mean, first.cov, second.mean, second.cov))
    assert list(values) == ["fd_convnet3_20", "kid_convnet3_20"]
    assert values["fd_convnet3_20"] == pytest.approx(expected, rel=1e-4)
    near = monitor(tmp_path, real, observer_extractor(network))(images(20, 2).pixels)
    assert near["fd_convnet3_20"] < values["fd_convnet3_20"]
    assert near["kid_convnet3_20"] < values["kid_convnet3_20"]


def test_streamed_statistics_are_those_of_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "KID_REAL_IMAGES", 32)
    real, extract = images(90, 0), Counting()
    reference = monitor(tmp_path, real, Extractor("mean", "1", extract)).reference
    expected = FeatureStatistics.of(extract(real.pixels, CPU, "no"))
    torch.testing.assert_close(reference.mean, expected.mean)
    torch.testing.assert_close(reference.cov, expected.cov)
    assert reference.n == 90
    monkeypatch.setattr(frechet, "MAX_REAL_IMAGES", 50)
    assert monitor(tmp_path, real, Extractor("mean", "1", extract)).reference.n == 50


def test_cache_is_used_and_remade(tmp_path: Path) -> None:
    real, extract = images(40, 0), Counting()
    generated = images(20, 1).pixels
    first = monitor(tmp_path, real, Extractor("mean", "1", extract))(generated)
    assert extract.seen == 40 + 20
    assert monitor(tmp_path, real, Extractor("mean", "1", extract))(generated) == first
    assert extract.seen == 60 + 20  # read from the cache
    monitor(tmp_path, real, Extractor("mean", "2", extract))
    assert extract.seen == 80 + 40  # other weights
    monitor(tmp_path, replace(real, fingerprint="other"), Extractor("mean", "1", extract))
    assert extract.seen == 120 + 40  # other images
    assert len(list(tmp_path.glob("real-mean-*.safetensors"))) == 3


@pytest.mark.parametrize("damage", ["another fingerprint", "cut short"])
def test_wrong_cache_is_remade(tmp_path: Path, damage: str) -> None:
    real, extract = images(40, 0), Counting()
    first = monitor(tmp_path, real, Extractor("mean", "1", extract))
    (path,) = tmp_path.glob("real-mean-*.safetensors")
    data = path.read_bytes()
    wrong = data.replace(first.fingerprint.encode(), b"0" * 64) if damage == "another fingerprint" else data[:-5]
    path.write_bytes(wrong)
    assert wrong != data
    again = monitor(tmp_path, real, Extractor("mean", "1", extract))
    assert extract.seen == 80
    assert torch.equal(again.reference.cov, first.reference.cov)
    monitor(tmp_path, real, Extractor("mean", "1", extract))
    assert extract.seen == 80  # whole again


def test_monitor_refuses_what_it_cannot_measure(tmp_path: Path) -> None:
    real, extractor = images(40, 0), Extractor("mean", "1", Counting())
    with pytest.raises(UserError, match=r"^--fid_num_images 1: a covariance needs at least 2"):
        monitor(tmp_path, real, extractor, num_images=1)
    with pytest.raises(ValueError, match="expected uint8"):
        monitor(tmp_path, real, extractor)(images(19, 1).pixels)
    broken = Extractor("mean", "3", lambda pixels, device, precision: torch.full((len(pixels), 2), float("nan")))
    with pytest.raises(UserError, match="features are not finite"):
        monitor(tmp_path, real, broken)


def test_extractor_names_stay_file_names() -> None:
    network = observer()
    assert observer_extractor(network).name == "convnet3"
    network.network = "torchvision:mobilenet_v3_small"
    assert observer_extractor(network).name == "mobilenet-v3-small"
    network.network = "transformers:google/vit-base"
    assert observer_extractor(network).name == "vit-base"


# --- Inception


def test_inception_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert inception_extractor(None) is None
    with pytest.raises(
        UserError, match=r"^--inception_weights .*no.pth: no such file; expected weights-inception-2015"
    ):
        inception_extractor(str(tmp_path / "no.pth"))
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(UserError, match=r"not the 2015-12-05 Inception weights .*not 6726825d"):
        inception_extractor(str(tmp_path / "other.pth"))
    monkeypatch.setattr(frechet, "INCEPTION_SHA256_PREFIX", hashlib.sha256(b"other").hexdigest()[:8])
    with pytest.raises(UserError, match="not the 2015-12-05 Inception weights"):
        inception_extractor(str(tmp_path / "other.pth"))


def test_inception_path_with_drawn_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published weights are a download, so this runs the same network with drawn ones."""

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:  # type: ignore[override]
            return None

    torch.manual_seed(0)
    torch.save({}, tmp_path / "empty.pth")
    blank = Blank("blank", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth"))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    path = folder / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(blank.state_dict(), path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(frechet, "INCEPTION_SHA256_PREFIX", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    extractor = inception_extractor(None)
    assert extractor is not None
    real = images(3, 0)
    torch.testing.assert_close(extractor.extract(real.pixels, CPU, "bf16"), blank(real.pixels)[0])
    values = monitor(tmp_path, real, extractor, num_images=2)(real.pixels[:2])
    assert list(values) == ["fid_2", "kid_inception_2"]


# --- the curve


def write_metrics(path: Path, tail: str = "") -> None:
    records = [{"step": step, "loss": 1.0 / step} for step in range(50, 3050, 50)]
    for step in (1000, 2000, 3000):
        values = {f"fd_convnet3_500/ema_{std}": 4e4 / step**1.2 * (1 + std) for std in (0.05, 0.1)}
        records.append({"step": step, **values, "kid_convnet3_500/ema_0.05": 3.0 / step, "epoch": 1})
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail, encoding="utf-8")


def test_curves_are_read_by_metric_and_average(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", tail='{"step": 2000, "fd_convnet3_500/ema_0.1": 1.5}\n{"step": 40')
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert list(curves) == ["fd_convnet3_500", "kid_convnet3_500"]
    assert list(curves["fd_convnet3_500"]) == ["ema_0.05", "ema_0.1"]
    assert curves["kid_convnet3_500"]["ema_0.05"] == [(1000, 0.003), (2000, 0.0015), (3000, 0.001)]
    assert [step for step, _ in curves["fd_convnet3_500"]["ema_0.1"]] == [1000, 2000, 3000]
    assert curves["fd_convnet3_500"]["ema_0.1"][1] == (2000, 1.5)  # a resumed run's line wins


def test_curve_is_drawn(tmp_path: Path) -> None:
    metrics, png = tmp_path / "metrics.jsonl", tmp_path / "fid_curve.png"
    metrics.write_text('{"step": 50, "loss": 1.0}\n', encoding="utf-8")
    draw_fid_curve(metrics, png)
    assert not png.exists()
    write_metrics(metrics)
    draw_fid_curve(metrics, png)
    with Image.open(png) as picture:
        shown = np.asarray(picture.convert("RGB"))
    assert shown.shape[1] > 2 * shown.shape[0]  # two panels
    for colour in ((0x1F, 0x6F, 0x8B), (0xD1, 0x60, 0x3D)):
        assert (np.abs(shown.astype(int) - colour).sum(axis=2) < 12).sum() > 200
    assert [item.name for item in tmp_path.glob("*fid_curve*")] == ["fid_curve.png"]


def test_metrics_are_spelt_out() -> None:
    assert describe("fid_1000") == "FID, 1,000 images"
    assert describe("fd_convnet3_500") == "Fréchet distance in convnet3 features, 500 images"
    assert describe("kid_mobilenet-v3-small_1000") == "kernel distance in mobilenet-v3-small features, 1,000 images"
