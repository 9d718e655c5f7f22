"""docs/whole_idea.py stands alone, is short, and learns.

pytest tests/test_whole_idea.py; to the end, in two minutes: pytest -m slow tests/test_whole_idea.py
"""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PATH = Path(__file__).resolve().parent.parent / "docs" / "whole_idea.py"
SOURCE = PATH.read_text(encoding="utf-8")
MOST_LINES, MOST_OF_THE_IDEA = 165, 110  # of code


def run(out: Path, *flags: str) -> str:
    """What it prints, run in the folder that it leaves its picture in."""
    command = [sys.executable, PATH, *flags]
    return subprocess.run(command, cwd=out, check=True, capture_output=True, text=True).stdout


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)$", printed, re.M)]


def test_it_imports_only_what_xsam_depends_on_and_nothing_of_xsam():
    modules = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or ".").split(".")[0])
    assert modules == {"argparse", "numpy", "torch", "PIL", "scipy"}


def test_it_is_short():
    size = runpy.run_path(str(PATH.parent.parent / "benchmarks" / "size.py"))
    lines = size["code_lines"](SOURCE)
    first, last = (
        SOURCE[: SOURCE.index(heading)].count("\n") + 1
        for heading in ("# ---- Requests", "# ---- What is shown")
    )
    assert len(lines) <= MOST_LINES
    assert 0 < len([number for number in lines if first < number < last]) <= MOST_OF_THE_IDEA


def test_files_that_it_names_exist():
    names = set(re.findall(r"xsam/[a-z_/.]+[a-z/]|\b[a-z]+\.py", SOURCE)) - {PATH.name}
    assert len(names) > 8
    for name in names:
        root = PATH.parent.parent
        assert (root / name).exists() or (root / "xsam" / name).exists(), name


def test_a_few_steps_lower_the_loss_and_leave_a_picture(tmp_path):
    first, *_, last = losses(run(tmp_path, "--steps", "30", "--out", "few.png"))
    assert last < 0.8 * first
    with Image.open(tmp_path / "few.png") as picture:
        assert len(picture.getcolors(10**6)) > 100


@pytest.mark.slow
def test_it_learns_to_segment_what_is_named(tmp_path):
    printed = run(tmp_path)
    assert losses(printed)[-1] < 0.2 * losses(printed)[0]
    assert "answer: here it is : <SEG> ." in printed
    assert float(re.search(r"mean IoU .*: ([\d.]+)%", printed)[1]) > 75
    assert (tmp_path / "whole_idea.png").stat().st_size < 100_000
