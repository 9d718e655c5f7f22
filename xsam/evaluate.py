"""Scores a checkpoint: PQ for generic segmentation, cIoU and gIoU for referring.

    torchrun --nproc_per_node 2 xsam/evaluate.py --checkpoint runs/toy/stage3/step_600 --data DIR

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
import json
from collections import defaultdict

import numpy as np
from tqdm import tqdm

from xsam import distributed
from xsam.config import SOURCES, add_checkpoint_flags
from xsam.data import CocoPanoptic, RefCoco, Sample, open_dataset
from xsam.model import XSAM, Prediction, Segmentor, answer, load_checkpoint

TASKS = {"panoptic": "coco_panoptic_val", "refer": "refcoco_val"}
PROTOCOLS = {
    "PQ": "panoptic quality, mean over classes; void and crowd not counted (panopticapi)",
    "PQ_things": "the same over things",
    "PQ_stuff": "the same over stuff",
    "cIoU": "sum of intersections / sum of unions, one mask per sentence",
    "gIoU": "mean IoU, one mask per sentence, empty union = 1",
}


# ---- metrics -------------------------------------------------------------------------------------


def panoptic_matches(
    dataset: CocoPanoptic, index: int, sample: Sample, prediction: Prediction
) -> list[tuple[str, int, float]]:
    """One image's matches: ("tp", class, IoU), ("fn", class, 0.0) and ("fp", class, 0.0)."""
    _, ids, segments = dataset.read(index)
    truth = {
        segment["id"]: (dataset.category_index[segment["category_id"]], bool(segment["iscrowd"]))
        for segment in segments
    }
    numbers = np.arange(1, len(prediction.masks) + 1, dtype=np.int32)
    guess = (prediction.masks * numbers[:, None, None]).sum(axis=0)
    return match_segments(ids, truth, guess, dict(zip(numbers, prediction.categories, strict=True)))


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


def referring_areas(
    dataset: RefCoco, index: int, sample: Sample, prediction: Prediction
) -> tuple[int, int]:
    """Intersection and union of the only mask; without a prediction the union is the truth."""
    truth = sample.masks[0]
    guess = prediction.masks.any(axis=0)
    return int((guess & truth).sum()), int((guess | truth).sum())


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


def referring_quality(records: list[tuple[int, int]]) -> dict[str, float]:
    """cIoU and gIoU in percent of (intersection, union) areas."""
    intersection, union = np.array(records, np.float64).reshape(-1, 2).T
    ious = np.where(union > 0, intersection / np.maximum(union, 1), 1.0)
    return {
        "cIoU": float(100 * intersection.sum() / max(union.sum(), 1)),
        "gIoU": float(100 * ious.mean()),
    }


# ---- a dataset through a model -------------------------------------------------------------------


def evaluate(
    model: Segmentor | XSAM, task: str, data: Path, num_kept: int = 0
) -> tuple[dict[str, float], list[tuple[int, Sample, Prediction]]]:
    """Scores of one task over all ranks, and of this rank's first `num_kept` samples their index,
    ground truth and prediction."""
    dataset = open_dataset(TASKS[task], data, all_classes=True)
    is_panoptic = isinstance(dataset, CocoPanoptic)
    rank, world_size = distributed.rank(), distributed.world_size()
    indices = list(range(rank, len(dataset), world_size))
    size = model.settings.eval_batch_size
    records, kept = [], []
    bar = tqdm(total=len(indices), desc=f"evaluate {task}", unit="image", disable=rank != 0)
    for chunk in (indices[start : start + size] for start in range(0, len(indices), size)):
        samples = [question(dataset, index) for index in chunk]
        predictions = answer(model, samples, dataset.is_thing if is_panoptic else None)
        for index, sample, prediction in zip(chunk, samples, predictions, strict=True):
            score = panoptic_matches if is_panoptic else referring_areas
            records.append((index, score(dataset, index, sample, prediction)))
            if len(kept) < num_kept:
                kept.append((index, sample, prediction))
        bar.update(len(chunk))
    bar.close()
    ordered = sorted(distributed.gather(records), key=lambda item: item[0])
    if is_panoptic:
        flat = [match for _, matches in ordered for match in matches]
        return panoptic_quality(flat, dataset.is_thing), kept
    return referring_quality([areas for _, areas in ordered]), kept


def question(dataset: CocoPanoptic | RefCoco, index: int) -> Sample:
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
        lines.append(f"| {task} | {metric} | {' | '.join(cells)} | {PROTOCOLS[metric]} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="xsam/evaluate.py",
        description="Scores a checkpoint on the validation sets; runs under torchrun or alone.",
        epilog="example: python xsam/evaluate.py --checkpoint runs/toy/stage3/step_600 "
        "--data runs/toy/world/data --tasks panoptic",
    )
    add_checkpoint_flags(parser)
    parser.add_argument("--data", type=Path, default=Path("datas"), help="data root")
    parser.add_argument("--out", type=Path, help="where results go (default: the checkpoint)")
    parser.add_argument("--tasks", default="all", help="panoptic, refer, or all")
    options = parser.parse_args(arguments)
    tasks = list(TASKS) if options.tasks == "all" else options.tasks.split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"unknown task {', '.join(unknown)}; known are {', '.join(TASKS)}")
    paths = [options.data / path for task in tasks for path in SOURCES[TASKS[task]].paths()]
    if missing := [str(path) for path in paths if not path.exists()]:
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
        if stage == 1 and "refer" in tasks:
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
