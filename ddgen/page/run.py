"""What a run folder holds that its report tells: whatever is missing is None or empty."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ddgen.checkpoint import DamagedJson, read_json
from ddgen.errors import UserError

PROVENANCE_NAME = "provenance.json"
HISTORY_NAME = "history.jsonl"
OBSERVER_STAGE, AUTOENCODER_STAGE = "observer", "autoencoder and latents"  # of training, in the history
RUN_FILES = ("config.yaml", "dataset.json", "metrics.jsonl", "distilled", "evaluation")


@dataclass(frozen=True)
class EvaluatedSet:
    """A distilled dataset of the run, its scores, or both.

    Attributes:
        name: Of its folder.
        distilled_dir: Its folder, where it is a distilled dataset of ddgen's.
        manifest: Its manifest.
        results: results.json.
        evaluation_dir: Where that lies.
        provenance: What was written beside it: command, versions, remarks.
    """

    name: str
    distilled_dir: Path | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    evaluation_dir: Path | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """All that the page tells.

    Attributes:
        path: The run folder, or None for an evaluation outside any run.
        config: Settings of training.
        dataset: Facts about the real images.
        observer: config.json of the observer.
        observer_epochs: Lines of observer_metrics.jsonl.
        observer_history: As `history`, of an observer that was trained alone and given to the run.
        metrics: Lines of metrics.jsonl.
        reconstruction: What the autoencoder loses.
        history: Lines of history.jsonl: what training was started with, and how long its stages took.
        sets: Smallest number of images per class first.
    """

    path: Path | None
    config: Mapping[str, Any]
    dataset: Mapping[str, Any]
    observer: Mapping[str, Any]
    observer_epochs: tuple[Mapping[str, Any], ...]
    observer_history: tuple[Mapping[str, Any], ...]
    metrics: tuple[Mapping[str, Any], ...]
    reconstruction: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...]
    sets: tuple[EvaluatedSet, ...]


def is_run(path: Path) -> bool:
    """Whether a folder holds anything of a run."""
    return any((path / name).exists() for name in RUN_FILES)


def read_run(path: Path | None, evaluation_dir: Path | None = None) -> RunRecord:
    """Reads what there is.

    Args:
        path: The run folder, or None.
        evaluation_dir: Tell of this evaluation alone, which may lie anywhere.

    Raises:
        UserError: A file that is there is damaged.
    """
    root = path if path is not None else Path("/nonexistent")
    if evaluation_dir is not None:
        sets: tuple[EvaluatedSet, ...] = (_read_set(evaluation_dir.name, None, evaluation_dir),)
    else:
        sets = _sets(root)
    return RunRecord(
        path=path,
        config=_yaml(root / "config.yaml"),
        dataset=_json(root / "dataset.json"),
        observer=_json(root / "observer" / "config.json") or _json(root / "config.json"),  # one trained alone
        observer_epochs=_lines(root / "observer_metrics.jsonl"),
        observer_history=_lines(root / "observer" / HISTORY_NAME),
        metrics=_lines(root / "metrics.jsonl"),
        reconstruction=_json(root / "reconstruction.json"),
        history=_lines(root / HISTORY_NAME),
        sets=sets,
    )


def _sets(root: Path) -> tuple[EvaluatedSet, ...]:
    names = {path.parent.name for path in root.glob("distilled/*/manifest.json")}
    names |= {path.parent.name for path in root.glob("evaluation/*/results.json")}
    ordered = sorted(names, key=_natural)
    return tuple(_read_set(name, root / "distilled" / name, root / "evaluation" / name) for name in ordered)


def _read_set(name: str, distilled_dir: Path | None, evaluation_dir: Path) -> EvaluatedSet:
    results = _json(evaluation_dir / "results.json")
    if results.get("epochs_override") is not None and "epochs_changed" not in results:  # earlier files: of all
        results = {**results, "epochs_changed": list(dict.fromkeys(row["protocol"] for row in results["rows"]))}
    provenance = _json(evaluation_dir / PROVENANCE_NAME)
    if distilled_dir is None and provenance:
        distilled_dir = Path(provenance["distilled_dir"])
    if distilled_dir is not None and not (distilled_dir / "manifest.json").is_file():
        distilled_dir = None
    return EvaluatedSet(
        name=name,
        distilled_dir=distilled_dir,
        manifest=_json(distilled_dir / "manifest.json") if distilled_dir is not None else {},
        results=results,
        evaluation_dir=evaluation_dir if results else None,
        provenance=provenance,
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """ipc2 before ipc10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except DamagedJson as error:
        raise UserError(f"--run_dir: {error}, or delete it") from None
    return found if isinstance(found, Mapping) else {}


def _yaml(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--run_dir: {path} is damaged ({' '.join(str(error).split())})") from None
    return found if isinstance(found, Mapping) else {}


def _lines(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Whole lines; a last one without newline is being written at this moment."""
    if not path.is_file():
        return ()
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--run_dir: {path} is damaged ({error})") from None
    return tuple(record for record in records if isinstance(record, Mapping))
