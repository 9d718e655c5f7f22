"""What predictions are worth: figures counted by hand of sets with a few squares, in the layout of
each benchmark; and what stands in the table.

pytest tests/test_scoring.py
"""

import base64
import csv
import dataclasses
import io
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_predictions import perfect, write_predictions
from transformers import BertConfig, BertModel, BertTokenizer

from xsam.datasets.base import Dataset
from xsam.datasets.formats import encode_mask
from xsam.datasets.registry import open_dataset
from xsam.datasets.sources import PROMPT_TYPES, SEGMENTOR_TASKS, SOURCES, sets_by_task
from xsam.evaluation import metrics
from xsam.evaluation.benchmarks import (
    BENCHMARKS,
    SEGMENTOR_PAPER,
    bert_embedder,
    named,
    score_dataset,
    scored_tasks,
    table,
    task_of,
)
from xsam.evaluation.metrics import phrase_similarity
from xsam.evaluation.prediction_files import SavedPredictions
from xsam.results import SegmentationResult

TASKS = scored_tasks()
SIZE = HEIGHT, WIDTH = 20, 30
# A square of 10 x 10 moved by 2 columns: 8 of the 12 columns that either covers are in both.
MOVED = 80 / 120
AP_MOVED = 100 * 4 / 10  # of the thresholds .50 to .95, those up to .65
CAPTION = "A ring beside a star."


def square(top: int, left: int, height: int = 10, width: int = 10) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top : top + height, left : left + width] = True
    return mask


RING, STAR = square(5, 5), square(5, 17)


def moved(mask: np.ndarray) -> np.ndarray:
    return np.roll(mask, 2, axis=1)


# ---- tiny sets in the public layouts -------------------------------------------------------------


