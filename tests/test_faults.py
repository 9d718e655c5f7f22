"""What happens to a run from outside: kills, signals, lost ranks, full disks, losses that are not
numbers, another number of ranks. It goes on from its last checkpoint as if nothing had been.

Fifty kills, a line each: pytest -m slow tests/test_faults.py -k fifty -s
"""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import faulty_train
import pytest
import torch
from processes import PATIENCE, ROOT, finish, kill, killed_at, start_command, start_ranks
from safetensors.torch import load_file
from torch import nn

from xsam.checkpoints import latest_checkpoint, list_states, read_header, save_checkpoint
from xsam.config import Config
from xsam.data import Mixture, Processor
from xsam.datasets.registry import open_dataset

SCRIPT = ROOT / "xsam/train.py"
STEPS = 12
SMALL = ["--global_batch_size", 4, "--micro_batch_size", 2, "--num_points", 64]
SHORT = [*SMALL, "--max_steps", STEPS, "--save_every", 4]
ENDLESS = [*SMALL, "--max_steps", 5000, "--save_every", 4]


# ---- runs ----------------------------------------------------------------------------------------


def toy_flags(world: Path, out: Path, stage: int, *flags: object) -> list[str]:
    all_flags = ["--config", "toy", "--stage", stage, "--data", world / "data", "--out", out]
    all_flags += ["--weights", world / "weights", "--eval_tasks", "", *flags]
    if stage > 1:
        all_flags += ["--starts_from", ""]
    return list(map(str, all_flags))


def here(*flags: str) -> int:
    """The command in this process; the status that it exits with."""
    return faulty_train.main({}, list(flags))


def run_ranks(
    out: Path, flags: list[str], world_size: int = 1, faults: dict | None = None
) -> tuple[list[int | None], str]:
    """Statuses of the ranks, and what they printed."""
    log = out.with_name(f"{out.name}.log")
    log.unlink(missing_ok=True)
    processes = start_ranks(log, faulty_train.main, faults or {}, flags, world_size=world_size)
    return finish(processes), log.read_text()


def metrics(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def num_lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process: BaseProcess, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)


def newest_step(out: Path, stage: int = 1) -> int:
    found = latest_checkpoint(out / f"stage{stage}")
    return int(found.name.removeprefix("step_")) if found else 0


def tensor_files(out: Path, step: int, stage: int = 1) -> dict[str, bytes]:
    folder = out / f"stage{stage}" / f"step_{step}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def assert_whole(checkpoint: Path) -> None:
    assert checkpoint.name == f"step_{read_header(checkpoint)['step']}"
    assert list_states(checkpoint) and load_file(checkpoint / "model.safetensors")


def assert_same_run(out: Path, other: Path, step: int = STEPS) -> None:
    """Weights and the optimizer's states bit for bit; every step once, with the same losses."""
    one, two = tensor_files(out, step), tensor_files(other, step)
    assert len(one) >= 2 and one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    losses = [[(row["step"], row["loss"]) for row in metrics(each)] for each in (out, other)]
    assert losses[0] == losses[1] and [at for at, _ in losses[0]] == list(range(step))


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert here(*toy_flags(world, out, 1, *SHORT)) == 0
    return out


