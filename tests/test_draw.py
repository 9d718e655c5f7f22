"""Pictures: only the segments' own pixels change, labels stay inside, odd input still draws."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFont
from scipy import ndimage

from xsam.report import letters
from xsam.report import pictures as draw
from xsam.report.colours import PALETTE, number_colours
from xsam.report.letters import colour_phrases, find_spans
from xsam.report.pictures import draw_prompts, draw_segments, side_by_side


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
    monkeypatch.setattr(draw, "_draw_labels", lambda *arguments: [])


@pytest.fixture
def boxes(monkeypatch) -> list:
    """The boxes of labels, as they are placed."""
    placed, take = [], draw._take_place

    def watched(*arguments):
        box = take(*arguments)
        placed.extend([box] if box else [])
        return box

    monkeypatch.setattr(draw, "_take_place", watched)
    return placed


def overlaps(boxes: list) -> bool:
    """Whether any two boxes have a pixel in common."""
    left, top, right, bottom = np.array(boxes).T
    across = (left[:, None] <= right) & (left <= right[:, None])
    across &= (top[:, None] <= bottom) & (top <= bottom[:, None])
    return bool((across & ~np.eye(len(boxes), dtype=bool)).any())


def test_pixels_change_at_the_masks_only(no_labels):
    """A segment is softly tinted, most at its outline; a rim of a pixel or two is outside."""
    image = photograph(500, 300)
    masks = np.stack([rectangle(500, 300, 20, 30, 200, 200), rectangle(500, 300, 150, 9, 500, 90)])
    changed = np.abs(np.array(draw_segments(image, masks, ["a", "b"])) - np.array(image, float))
    union = masks.any(axis=0)
    grown = ndimage.binary_dilation(union, iterations=4)
    assert not changed[~grown].any()
    assert (changed[union] > 0).any(axis=-1).mean() > 0.95
    plain = np.array(draw_segments(Image.new("RGB", (500, 300)), masks[:1], ["a"]), float)
    strength = plain[100, :110].max(axis=-1) / PALETTE[0].max()  # from the left edge to the middle
    assert strength[20] > 0.9  # the outline is the segment's colour
    assert 0.3 < strength[26] < 0.6 and 0.1 < strength[105] < 0.25
    assert (np.diff(strength[26:46]) <= 0).all()


def test_outlines_are_smooth(no_labels):
    """The edge of a slanted segment has many shades, none of them the whole step of a pixel; so it
    has where a small image is enlarged."""
    for side in (90, 600):
        rows, columns = np.mgrid[:side, :side]
        mask = rows * 3 > columns + side / 2
        picture = np.array(draw_segments(Image.new("RGB", (side, side)), mask[None], ["a"]), int)
        scale = picture.shape[0] // side
        # Down a column from black over the rim and the outline to the tint.
        assert len(np.unique(picture[..., 0])) > 60
        edge = (picture[..., 0] > 100).argmax(axis=0)[20 * scale : -20 * scale]
        assert np.abs(np.diff(edge)).max() <= 2
        straight = np.polyval(np.polyfit(np.arange(len(edge)), edge, 1), np.arange(len(edge)))
        assert np.abs(edge - straight).max() < 2


def test_nothing_thin_is_lost(no_labels):
    """A line of one pixel, also on an image of which fewer pixels are looked at."""
    for side in (64, 640, 3000):
        masks = np.zeros((2, side, side), bool)
        masks[0, side // 2], masks[1, 5, 5] = True, True
        picture = np.array(draw_segments(Image.new("RGB", (side, side)), masks, ["a", "b"]))
        scale = picture.shape[0] // side
        for colour, place in zip(PALETTE, ((side // 2, side // 3), (5, 5)), strict=False):
            near = [slice(max(0, i - 4) * scale, (i + 5) * scale) for i in place]
            distance = np.abs(picture[tuple(near)].astype(int) - colour).sum(axis=-1)
            assert distance.min() < 200


def test_the_smaller_segment_is_on_top(no_labels):
    small, large = rectangle(500, 500, 200, 200, 300, 300), rectangle(500, 500, 50, 50, 450, 450)
    image = Image.new("RGB", (500, 500), "white")
    first, second = (
        draw_segments(image, np.stack(masks), names, colours=colours)
        for masks, names, colours in (
            ((small, large), ["small", "large"], [0, 1]),
            ((large, small), ["large", "small"], [1, 0]),
        )
    )
    assert first.tobytes() == second.tobytes()
    assert is_colour(first, PALETTE[0]).sum() > 300


def test_a_class_has_one_colour_in_truth_and_prediction():
    truth, found = ["cat", "dog", "cat"], ["sheep", "dog", "cat"]
    assert number_colours(truth, found) == [[0, 1, 0], [2, 1, 0]]
    mask = rectangle(500, 300, 100, 50, 400, 250)
    image = Image.new("RGB", (500, 300))
    alone = draw_segments(image, mask[None], ["dog"], colours=[1])
    masks = np.stack([mask[:, ::-1] & False, mask])
    assert draw_segments(image, masks, ["cat", "dog"]).tobytes() == alone.tobytes()


def test_small_images_are_enlarged_by_a_whole_factor(no_labels):
    image = Image.new("RGB", (100, 60), "gray")
    mask = rectangle(100, 60, 10, 20, 50, 40)
    picture = draw_segments(image, mask[None], ["a"])
    assert picture.size == (600, 360)
    is_plain = is_colour(picture, (128, 128, 128))
    enlarged = mask.repeat(6, axis=0).repeat(6, axis=1)
    assert is_plain[~ndimage.binary_dilation(enlarged, iterations=8)].all()
    assert is_plain[enlarged].mean() < 0.02  # the corners are rounded
    assert draw_segments(photograph(480, 30), np.zeros((0, 30, 480), bool), []).size == (480, 30)


def test_letters_and_lines_grow_with_the_picture():
    """On 4,032 pixels a label and a title take as much of the picture as on 504."""
    shares = []
    for side in (504, 4032):
        masks = np.zeros((1, side, side), bool)
        masks[0, side // 4 : -side // 4, side // 4 : -side // 4] = True
        picture = draw_segments(Image.new("RGB", (side, side)), masks, ["cat"], title="a title")
        label = is_colour(picture, PALETTE[0])[picture.height - side // 2 - side // 50]
        shares.append([picture.height / side - 1, label.sum() / side])
    assert shares[0] == pytest.approx(shares[1], rel=0.1)
    assert shares[0][0] > 0.06


@pytest.mark.parametrize("corner", [(0, 0), (490, 0), (0, 390), (490, 390)])
def test_labels_stay_inside_the_picture(corner, boxes):
    left, top = corner
    mask = rectangle(500, 400, left, top, left + 10, top + 10)
    draw_segments(Image.new("RGB", (500, 400)), mask[None], ["a long label"], [0.5])
    ((left, top, right, bottom),) = boxes
    assert left >= 0 and top >= 0 and right < 500 and bottom < 400


@pytest.mark.parametrize("num_segments", [6, 120, 1000])
def test_labels_never_cover_each_other(boxes, num_segments):
    rng = np.random.default_rng(0)
    masks = np.zeros((num_segments, 120, 160), bool)
    for mask in masks:
        top, left = rng.integers(0, 110, 2)
        mask[top : top + rng.integers(1, 20), left : left + rng.integers(1, 20)] = True
    labels = [f"label {n}" for n in range(num_segments)]
    picture = draw_segments(Image.new("RGB", (160, 120)), masks, labels)
    assert len(boxes) >= min(num_segments, 40) and not overlaps(boxes)
    # Where there is no room, numbers stand in the picture, and some names below it.
    assert (picture.height > 480) == (num_segments > 6) and picture.height < 1000
    boxes.clear()
    masks = np.stack([rectangle(600, 500, 295, 245, 305, 255)] * 6)
    draw_segments(Image.new("RGB", (600, 500)), masks, ["person"] * 6)
    assert len(boxes) == 6 and not overlaps(boxes)


def test_a_small_segment_is_not_hidden_by_its_label(boxes):
    mask = rectangle(600, 400, 290, 190, 310, 205)
    picture = draw_segments(Image.new("RGB", (600, 400), "white"), mask[None], ["a label"])
    ((left, top, right, bottom),) = boxes
    assert right < 290 or left > 310 or bottom < 190 or top > 205
    assert max(abs((top + bottom) / 2 - 197), abs((left + right) / 2 - 300)) < 60  # near it
    assert (np.array(picture)[192:203, 292:308] != 255).any(axis=-1).mean() > 0.8


def test_the_label_sits_in_the_largest_part(boxes):
    mask = rectangle(600, 400, 10, 10, 200, 40) | rectangle(600, 400, 300, 200, 590, 390)
    draw_segments(Image.new("RGB", (600, 400)), mask[None], ["cat"])
    ((left, top, right, bottom),) = boxes
    assert left > 300 and right < 590 and abs((top + bottom) / 2 - 295) < 5


def test_no_segments_and_empty_masks_leave_the_picture_alone():
    image = photograph(500, 300)
    for masks, labels in [
        (np.zeros((0, 300, 500), bool), []),
        (np.zeros((1, 300, 500), bool), "a"),
    ]:
        picture = draw_segments(image, masks, list(labels))
        assert (np.array(picture) == np.array(image)).all()


def test_the_whole_picture_may_be_a_segment(no_labels):
    """It has no outline at the picture's border."""
    image = Image.new("RGB", (500, 300))
    picture = draw_segments(image, np.ones((1, 300, 500), bool), ["a"])
    assert len(np.unique(np.array(picture).reshape(-1, 3), axis=0)) == 1
    assert not is_colour(picture, (0, 0, 0)).any()


