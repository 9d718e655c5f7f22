"""Readers against hand-written files, targets against the picture, the sampler against its rules.

pytest tests/test_data.py
"""

import itertools
import json
import math
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from xsam import toy
from xsam.config import Source, Stage
from xsam.data import (
    MAX_TURNS,
    CocoPanoptic,
    LlavaChat,
    Mixture,
    Processor,
    RefCoco,
    Sample,
    clean_name,
    decode_mask,
    open_dataset,
    read_image,
    read_refs,
    repeat_factors,
)
from xsam.encoders import SEG_MEAN, SEG_STD
from xsam.llm import IGNORE_LABEL, IMAGE_TOKEN


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed or 0)


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


# ---- masks ---------------------------------------------------------------------------------------


def encodings(mask: np.ndarray) -> dict:
    """One mask as the four segmentations that COCO and its relatives write."""
    packed = coco_mask.encode(np.asfortranarray(mask))
    packed = {"size": packed["size"], "counts": packed["counts"].decode("ascii")}
    left, right = mask.copy(), mask.copy()
    left[:, 6:], right[:, :6] = False, False
    return {
        "polygons": toy.polygons(mask),
        "list RLE": toy.run_lengths(mask),
        "string RLE": packed,
        "list of RLEs": [toy.run_lengths(left), toy.run_lengths(right)],
    }


def two_parts() -> np.ndarray:
    mask = np.zeros((9, 14), bool)
    mask[1:4, 2:8] = mask[6:9, 9:14] = True
    return mask


@pytest.mark.parametrize("kind", encodings(two_parts()))
def test_the_four_encodings_are_one_mask(kind):
    decoded = decode_mask(encodings(two_parts())[kind], (9, 14), "record")
    assert decoded.dtype == bool and (decoded == two_parts()).all()


def test_bad_rings_are_dropped():
    good = toy.polygons(two_parts())
    bad = [[1, 1, 8, 8], [0, 0, 5, 0, 5, 5, 3]]
    assert (decode_mask([*bad, *good], (9, 14), "record") == two_parts()).all()


@pytest.mark.parametrize(
    "segmentation",
    [
        [],
        [[1, 1, 8, 8]],
        toy.run_lengths(two_parts()[:8]),
        [encodings(two_parts().T)["string RLE"]],
    ],
    ids=["nothing", "no valid ring", "list RLE of another size", "string RLE of another size"],
)
def test_a_mask_that_cannot_be_read_names_its_record(segmentation):
    with pytest.raises(ValueError, match=r"instances\.json: annotation 5"):
        decode_mask(segmentation, (9, 14), "instances.json: annotation 5")


# ---- files ---------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_refs_that_would_run_code_are_refused(tmp_path):
    path, trace = tmp_path / "refs(unc).p", tmp_path / "ran"
    path.write_bytes(pickle.dumps([{"ref_id": 1, "sentences": Bomb(trace)}]))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: .*import pathlib"):
        read_refs(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # it would have


def test_refs_cut_short_anywhere_are_refused(tmp_path):
    path = tmp_path / "refs.p"
    whole = pickle.dumps([{"ref_id": 1, "split": "train", "sent_ids": [0, 1]}], protocol=2)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"refs\.p"):
            read_refs(path)


@pytest.mark.parametrize(
    "content",
    [b"}K\x01a.", b"\x80\x02]K\x01K\x02s."],
    ids=["append to a dict", "item of a list"],
)
def test_refs_with_damaged_bytes_are_refused(tmp_path, content):
    (tmp_path / "refs.p").write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\.p"):
        read_refs(tmp_path / "refs.p")


def test_refs_of_protocol_2_and_of_python_2_are_read(tmp_path):
    refs = [{"ref_id": 1, "split": "val", "sentences": [{"sent": "café", "tokens": ["café"]}]}]
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(refs, protocol=2))
    assert read_refs(path) == refs
    path.write_bytes(b"\x80\x02]}U\x04sentU\x05caf\xc3\xa9sa.")  # strings of Python 2
    assert read_refs(path) == [{"sent": "café"}]


