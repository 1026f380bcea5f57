"""Which recipe gets the lowest FD per image and per minute: named variations, one dataset, one measure.

    python benchmarks/recipe.py --config configs/cifar10_cpu.yaml --data_dir FOLDER --images 300000 \
        --variations "v; flow: prediction_type=flow_prediction; wide: unet_channels=96 192 192, learning_rate=7e-4"

A variation is a name and any settings of train_ldm.py; flags after these three are train_ldm.py's own, and hold for
all. Variations share the observer, in whose features FD is measured unless --inception_weights are given, and, where
their autoencoder is the same, its latents. Each is trained by the product's own loop for as many images as the others.

Into --output_dir (default runs/recipe-<dataset>) go results.jsonl, one line a variation; recipe.md, the table; and
recipe.png. The same command goes on where it was stopped, and with more variations adds them to the table.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ddgen.checkpoint import latest_checkpoint, write_bytes
from ddgen.commands.runs import dataset_name, load_on_all, start_accelerator
from ddgen.commands.train import autoencoder_of_run, observer_of_run
from ddgen.commands.train_checks import Given, check_training
from ddgen.commands.train_curve import monitor_of_run
from ddgen.config import TrainConfig, parse, settings, to_flat_dict
from ddgen.data import ImageDataset
from ddgen.diffusion.training import train_diffusion
from ddgen.errors import Stopped, UserError
from ddgen.evaluation.extractors import choose_extractor
from ddgen.evaluation.monitor import DistanceMonitor
from ddgen.observer.observer import Observer

Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What to compare. Other flags are train_ldm.py's and hold for every variation."""

    images: int = 300_000
    """Images that every variation is trained on, counted with repetition."""
    variations: str = "base"
    """"name: setting=value, setting=value; name: ...". Numbers of a list are separated by spaces."""
    points: int = 4
    """Points of each variation's FD curve, evenly spread."""


@dataclass(frozen=True)
class Variation:
    """One recipe.

    Attributes:
        name: Of its row.
        changes: What differs from the flags all variations share, as written.
        config: All its settings.
    """

    name: str
    changes: str
    config: TrainConfig

    @property
    def identity(self) -> dict[str, Any]:
        """What a result must have been made with to be this variation's."""
        groups = (self.config.autoencoder, self.config.denoiser, self.config.optimizer, self.config.data)
        found = {name: value for group in groups for name, value in to_flat_dict(group).items()}
        for name in ("mixed_precision", "data_dir", "cache_dir"):
            del found[name]
        return found | {"seed": self.config.run.seed, "fid_num_images": self.config.monitor.fid_num_images}


