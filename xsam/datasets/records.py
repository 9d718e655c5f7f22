"""The fields of a record: which there must be, and of which type.

A reader names the fields that it wants and their types once, as keywords of `unpack` or as the
annotations of a NamedTuple for `parse`. Both raise ValueError naming the file, the record and the
field that is wrong: `where` is what comes before the field, "FILE: RECORD".
"""

import itertools
import math
from collections import Counter
from collections.abc import Container, Iterator
from types import UnionType
from typing import Any, NamedTuple, NewType, TypeVar

Id = int | str
Segmentation = dict | list  # a mask in any of COCO's encodings
Flag = NewType("Flag", bool)  # 0 or 1 on disk; 0 where it is absent
Side = NewType("Side", int)  # of an image in pixels; some files write it as a string


# ---- fields --------------------------------------------------------------------------------------


def unpack(record: Any, where: str, **kinds: Any) -> list:
    """The fields `kinds` of a record: {name: type}, a class, a union of classes, Flag or Side."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a dict, got {_shorten(record)}")
    return [
        value if type(value := record.get(key)) is kind else take(record, key, kind, where)
        for key, kind in kinds.items()
    ]


Record = TypeVar("Record", bound=tuple)


def parse(kind: type[Record], record: Any, where: str) -> Record:
    """A record as the NamedTuple `kind`, whose annotations are the types of its fields."""
    return kind(*unpack(record, where, **kind.__annotations__))


def take(record: Any, key: str, kind: Any, where: str) -> Any:
    """One field of a record."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a dict, got {_shorten(record)}")
    if kind is Flag:
        value = 0 if record.get(key) is None else whole(record[key])
        if not isinstance(value, int) or value not in (0, 1):
            raise ValueError(f"{where}: {key!r} is {_shorten(value)}, neither 0 nor 1")
        return bool(value)
    if key not in record:
        raise ValueError(f"{where}: has no {key!r}")
    value = whole(record[key]) if kind in (Id, int, Side, int | list) else record[key]
    if kind is not Side:
        value = expect(value, kind, f"{where}: {key!r}")
        if kind is Segmentation and not mask_parts(value)[0]:
            raise ValueError(f"{where}: no valid polygon or RLE in its segmentation")
        return value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**16:
        raise ValueError(f"{where}: {key!r} is {_shorten(value)}, no number of pixels")
    return value


def whole(value: Any) -> Any:
    """A whole number that an exporter wrote as a text or with a point as an int, so that "12" and
    12 are one id; all else as it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 19:
        return int(value) if str(int(value)) == value.strip() else value  # "007" is a name
    return value


def mask_parts(segmentation: Segmentation) -> tuple[list, int]:
    """The RLEs and polygons (flat lists) of a segmentation, and how many polygons are dropped, of
    under six or of an odd number of coordinates. A polygon may stand without a list around it (VGG
    Image Annotator) or in several (GeoJSON), and its corners may be pairs (Labelbox, Supervisely)
    or {"x", "y"} (V7)."""
    parts = list(_parts(segmentation)) if segmentation != [] else []
    valid = [p for p in parts if not isinstance(p, list) or (len(p) >= 6 and len(p) % 2 == 0)]
    return valid, len(parts) - len(valid)


def _parts(shape: Any, depth: int = 4) -> Iterator[Any]:
    """RLEs, flat lists of coordinates, and what is neither, out of lists in lists."""
    inner = shape if isinstance(shape, list) and depth else []
    if not inner or not isinstance(inner[0], list | dict):  # coordinates, mostly
        yield shape
        return
    inner = [[each["x"], each["y"]] if _is_corner(each) else each for each in inner]
    if all(isinstance(pair, list) and len(pair) == 2 for pair in inner):
        yield list(itertools.chain(*inner))
    elif all(isinstance(each, list | dict) for each in inner):
        for each in inner:
            yield from _parts(each, depth - 1)
    else:
        yield shape


def _is_corner(point: Any) -> bool:
    return isinstance(point, dict) and {"x", "y"} <= point.keys()


def expect(value: Any, kind: Any, where: str) -> Any:
    """`value`, which must be of `kind`, a class or several as a union or tuple; an int may stand
    for a float, a bool never for a number."""
    kinds = kind.__args__ if isinstance(kind, UnionType) else kind
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    accepted = (*kinds, int) if float in kinds else kinds
    is_number = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, accepted) and (not isinstance(value, bool) or bool in kinds) and is_number:
        return value
    names = " or ".join(accepted.__name__ for accepted in kinds)
    raise ValueError(f"{where}: expected {names}, got {_shorten(value)}")


def label(record: Any, key: str, known: str, unknown: str) -> str:
    """How messages name a record: `known` with its `key` for {}, or `unknown` if it has none."""
    value = record.get(key) if isinstance(record, dict) else None
    return known.format(value) if isinstance(value, Id) else unknown


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


# ---- COCO's layout -------------------------------------------------------------------------------


class Size(NamedTuple):
    """Of an image, as arrays have it."""

    height: Side
    width: Side


class CocoImage(NamedTuple):
    """An entry of "images"."""

    id: Id
    file_name: str
    height: Side
    width: Side

    @property
    def size(self) -> Size:
        """Height and width, in pixels."""
        return Size(self.height, self.width)


class CocoInstance(NamedTuple):
    """An entry of "annotations" in an instances file."""

    id: Id
    image_id: Id
    category_id: int
    segmentation: Segmentation
    iscrowd: Flag


class CocoSegment(NamedTuple):
    """An entry of "segments_info" in a panoptic file."""

    id: int
    category_id: int
    iscrowd: Flag


def by_id(content: dict, key: str, where: str, kind: Any = Id) -> dict:
    """The records `content[key]` as {id: record}, in order of their ids, which must differ."""
    records, where = take(content, key, list, where), f"{where}: {key}"
    pairs = [(take(r, "id", kind, f"{where}[{index}]"), r) for index, r in enumerate(records)]
    table = dict(sorted(pairs, key=lambda pair: (isinstance(pair[0], str), pair[0])))
    if len(table) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{where}: id {twice} is there more than once")
    return table


def check_category(number: int, categories: Container[int], where: str) -> None:
    """Raises ValueError at a category that the file does not have."""
    if number not in categories:
        raise ValueError(f"{where}: category {number!r} is not in its categories")
