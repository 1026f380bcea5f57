"""Every setting, once.

A command's settings are one dataclass made of groups; every field is one flag of the same name
(``train_batch_size`` is ``--train_batch_size``) and one key of a YAML file. Defaults live here and nowhere
else; ``None`` means "derived", and the text below the field says from what. This module imports no torch, so
``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import math
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from ddgen.checkpoint import write_bytes
from ddgen.errors import UserError

DatasetName = Literal[
    "digits", "cifar10", "cifar100", "tinyimagenet", "imagenette", "imagewoof", "imagenet1k", "imagefolder", "parquet"
]
Precision = Literal["no", "bf16", "fp16"]
STEPS: dict[str, int] = {"unipc": 8, "dpmsolver++": 15, "ipndm": 15, "heun": 15, "ddim": 50}
"""Steps that a sampler takes where --num_inference_steps is not given; docs/sampling.md has the measurements."""
FAST: dict[str, Any] = {"sampler": "unipc", "num_inference_steps": 6}
"""What --fast stands for."""
Sampler = Literal["ddim", "dpmsolver++", "unipc", "heun", "ipndm"]
Selection = Literal[
    "realism",
    "random",
    "confident-correct",
    "least-confident-correct",
    "middle",
    "difficulty-match",
    "herding",
    "k-center",
    "diverse-realism",
]


@dataclass(frozen=True)
class DataConfig:
    """Real images."""

    dataset: DatasetName | None = None
    """Which dataset; `imagefolder` and `parquet` read your own from --data_dir."""
    data_dir: str | None = None
    """Folder, zip or tar that holds the data. Default: the cache, then a download."""
    image_size: int | None = None
    """Side of the square images in pixels. Default: the dataset's own; 256 for ImageNet, 64 for your own."""
    classes: str | None = None
    """Take only these classes: names separated by commas, in this order."""
    num_classes: int | None = None
    """Take only the first K classes."""
    random_flip: bool | None = None
    """Whether a mirrored image is still of its class, and training may mirror it. Default: yes, but not for digits."""
    skip_bad_images: bool = False
    """Go on without unreadable images, counting them per class, instead of stopping."""
    cache_dir: str | None = None
    """Where decoded pixels and downloads are kept. Default: $DDGEN_CACHE or ~/.cache/ddgen."""

    @property
    def may_flip(self) -> bool:
        """Whether training may mirror images."""
        return self.dataset != "digits" if self.random_flip is None else self.random_flip


@dataclass(frozen=True)
class AutoencoderConfig:
    """Autoencoder: images to latents and back."""

    space: Literal["latent", "pixel"] = "latent"
    """Diffuse latents of an autoencoder, or pixels without one. In pixels the UNet is told of every detail, and costs
    as much more as there are more positions."""
    vae: str | None = None
    """Path or hub id of a diffusers autoencoder to use instead of training one."""
    vae_downsample: int | None = None
    """Pixels per latent along a side (f). Default: 2 at 32 px, 4 at 64 px, 8 above."""
    vae_latent_channels: int | None = None
    """Channels of a latent (d). Default: 4 at 32 px, 8 at 64 px, 4 above."""
    vae_patch: int = 1
    """Side of the pixel blocks folded into channels before the residual networks. 1 is AutoencoderKL's layout; f works
    at the latents' resolution, which is fast on a CPU."""
    vae_channels: tuple[int, ...] | None = None
    """Width of the residual networks at each resolution, log2(f / patch) + 1 numbers. Default: 64 128 128 ... ."""
    vae_train_steps: int = 2000
    """Optimizer steps of the autoencoder; 0 keeps the closed-form patch PCA it starts from."""
    vae_batch_size: int = 64
    """Images per step of the autoencoder, over all processes."""
    vae_learning_rate: float = 5e-4
    """Peak learning rate of the autoencoder (AdamW, cosine to zero)."""
    vae_kl_weight: float = 1e-6
    """Weight of the Kullback-Leibler term on the latents."""
    vae_perceptual_weight: float = 0.0
    """Weight of the perceptual term in the observer's features."""
    vae_equivariance_weight: float = 0.0
    """Weight of the term that asks resized and turned latents to decode to images resized and turned alike (EQ-VAE)."""


