"""The command from a checkpoint or from predictions to the table: on one process and many, killed
and begun again, and with whatever is wrong told.

pytest tests/test_evaluate.py
"""

import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from processes import PATIENCE, ROOT, finish, kill, start_ranks
from test_predictions import contents, edit, perfect, write_predictions
from test_scoring import RING, STAR, masks, square, write_panoptic

from xsam import evaluate
from xsam.checkpoints import save_checkpoint
from xsam.data import Processor, Sample
from xsam.datasets.base import Dataset
from xsam.datasets.registry import open_dataset
from xsam.datasets.sources import SOURCES, locate
from xsam.evaluate import main, predict_dataset
from xsam.evaluation.benchmarks import scored_tasks
from xsam.evaluation.prediction_files import (
    ABOUT_FILE,
    PREDICTIONS_FILE,
    UNFINISHED,
    SavedPredictions,
    finished_records,
    keys_of,
)
from xsam.inference import build_inputs, predict_inputs
from xsam.model import XSAM
from xsam.report import samples
from xsam.results import SegmentationResult

TASKS = scored_tasks()
HAS_METEOR = bool(importlib.util.find_spec("pycocoevalcap") and shutil.which("java"))


def run(*flags: object) -> int:
    """The command in this process; the status that it exits with."""
    try:
        return main(list(map(str, flags)))
    except SystemExit as error:  # as argparse leaves
        return error.code


@pytest.fixture
def results() -> Callable[[Path], dict]:
    return lambda out: json.loads((out / "results.json").read_text())


# ---- the perfect predictor -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def perfect_folder(world, tmp_path_factory) -> Path:
    """The ground truth of every set as predictions, with their results."""
    folder = tmp_path_factory.mktemp("perfect")
    for task in TASKS.values():
        for _, name in task.datasets:
            dataset = open_dataset(name, world / "data", all_classes=True)
            write_predictions(folder / name, dataset)
    assert run("--from-predictions", folder, "--data", world / "data") == 0
    return folder


def test_the_ground_truth_scores_100_on_every_task(perfect_folder, world, results):
    scores = results(perfect_folder)
    sets = [name for task in TASKS.values() for _, name in task.datasets]
    about = scores.pop("about")
    assert list(about["sets"]) == sets and list(scores) == list(TASKS)
    assert about["column"] == "predictions" and about["first_samples"] is about["weights"] is None
    reasoning = {"commonsense_reasoning", "numerical_calculation"}
    reasoning |= {"text_translation", "code_reasoning"}
    kinds = {row["category"].lower() for row in open_dataset("mme", world / "data").records}
    captions = {"METEOR": 100, "CIDEr": 1000}  # CIDEr of the same words is 10
    captions = captions if HAS_METEOR else dict.fromkeys(captions)
    expected = {
        "perception MME": 200 * len(kinds - reasoning),
        "cognition MME": 200 * len(kinds & reasoning),
        **{f"{name}{suffix}": x for name, x in captions.items() for suffix in ("", " test")},
    }
    figures = {name: figure for each in scores.values() for name, figure in each.items()}
    assert len(kinds) > 2 and set(expected) <= set(figures) and len(figures) > 80
    for name, figure in figures.items():
        assert figure == pytest.approx(expected.get(name, 100)), name


def test_every_figure_has_a_protocol_and_every_one_of_the_papers_is_counted(
    perfect_folder, results
):
    scores, printed = results(perfect_folder), (perfect_folder / "results.md").read_text()
    for task, each in TASKS.items():
        counted = {name.split()[0] for name in scores[task]}
        assert counted == set(each.protocols) - {"recall"}  # which needs BERT
        assert set(each.paper) <= set(scores[task])
        for name, figure in scores[task].items():
            shown = "–" if figure is None else f"{figure:.1f}"
            paper = each.paper.get(name, "–")
            line = f"| {task} | {name} | {shown} | {paper} | {each.protocols[name.split()[0]]} |"
            assert line in printed.splitlines()


