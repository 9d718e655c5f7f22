"""Files that are made, not downloaded: COCO-VGD, COCO's semantic maps, ADE20K for three tasks.

COCO-VGD is published too: img_vgdseg_coco_train.json and img_vgdseg_coco_val.json, ready made. Only
those give the paper's figures, since their prompts were drawn without a seed; the reader reads them
as they are. Ours have the same layout and keys, and other draws of prompts of the same kind.

Images are processed by a pool of processes, and what is drawn at random for an image depends on its
ids alone, so the output is the same for any number of workers. An output takes its name only once
it is complete. Wrong records raise ValueError naming file and record, an output that exists
FileExistsError. Legend: H W image size, h w size of a connected component.

    python -m xsam.data vgd --instances instances_val2017.json --out img_vgdseg_coco_val.json
"""

import argparse
import contextlib
import functools
import inspect
import json
import multiprocessing
import os
import signal
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from xsam.cli import count
from xsam.datasets import formats, records
from xsam.datasets.formats import bounding_box, decode_mask, dilate, encode_mask
from xsam.datasets.records import CocoImage, CocoInstance, CocoSegment, Id, by_id, parse, take
from xsam.datasets.sources import PROMPT_RADII, PROMPT_TYPES
from xsam.files import complete, find_file, list_files, read_json, read_text, refuse_existing
from xsam.images import read_image, read_image_size

# ---- visual prompts ------------------------------------------------------------------------------

LARGEST_SPECK = 5  # pixels; a component no larger than that gets no prompt

BLUR_SIGMA = 2.0


def visual_prompts(
    mask: np.ndarray, rng: np.random.Generator, is_dilated: bool = True
) -> dict[str, np.ndarray]:
    """The four prompts for an object's mask, bool [H, W], by PROMPT_TYPES, each bool [H, W].

    Each 8-connected component adds its part; a mask of nothing but specks gets four empty prompts.
    Not dilated, point and scribble are one pixel wide, as COCO-Interactive stores them (PSALM);
    dilated, they are as in COCO-VGD (paper appendix A).
    """
    prompts = {kind: np.zeros(mask.shape, bool) for kind in PROMPT_TYPES}
    if not mask.any():
        return prompts
    left, top, width, height = bounding_box(mask)
    labels, _ = ndimage.label(mask[top : top + height, left : left + width], np.ones((3, 3)))
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        component = labels[rows, columns] == number  # [h, w]
        if component.sum() <= LARGEST_SPECK:
            continue
        corner = np.array([top + rows.start, left + columns.start])
        for kind, draw in _DRAW.items():
            patch, offset = draw(component, rng)
            unite(prompts[kind], patch, corner + offset)
        unite(prompts["mask"], *_blurred(component, corner, mask.shape))
    if is_dilated:
        prompts |= {kind: dilate(prompts[kind], radius) for kind, radius in PROMPT_RADII.items()}
    return prompts


# Each of these takes a component [h, w] and gives a patch, bool of any size, and the (row, column)
# of the patch's corner as seen from the component's; it may reach beyond the image.


def _point(component: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, tuple]:
    """A pixel inside, drawn with a weight of one over its distance from the middle, where the box
    has width and height one: on a disc, its mean distance is half the radius."""
    inside = np.argwhere(component)
    distance = np.linalg.norm((inside - inside.mean(axis=0)) / component.shape, axis=1)
    weights = 1 / distance.clip(min=0.5 / max(component.shape))  # half a pixel
    return np.ones((1, 1), bool), tuple(rng.choice(inside, p=weights / weights.sum()))