def test_ignored_pixels_are_hatched_and_no_class(boxes):
    ignore = rectangle(500, 300, 100, 50, 400, 250)
    image = Image.new("RGB", (500, 300))
    picture = draw_segments(image, np.zeros((0, 300, 500), bool), [], ignore=ignore)
    changed = ~is_colour(picture, (0, 0, 0))
    assert 0.1 < changed[ignore].mean() < 0.5 and not boxes
    assert not changed[~ndimage.binary_dilation(ignore, iterations=2)].any()


def test_a_prompt_is_drawn_as_what_it_is(boxes):
    """A point as a dot of the same size whatever was marked with it, a box as its outline, a
    scribble as a line, a mask as hatching."""
    image = Image.new("RGB", (640, 400))
    rows, columns = np.mgrid[:400, :640]
    disc = np.hypot(rows - 200, columns - 320) <= 60
    box, scribble = rectangle(640, 400, 200, 100, 440, 300), abs(rows - columns / 2) < 12
    drawn = {}
    for kind, mask in dict(point=disc, box=box, scribble=scribble, mask=disc).items():
        (picture,) = draw_prompts(image, mask[None], None, [""], [kind])
        changed = (np.array(picture) > 60).any(axis=-1)
        drawn[kind] = changed
        assert changed[mask].any()
    dot = drawn["point"] & disc
    assert np.ptp(np.nonzero(dot)[1]) < 40 and np.ptp(np.nonzero(dot)[0]) < 40
    assert not drawn["box"][110:290, 210:430].any() and drawn["box"][200, 200:204].any()
    line = drawn["scribble"][:, 150].sum()
    assert 6 < line < np.count_nonzero(scribble[:, 150])
    assert 0.1 < drawn["mask"][disc].mean() < 0.6


