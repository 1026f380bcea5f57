"""Networks whose features are compared: Inception's weights, transformers folders, the observer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import transformers
from evaluation_cases import CPU, images, observer
from safetensors.torch import load_file, save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ddgen.errors import UserError
from ddgen.evaluation import extractors
from ddgen.evaluation.extractors import (
    backbone_extractor,
    choose_extractor,
    inception_extractor,
    observer_extractor,
    short_name,
)

SIDE = 16
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 4}
PUBLISHED = "weights-inception-2015-12-05-6726825d.pth"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def save(path: Path, model: torch.nn.Module) -> str:
    """Writes a model and a processor that resizes, crops, and normalises with its own numbers."""
    model.save_pretrained(path)
    processor = transformers.ViTImageProcessor(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]
    )
    processor.save_pretrained(path)
    return str(path)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """What the processor of `save` makes of pixels of the right size."""
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    return (pixels / 255 - mean) / std


def drawn(kind: str, *, pooler: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "vit":
        return transformers.ViTModel(transformers.ViTConfig(**TINY, intermediate_size=32), add_pooling_layer=pooler)
    if kind == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(**TINY))
    if kind == "clip":
        vision = transformers.CLIPVisionConfig(**TINY, intermediate_size=32)
        text = transformers.CLIPTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
        both = {"vision_config": vision.to_dict(), "text_config": text.to_dict()}
        return transformers.CLIPModel(transformers.CLIPConfig(**both))
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2)
    return transformers.ConvNextModel(config)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "convnext", "clip"])
def test_backbones_give_the_pooled_output_of_normalised_images(kind: str, tmp_path: Path) -> None:
    model = drawn(kind).eval()
    extractor = backbone_extractor(save(tmp_path / kind, model))
    pixels = images(3, 0, side=SIDE).pixels
    with torch.no_grad():
        expected = getattr(model, "vision_model", model)(pixel_values=normalised(pixels)).pooler_output
    found = extractor.extract(pixels, CPU)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (extractor.name, extractor.is_inception, found.shape) == (kind, False, (3, 16))


def test_other_sizes_are_resized(tmp_path: Path) -> None:
    extractor = backbone_extractor(save(tmp_path / "vit", drawn("vit")))
    small = images(3, 0, side=SIDE // 2).pixels
    doubled = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    flat = torch.full((3, 3, 40, 40), 90, dtype=torch.uint8)
    torch.testing.assert_close(extractor.extract(flat, CPU), extractor.extract(flat[..., :SIDE, :SIDE], CPU))
    assert not torch.allclose(extractor.extract(small, CPU), extractor.extract(doubled, CPU))  # bilinear, not nearest


def test_a_pooler_without_weights_is_not_drawn_at_random(tmp_path: Path) -> None:
    """Many published ViTs lack the pooler's weights: transformers would draw other ones every time."""
    model = drawn("vit", pooler=False).eval()
    source = save(tmp_path / "vit", model)
    first, second = backbone_extractor(source), backbone_extractor(source)
    pixels = images(3, 0, side=SIDE).pixels
    assert torch.equal(first.extract(pixels, CPU), second.extract(pixels, CPU))
    assert first.fingerprint == second.fingerprint
    with torch.no_grad():
        token = model(pixel_values=normalised(pixels)).last_hidden_state[:, 0]
    torch.testing.assert_close(first.extract(pixels, CPU), token, rtol=1e-4, atol=1e-4)


def test_fingerprint_follows_weights_and_normalisation(tmp_path: Path) -> None:
    path = tmp_path / "vit"
    before = backbone_extractor(save(path, drawn("vit"))).fingerprint
    settings = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.5, 0.5, 0.5]}))
    other_mean = backbone_extractor(str(path)).fingerprint
    tensors = load_file(path / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    assert len({before, other_mean, backbone_extractor(str(path)).fingerprint}) == 3


def test_backbones_that_cannot_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^--fd_network ./nowhere: no such folder; give one"):
        backbone_extractor("./nowhere")
    with pytest.raises(UserError, match=r"^--fd_network some/model: no transformers vision backbone that can be"):
        backbone_extractor("some/model")  # the tests are offline
    text = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40
    )
    with pytest.raises(UserError, match=r"^--fd_network .*bert: it gives no features of an image"):
        backbone_extractor(save(tmp_path / "bert", transformers.BertModel(text)))
    path = tmp_path / "vit"
    save(path, drawn("vit"))
    tensors = load_file(path / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"weights are not in the file \(layernorm.weight\)"):
        backbone_extractor(str(path))
    torch.save(tensors, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no transformers vision backbone"):
        backbone_extractor(str(path))


def test_masked_autoencoders_are_refused(tmp_path: Path) -> None:
    masked = transformers.ViTMAEModel(transformers.ViTMAEConfig(**TINY, intermediate_size=32))
    with pytest.raises(UserError, match="other features each time"):
        backbone_extractor(save(tmp_path / "mae", masked))


def test_extractor_names_stay_file_names() -> None:
    assert short_name("torchvision:mobilenet_v3_small") == "mobilenet-v3-small"
    assert short_name("transformers:google/vit-base") == "vit-base"
    assert short_name("transformers:models/my_net/") == "my-net"
    assert observer_extractor(observer()).name == "convnet3"


# --- which network


def test_choice_of_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert choose_extractor(None, None) is None and choose_extractor("observer", None) is None
    with pytest.raises(UserError, match=r"^--inception_weights w.pth: --fd_network observer has no use for it"):
        choose_extractor("observer", "w.pth")
    with pytest.raises(UserError, match=r"^--inception_weights w.pth: no such file"):
        choose_extractor("inception", "w.pth")


def test_inception_is_downloaded_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked: list[str] = []

    def offline(url: str, path: str, hash_prefix: str) -> None:
        asked.append(f"{Path(url).name} {Path(path).relative_to(tmp_path)} {hash_prefix}")
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert inception_extractor(None) is None and asked == []
    with pytest.raises(UserError, match=r"^--fd_network inception: the weights cannot be downloaded .*no network"):
        choose_extractor("inception", None)
    assert asked == [f"{PUBLISHED} checkpoints/{PUBLISHED} 6726825d"]


def test_wrong_inception_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"^--inception_weights .*no.pth: no such file; expected weights-inception-2015"
    ):
        inception_extractor(str(tmp_path / "no.pth"))
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(UserError, match=r"not the 2015-12-05 Inception weights .*not 6726825d"):
        inception_extractor(str(tmp_path / "other.pth"))
    monkeypatch.setattr(extractors, "INCEPTION_SHA256_PREFIX", hashlib.sha256(b"other").hexdigest()[:8])
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
    path = tmp_path / "checkpoints" / PUBLISHED
    path.parent.mkdir()
    torch.save(blank.state_dict(), path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(extractors, "INCEPTION_SHA256_PREFIX", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    extractor = choose_extractor(None, None)
    assert extractor is not None and extractor.is_inception and extractor.name == "inception"
    pixels = images(3, 0).pixels
    torch.testing.assert_close(extractor.extract(pixels, CPU), blank(pixels)[0])
