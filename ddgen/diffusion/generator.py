"""The generator: denoiser, autoencoder and schedule as one folder; class labels in, pixels out."""

from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor, nn

from ddgen.autoencoder.autoencoder import OWN, Autoencoder, load_pretrained, to_pixels
from ddgen.checkpoint import atomic_dir, read_json, write_json
from ddgen.config import GuidanceConfig
from ddgen.diffusion import guidance, pipeline, samplers
from ddgen.diffusion.guidance import guided_denoiser
from ddgen.diffusion.samplers import Schedule, num_evaluations, solve
from ddgen.diffusion.steering import Steering, steered_denoiser
from ddgen.diffusion.unet import with_contiguous_attention
from ddgen.errors import UserError
from ddgen.precision import autocast, cast, memory_format
from ddgen.seeds import torch_generator
from ddgen.timing import Timed, untimed

TRAVELLING_FILES = [Path(str(module.__file__)) for module in (pipeline, samplers, guidance)]
GUIDE_DIR = "guide"
SMALLEST_BATCH_ON_CPU = 16
"""Batches are filled up to this. With fewer rows a CPU adds up the products of a linear layer in another order, which
moves one in 50,000 pixel values by 1. From 16 on images are the same to the bit in batches of any size (measured with
presets xs, s and b in float32, where weights are channels-last: others convolve in an order that the size changes)."""
SCHEDULERS = {kind.__name__: kind for kind in (DDIMScheduler, FlowMatchEulerDiscreteScheduler)}


@dataclass(frozen=True)
class Guide:
    """A worse denoiser of the same latents, schedule and classes, for autoguidance.

    Attributes:
        unet: On the generator's device, in its number format.
        fingerprint: Hash of the weights as they are stored.
        name: What it is, for a person.
    """

    unet: Any
    fingerprint: str
    name: str


@dataclass(frozen=True)
class KeptGuide:
    """The guide that travels with a generator: itself, less trained.

    Attributes:
        unet: Its weights, float16.
        step: Optimizer steps after which they were kept.
        max_train_steps: Optimizer steps of the generator.
        ema_std: Relative width of the average that they are.
    """

    unet: UNet2DModel
    step: int
    max_train_steps: int
    ema_std: float


