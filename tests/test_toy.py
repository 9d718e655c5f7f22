"""The toy world: the same bytes each time, labels that agree with each other, sentences that hold.

pytest tests/test_toy.py
"""

import hashlib
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from xsam import toy
from xsam.config import SOURCES
from xsam.config import toy as toy_config

NUM_TRAIN, NUM_VAL = 12, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("toy") / "data"
    toy.write_world(data, NUM_TRAIN, NUM_VAL)
    return data


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "weights"
    toy.write_weights(folder, toy_config().model, steps=3)
    return folder


def read(path: Path):
    return json.loads(path.read_text())


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def png_ids(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int) @ [1, 256, 256**2]  # [H, W]


def decode(segmentation: dict | list, height: int, width: int) -> np.ndarray:
    parts = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(coco_mask.merge(parts if isinstance(parts, list) else [parts])) > 0


def scenes() -> dict[int, toy.Scene]:
    drawings = toy._draw(0, "train", NUM_TRAIN) + toy._draw(0, "val", NUM_VAL)
    return {drawing.image_id: drawing.scene for drawing in drawings}


def refs_of(world: Path) -> list[dict]:
    return pickle.loads((world / SOURCES["refcoco"].annotations).read_bytes())


def test_same_bytes_twice_and_no_overwriting(world, tmp_path):
    toy.write_world(tmp_path / "data", NUM_TRAIN, NUM_VAL)
    assert hashes(tmp_path / "data") == hashes(world)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    with pytest.raises(FileExistsError, match="exists already"):
        toy.write_world(tmp_path / "data", 1, 1)


def test_every_path_of_the_toy_stages_is_written(world):
    names = {name for stage in toy_config().stages.values() for name in stage.datasets}
    for name in [*names, "coco_panoptic_val"]:
        assert all((world / path).exists() for path in SOURCES[name].paths()), name


