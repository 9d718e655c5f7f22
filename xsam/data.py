"""From samples to the tensors that the model and the criterion read: resizing and padding,
tokenizing, batching, sampling.

A dataset gives a `Sample`. The `Processor` brings it to the canvas, tokenizes it and collates a
`Batch`; the `Mixture` says which samples make which global batch (paper appendix A, dataset balance
resampling). Everything random is drawn from (seed, epoch, dataset, place in the epoch), so any
number of ranks and workers, and a resumed run, see the same. As a command it checks and builds
data:

    python -m xsam.data check --data datas --show 4
    python -m xsam.data vgd --instances instances_train2017.json --out img_vgdseg_coco_train.json

Legend: B images of a batch, D reference images (that show a visual prompt for another image), R
decoder runs, T targets, G visual prompts, H W image size, S canvas side, N tokens, P points.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xsam.config import SPECIAL_TOKENS, Config, Stage
from xsam.images import viewed
from xsam.llm import (
    IGNORE_LABEL,
    IMAGE_TOKEN,
    Runs,
    find_runs,
    render_conversation,
    special_ids,
    tokenize,
    unknown_words,
    without_marks,
)
from xsam.losses import Targets
from xsam.prompts import Phrased
from xsam.tasks import TASKS

if TYPE_CHECKING:
    from xsam.datasets.base import Dataset


@dataclass
class Sample:
    """One record, at the image's own size."""

    sample_id: str
    task: str
    image: Image.Image
    # (question, answer); an answer of None is for the model to give. A question about names is a
    # prompts.Phrased, so that it can be asked about some of them; so is an answer that says them.
    turns: list[tuple[str, str | None]]
    masks: np.ndarray  # bool [T, H, W]
    labels: np.ndarray  # int64 [T], index into names
    ignore: np.ndarray | None = None  # bool [H, W], pixels without a label
    names: list[str] = field(default_factory=list)  # the classes or phrases, in prompt order
    # A visual prompt for each <region>: bool [G, H, W], or a list of bool [H', W'] in other images.
    regions: np.ndarray | list[np.ndarray] | None = None
    region_images: list[Image.Image] | None = None  # these others; None: all are in `image`
    region_kinds: list[str] = field(default_factory=list)  # PROMPT_TYPES, as far as they are known
    category_ids: list[int] = field(default_factory=list)  # of the file, one for each name
    image_id: int | str = ""  # of the file
    is_text: bool = False  # a chat about no image: `image` is black, and no words show it

    def __post_init__(self):
        """Takes the image as viewers show it. Raises ValueError where that has another size than
        the masks, or where these are no booleans."""
        if self.image is None:  # of a sample whose pictures were dropped (`Mixture.collate`)
            return
        for name in ("masks", "ignore"):
            mask = getattr(self, name)
            if mask is not None and not (isinstance(mask, np.ndarray) and mask.dtype == bool):
                raise ValueError(f"{self.sample_id}: its {name} are not NumPy booleans; give x > 0")
        self.image = viewed(self.image, self.masks.shape[-2:], self.sample_id)


# ---- the resize-and-pad transform ----------------------------------------------------------------

SEG_MEAN, SEG_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of pixels in 0..255


