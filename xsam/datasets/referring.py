"""Referring and reasoning segmentation: RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO, ReasonSeg, and
expressions of a user's own.

Each phrase has a <SEG> and a mask of its own, or an answer that there is no such thing. Legend: T
targets, H W image size.
"""

import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from xsam.data import Sample
from xsam.datasets.base import Dataset, Packed, by_id, pack
from xsam.datasets.formats import (
    decode_mask,
    expect,
    read_image,
    read_image_size,
    read_json,
    read_labelme,
    read_mask_image,
    read_refs,
    take,
    take_size,
)
from xsam.prompts import check_words

MAX_TURNS = 8  # referred objects of one training conversation


# ---- referring: RefCOCO/+/g, gRefCOCO, a user's own ----------------------------------------------


class Referring(Dataset):
    """Samples of one turn for each expression; an expression that nothing fits is answered so."""

    def make(
        self,
        sample_id: str,
        image_id: int | str,
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
            image_id=image_id,
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
        images = by_id(take(content, "images", list, where), f"{where}: images")
        annotations = by_id(take(content, "annotations", list, where), f"{where}: annotations")
        by_image, split_of = defaultdict(list), {}
        for place, ref in enumerate(read_refs(self.annotations)):
            with self.record():
                where = f"{self.annotations}: ref {place}"
                image_id, split, object_ = self.read_ref(ref, images, annotations, where)
                split_of.setdefault(image_id, split)
                by_image[image_id].append(object_)
        chosen = {i: by_image[i] for i in sorted(by_image) if split_of[i] == self.source.split}
        # The files hold four times as many annotations as are referred to.
        used = sorted({n for objects in chosen.values() for numbers, _ in objects for n in numbers})
        self.objects = Packed([pack(annotations[n], f"{self.instances}: {n}") for n in used])
        places = {number: place for place, number in enumerate(used)}
        for image_id, objects in chosen.items():
            placed = [([places[n] for n in numbers], texts) for numbers, texts in objects]
            self.index_image(images[image_id], placed)

    def read_ref(
        self, ref: dict, images: dict, annotations: dict, where: str
    ) -> tuple[int, str, tuple[list[int], list[str]]]:
        """Image, split, and the object: annotation ids (none: there is no such thing) and its
        sentences in lower case; for training sorted and each once."""
        if isinstance(ref, dict) and "ref_id" in ref:
            where = f"{self.annotations}: ref {ref['ref_id']}"
        image_id = take(ref, "image_id", int, where)
        if image_id not in images:
            raise ValueError(f"{where}: image {image_id} is not in {self.instances}")
        numbers = take(ref, "ann_id", (int, list), where)
        if numbers == []:
            raise ValueError(f"{where}: 'ann_id' is empty; [-1] says that there is no such thing")
        numbers = [] if numbers == [-1] else numbers if isinstance(numbers, list) else [numbers]
        for number in numbers:
            if expect(number, int, where) not in annotations:
                raise ValueError(f"{where}: annotation {number} is not in {self.instances}")
            if annotations[number].get("image_id") != image_id:
                raise ValueError(f"{where}: annotation {number} is of another image")
        texts = [
            take(sentence, "sent", str, where).strip().lower()
            for sentence in take(ref, "sentences", list, where)
        ]
        if not texts or "" in texts:
            raise ValueError(f"{where}: an expression is missing")
        for text in texts:
            check_words(text, where)
        if self.source.split == "train":
            texts = sorted(set(texts))
        return image_id, take(ref, "split", str, where), (numbers, texts)

    def index_image(self, image: dict, objects: list[tuple[list[int], list[str]]]) -> None:
        """The records of an image; an object is its places in `self.objects` and its sentences."""
        pairs = [[(places, sentence) for sentence in texts] for places, texts in objects]
        if self.source.split != "train":
            self.records += [(image, [pair]) for pair in itertools.chain(*pairs)]
            return
        count = sum(len(sentences) for sentences in pairs)
        for combination in itertools.islice(itertools.product(*pairs), count):
            for start in range(0, len(combination), MAX_TURNS):
                self.records.append((image, combination[start : start + MAX_TURNS]))

    def key(self, index: int) -> str:
        return f"{self.records[index][0]['id']}/{index}"

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image, pairs = self.records[index]
        where = f"{self.instances}: image {image['id']}"
        size = take_size(image, where)
        picture = read_image(self.images / take(image, "file_name", str, where), size)
        objects = []
        for places, sentence in pairs:
            masks = [self.mask(self.objects[place], size) for place in places]
            objects.append((sentence, np.any(masks, axis=0) if masks else None))
        sample_id = f"{self.name}/{image['id']}/{index}"
        return self.make(sample_id, image["id"], picture, objects, rng)

    def num_words(self, index: int) -> int:
        _, pairs = self.records[index]
        return sum(len(sentence.split()) for _, sentence in pairs)

    def mask(self, annotation: dict, size: tuple[int, int]) -> np.ndarray:
        where = f"{self.instances}: annotation {annotation['id']}"
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
        return self.make(f"{self.name}/{index}", name, picture, objects, rng)


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
            self.skipped["images without a target"] += 1
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

    def key(self, index: int) -> str:
        return f"{self.records[index][0]}/{index}"

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
            image_id=stem,
        )

    def num_words(self, index: int) -> int:
        return max(len(text.split()) for text in self.records[index][1])

    def is_sentence(self, index: int) -> bool:
        """Whether the question is a long one, as the scores of the test split are told apart."""
        return self.records[index][2]


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
    # Of equal ones LISA paints the later first.
    for value, mask in sorted(painted, key=lambda each: each[1].sum())[::-1]:
        labels[mask] = value
    return labels
