"""What a task and a set are made of: nothing is missing of ours, and what a new one lacks is told.

pytest tests/test_tasks.py
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from xsam import evaluate, plan, predict
from xsam.config import xsam
from xsam.datasets.base import Dataset
from xsam.datasets.registry import READERS, read_dataset
from xsam.datasets.sources import SOURCES, Source, scored_sets, sets_by_task
from xsam.demo.server import Engine
from xsam.evaluation.benchmarks import BENCHMARKS, BY_KIND, Benchmark
from xsam.evaluation.prediction_files import LAYOUTS
from xsam.inference import CHOICES, POST_PROCESSING
from xsam.plan import PUBLISHED_SIZES, usual_sample
from xsam.prompts import read_phrasings, reply
from xsam.tasks import TASKS, Request, Task, requests
from xsam.toy.preset import toy

ROOT = Path(__file__).resolve().parent.parent
FORKS = ROOT / "docs" / "forks"
PAGE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
EXAMPLES = ("new_dataset", "new_task")
TABLES = TASKS, SOURCES, READERS, BENCHMARKS


# ---- what is lacking -----------------------------------------------------------------------------


def lacks_of_set(name: str) -> list[str]:
    """What a set of SOURCES lacks, and where that goes."""
    source, lacks = SOURCES[name], []
    here = f'datasets/sources.py SOURCES["{name}"]'
    if source.task not in TASKS:
        lacks.append(f'a task "{source.task}" (tasks.py TASKS)')
    if source.format not in READERS:
        lacks.append(f'a reader of "{source.format}" (datasets/registry.py READERS)')
    if not source.annotations:
        lacks.append(f"a file of annotations ({here}.annotations)")
    if not source.about:
        lacks.append(f"what has to lie there ({here}.about)")
    if source.post_processing not in ("", "none", *POST_PROCESSING):
        lacks.append(f'a way "{source.post_processing}" to make masks (inference.POST_PROCESSING)')
    used = [each for stage in xsam().stages.values() for each in stage.datasets]
    if name in used and name not in PUBLISHED_SIZES:
        lacks.append("its size (plan.PUBLISHED_SIZES)")
    return lacks + (lacks_of_reader(name, source) if source.format in READERS else [])


def lacks_of_reader(name: str, source: Source) -> list[str]:
    """What the reader of a set lacks: more where the set is scored."""
    reader, lacks = READERS[source.format], []
    methods = ("index", "sample", "key") if source.scores else ("index", "sample")
    lacks += [f"a method {x} ({reader.__name__}.{x})" for x in methods if is_missing(reader, x)]
    kind, row = reader.prediction_kind, BENCHMARKS.get(name)
    if source.scores and not kind:
        lacks.append(f"the kind of its predictions ({reader.__name__}.prediction_kind)")
    elif source.scores and kind not in LAYOUTS:
        lacks.append(f'a layout "{kind}" of its predictions (prediction_files.LAYOUTS)')
    if source.scores and kind and not (row or kind in BY_KIND):
        lacks.append(f'how it is scored (evaluation/benchmarks.py BENCHMARKS["{name}"])')
    if row and not row.scoring.protocols:
        lacks.append(f'how its metrics are counted (BENCHMARKS["{name}"].scoring.protocols)')
    if row and not source.scores:
        lacks.append(f'what it is scored as (datasets/sources.py SOURCES["{name}"].scores)')
    return lacks


def is_missing(reader: type[Dataset], method: str) -> bool:
    return getattr(reader, method) is getattr(Dataset, method)


def lacks_of_task(name: str) -> list[str]:
    """What a task of TASKS lacks, with all that its sets do."""
    task, lacks, here = TASKS[name], [], f'tasks.py TASKS["{name}"]'
    kinds = ("questions", "answers") if task.has_masks else ()
    lacks += [f"{x} ({here}.phrasings)" for x in kinds if not task.phrasings.get(x)]
    if not task.requests:
        lacks.append(f"a word of the command line ({here}.requests)")
    for word, request in task.requests.items():
        way, threshold = request.post_processing, request.threshold
        if way not in ("none", *POST_PROCESSING):
            lacks.append(f'a way "{way}" to make masks of "{word}" (inference.POST_PROCESSING)')
        if threshold not in ("", "shown", *CHOICES):
            lacks.append(f'a field "{threshold}" for the threshold of "{word}" (inference.CHOICES)')
        if not request.example:
            lacks.append(f'an example ({here}.requests["{word}"].example)')
    own = [key for key, source in SOURCES.items() if source.task == name]
    if all(SOURCES[key].scores for key in own):
        lacks.append(f'a set to train on (datasets/sources.py SOURCES, task="{name}")')
    if not any(SOURCES[key].scores for key in own):
        lacks.append("a set that scores it (datasets/sources.py SOURCES, scores=)")
    return lacks + [f"of its set {key} {lack}" for key in own for lack in lacks_of_set(key)]


def message(kind: str, name: str, lacks: list[str]) -> str:
    return f"{kind} {name!r} lacks: {', '.join(lacks)}" if lacks else ""


@pytest.mark.parametrize("name", TASKS)
def test_no_task_lacks_anything(name):
    lacks = lacks_of_task(name)
    assert not lacks, message("task", name, lacks)


@pytest.mark.parametrize("name", SOURCES)
def test_no_set_lacks_anything(name):
    lacks = lacks_of_set(name)
    assert not lacks, message("set", name, lacks)


# ---- made-up ones --------------------------------------------------------------------------------


@pytest.fixture
def tables() -> Iterator[None]:
    """The tables are put back as they were."""
    before = [dict(table) for table in TABLES]
    yield
    for table, content in zip(TABLES, before, strict=True):
        table.clear()
        table.update(content)


def test_a_task_without_its_parts_is_told_completely(tables):
    TASKS["count"] = Task({}, "text", {}, (40, 10, 1))
    assert message("task", "count", lacks_of_task("count")) == (
        "task 'count' lacks: "
        'questions (tasks.py TASKS["count"].phrasings), '
        'answers (tasks.py TASKS["count"].phrasings), '
        'a word of the command line (tasks.py TASKS["count"].requests), '
        'a set to train on (datasets/sources.py SOURCES, task="count"), '
        "a set that scores it (datasets/sources.py SOURCES, scores=)"
    )
    phrasings = {"questions": ["Count {phrases}."], "answers": ["<SEG>"]}
    TASKS["count"] = Task(phrasings, "text", {"count": Request("tally", "", "most")}, (40, 10, 1))
    SOURCES["count"] = Source("count", "counts", "count.json", about="numbers")
    SOURCES["count_val"] = Source("count", "counts", "count_val.json", scores="count")
    assert message("task", "count", lacks_of_task("count")) == (
        "task 'count' lacks: "
        'a way "tally" to make masks of "count" (inference.POST_PROCESSING), '
        'a field "most" for the threshold of "count" (inference.CHOICES), '
        'an example (tasks.py TASKS["count"].requests["count"].example), '
        'of its set count a reader of "counts" (datasets/registry.py READERS), '
        'of its set count_val a reader of "counts" (datasets/registry.py READERS), '
        "of its set count_val what has to lie there "
        '(datasets/sources.py SOURCES["count_val"].about)'
    )


def test_a_set_without_its_parts_is_told_completely(tables):
    class Counts(Dataset):
        pass

    SOURCES["mine"] = Source("tally", "mine", "", scores="refer", post_processing="sum")
    READERS["mine"] = Counts
    assert message("set", "mine", lacks_of_set("mine")) == (
        "set 'mine' lacks: "
        'a task "tally" (tasks.py TASKS), '
        'a file of annotations (datasets/sources.py SOURCES["mine"].annotations), '
        'what has to lie there (datasets/sources.py SOURCES["mine"].about), '
        'a way "sum" to make masks (inference.POST_PROCESSING), '
        "a method index (Counts.index), a method sample (Counts.sample), "
        "a method key (Counts.key), the kind of its predictions (Counts.prediction_kind)"
    )
    Counts.prediction_kind = "tally"
    assert lacks_of_set("mine")[-2:] == [
        'a layout "tally" of its predictions (prediction_files.LAYOUTS)',
        'how it is scored (evaluation/benchmarks.py BENCHMARKS["mine"])',
    ]
    BENCHMARKS["coco_vgd"] = Benchmark("", BY_KIND["mask"], {})
    lack = 'what it is scored as (datasets/sources.py SOURCES["coco_vgd"].scores)'
    assert lacks_of_set("coco_vgd") == [lack]


def test_a_run_names_what_a_set_or_task_lacks(tables, world, speaking_model):
    SOURCES["mine"] = replace(SOURCES["coco_instance_val"], task="tally")
    with pytest.raises(ValueError, match="set mine: TASKS has no 'tally'"):
        read_dataset("mine", world / "data")
    SOURCES["mine"] = replace(SOURCES["coco_instance_val"], format="tally")
    with pytest.raises(ValueError, match="set mine: READERS has no 'tally'"):
        read_dataset("mine", world / "data")
    TASKS["tally"] = replace(TASKS["refer"], phrasings={"questions": ["Count {phrases}."]})
    with pytest.raises(ValueError, match=r"TASKS\['tally'\] has no answers"):
        reply("tally", np.random.default_rng(0))
    TASKS["tally"] = replace(TASKS["refer"], requests={"tally": Request("tally", "")})
    with pytest.raises(ValueError, match="no post-processing 'tally'"):
        speaking_model.predict(np.zeros((60, 60, 3), np.uint8), "tally", "ring")


# ---- the examples of docs/adding.md --------------------------------------------------------------


def load(name: str) -> ModuleType:
    """An example as a module: it fills the tables and runs nothing."""
    spec = importlib.util.spec_from_file_location(name, FORKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_examples_lack_nothing(tables):
    for name in EXAMPLES:
        load(name)
    assert not lacks_of_task("count") + lacks_of_task("refer")
    sets = ("blocks", "blocks_val", "count", "count_val")
    assert {name: lacks_of_set(name) for name in sets} == {name: [] for name in sets}


def test_a_new_task_is_known_wherever_tasks_are_listed(tables, model, tmp_path):
    load("new_task")
    assert sets_by_task()["count"] == scored_sets(["count"], tmp_path) == ["count_val"]
    assert "count" in requests() and "--tasks" in evaluate.build_parser().format_help()
    listed = predict.build_parser().format_help()
    assert 'python -m xsam.predict count "ring" --image drawing.jpg --checkpoint DIR' in listed
    assert Engine(model).describe()["tasks"]["count"] == {"needs": "text", "is_available": True}
    mine = {"count": {"questions": ["How many {phrases}?"]}}
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    assert (
        read_phrasings(tmp_path / "mine.json")["count"]["questions"] == mine["count"]["questions"]
    )
    assert usual_sample(toy(), "count") == ("count", 40, 10, 1)
    config = toy().resolve(stages=(3,), datasets=("count",))
    assert list(plan.planned_samples(config, 3)) == ["generic, usual text", "generic, longest text"]


def test_a_new_task_may_be_answered_in_words_alone(tables, speaking_model):
    asked = {"questions": ["Describe this image."], "answers": ["It is so."]}
    request = {"caption": Request("none", "--image photo.jpg")}
    TASKS["caption"] = Task(asked, "image", request, (20, 9, 0), has_masks=False)
    result = speaking_model.predict(np.zeros((30, 40, 3), np.uint8), "caption")
    assert result.answer == "<SEG>" and result.masks.shape == (0, 30, 40)


def test_a_line_of_a_new_format_that_is_wrong_is_named(tables, tmp_path):
    load("new_dataset").draw_blocks(tmp_path / "blocks", "train", 1)
    path = tmp_path / "blocks" / "train.jsonl"
    path.write_text(path.read_text() + '\n{"image": 3}\n{"image"')
    dataset = read_dataset("blocks", tmp_path)
    assert (
        len(dataset) == 2
        and [each.partition(": line ")[0] for each in dataset.problems] == [str(path)] * 2
    )
    assert "line 3: 'image': expected str" in dataset.problems[0]
    assert "line 4: not valid JSON" in dataset.problems[1]


@pytest.mark.parametrize(
    ("name", "task", "figures"),
    [
        ("new_dataset", "refer", {"cIoU blocks_val", "gIoU blocks_val"}),
        ("new_task", "count", {"right", "error"}),
    ],
)
def test_an_example_trains_is_scored_and_answers(world, tmp_path, name, task, figures):
    shutil.copytree(world / "weights", tmp_path / "weights")
    command = [sys.executable, FORKS / f"{name}.py", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines]
    assert [each["task"] for each in losses] == [task] * 3
    assert all(each["mask"] > 0 and each["text"] > 0 for each in losses)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert set(results[task]) == figures and None not in results[task].values()
    assert (tmp_path / "answer.png").stat().st_size


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_page_tells_the_number_of_lines(name):
    said = re.search(r"lines touched: (\d+)", (FORKS / f"{name}.py").read_text(encoding="utf-8"))
    assert f"[forks/{name}.py](forks/{name}.py) ({said[1]} lines)" in PAGE.replace("\n", " ")


def test_the_page_shows_what_the_examples_hold():
    held = [(FORKS / f"{name}.py").read_text(encoding="utf-8") for name in EXAMPLES]
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) > 4
    for block in blocks:
        assert any(block.strip() in text for text in held), block
