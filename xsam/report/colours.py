"""The colours of segments, and which segment has which."""

from collections.abc import Hashable

import numpy as np

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


def number_colours(*groups: list[Hashable]) -> list[list[int]]:
    """Colours for the segments of pictures that stand side by side, a list for each: those of one
    class, name or other key have one colour in all of them. The first keys have the colours that
    are told apart best."""
    keys = list(dict.fromkeys(key for group in groups for key in group))
    return [[keys.index(key) for key in group] for group in groups]


def colour_of(number: int) -> Colour:
    """The palette's colour of a number, RGB from 0 to 255."""
    return tuple(PALETTE[number % len(PALETTE)].tolist())


def ink(colour: Colour) -> Colour:
    """Black or white, whichever is read more easily on `colour`."""
    return BLACK if np.dot(colour, [0.299, 0.587, 0.114]) > 120 else WHITE
