"""What the benchmarks share: the device and its ceilings, timings in turns, records.

A record is a line on the screen and a line of JSON in a file, written as soon as it is there: what
was measured before a crash or a time limit is kept.
"""

import contextlib
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


def wait(device: torch.device) -> float:
    """The clock, in seconds, once the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class Timing:
    seconds: float  # median
    peak: int | None  # bytes beyond what was allocated before the call; None on a CPU


def time_in_turns(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, Timing]:
    """Median seconds and peak memory of each call. One round is not counted, in the others the
    calls take turns, so that a busy machine is busy for all of them."""
    is_cuda = device.type == "cuda"
    seconds = {name: [] for name in calls}
    peaks = dict.fromkeys(calls, 0 if is_cuda else None)
    for number in range(rounds + 1):
        for name, call in calls.items():
            if is_cuda:
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            started = wait(device)
            call()
            if number:
                seconds[name].append(wait(device) - started)
            if is_cuda:
                peak = torch.cuda.max_memory_allocated(device) - before
                peaks[name] = max(peaks[name], peak)
    return {name: Timing(statistics.median(seconds[name]), peaks[name]) for name in calls}


def ceilings(device: torch.device, side: int) -> dict[str, float]:
    """What the device can do at most: TFLOP/s of a product of random bfloat16 matrices of `side`,
    GB/s of a copy of 16 such matrices, bytes read and written."""
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    source = torch.randn(8, side, side, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    timings = time_in_turns(calls, device, rounds=10)
    return {
        "bf16_tflops": 2 * side**3 / timings["product"].seconds / 1e12,
        "copy_gb_per_s": 2 * source.nbytes / timings["copy"].seconds / 1e9,
    }


def relative_error(x: Tensor, reference: Tensor) -> float:
    """‖x − reference‖ / ‖reference‖, in float64 on the CPU."""
    x, reference = (each.detach().double().cpu() for each in (x, reference))
    return float((x - reference).norm() / reference.norm())


class Report:
    """The records of one part."""

    def __init__(self, path: Path):
        self.path, self.num_failed = path, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")

    def add(self, name: str, is_right: bool | None = None, **figures: object) -> None:
        """One record. `is_right` says of a check whether it held; None: a measurement."""
        record = {"name": name} | ({} if is_right is None else {"is_right": is_right}) | figures
        print(tell(record), flush=True)
        self.num_failed += is_right is False
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """What fails inside is a wrong record, and what comes after goes on."""
        try:
            yield
        except Exception as error:  # of whatever kind: the other figures are not to be lost for it
            traceback.print_exc()
            self.add(name, False, error=f"{type(error).__name__}: {error}"[:500])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def tell(record: dict) -> str:
    """A record for the eye."""
    figures = dict(record)
    verdict = {None: "", True: "right: ", False: "WRONG: "}[figures.pop("is_right", None)]
    name = figures.pop("name")
    told = [
        f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in figures.items()
    ]
    return f"  {verdict}{name}: {', '.join(told)}"
