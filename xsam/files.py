"""Outputs that are whole or absent, whenever a run is killed."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


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


def refuse_existing(*targets: Path) -> None:
    for target in targets:
        if target.exists():
            raise FileExistsError(f"{target} exists already: delete it or name another")


@contextlib.contextmanager
def _renamed(*targets: Path) -> Iterator[list[Path]]:
    partials = [partial_of(target) for target in targets]
    for target, partial in zip(targets, partials, strict=True):
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
