"""Datasets as they lie on disk, prompts, sampling and batching.

From the public files to the tensors that the model and the criterion read (paper tables 1 and 7). A
dataset gives a `Sample` (image, turns, masks at the image's own size); the `Processor` places it on
the canvas, tokenizes it and collates a `Batch`; the `Mixture` says which samples make which global
batch. Everything random is drawn from (seed, epoch, dataset, place in the epoch), so any number of
ranks and workers, and a resumed run, see the same.
Legend: B images of a batch, R decoder runs, T targets, G visual prompts, H W image size, S canvas
side, N tokens, P points.
"""

import itertools
import json
import math
import pickle
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xsam.config import SOURCES, Config, Source, Stage
from xsam.encoders import Placement, image_pixels, seg_pixels
from xsam.llm import IGNORE_LABEL, render_conversation, tokenize
from xsam.losses import Targets

# Question and answer phrasings of each task: {phrases} becomes "<p>name</p>, <p>name</p>" (or one
# phrase).
PHRASINGS = {
    "generic": {
        "questions": [
            "Segment everything in this image that belongs to one of: {phrases}.",
            "Give me a mask for each region of these categories: {phrases}.",
            "Which pixels show {phrases}? Please segment them.",
            "Find and segment all of the following: {phrases}.",
        ],
        "answers": [
            "Here is the segmentation: <SEG>.",
            "Sure, <SEG>.",
            "The regions are segmented: <SEG>.",
        ],
    },
    "refer": {
        "questions": [
            "Segment {phrases} in this image.",
            "Where is {phrases}? Answer with a mask.",
            "Please find {phrases} and segment it.",
            "Give me the mask of {phrases}.",
        ],
        "answers": ["Here is the segmentation: <SEG>.", "Sure, <SEG>.", "It is segmented: <SEG>."],
    },
}

MAX_TURNS = 8  # referred objects of one training conversation


# ---- reading files -------------------------------------------------------------------------------


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download it again") from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers; refuses whatever would import or call something."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks to import {module}.{name}")


def read_refs(path: Path) -> list[dict]:
    """A RefCOCO pickle. Raises ValueError where it is damaged or holds more than plain data."""
    with path.open("rb") as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8").load()
        except Exception as error:  # damaged bytes make the unpickler fail in any way
            raise ValueError(f"{path}: not a plain pickle of refs: {error}") from error


def read_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """An RGB image; `size` (height, width), where the annotations tell it, must be the image's."""
    try:
        image = Image.open(path).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error
    if size is not None and (image.height, image.width) != tuple(size):
        raise ValueError(
            f"{path}: is {image.height}x{image.width} (height x width), its annotation says "
            f"{size[0]}x{size[1]}"
        )
    return image