def test_image_errors_name_the_file(tmp_path):
    picture = Image.fromarray(rng().integers(0, 255, (20, 30, 3), dtype=np.uint8))
    picture.save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    for name in ("cut.png", "text.jpg", "absent.jpg"):
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path / name)
    assert read_image(tmp_path / "good.png", (20, 30)).size == (30, 20)
    with pytest.raises(ValueError, match=r"good\.png: is 20x30.* 30x20"):
        read_image(tmp_path / "good.png", (30, 20))


def test_a_damaged_json_is_named(tmp_path):
    (tmp_path / "refs.json").write_text('{"images": [')
    source = Source("generic", "refs.json", "images", "masks")
    with pytest.raises(ValueError, match=r"refs\.json: not valid JSON"):
        CocoPanoptic(tmp_path, source, all_classes=True)


# ---- COCO panoptic -------------------------------------------------------------------------------

PANOPTIC = Source("generic", "panoptic.json", "images", masks="masks")
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
    {"id": 70001, "category_id": 90, "iscrowd": 0},
    {"id": 300, "category_id": 92, "iscrowd": 0},
    {"id": 5, "category_id": 1, "iscrowd": 1},
    {"id": 2, "category_id": 90, "iscrowd": 0},
]


def write_panoptic(root: Path, images: list[tuple[int, np.ndarray, list[dict]]]) -> Path:
    """Images, PNGs and one JSON in the order of `images`."""
    records, annotations = [], []
    for number, ids, segments in images:
        for folder, suffix in (("images", "jpg"), ("masks", "png")):
            (root / folder).mkdir(parents=True, exist_ok=True)
            path = root / folder / f"{number:012d}.{suffix}"
            colours = (ids[..., None] >> [0, 8, 16]) & 255
            Image.fromarray(colours.astype(np.uint8)).save(path)
        height, width = ids.shape
        name = f"{number:012d}.jpg"
        records.append({"id": number, "file_name": name, "height": height, "width": width})
        annotations.append(
            {"image_id": number, "file_name": "other.png", "segments_info": segments}
        )
    content = {"images": records, "annotations": annotations[::-1], "categories": CATEGORIES}
    write_json(root / "panoptic.json", content)
    return root


def test_panoptic_classes_are_ranks_of_ids_and_crowd_and_void_have_no_label(tmp_path):
    dataset = CocoPanoptic(write_panoptic(tmp_path, [(7, IDS, SEGMENTS)]), PANOPTIC, True)
    assert dataset.names == ["person", "door", "hot dog", "sky other"]
    assert dataset.is_thing == [True, False, True, False]
    sample = dataset.sample(0, rng())
    assert sample.names == dataset.names
    assert sample.labels.tolist() == [2, 3, 2]
    for mask, number in zip(sample.masks, (70001, 300, 2), strict=True):
        assert (mask == np.isin(IDS, number)).all()
    assert (sample.ignore == ((IDS == 0) | (IDS == 5))).all()


def test_panoptic_images_go_by_id_and_empty_ones_are_left_out(tmp_path):
    one = [{"id": 9, "category_id": 14, "iscrowd": 0}]
    images = [(7, IDS, SEGMENTS), (5, IDS * 0, []), (3, np.full((6, 4), 9), one)]
    dataset = CocoPanoptic(write_panoptic(tmp_path, images), PANOPTIC, True)
    assert (len(dataset), dataset.num_dropped) == (2, 1)
    first, second = dataset.sample(0, rng()), dataset.sample(1, rng())
    assert (first.image.size, first.labels.tolist()) == ((4, 6), [1])
    assert (second.image.size, second.labels.tolist()) == ((6, 4), [2, 3, 2])
    assert first.masks.all() and not first.ignore.any()


