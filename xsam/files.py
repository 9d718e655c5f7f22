"""Texts in whatever encoding, files by the names that annotations have for them, and outputs that
are whole or absent, whenever a run is killed."""

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unicodedata import normalize
from urllib.parse import unquote

# How files begin that stand in the place of others, and what they are.
_STAND_INS = {
    b"version https://git-lfs": "it is a git-LFS pointer, not the file itself: run `git lfs pull`",
    b"<!doctype html": "it is a web page (a login or an error), not the file: fetch it again",
    b"<html": "it is a web page (a login or an error), not the file: fetch it again",
    b"\x1f\x8b": "it is compressed by gzip: unpack it",
}


def cause_of(error: Exception | str, path: Any) -> str:
    """Why a file cannot be read: what lies in its place, or else the error."""
    if not (isinstance(path, Path) and is_file(path)):
        return str(error)
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(500).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not start:
            return "it is empty: fetch it again"
        if re.fullmatch(rb"\.\.?/[\x20-\x7e]+", start):
            return f"it is a link that was not restored, to {start.decode()}: copy that file here"
        abouts = (about for sign, about in _STAND_INS.items() if start.lower().startswith(sign))
        return next(abouts, str(error))
    return str(error)


def read_bytes(path: Path, size: int = -1) -> bytes:
    """What is in a file, or its first bytes. Raises ValueError that names the file and what it is
    where it cannot be read, is empty, or stands in the place of another."""
    try:
        with path.open("rb") as file:
            content = file.read(size)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if about := cause_of("", path):
        raise ValueError(f"{path}: {about}")
    return content


def read_text(path: Path, last_resort: str = "") -> str:
    """A text in UTF-8, UTF-16 or UTF-32, with or without a byte order mark; what is none of them is
    read in `last_resort` (a code page), if there is one, and else refused.

    Raises ValueError that names the file and what it is."""
    content = read_bytes(path)
    try:
        return content.decode(json.detect_encoding(content)).rstrip("\0")
    except UnicodeDecodeError as error:
        if last_resort:
            return content.decode(last_resort, errors="replace")
        raise ValueError(f"{path}: is no text in UTF-8 or UTF-16 ({error}); save it so") from error


def read_json(path: Path, kind: type | None = None, last_resort: str = "") -> Any:
    """The content of a JSON file, which must be of `kind` (list or dict) at its top."""
    text = read_text(path, last_resort)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        are_lines = str(error).startswith("Extra data: line 2 column 1 ")
        mend = "make its lines one list" if are_lines else "mend it there or fetch it again"
        raise ValueError(f"{path}: not valid JSON ({error}); {mend}") from error
    if kind is not None and not isinstance(content, kind):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a {kind.__name__}")
    return content


IMAGE_SUFFIXES = (".jpg", ".png", ".gif", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def is_file(path: Path) -> bool:
    """Also of a name that no file could have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def find_file(folder: Path, *names: str) -> Path:
    """The file that an annotation names, seen from `folder`: the first of `names` that there is.

    A name may be absolute or have "..", backslashes (Windows), a suffix that differs in case,
    letters with accents in one or two characters (macOS), what URLs write for a space, or begin
    with folders of which the last has the name of `folder` ("train2017/1.jpg")."""
    paths = (path for name in names for path in _spellings(folder, name))
    return next(filter(is_file, paths), folder / names[0])


def _spellings(folder: Path, name: str) -> Iterator[Path]:
    unix = name.replace("\\", "/")
    inside = f"/{unix}".split(f"/{folder.absolute().name}/")[-1].lstrip("/")
    accents = (functools.partial(normalize, form) for form in ("NFC", "NFD"))
    for form, known in itertools.product((str, *accents, unquote), (name, unix, inside)):
        stem, suffix = os.path.splitext(form(known))
        for ending in dict.fromkeys((suffix, suffix.lower(), suffix.upper(), suffix.title())):
            yield folder / f"{stem}{ending}"


def list_files(folder: Path, *suffixes: str) -> list[Path]:
    """The files of a folder that end so, by name; what begins with a dot is the system's."""
    paths = folder.glob("[!.]*")
    return sorted(path for path in paths if path.suffix.lower() in suffixes)


def write_whole(path: Path, content: str | bytes) -> None:
    """A file with this content, or as it was before; text is written as UTF-8."""
    with _renamed(path) as (partial,):
        partial.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


@contextlib.contextmanager
def complete(*targets: Path) -> Iterator[list[Path]]:
    """Names for new files or folders, which become `targets` if the block ends well.

    Raises FileExistsError where one of the targets exists."""
    refuse_existing(*targets)
    with _renamed(*targets) as partials:
        yield partials


def check_target(path: Path, is_folder: bool = False) -> None:
    """Raises ValueError where no file, or folder, of this name can be written; makes nothing. For
    commands that work long before they write."""
    if path.exists() and path.is_dir() != is_folder:
        kinds = ("file", "folder") if is_folder else ("folder", "file")
        raise ValueError(f"{path}: is a {kinds[0]}; name a {kinds[1]}")
    folder = next(each for each in (path, *path.parents)[not is_folder :] if each.exists())
    if not folder.is_dir():
        raise ValueError(f"{path}: {folder} is a file, no folder")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{path}: the folder {folder} may not be written to")


def give_rights(*files: Path) -> None:
    """Gives files, which safetensors lets their owner alone read, the rights that the umask
    allows."""
    umask = os.umask(0o077)  # it can only be read by setting another
    os.umask(umask)
    for file in files:
        with contextlib.suppress(PermissionError):  # of a disk that knows no rights
            file.chmod(0o666 & ~umask)


def refuse_existing(*targets: Path) -> None:
    """Raises FileExistsError where one of the targets exists."""
    for target in targets:
        if target.exists():
            raise FileExistsError(f"{target} exists already: delete it or name another")


@contextlib.contextmanager
def _renamed(*targets: Path) -> Iterator[list[Path]]:
    partials = [partial_of(target) for target in targets]
    for target, partial in zip(targets, partials, strict=True):
        check_target(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # left by a killed run
    try:
        yield partials
        for partial, target in zip(partials, targets, strict=True):
            partial.replace(target)
    finally:
        for partial in partials:
            _remove(partial)


def partial_of(path: Path) -> Path:
    """Where a file or folder is written before it gets its name."""
    return path.with_name(f"{path.name}.partial")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
