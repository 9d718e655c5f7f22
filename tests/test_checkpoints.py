"""Checkpoints come back as they were, on any number of ranks; whatever ends a run while it writes
one, there is a whole one to go on from.

pytest tests/test_checkpoints.py
"""

import contextlib
import copy
import errno
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from xsam import checkpoints, distributed, weights
from xsam.checkpoints import (
    LATEST_FILE,
    STATES_FILE,
    check_checkpoint,
    check_space,
    fill_states,
    find_checkpoint,
    latest_checkpoint,
    list_states,
    load_trained,
    point_latest,
    read_header,
    save_checkpoint,
    state_tensors,
)
from xsam.config import Stage, xsam
from xsam.inference import load_checkpoint
from xsam.model import XSAM, Segmentor
from xsam.optimizer import MasterAdamW, build_optimizer, freeze, gradient_norms, update
from xsam.toy.preset import toy
from xsam.train import load_earlier_stage, pretrained_model
from xsam.weights import CONFIG_FILE, MODEL_FILE, save_tensors

STATES = {"weight:step": torch.tensor(3.0), "weight:exp_avg": torch.ones(2, 3)}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def save(folder: Path, model: XSAM | Segmentor, step: int = 5, stage: int | None = None) -> Path:
    stage = stage or model.stage
    return save_checkpoint(folder, model, model.config, model.tokenizer, stage, step, STATES)


class Small(nn.Module):
    """What `save_checkpoint` asks of a model. `never` has no part in a step."""

    prefix = "segmentor."

    def __init__(self, value: float | None = None):
        super().__init__()
        self.connector = nn.Linear(3, 4, dtype=torch.bfloat16)
        self.decoder = nn.Linear(4, 2, dtype=torch.bfloat16)
        self.never = nn.Linear(2, 2, dtype=torch.bfloat16)
        for parameter in self.parameters() if value is not None else ():
            nn.init.constant_(parameter, value)


class Words:
    """What `save_checkpoint` asks of a tokenizer."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("words " * 20)


def small_states(step: int) -> dict[str, Tensor]:
    return {
        "seg_connector.weight:exp_avg": torch.full((4, 3), float(step)),
        "seg_connector.weight:step": torch.tensor(float(step)),
    }


def save_small(
    folder: Path,
    step: int,
    keep: int = 2,
    tokenizer: Words | PreTrainedTokenizerBase | None = None,
    num_skipped: int = 0,
) -> Path:
    """A checkpoint whose every value is its step."""
    config = toy().resolve(keep_checkpoints=keep)
    about = config, tokenizer or Words(), 1, step, small_states(step), num_skipped
    return save_checkpoint(folder, Small(step), *about)


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["segmentor", "model"])
def test_a_checkpoint_comes_back_as_it_was(request, kind, tmp_path):
    model = request.getfixturevalue(kind)
    folder = save(tmp_path, model)
    for path in (folder, tmp_path):  # the step, or its stage's folder
        loaded, stage = load_checkpoint(path)
        assert type(loaded) is type(model) and stage == (3 if kind == "model" else 1)
        assert same(snapshot(loaded), snapshot(model))
        assert loaded.config == model.config and not loaded.training
    assert read_header(folder)["step"] == 5
    (states,) = folder.glob(f"{STATES_FILE}*")
    assert same(load_file(states), STATES)
    if model.tokenizer is not None:
        assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
        assert vars(loaded.llm)["stop_ids"] == model.llm.stop_ids


@pytest.mark.parametrize("change", [{"vocab_size": 130}, {"tie_word_embeddings": True}], ids=str)
def test_other_embedding_tables_come_back_too(config, tokenizer, change, tmp_path):
    """A table that the special tokens made larger; one shared with the output, as Qwen3's."""
    config = config.resolve(llm_config=config.model.llm_config | change)
    model = XSAM(config, tokenizer)
    loaded, _ = load_checkpoint(save(tmp_path, model))
    assert same(snapshot(loaded), snapshot(model))