def put(path: Path, content) -> None:
    """Arrays as images, text as it is, all else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content.astype(np.uint8)).save(path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def image(number: int | str, prefix: str = "") -> dict:
    name = f"{prefix}{number:012d}.jpg" if isinstance(number, int) else f"{number}.jpg"
    return {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH}


def annotation(number: int, mask: np.ndarray, category: int = 1, image_id=1, **more) -> dict:
    record = {"id": number, "image_id": image_id, "category_id": category, "iscrowd": 0}
    return record | {"segmentation": encode_mask(mask)} | more


PNG = "000000000001.png"
CATEGORIES = [
    {"id": 7, "name": "floor", "isthing": 0},
    {"id": 3, "name": "ring", "isthing": 1},
    {"id": 5, "name": "star", "isthing": 1},
]


def write_panoptic(
    root: Path, ids: np.ndarray, classes: dict[int, int], crowds: tuple = ()
) -> None:
    """One image of segments and their category ids."""
    source = SOURCES["coco_panoptic_val"]
    segments = [
        {"id": n, "category_id": category, "iscrowd": int(n in crowds)}
        for n, category in classes.items()
    ]
    content = {"images": [image(1)], "categories": CATEGORIES}
    content["annotations"] = [{"image_id": 1, "file_name": PNG, "segments_info": segments}]
    put(root / source.annotations, content)
    put(root / source.masks / PNG, np.stack([ids, ids * 0, ids * 0], axis=-1))
    put(root / source.images / "000000000001.jpg", np.zeros((*SIZE, 3)))


def write_instances(root: Path, *annotations: dict) -> None:
    source = SOURCES["coco_instance_val"]
    content = {"images": [image(1)], "annotations": annotations, "categories": CATEGORIES}
    put(root / source.annotations, content)
    put(root / source.images / "000000000001.jpg", np.zeros((*SIZE, 3)))


def write_semantic(root: Path, classes: np.ndarray) -> None:
    write_panoptic(root, classes * 0, {})
    put(root / SOURCES["coco_semantic_val"].masks / "000000000001.png", classes)


def write_refs(root: Path, name: str, refs: list[tuple[str, list[int]]], masks: dict) -> None:
    """Expressions about one image, each with the annotations that it means."""
    source = SOURCES[name]
    content = {"images": [image(1)], "categories": []}
    content["annotations"] = [annotation(number, mask) for number, mask in masks.items()]
    records = [
        {"ref_id": place, "image_id": 1, "split": source.split, "ann_id": numbers or [-1]}
        | {"sentences": [{"sent": text}]}
        for place, (text, numbers) in enumerate(refs)
    ]
    put(root / source.instances, content)
    if source.annotations.endswith(".json"):
        put(root / source.annotations, records)
    else:
        (root / source.annotations).write_bytes(pickle.dumps(records))
    put(root / source.images / "000000000001.jpg", np.zeros((*SIZE, 3)))


def corners(mask: np.ndarray) -> list[list[int]]:
    """Of a box, its outermost pixels."""
    rows, columns = np.flatnonzero(mask.any(1)).tolist(), np.flatnonzero(mask.any(0)).tolist()
    (top, *_, bottom), (left, *_, right) = rows, columns
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def write_reason(root: Path, name: str, records: dict[str, tuple]) -> None:
    """{stem: (is a sentence, [(label, box)])}."""
    folder = root / SOURCES[name].annotations
    for stem, (is_sentence, shapes) in records.items():
        content = {"text": [f"What is in {stem}?"], "is_sentence": is_sentence}
        content["shapes"] = [{"label": label, "points": corners(box)} for label, box in shapes]
        put(folder / f"{stem}.json", content)
        put(folder / f"{stem}.jpg", np.zeros((*SIZE, 3)))


def write_gcg(root: Path, masks: list[np.ndarray], phrases: list[str]) -> None:
    source, images = SOURCES["gcg_val"], [image("sa_1")]
    content = [annotation(number, mask, 1, "sa_1") for number, mask in enumerate(masks)]
    put(root / source.annotations, {"images": images, "annotations": content})
    content = [{"image_id": "sa_1", "caption": CAPTION, "labels": phrases}]
    put(root / source.instances, {"images": images, "annotations": content})
    put(root / source.images / "sa_1.jpg", np.zeros((*SIZE, 3)))


def write_prompted(root: Path, name: str, images: dict[int, list[dict]]) -> None:
    """{image: annotations}, each marked by its own mask in every way."""
    source, records = SOURCES[name], []
    is_interactive = source.task == "interactive"
    for number, annotations in images.items():
        for each in annotations:
            suffix = "_visual_prompt_mask" if is_interactive else "_visual_prompt"
            prompts = {f"{kind}{suffix}": each["segmentation"] for kind in PROMPT_TYPES}
            each |= prompts if is_interactive else {"visual_prompts": prompts}
        key, list_name = ("image", "anns") if is_interactive else ("image_file", "annotations")
        records.append({key: image(number)["file_name"], "image_info": image(number)})
        records[-1][list_name] = annotations
        put(root / source.images / image(number)["file_name"], np.zeros((*SIZE, 3)))
    put(root / source.annotations, records)
    if source.instances:
        put(root / source.instances, {"images": [], "annotations": [], "categories": CATEGORIES})


def picture(shade: int) -> str:
    """As a table has it."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), (shade, 0, 0)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_table(root: Path, name: str, rows: list[dict]) -> None:
    lines = io.StringIO()
    columns = list(dict.fromkeys(itertools.chain(["index", "image", "question"], *rows)))
    writer = csv.DictWriter(lines, columns, "", delimiter="\t", lineterminator="\n")
    writer.writeheader()
    for number, row in enumerate(rows):
        writer.writerow({"index": number, "image": picture(0), "question": "What?"} | row)
    put(root / SOURCES[name].annotations, lines.getvalue())


# ---- figures by hand -----------------------------------------------------------------------------


@pytest.fixture
def score(tmp_path):
    """Figures of a set of `tmp_path` for the masks, the names, scores or answers that are said."""

    number = itertools.count()

    def figures(name: str, *said: dict, embed=None) -> dict:
        def say(dataset: Dataset, index: int) -> SegmentationResult:
            told = dataclasses.replace(perfect(dataset, index), **said[index])
            places = said[index].get("categories", list(range(len(told.masks))))
            scores = said[index].get("scores", [1.0] * len(told.masks))
            return dataclasses.replace(told, categories=places, scores=scores)

        dataset = open_dataset(name, tmp_path, all_classes=True)
        assert len(said) == len(dataset)
        folder = tmp_path / f"said{next(number)}"
        write_predictions(folder, dataset, say)
        return score_dataset(SavedPredictions(folder, dataset), embed)

    return figures


