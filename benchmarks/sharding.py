"""Which of torch's own ways to shard AdamW's state suits bf16 weights with fp32 masters.

    python benchmarks/sharding.py --processes 2 --accumulate 4 --steps 2 --rounds 3
    python benchmarks/sharding.py --behaviour

Trains a stack of SAM's blocks. `ddp` holds all masters and moments on every rank and is the peer,
`zero1` deals whole parameters out to the ranks, `fsdp2` slices of each. All have their turn in a
round; told is the median over rounds, ratios are to the peer of the same round. Held bytes are
counted from storages, the peak is the GPU's or this process's own resident memory, traffic is that
of the collectives called, were they rings. The error is of the masters, against fp32 throughout, as
a share of what fp32 moved. `--behaviour` tries what each method asks of the model's code. Runs on
nccl where there is a GPU for each process, else on gloo and Linux.
"""

import argparse
import contextlib
import gc
import os
import queue
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xsam import distributed
from xsam.encoders import Block, PatchEmbed
from xsam.optimizer import MasterAdamW

PATCH, SIDE, BATCH = 16, 128, 2
LARGE, SMALL = {"dim": 768, "depth": 10, "num_heads": 12}, {"dim": 64, "depth": 2, "num_heads": 4}
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
PATIENCE = 60  # seconds, after which a trial hangs


@dataclass(frozen=True)
class Method:
    name: str
    kind: str  # fp32, ddp, zero1 or fsdp2
    frees_forward: bool = False  # the gathered weights, between forward and backward
    frees_micro: bool = True  # the same between micro-batches
    reduces_micro: bool = False  # the gradients of each micro-batch, not the sum of the step


METHODS = (
    Method("ddp", "ddp"),
    Method("zero1", "zero1"),
    Method("fsdp2 zero-2", "fsdp2"),
    Method("fsdp2 zero-2, gathers once", "fsdp2", frees_micro=False),
    Method("fsdp2 zero-2, reduces each", "fsdp2", reduces_micro=True),
    Method("fsdp2 zero-3", "fsdp2", frees_forward=True),
    Method("fsdp2 zero-3, reduces each", "fsdp2", frees_forward=True, reduces_micro=True),
)


# ---- what is trained -----------------------------------------------------------------------------


class Model(nn.Module):
    """Shows pixels again. Some batches do without `part`, as chat does without the decoder."""

    def __init__(self, dim: int, depth: int, num_heads: int):
        super().__init__()
        grid = SIDE // PATCH
        windows = [0 if index % 4 == 3 else grid // 2 for index in range(depth)]
        self.embed = PatchEmbed(PATCH, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, 4 * dim, w, grid) for w in windows)
        self.part = Block(dim, num_heads, 4 * dim, 0, grid)
        self.head = nn.Linear(dim, 3 * PATCH**2)

    def forward(self, pixels: Tensor, uses_part: bool = True) -> Tensor:
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.head(self.part(x) if uses_part else x)  # [B, h, w, 3·PATCH²]

    def generate(self, pixels: Tensor) -> Tensor:
        return self.head(self.blocks[0](self.embed(pixels)))


def build(method: Method, sizes: dict, device: torch.device, finds_unused: bool = False):
    """The model as it is called, the bare one and the optimizer. All start from rounded weights."""
    torch.manual_seed(0)
    model = Model(**sizes).bfloat16().to(device)
    settings = {"lr": 1e-4, "weight_decay": 0.05}
    if method.kind in ("fp32", "fsdp2"):
        model.float()
    if method.kind == "fsdp2":
        for module in (*model.blocks, model.part, model):
            fully_shard(module, mp_policy=BF16, reshard_after_forward=method.frees_forward)
        return model, model, torch.optim.AdamW(model.parameters(), fused=True, **settings)
    kinds = {"fp32": torch.optim.AdamW, "ddp": MasterAdamW, "zero1": ZeroRedundancyOptimizer}
    if method.kind == "zero1":
        settings |= {"optimizer_class": MasterAdamW, "parameters_as_bucket_view": True}
    ddp = DistributedDataParallel(
        model, gradient_as_bucket_view=True, find_unused_parameters=finds_unused
    )
    return ddp, model, kinds[method.kind](model.parameters(), **settings)


