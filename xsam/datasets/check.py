"""Reports for every dataset what is there, what is missing and where it goes, and what is wrong.

    python -m xsam.data check --data datas
    python -m xsam.data check --data datas --datasets refcoco,reasonseg --show 4 --out pictures

Reads every record as training would (or `--limit` of them, evenly spaced) and lists those that
cannot be used. With `--show` it draws samples: the prompt at the left, with the visual prompts in
the image (or in others before it), and the answer with its targets at the right.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from xsam.cli import count
from xsam.config import xsam
from xsam.datasets.base import Dataset
from xsam.datasets.referring import OwnReferring
from xsam.datasets.registry import read_dataset
from xsam.datasets.sources import SOURCES, find_source, paths_of
from xsam.files import check_target
from xsam.llm import unknown_words
from xsam.prompts import Phrasings, read_phrasings
from xsam.report.samples import draw_sample
from xsam.weights import read_tokenizer

MOST_SHOWN = 5  # bad records of a set in the report, unless --all

MOST_CLASSES = 20  # of a user's own file in the report

MOST_WORDS = 20  # that the tokenizer lacks, of a set, in the report, unless --all


@dataclass
class Report:
    """What is known of one set."""

    name: str
    missing: list[str] = field(default_factory=list)
    num_samples: int = 0
    num_read: int = 0
    skipped: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    unknown: Counter = field(default_factory=Counter)  # words that the tokenizer lacks
    task: str = ""  # that a user's own file was recognised for
    contents: str = ""  # of such a file

    @property
    def state(self) -> str:
        """In a word: ok, empty, missing, or how many records are bad."""
        if self.missing:
            return "missing"
        if self.problems:
            return f"{len(self.problems)} bad"
        return "ok" if self.num_samples else "empty"


_DATASET: Dataset | None = None  # of a worker, the seed it draws with, and the tokenizer, if any

_SEED, _TOKENIZER = 0, None


def _start(dataset: Dataset, seed: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    global _DATASET, _SEED, _TOKENIZER
    _DATASET, _SEED, _TOKENIZER = dataset, seed, tokenizer


def _read(index: int) -> str | list[str]:
    """What is wrong with a sample, or the words that the tokenizer lacks."""
    try:
        sample = _DATASET.check(index, np.random.default_rng([_SEED, index]))
    except ValueError as error:
        return str(error)
    return unknown_words(_TOKENIZER, *itertools.chain(*sample.turns))


def check_dataset(
    name: str,
    data: Path,
    limit: int = 0,
    num_workers: int = 1,
    seed: int = 0,
    phrasings: Phrasings | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Report, Dataset | None]:
    """The report on a set and, where it can be opened, the set. `limit` 0 reads every sample."""
    source, report = find_source(name), Report(name)
    report.missing = [str(path) for path in paths_of(source, data) if not path.exists()]
    if report.missing:
        return report, None
    try:
        dataset = read_dataset(name, data, phrasings=phrasings)
    except ValueError as error:
        report.problems.append(str(error))
        return report, None
    report.num_samples, report.skipped = len(dataset), +dataset.skipped
    if name not in SOURCES:
        report.task, report.contents = dataset.source.task, f"\n{contents_text(dataset)}"
    indices = evenly(len(dataset), limit or len(dataset))
    report.num_read = len(indices)
    with contextlib.ExitStack() as stack:
        if num_workers > 1:
            pool = multiprocessing.Pool(num_workers, _start, (dataset, seed, tokenizer))
            results = stack.enter_context(pool).imap(_read, indices, chunksize=16)
        else:
            _start(dataset, seed, tokenizer)
            results = map(_read, indices)
        found = list(tqdm(results, total=len(indices), desc=name, unit="sample", leave=False))
    # One damaged file may be read for several samples.
    wrong = [each for each in found if isinstance(each, str)]
    report.problems = list(dict.fromkeys([*dataset.problems, *wrong]))
    report.unknown = Counter(word for each in found if not isinstance(each, str) for word in each)
    return report, dataset


def evenly(length: int, count: int) -> list[int]:
    """Up to `count` indices of a list, evenly spaced."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def table(reports: list[Report]) -> str:
    """A line for each set: task, what uses it, state, samples, how many were read, what is skipped
    by the format's rules."""
    users: dict[str, list[str]] = {}
    for number, stage in xsam().stages.items():
        for name in stage.datasets:
            users.setdefault(name, []).append(f"stage {number}")
    rows = [("set", "task", "for", "state", "samples", "read", "skipped by the rules")]
    for report in reports:
        default = "scoring" if _is_scored(report.name) else "optional"
        used_for = ", ".join(users.get(report.name, [default]))
        counts = [str(count or "") for count in (report.num_samples, report.num_read)]
        skipped = ", ".join(f"{count} {reason}" for reason, count in report.skipped.items())
        task = report.task or find_source(report.name).task or "own"
        rows.append((report.name, task, used_for, report.state, *counts, skipped))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _is_scored(name: str) -> bool:
    source = find_source(name)
    return source.scores != "" or source.format == "tsv"


