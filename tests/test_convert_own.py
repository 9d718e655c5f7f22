"""`python -m xsam.data convert`: a user's own annotations, to the pixel, as they are opened again.

pytest tests/test_convert_own.py
"""

import base64
import io
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from xsam.datasets import commands
from xsam.datasets.generic import Panoptic
from xsam.datasets.referring import paint_shapes
from xsam.datasets.registry import open_dataset

REAL = Path(__file__).parents[2] / "shared/real"
PHOTOS = REAL / "img_genseg/coco2017/val2017"
SIZE = (40, 60)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photo(path: str, size: tuple[int, int] = SIZE, turn: int = 0, depth: int = 8) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path))
    if depth == 16:
        Image.fromarray(rng.integers(0, 65535, size, dtype=np.uint16)).save(path)
        return
    exif = Image.Exif()
    exif[274] = turn or 1
    Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path, exif=exif)


def box(left: int, top: int, width: int, height: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def png(path: str, pixels: np.ndarray) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def labelme(path: str, *shapes: dict, **fields) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    content = dict(version="5.4.1", flags={}, shapes=list(shapes), imageData=None) | fields
    Path(path).write_text(json.dumps(content))


def shape(label: str, *points, kind: str = "polygon", group: int | None = None, **fields) -> dict:
    return dict(label=label, points=points, group_id=group, shape_type=kind, flags={}) | fields


def run(*arguments: str) -> int:
    return commands.main(["convert", *arguments, "--workers", "1"])


def instances(name: str) -> dict[str, list[tuple[str, np.ndarray]]]:
    """The objects of every image as they are opened, from the folder that the user is in."""
    dataset, found = open_dataset(name, Path("elsewhere")), {}
    for index in range(len(dataset)):
        picture, objects = dataset.read(index)
        assert all(mask.shape == (picture.height, picture.width) for _, mask, _ in objects)
        names = [(dataset.names[category], mask) for category, mask, _ in objects]
        found[dataset.records[index][0].file_name] = names
    return found


def expressions(name: str) -> dict[str, dict[str, np.ndarray | None]]:
    dataset, found = open_dataset(name, Path("elsewhere")), {}
    for index in range(len(dataset)):
        sample = dataset.check(index, np.random.default_rng(0))
        masks = dict(zip(sample.labels.tolist(), sample.masks, strict=True))
        texts = {text: masks.get(number) for number, text in enumerate(sample.names)}
        found.setdefault(sample.image_id, {}).update(texts)
    return found


def same(found: list, expected: list) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(a == c and np.array_equal(b, d) for (a, b), (c, d) in pairs)


def drawn(draw: str, points: list) -> np.ndarray:
    """As labelme draws it."""
    canvas = Image.new("1", SIZE[::-1])
    getattr(ImageDraw.Draw(canvas), draw)([tuple(point) for point in points], fill=1, outline=1)
    return np.asarray(canvas)


# ---- labelme -------------------------------------------------------------------------------------

STAR = [[3.7, 2.2], [30.4, 8.9], [21.5, 31.6], [9.1, 26.3]]
PART = [[40.2, 5.1], [55.9, 7.7], [50.5, 20.4]]


def test_labelme_becomes_instances(capsys):
    for number in range(3):
        photo(f"labelled/{number}.jpg")
    bits = io.BytesIO()
    Image.fromarray(np.eye(5, dtype=np.uint8)).save(bits, "PNG")
    assisted = dict(mask=base64.b64encode(bits.getvalue()).decode())
    labelme(
        "labelled/0.json",
        shape("Dog", *STAR, group=4),
        shape("Dog", *PART, group=4),  # the dog's other half
        shape("cat", *PART, group=4),
        shape("cat", [33, 39], [12, 30], kind="rectangle"),
        shape("cat", [30, 20], [30, 28], kind="circle"),
        shape("cat", [7, 9], [11, 13], kind="mask", **assisted),
        shape("cat", [-2, -2], [2, 2], kind="mask", **assisted),  # begins outside
        shape("dog", [3, 3], kind="point"),
        shape("dog", [90, 70], [100, 70], [90, 79]),
        imagePath="..\\labelled\\0.jpg",
    )
    labelme("labelled/1.json", shape("dog", *STAR), imagePath="1.jpg")
    Path("labelled/notes.json").write_text("[1]")
    assert run("labelled", "--out", "made/mine.json") == 0
    output = capsys.readouterr().out
    found = instances("made/mine.json")
    assert list(found) == ["../labelled/0.jpg", "../labelled/1.jpg"]
    diagonal = np.zeros(SIZE, bool)
    diagonal[range(9, 14), range(7, 12)] = True
    dog, *cats, disc, eye, corner = found["../labelled/0.jpg"]
    assert same([dog], [("dog", drawn("polygon", STAR) | drawn("polygon", PART))])
    rectangle = drawn("rectangle", [[12, 30], [33, 39]])
    assert same(cats, [("cat", drawn("polygon", PART)), ("cat", rectangle)])
    assert disc[1].sum() == pytest.approx(drawn("ellipse", [[22, 12], [38, 28]]).sum(), rel=0.05)
    assert same([eye], [("cat", diagonal)])
    corner_only = np.zeros(SIZE, bool)
    corner_only[range(3), range(3)] = True
    assert same([corner], [("cat", corner_only)])
    assert same(found["../labelled/1.jpg"], [("dog", drawn("polygon", STAR))])
    assert open_dataset("made/mine.json", Path()).names == ["cat", "dog"]
    assert "2 images, 7 objects of 2 classes" in output
    assert "  cat: 5 objects in 1 images\n  dog: 2 objects in 2 images\n" in output
    for reason in (
        "1 images without a JSON file",
        "1 JSON files of something else",
        "1 shapes without an area (point)",
        "1 shapes without a pixel in the image",
    ):
        assert reason in output


def test_names_are_in_the_order_that_is_asked_for(capsys):
    photo("photos/a.jpg")
    labelme("labelled/a.json", shape("cat", *STAR), shape("dog", *PART), imagePath="a.jpg")
    flags = ["labelled", "--images", "photos", "--out", "mine.json"]
    assert run(*flags, "--names", "horse,dog,Cat") == 0
    assert "datasets mine.json:photos --show" in capsys.readouterr().out
    assert open_dataset("mine.json:photos", Path()).names == ["horse", "dog", "cat"]
    assert [name for name, _ in instances("mine.json:photos")["a.jpg"]] == ["cat", "dog"]
    assert run(*flags) == 2 and "mine.json exists already" in capsys.readouterr().err
    assert run(*flags[:-1], "other.json", "--names", "dog") == 2
    assert "a.json: class 'cat' is not in --names" in capsys.readouterr().err
    assert not list(Path().glob("other*"))


def test_labels_as_expressions():
    photo("labelled/a.jpg")
    labelme("labelled/a.json", shape("A T-shirt", *STAR), shape("A T-shirt", *PART))
    assert run("labelled", "--out", "mine.json", "--refer") == 0
    union = drawn("polygon", STAR) | drawn("polygon", PART)
    assert same(expressions("mine.json")["labelled/a.jpg"].items(), [("A T-shirt", union)])


@pytest.mark.parametrize("size", [(60, 40), (40, 60)], ids=["upright", "as stored"])
def test_a_turned_photo_keeps_the_side_that_its_annotation_was_drawn_on(size):
    photo("photos/a.jpg", turn=6)  # 60 high where it is shown
    fields = dict(imageHeight=size[0], imageWidth=size[1], imagePath="a.jpg")
    labelme("labelled/a.json", shape("cat", [2, 3], [9, 30], kind="rectangle"), **fields)
    png("masks/cat/a.png", box(2, 3, 8, 28, size))
    for source in ("labelled", "masks"):
        assert run(source, "--images", "photos", "--out", f"{source}.json") == 0
        found = instances(f"{source}.json:photos")["a.jpg"]
        assert same(found, [("cat", box(2, 3, 8, 28, size))])


# ---- masks ---------------------------------------------------------------------------------------


def segments(name: str, stem: str) -> tuple[list[tuple[str, np.ndarray]], np.ndarray]:
    dataset = open_dataset(name, Path("elsewhere"))
    files = [Path(dataset.records[index][0].file_name).stem for index in range(len(dataset))]
    _, numbers, infos = Panoptic.read(dataset, files.index(stem))
    masks = [(dataset.names[s["class"]], numbers == i) for i, s in enumerate(infos, 1)]
    return masks, numbers == 0


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, "palette"])
def test_class_maps_become_panoptic(capsys, kind):
    photo("photos/a.jpg", turn=1)
    photo("photos/b.png", depth=16)
    photo("photos/c.jpg")
    levels = np.zeros(SIZE, np.uint8 if kind == "palette" else kind)
    levels[5:20, 5:50], levels[20:30], levels[:4] = 1, 7, 255
    if kind == "palette":
        Path("maps").mkdir()
        picture = Image.fromarray(levels).convert("P")
        picture.putdata(levels.ravel().tolist())
        picture.save("maps/a.png")
    else:
        png("maps/a.png", levels)
    png("maps/b.png", box(0, 0, 9, 9).astype(np.uint8))
    png("maps/gone.png", box(0, 0, 9, 9).astype(np.uint8))
    flags = ["maps", "--images", "photos"]
    assert run(*flags, "--names", "road,7=Tree-top,bush", "--out", "mine.json") == 0
    output = capsys.readouterr().out
    found, void = segments("mine.json:photos:mine_panoptic", "a")
    assert same(found, [("road", levels == 1), ("tree top", levels == 7)])
    assert np.array_equal(void, (levels == 0) | (levels == 255))
    assert same(segments("mine.json:photos:mine_panoptic", "b")[0], [("road", box(0, 0, 9, 9))])
    content = json.loads(Path("mine.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["road", "tree top", "bush"]
    assert {c["isthing"] for c in content["categories"]} == {0}
    assert "1 masks without an image of their stem, 1 images without a mask" in output
    assert "without an object: bush" in output
    names = "0=background,road,7=tree"
    assert run(*flags, "--names", names, "--out", "other.json") == 0
    found, void = segments("other.json:photos:other_panoptic", "a")
    assert same(found[:1], [("background", levels == 0)]) and np.array_equal(void, levels == 255)
    assert run(*flags, "--names", "road,7=", "--out", "less.json", "--refer") == 0
    assert same(expressions("less.json:photos")["a.jpg"].items(), [("road", levels == 1)])
    assert run(*flags, "--names", "road,tree", "--out", "bad.json") == 2
    assert "a.png: value 7 has no name" in capsys.readouterr().err
    assert not list(Path().glob("bad*"))


def test_folders_of_classes_become_instances(capsys):
    for name in ("a.jpg", "a_1.jpg", "b.jpg", "c.jpg"):
        photo(f"photos/{name}")
    masks = {
        "cat/a_1": box(1, 1, 9, 9),  # of the photo a_1
        "cat/a_2": box(20, 1, 9, 9),  # the second one of a
        "cat/a": box(22, 4, 9, 9),
        "dog/a": box(40, 10, 9, 9),
        "dog/b": box(0, 0, 0, 0),
        "dog/d_7": box(3, 3, 5, 5),
    }
    for name, mask in masks.items():
        png(f"masks/{name}.png", mask)
    png("masks/dog/b_1.png", (box(3, 3, 5, 5) * 255).astype(np.uint8))
    assert run("masks", "--images", "photos", "--out", "mine.json") == 0
    output = capsys.readouterr().out
    found = instances("mine.json:photos")
    expected = [("cat", "cat/a"), ("cat", "cat/a_2"), ("dog", "dog/a")]
    assert same(found["a.jpg"], [(name, masks[path]) for name, path in expected])
    assert same(found["a_1.jpg"], [("cat", masks["cat/a_1"])])
    assert same(found["b.jpg"], [("dog", box(3, 3, 5, 5))]) and len(found) == 3
    assert "1 masks without an image of their stem, 1 images without a mask, 1 masks that" in output
    Path("masks/dog/b_1.png").unlink()
    assert run("masks", "--images", "photos", "--out", "words.json", "--refer") == 0
    assert expressions("words.json:photos")["b.jpg"] == {"dog": None}


# ---- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", ["\t", ";", ","])
def test_a_table_becomes_expressions(capsys, delimiter):
    photo("set/a.jpg")
    photo("set/b.png", size=(30, 30), depth=16)
    left, right = box(1, 1, 9, 9), box(30, 1, 9, 9)
    png("set/masks/l.png", left)
    png("set/masks/r.png", right)
    rows = [
        ("Image", "mask", " text"),
        ("a.jpg", "masks/l.png", '"the cat, left"'),
        ("b.png", "", "a dog"),
        ("a.jpg", "masks/r.png", "both"),
        ("a.jpg", "masks/l.png", "both"),
    ]
    table = "set/table.tsv" if delimiter == "\t" else "set/table.csv"
    Path(table).write_text("\n".join(map(delimiter.join, rows)) + "\n", encoding="utf-8-sig")
    assert run(table, "--out", "set/mine.json") == 0
    assert "2 images, 3 expressions, 1 that nothing fits" in capsys.readouterr().out
    found = expressions("set/mine.json")
    assert same(found["a.jpg"].items(), [("the cat, left", left), ("both", left | right)])
    assert found["b.png"] == {"a dog": None}


# ---- what is printed, and what is wrong ----------------------------------------------------------


@pytest.mark.parametrize("source", ["labelled", "maps", "masks", "table.csv"])
def test_the_next_command_works_as_printed(capsys, source):
    photo("my photos/a.jpg")
    labelme("labelled/a.json", shape("cat", *STAR))
    png("maps/a.png", box(2, 2, 9, 9).astype(np.uint8))
    png("masks/cat/a.png", box(2, 2, 9, 9))
    Path("table.csv").write_text("image,mask,text\na.jpg,masks/cat/a.png,cat\n")
    names = ["--names", "cat"] * (source == "maps")
    assert run(source, "--images", "my photos", *names, "--out", "out/mine.json") == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("next: "))
    command = shlex.split(line.removeprefix("next: "))
    assert command[:4] == ["python", "-m", "xsam.data", "check"]
    assert commands.main([*command[3:], "--workers", "1"]) == 0
    output = capsys.readouterr().out
    task = "refer" if source == "table.csv" else "generic"
    assert output.splitlines()[1].split()[-5:] == [task, "optional", "ok", "1", "1"]
    about = "1 expressions" if task == "refer" else "1 objects of 1 classes\n  cat: 1 objects in 1"
    assert about in output and len(list(Path("runs/check").glob("*.png"))) == 1


TWO = box(1, 1, 9, 9) * 1 + box(20, 1, 9, 9) * 2
WRONG = {
    "another size": (
        lambda: png("masks/cat/a.png", box(1, 1, 9, 9, (41, 60))),
        r"a\.jpg: is 40x60",
    ),
    "two objects": (lambda: png("masks/cat/a.png", TWO.astype(np.uint8)), r"a\.png: has \[1, 2\]"),
    "a JPEG": (lambda: photo("masks/cat/a.jpg"), r"a\.jpg: is a JPEG file, masks have to be PNG"),
    "colours": (lambda: photo("masks/a.png"), r"a\.png: its pixels are RGB"),
    "both": (lambda: [photo("masks/a.png"), png("masks/cat/a.png", TWO > 0)], "both masks and"),
    "nothing": (lambda: Path("masks").mkdir(), "no labelme file"),
    "no image": (lambda: png("masks/cat/b.png", TWO > 0), "no object in it .1 masks without"),
    "stems": (lambda: [png("masks/cat/a.png", TWO > 0), photo("photos/a.png")], "the same stem"),
    "label": (lambda: labelme("masks/a.json", shape("<p>", *STAR)), r"a\.json.*contains <p>"),
    "line": (lambda: labelme("masks/a.json", shape("a", *STAR, kind="spline")), "shape 0: is a sp"),
    "gone": (lambda: labelme("masks/b.json", imagePath="b.jpg"), r"b\.json: 'b\.jpg' is not in"),
    "twice": (
        lambda: [labelme(f"masks/{name}.json", imagePath="a.jpg") for name in "ab"],
        r"b\.json: its image .*photos.a\.jpg is that of masks.a\.json as well",
    ),
    "size": (lambda: labelme("masks/a.json", imageHeight=9, imageWidth=9), r"a\.json: .*not 9x9"),
    "base64": (
        lambda: labelme("masks/a.json", shape("a", [1, 1], [2, 2], kind="mask", mask="=x")),
        r"a\.json: shape 0: its mask is no PNG",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_and_leaves_nothing(capsys, case):
    make, message = WRONG[case]
    photo("photos/a.jpg")
    make()
    assert run("masks", "--images", "photos", "--out", "mine.json") == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(capsys.readouterr().err)
    assert not list(Path().glob("mine*"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("image,text\na.jpg,cat\n", "row 2: has no 'mask'"),
        ("image,mask,text\na.jpg,,cat\na.jpg,,\n", "row 3: text: is empty"),
        ("image,mask,text\nb.jpg,,cat\n", r"row 2: 'b\.jpg' is not in photos"),
        ("image,mask,text\na.jpg,m.png,cat\n", r"row 2: its mask: 'm\.png' is not in \."),
    ],
)
def test_what_is_wrong_in_a_table_is_told_with_its_row(capsys, rows, message):
    photo("photos/a.jpg")
    Path("table.csv").write_text(rows)
    assert run("table.csv", "--images", "photos", "--out", "mine.json") == 2
    with pytest.raises(ValueError, match=rf"table\.csv: {message}"):
        raise ValueError(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "mine.txt"], "name a .json file"),
        (["--out", "a,b.json"], "name a .json file"),
        (["--out", "mine.json", "--images", "gone"], "gone: is no folder"),
        (["--out", "mine.json", "--refer", "--names", "a"], "leave it out"),
        (["--out", "mine.json", "--names", "a,x=b"], "'x=b' is not VALUE=NAME"),
        (["--out", "mine.json", "--names", "a,1=b"], "'1=b' is the second"),
    ],
)
def test_flags_that_cannot_be_meant(capsys, flags, message):
    photo("labelled/a.jpg")
    labelme("labelled/a.json", shape("cat", *STAR))
    assert run("labelled", *flags) == 2
    assert message in capsys.readouterr().err


