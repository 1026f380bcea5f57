"""What `accelerate launch` leaves undone on a CPU.

``accelerate launch --num_processes N --cpu`` prepares the environment for N processes but starts only one (its simple
launcher leaves the rest to MPI). So that the command does what it says, that one process starts N in its place.

``accelerate launch`` without ``--cpu``, on a machine without a GPU, sets OMP_NUM_THREADS to 1 where nobody asked for
it, which leaves all cores but one idle.

``accelerate launch`` of a single process passes no signal on: stopped by SIGTERM, it would leave the training running.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

import psutil


def start_asked_for_processes() -> None:
    """Replaces this process by N under torch's own launcher, if accelerate was asked for N and started one."""
    count = _asked_for()
    if count > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_port", _free_port()]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


def stop_with_launcher() -> None:
    """Has the kernel send SIGTERM to this process when the launcher that started it ends, however it ends (Linux)."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def asked_for_cpu() -> bool:
    """Whether this process was started with ``accelerate launch --cpu``."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def threads_to_use() -> int | None:
    """Returns how many threads to compute with where accelerate chose one by itself; None leaves the number alone."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "WORLD_SIZE" in os.environ:
        return None
    parent = psutil.Process(os.getppid())
    chosen = "OMP_NUM_THREADS" in parent.environ() or any("num_cpu_threads" in word for word in parent.cmdline())
    return None if chosen else num_cores()


def num_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _asked_for() -> int:
    """Returns N of the `accelerate launch` that is this process's parent, 1 if it is none or has started all."""
    if not asked_for_cpu() or "WORLD_SIZE" in os.environ or "MASTER_PORT" not in os.environ:
        return 1
    words = psutil.Process(os.getppid()).cmdline()
    names = ("launch", "accelerate-launch", "accelerate.commands.launch", "launch.py")
    launches = [i for i, word in enumerate(words) if word.split("/")[-1] in names]
    if not launches:
        return 1
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words[launches[0] + 1 :]))
    return int(args.num_processes or 1)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