def test_panoptic_errors_name_the_file(tmp_path):
    unknown = [*SEGMENTS[:3], {"id": 2, "category_id": 91, "iscrowd": 0}]
    root = write_panoptic(tmp_path / "category", [(7, IDS, unknown)])
    with pytest.raises(ValueError, match=r"panoptic\.json: image 7, segment 2: category 91"):
        CocoPanoptic(root, PANOPTIC, True).sample(0, rng())
    root = write_panoptic(tmp_path / "segment", [(7, IDS, SEGMENTS[1:])])
    with pytest.raises(ValueError, match=r"000000000007\.png: segment id 70001"):
        CocoPanoptic(root, PANOPTIC, True).sample(0, rng())


def test_a_sampled_prompt_has_what_is_present_and_labels_point_at_it(tmp_path):
    dataset = CocoPanoptic(write_panoptic(tmp_path, [(7, IDS, SEGMENTS)]), PANOPTIC, False)
    prompts = []
    for seed in range(60):
        sample = dataset.sample(0, rng(seed))
        named = [sample.names[label] for label in sample.labels]
        assert named == ["hot dog", "sky other", "hot dog"]
        assert len(set(sample.names)) == len(sample.names)
        assert set(sample.names) <= set(dataset.names)
        phrases = ", ".join(f"<p>{name}</p>" for name in sample.names)
        assert phrases in sample.turns[0][0] and sample.turns[0][1].count("<SEG>") == 1
        prompts.append(tuple(sample.names))
    assert {len(prompt) for prompt in prompts} == {2, 3, 4}
    assert len({prompt for prompt in prompts if len(prompt) == 2}) == 2  # in either order


@pytest.mark.parametrize("all_classes", [True, False])
def test_an_image_of_crowds_alone_has_no_targets(tmp_path, processor, all_classes):
    crowd = [{"id": 5, "category_id": 1, "iscrowd": 1}]
    root = write_panoptic(tmp_path, [(7, np.full((4, 6), 5), crowd)])
    sample = CocoPanoptic(root, PANOPTIC, all_classes).sample(0, rng(1))
    assert sample.masks.shape == (0, 4, 6) and sample.labels.shape == (0,) and sample.ignore.all()
    targets = processor.encode(sample)["targets"]
    assert targets.masks.shape == (0, 128, 128) and targets.labels.shape == (0,)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("sky-other-merged", "sky other"),
        ("door-stuff", "door"),
        ("floor-wood", "floor wood"),
        ("Hot Dog", "hot dog"),
    ],
)
def test_clean_name(name, clean):
    assert clean_name(name) == clean


# ---- RefCOCO -------------------------------------------------------------------------------------

BOXES = {11: (2, 3, 10, 8), 12: (20, 10, 6, 6), 13: (0, 0, 3, 3)}  # 13 is referred to by nobody


def box_mask(key: int, height: int = 30, width: int = 40) -> np.ndarray:
    x, y, box_width, box_height = BOXES.get(key, (key % 20, key % 13, 5, 7))
    mask = np.zeros((height, width), bool)
    mask[y : y + box_height, x : x + box_width] = True
    return mask


def write_refcoco(root: Path, refs: list[tuple[int, int, str, list[str]]]) -> Path:
    """Refs of (image, annotation, split, sentences), with images of 30 x 40 and boxes as masks."""
    (root / "images").mkdir(parents=True)
    (root / "refcoco").mkdir()
    images, annotations = [], []
    for number in sorted({ref[0] for ref in refs}):
        name = f"COCO_train2014_{number:012d}.jpg"
        Image.new("RGB", (40, 30), (number, 0, 0)).save(root / "images" / name)
        images.append({"id": number, "file_name": name, "height": 30, "width": 40})
    for key in {13, *(ref[1] for ref in refs)}:
        encode = toy.run_lengths if key % 2 else toy.polygons
        annotations.append({"id": key, "segmentation": encode(box_mask(key))})
    write_json(root / "refcoco/instances.json", {"images": images, "annotations": annotations})
    content = [
        {
            "ref_id": place,
            "ann_id": key,
            "image_id": image,
            "split": split,
            "file_name": f"COCO_train2014_{image:012d}_{place}.jpg",  # no such file
            "sentences": [{"sent": sentence} for sentence in sentences],
        }
        for place, (image, key, split, sentences) in enumerate(refs)
    ]
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(content, protocol=2))
    return root


