"""Referring and reasoning segmentation: RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO, ReasonSeg, and
expressions of a user's own.

Each phrase has a <SEG> and a mask of its own. One that nothing fits has an answer that there is no
such thing, or a <SEG> without a mask. Legend: T targets, H W image size.
"""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from xsam.data import Sample
from xsam.datasets import formats, records
from xsam.datasets.base import Dataset, Packed, pack
from xsam.datasets.formats import decode_mask, told_size
from xsam.datasets.records import CocoImage, Segmentation, expect, label, parse, take, unpack
from xsam.files import IMAGE_SUFFIXES, find_file, is_file, list_files, read_json
from xsam.images import read_image, read_image_size, read_region
from xsam.prompts import check_words

MAX_TURNS = 8  # referred objects of one training conversation


# ---- referring: RefCOCO/+/g, gRefCOCO, a user's own ----------------------------------------------


class Referring(Dataset):
    """Conversations with a turn for every expression, even one that nothing in the image fits.

    `groups` has every image once, with its expressions: what says of their masks, None where
    nothing fits, and their texts. A record is the number of a group, and where those of its
    expressions begin and end that evaluation asks for, or `check` reads. A training sample draws
    how many expressions of the image it asks for (1 to MAX_TURNS, all equally likely), which, in
    which order, and a text of each.
    """

    groups: Packed
    prediction_kind = "mask"

    @property
    def is_training(self) -> bool:
        """Whether samples are drawn; else every text is asked for in turn."""
        return self.source.split in ("", "train")

    def add_group(
        self, groups: list[bytes], image: Any, phrases: list[tuple], where: str
    ) -> list[tuple[int, int, int]]:
        """Adds an image and its expressions to the groups; returns their records."""
        size = MAX_TURNS
        if not self.is_training:
            phrases, size = [(mask, [text]) for mask, texts in phrases for text in texts], 1
        groups.append(pack((image, phrases), where))
        return [(len(groups) - 1, start, start + size) for start in range(0, len(phrases), size)]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        if not self.is_training:
            return self.check(index, rng)
        image, phrases = self.groups[self.records[index][0]]
        count = rng.integers(1, min(len(phrases), MAX_TURNS) + 1)
        chosen = [phrases[i] for i in rng.permutation(len(phrases))[:count]]
        return self.build(index, (image, phrases), chosen, rng)

    def check(self, index: int, rng: np.random.Generator) -> Sample:
        group, phrases = self.asked(index)
        return self.build(index, group, phrases, rng)

    def asked(self, index: int) -> tuple[tuple[Any, list], list[tuple]]:
        """The group of a record, and those of its expressions that the record asks for."""
        number, start, stop = self.records[index]
        group = self.groups[number]
        return group, group[1][start:stop]

    def is_present(self, index: int) -> bool:
        """Of a set that is scored: whether anything in the image fits the expression."""
        return self.asked(index)[1][0][0] is not None

    def num_words(self, index: int) -> int:
        return sum(len(str(text).split()) for _, texts in self.asked(index)[1] for text in texts)

    def build(
        self, index: int, group: tuple, phrases: list[tuple], rng: np.random.Generator
    ) -> Sample:
        """The sample that asks for these `phrases` of a group, in this order."""
        raise NotImplementedError

    def make(
        self,
        sample_id: str,
        image_id: int | str,
        picture: Image.Image,
        objects: list[tuple[str, np.ndarray | None]],
        rng: np.random.Generator,
    ) -> Sample:
        """The sample of (expression, mask bool [H, W] or None where there is no such thing). Half
        of the time training has a <SEG> for that too, whose queries are all background."""
        names, masks = map(list, zip(*objects, strict=True))
        kinds = ["absent" if mask is None else "answers" for mask in masks]
        if self.is_training:
            kinds = [kind if rng.random() < 0.5 else "answers" for kind in kinds]
        turns = [self.turn([name], rng, kind) for name, kind in zip(names, kinds, strict=True)]
        labels = np.flatnonzero([mask is not None for mask in masks])
        found = np.array([masks[index] for index in labels], bool)
        found = found.reshape(-1, picture.height, picture.width)  # [T, H, W]
        task = self.source.task
        return Sample(
            sample_id, task, picture, turns, found, labels, names=names, image_id=image_id
        )


