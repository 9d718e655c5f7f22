"""Suspicious reading: every encoding of a mask, and bytes that are damaged in every way.

pytest tests/test_formats.py
"""

import itertools
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from xsam.datasets import records
from xsam.datasets.formats import (
    decode_mask,
    dilate,
    encode_mask,
    read_class_map,
    read_refs,
    read_segment_ids,
    read_tsv,
    rle_area,
    segment_colours,
)
from xsam.datasets.records import Flag, Id, Side, Size, expect, label, parse, take
from xsam.files import find_file, is_file, list_files, read_json
from xsam.images import read_image
from xsam.names import read_names
from xsam.prompts import read_phrasings

SIZE = (9, 14)
WHERE = "instances.json: annotation 5"


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed or 0)


def two_parts() -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[1:4, 2:8] = mask[6:9, 9:14] = True
    return mask


# The same two rectangles, as outlines along the pixel edges.
RINGS = [[2, 1, 8, 1, 8, 4, 2, 4], [9, 6, 14, 6, 14, 9, 9, 9]]


def runs(mask: np.ndarray) -> list[int]:
    """COCO's run lengths: down the columns, the first run counts zeros."""
    groups = itertools.groupby(mask.ravel(order="F").tolist())
    lengths = [(inside, len(list(group))) for inside, group in groups]
    return [0] * lengths[0][0] + [length for _, length in lengths]


def list_rle(mask: np.ndarray) -> dict:
    return {"counts": runs(mask), "size": list(mask.shape)}


def packed(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def unpack(counts: str) -> list[int]:
    """Run lengths of compressed counts, number by number as in COCO's maskApi.c; ValueError where
    the last number is not finished."""
    lengths, place = [], 0
    while place < len(counts):
        number = shift = 0
        more = True
        while more:
            if place == len(counts):
                raise ValueError
            code = ord(counts[place]) - 48
            number |= (code & 31) << shift
            more, place, shift = bool(code & 32), place + 1, shift + 5
            if not more and code & 16:
                number |= -1 << shift
        lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
    return lengths


# ---- masks ---------------------------------------------------------------------------------------


def encodings(mask: np.ndarray) -> dict:
    """One mask in every way that COCO and its relatives write it."""
    left, right = mask.copy(), mask.copy()
    left[:, 6:], right[:, :6] = False, False
    as_bytes = packed(mask)
    as_bytes["counts"] = as_bytes["counts"].encode()
    return {
        "polygons": RINGS,
        "polygons of floats": [[float(number) for number in ring] for ring in RINGS],
        "list RLE": list_rle(mask),
        "string RLE": packed(mask),
        "bytes RLE": as_bytes,
        "list of list RLEs": [list_rle(left), list_rle(right)],
        "list of string RLEs": [packed(left), packed(right)],
        "RLEs that overlap": [packed(mask), packed(left)],
        "RLE and polygon": [packed(left), *RINGS],
    }


@pytest.mark.parametrize("kind", encodings(two_parts()))
def test_every_encoding_is_one_mask(kind):
    decoded = decode_mask(encodings(two_parts())[kind], SIZE, WHERE)
    assert decoded.dtype == bool and (decoded == two_parts()).all()


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("encode", [list_rle, packed])
def test_a_mask_of_nothing_and_of_everything(encode, value):
    mask = np.full(SIZE, value)
    assert (decode_mask(encode(mask), SIZE, WHERE, may_be_empty=True) == mask).all()
    assert rle_area(encode(mask), SIZE, WHERE) == mask.sum()


EMPTY = {
    "list RLE": list_rle(np.zeros(SIZE, bool)),
    "string RLE": packed(np.zeros(SIZE, bool)),
    "polygon of no area": [[3, 3, 3, 3, 3, 3]],
    "polygon beside the image": [[15, 1, 20, 1, 20, 5]],
}


@pytest.mark.parametrize("kind", EMPTY)
def test_a_mask_without_a_pixel_is_refused_unless_it_may_be(kind):
    with pytest.raises(ValueError, match="annotation 5: its mask has no pixel in the image"):
        decode_mask(EMPTY[kind], SIZE, WHERE)
    assert not decode_mask(EMPTY[kind], SIZE, WHERE, may_be_empty=True).any()


@pytest.mark.parametrize("seed", range(6))
def test_random_masks_come_back(seed):
    size = tuple(rng(seed).integers(1, 70, 2).tolist())
    mask = rng(seed).random(size) < rng(seed, 1).random()
    for rle in (
        list_rle(mask),
        packed(mask),
        encode_mask(mask),
        json.loads(json.dumps(packed(mask))),
    ):
        assert (decode_mask(rle, size, WHERE) == mask).all()
        assert rle_area(rle, size, WHERE) == mask.sum()


def test_encode_mask_is_what_pycocotools_writes():
    assert encode_mask(two_parts()) == packed(two_parts())
    assert json.loads(json.dumps(encode_mask(two_parts()))) == packed(two_parts())


def test_a_polygon_is_filled_as_pycocotools_fills_it():
    ring = [3.5, 0.2, 12.9, 4.4, 7.1, 8.8, -2.0, 6.0]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([ring], *SIZE)))
    assert (decode_mask([ring], SIZE, WHERE) == expected.astype(bool)).all()


