"""Protocols: every published hyper-parameter, the schedules at epochs worked out by hand, and files that state them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ddgen.errors import UserError
from ddgen.evaluation.protocol_files import get_protocol, read_protocol, to_plain
from ddgen.evaluation.protocols import (
    ECCV2024_TRACK1,
    ECCV2024_TRACK2,
    FIXED_SOFT,
    HARD,
    PROTOCOLS,
    RDED,
    STRONG,
    Protocol,
    Special,
)

EXAMPLE = Path(__file__).parents[1] / "configs" / "protocols" / "example.yaml"


def test_rded_hyper_parameters() -> None:
    assert (RDED.labels, RDED.norm, RDED.optimizer) == ("soft", "batch", "adamw")
    assert (RDED.betas, RDED.weight_decay, RDED.decay_vectors) == ((0.9, 0.999), 0.01, False)
    assert (RDED.temperature, RDED.cutmix_alpha) == (20.0, 1.0)
    assert (RDED.color_jitter, RDED.lighting_std, RDED.test_resize) == (0.0, 0.0, True)
    assert [RDED.epochs(ipc, dataset="cifar10", network="convnet3") for ipc in (1, 10, 50, 100)] == [300] * 4


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("convnet3", 1e-3),
        ("resnet18", 1e-3),
        ("torchvision:resnet101", 1e-3),
        ("torchvision:efficientnet_b0", 2e-3),
        ("torchvision:mobilenet_v2", 2.5e-3),
        ("torchvision:vgg11", 5e-4),
        ("torchvision:alexnet", 1e-4),
        ("torchvision:vit_b_16", 1e-4),
        ("torchvision:swin_v2_t", 1e-4),
    ],
)
def test_rded_learning_rates(network: str, expected: float) -> None:
    assert RDED.peak_learning_rate(dataset="cifar10", network=network) == expected


@pytest.mark.parametrize(
    ("dataset", "num_classes", "network", "sizes"),
    [
        ("cifar10", 10, "convnet3", {1: 10, 10: 50, 50: 100, 100: 100}),
        ("imagenet1k", 100, "resnet18", {1: 20, 10: 100, 50: 200}),
        ("imagenet1k", 1000, "resnet18", {1: 20, 10: 100, 50: 200}),
        ("cifar100", 100, "resnet18", {1: 20, 10: 100, 50: 200}),
        ("cifar100", 100, "convnet3", {1: 25, 10: 25, 50: 25}),
        ("tinyimagenet", 200, "convnet4", {1: 100, 10: 100, 50: 100}),
        ("tinyimagenet", 10, "convnet4", {1: 10, 5: 10, 10: 50, 50: 100}),  # published for all 200 classes
        ("digits", 2, "convnet3", {1: 2, 3: 6, 10: 20}),
    ],
)
def test_rded_batch_sizes(dataset: str, num_classes: int, network: str, sizes: dict[int, int]) -> None:
    found = {ipc: RDED.batch_size(ipc, num_classes, dataset=dataset, network=network) for ipc in sizes}
    assert found == sizes


def test_rded_special_case_of_cifar100() -> None:
    assert RDED.peak_learning_rate(dataset="cifar100", network="convnet3") == 2e-3
    assert RDED.peak_learning_rate(dataset="cifar100", network="resnet18") == 1e-3


def test_rded_schedule_ends_at_half() -> None:
    # 0.5 * 1e-3 * (1 + cos(pi/4)) = 0.853553e-3 half way; cos(pi * 299/600) = 0.00523596 in the last epoch.
    assert RDED.learning_rate_at(0, 300, 1e-3) == pytest.approx(1e-3)
    assert RDED.learning_rate_at(150, 300, 1e-3) == pytest.approx(0.8535534e-3)
    assert RDED.learning_rate_at(299, 300, 1e-3) == pytest.approx(0.50261798e-3)


def test_rded_crops_only_composed_images() -> None:
    assert RDED.crop_scale(1) == (1.0, 1.0)
    assert RDED.crop_scale(2) == (0.5, 1.0)


def test_hard_hyper_parameters() -> None:
    assert (HARD.labels, HARD.norm, HARD.optimizer) == ("hard", "instance", "sgd")
    assert (HARD.momentum, HARD.weight_decay, HARD.decay_vectors) == (0.9, 5e-4, True)
    assert HARD.peak_learning_rate(dataset="cifar100", network="convnet3") == 0.01
    assert (HARD.cutmix_alpha, HARD.crop_scale(1), HARD.color_jitter, HARD.lighting_std) == (1.0, (0.5, 1.0), 0.4, 0.1)
    assert HARD.batch_size(10, 10, dataset="cifar10", network="resnet18") == 64
    assert HARD.batch_size(1, 10, dataset="cifar10", network="resnet18") == 10
    epochs = {1: 3000, 2: 2000, 10: 2000, 11: 1500, 50: 1500, 51: 1000, 200: 1000, 201: 500, 500: 500, 501: 300}
    assert {ipc: HARD.epochs(ipc, dataset="cifar10", network="convnet3") for ipc in epochs} == epochs


def test_hard_schedule_steps_at_two_thirds_and_five_sixths() -> None:
    rates = [HARD.learning_rate_at(epoch, 300, 0.01) for epoch in (0, 199, 200, 249, 250, 299)]
    assert rates == pytest.approx([0.01, 0.01, 0.002, 0.002, 0.0004, 0.0004])
    # 2 * 2000 // 3 = 1333, 5 * 2000 // 6 = 1666
    rates = [HARD.learning_rate_at(epoch, 2000, 0.01) for epoch in (1332, 1333, 1665, 1666)]
    assert rates == pytest.approx([0.01, 0.002, 0.002, 0.0004])


def test_unknown_protocol() -> None:
    with pytest.raises(UserError, match="--protocols sofft: unknown; choose among rded, hard, eccv2024-track1"):
        get_protocol("sofft")


DSA = ("color", "crop", "cutout", "flip", "scale", "rotate")


@pytest.mark.parametrize("track", [ECCV2024_TRACK1, ECCV2024_TRACK2], ids=["track1", "track2"])
def test_eccv2024_hyper_parameters(track: Protocol) -> None:
    assert (track.student, track.labels, track.norm, track.optimizer) == ("convnet3", "hard", "instance", "sgd")
    assert (track.learning_rate, track.momentum, track.weight_decay) == (0.01, 0.9, 5e-4)
    assert (track.decay_vectors, track.learning_rates, track.specials) == (True, (), ())
    assert (track.dsa, track.normalization, track.test_resize, track.fresh_optimizer) == (DSA, "dataset", False, True)
    # nothing beside DSA
    assert (track.cutmix_alpha, track.flip, track.crop_scale(1)) == (0.0, False, (1.0, 1.0))
    assert (track.color_jitter, track.lighting_std, track.ema_decay) == (0.0, 0.0, 0.0)
    assert track.batch_size(10, 100, dataset="cifar100", network="convnet3") == 256
    assert track.peak_learning_rate(dataset="cifar100", network="convnet3") == 0.01


def test_eccv2024_epochs_and_drops() -> None:
    first, second = ECCV2024_TRACK1, ECCV2024_TRACK2
    assert first.epochs(10, dataset="tinyimagenet", network="convnet3") == 1001
    assert second.epochs(900, dataset="cifar100", network="convnet3") == 101
    # The scorer trains epoch 501 (of 0 to 1000) or 51 (of 0 to 100) and lowers the rate after it.
    rates = [first.learning_rate_at(epoch, 1001, 0.01) for epoch in (0, 501, 502, 1000)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])
    rates = [second.learning_rate_at(epoch, 101, 0.01) for epoch in (0, 51, 52, 100)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])
    assert (first.any_number, second.any_number) == (False, True)


def test_strong_hyper_parameters() -> None:
    assert (STRONG.labels, STRONG.loss, STRONG.hard_weight, STRONG.ensemble) == ("soft", "mse", 0.025, True)
    assert (STRONG.optimizer, STRONG.learning_rate, STRONG.weight_decay) == ("adamw", 1e-3, 0.01)
    assert (STRONG.decay_vectors, STRONG.ema_decay, STRONG.cutmix_alpha) == (False, 0.99, 1.0)
    assert STRONG.learning_rate_at(299, 300, 1e-3) == pytest.approx(0.50261798e-3)  # the smoothed rate ends at half
    cases = ((1, 10, 10), (10, 10, 50), (50, 100, 50), (10, 200, 100), (10, 1000, 100))
    for ipc, num_classes, expected in cases:
        assert STRONG.batch_size(ipc, num_classes, dataset="any", network="resnet18") == expected


def test_fixed_soft_hyper_parameters() -> None:
    assert (FIXED_SOFT.labels, FIXED_SOFT.norm, FIXED_SOFT.optimizer) == ("stored", "instance", "sgd")
    assert (FIXED_SOFT.learning_rate, FIXED_SOFT.momentum, FIXED_SOFT.weight_decay) == (0.01, 0.9, 5e-4)
    assert (FIXED_SOFT.dsa, FIXED_SOFT.cutmix_alpha, FIXED_SOFT.flip) == (DSA, 0.0, False)
    assert FIXED_SOFT.batch_size(50, 10, dataset="cifar10", network="convnet3") == 256
    assert FIXED_SOFT.epochs(10, dataset="cifar10", network="convnet3") == 3000
    assert FIXED_SOFT.epochs(10, dataset="tinyimagenet", network="convnet4") == 1000
    rates = [FIXED_SOFT.learning_rate_at(epoch, 3000, 0.01) for epoch in (749, 750, 1500, 2250, 2999)]
    assert rates == pytest.approx([0.01, 0.003, 0.0009, 0.00027, 0.00027])


def test_a_special_that_holds_first_gives_the_value() -> None:
    specials = (
        Special(dataset="a", network="vgg11", learning_rate=1.0),
        Special(dataset="a", batch_size=7, learning_rate=2.0),
        Special(num_classes=(4,), batch_factor=3),
    )
    recipe = replace(HARD, specials=specials)
    assert recipe.peak_learning_rate(dataset="a", network="vgg11") == 1.0
    assert recipe.peak_learning_rate(dataset="a", network="resnet18") == 2.0
    assert recipe.peak_learning_rate(dataset="b", network="vgg11") == 0.01
    sizes = [recipe.batch_size(100, 4, dataset=dataset, network="vgg11") for dataset in ("a", "b")]
    assert sizes == [7, 192]


def test_without_augmentation_only_augmentation_differs() -> None:
    plain = get_protocol("hard-plain")
    assert plain.name == "hard-plain" and plain.crop_scale(2) == (1.0, 1.0)
    assert (plain.cutmix_alpha, plain.flip, plain.color_jitter, plain.lighting_std, plain.dsa) == (0, False, 0, 0, ())
    back = replace(
        plain, name="hard", title=HARD.title, cutmix_alpha=1.0, flip=True, shuffle=True, min_crop=0.5, color_jitter=0.4,
        lighting_std=0.1,
    )  # fmt: skip
    assert back == HARD


# --- files


def test_the_example_states_every_key_of_hard() -> None:
    example = get_protocol(str(EXAMPLE))
    assert example == replace(HARD, name="example", title=example.title)
    assert list(yaml.safe_load(EXAMPLE.read_text())) == list(to_plain(HARD))


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_every_protocol_survives_a_file(tmp_path: Path, name: str) -> None:
    mine = replace(PROTOCOLS[name], name="mine")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(to_plain(mine)))
    assert read_protocol(path) == mine
    path.write_text(json.dumps(to_plain(mine), allow_nan=False))  # JSON is YAML
    assert read_protocol(path) == mine


def test_keys_with_defaults_may_be_left_out(tmp_path: Path) -> None:
    needed = ("name", "title", "source", "labels", "norm", "optimizer", "learning_rate", "weight_decay", "schedule")
    values = {key: to_plain(replace(RDED, name="mine"))[key] for key in (*needed, "epochs_by_ipc", "batch_sizes")}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    assert read_protocol(path).temperature == 1.0
    assert read_protocol(path).epochs_by_ipc == ((math.inf, 300),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temprature": 4.0}, "unknown key temprature; did you mean temperature?"),
        ({"specials": [{"datset": "cifar10"}]}, "specials: unknown key datset; did you mean dataset?"),
        ({"labels": "softly"}, "labels softly: choose among soft, stored, views, hard"),
        ({"learning_rate": "fast"}, "learning_rate fast: expected a number"),
        ({"flip": 1}, "flip 1: expected true or false"),
        ({"betas": [0.9]}, "betas [0.9]: expected 2 values"),
        ({"batch_sizes": [[1, 2.5]]}, "batch_sizes 2.5: expected a whole number"),
        ({"dsa": ["colour"]}, "dsa colour: choose among color"),
        ({"name": "rded"}, "name rded is a built-in protocol's"),
        ({"ema_decay": 1.0}, "ema_decay and momentum must be below 1"),
        ({"epochs_by_ipc": [[10, 300]]}, "the last ipc of epochs_by_ipc must be inf"),
        ({"batch_sizes": [[10, 5], [1, 5]]}, "give pairs of ascending ipc"),
        ({"temperature": 0}, "temperature 0: give a number, above 0"),
        ({"min_crop": 1.5}, "min_crop 1.5"),
        ({"title": None}, "title None: expected a word"),
    ],
)
def test_a_file_that_states_no_recipe(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**to_plain(replace(HARD, name="mine")), **changes}))
    with pytest.raises(UserError) as error:
        get_protocol(str(path))
    assert str(error.value).startswith(f"--protocols {path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_missing_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--protocols .*none.yaml: No such file"):
        get_protocol(str(tmp_path / "none.yaml"))
    (tmp_path / "few.yaml").write_text("name: few\nlabels: hard\n")
    with pytest.raises(UserError, match=r"title, source, norm, optimizer, .* not stated"):
        get_protocol(str(tmp_path / "few.yaml"))


def test_stored_views_have_no_plain_recipe() -> None:
    with pytest.raises(UserError, match="--protocols stored-plain: stored views are augmented already"):
        get_protocol("stored-plain")