def test_many_classes_are_cut_in_the_report(capsys):
    levels = np.arange(1, 25, dtype=np.uint8).repeat(100).reshape(SIZE)
    photo("photos/a.jpg")
    png("maps/a.png", levels)
    names = ",".join(f"class {number}" for number in range(1, 31))
    assert run("maps", "--images", "photos", "--names", names, "--out", "mine.json") == 0
    output = capsys.readouterr().out
    assert output.count("1 objects in 1 images") == 20 and "… and 4 more\n" in output
    assert "without an object: class 25, class 26," in output and "void" not in output


# ---- real annotations ----------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.exists(), reason="no real photographs beside the tree")
def test_reasonseg_is_what_its_own_reader_gives():
    Path("labelled").mkdir()
    for path in (REAL / "img_reaseg/lisa/val").glob("*.json"):
        shutil.copy(path, "labelled")
        shutil.copy(PHOTOS / f"{path.stem.split('_')[0]}.jpg", f"labelled/{path.stem}.jpg")
    assert run("labelled", "--out", "mine.json", "--refer") == 0
    found = {Path(name).stem: texts for name, texts in expressions("mine.json").items()}
    dataset, num_compared = open_dataset("reasonseg_val", REAL), 0
    for index in range(len(dataset)):
        path, _, size, *_, shapes = dataset.records[index]
        if not any(is_ignored for is_ignored, _ in shapes):  # which covers
            mask = found[path.stem]["target"]
            assert np.array_equal(mask, paint_shapes(shapes, size or mask.shape, "") == 1)
            num_compared += 1
    assert num_compared > 10


@pytest.mark.skipif(not REAL.exists(), reason="no real photographs beside the tree")
def test_coco_semantic_maps_come_back():
    maps, photos = REAL / "img_genseg/coco2017/panoptic_semseg_val2017", PHOTOS
    before = open_dataset("coco_semantic_val", REAL)
    Path("names.txt").write_text("\n".join(f"{i}={name}" for i, name in enumerate(before.names)))
    assert (
        run(str(maps), "--images", str(photos), "--names", "names.txt", "--out", "mine.json") == 0
    )
    for index in range(0, len(before), 5):
        image, *_ = before.records[index]
        _, classes = before.read(index)
        found, void = segments(f"mine.json:{photos}:mine_panoptic", Path(image.file_name).stem)
        present = np.unique(classes[classes != 255])
        assert same(found, [(before.names[number], classes == number) for number in present])
        assert np.array_equal(void, classes == 255)
