"""Every metric against a count stated again from sets of pixels and rows, or against the package
that the field counts with, on a thousand random cases each; and the cases that random ones miss.

pytest tests/test_metrics.py
"""

import contextlib
import importlib.util
import io
import json
import pickle
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from xsam.datasets.formats import encode_mask
from xsam.evaluation import metrics
from xsam.evaluation.metrics import (
    average_precision,
    caption_quality,
    choice_accuracy,
    collect_instances,
    count_pixels,
    exact_match,
    ground_masks,
    grounding_quality,
    instance_quality,
    mask_overlap,
    mask_quality,
    match_segments,
    mean_iou,
    mme_score,
    panoptic_quality,
    phrase_similarity,
    read_choice,
    read_yes_no,
    segment_quality,
    target_quality,
    yes_no_quality,
)

CASES = range(1000)


def grid(*rows: str) -> np.ndarray:
    """A map of one-digit ids; a dot is void."""
    return np.array([[0 if cell == "." else int(cell) for cell in row] for row in rows])


def mean(values) -> float | None:
    """In percent, by exact fractions until the end."""
    values = [Fraction(value) for value in values]
    return float(100 * sum(values) / len(values)) if values else None


def assert_same(scores: dict, expected: dict) -> None:
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert (scores[name] is None) == (value is None), (name, scores, expected)
        assert value is None or scores[name] == pytest.approx(value, abs=1e-9, rel=0), name
    json.dumps(scores, allow_nan=False)  # a figure is a plain float, or None


