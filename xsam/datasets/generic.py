"""Generic and open-vocabulary segmentation: COCO and ADE20K, panoptic, instance and semantic.

A class is named in the prompt (paper section 3.1); formats in `samples.Dataset`'s terms. Legend: T
targets, H W image size.
"""

import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from xsam.data import Sample
from xsam.datasets.base import Dataset, by_id, read_categories
from xsam.datasets.formats import (
    SEGMENT_IDS,
    decode_mask,
    num_bad_rings,
    read_class_map,
    read_image,
    read_json,
    read_segment_ids,
    take,
    take_flag,
    take_size,
)


class Generic(Dataset):
    """Classes that are named in the prompt; a class's contiguous index is the rank of its id.

    With `all_classes` the prompt names all of them in that order (stage 1, evaluation); else those
    present and a random number of others, shuffled.
    """

    def index(self) -> None:
        content = read_json(self.annotations, dict)
        where = str(self.annotations)
        categories = read_categories(content, where)
        self.category_index = {number: index for index, number in enumerate(categories)}
        self.names = [category["name"] for category in categories.values()]
        self.is_thing = [
            take_flag(category, "isthing", f"{where}: category {number}", default=True)
            for number, category in categories.items()
        ]
        images = by_id(take(content, "images", list, where), f"{where}: images")
        self.index_images(content, images)

    @property
    def categories(self) -> tuple[dict, ...]:
        """Names and kinds, as a configuration keeps them."""
        pairs = zip(self.names, self.is_thing, strict=True)
        return tuple({"name": name, "is_thing": is_thing} for name, is_thing in pairs)

    def index_images(self, content: dict, images: dict[int | str, dict]) -> None:
        raise NotImplementedError

    def key(self, index: int) -> int | str:
        return self.records[index][0]["id"]

    def open_image(self, image: dict) -> tuple[Image.Image, tuple[int, int], str]:
        """The picture, its size as annotated, and the name of a PNG that belongs to it."""
        where = f"{self.annotations}: image {image['id']}"
        name, size = Path(take(image, "file_name", str, where)), take_size(image, where)
        return read_image(self.images / name, size), size, f"{name.stem}.png"

    def category_of(self, record: dict, where: str) -> int:
        number = take(record, "category_id", int, where)
        if number not in self.category_index:
            raise ValueError(f"{where}: category {number} is not in its categories")
        return self.category_index[number]

    def make(
        self,
        image: dict,
        picture: Image.Image,
        masks: np.ndarray,
        classes: list[int],
        ignore: np.ndarray | None,
        rng: np.random.Generator,
    ) -> Sample:
        """The sample of masks [T, H, W] and their contiguous classes."""
        present = np.unique(np.array(classes, np.int64))
        prompt = np.arange(len(self.names))
        if not self.all_classes:
            absent = np.setdiff1d(prompt, present)
            least = int(not len(present))  # a question has to name something
            negatives = rng.choice(absent, rng.integers(least, len(absent) + 1), replace=False)
            prompt = rng.permutation(np.concatenate([present, negatives]))
        place = {category: position for position, category in enumerate(prompt.tolist())}
        names, ids = [self.names[category] for category in prompt], list(self.category_index)
        return Sample(
            sample_id=f"{self.name}/{image['id']}",
            task="generic",
            image=picture,
            turns=[self.turn(names, rng)],
            masks=masks,
            labels=np.array([place[category] for category in classes], np.int64),
            ignore=ignore,
            names=names,
            category_ids=[ids[category] for category in prompt],
            image_id=image["id"],
        )


class Panoptic(Generic):
    """COCO panoptic: every segment of an image and its class. Crowd regions and void carry no
    label. The PNG has the name of the image."""

    def index_images(self, content: dict, images: dict[int | str, dict]) -> None:
        where = str(self.annotations)
        segments = {}
        for record in take(content, "annotations", list, where):
            with self.record():
                number = take(record, "image_id", (int, str), f"{where}: annotation")
                at = f"{where}: image {number}"
                if number not in images:
                    raise ValueError(f"{at}: has segments but is not in its images")
                if number in segments:
                    raise ValueError(f"{at}: is annotated more than once")
                segments[number] = take(record, "segments_info", list, at)
        for number, image in images.items():
            if segments.get(number):
                self.records.append((image, segments[number]))
            else:
                self.skipped["images without segments"] += 1

    def read(self, index: int) -> tuple[Image.Image, np.ndarray, list[dict]]:
        """Image, map [H, W] of 1 + the place of each pixel's segment (0 is void), and the segments,
        each with its contiguous class as "class"; all checked against each other."""
        image, records = self.records[index]
        picture, size, name = self.open_image(image)
        path = self.masks / name
        segments = []
        for record in records:
            where = f"{self.annotations}: image {image['id']}"
            where = f"{where}, segment {take(record, 'id', int, where)}"
            is_crowd = take_flag(record, "iscrowd", where)
            category = self.category_of(record, where)
            segments.append(record | {"class": category, "iscrowd": is_crowd})
        numbers = [0] + [segment["id"] for segment in segments]
        if len(set(numbers)) < len(numbers):
            raise ValueError(
                f"{self.annotations}: image {image['id']}: a segment id is there twice"
            )
        if not 0 <= min(numbers) <= max(numbers) < len(SEGMENT_IDS):
            raise ValueError(f"{self.annotations}: image {image['id']}: a segment id is no colour")
        table = np.zeros(len(SEGMENT_IDS), np.int32)  # the pages that are not used cost nothing
        table[numbers] = np.arange(len(numbers))
        ids = read_segment_ids(path, size)
        owner = table[ids]
        is_unknown = (owner == 0) & (ids != 0)
        if is_unknown.any():
            raise ValueError(f"{path}: segment id {ids[is_unknown][0]} is not in its segments_info")
        return picture, owner, segments

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        picture, owner, segments = self.read(index)
        places = [place for place, each in enumerate(segments, 1) if not each["iscrowd"]]
        masks = owner == np.array(places, np.int32)[:, None, None]
        classes = [segments[place - 1]["class"] for place in places]
        is_labelled = masks.any(axis=0)
        is_visible = masks.any(axis=(1, 2))  # ADE20K lists stuff that things cover wholly
        classes = list(itertools.compress(classes, is_visible))
        image = self.records[index][0]
        return self.make(image, picture, masks[is_visible], classes, ~is_labelled, rng)


