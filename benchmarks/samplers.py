"""What samplers and guidance give: distance against evaluations, and against guidance what a student learns.

    python benchmarks/samplers.py --run_dir runs/cifar10

Draws the same `--num_images` (seed, class, index) of a finished run with every setting, so settings differ by nothing
but themselves, and measures them as the FID curve does. Two studies:

- samplers: Fréchet distance against evaluations of the denoiser per image, without guidance, for every sampler; and
  the stock way, 50 steps of DDIM guided at every one.
- guidance: distance, precision, recall, coverage and the accuracy of students (protocol `rded`) against the guidance
  scale, everywhere and inside the run's interval, and by a guide (`--guide`) where there is one.

Into --output_dir go results.jsonl, samplers.md and samplers.png, guidance.md and guidance.png. The same command goes on
where it was stopped.
"""

from __future__ import annotations

import io
import itertools
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from ddgen.checkpoint import write_bytes
from ddgen.commands.runs import find_run, load_on_all, read_run_config, start_accelerator
from ddgen.commands.train_curve import monitor_of_run
from ddgen.config import FAST, GuidanceConfig
from ddgen.data import ImageDataset
from ddgen.diffusion.autoguidance import find_guide
from ddgen.diffusion.generator import Generator, Guide, load_generator
from ddgen.diffusion.samplers import num_evaluations
from ddgen.distill.select import select_most_realistic, select_random
from ddgen.errors import UserError
from ddgen.evaluation.extractors import choose_extractor
from ddgen.evaluation.monitor import DistanceMonitor
from ddgen.evaluation.protocol_files import get_protocol
from ddgen.evaluation.students import IMAGENET_LOOK, Job, TrainingImages, train_student
from ddgen.observer.observer import Observer
from ddgen.observer.realism import realism_scores
from ddgen.seeds import numpy_generator

Result = dict[str, Any]
SAMPLERS = ("ddim", "dpmsolver++", "unipc", "ipndm", "heun")
STEPS_OF_STOCK = 50


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    run_dir: str | None = None
    """A finished training run. Default: the newest under runs/."""
    output_dir: str | None = None
    """Where results go. Default: <run_dir>/samplers."""
    studies: tuple[str, ...] = ("samplers", "guidance")
    """Which studies."""
    samplers: tuple[str, ...] = SAMPLERS
    """Which samplers."""
    evaluations: tuple[int, ...] = (5, 6, 8, 10, 14, 20)
    """Evaluations of the denoiser per image."""
    scales: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
    """Guidance scales."""
    guidance_sampler: str = "dpmsolver++"
    """Sampler of the guidance study."""
    guidance_steps: int = 10
    """Its steps."""
    guide: str = "auto"
    """What guides in the rows "by the guide": `auto`, `none` or a path, as sample.py takes it."""
    num_images: int = 2000
    """Images of every setting."""
    batch_size: int = 125
    """Images sampled together."""
    ipc: int = 10
    """Images per class that students see."""
    candidates_per_image: int = 4
    """Candidates of which one is kept."""
    repeats: int = 2
    """Students of every setting; 0 leaves them out."""
    epochs: int | None = None
    """Epochs of students instead of the protocol's."""
    num_test_images: int | None = None
    """Real test images, drawn at random, that score students. Default: all."""
    seed: int = 0
    """Seed of images and students."""


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    settings: Settings
    generator: Generator
    guide: Guide | None
    observer: Observer
    monitor: DistanceMonitor
    test: ImageDataset | None
    flip: bool
    precision: str


def main(argv: list[str] | None = None) -> int:
    """Measures what has not been yet, and writes tables and pictures."""
    settings = tyro.cli(Settings, args=argv, use_underscores=True)
    try:
        return _main(settings)
    except UserError as error:
        print(f"samplers: {error}", file=sys.stderr)
        return 2