def random_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A box, noise, a pixel, all or nothing."""
    mask = np.zeros((height, width), bool)
    kind = rng.integers(8)
    if kind < 5:
        top, left = rng.integers(height), rng.integers(width)
        mask[top : top + rng.integers(1, height + 1), left : left + rng.integers(1, width + 1)] = 1
    elif kind == 5:
        mask = rng.random((height, width)) < 0.5
    elif kind == 6:
        mask[rng.integers(height), rng.integers(width)] = True
    elif rng.random() < 0.5:
        mask[:] = True
    return mask


def pixels(mask: np.ndarray) -> set[tuple[int, int]]:
    height, width = mask.shape
    return {(y, x) for y in range(height) for x in range(width) if mask[y, x]}


def test_it_needs_no_torch():
    """So that a file of predictions can be scored anywhere."""
    code = "import sys, xsam.evaluation.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- panoptic quality ----------------------------------------------------------------------------


def recount(ids, truth, guessed, guesses) -> list[tuple[str, int, float]]:
    """The record of one image by Kirillov et al. 2019, section 4, from sets of pixels."""
    void = pixels(ids == 0)
    records, matched_truth, matched_guesses = [], set(), set()
    for number, (category, is_crowd) in truth.items():
        for other, guessed_category in guesses.items():
            if is_crowd or category != guessed_category:
                continue
            one, two = pixels(ids == number), pixels(guessed == other) - void
            if one | two and 2 * len(one & two) > len(one | two):
                records.append(("tp", category, len(one & two) / len(one | two)))
                matched_truth.add(number)
                matched_guesses.add(other)
    for number, (category, is_crowd) in truth.items():
        if not is_crowd and number not in matched_truth:
            records.append(("fn", category, 0.0))
    for other, category in guesses.items():
        region = pixels(guessed == other)
        excused = set(void)
        for number, kind in truth.items():
            if kind == (category, True):
                excused |= pixels(ids == number)
        if region and other not in matched_guesses and 2 * len(region & excused) <= len(region):
            records.append(("fp", category, 0.0))
    return records


def recounted_quality(records, is_thing) -> dict[str, float | None]:
    per_class = defaultdict(list)
    for kind, category, value in records:
        per_class[category].append((kind, Fraction(value)))
    quality, segmentation, recognition = {}, {}, {}
    for category, found in per_class.items():
        kinds = Counter(kind for kind, _ in found)
        total = sum(value for _, value in found)
        divisor = kinds["tp"] + Fraction(kinds["fp"] + kinds["fn"], 2)
        quality[category] = total / divisor
        segmentation[category] = total / kinds["tp"] if kinds["tp"] else 0
        recognition[category] = kinds["tp"] / divisor
    return {
        "PQ": mean(quality.values()),
        "PQ_things": mean(value for name, value in quality.items() if is_thing[name]),
        "PQ_stuff": mean(value for name, value in quality.items() if not is_thing[name]),
        "SQ": mean(segmentation.values()),
        "RQ": mean(recognition.values()),
    }


IS_THING = [True, True, False]
NOTHING = {"PQ": None, "PQ_things": None, "PQ_stuff": None, "SQ": None, "RQ": None}


def random_maps(seed: int):
    """Rectangles of three classes on void, a quarter of them crowd, and a guess that is them moved,
    relabelled or lost."""
    rng = np.random.default_rng(seed)
    ids, guessed = np.zeros((7, 9), int), np.zeros((7, 9), int)
    truth, guesses = {}, {}
    for number in (rng.permutation(np.arange(1, 9))[: rng.integers(0, 6)] * 2_000_000).tolist():
        top, left = rng.integers(0, 6, 2)
        box = np.s_[top : top + rng.integers(1, 6), left : left + rng.integers(1, 7)]
        ids[box] = number
        truth[number] = (int(rng.integers(3)), bool(rng.random() < 0.25))
    for number, (category, _) in truth.items():
        if rng.random() < 0.8:
            shift = rng.integers(-1, 2, 2) * (rng.random() < 0.6)
            guessed[np.roll(ids == number, shift, (0, 1))] = number + 20
            guesses[number + 20] = category if rng.random() < 0.8 else int(rng.integers(3))
    if rng.random() < 0.5:
        guessed[rng.integers(7) :, rng.integers(9) :] = 40
        guesses[40] = int(rng.integers(3))
    if rng.random() < 0.9:  # else a segment without a pixel stays
        truth = {number: kind for number, kind in truth.items() if (ids == number).any()}
    return ids, truth, guessed, guesses


def test_panoptic_quality_is_a_recount_of_the_pixels():
    records, expected, seen = [], [], Counter()
    for seed in CASES:
        maps = random_maps(seed)
        ours, theirs = match_segments(*maps), recount(*maps)
        assert Counter(ours) == Counter(theirs), seed
        assert_same(panoptic_quality([ours], IS_THING), recounted_quality(theirs, IS_THING))
        records.append(ours)
        expected += theirs
        seen.update(kind for kind, _, _ in theirs)
    assert min(seen[kind] for kind in ("tp", "fn", "fp")) > 300
    assert_same(panoptic_quality(records, IS_THING), recounted_quality(expected, IS_THING))


def test_panoptic_quality_is_that_of_torchmetrics(request):
    """Where the two define the same: no crowd, no void in the guess, stuff of a class one piece."""
    detection = pytest.importorskip("torchmetrics.functional.detection")
    import torch

    usual = torch.get_default_dtype()
    request.addfinalizer(lambda: torch.set_default_dtype(usual))
    torch.set_default_dtype(torch.float64)  # its ratios of counts come in the default type
    is_thing, void, num_empty = [True, True, False, False], 9, 0
    for seed in CASES:
        rng = np.random.default_rng(seed)
        maps, records = [], []  # by image (class, number) of truth and guess, [2, 6, 7, 2]
        for _ in range(1 + seed % 2):
            true, guess = np.zeros((2, 6, 7), int)
            for number in range(1, rng.integers(1, 6)):
                top, left = rng.integers(0, 5, 2)
                true[top : top + rng.integers(1, 5), left : left + rng.integers(1, 6)] = number
            guess = np.roll(true, rng.integers(0, 2, 2), (0, 1))
            top, left = rng.integers(0, 6, 2)
            guess[top:, left:] = rng.integers(6)
            kinds = rng.integers(0, 4, (2, 6))  # the class of each number in truth and guess
            kinds[1] = np.where(rng.random(6) < 0.8, kinds[0], kinds[1])
            classes = np.stack([np.where(true > 0, kinds[0][true], void), kinds[1][guess]])
            numbers = np.where(classes < 2, np.stack([true, guess]), 0)
            maps.append(np.stack([classes, numbers], -1))

            ids, guessed_ids = np.where(classes == void, 0, 1 + classes + 10 * numbers)
            truth = {number: ((number - 1) % 10, False) for number in np.unique(ids).tolist()}
            truth.pop(0, None)
            guesses = {number: (number - 1) % 10 for number in np.unique(guessed_ids).tolist()}
            records.append(match_segments(ids, truth, guessed_ids, guesses))
        true, guess = torch.from_numpy(np.stack(maps, 1))
        theirs = detection.panoptic_quality(guess, true, {0, 1}, {2, 3}, return_sq_and_rq=True)
        ours = panoptic_quality(records, is_thing)
        if ours["PQ"] is None:
            num_empty += 1
            assert theirs.isnan().all()
        else:
            figures = [ours["PQ"], ours["SQ"], ours["RQ"]]
            assert figures == pytest.approx((100 * theirs).tolist(), abs=1e-6), seed
    assert 0 < num_empty < 200


def test_a_perfect_guess_scores_100():
    """Whatever it says of void and of crowds."""
    for seed in range(30):
        ids, truth, *_ = random_maps(seed)
        guesses = {number: category for number, (category, _) in truth.items()}
        truth = {number: kind for number, kind in truth.items() if (ids == number).any()}
        record = match_segments(ids, truth, ids, guesses)
        assert {kind for kind, _, _ in record} <= {"tp"}
        assert len(record) == sum(not is_crowd for _, is_crowd in truth.values())
        assert set(panoptic_quality([record], IS_THING).values()) <= {100.0, None}


def test_a_match_needs_more_than_half():
    ids, truth = grid("1111", "1111"), {1: (0, False)}
    half, more = grid("22..", "22.."), grid("222.", "22..")
    assert match_segments(ids, truth, half, {2: 0}) == [("fn", 0, 0.0), ("fp", 0, 0.0)]
    assert match_segments(ids, truth, more, {2: 0}) == [("tp", 0, 5 / 8)]
    assert match_segments(ids, truth, more, {2: 1}) == [("fn", 0, 0.0), ("fp", 1, 0.0)]
    assert match_segments(grid("1"), truth, grid("2"), {2: 0}) == [("tp", 0, 1.0)]


def test_a_guess_is_excused_where_more_than_half_of_it_is_void():
    ids, truth = grid("1111", "...."), {1: (0, False)}
    half, more = grid(".22.", ".22."), grid("..2.", ".22.")
    assert match_segments(ids, truth, half, {2: 1}) == [("fn", 0, 0.0), ("fp", 1, 0.0)]
    assert match_segments(ids, truth, more, {2: 1}) == [("fn", 0, 0.0)]


def test_a_crowd_is_neither_missed_nor_found():
    ids, truth = grid("1111", "...."), {1: (0, True)}
    assert match_segments(ids, truth, np.zeros_like(ids), {}) == []
    assert match_segments(ids, truth, grid("2222", "...."), {2: 0}) == []
    assert match_segments(ids, truth, grid("2222", "...."), {2: 1}) == [("fp", 1, 0.0)]


def test_every_crowd_of_a_class_excuses():
    """Where panopticapi knows the last one alone."""
    ids, truth = grid("1122", "3333"), {1: (0, True), 2: (0, True), 3: (1, False)}
    guess = grid("4444", "444.")
    assert match_segments(ids, truth, guess, {4: 0}) == [("fn", 1, 0.0)]
    truth[2] = (1, True)  # of another class
    assert match_segments(ids, truth, guess, {4: 0}) == [("fn", 1, 0.0), ("fp", 0, 0.0)]


def test_one_crowd_of_a_class_alone_excuses_by_panopticapis_rule():
    """The last one of the class. A guess on the first is a mistake then: PQ is IoU / (1 + 1/2)."""
    ids, guess = grid("1122", "3333", "3333"), grid("44..", "5555", "55..")
    crowds, guesses = {1: (0, True), 2: (0, True)}, {4: 0, 5: 0}
    truth = crowds | {3: (0, False)}
    found = ("tp", 0, 6 / 8)
    record = match_segments(ids, truth, guess, guesses)
    assert record == [found] and panoptic_quality([record], IS_THING)["PQ"] == 75
    record = match_segments(ids, truth, guess, guesses, one_crowd_per_class=True)
    assert record == [found, ("fp", 0, 0.0)]
    scores = panoptic_quality([record], IS_THING)
    assert_same(scores, {"PQ": 50, "PQ_things": 50, "PQ_stuff": None, "SQ": 75, "RQ": 200 / 3})
    turned = dict(reversed(truth.items()))  # the first is the last
    assert match_segments(ids, turned, guess, guesses, one_crowd_per_class=True) == [found]
    other = truth | {2: (1, True)}  # each is the one of its class
    assert match_segments(ids, other, guess, guesses, one_crowd_per_class=True) == [found]


def test_one_crowd_per_class_is_a_recount_of_the_pixels():
    """To panopticapi the other crowds of a class are of no class that could excuse."""
    num_different = 0
    for seed in CASES:
        ids, truth, guessed, guesses = random_maps(seed)
        last = {category: number for number, (category, is_crowd) in truth.items() if is_crowd}
        alone = {
            number: (category if not is_crowd or last[category] == number else None, is_crowd)
            for number, (category, is_crowd) in truth.items()
        }
        ours = match_segments(ids, truth, guessed, guesses, one_crowd_per_class=True)
        assert Counter(ours) == Counter(recount(ids, alone, guessed, guesses)), seed
        num_different += Counter(ours) != Counter(match_segments(ids, truth, guessed, guesses))
    assert num_different > 5


def test_segments_without_a_pixel():
    """A true one is missed, as in panopticapi; a guess is none."""
    ids, truth = grid("11"), {1: (0, False), 2: (1, False)}
    record = match_segments(ids, truth, grid("55"), {5: 0, 6: 1})
    assert record == [("tp", 0, 1.0), ("fn", 1, 0.0)]


def test_nothing_counts_where_all_is_void():
    ids = np.zeros((2, 4), int)
    assert match_segments(ids, {}, grid("2222", "33.."), {2: 0, 3: 1}) == []
    assert panoptic_quality([[]], IS_THING) == panoptic_quality([], IS_THING) == NOTHING


def test_an_empty_guess_misses_everything():
    ids, truth = grid("1122", "11.."), {1: (0, False), 2: (2, False)}
    record = match_segments(ids, truth, np.zeros_like(ids), {})
    assert Counter(record) == Counter([("fn", 0, 0.0), ("fn", 2, 0.0)])
    assert panoptic_quality([record], IS_THING) == dict.fromkeys(NOTHING, 0.0)


def test_classes_that_do_not_occur_are_not_averaged():
    scores = panoptic_quality([[("tp", 0, 0.8)], [("fp", 0, 0.0), ("fn", 0, 0.0)]], IS_THING)
    assert_same(scores, {"PQ": 40.0, "PQ_things": 40.0, "PQ_stuff": None, "SQ": 80.0, "RQ": 50.0})


# ---- mask AP -------------------------------------------------------------------------------------


def random_instances(seed: int) -> tuple[int, dict]:
    """The number of classes and by image id its true and predicted masks; of some images neither,
    of some classes crowds alone, and scores of which many are equal."""
    rng = np.random.default_rng(seed)
    num_classes, images = int(rng.integers(1, 4)), {}
    for number in rng.choice(1000, rng.integers(1, 5), replace=False).tolist():
        height, width = rng.integers(1, 11, 2).tolist()
        masks = [random_mask(rng, height, width) for _ in range(rng.integers(0, 5))]
        truth = [(int(rng.integers(num_classes)), mask, rng.random() < 0.2) for mask in masks]
        found = []
        for category, mask, _ in truth:
            for _ in range(rng.integers(0, 3)):
                moved = np.roll(mask, rng.integers(0, 2), rng.integers(0, 2))
                moved = moved & (rng.random(moved.shape) < 0.9)
                label = category if rng.random() < 0.8 else int(rng.integers(num_classes))
                found.append((label, moved, float(rng.integers(1, 5) / 4)))
        for _ in range(rng.integers(0, 3)):
            mask = random_mask(rng, height, width)
            found.append((int(rng.integers(num_classes)), mask, float(rng.random())))
        rng.shuffle(found)
        images[f"sa_{number}" if seed % 4 == 0 else number] = (
            [(category, encode_mask(mask), bool(crowd)) for category, mask, crowd in truth],
            [(category, encode_mask(mask), score) for category, mask, score in found],
        )
    return num_classes, images


def coco(images: dict, num_classes: int, annotations: list[dict]) -> COCO:
    result = COCO()
    sizes = {
        image: next((rle["size"] for _, rle, _ in [*truth, *found]), [1, 1])
        for image, (truth, found) in images.items()
    }
    result.dataset = {
        "info": {},
        "images": [{"id": each, "height": h, "width": w} for each, (h, w) in sizes.items()],
        "categories": [{"id": each + 1} for each in range(num_classes)],
        "annotations": annotations,
    }
    result.createIndex()
    return result


def cocos_precision(num_classes: int, images: dict) -> dict[str, float | None]:
    """pycocotools on its own over the whole data set."""
    truths, results = [], []
    for image, (truth, found) in images.items():
        for category, rle, is_crowd in truth:
            item = {"id": len(truths) + 1, "image_id": image, "category_id": category + 1}
            item |= {"segmentation": dict(rle), "iscrowd": int(is_crowd), "area": 7}
            truths.append(item)
        for category, rle, score in found:
            item = {"image_id": image, "category_id": category + 1, "score": score}
            results.append(item | {"segmentation": dict(rle)})
    with contextlib.redirect_stdout(io.StringIO()):
        true = coco(images, num_classes, truths)
        guess = true.loadRes(results) if results else coco(images, num_classes, [])
        evaluation = COCOeval(true, guess, "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = evaluation.stats[:2]
    return {
        name: None if value == -1 else 100 * value
        for name, value in zip(("AP", "AP50"), figures, strict=True)
    }


def test_the_quality_of_one_image_is_its_panoptic_quality():
    assert segment_quality([]) == 1
    record = [("tp", 0, 0.9), ("tp", 3, 0.7), ("fn", 1, 0.0), ("fp", 2, 0.0)]
    assert segment_quality(record) == pytest.approx(1.6 / 3)
    masks = np.zeros((3, 4, 10), bool)
    masks[0, :, :5], masks[1, :, 5:], masks[2, :, :4] = True, True, True
    left, right, part = map(encode_mask, masks)  # the IoU of part and left is 0.8

    def quality(truth: list, predicted: list) -> float:
        return instance_quality(collect_instances(1, 2, truth, predicted), 0.3)

    truth = [(0, left, False), (1, right, False)]
    assert quality([], []) == 1 and quality(truth, []) == 0
    assert quality(truth, [(1, right, 0.9), (0, left, 0.3)]) == 1
    assert quality(truth, [(1, right, 0.9), (0, left, 0.2)]) == pytest.approx(1 / 1.5)
    assert quality(truth, [(1, right, 0.9), (0, part, 0.5)]) == pytest.approx(0.9)
    # Of two on one target the better counts, and the other is false; so is one of another class.
    twice = [(0, part, 0.9), (0, left, 0.4), (1, right, 0.5)]
    assert quality(truth, twice) == pytest.approx(2 / 2.5)
    assert quality(truth, [(1, left, 0.9), (0, right, 0.9)]) == 0
    # What lies on a crowd region of its class is excused.
    crowd = [(0, left, True), (1, right, False)]
    assert quality(crowd, [(1, right, 0.9), (0, part, 0.9)]) == 1
    assert quality(crowd, [(1, right, 0.9), (1, part, 0.9)]) == pytest.approx(1 / 1.5)


def instance_records(num_classes: int, images: dict) -> list[dict]:
    return [collect_instances(image, num_classes, *images[image]) for image in sorted(images)]


def test_average_precision_is_that_of_pycocotools(capsys):
    seen = Counter()
    for seed in CASES:
        num_classes, images = random_instances(seed)
        ours = average_precision(instance_records(num_classes, images), num_classes)
        assert_same(ours, cocos_precision(num_classes, images))
        seen["none" if ours["AP"] is None else "zero" if ours["AP"] == 0 else "some"] += 1
    assert min(seen.values()) > 20 and seen["some"] > 300, seen
    assert capsys.readouterr().out == ""


def test_no_more_than_100_masks_of_a_class_and_image_count():
    truth, other = np.zeros((2, 8, 8), bool)
    truth[:4, :4], other[6:, 6:] = True, True
    right, wrong = (0, encode_mask(truth), 0.1), (0, encode_mask(other), 0.9)
    for num_wrong, is_found in ((99, True), (100, False)):
        images = {1: ([(0, encode_mask(truth), False)], [right] + [wrong] * num_wrong)}
        ours = average_precision(instance_records(1, images), 1)
        assert (ours["AP"] > 0) == is_found
        assert_same(ours, cocos_precision(1, images))


def test_average_precision_without_truth_or_without_a_guess():
    mask = encode_mask(np.ones((2, 3), bool))
    nothing = {"AP": None, "AP50": None}
    assert average_precision([], 2) == nothing
    assert average_precision([collect_instances(1, 2, [], [])], 2) == nothing
    assert average_precision([collect_instances(1, 2, [], [(1, mask, 0.5)])], 2) == nothing
    assert average_precision([collect_instances(1, 2, [(0, mask, True)], [])], 2) == nothing
    missed = collect_instances(1, 2, [(0, mask, False)], [(1, mask, 0.5)])
    assert average_precision([missed], 2) == {"AP": 0.0, "AP50": 0.0}
    found = collect_instances(2, 2, [(1, mask, False)], [(1, mask, 0.5)])
    assert_same(average_precision([found], 2), {"AP": 100.0, "AP50": 100.0})


def test_average_precision_by_hand():
    """One class all right, one with a better scored miss before the hit: (1 + 1/2) / 2. A large
    mask and a small one, which COCO also scores apart."""
    truth = np.zeros((2, 150, 150), bool)
    truth[0, :100, :100], truth[1, 145:, 145:] = True, True
    ring, star, miss = map(encode_mask, (truth[0], truth[1], ~truth[1] & ~truth[0]))
    found = [(0, ring, 0.3), (1, miss, 0.9), (1, star, 0.8)]
    record = collect_instances(1, 2, [(0, ring, False), (1, star, False)], found)
    assert average_precision([record], 2) == pytest.approx({"AP": 75.0, "AP50": 75.0}, abs=1e-6)


# ---- semantic segmentation -----------------------------------------------------------------------


def random_class_maps(seed: int) -> tuple[int, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(1, 6))
    shape = tuple(rng.integers(1, 8, 2))
    truth = rng.choice([*range(num_classes), 255, num_classes], shape).astype(np.uint8)
    if seed % 20 == 0:
        truth[:] = 255
    guess = rng.choice([*range(num_classes), -1, num_classes, 255], shape)
    guess = np.where(rng.random(shape) < 0.5, guess, truth).astype(np.int16)
    return num_classes, truth, guess


def test_mean_iou_is_a_recount_of_the_pixels():
    num_empty = 0
    for seed in CASES:
        num_classes, truth, guess = random_class_maps(seed)
        labelled = [
            (int(true), int(said))
            for true, said in zip(truth.ravel(), guess.ravel(), strict=True)
            if true < num_classes
        ]
        ious = []
        for number in range(num_classes):
            one = {place for place, (true, _) in enumerate(labelled) if true == number}
            two = {place for place, (_, said) in enumerate(labelled) if said == number}
            if one:
                ious.append(Fraction(len(one & two), len(one | two)))
        matrix = count_pixels(truth, guess, num_classes)
        assert matrix.shape == (num_classes, num_classes + 1) and matrix.dtype == np.int64
        assert matrix.sum() == len(labelled)
        assert_same(mean_iou(matrix), {"mIoU": mean(ious)})
        num_empty += not ious
    assert num_empty > 20


def test_mean_iou_by_hand():
    """Class 1 is found but for a pixel without a class, class 0 lost a third to class 2."""
    truth, guess = np.array([[0, 0, 0, 1, 1, 255]]), np.array([[0, 0, 2, 1, 255, 0]])
    matrix = count_pixels(truth, guess, 3)
    assert matrix.tolist() == [[2, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert_same(mean_iou(matrix), {"mIoU": mean([Fraction(2, 3), Fraction(1, 2)])})
    assert_same(mean_iou(matrix + matrix), mean_iou(matrix))
    matrix = count_pixels(np.array([[149, 255]], np.uint8), np.array([[149, 7]], np.uint8), 150)
    assert matrix[149, 149] == matrix.sum() == 1


# ---- one mask per question -----------------------------------------------------------------------


def random_overlaps(seed: int) -> list[tuple]:
    """(truth, guess, ignore) of a few samples."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(rng.integers(0, 5)):
        size = rng.integers(1, 6, 2)
        truth = random_mask(rng, *size) & (rng.random() < 0.7)
        guess = truth if rng.random() < 0.2 else random_mask(rng, *size) & (rng.random() < 0.8)
        samples.append((truth, guess, random_mask(rng, *size) if rng.random() < 0.4 else None))
    return samples


