"""Pictures and masks as people see them: any mode, depth and orientation.

pytest tests/test_images.py
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, PngImagePlugin
from test_formats import RINGS, SIZE, rng, two_parts

from xsam.datasets.formats import encode_mask
from xsam.datasets.referring import OwnReferring
from xsam.datasets.sources import Source
from xsam.images import foreground, read_image, read_image_size, read_region, viewed

# ---- images --------------------------------------------------------------------------------------


def picture(height: int = 20, width: int = 30) -> Image.Image:
    return Image.fromarray(rng().integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_image_errors_name_the_file(tmp_path):
    picture().save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    for name in ("cut.png", "text.jpg", "absent.jpg", "empty.jpg", "folder.jpg"):
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path / name)
        if name != "cut.png":  # whose header is whole
            with pytest.raises(ValueError, match=name):
                read_image_size(tmp_path / name)
    assert read_image_size(tmp_path / "good.png") == (20, 30)
    assert read_image(tmp_path / "good.png", (20, 30)).size == (30, 20)
    with pytest.raises(ValueError, match=r"good\.png: is 20x30.* 30x20"):
        read_image(tmp_path / "good.png", (30, 20))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_damaged_images_are_value_errors(kind):
    buffer = io.BytesIO()
    picture().save(buffer, kind)
    whole, draw = buffer.getvalue(), rng(len(kind))
    contents = [whole[:length] for length in range(0, len(whole), 61)]
    for _ in range(60):
        content = bytearray(whole)
        for place in draw.integers(min(200, len(whole)), size=3):
            content[place] = draw.integers(256)
        contents.append(bytes(content))
    num_refused = 0
    for content in contents:
        try:
            assert read_image(io.BytesIO(content), (20, 30)).size == (30, 20)
        except ValueError:
            num_refused += 1
    assert num_refused


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (30, 20), "white").convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.getpixel((3, 3)) == (255, 255, 255)


# ---- images as they are shown --------------------------------------------------------------------

GREY = ("L", "LA", "1", "I", "I;16", "F", "12 bits")
COLOUR = ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "P", "PA")
FORMATS = {  # lossless, by mode, and None: not written to a file
    "L": ("PNG", "TIFF", "WEBP", None), "LA": ("PNG", "TIFF", None), "1": ("PNG", "TIFF", None),
    "I": ("TIFF", None), "I;16": ("PNG", "TIFF", None), "F": ("TIFF", None),
    "12 bits": ("PNG", "TIFF", None), "RGB": ("PNG", "TIFF", None), "RGBA": ("PNG", "TIFF", None),
    "CMYK": ("TIFF", None), "P": ("PNG", "TIFF", "GIF", None),
}  # fmt: skip
BACK = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that EXIF's tag undoes


def in_mode(reference: Image.Image, mode: str, draw: np.random.Generator) -> Image.Image:
    """The same picture, RGB of 8 bits, in another mode."""
    levels = np.asarray(reference.convert("L"))
    if mode == "F":
        return Image.fromarray(levels.astype(np.float32) / draw.choice([1, 255]))
    if mode == "I":
        return Image.fromarray(levels * np.int32(draw.choice([1, 257])))
    if mode in ("I;16", "12 bits"):
        return Image.fromarray(levels * np.uint16(257) // np.uint16(16 if mode == "12 bits" else 1))
    if mode == "PA":
        return reference.quantize(40).convert("PA")
    if mode == "P" and draw.random() < 0.5:  # the colour of one entry is transparent
        image = reference.quantize(40)
        image.info["transparency"] = 255
        return image
    return reference.quantize(40) if mode == "P" else reference.convert(mode)


@pytest.mark.parametrize("seed", range(120))
def test_any_mode_depth_and_orientation_is_the_upright_picture(tmp_path, seed):
    draw = rng(seed)
    mode = (GREY + COLOUR)[seed % 15]
    height, width = (int(side) for side in draw.integers(3, 30, 2))
    reference = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode == "1":
        reference = reference.convert("1").convert("RGB")
    elif mode in ("P", "PA"):
        reference = reference.quantize(40).convert("RGB")
    elif mode in GREY:  # all levels, so that the brightest is white
        reference.paste((255, 255, 255), (0, 0, 1, 1))
        reference = reference.convert("L").convert("RGB")
    number = int(draw.integers(1, 9))
    stored = reference if number == 1 else reference.transpose(Image.Transpose(BACK[number]))
    image, kind = in_mode(stored, mode, draw), draw.choice(FORMATS.get(mode, (None,)))
    tag = Image.Exif()
    tag[274] = number
    if kind is None:
        image.info["exif"] = tag.tobytes()
        shown = viewed(image)
    else:
        number = 1 if kind == "GIF" else number  # has no tags
        reference = stored if number == 1 else reference
        extra = {} if kind == "GIF" else {"exif": tag}
        path = tmp_path / f"x.{kind.lower()}"
        image.save(path, kind, **extra, **({"lossless": True} if kind == "WEBP" else {}))
        shown = read_image(path)
        assert read_image_size(path) == (shown.height, shown.width)
        assert read_image(path, (shown.height, shown.width)).tobytes() == shown.tobytes()
    assert shown.mode == "RGB" and shown.size == reference.size
    difference = np.asarray(shown, int) - np.asarray(reference, int)
    lossy = {"YCbCr": 3, "HSV": 9}  # steps of 8 bits in another space of colours
    assert abs(difference).max() <= lossy.get(mode, 1), (mode, kind, number)
    assert viewed(shown).tobytes() == shown.tobytes()  # is not turned again


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
def test_an_array_of_any_type_is_its_picture(dtype, channels):
    levels = rng(3).integers(0, 256, (7, 9, *channels), dtype=np.uint8)
    levels.flat[0], levels[..., 3:] = 255, 255
    scale = {bool: 1, np.uint16: 257, np.float32: 1 / 255, np.float64: 1 / 255}.get(dtype, 1)
    values = levels > 99 if dtype is bool else (levels * dtype(scale)).astype(dtype)
    expected = (values * np.uint8(255) if dtype is bool else levels).reshape(7, 9, -1)[..., :3]
    assert (np.asarray(viewed(values)) == np.broadcast_to(expected, (7, 9, 3))).all()


def test_levels_beyond_a_depth_are_shown_from_the_lowest_to_the_highest():
    hounsfield = np.array([[-1000, 0, 1000, 3000]], np.int16)  # of a CT scan
    assert np.asarray(viewed(hounsfield))[0, :, 0].tolist() == [0, 64, 128, 255]
    height = np.array([[0, np.nan, 500_000, 1_000_000, np.inf]], np.float32)
    assert np.asarray(viewed(height))[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert not np.asarray(viewed(np.zeros((3, 4), np.float32))).any()


MEASURED = {  # lowest and highest level, and what there is beside them
    "kelvin": (270, 310, np.float32, ()),
    "reflectance": (0, 1.2, np.float32, ()),
    "an overshoot": (0, 1.0001, np.float32, ()),
    "metres": (0.5, 8, np.float32, ()),
    "counts": (0, 3000, np.float32, ()),
    "heights with no data": (100, 900, np.float32, (-9999,)),
    "depths with no data": (0, 900, np.float32, (-3.4e38,)),
    "thermal camera": (29000, 31000, np.uint16, ()),
    "thermal camera with a black frame": (29000, 31000, np.uint16, (0,)),
    "dark sensor": (0, 300, np.uint16, ()),
}


@pytest.mark.parametrize("name", MEASURED)
def test_measurements_are_shown_over_their_own_range(name):
    low, high, dtype, others = MEASURED[name]
    ramp = np.linspace(low, high, 60).astype(dtype)
    shown = np.asarray(viewed(np.array([*ramp, *others], dtype)[None]))[0, :, 0].astype(int)
    assert np.abs(shown[:60] - np.linspace(0, 255, 60)).max() < 2
    assert not shown[60:].any()


def test_what_is_transparent_is_on_white(tmp_path):
    colours = np.zeros((4, 6, 4), np.uint8)
    colours[..., 0], colours[:2, :, 3], colours[2, :, 3] = 200, 255, 128
    half = [round((200 * 128 + 255 * 127) / 255), 127, 127]
    Image.fromarray(colours).save(tmp_path / "x.png")
    marked = Image.fromarray(colours[..., :3])  # PNG's other way: one colour is transparent
    marked.paste((1, 2, 3), (0, 3, 6, 4))
    marked.save(tmp_path / "y.png", transparency=(1, 2, 3))
    for name in ("x.png", "y.png"):
        rows = np.asarray(read_image(tmp_path / name))[:, 0].tolist()
        assert rows[0] == [200, 0, 0] and rows[3] == [255, 255, 255]
        assert name == "y.png" or rows[2] == half


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_read(tmp_path, kind):
    frames = [Image.new("RGB", (8, 5), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(tmp_path / "x", kind, save_all=True, append_images=frames[1:], **options)
    assert read_image(tmp_path / "x").getcolors() == [(40, (255, 0, 0))]


def tagged(path: Path, image: Image.Image, number: int) -> Path:
    tag = Image.Exif()
    tag[274] = number
    image.save(path, exif=tag)
    return path


def test_a_users_masks_tell_whether_their_photo_is_turned(tmp_path):
    shown = picture(*SIZE)
    photo = tagged(tmp_path / "a.png", shown.transpose(Image.Transpose.ROTATE_90), 6)
    stored = np.rot90(two_parts()).copy()
    Image.fromarray(stored).save(tmp_path / "stored.png")
    for mask, expected in (
        (RINGS, two_parts()),  # say nothing: the photo as it is shown
        (encode_mask(two_parts()), two_parts()),
        (encode_mask(stored), stored),
        ("stored.png", stored),
    ):
        record = {"image": photo.name, "masks": [mask], "texts": ["it"]}
        (tmp_path / "own.json").write_text(json.dumps([record]))
        dataset = OwnReferring("own", Source("refer", "own_refs", "own.json"), tmp_path)
        sample = dataset.sample(0, rng())
        assert (sample.masks[0] == expected).all()
        assert sample.image.size == expected.shape[::-1]


def test_a_size_that_is_told_decides_whether_a_photo_is_turned(tmp_path):
    shown = picture(20, 30)
    quarter = tagged(tmp_path / "a.png", shown.transpose(Image.Transpose.ROTATE_90), 6)
    assert read_image(quarter, (20, 30)).tobytes() == shown.tobytes()
    stored = read_image(quarter, (30, 20))
    assert stored.tobytes() == shown.transpose(Image.Transpose.ROTATE_90).tobytes()
    assert viewed(stored).size == (20, 30)  # nothing turns it later
    expected = r"a\.png: is 20x30 \(height x width\) upright, 30x20 as stored, not 7x5 as"
    with pytest.raises(ValueError, match=expected):
        read_image(quarter, (7, 5))
    # Upside down or mirrored both fit, and it is upright that people saw it.
    for number, back in ((2, 0), (3, 3), (4, 1)):
        path = tagged(tmp_path / "b.png", shown.transpose(Image.Transpose(back)), number)
        assert read_image(path, (20, 30)).tobytes() == shown.tobytes()


def test_tags_that_cannot_be_read_turn_nothing(tmp_path):
    shown = picture()
    for exif in (b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0", b"MM\0*" + b"\xff" * 40, b"II*\0"):
        shown.save(tmp_path / "x.png", exif=exif)
        assert read_image(tmp_path / "x.png").tobytes() == shown.tobytes()
        assert read_image_size(tmp_path / "x.png") == (20, 30)
    for number in (0, 9, 65535):
        tagged(tmp_path / "x.png", shown, number)
        assert read_image(tmp_path / "x.png").tobytes() == shown.tobytes()
    note = PngImagePlugin.PngInfo()
    note.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>')
    shown.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "x.png", pnginfo=note)
    assert read_image(tmp_path / "x.png").tobytes() == shown.tobytes()


# ---- what is inside a mask -----------------------------------------------------------------------

DISC = np.hypot(*np.mgrid[-20:21, -20:21]) < 12
RIM = (np.hypot(*np.mgrid[-20:21, -20:21]) < 16) & ~DISC
OTHER = np.zeros_like(DISC)
OTHER[:9, 30:] = True


def voc(index: np.ndarray) -> Image.Image:
    """With the palette of Pascal VOC."""
    image = Image.fromarray(index.astype(np.uint8))
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, *[0] * 756, 224, 224, 192])
    return image


def drawn(colour: tuple, paper: tuple, mode: str) -> Image.Image:
    image = Image.new(mode, DISC.shape[::-1], paper)
    image.paste(colour, mask=Image.fromarray(DISC))
    return image


def soft(image: Image.Image, blur: float = 1.0) -> Image.Image:
    return image.resize((164, 164)).filter(ImageFilter.GaussianBlur(blur)).resize((41, 41))


SHADES = np.asarray(soft(Image.fromarray(DISC).convert("L")))
CUTOUT = np.dstack([rng(5).integers(0, 256, (41, 41, 3), dtype=np.uint8), DISC * np.uint8(255)])


INSIDE = {
    **{f"{kind.__name__} 1": DISC.astype(kind) for kind in (bool, np.uint8, np.int64, np.float32)},
    "128": DISC * np.uint8(128),
    "255 as float": DISC * 255.0,
    "channel of its own": DISC[..., None] * np.uint8(255),
    "RGB array": np.dstack([DISC * np.uint8(255)] * 3),
    "probabilities": np.where(DISC, 0.6, 0.4),
    "1 bit": Image.fromarray(DISC),
    "16 bits": Image.fromarray(DISC * np.uint16(65535)),
    "float picture": Image.fromarray(DISC.astype(np.float32)),
    "blue on black": drawn((0, 0, 255), (0, 0, 0), "RGB"),
    "black on nothing": drawn((0, 0, 0, 255), (0, 0, 0, 0), "RGBA"),
    "white on nothing": drawn((255, 255), (255, 0), "LA"),
    "white on black, opaque": drawn((255, 255, 255, 255), (0, 0, 0, 255), "RGBA"),
    "cut out": CUTOUT,
    "grey palette": Image.fromarray(DISC * np.uint8(255)).convert("P"),
    "VOC": voc(DISC + 255 * RIM),
    "VOC, a cream object": voc(255 * DISC),
    "VOC in colours": voc(DISC + 255 * RIM).convert("RGB"),
    "class map with void": (DISC * 7 + RIM * 255).astype(np.uint8),
    "paper that is not quite black": np.where(DISC, 254, 2).astype(np.uint8),
    "a tensor": torch.tensor(DISC, dtype=torch.bfloat16).requires_grad_(),
    "beyond 31 bits": DISC * np.uint32(2**32 - 1),
    "soft red": Image.merge("RGB", [Image.fromarray(SHADES), *[Image.new("L", (41, 41))] * 2]),
}


@pytest.mark.parametrize("kind", INSIDE)
def test_what_is_inside_is_the_same_of_every_kind(kind):
    mask = foreground(INSIDE[kind])
    assert mask.dtype == bool and mask.shape == DISC.shape
    assert (mask == (SHADES > 128 if "soft" in kind else DISC)).all()


def test_shades_are_an_edge(tmp_path):
    for levels in (SHADES, SHADES // np.uint8(2), SHADES * np.uint16(257)):
        assert (foreground(levels) == (levels > levels.max() * (128 / 255))).all()
    buffer = io.BytesIO()
    Image.fromarray(DISC).resize((200, 200)).convert("L").save(buffer, "JPEG")
    Image.open(buffer).save(tmp_path / "x.png")  # with the noise of a JPEG
    levels = np.asarray(Image.open(tmp_path / "x.png"))
    assert (read_region(tmp_path / "x.png", (200, 200)) == (levels > 128)).all()


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (255, 255, 255)])
@pytest.mark.parametrize("width", [2, 5, 9])
def test_a_stroke_that_was_saved_as_jpeg_is_inside_without_the_noise_around_it(colour, width):
    picture, file = Image.new("RGB", (640, 480)), io.BytesIO()
    ImageDraw.Draw(picture).line([(50, 50), (300, 400), (600, 100)], fill=colour, width=width)
    picture.save(file, "JPEG", quality=75)
    noisy = np.asarray(Image.open(file)).any(axis=2)
    stroke = np.asarray(picture).any(axis=2)
    assert noisy.sum() > 1.5 * stroke.sum()
    assert abs(foreground(Image.open(file)).sum() / stroke.sum() - 1) < 0.1


AMBIGUOUS = {
    "class numbers": DISC + 2 * OTHER,
    "class numbers and void": DISC + 2 * OTHER + 255 * RIM,
    "white on a grey that could be a class": np.where(DISC, 255, 3),
    "greys": DISC * 85 + 170 * OTHER,
    "a trimap": DISC * 255 + RIM * 128,
    "colours": voc(DISC + 2 * OTHER).convert("RGB"),
    "a palette": voc(DISC + 2 * OTHER + 255 * RIM),
    "soft greys": soft(Image.fromarray((DISC * 255 + OTHER * 90).astype(np.uint8))),
    "one stray pixel of another class": DISC * 255 + 3 * (np.arange(1681) == 0).reshape(41, 41),
    "small classes": np.array([[0, 1], [2, 0]]),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_a_mask_of_several_objects_is_an_error_that_says_what_to_do(kind):
    picture = AMBIGUOUS[kind]
    picture = picture.astype(np.uint8) if isinstance(picture, np.ndarray) else picture
    with pytest.raises(ValueError, match=r"here: has .* make that white and all else black"):
        foreground(picture, "here")


def test_what_is_no_mask_is_an_error():
    for picture in (DISC * 0, ~DISC & DISC, Image.new("RGBA", (9, 9)), np.full((4, 4), 0.4)):
        with pytest.raises(ValueError, match="here: is all black"):
            foreground(picture, "here")
    with pytest.raises(ValueError, match="here: holds numbers below 0"):
        foreground(np.where(DISC, 4.0, -4.0), "here")
    with pytest.raises(ValueError, match=r"here: is bool of shape \[2, 41, 41\]"):
        foreground(np.stack([DISC, DISC]), "here")
    with pytest.raises(ValueError, match=r"here: is .*give a PIL image or an array"):
        foreground("mask.png", "here")


def test_a_mask_with_a_tag_is_turned_as_its_photo(tmp_path):
    mask = np.zeros((20, 30), bool)
    mask[2:5, 3:20] = True
    image = Image.fromarray(mask * np.uint8(255))
    for number, back in BACK.items():
        path = tagged(tmp_path / "x.png", image.transpose(Image.Transpose(back)), number)
        assert (read_region(path, (20, 30)) == mask).all()


def test_a_mask_picture_is_inside_where_it_is_not_black(tmp_path):
    for mode, white in (("L", 255), ("L", 1), ("RGB", (0, 9, 0)), ("1", 1)):
        image = Image.new(mode, (14, 9))
        for row, column in np.argwhere(two_parts()).tolist():
            image.putpixel((column, row), white)
        image.save(tmp_path / "x.png")
        assert (read_region(tmp_path / "x.png", SIZE) == two_parts()).all()
    with pytest.raises(ValueError, match=r"x\.png: is 9x14"):
        read_region(tmp_path / "x.png", (14, 9))
