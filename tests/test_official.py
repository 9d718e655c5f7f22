"""What is promised of the official files: no sentence, question or object of a validation or test
split is trained with, and the known faults of these files are left out and counted.

pytest tests/test_official.py
"""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xsam.config import xsam
from xsam.data import Sample
from xsam.datasets.build import convert_ade20k
from xsam.datasets.formats import encode_mask
from xsam.datasets.registry import open_dataset, read_dataset
from xsam.datasets.sources import PROMPT_TYPES, SOURCES, locate
from xsam.toy.preset import toy

REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "real"
REFS, LISA = "img_refseg/refcocos", "img_reaseg/lisa"
REFER_SPLITS = {
    "refcoco": ("refs(unc).p", ["train", "val", "testA", "testB"]),
    "refcoco+": ("refs(unc).p", ["train", "val", "testA", "testB"]),
    "refcocog": ("refs(umd).p", ["train", "val", "test"]),
    "grefcoco": ("grefs(unc).json", ["train", "val", "testA", "testB"]),
}


def is_scored(name: str) -> bool:
    source = SOURCES[name]
    return source.split not in ("", "train") or source.format in ("tsv", "gcg_scored")


TRAINED = sorted({name for stage in xsam().stages.values() for name in stage.datasets})
SCORED = [name for name in SOURCES if is_scored(name)]


def samples_of(name: str, root: Path) -> Iterator[Sample]:
    dataset = open_dataset(name, root)
    for index in range(len(dataset)):
        yield dataset.sample(index, np.random.default_rng(index))


def facts_of(sample: Sample) -> set[tuple]:
    """What a sample gives away of its record: the pixels of its image, with each of its phrases,
    questions and masks."""
    pixels = sample.image.tobytes()
    words = [name for name in sample.names if sample.task in ("refer", "reason")]
    words += [str(question) for question, _ in sample.turns if sample.task == "chat"]
    return {(pixels, word) for word in words} | {(pixels, mask.tobytes()) for mask in sample.masks}


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_pickle = path.suffix == ".p"
    path.write_bytes(pickle.dumps(content, 2) if is_pickle else json.dumps(content).encode())


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), (number, 2 * number, 255 - number)).save(path)


def ring(number: int) -> list[int]:
    left, top = number % 20, number % 13
    return [left, top, left + 6, top, left + 6, top + 5, left, top + 5]


# ---- which sets are trained with -----------------------------------------------------------------


def test_no_stage_of_any_preset_trains_with_a_scored_set():
    for config in (xsam(), toy()):
        for stage in config.stages.values():
            assert not [name for name in stage.datasets if is_scored(name)]
    by_choice = {"grefcoco", "coco_interactive", "llava_instruct_text"}
    by_choice |= {"coco_instance", "coco_semantic"}
    assert set(SCORED) | set(TRAINED) | by_choice == set(SOURCES)


def test_a_set_that_is_trained_with_shares_no_file_of_its_own_with_a_scored_one():
    """But for the files that hold several splits, whose records say which is theirs."""
    shared = {"refs", "panoptic", "instance", "semantic"}
    for name in TRAINED:
        for other in SCORED:
            one, two = SOURCES[name], SOURCES[other]
            if one.annotations == two.annotations:
                assert one.format in shared and one.split != two.split


def test_the_toy_world_trains_with_nothing_of_what_it_scores(world):
    scored = set()
    for name in SCORED:
        for sample in samples_of(name, world / "data"):
            scored |= facts_of(sample)
    assert len(scored) > 100
    for name in TRAINED:
        for sample in samples_of(name, world / "data"):
            assert not facts_of(sample) & scored, (name, sample.sample_id)


# ---- the public layouts --------------------------------------------------------------------------