def overlap(sample: tuple) -> tuple[set, set]:
    truth, guess, ignore = sample
    ignored = pixels(ignore) if ignore is not None else set()
    return pixels(truth) - ignored, pixels(guess) - ignored


def test_mask_quality_is_a_recount_of_the_pixels():
    for seed in CASES:
        samples = random_overlaps(seed)
        intersection, union, ious = 0, 0, []
        for one, two in map(overlap, samples):
            intersection += len(one & two)
            union += len(one | two)
            ious.append(Fraction(len(one & two), len(one | two)) if one | two else 1)
        expected = {"cIoU": mean([Fraction(intersection, union)]) if union else None}
        records = [mask_overlap(*sample) for sample in samples]
        assert_same(mask_quality(records), expected | {"gIoU": mean(ious)})


def test_target_quality_is_a_recount_of_the_pixels():
    seen = Counter()
    for seed in CASES:
        areas, ious = {True: [], False: []}, {True: [], False: []}
        told = {True: [], False: []}
        for true, guess in map(overlap, samples := random_overlaps(seed)):
            areas[bool(true)].append((len(true & guess), len(true | guess)))
            told[bool(true)].append(bool(true) == bool(guess))
            if true:
                ious[True].append(Fraction(len(true & guess), len(true | guess)))
            else:
                ious[False].append(0 if guess else 1)
            seen[bool(true), bool(guess)] += 1

        def cumulative(pairs) -> float | None:
            union = sum(pair[1] for pair in pairs)
            return mean([Fraction(sum(pair[0] for pair in pairs), union)]) if union else None

        expected = {
            "cIoU": cumulative(areas[True] + areas[False]),
            "gIoU": mean(ious[True] + ious[False]),
            "N_acc": mean(told[False]),
            "T_acc": mean(told[True]),
            "cIoU_targets": cumulative(areas[True]),
            "gIoU_targets": mean(ious[True]),
        }
        assert_same(target_quality([mask_overlap(*sample) for sample in samples]), expected)
    assert len(seen) == 4 and min(seen.values()) > 100


