"""From the class names of a dataset to what a foreign pipeline is asked for: its label numbers, or prompts."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ddgen.data.classes import did_you_mean
from ddgen.errors import UserError

WORDNET_ID = re.compile(r"n\d{8}")
"""How ImageNet and Tiny ImageNet name their classes."""
IMAGENET_ENDS = ("n01440764", "n15075141")
"""The first and the last of ImageNet-1K's classes."""


def read_class_map(path: str, class_names: Sequence[str]) -> dict[str, str]:
    """Reads ``--class_map``: JSON or YAML that maps class names to values, or lines ``name: value``.

    ImageNet's own lists will do as they are: their lines are "n01440764 tench, Tinca tinca", with a space or a tab, and
    those of other classes than the dataset's are passed over.

    Args:
        path: The file; .json, .yaml and .yml say what they are, anything else is lines.
        class_names: The dataset's classes.

    Returns:
        Class name -> value as text, in the order of the file.

    Raises:
        UserError: Unreadable, no such mapping, a class that is not in the dataset or stands twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--class_map {path}: {error.strerror or error}; give a file of lines `class: value`") from None
    except UnicodeDecodeError:
        raise UserError(f"--class_map {path}: not text; give a file of lines `class: value`") from None
    pairs = _pairs(path, text, class_names)
    if not pairs:
        raise UserError(f"--class_map {path}: empty; give lines `class: value`")
    for name, count in Counter(name for name, _ in pairs).items():
        if name not in class_names and not WORDNET_ID.fullmatch(name):
            raise UserError(f"--class_map {path}: no class {name!r} in the dataset{did_you_mean(name, class_names)}")
        if count > 1:
            raise UserError(f"--class_map {path}: class {name!r} stands {count} times; leave one of its lines")
    return {name: value for name, value in pairs if name in class_names}


def label_numbers(
    class_names: Sequence[str],
    label_names: Mapping[int, str],
    num_labels: int | None,
    class_map: Mapping[str, str],
    *,
    generator: str,
    class_map_path: str | None,
) -> list[int]:
    """Finds the pipeline's label of every class.

    A class goes by the value that the class map gives it, otherwise by its name. Names match whatever their case and
    with spaces or underscores; of comma-separated synonyms one has to match, if the whole does not. ImageNet-1K's
    WordNet ids, all of them and sorted, are what the 1,000 labels of any ImageNet model stand for, in that order.

    Args:
        class_names: The dataset's classes, in label order.
        label_names: Names of the pipeline's labels, as far as it tells them.
        num_labels: How many labels it has; None if it does not tell.
        class_map: Class name -> label number or label name.
        generator: ``--generator``, for messages.
        class_map_path: ``--class_map``, for messages.

    Returns:
        A label number for every class, in label order.

    Raises:
        UserError: No label, more than one, one out of range, or one for two classes.
    """
    if not class_map and num_labels == len(class_names) == 1000 and _is_imagenet(class_names):
        return list(range(1000))
    labels = _Labels(label_names)
    numbers: list[int] = []
    unknown: list[str] = []
    for name in class_names:
        value = class_map.get(name, name)
        if name in class_map and re.fullmatch(r"[-+]?\d+", value):
            numbers.append(_checked_number(int(value), name, num_labels, generator, class_map_path))
            continue
        found = labels.called(value)
        if len(found) > 1:
            choices = " or ".join(f"{number} ({label_names[number]})" for number in found[:3])
            raise UserError(
                f"--generator {generator}: class {name!r} may be its label {choices}; say which with a line"
                f" `{name}: {found[0]}` in --class_map"
            )
        if not found and name in class_map:
            hint = did_you_mean(value, list(label_names.values())) if label_names else "; give the label's number"
            raise UserError(f"--class_map {class_map_path}: class {name!r}: no label {value!r} in {generator}{hint}")
        unknown += [] if found else [name]
        numbers += found
    if unknown:
        raise UserError(_no_label(unknown, len(class_names), label_names, num_labels, generator))
    _check_different(class_names, [str(number) for number in numbers], f"label of {generator}")
    return numbers


def words_of(class_names: Sequence[str], class_map: Mapping[str, str], *, class_map_path: str | None) -> list[str]:
    """Finds the words for every class.

    Args:
        class_names: The dataset's classes, in label order.
        class_map: Class name -> its words. A class that is not in it goes by its name: the first of comma-separated
            synonyms, with spaces for underscores.
        class_map_path: ``--class_map``, for messages.

    Raises:
        UserError: A class named by a WordNet id only, or without words, or with the words of another.
    """
    for name in class_names:
        if name not in class_map and WORDNET_ID.fullmatch(name):
            given = f"--class_map {class_map_path}: no line for" if class_map_path else "--class_map: not set, but"
            raise UserError(
                f"{given} class {name!r}, a WordNet id, for which the words are not known; give one such as"
                f" `{name}: tench` for each, as in the dataset's own list of words"
            )
    words = []
    for name in class_names:
        text = class_map.get(name, name.replace("_", " "))
        words.append((text.split(",")[0] if name not in class_map or WORDNET_ID.fullmatch(name) else text).strip())
    if "" in words:
        raise UserError(f"--class_map {class_map_path}: class {class_names[words.index('')]!r} has no words; give some")
    _check_different(class_names, words, "words")
    return words


def prompts(template: str, words: Sequence[str]) -> list[str]:
    """Puts the words for every class into ``--prompt``.

    Raises:
        UserError: No ``{class}`` in the template.
    """
    if "{class}" not in template:
        raise UserError(
            f"--prompt {template!r}: holds no {{class}}, so all classes would get the same images; put it in"
        )
    return [template.replace("{class}", word) for word in words]


def _pairs(path: str, text: str, class_names: Sequence[str]) -> list[tuple[str, str]]:
    kind = Path(path).suffix.lower()
    try:
        if kind == ".json":
            value = json.loads(text, object_pairs_hook=list)
            pairs = value if isinstance(value, list) and all(isinstance(item, tuple) for item in value) else None
        elif kind in (".yaml", ".yml"):
            value = yaml.compose(text, Loader=yaml.SafeLoader)  # as written: `no` and `1_0` are words here
            pairs = [(k.value, v.value) for k, v in value.value] if isinstance(value, yaml.MappingNode) else None
        else:
            lines = [line.strip() for line in text.splitlines()]
            return [_pair(path, line, class_names) for line in lines if line and not line.startswith("#")]
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"--class_map {path}: not {kind[1:].upper()}: {' '.join(str(error).split())}") from None
    if pairs is None or not all(isinstance(value, (str, int)) for _, value in pairs):
        raise UserError(f"--class_map {path}: expected one value for each class: its words, or a label number or name")
    return [(str(name), str(value)) for name, value in pairs]


def _pair(path: str, line: str, class_names: Sequence[str]) -> tuple[str, str]:
    """Splits at the colon or tab after a class's name, which may itself hold colons."""
    splits = [(line[: mark.start()].strip(), line[mark.end() :].strip()) for mark in re.finditer(r"[:\t]", line)]
    if match := re.match(rf"({WORDNET_ID.pattern})\s+(.+)", line):
        splits.append((match[1], match[2]))
    if not splits:
        raise UserError(f"--class_map {path}: line {line!r}: expected `class: value`")
    return next((split for split in splits if split[0] in class_names), splits[0])


