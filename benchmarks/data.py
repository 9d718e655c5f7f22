"""How fast one core reads each data layout, beside a plain loop that does the same work.

    python benchmarks/data.py
    python benchmarks/data.py --quick

Writes photographs of 640x480 with up to twelve segments in every layout on disk, into a temporary
folder. Ours is `Dataset.sample`, and that with `Processor.encode` at the sizes of the full preset.
The plain loop is what one would write with PIL, NumPy and pycocotools for that layout alone; its
annotations are parsed beforehand, as ours are. Both run in turns on one thread; what is told is the
median over the rounds, in CPU time, so that other work on the machine disturbs both alike.
"""

import argparse
import base64
import csv
import dataclasses
import io
import json
import pickle
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from scipy import ndimage
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xsam.config import xsam
from xsam.data import SEG_MEAN, SEG_STD, Processor
from xsam.datasets.formats import encode_mask
from xsam.datasets.registry import READERS
from xsam.datasets.sources import PROMPT_TYPES, Source
from xsam.llm import add_special_tokens
from xsam.prompts import join_phrases, read_phrasings

HEIGHT, WIDTH, NUM_SEGMENTS, NUM_CLASSES = 480, 640, 12, 133
SEG_SIZE, IMAGE_SIZE, NUM_POINTS = 1024, 384, 256  # of the full preset
NUM_IMAGE_TOKENS = 27**2 + 32**2
PHRASINGS = read_phrasings("")
SCALES = np.linspace(*xsam().stages[1].scale_range, 12)  # in place of random ones, for both


# ---- what is read --------------------------------------------------------------------------------


@dataclass
class Scene:
    """One photograph: its COCO image record, segments, their classes and outlines."""

    info: dict
    cells: np.ndarray  # [H, W], the number of each pixel's segment
    objects: list[dict]  # COCO annotations
    rles: list[dict]

    @property
    def name(self) -> str:
        return self.info["file_name"]


def photograph(rng: np.random.Generator) -> np.ndarray:
    """Smooth and fine noise, whose JPEG is as large as a photograph's. uint8 [H, W, 3]"""
    smooth = ndimage.zoom(rng.normal(size=(8, 10, 3)), (60, 64, 1), order=3)
    fine = ndimage.gaussian_filter(rng.normal(size=(HEIGHT, WIDTH, 3)), (1.0, 1.0, 0))
    return (128 + 50 * smooth + 60 * fine).clip(0, 255).astype(np.uint8)