def test_mask_quality_by_hand():
    scores = mask_quality([(30, 40, True, True), (0, 60, True, False)])
    assert_same(scores, {"cIoU": 30.0, "gIoU": 37.5})
    scores = mask_quality([(0, 0, False, False), (5, 10, True, True)])
    assert_same(scores, {"cIoU": 50.0, "gIoU": 75.0})
    assert mask_quality([]) == {"cIoU": None, "gIoU": None}


def test_phrases_without_a_target_are_told_apart():
    found, missed = (8, 10, True, True), (0, 6, True, False)
    silent, invented = (0, 0, False, False), (0, 4, False, True)
    expected = {"cIoU": 40.0, "gIoU": mean([Fraction(4, 5), 0, 1, 0, 1]), "T_acc": 50.0}
    expected |= {"N_acc": mean([1, 0, 1]), "cIoU_targets": 50.0, "gIoU_targets": 40.0}
    assert_same(target_quality([found, missed, silent, invented, silent]), expected)
    expected = dict.fromkeys(expected) | {"gIoU": 100.0, "N_acc": 100.0}
    assert_same(target_quality([silent]), expected)
    assert_same(target_quality([]), dict.fromkeys(expected))


def test_ignored_pixels_count_nowhere():
    truth, guess, ignore = np.zeros((3, 4, 4), bool)
    truth[:2], guess[1:], ignore[1:3, 0] = True, True, True
    assert mask_overlap(truth, guess, ignore) == (3, 14, True, True)
    assert mask_overlap(truth, guess) == (4, 16, True, True)
    assert mask_overlap(truth, guess, truth) == (0, 8, False, True)
    assert mask_overlap(truth, guess, guess) == (0, 4, True, False)


