"""Autoencoder room: the PCA floor, the latent cache, pretrained autoencoders."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, AutoencoderTiny
from sklearn.decomposition import PCA

from ddgen.autoencoder import autoencoder as autoencoders
from ddgen.autoencoder import latents as latents_module
from ddgen.autoencoder.autoencoder import check_fits, identity, load_pretrained, to_images, to_pixels, wrap
from ddgen.autoencoder.equivariance import Transform, draw_transform
from ddgen.autoencoder.latents import LatentCache, build_latent_cache
from ddgen.autoencoder.patch_autoencoder import PatchAutoencoderKL
from ddgen.autoencoder.pca import fit_pca
from ddgen.autoencoder.training import build, check_space, psnr, train_autoencoder
from ddgen.config import AutoencoderConfig
from ddgen.errors import UserError
from ddgen.resume import Checkpoints

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def smooth_pixels(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Random images with structure: blurred noise, uint8 (n, 3, s, s)."""
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    blurred = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)
    return (blurred * 120 + 128).clamp(0, 255).to(torch.uint8)


def pca_autoencoder(pixels: torch.Tensor, d: int = 6, f: int = 4) -> autoencoders.Autoencoder:
    model = PatchAutoencoderKL(latent_channels=d, downsample=f, block_out_channels=())
    model.set_pca(*fit_pca(pixels, f, d, seed=0))
    return wrap(model, CPU, "no")


def test_pixels_survive_the_way_to_images_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_pixels(to_images(pixels)), pixels)
    assert to_images(pixels).min() == -1 and to_images(pixels).max() == 1


def test_pca_reconstructs_as_well_as_scikit_learn() -> None:
    pixels = smooth_pixels(200)
    vae = pca_autoencoder(pixels, d=6, f=4)
    mean, _ = vae.encode(to_images(pixels))
    ours = (vae.vae.decode(mean).sample - to_images(pixels)).square().mean().item()
    patches = to_images(pixels).reshape(200, 3, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 48).double().numpy()
    reference = PCA(6).fit(patches)
    theirs = np.square(reference.inverse_transform(reference.transform(patches)) - patches).mean()
    assert ours == pytest.approx(theirs, rel=5e-3)  # theirs centres each pixel of a patch, ours each channel


def test_pca_latents_are_whitened_and_uncorrelated() -> None:
    pixels = smooth_pixels(300)
    mean, _ = pca_autoencoder(pixels).encode(to_images(pixels))
    flat = mean.permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(flat @ flat.T / flat.shape[1], torch.eye(6), atol=2e-3)


def test_residual_autoencoder_starts_at_the_pca_and_ends_above_it(tmp_path: Path) -> None:
    pixels = smooth_pixels(256)
    config = AutoencoderConfig(
        vae_downsample=4,
        vae_latent_channels=6,
        vae_patch=2,
        vae_channels=(16, 16),
        vae_train_steps=40,
        vae_batch_size=16,
    )
    model = build(config, 16)
    model.set_pca(*fit_pca(pixels, 4, 6, seed=0))
    assert psnr(wrap(model, CPU, "no"), pixels) == pytest.approx(psnr(pca_autoencoder(pixels), pixels), abs=1e-4)
    common = {"accelerator": Accelerator(cpu=True), "precision": "no", "checkpoints": Checkpoints(tmp_path, {})}
    _, report = train_autoencoder(config, pixels, seed=0, flip=True, **common)
    assert report["psnr"] > report["psnr_pca"] + 0.05


