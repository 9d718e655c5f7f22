"""What leaves the library: answers as text, COCO JSON, supervision's detections.

pytest tests/test_results.py
"""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from xsam.prompts import find_phrases, read_answer
from xsam.results import SegmentationResult, coco_instances

HEIGHT, WIDTH = 40, 60


def result(masks: np.ndarray, labels: list[str], scores: list[float], **more) -> SegmentationResult:
    image = Image.new("RGB", (masks.shape[2], masks.shape[1]))
    return SegmentationResult(image, masks, [*range(len(labels))], labels, scores, "", **more)


def noise(count: int, seed: int = 0) -> np.ndarray:
    """Blobs with holes, specks and pixels that touch at corners."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((count, HEIGHT // 4, WIDTH // 4)) < 0.5
    return coarse.repeat(4, 1).repeat(4, 2) ^ (rng.random((count, HEIGHT, WIDTH)) < 0.02)


@pytest.mark.parametrize(
    ("answer", "text", "phrases"),
    [
        ("Sure, <SEG> .", "Sure.", []),
        ("Here it is: <SEG>.", "Here it is.", []),
        ("<p> a red ring </p> <SEG>, and <p>dots</p> <SEG>.", "a red ring, and dots.", None),
        ("no marks  at\nall", "no marks at all", []),
        ("<p>open and <p> closed </p>", "open and closed", ["closed"]),
        ("<p></p> <SEG> x", "x", [""]),
        ("", "", []),
        ("</p> odd <p>", "odd", []),
        ("odd</p>", "odd", []),
    ],
)
def test_an_answer_is_read_without_its_marks(answer, text, phrases):
    found, spans = read_answer(answer)
    assert found == text
    phrases = find_phrases(answer) if phrases is None else phrases
    assert [found[start:end] for start, end in spans] == phrases == find_phrases(answer)


def test_a_phrase_is_tied_to_its_place_in_the_answer():
    answer = "<p> dots </p> <SEG> and <p> a ring </p> <SEG>"
    image = Image.new("RGB", (WIDTH, HEIGHT))
    masks, labels = noise(2), ["a ring", "dots"]
    found = SegmentationResult(image, masks, [1, 0], labels, [0.5, 0.9], answer)
    assert [found.text[slice(*span)] for span in found.spans] == labels
    other = SegmentationResult(image, masks, [0, 1], ["star", "moon"], [0.5, 0.9], "Sure, <SEG>.")
    assert other.spans == [None, None]


def test_boxes_go_round_their_masks():
    masks = np.zeros((3, HEIGHT, WIDTH), bool)
    masks[0, 3:9, 10:30] = masks[1, -1, -1] = True
    boxes = result(masks, ["a", "b", "c"], [1, 1, 1]).boxes
    assert boxes.tolist() == [[10, 3, 30, 9], [59, 39, 60, 40], [0, 0, 0, 0]]


@pytest.mark.parametrize("use_polygons", [False, True])
def test_cocos_own_program_reads_the_masks(tmp_path, use_polygons):
    masks = np.concatenate([noise(4), np.zeros((1, HEIGHT, WIDTH), bool)])
    labels, scores = ["ring", "star", "ring", "moon", "ring"], [0.9, 0.8, 0.7, 0.1, 0.9]
    found = result(masks, labels, scores, names=["sun", "star", "ring", "moon"], threshold=0.5)
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found.to_coco("a.jpg", use_polygons)))
    coco = COCO(path)
    assert [each["name"] for each in coco.cats.values()] == ["sun", "star", "ring", "moon"]
    assert coco.imgs[1]["file_name"] == "a.jpg" and coco.imgs[1]["width"] == WIDTH
    assert len(coco.anns) == 3  # the fourth is below the threshold, the last is empty
    for number, annotation in enumerate(coco.anns.values()):
        assert (coco.annToMask(annotation) == masks[number]).all()
        assert annotation["area"] == masks[number].sum()
        assert coco.cats[annotation["category_id"]]["name"] == labels[number]
        assert annotation["score"] == scores[number]


def test_categories_of_several_pictures_are_shared():
    found = []
    for number, names in enumerate((["ring", "star"], ["star", "moon"])):
        each = result(noise(2, number), names, [0.9, 0.9], names=names)
        image = {"file_name": f"{number}.jpg", "width": WIDTH, "height": HEIGHT}
        found.append(each.to_dict() | {"image": image, "names": names, "threshold": 0.0})
    document = coco_instances(found)
    assert document["categories"] == [
        {"id": 1, "name": "ring"},
        {"id": 2, "name": "star"},
        {"id": 3, "name": "moon"},
    ]
    assert [each["category_id"] for each in document["annotations"]] == [1, 2, 2, 3]
    assert [each["image_id"] for each in document["annotations"]] == [1, 1, 2, 2]


def test_what_is_shown_is_what_scores_enough():
    found = result(noise(3), ["a", "b", "c"], [0.2, 0.5, 0.9], threshold=0.5)
    assert found.shown() == [1, 2] and found.shown(0.0) == [0, 1, 2] and found.shown(0.95) == []


def test_supervision_takes_the_masks():
    supervision = pytest.importorskip("supervision")
    found = result(noise(3), ["a", "b", "c"], [0.2, 0.5, 0.9], threshold=0.5)
    detections = found.to_supervision()
    assert isinstance(detections, supervision.Detections) and len(detections) == 2
    assert (detections.mask == found.masks[1:]).all()
    assert detections.data["class_name"].tolist() == ["b", "c"]
    assert detections.class_id.tolist() == [1, 2]
