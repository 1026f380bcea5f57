"""Several processes that train the students of one evaluation.

This file is also the script that the processes run: `python -m torch.distributed.run tests/test_sharing.py FOLDER`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from evaluation_cases import colour_observer, colours
from test_ranking import distilled, evaluate_picture
from test_scale import ROOT, finish, free_port

import evaluate as evaluate_command
from ddgen.errors import Stopped, UserError
from ddgen.evaluation import cells, sharing, sources
from ddgen.evaluation.evaluate import evaluate
from ddgen.evaluation.report import Results
from ddgen.evaluation.request import Request
from ddgen.evaluation.sharing import Claims, evaluate_together
from ddgen.together import HALT_NAME, Halt, together

FULL = ["--with_full", "--repeats", "2", "--baselines", "random-real", "--students", "convnet1w4", "convnet2w4",
        "--with_ranking", "--rank_models", "convnet1w4", "convnet2w4", "--rank_lr_factors", "1", "1e30"]  # fmt: skip
# On the set and the random images 2 networks x 2 repeats, on all images 2 x 1 of 2 epochs, which the ranking takes
# from the rows as it takes the first repeats; and on each of the three 2 networks that diverge.
NUM_STUDENTS, NUM_DIVERGED = 10, 6


def command(output_dir: Path) -> list[str]:
    return ["--dataset", "digits", "--num_classes", "2", "--image_size", "8", "--mixed_precision", "no", "--epochs",
            "2", "--protocols", "hard", *FULL, "--rank_epochs", "2", "--distilled_dir", str(output_dir.parent / "set"),
            "--output_dir", str(output_dir)]  # fmt: skip


def request(output_dir: Path, accelerator: Accelerator) -> Request:
    """Labels of a teacher, baselines that it chooses, and stored labels of one of them."""
    train = colours(6, "train")
    return Request(
        rounds=[distilled(train)], train=train, test=colours(20, "test"), observers=[colour_observer()],
        students=("convnet1w8",), protocols=("rded", "fixed-soft"), baselines=("herding", "rded-real"), repeats=2,
        epochs=2, seed=0, device=accelerator.device, precision="no", output_dir=output_dir, progress=False,
    )  # fmt: skip


def log(module: Any, name: str, path: Path, before: Callable[[int], None] = lambda number: None) -> None:
    """Adds a line to a file at every call of a function, after `before` has got the number of calls."""
    function = getattr(module, name)
    count = 0

    def logged(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        before(count)
        result = function(*args, **kwargs)
        with open(path, "a") as file:
            file.write(f"{name}\n")
        return result

    setattr(module, name, logged)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def share(folder: Path) -> None:
    """One of two processes; each says in files what it has done and how that ended."""
    rank = int(os.environ["RANK"])
    train = cells.train_student

    def at_second(event: Callable[[], None], halt_path: Path) -> Callable[[int], None]:
        """Something happens to process 1 at its second student, for which process 0 waits at its own."""

        def before(number: int) -> None:
            if rank == 1 and number == 2:
                event()
            elif number == 2:
                wait_until(halt_path.exists)

        return before

    def fail() -> None:
        raise UserError("process 1 has found a mistake")

    def run(name: str, output_dir: Path, before: Callable[[int], None] = lambda number: None) -> None:
        cells.train_student = train
        log(cells, "train_student", folder / f"trained-{name}-{rank}", before)
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
            code = evaluate_command.main(command(output_dir))
        (folder / f"ended-{name}-{rank}").write_text(json.dumps([code, err.getvalue(), out.getvalue()]))

    halt = Path(sharing.CLAIMS_NAME) / HALT_NAME
    run("mistaken", folder / "mistaken", at_second(fail, folder / "mistaken" / halt))
    run("stopped", folder / "two", at_second(lambda: os.kill(os.getpid(), signal.SIGTERM), folder / "two" / halt))
    run("finished", folder / "two")
    accelerator = Accelerator(cpu=True)
    cells.train_student = train
    theirs = folder / "taught-1"

    def let_the_other_train(number: int) -> None:
        if rank == 0 and number == 2:
            wait_until(lambda: theirs.exists() and "train_student" in theirs.read_text())

    log(cells, "train_student", folder / f"taught-{rank}", let_the_other_train)
    for name in ("rded_real", "by_features"):
        log(sources, name, folder / f"taught-{rank}")

    def then(results: Results) -> None:
        assert rank == 0

    evaluate_together(
        request(folder / "taught-by-two", accelerator), Claims(folder / "taught-by-two", accelerator), then
    )
    accelerator.end_training()


def without_times(path: Path) -> Any:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: strip(one) for name, one in value.items() if "seconds" not in name}
        return [strip(one) for one in value] if isinstance(value, list) else value

    return strip(json.loads((path / "results.json").read_text()))


def lines(folder: Path, pattern: str) -> Counter[str]:
    return Counter(line for path in folder.glob(pattern) for line in path.read_text().split())


def test_two_processes_share_the_students_of_one(tmp_path: Path) -> None:
    for label in ("0", "1"):
        (tmp_path / "set" / label).mkdir(parents=True)
        evaluate_picture(tmp_path / "set" / label / "a.png", int(label))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finish(subprocess.Popen([*launch, __file__, str(tmp_path)], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))  # fmt: skip

    def ended(name: str, rank: int) -> tuple[int, str, str]:
        code, err, out = json.loads((tmp_path / f"ended-{name}-{rank}").read_text())
        return code, (err.splitlines() or [""])[-1], out

    for rank, who in enumerate(("ddgen", "ddgen (process 1)")):
        code, err, _ = ended("mistaken", rank)
        assert code == 2 and err == f"{who}: process 1 has found a mistake"
    assert not (tmp_path / "mistaken" / "results.json").exists()

    assert ended("stopped", 0)[:2] == (143, "stopped; the same command goes on") and ended("stopped", 1)[0] == 143
    first, then = lines(tmp_path, "trained-stopped-*"), lines(tmp_path, "trained-finished-*")
    assert 0 < first.total() < NUM_STUDENTS
    # A student that diverged is in neither log; of the others none was trained twice.
    assert first.total() + then.total() == len(list((tmp_path / "two" / "cells").iterdir())) == NUM_STUDENTS
    code, _, out = ended("finished", 0)
    assert code == 0 and ended("finished", 1) == (0, "", "")
    assert "each on distilled, random real, full real: 12 students, " in out and "on 2 processes\n" in out
    assert not (tmp_path / "two" / sharing.CLAIMS_NAME).exists()

    assert evaluate_command.main(command(tmp_path / "one")) == 0
    assert without_times(tmp_path / "two") == without_times(tmp_path / "one")
    assert len(without_times(tmp_path / "one")["ranking"]["diverged"]) == NUM_DIVERGED

    # 3 sets x 2 recipes x 2 repeats; herding chooses once, RDED once for each repeat, for both recipes
    assert lines(tmp_path, "taught-[01]") == {"train_student": 12, "rded_real": 2, "by_features": 1}
    assert lines(tmp_path, "taught-1")["train_student"] > 0
    results = evaluate(request(tmp_path / "taught-by-one", Accelerator(cpu=True)))
    assert len(results.rows) == 6
    assert without_times(tmp_path / "taught-by-two") == without_times(tmp_path / "taught-by-one")


def test_a_process_that_is_gone_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_: object) -> list[object]:
        raise RuntimeError("Connection closed\nby peer")

    def stop() -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("ddgen.together.gather_object", closed)
    halt = Halt(tmp_path)
    with pytest.raises(UserError, match=r"has ended too early; .* \(Connection closed by peer\)"):
        together(Accelerator(cpu=True), halt, lambda: None)
    assert not halt.called()
    with pytest.raises(Stopped):  # why this process stops is known
        together(Accelerator(cpu=True), halt, stop)
    assert halt.called()


if __name__ == "__main__":
    share(Path(sys.argv[1]))