@dataclass(frozen=True)
class DenoiserConfig:
    """Diffusion model."""

    preset: Literal["xs", "s", "b"] = "s"
    """Size of the UNet: xs 5M, s 29M, b 102M parameters at 16 x 16 latents."""
    unet_channels: tuple[int, ...] | None = None
    """Width at each resolution instead of the preset's."""
    unet_layers_per_block: int | None = None
    """Residual blocks per resolution instead of the preset's."""
    unet_attention_levels: tuple[int, ...] | None = None
    """Which resolutions have self-attention, 0 the finest. Default: all but the finest, up to 16 x 16."""
    unet_dropout: float = 0.0
    """Dropout inside the residual blocks."""
    class_dropout: float = 0.1
    """Probability of replacing a label by the null class in training, for classifier-free guidance."""
    prediction_type: Literal["v_prediction", "epsilon", "flow_prediction"] = "v_prediction"
    """What the UNet predicts: the velocity on the cosine schedule, the noise on Stable Diffusion's schedule, or
    noise - image of rectified flow."""
    flow_shift: float = 1.0
    """Rectified flow only: above 1 moves training and sampling timesteps towards noise, as large images need."""
    timestep_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """How training timesteps are drawn."""
    logit_mean: float = 0.0
    """Mean of the logit-normal timestep distribution; larger is noisier."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal timestep distribution."""
    snr_gamma: float | None = None
    """Min-SNR loss weighting (5.0 in the paper); off by default."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Training of the diffusion model."""

    train_batch_size: int = 128
    """Images per optimizer step over all processes and accumulated micro-batches."""
    max_train_steps: int = 20_000
    """Optimizer steps."""
    gradient_accumulation_steps: int = 1
    """Micro-batches that make up one optimizer step."""
    gradient_checkpointing: bool = False
    """Compute the denoiser's activations again in the backward pass instead of keeping them: the same weights in
    less memory, for more time."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    lr_warmup_steps: int = 200
    """Steps of linear warm-up."""
    lr_decay_fraction: float = 0.4
    """Last part of training in which the learning rate falls linearly to zero."""
    adam_weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_stds: tuple[float, ...] = (0.05, 0.10)
    """Relative widths of the power-function averages of the weights; the best by FD becomes the generator."""
    posthoc_ema_stds: tuple[float, ...] = ()
    """Further widths that are put together after training from 16 snapshots of the averages, and compete by FD. Costs
    one point of the FID curve each, and 16 x 2 bytes of disk per average and weight."""
    guide_fraction: float = 0.2
    """Part of training after which the averages are kept, once, as a guide for sampling (autoguidance); the one of the
    generator's width goes into generator/guide. Costs 2 bytes of disk per average and weight, and 2 more per weight. 0
    keeps none."""
    mixed_precision: Precision | None = None
    """Autocast precision; weights stay float32. Default: what `accelerate launch` was given, otherwise bf16 where the
    hardware is fast at it."""
    torch_compile: bool | None = None
    """Compile the denoiser for training, which costs a minute or more at the start. Default: on a GPU, but not under
    FSDP."""

    @property
    def guide_step(self) -> int:
        """Optimizer steps after which the guide is kept; 0 for none."""
        return max(1, round(self.guide_fraction * self.max_train_steps)) if self.guide_fraction else 0

    def compiles_on(self, device_type: str) -> bool:
        """Whether training compiles the denoiser on this type of device."""
        return device_type == "cuda" if self.torch_compile is None else self.torch_compile


@dataclass(frozen=True)
class MonitorConfig:
    """What is watched while training runs."""

    fid_every: int | None = None
    """Steps between points of the FID curve; 0 switches it off. Default: as often as keeps the curve under 10 % of
    training, counted in multiplications, 50 points at most; the last step always is one."""
    fid_num_images: int = 1000
    """Generated images per point of the FID curve."""
    fid_num_inference_steps: int = 10
    """Steps of DPM-Solver++ for the FID curve and the sample grids."""
    fd_network: str | None = None
    """Network in whose features images are compared: `inception` (the 2015-12-05 weights, downloaded if not at hand),
    `observer`, or folder or hub id of a transformers vision backbone (facebook/dinov2-base). Default: Inception where
    its weights are at hand, otherwise the observer."""
    inception_weights: str | None = None
    """The 2015-12-05 Inception weights as a local file. Default: the file in torch hub's cache, if it is there."""
    sample_every: int | None = None
    """Steps between sample grids. Default: --fid_every."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Tracker that also receives the metrics."""


