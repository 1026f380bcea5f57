"""Protocols by name or by file: a YAML file that states every key of `Protocol` that has no default."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from ddgen.config import read_yaml
from ddgen.errors import UserError
from ddgen.evaluation.protocols import PLAIN, PROTOCOLS, Protocol

T = TypeVar("T")


def get_protocol(name: str) -> Protocol:
    """Returns the protocol of a name, of a name with ``-plain`` (without augmentation), or of a YAML file.

    Raises:
        UserError: There is none, or the file does not state one.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    if name.endswith((".yaml", ".yml")):
        return read_protocol(Path(name))
    if name.endswith(PLAIN) and name.removesuffix(PLAIN) in PROTOCOLS:
        if PROTOCOLS[name.removesuffix(PLAIN)].labels == "views":
            raise UserError(f"--protocols {name}: stored views are augmented already; take fixed-soft{PLAIN}")
        return PROTOCOLS[name.removesuffix(PLAIN)].without_augmentation()
    raise UserError(f"--protocols {name}: unknown; choose among {', '.join(PROTOCOLS)}, or give a .yaml file")


def read_protocol(path: Path) -> Protocol:
    """Reads a protocol from YAML; see ``configs/protocols/example.yaml``.

    Raises:
        UserError: The file is missing or no YAML, a key is unknown or missing, a value is of the wrong kind or cannot
            be, or the name is a built-in protocol's.
    """
    where = f"--protocols {path}"
    protocol = _build(Protocol, read_yaml(path, setting="--protocols"), where)
    if protocol.name in PROTOCOLS or protocol.name.removesuffix(PLAIN) in PROTOCOLS:
        raise UserError(f"{where}: name {protocol.name} is a built-in protocol's; give yours another")
    _check(protocol, where)
    return protocol


def to_plain(protocol: Protocol) -> dict[str, Any]:
    """Returns the keys of a protocol's YAML file; infinity, which JSON lacks, is the word inf."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(protocol))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return "inf" if value == math.inf else value


def _build(kind: type[T], values: Any, where: str) -> T:
    """Builds a dataclass from a mapping of its fields."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: {values!r} is no mapping `key: value`")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(hints)}"
            raise UserError(f"{where}: unknown key {name}; {hint}")
    missing = [
        field.name
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} not stated; configs/protocols/example.yaml states every key")
    return kind(**{name: _convert(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Turns a value as YAML has it into one of the field's type, or says why it is none."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (kind for kind in inner if kind is not type(None))
        return _convert(kind, value, where)
    if origin is tuple:
        return _convert_tuple(inner, value, where)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin is Literal:
        if value in inner:
            return value
        raise UserError(f"{where} {value}: choose among {', '.join(map(str, inner))}")
    if hint is float and (value == "inf" or (isinstance(value, (int, float)) and not isinstance(value, bool))):
        return float(value)
    if hint is not float and type(value) is hint:
        return value
    raise UserError(f"{where} {value}: expected {_KINDS[hint]}")


_KINDS = {float: "a number", int: "a whole number", str: "a word", bool: "true or false"}


def _convert_tuple(inner: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise UserError(f"{where} {value}: expected a list")
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(kinds) != len(value):
        raise UserError(f"{where} {value}: expected {len(kinds)} values")
    return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))


def _check(protocol: Protocol, where: str) -> None:
    """Refuses numbers that no recipe can have."""
    positive = ("learning_rate", "step_factor", "temperature")
    at_least_zero = ("weight_decay", "momentum", "hard_weight", "ema_decay", "cutmix_alpha", "color_jitter")
    for names, low, text in ((positive, 1e-12, "above 0"), (at_least_zero, 0.0, "0 or more")):
        for name in names:
            if not low <= getattr(protocol, name) < math.inf:
                raise UserError(f"{where}: {name} {getattr(protocol, name):g}: give a number, {text}")
    if not protocol.ema_decay < 1 or not protocol.momentum < 1:
        raise UserError(f"{where}: ema_decay and momentum must be below 1")
    if protocol.min_crop is not None and not 0 < protocol.min_crop <= 1:
        raise UserError(f"{where}: min_crop {protocol.min_crop:g}: give a part of the area, above 0 and up to 1")
    if protocol.labels == "views" and protocol.hard_weight:
        raise UserError(f"{where}: hard_weight {protocol.hard_weight:g}: stored views are labelled by logits alone; 0")
    for name in ("epochs_by_ipc", "batch_sizes"):
        pairs = getattr(protocol, name)
        if not pairs or list(pairs) != sorted(pairs) or min(number for _, number in pairs) < 1:
            raise UserError(f"{where}: {name} {list(pairs)}: give pairs of ascending ipc and a number above 0")
    if protocol.epochs_by_ipc[-1][0] != math.inf or protocol.batch_sizes[0][0] != 1:
        raise UserError(f"{where}: the last ipc of epochs_by_ipc must be inf, the first of batch_sizes 1")
    if any(bottom < 1 or top < 0 for top, bottom in protocol.step_at):
        raise UserError(f"{where}: step_at {list(protocol.step_at)}: give pairs of numerator and denominator")
