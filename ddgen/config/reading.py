"""YAML and flags -> the settings of a command, and back to YAML.

Errors are one line: setting, value, cure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import math
import re
import sys
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml

from ddgen.checkpoint import write_bytes
from ddgen.errors import UserError

RANGES: dict[str, tuple[float, float]] = {
    **{name: (1, math.inf) for name in (
        "num_classes", "vae_downsample", "vae_latent_channels", "vae_patch", "vae_channels", "vae_batch_size",
        "unet_channels", "unet_layers_per_block", "train_batch_size", "max_train_steps", "gradient_accumulation_steps",
        "fid_num_inference_steps", "log_every", "num_inference_steps", "observer_epochs", "observer_batch_size",
        "observer_input_size", "checkpointing_steps", "checkpoints_total_limit", "candidates_per_image",
        "sample_batch_size", "repeats", "epochs", "factor", "mipc", "num_crop", "observer_keep_epochs",
        "teacher_epoch", "views", "keep_every", "top_k", "label_batch_size", "rank_epochs", "modes",
    )},
    **{name: (0, math.inf) for name in (
        "vae_train_steps", "vae_kl_weight", "vae_perceptual_weight", "vae_equivariance_weight",
        "unet_attention_levels", "lr_warmup_steps", "adam_weight_decay", "fid_every", "sample_every", "guidance_scale",
        "ipc", "diversity_strength",
    )},
    **{name: (1e-12, math.inf) for name in (
        "vae_learning_rate", "learning_rate", "max_grad_norm", "observer_learning_rate", "logit_std", "snr_gamma",
        "flow_shift", "soft_label_temperature", "budget_seconds", "rank_lr_factors",
    )},
    **{name: (0, 1) for name in (
        "unet_dropout", "class_dropout", "lr_decay_fraction", "guidance_interval", "eta", "observer_label_smoothing",
        "mode_strength", "steer_until",
    )},
    "observer_holdout": (0.001, 0.9),
    "guide_fraction": (0, 0.9),  # what is trained as long as the generator guides nowhere
    "fid_num_images": (6, math.inf),  # neighbours are counted up to the fifth
    "ema_stds": (0.005, 0.25),
    "posthoc_ema_stds": (0.03, 0.25),
    "seed": (0, 2**63 - 1),
}  # fmt: skip
"""Smallest and largest value of every number, both allowed; of every number of a list likewise."""

Config = TypeVar("Config")


class _Loader(yaml.SafeLoader):
    """YAML in which ``no`` is the word and ``3e-4`` is a number (YAML 1.2), and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} stands twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":timestamp", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path, *, setting: str = "--config") -> dict[str, Any]:
    """Reads a YAML file of settings.

    Args:
        path: The file.
        setting: The flag that an error names.

    Raises:
        UserError: The file is missing, not YAML, or not a mapping.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{setting} {path}: {error.strerror or error}; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{setting} {path}: not text; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{setting} {path}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{setting} {path}: expected lines `setting: value`")
    return values


def settings(kind: type) -> dict[str, tuple[str | None, Any]]:
    """Returns flag name -> (group field or None, type) of a command's dataclass."""
    found: dict[str, tuple[str | None, Any]] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            for inner, inner_hint in typing.get_type_hints(hint).items():
                found[inner] = (name, inner_hint)
        else:
            found[name] = (None, hint)
    return found


def to_flat_dict(config: Any) -> dict[str, Any]:
    """Returns the settings as ``{flag name: value}``, tuples as lists; the inverse of `from_flat_dict`."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat.update(to_flat_dict(value))
        else:
            flat[item.name] = list(value) if isinstance(value, tuple) else value
    return flat


def from_flat_dict(kind: type[Config], values: dict[str, Any], source: str) -> Config:
    """Builds a command's settings from ``{flag name: value}``.

    Args:
        kind: The command's dataclass.
        values: Settings as read from YAML.
        source: What to call the origin of the values in an error, for instance ``--config recipe.yaml``.

    Raises:
        UserError: An unknown setting, or a value of the wrong type.
    """
    known = settings(kind)
    for name in values:
        if name not in known:
            raise UserError(f"{source}: unknown setting {name}{_did_you_mean(str(name), known)}")
    args: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool) and known[name][1] is bool:
            args.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, (list, tuple)):
            args.extend([f"--{name}", *map(str, value)])
        else:
            args.extend([f"--{name}", str(value)])
    return _cli(kind, args, None, source)


def write_yaml(path: Path, config: Any) -> None:
    """Writes the resolved settings, readable again with ``--config``; whole or not at all."""
    write_bytes(path, yaml.safe_dump(to_flat_dict(config), sort_keys=False).encode())


def parse(kind: type[Config], argv: list[str] | None, prog: str) -> Config:
    """Parses flags, over ``--config FILE.yaml``, over the defaults.

    Args:
        kind: The command's dataclass.
        argv: Arguments without the program's name; None takes ``sys.argv``.
        prog: Name shown in ``--help``.

    Raises:
        UserError: Unknown or wrong settings.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    config_path, args = _take_config(args)
    args = _spell_out_switches(kind, args)
    _check_flags(kind, args)
    default = from_flat_dict(kind, read_yaml(config_path), f"--config {config_path}") if config_path else None
    config = _cli(kind, args, default, prog)
    _check_ranges(config)
    return config