@dataclass(frozen=True)
class GuidanceConfig:
    """Sampling of the diffusion model."""

    num_inference_steps: int | None = None
    """Sampler steps, 1 to 1000. A step asks the denoiser once; one of heun, but for the last, twice. Default: 8 of
    unipc, 50 of ddim, 15 of the others."""
    guidance_scale: float = 1.5
    """How far guidance goes away from the worse model, whichever --guide of sample.py names; 1 is no guidance."""
    guidance_interval: tuple[float, float] = (0.30, 0.85)
    """Part of the noise levels, 0 clean to 1 noise in the schedule's time, in which guidance acts."""
    sampler: Sampler = "unipc"
    """Solver."""
    eta: float = 0.0
    """Fresh noise in every step of ddim: 0 none, 1 as much as in DDPM."""

    @property
    def steps(self) -> int:
        """Sampler steps that are taken."""
        return STEPS[self.sampler] if self.num_inference_steps is None else self.num_inference_steps

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON values, with the steps that are taken."""
        values = dataclasses.asdict(self) | {"num_inference_steps": self.steps}
        return values | {"guidance_interval": list(self.guidance_interval)}


@dataclass(frozen=True)
class ObserverConfig:
    """Observer: the classifier that ranks and relabels."""

    observer: str | None = None
    """Folder of a trained observer, or path or hub id of a transformers classifier, instead of training one."""
    observer_network: str = "convnet3"
    """convnet<d>, resnet18, or torchvision:<name>."""
    observer_epochs: int = 30
    """Epochs on the real training images."""
    observer_batch_size: int = 128
    """Images per step."""
    observer_learning_rate: float = 1e-2
    """Peak learning rate (SGD with Nesterov momentum, one cycle)."""
    observer_label_smoothing: float = 0.1
    """Part of the target spread over all classes."""
    observer_input_size: int | None = None
    """Side to which the observer resizes its input. Default: the image size."""
    observer_holdout: float = 0.1
    """Part of the training images kept aside to measure its accuracy."""
    observer_keep_epochs: tuple[int, ...] | None = None
    """Epochs after which the observer is kept as it is then, in observer/epochs: less trained teachers label better
    at small ipc. Default: 1 2 3 5 8 12 18 27 ..., each half as many again."""
    observer_confidences: bool = True
    """Log the probability of the true class of every training image after every epoch, in observer/confidences.npy;
    costs about a third of the training time."""


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    output_dir: str | None = None
    """Where everything is written. Default: runs/<dataset>."""
    seed: int = 0
    """Seed of everything random."""
    resume_from_checkpoint: str | None = None
    """`latest`, or the folder of a checkpoint: go on from there. Default: the latest one, if --output_dir holds an
    unfinished run with exactly these settings."""
    checkpointing_steps: int = 1000
    """Steps between checkpoints."""
    checkpoints_total_limit: int = 2
    """How many checkpoints are kept."""
    dry_run: bool = False
    """Check the settings and the data, say what would happen, and stop."""


@dataclass(frozen=True)
class TrainConfig:
    """Train the observer, the autoencoder and the diffusion model on real images, with an FID curve."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    observer: ObserverConfig = field(default_factory=ObserverConfig)


@dataclass(frozen=True)
class TrainObserverConfig:
    """Train an observer alone."""

    output_dir: str | None = None
    """Where the observer goes. Default: runs/<dataset>-observer."""
    seed: int = 0
    """Seed of everything random."""
    dry_run: bool = False
    """Check the settings and the data, say what would happen, and stop."""
    data: DataConfig = field(default_factory=DataConfig)
    observer: ObserverConfig = field(default_factory=ObserverConfig)
    mixed_precision: Precision | None = None
    """Autocast precision; weights stay float32. Default: what `accelerate launch` was given, otherwise bf16 where the
    hardware is fast at it."""


