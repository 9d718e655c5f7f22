"""Every layout of the public files, with each of its quirks, from tiny hand-written ones; and every
way in which a record can be wrong.

pytest tests/test_datasets.py
"""

import base64
import collections
import csv
import functools
import io
import itertools
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from xsam.data import Sample
from xsam.datasets.base import Dataset, Packed
from xsam.datasets.referring import MAX_TURNS
from xsam.datasets.registry import READERS, open_dataset
from xsam.datasets.sources import PROMPT_TYPES, SOURCES
from xsam.prompts import read_phrasings

SIZE = (24, 32)
PHRASINGS = read_phrasings("")


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed or 0)


def write(path: Path, content) -> None:
    """Bytes as they are, arrays as images, all else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def edit(path: Path, change: Callable) -> None:
    content = json.loads(path.read_text())
    change(content)
    write(path, content)


def at(*keys) -> Callable:
    """Puts the last of `keys` where the others lead in a file's content."""

    def change(content):
        *way, key, value = keys
        for each in way:
            content = content[each]
        content[key] = value

    return change


def without(*keys) -> Callable:
    def change(content):
        *way, key = keys
        for each in way:
            content = content[each]
        del content[key]

    return change


def grey(value: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A picture that tells its number."""
    return np.full((*size, 3), value, np.uint8)


def area(*boxes: tuple[int, int, int, int], size: tuple[int, int] = SIZE) -> np.ndarray:
    """Boxes of (top, left, height, width) as one mask."""
    mask = np.zeros(size, bool)
    for top, left, height, width in boxes:
        mask[top : top + height, left : left + width] = True
    return mask


def ring(top: int, left: int, height: int, width: int) -> list[int]:
    """A box as COCO's polygon, along the edges of its pixels."""
    bottom, right = top + height, left + width
    return [left, top, right, top, right, bottom, left, bottom]


def packed(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def list_rle(mask: np.ndarray) -> dict:
    """Run lengths down the columns; the first counts zeros."""
    groups = itertools.groupby(mask.ravel(order="F").tolist())
    lengths = [(inside, len(list(group))) for inside, group in groups]
    counts = [0] * lengths[0][0] + [length for _, length in lengths]
    return {"counts": counts, "size": list(mask.shape)}


def samples_of(dataset: Dataset, *seed: int) -> list[Sample]:
    return [dataset.sample(index, rng(*seed)) for index in range(len(dataset))]


def shade_of(sample: Sample) -> int:
    return sample.image.getpixel((0, 0))[0]


def is_well_formed(sample: Sample) -> bool:
    """What the rest of the library takes for granted."""
    size = sample.image.height, sample.image.width
    assert sample.masks.dtype == bool and sample.masks.shape == (len(sample.labels), *size)
    assert sample.labels.dtype == np.int64
    assert all(0 <= label < len(sample.names) for label in sample.labels)
    assert sample.ignore is None or (sample.ignore.dtype, sample.ignore.shape) == (bool, size)
    words = " ".join(question for question, _ in sample.turns)
    assert "<image>" not in words and "{" not in words
    num_regions = 0 if sample.regions is None else len(sample.regions)
    assert words.count("<region>") == num_regions
    if sample.region_images is not None:
        for image, region in zip(sample.region_images, sample.regions, strict=True):
            assert region.dtype == bool and region.shape == (image.height, image.width)
    elif num_regions:
        assert sample.regions.dtype == bool and sample.regions.shape[1:] == size
    assert len(sample.category_ids) in (0, len(sample.names)) and sample.image_id != ""
    return True


# ---- COCO panoptic -------------------------------------------------------------------------------

COCO = "img_genseg/coco2017"
CATEGORIES = [
    {"id": 92, "name": "sky-other-merged", "isthing": 0},
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 90, "name": "hot-dog", "isthing": 1},
    {"id": 14, "name": "door-stuff", "isthing": 0},
]
IDS = np.array(
    [
        [70001, 70001, 300, 300, 0, 0],
        [70001, 70001, 300, 300, 5, 5],
        [2, 2, 300, 300, 5, 5],
        [2, 2, 300, 300, 5, 5],
    ]
)  # two hot dogs, sky, a crowd of persons, void
SEGMENTS = [
    {"id": 70001, "category_id": 90, "area": 4, "bbox": [0, 0, 2, 2], "iscrowd": 0},
    {"id": 300, "category_id": 92, "area": 8, "bbox": [2, 0, 2, 4], "iscrowd": 0},
    {"id": 5, "category_id": 1, "area": 6, "bbox": [4, 1, 2, 3], "iscrowd": 1},
    {"id": 2, "category_id": 90, "area": 4, "bbox": [0, 2, 2, 2], "iscrowd": 0},
]
DOOR = [{"id": 9, "category_id": 14, "area": 24, "bbox": [0, 0, 4, 6], "iscrowd": 0}]
COCO_IMAGES = [(7, IDS, SEGMENTS), (5, IDS * 0, []), (3, np.full((6, 4), 9), DOOR)]


def write_panoptic(root: Path, images: list = COCO_IMAGES) -> None:
    """Images, PNGs and one JSON in the order of `images`, whose annotations go the other way."""
    records, annotations = [], []
    for number, ids, segments in images:
        name, (height, width) = f"{number:012d}.jpg", ids.shape
        write(root / COCO / "train2017" / name, grey(number, ids.shape))
        colours = (ids[..., None] >> [0, 8, 16] & 255).astype(np.uint8)
        write(root / COCO / f"panoptic_train2017/{number:012d}.png", colours)
        records.append({"id": number, "file_name": name, "height": height, "width": width})
        annotations.append(
            {"image_id": number, "file_name": f"{number:012d}.png", "segments_info": segments}
        )
    content = {"images": records, "annotations": annotations[::-1], "categories": CATEGORIES}
    write(root / COCO / "annotations/panoptic_train2017.json", content)


def test_panoptic_classes_are_ranks_of_ids_and_crowd_and_void_have_no_label(tmp_path):
    write_panoptic(tmp_path)
    dataset = open_dataset("coco_panoptic", tmp_path, all_classes=True)
    assert dataset.names == ["person", "door", "hot dog", "sky other"]
    assert dataset.is_thing == [True, False, True, False]
    assert dataset.categories[1:3] == (
        {"name": "door", "is_thing": False},
        {"name": "hot dog", "is_thing": True},
    )
    sample = dataset.sample(1, rng())
    assert is_well_formed(sample) and sample.sample_id == "coco_panoptic/7"
    assert sample.names == dataset.names
    assert sample.labels.tolist() == [2, 3, 2]
    for mask, number in zip(sample.masks, (70001, 300, 2), strict=True):
        assert (mask == (number == IDS)).all()
    assert (sample.ignore == ((IDS == 0) | (IDS == 5))).all()


def test_panoptic_images_go_by_id_and_empty_ones_are_left_out(tmp_path):
    write_panoptic(tmp_path)
    dataset = open_dataset("coco_panoptic", tmp_path, all_classes=True)
    assert +dataset.skipped == {"images without segments": 1} and not dataset.problems
    first, second = samples_of(dataset)
    assert (first.image.size, first.labels.tolist(), shade_of(first)) == ((4, 6), [1], 3)
    assert (second.image.size, second.labels.tolist(), shade_of(second)) == ((6, 4), [2, 3, 2], 7)
    assert first.masks.all() and not first.ignore.any()


def test_panoptic_prompts_have_what_is_present_and_labels_point_at_it(tmp_path):
    write_panoptic(tmp_path)
    dataset, prompts = open_dataset("coco_panoptic", tmp_path), []
    for seed in range(60):
        sample = dataset.sample(1, rng(seed))
        named = [sample.names[label] for label in sample.labels]
        assert named == ["hot dog", "sky other", "hot dog"]
        assert len(set(sample.names)) == len(sample.names)
        assert set(sample.names) <= set(dataset.names)
        phrases = ", ".join(f"<p>{name}</p>" for name in sample.names)
        assert phrases in sample.turns[0][0] and sample.turns[0][1].count("<SEG>") == 1
        prompts.append(tuple(sample.names))
    assert {len(prompt) for prompt in prompts} == {2, 3, 4}
    assert len({prompt for prompt in prompts if len(prompt) == 2}) == 2  # in either order


def test_panoptic_image_that_shows_every_class(tmp_path):
    ids = np.array([[1, 2, 3, 4]] * 3)
    segments = [{"id": i, "category_id": each["id"]} for i, each in enumerate(CATEGORIES, 1)]
    write_panoptic(tmp_path, [(7, ids, segments)])
    sample = open_dataset("coco_panoptic", tmp_path).sample(0, rng())
    named = [sample.names[label] for label in sample.labels]
    assert named == ["sky other", "person", "hot dog", "door"] and len(sample.names) == 4


@pytest.mark.parametrize("all_classes", [True, False])
def test_panoptic_image_of_crowds_alone_has_no_targets(tmp_path, all_classes):
    crowd = [{"id": 5, "category_id": 1, "iscrowd": 1}]
    write_panoptic(tmp_path, [(7, np.full((4, 6), 5), crowd)])
    dataset = open_dataset("coco_panoptic", tmp_path, all_classes)
    for seed in range(20):
        sample = dataset.sample(0, rng(seed))
        assert is_well_formed(sample) and sample.masks.shape == (0, 4, 6) and sample.ignore.all()
        assert sample.names  # a question has to ask for something


# ---- COCO instances ------------------------------------------------------------------------------

CROWD = area((10, 0, 10, 30))
INSTANCES = {
    "images": [
        {"id": 20, "file_name": "000000000020.jpg", "height": 24, "width": 32},
        {"id": 9, "file_name": "000000000009.jpg", "height": 24, "width": 32},
        {"id": 4, "file_name": "000000000004.jpg", "height": 24, "width": 32},
    ],
    "categories": [
        {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 27, "name": "backpack", "supercategory": "accessory"},
    ],
    "annotations": [
        {"id": 1, "image_id": 20, "category_id": 90, "iscrowd": 0, "area": 62.0,
         "bbox": [3, 2, 25, 12], "segmentation": [ring(2, 3, 6, 5), ring(10, 20, 4, 8)]},
        {"id": 2, "image_id": 20, "category_id": 1, "iscrowd": 0, "area": 42.0,
         "bbox": [2, 12, 6, 7], "segmentation": [[1, 1, 5, 5], ring(12, 2, 7, 6)]},
        {"id": 3, "image_id": 20, "category_id": 1, "iscrowd": 1, "area": 300,
         "bbox": [0, 10, 30, 10], "segmentation": list_rle(CROWD)},
        {"id": 4, "image_id": 4, "category_id": 27, "iscrowd": 0, "area": 12.5,
         "bbox": [1, 1, 4, 3], "segmentation": packed(area((1, 1, 3, 4)))},
    ],
}  # fmt: skip


def write_instances(root: Path, path: str = f"{COCO}/annotations/instances_train2017.json") -> None:
    write(root / path, INSTANCES)
    for number in (20, 9, 4):
        write(root / COCO / f"train2017/{number:012d}.jpg", grey(number))


def test_instances_of_polygons_and_rle_and_their_crowds(tmp_path):
    write_instances(tmp_path)
    dataset = open_dataset("coco_instance", tmp_path, all_classes=True)
    crowds = {"crowd regions (iscrowd 1) without a label": 1}
    assert +dataset.skipped == crowds | {"invalid rings": 1, "images without instances": 1}
    assert dataset.names == ["person", "backpack", "toothbrush"] and dataset.is_thing == [True] * 3
    first, second = samples_of(dataset)
    assert is_well_formed(first) and is_well_formed(second)
    assert [shade_of(first), shade_of(second)] == [4, 20]
    assert first.labels.tolist() == [1] and (first.masks[0] == area((1, 1, 3, 4))).all()
    assert not first.ignore.any()
    assert (first.image_id, second.image_id) == (4, 20)
    assert second.category_ids == [1, 27, 90]
    toothbrush, person = area((2, 3, 6, 5), (10, 20, 4, 8)), area((12, 2, 7, 6))
    assert second.labels.tolist() == [2, 0]
    assert (second.masks == np.stack([toothbrush, person])).all()
    assert (second.ignore == (CROWD & ~toothbrush & ~person)).all()


def test_instances_are_read_with_their_crowds_for_scoring(tmp_path):
    write_instances(tmp_path)
    path = tmp_path / COCO / "annotations/instances_train2017.json"
    number = len(INSTANCES["annotations"])
    thin = INSTANCES["annotations"][0] | {"id": 99, "segmentation": THIN}
    edit(path, lambda content: content["annotations"].append(thin) or content)
    dataset = open_dataset("coco_instance", tmp_path)
    picture, objects = dataset.read(1)
    assert picture.size == SIZE[::-1] and number == len(objects)  # one is of the other image
    expected = [(2, OBJECTS[1], False), (0, OBJECTS[2], False), (0, CROWD, True)]
    assert not objects.pop(3 if objects[0][0] == 2 else 0)[1].any()  # the one without a pixel
    for one, other in zip(objects, expected, strict=True):
        assert (one[0], one[2]) == (other[0], other[2]) and (one[1] == other[1]).all()


def test_instances_image_of_crowds_alone_is_left_out(tmp_path):
    write_instances(tmp_path)
    path = tmp_path / COCO / "annotations/instances_train2017.json"
    edit(path, at("annotations", 3, "iscrowd", 1))
    dataset = open_dataset("coco_instance", tmp_path)
    assert [shade_of(sample) for sample in samples_of(dataset)] == [20]
    assert dataset.skipped["images without instances"] == 2


THIN = [[3, 3, 3.1, 3, 3.1, 3.1]]


@pytest.mark.parametrize("thin", [(0,), (0, 1)])
def test_instances_without_a_pixel_are_no_targets(tmp_path, thin):
    write_instances(tmp_path)
    path = tmp_path / COCO / "annotations/instances_train2017.json"
    for number in thin:
        edit(path, at("annotations", number, "segmentation", THIN))
    sample = open_dataset("coco_instance", tmp_path, all_classes=True).sample(1, rng())
    assert is_well_formed(sample) and sample.labels.tolist() == [0] * (2 - len(thin))
    assert all((mask == area((12, 2, 7, 6))).all() for mask in sample.masks)


# ---- COCO semantic -------------------------------------------------------------------------------

CLASS_IDS = [*range(1, 81), *range(92, 145)]  # 133, with a gap
CLASS_MAP = np.array([[0, 0, 132, 132, 255], [0, 79, 79, 132, 255], [80, 80, 80, 132, 255]], "u1")


def write_semantic(root: Path, class_map: np.ndarray = CLASS_MAP) -> None:
    height, width = class_map.shape
    images = [
        {"id": number, "file_name": f"{number:012d}.jpg", "height": height, "width": width}
        for number in (9, 8)  # of which 9 has no segments and no map
    ]
    annotations = [{"image_id": 8, "file_name": "000000000008.png", "segments_info": []}]
    categories = [{"id": number, "name": f"kind-{number}"} for number in CLASS_IDS[::-1]]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write(root / COCO / "annotations/panoptic_train2017.json", content)
    write(root / COCO / "panoptic_semseg_train2017/000000000008.png", class_map)
    write(root / COCO / "train2017/000000000008.jpg", grey(8, class_map.shape))


def test_semantic_maps_hold_contiguous_classes_and_255(tmp_path):
    write_semantic(tmp_path)
    dataset = open_dataset("coco_semantic", tmp_path, all_classes=True)
    assert dataset.names == [f"kind {number}" for number in CLASS_IDS]
    assert len(dataset) == 1 and +dataset.skipped == {"images without segments": 1}
    sample = dataset.sample(0, rng())
    assert is_well_formed(sample) and sample.labels.tolist() == [0, 79, 80, 132]
    for mask, label in zip(sample.masks, (0, 79, 80, 132), strict=True):
        assert (mask == (label == CLASS_MAP)).all()
    assert (sample.ignore == (CLASS_MAP == 255)).all()
    assert not any(dataset.is_thing)  # a class is one region, also of things


def test_semantic_prompts_have_what_is_present(tmp_path):
    write_semantic(tmp_path)
    dataset = open_dataset("coco_semantic", tmp_path)
    sample = dataset.sample(0, rng(3))
    assert (dataset.read(0)[1] == CLASS_MAP).all() and dataset.read(0)[0].size == sample.image.size
    assert [f"kind {number}" for number in sample.category_ids] == sample.names
    named = [sample.names[label] for label in sample.labels]
    assert named == [f"kind {CLASS_IDS[label]}" for label in (0, 79, 80, 132)]


def test_semantic_map_without_a_label(tmp_path):
    write_semantic(tmp_path, np.full((3, 5), 255, np.uint8))
    sample = open_dataset("coco_semantic", tmp_path, all_classes=True).sample(0, rng())
    assert is_well_formed(sample) and len(sample.masks) == 0 and sample.ignore.all()


# ---- ADE20K --------------------------------------------------------------------------------------

ADE = "img_ovseg/ade20k"
ADE_IDS = np.array([[1, 1, 1, 2, 2], [1, 1, 1, 2, 2], [0, 0, 1, 2, 2]])


def write_ade(root: Path) -> None:
    """Category 0, string ids in another order than the images', stuff that is wholly covered and
    stuff that lost pixels to what lies over it, though its area still counts them."""
    categories = [
        {"id": 8, "name": "window ", "isthing": 1, "color": [230, 230, 230]},
        {"id": 6, "name": "road, route", "isthing": 0, "color": [140, 140, 140]},
        {"id": 0, "name": "wall", "isthing": 0, "color": [120, 120, 120]},
    ]
    segments = [
        {"id": 1, "category_id": 0, "area": 13, "bbox": [0, 0, 5, 3], "iscrowd": 0},
        {"id": 3, "category_id": 6, "area": 4, "bbox": [3, 0, 2, 2], "iscrowd": 0},
        {"id": 2, "category_id": 8, "area": 6, "bbox": [3, 0, 2, 3], "iscrowd": 0},
    ]
    stems = ["ADE_val_00000002", "ADE_val_00000001"]
    images = [{"id": s, "file_name": f"{s}.jpg", "height": 3, "width": 5} for s in stems]
    annotations = [
        {"image_id": stem, "file_name": f"{stem}.png", "segments_info": segments} for stem in stems
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write(root / ADE / "ade20k_panoptic_val.json", content)
    things = [(10, "cabinet"), (7, "bed "), (8, "window ")]
    things = [{"id": number, "name": name} for number, name in things]
    instances = [
        {"id": 1, "image_id": stems[1], "category_id": 8, "iscrowd": 0, "area": 6,
         "bbox": [3, 0, 2, 3], "segmentation": packed(ADE_IDS == 2)},
        {"id": 2, "image_id": stems[1], "category_id": 10, "iscrowd": 0, "area": 7,
         "bbox": [0, 0, 3, 3], "segmentation": packed(ADE_IDS == 1)},
    ]  # fmt: skip
    content = {"images": images, "annotations": instances, "categories": things}
    write(root / ADE / "ade20k_instance_val.json", content)
    colours = np.stack([ADE_IDS, ADE_IDS * 0, ADE_IDS * 0], axis=-1).astype(np.uint8)
    class_map = np.array([255, 0, 2], np.uint8)[ADE_IDS]
    for number, stem in enumerate(stems):
        write(root / ADE / f"images/validation/{stem}.jpg", grey(9 - number, (3, 5)))
        write(root / ADE / f"ade20k_panoptic_val/{stem}.png", colours)
        write(root / ADE / f"annotations_detectron2/validation/{stem}.png", class_map)


def test_ade_panoptic_has_string_ids_a_category_0_and_covered_stuff(tmp_path):
    write_ade(tmp_path)
    dataset = open_dataset("ade20k_panoptic_val", tmp_path, all_classes=True)
    assert dataset.names == ["wall", "road, route", "window"]
    assert dataset.is_thing == [False, False, True]
    samples = samples_of(dataset)
    ids = [f"ade20k_panoptic_val/ADE_val_0000000{number}" for number in (1, 2)]
    assert [sample.sample_id for sample in samples] == ids
    assert [shade_of(sample) for sample in samples] == [8, 9]
    for sample in samples:
        assert is_well_formed(sample) and sample.labels.tolist() == [0, 2]
        assert (sample.masks == np.stack([ADE_IDS == 1, ADE_IDS == 2])).all()
        assert (sample.ignore == (ADE_IDS == 0)).all()
        assert "<p>wall</p>, <p>road, route</p>, <p>window</p>" in sample.turns[0][0]


def test_ade_instances_keep_0_based_ids_with_gaps(tmp_path):
    write_ade(tmp_path)
    dataset = open_dataset("ade20k_instance_val", tmp_path, all_classes=True)
    assert dataset.names == ["bed", "window", "cabinet"] and all(dataset.is_thing)
    sample, nothing = samples_of(dataset)  # in which whatever is found is wrong
    assert not len(nothing.masks) and not dataset.read(1)[1]
    assert sample.labels.tolist() == [1, 2] and is_well_formed(sample)
    assert (sample.masks == np.stack([ADE_IDS == 2, ADE_IDS == 1])).all()


def test_ade_semantic_is_0_based_and_255(tmp_path):
    write_ade(tmp_path)
    dataset = open_dataset("ade20k_semantic_val", tmp_path, all_classes=True)
    sample = dataset.sample(0, rng())
    assert sample.labels.tolist() == [0, 2] and len(dataset) == 2
    assert (sample.masks == np.stack([ADE_IDS == 1, ADE_IDS == 2])).all()
    assert (sample.ignore == (ADE_IDS == 0)).all()


# ---- RefCOCO, RefCOCO+, RefCOCOg -----------------------------------------------------------------

REFS = "img_refseg/refcocos"
BOXES = {11: (3, 2, 8, 10), 12: (10, 20, 6, 6), 13: (0, 0, 3, 3)}  # 13 is referred to by nobody


def box_mask(*keys: int) -> np.ndarray:
    return area(*(BOXES.get(key, (key % 13, key % 20, 7, 5)) for key in keys))


def write_refs(
    root: Path, refs: list[tuple], folder: str = "refcoco", file: str = "refs(unc).p"
) -> None:
    """Refs of (image, annotation or annotations, split, sentences). Half of the masks are polygons,
    half RLEs; the refs' own file names lead nowhere."""
    images, annotations = [], {}
    for number in sorted({ref[0] for ref in refs}, reverse=True):
        name = f"COCO_train2014_{number:012d}.jpg"
        write(root / REFS / "images/train2014" / name, grey(number))
        images.append({"id": number, "file_name": name, "height": 24, "width": 32})
    for image, keys, *_ in [*refs, (refs[0][0], 13)]:
        for key in keys if isinstance(keys, list) else [keys]:
            shape = [ring(*BOXES[key])] if key in BOXES else list_rle(box_mask(key))
            annotations[key] = {"id": key, "image_id": image, "category_id": 18, "iscrowd": 0}
            annotations[key]["segmentation"] = [packed(box_mask(key))] if key == 12 else shape
    annotations.pop(-1, None)
    content = {"images": images, "annotations": list(annotations.values()), "categories": []}
    write(root / REFS / folder / "instances.json", content)
    records = []
    for place, (image, keys, split, sentences) in enumerate(refs):
        texts = [{"sent_id": k, "sent": s, "raw": s, "tokens": s.split()} for k, s in
                 enumerate(sentences)]  # fmt: skip
        record = {"ref_id": 100 + place, "ann_id": keys, "image_id": image, "split": split}
        record |= {"category_id": [18] * len(keys) if isinstance(keys, list) else 18}
        record |= {"file_name": f"COCO_train2014_{image:012d}_{place}.jpg"}
        records.append(record | {"sentences": texts, "sent_ids": list(range(len(texts)))})
    content = records if file.endswith(".json") else pickle.dumps(records, protocol=2)
    write(root / REFS / folder / file, content)


TWO_REFS = [
    (1, 11, "train", ["Red Circle ", "red circle", "the left one"]),
    (1, 12, "train", ["the square"]),
]
OF_VAL = [(2, 14, "val", ["Red Circle", "red circle", "the left one"]), (2, 15, "val", ["x"])]
OF_TEST = [(3, 16, "testA", ["a man"]), (4, 17, "testB", ["a cup"]), (5, 18, "test", ["a dog"])]


def test_refs_samples_hold_a_sentence_of_each_of_their_objects(tmp_path):
    write_refs(tmp_path, TWO_REFS)
    dataset = open_dataset("refcoco", tmp_path)
    assert len(dataset) == 2
    sentences = {"red circle": 11, "the left one": 11, "the square": 12}
    for seed in range(10):
        samples = samples_of(dataset, seed)
        for sample in samples:
            assert is_well_formed(sample) and shade_of(sample) == 1 and sample.ignore is None
            keys = [sentences[name] for name in sample.names]
            assert len(set(keys)) == len(keys) and sample.labels.tolist() == [0, 1][: len(keys)]
            for name, (asked, answered) in zip(sample.names, sample.turns, strict=True):
                assert f"<p>{name}</p>" in asked and answered in PHRASINGS["refer"]["answers"]
            for mask, key in zip(sample.masks, keys, strict=True):
                assert (mask == box_mask(key)).all()
        assert len({sample.sample_id for sample in samples}) == 2


@pytest.mark.parametrize("counts", [(3,), (3, 1), (3, 3), (2, 2, 2), (1,) * (2 * MAX_TURNS + 3)])
def test_refs_image_gives_as_many_samples_as_sentences_or_combinations(tmp_path, counts):
    """And each as often as it fills conversations."""
    refs = [
        (1, 20 + place, "train", [f"object {place} sentence {k}" for k in range(count)])
        for place, count in enumerate(counts)
    ]
    write_refs(tmp_path, refs)
    num_parts = math.ceil(len(counts) / MAX_TURNS)
    num_samples = min(sum(counts), math.prod(counts)) * num_parts
    assert len(open_dataset("refcoco", tmp_path)) == num_samples


@pytest.mark.parametrize("count", [3, MAX_TURNS + 3])
@pytest.mark.parametrize("name", ["refcoco", "mine/refs.json"])
def test_every_phrase_comes_first_and_alone_and_in_any_company(tmp_path, name, count):
    texts = [f"object {place}" for place in range(count)]
    if name == "refcoco":
        write_refs(tmp_path, [(1, 20 + k, "train", [text]) for k, text in enumerate(texts)])
    else:
        masks = [packed(box_mask(20 + place)) for place in range(count)]
        write_own(tmp_path, {"image": "a.jpg", "masks": masks, "texts": texts})
    dataset = open_dataset(name, tmp_path)
    asked = []
    for epoch in range(60 * count):
        sample, again = (dataset.sample(0, rng(epoch, 1)) for _ in range(2))
        assert (sample.names, sample.turns) == (again.names, again.turns)
        assert np.array_equal(sample.masks, again.masks)
        for text, mask in zip(sample.names, sample.masks, strict=True):
            assert (mask == box_mask(20 + int(text.split()[1]))).all()
        assert len(set(sample.names)) == len(sample.names)
        asked.append(sample.names)
    assert {names[0] for names in asked} == {names[-1] for names in asked} == set(texts)
    assert {names[0] for names in asked if len(names) == 1} == set(texts)
    assert {len(names) for names in asked} == set(range(1, min(count, MAX_TURNS) + 1))
    pairs = {pair for names in asked for pair in itertools.permutations(names, 2)}
    assert pairs == set(itertools.permutations(texts, 2))


def test_check_reads_the_phrases_that_a_sample_may_leave_out(tmp_path):
    masks = [packed(box_mask(20 + place)) for place in range(MAX_TURNS + 2)]
    texts = [f"object {place}" for place in range(len(masks))]
    masks[-1] = packed(np.ones((3, 3), bool))
    write_own(tmp_path, {"image": "a.jpg", "masks": masks, "texts": texts})
    dataset = open_dataset("mine/refs.json", tmp_path)
    dataset.check(0, rng())
    with pytest.raises(ValueError, match=r"refs\.json: record 0"):
        dataset.check(1, rng())


def test_refs_evaluation_has_one_sample_for_each_sentence_of_its_split(tmp_path):
    write_refs(tmp_path, [*TWO_REFS, *OF_VAL])
    samples = samples_of(open_dataset("refcoco_val", tmp_path))
    names = ["red circle", "red circle", "the left one", "x"]
    assert [sample.names for sample in samples] == [[name] for name in names]
    assert [shade_of(sample) for sample in samples] == [2, 2, 2, 2]
    for sample, key in zip(samples, (14, 14, 14, 15), strict=True):
        assert (sample.masks == box_mask(key)).all() and sample.labels.tolist() == [0]
    assert len({sample.sample_id for sample in samples}) == 4
    assert len(open_dataset("refcoco", tmp_path)) == 2


@pytest.mark.parametrize(
    ("name", "folder", "file", "sentence"),
    [
        ("refcoco_testA", "refcoco", "refs(unc).p", "a man"),
        ("refcoco_testB", "refcoco", "refs(unc).p", "a cup"),
        ("refcoco+_testA", "refcoco+", "refs(unc).p", "a man"),
        ("refcoco+_testB", "refcocop", "refs(unc).p", "a cup"),
        ("refcocog_test", "refcocog", "refs(umd).p", "a dog"),
    ],
)
def test_refs_of_every_set_and_split(tmp_path, name, folder, file, sentence):
    write_refs(tmp_path, [*TWO_REFS, *OF_TEST], folder, file)
    (sample,) = samples_of(open_dataset(name, tmp_path))
    assert sample.names == [sentence]


def test_refs_of_another_split_of_the_same_image_are_not_read(tmp_path):
    write_refs(tmp_path, [(1, 11, "val", ["a"]), (1, 12, "train", ["b"]), (2, 14, "train", ["c"])])
    assert [s.names for s in samples_of(open_dataset("refcoco", tmp_path))] == [["b"], ["c"]]
    assert [s.names for s in samples_of(open_dataset("refcoco_val", tmp_path))] == [["a"]]


def test_refs_bad_one_is_a_problem_and_the_others_are_read(tmp_path):
    write_refs(tmp_path, TWO_REFS)
    drop_annotation(tmp_path / REFS / "refcoco/instances.json", 12)
    message = r"refs\(unc\)\.p: ref 101: annotation 12 is not in .*instances\.json"
    with pytest.raises(ValueError, match=message):
        open_dataset("refcoco", tmp_path)
    dataset = open_dataset("refcoco", tmp_path, skip_bad=True)
    assert len(dataset.problems) == 1 and re.search(message, dataset.problems[0])
    names = {name for seed in range(9) for s in samples_of(dataset, seed) for name in s.names}
    assert len(dataset) == 2 and names == {"red circle", "the left one"}


def drop_annotation(path: Path, number: int) -> None:
    place = [each["id"] for each in json.loads(path.read_text())["annotations"]].index(number)
    edit(path, without("annotations", place))


def test_refs_images_in_the_folder_of_lisa(tmp_path):
    write_refs(tmp_path, TWO_REFS)
    folder = tmp_path / REFS / "images"
    (folder / "mscoco/images").mkdir(parents=True)
    (folder / "train2014").rename(folder / "mscoco/images/train2014")
    assert shade_of(open_dataset("refcoco", tmp_path).sample(0, rng())) == 1


def test_answers_of_a_user_say_what_was_asked_for(tmp_path):
    mine = {"answers": ["{phrases}: <SEG>"], "absent": ["No {phrases}."]}
    phrasings = PHRASINGS | {"refer": PHRASINGS["refer"] | mine}
    write_refs(tmp_path, TWO_REFS)
    for sample in samples_of(open_dataset("refcoco", tmp_path, phrasings=phrasings)):
        answers = [f"<p>{name}</p>: <SEG>" for name in sample.names]
        assert [answered for _, answered in sample.turns] == answers
    write_refs(tmp_path, GREFS, "grefcoco", GREFS_FILE)
    absent = open_dataset("grefcoco_val", tmp_path, phrasings=phrasings).sample(0, rng())
    assert absent.turns[0][1] == "No <p>nothing like it</p>."


# ---- gRefCOCO ------------------------------------------------------------------------------------

GREFS_FILE = "grefs(unc).json"
GREFS = [
    (1, [11, 12], "train", ["Both of them"]),
    (1, [-1], "train", ["a zebra"]),
    (1, [12], "train", ["the square"]),
    (2, [-1], "val", ["nothing like it"]),
    (2, [14, 15], "val", ["the two"]),
]


@pytest.mark.parametrize("file", ["grefs(unc).json", "grefs(unc).p", "refs(unc).p"])
def test_grefs_of_several_objects_and_of_none(tmp_path, file):
    write_refs(tmp_path, GREFS, "grefcoco", file)
    absent, two = samples_of(open_dataset("grefcoco_val", tmp_path))
    assert (absent.names, absent.labels.tolist()) == (["nothing like it"], [])
    assert absent.masks.shape == (0, *SIZE) and is_well_formed(absent)
    assert absent.turns[0][1] in PHRASINGS["refer"]["absent"]
    assert (two.names, two.labels.tolist()) == (["the two"], [0])
    assert two.masks.shape == (1, *SIZE) and (two.masks[0] == box_mask(14, 15)).all()
    assert two.turns[0][1] in PHRASINGS["refer"]["answers"]


def test_grefs_training_labels_count_the_absent(tmp_path):
    """What nothing fits is refused in words, or has a <SEG> that no mask belongs to."""
    write_refs(tmp_path, GREFS, "grefcoco", GREFS_FILE)
    truth = {"both of them": box_mask(11, 12), "a zebra": None, "the square": box_mask(12)}
    dataset, refusals = open_dataset("grefcoco", tmp_path), []
    assert len(dataset) == 1
    for seed in range(60):
        sample = dataset.sample(0, rng(seed))
        assert is_well_formed(sample)
        present = [truth[name] for name in sample.names if truth[name] is not None]
        assert [sample.names[label] != "a zebra" for label in sample.labels] == [True] * len(
            present
        )
        assert np.array_equal(sample.masks, np.reshape(present, (-1, *SIZE)))
        for name, (_, answer) in zip(sample.names, sample.turns, strict=True):
            kind = "answers" if "<SEG>" in answer else "absent"
            assert answer in PHRASINGS["refer"][kind]
            if name == "a zebra":
                refusals.append(kind)
            else:
                assert kind == "answers"
    assert 0.25 < refusals.count("absent") / len(refusals) < 0.75


# ---- ReasonSeg -----------------------------------------------------------------------------------

LISA = "img_reaseg/lisa"


def corners(top: float, left: float, bottom: float, right: float) -> list[list[float]]:
    """A box by its outermost pixels, as points of ReasonSeg; the fractions are cut off."""
    return [[left, top], [right, top], [right + 0.9, bottom], [left, bottom + 0.9]]


def shape(label: str, *box: float) -> dict:
    return {"label": label, "points": corners(*box), "shape_type": "polygon", "group_id": None}


def write_reason(root: Path, records: dict[str, dict], split: str = "train") -> None:
    """{stem: text, is_sentence, shapes}, and an explanation for the stem "a"."""
    for number, (stem, record) in enumerate(records.items()):
        write(root / LISA / split / f"{stem}.jpg", grey(number + 1))
        write(root / LISA / split / f"{stem}.json", record)
    explained = [{"image": "a.jpg", "query": "Which?", "outputs": " It is the cup. "}]
    write(root / LISA / "explanatory/train.json", explained)


def record(*shapes: dict, texts: tuple = ("the cup",), is_sentence: bool = False) -> dict:
    return {"text": list(texts), "is_sentence": is_sentence, "shapes": list(shapes)}


TEXTS = ("What holds tea?", " Where would you drink? ", "Which is a cup?")
REASON = {
    "a": record(shape("target", 2, 3, 8, 9), texts=TEXTS, is_sentence=True),
    "b": record(shape("target", 2, 3, 8, 9)),
}


def inclusive(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    return area((top, left, bottom - top + 1, right - left + 1))


LARGE, SMALL, APART = (2, 3, 20, 25), (5, 6, 9, 12), (1, 27, 22, 30)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("shapes", "target", "ignored"),
    [
        ([("target", LARGE), ("ignore", SMALL)], [(LARGE, 1), (SMALL, 0)], [(SMALL, 1)]),
        ([("ignore", LARGE), ("target", SMALL)], [(SMALL, 1)], [(LARGE, 1), (SMALL, 0)]),
        ([("target", SMALL), ("target", APART)], [(SMALL, 1), (APART, 1)], []),
        ([("Target", SMALL), ("please IGNORE this", APART)], [(SMALL, 1)], [(APART, 1)]),
        ([("cup", SMALL), ("flag", LARGE), ("Flag", APART)], [(SMALL, 1)], []),
    ],
    ids=["small ignore", "small target", "two targets", "labels", "flag"],
)
def test_reasonseg_larger_shapes_are_painted_first(tmp_path, shapes, target, ignored, order):
    shapes = [shape(label, *box) for label, box in shapes][::order]
    write_reason(tmp_path, {"a": record(*shapes)})
    (sample,) = samples_of(open_dataset("reasonseg", tmp_path))
    assert is_well_formed(sample) and sample.labels.tolist() == [0]
    for found, layers in ((sample.masks[0], target), (sample.ignore, ignored)):
        expected = np.zeros(SIZE, bool)
        for box, inside in layers:
            expected[inclusive(*box)] = inside
        assert (found == expected).all()


def test_reasonseg_outline_belongs_to_the_shape(tmp_path):
    triangle = {"label": "target", "points": [[4.7, 3.9], [20, 3], [4, 19]]}
    line = {"label": "target", "points": [[2, 22], [29, 22.8]]}
    write_reason(tmp_path, {"a": record(triangle, line)})
    (sample,) = samples_of(open_dataset("reasonseg", tmp_path))
    rows, columns = np.mgrid[:24, :32]
    expected = (rows >= 3) & (columns >= 4) & (rows + columns <= 23)
    expected |= (rows == 22) & (columns >= 2) & (columns <= 29)
    assert (sample.masks[0] == expected).all()


def test_reasonseg_training_draws_a_text_and_half_of_the_time_the_explanation(tmp_path):
    write_reason(tmp_path, REASON)
    dataset = open_dataset("reasonseg", tmp_path)
    assert len(dataset) == 2
    asked, answers = collections.Counter(), collections.Counter()
    for seed in range(400):
        sample = dataset.sample(0, rng(seed))
        ((question, answer),) = sample.turns
        assert f"<p>{sample.names[0]}</p>" in question and answer.count("<SEG>") == 1
        asked[sample.names[0]] += 1
        answers[answer.startswith("It is the cup. ")] += 1
        assert answer.removeprefix("It is the cup. ") in PHRASINGS["reason"]["answers"]
    assert set(asked) == {text.strip() for text in TEXTS} and min(asked.values()) > 100
    assert 160 < answers[True] < 240
    other = {dataset.sample(1, rng(seed)).turns[0][1] for seed in range(40)}
    assert other == set(PHRASINGS["reason"]["answers"])


@pytest.mark.parametrize("split", ["val", "test"])
def test_reasonseg_evaluation_has_one_sample_for_each_text(tmp_path, split):
    write_reason(tmp_path, REASON, split)
    dataset = open_dataset(f"reasonseg_{split}", tmp_path)
    samples = samples_of(dataset)
    assert [s.names for s in samples] == [*([text.strip()] for text in TEXTS), ["the cup"]]
    assert [shade_of(sample) for sample in samples] == [1, 1, 1, 2]
    assert len({sample.sample_id for sample in samples}) == 4
    assert [dataset.is_sentence(index) for index in range(4)] == [True] * 3 + [False]
    assert [sample.image_id for sample in samples] == ["a", "a", "a", "b"]
    assert all(sample.turns[0][1] in PHRASINGS["reason"]["answers"] for sample in samples)


def test_reasonseg_file_in_the_windows_code_page(tmp_path):
    write_reason(tmp_path, REASON)
    content = json.dumps(REASON["b"], ensure_ascii=False).replace("the cup", "the café’s cup")
    write(tmp_path / LISA / "train/b.json", content.encode("cp1252"))
    assert b"caf\xe9\x92s" in (tmp_path / LISA / "train/b.json").read_bytes()
    assert open_dataset("reasonseg", tmp_path).sample(1, rng()).names == ["the café’s cup"]


def test_reasonseg_image_without_a_target_is_left_out(tmp_path):
    without = record(shape("ignore", *LARGE), shape("flag", *SMALL))
    write_reason(tmp_path, {"0": without, **REASON, "c": record()})
    dataset = open_dataset("reasonseg", tmp_path)
    assert [shade_of(sample) for sample in samples_of(dataset)] == [2, 3]
    assert +dataset.skipped == {"images without a target": 2}


def test_reasonseg_image_whose_target_is_covered_is_left_out(tmp_path):
    halves = shape("ignore", 5, 6, 9, 10), shape("ignore", 5, 9, 9, 12)
    write_reason(tmp_path, {**REASON, "c": record(shape("target", *SMALL), *halves)})
    dataset = open_dataset("reasonseg", tmp_path)
    assert [shade_of(sample) for sample in samples_of(dataset)] == [1, 2]


# ---- GranD-f: people and OpenPSG -----------------------------------------------------------------

GCG = "img_gcgseg/grand_f"
HA = f"{GCG}/images/GranDf_HA_images"
CAPTION = ' "A red ring near a blue star and a green square." '  # offsets count from the A


def grounding(start: int, end: int, *masks: np.ndarray) -> dict:
    return {"token_positives": [start, end], "rle_masks": [packed(mask) for mask in masks]}


PARTS = [area((1, 1, 4, 5)), area((10, 10, 3, 3)), area((15, 2, 6, 6)), area((3, 20, 5, 9))]


def grounded(**groundings: dict) -> dict:
    groundings = {phrase.replace("_", " "): each for phrase, each in groundings.items()}
    image = {"file_name": "sa_1.jpg", "image_id": "sa_1"}
    return image | {"caption": CAPTION, "groundings": groundings}


TWO_SPANS = grounded(
    a_blue_star=grounding(16, 27, PARTS[2]), a_red_ring=grounding(0, 10, PARTS[0], PARTS[1])
)


def write_grounded(root: Path, *records: dict) -> None:
    write(root / GCG / "annotations/train/GranDf_HA_GCG_train.json", list(records))
    for each in records:
        write(root / HA / "train" / each["file_name"], grey(50))


def test_gcg_quoted_caption_and_a_phrase_of_two_rles(tmp_path):
    write_grounded(tmp_path, TWO_SPANS)
    (sample,) = samples_of(open_dataset("gcg_grandf", tmp_path))
    assert is_well_formed(sample) and sample.sample_id == "gcg_grandf/sa_1"
    assert sample.turns[0][0] in PHRASINGS["gcg"]["questions"]
    assert sample.turns[0][1] == (
        "<p>a red ring</p> near <p>a blue star</p> and a green square. <SEG>"
    )
    assert sample.names == ["a red ring", "a blue star"] and sample.labels.tolist() == [0, 1]
    assert (sample.masks == np.stack([PARTS[0] | PARTS[1], PARTS[2]])).all()
    assert sample.ignore is None


@pytest.mark.parametrize(
    ("spans", "kept"),
    [
        ([(0, 10), (10, 27)], ["a red ring"]),
        ([(10, 27), (0, 10)], ["a red ring"]),
        ([(0, 10), (11, 27)], ["a red ring", "near a blue star"]),
        ([(0, 27), (2, 10), (32, 46)], ["a red ring near a blue star", "a green square"]),
        ([(2, 10), (5, 27), (26, 31), (32, 46)], ["red ring", "r and", "a green square"]),
        ([(0, 10), (10, 10), (16, 16)], ["a red ring"]),
        ([(-3, 4), (16, 27), (32, 99)], ["a blue star"]),
    ],
    ids=["touching", "touching, unsorted", "one apart", "overlapping", "chain", "empty", "outside"],
)
def test_gcg_spans_that_touch_or_overlap_are_dropped(tmp_path, spans, kept):
    groundings = {f"p{i}": grounding(*span, PARTS[i]) for i, span in enumerate(spans)}
    write_grounded(tmp_path, grounded(**groundings))
    dataset = open_dataset("gcg_grandf", tmp_path)
    (sample,) = samples_of(dataset)
    assert sample.names == kept and sample.labels.tolist() == list(range(len(kept)))
    assert re.findall("<p>(.*?)</p>", sample.turns[0][1]) == kept
    assert re.sub("</?p>| <SEG>", "", sample.turns[0][1]) == CAPTION.strip(' "').lower()
    caption = CAPTION.strip(' "').lower()
    for name, mask in zip(sample.names, sample.masks, strict=True):
        assert (mask == PARTS[[caption[slice(*span)] for span in spans].index(name)]).all()
    assert sum(dataset.skipped.values()) == len(spans) - len(kept)


def test_gcg_span_of_a_space_alone_is_left_out(tmp_path):
    record = grounded(first=grounding(0, 1, PARTS[0]), space=grounding(5, 6, PARTS[1]))
    write_grounded(tmp_path, record | {"caption": "a red ring"})
    dataset = open_dataset("gcg_grandf", tmp_path)
    assert dataset.sample(0, rng()).names == ["a"]
    assert +dataset.skipped == {"spans outside their caption": 1}


def test_gcg_caption_without_a_span_is_left_out(tmp_path):
    other = grounded(p0=grounding(99, 120, PARTS[0])) | {"file_name": "sa_2.jpg"}
    write_grounded(tmp_path, other, grounded(), TWO_SPANS)
    dataset = open_dataset("gcg_grandf", tmp_path)
    assert len(dataset) == 1
    assert +dataset.skipped == {"captions without a span": 2, "spans outside their caption": 1}


@pytest.mark.parametrize("size", [{}, {"height": 24, "width": 32}, {"height": "24", "width": "32"}])
def test_gcg_sizes_are_told_or_not_and_may_be_strings(tmp_path, size):
    write_grounded(tmp_path, TWO_SPANS | size)
    assert open_dataset("gcg_grandf", tmp_path).sample(0, rng()).image.size == (32, 24)


@pytest.mark.parametrize("lies", ["train2017", "val2017"])
@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("images", [COCO, f"{GCG}/images/coco2017", f"{GCG}/images/coco_2017"])
def test_gcg_psg_names_its_images_with_or_without_their_folder(tmp_path, lies, is_named, images):
    name = f"{lies}/000000000009.jpg" if is_named else "000000000009.jpg"
    caption = "Straße: A red ring."  # lower case is as long
    content = TWO_SPANS | {"file_name": name, "image_id": 9, "caption": caption}
    content["groundings"] = {"a red ring": grounding(8, 18, PARTS[0])}
    write(tmp_path / GCG / "annotations/train/OpenPsgGCG_train.json", [content])
    write(tmp_path / images / f"{lies}/000000000009.jpg", grey(9))
    sample = open_dataset("gcg_psg", tmp_path).sample(0, rng())
    assert shade_of(sample) == 9 and sample.names == ["a red ring"]


# ---- GranD-f: RefCOCOg ---------------------------------------------------------------------------

REF_CAPTION = "A Man in a Hat holds the dog that the man likes"


def write_gcg_refs(root: Path, *refs: tuple, **fields) -> None:
    refs = [{"sentence": sentence, "segmentation": shape} for sentence, shape in refs]
    content = {"img_file_name": "COCO_train2014_000000000009.jpg", "caption": REF_CAPTION}
    entries = [{"ref_9_0": content | {"refs": refs} | fields}]
    write(root / GCG / "annotations/train/RefCOCOg_GCG_train.json", entries)
    write(root / REFS / "images/train2014/COCO_train2014_000000000009.jpg", grey(9))


def test_gcg_refcocog_spans_are_first_occurrences_and_absent_phrases_go(tmp_path):
    write_gcg_refs(
        tmp_path,
        ('"The dog"', [ring(1, 1, 4, 5), ring(10, 10, 3, 3)]),
        ("a cat", [ring(3, 20, 5, 9)]),
        (" a man in a hat ", packed(PARTS[2])),
        ("the", [ring(3, 20, 5, 9)]),  # occurs first where the dog does
    )
    dataset = open_dataset("gcg_refcocog", tmp_path)
    (sample,) = samples_of(dataset)
    assert is_well_formed(sample) and sample.sample_id == "gcg_refcocog/ref_9_0"
    assert sample.turns[0][1] == (
        "<p>a man in a hat</p> holds <p>the</p> dog that the man likes <SEG>"
    )
    assert (sample.masks == np.stack([PARTS[2], PARTS[3]])).all() and shade_of(sample) == 9
    assert +dataset.skipped == {
        "phrases that their caption lacks": 1,
        "overlapping or touching spans": 1,
    }


def test_gcg_refcocog_two_rings_are_one_mask(tmp_path):
    fields = {"image_id": 77, "height": "24", "width": 32}
    write_gcg_refs(tmp_path, ("the dog", [ring(1, 1, 4, 5), ring(10, 10, 3, 3)]), **fields)
    (sample,) = samples_of(open_dataset("gcg_refcocog", tmp_path))
    assert (sample.masks == PARTS[0] | PARTS[1]).all() and sample.sample_id == "gcg_refcocog/77"


@pytest.mark.parametrize("told", [True, False])
def test_gcg_photo_is_turned_to_the_size_that_its_masks_tell(tmp_path, told):
    record = grounded(a_blue_star=grounding(16, 27, PARTS[2]))
    write_grounded(tmp_path, record | ({"height": 24, "width": 32} if told else {}))
    tag = Image.Exif()
    tag[274] = 6
    path = tmp_path / HA / "train/sa_1.jpg"
    Image.fromarray(grey(3)).save(path, exif=tag)
    (sample,) = samples_of(open_dataset("gcg_grandf", tmp_path))
    assert sample.image.size == SIZE[::-1] and (sample.masks[0] == PARTS[2]).all()


# ---- GranD-f: Flickr30k --------------------------------------------------------------------------

FLICKR = f"{GCG}/images/flickr30k/images/train"


def write_flickr(root: Path, folder: str = FLICKR) -> None:
    """A photo with two captions, one of two words, and one of which nothing is annotated."""
    captions = ["A dog runs to a Tall man.", "Two dogs", "A dog and a man", "Nobody is here at all"]
    images = [
        {"id": 5 - i, "file_name": "36979.jpg", "caption": text, "height": "24", "width": "32"}
        for i, text in enumerate(captions)
    ]
    annotations = [
        (1, 5, [[14, 24], [0, 5]], PARTS[0], {}),
        (2, 5, [[0, 5]], PARTS[1], {"ignore": 0}),
        (3, 5, [[6, 10]], PARTS[3], {"ignore": 1}),
        (4, 4, [[0, 8]], PARTS[2], {}),
        (5, 3, [[10, 15]], PARTS[2], {}),
    ]
    annotations = [
        {"id": number, "image_id": image, "tokens_positive": spans, "bbox": [0, 0, 1, 1], "area": 1}
        | {"sam_mask": packed(mask)}
        | others
        for number, image, spans, mask, others in annotations
    ]
    content = {"images": images, "annotations": annotations, "categories": []}
    write(root / GCG / "annotations/train/flickr_mergedGT_GCG_train.json", content)
    write(root / folder / "36979.jpg", grey(36))


@pytest.mark.parametrize(
    "folder",
    [FLICKR, f"{GCG}/images/flickr30k/Flickr30K", f"{GCG}/images/flikcr_30k/train"],
)
def test_gcg_flickr_first_span_counts_and_short_captions_go(tmp_path, folder):
    write_flickr(tmp_path, folder)
    dataset = open_dataset("gcg_flickr", tmp_path)
    assert +dataset.skipped == {"captions under three words": 1, "captions without a span": 1}
    by_id = {sample.sample_id: sample for sample in samples_of(dataset)}
    assert set(by_id) == {"gcg_flickr/3", "gcg_flickr/5"}
    assert by_id["gcg_flickr/3"].turns[0][1] == "a dog and <p>a man</p> <SEG>"
    sample = by_id["gcg_flickr/5"]
    assert is_well_formed(sample) and shade_of(sample) == 36
    assert sample.turns[0][1] == "<p>a dog</p> runs to <p>a tall man</p>. <SEG>"
    assert (sample.masks == np.stack([PARTS[1], PARTS[0]])).all()


def test_gcg_flickr_ignored_masks_have_no_label(tmp_path):
    write_flickr(tmp_path)
    by_id = {s.sample_id: s for s in samples_of(open_dataset("gcg_flickr", tmp_path))}
    assert (by_id["gcg_flickr/5"].ignore == PARTS[3]).all()
    assert by_id["gcg_flickr/3"].ignore is None


# ---- GranD-f: what is scored ---------------------------------------------------------------------


def write_scored(root: Path, split: str = "val") -> None:
    """String ids, no "info"; of three images one has two masks, one none, all two phrases."""
    stems = ["sa_3", "sa_1", "sa_2"]
    images = [{"id": stem, "height": 24, "width": 32} for stem in stems]
    masks = [("sa_3", PARTS[0]), ("sa_1", PARTS[1]), ("sa_3", PARTS[2])]
    annotations = [
        {"id": i, "image_id": stem, "category_id": 1, "segmentation": packed(mask), "iscrowd": 0}
        for i, (stem, mask) in enumerate(masks)
    ]
    folder = root / GCG / "annotations/val_test"
    categories = [{"id": 1, "name": "object"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write(folder / f"{split}_gcg_coco_mask_gt.json", content)
    captions = [
        {"id": i, "image_id": stem, "caption": f"The caption of {stem}.", "labels": ["x", "y"]}
        for i, stem in enumerate(stems)
    ]
    content = {"images": images, "annotations": captions}
    write(folder / f"{split}_gcg_coco_caption_gt.json", content)
    for number, stem in enumerate(stems):
        write(root / HA / f"val_test/{stem}.jpg", grey(30 - number))


@pytest.mark.parametrize("split", ["val", "test"])
def test_gcg_val_has_string_ids_and_no_info(tmp_path, split):
    write_scored(tmp_path, split)
    dataset = open_dataset(f"gcg_{split}", tmp_path)
    of_none = "images whose phrases do not belong to their masks"
    assert +dataset.skipped == {"images without masks": 1, of_none: 1}
    first, third = samples_of(dataset)
    assert is_well_formed(first) and is_well_formed(third)
    assert [shade_of(first), shade_of(third)] == [29, 30]
    assert [first.turns[0][1], third.turns[0][1]] == [
        "The caption of sa_1.",
        "The caption of sa_3.",
    ]
    assert third.turns[0][0] in PHRASINGS["gcg"]["questions"]
    assert (third.masks == np.stack([PARTS[0], PARTS[2]])).all()
    assert (third.names, third.labels.tolist()) == (["x", "y"], [0, 1])
    assert (first.names, first.labels.tolist()) == (["object"], [0])
    assert (first.image_id, third.image_id) == ("sa_1", "sa_3")


def test_gcg_val_captions_may_come_without_their_phrases(tmp_path):
    write_scored(tmp_path)
    path = tmp_path / GCG / "annotations/val_test/val_gcg_coco_caption_gt.json"
    edit(path, without("annotations", 0, "labels"))
    dataset = open_dataset("gcg_val", tmp_path)
    assert dataset.skipped["images whose phrases do not belong to their masks"] == 2
    assert dataset.sample(1, rng()).names == ["object"]


# ---- COCO-Interactive ----------------------------------------------------------------------------

INTERACTIVE = "img_intseg/coco_int"
PROMPTS = {
    "point": area((12, 14, 1, 1)),
    "scribble": area((4, 4, 1, 9), (4, 12, 8, 1)),
    "box": area((2, 3, 10, 12)),
    "mask": area((3, 4, 8, 9)),
}
NOTHING = area()


def interactive_annotation(number: int, category: int, segmentation, **prompts) -> dict:
    known = {"id": number, "image_id": 9, "category_id": category, "iscrowd": 0, "area": 9.5}
    known |= {"bbox": [0, 0, 5, 5], "segmentation": segmentation}
    shapes = PROMPTS | prompts
    return known | {f"{kind}_visual_prompt_mask": packed(shapes[kind]) for kind in PROMPT_TYPES}


def coco_image(number: int) -> dict:
    name = f"{number:012d}.jpg"
    return {"id": number, "file_name": name, "height": 24, "width": 32, "license": 1}


def write_interactive(root: Path, split: str = "train") -> None:
    """An instance without a scribble, one with all prompts, a crowd; and an image of a crowd that
    has but a point."""
    crowd = interactive_annotation(3, 1, list_rle(CROWD)) | {"iscrowd": 1}
    lone = {kind: NOTHING for kind in PROMPT_TYPES if kind != "point"}
    annotations = [
        interactive_annotation(1, 90, [ring(2, 3, 6, 5), ring(10, 20, 4, 8)], scribble=NOTHING),
        interactive_annotation(2, 90, [ring(12, 2, 7, 6)]),
        crowd,
    ]
    others = [interactive_annotation(4, 1, list_rle(CROWD), **lone) | {"iscrowd": 1}]
    content = [
        {"image": f"{number:012d}.jpg", "image_info": coco_image(number), "new_img_id": place}
        | {"anns": each}
        for place, (number, each) in enumerate([(9, annotations), (4, others)])
    ]
    name = f"annotations/coco_interactive_{split}_psalm.json"
    write(root / INTERACTIVE / name, content)
    for number in (9, 4):
        write(root / COCO / f"{split}2017/{number:012d}.jpg", grey(number))


OBJECTS = {1: area((2, 3, 6, 5), (10, 20, 4, 8)), 2: area((12, 2, 7, 6)), 3: CROWD, 4: CROWD}


def disc(mask: np.ndarray, radius: int) -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    away = [np.hypot(rows - row, columns - column) for row, column in np.argwhere(mask)]
    return np.min(away, axis=0) <= radius


GROWN = PROMPTS | {"point": disc(PROMPTS["point"], 10), "scribble": disc(PROMPTS["scribble"], 5)}


@pytest.mark.parametrize("kind", PROMPT_TYPES)
def test_interactive_evaluation_asks_for_each_object_that_has_the_prompt(tmp_path, kind):
    write_interactive(tmp_path, "val")
    dataset = open_dataset(f"coco_interactive_val_{kind}", tmp_path)
    expected = {"point": [1, 2, 3, 4], "scribble": [2, 3]}.get(kind, [1, 2, 3])
    samples = samples_of(dataset)
    assert len(samples) == len(expected)
    for sample, number in zip(samples, expected, strict=True):
        assert is_well_formed(sample) and shade_of(sample) == (4 if number == 4 else 9)
        assert (sample.masks == OBJECTS[number]).all() and sample.labels.tolist() == [0]
        assert (sample.regions == GROWN[kind]).all()
        assert "<p><region></p>" in sample.turns[0][0] and "<SEG>" in sample.turns[0][1]
    assert len({sample.sample_id for sample in samples}) == len(samples)
    assert dataset.skipped["objects that no prompt shows"] == 4 - len(expected)


def test_interactive_training_draws_an_object_and_a_prompt_but_no_crowd(tmp_path):
    write_interactive(tmp_path)
    dataset = open_dataset("coco_interactive", tmp_path)
    assert len(dataset) == 1
    assert +dataset.skipped == {"crowd regions": 2, "images without a prompt": 1}
    drawn = set()
    for seed in range(150):
        sample = dataset.sample(0, rng(seed))
        assert is_well_formed(sample) and len(sample.masks) == len(sample.regions) == 1
        (number,) = (n for n in (1, 2) if (sample.masks[0] == OBJECTS[n]).all())
        (kind,) = (k for k in PROMPT_TYPES if (sample.regions[0] == GROWN[k]).all())
        assert sample.region_kinds == [kind]
        drawn.add((number, kind))
    assert drawn == {*itertools.product((1, 2), PROMPT_TYPES)} - {(1, "scribble")}


# ---- COCO-VGD ------------------------------------------------------------------------------------

VGD = "img_vgdseg/coco_vgd"


def shifted(kind: str, number: int) -> np.ndarray:
    """A prompt that tells whose it is."""
    return np.roll(PROMPTS[kind], number, axis=1)


def vgd_annotation(number: int, category: int, segmentation, without: tuple = ()) -> dict:
    prompts = {
        f"{kind}_visual_prompt": packed(NOTHING if kind in without else shifted(kind, number))
        for kind in PROMPT_TYPES
    }
    known = {"id": number, "image_id": 9, "category_id": category, "iscrowd": 0, "bbox_mode": 1}
    return known | {"segmentation": segmentation, "visual_prompts": prompts}


def write_vgd(root: Path, split: str = "train") -> None:
    """A category of two instances, one of one without a scribble, and an image that has no prompt
    but a box."""
    annotations = [
        vgd_annotation(1, 90, [ring(2, 3, 6, 5), ring(10, 20, 4, 8)]),
        vgd_annotation(2, 1, packed(PARTS[3]), without=("scribble",)),
        vgd_annotation(3, 90, [ring(12, 2, 7, 6)], without=("point",)),
    ]
    others = [vgd_annotation(4, 27, packed(PARTS[0]), without=("point", "scribble", "mask"))]
    content = [
        {"image_file": f"{number:012d}.jpg", "image_id": number, "image_size": [24, 32]}
        | {"image_info": coco_image(number), "annotations": each}
        for number, each in ((9, annotations), (4, others))
    ]
    write(root / VGD / f"annotations/img_vgdseg_coco_{split}.json", content)
    write(root / VGD / f"annotations/instances_{split}2017.json", INSTANCES)
    for number in (9, 4):
        write(root / COCO / f"{split}2017/{number:012d}.jpg", grey(number))


VGD_MASKS = {"toothbrush": [OBJECTS[1], OBJECTS[2]], "person": [PARTS[3]]}


def has_all_instances(sample: Sample) -> bool:
    for label, name in enumerate(sample.names):
        masks = sample.masks[sample.labels == label]
        assert (masks == np.stack(VGD_MASKS[name])).all()
    assert f"{', '.join(['<p><region></p>'] * len(sample.names))}" in sample.turns[0][0]
    return is_well_formed(sample)


def whose(name: str, region: np.ndarray) -> tuple[int, str]:
    """The annotation and the kind of a prompt; those of the file are not dilated again."""
    numbers = {"toothbrush": (1, 3), "person": (2,)}[name]
    pairs = itertools.product(numbers, PROMPT_TYPES)
    return next(pair for pair in pairs if (region == shifted(pair[1], pair[0])).all())


def test_vgd_training_shows_one_instance_and_wants_them_all(tmp_path):
    write_vgd(tmp_path)
    dataset = open_dataset("coco_vgd", tmp_path)
    assert len(dataset) == 2 and not +dataset.skipped
    orders, drawn = set(), set()
    for seed in range(200):
        sample = dataset.sample(0, rng(seed))
        assert has_all_instances(sample)
        orders.add(tuple(sample.names))
        pairs = zip(sample.names, sample.regions, strict=True)
        drawn |= {whose(name, region) for name, region in pairs}
    assert orders == {("person", "toothbrush"), ("toothbrush", "person")}
    expected = {*itertools.product((1, 2, 3), PROMPT_TYPES)} - {(2, "scribble"), (3, "point")}
    assert drawn == expected


@pytest.mark.parametrize("kind", PROMPT_TYPES)
def test_vgd_evaluation_goes_by_category_with_one_kind_of_prompt(tmp_path, kind):
    """A category that no prompt of this kind shows is not asked for."""
    write_vgd(tmp_path, "val")
    dataset = open_dataset(f"coco_vgd_val_{kind}", tmp_path)
    assert len(dataset) == (2 if kind == "box" else 1)
    shown = collections.Counter()
    for seed in range(30):
        sample = dataset.sample(0, rng(seed))
        assert sample.names == ["person", "toothbrush"][kind == "scribble" :]
        assert sample.region_kinds == [kind] * len(sample.regions)
        assert has_all_instances(sample)
        shown.update(map(whose, sample.names, sample.regions))
    expected = {(number, kind) for number in (1, 2, 3)} - {(2, "scribble"), (3, "point")}
    assert set(shown) == expected
    num_lost = {"box": 0, "scribble": 2}.get(kind, 1)
    assert dataset.skipped["objects that no prompt shows"] == num_lost
    assert dataset.skipped["images without a prompt"] == (kind != "box")


LARGER = (40, 50)


def write_cross_vgd(root: Path) -> None:
    """Image 9 of a person and two toothbrushes; 4 of a backpack and a toothbrush; 6, a larger one,
    of a person that has but a point and a box; 5 of a backpack without a point."""
    write_vgd(root, "val")
    corner = area((30, 40, 10, 10), size=LARGER)
    prompts = {"point": corner, "box": corner} | dict.fromkeys(("scribble", "mask"), corner & False)
    person = vgd_annotation(6, 1, packed(~corner))
    person["visual_prompts"] = {f"{k}_visual_prompt": packed(mask) for k, mask in prompts.items()}
    shape = packed(PARTS[0])
    others = [
        (4, SIZE, [vgd_annotation(4, 27, shape), vgd_annotation(5, 90, shape)]),
        (6, LARGER, [person]),
        (5, SIZE, [vgd_annotation(7, 27, shape, without=("point",))]),
    ]
    path = root / VGD / "annotations/img_vgdseg_coco_val.json"
    content = json.loads(path.read_text())[:1]
    for number, size, annotations in others:
        image = coco_image(number) | {"height": size[0], "width": size[1]}
        record = {"image_file": image["file_name"], "image_id": number, "image_info": image}
        content.append(record | {"annotations": annotations})
        write(root / COCO / "val2017" / image["file_name"], grey(number, size))
    write(path, content)


@pytest.mark.parametrize(
    ("kind", "asked"),
    [  # of an image, the categories that another one shows by this kind of prompt, and where
        ("box", {9: {1: [6], 90: [4]}, 4: {27: [5], 90: [9]}, 6: {1: [9]}, 5: {27: [4]}}),
        ("point", {9: {1: [6], 90: [4]}, 4: {90: [9]}, 6: {1: [9]}, 5: {27: [4]}}),
        ("mask", {9: {90: [4]}, 4: {27: [5], 90: [9]}, 6: {1: [9]}, 5: {27: [4]}}),
        ("scribble", {9: {90: [4]}, 4: {27: [5], 90: [9]}, 5: {27: [4]}}),
    ],
)
def test_vgd_across_images_shows_each_category_in_another_image(tmp_path, kind, asked):
    """Also one that the image itself has no prompt for; what no other image shows is not asked."""
    write_cross_vgd(tmp_path)
    dataset = open_dataset(f"coco_vgd_val_{kind}_cross", tmp_path)
    objects = {9: [90, 1, 90], 4: [27, 90], 6: [1], 5: [27]}
    found, drawn = {}, set()
    for seed in range(20):
        for sample in samples_of(dataset, seed):
            assert is_well_formed(sample) and shade_of(sample) == sample.image_id
            assert sample.region_kinds == [kind] * len(sample.regions)
            reference_images = [image.getpixel((0, 0))[0] for image in sample.region_images]
            shown = zip(sample.category_ids, reference_images, strict=True)
            found[sample.image_id] = {
                category: [reference_image] for category, reference_image in shown
            }
            assert sample.names == [dataset.category_names[each] for each in sample.category_ids]
            of_labels = [sample.category_ids[label] for label in sample.labels]
            kept = [each for each in objects[sample.image_id] if each in sample.category_ids]
            assert sorted(of_labels) == sorted(kept)
            for reference_image, region in zip(reference_images, sample.regions, strict=True):
                numbers = {9: (1, 2, 3), 4: (4, 5), 5: (7,), 6: ()}[reference_image]
                is_of = [n for n in numbers if (region == shifted(kind, n)).all()]
                assert region.any() and (len(is_of) == 1 or reference_image == 6)
                drawn.update(is_of)
    assert found == asked
    num_asked = sum(c in asked.get(image, ()) for image, cs in objects.items() for c in cs)
    assert dataset.skipped["objects that no other image shows"] == 7 - num_asked
    assert dataset.skipped["images that no other image shows a category of"] == 4 - len(asked)
    assert {1, 3} - drawn == (
        {3} if kind == "point" else set()
    )  # any object of the reference_image


def test_vgd_training_keeps_a_category_that_nothing_shows(tmp_path):
    """Another image of the batch may show it."""
    write_vgd(tmp_path)
    path = tmp_path / VGD / "annotations/img_vgdseg_coco_train.json"
    person = vgd_annotation(2, 1, packed(PARTS[3]), without=PROMPT_TYPES)
    edit(path, at(0, "annotations", 1, person))
    sample = open_dataset("coco_vgd", tmp_path).sample(0, rng())
    assert has_all_instances(sample) and set(sample.names) == {"person", "toothbrush"}
    is_shown = dict(zip(sample.names, sample.regions.any(axis=(1, 2)), strict=True))
    assert is_shown == {"person": False, "toothbrush": True}


def test_vgd_objects_without_a_pixel_are_not_asked_for(tmp_path):
    write_vgd(tmp_path)
    path = tmp_path / VGD / "annotations/img_vgdseg_coco_train.json"
    edit(path, at(0, "annotations", 1, "segmentation", THIN))  # the only person
    edit(path, at(1, "annotations", 0, "segmentation", THIN))
    dataset = open_dataset("coco_vgd", tmp_path)
    for seed in range(10):
        sample = dataset.sample(0, rng(seed))
        assert sample.names == ["toothbrush"] and has_all_instances(sample)
    with pytest.raises(ValueError, match=r"coco_train\.json: image 4: no object has a pixel"):
        dataset.sample(1, rng())


# ---- LLaVA ---------------------------------------------------------------------------------------

LLAVA = "img_chat/llava"


def turns(*values: str, start: str = "human") -> list[dict]:
    speakers = itertools.cycle(("human", "gpt") if start == "human" else ("gpt", "human"))
    return [{"from": who, "value": value} for who, value in zip(speakers, values, strict=False)]


def chat_record(number, image: str, *values: str, **options) -> dict:
    return {"id": number, "image": image, "conversations": turns(*values, **options)}


def write_llava(root: Path, records: list[dict], images: tuple = ("coco/train2017/9.jpg",)) -> None:
    name = "LLaVA-Instruct-150K/llava_v1_5_mix665k.json"
    write(root / LLAVA / name, records)
    for number, image in enumerate(images):
        write(root / LLAVA / "llava_images" / image, grey(9 + number))


CHATS = [
    chat_record("000000000009", "coco/train2017/9.jpg", "<image>\nWhat is it?", "A ring."),
    chat_record(2332, "coco/train2017/9.jpg", "What is it?\n<image>", "A ring.", "Why?", " So. "),
    {"id": "text", "model": "", "conversations": turns("Hello", "Hello.")},
    chat_record("lead", "coco/train2017/9.jpg", "Hi.", "<image>\nAnd?", "A star.", start="gpt"),
]


def test_llava_turns(tmp_path):
    write_llava(tmp_path, CHATS)
    dataset = open_dataset("llava_instruct", tmp_path)
    assert len(dataset) == 3 and +dataset.skipped == {"text without an image": 1}
    samples = samples_of(dataset)
    assert [sample.turns for sample in samples] == [
        [("What is it?", "A ring.")],
        [("What is it?", "A ring."), ("Why?", "So.")],
        [("And?", "A star.")],
    ]
    ids = ["llava_instruct/000000000009", "llava_instruct/2332", "llava_instruct/lead"]
    assert [sample.sample_id for sample in samples] == ids
    for sample in samples:
        assert is_well_formed(sample) and sample.masks.shape == (0, *SIZE)
        assert (sample.task, sample.names, sample.regions) == ("chat", [], None)


def test_llavas_conversations_about_no_image_are_a_set_of_their_own(tmp_path):
    """The flag that keeps them: --datasets llava_instruct,llava_instruct_text,…"""
    strange = {"id": "strange", "conversations": turns("<image>\nWho?", "You.")}
    write_llava(tmp_path, [*CHATS, strange], images=())  # none has to be there
    dataset = open_dataset("llava_instruct_text", tmp_path)
    assert len(dataset) == 1
    reasons = {"records with an image": 3, "records whose <image> has no file": 1}
    assert +dataset.skipped == reasons
    sample = dataset.sample(0, rng())
    assert sample.turns == [("Hello", "Hello.")] and sample.is_text and shade_of(sample) == 0
    assert sample.sample_id == "llava_instruct_text/text"


def test_llava_pretrain_caption(tmp_path):
    record = chat_record("004539375", "00453/004539375.jpg", "Render it.\n<image>", "a red ring")
    name = "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
    write(tmp_path / LLAVA / name, [record])
    write(tmp_path / LLAVA / "LLaVA-Pretrain/images/00453/004539375.jpg", grey(7))
    (sample,) = samples_of(open_dataset("llava_pretrain", tmp_path))
    assert sample.turns == [("Render it.", "a red ring")] and shade_of(sample) == 7


def test_llava_records_of_videos_are_counted_as_such(tmp_path):
    videos = [
        {"id": 1, "video": "v.mp4", "conversations": turns("<image>\nWho?", "You.")},
        {"id": 2, "videos": ["v.mp4"], "conversations": turns("Who?", "You.")},
        {"id": 3, "conversations": turns("<video>\nWho?", "You.")},
        chat_record(4, "coco/train2017/9.jpg", "<image>\n<video> Who?", "You."),
    ]
    write_llava(tmp_path, [*CHATS[:1], *videos])
    dataset = open_dataset("llava_instruct", tmp_path)
    assert len(dataset) == 1 and +dataset.skipped == {"records of a video": 4}


@pytest.mark.parametrize(
    ("named", "lies"),
    [
        ("ocr_vqa/images/140.jpg", "ocr_vqa/images/140.jpg"),
        ("ocr_vqa/images/140.jpg", "ocr_vqa/images/140.png"),
        ("ocr_vqa/images/140.jpg", "ocr_vqa/images/140.gif"),
        ("ocr_vqa/images/140.jpg", "ocr_vqa/images/140.jpeg"),
        ("textvqa/train_images/a.jpg", "text_vqa/train_images/a.jpg"),
        ("text_vqa/train_images/a.jpg", "textvqa/train_images/a.jpg"),
        ("vg/VG_100K_2/2.jpg", "vg/VG_100K_2/2.jpg"),
    ],
)
def test_llava_images_that_go_by_another_name(tmp_path, named, lies):
    write_llava(tmp_path, [chat_record(1, named, "Which?\n<image>", "This.")], images=(lies,))
    sample = open_dataset("llava_instruct", tmp_path).sample(0, rng())
    assert shade_of(sample) == 9 and sample.image.mode == "RGB"


# ---- benchmarks ----------------------------------------------------------------------------------


def picture_2x2() -> tuple[np.ndarray, str]:
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 8, 7]]], np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "PNG")
    return colours, base64.b64encode(buffer.getvalue()).decode()


