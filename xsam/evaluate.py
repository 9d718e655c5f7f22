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
import torch
from tqdm import tqdm

from xsam import distributed
from xsam.config import SOURCES, Config
from xsam.data import CocoPanoptic, Processor, RefCoco, Sample, open_dataset
from xsam.model import XSAM, Segmentor, best_mask, panoptic_segments
from xsam.weights import load_checkpoint

TASKS = {"panoptic": "coco_panoptic_val", "refer": "refcoco_val"}
PROTOCOLS = {
    "PQ": "panoptic quality, mean over classes; void and crowd not counted (panopticapi)",
    "PQ_things": "the same over things",
    "PQ_stuff": "the same over stuff",
    "cIoU": "sum of intersections / sum of unions, one mask per sentence",
    "gIoU": "mean IoU, one mask per sentence, empty union = 1",
}


# ---- metrics ---------------------------------------------------------------------------------------


def panoptic_matches(
    ids: np.ndarray,
    segments: list[dict],
    category_index: dict[int, int],
    predicted_ids: np.ndarray,
    predicted: list[dict],
) -> list[tuple[str, int, float]]:
    """One image's matches: ("tp", class, IoU), ("fn", class, 0.0) and ("fp", class, 0.0).

    `ids` [H, W] with COCO segments_info against `predicted_ids` [H, W] with {"id", "category"};
    0 is void in both. A pair matches where the classes agree and IoU > 0.5, void not counted in the
    union. A missed crowd region is no error, nor is a segment mostly on void or on such a region.
    """
    pairs, areas = np.unique(
        np.stack([ids.ravel(), predicted_ids.ravel()]), axis=1, return_counts=True
    )
    overlap = {(int(a), int(b)): int(n) for (a, b), n in zip(pairs.T, areas, strict=True)}
    true_area, predicted_area = defaultdict(int), defaultdict(int)
    for (true, guess), area in overlap.items():
        true_area[true] += area
        predicted_area[guess] += area

    classes = {segment["id"]: category_index[segment["category_id"]] for segment in segments}
    crowds = {segment["id"] for segment in segments if segment["iscrowd"]}
    guesses = {segment["id"]: segment["category"] for segment in predicted}
    records, matched_true, matched_guess = [], set(), set()
    for (true, guess), area in overlap.items():
        if true not in classes or true in crowds or guess not in guesses:
            continue
        if classes[true] != guesses[guess]:
            continue
        union = true_area[true] + predicted_area[guess] - area - overlap.get((0, guess), 0)
        if area / union > 0.5:
            records.append(("tp", classes[true], area / union))
            matched_true.add(true)
            matched_guess.add(guess)
    for true, category in classes.items():
        if true not in matched_true and true not in crowds:
            records.append(("fn", category, 0.0))
    for guess, category in guesses.items():
        if guess in matched_guess or not predicted_area[guess]:
            continue
        unlabelled = overlap.get((0, guess), 0)
        unlabelled += sum(overlap.get((c, guess), 0) for c in crowds if classes[c] == category)
        if unlabelled / predicted_area[guess] <= 0.5:
            records.append(("fp", category, 0.0))
    return records


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


# ---- a dataset through a model ---------------------------------------------------------------------


