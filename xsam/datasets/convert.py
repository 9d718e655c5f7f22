"""A user's own annotations as files that train: labelme's files, masks, tables of expressions.

    python -m xsam.data convert labelled --out mine.json               # labelme's JSON and images
    python -m xsam.data convert labelled --out mine.json --refer       # its labels as expressions
    python -m xsam.data convert maps --images photos --names road,car --out mine.json  # class maps
    python -m xsam.data convert masks --images photos --out mine.json  # masks/CLASS/STEM_1.png
    python -m xsam.data convert table.csv --out mine.json              # columns image, mask, text

Class maps become COCO panoptic and a folder of PNGs, a table a list of referring expressions, all
else COCO instances. File names are written as seen from --images, or else from the output's folder.
What cannot be used raises ValueError naming file and record; what is skipped is counted.
"""

import base64
import functools
import io
import json
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from xsam.datasets.build import add_command, run_each, unite
from xsam.datasets.check import contents_text
from xsam.datasets.formats import bounding_box, encode_mask, read_tsv, segment_colours
from xsam.datasets.records import take, unpack
from xsam.datasets.referring import corners, labelme_image, paint_shapes, whole_pixels
from xsam.datasets.registry import open_dataset
from xsam.files import IMAGE_SUFFIXES, complete, find_file, is_file, list_files, read_json
from xsam.images import EmptyMask, foreground, open_png, read_image, read_image_size, read_region
from xsam.names import read_names
from xsam.prompts import check_words, clean_name

WITHOUT_AREA = ("point", "points", "line", "linestrip")  # of labelme's shapes


class Job(NamedTuple):
    """An image, what says of its objects, and the marks that its kind of source has."""

    image: Path
    where: str
    marks: list
    size: tuple[int, int] | None = None  # of the image, where `where` tells it


# A class or expression, what tells it from others of that name, and its mask, bool [H, W], or None
# where the image has no such thing.
Object = tuple[str, Any, np.ndarray | None]

Found = tuple[tuple[int, int], list[Object], Counter]  # image size, objects, what is counted


def convert(
    source: Path,
    out: Path,
    images: Path | None = None,
    names: str = "",
    refer: bool = False,
    num_workers: int | None = None,
) -> str:
    """Writes `source` as the file `out`, prints what is in it, and returns its name for --datasets.

    `names`: the classes in their order (default: the alphabet's). Those of class maps count from 1;
    one may say its value, from which the next count on: "0=road,car,7=tree". The values 0 and 255
    are void unless a name is given to them, as is 7 by "7=". `refer` writes expressions.
    """
    if images and not images.is_dir():
        raise ValueError(f"--images {images}: is no folder")
    find, read, layout = _recognise(source)
    classes = _classes(names)
    if layout == "panoptic":
        read = functools.partial(read, classes=classes)
    elif names and (refer or layout == "refer"):
        raise ValueError("--names puts classes in order, and expressions have none: leave it out")
    layout = "refer" if refer else layout
    pngs = [out.with_name(f"{out.stem}_panoptic")] if layout == "panoptic" else []
    spec = ":".join(map(str, [out, *filter(None, [images]), *pngs]))
    if out.suffix.lower() != ".json" or re.search("[,:@]", f"{out}{images or ''}"):
        raise ValueError(f"{out}: name a .json file; its path and --images hold no comma, : or @")
    counts: Counter[str] = Counter()
    jobs = find(source, images, counts)
    with complete(out, *pngs) as (partial, *folders):
        for folder in folders:
            folder.mkdir()
        work = functools.partial(_convert_image, read=read, layout=layout, folders=folders)
        results = list(run_each(work, jobs, num_workers))
        counts.update(sum((found for *_, found in results), Counter()))
        void = counts.pop("void", 0) / max(counts.pop("pixels", 0), 1)
        if not any(annotations for _, annotations, _ in results):
            raise ValueError(f"{source}: no object in it ({_listed(counts) or 'no image'})")
        base = (images or out.parent).resolve()
        paths = (job.image.parent.resolve() / job.image.name for job in jobs)
        files = [Path(os.path.relpath(path, base)).as_posix() for path in paths]
        if layout == "refer":
            content = _referring(files, results)
        else:
            named = [name for _, name in sorted(classes.items()) if name]
            content = _coco(jobs, files, results, named, bool(pngs))
        partial.write_text(json.dumps(content), encoding="utf-8")
    _report(spec, counts, void)
    return spec


