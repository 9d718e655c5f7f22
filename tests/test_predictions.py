"""Predictions on disk: what was written comes back, whenever the writing was killed, and whatever
is wrong with a file is told.

pytest tests/test_predictions.py
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import killed_at

from xsam.datasets.base import Dataset
from xsam.datasets.formats import encode_mask
from xsam.datasets.registry import open_dataset
from xsam.evaluation import metrics
from xsam.evaluation.benchmarks import score_dataset
from xsam.evaluation.prediction_files import (
    ABOUT_FILE,
    CAPTIONS_FILE,
    PNG_FOLDER,
    PREDICTIONS_FILE,
    UNFINISHED,
    SavedPredictions,
    Writer,
    begin,
    complete,
    finished_records,
    is_complete,
    keys_of,
    kind_of,
)
from xsam.results import SegmentationResult

ONE_OF_EACH = {
    "panoptic": "coco_panoptic_val",
    "instances": "coco_instance_val",
    "semantic": "coco_semantic_val",
    "mask": "refcoco_val",
    "grounded": "gcg_val",
    "answer": "pope",
}
MADE_BY = {"weights": "0123", "settings": "4567"}
Say = Callable[[Dataset, int], SegmentationResult]


def perfect(dataset: Dataset, index: int) -> SegmentationResult:
    """The ground truth, as a model would say it."""
    sample, answer = dataset.inputs(index), "Sure, <SEG>."
    places, labels = sample.labels.tolist(), [sample.names[label] for label in sample.labels]
    if kind_of(dataset) == "answer":
        answer = dataset.records[index]["answer"]
    if kind_of(dataset) == "grounded":
        places, (answer,) = list(range(len(places))), dataset.captions(index)
        for name in dict.fromkeys(labels):
            answer = answer.replace(name, f"<p>{name}</p>", 1)
        answer += " <SEG>"
    return SegmentationResult(
        sample.image, sample.masks, places, labels, [1.0] * len(places), answer
    )


def write_rest(folder: Path, dataset: Dataset, say: Say, count: int | None) -> None:
    """Asks for what the folder does not have yet, as one process does."""
    kind, keys = kind_of(dataset), keys_of(dataset, count)
    begin(folder, kind, keys, MADE_BY)
    if is_complete(folder):
        return
    finished = finished_records(folder)
    with Writer(folder, kind, 0) as writer:
        for index, key in enumerate(keys):
            if key not in finished:
                writer.write([key], [dataset.inputs(index)], [say(dataset, index)])
    complete(folder, kind, keys)


def write_predictions(
    folder: Path, dataset: Dataset, say: Say = perfect, count: int | None = None
) -> None:
    """What `say` gives for the (first) records of a set."""
    assert not folder.exists()
    write_rest(folder, dataset, say, count)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def edit(path: Path, change: Callable) -> None:
    """Changes the content of a JSON file, or what `change` gives takes its place."""
    content = json.loads(path.read_text())
    other = change(content)
    path.write_text(json.dumps(content if other is None else other))


def score(folder: Path, dataset: Dataset, count: int | None = None) -> dict:
    return score_dataset(SavedPredictions(folder, dataset, count))


@pytest.fixture
def sets(world) -> Callable[[str], Dataset]:
    return lambda name: open_dataset(name, world / "data", all_classes=True)


@pytest.fixture(autouse=True)
def without_java(monkeypatch):
    """Captions are scored elsewhere."""
    nothing = {"METEOR": None, "CIDEr": None}
    monkeypatch.setattr(metrics, "caption_quality", lambda *_: nothing)


# ---- what was written comes back -----------------------------------------------------------------

PICTURED = [*ONE_OF_EACH.values(), "ade20k_panoptic_val", "ade20k_instance_val", "grefcoco_val"]
PICTURED += ["reasonseg_val", "coco_interactive_val_box", "coco_vgd_val_mask"]
PICTURED += ["coco_vgd_val_point_cross"]


def spoken(dataset: Dataset, index: int) -> SegmentationResult:
    """Something that a model could say, unlike the truth; of some records nothing."""
    rng, sample, kind = np.random.default_rng(index), dataset.inputs(index), kind_of(dataset)
    size = sample.image.height, sample.image.width
    names = ["a cup", "a red ring on it", "a cup"] if kind == "grounded" else sample.names
    owner = rng.integers(-1, max(len(names), 2), size).repeat(2, axis=1)[:, : size[1]]
    places = [place for place in range(len(names)) if rng.random() < 0.7 and index % 3 != 1]
    if kind == "mask":
        places = places[:1]
    masks = owner == np.array(places, np.int64)[:, None, None]
    if kind in ("instances", "grounded"):
        masks |= rng.random(masks.shape) < 0.2  # they may overlap
    scores = rng.random(len(places)).tolist()
    answer = "Yes, so it is.\n" if kind == "answer" else "Sure: <SEG> of <p>it</p>."
    labels = [names[place] for place in places]
    return SegmentationResult(sample.image, masks, places, labels, scores, answer)


@pytest.mark.parametrize("name", PICTURED)
def test_a_prediction_comes_back_for_its_picture(sets, tmp_path, name):
    dataset = sets(name)
    write_predictions(tmp_path / name, dataset, spoken)
    said, has_masks = SavedPredictions(tmp_path / name, dataset), []
    for index in range(len(dataset)):
        sample, told = dataset.inputs(index), spoken(dataset, index)
        back = said.prediction(index, sample)
        assert back.image.size == told.image.size and back.masks.dtype == bool
        assert np.array_equal(back.masks, told.masks) and back.labels == told.labels
        is_scored = said.kind not in ("panoptic", "semantic")  # COCO's formats have no score there
        assert back.scores == (told.scores if is_scored or not told.scores else None)
        back.draw()
        assert len(back.categories) == len(back.masks)
        kept = {"mask": told.answer, "answer": told.answer, "grounded": "Sure: of it."}
        assert back.answer == kept.get(said.kind, "")
        has_masks.append(len(back.masks) > 0)
    assert set(has_masks) == ({False} if said.kind == "answer" else {True, False})


def test_several_masks_of_an_expression_are_one(sets, tmp_path):
    def in_parts(dataset: Dataset, index: int) -> SegmentationResult:
        told = perfect(dataset, index)
        is_left = np.arange(told.image.width) < told.image.width / 2
        masks = np.concatenate([told.masks & is_left, told.masks & ~is_left])
        labels, places = told.labels * 2, told.categories * 2
        return dataclasses.replace(
            told, masks=masks, labels=labels, categories=places, scores=[0.25, 0.75]
        )

    dataset = sets("refcoco_val")
    write_predictions(tmp_path / "said", dataset, in_parts)
    said = SavedPredictions(tmp_path / "said", dataset)
    for index in range(len(dataset)):
        back = said.prediction(index, dataset.inputs(index))
        assert np.array_equal(back.masks, perfect(dataset, index).masks) and back.scores == [0.75]


def test_instances_are_in_the_format_that_pycocotools_reads(sets, world, tmp_path):
    """It has the same figures from the files alone."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def moved(dataset: Dataset, index: int) -> SegmentationResult:
        told, rng = perfect(dataset, index), np.random.default_rng(index)
        masks = np.stack([np.roll(mask, rng.integers(5), axis=1) for mask in told.masks])
        return dataclasses.replace(told, masks=masks, scores=rng.random(len(masks)).tolist())

    dataset = sets("coco_instance_val")
    write_predictions(tmp_path / "said", dataset, moved)
    truth = COCO(str(dataset.annotations))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "said" / PREDICTIONS_FILE)), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    figures = score(tmp_path / "said", dataset)
    theirs = {"AP": 100 * evaluation.stats[0], "AP50": 100 * evaluation.stats[1]}
    assert figures == pytest.approx(theirs, abs=1e-6) and 5 < figures["AP"] < 95


