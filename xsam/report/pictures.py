"""Pictures of what the model sees and predicts: labelled segments over an image.

The last box of the pipeline: scripts hand over an image with the predicted or the true masks and
save the picture that comes back. Drawn with Pillow alone; the curves of a run are in `curves.py`.
Letters and lines grow with the picture, so that they are as legible on 4,000 pixels as on 400.

Legend: N segments, H W height and width of the image.
"""

import bisect
import functools
import itertools
import math
import unicodedata
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from xsam.images import Picture, viewed

ENLARGED_SIDE = 640  # a smaller image is enlarged to about this, so that labels find room

OUTLINE_SIDE = 1024  # outlines of a larger image are found on about as many pixels

SMALLEST_LETTERS = 11  # pixels

MOST_LEGEND = 40  # names below a picture

LABEL_REACH = 40  # how far a label may be from its segment, in quarters of a letter

TAKEN = 1e6  # the cost of covering another label

WHITE, BLACK, GREY = (255, 255, 255), (20, 20, 20), (128, 128, 128)

# Colours neither dark nor pale, every one the farthest from all before it in OKLab (Ottosson,
# 2020), as seen by readers of all colours, without red, without green and without blue (Machado et
# al., 2009), whichever tells them apart least. Higher numbers begin again.
PALETTE_HEX = """
dd2233 00eeff 2233dd cc77ff ffcc00 009999 882288 dd8833 6666bb 88cc88 992222 ee99cc
ee5599 8855ff 117755 9988cc 995588 55ee77 77bbff 00bb66 776600 bbbb00 7711bb cc22bb
cc0066 bb6677 0077dd 225599 ee5511 88eeaa 5544ee ff7777 4499ee 33bbbb 992266 ff55dd
"""

PALETTE = np.frombuffer(bytes.fromhex(PALETTE_HEX), np.uint8).reshape(-1, 3)

Colour = tuple[int, int, int]

Text = str | list[tuple[str, int | None]]  # or pieces, each with the number of its colour or none


def number_colours(*groups: list[Hashable]) -> list[list[int]]:
    """Colours for the segments of pictures that stand side by side, a list for each: those of one
    class, name or other key have one colour in all of them. The first keys have the colours that
    are told apart best."""
    keys = list(dict.fromkeys(key for group in groups for key in group))
    return [[keys.index(key) for key in group] for group in groups]


def colour_of(number: int) -> Colour:
    return tuple(PALETTE[number % len(PALETTE)].tolist())


def _ink(colour: Colour) -> Colour:
    """Black or white, whichever is read more easily on `colour`."""
    return BLACK if np.dot(colour, [0.299, 0.587, 0.114]) > 120 else WHITE


def letter_size(picture: Image.Image) -> int:
    """Pixels of the letters on and above a picture."""
    return max(SMALLEST_LETTERS, round(math.sqrt(picture.width * picture.height) / 38))


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
    font = _load_font(file, SMALLEST_LETTERS)
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


class Run(NamedTuple):
    """Words on one line that have one font and colour."""

    left: float
    text: str
    font: ImageFont.FreeTypeFont
    colour: int | None

    @property
    def right(self) -> float:
        return self.end_with(self.text)

    def end_with(self, text: str) -> float:
        """Its right side if it were another text."""
        return self.left + self.font.getlength(text) + 2 * self.pad

    @property
    def pad(self) -> float:
        """Colour on either side of the words."""
        return 0 if self.colour is None else self.font.size / 5