def main(argv: list[str] | None = None) -> int:
    """Trains and measures what has not been yet, and writes the table."""
    chosen, shared = tyro.cli(Settings, args=argv, return_unknown_args=True, use_underscores=True)
    try:
        variations = read_variations(chosen, shared)
        return compare(variations)
    except UserError as error:
        print(f"recipe: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print("stopped; the same command goes on")
        return 128 + stopped.signal_number


def read_variations(chosen: Settings, shared: list[str]) -> list[Variation]:
    """Returns the variations with all their settings.

    Raises:
        UserError: A setting that does not exist, a value it cannot have, or a name given twice.
    """
    known, variations = settings(TrainConfig), []
    for text in filter(str.strip, chosen.variations.split(";")):
        name, _, changes = (part.strip() for part in text.partition(":"))
        flags: list[str] = []
        for change in filter(str.strip, changes.split(",")):
            setting, _, value = (part.strip() for part in change.partition("="))
            switch = known.get(setting, (None, None))[1] is bool
            flags += [f"--{'no_' * (value == 'false')}{setting}"] if switch else [f"--{setting}", *value.split()]
        config = parse(TrainConfig, [*shared, *flags], f"--variations {name}")
        variations.append(Variation(name, changes, _for_images(config, chosen)))
    names = [variation.name for variation in variations]
    for name in names:
        if names.count(name) > 1 or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise UserError(f"--variations {name}: names must differ, and be letters, digits, - _ and .")
    return variations


def _for_images(config: TrainConfig, chosen: Settings) -> TrainConfig:
    """Sets the length of training and the points of the curve."""
    steps = chosen.images // config.optimizer.train_batch_size
    if not 1 <= chosen.points <= steps:
        raise UserError(f"--images {chosen.images}: {steps} steps are too few for --points {chosen.points}")
    return replace(
        config,
        optimizer=replace(config.optimizer, max_train_steps=steps),
        monitor=replace(config.monitor, fid_every=-(-steps // chosen.points)),
    )


def compare(variations: list[Variation]) -> int:
    """Measures the variations that have no result yet, one after the other, and draws all results."""
    first = variations[0].config
    root = Path(first.run.output_dir or f"runs/recipe-{dataset_name(first.data)}")
    results_path = root / "results.jsonl"
    done = _read_results(results_path)
    accelerator, precision = start_accelerator(first.optimizer.mixed_precision)
    dataset = load_on_all(accelerator, first.data, "train")
    for variation in variations:
        before = done.get(variation.name)
        if before is not None and before["settings"] != json.loads(json.dumps(variation.identity)):
            raise UserError(f"--variations {variation.name}: {results_path} has it with other settings; rename it")
    given = {v.name: check_training(v.config, dataset, accelerator, precision) for v in variations}
    observer = observer_of_run(first, given[variations[0].name], dataset, root / "observer", accelerator, precision)
    monitor = None
    if accelerator.is_main_process:
        extractor = choose_extractor(first.monitor.fd_network, first.monitor.inception_weights)
        monitor = monitor_of_run(first, dataset, observer, extractor, root, accelerator)
    for variation in variations:
        if variation.name in done:
            accelerator.print(f"{variation.name}: measured before")
            continue
        accelerator.print(f"{variation.name}: {variation.changes or 'as the flags say'}")
        found = _measure(
            variation,
            given[variation.name],
            dataset,
            observer,
            monitor,
            root,
            accelerator=accelerator,
            precision=precision,
        )
        if accelerator.is_main_process:
            with open(results_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            _write_report(list(_read_results(results_path).values()), root)
            shutil.rmtree(root / "variations" / variation.name / "checkpoints")
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write_report(list(_read_results(results_path).values()), root)
        print((root / "recipe.md").read_text(encoding="utf-8"))
    return 0


def _measure(
    variation: Variation,
    given: Given,
    dataset: ImageDataset,
    observer: Observer,
    monitor: DistanceMonitor | None,
    root: Path,
    *,
    accelerator: Accelerator,
    precision: str,
) -> Result:
    """Trains one variation, going on from its last checkpoint, and returns its line of results."""
    config, run_dir = variation.config, root / "variations" / variation.name
    text = json.dumps(asdict(config.autoencoder), sort_keys=True).encode()
    shared = root / "autoencoders" / hashlib.sha256(text).hexdigest()[:12]
    autoencoder, latents = autoencoder_of_run(config, given, dataset, observer, shared, accelerator, precision)
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    generator = train_diffusion(
        config,
        latents,
        dataset.labels,
        autoencoder,
        dataset.class_names,
        dataset.image_size,
        accelerator=accelerator,
        precision=precision,
        output_dir=run_dir,
        resume_from=latest_checkpoint(run_dir / "checkpoints"),
        fid_every=config.monitor.fid_every or 0,
        monitor=monitor,
    )
    accelerator.free_memory()
    batch_size = config.optimizer.train_batch_size
    return {
        "name": variation.name,
        "changes": variation.changes,
        "settings": variation.identity,
        "device": accelerator.device.type,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "parameters": sum(parameter.numel() for parameter in generator.unet.parameters()),
        "images": config.optimizer.max_train_steps * batch_size,
        **read_metrics(run_dir / "metrics.jsonl", batch_size),
    }


def read_metrics(path: Path, batch_size: int) -> Result:
    """Reads what a run took and reached.

    Args:
        path: Its metrics.jsonl.
        batch_size: Images per step.

    Returns:
        "seconds" of training alone, "images_per_second", "metric", the name of the distance, and "curve":
        {"ema_<std>" or "posthoc_<std>": [[images, seconds, distance], ...]}.
    """
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    logged = [record for record in records if "images_per_second" in record]
    steps = np.array([0, *(record["step"] for record in logged)])
    rates = np.array([record["images_per_second"] for record in logged])
    seconds = np.concatenate([[0.0], np.cumsum(np.diff(steps) * batch_size / rates)])
    curve: dict[str, list[list[float]]] = {}
    metric = ""
    for record in records:
        for key, value in record.items():
            if key.startswith(("fid_", "fd_")):
                metric, _, average = key.partition("/")
                at = [record["step"] * batch_size, float(np.interp(record["step"], steps, seconds)), value]
                curve.setdefault(average, []).append(at)
    total = float(seconds[-1])
    rate = float(steps[-1] * batch_size / total)
    return {"seconds": total, "images_per_second": rate, "metric": metric, "curve": curve}


def _read_results(path: Path) -> dict[str, Result]:
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {result["name"]: result for result in map(json.loads, lines)}


def _write_report(results: list[Result], root: Path) -> None:
    write_bytes(root / "recipe.md", table(results).encode())
    write_bytes(root / "recipe.png", _draw(results))


def table(results: list[Result]) -> str:
    """Returns the results as a markdown table, the lowest distance first."""
    averages = sorted({average for result in results for average in result["curve"]})
    ordered = sorted(results, key=lambda result: min(points[-1][2] for points in result["curve"].values()))
    heads = ["variation", "settings", "parameters", "images", "images/s", "minutes"]
    metric = results[0]["metric"] if results else ""
    lines = ["| " + " | ".join([*heads, *(f"{metric} {average}" for average in averages)]) + " |"]
    lines.append("|" + " --- |" * (len(heads) + len(averages)))
    for result in ordered:
        ends = {average: points[-1][2] for average, points in result["curve"].items()}
        cells = [result["name"], result["changes"], f"{result['parameters'] / 1e6:.1f}M", f"{result['images']:,}"]
        cells += [f"{result['images_per_second']:.0f}", f"{result['seconds'] / 60:.1f}"]
        cells += [f"{ends[average]:.2f}" if average in ends else "" for average in averages]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _draw(results: list[Result]) -> bytes:
    """Draws each variation's best tracked average against images and against minutes of training."""
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (column, scale, label) in zip(
        figure.subplots(1, 2, sharey=True), ((0, 1e3, "thousand images"), (1, 60, "minutes of training")), strict=True
    ):
        for result in results:
            tracked = [points for average, points in result["curve"].items() if average.startswith("ema_")]
            best = np.array(min(tracked, key=lambda points: points[-1][2]))
            axes.plot(best[:, column] / scale, best[:, 2], marker="o", markersize=3.5, label=result["name"])
        axes.set_xlabel(label)
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel(f"{results[0]['metric']} (lower is better)" if results else "")
    figure.axes[1].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
