"""The settings of every command: groups, and what is its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ddgen.config.groups import (
    AutoencoderConfig,
    DataConfig,
    DenoiserConfig,
    GuidanceConfig,
    MonitorConfig,
    ObserverConfig,
    OptimizerConfig,
    Precision,
    RunConfig,
    Sampler,
    Selection,
)


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
    """Generate candidates, keep the best, relabel them: a distilled dataset."""

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
    selection: Selection = "diverse-realism"
    """Rule that keeps candidates of a class: of the realistic half, those that together stand for the real class.
    RDED's is realism."""
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
    def rule(self) -> Selection:
        """What puts the candidates of a class in order; where all are kept, the most realistic stand first."""
        return self.selection if self.ipc else "realism"

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
    observer: tuple[str, ...] | None = None
    """Observer folders or hub ids: the first ranks, all label, their probabilities averaged. Default: the run's."""
    teacher_epoch: int | Literal["auto"] | None = None
    """Label with the observer as it was after this epoch; `auto`: the kept epoch that teaches students of this ipc
    best, on held-out training images. Default: fully trained."""
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
    """Replace existing results; students that are trained already stay."""
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
