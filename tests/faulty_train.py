"""The training command with a fault in it, and ranks of it that start at once.

Faults are a JSON object before the flags of xsam/train.py, {} for none:

    torchrun --nproc_per_node 2 tests/faulty_train.py '{"nan": "loss", "calls": [3], "rank": 1}' \
        --config toy --stage 1 --out runs/faulty

`nan` is what is not a number of the micro-batches `calls` (counted by each process) of `rank`: the
"loss", or with a loss that is finite the "gradient". `beat` and `lost` are seconds of
distributed.heartbeat. `hash` writes OUT/weights_RANK, a hash of each rank's weights at the end.
"""

import hashlib
import json
import math
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from xsam import distributed, train

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "xsam" / "train.py"

# A process forks from one that has imported everything: a second each in place of ten.
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["xsam.train"])


# ---- faults --------------------------------------------------------------------------------------


def inject_nan(kind: str, calls: list[int], rank: int) -> None:
    """Spoils the micro-batches `calls` of `rank` and says which samples these are."""
    forward, count = train.Objective.forward, iter(range(10**9))

    def faulty(self, batch, normalisers):
        losses = forward(self, batch, normalisers)
        if batch is None or next(count) not in calls or distributed.rank() != rank:
            return losses
        name = list(losses)[-1]
        if kind == "loss":  # its gradient stays finite
            losses[name] = losses[name] + math.nan
        else:
            losses[name].register_hook(lambda gradient: gradient * math.nan)
        print(f"spoiled: {', '.join(sample.sample_id for sample in batch.samples)}", flush=True)
        return losses

    train.Objective.forward = faulty


def write_hash(out: Path) -> None:
    """Lets every rank write a hash of the weights that it has at a stage's end."""
    train_stage = train.train_stage

    def hashed(number, config, options, device):
        model = train_stage(number, config, options, device)
        digest = hashlib.sha256()
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        (out / f"weights_{distributed.rank()}").write_text(digest.hexdigest())
        return model

    train.train_stage = hashed


def main(faults: dict, arguments: list[str]) -> int:
    """What `python xsam/train.py` does, with `faults`; the status that it exits with."""
    options, config = train.parse(arguments)
    if message := train.preflight(options, config):
        train.leave(message)
    if "nan" in faults:
        inject_nan(faults["nan"], faults["calls"], faults.get("rank", 0))
    if "hash" in faults:
        write_hash(options.out)
    distributed.BEAT_SECONDS = faults.get("beat", distributed.BEAT_SECONDS)
    distributed.LOST_SECONDS = faults.get("lost", distributed.LOST_SECONDS)
    return train.main(options, config)


# ---- processes -----------------------------------------------------------------------------------


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


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))