def _scribble(component: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, tuple]:
    """A diagonal of the box, scaled by 0.5 to 1.2 around its centre, that swings like a sine: by 10
    to 20 pixels, but by no more than a third of the box's shorter side, so that its middle stays in
    the box. Of the two diagonals the one that has more of itself on the object."""
    size = np.array(component.shape)
    span = rng.uniform(0.5, 1.2) * (size - 1)
    along = np.linspace(-0.5, 0.5, 8 * size.sum() + 1)[:, None]  # so close: no pixel is skipped
    waves, phase = rng.uniform(1, 3), rng.random()
    swing = min(rng.uniform(10, 20), (size.min() - 1) / 3)
    across = span[::-1] * (1, -1) / max(np.linalg.norm(span), 1)
    path = along * span + swing * np.sin(2 * np.pi * (waves * along + phase)) * across
    lines = [np.rint((size - 1) / 2 + path * turn).astype(int) for turn in ((1, 1), (1, -1))]
    inside = [line[((line >= 0) & (line < size)).all(axis=1)] for line in lines]
    path = lines[np.argmax([component[tuple(line.T)].sum() for line in inside])]  # [P, 2]
    offset = path.min(axis=0)
    patch = np.zeros(path.max(axis=0) - offset + 1, bool)
    patch[tuple((path - offset).T)] = True
    return patch, tuple(offset)