def refcoco(root: Path, split: str = "train") -> RefCoco:
    files = {"annotations": "refcoco/refs(unc).p", "instances": "refcoco/instances.json"}
    return RefCoco(root, Source("refer", images="images", split=split, **files))


TWO_REFS = [
    (1, 11, "train", ["Red Circle ", "red circle", "the left one"]),
    (1, 12, "train", ["the square"]),
]


def test_referring_samples_hold_a_sentence_of_every_object(tmp_path):
    dataset = refcoco(write_refcoco(tmp_path, TWO_REFS))
    samples = [dataset.sample(index, rng()) for index in range(len(dataset))]
    assert [sample.names for sample in samples] == [
        ["red circle", "the square"],
        ["the left one", "the square"],
    ]
    for sample in samples:
        assert sample.labels.tolist() == [0, 1]
        for name, (asked, answered) in zip(sample.names, sample.turns, strict=True):
            assert f"<p>{name}</p>" in asked and answered.count("<SEG>") == 1
        for mask, key in zip(sample.masks, (11, 12), strict=True):
            assert (mask == box_mask(key)).all()


@pytest.mark.parametrize("counts", [(3,), (3, 1), (3, 3), (2, 2, 2)])
def test_an_image_gives_as_many_samples_as_it_has_sentences_or_combinations(tmp_path, counts):
    refs = [
        (1, 20 + place, "train", [f"object {place} sentence {k}" for k in range(count)])
        for place, count in enumerate(counts)
    ]
    dataset = refcoco(write_refcoco(tmp_path, refs))
    assert len(dataset) == min(sum(counts), math.prod(counts))
    combinations = {tuple(dataset.sample(i, rng()).names) for i in range(len(dataset))}
    assert len(combinations) == len(dataset)
    for names in combinations:
        assert [name.split()[1] for name in names] == [str(place) for place in range(len(counts))]


def test_many_objects_are_cut_into_conversations(tmp_path):
    count = 2 * MAX_TURNS + 3
    refs = [(1, 20 + place, "train", [f"object {place}"]) for place in range(count)]
    dataset = refcoco(write_refcoco(tmp_path, refs))
    samples = [dataset.sample(index, rng()) for index in range(len(dataset))]
    assert [len(sample.turns) for sample in samples] == [MAX_TURNS, MAX_TURNS, 3]
    assert [name for s in samples for name in s.names] == [f"object {k}" for k in range(count)]
    for sample in samples:
        for name, mask in zip(sample.names, sample.masks, strict=True):
            assert (mask == box_mask(20 + int(name.split()[1]))).all()
        assert sample.labels.tolist() == list(range(len(sample.turns)))


def test_evaluation_has_one_sample_for_each_sentence_of_its_split(tmp_path):
    of_val = [(2, 11, "val", ["Red Circle", "red circle", "the left one"]), (2, 12, "val", ["x"])]
    root = write_refcoco(tmp_path, [*TWO_REFS, *of_val])
    dataset = refcoco(root, "val")
    samples = [dataset.sample(index, rng()) for index in range(len(dataset))]
    assert [sample.names for sample in samples] == [["red circle"], ["the left one"], ["x"]]
    assert [sample.image.getpixel((0, 0))[0] for sample in samples] == [2, 2, 2]
    assert len({sample.sample_id for sample in samples}) == 3
    assert len(refcoco(root, "train")) == 2


