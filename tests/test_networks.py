"""Networks: shapes at small sizes, published parameter counts, norms, and that each can learn 20 images by heart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ddgen.errors import UserError
from ddgen.observer.networks import NETWORKS, build_network

ALL = ("convnet3", *NETWORKS)


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_logits_and_features_at_every_size(name: str, size: int) -> None:
    with torch.device("meta"):  # shapes without arithmetic
        network = build_network(name, 7, size).eval()
        x = torch.zeros(2, 3, size, size)
        assert network.features(x).shape == (2, network.head.in_features) and network(x).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "num_classes", "size", "parameters"),
    [
        ("resnet50", 1000, 128, 25_557_032),  # torchvision's own, with its published counts
        ("vgg11", 1000, 128, 132_868_840),
        ("mobilenet_v2", 1000, 128, 3_504_872),
        ("efficientnet_b0", 1000, 128, 5_288_548),
        ("swin", 1000, 224, 28_288_354),
        ("vit", 1000, 224, 5_717_416),  # DeiT-Ti
        ("resnet50", 10, 32, 23_520_842),  # the CIFAR versions of common use
        ("vgg11", 10, 32, 9_231_114),
        ("resnet_ap10", 10, 32, 4_903_242),
        ("mobilenet_v2", 10, 32, 2_236_682),  # a stride is no parameter
        ("convnet3w64", 10, 32, 1_792 + 2 * 36_928 + 3 * 128 + 10_250),
    ],
)
def test_parameter_counts(name: str, num_classes: int, size: int, parameters: int) -> None:
    with torch.device("meta"):
        assert num_parameters(build_network(name, num_classes, size)) == parameters


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet_ap10", "vgg11", "mobilenet_v2", "efficientnet_b0"])
def test_norms_replace_batch_norm(name: str) -> None:
    with torch.device("meta"):
        batch, instance, none = (build_network(name, 3, 32, norm=norm) for norm in ("batch", "instance", "none"))
    expected = [module.num_features for module in batch.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    groups = [module for module in instance.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert expected == [m.num_channels for m in groups] == [m.num_groups for m in groups] and expected
    norms = (torch.nn.BatchNorm2d, torch.nn.GroupNorm)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in instance.modules())
    assert not any(isinstance(module, norms) for module in none.modules())


@pytest.mark.parametrize(
    ("name", "size", "part", "side"),
    [("mobilenet_v2", 32, "features", 2), ("efficientnet_b0", 64, "features", 4), ("vgg11", 64, "0", 2)],
)
def test_what_is_left_of_small_images(name: str, size: int, part: str, side: int) -> None:
    shapes = []
    with torch.device("meta"):
        network = build_network(name, 3, size).eval()
        network.body.get_submodule(part).register_forward_hook(lambda *args: shapes.append(args[2].shape[-2:]))
        network(torch.zeros(1, 3, size, size))
    assert shapes == [(side, side)]


@pytest.mark.parametrize("size", [32, 64])
def test_transformers_see_8_x_8_or_16_x_16_tokens(size: int) -> None:
    with torch.device("meta"):
        vit, swin = build_network("vit", 3, size), build_network("swin", 3, size)
        assert vit.body.encoder.pos_embedding.shape == (1, 65, 192)
        assert swin.body.features[0](torch.zeros(1, 3, size, size)).shape == (1, 16, 16, 96)


@pytest.mark.parametrize("name", ["convnet2", *NETWORKS])
def test_twenty_images_are_learned_by_heart(name: str) -> None:
    torch.manual_seed(0)
    size = 32 if name == "vgg11" else 8
    images, labels = torch.randn(20, 3, size, size), torch.arange(20) % 4
    network = build_network(name, 4, size).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3 if name == "efficientnet_b0" else 5e-4)
    losses: list[float] = []
    while len(losses) < 30 and (not losses or losses[-1] > 0.7):
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.0 and losses[-1] <= 0.7


def test_instance_norm_of_one_pixel_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--students resnet18: it cannot take 8 px images; take another student"):
        build_network("resnet18", 3, 8, norm="instance", setting="--students")


def test_a_student_of_a_transformers_config(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ViTConfig

    vit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTConfig(**vit, patch_size=4, image_size=224).save_pretrained(tmp_path / "vit")
    depths = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetConfig(**depths).save_pretrained(tmp_path / "resnet")
    for name, width in (("vit", 16), ("resnet", 16)):
        network = build_network(f"transformers:{tmp_path / name}", 5, 32, setting="--students").eval()
        x = torch.randn(2, 3, 32, 32)
        assert network.features(x).shape == (2, width) and network(x).shape == (2, 5)
    instance = build_network(f"transformers:{tmp_path / 'resnet'}", 5, 32, norm="instance", setting="--students")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in instance.modules())
    with pytest.raises(UserError, match="only students are built from a config"):
        build_network(f"transformers:{tmp_path / 'vit'}", 5, 32)
    with pytest.raises(UserError, match="no config of a transformers model there"):
        build_network(f"transformers:{tmp_path / 'none'}", 5, 32, setting="--students")