class RefCoco(Referring):
    """RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO, whose expressions may mean several objects or none.

    Training: as many samples as an image has sentences, or combinations of a sentence of each of
    its refs where those are fewer, times the conversations of MAX_TURNS that its refs fill.
    Evaluation: one sample per ref and sentence. Only refs of the split are read, also where an
    image has refs of several, as in RefCOCOg's google file. Refs without a sentence, which
    gRefCOCO's file has, are skipped.
    """

    def index(self) -> None:
        content, where = read_json(self.instances, dict), str(self.instances)
        images = records.by_id(content, "images", where)
        annotations = records.by_id(content, "annotations", where)
        by_image = defaultdict(list)
        for index, ref in enumerate(formats.read_refs(self.annotations)):
            with self.record():
                image_id, split, numbers, texts = self.read_ref(ref, index, images, annotations)
                if split == self.source.split and not texts:
                    self.skipped["refs without a sentence"] += 1
                elif split == self.source.split:
                    by_image[image_id].append((numbers, texts))
        chosen = dict(sorted(by_image.items()))
        # The files hold four times as many annotations as are referred to.
        used = sorted({n for refs in chosen.values() for numbers, _ in refs for n in numbers})
        self.objects = Packed([pack(annotations[n], f"{self.instances}: {n}") for n in used])
        index_of = {number: index for index, number in enumerate(used)}
        groups: list[bytes] = []
        for image_id, refs in chosen.items():
            phrases = [([index_of[n] for n in numbers] or None, texts) for numbers, texts in refs]
            counts, where = [len(texts) for _, texts in refs], f"{self.instances}: image {image_id}"
            times = min(sum(counts), math.prod(counts)) if self.is_training else 1
            with self.record():
                self.records += self.add_group(groups, images[image_id], phrases, where) * times
        self.groups = Packed(groups)

    def read_ref(
        self, ref: dict, index: int, images: dict, annotations: dict
    ) -> tuple[int, str, list[int], list[str]]:
        """Image, split, annotations (none: there is no such thing), and sentences in lower case;
        for training sorted and without repeats."""
        where = f"{self.annotations}: {label(ref, 'ref_id', 'ref {}', f'ref {index}')}"
        image_id, numbers, sentences, split = unpack(
            ref, where, image_id=int, ann_id=int | list, sentences=list, split=str
        )
        if image_id not in images:
            raise ValueError(f"{where}: image {image_id} is not in {self.instances}")
        if numbers == []:
            raise ValueError(f"{where}: 'ann_id' is empty; [-1] says that there is no such thing")
        numbers = [] if numbers == [-1] else numbers if isinstance(numbers, list) else [numbers]
        numbers = [expect(records.whole(number), int, f"{where}: 'ann_id'") for number in numbers]
        for number in numbers:
            if number not in annotations:
                raise ValueError(f"{where}: annotation {number} is not in {self.instances}")
            at = f"{self.instances}: annotation {number}"
            of_image, _ = unpack(annotations[number], at, image_id=int, segmentation=Segmentation)
            if of_image != image_id:
                raise ValueError(f"{where}: annotation {number} is of another image")
        texts = [take(sentence, "sent", str, where).strip().lower() for sentence in sentences]
        if "" in texts:
            raise ValueError(f"{where}: an expression is empty")
        for text in texts:
            check_words(text, where)
        is_training = self.source.split == "train"
        return image_id, split, numbers, sorted(set(texts)) if is_training else texts

    def key(self, index: int) -> str:
        return f"{self.groups[self.records[index][0]][0]['id']}/{index}"

    def build(
        self, index: int, group: tuple, phrases: list[tuple], rng: np.random.Generator
    ) -> Sample:
        record, _ = group
        image = parse(CocoImage, record, f"{self.instances}: image {record['id']}")
        picture = read_image(find_file(self.images, image.file_name), image.size)
        objects = []
        for indices, texts in phrases:
            masks = [self.mask(self.objects[i], image.size) for i in indices or ()]
            text = texts[rng.integers(len(texts))]
            objects.append((text, np.any(masks, axis=0) if masks else None))
        return self.make(f"{self.name}/{image.id}/{index}", image.id, picture, objects, rng)

    def mask(self, annotation: dict, size: tuple[int, int]) -> np.ndarray:
        """The mask, bool [H, W], of an annotation of the instances file."""
        where = f"{self.instances}: annotation {annotation['id']}"
        return decode_mask(take(annotation, "segmentation", Segmentation, where), size, where)