def masks(*each: np.ndarray) -> np.ndarray:
    return np.array(each, bool).reshape(-1, *SIZE)


def test_panoptic_quality_of_a_moved_square(tmp_path, score):
    write_panoptic(tmp_path, np.where(RING, 1, 2), {1: 3, 2: 7})
    said = {"masks": masks(moved(RING), ~moved(RING)), "categories": [0, 2]}
    floor = 480 / 520  # of 500 pixels 20 are lost and 20 of the square's won
    figures = score("coco_panoptic_val", said)
    assert figures == pytest.approx(
        {
            "PQ": 100 * (MOVED + floor) / 2,  # the star, which is nowhere, does not count
            "PQ_things": 100 * MOVED,
            "PQ_stuff": 100 * floor,
            "SQ": 100 * (MOVED + floor) / 2,
            "RQ": 100,
        }
    )


def test_void_and_crowds_are_no_mistakes_of_a_panoptic_prediction(tmp_path, score):
    """The square moves over void: its 20 pixels there are in no union. What is said of the crowd
    excuses itself, and the floor is of a class that is nowhere."""
    write_panoptic(tmp_path, RING * 1 + STAR * 2, {1: 3, 2: 5}, crowds=(2,))
    inside = square(5, 19, 4, 4)
    said = {"masks": masks(moved(RING), inside, square(0, 0, 1, 30)), "categories": [0, 1, 2]}
    figures = score("coco_panoptic_val", said)
    assert figures == pytest.approx(
        {"PQ": 80.0, "PQ_things": 80.0, "PQ_stuff": None, "SQ": 80.0, "RQ": 100}
    )


def test_a_segment_of_the_wrong_class_is_missed_and_invented(tmp_path, score):
    write_panoptic(tmp_path, np.where(RING, 1, 2), {1: 3, 2: 7})
    figures = score("coco_panoptic_val", {"masks": masks(RING, ~RING), "categories": [1, 2]})
    # Ring: one missed. Star: one invented. Floor: found.
    assert (figures["PQ"], figures["PQ_things"]) == pytest.approx((100 / 3, 0))


def test_average_precision_of_a_moved_square(tmp_path, score):
    write_instances(tmp_path, annotation(1, RING, 3))
    said = {"masks": masks(moved(RING)), "categories": [0]}
    assert score("coco_instance_val", said) == pytest.approx({"AP": AP_MOVED, "AP50": 100})


def test_average_precision_counts_what_comes_before_a_hit(tmp_path, score):
    """Two classes: one found after a better scored mistake, one missed; a crowd is ignored."""
    crowd = annotation(3, square(0, 0, 4, 30), 5) | {"iscrowd": 1}
    write_instances(tmp_path, annotation(1, RING, 3), annotation(2, STAR, 5), crowd)
    said = {"masks": masks(square(16, 0, 3, 3), RING, square(0, 0, 4, 9))}
    said |= {"categories": [0, 0, 1], "scores": [0.9, 0.8, 0.9]}
    assert score("coco_instance_val", said) == pytest.approx({"AP": 25.0, "AP50": 25.0})


def test_mean_iou_of_a_moved_square(tmp_path, score):
    """Of 600 pixels: 100 ring, 30 unlabelled along the top, the rest floor."""
    truth = np.where(RING, 0, 2)
    truth[0] = 255
    write_semantic(tmp_path, truth)
    said = {"masks": masks(moved(RING), ~moved(RING)), "categories": [0, 2]}
    expected = 100 * (MOVED + (470 - 20) / (470 + 20)) / 2
    assert score("coco_semantic_val", said) == pytest.approx({"mIoU": expected})
    # What has no class at all is wrong, but in no other class's way.
    figures = score("coco_semantic_val", {"masks": masks(moved(RING)), "categories": [0]})
    assert figures == pytest.approx({"mIoU": 100 * MOVED / 2})


