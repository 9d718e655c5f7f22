"""docs/walkthrough.md and docs/reading.md name what exists and quote what stands there, and the
first shelf can be lifted out.

pytest tests/test_reading.py
"""

import ast
import functools
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from xsam.datasets.sources import scored_sets

ROOT = Path(__file__).resolve().parent.parent
WALK, READING, ABLATIONS = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("walkthrough", "reading", "ablations")
)
PAPER = ROOT.parent / "shared/paper/x-sam.txt"
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
    "losses": set(),
    "optimizer": {"distributed"},
}


@functools.cache
def source_of(file: str) -> str:
    return (ROOT / "xsam" / file).read_text(encoding="utf-8")


def definition(file: str, name: str) -> str:
    """The source of a function, class, attribute or constant, such as "XSAM.segment", of a file."""
    node = ast.parse(source_of(file))
    for word in name.split("."):
        for child in node.body:
            target = getattr(child, "targets", [getattr(child, "target", child)])[0]
            if word == getattr(target, "id", getattr(target, "name", None)):
                node = child
                break
        else:
            raise AssertionError(f"{file}: {word} of {name} is not there")
    return ast.get_source_segment(source_of(file), node)


# ---- the walk ------------------------------------------------------------------------------------

NAMES = sorted(set(re.findall(r"`([a-z_]+\.[A-Za-z_.]+)`", WALK)))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_walk_exists(name):
    words = name.split(".")
    count = 2 if words[0] in ROOMS else 1
    assert definition("/".join(words[:count]) + ".py", ".".join(words[count:]))
    assert words[0] in FIRST_SHELF or words[0] == "datasets"


def test_the_walk_has_three_parts_of_ten_steps():
    parts = WALK.split("\n## ")[1:]
    assert [part.splitlines()[0] for part in parts] == ["Image pixels", "Input ids", "Mask targets"]
    assert all(len(re.findall(r"^\d+\. ", part, re.M)) == 10 for part in parts)
    assert len(NAMES) > 40


# ---- the paper beside the code -------------------------------------------------------------------

LINK = r"\[([\w/]+\.py): ([\w.]+)\]\((.+?)\)"
LINKS = list(re.finditer(LINK, READING))
QUOTES = list(re.finditer(r"^```python\n(.*?)^```$", READING, re.M | re.S))
# Rows of the three tables at the end: {"table": {6: "what gives it"}}.
ROWS = {
    kind: {
        number: row[3]
        for row in re.finditer(r"^\| (\d+)(?: to (\d+))? \| .+ \| (.+) \|$", part, re.M)
        for number in range(int(row[1]), int(row[2] or row[1]) + 1)
    }
    for kind, part in re.findall(
        r"^\| (equation|table|figure) \|(.+?)(?:\n\n|\Z)", READING, re.M | re.S
    )
}
NO_CODE = {("table", 1), ("figure", 1), *(("figure", number) for number in range(6, 13))}


def tokens(code: str) -> str:
    """The tokens of a piece of Python, one a line, without comments and white space."""
    blank = "COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"
    found = tokenize.generate_tokens(io.StringIO(code).readline)
    return "".join(f"{t.string}\n" for t in found if tokenize.tok_name[t.type] not in blank)


def test_every_link_of_the_reading_to_code_names_something():
    assert len(LINKS) == READING.count("](../xsam/")
    assert len(QUOTES) == READING.count("```") / 2


@pytest.mark.parametrize("link", {link[0]: link for link in LINKS}.values(), ids=lambda x: x[2])
def test_a_link_of_the_reading_leads_somewhere(link):
    assert link[3] == f"../xsam/{link[1]}"
    assert definition(link[1], link[2])


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: quote[1].splitlines()[0].strip())
def test_a_quote_stands_in_what_is_named_before_it(quote):
    """In a quote `...` stands for what is left out."""
    link = max((x for x in LINKS if x.end() < quote.start()), key=lambda link: link.end())
    text = "\n" + tokens(definition(link[1], link[2]))
    for part in re.split(r"^\.\.\.\n,?\n?", tokens(quote[1]), flags=re.M):
        assert f"\n{part}" in text, f"{link[0]} has no {part!r}"
        text = "\n" + text.split(f"\n{part}", 1)[1]


