"""Grounded conversation (GranD-f) and what is asked by visual prompts (COCO-Interactive, COCO-VGD).

Legend: T targets, G visual prompts, H W image size.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from xsam.data import Sample
from xsam.datasets.base import Dataset, Packed, pack, read_categories
from xsam.datasets.formats import (
    Flag,
    Id,
    Segmentation,
    Side,
    Size,
    by_id,
    decode_mask,
    dilate,
    expect,
    first_file,
    label,
    parse,
    read_image,
    read_json,
    rle_area,
    take,
)
from xsam.datasets.sources import PROMPT_RADII, PROMPT_TYPES
from xsam.prompts import ask, check_words, reply

# ---- grounded conversation -----------------------------------------------------------------------


class Span(NamedTuple):
    """A phrase of a caption, from `start` to `end` in characters, and its mask."""

    start: int
    end: int
    segmentation: Segmentation


class Caption(NamedTuple):
    """A caption and its grounded phrases."""

    image_id: Id
    paths: list[Path]  # where the image may lie
    size: Size | None  # where the file tells it
    text: str
    spans: list[Span]
    ignored: list[Segmentation]  # regions without a label


class Gcg(Dataset):
    """GranD-f for training. A subclass reads one of its layouts; of overlapping or touching spans
    the first is kept (as published)."""

    def index(self) -> None:
        for caption in self.captions():
            kept, end = [], -1
            for span in sorted(caption.spans, key=lambda span: (span.start, span.end)):
                if not 0 <= span.start < span.end <= len(caption.text):
                    self.skipped["spans outside their caption"] += 1
                elif span.start <= end:
                    self.skipped["overlapping or touching spans"] += 1
                else:
                    kept.append(span)
                    end = span.end
            if kept:
                self.records.append(caption._replace(spans=kept))
            else:
                self.skipped["captions without a span"] += 1

    def captions(self) -> Iterator[Caption]:
        raise NotImplementedError

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image_id, paths, size, text, spans, ignored = self.records[index]
        where = f"{self.annotations}: image {image_id}"
        picture = read_image(first_file(paths), size)
        size = picture.height, picture.width
        masks = np.stack([decode_mask(span.segmentation, size, where) for span in spans])
        ignored = [decode_mask(shape, size, where, may_be_empty=True) for shape in ignored]
        names = [text[span.start : span.end] for span in spans]
        marked = check_words(text, where)
        for start, end, _ in reversed(spans):
            marked = f"{marked[:start]}<p>{marked[start:end]}</p>{marked[end:]}"
        question = ask("gcg", [], rng, self.phrasings)
        return Sample(
            sample_id=f"{self.name}/{image_id}",
            task="gcg",
            image=picture,
            turns=[(question, reply("gcg", rng, self.phrasings, caption=marked))],
            masks=masks,
            labels=np.arange(len(masks)),
            # A phrase keeps its label where an ignored region lies over it.
            ignore=np.any(ignored, axis=0) & ~masks.any(axis=0) if ignored else None,
            names=names,
            image_id=image_id,
        )


def clean_caption(text: str) -> str:
    """Without the quotes around some captions, in lower case, as the offsets of spans count."""
    text = text.strip().strip('"').strip()
    lowered = text.lower()
    return lowered if len(lowered) == len(text) else text  # a few letters change their length


def size_if_told(record: dict, where: str) -> Size | None:
    return parse(Size, record, where) if record.get("height") or record.get("width") else None


def read_offsets(offsets: list | None, where: str) -> tuple[int, int]:
    """Start and end of a phrase, in characters."""
    if len(expect(offsets, list, f"{where}: a span")) != 2:
        raise ValueError(f"{where}: a span has {len(offsets)} numbers, not 2")
    start, end = (expect(number, int, f"{where}: a span") for number in offsets)
    return start, end


class GroundedRecord(NamedTuple):
    """A caption of GcgGrounded; `groundings` is {phrase: Grounding}."""

    file_name: str
    image_id: Id
    caption: str
    groundings: dict


class Grounding(NamedTuple):
    """Where a phrase stands, as [start, end], and its RLEs, which are united."""

    token_positives: list
    rle_masks: list


class GcgGrounded(Gcg):
    """Human annotated and OpenPSG, which names its images with or without their COCO folder."""

    def captions(self) -> Iterator[Caption]:
        for index, record in enumerate(read_json(self.annotations, list)):
            where = f"{self.annotations}: record {index}"
            with self.record():
                name, image_id, text, groundings = parse(GroundedRecord, record, where)
                spans = []
                for phrase, grounding in groundings.items():
                    at = f"{where}: {phrase!r}"
                    offsets, rles = parse(Grounding, grounding, at)
                    spans.append(Span(*read_offsets(offsets, at), rles))
                paths = [self.images / folder / name for folder in ("", "train2017", "val2017")]
                size = size_if_told(record, where)
                yield Caption(image_id, paths, size, clean_caption(text), spans, [])


class GcgRef(NamedTuple):
    """A phrase of GcgRefs."""

    sentence: str
    segmentation: Segmentation


class GcgRefsRecord(NamedTuple):
    """A caption of GcgRefs."""

    img_file_name: str
    caption: str
    refs: list[GcgRef]
    image_id: Id | None = None


class GcgRefs(Gcg):
    """RefCOCOg: a list of {key: GcgRefsRecord}; a phrase is its first occurrence in the caption,
    and one that does not occur is skipped."""

    def captions(self) -> Iterator[Caption]:
        for index, entry in enumerate(read_json(self.annotations, list)):
            where = f"{self.annotations}: record {index}"
            with self.record():
                if len(expect(entry, dict, where)) != 1:
                    raise ValueError(f"{where}: has {len(entry)} keys, expected one")
                ((key, content),) = entry.items()
                record = parse(GcgRefsRecord, content, where)
                text, spans = clean_caption(record.caption), []
                for ref in record.refs:
                    phrase = clean_caption(ref.sentence)
                    start = text.find(phrase) if phrase else -1
                    if start < 0:
                        self.skipped["phrases that their caption lacks"] += 1
                    else:
                        spans.append(Span(start, start + len(phrase), ref.segmentation))
                image_id = key if record.image_id is None else record.image_id
                path, size = self.images / record.img_file_name, size_if_told(content, where)
                yield Caption(image_id, [path], size, text, spans, [])


class FlickrImage(NamedTuple):
    """A caption of GcgFlickr."""

    caption: str
    file_name: str
    height: Side
    width: Side


class FlickrAnnotation(NamedTuple):
    """A region. If it is not ignored, the first of its `tokens_positive` is its span."""

    sam_mask: dict
    ignore: Flag = False


class GcgFlickr(Gcg):
    """Flickr30k: COCO's layout with a caption in every image entry. Captions under three words or
    without annotations are skipped."""

    def captions(self) -> Iterator[Caption]:
        content = read_json(self.annotations, dict)
        images = by_id(content, "images", str(self.annotations))
        by_image = self.group_by_image(content, images)
        for number, record in images.items():
            where = f"{self.annotations}: image {number}"
            with self.record():
                image = parse(FlickrImage, record, where)
                text = clean_caption(image.caption)
                if len(text.split()) < 3:
                    self.skipped["captions under three words"] += 1
                    continue
                spans, ignored = [], []
                for annotation in by_image[number]:
                    mask, is_ignored = parse(FlickrAnnotation, annotation, where)
                    if is_ignored:
                        ignored.append(mask)
                    else:
                        positions = take(annotation, "tokens_positive", list, where)
                        offsets = read_offsets(positions[0] if positions else None, where)
                        spans.append(Span(*offsets, mask))
                size = Size(image.height, image.width)
                yield Caption(number, [self.images / image.file_name], size, text, spans, ignored)


class ScoredMask(NamedTuple):
    """An annotation of the file of masks."""

    segmentation: Segmentation


class ScoredCaption(NamedTuple):
    """An annotation of the file of captions; `labels` are its phrases."""

    image_id: Id
    caption: str
    labels: list[str] = ()


class GcgScored(Dataset):
    """GranD-f validation and test: masks in one file, captions and their phrases in another, in the
    order of the masks. Where an image has not as many phrases as masks, which belong together is
    unknown, and all masks have the one name "object"."""

    def index(self) -> None:
        masks, captions = read_json(self.annotations, dict), read_json(self.instances, dict)
        images = by_id(masks, "images", str(self.annotations))
        by_image, texts = self.group_by_image(masks, images), {}  # texts: caption and phrases
        for record in take(captions, "annotations", list, str(self.instances)):
            with self.record():
                name = label(record, "image_id", "annotation of image {}", "annotation")
                where = f"{self.instances}: {name}"
                number, text, phrases = parse(ScoredCaption, record, where)
                if number in texts:
                    self.skipped["further captions of an image"] += 1
                    continue
                phrases = [check_words(phrase, where) for phrase in phrases]
                texts[number] = check_words(text, where), phrases
        for number, image in images.items():
            where = f"{self.annotations}: image {number}"
            if number not in texts:
                self.problems.append(f"{where} has no caption in {self.instances}")
                continue
            if not by_image[number]:
                self.skipped["images without masks"] += 1
                continue
            with self.record():
                text, phrases = texts[number]
                shapes = [parse(ScoredMask, raw, where).segmentation for raw in by_image[number]]
                if len(phrases) != len(shapes):
                    self.skipped["images whose phrases do not belong to their masks"] += 1
                    phrases = []
                self.records.append((number, parse(Size, image, where), text, phrases, shapes))

    def key(self, index: int) -> Id:
        return self.records[index][0]

    def captions(self, index: int) -> list[str]:
        """The true captions of an image."""
        return [self.records[index][2]]

    def phrases(self, index: int) -> list[str]:
        """The phrase of each mask of an image; none where they are not told."""
        return self.records[index][3]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        number, size, text, phrases, shapes = self.records[index]
        where = f"{self.annotations}: image {number}"
        return Sample(
            sample_id=f"{self.name}/{number}",
            task="gcg",
            image=read_image(self.images / f"{number}.jpg", size),
            turns=[(ask("gcg", [], rng, self.phrasings), text)],
            masks=np.stack([decode_mask(shape, size, where) for shape in shapes]),
            labels=np.arange(len(shapes)) if phrases else np.zeros(len(shapes), np.int64),
            names=phrases or ["object"],
            image_id=number,
        )


# ---- interactive and visual grounding ------------------------------------------------------------


class ImageInfo(NamedTuple):
    """COCO's record of an image, without the name of its file."""

    id: Id
    height: Side
    width: Side