@dataclass(frozen=True)
class SampleConfig:
    """Generate candidates, keep the most realistic, relabel them: a distilled dataset."""

    run_dir: str | None = None
    """A finished training run; with --generator also an observer's folder. Default: the newest under runs/."""
    generator: str | None = None
    """Another generator: folder of one that ddgen trained, or folder or hub id of a diffusers pipeline that takes class
    labels or prompts. Default: the run's."""
    prompt: str | None = None
    """Prompt for a text-to-image --generator, with {class} for the words for a class. Default: a photo of a {class}."""
    class_map: str | None = None
    """File that says what a class is called in --generator: JSON, YAML or lines `class: value`, the value being a
    label number or label name, or words for the prompt. Default: the class names."""
    trust_remote_code: bool = False
    """Run the Python files that --generator brings with it."""
    ipc: int = 10
    """Images per class to keep; 0 keeps all that --budget_seconds allow."""
    candidates_per_image: int | None = None
    """Candidates generated for every one kept. Default: 4; with --budget_seconds, as many as they allow."""
    budget_seconds: float | None = None
    """Generate candidates for so many seconds, loading not counted, one of each class in turn; a stopped command goes
    on with the seconds that are left. Every process has all of them."""
    fast: bool = False
    """UniPC in 6 steps; --sampler and --num_inference_steps stand over it."""
    num_inference_steps: int | None = None
    """Sampler steps. Default: the run's; with another --sampler, that one's own: 8 of unipc, 50 of ddim, 15 of the
    others."""
    guidance_scale: float | None = None
    """How far guidance goes away from what --guide names; 1 is no guidance. Default: the run's."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels in which guidance acts. Default: the run's."""
    sampler: Sampler | None = None
    """Solver. Default: the run's."""
    eta: float | None = None
    """Fresh noise in every step of ddim, 0 to 1. Default: the run's."""
    guide: str = "auto"
    """What guidance goes away from. `none`: the model without a class (classifier-free guidance). `auto`: the guide
    that training kept in the generator's folder (autoguidance); where there is none, as `none`. Or a path to a worse
    model of the same latents and classes: folder of a generator, of a run, or of a checkpoint, checkpoints/step-* ."""
    modes: int | Literal["auto"] | None = None
    """Steer the candidates of a class, in turn, towards so many modes: the centres of clusters of its real latents.
    `auto`: as many as --ipc. Default: no steering."""
    mode_strength: float = 0.2
    """Pull of a candidate towards its mode, 0 to 1."""
    diversity_strength: float = 1.0
    """Push of a candidate away from the modes of the others, which 1 makes Bayes' rule for a mixture of clusters."""
    steer_until: float = 0.5
    """Noise level, 0 clean to 1 noise in the schedule's time, at and below which nothing is steered."""
    torch_compile: bool | None = None
    """Compile the denoiser for sampling, which costs a minute or more at the start. Default: on a GPU."""
    sample_batch_size: int | None = None
    """Images sampled together; changes them by no more than rounding. Default: found while sampling,
    within memory; 256 where the denoiser is compiled, which is for one size."""
    observer: tuple[str, ...] | None = None
    """Observer folders or hub ids: the first ranks, all label, their probabilities averaged. Default: the run's."""
    teacher_epoch: int | Literal["auto"] | None = None
    """Label with the observer as it was after this epoch; `auto`: the kept epoch that teaches students of this ipc
    best, on held-out training images. Default: fully trained."""
    selection: Selection = "realism"
    """Rule that keeps candidates of a class; RDED's is realism."""
    factor: int = 1
    """Each image is a grid of factor x factor candidates."""
    soft_label_temperature: float = 1.0
    """Temperature of the stored soft labels."""
    output_dir: str | None = None
    """Where the distilled dataset goes. Default: <run_dir>/distilled/ipc<ipc>."""
    overwrite: bool = False
    """Replace an existing distilled dataset."""
    keep_pool: bool = False
    """Keep all candidates, in <run_dir>/pool, where other requests with the same generator and seed find them."""
    seed: int = 0
    """Seed of the candidates."""
    mixed_precision: Precision | None = None
    """Autocast precision. Default: what `accelerate launch` was given, otherwise bf16 where the hardware is fast at
    it."""
    dry_run: bool = False
    """Say what would happen and stop."""

    def compiles_on(self, device_type: str) -> bool:
        """Whether sampling compiles the denoiser on this type of device."""
        return device_type == "cuda" if self.torch_compile is None else self.torch_compile

    def batch_size_on(self, device_type: str) -> int | None:
        """Returns how many images are sampled together on this type of device; None if that is to be found."""
        return self.sample_batch_size or (256 if self.compiles_on(device_type) else None)

    @property
    def num_candidates(self) -> int | None:
        """Candidates per class; None if time decides."""
        if self.budget_seconds is not None:
            return None
        return self.ipc * self.factor**2 * (4 if self.candidates_per_image is None else self.candidates_per_image)


