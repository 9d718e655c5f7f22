"""What the benchmarks are and how predictions are scored on them (paper section 4 and appendix).

Stands between `prediction_files.py`, which reads predictions, and `evaluate.py`, the command.
`BENCHMARKS` has a row for each set. A set is scored in two steps: any rank measures a sample
(`metrics.py`); the records of all ranks are put in the dataset's order and summed up, so that any
number of processes gives the same figures to the last digit.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from xsam import distributed
from xsam.datasets.base import Dataset
from xsam.datasets.formats import encode_mask
from xsam.datasets.generic import Instances
from xsam.datasets.sources import SOURCES, file_name, is_own, sets_by_task
from xsam.evaluation import metrics
from xsam.evaluation.metrics import Embed, Figures
from xsam.evaluation.prediction_files import SavedPredictions, kind_of
from xsam.results import SHOWN_SCORE

# ---- the record of one sample --------------------------------------------------------------------


def _panoptic(predictions: SavedPredictions, index: int, one_crowd_per_class: bool) -> list:
    _, true_ids, segments = predictions.dataset.read(index)
    truth = {n: (each["class"], each["iscrowd"]) for n, each in enumerate(segments, 1)}
    predicted = predictions.segments(index, true_ids.shape)
    return metrics.match_segments(true_ids, truth, *predicted, one_crowd_per_class)


def _instances(predictions: SavedPredictions, index: int) -> dict:
    dataset, categories = predictions.dataset, predictions.categories
    if isinstance(dataset, Instances):
        image, truth = dataset.read(index)
    else:
        sample = dataset.inputs(index)
        image, shown = sample.image, [categories[number] for number in sample.category_ids]
        pairs = zip(sample.labels, sample.masks, strict=True)
        truth = [(shown[label], mask, False) for label, mask in pairs]
    truth = [(category, encode_mask(mask), is_crowd) for category, mask, is_crowd in truth]
    predicted = predictions.instances(index, (image.height, image.width))
    key = predictions.keys[index]
    return metrics.collect_instances(key, len(categories), truth, predicted)


def _semantic(predictions: SavedPredictions, index: int) -> np.ndarray:
    _, truth = predictions.dataset.read(index)
    predicted = predictions.class_map(index, truth.shape)
    return metrics.count_pixels(truth, predicted, len(predictions.categories))


def _mask(predictions: SavedPredictions, index: int) -> metrics.Overlap:
    sample = predictions.dataset.inputs(index)
    predicted = predictions.mask(index, (sample.image.height, sample.image.width))
    return metrics.mask_overlap(sample.masks.any(axis=0), predicted, sample.ignore)


def _grounded(predictions: SavedPredictions, index: int, embed: Embed | None) -> tuple:
    """The masks as instances of one class, and paired with the true ones by their phrases."""
    key, sample = predictions.keys[index], predictions.dataset.inputs(index)
    predicted = predictions.instances(index, (sample.image.height, sample.image.width))
    truth = [encode_mask(mask) for mask in sample.masks]
    instances = metrics.collect_instances(key, 1, [(0, rle, False) for rle in truth], predicted)
    similarity, phrases = None, predictions.dataset.phrases(index)
    if phrases:
        similarity = metrics.phrase_similarity(phrases, predictions.phrases(index), embed)
    return instances, metrics.ground_masks(truth, [rle for _, rle, _ in predicted], similarity)


def _choice(predictions: SavedPredictions, index: int) -> tuple[str, bool]:
    row, answer = predictions.dataset.records[index], predictions.answer(index)
    truth = row["answer"].strip()
    if options := predictions.dataset.options(row):
        return row["index"], metrics.read_choice(answer, options) == truth
    if truth.lower() in ("yes", "no"):
        return row["index"], metrics.read_yes_no(answer) == truth.capitalize()
    return row["index"], metrics.exact_match(answer, truth)


def _mme(predictions: SavedPredictions, index: int) -> tuple[str, str, bool]:
    """MME has two questions about each image."""
    row = predictions.dataset.records[index]
    image = row.get("image_path") or hashlib.sha256(row["image"].encode()).hexdigest()
    return row.get("category", ""), image, _choice(predictions, index)[1]


def _pope(predictions: SavedPredictions, index: int) -> list[tuple[str, str | None]]:
    """A question of POPE counts once for each sampling that it is in."""
    row, answer = predictions.dataset.records[index], predictions.answer(index)
    pair = row["answer"].strip().capitalize(), metrics.read_yes_no(answer)
    return [pair] * len(row.get("category", "").split(","))


# ---- the figures of a set ------------------------------------------------------------------------


def _panoptic_figures(predictions: SavedPredictions, records: list) -> Figures:
    return metrics.panoptic_quality(records, predictions.dataset.is_thing)


def _instance_figures(predictions: SavedPredictions, records: list) -> Figures:
    return metrics.average_precision(records, len(predictions.categories))


def _reason_test_figures(predictions: SavedPredictions, records: list) -> Figures:
    """Of all samples, and of those whose expression is a phrase (short) or a sentence (long)."""
    figures = metrics.mask_quality(records)
    for name, is_long in (("short", False), ("long", True)):
        pairs = enumerate(records)
        part = [each for index, each in pairs if predictions.dataset.is_sentence(index) is is_long]
        figures |= {f"{metric} {name}": x for metric, x in metrics.mask_quality(part).items()}
    return figures


def _region_figures(predictions: SavedPredictions, records: list) -> Figures:
    figures = metrics.mask_quality(records)
    return {"mIoU": figures["gIoU"], "cIoU": figures["cIoU"]}


def _grounded_figures(predictions: SavedPredictions, records: list, embed: Embed | None) -> Figures:
    instances, pairs = map(list, zip(*records, strict=True))
    grounding = metrics.grounding_quality(pairs)
    return _caption_figures(predictions) | {
        "AP50": metrics.average_precision(instances, 1)["AP50"],
        "mIoU": grounding["mIoU"],
        "recall" if embed is not None else "recall_exact": grounding["recall"],
    }


def _caption_figures(predictions: SavedPredictions) -> Figures:
    """METEOR and CIDEr, by rank 0; None, with a message, where their programs are not installed."""
    figures: list[Figures] = []
    if distributed.rank() == 0:
        dataset = predictions.dataset
        truth = {key: dataset.captions(index) for index, key in enumerate(predictions.keys)}
        try:
            figures.append(metrics.caption_quality(truth, predictions.captions))
        except ImportError as error:
            tqdm.write(f"{dataset.name}: no METEOR and CIDEr: {error}", file=sys.stderr)
            figures.append({"METEOR": None, "CIDEr": None})
    return distributed.gather(figures)[0]


def _mmbench_figures(predictions: SavedPredictions, records: list) -> Figures:
    """The rotations of a question share their index modulo a million."""
    if odd := [number for number, _ in records if not number.strip().isdecimal()]:
        raise ValueError(f"{predictions.dataset.annotations}: index {odd[0]!r} is no number")
    return metrics.choice_accuracy([(int(n) % 1_000_000, is_right) for n, is_right in records])


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scoring:
    """How predictions of one kind (`prediction_files.LAYOUTS`) become figures."""

    record: Callable[..., Any]  # (predictions, index): of one sample
    figures: Callable[..., Figures]  # (predictions, records of all samples)
    quality: Callable[[Any], float]  # of a record, 0 to 1: says which samples are the worst
    measure: str  # what that is; "": an answer is right or wrong
    protocols: dict[str, str]  # how each metric is counted


def _mask_iou(record: metrics.Overlap) -> float:
    return metrics.mask_quality([record])["gIoU"] / 100


def _class_iou(record: np.ndarray) -> float:
    miou = metrics.mean_iou(record)["mIoU"]  # None where all of the truth is void
    return 1.0 if miou is None else miou / 100


# How each metric is counted.
_PQ = {
    "PQ": "panoptic quality, mean over the classes that occur; void and crowd as panopticapi, "
    "areas in pixels of the PNG",
    "PQ_things": "the same over things",
    "PQ_stuff": "the same over stuff",
    "SQ": "mean IoU of the matched segments, mean over classes",
    "RQ": "F1 of finding segments, mean over classes",
}
_AP = {
    "AP": "mask AP, IoU 0.50 to 0.95, 100 masks a class and image, crowd ignored (pycocotools)",
    "AP50": "the same at IoU 0.50",
}
_SHOWN_AP = _AP | {
    "AP": "mask AP of the classes shown, IoU 0.50 to 0.95 (pycocotools); cross: shown in "
    "another image",
}
_MIOU = {"mIoU": "mean IoU of one confusion matrix; 255 and classes without truth not counted"}
_IOU = {
    "cIoU": "sum of intersections / sum of unions, one mask an expression",
    "gIoU": "mean IoU, one mask an expression, empty union = 1",
}
_TARGET_IOU = {
    "cIoU": f"{_IOU['cIoU']}; those without a target counted (GRES)",
    "gIoU": "mean IoU; without a target 1 if no mask is given, else 0 (GRES)",
    "N_acc": "share of the expressions without a target that get no mask",
    "T_acc": "share of the expressions with a target that get a mask",
    "cIoU_targets": f"{_IOU['cIoU']}; expressions with a target alone, as the paper has it",
    "gIoU_targets": "mean IoU; expressions with a target alone, as the paper has it",
}
_REASON_IOU = {
    "gIoU": f"{_IOU['gIoU']}; ignored pixels in neither",
    "cIoU": f"{_IOU['cIoU']}; ignored in neither",
}
_REGION_IOU = {
    "mIoU": "mean IoU of the objects that have the prompt, crowd regions with them",
    "cIoU": "sum of intersections / sum of unions of the same",
}
_CAPTIONS = {
    "METEOR": "captions, over all true images (pycocoevalcap)",
    "CIDEr": "captions, over all true images (pycocoevalcap)",
    "AP50": "mask AP at IoU 0.50, one class, all true images, masks scored by the model",
    "mIoU": "mean IoU of pairs, greedily one to one, then mean over all true images",
    "recall": "share of true masks paired at IoU 0.5 with a phrase that is alike (cosine "
    "of mean BERT states at 0.5)",
    "recall_exact": "share of true masks paired at IoU 0.5 with a phrase that is equal but "
    "for case (recall itself needs --bert)",
}
_ANSWERS = {
    "perception": "sum over categories of accuracy and accuracy+ (both of an image), yes "
    "or no read from the answer",
    "cognition": "the same over the other categories",
    "accuracy": "share of questions whose option, or yes or no, is read from the answer by "
    "exact matching; MMBench: right in every rotation of the options",
    "F1": "of yes, read from the answer by exact matching",
}

PANOPTIC = Scoring(_panoptic, _panoptic_figures, metrics.segment_quality, "PQ", _PQ)
INSTANCES = Scoring(
    _instances, _instance_figures, partial(metrics.instance_quality, least=SHOWN_SCORE), "PQ", _AP
)
SHOWN = replace(INSTANCES, protocols=_SHOWN_AP)
SEMANTIC = Scoring(
    _semantic, lambda _, records: metrics.mean_iou(sum(records)), _class_iou, "mIoU", _MIOU
)
MASK = Scoring(_mask, lambda _, records: metrics.mask_quality(records), _mask_iou, "IoU", _IOU)
NO_TARGET = Scoring(
    _mask, lambda _, records: metrics.target_quality(records), _mask_iou, "IoU", _TARGET_IOU
)
REASON = replace(MASK, protocols=_REASON_IOU)
REASON_TEST = replace(REASON, figures=_reason_test_figures)
REGION = replace(MASK, figures=_region_figures, protocols=_REGION_IOU)
GROUNDED = Scoring(_grounded, _grounded_figures, lambda record: record[1][0], "mIoU", _CAPTIONS)
CHOICE = Scoring(
    _choice, lambda _, records: metrics.choice_accuracy(records), lambda record: record[-1], "",
    _ANSWERS,
)  # fmt: skip
MMBENCH = replace(CHOICE, figures=_mmbench_figures)
MME = replace(CHOICE, record=_mme, figures=lambda _, records: metrics.mme_score(records))
POPE = Scoring(
    _pope,
    lambda _, records: metrics.yes_no_quality([*chain(*records)]),
    lambda record: record[0][0] == record[0][1],
    "",
    _ANSWERS,
)

# Of sets that are none of BENCHMARKS, and of a user's own files: by the kind of their predictions.
BY_KIND = {
    "panoptic": PANOPTIC, "instances": INSTANCES, "semantic": SEMANTIC, "mask": NO_TARGET,
    "grounded": GROUNDED, "answer": CHOICE,
}  # fmt: skip


class Benchmark(NamedTuple):
    """How a set is scored."""

    suffix: str  # what follows the names of its figures among those of its task
    scoring: Scoring
    paper: dict[str, float]  # what the paper reports, by metric


# ReasonSeg's short and long expressions.
_LENGTHS = {"gIoU short": 47.7, "cIoU short": 48.1, "gIoU long": 56.0, "cIoU long": 40.8}

BENCHMARKS = {  # by set
    "coco_panoptic_val": Benchmark("", PANOPTIC, dict(PQ=54.7)),  # tables 2 and 12
    "coco_instance_val": Benchmark("", INSTANCES, dict(AP=47.0)),
    "coco_semantic_val": Benchmark("", SEMANTIC, dict(mIoU=66.5)),
    "ade20k_panoptic_val": Benchmark("", PANOPTIC, dict(PQ=20.9)),  # tables 2 and 13
    "ade20k_instance_val": Benchmark("", INSTANCES, dict(AP=16.2)),
    "ade20k_semantic_val": Benchmark("", SEMANTIC, dict(mIoU=28.8)),
    "refcoco_val": Benchmark("", MASK, dict(cIoU=85.1)),  # tables 2 and 3
    "refcoco_testA": Benchmark(" testA", MASK, dict(cIoU=87.1)),
    "refcoco_testB": Benchmark(" testB", MASK, dict(cIoU=83.4)),
    "refcoco+_val": Benchmark(" + val", MASK, dict(cIoU=78.0)),
    "refcoco+_testA": Benchmark(" + testA", MASK, dict(cIoU=81.0)),
    "refcoco+_testB": Benchmark(" + testB", MASK, dict(cIoU=74.4)),
    "refcocog_val": Benchmark(" g val", MASK, dict(cIoU=83.8)),
    "refcocog_test": Benchmark(" g test", MASK, dict(cIoU=83.9)),
    # table 16
    "grefcoco_val": Benchmark("", NO_TARGET, dict(cIoU_targets=36.9, gIoU_targets=44.8)),
    "grefcoco_testA": Benchmark(" testA", NO_TARGET, dict(cIoU_targets=32.3, gIoU_targets=34.5)),
    "grefcoco_testB": Benchmark(" testB", NO_TARGET, dict(cIoU_targets=36.4, gIoU_targets=38.9)),
    "reasonseg_val": Benchmark("", REASON, dict(gIoU=56.6, cIoU=32.9)),  # tables 2 and 14
    "reasonseg_test": Benchmark(" test", REASON_TEST, dict(gIoU=57.8, cIoU=41.0) | _LENGTHS),
    # tables 2 and 4
    "gcg_val": Benchmark("", GROUNDED, dict(METEOR=15.4, CIDEr=46.3, AP50=33.2, mIoU=69.4)),
    "gcg_test": Benchmark(" test", GROUNDED, dict(METEOR=15.1, CIDEr=42.7, AP50=32.9, mIoU=69.0)),
    # tables 2 and 15
    "coco_interactive_val_point": Benchmark(" point", REGION, dict(mIoU=65.4, cIoU=62.9)),
    "coco_interactive_val_scribble": Benchmark(" scribble", REGION, dict(mIoU=66.9, cIoU=75.7)),
    "coco_interactive_val_box": Benchmark(" box", REGION, dict(mIoU=69.6, cIoU=75.4)),
    "coco_interactive_val_mask": Benchmark(" mask", REGION, dict(mIoU=69.7, cIoU=77.0)),
    "coco_vgd_val_point": Benchmark(" point", SHOWN, dict(AP=47.9, AP50=72.5)),  # tables 2 and 5
    "coco_vgd_val_scribble": Benchmark(" scribble", SHOWN, dict(AP=48.7, AP50=73.4)),
    "coco_vgd_val_box": Benchmark(" box", SHOWN, dict(AP=49.5, AP50=74.7)),
    "coco_vgd_val_mask": Benchmark(" mask", SHOWN, dict(AP=49.7, AP50=74.9)),
    "coco_vgd_val_point_cross": Benchmark(" point cross", SHOWN, {}),
    "coco_vgd_val_scribble_cross": Benchmark(" scribble cross", SHOWN, {}),
    "coco_vgd_val_box_cross": Benchmark(" box cross", SHOWN, {}),
    "coco_vgd_val_mask_cross": Benchmark(" mask cross", SHOWN, {}),
    "mme": Benchmark(" MME", MME, dict(perception=1374, cognition=312)),  # table 18
    "mmbench": Benchmark(" MMBench", MMBENCH, dict(accuracy=69.3)),
    "seed": Benchmark(" SEED", CHOICE, dict(accuracy=69.3)),
    "pope": Benchmark(" POPE", POPE, dict(F1=89.3)),
    "ai2d": Benchmark(" AI2D", CHOICE, dict(accuracy=62.6)),
}  # fmt: skip


def named(figures: Figures, suffix: str) -> Figures:
    """The figures of a set by their names among those of its task: "gIoU short" of the set whose
    suffix is " test" is "gIoU test short"."""
    result = {}
    for name, figure in figures.items():
        metric, _, part = name.partition(" ")
        result[f"{metric}{suffix}{' ' * bool(part)}{part}"] = figure
    return result


class ScoredTask(NamedTuple):
    """The sets of a task together."""

    datasets: list[tuple[str, str]]  # (suffix, name)
    protocols: dict[str, str]  # how each metric is counted
    paper: dict[str, float]  # by the names of the figures, suffixes included


def scored_tasks() -> dict[str, ScoredTask]:
    """The tasks of evaluation (`Source.scores`)."""
    tasks = {}
    for task, names in sets_by_task().items():
        tasks[task] = ScoredTask([(task_of(name)[1], name) for name in names], {}, {})
        for row in [BENCHMARKS[name] for name in names if name in BENCHMARKS]:
            tasks[task].protocols.update(row.scoring.protocols)
            tasks[task].paper.update(named(row.paper, row.suffix))
    return tasks


# What the paper reports for the segmentor alone (table 17), which has these tasks only.
SEGMENTOR_PAPER = {
    "panoptic": {"PQ": 54.2, "PQ_things": 60.0, "PQ_stuff": 45.4},
    "instance": {"AP": 44.2},
    "semantic": {"mIoU": 63.8},
}


def task_of(name: str) -> tuple[str, str]:
    """The task that scores a set, and the suffix of its figures; of a user's own file itself.
    Raises ValueError where none does."""
    if is_own(name):
        return name, ""
    if name not in SOURCES or not SOURCES[name].scores:
        raise ValueError(f"{name}: no task scores this set")
    suffix = BENCHMARKS[name].suffix if name in BENCHMARKS else f" {name}"
    return SOURCES[name].scores, suffix


def scoring_of(dataset: Dataset) -> Scoring:
    """How predictions for a set become figures: those of own expressions, all of which fit
    something, without the figures for others."""
    if dataset.name in BENCHMARKS:
        return BENCHMARKS[dataset.name].scoring
    scoring = BY_KIND[kind_of(dataset)]
    if scoring is NO_TARGET and all(map(dataset.is_present, range(len(dataset)))):
        return MASK
    return scoring


# ---- scoring a set -------------------------------------------------------------------------------


def score_dataset(
    predictions: SavedPredictions,
    embed: Embed | None = None,
    label: str = "",
    one_crowd_per_class: bool = False,
    qualities: dict[int, float] | None = None,
) -> Figures:
    """The figures of a set; all ranks take part and all get them. `embed` gives embeddings of
    phrases, where there are any (`bert_embedder`); `one_crowd_per_class` is panopticapi's rule for
    crowd regions (`metrics.match_segments`). `qualities`, if given, is filled with the quality
    (`Scoring.quality`) of each sample that this rank measures, by its index."""
    name, rank = predictions.dataset.name, distributed.rank()
    scoring = scoring_of(predictions.dataset)
    record, figures = scoring.record, scoring.figures
    if scoring is PANOPTIC:
        record = partial(record, one_crowd_per_class=one_crowd_per_class)
    elif scoring is GROUNDED:
        record, figures = partial(record, embed=embed), partial(figures, embed=embed)
    indices = range(len(predictions.keys))[rank :: distributed.world_size()]
    records = []
    for index in tqdm(indices, f"score {label or name}", disable=rank != 0, unit="image"):
        measured = record(predictions, index)
        if qualities is not None:
            qualities[index] = float(scoring.quality(measured))
        if scoring is SEMANTIC and records:  # counts of pixels can be added in any order
            records[0][1][...] += measured
        else:
            records.append((index, measured))
    records = sorted(distributed.gather(records), key=lambda pair: pair[0])
    return figures(predictions, [measured for _, measured in records])


def bert_embedder(folder: Path) -> Embed:
    """Embeddings [n, C] of phrases: the mean of BERT's last states over a phrase's tokens, as
    GLaMM's evaluation has them. Raises ValueError where there is no model in the folder."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        own = dict(local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, **own)
        model = AutoModel.from_pretrained(folder, **own).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no BERT in it ({error})") from error

    @torch.no_grad()
    def embed(phrases: list[str]) -> np.ndarray:
        states = [
            model(**tokenizer(phrase, return_tensors="pt", truncation=True)).last_hidden_state[0]
            for phrase in phrases
        ]
        return np.stack([each.mean(0).float().numpy() for each in states])

    return embed