@pytest.mark.parametrize("name", ["refcoco_val", "refcoco+_testA", "refcocog_test"])
def test_iou_of_expressions(tmp_path, score, name):
    small = square(0, 0, 4, 5)
    write_refs(tmp_path, name, [("the ring", [1]), ("the thing", [2])], {1: RING, 2: small})
    figures = score(name, {"masks": masks(moved(RING))}, {"masks": masks(small)})
    assert figures == pytest.approx({"cIoU": 100 * 100 / 140, "gIoU": 100 * (MOVED + 1) / 2})


def test_iou_of_expressions_with_and_without_a_target(tmp_path, score):
    refs = [("the ring", [1]), ("both", [1, 2]), ("a cup", []), ("a cat", [])]
    write_refs(tmp_path, "grefcoco_val", refs, {1: RING, 2: STAR})
    nothing, invented = {"masks": masks()}, {"masks": masks(square(0, 0))}
    both = {"masks": masks(RING, moved(STAR))}  # together 100 + 80 of 200 + 20
    figures = score("grefcoco_val", {"masks": masks(moved(RING))}, both, nothing, invented)
    assert figures == pytest.approx(
        {
            "cIoU": 100 * (80 + 180) / (120 + 220 + 100),  # with what was invented
            "gIoU": 100 * (MOVED + 180 / 220 + 1 + 0) / 4,
            "N_acc": 50,
            "T_acc": 100,
            "cIoU_targets": 100 * (80 + 180) / (120 + 220),
            "gIoU_targets": 100 * (MOVED + 180 / 220) / 2,
        }
    )


def test_a_target_of_which_nothing_is_said(tmp_path, score):
    write_refs(tmp_path, "grefcoco_testB", [("the ring", [1]), ("star", [2])], {1: RING, 2: STAR})
    figures = score("grefcoco_testB", {"masks": masks(RING)}, {"masks": masks()})
    expected = dict.fromkeys(("cIoU", "gIoU", "T_acc", "cIoU_targets", "gIoU_targets"), 50)
    assert figures == pytest.approx(expected | {"N_acc": None})


def test_iou_of_short_and_long_questions_where_pixels_are_ignored(tmp_path, score):
    """Of "a" the two last columns of the ring have no label: 8 columns are left, of what is said 8
    as well, and 6 are in both of 10."""
    ignored = square(5, 13, 10, 2)
    records = {"a": (True, [("target", RING), ("ignore", ignored)])}
    records |= {"b": (False, [("target", RING)])}
    write_reason(tmp_path, "reasonseg_test", records)
    said = {"masks": masks(moved(RING))}, {"masks": masks(RING)}
    figures = score("reasonseg_test", *said)
    assert figures == pytest.approx(
        {
            "cIoU": 100 * (60 + 100) / (100 + 100),
            "gIoU": 100 * (0.6 + 1) / 2,
            "cIoU short": 100,
            "gIoU short": 100,
            "cIoU long": 60,
            "gIoU long": 60,
        }
    )
    write_reason(tmp_path, "reasonseg_val", records)
    assert score("reasonseg_val", *said) == {name: figures[name] for name in ("cIoU", "gIoU")}


def test_without_long_questions_they_have_no_figure(tmp_path, score):
    write_reason(tmp_path, "reasonseg_test", {"a": (False, [("target", RING)])})
    figures = score("reasonseg_test", {"masks": masks(moved(RING))})
    assert figures["gIoU short"] == figures["gIoU"] == pytest.approx(100 * MOVED)
    assert figures["gIoU long"] is None and figures["cIoU long"] is None


@pytest.fixture
def captions(monkeypatch) -> list:
    """What is compared; without Java."""
    compared = []
    monkeypatch.setattr(
        metrics, "caption_quality", lambda *pair: compared.append(pair) or {"METEOR": 1, "CIDEr": 2}
    )
    return compared