def draw_scene(number: int, rng: np.random.Generator) -> Scene:
    """Cells with wavy borders, of random classes."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    waves = 12 * ndimage.zoom(rng.normal(size=(2, 12, 16)), (1, 40, 40), order=3)
    centres = rng.uniform((0, 0), (HEIGHT, WIDTH), (NUM_SEGMENTS, 2))
    far = [(rows + waves[0] - y) ** 2 + (columns + waves[1] - x) ** 2 for y, x in centres]
    _, cells = np.unique(np.argmin(far, axis=0), return_inverse=True)
    cells = cells.reshape(HEIGHT, WIDTH)
    masks = [cells == n for n in range(cells.max() + 1)]
    objects = [
        dict(
            id=number * NUM_SEGMENTS + n,
            image_id=number,
            category_id=int(rng.integers(NUM_CLASSES)),
            iscrowd=0,
            segmentation=[np.ravel(outline(mask)).tolist()],
        )
        for n, mask in enumerate(masks)
    ]
    info = dict(id=number, file_name=f"{number}.jpg", height=HEIGHT, width=WIDTH)
    return Scene(info, cells, objects, [encode_mask(mask) for mask in masks])


def outline(mask: np.ndarray, num_corners: int = 40) -> list[list[float]]:
    """Corners [x, y] around a cell, by their angle about its middle."""
    rows, columns = np.nonzero(mask & ~ndimage.binary_erosion(mask))
    order = np.argsort(np.arctan2(rows - rows.mean(), columns - columns.mean()))
    chosen = order[np.linspace(0, len(order) - 1, num_corners).astype(int)]
    return np.stack([columns, rows], 1)[chosen].astype(float).tolist()


def write_images(root: Path, scenes: list[Scene], rng: np.random.Generator) -> None:
    for folder in ("images", "panoptic", "semantic", "reason"):
        (root / folder).mkdir()
    for scene in scenes:
        path, stem = root / "images" / scene.name, scene.info["id"]
        Image.fromarray(photograph(rng)).save(path, quality=90)
        (root / "reason" / scene.name).symlink_to(path)
        ids = segment_ids(scene)
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        Image.fromarray(colours).save(root / f"panoptic/{stem}.png")
        classes = np.array([each["category_id"] for each in scene.objects], np.uint8)
        Image.fromarray(classes[scene.cells]).save(root / f"semantic/{stem}.png")


def segment_ids(scene: Scene) -> np.ndarray:
    return scene.cells * 997 + 70_000


def panoptic_json(scenes: list[Scene]) -> dict:
    annotations = [
        dict(
            image_id=scene.info["id"],
            segments_info=[
                dict(id=70_000 + 997 * n, category_id=each["category_id"], iscrowd=0)
                for n, each in enumerate(scene.objects)
            ],
        )
        for scene in scenes
    ]
    return coco_json(scenes) | dict(annotations=annotations)


def coco_json(scenes: list[Scene]) -> dict:
    return dict(
        images=[scene.info for scene in scenes],
        annotations=[each for scene in scenes for each in scene.objects],
        categories=[dict(id=n, name=f"thing number {n}", isthing=1) for n in range(NUM_CLASSES)],
    )


def refs_list(scenes: list[Scene]) -> list[dict]:
    texts = [f"the {word} thing" for word in ("left", "red", "big")]
    return [
        dict(
            ref_id=each["id"],
            ann_id=each["id"],
            image_id=scene.info["id"],
            split="train",
            sentences=[dict(sent=f"{text} of {n}") for text in texts],
        )
        for scene in scenes
        for n, each in enumerate(scene.objects[:3])
    ]


def reason_json(scene: Scene) -> dict:
    rings = [np.reshape(each["segmentation"], (-1, 2)).tolist() for each in scene.objects[:2]]
    labels = ("target", "ignore")
    shapes = [dict(label=label, points=ring) for label, ring in zip(labels, rings, strict=True)]
    return dict(text=["what lies at the left of this ?"], is_sentence=True, shapes=shapes)


CAPTION = "here is one beside two beside three beside four"
SPANS = [(CAPTION.index(word), CAPTION.index(word) + len(word)) for word in CAPTION.split()[2::2]]


def grounded_json(scenes: list[Scene]) -> list[dict]:
    return [
        dict(file_name=scene.name, image_id=scene.info["id"], height=HEIGHT, width=WIDTH)
        | dict(
            caption=CAPTION,
            groundings={
                CAPTION[start:end]: dict(token_positives=[start, end], rle_masks=[rle])
                for (start, end), rle in zip(SPANS, scene.rles, strict=False)
            },
        )
        for scene in scenes
    ]


def gcg_refs_json(scenes: list[Scene]) -> list[dict]:
    records = []
    for scene in scenes:
        refs = [
            dict(sentence=CAPTION[start:end], segmentation=each["segmentation"])
            for (start, end), each in zip(SPANS, scene.objects, strict=False)
        ]
        record = dict(img_file_name=scene.name, caption=CAPTION, refs=refs)
        records.append({scene.name: record | dict(height=HEIGHT, width=WIDTH)})
    return records


def flickr_json(scenes: list[Scene]) -> dict:
    annotations = [
        dict(image_id=scene.info["id"], tokens_positive=[list(span)], sam_mask=rle)
        for scene in scenes
        for span, rle in zip(SPANS, scene.rles, strict=False)
    ]
    images = [scene.info | dict(caption=CAPTION) for scene in scenes]
    return dict(images=images, annotations=annotations)


def psalm_json(scenes: list[Scene]) -> list[dict]:
    def prompted(each: dict, rle: dict) -> dict:
        return each | {f"{kind}_visual_prompt_mask": rle for kind in PROMPT_TYPES}

    return [
        dict(image=scene.name, image_info=scene.info)
        | dict(anns=list(map(prompted, scene.objects, scene.rles)))
        for scene in scenes
    ]


def vgd_json(scenes: list[Scene]) -> list[dict]:
    def prompted(each: dict, rle: dict) -> dict:
        return each | dict(visual_prompts={f"{kind}_visual_prompt": rle for kind in PROMPT_TYPES})

    return [
        dict(image_file=scene.name, image_info=scene.info)
        | dict(annotations=list(map(prompted, scene.objects, scene.rles)))
        for scene in scenes
    ]


def chat_json(scenes: list[Scene]) -> list[dict]:
    turns = []
    for n in range(3):
        turns.append({"from": "human", "value": f"what is the thing at {n} ?"})
        turns.append({"from": "gpt", "value": "the thing at the left of this is big and red ."})
    return [dict(id=scene.info["id"], image=scene.name, conversations=turns) for scene in scenes]


def table_rows(root: Path, scenes: list[Scene]) -> list[dict]:
    images = [(root / "images" / scene.name).read_bytes() for scene in scenes]
    return [
        dict(index=number, image=base64.b64encode(image).decode(), question="what ?", answer="red")
        for number, image in enumerate(images)
    ]


# ---- the plain loop ------------------------------------------------------------------------------


class Plain:
    """What one would write for each layout; `build_tokenizer`'s chat template is known to it."""

    def __init__(self, root: Path, tokenizer: PreTrainedTokenizerFast):
        self.root, self.tokenizer = root, tokenizer
        self.mean, self.std = np.float32(SEG_MEAN), np.float32(SEG_STD)

    def open(self, name: str) -> Image.Image:
        return Image.open(self.root / "images" / name).convert("RGB")

    def normalised(self, image: Image.Image) -> torch.Tensor:
        """The image in the upper left of a canvas, [3, S, S]."""
        canvas = np.zeros((SEG_SIZE, SEG_SIZE, 3), np.float32)
        canvas[: image.height, : image.width] = (np.asarray(image) - self.mean) / self.std
        return torch.from_numpy(np.ascontiguousarray(canvas.transpose(2, 0, 1)))

    def padded(self, masks: np.ndarray) -> torch.Tensor:
        canvas = np.zeros((len(masks), SEG_SIZE, SEG_SIZE), bool)
        canvas[:, : masks.shape[1], : masks.shape[2]] = masks
        return torch.from_numpy(canvas)

    def squashed(self, image: Image.Image) -> torch.Tensor:
        """For the image encoder, [3, s, s]."""
        small = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        pixels = np.asarray(small, np.float32) / 127.5 - 1
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def text(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        ids, labels = [-200] * NUM_IMAGE_TOKENS, [-100] * NUM_IMAGE_TOKENS
        for question, answer in turns:
            asked = self.tokenizer.encode(f"<|user|> {question} <|end|> <|assistant|>")
            answered = self.tokenizer.encode(f"{answer} <|end|>")
            ids += asked + answered
            labels += [-100] * len(asked) + answered
        return ids, labels

    def item(self, image: Image.Image, masks: list[np.ndarray], turns: list, regions=()) -> tuple:
        """Everything that the model reads of an image that fits the canvas."""
        factor = SEG_SIZE / max(image.size)
        size = round(image.width * factor), round(image.height * factor)
        resized = [
            np.array(Image.fromarray(m).resize(size, Image.Resampling.NEAREST)) for m in masks
        ]
        points = []
        for region in regions:
            pixels = np.argwhere(region)
            chosen = np.random.choice(len(pixels), NUM_POINTS, replace=len(pixels) < NUM_POINTS)
            points.append(torch.from_numpy(pixels[chosen] * factor / SEG_SIZE).float())
        return (
            self.normalised(image.resize(size, Image.Resampling.BILINEAR)),
            self.padded(np.stack(resized)) if masks else None,
            self.squashed(image),
            self.text(turns),
            points,
        )

    def names(self, task: str, names: list[str]) -> list[tuple[str, str]]:
        words = PHRASINGS[task]
        return [(words["questions"][0].format(phrases=join_phrases(names)), words["answers"][0])]

    def segmented(self, segmentation: dict | list) -> np.ndarray:
        if isinstance(segmentation, list):
            segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, HEIGHT, WIDTH))
        return coco_mask.decode(segmentation).astype(bool)

    def panoptic(self, scene: Scene, is_augmented: bool) -> tuple:
        image = self.open(scene.name)
        png = Image.open(self.root / f"panoptic/{scene.info['id']}.png").convert("RGB")
        scale = SCALES[scene.info["id"] % len(SCALES)] if is_augmented else 1
        factor = SEG_SIZE / WIDTH * scale
        size = max(1, round(WIDTH * factor)), max(1, round(HEIGHT * factor))
        left, top = (np.random.randint(max(0, side - SEG_SIZE) + 1) for side in size)
        box = left, top, min(size[0], left + SEG_SIZE), min(size[1], top + SEG_SIZE)
        colours = np.asarray(png.resize(size, Image.Resampling.NEAREST).crop(box), np.int32)
        ids = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
        masks = np.stack([ids == 70_000 + 997 * n for n in range(len(scene.objects))])
        resized = image.resize(size, Image.Resampling.BILINEAR).crop(box)
        if is_augmented:
            return self.normalised(resized), self.padded(masks), self.padded(~masks.any(0)[None])
        present = {each["category_id"] for each in scene.objects}
        others = np.random.permutation(NUM_CLASSES)[: np.random.randint(NUM_CLASSES)].tolist()
        names = [f"thing number {n}" for n in [*present, *(set(others) - present)]]
        masks = self.padded(masks), self.padded(~masks.any(0)[None])
        words = self.text(self.names("generic", names))
        return self.normalised(resized), *masks, self.squashed(image), words

    def semantic(self, scene: Scene) -> tuple:
        image = self.open(scene.name)
        png = Image.open(self.root / f"semantic/{scene.info['id']}.png")
        size = SEG_SIZE, round(HEIGHT * SEG_SIZE / WIDTH)
        classes = np.asarray(png.resize(size, Image.Resampling.NEAREST))
        masks = np.stack([classes == n for n in np.unique(classes)])
        others = np.random.permutation(NUM_CLASSES)[: np.random.randint(NUM_CLASSES)].tolist()
        turns = self.names("generic", [f"thing number {n}" for n in others])
        pixels = self.normalised(image.resize(size, Image.Resampling.BILINEAR))
        return pixels, self.padded(masks), self.squashed(image), self.text(turns)

    def instances(self, scene: Scene) -> tuple:
        masks = [self.segmented(each["segmentation"]) for each in scene.objects]
        others = np.random.permutation(NUM_CLASSES)[: np.random.randint(NUM_CLASSES)].tolist()
        turns = self.names("generic", [f"thing number {n}" for n in others])
        return self.item(self.open(scene.name), masks, turns)

    def refer(self, scene: Scene) -> tuple:
        masks = [self.segmented(each["segmentation"]) for each in scene.objects[:3]]
        turns = [self.names("refer", [f"the left thing of {n}"])[0] for n in range(3)]
        return self.item(self.open(scene.name), masks, turns)

    def reason(self, record: dict, scene: Scene) -> tuple:
        labels = Image.new("L", (WIDTH, HEIGHT))
        for value, each in ((1, record["shapes"][0]), (255, record["shapes"][1])):
            corners = [(int(x), int(y)) for x, y in each["points"]]
            ImageDraw.Draw(labels).polygon(corners, fill=value, outline=value)
        labels = np.asarray(labels)
        turns = self.names("reason", record["text"])
        return self.item(self.open(scene.name), [labels == 1, labels == 255], turns)

    def caption(self, scene: Scene, shapes: list) -> tuple:
        words = CAPTION
        for start, end in reversed(SPANS):
            words = f"{words[:start]}<p>{words[start:end]}</p>{words[end:]}"
        turns = [(PHRASINGS["gcg"]["questions"][0], f"{words} <SEG>")]
        return self.item(self.open(scene.name), [self.segmented(each) for each in shapes], turns)

    def interactive(self, scene: Scene) -> tuple:
        n = np.random.randint(len(scene.objects))
        mask, prompt = self.segmented(scene.objects[n]["segmentation"]), scene.rles[n]
        turns = self.names("interactive", ["region"])
        return self.item(self.open(scene.name), [mask], turns, [self.segmented(prompt)])

    def vgd(self, scene: Scene) -> tuple:
        shown = defaultdict(list)
        for each, rle in zip(scene.objects, scene.rles, strict=True):
            shown[each["category_id"]].append(rle)
        masks = [self.segmented(each["segmentation"]) for each in scene.objects]
        regions = [self.segmented(found[np.random.randint(len(found))]) for found in shown.values()]
        turns = self.names("vgd", ["region"] * len(regions))
        return self.item(self.open(scene.name), masks, turns, regions)

    def chat(self, record: dict) -> tuple:
        texts = [turn["value"] for turn in record["conversations"]]
        return self.item(
            self.open(record["image"]), [], list(zip(texts[::2], texts[1::2], strict=True))
        )

    def row(self, row: dict) -> tuple:
        image = Image.open(io.BytesIO(base64.b64decode(row["image"]))).convert("RGB")
        return self.item(image, [], [(row["question"], row["answer"])])


