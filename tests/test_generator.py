"""The generator: what an image depends on, number formats, its guide, its folder with and without ddgen."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddgen.autoencoder.autoencoder import identity, wrap
from ddgen.autoencoder.patch_autoencoder import PatchAutoencoderKL
from ddgen.checkpoint import read_json, write_json
from ddgen.commands.own_generator import own_generator
from ddgen.config import FAST, DenoiserConfig, GuidanceConfig, OptimizerConfig, SampleConfig
from ddgen.diffusion import generator as generators
from ddgen.diffusion.autoguidance import load_guide
from ddgen.diffusion.ema import PowerEMA
from ddgen.diffusion.generator import Generator, KeptGuide, check_sampling, load_generator, save_generator
from ddgen.diffusion.guidance import guided_denoiser
from ddgen.diffusion.objective import build_scheduler
from ddgen.diffusion.pipeline import LatentDiffusionPipeline
from ddgen.diffusion.run import TrainingRun
from ddgen.diffusion.samplers import Schedule, solve
from ddgen.diffusion.unet import build_unet, with_contiguous_attention
from ddgen.distill.pool import short_hash
from ddgen.errors import UserError
from ddgen.precision import memory_format
from ddgen.resume import Checkpoints

CPU = torch.device("cpu")
CONFIG = DenoiserConfig(preset="xs", unet_channels=(32, 32), unet_layers_per_block=1)
NAMES = ("ant", "bee", "cat")


def scheduler_of(prediction_type: str, **settings: float):
    return build_scheduler(DenoiserConfig(prediction_type=prediction_type, **settings))  # type: ignore[arg-type]


def random_unet(seed: int, *, channels: int = 4, size: int = 4, num_classes: int = 3):
    torch.manual_seed(seed)
    unet = build_unet(CONFIG, latent_channels=channels, latent_size=size, num_classes=num_classes)
    for parameter in unet.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    torch.nn.init.normal_(unet.class_embedding.weight)
    return unet.eval().requires_grad_(False)


def kept(seed: int = 3) -> KeptGuide:
    return KeptGuide(random_unet(seed).half(), 940, 4700, 0.1)


@pytest.fixture
def generator() -> Generator:
    """A small random generator with outputs that depend on class and noise."""
    unet = with_contiguous_attention(random_unet(0).to(memory_format=memory_format(CPU, "no")))
    vae = PatchAutoencoderKL(latent_channels=4, downsample=4, block_out_channels=())
    autoencoder = wrap(vae, CPU, "no").with_statistics(torch.arange(4.0) / 10, torch.arange(1.0, 5.0))
    sampling = GuidanceConfig(num_inference_steps=6, guidance_scale=2.0, sampler="ddim")
    return Generator(unet, autoencoder, scheduler_of("v_prediction"), NAMES, 16, sampling, "no")


# --- what an image depends on


@pytest.mark.parametrize("settings", [{}, {"eta": 1.0}, {"sampler": "unipc"}])
def test_an_image_depends_on_seed_class_and_index_only(generator: Generator, settings: dict) -> None:
    generator = generator.with_sampling(**settings)
    labels, indices = torch.arange(48) % 3, torch.arange(48) // 3
    together = generator.sample(labels, indices, seed=0)
    for size in (1, 7, 16, 31):  # to the bit, also where linear layers have few rows
        n = min(48, 3 * size)
        pairs = zip(labels[:n].split(size), indices[:n].split(size), strict=True)
        assert torch.equal(torch.cat([generator.sample(a, b, seed=0) for a, b in pairs]), together[:n])
    other = generator.sample(labels, indices, seed=1)
    assert (together.int() - other.int()).abs().float().mean() > 5
    assert not torch.equal(together[0], together[1]) and not torch.equal(together[0], together[3])
    assert generator.image_size == together.shape[-1] == 16


def test_contiguous_attention_computes_the_same_in_one_product(generator: Generator) -> None:
    plain, contiguous = random_unet(0), generator.unet
    x, t, y = (
        torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0)),
        torch.full((4,), 500.0),
        torch.arange(4) % 3,
    )
    layouts: list[bool] = []
    query = next(module for module in contiguous.modules() if isinstance(module, Attention)).to_q
    query.register_forward_hook(lambda _, given, output: layouts.append(given[0].is_contiguous()))
    assert torch.allclose(plain(x, t, y).sample, contiguous(x, t, y).sample, atol=1e-5) and layouts == [True]


def test_fresh_noise_changes_the_image(generator: Generator) -> None:
    labels = torch.arange(3)
    plain, noisy = (generator.with_sampling(eta=eta).sample(labels, labels, 0) for eta in (0.0, 1.0))
    assert (plain.int() - noisy.int()).abs().float().mean() > 5


def test_the_two_stages_are_timed(generator: Generator) -> None:
    stages: list[str] = []

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        stages.append(f"{stage} begins")
        yield
        stages.append(f"{stage} ends")

    generator.sample(torch.tensor([0]), torch.tensor([0]), 0, timed=timed)
    assert stages == ["sampling begins", "sampling ends", "decoding begins", "decoding ends"]


def test_a_compiled_denoiser_sees_batches_of_one_size(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(type(generator.unet), "compile", lambda network, **how: seen.append(0))
    compiled = generator.compiled(20)
    generator.unet.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    labels = torch.arange(3)
    assert torch.equal(compiled.sample(labels, labels, 0), generator.sample(labels, labels, 0))
    assert seen[0] == 0 and set(seen[1:7]) == {20, 40} and set(seen[7:]) == {16, 32}
    assert compiled.settings() == generator.settings() | {"compiled": True}
    assert SampleConfig().compiles_on("cuda") and not SampleConfig().compiles_on("cpu")


def test_settings_are_json_and_tell_every_difference(generator: Generator) -> None:
    settings = [generator.with_sampling(**change).settings() for change in (
        {}, {"num_inference_steps": 7}, {"guidance_scale": 1.0}, {"guidance_interval": (0.1, 0.9)}, {"sampler": "heun"},
        {"eta": 0.5},
    )]  # fmt: skip
    settings.append(replace(generator, unet=random_unet(1)).settings())
    settings.append(replace(generator, guide=None, precision="bf16").settings())
    assert len({json.dumps(one, sort_keys=True) for one in settings}) == len(settings)
    rows = generator.with_sampling(sampler="heun").describe()
    assert rows["sampler"] == "heun, 6 steps of together 11 evaluations"
    assert rows["guidance"] == "2 in 0.3 to 0.85, away from the model without a class"
    assert generator.with_sampling(guidance_scale=1.0).describe()["guidance"] == "none"
    assert generator.with_sampling(eta=0.5).describe()["sampler"] == "ddim with eta 0.5, 6 steps"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 1001}, "--num_inference_steps 1001: give 1 to 1000"),
        ({"sampler": "ipndm", "eta": 0.5}, "--eta 0.5: only ddim takes fresh noise, not ipndm"),
        ({"guidance_interval": (0.9, 0.1)}, "--guidance_interval 0.9 0.1: give the smaller number first"),
    ],
)
def test_settings_no_sampler_can_honour_are_named(settings: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        check_sampling(GuidanceConfig(**settings))
    assert message in str(error.value)
    check_sampling(GuidanceConfig(sampler="unipc", num_inference_steps=61))


# --- number formats


def test_weights_in_bf16_give_nearly_the_same_images(generator: Generator, tmp_path: Path) -> None:
    save_generator(replace(generator, ema_std=0.1), tmp_path / "generator", "card")
    exact, coarse = (load_generator(tmp_path / "generator", CPU, precision) for precision in ("no", "bf16"))
    assert {p.dtype for p in coarse.unet.parameters()} == {torch.bfloat16} == {coarse.autoencoder.vae.dtype}
    assert coarse.fingerprint() == exact.fingerprint() == generator.fingerprint()
    assert coarse.autoencoder.fingerprint() == exact.autoencoder.fingerprint() and coarse.ema_std == 0.1
    labels = torch.arange(12) % 3
    first, second = (one.sample(labels, torch.arange(12), 0).int() for one in (exact, coarse))
    gap = (first - second).abs().float()
    other = exact.sample(labels, torch.arange(12), 1).int()
    assert 0 < gap.mean() < 0.05 * (first - other).abs().float().mean()
    autocast = replace(exact, precision="bf16").sample(labels, torch.arange(12), 0).int()  # of float32 weights
    assert gap.mean() < 1.5 * (first - autocast).abs().float().mean()


# --- the folder


def test_saved_generator_is_the_same_generator(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path / "generator", "card")
    loaded = load_generator(tmp_path / "generator", CPU, "no")
    assert loaded.fingerprint() == generator.fingerprint()
    assert loaded.class_names == generator.class_names and loaded.sampling == generator.sampling
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(loaded.sample(labels, labels, 5), generator.sample(labels, labels, 5))


def test_a_saved_flow_samples_with_diffusers_scheduler_alone(generator: Generator, tmp_path: Path) -> None:
    """UNet and scheduler of the folder, used as diffusers' own examples do."""
    generator = replace(generator, scheduler=scheduler_of("flow_prediction", flow_shift=2.0))
    save_generator(generator, tmp_path / "generator", "card")
    loaded = load_generator(tmp_path / "generator", CPU, "no")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "generator" / "scheduler")
    scheduler.set_timesteps(sigmas=[(5 - i) / 5 for i in range(5)])
    noise, labels = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(loaded.unet(x, t, labels).sample, t, x).prev_sample
    schedule = Schedule.of(loaded.scheduler)
    denoise = guided_denoiser(loaded.unet, labels, null_label=3, scale=1.0, interval=(0, 1), schedule=schedule)
    assert torch.allclose(solve(denoise, noise, schedule, 5), x, atol=1e-4)


