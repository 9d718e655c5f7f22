"""How files are read and checked: pickles, tables, PNGs of segments and classes, and masks in every
encoding.

Whatever the bytes of a file, all functions here raise ValueError that names the file or the record
(records.py has what a record must hold). Legend: H W image size.
"""

import csv
import io
import itertools
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from xsam.datasets.records import Segmentation, expect, mask_parts, take, whole
from xsam.files import cause_of, read_json, read_text
from xsam.images import open_png

# ---- files ---------------------------------------------------------------------------------------


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers; refuses whatever would import or call something."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks to import {module}.{name}")


def read_refs(path: Path) -> list[dict]:
    """A RefCOCO file, pickle or JSON. Raises ValueError where it is damaged or a pickle holds more
    than plain data."""
    if path.suffix == ".json":
        return read_json(path, list)
    try:
        with path.open("rb") as file:
            refs = _PlainUnpickler(file, encoding="utf-8").load()
    except Exception as error:  # damaged bytes make the unpickler fail in any way
        raise ValueError(f"{path}: not a plain pickle of refs: {cause_of(error, path)}") from error
    if not isinstance(refs, list):
        raise ValueError(f"{path}: holds a {type(refs).__name__}, expected a list of refs")
    return refs


def read_tsv(path: Path) -> list[dict[str, str]]:
    """A table as a record a row; VLMEvalKit's have images as base64 in a column. Cells of a .csv
    are parted by what its head has most of."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = read_text(path)
    marks = ",;\t" if path.suffix.lower() == ".csv" else "\t"
    delimiter = max(marks, key=text.partition("\n")[0].count)
    lines = io.StringIO(text, newline="")
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    table = []
    try:
        for row in rows:
            if any(row.pop(None, ())):
                where = f"{path}: line {rows.reader.line_num}"
                raise ValueError(f"{where}: has more cells than the head of the table")
            table.append({key: value or "" for key, value in row.items()})
        return table
    except csv.Error as error:
        raise ValueError(
            f"{path}: line {rows.reader.line_num}: not a row of a table ({error}); "
            'a value that begins with a quote is quoted as a whole, with "" for a quote inside'
        ) from error


# ---- PNGs of segments and classes ----------------------------------------------------------------

SEGMENT_IDS = range(2**24)  # COCO panoptic writes them as colours: red + 256 green + 256² blue


def png_name(annotation: dict, image: str) -> str:
    """The PNG of an image: the annotation's own "file_name"; if it has none, the image's name."""
    name = annotation.get("file_name")
    return name if isinstance(name, str) and name else str(Path(image).with_suffix(".png"))


def read_segment_ids(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A COCO panoptic PNG as segment ids, int32 [H, W]; 0 is void."""
    image = open_png(path, size)
    if image.mode not in ("RGB", "RGBA", "P"):
        raise ValueError(f"{path}: its pixels are {image.mode}, segment ids are colours (RGB)")
    colours = np.asarray(image.convert("RGBA"))
    return (colours.view("<u4")[..., 0] & 0xFFFFFF).astype(np.int32)  # [H, W, 4] bytes to [H, W]


def segment_colours(ids: np.ndarray) -> np.ndarray:
    """Segment ids [H, W] as the pixels of a COCO panoptic PNG, uint8 [H, W, 3]."""
    return ((ids[..., None] >> (0, 8, 16)) & 255).astype(np.uint8)


