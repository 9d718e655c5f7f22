"""What the benchmarks share: timings, peak rates of a device, records.

A record is printed and written as a line of JSON at once, so that a crash or a time limit loses
nothing that was measured before it.
"""

import contextlib
import ctypes
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


def wait(device: torch.device) -> float:
    """The clock in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class Timing:
    seconds: float  # median
    peak: int | None  # bytes beyond what was allocated before the call; None where unknown

    def record(self, side: str) -> dict[str, float]:
        peak = {} if self.peak is None else {f"{side}_peak_gb": self.peak / 1e9}
        return {f"{side}_ms": self.seconds * 1e3} | peak


def time_in_turns(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, Timing]:
    """Median seconds and peak memory of each call. The calls take turns, so that other work on the
    machine slows all of them; the first round is warm-up. On a CPU each has one call more, for its
    memory (`resident_peak`)."""
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
    if not is_cuda:
        peaks = {name: resident_peak(call) for name, call in calls.items()}
    return {name: Timing(statistics.median(seconds[name]), peaks[name]) for name in calls}


def resident_peak(call: Callable[[], object]) -> int | None:
    """By how many bytes at most the memory of this process grows while a call runs, whoever asks
    for it; None but on Linux with glibc. Meanwhile every block above 64 kB has pages of its own, so
    that what was freed before is not there to be used again without being seen."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return None
    threshold, own_pages, usual = -3, 2**16, 2**25  # M_MMAP_THRESHOLD, to which it grows by itself
    libc.mallopt(threshold, own_pages)
    libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except PermissionError:
        return None
    finally:
        libc.mallopt(threshold, usual)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def exponent(sizes: tuple[float, float], costs: tuple[float, float]) -> float:
    """p where a cost grows as the size to the power of p."""
    return math.log(costs[1] / costs[0]) / math.log(sizes[1] / sizes[0])


def ceilings(
    device: torch.device, side: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, float]:
    """Measured peak rates: TFLOP/s of a product of random matrices [side, side], and GB/s of a copy
    of eight float32 ones, bytes read and bytes written."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn(8, side, side, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    timings = time_in_turns(calls, device, rounds=10)
    return {
        "product_tflops": 2 * side**3 / timings["product"].seconds / 1e12,
        "copy_gb_per_s": 2 * source.nbytes / timings["copy"].seconds / 1e9,
    }


def relative_error(x: Tensor, reference: Tensor) -> float:
    """‖x − reference‖ / ‖reference‖, in float64 on the CPU."""
    x, reference = (each.detach().double().cpu() for each in (x, reference))
    return float((x - reference).norm() / reference.norm())


class Report:
    """The records of one part, and how many of its checks failed."""

    def __init__(self, path: Path):
        self.path, self.num_failed, self.records = path, 0, []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")

    def add(self, name: str, passed: bool | None = None, **figures: object) -> None:
        """Adds one record; `passed` is the outcome of a check, None for a measurement."""
        record = {"name": name} | ({} if passed is None else {"passed": passed}) | figures
        print(format_record(record), flush=True)
        self.num_failed += passed is False
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """An exception inside becomes a failed record, and the code after the block goes on."""
        try:
            yield
        except Exception as error:  # of any kind: the measurements that follow must not be lost
            traceback.print_exc()
            self.add(name, False, error=f"{type(error).__name__}: {error}"[:500])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def format_record(record: dict) -> str:
    """A record as one line of text."""
    figures = dict(record)
    verdict = {None: "", True: "passed: ", False: "FAILED: "}[figures.pop("passed", None)]
    name = figures.pop("name")
    parts = [
        f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in figures.items()
    ]
    return f"  {verdict}{name}: {', '.join(parts)}"