def test_a_model_in_bfloat16_comes_back_with_its_float32_buffers(world, config, tmp_path):
    config = config.resolve(dtype="bfloat16")
    model = pretrained_model(3, config, world / "weights", lambda _: None)
    loaded, _ = load_checkpoint(save(tmp_path, model))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert same(snapshot(loaded), snapshot(model))
    assert same(dict(loaded.named_buffers()), dict(model.named_buffers()))
    (angles,) = (x for name, x in loaded.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    assert angles.dtype == torch.float32


def test_without_the_optimizers_files_it_still_answers(segmentor, tmp_path):
    folder = save(tmp_path, segmentor)
    for file in folder.glob(f"{STATES_FILE}*"):
        file.unlink()
    assert same(snapshot(load_checkpoint(folder)[0]), snapshot(segmentor))


def test_a_checkpoint_of_another_stage_is_refused(segmentor, tmp_path):
    folder = save(tmp_path, segmentor)
    assert check_checkpoint(folder, segmentor.config, 1)["step"] == 5
    with pytest.raises(ValueError, match=r"step_5: .* stage 1, .* stage 3"):
        check_checkpoint(folder, segmentor.config, 3)


def test_a_checkpoint_of_another_model_is_refused(segmentor, config, tmp_path):
    folder = save(tmp_path, segmentor)
    with pytest.raises(ValueError, match=r"'toy'.*seg_image_size is 96, here 1024"):
        check_checkpoint(folder, xsam(), 1)
    config = config.resolve(llm="another", llm_config={})  # a segmentor has none
    assert check_checkpoint(folder, config, 1)
    with pytest.raises(ValueError, match="num_queries is 20, here 33"):
        check_checkpoint(folder, config.resolve(num_queries=33), 1)


def test_stage_2_saves_the_projectors_alone(model, tmp_path):
    model = copy.deepcopy(model)
    freeze(model, model.config.stages[2], "")
    folder = save(tmp_path / "stage2", model, stage=2)
    saved = load_file(folder / MODEL_FILE)
    assert {name.split(".")[0] for name in saved} == {"visual_projector", "seg_projector"}
    whole = snapshot(model)
    for load in (load_trained, lambda model, _: load_earlier_stage(model, 2, tmp_path)):
        with torch.no_grad():
            model.image_projector.model[0].weight.zero_()
        load(model, folder)
        assert same(snapshot(model), whole)
    with pytest.raises(ValueError, match="stage 2"):
        load_checkpoint(folder)


def test_a_resumed_stage_2_lacking_a_projector_is_refused(model, tmp_path):
    model = copy.deepcopy(model)
    freeze(model, model.config.stages[2], "")
    folder = save(tmp_path, model, stage=2)
    saved = load_file(folder / MODEL_FILE)
    saved.pop("visual_projector.model.0.weight")
    save_file(saved, folder / MODEL_FILE)
    with pytest.raises(ValueError, match=r"missing: visual_projector\.model\.0\.weight"):
        load_trained(model, folder)


def test_stage_3_starts_from_the_whole_segmentor_of_stage_1(model, segmentor, tmp_path):
    folder = save(tmp_path / "stage1", segmentor)
    model = copy.deepcopy(model)
    load_earlier_stage(model, 1, tmp_path)
    for name, tensor in segmentor.state_dict().items():
        if not name.startswith("class_head"):
            assert torch.equal(model.segmentor.state_dict()[name], tensor)
    saved = load_file(folder / MODEL_FILE)
    saved.pop("seg_connector.model.1.model.0.weight")
    save_file(saved, folder / MODEL_FILE)
    with pytest.raises(ValueError, match=r"missing: seg_connector\.model\.1\.model\.0\.weight"):
        load_earlier_stage(model, 1, tmp_path)


# ---- the header ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda header: {"config": header["config"]},
        lambda header: header | {"config": header["config"] | {"colour": 1}},
        lambda header: header | {"files": 3},
        lambda header: [header],
    ],
    ids=["no stage", "an unknown field", "no list of files", "no header"],
)
def test_a_header_that_is_none_names_its_folder(segmentor, tmp_path, change):
    folder = save(tmp_path, segmentor)
    header = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(change(header)))
    with pytest.raises(ValueError, match="step_5"):
        load_checkpoint(folder)