@dataclass(frozen=True)
class DistillConfig:
    """Distil real images (RDED): crops of them, the best kept by the observer, stitched and relabelled."""

    source: Literal["real"] = "real"
    """What is cropped: the real training images. Candidates of a generator are made and kept by `sample`."""
    run_dir: str | None = None
    """The training run whose data and observer are used. Default: the newest under runs/, unless --dataset is given."""
    data: DataConfig = field(default_factory=DataConfig)
    observer: str | None = None
    """Observer folder or hub id. Default: the run's."""
    ipc: int = 10
    """Images per class to keep."""
    factor: int = 1
    """Each image is a grid of factor x factor crops; 1 for small images, 2 at 224 px."""
    mipc: int = 300
    """Real images per class that are cropped."""
    num_crop: int = 5
    """Crops of each; the most realistic one competes with those of the other images."""
    selection: Selection = "realism"
    """Rule that keeps crops of a class; RDED's is realism."""
    soft_label_temperature: float = 1.0
    """Temperature of the stored soft labels."""
    output_dir: str | None = None
    """Where the distilled dataset goes. Default: <run_dir>/distilled/real-ipc<ipc>."""
    overwrite: bool = False
    """Replace an existing distilled dataset."""
    seed: int = 0
    """Seed of the images drawn and of their crops."""
    mixed_precision: Precision | None = None
    """Autocast precision. Default: what `accelerate launch` was given, otherwise bf16 where the hardware is fast at
    it."""
    dry_run: bool = False
    """Say what would happen and stop."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Train students on a distilled dataset and score them on the real test images, next to baselines."""

    run_dir: str | None = None
    """The training run whose data, observer and distilled dataset are used. Default: the newest under runs/."""
    ipc: int | None = None
    """Which of the run's distilled datasets. Default: the newest."""
    distilled_dir: str | None = None
    """A dataset instead of the run's: a folder that sample.py wrote, class folders of images, parquet files, a
    challenge's cifar100.pt or tinyimagenet.pt, or the id of a dataset of the hub."""
    rounds: tuple[str, ...] = ()
    """Distilled datasets of further rounds of the generator, which eccv2024-track2 asks for (two): student 2 trains on
    the first of them, and so on."""
    data: DataConfig = field(default_factory=DataConfig)
    students: tuple[str, ...] | None = None
    """Student networks: convnet<d> or convnet<d>w<width>, resnet18, resnet50, resnet_ap10, vgg11, mobilenet_v2,
    efficientnet_b0, vit, swin, torchvision:<name>, or transformers:<folder or hub id of a config>. Default: the
    protocol's, otherwise the observer's, if it is one that ddgen builds, otherwise convnet3."""
    protocols: tuple[str, ...] = ("rded", "hard")
    """Recipes to train students with: rded, hard, eccv2024-track1, eccv2024-track2, strong, fixed-soft, stored (the
    views that `ddgen label` stores), one of these with -plain (no augmentation), or a YAML file
    (configs/protocols/example.yaml)."""
    baselines: tuple[Literal["random-generated", "random-real", "herding", "k-center", "rded-real"], ...] | None = None
    """What the distilled images are compared with, as many of every class: herding and k-center choose real images by
    the first observer's features, rded-real distils real images by RDED. Default: random-generated, random-real, and
    rded-real where there is an observer."""
    with_full: bool = False
    """Also train a student on all real images, 30 epochs at most."""
    with_ranking: bool = False
    """Also say whether the images are good for choosing models: train candidates on every set and on all real images,
    by the first protocol, and compare the orders by rank correlation."""
    rank_models: tuple[str, ...] | None = None
    """Networks of these candidates, named as students are. Default: four ConvNets of two depths and three widths."""
    rank_lr_factors: tuple[float, ...] = (0.1, 1.0, 10.0)
    """Learning rates of these candidates, as multiples of the protocol's, with each network."""
    rank_epochs: int = 5
    """Epochs of these candidates on all real images, at most the protocol's."""
    repeats: int = 3
    """Students per row, each with its own seed."""
    epochs: int | None = None
    """Epochs instead of the protocol's; the report says so."""
    observer: tuple[str, ...] | None = None
    """Teachers of soft protocols, folders or hub ids: one after another, observers against students; `strong` takes
    the mean of all. Default: the run's observer."""
    teacher_epoch: int | Literal["auto"] | None = None
    """Teach with the observer as it was after this epoch; `auto`: the kept epoch that teaches students of this ipc
    best, on held-out training images. Default: fully trained."""
    output_dir: str | None = None
    """Where results go. Default: <run_dir>/evaluation/ipc<ipc>."""
    overwrite: bool = False
    """Replace existing results."""
    seed: int = 0
    """Seed of the students and of the random baselines."""
    mixed_precision: Precision | None = None
    """Autocast precision. Default: what `accelerate launch` was given, otherwise bf16 where the hardware is fast at
    it."""
    dry_run: bool = False
    """Say what would happen and stop."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a distilled dataset in the format of others."""

    distilled_dir: str | None = None
    """The distilled dataset, a folder that sample.py wrote."""
    format: Literal["challenge", "dd-ranking"] | None = None
    """`challenge`: cifar100.pt or tinyimagenet.pt of the ECCV 2024 challenge, 10 images a class. `dd-ranking`: a folder
    of images and a tensor of labels."""
    output: str | None = None
    """File or folder to write. Default: <distilled_dir>-challenge/<dataset>.pt, or <distilled_dir>-dd-ranking."""
    overwrite: bool = False
    """Replace an earlier export."""