def _report(spec: str, counts: Counter, void: float) -> None:
    """Prints what is in a file that was written, what is not, and what to do next; `void` is the
    share of the pixels of class maps that have no class."""
    dataset = open_dataset(spec, Path())
    print(contents_text(dataset))
    if skipped := _listed(counts + dataset.skipped):
        print(f"skipped: {skipped}")
    if void:
        mend = 'if it is what is no object, name its value: --names "0=background,..."'
        print(f"void: {void:.0%} of the pixels, which train nothing; {mend}")
    print(f"next: python -m xsam.data check --datasets {shlex.quote(spec)} --show 4")


def _listed(counts: Counter) -> str:
    return ", ".join(f"{count} {what}" for what, count in (+counts).items())


def _classes(names: str) -> dict[int, str]:
    """The class of every value that has one, as `convert` says; void is an empty name."""
    classes, value = {0: "", 255: ""}, 0
    for text in read_names(names) if names else ():
        number, is_told, name = text.rpartition("=")
        if is_told and not number.strip().isdecimal():
            raise ValueError(f"--names: {text!r} is not VALUE=NAME")
        value = int(number) if is_told else value + 1
        name = clean_name(name)
        if classes.get(value) or (name and name in classes.values()):
            raise ValueError(f"--names: {text!r} is the second of its name or value {value}")
        classes[value] = name
    return classes


def _recognise(source: Path) -> tuple[Callable, Callable, str]:
    """How the source is listed (a job for every image), how a job is read, and what it becomes."""
    if source.suffix.lower() in (".csv", ".tsv"):
        return _table_jobs, _read_masks, "refer"
    if not source.is_dir():
        raise ValueError(f"{source}: no folder, and no table in .csv or .tsv")
    if list_files(source, ".json"):
        return _labelme_jobs, _read_labelme, "instance"
    has_maps, has_classes = bool(list_files(source, *IMAGE_SUFFIXES)), bool(_class_folders(source))
    if has_maps == has_classes:
        what = "both masks and folders" if has_maps else "no labelme file (.json) and no mask"
        raise ValueError(f"{source}: holds {what}; give class maps, or a folder for each class")
    return _mask_jobs, *((_read_map, "panoptic") if has_maps else (_read_masks, "instance"))


# ---- from an image's objects to a file -----------------------------------------------------------


def _convert_image(
    job: Job, read: Callable[[Job], Found], layout: str, folders: list[Path]
) -> tuple[tuple[int, int], list[tuple], Counter]:
    """The size of an image, its objects as (name, what is written of it) and what was counted.
    Objects of the same name and key are one, of expressions those of the same name."""
    size, objects, counts = read(job)
    try:
        read_image(job.image, size)
    except ValueError as error:
        raise ValueError(f"{job.where}: {error}") from error
    joined: dict[tuple, np.ndarray | None] = {}
    for name, key, mask in objects:
        name = name.strip() if layout == "refer" else clean_name(name)
        key = check_words(name, f"{job.where}: a name"), None if layout == "refer" else key
        before = joined.get(key)
        joined[key] = mask if before is None else before if mask is None else before | mask
    rows, ids = [], np.zeros(size, np.int32)
    for (name, key), mask in joined.items():
        if layout == "refer":
            rows.append((name, None if mask is None else encode_mask(mask)))
        elif mask is not None:
            row = dict(area=int(mask.sum()), bbox=bounding_box(mask), iscrowd=0)
            if layout == "panoptic":
                row["id"] = ids[mask] = key + 1  # 0 is void
            else:
                row["segmentation"] = encode_mask(mask)
            rows.append((name, row))
    for folder in folders:
        Image.fromarray(segment_colours(ids)).save(folder / f"{job.image.stem}.png")
    return size, rows, counts


def _referring(files: list[str], results: list[tuple]) -> list[dict]:
    pairs = zip(files, results, strict=True)
    rows = [(file, *zip(*rows, strict=True)) for file, (_, rows, _) in pairs if rows]
    return [dict(image=file, texts=texts, masks=masks) for file, texts, masks in rows]