# ---- both, in turns ------------------------------------------------------------------------------


@dataclass
class Layout:
    name: str
    source: Source
    stage: int
    plain: Callable[[int], tuple]


def write_layouts(root: Path, scenes: list[Scene], plain: Plain) -> list[Layout]:
    """Writes the annotations of all layouts; each of them has a sample for each scene, or more."""
    records = {
        "panoptic.json": panoptic_json(scenes),
        "coco.json": coco_json(scenes),
        "grounded.json": grounded_json(scenes),
        "gcg_refs.json": gcg_refs_json(scenes),
        "flickr.json": flickr_json(scenes),
        "psalm.json": psalm_json(scenes),
        "vgd.json": vgd_json(scenes),
        "chat.json": chat_json(scenes),
    }
    for name, content in records.items():
        (root / name).write_text(json.dumps(content))
    (root / "refs.p").write_bytes(pickle.dumps(refs_list(scenes), protocol=2))
    reasons, rows = [reason_json(scene) for scene in scenes], table_rows(root, scenes)
    for scene, record in zip(scenes, reasons, strict=True):
        (root / "reason" / f"{scene.info['id']}.json").write_text(json.dumps(record))
    with (root / "table.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)

    def source(task: str, layout: str, file: str, masks: str = "", prompt: str = "") -> Source:
        needs_names = layout in ("refs", "visual_prompts")
        names = "coco.json" if needs_names else ""
        return Source(task, layout, file, "images", masks, names, "train", prompt)

    s, chats = scenes, records["chat.json"]
    scenic = source("generic", "panoptic", "panoptic.json", "panoptic")
    semantic = source("generic", "semantic", "panoptic.json", "semantic")
    shown = source("interactive", "visual_prompts", "psalm.json", prompt="mask")
    kinds = source("vgd", "visual_prompts", "vgd.json", prompt="mask")
    reason = Source("reason", "reason", "reason", split="train")
    grounded = source("gcg", "gcg_grounded", "grounded.json")
    spoken = source("gcg", "gcg_refs", "gcg_refs.json")
    flickr = source("gcg", "gcg_flickr", "flickr.json")
    return [
        Layout("COCO panoptic, stage 1", scenic, 1, lambda n: plain.panoptic(s[n], True)),
        Layout("COCO panoptic, stage 3", scenic, 3, lambda n: plain.panoptic(s[n], False)),
        Layout(
            "COCO instances",
            source("generic", "instance", "coco.json"),
            3,
            lambda n: plain.instances(s[n]),
        ),
        Layout("COCO semantic", semantic, 3, lambda n: plain.semantic(s[n])),
        Layout("RefCOCO", source("refer", "refs", "refs.p"), 3, lambda n: plain.refer(s[n])),
        Layout("ReasonSeg", reason, 3, lambda n: plain.reason(reasons[n], s[n])),
        Layout("GCG, annotated", grounded, 3, lambda n: plain.caption(s[n], s[n].rles[:4])),
        Layout(
            "GCG, RefCOCOg",
            spoken,
            3,
            lambda n: plain.caption(s[n], [each["segmentation"] for each in s[n].objects[:4]]),
        ),
        Layout("GCG, Flickr", flickr, 3, lambda n: plain.caption(s[n], s[n].rles[:4])),
        Layout("COCO-Interactive", shown, 3, lambda n: plain.interactive(s[n])),
        Layout("COCO-VGD", kinds, 3, lambda n: plain.vgd(s[n])),
        Layout("LLaVA", source("chat", "llava", "chat.json"), 3, lambda n: plain.chat(chats[n])),
        Layout(
            "benchmark TSV", Source("chat", "tsv", "table.tsv"), 3, lambda n: plain.row(rows[n])
        ),
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the prompts, in Phi-3's chat layout."""
    texts = [text for task in PHRASINGS.values() for texts in task.values() for text in texts]
    words = " ".join([*texts, CAPTION, "thing number left red big", *map(str, range(NUM_CLASSES))])
    special = ["<unk>", "<pad>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    splitter = pre_tokenizers.BertPreTokenizer()
    known = [word for word, _ in splitter.pre_tokenize_str(words)]
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys(special + known))}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = splitter
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
        chat_template="{% for message in messages %}<|{{ message['role'] }}|>\n"
        "{{ message['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    )
    add_special_tokens(tokenizer)
    return tokenizer


def seconds(function: Callable[[int], object], count: int) -> float:
    """CPU time of one call, over `count` calls."""
    start = time.process_time()
    for number in range(count):
        function(number)
    return (time.process_time() - start) / count


def measure(functions: dict, count: int, num_rounds: int) -> dict[tuple, list[float]]:
    """Seconds of each function in each round; all have their turn in a round, after one unmeasured
    call."""
    times: dict[tuple, list[float]] = defaultdict(list)
    for function in functions.values():
        function(0)
    for _ in range(num_rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, count))
    return times


