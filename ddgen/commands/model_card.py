"""The README.md of a generator: what it was trained on and how, what it reaches, how to load it, what it is not for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from ddgen.checkpoint import read_json
from ddgen.commands.runs import command_line, versions_line
from ddgen.config import TrainConfig
from ddgen.data import ImageDataset
from ddgen.diffusion.generator import Generator, KeptGuide
from ddgen.evaluation.curve import best_point
from ddgen.hardware import device_name, number_format

_LOADING = """## How to load it

```python
from diffusers import DiffusionPipeline

folder = "path/to/this/folder"
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipe(class_labels=[0, 1, 2]).images  # numbers, or names of classes
```

`pipeline.py`, `samplers.py` and `guidance.py` in this folder are all the code it needs beside diffusers."""


def card_pictures(output_dir: Path) -> list[Path]:
    """Returns the pictures that the card shows, as far as the run has them, in their order."""
    samples = output_dir / "samples"
    grids = sorted(samples.glob("step-*.png"))
    shown = [
        *grids[-1:],
        output_dir / "fid_curve.png",
        samples / "reconstructions.png",
        samples / "nearest_training.png",
    ]
    return [path for path in shown if path.is_file()]


def render_model_card(
    config: TrainConfig,
    dataset: ImageDataset,
    generator: Generator,
    guide: KeptGuide | None,
    output_dir: Path,
    precision: str,
) -> str:
    """Writes the card.

    Args:
        config: Settings of the run.
        dataset: The training images.
        generator: What the card is of.
        guide: What travels with it.
        output_dir: The run folder: metrics, pictures, facts about the autoencoder.
        precision: Autocast precision of training, resolved.
    """
    sections = [
        _header() + "\n" + _introduction(dataset, generator, guide),
        _pictures(config, card_pictures(output_dir)),
        _LOADING,
        "## Results\n\n" + _results(output_dir / "metrics.jsonl", generator),
        "## Data\n\n" + _data(config, dataset),
        "## Recipe\n\n" + _recipe(config, dataset, generator, guide, output_dir, precision),
        "## Limits\n\n" + _limits(dataset),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _header() -> str:
    facts = {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["dataset-distillation", "class-conditional-generation", "ddgen"],
        "license": "other",
        "license_name": "see-the-card",
    }
    return "---\n" + yaml.safe_dump(facts, sort_keys=False) + "---\n"


def _introduction(dataset: ImageDataset, generator: Generator, guide: KeptGuide | None) -> str:
    sampling, size = generator.sampling, dataset.image_size
    low, high = sampling.guidance_interval
    text = f"""# Class-conditional diffusion model of {dataset.name}

Makes {size} x {size} images of {dataset.num_classes} classes. Unless told otherwise it samples with {sampling.sampler},
{sampling.steps} steps, guidance {sampling.guidance_scale:g} at noise levels {low:g} to {high:g}."""
    if guide is None:
        return text
    return f"""{text}

