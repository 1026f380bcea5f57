"""What students get right class by class, and what they take for what, where an evaluation measured it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddgen.page.html import Cell, esc, number, table, text

OURS = "distilled"
LARGEST_MATRIX = 20  # classes whose confusion is drawn


def class_parts(results: Mapping[str, Any], class_names: Sequence[str]) -> list[str]:
    """Returns the recall of every class and the confusion of the first row of the distilled images.

    Args:
        results: The contents of results.json.
        class_names: In label order; numbers stand in for names where there are none.
    """
    rows = [row for row in results.get("rows", ()) if row["images"] == OURS and row.get("recall")]
    if not rows:
        return []
    k = len(rows[0]["recall"])
    names = list(class_names) if len(class_names) == k else [str(label) for label in range(k)]
    parts = [_details("Recall of every class", _recall(rows, names))]
    matrix = rows[0].get("confusion")
    if matrix and k <= LARGEST_MATRIX:
        parts.append(_details("Which class is taken for which", _confusion(rows[0], matrix, names)))
    return parts


def _recall(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    header = [text("class"), *(number(row["protocol"], _below(row)) for row in rows)]
    body = [
        [text(name), *(number(f"{100 * row['recall'][label]:.1f}") for row in rows)] for label, name in enumerate(names)
    ]
    return table("Part of the real test images of each class that is recognised, in percent", header, body)


def _confusion(row: Mapping[str, Any], matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Real class down, named class across; the darker, the larger the part of the real class."""
    header = [text("real class"), *(number(name) for name in names)]
    body = []
    for name, counts in zip(names, matrix, strict=True):
        total = sum(counts) or 1
        body.append([text(name), *(_shaded(count, count / total) for count in counts)])
    caption = f"Test images of the class at the left that were taken for the class above: {row['protocol']}, "
    return table(f"{caption}{_below(row)}, distilled images, all repeats", header, body)


def _shaded(count: int, part: float) -> Cell:
    return Cell(f'<span class="shade" style="--part:{100 * part:.0f}%">{count:,}</span>', number=True)


def _below(row: Mapping[str, Any]) -> str:
    return f"{row['student']}, observer {row['teacher']}" if row.get("teacher") else str(row["student"])


def _details(title: str, content: str) -> str:
    return f"<details><summary>{esc(title)}</summary>\n{content}\n</details>"
