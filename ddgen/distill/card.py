"""The README.md of a distilled dataset: a card for people, with a header for the hub and for `datasets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ddgen.units import readable_bytes

RESULTS_BEGIN, RESULTS_END = "<!-- results: written by evaluate.py -->", "<!-- end of results -->"
VIEWS_BEGIN, VIEWS_END = "<!-- stored views: written by ddgen label -->", "<!-- end of stored views -->"
HUB_LICENCES = ("mit", "apache-2.0", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "openrail")
NOT_EVALUATED = (
    "Not evaluated yet; `python evaluate.py --distilled_dir <this folder>` trains students and fills this in."
)


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Attributes:
        provenance: See `DistilledDataset`.
        class_names: In label order.
        folder_names: Folder of each class under ``train/``.
        images_per_class: Smallest and largest number of images of a class.
        num_images: All images.
        image_size: Height and width.
        probability: Mean probability the observer gives to an image's class.
        agreement: Part of the images whose most probable class is their label, 0..1.
        num_bytes: What is stored -> bytes.
        has_selection_picture: Whether selection.png is there.
    """

    provenance: Mapping[str, Any]
    class_names: Sequence[str]
    folder_names: Sequence[str]
    images_per_class: tuple[int, int]
    num_images: int
    image_size: tuple[int, int]
    probability: float
    agreement: float
    num_bytes: Mapping[str, int]
    has_selection_picture: bool = False


def render_card(facts: CardFacts) -> str:
    """Writes the card: YAML header, what it is, how to load it, results, recipe, bytes, classes, licence, command."""
    sections = [
        _header(facts) + "\n" + _introduction(facts),
        _loading(facts),
        "## Results\n\n" + _results_block(NOT_EVALUATED),
        _recipe(facts),
        *_selection(facts),
        _bytes(facts),
        _classes(facts),
        _licence(facts),
    ]
    return "\n\n".join(sections) + "\n"


def with_results(card: str, results: Mapping[str, Any]) -> str:
    """Puts results into a card, in the place of earlier ones.

    Args:
        card: A card as `render_card` wrote it, edited by hand or not.
        results: The contents of results.json. Needed: `rows`, mappings with `images`, `protocol`, `student`, `epochs`,
            `scores` (one fraction 0..1 per student), `mean`, `std` (or None) and `best_epoch_mean`. Told when there:
            `num_test`, `seed`, `teachers` (name -> fraction), `epochs_override` and `epochs_changed`.
    """
    block = _results_block(_results_table(results))
    before, begin, rest = card.partition(RESULTS_BEGIN)
    _, end, after = rest.partition(RESULTS_END)
    if begin and end:
        return before + block + after
    return card.rstrip() + "\n\n## Results\n\n" + block + "\n"


def with_views(card: str, name: str, facts: Mapping[str, Any] | None) -> str:
    """Puts what is known of stored views into a card, in the place of what was known of earlier ones.

    Args:
        card: A card as `render_card` wrote it, edited by hand or not.
        name: Name of their file.
        facts: Fact -> value, JSON; None takes the section out.
    """
    before, begin, rest = card.partition(VIEWS_BEGIN)
    _, end, after = rest.partition(VIEWS_END)
    if not (begin and end):
        before, heading, after = card.partition("## Classes")
        after = heading + after
    before, after = before.rstrip(), after.lstrip()
    if facts is None:
        return f"{before}\n\n{after}"
    rows = [f"| {_cell(key)} | {_cell(_fact(key, value))} |" for key, value in facts.items()]
    table = "\n".join(["| stored views | |", "|---|---|", *rows])
    text = (
        f"## Stored labels of augmented views\n\n`{name}` holds the observer's logits of augmented and mixed views of"
        " the images, and the seeds that make these views again: a student sees exactly what the observer labelled, and"
        f" needs no observer (`python evaluate.py --distilled_dir <this folder> --protocols stored`).\n\n{table}"
    )
    return f"{before}\n\n{VIEWS_BEGIN}\n\n{text}\n\n{VIEWS_END}\n\n{after}"


