"""What a person sees of a training run: a line per step, curves, scores and pictures.

All of it is in the run's folder: metrics.jsonl with a record for every step and every validation,
results.json and results.md, pictures/, and with the optional packages curves.png (matplotlib) and
tensorboard/.
"""

import importlib.util
import json
import math
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from xsam import distributed
from xsam.data import Batch
from xsam.datasets.sources import folder_name, run_sets
from xsam.evaluate import FOLDER, evaluate
from xsam.evaluation.benchmarks import Figures, table
from xsam.evaluation.prediction_files import SavedPredictions
from xsam.files import write_whole
from xsam.model import XSAM, Segmentor
from xsam.report.curves import LOSSES, METRICS_FILE, draw_metrics, read_metrics
from xsam.report.samples import draw_predictions

RESULTS_FILE = "results.json"

MOST_REASONS = 20  # printed by a rank for skipped samples

WATCHED_STEPS = 50  # over which a slow loader is noticed

SLOW_SHARE = 0.2  # of the time spent waiting for data that is worth a warning

UNTRAINED, INIT = "untrained", "init"  # columns before the first step; INIT: of --init's weights

UNTRAINED_SAMPLES = 16  # of each set: to see nearly nothing found takes no more


# ---- steps ---------------------------------------------------------------------------------------


class Monitor:
    """The steps of a stage under a progress bar, and what is recorded of them. On other ranks than
    the first it records nothing."""

    def __init__(
        self,
        out: Path,
        stage: int,
        num_steps: int,
        first_step: int,
        device: torch.device,
        peak_tflops: float | None,
    ):
        """Forgets what an interrupted run recorded from `first_step` on. `peak_tflops` is
        that of one device; None where it is not known, and then no rate is recorded."""
        self.out, self.stage, self.is_on = out, stage, distributed.rank() == 0
        self.device, self.peak_tflops = device, peak_tflops
        self.bar = tqdm(
            range(first_step, num_steps), f"stage {stage}", num_steps, initial=first_step,
            disable=not self.is_on, unit="step", dynamic_ncols=True,
        )  # fmt: skip
        self.recent: deque[tuple[float, float]] = deque(maxlen=WATCHED_STEPS)
        self.num_reasons = self.num_skipped_samples = 0  # of this rank, of all
        self.board = None
        if self.is_on:
            if first_step < num_steps:  # of a stage that is over nothing is recorded again
                drop_metrics(out / METRICS_FILE, stage, first_step)
            if importlib.util.find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                folder = out / "tensorboard" / f"stage{stage}"
                self.board = SummaryWriter(str(folder), purge_step=first_step)

    def __iter__(self) -> Iterator[int]:
        """The numbers of the steps that are left, under the bar."""
        return iter(self.bar)

    def step(self, step: int, batches: list[Batch], figures: dict[str, float]) -> None:
        """Records a step of these micro-batches: `figures` are its losses, norm and rate, and what
        it cost, of all ranks: "images", "tokens", "skipped_samples", of one: "seconds", …, and
        "flops" where the device's peak is known."""
        reasons = [reason for batch in batches for reason in batch.skipped]
        for reason in reasons[: max(0, MOST_REASONS - self.num_reasons)]:
            tqdm.write(f"skipped: {reason}")
        self.num_reasons += len(reasons)
        self.num_skipped_samples += figures["skipped_samples"]
        if not self.is_on:
            return
        record = {"stage": self.stage, "step": step, "task": batches[0].task} | figures
        seconds = record["seconds"]
        for name in ("images", "tokens"):
            record[f"{name}_per_second"] = record.pop(name) / seconds
        if self.peak_tflops:
            record["tflops"] = record.pop("flops") / seconds / 1e12  # of one device
            record["mfu"] = record["tflops"] / self.peak_tflops
        record["memory_gb"] = peak_memory(self.device)
        self._write(record)
        tqdm.write(step_line(record))
        self._watch_data(record["data_seconds"], seconds)

    def _watch_data(self, waited: float, seconds: float) -> None:
        """A warning where the last steps went into waiting for the loader."""
        self.recent.append((waited, seconds))
        waited, seconds = map(sum, zip(*self.recent, strict=True))
        if len(self.recent) == WATCHED_STEPS and waited > SLOW_SHARE * seconds:
            tqdm.write(
                f"slow data: {waited / seconds:.0%} of the last {WATCHED_STEPS} steps went into "
                "waiting for it; raise --num_workers, or put the data on a faster disk"
            )
            self.recent.clear()

    def validate(
        self, step: int, model: Segmentor | XSAM, data: Path, skip_bad: bool = False
    ) -> None:
        """Scores the first samples of every set of the tasks; every rank takes part."""
        count, prefix = model.config.num_validation, f"stage{self.stage}_step{step + 1}"
        num_pictures = model.config.num_pictures
        scores = score_tasks(model, self.out, data, prefix, num_pictures, count, skip_bad)
        model.train()
        figures = {f"{task} {name}": x for task, row in scores.items() for name, x in row.items()}
        self._write({"stage": self.stage, "step": step, "validation": figures})
        if self.is_on:
            shown = ", ".join(f"{name} {x:.1f}" for name, x in figures.items() if x is not None)
            tqdm.write(f"stage {self.stage} step {step}, {count} samples of each set: {shown}")
            draw_metrics(self.out)

    def _write(self, record: dict) -> None:
        if not self.is_on:
            return
        with (self.out / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_without_nan(record)) + "\n")
        if self.board is not None:
            for name, value in (record | record.get("validation", {})).items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Ends the bar and TensorBoard's file, and says how many samples were skipped."""
        self.bar.close()
        if self.is_on and self.num_skipped_samples:
            print(f"{self.num_skipped_samples} samples were skipped, and others drawn")
        if self.board is not None:
            self.board.close()