class _Labels:
    """Finds labels by name.

    Args:
        label_names: Label number -> name.
    """

    def __init__(self, label_names: Mapping[int, str]) -> None:
        self.whole: defaultdict[str, list[int]] = defaultdict(list)
        self.parts: defaultdict[str, list[int]] = defaultdict(list)
        for number, label in label_names.items():
            self.whole[_normal(label)].append(number)
            for part in {_normal(part) for part in label.split(",")}:
                self.parts[part].append(number)

    def called(self, name: str) -> list[int]:
        """Returns the labels of that name, or else those with a synonym in common with it."""
        if _normal(name) in self.whole:
            return self.whole[_normal(name)]
        found = (self.parts.get(_normal(part), []) for part in name.split(","))
        return sorted({number for numbers in found for number in numbers})


def _is_imagenet(class_names: Sequence[str]) -> bool:
    ids = all(WORDNET_ID.fullmatch(name) for name in class_names)
    return ids and list(class_names) == sorted(class_names) and (class_names[0], class_names[-1]) == IMAGENET_ENDS


def _normal(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def _checked_number(number: int, name: str, num_labels: int | None, generator: str, class_map_path: str | None) -> int:
    if number < 0 or (num_labels is not None and number >= num_labels):
        last = "" if num_labels is None else f" to {num_labels - 1}"
        raise UserError(
            f"--class_map {class_map_path}: class {name!r} is label {number}; {generator} has 0{last or ' and up'}"
        )
    return number


def _no_label(
    unknown: Sequence[str],
    num_classes: int,
    label_names: Mapping[int, str],
    num_labels: int | None,
    generator: str,
) -> str:
    some = f"{unknown[0]!r}" + (f" and {len(unknown) - 1} more of {num_classes}" if len(unknown) > 1 else "")
    if not label_names:
        count = f"{num_labels} labels" if num_labels else "labels"
        return (
            f"--generator {generator}: its {count} have no names; say with --class_map FILE which belongs to which"
            f" class, in lines such as `{unknown[0]}: 0`"
        )
    if WORDNET_ID.fullmatch(unknown[0]):
        return (
            f"--generator {generator}: class {some} is a WordNet id, and the labels are named by words; give a line"
            f" such as `{unknown[0]}: {next(iter(label_names.values()))}` for each in --class_map FILE"
        )
    return (
        f"--generator {generator}: no label for class {some}{did_you_mean(unknown[0], list(label_names.values()))};"
        f" say it in --class_map FILE, in lines such as `{unknown[0]}: label number or name`"
    )


def _check_different(class_names: Sequence[str], values: Sequence[str], what: str) -> None:
    first: dict[str, str] = {}
    for name, value in zip(class_names, values, strict=True):
        if value in first:
            raise UserError(
                f"--class_map: classes {first[value]!r} and {name!r} have the same {what}, {value!r}; give each its own"
            )
        first[value] = name
