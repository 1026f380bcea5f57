"""Points of the FID curve: torch-fidelity's numbers on two folders, the cache of the real images, and the cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_cases import CPU, Counting, images, observer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from ddgen.data import ImageDataset
from ddgen.errors import UserError
from ddgen.evaluation import monitor as monitors
from ddgen.evaluation import reference as references
from ddgen.evaluation.cost import flops, plan_curve
from ddgen.evaluation.extractors import Extractor, observer_extractor
from ddgen.evaluation.frechet import FeatureStatistics
from ddgen.evaluation.monitor import DistanceMonitor


def monitor(
    tmp_path: Path, real: ImageDataset, extractor: Extractor, num_images: int = 20, said: list[str] | None = None
) -> DistanceMonitor:
    say = said.append if said is not None else pytest.fail
    return DistanceMonitor(
        real, extractor, observer(), num_images=num_images, cache_dir=tmp_path, device=CPU, seed=0, say=say
    )


class _ObserverForFidelity(FeatureExtractorBase):
    """The observer's features as torch-fidelity wants them."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self.observer = observer()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("penultimate",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "penultimate"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            return (30 * self.observer.features(pixels / 255),)


def write_folder(path: Path, pixels: Tensor) -> str:
    path.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{number:03d}.png")
    return str(path)