def _lay_out(text: Text, size: int, width: float) -> list[list[Run]]:
    """Lines that fit `width` pixels, broken at spaces, and within a word that is longer."""
    lines: list[list[Run]] = [[]]
    is_apart = True  # a space comes next
    for piece, colour in [(text, None)] if isinstance(text, str) else text:
        for number, paragraph in enumerate(piece.split("\n")):
            if number:
                lines.append([])
            written, font = _legible(paragraph, size)
            run, is_apart = None, is_apart or paragraph[:1].isspace()
            for word in written.split():
                end = lines[-1][-1].right if lines[-1] else 0
                new = Run(end + font.getlength(" ") * (end > 0 and is_apart), word, font, colour)
                if run is not None:
                    new = run._replace(text=f"{run.text} {word}")
                if new.right > width + (0 if is_apart else size / 2) and lines[-1]:
                    lines.append([])
                    run, new = None, Run(0, word, font, colour)
                while new.right > width and len(new.text) > 1:
                    starts = itertools.accumulate(new.text)
                    cut = bisect.bisect([*starts][:-1], width, key=new.end_with) or 1
                    lines[-1].append(new._replace(text=new.text[:cut]))
                    lines.append([])
                    new = Run(0, new.text[cut:], font, colour)
                if run is not None:
                    lines[-1].pop()
                lines[-1].append(new)
                run, is_apart = new, True
            is_apart = paragraph[-1:].isspace() or not written
    return lines


def _block_size(lines: list[list[Run]], size: int) -> tuple[int, int]:
    """Width and height of a block of lines, the same height for every text of as many lines."""
    right = max((line[-1].right for line in lines if line), default=0)
    return math.ceil(right), round(1.4 * size) * len(lines)


def _write(draw, corner: tuple[int, int], lines: list[list[Run]], size: int, ink: Colour) -> None:
    """Writes a block of lines with its top left corner there, in `ink`; words that have a colour
    stand on it."""
    for number, line in enumerate(lines):
        top = corner[1] + number * round(1.4 * size)
        for left, text, font, colour in line:
            run = Run(corner[0] + left, text, font, colour)
            fill = ink
            if colour is not None:
                box = (run.left, top + 0.1 * size, run.right, top + 1.3 * size)
                draw.rounded_rectangle(box, size / 4, colour_of(colour))
                fill = _ink(colour_of(colour))
            draw.text((run.left + run.pad, top + 1.05 * size), text, fill, font, anchor="ls")


