"""docs/forks: every example runs, touches as many lines as it says, and stands in the table.

pytest tests/test_forks.py
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from xsam.cli import parse
from xsam.model import XSAM
from xsam.toy.world import write_world
from xsam.weights import parameters_on_meta

ROOT = Path(__file__).resolve().parent.parent
FORKS = ROOT / "docs/forks"
PAGE = (FORKS / "README.md").read_text(encoding="utf-8")
FILES = sorted(FORKS.glob("*.py"))
RUN = [file for file in FILES if not file.stem.startswith("new_")]  # those test_tasks.py runs
FLAGS = re.findall(r"`(--[^`]*)`", PAGE)


def run(*arguments: object, folder: Path = ROOT) -> str:
    """What Python prints; it looks for xsam here and for examples in their folder."""
    path = os.pathsep.join(map(str, (ROOT, FORKS)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    options = dict(cwd=folder, env=environment, capture_output=True, text=True)
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def count_lines(text: str) -> int:
    """The lines of a file's forks, without blank ones and comments."""
    parts = re.findall(r"^ *# fork: begin\n(.*?)^ *# fork: end$", text, re.M | re.S)
    assert len(parts) == text.count("# fork: ") / 2 > 0
    return sum(not re.match(r"\s*(#|$)", line) for part in parts for line in part.splitlines())


@pytest.mark.parametrize("file", RUN, ids=lambda file: file.stem)
def test_an_example_runs(file):
    assert run(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_says_how_many_lines_it_touches(file):
    text = file.read_text(encoding="utf-8")
    said = re.findall(r"^lines touched: (\d+)$", text, re.M)
    assert list(map(int, said)) == [count_lines(text)]
    assert f"    python docs/forks/{file.name}\n" in text
    assert re.findall(rf"\| (\d+) \| \[{file.name}\]\({file.name}\)", PAGE) == said
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(rf"\| (\d+) \| \[[^]]+\]\(docs/forks/{file.name}\)", readme) == said


def test_the_table_names_what_exists():
    assert all((FORKS / link).is_file() for link in re.findall(r"\]\((\w+\.py)\)", PAGE))
    edits = re.findall(r"`(\w+)\.py`: ([^;|]*)", PAGE)
    names = [(file, name) for file, what in edits for name in re.findall(r"`(\w+)`", what)]
    assert len(names) >= 7
    for file, name in names:
        assert hasattr(importlib.import_module(f"xsam.{file}"), name)


@pytest.mark.parametrize("flags", FLAGS)
def test_what_needs_no_edit_is_a_flag(flags, tmp_path):
    words = tmp_path / "words.json"
    words.write_text("{}")
    words = shlex.split(flags.replace("FILE", str(words)).replace("PATH", "absent"))
    _, config = parse(["--config", "toy", "--stage", "3", *words])
    with parameters_on_meta():
        XSAM(config)


def test_the_commands_train_with_the_encoder_of_the_example(tmp_path):
    """From a folder to a checkpoint, and to a model that predicts."""
    write_world(tmp_path / "data", num_train=8, num_val=2)
    pictures = tmp_path / "data/img_genseg/coco2017/val2017"
    flags = "--config toy --stage 1 --seg_encoder dinov2-tiny --max_steps 1 --eval_tasks none"
    code = f"""
import encoder
from xsam import cli, inference

dino = encoder.DinoEncoder(patch_size=8, dim=64, depth=4, num_heads=2, mlp_dim=128).model
dino.save_pretrained("weights/dinov2-tiny")
assert cli.train_command({[*flags.split(), "--data", "data", "--weights", "weights"]}) == 0
segmentor, _ = inference.load_checkpoint("runs/toy")
assert isinstance(segmentor.encoder, encoder.DinoEncoder)
inference.predict(segmentor, "{next(pictures.iterdir())}", "panoptic")
"""
    run("-c", code, folder=tmp_path)