def contents_text(dataset: Dataset) -> str:
    """What a user's own file trains on: objects and images of every class, or expressions."""
    records = [dataset.records[index] for index in range(len(dataset))]
    if isinstance(dataset, OwnReferring):
        masks = [mask for n in range(len(dataset)) for mask, _ in dataset.asked(n)[1]]
        what = f"{len(masks)} expressions, {masks.count(None)} that nothing fits"
        return f"{dataset.name}: {len(set(map(dataset.image_name, records)))} images, {what}"
    objects, images, index = Counter(), Counter(), dataset.category_index
    for _, annotated, *_ in records:
        found = [index[each.category_id] for each in annotated if not each.iscrowd]
        objects.update(found)
        images.update(set(found))
    names, total = dataset.names, objects.total()
    lines = [f"{dataset.name}: {len(records)} images, {total} objects of {len(names)} classes"]
    for number, _ in objects.most_common(MOST_CLASSES):
        counts = f"{objects[number]} objects in {images[number]} images"
        lines.append(f"  {names[number]}: {counts}")
    if len(objects) > MOST_CLASSES:
        lines.append(f"  … and {len(objects) - MOST_CLASSES} more")
    if without := [name for number, name in enumerate(names) if number not in objects]:
        more = f", … and {len(without) - MOST_CLASSES} more" * (len(without) > MOST_CLASSES)
        lines.append(f"  without an object: {', '.join(without[:MOST_CLASSES])}{more}")
    return "\n".join(lines)


def missing_text(reports: list[Report]) -> str:
    """What is missing and where it goes, every path once."""
    about = {path: find_source(report.name).about for report in reports for path in report.missing}
    lines = [f"  {path}\n      {text}" for path, text in about.items()]
    return "\n".join([f"\n{len(lines)} paths are missing:", *lines]) if lines else ""


def problems_text(reports: list[Report], most: int) -> str:
    """The first bad records of every set."""
    lines = []
    for report in reports:
        if report.problems:
            lines.append(f"\n{report.name}: {len(report.problems)} bad")
            lines += [f"  {problem}" for problem in report.problems[:most]]
            if len(report.problems) > most:
                lines.append(f"  … and {len(report.problems) - most} more (--all lists them)")
    return "\n".join(lines)


def unknown_text(reports: list[Report], most: int) -> str:
    """The most frequent words of every set that the tokenizer lacks, and how many samples each is
    in."""
    lines = []
    for report in filter(lambda each: each.unknown, reports):
        words = [f"{word!r} ({count})" for word, count in report.unknown.most_common(most)]
        words += ["… (--all lists them)"] * (len(report.unknown) > most)
        count = f"\n{report.name}: {len(report.unknown)} words that the tokenizer lacks"
        lines.append(f"{count}: {', '.join(words)}")
    return "\n".join(lines)


def show(dataset: Dataset, count: int, out: Path, seed: int) -> list[Path]:
    """Draws `count` samples, evenly spaced, into `out`, except those that cannot be read."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in evenly(len(dataset), count):
        try:
            sample = dataset.sample(index, np.random.default_rng([seed, index]))
        except ValueError:
            continue  # the report has it
        name = "_".join(Path(dataset.name.split(":")[0]).with_suffix("").parts[-2:])
        paths.append(out / f"{name}_{index:06d}.png")
        draw_sample(sample).save(paths[-1])
    return paths


def run(options: argparse.Namespace) -> int:
    """The command `check` with its options; returns its exit status."""
    names = options.datasets.split(",") if options.datasets else list(SOURCES)
    for name in names:
        find_source(name)  # an unknown one is told before hours of reading
    if options.show:
        check_target(options.out, is_folder=True)
    phrasings = read_phrasings(options.phrasings)
    tokenizer = read_tokenizer(options.tokenizer) if options.tokenizer else None
    reports = []
    for name in names:
        report, dataset = check_dataset(
            name, options.data, options.limit, options.workers, options.seed, phrasings, tokenizer
        )
        reports.append(report)
        if options.show and dataset is not None:
            show(dataset, options.show, options.out, options.seed)
    most = sys.maxsize if options.all else MOST_SHOWN
    texts = [table(reports), *(report.contents for report in reports)]
    texts += [missing_text(reports), problems_text(reports, most)]
    texts.append(unknown_text(reports, most if options.all else MOST_WORDS))
    print("\n".join(filter(None, texts)))
    if options.show and any(report.num_samples for report in reports):
        print(f"\npictures are in {options.out}")
    bad = [r for r in reports if r.problems or (options.datasets and not r.num_samples)]
    return int(bool(bad))


def add_command(commands: Any) -> None:
    """`check` and its flags."""
    parser = commands.add_parser(
        "check",
        help="what is there, what is missing and where it goes, and what is wrong",
        description="Reads every dataset as training and scoring do. Exit status 1: something is "
        "bad, or a set that was named is missing or empty.",
        epilog="example: python -m xsam.data check --data datas --datasets refcoco --show 4",
    )
    add, cores = parser.add_argument, os.cpu_count() or 1
    own = "only these; also files of your own: FILE.json, FILE.json:IMAGES[:MASKS]"
    add("--data", type=Path, default=Path("datas"), help="data root (default: datas)")
    add("--datasets", default="", metavar="NAME,...", help=own)
    add("--show", type=count, default=0, metavar="N", help="draw N samples of each set")
    text = "where pictures go (default: runs/check)"
    add("--out", type=Path, default=Path("runs/check"), help=text)
    text = "read N samples of each set (default: all)"
    add("--limit", type=count, default=0, metavar="N", help=text)
    add("--all", action="store_true", help="list every bad record and unknown word")
    add("--phrasings", default="", metavar="FILE", help="JSON file of phrasings in place of ours")
    text = "the language model's Hugging Face folder: counts the words that its tokenizer lacks"
    add("--tokenizer", type=Path, metavar="DIR", help=text)
    add("--seed", type=count, default=0, help="seed of what is drawn (default: 0)")
    add("--workers", type=count, default=cores, help="processes that read (default: all cores)")
    parser.set_defaults(run=run)