def test_bad_rings_are_dropped_and_counted():
    bad = [[1, 1, 8, 8], [0, 0, 5, 0, 5, 5, 3], [4, 4, 4], []]
    assert (decode_mask([*bad, *RINGS], SIZE, WHERE) == two_parts()).all()
    assert records.mask_parts([*bad, *RINGS]) == (RINGS, 4)
    for shape in (RINGS, [packed(two_parts())]):
        assert records.mask_parts(shape) == (shape, 0)
    assert records.mask_parts(list_rle(two_parts())) == ([list_rle(two_parts())], 0)
    assert records.mask_parts([]) == ([], 0)


def test_a_polygon_may_stand_alone_or_have_its_corners_in_pairs_or_as_text():
    ring, expected = RINGS[0], decode_mask(RINGS[:1], SIZE, WHERE)
    pairs = [list(pair) for pair in zip(ring[::2], ring[1::2], strict=True)]
    as_text = [[str(number) for number in ring]]
    for shape in (ring, pairs, [pairs], [[1, 2], pairs], as_text):
        assert (decode_mask(shape, SIZE, WHERE) == expected).all(), shape


COUNTS = packed(two_parts())["counts"]
BAD_MASKS = {
    "nothing": ([], "no valid polygon or RLE"),
    "no valid ring": ([[1, 1, 8, 8]], "no valid polygon or RLE"),
    "three numbers": ([[1, 2, 3]], "no valid polygon or RLE"),
    "a number": (7, "expected list, got 7"),
    "a string": (["mask.png"], "no valid polygon or RLE"),
    "word in a ring": ([[1, 1, 5, 1, 5, "five"]], "no number"),
    "words in a ring": ([["1", "1", "5", "1", "5", "five"]], "no number"),
    "pairs and a triple": ([[[1, 1], [5, 1], [5, 5, 5]]], "no valid polygon|no number"),
    "lists in a ring": ([[1, 1, 5, 1, 5, [5]]], "no number"),
    "huge number in a ring": ([[1, 1, 5, 1, 5, 2**80]], "outside its image"),
    "null in a ring": ([[1, 1, 5, 1, 5, None]], "no number"),
    "far outside": ([[1, 1, 900, 1, 900, 5]], "outside its image"),
    "infinite": ([[1, 1, float("inf"), 1, 5, 5]], "outside its image"),
    "not a number": ([[1, 1, float("nan"), 1, 5, 5]], "no number"),
    "list RLE of another size": (list_rle(two_parts()[:8]), r"RLE of size \[8, 14\].*\[9, 14\]"),
    "string RLE of another size": ([packed(two_parts().T)], r"RLE of size \[14, 9\].*\[9, 14\]"),
    "no size": ({"counts": COUNTS}, "has no 'size'"),
    "no counts": ({"size": [9, 14]}, "has no 'counts'"),
    "null counts": ({"size": [9, 14], "counts": None}, "expected list or str or bytes, got None"),
    "empty counts": ({"size": [9, 14], "counts": ""}, "RLE is damaged"),
    "empty list": ({"size": [9, 14], "counts": []}, "does not fit"),
    "too long": ({"size": [9, 14], "counts": [100, 30]}, "does not fit"),
    "too short": ({"size": [9, 14], "counts": [100, 20]}, "does not fit"),
    "negative run": ({"size": [9, 14], "counts": [100, -4, 30]}, "does not fit"),
    "run beyond 64 bits": ({"size": [9, 14], "counts": [2**70, 26]}, "too long"),
    "sum beyond 64 bits": ({"size": [9, 14], "counts": [2**63 - 1] * 2 + [128]}, "does not fit"),
    "float run": ({"size": [9, 14], "counts": [100.5, 26]}, "expected int"),
    "boolean run": ({"size": [9, 14], "counts": [125, True]}, "expected int"),
    "string cut": ({"size": [9, 14], "counts": COUNTS[:-1]}, "RLE"),
    "string too long": ({"size": [9, 14], "counts": COUNTS + "3"}, "does not fit"),
    "foreign character": ({"size": [9, 14], "counts": COUNTS[:-1] + "~"}, "foreign character"),
    "space": ({"size": [9, 14], "counts": COUNTS + " "}, "foreign character"),
    "not ASCII": ({"size": [9, 14], "counts": COUNTS + "é"}, "damaged"),
    "endless run": ({"size": [9, 14], "counts": "o" * 40 + "0"}, "too long"),
    "one bad of two": ([packed(two_parts()), packed(two_parts().T)], "RLE of size"),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_a_mask_that_cannot_be_read_names_its_record(kind):
    segmentation, message = BAD_MASKS[kind]
    with pytest.raises(ValueError, match=message) as caught:
        decode_mask(segmentation, SIZE, WHERE)
    assert WHERE in str(caught.value)


def test_the_area_of_an_rle_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="annotation 5: its RLE does not fit"):
        rle_area({"size": [9, 14], "counts": [100, 30]}, SIZE, WHERE)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_counts_are_decoded_rightly_or_refused(seed):
    """pycocotools writes beyond its memory where an RLE is too long: nothing of that may pass."""
    draw = rng(seed)
    mask = draw.random((40, 33)) < 0.3
    whole = packed(mask)["counts"]
    outcomes = []
    for _ in range(250):
        counts = list(whole)
        for _ in range(draw.integers(1, 4)):
            place, character = draw.integers(len(counts)), chr(draw.integers(46, 114))
            action = draw.integers(3)
            if action == 0:
                counts[place] = character
            elif action == 1:
                counts.insert(place, character)
            else:
                del counts[place:][: draw.integers(1, 4)]
        counts = "".join(counts)
        try:
            lengths = unpack(counts)
            is_fine = min(lengths) >= 0 and sum(lengths) == mask.size
            is_fine &= all(48 <= ord(character) < 112 for character in counts)
        except ValueError:
            is_fine = False
        rle = {"size": [40, 33], "counts": counts}
        outcomes.append(is_fine)
        if is_fine:
            inside = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
            expected = inside.reshape(40, 33, order="F")
            assert (decode_mask(rle, (40, 33), WHERE, may_be_empty=True) == expected).all()
        else:
            with pytest.raises(ValueError, match="annotation 5"):
                decode_mask(rle, (40, 33), WHERE)
    assert not all(outcomes)


