"""How files are read and checked: JSON, pickles, tables, images, and masks in every encoding.

Whatever the bytes of a file, all functions here raise ValueError that names the file or the record
(records.py has what a record must hold). Legend: H W image size.
"""

import contextlib
import csv
import io
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from xsam.datasets.records import Segmentation, expect, mask_parts, take, whole
from xsam.files import cause_of, read_json, read_text

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

Shape = tuple[int, int]  # height and width
Picture = Image.Image | np.ndarray

SEGMENT_IDS = range(2**24)  # COCO panoptic writes them as colours: red + 256 green + 256² blue

# What Pillow's decoders raise on damaged bytes.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def read_image(path: Path | io.BytesIO, size: Shape | None = None) -> Image.Image:
    """An image, the first where a file has several, as viewers show it (`viewed`)."""
    with _image_errors(path):  # not by its path: Pillow garbles some TIFFs that it maps and turns
        image = Image.open(path if isinstance(path, io.BytesIO) else io.BytesIO(path.read_bytes()))
    return viewed(image, size, str(path))


def png_name(annotation: dict, image: str) -> str:
    """The PNG of an image: the annotation's own "file_name"; if it has none, the image's name."""
    name = annotation.get("file_name")
    return name if isinstance(name, str) and name else str(Path(image).with_suffix(".png"))


def read_image_size(path: Path) -> Shape:
    """(height, width) of an image as viewers show it, from its header alone."""
    with _image_errors(path), path.open("rb") as file, Image.open(file) as image:
        if image.format == "TIFF":
            image.load()  # Pillow turns it itself, not always before
        size = image.height, image.width
        return size[::-1] if _orientation(image) > 4 else size


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


def read_region(path: Path, size: Shape) -> np.ndarray:
    """A PNG as a mask or visual prompt, bool [H, W]: its `foreground`."""
    return foreground(_open_png(path, size), str(path))


def _open_png(path: Path, size: Shape) -> Image.Image:
    """Where each pixel means something, nothing lossy will do."""
    with _image_errors(path):
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as file:
            file.verify()  # checksums, which reading pixels does not look at
        image = Image.open(io.BytesIO(content))
    if image.format != "PNG":
        raise ValueError(f"{path}: is a {image.format} file, masks have to be PNG")
    return upright(image, size, str(path))


@contextlib.contextmanager
def _image_errors(where: Path | io.BytesIO | str) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        cause = cause_of(error, where)
        raise ValueError(f"{where}: cannot be read as an image ({cause})") from error


# ---- what a picture shows ------------------------------------------------------------------------

# What brings an image upright, by its EXIF orientation; from 5 on height and width change places.
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_TURNS = {number: Image.Transpose[name] for number, name in enumerate(_TURNS.split(), start=2)}

VOID = (224, 224, 192)  # the colour of 255 in Pascal VOC's palette

NUM_CLASSES = 32  # where a mask has several levels below this, they are numbers and no shades


def upright(image: Image.Image, size: Shape | None = None, where: str = "image") -> Image.Image:
    """An image turned by its EXIF orientation, or as it is stored where only that has the `size`
    that something else tells. Where both have it, as of a photo upside down, it is turned: browsers
    and labelling tools show it so. Raises ValueError where neither has it."""
    shown = (image,)
    with _image_errors(where):
        image.load()
        turn = _orientation(image)
        if turn > 1:
            shown = image.transpose(_TURNS[turn]), image.copy()
    for candidate in shown:
        if turn > 1:  # without its tag it is not turned again
            candidate.info = {k: v for k, v in candidate.info.items() if k == "transparency"}
        if size is None or (candidate.height, candidate.width) == tuple(size):
            return candidate
    stored = f" upright, {image.height}x{image.width} as stored" if turn > 4 else ""
    raise ValueError(
        f"{where}: is {shown[0].height}x{shown[0].width} (height x width){stored}, not "
        f"{size[0]}x{size[1]} as what goes with it says"
    )


def _orientation(image: Image.Image) -> int:
    turn = None
    with contextlib.suppress(Exception):  # of damaged tags, which viewers overlook
        turn = image.getexif().get(ExifTags.Base.Orientation)
    return turn if turn in _TURNS else 1


def viewed(picture: Picture, size: Shape | None = None, where: str = "image") -> Image.Image:
    """A picture, or an array [H, W] or [H, W, channels], as viewers show it: `upright`, RGB of 8
    bits, on white where it is transparent. Raises ValueError at anything else or another `size`."""
    image = upright(_as_image(picture, where), size, where)
    with _image_errors(where):
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(_eight_bits(np.asarray(image)))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    return image


