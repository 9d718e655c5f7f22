"""Pictures of what the model sees and predicts: labelled segments over an image.

The last box of the pipeline: scripts hand over an image with the predicted or the true masks and
save the picture that comes back. Drawn with Pillow alone, words by `letters.py`; the curves of a
run are in `curves.py`.

Legend: N segments, H W height and width of the image.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from xsam.images import Picture, viewed
from xsam.report.colours import GREY, WHITE, Colour, colour_of, ink, number_colours
from xsam.report.letters import Text, add_text, block_size, lay_out, letter_size, write

ENLARGED_SIDE = 640  # a smaller image is enlarged to about this, so that labels find room

OUTLINE_SIDE = 1024  # outlines of a larger image are found on about as many pixels

MOST_LEGEND = 40  # names below a picture

LABEL_REACH = 40  # how far a label may be from its segment, in quarters of a letter

TAKEN = 1e6  # the cost of covering another label

# ---- segments ------------------------------------------------------------------------------------

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the picture


class Shape(NamedTuple):
    """A segment on the picture. `depth` float32 [bottom - top, right - left] is the distance to its
    outline in pixels of the picture, negative outside."""

    box: Box
    depth: np.ndarray
    deepest: tuple[int, int]  # x and y of the place farthest from its outline
    reach: float  # how far that is


def _measure(mask: np.ndarray, scale: int, margin: float) -> Shape:
    """The shape of a mask [H, W], not empty, on a picture `scale` times as large, with `margin`
    pixels around it. Its outline is smooth however few or many pixels the mask has."""
    H, W = mask.shape
    step = max(1, round(max(H, W) / OUTLINE_SIDE))  # every how many pixels are looked at
    if step > 1:
        mask = np.logical_or.reduceat(mask, np.arange(0, H, step), axis=0)
        mask = np.logical_or.reduceat(mask, np.arange(0, W, step), axis=1)
    cell = scale * step  # pixels of the picture
    around = math.ceil(margin / cell) + 2
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = max(0, rows[0] - around), max(0, columns[0] - around)
    mask = mask[top : rows[-1] + 1 + around, left : columns[-1] + 1 + around]
    edge = mask & ~ndimage.binary_erosion(mask, border_value=1)  # the picture's border is no edge
    distance = ndimage.distance_transform_edt(~edge) if edge.any() else np.full(mask.shape, 1e4)
    depth = np.where(mask, distance + 0.5, 0.5 - distance)
    # Without the steps of pixels; what is one or two of them thin is not smoothed away.
    smooth = ndimage.gaussian_filter(depth, 1 if scale == 1 else 1.5)
    is_thin = mask & ~ndimage.binary_opening(mask, np.ones((3, 3)))
    smooth = np.maximum(smooth, np.where(is_thin, 0.25, -np.inf))
    height, width = mask.shape
    spans = (top, height, math.ceil(H / step)), (left, width, math.ceil(W / step))
    border = (np.minimum(np.arange(n) + i + 1, end - i - np.arange(n)) for i, n, end in spans)
    inside = np.minimum(np.minimum.outer(*border), depth)
    y, x = np.unravel_index(inside.argmax(), inside.shape)
    deepest = int((left + x + 0.5) * cell), int((top + y + 0.5) * cell)
    depth = Image.fromarray((smooth * cell).astype(np.float32))
    depth = np.asarray(depth.resize((width * cell, height * cell), Image.Resampling.BILINEAR))
    box = left * cell, top * cell, (left + width) * cell, (top + height) * cell
    return Shape(box, depth, deepest, float(inside[y, x] * cell))


def _paint(picture: Image.Image, shape: Shape, colour: Colour, depths: list, shares: list) -> None:
    """Mixes a colour into the picture by the share, 0 to 1, that goes with the depth of a pixel,
    linearly between `depths`."""
    alpha = np.interp(shape.depth, depths, [255 * share for share in shares])
    picture.paste(colour, shape.box, Image.fromarray(alpha.astype(np.uint8)))


def _outline(picture: Image.Image, shape: Shape, colour: Colour, line: float) -> None:
    """A line inside the shape's edge, and a thin one outside, black or white, that sets it off from
    any ground."""
    rim = max(1.0, line / 2)
    _paint(picture, shape, ink(colour), [-rim - 0.5, 0.5 - rim, 0, 1], [0, 0.8, 0.8, 0])
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
    _paint(picture, shape, ink(colour), [-0.5, 0.5], [0, 1])
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


def _place_labels(
    picture: Image.Image, shapes: dict[int, Shape], texts: list[str], colours: list[int]
) -> tuple[dict[int, tuple[list, Box]], dict[tuple[str, int], int]]:
    """The lines of each label and the box that they are written in, and the numbers of those that
    are told in the legend, by text and colour. See `_draw_labels`."""
    size = letter_size(picture)
    cell, stride = max(1, size // 4), max(1, size // 8)
    weight = np.zeros((picture.height // cell, picture.width // cell))
    blocks, boxes, numbers = {}, {}, {}
    for n, shape in shapes.items():
        lines = lay_out(texts[n], size, 0.5 * picture.width)
        width, height = block_size(lines, size)
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
            lines = lay_out(str(number), size, picture.width)
            box_size = block_size(lines, size)[0] + size // 2, round(1.4 * size)
            box = _take_place(weight, cell, shape.deepest, box_size)
        if box is not None:
            boxes[n] = lines, box
    return boxes, numbers


def _draw_labels(
    picture: Image.Image, shapes: dict[int, Shape], texts: list[str], colours: list[int]
) -> list[tuple[str, int | None]]:
    """Writes every label on its segment where that has room, else beside it with a line to it; no
    label covers another. What finds no room near it has a number in its place, if there is room for
    that, and its name in the legend, which is returned; so have all that would lie beside theirs
    where the labels would fill much of the picture."""
    size, draw = letter_size(picture), ImageDraw.Draw(picture)
    boxes, numbers = _place_labels(picture, shapes, texts, colours)
    for n, (_, box) in boxes.items():
        x, y = shapes[n].deepest
        end = np.clip(x, box[0], box[2]), np.clip(y, box[1], box[3])
        if math.dist((x, y), end) > size / 3:
            colour, line = colour_of(colours[n]), max(1, size // 8)
            draw.line((x, y, *end), ink(colour), 2 * line + 1)
            draw.line((x, y, *end), colour, line)
            _draw_dot(picture, (x, y), 2 * line, colour)
    for n, (lines, box) in boxes.items():
        colour = colour_of(colours[n])
        draw.rounded_rectangle(box, size / 4, colour, ink(colour))
        write(draw, (box[0] + size // 4, box[1]), lines, size, ink(colour))
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
    if masks.ndim != 3 or masks.dtype != bool:
        raise ValueError(
            f"masks are {masks.dtype} of shape {list(masks.shape)}: give NumPy booleans [N, H, W], "
            "for instance logits > 0"
        )
    N, H, W = masks.shape
    given = {"labels": labels, "scores": scores, "colours": colours, "kinds": kinds}
    for name, values in given.items():
        if values is not None and len(values) != N:
            raise ValueError(f"{N} masks, {len(values)} {name}: give one of each per segment")
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
    return add_text(picture, title, legend)


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
    colours = colours or list(range(len(regions)))
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
    height = max(p.height - below for p, below in zip(pictures, legends, strict=True))
    titled = []  # pairs of a picture and the height of its legend
    for picture, title, below in zip(pictures, titles, legends, strict=True):
        scale = height / (picture.height - below)
        size = max(1, round(picture.width * scale)), round(picture.height * scale)
        picture = viewed(picture).resize(size, Image.Resampling.LANCZOS)
        titled.append((add_text(picture, title), size[1] - height))
    above, below = max(p.height - b for p, b in titled), max(b for _, b in titled)
    gap = letter_size(titled[0][0])
    total_width = sum(picture.width for picture, _ in titled) + gap * (len(titled) + 1)
    row = Image.new("RGB", (total_width, above + below + 2 * gap), WHITE)
    left = gap
    for picture, b in titled:
        row.paste(picture, (left, gap + above + b - picture.height))
        left += picture.width + gap
    return row