# ---- grounded captions ---------------------------------------------------------------------------


def random_grounding(seed: int) -> list[tuple]:
    """(true masks, predicted masks, similarity) of a few images."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(rng.integers(0, 4)):
        size = rng.integers(1, 6, 2)
        truth = [random_mask(rng, *size) for _ in range(rng.integers(0, 4))]
        guess = [random_mask(rng, *size) for _ in range(rng.integers(0, 3))]
        guess += [mask & (rng.random(size) < 0.9) for mask in truth if rng.random() < 0.7]
        rng.shuffle(guess)
        similarity = rng.choice(
            [0.4999, 0.5, 0.9, 1.0], (len(truth), len(guess)), p=[0.2, 0.2, 0.3, 0.3]
        )
        truth, guess = (np.array(masks, bool).reshape(-1, *size) for masks in (truth, guess))
        images.append((truth, guess, similarity))
    return images


def encode(masks: np.ndarray) -> list[dict]:
    return [encode_mask(mask) for mask in masks]


def restated_grounding(truth, guess, similarity) -> tuple[Fraction, int]:
    """Mean IoU of the pairs and the number of phrases found, from sets of pixels."""
    ious = {}
    for row, one in enumerate(map(pixels, truth)):
        for column, two in enumerate(map(pixels, guess)):
            ious[row, column] = Fraction(len(one & two), len(one | two)) if one | two else 0

    pairs = []
    for pair in sorted(ious, key=lambda pair: (-ious[pair], pair)):
        if all(pair[0] != other[0] and pair[1] != other[1] for other in pairs):
            pairs.append(pair)
    paired = [ious[pair] for pair in pairs if ious[pair]]
    num_found = 0
    for pair in pairs:
        if ious[pair] < Fraction(1, 2) or similarity[pair] < 0.5:
            break
        num_found += 1
    return sum(paired) / len(paired) if paired else Fraction(0), num_found


def test_grounding_quality_is_a_recount_of_the_pixels():
    num_found = 0
    for seed in CASES:
        images, records = random_grounding(seed), []
        means, founds, totals = [], [], []
        for image, (truth, guess, similarity) in enumerate(images):
            of_pairs, found = restated_grounding(truth, guess, similarity)
            means.append(of_pairs)
            totals.append(len(truth))
            if image or seed % 3:
                founds.append(found)
            is_asked = image or seed % 3
            record = ground_masks(encode(truth), encode(guess), similarity if is_asked else None)
            assert record[0] == pytest.approx(float(of_pairs), abs=1e-12)
            records.append(record)
        has_recall = founds and sum(totals)
        recall = mean([Fraction(sum(founds), sum(totals))]) if has_recall else None
        assert_same(grounding_quality(records), {"mIoU": mean(means), "recall": recall})
        num_found += sum(founds)
    assert num_found > 500


def test_true_masks_are_paired_with_the_best_that_is_left():
    truth, guess = np.zeros((3, 1, 10), bool), np.zeros((3, 1, 10), bool)
    truth[0, 0, :4], truth[1, 0, 4:8], truth[2, 0, 8:] = True, True, True
    guess[0, 0, :5], guess[1, 0, :4] = True, True
    assert ground_masks(encode(truth), encode(guess)) == (pytest.approx((1 + 1 / 8) / 2), None, 3)
    assert ground_masks(encode(truth), encode(guess[:0])) == (0.0, None, 3)
    assert ground_masks(encode(truth[:0]), encode(guess), np.zeros((0, 3))) == (0.0, 0, 0)
    assert grounding_quality([]) == {"mIoU": None, "recall": None}


def test_a_wrong_phrase_on_a_better_mask_ends_the_search():
    """As in the published evaluation of GranD-f."""
    masks = np.zeros((2, 1, 10), bool)
    masks[0, 0, :4], masks[1, 0, 4:] = True, True
    worse = masks.copy()
    worse[1, 0, 9] = False
    assert ground_masks(encode(masks), encode(worse), np.array([[0.4, 0], [0, 1]]))[1:] == (0, 2)
    assert ground_masks(encode(masks), encode(worse), np.array([[1, 0], [0, 0.4]]))[1:] == (1, 2)
    half = masks.copy()
    half[0, 0, 2:4] = False
    assert ground_masks(encode(masks), encode(half), np.full((2, 2), 0.5))[1:] == (2, 2)
    half[0, 0, 1] = False
    assert ground_masks(encode(masks), encode(half), np.full((2, 2), 0.5))[1:] == (1, 2)


def test_phrases_are_like_where_they_are_equal_or_their_embeddings_are():
    similarity = phrase_similarity(["The dog ", "a"], ["the dog", "A cat", " A"])
    assert similarity.tolist() == [[1, 0, 0], [0, 0, 1]]
    directions = {"x": [3, 0], "y": [0, 2], "xy": [1, 1], "": [0, 0]}
    similarity = phrase_similarity(
        ["x", "y"], ["xy", "x", ""], lambda said: np.array([directions[each] for each in said])
    )
    assert similarity == pytest.approx(np.array([[0.5**0.5, 1, 0], [0.5**0.5, 0, 0]]))
    for embed in (None, lambda said: np.ones((len(said), 4))):
        assert phrase_similarity([], ["x"], embed).shape == (0, 1)
        assert phrase_similarity(["x", "y"], [], embed).shape == (2, 0)


needs_java = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="needs pycocoevalcap and Java",
)


@needs_java
def test_captions_are_scored_as_pycocoevalcap_does():
    """Also an empty caption, one of dots alone, and some that hold what ends a line."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor

    truth = {
        1: ["A man, riding\na red\u2028horse.", "The rider of a horse"],
        "sa_2": ["Two dogs\x85 sleep on a bed."],
        3: ["a cat ||| sat on the mat", "..."],
        4: ["The very last one"],
    }
    guess = {1: "a man\r\non a\x0bhorse", "sa_2": "", 3: "A cat sat on a||| mat!", 4: "..."}
    tokens = {
        1: ["a man riding a red horse", "the rider of a horse"],
        "sa_2": ["two dogs sleep on a bed"],
        3: ["a cat sat on the mat", ""],
        4: ["the very last one"],
    }
    said = {1: ["a man on a horse"], "sa_2": [""], 3: ["a cat sat on a mat"], 4: [""]}
    meteor, cider = Meteor().compute_score(tokens, said)[0], Cider().compute_score(tokens, said)[0]
    expected = {"METEOR": 100 * meteor, "CIDEr": 100 * cider}
    with metrics.meteor() as program:  # it is started once
        for _ in range(2):
            assert_same(caption_quality(truth, guess), expected)
        assert program.meteor_p.poll() is None
    del program
    assert not metrics._METEOR
    assert 10 < expected["METEOR"] < 50 and 10 < expected["CIDEr"] < 500


