"""The commands as a user runs them, on the toy and on any device.

    python benchmarks/toy_run.py --out runs/toy_run

Trains a few steps of all three stages in bfloat16 under torchrun with one process (NCCL on a GPU),
again with a kill in stage 3 and --resume, and again in float32 on the CPU; evaluates every
benchmark; runs every task of `predict`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from measure import Report
from PIL import Image

from xsam.cli import add_device_flag
from xsam.datasets.sources import sets_by_task
from xsam.predict import main as predict
from xsam.tasks import requests
from xsam.toy import weights as toy
from xsam.toy.preset import toy as toy_config
from xsam.toy.world import write_world

SCRIPTS = Path(__file__).resolve().parent.parent / "xsam"
NUM_STEPS = 3  # of each stage
PATIENCE = 120  # seconds until stage 3 has begun
TOLERANCE = 0.5  # relative, of two runs' losses: other random points and bfloat16 make about 0.1


class Runs:
    """A folder with a small toy world, its weights and the output of the commands."""

    def __init__(self, folder: Path, device: str | None):
        self.folder, self.on_device = folder, ["--device", device] if device else []
        write_world(folder / "data", num_train=24, num_val=6)
        toy.write_weights(folder / "weights", toy_config().model, steps=3)

    def train(
        self, name: str, *flags: object, is_launched: bool = True, **options: bool
    ) -> subprocess.Popen:
        """Starts the training command, which writes to `name`; `options` are Popen's."""
        flags += ("--config", "toy", "--stage", "all", "--data", self.folder / "data")
        flags += ("--weights", self.folder / "weights", "--out", self.folder / name)
        flags += ("--max_steps", NUM_STEPS, "--save_every", 1, "--eval_tasks", "")
        flags += ("--global_batch_size", 4, "--micro_batch_size", 2, "--num_workers", 1)
        command = command_line("train.py", *flags, "--recompute", "true", is_launched=is_launched)
        return subprocess.Popen(command, **options)

    def losses(self, name: str) -> dict[tuple[int, int], float]:
        """The recorded losses of a run by (stage, step)."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return {(each["stage"], each["step"]): each["loss"] for each in map(json.loads, lines)}


def command_line(script: str, *flags: object, is_launched: bool = True) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    launcher = launcher if is_launched else []
    return [sys.executable, *launcher, str(SCRIPTS / script), *map(str, flags)]


def largest_difference(losses: dict, others: dict) -> float:
    """Relative, over the steps; infinite where one of the runs lacks a step."""
    if losses.keys() != others.keys():
        return float("inf")
    return max(abs(others[step] / loss - 1) for step, loss in losses.items())


def check_training(report: Report, runs: Runs) -> None:
    mixed = ["--dtype", "bfloat16", *runs.on_device]
    beside = runs.train("cpu", "--dtype", "float32", "--device", "cpu", is_launched=False)
    status, losses = runs.train("whole", *mixed).wait(), runs.losses("whole")
    passed = status == 0 and len(losses) == 3 * NUM_STEPS
    report.add("toy: training under torchrun", passed, status=status, steps=len(losses))

    process = runs.train("killed", *mixed, start_new_session=True)  # a group that can be killed
    until = time.monotonic() + PATIENCE
    stage = runs.folder / "killed" / "stage3"
    while process.poll() is None and time.monotonic() < until and not (stage / "step_1").is_dir():
        time.sleep(0.05)
    is_killed = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    num_before = len(runs.losses("killed"))
    status = runs.train("killed", *mixed, "--resume").wait()
    difference = largest_difference(losses, runs.losses("killed"))
    passed = is_killed and status == 0 and difference < TOLERANCE
    figures = {"steps_before": num_before, "largest_difference": difference}
    report.add("toy: killed and resumed", passed, is_killed=is_killed, status=status, **figures)

    status = beside.wait()
    difference = largest_difference(losses, runs.losses("cpu"))
    passed = status == 0 and difference < TOLERANCE
    report.add("toy: beside float32 on the CPU", passed, largest_difference=difference)


def check_evaluation(report: Report, runs: Runs) -> None:
    flags = ["--checkpoint", runs.folder / "whole" / "stage3", "--data", runs.folder / "data"]
    flags += ["--out", runs.folder / "scores", "--limit", 2, *runs.on_device]
    # Without Java on the PATH no METEOR is computed: 20 s that have nothing to do with a device.
    environment = os.environ | {"PATH": str(Path(sys.executable).parent)}
    status = subprocess.run(command_line("evaluate.py", *flags), env=environment).returncode
    path = runs.folder / "scores" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    missing = [task for task in sets_by_task() if task not in results]
    report.add("toy: evaluation", status == 0 and not missing, status=status, missing=missing)


def check_predictions(report: Report, runs: Runs) -> None:
    """The command of each task, one after another in this process."""
    image = next((runs.folder / "data" / "img_genseg").rglob("val2017/*.jpg"))
    with Image.open(image) as opened:
        region = np.zeros(opened.size[::-1], np.uint8)
    region[20:60, 20:60] = 255
    drawn = runs.folder / "region.png"
    Image.fromarray(region).save(drawn)
    own = {"chat": ["what is here ?"], "refer": ["the red circle"], "reason": ["what is red ?"]}
    own |= {task: ["--region", drawn] for task in ("interactive", "vgd")}
    (runs.folder / "answers").mkdir()
    wrong = []
    for task in requests():
        stem = runs.folder / "answers" / task
        flags = [*own.get(task, []), "--checkpoint", runs.folder / "whole" / "stage3"]
        flags += ["--image", image, "--out", stem, *runs.on_device]
        status = predict([task, *map(str, flags)])
        if status or (task != "chat" and not stem.with_suffix(".png").is_file()):
            wrong.append(task)
    report.add("toy: predict", not wrong, tasks=len(requests()), wrong=wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for toy.jsonl and the run toy/"
    )
    add_device_flag(parser)
    options = parser.parse_args()
    report = Report(options.out / "toy.jsonl")
    runs = Runs(options.out / "toy", options.device)
    for check in (check_training, check_evaluation, check_predictions):
        with report.guard(check.__name__):
            check(report, runs)
    return int(report.num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