class Instances(Generic):
    """COCO instances: polygons or RLE. Crowd regions carry no label, all else that is not an
    instance is background. Images without a single instance are left out, but in evaluation, where
    what a model finds in them is wrong."""

    def index_images(self, content: dict, images: dict[int | str, dict]) -> None:
        where = str(self.annotations)
        by_image, seen = defaultdict(list), set()
        for record in take(content, "annotations", list, where):
            with self.record():
                annotation_id = take(record, "id", (int, str), f"{where}: annotation")
                at = f"{where}: annotation {annotation_id}"
                if annotation_id in seen:
                    raise ValueError(f"{at}: is there more than once")
                seen.add(annotation_id)
                number = take(record, "image_id", (int, str), at)
                if number not in images:
                    raise ValueError(f"{at}: image {number} is not in its images")
                take_flag(record, "iscrowd", at)
                self.skipped["invalid rings"] += num_bad_rings(record.get("segmentation"))
                by_image[number].append(record)
        for number, image in images.items():
            is_scored = self.source.split == "val"
            if is_scored or any(not record.get("iscrowd") for record in by_image[number]):
                self.records.append((image, by_image[number]))
            else:
                self.skipped["images without instances"] += 1

    def read(self, index: int) -> tuple[Image.Image, list[tuple[int, np.ndarray, bool]]]:
        """Image, and of each object its contiguous class, its mask, bool [H, W], empty for a few of
        COCO's, and whether it is a crowd region."""
        image, annotations = self.records[index]
        picture, size, _ = self.open_image(image)
        objects = []
        for annotation in annotations:
            where = f"{self.annotations}: annotation {annotation['id']}"
            category = self.category_of(annotation, where)
            shape = take(annotation, "segmentation", (dict, list), where)
            mask = decode_mask(shape, size, where, may_be_empty=True)
            objects.append((category, mask, bool(annotation.get("iscrowd"))))
        return picture, objects

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        picture, objects = self.read(index)
        size = picture.height, picture.width
        shown = [(each, mask) for each, mask, is_crowd in objects if not is_crowd and mask.any()]
        classes, masks = [each for each, _ in shown], np.array([mask for _, mask in shown], bool)
        crowd = np.array([mask for _, mask, is_crowd in objects if is_crowd], bool)
        masks, crowd = masks.reshape(-1, *size), crowd.reshape(-1, *size).any(axis=0)
        # An instance keeps its label where a crowd region lies over it.
        ignore = crowd & ~masks.any(axis=0)
        return self.make(self.records[index][0], picture, masks, classes, ignore, rng)


class Semantic(Generic):
    """Class maps: 8-bit PNGs of contiguous classes, 255 where nothing is labelled. The categories
    are those of the panoptic file."""

    def index_images(self, content: dict, images: dict[int | str, dict]) -> None:
        self.is_thing = [False] * len(self.names)  # a class is one region
        where = f"{self.annotations}: annotation"
        labelled = set()
        for record in take(content, "annotations", list, str(self.annotations)):
            with self.record():
                labelled.add(take(record, "image_id", (int, str), where))
        for number, image in images.items():
            if number in labelled:
                self.records.append(image)
            else:
                self.skipped["images without segments"] += 1

    def key(self, index: int) -> int | str:
        return self.records[index]["id"]

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Image and its class map, uint8 [H, W]."""
        picture, size, name = self.open_image(self.records[index])
        path = self.masks / name
        classes = read_class_map(path, size)
        largest = classes.max(initial=0, where=classes != 255)
        if largest >= len(self.names):
            raise ValueError(f"{path}: class {largest}, but there are {len(self.names)}")
        return picture, classes

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        picture, classes = self.read(index)
        present = np.unique(classes[classes != 255]).tolist()
        masks = classes == np.array(present, np.uint8)[:, None, None]
        return self.make(self.records[index], picture, masks, present, classes == 255, rng)
