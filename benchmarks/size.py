"""How large the package is and how it is documented: a table by shelf and room, and one by file.

    python benchmarks/size.py            # by shelf and room, with what could be shorter
    python benchmarks/size.py --files    # the README's table of the two shelves

A code line is one that is neither empty nor comment nor docstring. A function's length is that of
its text, docstring included. A shape comment has a shape in brackets, such as `# [B, N, C]`.
A circle is a ring of modules that import each other at their top. A duplicate is a block of eight
lines or more that stands in two places, whatever its indentation.
"""

import argparse
import ast
import io
import re
import tokenize
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "xsam"
BOOK = ["config", "tasks", "prompts", "data", "encoders", "connector", "llm", "decoder", "losses"]
BOOK += ["model", "optimizer", "train"]
SHAPE = re.compile(r"#.*\[[A-Z0-9][\w ·*+×/]*(, ?[\w ·*+×/.…-]+)*\]")
DUPLICATE = 8
DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
SKIPPED = tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT
SKIPPED += (tokenize.ENDMARKER,)


def has_docstring(node: ast.AST) -> bool:
    return isinstance(node, (*DEFINITIONS, ast.Module)) and ast.get_docstring(node) is not None


def code_lines(text: str) -> list[int]:
    """The numbers of the code lines of a program."""
    nodes = [node for node in ast.walk(ast.parse(text)) if has_docstring(node)]
    docstrings = {line for n in nodes for line in range(n.body[0].lineno, n.body[0].end_lineno + 1)}
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in SKIPPED
        for line in range(token.start[0], token.end[0] + 1)
    }
    return sorted(lines - docstrings)


class File:
    """What is counted of one file."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.relative_to(ROOT).as_posix()
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        folder, _, _ = self.name.rpartition("/")
        is_book = not folder and path.stem in BOOK
        self.shelf = f"{folder}/" if folder else "first shelf" if is_book else "second shelf"
        nodes = list(ast.walk(self.tree))
        documented = [n for n in nodes if has_docstring(n)]
        self.code = code_lines(self.text)
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        self.shapes = sum(SHAPE.search(comment) is not None for comment in comments)
        functions = [n for n in nodes if isinstance(n, DEFINITIONS[:2])]
        self.lengths = {f"{self.name}: {n.name}": n.end_lineno - n.lineno + 1 for n in functions}
        owners = [self.tree, *(n for n in self.tree.body if isinstance(n, ast.ClassDef))]
        owners = [n for n in owners if not getattr(n, "name", "").startswith("_")]
        public = [n for owner in owners for n in owner.body if isinstance(n, DEFINITIONS)]
        public = [n for n in public if not n.name.startswith("_")]
        self.public = {f"{self.name}: {n.name}": n in documented for n in public}

    def imports(self, names: set[str]) -> set[str]:
        """The modules of ours that are imported when this one is, by name."""
        found = set()
        for node in self.tree.body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        return found & names


def circles(files: dict[str, File]) -> list[str]:
    """Modules that import themselves through others."""
    arrows = {name: file.imports(files.keys() - {name}) for name, file in files.items()}
    found = []
    for start in arrows:
        reached, new = set(), arrows[start]
        while new:
            reached |= new
            new = {target for name in new for target in arrows[name]} - reached
        found += [start] * (start in reached)
    return found


def duplicates(files: list[File]) -> list[str]:
    """Pairs of places that share DUPLICATE code lines or more, imports not counted."""
    places = defaultdict(list)
    for file in files:
        lines = file.text.splitlines()
        code = [(n, lines[n - 1].strip()) for n in file.code]
        code = [(n, line) for n, line in code if len(line) > 2]
        for start in range(len(code) - DUPLICATE + 1):
            block = tuple(line for _, line in code[start : start + DUPLICATE])
            if not any(line.startswith(("from ", "import ")) for line in block):
                places[block].append(f"{file.name}:{code[start][0]}")
    return [" = ".join(where) for where in places.values() if len(where) > 1]


def read() -> dict[str, File]:
    """All files of the package by the name of their module."""
    paths = sorted(ROOT.rglob("*.py"))
    names = [".".join(("xsam", *path.relative_to(ROOT).with_suffix("").parts)) for path in paths]
    return {
        name.removesuffix(".__init__"): File(path) for name, path in zip(names, paths, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts the package's code and documentation.")
    parser.add_argument("--files", action="store_true", help="a line for each file instead")
    by_name = parser.parse_args().files
    files = read()
    groups = defaultdict(list)
    for file in files.values():
        groups[file.name if by_name else file.shelf].append(file)
    order = {name: number for number, name in enumerate(["first shelf", "second shelf"])}
    order |= {f"{name}.py": number for number, name in enumerate(BOOK)}
    print("| | files | code lines | longest function | over 50 lines | documented | shapes |")
    print("|---|---|---|---|---|---|---|")
    for name, group in [*sorted(groups.items(), key=lambda x: order.get(x[0], 99)),
                        ("all", list(files.values()))]:  # fmt: skip
        lengths = [length for file in group for length in file.lengths.values()]
        public = [is_documented for file in group for is_documented in file.public.values()]
        share = f"{sum(public)} of {len(public)}"
        print(f"| {name} | {len(group)} | {sum(len(file.code) for file in group):,} | "
              f"{max(lengths, default=0)} | {sum(n > 50 for n in lengths)} | {share} | "
              f"{sum(file.shapes for file in group)} |")  # fmt: skip
    if by_name:
        return
    every = {name: n for file in files.values() for name, n in file.lengths.items() if n > 50}
    print("\nfunctions over 50 lines:", *sorted(every.items(), key=lambda x: -x[1]), sep="\n  ")
    bare = [name for file in files.values() for name, done in file.public.items() if not done]
    print("\npublic, without a docstring:", *bare, sep="\n  ")
    print("\ncircles:", *(circles(files) or ["none"]), sep="\n  ")
    print("\nduplicates:", *(duplicates(list(files.values())) or ["none"]), sep="\n  ")


if __name__ == "__main__":
    main()