def test_predictions_of_another_program_are_scored(perfect_folder, world, tmp_path, results):
    """The same files without what this one keeps beside them, but where an image may have nothing;
    grounded captions, of which METEOR takes long, are left to the tests of the files."""
    shutil.copytree(perfect_folder, tmp_path / "said")
    for path in (tmp_path / "said").glob(f"*/{ABOUT_FILE}"):
        if not path.parent.name.endswith("_instance_val"):
            path.unlink()
    tasks = [task for task in TASKS if task != "gcg"]
    flags = ["--data", world / "data", "--tasks", ",".join(tasks), "--out", tmp_path / "out"]
    assert run("--from-predictions", tmp_path / "said", *flags) == 0
    before, after = results(perfect_folder), results(tmp_path / "out")
    assert {task: after[task] for task in tasks} == {task: before[task] for task in tasks}


def test_the_worst_predictions_are_drawn_beside_the_truth(
    perfect_folder, world, tmp_path, monkeypatch
):
    """The worst first, with the figure in the title; what is right is not drawn, nor does a picture
    of an earlier command stay."""
    names = ("refcoco_val", "pope", "coco_panoptic_val", "coco_instance_val", "gcg_val")
    for name in names:
        shutil.copytree(perfect_folder / name, tmp_path / "said" / name)
    changes = {  # by set and index of the entry
        "refcoco_val": {4: {"segmentation": None}, 2: {"segmentation": None}},
        "pope": {1: {"answer": "I cannot say."}},
    }
    for name, entries in changes.items():
        path = tmp_path / "said" / name / "predictions.json"
        content = json.loads(path.read_text())
        for index, change in entries.items():
            content[index] |= change
        path.write_text(json.dumps(content))
    notes = []
    draw = samples.draw_prediction
    monkeypatch.setattr(
        samples, "draw_prediction", lambda *given: notes.append(given[-1]) or draw(*given)
    )
    out = tmp_path / "out"
    flags = ["--data", world / "data", "--tasks", ",".join(names), "--out", out]

    def drawn(folder: Path, count: int) -> set[str]:
        assert run("--from-predictions", folder, *flags, "--errors", count) == 0
        paths = (out / "errors").glob("*/*")
        return {path.relative_to(out / "errors").as_posix() for path in paths}

    worst = {"refcoco_val/000_000002.png", "pope/000_000001.png"}
    assert drawn(tmp_path / "said", 2) == worst | {"refcoco_val/001_000004.png"}
    assert sorted(notes) == ["IoU 0.00", "IoU 0.00", "wrong"]
    assert drawn(tmp_path / "said", 1) == worst
    picture = Image.open(out / "errors/refcoco_val/000_000002.png")
    assert picture.width > 2 * 600  # truth and prediction
    assert drawn(perfect_folder, 3) == set()


def test_the_command_takes_panopticapis_rule_of_one_crowd(tmp_path, capsys, results):
    """Ring and star are crowd of one class, of which that of the star comes last: what is said of
    the ring is no mistake, or by that rule one. PQ is 1 / 1, or 1 / (1 + 1/2)."""
    small = square(0, 0, 4, 5)
    write_panoptic(tmp_path, RING * 1 + STAR * 2 + small * 3, {1: 3, 2: 3, 3: 3}, crowds=(1, 2))
    dataset = open_dataset("coco_panoptic_val", tmp_path, all_classes=True)

    def say(dataset: Dataset, index: int) -> SegmentationResult:
        said = {"masks": masks(RING, small), "categories": [0, 0], "scores": [1.0, 1.0]}
        return dataclasses.replace(perfect(dataset, index), **said)

    write_predictions(tmp_path / "said/coco_panoptic_val", dataset, say)
    flags = ["--from-predictions", tmp_path / "said", "--data", tmp_path, "--out", tmp_path / "out"]
    assert run(*flags) == 0
    scores = results(tmp_path / "out")
    assert scores["panoptic"]["PQ"] == 100 and "one_crowd_per_class" not in scores["about"]
    assert run(*flags, "--one-crowd-per-class") == 0
    scores = results(tmp_path / "out")
    assert scores["panoptic"]["PQ"] == pytest.approx(200 / 3)
    assert scores["about"]["one_crowd_per_class"] is True
    assert "one crowd region of a class and image" in (tmp_path / "out/results.md").read_text()


# ---- one process and many, killed and not --------------------------------------------------------