def test_the_header_has_what_a_run_goes_on_with(tmp_path):
    folder = save_small(tmp_path, 7, num_skipped=4)
    header = read_header(folder)
    assert (header["stage"], header["step"], header["skipped"]) == (1, 7, 4)
    assert header["config"] == toy()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    sizes.pop(CONFIG_FILE)
    assert header["files"] == sizes and MODEL_FILE in sizes and "tokenizer.json" in sizes


def test_a_header_from_before_there_was_a_list_of_files_is_read(tmp_path):
    folder = save_small(tmp_path, 7)
    header = json.loads((folder / CONFIG_FILE).read_text())
    del header["files"], header["skipped"]
    (folder / CONFIG_FILE).write_text(json.dumps(header))
    assert read_header(folder)["skipped"] == 0 and read_header(folder)["files"] == {}
    assert list_states(folder).keys() == small_states(7).keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "it is a web page"),
        (b"", "it is empty"),
        (b'{"stage": ', "not valid JSON"),
        (None, "No such file"),
    ],
)
def test_what_lies_in_the_place_of_a_header_is_told(tmp_path, content, message):
    folder = save_small(tmp_path, 7)
    whole = (folder / CONFIG_FILE).read_bytes()
    (folder / CONFIG_FILE).write_bytes(b"\xef\xbb\xbf" + whole)
    assert read_header(folder)["step"] == 7
    (folder / CONFIG_FILE).unlink()
    if content is not None:
        (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{CONFIG_FILE}: .*{message}"):
        read_header(folder)


def test_every_file_of_a_tokenizer_is_listed(tokenizer, tmp_path):
    """One with templates beside the default one writes them into a folder of their own."""
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tools": "{{ messages }}"}
    folder = save_small(tmp_path, 7, tokenizer=tokenizer)
    assert any(path.is_dir() for path in folder.iterdir())
    assert list_states(folder).keys() == small_states(7).keys()


# ---- which is the newest -------------------------------------------------------------------------


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for step in (8, 9, 10, 100):  # by number: step_9 is older than step_10
        save_small(tmp_path, step)
        assert latest_checkpoint(tmp_path).name == f"step_{step}"
    assert names(tmp_path) == {"step_10", "step_100", LATEST_FILE}
    save_small(tmp_path, 101, keep=1)
    assert names(tmp_path) == {"step_101", LATEST_FILE}


def test_the_newest_is_found_whatever_the_pointer_says(tmp_path):
    """A run that is killed between writing a checkpoint and pointing at it has it all the same."""
    for step in (9, 10):
        save_small(tmp_path, step)
    assert (tmp_path / LATEST_FILE).read_text() == "step_10"
    point_latest(tmp_path / "step_9")
    assert (tmp_path / LATEST_FILE).read_text() == "step_9"
    assert latest_checkpoint(tmp_path).name == "step_10"
    (tmp_path / LATEST_FILE).unlink()
    assert latest_checkpoint(tmp_path).name == "step_10"


@pytest.mark.parametrize(
    "name", ["step_x", "step_10.bak", "step_", "step_-6", ".step_6.tmp", ".step_6.old", "a_step_6"]
)
def test_what_has_another_name_is_no_checkpoint(tmp_path, name):
    folder = save_small(tmp_path, 5)
    shutil.copytree(folder, tmp_path / name)
    assert latest_checkpoint(tmp_path) == folder
    save_small(tmp_path, 7, keep=1)
    assert names(tmp_path) - {name} == {"step_7", LATEST_FILE}
    assert (tmp_path / name).exists() != name.startswith(".")  # what a killed save left is gone


def test_a_step_written_twice_is_the_later_one(segmentor, tmp_path):
    save(tmp_path, segmentor)
    other = copy.deepcopy(segmentor)
    with torch.no_grad():
        other.class_head.predictor.bias += 1
    assert same(snapshot(load_checkpoint(save(tmp_path, other))[0]), snapshot(other))


# ---- room ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_the_room_that_a_checkpoint_takes_is_known_before(tmp_path, monkeypatch, stage):
    """But for the headers of its files. Stage 2 writes what it trains alone."""
    model, optimizer = start(is_mixed=True)
    train(model, optimizer, range(1))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("never" not in name)
    states = state_tensors(optimizer, model, model.prefix)
    folder = save_checkpoint(tmp_path, model, toy(), None, stage, 3, states)
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    # Without the count of steps of each parameter.
    size = sum(x.nbytes for tensors in files for x in tensors.values() if x.dim())

    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - size, size))
    assert str(tmp_path) in check_space(tmp_path, model, stage)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - size, size - 1))
    with pytest.raises(OSError, match="make room"):
        check_space(tmp_path, model, stage)


