"""Scores a checkpoint on every task.

    torchrun --nproc_per_node 2 xsam/evaluate.py --checkpoint runs/toy/stage3/step_1300 --data DIR

Each rank scores its share and gives back one small record per sample; the records are put in the
dataset's order before they are summed, so any number of processes prints the same figures.
PQ follows Kirillov et al. 2019 as panopticapi counts it; cIoU is the sum of intersections over the
sum of unions, gIoU the mean IoU of the expressions, an empty union counting 1.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder must not shadow other packages' modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from xsam import distributed
from xsam.config import add_checkpoint_flags
from xsam.datasets import open_dataset
from xsam.datasets_generic import Generic, Panoptic
from xsam.formats import encode_mask
from xsam.model import XSAM, Segmentor, answer, load_checkpoint
from xsam.postprocess import Prediction
from xsam.samples import Dataset, Sample
from xsam.sources import PROMPT_TYPES, SOURCES, locate

PROTOCOLS = {
    "PQ": "panoptic quality, mean over classes; void and crowd not counted (panopticapi)",
    "PQ_things": "the same over things",
    "PQ_stuff": "the same over stuff",
    "cIoU": "sum of intersections / sum of unions, one mask per phrase, ignored pixels not counted",
    "gIoU": "mean IoU, one mask per phrase, empty union = 1",
    "N_acc": "share of the phrases without a target that get no mask",
    "T_acc": "share of the phrases with a target that get a mask",
    "mIoU": "mean IoU of the true masks, paired greedily with the predicted; unpaired = 0",
    "AP": "mask AP of the classes shown, IoU 0.50 to 0.95 (pycocotools)",
    "AP50": "the same at IoU 0.50",
    "accuracy": "share of answers equal to the true one, but for case and a full stop",
}


# ---- metrics -------------------------------------------------------------------------------------


def panoptic_matches(
    dataset: Panoptic, index: int, sample: Sample, prediction: Prediction
) -> list[tuple[str, int, float]]:
    """One image's matches: ("tp", class, IoU), ("fn", class, 0.0) and ("fp", class, 0.0)."""
    _, owner, segments = dataset.read(index)
    truth = {place: (each["class"], each["iscrowd"]) for place, each in enumerate(segments, 1)}
    numbers = np.arange(1, len(prediction.masks) + 1, dtype=np.int32)
    guess = (prediction.masks * numbers[:, None, None]).sum(axis=0)
    return match_segments(
        owner, truth, guess, dict(zip(numbers, prediction.categories, strict=True))
    )


def match_segments(
    ids: np.ndarray,
    truth: dict[int, tuple[int, bool]],
    guessed_ids: np.ndarray,
    guesses: dict[int, int],
) -> list[tuple[str, int, float]]:
    """True segment ids [H, W] with their (class, is crowd) against guessed ids with their class; 0
    is void in both.

    A pair matches where the classes agree and IoU > 0.5, void not counted in the union. A missed
    crowd region is no error, nor is a guess that lies mostly on void or on a crowd of its class.
    """
    stacked = np.stack([ids.ravel(), guessed_ids.ravel()])
    pairs, counts = np.unique(stacked, axis=1, return_counts=True)
    overlap = {(int(a), int(b)): int(n) for (a, b), n in zip(pairs.T, counts, strict=True)}
    true_area, guessed_area = defaultdict(int), defaultdict(int)
    for (true, guess), area in overlap.items():
        true_area[true] += area
        guessed_area[guess] += area

    records, found, explained = [], set(), set()
    for (true, guess), area in overlap.items():
        if true == 0 or guess == 0 or truth[true] != (guesses[guess], False):
            continue
        union = true_area[true] + guessed_area[guess] - area - overlap.get((0, guess), 0)
        if area / union > 0.5:
            records.append(("tp", guesses[guess], area / union))
            found.add(true)
            explained.add(guess)
    for true, (category, is_crowd) in truth.items():
        if true not in found and not is_crowd:
            records.append(("fn", category, 0.0))
    for guess, category in guesses.items():
        if guess in explained or not guessed_area[guess]:
            continue
        excused = [true for true, kind in truth.items() if kind == (category, True)]
        unlabelled = sum(overlap.get((true, guess), 0) for true in [0, *excused])
        if unlabelled / guessed_area[guess] <= 0.5:
            records.append(("fp", category, 0.0))
    return records


