"""How files are read and checked: JSON, pickles, tables, images, and masks in every encoding.

Whatever the bytes of a file, all functions here raise ValueError that names the file or the record
(records.py has what a record must hold). Legend: H W image size.
"""

import csv
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from xsam.datasets.records import Segmentation, expect, mask_parts, take, whole
from xsam.files import cause_of, read_text

# ---- files ---------------------------------------------------------------------------------------


def read_json(path: Path, kind: type | None = None, last_resort: str = "") -> Any:
    """The content of a JSON file, which must be of `kind` (list or dict) at its top."""
    text = read_text(path, last_resort)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        are_lines = str(error).startswith("Extra data: line 2 column 1 ")
        mend = "make its lines one list" if are_lines else "mend it there or fetch it again"
        raise ValueError(f"{path}: not valid JSON ({error}); {mend}") from error
    if kind is not None and not isinstance(content, kind):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a {kind.__name__}")
    return content


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
    """A VLMEvalKit table as a record a row; images are base64 in a column."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = io.StringIO(read_text(path), newline="")
    rows = csv.DictReader(lines, delimiter="\t", strict=True)
    try:
        return [
            {key: value or "" for key, value in row.items() if isinstance(key, str)} for row in rows
        ]
    except csv.Error as error:
        raise ValueError(
            f"{path}: line {rows.reader.line_num}: not a row of tab-separated values ({error}); "
            'a value that begins with a quote is quoted as a whole, with "" for a quote inside'
        ) from error


# ---- images --------------------------------------------------------------------------------------

SEGMENT_IDS = range(2**24)  # COCO panoptic writes them as colours: red + 256 green + 256² blue


# What Pillow's decoders raise on damaged bytes.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def read_image(path: Path | io.BytesIO, size: tuple[int, int] | None = None) -> Image.Image:
    """An RGB image; `size` (height, width), where the annotations tell it, must be the image's."""
    image = _open(path).convert("RGB")
    _check_size(path, image, size)
    return image


def png_name(annotation: dict, image: str) -> str:
    """The PNG of an image: the annotation's own "file_name"; if it has none, the image's name."""
    name = annotation.get("file_name")
    return name if isinstance(name, str) and name else str(Path(image).with_suffix(".png"))


def read_image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image, from its header alone."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except _DAMAGED as error:
        raise ValueError(f"{path}: cannot be read as an image ({cause_of(error, path)})") from error


def read_segment_ids(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A COCO panoptic PNG as segment ids, int32 [H, W]; 0 is void."""
    colours = np.asarray(_open_png(path, size).convert("RGBA"))
    return (colours.view("<u4")[..., 0] & 0xFFFFFF).astype(np.int32)


def segment_colours(ids: np.ndarray) -> np.ndarray:
    """Segment ids [H, W] as the pixels of a COCO panoptic PNG, uint8 [H, W, 3]."""
    return ((ids[..., None] >> (0, 8, 16)) & 255).astype(np.uint8)


def read_class_map(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A single-channel PNG of classes, uint8 [H, W]; 255 is unlabelled."""
    image = _open_png(path, size)
    if image.mode not in ("L", "P"):
        raise ValueError(f"{path}: its pixels are {image.mode}, a map of classes has one channel")
    return np.asarray(image)


def read_mask_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A PNG as a mask, bool [H, W]: inside is what is not black."""
    mask = np.asarray(_open_png(path, size).convert("RGB")).any(axis=-1)
    if not mask.any():
        raise ValueError(f"{path}: is all black, a mask with no pixel")
    return mask


def read_region(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A visual prompt that a person drew, bool [H, W]: where the image is brighter than 128."""
    mask = np.asarray(_open_png(path, size).convert("L")) > 128
    if not mask.any():
        raise ValueError(f"{path}: has no pixel brighter than 128, so it points nowhere")
    return mask


def _open_png(path: Path, size: tuple[int, int]) -> Image.Image:
    """Where each pixel means something, nothing lossy will do."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as file:
            file.verify()  # checksums, which reading pixels does not look at
    except _DAMAGED as error:
        raise ValueError(f"{path}: cannot be read as an image ({cause_of(error, path)})") from error
    image = _open(path, content)
    if image.format != "PNG":
        raise ValueError(f"{path}: is a {image.format} file, masks have to be PNG")
    _check_size(path, image, size)
    return image


def _open(path: Path | io.BytesIO, content: bytes | None = None) -> Image.Image:
    try:
        image = Image.open(path if content is None else io.BytesIO(content))
        image.load()
    except _DAMAGED as error:
        raise ValueError(f"{path}: cannot be read as an image ({cause_of(error, path)})") from error
    return image


def _check_size(path, image: Image.Image, size: tuple[int, int] | None) -> None:
    if size is not None and (image.height, image.width) != tuple(size):
        raise ValueError(
            f"{path}: is {image.height}x{image.width} (height x width), its annotation says "
            f"{size[0]}x{size[1]}"
        )


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
    mask = coco_mask.decode(coco_mask.merge(rles)).view(bool)
    if not (may_be_empty or mask.any()):
        raise ValueError(f"{where}: its mask has no pixel in the image")
    return mask


def rle_area(rle: dict, size: tuple[int, int], where: str) -> int:
    """Pixels inside an RLE that fits the image."""
    return int(coco_mask.area(checked_rle(rle, size, where)))


def encode_mask(mask: np.ndarray) -> dict:
    """A mask, bool [H, W], as JSON-ready compressed RLE."""
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def bounding_box(mask: np.ndarray) -> list[int]:
    """COCO's [x, y, width, height] of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


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
    if take(rle, "size", list, where) != list(size):
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
    return rle


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


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask grown by a disc of `radius` pixels, bool [H, W]."""
    if not mask.any():
        return mask
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    window = tuple(slice(max(0, side.start - radius), side.stop + radius) for side in box)
    grown = mask.copy()
    grown[window] = ndimage.distance_transform_edt(~mask[window]) <= radius
    return grown
