"""Pictures of what the model sees and predicts: labelled segments over an image.

The last box of the pipeline: scripts hand over an image with the predicted or the true masks and
save the picture that comes back. Drawn with Pillow alone; the curves of a run are in `curves.py`.

Legend: N segments, H W height and width of the image.
"""

import functools
import math
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from xsam.images import Picture, viewed

SMALLEST_SIDE = 480  # an image whose longest side is below this is enlarged to fit its labels

TINT = 0.5

TITLE_FONT_SIZE = 16

GAP = 12  # pixels of white around titles and between pictures

WHITE, BLACK = (255, 255, 255), (20, 20, 20)

# 64 saturated colours, every one the farthest in OKLab (Ottosson, 2020) from all before it; more
# segments than this begin again.
PALETTE_HEX = """
ff0000 0000ff 00ff00 008040 80bfff df00ff 800060 ffbf40 000080 ff80bf 0080df 40bf80 8000df
80ffdf bf8000 9f4000 006080 bf4080 ffff00 9f80ff 9fdf60 ff8060 ff009f 4040bf 800000 9f009f
009f9f 409f00 ff60ff 60009f 00dfdf 808000 6060ff 0000bf 004080 00ff9f 409fff bf40bf 9f40ff
00809f df6080 80bf00 bf0040 df9f40 bf6040 9f9f20 806000 df60bf 00df60 400080 00bfbf bfff80
6000ff 0060df 60df9f bfbf40 bf60ff ff00df dfdf00 9f2060 9fff20 ffdf80 80dfff df0060
"""

PALETTE = np.frombuffer(bytes.fromhex(PALETTE_HEX), np.uint8).reshape(-1, 3)


# ---- letters -------------------------------------------------------------------------------------

# Where systems keep their fonts.
FONT_FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
    "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip

SAME_FOR_ALL = ("lastresort", "blank", "notdef")  # fonts that draw one sign for every letter


@functools.cache
def _font_files() -> list[str]:
    """Pillow's own font of Latin letters, as "", then those of the system, plain ones first."""
    styles = ("bold", "italic", "oblique", "light", "thin", "condensed", "mono", "serif", "math")
    ranked = []
    for folder in FONT_FOLDERS:
        for path in Path(folder).expanduser().rglob("*.[oOtT][tT][fFcC]"):
            name = path.name.lower()
            if not any(word in name for word in SAME_FOR_ALL):
                num_styles = sum(style in name for style in styles)
                ranked.append(("sans" not in name, num_styles, str(path)))
    return ["", *(path for *_, path in sorted(ranked))]


@functools.lru_cache(maxsize=256)
def _load_font(file: str, size: int) -> ImageFont.FreeTypeFont | None:
    """None where it cannot be read, or has not this size, as fonts of emoji."""
    try:
        return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)
    except OSError:
        return None


@functools.cache
def _has_letter(file: str, letter: str) -> bool:
    """Whether a font draws a letter other than a character that no font has."""
    font = _load_font(file, TITLE_FONT_SIZE)
    if font is None or unicodedata.category(letter) in ("Cc", "Cs"):  # control, half a character
        return False
    drawn, missing = font.getmask(letter), font.getmask("\U0010ffff")
    is_same = drawn.size == missing.size and bytes(drawn) == bytes(missing)
    return drawn.getbbox() is not None and not is_same


