"""Regions as people give them: what is drawn, and what is refused.

pytest tests/test_regions.py
"""

import numpy as np
import pytest
from PIL import Image

from xsam.datasets.sources import PROMPT_RADII
from xsam.regions import KINDS, draw_region, read_region

SIZE = 120, 200  # height and width


def draw(region, size=SIZE) -> np.ndarray:
    return draw_region(read_region(region), size)


@pytest.mark.parametrize(
    ("region", "kind"),
    [
        ((3, 4), "point"),
        ([3.5, 4], "point"),
        ((np.float32(3), 4), "point"),
        ((1, 2, 30, 40), "box"),
        ([(1, 2), (30, 40)], "scribble"),
        ([[1, 2], [30, 40], [5, 6]], "scribble"),
        (("lasso", [(1, 2), (30, 40), (5, 6)]), "lasso"),
        (("box", [(1, 2), (30, 40)]), "box"),
        (("scribble", [*np.eye(2)]), "scribble"),
    ],
)
def test_the_kind_of_a_region_is_seen_from_its_numbers(region, kind):
    found, points = read_region(region)
    assert found == kind and len(points) >= KINDS[kind]
    assert all(type(x) is float for point in points for x in point)


@pytest.mark.parametrize(
    "mask", [np.eye(5, dtype=bool), np.eye(5) * 255, Image.new("L", (5, 5), 1)]
)
def test_what_is_no_list_is_a_mask(mask):
    assert read_region(mask).dtype == bool and read_region(mask).shape == (5, 5)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ([], "a scribble has at least 2 points, not 0"),
        ((1, 2, 3), "has 3 numbers; a point has 2, a box 4"),
        ((1, 2, 3, 4, 5, 6), "has 6 numbers"),
        ([(1, 2)], "a scribble has at least 2 points, not 1"),
        (("lasso", [(1, 2), (3, 4)]), "a lasso has at least 3 points, not 2"),
        (("box", [(1, 2), (3, 4), (5, 6)]), "a box has 2 points, not 3"),
        (("circle", [(1, 2)]), "is a 'circle'; known are point, box"),
        (("point",), "a point has 1 points, not 0"),
        ([(1, 2), (3, float("nan"))], "is no point"),
        ([(1, 2), "34"], "'34' is no point"),
        ([(1, 2), (3, 4, 5)], "is no point"),
        (np.zeros((4, 4), bool), "all black"),
    ],
)
def test_what_is_no_region_is_told(region, message):
    with pytest.raises(ValueError, match=message):
        read_region(region)


@pytest.mark.parametrize(
    "region",
    [(-1, 5), (201, 5), (5, 121), (-9, -9, -1, -1), [(-5, 3), (-2, 90)], (300, 10, 400, 20)],
)
def test_what_lies_outside_is_told(region):
    with pytest.raises(ValueError, match="is outside the 200x120 picture"):
        draw(region)


def test_a_point_and_a_scribble_are_grown_as_in_training():
    radius = PROMPT_RADII["point"]
    y, x = np.mgrid[:120, :200]
    assert (draw((50.7, 60.2)) == (np.hypot(x - 50, y - 60) <= radius)).all()
    assert draw((200, 120))[-1, -1]  # the picture's far corner is its last pixel
    line = draw([(20, 30), (80, 30)])
    rows, columns = np.nonzero(line)
    radius = PROMPT_RADII["scribble"]
    assert (rows.min(), rows.max()) == (30 - radius, 30 + radius)
    assert (columns.min(), columns.max()) == (20 - radius, 80 + radius)


def test_discs_grow_with_a_large_photo():
    small, large = (draw((300, 300), size) for size in ((640, 640), (1280, 2560)))
    assert large.sum() / small.sum() == pytest.approx(16, rel=0.05)


@pytest.mark.parametrize("box", [(10, 20, 40, 50), (40, 50, 10, 20), (40, 20, 10, 50)])
def test_a_box_is_filled_from_corner_to_corner(box):
    mask = draw(box)
    assert mask[20:50, 10:40].all() and mask.sum() == 30 * 30


def test_a_thin_box_and_one_that_reaches_beyond_have_pixels():
    assert draw((7.2, 3, 7.4, 3)).sum() == 1
    assert draw((-50, -50, 500, 500)).all()
    assert (draw((190, 100, 400, 300)) == draw((190, 100, 200, 120))).all()


def test_a_lasso_is_filled():
    mask = draw(("lasso", [(20, 20), (60, 20), (60, 60), (20, 60)]))
    assert mask[20:61, 20:61].all() and mask.sum() == 41 * 41