def loss_of(model: nn.Module, seed: int, uses_part: bool = True) -> Tensor:
    weight = next(model.parameters())
    pixels = torch.randn(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    pixels = pixels.to(weight.device)
    target = nn.functional.pixel_unshuffle(pixels, PATCH).permute(0, 2, 3, 1)
    return (model(pixels.to(weight.dtype), uses_part).float() - target).pow(2).mean()


Uses = Callable[[int, int], bool]  # of rank and micro-batch: whether it goes through `part`


def backward(method: Method, model, seed: int, accumulate: int, uses: Uses = lambda *_: True):
    """Gradients of one step."""
    rank = distributed.rank()
    for micro in range(accumulate):
        is_last, context = micro == accumulate - 1, contextlib.nullcontext()
        if method.kind == "fsdp2":
            # Not reducing keeps a gradient of the whole model, in bf16, on every rank.
            model.set_requires_gradient_sync(is_last or method.reduces_micro)
            model.set_reshard_after_backward(is_last or method.frees_micro)
        elif not is_last:
            context = model.no_sync()
        with context:
            loss = loss_of(model, 1000 * seed + 10 * micro + rank, uses(rank, micro))
            (loss / accumulate).backward()


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def whole_state(method: Method, model: nn.Module, optimizer) -> tuple[dict, dict] | None:
    """State of model and optimizer, as torch gathers it on rank 0."""
    if method.kind == "fsdp2":
        return get_state_dict(model, optimizer, options=WHOLE)
    if method.kind == "zero1":
        optimizer.consolidate_state_dict(to=0)
    return (model.state_dict(), optimizer.state_dict()) if distributed.rank() == 0 else None


# ---- figures -------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Bytes that a rank sends in ring collectives."""

    def __init__(self):
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            turns = {"allreduce_": 2, "broadcast_": 1, "_allgather_base_": 1}
            turns = (turns | {"_reduce_scatter_base_": 1}).get(function.overloadpacket.__name__, 0)
            size = max((t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor)), default=0)
            self.sent += turns * size * (1 - 1 / distributed.world_size())
        return function(*args, **(kwargs or {}))


