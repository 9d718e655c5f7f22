"""Every dataset of the paper, read from the public files into `Sample`s (paper tables 1 and 7).

One class for each layout on disk. Opening one reads its annotations and says what it leaves out and
what is wrong; `sample` then reads one image with its masks at the image's own size and draws the
words. Everything random comes from the generator that is passed in.
Legend: T targets, G visual prompts, H W image size.
"""

import base64
import binascii
import contextlib
import dataclasses
import io
import itertools
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from xsam.formats import (
    decode_mask,
    dilate,
    expect,
    first_file,
    num_bad_rings,
    read_class_map,
    read_image,
    read_image_size,
    read_json,
    read_labelme,
    read_mask_image,
    read_refs,
    read_segment_ids,
    read_tsv,
    rle_area,
    take,
    take_flag,
    take_size,
)
from xsam.prompts import PHRASINGS, ask, check_words, choice_question, clean_name, reply
from xsam.sources import PROMPT_RADII, PROMPT_TYPES, Source, find_source, locate

MAX_TURNS = 8  # referred objects of one training conversation
IMAGE_SUFFIXES = (".jpg", ".png", ".gif", ".jpeg")


@dataclass
class Sample:
    """One record, at the image's own size."""

    sample_id: str
    task: str
    image: Image.Image
    turns: list[tuple[str, str | None]]  # (question, answer); an answer of None is for the model
    masks: np.ndarray  # bool [T, H, W]
    labels: np.ndarray  # int64 [T], index into names
    ignore: np.ndarray | None = None  # bool [H, W], pixels without a label
    names: list[str] = field(default_factory=list)  # the classes or phrases, in prompt order
    regions: np.ndarray | None = None  # bool [G, H, W], a visual prompt for each <region>


