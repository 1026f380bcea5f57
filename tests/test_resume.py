"""Resuming: whatever stops a run, the same command goes on, and what comes out is what an uninterrupted run gives."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from test_commands import ROOT, SMALL, complaint

import train_ldm
from ddgen import resume
from ddgen.checkpoint import latest_checkpoint, locked
from ddgen.diffusion import objective
from ddgen.errors import Stopped, UserError
from ddgen.resume import Checkpoints, Keeper, LossWatch, Snapshot
from ddgen.seeds import batch_indices
from ddgen.stopping import Noted, note_signals, stop_at_once

pytestmark = pytest.mark.xdist_group("resume")  # one worker, so that the long fixture is made once
CLOCKS = {"images_per_second", "tflops", "seconds"}
# Checkpoints fall between the lines of the metrics, in the middle of an epoch; dropout draws in every step.
RECIPE = [*SMALL, "--log_every", "3", "--checkpoints_total_limit", "1", "--gradient_accumulation_steps", "2"]
RECIPE += ["--unet_dropout", "0.1", "--fid_num_images", "6", "--posthoc_ema_stds", "0.15"]
NO_CURVE = [*RECIPE[:-2], "--fid_every", "0"]
SHORT = [*RECIPE, "--max_train_steps", "4", "--checkpointing_steps", "2", "--fid_every", "4", "--sample_every", "0"]
SHORT += ["--unet_channels", "32"]


def content(path: Path) -> Any:
    """What must be the same in two runs: every byte, but for clocks and for where the run is."""
    if path.name == "optimizer.pt":
        saved = torch.load(path, weights_only=True)
        states = {
            key: {name: value.numpy().tobytes() for name, value in s.items()} for key, s in saved["state"].items()
        }
        return states, saved["param_groups"]
    if path.suffix == ".safetensors":  # the order of what it says of itself is not fixed
        with safe_open(path, framework="pt") as file:
            return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in sorted(file.keys())}
    if path.name.endswith("metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]
    if path.name == "history.jsonl":  # tells how often the run was started; every stage must have come to its end
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {line["stage"] for line in lines if line.get("done")}, lines[-1]
    if path.name == "config.yaml":
        return [line for line in path.read_text().splitlines() if not line.startswith("output_dir:")]
    return path.read_bytes()


def differences(ours: Path, theirs: Path) -> list[str]:
    """Names of files that are in one of two folders only, or not the same."""
    here, there = ({p.relative_to(root) for p in root.rglob("*") if p.is_file()} for root in (ours, theirs))
    assert len(there) > 10
    return [str(name) for name in sorted(here | there)
            if name not in here & there or content(ours / name) != content(theirs / name)]  # fmt: skip


def carry_out(plan: list[Any], work_dir: Path) -> tuple[list[Any], str]:
    """Has dying_runs.py carry out a plan; returns what each action gave, and what was printed."""
    (work_dir / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "dying_runs.py"), str(work_dir / "plan.json")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line.removeprefix("DONE ")) for line in done.stdout.splitlines() if line.startswith("DONE ")]
    return results, done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, beside one that was stopped in every way there is, and copies killed at every write."""
    work_dir = tmp_path_factory.mktemp("resume")
    whole, cut, moved = ([*RECIPE, "--output_dir", str(work_dir / name)] for name in ("whole", "cut", "moved"))
    plan = [
        ["nothing", [whole]],
        ["signal_at", [cut, "observer_checkpoints", 5, signal.SIGTERM]],
        ["signal_at", [cut, "observer_checkpoints", 17, signal.SIGKILL]],
        ["signal_at", [cut, "autoencoder_checkpoints", 2, signal.SIGINT]],
        ["die_in_latents", [cut]],
        ["full_disk", [cut, "optimizer.pt"]],
        ["move", [str(work_dir / "cut"), str(work_dir / "moved")]],
        ["signal_at", [moved, "checkpoints", 5, signal.SIGTERM]],
        ["signal_at", [[*moved, "--resume_from_checkpoint", "latest"], "checkpoints", 7, signal.SIGKILL]],
        ["die_in_generator", [moved]],
        ["nothing", [moved]],
        ["at_every_write", [SHORT, str(work_dir / "writes"), 3, 4]],
    ]
    results, printed = carry_out(plan, work_dir)
    (work_dir / "results.json").write_text(json.dumps(results))
    (work_dir / "printed.txt").write_text(printed)
    return work_dir / "whole"


