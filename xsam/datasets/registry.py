"""Every dataset of the paper by its name (paper table 10, appendix A), or a user's own file.

sources.py says where a set lies and in which format, READERS which class reads that format.
"""

import dataclasses
from pathlib import Path

from xsam.datasets.base import Dataset
from xsam.datasets.chat import Benchmark, Llava
from xsam.datasets.generic import Instances, Panoptic, Regions, Semantic
from xsam.datasets.grounded import GcgFlickr, GcgGrounded, GcgRefs, GcgScored
from xsam.datasets.prompted import VisualPrompts
from xsam.datasets.referring import OwnReferring, Reason, RefCoco
from xsam.datasets.sources import find_source, recognise
from xsam.prompts import Phrasings
from xsam.tasks import TASKS

READERS: dict[str, type[Dataset]] = {
    "panoptic": Panoptic,
    "instance": Instances,
    "semantic": Semantic,
    "regions": Regions,
    "refs": RefCoco,
    "own_refs": OwnReferring,
    "reason": Reason,
    "gcg_grounded": GcgGrounded,
    "gcg_refs": GcgRefs,
    "gcg_flickr": GcgFlickr,
    "gcg_scored": GcgScored,
    "visual_prompts": VisualPrompts,
    "llava": Llava,
    "tsv": Benchmark,
}


def read_dataset(
    name: str,
    root: Path,
    all_classes: bool = False,
    phrasings: Phrasings | None = None,
    is_scored: bool = False,
) -> Dataset:
    """The dataset that SOURCES calls `name`, or a user's own file (`find_source`), even if records
    of it are wrong. `is_scored`: of an own one the records to be scored, not those to train on.
    Raises ValueError where a file cannot be read, or its task or format is in no table."""
    source = find_source(name)
    if source.format == "own":
        source = recognise(source, Path(root))
        source = dataclasses.replace(source, split="val" if is_scored else "")
    needed = ("TASKS", TASKS, source.task), ("READERS", READERS, source.format)
    for table, entries, key in needed:
        if key not in entries:
            raise ValueError(f"set {name}: {table} has no {key!r} (docs/adding.md)")
    return READERS[source.format](name, source, Path(root), all_classes, phrasings)


def open_dataset(
    name: str,
    root: Path,
    all_classes: bool = False,
    phrasings: Phrasings | None = None,
    skip_bad: bool = False,
    is_scored: bool = False,
) -> Dataset:
    """The dataset of that name, for use. Raises ValueError also where nothing is in it, or, without
    `skip_bad`, where a record breaks the format's rules."""
    dataset = read_dataset(name, root, all_classes, phrasings, is_scored)
    if dataset.problems and not skip_bad:
        more = f" (and {len(dataset.problems) - 1} more)" if len(dataset.problems) > 1 else ""
        raise ValueError(
            f"{dataset.problems[0]}{more}; `python -m xsam.data check` lists all (training goes "
            "without them with --skip-bad)"
        )
    if not len(dataset):
        reasons = [f"first {problem}" for problem in dataset.problems[:1]]
        reasons += [f"{count} {what}" for what, count in (+dataset.skipped).items()]
        raise ValueError(", ".join([f"{dataset.annotations}: no sample of {name} in it", *reasons]))
    return dataset
