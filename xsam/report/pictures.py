"""Pictures of what the model sees and learns: labelled segments over an image, and loss curves.

The last box of the pipeline: scripts hand over an image with the predicted or the true masks, or
the numbers of a training log, and save the picture that comes back. Drawn with Pillow alone, so
that a picture costs no plotting library.

Legend: N segments, H W height and width of the image, P points of a curve.
"""

import math

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont
from scipy import ndimage

SMALLEST_SIDE = 480  # an image whose longest side is below this is enlarged to fit its labels


TINT = 0.5


TITLE_FONT_SIZE = 16


GAP = 12  # pixels of white around titles and between pictures


WHITE, BLACK, GREY, GRID = (255, 255, 255), (20, 20, 20), (110, 110, 110), (228, 228, 228)


# Dark enough to be read on white, which the palette of the segments is not.
CURVE_COLOURS = [f"hsl({hue}, 70%, 42%)" for hue in (208, 18, 130, 348, 270, 48, 315, 180)]


# Up to this many points a curve is drawn as it is; above, pale under its running mean.
MOST_RAW_POINTS = 50


def _distinct_colours(count: int) -> np.ndarray:
    """[count, 3] colours, each the farthest in OKLab (Ottosson, 2020) from all before it."""
    levels = np.linspace(0, 255, 9)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    colours = colours[np.ptp(colours, axis=1) > 120]  # a grey tint is hard to see on a photograph
    linear = (colours / 255) ** 2.2
    cones = linear @ np.array(
        [[0.4122, 0.2119, 0.0883], [0.5363, 0.6807, 0.2817], [0.0514, 0.1074, 0.6300]]
    )
    oklab = np.cbrt(cones) @ np.array(
        [[0.2105, 1.9780, 0.0259], [0.7936, -2.4286, 0.7828], [-0.0041, 0.4506, -0.8087]]
    )
    chosen = [int(np.argmax(colours @ [1, -1, -1]))]  # the reddest first
    distance = np.full(len(colours), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.linalg.norm(oklab - oklab[chosen[-1]], axis=1))
        chosen.append(int(np.argmax(distance)))
    return colours[chosen].round().astype(np.uint8)


