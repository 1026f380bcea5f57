"""Groups of settings, which commands share, and the values that a setting can be one of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

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
    """Steps between sample grids; 0 for none. Default: with every point of the FID curve, and ten times, or as often as
    2 % of training allow."""
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