def test_a_ref_to_an_unknown_annotation_is_named(tmp_path):
    root = write_refcoco(tmp_path, TWO_REFS)
    content = json.loads((root / "refcoco/instances.json").read_text())
    content["annotations"] = [each for each in content["annotations"] if each["id"] != 12]
    write_json(root / "refcoco/instances.json", content)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: ref 1: annotation 12"):
        refcoco(root)


# ---- LLaVA ---------------------------------------------------------------------------------------


def turns(*values: str, start: str = "human") -> list[dict]:
    speakers = itertools.cycle(("human", "gpt") if start == "human" else ("gpt", "human"))
    return [{"from": who, "value": value} for who, value in zip(speakers, values, strict=False)]


def llava(root: Path, *records: dict) -> LlavaChat:
    Image.new("RGB", (40, 30)).save(root / "drawing.jpg")
    write_json(root / "chat.json", list(records))
    return LlavaChat(root, Source("chat", "chat.json", ""))


def test_chat_turns(tmp_path):
    dataset = llava(
        tmp_path,
        {
            "id": 5,
            "image": "drawing.jpg",
            "conversations": turns("What is it?\n<image>", "A ring."),
        },
        {"id": "text", "model": "", "conversations": turns("Hello", "Hello.")},
        {
            "id": "lead",
            "image": "drawing.jpg",
            "conversations": turns("Hi.", "<image>\nAnd?", "A star.", start="gpt"),
        },
    )
    assert (len(dataset), dataset.num_dropped) == (2, 1)
    samples = [dataset.sample(index, rng()) for index in range(2)]
    assert samples[0].turns == [("What is it?", "A ring.")]
    assert samples[1].turns == [("And?", "A star.")]
    assert samples[0].masks.shape == (0, 30, 40) and samples[0].labels.shape == (0,)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([{"from": "system", "value": "x"}], "turn from 'system'"),
        (turns("<image>", "a", "b"), "do not alternate"),
        ([], "do not alternate"),
        (turns("a", start="gpt"), "do not alternate"),
    ],
)
def test_a_wrong_conversation_names_its_record(tmp_path, conversation, message):
    record = {"id": "r1", "image": "drawing.jpg", "conversations": conversation}
    with pytest.raises(ValueError, match=rf"chat\.json: record r1.*{message}"):
        llava(tmp_path, record).sample(0, rng())


# ---- text of a sample ----------------------------------------------------------------------------


def chat(*pairs: tuple[str, str | None]) -> Sample:
    empty = np.zeros((0, 30, 40), bool), np.zeros(0, np.int64)
    return Sample("chat/1", "chat", Image.new("RGB", (40, 30)), list(pairs), *empty)


PAIRS = [
    ("What color is the ring?", "The ring is red."),
    ("Is there a star?", "No, there is no star."),
    ("How many shapes are there?", "There are three shapes."),
]


def test_labels_are_the_answers_and_visual_tokens_stand_once(processor, tokenizer):
    ids, labels = processor.tokenize(chat(*PAIRS))
    assert ids.count(IMAGE_TOKEN) == processor.num_visual_tokens
    answers = "".join(f"{answered}<|end|>" for _, answered in PAIRS)
    spoken = tokenizer.encode(answers, add_special_tokens=False)
    assert tokenizer.unk_token_id not in spoken
    assert [label for label in labels if label != IGNORE_LABEL] == spoken
    assert all(label in (IGNORE_LABEL, token) for token, label in zip(ids, labels, strict=True))


def test_an_open_question_has_no_labels_and_is_the_start_of_its_answer(processor):
    asked, labels = processor.tokenize(chat((PAIRS[0][0], None)))
    ids, _ = processor.tokenize(chat(PAIRS[0]))
    assert set(labels) == {IGNORE_LABEL}
    assert ids[: len(asked)] == asked