def storage_bytes(tensors: list) -> int:
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    storages = [t.untyped_storage() for t in tensors if isinstance(t, Tensor)]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def resident_bytes(name: str) -> int:
    """VmRSS of this process, or VmHWM, its most since the mark was set."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def examine(device: torch.device, options: argparse.Namespace) -> dict[Method, dict]:
    """Memory, traffic and, on rank 0, the masters after some steps. Nothing is timed here."""
    figures, exact, peer = {}, None, None
    torch.manual_seed(0)
    start = nn.utils.parameters_to_vector(Model(**LARGE).bfloat16().float().parameters()).detach()
    for method in (Method("fp32", "fp32"), *METHODS):
        gc.collect()
        before = resident_bytes("VmRSS")
        model, bare, optimizer = build(method, LARGE, device)
        for number in range(options.compared_steps):
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")  # sets the mark
            with Traffic() as traffic:
                backward(method, model, number, options.accumulate)
                update(bare, optimizer)
        peak = resident_bytes("VmHWM") - before
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak
        parameters, inner = list(bare.parameters()), getattr(optimizer, "optim", optimizer)
        states = tree_leaves([list(state.values()) for state in inner.state.values()])
        held = [parameters, [parameter.grad for parameter in parameters], states]
        held = {"held": sum(map(storage_bytes, held)), "peak": peak, "sent": traffic.sent}
        state = whole_state(method, bare, optimizer)
        if distributed.rank() == 0:
            weights = state[0].values()
            if method.kind in ("ddp", "zero1"):
                weights = [each["master"] for each in state[1]["state"].values()]
            masters = torch.cat([weight.float().cpu().flatten() for weight in weights])
            if method.kind == "fp32":
                exact = masters
                continue
            peer = masters if method is METHODS[0] else peer
            held["apart"] = float((masters - peer).abs().max())
            held["error"] = float((masters - exact).norm() / (exact - start).norm())
        figures[method] = held
    return figures


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def seconds(device: torch.device, options: argparse.Namespace) -> dict[Method, list[float]]:
    """Of a step, in each round, after one step that is not counted."""
    times = {method: [] for method in METHODS}
    for _ in range(options.rounds):
        for method, found in times.items():
            gc.collect()
            model, bare, optimizer = build(method, LARGE, device)
            started = 0.0
            for number in range(options.steps + 1):
                started = clock(device) if number < 2 else started
                optimizer.zero_grad()
                backward(method, model, number, options.accumulate)
                update(bare, optimizer)
            found.append((clock(device) - started) / options.steps)
    return times


def figures_table(options: argparse.Namespace) -> str:
    # Without this large freed blocks stay resident, and the peak is that of all methods before.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    figures = launch(examine, options.processes, None, options)[0]
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    times = launch(seconds, options.processes, None, options)[0]
    if isinstance(figures, str) or isinstance(times, str):
        raise RuntimeError(f"{figures}, {times}")
    peer = METHODS[0]
    heads = ["s a step", "x ddp", "held MB", "x ddp", "peak MB", "x ddp", "sent MB", "x ddp"]
    heads = ["method", *heads, "largest difference to ddp", "error"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method, found in figures.items():
        pairs = zip(times[method], times[peer], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        cells = [method.name, f"{statistics.median(times[method]):.2f}", f"{ratio:.2f}"]
        for name in ("held", "peak", "sent"):
            cells += [f"{found[name] / 1e6:.0f}", f"{found[name] / figures[peer][name]:.2f}"]
        lines.append(
            f"| {' | '.join(cells)} | {found['apart']:.1e} | {100 * found['error']:.1f} % |"
        )
    return "\n".join(lines)


# ---- behaviour -----------------------------------------------------------------------------------


def wrong_gradients(bare: nn.Module, device: torch.device, seed: int, uses: Uses) -> str:
    """Each gradient, or this rank's slice of it, against that of one process in fp32."""
    world_size = distributed.world_size()
    torch.manual_seed(0)
    reference = Model(**SMALL).bfloat16().float().to(device)
    for rank in range(world_size):
        for micro in range(4):
            loss = loss_of(reference, 1000 * seed + 10 * micro + rank, uses(rank, micro))
            (loss / 4 / world_size).backward()
    worst = {"part": 0.0, "rest": 0.0}
    for (name, ours), theirs in zip(bare.named_parameters(), reference.parameters(), strict=True):
        right = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        found = ours.grad
        if isinstance(ours, DTensor):
            right = right.chunk(world_size)[distributed.rank()]
            found = None if found is None else found.to_local()
        found = torch.zeros_like(right) if found is None else found
        error = float((found - right).norm() / right.norm().clamp(min=1e-6))
        kind = "part" if name.startswith("part.") else "rest"
        worst[kind] = max(worst[kind], error)
    wrong = [f"{name} wrong by {100 * e:.0f} %" for name, e in worst.items() if e > 0.1]
    return ", ".join(wrong) or "right"


def try_uses(device: torch.device, method: Method, uses: Uses) -> str:
    """Gradients of a step in which not all go through `part`, then of one in which all do."""
    model, bare, optimizer = build(method, SMALL, device, finds_unused=True)
    outcomes = []
    for seed, used in enumerate((uses, lambda *_: True)):
        backward(method, model, seed, 4, used)
        outcomes.append(wrong_gradients(bare, device, seed, used))
        optimizer.param_groups[0]["lr"] = 0.0  # the weights stay those of the reference
        update(bare, optimizer)
        optimizer.zero_grad()
    return outcomes[0] + f"; next step {outcomes[1]}" * (outcomes[1] != "right")


def nobody(rank: int, micro: int) -> bool:
    return False


def first_rank(rank: int, micro: int) -> bool:
    return rank == 0


def first_micro_batch(rank: int, micro: int) -> bool:
    return micro == 0


