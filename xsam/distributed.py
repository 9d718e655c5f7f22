"""One process or many: what training and evaluation ask of torch.distributed, in one place.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE, and its processes form a group, also a single one:
what runs on eight GPUs can be tried on one. Without torchrun there is no group, and every call here
is the identity.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist


def rank() -> int:
    """The number of this process among all, from 0; torchrun sets it."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def choose_device(name: str | None = None) -> torch.device:
    """This process's device: `name` is one of cli.DEVICES, None the GPU where there is one and
    the CPU elsewhere. Raises ValueError where there is no such device for this process."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(f"--device mps: PyTorch {torch.__version__} finds no Apple GPU here")
        if world_size() > 1:
            raise ValueError("--device mps: one process alone, there is no sending between them")
        if rank() == 0:
            print("--device mps is untested: nobody has run xsam on it yet", file=sys.stderr)
        return torch.device("mps")
    local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= count:
        found = f"PyTorch {torch.__version__} finds {count} CUDA GPUs here"
        advice = f"start --nproc_per_node {count}" if count else "--device cpu goes without"
        raise ValueError(f"--device cuda: process {local_rank} has no GPU: {found}; {advice}")
    torch.backends.cudnn.allow_tf32 = False  # else convolutions of float32 have 10 bits, not 23
    return torch.device("cuda", local_rank)


def start(name: str | None = None) -> torch.device:
    """Picks this process's device (`choose_device`) and joins the group where there is one."""
    device = choose_device(name)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    if world_size() > 1 or dist.is_torchelastic_launched():
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            timeout=timedelta(minutes=30),
            device_id=device if is_cuda else None,
        )
    return device


def has_group() -> bool:
    """Whether the processes form a group, as under torchrun."""
    return dist.is_initialized()


_left_groups = []


def finish() -> None:
    """Leaves the group and keeps its object: PyTorch 2.6 would free it, and wait for its threads,
    while it holds Python's lock, which a thread that frees the last tensors needs: a deadlock."""
    if dist.is_initialized():
        _left_groups.append(dist.group.WORLD)
        dist.destroy_process_group()


def barrier() -> None:
    """Waits until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Mean of each named number over the ranks, which must all give the same names."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return dict(zip(values, (tensor / world_size()).tolist(), strict=True))


def gather(items: list) -> list:
    """The lists of all ranks, joined in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return items
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


@contextlib.contextmanager
def together(what: str, *errors: type[Exception]) -> Iterator[None]:
    """One of these `errors` inside, on any rank, becomes an OSError on all of them."""
    failure = None
    try:
        yield
    except errors as error:
        failure = error
    failed = gather([f"rank {rank()}: {failure}"] if failure else [])
    if failed:
        raise OSError(f"{what}: {'; '.join(failed)}") from failure


# ---- who is still there --------------------------------------------------------------------------


BEAT_SECONDS, LOST_SECONDS = 3.0, 40.0


@contextlib.contextmanager
def heartbeat() -> Iterator[None]:
    """Ends this process, and prints the cause, where another rank gives no sign of life any more.

    torchrun looks after the ranks of its own machine. One that is lost on another machine, or with
    it, would leave the rest in a collective until that times out. So a thread of each rank counts
    in the job's store and looks whether the others do.
    """
    if world_size() == 1:
        yield
        return
    dist.barrier()  # from here on silence means something
    is_over, is_well = threading.Event(), threading.Event()
    thread = threading.Thread(target=_beat, args=(is_over, is_well), daemon=True)
    thread.start()
    try:
        yield
        is_well.set()  # not after an error: the others may be waiting for this rank
    finally:
        is_over.set()
        thread.join()


def _beat(is_over: threading.Event, is_well: threading.Event) -> None:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    name = f"{socket.gethostname()}, process {os.getpid()}"
    count, last_contact = 0, time.monotonic()
    heard = dict.fromkeys(range(world_size()), ("", last_contact))  # what, and when it was new
    while not is_over.wait(BEAT_SECONDS):
        now, count = time.monotonic(), count + 1
        # A store whose machine has no power answers nothing, not even with an error.
        silence = threading.Timer(LOST_SECONDS, _give_up, [f"the store at {address} is silent"])
        silence.daemon = True
        silence.start()
        try:
            store.set(f"beat/{rank()}", f"{count} {name}")
            for other, (before, _) in heard.items():
                key = f"beat/{other}"
                said = store.get(key).decode() if store.check([key]) else ""
                if said == "over" or said != before:
                    heard[other] = said, now
            last_contact = now
        except dist.DistError as error:
            if now - last_contact > LOST_SECONDS:
                _give_up(f"the store at {address} is gone ({error})")
        finally:
            silence.cancel()
        for other, (said, when) in heard.items():
            if now - when > LOST_SECONDS:
                who = said.partition(" ")[2] or "which never gave one"
                _give_up(f"rank {other} ({who}) gave no sign of life for {LOST_SECONDS:.0f} s")
    if is_well.is_set():
        with contextlib.suppress(dist.DistError):  # the others may be gone already, and it too
            store.set(f"beat/{rank()}", "over")


def is_loss_of_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone: NCCL has an error of its own for
    that, gloo words."""
    words = "Connection closed by peer", "Connection reset by peer"
    return isinstance(error, dist.DistBackendError) or any(each in str(error) for each in words)


def _give_up(cause: str) -> None:
    print(f"xsam: rank {rank()} ends: {cause}", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread may be inside a collective, where no exception reaches it
