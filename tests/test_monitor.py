"""What a training run shows: its records, rates and warnings, curves, scores and pictures.

pytest tests/test_monitor.py
"""

import copy
import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import finish, start_ranks

from xsam.datasets.registry import open_dataset
from xsam.evaluation.benchmarks import scored_tasks, task_of
from xsam.evaluation.prediction_files import SavedPredictions
from xsam.report import curves, monitor, samples
from xsam.report import pictures as draw
from xsam.report.curves import CURVES_FILE, METRICS_FILE, draw_metrics, read_metrics
from xsam.report.letters import letter_size
from xsam.report.monitor import (
    MOST_REASONS,
    RESULTS_FILE,
    SLOW_SHARE,
    UNTRAINED,
    WATCHED_STEPS,
    Monitor,
    drop_metrics,
    peak_memory,
    read_document,
    score,
)
from xsam.results import SegmentationResult

FIGURES = {"loss": 2.0, "class": 0.5, "mask": 1.25, "dice": 0.25, "grad_norm": 1.5, "lr": 1e-4}
FIGURES |= {"images": 8, "tokens": 100, "skipped_samples": 0, "skipped": 1}
FIGURES |= {"data_seconds": 0.1, "seconds": 2.0}
CPU = torch.device("cpu")


def batch(*reasons: str) -> types.SimpleNamespace:
    """What is read of a batch."""
    return types.SimpleNamespace(task="panoptic", skipped=list(reasons))


def start(out: Path, first_step: int = 0, peak_tflops: float | None = None) -> Monitor:
    return Monitor(out, 1, 1000, first_step, CPU, peak_tflops)


def strict(line: str) -> dict:
    """A line of JSON, which has no NaN."""
    return json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} in {line}"))


def records(out: Path) -> list[dict]:
    return list(map(strict, (out / METRICS_FILE).read_text().splitlines()))


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("peak_tflops", [None, 60.0])
def test_a_step_is_recorded_with_its_rates(tmp_path, capsys, peak_tflops):
    seen = start(tmp_path, peak_tflops=peak_tflops)
    costs = {"flops": 6e12} if peak_tflops else {}
    for step in (0, 1):
        seen.step(step, [batch(), batch()], FIGURES | costs | {"loss": 2.0 - step})
    seen.close()
    kept = {name: FIGURES[name] for name in FIGURES.keys() - {"images", "tokens"}}
    rates = {"images_per_second": 4.0, "tokens_per_second": 50.0}
    rates |= {"tflops": 3.0, "mfu": 0.05} if peak_tflops else {}
    for step, record in enumerate(records(tmp_path)):
        assert record.pop("memory_gb") == pytest.approx(peak_memory(CPU), rel=0.5)
        about = {"stage": 1, "step": step, "task": "panoptic", "loss": 2.0 - step}
        assert record == pytest.approx(kept | rates | about)
    assert step == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("stage 1 step 0 panoptic: loss 2.000 (class 0.500 mask 1.250 dice 0.250")
    for part in ("norm 1.50", "lr 1.0e-04", "4.0 images/s 50 tokens/s data 0.10 s"):
        assert part in line
    assert ("3 TFLOP/s MFU 5.0%" in line) == bool(peak_tflops)


def test_without_text_there_are_no_tokens_to_show(tmp_path, capsys):
    seen = start(tmp_path)
    seen.step(0, [batch()], FIGURES | {"tokens": 0})
    assert records(tmp_path)[0]["tokens_per_second"] == 0
    assert "tokens/s" not in capsys.readouterr().out


def test_it_gives_the_steps_that_are_left(tmp_path):
    assert list(Monitor(tmp_path, 1, 5, 2, CPU, None)) == [2, 3, 4]
    assert list(Monitor(tmp_path, 1, 5, 5, CPU, None)) == []


def fill_200_mb() -> int:
    before = peak_memory(CPU)
    block = torch.ones(50_000_000)
    return int(not (before > 0.05 and 0.15 < peak_memory(CPU) - before < 0.25 and block[0] == 1))


def test_memory_is_that_of_this_process(tmp_path):
    """In a process that has not had more before."""
    assert finish(start_ranks(tmp_path / "log", fill_200_mb)) == [0]


