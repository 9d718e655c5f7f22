"""Words on and around pictures: fonts that have the letters, lines that fit, pieces in colours.

Their size grows with the picture (`letter_size`), so that they are as legible on 4,000 pixels as on
400. Drawn with Pillow alone.
"""

import bisect
import functools
import itertools
import math
import unicodedata
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from xsam.report.colours import BLACK, WHITE, Colour, colour_of, ink

SMALLEST_LETTERS = 11  # pixels

Text = str | list[tuple[str, int | None]]  # or pieces, each with the number of its colour or none


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
        """Where its colour ends, in pixels from the left."""
        return self.end_with(self.text)

    def end_with(self, text: str) -> float:
        """Its right side if it were another text."""
        return self.left + self.font.getlength(text) + 2 * self.pad

    @property
    def pad(self) -> float:
        """Colour on either side of the words."""
        return 0 if self.colour is None else self.font.size / 5


def lay_out(text: Text, size: int, width: float) -> list[list[Run]]:
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


def block_size(lines: list[list[Run]], size: int) -> tuple[int, int]:
    """Width and height of a block of lines, the same height for every text of as many lines."""
    right = max((line[-1].right for line in lines if line), default=0)
    return math.ceil(right), round(1.4 * size) * len(lines)


def write(draw, corner: tuple[int, int], lines: list[list[Run]], size: int, fill: Colour) -> None:
    """Writes a block of lines with its top left corner there, in the colour `fill`; words that have
    a colour stand on it."""
    for number, line in enumerate(lines):
        top = corner[1] + number * round(1.4 * size)
        for run in line:
            left, right, letters = corner[0] + run.left, corner[0] + run.right, fill
            if run.colour is not None:
                box = (left, top + 0.1 * size, right, top + 1.3 * size)
                draw.rounded_rectangle(box, size / 4, colour_of(run.colour))
                letters = ink(colour_of(run.colour))
            place = left + run.pad, top + 1.05 * size
            draw.text(place, run.text, letters, run.font, anchor="ls")


def add_text(picture: Image.Image, title: Text, legend: Text = "") -> Image.Image:
    """The picture with its title in a white strip above it, and a legend in one below."""
    size = letter_size(picture)
    width = max(picture.width, 10 * size)  # room for words beside a thin picture
    blocks = [lay_out(text, size, width - size) if text else [] for text in (title, legend)]
    above, below = (block_size(block, size)[1] + size * bool(block) for block in blocks)
    if width == picture.width and not above and not below:
        return picture
    titled = Image.new("RGB", (width, above + picture.height + below), WHITE)
    titled.paste(picture, (0, above))
    titled.info["legend"] = below  # pixels, which `side_by_side` leaves out where it compares
    draw = ImageDraw.Draw(titled)
    for block, top in zip(blocks, (0, above + picture.height), strict=True):
        write(draw, (size // 2, top + size // 2), block, size, BLACK)
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