@pytest.mark.parametrize("radius", [0, 1, 5, 10])
def test_dilate_grows_by_a_disc(radius):
    mask = rng(radius).random((30, 47)) < 0.004
    mask[0, 0] = mask[29, 40] = True
    rows, columns = np.mgrid[:30, :47]
    inside = np.argwhere(mask)
    away = np.hypot(rows[..., None] - inside[:, 0], columns[..., None] - inside[:, 1]).min(axis=-1)
    before = mask.copy()
    assert (dilate(mask, radius) == (away <= radius)).all()
    assert (mask == before).all()
    assert not dilate(np.zeros((5, 6), bool), radius).any()


# ---- JSON and records ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b'{"images": [', b"", b"[" * 100_000, b"\x1f\x8b\x08\0"],
    ids=["cut", "empty", "deep", "gzip"],
)
def test_a_damaged_json_is_named(tmp_path, content):
    (tmp_path / "refs.json").write_bytes(content)
    about = "not valid JSON.*fetch it again|it is empty: fetch|it is compressed by gzip: unpack"
    with pytest.raises(ValueError, match=rf"refs\.json: ({about})"):
        read_json(tmp_path / "refs.json")


def test_json_lines_are_told_from_damage(tmp_path):
    (tmp_path / "refs.json").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"refs\.json: not valid JSON.*make its lines one list"):
        read_json(tmp_path / "refs.json")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["a.json", "a.tsv", "a.p", "names.txt", "a.jpg", "a.png"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "git-LFS pointer.*git lfs pull"),
        (b"<html>not found</html>", "web page.*fetch it again"),
        (b"", "it is empty"),
        (b"../../Other/A.jpg", r"link that was not restored, to \.\./\.\./Other/A\.jpg"),
        (b"\xef\xbb\xbf\r\n<!DOCTYPE HTML><title>Log in", "web page.*fetch it again"),
    ],
)
def test_what_lies_in_the_place_of_a_file_is_told(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    read = {
        ".json": read_json,
        ".tsv": read_tsv,
        ".p": read_refs,
        ".txt": lambda path: read_names(str(path)),
        ".jpg": read_image,
        ".png": lambda path: read_segment_ids(path, (4, 4)),
    }[Path(name).suffix]
    with pytest.raises(ValueError, match=f"{re.escape(name)}: .*{message}"):
        read(tmp_path / name)


MARKED = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
UNMARKED = ["utf-16-le", "utf-16-be", "utf-32-le"]  # known by their zeros


@pytest.mark.parametrize("encoding", [*MARKED, *UNMARKED])
def test_every_text_is_read_in_the_encodings_that_files_have(tmp_path, encoding):
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode(encoding))
        return tmp_path / name

    assert read_json(write("a.json", '{"name":\n"café 猫"}')) == {"name": "café 猫"}
    assert read_refs(write("b.json", '[{"sent": "猫"}]')) == [{"sent": "猫"}]
    assert read_tsv(write("a.tsv", 'index\tquestion\n1\t"é\n猫"\n'))[0]["index"] == "1"
    assert read_names(str(write("names.txt", "cup\nhot dog\ncafé\n"))) == ["cup", "hot dog", "café"]
    if encoding in MARKED:  # a text that begins with other letters has no zeros to go by
        assert read_names(str(write("cats.txt", "猫\n犬\n"))) == ["猫", "犬"]
    phrasings = read_phrasings(write("a.json", '{"refer": {"absent": ["Kein 猫."]}}'))
    assert phrasings["refer"]["absent"] == ["Kein 猫."]


