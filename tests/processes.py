"""Processes that tests start, wait for and kill."""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent

# A process forks from one that has imported everything: a second each in place of ten.
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["xsam.train"])

PATIENCE = 120  # seconds until a run hangs
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # on files


def as_rank(rank: int, world_size: int, port: int, log: Path, function: Callable, *arguments):
    """Calls the function as torchrun would have a rank do it, in a process group of its own."""
    os.setsid()
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    sys.exit(function(*arguments))


def as_command(command: list[str]) -> None:
    os.execve(command[0], command, os.environ | {"OMP_NUM_THREADS": "1"})


def start_ranks(
    log: Path, function: Callable, *arguments: object, world_size: int = 1
) -> list[BaseProcess]:
    """`function(*arguments)` on every rank; what they print is added to `log`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        CONTEXT.Process(target=as_rank, args=(rank, world_size, port, log, function, *arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def start_command(log: Path, script: Path, *flags: object, processes: int = 0) -> BaseProcess:
    """The script as a user runs it: alone, or with torchrun on so many `processes`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher * (processes > 0), script, *flags]
    return start_ranks(log, as_command, list(map(str, command)))[0]


def finish(processes: list[BaseProcess], patience: float = PATIENCE) -> list[int | None]:
    """Their statuses once they have ended; None for one that had to be killed, for it hangs."""
    deadline = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    kill(processes)
    return statuses


def kill(processes: list[BaseProcess]) -> None:
    """With all of their groups: what they started goes too."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def killed_at(operation: int, function: Callable[[], None]) -> bool:
    """Calls the function in a process that is killed as it is about to carry out its n-th operation
    on files; whether it came to that."""
    pid = os.fork()
    if pid == 0:
        seen = iter(range(10**9))

        def count(event: str, _: tuple) -> None:
            if event in OPERATIONS and next(seen) == operation:
                os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(count)
            function()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0
