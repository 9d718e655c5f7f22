"""Made files against hand-made downloads: every quirk of the formats, and the same bytes each time.

pytest tests/test_convert.py
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from xsam.datasets import build as convert
from xsam.datasets.formats import decode_mask, encode_mask
from xsam.datasets.registry import read_dataset
from xsam.datasets.sources import PROMPT_TYPES

SAMPLES = Path(__file__).parents[2] / "shared/samples/coco"
needs_samples = pytest.mark.skipif(not SAMPLES.exists(), reason="no COCO samples beside the tree")


def rectangle(top: int, left: int, height: int, width: int, size=(60, 80)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def ring(left: int, top: int, width: int, height: int) -> list[int]:
    right, bottom = left + width, top + height
    return [left, top, right, top, right, bottom, left, bottom]


def write(path: Path, content: dict | np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        path.write_text(json.dumps(content))
    else:
        Image.fromarray(content).save(path)
    return path


def read(path: Path):
    return json.loads(path.read_text())


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- visual prompts ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_prompts_of_a_large_object_lie_on_and_around_it(seed):
    mask = rectangle(100, 200, 120, 80, size=(480, 640))
    raw = convert.visual_prompts(mask, np.random.default_rng(seed), is_dilated=False)
    grown = convert.visual_prompts(mask, np.random.default_rng(seed))
    assert tuple(raw) == tuple(grown) == PROMPT_TYPES
    assert all(p.any() and p.dtype == bool and p.shape == mask.shape for p in raw.values())
    assert raw["point"].sum() == 1 and mask[raw["point"]].all()
    assert raw["scribble"].sum() < 2 * (120 + 80)  # a line
    assert mask[raw["scribble"]].mean() > 0.6
    assert 0.9**2 - 0.03 < raw["box"].sum() / mask.sum() < 1.1**2 + 0.03
    for kind in ("box", "mask"):
        assert (raw[kind] & mask).sum() / (raw[kind] | mask).sum() > 0.75
        np.testing.assert_array_equal(raw[kind], grown[kind])
    for kind, radius in (("point", 10), ("scribble", 5)):
        away = np.argwhere(grown[kind])[:, None] - np.argwhere(raw[kind])[None]
        assert np.hypot(*away.T).min(axis=0).max() == radius
        assert (raw[kind] <= grown[kind]).all()


def drawn(mask: np.ndarray, kind: str, count: int) -> list[np.ndarray]:
    """Where the prompts of many seeds lie, (row, column) [P, 2] each."""
    rngs = map(np.random.default_rng, range(count))
    return [np.argwhere(convert.visual_prompts(mask, rng, False)[kind]) for rng in rngs]


@pytest.mark.parametrize("stretch", [1, 2])
def test_a_point_lies_half_a_radius_from_the_middle_on_average(stretch):
    rows, columns = np.mgrid[:60, :120]
    away = np.stack([rows - 30, (columns - 50) / stretch])
    points = np.concatenate(drawn(np.hypot(*away) <= 20, "point", 200))
    away = (points - (30, 50)) / (1, stretch)
    assert 0.45 < np.hypot(*away.T).mean() / 20 < 0.55 and np.hypot(*away.T).max() > 17
    assert np.abs(away.mean(axis=0)).max() < 2


def test_a_scribble_spans_a_half_to_six_fifths_of_the_box_and_swings_by_10_to_20_pixels():
    mask = rectangle(40, 40, 90, 120, size=(180, 200))
    middle, length = np.array([84.5, 99.5]), np.hypot(89, 119)
    spans, swings = [], []
    for line in drawn(mask, "scribble", 100):
        diagonals = [np.array([89, 119 * way]) / length for way in (1, -1)]
        along = max(diagonals, key=lambda diagonal: np.ptp((line - middle) @ diagonal))
        spans.append(np.ptp((line - middle) @ along) / length)
        swings.append(np.abs((line - middle) @ (along[::-1] * (1, -1))).max())
    assert 0.48 < min(spans) < 0.55 and 1.15 < max(spans) < 1.22
    assert 9 < min(swings) < 11 and 19 < max(swings) < 21


@pytest.mark.parametrize("place", [(100, 200), (0, 0), (455, 610)])
def test_a_mask_prompt_is_the_blurred_mask_cut_at_its_mean_over_the_image(place):
    mask = rectangle(*place, 25, 30, size=(480, 640))
    blurred = ndimage.gaussian_filter(mask.astype(float), 2)
    prompt = convert.visual_prompts(mask, np.random.default_rng(0))["mask"]
    np.testing.assert_array_equal(prompt, blurred > blurred.mean())
    assert mask.sum() * 1.2 < prompt.sum() < mask.sum() * 2.5


@pytest.mark.parametrize("size", [(1, 6), (2, 3), (6, 6), (20, 9)])
def test_prompts_of_a_small_object_are_near_it(size):
    """Also where it lies in a corner of a small image."""
    for top, left in ((0, 0), (60, 50), (128 - size[0], 128 - size[1])):
        mask = rectangle(top, left, *size, size=(128, 128))
        for seed in range(20):
            prompts = convert.visual_prompts(mask, np.random.default_rng(seed), is_dilated=False)
            assert all((prompt & mask).any() for prompt in prompts.values())
            for kind, reach in {"scribble": max(size) / 2, "box": 1, "mask": 8}.items():
                rows, columns = np.nonzero(prompts[kind] & ~mask)
                away = np.maximum(top - rows, rows - top - size[0] + 1)
                away = np.maximum(away, np.maximum(left - columns, columns - left - size[1] + 1))
                assert away.max(initial=0) <= reach, kind


def test_prompts_unite_components_and_leave_out_specks():
    objects = [rectangle(2, 3, 12, 10), rectangle(40, 50, 12, 25)]
    speck = rectangle(30, 5, 1, 5)
    mask = objects[0] | objects[1] | speck
    prompts = convert.visual_prompts(mask, np.random.default_rng(0), is_dilated=False)
    assert prompts["point"].sum() == 2
    for prompt in prompts.values():
        assert all((prompt & each).any() for each in objects) and not (prompt & speck).any()
    diagonal = np.eye(60, 80, dtype=bool)  # one component, for corners touch
    assert convert.visual_prompts(diagonal, np.random.default_rng(0), False)["point"].sum() == 1
    for nothing in (speck, np.zeros_like(speck)):
        prompts = convert.visual_prompts(nothing, np.random.default_rng(0))
        assert not any(prompt.any() for prompt in prompts.values())


@pytest.mark.parametrize(
    "mask", [np.ones((60, 80), bool), rectangle(0, 79, 60, 1), rectangle(59, 0, 1, 6)]
)
def test_prompts_at_the_border_stay_in_the_image(mask):
    for seed in range(5):
        prompts = convert.visual_prompts(mask, np.random.default_rng(seed))
        assert all(prompt.shape == mask.shape for prompt in prompts.values())
        assert all(prompt.any() for prompt in prompts.values())
        assert not mask.all() or prompts["mask"].all()  # each pixel of its blur is the mean


# ---- COCO-VGD ------------------------------------------------------------------------------------


def annotation(number: int, image_id: int | str, category: int, shape, **others) -> dict:
    box = dict(bbox=[1, 2, 3, 4], area=5.5, iscrowd=0)
    return (
        dict(id=number, image_id=image_id, category_id=category, segmentation=shape) | box | others
    )


@pytest.fixture
def instances(tmp_path) -> Path:
    """Two images to keep, ids out of order; one with nothing but crowd, one with nothing."""
    runs = [5, 20, 60 * 80 - 25]
    images = [
        dict(id=number, file_name=f"{number:012d}.jpg", height=60, width=80, license=3)
        for number in (9, 7, 8, 5)
    ]
    annotations = [
        annotation(31, 9, 90, [ring(10, 10, 20, 30), [1, 2, 3, 4], ring(50, 10, 9, 9)]),
        annotation(32, 9, 90, encode_mask(rectangle(5, 60, 20, 10))),
        annotation(33, 9, 1, [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]]),
        annotation(34, 7, 1, dict(counts=runs, size=[60, 80]), keep_me="kept"),
        annotation(35, 7, 1, [ring(3, 3, 2, 2)]),
        annotation(36, 7, 1, dict(counts=runs, size=[60, 80]), iscrowd=1),
        annotation(37, 8, 1, dict(counts=runs, size=[60, 80]), iscrowd=1),
    ]
    categories = [dict(id=number, name=str(number)) for number in (1, 90)]
    content = dict(images=images, annotations=annotations, categories=categories)
    return write(tmp_path / "instances.json", content)


def test_vgd_is_the_published_shape(instances, tmp_path, capsys):
    counts = convert.build_vgd(instances, tmp_path / "new" / "vgd.json", num_workers=1)
    assert counts == dict(images=2, annotations=4, crowd=2, bad_rings=3, invalid=1, empty_images=2)
    assert "2 crowd" in capsys.readouterr().out
    records = read(tmp_path / "new" / "vgd.json")
    assert [record["image_id"] for record in records] == [7, 9]
    first, second = records
    info = dict(id=7, file_name="000000000007.jpg", height=60, width=80)
    assert first["image_info"] == info and first["image_size"] == [60, 80]
    assert first["image_file"] == "000000000007.jpg"
    rle, tiny = first["annotations"]
    assert rle["keep_me"] == "kept" and rle["bbox"] == [1, 2, 3, 4] and rle["bbox_mode"] == 1
    assert isinstance(rle["segmentation"]["counts"], list)
    both = second["annotations"]
    assert [(each["id"], each["category_id"]) for each in both] == [(31, 90), (32, 90)]
    assert both[0]["segmentation"] == [ring(10, 10, 20, 30), ring(50, 10, 9, 9)]
    for each in (rle, tiny, *both):
        prompts = each["visual_prompts"]
        assert list(prompts) == [f"{kind}_visual_prompt" for kind in PROMPT_TYPES]
        assert all(isinstance(prompt["counts"], str) for prompt in prompts.values())
        drawn = [decode_mask(prompt, (60, 80), "prompt", True).any() for prompt in prompts.values()]
        assert drawn == [each is not tiny] * 4  # four pixels are too few


def test_vgd_is_the_same_for_any_workers_and_run(instances, tmp_path):
    for name, options in {"a": dict(num_workers=1), "b": dict(num_workers=2), "c": {}}.items():
        convert.build_vgd(instances, tmp_path / name, **options)
    convert.build_vgd(instances, tmp_path / "other", seed=1, num_workers=0)
    made = [(tmp_path / name).read_bytes() for name in ("a", "b", "c", "other")]
    assert made[0] == made[1] == made[2] != made[3]
    # An annotation's prompts do not depend on its neighbours.
    content = read(instances)
    content["annotations"] = [a for a in content["annotations"] if a["id"] == 32]
    convert.build_vgd(write(tmp_path / "less.json", content), tmp_path / "d", num_workers=1)
    assert read(tmp_path / "d")[0]["annotations"][0] == json.loads(made[0])[1]["annotations"][1]


def test_vgd_of_string_ids_and_of_nothing(instances, tmp_path):
    content = read(instances)
    for each in content["images"]:
        each["id"] = f"ADE_{each['id']}"
    for each in content["annotations"]:
        each["image_id"] = f"ADE_{each['image_id']}"
    convert.build_vgd(write(tmp_path / "ade.json", content), tmp_path / "a", num_workers=1)
    assert [record["image_id"] for record in read(tmp_path / "a")] == ["ADE_7", "ADE_9"]
    content["annotations"] = []
    counts = convert.build_vgd(write(tmp_path / "no.json", content), tmp_path / "b", num_workers=1)
    assert read(tmp_path / "b") == [] and counts["empty_images"] == 4


PUBLISHED = """[{"image_file": "000000000139.jpg", "image_id": 139, "image_size": [60, 80],
"image_info": {"id": 139, "file_name": "000000000139.jpg", "height": 60, "width": 80},
"annotations": [{"segmentation": [[10, 10, 40, 10, 40, 30, 10, 30]], "area": 600.0, "iscrowd": 0,
"image_id": 139, "bbox": [10.0, 10.0, 30.0, 20.0], "category_id": 90, "id": 31, "bbox_mode": 1,
"visual_prompts": %s}]}]"""


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_published_file_is_read_as_it_is_and_ours_has_its_layout(tmp_path, split):
    """Points and scribbles are grown already; a scribble without a pixel is not asked with."""
    grown = rectangle(12, 15, 9, 9)
    prompts = {"point": grown, "scribble": grown & False, "box": rectangle(9, 9, 22, 32)}
    prompts["mask"] = rectangle(8, 8, 24, 34)
    rles = {f"{kind}_visual_prompt": encode_mask(mask) for kind, mask in prompts.items()}
    folder = tmp_path / "img_vgdseg/coco_vgd"
    published = folder / f"annotations/img_vgdseg_coco_{split}.json"
    write(folder / f"coco2017/{split}2017/000000000139.jpg", np.zeros((60, 80, 3), np.uint8))
    (record,) = json.loads(PUBLISHED % json.dumps(rles))
    plain = dict(record["annotations"][0])
    del plain["bbox_mode"], plain["visual_prompts"]
    coco = dict(images=[record["image_info"]], annotations=[plain])
    coco["categories"] = [dict(id=90, name="toothbrush", supercategory="indoor")]
    instances = write(folder / f"annotations/instances_{split}2017.json", coco)
    published.write_text(PUBLISHED % json.dumps(rles))
    names = ["coco_vgd"] if split == "train" else [f"coco_vgd_val_{kind}" for kind in PROMPT_TYPES]
    for name in names:
        dataset = read_dataset(name, tmp_path)
        assert dataset.problems == [] and len(dataset) == (name != "coco_vgd_val_scribble")
        for seed in range(len(dataset) * 20):
            sample = dataset.sample(0, np.random.default_rng(seed))
            known = [
                prompts[kind] for kind in ("point", "box", "mask") if name.endswith(("vgd", kind))
            ]
            assert any((sample.regions[0] == prompt).all() for prompt in known)
            assert sample.names == ["toothbrush"] and sample.category_ids == [90]
            np.testing.assert_array_equal(sample.masks, rectangle(10, 10, 20, 30)[None])
    convert.build_vgd(instances, tmp_path / "ours.json", num_workers=1)
    (ours,) = read(tmp_path / "ours.json")
    for each in (record, ours):
        shown = each["annotations"][0].pop("visual_prompts")
        assert list(shown) == list(rles)
        assert all(p["size"] == [60, 80] and isinstance(p["counts"], str) for p in shown.values())
    assert ours == record and list(ours) == list(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_id=1), r"annotations\[0\].*image 1 "),
        (dict(category_id=4), r"annotations\[0\].*category 4"),
        (dict(segmentation=dict(counts=[7], size=[60, 80])), r"annotations\[0\].*do not add up"),
        (dict(segmentation=dict(counts="@", size=[60, 80])), r"annotations\[0\].*RLE"),
        (dict(segmentation="none"), r"annotations\[0\].*segmentation"),
        (dict(bbox=None), r"annotations\[0\].*bbox"),
    ],
)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_vgd_names_the_file_and_the_record_that_is_wrong(
    instances, tmp_path, change, message, num_workers
):
    content = read(instances)
    content["annotations"][0].update(change)
    path, out = write(tmp_path / "wrong.json", content), tmp_path / "out.json"
    with pytest.raises(ValueError, match=rf"wrong\.json: {message}"):
        convert.build_vgd(path, out, num_workers=num_workers)
    assert not list(tmp_path.glob("out.json*"))  # nor a half


def test_nothing_is_overwritten(instances, tmp_path):
    with pytest.raises(FileExistsError, match=r"instances\.json exists already: delete it"):
        convert.build_vgd(instances, instances)
    (tmp_path / "vgd.json.partial").write_text("what a killed run has left")
    convert.build_vgd(instances, tmp_path / "vgd.json", num_workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["instances.json", "vgd.json"]


@needs_samples
def test_vgd_of_coco(tmp_path):
    instances = SAMPLES / "panoptic_coco_detection_format.json"
    for name in "ab":
        convert.build_vgd(instances, tmp_path / name, num_workers=1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    records = read(tmp_path / "a")
    assert [record["image_id"] for record in records] == [142238, 439180]
    for record in records:
        for each in record["annotations"]:
            mask = decode_mask(each["segmentation"], record["image_size"], "mask")
            for prompt in each["visual_prompts"].values():
                drawn = decode_mask(prompt, record["image_size"], "prompt", True)
                assert drawn.any() == (mask & drawn).any()


# ---- COCO's semantic maps ------------------------------------------------------------------------


@pytest.fixture
def panoptic(tmp_path) -> Path:
    """Categories 1, 92 and 200; a segment id of three bytes, a crowd, a void; an empty image and
    one that has no annotation."""
    ids = np.zeros((4, 6), np.int32)
    ids[0], ids[1], ids[2, :3] = 70000, 3, 515
    colours = (ids[..., None] >> (0, 8, 16)) & 255
    write(tmp_path / "masks" / "b.png", colours.astype(np.uint8))
    write(tmp_path / "masks" / "a.png", np.zeros((5, 3, 3), np.uint8))
    segments = [
        dict(id=number, category_id=category, area=1, bbox=[0, 0, 1, 1], iscrowd=crowd)
        for number, category, crowd in ((70000, 200, 0), (3, 1, 0), (515, 92, 1))
    ]
    images = [
        dict(id=number, file_name=f"{name}.jpg", height=height, width=width)
        for number, name, height, width in ((2, "b", 4, 6), (1, "a", 5, 3), (3, "c", 5, 3))
    ]
    annotations = [
        dict(image_id=2, file_name="b.png", segments_info=segments),
        dict(image_id=1, file_name="a.png", segments_info=[]),
    ]
    categories = [dict(id=number, name=str(number)) for number in (200, 1, 92)]
    content = dict(images=images, annotations=annotations, categories=categories)
    return write(tmp_path / "panoptic.json", content)


def test_semantic_maps_hold_the_ranks_of_categories(panoptic, tmp_path):
    masks = tmp_path / "masks"
    counts = convert.build_coco_semantic(panoptic, masks, tmp_path / "one", num_workers=1)
    convert.build_coco_semantic(panoptic, masks, tmp_path / "two", num_workers=2)
    assert counts == dict(images=2, segments=3, images_without_annotation=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(contents(tmp_path / "one")) == ["a.png", "b.png"]
    image = Image.open(tmp_path / "one" / "b.png")
    assert image.mode == "L"
    expected = [[2] * 6, [0] * 6, [1, 1, 1, 255, 255, 255], [255] * 6]
    np.testing.assert_array_equal(np.asarray(image), expected)
    assert (np.asarray(Image.open(tmp_path / "one" / "a.png")) == 255).all()


def test_semantic_maps_are_named_as_the_annotations_name_their_pngs(panoptic, tmp_path):
    content, masks = read(panoptic), tmp_path / "masks"
    (masks / "left").mkdir()
    for record in content["annotations"]:
        image = next(i for i in content["images"] if i["id"] == record["image_id"])
        old = masks / Path(image["file_name"]).with_suffix(".png").name
        record["file_name"] = f"left\\{old.stem}_gt.png"
        if old.exists():
            old.rename(masks / "left" / f"{old.stem}_gt.png")
    counts = convert.build_coco_semantic(write(panoptic, content), masks, tmp_path / "out", 1)
    made = sorted(path.name for path in (tmp_path / "out/left").iterdir())
    assert len(made) == counts["images"] and all(name.endswith("_gt.png") for name in made)
    for name in ("../b.png", "..\\b.png", "/tmp/b.png"):
        content["annotations"][0]["file_name"] = name
        with pytest.raises(ValueError, match=r"'file_name' .*b\.png' leads out of"):
            convert.build_coco_semantic(write(panoptic, content), masks, tmp_path / "no", 1)
    assert not (tmp_path / "no").exists()


def test_semantic_names_what_is_wrong(panoptic, tmp_path):
    content = read(panoptic)
    changed = {
        r"wrong\.json: annotations\[0\]: category 5": ("category_id", 5),
        r"b\.png: segment 70000 is not in": ("id", 4),
    }
    for message, (key, value) in changed.items():
        wrong = copy.deepcopy(content)
        wrong["annotations"][0]["segments_info"][0][key] = value
        path = write(tmp_path / "wrong.json", wrong)
        with pytest.raises(ValueError, match=message):
            convert.build_coco_semantic(path, tmp_path / "masks", tmp_path / "out", 1)
    content["images"][0]["height"] = 5
    path = write(tmp_path / "wrong.json", content)
    with pytest.raises(ValueError, match=r"b\.png: is 4x6 .*, not 5x6 as"):
        convert.build_coco_semantic(path, tmp_path / "masks", tmp_path / "out", 1)
    assert not list(tmp_path.glob("out*"))


# ---- ADE20K --------------------------------------------------------------------------------------

NAMES = ("wall", "road, route", "windowpane, window ", "bed ", "field")


@pytest.fixture
def ade(tmp_path) -> Path:
    """Five classes, 3 and 4 of them things; wall is partly covered by things and field wholly."""
    folder = tmp_path / "ade"
    rows = [f"{number} \t0.1\t5\t2\t{name}" for number, name in enumerate(NAMES, 1)]
    write(folder / "images" / "validation" / "ADE_val_2.jpg", np.zeros((6, 8, 3), np.uint8))
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    mapping = ["Instacne100\tSceneParse150\tFullADE20K", "1\t\t3\t\t774", "1\t\t3\t\t783"]
    (folder / "ade20k_instance_catid_mapping.txt").write_text("\n".join([*mapping, "2\t4\t9", ""]))
    classes = np.zeros((6, 8), np.uint8)
    classes[:3], classes[3, :2], classes[4] = 1, 5, 3
    write(folder / "annotations" / "validation" / "ADE_val_2.png", classes)
    objects = np.zeros((6, 8, 3), np.uint8)
    objects[2, :4] = 1, 1, 0
    objects[3, :3] = 1, 2, 0
    objects[5, 5:] = 2, 3, 0
    objects[0, 0] = 2, 0, 0  # a class without a number is void
    write(folder / "annotations_instance" / "validation" / "ADE_val_2.png", objects)
    return folder


def test_ade20k_semantic_panoptic_and_instances(ade):
    counts = convert.convert_ade20k(ade, ["validation"], num_workers=1)
    assert counts == dict(validation=dict(images=1, segments=5, instances=3))
    semantic = np.asarray(Image.open(ade / "annotations_detectron2/validation/ADE_val_2.png"))
    assert semantic[0, 0] == 0 and semantic[3, 0] == 4 and semantic[5, 0] == 255

    panoptic = read(ade / "ade20k_panoptic_val.json")
    image = dict(id="ADE_val_2", file_name="ADE_val_2.jpg", width=8, height=6)
    assert panoptic["images"] == [image]
    categories = panoptic["categories"]
    assert [(each["id"], each["name"]) for each in categories] == list(enumerate(NAMES))
    assert [each["isthing"] for each in categories] == [0, 0, 1, 1, 0]
    assert len({tuple(each["color"]) for each in categories}) == 5
    (record,) = panoptic["annotations"]
    assert (record["image_id"], record["file_name"]) == ("ADE_val_2", "ADE_val_2.png")
    segments = [
        (each["category_id"], each["area"], each["bbox"], each["iscrowd"])
        for each in record["segments_info"]
    ]
    things = [
        (2, 4, [0, 2, 4, 1], 0),
        (2, 3, [0, 3, 3, 1], 0),
        (3, 3, [5, 5, 3, 1], 0),
    ]
    assert segments == [(0, 24, [0, 0, 8, 3], 0), (4, 2, [0, 3, 2, 1], 0), *things]
    colours = np.asarray(Image.open(ade / "ade20k_panoptic_val" / record["file_name"]))
    ids = colours.astype(int) @ (1, 256, 65536)
    left = [int((ids == each["id"]).sum()) for each in record["segments_info"]]
    assert left == [20, 0, 4, 3, 3]  # wall without the window's pixels, no field
    assert ids[4, 0] == 0  # a thing of the class map that is no object

    instances = read(ade / "ade20k_instance_val.json")
    assert instances["images"] == [image]
    assert instances["categories"] == [dict(id=2, name=NAMES[2]), dict(id=3, name=NAMES[3])]
    found = instances["annotations"]
    assert [each["id"] for each in found] == [1, 2, 3]
    assert [(a["category_id"], a["area"], a["bbox"], a["iscrowd"]) for a in found] == things
    for each, segment in zip(found, record["segments_info"][2:], strict=True):
        assert each["image_id"] == "ADE_val_2" and isinstance(each["segmentation"]["counts"], str)
        mask = decode_mask(each["segmentation"], (6, 8), "mask")
        np.testing.assert_array_equal(mask, ids == segment["id"])


@pytest.mark.parametrize("aliases", [False, True])
def test_ade20k_classes_have_the_names_of_the_public_file_or_all_aliases(ade, aliases):
    """Facts of the published panoptic file, as DATA-FORMATS and Mask2Former have them."""
    rows = [f"{number}\t0.1\t5\t2\t{number} thing, alias" for number in range(1, 151)]
    (ade / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    options = ["--splits", "validation", "--workers", "1", *["--aliases"] * aliases]
    parser = argparse.ArgumentParser()
    convert.add_commands(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["ade20k", "--folder", str(ade), *options])
    assert parsed.run(parsed) == 0
    categories = read(ade / "ade20k_panoptic_val.json")["categories"]
    names = [each["name"] for each in categories]
    assert len(set(names)) == 150 and [each["id"] for each in categories] == list(range(150))
    if aliases:
        assert names == [f"{number} thing, alias" for number in range(1, 151)]
        return
    assert names[:7] == ["wall", "building", "sky", "floor", "tree", "ceiling", "road, route"]
    known = {8: "window", 12: "person", 58: "screen door, screen", 63: "blind, screen", 89: "tv"}
    known |= {94: "land, ground, soil", 109: "pool", 130: "screen", 141: "crt screen", 149: "flag"}
    assert {number: names[number] for number in known} == known
    instances = read(ade / "ade20k_instance_val.json")["categories"]
    assert instances == [dict(id=2, name="sky"), dict(id=3, name="floor")]  # of the fixture


def test_ade20k_reads_no_file_that_a_system_left_beside_the_images(ade):
    (ade / "images/validation/._ADE_val_2.jpg").write_bytes(b"\0\5\26\7")
    counts = convert.convert_ade20k(ade, ["validation"], num_workers=1)
    assert counts["validation"]["images"] == 1


def test_ade20k_is_the_same_for_any_workers(ade, tmp_path):
    for folder, of in (("images", "jpg"), ("annotations", "png"), ("annotations_instance", "png")):
        file = ade / folder / "validation" / f"ADE_val_2.{of}"
        file.with_stem("ADE_val_1").write_bytes(file.read_bytes())
        (ade / folder / "training").symlink_to(file.parent)
    other = tmp_path / "other"
    other.mkdir()
    for path in ade.iterdir():
        (other / path.name).symlink_to(path)
    convert.convert_ade20k(other, num_workers=2)
    convert.convert_ade20k(ade, num_workers=1)
    made = [
        f"ade20k_{kind}_{split}.json"
        for kind in ("panoptic", "instance")
        for split in ("train", "val")
    ]
    assert all((ade / name).read_bytes() == (other / name).read_bytes() for name in made)
    for name in ("annotations_detectron2", "ade20k_panoptic_val", "ade20k_panoptic_train"):
        assert contents(ade / name) == contents(other / name)
    panoptic, instances = read(ade / made[1]), read(ade / made[3])
    assert [image["id"] for image in panoptic["images"]] == ["ADE_val_1", "ADE_val_2"]
    assert [each["id"] for each in instances["annotations"]] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(FileExistsError, match="exists already"):
        convert.convert_ade20k(ade, ["validation"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "annotations_instance",
            r"annotations_instance/validation.*archive of its own.*instance\.tar",
        ),
        ("annotations", r"annotations/validation.*ADEChallengeData2016\.zip"),
        ("ade20k_instance_catid_mapping.txt", "catid_mapping.*Mask2Former"),
    ],
)
def test_ade20k_says_what_to_download(ade, name, message):
    (ade / name).rename(ade / "elsewhere")
    with pytest.raises(FileNotFoundError, match=message):
        convert.convert_ade20k(ade, ["validation"])


def test_ade20k_names_what_is_wrong(ade):
    def fails(message: str, splits=("validation",)):
        with pytest.raises(ValueError, match=message):
            convert.convert_ade20k(ade, splits, num_workers=1)
        assert not [path for path in ade.iterdir() if path.name.startswith("ade20k_panoptic")]

    fails("unknown split 'val'.* training, validation", splits=["val"])
    objects = ade / "annotations_instance" / "validation" / "ADE_val_2.png"
    write(objects, np.full((6, 8, 3), 7, np.uint8))
    fails(r"ADE_val_2\.png: instance class 7 is not in ade20k_instance_catid_mapping")
    write(objects, np.zeros((5, 8, 3), np.uint8))
    fails(r"annotations_instance/validation/ADE_val_2\.png: is 5x8")
    write(ade / "annotations" / "validation" / "ADE_val_2.png", np.full((6, 8), 6, np.uint8))
    fails(r"ADE_val_2\.png: class 6, objectInfo150\.txt has 5")
    mapping = ade / "ade20k_instance_catid_mapping.txt"
    mapping.write_text("header\n1\t3\t1\n1\t4\t1\n")
    fails("mapping.txt: line 3: instance class 1 has two")
    mapping.write_text("header\n1\t6\t1\n")
    fails(r"mapping\.txt: line 2 is '1\\t6\\t1'")
    (ade / "objectInfo150.txt").write_text("Idx\tName\n2\twall\n")
    fails(r"objectInfo150\.txt: its first column")


# ---- commands ------------------------------------------------------------------------------------


def test_commands(instances, panoptic, ade, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    convert.add_commands(parser.add_subparsers(required=True))

    def run(*words) -> int:
        options = parser.parse_args([str(word) for word in words])
        return options.run(options)

    out = tmp_path / "vgd.json"
    assert run("vgd", "--instances", instances, "--out", out, "--seed", 3, "--workers", 1) == 0
    convert.build_vgd(instances, tmp_path / "same.json", seed=3, num_workers=1)
    assert out.read_bytes() == (tmp_path / "same.json").read_bytes()
    maps = "--panoptic", panoptic, "--masks", tmp_path / "masks", "--out", tmp_path / "maps"
    assert run("coco-semantic", *maps, "--workers", 1) == 0
    assert run("ade20k", "--folder", ade, "--splits", "validation", "--workers", 1) == 0
    assert (tmp_path / "maps" / "b.png").exists() and (ade / "ade20k_panoptic_val.json").exists()
    with pytest.raises(FileNotFoundError, match="images/training"):
        run("ade20k", "--folder", ade)
    with pytest.raises(SystemExit):
        parser.parse_args(["vgd", "--help"])
    assert "example: python -m xsam.data vgd" in capsys.readouterr().out