def test_the_title_is_a_strip_that_grows_with_its_lines():
    image, masks = photograph(500, 300), np.zeros((0, 300, 500), bool)
    short = draw_segments(image, masks, [], title="short")
    long = draw_segments(image, masks, [], title="a line that must wrap " * 8)
    assert 300 < short.height < long.height
    assert short.width == long.width == 500
    assert (np.array(long)[-300:] == np.array(image)).all()


def test_phrases_of_a_title_have_the_colours_of_their_segments():
    caption = "a ring, a ring and stars"
    spans = find_spans(caption, ["a ring", "stars", "a ring", "a moon"])
    assert spans == [(0, 6), (19, 24), (8, 14), None]
    pieces = colour_phrases(caption, spans, [3, 4, 5, 6])
    assert [piece for piece in pieces if piece[0]] == [
        ("a ring", 3), (", ", None), ("a ring", 5), (" and ", None), ("stars", 4)
    ]  # fmt: skip
    image, masks = Image.new("RGB", (500, 300)), np.zeros((0, 300, 500), bool)
    title = draw_segments(image, masks, [], title=pieces).crop((0, 0, 500, 30))
    columns = [np.nonzero(is_colour(title, PALETTE[number]))[1] for number in (3, 5, 4)]
    assert all(len(each) > 100 for each in columns)
    assert columns[0].max() < columns[1].min() and columns[1].max() < columns[2].min()
    # The words are where they are without colours, but for what stands around them.
    lines = letters.lay_out(pieces, 16, 10_000)
    assert "".join(run.text for run in lines[0]) == "a ring,a ringandstars"
    assert len(letters.lay_out(pieces, 16, 60)) > 2


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
        monkeypatch.setattr(letters, "_font_files", lambda: [""])
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
    for fonts in (letters._font_files(), [""]):
        monkeypatch.setattr(letters, "_font_files", lambda fonts=fonts: fonts)
        for text in texts:
            written, font = letters._legible(text, 16)
            for letter in set(written) - {" "}:
                assert bytes(font.getmask(letter)) != bytes(box), (text, letter)