@dataclass(frozen=True)
class ReportConfig:
    """Write a run's report, one HTML page that holds its pictures: what was distilled, scores, time, commands."""

    run_dir: str | None = None
    """A run, finished or not. Default: the newest finished one under runs/."""
    output: str | None = None
    """The page. Default: <run_dir>/report.html, replaced if it is there."""


@dataclass(frozen=True)
class LabelConfig:
    """Store the observer's labels of augmented views beside a distilled dataset: students then need no teacher."""

    run_dir: str | None = None
    """The training run whose observer and distilled dataset are used. Default: the newest under runs/."""
    ipc: int | None = None
    """Which of the run's distilled datasets. Default: the newest."""
    distilled_dir: str | None = None
    """A distilled dataset anywhere, instead of the run's."""
    data: DataConfig = field(default_factory=DataConfig)
    views: int | None = None
    """Epochs of augmented views, each image once an epoch; longer training goes round them. Default: as many as the
    rded protocol trains."""
    keep_every: int = 1
    """Store every m-th of these epochs only."""
    top_k: int | None = None
    """Store the k largest logits of a view only; the probability of the rest is spread evenly. Default: all."""
    shrink: bool = False
    """Apply --keep_every and --top_k to the views that are stored already, without an observer."""
    observer: tuple[str, ...] | None = None
    """Observer folders or hub ids; several are averaged in probability. Default: the run's."""
    teacher_epoch: int | Literal["auto"] | None = None
    """Label with the observer as it was after this epoch; `auto`: the kept epoch that teaches students of this ipc
    best, on held-out training images. Default: fully trained."""
    soft_label_temperature: float | None = None
    """Temperature at which students compare, and several observers are averaged. Default: the rded protocol's, 20."""
    label_batch_size: int = 512
    """Views labelled together; does not change the views."""
    overwrite: bool = False
    """Replace views that are stored already."""
    seed: int = 0
    """Seed of the views."""
    mixed_precision: Precision | None = None
    """Autocast precision. Default: what `accelerate launch` was given, otherwise bf16 where the hardware is fast at
    it."""
    dry_run: bool = False
    """Say what would happen and stop."""


# ---------------------------------------------------------------------------------------------------------
# YAML and flags -> dataclass