`guide/` holds its own weights after {guide.step:,} of {guide.max_train_steps:,} steps. `sample.py --guide auto` guides
away from them (autoguidance); the pipeline in this folder guides away from the model without a class."""


def _pictures(config: TrainConfig, pictures: list[Path]) -> str:
    texts = {
        "fid_curve": "Distance from the real images against training steps",
        "reconstructions": "Real images, and what the autoencoder makes of them",
        "nearest_training": "Generated images that are closest to a training image, and that image",
    }
    samples = f"Samples, a class a row, {config.monitor.fid_num_inference_steps} steps, no choice made"
    return "\n\n".join(f"![{texts.get(path.stem, samples)}]({path.name})" for path in pictures)


def _results(metrics_path: Path, generator: Generator) -> str:
    """A row for everything measured of the average that was kept, at the end of training."""
    last: dict[str, tuple[int, float]] = {}
    for line in metrics_path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for key, value in record.items():
            name, _, average = key.partition("/")
            if average in (f"ema_{generator.ema_std}", f"posthoc_{generator.ema_std}") and value is not None:
                last[name] = record["step"], value
    if not last:
        return "Not measured: the run was made with `--fid_every 0`."
    rows = ["| measure | this model | at step |", "|---|---|---|"]
    rows += [f"| `{name}` | {value:.4g} | {step:,} |" for name, (step, value) in last.items()]
    text = "The number at the end of a name is how many generated images it was measured on; no guidance was used."
    best = best_point(metrics_path)
    if best is not None:
        metric, best_step, average, lowest = best
        text += f" Lowest `{metric}` of the run: {lowest:.4g} at step {best_step:,.0f}, {average}."
    return "\n".join(rows) + f"\n\n{text}"


def _data(config: TrainConfig, dataset: ImageDataset) -> str:
    counts = torch.bincount(dataset.labels, minlength=dataset.num_classes)
    low, high = int(counts.min()), int(counts.max())
    skipped = sum(dataset.skipped.values())
    names = ", ".join(dataset.class_names[:20]) + (", ..." if dataset.num_classes > 20 else "")
    return _table(
        {
            "dataset": dataset.name,
            "images": f"{len(dataset):,}" + (f", {skipped} unreadable ones left out" if skipped else ""),
            "images per class": f"{low:,}" if low == high else f"{low:,} to {high:,}",
            "classes": names,
            "mirrored in training": "yes" if config.data.may_flip else "no",
            "licence": dataset.licence,
            "fingerprint": f"`{dataset.fingerprint}`",
        }
    )


def _recipe(
    config: TrainConfig,
    dataset: ImageDataset,
    generator: Generator,
    guide: KeptGuide | None,
    output_dir: Path,
    precision: str,
) -> str:
    optim, unet, vae = config.optimizer, generator.unet, generator.autoencoder.vae
    million = sum(p.numel() for p in unet.parameters()) / 1e6
    widths = " ".join(map(str, unet.config.block_out_channels))
    side, epochs = unet.config.sample_size, optim.max_train_steps * optim.train_batch_size / len(dataset)
    facts = output_dir / "autoencoder" / "latents.json"
    psnr = read_json(facts).get("psnr") if facts.is_file() else None
    quality = "" if psnr is None else f", {psnr:.2f} dB on held-out images"
    prediction = generator.scheduler.config.get("prediction_type", "flow_prediction")
    sampling = config.denoiser.timestep_sampling.replace("_", "-")
    schedule = f"{optim.lr_warmup_steps} steps of warm-up, falling over the last {optim.lr_decay_fraction:.0%}"
    kept = guide and f"relative width {guide.ema_std}, after {guide.step:,} of {guide.max_train_steps:,} steps, float16"
    rows = {
        "denoiser": f"UNet, {million:.1f}M parameters, widths {widths}, dropout {config.denoiser.unet_dropout:g}",
        "autoencoder": type(vae).__name__ + quality,
        "latents": f"{unet.config.in_channels} x {side} x {side}",
        "objective": f"{prediction}, {sampling} timesteps, {config.denoiser.class_dropout:.0%} of the labels dropped",
        "training": f"{optim.max_train_steps:,} steps of {optim.train_batch_size} images, {epochs:.1f} epochs",
        "optimizer": f"AdamW, weight decay {optim.adam_weight_decay:g}, gradients clipped to {optim.max_grad_norm:g}",
        "learning rate": f"{optim.learning_rate:g}, {schedule}",
        "weights kept": f"power-function average of relative width {generator.ema_std}",
        "averages made": ", ".join(map(str, optim.ema_stds)),
        "guide": kept or "none",
        "numbers": number_format(unet.device, precision),
        "device": device_name(unet.device),
        "seed": str(config.run.seed),
        "versions": versions_line(),
    }
    return f"{_table(rows)}\n\nEvery setting is in the run's `config.yaml`. Made with\n\n```\n{command_line()}\n```"


def _limits(dataset: ImageDataset) -> str:
    size = f"{dataset.image_size} x {dataset.image_size}"
    return f"""- Made to train and compare classifiers on small stand-ins for {dataset.name}. It is no source of facts
  about anything real, and not for pictures that people may take for photographs.
- It knows {dataset.num_classes} classes and {size} pixels. Its images inherit the biases and the gaps of the training
  images.
- A diffusion model can repeat training images, the more so the fewer it had and the longer it was trained. The
  rows `memorised` under Results say how much of that was found; without such a row it was not checked.
- The licence of the training images, see Data, may bind what is made of them."""


def _table(rows: dict[str, str]) -> str:
    cells = {name: " ".join(text.replace("|", "/").split()) for name, text in rows.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in cells.items())])
