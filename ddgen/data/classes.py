"""The order of classes: choosing them and comparing two orders."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ddgen.errors import UserError


def check_class_order(expected: Sequence[str], found: Sequence[str], *, expected_name: str, found_name: str) -> None:
    """Refuses two artefacts whose classes differ in name, order or number.

    Args:
        expected: Class names of the artefact that decides.
        found: Class names of the other one.
        expected_name: What to call the first, for instance ``the observer``.
        found_name: What to call the second.

    Raises:
        UserError: Names the first position that differs.
    """
    for position, (left, right) in enumerate(zip(expected, found, strict=False)):
        if left != right:
            same = sorted(expected) == sorted(found)
            cure = "the same classes in another order" if same else "different classes"
            raise UserError(
                f"class {position} is {left!r} in {expected_name} but {right!r} in {found_name} ({cure}); "
                "use two that belong to the same dataset, --classes and --num_classes"
            )
    if len(expected) != len(found):
        raise UserError(
            f"{expected_name} has {len(expected)} classes but {found_name} has {len(found)}; "
            "use two that belong to the same dataset, --classes and --num_classes"
        )


def choose_classes(names: Sequence[str], classes: str | None, num_classes: int | None) -> list[int]:
    """Returns the positions in `names` of the classes that --classes or --num_classes asks for, in their new order.

    Raises:
        UserError: An unknown or repeated name, too many or too few classes, or both settings at once.
    """
    if classes is not None and num_classes is not None:
        raise UserError(f"--classes {classes} with --num_classes {num_classes}: give one of the two")
    if classes is not None:
        chosen = [list(names).index(name) for name in _split_names(names, classes)]
    elif num_classes is not None:
        if num_classes > len(names):
            raise UserError(f"--num_classes {num_classes}: the dataset has {len(names)} classes")
        chosen = list(range(max(num_classes, 0)))
    else:
        chosen = list(range(len(names)))
    if len(chosen) < 2 <= len(names):
        setting = f"--classes {classes}" if classes is not None else f"--num_classes {num_classes}"
        raise UserError(f"{setting}: a classifier needs at least 2 classes")
    return chosen


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Returns ``; did you mean x?``, or the first known names where nothing is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known are {', '.join(known[:10])}{', ...' if len(known) > 10 else ''}"


def _split_names(names: Sequence[str], classes: str) -> list[str]:
    """Splits at commas, except inside names that hold commas themselves ("tench, Tinca tinca")."""
    parts, known, chosen, start = classes.split(","), set(names), [], 0
    while start < len(parts):
        spans = [(",".join(parts[start:end]).strip(), end) for end in range(len(parts), start, -1)]
        name, end = next(((name, end) for name, end in spans if name in known), (parts[start].strip(), 0))
        if not end:
            raise UserError(f"--classes {name}: no such class{did_you_mean(name, names)}")
        if name in chosen:
            raise UserError(f"--classes {classes}: {name} stands twice")
        chosen.append(name)
        start = end
    return chosen