def floor(root: Path, scenes: list[Scene]) -> dict[tuple, Callable[[int], object]]:
    """What no loop can do without."""
    paths = [root / "images" / scene.name for scene in scenes]
    images = [Image.open(path).convert("RGB") for path in paths]
    size = SEG_SIZE, round(HEIGHT * SEG_SIZE / WIDTH)
    square = IMAGE_SIZE, IMAGE_SIZE
    return {
        ("decode the JPEG", ""): lambda n: Image.open(paths[n]).convert("RGB"),
        ("resize to 1024", ""): lambda n: images[n].resize(size, Image.Resampling.BILINEAR),
        ("resize to 384x384", ""): lambda n: images[n].resize(square, Image.Resampling.BICUBIC),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=24, help="photographs (default: 24)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--only", default="", help="only layouts whose name holds this")
    parser.add_argument("--quick", action="store_true", help="read 4 images in 2 rounds")
    options = parser.parse_args()
    num_images, num_rounds = (4, 2) if options.quick else (options.images, options.rounds)
    torch.set_num_threads(1)
    rng, config, tokenizer = np.random.default_rng(0), xsam(), build_tokenizer()
    scenes = [draw_scene(number, rng) for number in range(num_images)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, scenes, rng)
        functions = floor(root, scenes)
        layouts = write_layouts(root, scenes, Plain(root, tokenizer))
        layouts = [each for each in layouts if options.only in each.name]
        for layout in layouts:
            is_first = layout.stage == 1
            dataset = READERS[layout.source.format](layout.name, layout.source, root, is_first)
            processor = Processor(config, None if is_first else tokenizer)
            stage = config.stages[layout.stage]

            def sample(n: int, dataset=dataset):
                return dataset.sample(n, rng)

            def encode(n: int, dataset=dataset, processor=processor, stage=stage):
                if stage.scale_range:
                    scale = SCALES[n % len(SCALES)]
                    stage = dataclasses.replace(stage, scale_range=(scale, scale))
                return processor.encode(dataset.sample(n, rng), stage, rng)

            functions[layout.name, "sample"] = sample
            functions[layout.name, "encode"] = encode
            functions[layout.name, "plain"] = layout.plain
        size = statistics.mean((root / "images" / scene.name).stat().st_size for scene in scenes)
        times = measure(functions, num_images, num_rounds)

    print(f"{num_images} photographs of {size / 1000:.0f} kB, {num_rounds} rounds\n")
    print("| images/s of one core | sample | sample + encode | plain loop | ours / plain |")
    print("|---|---|---|---|---|")
    for name in (layout.name for layout in layouts):
        rates = [1 / statistics.median(times[name, kind]) for kind in ("sample", "encode", "plain")]
        pairs = zip(times[name, "plain"], times[name, "encode"], strict=True)
        ratio = statistics.median(plain / ours for plain, ours in pairs)
        print(f"| {name} | " + " | ".join(f"{rate:.0f}" for rate in rates) + f" | {ratio:.2f} |")
    print("\n| at the least | images/s | ms |\n|---|---|---|")
    for (name, kind), found in times.items():
        if not kind:
            middle = statistics.median(found)
            print(f"| {name} | {1 / middle:.0f} | {1000 * middle:.1f} |")


if __name__ == "__main__":
    main()