def read_class_map(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A single-channel PNG of classes, uint8 [H, W]; 255 is unlabelled."""
    image = open_png(path, size)
    if image.mode not in ("L", "P"):
        raise ValueError(f"{path}: its pixels are {image.mode}, a map of classes has one channel")
    return np.asarray(image)


# ---- masks ---------------------------------------------------------------------------------------


def decode_mask(
    segmentation: Segmentation, size: tuple[int, int], where: str, may_be_empty: bool = False
) -> np.ndarray:
    """Any of the four COCO encodings as a mask, bool [H, W]: RLE with list or string counts, a list
    of RLEs, a list of polygons (`mask_parts`).

    Raises ValueError naming `where` if nothing valid is left, something does not fit the image, or
    no pixel is inside, unless it `may_be_empty` as a few of COCO's tiny polygons are. Everything is
    checked first: pycocotools writes beyond its memory where an RLE is too long.
    """
    height, width = size
    rles, rings = [], []
    for part in mask_parts(segmentation)[0]:
        if isinstance(part, dict):
            rles.append(checked_rle(part, size, where))
        else:
            ring = expect(part, list, f"{where}: a ring or RLE")
            rings.append(_checked_ring(ring, size, where))
    if rings:
        rles += coco_mask.frPyObjects(rings, height, width)
    if not rles:
        raise ValueError(f"{where}: no valid polygon or RLE in its segmentation")
    mask = coco_mask.decode(coco_mask.merge(rles)).view(bool)  # the union, [H, W]
    if not (may_be_empty or mask.any()):
        raise ValueError(f"{where}: its mask has no pixel in the image")
    return mask


def told_size(segmentation: Any) -> list | None:
    """(height, width) of the image of a mask, where it is an RLE, which tells it."""
    rles = (each for each in mask_parts(segmentation)[0] if isinstance(each, dict))
    size = next((rle.get("size") for rle in rles), None)
    return list(map(whole, size)) if isinstance(size, list) and len(size) == 2 else None


def rle_area(rle: dict, size: tuple[int, int], where: str) -> int:
    """Pixels inside an RLE that fits the image."""
    return int(coco_mask.area(checked_rle(rle, size, where)))


def encode_mask(mask: np.ndarray) -> dict:
    """A mask, bool [H, W], as JSON-ready compressed RLE."""
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def bounding_box(mask: np.ndarray) -> list[int]:
    """COCO's [x, y, width, height] of a mask that is not empty."""
    left, top, right, bottom = Image.fromarray(mask).getbbox()
    return [left, top, right - left, bottom - top]


def _checked_ring(ring: list, size: tuple[int, int], where: str) -> list[float]:
    """A polygon whose corners are numbers and no farther outside the image than it is large."""
    try:
        corners = np.array(ring, np.float64)  # also of numbers as text
    except (OverflowError, TypeError, ValueError):
        corners = np.array(np.nan)
    if np.isnan(corners).any():
        raise ValueError(f"{where}: a polygon holds something that is no number")
    if not (np.abs(corners) <= 2 * max(size)).all():
        raise ValueError(f"{where}: a polygon lies outside its image of {list(size)}")
    return corners.tolist()


def checked_rle(rle: dict, size: tuple[int, int], where: str) -> dict:
    """An RLE as pycocotools takes it, whose runs fill the image exactly."""
    if list(map(whole, take(rle, "size", list, where))) != list(size):
        raise ValueError(f"{where}: RLE of size {rle['size']!r:.60} in an image of {list(size)}")
    counts = take(rle, "counts", (list, str, bytes), where)
    if isinstance(counts, list):
        try:
            runs = np.array([expect(whole(run), int, where) for run in counts], np.int64)
        except OverflowError as error:
            raise ValueError(f"{where}: a run of its RLE is too long") from error
    else:
        try:
            runs = _runs(counts.encode("ascii") if isinstance(counts, str) else counts)
        except (UnicodeEncodeError, ValueError) as error:
            raise ValueError(f"{where}: its RLE is damaged ({error})") from error
    area = size[0] * size[1]
    if not ((runs >= 0) & (runs <= area)).all() or runs.sum() != area:
        raise ValueError(f"{where}: its RLE does not fit: the runs do not add up to {list(size)}")
    if isinstance(counts, list):
        return coco_mask.frPyObjects({"size": list(size), "counts": runs.tolist()}, *size)
    return {"size": list(size), "counts": counts}


def _runs(counts: bytes) -> np.ndarray:
    """Run lengths of a compressed RLE: numbers of five bits a character, the lowest first, from the
    fourth on as differences to the last but one (COCO's mask API)."""
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(codes) or (codes < 0).any() or (codes > 63).any() or codes[-1] & 32:
        raise ValueError("its counts are cut or hold a foreign character")
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 6:
        raise ValueError("a run is too long")
    position = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    numbers = np.add.reduceat((codes & 31) << (5 * position), starts)
    numbers -= np.where(codes[ends] & 16, 1 << (5 * (ends - starts + 1)), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def polygons(mask: np.ndarray, inset: int = 0) -> list[list[int]]:
    """Outlines [x0, y0, x1, y1, ...] along the pixel edges of [H, W] bool, or with an inset of 1
    through the pixels at the edge.

    COCO joins the polygons of an object and knows no holes, so the mask is cut into bands of rows
    with the same number of runs of pixels: a ring gives a cap, two sides and a bottom.
    """
    rows, edges = np.nonzero(np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1)))))
    runs = zip(rows[::2].tolist(), edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    bands: list[list[list[tuple[int, int, int]]]] = []  # bands of rows of (row, left, right)
    for _, group in itertools.groupby(runs, key=lambda run: run[0]):
        row, above = list(group), bands[-1][-1] if bands else []
        if len(row) == len(above) and all(map(_is_below, row, above)):
            bands[-1].append(row)
        else:
            bands.append([row])
    return [_outline(piece, inset) for band in bands for piece in zip(*band, strict=True)]


def _is_below(run: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    return run[0] == other[0] + 1 and run[1] < other[2] and other[1] < run[2]


def _outline(runs: tuple[tuple[int, int, int], ...], inset: int) -> list[int]:
    down = [(right - inset, y) for row, _, right in runs for y in (row, row + 1 - inset)]
    up = [(left, y) for row, left, _ in reversed(runs) for y in (row + 1 - inset, row)]
    return [number for point in down + up for number in point]


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask grown by a disc of `radius` pixels, bool [H, W]."""
    if not mask.any():
        return mask
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    window = tuple(slice(max(0, side.start - radius), side.stop + radius) for side in box)
    grown = mask.copy()
    grown[window] = ndimage.distance_transform_edt(~mask[window]) <= radius
    return grown
