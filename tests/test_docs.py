"""The pages: links lead somewhere, commands are parsed, the short ones run, figures are not stale.

pytest tests/test_docs.py
"""

import argparse
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from xsam import cli, predict
from xsam.config import ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BOOK = [page for page in PAGES if page.name not in ("LOG.md", "CHANGELOG.md")]  # those are dated
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
COMMANDS = ("python", "torchrun", "srun", "pytest", "pip", "hf", "unzip", "tensorboard")
OTHERS = {"unzip", "ruff", "tensorboard", "git", "cd", "source", "mkdir", "tests/versions/run"}


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links() -> list[tuple[Path, str]]:
    pattern = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
    return [
        (page, one or other)
        for page in PAGES
        for one, other in pattern.findall(without_code(page.read_text(encoding="utf-8")))
    ]


def test_every_link_within_the_repository_leads_somewhere():
    lost, inner = [], 0
    for page, link in links():
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inner += 1
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(f"{page.name}: {link}")
    assert not lost and inner > 60


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        targets = {(page.parent / link.split("#")[0]).resolve() for page, link in links()
                   if page in new and "://" not in link}  # fmt: skip
        new = {target for target in targets if target in PAGES} - reached
    assert set(PAGES) == reached


def test_a_path_in_code_exists():
    """Such as `tests/test_docs.py` or `docs/toy.md`: of files that the repository has."""
    pattern = re.compile(r"`((?:docs|tests|benchmarks|xsam)/[\w/.-]+\.\w+)(?:::(\w+))?`")
    lost = []
    for page in BOOK:
        for path, name in pattern.findall(page.read_text(encoding="utf-8")):
            file = ROOT / path
            if not file.exists() or (name and name not in file.read_text(encoding="utf-8")):
                lost.append(f"{page.name}: {path}{name and '::' + name}")
    assert not lost


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_diagram_is_what_its_program_draws():
    spec = importlib.util.spec_from_file_location("diagram", ROOT / "docs" / "diagram.py")
    diagram = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(diagram)
    for name in diagram.COLOURS:
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == diagram.draw(name)
    files = {file for *_, file in diagram.BOXES if file}
    assert all((ROOT / "xsam" / file).exists() for file in files) and len(files) == 6


def test_the_readme_counts_code_lines_rightly():
    """Within a tenth, so that a small change needs no new table."""
    size = runpy.run_path(str(ROOT / "benchmarks" / "size.py"))
    files = list(size["read"]().values())
    counted = {file.name: len(file.code) for file in files}
    for file in files:
        counted[file.shelf] = counted.get(file.shelf, 0) + len(file.code)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[([\w/.]+)\]\(xsam/[\w/.]+\) \| ([\d,]+) \|", readme, re.M)
    told = {name: int(number.replace(",", "")) for name, number in rows}
    assert {f"{name}.py" for name in size["BOOK"]} < told.keys()
    off = {name: (n, counted[name]) for name, n in told.items() if abs(n / counted[name] - 1) > 0.1}
    assert not off


# ---- commands ------------------------------------------------------------------------------------


def commands() -> list[tuple[str, str]]:
    """(page, command): of blocks of bash, and those that stand in a line of text."""
    found = []
    for page in BOOK:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        inline = [re.sub(r"\s+", " ", each) for each in inline]
        lines += [each for each in inline if re.match(rf"({'|'.join(COMMANDS)}) \S", each)]
        found += [(page.relative_to(ROOT).as_posix(), line) for line in lines if line.strip()]
    return list(dict.fromkeys(found))


class Parsed(BaseException):
    """Raised in place of what a command does after its arguments have been parsed."""


def parse_only(monkeypatch, path: Path | None, module: str, arguments: list[str]) -> None:
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def parse(self, args=None, namespace=None, original=original):
            raise Parsed(original(self, args, namespace))

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)
    monkeypatch.setattr(sys, "argv", [str(path or module), *arguments])
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    with pytest.raises(Parsed):
        if path is not None:
            runpy.run_path(str(path), run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=False)


def check_python(monkeypatch, arguments: list[str]) -> None:
    if arguments[0] == "-m":
        if arguments[1] == "xsam.train":
            cli.parse(arguments[2:])
        elif arguments[1].startswith("xsam."):
            parse_only(monkeypatch, None, arguments[1], arguments[2:])
        else:
            assert arguments[1] in ("venv", "build"), arguments[1]
        return
    path = ROOT / arguments[0]
    assert path.exists(), arguments[0]
    if path.name == "train.py":
        cli.parse(arguments[1:])
    elif path.parent.name in ("xsam", "benchmarks"):
        parse_only(monkeypatch, path, "", arguments[1:])
    else:
        assert path.parent.name in ("docs", "forks"), path