def test_a_run_stopped_in_every_way_is_bit_for_bit_the_uninterrupted_one(whole: Path) -> None:
    results = json.loads((whole.parent / "results.json").read_text())
    assert results[:-1] == [0, 143, -9, 130, -9, 2, 143, -9, -9, 0]
    assert differences(whole.parent / "moved", whole) == []
    printed = (whole.parent / "printed.txt").read_text()
    for line in (
        "stopped at step 5 of 37; the same command goes on from there",
        "observer: going on at step 16 of 37",  # every step was saved, and 17 not yet
        "autoencoder: going on at step 2 of 4",
        f"going on with {whole.parent / 'moved'} at step 5 of 8",
        f"ddgen: {whole.parent / 'cut' / 'checkpoints'}: the disk is full: ",
    ):
        assert line in printed


def test_killed_at_any_write_of_a_checkpoint_a_run_goes_on_exactly(whole: Path) -> None:
    results = json.loads((whole.parent / "results.json").read_text())[-1]
    writes = whole.parent / "writes"
    killed = results["killed"]
    assert len(killed) >= 20 and set(killed) == {-signal.SIGKILL} and set(results["resumed"]) == {0}
    for count in range(1, len(killed) + 1):
        assert differences(writes / str(count), writes / "whole") == [], f"killed at write {count}"


PROCESSES = """
import os, signal, sys
from pathlib import Path
from ddgen.launch import start_asked_for_processes
start_asked_for_processes()
from accelerate import Accelerator
import train_ldm
from ddgen.resume import Keeper

Accelerator.end_training = lambda self: None  # the processes serve three commands
after_step = Keeper.after_step

def stop(self, step):
    if step == 5 and self.last == 12 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    after_step(self, step)

codes = [train_ldm.main([*sys.argv[1:], "--output_dir", "whole"])]
Keeper.after_step = stop
codes.append(train_ldm.main([*sys.argv[1:], "--output_dir", "cut"]))
Keeper.after_step = after_step
codes.append(train_ldm.main([*sys.argv[1:], "--output_dir", "cut"]))
Path(f"codes{os.environ['RANK']}.txt").write_text(" ".join(map(str, codes)))  # printed lines could mix
"""


def test_three_processes_stop_together_and_go_on_exactly(tmp_path: Path) -> None:
    """Three, because a sum of two does not depend on its order."""
    (tmp_path / "thrice.py").write_text(PROCESSES)
    launch = ["accelerate.commands.launch", "--num_processes", "3", "--cpu", "--num_cpu_threads_per_process", "1"]
    recipe = [*NO_CURVE, "--max_train_steps", "12", "--checkpointing_steps", "12"]
    recipe += ["--train_batch_size", "12", "--vae_batch_size", "6"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "thrice.py", *recipe],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.read_text() for path in tmp_path.glob("codes*.txt")] == ["0 143 0"] * 3
    assert "stopped at step 10 of 12" in done.stdout and "going on with cut at step 10 of 12" in done.stdout
    assert differences(tmp_path / "cut", tmp_path / "whole") == []


# --- the same command


def state_of(path: Path) -> list[tuple[Path, int]]:
    return sorted((p, p.stat().st_mtime_ns) for p in path.rglob("*"))


