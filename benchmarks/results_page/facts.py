"""What was trained in a run, and the sets that were made with it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddgen.checkpoint import read_json
from ddgen.evaluation.curve import best_point, describe
from ddgen.hardware import peak_flops
from ddgen.page.run import EvaluatedSet, RunRecord
from ddgen.units import readable_bytes
from results_page.scores import teachers_of
from results_page.small import MISSING, count, first, shorten_path, table
from results_page.work import card_of


def trained_table(run: RunRecord) -> str:
    """Returns the images, the networks and the speed of training."""
    config, data = run.config, run.dataset
    results = next((shown.results for shown in run.sets if shown.results), {})
    real = f"{data['num_images']:,} for training" if data.get("num_images") else MISSING
    tested = f", {results['num_test']:,} for testing" if results.get("num_test") else ""
    size = f", {results['image_size']} px" if results.get("image_size") else ""
    classes = f"{len(data['class_names']):,} classes, " if data.get("class_names") else ""
    rows = [
        ("real images", f"{classes}{real}{tested}{size}; fingerprint `{data.get('fingerprint', MISSING)}`"),
        ("observer", _observer(run)),
        ("autoencoder", _autoencoder(run)),
        ("diffusion model", _diffusion(run)),
        ("speed of training", _speed(run)),
        ("seed of training", str(first(config.get("seed"), MISSING))),
    ]
    return table(("what was trained", ""), rows)


def _observer(run: RunRecord) -> str:
    found = run.observer
    if not found.get("network"):
        return MISSING
    text = str(found["network"])
    if found.get("accuracy") is not None:
        text += f", {100 * found['accuracy']:.1f} % on held-out training images"
    tested = teachers_of(run).get(found["network"])
    text += f", {100 * tested:.1f} % on the test images" if tested is not None else ""
    given, epochs = run.config.get("observer"), run.config.get("observer_epochs")
    if given:
        return f"{text}; given (`{shorten_path(str(given))}`), not trained in this run"
    return f"{text}; {count(epochs, 'epoch')}" if epochs else text


def _autoencoder(run: RunRecord) -> str:
    if run.config.get("space") == "pixel":
        return "none: pixels are diffused"
    path = (run.path or Path()) / "autoencoder" / "latents.json"
    found = (read_json(path) if path.is_file() else {}) | dict(run.reconstruction)
    parts = [f"{found['psnr']:.1f} dB on held-out images" if "psnr" in found else MISSING]
    parts += [f"patch PCA {found['psnr_pca']:.1f} dB"] if "psnr_pca" in found else []
    if found.get("accuracy_reconstructed") is not None and found.get("accuracy") is not None:
        seen, before = 100 * found["accuracy_reconstructed"], 100 * found["accuracy"]
        which = f"of {count(found['num_images'], 'image')} the observer gets {before:.1f} % right"
        parts.append(f"{which}, {seen:.1f} % once reconstructed")
    given = run.config.get("vae")
    return ", ".join(parts) + (f"; given (`{shorten_path(str(given))}`), not trained in this run" if given else "")


def _diffusion(run: RunRecord) -> str:
    config, card = run.config, card_of(run)
    steps, batch = config.get("max_train_steps"), config.get("train_batch_size")
    made = next((s.manifest["provenance"]["recipe"].get("generator") for s in run.sets if _recipe(s)), None)
    parts = [str(first(card.get("denoiser"), made, MISSING))]
    parts += [card["objective"]] if "objective" in card else []
    if steps and batch:
        real = run.dataset.get("num_images")
        epochs = f", {steps * batch / real:.1f} epochs" if real else ""
        parts.append(f"{steps:,} steps of {batch:,}: {steps * batch:,} images{epochs}")
    return "; ".join(parts)


def _speed(run: RunRecord) -> str:
    rates = [line["images_per_second"] for line in run.metrics if line.get("images_per_second")]
    flops = [line["tflops"] for line in run.metrics if line.get("tflops")]
    if not rates:
        return MISSING
    text = f"{statistics.median(rates):,.0f} images/s, median"
    if flops:
        machine: Mapping[str, Any] = next((line["made_with"] for line in run.history if "made_with" in line), {})
        peak = peak_flops(machine.get("device", ""), machine.get("precision", "no"))
        share = f", {100e12 * statistics.median(flops) / peak:.0f} % of the device's peak" if peak else ""
        text += f"; {statistics.median(flops):.3g} TFLOP/s a process{share}"
    return text


def _recipe(shown: EvaluatedSet) -> Mapping[str, Any]:
    return shown.manifest.get("provenance", {}).get("recipe") or {}


def sets_table(run: RunRecord) -> str:
    """Returns how every set was made, and what its selection did."""
    body = []
    for shown in run.sets:
        made, recipe = shown.manifest.get("provenance", {}), _recipe(shown)
        if not shown.manifest:
            continue
        chosen = made.get("selection") or {}
        kept, pool = chosen.get("class_named_kept"), chosen.get("class_named_pool")
        named = f"{100 * kept:.0f} % of kept, {100 * pool:.0f} % of all" if None not in (kept, pool) else MISSING
        sampling = [str(recipe[key]) for key in ("sampler", "guidance") if key in recipe]
        sampling += [f"steered {recipe['steering']}"] if "steering" in recipe else []
        made_of, ipc = chosen.get("candidates"), shown.manifest.get("ipc")
        stored = [readable_bytes(shown.manifest[key]) for key in ("image_bytes", "soft_label_bytes")]
        body.append(
            (
                shown.name, f"{shown.manifest.get('num_images', 0):,} ({ipc} a class)",
                f"{made_of:,}" if made_of is not None else str(recipe.get("images", MISSING)),
                str(first(recipe.get("selection"), chosen.get("rule"), MISSING)), named, "; ".join(sampling) or MISSING,
                str(first(made.get("seed"), MISSING)), " + ".join(stored),
            )
        )  # fmt: skip
    heads = ("set", "images", "candidates", "rule", "class named by the observer", "sampling", "seed", "bytes + labels")
    return table(heads, body) if body else "None."


def ranking_parts(run: RunRecord) -> list[str]:
    """Returns how well sets order candidates, where that was measured: every rank correlation and its interval."""
    parts, titles = [], ("images", "epochs", "Spearman", "interval", "Kendall", "interval")
    for shown in run.sets:
        found = shown.results.get("ranking")
        if not found:
            continue
        body = [
            (each["images"], str(each["epochs"]), *_correlation(each["spearman"]), *_correlation(each["kendall"]))
            for each in found["sets"]
        ]
        parts.append(
            f"Rank correlation, {shown.name}: does a set order {len(found['candidates'])} candidates, one student each,"
            f" as {count(found['real_epochs'], 'epoch')} on all real images do? Recipe `{found['protocol']}`; intervals"
            " are bootstrapped over the candidates."
        )
        parts.append(table(titles, body))
        lost = [f"- {name}: the loss diverged, which counts as chance." for name in found.get("diverged") or ()]
        parts += ["\n".join(lost)] if lost else []
    return parts


def _correlation(found: Mapping[str, float | None]) -> tuple[str, str]:
    """Returns value and interval; there are none where all candidates are equally good."""
    if found["value"] is None:
        return "none", ""
    return f"{found['value']:.2f}", f"{found['low']:.2f} to {found['high']:.2f}"


def curve_text(run: RunRecord) -> str:
    """Returns the best point of the FD curve and what it measures."""
    path = (run.path or Path()) / "metrics.jsonl"
    best = best_point(path) if path.is_file() else None
    if best is None:
        return "Not measured."
    metric, step, average, value = best
    return f"Lowest `{metric}`: {value:.4g} at step {step:,.0f}, {average}. {describe(metric)}; lower is better."
