"""The toy world's datasets on disk: drawings of scenes in the formats of every set of the paper.

Stands in for COCO, RefCOCO, GranD-f and all others of `SOURCES`, so that stages and metrics run on
a laptop without a download. Files have what is read of the public formats; odd corners of those are
in the tests of the readers. The drawings are shared: a format takes a part of them, and folders of
images that the public sets share are shared here. A scene comes from `default_rng([seed, split,
index])` and the words of a format from a generator that starts from the same numbers, so the bytes
are the same every time. No torch.
"""

import base64
import csv
import functools
import io
import itertools
import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from xsam.datasets import build
from xsam.datasets.formats import bounding_box, encode_mask, polygons, segment_colours
from xsam.datasets.sources import SOURCES
from xsam.files import complete
from xsam.prompts import choice_question
from xsam.toy import scenes
from xsam.toy.scenes import RIDDLES, STUFF_IDS, THING_IDS, Generator, Scene, Segment

SPLITS = ("train", "val", "text", "sam", "pairs")  # with different random numbers

# Those with a generator of their own, which starts from [seed, split, index, number].
WRITERS = {
    "refcoco+": 1, "refcocog": 2, "grefcoco": 3, "reasonseg": 4, "reasonseg_val": 5,
    "reasonseg_test": 6, "interactive": 8, "benchmark": 9, "vqa": 10,
}  # fmt: skip


# ---- files ---------------------------------------------------------------------------------------


def _write(path: Path, content: bytes | str | list | dict) -> None:
    """Bytes and text as they are, all else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)


def _encode(image: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **options)
    return buffer.getvalue()


# ---- COCO's records ------------------------------------------------------------------------------


def categories(only_things: bool = False) -> list[dict]:
    """COCO's records, in order of id."""
    kinds = THING_IDS if only_things else THING_IDS | STUFF_IDS
    return [dict(id=i, name=name, isthing=int(name in THING_IDS)) for name, i in kinds.items()]


def _segment_record(segment: Segment, mask: np.ndarray) -> dict:
    """What panoptic and instance files say alike of a segment; the box is [x, y, width, height]."""
    measures = dict(area=int(mask.sum()), bbox=bounding_box(mask))
    return dict(category_id=segment.category_id, iscrowd=int(segment.is_crowd)) | measures


# ---- drawings ------------------------------------------------------------------------------------


@dataclass
class Drawing:
    """A scene on its way to the files.

    `rng` goes on where the drawing stopped, for COCO, RefCOCO and LLaVA one after the other; all
    other formats take a generator of their own.
    """

    image_id: int
    scene: Scene
    jpeg: bytes
    rng: Generator
    entropy: tuple[int, int, int]  # seed, number of the split, index

    def generator(self, writer: str) -> Generator:
        """The generator of one of WRITERS for this drawing."""
        return np.random.default_rng([*self.entropy, WRITERS[writer]])

    def image_record(self, prefix: str = "") -> dict:
        """COCO's record of the image; its file's name begins with the prefix."""
        height, width = self.scene.segment_index.shape
        name = f"{prefix}{self.image_id:012d}.jpg"
        return dict(id=self.image_id, file_name=name, height=height, width=width)

    def annotation_id(self, index: int) -> int:
        """Of a segment, by its index in the scene."""
        return 10 * self.image_id + index

    @cached_property
    def instance_records(self) -> list[dict]:
        """Things in COCO's instance format."""
        records = []
        for index, segment in enumerate(self.scene.segments):
            if segment.is_thing:
                mask = self.scene.mask(index)
                shape = encode_mask(mask) if segment.is_crowd else polygons(mask)
                ids = dict(id=self.annotation_id(index), image_id=self.image_id)
                records.append(ids | _segment_record(segment, mask) | dict(segmentation=shape))
        return records


