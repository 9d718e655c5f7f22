"""The wheel has all files of the package, and trains the toy outside the repository.

pytest tests/test_package.py
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools", reason="builds a wheel: pip install setuptools")
    folder, tree = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    unused = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "xsam", tree / "xsam", ignore=unused)  # building writes beside it
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run([*command, "--wheel-dir", folder, tree], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kept = {path for path in (ROOT / "xsam").rglob("*") if path.is_file()}
    kept = {path for path in kept if "__pycache__" not in path.parts}
    assert files == {path.relative_to(ROOT).as_posix() for path in kept}


def test_versions_agree(wheel):
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert wheel.name.split("-")[1] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changes, re.M)[1] == version


def test_the_wheel_trains_and_answers_outside_the_repository(wheel, world, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}

    def run(*arguments: object) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "import xsam.model; print(xsam.model.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "site")
    run(
        *("-m", "xsam.train", "--config", "toy", "--stage", 1, "--max_steps", 1),
        *("--eval_tasks", "none", "--data", world / "data", "--weights", world / "weights"),
        *("--global_batch_size", 2, "--micro_batch_size", 2, "--out", "run"),
    )
    image = min((world / "data/img_genseg/coco2017/val2017").iterdir())
    run(
        *("-m", "xsam.predict", "panoptic", "--checkpoint", "run/stage1"),
        *("--image", image, "--out", "answer"),
    )
    assert (tmp_path / "answer.png").exists()