def _as_image(picture: Picture, where: str) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    values = np.asarray(picture)
    shape, kind = values.shape, values.dtype.kind
    is_grey = values.ndim == 2 or shape[2:] == (1,)
    if 0 in shape or kind not in "biuf" or not (is_grey or shape[2:] in ((2,), (3,), (4,))):
        raise ValueError(
            f"{where}: is {values.dtype} of shape {list(shape)}; give a PIL image or an array of "
            "numbers, [H, W], [H, W, 3] or [H, W, 4]"
        )
    if not is_grey:
        values = _eight_bits(values)
    elif values.dtype not in (bool, np.uint8):
        values = values.astype(np.float32 if kind == "f" else np.int32)
    return Image.fromarray(values.reshape(shape[:2]) if is_grey else values)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Levels of any type as uint8. White is 1 of floats, 255, 4095 or 65535 of whole numbers (8, 12
    or 16 bits), the least that none is above; where one is above all, or below 0, the highest is,
    and the lowest is black. What is not a number is black."""
    if values.dtype == np.uint8:
        return values
    finite = values[np.isfinite(values)]
    low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
    whites = (1, 255, 65535) if values.dtype.kind in "bf" else (255, 4095, 65535)
    white = next((white for white in whites if high <= white and low == 0), high)
    levels = np.nan_to_num(values.astype(np.float64), nan=low, posinf=white, neginf=low)
    return np.rint((levels - low) * 255 / max(white - low, 1e-9)).astype(np.uint8)


def foreground(picture: Picture, where: str = "region") -> np.ndarray:
    """What is inside a mask or visual prompt, bool [H, W], in a picture or array of any kind.

    Inside is what is True; or opaque, where some of it is transparent; or else not black. Of the
    shades of a soft edge those above 128 of 255 are, of probabilities those above a half. Void is
    255 beside a class number, and VOID beside another colour. Raises ValueError where nothing is
    inside, or more than one level or colour could be meant.
    """
    colours = _mask_colours(upright(_as_image(picture, where), where=where), where)
    levels = colours.max(axis=2)
    codes = colours @ np.array([1, 256, 65536][: colours.shape[2]], np.int32)
    shades = np.unique(codes[levels > 0])
    if not len(shades):
        raise ValueError(f"{where}: is all black, a mask with no pixel")
    if len(shades) == 1:
        return levels > 0
    # Edges are thin. What fills squares of 3x3 pixels is an area, and the largest is meant.
    is_area = ndimage.minimum_filter(codes, 3) == ndimage.maximum_filter(codes, 3)
    areas, sizes = np.unique(colours[is_area & (levels > 0)], axis=0, return_counts=True)
    meant = areas[sizes.argmax()] if len(areas) else colours.max(axis=(0, 1))
    margin = meant.max() / 8
    is_other = (abs(areas - meant) > margin).any(axis=1) & (areas > margin).any(axis=1)
    is_numbered = shades[shades != 255].max() < NUM_CLASSES
    if is_numbered or is_other.any() or (len(shades) <= 3 and not len(areas)):
        some = np.unique(colours[levels > 0], axis=0)[:4].squeeze().tolist()
        raise ValueError(
            f"{where}: has {some} beside black, and does not say which of them is meant; make that "
            "white and all else black"
        )
    return levels > meant.max() * (128 / 255)


def _mask_colours(image: Image.Image, where: str) -> np.ndarray:
    """The levels [H, W, 1] or colours [H, W, 3] of a mask as numbers; 0 is outside, and void."""
    with _image_errors(where):
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
            low, high = alpha.getextrema()
            image = alpha if low < high or not high else image.convert("RGB")
        if image.mode not in ("1", "L", "F") and not image.mode.startswith("I"):
            image = image.convert("RGB")
    colours = np.array(image, np.float64 if image.mode == "F" else np.int32)
    colours = colours.reshape(*colours.shape[:2], -1)
    if (colours == colours[..., :1]).all():
        colours = colours[..., :1]
    if not (colours >= 0).all():
        raise ValueError(f"{where}: holds numbers below 0; give what is inside, as logits > 0")
    if image.mode == "F" and colours.max() <= 1:
        return colours > 0.5
    is_void = (colours == (VOID if colours.shape[2] == 3 else 255)).all(axis=2)
    others = colours.max(axis=2)[~is_void]
    is_few = np.count_nonzero(others) <= 0.05 * is_void.sum()  # stray pixels, no class
    if not is_few and (colours.shape[2] == 3 or others.max() < NUM_CLASSES):
        colours[is_void] = 0
    return colours


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