def read_segment_ids(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A COCO panoptic PNG as segment ids, int32 [H, W]; 0 is void."""
    colours = np.asarray(read_image(path, size), np.int32)
    return colours @ np.array([1, 256, 256 * 256], np.int32)


def decode_mask(segmentation: dict | list, size: tuple[int, int], record: str) -> np.ndarray:
    """Any of the four COCO encodings as a mask, bool [H, W]: RLE with list or string counts, a list
    of RLEs, a list of polygons. A ring of under six or of an odd number of coordinates is dropped.

    Raises ValueError naming `record` where nothing valid is left or the size differs.
    """
    height, width = size
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    rles, rings = [], []
    for part in parts:
        if isinstance(part, list):
            if len(part) >= 6 and len(part) % 2 == 0:
                rings.append(part)
        elif list(part["size"]) != [height, width]:
            raise ValueError(
                f"{record}: RLE of size {part['size']} in an image of {[height, width]}"
            )
        elif isinstance(part["counts"], list):
            rles.append(coco_mask.frPyObjects(part, height, width))
        else:
            rles.append(part)
    if rings:
        rles += coco_mask.frPyObjects(rings, height, width)
    if not rles:
        raise ValueError(f"{record}: no valid polygon or RLE in its segmentation")
    return coco_mask.decode(coco_mask.merge(rles)).astype(bool)


# ---- datasets ------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One record, at the image's own size."""

    sample_id: str
    task: str  # generic, refer or chat
    image: Image.Image
    turns: list[tuple[str, str | None]]  # (question, answer); an answer of None is for the model
    masks: np.ndarray  # bool [T, H, W]
    labels: np.ndarray  # int64 [T], index into names
    ignore: np.ndarray | None = None  # bool [H, W], pixels without a label
    names: list[str] = field(default_factory=list)  # the classes or phrases, in prompt order
    regions: np.ndarray | None = None  # bool [G, H, W], a visual prompt for each <region>


def ask(task: str, names: list[str], rng: np.random.Generator | None = None) -> str:
    """The task's question about `names`: a random phrasing, or the first one without `rng`."""
    phrasings = PHRASINGS[task]["questions"]
    question = phrasings[rng.integers(len(phrasings)) if rng else 0]
    return question.replace("{phrases}", ", ".join(f"<p>{name}</p>" for name in names))


def draw_turn(task: str, names: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """A random question about `names` and a random answer."""
    answers = PHRASINGS[task]["answers"]
    return ask(task, names, rng), answers[rng.integers(len(answers))]


def clean_name(name: str) -> str:
    """A COCO category name as it stands in a prompt: "sky-other-merged" is "sky other"."""
    return name.replace("-merged", "").replace("-stuff", "").replace("-", " ").strip().lower()


class CocoPanoptic:
    """COCO panoptic: every segment of an image and its class.

    A class's contiguous index is the rank of its id. Crowd regions and void carry no label. With
    `all_classes` the prompt names all of them in that order (stage 1, evaluation); else those
    present and a random number of others, shuffled.
    """

    def __init__(self, root: Path, source: Source, all_classes: bool):
        self.root, self.source, self.all_classes = root, source, all_classes
        annotations = read_json(root / source.annotations)
        categories = sorted(annotations["categories"], key=lambda category: category["id"])
        self.category_index = {category["id"]: i for i, category in enumerate(categories)}
        self.names = [clean_name(category["name"]) for category in categories]
        self.is_thing = [bool(category["isthing"]) for category in categories]
        self.categories = tuple(
            {"name": name, "is_thing": is_thing}
            for name, is_thing in zip(self.names, self.is_thing, strict=True)
        )
        by_image = {record["image_id"]: record for record in annotations["annotations"]}
        images = sorted(annotations["images"], key=lambda image: image["id"])
        self.records = [
            (image, by_image[image["id"]])
            for image in images
            if image["id"] in by_image and by_image[image["id"]]["segments_info"]
        ]
        self.num_dropped = len(images) - len(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray, list[dict]]:
        """Image, segment ids [H, W] and segments_info, checked against each other."""
        image, record = self.records[index]
        size = image["height"], image["width"]
        path = self.root / self.source.masks / Path(image["file_name"]).with_suffix(".png").name
        ids = read_segment_ids(path, size)
        segments = record["segments_info"]
        for segment in segments:
            if segment["category_id"] not in self.category_index:
                raise ValueError(
                    f"{self.root / self.source.annotations}: image {image['id']}, segment "
                    f"{segment['id']}: category {segment['category_id']} is not in its categories"
                )
        unknown = np.setdiff1d(ids, [0] + [segment["id"] for segment in segments])
        if len(unknown):
            raise ValueError(f"{path}: segment id {unknown[0]} is not in its segments_info")
        return read_image(self.root / self.source.images / image["file_name"], size), ids, segments

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        picture, ids, segments = self.read(index)
        segments = [segment for segment in segments if not segment["iscrowd"]]
        classes = np.array([self.category_index[s["category_id"]] for s in segments], np.int64)
        if self.all_classes:
            prompt = np.arange(len(self.names))
        else:
            present = np.unique(classes)
            absent = np.setdiff1d(np.arange(len(self.names)), present)
            negatives = rng.choice(absent, rng.integers(len(absent) + 1), replace=False)
            prompt = rng.permutation(np.concatenate([present, negatives]))
        masks = ids == np.array([segment["id"] for segment in segments])[:, None, None]
        place = {category: position for position, category in enumerate(prompt)}
        names = [self.names[category] for category in prompt]
        return Sample(
            sample_id=f"coco_panoptic/{self.records[index][0]['id']}",
            task="generic",
            image=picture,
            turns=[draw_turn("generic", names, rng)],
            masks=masks.reshape(-1, *ids.shape),
            labels=np.array([place[category] for category in classes], np.int64),
            ignore=~masks.any(axis=0) if len(masks) else np.ones(ids.shape, bool),
            names=names,
        )


class RefCoco:
    """RefCOCO, RefCOCO+ and RefCOCOg.

    Training: a conversation with one turn for each of up to MAX_TURNS referred objects of an image;
    the k-th sample of an image takes the k-th combination of its objects' sentences, for as many
    samples as the image has sentences, or combinations where those are fewer. Evaluation: one
    sample per object and sentence.
    """

    def __init__(self, root: Path, source: Source):
        self.root, self.source = root, source
        self.name = Path(source.annotations).parent.name
        instances = read_json(root / source.instances)
        self.images = {image["id"]: image for image in instances["images"]}
        self.annotations = {record["id"]: record for record in instances["annotations"]}
        by_image = defaultdict(list)
        for ref in read_refs(root / source.annotations):
            for kind, known, key in (
                ("annotation", self.annotations, ref["ann_id"]),
                ("image", self.images, ref["image_id"]),
            ):
                if key not in known:
                    raise ValueError(
                        f"{root / source.annotations}: ref {ref['ref_id']}: {kind} {key} is not in "
                        f"{root / source.instances}"
                    )
            by_image[ref["image_id"]].append(ref)
        self.records = []  # (image id, [(annotation id, sentence)])
        for image_id in sorted(by_image):
            refs = by_image[image_id]
            if refs[0]["split"] != source.split:
                continue
            objects = [[(ref["ann_id"], sentence) for sentence in _sentences(ref)] for ref in refs]
            if source.split == "train":
                combinations = itertools.islice(
                    itertools.product(*objects), sum(len(sentences) for sentences in objects)
                )
                for combination in combinations:
                    for start in range(0, len(combination), MAX_TURNS):
                        self.records.append((image_id, combination[start : start + MAX_TURNS]))
            else:
                self.records += [(image_id, [pair]) for pair in itertools.chain(*objects)]
        self.num_dropped = 0

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image_id, pairs = self.records[index]
        image = self.images[image_id]
        size = image["height"], image["width"]
        path = self.root / self.source.instances
        masks = [
            decode_mask(self.annotations[key]["segmentation"], size, f"{path}: annotation {key}")
            for key, _ in pairs
        ]
        sentences = [sentence for _, sentence in pairs]
        return Sample(
            sample_id=f"{self.name}/{image_id}/{index}",
            task="refer",
            image=read_image(self.root / self.source.images / image["file_name"], size),
            turns=[draw_turn("refer", [sentence], rng) for sentence in sentences],
            masks=np.stack(masks),
            labels=np.arange(len(pairs)),
            names=sentences,
        )


def _sentences(ref: dict) -> list[str]:
    return sorted({sentence["sent"].strip().lower() for sentence in ref["sentences"]})


class LlavaChat:
    """LLaVA conversations about one image; samples without an image are left out and counted."""

    def __init__(self, root: Path, source: Source):
        self.root, self.source = root, source
        self.name = Path(source.annotations).parent.name
        records = read_json(root / source.annotations)
        self.records = [record for record in records if record.get("image")]
        self.num_dropped = len(records) - len(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        record = self.records[index]
        image = read_image(self.root / self.source.images / record["image"])
        return Sample(
            sample_id=f"{self.name}/{record['id']}",
            task="chat",
            image=image,
            turns=self.turns(record),
            masks=np.zeros((0, image.height, image.width), bool),
            labels=np.zeros(0, np.int64),
        )

    def turns(self, record: dict) -> list[tuple[str, str]]:
        """(question, answer) pairs; a leading answer is skipped, <image> is taken out."""
        where = f"{self.root / self.source.annotations}: record {record['id']}"
        conversation = record["conversations"]
        for turn in conversation:
            if turn["from"] not in ("human", "gpt"):
                raise ValueError(f"{where}: turn from {turn['from']!r}; expected human or gpt")
        if conversation and conversation[0]["from"] == "gpt":
            conversation = conversation[1:]
        speakers = [turn["from"] for turn in conversation]
        if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
            raise ValueError(f"{where}: its turns do not alternate human and gpt: {speakers}")
        texts = [turn["value"].replace("<image>", "").strip() for turn in conversation]
        return list(zip(texts[0::2], texts[1::2], strict=True))


def open_dataset(name: str, root: Path, all_classes: bool = False):
    """The dataset that config.SOURCES calls `name`."""
    source = SOURCES[name]
    if source.task == "generic":
        return CocoPanoptic(root, source, all_classes)
    return RefCoco(root, source) if source.task == "refer" else LlavaChat(root, source)


# ---- from samples to batches ---------------------------------------------------------------------


@dataclass
class Batch:
    """What one forward pass reads (the first block) and what its losses need."""

    task: str
    seg_pixels: Tensor  # [B, 3, S, S]
    image_pixels: Tensor | None  # [B, 3, s, s]; None without image encoder
    input_ids: Tensor | None  # [B, N] with placeholders
    attention_mask: Tensor | None  # [B, N]
    labels: Tensor | None  # [B, N]
    region_points: Tensor | None  # [G, P, 2] (row, column) in 0..1, of each <region>
    region_index: Tensor | None  # [G] image of each <region>
    image_index: Tensor  # [R] image of each decoder run

    targets: list[Targets]  # one per decoder run
    run_seeds: list[int]  # one per decoder run: where the criterion's points come from
    placements: list[Placement]  # one per image
    samples: list[Sample]

    def to(self, device: torch.device) -> "Batch":
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device, non_blocking=True))
        for target in self.targets:
            for name, value in vars(target).items():
                if isinstance(value, Tensor):
                    setattr(target, name, value.to(device, non_blocking=True))
        return self


class Processor:
    """Samples to batches for one model: sizes from its config, words from its tokenizer.

    Without a tokenizer (stage 1) there is no text, and every class of the dataset is a label.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase | None):
        self.config, self.tokenizer = config, tokenizer
        model = config.model
        self.num_visual_tokens = math.ceil(model.seg_image_size / model.seg_patch_size / 2) ** 2
        self.image_size = 0
        if model.image_encoder != "none" and model.image_encoder_config:
            self.image_size = model.image_encoder_config["image_size"]
            grid = self.image_size // model.image_encoder_config["patch_size"]
            self.num_visual_tokens += grid**2

    def place(self, sample: Sample, stage: Stage | None, rng: np.random.Generator | None):
        """Where the sample's image goes; augmented (scale, crop, flip) as the stage says. The flip
        is carried out on the sample."""
        size = self.config.model.seg_image_size
        shape = sample.image.height, sample.image.width
        if stage is None:
            return Placement.fit(shape, size)
        if rng.random() < stage.flip_probability:
            sample.image = sample.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            sample.masks = sample.masks[:, :, ::-1]
            for name in ("ignore", "regions"):
                if getattr(sample, name) is not None:
                    setattr(sample, name, getattr(sample, name)[..., ::-1])
        scale = rng.uniform(*stage.scale_range) if stage.scale_range else 1.0
        return Placement.fit(shape, size, scale).crop(rng)

    def tokenize(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Ids and labels. A chat too long loses its last turns; a prompt that cannot be cut without
        losing a mask is an error."""
        limit = self.config.model.max_text_length + self.num_visual_tokens
        turns = [(f"<image>\n{sample.turns[0][0]}", sample.turns[0][1]), *sample.turns[1:]]
        while True:
            pieces = render_conversation(self.tokenizer, turns)
            ids, labels = tokenize(self.tokenizer, pieces, self.num_visual_tokens)
            if len(ids) <= limit:
                return ids, labels
            if sample.task != "chat" or len(turns) == 1:
                raise ValueError(
                    f"{sample.sample_id}: {len(ids) - self.num_visual_tokens} text tokens, "
                    f"max_text_length is {self.config.model.max_text_length}"
                )
            turns = turns[:-1]

    def targets(self, sample: Sample, placement: Placement) -> Targets:
        """The sample's masks on the canvas; a mask that the crop cut away is dropped."""
        masks = torch.from_numpy(placement.place_map(sample.masks))
        ignore = None
        if sample.ignore is not None:
            ignore = torch.from_numpy(placement.place_map(sample.ignore))
        is_visible = masks.flatten(1).any(dim=1)
        if sample.task != "generic":  # one target for each <SEG>, whatever became of it
            is_visible[:] = True
        labels = torch.from_numpy(sample.labels)
        return Targets(masks[is_visible], labels[is_visible], ignore)

    def encode(
        self,
        sample: Sample,
        stage: Stage | None = None,
        rng: np.random.Generator | None = None,
        run_seed: int = 0,
    ) -> dict:
        """One sample's tensors. With a `stage` its augmentation is drawn from `rng`."""
        placement = self.place(sample, stage, rng)
        encoded = {
            "sample": sample,
            "placement": placement,
            "seg_pixels": seg_pixels(sample.image, placement),
            "targets": self.targets(sample, placement),
            "run_seed": run_seed,
        }
        if self.tokenizer is not None:
            if self.image_size:
                model = self.config.model
                encoded["image_pixels"] = image_pixels(
                    sample.image,
                    self.image_size,
                    model.image_mean,
                    model.image_std,
                    model.image_resample,
                )
            encoded["ids"], encoded["labels"] = self.tokenize(sample)
            encoded["region_points"] = self.region_points(sample, placement, rng)
        return encoded

    def region_points(
        self, sample: Sample, placement: Placement, rng: np.random.Generator | None
    ) -> Tensor:
        """Where the region sampler reads each visual prompt: (row, column) in 0..1 of the canvas,
        [G, P, 2], with repetition where a prompt has fewer pixels. An empty prompt is an error."""
        rng = rng or np.random.default_rng(0)
        count = self.config.model.num_region_points
        points = torch.zeros(0 if sample.regions is None else len(sample.regions), count, 2)
        for number in range(len(points)):
            mask = placement.place_map(sample.regions[number])
            pixels = np.argwhere(mask)
            if not len(pixels):
                raise ValueError(f"{sample.sample_id}: visual prompt {number} has no pixel")
            chosen = rng.choice(len(pixels), count, replace=len(pixels) < count)
            points[number] = torch.from_numpy(pixels[chosen] / mask.shape)
        return points

    def collate(self, encoded: list[dict], pad_left: bool = False) -> Batch:
        """Encoded samples of one task to a batch. Generation wants its padding at the left."""
        task = encoded[0]["sample"].task
        ids = mask = labels = images = points = region_index = None
        if self.tokenizer is not None:
            if self.image_size:
                images = torch.stack([item["image_pixels"] for item in encoded])
            pad_id = self.tokenizer.pad_token_id
            ids = _pad([item["ids"] for item in encoded], pad_id, pad_left)
            labels = _pad([item["labels"] for item in encoded], IGNORE_LABEL, pad_left)
            mask = _pad([[1] * len(item["ids"]) for item in encoded], 0, pad_left)
            points = torch.cat([item["region_points"] for item in encoded])
            counts = torch.tensor([len(item["region_points"]) for item in encoded])
            region_index = torch.arange(len(encoded)).repeat_interleave(counts)
        targets, run_seeds, image_index = [], [], []
        num_phrases = 0
        for row, item in enumerate(encoded):
            if task == "generic":
                runs = [item["targets"]]
            elif task == "refer":
                # Each phrase is a decoder run with one target; its class is its place among the
                # phrases of the whole batch.
                runs = [
                    Targets(mask_[None], torch.tensor([num_phrases + number]))
                    for number, mask_ in enumerate(item["targets"].masks)
                ]
                num_phrases += len(runs)
            else:
                runs = []
            targets += runs
            run_seeds += [item["run_seed"] + number for number in range(len(runs))]
            image_index += [row] * len(runs)
        return Batch(
            task=task,
            seg_pixels=torch.stack([item["seg_pixels"] for item in encoded]),
            image_pixels=images,
            input_ids=ids,
            attention_mask=mask,
            labels=labels,
            region_points=points,
            region_index=region_index,
            image_index=torch.tensor(image_index, dtype=torch.long),
            targets=targets,
            run_seeds=run_seeds,
            placements=[item["placement"] for item in encoded],
            samples=[item["sample"] for item in encoded],
        )


def _pad(rows: list[list[int]], value: int, left: bool) -> Tensor:
    length = max(len(row) for row in rows)
    gaps = [[value] * (length - len(row)) for row in rows]
    return torch.tensor(
        [gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)]
    )