def test_other_ranks_than_the_first_record_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    seen = start(tmp_path)
    seen.step(0, [batch("a reason")], FIGURES | {"skipped_samples": 1})
    seen.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == "skipped: a reason\n"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path, monkeypatch, segmentor, value):
    seen = start(tmp_path)
    seen.step(0, [batch()], FIGURES | {"loss": value, "class": value})
    scores = {"panoptic": {"PQ": 1.0, "PQ_stuff": value}}
    monkeypatch.setattr(monitor, "score_tasks", lambda *_: scores)
    seen.validate(0, copy.deepcopy(segmentor), tmp_path)
    step, validation = records(tmp_path)
    assert step["loss"] is None and step["class"] is None and step["mask"] == 1.25
    assert validation["validation"] == {"panoptic PQ": 1.0, "panoptic PQ_stuff": None}


# ---- what was recorded ---------------------------------------------------------------------------

WHOLE = [{"stage": stage, "step": step} for stage in (1, 2) for step in range(4)]


def write_lines(path: Path, end: str = "") -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in WHOLE) + end)


def test_a_half_written_line_is_left_out(tmp_path):
    path = tmp_path / METRICS_FILE
    line = json.dumps({"stage": 2, "step": 4, "loss": 1.5})
    for length in range(len(line)):
        write_lines(path, line[:length])
        assert read_metrics(path) == WHOLE
    for end in (line, line + "\n", '{"stage": 2, "st\n' + line + "\n", "\0\0\0\n" + line):
        write_lines(path, end)
        assert read_metrics(path) == [*WHOLE, json.loads(line)]


@pytest.mark.parametrize(("stage", "step", "count"), [(2, 1, 5), (2, 0, 4), (1, 2, 2), (3, 0, 8)])
def test_drop_metrics_keeps_what_comes_before(tmp_path, stage, step, count):
    path = tmp_path / METRICS_FILE
    drop_metrics(path, stage, step)
    assert not path.exists()
    write_lines(path, '{"stage": 2, "st')
    drop_metrics(path, stage, step)
    assert list(map(json.loads, path.read_text().splitlines())) == WHOLE[:count]
    assert [each.name for each in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_stage_that_is_over_leaves_the_lines_of_later_ones(tmp_path):
    """`--stage all --resume` goes through it again."""
    path = tmp_path / METRICS_FILE
    write_lines(path, "")
    Monitor(tmp_path, 1, 4, 4, CPU, None).close()
    assert list(map(json.loads, path.read_text().splitlines())) == WHOLE


def test_a_resumed_run_records_each_step_once(tmp_path):
    seen = start(tmp_path)
    for step in range(5):
        seen.step(step, [batch()], FIGURES | {"loss": 1.0})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"stage": 1, "step": 5, "lo')  # it was killed
    seen = start(tmp_path, first_step=3)
    for step in (3, 4):
        seen.step(step, [batch()], FIGURES)
    assert [record["step"] for record in records(tmp_path)] == [0, 1, 2, 3, 4]
    assert [record["loss"] for record in records(tmp_path)] == [1.0, 1.0, 1.0, 2.0, 2.0]


# ---- warnings ------------------------------------------------------------------------------------


def warned_at(out: Path, capsys: pytest.CaptureFixture, waits: list[float]) -> list[int]:
    """Numbers of the steps, of a second each, at which slow data was spoken of."""
    seen, found = start(out), []
    for step, waited in enumerate(waits):
        seen.step(step, [batch()], FIGURES | {"seconds": 1.0, "data_seconds": waited})
        found += [step] * ("slow data" in capsys.readouterr().out)
    return found


def test_slow_data_is_told_once_in_a_while(tmp_path, capsys):
    count = WATCHED_STEPS
    assert count == 50 and SLOW_SHARE == 0.2
    assert warned_at(tmp_path, capsys, [0.9] * (count - 1)) == []
    assert warned_at(tmp_path, capsys, [0.19] * 3 * count) == []
    assert warned_at(tmp_path, capsys, [0.21] * 3 * count) == [49, 99, 149]
    # The last steps alone: 12 in 50 of half a second are 12 %, of a whole one 24 %.
    assert warned_at(tmp_path, capsys, [0.5] * 12 + [0.0] * 100) == []
    assert warned_at(tmp_path, capsys, [1.0] * 12 + [0.0] * 100) == [49]
    assert warned_at(tmp_path, capsys, [0.0] * 100 + [1.0] * 12 + [0.0] * 40) == [110]


def test_the_warning_says_how_much_and_what_helps(tmp_path, capsys):
    seen = start(tmp_path)
    for step in range(WATCHED_STEPS):
        seen.step(step, [batch()], FIGURES | {"seconds": 4.0, "data_seconds": 1.0})
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("slow data")]
    assert "25% of the last 50 steps" in line and "--num_workers" in line