def write_tsv(root: Path, rows: list[dict], name: str = "MMBench_DEV_EN") -> None:
    path = root / f"LMUData/{name}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="", delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


COLOURS, PICTURE = picture_2x2()
CHOICE = {"index": 241, "image": PICTURE, "question": "Which is red?", "hint": "Look\tup."}
CHOICE |= {"A": "the left", "B": "the right", "C": "", "D": "", "answer": "A", "category": "x"}


OPEN = {"image": "241", "question": "Is there a ring?", "answer": "Yes"}


def test_tsv_choices_yes_no_and_the_image_of_another_row(tmp_path):
    yes_no = {"index": 7, "image": "241", "question": "Is there\na ring?", "answer": "Yes"}
    write_tsv(tmp_path, [yes_no, CHOICE])
    dataset = open_dataset("mmbench", tmp_path)
    asked, chosen = samples_of(dataset)
    for sample in (asked, chosen):
        assert (np.asarray(sample.image) == COLOURS).all()
        assert sample.task == "chat" and sample.masks.shape == (0, 2, 2) and is_well_formed(sample)
    assert asked.turns == [("Is there\na ring?", "Yes")] and asked.sample_id == "mmbench/7"
    lines = ["Look\tup.", "Which is red?", "A. the left", "B. the right"]
    lines += ["Answer with the letter of the right option."]
    assert chosen.turns == [("\n".join(lines), "A")] and chosen.sample_id == "mmbench/241"
    assert (asked.image_id, chosen.image_id) == ("7", "241")