def _add_text(picture: Image.Image, title: Text, legend: Text = "") -> Image.Image:
    """The picture with its title in a white strip above it, and a legend in one below."""
    size = letter_size(picture)
    width = max(picture.width, 10 * size)  # room for words beside a thin picture
    blocks = [_lay_out(text, size, width - size) if text else [] for text in (title, legend)]
    above, below = (_block_size(block, size)[1] + size * bool(block) for block in blocks)
    if width == picture.width and not above and not below:
        return picture
    titled = Image.new("RGB", (width, above + picture.height + below), WHITE)
    titled.paste(picture, (0, above))
    titled.info["legend"] = below  # pixels, which `side_by_side` leaves out where it compares
    draw = ImageDraw.Draw(titled)
    for block, top in zip(blocks, (0, above + picture.height), strict=True):
        _write(draw, (size // 2, top + size // 2), block, size, BLACK)
    return titled


def find_spans(text: str, phrases: list[str]) -> list[tuple[int, int] | None]:
    """Where each phrase stands in a text, (start, end) in characters: the first place that no
    phrase before it has, or None."""
    spans: list[tuple[int, int] | None] = []
    for phrase in phrases:
        start = text.find(phrase) if phrase else -1
        while start >= 0 and any(s and start < s[1] and s[0] < start + len(phrase) for s in spans):
            start = text.find(phrase, start + 1)
        spans.append((start, start + len(phrase)) if start >= 0 else None)
    return spans


def colour_phrases(
    text: str, spans: list[tuple[int, int] | None], colours: list[int]
) -> list[tuple[str, int | None]]:
    """A title whose spans, (start, end) in characters, stand on the colours of their segments; of
    spans that overlap the first in the text does."""
    pieces, end = [], 0
    for span, colour in sorted((s, c) for s, c in zip(spans, colours, strict=True) if s):
        if span[0] >= end:
            pieces += [(text[end : span[0]], None), (text[slice(*span)], colour)]
            end = span[1]
    return [*pieces, (text[end:], None)]


# ---- segments ------------------------------------------------------------------------------------

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the picture


class Shape(NamedTuple):
    """A segment on the picture. `depth` float32 [bottom - top, right - left] is the distance to its
    outline in pixels of the picture, negative outside."""

    box: Box
    depth: np.ndarray
    deepest: tuple[int, int]  # x and y of the place farthest from its outline
    reach: float  # how far that is


def _measure(mask: np.ndarray, scale: float, margin: float) -> Shape:
    """The shape of a mask [H, W], not empty, on a picture `scale` times as large, with `margin`
    pixels around it. Its outline is smooth however few or many pixels the mask has."""
    H, W = mask.shape
    step = max(1, round(max(H, W) / OUTLINE_SIDE))  # every how many pixels are looked at
    if step > 1:
        rows, columns = (np.arange(step // 2, side + step // 2, step) for side in (H, W))
        seen = mask[rows.clip(max=H - 1)][:, columns.clip(max=W - 1)]
        if not seen.any():  # thinner than a step
            seen[tuple(np.argwhere(mask).T // step)] = True
        mask = seen
    cell = scale * step  # pixels of the picture
    around = math.ceil(margin / cell) + 2
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = max(0, rows[0] - around), max(0, columns[0] - around)
    mask = mask[top : rows[-1] + 1 + around, left : columns[-1] + 1 + around]
    edge = mask & ~ndimage.binary_erosion(mask, border_value=1)  # the picture's border is no edge
    distance = ndimage.distance_transform_edt(~edge) if edge.any() else np.full(mask.shape, 1e4)
    depth = np.where(mask, distance + 0.5, 0.5 - distance)
    # Without the steps of pixels, but for what is one pixel thin and would be lost.
    is_thin = mask & ~ndimage.binary_opening(mask, np.ones((2, 2)))
    smooth = ndimage.gaussian_filter(depth, 1 if scale == 1 else 1.5)
    smooth = np.where(is_thin, depth, smooth)
    height, width = mask.shape
    y, x = np.arange(height) + top, np.arange(width) + left
    border = [np.minimum(i + 1, math.ceil(side / step) - i) for i, side in ((y, H), (x, W))]
    inside = np.minimum(np.minimum.outer(*border), depth)
    place = np.unravel_index(inside.argmax(), inside.shape)
    right, bottom = min(W, (left + width) * step), min(H, (top + height) * step)
    box = [round(side * scale) for side in (left * step, top * step, right, bottom)]
    source = (0, 0, (right / step - left), (bottom / step - top))
    depth = Image.fromarray((smooth * cell).astype(np.float32))
    size = box[2] - box[0], box[3] - box[1]
    depth = np.asarray(depth.resize(size, Image.Resampling.BILINEAR, source))
    deepest = tuple(int((i[n] + 0.5) * cell) for i, n in ((x, place[1]), (y, place[0])))
    return Shape(tuple(box), depth, deepest, float(inside[place] * cell))


def _paint(picture: Image.Image, shape: Shape, colour: Colour, depths: list, shares: list) -> None:
    """Mixes a colour into the picture by the share, 0 to 1, that goes with the depth of a pixel,
    linearly between `depths`."""
    alpha = np.interp(shape.depth, depths, [255 * share for share in shares])
    picture.paste(colour, shape.box, Image.fromarray(alpha.astype(np.uint8)))


def _outline(picture: Image.Image, shape: Shape, colour: Colour, line: float) -> None:
    """A line inside the shape's edge, and a thin one outside, black or white, that sets it off from
    any ground."""
    rim = max(1.0, line / 2)
    _paint(picture, shape, _ink(colour), [-rim - 0.5, 0.5 - rim, 0, 1], [0, 0.8, 0.8, 0])
    _paint(picture, shape, colour, [-0.5, 0.5, line - 0.5, line + 0.5], [0, 1, 1, 0])


def _hatch(picture: Image.Image, shape: Shape, colour: Colour, line: float) -> None:
    """Parallel strokes inside the shape."""
    left, top, right, bottom = shape.box
    places = (np.arange(top, bottom)[:, None] + np.arange(left, right)) % (6 * line)
    stroke = np.clip(line / 2 + 0.5 - abs(places - 3 * line), 0, 1)
    alpha = 255 * stroke * np.clip(shape.depth + 0.5, 0, 1)
    picture.paste(colour, shape.box, Image.fromarray(alpha.astype(np.uint8)))


def _draw_shape(
    picture: Image.Image, shape: Shape, colour: Colour, line: float, kind: str
) -> Shape:
    """A segment ("") softly tinted, most at its outline, so that its own colours are seen; or a
    visual prompt as what it is. Returns the shape that its label goes to; beside it, if its reach
    is 0."""
    if kind == "point":
        _draw_dot(picture, shape.deepest, 6 * line, colour)
        return _draw_dot(picture, shape.deepest, 3 * line, colour)
    if kind == "box":
        y, x = np.nonzero(shape.depth > 0)
        sides = zip((y, x), shape.depth.shape, strict=True)
        sides = [np.minimum(np.arange(n) - i.min(), i.max() - np.arange(n)) + 0.5 for i, n in sides]
        corner = int(shape.box[0] + x.min()), int(shape.box[1] + y.min())
        shape = Shape(shape.box, np.minimum.outer(*sides), corner, 0)
    elif kind == "scribble":  # its middle: it was drawn with a thick pen
        shape = Shape(shape.box, shape.depth - 0.5 * shape.reach, shape.deepest, 0)
        _paint(picture, shape, colour, [-0.5, 0.5], [0, 1])
    elif kind == "mask":
        shape = shape._replace(reach=0)
        _hatch(picture, shape, colour, line)
    else:
        _paint(picture, shape, colour, [-0.5, 0.5, 12 * line], [0, 0.45, 0.2])
    _outline(picture, shape, colour, line)
    return shape


def _draw_dot(picture: Image.Image, centre: tuple, radius: float, colour: Colour) -> Shape:
    """A disc with a rim in black or white."""
    side, rim = math.ceil(radius) + 1, max(1, radius / 5)
    offsets = np.arange(-side, side + 1)
    x, y = centre
    box = x - side, y - side, x + side + 1, y + side + 1
    shape = Shape(box, radius - np.hypot(offsets, offsets[:, None]), centre, 0)
    _paint(picture, shape, _ink(colour), [-0.5, 0.5], [0, 1])
    _paint(picture, shape, colour, [rim - 0.5, rim + 0.5], [0, 1])
    return shape


# ---- labels --------------------------------------------------------------------------------------


def _take_place(
    weight: np.ndarray, cell: int, centre: tuple[int, int], box_size: tuple[int, int]
) -> Box | None:
    """The box that is nearest to `centre` and covers least, off all boxes that were taken before;
    None where none is free. `weight` is what it costs to cover each cell of the picture, in cells
    of distance; the box is marked as taken there."""
    x, y = centre[0] / cell, centre[1] / cell
    width, height = (math.ceil(side / cell) + 1 for side in box_size)  # and a gap
    top, left = max(0, int(y - LABEL_REACH - height)), max(0, int(x - LABEL_REACH - width))
    near = weight[top : int(y + LABEL_REACH + height), left : int(x + LABEL_REACH + width)]
    if near.shape[0] < height or near.shape[1] < width:
        return None
    sums = np.pad(near, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    cost = sums[height:, width:] - sums[:-height, width:]
    cost += sums[:-height, :-width] - sums[height:, :-width]  # of places of its top left corner
    rows, columns = np.arange(cost.shape[0]) + top, np.arange(cost.shape[1]) + left
    cost += np.hypot((rows + height / 2 - y)[:, None], columns + width / 2 - x)
    row, column = np.unravel_index(cost.argmin(), cost.shape)
    if cost[row, column] >= TAKEN / 2:
        return None
    row, column = int(rows[row]), int(columns[column])
    weight[row : row + height, column : column + width] = TAKEN
    return column * cell, row * cell, column * cell + box_size[0], row * cell + box_size[1]


def _draw_labels(
    picture: Image.Image, shapes: dict[int, Shape], texts: list[str], colours: list[int]
) -> list[tuple[str, int | None]]:
    """Writes every label on its segment where that has room, else beside it with a line to it; no
    label covers another. What finds no room near it has a number in its place, if there is room for
    that, and its name in the legend, which is returned; so have all that would lie beside theirs
    where the labels would fill much of the picture."""
    size, draw = letter_size(picture), ImageDraw.Draw(picture)
    cell, stride = max(1, size // 4), max(1, size // 8)
    weight = np.zeros((picture.height // cell, picture.width // cell))
    blocks, boxes, numbers = {}, {}, {}
    for n, shape in shapes.items():
        lines = _lay_out(texts[n], size, 0.5 * picture.width)
        width, height = _block_size(lines, size)
        is_inside = shape.depth > 0
        has_room = np.count_nonzero(is_inside) > 5 * width * height and shape.reach > 0.7 * height
        places = np.argwhere(is_inside[::stride, ::stride]) * stride + shape.box[1::-1]
        y, x = np.clip(places // cell, 0, np.array(weight.shape) - 1).T
        weight[y, x] = np.maximum(weight[y, x], 0.05 if has_room else 8)
        blocks[n] = lines, (width + size // 2, height), has_room
    is_crowded = sum(math.prod(block[1]) for block in blocks.values()) > math.prod(picture.size) / 4
    for n, shape in shapes.items():
        lines, box_size, has_room = blocks[n]
        box = None
        if has_room or not is_crowded:
            box = _take_place(weight, cell, shape.deepest, box_size)
        if box is None:
            number = numbers.setdefault((texts[n], colours[n]), len(numbers) + 1)
            if number > MOST_LEGEND:
                continue
            lines = _lay_out(str(number), size, picture.width)
            box_size = _block_size(lines, size)[0] + size // 2, round(1.4 * size)
            box = _take_place(weight, cell, shape.deepest, box_size)
        if box is not None:
            boxes[n] = lines, box
    for n, (_, box) in boxes.items():
        x, y = shapes[n].deepest
        end = np.clip(x, box[0], box[2]), np.clip(y, box[1], box[3])
        if math.dist((x, y), end) > size / 3:
            colour, line = colour_of(colours[n]), max(1, size // 8)
            draw.line((x, y, *end), _ink(colour), 2 * line + 1)
            draw.line((x, y, *end), colour, line)
            _draw_dot(picture, (x, y), 2 * line, colour)
    for n, (lines, box) in boxes.items():
        colour = colour_of(colours[n])
        draw.rounded_rectangle(box, size / 4, colour, _ink(colour))
        _write(draw, (box[0] + size // 4, box[1]), lines, size, _ink(colour))
    legend: list[tuple[str, int | None]] = []
    for (text, colour), number in [*numbers.items()][:MOST_LEGEND]:
        legend += [(f"{number} {text}", colour), (" ", None)]
    if len(numbers) > MOST_LEGEND:
        legend.append((f"and {len(numbers) - MOST_LEGEND} more", None))
    return legend


# ---- pictures ------------------------------------------------------------------------------------


def draw_segments(
    image: Picture,
    masks: np.ndarray,
    labels: list[str],
    scores: list[float] | None = None,
    title: Text = "",
    colours: list[int] | None = None,
    kinds: list[str] | None = None,
    ignore: np.ndarray | None = None,
) -> Image.Image:
    """The image with its segments tinted, outlined and labelled ("star 0.93"), below its title.

    Segments of one label have one colour and are told apart by their outlines, so that a class
    looks the same wherever it is and in truth and prediction (`number_colours`). Smaller segments
    are drawn over larger ones. An empty mask leaves no trace. Labels stand on their segments, or
    beside those that they would hide; where many stand close, numbers stand in the picture and the
    names below it. A small image is enlarged by a whole factor.

    Args:
        image: a picture or array of any kind, drawn as `images.viewed` shows it.
        masks: [N, H, W] booleans, N = 0 allowed; they may overlap.
        labels: N names, wrapped if long.
        scores: N numbers written behind the names.
        title: a line or more above the picture, wrapped to its width; pieces of it may stand on
            the colours of segments (`colour_phrases`).
        colours: N numbers of colours; of class numbers or any others. Default: by label.
        kinds: what each mask is: "" a segment (default), or a visual prompt, "point", "scribble",
            "box" or "mask", which is drawn as such.
        ignore: [H, W] booleans, pixels without a label: hatched in grey.

    Raises:
        ValueError: the masks are not boolean or not of the image's size, upright or as it is
            stored, or the counts differ.
    """
    image = viewed(image, masks.shape[1:] if masks.ndim == 3 else None)
    N, H, W = _check_segments(masks, labels, scores)
    colours = number_colours(labels)[0] if colours is None else colours
    kinds = [""] * N if kinds is None else kinds
    scale = max(1, round(ENLARGED_SIDE / max(W, H)))
    picture = image.resize((W * scale, H * scale), Image.Resampling.BICUBIC)
    line = max(1.5, letter_size(picture) / 8)
    if ignore is not None and ignore.any():
        _hatch(picture, _measure(ignore, scale, 0), GREY, line)
    areas = masks.sum(axis=(1, 2))
    shapes = {}
    for n in np.argsort(-areas, kind="stable").tolist():
        if areas[n]:
            shape = _measure(masks[n], scale, 2 * line)
            shapes[n] = _draw_shape(picture, shape, colour_of(colours[n]), line, kinds[n])
    texts = labels if scores is None else [f"{labels[n]} {scores[n]:.2f}" for n in range(N)]
    # The smallest first, they have the least room.
    legend = _draw_labels(picture, dict(reversed(shapes.items())), texts, colours)
    return _add_text(picture, title, legend)


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


def draw_prompts(
    image: Image.Image,
    regions: np.ndarray | list[np.ndarray] | None,
    region_images: list[Image.Image] | None,
    labels: list[str],
    kinds: list[str] | None = None,
    colours: list[int] | None = None,
) -> list[Image.Image]:
    """The image with its visual prompts bool [G, H, W], if any; or the images that show them, bool
    [H', W'] each, then the image itself. `kinds` and `colours` as in `draw_segments`; what is of no
    known kind is drawn as a mask."""
    plain = draw_segments(image, np.zeros((0, image.height, image.width), bool), [])
    if regions is None:
        return [plain]
    kinds = kinds or ["mask"] * len(regions)
    colours = number_colours(range(len(regions)))[0] if colours is None else colours
    if region_images is None:
        return [draw_segments(image, regions, labels, colours=colours, kinds=kinds)]
    shown = zip(region_images, regions, labels, colours, kinds, strict=True)
    return [
        *(draw_segments(i, r[None], [name], colours=[c], kinds=[k]) for i, r, name, c, k in shown),
        plain,
    ]


def side_by_side(pictures: list[Image.Image], titles: list[Text]) -> Image.Image:
    """The pictures in a row on white, scaled to the height of the tallest, a title above every one.

    Raises:
        ValueError: there is no picture, or not one title per picture ("" leaves it out).
    """
    if not pictures or len(pictures) != len(titles):
        raise ValueError(
            f"{len(pictures)} pictures, {len(titles)} titles: give one title per picture"
        )
    legends = [picture.info.get("legend", 0) for picture in pictures]
    heights = [picture.height - below for picture, below in zip(pictures, legends, strict=True)]
    titled = []
    for picture, title, height in zip(pictures, titles, heights, strict=True):
        scale = max(heights) / height
        size = max(1, round(picture.width * scale)), round(picture.height * scale)
        titled.append(_add_text(viewed(picture).resize(size, Image.Resampling.LANCZOS), title))
    below = [round(b * max(heights) / h) for b, h in zip(legends, heights, strict=True)]
    above = max(picture.height - b for picture, b in zip(titled, below, strict=True))
    gap = letter_size(titled[0])
    total_width = sum(picture.width for picture in titled) + gap * (len(titled) + 1)
    row = Image.new("RGB", (total_width, above + max(below) + 2 * gap), WHITE)
    left = gap
    for picture, b in zip(titled, below, strict=True):
        row.paste(picture, (left, gap + above + b - picture.height))
        left += picture.width + gap
    return row
