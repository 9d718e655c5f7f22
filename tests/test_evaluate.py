"""Metrics against a recount of pixels, and a perfect answer through the whole evaluation.

pytest tests/test_evaluate.py
"""

import dataclasses
import json
import math
import types
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from xsam import distributed
from xsam.checkpoints import save_checkpoint
from xsam.datasets import open_dataset
from xsam.evaluate import (
    PROTOCOLS,
    TASKS,
    average_precision,
    evaluate,
    instances,
    is_right,
    main,
    mask_areas,
    mask_quality,
    match_segments,
    paired_ious,
    panoptic_quality,
    question,
    table,
)
from xsam.postprocess import Prediction
from xsam.samples import Sample

# ---- panoptic quality ----------------------------------------------------------------------------


def grid(*rows: str) -> np.ndarray:
    """A map of one-digit ids; a dot is void."""
    return np.array([[0 if cell == "." else int(cell) for cell in row] for row in rows])


def recount(ids, truth, guessed, guesses) -> list[tuple[str, int, float]]:
    """The same records by Kirillov et al. 2019, section 4, from sets of pixels."""

    def pixels(array, number) -> set:
        return set(np.flatnonzero(array.ravel() == number).tolist())

    void = pixels(ids, 0)
    records, matched_truth, matched_guesses = [], set(), set()
    for number, (category, is_crowd) in truth.items():
        for other, guessed_category in guesses.items():
            if is_crowd or category != guessed_category:
                continue
            one, two = pixels(ids, number), pixels(guessed, other) - void
            if one | two and len(one & two) / len(one | two) > 0.5:
                records.append(("tp", category, len(one & two) / len(one | two)))
                matched_truth.add(number)
                matched_guesses.add(other)
    for number, (category, is_crowd) in truth.items():
        if not is_crowd and number not in matched_truth:
            records.append(("fn", category, 0.0))
    for other, category in guesses.items():
        region = pixels(guessed, other)
        excused = set(void)
        for number, kind in truth.items():
            if kind == (category, True):
                excused |= pixels(ids, number)
        if region and other not in matched_guesses and len(region & excused) <= len(region) / 2:
            records.append(("fp", category, 0.0))
    return records


def recounted_quality(records, is_thing) -> dict[str, float]:
    per_class = defaultdict(list)
    for kind, category, value in records:
        per_class[category].append((kind, value))
    quality = {}
    for category, found in per_class.items():
        kinds = Counter(kind for kind, _ in found)
        total = sum(value for _, value in found)
        quality[category] = 100 * total / (kinds["tp"] + kinds["fp"] / 2 + kinds["fn"] / 2)

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values) if values else math.nan

    return {
        "PQ": mean(quality.values()),
        "PQ_things": mean(q for category, q in quality.items() if is_thing[category]),
        "PQ_stuff": mean(q for category, q in quality.items() if not is_thing[category]),
    }


IS_THING = [True, True, False]


def random_maps(seed: int):
    """Rectangles of three classes on void, and a guess that is them moved, relabelled or lost."""
    rng = np.random.default_rng(seed)
    ids, guessed = np.zeros((9, 11), int), np.zeros((9, 11), int)
    truth, guesses = {}, {}
    for number in rng.permutation(np.arange(1, 9))[: rng.integers(0, 6)].tolist():
        top, left = rng.integers(0, 7, 2)
        box = np.s_[top : top + rng.integers(1, 7), left : left + rng.integers(1, 8)]
        ids[box] = number
        truth[number] = (int(rng.integers(3)), rng.random() < 0.25)
    for number, (category, _) in truth.items():
        if rng.random() < 0.8:
            shift = rng.integers(-1, 2, 2) * (rng.random() < 0.6)
            guessed[np.roll(ids == number, shift, (0, 1))] = number + 20
            guesses[number + 20] = category if rng.random() < 0.8 else int(rng.integers(3))
    if rng.random() < 0.5:
        guessed[rng.integers(9) :, rng.integers(11) :] = 40
        guesses[40] = int(rng.integers(3))
    present = set(np.unique(ids)) - {0}
    return ids, {n: kind for n, kind in truth.items() if n in present}, guessed, guesses


