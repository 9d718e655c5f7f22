"""docs/walkthrough.md names functions that exist, and the first shelf can be lifted out.

pytest tests/test_walkthrough.py
"""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`([a-z_]+\.[A-Za-z_.]+)`", PAGE)))
FIRST_SHELF = {
    *("config", "encoders", "connector", "llm", "decoder", "losses"),
    *("model", "prompts", "data", "optimizer", "train"),
}
ROOMS = ("variants", "datasets", "evaluation", "report", "plan", "toy")
# What comes with a file that is imported alone: of ours, these and no others.
NEIGHBOURS = {
    "encoders": set(),
    "connector": {"encoders"},
    "decoder": set(),
    "losses": {"config"},
    "optimizer": {"distributed"},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_walk_exists(name):
    words = name.split(".")
    count = 2 if words[0] in ROOMS else 1
    found = importlib.import_module(".".join(["xsam", *words[:count]]))
    for word in words[count:]:
        found = getattr(found, word)
    assert words[0] in FIRST_SHELF or words[0] == "datasets"


def test_the_walk_has_three_parts_of_ten_steps():
    parts = PAGE.split("\n## ")[1:]
    assert [part.splitlines()[0] for part in parts] == ["Image pixels", "Input ids", "Mask targets"]
    assert all(len(re.findall(r"^\d+\. ", part, re.M)) == 10 for part in parts)
    assert len(NAMES) > 40


def modules_with(name: str) -> dict[str, list[str]]:
    """What `import xsam.NAME` loads in a fresh process: modules of ours, and all others."""
    code = (
        f"import json, sys; import xsam.{name}; print(json.dumps([each for each in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    loaded = json.loads(result.stdout)
    ours = [each.removeprefix("xsam.") for each in loaded if each.startswith("xsam.")]
    return {"ours": ours, "all": loaded}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_file_can_be_lifted_out(name):
    loaded = modules_with(name)
    assert set(loaded["ours"]) == {name, *NEIGHBOURS[name]}
    assert not {"transformers", "matplotlib", "pycocotools", "PIL"} & set(loaded["all"])


@pytest.mark.parametrize("name", ["model", "data", "train"])
def test_the_first_shelf_imports_no_room(name):
    loaded = {each.split(".")[0] for each in modules_with(name)["ours"]}
    assert not loaded & set(ROOMS)
    if name == "model":
        assert loaded <= FIRST_SHELF - {"data", "train"}


def test_the_first_shelf_is_what_it_is_called():
    """Every file at the top of the package is on one of the two shelves."""
    second = {
        *("weights", "checkpoints", "starts", "distributed", "files", "images", "names"),
        *("cli", "inference", "regions", "postprocess", "results", "predict", "evaluate"),
        *("export", "lora"),
    }
    files = {path.stem for path in (ROOT / "xsam").glob("*.py")} - {"__init__"}
    assert files == FIRST_SHELF | second | {"variants", "plan"}
