"""How long the stages of a run took, as far as its files tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from ddgen.page.run import AUTOENCODER_STAGE, HISTORY_NAME, OBSERVER_STAGE, RunRecord
from ddgen.units import readable_seconds

TimeRow = tuple[str, str, str]


def time_rows(run: RunRecord) -> list[TimeRow]:
    """Returns stage, time and where that is known from, in the order of the work."""
    rows: list[TimeRow] = []
    stages, observer = stage_seconds(run.history), observer_time(run)
    if observer is not None:
        rows.append(("observer", readable_seconds(observer[0]), observer[1]))
    if AUTOENCODER_STAGE in stages:
        rows.append((AUTOENCODER_STAGE, readable_seconds(stages[AUTOENCODER_STAGE]), HISTORY_NAME))
    training = training_seconds(run)
    if training is not None:
        rows.append(("diffusion model", readable_seconds(training), "steps and images per second, metrics.jsonl"))
    if stages:
        rows.append(("training in all", readable_seconds(sum(stages.values())), f"{HISTORY_NAME}, with the FID curve"))
    for shown in run.sets:
        recorded = shown.manifest.get("provenance", {}).get("seconds")
        for stage, seconds in (recorded if isinstance(recorded, Mapping) else {}).items():
            if _is_seconds(seconds):
                rows.append((f"{shown.name}: {stage}", readable_seconds(seconds), "manifest.json"))
        students = [row["seconds"] for row in shown.results.get("rows", ()) if _is_seconds(row.get("seconds"))]
        if students:
            rows.append((f"{shown.name}: students", readable_seconds(sum(students)), "results.json"))
        ranking = (shown.results.get("ranking") or {}).get("seconds")
        if isinstance(ranking, float):
            rows.append((f"{shown.name}: students of the ranking", readable_seconds(ranking), "results.json"))
    return rows


def observer_time(run: RunRecord) -> tuple[float, str] | None:
    """Returns the seconds of training the observer and where they are known from, or None.

    An observer that the run was given counts where it was trained by ddgen; reading it does not. Its epochs alone,
    without what was measured after each, stand in where there is no history.
    """
    alone = sum(stage_seconds(run.observer_history).values())
    if alone:
        return alone, f"trained alone, observer/{HISTORY_NAME}"
    stages = stage_seconds(run.history)
    if OBSERVER_STAGE in stages and not run.config.get("observer"):
        return stages[OBSERVER_STAGE], HISTORY_NAME
    epochs = [epoch["seconds"] for epoch in run.observer_epochs if _is_seconds(epoch.get("seconds"))]
    unit = "epoch" if len(epochs) == 1 else "epochs"
    return (sum(epochs), f"{len(epochs)} {unit}, observer_metrics.jsonl") if epochs else None


def stage_seconds(history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the seconds of every stage of training, over all times that it was started or gone on with.

    What a killed process spent in the stage that it was killed in is not known, and not counted.
    """
    found: dict[str, float] = {}
    for line in history:
        if line.get("event") == "stage":
            found[line["stage"]] = found.get(line["stage"], 0.0) + line["seconds"]
    return found


def training_seconds(run: RunRecord) -> float | None:
    """Seconds of the training steps, without points of the curve: images between two lines over their rate."""
    batch = run.config.get("train_batch_size")
    lines = {
        line["step"]: line["images_per_second"]
        for line in run.metrics
        if line.get("images_per_second") and line.get("step")
    }
    if not batch or not lines:
        return None
    steps = [0, *sorted(lines)]
    return sum((later - earlier) * batch / lines[later] for earlier, later in pairwise(steps))


def _is_seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
