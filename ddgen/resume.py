"""What the three trainings share: checkpoints, stopping between two steps, and a loss that is not finite.

A training is a step number plus tensors: everything random in it is a function of (seed, step). Its `Keeper` writes a
`Snapshot` of these whenever one is due, and `Checkpoints.load` gives it back.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddgen.checkpoint import (
    atomic_dir,
    checkpoint_dir,
    checkpoint_step,
    latest_checkpoint,
    prune_checkpoints,
    read_json,
    remove_dir,
    write_bytes,
    write_json,
)
from ddgen.errors import Stopped, UserError
from ddgen.stopping import Noted
from ddgen.units import readable_bytes

SECONDS_BETWEEN_CHECKPOINTS = 60.0
"""Of the observer and the autoencoder, which train for minutes."""
SHARE_OF_SAVING = 0.05
"""Where writing is slow, checkpoints by time are further apart, so that saving takes at most this part of the time."""
STEPS_BETWEEN_TALKS = 10
"""Several processes agree on stopping this often; a single one may stop after any step."""
NUM_IMAGES_NAMED = 8
METRICS_NAME = "metrics.jsonl"


@dataclass
class Snapshot:
    """Everything that changes while a network is trained.

    Attributes:
        step: Optimizer steps done.
        tensors: File name without its ending -> state dict.
        optimizer: The optimizer's state dict.
        facts: Anything else that must be the same after going on, as JSON.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """What it takes on the disk, but for a few kilobytes."""
        states = [value for state in self.optimizer["state"].values() for value in state.values()]
        tensors = [tensor for group in self.tensors.values() for tensor in group.values()]
        return sum(value.nbytes for value in [*tensors, *states] if isinstance(value, Tensor))

    def is_finite(self) -> bool:
        """Whether all weights are finite."""
        return all_finite(tensor for group in self.tensors.values() for tensor in group.values())


