"""The command that draws one prediction, from a checkpoint on disk.

pytest tests/test_predict.py
"""

import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from families import word_tokenizer
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from xsam import predict as predict_command
from xsam.checkpoints import save_checkpoint
from xsam.datasets.registry import open_dataset
from xsam.llm import add_special_tokens
from xsam.predict import main
from xsam.weights import MODEL_FILE

SIZE = 90, 60  # width and height of the picture


@pytest.fixture
def checkpoint(speaking_model, tmp_path) -> Path:
    model = speaking_model
    return save_checkpoint(tmp_path, model, model.config, model.tokenizer, 3, 5, {})


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "drawing.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (*SIZE[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("request_", "labels"),
    [
        (["refer", "the red circle"], {"the red circle"}),
        (["panoptic", "--things", "ring, star", "--stuff", "dots"], {"ring", "star", "dots"}),
        (["panoptic"], None),
    ],
    ids=["refer", "panoptic of names", "panoptic"],
)
def test_a_picture_and_its_masks_are_written(checkpoint, image, capsys, request_, labels):
    assert run(*request_, "--checkpoint", checkpoint, "--image", image) == 0
    stem = f"drawing_{request_[0]}"
    drawn = Image.open(image.with_name(f"{stem}.png"))
    assert drawn.width >= SIZE[0] and drawn.height >= SIZE[1]
    document = json.loads(image.with_name(f"{stem}.json").read_text())
    assert document["answer"] == "<SEG>" and document["segments"]
    for segment in document["segments"]:
        mask = coco_mask.decode(segment["segmentation"])
        assert mask.shape == SIZE[::-1] and mask.sum() == segment["area"]
        assert labels is None or segment["label"] in labels
    printed = capsys.readouterr().out
    assert printed.startswith("<SEG>\n") and f"{stem}.json" in printed


@pytest.mark.parametrize("task", ["refer", "reason"])
def test_a_phrase_below_presence_has_no_mask(checkpoint, image, tmp_path, capsys, task):
    arguments = [task, "the red circle", "--checkpoint", checkpoint, "--image", image]
    for presence, count in ((0, 1), (1, 0)):
        assert run(*arguments, "--presence", presence, "--out", tmp_path / "out") == 0
        assert len(json.loads((tmp_path / "out.json").read_text())["segments"]) == count
        assert ("1 mask:" if count else "0 masks:") in capsys.readouterr().out


def test_words_that_the_tokenizer_lacks_are_named_and_the_rest_is_asked(
    speaking_model, image, tmp_path
):
    model, tokenizer = speaking_model, word_tokenizer()
    add_special_tokens(tokenizer)
    checkpoint = save_checkpoint(tmp_path, model, model.config, tokenizer, 3, 5, {})
    common = ["--checkpoint", checkpoint, "--image", image]
    for request in (["refer", "the red helmet"], ["semantic", "--things", "ring,helmet"]):
        with pytest.warns(UserWarning, match="lacks 'helmet': the model"):
            assert run(*request, *common) == 0


def test_the_segmentor_predicts_too(segmentor, image, tmp_path, capsys):
    folder = save_checkpoint(tmp_path, segmentor, segmentor.config, None, 1, 5, {})
    out = tmp_path / "named.by.hand"
    arguments = ["--checkpoint", folder, "--image", image, "--out", out]
    assert run("panoptic", *arguments) == 0
    assert Image.open(f"{out}.png").width and json.loads(Path(f"{out}.json").read_text())
    assert run("refer", "the ring", *arguments) == 2
    assert "stage-1 checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "stem"),
    [
        ("new/folder/answer", "new/folder/answer"),
        ("there", "there/drawing_panoptic"),
        ("there/answer.png", "there/answer"),
        ("answer.json", "answer"),
    ],
)
def test_out_is_a_path_in_any_folder(segmentor, image, tmp_path, out, stem):
    folder = save_checkpoint(tmp_path, segmentor, segmentor.config, None, 1, 5, {})
    (tmp_path / "there").mkdir()
    arguments = ["--checkpoint", folder, "--image", image, "--out", tmp_path / out]
    for _ in range(2):  # what is there already is replaced
        assert run("panoptic", *arguments) == 0
    assert Image.open(tmp_path / f"{stem}.png").width
    assert json.loads((tmp_path / f"{stem}.json").read_text())