@dataclasses.dataclass(frozen=True)
class ResizeAndPad:
    """Where an image lies on the square canvas of the segmentation encoder, in pixels.

    The image of `original` (height, width) is resized to `resized`; the canvas shows it from (top,
    left) on, and what it does not fill, at the right and the bottom, is padding.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    size: int
    top: int = 0
    left: int = 0

    @classmethod
    def fit(cls, original: tuple[int, int], size: int, scale: float = 1.0) -> ResizeAndPad:
        """The longest edge becomes size·scale."""
        factor = size * scale / max(original)
        return cls(original, tuple(max(1, round(side * factor)) for side in original), size)

    def crop(self, rng: np.random.Generator) -> ResizeAndPad:
        """A random window where the resized image is larger than the canvas."""
        top, left = (int(rng.integers(max(0, side - self.size) + 1)) for side in self.resized)
        return dataclasses.replace(self, top=top, left=left)

    @property
    def visible(self) -> tuple[int, int]:
        """Height and width of the canvas that shows the image."""
        corner = self.resized[0] - self.top, self.resized[1] - self.left
        return min(self.size, corner[0]), min(self.size, corner[1])

    def map_to_canvas(self, values: np.ndarray, fill: int = 0) -> np.ndarray:
        """Maps [..., H, W] of the original image on the canvas [..., S, S], by nearest pixel."""
        if values.shape[-2:] != self.original:
            raise ValueError(
                f"map of {values.shape} on an image of {self.original} (height, width)"
            )
        rows = (np.arange(self.visible[0]) + self.top + 0.5) * self.original[0] / self.resized[0]
        columns = (
            (np.arange(self.visible[1]) + self.left + 0.5) * self.original[1] / self.resized[1]
        )
        shown = (rows.astype(int), -2), (columns.astype(int), -1)
        visible = values
        for places, axis in shown if self.resized < self.original else shown[::-1]:
            visible = visible.take(places, axis)  # rows are whole lines of memory: the longer copy
        canvas = np.full((*values.shape[:-2], self.size, self.size), fill, values.dtype)
        canvas[..., : self.visible[0], : self.visible[1]] = visible
        return canvas

    def draw_points(self, mask: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """`count` random pixels of a mask, bool [H, W] of the original image, that the canvas
        shows: where they lie on it as (row, column) in 0..1, [count, 2]. With repetition where
        there are fewer; [0, 2] where there is none."""
        axes = []
        for side, resized, start, shown in zip(
            self.original, self.resized, (self.top, self.left), self.visible, strict=True
        ):
            place = (np.arange(side) + 0.5) * (resized / side) - 0.5 - start
            axes.append(np.where((place > -0.5) & (place < shown - 0.5), place.clip(min=0), -1))
        rows, columns = axes
        inside = np.flatnonzero(mask & (rows >= 0)[:, None] & (columns >= 0))
        if not len(inside):
            return np.zeros((0, 2))
        chosen = inside[rng.choice(len(inside), count, replace=len(inside) < count)]
        row, column = np.divmod(chosen, mask.shape[1])
        return np.stack([rows[row], columns[column]], axis=1) / self.size


def seg_pixels(image: Image.Image, transform: ResizeAndPad) -> Tensor:
    """RGB image to the segmentation encoder's input: float [3, S, S], normalised, padding zero."""
    rows, columns = transform.visible
    box = None  # of the original image, where the canvas does not show all of it
    if (rows, columns) != transform.resized:
        y, x = np.array(transform.original) / transform.resized
        right, bottom = (transform.left + columns) * x, (transform.top + rows) * y
        box = (
            transform.left * x,
            transform.top * y,
            min(right, image.width),
            min(bottom, image.height),
        )
    resized = image.resize((columns, rows), Image.Resampling.BILINEAR, box)
    canvas = np.zeros((3, transform.size, transform.size), np.float32)
    shown = canvas[:, :rows, :columns]
    shown[:] = np.asarray(resized).transpose(2, 0, 1)
    _normalise(shown, SEG_MEAN, SEG_STD)
    return torch.from_numpy(canvas)