def try_calls(device: torch.device, method: Method) -> str:
    """Parts called by themselves, first of all and after a step."""
    pixels = torch.randn(1, 3, SIDE, SIDE, device=device).bfloat16()
    tokens = torch.randn(1, 8, 8, SMALL["dim"], device=device).bfloat16()
    outcomes: dict[str, list[str]] = {}

    def attempt(name: str, call: Callable[[], object]) -> None:
        try:
            call()
            outcomes.setdefault("works", []).append(name)
        except (RuntimeError, ValueError, AssertionError) as error:
            outcomes.setdefault(type(error).__name__, []).append(name)

    model, bare, _ = build(method, SMALL, device)
    bare.blocks[0](tokens)
    attempt("a step after a block", lambda: backward(method, model, 0, 1))
    model, bare, _ = build(method, SMALL, device)
    backward(method, model, 0, 1)
    attempt("block", lambda: bare.blocks[0](tokens))
    attempt("head", lambda: bare.head(tokens))
    attempt("generate()", lambda: bare.generate(pixels))
    register_fsdp_forward_method(bare, "generate")
    attempt("registered generate()", lambda: bare.generate(pixels))
    return "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in outcomes.items())


def try_alone(device: torch.device, method: Method) -> str:
    """One rank predicts while the others wait for it."""
    _, bare, _ = build(method, SMALL, device)
    if distributed.rank() == 0:
        with torch.no_grad():
            loss_of(bare, 0)
    dist.barrier()
    return "right"


TRIED = (*METHODS[:3], METHODS[-1])
TRIALS = {
    "nobody uses a part": (try_uses, nobody),
    "one rank uses it": (try_uses, first_rank),
    "the first micro-batch uses it": (try_uses, first_micro_batch),
    "called by themselves": (try_calls,),
    "one rank predicts alone": (try_alone,),
}


def behaviour_table(options: argparse.Namespace) -> str:
    lines = [f"| | {' | '.join(method.name for method in TRIED)} |", "|---" * 5 + "|"]

    def outcome(num_processes: int, function: Callable, *arguments) -> str:
        found = list(launch(function, num_processes, PATIENCE, *arguments).values())
        wrong = [each for each in found if each != "right"]  # the first to fail has the cause
        return (wrong or found or ["hangs"])[0]

    for name, (function, *arguments) in TRIALS.items():
        cells = [outcome(options.processes, function, m, *arguments) for m in TRIED]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- processes -----------------------------------------------------------------------------------


def enter(rank: int, port: int, world_size: int, answers, function: Callable, arguments: tuple):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(max(1, os.cpu_count() // world_size))
    warnings.filterwarnings("ignore")
    device = distributed.start()
    try:
        answers.put((rank, function(device, *arguments)))
    except Exception as error:  # whatever it is, it is the finding
        answers.put((rank, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"))
    answers.close()
    answers.join_thread()
    distributed.finish()


def launch(function: Callable, num_processes: int, patience: float | None, *arguments) -> dict:
    """What each rank returns, in the order of arrival; those that do not are ended."""
    context, found = torch.multiprocessing.get_context("spawn"), {}
    answers = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings = (free.getsockname()[1], num_processes, answers, function, arguments)
    processes = [context.Process(target=enter, args=(n, *settings)) for n in range(num_processes)]
    for process in processes:
        process.start()
    with contextlib.suppress(queue.Empty):
        while len(found) < num_processes:
            rank, found_there = answers.get(timeout=patience)
            found[rank] = found_there
    for process in processes:
        process.join(5)
        process.kill()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--accumulate", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="timed in a round; %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--compared-steps", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--behaviour", action="store_true", help="trials in place of figures")
    options = parser.parse_args()
    if options.processes < 2:
        parser.error("--processes must be 2 or more: one process has nothing to shard")
    print(f"{options}, {os.cpu_count()} cores, {torch.cuda.device_count()} GPUs\n")
    print(behaviour_table(options) if options.behaviour else figures_table(options))


if __name__ == "__main__":
    main()