@needs_java
@pytest.mark.slow
def test_captions_like_the_true_ones_score_in_full_and_none_at_all_nothing():
    truth = {1: ["a red cat sat on the mat"], 2: ["the green dog runs away"]}
    guess = {image: captions[0] for image, captions in truth.items()}
    assert_same(caption_quality(truth, guess), {"METEOR": 100.0, "CIDEr": 1000.0})
    assert_same(caption_quality(truth, {1: "", 2: ""}), {"METEOR": 0.0, "CIDEr": 0.0})


def test_what_captions_lack_is_named(monkeypatch):
    monkeypatch.setattr("xsam.evaluation.metrics.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("xsam.evaluation.metrics.shutil.which", lambda name: "java")
    assert caption_quality({}, {}) == {"METEOR": None, "CIDEr": None}
    for truth in ({}, {1: []}, {1: ["a"], 2: ["a"]}):
        with pytest.raises(ValueError, match=r"image \d lacks its true or its predicted caption"):
            caption_quality(truth, {1: "a"})
    monkeypatch.setattr("xsam.evaluation.metrics.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'xsam\[captions\]'"):
        caption_quality({1: ["a"]}, {1: "a"})
    monkeypatch.setattr("xsam.evaluation.metrics.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("xsam.evaluation.metrics.shutil.which", lambda name: None)
    with pytest.raises(ImportError, match="a Java runtime on the PATH"):
        caption_quality({1: ["a"]}, {1: "a"})


# ---- answers -------------------------------------------------------------------------------------

OPTIONS = {"A": "a cat", "B": "Red car", "C": "the sea"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) Red car", "B"),
        ("The answer is:B", "B"),
        ("[C]", "C"),
        ("A", "A"),
        ("A: a cat", "A"),
        ("The right answer is A.", "A"),
        ("A dog sits on a mat", "A"),  # as VLMEvalKit reads it by default
        ("A dog or B", None),
        ("B or C", None),
        ("B or C, but the sea", "C"),
        ("it is the SEA, I think", "C"),
        ("a cat or the sea", None),
        ("b", None),
        ("D", None),
        ("AB", None),
        ("", None),
        ("   ", None),
    ],
)
def test_an_option_is_read_from_an_answer(answer, letter):
    assert read_choice(answer, OPTIONS) == letter