def _box(component: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, tuple]:
    """The component's box, filled, larger or smaller by up to a tenth around the same centre."""
    scale = rng.uniform(0.9, 1.1)
    size = [max(1, round(scale * side)) for side in component.shape]
    offset = [(side - new) // 2 for side, new in zip(component.shape, size, strict=True)]
    return np.ones(size, bool), tuple(offset)


_DRAW = {"point": _point, "scribble": _scribble, "box": _box}


def _blurred(component: np.ndarray, corner: np.ndarray, size: tuple[int, int]) -> tuple:
    """The component [h, w] at `corner` after a Gaussian blur, cut at the blur's mean over the whole
    image of `size`: the smaller the object, the farther the prompt goes beyond it, by up to four
    sigma. A patch and the (row, column) of its corner, inside the image."""
    margin = int(4 * BLUR_SIGMA)
    before = np.minimum(corner, margin)
    after = np.minimum(size - corner - component.shape, margin)
    window = np.pad(component.astype(float), np.stack([before, after], axis=1))
    blurred = ndimage.gaussian_filter(window, BLUR_SIGMA)
    # The slack is for an object that fills the image, where every pixel is the mean.
    return blurred > (1 - 1e-6) * blurred.sum() / np.prod(size), corner - before


def unite(mask: np.ndarray, patch: np.ndarray, corner: Sequence[int]) -> None:
    """Adds to a mask, bool [H, W], in place, what of a patch, bool of any size, with its corner at
    (row, column) lies inside it."""
    (top, left), (height, width) = corner, patch.shape
    into = mask[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    into |= patch[max(-top, 0) :, max(-left, 0) :][: into.shape[0], : into.shape[1]]


# ---- reading and writing -------------------------------------------------------------------------


def run_each(function: Callable, jobs: list, num_workers: int | None) -> Iterator:
    """`function` of all jobs, in their order, behind a progress bar: by `num_workers` processes, as
    many as there are cores where it is None, in this one at 0 or 1."""
    num_workers = min(os.cpu_count() or 1 if num_workers is None else num_workers, len(jobs))
    with contextlib.ExitStack() as stack:
        results = map(function, jobs)
        if num_workers > 1:
            # Ctrl-C is for this process; it ends the others.
            arguments = num_workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)
            pool = stack.enter_context(multiprocessing.Pool(*arguments))
            results = pool.imap(function, jobs, chunksize=8)
        yield from tqdm(results, total=len(jobs), unit="image")


def _report(made: Path | str, counts: dict[str, int]) -> dict[str, int]:
    print(f"{made}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    return dict(counts)


class Job(NamedTuple):
    """An image and its annotations as (where, record)."""

    image: CocoImage
    annotations: list[tuple[str, dict]]


def _read_coco(path: Path) -> tuple[list[Job], list[int]]:
    """The images of a COCO file and its category ids, both in ascending order."""
    content, file = read_json(path, dict), str(path)
    images = by_id(content, "images", file).items()
    jobs = {n: Job(parse(CocoImage, image, f"{file}: image {n}"), []) for n, image in images}
    for index, annotation in enumerate(take(content, "annotations", list, file)):
        where = f"{file}: annotations[{index}]"
        image_id = take(annotation, "image_id", Id, where)
        if image_id not in jobs:
            raise ValueError(f"{where}: image {image_id!r} is not in its images")
        jobs[image_id].annotations.append((where, annotation))
    return list(jobs.values()), list(by_id(content, "categories", file, int))


# ---- COCO-VGD ------------------------------------------------------------------------------------

XYWH_ABS = 1  # detectron2's BoxMode for COCO's boxes


def build_vgd(
    instances: Path, out: Path, seed: int = 0, num_workers: int | None = None
) -> dict[str, int]:
    """Writes COCO-VGD, a list with a record per image, from a COCO instances file.

    Annotations keep what they have and gain `bbox_mode` and `visual_prompts` (paper appendix A).
    Crowd, invalid rings, annotations without a valid ring and images without an annotation are
    skipped; returns how many, and prints it. The prompts depend on the seed and the ids alone.
    """
    counts = Counter(images=0, annotations=0, crowd=0, bad_rings=0, invalid=0, empty_images=0)
    with complete(Path(out)) as (partial,), partial.open("w", encoding="utf-8") as file:
        jobs, categories = _read_coco(Path(instances))
        make = functools.partial(_vgd_record, seed=seed, categories=set(categories))
        file.write("[")  # record by record: all of them need more memory than a laptop has
        for text, found in run_each(make, jobs, num_workers):
            file.write(f",\n{text}" if text and counts["images"] else text)
            counts.update(found)
        file.write("]")
    return _report(out, counts)


def _vgd_record(job: Job, seed: int, categories: set[int]) -> tuple[str, Counter]:
    """One image's record as JSON, empty where no annotation is left, and what was counted."""
    image, annotations = job
    kept, counts = [], Counter()
    for where, annotation in annotations:
        parts, num_bad = records.mask_parts(annotation.get("segmentation") or [])
        counts["bad_rings"] += num_bad
        if not parts:
            counts["invalid"] += 1
            continue
        instance = parse(CocoInstance, annotation, where)
        records.check_category(instance.category_id, categories, where)
        if instance.iscrowd:
            counts["crowd"] += 1
            continue
        take(annotation, "bbox", list, where)
        shape = parts if isinstance(instance.segmentation, list) else instance.segmentation
        digits = [zlib.crc32(str(number).encode()) for number in (image.id, instance.id)]
        mask = decode_mask(shape, image.size, where, may_be_empty=True)
        prompts = visual_prompts(mask, np.random.default_rng([seed, *digits]))
        encoded = {f"{kind}_visual_prompt": encode_mask(mask) for kind, mask in prompts.items()}
        added = dict(segmentation=shape, bbox_mode=XYWH_ABS, visual_prompts=encoded)
        kept.append(annotation | added)
    if not kept:
        return "", counts + Counter(empty_images=1)
    info = dict(id=image.id, file_name=image.file_name, height=image.size[0], width=image.size[1])
    record = dict(image_file=image.file_name, image_id=image.id, image_size=list(image.size))
    record |= dict(image_info=info, annotations=kept)
    return json.dumps(record), counts + Counter(images=1, annotations=len(kept))


# ---- COCO's semantic maps ------------------------------------------------------------------------

IGNORED = 255


def build_coco_semantic(
    panoptic: Path, masks: Path, out: Path, num_workers: int | None = None
) -> dict[str, int]:
    """Writes a folder of 8-bit PNGs from a COCO panoptic file and its folder `masks`, named
    as there.

    A pixel is the rank of its category's id, IGNORED where there is no segment; crowd is written
    like any other segment. Images without an annotation get no PNG; returns and prints how many.
    """
    with complete(Path(out)) as (partial,):
        jobs, categories = _read_coco(Path(panoptic))
        if len(categories) > IGNORED:
            raise ValueError(f"{panoptic}: {len(categories)} categories, 8 bits hold {IGNORED}")
        labelled = [job for job in jobs if job.annotations]
        counts = Counter(images=0, segments=0, images_without_annotation=len(jobs) - len(labelled))
        partial.mkdir()
        indices = {category: index for index, category in enumerate(categories)}
        make = functools.partial(_semantic_map, masks=Path(masks), out=partial, indices=indices)
        for num_segments in run_each(make, labelled, num_workers):
            counts.update(images=1, segments=num_segments)
    return _report(out, counts)


def _semantic_map(job: Job, masks: Path, out: Path, indices: dict[int, int]) -> int:
    """Writes one image's map; returns its number of segments."""
    image, annotations = job
    name = formats.png_name(annotations[0][1], image.file_name).replace("\\", "/")
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise ValueError(f"{annotations[0][0]}: 'file_name' {name!r} leads out of {masks}")
    path = find_file(masks, name)
    ids = formats.read_segment_ids(path, image.size)
    classes = np.full(image.size, IGNORED, np.uint8)
    num_segments = 0
    for where, annotation in annotations:
        for record in take(annotation, "segments_info", list, where):
            segment = parse(CocoSegment, record, where)
            records.check_category(segment.category_id, indices, where)
            classes[ids == segment.id] = indices[segment.category_id]
            num_segments += 1
    unknown = ids[(classes == IGNORED) & (ids != 0)]
    if unknown.size:
        raise ValueError(f"{path}: segment {unknown[0]} is not in its segments_info")
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(classes).save(out / name)
    return num_segments


# ---- ADE20K --------------------------------------------------------------------------------------

_ADE_SPLITS = {"training": "train", "validation": "val"}  # as the outputs call them

_MAPPING = "ade20k_instance_catid_mapping.txt"

_ADE_URLS = (
    "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
    "http://sceneparsing.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar",
)

# A line for each class: its name in the public panoptic file, which scores are published with.
_ADE_NAMES = Path(__file__).with_name("ade20k_names.txt")


def convert_ade20k(
    folder: Path,
    splits: Sequence[str] = tuple(_ADE_SPLITS),
    num_workers: int | None = None,
    aliases: bool = False,
) -> dict[str, dict[str, int]]:
    """Writes semantic, panoptic and instance annotations beside the downloads under `folder`.

    Reads images, annotations and annotations_instance of each split, objectInfo150.txt (classes)
    and the mapping file (which of them are things). Class ids count from 0 and image ids are file
    stems. Names are those of the public panoptic file, with `aliases` (or where there are not 150
    classes) the longer lists of objectInfo150.txt. As in the published files, things cover stuff,
    but a stuff segment keeps the area and box that it had before, even where no pixel of it is
    left. Returns counts by split. Raises FileNotFoundError, which says what to download.
    """
    folder = Path(folder)
    for split in splits:
        _check_downloads(folder, split)
        refuse_existing(*_ade_outputs(folder, split))
    categories, things = _read_ade_classes(folder, aliases)
    return {
        split: _convert_split(folder, split, categories, things, num_workers) for split in splits
    }


def _check_downloads(folder: Path, split: str) -> None:
    if split not in _ADE_SPLITS:
        raise ValueError(f"unknown split {split!r} of ADE20K; known are {', '.join(_ADE_SPLITS)}")
    scenes = f"unpack {_ADE_URLS[0]} and take its folder ADEChallengeData2016"
    mends = dict.fromkeys(("objectInfo150.txt", f"images/{split}", f"annotations/{split}"), scenes)
    mends[f"annotations_instance/{split}"] = f"it has an archive of its own: {_ADE_URLS[1]}"
    mends[_MAPPING] = "copy it from the folder datasets of github.com/facebookresearch/Mask2Former"
    for name, mend in mends.items():
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing: {mend}")


def _ade_outputs(folder: Path, split: str) -> list[Path]:
    """Semantic PNGs, panoptic PNGs, panoptic file, instance file."""
    name = _ADE_SPLITS[split]
    panoptic = [f"ade20k_panoptic_{name}", f"ade20k_panoptic_{name}.json"]
    names = [f"annotations_detectron2/{split}", *panoptic, f"ade20k_instance_{name}.json"]
    return [folder / name for name in names]


def _read_ade_classes(folder: Path, aliases: bool) -> tuple[list[dict], dict[int, int]]:
    """COCO's panoptic categories, and the category ids of the instance classes."""
    path = folder / "objectInfo150.txt"
    rows = [list(row.values()) for row in formats.read_tsv(path)]
    if [row[0].strip() for row in rows] != [str(index + 1) for index in range(len(rows))]:
        raise ValueError(f"{path}: its first column does not count the classes from 1")
    path, things = folder / _MAPPING, {}
    for number, line in enumerate(read_text(path, last_resort="cp1252").splitlines()[1:], start=2):
        # Runs of tabs part the columns. The last one, the class of the full ADE, is not needed, but
        # an instance class that joins several of those has a line for every one.
        columns = [int(word) if word.isdecimal() else 0 for word in line.split()[:2]]
        if columns and (len(columns) < 2 or min(columns) < 1 or columns[1] > len(rows)):
            raise ValueError(
                f"{path}: line {number} is {line!r}, expected an instance class and one of the "
                f"{len(rows)} classes of objectInfo150.txt"
            )
        if columns and things.setdefault(columns[0], columns[1] - 1) != columns[1] - 1:
            raise ValueError(f"{path}: line {number}: instance class {columns[0]} has two classes")
    categories, names = [], read_text(_ADE_NAMES).splitlines()
    if aliases or len(rows) != len(names):
        names = [row[-1] for row in rows]
    for index, name in enumerate(names):
        color = [(index + 1) * 0x9E3779 >> shift & 255 for shift in (0, 8, 16)]  # all different
        isthing = int(index in things.values())
        categories.append(dict(id=index, name=name, isthing=isthing, color=color))
    return categories, things


def _convert_split(
    folder: Path, split: str, categories: list, things: dict[int, int], num_workers: int | None
) -> dict[str, int]:
    stems = [path.stem for path in list_files(folder / "images" / split, ".jpg")]
    if not stems:
        raise FileNotFoundError(f"{folder / 'images' / split}: holds no .jpg; unpack it again")
    images, annotations, instances = [], [], []
    with complete(*_ade_outputs(folder, split)) as partials:
        *folders, panoptic_file, instance_file = partials
        for path in folders:
            path.mkdir()
        kinds = "images", "annotations", "annotations_instance"
        paths = (*(folder / kind / split for kind in kinds), *folders)
        make = functools.partial(_ade_image, folders=paths, categories=categories, things=things)
        for image, segments, objects in run_each(make, stems, num_workers):
            images.append(image)
            name = f"{image['id']}.png"
            annotations.append(dict(image_id=image["id"], file_name=name, segments_info=segments))
            first = len(instances) + 1
            instances += [dict(id=number) | record for number, record in enumerate(objects, first)]
        content = dict(images=images, annotations=annotations, categories=categories)
        panoptic_file.write_text(json.dumps(content), encoding="utf-8")
        named = [dict(id=c["id"], name=c["name"]) for c in categories if c["isthing"]]
        content = dict(images=images, annotations=instances, categories=named)
        instance_file.write_text(json.dumps(content), encoding="utf-8")
    num_segments = sum(len(annotation["segments_info"]) for annotation in annotations)
    counts = dict(images=len(images), segments=num_segments, instances=len(instances))
    return _report(f"{folder}, {split}", counts)


def _ade_image(
    stem: str, folders: tuple[Path, ...], categories: list[dict], things: dict[int, int]
) -> tuple[dict, list[dict], list[dict]]:
    """Writes the semantic and panoptic PNG of an image; returns its record, its segments_info and
    its instance annotations, as yet without ids."""
    jpgs, class_maps, instance_maps, semantic, panoptic = folders
    name = f"{stem}.png"
    size = read_image_size(class_maps / name)
    read_image(jpgs / f"{stem}.jpg", size)
    classes = formats.read_class_map(class_maps / name, size)
    classes = classes - np.uint8(1)  # what is unlabelled, 0, becomes IGNORED
    stuff = list(_stuff_masks(classes, categories, class_maps / name))
    codes = read_image(instance_maps / name, size)
    objects = _thing_masks(codes, things, instance_maps / name)
    ids = np.zeros(size, np.int32)
    segments, instances = [], []
    for segment_id, (category, mask) in enumerate([*stuff, *objects], start=1):
        ids[mask] = segment_id
        about = dict(category_id=category, area=int(mask.sum()), bbox=bounding_box(mask), iscrowd=0)
        segments.append(dict(id=segment_id) | about)
        if segment_id > len(stuff):
            instances.append(dict(image_id=stem) | about | dict(segmentation=encode_mask(mask)))
    Image.fromarray(classes).save(semantic / name)
    Image.fromarray(formats.segment_colours(ids)).save(panoptic / name)
    image = dict(id=stem, file_name=f"{stem}.jpg", width=size[1], height=size[0])
    return image, segments, instances


def _stuff_masks(classes: np.ndarray, categories: list[dict], path: Path) -> Iterator[tuple]:
    """(category id, mask) of the stuff classes in a map from 0; IGNORED is none."""
    for index in np.unique(classes[classes != IGNORED]).tolist():
        if index >= len(categories):
            raise ValueError(f"{path}: class {index + 1}, objectInfo150.txt has {len(categories)}")
        if not categories[index]["isthing"]:
            yield index, classes == index


def _thing_masks(picture: Image.Image, things: dict[int, int], path: Path) -> Iterator[tuple]:
    """(category id, mask) of the objects: red is the instance class, green counts, 0 is void."""
    codes = np.asarray(picture, np.int32) @ (256, 1, 0)  # [H, W]
    for code in np.unique(codes[codes % 256 > 0]).tolist():
        if code // 256 not in things:
            raise ValueError(f"{path}: instance class {code // 256} is not in {_MAPPING}")
        yield things[code // 256], codes == code


# ---- commands ------------------------------------------------------------------------------------


def add_commands(subparsers: Any) -> None:
    """Adds vgd, coco-semantic and ade20k to what `ArgumentParser.add_subparsers` gives; they set
    `run`, which takes the options and returns the exit code."""
    path = dict(type=Path, required=True)
    example = "--instances instances_val2017.json --out img_vgdseg_coco_val.json"
    about = "COCO instances to COCO-VGD: four visual prompts for every object"
    add = add_command(subparsers, "vgd", build_vgd, about, example)
    add("--instances", metavar="FILE", help="JSON of COCO instances", **path)
    add("--out", metavar="FILE", help="JSON to write", **path)
    add("--seed", type=count, default=0, help="seed of the prompts (default: %(default)s)")
    example = "--panoptic panoptic_val2017.json --masks panoptic_val2017"
    example += " --out panoptic_semseg_val2017"
    about = "COCO panoptic to PNGs of classes"
    add = add_command(subparsers, "coco-semantic", build_coco_semantic, about, example)
    add("--panoptic", metavar="FILE", help="JSON of COCO panoptic", **path)
    add("--masks", metavar="DIR", help="the folder of its PNGs", **path)
    add("--out", metavar="DIR", help="folder to write", **path)
    example, splits = "--folder img_ovseg/ade20k --splits validation", ",".join(_ADE_SPLITS)
    about = "ADE20K-150 as downloaded to semantic, panoptic and instance annotations beside it"
    add = add_command(subparsers, "ade20k", convert_ade20k, about, example)
    add("--folder", metavar="DIR", help="holds images, annotations, ...", **path)
    about = "name classes by the alias lists of objectInfo150.txt, not as the public files do"
    add("--aliases", action="store_true", help=about)
    about = "splits to convert (default: %(default)s)"
    add("--splits", type=lambda text: text.split(","), default=splits, help=about)


def add_command(subparsers: Any, name: str, build: Callable, about: str, example: str) -> Callable:
    """A sub-command that calls `build` with its options; returns what adds options to it."""
    example = f"example: python -m xsam.data {name} {example}"
    parser = subparsers.add_parser(name, help=about, description=about, epilog=example)
    workers = "processes that read and write (default: one for every core)"
    parser.add_argument("--workers", type=count, dest="num_workers", metavar="N", help=workers)

    def run(options: argparse.Namespace) -> int:
        build(**{key: getattr(options, key) for key in inspect.signature(build).parameters})
        return 0

    parser.set_defaults(run=run)
    return parser.add_argument