def test_choices_are_asked_in_a_users_words_the_same_each_time(tmp_path):
    write_tsv(tmp_path, [CHOICE, CHOICE | {"index": 5}, {"index": 7} | OPEN])
    mine = [f"{word}: {{question}}\n{{options}}" for word in "XYZ"]
    dataset = open_dataset("mmbench", tmp_path, phrasings=PHRASINGS | {"chat": {"choices": mine}})
    asked = [dataset.inputs(index).turns[0][0] for index in range(3)]
    words = "Look\tup.\nWhich is red?\nA. the left\nB. the right"
    assert all(question[0] in "XYZ" and question[1:] == f": {words}" for question in asked[:2])
    assert asked[2] == OPEN["question"]
    assert asked == [dataset.inputs(index).turns[0][0] for index in range(3)]
    drawn = {dataset.sample(0, rng(seed)).turns[0][0][0] for seed in range(30)}
    assert drawn == {*"XYZ"}


def test_a_table_that_was_saved_by_pandas(tmp_path):
    """ "nan" is no hint and no option, unless it is the right one; "5.0" is index 5."""
    row = CHOICE | {"index": "5.0", "hint": "nan", "C": "nan", "D": "NaN"}
    write_tsv(tmp_path, [row, row | {"index": "6.0", "answer": "C"}])
    dataset = open_dataset("mmbench", tmp_path)
    assert [dataset.key(index) for index in range(2)] == ["5", "6"]
    first, second = (sample.turns[0][0].splitlines()[:-1] for sample in samples_of(dataset))
    assert first == ["Which is red?", "A. the left", "B. the right"]
    assert second == [*first, "C. nan"]


