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
    network = build_network(name, 7, size).eval()
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        features = network.features(x)
        logits = network(x)
    assert logits.shape == (1, 7) and features.shape == (1, network.head.in_features)
    torch.testing.assert_close(logits, network.head(features))


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
        assert num_parameters(_on_meta(name, num_classes, size)) == parameters


def _on_meta(name: str, num_classes: int, size: int) -> torch.nn.Module:
    if name in NETWORKS:
        return NETWORKS[name](num_classes, size, "batch")
    with torch.device("cpu"):
        return build_network(name, num_classes, size)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet_ap10", "vgg11", "mobilenet_v2", "efficientnet_b0"])
def test_norms_replace_batch_norm(name: str) -> None:
    batch = [m for m in build_network(name, 3, 32).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    instance = build_network(name, 3, 32, norm="instance")
    groups = [m for m in instance.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert [m.num_features for m in batch] == [m.num_channels for m in groups] == [m.num_groups for m in groups]
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in instance.modules())
    none = build_network(name, 3, 32, norm="none")
    assert not any(isinstance(m, (torch.nn.BatchNorm2d, torch.nn.GroupNorm)) for m in none.modules())


@pytest.mark.parametrize(
    ("name", "size", "side"), [("mobilenet_v2", 32, 2), ("efficientnet_b0", 64, 4), ("vgg11", 64, 2)]
)
def test_small_images_leave_more_than_a_pixel(name: str, size: int, side: int) -> None:
    shapes = []
    network = build_network(name, 3, size).eval()
    network.body.features.register_forward_hook(lambda *args: shapes.append(args[2].shape[-2:]))
    network(torch.zeros(1, 3, size, size))
    assert shapes == [(side, side)]


@pytest.mark.parametrize("size", [32, 64])
def test_transformers_see_8_x_8_or_16_x_16_tokens(size: int) -> None:
    vit, swin = build_network("vit", 3, size), build_network("swin", 3, size)
    assert vit.body.encoder.pos_embedding.shape == (1, 65, 192)
    with torch.no_grad():
        assert swin.body.features[0](torch.zeros(1, 3, size, size)).shape == (1, 16, 16, 96)


@pytest.mark.parametrize("name", ["convnet2", *NETWORKS])
def test_twenty_images_are_learned_by_heart(name: str) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(20, 3, 16, 16), torch.arange(20) % 4
    network = build_network(name, 4, 16).train()
    rate = 1e-3 if name in ("vit", "swin") else 5e-3
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    start, loss = None, torch.tensor(torch.inf)
    for _ in range(40):
        loss = F.cross_entropy(network(images), labels)
        start = start or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.3:
            break
    assert start is not None and start > 0.9 and loss.item() < 0.3


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