def write_refs(root: Path, folder: str) -> None:
    """An image for each split, and one with a ref of every split, as RefCOCOg's google file has."""
    file, splits = REFER_SPLITS[folder]
    refs, annotations = [], []
    for place, split in enumerate([*splits, *splits]):
        image = 1 + place if place < len(splits) else 9
        number = 10 + place
        annotations.append(dict(id=number, image_id=image, category_id=1, iscrowd=0))
        annotations[-1]["segmentation"] = [ring(3 * place)]
        ann_id = [number] if folder == "grefcoco" else number
        ref = dict(ref_id=place, image_id=image, ann_id=ann_id, split=split)
        sentences = [dict(sent_id=0, sent=f"{split} thing {place}")]
        refs.append(ref | dict(sentences=sentences))
        refs.append(ref | dict(ref_id=50 + place, sentences=[]))  # gRefCOCO's fault
    numbers = sorted({ref["image_id"] for ref in refs})
    images = [dict(id=n, file_name=f"{n}.jpg", height=24, width=32) for n in numbers]
    for number in numbers:
        picture(root / REFS / f"images/train2014/{number}.jpg", number)
    content = dict(images=images, annotations=annotations, categories=[dict(id=1, name="x")])
    write(root / REFS / folder / "instances.json", content)
    write(root / REFS / folder / file, refs)


@pytest.mark.parametrize("folder", REFER_SPLITS)
def test_refs_train_with_no_sentence_or_object_of_another_split(tmp_path, folder):
    write_refs(tmp_path, folder)
    facts = {}
    for split in REFER_SPLITS[folder][1]:
        name = folder if split == "train" else f"{folder}_{split}"
        samples = list(samples_of(name, tmp_path))
        words = [word for sample in samples for word in sample.names]
        assert len(words) == 2 and all(word.startswith(f"{split} thing".lower()) for word in words)
        facts[split] = set().union(*map(facts_of, samples))
    for split in facts.keys() - {"train"}:
        assert not facts["train"] & facts[split]


@pytest.mark.parametrize("folder", REFER_SPLITS)
def test_refs_without_a_sentence_are_left_out_and_counted_also_in_evaluation(tmp_path, folder):
    write_refs(tmp_path, folder)
    for split in REFER_SPLITS[folder][1]:
        dataset = open_dataset(folder if split == "train" else f"{folder}_{split}", tmp_path)
        assert +dataset.skipped == {"refs without a sentence": 2} and not dataset.problems


# ---- GranD-f, COCO-VGD, ADE20K -------------------------------------------------------------------

GCG, VGD, COCO = "img_gcgseg/grand_f", "img_vgdseg/coco_vgd", "img_genseg/coco2017"


def drawn(number: int) -> np.ndarray:
    mask = np.zeros((24, 32), bool)
    mask[number : number + 5, number : number + 7] = True
    return mask


def write_gcg(root: Path, train: str) -> None:
    """Three splits whose images have the same names, in folders of their own where they have one:
    validation and test share theirs."""
    image = dict(height=24, width=32, image_id="sa_1")
    spans = dict(token_positives=[0, 5], rle_masks=[encode_mask(drawn(1))])
    record = image | dict(file_name="sa_1.jpg", caption="train it", groundings={"train": spans})
    write(root / GCG / f"annotations/train/{train}", [record])
    folder = "GranDf_HA_images/train" if "HA" in train else "coco2017"
    picture(root / GCG / f"images/{folder}/sa_1.jpg", 10)
    for number, split in enumerate(("val", "test"), 2):
        stem = "sa_1" if split == "val" else "sa_2"
        about = dict(id=1, image_id=stem)
        mask = about | dict(category_id=1, iscrowd=0, segmentation=encode_mask(drawn(number)))
        caption = about | dict(caption=f"the caption of {split}", labels=[split])
        for kind, each in (("mask", mask), ("caption", caption)):
            content = dict(images=[dict(id=stem, height=24, width=32)], annotations=[each])
            path = root / GCG / f"annotations/val_test/{split}_gcg_coco_{kind}_gt.json"
            write(path, content | dict(categories=[dict(id=1, name="object")]))
        picture(root / GCG / f"images/GranDf_HA_images/val_test/{stem}.jpg", 10 * number)