def test_images_of_a_table_as_lists_and_as_browsers_have_them(tmp_path):
    lines = "\n".join(PICTURE[at : at + 76] for at in range(0, len(PICTURE), 76))
    images = [f"data:image/png;base64,{PICTURE}", lines, f"['{PICTURE}', '{PICTURE}']"]
    write_tsv(tmp_path, [CHOICE | {"index": i, "image": image} for i, image in enumerate(images)])
    dataset = open_dataset("mmbench", tmp_path)
    assert +dataset.skipped == {"questions about a list of images": 1} and len(dataset) == 2
    assert all((np.asarray(sample.image) == COLOURS).all() for sample in samples_of(dataset))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mme", "MME"),
        ("seed", "SEEDBench_IMG"),
        ("pope", "POPE"),
        ("ai2d", "AI2D_TEST"),
        ("gqa", "GQA_TestDev_Balanced"),
        ("scienceqa_val", "ScienceQA_VAL"),
        ("scienceqa_test", "ScienceQA_TEST"),
    ],
)
def test_tsv_of_every_benchmark(tmp_path, name, file):
    row = CHOICE
    if name in ("mme", "pope"):
        row = {key: CHOICE[key] for key in ("index", "image", "question")} | {"answer": "Yes"}
        write_tsv(tmp_path, [row | {"answer": "maybe"}], file)
        assert "its answer is 'maybe', not yes or no" in errors(name, tmp_path)[0]
    write_tsv(tmp_path, [row], file)
    assert open_dataset(name, tmp_path).sample(0, rng()).turns[0][1] == row["answer"]


