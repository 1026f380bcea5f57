"""report.html: one page of what was distilled from what, how it looks, what it scores, and how to make it again.

The page is made from what lies in the run folder. Whatever is not there is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ddgen import __version__
from ddgen.checkpoint import write_bytes
from ddgen.distill.dataset import DistilledDataset
from ddgen.errors import UserError
from ddgen.evaluation.curve import best_point, describe, read_curves
from ddgen.page.classes import class_parts
from ddgen.page.facts import bytes_table, command_parts, provenance_parts, recipe_parts
from ddgen.page.html import definitions, document, esc, number, paragraph, section, table, text
from ddgen.page.neighbours import neighbours_of
from ddgen.page.pictures import (
    MOST_CLASSES,
    average_name,
    best_rejected,
    curve,
    images_by_class,
    kept_captions,
    picture,
    rejected_path,
)
from ddgen.page.results import OURS, comparison, result_parts
from ddgen.page.run import EvaluatedSet, RunRecord, read_run
from ddgen.page.times import time_rows

Section = tuple[str, str, str]
MOST_SETS_WITH_PICTURES = 3  # keeps the page at a few MB


def write_page(run_dir: Path | None, path: Path, evaluation_dir: Path | None = None) -> Path:
    """Writes the page of a run, whole or not at all.

    Args:
        run_dir: The run folder; None for an evaluation outside any run.
        path: The page.
        evaluation_dir: Tell of this evaluation alone; default all of the run's.

    Returns:
        `path`.

    Raises:
        UserError: A file of the run is damaged.
    """
    write_bytes(path, render_page(read_run(run_dir, evaluation_dir)).encode())
    return path


def write_page_of(run_dir: Path | None, evaluation_dir: Path) -> Path:
    """Writes the page that an evaluation belongs to: its run's, or one of its own where it lies outside of that."""
    if run_dir is not None and evaluation_dir.resolve().parent == (run_dir / "evaluation").resolve():
        return write_page(run_dir, run_dir / "report.html")
    return write_page(run_dir, evaluation_dir / "report.html", evaluation_dir)


def render_page(run: RunRecord) -> str:
    """Returns the page as HTML without any address outside of it."""
    sections = [
        _part("results", "Results", _results(run)),
        _part("images", "Images", _images(run)),
        _part("generator", "Generator", _generator(run)),
        _part("recipe", "Recipe", recipe_parts(run)),
        _part("bytes", "Bytes", [bytes_table(run)]),
        _part("time", "Time", [_times(run)]),
        _part("commands", "Commands", command_parts(run)),
        _part("provenance", "Provenance", provenance_parts(run)),
    ]
    name = _dataset_name(run)
    return document(f"{name}, distilled", _lead(run), sections, f"Written by ddgen {__version__}.")


def _part(name: str, title: str, parts: Sequence[str]) -> Section:
    return name, title, section(name, title, parts)


def _dataset_name(run: RunRecord) -> str:
    found = [run.dataset.get("name"), *(shown.results.get("dataset") for shown in run.sets), run.config.get("dataset")]
    return str(next((name for name in found if name), "A dataset"))


def _lead(run: RunRecord) -> str:
    """What was distilled from what, and the first score."""
    classes = run.dataset.get("class_names") or []
    known = [shown for shown in run.sets if shown.manifest]
    sentences = []
    if known:
        counts = " or ".join(dict.fromkeys(f"{shown.manifest.get('num_images', 0):,}" for shown in known))
        real = f" stand in for {run.dataset['num_images']:,} real ones" if run.dataset.get("num_images") else ""
        of = f" of {len(classes):,} classes" if classes else ""
        sentences.append(f"{counts} images{of}{real}.")
    elif run.dataset.get("num_images"):
        sentences.append(f"A run on {run.dataset['num_images']:,} images of {len(classes):,} classes.")
    scored = [shown for shown in run.sets if shown.results.get("rows")]
    if scored:
        own = [shown for shown in scored if shown.manifest]
        sentences.append(_first_score((own or scored)[-1]))
    return " ".join(sentences)


def _first_score(shown: EvaluatedSet) -> str:
    rows = shown.results["rows"]
    first = next((row for row in rows if row["images"] == OURS), rows[0])
    alike = [row for row in rows if (row["protocol"], row["student"]) == (first["protocol"], first["student"])]
    others = ", ".join(f"{100 * row['mean']:.1f}\u00a0% on {row['images']} images" for row in alike if row is not first)
    return (
        f"A {first['student']} trained on the {first['images']} images of {shown.name} by the {first['protocol']} "
        f"protocol gets {100 * first['mean']:.1f}\u00a0% of the real test images right"
        + (f"; {others}." if others else ".")
    )


def _results(run: RunRecord) -> list[str]:
    scored = [shown for shown in run.sets if shown.results.get("rows")]
    parts = [comparison(scored)]
    for shown in scored:
        title = f"<h3>{esc(shown.name)}</h3>" if len(scored) > 1 else ""
        names = shown.manifest.get("class_names") or run.dataset.get("class_names") or []
        parts += [title, *result_parts(shown), *class_parts(shown.results, names)]
    return parts