@pytest.fixture(scope="module")
def uninterrupted_two(world, tmp_path_factory) -> Path:
    """By two ranks."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    statuses, output = run_ranks(out, toy_flags(world, out, 1, *SHORT), 2)
    assert statuses == [0, 0], output
    return out


# ---- kills ---------------------------------------------------------------------------------------


def tiny_model(step: int) -> nn.Module:
    model = nn.Linear(3, 2)
    model.prefix = "segmentor."
    nn.init.constant_(model.weight, step)
    return model


def save_step(folder: Path, config: Config, step: int) -> None:
    model = tiny_model(step)
    states = {"segmentor.weight:exp_avg": torch.full((2, 3), float(step))}
    save_checkpoint(folder, model, config, None, 1, step, states)


def test_killed_at_any_operation_of_saving_leaves_whole_checkpoints(tmp_path, config):
    config = config.resolve(keep_checkpoints=2)
    reached = []
    for operation in range(1000):
        folder = tmp_path / f"stage{operation}"
        for step in (1, 2):
            save_step(folder, config, step)
        if not killed_at(operation, lambda folder=folder: save_step(folder, config, 3)):
            break
        for each in folder.glob("step_*"):
            assert_whole(each)
            weight = load_file(each / "model.safetensors")["segmentor.weight"]
            assert weight.unique().tolist() == [int(each.name.removeprefix("step_"))]
        step = newest_step(tmp_path, operation)
        assert step in (2, 3)
        reached.append(step)
        for later in range(step + 1, 5):  # as a resumed run does
            save_step(folder, config, later)
        assert latest_checkpoint(folder).name == "step_4"
        assert (folder / "latest").read_text() == "step_4"
        assert not list(folder.glob(".*"))  # what the kill left
    else:
        raise AssertionError("saving does not end")
    assert reached == sorted(reached) and set(reached) == {2, 3} and len(reached) > 10


def unfinished(out: Path, suffix: str = "") -> set[tuple[str, int]]:
    """What saving has under another name for the time being, and when that changed."""
    found = set()
    for path in (out / "stage1").glob(f".*{suffix}"):
        with contextlib.suppress(FileNotFoundError):  # just now
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def await_drawn_moment(process: BaseProcess, out: Path, rng: random.Random, old_file: int) -> str:
    """A run that starts, trains or saves; which of them was aimed at. `old_file` is the file of the
    metrics before the run, which begins by writing it anew."""
    path, first_step = out / "metrics.jsonl", newest_step(out)
    (aim,) = rng.choices(("starting", "training", "saving"), (1, 3, 6))
    if aim == "starting":
        time.sleep(rng.uniform(0, 2))
        return aim
    wait_for(process, lambda: path.exists() and path.stat().st_ino != old_file)
    steps = first_step + rng.randint(1, 4)
    wait_for(process, lambda: num_lines(out) >= steps)
    if aim == "training":
        time.sleep(rng.uniform(0, 0.2))
    else:
        num_saved = len(list((out / "stage1").glob("step_*")))
        suffix = rng.choice((".tmp", ".old")) if num_saved > 1 else ".tmp"  # one is removed
        left = unfinished(out, suffix)  # by the kill before
        wait_for(process, lambda: unfinished(out, suffix) - left)
        time.sleep(rng.choice((0, rng.uniform(0, 0.04))))
    return aim


def kill_again_and_again(
    start: Callable[[], BaseProcess], out: Path, num_kills: int, seed: int
) -> Iterator[tuple[str, bool, int, int]]:
    """Yields of each kill what it was aimed at, whether it fell into saving, the newest step that
    had been saved before and the one that is found after."""
    rng = random.Random(seed)
    for _ in range(num_kills):
        path = out / "metrics.jsonl"
        old_file = path.stat().st_ino if path.exists() else 0
        first_step, left = newest_step(out), unfinished(out)
        process = start()
        try:
            aim = await_drawn_moment(process, out, rng, old_file)
            saved = newest_step(out)
        finally:
            kill([process])
        assert process.exitcode == -signal.SIGKILL
        for each in (out / "stage1").glob("step_*"):
            assert_whole(each)
        assert newest_step(out) >= saved >= first_step
        yield aim, bool(unfinished(out) - left), saved, newest_step(out)


def kills_change_nothing(
    world: Path,
    tmp_path: Path,
    num_kills: int,
    save_every: int,
    start: Callable[[Path, list[str]], BaseProcess],
) -> None:
    num_steps = 6 * num_kills
    flags = [*SMALL, "--global_batch_size", 2, "--max_steps", num_steps]
    flags += ["--save_every", save_every]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert here(*toy_flags(world, whole, 1, *flags)) == 0
    arguments = toy_flags(world, out, 1, *flags, "--resume")
    started = time.monotonic()
    rows = []
    run = lambda: start(tmp_path / "log", arguments)  # noqa: E731
    for row in kill_again_and_again(run, out, num_kills, seed=0):
        rows.append(row)
        aim, in_saving, saved, found = row
        print(
            f"kill {len(rows):2} after {time.monotonic() - started:5.1f} s, aimed at {aim}: "
            f"{'in the midst of saving' if in_saving else 'not in saving':22}; "
            f"step_{saved} was there, step_{found} is found"
        )
    assert here(*arguments) == 0
    assert_same_run(out, whole, num_steps)
    print(
        f"{num_kills} kills in {time.monotonic() - started:.0f} s, {sum(row[1] for row in rows)} "
        f"in the midst of saving, {sum(row[3] > row[2] for row in rows)} as a checkpoint got its "
        f"name; {num_steps} steps, weights and optimizer bit for bit those of a run that was let be"
    )
    assert any(row[1] for row in rows)


def test_killed_again_and_again_equals_uninterrupted(world, tmp_path):
    def start(log: Path, arguments: list[str]) -> BaseProcess:
        return start_ranks(log, faulty_train.main, {}, arguments)[0]

    kills_change_nothing(world, tmp_path, 3, 1, start)


@pytest.mark.slow
def test_fifty_kills_of_the_command_change_nothing(world, tmp_path):
    def start(log: Path, arguments: list[str]) -> BaseProcess:
        return start_command(log, SCRIPT, *arguments)

    kills_change_nothing(world, tmp_path, 50, 2, start)


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, to_group, workers",
    [
        (signal.SIGTERM, False, 0),
        (signal.SIGINT, True, 2),  # Ctrl-C
        (signal.SIGTERM, True, 2),  # a job's end, to all its processes
    ],
)
def test_a_signal_saves_and_ends_the_run(world, tmp_path, uninterrupted, number, to_group, workers):
    out, log = tmp_path / "out", tmp_path / "log"
    flags = toy_flags(world, out, 1, *SHORT, "--num_workers", workers)
    (process,) = start_ranks(log, faulty_train.main, {}, flags)
    wait_for(process, lambda: num_lines(out) >= 2)
    (os.killpg if to_group else os.kill)(process.pid, number)
    assert finish([process]) == [128 + number], log.read_text()
    step = newest_step(out)
    assert 2 < step < STEPS
    name, saved = signal.Signals(number).name, out / f"stage1/step_{step}"
    assert f"xsam/train.py: {name}: saved {saved}; go on with --resume\n" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert here(*flags, "--resume") == 0
    assert_same_run(out, uninterrupted)


def test_a_signal_to_one_rank_saves_and_ends_all(world, tmp_path, uninterrupted_two):
    out, log = tmp_path / "out", tmp_path / "log"
    flags = toy_flags(world, out, 1, *SHORT)
    processes = start_ranks(log, faulty_train.main, {}, flags, world_size=2)
    wait_for(processes[0], lambda: num_lines(out) >= 2)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes) == [128 + signal.SIGTERM] * 2, log.read_text()
    step = newest_step(out)
    assert 2 < step < STEPS
    assert log.read_text().count(f"SIGTERM: saved {out / f'stage1/step_{step}'}; go on") == 1
    statuses, output = run_ranks(out, [*flags, "--resume"], 2)
    assert statuses == [0, 0], output
    assert_same_run(out, uninterrupted_two)


def test_a_signal_to_torchrun_saves_and_ends_the_run(world, tmp_path, uninterrupted_two):
    out, log = tmp_path / "out", tmp_path / "log"
    flags = toy_flags(world, out, 1, *SHORT)
    process = start_command(log, SCRIPT, *flags, processes=2)
    wait_for(process, lambda: num_lines(out) >= 2)
    os.kill(process.pid, signal.SIGTERM)
    (status,) = finish([process])
    step = newest_step(out)
    assert status not in (None, 0) and 2 < step < STEPS, log.read_text()
    assert f"SIGTERM: saved {out / f'stage1/step_{step}'}; go on" in log.read_text()
    statuses, output = run_ranks(out, [*flags, "--resume"], 2)
    assert statuses == [0, 0], output
    assert_same_run(out, uninterrupted_two)


# ---- lost ranks ----------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_a_killed_rank_ends_the_job_with_the_cause(world, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    process = start_command(log, SCRIPT, *toy_flags(world, out, 1, *ENDLESS), processes=2)
    wait_for(process, lambda: newest_step(out) >= 4)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    started = time.monotonic()
    (status,) = finish([process], 60)
    print(f"the job ended after {time.monotonic() - started:.1f} s")
    assert status == 1 and "Signal 9 (SIGKILL)" in log.read_text()
    step = newest_step(out)
    flags = toy_flags(world, out, 1, *ENDLESS, "--max_steps", step + 2, "--resume")
    assert here(*flags) == 0
    assert [row["step"] for row in metrics(out)] == list(range(step + 2))


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_rank_that_stands_still_ends_the_others(world, tmp_path, stopped):
    """Nothing but the heartbeat sees it: its connections stay open. Rank 0 has the job's store."""
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = {"beat": 0.2, "lost": 4.0}, toy_flags(world, out, 1, *ENDLESS)
    processes = start_ranks(log, faulty_train.main, *arguments, world_size=2)
    try:
        wait_for(processes[0], lambda: num_lines(out) >= 2)
        os.kill(processes[stopped].pid, signal.SIGSTOP)
        started = time.monotonic()
        processes[1 - stopped].join(60)
        print(f"the other ended after {time.monotonic() - started:.1f} s")
        assert processes[1 - stopped].exitcode == 1
    finally:
        kill(processes)
    output = log.read_text()
    assert f"xsam: rank {1 - stopped} ends: " in output
    if stopped == 1:
        who = f"rank 1 ({socket.gethostname()}, process {processes[1].pid})"
        assert f"{who} gave no sign of life for 4 s\n" in output


