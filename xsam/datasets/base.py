"""What a dataset gives: `Sample`s, one record each at the image's own size; and what all readers of
datasets have in common.

Opening a dataset reads its annotations and says what it leaves out and what is wrong; `sample` then
reads one image with its masks and draws the words. Everything random comes from the generator that
is passed in. Legend: T targets, G visual prompts, H W image size.
"""

import contextlib
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from xsam.data import Sample
from xsam.datasets.formats import take
from xsam.datasets.sources import Source, locate
from xsam.prompts import PHRASINGS, ask, check_words, clean_name, reply


def pack(record, where: str) -> bytes:
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
    """What the readers have in common. A subclass fills `records` in `index` and makes a `Sample`
    of one in `sample`.

    `skipped` counts what the format's rules drop; `problems` has a message for each record that
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
        self.skipped: Counter[str] = Counter()
        self.problems: list[str] = []
        self.index()
        contents = []
        for place, record in enumerate(self.records):
            with self.record():
                contents.append(pack(record, f"{self.annotations}: sample {place}"))
        self.records = Packed(contents)

    def __len__(self) -> int:
        return len(self.records)

    def index(self) -> None:
        raise NotImplementedError

    def key(self, index: int) -> int | str:
        """What predictions for record `index` are filed under: the id of its image, or where an
        image has several records an id of its own."""
        raise NotImplementedError

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Record `index`, its words drawn from `rng`. Raises ValueError that names the record."""
        raise NotImplementedError

    def num_words(self, index: int) -> int:
        """How long the prompt of a record is, by a measure that reads no image: what differs from
        one record to the next, in words or in categories."""
        return 0

    def question(self, index: int) -> Sample:
        """Record `index` as evaluation asks it: its words are drawn from fixed numbers, its answers
        left to the model."""
        sample = self.sample(index, np.random.default_rng([0, index]))
        sample.turns = [(asked, None) for asked, _ in sample.turns]
        return sample

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Keeps the message of a record that cannot be read, and goes on with the next."""
        try:
            yield
        except ValueError as error:
            self.problems.append(str(error))

    def group_by_image(self, content: dict, images: dict) -> dict[int | str, list[dict]]:
        """The annotations of a COCO file by image; one of an image that it lacks is a problem."""
        where, groups = str(self.annotations), defaultdict(list)
        for record in take(content, "annotations", list, where):
            with self.record():
                number = take(record, "image_id", (int, str), f"{where}: annotation")
                if number not in images:
                    raise ValueError(f"{where}: annotation of image {number}, which it lacks")
                groups[number].append(record)
        return groups

    def turn(self, names: list[str], rng: np.random.Generator, kind: str = "answers"):
        """A random question about `names` and a random answer."""
        question = ask(self.source.task, names, rng, self.phrasings)
        return question, reply(self.source.task, rng, self.phrasings, kind)


def read_categories(content: dict, where: str) -> dict[int, dict]:
    """The categories of a COCO file in order of id, their names as prompts have them."""
    categories = by_id(take(content, "categories", list, where), f"{where}: categories", (int,))
    for number, category in categories.items():
        at = f"{where}: category {number}"
        name = check_words(clean_name(take(category, "name", str, at)), at)
        categories[number] = category | {"name": name}
    return categories


def by_id(records: list, where: str, kinds: tuple[type, ...] = (int, str)) -> dict:
    """{id: record}, in order of the ids, which must differ."""
    pairs = [(take(record, "id", kinds, where), record) for record in records]
    table = dict(sorted(pairs, key=lambda pair: (isinstance(pair[0], str), pair[0])))
    if len(table) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{where}: id {twice} is there more than once")
    return table