@pytest.mark.parametrize(
    ("name", "file"),
    [("gcg_grandf", "GranDf_HA_GCG_train.json"), ("gcg_psg", "OpenPsgGCG_train.json")],
)
def test_gcg_trains_with_no_caption_or_mask_of_what_is_scored(tmp_path, name, file):
    write_gcg(tmp_path, file)
    facts = {}
    for each in (name, "gcg_val", "gcg_test"):
        (sample,) = samples_of(each, tmp_path)
        facts[each] = facts_of(sample)
        split = "train" if each == name else each.removeprefix("gcg_")
        assert sample.names == [split] and split in sample.turns[0][1]
    assert not facts[name] & (facts["gcg_val"] | facts["gcg_test"])


def write_vgd(root: Path) -> None:
    """Both splits have images 1 and 2, of the same names, and objects of the same ids."""
    for place, split in enumerate(("train", "val")):
        content = []
        for number in (1, 2):
            mask = encode_mask(drawn(number + 4 * place))
            prompts = {f"{kind}_visual_prompt": mask for kind in PROMPT_TYPES}
            known = dict(id=number, image_id=number, category_id=1, iscrowd=0, bbox_mode=1)
            known |= dict(segmentation=mask, visual_prompts=prompts)
            about = dict(id=number, file_name=f"{number}.jpg", height=24, width=32)
            record = dict(image_file=f"{number}.jpg", image_id=number, image_info=about)
            content.append(record | dict(image_size=[24, 32], annotations=[known]))
            picture(root / COCO / f"{split}2017/{number}.jpg", 20 * number + 5 * place)
        write(root / VGD / f"annotations/img_vgdseg_coco_{split}.json", content)
        categories = dict(categories=[dict(id=1, name="cup")])
        write(root / VGD / f"annotations/instances_{split}2017.json", categories)


def test_vgd_trains_with_no_object_or_prompt_of_what_is_scored(tmp_path):
    """Nor does a reference image come from the other split."""
    write_vgd(tmp_path)
    facts, regions = {}, {}
    names = ["coco_vgd", *(name for name in SCORED if name.startswith("coco_vgd_val"))]
    for name in names:
        samples = list(samples_of(name, tmp_path))
        assert len(samples) == 2
        facts[name] = set().union(*map(facts_of, samples))
        shown = [image for sample in samples for image in sample.region_images or [sample.image]]
        regions[name] = {image.tobytes() for image in shown}
    for name in names[1:]:
        assert not facts["coco_vgd"] & facts[name] and not regions["coco_vgd"] & regions[name]
        assert regions[name] == regions["coco_vgd_val_point"]


def test_the_splits_of_ade20k_are_made_and_read_apart(tmp_path):
    """The downloads of both splits, whose images have the same name."""
    folder = tmp_path / SOURCES["ade20k_panoptic_val"].annotations
    folder = folder.parent
    folder.mkdir(parents=True)
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.1\twall\n2\t0.1\tbed\n")
    (folder / "ade20k_instance_catid_mapping.txt").write_text("Instance\tScene\n1\t2\n")
    for place, split in enumerate(("training", "validation")):
        picture(folder / f"images/{split}/ADE_1.jpg", 30 + 40 * place)
        classes, objects = np.ones((24, 32), np.uint8), np.zeros((24, 32, 3), np.uint8)
        classes[drawn(2 + 9 * place)] = 2
        objects[drawn(2 + 9 * place)] = 1, 1, 0
        for kind, pixels in (("annotations", classes), ("annotations_instance", objects)):
            (folder / kind / split).mkdir(parents=True)
            Image.fromarray(pixels).save(folder / f"{kind}/{split}/ADE_1.png")
    convert_ade20k(folder, num_workers=1)
    images = f"{folder}/images/training"
    trained = set()
    for own in (
        f"{folder}/ade20k_panoptic_train.json:{images}:{folder}/ade20k_panoptic_train",
        f"{folder}/ade20k_instance_train.json:{images}",
    ):
        trained = trained.union(*map(facts_of, samples_of(own, tmp_path)))
    assert len(trained) == 2  # the wall and the bed
    for kind in ("panoptic", "instance", "semantic"):
        (sample,) = samples_of(f"ade20k_{kind}_val", tmp_path)
        assert facts_of(sample) and not facts_of(sample) & trained
        assert any((mask == drawn(11)).all() for mask in sample.masks)