def _coco(
    jobs: list[Job], files: list[str], results: list[tuple], classes: list[str], has_pngs: bool
) -> dict:
    images, annotations = [], []
    found = sorted({name for _, rows, _ in results for name, _ in rows})
    numbers = {name: number for number, name in enumerate(classes or found, 1)}
    for number, (job, file, result) in enumerate(zip(jobs, files, results, strict=True), 1):
        (height, width), rows, _ = result
        if strange := [name for name, _ in rows if name not in numbers]:
            raise ValueError(f"{job.where}: class {strange[0]!r} is not in --names; add it there")
        images.append(dict(id=number, file_name=file, height=height, width=width))
        rows = [row | dict(category_id=numbers[name]) for name, row in rows]
        if has_pngs:
            rows = [dict(file_name=f"{job.image.stem}.png", segments_info=rows)]
        start = len(annotations) + 1
        annotations += [dict(id=i, image_id=number) | row for i, row in enumerate(rows, start)]
    is_thing = dict(isthing=0) if has_pngs else {}
    categories = [dict(id=number, name=name) | is_thing for name, number in numbers.items()]
    return dict(images=images, annotations=annotations, categories=categories)


# ---- labelme -------------------------------------------------------------------------------------


def _labelme_jobs(folder: Path, images: Path | None, counts: Counter) -> list[Job]:
    jobs: dict[Path, Job] = {}
    for path in list_files(folder, ".json"):
        content = read_json(path, last_resort="cp1252")
        if not isinstance(content, dict) or "shapes" not in content:
            counts["JSON files of something else"] += 1
            continue
        image_names, size = labelme_image(path, content)
        image = _existing(images or folder, str(path), *image_names)
        if image in jobs:
            raise ValueError(f"{path}: its image {image} is that of {jobs[image].where} as well")
        jobs[image] = Job(image, str(path), take(content, "shapes", list, str(path)), size)
    every = list_files((images or folder).resolve(), *IMAGE_SUFFIXES)
    counts["images without a JSON file"] = len(set(every) - jobs.keys())
    return list(jobs.values())


IMAGES_HINT = "; --images says where images are"


def _existing(folder: Path, where: str, *names: str, hint: str = IMAGES_HINT) -> Path:
    path = find_file(folder, *names)
    if not is_file(path):
        raise ValueError(f"{where}: {names[0]!r} is not in {folder}{hint}")
    return path.parent.resolve() / path.name  # one path for one image, where "../" leads to it, too


def _read_labelme(job: Job) -> Found:
    """Shapes of one label and group_id are one object, as in labelme."""
    size, objects, counts = job.size or read_image_size(job.image), [], Counter()
    for index, shape in enumerate(job.marks):
        where = f"{job.where}: shape {index}"
        name, points = unpack(shape, where, label=str, points=list)
        kind, group = shape.get("shape_type"), shape.get("group_id")
        if kind in WITHOUT_AREA or (kind in (None, "polygon") and len(points) < 3):
            counts[f"shapes without an area ({kind or 'polygon'})"] += 1
            continue
        if kind == "mask":
            mask = _labelme_mask(shape, whole_pixels(points, where), size, where)
        else:
            outline = corners(whole_pixels(points, where), kind, where)
            mask = paint_shapes([(False, outline)], size, where) == 1
        if mask.any():
            key = ("shape", index) if group is None else ("group", str(group))
            objects.append((name, key, mask))
        else:
            counts["shapes without a pixel in the image"] += 1
    return size, objects, counts


def _labelme_mask(shape: dict, box: list, size: tuple[int, int], where: str) -> np.ndarray:
    """What labelme's assistants draw: a PNG as base64, that lies at the first corner of its box."""
    try:
        content = base64.b64decode(take(shape, "mask", str, where), validate=True)
        patch = foreground(Image.open(io.BytesIO(content)), where)
    except EmptyMask:
        return np.zeros(size, bool)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: its mask is no PNG in base64 ({error})") from error
    mask, corner = np.zeros(size, bool), box[0][::-1]
    if (np.add(corner, patch.shape) > size).any():
        raise ValueError(f"{where}: its mask of {list(patch.shape)} leads out of the image")
    unite(mask, patch, corner)
    return mask


# ---- masks ---------------------------------------------------------------------------------------