ASKED = "panoptic,instance,semantic,refcoco_val,gcg_val,coco_vgd_val_point,pope"
BATCH = 4  # of the six drawings: an uneven split


@pytest.fixture(scope="module")
def checkpoint(speaking_model, tmp_path_factory) -> Path:
    """Of a model that answers with masks."""
    folder, model = tmp_path_factory.mktemp("stage3"), speaking_model
    return save_checkpoint(folder, model, model.config, model.tokenizer, 3, 5, {})


@pytest.fixture(scope="module")
def command(checkpoint, world) -> Callable:
    """The flags of the run that the following tests repeat."""
    flags = ["--checkpoint", checkpoint, "--data", world / "data", "--tasks", ASKED]
    flags += ["--batch-size", BATCH]
    return lambda out: list(map(str, [*flags, "--out", out]))


@pytest.fixture(scope="module", autouse=True)
def without_java(perfect_folder) -> Iterator[None]:
    """METEOR takes seconds, which are spent above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        yield


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory) -> dict[str, bytes]:
    """What one process writes that is let be."""
    out = tmp_path_factory.mktemp("alone")
    assert run(*command(out)) == 0
    return contents(out)


def slowly(seconds: float, arguments: list[str]) -> int:
    """The command, in no hurry."""
    os.environ["PATH"] = ""
    told = evaluate.predict_inputs

    def wait(*questions):
        time.sleep(seconds)
        return told(*questions)

    evaluate.predict_inputs = wait
    return main(arguments)


def test_what_one_process_writes_has_masks_and_figures(alone):
    """So that the tests below compare something."""
    figures = json.loads(alone["results.json"])
    assert figures["panoptic"]["PQ"] is not None and figures["refer"]["gIoU"] > 0
    entries = json.loads(alone[f"predictions/coco_panoptic_val/{PREDICTIONS_FILE}"])["annotations"]
    assert sum(len(entry["segments_info"]) for entry in entries) > 5  # 7 with torch 2.6
    entries = json.loads(alone[f"predictions/refcoco_val/{PREDICTIONS_FILE}"])
    assert entries and all(entry["segmentation"] for entry in entries)
    assert sum(name.endswith(".png") for name in alone) == 6
    assert "predictions/gcg_val/captions.json" in alone and "results.md" in alone


def test_two_processes_write_what_one_does(command, alone, tmp_path):
    out = tmp_path / "out"
    processes = start_ranks(tmp_path / "log", slowly, 0.0, command(out), world_size=2)
    assert finish(processes) == [0, 0], (tmp_path / "log").read_text()
    assert contents(out) == alone


def test_presence_curve_is_a_recount_at_each_threshold(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from presence import presence_curve

    scores = [0.9, 0.2, 0.6, -math.inf, 0.1, -math.inf]
    is_present = [True, True, False, True, False, False]
    curve = presence_curve(scores, is_present, [0.0, 0.2, 0.5, 0.95])
    third = 100 / 3
    expected = (third, 2 * third, 50), (2 * third, 2 * third, 2 * third), (2 * third, third, 50)
    for figures, values in zip(curve, expected, strict=False):
        assert list(figures.values())[1:] == pytest.approx(values)
    assert curve[3] == {"threshold": 0.95, "N_acc": 100, "T_acc": 0, "precision": None}
    assert presence_curve([0.5], [True], [0.0])[0]["N_acc"] is None


def test_presence_of_saved_predictions_is_what_the_flag_does(
    speaking_model, world, tmp_path, capsys, monkeypatch, results
):
    """benchmarks/presence.py says beforehand what N_acc and T_acc evaluate.py would give."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import presence

    model, name = speaking_model, "grefcoco_val"
    checkpoint = save_checkpoint(tmp_path, model, model.config, model.tokenizer, 3, 5, {})
    flags = ["--checkpoint", checkpoint, "--data", world / "data", "--tasks", name]
    assert run(*flags, "--out", tmp_path / "all") == 0
    scores, is_present = presence.read_scores(tmp_path / "all/predictions", world / "data", [name])
    assert 0 < sum(is_present) < len(scores)
    threshold = sorted(scores)[len(scores) // 2]
    (expected,) = presence.presence_curve(scores, is_present, [threshold])
    assert run(*flags, "--out", tmp_path / "some", "--presence", threshold) == 0
    figures = results(tmp_path / "some")["grefer"]
    assert (figures["N_acc"], figures["T_acc"]) == (expected["N_acc"], expected["T_acc"])
    entries = json.loads((tmp_path / "some/predictions" / name / PREDICTIONS_FILE).read_text())
    refused = [entry["segmentation"] is None for entry in entries]
    assert refused == [score < threshold for score in scores]
    assert run(*flags, "--out", tmp_path / "all", "--presence", threshold) == 2  # not mixed
    monkeypatch.setattr(
        sys, "argv", ["", "--predictions", str(tmp_path / "all"), "--data", str(world / "data")]
    )
    capsys.readouterr()
    presence.main()
    assert "| 1.00 | 100.0 | " in capsys.readouterr().out


@pytest.mark.parametrize("num_processes", [1, 3])
def test_processes_of_torchrun_write_what_one_does(command, alone, tmp_path, num_processes):
    """As a user starts them: of threads a process has as many as the command gives it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    script = [sys.executable, *launcher, str(ROOT / "xsam/evaluate.py")]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    ended = subprocess.run(
        [*script, *command(tmp_path / "out")],
        env=environment, timeout=2 * PATIENCE, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert contents(tmp_path / "out") == alone
    assert ended.stdout.count("| task | metric |") == 1  # rank 0 alone prints


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (2, 3)])
def test_killed_in_the_midst_it_goes_on_with_the_rest(
    command, alone, world, tmp_path, monkeypatch, capsys, before, after
):
    """By another number of processes as well, and where a line was cut."""
    out, log = tmp_path / "out", tmp_path / "log"
    folder = out / "predictions/refcoco_val"

    def num_lines() -> int:
        return sum(path.read_bytes().count(b"\n") for path in folder.glob(f"{UNFINISHED}/*"))

    processes = start_ranks(log, slowly, 0.4, command(out), world_size=before)
    deadline = time.monotonic() + PATIENCE
    try:
        while num_lines() <= BATCH:  # of five batches two
            assert time.monotonic() < deadline and processes[0].is_alive(), log.read_text()
            time.sleep(0.002)
    finally:
        kill(processes)
    path = next(path for path in sorted(folder.glob(f"{UNFINISHED}/*")) if path.stat().st_size)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    dataset = open_dataset("refcoco_val", world / "data")
    keys, finished = set(keys_of(dataset)), set(finished_records(folder))
    assert 0 < len(finished) < len(keys)
    assert not (out / "results.json").exists()
    assert run("--from-predictions", out, "--data", world / "data") == 2
    assert "refcoco_val: not finished" in capsys.readouterr().err

    if after > 1:
        processes = start_ranks(log, slowly, 0.0, command(out), world_size=after)
        assert finish(processes) == [0] * after, log.read_text()
        said = log.read_text()
    else:
        told, asked = evaluate.predict_inputs, []

        def watched(model, questions, *rest):
            asked.extend(sample.sample_id for sample in questions.samples)
            return told(model, questions, *rest)

        monkeypatch.setattr(evaluate, "predict_inputs", watched)
        assert run(*command(out)) == 0
        said = capsys.readouterr().out
        assert not any(name.startswith("coco_") for name in asked if "vgd" not in name)
        again = {name.removeprefix("refcoco_val/") for name in asked if name.startswith("refcoco")}
        assert keys - finished <= again  # and what shared a batch with the line that was cut
        assert len(again - (keys - finished)) < BATCH
        assert f"{len(keys) - len(again)} of {len(keys)} were predicted before" in said
    assert "refcoco_val: " in said and f"of {len(keys)} were predicted before" in said
    assert contents(out) == alone


def test_finished_predictions_are_not_asked_again(command, alone, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for name, content in alone.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    for name in ("results.json", "results.md"):
        (out / name).unlink()
    monkeypatch.setattr(evaluate, "predict_inputs", lambda *_: pytest.fail("it was asked"))
    assert run(*command(out)) == 0
    assert contents(out) == alone


@pytest.mark.parametrize("name", ["coco_panoptic_val", "gcg_val", "pope", "coco_vgd_val_box"])
def test_a_model_is_not_shown_the_truth(speaking_model, world, tmp_path, monkeypatch, name):
    told, asked = evaluate.predict_inputs, []

    def watched(model, questions, *rest):
        asked.extend(questions.samples)
        asked.extend(sample for part in questions.parts for sample in part.batch.samples)
        return told(model, questions, *rest)

    monkeypatch.setattr(evaluate, "predict_inputs", watched)
    dataset = open_dataset(name, world / "data", all_classes=True)
    predict_dataset(speaking_model, dataset, tmp_path / name, num_samples=2)
    assert len(asked) == 4
    for sample in asked:
        assert len(sample.masks) == len(sample.labels) == 0 and sample.ignore is None
        assert [answered for _, answered in sample.turns] == [None]


def test_loading_in_other_processes_changes_nothing(speaking_model, alone, world, tmp_path):
    model = copy.copy(speaking_model)
    model.config = model.config.resolve(num_workers=2, eval_batch_size=BATCH)
    dataset = open_dataset("refcoco_val", world / "data", all_classes=True)
    predict_dataset(model, dataset, tmp_path / "said")
    for name, content in contents(tmp_path / "said").items():
        assert content == alone[f"predictions/refcoco_val/{name}"], name


def test_an_image_that_cannot_be_read_ends_the_asking_until_it_can(
    command, alone, world, tmp_path, capsys
):
    """What was asked before it is kept."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(world / "data", data)
    path = sorted((data / "img_genseg/coco2017/val2017").iterdir())[-1]
    path.rename(path.with_suffix(".away"))
    flags = command(out)
    flags[flags.index("--data") + 1] = str(data)
    assert run(*flags) == 2
    told = capsys.readouterr()
    assert f"{path}: cannot be read" in told.err and "| task |" not in told.out
    assert len(finished_records(out / "predictions/coco_panoptic_val")) == BATCH
    path.with_suffix(".away").rename(path)
    assert run(*flags) == 0
    assert f"{BATCH} of 6 were predicted before" in capsys.readouterr().out
    assert contents(out) == alone


def test_a_record_that_one_rank_cannot_score_ends_all(perfect_folder, world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(perfect_folder / "refcoco_val", out / "refcoco_val")
    edit(out / "refcoco_val" / PREDICTIONS_FILE, lambda said: said[1].update(segmentation=[]))
    flags = ["--from-predictions", str(out), "--data", str(world / "data")]
    processes = start_ranks(tmp_path / "log", slowly, 0.0, flags, world_size=2)
    statuses, said = finish(processes), (tmp_path / "log").read_text()
    assert statuses[1] == 2 and statuses[0] not in (0, None), statuses
    assert f"{PREDICTIONS_FILE}: entry 1: no valid polygon or RLE" in said
    assert not (out / "results.json").exists()


# ---- what is told of -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give --checkpoint or --from-predictions"),
        ("--checkpoint {ckpt} --from-predictions {said}", "give --checkpoint or --from-pred"),
        ("--checkpoint no/such/step_1", "no/such/step_1"),
        ("--checkpoint {ckpt} --tasks panoptic,depth", "unknown task depth; known are panoptic,"),
        ("--checkpoint {ckpt} --tasks coco_vgd", "unknown task coco_vgd"),
        ("--checkpoint {ckpt} --tasks pope --data {none}", "none/LMUData/POPE.tsv; --tasks says"),
        ("--checkpoint {ckpt} --limit 0", "--limit has to be 1 or more"),
        ("--checkpoint {ckpt} --batch-size -1", "--batch-size has to be 1 or more"),
        ("--checkpoint {ckpt} --tasks pope --device mps", "--device mps: PyTorch"),
        ("--from-predictions {said} --dtype float32", "--dtype is for predicting, so it goes with"),
        ("--checkpoint {ckpt} --names {none}/names.txt", "names.txt: cannot be read as a list"),
        ("--checkpoint {ckpt} --names background,", "no names in it"),
        ("--checkpoint {ckpt} --bert {none}", "none: no BERT in it"),
        ("--checkpoint {ckpt} --phrasings {none}/a.json --tasks pope", "a.json: cannot be read"),
        ("--from-predictions {said} --errors 0", "--errors has to be 1 or more"),
        ("--from-predictions {none}", "none: has no folder of a set that is scored"),
        ("--from-predictions {said} --tasks panoptic", "predictions.json: cannot be read"),
    ],
)
def test_what_is_wrong_with_the_command_is_told(
    checkpoint, perfect_folder, world, tmp_path, capsys, flags, message
):
    (tmp_path / "said").mkdir()
    shutil.copytree(perfect_folder / "pope", tmp_path / "said/pope")
    folders = {"ckpt": checkpoint, "said": tmp_path / "said", "none": tmp_path / "none"}
    flags = flags.format(**folders).split()
    data = [] if "--data" in flags else ["--data", world / "data"]
    out = [] if "--out" in flags else ["--out", tmp_path / "out"]
    assert run(*flags, *data, *out) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/results.json").exists()