def test_tsv_image_by_path(tmp_path):
    row = CHOICE | {"image": "", "image_path": "images/MME/1.png"}
    write_tsv(tmp_path, [row])
    write(tmp_path / "LMUData/images/MME/1.png", COLOURS)
    sample = open_dataset("mmbench", tmp_path).sample(0, rng())
    assert (np.asarray(sample.image) == COLOURS).all()


# ---- how long a prompt is ------------------------------------------------------------------------


def num_words(dataset: Dataset) -> list[int]:
    return [dataset.num_words(index) for index in range(len(dataset))]


def test_words_of_referring_and_reasoning_prompts_are_counted(tmp_path):
    write_refs(tmp_path, [*TWO_REFS, *OF_VAL])
    dataset = open_dataset("refcoco_val", tmp_path)
    counts = [len(sample.names[0].split()) for sample in samples_of(dataset)]
    assert num_words(dataset) == counts == [2, 2, 3, 1]
    write_reason(tmp_path, REASON, "val")
    counts = [len(text.split()) for text in TEXTS]
    assert num_words(open_dataset("reasonseg_val", tmp_path)) == [*counts, 2]


def test_words_of_a_question_with_options_and_categories_of_visual_prompts_are_counted(tmp_path):
    write_tsv(tmp_path, [CHOICE, CHOICE | {"index": 7, "A": "", "B": "", "hint": ""}])
    assert num_words(open_dataset("mmbench", tmp_path)) == [3 + 2 + 2 + 2, 3]
    write_vgd(tmp_path)
    write_interactive(tmp_path, "val")
    assert num_words(open_dataset("coco_vgd", tmp_path)) == [2, 1]
    assert set(num_words(open_dataset("coco_interactive_val_box", tmp_path))) == {1}
    write_panoptic(tmp_path)
    assert num_words(open_dataset("coco_panoptic", tmp_path)) == [0, 0]  # all are alike