def test_numbers_are_those_of_torch_fidelity_on_two_folders(tmp_path: Path) -> None:
    """Within 0.1 %: 80 images each, so that every subset of the kernel distance is the whole.

    The features of drawn weights are small; torch-fidelity's kernel, in float32, would lose their distance.
    """
    extract = observer_extractor(observer()).extract
    scaled = Extractor("scaled", "1", lambda pixels, device: 30 * extract(pixels, device))
    real, generated = images(80, 0), images(80, 1)
    generated.pixels[:40] //= 2
    values = monitor(tmp_path, real, scaled, 80)(generated.pixels, generated.labels)
    register_feature_extractor("observer-of-ddgen", _ObserverForFidelity)
    theirs = calculate_metrics(
        input1=write_folder(tmp_path / "generated", generated.pixels),
        input2=write_folder(tmp_path / "real", real.pixels),
        feature_extractor="observer-of-ddgen", fid=True, kid=True, prc=True, kid_subsets=1, kid_subset_size=80,
        cuda=False, cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    assert values["fd_scaled_80"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert values["kid_scaled_80"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert 0.1 < theirs["precision"] < 1 and 0.1 < theirs["recall"] < 1
    assert values["precision_scaled_80"] == pytest.approx(theirs["precision"], rel=1e-3)
    assert values["recall_scaled_80"] == pytest.approx(theirs["recall"], rel=1e-3)


def test_names_say_network_and_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = images(90, 0), images(20, 1)
    point = monitor(tmp_path, real, Counting().extractor())(generated.pixels, generated.labels)
    compared = ["kid", "precision", "recall", "density", "coverage"]
    assert list(point) == ["fd_mean_20", *(f"{kind}_mean_20" for kind in compared), "memorised_mean_20",
                           "consistency_convnet3_20"]  # fmt: skip
    monkeypatch.setattr(monitors, "MAX_COMPARED", 10)
    inception = replace(Counting().extractor(), name="inception")
    point = monitor(tmp_path, real, inception)(generated.pixels, generated.labels)
    assert list(point)[:3] == ["fid_20", "kid_inception_10", "precision_inception_10"]
    assert list(point)[-2:] == ["memorised_inception_20", "consistency_convnet3_20"]


def test_consistency_is_the_observers_accuracy(tmp_path: Path) -> None:
    generated = images(20, 1)
    with torch.no_grad():
        seen = observer()(generated.pixels / 255).argmax(dim=1)
    measure = monitor(tmp_path, images(40, 0), Counting().extractor())
    assert measure(generated.pixels, seen)["consistency_convnet3_20"] == 1
    seen[:5] = 1 - seen[:5]
    assert measure(generated.pixels, seen)["consistency_convnet3_20"] == 0.75


def test_copies_are_counted_and_shown(tmp_path: Path) -> None:
    real, fresh = images(300, 0), images(20, 1)
    measure = monitor(tmp_path / "cache", real, observer_extractor(observer()))
    honest = measure(fresh.pixels, fresh.labels)
    assert honest["memorised_convnet3_20"] <= 0.1
    copies = torch.cat([fresh.pixels[:15], real.pixels[100:105]])
    caught = measure(copies, fresh.labels)
    assert caught["memorised_convnet3_20"] == pytest.approx(honest["memorised_convnet3_20"] + 0.25, abs=0.051)
    better = min(measure.suspects, key=lambda suspects: suspects.distance)
    measure.save_suspects(tmp_path / "samples" / "nearest_training.png")
    assert measure.suspects == []
    assert better.distance == min(honest["fd_convnet3_20"], caught["fd_convnet3_20"])
    measure(copies, fresh.labels)
    (suspects,) = measure.suspects
    for generated, nearest in zip(suspects.generated[:5], suspects.nearest[:5], strict=True):
        assert torch.equal(generated, nearest[0])
    with Image.open(tmp_path / "samples" / "nearest_training.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert picture.width / picture.height == pytest.approx(8 / 8, rel=0.15) and colours is not None


def test_streamed_statistics_are_those_of_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "PART", 32)
    monkeypatch.setattr(monitors, "KID_REAL_IMAGES", 50)
    real, extract = images(90, 0), Counting()
    measure = monitor(tmp_path, real, extract.extractor())
    everything = extract(real.pixels[measure.order], CPU)
    expected = FeatureStatistics.of(everything)
    torch.testing.assert_close(measure.reference.statistics.mean, expected.mean)
    torch.testing.assert_close(measure.reference.statistics.cov, expected.cov)
    assert measure.reference.statistics.n == 90 and torch.equal(measure.reference.features, everything[:50])
    assert torch.equal(measure.reference.neighbours.points, everything)
    monkeypatch.setattr(monitors, "MAX_REAL_IMAGES", 40)
    assert monitor(tmp_path, real, extract.extractor()).reference.statistics.n == 40


def test_the_floor_is_the_distance_of_real_images(tmp_path: Path) -> None:
    """No generator does better than the data: 20 of the real images, and all, which are at distance 0."""
    real, extract = images(90, 0), observer_extractor(observer())
    count, floor = monitor(tmp_path, real, extract).of_real_images()
    measure = monitor(tmp_path, real, extract)
    same = measure(real.pixels[measure.order[:20]], real.labels[:20])
    assert count == 20 and floor == pytest.approx(same["fd_convnet3_20"], rel=1e-6) and floor > 0
    count, floor = monitor(tmp_path, real, extract, 90).of_real_images()
    assert count == 90 and floor == pytest.approx(0, abs=1e-6)


# --- the cache


def test_cache_is_used_and_remade(tmp_path: Path) -> None:
    real, generated, extract = images(40, 0), images(20, 1), Counting()
    first = monitor(tmp_path, real, extract.extractor())(generated.pixels, generated.labels)
    assert extract.seen == 40 + 20
    assert monitor(tmp_path, real, extract.extractor())(generated.pixels, generated.labels) == first
    assert extract.seen == 60 + 20  # read from the cache
    monitor(tmp_path, real, extract.extractor("2"))
    assert extract.seen == 80 + 40  # other weights
    monitor(tmp_path, replace(real, fingerprint="other"), extract.extractor())
    assert extract.seen == 120 + 40  # other images
    assert len(list(tmp_path.glob("real-mean-*.safetensors"))) == 3


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("another fingerprint", "measured on other images or with another network"),
        ("cut short", "damaged, "),
        ("another number", "its numbers are not the ones that were measured"),
        ("no digest", "its numbers are not the ones that were measured"),
    ],
)
def test_a_cache_that_does_not_match_is_refused(tmp_path: Path, damage: str, reason: str) -> None:
    real, extract = images(40, 0), Counting()
    first = monitor(tmp_path, real, extract.extractor())
    (path,) = tmp_path.glob("real-mean-*.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if damage == "another fingerprint":
        metadata["fingerprint"] = "0" * 64
    elif damage == "another number":
        tensors["mean"][0] *= 1.001
    elif damage == "no digest":
        del metadata["content"]
    path.write_bytes(path.read_bytes()[:-5] if damage == "cut short" else save(tensors, metadata))
    said: list[str] = []
    again = monitor(tmp_path, real, extract.extractor(), said=said)
    assert len(said) == 1 and said[0].startswith(f"{path}: refused ({reason}") and "measured again" in said[0]
    assert extract.seen == 80
    assert torch.equal(again.reference.statistics.cov, first.reference.statistics.cov)
    monitor(tmp_path, real, extract.extractor())
    assert extract.seen == 80  # whole again


def test_monitor_refuses_what_it_cannot_measure(tmp_path: Path) -> None:
    real, extractor = images(40, 0), Counting().extractor()
    with pytest.raises(UserError, match=r"^--fid_num_images 5: neighbours need at least 6"):
        monitor(tmp_path, real, extractor, num_images=5)
    with pytest.raises(UserError, match=r"^--fid_every: 4 real images are too few"):
        monitor(tmp_path, images(4, 0), extractor)
    with pytest.raises(ValueError, match="expected uint8"):
        monitor(tmp_path, real, extractor)(images(19, 1).pixels, images(19, 1).labels)
    broken = Extractor("mean", "3", lambda pixels, device: torch.full((len(pixels), 2), float("nan")))
    with pytest.raises(UserError, match="features are not finite"):
        monitor(tmp_path, real, broken)


# --- the cost


@pytest.mark.parametrize(
    ("fid_every", "steps", "point", "every", "share"),
    [
        (None, 20_000, 0.0055, 1_700, 12 * 0.0055),  # 12 points of 0.55 % fit into 7 %
        (None, 20_000, 0.0001, 400, 50 * 0.0001),  # never more than 50
        (None, 2_700, 0.02, 900, 3 * 0.02),
        (None, 480, 0.3, 480, 0.3),  # even one costs more: the one at the end
        (None, 7, 0.0001, 1, 7 * 0.0001),
        (500, 1_200, 0.05, 500, 3 * 0.05),  # 500, 1000 and the end
    ],
)
def test_points_keep_the_curve_cheap(fid_every: int | None, steps: int, point: float, every: int, share: float) -> None:
    plan = plan_curve(fid_every, steps, 1e15, point * 1e15)
    assert (plan.every, plan.share) == (every, pytest.approx(share))


def test_cost_in_words() -> None:
    assert str(plan_curve(900, 2_700, 100.0, 2.4)) == "every 900 steps, about 7.2 % of training"
    assert str(plan_curve(None, 480, 1.0, 0.3)) == "one point, after the last step, about 30 % of training"
    assert str(plan_curve(None, 8, 1.0, 1.234)) == "one point, after the last step, about 123 % of training"


def test_multiplications_are_counted() -> None:
    """A 3 x 3 convolution: 2 x 9 x 3 x 4 a pixel; a linear layer: 2 x 5 x 7 a row."""
    conv, linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(5, 7)
    assert flops(lambda: conv(torch.zeros(2, 3, 8, 8))) == 2 * 64 * 2 * 9 * 3 * 4
    assert flops(lambda: linear(torch.zeros(6, 5))) == 6 * 2 * 5 * 7
    with torch.inference_mode():  # as the extractors run
        assert flops(lambda: linear(torch.zeros(6, 5))) == 6 * 2 * 5 * 7
    seen = flops(lambda: observer_extractor(observer()).extract(images(2, 0).pixels, CPU))
    assert seen == flops(lambda: observer().features(images(2, 0).pixels / 255)) > 0