def check_pytest(arguments: list[str]) -> None:
    words = [word for word in arguments if not word.startswith("-")]
    for path in (word for word in words if "/" in word):
        file, *names = path.split("::")
        assert all(name in (ROOT / file).read_text(encoding="utf-8") for name in names)
    if "-k" in arguments:
        (path,) = [word for word in words if "/" in word]
        text = (ROOT / path).read_text(encoding="utf-8")
        assert arguments[arguments.index("-k") + 1] in text


def check(monkeypatch, words: list[str]) -> None:
    while words and re.match(r"[A-Z_0-9]+=", words[0]):
        words = words[1:]
    program, *arguments = words
    if program == "srun":
        program, *arguments = arguments
    if program == "torchrun":
        options = get_args_parser().parse_args(arguments)
        check_python(monkeypatch, [options.training_script, *options.training_script_args])
    elif program in ("python", "python3"):
        check_python(monkeypatch, arguments)
    elif program == "pytest":
        check_pytest(arguments)
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(arguments))
        for extra in ",".join(extras).split(",") if extras else []:
            assert re.search(rf"^{extra} = \[", PROJECT, re.M), extra
    elif program == "hf":
        action, name, *rest = arguments
        if action == "download":
            known = {folder for part in ARCHITECTURES.values() for folder in part}
            folder = Path(rest[rest.index("--local-dir") + 1])
            assert folder == Path("weights") / name.split("/")[1] and folder.name in known
        else:
            assert (action, name) == ("auth", "login")
    else:
        assert program in OTHERS, program


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_is_parsed(monkeypatch, capsys, page, command):
    command = re.sub(r'"\$\(.*?\)(:\d+)?"|\$SLURM_\w+', "1", command)
    if command.startswith("flags="):
        return
    words = shlex.split(command, comments=True)
    if "$flags" in words:  # as bash does: split at white space, quotes kept
        at = words.index("$flags")
        words[at : at + 1] = (ROOT / "benchmarks/overfit.flags").read_text("utf-8").split()
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        try:
            check(monkeypatch, words[:end])
        except SystemExit:
            pytest.fail(f"{page}: {command}\n{capsys.readouterr().err}")
        words = words[end + 1 :]


def test_there_are_commands_of_every_program():
    text = "\n".join(command for _, command in commands())
    for name in ("train.py --config toy --stage all", "evaluate.py", "xsam.predict", "xsam.demo",
                 "xsam.export", "xsam.data check", "xsam.data convert", "xsam.toy", "--plan",
                 "gpu.py", "compare.py", "size.py"):  # fmt: skip
        assert name in text, name


# ---- the short ones, run -------------------------------------------------------------------------


@pytest.fixture
def folder(speaking_model, world, tmp_path, monkeypatch) -> Path:
    """Where the README's commands were run: a checkpoint in runs/toy, its world, a drawing."""
    speaking_model.save_pretrained(tmp_path / "runs/toy/stage3")
    images = tmp_path / "runs/toy/world/data/img_genseg/coco2017/val2017"
    shutil.copytree(world / "data/img_genseg/coco2017/val2017", images)
    first = min(images.iterdir())
    for name in ("000000000564.jpg", "000000000194.jpg"):
        if not (images / name).exists():
            shutil.copy(first, images / name)
    shutil.copy(first, tmp_path / "drawing.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_use_it_on_your_pictures_run(folder, capsys):
    ran = 0
    for page, command in commands():
        words = shlex.split(command, comments=True)
        if page == "README.md" and words[:3] == ["python", "-m", "xsam.predict"]:
            assert predict.main(words[3:]) == 0, capsys.readouterr().err
            ran += 1
    assert ran == 2
    runs = folder / "runs"
    assert (runs / "answers/coco.json").exists() and (runs / "answer.png").exists()
    assert json.loads((runs / "answer.json").read_text())["segments"] is not None


@pytest.mark.parametrize(
    ("page", "picture"), [("README.md", "runs/red_star.png"), ("docs/predict.md", "answer.png")]
)
def test_the_python_of_a_page_runs(folder, page, picture):
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S)
    if importlib.util.find_spec("supervision") is None:
        block = block.replace(", result.to_supervision()", "")
    for name in ("a.jpg", "b.jpg"):
        shutil.copy("drawing.jpg", name)
    block = block.replace('"person"', '"star"').replace('"sky"', '"dots"')
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(block, page, "exec"), names)
    assert len(names["result"].masks) == len(names["result"].labels)
    assert os.path.getsize(picture) > 0
