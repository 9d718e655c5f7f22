"""The toy world's datasets: the same bytes each time, labels that agree with the scenes, sentences
that hold.

pytest tests/test_world.py
"""

import base64
import csv
import hashlib
import io
import json
import pickle
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from xsam.datasets.registry import open_dataset
from xsam.datasets.sources import PROMPT_TYPES, SOURCES, locate
from xsam.evaluation.metrics import read_choice
from xsam.prompts import clean_name
from xsam.toy import scenes as toy_scenes
from xsam.toy import world as toy_world
from xsam.toy.scenes import COLORS, RADII, RIDDLES, STUFF_IDS, THING_IDS, Scene, plural

NUM_TRAIN, NUM_VAL = 24, 6
SINGULAR = {plural(name): name for name in THING_IDS}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("toy") / "data"
    toy_world.write_world(data, NUM_TRAIN, NUM_VAL)
    return data


@pytest.fixture(scope="module")
def drawings() -> dict[int, toy_world.Drawing]:
    both = [toy_world.draw_split(0, "train", NUM_TRAIN), toy_world.draw_split(0, "val", NUM_VAL)]
    return {drawing.image_id: drawing for split in both for drawing in split}


@pytest.fixture(scope="module")
def scenes(drawings) -> dict[int, Scene]:
    return {image_id: drawing.scene for image_id, drawing in drawings.items()}


def read(path: Path):
    return json.loads(path.read_text())