def step_line(record: dict) -> str:
    """A step's record for the eye."""
    losses = " ".join(f"{name} {record[name]:.3f}" for name in LOSSES if name in record)
    mfu = f" {record['tflops']:.3g} TFLOP/s MFU {record['mfu']:.1%}" if "mfu" in record else ""
    tokens = record["tokens_per_second"]
    return (
        f"stage {record['stage']} step {record['step']} {record['task']}: "
        f"loss {record['loss']:.3f} ({losses}) norm {record['grad_norm']:.2f} "
        f"lr {record['lr']:.1e} {record['images_per_second']:.1f} images/s "
        f"{f'{tokens:.0f} tokens/s ' * (tokens > 0)}data {record['data_seconds']:.2f} s "
        f"memory {record['memory_gb']:.1f} GB{mfu}"
    )


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GB: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak / 1e6


def _without_nan(value):
    """JSON has no numbers that are not finite: null in their place."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_metrics(path: Path, stage: int, step: int) -> None:
    """Forgets the lines that a resumed run is going to write again."""
    if not path.is_file():
        return
    records = read_metrics(path)
    kept = [record for record in records if (record["stage"], record["step"]) < (stage, step)]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))


# ---- scores --------------------------------------------------------------------------------------


def score(
    column: str, model: Segmentor | XSAM, out: Path, data: Path, skip_bad: bool, step: int = 0
) -> None:
    """Evaluates `model`, adds the column to OUT/results.json and results.md, draws pictures.
    `skip_bad`: see `evaluate`. `step` is the checkpoint's, for `is_scored`."""
    before = read_document(out)
    results = before.get("columns", {})
    num_pictures = 0 if column in (UNTRAINED, INIT) else model.config.num_pictures
    count = UNTRAINED_SAMPLES if column == UNTRAINED else None
    prefix = column.replace(" ", "")
    results[column] = score_tasks(model, out, data, prefix, num_pictures, count, skip_bad)
    if distributed.rank() == 0:
        # The last column's figures stand at the top level: {"panoptic": {"PQ": …}, …}.
        steps = before.get("steps", {}) | {column: step}
        document = results[column] | {"columns": results, "steps": steps}
        write_whole(out / RESULTS_FILE, json.dumps(document, indent=1))
        note = f"{UNTRAINED}: the first {UNTRAINED_SAMPLES} samples of each set"
        text = table(results, note * (UNTRAINED in results))
        write_whole(out / "results.md", text + "\n")
        print(f"\n{text}", flush=True)
    distributed.barrier()


def score_tasks(
    model: Segmentor | XSAM,
    out: Path,
    data: Path,
    prefix: str,
    num_pictures: int,
    num_samples: int | None = None,
    skip_bad: bool = False,
) -> dict[str, dict[str, Figures]]:
    """Figures of the tasks that the configuration names, and pictures of a task's first set, whose
    names begin with `prefix`. Predictions stay in OUT/predictions/PREFIX, but not where only the
    first `num_samples` are asked for. `skip_bad`: see `evaluate`."""
    names = run_sets(model.config, [model.stage], data)
    folder, drawn = out / FOLDER / prefix, set()

    def draw_first(task: str, predictions: SavedPredictions, _: dict[int, float]) -> None:
        if task not in drawn:
            drawn.add(task)
            count = min(num_pictures, len(predictions.keys))
            path = out / "pictures" / f"{prefix}_{folder_name(task)}"
            paths = {n: path.with_name(f"{path.name}_{n:05d}.png") for n in range(count)}
            draw_predictions(predictions, paths)

    figures = evaluate(
        model, names, data, folder, num_samples, on_scored=draw_first, overwrite=True,
        skip_bad=skip_bad,
    )  # fmt: skip
    distributed.barrier()
    if num_samples is not None and distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # without a task it is not there
    return figures


def is_scored(column: str, out: Path, step: int = 0) -> bool:
    """Whether OUT/results.json has a column, of this step."""
    before = read_document(out)
    is_there = column in before.get("columns", {})
    return is_there and before.get("steps", {}).get(column, step) == step


def read_document(out: Path) -> dict:
    """OUT/results.json: {"columns": {column: {task: {metric: figure}}}, "steps": {column: step}}
    and the last column's tasks beside; empty where there is none."""
    path = out / RESULTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
