"""What the report page tells of a run in words and figures: recipe, bytes, commands, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddgen.page.html import definitions, esc, number, paragraph, table, text
from ddgen.page.results import OURS
from ddgen.page.run import EvaluatedSet, RunRecord
from ddgen.units import readable_bytes


def recipe_parts(run: RunRecord) -> list[str]:
    """Returns how every set was made and what its selection did."""
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


def bytes_table(run: RunRecord) -> str:
    """Returns what is stored of every set: images, soft labels, and labels as each recipe needs them."""
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
        [text(name), text(title), number(readable_bytes(count)), number(f"{count:,}")] for name, title, count in unique
    ]
    return table("What is stored of the distilled images and their labels", header, body) if body else ""


def command_parts(run: RunRecord) -> list[str]:
    """Returns the commands that make all of it again, as far as they were recorded."""
    lines = [str(line["command"]) for line in run.history if line.get("command")]
    if run.config and not lines:
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


def provenance_parts(run: RunRecord) -> list[str]:
    """Returns where data, generator and scores come from."""
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
        ("fingerprint of the generator", (made.get("candidates") or {}).get("generator")),
        ("fingerprint of the observer", made.get("observer_fingerprint")),
        ("students trained on", ", ".join(str(part) for part in device if part) or None),
        ("evaluated", found.get("finished")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or None),
    ]


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