def test_a_chat_too_long_loses_its_last_turns(processor):
    lengths = [len(processor.tokenize(chat(*PAIRS[:count]))[0]) for count in (1, 2, 3)]
    for count in (1, 2, 3):
        processor.config.model.max_text_length = lengths[count - 1] - processor.num_visual_tokens
        assert processor.tokenize(chat(*PAIRS)) == processor.tokenize(chat(*PAIRS[:count]))
    processor.config.model.max_text_length = lengths[0] - processor.num_visual_tokens - 1
    with pytest.raises(ValueError, match=r"chat/1: \d+ text tokens"):
        processor.tokenize(chat(*PAIRS))


def test_a_prompt_too_long_is_an_error(processor, world):
    sample = open_dataset("coco_panoptic", world / "data", all_classes=True).sample(0, rng())
    processor.config.model.max_text_length = 20
    with pytest.raises(ValueError, match=r"coco_panoptic/139: \d+ text tokens.* is 20"):
        processor.tokenize(sample)


# ---- batches -------------------------------------------------------------------------------------


@pytest.fixture
def referring(tmp_path, processor) -> list[dict]:
    """Two encoded samples, of two phrases and of one."""
    root = write_refcoco(tmp_path, [*TWO_REFS, (2, 12, "train", ["x"])])
    dataset = refcoco(root)
    return [
        processor.encode(dataset.sample(index, rng()), run_seed=100 * index) for index in (0, 2)
    ]


@pytest.mark.parametrize("pad_left", [False, True])
def test_padding_is_at_one_side_and_carries_nothing(processor, referring, pad_left):
    batch = processor.collate(referring, pad_left=pad_left)
    width = batch.input_ids.shape[1]
    assert width == max(len(item["ids"]) for item in referring)
    for row, item in enumerate(referring):
        count = len(item["ids"])
        text = slice(width - count, width) if pad_left else slice(0, count)
        assert batch.input_ids[row, text].tolist() == item["ids"]
        assert batch.labels[row, text].tolist() == item["labels"]
        assert batch.attention_mask[row].sum() == batch.attention_mask[row, text].sum() == count
        assert (batch.labels[row] != IGNORE_LABEL).sum() == sum(x >= 0 for x in item["labels"])


def test_each_phrase_is_a_run_whose_class_is_its_place_in_the_batch(processor, referring):
    batch = processor.collate(referring)
    assert batch.image_index.tolist() == [0, 0, 1]
    assert [target.labels.tolist() for target in batch.targets] == [[0], [1], [2]]
    assert len(set(batch.run_seeds)) == 3
    expected = torch.cat([item["targets"].masks for item in referring])
    assert torch.equal(torch.cat([target.masks for target in batch.targets]), expected)


def test_a_batch_for_the_segmentor_has_no_text(config, world):
    dataset = open_dataset("coco_panoptic", world / "data", all_classes=True)
    processor = Processor(config, None)
    batch = processor.collate([processor.encode(dataset.sample(i, rng())) for i in range(3)])
    assert batch.input_ids is batch.labels is batch.image_pixels is None
    assert batch.image_index.tolist() == [0, 1, 2] and len(batch.targets) == 3


def coloured_sample(height: int, width: int) -> Sample:
    """Two discs, in pure red and pure green on black; the rest is not labelled."""
    rows, columns = np.mgrid[:height, :width]
    centres = [(0.35 * height, 0.3 * width), (0.6 * height, 0.7 * width)]
    masks = np.stack([np.hypot(rows - y, columns - x) < 0.22 * height for y, x in centres])
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., :2] = 255 * masks.transpose(1, 2, 0)
    names = ["red", "green"]
    image = Image.fromarray(picture)
    turn = ("Segment <p>red</p>, <p>green</p>.", "Sure, <SEG>.")
    labels = np.arange(2)
    return Sample("x", "generic", image, [turn], masks, labels, ~masks.any(axis=0), names)