def images_without_ddgen(folders: list[Path], tmp_path: Path) -> list[Tensor]:
    """Images of classes 0, 1, 2 with seeds 0, 1, 2, in [0, 1], by a process that does not have ddgen."""
    script = f"""
import sys, torch
from diffusers import DiffusionPipeline
found = []
for folder in {[str(folder) for folder in folders]!r}:
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    assert "ddgen" not in sys.modules
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images = pipe(class_labels=["ant", 1, "cat"], generator=generators).images
    assert images[0].size == (16, 16)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    found.append(pipe(class_labels=[0, 1, 2], generator=generators, output_type="pt").images)
    for more in ({{"sampler": "heun"}}, {{"eta": 1.0}}, {{"sampler": "unipc", "num_inference_steps": 7}}):
        assert pipe(class_labels=[0], generator=torch.Generator(), **more).images[0].size == (16, 16)
torch.save(found, {str(tmp_path / "images.pt")!r})
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images: list[Tensor] = torch.load(tmp_path / "images.pt")
    return images


def test_generators_load_and_sample_without_ddgen(generator: Generator, tmp_path: Path) -> None:
    pixels = identity(CPU, "no").with_statistics(torch.zeros(3), torch.ones(3))
    cases = [
        generator,
        replace(generator, scheduler=scheduler_of("flow_prediction")),
        replace(generator, unet=random_unet(0, channels=3, size=16), autoencoder=pixels),
    ]
    guides = [kept(), None, None]  # the pipeline samples without it
    folders = [tmp_path / f"generator-{number}" for number in range(len(cases))]
    for case, folder, guide in zip(cases, folders, guides, strict=True):
        save_generator(case, folder, "card", guide=guide)
    for case, images in zip(cases, images_without_ddgen(folders, tmp_path), strict=True):
        shape = (case.unet.config.in_channels, case.unet.config.sample_size, case.unet.config.sample_size)
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3)])
        schedule, interval = Schedule.of(case.scheduler), case.sampling.guidance_interval
        labels = torch.tensor([0, 1, 2])
        denoise = guided_denoiser(case.unet, labels, null_label=3, scale=2.0, interval=interval, schedule=schedule)
        expected = (case.autoencoder.decode(solve(denoise, noise, schedule, 6)) + 1) / 2
        assert torch.allclose(images, expected, atol=1e-4)


def test_unfinished_generator_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_index\.json is missing.*train_ldm"):
        load_generator(tmp_path, CPU, "no")


def test_a_folder_written_before_eta_loads(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path / "generator", "card")
    index = read_json(tmp_path / "generator" / "model_index.json")
    del index["sampling"]["eta"], index["ema_std"]
    write_json(tmp_path / "generator" / "model_index.json", index)
    loaded = load_generator(tmp_path / "generator", CPU, "no")
    assert loaded.sampling == generator.sampling and loaded.ema_std is None
    index["sampling"]["num_inference_steps"] = 2
    vae, scheduler = generator.autoencoder.vae, generator.scheduler
    names = ("latents_mean", "latents_std", "class_names", "image_size", "sampling")
    old = LatentDiffusionPipeline(generator.unet, vae, scheduler, **{name: index[name] for name in names})
    assert old(["bee", 2], output_type="pt").images.shape == (2, 3, 16, 16)


def test_weights_are_hashed_once(
    generator: Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_generator(generator, tmp_path / "generator", "card", guide=kept())
    hashed: list[object] = []
    add_weights = generators.add_weights

    def counting(digest: object, network: torch.nn.Module) -> None:
        hashed.append(network)
        add_weights(digest, network)

    monkeypatch.setattr(generators, "add_weights", counting)
    for precision in ("no", "bf16"):
        hashed.clear()
        loaded = own_generator(SampleConfig(guide="auto"), tmp_path / "generator", CPU, precision)
        for _ in range(2):
            loaded.settings(), loaded.describe(), loaded.with_sampling(guidance_scale=3.0).settings()
        assert len(hashed) == 1
        assert loaded.fingerprint() == generator.fingerprint()
        assert loaded.autoencoder.stored_fingerprint == generator.autoencoder.fingerprint()


# --- the guide


def checkpoint_of(generator: Generator, folder: Path, **changes: object) -> Path:
    """A checkpoint as training leaves it, of two averages: ema_0.05 of weights 1, ema_0.1 of weights 2."""
    unet = random_unet(1)
    ema = PowerEMA(list(unet.parameters()), (0.05, 0.1))
    ema.averages[0.1] = [p.detach().clone() for p in random_unet(2).parameters()]
    identity = {
        **dataclasses.asdict(CONFIG),
        **dataclasses.asdict(OptimizerConfig()),
        **{"class_names": NAMES, "latents": f"{generator.autoencoder.fingerprint()}-images-flip"},
        **changes,
    }
    optimizer = torch.optim.AdamW(unet.parameters())
    run = TrainingRun(unet, optimizer, ema, folder, Checkpoints(folder / "checkpoints", identity), step=7)
    return run.checkpoints.save(run.snapshot())


def test_a_checkpoint_guides_with_the_generators_average(generator: Generator, tmp_path: Path) -> None:
    path = checkpoint_of(generator, tmp_path / "run")
    first, known = load_guide(path, generator), load_guide(path, replace(generator, ema_std=0.1))
    for guide, seed in ((first, 1), (known, 2)):
        expected = random_unet(seed).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in guide.unet.state_dict().items())
    guided = replace(generator, guide=first)
    assert guided.settings() == generator.settings() | {"guide": first.fingerprint}
    assert first.fingerprint != known.fingerprint
    assert guided.describe()["guidance"].startswith("2 in 0.3 to 0.85, away from step-00000007 (fingerprint ")


def test_autoguidance_goes_away_from_the_guide(generator: Generator, tmp_path: Path) -> None:
    """out = guide + w (main - guide), both with the class; a model guided by itself is the model without guidance."""
    labels, indices = torch.arange(16) % 3, torch.arange(16)
    save_generator(generator, tmp_path / "run" / "generator", "card")
    alone = load_guide(tmp_path / "run", generator)
    by_itself = replace(generator, guide=alone).sample(labels, indices, 0).int()
    unguided = generator.with_sampling(guidance_scale=1.0).sample(labels, indices, 0).int()
    assert (by_itself - unguided).abs().max() <= 1
    other = replace(generator, guide=load_guide(checkpoint_of(generator, tmp_path / "other"), generator))
    guided = other.sample(labels, indices, 0).int()
    assert (guided - unguided).abs().float().mean() > 1
    outside = other.with_sampling(guidance_interval=(0.0, 0.0)).sample(labels, indices, 0).int()
    assert torch.equal(outside, unguided)


def test_the_guide_stays_out_of_the_exported_folder(generator: Generator, tmp_path: Path) -> None:
    guide = load_guide(checkpoint_of(generator, tmp_path / "run"), generator)
    for name, one in (("plain", generator), ("guided", replace(generator, guide=guide))):
        save_generator(one, tmp_path / name, "card")
    plain, guided = (
        sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in ("plain", "guided")
    )
    assert plain == guided
    assert read_json(tmp_path / "plain" / "model_index.json") == read_json(tmp_path / "guided" / "model_index.json")


def test_auto_none_and_a_path_are_three_different_guides(generator: Generator, tmp_path: Path) -> None:
    folder, guide = tmp_path / "run" / "generator", kept()
    save_generator(generator, folder, "card", guide=guide)
    path = checkpoint_of(generator, tmp_path / "run")
    own, without, other = (own_generator(SampleConfig(guide=g), folder, CPU, "no") for g in ("auto", "none", str(path)))
    assert own.guide is not None and without.guide is None and other.guide is not None
    expected = guide.unet.state_dict()
    assert all(torch.equal(value, expected[name].float()) for name, value in own.guide.unet.state_dict().items())
    assert len({short_hash(one.settings()) for one in (own, without, other)}) == 3  # pools of their own
    assert without.settings() == load_generator(folder, CPU, "no").settings()  # as before there were guides
    told = [one.describe()["guidance"].split(" (fingerprint ")[0] for one in (own, without, other)]
    assert told == [
        "2 in 0.3 to 0.85, away from its own weights after 940 of 4,700 steps",
        "2 in 0.3 to 0.85, away from the model without a class",
        "2 in 0.3 to 0.85, away from step-00000007",
    ]
    labels = torch.arange(8) % 3
    images = [one.sample(labels, torch.arange(8), 0).int() for one in (own, without, other)]
    assert all((a - b).abs().float().mean() > 1 for a, b in zip(images, [*images[1:], images[0]], strict=True))
    by_hand = replace(without, guide=replace(own.guide, unet=random_unet(3).half().float()))
    assert (by_hand.sample(labels, torch.arange(8), 0).int() - images[0]).abs().max() <= 1
    coarse = own_generator(SampleConfig(guide="auto"), folder, CPU, "bf16").guide
    assert coarse is not None and coarse.unet.dtype == torch.bfloat16 and coarse.fingerprint == own.guide.fingerprint


def test_a_generator_without_a_guide_samples_as_it_did(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path / "generator", "card")
    auto, without = (own_generator(SampleConfig(guide=g), tmp_path / "generator", CPU, "no") for g in ("auto", "none"))
    assert auto.settings() == without.settings() and auto.guide is None
    labels = torch.arange(3)
    assert torch.equal(auto.sample(labels, labels, 0), generator.sample(labels, labels, 0))


def test_without_guidance_no_guide_is_loaded(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path / "generator", "card", guide=kept())
    found = own_generator(SampleConfig(guide="auto", guidance_scale=1.0), tmp_path / "generator", CPU, "no")
    assert found.guide is None and found.describe()["guidance"] == "none"


def test_a_damaged_guide_is_named(generator: Generator, tmp_path: Path) -> None:
    folder = tmp_path / "generator"
    save_generator(generator, folder, "card", guide=kept())
    weights = folder / "guide" / "diffusion_pytorch_model.safetensors"
    some = load_file(weights)
    del some["conv_out.bias"]
    foreign = build_unet(CONFIG, latent_channels=4, latent_size=4, num_classes=4)
    for damage in (
        lambda: save_file(some, weights, {"format": "pt"}),
        lambda: weights.write_bytes(b"half"),
        lambda: foreign.save_pretrained(folder / "guide"),  # whole, but for one class more
        (folder / "guide" / "guide.json").unlink,
    ):
        damage()
        with pytest.raises(UserError) as error:
            own_generator(SampleConfig(guide="auto"), folder, CPU, "no")
        assert str(error.value).startswith(f"--guide auto: {folder / 'guide'}: damaged (")
        assert "\n" not in str(error.value)
    assert own_generator(SampleConfig(guide="none"), folder, CPU, "no").guide is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "epsilon"}, "predicts epsilon, the generator's v_prediction"),
        ({"class_names": ("bee", "ant", "cat")}, "class 0 is bee, the generator's ant"),
        ({"latents": "0123456789abcdef-images-flip"}, "autoencoder 0123456789ab, the generator's "),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    generator: Generator, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(UserError) as error:
        load_guide(checkpoint_of(generator, tmp_path / "run", **changes), generator)
    assert str(error.value).startswith(f"--guide {tmp_path}") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_generator_of_something_else_is_refused(generator: Generator, tmp_path: Path) -> None:
    flow = replace(generator, scheduler=scheduler_of("flow_prediction"))
    shifted = replace(generator, scheduler=scheduler_of("flow_prediction", flow_shift=3.0))
    four = replace(generator, unet=random_unet(0, num_classes=4), class_names=(*NAMES, "dog"))
    larger = replace(generator, unet=random_unet(0, size=8), image_size=32)
    scaled = replace(generator, autoencoder=generator.autoencoder.with_statistics(torch.zeros(4), torch.ones(4)))
    for number, (own, other, message) in enumerate([
        (flow, shifted, "has another noise schedule, sigma 0.751 halfway, the generator's sigma 0.501 halfway"),
        (generator, four, "number of classes 4, the generator's 3"),
        (generator, larger, "has latents of channels, side (4, 8), the generator's (4, 4)"),
        (generator, scaled, "latents have mean and deviation"),
    ]):  # fmt: skip
        save_generator(other, tmp_path / str(number), "card")
        with pytest.raises(UserError) as error:
            load_guide(tmp_path / str(number), own)
        assert message in str(error.value)


def test_what_is_no_guide_is_named(generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a generator, a finished run nor a checkpoint"):
        load_guide(tmp_path, generator)
    write_json(tmp_path / "state.json", {"step": 1, "identity": {"images": "abc"}, "facts": {}})
    with pytest.raises(UserError, match="not a checkpoint of a diffusion model"):
        load_guide(tmp_path, generator)
    damaged = checkpoint_of(generator, tmp_path / "run")
    (damaged / "ema_0.05.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"damaged \("):
        load_guide(damaged, generator)


def test_settings_of_sample_reach_the_generator(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path / "run" / "generator", "card")
    guide = checkpoint_of(generator, tmp_path / "run")
    config = SampleConfig(sampler="ddim", eta=0.5, num_inference_steps=3, guide=str(guide))
    found = own_generator(config, tmp_path / "run" / "generator", CPU, "bf16")
    assert found.sampling == replace(generator.sampling, eta=0.5, num_inference_steps=3)
    assert found.guide is not None and found.guide.unet.dtype == torch.bfloat16 and found.compiled_batch_size is None
    assert found.sample(torch.tensor([1]), torch.tensor([0]), 0).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="does nothing at --guidance_scale 1"):
        own_generator(replace(config, guidance_scale=1.0), tmp_path / "run" / "generator", CPU, "no")
    with pytest.raises(UserError, match=r"--eta 0\.5: only ddim"):
        own_generator(replace(config, sampler="heun"), tmp_path / "run" / "generator", CPU, "no")


def test_fast_is_a_sampler_and_steps_over_which_flags_stand(generator: Generator, tmp_path: Path) -> None:
    save_generator(generator, tmp_path / "generator", "card")

    def sampling(**settings: object) -> tuple[str, int]:
        config = SampleConfig(**settings)  # type: ignore[arg-type]
        found = own_generator(config, tmp_path / "generator", CPU, "no").sampling
        assert found.guidance_scale == generator.sampling.guidance_scale
        return found.sampler, found.num_inference_steps

    assert sampling() == (generator.sampling.sampler, generator.sampling.num_inference_steps)
    assert sampling(sampler="ipndm") == ("ipndm", 15) and sampling(sampler="ddim") == ("ddim", 6)
    assert sampling(sampler="unipc", num_inference_steps=9) == ("unipc", 9)
    assert sampling(fast=True) == (FAST["sampler"], FAST["num_inference_steps"])
    assert sampling(fast=True, num_inference_steps=12) == (FAST["sampler"], 12)
    assert sampling(fast=True, sampler="heun") == ("heun", FAST["num_inference_steps"])