def mask_areas(
    dataset: Dataset, index: int, sample: Sample, prediction: Prediction
) -> tuple[int, int, bool, bool]:
    """Intersection and union of what is meant and what is predicted, and whether each of the two
    has a mask at all."""
    truth, guess = sample.masks.any(axis=0), prediction.masks.any(axis=0)
    is_counted = ~sample.ignore if sample.ignore is not None else np.ones_like(truth)
    intersection, union = (truth & guess & is_counted).sum(), ((truth | guess) & is_counted).sum()
    return int(intersection), int(union), bool(len(sample.masks)), bool(guess.any())


def paired_ious(
    dataset: Dataset, index: int, sample: Sample, prediction: Prediction
) -> list[float]:
    """IoU of each true mask with the predicted mask that it is paired with, the best pair first."""
    truth, guess = (
        masks.reshape(len(masks), masks[0].size if len(masks) else 0).astype(np.float32)
        for masks in (sample.masks, prediction.masks)
    )
    if not len(truth) or not len(guess):
        return [0.0] * len(truth)
    overlap = truth @ guess.T
    union = truth.sum(1)[:, None] + guess.sum(1) - overlap
    ious, found = overlap / np.maximum(union, 1), [0.0] * len(truth)
    for _ in range(min(ious.shape)):
        row, column = np.unravel_index(ious.argmax(), ious.shape)
        found[row] = float(ious[row, column])
        ious[row], ious[:, column] = -1, -1
    return found


def instances(
    dataset: Dataset, index: int, sample: Sample, prediction: Prediction
) -> tuple[list[tuple], list[tuple]]:
    """True (class name, RLE) and predicted (class name, RLE, score) of one image."""
    truth = [
        (sample.names[label], encode_mask(mask))
        for label, mask in zip(sample.labels, sample.masks, strict=True)
    ]
    found = zip(prediction.labels, prediction.masks, prediction.scores, strict=True)
    return truth, [(name, encode_mask(mask), score) for name, mask, score in found]


def is_right(dataset: Dataset, index: int, sample: Sample, prediction: Prediction) -> bool:
    """Whether the answer is the true one; of an option the letter counts."""
    said, true = (
        text.strip().rstrip(".").lower()
        for text in (prediction.answer, dataset.records[index]["answer"])
    )
    return said == true


def panoptic_quality(
    records: list[tuple[str, int, float]], is_thing: list[bool]
) -> dict[str, float]:
    """PQ, PQ_things and PQ_stuff in percent; the mean is over classes that occur at all."""
    counts = np.zeros((len(is_thing), 3))
    iou = np.zeros(len(is_thing))
    for kind, category, value in records:
        counts[category, ("tp", "fp", "fn").index(kind)] += 1
        iou[category] += value
    divisor = counts @ [1, 0.5, 0.5]
    quality = iou / np.maximum(divisor, 1)
    things, occurs = np.array(is_thing), divisor > 0
    scores = {}
    for name, group in (
        ("PQ", occurs),
        ("PQ_things", occurs & things),
        ("PQ_stuff", occurs & ~things),
    ):
        scores[name] = float(100 * quality[group].mean()) if group.any() else float("nan")
    return scores


def mask_quality(records: list[tuple[int, int, bool, bool]]) -> dict[str, float]:
    """cIoU and gIoU in percent; where phrases without a target are among them also the shares of
    both kinds that were told apart."""
    intersection, union, is_there, is_found = np.array(records, np.float64).reshape(-1, 4).T
    ious = np.where(union > 0, intersection / np.maximum(union, 1), 1.0)
    scores = {
        "cIoU": float(100 * intersection.sum() / max(union.sum(), 1)),
        "gIoU": float(100 * ious.mean()),
    }
    if not is_there.all():
        scores["N_acc"] = float(100 * (1 - is_found[is_there == 0]).mean())
        scores["T_acc"] = float(100 * is_found[is_there == 1].mean())
    return scores


