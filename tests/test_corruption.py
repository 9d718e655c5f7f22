"""A thousand corruptions of every format on disk: a reader refuses with a message, or what it gives
is sound.

Each case is a tiny valid data set and the rules of its format, said here once more and without the
readers. A corruption changes JSON, pickles, tables and masks (delete, retype, swap, duplicate,
nest, cut), now and then in an exporter's dialect or with a byte order mark, or files (cut, flip
bits, remove, another size, another mode). If the rules are broken, the reader has to say so; what
it gives all the same is looked at sample by sample. A failure names its seed, which is all that
`corrupt_and_read` needs to do it again.

pytest tests/test_corruption.py
"""

import base64
import contextlib
import copy
import csv
import io
import itertools
import json
import math
import pickle
import posixpath
import re
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from xsam.data import Sample
from xsam.datasets.base import Dataset
from xsam.datasets.formats import read_class_map
from xsam.datasets.referring import RefCoco
from xsam.datasets.registry import READERS
from xsam.datasets.sources import PROMPT_TYPES, Source

NUM_CORRUPTIONS = 1000
NUM_DRAWS = 24  # readings of a broken set before it counts as accepted: a reader draws words
MOST_SECONDS = 5  # of one corruption
MOST_MEMORY = 3 * 2**30  # bytes that the readers may ask for on top of what the process has
TOKENS = ("<SEG>", "<p>", "</p>", "<image>", "<region>")
SIZES = ((28, 40), (36, 24))  # (height, width) of the two images of each case


# ---- what a case is made of ----------------------------------------------------------------------


@dataclass
class Case:
    """Files by path under the data root: JSON, the list of a pickle, rows of a table, images or
    plain bytes. `check` raises where they break the rules of the format."""

    files: dict[str, Any]
    sources: tuple[Source, ...]  # each corruption is read as one of them
    check: Callable[["Files", Source], None]


def encode(name: str, content) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, Image.Image):
        buffer, exif = io.BytesIO(), content.info.get("exif", b"")
        content.save(buffer, "JPEG" if name.endswith(".jpg") else "PNG", exif=exif)
        return buffer.getvalue()
    if name.endswith(".p"):
        return pickle.dumps(content, protocol=2)
    if name.endswith(".tsv"):
        buffer = io.StringIO()
        columns = dict.fromkeys(key for row in content for key in row)
        writer = csv.DictWriter(buffer, list(columns), delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(content)
        return buffer.getvalue().encode("utf-8", "surrogatepass")
    return json.dumps(content).encode()


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return small.resize(size[::-1], Image.Resampling.BICUBIC)


def box(size: tuple[int, int], top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def ring(left: float, top: float, width: float, height: float) -> list[float]:
    right, bottom = left + width, top + height
    return [left, top, right, top, right, bottom, left, bottom]


def rle(mask: np.ndarray) -> dict:
    packed = coco_mask.encode(np.asfortranarray(mask))
    return {"size": packed["size"], "counts": packed["counts"].decode()}


def plain_rle(mask: np.ndarray) -> dict:
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges.tolist(), flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def image_records(ids: tuple = (7, 3), **more) -> list[dict]:
    return [
        {"id": number, "file_name": f"{place}.jpg", "height": size[0], "width": size[1], **more}
        for place, (number, size) in enumerate(zip(ids, SIZES, strict=True))
    ]


def images(folder: str, names: tuple[str, str] = ("0.jpg", "1.jpg")) -> dict[str, Image.Image]:
    pairs = enumerate(zip(names, SIZES, strict=True))
    return {f"{folder}/{name}": picture(seed, size) for seed, (name, size) in pairs}


CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 90, "name": "toothbrush", "isthing": 1},
    {"id": 95, "name": "sky-other-merged", "isthing": 0},
]


# ---- the rules -----------------------------------------------------------------------------------


class Broken(Exception):
    """The files break a rule of their format."""


class Hang(BaseException):
    """No `except Exception` of a reader may take it for damage."""


def need(condition: bool, rule: str) -> None:
    if not condition:
        raise Broken(rule)


class Files:
    """Corrupted files as the rules see them; bytes are read by plain means."""

    def __init__(self, files: dict[str, Any], sound: dict[str, Any]):
        self.files, self.sound = files, sound

    def read(self, name: str, kind: type):
        content = self.files.get(name)
        if isinstance(content, bytes):
            content = read_bytes(name, content)
            if name.endswith(".png"):
                same = np.array_equal(np.asarray(content), np.asarray(self.sound[name]))
                need(same, "a damaged map is as it was, or refused")
        need(isinstance(content, kind), f"{name} is no {kind.__name__}")
        return content

    def image(self, folder: str, name: str | list, size: tuple | None = None) -> Image.Image:
        names = name if isinstance(name, list) and len(name) > 1 else [name]
        image = self.read(self.find(folder, *names), Image.Image)
        shown = ImageOps.exif_transpose(image)
        sizes = (shown.size, image.size)
        need(size is None or size[::-1] in sizes, f"{name} is {sizes}, not {size}")
        return shown if size is None or shown.size == size[::-1] else image

    def find(self, folder: str, *names: str) -> str:
        """The first file that one of the names means, or the first name."""
        paths = []
        for name in names:
            need(isinstance(name, str), "a file name is a string")
            path = posixpath.normpath(f"{folder}/{name}".replace("\\", "/"))
            stem, suffix = posixpath.splitext(path)
            paths += [path, stem + suffix.lower(), stem + suffix.upper()]
        return next((path for path in paths if path in self.files), paths[0])


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        raise Broken("more than plain data")


def read_bytes(name: str, content: bytes):
    if name.endswith((".jpg", ".png")):
        image = Image.open(io.BytesIO(content))
        image.load()
        return image
    if name.endswith(".p"):
        return _Unpickler(io.BytesIO(content)).load()
    if name.endswith(".tsv"):
        lines = io.StringIO(content.decode(json.detect_encoding(content)), newline="")
        rows = csv.DictReader(lines, delimiter="\t", strict=True)
        return [{k: v or "" for k, v in row.items() if isinstance(k, str)} for row in rows]
    try:
        return json.loads(content)
    except UnicodeDecodeError:
        need("reason/" in name, "JSON is UTF-8, -16 or -32, but ReasonSeg's")
        return json.loads(content.decode("cp1252", "replace"))


def spelled(value):
    """A whole number, also where it is written as a text or with a point; else as it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    digits = isinstance(value, str) and re.fullmatch(r" *(0|[1-9][0-9]*) *", value)
    return int(value) if digits and len(value) < 19 else value


def whole(value) -> int:
    need(type(spelled(value)) is int, "a whole number")
    return spelled(value)


def text(value) -> str:
    need(isinstance(value, str) and bool(value.strip()), "a text")
    value.encode()  # half a character is none
    need(not any(token in value for token in TOKENS), "a text without tokens")
    return value


def flag(value) -> bool:
    need(value is None or spelled(value) in (0, 1), "0 or 1")
    return bool(value) and bool(spelled(value))


def key(value) -> int | str:
    need(type(spelled(value)) in (int, str), "an id")
    return spelled(value)


def size_of(record: dict) -> tuple[int, int]:
    return whole(record["height"]), whole(record["width"])


def table(records: list) -> dict:
    need(isinstance(records, list), "a list")
    found = {key(record["id"]): record for record in records}
    need(len(found) == len(records), "an id once")
    return found


def check_mask(shape, size: tuple[int, int]) -> None:
    """COCO's four encodings."""
    need(isinstance(shape, (dict, list)), "a segmentation")
    num_parts = 0
    shape = shape if isinstance(shape, list) else [shape]
    if is_pairs(shape) or (shape and all(isinstance(part, (int, float)) for part in shape)):
        shape = [shape]  # a polygon alone
    for part in shape:
        part = [*itertools.chain(*part)] if is_pairs(part) else part
        if isinstance(part, dict):
            check_rle(part, size)
            num_parts += 1
        else:
            need(isinstance(part, list), "a ring is a list")
            if len(part) >= 6 and len(part) % 2 == 0:  # others are dropped
                part = [float(number) for number in part]
                need(all(abs(number) < 10 * max(size) for number in part), "a ring in its image")
                num_parts += 1
    need(num_parts > 0, "a valid part")