@pytest.mark.parametrize(
    ("request_", "out", "read"),
    [
        (["panoptic"], "sub/../drawing", "drawing.png"),
        (["panoptic", "--things", "names.json"], "names", "names.json"),
        (["vgd", "--region", "mark.png"], "mark", "mark.png"),
        (["gcg"], "labelme.json", "labelme.json"),
        (["gcg"], "list", "list.json"),
    ],
)
def test_nothing_that_is_read_or_of_another_program_is_written_over(
    checkpoint, image, tmp_path, monkeypatch, capsys, request_, out, read
):
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    image = image.rename("drawing.png")
    Image.new("L", Image.open(image).size, 255).save("mark.png")
    Path("names.json").write_text('["ring"]')
    Path("labelme.json").write_text('{"shapes": []}')
    Path("list.json").write_text('{"answer": 1}')
    before = Path(read).read_bytes()
    arguments = ["--checkpoint", checkpoint, "--image", image, "--out", out]
    for _ in range(2):  # what it wrote itself it writes again
        assert run(*request_, *arguments) == 0
    assert Path(read).read_bytes() == before
    stem = out.removesuffix(".json")
    written = capsys.readouterr().out.split()[-2:]
    assert written == [f"{stem}_{request_[0]}.png", f"{stem}_{request_[0]}.json"]
    taken = Path(f"{stem}_{request_[0]}.json")
    taken.write_text("{}")
    assert run(*request_, *arguments) == 2 and taken.read_text() == "{}"


def test_chat_writes_what_it_is_told_to(checkpoint, image, tmp_path, capsys):
    arguments = ["--checkpoint", checkpoint, "--image", image]
    assert run("chat", "what is it?", *arguments) == 0
    assert sorted(image.parent.glob(f"{image.stem}*")) == [image]
    assert run("chat", "what is it?", *arguments, "--out", tmp_path / "said") == 0
    answer = json.loads((tmp_path / "said.json").read_text())["answer"]
    assert answer and answer in capsys.readouterr().out


@pytest.mark.parametrize("out", ["drawing.jpg/answer", "taken"])
def test_an_out_that_cannot_be_is_told_before_the_model_is_read(image, tmp_path, capsys, out):
    (tmp_path / "taken.png").mkdir()
    arguments = ["--checkpoint", tmp_path / "absent", "--image", image, "--out", tmp_path / out]
    assert run("panoptic", *arguments) == 2
    assert str(tmp_path / out) in capsys.readouterr().err


def photo(image: Image.Image, path: Path) -> Path:
    """Stored turned by a quarter, with the tag that says so."""
    tag = Image.Exif()
    tag[274] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=tag)
    return path