RANGES: dict[str, tuple[float, float]] = {
    **{name: (1, math.inf) for name in (
        "num_classes", "vae_downsample", "vae_latent_channels", "vae_patch", "vae_channels", "vae_batch_size",
        "unet_channels", "unet_layers_per_block", "train_batch_size", "max_train_steps", "gradient_accumulation_steps",
        "fid_num_inference_steps", "log_every", "num_inference_steps", "observer_epochs", "observer_batch_size",
        "observer_input_size", "checkpointing_steps", "checkpoints_total_limit", "candidates_per_image",
        "sample_batch_size", "repeats", "epochs", "factor", "mipc", "num_crop", "observer_keep_epochs",
        "teacher_epoch", "views", "keep_every", "top_k", "label_batch_size", "rank_epochs", "modes",
    )},
    **{name: (0, math.inf) for name in (
        "vae_train_steps", "vae_kl_weight", "vae_perceptual_weight", "vae_equivariance_weight",
        "unet_attention_levels", "lr_warmup_steps", "adam_weight_decay", "fid_every", "sample_every", "guidance_scale",
        "ipc", "diversity_strength",
    )},
    **{name: (1e-12, math.inf) for name in (
        "vae_learning_rate", "learning_rate", "max_grad_norm", "observer_learning_rate", "logit_std", "snr_gamma",
        "flow_shift", "soft_label_temperature", "budget_seconds", "rank_lr_factors",
    )},
    **{name: (0, 1) for name in (
        "unet_dropout", "class_dropout", "lr_decay_fraction", "guidance_interval", "eta", "observer_label_smoothing",
        "mode_strength", "steer_until",
    )},
    "observer_holdout": (0.001, 0.9),
    "guide_fraction": (0, 0.9),  # what is trained as long as the generator guides nowhere
    "fid_num_images": (6, math.inf),  # neighbours are counted up to the fifth
    "ema_stds": (0.005, 0.25),
    "posthoc_ema_stds": (0.03, 0.25),
    "seed": (0, 2**63 - 1),
}  # fmt: skip
"""Smallest and largest value of every number, both allowed; of every number of a list likewise."""

Config = TypeVar("Config")


class _Loader(yaml.SafeLoader):
    """YAML in which ``no`` is the word and ``3e-4`` is a number (YAML 1.2), and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} stands twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":timestamp", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path, *, setting: str = "--config") -> dict[str, Any]:
    """Reads a YAML file of settings.

    Args:
        path: The file.
        setting: The flag that an error names.

    Raises:
        UserError: The file is missing, not YAML, or not a mapping.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{setting} {path}: {error.strerror or error}; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{setting} {path}: not text; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{setting} {path}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{setting} {path}: expected lines `setting: value`")
    return values


def settings(kind: type) -> dict[str, tuple[str | None, Any]]:
    """Returns flag name -> (group field or None, type) of a command's dataclass."""
    found: dict[str, tuple[str | None, Any]] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            for inner, inner_hint in typing.get_type_hints(hint).items():
                found[inner] = (name, inner_hint)
        else:
            found[name] = (None, hint)
    return found


def to_flat_dict(config: Any) -> dict[str, Any]:
    """Returns the settings as ``{flag name: value}``, tuples as lists; the inverse of `from_flat_dict`."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat.update(to_flat_dict(value))
        else:
            flat[item.name] = list(value) if isinstance(value, tuple) else value
    return flat


def from_flat_dict(kind: type[Config], values: dict[str, Any], source: str) -> Config:
    """Builds a command's settings from ``{flag name: value}``.

    Args:
        kind: The command's dataclass.
        values: Settings as read from YAML.
        source: What to call the origin of the values in an error, for instance ``--config recipe.yaml``.

    Raises:
        UserError: An unknown setting, or a value of the wrong type.
    """
    known = settings(kind)
    for name in values:
        if name not in known:
            raise UserError(f"{source}: unknown setting {name}{_did_you_mean(str(name), known)}")
    args: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool) and known[name][1] is bool:
            args.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, (list, tuple)):
            args.extend([f"--{name}", *map(str, value)])
        else:
            args.extend([f"--{name}", str(value)])
    return _cli(kind, args, None, source)


def write_yaml(path: Path, config: Any) -> None:
    """Writes the resolved settings, readable again with ``--config``; whole or not at all."""
    write_bytes(path, yaml.safe_dump(to_flat_dict(config), sort_keys=False).encode())


def parse(kind: type[Config], argv: list[str] | None, prog: str) -> Config:
    """Parses flags, over ``--config FILE.yaml``, over the defaults.

    Args:
        kind: The command's dataclass.
        argv: Arguments without the program's name; None takes ``sys.argv``.
        prog: Name shown in ``--help``.

    Raises:
        UserError: Unknown or wrong settings.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    config_path, args = _take_config(args)
    args = _spell_out_switches(kind, args)
    _check_flags(kind, args)
    default = from_flat_dict(kind, read_yaml(config_path), f"--config {config_path}") if config_path else None
    config = _cli(kind, args, default, prog)
    _check_ranges(config)
    return config


