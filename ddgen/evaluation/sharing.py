"""Several processes train the students of one evaluation: each takes one that nobody has taken, until none is left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from ddgen.checkpoint import remove_dir
from ddgen.evaluation.cells import run_cell
from ddgen.evaluation.evaluate import Plan, make_plan, make_sources, results_of
from ddgen.evaluation.planned import Planned
from ddgen.evaluation.ranking import announce
from ddgen.evaluation.report import Results
from ddgen.evaluation.request import Request
from ddgen.evaluation.sources import Source, labelled
from ddgen.evaluation.students import Diverged
from ddgen.resume import on_main
from ddgen.together import Halt, claim, together

CLAIMS_NAME = "claims"
DRAWS, STUDENTS = "draws", "students"
SECONDS_BETWEEN_COUNTS = 1.0

OnEpoch = Callable[[int, float | None], None]
"""Epochs done and, when the student was scored, its accuracy."""


class Claims:
    """Who does what: a folder with an empty file for every task that a process has taken, and another when it is done.

    They say nothing about what an earlier run has done; finished students are known by their cells.

    Args:
        output_dir: Holds the folder; all processes must see it.
        accelerator: Processes; every one must make its own `Claims`, which are empty then.
    """

    def __init__(self, output_dir: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = output_dir / CLAIMS_NAME, accelerator
        self.halt = Halt(self.folder)
        on_main(accelerator, self._clear)

    def share(self, kind: str, tasks: Mapping[str, Callable[[OnEpoch], None]]) -> None:
        """Has every task done once, by the process that comes to it first; returns when all are done.

        Args:
            kind: `DRAWS` or `STUDENTS`, of which the main process shows a bar.
            tasks: By names that are the same on all processes, in the order in which they are taken.

        Raises:
            UserError: What is wrong with a task, on all processes.
            Stopped: SIGTERM or Ctrl-C on any process, on all of them.
        """
        folder = self.folder / kind
        with _counted(folder, len(tasks), shown=kind == STUDENTS and self.accelerator.is_main_process):
            together(self.accelerator, self.halt, lambda: self._work(folder, tasks))

    def remove(self) -> None:
        """Deletes the folder, when no process will look into it any more."""
        if self.folder.is_dir():
            remove_dir(self.folder)

    def _clear(self) -> None:
        self.remove()
        for kind in (DRAWS, STUDENTS):
            (self.folder / kind).mkdir(parents=True)

    def _work(self, folder: Path, tasks: Mapping[str, Callable[[OnEpoch], None]]) -> None:
        try:
            for name, task in tasks.items():
                self._look_at_halt()
                if claim(folder / name):
                    task(self._look_at_halt)
                    (folder / f"{name}.done").touch()
        except _HaltedError:
            return  # whoever has called tells why

    def _look_at_halt(self, *_: object) -> None:
        if self.halt.called():
            raise _HaltedError


class _HaltedError(Exception):
    """Another process has told this one to stop."""


def evaluate_together(request: Request, claims: Claims, then: Callable[[Results], None]) -> None:
    """Does what `evaluate` does, on all processes of `claims`; students are trained side by side, longest first.

    Args:
        request: The same on all processes, but for the device and for `progress`, which only the main process shows.
        claims: Who trains what.
        then: Gets the results, on the main process, while the others wait.

    Raises:
        UserError: As `evaluate`, on all processes.
        Stopped: SIGTERM or Ctrl-C on any process, on all of them.
    """
    accelerator = claims.accelerator
    plan = make_plan(request, lambda: _sources_from_main(request, accelerator))
    students = _students(plan)
    draws = dict.fromkeys((planned.source.name, planned.repeat) for planned in students.values())
    sources = {planned.source.name: planned.source for planned in students.values()}
    claims.share(DRAWS, {f"{name} {i}": partial(_draw, sources[name].draw, i) for name, i in draws})
    contest = plan.contest
    if contest is not None:
        on_main(accelerator, lambda: print(announce(contest, accelerator.num_processes)))
    claims.share(STUDENTS, {name: partial(_train, planned, plan) for name, planned in students.items()})

    def finish() -> None:
        then(results_of(plan))  # finds all students there, but for those that diverged
        claims.remove()

    on_main(accelerator, finish)


def _sources_from_main(request: Request, accelerator: Accelerator) -> list[Source]:
    """Has the main process choose the images of the baselines; the others read its choice."""
    found: list[Source] = []
    on_main(accelerator, lambda: found.extend(make_sources(request)))
    return found or make_sources(request)


def _students(plan: Plan) -> dict[str, Planned]:
    """Returns all students by name, longest first; one that a row and the ranking share is the row's."""
    contest = plan.contest
    ranked = [] if contest is None else [one for source in contest.sources for one in contest.planned(source)]
    found: dict[str, Planned] = {}
    for planned in (*(student for row in plan.rows for student in row), *ranked):
        found.setdefault(planned.name, planned)
    return dict(sorted(found.items(), key=lambda item: -item[1].length))


def _draw(draw: Callable[[int], object], repeat: int, _: OnEpoch) -> None:
    """Draws images, so that what is kept of it is there for all recipes and networks."""
    draw(repeat)


def _train(planned: Planned, plan: Plan, on_epoch: OnEpoch) -> None:
    images = labelled(planned.source.draw(planned.repeat), planned.recipe, plan.teachers, plan.setting)
    try:
        run_cell(planned.cell(images), plan.setting, on_epoch)
    except Diverged:
        if not planned.may_diverge:
            raise


@contextmanager
def _counted(folder: Path, total: int, *, shown: bool) -> Iterator[None]:
    """Shows how many tasks all processes have done, also while this one works or waits."""
    if not shown:
        yield
        return
    over = threading.Event()
    bar_format = "{desc} |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}]"
    with tqdm(total=total, desc=f"{folder.name} of all processes", dynamic_ncols=True, bar_format=bar_format) as bar:

        def show() -> None:
            bar.n = sum(1 for _ in folder.glob("*.done"))
            bar.refresh()

        def keep_showing() -> None:
            while not over.wait(SECONDS_BETWEEN_COUNTS):
                show()

        thread = threading.Thread(target=keep_showing, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            show()