def _main(settings: Settings) -> int:
    run_dir, _ = find_run(settings.run_dir)
    root = Path(settings.output_dir or run_dir / "samplers")
    bench = _open(settings, run_dir, root)
    done = _read(root / "results.jsonl")
    for name, changes in _wanted(settings, bench):
        if name in done:
            continue
        done[name] = _measure(bench, name, changes)
        with open(root / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(done[name]) + "\n")
        print(name, _short(done[name]), flush=True)
    write_report(list(done.values()), root)
    return 0


def _open(settings: Settings, run_dir: Path, root: Path) -> Bench:
    config = read_run_config(run_dir)
    accelerator, precision = start_accelerator(None)
    train = load_on_all(accelerator, config.data, "train")
    with_students = "guidance" in settings.studies and settings.repeats
    test = _some(load_on_all(accelerator, config.data, "test"), settings) if with_students else None
    generator = load_generator(run_dir / "generator", accelerator.device, precision)
    observer = Observer.load(run_dir / "observer", generator.class_names).to(accelerator.device)
    measured = replace(config, monitor=replace(config.monitor, fid_num_images=settings.num_images))
    extractor = choose_extractor(config.monitor.fd_network, config.monitor.inception_weights)
    root.mkdir(parents=True, exist_ok=True)
    monitor = monitor_of_run(measured, train, observer, extractor, root, accelerator)
    guide = find_guide(settings.guide, run_dir / "generator", generator)
    return Bench(settings, generator, guide, observer, monitor, test, config.data.may_flip, precision)


def _some(test: ImageDataset, settings: Settings) -> ImageDataset:
    order = numpy_generator(settings.seed, "samplers-test").permutation(len(test))[: settings.num_test_images]
    rows = torch.from_numpy(order)
    return replace(test, pixels=test.pixels[rows], labels=test.labels[rows])


def _wanted(settings: Settings, bench: Bench) -> list[tuple[str, dict[str, Any]]]:
    """Returns the name and the sampling settings of everything to measure."""
    generator = bench.generator
    wanted: list[tuple[str, dict[str, Any]]] = []
    if "samplers" in settings.studies:
        for sampler in settings.samplers:
            for evaluations in settings.evaluations:
                steps = next((s for s in range(1, 1001) if num_evaluations(sampler, s) >= evaluations), 1)
                if num_evaluations(sampler, steps) in (evaluations, evaluations - 1, evaluations + 1):
                    unguided = {"sampler": sampler, "num_inference_steps": steps, "guidance_scale": 1.0}
                    wanted.append((f"{sampler} {steps}", unguided))
        default = {"sampler": GuidanceConfig().sampler, "num_inference_steps": GuidanceConfig().steps}
        for name, changes in (("default", default), ("fast", FAST)):
            wanted.append((f"{name}, guided inside", changes))
        everywhere = {"guidance_interval": (0.0, 1.0), "guidance_scale": generator.sampling.guidance_scale}
        stock = {"sampler": "ddim", "num_inference_steps": STEPS_OF_STOCK, **everywhere}
        wanted.append((f"ddim {STEPS_OF_STOCK} guided at every step", stock))
        wanted.append((f"ddim {STEPS_OF_STOCK}", {**stock, "guidance_scale": 1.0}))
    if "guidance" in settings.studies:
        shared = {"sampler": settings.guidance_sampler, "num_inference_steps": settings.guidance_steps}
        inside = tuple(generator.sampling.guidance_interval)
        for scale in settings.scales:
            for where, interval in (("everywhere", (0.0, 1.0)), ("inside", inside)):
                if scale != 1 or where == "inside":
                    changes = {**shared, "guidance_scale": scale, "guidance_interval": interval, "students": True}
                    wanted.append((f"guidance {scale:g} {where}", changes))
            if bench.guide is not None and scale != 1:
                changes = {**shared, "guidance_scale": scale, "guidance_interval": inside, "students": True}
                wanted.append((f"guidance {scale:g} by the guide", {**changes, "guide": bench.guide.fingerprint}))
    return wanted