def test_predictions_of_another_program_need_no_more_than_cocos_formats(sets, tmp_path):
    """Polygons and RLEs of uncompressed runs, any names of PNGs, any colours, no about.json."""
    dataset = sets("coco_panoptic_val")
    write_predictions(tmp_path / "panoptic", dataset)

    def rename(content: dict) -> None:
        for entry in content["annotations"]:
            old = tmp_path / "panoptic" / PNG_FOLDER / entry["file_name"]
            entry["file_name"] = f"of {entry['image_id']}.png"
            colours = np.asarray(Image.open(old))
            Image.fromarray(colours[..., ::-1]).save(old.with_name(entry["file_name"]))
            for segment in entry["segments_info"]:
                segment["id"] <<= 16  # red was the lowest
            old.unlink()

    edit(tmp_path / "panoptic" / PREDICTIONS_FILE, rename)
    (tmp_path / "panoptic" / ABOUT_FILE).unlink()
    assert score(tmp_path / "panoptic", dataset)["PQ"] == 100

    dataset = sets("refcoco_val")
    sizes = {key: dataset.inputs(index).image.size for index, key in enumerate(keys_of(dataset))}
    content = [
        {"id": key, "image_id": 1, "segmentation": [[0, 0, width, 0, width, height, 0, height]]}
        for key, (width, height) in sizes.items()
    ]
    for entry, (width, height) in zip(content[:4], sizes.values(), strict=False):
        entry["segmentation"] = {"size": [height, width], "counts": [0, width * height]}
    (tmp_path / "mask").mkdir()
    (tmp_path / "mask" / PREDICTIONS_FILE).write_text(json.dumps(content))
    shares = [dataset.inputs(index).masks[0].mean() for index in range(len(dataset))]
    assert score(tmp_path / "mask", dataset)["gIoU"] == pytest.approx(100 * np.mean(shares))