# ---- a user's own --------------------------------------------------------------------------------


def write_own(root: Path, *records: dict) -> None:
    write(root / "mine/refs.json", list(records))
    write(root / "mine/a.jpg", grey(5))
    write(root / "mine/masks/a.png", (255 * PARTS[2]).astype(np.uint8))
    write(root / "mine/masks/black.png", np.zeros(SIZE, np.uint8))


OWN = {
    "image": "a.jpg",
    "masks": [[ring(1, 1, 4, 5)], packed(PARTS[1]), "masks/a.png", None, list_rle(PARTS[3])],
    "texts": [" The Ring ", ["a star", "the yellow thing"], "a cup", ["a dog"], "the rest"],
}


@pytest.mark.parametrize("name", ["mine/refs.json", "mine/refs.json:mine"])
def test_own_referring_of_every_kind_of_mask(tmp_path, name):
    write_own(tmp_path, OWN)
    dataset = open_dataset(name, tmp_path)
    truth = {"The Ring": 0, "a star": 1, "the yellow thing": 1, "a cup": 2, "the rest": 3}
    texts, refusals = set(), set()
    for seed in range(60):
        sample = dataset.sample(0, rng(seed))
        assert is_well_formed(sample) and sample.task == "refer"
        present = [truth[name] for name in sample.names if name != "a dog"]
        assert np.array_equal(sample.masks, np.reshape([PARTS[k] for k in present], (-1, *SIZE)))
        assert "a dog" not in [sample.names[label] for label in sample.labels]
        texts.update(sample.names)
        for text, (asked, answer) in zip(sample.names, sample.turns, strict=True):
            assert f"<p>{text}</p>" in asked
            kind = "answers" if "<SEG>" in answer else "absent"
            assert answer in PHRASINGS["refer"][kind]
            refusals |= {kind} if text == "a dog" else set()
    assert texts == {*truth, "a dog"} and refusals == {"answers", "absent"}


def test_own_referring_by_absolute_paths(tmp_path):
    write_own(tmp_path, OWN)
    name = f"{tmp_path}/mine/refs.json:{tmp_path}/mine"
    assert shade_of(open_dataset(name, Path("elsewhere")).sample(0, rng())) == 5


def test_own_referring_of_many_texts_gives_as_many_samples_as_conversations(tmp_path):
    count = MAX_TURNS + 2
    masks, texts = [[ring(1, 1, 4, 5)]] * count, [f"t{k}" for k in range(count)]
    write_own(tmp_path, {"image": "a.jpg", "masks": masks, "texts": texts})
    assert len(open_dataset("mine/refs.json", tmp_path)) == 2