# ---- another number of ranks ---------------------------------------------------------------------


def sample_sequence(mixture: Mixture, world_size: int, num_micro_batches: int) -> list[tuple]:
    """What is drawn from global batch 5 on, a micro-batch of each rank in turn."""
    ranks = [mixture.micro_batches(5, rank, world_size) for rank in range(world_size)]
    return [
        (draw.dataset, draw.index, draw.epoch, draw.place)
        for _ in range(num_micro_batches // world_size)
        for rank in ranks
        for draw in next(rank)
    ]


def test_any_number_of_ranks_sees_the_same_samples(world, config, model):
    stage = config.resolve(micro_batch_size=2).stages[3]
    datasets = [open_dataset(name, world / "data") for name in stage.datasets]
    mixture = Mixture(datasets, Processor(config, model.tokenizer), stage, seed=0)
    count = 4 * 2 * len(mixture)
    one, two, four = (sample_sequence(mixture, size, count) for size in (1, 2, 4))
    assert one == two == four and len({epoch for _, _, epoch, _ in one}) > 1
    first, second = mixture.micro_batches(5, 0, 2), mixture.micro_batches(5, 1, 2)
    of_first = [draw for _ in range(40) for draw in next(first)]
    assert not {*of_first} & {draw for _ in range(40) for draw in next(second)}


def test_resumed_on_more_and_fewer_ranks(world, tmp_path):
    """Two ranks save in the middle; one and four go on as the two did."""
    flags = ["--micro_batch_size", 2, "--num_points", 64, "--max_steps", 8, "--save_every", 4]
    out = tmp_path / "2"
    statuses, output = run_ranks(out, toy_flags(world, out, 3, *flags), 2)
    assert statuses == [0, 0], output
    two = metrics(out)
    assert len({row["task"] for row in two}) >= 3
    for world_size in (1, 4):
        other = tmp_path / str(world_size)
        shutil.copytree(out / "stage3/step_4", other / "stage3/step_4")
        shutil.copy(out / "metrics.jsonl", other)
        statuses, output = run_ranks(
            other, toy_flags(world, other, 3, *flags, "--resume"), world_size
        )
        assert statuses == [0] * world_size, output
        assert f"resumed from {other / 'stage3/step_4'}" in output
        rows = metrics(other)
        assert [(row["step"], row["task"]) for row in rows] == [
            (row["step"], row["task"]) for row in two
        ]
        assert rows[:4] == two[:4] and rows[4:] != two[4:]
        for name in ("loss", "grad_norm"):
            figures = [[row[name] for row in each] for each in (rows, two)]
            assert figures[0] == pytest.approx(figures[1], rel=1e-4 if name == "loss" else 1e-3)
        of_each = [tensor_files(each, 8, 3) for each in (out, other)]
        assert [len(files) for files in of_each] == [3, world_size + 1]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_later_stage_goes_on(world, tmp_path, stage):
    """Stage 2 saves its projectors alone, and stage 3 all, on one process."""
    flags = [*SMALL, "--max_steps", 4, "--save_every", 2]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert here(*toy_flags(world, whole, stage, *flags)) == 0
    folder = f"stage{stage}/step_2"
    shutil.copytree(whole / folder, cut / folder)
    shutil.copy(whole / "metrics.jsonl", cut)
    assert here(*toy_flags(world, cut, stage, *flags, "--resume")) == 0
    assert tensor_files(whole, 4, stage) == tensor_files(cut, 4, stage)
    kept = ("step", "task", "loss", "grad_norm", "lr")
    rows = [[{name: row[name] for name in kept} for row in metrics(each)] for each in (whole, cut)]
    assert rows[0] == rows[1] and len(rows[0]) == 4


# ---- steps without a number ----------------------------------------------------------------------


def spoiled(output: str) -> list[str]:
    """What the faults say that they hit."""
    return re.findall("spoiled: (.*)$", output, re.MULTILINE)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_without_a_number_is_skipped_by_all(world, tmp_path, world_size, kind):
    out = tmp_path / "out"
    flags = ["--global_batch_size", 4, "--micro_batch_size", 1, "--num_points", 64]
    flags += ["--save_every", 1, "--keep_checkpoints", 99, "--num_workers", 0]
    flags = toy_flags(world, out, 1, *flags)
    a_step = 4 // world_size  # micro-batches of a rank
    calls = [a_step + 1, 3 * a_step]  # of steps 1 and 3
    faults = {"nan": kind, "calls": calls, "rank": world_size - 1, "hash": True}
    statuses, output = run_ranks(out, [*flags, "--max_steps", "5"], world_size, faults)
    assert statuses == [0] * world_size, output
    hashes = {(out / f"weights_{rank}").read_text() for rank in range(world_size)}
    assert len(hashes) == 1

    # nothing changes in a step that is skipped, and all else goes on
    rows = metrics(out)
    assert [row["skipped"] for row in rows] == [0, 1, 1, 2, 2]
    is_sound = [row["loss"] is not None and row["grad_norm"] is not None for row in rows]
    assert is_sound == [True, False, True, False, True]
    assert [row["loss"] is None for row in rows] == [kind == "loss" and not x for x in is_sound]
    for step in range(1, 5):
        before, after = tensor_files(out, step), tensor_files(out, step + 1)
        assert (before == after) == (step in (1, 3))

    # who is to blame
    messages = re.findall(r"step (\d) is skipped, (.*?); samples: (.*) \((\d) so far\)", output)
    assert [(step, count) for step, _, _, count in messages] == [("1", "1"), ("3", "2")]
    for (_, what, samples, _), culprits in zip(messages, spoiled(output), strict=True):
        if kind == "loss":
            assert what == "its loss is not finite" and samples == culprits
        else:  # by then the gradients are added up
            assert what == "its loss is finite, its gradient is not"
            assert culprits in samples.split(", ") and len(samples.split(", ")) == 4

    # the count goes on with --resume
    flags += ["--max_steps", "7", "--resume"]
    statuses, output = run_ranks(out, flags, world_size, faults | {"calls": [0]})
    assert statuses == [0] * world_size and "(3 so far)" in output, output
    assert [row["skipped"] for row in metrics(out)] == [0, 1, 1, 2, 2, 3, 3]
    assert all(math.isfinite(row["loss"]) for row in metrics(out)[6:])


def test_too_many_skipped_steps_end_the_run_once(world, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    flags = toy_flags(world, out, 1, *SHORT, "--save_every", 3, "--max_skipped_steps", 2)
    faults = {"nan": "loss", "calls": [2, 3, 4], "rank": 1}
    processes = start_ranks(log, faulty_train.main, faults, flags, world_size=2)
    assert finish(processes[:1]) == [2]
    kill(processes)  # as torchrun does
    output = log.read_text()
    message = (
        "xsam/train.py: 3 steps were skipped, max_skipped_steps is 2; the last: step 4 is skipped, "
        f"its loss is not finite; samples: {spoiled(output)[-1]}\n"
    )
    assert output.count(message) == 1 and output.count("xsam/train.py: ") == 1
    assert newest_step(out) == 3 and list_states(out / "stage1/step_3")
    assert here(*flags, "--resume") == 0
    assert metrics(out)[-1]["skipped"] == 1 and len(metrics(out)) == STEPS


# ---- a full disk ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Room for two checkpoints and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=18m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(world, small_disk, uninterrupted, capsys):
    out = small_disk / "out"
    assert here(*toy_flags(world, out, 1, *SHORT)) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("xsam/train.py")]
    assert f"{out / 'stage1/step_12'} could not be written" in line and "No space left" in line
    assert newest_step(out) == 8 and list_states(out / "stage1/step_8")
    assert not list((out / "stage1").glob(".step*"))
    assert here(*toy_flags(world, out, 1, *SHORT), "--resume") == 2  # before it trains
    assert "make room" in capsys.readouterr().err and len(metrics(out)) == STEPS
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert here(*toy_flags(world, out, 1, *SHORT), "--resume") == 0
    assert_same_run(out, uninterrupted)


def test_two_ranks_end_together_on_a_full_disk(world, small_disk, uninterrupted_two):
    out = small_disk / "out"
    statuses, output = run_ranks(out, toy_flags(world, out, 1, *SHORT), 2)
    assert statuses == [2, 2] and "No space left" in output, output
    assert newest_step(out) == 8 and not list((out / "stage1").glob(".step*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    statuses, output = run_ranks(out, toy_flags(world, out, 1, *SHORT, "--resume"), 2)
    assert statuses == [0, 0], output
    assert_same_run(out, uninterrupted_two)


# ---- parts that a step has no use for ------------------------------------------------------------


def changed_parts(out: Path, step: int) -> set[str]:
    """Parts of the model that a step changed."""
    before, after = (
        load_file(out / f"stage3/step_{number}/model.safetensors") for number in (step, step + 1)
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    return {".".join(name.split(".")[:2]) for name in changed}


def test_ranks_may_leave_parts_unused(world, tmp_path):
    """Chat leaves the decoder as it is, also after steps that gave it moments; two ranks as one."""
    flags = ["--datasets", "llava_instruct,refcoco", "--global_batch_size", 4]
    flags += ["--micro_batch_size", 2, "--num_points", 64, "--max_steps", 8]
    flags += ["--save_every", 1, "--keep_checkpoints", 99, "--repeat_threshold", 2]
    one, two = tmp_path / "1", tmp_path / "2"
    for out, world_size in ((one, 1), (two, 2)):
        statuses, output = run_ranks(out, toy_flags(world, out, 3, *flags), world_size)
        assert statuses == [0] * world_size, output
    tasks = [row["task"] for row in metrics(two)]
    assert "refer" in tasks and "chat" in tasks[tasks.index("refer") :], tasks
    assert tasks == [row["task"] for row in metrics(one)]
    losses = [[row["loss"] for row in metrics(out)] for out in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for out in (one, two):
        for step, task in enumerate(tasks[1:], 1):
            parts = changed_parts(out, step)
            is_decoded = {"segmentor.decoder", "segmentor.pixel_decoder"} & parts
            assert bool(is_decoded) == (task == "refer") and any(x.startswith("llm") for x in parts)


def test_one_rank_may_have_nothing_to_segment(world, tmp_path):
    """In grefcoco a phrase may have no object: then a rank decodes nothing while the other does."""
    flags = ["--datasets", "grefcoco", "--global_batch_size", 2, "--micro_batch_size", 1]
    flags += ["--num_points", 64, "--max_steps", 8]
    one, two = tmp_path / "1", tmp_path / "2"
    for out, world_size in ((one, 1), (two, 2)):
        statuses, output = run_ranks(out, toy_flags(world, out, 3, *flags), world_size)
        assert statuses == [0] * world_size, output
    for name in ("loss", "mask", "text"):
        figures = [[row[name] for row in metrics(out)] for out in (one, two)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-4)