@pytest.mark.parametrize("seed", range(8))
def test_targets_follow_the_image_through_scale_crop_and_flip(config, seed):
    stage = Stage({}, (), scale_range=(0.5, 3.0), flip_probability=0.5)
    processor = Processor(config, None)
    encoded = processor.encode(coloured_sample(90, 120), stage, rng(seed))
    pixels = encoded["seg_pixels"] * torch.tensor(SEG_STD)[:, None, None]
    pixels = pixels + torch.tensor(SEG_MEAN)[:, None, None]
    height, width = encoded["placement"].visible
    on_image = torch.zeros(pixels.shape[1:], dtype=torch.bool)
    on_image[:height, :width] = True
    targets = encoded["targets"]
    for mask, label in zip(targets.masks, targets.labels, strict=True):
        seen = (pixels[label] > 127) & on_image
        assert (seen & mask).sum() / (seen | mask).sum() > 0.93
    lost = set(range(2)) - set(targets.labels.tolist())
    for label in lost:
        assert ((pixels[label] > 200) & on_image).sum() == 0
    unlabelled = (pixels[:2] < 60).all(dim=0) & on_image
    assert (unlabelled & ~targets.ignore).sum() < 0.03 * unlabelled.sum()


def test_flips_and_crops_are_drawn(config):
    """The test above would say nothing of a stage that never changes the picture."""
    stage = Stage({}, (), scale_range=(0.5, 3.0), flip_probability=0.5)
    processor = Processor(config, None)
    placements, flips, counts = [], [], []
    for seed in range(30):
        sample = coloured_sample(90, 120)
        before = sample.masks[0].copy()
        encoded = processor.encode(sample, stage, rng(seed))
        placements.append(encoded["placement"])
        flips.append(not (sample.masks[0] == before).all())
        counts.append(len(encoded["targets"].labels))
    assert any(p.top for p in placements) and any(p.left for p in placements)
    assert any(max(p.visible) < p.size for p in placements)
    assert 5 < sum(flips) < 25 and min(counts) < 2


def test_a_mask_cut_away_is_no_generic_target_but_stays_a_referring_one(config):
    processor = Processor(config, None)
    sample = coloured_sample(100, 100)
    sample.masks[1] = False
    sample.masks[1, :2, :2] = True
    placement = processor.place(sample, Stage({}, (), scale_range=(2.0, 2.0)), rng(3))
    assert placement.top > 4 and placement.left > 4
    assert processor.targets(sample, placement).labels.tolist() == [0]
    sample.task = "refer"
    targets = processor.targets(sample, placement)
    assert targets.labels.tolist() == [0, 1] and not targets.masks[1].any()


# ---- sampling ------------------------------------------------------------------------------------


