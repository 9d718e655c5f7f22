"""Every dataset of the paper by its name (paper table 10, appendix A), or a user's own file.

sources.py says where a set lies and in which format, READERS which class reads that format.
"""

import dataclasses
from pathlib import Path

from xsam.datasets.base import Dataset
from xsam.datasets.chat import Benchmark, Llava
from xsam.datasets.generic import Instances, Panoptic, Semantic
from xsam.datasets.grounded import GcgFlickr, GcgGrounded, GcgRefs, GcgScored
from xsam.datasets.prompted import VisualPrompts
from xsam.datasets.records import take
from xsam.datasets.referring import OwnReferring, Reason, RefCoco
from xsam.datasets.sources import Source, find_source, locate
from xsam.files import read_json
from xsam.prompts import PHRASINGS

READERS: dict[str, type[Dataset]] = {
    "panoptic": Panoptic,
    "instance": Instances,
    "semantic": Semantic,
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

# What other programs' own files have, of the whole or of the first record.
FOREIGN = {"_via_img_metadata": "VGG Image Annotator", "regions": "VGG Image Annotator"}
FOREIGN |= {"shapes": "labelme", "data": "Label Studio", "objects": "Supervisely"}
FOREIGN |= {"data_row": "Labelbox", "Label": "Labelbox", "items": "Datumaro"}


def read_dataset(
    name: str, root: Path, all_classes: bool = False, phrasings: dict = PHRASINGS
) -> Dataset:
    """The dataset that SOURCES calls `name`, or a user's own file (`find_source`), even if records
    of it are wrong. Raises ValueError where a file cannot be read."""
    source = find_source(name)
    if source.format == "own":
        source = recognise(source, Path(root))
    return READERS[source.format](name, source, Path(root), all_classes, phrasings)


def open_dataset(
    name: str,
    root: Path,
    all_classes: bool = False,
    phrasings: dict = PHRASINGS,
    skip_bad: bool = False,
) -> Dataset:
    """The dataset of that name, for use. Raises ValueError also where nothing is in it, or, without
    `skip_bad`, where a record breaks the format's rules."""
    dataset = read_dataset(name, root, all_classes, phrasings)
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


def recognise(source: Source, root: Path) -> Source:
    """A user's own file: a list is referring, a dict COCO's panoptic or instance layout."""
    path = locate(root, source.annotations)
    content = read_json(path)
    parts = list(content.values()) if isinstance(content, dict) else content
    keys = [key for part in (content, *parts[:1]) if isinstance(part, dict) for key in part]
    if programs := [program for sign, program in FOREIGN.items() if sign in keys]:
        mend = "export it in the COCO format"
        if programs[0] == "labelme":
            mend += f" (python -m xsam.data convert {path.parent} --out FILE.json does)"
        raise ValueError(f"{path}: is a file of {programs[0]}; {mend}")
    if isinstance(content, list):
        return dataclasses.replace(source, task="refer", format="own_refs")
    annotations = take(content, "annotations", list, str(path))
    if annotations and isinstance(annotations[0], dict) and "segments_info" in annotations[0]:
        if not source.masks:
            raise ValueError(f"{path}: panoptic, so name its PNGs: FILE.json:IMAGES:MASKS")
        return dataclasses.replace(source, task="generic", format="panoptic")
    return dataclasses.replace(source, task="generic", format="instance")
