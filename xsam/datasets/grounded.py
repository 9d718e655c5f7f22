"""Grounded conversation (GranD-f) and what is asked by visual prompts (COCO-Interactive, COCO-VGD).

Legend: T targets, G visual prompts, H W image size.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from xsam.data import Sample
from xsam.datasets.base import Dataset, Packed, by_id, pack, read_categories
from xsam.datasets.formats import (
    decode_mask,
    dilate,
    expect,
    first_file,
    read_image,
    read_json,
    rle_area,
    take,
    take_flag,
    take_size,
)
from xsam.datasets.sources import PROMPT_RADII, PROMPT_TYPES
from xsam.prompts import ask, check_words, reply

# ---- grounded conversation -----------------------------------------------------------------------


@dataclass
class Caption:
    """A caption and its grounded spans: (start, end) in characters and a segmentation each."""

    image_id: int | str
    paths: list[Path]  # where the image may lie
    size: tuple[int, int] | None  # where the file tells it
    text: str
    spans: list[tuple[int, int, dict | list]]
    ignored: list  # segmentations of regions without a label


class Gcg(Dataset):
    """GranD-f for training. Each subclass reads one of its layouts; overlapping and touching spans
    are dropped, the first in the text staying (as published)."""

    def index(self) -> None:
        for caption in self.captions():
            kept, end = [], -1
            for span in sorted(caption.spans, key=lambda span: span[:2]):
                if not 0 <= span[0] < span[1] <= len(caption.text):
                    self.skipped["spans outside their caption"] += 1
                elif span[0] <= end:
                    self.skipped["overlapping or touching spans"] += 1
                else:
                    kept.append(span)
                    end = span[1]
            if kept:
                self.records.append(dataclasses.replace(caption, spans=kept))
            else:
                self.skipped["captions without a span"] += 1

    def captions(self) -> Iterator[Caption]:
        raise NotImplementedError

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        caption = self.records[index]
        where = f"{self.annotations}: image {caption.image_id}"
        picture = read_image(first_file(caption.paths), caption.size)
        size = picture.height, picture.width
        masks = np.stack([decode_mask(shape, size, where) for _, _, shape in caption.spans])
        ignored = [decode_mask(shape, size, where, True) for shape in caption.ignored]
        text, names = caption.text, [caption.text[start:end] for start, end, _ in caption.spans]
        check_words(text, where)
        for start, end, _ in reversed(caption.spans):
            text = f"{text[:start]}<p>{text[start:end]}</p>{text[end:]}"
        question = ask("gcg", [], rng, self.phrasings)
        answer = reply("gcg", rng, self.phrasings, caption=text)
        return Sample(
            sample_id=f"{self.name}/{caption.image_id}",
            task="gcg",
            image=picture,
            turns=[(question, answer)],
            masks=masks,
            labels=np.arange(len(masks)),
            # A phrase keeps its label where an ignored region lies over it.
            ignore=np.any(ignored, axis=0) & ~masks.any(axis=0) if ignored else None,
            names=names,
            image_id=caption.image_id,
        )

    def records_of(self, content: list) -> Iterator[tuple[dict, str]]:
        for place, record in enumerate(content):
            yield record, f"{self.annotations}: record {place}"


def clean_caption(text: str) -> str:
    """Without the quotes that wrap some captions, in lower case: what the offsets count in."""
    text = text.strip().strip('"').strip()
    lowered = text.lower()
    return lowered if len(lowered) == len(text) else text  # a few letters change their length


def _size_if_told(record: dict, where: str) -> tuple[int, int] | None:
    return take_size(record, where) if record.get("height") or record.get("width") else None


def _span(span: list | None, where: str) -> tuple[int, int]:
    """Start and end of a phrase, in characters."""
    if len(expect(span, list, f"{where}: a span")) != 2:
        raise ValueError(f"{where}: a span has {len(span)} numbers, not 2")
    start, end = (expect(number, int, f"{where}: a span") for number in span)
    return start, end


class GcgGrounded(Gcg):
    """Human annotated and OpenPSG: {phrase: spans and RLEs}; a phrase's RLEs are united. OpenPSG
    names its images with or without their COCO folder."""

    def captions(self) -> Iterator[Caption]:
        for record, where in self.records_of(read_json(self.annotations, list)):
            with self.record():
                name = take(record, "file_name", str, where)
                spans = []
                for phrase, grounding in take(record, "groundings", dict, where).items():
                    at = f"{where}: {phrase!r}"
                    start, end = _span(take(grounding, "token_positives", list, at), at)
                    spans.append((start, end, take(grounding, "rle_masks", list, at)))
                folders = [self.images / folder for folder in ("", "train2017", "val2017")]
                yield Caption(
                    image_id=take(record, "image_id", (int, str), where),
                    paths=[folder / name for folder in folders],
                    size=_size_if_told(record, where),
                    text=clean_caption(take(record, "caption", str, where)),
                    spans=spans,
                    ignored=[],
                )


class GcgRefs(Gcg):
    """RefCOCOg: a list of {key: record}; a sentence's span is its first occurrence in the caption,
    and one that does not occur is left out."""

    def captions(self) -> Iterator[Caption]:
        for entry, where in self.records_of(read_json(self.annotations, list)):
            with self.record():
                if len(expect(entry, dict, where)) != 1:
                    raise ValueError(f"{where}: has {len(entry)} keys, expected one")
                key, record = next(iter(entry.items()))
                text = clean_caption(take(record, "caption", str, where))
                spans = []
                for ref in take(record, "refs", list, where):
                    phrase = clean_caption(take(ref, "sentence", str, where))
                    start = text.find(phrase) if phrase else -1
                    if start < 0:
                        self.skipped["phrases that their caption lacks"] += 1
                        continue
                    shape = take(ref, "segmentation", (list, dict), where)
                    spans.append((start, start + len(phrase), shape))
                yield Caption(
                    image_id=record.get("image_id", key),
                    paths=[self.images / take(record, "img_file_name", str, where)],
                    size=_size_if_told(record, where),
                    text=text,
                    spans=spans,
                    ignored=[],
                )


class GcgFlickr(Gcg):
    """Flickr30k: COCO's layout with a caption for each image entry; of an annotation's spans the
    first is meant. Captions under three words or without annotations are left out."""

    def captions(self) -> Iterator[Caption]:
        content, where = read_json(self.annotations, dict), str(self.annotations)
        images = by_id(take(content, "images", list, where), f"{where}: images")
        by_image = self.group_by_image(content, images)
        for number, image in images.items():
            at = f"{where}: image {number}"
            with self.record():
                text = clean_caption(take(image, "caption", str, at))
                if len(text.split()) < 3:
                    self.skipped["captions under three words"] += 1
                    continue
                spans, ignored = [], []
                for record in by_image[number]:
                    shape = take(record, "sam_mask", dict, at)
                    if take_flag(record, "ignore", at):
                        ignored.append(shape)
                        continue
                    positions = take(record, "tokens_positive", list, at)
                    spans.append((*_span(positions[0] if positions else None, at), shape))
                yield Caption(
                    image_id=number,
                    paths=[self.images / take(image, "file_name", str, at)],
                    size=take_size(image, at),
                    text=text,
                    spans=spans,
                    ignored=ignored,
                )


class GcgScored(Dataset):
    """GranD-f validation and test: masks in one file, captions and their phrases in another, in the
    order of the masks. Masks of an image with another number of phrases are of none in particular,
    so all have the one name "object"."""

    def index(self) -> None:
        masks, captions = read_json(self.annotations, dict), read_json(self.instances, dict)
        where = str(self.annotations)
        images = by_id(take(masks, "images", list, where), f"{where}: images")
        by_image, texts = self.group_by_image(masks, images), {}  # texts: caption and phrases
        for record in take(captions, "annotations", list, str(self.instances)):
            with self.record():
                at = f"{self.instances}: annotation"
                number = take(record, "image_id", (str, int), at)
                at = f"{at} of image {number}"
                if number in texts:
                    self.skipped["further captions of an image"] += 1
                    continue
                phrases = take(record, "labels", list, at) if "labels" in record else []
                phrases = [check_words(expect(each, str, f"{at}: labels"), at) for each in phrases]
                texts[number] = check_words(take(record, "caption", str, at), at), phrases
        for number, image in images.items():
            if number not in texts:
                self.problems.append(f"{where}: image {number} has no caption in {self.instances}")
            elif by_image[number]:
                text, phrases = texts[number]
                if len(phrases) != len(by_image[number]):
                    self.skipped["images whose phrases do not belong to their masks"] += 1
                    phrases = []
                self.records.append((image, text, phrases, by_image[number]))
            else:
                self.skipped["images without masks"] += 1

    def key(self, index: int) -> int | str:
        return self.records[index][0]["id"]

    def captions(self, index: int) -> list[str]:
        """The true captions of an image."""
        return [self.records[index][1]]

    def phrases(self, index: int) -> list[str]:
        """The phrase of each mask of an image; none where they are not told."""
        return self.records[index][2]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image, text, phrases, annotations = self.records[index]
        where = f"{self.annotations}: image {image['id']}"
        size = take_size(image, where)
        picture = read_image(self.images / f"{image['id']}.jpg", size)
        shapes = [take(record, "segmentation", (dict, list), where) for record in annotations]
        return Sample(
            sample_id=f"{self.name}/{image['id']}",
            task="gcg",
            image=picture,
            turns=[(ask("gcg", [], rng, self.phrasings), text)],
            masks=np.stack([decode_mask(shape, size, where) for shape in shapes]),
            labels=np.arange(len(shapes)) if phrases else np.zeros(len(shapes), np.int64),
            names=phrases or ["object"],
            image_id=image["id"],
        )


# ---- interactive and visual grounding ------------------------------------------------------------


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
        self.category_names = {}
        if self.source.instances:
            categories = read_categories(read_json(self.instances, dict), str(self.instances))
            self.category_names = {number: each["name"] for number, each in categories.items()}
        for place, record in enumerate(read_json(self.annotations, list)):
            with self.record():
                self.index_image(record, f"{self.annotations}: record {place}")
        if self.source.is_cross:
            self.index_donors()

    def index_image(self, record: dict, where: str) -> None:
        is_stored_thin = isinstance(record, dict) and "anns" in record
        image = take(record, "image_info", dict, where)
        file_name = take(record, "image" if is_stored_thin else "image_file", str, where)
        size = take_size(image, where)
        number = take(image, "id", (int, str), where)
        annotations = []
        for raw in take(record, "anns" if is_stored_thin else "annotations", list, where):
            at = f"{self.annotations}: annotation {take(raw, 'id', (int, str), where)}"
            holder, suffix = raw, "_visual_prompt_mask"
            if not is_stored_thin:
                holder, suffix = take(raw, "visual_prompts", dict, at), "_visual_prompt"
            prompts = {}
            for kind in PROMPT_TYPES:
                rle = take(holder, f"{kind}{suffix}", dict, at)
                # Reading every RLE would take minutes; an empty one is a single run, so short.
                is_short = len(take(rle, "counts", (list, str), f"{at}: {kind}")) < 8
                if not is_short or rle_area(rle, size, f"{at}: {kind}"):
                    prompts[kind] = rle
            category = take(raw, "category_id", int, at)
            take_flag(raw, "iscrowd", at)
            if self.source.instances and category not in self.category_names:
                raise ValueError(f"{at}: category {category} is not in {self.instances}")
            annotations.append((raw, category, prompts, at))
        entry = (file_name, number, size, is_stored_thin)
        if self.source.is_cross:
            self.records.append((*entry, annotations))
        else:
            self.add(entry, annotations)

    def add(self, entry: tuple, annotations: list) -> None:
        """The records of one image."""
        is_training = self.source.split == "train"
        if self.source.task == "interactive" and is_training:
            single = [each for each in annotations if not each[0].get("iscrowd")]
            self.skipped["crowd regions"] += len(annotations) - len(single)
            annotations = single
        kept = usable = self.with_prompt(annotations)
        if self.source.task == "vgd":  # one object shows all of its category
            shown = {category for _, category, _, _ in usable}
            kept = [each for each in annotations if is_training or each[1] in shown]
        self.skipped["objects that no prompt shows"] += len(annotations) - len(kept)
        if not usable:
            self.skipped["images without a prompt"] += 1
        elif self.source.task == "interactive" and not is_training:
            self.records += [(*entry, [each]) for each in usable]
        else:
            self.records.append((*entry, kept))

    def with_prompt(self, annotations: list) -> list:
        """Those that have a prompt of the kind that is asked with."""
        kind = self.source.prompt
        return [each for each in annotations if (kind in each[2] if kind else each[2])]

    def index_donors(self) -> None:
        """What shows each category, and of each image the objects that another image shows."""
        reference_images, self.showing = (
            defaultdict(list),
            defaultdict(list),
        )  # the latter: ids of images
        for *entry, annotations in self.records:
            for _, category, prompts, where in self.with_prompt(annotations):
                reference_image = (*entry, [({}, category, prompts, where)])
                reference_images[category].append(pack(reference_image, where))
                self.showing[category].append(entry[1])
        self.reference_images = {
            category: Packed(contents) for category, contents in reference_images.items()
        }
        images, self.records = self.records, []
        for file_name, number, size, is_stored_thin, annotations in images:
            kept = [each for each in annotations if any(n != number for n in self.showing[each[1]])]
            self.skipped["objects that no other image shows"] += len(annotations) - len(kept)
            if kept:
                self.records.append((file_name, number, size, is_stored_thin, kept))
            else:
                self.skipped["images that no other image shows a category of"] += 1

    def key(self, index: int) -> int | str:
        _, number, _, _, annotations = self.records[index]
        return annotations[0][0]["id"] if self.source.task == "interactive" else number

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        file_name, number, size, is_stored_thin, annotations = self.records[index]
        picture = read_image(self.images / file_name, size)
        is_interactive = self.source.task == "interactive"
        if is_interactive:
            annotations = [annotations[rng.integers(len(annotations))]]
        groups = defaultdict(list)  # of a category, the objects and their masks
        for each in sorted(annotations, key=lambda each: each[1]):
            shape = take(each[0], "segmentation", (dict, list), each[3])
            mask = decode_mask(shape, size, each[3], may_be_empty=not is_interactive)
            if mask.any():  # a few of COCO's objects are smaller than a pixel
                groups[each[1]].append((each, mask))
        if not groups:
            raise ValueError(f"{self.annotations}: image {number}: no object has a pixel")
        shown = list(groups)
        if self.source.split == "train":
            shown = rng.permutation(shown).tolist()
        reference_images = None
        if self.source.is_cross:
            pairs = [self.region_elsewhere(category, number, rng) for category in shown]
            reference_images, regions = map(list, zip(*pairs, strict=True))
        else:
            objects = [[each for each, _ in groups[category]] for category in shown]
            regions = np.stack([self.region(each, size, is_stored_thin, rng) for each in objects])
        counts = [len(groups[category]) for category in shown]
        return Sample(
            sample_id=f"{self.name}/{number}/{index}",
            task=self.source.task,
            image=picture,
            turns=[self.turn(["<region>"] * len(shown), rng)],
            masks=np.stack([mask for category in shown for _, mask in groups[category]]),
            labels=np.repeat(np.arange(len(shown)), counts),
            names=["object"] if is_interactive else [self.category_names[each] for each in shown],
            regions=regions,
            region_images=reference_images,
            category_ids=shown,
            image_id=number,
        )

    def num_words(self, index: int) -> int:
        """Categories that are shown."""
        if self.source.task == "interactive":
            return 1
        return len({category for _, category, _, _ in self.records[index][-1]})

    def region(
        self, group: list, size: tuple[int, int], is_stored_thin: bool, rng: np.random.Generator
    ) -> np.ndarray:
        """A random prompt for one of the objects of `group`, bool [H, W]; empty where none of them
        has such a prompt."""
        usable = self.with_prompt(group)
        if not usable:
            return np.zeros(size, bool)
        _, _, prompts, where = usable[rng.integers(len(usable))]
        kind = self.source.prompt or list(prompts)[rng.integers(len(prompts))]
        region = decode_mask(prompts[kind], size, where)
        return dilate(region, PROMPT_RADII.get(kind, 0)) if is_stored_thin else region

    def region_elsewhere(
        self, category: int, number: int | str, rng: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray]:
        """An image other than `number` and the prompt of one of its objects of `category`, drawn
        among all such objects."""
        others = [place for place, image in enumerate(self.showing[category]) if image != number]
        reference_image = self.reference_images[category][others[rng.integers(len(others))]]
        file_name, _, size, is_stored_thin, group = reference_image
        picture = read_image(self.images / file_name, size)
        return picture, self.region(group, size, is_stored_thin, rng)
