"""The observer: networks, training, normalisation, realism, and what a user sees when something is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ddgen.config import ObserverConfig
from ddgen.data import ImageDataset
from ddgen.errors import UserError
from ddgen.observer.inference import for_inference
from ddgen.observer.networks import build_network, uses_channels_last
from ddgen.observer.observer import Observer, predict_pixels
from ddgen.observer.realism import check_observer, measure_accuracy, realism_scores
from ddgen.observer.training import augment, channel_statistics, one_cycle, train_observer
from ddgen.seeds import torch_generator

CPU = torch.device("cpu")
CLASSES = ("red", "green", "blue")


def colours(per_class: int = 40, size: int = 8, seed: int = 0) -> ImageDataset:
    """Noisy red, green and blue squares: separable, but not from one pixel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(per_class)
    noise = torch.randint(0, 160, (len(labels), 3, size, size), generator=generator)
    bright = F.one_hot(labels, 3)[:, :, None, None] * 90
    return ImageDataset(
        pixels=(noise + bright).to(torch.uint8),
        labels=labels,
        class_names=CLASSES,
        name="colours",
        split="train",
        fingerprint=f"colours-{per_class}-{size}-{seed}",
    )


def small_config(**changes: object) -> ObserverConfig:
    values = {"observer_network": "convnet1", "observer_epochs": 4, "observer_batch_size": 16, **changes}
    return ObserverConfig(**values)  # type: ignore[arg-type]


def train(
    tmp_path: Path, name: str = "observer", *, seed: int = 0, precision: str = "no", **changes: object
) -> Observer:
    return train_observer(
        small_config(**changes),
        colours(),
        output_dir=tmp_path / name,
        device=CPU,
        precision=precision,
        seed=seed,
        progress=False,
    )


def untrained(network: str = "convnet2", size: int = 8, accuracy: float | None = 0.9) -> Observer:
    torch.manual_seed(0)
    return Observer(
        build_network(network, 3, size),
        network=network,
        class_names=CLASSES,
        input_size=size,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
        accuracy=accuracy,
    ).eval()


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Observer, Path]:
    folder = tmp_path_factory.mktemp("trained")
    return train(folder), folder / "observer"


# --- networks


@pytest.mark.parametrize(
    ("name", "num_classes", "size", "parameters", "features"),
    [
        ("convnet3", 10, 32, 320_010, 2048),  # the count of the dataset distillation literature's ConvNet
        ("convnet4", 200, 64, 3_584 + 3 * 147_584 + 4 * 256 + 409_800, 2048),  # convolutions, norms, linear
        ("resnet18", 10, 32, 11_173_962, 512),  # 3x3 stem
        ("resnet18", 1000, 128, 11_689_512, 512),  # torchvision's own
    ],
)
def test_network_sizes(name: str, num_classes: int, size: int, parameters: int, features: int) -> None:
    network = build_network(name, num_classes, size).eval()
    x = torch.randn(2, 3, size, size)
    assert num_parameters(network) == parameters
    assert network.features(x).shape == (2, features)
    torch.testing.assert_close(network(x), network.head(network.features(x)))


def test_small_stem_keeps_the_resolution() -> None:
    shapes = []
    network = build_network("resnet18", 10, 64)
    network.body.get_submodule("layer1").register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    network(torch.zeros(2, 3, 64, 64))
    assert shapes == [(2, 64, 64, 64)]