def test_the_first_reasons_are_printed_and_all_are_counted(tmp_path, capsys):
    """Those of this rank; the count is of all."""
    seen = start(tmp_path)
    for step in range(5):
        batches = [batch(*(f"{step} {n} {part}" for n in range(3))) for part in "ab"]
        seen.step(step, batches, FIGURES | {"skipped_samples": 10})
    told = [x for x in capsys.readouterr().out.splitlines() if x.startswith("skipped: ")]
    expected = [f"skipped: {s} {n} {part}" for s in range(5) for part in "ab" for n in range(3)]
    assert MOST_REASONS == 20 and told == expected[:20]
    seen.close()
    assert "50 samples were skipped" in capsys.readouterr().out


def test_where_nothing_was_skipped_nothing_is_said(tmp_path, capsys):
    seen = start(tmp_path)
    seen.step(0, [batch()], FIGURES)
    seen.close()
    assert "skipped" not in capsys.readouterr().out


# ---- tensorboard ---------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, is_installed: bool) -> list[tuple]:
    """That the package is there or not; what is asked of it comes into the list."""
    calls, find_spec = [], importlib.util.find_spec

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int):
            calls.append(("open", folder, purge_step))

        def add_scalar(self, *arguments) -> None:
            calls.append(arguments)

        def close(self) -> None:
            calls.append(("close",))

    stub = types.ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, stub.__name__, stub)

    def find(name: str, package: str | None = None):
        return is_installed or None if name == "tensorboard" else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    return calls


def test_tensorboard_gets_the_same_figures(tmp_path, monkeypatch, segmentor):
    calls = pretend(monkeypatch, True)
    seen = start(tmp_path, first_step=7, peak_tflops=60.0)
    seen.step(7, [batch()], FIGURES | {"flops": 6e12})
    monkeypatch.setattr(monitor, "score_tasks", lambda *_: {"panoptic": {"PQ": 40.0}})
    seen.validate(7, copy.deepcopy(segmentor), tmp_path)
    seen.close()
    assert calls[0] == ("open", str(tmp_path / "tensorboard/stage1"), 7) and calls[-1] == ("close",)
    assert {step for _, _, step in calls[1:-1]} == {7}
    shown = {name: value for name, value, _ in calls[1:-1]}
    recorded = records(tmp_path)[0] | {"panoptic PQ": 40.0}
    assert shown.keys() >= {"loss", "class", "grad_norm", "lr", "images_per_second", "mfu"}
    assert shown.keys() >= {"panoptic PQ", "memory_gb"}
    assert shown.items() <= recorded.items() and len(calls) == 2 + len(shown)