def test_an_option_is_read_by_the_rule():
    words = ["A", "B", "C", "D", "a", "cat", "red", "car", "Red", "sea", "the", "is", "answer"]
    marks, seen = ["", "", "", ".", ",", ":", ")", "!", "*"], Counter()
    for seed in CASES:
        rng = np.random.default_rng(seed)
        options = {"A": "cat", "B": "red car", "C": "the sea", "D": ""}
        options = {letter: options[letter] for letter in "ABCD"[: rng.integers(1, 5)]}
        said = rng.choice(words, rng.integers(0, 6))
        answer = " ".join(word + rng.choice(marks) for word in said)

        present = {letter for letter in options if letter in list(said)}
        if len(present) == 1:
            expected = present.pop()
        else:
            named = [each for each in options if options[each] and options[each] in answer.lower()]
            expected = named[0] if len(named) == 1 else None
        assert read_choice(answer, options) == expected, answer
        seen[expected] += 1
    assert min(seen[letter] for letter in ("A", "B", "C", "D", None)) > 20


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "Yes"),
        ("yes, it is.", "Yes"),
        ("No.", "No"),
        ("NO", "No"),
        ("It is **no**", "No"),
        ("Yes or no", None),
        ("nothing, yesterday", None),
        ("There is no dog", "No"),
        ("", None),
    ],
)
def test_yes_or_no_is_read_from_an_answer(answer, said):
    assert read_yes_no(answer) == said


@pytest.mark.parametrize(
    ("said", "true", "is_right"),
    [
        ("A", "A", True),
        ("a.", "A", True),
        (" Yes ", "yes.", True),
        ("red car .", "Red car", True),
        ("B", "A", False),
        ("", "A", False),
        ("a..", "a", False),
    ],
)
def test_an_answer_matches_but_for_case_and_full_stop(said, true, is_right):
    assert exact_match(said, true) is is_right