# ---- what a kill leaves --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["panoptic", "grounded"])
def test_killed_at_any_operation_the_same_command_goes_on(sets, tmp_path, kind):
    """With the same files at the end, and nothing asked again that was finished."""
    dataset = sets(ONE_OF_EACH[kind])
    write_predictions(tmp_path / "whole", dataset)
    whole, num_asked = contents(tmp_path / "whole"), []
    for operation in range(1000):
        folder = tmp_path / f"killed{operation}"
        if not killed_at(
            operation, lambda folder=folder: write_rest(folder, dataset, perfect, None)
        ):
            break
        finished, was_complete = finished_records(folder), (folder / PREDICTIONS_FILE).exists()
        asked = []

        def watched(dataset: Dataset, index: int, asked: list = asked) -> SegmentationResult:
            asked.append(dataset.key(index))
            return perfect(dataset, index)

        write_rest(folder, dataset, watched, None)
        assert contents(folder) == whole, operation
        rest = [] if was_complete else [key for key in keys_of(dataset) if key not in finished]
        assert asked == rest, operation
        num_asked.append(len(asked))
    else:
        raise AssertionError("writing does not end")
    assert num_asked == sorted(num_asked, reverse=True)
    assert num_asked[0] == len(dataset) and num_asked[-1] == 0
    assert contents(folder) == whole  # of the one that ran through


def test_a_line_cut_short_anywhere_is_forgotten(sets, tmp_path):
    dataset, folder = sets("gcg_val"), tmp_path / "said"
    keys = keys_of(dataset)
    begin(folder, "grounded", keys, MADE_BY)
    with Writer(folder, "grounded", 0) as writer:
        for index in (0, 1):
            writer.write([keys[index]], [dataset.inputs(index)], [perfect(dataset, index)])
    (path,) = (folder / UNFINISHED).iterdir()
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for length in range(start, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        assert list(finished_records(folder)) == keys[:1]
    path.write_bytes(whole[:-1])  # all of it but its end
    assert list(finished_records(folder)) == keys[:2]


def test_ranks_write_files_of_their_own_and_are_joined_in_the_sets_order(sets, tmp_path):
    dataset = sets("coco_instance_val")
    write_predictions(tmp_path / "one", dataset)
    keys, folder = keys_of(dataset), tmp_path / "three"
    begin(folder, "instances", keys, MADE_BY)
    for turn in range(2):  # twice, as runs that follow each other
        for rank in (2, 0, 1):
            with Writer(folder, "instances", rank) as writer:
                for index in range(len(keys))[rank::3][turn::2]:
                    sample, told = dataset.inputs(index), perfect(dataset, index)
                    writer.write([keys[index]], [sample], [told])
    assert len(list((folder / UNFINISHED).iterdir())) == 6
    complete(folder, "instances", keys)
    assert contents(folder) == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("keys", "made_by", "message"),
    [
        ([1, 2], MADE_BY | {"weights": "x"}, "made with other weights; give another --out, or"),
        ([1, 2], MADE_BY | {"settings": "x"}, "made with other settings"),
        ([1, 2], {"weights": "x", "settings": "x"}, "made with other weights, settings"),
        ([1], MADE_BY, "made with other records;"),
    ],
)
def test_predictions_that_were_made_in_another_way_are_not_gone_on_with(
    tmp_path, keys, made_by, message
):
    begin(tmp_path / "said", "answer", [1, 2], MADE_BY)
    begin(tmp_path / "said", "answer", [1, 2], MADE_BY)
    with pytest.raises(ValueError, match=f"said: holds predictions {message}"):
        begin(tmp_path / "said", "answer", keys, made_by)


