"""What `accelerate launch` leaves undone: processes and threads on a CPU, processes that share a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddgen import hardware, launch

ROOT = Path(__file__).parents[1]
SCRIPT = """
import os, sys, torch
from pathlib import Path
from ddgen.launch import start_asked_for_processes
start_asked_for_processes()
from ddgen.commands.runs import start_accelerator
accelerator, _ = start_accelerator("no")
said = f"processes {accelerator.num_processes} threads {torch.get_num_threads()}"
Path(sys.argv[1], f"process{accelerator.process_index}.txt").write_text(said)
"""


@pytest.mark.parametrize(
    ("options", "variables", "expected"),
    [
        ([], {}, f"processes 1 threads {launch.num_cores()}"),
        ([], {"OMP_NUM_THREADS": "1"}, "processes 1 threads 1"),
        (["--num_cpu_threads_per_process", "1"], {}, "processes 1 threads 1"),
        (["--cpu", "--num_processes", "2", "--num_cpu_threads_per_process", "1"], {}, "processes 2 threads 1"),
    ],
    ids=["all-cores", "user-chose-one", "flag-chose-one", "two-processes"],
)
def test_launching_on_a_cpu_gives_the_processes_and_threads_asked_for(
    options: list[str], variables: dict[str, str], expected: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # One file a process: two processes that print at once can mix their lines.
    said = [path.read_text() for path in tmp_path.glob("process*.txt")]
    assert said == [expected] * int(expected.split()[1])


def test_outside_accelerate_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert launch.threads_to_use() is None
    assert launch._launcher_options() == []


@pytest.mark.parametrize(("gpus", "processes", "expected"), [(0, 4, False), (2, 2, False), (1, 2, True), (2, 3, True)])
def test_more_processes_than_gpus_share_them(
    gpus: int, processes: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert hardware.share_gpus() is expected
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # started alone
    assert hardware.share_gpus() is False
