"""One process or many: what training and evaluation ask of torch.distributed, in one place.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE; without them there is one process and every call here
is the identity.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def start() -> torch.device:
    """Joins the process group where there is one and picks this process's device."""
    use_cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if use_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world_size() > 1:
        backend = "nccl" if use_cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return device


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sum of each named number over the ranks, which must all give the same names."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return dict(zip(values, tensor.tolist(), strict=True))


def gather(items: list) -> list:
    """The lists of all ranks, joined in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return items
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]
