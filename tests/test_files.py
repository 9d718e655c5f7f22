"""Outputs are whole or absent. pytest tests/test_files.py"""

import pytest

from xsam.files import complete, write_whole


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
