"""What `accelerate launch` leaves undone on a CPU.

``accelerate launch --num_processes N --cpu`` prepares the environment for N processes but starts only one on each
machine (its simple launcher leaves the rest to MPI). So that the command does what it says, that one process starts the
machine's share of the N in its place.

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
from typing import Any

import psutil

from ddgen.errors import UserError


def start_asked_for_processes() -> None:
    """Replaces this process by N under torch's own launcher, if accelerate was asked for N and started one."""
    options = _launcher_options()
    if options:
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *options, *sys.argv])


def stop_with_launcher() -> None:
    """Has the kernel send SIGTERM to this process when the launcher that started it ends, however it ends (Linux)."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def close_connection() -> None:
    """Ends the exchange between processes, if there was one: who exits with it open may abort (seen in torch 2.11)."""
    torch = sys.modules.get("torch")  # not imported by commands that compute nothing
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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


def _launcher_options() -> list[str]:
    """Returns what torch's launcher is to be told; nothing if one process was asked for, or all have been started.

    Raises:
        UserError: A number of processes that cannot be shared equally among the machines.
    """
    args = _accelerate_launch()
    machines, processes = (int(args.num_machines or 1), int(args.num_processes or 1)) if args else (1, 1)
    if machines == 1:
        local = ["--master_port", _free_port()]
        return ["--nproc_per_node", str(processes), *local] if processes > 1 else []
    if processes % machines:
        raise UserError(
            f"accelerate launch --num_processes {processes}: must be a multiple of the {machines} machines;"
            " it counts the processes of all machines"
        )
    address = ["--master_addr", str(args.main_process_ip), "--master_port", str(args.main_process_port)]
    nodes = ["--nnodes", str(machines), "--node_rank", str(args.machine_rank)]
    return ["--nproc_per_node", str(processes // machines), *nodes, *address]


def _accelerate_launch() -> Any:
    """Returns the arguments of the `accelerate launch` that is this process's parent, None if it has started all."""
    if not asked_for_cpu() or "WORLD_SIZE" in os.environ or "MASTER_PORT" not in os.environ:
        return None
    words = psutil.Process(os.getppid()).cmdline()
    names = ("launch", "accelerate-launch", "accelerate.commands.launch", "launch.py")
    launches = [i for i, word in enumerate(words) if word.split("/")[-1] in names]
    if not launches:
        return None
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    return _validate_launch_command(launch_command_parser().parse_args(words[launches[0] + 1 :]))[0]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