def test_all_files_that_are_missing_are_told_before_anything_is_loaded(tmp_path, capsys):
    assert (
        run("--checkpoint", tmp_path / "none", "--data", tmp_path, "--tasks", "panoptic,pope") == 2
    )
    said = capsys.readouterr().err
    paths = [path for name in ("coco_panoptic_val", "pope") for path in SOURCES[name].paths()]
    assert len(paths) == 4 and all(str(tmp_path / path) in said for path in paths)


@pytest.mark.parametrize("name", ["coco_panoptic_val", "coco_instance_val", "coco_semantic_val"])
def test_a_set_without_images_is_told(perfect_folder, world, tmp_path, capsys, name):
    path = locate(tmp_path / "data", SOURCES[name].annotations)
    shutil.copytree(world / "data/img_genseg", tmp_path / "data/img_genseg", symlinks=True)
    edit(path, lambda content: content | {"images": [], "annotations": []})
    flags = ["--from-predictions", perfect_folder, "--data", tmp_path / "data", "--tasks", name]
    assert run(*flags, "--out", tmp_path / "out") == 2
    assert f"{path}: no sample of {name} in it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_where_one_set_cannot_be_scored_no_figures_are_written(
    perfect_folder, world, tmp_path, capsys
):
    """Nor are those from before touched."""
    out = tmp_path / "said"
    for name in ("pope", "refcoco_val", "coco_instance_val"):
        shutil.copytree(perfect_folder / name, out / name)
    flags = ["--from-predictions", out, "--data", world / "data"]
    assert run(*flags) == 0
    before = (out / "results.json").read_bytes(), (out / "results.md").read_bytes()
    capsys.readouterr()
    edit(out / "coco_instance_val" / PREDICTIONS_FILE, lambda said: said[0].update(category_id=999))
    assert run(*flags) == 2
    told = capsys.readouterr()
    assert f"coco_instance_val/{PREDICTIONS_FILE}: entry 0: category 999" in told.err
    assert "| task |" not in told.out
    assert before == ((out / "results.json").read_bytes(), (out / "results.md").read_bytes())


