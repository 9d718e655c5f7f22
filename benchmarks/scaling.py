"""Weak scaling of the training command over gloo, and the share that communication takes.

    python benchmarks/scaling.py --data runs/toy/world/data --weights runs/toy/world/weights

Trains the toy's stage 3 on COCO panoptic, the same micro-batches for each process, each on one
thread: one process alone; two side by side that do not know of each other; two that train together.
Side by side they share the machine's memory and caches as together they do, so what together costs
more than side by side is communication: gradients, weights and waiting for each other. The three
take turns; what is told is the median over the rounds of the median step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 3  # first steps of a run, in which buffers and files are new


def start(options: argparse.Namespace, out: Path, processes: int, accumulation: int):
    """A training run, started: (its process, where it writes)."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    flags = ["--config", "toy", "--stage", "3", "--starts_from", "", "--datasets", "coco_panoptic"]
    flags += ["--data", options.data, "--weights", options.weights, "--out", out]
    flags += ["--micro_batch_size", 4, "--global_batch_size", 4 * processes * accumulation]
    flags += ["--max_steps", SKIPPED + options.steps, "--eval_tasks", ""]
    command = [*launcher, ROOT / "xsam" / "train.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    return process, out


def images_per_second(runs: list) -> float:
    """Of all the runs together, from the median step of each."""
    total = 0.0
    for process, out in runs:
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"a run failed:\n{errors.decode()[-2000:]}")
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[SKIPPED:]
        total += statistics.median(json.loads(line)["images_per_second"] for line in lines)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="data of the toy world")
    parser.add_argument("--weights", type=Path, required=True, help="weights of the toy world")
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each run (default: 3)")
    options = parser.parse_args()
    print("| accumulated | 1 process | 2 side by side | 2 together | 2 / 1 | communication |")
    print("|---|---|---|---|---|---|")
    for accumulation in (1, 4):
        rates: dict[str, list[float]] = {"alone": [], "beside": [], "together": []}
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder)
                alone = [start(options, out / "alone", 1, accumulation)]
                rates["alone"].append(images_per_second(alone))
                beside = [start(options, out / f"beside{i}", 1, accumulation) for i in range(2)]
                rates["beside"].append(images_per_second(beside))
                together = [start(options, out / "together", 2, accumulation)]
                rates["together"].append(images_per_second(together))
        one, beside, two = (statistics.median(values) for values in rates.values())
        print(
            f"| {accumulation} | {one:.1f} images/s | {beside:.1f} | {two:.1f} | {two / one:.2f} | "
            f"{max(0.0, 1 - two / beside):.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
