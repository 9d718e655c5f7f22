"""Lists of class names, in the forms of file that they usually have."""

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

from xsam.files import read_text
from xsam.prompts import check_words

_COLUMNS = ("name", "names", "class", "class_name", "label", "category")


def read_names(text: str) -> list[str]:
    """A list of class names: separated by commas, or the path of a file (`names_in`). Background
    and no class are skipped.

    Raises ValueError where the list is empty, a file is absent or holds something else, or a name
    holds a token of the prompt format.
    """
    looks_like_path = "," not in text and re.search(r"[/\\]|\.[A-Za-z]\w*$", text.strip())
    try:
        is_file = looks_like_path or os.path.isfile(text)
        names = names_in(Path(text)) if is_file else text.split(",")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{text}: cannot be read as a list of names ({error})") from error
    names = [name.strip() for name in names if name.strip()]
    names = [name for name in names if name.lower() not in ("background", "invalid_class_id")]
    if not names:
        raise ValueError(f"{text!r}: no names in it")
    return [check_words(name, f"name {name!r}") for name in names]


def names_in(path: Path) -> list[str]:
    """The names in a file: JSON (a list of names or of {"name"}, {number: name}, {name: number}, or
    with COCO's "categories"), the `names:` of a YOLO YAML, a table with a column of names, of which
    the first alias counts, or one a line, where "number:name,alias,…" stands for its name.

    Raises ValueError where it holds something else."""
    text, suffix = read_text(path), path.suffix.lower()
    lines = [line for line in text.splitlines() if line.strip()]
    if suffix == ".json":
        return _from_json(json.loads(text))
    if suffix in (".yaml", ".yml"):
        return _from_yaml("\n".join(line for line in lines if not line.lstrip().startswith("#")))
    if suffix in (".csv", ".tsv") or any("\t" in line for line in lines):
        return _from_table(lines)
    numbered = [re.fullmatch(r"\s*\d+\s*:([^,]*).*", line) for line in lines]
    return [found[1] if found else line for found, line in zip(numbered, lines, strict=True)]


def _from_json(content: Any) -> list[str]:
    for key in ("categories", "names", "id2label"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if isinstance(content, dict):
        values = list(content.values())
        content = list(content) if all(isinstance(value, int) for value in values) else values
    records = content if isinstance(content, list) else [content]
    names = [record.get("name") if isinstance(record, dict) else record for record in records]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"{str(wrong[0])[:60]!r} is no name")
    return names


def _from_yaml(text: str) -> list[str]:
    """`names: [a, b]` or `names: {0: a, 1: b}`, or a line for each as `- a` or `0: a`."""
    listed, lines = r"[\[{][^\]}]*[\]}]", r"(?:\n[ \t]*(?:-|\d+ *:)[^\n]*)+"
    found = re.search(rf"^names *:[ \t]*({listed}|{lines})", text, re.MULTILINE)
    items = re.split(r",|\n", found[1].strip("[]{}\n")) if found else []
    items = [re.sub(r"^\s*(-|\d+ *:)\s+|\s+#.*$", "", item) for item in items]
    count = re.search(r"^nc *: *(\d+)", text, re.MULTILINE)
    if not items or (count and int(count[1]) != len(items)):
        raise ValueError(f"{len(items)} names under `names:`, `nc:` is {count and count[1]}")
    return [item.strip().strip("\"'") for item in items]


def _from_table(lines: list[str]) -> list[str]:
    """A table with a head, or without one a number and a name a line, or the name alone."""
    delimiter = max("\t;,", key="".join(lines[:1]).count)
    rows = list(csv.reader(lines, delimiter=delimiter))
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((place for place, cell in enumerate(head) if cell in _COLUMNS), len(head))
    if column < min(map(len, rows), default=0):
        return [row[column].split(",")[0] for row in rows[1:]]
    if all(len(row) == 1 or (len(row) == 2 and row[0].isdecimal()) for row in rows):
        return [row[-1] for row in rows]
    raise ValueError('no column that every line has is called "name"')