def test_instance_norm_is_one_group_a_channel() -> None:
    network = build_network("convnet3", 10, 32, norm="instance", width=16)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert [(norm.num_groups, norm.num_channels) for norm in norms] == [(16, 16)] * 3
    assert not uses_channels_last(network, CPU)
    assert uses_channels_last(build_network("convnet3", 10, 32), CPU)
    assert num_parameters(build_network("convnet3", 10, 32, norm="none")) == 320_010 - 6 * 128


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("convnet4", 8, "--observer_network convnet4: every block halves the side, so 8 px images take 1 to 3 blocks"),
        ("convnet0", 8, "use convnet1"),
        ("resnet", 8, "--observer_network resnet: unknown network; use convnet<d>"),
        ("torchvision:mobilenet_v3_smal", 32, "did you mean torchvision:mobilenet_v3_small?"),
        ("torchvision:alexnet", 32, "cannot take 32 px images; set --observer_input_size"),
        ("torchvision:vit_b_32", 40, "cannot take 40 px images; set --observer_input_size"),
        ("torchvision:squeezenet1_1", 32, "ends in no linear layer"),
    ],
)
def test_wrong_networks(name: str, size: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_network(name, 3, size)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_students_are_named_by_their_own_flag() -> None:
    with pytest.raises(UserError, match=r"^--students nonet: unknown network"):
        build_network("nonet", 3, 32, setting="--students")


# --- the observer


def test_normalises_and_resizes_by_itself() -> None:
    observer = untrained()
    images01 = torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor(observer.mean), torch.tensor(observer.std)
    by_hand = observer.classifier((images01 - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(observer(images01), by_hand)
    seen = []
    observer.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    observer(torch.rand(2, 3, 16, 16))
    assert seen == [(2, 3, 8, 8)]


def test_saved_and_loaded_is_the_same(trained: tuple[Observer, Path]) -> None:
    observer, path = trained
    loaded = Observer.load(path, CLASSES)
    assert not loaded.training
    assert loaded.fingerprint == observer.fingerprint
    assert (loaded.class_names, loaded.network, loaded.input_size) == (CLASSES, "convnet1", 8)
    assert loaded.accuracy == observer.accuracy
    pixels = colours(seed=1).pixels
    for what in ("logits", "features"):
        kwargs = {"what": what, "batch_size": 32, "device": CPU, "precision": "no"}
        left, right = predict_pixels(observer, pixels, **kwargs), predict_pixels(loaded, pixels, **kwargs)  # type: ignore[arg-type]
        torch.testing.assert_close(left, right, atol=0, rtol=0)
    assert sorted(item.name for item in path.iterdir()) == [
        "confidences.npy", "config.json", "epochs", "model.safetensors", "training.json",
    ]  # fmt: skip


def test_fingerprint_follows_weights_and_normalisation() -> None:
    first, second = untrained(), untrained()
    assert first.fingerprint == second.fingerprint
    with torch.no_grad():
        second.classifier.head.bias[0] += 1e-6
    assert first.fingerprint != second.fingerprint
    third = untrained()
    third.mean = (0.0, 0.0, 0.0)
    assert first.fingerprint != third.fingerprint


def test_predict_pixels_in_batches_and_mirrored() -> None:
    observer = untrained().train()
    pixels = colours(per_class=3, seed=2).pixels
    kwargs = {"device": CPU, "precision": "no"}
    whole = predict_pixels(observer, pixels, what="logits", batch_size=100, **kwargs)  # type: ignore[arg-type]
    parts = predict_pixels(observer, pixels, what="logits", batch_size=2, **kwargs)  # type: ignore[arg-type]
    assert observer.training  # put back
    observer.eval()
    torch.testing.assert_close(whole, observer(pixels / 255).detach())
    torch.testing.assert_close(whole, parts)
    both = predict_pixels(observer, pixels, what="logits", batch_size=4, mirror=True, **kwargs)  # type: ignore[arg-type]
    torch.testing.assert_close(both, (whole + observer(pixels.flip(-1) / 255).detach()) / 2)
    assert predict_pixels(observer, pixels[:0], what="logits", batch_size=4, **kwargs).shape == (0, 3)  # type: ignore[arg-type]


def test_load_errors(tmp_path: Path, trained: tuple[Observer, Path]) -> None:
    with pytest.raises(UserError, match=r"no such folder; give an observer's folder"):
        Observer.load(tmp_path / "missing")
    with pytest.raises(UserError, match=r"class 0 is 'green' in the dataset but 'red' in --observer .*another order"):
        Observer.load(trained[1], ("green", "red", "blue"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither an observer's folder"):
        Observer.load(tmp_path / "empty")


def test_damaged_observers(tmp_path: Path) -> None:
    untrained().save(tmp_path / "a")
    with pytest.raises(UserError, match="an observer is there already"):
        untrained().save(tmp_path / "a")
    weights = (tmp_path / "a" / "model.safetensors").read_bytes()
    (tmp_path / "a" / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(UserError, match=r"damaged observer .*; train the observer again"):
        Observer.load(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(weights)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "network": "convnet1"}))
    with pytest.raises(UserError, match="damaged observer"):
        Observer.load(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        Observer.load(tmp_path / "a")


def test_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForImageClassification

    def refuse(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", refuse)
    with pytest.raises(UserError) as caught:
        Observer.load("someone/classifier")
    assert str(caught.value) == (
        "--observer someone/classifier: neither an observer's folder (no config.json of one) nor a transformers image "
        "classifier that can be loaded: We couldn't connect to the hub"
    )


# --- training


def test_learns_and_reports(trained: tuple[Observer, Path]) -> None:
    observer, path = trained
    lines = [json.loads(line) for line in path.with_name("observer_metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines] == [7, 14, 21, 27]  # 108 images in batches of 16
    assert observer.accuracy == lines[-1]["holdout_accuracy"]
    test = colours(seed=5)
    assert measure_accuracy(observer, test, device=CPU, precision="no") > 0.9
    scores = realism_scores(observer, test.pixels, test.labels, batch_size=64, device=CPU, precision="no")
    accuracy = (scores.predicted == test.labels).float().mean().item()
    assert measure_accuracy(observer, test, device=CPU, precision="no", batch_size=7) == pytest.approx(accuracy)


def test_same_seed_same_bits(tmp_path: Path, trained: tuple[Observer, Path]) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = train(tmp_path, "again")
    assert torch.equal(before, torch.random.get_rng_state())
    assert again.fingerprint == trained[0].fingerprint
    assert train(tmp_path, "other", seed=1).fingerprint != again.fingerprint


def test_dropout_is_seeded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision network with dropout, from scratch, at its own input size, in bf16."""
    monkeypatch.setattr("ddgen.observer.training.check_observer", lambda *_: None)  # an epoch teaches it nothing
    settings = {"observer_network": "torchvision:mobilenet_v3_small", "observer_input_size": 32, "observer_epochs": 1}
    torch.manual_seed(1)
    first = train(tmp_path, "first", precision="bf16", **settings)
    torch.manual_seed(2)
    second = train(tmp_path, "second", precision="bf16", **settings)
    assert first.fingerprint == second.fingerprint
    assert all(parameter.dtype == torch.float32 for parameter in first.parameters())
    loaded = Observer.load(tmp_path / "first")
    assert (loaded.network, loaded.input_size) == ("torchvision:mobilenet_v3_small", 32)
    assert loaded.features(torch.rand(2, 3, 8, 8)).shape == (2, 1024)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observer_epochs": 0}, "--observer_epochs 0: must be above 0"),
        ({"observer_batch_size": 1}, "--observer_batch_size 1: batch norm needs at least 2"),
        ({"observer_learning_rate": -1.0}, "--observer_learning_rate -1.0: must be above 0"),
        ({"observer_holdout": 0.0}, "--observer_holdout 0.0: must be between 0 and 1"),
        ({"observer_learning_rate": 1e12}, "loss is not finite at step 3, for images 119, 118,"),
        ({"observer_network": "convnet4"}, "convnet4: every block halves the side"),
    ],
)
def test_wrong_settings(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        train(tmp_path, **changes)
    assert message in str(caught.value)
    assert not (tmp_path / "observer").exists()


def test_existing_observer_is_not_overwritten(trained: tuple[Observer, Path]) -> None:
    with pytest.raises(UserError, match="an observer is there already"):
        train(trained[1].parent)


def test_one_cycle() -> None:
    rates = [one_cycle(step, 99, 2.0) for step in range(99)]
    assert rates[0] == pytest.approx(2.0 * 0.05)
    assert max(rates) == rates[19] == 2.0
    assert rates[59] == pytest.approx(1.0)  # half way down
    assert 0 < rates[-1] < 0.002
    assert 0 < one_cycle(0, 1, 2.0) < 2.0


def test_augment_shifts_mirrors_and_reflects_each_image_by_itself() -> None:
    position = torch.arange(32, dtype=torch.uint8)
    pixels = torch.stack([position.expand(32, 32), position[:, None].expand(32, 32), torch.full((32, 32), 7)])
    pixels = torch.stack([pixels, pixels.flip(0)]).to(torch.uint8)  # (2, 3, 32, 32)
    out = augment(pixels, torch.tensor([0] * 200 + [1]), torch_generator(0, "test"))
    assert out.dtype == torch.uint8
    assert out[200, 0].eq(7).all()  # another image is another one
    columns, rows = out[:200, 0, 0].long(), out[:200, 1, :, 0].long()
    assert out[:200, 2].eq(7).all()
    assert out[:200, 0].eq(columns[:, None, :]).all()
    mirrored = columns[:, 14] > columns[:, 15]
    assert 70 < mirrored.sum() < 130
    shifts = torch.where(mirrored, columns.flip(1)[:, 16], columns[:, 16]) - 16
    assert set(shifts.tolist()) == set((rows[:, 16] - 16).tolist()) == set(range(-4, 5))
    assert rows[(rows[:, 16] == 12).nonzero()[0, 0]].tolist() == [4, 3, 2, 1, *range(28)]
    assert rows[(rows[:, 16] == 20).nonzero()[0, 0]].tolist() == [*range(4, 32), 30, 29, 28, 27]
    upright = augment(pixels, torch.tensor([0] * 50), torch_generator(0, "test"), flip=False)
    assert (upright[:, 0, 0, 14] < upright[:, 0, 0, 15]).all()


def test_channel_statistics_match_the_definition() -> None:
    data = colours()
    indices = torch.arange(0, 120, 2)
    mean, std = channel_statistics(data.pixels, indices)
    values = data.pixels[indices].double() / 255
    np.testing.assert_allclose(mean, values.mean(dim=(0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(std, values.std(dim=(0, 2, 3), correction=0), atol=1e-6)


# --- realism


def test_realism_is_the_cross_entropy_of_the_true_class() -> None:
    observer, data = untrained(), colours(per_class=5)
    scores = realism_scores(observer, data.pixels, data.labels, batch_size=4, device=CPU, precision="no")
    logits = observer(data.pixels / 255).detach()
    torch.testing.assert_close(scores.loss, F.cross_entropy(logits, data.labels, reduction="none"))
    assert torch.equal(scores.predicted, logits.argmax(dim=1))
    torch.testing.assert_close(scores.logits, logits)
    assert scores.loss.dtype == torch.float32


def test_realism_is_finite_where_softmax_underflows() -> None:
    observer = untrained()
    with torch.no_grad():
        observer.classifier.head.weight.zero_()
        observer.classifier.head.bias.copy_(torch.tensor([0.0, 500.0, -500.0]))
    pixels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    scores = realism_scores(observer, pixels, torch.arange(3), batch_size=3, device=CPU, precision="no")
    assert scores.loss.tolist() == [500.0, 0.0, 1000.0]
    with torch.no_grad():
        observer.classifier.head.bias[0] = math.nan
    with pytest.raises(UserError, match="logits are not finite"):
        realism_scores(observer, pixels, torch.arange(3), batch_size=3, device=CPU, precision="no")


def test_check_observer() -> None:
    check_observer(untrained(accuracy=0.9), CLASSES)
    with pytest.raises(UserError, match=r"accuracy 33.0% on real held-out images, chance is 33.3%.*class order"):
        check_observer(untrained(accuracy=0.33), CLASSES)
    with pytest.raises(UserError, match="class 1 is 'blue' in the dataset but 'green'"):
        check_observer(untrained(accuracy=0.9), ("red", "blue", "green"))
    with pytest.raises(ValueError, match="measure_accuracy first"):
        check_observer(untrained(accuracy=None), CLASSES)


def save_tiny_vit(folder: Path, **processor: object) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    settings = {"size": size, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], **processor}
    ViTImageProcessor(**settings).save_pretrained(folder)


def test_transformers_classifier(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    save_tiny_vit(tmp_path / "vit")
    observer = Observer.load(tmp_path / "vit", CLASSES)
    assert observer.class_names == CLASSES
    assert observer.input_size == 16
    assert observer.mean == pytest.approx((0.1, 0.2, 0.3), abs=1e-5)
    assert observer.std == pytest.approx((0.4, 0.5, 0.6), abs=1e-5)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "vit").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    with torch.no_grad():
        reference = model(**processor(images=images, return_tensors="pt"), output_hidden_states=True)
    ours = {
        what: predict_pixels(observer, pixels, what=what, batch_size=2, device=CPU, precision="no")  # type: ignore[arg-type]
        for what in ("logits", "features")
    }
    torch.testing.assert_close(ours["logits"], reference.logits, atol=1e-4, rtol=1e-4)
    assert ours["features"].shape == (3, 12)
    torch.testing.assert_close(model.classifier(ours["features"]).detach(), ours["logits"], atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="class 0 is 'blue' in the dataset but 'red'"):
        Observer.load(tmp_path / "vit", CLASSES[::-1])


def test_transformers_classifier_saved_again_keeps_its_accuracy(tmp_path: Path) -> None:
    save_tiny_vit(tmp_path / "vit")
    observer = Observer.load(tmp_path / "vit")
    assert observer.accuracy is None
    observer.accuracy = measure_accuracy(observer, colours(), device=CPU, precision="no")
    observer.save(tmp_path / "run" / "observer")
    again = Observer.load(tmp_path / "run" / "observer", CLASSES)
    assert again.accuracy == observer.accuracy
    images01 = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again(images01), observer(images01), atol=0, rtol=0)


def test_transformers_spelling_of_the_range_does_not_matter(tmp_path: Path) -> None:
    """[-1, 1] by rescaling with 2/255 and mean 1: what matters is what the processor computes."""
    save_tiny_vit(tmp_path / "vit", rescale_factor=2 / 255, image_mean=[1.0] * 3, image_std=[1.0] * 3)
    observer = Observer.load(tmp_path / "vit")
    assert observer.mean == pytest.approx((0.5,) * 3, abs=1e-5)
    assert observer.std == pytest.approx((0.5,) * 3, abs=1e-5)


@pytest.mark.parametrize("network", ["convnet2", "resnet18"])
def test_folding_batch_norms_changes_rounding_only(network: str) -> None:
    observer = untrained(network, size=16)
    for module in observer.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    before, pixels = observer.fingerprint, colours(size=16).pixels[:20]
    fused = for_inference(observer, CPU)
    ours, theirs = (
        predict_pixels(o, pixels, what="logits", batch_size=b, device=CPU, precision="no")
        for o, b in ((fused, 8), (observer, 20))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert observer.fingerprint == before and theirs.std() > 0.01
    if network == "convnet2":
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