def evaluate(
    model: Segmentor | XSAM,
    config: Config,
    task: str,
    data: Path,
    device: torch.device,
    num_kept: int = 0,
) -> tuple[dict[str, float], list[dict]]:
    """Scores of one task over all ranks, and the first `num_kept` of this rank's predictions.

    A kept prediction is {"sample", "answer", "masks", "labels", "scores", "index"}.
    """
    model.eval()
    tokenizer = model.tokenizer if isinstance(model, XSAM) else None
    processor = Processor(config, tokenizer)
    dataset = open_dataset(TASKS[task], data, all_classes=True)
    rank, world_size = distributed.rank(), distributed.world_size()
    indices = list(range(rank, len(dataset), world_size))
    records, kept = [], []
    bar = tqdm(total=len(indices), desc=f"evaluate {task}", unit="image", disable=rank != 0)
    for start in range(0, len(indices), config.eval_batch_size):
        chunk = indices[start : start + config.eval_batch_size]
        samples = [_question(dataset, index) for index in chunk]
        batch = processor.collate([processor.encode(sample) for sample in samples], pad_left=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            answers, predictions = model.infer(batch.to(device), config.max_new_tokens)
        rows = (
            {}
            if predictions is None
            else dict(zip(predictions.image_index.tolist(), range(len(samples))))
        )
        masks = None if predictions is None else predictions.mask_logits()
        for position, (index, sample) in enumerate(zip(chunk, samples, strict=True)):
            run = rows.get(position)
            run_outputs = (
                None
                if run is None
                else (predictions.class_logits[-1, run], masks[run], batch.placements[position])
            )
            record, prediction = _score(dataset, index, sample, run_outputs, config)
            records.append((index, record))
            if len(kept) < num_kept:
                kept.append(
                    {"sample": sample, "answer": answers[position], "index": index, **prediction}
                )
        bar.update(len(chunk))
    bar.close()
    records = [
        record for _, record in sorted(distributed.gather(records), key=lambda item: item[0])
    ]
    if task == "panoptic":
        flat = [match for matches in records for match in matches]
        return panoptic_quality(flat, dataset.is_thing), kept
    return referring_quality(records), kept


def _question(dataset: CocoPanoptic | RefCoco, index: int) -> Sample:
    """The sample with its answer left to the model; phrasings are those of a fixed seed."""
    sample = dataset.sample(index, np.random.default_rng([0, index]))
    sample.turns = [(question, None) for question, _ in sample.turns]
    return sample


def _score(dataset, index: int, sample: Sample, run_outputs: tuple | None, config: Config):
    """One sample's record for the metric and its prediction as masks, labels and scores."""
    height, width = sample.image.height, sample.image.width
    if isinstance(dataset, CocoPanoptic):
        segment_map, segments = np.zeros((height, width), np.int32), []
        if run_outputs is not None:
            segment_map, segments = panoptic_segments(
                *run_outputs, dataset.is_thing, config.score_threshold, config.overlap_threshold
            )
        _, ids, truth = dataset.read(index)
        record = panoptic_matches(ids, truth, dataset.category_index, segment_map, segments)
        numbers = np.array([segment["id"] for segment in segments])
        prediction = {
            "masks": (segment_map == numbers[:, None, None]).reshape(-1, height, width),
            "labels": [dataset.names[segment["category"]] for segment in segments],
            "scores": [segment["score"] for segment in segments],
        }
        return record, prediction
    mask, score = np.zeros((height, width), bool), 0.0
    if run_outputs is not None:
        mask, score = best_mask(*run_outputs)
    truth = sample.masks[0]
    record = int((mask & truth).sum()), int((mask | truth).sum())
    found = run_outputs is not None
    prediction = {
        "masks": mask[None][:found],
        "labels": sample.names[:found],
        "scores": [score][:found],
    }
    return record, prediction


# ---- command line ----------------------------------------------------------------------------------


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
    parser.add_argument("--checkpoint", type=Path, required=True, help="a step_N folder")
    parser.add_argument("--data", type=Path, default=Path("datas"), help="data root")
    parser.add_argument("--out", type=Path, help="where results go (default: the checkpoint)")
    parser.add_argument("--tasks", default="all", help="panoptic, refer, or all")
    options = parser.parse_args(arguments)
    tasks = list(TASKS) if options.tasks == "all" else options.tasks.split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"unknown task {', '.join(unknown)}; known are {', '.join(TASKS)}")
    missing = [
        options.data / path
        for task in tasks
        for path in SOURCES[
            TASKS[task].removesuffix("_val") if "refer" in task else TASKS[task]
        ].paths()
        if not (options.data / path).exists()
    ]
    if missing:
        parser.error("missing: " + ", ".join(map(str, missing)))

    device = distributed.start()
    try:
        model, config, stage = load_checkpoint(options.checkpoint)
        model.to(device)
        if stage == 1:
            tasks = [task for task in tasks if task == "panoptic"]
        results = {task: evaluate(model, config, task, options.data, device)[0] for task in tasks}
        if distributed.rank() == 0:
            out = options.out or options.checkpoint
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