def test_panoptic_quality_is_a_recount_of_the_pixels():
    records, expected, seen = [], [], Counter()
    for seed in range(200):
        maps = random_maps(seed)
        ours, theirs = match_segments(*maps), recount(*maps)
        assert Counter(ours) == Counter(theirs), seed
        records += ours
        expected += theirs
        seen.update(kind for kind, _, _ in theirs)
    assert min(seen[kind] for kind in ("tp", "fn", "fp")) > 50
    assert panoptic_quality(records, IS_THING) == pytest.approx(
        recounted_quality(expected, IS_THING)
    )


def test_a_perfect_guess_scores_100():
    """Whatever it says of void and of crowds."""
    for seed in range(30):
        ids, truth, *_ = random_maps(seed)
        guesses = {number: category for number, (category, _) in truth.items()}
        records = match_segments(ids, truth, ids, guesses)
        assert {kind for kind, _, _ in records} <= {"tp"}
        assert len(records) == sum(not is_crowd for _, is_crowd in truth.values())
        assert all(
            value in (100.0,) or math.isnan(value)
            for value in panoptic_quality(records, IS_THING).values()
        )


def test_a_match_needs_more_than_half():
    ids, truth = grid("1111", "1111"), {1: (0, False)}
    half, more = grid("22..", "22.."), grid("222.", "22..")
    assert match_segments(ids, truth, half, {2: 0}) == [("fn", 0, 0.0), ("fp", 0, 0.0)]
    assert match_segments(ids, truth, more, {2: 0}) == [("tp", 0, 5 / 8)]
    assert match_segments(ids, truth, more, {2: 1}) == [("fn", 0, 0.0), ("fp", 1, 0.0)]


def test_a_crowd_is_neither_missed_nor_found():
    ids, truth = grid("1111", "...."), {1: (0, True)}
    assert match_segments(ids, truth, np.zeros_like(ids), {}) == []
    assert match_segments(ids, truth, grid("2222", "...."), {2: 0}) == []
    assert match_segments(ids, truth, grid("2222", "...."), {2: 1}) == [("fp", 1, 0.0)]


def test_nothing_counts_where_all_is_void():
    ids = np.zeros((2, 4), int)
    assert match_segments(ids, {}, grid("2222", "33.."), {2: 0, 3: 1}) == []
    assert all(math.isnan(value) for value in panoptic_quality([], IS_THING).values())


def test_an_empty_guess_misses_everything():
    ids, truth = grid("1122", "11.."), {1: (0, False), 2: (2, False)}
    records = match_segments(ids, truth, np.zeros_like(ids), {})
    assert Counter(records) == Counter([("fn", 0, 0.0), ("fn", 2, 0.0)])
    scores = {"PQ": 0.0, "PQ_things": 0.0, "PQ_stuff": 0.0}
    assert panoptic_quality(records, IS_THING) == scores


def test_classes_that_do_not_occur_are_not_averaged():
    scores = panoptic_quality([("tp", 0, 0.8), ("fp", 0, 0.0), ("fn", 0, 0.0)], IS_THING)
    assert scores["PQ"] == scores["PQ_things"] == pytest.approx(40.0)
    assert math.isnan(scores["PQ_stuff"])


# ---- referring quality ---------------------------------------------------------------------------


def test_mask_quality():
    scores = mask_quality([(30, 40, True, True), (0, 60, True, False)])
    assert scores == pytest.approx({"cIoU": 30.0, "gIoU": 37.5})


def test_an_empty_union_is_a_full_score_of_its_sample():
    scores = mask_quality([(0, 0, True, False), (5, 10, True, True)])
    assert scores == pytest.approx({"cIoU": 50.0, "gIoU": 75.0})


def test_phrases_without_a_target_are_told_apart():
    found, missed = (8, 10, True, True), (0, 6, True, False)
    silent, invented = (0, 0, False, False), (0, 4, False, True)
    scores = mask_quality([found, missed, silent, invented, silent])
    expected = {"cIoU": 40.0, "gIoU": 100 * (0.8 + 1 + 1) / 5}
    expected |= {"N_acc": 100 * 2 / 3, "T_acc": 50.0}
    assert scores == pytest.approx(expected)