def average_precision(records: list[tuple[list[tuple], list[tuple]]]) -> dict[str, float]:
    """AP and AP50 in percent of (truth, predictions) of each image, as `instances` gives them."""
    names = sorted({item[0] for truth, found in records for item in [*truth, *found]})
    number = {name: place for place, name in enumerate(names, 1)}
    images, truths, found = [], [], []
    for image, (true, predicted) in enumerate(records, 1):
        sides = [rle["size"] for _, rle, *_ in [*true, *predicted]] or [(0, 0)]
        images.append({"id": image, "height": sides[0][0], "width": sides[0][1]})
        for name, rle in true:
            area = int(coco_mask.area(rle))
            item = {"image_id": image, "category_id": number[name], "segmentation": rle}
            truths.append(item | {"id": len(truths) + 1, "iscrowd": 0, "area": area})
        for name, rle, score in predicted:
            item = {"image_id": image, "category_id": number[name], "segmentation": rle}
            found.append(item | {"score": score})
    if not found or not truths:
        return {"AP": 0.0, "AP50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": images,
            "categories": [{"id": each} for each in number.values()],
            "annotations": truths,
            "info": {},
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"AP": float(100 * evaluation.stats[0]), "AP50": float(100 * evaluation.stats[1])}


# ---- the tasks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Its sets, the record of one sample, and what the records of a set amount to."""

    datasets: dict[str, str]  # a suffix for the metrics' names (may be empty) and the set
    score: Callable[[Dataset, int, Sample, Prediction], Any]
    summarise: Callable[..., dict[str, float]]


def _ious(records: list[list[float]]) -> dict[str, float]:
    return {"mIoU": float(100 * np.mean([iou for ious in records for iou in ious]))}


def _share(records: list[bool]) -> dict[str, float]:
    return {"accuracy": float(100 * np.mean(records))}


TASKS = {
    "panoptic": Task({"": "coco_panoptic_val"}, panoptic_matches, panoptic_quality),
    "openvocab": Task({"": "ade20k_panoptic_val"}, panoptic_matches, panoptic_quality),
    "refer": Task({"": "refcoco_val"}, mask_areas, mask_quality),
    "grefer": Task({"": "grefcoco_val"}, mask_areas, mask_quality),
    "reason": Task({"": "reasonseg_val"}, mask_areas, mask_quality),
    "gcg": Task({"": "gcg_val"}, paired_ious, _ious),
    "interactive": Task(
        {f" {kind}": f"coco_interactive_val_{kind}" for kind in PROMPT_TYPES},
        mask_areas,
        mask_quality,
    ),
    "vgd": Task(
        {f" {kind}": f"coco_vgd_val_{kind}" for kind in PROMPT_TYPES}, instances, average_precision
    ),
    "chat": Task({" POPE": "pope", " MMBench": "mmbench"}, is_right, _share),
}


# ---- a dataset through a model -------------------------------------------------------------------


def evaluate(
    model: Segmentor | XSAM,
    task: str,
    data: Path,
    num_kept: int = 0,
    num_samples: int | None = None,
) -> tuple[dict[str, float], list[tuple[int, Sample, Prediction]]]:
    """Scores of one task over all ranks, and of this rank's first `num_kept` samples of its first
    set the index, ground truth and prediction. `num_samples`: of each set the first ones alone."""
    scores, kept = {}, []
    for suffix, name in TASKS[task].datasets.items():
        dataset = open_dataset(name, data, all_classes=True)
        found, of_set = evaluate_dataset(
            model, task, dataset, 0 if scores else num_kept, num_samples
        )
        scores |= {f"{metric}{suffix}": figure for metric, figure in found.items()}
        kept += of_set
    return scores, kept