def _legible(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """A text as it can be drawn, and the font: Pillow's, or the first of the system's that has all
    of its letters. Where none has, letters that Pillow's lacks are numbers, such as \\u732b."""
    text = unicodedata.normalize("NFC", text)
    # Spaces are not seen, nor is what joins letters, which Pillow's font draws a box for.
    joins = {ord(each): None for each in set(text) if unicodedata.category(each) == "Cf"}
    letters = [each for each in set(text.translate(joins)) if not each.isspace()]
    for file in _font_files():
        if all(_has_letter(file, letter) for letter in letters):
            return text if file else text.translate(joins), _load_font(file, size)
    numbers = {
        ord(letter): letter.encode("unicode_escape").decode()
        for letter in letters
        if not _has_letter("", letter)
    }
    return text.translate(joins | numbers), _load_font("", size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Breaks `text` to fit `width` pixels: at spaces, and within a word that is longer."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while font.getlength(line) > width and len(line) > 1:
                fits = (n for n in range(len(line) - 1, 1, -1) if font.getlength(line[:n]) <= width)
                end = next(fits, 1)
                lines.append(line[:end])
                line = line[end:]
        lines.append(line)
    return "\n".join(lines)


def _text_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Width and height of a block of lines, the same height for every text of as many lines."""
    line_height = sum(font.getmetrics())
    lines = text.split("\n")
    return math.ceil(max(font.getlength(line) for line in lines)), line_height * len(lines)


def _draw_text(draw, position: tuple[float, float], text: str, font, fill) -> None:
    """Draws a block of lines with its top left corner at `position`, spaced as `_text_size`."""
    for number, line in enumerate(text.split("\n")):
        top = position[1] + number * sum(font.getmetrics())
        draw.text((position[0], top), line, font=font, fill=fill)


def _add_title(picture: Image.Image, title: str) -> Image.Image:
    """The picture with its title in a white strip above it."""
    if not title:
        return picture
    title, font = _legible(title, TITLE_FONT_SIZE)
    width = max(picture.width, 10 * TITLE_FONT_SIZE)  # room for words above a thin picture
    title = _wrap(title, font, width - GAP)
    strip = _text_size(title, font)[1] + GAP
    titled = Image.new("RGB", (width, picture.height + strip), WHITE)
    titled.paste(picture, (0, strip))
    _draw_text(ImageDraw.Draw(titled), (GAP // 2, GAP // 2), title, font, BLACK)
    return titled


def _ink(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is read more easily on `colour`."""
    return BLACK if np.dot(colour, [0.299, 0.587, 0.114]) > 120 else WHITE


Label = tuple[str, tuple[int, int], tuple[int, int, int]]  # text, centre (x, y), colour


def _draw_labels(picture: Image.Image, labels: list[Label]) -> None:
    """Draws every label in a box as near to its centre as can be, inside the picture and off the
    boxes drawn before; over them only where nothing is free."""
    width, height = picture.size
    size = max(13, max(width, height) // 42)
    draw = ImageDraw.Draw(picture)
    placed = []
    for text, centre, colour in labels:
        text, font = _legible(text, size)
        text = _wrap(text, font, 0.6 * width)
        text_width, text_height = _text_size(text, font)
        box_width, box_height = text_width + 8, text_height + 2
        x = np.arange(max(1, width - box_width + 1)) + box_width / 2 - centre[0]
        y = np.arange(max(1, height - box_height + 1)) + box_height / 2 - centre[1]
        distance = np.hypot(y[:, None], x[None, :])  # of every place for the box's top left corner
        is_free = np.ones(distance.shape, dtype=bool)
        for left, top, right, bottom in placed:
            is_free[max(0, top - box_height) : bottom + 2, max(0, left - box_width) : right + 2] = 0
        if is_free.any():
            distance[~is_free] = np.inf
        top, left = (int(i) for i in np.unravel_index(np.argmin(distance), distance.shape))
        right, bottom = left + box_width - 1, top + box_height - 1
        placed.append((left, top, right, bottom))
        draw.rectangle((left, top, right, bottom), fill=colour, outline=_ink(colour))
        _draw_text(draw, (left + 4, top + 1), text, font, _ink(colour))


def draw_segments(
    image: Picture,
    masks: np.ndarray,
    labels: list[str],
    scores: list[float] | None = None,
    title: str = "",
) -> Image.Image:
    """The image with its segments tinted, outlined and labelled ("star 0.93"), below its title.

    Segment n has colour n of `PALETTE`, so the same order of segments gives the same colours. Where
    segments overlap the smaller one is on top, and the outlines of both are seen. An empty mask
    leaves no trace. A small image is enlarged by a whole factor.

    Args:
        image: a picture or array of any kind, drawn as `images.viewed` shows it.
        masks: [N, H, W] booleans, N = 0 allowed; they may overlap.
        labels: N names, wrapped if long.
        scores: N numbers written behind the names.
        title: a line or more above the picture, wrapped to its width.

    Raises:
        ValueError: the masks are not boolean or not of the image's size, upright or as it is
            stored, or the counts differ.
    """
    image = viewed(image, masks.shape[1:] if masks.ndim == 3 else None)
    N, H, W = _check_segments(masks, labels, scores)
    factor = math.ceil(SMALLEST_SIDE / max(W, H)) if max(W, H) < SMALLEST_SIDE else 1
    picture = image.resize((W * factor, H * factor), Image.Resampling.BICUBIC)
    areas = masks.sum(axis=(1, 2))
    largest_first = [n for n in np.argsort(-areas, kind="stable") if areas[n] > 0]
    segment_index = np.full((H, W), -1)  # the topmost segment of each pixel
    for n in largest_first:
        segment_index[masks[n]] = n
    segment_index = _enlarge(segment_index, factor)
    flat = Image.fromarray(PALETTE[segment_index % len(PALETTE)])
    picture.paste(Image.blend(picture, flat, TINT), mask=Image.fromarray(segment_index >= 0))

    pixels = np.array(picture)
    colours = [tuple(PALETTE[n % len(PALETTE)].tolist()) for n in range(N)]
    centres = {n: _outline(pixels, _enlarge(masks[n], factor), colours[n]) for n in largest_first}
    picture = Image.fromarray(pixels)
    texts = labels if scores is None else [f"{labels[n]} {scores[n]:.2f}" for n in range(N)]
    # The smallest first, they have the least room.
    _draw_labels(picture, [(texts[n], centres[n], colours[n]) for n in largest_first[::-1]])
    return _add_title(picture, title)


def _check_segments(
    masks: np.ndarray, labels: list[str], scores: list[float] | None
) -> tuple[int, int, int]:
    """N, H and W. Raises ValueError."""
    if masks.ndim != 3 or masks.dtype != bool:
        raise ValueError(
            f"masks are {masks.dtype} of shape {list(masks.shape)}: give NumPy booleans [N, H, W], "
            "for instance logits > 0"
        )
    N, H, W = masks.shape
    if len(labels) != N or (scores is not None and len(scores) != N):
        raise ValueError(
            f"{N} masks, {len(labels)} labels and "
            f"{'no' if scores is None else len(scores)} scores: give one of each per segment"
        )
    return N, H, W


def _outline(pixels: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int]:
    """Draws the outline of a mask on `pixels`; returns the (x, y) deepest in its largest part."""
    width = max(2, max(mask.shape) // 320)
    window = ndimage.find_objects(mask.astype(np.uint8))[0]
    mask, pixels = mask[window], pixels[window]
    # Distance to the nearest pixel outside; the picture's border counts as outside.
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    # A rim in black or white as well: the segment may have the colour of its outline.
    pixels[mask & (depth <= width + 1)] = colour
    pixels[mask & (depth <= 1)] = _ink(colour)
    parts, _ = ndimage.label(mask)
    largest_part = np.bincount(parts[mask]).argmax()
    y, x = np.unravel_index(np.argmax(depth * (parts == largest_part)), depth.shape)
    return window[1].start + int(x), window[0].start + int(y)


def _enlarge(values: np.ndarray, factor: int) -> np.ndarray:
    return values.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_prompts(
    image: Image.Image,
    regions: np.ndarray | list[np.ndarray] | None,
    region_images: list[Image.Image] | None,
    labels: list[str],
) -> list[Image.Image]:
    """The image with its visual prompts bool [G, H, W], if any; or the images that show them, bool
    [H', W'] each, then the image itself."""
    pictures, plain = [], draw_segments(image, np.zeros((0, image.height, image.width), bool), [])
    if region_images is None:
        return [plain if regions is None else draw_segments(image, regions, labels)]
    for number, reference_image in enumerate(region_images):
        masks = np.zeros((number + 1, reference_image.height, reference_image.width), bool)
        masks[number] = regions[number]  # in the colour of its number
        pictures.append(draw_segments(reference_image, masks, labels[: number + 1]))
    return [*pictures, plain]


def side_by_side(pictures: list[Image.Image], titles: list[str]) -> Image.Image:
    """The pictures in a row on white, scaled to the height of the tallest, a title above every one.

    Raises:
        ValueError: there is no picture, or not one title per picture ("" leaves it out).
    """
    if not pictures or len(pictures) != len(titles):
        raise ValueError(
            f"{len(pictures)} pictures, {len(titles)} titles: give one title per picture"
        )
    height = max(picture.height for picture in pictures)
    titled = []
    for picture, title in zip(pictures, titles, strict=True):
        width = max(1, round(picture.width * height / picture.height))
        picture = viewed(picture).resize((width, height), Image.Resampling.LANCZOS)
        titled.append(_add_title(picture, title))
    tallest = max(picture.height for picture in titled)
    total_width = sum(picture.width for picture in titled) + GAP * (len(titled) + 1)
    row = Image.new("RGB", (total_width, tallest + 2 * GAP), WHITE)
    left = GAP
    for picture in titled:
        row.paste(picture, (left, GAP + tallest - picture.height))
        left += picture.width + GAP
    return row