def prediction_of(masks: np.ndarray, labels: list[str], scores: list[float]) -> Prediction:
    picture = Image.new("RGB", masks.shape[:0:-1])
    return Prediction(picture, masks, list(range(len(masks))), labels, scores, "<SEG>")


def sample_of(masks: np.ndarray, labels: list[int], names: list[str], ignore=None) -> Sample:
    picture = Image.new("RGB", masks.shape[:0:-1])
    return Sample("x", "vgd", picture, [], masks, np.array(labels), ignore, names)


def test_ignored_pixels_are_in_neither_area():
    truth, guess = np.zeros((2, 1, 4, 4), bool)
    truth[0, :2], guess[0, 1:] = True, True
    ignore = np.zeros((4, 4), bool)
    ignore[1:3, 0] = True
    sample = sample_of(truth, [0], ["x"], ignore)
    assert mask_areas(None, 0, sample, prediction_of(guess, ["x"], [1.0])) == (3, 14, True, True)


def test_true_masks_are_paired_with_the_best_that_is_left():
    truth = np.zeros((3, 1, 10), bool)
    truth[0, 0, :4], truth[1, 0, 4:8], truth[2, 0, 8:] = True, True, True
    guess = np.zeros((2, 1, 10), bool)
    guess[0, 0, :5], guess[1, 0, :4] = True, True
    found = paired_ious(
        None, 0, sample_of(truth, [0] * 3, ["x"]), prediction_of(guess, ["", ""], [1, 1])
    )
    assert found == pytest.approx([1.0, 1 / 8, 0.0])


def test_average_precision_is_that_of_pycocotools_by_hand():
    """One class all right, one with a better scored miss before the hit: (1 + 1/2) / 2."""
    truth = np.zeros((2, 8, 8), bool)
    truth[0, :3, :3], truth[1, 5:, 5:] = True, True
    guess = np.stack([truth[0], ~truth[1] & ~truth[0], truth[1]])
    sample = sample_of(truth, [0, 1], ["ring", "star"])
    prediction = prediction_of(guess, ["ring", "star", "star"], [0.3, 0.9, 0.8])
    record = instances(None, 0, sample, prediction)
    assert average_precision([record]) == pytest.approx({"AP": 75.0, "AP50": 75.0}, abs=0.5)
    nothing = instances(None, 0, sample, prediction_of(guess[:0], [], []))
    assert average_precision([nothing]) == {"AP": 0.0, "AP50": 0.0}


# ---- a dataset through a model -------------------------------------------------------------------


def perfect(model, samples, is_thing):
    """The ground truth, as `answer` would give it."""
    assert all(answered is None for sample in samples for _, answered in sample.turns)
    return [
        Prediction(
            sample.image,
            sample.masks,
            sample.labels.tolist(),
            [sample.names[label] for label in sample.labels],
            [1.0] * len(sample.labels),
            "<SEG>",
        )
        for sample in samples
    ]


def shifted(model, samples, is_thing):
    """The ground truth a few pixels off, and nothing at all for one sample."""
    predictions = perfect(model, samples, is_thing)
    for sample, prediction in zip(samples, predictions, strict=True):
        prediction.masks = np.roll(prediction.masks, 3, axis=2)
        if sample.sample_id.endswith("7"):
            prediction.masks, prediction.categories = prediction.masks[:0], []
    return predictions


@pytest.mark.parametrize("task", set(TASKS) - {"chat"})
def test_a_perfect_answer_scores_100(model, world, monkeypatch, task):
    monkeypatch.setattr("xsam.evaluate.answer", perfect)
    scores, kept = evaluate(model, task, world / "data", num_kept=4)
    assert scores and all(value == pytest.approx(100) for value in scores.values())
    name = next(iter(TASKS[task].datasets.values()))
    dataset = open_dataset(name, world / "data", all_classes=True)
    assert [index for index, _, _ in kept] == list(range(len(kept))) and kept
    for index, sample, prediction in kept:
        assert sample.sample_id == question(dataset, index).sample_id
        assert sample.turns == question(dataset, index).turns
        assert prediction.masks is sample.masks


