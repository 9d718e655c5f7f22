"""docs/tour.ipynb runs on a toy model, and keeps the pictures of the trained one.

pytest tests/test_tour.py

What it keeps is of the toy run of seed 0 in runs/toy; `python tests/test_tour.py` makes it anew.
"""

import copy
import pkgutil
import re
from pathlib import Path

import pytest

for package in ("ipykernel", "matplotlib"):
    pytest.importorskip(package)
nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "docs" / "tour.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
PROSE = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
ABSOLUTE_PATH = re.compile(r"(?<![\w.<])(?:/\w|[A-Za-z]:\\)")  # "</p>" is none


def kinds(cell) -> list:
    """What a code cell put out: streams, and the types of what it drew."""
    return [sorted(output.get("data", ())) or output.get("name") for output in cell.outputs]


def execute(notebook) -> None:
    """Runs all cells in the repository's root; their outputs replace those of the notebook."""
    resources = {"metadata": {"path": str(ROOT)}}
    options = {"timeout": 120, "kernel_name": "python3", "record_timing": False}
    nbclient.NotebookClient(notebook, resources=resources, **options).execute()


def test_the_tour_runs(speaking_model, world, tmp_path, monkeypatch):
    """On an untrained model every cell puts out the kinds of things that it keeps."""
    speaking_model.save_pretrained(tmp_path / "stage3")
    (tmp_path / "world").symlink_to(world)
    monkeypatch.setenv("XSAM_TOY", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = copy.deepcopy(NOTEBOOK)
    execute(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert {cell.id: kinds(cell) for cell in code} == {cell.id: kinds(cell) for cell in CODE}


@pytest.mark.parametrize("cell", CODE, ids=lambda cell: cell.id)
def test_what_a_cell_draws_is_kept(cell):
    is_kept = any("image/png" in output.get("data", ()) for output in cell.outputs)
    assert is_kept == ("plt.subplots" in cell.source)


def test_what_is_kept_is_small_and_names_no_absolute_path():
    texts = [
        output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
        for cell in CODE
        for output in cell.outputs
    ]
    assert ABSOLUTE_PATH.search("loaded /home/x") and not ABSOLUTE_PATH.search("../runs/toy </p>")
    assert "loaded" in "".join(texts) and not ABSOLUTE_PATH.search("\n".join(texts))
    assert PATH.stat().st_size < 700_000


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z_]+\.[A-Za-z_.]+)`", PROSE))))
def test_a_name_of_the_tour_exists(name):
    pkgutil.resolve_name(f"xsam.{name}")


if __name__ == "__main__":
    execute(NOTEBOOK)
    NOTEBOOK.metadata.pop("language_info")  # with the version of Python
    nbformat.write(NOTEBOOK, PATH)