def test_a_font_that_has_the_letters_is_taken_and_else_their_numbers_are_written(monkeypatch):
    assert letters._legible("a red cat", 16)[0] == "a red cat"
    assert (
        letters._legible("a red cat", 16)[1].getname()[0] == ImageFont.load_default(16).getname()[0]
    )
    known = {"": "cat ", "first.ttf": "cat 猫", "second.ttf": "cat 猫犬"}
    monkeypatch.setattr(letters, "_font_files", lambda: list(known))
    monkeypatch.setattr(letters, "_has_letter", lambda file, letter: letter in known[file])
    monkeypatch.setattr(letters, "_load_font", lambda file, size: (file, size))
    assert letters._legible("cat", 9) == ("cat", ("", 9))
    assert letters._legible("猫 cat", 9) == ("猫 cat", ("first.ttf", 9))
    assert letters._legible("猫犬", 9) == ("猫犬", ("second.ttf", 9))
    assert letters._legible("猫 猿", 9) == (r"\u732b \u733f", ("", 9))


def test_a_long_word_is_broken_and_a_thin_picture_has_room_for_words():
    image, masks = photograph(500, 300), np.zeros((0, 300, 500), bool)
    assert draw_segments(image, masks, [], title="x" * 300).height > 300 + 4 * 16
    for size in ((2, 3000), (3000, 2), (1, 1)):
        masks = np.ones((1, *size), bool)
        picture = draw_segments(photograph(*size[::-1]), masks, ["a cat"], title="a cat sat here")
        assert picture.height < max(size[0], 640) + 600


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
    with pytest.raises(ValueError, match="1 masks, 2 scores"):
        draw_segments(image, np.zeros((1, 300, 500), bool), ["a"], [0.1, 0.2])


def test_the_same_input_gives_the_same_picture():
    masks = np.random.default_rng(1).random((30, 90, 120)) > 0.98
    labels = [f"label {n}" for n in range(30)]
    first, second = (draw_segments(photograph(120, 90), masks, labels) for _ in range(2))
    assert first.tobytes() == second.tobytes()


# Linear RGB as it is seen without red, without green and without blue (Machado et al., 2009).
SEEN = {
    "all": np.eye(3),
    "no red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def oklab(linear: np.ndarray) -> np.ndarray:
    """Linear RGB [n, 3] in OKLab (Ottosson, 2020)."""
    cones = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
    lab = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.cbrt(linear.clip(0, 1) @ np.transpose(cones)) @ np.transpose(lab)


@pytest.mark.parametrize("seen", SEEN)
def test_every_reader_can_tell_the_colours_apart(seen):
    """A distance of 0.02 in OKLab is just noticed side by side."""
    values = PALETTE / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    lab = oklab(linear @ np.transpose(SEEN[seen]))
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.eye(len(lab))
    assert distance[:12, :12].min() > 0.07
    assert distance[:24, :24].min() > 0.05
    assert np.diagonal(distance[:12, :12], 1).min() > 0.09  # one and the next
    assert distance.min() > 0.03


def test_side_by_side_sizes():
    wide, tall = Image.new("RGB", (200, 100), "red"), Image.new("L", (50, 200), 0)
    row = side_by_side([wide, tall], ["", "tall"])
    assert is_colour(row, (255, 0, 0)).sum() == 400 * 200  # scaled to the height of the other
    assert row.height > 200
    # A legend does not count: images stand side by side at one height.
    masks = np.stack([rectangle(500, 300, 240, 140, 250, 150)] * 150)
    crowded = draw_segments(Image.new("RGB", (500, 300)), masks, [f"name {n}" for n in range(150)])
    row = side_by_side([crowded, Image.new("RGB", (500, 300), "red")], ["a", "b"])
    assert crowded.height > 350 and is_colour(row, (255, 0, 0)).sum() == 500 * 300
    with pytest.raises(ValueError, match="2 pictures, 1 titles"):
        side_by_side([wide, tall], ["one"])
    with pytest.raises(ValueError, match="0 pictures, 0 titles"):
        side_by_side([], [])
