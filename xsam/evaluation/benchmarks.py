"""What the benchmarks are and what predictions for them are worth (paper section 4 and appendix).

Between `predictions.py`, which reads what a model said, and `evaluate.py`, the command. A record of
each sample is measured by some rank (`metrics.py`); records are put in the dataset's order before
they are summed, so any number of processes gives the same figures to the last digit.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xsam import distributed
from xsam.datasets.base import Dataset
from xsam.datasets.formats import encode_mask
from xsam.datasets.sources import PROMPT_TYPES
from xsam.evaluation import metrics
from xsam.evaluation.prediction_files import SavedPredictions

Figures = dict[str, float | None]  # by metric; None where there is nothing that it counts


@dataclass(frozen=True)
class Task:
    """A benchmark: its sets, each with a suffix for the names of its figures, how a figure is
    counted, and what the paper reports for it."""

    datasets: tuple[tuple[str, str], ...]
    protocols: dict[str, str]
    paper: dict[str, float]


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


_MIOU = {"mIoU": "mean IoU of one confusion matrix; 255 and classes without truth not counted"}


_CIOU = "sum of intersections / sum of unions, one mask an expression"


_GIOU = "mean IoU, one mask an expression, empty union = 1"


_SHOWN = {f" {kind}": f"coco_vgd_val_{kind}" for kind in PROMPT_TYPES}


_SHOWN |= {f" {kind} cross": f"coco_vgd_val_{kind}_cross" for kind in PROMPT_TYPES}


TASKS = {
    "panoptic": Task((("", "coco_panoptic_val"),), _PQ, {"PQ": 54.7}),
    "instance": Task((("", "coco_instance_val"),), _AP, {"AP": 47.0}),
    "semantic": Task((("", "coco_semantic_val"),), _MIOU, {"mIoU": 66.5}),
    "openvocab": Task(
        tuple(("", f"ade20k_{kind}_val") for kind in ("panoptic", "instance", "semantic")),
        _PQ | _AP | _MIOU,
        {"PQ": 20.9, "AP": 16.2, "mIoU": 28.8},
    ),
    "refer": Task(
        (
            ("", "refcoco_val"),
            (" testA", "refcoco_testA"),
            (" testB", "refcoco_testB"),
            (" + val", "refcoco+_val"),
            (" + testA", "refcoco+_testA"),
            (" + testB", "refcoco+_testB"),
            (" g val", "refcocog_val"),
            (" g test", "refcocog_test"),
        ),
        {"cIoU": _CIOU, "gIoU": _GIOU},
        {
            "cIoU": 85.1,
            "cIoU testA": 87.1,
            "cIoU testB": 83.4,
            "cIoU + val": 78.0,
            "cIoU + testA": 81.0,
            "cIoU + testB": 74.4,
            "cIoU g val": 83.8,
            "cIoU g test": 83.9,
        },
    ),
    "grefer": Task(
        (("", "grefcoco_val"), (" testA", "grefcoco_testA"), (" testB", "grefcoco_testB")),
        {
            "cIoU": f"{_CIOU}; those without a target counted (GRES)",
            "gIoU": "mean IoU; without a target 1 if no mask is given, else 0 (GRES)",
            "N_acc": "share of the expressions without a target that get no mask",
            "T_acc": "share of the expressions with a target that get a mask",
            "cIoU_targets": f"{_CIOU}; expressions with a target alone, as the paper has it",
            "gIoU_targets": "mean IoU; expressions with a target alone, as the paper has it",
        },
        {
            "cIoU_targets": 36.9,
            "gIoU_targets": 44.8,
            "cIoU_targets testA": 32.3,
            "gIoU_targets testA": 34.5,
            "cIoU_targets testB": 36.4,
            "gIoU_targets testB": 38.9,
        },
    ),
    "reason": Task(
        (("", "reasonseg_val"), (" test", "reasonseg_test")),
        {"gIoU": f"{_GIOU}; ignored pixels in neither", "cIoU": f"{_CIOU}; ignored in neither"},
        {
            "gIoU": 56.6,
            "cIoU": 32.9,
            "gIoU test short": 47.7,
            "cIoU test short": 48.1,
            "gIoU test long": 56.0,
            "cIoU test long": 40.8,
            "gIoU test": 57.8,
            "cIoU test": 41.0,
        },
    ),
    "gcg": Task(
        (("", "gcg_val"), (" test", "gcg_test")),
        {
            "METEOR": "captions, over all true images (pycocoevalcap)",
            "CIDEr": "captions, over all true images (pycocoevalcap)",
            "AP50": "mask AP at IoU 0.50, one class, all true images, masks scored by the model",
            "mIoU": "mean IoU of pairs, greedily one to one, then mean over all true images",
            "recall": "share of true masks paired at IoU 0.5 with a phrase that is alike (cosine "
            "of mean BERT states at 0.5)",
            "recall_exact": "share of true masks paired at IoU 0.5 with a phrase that is equal but "
            "for case (recall itself needs --bert)",
        },
        {
            "METEOR": 15.4,
            "CIDEr": 46.3,
            "AP50": 33.2,
            "mIoU": 69.4,
            "METEOR test": 15.1,
            "CIDEr test": 42.7,
            "AP50 test": 32.9,
            "mIoU test": 69.0,
        },
    ),
    "interactive": Task(
        tuple((f" {kind}", f"coco_interactive_val_{kind}") for kind in PROMPT_TYPES),
        {
            "mIoU": "mean IoU of the objects that have the prompt, crowd regions with them",
            "cIoU": "sum of intersections / sum of unions of the same",
        },
        {
            "mIoU point": 65.4,
            "cIoU point": 62.9,
            "mIoU scribble": 66.9,
            "cIoU scribble": 75.7,
            "mIoU box": 69.6,
            "cIoU box": 75.4,
            "mIoU mask": 69.7,
            "cIoU mask": 77.0,
        },
    ),
    "vgd": Task(
        tuple(_SHOWN.items()),
        {
            "AP": "mask AP of the classes shown, IoU 0.50 to 0.95 (pycocotools); cross: shown in "
            "another image",
            "AP50": "the same at IoU 0.50",
        },
        {
            "AP point": 47.9,
            "AP50 point": 72.5,
            "AP scribble": 48.7,
            "AP50 scribble": 73.4,
            "AP box": 49.5,
            "AP50 box": 74.7,
            "AP mask": 49.7,
            "AP50 mask": 74.9,
        },
    ),
    "chat": Task(
        tuple((f" {name}", name.lower()) for name in ("MME", "MMBench", "SEED", "POPE", "AI2D")),
        {
            "perception": "sum over categories of accuracy and accuracy+ (both of an image), yes "
            "or no read from the answer",
            "cognition": "the same over the other categories",
            "accuracy": "share of questions whose option, or yes or no, is read from the answer by "
            "exact matching; MMBench: right in every rotation of the options",
            "F1": "of yes, read from the answer by exact matching",
        },
        {
            "perception MME": 1374,
            "cognition MME": 312,
            "accuracy MMBench": 69.3,
            "accuracy SEED": 69.3,
            "F1 POPE": 89.3,
            "accuracy AI2D": 62.6,
        },
    ),
}


# The segmentor alone (paper table 17).
SEGMENTOR_TASKS = ("panoptic", "instance", "semantic")


SEGMENTOR_PAPER = {
    "panoptic": {"PQ": 54.2, "PQ_things": 60.0, "PQ_stuff": 45.4},
    "instance": {"AP": 44.2},
    "semantic": {"mIoU": 63.8},
}


def task_of(name: str) -> tuple[str, str]:
    """The task that scores a set, and the suffix of its figures. Raises ValueError where none
    does."""
    for task, each in TASKS.items():
        for suffix, dataset in each.datasets:
            if dataset == name:
                return task, suffix
    raise ValueError(f"{name}: no task scores this set")


# ---- one record ----------------------------------------------------------------------------------


def _panoptic(said: SavedPredictions, index: int) -> list[tuple[str, int, float]]:
    _, owner, segments = said.dataset.read(index)
    truth = {place: (each["class"], each["iscrowd"]) for place, each in enumerate(segments, 1)}
    return metrics.match_segments(owner, truth, *said.segments(said.keys[index], owner.shape))


def _instances(said: SavedPredictions, index: int) -> dict:
    dataset, key = said.dataset, said.keys[index]
    if dataset.source.format == "instance":
        picture, annotations = dataset.read(index)
        size = picture.height, picture.width
        truth = [(place, encode_mask(mask), is_crowd) for place, mask, is_crowd in annotations]
    else:
        sample = dataset.question(index)
        size = sample.image.height, sample.image.width
        places = [said.categories[number] for number in sample.category_ids]
        pairs = zip(sample.labels, sample.masks, strict=True)
        truth = [(places[label], encode_mask(mask), False) for label, mask in pairs]
    found = said.instances(key, size)
    return metrics.match_instances(key, len(said.categories), truth, found)


def _semantic(said: SavedPredictions, index: int) -> np.ndarray:
    _, truth = said.dataset.read(index)
    guess = said.class_map(said.keys[index], truth.shape)
    return metrics.count_pixels(truth, guess, len(said.categories))


def _mask(said: SavedPredictions, index: int) -> tuple[int, int, bool, bool]:
    sample = said.dataset.question(index)
    guess = said.mask(said.keys[index], (sample.image.height, sample.image.width))
    return metrics.mask_overlap(sample.masks.any(axis=0), guess, sample.ignore)


def _grounded(said: SavedPredictions, index: int, embed: Callable | None) -> tuple:
    """Its masks matched as instances of one class, and paired with their phrases."""
    key, sample = said.keys[index], said.dataset.question(index)
    found = said.instances(key, (sample.image.height, sample.image.width))
    truth = [encode_mask(mask) for mask in sample.masks]
    matches = metrics.match_instances(key, 1, [(0, rle, False) for rle in truth], found)
    similarity, phrases = None, said.dataset.phrases(index)
    if phrases:
        similarity = metrics.phrase_similarity(phrases, said.phrases(key), embed)
    pairs = metrics.ground_masks(truth, [rle for _, rle, _ in found], similarity)
    return matches, pairs


def _answer(said: SavedPredictions, index: int) -> Any:
    row, answer = said.dataset.records[index], said.answer(said.keys[index])
    options = said.dataset.options(row)
    truth = row["answer"].strip()
    if options:
        is_right = metrics.read_choice(answer, options) == truth
        return row["index"], is_right
    said_yes, is_yes_no = metrics.read_yes_no(answer), truth.lower() in ("yes", "no")
    is_right = said_yes == truth.capitalize() if is_yes_no else metrics.exact_match(answer, truth)
    if said.dataset.name == "mme":  # its questions come in pairs about an image
        image = row.get("image_path") or hashlib.sha256(row["image"].encode()).hexdigest()
        return row.get("category", ""), image, is_right
    if said.dataset.name == "pope":  # a question counts once for each sampling that it is in
        return [(truth.capitalize(), said_yes)] * len(row.get("category", "").split(","))
    return row["index"], is_right


# ---- a set ---------------------------------------------------------------------------------------


def score_dataset(
    said: SavedPredictions, embed: Callable | None = None, label: str = ""
) -> Figures:
    """The figures of a set; all ranks take part and all get them. `embed` gives embeddings of
    phrases, where there are any (`bert_embedder`)."""
    measure = {
        "panoptic": _panoptic,
        "instances": _instances,
        "semantic": _semantic,
        "mask": _mask,
        "answer": _answer,
        "grounded": lambda said, index: _grounded(said, index, embed),
    }[said.kind]
    rank, mine = distributed.rank(), range(len(said.keys))
    mine = mine[rank :: distributed.world_size()]
    bar = tqdm(mine, f"score {label or said.dataset.name}", disable=rank != 0, unit="image")
    records = []
    for index in bar:
        record = measure(said, index)
        if said.kind == "semantic" and records:  # whole numbers can be added in any order
            records[0][1][...] += record
        else:
            records.append((index, record))
    ordered = [record for _, record in sorted(distributed.gather(records), key=lambda r: r[0])]
    return _summarise(said, ordered, embed is not None)


def _summarise(said: SavedPredictions, records: list, is_by_meaning: bool) -> Figures:
    dataset, num_categories = said.dataset, len(said.categories)
    if said.kind == "panoptic":
        return metrics.panoptic_quality(records, dataset.is_thing)
    if said.kind == "instances":
        return metrics.average_precision(records, num_categories)
    if said.kind == "semantic":
        return metrics.mean_iou(sum(records))
    if said.kind == "grounded":
        figures = _caption_quality(said)
        matches, pairs = map(list, zip(*records, strict=True))
        figures["AP50"] = metrics.average_precision(matches, 1)["AP50"]
        quality = metrics.grounding_quality(pairs)
        name = "recall" if is_by_meaning else "recall_exact"
        return figures | {"mIoU": quality["mIoU"], name: quality["recall"]}
    if said.kind == "answer":
        return _answer_quality(dataset, records)
    if dataset.name.startswith("grefcoco"):
        return metrics.target_quality(records)
    figures = metrics.mask_quality(records)
    if dataset.source.task == "interactive":
        return {"mIoU": figures["gIoU"], "cIoU": figures["cIoU"]}
    if dataset.name == "reasonseg_test":
        for name, is_long in (("short", False), ("long", True)):
            chosen = [
                record for place, record in enumerate(records)
                if dataset.is_sentence(place) is is_long
            ]  # fmt: skip
            part = metrics.mask_quality(chosen) if chosen else {"gIoU": None, "cIoU": None}
            figures |= {f"{metric} {name}": figure for metric, figure in part.items()}
    return figures


def _answer_quality(dataset: Dataset, records: list) -> Figures:
    if dataset.name == "mme":
        return metrics.mme_score(records)
    if dataset.name == "pope":
        return metrics.yes_no_quality([each for record in records for each in record])
    if dataset.name == "mmbench":  # rotations of a question share their index modulo a million
        if odd := [number for number, _ in records if not number.strip().isdecimal()]:
            raise ValueError(f"{dataset.annotations}: index {odd[0]!r} is no number")
        records = [(int(number) % 1_000_000, is_right) for number, is_right in records]
    return metrics.choice_accuracy(records)


def _caption_quality(said: SavedPredictions) -> Figures:
    """METEOR and CIDEr; None each where what they need is not installed, which is said."""
    figures: list[Figures] = []
    if distributed.rank() == 0:
        truth = {key: said.dataset.captions(index) for index, key in enumerate(said.keys)}
        try:
            figures.append(metrics.caption_quality(truth, said.captions))
        except ImportError as error:
            tqdm.write(f"{said.dataset.name}: no METEOR and CIDEr: {error}", file=sys.stderr)
            figures.append({"METEOR": None, "CIDEr": None})
    return distributed.gather(figures)[0]


def bert_embedder(folder: Path) -> Callable[[list[str]], np.ndarray]:
    """Embeddings [n, C] of phrases: the mean of BERT's last states over a phrase's tokens, as
    GLaMM's evaluation has them. Raises ValueError where there is no model in the folder."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
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