def test_grounded_masks_and_their_phrases(tmp_path, score, captions):
    """The better mask is looked at first; with the right phrase it is found, and the next, whose
    phrase is wrong, is not."""
    write_gcg(tmp_path, [RING, STAR], ["A ring", "a star"])
    said = {"masks": masks(STAR, moved(RING)), "labels": ["A STAR ", "a cup"]}
    figures = score("gcg_val", said | {"answer": "<p>A STAR</p> <SEG> on it"})
    expected = {"METEOR": 1, "CIDEr": 2, "AP50": 100, "mIoU": 100 * (1 + MOVED) / 2}
    expected["recall_exact"] = 50
    assert figures == pytest.approx(expected)
    assert captions == [({"sa_1": [CAPTION]}, {"sa_1": "A STAR on it"})]


def test_a_wrong_phrase_on_the_better_mask_hides_the_other(tmp_path, score, captions):
    write_gcg(tmp_path, [RING, STAR], ["A ring", "a star"])
    said = {"masks": masks(STAR, moved(RING)), "labels": ["a cup", "a ring"]}
    assert score("gcg_val", said)["recall_exact"] == 0
    alike = lambda phrases: np.ones((len(phrases), 2))  # noqa: E731
    assert score("gcg_val", said, embed=alike)["recall"] == 100


def test_phrases_of_no_mask_in_particular_are_not_looked_for(tmp_path, score, captions):
    write_gcg(tmp_path, [RING, STAR], ["a ring"])
    figures = score("gcg_val", {"masks": masks(moved(RING)), "labels": ["a ring"]})
    # One of two is found: precision 1 up to recall 50 of 101 points, 0 to 100 in steps of 1.
    expected = {"AP50": 100 * 51 / 101, "mIoU": 100 * MOVED, "recall_exact": None}
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_one_mask_of_no_phrase_is_not_taken_for_a_phrase(tmp_path, score, captions):
    write_gcg(tmp_path, [RING], ["a ring", "a star"])
    figures = score("gcg_val", {"masks": masks(RING), "labels": ["object"]})
    assert figures["mIoU"] == 100 and figures["recall_exact"] is None


def test_without_what_captions_need_the_rest_is_scored(tmp_path, score, monkeypatch, capsys):
    def refuse(*_) -> None:
        raise ImportError("captions are scored by Java programs")

    monkeypatch.setattr(metrics, "caption_quality", refuse)
    write_gcg(tmp_path, [RING], ["a ring"])
    figures = score("gcg_val", {"masks": masks(RING), "labels": ["a ring"]})
    expected = {"METEOR": None, "CIDEr": None, "AP50": 100, "mIoU": 100, "recall_exact": 100}
    assert figures == pytest.approx(expected)
    assert "gcg_val: no METEOR and CIDEr: captions are scored by Java" in capsys.readouterr().err


@pytest.mark.parametrize("kind", PROMPT_TYPES)
def test_iou_of_the_objects_that_prompts_mark(tmp_path, score, kind):
    objects = [annotation(11, RING), annotation(12, STAR)]
    small = annotation(21, square(0, 0, 4, 5), image_id=2) | {"iscrowd": 1}
    write_prompted(tmp_path, f"coco_interactive_val_{kind}", {1: objects, 2: [small]})
    said = masks(moved(RING)), masks(STAR), masks()
    figures = score(f"coco_interactive_val_{kind}", *({"masks": each} for each in said))
    expected = {"mIoU": 100 * (MOVED + 1 + 0) / 3, "cIoU": 100 * (80 + 100) / (120 + 100 + 20)}
    assert figures == pytest.approx(expected)


def test_records_that_share_a_key_are_not_scored(tmp_path, score):
    objects = [annotation(11, RING), annotation(11, STAR)]
    write_prompted(tmp_path, "coco_interactive_val_box", {1: objects})
    with pytest.raises(
        ValueError, match=r"coco_interactive_val_psalm\.json: 11 is there more than"
    ):
        score("coco_interactive_val_box", {"masks": masks(RING)}, {"masks": masks(STAR)})


