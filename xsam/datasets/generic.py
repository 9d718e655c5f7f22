"""Generic and open-vocabulary segmentation: COCO and ADE20K, panoptic, instance and semantic.

The prompt names classes, the targets are what belongs to them (paper section 3.1). Legend: T
targets, H W image size.
"""

import itertools
from collections import Counter, defaultdict

import numpy as np
from PIL import Image

from xsam.data import Sample
from xsam.datasets import formats, records
from xsam.datasets.base import Dataset, read_categories
from xsam.datasets.records import CocoImage, CocoInstance, CocoSegment, Id, label, parse, take
from xsam.datasets.sources import is_own
from xsam.files import find_file, is_file, read_json
from xsam.images import read_image


class Generic(Dataset):
    """Classes that are named in the prompt; a class's contiguous index is the rank of its id.

    With `all_classes` the prompt names all of them in that order (stage 1, evaluation); else those
    present and a random number of others, shuffled. The first entry of a record is its image.
    """

    def index(self) -> None:
        content, where = read_json(self.annotations, dict), str(self.annotations)
        categories = read_categories(content, where)
        self.category_index = {number: index for index, number in enumerate(categories)}
        self.names = [category.name for category in categories.values()]
        self.is_thing = [category.is_thing for category in categories.values()]
        images = records.by_id(content, "images", where)
        self.index_images(images, take(content, "annotations", list, where))
        self.keep_part(str(image.get("file_name")) for image in images.values())

    @property
    def categories(self) -> tuple[dict, ...]:
        """Names and kinds, as a configuration keeps them."""
        pairs = zip(self.names, self.is_thing, strict=True)
        return tuple({"name": name, "is_thing": is_thing} for name, is_thing in pairs)

    def index_images(self, images: dict[Id, dict], annotations: list) -> None:
        """Fills `records` from the file's images, by id, and its annotations."""
        raise NotImplementedError

    def key(self, index: int) -> Id:
        return self.records[index][0].id

    def image_name(self, record: tuple) -> str:
        return record[0].file_name

    def image(self, record: dict) -> CocoImage:
        """An entry of the file's images. Raises ValueError where a field is wrong."""
        return parse(CocoImage, record, f"{self.annotations}: image {record['id']}")

    def open_image(self, image: CocoImage) -> Image.Image:
        """The picture, of the size that the file tells. Raises ValueError where there is none."""
        path = find_file(self.images, image.file_name)
        if is_own(self.name) and not is_file(path):
            raise ValueError(
                f"{self.annotations}: image {image.id}: {path} is not there; name the folder of "
                "its images after a colon, FILE.json:FOLDER"
            )
        return read_image(path, image.size)

    def make(
        self,
        image: CocoImage,
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
        prompt = prompt.tolist()
        position = {category: index for index, category in enumerate(prompt)}
        labels = np.array([position[category] for category in classes], np.int64)
        names, ids = [self.names[category] for category in prompt], list(self.category_index)
        sample_id, turns = f"{self.name}/{image.id}", [self.turn(names, rng)]
        sample = Sample(sample_id, self.source.task, picture, turns, masks, labels, ignore, names)
        sample.category_ids, sample.image_id = [ids[category] for category in prompt], image.id
        return sample


class Panoptic(Generic):
    """COCO panoptic: every segment of an image and its class. Crowd regions and void carry no
    label. The annotation names the PNG."""

    prediction_kind = "panoptic"
    needs_segments = True  # an annotation without any is skipped

    def index_images(self, images: dict[Id, dict], annotations: list) -> None:
        found = {}
        for index, record in enumerate(annotations):
            with self.record():
                name = label(record, "image_id", "image {}", f"annotations[{index}]")
                where = f"{self.annotations}: {name}"
                number, _ = records.unpack(record, where, image_id=Id, segments_info=list)
                if number not in images:
                    raise ValueError(f"{where}: has segments but is not in its images")
                if number in found:
                    raise ValueError(f"{where}: is annotated more than once")
                found[number] = record
        for number, image in images.items():
            infos = found[number]["segments_info"] if number in found else None
            if infos is None or (not infos and self.needs_segments):
                self.skipped["images without segments"] += 1
                continue
            with self.record():
                image = self.image(image)
                png = formats.png_name(found[number], image.file_name)
                self.records.append((image, self.segments(number, infos), png))

    def segments(self, image_id: Id, infos: list) -> list[CocoSegment]:
        """An image's segments, known to have ids that differ and categories of the file."""
        where, segments = f"{self.annotations}: image {image_id}", []
        for record in infos:
            at = where + label(record, "id", ", segment {}", "")
            segments.append(parse(CocoSegment, record, at))
            records.check_category(segments[-1].category_id, self.category_index, at)
        ids = [0, *(segment.id for segment in segments)]
        if len(set(ids)) < len(ids):
            number = Counter(ids).most_common(1)[0][0]
            raise ValueError(
                f"{where}: segment id {number} is {'there twice' if number else 'void'}"
            )
        if not 0 <= min(ids) <= max(ids) < len(formats.SEGMENT_IDS):
            raise ValueError(f"{where}: a segment id is no colour")
        return segments

    def read(self, index: int) -> tuple[Image.Image, np.ndarray, list[dict]]:
        """The picture; a map [H, W] of 1 + the index of the segment that a pixel belongs to, 0
        being void; and the segments, with their contiguous class as "class"."""
        image, segments, png = self.records[index]
        picture, path = self.open_image(image), find_file(self.masks, png)
        ids = formats.read_segment_ids(path, image.size)
        numbers = [0, *(segment.id for segment in segments)]
        table = np.zeros(len(formats.SEGMENT_IDS), np.int32)  # unused pages take no memory
        table[numbers] = np.arange(len(numbers))
        segment_index = table[ids]  # [H, W]
        is_unknown = (segment_index == 0) & (ids != 0)
        if is_unknown.any():
            raise ValueError(f"{path}: segment id {ids[is_unknown][0]} is not in its segments_info")
        classes = [self.category_index[segment.category_id] for segment in segments]
        pairs = zip(segments, classes, strict=True)
        return picture, segment_index, [s._asdict() | {"class": category} for s, category in pairs]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        picture, segment_index, segments = self.read(index)
        indices = [i for i, segment in enumerate(segments, 1) if not segment["iscrowd"]]
        masks = segment_index == np.array(indices, np.int32)[:, None, None]  # [segments, H, W]
        ignore = ~masks.any(axis=0)
        is_visible = masks.any(axis=(1, 2))  # ADE20K lists stuff that things cover wholly
        classes = [segments[i - 1]["class"] for i in itertools.compress(indices, is_visible)]
        image = self.records[index][0]
        return self.make(image, picture, masks[is_visible], classes, ignore, rng)


class Instances(Generic):
    """COCO instances: polygons or RLE. Crowd regions carry no label, all else that is not an
    instance is background. Images without an instance are skipped, except in evaluation, where
    whatever a model finds in them is wrong."""

    prediction_kind = "instances"

    def index_images(self, images: dict[Id, dict], annotations: list) -> None:
        by_image, seen, are_fractions = defaultdict(list), set(), True
        for index, record in enumerate(annotations):
            with self.record():
                name = label(record, "id", "annotation {}", f"annotations[{index}]")
                where = f"{self.annotations}: {name}"
                shape = record.get("segmentation") if isinstance(record, dict) else {}
                parts, num_invalid = records.mask_parts(shape or [])
                self.skipped["invalid rings"] += num_invalid
                if not parts:
                    self.skipped["objects without a mask (a box alone)"] += 1
                    continue
                instance = parse(CocoInstance, record, where)
                if instance.id in seen:
                    raise ValueError(f"{where}: is there more than once")
                seen.add(instance.id)
                if instance.image_id not in images:
                    raise ValueError(f"{where}: image {instance.image_id!r} is not in its images")
                self.skipped["crowd regions (iscrowd 1) without a label"] += instance.iscrowd
                by_image[instance.image_id].append(instance)
                are_fractions = are_fractions and all(map(_is_fraction, parts))
        if by_image and are_fractions:
            raise ValueError(f"{self.annotations}: corners are fractions of the image; give pixels")
        is_scored = self.source.split == "val"
        for number, image in images.items():
            if not is_scored and all(instance.iscrowd for instance in by_image[number]):
                self.skipped["images without instances"] += 1
                continue
            with self.record():
                for instance in by_image[number]:
                    where = f"{self.annotations}: annotation {instance.id}"
                    records.check_category(instance.category_id, self.category_index, where)
                self.records.append((self.image(image), by_image[number]))

    def read(self, index: int) -> tuple[Image.Image, list[tuple[int, np.ndarray, bool]]]:
        """The picture, and of every object its contiguous class, its mask, bool [H, W], which is
        empty for a few of COCO's, and whether it is a crowd region."""
        image, instances = self.records[index]
        picture = self.open_image(image)
        objects = []
        for instance in instances:
            where = f"{self.annotations}: annotation {instance.id}"
            mask = formats.decode_mask(instance.segmentation, image.size, where, may_be_empty=True)
            category = self.category_index[instance.category_id]
            objects.append((category, mask, instance.iscrowd))
        return picture, objects

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        picture, objects = self.read(index)
        size = picture.height, picture.width
        shown = [(c, mask) for c, mask, is_crowd in objects if not is_crowd and mask.any()]
        masks = np.array([mask for _, mask in shown], bool).reshape(-1, *size)  # [T, H, W]
        crowd = np.array([mask for _, mask, is_crowd in objects if is_crowd], bool)
        # An instance keeps its label where a crowd region lies over it.
        ignore = crowd.reshape(-1, *size).any(axis=0) & ~masks.any(axis=0)  # [H, W]
        classes = [category for category, _ in shown]
        return self.make(self.records[index][0], picture, masks, classes, ignore, rng)


def _is_fraction(ring: list | dict) -> bool:
    """Whether a polygon lies within the first pixel, as of exporters that count from 0 to 1."""
    numbers = ring if isinstance(ring, list) else [2]
    return all(isinstance(number, int | float) and abs(number) <= 1 for number in numbers)


class Semantic(Panoptic):
    """Class maps: 8-bit PNGs of contiguous classes, 255 where nothing is labelled. Categories and
    the names of the PNGs are those of the panoptic file."""

    prediction_kind = "semantic"
    needs_segments = False

    def index_images(self, images: dict[Id, dict], annotations: list) -> None:
        super().index_images(images, annotations)
        self.is_thing = [False] * len(self.names)  # a class is one region

    def segments(self, image_id: Id, infos: list) -> list[CocoSegment]:
        """None are kept: the map says which classes there are."""
        return []

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The picture and its class map, uint8 [H, W]."""
        image, _, png = self.records[index]
        picture, path = self.open_image(image), find_file(self.masks, png)
        classes = formats.read_class_map(path, image.size)
        largest = classes.max(initial=0, where=classes != 255)
        if largest >= len(self.names):
            raise ValueError(f"{path}: class {largest}, but there are {len(self.names)}")
        return picture, classes

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        picture, classes = self.read(index)
        present = np.unique(classes[classes != 255]).tolist()
        masks = classes == np.array(present, np.uint8)[:, None, None]  # [T, H, W]
        return self.make(self.records[index][0], picture, masks, present, classes == 255, rng)


class Regions(Panoptic):
    """A user's own panoptic file without things: a region for each class, read as such, and as a
    class map like that of `Semantic` for scoring."""

    prediction_kind = "semantic"

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        picture, segment_index, segments = super().read(index)
        if len(self.names) > 255:
            raise ValueError(f"{self.annotations}: {len(self.names)} classes, a map holds 255")
        classes = [255] + [255 if each["iscrowd"] else each["class"] for each in segments]
        return picture, np.array(classes, np.uint8)[segment_index]  # [H, W]

    sample = Semantic.sample