@pytest.mark.parametrize("is_absolute", [False, True])
def test_own_instances(tmp_path, is_absolute):
    write_instances(tmp_path, "mine/coco.json")
    root = f"{tmp_path}/" if is_absolute else ""
    dataset = open_dataset(f"{root}mine/coco.json:{root}{COCO}/train2017", tmp_path)
    assert [len(sample.masks) for sample in samples_of(dataset)] == [1, 2]


def test_own_instances_beside_their_file(tmp_path):
    write(tmp_path / "mine/coco.json", INSTANCES)
    for number in (20, 4):
        write(tmp_path / f"mine/{number:012d}.jpg", grey(number))
    dataset = open_dataset("mine/coco.json", tmp_path, all_classes=True)
    assert [shade_of(sample) for sample in samples_of(dataset)] == [4, 20]
    assert dataset.names == ["person", "backpack", "toothbrush"]


def test_own_panoptic(tmp_path):
    write_panoptic(tmp_path)
    file = f"{COCO}/annotations/panoptic_train2017.json"
    name = f"{file}:{COCO}/train2017:{COCO}/panoptic_train2017"
    first, second = samples_of(open_dataset(name, tmp_path, all_classes=True))
    assert (first.labels.tolist(), second.labels.tolist()) == ([1], [2, 3, 2])
    with pytest.raises(ValueError, match=r"panoptic_train2017\.json: panoptic, so name its PNGs"):
        open_dataset(f"{file}:{COCO}/train2017", tmp_path)


def test_own_panoptic_image_whose_name_has_a_dot(tmp_path):
    write_panoptic(tmp_path, [(7, IDS, SEGMENTS)])
    folder = tmp_path / COCO
    (folder / "train2017/000000000007.jpg").rename(folder / "train2017/photo.v2.jpg")
    (folder / "panoptic_train2017/000000000007.png").rename(
        folder / "panoptic_train2017/photo.v2.png"
    )
    path = folder / "annotations/panoptic_train2017.json"
    edit(path, at("images", 0, "file_name", "photo.v2.jpg"))
    edit(path, without("annotations", 0, "file_name"))
    assert len(open_dataset("coco_panoptic", tmp_path).sample(0, rng()).masks) == 3


# ---- what is wrong with a record -----------------------------------------------------------------

OWN_NAME = "mine/refs.json"
TRAIN_2014 = f"{REFS}/images/train2014"


def write_own_world(root: Path) -> None:
    write_own(root, OWN | {"image": "b.jpg"}, OWN)
    write(root / "mine/b.jpg", grey(6))


def write_grounded_world(root: Path) -> None:
    first = TWO_SPANS | {"height": 24, "width": 32}
    write_grounded(root, first, first | {"file_name": "sa_2.jpg", "image_id": 2})


def write_gcg_refs_world(root: Path) -> None:
    write_gcg_refs(root, ("the dog", [ring(1, 1, 4, 5)]), image_id=77, height=24, width=32)


def write_tsv_world(root: Path) -> None:
    write_tsv(root, [CHOICE, CHOICE | {"index": 5, "image": "", "image_path": "images/5.png"}])
    write(root / "LMUData/images/5.png", COLOURS)


# A world for every reader: how it is written, its annotations, and one of its images.
WORLDS: dict[str, tuple[Callable, str, str]] = {
    "coco_panoptic": (write_panoptic, f"{COCO}/annotations/panoptic_train2017.json",
                      f"{COCO}/train2017/000000000007.jpg"),
    "coco_instance": (write_instances, f"{COCO}/annotations/instances_train2017.json",
                      f"{COCO}/train2017/000000000020.jpg"),
    "coco_semantic": (write_semantic, f"{COCO}/annotations/panoptic_train2017.json",
                      f"{COCO}/train2017/000000000008.jpg"),
    "refcoco": (functools.partial(write_refs, refs=[*TWO_REFS, (6, 20, "train", ["x"])]),
                f"{REFS}/refcoco/instances.json", f"{TRAIN_2014}/COCO_train2014_000000000001.jpg"),
    "grefcoco": (functools.partial(write_refs, refs=GREFS, folder="grefcoco", file=GREFS_FILE),
                 f"{REFS}/grefcoco/{GREFS_FILE}", f"{TRAIN_2014}/COCO_train2014_000000000001.jpg"),
    "reasonseg": (functools.partial(write_reason, records=REASON),
                  f"{LISA}/train/a.json", f"{LISA}/train/a.jpg"),
    "gcg_grandf": (write_grounded_world, f"{GCG}/annotations/train/GranDf_HA_GCG_train.json",
                   f"{HA}/train/sa_1.jpg"),
    "gcg_refcocog": (write_gcg_refs_world, f"{GCG}/annotations/train/RefCOCOg_GCG_train.json",
                     f"{TRAIN_2014}/COCO_train2014_000000000009.jpg"),
    "gcg_flickr": (write_flickr, f"{GCG}/annotations/train/flickr_mergedGT_GCG_train.json",
                   f"{FLICKR}/36979.jpg"),
    "gcg_val": (write_scored, f"{GCG}/annotations/val_test/val_gcg_coco_mask_gt.json",
                f"{HA}/val_test/sa_3.jpg"),
    "coco_interactive": (write_interactive,
                         f"{INTERACTIVE}/annotations/coco_interactive_train_psalm.json",
                         f"{COCO}/train2017/000000000009.jpg"),
    "coco_vgd": (write_vgd, f"{VGD}/annotations/img_vgdseg_coco_train.json",
                 f"{COCO}/train2017/000000000009.jpg"),
    "llava_instruct": (functools.partial(write_llava, records=CHATS),
                       f"{LLAVA}/LLaVA-Instruct-150K/llava_v1_5_mix665k.json",
                       f"{LLAVA}/llava_images/coco/train2017/9.jpg"),
    "mmbench": (write_tsv_world, "LMUData/MMBench_DEV_EN.tsv", "LMUData/images/5.png"),
    OWN_NAME: (write_own_world, "mine/refs.json", "mine/a.jpg"),
}  # fmt: skip
WITH_SIZE = set(WORLDS) - {"reasonseg", "llava_instruct", "mmbench", OWN_NAME}


def errors(name: str, root: Path) -> list[str]:
    """What a set says of its records; another error than a ValueError fails the test."""
    try:
        open_dataset(name, root)
    except ValueError as error:
        messages = [str(error)]
    else:
        messages = []
    try:
        dataset = open_dataset(name, root, skip_bad=True)
    except ValueError:
        assert messages
        return messages
    assert bool(messages) == bool(dataset.problems)
    messages = list(dataset.problems)
    for index in range(len(dataset)):
        try:
            assert is_well_formed(dataset.sample(index, rng(1)))
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_every_reader_has_a_world():
    used = {"own_refs", "regions", *(SOURCES[name].format for name in WORLDS if name in SOURCES)}
    assert used == set(READERS)  # of "regions" in test_own.py; it reads as "panoptic" does


@pytest.mark.parametrize("name", WORLDS)
def test_a_sound_world_has_no_errors_and_repeats(tmp_path, name):
    WORLDS[name][0](tmp_path)
    assert errors(name, tmp_path) == []
    dataset, again = open_dataset(name, tmp_path), open_dataset(name, tmp_path)
    for one, other in zip(samples_of(dataset, 4), samples_of(again, 4), strict=True):
        assert (one.turns, one.names, one.sample_id) == (other.turns, other.names, other.sample_id)
        for key in ("masks", "labels", "regions", "ignore"):
            assert np.array_equal(getattr(one, key), getattr(other, key))


@pytest.mark.parametrize("name", WORLDS)
def test_an_image_that_is_missing_or_does_not_open_is_named(tmp_path, name):
    write_world, _, image = WORLDS[name]
    write_world(tmp_path)
    path = tmp_path / image
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"<html>not found</html>", b""):
        path.write_bytes(damaged)
        messages = errors(name, tmp_path)
        assert messages and all(path.name in message for message in messages)
    path.unlink()
    messages = errors(name, tmp_path)
    expected = (
        "a.json: its image a.jpg is not" if name == "reasonseg" else f"{path}: cannot be read"
    )
    assert messages and all(expected in message for message in messages)


@pytest.mark.parametrize("name", sorted(WITH_SIZE))
def test_an_image_of_another_size_is_named(tmp_path, name):
    write_world, _, image = WORLDS[name]
    write_world(tmp_path)
    write(tmp_path / image, grey(1, (11, 50)))
    messages = errors(name, tmp_path)
    expected = rf"{re.escape(image)}: is 11x50 .*not \d+x\d+ as what goes with it says"
    assert messages and all(re.search(expected, message) for message in messages)


@pytest.mark.parametrize("name", WORLDS)
def test_a_damaged_annotation_file_is_named(tmp_path, name):
    write_world, annotations, _ = WORLDS[name]
    write_world(tmp_path)
    path = tmp_path / annotations
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\xff\xfe\x00", b'"text"', b"{}", b"[]"):
        path.write_bytes(damaged)
        messages = errors(name, tmp_path)
        assert messages and path.name in messages[0]
    path.unlink()
    if name == "reasonseg":  # whose other images have theirs
        dataset = open_dataset(name, tmp_path)
        assert dataset.skipped["images without an annotation"] == 1
        return
    messages = errors(name, tmp_path)
    assert messages and path.name in messages[0]


@pytest.mark.parametrize("name", ["refcoco", "gcg_refcocog"])
def test_a_bad_record_is_told_where_no_other_is_left(tmp_path, name):
    """With --skip-bad as well: that a set has no sample is no help."""
    write_world, annotations, _ = WORLDS[name]
    write_world(tmp_path)
    path = tmp_path / annotations
    write(path, {"images": [], "annotations": []} if name == "refcoco" else [{"a": 1}])
    with pytest.raises(ValueError, match=r"no sample of .*(image 1 is not in|expected a dict)"):
        open_dataset(name, tmp_path, skip_bad=True)


def rle(counts) -> dict:
    return {"size": list(SIZE), "counts": counts}


VGD_CATEGORIES = f"{VGD}/annotations/instances_train2017.json"
CAPTIONS = f"{GCG}/annotations/val_test/val_gcg_coco_caption_gt.json"
GREF_INSTANCES = f"{REFS}/grefcoco/instances.json"
TOKEN, TURNED = "a <p> here", packed(area(size=SIZE[::-1]))
TWO, REF_2 = ("annotations", 1), ("annotations", 0)
SEGMENT = ("annotations", 2, "segments_info")  # of image 7
RING = (0, "groundings", "a red ring")
POINT = (0, "anns", 0, "point_visual_prompt_mask")
CHAT_1 = (1, "conversations")

