"""What the work took: time, hardware, versions and commands, as far as they were recorded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddgen.page.run import AUTOENCODER_STAGE, EvaluatedSet, RunRecord
from ddgen.page.times import observer_time, stage_seconds, training_seconds
from ddgen.units import readable_seconds
from results_page.small import MISSING, count, shorten, table


def times_table(run: RunRecord) -> str:
    """Returns stage, time and where that is known from, in the order of the work."""
    stages, known = stage_seconds(run.history), observer_time(run)
    observer = ("none", "given") if run.config.get("observer") else (MISSING, "")
    if known is not None:
        observer = (readable_seconds(known[0]), known[1])
    latents = (MISSING, "")
    if AUTOENCODER_STAGE in stages:
        latents = (readable_seconds(stages[AUTOENCODER_STAGE]), "history.jsonl")
    steps = training_seconds(run)
    whole = (readable_seconds(sum(stages.values())), _sessions(run)) if stages else (MISSING, "")
    rows = [
        ("observer", *observer),
        (f"{AUTOENCODER_STAGE}{', the autoencoder given' if run.config.get('vae') else ''}", *latents),
        ("steps of the diffusion model", *((readable_seconds(steps), "metrics.jsonl") if steps else (MISSING, ""))),
        ("all of training, with the FD curve", *whole),
    ]
    for shown in run.sets:
        if shown.manifest:
            rows.append((f"making {shown.name}", *_making(shown)))
        if shown.results.get("rows"):
            students = [row for row in shown.results["rows"] if row.get("seconds") is not None]
            total = readable_seconds(sum(row["seconds"] for row in students)) if students else MISSING
            number = count(sum(len(row["scores"]) for row in students), "student")
            rows.append((f"training students of {shown.name}", total, f"{number}, results.json{_ran(shown)}"))
        ranking = shown.results.get("ranking") or {}
        if ranking.get("seconds") is not None:
            rows.append((f"ranking candidates by {shown.name}", readable_seconds(ranking["seconds"]), "results.json"))
    return table(("stage", "time", "known from"), rows)


def _ran(shown: EvaluatedSet) -> str:
    """Says how long the last start of the evaluation took, which keeps the students of earlier ones."""
    seconds = shown.provenance.get("seconds")
    return "" if seconds is None else f"; evaluate.py last ran {readable_seconds(seconds)}"


def _sessions(run: RunRecord) -> str:
    """Says how often training was started, and whether time was lost in a process that was killed."""
    starts = [i for i, line in enumerate(run.history) if line.get("event") == "start"]
    text = "history.jsonl" if len(starts) == 1 else f"history.jsonl, in {len(starts)} starts"
    ends = [run.history[i - 1] for i in [*starts[1:], len(run.history)]]
    killed = sum(line.get("event") != "finish" and line.get("done", True) for line in ends)
    return f"{text}; the last stage of {killed} killed not counted" if killed else text


def _making(shown: EvaluatedSet) -> tuple[str, str]:
    made = shown.manifest.get("provenance", {})
    seconds, number = made.get("seconds") or {}, made.get("candidates_made")
    if not seconds:
        return MISSING, ""
    parts = ", ".join(f"{stage} {readable_seconds(spent)}" for stage, spent in seconds.items() if spent >= 0.05)
    rate = ""
    if number and seconds.get("sampling"):
        rate = f"; {count(number, 'candidate')}, {number / seconds['sampling']:,.1f} a second"
    return readable_seconds(sum(seconds.values())), f"{parts}{rate}, manifest.json"


def hardware_list(run: RunRecord) -> str:
    """Lists devices and versions, each with the work that was done on it."""
    found: dict[str, list[str]] = {}
    starts = [line for line in run.history if line.get("event") == "start"]
    card = card_of(run)
    if not starts and run.config:
        old = {"device": card["device"], "precision": card["numbers"]} if "device" in card else {}
        found.setdefault(_machine(old, card.get("versions")), []).append("training")
    for line in starts:
        found.setdefault(_machine(line["made_with"], line.get("versions")), []).append("training")
    for shown in run.sets:
        if shown.manifest:
            made = shown.manifest.get("provenance", {})
            older = {"device": (made.get("candidates") or {}).get("device")}
            text = _machine(made.get("made_with") or older, shown.manifest.get("versions"))
            found.setdefault(text, []).append(f"making {shown.name}")
        if shown.results:
            older = {"device": shown.results.get("device"), "precision": shown.results.get("precision")}
            text = _machine(shown.provenance.get("made_with") or older, shown.provenance.get("versions"))
            found.setdefault(text, []).append(f"students of {shown.name}")
    return "\n".join(f"- {', '.join(dict.fromkeys(work))}: {text}" for text, work in found.items())


def _machine(found: Mapping[str, Any], versions: Mapping[str, str] | str | None) -> str:
    """Writes down a computer, as far as it was recorded; `device` may be no more than its kind."""
    name, known = found.get("device"), [key for key in ("cores", "threads", "processes") if key in found]
    parts = [f"{name}, of which kind {MISSING}" if name in ("cpu", "cuda") else str(name or f"hardware {MISSING}")]
    parts += [f"{found[key]} {key}" for key in known] or [f"cores, threads and processes {MISSING}"]
    parts.append(f"mixed precision {found.get('precision') or MISSING}")
    text = versions if isinstance(versions, str) else ", ".join(f"{k} {v}" for k, v in (versions or {}).items())
    return f"{', '.join(parts)}; {text or f'versions {MISSING}'}"


def commands_block(run: RunRecord) -> str:
    """Returns every command that was recorded, in the order of the work, each once."""
    trained = [line["command"] for line in run.history if line.get("command")] or [card_of(run).get("command")]
    alone = [line["command"] for line in run.observer_history if line.get("command")]
    lines = [_command(command, "train_ldm.py") for command in [*alone, *trained]]
    for shown in run.sets:
        if shown.manifest:
            lines.append(_command(shown.manifest.get("provenance", {}).get("command"), f"making {shown.name}"))
        if shown.results:
            lines.append(_command(shown.provenance.get("command"), f"evaluating {shown.name}"))
    return "```\n" + "\n".join(dict.fromkeys(lines)) + "\n```"


def _command(command: str | None, what: str) -> str:
    return shorten(command) if command else f"# {what}: {MISSING}"


def card_of(run: RunRecord) -> dict[str, str]:
    """Returns the facts of the generator's card, where earlier runs keep device and command of training."""
    path = (run.path or Path()) / "generator" / "README.md"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    facts = dict(re.findall(r"^\| ([a-z ]+) \| (.+) \|$", text, flags=re.MULTILINE))
    command = re.search(r"Made with\n\n```\n(.+)\n```", text)
    return facts | ({"command": command[1]} if command else {})