@pytest.mark.skipif(not REAL.is_dir(), reason="the photographs are not on this machine")
def test_real_photographs_train_with_nothing_of_what_is_scored(tmp_path):
    root = shutil.copytree(REAL, tmp_path / "real", copy_function=shutil.copyfile)
    for path in [path for path in root.rglob("*") if path.is_file()]:
        if path.stat().st_size < 200 and path.read_bytes().startswith(b"../"):
            path.unlink()  # a link that a copy has lost
    verify = [sys.executable, root / "verify.py", "--links"]
    subprocess.run(verify, check=True, capture_output=True)
    paths = {name: [locate(root, path) for path in SOURCES[name].paths()] for name in SOURCES}
    there = [name for name in SOURCES if all(path.exists() for path in paths[name])]
    facts = {name: set() for name in there}
    for name in there:
        dataset = read_dataset(name, root)
        for index in range(len(dataset)):
            facts[name] |= facts_of(dataset.sample(index, np.random.default_rng(index)))
    scored = set().union(*(facts[name] for name in there if name in SCORED))
    trained = set().union(*(facts[name] for name in there if name not in SCORED))
    assert len(there) > 20 and len(scored) > 500 and len(trained) > 300
    assert not scored & trained


def write_reason(
    folder: Path, stem: str, text: str, number: int, shape: dict, suffix=".jpg"
) -> None:
    picture(folder / f"{stem}{suffix}", number)
    shapes = [dict(label="target") | shape]
    record = dict(text=[text], is_sentence=True, shapes=shapes)
    (folder / f"{stem}.json").write_bytes(json.dumps(record, ensure_ascii=False).encode("cp1252"))


POLYGON = dict(points=[[2, 2], [12, 2], [12, 12], [2, 12]])


def test_reasonseg_reads_each_split_from_its_own_folder_whatever_else_lies_there(tmp_path):
    for number, split in enumerate(("train", "val", "test"), 1):
        folder = tmp_path / LISA / split
        folder.mkdir(parents=True)
        write_reason(folder, "a", f"where is the café of {split}?", number, POLYGON)
        write_reason(folder, "b", f"second of {split}", 20 + number, POLYGON, ".PNG")
        picture(folder / "alone.jpg", 9)
        (folder / "._a.json").write_bytes(b"\0\5\26\7")
        (folder / "._a.jpg").write_bytes(b"\0\5\26\7")
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (folder / "Thumbs.db").write_bytes(b"\xd0\xcf")
        (folder / "classes.json").write_text('["cup"]')
        (folder / "val_list.json").write_text('{"files": ["a", "b"]}')
    write(tmp_path / LISA / "explanatory/train.json", [dict(image="a.jpg", outputs="So.")])
    facts = {}
    for split in ("train", "val", "test"):
        name = "reasonseg" if split == "train" else f"reasonseg_{split}"
        dataset, samples = open_dataset(name, tmp_path), list(samples_of(name, tmp_path))
        assert [sample.names for sample in samples] == [
            [f"where is the café of {split}?"],
            [f"second of {split}"],
        ]
        counted = {"JSON files of something else": 2, "images without an annotation": 1}
        assert +dataset.skipped == counted and not dataset.problems
        facts[split] = set().union(*map(facts_of, samples))
    assert not facts["train"] & (facts["val"] | facts["test"])


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        (POLYGON, 121),
        (POLYGON | dict(shape_type="polygon"), 121),
        (POLYGON | dict(shape_type=None), 121),
        (dict(shape_type="rectangle", points=[[2, 2], [12, 12]]), 121),
        (dict(shape_type="rectangle", points=[[12, 2], [2, 12]]), 121),
        (POLYGON | dict(shape_type="rectangle"), 121),  # labelme 6 has its four corners
        (dict(shape_type="circle", points=[[14, 11], [14, 19]]), np.pi * 8.5**2),
    ],
)
def test_labelme_shapes_with_an_area_are_painted(tmp_path, shape, area):
    folder = tmp_path / LISA / "val"
    folder.mkdir(parents=True)
    write_reason(folder, "a", "what?", 1, shape)
    (sample,) = samples_of("reasonseg_val", tmp_path)
    assert sample.masks.sum() == pytest.approx(area, rel=0.08)