def test_the_first_samples_are_marked_as_such_and_not_taken_for_all(
    checkpoint, world, tmp_path, capsys, results
):
    out = tmp_path / "out"
    flags = ["--checkpoint", checkpoint, "--data", world / "data", "--out", out]
    flags += ["--tasks", "panoptic,pope"]
    assert run(*flags, "--limit", 2) == 0
    note = "The first 2 samples of each set alone."
    assert note in capsys.readouterr().out and (out / "results.md").read_text().startswith(note)
    about = results(out)["about"]
    assert list(about["sets"]) == ["coco_panoptic_val", "pope"] and about["first_samples"] == 2
    assert [each["records"] for each in about["sets"].values()] == [2, 2]

    assert run(*flags) == 2
    assert "coco_panoptic_val: holds predictions made with other records" in capsys.readouterr().err
    scored = ["--from-predictions", out, "--data", world / "data"]
    assert run(*scored) == 2
    assert "4 of the 6 records of coco_panoptic_val have no prediction" in capsys.readouterr().err
    assert results(out)["about"] == about
    assert run(*scored, "--limit", 2) == 0
    assert run(*flags, "--overwrite") == 0
    about = results(out)["about"]
    assert [each["records"] for each in about["sets"].values()] == [6, 18]
    assert about["first_samples"] is None
    assert note not in (out / "results.md").read_text()