def is_pairs(part) -> bool:
    pairs = part if isinstance(part, list) else []
    return bool(pairs) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)


def told_by(mask) -> tuple | None:
    """The size of the image of a mask that is an RLE, or has one among its parts."""
    rles = [part for part in (mask if isinstance(mask, list) else [mask]) if isinstance(part, dict)]
    return tuple(whole(side) for side in rles[0]["size"]) if rles else None


def check_rle(record: dict, size: tuple[int, int]) -> None:
    need(isinstance(record["size"], list), "a size")
    need([whole(side) for side in record["size"]] == list(size), "an RLE of the image's size")
    counts = record["counts"]
    runs = counts if isinstance(counts, list) else unpack(counts)
    runs = [whole(run) for run in runs]
    need(all(run >= 0 for run in runs), "runs from 0 on")
    need(sum(runs) == size[0] * size[1], "runs that fill the image")


def unpack(counts: str) -> list[int]:
    """COCO's packed runs: five bits a character, the sixth says that more come."""
    runs, value, shift = [], 0, 0
    for character in counts:
        code = ord(character) - 48
        need(0 <= code < 64, "characters of a packed RLE")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    need(shift == 0, "a packed RLE that is not cut")
    return runs


# ---- generic -------------------------------------------------------------------------------------


def check_categories(content: dict, with_things: bool = False) -> list[int]:
    for category in content["categories"]:
        whole(category["id"])
        text(category["name"].lower())
        if with_things:
            flag(category.get("isthing", 0))
    return sorted(table(content["categories"]))


def png_of(annotation: dict) -> str:
    """The name that an annotation gives to its PNG, if any."""
    name = annotation.get("file_name")
    return name if isinstance(name, str) else ""