def _measure(bench: Bench, name: str, changes: dict[str, Any]) -> Result:
    """Draws the images of one setting and measures them."""
    settings = bench.settings
    sampling = {key: value for key, value in changes.items() if key not in ("students", "guide")}
    generator = bench.generator.with_sampling(**sampling)
    if "guide" in changes:
        generator = replace(generator, guide=bench.guide)
    classes = len(generator.class_names)
    labels = torch.arange(settings.num_images) % classes
    indices = torch.arange(settings.num_images) // classes
    start, processor = time.perf_counter(), time.process_time()
    parts = []
    for at in tqdm(range(0, len(labels), settings.batch_size), desc=name, unit="batch", leave=False):
        part = slice(at, at + settings.batch_size)
        parts.append(generator.sample(labels[part], indices[part], settings.seed))
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    pixels = torch.cat(parts)
    found: Result = {
        "name": name,
        **generator.sampling.to_dict(),
        **changes,
        "seconds": seconds,
        "processor_seconds": processor,
    }
    found |= bench.monitor(pixels, labels)
    bench.monitor.suspects.clear()
    if changes.get("students") and settings.repeats:
        found |= _students(bench, pixels, labels)
    return found


def _students(bench: Bench, pixels: Tensor, labels: Tensor) -> Result:
    """Trains students on the most realistic and on random images of every class."""
    settings, classes = bench.settings, len(bench.generator.class_names)
    count = settings.ipc * settings.candidates_per_image
    if count * classes > len(labels):
        raise UserError(f"--num_images {len(labels)}: --ipc and --candidates_per_image need {count * classes}")
    scores = realism_scores(
        bench.observer, pixels, labels, batch_size=250, device=bench.monitor.device, precision=bench.precision
    )
    kept: dict[str, list[Tensor]] = {"realism": [], "random": []}
    for label in range(classes):
        members = (labels == label).nonzero().flatten()[:count]
        kept["realism"].append(members[select_most_realistic(scores.loss[members], settings.ipc)])
        kept["random"].append(members[select_random(count, settings.ipc, settings.seed, label)])
    assert bench.test is not None
    found: Result = {}
    for rule, parts in kept.items():
        rows = torch.cat(parts)
        found[f"student_{rule}"] = [
            train_student(
                Job(
                    "convnet3", get_protocol("rded"), TrainingImages(pixels[rows], labels[rows]), classes, settings.ipc,
                    bench.test, [bench.observer], bench.monitor.device, bench.precision, seed=repeat,
                    epochs=settings.epochs, look=replace(IMAGENET_LOOK, flip=bench.flip),
                )
            ).accuracy_last
            for repeat in range(settings.repeats)
        ]  # fmt: skip
    return found


def _read(path: Path) -> dict[str, Result]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {result["name"]: result for result in map(json.loads, lines)}


def _short(result: Result) -> str:
    return " ".join(f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, float))


def _distance(result: Result) -> tuple[str, float]:
    return next((key, value) for key, value in result.items() if key.startswith(("fid_", "fd_")))


def _value(result: Result, kind: str) -> float:
    return next(float(value) for key, value in result.items() if key.startswith(f"{kind}_"))


def evaluations_of(result: Result) -> int:
    """Returns how many evaluations of the denoiser an image of a setting costs at most; a guided step costs two."""
    steps = num_evaluations(result["sampler"], result["num_inference_steps"])
    if result["guidance_scale"] == 1:
        return steps
    low, high = result["guidance_interval"]
    return steps + round(steps * (high - low))


def write_report(results: list[Result], root: Path) -> None:
    """Writes tables and pictures of everything that was measured."""
    unguided = [r for r in results if "students" not in r]
    guided = [r for r in results if "students" in r]
    if unguided:
        write_bytes(root / "samplers.md", _sampler_table(unguided).encode())
        write_bytes(root / "samplers.png", _draw_samplers(unguided))
        print(_sampler_table(unguided))
    if guided:
        write_bytes(root / "guidance.md", _guidance_table(guided).encode())
        write_bytes(root / "guidance.png", _draw_guidance(guided))
        print(_guidance_table(guided))