def test_predictions_of_other_weights_or_settings_are_not_mixed(
    speaking_model, checkpoint, world, tmp_path, capsys
):
    out = tmp_path / "out"
    data = ["--data", world / "data", "--tasks", "pope", "--out", out]
    assert run("--checkpoint", checkpoint, *data) == 0
    before = contents(out)
    assert run("--checkpoint", checkpoint, *data) == 0
    assert contents(out) == before
    capsys.readouterr()
    assert run("--checkpoint", checkpoint, *data, "--batch-size", 3) == 2
    assert "pope: holds predictions made with other settings" in capsys.readouterr().err
    phrasings = tmp_path / "mine.json"
    phrasings.write_text(json.dumps({"refer": {"questions": ["{phrases}?"]}}))
    assert run("--checkpoint", checkpoint, *data, "--phrasings", phrasings) == 2
    assert "pope: holds predictions made with other settings" in capsys.readouterr().err

    model = copy.deepcopy(speaking_model)
    model.background_embedding.weight.data[0, 0] += 1
    other = save_checkpoint(tmp_path, model, model.config, model.tokenizer, 3, 6, {})
    assert run("--checkpoint", other, *data) == 2
    assert "pope: holds predictions made with other weights" in capsys.readouterr().err
    assert contents(out) == before
    assert run("--checkpoint", other, *data, "--overwrite") == 0
    assert contents(out / "predictions/pope") != before