class InteractiveRecord(NamedTuple):
    """An image of PSALM's file."""

    image: str
    image_info: ImageInfo
    anns: list


class VgdRecord(NamedTuple):
    """An image of COCO-VGD."""

    image_file: str
    image_info: ImageInfo
    annotations: list


class VgdAnnotation(NamedTuple):
    """An object of either file, without its prompts."""

    id: Id
    category_id: int
    segmentation: Segmentation
    iscrowd: Flag = False


class PromptedObject(NamedTuple):
    """An object and its visual prompts by type, those that are empty left out."""

    id: Id
    category: int
    segmentation: Segmentation
    is_crowd: bool
    prompts: dict[str, dict]


class PromptedImage(NamedTuple):
    """An image and those of its objects that a record asks for, or may."""

    id: Id
    file_name: str
    size: Size
    is_thin: bool  # points and scribbles are stored one pixel wide
    objects: list[PromptedObject]


class VisualPrompts(Dataset):
    """COCO-Interactive (PSALM's file) and COCO-VGD: COCO annotations with four prompt masks each.

    Interactive asks for the one object that the prompt marks: in training one object of an image,
    drawn; in evaluation one sample for each object that has the prompt. VGD shows one object of
    each category present and asks for all of these categories. `source.prompt` is the kind of
    prompt, "" a random one of those that are not empty. PSALM's file stores points and scribbles
    one pixel wide and has crowd regions, which are asked for in evaluation only.

    With `source.is_cross` VGD shows each category in another image of the set (paper figure 13),
    and does not ask for one that no other image shows.
    """

    def index(self) -> None:
        self.is_interactive = self.source.task == "interactive"
        self.is_training = self.source.split == "train"
        self.category_names = {}
        if self.source.instances:
            categories = read_categories(read_json(self.instances, dict), str(self.instances))
            self.category_names = {number: each.name for number, each in categories.items()}
        images = []
        for index, record in enumerate(read_json(self.annotations, list)):
            with self.record():
                images.append(self.read_record(record, f"{self.annotations}: record {index}"))
        if self.source.is_cross:
            self.index_references(images)
        else:
            for image in images:
                self.add(image)

    def read_record(self, record: dict, where: str) -> PromptedImage:
        is_thin = isinstance(record, dict) and "anns" in record
        kind = InteractiveRecord if is_thin else VgdRecord
        file_name, info, annotations = parse(kind, record, where)
        size, objects = Size(info.height, info.width), []
        for raw in annotations:
            name = label(raw, "id", "annotation {}", "")
            at = f"{self.annotations}: {name}" if name else where
            number, category, segmentation, is_crowd = parse(VgdAnnotation, raw, at)
            if self.source.instances and category not in self.category_names:
                raise ValueError(f"{at}: category {category} is not in {self.instances}")
            rles, suffix = raw, "_visual_prompt_mask"
            if not is_thin:
                rles, suffix = take(raw, "visual_prompts", dict, at), "_visual_prompt"
            prompts = {kind: take(rles, f"{kind}{suffix}", dict, at) for kind in PROMPT_TYPES}
            prompts = {
                kind: rle
                for kind, rle in prompts.items()
                if not is_empty_rle(rle, size, f"{at}: {kind}")
            }
            objects.append(PromptedObject(number, category, segmentation, is_crowd, prompts))
        return PromptedImage(info.id, file_name, size, is_thin, objects)

    def add(self, image: PromptedImage) -> None:
        """The records of one image."""
        objects = image.objects
        if self.is_interactive and self.is_training:
            objects = [each for each in objects if not each.is_crowd]
            self.skipped["crowd regions"] += len(image.objects) - len(objects)
        usable = kept = self.with_prompt(objects)
        if not self.is_interactive:  # one object shows all of its category
            shown = {each.category for each in usable}
            kept = [each for each in objects if self.is_training or each.category in shown]
        self.skipped["objects that no prompt shows"] += len(objects) - len(kept)
        if not usable:
            self.skipped["images without a prompt"] += 1
        elif self.is_interactive and not self.is_training:
            self.records += [image._replace(objects=[each]) for each in usable]
        else:
            self.records.append(image._replace(objects=kept))

    def with_prompt(self, objects: list[PromptedObject]) -> list[PromptedObject]:
        """Those that have a prompt of the kind that is asked with."""
        kind = self.source.prompt
        return [each for each in objects if (kind in each.prompts if kind else each.prompts)]

    def index_references(self, images: list[PromptedImage]) -> None:
        """`showing`: by category the ids of the images that show it, `reference_images`: what is
        shown of them, packed. The records ask only for what another image shows."""
        references, self.showing = defaultdict(list), defaultdict(list)
        for image in images:
            for each in self.with_prompt(image.objects):
                where = f"{self.annotations}: annotation {each.id}"
                reference = image._replace(objects=[each._replace(segmentation=[])])
                references[each.category].append(pack(reference, where))
                self.showing[each.category].append(image.id)
        self.reference_images = {number: Packed(packed) for number, packed in references.items()}
        for image in images:
            kept = [
                each
                for each in image.objects
                if any(number != image.id for number in self.showing[each.category])
            ]
            self.skipped["objects that no other image shows"] += len(image.objects) - len(kept)
            if kept:
                self.records.append(image._replace(objects=kept))
            else:
                self.skipped["images that no other image shows a category of"] += 1

    def key(self, index: int) -> Id:
        image = self.records[index]
        return image.objects[0].id if self.is_interactive else image.id

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image = self.records[index]
        picture = read_image(self.images / image.file_name, image.size)
        objects = image.objects
        if self.is_interactive:
            objects = [objects[rng.integers(len(objects))]]
        groups, masks = defaultdict(list), defaultdict(list)  # by category
        for each in sorted(objects, key=lambda each: each.category):
            where = f"{self.annotations}: annotation {each.id}"
            mask = decode_mask(each.segmentation, image.size, where, not self.is_interactive)
            if mask.any():  # a few of COCO's objects are smaller than a pixel
                groups[each.category].append(each)
                masks[each.category].append(mask)
        if not groups:
            raise ValueError(f"{self.annotations}: image {image.id}: no object has a pixel")
        shown = list(groups)
        if self.is_training:
            shown = rng.permutation(shown).tolist()
        region_images = None
        if self.source.is_cross:
            pairs = [self.region_elsewhere(category, image.id, rng) for category in shown]
            region_images, regions = map(list, zip(*pairs, strict=True))
        else:
            parts = [image._replace(objects=groups[category]) for category in shown]
            regions = np.stack([self.region(part, rng) for part in parts])
        return Sample(
            sample_id=f"{self.name}/{image.id}/{index}",
            task=self.source.task,
            image=picture,
            turns=[self.turn(["<region>"] * len(shown), rng)],
            masks=np.stack([mask for category in shown for mask in masks[category]]),
            labels=np.repeat(np.arange(len(shown)), [len(groups[category]) for category in shown]),
            names=["object"] if self.is_interactive else [self.category_names[c] for c in shown],
            regions=regions,
            region_images=region_images,
            category_ids=shown,
            image_id=image.id,
        )

    def num_words(self, index: int) -> int:
        """Categories that are shown."""
        return 1 if self.is_interactive else len({o.category for o in self.records[index].objects})

    def region(self, image: PromptedImage, rng: np.random.Generator) -> np.ndarray:
        """A random prompt for one of the objects of `image`, bool [H, W]; empty where none of them
        has such a prompt."""
        usable = self.with_prompt(image.objects)
        if not usable:
            return np.zeros(image.size, bool)
        chosen = usable[rng.integers(len(usable))]
        kind = self.source.prompt or list(chosen.prompts)[rng.integers(len(chosen.prompts))]
        where = f"{self.annotations}: annotation {chosen.id}"
        region = decode_mask(chosen.prompts[kind], image.size, where)
        return dilate(region, PROMPT_RADII.get(kind, 0)) if image.is_thin else region

    def region_elsewhere(
        self, category: int, number: Id, rng: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray]:
        """An image other than `number` and the prompt of one of its objects of `category`, drawn
        among all such objects."""
        others = [i for i, image_id in enumerate(self.showing[category]) if image_id != number]
        image = self.reference_images[category][others[rng.integers(len(others))]]
        return read_image(self.images / image.file_name, image.size), self.region(image, rng)


def is_empty_rle(rle: dict, size: Size, where: str) -> bool:
    """Whether a prompt has no pixel. Decoding every RLE would take minutes, and is not needed: an
    empty one is a single run, so short."""
    counts = take(rle, "counts", list | str, where)
    return len(counts) < 8 and not rle_area(rle, size, where)