def _images(run: RunRecord) -> list[str]:
    shown_sets = [shown for shown in run.sets if shown.distilled_dir is not None]
    parts: list[str] = []
    for shown in shown_sets[-MOST_SETS_WITH_PICTURES:]:
        title = f"<h3>{esc(shown.name)}</h3>" if len(shown_sets) > 1 else ""
        parts += [title, *_images_of(run, shown)]
    if len(shown_sets) > MOST_SETS_WITH_PICTURES:
        names = ", ".join(shown.name for shown in shown_sets[:-MOST_SETS_WITH_PICTURES])
        parts.append(paragraph(f"Without pictures, to keep the page small: {names}.", "note"))
    if run.path is not None:
        parts.append(
            picture(
                run.path / "samples" / "nearest_training.png",
                "Generated images, each left of the training images nearest to it",
                "The generated images that are closest to a training image, each left of those nearest to it.",
            )
        )
    return parts


def _images_of(run: RunRecord, shown: EvaluatedSet) -> list[str]:
    assert shown.distilled_dir is not None
    try:
        dataset = DistilledDataset.load(shown.distilled_dir)
    except UserError as error:
        return [paragraph(f"The images are not shown: {error}", "note")]
    k = len(dataset.class_names)
    which = f"{MOST_CLASSES} of {k} classes, evenly chosen" if k > MOST_CLASSES else "Every class"
    parts = [
        paragraph(
            f"{which}. Below each kept image: the probability that the observer gives to its class, from which its "
            "realism loss is the negative logarithm; marked where the observer favours another class."
        ),
        images_by_class(dataset.pixels, dataset.labels, kept_captions(dataset), dataset.class_names, "kept image"),
    ]
    run_dir = run.path
    rejected = best_rejected(rejected_path(run_dir, shown.distilled_dir), dataset.class_names) if run_dir else ""
    if rejected:
        parts += ["<h3>Best rejected candidates</h3>", paragraph("The most realistic of those not kept."), rejected]
    neighbours = neighbours_of(shown.evaluation_dir, dataset) if shown.evaluation_dir is not None else ""
    if neighbours:
        parts += ["<h3>Nearest real images</h3>", neighbours]
    return parts


def _generator(run: RunRecord) -> list[str]:
    if run.path is None or not run.metrics:
        return []
    curves = read_curves(run.path / "metrics.jsonl")
    parts = []
    if curves:
        best = best_point(run.path / "metrics.jsonl")
        if best is not None:
            metric, step, average, value = best
            lowest = f"Lowest: {value:.4g} at step {step:,.0f}, {average_name(average)}."
            parts.append(curve(metric, curves[metric], lowest))
        parts.append(_last_measures(curves))
    grids = sorted((run.path / "samples").glob("step-*.png"))
    if grids:
        step = int("".join(filter(str.isdigit, grids[-1].stem)) or 0)
        parts.append(
            picture(
                grids[-1], f"Grid of generated images at step {step:,}, a class a row",
                f"Samples of the generator at step {step:,}, a class a row, no choice made.",
            )
        )  # fmt: skip
    parts += _autoencoder(run)
    return parts


def _last_measures(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> str:
    """What was measured last of every measure, the averages of the weights side by side."""
    averages = list(dict.fromkeys(name for series in curves.values() for name in series))
    header = [text("measure"), number("at step"), *(number(average_name(name)) for name in averages)]
    body = []
    for metric, series in curves.items():
        step = max(points[-1][0] for points in series.values())
        values = [f"{series[name][-1][1]:.4g}" if name in series else "" for name in averages]
        body.append([text(describe(metric)), number(f"{step:,.0f}"), *map(number, values)])
    return table("What was measured last, by average of the weights", header, body)


def _autoencoder(run: RunRecord) -> list[str]:
    found = run.reconstruction
    pairs: list[tuple[str, object]] = [
        (_reconstruction_words(name), f"{value:.1%}" if name.startswith("accuracy") else f"{value:.4g}")
        for name, value in found.items()
        if isinstance(value, float)
    ]
    if found.get("num_images"):
        pairs.append(("measured on", f"{found['num_images']:,} images the observer has not seen"))
    path = run.path or Path()
    shown = picture(
        path / "samples" / "reconstructions.png",
        "Real images above what the autoencoder makes of them",
        "Real images, and what the autoencoder makes of them.",
    )
    return ["<h3>Autoencoder</h3>", definitions(pairs), shown] if pairs or shown else []


def _reconstruction_words(name: str) -> str:
    words = {"psnr": "PSNR in dB", "accuracy": "observer on the real images",
             "accuracy_reconstructed": "observer on reconstructions"}  # fmt: skip
    return words.get(name, "Fréchet distance of reconstructions" if name.startswith(("rfd", "rfid")) else name)


def _times(run: RunRecord) -> str:
    body = [[text(stage), number(time), text(source)] for stage, time, source in time_rows(run)]
    header = [text("stage"), number("time"), text("from")]
    return table("Wall-clock time of the stages that were timed", header, body) if body else ""
