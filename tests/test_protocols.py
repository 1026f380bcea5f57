"""Protocols: every published hyper-parameter, and the schedules at epochs worked out by hand."""

from __future__ import annotations

import pytest

from ddgen.errors import UserError
from ddgen.evaluation.protocol_files import get_protocol
from ddgen.evaluation.protocols import HARD, RDED


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
        ("tinyimagenet", 10, "convnet4", {1: 10, 5: 50}),  # never above ipc x classes
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