class OwnReferring(Referring):
    """A user's own: a list of {"image", "masks", "texts"}, as many masks as texts. A mask is a list
    of polygons, an RLE, the path of a PNG, or null where the image has no such thing; a text is a
    string or a list of alternatives."""

    def index(self) -> None:
        groups: list[bytes] = []
        for index, record in enumerate(read_json(self.annotations, list)):
            where = f"{self.annotations}: record {index}"
            with self.record():
                image, masks, texts = unpack(record, where, image=str, masks=list, texts=list)
                if not masks or len(masks) != len(texts):
                    raise ValueError(f"{where}: {len(masks)} masks but {len(texts)} texts")
                texts = [text if isinstance(text, list) else [text] for text in texts]
                phrases = list(zip(masks, texts, strict=True))
                self.records += self.add_group(groups, (where, image), phrases, where)
        self.groups = Packed(groups)
        self.keep_part(map(self.image_name, self.records))

    def image_name(self, record: tuple) -> str:
        (_, name), _ = self.groups[record[0]]
        return name

    def key(self, index: int) -> str:
        return f"{self.image_name(self.records[index])}/{index}"

    def build(
        self, index: int, group: tuple, phrases: list[tuple], rng: np.random.Generator
    ) -> Sample:
        try:
            return self.read(index, group, phrases, rng)
        except ValueError as error:
            where = "" if str(self.annotations) in str(error) else f"{group[0][0]}: "
            raise ValueError(f"{where}{error}") from error

    def read(
        self, index: int, group: tuple, phrases: list[tuple], rng: np.random.Generator
    ) -> Sample:
        """See `build`."""
        (where, name), every = group
        told = (self.told_size(mask) for mask, _ in every)  # by those that are not asked for, too
        picture = read_image(find_file(self.images, name), next(filter(None, told), None))
        size = picture.height, picture.width
        objects = []
        for mask, texts in phrases:
            if not is_texts(texts):
                raise ValueError(f"{where}: a text is empty or no string")
            text = check_words(texts[rng.integers(len(texts))].strip(), where)
            if isinstance(mask, str):
                mask = read_region(find_file(self.images, mask), size)
            elif mask is not None:
                mask = decode_mask(expect(mask, Segmentation, f"{where}: a mask"), size, where)
            objects.append((text, mask))
        return self.make(f"{self.name}/{index}", name, picture, objects, rng)

    def told_size(self, mask: Segmentation | str | None) -> tuple[int, int] | None:
        """The size of the image, where its mask tells it."""
        if isinstance(mask, str):
            return read_image_size(find_file(self.images, mask))
        return told_size(mask)


def is_texts(values: list) -> bool:
    """Whether it is one or more strings, none of them blank."""
    return bool(values) and all(isinstance(text, str) and text.strip() for text in values)


# ---- reasoning -----------------------------------------------------------------------------------


Shape = tuple[bool, list[tuple[int, int]]]  # whether it is ignored, and its corners


class Reason(Dataset):
    """ReasonSeg: a folder of NAME.json, each beside its image, NAME.jpg (or .png, ...) unless its
    "imagePath" says otherwise; what else lies there is counted. All target shapes of an image are
    one mask; pixels of "ignore" shapes have no label.

    Training: one sample an image, which draws one of its texts, and half of the time the
    explanation, where there is one. Evaluation: one sample for every text.
    """

    prediction_kind = "mask"

    def index(self) -> None:
        self.explanations = defaultdict(list)
        explained = read_json(self.instances, list) if self.source.instances else []
        for index, record in enumerate(explained):
            where = f"{self.instances}: record {index}"
            with self.record():
                image, outputs = unpack(record, where, image=str, outputs=str)
                stem = Path(image.replace("\\", "/")).stem
                self.explanations[stem].append(check_words(outputs.strip(), where))
        paths = list_files(self.annotations, ".json")
        for path in paths:
            with self.record():
                self.index_file(path)
        stems = {path.stem for path in list_files(self.annotations, *IMAGE_SUFFIXES)}
        self.skipped["images without an annotation"] = len(stems - {path.stem for path in paths})

    def index_file(self, path: Path) -> None:
        """The records of a file, or what it is counted as where it has none."""
        content = read_json(path, last_resort="cp1252")  # some of the files are
        about = content if isinstance(content, dict) else {}
        names, size = labelme_image(path, about)
        image = find_file(self.annotations, *names)
        if not is_file(image):
            if "shapes" not in about:
                self.skipped["JSON files of something else"] += 1
                return
            raise ValueError(f"{path}: its image {names[0]} is not beside it")
        texts, is_sentence, drawn = unpack(
            content, str(path), text=list, is_sentence=bool, shapes=list
        )
        if not is_texts(texts):
            raise ValueError(f"{path}: a text is missing or no string")
        shapes = []
        for index, record in enumerate(drawn):
            where = f"{path}: shape {index}"
            name, points = unpack(record, where, label=str, points=list)
            if name.lower() != "flag":
                outline = corners(whole_pixels(points, where), record.get("shape_type"), where)
                shapes.append(("ignore" in name.lower(), outline))
        if not self.has_target(shapes, path, image, size):
            self.skipped["images without a target"] += 1
            return
        texts = [check_words(text.strip(), str(path)) for text in texts]
        chosen = [texts] if self.source.split == "train" else [[text] for text in texts]
        self.records += [(path, image, size, texts, is_sentence, shapes) for texts in chosen]

    def has_target(
        self, shapes: list[Shape], path: Path, image: Path, size: tuple[int, int] | None
    ) -> bool:
        """Whether a target shows; painting takes time, and is needed where one may be covered."""
        num_ignored = sum(is_ignored for is_ignored, _ in shapes)
        if num_ignored in (0, len(shapes)):
            return num_ignored < len(shapes)
        return bool((paint_shapes(shapes, size or read_image_size(image), str(path)) == 1).any())

    def key(self, index: int) -> str:
        return f"{self.records[index][0].stem}/{index}"

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        path, image, size, texts, _, shapes = self.records[index]
        stem, picture = path.stem, read_image(image, size)
        labels = paint_shapes(shapes, (picture.height, picture.width), str(path))
        if not (labels == 1).any():
            raise ValueError(f"{path}: its target lies outside the image")
        text = texts[rng.integers(len(texts))]
        question, answer = self.turn([text], rng)
        explanations = self.explanations.get(stem)
        if explanations and rng.random() < 0.5:
            answer = f"{explanations[rng.integers(len(explanations))]} {answer}"
        sample_id, turns, masks = f"{self.name}/{stem}/{index}", [(question, answer)], labels == 1
        labels, ignore, task = np.zeros(1, np.int64), labels == 255, self.source.task
        return Sample(
            sample_id, task, picture, turns, masks[None], labels, ignore, [text], image_id=stem
        )

    def num_words(self, index: int) -> int:
        return len(self.records[index][3][0].split())

    def is_sentence(self, index: int) -> bool:
        """Whether the question is a long one, as the scores of the test split are told apart."""
        return self.records[index][4]