def _normalise(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Channels first [3, H, W], in place."""
    pixels -= np.float32(mean)[:, None, None]
    pixels /= np.float32(std)[:, None, None]


def image_pixels(
    image: Image.Image,
    size: int,
    mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    std: tuple[float, ...] = (0.5, 0.5, 0.5),
    resample: str = "bicubic",
) -> Tensor:
    """RGB image to the image encoder's input: squashed to float [3, size, size], normalised with
    mean and deviation of pixels in 0..1 (default: SigLIP's)."""
    resized = image.resize((size, size), Image.Resampling[resample.upper()])
    pixels = np.empty((3, size, size), np.float32)
    pixels[:] = np.asarray(resized).transpose(2, 0, 1)
    pixels /= np.float32(255)
    _normalise(pixels, mean, std)
    return torch.from_numpy(pixels)


PICTURES = ("image", "masks", "ignore", "regions", "region_images")  # fields of a Sample

MOST_REPLACEMENTS = 100  # records in a row that may be left out before a run stops


class SampleTooLong(ValueError):
    """A sound sample that the model cannot be shown without losing an answer or a <SEG>."""


# ---- from samples to batches ---------------------------------------------------------------------


@dataclass
class Batch:
    """What one forward pass reads (the first block) and what its losses need."""

    task: str
    # D reference images, which show a visual prompt for another, follow the B images in seg_pixels,
    # or where regions are read from image tokens (seg_tokens false), in image_pixels.
    seg_pixels: Tensor  # [B + D, 3, S, S]
    image_pixels: Tensor | None  # [B, 3, s, s]; None without image encoder
    input_ids: Tensor | None  # [B, N] with placeholders
    attention_mask: Tensor | None  # [B, N]
    labels: Tensor | None  # [B, N]
    region_points: Tensor | None  # [G, P, 2] (row, column) in 0..1, of each <region>
    region_index: Tensor | None  # [G] row of seg_pixels that each <region> is read from
    runs: Runs | None  # what the tokens ask the decoder for; None in stage 1, or with open answers

    targets: list[Targets]  # one per decoder run
    run_seeds: list[int]  # one per decoder run: where the criterion's points come from
    transforms: list[ResizeAndPad]  # one per image
    samples: list[Sample]  # of a Mixture without pictures and masks
    skipped: list[str]  # why other records are not in it: refused, or bad with --skip-bad
    # Words that the tokenizer lacks, and the sample that has each; of training alone.
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def has_masks(self) -> bool:
        return TASKS[self.task].has_masks

    def to(self, device: torch.device) -> Batch:
        return self._change(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """For the DataLoader: from pinned memory a GPU copies while it computes."""
        return self._change(Tensor.pin_memory)

    def _change(self, change: Callable[[Tensor], Tensor]) -> Batch:
        for part in filter(None, (self, self.runs, *self.targets)):
            for name, value in vars(part).items():
                if isinstance(value, Tensor):
                    setattr(part, name, change(value))
        return self


class Processor:
    """Samples to batches for one model: sizes from its config, words from its tokenizer.

    Without a tokenizer (stage 1) there is no text, and every class of the dataset is a label.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase | None):
        self.config, self.tokenizer = config, tokenizer
        model = config.model
        side = math.ceil(model.seg_image_size / model.seg_patch_size / 2) * model.seg_tokens
        self.num_visual_tokens, self.image_size = side**2, 0
        if model.image_encoder != "none" and model.image_encoder_config:
            self.image_size = model.image_encoder_config["image_size"]
            grid = self.image_size // model.image_encoder_config["patch_size"]
            self.num_visual_tokens += grid**2

    def place(self, sample: Sample, stage: Stage | None, rng: np.random.Generator | None):
        """Where the sample's image goes; augmented (scale, crop, flip) as the stage says. The flip
        is carried out on the sample."""
        if stage is None:
            return self.fit(sample.image)
        if rng.random() < stage.flip_probability:
            sample.image = sample.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            sample.masks = sample.masks[:, :, ::-1]
            for name in ("ignore", "regions") if sample.region_images is None else ("ignore",):
                if getattr(sample, name) is not None:
                    setattr(sample, name, getattr(sample, name)[..., ::-1])
        scale = rng.uniform(*stage.scale_range) if stage.scale_range else 1.0
        return self.fit(sample.image, scale).crop(rng)

    def fit(self, image: Image.Image, scale: float = 1.0) -> ResizeAndPad:
        size = self.config.model.seg_image_size
        return ResizeAndPad.fit((image.height, image.width), size, scale)

    def tokenize(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Ids and labels. Raises SampleTooLong where they are too many."""
        (question, answer), *others = sample.turns
        shown = "" if sample.is_text else "<image>\n"
        try:
            pieces = render_conversation(self.tokenizer, [(shown + question, answer), *others])
        except ValueError as error:
            raise ValueError(f"{sample.sample_id}: {error}") from error
        vectors = self.config.model.num_region_vectors
        ids, labels = tokenize(self.tokenizer, pieces, self.num_visual_tokens, vectors)
        num_words, limit = len(ids) - ids.count(IMAGE_TOKEN), self.config.model.max_text_length
        if num_words > limit:
            raise SampleTooLong(
                f"{sample.sample_id}: {num_words} text tokens, max_text_length is {limit}"
            )
        return ids, labels

    def shorten(self, sample: Sample) -> tuple[Sample, tuple[list[int], list[int]]]:
        """The sample, if need be without some of the classes that it does not show (the only words
        that can go without an answer or a <SEG>), and its ids and labels."""
        while True:
            try:
                return sample, self.tokenize(sample)
            except SampleTooLong:
                absent = np.setdiff1d(np.arange(len(sample.names)), sample.labels)
                least = int(len(absent) == len(sample.names))  # one name has to stay
                if TASKS[sample.task].needs != "categories" or len(absent) <= least:
                    raise
                goes = absent[len(absent) // 2 :]
                sample = keep_names(sample, np.setdiff1d(np.arange(len(sample.names)), goes))

    def split(self, sample: Sample) -> list[tuple[list[int], Sample]]:
        """The sample asked in as few parts as its list of names fits into, of about as many names
        each: their indices in the list, and the sample about these alone. Raises SampleTooLong
        where a prompt is too long that has no list to split."""
        indices = np.arange(len(sample.names))
        for count in range(1, max(len(indices), 1) + 1):
            pieces = [(list(range(len(indices))), sample)]
            if count > 1:
                chunks = np.array_split(indices, count)
                pieces = [(chunk.tolist(), keep_names(sample, chunk)) for chunk in chunks]
            try:
                for _, piece in pieces if self.tokenizer is not None else ():
                    self.tokenize(piece)
                break
            except SampleTooLong:
                if TASKS[sample.task].needs != "categories" or count == len(indices):
                    raise
        return pieces

    def targets(self, sample: Sample, transform: ResizeAndPad) -> Targets:
        """The sample's masks on the canvas; a mask that the crop cut away is dropped, but where
        each has a <SEG> of its own."""
        masks = transform.map_to_canvas(sample.masks)
        ignore = None
        if sample.ignore is not None:
            ignore = torch.from_numpy(transform.map_to_canvas(sample.ignore))
        labels = sample.labels
        if not TASKS[sample.task].is_per_phrase:
            is_kept = masks.any(axis=(1, 2))
            if not is_kept.all():
                masks, labels = masks[is_kept], labels[is_kept]
        return Targets(torch.from_numpy(masks), torch.from_numpy(labels), ignore)

    def encode(
        self,
        sample: Sample,
        stage: Stage | None = None,
        rng: np.random.Generator | None = None,
        run_seed: int = 0,
    ) -> dict:
        """One sample's tensors. With a `stage` its augmentation is drawn from `rng`."""
        transform = self.place(sample, stage, rng)
        if self.tokenizer is not None:
            may_shorten = stage is not None
            sample, words = self.shorten(sample) if may_shorten else (sample, self.tokenize(sample))
        encoded = {
            "sample": sample,
            "transform": transform,
            "seg_pixels": seg_pixels(sample.image, transform),
            "targets": self.targets(sample, transform),
            "run_seed": run_seed,
        }
        if self.tokenizer is not None:
            if self.image_size:
                encoded["image_pixels"] = self.image_pixels(sample.image)
            encoded["ids"], encoded["labels"] = words
            if stage is not None and self.tokenizer.unk_token_id in words[0]:
                lost = unknown_words(self.tokenizer, *itertools.chain(*sample.turns))
                encoded["unknown"] = dict.fromkeys(lost, sample.sample_id)
            encoded["region_points"] = self.region_points(sample, transform, rng)
            reference_pixels = [
                seg_pixels(image, self.fit(image))
                if self.config.model.seg_tokens
                else self.image_pixels(image)
                for image in sample.region_images or ()
            ]
            encoded["reference_pixels"] = reference_pixels or [None] * len(encoded["region_points"])
        return encoded

    def image_pixels(self, image: Image.Image) -> Tensor:
        """The image encoder's input."""
        model = self.config.model
        statistics = model.image_mean, model.image_std, model.image_resample
        return image_pixels(image, self.image_size, *statistics)

    def region_points(
        self, sample: Sample, transform: ResizeAndPad, rng: np.random.Generator | None
    ) -> list[Tensor | None]:
        """Where the region sampler reads each visual prompt: (row, column) in 0..1 of the canvas of
        its image, [P, 2], with repetition where a prompt has fewer pixels; None for one that is
        empty. Where regions are read from image tokens it is of the image, which they show whole.
        Raises SampleTooLong where all are empty."""
        rng = rng or np.random.default_rng(0)
        count, is_on_canvas = self.config.model.num_region_points, self.config.model.seg_tokens
        transform = transform if is_on_canvas else self.fit(sample.image)
        regions = sample.regions if sample.regions is not None else ()
        transforms = [transform] * len(regions)
        if sample.region_images is not None:  # they are shown whole
            transforms = [self.fit(image) for image in sample.region_images]
        points: list[Tensor | None] = []
        for region, where in zip(regions, transforms, strict=True):
            drawn = where.draw_points(region, count, rng)
            if not is_on_canvas:
                drawn *= where.size / np.array(where.resized)
            points.append(torch.from_numpy(drawn).float() if len(drawn) else None)
        if points and all(each is None for each in points):
            raise SampleTooLong(f"{sample.sample_id}: no visual prompt has a pixel on the canvas")
        return points

    def fill_regions(
        self, encoded: list[dict], may_borrow: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Points [G, P, 2] of all visual prompts of a batch, the row [G] of its `seg_pixels` that
        each is read from, and what the reference_images add to those.

        An empty prompt is that of the same category in another image of the batch, if it
        `may_borrow`; a category that no image can show leaves its sample.
        """
        reference_images: list[Tensor] = []
        for row, item in enumerate(encoded):
            item["region_rows"] = []
            for points, pixels in zip(item["region_points"], item["reference_pixels"], strict=True):
                is_elsewhere = points is not None and pixels is not None
                item["region_rows"].append(
                    len(encoded) + len(reference_images) if is_elsewhere else row
                )
                reference_images += [pixels] if is_elsewhere else []
        found: dict[str, tuple[int, Tensor]] = {}
        for item in encoded if may_borrow else ():
            columns = item["sample"].names, item["region_rows"], item["region_points"]
            for name, row, points in zip(*columns, strict=False):
                if points is not None:
                    found.setdefault(name, (row, points))
        all_points, rows = [torch.zeros(0, self.config.model.num_region_points, 2)], []
        for item in encoded:
            is_lost = [
                points is None and name not in found
                for name, points in zip(item["sample"].names, item["region_points"], strict=False)
            ]
            if any(is_lost):
                keep = np.flatnonzero(~np.array(is_lost))
                item["sample"] = sample = keep_names(item["sample"], keep)
                item["targets"] = self.targets(sample, item["transform"])
                item["ids"], item["labels"] = self.tokenize(sample)
                for name in ("region_rows", "region_points", "reference_pixels"):
                    item[name] = [item[name][number] for number in keep]
            pairs = zip(item["region_rows"], item["region_points"], strict=True)
            for number, (row, points) in enumerate(pairs):
                if points is None:
                    row, points = found[item["sample"].names[number]]
                all_points.append(points[None])
                rows.append(row)
        return torch.cat(all_points), torch.tensor(rows, dtype=torch.long), reference_images

    def collate(self, encoded: list[dict], pad_left: bool = False) -> Batch:
        """Encoded samples of one task to a batch. Generation wants its padding at the left."""
        name = encoded[0]["sample"].task
        task = TASKS[name]
        ids = attention_mask = labels = images = points = region_index = runs = None
        pixels = [item["seg_pixels"] for item in encoded]
        if self.tokenizer is not None:
            # In training only: no answer may depend on the batch.
            points, region_index, reference_images = self.fill_regions(
                encoded, may_borrow=not pad_left
            )
            images = [item["image_pixels"] for item in encoded] if self.image_size else None
            if self.config.model.seg_tokens:
                pixels += reference_images
            else:
                images += reference_images
            pad_id = self.tokenizer.pad_token_id
            ids = _pad([item["ids"] for item in encoded], pad_id, pad_left)
            labels = _pad([item["labels"] for item in encoded], IGNORE_LABEL, pad_left)
            attention_mask = _pad([[1] * len(item["ids"]) for item in encoded], 0, pad_left)
            is_open = any(item["sample"].turns[-1][1] is None for item in encoded)
            if task.has_masks and not is_open:
                is_per_phrase, special = task.is_per_phrase, special_ids(self.tokenizer)
                words = ids if task.is_grounded else without_marks(ids, special)  # of answers
                asked = torch.where(labels == IGNORE_LABEL, ids, words)
                runs = find_runs(asked, special, is_per_phrase, is_per_phrase)
        targets, run_seeds = run_targets(encoded)
        samples = [item["sample"] for item in encoded]
        if runs is not None:
            check_runs(runs, samples)
        return Batch(
            task=name,
            seg_pixels=torch.stack(pixels),
            image_pixels=torch.stack(images) if images else None,
            input_ids=ids,
            attention_mask=attention_mask,
            labels=labels,
            region_points=points,
            region_index=region_index,
            runs=runs,
            targets=targets,
            run_seeds=run_seeds,
            transforms=[item["transform"] for item in encoded],
            samples=samples,
            skipped=[reason for item in encoded for reason in item.get("skipped", ())],
            unknown={k: v for item in encoded for k, v in item.get("unknown", {}).items()},
        )


def run_targets(encoded: list[dict]) -> tuple[list[Targets], list[int]]:
    """The targets of each decoder run of a batch, and the seed of its random points. Where a task
    has a run for each phrase that is answered by a <SEG>, a run has one target, whose class is the
    number of its phrase among those of the whole batch, or none, where nothing fits the phrase;
    else an image is one run. Chat has none."""
    targets, run_seeds, num_phrases = [], [], 0
    task = TASKS[encoded[0]["sample"].task]
    for item in encoded if task.has_masks else ():
        of_image: Targets = item["targets"]
        of_runs = [of_image]
        if task.is_per_phrase:
            masks, labels = of_image.masks, of_image.labels
            is_own = [labels == number for number in answered_phrases(item["sample"])]
            of_runs = [
                Targets(masks[own], labels[own] + num_phrases, of_image.ignore) for own in is_own
            ]
            num_phrases += len(item["sample"].names)
        targets += of_runs
        run_seeds += [item["run_seed"] + number for number in range(len(of_runs))]
    return targets, run_seeds


def answered_phrases(sample: Sample) -> list[int]:
    """The numbers of the phrases of a task with a turn for each that its answers have a <SEG>
    for."""
    return [n for n, (_, answer) in enumerate(sample.turns) if SPECIAL_TOKENS[0] in (answer or "")]


def check_runs(runs: Runs, samples: list[Sample]) -> None:
    """Raises ValueError where the text of a batch's samples asks for other decoder runs than
    `run_targets` has targets for, or for none where there is a mask."""
    asked = list(zip(runs.image_index.tolist(), runs.phrase_index.tolist(), strict=True))
    num_phrases = 0
    for image, sample in enumerate(samples):
        found, needed = [phrase for i, phrase in asked if i == image], [-1]
        if TASKS[sample.task].is_per_phrase:
            labels = sample.labels.tolist()
            without_mask = set(answered_phrases(sample)).difference(labels)
            needed = [num_phrases + number for number in sorted([*labels, *without_mask])]
            num_phrases += len(sample.names)
        if found != needed:
            raise ValueError(
                f"{sample.sample_id}: its text asks for {len(found)} decoder runs, its masks are "
                f"for {len(needed)} (phrases {found} and {needed})"
            )


def keep_names(sample: Sample, keep: np.ndarray) -> Sample:
    """The sample asked about those of its names alone; the masks of the others go."""
    question, answer = sample.turns[0]
    if isinstance(answer, Phrased):
        answer = answer.keep(keep)
    regions, reference_images = sample.regions, sample.region_images
    if isinstance(regions, list):
        regions = [regions[i] for i in keep]
    elif regions is not None:
        regions = regions[keep]
    if reference_images is not None:
        reference_images = [reference_images[i] for i in keep]
    is_kept = np.isin(sample.labels, keep)
    return dataclasses.replace(
        sample,
        turns=[(question.keep(keep), answer)],
        masks=sample.masks[is_kept],
        labels=np.searchsorted(keep, sample.labels[is_kept]),
        names=[sample.names[i] for i in keep],
        category_ids=[sample.category_ids[i] for i in keep] if sample.category_ids else [],
        regions=regions,
        region_images=reference_images,
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
    """max(1, sqrt(threshold / share of all samples)) for each dataset (paper appendix A)."""
    total = sum(sizes)
    return [max(1.0, math.sqrt(threshold * total / size)) for size in sizes]


def share_batches(sizes: list[int], factors: list[float], batch_size: int) -> list[int]:
    """Batches of each dataset in an epoch, at least one: the whole batches of its share size·factor
    of the epoch, and one more where the largest fractions are left."""
    shares = np.array(sizes) * factors / batch_size
    total = max(1, round(shares.sum()))
    shares *= total / shares.sum()
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: total - counts.sum()]] += 1
    return np.maximum(counts, 1).tolist()


class Mixture(torch.utils.data.Dataset):
    """The datasets of a stage, resampled; every global batch comes from one of them (paper appendix
    A, "Stage 3: Mixed Fine-tuning").

    A dataset of n samples and factor r fills about n·r / batch batches of an epoch, at least one:
    all of it floor(r) times, then a random part. What is short of a whole batch is left for another
    epoch's shuffle.
    """

    def __init__(
        self,
        datasets: list[Dataset],
        processor: Processor,
        stage: Stage,
        seed: int,
        skip_bad: bool = False,
    ):
        self.datasets, self.processor, self.stage, self.seed = datasets, processor, stage, seed
        self.skip_bad = skip_bad
        self.global_batch_size = stage.global_batch_size
        sizes = [len(dataset) for dataset in datasets]
        self.factors = repeat_factors(sizes, stage.repeat_threshold)
        self.num_batches = share_batches(sizes, self.factors, self.global_batch_size)

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

    def __getitem__(self, draw: Draw) -> dict | ValueError:
        """An encoded sample. One that is refused, or bad with `skip_bad`, gives its place to
        another of its dataset, drawn, and its reason goes with that. Without `skip_bad` the error
        of a bad one is what comes back: a data loader would bury what it says."""
        dataset, index, skipped = self.datasets[draw.dataset], draw.index, []
        # Not place 0: numpy takes a last 0 for none, which is the generator of the epoch's shuffle.
        rng = np.random.default_rng([self.seed, draw.epoch, draw.dataset, draw.place + 1])
        while len(skipped) < MOST_REPLACEMENTS:
            try:
                sample = dataset.sample(index, rng)
                run_seed = int(rng.integers(2**62))
                item = self.processor.encode(sample, self.stage, rng, run_seed)
                return item | {"skipped": skipped}
            except ValueError as error:
                if not (self.skip_bad or isinstance(error, SampleTooLong)):
                    return error
                skipped.append(str(error))
            index = int(rng.integers(len(dataset)))
        return ValueError(f"{len(skipped)} samples in a row cannot be used, first {skipped[0]}")

    def collate(self, items: list[dict | ValueError]) -> Batch | ValueError:
        """The batch of encoded samples, or the first error among them. The samples lose their
        pictures and masks, which no loss reads: megabytes less from each loader process."""
        for item in items:
            if isinstance(item, ValueError):
                return item
        try:
            batch = self.processor.collate(items)
        except ValueError as error:
            return error
        batch.samples = [
            dataclasses.replace(sample, **dict.fromkeys(PICTURES)) for sample in batch.samples
        ]
        return batch


if __name__ == "__main__":
    from xsam.datasets.commands import main

    sys.exit(main())