def _by_stem(images: Path | None) -> dict[str, Path]:
    if images is None:
        raise ValueError("masks: name the folder of their images with --images")
    paths = list_files(images, *IMAGE_SUFFIXES)
    stems = {path.stem: path for path in paths}
    if twice := [path for path in paths if stems[path.stem] != path]:
        raise ValueError(f"{twice[0]}: {stems[twice[0].stem].name} has the same stem; rename one")
    return stems


def _class_folders(source: Path) -> list[Path]:
    return sorted(path for path in source.glob("[!.]*") if path.is_dir())


def _mask_jobs(source: Path, images: Path | None, counts: Counter) -> list[Job]:
    """Of class maps STEM.png; or of masks CLASS/STEM.png, or CLASS/STEM_1.png where no image has
    the stem STEM_1."""
    stems, marks = _by_stem(images), defaultdict(list)
    for folder in _class_folders(source) or [source]:
        for path in list_files(folder, *IMAGE_SUFFIXES):
            stem = path.stem
            if folder != source and stem not in stems:
                stem = re.sub(r"_\d+$", "", stem)
            if stem in stems:
                marks[stem].append((folder.name, path))
            else:
                counts["masks without an image of their stem"] += 1
    counts["images without a mask"] = len(stems) - len(marks)
    return [Job(stems[stem], str(marks[stem][0][1]), marks[stem]) for stem in sorted(marks)]


def _read_masks(job: Job) -> Found:
    """Of (name, path or None): a mask tells the size, as it may be of a photo that is turned."""
    paths = [path for _, path in job.marks if path]
    size = read_image_size(paths[0] if paths else job.image)
    objects, counts = [], Counter()
    for index, (name, path) in enumerate(job.marks):
        mask = None
        try:
            mask = path and read_region(path, size)
        except EmptyMask:
            counts["masks that are all black: no such thing"] += 1
        objects.append((name, index, mask))
    return size, objects, counts


def _read_map(job: Job, classes: dict[int, str]) -> Found:
    path = job.marks[0][1]
    size = read_image_size(path)
    picture = open_png(path, size)
    if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
        raise ValueError(f"{path}: its pixels are {picture.mode}; save class maps as grey levels")
    levels = np.asarray(picture).astype(np.int64)
    values = np.unique(levels).tolist()
    if strange := [value for value in values if value not in classes]:
        raise ValueError(
            f"{path}: value {strange[0]} has no name (its values are {values[:20]}); "
            "--names a,b names 1 and 2, --names 0=a,7=b others, and 7= makes 7 void"
        )
    objects = [(classes[value], value, levels == value) for value in values if classes[value]]
    void = levels.size - sum(int(mask.sum()) for *_, mask in objects)
    return size, objects, Counter(void=void, pixels=levels.size)


# ---- tables --------------------------------------------------------------------------------------


def _table_jobs(path: Path, images: Path | None, counts: Counter) -> list[Job]:
    """Rows of one image are one job. Masks count from the table's folder, images too or else from
    `images`; a mask that is left out says that the image has no such thing."""
    jobs: dict[Path, Job] = {}
    for number, row in enumerate(read_tsv(path), 2):  # the head is row 1
        where, row = f"{path}: row {number}", {key.strip().lower(): row[key] for key in row}
        image, mask, text = map(str.strip, unpack(row, where, image=str, mask=str, text=str))
        check_words(text, f"{where}: text")
        image = _existing(images or path.parent, where, image)
        mask = _existing(path.parent, f"{where}: its mask", mask, hint="") if mask else None
        jobs.setdefault(image, Job(image, where, [])).marks.append((text, mask))
    return list(jobs.values())


def add_commands(subparsers: Any) -> None:
    """Adds convert, as build.py adds its own."""
    about = "labelme's files, masks or a table of your own to a file that trains"
    add = add_command(subparsers, "convert", convert, about, "labelled --out mine.json")
    sources = "a folder of labelme's JSON files, of class maps, or with a folder of masks per class"
    add("source", type=Path, metavar="SOURCE", help=f"{sources}; or a table, .csv or .tsv")
    add("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    add("--images", type=Path, metavar="DIR", help="where the images are; masks need it")
    text = "classes in order, a,b,c or a file; of class maps those of 1, 2, 3, or 0=a,7=b"
    add("--names", default="", metavar="LIST", help=text)
    add("--refer", action="store_true", help="write classes or labels as referring expressions")