# ---- what is printed -----------------------------------------------------------------------------


def named(figures: Figures, suffix: str) -> Figures:
    """The figures of a set by the names that they have among those of its task: "gIoU short" of the
    set " test" is "gIoU test short"."""
    result = {}
    for name, figure in figures.items():
        metric, _, part = name.partition(" ")
        result[f"{metric}{suffix}{' ' * bool(part)}{part}"] = figure
    return result


def table(results: dict[str, dict[str, Figures]], note: str = "") -> str:
    """Markdown table of {column: {task: {figure's name: figure}}}: each figure beside the paper's
    and how it is counted. `note` stands above it."""
    rows = {
        (task, name): None
        for scores in results.values()
        for task in scores
        for name in scores[task]
    }
    lines = ["| task | metric | " + " | ".join(results) + " | paper | protocol |"]
    lines.append("|" + "---|" * (len(results) + 4))
    for task, name in rows:
        figures = [scores.get(task, {}).get(name) for scores in results.values()]
        cells = [_cell(figure) for figure in figures]
        cells += [_paper(task, name, list(results)), TASKS[task].protocols[name.split()[0]]]
        lines.append(f"| {task} | {name} | {' | '.join(cells)} |")
    return "\n".join([*([note, ""] if note else []), *lines])


def _cell(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.1f}"


def _paper(task: str, name: str, columns: list[str]) -> str:
    """What the paper reports; of the segmentor alone where a column is of that."""
    whole, alone = TASKS[task].paper.get(name), SEGMENTOR_PAPER.get(task, {}).get(name)
    if "stage 1" not in columns:
        alone = None
    elif columns == ["stage 1"]:
        return _cell(alone)
    both = [str(whole)] if whole is not None else []
    both += [f"stage 1: {alone}"] if alone is not None else []
    return ", ".join(both) or "–"