def _header(facts: CardFacts) -> str:
    count = facts.num_images
    sizes = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    header = {
        "pretty_name": f"{_source(facts)}, distilled to {_per_class(facts)} images per class",
        **_hub_licence(str(facts.provenance.get("licence") or "")),
        "task_categories": ["image-classification"],
        "size_categories": [next((name for limit, name in sizes if count < limit), "1M<n<10M")],
        "tags": ["dataset-distillation", *([] if _is_real(facts) else ["synthetic"]), "ddgen"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def _hub_licence(licence: str) -> dict[str, str]:
    if not licence or licence.lower().startswith("unknown"):
        return {"license": "unknown"}
    if licence.lower() in HUB_LICENCES:
        return {"license": licence.lower()}
    return {"license": "other", "license_details": licence}


def _introduction(facts: CardFacts) -> str:
    height, width = facts.image_size
    real = facts.provenance.get("num_source_images")
    stand_in = f" They stand in for {real:,} real ones." if real else ""
    kind = "distilled" if _is_real(facts) else "generated"
    return "\n".join(
        [
            f"# {_source(facts)}, distilled to {_per_class(facts)} images per class",
            "",
            f"**{facts.num_images:,} {kind} images** of {len(facts.class_names):,} "
            f"{'class' if len(facts.class_names) == 1 else 'classes'}, {width} x {height} pixels, small enough to "
            f"train a classifier on in minutes.{stand_in}",
            _origin(facts),
            f"It recognises {facts.agreement:.1%} of the kept images as their class, "
            f"with {facts.probability:.1%} probability on average.",
            "",
            "![Images of the dataset, one class per row](preview.png)",
        ]
    )


def _origin(facts: CardFacts) -> str:
    rule = (facts.provenance.get("selection") or {}).get("rule", "realism")
    kept = "kept the most realistic of each class" if rule == "realism" else f"chose by the rule {rule}"
    factor = facts.provenance.get("factor", 1)
    if not _is_real(facts):
        label = "gave each a soft label" if factor == 1 else f"gave each image, a grid of {factor**2}, a soft label"
        return (
            f"{_maker(facts)} generated many candidates; an observer, a classifier trained on the real images, "
            f"{kept} and {label}."
        )
    each = "Each is a crop of a real image" if factor == 1 else f"Each shows {factor**2} crops of real images"
    return (
        f"{each} (RDED, Sun et al., CVPR 2024). Of many crops an observer, a classifier trained on the real images, "
        f"{kept} and gave each image a soft label."
    )


def _maker(facts: CardFacts) -> str:
    foreign = facts.provenance.get("foreign_generator")
    if foreign:
        return f"The diffusers pipeline {_inline(foreign['source'])}, which was not trained for this dataset,"
    return "A latent diffusion model trained on the real images"


def _is_real(facts: CardFacts) -> bool:
    return facts.provenance.get("source") == "real"


def _loading(facts: CardFacts) -> str:
    return f"""## How to load it

With [datasets](https://github.com/huggingface/datasets):

```python
from datasets import load_dataset

dataset = load_dataset("path/to/this/folder", split="train")
example = dataset[0]  # image, label, soft_label ({len(facts.class_names)} probabilities), realism, seed, index
```

With torchvision; row `i` of the soft labels belongs to image `i`:

```python
from safetensors.torch import load_file
from torchvision.datasets import ImageFolder

folder = "path/to/this/folder"
images = ImageFolder(folder + "/train")
soft_labels = load_file(folder + "/soft_labels.safetensors")["soft_labels"]  # float16 (n, k), rows sum to 1
image, label = images[0]
soft_label = soft_labels[0].float()
```

`realism` is the observer's loss, -log p(class): lower is more realistic. {_numbering(facts)}
`manifest.json` holds the sha256 of every file."""


def _numbering(facts: CardFacts) -> str:
    if _is_real(facts):
        return (
            "`index` numbers the crop, or the\n"
            "first of a grid, within its class: image times crops per image plus crop."
        )
    if facts.provenance.get("factor", 1) > 1:
        return "`seed` and `index` name the\ncandidate in the first cell of the grid."
    return "`seed` and `index` name the candidate: with\nthem the generator makes the same image again."


def _recipe(facts: CardFacts) -> str:
    rows = facts.provenance.get("recipe") or {}
    lines = [f"| {_cell(name)} | {_cell(_value(value))} |" for name, value in rows.items()]
    table = "\n".join(["| setting | value |", "|---|---|", *lines]) if lines else "Not recorded."
    command = facts.provenance.get("command") or "not recorded"
    return f"## Recipe\n\n{table}\n\nMade with\n\n```\n{command}\n```"


def _selection(facts: CardFacts) -> list[str]:
    """What the rule did, where it was measured."""
    found = facts.provenance.get("selection") or {}
    if "table" not in found:
        return []
    lines = [
        "| images | mean realism loss | class named | feature distance | coverage |",
        "|---|--:|--:|--:|--:|",
        *(
            f"| {name} | {_figure(row['loss'], '.3f')} | {_figure(row['class_named'], '.1%')} "
            f"| {_figure(row['distance'], '.2f')} | {_figure(row['coverage'], '.1%')} |"
            for name, row in found["table"].items()
        ),
    ]
    text = (
        f"Rule: `{found['rule']}`. Distance: mean over pairs of a class in the observer's features. Coverage: part of "
        f"the real images' neighbourhoods that hold an image (Naeem et al., 2020), in {found['compared_classes']:,} "
        "classes; it grows with the number of images, so as many at random stand beside."
    )
    picture = ["", "![Losses and features of what was kept](selection.png)"] if facts.has_selection_picture else []
    return ["\n".join(["## Selection", "", *lines, "", text, *picture])]


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _bytes(facts: CardFacts) -> str:
    lines = [f"| {name} | {readable_bytes(count)} | {count:,} |" for name, count in facts.num_bytes.items()]
    return "\n".join(["## Size", "", "| stored | size | bytes |", "|---|--:|--:|", *lines])


def _classes(facts: CardFacts) -> str:
    named = list(zip(facts.class_names, facts.folder_names, strict=True))
    if all(name == folder for name, folder in named):
        text = ", ".join(f"{label} {_inline(name)}" for label, (name, _) in enumerate(named))
    else:
        text = ", ".join(f"{label} {_inline(name)} in {_inline(folder)}" for label, (name, folder) in enumerate(named))
    if len(named) > 30:
        text = f"<details><summary>All {len(named):,} classes</summary>\n\n{text}\n\n</details>"
    text += "\n\nNumbers are the labels; `class_names.json` lists the names in that order."
    return f"## Classes\n\n{text}{_class_map(facts)}"


def _class_map(facts: CardFacts) -> str:
    foreign = facts.provenance.get("foreign_generator")
    if not foreign:
        return ""
    pairs = ", ".join(f"{_inline(name)}: {_inline(word)}" for name, word in foreign["class_map"].items())
    summary = "<details><summary>What the generator was asked for</summary>"
    return f"\n\n{summary}\n\n{pairs}\n\n</details>"


def _licence(facts: CardFacts) -> str:
    licence = facts.provenance.get("licence") or "unknown"
    foreign = facts.provenance.get("foreign_generator")
    if foreign:
        return (
            f"## Licence\n\nThe images come from {_inline(foreign['source'])}, whose licence is: {foreign['licence']}. "
            f"A classifier trained on {_source(facts)} chose and labelled them; licence of that source: {licence}."
        )
    if _is_real(facts):
        return f"## Licence\n\nThe images are pieces of images of {_source(facts)}. Licence of that source: {licence}."
    return (
        f"## Licence\n\nThe images come from a model that was trained on {_source(facts)}. Licence of that source: "
        f"{licence}. Generated images can resemble real ones: treat them as derived from the source."
    )


def _results_block(text: str) -> str:
    return f"{RESULTS_BEGIN}\n\n{text}\n\n{RESULTS_END}"


def _results_table(results: Mapping[str, Any]) -> str:
    lines = ["| images | protocol | student | epochs | accuracy | best epoch |", "|---|---|---|--:|--:|--:|"]
    for row in results["rows"]:
        spread = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
        score = f"{100 * row['mean']:.1f}{spread}"
        recipe = _protocol(row, results)
        names = " | ".join(_cell(str(name)) for name in (row["images"], recipe, row["student"], row["epochs"]))
        lines.append(f"| {names} | {score} | ({100 * row['best_epoch_mean']:.1f}) |")
    return "\n".join([_results_heading(results), "", *lines, "", *_results_notes(results)])


def _protocol(row: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Names the protocol, and who labels in it where there are several."""
    several = len(results.get("teachers", {})) > 1
    return f"{row['protocol']} by {row['teacher']}" if several and row.get("teacher") else row["protocol"]


def _results_heading(results: Mapping[str, Any]) -> str:
    tested = f"the {results['num_test']:,} real test images" if results.get("num_test") else "the real test images"
    students = max(len(row["scores"]) for row in results["rows"])
    repeated = f"; mean ± standard deviation of {students} students" if students > 1 else "; one student a row"
    seed = f", seed {results['seed']}" if results.get("seed") is not None else ""
    return f"Top-1 accuracy in percent on {tested}{repeated}{seed}."


def _results_notes(results: Mapping[str, Any]) -> list[str]:
    notes = ["The score is the last epoch's; the best epoch is chosen on the test set and is no score."]
    if changed := results.get("epochs_changed"):
        text = f"Trained with `--epochs {results['epochs_override']}`, not the epochs of {', '.join(changed)}"
        notes.append(f"{text}: not comparable with published numbers.")
    for teacher, accuracy in results.get("teachers", {}).items():
        notes.append(f"Soft labels are those of a {teacher}, itself {100 * accuracy:.1f} on the same test images.")
    return notes


def _source(facts: CardFacts) -> str:
    return str(facts.provenance.get("dataset") or "An image dataset")


def _per_class(facts: CardFacts) -> str:
    low, high = facts.images_per_class
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _fact(key: str, value: Any) -> str:
    if key.startswith("bytes"):
        return f"{readable_bytes(value)} ({value:,} bytes)"
    if key == "observers":
        value = [f"{each['network']} ({each['fingerprint'][:12]})" for each in value]
    if isinstance(value, Mapping):
        value = [f"{name} {_value(inner)}" for name, inner in value.items()]
    return _value(value)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _inline(name: str) -> str:
    return "`" + name.replace("`", "'") + "`"
