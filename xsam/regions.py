"""Visual prompts as people give them: points, boxes, scribbles, lassos and masks.

In front of `inference.py`: whatever marks a region becomes a mask bool [H, W], drawn as those that
the model was trained with (paper appendix A): a point and a scribble are grown by a disc, a box is
filled. Coordinates are pixels of the image as viewers show it, x to the right and y down, the
corner of the first pixel at (0, 0). Legend: H W image size.
"""

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
from PIL import Image, ImageDraw

from xsam.datasets.formats import dilate
from xsam.datasets.sources import PROMPT_RADII
from xsam.images import Picture, Shape, foreground

KINDS = {"point": 1, "box": 2, "scribble": 2, "lasso": 3}  # and the fewest points that draw each

TRAINED_SIDE = 640  # pixels of COCO's longer side, which the discs' radii are meant for

Mark = tuple[str, list[tuple[float, float]]]  # a kind and its points (x, y)

# What `predict` takes for a region: (x, y), (x0, y0, x1, y1), [(x, y), ...], a Mark or a mask.
Region = Sequence | Picture


def read_region(region: Region, where: str = "region") -> Mark | np.ndarray:
    """A region as a Mark that `draw_region` can draw, or as a mask bool [H, W].

    Two numbers are a point, four a box's opposite corners, pairs of numbers a scribble; ("lasso",
    pairs) and the like name their kind. All else is a mask: a picture or array (`foreground`).
    Raises ValueError at anything else.
    """
    if not isinstance(region, (tuple, list)):
        return foreground(region, where)
    kind, values = None, list(region)
    if values and isinstance(values[0], str):
        kind, values = values[0], list(values[1]) if len(values) == 2 else []
        if kind not in KINDS:
            raise ValueError(f"{where}: is a {kind!r}; known are {', '.join(KINDS)}")
    if values and all(isinstance(value, Real) for value in values):
        pairs = list(zip(values[::2], values[1::2], strict=len(values) % 2 == 0))
        if len(values) not in (2, 4):
            raise ValueError(f"{where}: has {len(values)} numbers; a point has 2, a box 4")
        kind = kind or ("point" if len(pairs) == 1 else "box")
    else:
        pairs, kind = values, kind or "scribble"
    for pair in pairs:
        is_pair = isinstance(pair, (tuple, list, np.ndarray)) and len(pair) == 2
        if not is_pair or not all(isinstance(x, Real) and math.isfinite(x) for x in pair):
            raise ValueError(f"{where}: {pair!r} is no point; give x and y")
    exact = kind in ("point", "box")
    if len(pairs) < KINDS[kind] or (exact and len(pairs) > KINDS[kind]):
        needed = KINDS[kind] if exact else f"at least {KINDS[kind]}"
        raise ValueError(f"{where}: a {kind} has {needed} points, not {len(pairs)}")
    return kind, [(float(x), float(y)) for x, y in pairs]


def draw_region(mark: Mark, size: Shape, where: str = "region") -> np.ndarray:
    """The mask bool [H, W] of a mark. Raises ValueError where none of it lies in the picture, or a
    point does not."""
    kind, points = mark
    height, width = size
    xs, ys = zip(*points, strict=True)
    is_outside = max(xs) < 0 or min(xs) > width or max(ys) < 0 or min(ys) > height
    canvas = Image.new("1", (width, height))
    draw = ImageDraw.Draw(canvas)
    if kind == "box":
        # Pixels whose middle is inside, but at least one each way.
        (left, right), (top, bottom) = (_span(sorted(values)) for values in (xs, ys))
        draw.rectangle((left, top, right, bottom), fill=1)
    else:
        limits = np.array([width, height])
        pixels = np.floor(np.clip(points, -limits, 2 * limits)).astype(int)  # [P, 2]
        if kind == "lasso":
            draw.polygon(pixels.ravel().tolist(), fill=1, outline=1)
        else:
            pixels -= pixels == limits  # the picture's far edge belongs to its last pixel
            draw_path = draw.line if len(pixels) > 1 else draw.point
            draw_path(pixels.ravel().tolist(), fill=1)
    mask = np.array(canvas)  # bool [H, W]
    if is_outside or not mask.any():
        shown = ", ".join(f"({x:g}, {y:g})" for x, y in points[:3])
        raise ValueError(f"{where}: the {kind} at {shown} is outside the {width}x{height} picture")
    radius = PROMPT_RADII.get(kind, 0) * max(1.0, max(size) / TRAINED_SIDE)
    return dilate(mask, round(radius))


def _span(values: list[float]) -> tuple[int, int]:
    """The first and last pixel between two coordinates."""
    first, last = math.ceil(values[0] - 0.5), math.ceil(values[1] - 0.5) - 1
    return (first, last) if last >= first else (math.floor(values[0]),) * 2