def test_a_folder_of_other_things_is_let_be(tmp_path):
    (tmp_path / "said").mkdir()
    (tmp_path / "said" / PREDICTIONS_FILE).write_text("[]")
    with pytest.raises(ValueError, match=f"said: not empty, and no {ABOUT_FILE} in it"):
        begin(tmp_path / "said", "answer", [1], MADE_BY)
    assert contents(tmp_path / "said") == {PREDICTIONS_FILE: b"[]"}


# ---- what is wrong with a file -------------------------------------------------------------------


def at(*keys) -> Callable:
    """Puts the last of `keys` where the others lead in a file's content."""

    def change(content) -> None:
        *way, key, value = keys
        for each in way:
            content = content[each]
        content[key] = value

    return change


def without(*keys) -> Callable:
    def change(content) -> None:
        *way, key = keys
        for each in way:
            content = content[each]
        del content[key]

    return change


def again(*keys) -> Callable:
    """Adds the first entry of the list to which `keys` lead once more."""

    def change(content) -> None:
        for each in keys:
            content = content[each]
        content.append(content[0])

    return change


def resized(*keys) -> Callable:
    return at(*keys, "segmentation", encode_mask(np.ones((7, 5), bool)))


E0, P0 = "entry 0", ("annotations", 0)
SEGMENTS = (*P0, "segments_info")
BAD_ENTRIES = {
    "instances": [
        (at(0, "image_id", 999), f"{E0}: image_id 999 is not in coco_instance_val"),
        (at(0, "image_id", "157"), f"{E0}: image_id '157' is not in coco_instance_val"),
        (at(0, "image_id", 157.0), f"{E0}: 'image_id': expected int or str, got 157.0"),
        (without(0, "image_id"), f"{E0}: has no 'image_id'"),
        (at(0, "category_id", 0), f"{E0}: category 0 is not in the list of coco_instance_val"),
        (at(0, "category_id", "one"), f"{E0}: 'category_id': expected int"),
        (without(0, "category_id"), f"{E0}: has no 'category_id'"),
        (at(1, "score", "0.5"), "entry 1: 'score': expected float, got '0.5'"),
        (at(1, "score", float("nan")), "entry 1: 'score': expected float, got nan"),
        (at(1, "score", float("-inf")), "entry 1: 'score': expected float, got -inf"),
        (at(1, "score", True), "entry 1: 'score': expected float, got True"),
        (without(1, "score"), "entry 1: has no 'score'"),
        (resized(0), rf"{E0}: RLE of size \[7, 5\] in an image of"),
        (at(0, "segmentation", None), f"{E0}: 'segmentation': expected dict or list, got None"),
        (at(0, "segmentation", []), f"{E0}: no valid polygon or RLE"),
        (at(0, "segmentation", "counts", "0"), f"{E0}: its RLE does not fit"),
        (at(0, "segmentation", "counts", "é"), f"{E0}: its RLE is damaged"),
        (at(0, "mask"), f"{E0}: expected a dict, got 'mask'"),
        (lambda content: {"annotations": content}, "holds a dict, expected a list"),
    ],
    "panoptic": [
        (again("annotations"), "entry 6: image_id 157 is there more than once"),
        (at(*P0, "image_id", 1), f"{E0}: image_id 1 is not in coco_panoptic_val"),
        (without("annotations", 1), "1 of the 6 records .* no prediction, first 194; partial"),
        (without(*P0, "file_name"), f"{E0}: has no 'file_name'"),
        (at(*P0, "file_name", "none.png"), r"panoptic/none\.png: cannot be read"),
        (without(*P0, "segments_info"), f"{E0}: has no 'segments_info'"),
        (at(*SEGMENTS, 0, "category_id", 0), f"{E0}: category 0 is not in the list of"),
        (again(*SEGMENTS), f"{E0}: a segment id is there twice"),
        (at(*SEGMENTS, 0, "id", 0), f"{E0}: a segment id is no colour"),
        (at(*SEGMENTS, 0, "id", 2**24), f"{E0}: a segment id is no colour"),
        (at(*SEGMENTS, 0, "id", 99), r"000000000157\.png: segment 1 is not in .*entry 0"),
        (without(*SEGMENTS, 0), r"000000000157\.png: segment 1 is not in .*entry 0"),
        (
            lambda content: content["annotations"][0]["segments_info"].append(
                {
                    "id": 99,
                    "category_id": content["annotations"][0]["segments_info"][0]["category_id"],
                }
            ),
            rf"{E0}: segment 99 is not in .*000000000157\.png",
        ),
        (lambda content: content["annotations"], "holds a list, expected a dict"),
        (without("annotations"), "has no 'annotations'"),
    ],
    "semantic": [
        (at(0, "image_id", 1), f"{E0}: image_id 1 is not in coco_semantic_val"),
        (at(0, "category_id", 999), f"{E0}: category 999 is not in the list"),
        (again(), r"entry \d+: covers pixels that have another category already"),
        (resized(0), rf"{E0}: RLE of size \[7, 5\] in an image of"),
        (without(0, "segmentation"), f"{E0}: has no 'segmentation'"),
    ],
    "mask": [
        (again(), "entry 11: id '157/0' is there more than once"),
        (at(0, "id", "157/99"), f"{E0}: id '157/99' is not in refcoco_val"),
        (without(3), "1 of the 11 records of refcoco_val have no prediction, first"),
        (lambda content: [], "11 of the 11 records of refcoco_val have no prediction"),
        (without(0, "segmentation"), f"{E0}: has no 'segmentation'"),
        (at(0, "segmentation", 3), f"{E0}: 'segmentation': expected dict or list or NoneType"),
        (resized(0), rf"{E0}: RLE of size \[7, 5\] in an image of"),
    ],
    "answer": [
        (again(), "question_id '0' is there more than once"),
        (at(0, "question_id", "-1"), f"{E0}: question_id '-1' is not in pope"),
        (without(0), "1 of the 18 records of pope have no prediction, first '0'"),
        (at(0, "answer", None), f"{E0}: 'answer': expected str, got None"),
        (at(0, "answer", True), f"{E0}: 'answer': expected str, got True"),
    ],
    "grounded": [
        (at(0, "image_id", 157), f"{E0}: image_id 157 is not in gcg_val"),
        (at(0, "category_id", 2), f"{E0}: category 2 is not in the list of gcg_val"),
        (at(0, "score", None), f"{E0}: 'score': expected float, got None"),
        (resized(0), rf"{E0}: RLE of size \[7, 5\] in an image of"),
    ],
}
BAD_ENTRY_LIST = [(kind, *each) for kind, entries in BAD_ENTRIES.items() for each in entries]