def read_table(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def png_ids(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int) @ [1, 256, 256**2]  # [H, W]


def decode(segmentation: dict | list, size: tuple[int, int]) -> np.ndarray:
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        return coco_mask.decode(segmentation) > 0
    parts = coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.decode(coco_mask.merge(parts if isinstance(parts, list) else [parts])) > 0


def places_named(text: str, scene: Scene) -> list[int]:
    """Segments that have every word of a phrase among their looks; a crowd may be of any size."""
    words = {SINGULAR.get(word, word) for word in text.split()}
    words -= {"the", "only", "all", "every", "shape", "shapes", "a", "many"}
    found = []
    for index, segment in enumerate(scene.segments):
        looks = {clean_name(segment.category), segment.color}
        looks |= set(RADII) if segment.is_crowd else {segment.size}
        if words <= looks:
            found.append(index)
    return found


def has_mask_of_one(mask: np.ndarray, phrase: str, scene: Scene) -> bool:
    return any((mask == scene.mask(index)).all() for index in places_named(phrase, scene))


# ---- the whole -----------------------------------------------------------------------------------


def test_same_bytes_twice_and_no_overwriting(world, tmp_path):
    toy_world.write_world(tmp_path / "data", NUM_TRAIN, NUM_VAL)
    assert hashes(tmp_path / "data") == hashes(world)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    with pytest.raises(FileExistsError, match="exists already"):
        toy_world.write_world(tmp_path / "data", 1, 1)


def test_a_world_of_one_drawing(tmp_path):
    toy_world.write_world(tmp_path / "data", 1, 1)


@pytest.mark.parametrize("name", SOURCES)
def test_every_path_of_every_source_is_written(world, name):
    assert all(locate(world, path).exists() for path in SOURCES[name].paths())


def test_no_generator_repeats_another(drawings):
    drawing = next(iter(drawings.values()))
    rngs = [drawing.generator(name) for name in toy_world.WRITERS]
    rngs.append(np.random.default_rng(drawing.entropy))
    assert len({rng.random() for rng in rngs}) == len(rngs)


# ---- scenes --------------------------------------------------------------------------------------


def test_things_stay_visible_and_differ_from_the_background(scenes):
    for scene in scenes.values():
        assert 2 <= len(scene.things()) <= 5
        for index, segment in enumerate(scene.segments):
            assert scene.mask(index).sum() > (40 if segment.is_thing else 500)


def test_void_is_small_and_in_some_images_only():
    drawings = toy_world.draw_split(0, "train", 40)
    shares = [(drawing.scene.segment_index == 0).mean() for drawing in drawings]
    assert 3 <= sum(share > 0 for share in shares) <= 20
    assert max(shares) < 0.1


def test_polygons_of_masks_at_the_border():
    mask = np.ones((6, 5), bool)
    mask[2:4, 1:3] = False
    assert (decode(toy_world.polygons(mask), (6, 5)) == mask).all()


# ---- COCO ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", "_val"])
def test_panoptic_and_semantic_pngs_agree_with_the_json(world, suffix):
    source, semantic = SOURCES[f"coco_panoptic{suffix}"], SOURCES[f"coco_semantic{suffix}"]
    content = read(world / source.annotations)
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"]: category for category in content["categories"]}
    largest, num_crowds = 0, 0
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        ids = png_ids(world / source.masks / annotation["file_name"])
        classes = np.asarray(Image.open(world / semantic.masks / annotation["file_name"]))
        assert ids.shape == (image["height"], image["width"])
        assert Image.open(world / source.images / image["file_name"]).size == ids.shape[::-1]
        areas = {each["id"]: each["area"] for each in annotation["segments_info"]}
        assert areas == {i: n for i, n in Counter(ids.ravel().tolist()).items() if i}
        assert (classes[ids == 0] == 255).all()
        for segment in annotation["segments_info"]:
            rows, columns = np.nonzero(ids == segment["id"])
            x, y, width, height = segment["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
            assert set(classes[rows, columns]) == {list(categories).index(segment["category_id"])}
        kinds = [categories[each["category_id"]]["isthing"] for each in annotation["segments_info"]]
        assert 1 <= kinds.count(0) <= 2 and kinds.count(1) >= 2
        largest = max(largest, *areas)
        num_crowds += sum(each["iscrowd"] for each in annotation["segments_info"])
    assert largest > 65535 and num_crowds > 0


@pytest.mark.parametrize("name", ["coco_instance", "coco_instance_val"])
def test_instances_cover_the_panoptic_pixels(world, scenes, name):
    for record in read(world / SOURCES[name].annotations)["annotations"]:
        scene = scenes[record["image_id"]]
        mask, expected = (
            decode(record["segmentation"], scene.segment_index.shape),
            scene.mask(record["id"] % 10),
        )
        iou = (mask & expected).sum() / (mask | expected).sum()
        assert iou == 1 if record["iscrowd"] else iou >= 0.9
        assert record["area"] == expected.sum()


@pytest.mark.parametrize("name", ["coco_interactive", "coco_interactive_val_point"])
def test_interactive_prompts_lie_on_their_objects(world, scenes, name):
    source = SOURCES[name]
    entries = read(world / source.annotations)
    assert len(entries) == (NUM_TRAIN if name == "coco_interactive" else NUM_VAL) // 2
    for entry in entries:
        assert (locate(world, source.images) / entry["image"]).exists()
        scene = scenes[entry["image_info"]["id"]]
        assert len(entry["anns"]) == sum(segment.is_thing for segment in scene.segments)
        for record in entry["anns"]:
            mask, size = scene.mask(record["id"] % 10), scene.segment_index.shape
            prompts = {k: decode(record[f"{k}_visual_prompt_mask"], size) for k in PROMPT_TYPES}
            assert all(prompt.any() for prompt in prompts.values())
            assert (prompts["point"] <= mask).all() and prompts["point"].sum() < 30  # not dilated
    assert any(record["iscrowd"] for entry in entries for record in entry["anns"])


@pytest.mark.parametrize("name", ["coco_vgd", "coco_vgd_val_box"])
def test_vgd_has_the_instances_without_crowds(world, name):
    source = SOURCES[name]
    records = read(world / source.instances)["annotations"]
    expected = {record["id"] for record in records if not record["iscrowd"]}
    entries = read(world / source.annotations)
    assert {each["id"] for entry in entries for each in entry["annotations"]} == expected
    assert len(expected) < len(records)


@pytest.mark.parametrize("kind", PROMPT_TYPES)
def test_vgd_prompts_can_be_shown_across_images(world, kind):
    dataset = open_dataset(f"coco_vgd_val_{kind}_cross", world)
    assert len(dataset) > 1
    for index in range(len(dataset)):
        sample = dataset.sample(index, np.random.default_rng(index))
        pixels = np.asarray(sample.image)
        assert not any(np.array_equal(np.asarray(image), pixels) for image in sample.region_images)


# ---- referring expressions -----------------------------------------------------------------------


def read_refs(world: Path, name: str) -> list[dict]:
    content = (world / SOURCES[name].annotations).read_bytes()
    return json.loads(content) if name == "grefcoco" else pickle.loads(content)


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_every_sentence_names_one_thing(world, scenes, name):
    for ref in read_refs(world, name):
        assert 1 <= len(ref["sentences"]) <= 3
        scene, place = scenes[ref["image_id"]], ref["ann_id"] % 10
        assert not scene.segments[place].is_crowd
        for sentence in ref["sentences"]:
            assert places_named(sentence["sent"], scene) == [place]


def test_general_expressions_hold_for_what_they_list(world, scenes):
    sizes = Counter()
    for ref in read_refs(world, "grefcoco"):
        scene = scenes[ref["image_id"]]
        places = [] if ref["ann_id"] == [-1] else [number % 10 for number in ref["ann_id"]]
        assert not any(scene.segments[index].is_crowd for index in places)
        assert [places_named(each["sent"], scene) for each in ref["sentences"]] == [places]
        sizes[min(len(places), 2)] += 1
    assert sizes[0] == NUM_TRAIN // 2 + NUM_VAL and min(sizes.values()) > 5


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog", "grefcoco"])
def test_refs_are_plain_and_point_at_annotations(world, name):
    refs = read_refs(world, name)
    stack = [refs]
    while stack:
        value = stack.pop()
        assert type(value) in (list, dict, str, int)
        if isinstance(value, list | dict):
            stack += value.values() if isinstance(value, dict) else value
    instances = read(world / SOURCES[name].instances)
    image_of = {record["id"]: record["image_id"] for record in instances["annotations"]}
    assert len(image_of) == len(instances["annotations"])
    for ref in refs:
        numbers = ref["ann_id"] if name == "grefcoco" else [ref["ann_id"]]
        assert all(image_of[each] == ref["image_id"] for each in numbers if each != -1)
    splits = {ref["image_id"]: ref["split"] for ref in refs}
    assert all(splits[ref["image_id"]] == ref["split"] for ref in refs)
    sources = [each for key, each in SOURCES.items() if key.split("_")[0] == name]
    assert set(splits.values()) == {source.split for source in sources}
    counts = Counter(splits[number] for number in splits)
    assert counts["val"] >= max(counts["testA"], counts["testB"], counts["test"])
    for image in instances["images"]:
        assert (world / SOURCES[name].images / image["file_name"]).exists()


# ---- reasoning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reasonseg", "reasonseg_val", "reasonseg_test"])
def test_reasoning_polygons_cover_the_answer_of_the_riddle(world, scenes, name):
    folder = world / SOURCES[name].annotations
    paths = sorted(folder.glob("*.json"))
    assert [path.stem for path in paths] == [path.stem for path in sorted(folder.glob("*.jpg"))]
    for path in paths:
        record, scene = read(path), scenes[int(path.stem)]
        assert 1 <= len(record["text"]) <= (3 if name == "reasonseg" else 1)
        texts = {c: r.questions if record["is_sentence"] else r.phrases for c, r in RIDDLES.items()}
        (category,) = [name for name in texts if set(record["text"]) <= set(texts[name])]
        expected = {"target": np.zeros(scene.segment_index.shape, bool)}
        for index, segment in enumerate(scene.segments):
            label = "ignore" if segment.is_crowd else "target"
            if segment.category == category:
                expected[label] = expected.get(label, 0) | scene.mask(index)
        assert {each["label"] for each in record["shapes"]} == set(expected)
        for label, mask in expected.items():
            canvas = Image.new("1", mask.shape[::-1])
            for shape in record["shapes"]:
                if shape["label"] == label:
                    corners = [(int(x), int(y)) for x, y in shape["points"]]
                    ImageDraw.Draw(canvas).polygon(corners, fill=1, outline=1)
            painted = np.asarray(canvas)
            assert (painted & mask).sum() / (painted | mask).sum() > 0.9


def test_half_of_the_riddles_are_explained(world):
    source = SOURCES["reasonseg"]
    explanations = read(world / source.instances)
    assert len(explanations) == NUM_TRAIN // 8
    for each in explanations:
        record = read((world / source.annotations / each["image"]).with_suffix(".json"))
        (riddle,) = [r for r in RIDDLES.values() if each["query"] in r.questions + r.phrases]
        assert each["query"] in record["text"] and each["outputs"] == riddle.explanation


# ---- grounded conversation -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gcg_grandf", "gcg_psg"])
def test_groundings_spell_and_cover_their_phrases(world, scenes, name):
    source = SOURCES[name]
    for record in read(world / source.annotations):
        scene, text = scenes[record["image_id"]], record["caption"]
        assert len(record["groundings"]) >= 3
        for phrase, grounding in record["groundings"].items():
            start, end = grounding["token_positives"]
            (rle,) = grounding["rle_masks"]
            assert text[start:end] == phrase
            assert has_mask_of_one(decode(rle, scene.segment_index.shape), phrase, scene)
        folders = [locate(world, source.images) / each for each in ("", "train2017")]
        assert any((folder / record["file_name"]).is_file() for folder in folders)


def test_gcg_of_refcocog_and_flickr_agree_with_the_scenes(world, drawings):
    source = SOURCES["gcg_refcocog"]
    for entry in read(world / source.annotations):
        ((key, record),) = entry.items()
        scene = drawings[int(key)].scene
        assert (locate(world, source.images) / record["img_file_name"]).exists()
        assert len(record["refs"]) == len(scene.segments)
        for ref in record["refs"]:
            assert ref["sentence"] in record["caption"]
            mask = decode(ref["segmentation"], scene.segment_index.shape)
            assert has_mask_of_one(mask, ref["sentence"], scene)

    source = SOURCES["gcg_flickr"]
    content = read(world / source.annotations)
    images = {image["id"]: image for image in content["images"]}
    for record in content["annotations"]:
        image = images[record["image_id"]]
        scene = drawings[int(image["file_name"].removesuffix(".jpg"))].scene
        assert (image["height"], image["width"]) == scene.segment_index.shape
        ((start, end),) = record["tokens_positive"]
        mask = decode(record["sam_mask"], scene.segment_index.shape)
        assert has_mask_of_one(mask, image["caption"][start:end], scene)


@pytest.mark.parametrize("name", ["gcg_val", "gcg_test"])
def test_scored_gcg_agrees_with_the_scenes(world, drawings, name):
    source = SOURCES[name]
    masks, captions = read(world / source.annotations), read(world / source.instances)
    assert "info" not in masks and masks["images"] == captions["images"]
    assert len(masks["images"]) == NUM_VAL // 2
    for caption in captions["annotations"]:
        drawing = drawings[int(caption["image_id"].removeprefix("sa_"))]
        path = world / source.images / f"{caption['image_id']}.jpg"
        assert path.read_bytes() == drawing.jpeg
        records = [m for m in masks["annotations"] if m["image_id"] == caption["image_id"]]
        for record, label in zip(records, caption["labels"], strict=True):
            mask = decode(record["segmentation"], drawing.scene.segment_index.shape)
            assert label in caption["caption"]
            assert has_mask_of_one(mask, label, drawing.scene)


# ---- ADE20K --------------------------------------------------------------------------------------


def test_ade20k_names_the_segments_by_color_and_shape(world, drawings):
    source, semantic = SOURCES["ade20k_panoptic_val"], SOURCES["ade20k_semantic_val"]
    content = read(world / source.annotations)
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert {type(record["image_id"]) for record in content["annotations"]} == {str}
    assert list(names) == list(range(28)) and not set(names.values()) & set(THING_IDS)
    assert [each["isthing"] for each in content["categories"]] == [0] * 4 + [1] * 24
    assert any("," in name for name in names.values()) and "checks " in names.values()
    pictures = {drawing.jpeg: drawing.scene for drawing in drawings.values()}
    num_things = 0
    for record in content["annotations"]:
        scene = pictures[(world / source.images / f"{record['image_id']}.jpg").read_bytes()]
        ids = png_ids(world / source.masks / record["file_name"])
        classes = np.asarray(Image.open(world / semantic.masks / record["file_name"]))
        found = {
            (names[s["category_id"]], s["area"]): ids == s["id"] for s in record["segments_info"]
        }
        rest = np.ones(ids.shape, bool)
        for index, segment in enumerate(scene.segments):
            mask, name = scene.mask(index), f"{segment.color} {segment.category}"
            if segment.category in STUFF_IDS:
                name = toy_world.ADE_STUFF[segment.category]
            if name in names.values() and not segment.is_crowd:
                assert (found.pop((name, mask.sum())) == mask).all()
                assert {names[number] for number in classes[mask]} == {name}
                num_things, rest = num_things + segment.is_thing, rest & ~mask
        assert not found and (ids[rest] == 0).all() and (classes[rest] == 255).all()
    instances = read(world / SOURCES["ade20k_instance_val"].annotations)
    assert len(instances["annotations"]) == num_things > 0


# ---- chat ----------------------------------------------------------------------------------------


def test_chat_files(world):
    pretrain, instruct = SOURCES["llava_pretrain"], SOURCES["llava_instruct"]
    for source in (pretrain, instruct):
        for entry in read(world / source.annotations):
            turns = entry["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert sum("<image>" in turn["value"] for turn in turns) == 1
            assert (world / source.images / entry["image"]).exists()
            assert source is instruct or len(turns) == 2


@pytest.mark.parametrize("name", [name for name in SOURCES if SOURCES[name].format == "tsv"])
def test_benchmarks_ask_what_their_pictures_answer(world, drawings, name):
    csv.field_size_limit(2**24)
    rows = read_table(world / SOURCES[name].annotations)
    assert 12 <= len(rows) <= toy_world.NUM_ROWS
    assert len({row["index"] for row in rows}) == len(rows)
    images = {row["index"]: row["image"] for row in rows}
    pictures = {drawing.jpeg: drawing.scene for drawing in drawings.values()}
    num_indices = 0
    for row in rows:
        num_indices += row["image"] in images
        content = base64.b64decode(images.get(row["image"], row["image"]))
        scene = pictures[content]
        assert Image.open(io.BytesIO(content)).size == scene.segment_index.shape[::-1]
        things = [segment for segment in scene.segments if segment.is_thing]
        question, answer = row["question"], row["answer"]
        options = [row[letter] for letter in "ABCD" if row.get(letter)]
        assert len(options) == len(set(options)) and ("A" in row) == (answer in tuple("ABCD"))
        answer = row[answer] if options else answer
        words = question.replace(" Answer", " Please").split(" Please")[0].strip("?").split()
        numbers = ["one", "two", "three", "four", "five"]
        if question.startswith("What color"):
            assert {each.color for each in things if each.category == words[-1]} == {answer}
        elif question.startswith("How many"):
            assert len(things) == numbers.index(answer) + 1
        elif question.startswith("There are"):
            assert answer == ("Yes" if words[2] == numbers[len(things) - 1] else "No")
        elif question.startswith("What is the background"):
            assert scene.background() == answer
        else:
            about = {each.category: each.color for each in things}
            is_so = about.get(words[-1], "") != "" or about.get(words[2]) == words[-1]
            assert answer == ("Yes" if is_so else "No")
    assert (num_indices > 0) == (name == "mmbench")
    if name == "mme":
        pairs = Counter((row["image_path"], row["category"]) for row in rows)
        assert set(pairs.values()) == {2}
    kinds = {"mme": {"existence", "color", "numerical_calculation"}, "pope": {"existence", "color"}}
    if name in kinds:
        assert {row["category"] for row in rows} == kinds[name]
        answers = [row["answer"] for row in rows]
        assert answers == ["Yes", "No"] * (len(rows) // 2)


def test_mmbench_asks_with_the_options_in_every_order_of_a_circle(world):
    """As the public table: copies of a question differ by a million, and show the first's image."""
    csv.field_size_limit(2**24)
    rows = read_table(world / SOURCES["mmbench"].annotations)
    questions = defaultdict(list)
    for row in rows:
        questions[int(row["index"]) % 1_000_000].append(row)
    assert sorted(questions) == list(range(len(questions))) and len(questions) > 5
    for number, copies in questions.items():
        options = [[row[letter] for letter in "ABCD" if row[letter]] for row in copies]
        count = len(options[0])
        indices = [number + turn * 1_000_000 for turn in range(count)]
        assert [int(row["index"]) for row in copies] == indices
        assert sorted(options) == sorted(options[0][k:] + options[0][:k] for k in range(count))
        assert len({row[row["answer"]] for row in copies}) == 1
        assert {row["answer"] for row in copies} == set("ABCD"[:count])
        assert len({(row["question"], row["hint"], row["category"]) for row in copies}) == 1
        assert all(len(row["image"]) < 64 for row in copies[1:])
        assert len({row["image"] for row in copies[1:]}) == 1


def test_a_checklist_says_of_each_whether_it_is_so():
    rng, kinds = np.random.default_rng(0), Counter()
    for _ in range(200):
        scene = toy_scenes.imagine_scene(rng)
        answers = {asked: answer for _, asked, answer, _ in toy_scenes.quizzes(scene)}
        turns = toy_world.chat_turns(rng, scene)
        ((asked, answer),) = [turn for turn in turns if toy_world.OF_EACH in turn[0]]
        marks = dict(each.split() for each in answer.strip(".").split(", "))
        assert set(marks.values()) == {"yes", "no"}
        found = {each for each, mark in marks.items() if mark == "yes"}
        question = re.split(r"(?<=\?)\s", asked, maxsplit=1)[0]
        if question in answers:
            assert marks.keys() == set(COLORS) and found == {answers[question]}
        else:
            assert marks.keys() == set(THING_IDS)
            assert found == {segment.category for segment in scene.segments if segment.is_thing}
        kinds[question in answers] += 1
    assert len(kinds) == 2 and min(kinds.values()) > 60


def test_an_option_is_answered_by_its_text():
    """Which is the right one, and which the field's matching takes for its letter."""
    rng, count = np.random.default_rng(0), 0
    for _ in range(50):
        scene = toy_scenes.imagine_scene(rng)
        answers = {asked: answer for _, asked, answer, _ in toy_scenes.quizzes(scene)}
        for asked, answer in toy_world.chat_turns(rng, scene):
            if options := dict(re.findall(r"^([A-D])\. (.+)$", asked, re.MULTILINE)):
                question = asked.removeprefix(toy_world.HINT).strip().partition("\n")[0]
                assert answer == answers[question]
                assert options[read_choice(answer, options)] == answer
                count += 1
    assert count > 50


def test_every_color_and_shape_is_asked_for_somewhere():
    assert {name for _, name in toy_world.ADE_THINGS} == set(RIDDLES) == set(THING_IDS)
    assert {color for color, _ in toy_world.ADE_THINGS} < set(COLORS)