def _take_config(args: list[str]) -> tuple[str | None, list[str]]:
    path, rest, index = None, [], 0
    while index < len(args):
        if args[index] == "--config":
            if index + 1 == len(args):
                raise UserError("--config: give the path of a YAML file")
            path, index = args[index + 1], index + 2
        elif args[index].startswith("--config="):
            path, index = args[index].removeprefix("--config="), index + 1
        else:
            rest.append(args[index])
            index += 1
    return path, rest


def _spell_out_switches(kind: type, args: list[str]) -> list[str]:
    """Lets switches that have a derived default be used like the others: --random_flip and --no_random_flip."""
    derived = {name for name, (_, hint) in settings(kind).items() if hint == bool | None}
    spelled: list[str] = []
    for arg, following in zip(args, [*args, "--"][1:], strict=True):
        name = arg.removeprefix("--").replace("-", "_")
        if arg.startswith("--no") and name.removeprefix("no_") in derived:
            spelled += [f"--{name.removeprefix('no_')}", "False"]
        elif arg.startswith("--") and name in derived and following.startswith("--"):
            spelled += [arg, "True"]
        else:
            spelled.append(arg)
    return spelled


def _check_ranges(config: Any) -> None:
    for name, value in to_flat_dict(config).items():
        low, high = RANGES.get(name, (-math.inf, math.inf))
        numbers = value if isinstance(value, list) else [value]
        if name in ("ema_stds", "protocols") and not numbers:
            raise UserError(f"--{name}: empty; give at least one")
        for number in numbers:
            if isinstance(number, (int, float)) and not isinstance(number, bool) and not low <= number <= high:
                allowed = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
                raise UserError(f"--{name} {number}: give {allowed}")


def _did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else "; see --help"


def _check_flags(kind: type, args: list[str]) -> None:
    known = settings(kind)
    for arg in args:
        if not arg.startswith("--") or arg == "--help":
            continue
        name = arg[2:].split("=")[0].replace("-", "_")
        if name in known or (name.startswith("no_") and known.get(name[3:], (None, None))[1] is bool):
            continue
        raise UserError(f"--{name}: unknown setting{_did_you_mean(name, known)}")


def _cli(kind: type[Config], args: list[str], default: Config | None, source: str) -> Config:
    import tyro

    extra: dict[str, Any] = {} if default is None else {"default": default}
    flat: Any = Annotated[kind, tyro.conf.OmitArgPrefixes]
    description = f"{kind.__doc__} --config FILE.yaml reads settings from a file; flags stand over it."
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            config: Config = tyro.cli(
                flat, args=args, prog=source, description=description, use_underscores=True, **extra
            )
            return config
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(captured.getvalue(), source)) from None


def _one_line(report: str, source: str) -> str:
    """Turns tyro's boxed error into one line: its sentence, without its heading and its copy of the help text."""
    lines = [re.sub(r"[│╭╮╰╯─]+", " ", line).strip() for line in report.splitlines()]
    text = re.sub(r"\s+", " ", " ".join(line for line in lines if not line.startswith("For full helptext")))
    text = text.split(" Argument helptext:")[0].strip()
    text = re.sub(r"^(Value error|Invalid choice|Missing argument|Unrecognized options|Parsing error) ", "", text)
    text = text.removeprefix("Error parsing ").removesuffix(".")
    return f"{source}: {text}; see --help"