@pytest.mark.parametrize("kind", ["line", "linestrip", "point", "mask", "points", "circle"])
def test_labelme_shapes_without_an_outline_are_told_by_their_kind(tmp_path, kind):
    folder = tmp_path / LISA / "val"
    folder.mkdir(parents=True)
    points = [[2, 2], [9, 9], [9, 2]] if kind == "circle" else [[2, 2], [9, 9]]
    write_reason(folder, "a", "what?", 1, dict(shape_type=kind, points=points))
    with pytest.raises(ValueError, match=rf"a\.json: shape 0: is a {kind} of . points; draw it"):
        open_dataset("reasonseg_val", tmp_path)


@pytest.mark.parametrize("is_upright", [True, False])
def test_labelme_says_of_which_size_its_image_is(tmp_path, is_upright):
    folder = tmp_path / LISA / "val"
    folder.mkdir(parents=True)
    write_reason(folder, "a", "what?", 1, POLYGON)
    tag = Image.Exif()
    tag[274] = 6
    Image.new("RGB", (32, 24)).save(folder / "a.jpg", exif=tag)  # 24 wide where it is shown
    record = json.loads((folder / "a.json").read_text())
    height, width = (32, 24) if is_upright else (24, 32)
    write(folder / "a.json", record | dict(imageHeight=height, imageWidth=str(width)))
    (sample,) = samples_of("reasonseg_val", tmp_path)
    assert sample.image.size == (width, height) and sample.masks.sum() == 121
    write(folder / "a.json", record | dict(imageHeight=48, imageWidth=64))
    with pytest.raises(ValueError, match=r"a\.jpg: is 32x24 .* 24x32 as stored, not 48x64"):
        list(samples_of("reasonseg_val", tmp_path))


def test_labelme_says_which_image_it_is_about(tmp_path):
    folder = tmp_path / LISA / "val"
    folder.mkdir(parents=True)
    write_reason(folder, "a", "what?", 1, POLYGON)
    picture(folder / "photo one.png", 77)
    for path, shade in (
        ("photo one.png", 77),
        ("..\\val\\photo one.png", 77),
        ("x" * 5000, 1),
        ("gone.jpg", 1),
    ):
        record = json.loads((folder / "a.json").read_text()) | dict(imagePath=path)
        write(folder / "a.json", record)
        (sample,) = samples_of("reasonseg_val", tmp_path)
        assert abs(sample.image.getpixel((0, 0))[0] - shade) < 4
    (folder / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"a\.json: its image gone\.jpg is not beside it"):
        open_dataset("reasonseg_val", tmp_path)


# ---- LLaVA ---------------------------------------------------------------------------------------

CHAT = "img_chat/llava/LLaVA-Instruct-150K/llava_v1_5_mix665k.json"
SEVERAL, SILENT = "records of several images", "conversations without an answer"


def turns(*texts: str) -> list[dict]:
    speakers = ("human", "gpt") * len(texts)
    return [{"from": who, "value": text} for who, text in zip(speakers, texts, strict=False)]


