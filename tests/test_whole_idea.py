"""docs/whole_idea.py stands alone, is short, learns, and draws a picture.

pytest tests/test_whole_idea.py
"""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "whole_idea.py"


def run(folder: Path, *flags: str) -> str:
    """What the file prints; its picture goes to whole_idea.png in a folder."""
    command = [sys.executable, str(FILE), *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(folder / "whole_idea.png").width > 200
    return done.stdout


def test_it_imports_nothing_of_ours():
    tree = ast.parse(FILE.read_text(encoding="utf-8"))
    names = {alias.name for x in ast.walk(tree) if isinstance(x, ast.Import) for alias in x.names}
    names |= {x.module for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {"argparse", "numpy", "torch", "PIL", "scipy"}


def test_its_model_losses_and_training_are_a_hundred_lines():
    """The others make drawings and a picture of what was found."""
    code_lines = runpy.run_path(str(ROOT / "benchmarks" / "size.py"))["code_lines"]
    text = FILE.read_text(encoding="utf-8")
    core = text[text.index("# ---- The model") : text.index("@torch.no_grad()\ndef answer")]
    assert len(code_lines(core)) <= 100 and len(code_lines(text)) <= 170


def test_its_loss_falls_and_it_draws(tmp_path):
    losses = re.findall(r"loss ([\d.]+)", run(tmp_path, "--steps", "60"))
    assert len(losses) > 1 and float(losses[-1]) < float(losses[0])


@pytest.mark.slow
def test_it_learns_to_segment_what_is_named(tmp_path):
    said = run(tmp_path)
    assert "<SEG>" in said
    assert float(re.search(r"mean IoU .*?: ([\d.]+)", said)[1]) > 60
