"""`python -m xsam.data check` on a small data root made by hand.

pytest tests/test_check.py
"""

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from families import word_tokenizer
from PIL import Image

from xsam.data import Sample
from xsam.datasets import check, commands
from xsam.datasets.sources import SOURCES
from xsam.report import pictures as draw
from xsam.report.samples import draw_sample

ROOT_SETS = "coco_instance,refcoco_val,reasonseg_val,llava_instruct"
LLAVA = "img_chat/llava/LLaVA-Instruct-150K/llava_v1_5_mix665k.json"


def ring(left: int, top: int, side: int) -> list[int]:
    right, bottom = left + side, top + side
    return [left, top, right, top, right, bottom, left, bottom]


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_image(path: Path, size: tuple[int, int] = (24, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def coco(num_images: int) -> dict:
    """Images of one object each, whose second ring is bad, and at the end one without objects."""
    images = [
        dict(id=number, file_name=f"{number}.jpg", height=24, width=32)
        for number in range(num_images + 1)
    ]
    annotations = [
        dict(id=10 + number, image_id=number, category_id=1, iscrowd=0)
        | dict(segmentation=[ring(4, 5, 9), [1, 2, 3, 4]])
        for number in range(num_images)
    ]
    return dict(images=images, annotations=annotations, categories=[dict(id=1, name="dog")])


def write_chat(root: Path, num_bad: int = 0) -> None:
    """Two conversations, one of them without an image, and bad ones."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    images = ["coco/a.jpg", "", *(f"coco/gone{number}.jpg" for number in range(num_bad))]
    records = [
        dict(id=f"chat{number}", image=image, conversations=turns)
        for number, image in enumerate(images)
    ]
    write_json(root / LLAVA, records)
    write_image(root / "img_chat/llava/llava_images/coco/a.jpg")


@pytest.fixture
def root(tmp_path) -> Path:
    """Four sets without a fault; the images of RefCOCO have their other name."""
    root = tmp_path / "datas"
    write_json(root / "img_genseg/coco2017/annotations/instances_train2017.json", coco(5))
    refcoco = root / "img_refseg/refcocos/refcoco"
    write_json(refcoco / "instances.json", coco(2))
    refs = [
        dict(ref_id=number, image_id=number, ann_id=10 + number, split="val")
        | dict(sentences=[dict(sent="the dog"), dict(sent="a dog")])
        for number in range(2)
    ]
    (refcoco / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    for number in range(5):
        write_image(root / f"img_genseg/coco2017/train2017/{number}.jpg")
        write_image(root / f"img_refseg/refcocos/images/mscoco/images/train2014/{number}.jpg")
    reason = root / "img_reaseg/lisa/val"
    for number, label in enumerate(("target", "target", "ignore")):
        write_image(reason / f"{number}.jpg")
        corners = [[4, 4], [20, 4], [20, 20], [4, 20]]
        record = dict(text=["What barks?"], is_sentence=True)
        shapes = [dict(label=label, points=corners)]
        write_json(reason / f"{number}.json", record | dict(shapes=shapes))
    write_chat(root)
    return root


def run(root: Path, *arguments: str) -> int:
    workers = () if "--workers" in arguments else ("--workers", "1")
    return commands.main(["check", "--data", str(root), *workers, *arguments])


def rows(output: str) -> dict[str, list[str]]:
    """The cells of the table by set; its columns are where the words of its head begin."""
    head, *lines = output.splitlines()
    starts = [match.start() for match in re.finditer(r"\S+(?: \S+)*", head)]
    table = [
        [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        for line in lines[: lines.index("") if "" in lines else None]
    ]
    return {row[0]: row[1:] for row in table}


# ---- what is there -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
def test_words_that_a_tokenizer_lacks_are_counted_and_named(root, tmp_path, capsys, workers):
    word_tokenizer().save_pretrained(tmp_path / "words")
    flags = ["--datasets", "llava_instruct,refcoco_val", "--workers", workers]
    flags += ["--tokenizer", str(tmp_path / "words")]
    assert run(root, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "llava_instruct: 1 words that the tokenizer lacks: 'dog' (1)" in lines
    assert "refcoco_val: 1 words that the tokenizer lacks: 'dog' (4)" in lines
    assert run(root, *flags[:-1], "nowhere") == 2


def test_each_set_has_a_row_with_its_counts(root, capsys):
    assert run(root, "--datasets", ROOT_SETS) == 0
    assert rows(capsys.readouterr().out) == {
        "coco_instance": [
            *("generic", "optional", "ok", "5", "5", "5 invalid rings, 1 images without instances")
        ],
        "refcoco_val": ["refer", "scoring", "ok", "4", "4", ""],
        "reasonseg_val": ["reason", "scoring", "ok", "2", "2", "1 images without a target"],
        "llava_instruct": [
            "chat",
            "stage 3",
            "ok",
            "1",
            "1",
            "1 records whose <image> has no file",
        ],
    }


def test_without_names_every_known_set_is_looked_for(root, capsys):
    assert run(root) == 0  # what is missing is no fault
    table = rows(capsys.readouterr().out)
    assert set(table) == set(SOURCES)
    states = {name: row[2] for name, row in table.items()}
    assert {name for name, state in states.items() if state == "ok"} == set(ROOT_SETS.split(","))
    others = {"refcoco", "refcoco_testA", "refcoco_testB", "llava_instruct_text"}  # of their files
    assert {name for name, state in states.items() if state == "empty"} == others
    assert set(states.values()) == {"ok", "empty", "missing"}


def test_a_missing_path_is_named_once_with_what_belongs_there(root, capsys):
    assert run(root, "--datasets", "refcoco+,refcoco+_val,coco_vgd_val_point") == 1
    output = capsys.readouterr().out
    plus = root / "img_refseg/refcocos/refcoco+"
    vgd = root / "img_vgdseg/coco_vgd"
    places = [plus / "refs(unc).p", plus / "instances.json"]
    places += [vgd / "annotations/img_vgdseg_coco_val.json", vgd / "coco2017/val2017"]
    places += [vgd / "annotations/instances_val2017.json"]
    assert "5 paths are missing:" in output
    for place in places:
        assert output.count(f"  {place}\n") == 1
    about = "refcoco+ expressions, its COCO instances and the COCO 2014 train images"
    assert f"  {places[0]}\n      {about}\n" in output
    assert "python -m xsam.data vgd makes one" in output


@pytest.mark.parametrize(("limit", "read"), [(0, 5), (2, 2), (9, 5)])
def test_the_limit_is_read_of_each_set_evenly(root, capsys, monkeypatch, limit, read):
    indices = []
    monkeypatch.setattr(check, "_read", lambda index: indices.append(index) or [])
    assert run(root, "--datasets", "coco_instance", "--limit", str(limit)) == 0
    assert rows(capsys.readouterr().out)["coco_instance"][3:5] == ["5", str(read)]
    assert len(indices) == read and {indices[0], indices[-1]} == {0, 4}


# ---- what is wrong -------------------------------------------------------------------------------


def test_a_bad_record_is_listed_with_its_file_and_place(root, capsys):
    annotations = root / "img_genseg/coco2017/annotations/instances_train2017.json"
    content = coco(5)
    content["annotations"][1]["category_id"] = 7
    content["annotations"][3]["image_id"] = 99
    write_json(annotations, content)
    (root / "img_reaseg/lisa/val/1.json").write_text("{")
    image = root / "img_refseg/refcocos/images/mscoco/images/train2014/1.jpg"
    image.write_bytes(image.read_bytes()[:-300])
    assert run(root, "--datasets", ROOT_SETS) == 1
    output = capsys.readouterr().out
    states = {name: row[2] for name, row in rows(output).items()}
    assert states == {
        "coco_instance": "2 bad",
        "refcoco_val": "1 bad",  # read for two expressions
        "reasonseg_val": "1 bad",
        "llava_instruct": "ok",
    }
    assert f"  {annotations}: annotation 13: image 99 is not in its images\n" in output
    assert f"  {annotations}: annotation 11: category 7 is not in its categories\n" in output
    assert f"  {image}: cannot be read as an image" in output
    assert f"  {root}/img_reaseg/lisa/val/1.json: not valid JSON" in output


def test_a_file_that_cannot_be_opened_does_not_hide_the_other_sets(root, capsys):
    (root / LLAVA).write_text('[{"id": 1')
    assert run(root, "--datasets", "llava_instruct,reasonseg_val") == 1
    output = capsys.readouterr().out
    assert rows(output)["llava_instruct"][2:5] == ["1 bad", "", ""]
    assert rows(output)["reasonseg_val"][2:5] == ["ok", "2", "2"]
    assert f"  {root / LLAVA}: not valid JSON" in output


def test_the_first_bad_records_are_listed_and_all_of_them_on_demand(root, capsys):
    write_chat(root, num_bad=7)
    assert run(root, "--datasets", "llava_instruct") == 1
    output = capsys.readouterr().out
    assert output.count("cannot be read as an image") == 5
    assert "llava_instruct: 7 bad\n" in output and "and 2 more (--all lists them)" in output
    assert run(root, "--datasets", "llava_instruct", "--all") == 1
    assert capsys.readouterr().out.count("cannot be read as an image") == 7


def test_two_processes_say_what_one_says(root, capsys):
    write_chat(root, num_bad=7)
    outputs = []
    for workers in ("1", "2"):
        assert run(root, "--datasets", ROOT_SETS, "--all", "--workers", workers) == 1
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


# ---- a user's own, and what is asked for ---------------------------------------------------------


@pytest.fixture
def own(tmp_path) -> dict[str, str]:
    """Names of three sets of one's own: referring, instances, panoptic."""
    folder = tmp_path / "own"
    content = coco(2)
    for number in range(2):
        write_image(folder / f"images/{number}.jpg")
        ids = np.zeros((24, 32, 3), np.uint8)
        ids[4:9, 4:9, 0] = 5
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(ids).save(folder / f"masks/{number}.png")
    records = [
        dict(image=f"{number}.jpg", masks=[[ring(3, 3, 9)], None], texts=["dog", ["cat", "a cat"]])
        for number in range(2)
    ]
    segments = [dict(id=5, category_id=1, iscrowd=0)]
    panoptic = content | dict(
        annotations=[dict(image_id=number, segments_info=segments) for number in range(2)]
    )
    refers = write_json(folder / "refers.json", records)
    things = write_json(folder / "things.json", content)
    scenes = write_json(folder / "scenes.json", panoptic)
    return {
        "refers": f"{refers}:{folder}/images",
        "things": f"{things}:{folder}/images",
        "scenes": f"{scenes}:{folder}/images:{folder}/masks",
    }


def test_a_terminal_without_all_letters_gets_the_report_all_the_same(own, tmp_path):
    path = tmp_path / "own/\u732b.json"
    path.write_text("[]")
    command = [sys.executable, "-m", "xsam.data", "check", "--datasets", str(path)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONIOENCODING": "cp1252"}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "\\u732b.json" in done.stdout and "codec" not in done.stderr


def test_files_of_ones_own_are_checked_by_their_layout(own, tmp_path, capsys):
    assert run(tmp_path, "--datasets", ",".join(own.values())) == 0
    table = rows(capsys.readouterr().out)
    assert [table[name][1:6] for name in own.values()] == [
        ["optional", "ok", "2", "2", ""],
        ["optional", "ok", "2", "2", "2 invalid rings, 1 images without instances"],
        ["optional", "ok", "2", "2", "1 images without segments"],
    ]


def test_pictures_are_drawn_of_each_set(root, own, tmp_path, capsys):
    names = ["coco_instance", "reasonseg_val", "llava_instruct", *own.values()]
    out = tmp_path / "pictures"
    assert run(root, "--datasets", ",".join(names), "--show", "2", "--out", str(out)) == 0
    assert f"pictures are in {out}" in capsys.readouterr().out
    pictures = sorted(out.glob("*.png"))
    counts = dict.fromkeys(("coco_instance", "reasonseg_val", *own), 2) | {"llava_instruct": 1}
    for name, count in counts.items():  # of the conversations one has an image
        assert sum(f"{name}_0" in path.name for path in pictures) == count, name
    assert len(pictures) == sum(counts.values())
    for path in pictures:
        picture = np.asarray(Image.open(path))
        assert min(picture.shape[:2]) > 100 and picture.std() > 1


def test_prompts_of_other_images_are_drawn_before_the_image(tmp_path):
    rng = np.random.default_rng(0)

    def picture(height: int, width: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    shown = {"cat": picture(20, 30), "dog": picture(50, 40)}
    regions = [np.zeros((image.height, image.width), bool) for image in shown.values()]
    for region in regions:
        region[3:9, 3:9] = True
    sample = Sample(
        sample_id="vgd/1",
        task="vgd",
        image=picture(24, 32),
        turns=[("Like <p><region></p>, <p><region></p>.", "Sure, <SEG>.")],
        masks=np.ones((1, 24, 32), bool),
        labels=np.zeros(1, np.int64),
        names=list(shown),
        regions=regions,
        region_images=list(shown.values()),
    )
    names = sample.names
    pictures = draw.draw_prompts(sample.image, regions, sample.region_images, names)
    ratios = [each.width / each.height for each in pictures]
    assert ratios == pytest.approx([30 / 20, 40 / 50, 32 / 24], rel=0.05)
    alone = dataclasses.replace(sample, regions=np.ones((2, 24, 32), bool), region_images=None)
    assert len(draw.draw_prompts(alone.image, alone.regions, None, names)) == 1
    assert draw_sample(sample).width > draw_sample(alone).width


def test_a_bad_record_is_not_drawn_and_stops_no_picture(root, tmp_path):
    (root / "img_genseg/coco2017/train2017/4.jpg").unlink()
    arguments = ("--datasets", "coco_instance", "--show", "3", "--out", str(tmp_path))
    assert run(root, *arguments) == 1
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == ["coco_instance_000000.png", "coco_instance_000002.png"]


@pytest.mark.parametrize("name", ["cocoo", "own.txt", "own.json:a:b:c"])
def test_an_unknown_set_is_an_error_that_names_the_known_ones(root, capsys, name):
    assert run(root, "--datasets", name) == 2
    error = capsys.readouterr().err
    assert f"unknown dataset {name!r}" in error and all(known in error for known in SOURCES)


def test_an_unknown_set_is_told_before_hours_of_reading(root, capsys, monkeypatch):
    monkeypatch.setattr(check, "_read", lambda _: pytest.fail("a sample was read"))
    assert run(root, "--datasets", "llava_instruct,cocoo") == 2


def test_phrasings_are_checked_before_anything_is_read(root, tmp_path, capsys):
    path = write_json(tmp_path / "words.json", {"refer": {"questions": ["Where?"]}})
    assert run(root, "--phrasings", str(path)) == 2
    assert f"{path}: refer: questions" in capsys.readouterr().err


def test_without_a_command_its_names_are_told(capsys):
    with pytest.raises(SystemExit, match="2"):
        commands.main([])
    assert "COMMAND" in capsys.readouterr().err
