"""Outputs are whole or absent. pytest tests/test_files.py"""

import os
import sys

import pytest
import torch

from xsam import cli, evaluate
from xsam.datasets import commands
from xsam.files import check_target, complete, write_whole
from xsam.toy import __main__ as toy_command
from xsam.weights import save_tensors


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for content in ("é", b"\xff\x00", "last"):
        write_whole(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(path.parent.iterdir()) == [path]


def test_a_file_stays_as_it_was_where_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_files_and_folders_take_their_names_together(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    with pytest.raises(RuntimeError), complete(folder, file) as (partial, _):
        partial.mkdir()
        (partial / "a").write_text("a")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with complete(folder, file) as partials:
        partials[0].mkdir()
        partials[1].write_text("b")
        assert not folder.exists() and not file.exists()
    assert folder.is_dir() and sorted(tmp_path.iterdir()) == [file, folder]
    with pytest.raises(FileExistsError, match="folder exists already"), complete(folder):
        pass


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_every_file_has_the_rights_that_the_umask_gives(tmp_path, umask, mask):
    os.umask(mask)
    (tmp_path / "weights").mkdir(mode=0o700)  # which the folder's own rights do not change
    save_tensors(tmp_path / "weights", "a", {"x": torch.ones(3), "y": torch.ones(3)}, 12)
    write_whole(tmp_path / "new" / "b.json", "{}")
    with complete(tmp_path / "c.txt") as (partial,):
        partial.write_text("c")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}
    assert os.umask(mask) == mask  # is as it was


def test_where_nothing_can_be_written_is_told_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in ("new", "folder/new", "new/newer/newest"):
        check_target(tmp_path / path)
        check_target(tmp_path / path, is_folder=True)
    check_target(tmp_path / "file")
    check_target(tmp_path / "folder", is_folder=True)
    for path, is_folder, message in (
        ("file", True, "file: is a file; name a folder"),
        ("folder", False, "folder: is a folder; name a file"),
        ("file/new", False, r"file/new: .*file is a file, no folder"),
        ("file/new/newer", True, r"newer: .*file is a file, no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            check_target(tmp_path / path, is_folder)
    with pytest.raises(ValueError, match="folder: is a folder"):
        write_whole(tmp_path / "folder", "x")
    with pytest.raises(ValueError, match="is a file, no folder"), complete(tmp_path / "file" / "a"):
        pass
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "file", tmp_path / "folder"]
    if os.getuid():  # root may write everywhere
        (tmp_path / "folder").chmod(0o500)
        with pytest.raises(ValueError, match=r"folder .*folder may not be written to"):
            check_target(tmp_path / "folder" / "new")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (commands.main, ["check", "--show", "1", "--out", "taken"]),
        (commands.main, ["vgd", "--instances", "no.json", "--out", "taken/new.json"]),
        (commands.main, ["coco-semantic", "--panoptic", "no", "--masks", "no", "--out", "taken/x"]),
        (cli.train_command, ["--config", "toy", "--stage", "1", "--out", "taken"]),
        (evaluate.main, ["--checkpoint", "no", "--out", "taken"]),
        (toy_command.main, ["taken"]),
    ],
    ids=["check", "vgd", "coco-semantic", "train", "evaluate", "toy"],
)
def test_commands_tell_of_an_output_that_cannot_be_first(
    tmp_path, monkeypatch, capsys, command, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("x")
    if command is toy_command.main:  # which takes no arguments but the command line's
        monkeypatch.setattr(sys, "argv", ["xsam.toy", *words])
        status = command()
    else:
        try:
            status = command(words)
        except SystemExit as ended:
            status = ended.code
    printed = capsys.readouterr().err
    assert status == 2 and "taken" in printed and "Traceback" not in printed
    assert "is a file" in printed and list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_results_of_training_are_not_overwritten_and_that_is_told_first(tmp_path):
    (tmp_path / "results.json").write_text('{"stage 1": {}}')
    with pytest.raises(ValueError, match=r"results\.json: is not of this command"):
        evaluate.read_earlier(tmp_path)
    (tmp_path / "results.json").unlink()
    assert evaluate.read_earlier(tmp_path / "new") == {"about": {}}
    (tmp_path / "results.md").mkdir()
    with pytest.raises(ValueError, match=r"results\.md: is a folder; name a file"):
        evaluate.read_earlier(tmp_path)
