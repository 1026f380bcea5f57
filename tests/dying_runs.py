"""Runs trainings in forked children of one warm process, some of which are made to die; started by test_resume.

    python tests/dying_runs.py PLAN.json

The plan is a list of [action, arguments]; one line of JSON is printed for each.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tqdm
from accelerate import Accelerator

from ddgen import resume
from ddgen.autoencoder import latents
from ddgen.autoencoder.autoencoder import wrap
from ddgen.autoencoder.training import build
from ddgen.checkpoint import latest_checkpoint
from ddgen.commands import train
from ddgen.config import TrainConfig, parse
from ddgen.diffusion import generator
from ddgen.diffusion.training import train_diffusion
from ddgen.errors import UserError

torch.set_num_threads(1)
tqdm.tqdm.monitor_interval = 0  # no thread, so that forking is safe
train.draw_curve = lambda *_, **__: None  # a second a picture
train.first_lines = lambda *_, **__: ""  # steps that are timed


def in_child(work: Callable[[], int]) -> int:
    """Returns the exit code of `work` in a forked process; negative for a signal."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 70
        try:
            code = work()
        except UserError as error:
            print(f"ddgen: {error}", file=sys.stderr)
            code = 2
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train_with(argv: list[str], prepare: Callable[[], None] = lambda: None) -> int:
    """Runs the command in a child that `prepare` has changed."""

    def work() -> int:
        prepare()
        return train.train(parse(TrainConfig, argv, "train_ldm.py"))

    return in_child(work)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(module: Any, name: str, do: Callable[..., None]) -> None:
    """Calls `do` with the arguments of a function before every call of it."""
    function = getattr(module, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        do(*args)
        return function(*args, **kwargs)

    setattr(module, name, changed)


def signal_at(training: str, step: int, number: int) -> Callable[[], None]:
    """A signal just before the keeper of a training looks after `step`; observer and autoencoder save at every step."""
    resume.SECONDS_BETWEEN_CHECKPOINTS, resume.SHARE_OF_SAVING = 0.0, 1e9

    def send(keeper: resume.Keeper, done: int) -> None:
        if keeper.checkpoints.folder.name == training and done == step:
            os.kill(os.getpid(), number)

    return lambda: before(resume.Keeper, "after_step", send)


def full_disk(file_name: str) -> Callable[[], None]:
    def refuse(_: Any, target: Any, *__: Any) -> None:
        if file_name in str(getattr(target, "name", target)):
            raise OSError(errno.ENOSPC, "No space left on device")

    def prepare() -> None:
        before(resume, "save_file", refuse)
        before(torch, "save", refuse)

    return prepare


EVENTS: dict[str, Callable[..., Callable[[], None]]] = {
    "nothing": lambda: lambda: None,
    "signal_at": signal_at,
    "full_disk": full_disk,
    "die_in_latents": lambda: lambda: before(latents, "_finish", die),
    "die_in_generator": lambda: lambda: before(generator.shutil, "copy", die),
}


def dying_at_write(count: int, step: int) -> Callable[[], None]:
    """Death just before the write number `count` of the checkpoint of `step`; a file it was to write is half there."""
    left, active = count, False

    def write(target: Path | None = None) -> None:
        nonlocal left
        left -= active
        if active and not left:
            if target is not None:
                target.write_bytes(b"half")
            die()

    def prepare() -> None:
        save = resume.Checkpoints.save

        def watched(self: resume.Checkpoints, snapshot: resume.Snapshot) -> Path:
            nonlocal active
            active = snapshot.step == step
            path = save(self, snapshot)
            active = False
            return path

        resume.Checkpoints.save = watched
        before(resume, "save_file", lambda _, path: write(path))
        before(torch, "save", lambda _, file: write(Path(file.name)))
        before(shutil, "copyfile", lambda _, path: write(path))
        for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
            before(os, name, lambda *_: write())

    return prepare


def train_bare(config: TrainConfig, path: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Trains a diffusion model alone, on made-up latents, from the latest checkpoint: much faster than the command."""
    side = torch.Generator().manual_seed(0)
    mean = torch.randn(40, 1, 4, 4, 4, generator=side).half()
    torch.manual_seed(0)
    vae = wrap(build(config.autoencoder, 16), torch.device("cpu"), "no")

    def work() -> int:
        prepare()
        made = train_diffusion(
            config,
            latents.LatentCache(mean, None, "made up"),
            torch.arange(40) % 2,
            vae,
            ("a", "b"),
            16,
            accelerator=Accelerator(cpu=True),
            precision="no",
            output_dir=path,
            resume_from=latest_checkpoint(path / "checkpoints"),
            fid_every=config.monitor.fid_every or 0,
            monitor=lambda pixels, _: {"fd_mean_6": pixels.float().mean().item()},
        )
        generator.save_generator(made, path / "generator", "", replace_existing=True)
        return 0

    path.mkdir(exist_ok=True)
    return in_child(work)


def at_every_write(argv: list[str], work_dir: str, before_step: int, step: int) -> dict[str, list[int]]:
    """Kills a training at every write of the checkpoint of `step` and lets it go on; work_dir/whole is uninterrupted.

    Returns:
        Exit codes of the killed and of the resumed processes.
    """
    root, config = Path(work_dir), parse(TrainConfig, argv, "train_ldm.py")
    root.mkdir()
    assert train_bare(config, root / "whole") == 0
    train_bare(config, root / "begun", signal_at("checkpoints", before_step, signal.SIGKILL))
    killed, resumed = [], []
    for count in range(1, 100):
        path = Path(shutil.copytree(root / "begun", root / str(count)))
        code = train_bare(config, path, dying_at_write(count, step))
        if code == 0:
            shutil.rmtree(path)
            break
        killed.append(code)
        resumed.append(train_bare(config, path))
    return {"killed": killed, "resumed": resumed}


def main(plan_path: str) -> None:
    for action, arguments in json.loads(Path(plan_path).read_text()):
        if action == "move":
            os.rename(*arguments)
        elif action == "at_every_write":
            print("DONE", json.dumps(at_every_write(*arguments)))
        else:
            argv, *event = arguments
            print("DONE", json.dumps(train_with(argv, EVENTS[action](*event))))


if __name__ == "__main__":
    main(sys.argv[1])