@pytest.mark.parametrize("suffix", ["", "_cross"])
def test_average_precision_of_what_is_shown(tmp_path, score, suffix):
    """Category 5 is moved in one image and right in the other; 7 is right, 3 is not shown."""
    images = {1: [annotation(11, RING, 5), annotation(12, STAR, 7)]}
    images |= {2: [annotation(21, RING, 5, 2), annotation(22, STAR, 7, 2)]}
    name = f"coco_vgd_val_box{suffix}"
    write_prompted(tmp_path, name, images)
    said = {"masks": masks(moved(RING), STAR), "scores": [0.5, 0.9]}
    figures = score(name, said, {"masks": masks(RING, STAR), "scores": [0.9, 0.5]})
    # Beyond IoU .65 one of two rings is found, as the first: precision 1 at 51 of 101 recalls.
    rings = (4 * 1 + 6 * 51 / 101) / 10
    assert figures == pytest.approx({"AP": 100 * (rings + 1) / 2, "AP50": 100})


def yes_no(category: str, *answers: str) -> list[dict]:
    """Rows of a category, two for each image."""
    return [
        {"category": category, "image_path": f"{category}/{place // 2}.jpg", "answer": answer}
        for place, answer in enumerate(answers)
    ]


def test_mme_adds_accuracy_of_questions_and_of_images(tmp_path, score):
    rows = yes_no("OCR", "Yes", "No", "Yes", "No") + yes_no("count", "Yes", "No")
    rows += yes_no("code_reasoning", "Yes", "No")
    write_table(tmp_path, "mme", rows)
    said = ["yes, it is", "No.", "Yes", "Yes", "Perhaps", "no", "YES", "There is no ring"]
    figures = score("mme", *({"answer": each} for each in said))
    ocr, count = 75 + 50, 50 + 0  # 3 of 4 questions, 1 of 2 images; 1 of 2, 0 of 1
    assert figures == pytest.approx({"perception": ocr + count, "cognition": 100 + 100})


def test_mme_knows_images_by_their_pictures_where_they_have_no_path(tmp_path, score):
    pictures = [picture(1), picture(2), picture(1), picture(2)]
    rows = [{"category": "scene", "answer": "Yes", "image": each} for each in pictures]
    write_table(tmp_path, "mme", rows)
    said = ["Yes", "Yes", "No", "Yes"]  # of the first image one question is wrong
    figures = score("mme", *({"answer": each} for each in said))
    assert figures == {"perception": 75 + 50, "cognition": None}


def choices(answer: str, **more) -> dict:
    return {"A": "the left", "B": "the right", "answer": answer} | more


def test_mmbench_counts_a_question_that_is_right_in_every_rotation(tmp_path, score):
    first, second = choices("A", index=4), choices("B", index=5)
    turned = {"A": "the right", "B": "the left"}
    rows = [first, first | turned | {"index": 1_000_004, "answer": "B"}]
    rows += [second, second | turned | {"index": 1_000_005, "answer": "A"}]
    write_table(tmp_path, "mmbench", rows)
    said = ["A", "B", "B. the right", "It is the left"]  # the last is option B, not A
    assert score("mmbench", *({"answer": each} for each in said)) == {"accuracy": 50}


@pytest.mark.parametrize("name", ["seed", "ai2d"])
def test_accuracy_of_choices(tmp_path, score, name):
    write_table(tmp_path, name, [choices("A"), choices("B"), choices("B"), choices("A")])
    said = ["(A)", "At the right.", "A", "A or B"]
    assert score(name, *({"answer": each} for each in said)) == {"accuracy": 50}


def test_pope_counts_yes_in_each_sampling(tmp_path, score):
    kinds = ["random,popular", "random", "popular", "adversarial"]
    rows = zip(kinds, ("Yes", "Yes", "No", "No"), strict=True)
    write_table(tmp_path, "pope", [{"category": kind, "answer": each} for kind, each in rows])
    said = ["Yes, there is.", "No", "yes and no", "no"]
    figures = score("pope", *({"answer": each} for each in said))
    # The first one stands twice: two Yes are right of 3 that are true and 2 that were said.
    assert figures == pytest.approx({"F1": 100 * 2 * 2 / (3 + 2), "accuracy": 100 * 3 / 5})


# ---- tasks and the table -------------------------------------------------------------------------