# ---- the table that is printed -------------------------------------------------------------------


def table(results: dict[str, dict[str, Figures]], note: str = "", with_paper: bool = True) -> str:
    """Markdown table of {column: {task: {figure's name: figure}}}: each figure beside the paper's
    and how it is counted. `note` stands above it."""
    tasks = scored_tasks()
    of_kinds = _CAPTIONS | _ANSWERS | _TARGET_IOU | _PQ | _AP | _MIOU
    rows = dict.fromkeys((t, n) for scores in results.values() for t in scores for n in scores[t])
    with_paper &= not all(is_own(task) for task, _ in rows)
    heads = ["task", "metric", *results, *(["paper"] if with_paper else []), "protocol"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    labels = {task: file_name(task) for task, _ in rows}
    if len(set(labels.values())) < len(labels):  # files of one name in several folders
        labels = {task: task for task in labels}
    for task, name in rows:
        figures = [scores.get(task, {}).get(name) for scores in results.values()]
        cells = [cell(figure) for figure in figures]
        is_some_absent = any("N_acc" in scores.get(task, {}) for scores in results.values())
        protocols = of_kinds | ({} if is_some_absent else _IOU)
        protocols |= {} if is_own(task) else tasks[task].protocols
        cells += [_paper(tasks, task, name, list(results))] if with_paper else []
        cells.append(protocols[name.split()[0]])
        lines.append(f"| {labels[task]} | {name} | {' | '.join(cells)} |")
    return "\n".join([*([note, ""] if note else []), *lines])


def cell(figure: float | None) -> str:
    """A figure in a table, a dash where there is none."""
    return "–" if figure is None else f"{figure:.1f}"


def _paper(tasks: dict[str, ScoredTask], task: str, name: str, columns: list[str]) -> str:
    """The paper's figure; that of the segmentor alone where a column is of stage 1."""
    paper = tasks[task].paper if task in tasks else {}
    figure, alone = paper.get(name), SEGMENTOR_PAPER.get(task, {}).get(name)
    if columns == ["stage 1"]:
        return cell(alone)
    both = [str(figure)] if figure is not None else []
    if "stage 1" in columns and alone is not None:
        both.append(f"stage 1: {alone}")
    return ", ".join(both) or "–"