def test_choice_accuracy_is_a_recount_of_the_rows():
    for seed in CASES:
        rng = np.random.default_rng(seed)
        rows = [
            (int(rng.integers(5) + 1_000_000 * rng.integers(4)), bool(rng.random() < 0.7))
            for _ in range(rng.integers(0, 12))
        ]
        questions = {index % 1_000_000 for index, _ in rows}
        right = [
            all(good for index, good in rows if index % 1_000_000 == question)
            for question in questions
        ]
        records = [(index % 1_000_000, good) for index, good in rows]
        assert_same(choice_accuracy(records), {"accuracy": mean(right)})
    alone = [(row, row % 4 != 0) for row in range(8)]
    assert_same(choice_accuracy(alone), {"accuracy": 75.0})


PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR"
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning"


def test_mme_is_a_recount_of_the_rows():
    names = [*PERCEPTION.split(), *COGNITION.split()]
    seen = Counter()
    for seed in CASES:
        rng = np.random.default_rng(seed)
        rows = []
        for name in rng.choice(names, rng.integers(0, 5), replace=False).tolist():
            for image in range(rng.integers(1, 4)):  # numbers that come again in other categories
                rows += [(name, image, bool(rng.random() < 0.7)) for _ in range(2)]
        rng.shuffle(rows)
        rows = [(name, int(image), good in (True, "True")) for name, image, good in rows]
        expected = {}
        for kind, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
            total, is_there = Fraction(0), False
            for name in members.split():
                of_name = [row for row in rows if row[0] == name]
                images = {image for _, image, _ in of_name}
                if not of_name:
                    continue
                is_there = True
                total += Fraction(100 * sum(good for *_, good in of_name), len(of_name))
                whole = [all(g for _, other, g in of_name if other == image) for image in images]
                total += Fraction(100 * sum(whole), len(whole))
            expected[kind] = float(total) if is_there else None
            seen[kind, is_there] += 1
        cased = [(name.upper() if seed % 2 else name, image, good) for name, image, good in rows]
        assert_same(mme_score(cased), expected)
    assert len(seen) == 4


def test_mme_in_full_and_with_an_unknown_category():
    full = [(name, 0, True) for name in [*PERCEPTION.split(), *COGNITION.split()]]
    assert_same(mme_score(full), {"perception": 2000.0, "cognition": 800.0})
    with pytest.raises(ValueError, match="MME has no category 'colour'"):
        mme_score([*full, ("colour", 0, True)])


def test_yes_no_quality_is_a_recount_of_the_rows():
    for seed in CASES:
        rng = np.random.default_rng(seed)
        rows = [
            (str(rng.choice(["Yes", "No"])), [None, "Yes", "No"][rng.choice(3, p=[0.2, 0.4, 0.4])])
            for _ in range(rng.integers(0, 9))
        ]
        right = sum(row == ("Yes", "Yes") for row in rows)
        num_said, num_true = (sum(row[side] == "Yes" for row in rows) for side in (1, 0))
        precision = Fraction(right, num_said) if num_said else 0
        recall = Fraction(right, num_true) if num_true else 0
        both = precision + recall
        f1 = 2 * precision * recall / both if both else 0
        expected = {"F1": mean([f1]) if rows else None}
        expected["accuracy"] = mean(int(true == said) for true, said in rows)
        assert_same(yes_no_quality(rows), expected)


def test_an_answer_that_is_neither_is_wrong_and_no_yes():
    rows = [("Yes", "Yes"), ("Yes", None), ("No", None), ("No", "No")]
    assert_same(yes_no_quality(rows), {"F1": 100 * 2 / 3, "accuracy": 50.0})
    assert_same(yes_no_quality([("No", None)]), {"F1": 0.0, "accuracy": 0.0})


# ---- many processes ------------------------------------------------------------------------------

NUM_SAMPLES = 23


def grounding_record(seed: int) -> tuple:
    rng = np.random.default_rng(seed)
    truth, guess = rng.random((2, 3, 6, 7)) < 0.6
    return ground_masks(encode(truth), encode(guess), rng.random((3, 3)) + 0.4)


def instance_record(seed: int) -> dict:
    return collect_instances(seed, 3, *next(iter(random_instances(seed)[1].values())))


METRICS = {
    "PQ": (
        lambda seed: match_segments(*random_maps(seed)),
        lambda records: panoptic_quality(records, IS_THING),
    ),
    "AP": (instance_record, lambda records: average_precision(records, 3)),
    "mIoU": (
        lambda seed: count_pixels(*np.random.default_rng(seed).integers(0, 6, (2, 7, 9)), 5),
        lambda records: mean_iou(sum(records)),
    ),
    "cIoU": (
        lambda seed: mask_overlap(*np.random.default_rng(seed).random((2, 7, 9)) < 0.5),
        mask_quality,
    ),
    "GRES": (
        lambda seed: mask_overlap(*np.random.default_rng(seed).random((2, 2, 2)) < 0.2),
        target_quality,
    ),
    "GCG": (grounding_record, grounding_quality),
    "MMBench": (lambda seed: (seed // 3, bool(seed % 4)), choice_accuracy),
    "MME": (lambda seed: (["OCR", "scene"][seed % 2], seed // 4, bool(seed % 5)), mme_score),
    "POPE": (lambda seed: (["Yes", "No"][seed % 2], ["No", "Yes", None][seed % 3]), yes_no_quality),
}


@pytest.mark.parametrize("name", METRICS)
def test_ranks_together_count_what_one_process_counts(name):
    """To the last bit, once the records that each rank sent are in the order of the samples."""
    record, summary = METRICS[name]
    alone = summary([record(index) for index in range(NUM_SAMPLES)])
    assert any(figure > 0 for figure in alone.values() if figure is not None)
    for world_size in (2, 3, 8):
        gathered = []
        for rank in reversed(range(world_size)):
            share = [(index, record(index)) for index in range(rank, NUM_SAMPLES, world_size)]
            gathered += pickle.loads(pickle.dumps(share))
        gathered.sort(key=lambda pair: pair[0])
        assert summary([each for _, each in gathered]) == alone