def evaluate_dataset(
    model: Segmentor | XSAM,
    task: str,
    dataset: Dataset,
    num_kept: int = 0,
    num_samples: int | None = None,
) -> tuple[dict[str, float], list[tuple[int, Sample, Prediction]]]:
    """The same for one of the task's sets."""
    is_thing = dataset.is_thing if isinstance(dataset, Generic) else None
    rank, world_size = distributed.rank(), distributed.world_size()
    indices = list(range(len(dataset)))[rank:num_samples:world_size]
    size = model.settings.eval_batch_size
    records, kept = [], []
    bar = tqdm(total=len(indices), desc=f"evaluate {dataset.name}", disable=rank != 0)
    for chunk in (indices[start : start + size] for start in range(0, len(indices), size)):
        samples = [question(dataset, index) for index in chunk]
        predictions = answer(model, samples, is_thing)
        for index, sample, prediction in zip(chunk, samples, predictions, strict=True):
            records.append((index, TASKS[task].score(dataset, index, sample, prediction)))
            if len(kept) < num_kept:
                kept.append((index, sample, prediction))
        bar.update(len(chunk))
    bar.close()
    ordered = [record for _, record in sorted(distributed.gather(records), key=lambda r: r[0])]
    if is_thing is None:
        return TASKS[task].summarise(ordered), kept
    return TASKS[task].summarise([match for image in ordered for match in image], is_thing), kept


def question(dataset: Dataset, index: int) -> Sample:
    """A sample with its answer left to the model; its phrasing is drawn from a fixed seed."""
    sample = dataset.sample(index, np.random.default_rng([0, index]))
    sample.turns = [(asked, None) for asked, _ in sample.turns]
    return sample


# ---- command line --------------------------------------------------------------------------------


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown table of {column: {task: {metric: figure}}}, the protocol beside each figure."""
    columns = list(results)
    rows = {
        (task, metric): None
        for scores in results.values()
        for task in scores
        for metric in scores[task]
    }
    lines = ["| task | metric | " + " | ".join(columns) + " | protocol |"]
    lines.append("|" + "---|" * (len(columns) + 3))
    for task, metric in rows:
        figures = [results[column].get(task, {}).get(metric) for column in columns]
        cells = ["–" if figure is None else f"{figure:.1f}" for figure in figures]
        lines.append(
            f"| {task} | {metric} | {' | '.join(cells)} | {PROTOCOLS[metric.split()[0]]} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="xsam/evaluate.py",
        description="Scores a checkpoint on the validation sets; runs under torchrun or alone.",
        epilog="example: python xsam/evaluate.py --checkpoint runs/toy/stage3/step_1300 "
        "--data runs/toy/world/data --tasks panoptic",
    )
    add_checkpoint_flags(parser)
    parser.add_argument("--data", type=Path, default=Path("datas"), help="data root")
    parser.add_argument("--out", type=Path, help="where results go (default: the checkpoint)")
    parser.add_argument("--tasks", default="all", help=f"{', '.join(TASKS)}, or all")
    options = parser.parse_args(arguments)
    tasks = list(TASKS) if options.tasks == "all" else options.tasks.split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"unknown task {', '.join(unknown)}; known are {', '.join(TASKS)}")
    names = [name for task in tasks for name in TASKS[task].datasets.values()]
    paths = [locate(options.data, path) for name in names for path in SOURCES[name].paths()]
    if missing := sorted({str(path) for path in paths if not path.exists()}):
        parser.error("missing: " + ", ".join(missing))

    device = distributed.start()
    try:
        model, stage = load_checkpoint(
            options.checkpoint,
            tokenizer=options.tokenizer,
            allow_missing=tuple(options.allow_missing),
            device=device,
            report=print if distributed.rank() == 0 else lambda _: None,
        )
        if stage == 1 and tasks != ["panoptic"]:
            raise ValueError("stage 1 has no language model; it is scored with --tasks panoptic")
        results = {task: evaluate(model, task, options.data)[0] for task in tasks}
        if distributed.rank() == 0:
            checkpoint = options.checkpoint
            out = options.out or (checkpoint if checkpoint.is_dir() else checkpoint.parent)
            out.mkdir(parents=True, exist_ok=True)
            (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
            text = table({f"stage {stage}": results})
            (out / "results.md").write_text(text + "\n", encoding="utf-8")
            print(text)
    except ValueError as error:
        print(f"xsam/evaluate.py: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
