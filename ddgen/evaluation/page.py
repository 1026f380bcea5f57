"""report.html: one page of what was distilled from what, how it looks, what it scores, and how to make it again.

The page is made from what lies in the run folder. Whatever is not there is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddgen import __version__
from ddgen.checkpoint import write_bytes
from ddgen.distill.dataset import DistilledDataset
from ddgen.errors import UserError
from ddgen.evaluation.curve import best_point, describe, read_curves
from ddgen.evaluation.page_classes import class_parts
from ddgen.evaluation.page_html import definitions, document, esc, number, paragraph, section, table, text
from ddgen.evaluation.page_neighbours import neighbours_of
from ddgen.evaluation.page_pictures import (
    MOST_CLASSES,
    average_name,
    best_rejected,
    curve,
    images_by_class,
    kept_captions,
    picture,
    rejected_path,
)
from ddgen.evaluation.page_results import OURS, comparison, result_parts
from ddgen.evaluation.page_run import EvaluatedSet, RunRecord, read_run
from ddgen.evaluation.page_times import time_rows
from ddgen.evaluation.report import format_bytes

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
        _part("recipe", "Recipe", _recipes(run)),
        _part("bytes", "Bytes", [_bytes(run)]),
        _part("time", "Time", [_times(run)]),
        _part("commands", "Commands", _commands(run)),
        _part("provenance", "Provenance", _provenance(run)),
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
        counts = " or ".join(f"{shown.manifest.get('num_images', 0):,}" for shown in known)
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


def _recipes(run: RunRecord) -> list[str]:
    parts: list[str] = []
    known = [shown for shown in run.sets if shown.manifest.get("provenance", {}).get("recipe")]
    for shown in known:
        provenance = shown.manifest["provenance"]
        parts.append(f"<h3>{esc(shown.name)}</h3>" if len(known) > 1 else "")
        recipe = [(str(name), _value(value)) for name, value in provenance["recipe"].items()]
        selection = provenance.get("selection") or {}
        parts += [definitions([*recipe, *_selection(selection)]), _selection_table(selection.get("table") or {})]
    return parts


def _selection(found: Mapping[str, Any]) -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    if found.get("candidates") is not None:
        pairs.append(("candidates", f"{found['candidates']:,}"))
    for name, title, form in (
        ("mean_realism_loss", "mean realism loss", "{:.3f}"),
        ("class_named", "class named by the observer", "{:.1%}"),
    ):
        pool, kept = found.get(f"{name}_pool"), found.get(f"{name}_kept")
        if pool is not None and kept is not None:
            pairs.append((title, f"{form.format(kept)} of the kept, {form.format(pool)} of all candidates"))
    return pairs


def _selection_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What distinguishes the kept images from the candidates and others, where the selection was measured."""
    figures = list(dict.fromkeys(name for row in found.values() for name in row))
    header = [text("images"), *(number(name.replace("_", " ")) for name in figures)]
    body = [
        [text(title), *(number("" if row.get(name) is None else f"{row[name]:.4g}") for name in figures)]
        for title, row in found.items()
    ]
    return table("What the selection chose, means over the classes", header, body) if body else ""


def _bytes(run: RunRecord) -> str:
    rows = []
    for shown in run.sets:
        for key, title in (("image_bytes", "images (PNG)"), ("soft_label_bytes", "soft labels (float16)")):
            if shown.manifest.get(key) is not None:
                rows.append((shown.name, title, shown.manifest[key]))
        for row in shown.results.get("rows", ()):
            if row["images"] == OURS and row.get("label_bytes") is not None:
                title = f"labels as the {row['protocol']} protocol needs them"
                rows.append((shown.name, title, row["label_bytes"]))
            if row["images"] == OURS and not shown.manifest and row.get("image_bytes") is not None:
                rows.append((shown.name, "images (as PNG)", row["image_bytes"]))
    unique = list(dict.fromkeys(rows))
    header = [text("set"), text("stored"), number("size"), number("bytes")]
    body = [
        [text(name), text(title), number(format_bytes(count)), number(f"{count:,}")] for name, title, count in unique
    ]
    return table("What is stored of the distilled images and their labels", header, body) if body else ""


def _times(run: RunRecord) -> str:
    body = [[text(stage), number(time), text(source)] for stage, time, source in time_rows(run)]
    header = [text("stage"), number("time"), text("from")]
    return table("Wall-clock time of the stages that were timed", header, body) if body else ""


def _commands(run: RunRecord) -> list[str]:
    lines = []
    if run.config:
        config = (run.path or Path()) / "config.yaml"
        lines.append(f"accelerate launch train_ldm.py --config {config}")
    for shown in run.sets:
        for found in (shown.manifest.get("provenance", {}).get("command"), shown.provenance.get("command")):
            if found:
                lines.append(str(found))
    if not lines:
        return []
    again = "A finished run is left as it is: to train anew, add another --output_dir." if run.config else ""
    return [
        f"<pre><code>{esc(chr(10).join(dict.fromkeys(lines)))}</code></pre>",
        paragraph(again, "note") if again else "",
    ]


def _provenance(run: RunRecord) -> list[str]:
    data, config = run.dataset, run.config
    skipped = data.get("skipped") or {}
    parts = [
        definitions(
            [
                ("real images", f"{data['num_images']:,}" if data.get("num_images") else None),
                ("unreadable, left out", f"{sum(skipped.values()):,}" if skipped else None),
                ("classes", f"{len(data['class_names']):,}" if data.get("class_names") else None),
                ("fingerprint of the images", data.get("fingerprint")),
                ("licence of the source", data.get("licence")),
                ("observer", _observer(run.observer)),
                ("training", _training(config)),
                ("seed of training", config.get("seed")),
            ]
        )
    ]
    for shown in run.sets:
        inner = definitions(_provenance_of(shown))
        parts += [f"<h3>{esc(shown.name)}</h3>", inner] if inner else []
    if data.get("class_names"):
        names = ", ".join(f"{label} {esc(name)}" for label, name in enumerate(data["class_names"]))
        parts.append(f'<details><summary>Classes in label order</summary>\n<p class="note">{names}</p></details>')
    return parts


def _observer(found: Mapping[str, Any]) -> str | None:
    if not found.get("network"):
        return None
    accuracy = found.get("accuracy")
    return f"{found['network']}" + ("" if accuracy is None else f", {accuracy:.1%} on held-out real images")


def _training(config: Mapping[str, Any]) -> str | None:
    steps, batch = config.get("max_train_steps"), config.get("train_batch_size")
    return None if steps is None or batch is None else f"{steps:,} steps of {batch:,} images"


def _provenance_of(shown: EvaluatedSet) -> list[tuple[str, object]]:
    made, found = shown.manifest.get("provenance", {}), shown.provenance
    results = shown.results
    device = [results.get("device"), results.get("precision") and f"precision {results['precision']}"]
    versions = found.get("versions") or shown.manifest.get("versions") or {}
    return [
        ("images from", None if shown.manifest else found.get("distilled_dir")),
        ("seed of the candidates", made.get("seed")),
        ("fingerprint of the generator", made.get("generator_fingerprint")),
        ("fingerprint of the observer", made.get("observer_fingerprint")),
        ("students trained on", ", ".join(str(part) for part in device if part) or None),
        ("evaluated", found.get("finished")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or None),
    ]


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
