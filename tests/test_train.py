"""The training command as a user runs it: errors, one process against two, kill and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xsam.config import Stage, toy
from xsam.train import build_optimizer, drop_metrics, learning_rate, pretrained_model, schedule

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "xsam" / "train.py")


def command(*flags: object, processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, SCRIPT, *map(str, flags)]


def train(*flags: object, processes: int = 1) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*flags, processes=processes), capture_output=True, text=True, env=environment
    )


def toy_flags(world: Path, out: Path, stage: int | str) -> list[object]:
    flags = ["--config", "toy", "--stage", stage, "--data", world / "data"]
    return [*flags, "--weights", world / "weights", "--out", out, "--eval_tasks", ""]


def metrics(out: Path, stage: int) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["stage"] == stage]


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
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
    if processes == 1:
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


def test_checkpoints_are_not_overwritten_or_mixed_up(world, tmp_path):
    assert train(*toy_flags(world, tmp_path, 1), "--max_steps", 1).returncode == 0
    again = train(*toy_flags(world, tmp_path, 1), "--max_steps", 1)
    assert again.returncode == 2 and "--resume" in again.stderr
    other = train(*toy_flags(world, tmp_path, 1), "--num_queries", 7, "--resume")
    assert other.returncode == 2 and "num_queries is 20, here 7" in other.stderr
    (tmp_path / "stage1").rename(tmp_path / "stage2")
    swapped = train(*toy_flags(world, tmp_path, 2), "--resume", "--starts_from", "")
    assert (
        swapped.returncode == 2 and "a checkpoint of stage 1, needed is stage 2" in swapped.stderr
    )


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
def test_a_corrupt_image_ends_the_run_and_is_named(world, tmp_path, num_workers):
    folder = damaged_coco(world, tmp_path / "data", 1)
    flags = toy_flags(world, tmp_path / "out", 1)
    flags[flags.index(world / "data")] = tmp_path / "data"
    result = train(*flags, "--num_workers", num_workers)
    assert result.returncode == 2
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("xsam/train.py")]
    assert str(folder) in message and "cannot be read" in message


def test_bad_records_are_skipped_and_counted_on_request(world, tmp_path):
    folder = damaged_coco(world, tmp_path / "data", 3)
    losses = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        flags = toy_flags(world, out, 1)
        flags[flags.index(world / "data")] = tmp_path / "data"
        result = train(*flags, "--skip-bad", "--max_steps", 3, "--num_workers", workers)
        assert result.returncode == 0, result.stderr
        reasons = [line for line in result.stdout.splitlines() if "left out: " in line]
        assert reasons and all(str(folder) in line for line in reasons)
        assert f"{len(reasons)} samples were left out" in result.stdout
        losses.append([record["loss"] for record in metrics(out, 1)])
    assert len(losses[0]) == 3 and losses[0] == losses[1]


# ---- the same run --------------------------------------------------------------------------------


def test_two_processes_train_as_one(world, tmp_path):
    """Same seed and global batch, all stages: at step 1 to 1e-5, after 20 steps to 1e-3."""
    for processes in (1, 2):
        flags = toy_flags(world, tmp_path / str(processes), "all")
        result = train(*flags, "--max_steps", 20, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
    for stage in (1, 2, 3):
        one, two = metrics(tmp_path / "1", stage), metrics(tmp_path / "2", stage)
        assert [record["task"] for record in one] == [record["task"] for record in two]
        assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
        assert len(one) == len(two) == 20
        assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=1e-3)


def test_killed_and_resumed_equals_uninterrupted(world, tmp_path):
    flags = ["--max_steps", 9, "--save_every", 3]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(*toy_flags(world, whole, 1), *flags).returncode == 0

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = command(*toy_flags(world, killed, 1), *flags)
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
    while not (killed / "metrics.jsonl").exists() or len(metrics(killed, 1)) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = (killed / "stage1/latest").read_text()
    assert reached in ("step_3", "step_6")  # in the middle

    result = train(*toy_flags(world, killed, 1), *flags, "--resume")
    assert result.returncode == 0 and f"resumed from {killed / 'stage1' / reached}" in result.stdout
    one, two = (load_file(out / "stage1/step_9/model.safetensors") for out in (whole, killed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [[record["loss"] for record in metrics(out, 1)] for out in (whole, killed)]
    assert losses[0] == losses[1]


# ---- parts ---------------------------------------------------------------------------------------


def test_learning_rate_goes_by_the_longest_prefix_and_zero_freezes(world):
    config = toy()
    model = pretrained_model(3, config, world / "weights")
    stage = Stage(learning_rates={"": 1e-3, "llm": 0.0, "segmentor.encoder": 2e-4}, datasets=())
    assert learning_rate("segmentor.encoder.pos_embed", stage) == 2e-4
    assert learning_rate("segmentor.decoder.x", stage) == 1e-3
    optimizer = build_optimizer(model, stage, "")
    assert not any(parameter.requires_grad for parameter in model.llm.parameters())
    grouped = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(trainable)
    assert grouped[id(model.segmentor.encoder.pos_embed)]["peak_lr"] == 2e-4
    assert grouped[id(model.llm_projector.model[0].bias)]["weight_decay"] == 0
    assert grouped[id(model.llm_projector.model[0].weight)]["weight_decay"] == stage.weight_decay


def test_schedule_rises_to_the_peak_and_falls_to_zero():
    factors = [schedule(step, 100, 0.03) for step in range(101)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert max(factors) == 1.0 and factors[100] == pytest.approx(0.0)
    assert factors[3:] == sorted(factors[3:], reverse=True)


def test_drop_metrics_keeps_what_comes_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"stage": stage, "step": step} for stage in (1, 2) for step in range(4)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"stage": 2, "st')
    drop_metrics(path, 2, 1)
    assert list(map(json.loads, path.read_text().splitlines())) == records[:5]
