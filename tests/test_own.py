"""A user's own files from training to a score: the share that is held out, the classes of stage 1,
and figures that do not depend on the number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import faulty_train
import numpy as np
import pytest
from PIL import Image
from processes import ROOT

from xsam.checkpoints import read_header
from xsam.cli import parse, preflight, train_command
from xsam.datasets.formats import encode_mask, segment_colours
from xsam.datasets.registry import open_dataset
from xsam.datasets.sources import (
    file_name,
    find_source,
    folder_name,
    hold_out,
    own_parts,
    scored_sets,
    with_held_out,
)
from xsam.evaluate import evaluate
from xsam.inference import load_checkpoint, predict, save_pretrained
from xsam.toy.preset import toy
from xsam.weights import weights_digest

CLASSES = [{"id": 3, "name": "disc"}, {"id": 5, "name": "bar"}, {"id": 9, "name": "dot"}]


def picture(number: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A drawing of a disc and a bar, and their masks."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:60, :80]
    disc = (x - rng.integers(20, 30)) ** 2 + (y - rng.integers(20, 40)) ** 2 < 100
    bar = (abs(x - 60) < 8) & (abs(y - rng.integers(20, 40)) < 18)
    pixels = np.full((60, 80, 3), 90, np.uint8)
    pixels[disc], pixels[bar] = (220, 40, 40), (40, 60, 220)
    return pixels, [disc, bar]


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """Ten drawings with a referring list, COCO instances, and COCO panoptic without a thing."""
    folder = tmp_path_factory.mktemp("own")
    refs, images, instances, panoptic = [], [], [], []
    (folder / "maps").mkdir()
    for number in range(10):
        pixels, (disc, bar) = picture(number)
        name = f"{number}.png"
        Image.fromarray(pixels).save(folder / name)
        texts = [["the red disc", "a disc"], "the blue bar"] + ["a dog"] * (number == 0)
        masks = [encode_mask(disc), encode_mask(bar)] + [None] * (number == 0)
        refs.append({"image": name, "texts": texts, "masks": masks})
        images.append({"id": number, "file_name": name, "height": 60, "width": 80})
        for kind, mask in zip((3, 5), (disc, bar), strict=True):
            each = {"id": len(instances) + 1, "image_id": number, "category_id": kind}
            instances.append(each | {"segmentation": encode_mask(mask), "iscrowd": 0})
        segments = [{"id": kind, "category_id": kind} for kind in (3, 5)]
        panoptic.append({"image_id": number, "file_name": name, "segments_info": segments})
        Image.fromarray(segment_colours(3 * disc + 5 * bar)).save(folder / "maps" / name)
    coco = {"images": images, "categories": CLASSES, "annotations": instances}
    (folder / "refs.json").write_text(json.dumps(refs))
    (folder / "things.json").write_text(json.dumps(coco))
    stuff = [each | {"isthing": 0} for each in CLASSES]
    coco |= {"annotations": panoptic, "categories": stuff}
    (folder / "areas.json").write_text(json.dumps(coco))
    return folder


def run(*flags: object) -> int:
    """The training command, in this process."""
    return faulty_train.main({}, list(map(str, flags)))


# ---- the share that is held out ------------------------------------------------------------------


@pytest.mark.parametrize("file", ["refs.json", "things.json", "areas.json::maps"])
def test_a_split_is_of_whole_images_and_the_same_every_time(own, file):
    def images(part: str, **options) -> set[str]:
        dataset = open_dataset(f"{file}@{part}", own, **options)
        return {dataset.image_name(dataset.records[index]) for index in range(len(dataset))}

    held = images("val0.2")
    assert held and len(held | images("train0.2")) == 10 and not held & images("train0.2")
    assert held == images("val0.2", is_scored=True)
    assert {frozenset(images(f"val0.2/{seed}")) for seed in range(8)} > {frozenset(held)}
    assert len(images("val0.000001")) == 1 and len(images("train0.999999")) == 1
    counts = [len(images(f"val0.3/{seed}")) for seed in range(30)]
    assert 2.4 < np.mean(counts) < 3.6  # each image by itself: not always three


def test_all_kinds_of_file_hold_out_the_same_images(own):
    names = []
    for file in ("refs.json", "things.json", "areas.json::maps"):
        dataset = open_dataset(f"{file}@val0.3/4", own)
        names.append({dataset.image_name(dataset.records[n]) for n in range(len(dataset))})
    assert names[0] == names[1] == names[2] and 0 < len(names[0]) < 10


def test_an_image_is_on_one_side_in_every_file(own):
    """Also where another file has some of the images alone, or writes their names otherwise."""
    records = json.loads((own / "refs.json").read_text())
    few = [each | {"image": f"./{each['image']}"} for each in records[:7:2]]
    (own / "few.json").write_text(json.dumps([*few, *records[:7:2]]))
    for seed in range(12):

        def images(name: str, cut: str = f"0.3/{seed}") -> set[str]:
            dataset = open_dataset(f"{name}{cut}", own)
            every = (dataset.image_name(dataset.records[index]) for index in range(len(dataset)))
            return {Path(image).name for image in every}

        held, few_held = images("refs.json@val"), images("few.json@val")
        assert not few_held & images("few.json@train")
        assert few_held == held & {"0.png", "2.png", "4.png", "6.png"} or len(few_held) == 1


def test_an_image_without_an_object_does_not_move_others(own, tmp_path):
    """Training leaves such images out, scoring does not: none may be in both."""
    content = json.loads((own / "things.json").read_text())
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 4]
    (own / "fewer.json").write_text(json.dumps(content))
    datasets = [
        open_dataset("fewer.json@train0.4", own),
        open_dataset("fewer.json@val0.4", own, is_scored=True),
    ]
    one, two = ({d.image_name(d.records[n]) for n in range(len(d))} for d in datasets)
    assert not one & two and len(one | two) in (9, 10)


def test_what_cannot_be_split_is_an_error(own, tmp_path):
    record = json.loads((own / "refs.json").read_text())[:1]
    (own / "one.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="one image, of which no share can be held out"):
        open_dataset("one.json@val0.2", own)


def test_names_of_own_files():
    source = find_source("a/b.json:photos:maps@val0.25/7")
    assert (source.part, source.held_out, source.seed) == ("val", 0.25, 7)
    assert (source.images, source.masks) == ("photos", "maps")
    assert find_source("b.json").held_out == 0
    assert folder_name("/home/x/b.json:y@val0.2/3") == "home_x_b.json_y@val0.2_3"
    assert file_name("/home/x/b.json:y@val0.2/3") == "b.json:y@val0.2/3"
    assert file_name("x/a@home/b.json:/home/me/y") == "x/a@home/b.json:y"
    assert hold_out("refcoco", 0.2, 0) == "refcoco" == with_held_out("refcoco")[0]
    assert hold_out("b.json", 0.2, 0) == "b.json@train0.2"
    assert hold_out("b.json:x", 0.00001, 3) == "b.json:x@train0.00001/3"
    assert hold_out("b.json@val0.3", 0.2, 3) == "b.json@val0.3"
    assert with_held_out("b.json@train0.2/3") == ["b.json@train0.2/3", "b.json@val0.2/3"]
    for name in ("", "b.json@val0.0", "b.json@train1", "refcoco@val0.2", "b.txt"):
        with pytest.raises(ValueError, match="unknown dataset"):
            find_source(name)


@pytest.mark.parametrize(
    "flags, scored",
    [
        (["--datasets", "b.json", "--held_out", "0.2"], ["b.json@train0.2", "b.json@val0.2"]),
        (["--datasets", "b.json", "--held_out", "0.2", "--seed", "3"],
         ["b.json@train0.2/3", "b.json@val0.2/3"]),
        (["--datasets", "b.json@train0.3/5", "--held_out", "0.2"],
         ["b.json@train0.3/5", "b.json@val0.3/5"]),
        (["--datasets", "x@y/b.json", "--held_out", "0.2"],
         ["x@y/b.json@train0.2", "x@y/b.json@val0.2"]),
        (["--datasets", "b.json", "--eval_tasks", "c.json"], ["c.json"]),
        (["--datasets", "b.json", "--held_out", "0.2", "--eval_tasks", "refer,b.json"],
         ["refer", "b.json@train0.2", "b.json@val0.2"]),
        (["--datasets", "+b.json"], [*toy().eval_tasks, "b.json"]),
        (["--datasets", "refcoco"], list(toy().eval_tasks)),
    ],
)  # fmt: skip
def test_what_is_trained_on_is_scored(flags, scored):
    config = parse(["--config", "toy", "--stage", "3", *flags])[1]
    assert list(config.eval_tasks) == scored


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--held_out", "0.2"], "held_out is for files of your own"),
        (["--datasets", "b.json", "--held_out", "1"], "held_out is 1"),
        (["--stage", "2", "--lora_rank", "4"], "stage 2 trains its projectors whole"),
        (["--lora_targets", "llm"], "lora_targets: without --lora_rank there are no adapters"),
        (["--lora_rank", "4", "--lora_whole", "llm", "--llm_bits", "4"], "for a frozen llm"),
    ],
)
def test_flags_that_would_do_nothing_are_errors(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse(["--config", "toy", *([] if "--stage" in flags else ["--stage", "3"]), *flags])
    assert message in capsys.readouterr().err


def test_an_unknown_word_to_score_is_an_error():
    with pytest.raises(ValueError, match=r"unknown task b\.txt"):
        scored_sets(["b.txt"], Path())


# ---- training ------------------------------------------------------------------------------------


def flags_of(world: Path, out: Path, stage: int, datasets: object, *others: object) -> list[object]:
    flags = ["--config", "toy", "--stage", stage, "--weights", world / "weights", "--out", out]
    flags += ["--num_points", 64, "--global_batch_size", 4, "--micro_batch_size", 2]
    return [*flags, "--max_steps", 1, "--datasets", datasets, *others]


@pytest.fixture(scope="module")
def checkpoints(model, segmentor, tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_pretrained(segmentor, folder / "s1")
    save_pretrained(model, folder / "s3")
    return {1: folder / "s1", 3: folder / "s3"}


@pytest.mark.parametrize("start", [None, 1, 3], ids="from {}".format)
def test_stage_1_takes_over_the_classes_of_its_file(
    world, own, checkpoints, tmp_path, capsys, start
):
    init = [] if start is None else ["--init", checkpoints[start]]
    flags = flags_of(world, tmp_path, 1, own / "things.json", "--held_out", 0.2, *init)
    assert run(*flags) == 0
    said = capsys.readouterr().out
    assert ("the class head is new, of 3 classes" in said) == (start is not None)
    config = read_header(tmp_path / "stage1/step_1")["config"]
    assert [each["name"] for each in config.categories] == ["disc", "bar", "dot"]
    segmentor, _ = load_checkpoint(tmp_path / "stage1", report=lambda _: None)
    assert segmentor.class_head.predictor.out_features == 4
    found = predict(segmentor, own / "0.png", "instance")  # it knows the names
    assert set(found.labels) <= {"disc", "bar", "dot"} and found.names == ["disc", "bar", "dot"]
    results = json.loads((tmp_path / "results.json").read_text())
    parts = [f"{own / 'things.json'}@{part}0.2" for part in ("train", "val")]
    assert [name for name in results if name not in ("columns", "steps")] == parts
    assert set(results["steps"].values()) == {0, 1}
    assert set(results["columns"]) == {"untrained" if start is None else "init", "stage 1"}
    assert set(results[parts[0]]) == {"AP", "AP50"}


def test_the_head_of_the_same_classes_is_kept(world, own, tmp_path, capsys):
    flags = flags_of(world, tmp_path / "a", 1, own / "things.json", "--eval_tasks", "")
    assert run(*flags) == 0
    flags = flags_of(world, tmp_path / "b", 1, own / "things.json", "--eval_tasks", "")
    assert run(*flags, "--init", tmp_path / "a/stage1") == 0
    said = capsys.readouterr().out
    assert "the class head is new" not in said and "-> segmentor.class_head" in said


def test_another_number_of_classes_is_told(world, own, tmp_path, capsys):
    flags = flags_of(world, tmp_path, 1, own / "things.json", "--num_classes", 4)
    assert run(*flags, "--eval_tasks", "") == 2
    assert "has 3 categories, --num_classes is 4: leave it out" in capsys.readouterr().err


def test_one_head_has_one_list_of_classes(world, own, tmp_path, capsys):
    content = json.loads((own / "things.json").read_text())
    names = [each["name"] for each in content["categories"]]
    for each, name in zip(content["categories"], reversed(names), strict=True):
        each["name"] = name
    (own / "reordered.json").write_text(json.dumps(content))
    files = f"{own / 'things.json'},{own / 'reordered.json'}"
    assert run(*flags_of(world, tmp_path, 1, files, "--eval_tasks", "")) == 2
    assert "one head cannot learn both" in capsys.readouterr().err


def test_bad_records_of_own_files_are_left_out_of_scoring_too(
    world, own, checkpoints, tmp_path, capsys
):
    records = json.loads((own / "refs.json").read_text())
    records[1]["masks"] = records[1]["masks"][:1]
    (own / "bad.json").write_text(json.dumps(records))
    flags = flags_of(world, tmp_path, 3, own / "bad.json", "--init", checkpoints[3])
    assert run(*flags) == 2
    assert run(*flags, "--skip-bad") == 0 and (tmp_path / "results.json").is_file()
    records = json.loads((own / "refs.json").read_text())
    records[3]["masks"][0] = "absent.png"  # found when it is read
    (own / "bad.json").write_text(json.dumps(records))
    flags = flags_of(world, tmp_path / "b", 3, own / "bad.json", "--init", checkpoints[3])
    capsys.readouterr()
    assert run(*flags) == 2
    message = capsys.readouterr().err
    assert "bad.json: record 3: " in message and "absent.png" in message
    assert run(*flags, "--skip-bad") == 0 and (tmp_path / "b/results.json").is_file()


def test_a_stage_that_goes_on_is_scored_again(world, own, checkpoints, tmp_path):
    flags = flags_of(world, tmp_path, 3, own / "refs.json", "--init", checkpoints[3])
    assert run(*flags) == 0
    before = json.loads((tmp_path / "results.json").read_text())
    flags[flags.index("--max_steps") + 1] = 2
    assert run(*flags, "--resume") == 0
    after = json.loads((tmp_path / "results.json").read_text())
    assert (before["steps"]["stage 3"], after["steps"]["stage 3"]) == (1, 2)
    weights = tmp_path / "predictions/stage3" / folder_name(str(own / "refs.json")) / "about.json"
    model, _ = load_checkpoint(tmp_path, report=lambda _: None)
    assert json.loads(weights.read_text())["made_by"]["weights"] == weights_digest(model)


def test_a_path_that_is_nowhere_is_told_as_it_was_typed(own, tmp_path, capsys):
    flags = ["--config", "toy", "--stage", "3", "--out", str(tmp_path), "--datasets"]
    for name, missing in (("phots/b.json", "phots/b.json"), (f"{own}/refs.json:fotos", "fotos")):
        message = preflight(*parse([*flags, name]))
        assert f"\n  {missing}\n" in message and message.count("a data set of your own") == 1
    with pytest.raises(ValueError, match=r"name the folder of its images.*FILE\.json:FOLDER"):
        open_dataset(f"{own}/things.json:{tmp_path}", own, is_scored=True).inputs(0)


def test_a_plan_of_own_files(world, own, capsys):
    flags = ["--config", "toy", "--stage", 1, "--datasets", own / "things.json", "--plan"]
    assert train_command(list(map(str, [*flags, "--gpus", 1]))) == 0
    assert "stage 1 of toy" in capsys.readouterr().out


def test_stage_3_scores_what_it_learns(world, own, checkpoints, tmp_path):
    files = f"{own / 'refs.json'},{own / 'areas.json'}:{own}:{own / 'maps'}"
    flags = flags_of(world, tmp_path, 3, files, "--init", checkpoints[3], "--held_out", 0.3)
    assert run(*flags) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    results = {k: set(x) for k, x in results.items() if k not in ("columns", "steps")}
    names = (own_parts(name) for name in results)
    figures = {
        f"{Path(spec.split(':')[0]).name}@{part}{cut}": row
        for (spec, part, cut), row in zip(names, results.values(), strict=True)
    }
    files, parts = ("refs.json", "areas.json"), ("train", "val")
    assert list(figures) == [f"{file}@{part}0.3" for file in files for part in parts]
    refs, areas = list(figures.values())[:2], list(figures.values())[2:]
    assert areas == [{"mIoU"}, {"mIoU"}] and all({"cIoU", "gIoU"} <= each for each in refs)
    assert sorted("N_acc" in each for each in refs) == [False, True]  # a phrase that nothing fits
    table = (tmp_path / "results.md").read_text()
    assert str(own) not in table and f"| areas.json:{own.name}:maps@val0.3 |" in table
    config = read_header(tmp_path / "stage3/step_1")["config"]
    assert [each["name"] for each in config.categories] == ["disc", "bar", "dot"]
    assert not any(each["is_thing"] for each in config.categories)


def test_a_validation_within_a_stage_scores_them_too(world, own, checkpoints, tmp_path):
    flags = flags_of(world, tmp_path, 3, own / "refs.json", "--init", checkpoints[3])
    flags[flags.index("--max_steps") + 1] = 2
    assert run(*flags, "--validate_every", 1, "--num_validation", 4) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (validation,) = [each["validation"] for each in lines if "validation" in each]
    assert f"{own / 'refs.json'} cIoU" in validation


# ---- scoring -------------------------------------------------------------------------------------


def test_perfect_predictions_have_perfect_figures(own, tmp_path):
    """Of every kind of file: written as a model would, then scored without one."""
    refs = open_dataset("refs.json", own, is_scored=True)
    assert len(refs) == 31  # each of the alternatives, and one that nothing fits
    entries = {"refs.json": [], "things.json": [], "areas.json": []}
    for index in range(len(refs)):
        masks = refs.inputs(index).masks
        shape = encode_mask(masks[0]) if len(masks) else None
        entries["refs.json"].append({"id": refs.key(index), "segmentation": shape})
    for number in range(10):
        for kind, mask in zip((3, 5), picture(number)[1], strict=True):
            each = {"image_id": number, "category_id": kind, "segmentation": encode_mask(mask)}
            entries["areas.json"].append(each)
            entries["things.json"].append(each | {"score": 0.9})
    names = ["refs.json", "things.json", "areas.json::maps"]
    for name, rows in zip(names, entries.values(), strict=True):
        folder = tmp_path / folder_name(name)
        folder.mkdir()
        (folder / "predictions.json").write_text(json.dumps(rows))
    results = evaluate(None, names, own, tmp_path)
    assert results["refs.json"]["cIoU"] == results["refs.json"]["N_acc"] == 100
    assert results["things.json"] == {"AP": pytest.approx(100), "AP50": pytest.approx(100)}
    assert results["areas.json::maps"] == {"mIoU": 100}
    entries["refs.json"][0]["segmentation"] = None  # and another for one that is wrong
    (tmp_path / "refs.json/predictions.json").write_text(json.dumps(entries["refs.json"]))
    assert evaluate(None, names[:1], own, tmp_path)["refs.json"]["T_acc"] < 100


@pytest.mark.parametrize("count", [2, 3])
def test_processes_write_the_same_bytes(own, checkpoints, tmp_path, count):
    def score(number: int) -> dict[str, bytes]:
        out = tmp_path / str(number)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
        tasks = "refs.json@val0.4,things.json,areas.json::maps"
        command = [sys.executable, *launcher * (number > 1), ROOT / "xsam/evaluate.py"]
        command += ["--checkpoint", checkpoints[3], "--data", own, "--tasks", tasks, "--out", out]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(list(map(str, command)), check=True, env=environment, capture_output=True)
        return {str(x.relative_to(out)): x.read_bytes() for x in out.rglob("*") if x.is_file()}

    one = score(1)
    assert len(one) >= 8 and score(count) == one