@pytest.mark.parametrize(
    ("record", "outcome"),
    [
        (dict(image="a.jpg", conversations=turns("<image>\nWhat?", "A.")), "read"),
        (dict(image=["a.jpg"], conversations=turns("<image>What?", "A.")), "read"),
        (dict(images=["a.jpg"], conversations=turns("What?", "A.")), "read"),
        (dict(image="A.jpg", conversations=turns("What?<image>", "A.", "And?", "B.")), "read"),
        (dict(image="a.jpg", conversations=turns("<image> and <image>?", "A.")), SEVERAL),
        (dict(image="a.jpg", conversations=turns("<image>?", "A.", "<image>?", "B.")), SEVERAL),
        (dict(images=["a.jpg", "a.jpg"], conversations=turns("What?", "A.")), SEVERAL),
        (dict(image=["a.jpg", "b.jpg"], conversations=turns("What?", "A.")), SEVERAL),
        (dict(conversations=turns("<image><image>?", "A.")), SEVERAL),
        (dict(model="", conversations=turns("Hello.", "Hello.")), "text without an image"),
        (dict(image="", conversations=turns("Hello.", "Hello.")), "text without an image"),
        (dict(image="a.jpg", conversations=[]), SILENT),
        (dict(image="a.jpg", conversations=turns("<image>?", " ")), SILENT),
        (dict(image="a.jpg", conversations=turns("?", "A.", "And?", "")), SILENT),
    ],
)
def test_llava_records_are_read_or_counted_as_what_they_are(tmp_path, record, outcome):
    for name in ("a.jpg", "A.jpg", "b.jpg", "sound.jpg"):
        picture(tmp_path / "img_chat/llava/llava_images" / name, 5)
    sound = dict(id=0, image="sound.jpg", conversations=turns("<image>", "Fine."))
    write(tmp_path / CHAT, [sound, dict(id="x") | record])
    dataset = open_dataset("llava_instruct", tmp_path)
    assert +dataset.skipped == ({} if outcome == "read" else {outcome: 1})
    assert len(dataset) == (2 if outcome == "read" else 1)
    for sample in samples_of("llava_instruct", tmp_path):
        assert not any("<image>" in text for turn in sample.turns for text in turn)


def test_a_set_of_records_of_several_images_says_so(tmp_path):
    (tmp_path / "img_chat/llava/llava_images").mkdir(parents=True)
    write(tmp_path / CHAT, [dict(images=["a", "b"], conversations=turns("?", "A."))] * 3)
    with pytest.raises(ValueError, match=f"no sample of llava_instruct in it, 3 {SEVERAL}"):
        open_dataset("llava_instruct", tmp_path)


# ---- panoptic PNGs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "named", "lies"),
    [
        ("1.jpg", "1.png", "1.png"),
        ("a_leftImg8bit.png", "a_gtFine_panoptic.png", "a_gtFine_panoptic.png"),
        ("left/1.jpg", "left_1.png", "left_1.png"),
        ("left/1.jpg", "left\\1.png", "left/1.png"),
        ("left/1.jpg", "seg/left/1.png", "left/1.png"),
        ("left/1.jpg", None, "left/1.png"),
        ("photo.v2.jpg", None, "photo.v2.png"),
        ("1.jpg", "1.PNG", "1.png"),
    ],
)
def test_panoptic_annotations_name_their_pngs(tmp_path, image, named, lies):
    picture(tmp_path / "img" / image, 3)
    for name, number in ((lies, 5), ("1.png", 5), ("decoy/1.png", 9)):
        path = tmp_path / "seg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((24, 32, 3), np.uint8)
        pixels[..., 0] = number
        if not path.exists():
            Image.fromarray(pixels).save(path)
    annotation = dict(image_id=1, segments_info=[dict(id=5, category_id=1, iscrowd=0)])
    annotation |= dict(file_name=named) if named else {}
    images = [dict(id=1, file_name=image, height=24, width=32)]
    categories = [dict(id=1, name="road", isthing=0)]
    content = dict(images=images, annotations=[annotation], categories=categories)
    write(tmp_path / "scenes.json", content)
    (sample,) = samples_of("scenes.json:img:seg", tmp_path)
    assert sample.masks.all() and len(sample.masks) == 1