@pytest.fixture(scope="module")
def written(world, tmp_path_factory) -> Path:
    """Perfect predictions of each kind, to be copied."""
    folder = tmp_path_factory.mktemp("written")
    for kind, name in ONE_OF_EACH.items():
        dataset = open_dataset(name, world / "data", all_classes=True)
        write_predictions(folder / kind, dataset)
    return folder


@pytest.fixture
def damaged(written, sets, tmp_path) -> Callable:
    """Copies perfect predictions, changes a file and gives the error of reading and scoring."""

    def damage(kind: str, change: Callable, file: str = PREDICTIONS_FILE) -> str:
        dataset, folder = sets(ONE_OF_EACH[kind]), tmp_path / kind
        shutil.copytree(written / kind, folder)
        if file.endswith(".json"):
            edit(folder / file, change)
        else:
            change(folder / file)
        with pytest.raises(ValueError) as error:
            score(folder, dataset)
        return str(error.value)

    return damage


@pytest.mark.parametrize(("kind", "change", "message"), BAD_ENTRY_LIST)
def test_what_is_wrong_with_an_entry_is_told(damaged, kind, change, message):
    said = damaged(kind, change)
    assert PREDICTIONS_FILE in said or PNG_FOLDER in said
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(0), "1 of the 3 records of gcg_val have no prediction, first 'sa_157'"),
        (again(), "entry 3: image_id 'sa_157' is there more than once"),
        (at(0, "image_id", "sa_1"), "entry 0: image_id 'sa_1' is not in gcg_val"),
        (at(0, "caption", None), "entry 0: 'caption': expected str, got None"),
        (lambda content: {"annotations": content}, "holds a dict, expected a list"),
    ],
)
def test_what_is_wrong_with_a_caption_is_told(damaged, change, message):
    said = damaged("grounded", change, CAPTIONS_FILE)
    assert f"grounded/{CAPTIONS_FILE}" in said and message in said, said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (again("keys"), "a record is there more than once"),
        (at("keys", 0, 1), "1 is not in coco_instance_val"),
        (at("keys", 0, None), "None is not in coco_instance_val"),
        (at("keys", 0, ["157"]), "['157'] is not in coco_instance_val"),
        (without("keys"), "has no 'keys'"),
        (lambda content: content["keys"], "holds a list, expected a dict"),
    ],
)
def test_what_is_wrong_with_the_list_of_what_was_asked_is_told(damaged, change, message):
    said = damaged("instances", change, ABOUT_FILE)
    assert f"instances/{ABOUT_FILE}: {message}" in said, said


