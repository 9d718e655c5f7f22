"""Grounded conversation: the four layouts of GranD-f's training sets, and its validation and test.

A caption's phrases have a mask each (paper section 3.1). Legend: T targets, H W image size.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from xsam.data import Sample
from xsam.datasets.base import Dataset
from xsam.datasets.formats import decode_mask, told_size
from xsam.datasets.records import Flag, Id, Segmentation, Size, by_id, expect, parse, take, unpack
from xsam.files import find_file, read_json
from xsam.images import read_image
from xsam.prompts import ask, check_words, reply


class Span(NamedTuple):
    """A phrase of a caption, from `start` to `end` in characters, and its mask."""

    start: int
    end: int
    segmentation: Segmentation


class Caption(NamedTuple):
    """A caption and its grounded phrases."""

    image_id: Id
    names: list[str]  # of the image's file; the first that there is
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
                is_inside = 0 <= span.start < span.end <= len(caption.text)
                if not (is_inside and caption.text[span.start : span.end].strip()):
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
        """The captions of the file, with all of their spans."""
        return self.read_each(self.read)

    def read(self, record: Any, where: str) -> Caption:
        """One caption of a file that is a list of them."""
        raise NotImplementedError

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image_id, files, size, text, spans, ignored = self.records[index]
        where = f"{self.annotations}: image {image_id}"
        shapes = [span.segmentation for span in spans]
        told = size or next(filter(None, map(told_size, shapes)), None)  # by the record, or a mask
        picture = read_image(find_file(self.images, *files), told)
        size = picture.height, picture.width
        masks = np.stack([decode_mask(shape, size, where) for shape in shapes])  # [T, H, W]
        ignore = None
        if ignored:  # a phrase keeps its label where an ignored region lies over it
            ignored = [decode_mask(shape, size, where, may_be_empty=True) for shape in ignored]
            ignore = np.any(ignored, axis=0) & ~masks.any(axis=0)  # [H, W]
        names = [text[span.start : span.end] for span in spans]
        marked = check_words(text, where)
        for start, end, _ in reversed(spans):
            marked = f"{marked[:start]}<p>{marked[start:end]}</p>{marked[end:]}"
        task = self.source.task
        question = ask(task, [], rng, self.phrasings)
        turns = [(question, reply(task, rng, self.phrasings, caption=marked))]
        sample_id, labels = f"{self.name}/{image_id}", np.arange(len(masks))
        return Sample(
            sample_id, task, picture, turns, masks, labels, ignore, names, image_id=image_id
        )


def clean_caption(text: str) -> str:
    """Without the quotes around some captions, in lower case, as the offsets of spans count."""
    text = text.strip().strip('"').strip()
    lowered = text.lower()
    return lowered if len(lowered) == len(text) else text  # a few letters change their length


def size_if_told(record: dict, where: str) -> Size | None:
    """The size of the image, where the record has it."""
    return parse(Size, record, where) if record.get("height") or record.get("width") else None


def read_offsets(offsets: list | None, where: str) -> list[int]:
    """Start and end of a phrase, in characters."""
    if len(expect(offsets, list, f"{where}: a span")) != 2:
        raise ValueError(f"{where}: a span has {len(offsets)} numbers, not 2")
    return [expect(number, int, f"{where}: a span") for number in offsets]


class GcgGrounded(Gcg):
    """Human annotated and OpenPSG: {phrase: spans and RLEs}; a phrase's RLEs are united. OpenPSG
    names its images with or without their COCO folder."""

    def read(self, record: Any, where: str) -> Caption:
        name, image_id, text, groundings = unpack(
            record, where, file_name=str, image_id=Id, caption=str, groundings=dict
        )
        spans = []
        for phrase, grounding in groundings.items():
            at = f"{where}: {phrase!r}"
            offsets, rles = unpack(grounding, at, token_positives=list, rle_masks=list)
            spans.append(Span(*read_offsets(offsets, at), rles))
        files, size = [name, f"train2017/{name}", f"val2017/{name}"], size_if_told(record, where)
        return Caption(image_id, files, size, clean_caption(text), spans, [])


class GcgRefs(Gcg):
    """RefCOCOg: a list of {key: record}; a sentence's span is its first occurrence in the caption,
    and one that does not occur is skipped."""

    def read(self, record: Any, where: str) -> Caption:
        if len(expect(record, dict, where)) != 1:
            raise ValueError(f"{where}: has {len(record)} keys, expected one")
        ((key, record),) = record.items()
        name, text, refs = unpack(record, where, img_file_name=str, caption=str, refs=list)
        text, spans = clean_caption(text), []
        for ref in refs:
            phrase, shape = unpack(ref, where, sentence=str, segmentation=Segmentation)
            phrase = clean_caption(phrase)
            start = text.find(phrase) if phrase else -1
            if start < 0:
                self.skipped["phrases that their caption lacks"] += 1
            else:
                spans.append(Span(start, start + len(phrase), shape))
        image_id, size = record.get("image_id", key), size_if_told(record, where)
        return Caption(image_id, [name], size, text, spans, [])


class GcgFlickr(Gcg):
    """Flickr30k: COCO's layout with a caption in every image entry; of an annotation's spans the
    first is meant. Captions under three words or without annotations are skipped."""

    def captions(self) -> Iterator[Caption]:
        content = read_json(self.annotations, dict)
        images = by_id(content, "images", str(self.annotations))
        by_image = self.group_by_image(content, images)
        for number, image in images.items():
            where = f"{self.annotations}: image {number}"
            with self.record():
                text, name = unpack(image, where, caption=str, file_name=str)
                text = clean_caption(text)
                if len(text.split()) < 3:
                    self.skipped["captions under three words"] += 1
                    continue
                spans, ignored = [], []
                for record in by_image[number]:
                    shape, is_ignored = unpack(record, where, sam_mask=dict, ignore=Flag)
                    if is_ignored:
                        ignored.append(shape)
                    else:
                        offsets = take(record, "tokens_positive", list, where)
                        offsets = read_offsets(offsets[0] if offsets else None, where)
                        spans.append(Span(*offsets, shape))
                size = parse(Size, image, where)
                yield Caption(number, [name], size, text, spans, ignored)


class GcgScored(Dataset):
    """GranD-f validation and test: masks in one file, captions and their phrases in another, in the
    order of the masks. Where an image has not as many phrases as masks, which belong together is
    unknown, and all masks have the one name "object"."""

    prediction_kind = "grounded"

    def index(self) -> None:
        self.category_index = {1: 0}
        content = read_json(self.annotations, dict)
        texts = self.read_captions(read_json(self.instances, dict))
        images = by_id(content, "images", str(self.annotations))
        by_image = self.group_by_image(content, images)
        for number, image in images.items():
            where = f"{self.annotations}: image {number}"
            if number not in texts:
                self.problems.append(f"{where} has no caption in {self.instances}")
            elif not by_image[number]:
                self.skipped["images without masks"] += 1
            else:
                with self.record():
                    size, (text, phrases) = parse(Size, image, where), texts[number]
                    masks = by_image[number]
                    shapes = [take(mask, "segmentation", Segmentation, where) for mask in masks]
                    if len(phrases) != len(shapes):
                        self.skipped["images whose phrases do not belong to their masks"] += 1
                        phrases = []
                    self.records.append((number, size, text, phrases, shapes))

    def read_captions(self, content: dict) -> dict[Id, tuple[str, list[str]]]:
        """The caption and the phrases of every image."""
        texts = {}
        for record in take(content, "annotations", list, str(self.instances)):
            with self.record():
                number = take(record, "image_id", Id, f"{self.instances}: annotation")
                where = f"{self.instances}: annotation of image {number}"
                text = take(record, "caption", str, where)
                if number in texts:
                    self.skipped["further captions of an image"] += 1
                    continue
                phrases = take({"labels": []} | record, "labels", list, where)
                phrases = [check_words(expect(p, str, f"{where}: labels"), where) for p in phrases]
                texts[number] = check_words(text, where), phrases
        return texts

    def key(self, index: int) -> Id:
        return self.records[index][0]

    def captions(self, index: int) -> list[str]:
        """The true captions of an image."""
        return [self.records[index][2]]

    def phrases(self, index: int) -> list[str]:
        """The phrases of the masks of an image; none where they are not told."""
        return self.records[index][3]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        number, size, text, phrases, shapes = self.records[index]
        where = f"{self.annotations}: image {number}"
        picture = read_image(find_file(self.images, f"{number}.jpg"), size)
        turns = [(ask(self.source.task, [], rng, self.phrasings), text)]
        masks = np.stack([decode_mask(shape, size, where) for shape in shapes])  # [T, H, W]
        labels = np.arange(len(shapes)) if phrases else np.zeros(len(shapes), np.int64)
        sample_id, names = f"{self.name}/{number}", phrases or ["object"]
        return Sample(
            sample_id, self.source.task, picture, turns, masks, labels, names=names, image_id=number
        )
