"""The training command as a user runs it: errors, one process against two. What happens to it from
outside is in test_faults.py."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import faulty_train
import pytest

from xsam.train import MOST_WORDS, draw_batches

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "xsam" / "train.py")
SMALL = ["--global_batch_size", 4, "--micro_batch_size", 2, "--num_points", 64]


def command(*flags: object, processes: int = 0) -> list[str]:
    """`processes` of torchrun; 0: without it."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, SCRIPT, *map(str, flags)]


def train(*flags: object, processes: int = 0) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*flags, processes=processes), capture_output=True, text=True, env=environment
    )


def here(*flags: object) -> int:
    """The command in this process, which has imported what it needs; its status."""
    return faulty_train.main({}, list(map(str, flags)))


def toy_flags(world: Path, out: Path, stage: int | str) -> list[object]:
    flags = ["--config", "toy", "--stage", stage, "--data", world / "data"]
    return [*flags, "--weights", world / "weights", "--out", out, "--eval_tasks", "", *SMALL]


def metrics(out: Path, stage: int) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["stage"] == stage]


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [0, 2])
def test_missing_paths_are_listed_once_and_exit_is_2(tmp_path, processes):
    started = time.perf_counter()
    roots = ["--data", tmp_path / "d", "--weights", tmp_path / "w", "--out", tmp_path / "o"]
    result = train("--stage", 3, *roots, processes=processes)
    assert time.perf_counter() - started < 60  # a hang, not a slow machine
    for path in (
        "d/img_genseg/coco2017/annotations/panoptic_train2017.json",
        "d/img_genseg/coco2017/panoptic_train2017",
        "d/img_refseg/refcocos/refcocog/refs(umd).p",
        "d/img_chat/llava/llava_images",
        "w/siglip2-so400m-patch14-384",
        "w/Phi-3-mini-4k-instruct",
        "o/stage1/latest",
        "o/stage2/latest",
    ):
        assert result.stderr.count(f"  {tmp_path / path}\n") == 1
    if processes == 0:
        assert result.returncode == 2
    else:  # torchrun itself always reports a failed worker with status 1
        assert result.returncode == 1 and "exitcode  : 2" in result.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stage", "1", "--no_such_flag", "3"], "--no_such_flag"),
        (["--stage", "4"], "invalid choice: '4'"),
        (["--stage", "1", "--global_batch_size", "6"], "not a multiple of micro_batch_size 4"),
        (["--stage", "1", "--num_queries", "many"], "--num_queries"),
    ],
)
def test_wrong_flags_exit_with_2(flags, message):
    result = train(*flags)
    assert result.returncode == 2 and message in result.stderr


def test_checkpoints_are_not_overwritten_or_mixed_up(world, tmp_path, capsys):
    assert here(*toy_flags(world, tmp_path, 1), "--max_steps", 1) == 0
    assert here(*toy_flags(world, tmp_path, 1), "--max_steps", 1) == 2
    assert "--resume" in capsys.readouterr().err
    assert here(*toy_flags(world, tmp_path, 1), "--num_queries", 7, "--resume") == 2
    assert "num_queries is 20, here 7" in capsys.readouterr().err
    (tmp_path / "stage1").rename(tmp_path / "stage2")
    assert here(*toy_flags(world, tmp_path, 2), "--resume", "--starts_from", "") == 2
    assert "a checkpoint of stage 1, needed is stage 2" in capsys.readouterr().err


def damaged_coco(world: Path, data: Path, every: int) -> Path:
    """COCO panoptic with each `every`-th training image cut short; the folder of the images."""
    folder = data / "img_genseg/coco2017"
    folder.mkdir(parents=True)
    for entry in (world / "data/img_genseg/coco2017").iterdir():
        if entry.name != "train2017":
            (folder / entry.name).symlink_to(entry)
    (folder / "train2017").mkdir()
    images = sorted((world / "data/img_genseg/coco2017/train2017").iterdir())
    for number, image in enumerate(images):
        length = 200 if number % every == 0 else None
        (folder / "train2017" / image.name).write_bytes(image.read_bytes()[:length])
    return folder / "train2017"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_image_ends_the_run_and_is_named(world, tmp_path, num_workers, capsys):
    folder = damaged_coco(world, tmp_path / "data", 1)
    flags = toy_flags(world, tmp_path / "out", 1)
    flags[flags.index(world / "data")] = tmp_path / "data"
    assert here(*flags, "--num_workers", num_workers) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (message,) = [line for line in error.splitlines() if line.startswith("xsam/train.py")]
    assert str(folder) in message and "cannot be read" in message


def test_a_word_that_the_tokenizer_lacks_is_named_once(capsys):
    words = [{"helmet": "a/1"}, {"helmet": "a/2", "cup": "b/1"}, {}]
    words += [{f"w{number}": "c/1"} for number in range(2 * MOST_WORDS)]
    loader = [SimpleNamespace(unknown=each) for each in words]
    assert list(draw_batches(loader)) == loader
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == MOST_WORDS
    assert lines[0].startswith("a/1: the tokenizer lacks 'helmet'") and "'cup'" in lines[1]


def test_bad_records_are_skipped_and_counted_on_request(world, tmp_path, capsys):
    folder = damaged_coco(world, tmp_path / "data", 3)
    losses = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        flags = toy_flags(world, out, 1)
        flags[flags.index(world / "data")] = tmp_path / "data"
        assert here(*flags, "--skip-bad", "--max_steps", 6, "--num_workers", workers) == 0
        output = capsys.readouterr().out
        reasons = [line for line in output.splitlines() if "skipped: " in line]
        assert reasons and all(str(folder) in line for line in reasons)
        assert f"{len(reasons)} samples were skipped" in output
        losses.append([record["loss"] for record in metrics(out, 1)])
    assert len(losses[0]) == 6 and losses[0] == losses[1]


# ---- the same run --------------------------------------------------------------------------------


def test_one_process_of_torchrun_trains_as_one_alone(world, tmp_path):
    """In a process group, with DDP and sharded states: what eight GPUs run, tried on one."""
    for processes in (0, 1):
        flags = toy_flags(world, tmp_path / str(processes), 1)
        result = train(*flags, "--max_steps", 4, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
    alone, launched = (
        [(step["loss"], step["grad_norm"]) for step in metrics(tmp_path / name, 1)] for name in "01"
    )
    assert len(alone) == 4 and alone == launched


def test_two_processes_train_as_one(world, tmp_path):
    """Same seed and global batch, all stages: at step 1 to 1e-5, after 20 steps to 1e-3."""
    for processes in (0, 2):
        flags = toy_flags(world, tmp_path / str(processes), "all")
        result = train(*flags, "--max_steps", 20, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
    for stage in (1, 2, 3):
        one, two = metrics(tmp_path / "0", stage), metrics(tmp_path / "2", stage)
        assert [record["task"] for record in one] == [record["task"] for record in two]
        assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
        assert len(one) == len(two) == 20
        assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=1e-3)