def test_every_set_is_one_of_a_single_task():
    names = [name for task in TASKS.values() for _, name in task.datasets]
    assert len(set(names)) == len(names) and set(names) <= set(SOURCES)
    for task, each in TASKS.items():
        for suffix, name in each.datasets:
            assert task_of(name) == (task, suffix)
    with pytest.raises(ValueError, match="coco_vgd: no task scores this set"):
        task_of("coco_vgd")
    scored = {task: [name for _, name in each.datasets] for task, each in TASKS.items()}
    assert scored == sets_by_task() and set(names) == set(BENCHMARKS)
    assert tuple(SEGMENTOR_PAPER) == SEGMENTOR_TASKS


def test_figures_are_named_by_their_set():
    figures = {"gIoU": 1.0, "gIoU short": None}
    assert named(figures, "") == figures
    assert named(figures, " test") == {"gIoU test": 1.0, "gIoU test short": None}


def cells_of(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_the_table_has_a_row_for_each_figure_and_a_column_for_each_run():
    results = {
        "untrained": {"panoptic": {"PQ": 0.0, "PQ_stuff": None}},
        "stage 3": {"panoptic": {"PQ": 91.26}, "reason": {"gIoU test short": 70.0}},
    }
    head, rule, *rows = cells_of(table(results))
    assert head == ["task", "metric", "untrained", "stage 3", "paper", "protocol"]
    assert len(rule) == len(head)
    assert [row[:5] for row in rows] == [
        ["panoptic", "PQ", "0.0", "91.3", "54.7"],
        ["panoptic", "PQ_stuff", "–", "–", "–"],
        ["reason", "gIoU test short", "–", "70.0", "47.7"],
    ]
    protocols = TASKS["panoptic"].protocols
    assert [row[5] for row in rows[:2]] == [protocols["PQ"], protocols["PQ_stuff"]]
    assert rows[2][5] == TASKS["reason"].protocols["gIoU"]


def test_a_note_stands_above_the_table():
    results = {"x": {"instance": {"AP": 1.0}}}
    assert table(results, "The first 2.") == f"The first 2.\n\n{table(results)}"


def test_the_segmentor_is_compared_to_the_papers_own():
    figures = {"panoptic": {"PQ": 1.0, "PQ_things": 1.0}, "instance": {"AP": 1.0, "AP50": 1.0}}
    alone = {row[1]: row[3] for row in cells_of(table({"stage 1": figures}))[2:]}
    assert alone == {"PQ": "54.2", "PQ_things": "60.0", "AP": "44.2", "AP50": "–"}
    both = {row[1]: row[4] for row in cells_of(table({"stage 1": figures, "stage 3": figures}))[2:]}
    assert both == {
        "PQ": "54.7, stage 1: 54.2",
        "PQ_things": "stage 1: 60.0",
        "AP": "47.0, stage 1: 44.2",
        "AP50": "–",
    }
    whole = {row[1]: row[3] for row in cells_of(table({"stage 3": figures}))[2:]}
    assert whole == {"PQ": "54.7", "PQ_things": "–", "AP": "47.0", "AP50": "–"}


# ---- phrases -------------------------------------------------------------------------------------


def test_phrases_are_compared_by_a_bert_from_its_folder(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ring", "star", "the"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=len(words), intermediate_size=32, **size)).eval()
    tokenizer.save_pretrained(tmp_path / "bert")
    model.save_pretrained(tmp_path / "bert")

    embed, phrases = bert_embedder(tmp_path / "bert"), ["a red ring", "star", "a red ring the"]
    embeddings = embed(phrases)
    assert embeddings.shape == (3, 16)
    with torch.no_grad():
        states = model(torch.tensor([[2, 5, 6, 7, 3]])).last_hidden_state[0]
    assert np.allclose(embeddings[0], states.mean(0), atol=1e-6)
    assert np.array_equal(embed(phrases[1:2])[0], embeddings[1])  # whatever else is asked
    similarity = phrase_similarity(phrases, phrases, embed)
    assert np.allclose(np.diag(similarity), 1) and similarity[0, 1] < 0.999


def test_a_folder_without_a_bert_is_named(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match=f"{folder}: no BERT in it"):
            bert_embedder(folder)