def test_a_segmentor_alone_is_scored_on_what_it_can(segmentor, world, tmp_path, capsys, results):
    folder = save_checkpoint(tmp_path, segmentor, segmentor.config, None, 1, 5, {})
    flags = ["--checkpoint", folder, "--data", world / "data"]
    assert run(*flags) == 0  # results lie beside the checkpoint
    told = capsys.readouterr().out
    assert list(results(folder)) == ["panoptic", "instance", "semantic", "about"]
    assert "| task | metric | stage 1 | paper | protocol |" in told
    assert (folder / "results.md").read_text() in told
    for task in ("refer", "refcoco_val", "panoptic,chat", "openvocab"):
        assert run(*flags, "--tasks", task, "--out", tmp_path / "out") == 2
        assert "stage 1 has no language model; it is scored with" in capsys.readouterr().err


# ---- lists of names ------------------------------------------------------------------------------


def shortened(model: XSAM, num_tokens: int) -> XSAM:
    """The model with room for so many tokens in a prompt."""
    model = copy.copy(model)
    model.config = model.config.resolve(max_text_length=num_tokens)
    return model


def asked_about(model: XSAM, sample: Sample) -> list[list[str]]:
    """The names of each prompt."""
    parts = Processor(model.config, model.tokenizer).split(sample)
    for places, part in parts:
        assert part.names == [sample.names[place] for place in places]
    return [part.names for _, part in parts]


@pytest.fixture
def classes(world):
    return open_dataset("coco_instance_val", world / "data", all_classes=True)


def test_a_list_of_names_is_asked_in_as_few_prompts_as_it_fits(speaking_model, classes):
    sample, counts = classes.inputs(0), []
    for num_tokens in range(20, 140, 4):
        try:
            parts = asked_about(shortened(speaking_model, num_tokens), sample)
        except ValueError:  # not even one name fits
            assert not counts
            continue
        assert [name for part in parts for name in part] == sample.names
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        counts.append(len(parts))
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1
    assert {1, 2, 3} <= set(counts)


def test_masks_of_several_prompts_are_merged(speaking_model, classes):
    """What is said of a long list is what is said of its parts, asked alone."""
    model = shortened(speaking_model, 40)
    sample = classes.inputs(0)
    parts = Processor(model.config, model.tokenizer).split(sample)
    assert len(parts) > 1

    def said(*samples: Sample) -> list[tuple]:
        processor = Processor(model.config, model.tokenizer)
        found = []
        for each in samples:
            (told,) = predict_inputs(model, build_inputs(processor, [each]), "instances")
            assert told.labels == [each.names[place] for place in told.categories]
            rows = zip(told.labels, told.scores, told.masks, strict=True)
            found += [(label, round(x, 5), mask.tobytes()) for label, x, mask in rows]
        return sorted(found)

    together = said(sample)
    assert together == said(*(part for _, part in parts)) and len(together) > 20
    assert {label for label, *_ in together} == set(sample.names)