def labelme_image(path: Path, content: dict) -> tuple[list[str], tuple[int, int] | None]:
    """What the image of a labelme file may be called, and its size, where that is told."""
    names = [f"{path.stem}{suffix}" for suffix in IMAGE_SUFFIXES]
    if isinstance(content.get("imagePath"), str):
        names.insert(0, content["imagePath"])
    size = tuple(records.whole(content.get(key)) for key in ("imageHeight", "imageWidth"))
    return names, size if all(isinstance(side, int) and side > 0 for side in size) else None


def whole_pixels(points: list, where: str) -> list[tuple[int, int]]:
    """The corners of a polygon, cut to whole pixels as in LISA."""
    for point in points:
        if len(expect(point, list, where)) != 2:
            raise ValueError(f"{where}: a point has {len(point)} numbers, not 2")
    if len(points) < 2:
        raise ValueError(f"{where}: has {len(points)} points, a polygon needs more")
    return [(int(expect(x, float, where)), int(expect(y, float, where))) for x, y in points]


def corners(points: list, kind: str | None, where: str) -> list[tuple[int, int]]:
    """The outline of labelme's shapes that have one: two points are the opposite corners of a
    rectangle, or the centre of a circle and a point on it."""
    if kind == "circle" and len(points) == 2:
        (x, y), radius = points[0], math.dist(*points)
        angles = [2 * math.pi * step / 64 for step in range(64)]
        return [(round(x + radius * math.cos(a)), round(y + radius * math.sin(a))) for a in angles]
    if kind == "rectangle" and len(points) == 2:
        (left, top), (right, bottom) = points
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    if kind in (None, "polygon", "rectangle", "oriented_rectangle"):
        return points
    raise ValueError(f"{where}: is a {kind} of {len(points)} points; draw it as a polygon")


def paint_shapes(shapes: list[Shape], size: tuple[int, int], where: str) -> np.ndarray:
    """ReasonSeg's rule: polygons are filled with their outline, the largest first, so that smaller
    ones show on top. uint8 [H, W]: 1 target, 255 ignored, 0 the rest."""
    painted = []
    for is_ignored, corners in shapes:
        if np.abs(corners).max() > 2 * max(size):
            raise ValueError(f"{where}: a polygon lies outside its image of {list(size)}")
        canvas = Image.new("1", (size[1], size[0]))
        ImageDraw.Draw(canvas).polygon(corners, fill=1, outline=1)
        painted.append((255 if is_ignored else 1, np.asarray(canvas)))
    labels = np.zeros(size, np.uint8)
    # Of two of the same size LISA paints the later first.
    for value, mask in sorted(painted, key=lambda pair: pair[1].sum())[::-1]:
        labels[mask] = value
    return labels