def test_a_text_in_a_code_page_is_refused_but_where_published_files_are_in_one(tmp_path):
    (tmp_path / "refs.json").write_bytes(b'{"name": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"refs\.json: is no text in UTF-8 or UTF-16 .*byte 0xe9"):
        read_json(tmp_path / "refs.json")
    assert read_json(tmp_path / "refs.json", last_resort="cp1252") == {"name": "café"}
    (tmp_path / "refs.json").write_bytes("{}".encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"refs\.json: is no text"):
        read_json(tmp_path / "refs.json")


def test_a_json_that_is_absent_or_of_another_kind_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "list.json").write_text("[1]")
    assert read_json(tmp_path / "list.json") == read_json(tmp_path / "list.json", list) == [1]
    with pytest.raises(ValueError, match=r"list\.json: holds a list, expected a dict"):
        read_json(tmp_path / "list.json", dict)


@pytest.mark.parametrize(
    ("value", "kind"), [(3, int), (3, float), (3.5, float), (True, bool), ("x", (int, str))]
)
def test_expect_gives_back_what_is_of_the_kind(value, kind):
    assert expect(value, kind, "here") is value


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, int),
        (True, float),
        (1.0, int),
        ("1", int),
        (None, (int, str)),
        (float("nan"), float),
        (float("inf"), float),
        (1, bool),
        ({}, list),
    ],
)
def test_expect_refuses_what_is_of_another_kind(value, kind):
    with pytest.raises(ValueError, match="here: expected"):
        expect(value, kind, "here")