class Numbers:
    """A dataset whose samples are their own indices."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def mixture(sizes: list[int], threshold: float = 0.1, seed: int = 0, **fields) -> Mixture:
    fields = {"global_batch_size": 8, "micro_batch_size": 2, **fields}
    stage = Stage({}, (), repeat_threshold=threshold, **fields)
    return Mixture([Numbers(size) for size in sizes], None, stage, seed)


def steps(mix: Mixture, first_step: int, count: int, rank: int = 0, world_size: int = 1) -> list:
    """The draws of `count` global batches on one rank, step by step."""
    size = mix.global_batch_size // mix.stage.micro_batch_size // world_size
    stream = mix.micro_batches(first_step, rank, world_size)
    return [[d for _ in range(size) for d in next(stream)] for _ in range(count)]


@pytest.mark.parametrize("threshold", [0.0, 0.001, 0.01, 0.1])
def test_repeat_factors_are_the_papers(threshold):
    sizes = [900, 99, 1]
    shares = [size / 1000 for size in sizes]
    expected = [1.0 if f >= threshold else (threshold / f) ** 0.5 for f in shares]
    assert repeat_factors(sizes, threshold) == pytest.approx(expected)


def test_an_epoch_spreads_the_fractional_repeat_evenly():
    sizes = [400, 80, 24]
    mix = mixture(sizes)
    factors = repeat_factors(sizes, 0.1)
    counts = Counter((draw.dataset, draw.index) for batch in mix.epoch(0) for draw in batch)
    for number, (size, factor) in enumerate(zip(sizes, factors, strict=True)):
        seen = [counts[number, index] for index in range(size)]
        assert max(seen) - min(seen) <= 1
        assert abs(sum(seen) - size * factor) <= mix.global_batch_size / 2


def test_every_global_batch_is_of_one_dataset():
    mix = mixture([100, 20, 9])
    batches = mix.epoch(0)
    assert len(batches) == len(mix)
    assert {len(batch) for batch in batches} == {8}
    assert all(len({draw.dataset for draw in batch}) == 1 for batch in batches)
    assert {batch[0].dataset for batch in batches} == {0, 1, 2}
    order = [batch[0].dataset for batch in batches]
    assert order != sorted(order)


def test_a_dataset_smaller_than_a_batch_fills_one():
    assert [len(batch) for batch in mixture([3]).epoch(0)] == [8]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_a_step_among_them(world_size):
    mix = mixture([100, 20])
    alone = steps(mix, 0, 6)
    shares = [steps(mix, 0, 6, rank, world_size) for rank in range(world_size)]
    for step, together in enumerate(alone):
        parts = [share[step] for share in shares]
        assert {len(part) for part in parts} == {8 // world_size}
        union = set().union(*parts)
        assert union == set(together) and len(union) == 8


@pytest.mark.parametrize("first", [1, 6, 7, 8, 13])
def test_a_resumed_sampler_goes_on_where_it_stopped(first):
    mix = mixture([40, 16], threshold=0.0)
    assert len(mix) == 7  # so the steps below cross an epoch's end, or begin at one
    whole = steps(mix, 0, 18)
    assert steps(mix, first, 18 - first) == whole[first:]


def test_epochs_and_seeds_differ():
    mix = mixture([40, 16])
    assert mix.epoch(0) == mix.epoch(0)
    first, second, other_seed = (
        {frozenset((draw.dataset, draw.index) for draw in batch) for batch in batches}
        for batches in (mix.epoch(0), mix.epoch(1), mixture([40, 16], seed=1).epoch(0))
    )
    assert first != second and first != other_seed


def test_a_draw_gives_the_same_sample_each_time(world, config, processor):
    stage = config.stages[3]
    stage.scale_range, stage.flip_probability = (0.8, 1.25), 0.5
    datasets = [open_dataset(name, world / "data") for name in ("coco_panoptic", "refcoco")]
    mix = Mixture(datasets, processor, stage, seed=0)
    for epoch, other in zip(mix.epoch(0), mix.epoch(0), strict=True):
        first, again = mix[epoch[0]], mix[other[0]]
        assert torch.equal(first["seg_pixels"], again["seg_pixels"])
        assert torch.equal(first["targets"].masks, again["targets"].masks)
        assert torch.equal(first["targets"].labels, again["targets"].labels)
        assert first["ids"] == again["ids"] and first["run_seed"] == again["run_seed"]


# ---- visual prompts ------------------------------------------------------------------------------


def test_region_points_lie_in_the_prompt_on_the_canvas(processor):
    """Also where the prompt has fewer pixels than points; an empty prompt is an error."""
    regions = np.zeros((2, 60, 120), bool)
    regions[0, 10:30, 50:90] = True
    regions[1, 59, 119] = True
    picture = Image.new("RGB", (120, 60))
    sample = Sample(
        "x", "generic", picture, [("q", "a")], regions[:0], np.zeros(0), regions=regions
    )
    placement = processor.place(sample, None, None)
    points = processor.region_points(sample, placement, rng(0))
    size = processor.config.model.seg_image_size
    assert points.shape == (2, processor.config.model.num_region_points, 2)
    for region, of_region in zip(regions, points, strict=True):
        rows, columns = (of_region * size).round().long().T
        assert placement.place_map(region)[rows, columns].all()
    regions[1] = False
    with pytest.raises(ValueError, match="x: visual prompt 1"):
        processor.region_points(sample, placement, rng(0))
