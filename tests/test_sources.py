"""Where datasets lie: every name, other names of the same files, what a run needs.

pytest tests/test_sources.py
"""

import subprocess
import sys
from pathlib import Path

import pytest

from xsam.cli import CONFIGS
from xsam.config import xsam
from xsam.datasets.sources import ALIASES, SOURCES, find_source, locate, required_paths


def required(stages: list[int]) -> set[str]:
    places = required_paths(xsam(), stages, Path("data"), Path("weights"), Path("out"))
    assert all(about for _, about in places)
    paths = [path.as_posix() for path, _ in places]
    assert len(paths) == len(set(paths))
    return set(paths)


def test_stage_1_needs_sam_and_coco():
    assert required([1]) == {
        "weights/sam-vit-large",
        "data/img_genseg/coco2017/annotations/panoptic_train2017.json",
        "data/img_genseg/coco2017/panoptic_train2017",
        "data/img_genseg/coco2017/train2017",
    }


@pytest.mark.parametrize(
    ("stages", "finished"),
    [([1], []), ([2], [1]), ([3], [1, 2]), ([2, 3], [1]), ([1, 2, 3], [])],
)
def test_only_what_no_stage_of_the_run_makes_is_required(stages, finished):
    places = required(stages)
    assert {place for place in places if place.startswith("out/")} == {
        f"out/stage{number}/latest" for number in finished
    }
    alone = set().union(*(required([number]) for number in stages))
    assert {place for place in alone if not place.startswith("out/")} <= places


@pytest.mark.parametrize("name", CONFIGS)
def test_presets_name_known_datasets(name):
    for stage in CONFIGS[name]().stages.values():
        assert set(stage.datasets) <= set(SOURCES)


def test_the_mix_of_stage_3_is_that_of_the_paper():
    assert xsam().stages[3].datasets == (
        "llava_instruct",
        "coco_panoptic",
        "coco_vgd",
        "refcoco",
        "refcoco+",
        "refcocog",
        "gcg_grandf",
        "gcg_refcocog",
        "gcg_psg",
        "gcg_flickr",
        "reasonseg",
    )


@pytest.mark.parametrize("name", SOURCES)
def test_paths_are_relative_and_say_what_they_are(name):
    source = SOURCES[name]
    assert source.about and source.paths()
    assert not any(Path(path).is_absolute() or ".." in path for path in source.paths())


def touch(root: Path, path: str) -> Path:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).touch()
    return root / path


@pytest.mark.parametrize(
    ("name", "lies"),
    [
        ("refcoco", "refseg_data/refcocos/refcoco/instances.json"),
        ("refcoco+", "img_refseg/refcocos/refcocop/instances.json"),
        ("refcoco+", "refseg_data/refcocos/refcocop/instances.json"),
        ("refcoco", "refseg_data/refcocos/images/mscoco/images/train2014"),
        ("grefcoco", "img_refseg/refcocos/grefcoco/grefs(unc).p"),
        ("grefcoco", "img_refseg/refcocos/grefcoco/refs(unc).p"),
        ("coco_panoptic", "genseg_data/coco2017/train2017"),
        ("coco_vgd", "img_genseg/coco2017/train2017"),
        ("coco_vgd", "genseg_data/coco2017/annotations/instances_train2017.json"),
        ("coco_interactive_val_point", "img_genseg/coco2017/val2017"),
        ("gcg_psg", "img_genseg/coco2017"),
        ("gcg_refcocog", "img_refseg/refcocos/images/train2014"),
        ("gcg_flickr", "img_gcgseg/grand_f/images/flickr30k/Flickr30K"),
        ("gcg_flickr", "gcgseg_data/grand_f/images/flikcr_30k/train"),
        ("ade20k_panoptic_val", "img_ovseg/ade20k/ADEChallengeData2016/images/validation"),
        ("llava_instruct", "imgconv_data/llava/llava_images"),
    ],
)
def test_files_are_found_by_their_other_names(tmp_path, name, lies):
    there = touch(tmp_path, lies)
    assert there in [locate(tmp_path, path) for path in SOURCES[name].paths()]


def test_the_first_name_wins_and_stands_for_what_is_nowhere(tmp_path):
    path = SOURCES["refcoco+"].instances
    assert locate(tmp_path, path) == tmp_path / path
    touch(tmp_path, path.replace("refcoco+", "refcocop"))
    own = touch(tmp_path, path)
    assert locate(tmp_path, path) == own
    assert all(isinstance(others, tuple) and others for others in ALIASES.values())


@pytest.mark.parametrize(
    ("name", "images", "masks"),
    [
        ("mine/own.json", "mine", ""),
        ("own.json", ".", ""),
        ("/data/own.json:photos", "photos", ""),
        ("own.json:photos:masks", "photos", "masks"),
    ],
)
def test_a_file_of_ones_own(name, images, masks):
    source = find_source(name)
    assert (source.images, source.masks) == (images, masks)
    assert source.annotations == name.split(":")[0]


@pytest.mark.parametrize("name", ["refcoko", "own.jsonl", "own.json:a:b:c"])
def test_an_unknown_name_is_an_error_that_lists_the_known(name):
    with pytest.raises(ValueError, match=r"unknown dataset .*refcocog.*FILE\.json"):
        find_source(name)


def test_importing_sources_imports_no_torch():
    code = "import sys, xsam.datasets.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