def test_take_names_the_record_and_the_key():
    assert take({"id": 3}, "id", int, "a.json: record 4") == 3
    assert take({"id": "3"}, "id", int, "a.json") == 3
    for record in ({}, {"id": "three"}, {"id": None}):
        with pytest.raises(ValueError, match=r"a\.json: record 4.*'id'"):
            take(record, "id", int, "a.json: record 4")
    for record in (None, [], "id", 3):
        with pytest.raises(ValueError, match=r"a\.json: record 4: expected a dict"):
            take(record, "id", int, "a.json: record 4")
    with pytest.raises(ValueError) as caught:
        take({"id": "x" * 5000}, "id", int, "a.json")
    assert len(str(caught.value)) < 200


def test_unpack_gives_the_fields_in_the_order_of_their_names():
    record = {"id": "a", "more": 1, "spans": [2], "score": 3, "crowd": 1, "height": " 30 "}
    kinds = dict(score=float, id=Id, crowd=Flag, ignore=Flag, spans=list | dict, height=Side)
    assert records.unpack(record, WHERE, **kinds) == [3, "a", True, False, [2], 30]
    for field, value in (("id", None), ("spans", "x"), ("score", True), ("crowd", 2)):
        with pytest.raises(ValueError, match=f"annotation 5: '{field}'"):
            records.unpack(record | {field: value}, WHERE, **kinds)
    with pytest.raises(ValueError, match="annotation 5: expected a dict"):
        records.unpack(None, WHERE, ignore=Flag)


def test_a_record_is_named_by_its_id_where_it_has_one():
    for record, name in (({"id": 7}, "image 7"), ({"id": "a"}, "image a"), ({}, "record"),
                         ({"id": [7]}, "record"), (None, "record")):  # fmt: skip
        assert label(record, "id", "image {}", "record") == name


@pytest.mark.parametrize("value", [30, "30", " 30 "])
def test_sizes_may_be_strings(value):
    assert parse(Size, {"height": value, "width": 40}, "x") == (30, 40)


@pytest.mark.parametrize("value", [0, -30, "thirty", "", None, 30.5, True, 1e9, [30], "30.5", "²"])
def test_a_size_that_is_no_number_of_pixels_is_refused(value):
    with pytest.raises(ValueError, match=r"image 7.*'height'"):
        parse(Size, {"height": value, "width": 40}, "image 7")


@pytest.mark.parametrize("value", [0, 1, False, True, 0.0, 1.0])
def test_flags_are_0_or_1(value):
    for written in (value, str(int(value))):
        assert take({"iscrowd": written}, "iscrowd", Flag, "x") is bool(value)
    assert take({}, "iscrowd", Flag, "x") is False
    assert take({"iscrowd": None}, "iscrowd", Flag, "x") is False