@pytest.mark.parametrize("name", ["coco_panoptic", "coco_panoptic_val"])
def test_panoptic_png_agrees_with_json(world, name):
    source = SOURCES[name]
    content = read(world / source.annotations)
    images = {image["id"]: image for image in content["images"]}
    assert list(images) != sorted(images)
    categories = {category["id"]: category for category in content["categories"]}
    largest, num_crowds = 0, 0
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        ids = png_ids(world / source.masks / annotation["file_name"])
        assert ids.shape == (image["height"], image["width"])
        assert Image.open(world / source.images / image["file_name"]).size == ids.shape[::-1]
        areas = {each["id"]: each["area"] for each in annotation["segments_info"]}
        assert areas == {i: n for i, n in Counter(ids.ravel().tolist()).items() if i}
        for segment in annotation["segments_info"]:
            rows, columns = np.nonzero(ids == segment["id"])
            x, y, width, height = segment["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
        kinds = [categories[each["category_id"]]["isthing"] for each in annotation["segments_info"]]
        assert 1 <= kinds.count(0) <= 2 and kinds.count(1) >= 2
        largest = max(largest, *areas)
        num_crowds += sum(each["iscrowd"] for each in annotation["segments_info"])
    assert largest > 65535 and num_crowds > 0


@pytest.mark.parametrize("split", ["train", "val"])
def test_instances_cover_the_panoptic_pixels(world, split):
    source = SOURCES["coco_panoptic" if split == "train" else "coco_panoptic_val"]
    content = read(world / source.annotations.replace("panoptic_", "instances_"))
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    owners = {image_id: scene.owner for image_id, scene in scenes().items()}
    for record in content["annotations"]:
        mask = decode(record["segmentation"], *sizes[record["image_id"]])
        expected = owners[record["image_id"]] == record["id"] % 10 + 1
        iou = (mask & expected).sum() / (mask | expected).sum()
        assert iou == 1 if record["iscrowd"] else iou >= 0.9
        assert record["area"] == expected.sum()


def test_run_lengths_and_polygons_of_masks_at_the_border():
    mask = np.ones((6, 5), bool)
    mask[2:4, 1:3] = False
    for segmentation in (toy.run_lengths(mask), toy.polygons(mask)):
        assert (decode(segmentation, 6, 5) == mask).all()


def test_things_stay_visible_and_differ_from_the_background():
    for scene in scenes().values():
        assert 2 <= len(scene.things()) <= 5
        for index, segment in enumerate(scene.segments):
            assert scene.mask(index).sum() > (40 if segment.is_thing else 500)


def test_void_is_small_and_in_some_images_only():
    shares = [(drawing.scene.owner == 0).mean() for drawing in toy._draw(0, "train", 40)]
    assert 3 <= sum(share > 0 for share in shares) <= 20
    assert max(shares) < 0.1


def test_every_sentence_names_one_thing(world):
    facts = scenes()
    for ref in refs_of(world):
        assert ref["sent_ids"] == [each["sent_id"] for each in ref["sentences"]]
        assert 1 <= len(ref["sentences"]) <= 3
        segments = facts[ref["image_id"]].segments
        target = segments[ref["ann_id"] % 10]
        assert target.category_id == ref["category_id"] and not target.is_crowd
        for sentence in ref["sentences"]:
            words = set(sentence["tokens"]) - {"the", "only"}
            assert words <= {target.category, target.color, target.size}
            for other in segments:
                looks = {other.category, other.color}
                looks |= set(toy.RADII) if other.is_crowd else {other.size}
                assert other is target or not words <= looks, sentence["sent"]


def test_refs_are_plain_and_point_at_annotations(world):
    refs = refs_of(world)
    stack = [refs]
    while stack:
        value = stack.pop()
        assert type(value) in (list, dict, str, int)
        if isinstance(value, list | dict):
            stack += value.values() if isinstance(value, dict) else value
    instances = read(world / SOURCES["refcoco"].instances)
    ids = {record["id"]: record for record in instances["annotations"]}
    assert len(ids) == len(instances["annotations"])
    assert all(ids[ref["ann_id"]]["image_id"] == ref["image_id"] for ref in refs)
    assert {ref["split"] for ref in refs} == {"train", "val"}
    for image in instances["images"]:
        assert (world / SOURCES["refcoco"].images / image["file_name"]).exists()


def test_chat_files(world):
    pretrain, instruct = SOURCES["llava_pretrain"], SOURCES["llava_instruct"]
    for source in (pretrain, instruct):
        for entry in read(world / source.annotations):
            turns = entry["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert sum("<image>" in turn["value"] for turn in turns) == ("image" in entry)
            assert "image" not in entry or (world / source.images / entry["image"]).exists()
            assert source is instruct or len(turns) == 2


def test_tokenizer_knows_every_word_and_gives_it_back(world, weights):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights / toy_config().model.llm)
    assert len(tokenizer) <= toy_config().model.llm_config["vocab_size"] - toy.SPARE_TOKENS
    built = toy.build_tokenizer(256)
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    sentences = [each["sent"] for ref in refs_of(world) for each in ref["sentences"]]
    for name in ("llava_pretrain", "llava_instruct"):
        for entry in read(world / SOURCES[name].annotations):
            sentences += [turn["value"] for turn in entry["conversations"]]
    for sentence in sentences:
        sentence = sentence.replace("<image>\n", "").replace("\n<image>", "")
        ids = tokenizer(sentence).input_ids
        assert tokenizer.unk_token_id not in ids, sentence
        assert tokenizer.decode(ids, skip_special_tokens=True) == sentence
        assert ids == built(sentence).input_ids


def test_words_are_the_same_tokens_everywhere(weights):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights / toy_config().model.llm)
    tokenizer.add_tokens(["<p>", "</p>"], special_tokens=True)
    texts = ("circle", "a circle", "<|user|>circle", "\ncircle", "<p>circle</p>", "circle, ")
    assert all(tokenizer.convert_tokens_to_ids("circle") in tokenizer(t).input_ids for t in texts)
    assert tokenizer("<p> circle </p>").input_ids == tokenizer("<p>circle</p>").input_ids
    turns = [{"role": "user", "content": "circle"}, {"role": "assistant", "content": "ring"}]
    for count, end in ((1, "<|assistant|>\n"), (2, "<|assistant|>\nring<|end|>\n")):
        text = tokenizer.apply_chat_template(
            turns[:count], tokenize=False, add_generation_prompt=count == 1
        )
        assert text == "<|user|>\ncircle<|end|>\n" + end


def test_weights_load_repeat_and_leave_torch_alone(weights, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, SamVisionModel, SiglipVisionModel

    model = toy_config().model
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    toy.write_weights(tmp_path / "weights", model, steps=3)
    assert hashes(tmp_path / "weights") == hashes(weights)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.get_num_threads() == threads
    kinds = (SamVisionModel, model.seg_encoder), (SiglipVisionModel, model.image_encoder)
    for kind, folder in (*kinds, (AutoModelForCausalLM, model.llm)):
        loaded, report = kind.from_pretrained(weights / folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert all(each.std() > 1e-3 for each in loaded.parameters() if each.dim() > 1)