# ---- sampling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """One place of an epoch: which record, and what its randomness is drawn from."""

    dataset: int
    index: int
    epoch: int
    place: int


def repeat_factors(sizes: list[int], threshold: float) -> list[float]:
    """max(1, sqrt(threshold / share of all samples)) for each dataset (paper section 4)."""
    total = sum(sizes)
    return [max(1.0, math.sqrt(threshold * total / size)) for size in sizes]


class Mixture(torch.utils.data.Dataset):
    """The datasets of a stage, resampled; every global batch comes from one of them.

    A dataset of n samples and factor r fills round(n·r / batch) batches of an epoch, at least one:
    all of it floor(r) times, then a random part. What is short of a whole batch is left for another
    epoch's shuffle.
    """

    def __init__(self, datasets: list, processor: Processor, stage: Stage, seed: int):
        self.datasets, self.processor, self.stage, self.seed = datasets, processor, stage, seed
        self.global_batch_size = stage.global_batch_size
        sizes = [len(dataset) for dataset in datasets]
        self.factors = repeat_factors(sizes, stage.repeat_threshold)
        self.num_batches = [
            max(1, round(size * factor / self.global_batch_size))
            for size, factor in zip(sizes, self.factors, strict=True)
        ]

    def __len__(self) -> int:
        """Global batches of an epoch."""
        return sum(self.num_batches)

    def epoch(self, epoch: int) -> list[list[Draw]]:
        """The global batches of an epoch, in order."""
        batches = []
        for number, dataset in enumerate(self.datasets):
            rng = np.random.default_rng([self.seed, epoch, number])
            places = self.num_batches[number] * self.global_batch_size
            rounds = math.ceil(places / len(dataset))
            order = np.concatenate([rng.permutation(len(dataset)) for _ in range(rounds)])
            draws = [
                Draw(number, int(index), epoch, place) for place, index in enumerate(order[:places])
            ]
            batches += [
                draws[start : start + self.global_batch_size]
                for start in range(0, places, self.global_batch_size)
            ]
        rng = np.random.default_rng([self.seed, epoch, len(self.datasets)])
        return [batches[position] for position in rng.permutation(len(batches))]

    def micro_batches(self, first_step: int, rank: int, world_size: int) -> Iterator[list[Draw]]:
        """This rank's micro-batches from global batch `first_step` on, without end. Every `world`
        consecutive micro-batches of a global batch go to the ranks in turn."""
        size = self.stage.micro_batch_size
        for epoch in itertools.count(first_step // len(self)):
            start = first_step % len(self) if epoch == first_step // len(self) else 0
            for batch in self.epoch(epoch)[start:]:
                pieces = [batch[at : at + size] for at in range(0, len(batch), size)]
                yield from pieces[rank::world_size]

    def __getitem__(self, draw: Draw) -> dict:
        rng = np.random.default_rng([self.seed, draw.epoch, draw.dataset, draw.place])
        sample = self.datasets[draw.dataset].sample(draw.index, rng)
        run_seed = int(rng.integers(2**62))
        return self.processor.encode(sample, self.stage, rng, run_seed)
