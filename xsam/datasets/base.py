"""What all readers have in common: a `Dataset` gives `Sample`s at the size of their image.

Opening a dataset reads and checks its annotations, and counts what it skips; `sample` then reads
one image with its masks and draws the words. All randomness comes from the generator that is passed
in. The records stay packed in one array until they are asked for.
"""

import contextlib
import hashlib
import pickle
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from xsam.data import Sample
from xsam.datasets.records import Flag, Id, by_id, take, whole
from xsam.datasets.sources import Source, locate
from xsam.files import read_json
from xsam.prompts import (
    Phrased,
    Phrasings,
    ask,
    check_words,
    clean_name,
    read_phrasings,
    reply,
)


def pack(record: Any, where: str) -> bytes:
    """A record for `Packed`. Raises ValueError where it is nested too deeply for a pickle."""
    try:
        return pickle.dumps(record, protocol=5)
    except RecursionError as error:
        raise ValueError(f"{where}: is nested too deeply") from error


class Packed:
    """Records as bytes in one array. Loader processes share it; Python objects they would copy as
    soon as they look at them, each process all of COCO."""

    def __init__(self, contents: list[bytes]):
        """`contents` come from `pack` in this process: no other pickle is read."""
        self.ends = np.cumsum([0] + [len(content) for content in contents])
        self.content = np.frombuffer(b"".join(contents), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return pickle.loads(self.content[self.ends[index] : self.ends[index + 1]])


class Dataset:
    """A subclass fills `records` in `index` and makes a `Sample` of one of them in `sample`.

    `skipped` counts what the rules of a format drop, `problems` has a message for every record that
    breaks them.

    What a training sample draws from its generator, besides phrasings: referring how many phrases
    share a dialogue, which, and their order; generic and VGD the order of the classes in the
    prompt, generic also which absent ones are there; interactive the object; reasoning the text.
    The order of chat's turns is the file's: later ones may refer to earlier ones. GCG's phrases
    stand as the caption has them.
    """

    prediction_kind = ""  # of prediction_files.LAYOUTS; "": it is not scored

    def __init__(
        self,
        name: str,
        source: Source,
        root: Path,
        all_classes: bool = False,
        phrasings: Phrasings | None = None,
    ):
        self.name, self.source = name, source
        self.all_classes, self.phrasings = all_classes, phrasings or read_phrasings("")
        paths = (source.annotations, source.images, source.masks, source.instances)
        self.annotations, self.images, self.masks, self.instances = (
            locate(root, path) for path in paths
        )
        self.category_index: dict[int, int] = {}  # of the category ids of its predictions
        self.records: list | Packed = []
        self.skipped: Counter[str] = Counter()
        self.problems: list[str] = []
        self.index()
        contents = []
        for index, record in enumerate(self.records):
            with self.record():
                contents.append(pack(record, f"{self.annotations}: sample {index}"))
        self.records = Packed(contents)

    def __len__(self) -> int:
        return len(self.records)

    left_out = property(lambda self: self.skipped, doc="`skipped`, by its former name.")

    def index(self) -> None:
        """Reads the annotations and fills `records`."""
        raise NotImplementedError

    def key(self, index: int) -> Id:
        """What predictions for record `index` are filed under: the id of its image, or where an
        image has several records an id of its own."""
        raise NotImplementedError

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Record `index`, its words drawn from `rng`. Raises ValueError that names the record."""
        raise NotImplementedError

    def check(self, index: int, rng: np.random.Generator) -> Sample:
        """All that record `index` stands for, of which a sample may show a part. Raises ValueError
        as `sample` does."""
        return self.sample(index, rng)

    def is_present(self, index: int) -> bool:
        """Whether anything fits the expression of a record."""
        return True

    def num_words(self, index: int) -> int:
        """Of a set that is scored: how long the prompt of a record is, in words or categories,
        counting only what differs between the records of the set. Reads no image."""
        return 0

    def inputs(self, index: int) -> Sample:
        """Record `index` for evaluation: the same words every time, and no answers."""
        sample = self.sample(index, np.random.default_rng([0, index]))
        sample.turns = [(question, None) for question, _ in sample.turns]
        return sample

    def leave_out_bad(self) -> None:
        """Keeps the records whose images and masks can be read, and counts the others."""
        kept = []
        for index in range(len(self)):
            with self.record():
                self.inputs(index)
                kept.append(pack(self.records[index], ""))
        self.skipped["bad records"] += len(self) - len(kept)
        self.records = Packed(kept)

    def image_name(self, record: tuple) -> str:
        """Of a user's own set: the image of an entry of `records`."""
        raise NotImplementedError

    def keep_part(self, images: Iterable[str]) -> None:
        """Where a share of a user's own `images` is held out, keeps the records of that share or of
        the others.

        An image's place is a number from 0 to 1 that its name without folders and the seed give:
        the same in every file that has the image, whatever else that holds. Held out are those
        below the share, and of few images, where none is, the first; one at least is left."""
        source = self.source
        if not source.held_out:
            return

        def place(name: str) -> float:
            text = f"{source.seed} {PurePosixPath(name.replace(chr(92), '/')).name}"
            return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48

        places = sorted({place(name) for name in images})
        if len(places) < 2:
            raise ValueError(f"{self.annotations}: one image, of which no share can be held out")
        last = min(max(source.held_out, places[0]), places[-2])
        is_val = source.part == "val"
        self.records = [x for x in self.records if (place(self.image_name(x)) <= last) == is_val]

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Around the reading of one record: where it raises ValueError, its message is kept in
        `problems` and reading goes on with the next."""
        try:
            yield
        except ValueError as error:
            self.problems.append(str(error))

    def read_each(self, read: Callable[[Any, str], Any]) -> Iterator:
        """What `read(record, where)` makes of the records of a file that is a list, but for those
        that are problems."""
        for index, record in enumerate(read_json(self.annotations, list)):
            with self.record():
                yield read(record, f"{self.annotations}: record {index}")

    def group_by_image(self, content: dict, images: dict) -> dict[Id, list[dict]]:
        """The annotations of a COCO file by image; one of an unknown image is a problem."""
        groups = defaultdict(list)
        for index, record in enumerate(take(content, "annotations", list, str(self.annotations))):
            with self.record():
                where = f"{self.annotations}: annotations[{index}]"
                number = take(record, "image_id", Id, where)
                if number not in images:
                    raise ValueError(f"{where}: image {number!r} is not in its images")
                groups[number].append(record)
        return groups

    def turn(
        self, names: list[str], rng: np.random.Generator, kind: str = "answers"
    ) -> tuple[str, Phrased]:
        """A random question about `names` and a random answer, which may say them again."""
        question = ask(self.source.task, names, rng, self.phrasings)
        return question, Phrased(reply(self.source.task, rng, self.phrasings, kind), names)


class Category(NamedTuple):
    """A class as prompts name it."""

    name: str
    is_thing: bool


def read_categories(content: dict, where: str) -> dict[int, Category]:
    """The categories of a COCO file in order of id; they are things unless it says otherwise.

    Roboflow adds the group of the classes as one more, of supercategory "none": it is left out."""
    categories, names = {}, set()
    records = by_id(content, "categories", where, int)
    groups = [record.get("supercategory") for record in records.values()]
    annotations = take({"annotations": []} | content, "annotations", list, where)
    used = {str(whole(a.get("category_id"))) for a in annotations if isinstance(a, dict)}
    for number, record in records.items():
        at = f"{where}: category {number}"
        name = take(record, "name", str, at)
        is_group = name in groups and record.get("supercategory") == "none"
        if is_group and str(number) not in used:
            continue
        name = check_words(clean_name(name), at)
        if name in names:
            raise ValueError(f"{at}: its name {name!r} is another category's as well; rename one")
        names.add(name)
        categories[number] = Category(name, take({"isthing": 1} | record, "isthing", Flag, at))
    return categories