@pytest.mark.parametrize("task", TASKS)
def test_ranks_together_count_what_one_process_counts(model, world, monkeypatch, task):
    """The same records in the same order, so that their sums are the same to the last bit."""
    monkeypatch.setattr("xsam.evaluate.answer", shifted)
    kept = dataclasses.replace(TASKS[task], summarise=lambda records, *_: {"all": list(records)})
    monkeypatch.setitem(TASKS, task, kept)
    alone, _ = evaluate(model, task, world / "data")
    assert len(alone) == len(kept.datasets) and all(len(records) > 1 for records in alone.values())

    gathered = defaultdict(list)  # by dataset, of which each rank has one after the other
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    for rank in (3, 1, 0, 2):  # the last sees the records of all
        sets = iter(range(10))

        def gather(items, sets=sets):
            of_set = gathered[next(sets)]
            of_set.extend(items)
            return of_set

        monkeypatch.setattr(distributed, "gather", gather)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        together, _ = evaluate(model, task, world / "data")
    assert together == alone


@pytest.mark.parametrize(
    ("said", "true", "right"),
    [
        ("A", "A", True),
        ("a.", "A", True),
        ("Yes", "yes", True),
        ("B", "A", False),
        ("", "A", False),
    ],
)
def test_an_answer_is_right_but_for_case_and_full_stop(said, true, right):
    prediction = prediction_of(np.zeros((0, 4, 4), bool), [], [])
    prediction.answer = said

    table = types.SimpleNamespace(records=[{"answer": true}])
    assert is_right(table, 0, None, prediction) is right


def test_an_untrained_model_is_scored(speaking_model, world):
    for task in TASKS:
        scores, _ = evaluate(speaking_model, task, world / "data")
        assert scores and all(0 <= value <= 100 for value in scores.values())
        assert any(value < 100 for value in scores.values())


# ---- what is printed -----------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_metric_and_a_column_for_each_run():
    results = {
        "untrained": {"panoptic": {"PQ": 0.0, "PQ_things": 0.0}},
        "stage 3": {"panoptic": {"PQ": 91.26, "PQ_things": 88.0}, "refer": {"cIoU point": 70.0}},
    }
    head, rule, *rows = [line.strip("|").split("|") for line in table(results).splitlines()]
    assert [cell.strip() for cell in head[:4]] == ["task", "metric", "untrained", "stage 3"]
    assert len(rule) == len(head)
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[:4] for row in cells] == [
        ["panoptic", "PQ", "0.0", "91.3"],
        ["panoptic", "PQ_things", "0.0", "88.0"],
        ["refer", "cIoU point", "–", "70.0"],
    ]
    assert [row[4] for row in cells] == [PROTOCOLS[row[1].split()[0]] for row in cells]


def test_the_command_writes_what_it_prints(segmentor, world, tmp_path, capsys):
    folder = save_checkpoint(tmp_path, segmentor, segmentor.settings, None, 1, 5, {})
    arguments = ["--checkpoint", str(folder), "--data", str(world / "data")]
    assert main([*arguments, "--tasks", "panoptic", "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results == {"panoptic": evaluate(segmentor, "panoptic", world / "data")[0]}
    printed = (tmp_path / "out/results.md").read_text()
    assert printed in capsys.readouterr().out and "| panoptic | PQ |" in printed

    assert main([*arguments, "--tasks", "refer"]) == 2
    assert "stage 1 has no language model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--checkpoint", "no/such/step_1", "no/such/step_1"),
        ("--data", "no/such/data", "no/such/data/img_refseg"),
        ("--tasks", "panoptic,depth", "unknown task depth"),
    ],
)
def test_wrong_arguments_leave_with_2_and_say_why(world, tmp_path, capsys, flag, value, message):
    arguments = {"--checkpoint": str(tmp_path), "--data": str(world / "data"), "--tasks": "all"}
    try:
        code = main([part for pair in (arguments | {flag: value}).items() for part in pair])
    except SystemExit as error:  # as argparse leaves
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