class Packed:
    """Records as bytes in one array. Loader processes share it; Python objects they would copy as
    soon as they look at them, which for COCO is gigabytes a process."""

    def __init__(self, contents: list[bytes]):
        """`contents` are pickles that this process made."""
        self.ends = np.cumsum([0] + [len(content) for content in contents])
        self.content = np.frombuffer(b"".join(contents), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return pickle.loads(self.content[self.ends[index] : self.ends[index + 1]])


class Dataset:
    """What the readers have in common. A subclass fills `records` in `index` and makes a `Sample`
    of one in `sample`.

    `left_out` counts what the format's rules drop; `problems` has a message for each record that
    breaks them.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        root: Path,
        all_classes: bool = False,
        phrasings: dict = PHRASINGS,
    ):
        self.name, self.source, self.all_classes = name, source, all_classes
        self.phrasings = phrasings
        self.annotations, self.images = (
            locate(root, source.annotations),
            locate(root, source.images),
        )
        self.masks, self.instances = locate(root, source.masks), locate(root, source.instances)
        self.records: list | Packed = []
        self.left_out: Counter[str] = Counter()
        self.problems: list[str] = []
        self.index()
        contents = []
        for place, record in enumerate(self.records):
            with self.record():
                try:
                    contents.append(pickle.dumps(record, protocol=5))
                except RecursionError as error:
                    where = f"{self.annotations}: sample {place}"
                    raise ValueError(f"{where}: is nested too deeply") from error
        self.records = Packed(contents)

    def __len__(self) -> int:
        return len(self.records)

    def index(self) -> None:
        raise NotImplementedError

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Record `index`, its words drawn from `rng`. Raises ValueError that names the record."""
        raise NotImplementedError

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Keeps the message of a record that cannot be read, and goes on with the next."""
        try:
            yield
        except ValueError as error:
            self.problems.append(str(error))

    def turn(self, names: list[str], rng: np.random.Generator, kind: str = "answers"):
        """A random question about `names` and a random answer."""
        question = ask(self.source.task, names, rng, self.phrasings)
        return question, reply(self.source.task, rng, self.phrasings, kind)


def by_id(records: list, where: str, kinds: tuple[type, ...] = (int, str)) -> dict:
    """{id: record}, in order of the ids, which must differ."""
    pairs = [(take(record, "id", kinds, where), record) for record in records]
    table = dict(sorted(pairs, key=lambda pair: (isinstance(pair[0], str), pair[0])))
    if len(table) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{where}: id {twice} is there more than once")
    return table


# ---- generic: COCO and ADE20K, panoptic, instance and semantic -----------------------------------


class Generic(Dataset):
    """Classes that are named in the prompt; a class's contiguous index is the rank of its id.

    With `all_classes` the prompt names all of them in that order (stage 1, evaluation); else those
    present and a random number of others, shuffled.
    """

    are_things = True  # where the categories do not say

    def index(self) -> None:
        content = read_json(self.annotations, dict)
        where = str(self.annotations)
        categories = by_id(take(content, "categories", list, where), f"{where}: categories", (int,))
        self.category_index = {number: index for index, number in enumerate(categories)}
        self.names, self.is_thing = [], []
        for number, category in categories.items():
            at = f"{where}: category {number}"
            self.names.append(check_words(clean_name(take(category, "name", str, at)), at))
            if not self.names[-1]:
                raise ValueError(f"{at}: its name is empty")
            self.is_thing.append(take_flag(category, "isthing", at, self.are_things))
        self.image_records = by_id(take(content, "images", list, where), f"{where}: images")
        self.index_images(content)

    @property
    def categories(self) -> tuple[dict, ...]:
        """Names and kinds, as a configuration keeps them."""
        pairs = zip(self.names, self.is_thing, strict=True)
        return tuple({"name": name, "is_thing": is_thing} for name, is_thing in pairs)

    def index_images(self, content: dict) -> None:
        raise NotImplementedError

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
        names = [self.names[category] for category in prompt]
        return Sample(
            sample_id=f"{self.name}/{image['id']}",
            task="generic",
            image=picture,
            turns=[self.turn(names, rng)],
            masks=masks,
            labels=np.array([place[category] for category in classes], np.int64),
            ignore=ignore,
            names=names,
        )


class Panoptic(Generic):
    """COCO panoptic: every segment of an image and its class. Crowd regions and void carry no
    label. The PNG has the name of the image."""

    def index_images(self, content: dict) -> None:
        where = str(self.annotations)
        segments = {}
        for record in take(content, "annotations", list, where):
            with self.record():
                number = take(record, "image_id", (int, str), f"{where}: annotation")
                at = f"{where}: image {number}"
                if number not in self.image_records:
                    raise ValueError(f"{at}: has segments but is not in its images")
                if number in segments:
                    raise ValueError(f"{at}: is annotated more than once")
                segments[number] = take(record, "segments_info", list, at)
        for number, image in self.image_records.items():
            if segments.get(number):
                self.records.append((image, segments[number]))
            else:
                self.left_out["images without segments"] += 1

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
        ids = read_segment_ids(path, size)
        order = np.argsort(numbers)
        found = np.searchsorted(numbers, ids, sorter=order).clip(max=len(order) - 1)
        owner = order[found]
        is_unknown = np.array(numbers)[owner] != ids
        if is_unknown.any():
            raise ValueError(f"{path}: segment id {ids[is_unknown][0]} is not in its segments_info")
        return picture, owner.astype(np.int32), segments

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
    instance is background. Images without a single instance are left out."""

    def index_images(self, content: dict) -> None:
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
                if number not in self.image_records:
                    raise ValueError(f"{at}: image {number} is not in its images")
                take_flag(record, "iscrowd", at)
                self.left_out["invalid rings"] += num_bad_rings(record.get("segmentation"))
                by_image[number].append(record)
        for number, image in self.image_records.items():
            if any(not record.get("iscrowd") for record in by_image[number]):
                self.records.append((image, by_image[number]))
            else:
                self.left_out["images without instances"] += 1

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image, annotations = self.records[index]
        picture, size, _ = self.open_image(image)
        masks, classes, crowd = [], [], np.zeros(size, bool)
        for annotation in annotations:
            where = f"{self.annotations}: annotation {annotation['id']}"
            category = self.category_of(annotation, where)
            shape = take(annotation, "segmentation", (dict, list), where)
            mask = decode_mask(shape, size, where, may_be_empty=True)
            if annotation.get("iscrowd"):
                crowd |= mask
            elif mask.any():  # a few of COCO's objects are smaller than a pixel
                masks.append(mask)
                classes.append(category)
        # An instance keeps its label where a crowd region lies over it.
        masks = np.stack(masks) if masks else np.zeros((0, *size), bool)
        return self.make(image, picture, masks, classes, crowd & ~masks.any(axis=0), rng)


class Semantic(Generic):
    """Class maps: 8-bit PNGs of contiguous classes, 255 where nothing is labelled. The categories
    are those of the panoptic file."""

    def index_images(self, content: dict) -> None:
        self.is_thing = [False] * len(self.names)  # a class is one region
        where = f"{self.annotations}: annotation"
        labelled = {
            take(record, "image_id", (int, str), where)
            for record in take(content, "annotations", list, str(self.annotations))
        }
        for number, image in self.image_records.items():
            if number in labelled:
                self.records.append(image)
            else:
                self.left_out["images without segments"] += 1

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image = self.records[index]
        picture, size, name = self.open_image(image)
        path = self.masks / name
        classes = read_class_map(path, size)
        present = np.unique(classes[classes != 255]).tolist()
        if present and present[-1] >= len(self.names):
            raise ValueError(f"{path}: class {present[-1]}, but there are {len(self.names)}")
        masks = classes == np.array(present, np.uint8)[:, None, None]
        return self.make(image, picture, masks, present, classes == 255, rng)


# ---- referring: RefCOCO/+/g, gRefCOCO, a user's own ----------------------------------------------


class Referring(Dataset):
    """Samples of one turn for each expression; an expression that nothing fits is answered so."""

    def make(
        self,
        sample_id: str,
        picture: Image.Image,
        objects: list[tuple[str, np.ndarray | None]],
        rng: np.random.Generator,
    ) -> Sample:
        """The sample of (expression, mask bool [H, W] or None where there is no such thing)."""
        names = [expression for expression, _ in objects]
        masks = [mask for _, mask in objects if mask is not None]
        size = picture.height, picture.width
        return Sample(
            sample_id=sample_id,
            task="refer",
            image=picture,
            turns=[
                self.turn([name], rng, "absent" if mask is None else "answers")
                for name, mask in objects
            ],
            masks=np.stack(masks) if masks else np.zeros((0, *size), bool),
            labels=np.flatnonzero([mask is not None for _, mask in objects]),
            names=names,
        )


class RefCoco(Referring):
    """RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO, whose expressions may mean several objects or none.

    Training: a conversation with one turn for each of up to MAX_TURNS referred objects of an image;
    the k-th sample of an image takes the k-th combination of its objects' sentences, for as many
    samples as the image has sentences, or combinations where those are fewer. Evaluation: one
    sample per object and sentence. An image belongs to the split of its first ref.
    """

    def index(self) -> None:
        where = str(self.instances)
        content = read_json(self.instances, dict)
        self.image_records = by_id(take(content, "images", list, where), f"{where}: images")
        records = take(content, "annotations", list, where)
        self.annotation_records = by_id(records, f"{where}: annotations")
        by_image, split_of = defaultdict(list), {}
        for place, ref in enumerate(read_refs(self.annotations)):
            with self.record():
                image_id, split, object_ = self.read_ref(ref, f"{self.annotations}: ref {place}")
                split_of.setdefault(image_id, split)
                by_image[image_id].append(object_)
        for image_id in sorted(by_image):
            if split_of[image_id] == self.source.split:
                self.index_image(image_id, by_image[image_id])
        # The files hold four times as many annotations as are referred to.
        used = {number for _, pairs in self.records for numbers, _ in pairs for number in numbers}
        self.annotation_records = {number: self.annotation_records[number] for number in used}

    def read_ref(self, ref: dict, where: str) -> tuple[int, str, tuple[list[int], list[str]]]:
        """Image, split, and the object: annotation ids (none: there is no such thing) and its
        sentences in lower case, sorted, each once."""
        if isinstance(ref, dict) and "ref_id" in ref:
            where = f"{self.annotations}: ref {ref['ref_id']}"
        image_id = take(ref, "image_id", int, where)
        if image_id not in self.image_records:
            raise ValueError(f"{where}: image {image_id} is not in {self.instances}")
        numbers = take(ref, "ann_id", (int, list), where)
        if numbers == []:
            raise ValueError(f"{where}: 'ann_id' is empty; [-1] says that there is no such thing")
        numbers = (
            [] if numbers in (-1, [-1]) else numbers if isinstance(numbers, list) else [numbers]
        )
        for number in numbers:
            if expect(number, int, where) not in self.annotation_records:
                raise ValueError(f"{where}: annotation {number} is not in {self.instances}")
            if self.annotation_records[number].get("image_id") != image_id:
                raise ValueError(f"{where}: annotation {number} is of another image")
        texts = {
            take(sentence, "sent", str, where).strip().lower()
            for sentence in take(ref, "sentences", list, where)
        }
        if not texts or "" in texts:
            raise ValueError(f"{where}: an expression is missing")
        for text in texts:
            check_words(text, where)
        return image_id, take(ref, "split", str, where), (numbers, sorted(texts))

    def index_image(self, image_id: int, objects: list[tuple[list[int], list[str]]]) -> None:
        pairs = [[(numbers, sentence) for sentence in texts] for numbers, texts in objects]
        if self.source.split != "train":
            self.records += [(image_id, [pair]) for pair in itertools.chain(*pairs)]
            return
        count = sum(len(sentences) for sentences in pairs)
        for combination in itertools.islice(itertools.product(*pairs), count):
            for start in range(0, len(combination), MAX_TURNS):
                self.records.append((image_id, combination[start : start + MAX_TURNS]))

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image_id, pairs = self.records[index]
        where = f"{self.instances}: image {image_id}"
        image = self.image_records[image_id]
        size = take_size(image, where)
        picture = read_image(self.images / take(image, "file_name", str, where), size)
        objects = []
        for numbers, sentence in pairs:
            masks = [self.mask(number, size) for number in numbers]
            objects.append((sentence, np.any(masks, axis=0) if masks else None))
        return self.make(f"{self.name}/{image_id}/{index}", picture, objects, rng)

    def mask(self, number: int, size: tuple[int, int]) -> np.ndarray:
        where = f"{self.instances}: annotation {number}"
        annotation = self.annotation_records[number]
        return decode_mask(take(annotation, "segmentation", (dict, list), where), size, where)


class OwnReferring(Referring):
    """A user's own: a list of {"image", "masks", "texts"}, as many masks as texts. A mask is a list
    of polygons, an RLE, the path of a PNG, or null where the image has no such thing; a text is a
    string or a list of alternatives."""

    def index(self) -> None:
        for place, record in enumerate(read_json(self.annotations, list)):
            where = f"{self.annotations}: record {place}"
            with self.record():
                take(record, "image", str, where)
                masks, texts = (
                    take(record, "masks", list, where),
                    take(record, "texts", list, where),
                )
                if not masks or len(masks) != len(texts):
                    raise ValueError(f"{where}: {len(masks)} masks but {len(texts)} texts")
                pairs = list(zip(masks, texts, strict=True))
                for start in range(0, len(pairs), MAX_TURNS):
                    chunk = pairs[start : start + MAX_TURNS]
                    self.records.append((where, record["image"], chunk))

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        where, name, pairs = self.records[index]
        picture = read_image(self.images / name)
        size = picture.height, picture.width
        objects = []
        for mask, texts in pairs:
            texts = [texts] if isinstance(texts, str) else expect(texts, list, f"{where}: texts")
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(f"{where}: a text is empty or no string")
            text = check_words(texts[rng.integers(len(texts))].strip(), where)
            if isinstance(mask, str):
                mask = read_mask_image(self.images / mask, size)
            elif mask is not None:
                mask = decode_mask(expect(mask, (dict, list), f"{where}: a mask"), size, where)
            objects.append((text, mask))
        return self.make(f"{self.name}/{index}", picture, objects, rng)


# ---- reasoning -----------------------------------------------------------------------------------


class Reason(Dataset):
    """ReasonSeg: a folder of NAME.jpg beside NAME.json. All target polygons of an image are one
    mask; pixels of "ignore" polygons have no label.

    Training: one sample an image, which draws one of its texts, and half of the time the
    explanation, where there is one. Evaluation: one sample for each text.
    """

    def index(self) -> None:
        self.explanations = defaultdict(list)
        if self.source.instances:
            for place, record in enumerate(read_json(self.instances, list)):
                where = f"{self.instances}: record {place}"
                with self.record():
                    name = take(record, "image", str, where)
                    outputs = check_words(take(record, "outputs", str, where).strip(), where)
                    self.explanations[Path(name).stem].append(outputs)
        stems = sorted(path.stem for path in self.annotations.glob("*.jpg"))
        alone = {path.stem for path in self.annotations.glob("*.json")} - set(stems)
        self.problems += [
            f"{self.annotations / f'{stem}.json'}: has no {stem}.jpg beside it"
            for stem in sorted(alone)
        ]
        for stem in stems:
            with self.record():
                self.index_image(stem, self.annotations / f"{stem}.json")

    def index_image(self, stem: str, path: Path) -> None:
        record = read_labelme(path)
        texts = take(record, "text", list, str(path))
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{path}: a text is missing or no string")
        is_sentence = take(record, "is_sentence", bool, str(path))
        shapes = []
        for place, shape in enumerate(take(record, "shapes", list, str(path))):
            where = f"{path}: shape {place}"
            label = take(shape, "label", str, where).lower()
            if label != "flag":
                shapes.append(("ignore" in label, _corners(shape, where)))
        if not self.has_target(shapes, path):
            self.left_out["images without a target"] += 1
            return
        texts = [check_words(text.strip(), str(path)) for text in texts]
        chosen = [texts] if self.source.split == "train" else [[text] for text in texts]
        self.records += [(stem, each, is_sentence, shapes) for each in chosen]

    def has_target(self, shapes: list[tuple[bool, list]], path: Path) -> bool:
        """Whether a target shows; painting takes time, and is needed where one may be covered."""
        num_ignored = sum(is_ignored for is_ignored, _ in shapes)
        if num_ignored in (0, len(shapes)):
            return num_ignored < len(shapes)
        size = read_image_size(path.with_suffix(".jpg"))
        return bool((paint_shapes(shapes, size, str(path)) == 1).any())

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        stem, texts, _, shapes = self.records[index]
        path = self.annotations / f"{stem}.json"
        picture = read_image(path.with_suffix(".jpg"))
        labels = paint_shapes(shapes, (picture.height, picture.width), str(path))
        if not (labels == 1).any():
            raise ValueError(f"{path}: its target lies outside the image")
        text = texts[rng.integers(len(texts))]
        question, answer = self.turn([text], rng)
        explanations = self.explanations.get(stem)
        if explanations and rng.random() < 0.5:
            answer = f"{explanations[rng.integers(len(explanations))]} {answer}"
        return Sample(
            sample_id=f"{self.name}/{stem}/{index}",
            task="reason",
            image=picture,
            turns=[(question, answer)],
            masks=(labels == 1)[None],
            labels=np.zeros(1, np.int64),
            ignore=labels == 255,
            names=[text],
        )


def _corners(shape: dict, where: str) -> list[tuple[int, int]]:
    """Corners as whole pixels, as LISA casts them."""
    corners = []
    for point in take(shape, "points", list, where):
        if len(expect(point, list, where)) != 2:
            raise ValueError(f"{where}: a point has {len(point)} numbers, not 2")
        x, y = (expect(number, float, where) for number in point)
        corners.append((int(x), int(y)))
    if len(corners) < 2:
        raise ValueError(f"{where}: has {len(corners)} points, a polygon needs more")
    return corners


def paint_shapes(
    shapes: list[tuple[bool, list[tuple[int, int]]]], size: tuple[int, int], where: str
) -> np.ndarray:
    """ReasonSeg's rule: each polygon filled with its outline, the largest first, so that a smaller
    one shows on top. uint8 [H, W]: 1 target, 255 ignored, 0 the rest."""
    painted = []
    for is_ignored, corners in shapes:
        if np.abs(corners).max() > 2 * max(size):
            raise ValueError(f"{where}: a polygon lies outside its image of {list(size)}")
        canvas = Image.new("1", (size[1], size[0]))
        ImageDraw.Draw(canvas).polygon(corners, fill=1, outline=1)
        painted.append((255 if is_ignored else 1, np.asarray(canvas)))
    labels = np.zeros(size, np.uint8)
    for value, mask in sorted(painted, key=lambda each: -int(each[1].sum())):
        labels[mask] = value
    return labels


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
                    self.left_out["spans outside their caption"] += 1
                elif span[0] <= end:
                    self.left_out["overlapping or touching spans"] += 1
                else:
                    kept.append(span)
                    end = span[1]
            if kept:
                self.records.append(dataclasses.replace(caption, spans=kept))
            else:
                self.left_out["captions without a span"] += 1

    def captions(self) -> Iterator[Caption]:
        raise NotImplementedError

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        caption = self.records[index]
        where = f"{self.annotations}: image {caption.image_id}"
        picture = read_image(first_file(caption.paths), caption.size)
        size = picture.height, picture.width
        masks = [decode_mask(shape, size, where) for _, _, shape in caption.spans]
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
            masks=np.stack(masks),
            labels=np.arange(len(masks)),
            ignore=np.any(ignored, axis=0) if ignored else None,
            names=names,
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
                    span = take(grounding, "token_positives", list, at)
                    if len(span) != 2:
                        raise ValueError(f"{at}: its span has {len(span)} numbers, not 2")
                    start, end = (expect(number, int, at) for number in span)
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
                        self.left_out["phrases that their caption lacks"] += 1
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
        by_image = defaultdict(list)
        for record in take(content, "annotations", list, where):
            with self.record():
                number = take(record, "image_id", (int, str), f"{where}: annotation")
                if number not in images:
                    raise ValueError(f"{where}: annotation of image {number}, which it lacks")
                by_image[number].append(record)
        for number, image in images.items():
            at = f"{where}: image {number}"
            with self.record():
                text = clean_caption(take(image, "caption", str, at))
                if len(text.split()) < 3:
                    self.left_out["captions under three words"] += 1
                    continue
                spans, ignored = [], []
                for record in by_image[number]:
                    shape = take(record, "sam_mask", dict, at)
                    if take_flag(record, "ignore", at):
                        ignored.append(shape)
                        continue
                    positions = take(record, "tokens_positive", list, at)
                    span = expect(positions[0] if positions else None, list, f"{at}: a span")
                    if len(span) != 2:
                        raise ValueError(f"{at}: a span has {len(span)} numbers, not 2")
                    start, end = (expect(each, int, f"{at}: a span") for each in span)
                    spans.append((start, end, shape))
                yield Caption(
                    image_id=number,
                    paths=[self.images / take(image, "file_name", str, at)],
                    size=take_size(image, at),
                    text=text,
                    spans=spans,
                    ignored=ignored,
                )


class GcgScored(Dataset):
    """GranD-f validation and test: masks in one file, captions in another. The masks are of no
    phrase in particular, so all have the one name "object"."""

    def index(self) -> None:
        masks, captions = read_json(self.annotations, dict), read_json(self.instances, dict)
        where = str(self.annotations)
        images = by_id(take(masks, "images", list, where), f"{where}: images")
        shapes = defaultdict(list)
        for record in take(masks, "annotations", list, where):
            with self.record():
                number = take(record, "image_id", (str, int), f"{where}: annotation")
                if number not in images:
                    raise ValueError(f"{where}: annotation of image {number}, which it lacks")
                at = f"{where}: image {number}"
                shapes[number].append(take(record, "segmentation", (dict, list), at))
        texts = {}
        for record in take(captions, "annotations", list, str(self.instances)):
            with self.record():
                at = f"{self.instances}: annotation"
                number = take(record, "image_id", (str, int), at)
                at = f"{at} of image {number}"
                texts[number] = check_words(take(record, "caption", str, at), at)
        for number, image in images.items():
            if number not in texts:
                self.problems.append(f"{where}: image {number} has no caption in {self.instances}")
            elif shapes[number]:
                self.records.append((image, texts[number], shapes[number]))
            else:
                self.left_out["images without masks"] += 1

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image, text, shapes = self.records[index]
        where = f"{self.annotations}: image {image['id']}"
        size = take_size(image, where)
        picture = read_image(self.images / f"{image['id']}.jpg", size)
        return Sample(
            sample_id=f"{self.name}/{image['id']}",
            task="gcg",
            image=picture,
            turns=[(ask("gcg", [], rng, self.phrasings), text)],
            masks=np.stack([decode_mask(shape, size, where) for shape in shapes]),
            labels=np.zeros(len(shapes), np.int64),
            names=["object"],
        )


# ---- interactive and visual grounding ------------------------------------------------------------


class VisualPrompts(Dataset):
    """COCO-Interactive (PSALM's file) and COCO-VGD: COCO annotations with four prompt masks each.

    Interactive asks for the one object that the prompt marks: in training one object of an image,
    drawn; in evaluation one sample for each object that has the prompt. VGD shows one object of
    each category present and asks for all of these categories. `source.prompt` is the kind of
    prompt, "" a random one of those that are not empty. PSALM's file stores points and scribbles
    one pixel wide and has crowd regions, which are asked for in evaluation only.
    """

    def index(self) -> None:
        self.category_names = {}
        if self.source.instances:
            content = read_json(self.instances, dict)
            where = f"{self.instances}: categories"
            categories = by_id(take(content, "categories", list, str(self.instances)), where)
            self.category_names = {
                number: check_words(clean_name(take(category, "name", str, where)), where)
                for number, category in categories.items()
            }
        for place, record in enumerate(read_json(self.annotations, list)):
            with self.record():
                self.index_image(record, f"{self.annotations}: record {place}")

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
        self.add(entry, annotations)

    def add(self, entry: tuple, annotations: list) -> None:
        """The records of one image."""
        kind, is_training = self.source.prompt, self.source.split == "train"
        if self.source.task == "interactive" and is_training:
            single = [each for each in annotations if not each[0].get("iscrowd")]
            self.left_out["crowd regions"] += len(annotations) - len(single)
            annotations = single
        usable = [each for each in annotations if (kind in each[2] if kind else each[2])]
        kept = usable
        if self.source.task == "vgd":  # one object shows all of its category
            shown = {category for _, category, _, _ in usable}
            kept = [each for each in annotations if is_training or each[1] in shown]
        self.left_out["objects that no prompt shows"] += len(annotations) - len(kept)
        if not usable:
            self.left_out["images without a prompt"] += 1
        elif self.source.task == "interactive" and not is_training:
            self.records += [(*entry, [each]) for each in usable]
        else:
            self.records.append((*entry, kept))

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        file_name, number, size, is_stored_thin, annotations = self.records[index]
        picture = read_image(self.images / file_name, size)
        is_interactive = self.source.task == "interactive"
        if is_interactive:
            annotations = [annotations[rng.integers(len(annotations))]]
        groups = defaultdict(list)  # of a name, the objects and their masks
        for each in sorted(annotations, key=lambda each: each[1]):
            shape = take(each[0], "segmentation", (dict, list), each[3])
            mask = decode_mask(shape, size, each[3], may_be_empty=not is_interactive)
            if mask.any():  # a few of COCO's objects are smaller than a pixel
                name = "object" if is_interactive else self.category_names[each[1]]
                groups[name].append((each, mask))
        if not groups:
            raise ValueError(f"{self.annotations}: image {number}: no object has a pixel")
        names = list(groups)
        if self.source.split == "train":
            names = rng.permutation(names).tolist()
        regions = [
            self.region([each for each, _ in groups[name]], size, is_stored_thin, rng)
            for name in names
        ]
        counts = [len(groups[name]) for name in names]
        return Sample(
            sample_id=f"{self.name}/{number}/{index}",
            task=self.source.task,
            image=picture,
            turns=[self.turn(["<region>"] * len(names), rng)],
            masks=np.stack([mask for name in names for _, mask in groups[name]]),
            labels=np.repeat(np.arange(len(names)), counts),
            names=names,
            regions=np.stack(regions),
        )

    def region(
        self, group: list, size: tuple[int, int], is_stored_thin: bool, rng: np.random.Generator
    ) -> np.ndarray:
        """A random prompt for one of the objects of `group`, bool [H, W]; empty where none of them
        has such a prompt."""
        kind = self.source.prompt
        usable = [each for each in group if (kind in each[2] if kind else each[2])]
        if not usable:
            return np.zeros(size, bool)
        _, _, prompts, where = usable[rng.integers(len(usable))]
        kind = kind or list(prompts)[rng.integers(len(prompts))]
        region = decode_mask(prompts[kind], size, where)
        return dilate(region, PROMPT_RADII.get(kind, 0)) if is_stored_thin else region


# ---- conversation --------------------------------------------------------------------------------


class Llava(Dataset):
    """LLaVA conversations about one image; samples without an image are left out."""

    def index(self) -> None:
        for place, record in enumerate(read_json(self.annotations, list)):
            where = f"{self.annotations}: record {place}"
            with self.record():
                if not expect(record, dict, where).get("image"):
                    self.left_out["text without an image"] += 1
                    continue
                take(record, "image", str, where)
                if "id" in record:
                    where = f"{self.annotations}: record {place}, id {record['id']}"
                self.records.append((record, where))

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        record, where = self.records[index]
        image = read_image(self.find(record["image"]))
        return Sample(
            sample_id=f"{self.name}/{record.get('id', index)}",
            task="chat",
            image=image,
            turns=self.turns(record, where),
            masks=np.zeros((0, image.height, image.width), bool),
            labels=np.zeros(0, np.int64),
        )

    def find(self, name: str) -> Path:
        """The image, also where a download spells TextVQA's folder or a file's suffix in another
        way (OCR-VQA has some as .gif and .png)."""
        names = name, name.replace("textvqa/", "text_vqa/"), name.replace("text_vqa/", "textvqa/")
        paths = [self.images / each for each in names]
        paths += [paths[0].with_suffix(suffix) for suffix in IMAGE_SUFFIXES]
        return first_file(paths)

    def turns(self, record: dict, where: str) -> list[tuple[str, str]]:
        """(question, answer) pairs; a leading answer is skipped, <image> is taken out."""
        speakers, texts = [], []
        for turn in take(record, "conversations", list, where):
            speakers.append(take(turn, "from", str, where))
            texts.append(take(turn, "value", str, where).replace("<image>", "").strip())
            check_words(texts[-1], where, tokens=("<region>",))
            if speakers[-1] not in ("human", "gpt"):
                raise ValueError(f"{where}: turn from {speakers[-1]!r}; expected human or gpt")
        if speakers[:1] == ["gpt"]:
            speakers, texts = speakers[1:], texts[1:]
        if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
            raise ValueError(f"{where}: its turns do not alternate human and gpt: {speakers}")
        if not all(texts[1::2]):
            raise ValueError(f"{where}: an answer is empty")
        return list(zip(texts[0::2], texts[1::2], strict=True))


class Benchmark(Dataset):
    """A VLMEvalKit table: a question a row, with options or without, whose answer is compared to
    the letter. Images are base64 text; a short number stands for the image of the row with that
    index."""

    OPTIONS = "ABCDEFGH"

    def index(self) -> None:
        rows = read_tsv(self.annotations)
        images = {row.get("index", ""): row.get("image", "") for row in rows}
        num_rows = Counter(row.get("index") for row in rows)
        for place, row in enumerate(rows):
            where = f"{self.annotations}: row {place}"
            with self.record():
                for key in ("index", "question", "answer"):
                    if not row.get(key, "").strip():
                        raise ValueError(f"{where}: has no {key!r}")
                where = f"{self.annotations}: index {row['index']}"
                if num_rows[row["index"]] > 1:
                    raise ValueError(f"{where}: is there more than once")
                if not row.get("image") and not row.get("image_path"):
                    raise ValueError(f"{where}: has neither image nor image_path")
                image = row.get("image", "")
                if image and len(image) < 64:  # too short for any picture
                    if len(images.get(image, "")) < 64:
                        raise ValueError(f"{where}: its image is row {image}, which has none")
                    image = images[image]
                self.records.append(row | {"image": image})

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        row = self.records[index]
        where = f"{self.annotations}: index {row['index']}"
        if row["image"]:
            try:
                content = base64.b64decode(row["image"], validate=True)
            except (binascii.Error, ValueError) as error:
                raise ValueError(f"{where}: its image is not base64 ({error})") from error
            try:
                image = read_image(io.BytesIO(content))
            except ValueError as error:
                raise ValueError(f"{where}: its image cannot be read ({error})") from error
        else:
            image = read_image(self.annotations.parent / row["image_path"])
        options = {letter: row.get(letter, "").strip() for letter in self.OPTIONS}
        options = {letter: text for letter, text in options.items() if text}
        answer = check_words(row["answer"].strip(), where)
        if options and answer not in options:
            raise ValueError(f"{where}: its answer {answer!r} is none of {list(options)}")
        question = choice_question(row["question"].strip(), options, row.get("hint", "").strip())
        return Sample(
            sample_id=f"{self.name}/{row['index']}",
            task="chat",
            image=image,
            turns=[(check_words(question, where), answer)],
            masks=np.zeros((0, image.height, image.width), bool),
            labels=np.zeros(0, np.int64),
        )


# ---- by name -------------------------------------------------------------------------------------

READERS: dict[str, type[Dataset]] = {
    "panoptic": Panoptic,
    "instance": Instances,
    "semantic": Semantic,
    "refs": RefCoco,
    "own_refs": OwnReferring,
    "reason": Reason,
    "gcg_grounded": GcgGrounded,
    "gcg_refs": GcgRefs,
    "gcg_flickr": GcgFlickr,
    "gcg_scored": GcgScored,
    "visual_prompts": VisualPrompts,
    "llava": Llava,
    "tsv": Benchmark,
}


def read_dataset(
    name: str, root: Path, all_classes: bool = False, phrasings: dict = PHRASINGS
) -> Dataset:
    """The dataset that `sources.SOURCES` calls `name`, or a user's own file (`find_source`),
    whatever is wrong with its records. Raises ValueError where a file cannot be read."""
    source = find_source(name)
    if source.format == "own":
        source = recognise(source, Path(root))
    return READERS[source.format](name, source, Path(root), all_classes, phrasings)


def open_dataset(
    name: str,
    root: Path,
    all_classes: bool = False,
    phrasings: dict = PHRASINGS,
    skip_bad: bool = False,
) -> Dataset:
    """The dataset of that name, for use. Raises ValueError also where nothing is in it, or, without
    `skip_bad`, where a record breaks the format's rules."""
    dataset = read_dataset(name, root, all_classes, phrasings)
    if dataset.problems and not skip_bad:
        more = f" (and {len(dataset.problems) - 1} more)" if len(dataset.problems) > 1 else ""
        raise ValueError(
            f"{dataset.problems[0]}{more}; `python -m xsam.data check` lists all, --skip-bad "
            "trains without them"
        )
    if not len(dataset):
        reason = "".join(f", first {problem}" for problem in dataset.problems[:1])
        raise ValueError(f"{dataset.annotations}: no sample of {name} in it{reason}")
    return dataset


def recognise(source: Source, root: Path) -> Source:
    """A user's own file: a list is referring, a dict COCO's panoptic or instance layout."""
    path = locate(root, source.annotations)
    content = read_json(path)
    if isinstance(content, list):
        return dataclasses.replace(source, task="refer", format="own_refs")
    annotations = take(content, "annotations", list, str(path))
    if annotations and isinstance(annotations[0], dict) and "segments_info" in annotations[0]:
        if not source.masks:
            raise ValueError(f"{path}: panoptic, so name its PNGs: FILE.json:IMAGES:MASKS")
        return dataclasses.replace(source, task="generic", format="panoptic")
    return dataclasses.replace(source, task="generic", format="instance")
