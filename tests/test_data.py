"""Samples to batches against the picture itself, the sampler against its rules.

pytest tests/test_data.py
"""

import dataclasses
import io
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from families import word_tokenizer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from xsam.config import Stage
from xsam.data import (
    MOST_REPLACEMENTS,
    SEG_MEAN,
    SEG_STD,
    Draw,
    EncodedSample,
    Mixture,
    Processor,
    ResizeAndPad,
    Sample,
    SampleTooLong,
    keep_names,
    repeat_factors,
)
from xsam.datasets.registry import open_dataset
from xsam.llm import IGNORE_LABEL, IMAGE_TOKEN, REGION_TOKEN, add_special_tokens
from xsam.prompts import Phrased
from xsam.toy import weights as toy

SIZE = (30, 40)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed or 0)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = toy.build_tokenizer(768)
    add_special_tokens(tokenizer)
    return tokenizer


@pytest.fixture
def processor(config, tokenizer) -> Processor:
    return Processor(config, tokenizer)


def box(top: int, left: int, height: int, width: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def sample_of(task: str, turns: list, masks: list | np.ndarray, labels: list, **fields) -> Sample:
    size = fields.pop("size", SIZE)
    masks = np.stack(masks) if len(masks) else np.zeros((0, *size), bool)
    image = fields.pop("image", Image.new("RGB", size[::-1]))
    fields = {"sample_id": f"{task}/1", **fields}
    labels = np.array(labels, np.int64)
    return Sample(task=task, image=image, turns=turns, masks=masks, labels=labels, **fields)


def referring(names: list[str], labels: list[int], task: str = "refer", **fields) -> Sample:
    """A turn for each phrase; of those in `labels` the k-th has the box at column k."""
    turns = [
        (
            f"Segment <p>{name}</p>.",
            "Sure, <SEG>." if place in labels else "There is no such thing.",
        )
        for place, name in enumerate(names)
    ]
    masks = [box(3, 4 * place, 8, 4) for place in labels]
    return sample_of(task, turns, masks, labels, names=names, **fields)


def chat(*pairs: tuple[str, str | None]) -> Sample:
    return sample_of("chat", list(pairs), [], [])


# ---- text of a sample ----------------------------------------------------------------------------


PAIRS = [
    ("What color is the ring?", "The ring is red."),
    ("Is there a star?", "No, there is no star."),
    ("How many shapes are there?", "There are three shapes."),
]


def test_a_sample_takes_its_image_as_viewers_show_it():
    """Whatever its mode, and turned as its masks are; masks have to be booleans."""
    tag, file = Image.Exif(), io.BytesIO()
    tag[274] = 6
    Image.new("L", (32, 24), 9).save(file, "JPEG", exif=tag)
    for size in ((32, 24), (24, 32)):
        sample = Sample("a", "chat", Image.open(file), [], np.zeros((0, *size), bool), np.zeros(0))
        assert (sample.image.height, sample.image.width) == size and sample.image.mode == "RGB"
    with pytest.raises(ValueError, match=r"a: is 32x24 .* upright, 24x32 as stored, not 9x9"):
        Sample("a", "chat", Image.open(file), [], np.zeros((0, 9, 9), bool), np.zeros(0))
    for masks in (np.zeros((1, 32, 24), np.uint8), torch.zeros(1, 32, 24, dtype=torch.bool)):
        with pytest.raises(ValueError, match="a: its masks are not NumPy booleans; give x > 0"):
            Sample("a", "chat", Image.open(file), [], masks, np.zeros(1))


def test_labels_are_the_answers_and_visual_tokens_stand_once(processor, tokenizer):
    ids, labels = processor.tokenize(chat(*PAIRS))
    assert ids.count(IMAGE_TOKEN) == processor.num_visual_tokens
    answers = "".join(f"{answered}<|end|>" for _, answered in PAIRS)
    spoken = tokenizer.encode(answers, add_special_tokens=False)
    assert [label for label in labels if label != IGNORE_LABEL] == spoken
    assert all(label in (IGNORE_LABEL, token) for token, label in zip(ids, labels, strict=True))


def test_an_open_question_has_no_labels_and_is_the_start_of_its_answer(processor):
    asked, labels = processor.tokenize(chat((PAIRS[0][0], None)))
    ids, _ = processor.tokenize(chat(PAIRS[0]))
    assert set(labels) == {IGNORE_LABEL}
    assert ids[: len(asked)] == asked


def text_length(processor: Processor, sample: Sample) -> int:
    return len(processor.tokenize(sample)[0]) - processor.num_visual_tokens


STAGE = Stage({}, ())


@pytest.mark.parametrize(
    "sample",
    [chat(*PAIRS), referring(["red ring", "a star"], [0, 1]), referring(["why?"], [0], "reason")],
    ids=lambda sample: sample.task,
)
@pytest.mark.parametrize("stage", [None, STAGE])
def test_words_that_are_too_many_are_refused_and_none_is_cut(processor, sample, stage):
    length = text_length(processor, sample)
    processor.config = processor.config.resolve(max_text_length=length)
    whole = processor.tokenize(sample)
    encoded = processor.encode(dataclasses.replace(sample), stage, rng())
    assert (encoded.ids, encoded.labels) == whole
    processor.config = processor.config.resolve(max_text_length=length - 1)
    with pytest.raises(
        SampleTooLong, match=rf"{sample.task}/1: {length} text tokens.* {length - 1}$"
    ):
        processor.encode(dataclasses.replace(sample), stage, rng())


NAMES = [f"{kind} {number}" for number in range(20) for kind in ("ring", "star")]


def generic(labels: list[int], names: list[str] = NAMES) -> Sample:
    """Masks that tell their class: the k-th class is the pixel at row k."""
    turns = [(Phrased("Segment all of: {phrases}.", names), "Sure, <SEG>.")]
    masks = [box(label % SIZE[0], label // SIZE[0], 1, 1) for label in labels]
    return sample_of("generic", turns, masks, labels, names=names)


@pytest.mark.parametrize("limit", [60, 100, 150, 313])
@pytest.mark.parametrize("labels", [[7, 39, 7, 0], [20], []])
def test_a_generic_prompt_too_long_loses_absent_classes_only(processor, limit, labels):
    sample = generic(labels)
    assert text_length(processor, sample) == 314
    processor.config = processor.config.resolve(max_text_length=limit)
    encoded = processor.encode(dataclasses.replace(sample), STAGE, rng())
    kept = encoded.sample
    assert len(encoded.ids) - processor.num_visual_tokens <= limit
    assert [kept.names[label] for label in kept.labels] == [NAMES[label] for label in labels]
    assert encoded.targets.labels.tolist() == kept.labels.tolist()
    assert (kept.masks == sample.masks).all()
    phrases = ", ".join(f"<p>{name}</p>" for name in kept.names)
    assert kept.turns == [(f"Segment all of: {phrases}.", "Sure, <SEG>.")]
    assert kept.names == [name for name in NAMES if name in kept.names]  # in their order
    assert len(set(labels)) <= len(kept.names) < len(NAMES) and kept.names


def test_a_generic_prompt_that_fits_keeps_every_class(processor):
    sample = generic([3])
    length = text_length(processor, sample)
    processor.config = processor.config.resolve(max_text_length=length)
    assert processor.encode(dataclasses.replace(sample), STAGE, rng()).sample.names == NAMES


def test_a_generic_prompt_of_present_classes_that_is_too_long_is_refused(processor):
    sample = generic(list(range(40)))
    length = text_length(processor, sample)
    processor.config = processor.config.resolve(max_text_length=length - 1)
    with pytest.raises(SampleTooLong, match=r"generic/1: \d+ text tokens"):
        processor.encode(sample, STAGE, rng())


def test_evaluation_names_every_class_or_refuses(processor):
    processor.config = processor.config.resolve(max_text_length=100)
    with pytest.raises(SampleTooLong, match=r"generic/1: \d+ text tokens.* is 100"):
        processor.encode(generic([3]))


def test_keep_names_keeps_the_masks_of_what_it_keeps():
    kept = keep_names(generic([7, 39, 7, 0]), np.array([7, 8, 39]))
    assert kept.names == [NAMES[7], NAMES[8], NAMES[39]] and kept.labels.tolist() == [0, 2, 0]
    assert (kept.masks == np.stack([box(7, 0, 1, 1), box(9, 1, 1, 1), box(7, 0, 1, 1)])).all()
    assert kept.turns[0][0].count("<p>") == 3


def test_an_answer_that_says_the_names_loses_those_that_its_question_loses(processor):
    sample = generic([7, 39])
    (question, _) = sample.turns[0]
    sample.turns = [(question, Phrased("There: {phrases}. <SEG>", NAMES))]
    processor.config = processor.config.resolve(max_text_length=150)
    kept = processor.encode(sample, STAGE, rng()).sample
    phrases = ", ".join(f"<p>{name}</p>" for name in kept.names)
    assert 2 <= len(kept.names) < len(NAMES)
    assert kept.turns == [(f"Segment all of: {phrases}.", f"There: {phrases}. <SEG>")]


# ---- batches -------------------------------------------------------------------------------------


@pytest.fixture
def two_referring(processor) -> list[dict]:
    """Two encoded samples, of two phrases and of one."""
    samples = [referring(["red ring", "the star on the left"], [0, 1]), referring(["a disc"], [0])]
    return [processor.encode(sample, run_seed=100 * index) for index, sample in enumerate(samples)]


@pytest.mark.parametrize("pad_left", [False, True])
def test_padding_is_at_one_side_and_carries_nothing(processor, two_referring, pad_left):
    batch = processor.collate(two_referring, pad_left=pad_left)
    width = batch.input_ids.shape[1]
    assert width == max(len(item.ids) for item in two_referring)
    for row, item in enumerate(two_referring):
        count = len(item.ids)
        text = slice(width - count, width) if pad_left else slice(0, count)
        assert batch.input_ids[row, text].tolist() == item.ids
        assert batch.labels[row, text].tolist() == item.labels
        assert batch.attention_mask[row].sum() == batch.attention_mask[row, text].sum() == count
        assert (batch.labels[row] != IGNORE_LABEL).sum() == sum(x >= 0 for x in item.labels)


def test_each_phrase_is_a_run_whose_class_is_its_place_in_the_batch(processor, two_referring):
    batch = processor.collate(two_referring)
    assert batch.runs.image_index.tolist() == [0, 0, 1]
    assert [target.labels.tolist() for target in batch.targets] == [[0], [1], [2]]
    assert batch.run_seeds == [0, 1, 100]
    expected = torch.cat([item.targets.masks for item in two_referring])
    assert torch.equal(torch.cat([target.masks for target in batch.targets]), expected)


def test_a_loader_pins_every_tensor_of_a_batch(processor, two_referring, monkeypatch):
    """Through its own function, which passes over classes that have no pin_memory."""
    batch = processor.collate(two_referring)
    owners = [batch, batch.runs, *batch.targets]
    tensors = [x for owner in owners for x in vars(owner).values() if isinstance(x, Tensor)]
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.clone())  # it wants a GPU
    pinned = pin_memory(batch)
    kept = [x for owner in (pinned, pinned.runs, *pinned.targets) for x in vars(owner).values()]
    assert not {id(each) for each in tensors} & {id(each) for each in kept}
    assert len(tensors) > 10 and sum(isinstance(each, Tensor) for each in kept) == len(tensors)


def test_an_absent_phrase_has_no_run_but_is_a_class_of_the_others(processor, tokenizer):
    samples = [
        referring(["red ring", "a star", "a disc"], [0, 2]),
        referring(["a triangle"], []),
        referring(["blue ring"], [0]),
    ]
    encoded = [processor.encode(sample) for sample in samples]
    batch = processor.collate(encoded)
    assert batch.runs.image_index.tolist() == [0, 0, 2]
    assert [target.labels.tolist() for target in batch.targets] == [[0], [2], [4]]
    opened = batch.input_ids == tokenizer.convert_tokens_to_ids("<p>")
    assert opened.sum(dim=1).tolist() == [3, 1, 1]
    spoken = batch.labels == tokenizer.convert_tokens_to_ids("<SEG>")
    assert spoken.sum(dim=1).tolist() == [2, 0, 1]  # a <SEG> for each run, in their order
    masks = [encoded[0].targets.masks[0], encoded[0].targets.masks[1]]
    masks += [encoded[2].targets.masks[0]]
    for target, mask in zip(batch.targets, masks, strict=True):
        assert torch.equal(target.masks, mask[None]) and mask.any()


@pytest.mark.parametrize("task", ["generic", "refer"])
def test_names_that_an_answer_says_again_are_words_and_no_classes(processor, tokenizer, task):
    """In training as in XSAM.infer; also where the answer is that there is no such thing."""

    def batch_of(template: str, absent: str):
        samples = [generic([1, 0], NAMES[:2]), generic([2], NAMES[:3])]
        if task == "refer":
            samples = [referring(["red ring", "a star", "a disc"], [0, 2]), referring(["a"], [0])]
        for sample in samples:
            names = [sample.names] if task == "generic" else [[name] for name in sample.names]
            sample.turns = [
                (asked, Phrased(template if "<SEG>" in answer else absent, said))
                for (asked, answer), said in zip(sample.turns, names, strict=True)
            ]
        return processor.collate([processor.encode(sample) for sample in samples])

    plain = batch_of("Sure, <SEG>.", "No.")
    said = batch_of("Sure, {phrases} is <SEG>.", "No {phrases}.")
    opening = tokenizer.convert_tokens_to_ids("<p>")
    asked, labelled = ((each == opening).sum() for each in (plain.input_ids, said.labels))
    assert labelled == asked > 3 and (said.input_ids == opening).sum() == 2 * asked
    assert torch.equal(said.runs.classes, plain.runs.classes)
    assert torch.equal(said.runs.phrase_index, plain.runs.phrase_index)
    assert torch.equal(said.runs.image_index, plain.runs.image_index)
    assert said.runs.num_phrases == plain.runs.num_phrases
    row, place = said.runs.image_index, said.runs.seg_position
    assert (said.input_ids[row, place] == tokenizer.convert_tokens_to_ids("<SEG>")).all()
    for target, other in zip(said.targets, plain.targets, strict=True):
        assert torch.equal(target.labels, other.labels)


def test_a_batch_of_absent_phrases_alone_has_no_run(processor):
    batch = processor.collate([processor.encode(referring(["a star"], [])) for _ in range(2)])
    assert batch.targets == [] and batch.run_seeds == [] and batch.runs.image_index.shape == (0,)
    assert batch.seg_pixels.shape[0] == 2


def test_a_phrase_that_nothing_fits_may_have_a_run_without_a_target(processor):
    """And the others keep the run, the mask and the class that they have without it."""
    absent = referring(["a star", "a disc", "a ring"], [0, 2])
    absent.turns[1] = absent.turns[1][0], "Sure, <SEG>."
    items = [processor.encode(each) for each in (referring(["a", "b"], [1]), absent)]
    batch = processor.collate(items)
    assert batch.runs.image_index.tolist() == [0, 1, 1, 1]
    assert batch.runs.phrase_index.tolist() == [1, 2, 3, 4]
    assert [target.labels.tolist() for target in batch.targets] == [[1], [2], [], [4]]
    assert [len(target.masks) for target in batch.targets] == [1, 1, 0, 1]
    masks = [items[0].targets.masks, *items[1].targets.masks[:, None]]
    kept = [batch.targets[run].masks for run in (0, 1, 3)]
    assert all(torch.equal(mask, other) for mask, other in zip(kept, masks, strict=True))
    assert len(set(batch.run_seeds)) == 3 and batch.run_seeds[1:] == [0, 1, 2]
    absent.labels = np.array([0, 0])
    with pytest.raises(ValueError, match="asks for 3 decoder runs, its masks are for 4"):
        processor.collate([processor.encode(absent)])


def test_words_that_the_tokenizer_lacks_come_with_a_training_batch(config):
    processor = Processor(config, word_tokenizer())
    add_special_tokens(processor.tokenizer)

    def items(*about):
        samples = [referring(["the red helmet"], [0]), referring(["a ring"], [0])]
        return [processor.encode(sample, *about) for sample in samples]

    stage, rng = config.stages[3], np.random.default_rng(0)
    assert processor.collate(items(stage, rng)).unknown == {"helmet": "refer/1"}
    assert processor.collate(items()).unknown == {}  # predict says it


@pytest.mark.parametrize("task", ["generic", "refer"])
def test_a_text_that_asks_for_other_runs_than_its_masks_is_refused(processor, task):
    """Else a mask would train nothing."""
    sample = generic([3, 5], NAMES[:6]) if task == "generic" else referring(["a", "b"], [0, 1])
    (question, answer), *others = sample.turns
    sample.turns = [(question, answer.replace("<SEG>", "nothing")), *others]
    items = [processor.encode(each) for each in (generic([1]), sample)][task == "refer" :]
    with pytest.raises(ValueError, match=f"{sample.sample_id}: its text asks for . decoder runs"):
        processor.collate(items)


def test_what_reasoning_ignores_is_in_the_targets(processor):
    ignored = box(20, 10, 6, 20)
    batch = processor.collate(
        [
            processor.encode(referring(["what is round?"], [0], "reason", ignore=ignored)),
            processor.encode(referring(["what is blue?"], [0], "reason")),
        ]
    )
    size = processor.config.model.seg_image_size
    scale = size / SIZE[1]
    rows, columns = (np.mgrid[:size, :size] + 0.5) / scale
    expected = (rows > 20) & (rows < 26) & (columns > 10) & (columns < 30)
    assert torch.equal(batch.targets[0].ignore, torch.from_numpy(expected))
    assert batch.targets[1].ignore is None and len(batch.targets) == 2


@pytest.mark.parametrize(("task", "num_runs"), [("chat", 0), ("generic", 1), ("gcg", 1)])
def test_other_tasks_have_one_run_for_an_image_or_none(processor, task, num_runs):
    sample = chat(PAIRS[0]) if task == "chat" else generic([3, 5, 3], NAMES[:6])
    sample.task = task
    batch = processor.collate([processor.encode(dataclasses.replace(sample)) for _ in range(3)])
    assert (batch.runs.image_index.tolist() if num_runs else []) == [0, 1, 2][: 3 * num_runs]
    assert [t.labels.tolist() for t in batch.targets] == [[3, 5, 3]] * (3 * num_runs)


def test_a_batch_for_the_segmentor_has_no_text(config):
    processor = Processor(config, None)
    batch = processor.collate([processor.encode(generic([k, 3])) for k in range(3)])
    assert batch.input_ids is batch.labels is batch.image_pixels is batch.region_points is None
    assert batch.runs is None
    assert [target.labels.tolist() for target in batch.targets] == [[k, 3] for k in range(3)]


def test_an_image_without_targets_is_encoded(processor):
    targets = processor.encode(generic([], NAMES[:3])).targets
    size = processor.config.model.seg_image_size
    assert targets.masks.shape == (0, size, size) and targets.labels.shape == (0,)
    assert targets.masks.dtype == torch.bool and targets.labels.dtype == torch.int64


# ---- scale, crop and flip ------------------------------------------------------------------------


def coloured_sample(height: int, width: int) -> Sample:
    """Two discs, in pure red and pure green on black; the rest is not labelled."""
    rows, columns = np.mgrid[:height, :width]
    centres = [(0.35 * height, 0.3 * width), (0.6 * height, 0.7 * width)]
    masks = np.stack([np.hypot(rows - y, columns - x) < 0.22 * height for y, x in centres])
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., :2] = 255 * masks.transpose(1, 2, 0)
    fields = {"image": Image.fromarray(picture), "names": ["red", "green"]}
    turns = [("Segment <p>red</p>, <p>green</p>.", "Sure, <SEG>.")]
    return sample_of("generic", turns, masks, [0, 1], ignore=~masks.any(axis=0), **fields)


def unnormalised(seg_pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in 0..255 of the segmentation encoder's input."""
    return seg_pixels * torch.tensor(SEG_STD)[:, None, None] + torch.tensor(SEG_MEAN)[:, None, None]


AUGMENTED = Stage({}, (), scale_range=(0.5, 3.0), flip_probability=0.5)


@pytest.mark.parametrize("seed", range(8))
def test_targets_follow_the_image_through_scale_crop_and_flip(config, seed):
    processor = Processor(config, None)
    encoded = processor.encode(coloured_sample(90, 120), AUGMENTED, rng(seed))
    pixels = unnormalised(encoded.seg_pixels)
    height, width = encoded.transform.visible
    on_image = torch.zeros(pixels.shape[1:], dtype=torch.bool)
    on_image[:height, :width] = True
    targets = encoded.targets
    for mask, label in zip(targets.masks, targets.labels, strict=True):
        seen = (pixels[label] > 127) & on_image
        assert (seen & mask).sum() / (seen | mask).sum() > 0.93
    lost = set(range(2)) - set(targets.labels.tolist())
    for label in lost:
        assert ((pixels[label] > 200) & on_image).sum() == 0
    unlabelled = (pixels[:2] < 60).all(dim=0) & on_image
    assert (unlabelled & ~targets.ignore).sum() < 0.03 * unlabelled.sum()


BLOCK, STEP = 8, 3  # pixels of a block, levels of colour from a pixel to the next
GRID = (8, 10)


def blocks(draw: np.random.Generator, count: int) -> np.ndarray:
    """Masks of random blocks, bool [count, H, W]."""
    return np.kron(draw.random((count, *GRID)) < 0.4, np.ones((BLOCK, BLOCK), bool))


def coded_sample(seed: int) -> Sample:
    """A picture whose red tells the column and whose green tells the row of each pixel."""
    draw = rng(seed, 7)
    rows, columns = np.mgrid[: GRID[0] * BLOCK, : GRID[1] * BLOCK]
    picture = np.stack([STEP * columns, STEP * rows, 0 * rows], axis=-1).astype(np.uint8)
    names = ["a", "b", "c"]
    turns = [("See <p><region></p>, <p><region></p>, <p><region></p>.", "Sure, <SEG>.")]
    fields = {"image": Image.fromarray(picture), "ignore": blocks(draw, 1)[0], "names": names}
    return sample_of("vgd", turns, blocks(draw, 3), [0, 1, 2], regions=blocks(draw, 3), **fields)


def shown(pixels: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each pixel of the canvas: the row and column of `coded_sample` that its colour tells, and
    whether it is of the picture at all, which has no blue as the padding has."""
    red, green, blue = unnormalised(pixels).numpy()
    return green / STEP, red / STEP, blue < 50


@pytest.mark.parametrize("seed", range(10))
def test_every_map_lands_where_the_pixels_of_the_picture_land(processor, seed):
    """Within the blocks, whose edges are the only places where rounding may decide."""
    whole = coded_sample(seed)
    masks, ignore = whole.masks.copy(), whole.ignore.copy()
    encoded = processor.encode(whole, AUGMENTED, rng(seed))
    rows, columns, on_image = shown(encoded.seg_pixels)
    from_edge = [np.abs((each + 0.5 + BLOCK / 2) % BLOCK - BLOCK / 2) for each in (rows, columns)]
    is_sure = on_image & (np.minimum(*from_edge) > 0.7)
    assert is_sure.sum() > 0.4 * on_image.sum()
    place = (rows.round().astype(int)[is_sure], columns.round().astype(int)[is_sure])
    targets = encoded.targets
    assert targets.labels.tolist() == [0, 1, 2]
    for found, original in [*zip(targets.masks, masks, strict=True), (targets.ignore, ignore)]:
        assert (found.numpy()[is_sure] == original[place]).all()
        assert not found.numpy()[~on_image].any()


@pytest.mark.parametrize("seed", range(10))
def test_region_points_lie_where_the_pixels_of_their_prompt_land(processor, seed):
    whole = coded_sample(seed)
    regions = whole.regions.copy()
    encoded = processor.encode(whole, AUGMENTED, rng(seed))
    rows, columns, on_image = shown(encoded.seg_pixels)
    size = processor.config.model.seg_image_size
    for points, region in zip(encoded.region_points, regions, strict=True):
        assert points.shape == (processor.config.model.num_region_points, 2)
        at = tuple((points * size).round().long().numpy().T)
        assert on_image[at].all()
        near = [
            region[
                np.clip(rows[at].round().astype(int) + down, 0, region.shape[0] - 1),
                np.clip(columns[at].round().astype(int) + right, 0, region.shape[1] - 1),
            ]
            for down, right in itertools.product((-1, 0, 1), repeat=2)
        ]
        assert np.any(near, axis=0).all()  # within the rounding of a downscaled colour
        assert near[4].mean() > 0.8


def test_flips_and_crops_are_drawn(config):
    """The tests above would say nothing of a stage that never changes the picture."""
    processor = Processor(config, None)
    transforms, flips, counts = [], [], []
    for seed in range(30):
        sample = coloured_sample(90, 120)
        before = sample.masks[0].copy()
        encoded = processor.encode(sample, AUGMENTED, rng(seed))
        transforms.append(encoded.transform)
        flips.append(not (sample.masks[0] == before).all())
        counts.append(len(encoded.targets.labels))
    assert any(p.top for p in transforms) and any(p.left for p in transforms)
    assert any(max(p.visible) < p.size for p in transforms)
    assert 5 < sum(flips) < 25 and min(counts) < 2


def test_a_mask_cut_away_is_no_generic_target_but_stays_a_referring_one(config):
    processor = Processor(config, None)
    sample = coloured_sample(100, 100)
    sample.masks[1] = False
    sample.masks[1, :2, :2] = True
    transform = processor.place(sample, Stage({}, (), scale_range=(2.0, 2.0)), rng(3))
    assert transform.top > 4 and transform.left > 4
    assert processor.targets(sample, transform).labels.tolist() == [0]
    for task in ("refer", "reason"):
        sample.task = task
        targets = processor.targets(sample, transform)
        assert targets.labels.tolist() == [0, 1] and not targets.masks[1].any()


# ---- visual prompts ------------------------------------------------------------------------------


def visual(regions: dict[str, np.ndarray], task: str = "vgd", **fields) -> Sample:
    """A VGD sample: two masks for each category, those of its k-th at row k."""
    names = list(regions)
    masks = [box(3 * k, left, 2, 5) for k in range(len(names)) for left in (2, 20)]
    labels = [k for k in range(len(names)) for _ in range(2)]
    question = Phrased("Like {phrases}.", ["<region>"] * len(names))
    stacked = np.stack(list(regions.values()))
    turns = [(question, "Sure, <SEG>.")]
    return sample_of(task, turns, masks, labels, names=names, regions=stacked, **fields)


NOTHING = np.zeros(SIZE, bool)


def coordinates(transform: ResizeAndPad) -> np.ndarray:
    """What row and column of the image each pixel of the canvas shows, [2, S, S], by resizing
    pictures of them; upscaled only, where that is exact but for the border."""
    ramps = np.mgrid[: transform.original[0], : transform.original[1]].astype(np.float32)
    canvas = np.full((2, transform.size, transform.size), np.nan)
    for ramp, out in zip(ramps, canvas, strict=True):
        resized = Image.fromarray(ramp).resize(transform.resized[::-1], Image.Resampling.BILINEAR)
        piece = np.asarray(resized)[transform.top :, transform.left :]
        piece = piece[: transform.size, : transform.size]
        out[: piece.shape[0], : piece.shape[1]] = piece
    return canvas


def read_at(canvas: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Bilinear values [P, 2] of [2, S, S] at points [P, 2] in pixels."""
    (top, left), (down, right) = np.floor(points).astype(int).T, (points % 1).T
    above = canvas[:, top, left] * (1 - right) + canvas[:, top, left + 1] * right
    below = canvas[:, top + 1, left] * (1 - right) + canvas[:, top + 1, left + 1] * right
    return (above * (1 - down) + below * down).T


@pytest.mark.parametrize("seed", range(8))
def test_region_points_are_the_pixels_of_the_prompt_exactly(processor, seed):
    """On a canvas that shows row and column of every pixel, a point reads one of its prompt's."""
    region = np.zeros(SIZE, bool)
    region[3:27, 3:37] = rng(seed).random((24, 34)) < 0.2
    stage = Stage({}, (), scale_range=(0.5, 2.5))
    sample = visual({"cat": region})
    encoded = processor.encode(sample, stage, rng(seed))
    transform = encoded.transform
    canvas = coordinates(transform)
    (points,) = encoded.region_points
    assert (points >= 0).all() and (points <= 1).all()
    points = points.double().numpy() * transform.size
    inner = (points > 1).all(axis=1) & (points < np.array(transform.visible) - 2).all(axis=1)
    pixels = read_at(canvas, points[inner])
    assert inner.sum() > 5
    assert np.abs(pixels - pixels.round()).max() < 1e-3
    assert region[tuple(pixels.round().astype(int).T)].all()


def test_region_points_are_repeated_only_where_pixels_are_few(processor):
    few, enough = NOTHING.copy(), box(5, 5, 4, 8)
    few[12, 30] = few[14, 31] = True
    count = processor.config.model.num_region_points
    assert enough.sum() == count
    of_few, of_enough = processor.encode(visual({"cat": few, "dog": enough})).region_points
    scale = processor.config.model.seg_image_size / SIZE[1]
    expected = (np.array([[12, 30], [14, 31]]) + 0.5) * scale - 0.5
    for point in of_few.double().numpy() * processor.config.model.seg_image_size:
        assert np.abs(point - expected).sum(axis=1).min() < 1e-3
    assert of_few.shape == of_enough.shape == (count, 2)
    assert len(np.unique(of_few, axis=0)) == 2 and len(np.unique(of_enough, axis=0)) == count


def test_an_empty_prompt_is_filled_from_another_image_or_leaves_with_its_masks(processor):
    """Of the first image nobody shows the cup; its dog is shown by the second image."""
    shown = box(5, 5, 9, 9)
    samples = [
        visual({"cat": shown, "dog": NOTHING, "cup": NOTHING}),
        visual({"bus": box(15, 12, 8, 8), "dog": box(12, 20, 6, 6)}),
    ]
    encoded = [processor.encode(sample) for sample in samples]
    of_cat, of_bus, of_dog = (
        encoded[0].region_points[0],
        encoded[1].region_points[0],
        encoded[1].region_points[1],
    )
    batch = processor.collate(encoded)
    assert batch.region_index.tolist() == [0, 1, 1, 1]
    assert torch.equal(batch.region_points, torch.stack([of_cat, of_dog, of_bus, of_dog]))
    assert [sample.names for sample in batch.samples] == [["cat", "dog"], ["bus", "dog"]]
    assert [target.labels.tolist() for target in batch.targets] == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert (batch.input_ids == REGION_TOKEN).sum(dim=1).tolist() == [2, 2]
    kept = batch.samples[0]
    assert kept.turns[0][0] == "Like <p><region></p>, <p><region></p>."
    assert (kept.masks == samples[0].masks[:4]).all()
    again = processor.encode(visual({"cat": shown, "dog": shown}))
    assert batch.labels[0][: len(again.labels)].tolist() == again.labels
    assert torch.equal(batch.targets[0].masks, again.targets.masks)


def test_no_answer_depends_on_the_batch(processor):
    """In generation an empty prompt is not filled, so alone and in a batch the same is asked."""
    samples = [
        visual({"cat": box(5, 5, 9, 9), "dog": NOTHING}),
        visual({"dog": box(12, 20, 6, 6)}),
    ]
    together = processor.collate([processor.encode(sample) for sample in samples], pad_left=True)
    assert [sample.names for sample in together.samples] == [["cat"], ["dog"]]
    assert together.region_index.tolist() == [0, 1]
    for row, sample in enumerate(samples):
        alone = processor.collate([processor.encode(sample)], pad_left=True)
        assert torch.equal(alone.region_points[0], together.region_points[row])
        width = int(alone.attention_mask.sum())
        assert alone.input_ids[0, -width:].tolist() == together.input_ids[row, -width:].tolist()


@pytest.mark.parametrize("task", ["vgd", "interactive"])
def test_a_sample_whose_prompts_are_all_empty_is_refused(processor, task):
    regions = {"cat": NOTHING, "dog": NOTHING} if task == "vgd" else {"object": NOTHING}
    with pytest.raises(
        SampleTooLong, match=f"{task}/1: no visual prompt has a pixel on the canvas"
    ):
        processor.encode(visual(regions, task))


def test_a_prompt_that_the_crop_cuts_away_is_empty(processor):
    corner, middle = box(0, 0, 2, 2), box(14, 18, 3, 3)
    transform = ResizeAndPad((30, 40), (240, 320), 128, top=50, left=90)
    points = processor.region_points(visual({"cat": corner, "dog": middle}), transform, rng())
    assert points[0] is None and len(points[1])
    with pytest.raises(SampleTooLong):
        processor.region_points(visual({"cat": corner}), transform, rng())


def across(sample: Sample, *shades: int) -> Sample:
    """The sample with each prompt in an image of its own, of one shade."""
    reference_images = [Image.new("RGB", sample.image.size, (shade,) * 3) for shade in shades]
    return dataclasses.replace(sample, regions=list(sample.regions), region_images=reference_images)


def test_images_that_show_a_prompt_follow_those_of_the_batch(processor):
    """In whatever order samples come, of which some show their prompts themselves."""
    one, other = box(5, 5, 9, 9), box(12, 20, 6, 6)
    samples = [
        across(visual({"cat": one, "dog": other}), 10, 20),
        visual({"cat": other}),
        across(visual({"bus": other}), 30),
    ]
    encoded = [processor.encode(sample) for sample in samples]
    batch = processor.collate(encoded, pad_left=True)
    assert batch.region_index.tolist() == [3, 4, 1, 5]
    assert len(batch.image_pixels) == len(batch.input_ids) == len(batch.transforms) == 3
    transform = ResizeAndPad.fit(SIZE, processor.config.model.seg_image_size)
    height, width = transform.visible
    for row, shade in enumerate((0, 0, 0, 10, 20, 30)):
        pixels = unnormalised(batch.seg_pixels[row])[:, :height, :width]
        assert (pixels - shade).abs().max() < 1
    points = [each for item in encoded for each in item.region_points]
    assert torch.equal(batch.region_points, torch.stack(points))


def test_the_stage_changes_the_image_and_not_those_that_show_its_prompts(processor):
    stage = Stage({}, (), scale_range=(2.0, 2.0), flip_probability=1.0)
    corner = box(0, 0, 3, 3)
    sample = across(visual({"cat": corner}), 10)
    plain = processor.encode(across(visual({"cat": corner}), 10))
    changed = processor.encode(sample, stage, rng(1))
    assert changed.transform != plain.transform
    assert torch.equal(changed.reference_pixels[0], plain.reference_pixels[0])
    size = processor.config.model.seg_image_size
    assert changed.region_points[0].max() < 3 * size / SIZE[1] / size


def test_a_prompt_that_its_donor_lacks_is_filled_and_a_lost_name_takes_its_donor_along(processor):
    shown = box(5, 5, 9, 9)
    samples = [
        across(
            visual({"cup": NOTHING, "dog": NOTHING, "cat": shown}, category_ids=[47, 18, 17]),
            *(10, 20, 30),
        ),
        across(visual({"dog": shown}), 40),
    ]
    encoded = [processor.encode(sample) for sample in samples]
    for _ in range(2):  # also of what was collated before
        batch = processor.collate(encoded)
        first, second = batch.samples
        assert (first.names, second.names) == (["dog", "cat"], ["dog"])
        shades = [image.getpixel((0, 0))[0] for image in first.region_images]
        assert shades == [20, 30] and len(first.regions) == 2
        assert (first.category_ids, second.category_ids) == ([18, 17], [])
        read = [unnormalised(batch.seg_pixels[row])[0, 0, 0].item() for row in batch.region_index]
        assert np.round(read).tolist() == [40, 30, 40]
        assert (
            len(batch.seg_pixels) == 2 + 2
        )  # a reference_image that shows nothing is not looked at


# ---- sampling ------------------------------------------------------------------------------------


class Numbers:
    """A dataset of `size` samples, each a chat that names its record, those in `bad` wrong and
    those in `long` too long for any model."""

    def __init__(self, size: int, name: str = "numbers", bad: tuple = (), long: tuple = ()):
        self.size, self.name, self.bad, self.long = size, name, bad, long

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int, draw: np.random.Generator) -> Sample:
        if index in self.bad:
            raise ValueError(f"{self.name}.json: record {index}: is wrong")
        words = " ".join(["ring"] * (9999 if index in self.long else 1 + index % 5))
        sample = chat((f"What is it, {words}?", str(draw.choice(["A ring.", "A star."]))))
        sample.image = Image.new("RGB", SIZE[::-1], (index, draw.integers(256), 0))
        sample.sample_id = f"{self.name}/{index}"
        return sample


def mixture(sizes: list[int], threshold: float = 0.1, seed: int = 0, **fields) -> Mixture:
    fields = {"global_batch_size": 8, "micro_batch_size": 2, **fields}
    stage = Stage({}, (), repeat_threshold=threshold, **fields)
    return Mixture([Numbers(size) for size in sizes], None, stage, seed)


def steps(mix: Mixture, first_step: int, count: int, rank: int = 0, world_size: int = 1) -> list:
    """The draws of `count` global batches on one rank, step by step."""
    size = mix.global_batch_size // mix.stage.micro_batch_size // world_size
    stream = mix.micro_batches(first_step, rank, world_size)
    return [[d for _ in range(size) for d in next(stream)] for _ in range(count)]


PAPER = {
    "llava_instruct": 625_000,
    "coco_panoptic": 118_000,
    "coco_vgd": 117_000,
    "refcoco": 113_000,
    "refcoco+": 113_000,
    "refcocog": 75_000,
    "gcg_grandf": 1_000,
    "gcg_refcocog": 19_000,
    "gcg_psg": 28_000,
    "gcg_flickr": 148_000,
    "reasonseg": 239,
}


@pytest.mark.parametrize("threshold", [0.0, 0.001, 0.01, 0.1])
def test_repeat_factors_are_the_papers(threshold):
    sizes = list(PAPER.values())
    expected = [max(1.0, (threshold / (size / 1_357_239)) ** 0.5) for size in sizes]
    assert repeat_factors(sizes, threshold) == pytest.approx(expected)
    mix = mixture(sizes, threshold, global_batch_size=64, micro_batch_size=4)
    assert mix.factors == pytest.approx(expected)
    wanted = np.array([size * factor for size, factor in zip(sizes, expected, strict=True)])
    assert abs(len(mix) - wanted.sum() / 64) <= 1
    assert (np.abs(mix.num_batches - len(mix) * wanted / wanted.sum()) < 1).all()


def test_repeat_factors_of_a_rare_set_by_hand():
    assert repeat_factors([900, 99, 1], 0.1) == pytest.approx([1, (0.1 / 0.099) ** 0.5, 10])
    assert repeat_factors([900, 99, 1], 0.0) == [1, 1, 1]
    assert repeat_factors([5], 0.1) == [1]


@pytest.mark.parametrize("threshold", [0.0, 0.001, 0.01, 0.1])
def test_an_epoch_has_each_set_by_its_repeat_factor(threshold):
    """The mix of the paper at a hundredth, with as much smaller batches."""
    sizes = [max(3, size // 100) for size in PAPER.values()]
    mix = mixture(sizes, threshold, global_batch_size=4)
    batches = Counter(batch[0].dataset for batch in mix.epoch(0))
    counts = Counter((draw.dataset, draw.index) for batch in mix.epoch(0) for draw in batch)
    factors = repeat_factors(sizes, threshold)
    total = sum(size * factor for size, factor in zip(sizes, factors, strict=True))
    for number, (size, factor) in enumerate(zip(sizes, factors, strict=True)):
        assert abs(batches[number] - len(mix) * size * factor / total) <= 1
        seen = [counts[number, index] for index in range(size)]
        assert max(seen) - min(seen) <= 1  # the fraction is spread evenly


def test_an_epoch_spreads_the_fractional_repeat_evenly():
    sizes = [400, 80, 24]
    mix = mixture(sizes)
    factors = repeat_factors(sizes, 0.1)
    counts = Counter((draw.dataset, draw.index) for batch in mix.epoch(0) for draw in batch)
    for number, (size, factor) in enumerate(zip(sizes, factors, strict=True)):
        seen = [counts[number, index] for index in range(size)]
        assert max(seen) - min(seen) <= 1
        assert abs(sum(seen) - size * factor) < mix.global_batch_size


def test_every_global_batch_is_of_one_dataset():
    mix = mixture([100, 20, 9])
    batches = mix.epoch(0)
    assert len(batches) == len(mix)
    assert {len(batch) for batch in batches} == {8}
    assert all(len({draw.dataset for draw in batch}) == 1 for batch in batches)
    assert {batch[0].dataset for batch in batches} == {0, 1, 2}
    order = [batch[0].dataset for batch in batches]
    assert order != sorted(order)
    places = [(draw.dataset, draw.place) for batch in batches for draw in batch]
    assert len(set(places)) == len(places)  # each place of an epoch has randomness of its own


def test_a_dataset_smaller_than_a_batch_fills_one():
    assert [len(batch) for batch in mixture([3]).epoch(0)] == [8]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_a_step_among_them(world_size):
    mix = mixture([100, 20])
    count = len(mix) + 3  # into the second epoch
    alone = steps(mix, 0, count)
    shares = [steps(mix, 0, count, rank, world_size) for rank in range(world_size)]
    for step, together in enumerate(alone):
        parts = [share[step] for share in shares]
        assert {len(part) for part in parts} == {8 // world_size}
        assert Counter(draw for part in parts for draw in part) == Counter(together)
        assert len({draw.dataset for draw in together}) == 1
    assert alone[: len(mix)] == mix.epoch(0)
    in_turn = [alone[0][at : at + 2] for at in range(0, 8, 2)]  # micro-batches of two
    for rank, share in enumerate(shares):
        assert share[0] == list(itertools.chain(*in_turn[rank::world_size]))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("first", [1, 6, 7, 8, 13])
def test_a_resumed_sampler_goes_on_where_it_stopped(first, world_size):
    mix = mixture([40, 16], threshold=0.0)
    assert len(mix) == 7  # so the steps below cross an epoch's end, or begin at one
    for rank in range(world_size):
        whole = steps(mix, 0, 18, rank, world_size)
        assert steps(mix, first, 18 - first, rank, world_size) == whole[first:]


def test_epochs_and_seeds_differ():
    mix = mixture([40, 16])
    assert mix.epoch(0) == mix.epoch(0)
    first, second, other_seed = (
        {frozenset((draw.dataset, draw.index) for draw in batch) for batch in batches}
        for batches in (mix.epoch(0), mix.epoch(1), mixture([40, 16], seed=1).epoch(0))
    )
    assert first != second and first != other_seed


# ---- samples of a mixture ------------------------------------------------------------------------


class Coded:
    """A dataset of `coded_sample`s, whose augmentation and prompts are drawn."""

    name = "coded"

    def __len__(self) -> int:
        return 12

    def sample(self, index: int, draw: np.random.Generator) -> Sample:
        sample = coded_sample(index)
        sample.sample_id = f"coded/{index}"
        sample.turns = [(sample.turns[0][0], str(draw.choice(["Sure, <SEG>.", "<SEG>."])))]
        return sample


def mix_of(processor: Processor, *datasets, skip_bad: bool = False, **fields) -> Mixture:
    fields = {"global_batch_size": 4, "micro_batch_size": 2, "flip_probability": 0.5, **fields}
    fields = {"scale_range": (0.8, 1.25), **fields}
    return Mixture(list(datasets), processor, Stage({}, (), **fields), 0, skip_bad)


def is_same(one, other) -> bool:
    """Whether two encoded samples are, to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, Image.Image):
        return one.tobytes() == other.tobytes()
    if dataclasses.is_dataclass(one):
        return is_same(vars(one), vars(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other


def plain(items: list) -> list:
    """What a loader hands on as it is."""
    return items


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_draw_gives_the_same_tensors_whoever_asks(processor, world_size, num_workers):
    """Any rank, any worker, and however often: all that is random is drawn from the draw."""
    mix = mix_of(processor, Coded(), Numbers(20))
    expected = {draw: mix[draw] for batch in mix.epoch(0) for draw in batch}
    assert any(draw.dataset == 0 for draw in expected) and len(expected) == 4 * len(mix)
    seen = []
    for rank in range(world_size):
        batches = list(itertools.islice(mix.micro_batches(0, rank, world_size), 8))
        loader = DataLoader(mix, batch_sampler=batches, collate_fn=plain, num_workers=num_workers)
        for draws, items in zip(batches, loader, strict=True):
            assert all(map(is_same, items, [expected[draw] for draw in draws]))
            seen += draws
    assert len(set(seen)) == 8 * 2 * world_size
    drawn = [
        item.sample.turns[0][1] for item in expected.values() if isinstance(item, EncodedSample)
    ]
    assert len(set(drawn)) > 2


def test_places_and_epochs_draw_otherwise(processor):
    mix = mix_of(processor, Coded())
    items = [mix[Draw(0, 3, epoch, place)] for epoch in range(2) for place in range(1, 4)]
    assert len({item.run_seed for item in items}) == 6
    assert len({item.transform for item in items}) == 6


# ---- bad and refused samples ---------------------------------------------------------------------


def load(mix: Mixture, count: int, num_workers: int = 2) -> list:
    """The first micro-batches as training reads them."""
    batches = list(itertools.islice(mix.micro_batches(0, 0, 1), count))
    return list(
        DataLoader(mix, batch_sampler=batches, collate_fn=mix.collate, num_workers=num_workers)
    )


def test_a_bad_record_comes_through_the_loader_as_its_message(processor):
    mix = mix_of(processor, Numbers(8, bad=(2, 5)))
    batches = load(mix, 4)
    errors = [batch for batch in batches if isinstance(batch, ValueError)]
    assert 1 <= len(errors) <= 2
    for error in errors:
        assert re.fullmatch(r"numbers\.json: record [25]: is wrong", str(error))
    assert all(batch.skipped == [] for batch in batches if batch not in errors)


def write_chats(root: Path) -> None:
    """Three chats, the image of the second of which is missing."""
    folder = root / "img_chat/llava"
    records = [
        {"id": k, "image": f"{k}.jpg"}
        | {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A ring."}]}
        for k in range(3)
    ]
    (folder / "LLaVA-Instruct-150K").mkdir(parents=True)
    (folder / "llava_images").mkdir()
    path = folder / "LLaVA-Instruct-150K/llava_v1_5_mix665k.json"
    path.write_text(json.dumps(records))
    for k in (0, 2):
        Image.new("RGB", SIZE[::-1]).save(folder / f"llava_images/{k}.jpg")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_missing_image_stops_the_run_or_is_left_out(processor, tmp_path, skip_bad):
    write_chats(tmp_path)
    dataset = open_dataset("llava_instruct", tmp_path, skip_bad=skip_bad)
    mix = mix_of(processor, dataset, skip_bad=skip_bad, micro_batch_size=4)
    (batch,) = load(mix, 1)
    if skip_bad:
        assert {sample.sample_id for sample in batch.samples} <= {
            "llava_instruct/0",
            "llava_instruct/2",
        }
        assert len(batch.samples) == 4 and batch.skipped
        assert all("llava_images/1.jpg: cannot be read" in each for each in batch.skipped)
    else:
        assert isinstance(batch, ValueError) and "llava_images/1.jpg: cannot be read" in str(batch)


@pytest.mark.parametrize(
    ("fields", "skip_bad", "reason"),
    [
        ({"bad": (2, 5, 6)}, True, r"numbers\.json: record (\d): is wrong"),
        ({"long": (2, 5, 6)}, False, r"numbers/(\d): \d+ text tokens, max_text_length is \d+"),
    ],
    ids=["bad", "refused"],
)
def test_the_place_of_what_is_left_out_is_taken_and_the_reason_told(
    processor, fields, skip_bad, reason
):
    mix = mix_of(processor, Numbers(8, **fields), skip_bad=skip_bad)
    batches = load(mix, 4)
    assert len(mix) == 2  # so each record is asked for twice
    names = [sample.sample_id for batch in batches for sample in batch.samples]
    assert len(names) == 8 and not {"numbers/2", "numbers/5", "numbers/6"} & set(names)
    reasons = [re.fullmatch(reason, each) for batch in batches for each in batch.skipped]
    assert all(reasons) and {match[1] for match in reasons} == {"2", "5", "6"}
    draws = [draw for batch in mix.epoch(0) for draw in batch]
    for draw, name in zip(draws, names, strict=True):
        if draw.index not in (2, 5, 6):
            assert name == f"numbers/{draw.index}"
    for one, other in zip(batches, load(mix, 4, num_workers=0), strict=True):
        assert [s.sample_id for s in one.samples] == [s.sample_id for s in other.samples]
        assert one.skipped == other.skipped and torch.equal(one.input_ids, other.input_ids)


def test_a_dataset_of_nothing_but_bad_records_ends(processor):
    mix = mix_of(processor, Numbers(5, bad=tuple(range(5))), skip_bad=True)
    (batch,) = load(mix, 1, num_workers=0)
    assert isinstance(batch, ValueError)
    assert re.match(rf"{MOST_REPLACEMENTS} samples in a row cannot be used.* record \d", str(batch))


def test_a_batch_of_a_mixture_carries_no_pictures(processor):
    class Across(Coded):
        def sample(self, index: int, draw: np.random.Generator) -> Sample:
            return across(super().sample(index, draw), 10, 20, 30)

    (batch,) = load(mix_of(processor, Across()), 1, num_workers=0)
    assert len(batch.seg_pixels) == 2 + 2 * 3 and len(batch.samples) == 2
    for sample in batch.samples:
        pictures = sample.image, sample.masks, sample.ignore, sample.regions, sample.region_images
        assert pictures == (None,) * 5


def test_an_empty_prompt_is_refused_and_another_sample_taken(processor):
    class Prompts(Coded):
        def sample(self, index: int, draw: np.random.Generator) -> Sample:
            sample = super().sample(index, draw)
            sample.regions = sample.regions & (index > 8)
            return sample

    mix = mix_of(processor, Prompts())
    batches = load(mix, 6, num_workers=0)
    ids = {sample.sample_id for batch in batches for sample in batch.samples}
    assert ids <= {"coded/9", "coded/10", "coded/11"}
    assert sum(len(batch.skipped) for batch in batches) >= 9
    assert all("no visual prompt" in each for batch in batches for each in batch.skipped)