@pytest.mark.parametrize("kind", ["panoptic", "instances", "mask", "answer", "grounded"])
def test_what_was_not_asked_is_missing(damaged, kind):
    """Whether or not it has predictions."""
    said = damaged(kind, without("keys", 1), ABOUT_FILE)
    assert "1 of the " in said and "partial predictions are not scored" in said


def test_an_image_in_which_nothing_was_found_is_not_one_that_was_not_asked(written, sets, tmp_path):
    """COCO's results have no entry for either; about.json tells them apart."""
    for kind in ("instances", "semantic", "grounded"):
        dataset, folder = sets(ONE_OF_EACH[kind]), tmp_path / kind
        shutil.copytree(written / kind, folder)
        first = keys_of(dataset)[0]
        edit(folder / PREDICTIONS_FILE, lambda entries, first=first: [
            each for each in entries if each["image_id"] != first
        ])  # fmt: skip
        assert all(x < 100 for x in score(folder, dataset).values() if x is not None)
        (folder / ABOUT_FILE).unlink()
        if kind == "grounded":  # the captions say it, too
            assert score(folder, dataset)["AP50"] < 100
            continue
        with pytest.raises(ValueError, match=rf"{PREDICTIONS_FILE}: 1 of the 6 .*first {first}"):
            score(folder, dataset)


def save_as(change: Callable[[Image.Image], Image.Image], format: str = "PNG") -> Callable:
    def rewrite(path: Path) -> None:
        change(Image.open(path).copy()).save(path, format)

    return rewrite


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (save_as(lambda image: image.resize((9, 8))), "is 8x9 .* as what goes with it says"),
        (
            save_as(lambda image: image.transpose(Image.Transpose.ROTATE_90)),
            "as what goes with it says",
        ),
        (save_as(lambda image: image, "JPEG"), "is a JPEG file, masks have to be PNG"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_panoptic_png_is_told(damaged, sets, change, message):
    dataset = sets("coco_panoptic_val")
    sizes = [dataset.inputs(index).image.size for index in range(len(dataset))]
    place = next(place for place, (width, height) in enumerate(sizes) if width != height)
    name = f"{PNG_FOLDER}/{keys_of(dataset)[place]:012d}.png"
    said = damaged("panoptic", change, name)
    assert name in said and re.search(message, said), said


@pytest.mark.parametrize("file", [PREDICTIONS_FILE, ABOUT_FILE, CAPTIONS_FILE])
def test_a_file_that_is_cut_or_absent_is_named(written, sets, tmp_path, file):
    dataset, folder = sets("gcg_val"), tmp_path / "said"
    shutil.copytree(written / "grounded", folder)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{file}: not valid JSON"):
        SavedPredictions(folder, dataset)
    (folder / file).unlink()
    if file == ABOUT_FILE:
        SavedPredictions(folder, dataset)
        return
    with pytest.raises(ValueError, match=rf"{file}: cannot be read"):
        SavedPredictions(folder, dataset)


def test_what_is_not_finished_is_not_scored(sets, tmp_path):
    dataset, folder = sets("pope"), tmp_path / "said"
    write_predictions(folder, dataset)
    (folder / PREDICTIONS_FILE).unlink()
    begin(folder, "answer", keys_of(dataset), MADE_BY)
    with pytest.raises(ValueError, match="said: not finished; the command that began it goes on"):
        SavedPredictions(folder, dataset)


def test_predictions_of_the_first_records_are_not_whole(sets, tmp_path):
    dataset, folder = sets("coco_panoptic_val"), tmp_path / "said"
    write_predictions(folder, dataset, count=4)
    assert score(folder, dataset, count=4)["PQ"] == 100
    with pytest.raises(ValueError, match="2 of the 6 records of coco_panoptic_val"):
        score(folder, dataset)
    assert score(folder, dataset, count=3)["PQ"] == 100
    with pytest.raises(ValueError, match="made with other records"):
        begin(folder, "panoptic", keys_of(dataset), MADE_BY)


def test_a_set_to_train_on_is_not_scored(sets):
    for name in ("llava_instruct", "gcg_psg"):
        with pytest.raises(ValueError, match=f"{name}: a set to train on"):
            kind_of(sets(name))