def _take_config(args: list[str]) -> tuple[str | None, list[str]]:
    path, rest, index = None, [], 0
    while index < len(args):
        if args[index] == "--config":
            if index + 1 == len(args):
                raise UserError("--config: give the path of a YAML file")
            path, index = args[index + 1], index + 2
        elif args[index].startswith("--config="):
            path, index = args[index].removeprefix("--config="), index + 1
        else:
            rest.append(args[index])
            index += 1
    return path, rest


def _spell_out_switches(kind: type, args: list[str]) -> list[str]:
    """Lets switches that have a derived default be used like the others: --random_flip and --no_random_flip."""
    derived = {name for name, (_, hint) in settings(kind).items() if hint == bool | None}
    spelled: list[str] = []
    for arg, following in zip(args, [*args, "--"][1:], strict=True):
        name = arg.removeprefix("--").replace("-", "_")
        if arg.startswith("--no") and name.removeprefix("no_") in derived:
            spelled += [f"--{name.removeprefix('no_')}", "False"]
        elif arg.startswith("--") and name in derived and following.startswith("--"):
            spelled += [arg, "True"]
        else:
            spelled.append(arg)
    return spelled


def _check_ranges(config: Any) -> None:
    for name, value in to_flat_dict(config).items():
        low, high = RANGES.get(name, (-math.inf, math.inf))
        numbers = value if isinstance(value, list) else [value]
        if name in ("ema_stds", "protocols") and not numbers:
            raise UserError(f"--{name}: empty; give at least one")
        for number in numbers:
            if isinstance(number, (int, float)) and not isinstance(number, bool) and not low <= number <= high:
                allowed = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
                raise UserError(f"--{name} {number}: give {allowed}")


def _did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else "; see --help"


def _check_flags(kind: type, args: list[str]) -> None:
    known = settings(kind)
    for arg in args:
        if not arg.startswith("--") or arg == "--help":
            continue
        name = arg[2:].split("=")[0].replace("-", "_")
        if name in known or (name.startswith("no_") and known.get(name[3:], (None, None))[1] is bool):
            continue
        raise UserError(f"--{name}: unknown setting{_did_you_mean(name, known)}")


def _cli(kind: type[Config], args: list[str], default: Config | None, source: str) -> Config:
    import tyro

    extra: dict[str, Any] = {} if default is None else {"default": default}
    flat: Any = Annotated[kind, tyro.conf.OmitArgPrefixes]
    description = f"{kind.__doc__} --config FILE.yaml reads settings from a file; flags stand over it."
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            config: Config = tyro.cli(
                flat, args=args, prog=source, description=description, use_underscores=True, **extra
            )
            return config
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(captured.getvalue(), source)) from None


def _one_line(report: str, source: str) -> str:
    """Turns tyro's boxed error into one line: its sentence, without its heading and its copy of the help text."""
    lines = [re.sub(r"[│╭╮╰╯─]+", " ", line).strip() for line in report.splitlines()]
    text = re.sub(r"\s+", " ", " ".join(line for line in lines if not line.startswith("For full helptext")))
    text = text.split(" Argument helptext:")[0].strip()
    text = re.sub(r"^(Value error|Invalid choice|Missing argument|Unrecognized options|Parsing error) ", "", text)
    text = text.removeprefix("Error parsing ").removesuffix(".")
    return f"{source}: {text}; see --help"
