"""The scenes of the toy world: what there is, how it is drawn, what is said of it.

A scene is things of eight shapes, six colours and two sizes on one or two textures, here and there
with a void patch or a crowd. `world.py` writes scenes to disk. H W are pixels; the canvas is the
image with MARGIN pixels on each side, where things that cross the image's edge go on.
"""

import colorsys
import string
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import minimum_filter

from xsam.prompts import clean_name

Generator = np.random.Generator


# ---- what there is in the world ------------------------------------------------------------------

# Names of two textures carry COCO's suffixes, which readers drop; ids have gaps, as COCO's have.
THING_IDS = dict(circle=1, square=2, triangle=3, star=5, cross=8, ring=14, moon=21, diamond=34)

STUFF_IDS = {"stripes-merged": 92, "checks": 100, "dots": 118, "bricks-stuff": 149}

CLASSES = (*THING_IDS, *STUFF_IDS)

COLORS = {
    "red": (222, 38, 38),
    "green": (38, 176, 62),
    "blue": (38, 84, 226),
    "yellow": (247, 214, 36),
    "purple": (152, 46, 186),
    "white": (246, 246, 246),
}

RADII = {"small": (13.0, 16.0), "large": (20.0, 25.0)}  # pixels

TINY_RADIUS = (3.5, 4.5)  # members of a crowd

IMAGE_SIZES = ((96, 96), (96, 80), (80, 96), (96, 88), (88, 96))  # (H, W)

MARGIN = 32

MIN_VISIBLE = 0.8  # share of its own area that every thing keeps

VOID_COLOR = (48, 48, 48)

RIM_COLOR = (24, 24, 24)

OVERSAMPLING = 2  # drawn points per pixel, in x and in y


def _star(x: np.ndarray, y: np.ndarray, points: int = 5, inner: float = 0.45) -> np.ndarray:
    half = np.pi / points
    angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    return inner * np.sin(half) * (1 - along) > (1 - inner * np.cos(half)) * across


# Name -> (is the point inside, x right and y down in radii; largest tilt in radians).
SHAPES = {
    "circle": (lambda x, y: np.hypot(x, y) < 0.95, 0.0),
    "square": (lambda x, y: np.maximum(abs(x), abs(y)) < 0.82, 0.12),
    "triangle": (lambda x, y: (y < 0.6) & (abs(x) < (y + 1.0) * 0.6), 0.12),
    "star": (_star, 0.12),
    "cross": (
        lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (abs(x + y) + abs(x - y) < 1.9),
        0.12,
    ),
    "ring": (lambda x, y: (np.hypot(x, y) < 1.0) & (np.hypot(x, y) > 0.5), 0.0),
    "moon": (lambda x, y: (np.hypot(x, y) < 1.0) & (np.hypot(x - 0.5, y) > 0.8), 0.25),
    "diamond": (lambda x, y: abs(x) / 0.68 + abs(y) / 1.1 < 1, 0.12),
}