@dataclass(frozen=True)
class Generator:
    """Samples images of a class.

    Attributes:
        unet: Denoiser of standardised latents, or anything that is called like one; last class is the null class.
        autoencoder: Decodes the latents.
        scheduler: Holds the training schedule.
        class_names: Name of every class, in label order.
        image_size: Side of the images in pixels.
        sampling: How to sample.
        precision: In which format the denoiser computes, resolved: autocast, or that of its weights.
        ema_std: Relative width of the average that the weights are; None if not known.
        guide: What autoguidance goes away from; None for classifier-free guidance.
        stored_fingerprint: Fingerprint of the weights as they were stored; None if they may still change.
        compiled_batch_size: Size to which batches are filled up, for which the denoiser is compiled; None if it is not.
        steering: Towards what the denoiser's estimates are moved; None leaves them.
    """

    unet: Any
    autoencoder: Autoencoder
    scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler
    class_names: tuple[str, ...]
    image_size: int
    sampling: GuidanceConfig
    precision: str
    ema_std: float | None = None
    guide: Guide | None = None
    stored_fingerprint: str | None = None
    compiled_batch_size: int | None = None
    steering: Steering | None = None

    def with_sampling(self, **overrides: Any) -> Generator:
        """Returns this generator with some sampling settings replaced; None keeps one."""
        return replace(self, sampling=replace(self.sampling, **{k: v for k, v in overrides.items() if v is not None}))

    def cast(self) -> Generator:
        """Returns this generator for sampling only: its weights themselves in the format that autocast casts to.

        What they are is computed here, once: a hash of 100 million weights takes a second.
        """
        generator = replace(self, autoencoder=self.autoencoder.cast())
        fingerprint = generator.fingerprint()
        return replace(generator, unet=cast(self.unet, self.precision), stored_fingerprint=fingerprint)

    def compiled(self, batch_size: int) -> Generator:
        """Returns this generator with its denoisers compiled, which happens at the first batch, for one batch size."""
        for network in [self.unet] if self.guide is None else [self.unet, self.guide.unet]:
            network.compile(dynamic=False)  # in place; one graph with guidance and one without
        return replace(self, compiled_batch_size=batch_size)

    @torch.inference_mode()
    def sample(self, labels: Tensor, indices: Tensor, seed: int, *, timed: Timed = untimed) -> Tensor:
        """Generates one image for every (class, index).

        An image depends on the seed, its class and its index only, not on what is sampled with it.

        Args:
            labels: int64 (b,).
            indices: int64 (b,), which image of the class.
            seed: Seed of the pool.
            timed: Measures the stages "sampling" and "decoding".

        Returns:
            Pixels, uint8 (b, 3, h, w), on the CPU.
        """
        smallest = SMALLEST_BATCH_ON_CPU if self.unet.device.type == "cpu" else 1
        missing = max(0, (self.compiled_batch_size or smallest) - len(labels))
        with timed("sampling"):
            latents = self._latents(_filled_up(labels, missing), _filled_up(indices, missing), seed)
        with timed("decoding"):
            return to_pixels(self.autoencoder.decode(latents))[: len(labels)].cpu()

    def _latents(self, labels: Tensor, indices: Tensor, seed: int) -> Tensor:
        """Samples standardised latents, float32 (b, d, h, w), each with a random generator of its own."""
        config, device, settings = self.unet.config, self.unet.device, self.sampling
        shape = (config.in_channels, config.sample_size, config.sample_size)
        keys = zip(labels.tolist(), indices.tolist(), strict=True)
        sources = [torch_generator(seed, "sample", label, index) for label, index in keys]

        def draw() -> Tensor:
            return torch.stack([torch.randn(shape, generator=source) for source in sources]).to(device)

        schedule = Schedule.of(self.scheduler)
        denoise = guided_denoiser(
            self.unet,
            labels.to(device),
            null_label=config.num_class_embeds - 1,
            scale=settings.guidance_scale,
            interval=settings.guidance_interval,
            schedule=schedule,
            guide=None if self.guide is None else self.guide.unet,
        )
        if self.steering is not None:
            denoise = steered_denoiser(denoise, labels.to(device), indices.to(device), schedule, self.steering)
        steps, sampler = settings.steps, settings.sampler
        with autocast(device, self.precision if self.unet.dtype == torch.float32 else "no"):
            return solve(denoise, draw(), schedule, steps, sampler, eta=settings.eta, draw=draw)

    def fingerprint(self) -> str:
        """Returns a hash of all weights, as they are stored, and of the schedule."""
        if self.stored_fingerprint is not None:
            return self.stored_fingerprint
        digest = hashlib.sha256(self.autoencoder.fingerprint().encode())
        add_weights(digest, self.unet)
        digest.update(self.scheduler.to_json_string().encode())
        return digest.hexdigest()[:32]

    def settings(self) -> dict[str, Any]:
        """Returns, as JSON, everything an image depends on beside (seed, class, index)."""
        steering = {} if self.steering is None else {"steering": self.steering.settings()}
        return {
            "generator": self.fingerprint(),
            "guide": None if self.guide is None else self.guide.fingerprint,
            **self.sampling.to_dict(),
            "precision": self.precision,
            "device": self.unet.device.type,
            "compiled": self.compiled_batch_size is not None,
            **steering,
        }

    def describe(self) -> dict[str, str]:
        """Returns what a distilled dataset's card says of where its images are from."""
        sampling, size = self.sampling, sum(p.numel() for p in self.unet.parameters())
        steps = f"{sampling.steps} step{'s' if sampling.steps > 1 else ''}"
        evaluations = num_evaluations(sampling.sampler, sampling.steps)
        if evaluations != sampling.steps:
            steps += f" of together {evaluations} evaluations"
        guidance = "none"
        if sampling.guidance_scale != 1:
            away = "the model without a class" if self.guide is None else self.guide.name
            low, high = sampling.guidance_interval
            guidance = f"{sampling.guidance_scale:g} in {low:g} to {high:g}, away from {away}"
        steering = {} if self.steering is None else {"steering": self.steering.describe()}
        return {
            "generator": f"UNet of {size / 1e6:.1f} million parameters, fingerprint {self.fingerprint()[:12]}",
            "sampler": f"{sampling.sampler}{f' with eta {sampling.eta:g}' if sampling.eta else ''}, {steps}",
            "guidance": guidance,
            **steering,
            "precision": self.precision,
        }


def _filled_up(values: Tensor, missing: int) -> Tensor:
    """Repeats the last of `values` (b,) as often as is missing."""
    return torch.cat([values, values[-1:].expand(missing)])


def add_weights(digest: Any, network: nn.Module) -> None:
    """Adds a network's weights, as float32, to a hash."""
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())


