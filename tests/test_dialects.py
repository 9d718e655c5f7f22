"""What exporters write in another way than COCO's own files, and what a data set of one's own gives
then: a table of exporter, habit and outcome.

pytest tests/test_dialects.py
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from xsam.datasets.registry import open_dataset

HEIGHT, WIDTH = 24, 32


def ring(left: int, top: int, width: int, height: int) -> list[int]:
    right, bottom = left + width, top + height
    return [left, top, right, top, right, bottom, left, bottom]


def rle(*box: int) -> dict:
    packed = coco_mask.frPyObjects([ring(*box)], HEIGHT, WIDTH)[0]
    return {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()}


def plain_rle(left: int, top: int, width: int, height: int) -> dict:
    mask = np.zeros((HEIGHT, WIDTH), int)
    mask[top : top + height, left : left + width] = 1
    edges = np.flatnonzero(np.diff(mask.T.ravel())) + 1
    counts = np.diff([0, *edges.tolist(), mask.size]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts}


BOXES = {1: (2, 3, 8, 9), 2: (12, 5, 6, 6), 3: (4, 4, 10, 7)}  # of each annotation
OF_IMAGE, OF_CATEGORY = {1: 1, 2: 1, 3: 2}, {1: 5, 2: 7, 3: 5}


def sound() -> dict:
    """Two images; a cat and a dog in the first, a cat in the second."""
    return {
        "images": [
            {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for number, name in ((1, "left/a.jpg"), (2, "b.jpg"))
        ],
        "categories": [{"id": 5, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            {"id": number, "image_id": OF_IMAGE[number], "category_id": OF_CATEGORY[number]}
            | {"segmentation": [ring(*box)], "iscrowd": 0, "area": 1.0, "bbox": list(box)}
            for number, box in BOXES.items()
        ],
    }


def every(key: str, spell: Callable, of: str = "annotations") -> Callable:
    """Spells `key` of every record in another way."""

    def change(content: dict) -> None:
        for record in content[of]:
            record[key] = spell(record[key])

    return change


def of(number: int, **fields) -> Callable:
    """Sets fields of an annotation."""
    return lambda content: content["annotations"][number - 1].update(fields)


def without(*keys: str, of: str = "annotations") -> Callable:
    def change(content: dict) -> None:
        for record in content[of]:
            for key in keys:
                del record[key]

    return change


def both(*changes: Callable) -> Callable:
    return lambda content: [change(content) for change in changes]


def group(content: dict) -> None:
    content["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})
    for category in content["categories"][1:]:
        category["supercategory"] = "pets"


def category(**fields) -> Callable:
    return lambda content: content["categories"].append(fields)


def pairs(rings: list) -> list:
    return [[each[at : at + 2] for at in range(0, len(each), 2)] for each in rings]


def points(rings: list) -> list:
    return [[{"x": x, "y": y} for x, y in ring] for ring in pairs(rings)]


def fractions(rings: list) -> list:
    return [[number / 40 for number in ring] for ring in rings]


SAME = {1: [1, 2], 2: [3]}  # the annotations of each image that are objects
CROWD = "crowd regions (iscrowd 1) without a label"
BOX = "objects without a mask (a box alone)"
COCO_FORMAT = "export it in the COCO format"
WINDOWS = {"left/a.jpg": "images\\left\\a.jpg", "b.jpg": "images\\b.jpg"}
UP = {"left/a.jpg": "..\\..\\media\\images\\left\\a.jpg", "b.jpg": "..\\..\\media\\images\\b.jpg"}
HERE = {"left/a.jpg": "/home/me/images/left/a.jpg", "b.jpg": "/home/me/images/b.jpg"}

SPLIT = {"left/a.jpg": "left/a.jpg", "b.jpg": "re\u0301sume\u0301.jpg"}
QUOTED = {"left/a.jpg": "left/a.jpg", "b.jpg": "r%C3%A9sum%C3%A9.jpg"}

# Exporter, habit, what is changed or the whole file, and what it gives: objects by image, with what
# is counted; or what is said when the set is opened.
HABITS: list[tuple] = [
    ("COCO", "nothing else", lambda _: None, SAME),
    (
        "COCO",
        "RLEs",
        both(of(1, segmentation=rle(*BOXES[1])), of(3, segmentation=plain_rle(*BOXES[3]))),
        SAME,
    ),
    ("COCO", "a list of RLEs", of(1, segmentation=[rle(*BOXES[1])]), SAME),
    (
        "COCO",
        "a bad ring first",
        of(1, segmentation=[[20, 3, 20, 9], ring(*BOXES[1])]),
        SAME,
        {"invalid rings": 1},
    ),
    ("COCO", "objects of no area", of(1, area=0, bbox=[0, 0, 0, 0]), SAME),
    (
        "COCO",
        "images without objects",
        lambda c: c["annotations"].pop(),
        {1: [1, 2]},
        {"images without instances": 1},
    ),
    (
        "CVAT",
        "brush masks are crowds",
        of(1, segmentation=plain_rle(*BOXES[1]), iscrowd=1),
        {1: [2], 2: [3]},
        {CROWD: 1},
    ),
    (
        "CVAT",
        "nothing but brush masks",
        every("iscrowd", lambda _: 1),
        rf"no sample of .*3 {re.escape(CROWD)}",
    ),
    ("CVAT", "attributes", of(1, attributes={"occluded": False, "rotation": 0.0}), SAME),
    (
        "pycococreator",
        "crowds that are objects",
        of(3, segmentation=plain_rle(*BOXES[3]), iscrowd=1),
        {1: [1, 2]},
        {CROWD: 1, "images without instances": 1},
    ),
    ("Roboflow", "the group as class 0", group, SAME),
    (
        "Roboflow",
        "nulls",
        both(lambda c: c.update(info=None, licenses=None), of(1, iscrowd=None, license=None)),
        SAME,
    ),
    ("Roboflow", "boxes alone", of(2, segmentation=[]), {1: [1], 2: [3]}, {BOX: 1}),
    (
        "Roboflow",
        "nothing but boxes",
        every("segmentation", lambda _: []),
        rf"no sample of .*3 {re.escape(BOX)}",
    ),
    (
        "Roboflow",
        "a name twice",
        category(id=9, name="Cat"),
        "category 9: its name 'cat' is another category's",
    ),
    ("VIA", "image ids as text", every("image_id", str), SAME),
    (
        "VIA",
        "every id as text",
        both(*(every(k, str) for k in ("id", "image_id", "category_id"))),
        SAME,
    ),
    ("VIA", "a polygon without its list", every("segmentation", lambda rings: rings[0]), SAME),
    (
        "VIA",
        "its own annotations",
        {"a.jpg123": {"filename": "a.jpg", "regions": []}},
        f"VGG.*{COCO_FORMAT}",
    ),
    (
        "VIA",
        "its own project",
        {"_via_settings": {}, "_via_img_metadata": {}},
        f"VGG.*{COCO_FORMAT}",
    ),
    (
        "labelme",
        "its own file",
        {"version": "5.4.1", "shapes": [], "imagePath": "a.jpg"},
        f"labelme.*{COCO_FORMAT}",
    ),
    ("labelme2coco", "no iscrowd, no area", without("iscrowd", "area", "bbox"), SAME),
    (
        "labelme2coco",
        "too few corners",
        of(2, segmentation=[[1, 1, 5, 5]]),
        {1: [1], 2: [3]},
        {"invalid rings": 1, BOX: 1},
    ),
    ("Label Studio", "paths of Windows", every("file_name", WINDOWS.get, of="images"), SAME),
    ("Label Studio", "paths that lead up", every("file_name", UP.get, of="images"), SAME),
    ("Label Studio", "paths of another machine", every("file_name", HERE.get, of="images"), SAME),
    (
        "Label Studio",
        "its own file",
        [{"id": 1, "data": {"image": "a.jpg"}, "annotations": []}],
        f"Label Studio.*{COCO_FORMAT}",
    ),
    (
        "COCO Annotator",
        "drawn boxes, paths, colours",
        both(
            of(1, isbbox=True, color="#fff"),
            lambda c: c["images"][0].update(path="/datasets/a.jpg", deleted=False),
        ),
        SAME,
    ),
    (
        "COCO Annotator",
        "an empty object",
        of(2, segmentation=[[]], area=0),
        {1: [1], 2: [3]},
        {"invalid rings": 1, BOX: 1},
    ),
    ("Labelbox", "corners in pairs", every("segmentation", pairs), SAME),
    ("Labelbox", "no segmentation", without("segmentation"), rf"no sample of .*3 {re.escape(BOX)}"),
    ("Labelbox", "a null", of(2, segmentation=None), {1: [1], 2: [3]}, {BOX: 1}),
    ("Labelbox", "its own file", [{"data_row": {"id": "x"}}], f"Labelbox.*{COCO_FORMAT}"),
    (
        "Supervisely",
        "a polygon of pairs",
        every("segmentation", lambda rings: pairs(rings)[0]),
        SAME,
    ),
    ("Supervisely", "its own file", {"size": {}, "objects": []}, f"Supervisely.*{COCO_FORMAT}"),
    ("V7", "corners as x and y", every("segmentation", points), SAME),
    ("geopandas", "a multipolygon", every("segmentation", lambda r: [[[pairs(r)[0]]]]), SAME),
    (
        "rasterio",
        "sizes as text",
        of(1, segmentation=[rle(*BOXES[1]) | {"size": ["24", "32"]}]),
        SAME,
    ),
    ("YOLO", "fractions", every("segmentation", fractions), "corners are fractions of the image"),
    ("pandas", "accents of macOS", every("file_name", SPLIT.get, of="images"), SAME),
    ("URLs", "names of the web", every("file_name", QUOTED.get, of="images"), SAME),
    ("Datumaro", "its own file", {"info": {}, "items": []}, f"Datumaro.*{COCO_FORMAT}"),
    (
        "pandas",
        "ids with a point",
        both(every("id", float), every("image_id", float), every("category_id", float)),
        SAME,
    ),
    ("pandas", "sizes with a point", every("height", float, of="images"), SAME),
    (
        "pandas",
        "corners as text",
        every("segmentation", lambda rings: [[*map(str, rings[0])]]),
        SAME,
    ),
    ("scripts", "sizes as text", every("width", str, of="images"), SAME),
    (
        "scripts",
        "no size",
        every("height", lambda _: None, of="images"),
        "image 1: 'height' is None",
    ),
    ("scripts", "a size of 0", every("width", lambda _: 0, of="images"), "image 1: 'width' is 0"),
    (
        "scripts",
        "capitals in a suffix",
        every("file_name", lambda n: n.replace("jpg", "JPG"), of="images"),
        SAME,
    ),
    (
        "scripts",
        "the folder in the name",
        every("file_name", "images/{}".format, of="images"),
        SAME,
    ),
    ("scripts", "images alone", {"images": sound()["images"]}, "has no 'annotations'"),
    (
        "scripts",
        "no annotation",
        lambda c: c["annotations"].clear(),
        "no sample of .*2 images without instances",
    ),
    (
        "scripts",
        "an object without id",
        lambda c: c["annotations"][1].pop("id"),
        r"annotations\[1\]: has no 'id'",
    ),
    (
        "scripts",
        "ids that begin again",
        every("id", lambda _: 1),
        "annotation 1: is there more than once",
    ),
    (
        "scripts",
        "an unknown image",
        of(2, image_id="9"),
        "annotation 2: image 9 is not in its images",
    ),
    (
        "scripts",
        "an image id of text",
        of(2, image_id="x9"),
        "annotation 2: image 'x9' is not in its images",
    ),
    ("scripts", "a file of lists of lists", [[1, 2]], "record 0: expected a dict"),
    (
        "scripts",
        "an RLE turned",
        of(1, segmentation={"size": [WIDTH, HEIGHT], "counts": [768]}),
        "in an image of",
    ),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("images/left/a.jpg", "images/b.jpg", "images/r\xe9sum\xe9.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (9 * len(name), 0, 0)).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("habit", HABITS, ids=[f"{row[0]}-{row[1]}" for row in HABITS])
def test_what_an_exporter_writes_is_read_as_meant_or_told_when_it_is_opened(folder, habit):
    _, _, change, outcome, *skipped = habit
    content = sound() if callable(change) else change
    if callable(change):
        change(content)
    (folder / "things.json").write_text(json.dumps(content))
    name = "things.json:images"
    if isinstance(outcome, str):
        with pytest.raises(ValueError, match=rf"things\.json: .*{outcome}"):
            dataset = open_dataset(name, folder)
            [dataset.read(index) for index in range(len(dataset))]
        return
    dataset = open_dataset(name, folder)
    assert dataset.names == ["cat", "dog"]
    assert +dataset.skipped == (skipped[0] if skipped else {})
    found = {}
    for index in range(len(dataset)):
        _, objects = dataset.read(index)
        found[dataset.key(index)] = [
            (kind, mask.tolist()) for kind, mask, is_crowd in objects if not is_crowd
        ]
    expected = {
        image: [
            ((5, 7).index(OF_CATEGORY[n]), coco_mask.decode(rle(*BOXES[n])).astype(bool).tolist())
            for n in numbers
        ]
        for image, numbers in outcome.items()
    }
    assert found == expected
