"""What ranks ask of each other, and what one does when another is silent."""

import contextlib
import gc
import time
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import finish, start_ranks

from xsam import distributed

CPU = torch.device("cpu")


def run_ranks(tmp_path, function, *arguments, world_size=2) -> tuple[list[int | None], str]:
    """The ranks' statuses, None for one that hangs, and what they printed."""
    log = tmp_path / "log"
    processes = start_ranks(log, function, *arguments, world_size=world_size)
    return finish(processes, patience=60), log.read_text()


# ---- the group -----------------------------------------------------------------------------------


def test_a_group_that_was_left_is_not_freed():
    """With PyTorch 2.6 freeing it hung one run in seven: it waits for threads that wait for it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = weakref.ref(dist.group.WORLD)
    assert distributed.gather([3]) == [3]
    distributed.finish()
    gc.collect()
    assert group() is not None and not dist.is_initialized()


# ---- devices -------------------------------------------------------------------------------------


def test_the_device_is_the_gpu_where_there_is_one_or_the_one_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_device() == distributed.choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local_rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert distributed.choose_device() == torch.device("cuda", local_rank)
    assert not torch.backends.cudnn.allow_tf32
    assert distributed.choose_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ValueError, match=r"process 2 has no GPU: .* 2 CUDA GPUs here; start --nproc"
    ):
        distributed.choose_device()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--device mps: .* no Apple GPU"):
        distributed.choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert distributed.choose_device("mps").type == "mps"
    assert "untested" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process alone"):
        distributed.choose_device("mps")


# ---- collectives ---------------------------------------------------------------------------------


def test_one_process_has_nobody_to_ask():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather([3, "a"]) == [3, "a"]
    assert distributed.mean_over_ranks({"a": 2.0}, CPU) == {"a": 2.0}
    distributed.barrier()
    distributed.finish()
    with pytest.raises(OSError, match="step_3 could not be written: rank 0: full"):  # noqa: SIM117
        with distributed.together("step_3 could not be written", OSError):
            raise OSError("full")
    with distributed.heartbeat():
        pass


def ask() -> int:
    distributed.start()
    rank = distributed.rank()
    assert distributed.gather([rank] * (rank + 1)) == [0, 1, 1, 2, 2, 2]
    means = distributed.mean_over_ranks({"b": float(rank), "a": 3.0 * rank + 1}, CPU)
    assert list(means.items()) == [("b", 1.0), ("a", 4.0)]
    with distributed.together("nothing", OSError):
        pass
    try:
        with distributed.together("no folder", OSError, KeyError):
            if rank == 1:
                raise OSError("disk full")
            if rank == 2:
                raise KeyError("name")
        raise AssertionError("nobody noticed")
    except OSError as error:
        assert str(error) == "no folder: rank 1: disk full; rank 2: 'name'"
    distributed.finish()
    return 0


def test_every_rank_knows_what_the_others_gave_and_what_failed(tmp_path):
    statuses, output = run_ranks(tmp_path, ask, world_size=3)
    assert statuses == [0, 0, 0], output


# ---- heartbeat -----------------------------------------------------------------------------------


def beat(seconds: list[float], what: str) -> int:
    """Each rank spends its `seconds` under the heartbeat; then the last does `what`."""
    distributed.BEAT_SECONDS, distributed.LOST_SECONDS = 0.1, 3.0
    distributed.start()
    rank, is_last = distributed.rank(), distributed.rank() == distributed.world_size() - 1
    with contextlib.suppress(ValueError), distributed.heartbeat():
        time.sleep(seconds[rank])
        if is_last and what == "raises":
            raise ValueError("while the others are in a collective")
        if not is_last and what == "raises":
            dist.barrier()
    time.sleep(max(seconds) - seconds[rank] + 2 * distributed.LOST_SECONDS * (what == "raises"))
    dist.barrier()
    distributed.finish()
    return 0


@pytest.mark.parametrize("seconds", [[5.0, 0.5, 0.3], [0.3, 5.0, 0.5]])
def test_a_rank_that_leaves_cleanly_is_not_lost(tmp_path, seconds):
    statuses, output = run_ranks(tmp_path, beat, seconds, "leaves", world_size=3)
    assert statuses == [0, 0, 0] and "sign of life" not in output


def test_a_rank_that_raised_is_lost_to_those_who_wait_for_it(tmp_path):
    statuses, output = run_ranks(tmp_path, beat, [0.3, 0.3], "raises")
    assert statuses[0] == 1, output
    assert "xsam: rank 0 ends: rank 1 (" in output and "no sign of life for 3 s" in output


def lose(seconds: float) -> int:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    dist.barrier()
    if distributed.rank() == 1:
        time.sleep(seconds)
        return 7  # without a word
    try:
        dist.all_reduce(torch.zeros(3))
    except RuntimeError as error:
        return 0 if distributed.is_loss_of_a_rank(error) else 3
    return 4


def test_a_collective_that_lost_a_rank_is_told_from_other_errors(tmp_path):
    statuses, output = run_ranks(tmp_path, lose, 0.5)
    assert statuses == [0, 7], output
    assert not distributed.is_loss_of_a_rank(RuntimeError("mat1 and mat2 shapes"))