# ---- a run that ends while it writes -------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process: nothing handles it."""


# By the modules that look them up; os.unlink and os.rmdir are what shutil.rmtree is made of.
OPERATIONS = (
    (os, "fsync"),
    (os, "replace"),
    (os, "unlink"),
    (os, "rmdir"),
    (Path, "rename"),
    (Path, "mkdir"),
    (Path, "write_text"),
    (weights, "save_file"),
)


def interrupt(
    patch: pytest.MonkeyPatch, number: int, failure: Callable[[str], BaseException]
) -> list[str]:
    """Makes the `number`-th operation on files fail, half done where it writes. Returns a list in
    which the names of the operations will be."""
    calls = []

    def wrap(name: str, original: Callable) -> Callable:
        def call(*arguments, **options):
            calls.append(name)
            if len(calls) != number:
                return original(*arguments, **options)
            if name == "write_text":
                path, text = arguments
                original(path, text[: len(text) // 2], **options)
            elif name == "save_file":
                original(*arguments, **options)
                os.truncate(arguments[1], arguments[1].stat().st_size // 2)
            raise failure(name)

        return call

    for owner, name in OPERATIONS:
        patch.setattr(owner, name, wrap(name, getattr(owner, name)))
    return calls


def no_space(operation: str) -> Exception:
    """As the operation says it."""
    if operation == "save_file":
        return SafetensorError("I/O error: No space left on device (os error 28)")
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def assert_whole(folder: Path) -> set[str]:
    """Every checkpoint's files are there, with their sizes and its values; the names of all."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdecimal()]
    for path in found:
        step = float(path.name[5:])
        files = json.loads((path / CONFIG_FILE).read_text())["files"]
        assert files == {x.name: x.stat().st_size for x in path.iterdir() if x.name != CONFIG_FILE}
        (states,) = (file for file in files if file.startswith(STATES_FILE))
        for file, count in ((MODEL_FILE, 6), (states, 2)):
            tensors = load_file(path / file)
            assert len(tensors) == count and all((x == step).all() for x in tensors.values())
    return {path.name for path in found}


def newest(found: set[str], count: int = 2) -> set[str]:
    return set(sorted(found, key=lambda name: int(name[5:]))[-count:])


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def two_steps(tmp_path) -> Path:
    """A stage's folder with as many checkpoints as are kept."""
    for step in (1, 2):
        save_small(tmp_path / "two", step)
    return tmp_path / "two"


@pytest.mark.parametrize("then", [3, 4], ids="then step {}".format)
@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "a step once more"])
def test_killed_at_any_moment_it_leaves_whole_checkpoints(
    two_steps, tmp_path, monkeypatch, step, then
):
    """And what it leaves besides them is gone after the next."""
    latest = []
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        shutil.copytree(two_steps, folder)
        with monkeypatch.context() as patch:
            calls = interrupt(patch, number, Killed)
            with contextlib.suppress(Killed):
                save_small(folder, step)
        found = assert_whole(folder)
        latest.append(latest_checkpoint(folder).name)
        assert latest[-1] in found
        if step == 3:
            assert len(found) >= 2 and (folder / LATEST_FILE).read_text() in found
        save_small(folder, then)
        kept = newest(found | {f"step_{then}"})
        assert names(folder) == kept | {LATEST_FILE}, f"after {calls[:number]}"
        assert assert_whole(folder) == kept and (folder / LATEST_FILE).read_text() in kept
        if len(calls) < number:
            break
    assert set(calls) == {name for _, name in OPERATIONS}
    if step == 3:  # from one moment on it is the new one
        assert set(latest) == {"step_2", "step_3"} and latest == sorted(latest)


def test_a_full_disk_at_any_moment_leaves_all_as_it_was(two_steps, tmp_path, monkeypatch):
    """Or, where the new checkpoint had its name already, that one whole."""
    before, ends = content(two_steps), []
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        shutil.copytree(two_steps, folder)
        with monkeypatch.context() as patch:
            calls = interrupt(patch, number, no_space)
            with contextlib.suppress(OSError):
                save_small(folder, 3)
                ends.append("written")
        if len(calls) < number:
            break
        assert not list(folder.glob(".step_3*")), calls[:number]
        if "rename" not in calls[: number - 1]:
            assert content(folder) == before
            ends.append("as it was")
        found = assert_whole(folder)
        assert len(found) >= 2 and (folder / LATEST_FILE).read_text() in found
        save_small(folder, 4)
        assert names(folder) == newest(found | {"step_4"}) | {LATEST_FILE}, calls[:number]
    assert ends.count("as it was") > 10 and ends[-1] == "written"


def test_a_full_disk_is_told_with_the_checkpoint(two_steps, tmp_path, monkeypatch):
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        shutil.copytree(two_steps, folder)
        with monkeypatch.context() as patch:
            calls = interrupt(patch, number, no_space)
            try:
                save_small(folder, 3)
                break
            except OSError as error:
                assert str(folder / "step_3") in str(error), calls[:number]
                assert "No space left" in str(error)
    assert number > 15


def test_a_tokenizer_that_cannot_be_written_is_told_alike(two_steps):
    """The tokenizers library raises an Exception of no kind where the disk is full."""

    class Full:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("wor")
            raise Exception("No space left on device (os error 28)")

    before = content(two_steps)
    with pytest.raises(OSError, match=r"step_3.*No space left"):
        save_small(two_steps, 3, tokenizer=Full())
    assert content(two_steps) == before and not list(two_steps.glob(".*"))


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_that_is_really_full(tokenizer, tmp_path):
    """With each number of free pages, from none to enough."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted")
    try:
        ballast, folder = tmp_path / "ballast", tmp_path / "stage1"
        save_small(folder, 1, tokenizer=tokenizer)
        before = content(folder)
        for pages in itertools.count():
            ballast.unlink(missing_ok=True)
            free = shutil.disk_usage(tmp_path).free
            ballast.write_bytes(bytes(max(0, free - pages * 4096)))
            try:
                save_small(folder, 2, tokenizer=tokenizer)
                break
            except OSError as error:
                assert str(folder / "step_2") in str(error), pages
            if (folder / "step_2").exists():  # there was no room for the pointer alone
                break
            assert content(folder) == before and names(folder) == {"step_1", LATEST_FILE}
        assert pages > 5 and list_states(folder / "step_2").keys() == small_states(2).keys()
        ballast.unlink()
        save_small(folder, 2, tokenizer=tokenizer)
        assert names(folder) == {"step_1", "step_2", LATEST_FILE}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """So that a machine that loses its power has no empty files in a whole folder."""
    flushed, missing = {}, {}
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        about = os.fstat(descriptor)
        flushed[about.st_ino] = about.st_size

    def look(source: Path, target: Path) -> Path:
        if target.name == "step_3":
            for path in (*source.rglob("*"), source):
                if flushed.get(path.stat().st_ino) != path.stat().st_size:
                    missing[path] = "not flushed"
            flushed.clear()
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", look)
    folder = save_small(tmp_path, 3)
    assert not missing
    assert {tmp_path.stat().st_ino, (tmp_path / LATEST_FILE).stat().st_ino} == set(flushed)
    assert len(list(folder.iterdir())) == 4


# ---- the optimizer's states ----------------------------------------------------------------------

STAGE = Stage(learning_rates={"": 1e-2, "segmentor.decoder": 3e-3}, datasets=())


def start(is_mixed: bool = False) -> tuple[Small, torch.optim.Optimizer]:
    """`is_mixed`: with a part in float32, which sharding does not allow."""
    torch.manual_seed(0)
    model = Small()
    if is_mixed:
        model.decoder.float()
    return model, build_optimizer(model, STAGE, model.prefix)


def train(model: Small, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The same on every rank; `never` has gradients of zero."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = (gradient * ("never" not in name)).to(parameter.dtype)
        update(optimizer, gradient_norms(model), clip_norm=1.0)


def save_states(folder: Path, model: Small, optimizer: torch.optim.Optimizer) -> Path:
    states = state_tensors(optimizer, model, model.prefix)
    return save_checkpoint(folder, model, toy(), None, 1, 3, states)


def resume(folder: Path, is_mixed: bool = False) -> tuple[Small, torch.optim.Optimizer]:
    model, optimizer = start(is_mixed)
    load_trained(model, folder)
    fill_states(optimizer, model, model.prefix, list_states(folder))
    return model, optimizer


@pytest.fixture
def trained() -> tuple[Small, torch.optim.Optimizer]:
    """A model after three steps, of one rank."""
    model, optimizer = start()
    train(model, optimizer, range(3))
    return model, optimizer


def test_states_come_back_bit_by_bit(tmp_path):
    """And the run goes on as if it had not been interrupted."""
    model, optimizer = start(is_mixed=True)
    train(model, optimizer, range(3))
    states = state_tensors(optimizer, model, model.prefix)
    assert isinstance(optimizer, MasterAdamW)
    assert {name.split(":")[0] for name in states} == {
        f"{part}.{kind}"
        for part in ("seg_connector", "segmentor.decoder")
        for kind in ("weight", "bias")
    }
    assert {name for name in states if "weight" in name} == {
        *(f"seg_connector.weight:{kind}" for kind in ("master", "exp_avg", "exp_avg_sq", "step")),
        *(f"segmentor.decoder.weight:{kind}" for kind in ("exp_avg", "exp_avg_sq", "step")),
    }
    assert {state.dtype for state in states.values()} == {torch.float32}
    assert states["seg_connector.bias:step"] == 3
    master = states["seg_connector.weight:master"]
    assert not torch.equal(master, master.bfloat16().float())

    again, optimizer_again = resume(save_states(tmp_path, model, optimizer), is_mixed=True)
    assert same(state_tensors(optimizer_again, again, again.prefix), states)
    before = snapshot(model)
    assert same(snapshot(again), before)
    train(model, optimizer, range(3, 6))
    train(again, optimizer_again, range(3, 6))
    assert same(snapshot(again), snapshot(model)) and not same(snapshot(model), before)
    states = state_tensors(optimizer, model, model.prefix)
    assert same(state_tensors(optimizer_again, again, again.prefix), states)


def test_states_in_several_files_come_back_too(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "STATES_BYTES", 100)
    model, optimizer = trained
    states = state_tensors(optimizer, model, model.prefix)
    folder = save_states(tmp_path, model, optimizer)
    assert len(list(folder.glob(f"{STATES_FILE}*"))) > 2
    again, optimizer_again = resume(folder)
    assert same(state_tensors(optimizer_again, again, again.prefix), states)


@pytest.mark.parametrize("count", [1, 2])
def test_a_share_of_the_parameters_takes_its_states_alone(trained, tmp_path, count):
    """As each of two ranks does, from files that three wrote."""
    model, optimizer = trained
    states = state_tensors(optimizer, model, model.prefix)
    folder = save_checkpoint(tmp_path, model, toy(), None, 1, 3, {})
    (folder / f"{STATES_FILE}-00001-of-00001.safetensors").unlink()
    for rank in range(3):
        share = {name: states[name] for name in sorted(states)[rank::3]}
        save_tensors(folder, f"{STATES_FILE}-{rank + 1:05d}-of-00003", share)
    header = json.loads((folder / CONFIG_FILE).read_text())
    files = {x.name: x.stat().st_size for x in folder.iterdir() if x.name != CONFIG_FILE}
    (folder / CONFIG_FILE).write_text(json.dumps(header | {"files": files}))

    found = {}
    for rank in range(count):
        again = Small()
        shard = MasterAdamW(list(again.parameters())[rank::count])
        fill_states(shard, again, again.prefix, list_states(folder))
        own = state_tensors(shard, again, again.prefix)
        assert own and not own.keys() & found.keys()
        found |= own
    assert same(found, states)


def damage(file: Path, kind: str) -> None:
    values = file.read_bytes()
    if kind == "cut short":
        file.write_bytes(values[:-3])
    elif kind == "longer":
        file.write_bytes(values + b"\0")
    elif kind == "missing":
        file.unlink()
    else:
        file.write_bytes(b"\0" * 16 + values[16:])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cut short", "{less:,} bytes, was written with {size:,} bytes"),
        ("longer", "{more:,} bytes, was written with {size:,} bytes"),
        ("missing", "missing, was written with {size:,} bytes"),
        ("damaged", "damaged"),
    ],
)
@pytest.mark.parametrize("which", [STATES_FILE, "model"])
def test_a_damaged_file_is_named(trained, tmp_path, kind, expected, which):
    folder = save_states(tmp_path, *trained)
    (file,) = folder.glob(f"{which}*")
    size = file.stat().st_size
    damage(file, kind)
    expected = expected.format(less=size - 3, size=size, more=size + 1)
    with pytest.raises(ValueError) as error:
        list_states(folder)
        load_trained(Small(), folder)
    assert str(error.value).startswith(f"{file}: {expected}")


@pytest.mark.parametrize("kind", ["master", "exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("change", ["missing", "of another shape"])
def test_a_state_that_does_not_fit_is_named(trained, tmp_path, kind, change):
    model, optimizer = trained
    states = state_tensors(optimizer, model, model.prefix)
    name = f"seg_connector.weight:{kind}"
    states[name] = torch.zeros(7)
    if change == "missing":
        del states[name]
    folder = save_checkpoint(tmp_path, model, toy(), None, 1, 3, states)
    with pytest.raises(ValueError) as error:
        resume(folder)
    assert name in str(error.value)
    if change != "missing":
        assert "[7] in " in str(error.value) and str(folder / STATES_FILE) in str(error.value)


# ---- several ranks -------------------------------------------------------------------------------


@contextlib.contextmanager
def group(rank: int, world_size: int, port: int) -> Iterator[None]:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://localhost:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    yield
    distributed.finish()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def outcome(folder: Path, what: str, rank: int, write: Callable[[], Path]) -> None:
    """What became of a checkpoint on this rank, in a file."""
    try:
        said = str(write())
    except (OSError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"{what} {rank}").write_text(said)


def full(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ranks(rank: int, folder: Path, ports: tuple[int, int]) -> None:
    """Three ranks train and save; two of them go on. Then disks are full."""
    torch.set_num_threads(1)
    with group(rank, 3, ports[0]):
        model, optimizer = start()
        train(model, optimizer, range(3))
        save_states(folder / "three", model, optimizer)
        if rank == 2:
            weights.save_tensors = full
        outcome(folder, "states", rank, lambda: save_small(folder / "three", 4))
        weights.save_tensors = save_tensors
        dist.barrier()
    if rank == 2:
        return
    with group(rank, 2, ports[1]):
        model, optimizer = resume(folder / "three/step_3")
        save_states(folder / "two", model, optimizer)
        train(model, optimizer, range(3, 6))
        torch.save(model.state_dict(), folder / f"trained {rank}")
        if rank == 0:
            checkpoints.point_latest = full
        outcome(folder, "pointer", rank, lambda: save_small(folder / "two", 4))


@pytest.fixture(scope="module")
def run_of_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    arguments = folder, (free_port(), free_port())
    multiprocessing.start_processes(ranks, arguments, nprocs=3, start_method="fork")
    return folder


def test_states_of_several_ranks_are_read_by_any_number(run_of_ranks, trained):
    """Those of three by two and by one; those that two read and wrote, by one."""
    model, optimizer = trained
    states = state_tensors(optimizer, model, model.prefix)
    parts = [load_file(file) for file in run_of_ranks.glob(f"three/step_3/{STATES_FILE}*")]
    assert len(parts) == 3 and sum(map(len, parts)) == len(states)
    assert all(0 < len(part) < len(states) for part in parts)
    for count in ("three", "two"):
        again, optimizer_again = resume(run_of_ranks / count / "step_3")
        assert same(snapshot(again), snapshot(model))
        assert same(state_tensors(optimizer_again, again, again.prefix), states)
    train(model, optimizer, range(3, 6))
    for rank in (0, 1):
        assert same(torch.load(run_of_ranks / f"trained {rank}"), snapshot(model))


def test_a_rank_that_cannot_write_is_told_by_all(run_of_ranks):
    target = run_of_ranks / "three/step_4"
    for rank in range(3):
        said = (run_of_ranks / f"states {rank}").read_text()
        assert said.startswith(f"OSError: {target} could not be written: rank 2: ")
        assert "No space left" in said
    assert names(run_of_ranks / "three") == {"step_3", LATEST_FILE}
    assert (run_of_ranks / "three" / LATEST_FILE).read_text() == "step_3"


def test_a_pointer_that_cannot_be_written_leaves_no_rank_waiting(run_of_ranks):
    for rank in range(2):
        said = (run_of_ranks / f"pointer {rank}").read_text()
        assert said.startswith("OSError: ") and str(run_of_ranks / "two") in said
    assert latest_checkpoint(run_of_ranks / "two").name in ("step_3", "step_4")


# ---- the hub -------------------------------------------------------------------------------------


def test_a_name_of_the_hub_is_fetched_where_no_folder_has_it(segmentor, tmp_path, monkeypatch):
    folder = save_checkpoint(tmp_path / "there", segmentor, segmentor.config, None, 1, 5, {})
    asked = []
    fetch = lambda name: asked.append(name) or str(folder)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(Path("owner/toy")) == folder and asked == ["owner/toy"]
    for name in ("there", "a/b/c", str(tmp_path / "x" / "y")):
        assert find_checkpoint(Path(name)) and len(asked) == 1
    (tmp_path / "owner/toy").mkdir(parents=True)
    assert find_checkpoint(Path("owner/toy")) == Path("owner/toy") and len(asked) == 1


def test_a_name_that_cannot_be_fetched_is_told(monkeypatch, tmp_path):
    def fail(name: str) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("Name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"owner/toy: no such folder here.*not known\)"):
        find_checkpoint(Path("owner/toy"))