def draw_split(seed: int, split: str, count: int) -> list[Drawing]:
    """The first `count` drawings of a split; the very first has a crowd."""
    drawings, number = [], SPLITS.index(split)
    for index in tqdm(range(count), desc=f"draw {split}"):
        entropy = seed, number, index
        rng = np.random.default_rng(entropy)
        scene = scenes.draw_scene(rng, has_crowd=index == 0 or rng.random() < 1 / 12)
        jpeg = _encode(scene.image, format="JPEG", quality=95, subsampling=0)
        image_id = 139 + 37 * index + 18 * number
        drawings.append(Drawing(image_id, scene, jpeg, rng, entropy))
    return drawings


def _eighths(drawings: list[Drawing], first: int, last: int) -> list[Drawing]:
    return drawings[len(drawings) * first // 8 : len(drawings) * last // 8]


# ---- the world -----------------------------------------------------------------------------------


def write_world(data: Path, num_train: int = 1600, num_val: int = 64, seed: int = 0) -> None:
    """Writes every set of SOURCES under `data`, which must not exist. Raises FileExistsError.

    The drawings and image ids are COCO's. The smallest sets get an eighth of the training drawings,
    COCO, RefCOCO and LLaVA all.
    """
    with complete(data) as (root,):
        root.mkdir()
        train, val = draw_split(seed, "train", num_train), draw_split(seed, "val", num_val)
        # These four share the drawings' `rng`: their order is part of the bytes.
        _write_coco(root, "train", train)
        _write_coco(root, "val", val)
        _write_refs(root, "refcoco", train + val, ["train"] * num_train + _scored_splits(val))
        _write_llava(root, train)
        _write_other_refs(root, train, val)
        _write_reasonseg(root, "reasonseg", _eighths(train, 0, 2))
        _write_reasonseg(root, "reasonseg_val", val)
        _write_reasonseg(root, "reasonseg_test", val)
        _write_gcg_grounded(root, "gcg_grandf", _eighths(train, 0, 1))
        _write_gcg_grounded(root, "gcg_psg", _eighths(train, 1, 3))
        _write_gcg_refs(root, _eighths(train, 3, 4))
        _write_gcg_flickr(root, _eighths(train, 4, 6))
        _write_gcg_scored(root, "gcg_val", val[: math.ceil(num_val / 2)])
        _write_gcg_scored(root, "gcg_test", val[math.ceil(num_val / 2) :])
        for split, drawings in (("train", _eighths(train, 0, 4)), ("val", _eighths(val, 0, 4))):
            _write_interactive(root, split, drawings)
        _write_vgd(root, "train", _eighths(train, 0, 4), seed)
        # Of few drawings all: a category has to be in two of them to be shown across images.
        _write_vgd(root, "val", val[: max(len(val) // 2, 8)], seed)
        _write_ade20k(root, val)
        _write_benchmarks(root, val)


# ---- COCO: panoptic, instances, semantic, interactive, VGD ---------------------------------------


def _instances(images: list[dict], drawings: list[Drawing]) -> dict:
    """An instances file of COCO."""
    records = [record for drawing in drawings for record in drawing.instance_records]
    return dict(images=images, annotations=records, categories=categories(only_things=True))


def _write_coco(root: Path, split: str, drawings: list[Drawing]) -> None:
    suffix = "" if split == "train" else "_val"
    source = SOURCES[f"coco_panoptic{suffix}"]
    annotations = []
    for drawing in tqdm(drawings, desc=f"COCO {split}"):
        segments = drawing.scene.segments
        # Any 24 bits but 0, which is void: most are over 65535 and so use all three channels.
        ids = 1 + drawing.rng.choice(2**24 - 1, size=len(segments), replace=False)
        pixels = np.concatenate([[0], ids])[drawing.scene.segment_index]  # [H, W]
        info = [
            dict(id=number) | _segment_record(segment, drawing.scene.mask(index))
            for index, (number, segment) in enumerate(zip(ids.tolist(), segments, strict=True))
        ]
        image = drawing.image_record()
        name = image["file_name"].replace(".jpg", ".png")
        annotations.append(dict(image_id=drawing.image_id, file_name=name, segments_info=info))
        _write(root / source.masks / name, _encode(segment_colours(pixels), format="PNG"))
        _write(root / source.images / image["file_name"], drawing.jpeg)
    images = [drawing.image_record() for drawing in drawings]
    content = dict(images=images, annotations=annotations, categories=categories())
    _write(root / source.annotations, content)
    instances = SOURCES[f"coco_instance{suffix}"].annotations
    _write(root / instances, _instances(images, drawings))
    semantic = root / SOURCES[f"coco_semantic{suffix}"].masks
    panoptic = root / source.annotations, root / source.masks
    build.build_coco_semantic(*panoptic, semantic, num_workers=0)


def _write_interactive(root: Path, split: str, drawings: list[Drawing]) -> None:
    """PSALM's file: COCO's annotations, crowd with them, and their prompts, not dilated."""
    source = SOURCES["coco_interactive" if split == "train" else "coco_interactive_val_point"]
    entries = []
    for drawing in tqdm(drawings, desc=f"COCO-Interactive {split}"):
        rng, annotations = drawing.generator("interactive"), []
        for record in drawing.instance_records:
            mask = drawing.scene.mask(record["id"] - drawing.annotation_id(0))
            prompts = build.visual_prompts(mask, rng, is_dilated=False)
            rles = {f"{kind}_visual_prompt_mask": encode_mask(p) for kind, p in prompts.items()}
            annotations.append(record | rles)
        image = drawing.image_record()
        entries.append(dict(image=image["file_name"], image_info=image, anns=annotations))
    _write(root / source.annotations, entries)


def _write_vgd(root: Path, split: str, drawings: list[Drawing], seed: int) -> None:
    source = SOURCES["coco_vgd" if split == "train" else "coco_vgd_val_point"]
    images = [drawing.image_record() for drawing in drawings]
    _write(root / source.instances, _instances(images, drawings))
    build.build_vgd(root / source.instances, root / source.annotations, seed, num_workers=0)


# ---- RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO -------------------------------------------------------

Mention = tuple[list[int], list[str]]  # indices in the scene of what is meant, expressions for it


def _single_mentions(rng: Generator, scene: Scene) -> Iterator[Mention]:
    """One or two expressions for every thing that has any."""
    for index, segment in enumerate(scene.segments):
        found = rng.permutation(scenes.expressions(scene, segment))[: rng.integers(1, 3)].tolist()
        if found:
            yield [index], found


def _general_mentions(rng: Generator, scene: Scene) -> Iterator[Mention]:
    """One expression for a thing, one for several things, one for nothing that is there."""
    single, several = list(_single_mentions(rng, scene)), scenes.group_expressions(scene)
    if single:
        indices, texts = single[rng.integers(len(single))]
        yield indices, texts[:1]
    if several:
        text, indices = several[rng.integers(len(several))]
        yield indices, [text]
    yield [], [scenes.absent_expression(rng, scene)]


def _write_other_refs(root: Path, train: list[Drawing], val: list[Drawing]) -> None:
    scored = val[: max(len(val) // 4, 6)]
    few = _eighths(train, 0, 1)
    for name, splits in (("refcoco+", ("val", "testA", "testB")), ("refcocog", ("val", "test"))):
        in_turn = [splits[index % len(splits)] for index in range(len(scored))]
        _write_refs(root, name, few + scored, ["train"] * len(few) + in_turn)
    half = _eighths(train, 0, 4)
    _write_refs(root, "grefcoco", half + val, ["train"] * len(half) + _scored_splits(val))


def _scored_splits(val: list[Drawing]) -> list[str]:
    """val, but for the last few drawings, which are testA's and testB's."""
    num_test = min(max(1, len(val) // 16), len(val) // 3)
    return ["val"] * (len(val) - 2 * num_test) + ["testA"] * num_test + ["testB"] * num_test


def _write_refs(root: Path, name: str, drawings: list[Drawing], splits: list[str]) -> None:
    """RefCOCO's file and its images, or another's that share them. gRefCOCO has lists of ids, [-1]
    where nothing is meant."""
    source, is_general = SOURCES[name], name == "grefcoco"
    mentions = _general_mentions if is_general else _single_mentions
    refs, images = [], []
    for drawing, split in zip(tqdm(drawings, desc=name), splits, strict=True):
        rng = drawing.rng if name == "refcoco" else drawing.generator(name)
        image = drawing.image_record(prefix="COCO_train2014_")
        images.append(image)
        if name == "refcoco":
            _write(root / source.images / image["file_name"], drawing.jpeg)
        for indices, texts in mentions(rng, drawing.scene):
            ids = [drawing.annotation_id(index) for index in indices] or [-1]
            ref = dict(image_id=drawing.image_id, ann_id=ids if is_general else ids[0], split=split)
            refs.append(ref | dict(sentences=[dict(sent=text) for text in texts]))
    is_pickle = source.annotations.endswith(".p")
    _write(root / source.annotations, pickle.dumps(refs, protocol=2) if is_pickle else refs)
    _write(root / source.instances, _instances(images, drawings))


# ---- ReasonSeg -----------------------------------------------------------------------------------


def _write_reasonseg(root: Path, name: str, drawings: list[Drawing]) -> None:
    """A riddle for every drawing, whose answer is all things of a category; a crowd of it is
    ignored. Every other training image has an explanation."""
    source, is_train = SOURCES[name], name == "reasonseg"
    explanations = []
    for number, drawing in enumerate(tqdm(drawings, desc=name)):
        scene = drawing.scene
        rng = drawing.generator(name)
        present = sorted({thing.category for thing in scene.things()})
        category = present[rng.integers(len(present))]
        riddle, is_sentence = RIDDLES[category], bool(rng.random() < 0.5)
        texts = rng.permutation(riddle.questions if is_sentence else riddle.phrases).tolist()
        texts = texts[: rng.integers(1, 4) if is_train else 1]
        shapes = [
            dict(label=label, points=np.reshape(ring, (-1, 2)).astype(float).tolist())
            for index, segment in enumerate(scene.segments)
            for label in ["ignore" if segment.is_crowd else "target"]
            for ring in (polygons(scene.mask(index), 1) if segment.category == category else [])
        ]
        stem = f"{drawing.image_id:012d}"
        record = dict(text=texts, is_sentence=is_sentence, shapes=shapes)
        _write(root / source.annotations / f"{stem}.json", record)
        _write(root / source.annotations / f"{stem}.jpg", drawing.jpeg)
        if number % 2 == 0:
            explanation = dict(query=texts[0], outputs=riddle.explanation)
            explanations.append(dict(image=f"{stem}.jpg") | explanation)
    if is_train:
        _write(root / source.instances, explanations)


# ---- GranD-f -------------------------------------------------------------------------------------


def _phrases(scene: Scene) -> tuple[str, list[tuple[str, list[int], np.ndarray]]]:
    """The caption; of its phrases the words, [first character, the one after its last] and mask."""
    text, spans = scenes.caption_phrases(scene)
    return text, [(text[a:b], [a, b], scene.mask(index)) for a, b, index in spans]


def _write_gcg_grounded(root: Path, name: str, drawings: list[Drawing]) -> None:
    """The layout of the annotations by people, with images of their own, and of OpenPSG, with
    COCO's images."""
    source, records = SOURCES[name], []
    for drawing in tqdm(drawings, desc=name):
        text, phrases = _phrases(drawing.scene)
        # The layout has a phrase once; of two things that look alike only the first is in it.
        groundings: dict[str, dict] = {}
        for words, span, mask in phrases:
            phrase = dict(token_positives=span, rle_masks=[encode_mask(mask)])
            groundings.setdefault(words, phrase)
        file_name = drawing.image_record()["file_name"]
        if name == "gcg_grandf":
            file_name = f"sa_{drawing.image_id}.jpg"
            _write(root / source.images / file_name, drawing.jpeg)
        record = dict(file_name=file_name, image_id=drawing.image_id, caption=text)
        records.append(record | dict(groundings=groundings))
    _write(root / source.annotations, records)


def _write_gcg_refs(root: Path, drawings: list[Drawing]) -> None:
    """RefCOCOg's layout: single-key dicts, phrases without spans, images of RefCOCO."""
    records = []
    for drawing in tqdm(drawings, desc="gcg_refcocog"):
        text, phrases = _phrases(drawing.scene)
        refs = [dict(sentence=words, segmentation=polygons(mask)) for words, _, mask in phrases]
        name = drawing.image_record(prefix="COCO_train2014_")["file_name"]
        record = dict(img_file_name=name, caption=text, refs=refs)
        records.append({str(drawing.image_id): record})
    _write(root / SOURCES["gcg_refcocog"].annotations, records)


def _write_gcg_flickr(root: Path, drawings: list[Drawing]) -> None:
    """Flickr30k's layout: COCO's with a caption for every image."""
    source, images, annotations = SOURCES["gcg_flickr"], [], []
    for number, drawing in enumerate(tqdm(drawings, desc="gcg_flickr")):
        text, phrases = _phrases(drawing.scene)
        image = drawing.image_record() | dict(id=number, file_name=f"{drawing.image_id}.jpg")
        images.append(image | dict(caption=text))
        annotations += [
            dict(image_id=number, tokens_positive=[span], sam_mask=encode_mask(mask))
            for _, span, mask in phrases
        ]
        _write(root / source.images / image["file_name"], drawing.jpeg)
    _write(root / source.annotations, dict(images=images, annotations=annotations))


def _write_gcg_scored(root: Path, name: str, drawings: list[Drawing]) -> None:
    """Masks without phrases in one file, captions in the other; ids are strings."""
    source, images, masks, captions = SOURCES[name], [], [], []
    for drawing in tqdm(drawings, desc=name):
        text, phrases = _phrases(drawing.scene)
        image_id = f"sa_{drawing.image_id}"
        images.append(drawing.image_record() | dict(id=image_id))
        labels = [words for words, _, _ in phrases]
        captions.append(dict(image_id=image_id, caption=text, labels=labels))
        masks += [dict(image_id=image_id, segmentation=encode_mask(m)) for _, _, m in phrases]
        _write(root / source.images / f"{image_id}.jpg", drawing.jpeg)
    _write(root / source.annotations, dict(images=images, annotations=masks))
    _write(root / source.instances, dict(images=images, annotations=captions))


# ---- ADE20K --------------------------------------------------------------------------------------

# Names that no training set has as a category, in words that they all use. One is a list, one has
# a space at its end, as in the published file; class numbers count from 1 in this order.
ADE_STUFF = {
    "stripes-merged": "stripes, lines",
    "checks": "checks ",
    "dots": "dots",
    "bricks-stuff": "bricks",
}

ADE_THINGS = [(color, shape) for color in ("red", "green", "blue") for shape in THING_IDS]

ADE_NAMES = [*ADE_STUFF.values(), *(f"{color} {shape}" for color, shape in ADE_THINGS)]


def _write_ade20k(root: Path, drawings: list[Drawing]) -> None:
    """The download of the validation images, then what is converted from it. Crowds and other
    colors have no label."""
    folder = root / Path(SOURCES["ade20k_semantic_val"].masks).parents[1]
    for number, drawing in enumerate(tqdm(drawings, desc="ADE20K"), start=1):
        name = f"validation/ADE_val_{number:08d}"
        classes, instances = _ade_maps(drawing.scene)
        _write(folder / "images" / f"{name}.jpg", drawing.jpeg)
        for kind, table in (("annotations", classes), ("annotations_instance", instances)):
            png = _encode(table[drawing.scene.segment_index], format="PNG")
            _write(folder / kind / f"{name}.png", png)
    rows = [f"{number}\t{name}\n" for number, name in enumerate(ADE_NAMES, start=1)]
    _write(folder / "objectInfo150.txt", "Idx\tName\n" + "".join(rows))
    rows = [f"{n}\t{n + len(ADE_STUFF)}\n" for n in range(1, len(ADE_THINGS) + 1)]
    _write(folder / "ade20k_instance_catid_mapping.txt", "Instance\tClass\n" + "".join(rows))
    build.convert_ade20k(folder, splits=["validation"], num_workers=0)


def _ade_maps(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Of void and every segment its class, and its (instance class, instance number, 0); uint8."""
    classes = np.zeros(len(scene.segments) + 1, np.uint8)
    instances = np.zeros((len(scene.segments) + 1, 3), np.uint8)
    for number, segment in enumerate(scene.segments, start=1):
        look = segment.color, segment.category
        if segment.category in ADE_STUFF:
            classes[number] = 1 + list(ADE_STUFF).index(segment.category)
        elif look in ADE_THINGS and not segment.is_crowd:
            instances[number] = 1 + ADE_THINGS.index(look), number, 0
            classes[number] = len(ADE_STUFF) + instances[number, 0]
    return classes, instances


# ---- chat: LLaVA and the benchmarks of VLMEvalKit ------------------------------------------------


NUM_DIALOGUES = 5  # about a picture


def _write_llava(root: Path, drawings: list[Drawing]) -> None:
    pretrain, instruct = SOURCES["llava_pretrain"], SOURCES["llava_instruct"]
    captions, dialogues = [], []
    for drawing in tqdm(drawings, desc="LLaVA"):
        rng, stem = drawing.rng, f"{drawing.image_id:09d}"
        name = f"{stem[:5]}/{stem}.jpg"
        turns = _conversation(rng, [scenes.caption_turn(rng, drawing.scene)])
        captions.append(dict(id=stem, image=name, conversations=turns))
        _write(root / pretrain.images / name, drawing.jpeg)

        name = f"coco/train2017/{drawing.image_id:012d}.jpg"
        rng = drawing.generator("vqa")
        told = [_conversation(rng, chat_turns(rng, drawing.scene)) for _ in range(NUM_DIALOGUES)]
        dialogues += [dict(id=drawing.image_id, image=name, conversations=turns) for turns in told]
        _write(root / instruct.images / name, drawing.jpeg)
    _write(root / pretrain.annotations, captions)
    _write(root / instruct.annotations, dialogues)


def chat_turns(rng: Generator, scene: Scene) -> list[tuple[str, str]]:
    """Turns of a dialogue about a scene: one in sentences, a checklist, and up to five questions as
    the benchmarks ask them, with options, of yes or no, and for a word."""
    kinds = [list(rows(rng, scene)) for rows in (_choice_rows, _check_rows, _word_rows)]
    counts = [len(rows) for rows in kinds]
    shares = np.repeat(np.divide((0.3, 0.5, 0.2), counts), counts)
    rows = [row for rows in kinds for row in rows]
    turns = [scenes.dialogue(rng, scene)[0], _checklist(rng, scene)]
    for index in rng.choice(len(rows), min(5, len(rows)), replace=False, p=shares):
        row = rows[index]
        options = {letter: row[letter] for letter in "ABCD" if row.get(letter)}
        question = choice_question(row["question"], options, row.get("hint", ""))
        # An option is answered by its text: to find the letter that stands before it is a second
        # step, which so small a model does not learn.
        turns.append((question, options.get(row["answer"], row["answer"])))
    return [turns[index] for index in rng.permutation(len(turns))]


def _checklist(rng: Generator, scene: Scene) -> tuple[str, str]:
    """Many comparisons in one answer: yes or no for every shape, or for every color of one thing.
    From single ones a small model learns to compare only after a long time."""
    colored = [quiz for quiz in scenes.quizzes(scene) if quiz[0] == "color"]
    if colored and rng.random() < 0.5:
        _, question, right, _ = colored[rng.integers(len(colored))]
        items, present = list(scenes.COLORS), {right}
    else:
        question, items = "What shapes are there?", list(THING_IDS)
        present = {segment.category for segment in scene.segments}
    answers = (f"{item} {'yes' if item in present else 'no'}" for item in rng.permutation(items))
    return f"{question} {OF_EACH}", ", ".join(answers) + "."


def _conversation(rng: Generator, turns: list[tuple[str, str]]) -> list[dict]:
    """LLaVA's turns; the image stands before or after the first question."""
    values = [text for turn in turns for text in turn]
    values[0] = f"<image>\n{values[0]}" if rng.random() < 0.5 else f"{values[0]}\n<image>"
    speakers = itertools.cycle(("human", "gpt"))
    return [{"from": who, "value": value} for who, value in zip(speakers, values, strict=False)]


YES_OR_NO, HINT = "Please answer yes or no.", "Look at the picture."

ONE_WORD = "Answer in a word."

OF_EACH = "Say yes or no of each."

NUM_ROWS = 60  # of a benchmark, where there are as many questions

COPY_STEP = 1_000_000  # from the index of a question of MMBench to that of its next copy


def _write_benchmarks(root: Path, drawings: list[Drawing]) -> None:
    """Tables of questions: yes or no for MME and POPE, a word for GQA, else one of A to D."""
    names = [name for name, source in SOURCES.items() if source.format == "tsv"]
    for index, name in enumerate(tqdm(names, desc="benchmarks")):
        first = 7 * index % len(drawings)  # not all begin with the same drawings
        rows = _benchmark_rows(name, drawings[first:] + drawings[:first])
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        _write(root / SOURCES[name].annotations, buffer.getvalue())


def _benchmark_rows(name: str, drawings: list[Drawing]) -> list[dict]:
    """The table, as many whole questions as fit in NUM_ROWS. MMBench has an image once, then the
    index of its row, and asks again with the options in every other order of a circle."""
    with_count = functools.partial(_check_rows, with_count=True)
    kinds = {"mme": with_count, "pope": _check_rows, "gqa": _word_rows}
    rows: list[dict] = []
    number = 0  # of the question
    for drawing in drawings:
        rng, first = drawing.generator("benchmark"), number
        image = base64.b64encode(drawing.jpeg).decode()
        for row in kinds.get(name, _choice_rows)(rng, drawing.scene):
            if name == "mme":  # it pairs questions by the name of their image
                row = dict(image_path=f"{row['category']}/{drawing.image_id}.jpg") | row
            elif "A" in row:
                row |= dict(split=SOURCES[name].annotations[:-4].rsplit("_", 1)[-1].lower())
            copies = [row, *_rotations(row)] if name == "mmbench" else [row]
            if len(rows) + len(copies) > NUM_ROWS:
                return rows
            for turn, copy in enumerate(copies):
                rows.append(dict(index=number + turn * COPY_STEP, image=image) | copy)
                image = first if name == "mmbench" else image
            number += 1
    return rows


def _rotations(row: dict) -> list[dict]:
    """The question with its options moved on by one letter, two, and so on, but not all round."""
    letters = [letter for letter in "ABCD" if row[letter]]
    rotations = []
    for turn in range(1, len(letters)):
        moved = letters[turn:] + letters[:turn]  # the new letters of the options
        options = {new: row[old] for old, new in zip(letters, moved, strict=True)}
        answer = moved[letters.index(row["answer"])]
        rotations.append(row | options | dict(answer=answer))
    return rotations


def _check_rows(rng: Generator, scene: Scene, with_count: bool = False) -> Iterator[dict]:
    """Two questions of every kind; in MME's table also about numbers."""
    for kind, *questions in scenes.checks(rng, scene, with_count):
        for question, answer in zip(questions, ("Yes", "No"), strict=True):
            yield dict(question=f"{question} {YES_OR_NO}", answer=answer, category=kind)


def _word_rows(rng: Generator, scene: Scene) -> Iterator[dict]:
    for _, question, answer, _ in scenes.quizzes(scene):
        yield dict(question=f"{question} {ONE_WORD}", answer=answer)


def _choice_rows(rng: Generator, scene: Scene) -> Iterator[dict]:
    """Up to four options; the columns that are left stay empty."""
    for kind, question, answer, wrong in scenes.quizzes(scene):
        options = rng.permutation([answer, *rng.permutation(wrong)[:3]]).tolist()
        letters = dict(itertools.zip_longest("ABCD", options, fillvalue=""))
        row = dict(question=question, hint=HINT if rng.random() < 0.3 else "") | letters
        yield row | dict(answer="ABCD"[options.index(answer)], category=kind)