PALETTE = _distinct_colours(64)  # more segments than this begin again


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Breaks `text` at spaces to fit `width` pixels; a longer word keeps a line to itself."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
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
    """The picture with its title, wrapped to its width, in a white strip above it."""
    if not title:
        return picture
    font = ImageFont.load_default(TITLE_FONT_SIZE)
    title = _wrap(title, font, picture.width - GAP)
    strip = _text_size(title, font)[1] + GAP
    titled = Image.new("RGB", (picture.width, picture.height + strip), WHITE)
    titled.paste(picture, (0, strip))
    _draw_text(ImageDraw.Draw(titled), (GAP // 2, GAP // 2), title, font, BLACK)
    return titled


def _ink(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is read more easily on `colour`."""
    return BLACK if np.dot(colour, [0.299, 0.587, 0.114]) > 120 else WHITE


def _draw_labels(
    picture: Image.Image,
    texts: list[str],
    centres: list[tuple[int, int]],
    colours: list[tuple[int, int, int]],
) -> None:
    """Draws each text in a box as near to its centre (x, y) as can be, inside the picture and off
    the boxes drawn before; over them only where nothing is free."""
    width, height = picture.size
    font = ImageFont.load_default(max(13, max(width, height) // 42))
    draw = ImageDraw.Draw(picture)
    placed = []
    for text, centre, colour in zip(texts, centres, colours, strict=True):
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
    image: Image.Image,
    masks: np.ndarray,
    labels: list[str],
    scores: list[float] | None = None,
    title: str = "",
) -> Image.Image:
    """The image with each segment tinted, outlined and labelled ("star 0.93"), below its title.

    Segment n has colour n of `PALETTE`, so the same order of segments gives the same colours. Where
    segments overlap the smaller one is on top, and the outlines of both are seen. An empty mask
    leaves no trace. A small image is enlarged by a whole factor.

    Args:
        image: [H, W] picture of any mode, drawn as RGB.
        masks: [N, H, W] booleans, N = 0 allowed; they may overlap.
        labels: N names, wrapped if long.
        scores: N numbers written behind the names.
        title: a line or more above the picture, wrapped to its width.

    Raises:
        ValueError: the masks are not boolean or not of the image's size, or the counts differ.
    """
    if masks.ndim != 3 or masks.dtype != bool:
        raise ValueError(
            f"masks are {masks.dtype} of shape {list(masks.shape)}: give NumPy booleans [N, H, W], "
            "for instance logits > 0"
        )
    N, H, W = masks.shape
    if image.size != (W, H):
        raise ValueError(
            f"masks are {W} wide and {H} high, the image {image.width} wide and {image.height} "
            "high: resize the masks to the image first"
        )
    if len(labels) != N or (scores is not None and len(scores) != N):
        raise ValueError(
            f"{N} masks, {len(labels)} labels and "
            f"{'no' if scores is None else len(scores)} scores: give one of each per segment"
        )
    factor = math.ceil(SMALLEST_SIDE / max(W, H)) if max(W, H) < SMALLEST_SIDE else 1
    size = (W * factor, H * factor)
    picture = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    outline_width = max(2, max(size) // 320)
    areas = masks.sum(axis=(1, 2))
    largest_first = [n for n in np.argsort(-areas, kind="stable") if areas[n] > 0]
    owner = np.full((H, W), -1)  # the topmost segment of each pixel
    for n in largest_first:
        owner[masks[n]] = n
    owner = owner.repeat(factor, axis=0).repeat(factor, axis=1)
    flat = Image.fromarray(PALETTE[owner % len(PALETTE)])
    picture.paste(Image.blend(picture, flat, TINT), mask=Image.fromarray(owner >= 0))

    pixels = np.array(picture)
    texts, centres, colours = [], [], []
    for n in largest_first:
        rows, columns = ndimage.find_objects(masks[n].astype(np.uint8))[0]
        mask = masks[n, rows, columns].repeat(factor, axis=0).repeat(factor, axis=1)
        # Distance to the nearest pixel outside; the picture's border counts as outside.
        depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
        left, top = columns.start * factor, rows.start * factor
        window = pixels[top : top + mask.shape[0], left : left + mask.shape[1]]
        colour = tuple(PALETTE[n % len(PALETTE)].tolist())
        # A rim in black or white as well: the segment may have the colour of its outline.
        window[mask & (depth <= outline_width + 1)] = colour
        window[mask & (depth <= 1)] = _ink(colour)
        parts, _ = ndimage.label(mask)
        largest_part = np.bincount(parts[mask]).argmax()
        y, x = np.unravel_index(np.argmax(depth * (parts == largest_part)), depth.shape)
        centres.append((left + int(x), top + int(y)))
        texts.append(labels[n] if scores is None else f"{labels[n]} {scores[n]:.2f}")
        colours.append(colour)

    picture = Image.fromarray(pixels)
    # The smallest first, they have the least room.
    _draw_labels(picture, texts[::-1], centres[::-1], colours[::-1])
    return _add_title(picture, title)


def draw_prompts(
    image: Image.Image,
    regions: np.ndarray | list[np.ndarray] | None,
    region_images: list[Image.Image] | None,
    labels: list[str],
) -> list[Image.Image]:
    """The image with its visual prompts bool [G, H, W], if any; or the images that show them, bool
    [H', W'] each, then the image itself."""
    nothing = np.zeros((0, image.height, image.width), bool)
    if region_images is None:
        is_alone = regions is None
        return [draw_segments(image, nothing if is_alone else regions, [] if is_alone else labels)]
    pictures = []
    for number, reference_image in enumerate(region_images):
        masks = np.zeros((number + 1, reference_image.height, reference_image.width), bool)
        masks[number] = regions[number]  # in the colour of its number
        pictures.append(draw_segments(reference_image, masks, labels[: number + 1]))
    return [*pictures, draw_segments(image, nothing, [])]


def side_by_side(pictures: list[Image.Image], titles: list[str]) -> Image.Image:
    """The pictures in a row on white, scaled to the height of the tallest, a title above each.

    Raises:
        ValueError: there is no picture, or not one title per picture ("" leaves it out).
    """
    if not pictures or len(pictures) != len(titles):
        raise ValueError(f"{len(pictures)} pictures, {len(titles)} titles: give one title for each")
    height = max(picture.height for picture in pictures)
    titled = []
    for picture, title in zip(pictures, titles, strict=True):
        width = max(1, round(picture.width * height / picture.height))
        picture = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        titled.append(_add_title(picture, title))
    tallest = max(picture.height for picture in titled)
    total_width = sum(picture.width for picture in titled) + GAP * (len(titled) + 1)
    row = Image.new("RGB", (total_width, tallest + 2 * GAP), WHITE)
    left = GAP
    for picture in titled:
        row.paste(picture, (left, GAP + tallest - picture.height))
        left += picture.width + GAP
    return row


def stack(pictures: list[Image.Image]) -> Image.Image:
    """The pictures below one another on white, at the left, each in its own size.

    Raises:
        ValueError: there is no picture.
    """
    if not pictures:
        raise ValueError("no pictures to stack: give at least one")
    width = max(picture.width for picture in pictures)
    height = sum(picture.height for picture in pictures) + GAP * (len(pictures) - 1)
    column = Image.new("RGB", (width, height), WHITE)
    top = 0
    for picture in pictures:
        column.paste(picture, (0, top))
        top += picture.height + GAP
    return column


def _round_ticks(low: float, high: float, most: int) -> np.ndarray:
    """At most `most` + 1 multiples of 1, 2 or 5 times a power of ten in low..high."""
    smallest_step = (high - low) / most
    power = 10.0 ** math.floor(math.log10(smallest_step))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= smallest_step * (1 - 1e-9))
    return np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step


def _log_ticks(low: float, high: float) -> np.ndarray:
    """Round numbers in 10**low..10**high: powers of ten over a wide range, more in a narrow one."""
    if high - low < 1:
        return _round_ticks(10**low, 10**high, 6)
    exponents = np.arange(math.floor(low), math.ceil(high) + 1, math.ceil((high - low) / 8))
    multiples = [1, 2, 5] if high - low < 3 else [1]
    ticks = np.outer(10.0**exponents, multiples).ravel()
    return ticks[(np.log10(ticks) >= low) & (np.log10(ticks) <= high)]


def _limits(values: np.ndarray, margin: float) -> tuple[float, float]:
    """Where an axis begins and ends: the range of the values, never empty, and a margin."""
    if len(values) == 0:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    # A range below what floats can tell apart counts as a constant.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = 0.1 * abs(high) or 1.0
        return low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


def _draw_legend(draw, names, colours, font, area: tuple[int, int, int]) -> int:
    """Draws the names in rows from the top of `area` (left, top, right); returns where they end."""
    left, top, right = area
    line_height = sum(font.getmetrics())
    x = left
    for name, colour in zip(names, colours, strict=True):
        entry_width = 46 + _text_size(name, font)[0]
        if x > left and x + entry_width > right:
            x, top = left, top + line_height
        middle = top + line_height // 2
        draw.line((x, middle, x + 36, middle), fill=colour, width=6)
        draw.text((x + 46, top), name, font=font, fill=BLACK)
        x += entry_width + 3 * GAP
    return top + line_height


def draw_curves(
    series: dict[str, tuple[list[float], list[float]]],
    title: str,
    size: tuple[int, int] = (900, 480),
    log_scale: bool = False,
) -> Image.Image:
    """A line chart of `series`, name to (steps, values), as a picture of `size` (width, height).

    A long series is drawn pale under its running mean over a twentieth of its points (of the
    logarithms with `log_scale`). What has no place on the axes is left out: NaN, infinity and, with
    `log_scale`, zero and below.

    Raises:
        ValueError: a series has not as many steps as values.
    """
    curves = {}
    for name, (steps, values) in series.items():
        if len(steps) != len(values):
            raise ValueError(f"series {name!r} has {len(steps)} steps and {len(values)} values")
        points = np.array([steps, values], dtype=float)  # [2, P]
        is_drawn = np.isfinite(points).all(axis=0) & ((points[1] > 0) | (not log_scale))
        curves[name] = points[:, is_drawn]
    to_axis = np.log10 if log_scale else np.asarray
    everything = np.concatenate([np.zeros((2, 0)), *curves.values()], axis=1)
    x_low, x_high = _limits(everything[0], 0.0)
    y_low, y_high = _limits(to_axis(everything[1]), 0.05)
    x_ticks = _round_ticks(x_low, x_high, 8)
    y_ticks = _log_ticks(y_low, y_high) if log_scale else _round_ticks(y_low, y_high, 7)

    # Drawn at twice the size and halved at the end: Pillow's lines are not smooth by themselves.
    width, height = 2 * size[0], 2 * size[1]
    canvas = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(canvas)
    font, title_font = (ImageFont.load_default(2 * points) for points in (13, TITLE_FONT_SIZE))
    line_height = sum(font.getmetrics())
    y_names = [f"{tick:.10g}" for tick in y_ticks]
    left = 4 * GAP + max((_text_size(name, font)[0] for name in y_names), default=0)
    right, bottom = width - 4 * GAP, height - 3 * GAP - 2 * line_height

    title = _wrap(title, title_font, right - left)
    _draw_text(draw, (left, GAP), title, title_font, BLACK)
    colours = [CURVE_COLOURS[n % len(CURVE_COLOURS)] for n in range(len(curves))]
    top = 2 * GAP + _text_size(title, title_font)[1]
    names = [name if points.size else f"{name} (no values)" for name, points in curves.items()]
    top = GAP + _draw_legend(draw, names, colours, font, (left, top, right))

    def to_x(steps: np.ndarray) -> np.ndarray:
        return left + (steps - x_low) / (x_high - x_low) * (right - left)

    def to_y(values: np.ndarray) -> np.ndarray:
        return bottom - (to_axis(values) - y_low) / (y_high - y_low) * (bottom - top)

    for x, tick in zip(to_x(x_ticks), x_ticks, strict=True):
        draw.line((x, top, x, bottom), fill=GRID, width=2)
        draw.text((x, bottom + GAP), f"{tick:.10g}", font=font, fill=GREY, anchor="ma")
    for y, name in zip(to_y(y_ticks), y_names, strict=True):
        draw.line((left, y, right, y), fill=GRID, width=2)
        draw.text((left - GAP, y), name, font=font, fill=GREY, anchor="rm")
    draw.line((left, top, left, bottom, right, bottom), fill=GREY, width=2)
    draw.text(((left + right) / 2, height - GAP), "step", font=font, fill=GREY, anchor="md")

    lines = []
    for points, colour in zip(curves.values(), colours, strict=True):
        x, y = to_x(points[0]), to_y(points[1])
        P = len(x)
        if P > MOST_RAW_POINTS:
            pale = tuple(round(0.3 * channel + 0.7 * 255) for channel in ImageColor.getrgb(colour))
            draw.line(np.stack([x, y], axis=1).ravel().tolist(), fill=pale, width=2)
            y = ndimage.uniform_filter1d(y, max(5, P // 20), mode="reflect")
        else:
            for dot in np.stack([x - 5, y - 5, x + 5, y + 5], axis=1).tolist():
                draw.ellipse(dot, fill=colour)
        lines.append(np.stack([x, y], axis=1).ravel().tolist())
    for line, colour in zip(lines, colours, strict=True):  # above every pale one
        draw.line(line, fill=colour, width=4, joint="curve")
    return canvas.reduce(2)
