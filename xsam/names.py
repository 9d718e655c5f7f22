"""Lists of class names, in the forms of file that they usually have."""

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

from xsam.files import read_text
from xsam.prompts import check_words

_COLUMNS = ("name", "names", "class_name", "class", "label", "category")  # the first that there is

_NUMBERS = ("id", "idx", "index", "number", "class_id", "category_id")  # columns that order a table

_NO_CLASS = ("background", "__background__", "n/a", "invalid_class_id")

_TEXTS = ("", ".txt", ".names", ".list", ".lst", ".labels", ".classes")  # with one name a line

# What a line may begin with: "0 cat", "0: cat", "0. cat", "0) cat", "0,cat", "n02123045 cat"
_NUMBERED = re.compile(r"\s*(?:(\d+)(?:\s*[:.),]|\s)|n\d{8}\s)\s*(.*)")


def read_names(text: str) -> list[str]:
    """A list of class names: separated by commas, or the path of a file (`names_in`). Background
    and no class are skipped.

    Raises ValueError where the list is empty, a file is absent or holds something else, or a name
    holds a token of the prompt format.
    """
    looks_like_path = "," not in text and re.search(r"[/\\]|^\.|\.[A-Za-z]\w*$", text.strip())
    try:
        is_file = looks_like_path or os.path.isfile(text)
        names = names_in(Path(text)) if is_file else text.split(",")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{text}: cannot be read as a list of names ({error})") from error
    names = [name.strip() for name in names if name.strip()]
    names = [name for name in names if name.lower() not in _NO_CLASS]
    if not names:
        raise ValueError(f"{text!r}: no names in it")
    return [check_words(name, f"name {name!r}") for name in names]


def names_in(path: Path) -> list[str]:
    """The names in a file: JSON (a list of names or of {"name"}, {number: name}, {name: number}, or
    with COCO's "categories"), the `names:` of a YOLO YAML, a table with a column of names, of which
    the first alias counts, or one a line, numbered or not, or all in a line. Names are in the order
    of their numbers, where they have such.

    Raises ValueError where it holds something else."""
    text, suffix = read_text(path), path.suffix.lower()
    lines = [line for line in text.splitlines() if line.strip()]
    if suffix == ".json":
        return _from_records(json.loads(text))
    if suffix in (".yaml", ".yml"):
        return _from_yaml(text)
    if suffix in (".csv", ".tsv") or any("\t" in line for line in lines):
        return _from_table(lines)
    if suffix not in _TEXTS:
        raise ValueError(f"a {suffix} file; give .txt with a name a line, CSV, JSON or YAML")
    lines = [line for line in lines if not line.lstrip().startswith("#")]
    if text.lstrip().startswith(("[", "{", "- ")):
        return _from_yaml(text)
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if lines and all(numbered):
        return _in_order([(match[1], match[2].split(",")[0]) for match in numbered])
    if len(lines) == 1:
        lines = lines[0].split(",")
    names = [line.strip().removesuffix(",").strip("\"'") for line in lines]
    if wrong := [name for name in names if re.search("[{}<>]", name)]:
        raise ValueError(f"{wrong[0][:60]!r} is no name")
    return names[1:] if names and names[0].lower() in _COLUMNS else names


def _in_order(pairs: list[tuple[Any, str]]) -> list[str]:
    """Names in the order of their numbers, or as they are where not all have one."""
    keys = [str(number) for number, _ in pairs]
    if all(key.isdecimal() for key in keys) and len(set(keys)) == len(keys):
        pairs = sorted(pairs, key=lambda pair: int(pair[0]))
    return [name for _, name in pairs]


def _from_records(content: Any) -> list[str]:
    for key in ("categories", "names", "id2label"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if isinstance(content, dict):
        pairs = list(content.items())
        if all(str(number).isdecimal() for _, number in pairs):
            pairs = [(number, name) for name, number in pairs]
    else:
        records = content if isinstance(content, list) else [content]
        pairs = [
            (each.get("id"), each.get("name")) if isinstance(each, dict) else (None, each)
            for each in records
        ]
    if wrong := [name for _, name in pairs if not isinstance(name, str)]:
        raise ValueError(f"{str(wrong[0])[:60]!r} is no name")
    return _in_order(pairs)


def _from_yaml(text: str) -> list[str]:
    import yaml  # that transformers brings

    try:
        content = yaml.load(text, Loader=yaml.BaseLoader)  # all scalars are texts
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if isinstance(content, dict) and not content.get("names"):
        raise ValueError("no names under `names:`")
    names = _from_records(content)
    count = content.get("nc", len(names)) if isinstance(content, dict) else len(names)
    if str(count) != str(len(names)):
        raise ValueError(f"{len(names)} names under `names:`, `nc:` is {count}")
    return names


def _from_table(lines: list[str]) -> list[str]:
    """A table with a head, or without one a number and a name a line, or the name alone."""
    delimiter = max("\t;,", key="".join(lines[:1]).count)
    rows = list(csv.reader(lines, delimiter=delimiter))
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((head.index(name) for name in _COLUMNS if name in head), None)
    if column is not None and column < min(map(len, rows)):
        number = next((head.index(name) for name in _NUMBERS if name in head), None)
        cells = [(number is not None and row[number], row[column]) for row in rows[1:]]
        return _in_order([(key, cell.split(",")[0]) for key, cell in cells])
    if all(len(row) == 1 or (len(row) == 2 and row[0].strip().isdecimal()) for row in rows):
        return _in_order([(row[0].strip(), row[-1]) for row in rows])
    raise ValueError('no column that every line has is called "name"')