def test_without_tensorboard_there_is_no_folder(tmp_path, monkeypatch):
    calls = pretend(monkeypatch, False)
    seen = start(tmp_path)
    seen.step(0, [batch()], FIGURES)
    seen.close()
    assert calls == [] and [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


# ---- curves --------------------------------------------------------------------------------------


COLOURS = [(31, 119, 180), (255, 127, 14)]  # matplotlib's first two


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


def drawn(out: Path) -> np.ndarray:
    draw_metrics(out)
    return np.array(Image.open(out / CURVES_FILE).convert("RGB"))


def amount(picture: np.ndarray, curve: int) -> int:
    """Pixels of the colour of a chart's `curve`-th curve."""
    return int((picture == COLOURS[curve]).all(axis=2).sum())


def test_curves_of_every_stage_and_validation(tmp_path, matplotlib):
    path = tmp_path / METRICS_FILE
    lines = [{"stage": 1, "step": step, "loss": 3 - step / 10} for step in range(20)]
    lines[4]["loss"] = None  # it was not finite
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    one = drawn(tmp_path)
    assert amount(one, 0) > 500 and amount(one, 1) == 0

    scores = [
        {"stage": 1, "step": step, "validation": {"panoptic PQ": 2.0 * step, "refer cIoU": None}}
        for step in (9, 19)
    ]
    scores[1]["validation"]["refer cIoU"] = 7.0
    path.write_text("".join(json.dumps(line) + "\n" for line in (*lines, *scores)) + '{"stage": 2')
    two = drawn(tmp_path)
    assert two.shape[0] == 2 * one.shape[0]
    assert amount(two[: len(one)], 0) > 500 and amount(two[: len(one)], 1) == 0
    assert amount(two[len(one) :], 0) > 500 and amount(two[len(one) :], 1) > 10

    other = [{"stage": 3, "step": step, "loss": 1.0, "text": 0.5} for step in range(9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in (*lines, *scores, *other)))
    three = drawn(tmp_path)
    assert three.shape[0] == pytest.approx(3 * one.shape[0], abs=2)  # rounding of matplotlib
    assert amount(three[len(two) :], 0) > 500 and amount(three[len(two) :], 1) > 500


@pytest.mark.filterwarnings("ignore:Data has no positive values")
@pytest.mark.parametrize("value", [None, 0.0, -1.0, 1e30])
@pytest.mark.parametrize("count", [1, 200])
def test_odd_losses_are_drawn(tmp_path, matplotlib, value, count):
    """What has no place on a logarithmic axis is left out."""
    lines = [{"stage": 1, "step": step, "loss": value} for step in range(count)]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = drawn(tmp_path)
    assert picture.shape[:2] == (480, 900)
    if value is None:
        assert amount(picture, 0) == 0


def test_a_long_curve_is_pale_under_its_running_mean(tmp_path, matplotlib):
    def write(count: int) -> np.ndarray:
        lines = [
            {"stage": 1, "step": step, "loss": 2.0 + math.sin(5 * step)} for step in range(count)
        ]
        (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return drawn(tmp_path)

    pale = 255 - 0.25 * (255 - np.array(COLOURS[0]))
    amounts = [
        int((np.abs(write(count) - pale).max(axis=2) < 3).sum())
        for count in (curves.SMOOTHED_POINTS, 6 * curves.SMOOTHED_POINTS)
    ]
    assert amounts[1] > 1000 and amounts[1] > 5 * amounts[0]


def test_without_matplotlib_a_line_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    curves.has_matplotlib.cache_clear()
    (tmp_path / METRICS_FILE).write_text('{"stage": 1, "step": 0, "loss": 1.0}\n')
    draw_metrics(tmp_path)
    draw_metrics(tmp_path)
    curves.has_matplotlib.cache_clear()
    assert not (tmp_path / CURVES_FILE).exists()
    assert capsys.readouterr().out == "curves.png needs matplotlib: pip install matplotlib\n"


# ---- scores --------------------------------------------------------------------------------------


@pytest.fixture
def trained(segmentor, monkeypatch):
    """A model in training, with few samples to validate on; the score is how many those are."""
    segmentor = copy.deepcopy(segmentor).train()
    tasks = ("panoptic", "refer")  # the latter is not for this model
    counts = dict(num_validation=3, num_pictures=2)
    segmentor.config = segmentor.config.resolve(eval_tasks=tasks, **counts)
    monkeypatch.setattr(
        "xsam.evaluation.benchmarks.score_dataset", lambda said, *_: {"PQ": float(len(said.keys))}
    )
    return segmentor


def test_a_validation_scores_the_first_samples(trained, world, tmp_path, capsys, matplotlib):
    seen = start(tmp_path)
    seen.step(4, [batch()], FIGURES)
    seen.validate(4, trained, world / "data")
    assert trained.training
    _, record = records(tmp_path)
    assert record == {"stage": 1, "step": 4, "validation": {"panoptic PQ": 3.0}}
    said = capsys.readouterr().out
    assert "stage 1 step 4, 3 samples of each set: panoptic PQ 3.0\n" in said
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert pictures == {f"stage1_step5_panoptic_{index:05d}.png" for index in range(2)}
    assert Image.open(tmp_path / CURVES_FILE).height > 480
    assert not list((tmp_path / "predictions").iterdir())  # of these samples alone they are no use


@pytest.mark.parametrize("tasks", [(), ("refer",)])
def test_a_validation_without_a_task_has_no_figure(trained, world, tmp_path, capsys, tasks):
    trained.config = trained.config.resolve(eval_tasks=tasks)
    seen = start(tmp_path)
    seen.step(4, [batch()], FIGURES)
    seen.validate(4, trained, world / "data")
    assert records(tmp_path)[1] == {"stage": 1, "step": 4, "validation": {}}


def test_scores_come_beside_those_from_before(trained, world, tmp_path, capsys):
    before = {"chat": {"accuracy POPE": 12.5}, "panoptic": {"PQ": 1.0}}
    (tmp_path / RESULTS_FILE).write_text(json.dumps({"columns": {"old": before}}))
    score(UNTRAINED, trained, tmp_path, world / "data", False)
    assert not (tmp_path / "pictures").exists()
    score("stage 1", trained, tmp_path, world / "data", False)
    document = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert document["panoptic"] == {"PQ": 6.0} and "chat" not in document
    assert list(document["columns"].items()) == [
        ("old", before),
        (UNTRAINED, {"panoptic": {"PQ": 6.0}}),
        ("stage 1", {"panoptic": {"PQ": 6.0}}),
    ]
    assert read_document(tmp_path) == document
    text = (tmp_path / "results.md").read_text()
    assert "| old | untrained | stage 1 |" in text and "| panoptic | PQ | 1.0 | 6.0 | 6.0 |" in text
    assert text in capsys.readouterr().out
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert pictures == {f"stage1_panoptic_{index:05d}.png" for index in range(2)}
    dataset = open_dataset("coco_panoptic_val", world / "data", all_classes=True)
    said = SavedPredictions(tmp_path / "predictions/stage1" / dataset.name, dataset)
    assert len(said.entries) == 6  # they can be scored again
    assert not (tmp_path / "predictions" / UNTRAINED).exists()


def test_the_untrained_model_is_scored_on_the_first_samples(
    trained, world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("xsam.report.monitor.UNTRAINED_SAMPLES", 2)
    counts, tell = [], SavedPredictions.__init__

    def count(self, *arguments):
        tell(self, *arguments)
        counts.append(len(self.keys))

    monkeypatch.setattr(SavedPredictions, "__init__", count)
    score(UNTRAINED, trained, tmp_path, world / "data", False)
    score("stage 1", trained, tmp_path, world / "data", False)
    assert counts == [2, 6]
    note = "untrained: the first 2 samples of each set"
    assert (tmp_path / "results.md").read_text().startswith(note)


def test_predictions_from_before_are_of_other_weights(trained, world, tmp_path):
    """A column that is scored again, as after a kill, is asked again."""
    figures = []
    for shift in (0.0, 1.0):
        next(trained.parameters()).data += shift
        figures.append(monitor.score_tasks(trained, tmp_path, world / "data", "stage1", 0))
    assert figures == [{"panoptic": {"PQ": 6.0}}] * 2


def test_the_tasks_are_those_of_the_configuration(model, tmp_path, monkeypatch):
    """Of each the first set has pictures, of which a rank draws its share."""
    seen = {}

    def pretended(
        _, names: list[str], data: Path, folder: Path, count: int, on_scored, overwrite, **others
    ) -> dict:
        assert overwrite
        seen["asked"] = names, data, folder, count
        for name in names:
            dataset = types.SimpleNamespace(name=name, sample=lambda index, _: f"question {index}")
            said = types.SimpleNamespace(dataset=dataset, keys=range(7), kind="mask")
            said.prediction = lambda index, sample, name=name: (name, index, sample)
            on_scored(task_of(name)[0], said, {})
        return {"refer": {"score": 1.0}}

    drawn = []
    monkeypatch.setattr(monitor, "evaluate", pretended)
    monkeypatch.setattr(
        samples, "draw_prediction", lambda _, told, *__: drawn.append(told) or panel
    )
    panel = Image.new("RGB", (4, 4))
    model = copy.copy(model)
    model.config = model.config.resolve(eval_tasks=("refer", "chat"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    scores = monitor.score_tasks(model, tmp_path, tmp_path / "data", "x", 3, 5)
    assert scores == {"refer": {"score": 1.0}}
    names = [name for task in ("refer", "chat") for _, name in scored_tasks()[task].datasets]
    assert seen["asked"] == (names, tmp_path / "data", tmp_path / "predictions/x", 5)
    assert drawn == [(name, n, f"question {n}") for name in ("refcoco_val", "mme") for n in (0, 2)]
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert pictures == {f"x_{task}_{n:05d}.png" for task in ("refer", "chat") for n in (0, 2)}


def test_without_results_there_are_none(tmp_path):
    assert read_document(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "panels"),
    [("pope", 1), ("refcoco_val", 2), ("coco_panoptic_val", 2), ("coco_vgd_val_point", 3)],
)
def test_truth_stands_beside_what_is_predicted(world, name, panels):
    sample = open_dataset(name, world / "data").inputs(0)
    width, height = sample.image.size
    masks = np.zeros((2, height, width), bool)
    masks[0, : height // 2], masks[1, height // 2 :] = True, True
    pictures, least = [], 0.3 if name == "coco_vgd_val_point" else 0.0
    for count in (1, 2):
        labels, scores = ["one", "two"][:count], [0.9, 0.1][:count]
        shown = sample.image, masks[:count], [0] * count, labels, scores, "<SEG>"
        pictures.append(samples.draw_prediction(sample, SegmentationResult(*shown), least))
    panel = draw.draw_segments(sample.image, masks[:0], [])
    gap = letter_size(panel)
    widths = {each.width for each in pictures}
    assert all(abs(w - panels * panel.width - (panels + 1) * gap) <= panels + 1 for w in widths)
    # Chat has no masks; what is scored less than asked for is left out.
    is_same = pictures[0].tobytes() == pictures[1].tobytes()
    assert is_same == (name in ("pope", "coco_vgd_val_point"))
