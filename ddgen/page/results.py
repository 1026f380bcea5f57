"""The scores of an evaluation as the report page shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddgen.errors import UserError
from ddgen.evaluation.protocol_files import get_protocol
from ddgen.page.html import Cell, esc, number, paragraph, table, text
from ddgen.page.ranking import ranking_parts
from ddgen.page.run import EvaluatedSet
from ddgen.units import readable_bytes

OURS = "distilled"
MOST_COLUMNS = 4  # of scores side by side, before every protocol gets a table of its own
LONGEST_LIST = 12  # of numbers in one cell
KNOWN = {
    "images", "protocol", "student", "teacher", "observer", "epochs", "scores", "best_scores", "mean", "std",
    "best_epoch_mean", "image_bytes", "label_bytes", "seconds", "recall",
}  # fmt: skip
TOLD = {
    "dataset", "num_classes", "num_test", "image_size", "ipc", "num_images", "repeats", "seed", "epochs_override",
    "epochs_changed", "flip", "teacher", "teacher_accuracy", "teachers", "protocols", "precision", "device", "score",
    "rows", "cross_architecture", "dd_ranking", "ranking",
}  # fmt: skip

DD_RANKING = {"hlr", "ior", "lrs", "ars"}

Row = Mapping[str, Any]


def result_parts(shown: EvaluatedSet) -> list[str]:
    """Returns the HTML of one evaluation: tables, what must be known to read them, every single score."""
    results = shown.results
    if not results.get("rows"):
        return []
    tables = [_score_table(results, keys) for keys in _column_groups(results)]
    crossed = [_cross_table(found) for found in results.get("cross_architecture") or ()]
    robust = "DD-Ranking's scores, of fractions: the lower HLR, the higher the others, the better"
    return [
        _heading(results),
        *tables,
        _notes(results, shown),
        *crossed,
        _records(robust, results.get("dd_ranking") or ()),
        *ranking_parts(results.get("ranking")),
        _other_measures(results),
        "<details><summary>Every student: scores, bytes and seconds</summary>\n"
        + _every_student(results)
        + "\n</details>",
    ]


def comparison(sets: Sequence[EvaluatedSet]) -> str:
    """Returns one table of the distilled images of several evaluations of the same dataset, or nothing for one."""
    scored = [shown for shown in sets if shown.results.get("rows")]
    if len(scored) < 2 or len({shown.results.get("dataset") for shown in scored}) > 1:
        return ""
    found = {
        shown.name: {(row["protocol"], row["student"]): row for row in shown.results["rows"] if row["images"] == OURS}
        for shown in scored
    }
    keys = list(dict.fromkeys(key for rows in found.values() for key in rows))
    highest = _highest([row for rows in found.values() for row in rows.values()], 0.0)
    header = [text("set"), number("per class"), *(_column_head(key) for key in keys)]
    body = [
        [text(shown.name), number(shown.results.get("ipc", "")),
         *(_score(found[shown.name].get(key), highest) for key in keys)]
        for shown in scored
    ]  # fmt: skip
    return table("The distilled images of every set: top-1 accuracy in percent", header, body)


def _column_groups(results: Mapping[str, Any]) -> list[list[tuple[str, str]]]:
    """The columns (protocol, student) of each table: all in one, or one per protocol where they or observers are many.

    Several observers each have lines of their own, which hard labels have no place in.
    """
    rows = results["rows"]
    keys = list(dict.fromkeys((row["protocol"], row["student"]) for row in rows))
    if len(keys) <= MOST_COLUMNS and len(_teachers(rows, results)) <= 1:
        return [keys]
    protocols = list(dict.fromkeys(protocol for protocol, _ in keys))
    return [[key for key in keys if key[0] == protocol] for protocol in protocols]


def _score_table(results: Mapping[str, Any], keys: Sequence[tuple[str, str]]) -> str:
    """Images and observers down, protocols and students across."""
    chosen = [row for row in results["rows"] if (row["protocol"], row["student"]) in keys]
    several = len(_teachers(chosen, results)) > 1

    def line_of(row: Row) -> tuple[str, str | None]:
        return row["images"], _teacher(row, results) if several else None

    lines = sorted(dict.fromkeys(map(line_of, chosen)), key=lambda line: str(line[1]))
    at = {(*line_of(row), row["protocol"], row["student"]): row for row in chosen}
    highest = _highest(results["rows"], max(_teacher_accuracies(results).values(), default=0.0))
    body = []
    for images, teacher in lines:
        below = f"<small>observer {esc(teacher)}</small>" if teacher else ""
        cells = [_score(at.get((images, teacher, *key)), highest) for key in keys]
        body.append([Cell(esc(images) + below), *cells])
    ours = frozenset(index for index, (images, _) in enumerate(lines) if images == OURS)
    caption = "Top-1 accuracy in percent after the last epoch; below it, the best epoch"
    if len({protocol for protocol, _ in keys}) == 1 and (len(keys) > 1 or several):
        header = [text("images"), *(number(student) for _, student in keys)]
        return table(f"{caption}; protocol {keys[0][0]}", header, body, ours)
    return table(caption, [text("images"), *map(_column_head, keys)], body, ours)


def _column_head(key: tuple[str, str]) -> Cell:
    protocol, student = key
    return number(protocol, student)


def _teacher(row: Row, results: Mapping[str, Any]) -> str | None:
    """Who labels online: told by the row, or by older results once for all of them."""
    found = row["teacher"] if "teacher" in row else row.get("observer", results.get("teacher"))
    return None if found is None else str(found)


def _teachers(rows: Sequence[Row], results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for row in rows if (name := _teacher(row, results)) is not None))


def _teacher_accuracies(results: Mapping[str, Any]) -> dict[str, float]:
    """Observer -> top-1 fraction on the same test images."""
    found = dict(results.get("teachers") or {})
    if results.get("teacher") and results.get("teacher_accuracy") is not None:
        found.setdefault(results["teacher"], results["teacher_accuracy"])
    return found


def _highest(rows: Sequence[Row], teacher_accuracy: float) -> float:
    return max([teacher_accuracy, *(row["mean"] for row in rows)]) or 1.0


def _score(row: Row | None, highest: float) -> Cell:
    """Mean and spread, a bar as long as the mean, and the best epoch, which is no score."""
    if row is None:
        return Cell("", number=True)
    bar = f'<span class="bar"><i style="width:{100 * row["mean"] / highest:.1f}%"></i></span>'
    best = row.get("best_epoch_mean")
    below = "" if best is None else f"<small>best {100 * best:.1f}</small>"
    return Cell(f"{_spread(row['mean'], row.get('std'))}{bar}{below}", number=True)


def _spread(mean: float, std: float | None) -> str:
    return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def _heading(results: Mapping[str, Any]) -> str:
    parts = []
    if results.get("num_test"):
        parts.append(f"Scored on the {results['num_test']:,} real test images of {results.get('dataset')}")
    if results.get("num_classes"):
        parts.append(f"{results['num_classes']:,} classes, chance is {100 / results['num_classes']:.1f}")
    if results.get("repeats"):
        several = f"{results['repeats']} students per row, mean ± standard deviation"
        parts.append("one student per row" if results["repeats"] == 1 else several)
    if results.get("seed") is not None:
        parts.append(f"seed {results['seed']}")
    for name, accuracy in _teacher_accuracies(results).items():
        parts.append(f"teacher {name}, itself {100 * accuracy:.1f} on the same test images")
    return paragraph("; ".join(parts) + ".") if parts else ""


def _notes(results: Mapping[str, Any], shown: EvaluatedSet) -> str:
    notes = ["The score is the last epoch's; the best epoch is chosen on the test set and is no score."]
    if changed := results.get("epochs_changed"):
        notes.append(
            f"Epochs were set to {results['epochs_override']} instead of the protocol's own ({', '.join(changed)}):"
            " not comparable with published numbers."
        )
    if results.get("flip") is False:
        notes.append("Without the protocols' mirroring: a mirror image would be another class.")
    if any(row["images"] == "rded real" for row in results["rows"]):
        notes.append("rded real: crops of real images by RDED, with the first observer, drawn anew for every student.")
    notes += [str(remark) for remark in shown.provenance.get("remarks", ())]
    recipes = [
        f"{name}: {title}."
        for name in dict.fromkeys(row["protocol"] for row in results["rows"])
        if (title := _title(name, results)) is not None
    ]
    return paragraph(" ".join([*notes, *recipes]), "note")


def _title(protocol: str, results: Mapping[str, Any]) -> str | None:
    """The recipe in one line: as the results tell it, or as it is known here."""
    told = (results.get("protocols") or {}).get(protocol)
    if isinstance(told, Mapping) and told.get("title"):
        return str(told["title"])
    try:
        return get_protocol(protocol).title
    except UserError:
        return None  # somebody's own, of which the page has no more than the name


def _cross_table(found: Mapping[str, Any]) -> str:
    """Observers down, students across, as the results have it."""
    header = [text("observer"), *(number(name) for name in found["students"])]
    body = [
        [text(name), *(number(_spread(mean, std)) for mean, std in zip(means, stds, strict=True))]
        for name, means, stds in zip(found["observers"], found["mean"], found["std"], strict=True)
    ]
    caption = f"Top-1 accuracy in percent, {found['protocol']} on the {found['images']} images: "
    return table(f"{caption}observers down, students across", header, body)


def _records(caption: str, records: Sequence[Mapping[str, Any]]) -> str:
    """A table of mappings with the same keys; columns in which nothing stands are left out."""
    names = [name for name in dict.fromkeys(key for one in records for key in one)
             if any(one.get(name) is not None for one in records)]  # fmt: skip
    numeric = {name for name in names if any(_is_number(one.get(name)) for one in records)}
    heads = [name.upper() if name in DD_RANKING else _words(name) for name in names]
    header = [number(head) if name in numeric else text(head) for name, head in zip(names, heads, strict=True)]
    body = [
        [number(_plain(one.get(name))) if name in numeric else text(one.get(name) or "") for name in names]
        for one in records
    ]
    return table(caption, header, body) if body else ""


def _every_student(results: Mapping[str, Any]) -> str:
    rows = results["rows"]
    measures = list(dict.fromkeys(key for row in rows for key in row if key not in KNOWN and _is_short(row[key])))
    header = [text("images"), text("protocol"), text("student"), number("epochs"), number("last epoch"),
              number("best epoch"), number("images"), number("labels"), number("seconds"),
              *(number(_words(name)) for name in measures)]  # fmt: skip
    body = [
        [text(row["images"]), text(row["protocol"]), text(row["student"]), number(row.get("epochs", "")),
         number(_percents(row.get("scores"))), number(_percents(row.get("best_scores"))),
         number(_bytes(row.get("image_bytes"))), number(_bytes(row.get("label_bytes"))),
         number("" if row.get("seconds") is None else f"{row['seconds']:.1f}"),
         *(number(_plain(row.get(name))) for name in measures)]
        for row in rows
    ]  # fmt: skip
    return table("Top-1 accuracy in percent of every single student", header, body)


def _other_measures(results: Mapping[str, Any]) -> str:
    """Whatever else an evaluation measured: numbers, and mappings of names to numbers."""
    lines: list[list[Cell]] = []
    for key, value in results.items():
        if key in TOLD:
            continue
        if _is_short(value):
            lines.append([text(_words(key)), number(_plain(value))])
        elif isinstance(value, Mapping):
            lines += [
                [text(f"{_words(key)}: {_words(name)}"), number(_plain(inner))]
                for name, inner in value.items()
                if _is_short(inner)
            ]
    return table("Other measures", [text("measure"), number("value")], lines) if lines else ""


def _is_short(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return 0 < len(value) <= LONGEST_LIST and all(map(_is_number, value))
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _percents(values: Sequence[float] | None) -> str:
    return ", ".join(f"{100 * value:.1f}" for value in values or ())


def _bytes(count: int | None) -> str:
    return "" if count is None else readable_bytes(count)


def _words(name: str) -> str:
    return name.replace("_", " ")