def panoptic_case() -> Case:
    """A segment id over 65535, void, a crowd segment, an image without segments."""
    annotations, files = [], images("images")
    for place, (number, (height, width)) in enumerate(zip((7, 3), SIZES, strict=True)):
        ids = np.zeros((height, width), np.int32)
        ids[: height // 2], ids[height // 2 : -3], ids[5:12, 4:14] = 70_000, 300, 9
        ids[:4, :6] = 11
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        files[f"masks/{place}.png"] = Image.fromarray(colours)
        segments = [
            {"id": segment, "category_id": category, "iscrowd": is_crowd, "area": 9}
            for segment, category, is_crowd in (
                (70_000, 95, 0),
                (300, 1, 0),
                (9, 90, 0),
                (11, 1, 1),
            )
        ]
        name = f"of_{place}.png"
        files[f"masks/{name}"] = files.pop(f"masks/{place}.png")
        annotations.append({"image_id": number, "file_name": name, "segments_info": segments})
    records = [*image_records(), {"id": 1, "file_name": "no.jpg", "height": 9, "width": 9}]
    annotations.append({"image_id": 1, "file_name": "no.png", "segments_info": []})
    content = {"images": records, "annotations": annotations, "categories": CATEGORIES}
    source = Source("generic", "panoptic", "panoptic.json", "images", "masks")

    def check(files: Files, source: Source) -> None:
        content = files.read("panoptic.json", dict)
        categories, records, segments = (
            check_categories(content, True),
            table(content["images"]),
            {},
        )
        names = {}
        for annotation in content["annotations"]:
            number = key(annotation["image_id"])
            need(number in records and number not in segments, "one annotation of a known image")
            segments[number], names[number] = annotation["segments_info"], png_of(annotation)
            need(isinstance(segments[number], list), "a list")
        for number, found in segments.items():
            ids = {0}
            for segment in found:
                need(whole(segment["category_id"]) in categories, "a known category")
                flag(segment.get("iscrowd", 0))
                need(whole(segment["id"]) not in ids, "an id once")
                ids.add(whole(segment["id"]))
            if found:
                size = size_of(records[number])
                files.image("images", records[number]["file_name"], size)
                name = names[number] or Path(records[number]["file_name"]).stem + ".png"
                colours = np.asarray(files.image("masks", name, size).convert("RGB"), np.int64)
                used = np.unique(colours @ [1, 256, 65536]).tolist()
                need(set(used) <= ids, "segment ids that the annotation has")

    return Case({**files, "panoptic.json": content}, (source,), check)


def instances_case() -> Case:
    """Polygons with a bad ring, RLEs of both kinds, a crowd region, an image without instances."""
    annotations = []
    for number, size in zip((7, 3), SIZES, strict=True):
        shapes = [
            (1, 0, [ring(3, 4, 9, 8), ring(14, 15, 6, 5), [1, 2, 3, 4]]),
            (90, 0, [rle(box(size, 10, 2, 9, 12)), plain_rle(box(size, 2, 2, 3, 3))]),
            (1, 1, plain_rle(box(size, 20, 10, 6, 9))),
            (90, 0, rle(box(size, 6, 8, 12, 5))),
        ]
        for category, is_crowd, shape in shapes:
            record = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
            annotations.append(record | {"segmentation": shape, "iscrowd": is_crowd})
    records = [*image_records(), {"id": 12, "file_name": "no.jpg", "height": 9, "width": 9}]
    content = {"images": records, "annotations": annotations, "categories": CATEGORIES[:2]}
    source = Source("generic", "instance", "instances.json", "images")

    def check(files: Files, source: Source) -> None:
        content = files.read("instances.json", dict)
        categories, records, by_image = (
            check_categories(content, True),
            table(content["images"]),
            {},
        )
        for annotation in table(content["annotations"]).values():
            number = key(annotation["image_id"])
            need(number in records, "a known image")
            by_image.setdefault(number, []).append(annotation)
        for number, found in by_image.items():
            if all([flag(annotation.get("iscrowd", 0)) for annotation in found]):
                continue
            size = size_of(records[number])
            files.image("images", records[number]["file_name"], size)
            for annotation in found:
                need(whole(annotation["category_id"]) in categories, "a known category")
                check_mask(annotation["segmentation"], size)

    return Case({**images("images"), "instances.json": content}, (source,), check)


def semantic_case() -> Case:
    files = images("images")
    for place, size in enumerate(SIZES):
        classes = np.full(size, 255, np.uint8)
        classes[4:], classes[10:20, 5:], classes[15:18, 2:9] = 0, 2, 1
        files[f"masks/{place}.png"] = Image.fromarray(classes)
    records = image_records(("a", "b"))
    records.append({"id": "c", "file_name": "no.jpg", "height": 9, "width": 9})
    annotations = [{"image_id": number, "segments_info": []} for number in ("a", "b")]
    annotations[1]["file_name"] = "1.png"
    content = {"images": records, "annotations": annotations, "categories": CATEGORIES}
    source = Source("generic", "semantic", "panoptic.json", "images", "masks")

    def check(files: Files, source: Source) -> None:
        content = files.read("panoptic.json", dict)
        num_categories = len(check_categories(content))
        labelled = {key(each["image_id"]): png_of(each) for each in content["annotations"]}
        for number, record in table(content["images"]).items():
            if number not in labelled:
                continue
            size = size_of(record)
            files.image("images", record["file_name"], size)
            name = labelled[number] or Path(record["file_name"]).stem + ".png"
            classes = files.image("masks", name, size)
            need(classes.mode in ("L", "P"), "a channel of eight bits")
            values = np.unique(np.asarray(classes))
            need(all(values[values != 255] < num_categories), "classes that there are")

    return Case({**files, "panoptic.json": content}, (source,), check)


# ---- referring -----------------------------------------------------------------------------------


def coco_of_refs() -> dict:
    annotations = []
    for number, size in zip((7, 3), SIZES, strict=True):
        for shape in ([ring(3, 4, 9, 8), [1, 2]], rle(box(size, 12, 6, 9, 11)), [ring(1, 1, 5, 5)]):
            record = {"id": 10 + len(annotations), "image_id": number, "category_id": 1}
            annotations.append(record | {"iscrowd": 0, "segmentation": shape})
    return {"images": image_records(), "annotations": annotations, "categories": CATEGORIES}


def refs_of(objects: list[tuple]) -> list[dict]:
    return [
        {
            "ref_id": place,
            "image_id": image,
            "ann_id": number,
            "split": split,
            "file_name": f"{place}_16.jpg",
            "sentences": [{"sent_id": 0, "sent": sentence, "raw": sentence} for sentence in texts],
        }
        for place, (image, number, split, *texts) in enumerate(objects)
    ]


def check_refs(files: Files, source: Source) -> None:
    content = files.read("instances.json", dict)
    records, annotations = table(content["images"]), table(content["annotations"])
    for ref in files.read(source.annotations, list):
        number = whole(ref["image_id"])
        need(number in records, "a known image")
        need(isinstance(ref["split"], str), "a split")
        numbers = ref["ann_id"] if isinstance(ref["ann_id"], list) else [whole(ref["ann_id"])]
        need(len(numbers) > 0 and ref["ann_id"] != -1, "annotations, or the list [-1]")
        for annotation in numbers if numbers != [-1] else ():
            need(whole(annotation) in annotations, "a known annotation")
            of_image = whole(annotations[annotation]["image_id"])
            need(of_image == number, "an annotation of the image")
        is_asked = ref["split"] == source.split
        need(isinstance(ref["sentences"], list), "sentences")
        need(not is_asked or len(ref["sentences"]) > 0, "a sentence")
        sentences = [ref_sentence["sent"] for ref_sentence in ref["sentences"]]
        if is_asked:
            size = size_of(records[number])
            files.image("images", records[number]["file_name"], size)
            for sentence in sentences:
                text(sentence.lower())
            for annotation in numbers if numbers != [-1] else ():
                check_mask(annotations[annotation]["segmentation"], size)


def refcoco_case() -> Case:
    refs = refs_of(
        [(7, 10, "train", "Left Cat", "cat"), (7, 11, "train", "dog"), (3, 14, "testA", "a hat")]
    )
    source = Source("refer", "refs", "refs(unc).p", "images", "", "instances.json", split="train")
    files = {**images("images"), "instances.json": coco_of_refs(), "refs(unc).p": refs}
    return Case(files, (source, replace(source, split="testA")), check_refs)


def grefcoco_case() -> Case:
    refs = refs_of(
        [(7, [10, 11], "val", "both"), (7, [-1], "val", "no such thing"), (3, [14], "val", "a hat")]
    )
    source = Source("refer", "refs", "grefs.json", "images", "", "instances.json", split="val")
    files = {**images("images"), "instances.json": coco_of_refs(), "grefs.json": refs}
    return Case(files, (source,), check_refs)


def own_case() -> Case:
    """Each kind of mask, and null."""
    records = [
        {
            "image": "0.jpg",
            "masks": [[ring(3, 4, 9, 8)], rle(box(SIZES[0], 2, 2, 5, 9)), None],
            "texts": [["left cat", "a cat"], "a dog", "a tree"],
        },
        {"image": "1.jpg", "masks": ["1.png"], "texts": ["a hat"]},
    ]
    source = Source("refer", "own_refs", "own.json", "images")
    files = {**images("images"), "own.json": records}
    files["images/1.png"] = Image.fromarray(box(SIZES[1], 8, 6, 9, 9).astype(np.uint8) * 255)

    def check(files: Files, source: Source) -> None:
        for record in files.read("own.json", list):
            masks, texts = record["masks"], record["texts"]
            told = [told_by(mask) for mask in masks if told_by(mask)]
            told += [files.image("images", m).size[::-1] for m in masks if isinstance(m, str)]
            image = files.image("images", record["image"], tuple(told[0]) if told else None)
            need(isinstance(masks, list) and isinstance(texts, list), "lists")
            need(len(masks) == len(texts) > 0, "a text for each mask")
            for mask, alternatives in zip(masks, texts, strict=True):
                if isinstance(alternatives, list):
                    need(len([text(each) for each in alternatives]) > 0, "a text")
                else:
                    text(alternatives)
                if isinstance(mask, str):
                    files.image("images", mask, image.size[::-1])
                elif mask is not None:
                    check_mask(mask, image.size[::-1])

    return Case(files, (source,), check)


# ---- reasoning -----------------------------------------------------------------------------------


def reason_case() -> Case:
    """A target under a smaller ignored region, a flag, two targets, an explanation of one image."""

    def shape(label: str, left: int, top: int, width: int, height: int) -> dict:
        numbers = ring(left, top, width, height)
        return {"label": label, "points": [numbers[at : at + 2] for at in (0, 2, 4, 6)]}

    shapes = [shape("target", 2, 3, 20, 14), shape("Ignore", 5, 6, 6, 4), shape("flag", 0, 0, 3, 3)]
    one = {"text": ["What barks?", "Who guards?"], "is_sentence": True, "shapes": shapes}
    shapes = [shape("target", 1, 2, 9, 9), shape("target", 12, 14, 8, 8)]
    two = {"text": ["the wheels"], "is_sentence": False, "shapes": shapes}
    explanations = [{"image": "0.jpg", "query": "What barks?", "outputs": "Dogs bark."}]
    files = {**images("reason"), "reason/0.json": one, "reason/1.json": two}
    source = Source("reason", "reason", "reason", split="val")
    training = replace(source, split="train", instances="explanations.json")

    def check(files: Files, source: Source) -> None:
        if source.instances:
            for record in files.read(source.instances, list):
                text(record["outputs"])
                need(isinstance(record["image"], str), "a file name")
        stems = {Path(name).stem for name in files.files if name.startswith("reason/")}
        for stem in stems:
            record, targets = files.read(f"reason/{stem}.json", dict), []
            need(f"reason/{stem}.jpg" in files.files, "an image beside its annotation")
            need(type(record["is_sentence"]) is bool, "true or false")
            need(isinstance(record["text"], list) and len(record["text"]) > 0, "texts")
            for each in record["text"]:
                text(each)
            need(isinstance(record["shapes"], list), "shapes")
            for each in record["shapes"]:
                if each["label"].lower() != "flag":
                    targets += ["ignore" not in each["label"].lower()]
                    check_corners(each["points"])
            if any(targets):
                image = files.image("reason", f"{stem}.jpg")
                for each in record["shapes"]:
                    if each["label"].lower() != "flag":
                        largest = max(abs(n) for point in each["points"] for n in point)
                        need(largest < 10 * max(image.size), "corners in the image")

    def check_corners(points: list) -> None:
        need(isinstance(points, list) and len(points) > 1, "corners")
        for point in points:
            need(isinstance(point, list) and len(point) == 2, "two numbers")
            need(all(type(n) in (int, float) and math.isfinite(n) for n in point), "numbers")

    return Case({**files, "explanations.json": explanations}, (source, training), check)


# ---- grounded conversation -----------------------------------------------------------------------


def check_caption(files: Files, caption: str, spans: list, paths: list[str], size) -> None:
    """What every layout of GranD-f asks for: spans apart from each other, a mask for each."""
    need(all(type(number) is int for span in spans for number in span[:2]), "whole offsets")
    kept, end = [], -1
    for span in sorted(spans, key=lambda span: span[:2]):
        if span[0] > end and 0 <= span[0] < span[1] <= len(caption):
            kept.append(span)
            end = span[1]
    if kept:
        text(caption)
        for span in kept:
            text(caption[span[0] : span[1]])
        size = size or next(filter(None, (told_by(span[2]) for span in kept)), None)
        image = files.image("images", paths if len(paths) > 1 else paths[0], size)
        for span in kept:
            check_mask(span[2], image.size[::-1])


def told_size(record: dict) -> tuple[int, int] | None:
    return size_of(record) if record.get("height") or record.get("width") else None


def clean(caption: str) -> str:
    need(isinstance(caption, str), "a caption")
    return caption.strip().strip('"').strip().lower()


def gcg_grounded_case() -> Case:
    """Quotes, a phrase with two RLEs, overlapping spans, an image in a folder of COCO."""
    one, two = SIZES
    records = [
        {
            "file_name": "0.jpg",
            "image_id": "0",
            "height": str(one[0]),
            "width": one[1],
            "caption": '"A Dog on green grass here"',
            "groundings": {
                "a dog": {
                    "token_positives": [0, 5],
                    "rle_masks": [rle(box(one, 2, 2, 8, 8)), rle(box(one, 15, 5, 4, 6))],
                },
                "grass": {"token_positives": [15, 20], "rle_masks": [rle(box(one, 20, 0, 8, 30))]},
                "green": {"token_positives": [14, 16], "rle_masks": [rle(box(one, 1, 1, 3, 3))]},
            },
        },
        {
            "file_name": "1.jpg",
            "image_id": 1,
            "caption": "two cats and a hat",
            "groundings": {
                "cats": {"token_positives": [4, 8], "rle_masks": [rle(box(two, 3, 3, 9, 9))]},
                "hat": {"token_positives": [15, 18], "rle_masks": [rle(box(two, 22, 3, 9, 9))]},
            },
        },
    ]
    source = Source("gcg", "gcg_grounded", "gcg.json", "images")
    names = ("0.jpg", "train2017/1.jpg")

    def check(files: Files, source: Source) -> None:
        for record in files.read("gcg.json", list):
            spans, name = [], record["file_name"]
            need(isinstance(name, str), "a file name")
            key(record["image_id"])
            for grounding in record["groundings"].values():
                start, end = grounding["token_positives"]
                need(isinstance(grounding["rle_masks"], list), "a list of RLEs")
                spans.append((start, end, grounding["rle_masks"]))
            paths = [name, f"train2017/{name}", f"val2017/{name}"]
            check_caption(files, clean(record["caption"]), spans, paths, told_size(record))

    return Case({**images("images", names), "gcg.json": records}, (source,), check)


def gcg_refs_case() -> Case:
    """A phrase in quotes, one that the caption lacks."""
    refs = [
        {"sentence": '"A Dog"', "segmentation": [ring(2, 3, 9, 9), [1, 2, 3, 4]]},
        {"sentence": "grass", "segmentation": [ring(1, 20, 20, 6)]},
        {"sentence": "a zebra", "segmentation": [ring(1, 20, 20, 6)]},
    ]
    one = {"img_file_name": "0.jpg", "caption": "a dog on grass", "refs": refs, "image_id": 5}
    one |= {"height": SIZES[0][0], "width": SIZES[0][1]}
    refs = [{"sentence": "a hat", "segmentation": rle(box(SIZES[1], 4, 4, 9, 9))}]
    two = {"img_file_name": "1.jpg", "caption": "this is a hat", "refs": refs}
    source = Source("gcg", "gcg_refs", "gcg.json", "images")

    def check(files: Files, source: Source) -> None:
        for entry in files.read("gcg.json", list):
            need(len(entry) == 1, "one key")
            (record,) = entry.values()
            caption, spans = clean(record["caption"]), []
            need(isinstance(record["refs"], list), "a list")
            for ref in record["refs"]:
                phrase = clean(ref["sentence"])
                if phrase and phrase in caption:
                    need(isinstance(ref["segmentation"], (list, dict)), "a segmentation")
                    start = caption.index(phrase)
                    spans.append((start, start + len(phrase), ref["segmentation"]))
            name = record["img_file_name"]
            need(isinstance(name, str), "a file name")
            check_caption(files, caption, spans, [name], told_size(record))

    content = [{"a": one}, {"b": two}]
    return Case({**images("images"), "gcg.json": content}, (source,), check)


def gcg_flickr_case() -> Case:
    """A size as a string, a region to ignore, two spans of which the first counts."""
    one, two = SIZES
    records = image_records((7, 3), caption="A dog on green grass")
    records[0]["height"] = str(one[0])
    records.append(records[1] | {"id": 9, "caption": "too short"})
    annotations = [
        {"id": 1, "image_id": 7, "tokens_positive": [[2, 5], [9, 14]]},
        {"id": 2, "image_id": 7, "tokens_positive": [[15, 20]]},
        {"id": 3, "image_id": 7, "tokens_positive": [[0, 1]], "ignore": 1},
        {"id": 4, "image_id": 3, "tokens_positive": [[0, 5]]},
    ]
    shapes = [box(one, 2, 2, 9, 9), box(one, 20, 1, 7, 30), box(one, 12, 1, 3, 3)]
    for annotation, mask in zip(annotations, [*shapes, box(two, 3, 3, 9, 9)], strict=True):
        annotation["sam_mask"] = rle(mask)
    content = {"images": records, "annotations": annotations}
    source = Source("gcg", "gcg_flickr", "gcg.json", "images")

    def check(files: Files, source: Source) -> None:
        content = files.read("gcg.json", dict)
        records, by_image = table(content["images"]), {}
        for annotation in content["annotations"]:
            number = key(annotation["image_id"])
            need(number in records, "a known image")
            by_image.setdefault(number, []).append(annotation)
        for number, record in records.items():
            caption, spans = clean(record["caption"]), []
            if len(caption.split()) < 3:
                continue
            for annotation in by_image.get(number, ()):
                need(isinstance(annotation["sam_mask"], dict), "an RLE")
                if not flag(annotation.get("ignore", 0)):
                    start, end = annotation["tokens_positive"][0]
                    spans.append((start, end, annotation["sam_mask"]))
            check_caption(files, caption, spans, [record["file_name"]], size_of(record))

    return Case({**images("images"), "gcg.json": content}, (source,), check)


def gcg_scored_case() -> Case:
    ids = ("sa_1", "sa_2")
    shapes = [
        {"id": place, "image_id": number, "category_id": 1, "segmentation": rle(mask)}
        for place, (number, mask) in enumerate(
            [
                (ids[0], box(SIZES[0], 2, 2, 9, 9)),
                (ids[0], box(SIZES[0], 12, 5, 9, 20)),
                (ids[1], box(SIZES[1], 2, 2, 9, 9)),
            ]
        )
    ]
    masks = {"images": image_records(ids), "annotations": shapes}
    captions = [
        {"id": place, "image_id": number, "caption": "A dog on grass.", "labels": ["dog"]}
        for place, number in enumerate(ids)
    ]
    files = {**images("images", ("sa_1.jpg", "sa_2.jpg")), "masks.json": masks}
    files["captions.json"] = {"images": image_records(ids), "annotations": captions}
    source = Source("gcg", "gcg_scored", "masks.json", "images", "", "captions.json")

    def check(files: Files, source: Source) -> None:
        content, texts = files.read("masks.json", dict), {}
        records, by_image = table(content["images"]), {}
        for annotation in content["annotations"]:
            number = key(annotation["image_id"])
            need(number in records, "a known image")
            by_image.setdefault(number, []).append(annotation["segmentation"])
        for record in files.read("captions.json", dict)["annotations"]:
            texts[key(record["image_id"])] = text(record["caption"])
        for number, record in records.items():
            need(number in texts, "a caption")
            if number in by_image:
                size = size_of(record)
                files.image("images", f"{number}.jpg", size)
                for shape in by_image[number]:
                    check_mask(shape, size)

    return Case(files, (source,), check)


# ---- visual prompts, conversation ----------------------------------------------------------------


def prompted(size: tuple[int, int], suffix: str, empty: str = "") -> dict:
    masks = {
        "point": box(size, 8, 8, 1, 1),
        "scribble": box(size, 8, 5, 1, 9),
        "box": box(size, 5, 5, 9, 9),
        "mask": box(size, 6, 6, 8, 8),
    }
    return {f"{kind}{suffix}": rle(mask & (kind != empty)) for kind, mask in masks.items()}


def check_prompts(files: Files, source: Source) -> None:
    suffix = "_visual_prompt_mask" if source.task == "interactive" else "_visual_prompt"
    categories = None
    if source.instances:
        categories = check_categories(files.read(source.instances, dict))
    for record in files.read("prompts.json", list):
        size, usable = size_of(record["image_info"]), []
        key(record["image_info"]["id"])
        annotations = record["anns" if source.task == "interactive" else "annotations"]
        need(isinstance(annotations, list), "a list")
        for annotation in annotations:
            key(annotation["id"])
            whole(annotation["category_id"])
            need(categories is None or whole(annotation["category_id"]) in categories, "known")
            prompts = annotation if source.task == "interactive" else annotation["visual_prompts"]
            filled = []
            for kind in PROMPT_TYPES:
                prompt = prompts[f"{kind}{suffix}"]
                if len(prompt["counts"]) < 8:
                    check_rle(prompt, size)
                is_empty = len(prompt["counts"]) < 8 and len(unpack_any(prompt["counts"])) == 1
                filled += [] if is_empty else [kind]
            is_crowd = source.task == "interactive" and flag(annotation.get("iscrowd", 0))
            if source.prompt in filled and not (is_crowd and source.split == "train"):
                usable.append(annotation)
        if usable:
            name = record["image" if source.task == "interactive" else "image_file"]
            files.image("images", name, size)
            for annotation in usable if source.task == "interactive" else annotations:
                check_mask(annotation["segmentation"], size)
            for annotation in usable:
                prompts = (
                    annotation if source.task == "interactive" else annotation["visual_prompts"]
                )
                check_rle(prompts[f"{source.prompt}{suffix}"], size)


def unpack_any(counts) -> list[int]:
    return counts if isinstance(counts, list) else unpack(counts)


def interactive_case() -> Case:
    """PSALM's file: a crowd region, an empty scribble."""
    records = []
    for place, info in enumerate(image_records()):
        size, suffix = SIZES[place], "_visual_prompt_mask"
        target = {"id": 4 + place, "image_id": info["id"], "category_id": 1, "iscrowd": 0}
        target |= {"segmentation": [ring(4, 4, 11, 11)], **prompted(size, suffix)}
        crowd = {"id": 24 + place, "image_id": info["id"], "category_id": 1, "iscrowd": 1}
        crowd |= {"segmentation": plain_rle(box(size, 15, 5, 9, 9))}
        crowd |= prompted(size, suffix, empty="scribble")
        record = {"image": info["file_name"], "image_info": info, "new_img_id": place}
        records.append(record | {"anns": [target, crowd]})
    source = Source("interactive", "visual_prompts", "prompts.json", "images", split="train")
    training = replace(source, prompt="scribble")
    files = {**images("images"), "prompts.json": records}
    return Case(files, (training, replace(source, split="val", prompt="point")), check_prompts)


def vgd_case() -> Case:
    """Two instances of a category, of which one has no point; a second category."""
    records = []
    for place, info in enumerate(image_records()):
        size = SIZES[place]
        annotations = [
            {
                "id": 10 * place + number,
                "image_id": info["id"],
                "category_id": category,
                "iscrowd": 0,
                "segmentation": [ring(4, 4, 5 + number, 11)],
                "visual_prompts": prompted(size, "_visual_prompt", empty),
            }
            for number, (category, empty) in enumerate(((1, ""), (1, "point"), (90, "")))
        ]
        record = {"image_file": info["file_name"], "image_id": info["id"], "image_size": [*size]}
        records.append(record | {"image_info": info, "annotations": annotations})
    source = Source("vgd", "visual_prompts", "prompts.json", "images", "", "instances.json")
    training, scored = replace(source, split="train", prompt="box"), replace(source, prompt="point")
    files = {**images("images"), "prompts.json": records}
    files["instances.json"] = {"images": [], "annotations": [], "categories": CATEGORIES[:2]}
    return Case(files, (training, replace(scored, split="val")), check_prompts)


def llava_case() -> Case:
    """A number and a word as id, <image> at the end, a leading answer, a text without image."""

    def turns(*texts: str) -> list[dict]:
        speakers = ("human", "gpt") if len(texts) % 2 == 0 else ("gpt", "human", "gpt")
        return [
            {"from": speakers[place % len(speakers)], "value": each}
            for place, each in enumerate(texts)
        ]

    records = [
        {"id": 1, "image": "0.jpg", "conversations": turns("What is it?\n<image>", "A dog.")},
        {"id": "b", "image": "1.jpg", "conversations": turns("Hi.", "<image>\nWhat?", "A hat.")},
        {"id": "c", "model": "", "conversations": turns("Hello.", "Hello.")},
    ]
    source = Source("chat", "llava", "chat.json", "images")

    def check(files: Files, source: Source) -> None:
        for record in files.read("chat.json", list):
            need(isinstance(record, dict), "a record")
            if not record.get("image"):
                continue
            name = record["image"]
            name = name[0] if isinstance(name, list) and len(name) == 1 else name
            need(isinstance(name, str), "a file name")
            kinds = (".jpg", ".png", ".gif", ".jpeg")
            names = [name, *(posixpath.splitext(name)[0] + kind for kind in kinds)]
            files.image("images", names)
            speakers = [turn["from"] for turn in record["conversations"]]
            texts = [turn["value"].replace("<image>", "") for turn in record["conversations"]]
            first = 1 if speakers[0] == "gpt" else 0
            speakers, texts = speakers[first:], texts[first:]
            need(speakers == ["human", "gpt"] * (len(speakers) // 2) and speakers, "in turn")
            for question, answer in zip(texts[::2], texts[1::2], strict=True):
                text(f"about the image: {question}")  # which may be all of it
                text(answer)

    return Case({**images("images"), "chat.json": records}, (source,), check)


def table_case() -> Case:
    """A question with options, one without, and one whose image is another row's."""
    image = base64.b64encode(encode("0.png", picture(0, (6, 8)))).decode()
    rows = [
        {
            "index": "1",
            "image": image,
            "question": "What is it?",
            "hint": "It barks.",
            "A": "a dog",
            "B": "a cat",
            "C": "",
            "answer": "A",
            "category": "x",
        },
        {"index": "2", "image": image, "question": "Is it a dog?", "answer": "Yes"},
        {"index": "3", "image": "1", "question": 'Is it\ta "cat"?', "answer": "No"},
    ]
    source = Source("chat", "tsv", "table.tsv")

    def check(files: Files, source: Source) -> None:
        rows = files.read("table.tsv", list)
        numbers = [row.get("index", "") for row in rows]
        need(len(set(numbers)) == len(numbers), "an index once")
        stored = {row.get("index", ""): row.get("image", "") for row in rows}
        for row in rows:
            need(bool(row["index"].strip()), "an index")
            image = row["image"]
            image = image if len(image) >= 64 else stored[image]
            image = image.removeprefix("data:").split(";base64,")[-1]
            content = base64.b64decode("".join(image.split()), validate=True)
            Image.open(io.BytesIO(content)).load()
            options = [letter for letter in "ABCDEFGH" if (row.get(letter) or "").strip()]
            for name in ["question", "answer", *options]:
                text(row[name])
            need(not options or row["answer"].strip() in options, "one of the options")

    return Case({"table.tsv": rows}, (source,), check)


CASES: dict[str, Callable[[], Case]] = {
    "panoptic": panoptic_case,
    "instances": instances_case,
    "semantic": semantic_case,
    "refcoco": refcoco_case,
    "grefcoco": grefcoco_case,
    "own": own_case,
    "reason": reason_case,
    "gcg_grounded": gcg_grounded_case,
    "gcg_refs": gcg_refs_case,
    "gcg_flickr": gcg_flickr_case,
    "gcg_scored": gcg_scored_case,
    "interactive": interactive_case,
    "vgd": vgd_case,
    "llava": llava_case,
    "table": table_case,
}


# ---- corruptions ---------------------------------------------------------------------------------


VALUES: tuple = (
    *(None, True, False, 0, 1, -1, 3, 7, 25, 2**31, -(2**40), 10**30, 10**400),
    *(0.5, -2.5, 1e300, math.nan, math.inf, "", " ", "7", "-1", "none", "x" * 5000, "\ud800"),
    *("<SEG>", "a <p>", "</p>", "<image>", "<region>", "..", "no/such.jpg", "a\0b", "0.jpg"),
    *([], {}, [None], [[]], [{}], {"x": 1}, [1, 2, 3], [[1, 2, 3, 4, 5, 6]], [[[[[[[[]]]]]]]]),
)


def respelled(content, change: Callable):
    """JSON with `change` of (key, value) in the place of every value that a record has."""
    if isinstance(content, list):
        return [respelled(each, change) for each in content]
    if not isinstance(content, dict):
        return content
    return {name: change(name, respelled(value, change)) for name, value in content.items()}


def _of(names: tuple, kind: type, spell: Callable) -> Callable:
    return lambda name, value: spell(value) if name in names and type(value) is kind else value


def _of_polygons(spell: Callable) -> Callable:
    def change(name, value):
        is_polygons = name == "segmentation" and isinstance(value, list)
        is_polygons = is_polygons and isinstance(value[0], list)
        return spell(value) if is_polygons else value

    return change


def _in_pairs(ring: list) -> list:
    return [ring[at : at + 2] for at in range(0, len(ring), 2)] if len(ring) >= 6 else ring


_IDS = ("id", "image_id", "category_id")
_FILES = ("file_name", "image", "image_file", "img_file_name")
# What exporters write in another way, and means the same.
DIALECTS: dict[str, Callable] = {
    "ids as text": _of(_IDS, int, str),
    "ids with a point": _of(_IDS, int, float),
    "flags as text": _of(("iscrowd", "isthing", "ignore"), int, str),
    "no flag": _of(("iscrowd", "ignore"), int, lambda value: value or None),
    "sizes as text": _of(("height", "width"), int, str),
    "sizes with a point": _of(("height", "width"), int, float),
    "backslashes": _of(_FILES, str, ".\\{}".format),
    "capital suffix": _of(_FILES, str, lambda name: name.replace(".jpg", ".JPG")),
    "corners in pairs": _of_polygons(lambda rings: [_in_pairs(each) for each in rings]),
    "corners as text": _of_polygons(lambda rings: [[*map(str, each)] for each in rings]),
    "a polygon alone": _of_polygons(lambda rings: rings[0] if len(rings) == 1 else rings),
}
ENCODINGS = ("utf-8-sig", "utf-16", "utf-32", "utf-16-le")


def in_dialect(files: dict[str, Any], dialect: str) -> dict[str, Any]:
    changed = dict(files)
    for name, content in files.items():
        if not isinstance(content, (Image.Image, bytes)) and not name.endswith(".tsv"):
            changed[name] = respelled(content, DIALECTS[dialect])
    return changed


class Corruption:
    """One change of a case's files, drawn from `rng`; `what` says which."""

    def __init__(self, files: dict[str, Any], rng: np.random.Generator):
        self.files, self.rng = dict(files), rng
        dialect = self.pick([*DIALECTS, *ENCODINGS]) if rng.random() < 0.3 else ""
        if dialect in DIALECTS:
            files = self.files = in_dialect(files, dialect)
        records = [name for name in sorted(files) if not isinstance(files[name], Image.Image)]
        self.name = self.pick(records if rng.random() < 0.7 else sorted(files))
        content = self.files[self.name]
        is_image = isinstance(content, Image.Image)
        if rng.random() < (0.5 if is_image else 0.2):
            self.what = self.change_bytes()
        elif is_image:
            self.what = self.change_image(content)
        else:
            self.files[self.name] = content = copy.deepcopy(content)
            masks = [each for each in nodes(content) if is_mask(each)]
            if masks and rng.random() < 0.4:
                self.what = self.change_mask(self.pick(masks))
            else:
                self.what = self.change_structure(content)
        if (
            dialect in ENCODINGS
            and self.name.endswith((".json", ".tsv"))
            and self.name in self.files
        ):
            content = encode(self.name, self.files[self.name])
            with contextlib.suppress(UnicodeError):  # half a character
                self.files[self.name] = content.decode().encode(dialect)
        self.what = f"{dialect}, {self.name}: {self.what}"

    def pick(self, choices):
        return choices[self.rng.integers(len(choices))]

    # -- bytes and images

    def change_bytes(self) -> str:
        content = bytearray(encode(self.name, self.files[self.name]))
        kind = self.pick(["cut", "flip", "flip", "flip", "gone", "empty", "another", "long"])
        if kind == "cut":
            del content[self.rng.integers(len(content)) :]
        elif kind == "flip":
            for _ in range(self.rng.integers(1, 6)):
                content[self.rng.integers(len(content))] ^= 1 << int(self.rng.integers(8))
        elif kind == "another":
            other = self.pick(sorted(self.files))
            content, kind = encode(other, self.files[other]), f"is {other}"
        elif kind == "long":  # more digits or brackets than Python reads
            depth = self.pick([100, 900, 20_000])
            words = b"9" * 5000, b"[" * depth + b"]" * depth
            digit = self.pick([b"1", b"2", b"4", b"9"])
            content = bytes(content).replace(digit, self.pick(words), 1)
        self.files[self.name] = b"" if kind == "empty" else bytes(content)
        if kind == "gone":
            del self.files[self.name]
        return kind

    def change_image(self, image: Image.Image) -> str:
        kind = self.pick(["size", "turned", "tag", "turned and tag", "mode", "pixel", "pixel"])
        if kind == "size":
            image = image.resize((image.width + int(self.rng.integers(1, 3)), image.height))
        elif "turned" in kind or kind == "tag":
            image = image.transpose(Image.Transpose.ROTATE_90) if kind != "tag" else image.copy()
            if kind != "turned":
                tag = Image.Exif()
                tag[274] = int(self.rng.integers(10))
                image.info["exif"] = tag.tobytes()
                kind += f" {tag[274]}"
        elif kind == "mode":
            modes = ["L", "1", "CMYK"] if self.name.endswith(".jpg") else ["L", "1", "P", "RGBA"]
            modes += [] if self.name.endswith(".jpg") else ["LA", "I;16", "16 bits"]
            kind = self.pick(modes)
            if kind == "16 bits":
                image = Image.fromarray(np.asarray(image.convert("L")) * np.uint16(257))
            else:
                image = image.convert("L").convert(kind) if kind == "I;16" else image.convert(kind)
        else:
            image = image.copy()
            value = self.rng.integers(256, size=len(image.getbands())).tolist()
            place = int(self.rng.integers(image.width)), int(self.rng.integers(image.height))
            image.putpixel(place, value[0] if len(value) == 1 else tuple(value))
        self.files[self.name] = image
        return kind

    # -- JSON, pickles and tables

    def change_structure(self, content) -> str:
        at, holder, name = "", content, None
        while True:  # down a random branch, now and then not to its end
            names = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not names:
                return "nothing to change"
            name = self.pick(names)
            at += f"[{name!r}]"
            value = holder[name]
            if not isinstance(value, (dict, list)) or not value or self.rng.random() < 0.25:
                break
            holder = value
        change = self.pick(["delete", "value", "value", "tweak", "tweak", "graft", "twice", "nest"])
        if self.name.endswith(".tsv"):
            return f"{at} {self.change_cell(holder, name, change)}"
        if change == "delete":
            del holder[name]
        elif change == "value":
            holder[name] = copy.deepcopy(self.pick(VALUES))
            change = f"= {holder[name]!r}"[:60]
        elif change == "tweak":
            holder[name] = self.tweak(value)
            change = f"= {holder[name]!r}"[:60]
        elif change == "graft":  # what another record, or another key, has there
            others = [other for other in nodes(content) if type(other) is type(value)]
            holder[name] = copy.deepcopy(self.pick(others))
            change = f"= {holder[name]!r}, of another"[:60]
        elif change == "twice" and isinstance(holder, list):
            holder.insert(int(self.rng.integers(len(holder) + 1)), copy.deepcopy(value))
        elif change == "twice":
            holder[self.pick(names)] = copy.deepcopy(value)
        else:
            holder[name] = self.pick([[value], {"value": value}, [[value]]])
        return f"{at} {change}"

    def tweak(self, value):
        if isinstance(value, bool) or value is None:
            return not value
        if isinstance(value, (int, float)):
            return self.pick([value + 1, value - 1, -value, 1000 * value, value / 2, str(value)])
        if isinstance(value, str):
            middle = len(value) // 2
            changed = [value[:middle], value * 2, value[::-1], value.upper(), f" {value} "]
            return self.pick([*changed, f"{value[:middle]}<SEG>{value[middle:]}", [value]])
        if isinstance(value, list):
            changed = [value[:-1], value[1:], value * 2, value[::-1]]
            return self.pick([*changed, dict(enumerate(value))])
        return self.pick([list(value.values()), list(value), {**value, "more": 1}])

    def change_cell(self, holder, name, change: str) -> str:
        """The same for a table, whose cells are strings."""
        if isinstance(holder, list):
            if change in ("delete", "nest"):
                del holder[name]
            elif change in ("twice", "graft"):
                holder.insert(0, dict(holder[name]))
            else:
                others = list(holder[name])
                holder[name][self.pick(others)] = holder[name][self.pick(others)]
        elif change == "delete":
            holder[name] = ""
        elif change == "value":
            holder[name] = self.pick(["", " ", "7", "x", "<SEG>", *"ABCaé", "\t", '"'])
        elif change == "tweak":
            holder[name] = str(self.tweak(holder[name]))
        else:
            holder[name] = holder[self.pick(list(holder))]
        return change

    # -- masks

    def change_mask(self, mask) -> str:
        """An RLE or a ring."""
        if isinstance(mask, list):
            place = int(self.rng.integers(len(mask)))
            far = self.pick([math.nan, math.inf, 1e9, -1e9, 10**400, 10**30, "x", "5", None, [3]])
            change = self.pick(["odd", "far", "short", "empty", "shift"])
            if change == "odd":
                del mask[place]
            elif change == "far":
                mask[place], change = far, f"coordinate {far!r}"[:40]
            elif change == "shift":
                mask[:] = [number + 60 for number in mask]
            else:
                del mask[0 if change == "empty" else 4 :]
            return f"ring {change}"
        counts, size = mask["counts"], mask["size"]
        change = self.pick(["cut", "longer", "other", "other", "size", "size", "counts"])
        place = int(self.rng.integers(len(counts)))
        if change == "size":
            sizes = [size[::-1], [size[0] + 1, size[1]], [*map(float, size)], [*map(str, size)]]
            sizes += [[2**31, 2**31], [0, 0], [-1, -1], size[:1], [*size, 1], [math.nan] * 2, "ab"]
            mask["size"] = self.pick(sizes)
            return f"size = {mask['size']!r}"
        if change == "counts":
            others = [[], "", "0", [1], [0.5], None, "\x00", "é", 7, ["1"], [10**30]]
            mask["counts"] = self.pick(others)
            return f"counts = {mask['counts']!r}"[:40]
        if isinstance(counts, str):
            letter = chr(self.rng.integers(48, 112))
            changed = {"cut": counts[:place], "longer": counts + letter}
            mask["counts"] = changed.get(change, counts[:place] + letter + counts[place + 1 :])
        else:
            others = [counts[place] + 1, -counts[place], 2**40, 10**30, -1, 0.5, "4", None]
            number = self.pick(others)
            changed = {"cut": counts[:place], "longer": [*counts, 3]}
            mask["counts"] = changed.get(change, [*counts[:place], number, *counts[place + 1 :]])
        return f"counts {change}"


def nodes(content) -> Iterator:
    """Everything in it but the whole."""
    for value in content.values() if isinstance(content, dict) else content:
        yield value
        if isinstance(value, (dict, list)):
            yield from nodes(value)


def is_mask(value) -> bool:
    if isinstance(value, dict):
        counts, size = value.get("counts"), value.get("size")
        return isinstance(size, list) and isinstance(counts, (str, list))
    numbers = isinstance(value, list) and len(value) >= 6
    return numbers and all(type(number) in (int, float) for number in value)


# ---- what is accepted ----------------------------------------------------------------------------


def check_sample(sample: Sample, source: Source) -> None:
    """A sample that a model can be trained with, whatever was read."""
    assert isinstance(sample.image, Image.Image) and sample.image.mode == "RGB"
    size, count = (sample.image.height, sample.image.width), len(sample.labels)
    assert sample.masks.dtype == bool and sample.masks.shape == (count, *size)
    assert sample.labels.dtype == np.int64 and sample.labels.ndim == 1
    assert all(0 <= label < len(sample.names) for label in sample.labels)
    if sample.ignore is not None:
        assert sample.ignore.dtype == bool and sample.ignore.shape == size
        assert not (sample.masks & sample.ignore).any() or sample.task == "gcg"
    if source.format != "instance" and sample.task != "vgd":  # COCO has objects under a pixel
        assert sample.masks.any(axis=(1, 2)).all(), "an empty mask"
    assert sample.turns and isinstance(sample.sample_id, str)
    questions, answers = zip(*sample.turns, strict=True)
    for string in (*sample.names, *answers, *(() if sample.task == "chat" else questions)):
        assert isinstance(string, str) and string.strip(), f"an empty text: {string!r}"
        assert string.isascii() or not re.search("[\ud800-\udfff]", string), "half a character"
    assert not any(token in name for token in TOKENS for name in sample.names)
    check_words(sample, source)


def check_words(sample: Sample, source: Source) -> None:
    """<SEG>s, phrases and regions as the task wants them."""
    questions, answers = zip(*sample.turns, strict=True)
    num_segs = [answer.count("<SEG>") for answer in answers]
    phrases = [re.findall(r"<p>(.*?)</p>", each, re.DOTALL) for each in questions]
    assert not any("<SEG>" in each or "<image>" in each for each in questions)
    num_regions = 0 if sample.regions is None else len(sample.regions)
    assert sum(each.count("<region>") for each in questions) == num_regions
    if num_regions:
        assert sample.regions.dtype == bool
        assert sample.regions.shape[1:] == sample.masks.shape[1:] and sample.regions.any()
    labels = sample.labels.tolist()
    if sample.task == "generic":
        assert num_segs == [1] and phrases == [sample.names]
        if source.format != "instance":
            assert sample.masks.sum(axis=0).max(initial=0) <= 1
    elif sample.task == "refer":
        assert phrases == [[name] for name in sample.names]
        assert all(number in (0, 1) for number in num_segs)  # 1 also where nothing fits, at times
        assert len(set(labels)) == len(labels) and all(num_segs[label] for label in labels)
    elif sample.task == "reason":
        assert num_segs == [1] and phrases == [sample.names] and labels == [0]
    elif sample.task == "gcg" and source.format == "gcg_scored":
        assert num_segs == [0] and set(labels) == set(range(len(sample.names)))
    elif sample.task == "gcg":
        assert num_segs == [1] and labels == list(range(len(sample.names)))
        assert re.findall(r"<p>(.*?)</p>", answers[0], re.DOTALL) == sample.names
    elif sample.task in ("interactive", "vgd"):
        assert num_segs == [1] and phrases == [["<region>"] * len(sample.names)]
        assert set(labels) == set(range(len(sample.names))) and num_regions == len(sample.names)
        assert sample.task == "vgd" or len(labels) == 1
    else:
        assert sample.task == "chat" and not any(num_segs) and not labels


def open_and_read(source: Source, root: Path, seed: int) -> tuple[list[str], Dataset | None]:
    """The messages of a reading of every sample. Any other error goes through."""
    try:
        dataset = READERS[source.format]("name", source, root, all_classes=seed % 3 == 0)
    except ValueError as error:
        return [str(error)], None
    return [*dataset.problems, *read_all(dataset, seed)], dataset


def read_all(dataset: Dataset, seed: int) -> list[str]:
    messages = []
    for index in range(len(dataset)):
        try:
            sample = dataset.sample(index, np.random.default_rng([seed, index]))
        except ValueError as error:
            messages.append(str(error))
            continue
        check_sample(sample, dataset.source)
    return messages


def write(root: Path, name: str, content: bytes | None) -> None:
    path = root / name
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # ext4 waits for the disk where an old file is cut to nothing
        path.write_bytes(content)


def what_is_broken(case: Case, files: dict[str, Any], source: Source) -> str:
    """The first rule that the files break, "" if they keep all."""
    try:
        case.check(Files(files, case.files), source)
    except Exception as error:  # a record that is not even of the shape that its rules are about
        return f"{type(error).__name__}: {error}"
    return ""


def corrupt_and_read(case: Case, root: Path, seed: int, skipped: dict) -> str:
    """What is wrong with the reader's dealing with corruption `seed`, "" if nothing. The files of
    `case` lie under `root` and do again afterwards; `skipped` is what is left out of them."""
    corruption = Corruption(case.files, np.random.default_rng(seed))
    source, names = case.sources[seed % len(case.sources)], []
    for name, content in case.files.items():
        changed = corruption.files.get(name)
        if changed is not content:
            names.append(name)
            write(root, name, None if changed is None else encode(name, changed))
    try:
        broken = what_is_broken(case, corruption.files, source)
        messages, dataset = open_and_read(source, root, seed)
        is_quiet = not messages and dataset.skipped == skipped[source]
        for draw in range(NUM_DRAWS if broken and is_quiet else 0):
            messages += read_all(dataset, draw) if not messages else []
        wrong = ""
        if broken and not messages and dataset.skipped == skipped[source]:
            wrong = f"accepted, but {broken}"
        for message in messages:
            if not message.startswith("/"):
                wrong = f"names no file: {message}"
    except Exception as error:
        place = error.__traceback__
        while place.tb_next:
            place = place.tb_next
        where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
        wrong = f"{type(error).__name__} at {where}: {str(error)[:200]}"
    finally:
        for name in names:
            write(root, name, encode(name, case.files[name]))
    return f"{wrong}  <-  seed {seed}, {source.split} {corruption.what}"[:400] if wrong else ""


@pytest.fixture
def guard():
    """A reader that hangs or asks for gigabytes fails, instead of stopping the machine."""

    def stop(*_):
        raise Hang(f"over {MOST_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def lay(case: Case, root: Path) -> dict[Source, Counter]:
    """Writes the files; what each source leaves out of them. They are sound."""
    for name, content in case.files.items():
        write(root, name, encode(name, content))
    skipped = {}
    for source in case.sources:
        messages, dataset = open_and_read(source, root, 0)
        assert messages == [] and len(dataset) > 0
        assert what_is_broken(case, case.files, source) == ""
        skipped[source] = dataset.skipped
    return skipped


@pytest.mark.parametrize("name", CASES)
def test_a_corrupted_record_is_refused_with_a_message_or_is_sound(name, tmp_path, guard):
    case, failures = CASES[name](), []
    skipped = lay(case, tmp_path)
    for seed in range(NUM_CORRUPTIONS):
        signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
        failures.append(corrupt_and_read(case, tmp_path, seed, skipped))
    failures = [failure for failure in failures if failure]
    assert not failures, f"{len(failures)} of {NUM_CORRUPTIONS}:\n" + "\n".join(failures)


def all_samples(source: Source, root: Path) -> list[tuple]:
    messages, dataset = open_and_read(source, root, 1)
    assert messages == []
    samples = [dataset.sample(index, np.random.default_rng(index)) for index in range(len(dataset))]
    return [(s.turns, s.names, s.masks.tolist(), s.labels.tolist(), s.ignore) for s in samples]


@pytest.mark.parametrize("name", CASES)
def test_every_dialect_and_encoding_is_read_as_what_it_means(name, tmp_path):
    case, num_changed = CASES[name](), 0
    lay(case, tmp_path)
    sound = [all_samples(source, tmp_path) for source in case.sources]
    for spelling in (*DIALECTS, *ENCODINGS):
        files = in_dialect(case.files, spelling) if spelling in DIALECTS else dict(case.files)
        for file, content in files.items():
            changed = encode(file, content)
            if spelling in ENCODINGS and file.endswith((".json", ".tsv")):
                changed = changed.decode().encode(spelling)
            num_changed += changed != encode(file, case.files[file])
            write(tmp_path, file, changed)
        for source, expected in zip(case.sources, sound, strict=True):
            for one, other in zip(all_samples(source, tmp_path), expected, strict=True):
                assert one[:4] == other[:4], spelling
                assert np.array_equal(one[4], other[4]), spelling
    assert num_changed >= len(ENCODINGS)


def test_a_damaged_map_is_refused_or_is_what_it_was(tmp_path):
    """Pillow alone takes a few percent of them for other pixels."""
    rng, path = np.random.default_rng(0), tmp_path / "map.png"
    classes = rng.integers(0, 200, (24, 32)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
    Image.fromarray(classes).save(path)
    sound, num_refused = path.read_bytes(), 0
    for _ in range(300):
        content = bytearray(sound)
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        write(tmp_path, path.name, bytes(content))
        try:
            assert np.array_equal(read_class_map(path, classes.shape), classes)
        except ValueError as error:
            assert str(path) in str(error)
            num_refused += 1
    assert num_refused > 200


def test_a_size_is_compared_to_the_image_before_masks_of_that_size_are_made(tmp_path, monkeypatch):
    """Gigabytes, where the size is a wrong number."""
    case = refcoco_case()
    for record in case.files["instances.json"]["images"]:
        record["height"] = record["width"] = 2**16 - 1
    for name, content in case.files.items():
        write(tmp_path, name, encode(name, content))
    dataset = RefCoco("name", case.sources[0], tmp_path)
    monkeypatch.setattr(
        "xsam.datasets.referring.decode_mask", lambda *_: pytest.fail("a mask was made")
    )
    with pytest.raises(ValueError, match="not 65535x65535 as what goes with it says"):
        dataset.sample(0, np.random.default_rng(0))
