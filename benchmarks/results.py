"""RESULTS.md: what runs reached and what it took, from the files that the three commands left in their folders.

    python benchmarks/results.py runs/cifar10 runs/tinyimagenet --output RESULTS.md --notes docs/reading.md

Every row that was measured is in the tables, in an order that does not depend on the scores; what was not recorded is
said to be so. Pictures go into docs/ beside the page. The same folders give the same bytes.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from results_page.facts import curve_text, ranking_parts, sets_table, trained_table
from results_page.pictures import Pictures
from results_page.scores import accuracy_parts, collect
from results_page.small import first, shorten
from results_page.work import commands_block, hardware_list, times_table

from ddgen.checkpoint import write_bytes
from ddgen.errors import UserError
from ddgen.page.run import RunRecord, is_run, read_run


@dataclass(frozen=True)
class Settings:
    """What the page is made of."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders, in the order of the page."""
    output: str = "RESULTS.md"
    """The page; its pictures go into docs/ beside it."""
    notes: str | None = None
    """A markdown file, written by people, that goes into the page as it is: where the results are behind, and why."""


def main(argv: list[str] | None = None) -> int:
    """Writes the page and its pictures."""
    settings = tyro.cli(Settings, args=argv, use_underscores=True, description=__doc__)
    try:
        write_results_page(settings)
    except UserError as error:
        print(f"results: {str(error).replace('--run_dir', 'RUN')}", file=sys.stderr)
        return 2
    return 0


def write_results_page(settings: Settings) -> None:
    """Reads the runs, and writes the page.

    Raises:
        UserError: A folder that is no run, a damaged file, no notes where some are said to be, or a folder as output.
    """
    output = Path(settings.output)
    if output.is_dir():
        raise UserError(f"--output {output}: a folder; give the name of the page, for instance {output}/RESULTS.md")
    if settings.notes is not None and not Path(settings.notes).is_file():
        raise UserError(f"--notes {settings.notes}: no such file; write it, or leave the setting out")
    if not settings.runs:
        raise UserError("RUN: none given; name folders that train_ldm.py wrote")
    runs = []
    for path in map(Path, settings.runs):
        if not is_run(path):
            raise UserError(f"RUN {path}: nothing of a run in it; give a folder that train_ldm.py wrote")
        runs.append(read_run(path))
    names = _names(settings.runs)
    parts = [_introduction(settings)]
    if len(runs) > 1:
        parts.append("\n".join(f"- [{_title(name, run)}](#{name})" for name, run in zip(names, runs, strict=True)))
    if settings.notes is not None:
        parts.append("## Reading\n\n" + Path(settings.notes).read_text(encoding="utf-8").strip())
    for name, run in zip(names, runs, strict=True):
        parts += _section(name, run, Pictures(output.parent, name))
    write_bytes(output, ("\n\n".join(part for part in parts if part) + "\n").encode())
    print(f"results: {output}")


def _names(runs: Sequence[str]) -> list[str]:
    """Returns a name for every run, its folder's, with a number where another has the same."""
    names: list[str] = []
    for path in runs:
        name = re.sub(r"[^a-z0-9-]+", "-", Path(path).resolve().name.lower()).strip("-") or "run"
        count = sum(re.sub(r"-\d+$", "", other) == name or other == name for other in names)
        names.append(f"{name}-{count + 1}" if name in names else name)
    return names


def _introduction(settings: Settings) -> str:
    words = ["python", "benchmarks/results.py", *settings.runs, "--output", Path(settings.output).name]
    words += ["--notes", settings.notes] if settings.notes is not None else []
    return f"""# Results

Written by a script from the files that the commands below left in their run folders; no number here was typed in, but
for the rows called published:

```
{shorten(shlex.join(words))}
```

A score is top-1 accuracy in percent on all real test images, after the last epoch, never the best of them. Where
several students were trained it is their mean ± sample standard deviation. Every row that was measured is shown, in
one fixed order; all rows of a column were trained by the same recipe. Paths in commands are shortened to their last
name."""


def _title(name: str, run: RunRecord) -> str:
    dataset = first(run.dataset.get("name"), *(shown.results.get("dataset") for shown in run.sets))
    return name if dataset in (None, name) else f"{name}: {dataset}"


def _section(name: str, run: RunRecord, pictures: Pictures) -> list[str]:
    """Returns all that is told of one run."""
    all_scores = collect(run)
    parts = [f'<a id="{name}"></a>\n\n## {_title(name, run)}', trained_table(run)]
    if not all_scores:
        parts.append("### Accuracy\n\nNot evaluated: no `evaluation/*/results.json` in the run.")
    for scores in all_scores:
        parts += [f"### Accuracy of {scores.student}", *accuracy_parts(run, scores), pictures.accuracy(run, scores)]
    parts += ranking_parts(run)
    parts += ["### Distilled sets", sets_table(run), pictures.preview(run)]
    parts += ["### FD curve", curve_text(run), pictures.curve(run), pictures.samples(run)]
    parts += ["### Time and hardware", times_table(run), hardware_list(run)]
    return [*parts, "### Commands", commands_block(run)]


if __name__ == "__main__":
    sys.exit(main())