def test_a_photo_is_segmented_upright_unless_its_region_is_of_the_stored_pixels(
    checkpoint, image, tmp_path, capsys
):
    path = photo(Image.open(image), tmp_path / "photo.png")
    region = np.zeros(SIZE[::-1], np.uint8)
    region[20:40, 30:60] = 1
    Image.fromarray(region).save(tmp_path / "upright.png")
    Image.fromarray(np.rot90(region).copy() * 255).save(tmp_path / "stored.png")
    sizes = {}
    for name in ("upright", "stored"):
        arguments = [
            "--image",
            path,
            "--region",
            tmp_path / f"{name}.png",
            "--out",
            tmp_path / f"{name}_out",
        ]
        assert run("vgd", "--checkpoint", checkpoint, *arguments) == 0
        segments = json.loads((tmp_path / f"{name}_out.json").read_text())["segments"]
        sizes[name] = {tuple(segment["segmentation"]["size"]) for segment in segments}
    assert sizes == {"upright": {SIZE[::-1]}, "stored": {SIZE}}
    Image.new("L", (5, 5), 1).save(tmp_path / "small.png")
    arguments = ["--image", path, "--region", tmp_path / "small.png"]
    assert run("vgd", "--checkpoint", checkpoint, *arguments) == 2
    expected = "photo.png: is 60x90 (height x width) upright, 90x60 as stored, not "
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (["panoptic", "person,dog"], "task panoptic takes no text, but things or stuff"),
        (["gcg", "what is it?"], "task gcg takes no text, but the image alone"),
        (
            ["refer", "the ring", "--things", "ring"],
            "task refer takes no things or stuff, but text",
        ),
        (["refer", "the <SEG>"], "contains <SEG>"),
        (["refer", "  "], "is empty"),
        (["semantic", "--things", "ring,star,ring"], "'ring' is named twice"),
        (["panoptic", "--stuff", ""], "no names in it"),
        (["interactive"], "needs regions"),
        (
            ["vgd", "--region", "{small}"],
            "drawing.png: is 60x90 (height x width), not 7x9 as",
        ),
        (["refer", "the ring", "--checkpoint", "{stage1}"], "a stage-1 checkpoint has no language"),
        (["gcg", "--panoptic-rule", "published"], "--panoptic-rule is for task panoptic"),
        (["gcg", "--presence", "0.5"], "--presence is for tasks refer and reason"),
        (["refer", "x", "--presence", "0", "--threshold", "1"], "say the same here"),
        (["gcg", "--out", "x" * 300], "File name too long"),
        (["gcg", "--device", "cpu", "--device", "cpu"], "--device is given more than once"),
    ],
)
def test_a_request_is_checked_before_a_model_is_loaded(
    segmentor, checkpoint, image, tmp_path, monkeypatch, capsys, request_, message
):
    monkeypatch.setattr(predict_command, "load_with_flags", None)
    Image.new("L", (9, 7), 255).save(tmp_path / "small.png")
    save_checkpoint(tmp_path / "stage1", segmentor, segmentor.config, None, 1, 5, {})
    image = image.rename(tmp_path / "drawing.png")
    names = {"small": "small.png", "stage1": "stage1"}
    words = {word: tmp_path / name for word, name in names.items()}
    task, *others = (each.format(**words) for each in request_)
    if "--checkpoint" not in others:
        others += ["--checkpoint", checkpoint]
    try:
        assert run(task, "--image", image, *others) == 2
    except SystemExit as error:
        assert error.code == 2
    error = capsys.readouterr().err
    assert message in error and "annotation" not in error and error.count("\n") == 1


def test_a_wrong_flag_is_told_in_a_line(capsys):
    with pytest.raises(SystemExit):
        run("refr", "--checkpoint", "x", "--image", "y", "the ring")
    error = capsys.readouterr().err
    assert "invalid choice: 'refr'" in error and error.count("\n") == 1 and "--help" in error


def test_names_are_split_from_python_as_on_the_command_line(speaking_model, image, tmp_path):
    picture = Image.open(image)
    expected = speaking_model.predict(picture, "semantic", things=["ring", "red star"])
    (tmp_path / "names.txt").write_text("ring\nred star\n")
    for things in ("ring, red star", str(tmp_path / "names.txt")):
        found = speaking_model.predict(picture, "semantic", things=things)
        assert found.labels == expected.labels and np.array_equal(found.masks, expected.masks)
    assert set(expected.labels) <= {"ring", "red star"} and expected.labels


def test_chat_writes_nothing(checkpoint, image):
    assert run("chat", "What is it?", "--checkpoint", checkpoint, "--image", image) == 0
    assert list(image.parent.glob("drawing_*")) == []