def test_training_that_ends_below_the_pca_keeps_the_pca(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = AutoencoderConfig(
        vae_downsample=4, vae_latent_channels=6, vae_patch=4, vae_channels=(16,), vae_train_steps=12,
        vae_batch_size=4, vae_learning_rate=3.0,
    )  # fmt: skip
    common = {"accelerator": Accelerator(cpu=True), "precision": "no", "checkpoints": Checkpoints(tmp_path, {})}
    _, report = train_autoencoder(config, smooth_pixels(128), seed=0, flip=False, **common)
    assert report["psnr"] == report["psnr_pca"]
    assert "keeping the PCA" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    config = AutoencoderConfig(
        vae_downsample=4, vae_latent_channels=6, vae_patch=4, vae_channels=(16,), vae_train_steps=40,
        vae_batch_size=4, vae_learning_rate=1e30,
    )  # fmt: skip
    common = {"accelerator": Accelerator(cpu=True), "precision": "no", "checkpoints": Checkpoints(tmp_path, {})}
    with pytest.raises(UserError, match=r"loss is not finite at step 2, for images (\d+, ){3}\d+; lower it"):
        train_autoencoder(config, smooth_pixels(128), seed=0, flip=False, **common)
    assert not list(tmp_path.iterdir())


def test_psnr_by_hand() -> None:
    class Offset(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def encode(self, x: torch.Tensor) -> object:
            return type("Encoded", (), {"latents": x})

        def decode(self, z: torch.Tensor) -> object:
            return type("Decoded", (), {"sample": z + 10 / 127.5})

    pixels = torch.full((4, 3, 8, 8), 100, dtype=torch.uint8)
    assert psnr(wrap(Offset(), CPU, "no"), pixels) == pytest.approx(20 * math.log10(255 / 10))


def cached(
    vae: autoencoders.Autoencoder, pixels: torch.Tensor, path: Path, *, flip: bool = False, fingerprint: str = "a"
) -> tuple[autoencoders.Autoencoder, LatentCache]:
    return build_latent_cache(vae, pixels, path, flip=flip, fingerprint=fingerprint, accelerator=Accelerator(cpu=True))


def test_latent_cache_is_standardised_and_holds_mirror_images(tmp_path: Path) -> None:
    pixels = smooth_pixels(64)
    vae, cache = cached(pca_autoencoder(pixels), pixels, tmp_path / "latents", flip=True)
    assert cache.mean.shape == (64, 2, 6, 4, 4)
    assert cache.std is not None
    second_moment = (cache.mean.float().square() + cache.std.float().square()).mean((0, 1, 3, 4))
    assert torch.allclose(cache.mean.float().mean((0, 1, 3, 4)), torch.zeros(6), atol=1e-3)
    assert torch.allclose(second_moment, torch.ones(6), atol=1e-3)
    drawn = cache.batch(torch.tensor([5, 5]), torch.tensor([False, True]), torch.zeros(2, 6, 4, 4))
    images = torch.stack([to_images(pixels[5]), to_images(pixels[5]).flip(-1)])
    assert torch.allclose(drawn, vae.standardise(vae.encode(images)[0]), atol=2e-3)
    noisy = cache.batch(torch.tensor([5]), torch.tensor([False]), torch.ones(1, 6, 4, 4))
    assert torch.allclose(noisy - drawn[:1], cache.std[5:6, 0].float(), atol=1e-6)
    assert cache.num_bytes == 2 * 2 * 64 * 2 * 6 * 4 * 4
    array = np.load(tmp_path / "latents" / "mean.npy")
    assert torch.equal(torch.from_numpy(array), cache.mean)


def test_latents_drawn_are_exactly_standardised_whatever_the_sample_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents_module, "NUM_SAMPLED_IMAGES", 2)
    monkeypatch.setattr(latents_module, "shard_size_of", lambda _: 64)
    pixels = smooth_pixels(150)
    model = PatchAutoencoderKL(latent_channels=6, downsample=4, block_out_channels=(), initial_logvar=-2.0)
    model.set_pca(*fit_pca(pixels, 4, 6, seed=0))
    vae, cache = cached(wrap(model, CPU, "no"), pixels, tmp_path / "latents", flip=True)
    assert cache.scale is not None and (cache.scale - 1).abs().max() > 0.05  # two images say little
    everything, sides = torch.arange(150).repeat(2), torch.arange(300) >= 150
    noise = torch.randn(300, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    means = cache.batch(everything, sides, torch.zeros(300, 6, 4, 4))
    drawn = cache.batch(everything, sides, noise)
    assert torch.allclose(means.mean((0, 2, 3)), torch.zeros(6), atol=1e-4)
    assert torch.allclose(drawn.var((0, 2, 3)), torch.ones(6), atol=2e-2)
    mean, std = vae.encode(to_images(torch.cat([pixels, pixels.flip(-1)])))
    assert torch.allclose(drawn, vae.standardise(mean + std * noise), atol=5e-3)
    assert torch.equal(cache.to(CPU).batch(everything, sides, noise), drawn)


def test_latent_cache_is_reused_for_the_same_images_only(tmp_path: Path) -> None:
    pixels = smooth_pixels(16)
    vae = pca_autoencoder(pixels)
    _, first = cached(vae, pixels, tmp_path / "latents")
    _, same = cached(vae, pixels.flip(0), tmp_path / "latents")
    _, other = cached(vae, pixels.flip(0), tmp_path / "latents", fingerprint="b")
    assert torch.equal(first.mean, same.mean)
    assert torch.equal(first.mean.flip(0), other.mean)
    assert first.mean.shape[1] == 1


def test_a_killed_latent_cache_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while a shard is being written: its half is written again, the shards before it are not."""
    monkeypatch.setattr(latents_module, "shard_size_of", lambda _: 8)
    monkeypatch.setattr(latents_module, "batch_size_of", lambda *_: 4)
    pixels = smooth_pixels(43)
    vae = pca_autoencoder(pixels)
    _, whole = cached(vae, pixels, tmp_path / "whole", flip=True)
    path = tmp_path / "killed"
    write, encode, encoded = latents_module._write_shard, latents_module._encode, []

    def die_in_the_fourth(path: Path, shard: int, first: int, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if shard == 3:
            write(path, shard, first, [(mean + 9, std) for mean, std in parts[:1]])
            latents_module._marker(path, shard).unlink()
            raise KeyboardInterrupt
        write(path, shard, first, parts)

    def count(vae: object, images: torch.Tensor, *args: object, **options: object) -> object:
        encoded.append(len(images))
        return encode(vae, images, *args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(latents_module, "_write_shard", die_in_the_fourth)
        cached(vae, pixels, path, flip=True)
    assert sorted(p.name for p in (path / "shards").iterdir()) == ["000000.json", "000001.json", "000002.json"]
    monkeypatch.setattr(latents_module, "_encode", count)
    _, resumed = cached(vae, pixels, path, flip=True)
    assert encoded == [4, 4, 4, 4, 3]
    assert torch.equal(resumed.mean, whole.mean)
    assert resumed.std is not None and whole.std is not None and torch.equal(resumed.std, whole.std)
    assert (path / "mean.npy").read_bytes() == (tmp_path / "whole" / "mean.npy").read_bytes()
    assert not (path / "shards").exists()


def test_an_unfinished_latent_cache_of_another_precision_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = smooth_pixels(16)
    vae = pca_autoencoder(pixels)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(latents_module, "_write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        cached(vae, pixels, tmp_path / "latents")
    (tmp_path / "latents" / "shards" / "000000.json").write_text("{}")
    _, cache = cached(replace(vae, precision="bf16"), pixels, tmp_path / "latents")
    assert cache.mean.abs().max() > 0.5  # not the zeros of a shard that is marked but was never written


def test_narrow_posteriors_are_not_stored(tmp_path: Path) -> None:
    pixels = smooth_pixels(16)
    for logvar, stored in ((-13.0, True), (-14.0, False)):  # standard deviations 1.5e-3 and 0.9e-3
        model = PatchAutoencoderKL(latent_channels=6, downsample=4, block_out_channels=(), initial_logvar=logvar)
        model.set_pca(*fit_pca(pixels, 4, 6, seed=0))
        _, cache = cached(wrap(model, CPU, "no"), pixels, tmp_path / str(logvar))
        assert (cache.std is not None) == stored == (tmp_path / str(logvar) / "std.npy").is_file()


def test_latents_that_do_not_fit_the_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("ddgen.data.archive.shutil.disk_usage", lambda _: usage)
    pixels = smooth_pixels(16)
    with pytest.raises(UserError, match=r"--output_dir .*caching latents of 16 images takes 0\.00 GB"):
        cached(pca_autoencoder(pixels), pixels, tmp_path / "latents")
    assert not (tmp_path / "latents").exists()


def test_latents_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = smooth_pixels(16)
    vae = pca_autoencoder(pixels)
    vae.vae.linear_encoder.bias.data[0] = float("inf")
    with pytest.raises(UserError, match="latents of the training images are not finite"):
        cached(vae, pixels, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    fine = (torch.zeros(6), torch.ones(6), 0.0, (6, 4, 4))  # as when the images measured do not show it
    monkeypatch.setattr(latents_module, "_sample", lambda *_: fine)
    with pytest.raises(UserError, match="latents of images 0 to 15 are not finite"):
        cached(vae, pixels, tmp_path / "b")
    assert not list((tmp_path / "b" / "shards").iterdir())


@pytest.mark.parametrize("kind", ["kl", "tiny", "pipeline"])
def test_loads_diffusers_autoencoders(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    blocks = (8, 8)
    if kind == "tiny":
        model = AutoencoderTiny(
            encoder_block_out_channels=blocks, decoder_block_out_channels=blocks,
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
        )  # fmt: skip
    else:
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=blocks, norm_num_groups=4,
        )  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    source = tmp_path if kind == "pipeline" else tmp_path / "vae"
    vae = load_pretrained(str(source), CPU, "no")
    pixels = smooth_pixels(8, size=16)
    vae, cache = cached(vae, pixels, tmp_path / "latents")
    assert cache.mean.shape[2:] == (4, 8, 8)
    assert (cache.std is None) == (kind == "tiny")
    mean, _ = vae.encode(to_images(pixels))
    with torch.inference_mode():
        expected = model.eval().decode(mean).sample.clamp(-1, 1)
    assert torch.allclose(vae.decode(vae.standardise(mean)), expected, atol=1e-4)


def test_loads_the_autoencoder_of_a_pipeline_on_the_hub(tmp_path: Path) -> None:
    """By hub id, out of a hub cache that looks as a download leaves it."""
    repository = tmp_path / "hub" / "models--someone--tiny-pipeline"
    snapshot = repository / "snapshots" / "0123456789012345678901234567890123456789"
    PatchAutoencoderKL(block_out_channels=()).save_pretrained(snapshot / "vae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    missing = repository / ".no_exist" / snapshot.name
    missing.mkdir(parents=True)
    (missing / "config.json").touch()
    script = """
import torch
from ddgen.autoencoder.autoencoder import load_pretrained
print(type(load_pretrained("someone/tiny-pipeline", torch.device("cpu"), "no").vae).__name__)
"""
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "PatchAutoencoderKL", done.stderr


def test_an_autoencoder_of_another_size_is_named() -> None:
    vae = wrap(PatchAutoencoderKL(downsample=4, block_out_channels=()), CPU, "no")
    check_fits(vae, "x", smooth_pixels(2, size=16))
    with pytest.raises(UserError, match="--vae x: makes 16 px of 18 px images"):
        check_fits(vae, "x", smooth_pixels(2, size=18))


def test_save_and_load_give_the_same_autoencoder(tmp_path: Path) -> None:
    pixels = smooth_pixels(16)
    vae = pca_autoencoder(pixels).with_statistics(torch.arange(6.0), torch.arange(1.0, 7.0))
    autoencoders.save(vae, tmp_path / "autoencoder", psnr=30.0)
    loaded = autoencoders.load(tmp_path / "autoencoder", CPU, "no")
    assert loaded.fingerprint() == vae.fingerprint()
    latents = torch.randn(2, 6, 4, 4)
    assert torch.equal(loaded.decode(latents), vae.decode(latents))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vae_downsample": 5}, "--vae_downsample 5: does not divide the image size 16"),
        ({"vae_downsample": 2, "vae_latent_channels": 13}, "--vae_latent_channels 13: more than the 12 values"),
        ({"vae_downsample": 4, "vae_patch": 3}, "--vae_patch 3: --vae_downsample 4 must be"),
        ({"vae_downsample": 4, "vae_channels": (32,)}, "--vae_channels 32: 3 widths are needed"),
        (
            {"vae_downsample": 2, "vae_patch": 2, "vae_channels": (20,)},
            "--vae_channels 20: widths must be multiples of 16",
        ),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        build(AutoencoderConfig(**settings), 16)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_turned_latents_of_flat_patches_decode_to_turned_images() -> None:
    """With one colour a patch the decoder is equivariant, so the transform must be the same in both."""
    vae = PatchAutoencoderKL(latent_channels=3, downsample=4, block_out_channels=())
    components = torch.eye(3).repeat_interleave(16, dim=1) / 4
    vae.set_pca(torch.zeros(48), components, torch.ones(3))
    z = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for turns in range(4):
        transform = Transform(5, 5, turns)
        assert torch.allclose(vae.decode(transform(z)).sample, transform(vae.decode(z).sample, 4), atol=1e-6)
    assert torch.equal(Transform(5, 5, 1)(z)[0, 0, 0], z[0, 0, :, -1])
    assert Transform(2, 3, 1)(z).shape == (2, 3, 3, 2) and Transform(2, 3, 0)(vae.decode(z).sample, 4).shape[2:] == (
        8,
        12,
    )
    flat = torch.full((1, 3, 8, 8), 0.7)
    assert torch.allclose(Transform(3, 5, 2)(flat), torch.full((1, 3, 5, 3), 0.7).transpose(2, 3))


def test_drawn_transforms_go_down_to_a_quarter_and_use_all_turns() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_transform(8, generator) for _ in range(300)]
    assert {t.height for t in drawn} == {t.width for t in drawn} == set(range(2, 9))
    assert {t.turns for t in drawn} == {0, 1, 2, 3}


def test_the_equivariance_term_makes_latents_more_equivariant_at_equal_steps(tmp_path: Path) -> None:
    coarse = torch.randn(256, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=16, mode="bicubic", align_corners=True)
    pixels, errors = (smooth * 60 + 128).clamp(0, 255).to(torch.uint8), {}
    images = to_images(pixels[:64])
    for weight in (0.0, 1.0):
        config = AutoencoderConfig(
            vae_downsample=4, vae_latent_channels=8, vae_patch=4, vae_channels=(16,), vae_train_steps=60,
            vae_batch_size=8, vae_learning_rate=1e-2, vae_equivariance_weight=weight,
        )  # fmt: skip
        vae, _ = train_autoencoder(
            config, pixels, accelerator=Accelerator(cpu=True), precision="no", seed=0, flip=False,
            checkpoints=Checkpoints(tmp_path / str(weight), {}),
        )  # fmt: skip
        mean, _ = vae.encode(images)
        turned = [(Transform(4, 4, k)(mean), Transform(4, 4, k)(images, 4)) for k in (1, 2, 3)]
        with torch.inference_mode():
            errors[weight] = sum((vae.vae.decode(z).sample - x).square().mean().item() for z, x in turned)
    assert errors[1.0] < 0.9 * errors[0.0]  # measured: 0.82


def test_pixel_space_is_an_autoencoder_that_does_nothing(tmp_path: Path) -> None:
    pixels = smooth_pixels(32)
    vae = identity(CPU, "bf16")
    vae, cache = cached(vae, pixels, tmp_path / "latents", flip=True)
    assert cache.mean.shape == (32, 2, 3, 16, 16) and cache.std is None
    assert torch.allclose(cache.mean[:, 0].float().mean((0, 2, 3)), torch.zeros(3), atol=1e-2)
    assert torch.allclose(cache.mean[:, 0].float().std((0, 2, 3)), torch.ones(3), atol=1e-2)
    drawn = cache.batch(torch.tensor([3, 3]), torch.tensor([False, True]), torch.randn(2, 3, 16, 16))
    restored = to_pixels(vae.decode(drawn))
    assert torch.equal(restored[0], pixels[3]) and torch.equal(restored[1], pixels[3].flip(-1))
    autoencoders.save(vae, tmp_path / "autoencoder")
    loaded = autoencoders.load(tmp_path / "autoencoder", CPU, "no")
    assert loaded.fingerprint() == vae.fingerprint() and torch.equal(loaded.decode(drawn), vae.decode(drawn))


def test_settings_of_an_autoencoder_do_not_go_with_pixel_space() -> None:
    check_space(AutoencoderConfig(space="pixel"))
    with pytest.raises(UserError, match="--vae_downsample 4: --space pixel has no autoencoder"):
        check_space(AutoencoderConfig(space="pixel", vae_downsample=4))


def test_missing_pretrained_autoencoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--vae .*nowhere.*hub id"):
        load_pretrained(str(tmp_path / "nowhere" / "x" / "y"), CPU, "no")