def test_a_finished_run_says_so_and_is_not_touched(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state_of(whole)
    for extra in ([], ["--resume_from_checkpoint", "latest"]):
        assert train_ldm.main([*RECIPE, "--output_dir", str(whole), *extra]) == 0
        assert f"{whole}: this run is finished" in capsys.readouterr().out
    assert state_of(whole) == before


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--learning_rate", "0.5"], "--learning_rate 0.5: {} was started with 0.001; use that, or another"),
        (["--log_every", "2"], "--log_every 2: {} was started with 3; add --resume_from_checkpoint latest to go on"),
        (
            ["--learning_rate", "0.5", "--resume_from_checkpoint", "latest"],
            "--learning_rate 0.5: {} was started with 0.001; use that, or another",
        ),
        (["--resume_from_checkpoint", "{}/checkpoints/step-00000004"], "step-00000008 is later, and would be taken"),
    ],
)
def test_a_folder_of_another_recipe_is_refused(
    extra: list[str], expected: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = whole / "checkpoints" / "step-00000004"
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.copytree(path / "checkpoints" / "step-00000008", path / "checkpoints" / earlier.name)
    state = path / "checkpoints" / earlier.name / "state.json"
    state.write_text(state.read_text().replace('"step": 8', '"step": 4'))
    before = state_of(path)
    assert train_ldm.main([*RECIPE, "--output_dir", str(path), *(word.format(path) for word in extra)]) == 2
    assert expected.format(path) in complaint(capsys)
    assert state_of(path) == before


def test_foreign_files_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for extra in ([], ["--resume_from_checkpoint", "latest"]):
        assert train_ldm.main([*RECIPE, "--output_dir", str(tmp_path), *extra]) == 2
        assert f"--output_dir {tmp_path}: not empty, and not a run (no config.yaml)" in complaint(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_other_images_are_refused(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    path.mkdir()
    shutil.copy(whole / "config.yaml", path)
    facts = json.loads((whole / "dataset.json").read_text()) | {"fingerprint": "of others"}
    (path / "dataset.json").write_text(json.dumps(facts))
    assert train_ldm.main([*RECIPE, "--output_dir", str(path)]) == 2
    assert f"other images than {path} was started with" in complaint(capsys)


def test_a_checkpoint_of_another_recipe_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--observer", str(whole / "observer"), "--vae", str(whole / "autoencoder"), "--output_dir"]
    checkpoint = str(whole / "checkpoints" / "step-00000008")
    again = [*RECIPE, *given, str(tmp_path / "run"), "--resume_from_checkpoint", checkpoint]
    assert train_ldm.main([*again, "--learning_rate", "0.5"]) == 2
    assert "was made with learning_rate 0.001, not 0.5" in complaint(capsys)


def test_two_processes_do_not_train_in_one_folder(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--observer", str(whole / "observer"), "--vae", str(whole / "autoencoder")]
    with locked(tmp_path / "run"):
        assert train_ldm.main([*RECIPE, *given, "--output_dir", str(tmp_path / "run")]) == 2
    assert "another process is training in it" in complaint(capsys)
    with locked(tmp_path / "run"):
        pass


# --- losses that are not finite


def test_a_loss_that_is_not_finite_is_named_by_step_and_images(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def weights(alpha: torch.Tensor, *_: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return alpha * float("nan") if calls == 2 * 6 else torch.ones_like(alpha)  # second micro-batch of step 6

    monkeypatch.setattr(objective, "loss_weights", weights)
    given = ["--observer", str(whole / "observer"), "--vae", str(whole / "autoencoder")]
    path = tmp_path / "run"
    assert train_ldm.main([*NO_CURVE, *given, "--log_every", "50", "--output_dir", str(path)]) == 2
    images = batch_indices(0, "diffusion", 5 * 8 + 4, 4, 430).tolist()
    assert complaint(capsys) == (
        f"ddgen: step 6: the loss is not finite for images {', '.join(map(str, images))} (micro-batch 2 of 2, process 0"
        f" of 1, positions 44 to 47 of the order); last good checkpoint: {path}/checkpoints/step-00000004; try a lower"
        " --learning_rate in another --output_dir"
    )
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["step-00000004"]


def test_the_first_of_many_bad_values_is_the_one_named() -> None:
    def explain(step: int, process: int, column: int) -> UserError:
        return UserError(f"{step} {process} {column}")

    watch = LossWatch(None, explain)
    for values in ([1.0, 2.0], [3.0, 4.0]):
        watch.add(torch.tensor(values))
    assert watch.settle(12).tolist() == [[[1.0, 2.0]], [[3.0, 4.0]]]
    assert len(watch.settle(12)) == 0
    for values in ([1.0, 2.0], [3.0, float("inf")], [float("nan"), 1.0]):
        watch.add(torch.tensor(values))
    with pytest.raises(UserError, match="14 0 1"):
        watch.settle(15)


# --- writing


def snapshot(step: int) -> Snapshot:
    weights = {"a": torch.full((3, 2), float(step)), "b": torch.ones(2, 2, 2, 2).to(memory_format=torch.channels_last)}
    return Snapshot(step, {"net": weights, "ema": weights}, {"state": {0: {"m": weights["a"]}}}, {"loss": 0.1 * step})


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", {"channels": (32, 64)}, metrics_path=tmp_path / "metrics.jsonl")
    assert checkpoints.go_on(pytest.fail) == 0
    (tmp_path / "metrics.jsonl").write_text("one\n")
    path = checkpoints.save(snapshot(3))
    (tmp_path / "metrics.jsonl").write_text("one\ntwo\nha")
    found: list[Snapshot] = []
    assert Checkpoints(tmp_path / "c", {"channels": (32, 64)}).go_on(found.append) == 3
    assert torch.equal(found[0].tensors["net"]["a"], torch.full((3, 2), 3.0))
    assert found[0].facts == {"loss": 0.1 * 3} and found[0].step == 3
    checkpoints.tidy(path)
    assert (tmp_path / "metrics.jsonl").read_text() == "one\n"
    with pytest.raises(UserError, match=r"was made with channels \[32, 64\], not \[32\]"):
        Checkpoints(tmp_path / "c", {"channels": (32,)}).go_on(found.append)
    (path / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="damaged"):
        checkpoints.go_on(found.append)


FAILURES = {
    "errno": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_full_disk_at_any_file_leaves_the_last_checkpoint(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "c", {}, metrics_path=tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("one\n")
    kept = checkpoints.save(snapshot(1))
    writers = [(resume, "save_file", 0), (resume, "save_file", 1), (torch, "save", 0), (resume.shutil, "copyfile", 0),
               (resume, "write_json", 0), (os, "fsync", 0), (os, "fsync", 5), (os, "rename", 0)]  # fmt: skip
    for module, name, after in writers:
        function, calls = getattr(module, name), 0

        def refuse(*args: Any, _function: Any = function, _after: int = after, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > _after:
                raise failure
            return _function(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, refuse)
            with pytest.raises(UserError, match=r"c: the disk is full: 200 B are needed here, .* are free"):
                checkpoints.save(snapshot(2))
        assert [p.name for p in (tmp_path / "c").iterdir()] == [kept.name], (name, after)
    checkpoints.save(snapshot(2))
    assert latest_checkpoint(tmp_path / "c") == tmp_path / "c" / "step-00000002"


def test_a_disk_known_to_be_too_full_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr(resume, "save_file", pytest.fail)
    with pytest.raises(UserError, match="200 B are needed here, 100 B are free"):
        Checkpoints(tmp_path, {}).save(snapshot(1))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {})
    kept = checkpoints.save(snapshot(1))
    bad = snapshot(2)
    bad.tensors["ema"]["b"][1, 0, 1, 0] = float("nan")
    with pytest.raises(UserError, match=f"step 2: the weights are no longer finite.*last good checkpoint: {kept}"):
        checkpoints.save(bad)
    assert list(tmp_path.iterdir()) == [kept]


# --- stopping


def test_signals_are_noted_in_a_training_and_stop_at_once_elsewhere() -> None:
    reached = []
    with pytest.raises(Stopped) as stopped, stop_at_once():
        with note_signals() as noted:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)  # a launcher passing on what everyone has got
            reached.append(noted.number)
        reached.append("after a training that did not act on it")
    assert stopped.value.signal_number == signal.SIGTERM and reached == [signal.SIGTERM]
    with pytest.raises(Stopped) as stopped, stop_at_once():
        os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.signal_number == signal.SIGINT


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux sends it")
def test_a_training_is_stopped_with_its_launcher(tmp_path: Path) -> None:
    """``accelerate launch`` passes no signal on to a single process."""
    (tmp_path / "training.py").write_text(
        "import os, signal, time\nfrom pathlib import Path\nfrom ddgen.launch import stop_with_launcher\n"
        "signal.signal(signal.SIGTERM, lambda number, _: (Path('stopped').write_text(str(number)), os._exit(0)))\n"
        "stop_with_launcher()\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.call([{sys.executable!r}, 'training.py'])"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_MIXED_PRECISION": "no"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"
    launcher.terminate()
    launcher.wait()
    launcher.stdout.close()
    deadline = time.monotonic() + 20
    while not (tmp_path / "stopped").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "stopped").read_text() == str(int(signal.SIGTERM))


def test_a_second_ctrl_c_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt), note_signals():
        os.kill(os.getpid(), signal.SIGINT)
        now = 2.5
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_short_training_is_saved_by_time_and_slow_disks_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    saved: list[int] = []

    def slow_save(_: Checkpoints, taken: Snapshot) -> None:
        nonlocal now
        now += 6
        saved.append(taken.step)

    monkeypatch.setattr(Checkpoints, "save", slow_save)
    keeper = Keeper(Checkpoints(tmp_path, {}), snapshot, lambda _: None, Noted(), None, last=100)
    for step in range(1, 31):
        now += 10
        keeper.after_step(step)
    assert saved == [6, 18, 30]  # after 60 s, then 6 s / 0.05 apart
    keeper.noted.number = signal.SIGTERM
    with pytest.raises(Stopped, match="stopped at step 31 of 100"):
        keeper.after_step(31)
    assert saved[-1] == 31