@dataclass
class Checkpoints:
    """The checkpoints of one training.

    Attributes:
        folder: Holds them.
        identity: What must be the same in a training and in its resumption, as JSON.
        metrics_path: The training's metrics, which go back to where they were with the weights.
        keep: How many are kept.
    """

    folder: Path
    identity: dict[str, Any]
    metrics_path: Path | None = None
    keep: int = 1

    def __post_init__(self) -> None:
        self.identity = json.loads(json.dumps(self.identity))  # tuples are lists there, when they are compared

    def latest(self) -> Path | None:
        """Returns the complete checkpoint of the highest step, or None."""
        return latest_checkpoint(self.folder)

    def save(self, snapshot: Snapshot) -> Path:
        """Writes a checkpoint, complete or not at all, then deletes the ones that are too many.

        Raises:
            UserError: Weights that are not finite, or a full disk; the checkpoints before it are still there.
        """
        if not snapshot.is_finite():
            raise UserError(
                f"step {snapshot.step}: the weights are no longer finite, though the loss still was; use a lower"
                f" learning rate or --mixed_precision no; last good checkpoint: {self.latest() or 'none'}"
            )
        path = checkpoint_dir(self.folder, snapshot.step)
        self.folder.mkdir(parents=True, exist_ok=True)
        with full_disk_explained(self.folder, snapshot.num_bytes), atomic_dir(path) as temporary:
            if shutil.disk_usage(self.folder).free < snapshot.num_bytes:
                raise OSError(errno.ENOSPC, "not enough space")
            for name, tensors in snapshot.tensors.items():
                contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}  # no channels-last in there
                save_file(contiguous, temporary / f"{name}.safetensors")
            with open(temporary / "optimizer.pt", "wb") as file:
                torch.save(snapshot.optimizer, file)
            if self.metrics_path is not None and self.metrics_path.is_file():
                shutil.copyfile(self.metrics_path, temporary / METRICS_NAME)
            state = {"step": snapshot.step, "identity": self.identity, "facts": snapshot.facts}
            write_json(temporary / "state.json", state)
        prune_checkpoints(self.folder, self.keep)
        return path

    def load(self, path: Path, apply: Callable[[Snapshot], None]) -> None:
        """Reads a checkpoint.

        Args:
            path: Its folder.
            apply: Takes the snapshot, whose tensors are on the CPU.

        Raises:
            UserError: It is not a checkpoint, or of another training, or damaged.
        """
        if not (path / "state.json").is_file():
            raise UserError(
                f"--resume_from_checkpoint {path}: not a checkpoint; give `latest` or a checkpoints/step-* folder"
            )
        try:
            state = read_json(path / "state.json")
            self._check_identity(path, state["identity"])
            optimizer = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
            tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
            apply(Snapshot(state["step"], tensors, optimizer, state["facts"]))
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            cause = " ".join(str(error).split())[:160]
            raise UserError(
                f"--resume_from_checkpoint {path}: damaged ({cause}); delete it, go on from another"
            ) from None

    def go_on(self, apply: Callable[[Snapshot], None]) -> int:
        """Reads the latest checkpoint, if there is one, and returns the number of steps done; see `load`."""
        path = self.latest()
        if path is None:
            return 0
        self.load(path, apply)
        return checkpoint_step(path)

    def _check_identity(self, path: Path, before: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if before.get(name) != value:
                raise UserError(
                    f"--resume_from_checkpoint {path}: was made with {name} {before.get(name)}, not {value};"
                    " use the same settings, or another --output_dir for a new run"
                )

    def tidy(self, path: Path | None) -> None:
        """Puts the metrics back to what they were at a checkpoint; None empties them.

        What a process killed while it was deleting has left goes too.
        """
        assert self.metrics_path is not None
        prune_checkpoints(self.folder, self.keep)
        saved = path / METRICS_NAME if path is not None else None
        write_bytes(self.metrics_path, saved.read_bytes() if saved is not None and saved.is_file() else b"")

    def remove(self) -> None:
        """Deletes them all, once what they led to is safe."""
        if self.folder.is_dir():
            remove_dir(self.folder)


class LossWatch:
    """Losses of single steps, kept on the device until someone looks, so that no step waits for the host.

    Args:
        accelerator: Processes that train together; None for one alone.
        explain: Maps (step, process, column) of the first value that is not finite to an error.
    """

    def __init__(self, accelerator: Accelerator | None, explain: Callable[[int, int, int], UserError]) -> None:
        self.accelerator, self.explain = accelerator, explain
        self.rows: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Takes a step's values (m,): losses, and whatever else must be finite."""
        self.rows.append(values.detach())

    def settle(self, step: int) -> Tensor:
        """Looks at what came in since the last look.

        Args:
            step: Optimizer steps done.

        Returns:
            float64 (n, world, m), on the CPU, the same on every process.

        Raises:
            UserError: A value that is not finite.
        """
        if not self.rows:
            return torch.zeros(0, 1, 1, dtype=torch.float64)
        rows, self.rows = torch.stack(self.rows), []  # (n, m)
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            rows = self.accelerator.gather(rows[None]).transpose(0, 1)
        else:
            rows = rows[:, None]
        values = rows.double().cpu()
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            number, process, column = bad[0].tolist()
            raise self.explain(step - len(values) + 1 + number, process, column)
        return values


@dataclass
class Keeper:
    """Decides after every step whether to save and whether to stop.

    Attributes:
        checkpoints: Where to save.
        snapshot: Maps the number of steps done to what has to be saved.
        settle: Called before saving with the number of steps done; raises if the losses are not finite.
        noted: The signal that asked to stop.
        accelerator: Processes that train together; None for one alone.
        last: The last step.
        every: Steps between checkpoints, of which the last step then leaves one too; None goes by time.
    """

    checkpoints: Checkpoints
    snapshot: Callable[[int], Snapshot]
    settle: Callable[[int], Any]
    noted: Noted
    accelerator: Accelerator | None
    last: int
    every: int | None = None

    def __post_init__(self) -> None:
        self.saved_at, self.patience = time.monotonic(), SECONDS_BETWEEN_CHECKPOINTS

    def after_step(self, step: int) -> None:
        """Saves, and stops, where that is due after `step` steps.

        Raises:
            Stopped: SIGTERM or Ctrl-C, on all processes; a checkpoint has been written.
            UserError: What was to be saved is not finite, or the disk is full.
        """
        signal_number, timed = self._agreed(step)
        due = bool(timed) if self.every is None else step % self.every == 0 or step == self.last
        if due or signal_number:
            self.settle(step)
            snapshot = self.snapshot(step)
            start = time.monotonic()
            on_main(self.accelerator, lambda: self.checkpoints.save(snapshot))
            self.saved_at = time.monotonic()
            self.patience = max(SECONDS_BETWEEN_CHECKPOINTS, (self.saved_at - start) / SHARE_OF_SAVING)
        if signal_number:
            raise Stopped(signal_number, f"stopped at step {step} of {self.last}; the same command goes on from there")

    def _agreed(self, step: int) -> tuple[int, int]:
        """Returns the signal any process has received, and whether the time has come for any to save."""
        timed = int(time.monotonic() - self.saved_at >= self.patience)
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return self.noted.number, timed
        if step % STEPS_BETWEEN_TALKS and step != self.last:
            return 0, 0
        here = torch.tensor([[self.noted.number, timed]], device=self.accelerator.device)
        signal_number, timed = self.accelerator.gather(here).amax(0).tolist()
        return signal_number, timed


def on_main(accelerator: Accelerator | None, work: Callable[[], Any]) -> None:
    """Runs `work` on the first process while the others wait; what stops it there stops all of them."""
    failed: list[UserError | Stopped | None] = [None]
    if accelerator is None or accelerator.is_main_process:
        try:
            work()
        except (UserError, Stopped) as error:
            failed = [error]
    if accelerator is not None and accelerator.num_processes > 1:
        broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]


def fix_order_of_sums(accelerator: Accelerator, network: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Has a distributed network regroup its gradients before the first step, new or resumed, instead of after it.

    DistributedDataParallel groups gradients anew after its first backward pass. In which order those of three and more
    processes are added up, and so how they are rounded, depends on the groups; two are the same either way round.

    Args:
        accelerator: Processes that train together.
        network: Prepared.
        loss: Of any batch; its gradients are thrown away.
    """
    if accelerator.num_processes > 2:
        accelerator.backward(loss())
        network.zero_grad(set_to_none=True)


@contextmanager
def full_disk_explained(folder: Path, needed: int) -> Iterator[None]:
    """Turns what the writers raise when the disk is full into one line.

    Args:
        folder: Where something is written.
        needed: Its size in bytes.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full_disk(error):
            raise
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"{folder}: the disk is full: {readable_bytes(needed)} are needed here, {readable_bytes(free)} are free;"
            " make room, then the same command goes on from what is saved"
        ) from None


def _is_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error):  # safetensors
            return True
        error = error.__context__  # torch.save reports its own confusion after a failed write
    return False


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values of all floating-point tensors are finite; waits for the device once."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    norms = torch._foreach_norm(floats, math.inf)
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())


def name_images(indices: Sequence[int]) -> str:
    """Returns "images 3, 1, 2 and 125 more"."""
    named, more = indices[:NUM_IMAGES_NAMED], len(indices) - NUM_IMAGES_NAMED
    return f"images {', '.join(map(str, named))}" + (f" and {more} more" if more > 0 else "")