def test_the_reading_has_the_papers_outline():
    """Its headings and the names of its paragraphs, in the paper's order."""
    if not PAPER.exists():
        pytest.skip("the paper's text is not here")
    ours = READING.split("\n# ")[0]
    ours = re.findall(r"^(?:#{2,3} (?:\d[\d.]* )?(.+)|\*\*(.+?)\.\*\* .*)$", ours, re.M)
    ours = [heading or paragraph for heading, paragraph in ours]
    theirs = []
    for line in PAPER.read_text(encoding="utf-8").splitlines()[1:]:
        if re.match(r"[A-Z][^|]{,68}[^.]$", line):
            theirs.append(line.replace("Abaltions", "Ablations"))
        elif paragraph := re.match(r"([A-Z][\w: -]{2,40})\. [A-Z]", line):
            theirs.append(paragraph[1])
    not_read = {"Acknowledgments", "References"}
    assert ours == [each for each in theirs if each not in not_read]


def test_the_reading_has_all_equations_tables_and_figures_of_the_paper():
    assert {kind: list(rows) for kind, rows in ROWS.items()} == {
        "equation": [1, 2, 3],
        "table": list(range(1, 23)),
        "figure": list(range(1, 14)),
    }
    if not PAPER.exists():
        pytest.skip("the paper's text is not here")
    text = PAPER.read_text(encoding="utf-8")
    for kind, rows in ROWS.items():
        pattern = r"^\| \((\d+)\) \|$" if kind == "equation" else rf"{kind.title()} (\d+)"
        assert max(map(int, re.findall(pattern, text, re.M))) == len(rows)


def test_what_computes_an_equation_or_gives_a_table_says_so():
    for kind, rows in ROWS.items():
        for number, cell in rows.items():
            links = re.findall(LINK, cell)
            texts = [source_of(file) for file, *_ in links]
            if kind == "equation":
                texts = [definition(file, name) for file, name, _ in links]
            elif "--tasks" in cell:
                texts = [source_of("evaluation/benchmarks.py")]
            elif "ablations.md" in cell:
                texts = [ABLATIONS]
            assert texts or (kind, number) in NO_CODE
            for text in texts:
                pattern = rf"{kind}s? (?:\d+, |\d+ |and )*{number}\b"
                assert re.search(pattern, text, re.I), f"{kind} {number}: {cell}"


def test_the_code_names_no_section_equation_table_or_figure_that_is_not_there():
    sections = {*re.findall(r"^#+ (\d[\d.]*|Appendix A)\b", READING, re.M)}
    count = 0
    for path in (ROOT / "xsam").rglob("*.py"):
        text = re.sub(r"\s+#?\s*", " ", path.read_text(encoding="utf-8"))
        for mention in re.findall(r"\b[Pp]aper(?:[^.;:()]|\.(?=\d))*", text):
            for kind, numbers in re.findall(
                r"(section|equation|table|figure)s? (\d[\d.]*(?:(?:,| and) \d+)*)", mention
            ):
                for number in re.findall(r"[\d.]+", numbers):
                    known = sections if kind == "section" else {*map(str, ROWS[kind])}
                    assert number in known, f"{path}: {mention}"
                    count += 1
    assert count > 25


def test_the_flags_and_tasks_of_the_reading_exist():
    code = "".join(map(source_of, ("cli.py", "predict.py", "evaluate.py")))
    for flag in set(re.findall(r"--([a-z][a-z_-]+)", READING)):
        is_field = re.search(rf"^    {flag}: ", source_of("config.py"), re.M)
        assert is_field or f'"--{flag}"' in code, flag
    for words in re.findall(r"--tasks ([a-z,]+)", READING):
        assert words == "all" or scored_sets(words.split(","), ROOT)


# ---- the first shelf -----------------------------------------------------------------------------


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