@pytest.mark.parametrize(
    ("written", "value"),
    [("12", 12), (" 12 ", 12), (12.0, 12), ("012", "012"), ("a7", "a7"), ("٣", "٣"), (2.5, 2.5)],
)
def test_a_whole_number_is_one_however_it_is_written(written, value):
    assert records.whole(written) == value and type(records.whole(written)) is type(value)


@pytest.mark.parametrize("value", [2, -1, "2", "no", [], 0.5, "1.0"])
def test_a_flag_that_is_neither_is_refused(value):
    with pytest.raises(ValueError, match=r"annotation 5: 'iscrowd' is .*, neither 0 nor 1"):
        take({"iscrowd": value}, "iscrowd", Flag, "annotation 5")


# ---- pickles -------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_refs_that_would_run_code_are_refused(tmp_path):
    path, trace = tmp_path / "refs(unc).p", tmp_path / "ran"
    path.write_bytes(pickle.dumps([{"ref_id": 1, "sentences": Bomb(trace)}]))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: .*import pathlib"):
        read_refs(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # it would have


def test_refs_cut_short_anywhere_are_refused(tmp_path):
    path = tmp_path / "refs.p"
    whole = pickle.dumps([{"ref_id": 1, "split": "train", "sent_ids": [0, 1]}], protocol=2)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"refs\.p"):
            read_refs(path)


@pytest.mark.parametrize(
    "content",
    [b"}K\x01a.", b"\x80\x02]K\x01K\x02s.", pickle.dumps({"ref_id": 1})],
    ids=["append to a dict", "item of a list", "dict"],
)
def test_refs_with_damaged_bytes_are_refused(tmp_path, content):
    (tmp_path / "refs.p").write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\.p"):
        read_refs(tmp_path / "refs.p")


def test_refs_of_protocol_2_and_of_python_2_and_of_json_are_read(tmp_path):
    refs = [{"ref_id": 1, "split": "val", "sentences": [{"sent": "café", "tokens": ["café"]}]}]
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(refs, protocol=2))
    assert read_refs(path) == refs
    path.write_bytes(b"\x80\x02]}U\x04sentU\x05caf\xc3\xa9sa.")  # strings of Python 2
    assert read_refs(path) == [{"sent": "café"}]
    path = tmp_path / "grefs(unc).json"
    path.write_text(json.dumps(refs))
    assert read_refs(path) == refs
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"grefs\(unc\)\.json: holds a dict"):
        read_refs(path)


# ---- labelme and tables --------------------------------------------------------------------------


def test_labelme_of_either_encoding(tmp_path):
    path = tmp_path / "a.json"
    for content in ('{"text": ["café’s"]}'.encode(), b'{"text": ["caf\xe9\x92s"]}'):
        path.write_bytes(content)
        assert read_json(path, last_resort="cp1252") == {"text": ["café’s"]}


def test_tables(tmp_path):
    path = tmp_path / "MME.tsv"
    picture = "A" * 300_000  # longer than what csv allows unless told
    path.write_text(
        f'index\tquestion\timage\n0\t"two\nlines, a ""word""\tand a tab"\t{picture}\n1\tshort\n'
    )
    assert read_tsv(path) == [
        {"index": "0", "question": 'two\nlines, a "word"\tand a tab', "image": picture},
        {"index": "1", "question": "short", "image": ""},
    ]
    path.write_text("index\tquestion\n0\ta\t\n")  # a tab at the end is no cell
    assert read_tsv(path) == [{"index": "0", "question": "a"}]
    for content, message in (
        (b"index\tquestion\n0\t\xff\xfe\n", "is no text"),
        (b"index\tquestion\n0\tIs there a\tcat?\n", "line 2: has more cells than the head"),
        (b'index\n"never closed\n', "line 2: not a row"),
        (b'index\tquestion\n1\ta\n2\t"Stop" sign?\n3\tb\n', "line 3: not a row .*quote"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"MME\.tsv: {message}"):
            read_tsv(path)
    with pytest.raises(ValueError, match=r"absent\.tsv: cannot be read \(No such file"):
        read_tsv(tmp_path / "absent.tsv")


# ---- which file is meant -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lies"),
    [
        ("a.jpg", "a.jpg"),
        ("left\\a.jpg", "left/a.jpg"),
        (".\\left\\a.jpg", "left/a.jpg"),
        ("train2017/a.jpg", "a.jpg"),
        ("train2017\\left\\a.jpg", "left/a.jpg"),
        ("C:\\Users\\me\\train2017\\a.jpg", "a.jpg"),
        ("/home/me/train2017/a.jpg", "a.jpg"),
        ("a.jpg", "a.JPG"),
        ("left/A.PNG", "left/A.png"),
        ("../other/a.jpg", "../other/a.jpg"),
        ("caf\u00e9.jpg", "cafe\u0301.jpg"),
        ("cafe\u0301.JPG", "caf\u00e9.jpg"),
        ("a%20photo.jpg", "a photo.jpg"),
        ("a.jpg", "a.Jpg"),
    ],
)
def test_a_file_is_found_by_the_name_that_an_annotation_has(tmp_path, name, lies):
    folder = tmp_path / "train2017"
    path = folder / lies
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    path.touch()
    assert find_file(folder, name).resolve() == path.resolve()