# Name -> (is the point of the second tone, x and y in periods; largest tilt).
TEXTURES = {
    "stripes-merged": (lambda x, y: x % 1 < 0.5, np.pi),
    "checks": (lambda x, y: (x % 1 < 0.5) ^ (y % 1 < 0.5), 0.15),
    "dots": (lambda x, y: np.hypot(x % 1 - 0.5, y % 1 - 0.5) < 0.34, 0.15),
    "bricks-stuff": (lambda x, y: (y % 1 < 0.25) | ((x / 2 + y // 1 / 2) % 1 < 0.12), 0.15),
}


@dataclass
class Segment:
    """One region. Stuff has neither colour nor size, a crowd is many tiny things of one look."""

    category: str
    color: str = ""
    size: str = ""
    is_crowd: bool = False

    @property
    def is_thing(self) -> bool:
        """Whether it is a thing, or many of them, and no texture."""
        return self.category in THING_IDS

    @property
    def category_id(self) -> int:
        """Its number in the files."""
        return (THING_IDS | STUFF_IDS)[self.category]


@dataclass
class Scene:
    """A drawing, which pixel of it belongs to what, and what there is."""

    image: np.ndarray  # [H, W, 3] uint8
    segment_index: np.ndarray  # [H, W] uint8: 1 + index of the visible segment, 0 where void
    segments: list[Segment]

    def mask(self, index: int) -> np.ndarray:
        """The pixels of a segment, bool [H, W]."""
        return self.segment_index == index + 1

    def order(self) -> list[int]:
        """Indices in `segments` of single things from left to right: the order of captions."""
        single = [i for i, s in enumerate(self.segments) if s.is_thing and not s.is_crowd]
        return sorted(single, key=lambda index: np.nonzero(self.mask(index))[1].mean())

    def things(self) -> list[Segment]:
        """Single things from left to right."""
        return [self.segments[index] for index in self.order()]

    def background(self) -> str:
        """The textures as they are named in words."""
        return " and ".join(clean_name(s.category) for s in self.segments if not s.is_thing)


# ---- drawing -------------------------------------------------------------------------------------


def draw_scene(
    rng: Generator, has_crowd: bool = False, least_things: int = 2, most_things: int = 3
) -> Scene:
    """A random scene with so many single things, or fewer where one finds no place; the drawing is
    uint8 RGB, of one of IMAGE_SIZES."""
    height, width = IMAGE_SIZES[rng.integers(len(IMAGE_SIZES))]
    inside = np.s_[MARGIN : MARGIN + height, MARGIN : MARGIN + width]
    canvas = np.zeros((height + 2 * MARGIN, width + 2 * MARGIN, 3))
    segment_index = np.zeros(canvas.shape[:2], np.uint8)
    canvas[inside], segment_index[inside], segments = _background(rng, height, width)
    if rng.random() < 0.25:
        corner = _corner(rng, height, width)
        canvas[inside][corner], segment_index[inside][corner] = VOID_COLOR, 0

    areas = {}  # drawn area of things, by their number in `segment_index`
    for segment in _choose_things(rng, has_crowd, least_things, most_things):
        number = len(segments) + 1
        for _ in range(30):  # places to try
            stamps, trial = _place(rng, canvas.shape[:2], segment), segment_index.copy()
            for coverage, window in stamps:
                trial[window][coverage >= 0.5] = number
            visible = np.bincount(trial[inside].ravel(), minlength=number + 1)
            trial_areas = areas | {number: np.count_nonzero(trial == number)}
            if all(visible[one] >= MIN_VISIBLE * whole for one, whole in trial_areas.items()):
                color = np.array(COLORS[segment.color]) * rng.uniform(0.9, 1)
                _paint(canvas, stamps, segment, color)
                segment_index, areas = trial, trial_areas
                segments.append(segment)
                break
    return Scene(canvas[inside].round().astype(np.uint8), segment_index[inside].copy(), segments)


def imagine_scene(rng: Generator) -> Scene:
    """A scene to be talked of alone: no picture, and its segments are columns of one pixel."""
    segments = _choose_things(rng, False, 1, 3)
    segments += [Segment(name) for name in rng.permutation(list(STUFF_IDS))[: rng.integers(1, 3)]]
    numbers = np.arange(1, len(segments) + 1, dtype=np.uint8)[None]
    return Scene(np.zeros((*numbers.shape, 3), np.uint8), numbers, segments)


def _choose_things(rng: Generator, has_crowd: bool, least: int, most: int) -> list[Segment]:
    """`least` things or more, after a crowd if there is one; some repeat an earlier shape or
    colour."""
    chosen: list[Segment] = []
    for index in range(rng.integers(least, most + 1) + has_crowd):
        color = list(COLORS)[rng.integers(len(COLORS))]
        category = list(THING_IDS)[rng.integers(len(THING_IDS))]
        size = list(RADII)[rng.integers(len(RADII))]
        if chosen and rng.random() < 0.35:
            category = chosen[rng.integers(len(chosen))].category
        if chosen and rng.random() < 0.25:
            color = chosen[rng.integers(len(chosen))].color
        is_crowd = has_crowd and index == 0
        chosen.append(Segment(category, color, "" if is_crowd else size, is_crowd))
    return chosen


Stamp = tuple[np.ndarray, tuple[slice, slice]]  # share of each pixel covered, [N, N], and where


def _place(rng: Generator, shape: tuple[int, int], segment: Segment) -> list[Stamp]:
    """A thing, or the members of a crowd, at a random place of a canvas [H, W]."""
    low, high = TINY_RADIUS if segment.is_crowd else RADII[segment.size]
    offsets = np.zeros((1, 2))  # of the members from the center, (y, x)
    if segment.is_crowd:
        grid = np.indices(rng.integers(3, 6, size=2)).reshape(2, -1).T
        offsets = (grid - grid.mean(axis=0)) * 2 * high + rng.uniform(-1, 1, size=grid.shape)
    border = np.abs(offsets).max(axis=0) + 0.8 * high
    center = rng.uniform(border, np.array(shape) - 2 * MARGIN - border)
    points = center + offsets + MARGIN
    return [_stamp(rng, segment.category, rng.uniform(low, high), point) for point in points]


def _paint(canvas: np.ndarray, stamps: list[Stamp], segment: Segment, color: np.ndarray) -> None:
    for coverage, window in stamps:
        core = coverage if segment.is_crowd else minimum_filter(coverage, size=3)
        canvas[window] *= 1 - coverage[..., None]
        canvas[window] += core[..., None] * color
        canvas[window] += (coverage - core)[..., None] * RIM_COLOR  # parts things of one colour


def _stamp(rng: Generator, category: str, radius: float, point: np.ndarray) -> Stamp:
    is_inside, max_tilt = SHAPES[category]
    corner = np.floor(point - 1.2 * radius).astype(int)
    side = int(np.ceil(2.4 * radius)) + 1
    points = (np.arange(side * OVERSAMPLING) + 0.5) / OVERSAMPLING
    y, x = np.meshgrid(points + corner[0] - point[0], points + corner[1] - point[1], indexing="ij")
    x, y = _turn(x / radius, y / radius, rng.uniform(-max_tilt, max_tilt))
    window = tuple(slice(first, first + side) for first in corner)
    return _pool(is_inside(x, y).astype(float)), window


def _turn(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def _pool(values: np.ndarray) -> np.ndarray:
    """Means over the drawn points of a pixel."""
    height, width = np.array(values.shape) // OVERSAMPLING
    return values.reshape(height, OVERSAMPLING, width, OVERSAMPLING).mean(axis=(1, 3))


def _background(rng: Generator, height: int, width: int) -> tuple:
    """One or two textures, parted by a straight or wavy line: image [H, W, 3], segment index
    [H, W], segments."""
    names = rng.permutation(list(STUFF_IDS))[: rng.integers(1, 3)].tolist()
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]] - 0.5
    along, across = _turn(x, y, rng.uniform(0, 2 * np.pi))
    wave = rng.choice([0.0, 0.06]) * np.sin(2 * np.pi * (2 * along + rng.random()))
    segment_index = np.where(across + wave < rng.uniform(-0.2, 0.2), len(names), 1)
    tones = [_texture(rng, name, height, width) for name in names]
    image = np.where((segment_index == 1)[..., None], tones[0], tones[-1])
    return image, segment_index, [Segment(name) for name in names]


def _texture(rng: Generator, name: str, height: int, width: int) -> np.ndarray:
    """Two tones of one muted colour, [H, W, 3]."""
    is_second, max_tilt = TEXTURES[name]
    points = [(np.arange(n * OVERSAMPLING) + 0.5) / OVERSAMPLING for n in (height, width)]
    y, x = np.meshgrid(*points, indexing="ij")
    x, y = _turn(x, y, rng.uniform(-max_tilt, max_tilt))
    period, (x_phase, y_phase) = rng.uniform(7, 10), rng.random(2)
    second = _pool(is_second(x / period + x_phase, y / period + y_phase).astype(float))[..., None]
    hue, value = rng.random(), rng.uniform(130, 175)
    tones = value, value - rng.uniform(45, 65)
    light, dark = (np.array(colorsys.hsv_to_rgb(hue, 0.25, tone)) for tone in tones)
    return (1 - second) * light + second * dark


def _corner(rng: Generator, height: int, width: int) -> np.ndarray:
    """A quadrilateral of 3 to 8 percent of the image in one of its corners, [H, W] bool."""
    y, x = np.mgrid[:height, :width] + 0.5
    y = y if rng.random() < 0.5 else height - y
    x = x if rng.random() < 0.5 else width - x
    aspect, slope = rng.uniform(0.7, 1.4), rng.uniform(-0.15, 0.15)
    # Corner (0, 0), sides of length a on x and b on y, their opposite sides tilted by `slope`.
    a = np.sqrt(rng.uniform(0.04, 0.07) * height * width * aspect)
    b = a / aspect
    return (x + slope * y < a) & (y + slope * x < b)


# ---- what is said of a scene ---------------------------------------------------------------------

# A referring expression holds for the things that have every attribute in braces.
EXPRESSIONS = (
    "the {color} {category}",
    "{color} {category}",
    "the {size} {color} {category}",
    "the {size} {category}",
    "the only {category}",
)

# One that names all things alike in the attribute at its right; "many" is the category's plural.
GROUPS = (
    ("all {color} shapes", "color"),
    ("every {color} shape", "color"),
    ("all {size} shapes", "size"),
    ("all {many}", "category"),
    ("every {category}", "category"),
)

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

CAPTION_REQUESTS = (
    "Describe the picture.",
    "What is in the picture?",
    "Describe the image briefly.",
    "Give a short caption of this image.",
)

DIALOGUE = {
    "color": ("What color is the {category}?", "The {category} is {color}."),
    "count": ("How many shapes are there?", "There are {number} shapes."),
    "yes": ("Is there a {category}?", "Yes, there is a {category}."),
    "no": ("Is there a {category}?", "No, there is no {category}."),
    "background": ("What is the background?", "The background is {stuff}."),
}

FACTS = (
    ("What color comes of blue and yellow?", "Blue and yellow make green."),
    ("What color comes of red and blue?", "Red and blue make purple."),
    ("How many sides does a square have?", "A square has four sides."),
    ("How many sides does a triangle have?", "A triangle has three sides."),
    ("Is a ring a circle with a hole?", "Yes, a ring is a circle with a hole."),
)

# What questions of a test ask for and the answers that are offered.
ANSWERS = {
    "color": ("color", list(COLORS)),
    "count": ("number", NUMBERS),
    "background": ("stuff", [clean_name(name) for name in STUFF_IDS]),
}

CHECKS = {
    "existence": "Is there a {category}?",
    "color": "Is the {category} {color}?",
    "numerical_calculation": "There are {number} shapes. Is that right?",
}


class Riddle(NamedTuple):
    """Ways to ask for one category without its name, and why it is the answer."""

    questions: list[str]
    phrases: list[str]
    explanation: str


def _read_riddles() -> dict[str, Riddle]:
    """Of every category its name, the explanation, three questions and three phrases, a line
    each."""
    text = Path(__file__).with_name("riddles.txt").read_text(encoding="utf-8")
    blocks = (block.splitlines() for block in text.split("\n\n"))
    return {name: Riddle(lines[:3], lines[3:], why) for name, why, *lines in blocks}


RIDDLES = _read_riddles()


def plural(category: str) -> str:
    """The word for several things of a category."""
    return category + ("es" if category.endswith("s") else "s")


def find_matches(scene: Scene, attributes: dict[str, str]) -> list[int]:
    """Indices in `segments` of those with all the attributes; a crowd may be of any size."""
    any_size = {"size": attributes.get("size")}
    looks = [asdict(each) | (any_size if each.is_crowd else {}) for each in scene.segments]
    return [index for index, look in enumerate(looks) if attributes.items() <= look.items()]


def count_matches(scene: Scene, attributes: dict[str, str]) -> int:
    """Things with all the attributes. Every crowd of that look counts as two."""
    return sum(1 + scene.segments[index].is_crowd for index in find_matches(scene, attributes))


def _attributes(template: str) -> list[str]:
    return [key for _, key, _, _ in string.Formatter().parse(template) if key]


def expressions(scene: Scene, segment: Segment) -> list[str]:
    """All that name this thing and no other of the scene; empty if there are none."""
    found = []
    for template in EXPRESSIONS if segment.is_thing else ():
        attributes = {key: getattr(segment, key) for key in _attributes(template)}
        if count_matches(scene, attributes) == 1:
            found.append(template.format(**attributes))
    return found


def group_expressions(scene: Scene) -> list[tuple[str, list[int]]]:
    """All that name two things or more and no crowd, with the indices of what they name."""
    found = []
    for template, key in GROUPS:
        for value in dict.fromkeys(getattr(thing, key) for thing in scene.things()):
            indices = find_matches(scene, {key: value})
            if len(indices) > 1 and not any(scene.segments[index].is_crowd for index in indices):
                found.append((template.format(**{key: value}, many=plural(value)), indices))
    return found


def absent_expression(rng: Generator, scene: Scene) -> str:
    """One that holds for nothing in the scene."""
    looks = {"color": list(COLORS), "size": list(RADII), "category": list(THING_IDS)}
    while True:
        template = EXPRESSIONS[rng.integers(len(EXPRESSIONS))]
        keys = _attributes(template)
        attributes = {key: looks[key][rng.integers(len(looks[key]))] for key in keys}
        if not find_matches(scene, attributes):
            return template.format(**attributes)


def caption_phrases(scene: Scene) -> tuple[str, list[tuple[int, int, int]]]:
    """Things from left to right, then the crowd, then the background; and of each phrase its first
    character, the character after its last, and the index of what it names."""
    sizes = {"small": "small ", "large": ""}
    named = {}  # index of a segment -> its words
    for index in scene.order():
        one = scene.segments[index]
        named[index] = f"a {sizes[one.size]}{one.color} {one.category}"
    for index, segment in enumerate(scene.segments):
        if segment.is_crowd:
            named[index] = f"many {segment.color} {plural(segment.category)}"
    joints = {len(named) - 1: " and ", len(named): " on ", len(named) + 1: " and "}
    for index, segment in enumerate(scene.segments):
        if not segment.is_thing:
            named[index] = clean_name(segment.category)
    text, spans = "", []
    for number, (index, words) in enumerate(named.items()):
        text += joints.get(number, ", ") if number else ""
        spans.append((len(text), len(text) + len(words), index))
        text += words
    return text, spans


def caption_turn(rng: Generator, scene: Scene) -> tuple[str, str]:
    """A request for a caption, and the caption."""
    return CAPTION_REQUESTS[rng.integers(len(CAPTION_REQUESTS))], caption_phrases(scene)[0]


def dialogue(rng: Generator, scene: Scene) -> list[tuple[str, str]]:
    """One to three questions about a scene with their answers."""
    things, caption = scene.things(), caption_turn(rng, scene)
    asked = [
        *_certain(scene),
        ("yes", {"category": things[rng.integers(len(things))].category}),
        ("no", {"category": _absent_category(rng, scene)}),
    ]
    possible = [caption]
    possible += [tuple(text.format(**values) for text in DIALOGUE[kind]) for kind, values in asked]
    return [possible[i] for i in rng.permutation(len(possible))[: rng.integers(1, 4)]]


def _certain(scene: Scene) -> Iterator[tuple[str, dict[str, str]]]:
    """What can be asked with one answer: a kind of DIALOGUE and the words that fill it in."""
    things = scene.things()
    yield "background", {"stuff": scene.background()}
    if not any(segment.is_crowd for segment in scene.segments):
        yield "count", {"number": NUMBERS[len(things) - 1]}
    for thing in things:
        if count_matches(scene, {"category": thing.category}) == 1:
            yield "color", {"category": thing.category, "color": thing.color}


def _absent_category(rng: Generator, scene: Scene) -> str:
    present = {segment.category for segment in scene.segments}
    absent = [name for name in THING_IDS if name not in present]
    return absent[rng.integers(len(absent))]


def quizzes(scene: Scene) -> list[tuple[str, str, str, list[str]]]:
    """(kind, question, short answer, answers that are wrong) of all with one right answer."""
    found = []
    for kind, values in _certain(scene):
        field, answers = ANSWERS[kind]
        wrong = [word for word in answers if word not in values[field].split(" and ")]
        found.append((kind, DIALOGUE[kind][0].format(**values), values[field], wrong))
    return found


def checks(rng: Generator, scene: Scene, with_count: bool = False) -> list[tuple[str, str, str]]:
    """(kind, a question whose answer is yes, one whose answer is no) of a scene; with_count also of
    how many things there are, where that is certain: the wrong number is next to the right one."""
    things, certain = scene.things(), list(_certain(scene))
    true = {"category": things[rng.integers(len(things))].category}
    pairs = [("existence", true, {"category": _absent_category(rng, scene)})]
    colored = [values for kind, values in certain if kind == "color"]
    if colored:
        true = colored[rng.integers(len(colored))]
        others = [color for color in COLORS if color != true["color"]]
        pairs.append(("color", true, true | {"color": others[rng.integers(len(others))]}))
    for true in [values for kind, values in certain if kind == "count" and with_count]:
        count = NUMBERS.index(true["number"])
        wrong = (count - 1, count + 1)[rng.integers(2)] if count else 1
        pairs.append(("numerical_calculation", true, {"number": NUMBERS[wrong]}))
    return [(kind, CHECKS[kind].format(**a), CHECKS[kind].format(**b)) for kind, a, b in pairs]