def check_sampling(sampling: GuidanceConfig, num_train_timesteps: int = 1000) -> None:
    """Refuses settings that no sampler can honour.

    Raises:
        UserError: Naming the setting.
    """
    steps = sampling.steps
    if not 1 <= steps <= num_train_timesteps:
        raise UserError(f"--num_inference_steps {steps}: give 1 to {num_train_timesteps}")
    if sampling.eta and sampling.sampler != "ddim":
        raise UserError(
            f"--eta {sampling.eta:g}: only ddim takes fresh noise, not {sampling.sampler}; use --sampler ddim, or"
            " --eta 0"
        )
    low, high = sampling.guidance_interval
    if low > high:
        raise UserError(f"--guidance_interval {low} {high}: give the smaller number first")


def save_generator(
    generator: Generator,
    path: Path,
    card: str,
    *,
    guide: KeptGuide | None = None,
    pictures: Sequence[Path] = (),
    replace_existing: bool = False,
) -> None:
    """Writes a diffusers pipeline folder that loads without ddgen; atomic.

    The pipeline does not know of the guide, which only `sample` uses.

    Args:
        generator: What to save.
        path: Folder to create.
        card: Text of its README.md.
        guide: What travels with it in guide/; not the guide that it samples with.
        pictures: Files to put beside it.
        replace_existing: Take the place of an older one.
    """
    vae: nn.Module = generator.autoencoder.vae
    own = Path(inspect.getfile(type(vae))) if type(vae).__name__ in OWN else None
    index = {
        "_class_name": ["pipeline", "LatentDiffusionPipeline"],
        "_diffusers_version": __import__("diffusers").__version__,
        "unet": ["diffusers", "UNet2DModel"],
        "vae": [own.stem if own else "diffusers", type(vae).__name__],
        "scheduler": ["diffusers", type(generator.scheduler).__name__],
        "latents_mean": generator.autoencoder.latents_mean.flatten().tolist(),
        "latents_std": generator.autoencoder.latents_std.flatten().tolist(),
        "class_names": list(generator.class_names),
        "image_size": generator.image_size,
        "sampling": generator.sampling.to_dict(),
        "ema_std": generator.ema_std,
    }
    with atomic_dir(path, replace=replace_existing) as temporary:
        generator.unet.to(memory_format=torch.contiguous_format).save_pretrained(temporary / "unet")
        generator.autoencoder.vae.save_pretrained(temporary / "vae")
        generator.scheduler.save_pretrained(temporary / "scheduler")
        if guide is not None:
            guide.unet.save_pretrained(temporary / GUIDE_DIR)
            facts = {"step": guide.step, "max_train_steps": guide.max_train_steps, "ema_std": guide.ema_std}
            write_json(temporary / GUIDE_DIR / "guide.json", facts)
        for file in TRAVELLING_FILES:
            shutil.copy(file, temporary / file.name)
        if own:
            shutil.copy(own, temporary / "vae")
        for picture in pictures:
            shutil.copy(picture, temporary / picture.name)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        write_json(temporary / "model_index.json", index)


def load_generator(path: Path, device: torch.device, precision: str) -> Generator:
    """Loads what `save_generator` wrote, without its guide, with its weights in the format it samples in.

    Raises:
        UserError: The folder holds no finished generator.
    """
    index_path = path / "model_index.json"
    if not index_path.is_file():
        raise UserError(
            f"{path}: no finished generator here (model_index.json is missing); train one with train_ldm.py"
        )
    index = read_json(index_path)
    statistics = (torch.tensor(index["latents_mean"]), torch.tensor(index["latents_std"]))
    sampling = index["sampling"]
    unet = UNet2DModel.from_pretrained(path / "unet", use_safetensors=True)
    if device.type == "cpu":
        unet = with_contiguous_attention(unet)
    generator = Generator(
        unet=unet.to(device, memory_format=memory_format(device, precision)).eval().requires_grad_(False),
        autoencoder=load_pretrained(str(path / "vae"), device, precision).with_statistics(*statistics),
        scheduler=SCHEDULERS[index["scheduler"][1]].from_pretrained(path / "scheduler"),
        class_names=tuple(index["class_names"]),
        image_size=index["image_size"],
        sampling=GuidanceConfig(**sampling | {"guidance_interval": tuple(sampling["guidance_interval"])}),
        precision=precision,
        ema_std=index.get("ema_std"),
    )
    return generator.cast()
