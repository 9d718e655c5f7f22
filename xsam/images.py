"""Pictures and masks as people see them, whatever their file, mode, depth or orientation.

An image is what every viewer shows: upright, RGB of 8 bits. What is inside a mask or a visual
prompt is decided here for every kind of picture and array. All functions raise ValueError that
names the file, also where its bytes are damaged. Legend: H W image size.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from scipy import ndimage

from xsam.files import cause_of

Shape = tuple[int, int]  # height and width
Picture = Image.Image | np.ndarray

# What Pillow's decoders raise on damaged bytes.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

# What brings an image upright, by its EXIF orientation; from 5 on height and width change places.
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_TURNS = {number: Image.Transpose[name] for number, name in enumerate(_TURNS.split(), start=2)}

VOID = (224, 224, 192)  # the colour of 255 in Pascal VOC's palette

NUM_CLASSES = 32  # where a mask has several levels below this, they are numbers and no shades


class EmptyMask(ValueError):
    """A mask with nothing inside."""


# ---- files ---------------------------------------------------------------------------------------


def read_image(path: Path | io.BytesIO, size: Shape | None = None) -> Image.Image:
    """An image, the first where a file has several, as viewers show it (`viewed`)."""
    with _image_errors(path):  # not by its path: Pillow garbles some TIFFs that it maps and turns
        image = Image.open(path if isinstance(path, io.BytesIO) else io.BytesIO(path.read_bytes()))
    return viewed(image, size, str(path))


def read_image_size(path: Path) -> Shape:
    """(height, width) of an image as viewers show it, from its header alone."""
    with _image_errors(path), path.open("rb") as file, Image.open(file) as image:
        if image.format == "TIFF":
            image.load()  # Pillow turns it itself, not always before
        size = image.height, image.width
        return size[::-1] if _orientation(image) > 4 else size


def read_region(path: Path, size: Shape) -> np.ndarray:
    """A PNG as a mask or visual prompt, bool [H, W]: its `foreground`."""
    return foreground(open_png(path, size), str(path))


def open_png(path: Path, size: Shape) -> Image.Image:
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
        is_unknown = isinstance(error, UnidentifiedImageError)
        cause = "Pillow knows no such format; save it as JPEG or PNG" if is_unknown else error
        cause = cause_of(cause, where)
        raise ValueError(f"{where}: cannot be read as an image ({cause})") from error


# ---- images --------------------------------------------------------------------------------------


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
        is_plain = type(image) is Image.Image and image.mode == "RGB"
        return image if is_plain else image.convert("RGB")


def _as_image(picture: Picture, where: str) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if hasattr(picture, "detach"):  # a tensor of any device and type
        picture = picture.detach().cpu()
        picture = picture.float() if picture.is_floating_point() else picture
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
        is_beyond = kind in "uf" and values.max() > 2**31 - 1
        values = values.astype(np.float32 if kind == "f" or is_beyond else np.int32)
    return Image.fromarray(values.reshape(shape[:2]) if is_grey else values)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Levels of any type as uint8. White is 1 of floats, 255, 4095 or 65535 of whole numbers (8, 12
    or 16 bits), the least that none is above. Measurements (floats above 1, levels below 0, or in
    less than an eighth of such a range) are shown from the lowest to the highest; one level far
    below all others is no data. What is not a number is black."""
    if values.dtype == np.uint8:
        return values
    finite = values[np.isfinite(values)].astype(np.float64)
    finite = finite if finite.size else np.zeros(1)
    low, high = finite.min(), finite.max()
    second = finite[finite > low].min(initial=high)
    if second - low > 4 * (high - second) > 0:
        low = second
    whites = (1, 255) if values.dtype.kind in "bf" else (255, 4095, 65535)
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is None or (white != whites[0] and low < high < low + white / 8):
        white = high
    else:
        low = 0.0
    levels = np.nan_to_num(values.astype(np.float64), nan=low).clip(low, white)
    return np.rint((levels - low) * 255 / max(white - low, 1e-9)).astype(np.uint8)


# ---- masks and visual prompts --------------------------------------------------------------------


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
        raise EmptyMask(f"{where}: is all black, a mask with no pixel")
    if len(shades) == 1:
        return levels > 0
    # Edges are thin. What fills squares of 3x3 pixels is an area, and the largest is meant that is
    # not nearly black, as paper around a stroke that was saved as JPEG.
    is_area = ndimage.minimum_filter(codes, 3) == ndimage.maximum_filter(codes, 3)
    is_area &= levels > levels.max() / 8
    areas, sizes = np.unique(colours[is_area], axis=0, return_counts=True)
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
    has_black = not others.all()  # around void's objects
    if has_black and not is_few and (colours.shape[2] == 3 or others.max() < NUM_CLASSES):
        colours[is_void] = 0
    return colours