def parted(text: str) -> list[str]:
    """The lines that tell of lists in several prompts."""
    return [line for line in text.splitlines() if "do not fit one prompt" in line]


def test_it_is_told_where_a_list_is_asked_in_parts(speaking_model, classes, tmp_path, capsys):
    predict_dataset(speaking_model, classes, tmp_path / "one")
    assert parted(capsys.readouterr().out) == []
    predict_dataset(shortened(speaking_model, 40), classes, tmp_path / "several")
    (said,) = parted(capsys.readouterr().out)
    assert f"{len(classes.names)} names do not fit one prompt of 40 tokens" in said
    for folder in ("one", "several"):
        entries = SavedPredictions(tmp_path / folder, classes).entries
        found = {entry["category_id"] for said in entries.values() for _, entry in said}
        assert found == set(classes.category_index)


def test_it_is_told_where_only_a_later_question_has_to_be_parted(
    speaking_model, classes, tmp_path, capsys
):
    """Questions are worded in several ways, of several lengths."""
    samples = [classes.inputs(index) for index in range(len(classes))]
    for num_tokens in range(40, 140):
        model = shortened(speaking_model, num_tokens)
        counts = [len(asked_about(model, sample)) for sample in samples]
        if counts[0] == 1 < max(counts):
            break
    model.config = model.config.resolve(eval_batch_size=1)
    predict_dataset(model, classes, tmp_path / "said")
    assert len(parted(capsys.readouterr().out)) == 1


def test_records_of_an_image_stay_side_by_side_and_small_sets_open(
    speaking_model, world, tmp_path, monkeypatch
):
    """Words decide where they are many more alone."""
    dataset, name = open_dataset("refcoco_val", world / "data"), "refcoco_val"
    keys = keys_of(dataset)
    batches = evaluate._unfinished_batches(dataset, keys, tmp_path, 3)
    assert [*itertools.chain(*batches)] == [*range(len(keys))]
    monkeypatch.setattr(dataset, "num_words", lambda index: 100 if index == 1 else index % 2)
    batches = evaluate._unfinished_batches(dataset, keys, tmp_path, 3)
    assert [*itertools.chain(*batches)] == [0, *range(2, len(keys)), 1]

    opened = []

    def watched(name, *arguments, **options):
        opened.append(name)
        return open_dataset(name, *arguments, **options)

    monkeypatch.setattr(evaluate, "open_dataset", watched)
    for most, count in ((2**25, 1), (1, 2)):
        monkeypatch.setattr(evaluate, "HELD_BYTES", most)
        opened.clear()
        evaluate.evaluate(speaking_model, [name], world / "data", tmp_path / "said", 1)
        assert opened == [name] * count


def test_other_names_for_the_classes_of_open_vocabulary(
    checkpoint, world, tmp_path, monkeypatch, capsys
):
    told, asked = evaluate.predict_inputs, []

    def watched(model, questions, *rest):
        asked.extend(questions.samples)
        return told(model, questions, *rest)

    monkeypatch.setattr(evaluate, "predict_inputs", watched)
    flags = ["--checkpoint", checkpoint, "--data", world / "data", "--limit", 1]
    dataset = open_dataset("ade20k_semantic_val", world / "data", all_classes=True)
    names = [f"kind {number}" for number in range(len(dataset.names))]
    (tmp_path / "names.txt").write_text("".join(f"{n}:{name},x\n" for n, name in enumerate(names)))
    flags += ["--tasks", "ade20k_semantic_val,coco_semantic_val", "--out", tmp_path / "out"]
    assert run(*flags, "--names", tmp_path / "names.txt") == 0
    renamed, other = asked
    assert renamed.names == names and all(name in renamed.turns[0][0] for name in names)
    assert other.names == open_dataset("coco_semantic_val", world / "data").names
    capsys.readouterr()
    assert run(*flags) == 2  # with its own names it is another question
    assert "ade20k_semantic_val: holds predictions made with other" in capsys.readouterr().err
    assert run(*flags, "--names", "cup,cat") == 2
    message = f"2 names for the {len(names)} classes of ade20k_semantic_val"
    assert message in capsys.readouterr().err