def test_a_file_of_the_same_name_in_another_folder_is_not_taken(tmp_path):
    """Nothing is guessed: what is absent stays absent, under the name that the annotation has."""
    (tmp_path / "left").mkdir()
    for name in ("a.jpg", "left/a.jpg", "left/b.jpeg"):
        (tmp_path / name).touch()
    for name in ("right/a.jpg", "right\\a.jpg", "b.jpg", "", "a\0b", "x" * 5000):
        path = find_file(tmp_path, name)
        assert path == tmp_path / name and (name == "" or not is_file(path))
    (tmp_path / "A.jpg").touch()
    (tmp_path / "a.JPG").touch()
    assert find_file(tmp_path, "a.jpg") == tmp_path / "a.jpg"  # the exact name first
    assert find_file(tmp_path, "no.jpg", "left\\a.jpg") == tmp_path / "left/a.jpg"


def test_what_a_system_leaves_in_a_folder_is_none_of_its_files(tmp_path):
    for name in ("b.json", "a.JSON", "._a.json", ".DS_Store", "Thumbs.db", "a.jpg"):
        (tmp_path / name).touch()
    assert [path.name for path in list_files(tmp_path, ".json")] == ["a.JSON", "b.json"]
    assert list_files(tmp_path / "absent", ".json") == []


# ---- PNGs of segments and classes ----------------------------------------------------------------


def test_segment_ids_use_all_three_channels(tmp_path):
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 70001, 2**24 - 1]])
    colours = (ids[..., None] >> [0, 8, 16] & 255).astype(np.uint8)
    assert (segment_colours(ids) == colours).all() and segment_colours(ids).dtype == np.uint8
    Image.fromarray(colours).save(tmp_path / "x.png")
    assert (read_segment_ids(tmp_path / "x.png", (2, 4)) == ids).all()
    with pytest.raises(ValueError, match=r"x\.png: is 2x4"):
        read_segment_ids(tmp_path / "x.png", (4, 2))


@pytest.mark.parametrize("mode", ["L", "P"])
def test_class_maps_are_values_not_colours(tmp_path, mode):
    classes = np.array([[0, 1, 132], [255, 7, 0]], np.uint8)
    image = Image.fromarray(classes)
    if mode == "P":
        image.putpalette(rng().integers(0, 255, 768, dtype=np.uint8).tobytes())
    image.save(tmp_path / "x.png")
    assert (read_class_map(tmp_path / "x.png", (2, 3)) == classes).all()
    with pytest.raises(ValueError, match=r"x\.png: is 2x3"):
        read_class_map(tmp_path / "x.png", (3, 2))


def test_a_coloured_class_map_is_refused(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png: its pixels are RGB"):
        read_class_map(tmp_path / "x.png", (20, 30))
