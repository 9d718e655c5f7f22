"""Pictures: only the segments' own pixels change, labels stay inside, odd input still draws."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFont

from xsam.report import pictures as draw
from xsam.report.pictures import PALETTE, draw_segments, side_by_side


def photograph(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def rectangle(width: int, height: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def is_colour(picture: Image.Image, colour: np.ndarray | tuple) -> np.ndarray:
    return (np.array(picture) == colour).all(axis=-1)


@pytest.fixture
def no_labels(monkeypatch):
    monkeypatch.setattr(draw, "_draw_labels", lambda *arguments: None)


def test_pixels_change_inside_the_masks_only(no_labels):
    image = photograph(500, 300)
    masks = np.stack([rectangle(500, 300, 20, 30, 200, 200), rectangle(500, 300, 150, 9, 500, 90)])
    picture = draw_segments(image, masks, ["a", "b"])
    changed = (np.array(picture) != np.array(image)).any(axis=-1)
    union = masks.any(axis=0)
    assert not changed[~union].any()
    assert changed[union].mean() > 0.99
    # The middle of a segment is mixed with its colour, its outline is that colour.
    mixed = (np.array(image)[100, 100].astype(float) + PALETTE[0]) / 2
    assert np.abs(np.array(picture)[100, 100] - mixed).max() <= 1
    assert (np.array(picture)[100, 21] == PALETTE[0]).all()


def test_the_smaller_segment_is_on_top_and_keeps_its_colour(no_labels):
    small, large = rectangle(500, 500, 200, 200, 300, 300), rectangle(500, 500, 50, 50, 450, 450)
    image = Image.new("RGB", (500, 500), "white")
    pictures = [
        np.array(draw_segments(image, np.stack([small, large]), ["small", "large"])),
        np.array(draw_segments(image, np.stack([large, small]), ["large", "small"])),
    ]
    for picture, small_index in zip(pictures, [0, 1], strict=True):
        assert np.abs(picture[250, 250] - (255.0 + PALETTE[small_index]) / 2).max() <= 1
        assert np.abs(picture[100, 250] - (255.0 + PALETTE[1 - small_index]) / 2).max() <= 1


def test_small_images_are_enlarged_by_a_whole_factor(no_labels):
    image = Image.new("RGB", (100, 60), "gray")
    mask = rectangle(100, 60, 10, 20, 50, 40)
    picture = draw_segments(image, mask[None], ["a"])
    assert picture.size == (500, 300)
    enlarged = mask.repeat(5, axis=0).repeat(5, axis=1)
    assert (is_colour(picture, (128, 128, 128)) == ~enlarged).all()
    assert draw_segments(photograph(480, 30), np.zeros((0, 30, 480), bool), []).size == (480, 30)


@pytest.mark.parametrize("corner", [(0, 0), (490, 0), (0, 390), (490, 390)])
def test_labels_stay_inside_the_picture(corner):
    left, top = corner
    mask = rectangle(500, 400, left, top, left + 10, top + 10)
    picture = draw_segments(Image.new("RGB", (500, 400)), mask[None], ["a long label"], [0.5])
    # Whole boxes are of one size wherever they are.
    rows, columns = np.nonzero(is_colour(picture, PALETTE[0]))
    middle = draw_segments(
        Image.new("RGB", (500, 400)),
        rectangle(500, 400, 245, 195, 255, 205)[None],
        ["a long label"],
        [0.5],
    )
    middle_rows, middle_columns = np.nonzero(is_colour(middle, PALETTE[0]))
    assert np.ptp(columns) == np.ptp(middle_columns)
    assert np.ptp(rows) == np.ptp(middle_rows)


def test_labels_do_not_cover_each_other():
    image = Image.new("RGB", (600, 500))
    mask = rectangle(600, 500, 295, 245, 305, 255)
    alone = is_colour(draw_segments(image, mask[None], ["person"]), PALETTE[0]).sum()
    crowd = draw_segments(image, np.stack([mask] * 6), ["person"] * 6)
    for n in range(6):
        assert is_colour(crowd, PALETTE[n]).sum() > 0.7 * alone


def test_the_label_sits_in_the_largest_part():
    mask = rectangle(600, 400, 10, 10, 200, 40) | rectangle(600, 400, 300, 200, 590, 390)
    picture = draw_segments(Image.new("RGB", (600, 400)), mask[None], ["cat"])
    rows, columns = np.nonzero(is_colour(picture, PALETTE[0]))
    inside = (rows > 210) & (rows < 380) & (columns > 310) & (columns < 580)  # no outline
    assert inside.sum() > 200
    assert abs(rows[inside].mean() - 295) < 3


def test_no_segments_and_empty_masks_leave_the_picture_alone():
    image = photograph(500, 300)
    for masks, labels in [
        (np.zeros((0, 300, 500), bool), []),
        (np.zeros((1, 300, 500), bool), "a"),
    ]:
        picture = draw_segments(image, masks, list(labels))
        assert (np.array(picture) == np.array(image)).all()


def test_the_title_is_a_strip_that_grows_with_its_lines():
    image, masks = photograph(500, 300), np.zeros((0, 300, 500), bool)
    short = draw_segments(image, masks, [], title="short")
    long = draw_segments(image, masks, [], title="a line that must wrap " * 8)
    assert 300 < short.height < long.height
    assert short.width == long.width == 500
    assert (np.array(long)[-300:] == np.array(image)).all()


WORDS = {
    "Chinese": ("红色", "蓝猫"),
    "Japanese": ("ねこ", "いぬ"),
    "Korean": ("고양이", "강아지"),
    "Thai": ("แมว", "หมา"),
    "Hindi": ("बिल्ली", "कुत्ता"),
    "Russian": ("кот", "пёс"),
    "accents": ("é", "è"),
    "emoji": ("😀", "🦊"),
    "control characters": ("a\x01", "a\x02"),
    "halves of characters": ("\ud83d", "\ude00"),
    "in a longer name": ("a 猫 here", "a 犬 here"),
    "beyond the width": ("猫" * 90 + "犬", "猫" * 91),
}


@pytest.mark.parametrize("has_fonts", [True, False], ids=["the system's fonts", "Pillow's alone"])
@pytest.mark.parametrize("kind", WORDS)
def test_words_of_any_script_can_be_told_apart(monkeypatch, kind, has_fonts):
    if not has_fonts:
        monkeypatch.setattr(draw, "_font_files", lambda: [""])
    masks = rectangle(480, 480, 100, 100, 400, 400)[None]
    titles, labels = [], []
    for word in WORDS[kind]:
        picture = draw_segments(photograph(480, 480), masks[:0], [], title=word)
        titles.append(np.array(picture)[:-480].tobytes())
        labels.append(draw_segments(photograph(480, 480), masks, [word]).tobytes())
    assert titles[0] != titles[1] and labels[0] != labels[1]


def test_no_letter_is_a_box(monkeypatch):
    box = ImageFont.load_default(16).getmask("\U0010ffff")
    texts = [word for words in WORDS.values() for word in words]
    for fonts in (draw._font_files(), [""]):
        monkeypatch.setattr(draw, "_font_files", lambda fonts=fonts: fonts)
        for text in texts:
            written, font = draw._legible(text, 16)
            for letter in set(written) - {" "}:
                assert bytes(font.getmask(letter)) != bytes(box), (text, letter)


def test_a_font_that_has_the_letters_is_taken_and_else_their_numbers_are_written(monkeypatch):
    assert draw._legible("a red cat", 16)[0] == "a red cat"
    assert draw._legible("a red cat", 16)[1].getname()[0] == ImageFont.load_default(16).getname()[0]
    known = {"": "cat ", "first.ttf": "cat 猫", "second.ttf": "cat 猫犬"}
    monkeypatch.setattr(draw, "_font_files", lambda: list(known))
    monkeypatch.setattr(draw, "_has_letter", lambda file, letter: letter in known[file])
    monkeypatch.setattr(draw, "_load_font", lambda file, size: (file, size))
    assert draw._legible("cat", 9) == ("cat", ("", 9))
    assert draw._legible("猫 cat", 9) == ("猫 cat", ("first.ttf", 9))
    assert draw._legible("猫犬", 9) == ("猫犬", ("second.ttf", 9))
    assert draw._legible("猫 猿", 9) == (r"\u732b \u733f", ("", 9))


def test_a_long_word_is_broken_and_a_thin_picture_has_room_for_words():
    image, masks = photograph(500, 300), np.zeros((0, 300, 500), bool)
    assert draw_segments(image, masks, [], title="x" * 300).height > 300 + 4 * 16
    for size in ((2, 3000), (3000, 2), (1, 1)):
        masks = np.ones((1, *size), bool)
        picture = draw_segments(photograph(*size[::-1]), masks, ["a cat"], title="a cat sat here")
        assert picture.height < size[0] + 600


@pytest.mark.parametrize("joint", ["\u200b", "\ufeff", "\u00ad", "\u200d", "\u2060"])
def test_what_joins_letters_is_not_drawn(joint):
    image, masks = photograph(500, 300), np.ones((1, 300, 500), bool)
    plain = draw_segments(image, masks, ["cat dog"], title="cat dog")
    joined = draw_segments(image, masks, [f"cat{joint} dog"], title=f"{joint}cat dog")
    assert joined.tobytes() == plain.tobytes()


def test_a_picture_is_drawn_as_viewers_show_it():
    """Turned as its masks are; a file of any mode, and an array."""
    tag, file = Image.Exif(), io.BytesIO()
    tag[274] = 6
    photograph(300, 500).convert("L").save(file, "PNG", exif=tag)
    for size in ((300, 500), (500, 300)):
        masks = np.zeros((1, *size), bool)
        assert draw_segments(Image.open(file), masks, ["a"]).size == size[::-1]
    levels = np.asarray(photograph(300, 500)).astype(np.uint16)
    drawn = draw_segments(levels, np.zeros((0, *levels.shape[:2]), bool), [])
    assert (np.asarray(drawn) == levels).all()


def test_wrong_masks_are_refused():
    image = photograph(500, 300)
    with pytest.raises(ValueError, match=r"image: is 300x500 \(height x width\), not 500x300"):
        draw_segments(image, np.zeros((1, 500, 300), bool), ["a"])
    with pytest.raises(ValueError, match="float64"):
        draw_segments(image, np.zeros((1, 300, 500)), ["a"])
    with pytest.raises(ValueError, match="1 masks, 2 labels"):
        draw_segments(image, np.zeros((1, 300, 500), bool), ["a", "b"])
    with pytest.raises(ValueError, match="2 scores"):
        draw_segments(image, np.zeros((1, 300, 500), bool), ["a"], [0.1, 0.2])


def test_the_same_input_gives_the_same_picture():
    masks = np.random.default_rng(1).random((30, 90, 120)) > 0.98
    labels = [f"label {n}" for n in range(30)]
    first, second = (draw_segments(photograph(120, 90), masks, labels) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_the_palette_is_distinct():
    colours = PALETTE[:24].astype(float)
    distance = np.linalg.norm(colours[:, None] - colours[None, :], axis=-1)
    assert distance[~np.eye(24, dtype=bool)].min() > 60


def test_side_by_side_sizes():
    wide, tall = Image.new("RGB", (200, 100), "red"), Image.new("L", (50, 200), 0)
    row = side_by_side([wide, tall], ["", "tall"])
    assert is_colour(row, (255, 0, 0)).sum() == 400 * 200  # scaled to the height of the other
    assert row.height > 200
    with pytest.raises(ValueError, match="2 pictures, 1 titles"):
        side_by_side([wide, tall], ["one"])
    with pytest.raises(ValueError, match="0 pictures, 0 titles"):
        side_by_side([], [])