# Of a set: what is changed in its annotations, and what is said, if need be of another file.
BAD_RECORDS: dict[str, list[tuple]] = {
    "coco_panoptic": [
        (at(*SEGMENT, 3, "category_id", 91), "image 7, segment 2: category 91 is not in its cat"),
        (at(*SEGMENT, 3, "category_id", "hot dog"), "image 7, segment 2: 'category_id'"),
        (at(*SEGMENT, 3, "iscrowd", "no"), "image 7, segment 2: 'iscrowd'"),
        (without(*SEGMENT, 0), "segment id 70001 is not in its segments_info", "000000000007.png"),
        (at(*SEGMENT, 3, "id", 5), "image 7: segment id 5 is there twice"),
        (at(*SEGMENT, 3, "id", 0), "image 7: segment id 0 is void"),
        (at("annotations", 2, "file_name", "no.png"), "cannot be read", "no.png"),
        (without("annotations", 2, "image_id"), r"annotations\[2\]: has no 'image_id'"),
        (without("annotations", 2, "segments_info"), "image 7: has no 'segments_info'"),
        (at("annotations", 2, "image_id", 8), "image 8: has segments but is not in its images"),
        (at("images", 0, "id", 3), "images: id 3 is there more than once"),
        (at("categories", 0, "id", "sky"), r"categories\[0\]: 'id'"),
        (at("categories", 0, "name", "hot-dog"), "category 92: its name 'hot dog' is another"),
        (at("categories", 0, "name", TOKEN), "category 92: contains <p>"),
        (at("categories", 0, "name", "-stuff "), "category 92: is empty"),
        (at("categories", 0, "isthing", "yes"), "category 92: 'isthing'"),
        (at("annotations", 0, "image_id", 7), "image 7: is annotated more than once"),
        (without("categories"), "has no 'categories'"),
        (without("images", 0, "file_name"), "image 7: has no 'file_name'"),
        (at("images", 0, "height", "four"), "image 7: 'height'"),
    ],
    "coco_instance": [
        (at(*TWO, "category_id", 91), "annotation 2: category 91 is not in its categories"),
        (at(*TWO, "segmentation", "masks/2.png"), "annotation 2: 'segmentation': expected dict"),
        (at(*TWO, "segmentation", rle([700, 69])), "annotation 2: its RLE does not fit"),
        (at(*TWO, "segmentation", rle([700, 67])), "annotation 2: its RLE does not fit"),
        (at(*TWO, "segmentation", rle("P")), "annotation 2: its RLE is damaged"),
        (at(*TWO, "segmentation", rle("é")), "annotation 2: its RLE is damaged"),
        (at(*TWO, "segmentation", TURNED), r"annotation 2: RLE of size \[32, 24\] in an image of"),
        (at(*TWO, "image_id", 21), "annotation 2: image 21 is not in its images"),
        (without(*TWO, "id"), r"annotations\[1\]: has no 'id'"),
        (without("images", 2, "id"), r"images\[2\]: has no 'id'"),
        (at(*TWO, "image_id", "a"), "annotation 2: image 'a' is not in its images"),
        (at(*TWO, "id", 1), "annotation 1: is there more than once"),
        (at(*TWO, "iscrowd", "no"), "annotation 2: 'iscrowd'"),
    ],
    "refcoco": [
        (at(*REF_2, "image_id", 6), "ref 100: annotation 11 is of another", "refs(unc).p"),
        (without(*REF_2), r"ref 100: annotation 11 is not in .*instances\.json", "refs(unc).p"),
        (without("images", 1), r"ref 100: image 1 is not in .*instances\.json", "refs(unc).p"),
        (at(*REF_2, "segmentation", [[1, 2, 3]]), "annotation 11: no valid polygon"),
        (at(*REF_2, "segmentation", rle([700])), "annotation 11: its RLE does not fit"),
        (at(*REF_2, "segmentation", rle([768])), "annotation 11: its mask has no pixel"),
        (without("images", 1, "file_name"), "image 1: has no 'file_name'"),
        (at("images", 1, "id", 6), "images: id 6 is there more than once"),
    ],
    "grefcoco": [
        (at(0, "ann_id", [11, -1]), "ref 100: annotation -1 is not in"),
        (at(0, "ann_id", ["eleven"]), "ref 100: 'ann_id': expected int"),
        (at(0, "ann_id", []), "ref 100: 'ann_id' is empty"),
        (at(0, "ann_id", None), "ref 100: 'ann_id'"),
        (at(0, "sentences", 0, "sent", " "), "ref 100: an expression is empty"),
        (without(0, "sentences", 0, "sent"), "ref 100: has no 'sent'"),
        (without(0, "split"), "ref 100: has no 'split'"),
        (at(0, None), "ref 0: expected a dict"),
        (at(0, "sentences", 0, "sent", TOKEN), "ref 100: contains <p>"),
    ],
    "reasonseg": [
        (at("text", []), "a text is missing"),
        (at("text", ["", "a"]), "a text is missing"),
        (at("text", "the cup"), "'text': expected list"),
        (at("text", [TOKEN]), "contains <p>"),
        (without("is_sentence"), "has no 'is_sentence'"),
        (without("shapes", 0, "label"), "shape 0: has no 'label'"),
        (at("shapes", 0, "points", [[1, 2], [3, 4, 5]]), "shape 0: a point has 3"),
        (at("shapes", 0, "points", [[1, 2], [3, "4"]]), "shape 0: expected float"),
        (at("shapes", 0, "points", [[1, 2]]), "shape 0: has 1 points"),
        (at("shapes", 0, "points", 0, 0, 9000), "a polygon lies outside its image"),
        (at("shapes", 0, "points", [[40, 5], [50, 5], [50, 9]]), "its target lies outside"),
    ],
    "gcg_grandf": [
        (at(*RING, "rle_masks", []), "image sa_1: no valid"),
        (at(*RING, "rle_masks", 1, rle([700])), "image sa_1: its RLE does not fit"),
        (at(*RING, "rle_masks", [rle([768])]), "image sa_1: its mask has no pixel"),
        (at(*RING, "token_positives", [0, 3, 5]), "record 0: 'a red ring': a span has 3 numbers"),
        (at(*RING, "token_positives", [0, 3.5]), "record 0: 'a red ring': a span: expected int"),
        (at(0, "groundings", []), "record 0: 'groundings'"),
        (at(0, "caption", f"a red ring is {TOKEN}"), "image sa_1: contains <p>"),
        (without(0, "image_id"), "record 0: has no 'image_id'"),
        (without(0, "height"), "record 0: has no 'height'"),
    ],
    "gcg_refcocog": [
        (at(0, "more", {}), "record 0: has 2 keys, expected one"),
        (at(0, "ref_9_0", []), "record 0: expected a dict"),
        (at(0, "ref_9_0", "refs", 0, "sentence", 7), "record 0: 'sentence'"),
        (at(0, "ref_9_0", "refs", 0, "segmentation", [[1, 2, 3]]), "record 0: no valid polygon"),
        (without(0, "ref_9_0", "img_file_name"), "record 0: has no 'img_file_name'"),
    ],
    "gcg_flickr": [
        (at("annotations", 0, "image_id", 50), r"annotations\[0\]: image 50 is not in"),
        (at("annotations", 0, "tokens_positive", []), "image 5: a span"),
        (at("annotations", 0, "tokens_positive", [[1, 2, 3]]), "image 5: a span has 3 numbers"),
        (without("annotations", 0, "sam_mask"), "image 5: has no 'sam_mask'"),
        (at("annotations", 0, "sam_mask", rle([768, 1])), "image 5: its RLE does not fit"),
        (at("annotations", 0, "sam_mask", rle([768])), "image 5: its mask has no pixel"),
        (at("annotations", 0, "ignore", "no"), "image 5: 'ignore'"),
        (at("images", 0, "caption", None), "image 5: 'caption'"),
        (at("images", 0, "width", "x"), "image 5: 'width'"),
    ],
    "gcg_val": [
        (at("annotations", 0, "image_id", "sa_9"), r"annotations\[0\]: image 'sa_9' is not in"),
        (at("annotations", 0, "segmentation", rle([1])), "image sa_3: its RLE does not fit"),
        (at("annotations", 0, "segmentation", rle([768])), "image sa_3: its mask has no pixel"),
        (at("images", 0, "id", "sa_4"), "image sa_4 has no caption"),
        (without("images", 0, "height"), "image sa_3: has no 'height'"),
    ],
    "coco_interactive": [
        (without(*POINT), "annotation 1: has no 'point_visual_prompt_mask'"),
        (at(*POINT, rle([700])), "annotation 1: point: its RLE does not fit"),
        (at(*POINT, TURNED), "annotation 1: point: RLE of size"),
        (without(0, "anns", 0, "category_id"), "annotation 1: has no 'category_id'"),
        (without(0, "anns", 0, "id"), "record 0: has no 'id'"),
        (without(0, "image"), "record 0: has no 'image'"),
        (without(0, "image_info", "height"), "record 0: has no 'height'"),
        (at(0, "anns", [None]), "record 0: expected a dict"),
        (at(0, 3), "record 0: expected a dict"),
    ],
    "coco_vgd": [
        (at(0, "annotations", 0, "category_id", 91), "annotation 1: category 91 is not in"),
        (without(0, "annotations", 0, "visual_prompts"), "annotation 1: has no 'visual_prompts'"),
        (at(0, "annotations", 0, "segmentation", rle([700])), "annotation 1: its RLE does not fit"),
        (without(0, "annotations", 0, "segmentation"), "annotation 1: has no 'segmentation'"),
        (without(0, "image_file"), "record 0: has no 'image_file'"),
    ],
    "llava_instruct": [
        (at(0, "image", 7), "record 0, id 000000000009: 'image': expected str"),
        (at(0, None), "record 0: expected dict"),
        (without(*CHAT_1), "record 1, id 2332: has no 'conversations'"),
        (at(*CHAT_1, turns("<image>", "a", "b")), "record 1, id 2332: its turns do not alternate"),
        (at(*CHAT_1, 0, "from", "system"), "record 1, id 2332: turn from 'system'"),
        (at(*CHAT_1, 0, "value", "<region>"), "record 1, id 2332: contains <region>"),
    ],
    OWN_NAME: [
        (at(1, "texts", ["a"]), "record 1: 5 masks but 1 texts"),
        (at(1, "masks", []), "record 1: 0 masks but 5 texts"),
        (at(1, "texts", 0, " "), "record 1: a text is empty"),
        (at(1, "texts", 0, []), "record 1: a text is empty"),
        (at(1, "texts", 0, 7), "record 1: a text is empty or no string"),
        (at(1, "texts", 0, TOKEN), "record 1: contains <p>"),
        (at(1, "masks", 0, [[1, 2, 3]]), "record 1: no valid polygon"),
        (at(1, "masks", 0, rle([700])), "record 1: its RLE does not fit"),
        (at(1, "masks", 0, 5), "record 1: a mask: expected dict or list"),
        (at(1, "masks", 0, rle([768])), "record 1: its mask has no pixel"),
        (at(1, "masks", 0, "masks/black.png"), ".*no pixel", "masks/black.png"),
        (at(1, "masks", 0, "masks/b.png"), "cannot be read", "masks/b.png"),
        (without(1, "image"), "record 1: has no 'image'"),
    ],
}
BAD_RECORD_LIST = [(name, *each) for name, records in BAD_RECORDS.items() for each in records]


@pytest.mark.parametrize("case", BAD_RECORD_LIST, ids=[f"{c[0]}-{c[2]}" for c in BAD_RECORD_LIST])
def test_a_bad_record_is_named(tmp_path, case):
    name, change, message, *others = case
    write_world, annotations, _ = WORLDS[name]
    write_world(tmp_path)
    edit(tmp_path / annotations, change)
    file = others[0] if others else Path(annotations).name
    messages = errors(name, tmp_path)
    assert any(re.search(f"{re.escape(file)}: {message}", each) for each in messages), messages


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (CLASS_MAP + 1, "class 133, but there are 133"),
        (CLASS_MAP[:2], "is 2x5 .*, not 3x5 as"),
        (np.stack([CLASS_MAP] * 3, axis=-1), "its pixels are RGB"),
        (b"no picture", "cannot be read as an image"),
        (None, "cannot be read as an image"),
    ],
)
def test_semantic_bad_map_is_named(tmp_path, mask, message):
    write_semantic(tmp_path)
    path = tmp_path / COCO / "panoptic_semseg_train2017/000000000008.png"
    path.unlink() if mask is None else write(path, mask)
    (found,) = errors("coco_semantic", tmp_path)
    assert re.search(rf"panoptic_semseg_train2017/000000000008\.png: {message}", found)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((6, 4, 3), np.uint8), "is 6x4 .*, not 4x6 as"),
        (b"no picture", "cannot be read as an image"),
        (None, "cannot be read as an image"),
    ],
)
def test_panoptic_bad_png_is_named(tmp_path, mask, message):
    write_panoptic(tmp_path)
    path = tmp_path / COCO / "panoptic_train2017/000000000007.png"
    path.unlink() if mask is None else write(path, mask)
    (found,) = errors("coco_panoptic", tmp_path)
    assert re.search(rf"panoptic_train2017/000000000007\.png: {message}", found)


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_refs_that_would_run_code_are_refused(tmp_path):
    write_refs(tmp_path, TWO_REFS)
    path, trace = tmp_path / REFS / "refcoco/refs(unc).p", tmp_path / "ran"
    write(path, pickle.dumps([{"ref_id": Bomb(trace)}]))
    (found,) = errors("refcoco", tmp_path)
    assert re.search(r"refs\(unc\)\.p: not a plain pickle of refs: it asks to import", found)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "path", "change", "message"),
    [
        ("coco_vgd", VGD_CATEGORIES, at("categories", []), "category 90 is not in"),
        ("coco_vgd", VGD_CATEGORIES, at("categories", 0, "name", TOKEN), "contains <p>"),
        ("coco_vgd", VGD_CATEGORIES, at("categories", 0, "id", 1), "id 1 is there more than once"),
        (
            "gcg_val",
            CAPTIONS,
            without("annotations", 1, "caption"),
            "annotation of image sa_1: has",
        ),
        ("gcg_val", CAPTIONS, at("annotations", 1, None), "annotation: expected a dict"),
        ("grefcoco", GREF_INSTANCES, without("annotations"), "has no 'annotations'"),
    ],
)
def test_a_bad_record_of_a_second_file_is_named(tmp_path, name, path, change, message):
    WORLDS[name][0](tmp_path)
    edit(tmp_path / path, change)
    messages = errors(name, tmp_path)
    file = re.escape(Path(path).name)
    assert any(re.search(f"{message}.*{file}|{file}: .*{message}", each) for each in messages)


def test_refs_cut_short_are_refused(tmp_path):
    write_refs(tmp_path, TWO_REFS)
    path = tmp_path / REFS / "refcoco/refs(unc).p"
    write(path, path.read_bytes()[:-20])
    (found,) = errors("refcoco", tmp_path)
    assert re.search(r"refs\(unc\)\.p: not a plain pickle of refs", found)


def test_reasonseg_files_that_lack_their_other_half(tmp_path):
    write_reason(tmp_path, REASON)
    folder = tmp_path / LISA / "train"
    (folder / "a.json").rename(folder / "c.json")
    (found,) = errors("reasonseg", tmp_path)
    assert re.search(r"train/c\.json: its image c\.jpg is not beside it", found)
    dataset = open_dataset("reasonseg", tmp_path, skip_bad=True)
    assert dataset.skipped["images without an annotation"] == 1


@pytest.mark.parametrize(
    ("explanation", "message"),
    [
        ({"image": "a.jpg", "query": "?"}, "record 0: has no 'outputs'"),
        ({"image": 7, "outputs": "x"}, "record 0: 'image'"),
        ({"image": "a.jpg", "outputs": TOKEN}, "record 0: contains <p>"),
        ("x", "record 0: expected a dict"),
    ],
)
def test_reasonseg_bad_explanation_is_named(tmp_path, explanation, message):
    write_reason(tmp_path, REASON)
    write(tmp_path / LISA / "explanatory/train.json", [explanation])
    (found,) = errors("reasonseg", tmp_path)
    assert re.search(rf"explanatory/train\.json: {message}", found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ""}, "row 1: has no 'answer'"),
        ({"question": " "}, "row 1: has no 'question'"),
        ({"index": ""}, "row 1: has no 'index'"),
        ({"answer": "C"}, r"index 5: its answer 'C' is none of \['A', 'B'\]"),
        ({"image": "?" * 80}, "index 5: its image is no picture in base64"),
        ({"image": "A" * 80}, "index 5: its image is no picture in base64"),
        ({"image": PICTURE[:-9]}, "index 5: its image"),
        ({"image": "99"}, "index 5: its image is row 99, which has none"),
        ({"image": ""}, "index 5: has neither image nor image_path"),
        ({"question": TOKEN}, "index 5: contains <p>"),
    ],
)
def test_tsv_bad_row_is_named(tmp_path, change, message):
    write_tsv(tmp_path, [CHOICE, CHOICE | {"index": 5} | change])
    (found,) = errors("mmbench", tmp_path)
    assert re.search(rf"MMBench_DEV_EN\.tsv: {message}", found)


# ---- records in one array ------------------------------------------------------------------------


def test_packed_records_are_as_they_were():
    records = [{"a": [1, (2, 3)], "b": "é" * 50}, None, [], PARTS[0].tolist()]
    together = Packed([pickle.dumps(record) for record in records])
    assert list(together) == list(pickle.loads(pickle.dumps(together))) == records
    assert len(together) == 4 and len(Packed([])) == 0
    for index in (-1, 4):
        with pytest.raises(IndexError):
            together[index]