def _sampler_table(results: list[Result]) -> str:
    metric = _distance(results[0])[0]
    lines = [f"| sampler | steps | evaluations | {metric} | KID | recall | processor seconds |", "|" + " --- |" * 7]
    for r in sorted(results, key=lambda r: (r["sampler"], evaluations_of(r))):
        name = r["sampler"]
        if r["guidance_scale"] != 1:
            low, high = r["guidance_interval"]
            name += " guided at every step" if (low, high) == (0, 1) else f" guided in {low:g} to {high:g}"
        numbers = f"{_distance(r)[1]:.1f} | {_value(r, 'kid'):.4f} | {_value(r, 'recall'):.2f}"
        steps = f"{r['num_inference_steps']} | {evaluations_of(r)}"
        lines.append(f"| {name} | {steps} | {numbers} | {r['processor_seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def _guidance_table(results: list[Result]) -> str:
    metric = _distance(results[0])[0]
    heads = ["guidance", metric, "precision", "recall", "coverage", "consistency", "student", "student, random images"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for r in results:
        kinds = ("precision", "recall", "coverage", "consistency")
        cells = [r["name"].removeprefix("guidance "), f"{_distance(r)[1]:.1f}"]
        cells += [f"{_value(r, kind):.2f}" for kind in kinds]
        cells += [_mean_of(r.get(f"student_{rule}", [])) for rule in ("realism", "random")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean_of(scores: list[float]) -> str:
    return f"{100 * sum(scores) / len(scores):.1f} ({', '.join(f'{100 * s:.1f}' for s in scores)})" if scores else ""


def _draw_samplers(results: list[Result]) -> bytes:
    figure = Figure(figsize=(7, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for sampler in SAMPLERS:
        found = [r for r in results if r["sampler"] == sampler and r["guidance_scale"] == 1]
        points = sorted((evaluations_of(r), _distance(r)[1]) for r in found)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=sampler)
    guided = [r for r in results if r["guidance_scale"] != 1]
    for marker, r in zip(itertools.cycle("*Ds^v"), guided, strict=False):
        label = f"{r['sampler']} {r['num_inference_steps']}, guided{'' if 'inside' in r['name'] else ' at every step'}"
        axes.plot(evaluations_of(r), _distance(r)[1], f"k{marker}", markersize=7, label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="evaluations of the denoiser per image", ylabel=_distance(results[0])[0]
    )
    axes.set_xticks(ticks := [5, 6, 8, 10, 15, 20, 50, 100], [f"{tick}" for tick in ticks])
    axes.xaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    return _png(figure)


def _draw_guidance(results: list[Result]) -> bytes:
    figure = Figure(figsize=(12, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    unguided = [r for r in results if r["guidance_scale"] == 1]
    for where in ("everywhere", "inside", "by the guide"):
        found = [*unguided, *(r for r in results if r["name"].endswith(where) and r["guidance_scale"] != 1)]
        if len(found) <= len(unguided):
            continue
        found.sort(key=lambda r: r["guidance_scale"])
        scales = [r["guidance_scale"] for r in found]
        panels[0].plot(scales, [_distance(r)[1] for r in found], marker="o", label=where)
        panels[1].plot(scales, [_value(r, "coverage") for r in found], marker="o", label=where)
        for rule, style in (("realism", "-"), ("random", ":")):
            with_students = [r for r in found if r.get(f"student_{rule}")]
            means = [100 * sum(r[f"student_{rule}"]) / len(r[f"student_{rule}"]) for r in with_students]
            colour = panels[0].lines[-1].get_color()
            label = f"{where}, {'kept by realism' if rule == 'realism' else 'random'}"
            scales_of = [r["guidance_scale"] for r in with_students]
            panels[2].plot(scales_of, means, style, marker="o", color=colour, label=label)
    titles = (_distance(results[0])[0] + " (low is good)", "coverage (high is good)", "student's accuracy in percent")
    for panel, title in zip(panels, titles, strict=True):
        panel.set(xlabel="guidance scale", title=title)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