def test_device_and_dtype_are_the_users(checkpoint, image, monkeypatch, capsys):
    loaded = []
    load = predict_command.load_with_flags
    spy = lambda *where, **how: loaded.append(load(*where, **how)) or loaded[-1]  # noqa: E731
    monkeypatch.setattr(predict_command, "load_with_flags", spy)
    arguments = ["refer", "the ring", "--checkpoint", checkpoint, "--image", image]
    for dtype in ("float32", "bfloat16"):
        assert run(*arguments, "--device", "cpu", "--dtype", dtype) == 0
        model, _ = loaded.pop()
        assert {each.dtype for each in model.parameters()} == {getattr(torch, dtype)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run(*arguments, "--device", "cuda") == 2
    assert "--device cuda: process 0 has no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["image", "checkpoint", "text", "weights"])
def test_errors_leave_with_2_and_name_the_path(checkpoint, image, tmp_path, capsys, missing):
    text, expected = "the ring", "text"
    if missing == "image":
        image = tmp_path / "absent.jpg"
        expected = str(image)
    elif missing == "checkpoint":
        checkpoint = tmp_path / "empty"
        checkpoint.mkdir()
        expected = f"{checkpoint}: no weights"
    elif missing == "text":
        text = ""
    else:
        path = checkpoint / MODEL_FILE
        path.write_bytes(path.read_bytes()[:-5])
        expected = str(path)
    assert run("refer", text, "--checkpoint", checkpoint, "--image", image) == 2
    written = capsys.readouterr()
    assert expected in written.err and not written.out
    assert list(tmp_path.glob("*.json")) == []


# ---- several pictures ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures, and a file that is none."""
    (tmp_path / "photos").mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (*SIZE[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"photos/{number}.png")
    (tmp_path / "photos/3.png").write_bytes(b"no picture")
    (tmp_path / "photos/notes.txt").write_text("no picture either")
    return tmp_path / "photos"


def test_a_folder_is_asked_and_a_bad_picture_is_told(checkpoint, folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["refer", "the ring", "--checkpoint", checkpoint, "--out", out]
    assert run(*arguments, "--image", folder) == 1
    error = capsys.readouterr().err
    assert error.count("3.png: cannot be read as an image") == 1 and "notes" not in error
    names = [f"{number}_refer.{kind}" for number in range(3) for kind in ("json", "png")]
    assert sorted(path.name for path in out.iterdir()) == [*names, "coco.json"]
    coco = COCO(out / "coco.json")
    assert [each["file_name"] for each in coco.imgs.values()] == [
        (folder / f"{number}.png").as_posix() for number in range(3)
    ]
    for number, annotation in enumerate(coco.anns.values()):
        there = json.loads((out / f"{number}_refer.json").read_text())["segments"][0]
        expected = coco_mask.decode(there["segmentation"])
        assert (coco.annToMask(annotation) == expected).all() and expected.any()


def test_an_interrupted_folder_goes_on(checkpoint, folder, tmp_path, monkeypatch, capsys):
    asked, ask = [], predict_command.predict

    def count(*arguments, **options):
        asked.append(1)
        return ask(*arguments, **options)

    monkeypatch.setattr(predict_command, "predict", count)
    (folder / "3.png").unlink()
    arguments = ["--checkpoint", checkpoint, "--out", tmp_path / "out"]
    assert run("refer", "the ring", *arguments, "--image", folder / "0.png", "--image", folder) == 0
    whole = (tmp_path / "out/coco.json").read_bytes()
    assert len(asked) == 3
    (tmp_path / "out/1_refer.json").write_text('{"answer": ')  # cut off
    (tmp_path / "out/2_refer.json").unlink()
    for expected in (2, 0):
        asked.clear()
        assert run("refer", "the ring", *arguments, "--image", f"{folder}/*.png") == 0
        assert len(asked) == expected and (tmp_path / "out/coco.json").read_bytes() == whole
    asked.clear()
    assert "3 of 3 pictures are there already" in capsys.readouterr().err
    assert run("refer", "the star", *arguments, "--image", folder) == 0 and len(asked) == 3
    assert "there already" not in capsys.readouterr().err


def test_a_folder_s_pictures_and_other_programs_files_are_left_alone(
    checkpoint, folder, tmp_path, capsys
):
    arguments = ["gcg", "--checkpoint", checkpoint, "--image", folder, "--out"]
    before = sorted(folder.iterdir())
    assert run(*arguments, folder) == 2 and sorted(folder.iterdir()) == before
    assert "holds pictures that are asked about" in capsys.readouterr().err
    for name in ("coco.json", "1_gcg.json"):
        out = tmp_path / name.removesuffix(".json")
        out.mkdir()
        (out / name).write_text('{"shapes": []}')
        assert run(*arguments, out) == 2
        assert f"{out / name}: is " in capsys.readouterr().err
        assert (out / name).read_text() == '{"shapes": []}'


def test_pictures_of_one_name_do_not_meet(checkpoint, folder, tmp_path):
    (folder / "3.png").unlink()
    Image.open(folder / "0.png").save(folder / "0.tif")
    out = tmp_path / "out"
    assert run("gcg", "--checkpoint", checkpoint, "--image", folder, "--out", out) == 0
    found = {path.name for path in out.glob("*.png")}
    assert found == {"0_1_gcg.png", "0_2_gcg.png", "1_gcg.png", "2_gcg.png"}


def test_masks_are_written_as_pngs(checkpoint, image, tmp_path):
    arguments = ["--checkpoint", checkpoint, "--image", image, "--out", tmp_path / "out"]
    assert run("semantic", "--stuff", "dots,the sky/night", "--masks", *arguments) == 0
    segments = json.loads((tmp_path / "out.json").read_text())["segments"]
    paths = sorted((tmp_path / "out_masks").iterdir())
    assert len(paths) == len(segments) and paths[-1].name.endswith(("_dots.png", "_night.png"))
    for path, segment in zip(paths, segments, strict=True):
        mask = np.asarray(Image.open(path))
        assert (mask == 255 * coco_mask.decode(segment["segmentation"])).all()


def test_json_is_all_that_is_printed(checkpoint, folder, tmp_path, capsys):
    arguments = ["--checkpoint", checkpoint, "--image", folder, "--out", tmp_path / "out"]
    assert run("vgd", "--point", "20,30", "--json", *arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [Path(json.loads(line)["image"]["file_name"]).name for line in lines] == [
        "0.png",
        "1.png",
        "2.png",
    ]


@pytest.mark.parametrize("flags", [[], ["--polygons"]])
def test_what_was_found_can_be_trained_on(checkpoint, image, tmp_path, monkeypatch, flags):
    """A file of ours is read as own data: the same masks, names and pictures."""
    monkeypatch.chdir(tmp_path)
    coco = tmp_path / "mine.json"
    request = ["instance", "--names", "ring,star", "--threshold", "0", "--coco", coco, *flags]
    assert run(*request, "--checkpoint", checkpoint, "--image", image.name) == 0
    segments = json.loads(Path("drawing_instance.json").read_text())["segments"]
    dataset = open_dataset(str(coco), tmp_path)
    assert dataset.names == ["ring", "star"] and len(dataset) == 1
    _, objects = dataset.read(0)
    assert len(objects) == len(segments) > 1
    for (category, mask, is_crowd), segment in zip(objects, segments, strict=True):
        assert dataset.names[category] == segment["label"] and not is_crowd
        assert (mask == coco_mask.decode(segment["segmentation"])).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["interactive", "--point", "a,b"], "argument --point: 'a,b': numbers with commas between"),
        (["interactive", "--box", "1,2,3"], "argument --box: '1,2,3'"),
        (["interactive", "--lasso", "1,2,3,4"], "a lasso has at least 3 points, not 2"),
        (["interactive", "--point", "500,4"], "the point at (500, 4) is outside the 90x60 picture"),
        (["gcg", "--point", "5,4"], "task gcg takes no regions, but the image alone"),
        (["gcg", "--threshold", "0.5"], "task gcg has no threshold"),
        (["refer", "x", "--threshold", "7"], "7 is not from 0 to 1"),
        (["gcg", "--image", "{folder}/*.tif"], "*.tif: no picture there"),
        (["gcg", "--image", "{folder}/absent"], "absent: cannot be read as an image"),
    ],
)
def test_a_wrong_request_is_told_before_a_model_is_loaded(
    checkpoint, folder, image, monkeypatch, capsys, flags, message
):
    monkeypatch.setattr(predict_command, "load_with_flags", None)
    flags = [flag.format(folder=folder) for flag in flags]
    flags += [] if "--image" in flags else ["--image", image]
    try:
        assert run(*flags, "--checkpoint", checkpoint) == 2
    except SystemExit as error:
        assert error.code == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_is_told(checkpoint, folder, tmp_path, monkeypatch, capsys):
    def fail(path: Path, content: str | bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(predict_command, "write_whole", fail)
    arguments = ["--checkpoint", checkpoint, "--out", tmp_path / "out", "--image", folder]
    assert run("gcg", *arguments) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_the_gradio_app_of_the_docs_shows_what_is_predicted(checkpoint, image, monkeypatch):
    shown = {}

    class Interface:
        def __init__(self, function, inputs: list, outputs):
            shown.update(function=function, inputs=inputs, outputs=outputs)

        def launch(self):
            shown["is_launched"] = True

    parts = {name: lambda name=name, **_: name for name in ("Image", "AnnotatedImage")}
    gradio = types.SimpleNamespace(Interface=Interface, **parts)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setattr(sys, "argv", ["gradio_app.py", str(checkpoint)])
    runpy.run_path(str(Path(__file__).parent.parent / "docs" / "gradio_app.py"))
    assert shown["is_launched"] and len(shown["inputs"]) == 2
    picture, regions = shown["function"](Image.open(image), "the ring")
    assert picture.size == SIZE and [label for _, label in regions] == ["the ring"]
    assert all(mask.shape == SIZE[::-1] and mask.max() <= 1 for mask, _ in regions)
