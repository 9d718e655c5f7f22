"""From samples to the tensors that the model and the criterion read: resizing and padding,
tokenizing, batching, sampling.

A dataset gives a `Sample`. The `Processor` brings it to the canvas and tokenizes it, an
`EncodedSample`, and collates several to a `Batch`; the `Mixture` says which samples make which
global batch (paper appendix A, "Dataset Balance Resampling"). All that is random is drawn from
(seed, epoch, dataset, place in the epoch), so that any number of ranks and workers, and a resumed
run, see the same. As a command this file checks and builds data:

    python -m xsam.data check --data datas --show 4
    python -m xsam.data vgd --instances instances_train2017.json --out img_vgdseg_coco_train.json

Legend: B images of a batch, D reference images (that show a visual prompt for another image), R
decoder runs, T targets, G visual prompts, H W image size, S canvas side, s side of the image
encoder's input, N tokens, P points.
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
    # (question, answer); an answer of None is left to the model. A question about names is a
    # prompts.Phrased, which can be asked about some of them; so is an answer that repeats them.
    turns: list[tuple[str, str | None]]
    masks: np.ndarray  # bool [T, H, W]
    labels: np.ndarray  # int64 [T], index into names
    ignore: np.ndarray | None = None  # bool [H, W], pixels without a label
    names: list[str] = field(default_factory=list)  # the classes or phrases, in prompt order
    # A visual prompt for each <region>: bool [G, H, W], or a list of bool [H', W'] in other images.
    regions: np.ndarray | list[np.ndarray] | None = None
    region_images: list[Image.Image] | None = None  # these other images; None: all are in `image`
    region_kinds: list[str] = field(default_factory=list)  # of PROMPT_TYPES, where they are known
    category_ids: list[int] = field(default_factory=list)  # of `names`, in the annotation file
    image_id: int | str = ""  # in the annotation file
    is_text: bool = False  # a chat about no image: `image` is black, and no words show it

    def __post_init__(self):
        """Turns the image as viewers show it. Raises ValueError where it then has another size than
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
    """Where an image lies on the canvas, the square input of the segmentation encoder.

    The image is resized, and the canvas shows it from (top, left) on; what it does not fill, at the
    right and the bottom, is padding. All in pixels.
    """

    original: tuple[int, int]  # height and width of the image
    resized: tuple[int, int]  # height and width that it is resized to
    size: int  # S
    top: int = 0  # first row and column of the resized image that the canvas shows
    left: int = 0

    @classmethod
    def fit(cls, original: tuple[int, int], size: int, scale: float = 1.0) -> ResizeAndPad:
        """The whole image with its longest edge at size·scale pixels."""
        factor = size * scale / max(original)
        return cls(original, tuple(max(1, round(side * factor)) for side in original), size)

    def crop(self, rng: np.random.Generator) -> ResizeAndPad:
        """The same with a random window, where the resized image is larger than the canvas."""
        top, left = (int(rng.integers(max(0, side - self.size) + 1)) for side in self.resized)
        return dataclasses.replace(self, top=top, left=left)

    @property
    def visible(self) -> tuple[int, int]:
        """Height and width of the canvas that shows the image."""
        corner = self.resized[0] - self.top, self.resized[1] - self.left
        return min(self.size, corner[0]), min(self.size, corner[1])

    def map_to_canvas(self, values: np.ndarray, fill: int = 0) -> np.ndarray:
        """Maps [..., H, W] of the original image on the canvas [..., S, S], by nearest pixel;
        padding is `fill`. Raises ValueError at maps of another size."""
        if values.shape[-2:] != self.original:
            raise ValueError(
                f"map of {values.shape} on an image of {self.original} (height, width)"
            )
        height, width = self.visible
        rows = (np.arange(height) + self.top + 0.5) * self.original[0] / self.resized[0]
        columns = (np.arange(width) + self.left + 0.5) * self.original[1] / self.resized[1]
        takes = [(rows.astype(int), -2), (columns.astype(int), -1)]
        # A row is copied as a whole, a column pixel by pixel: columns are taken of fewer rows.
        for index, axis in takes if self.resized < self.original else takes[::-1]:
            values = values.take(index, axis)
        canvas = np.full((*values.shape[:-2], self.size, self.size), fill, values.dtype)
        canvas[..., :height, :width] = values
        return canvas

    def draw_points(self, mask: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Random pixels of a mask, bool [H, W] of the original image, that the canvas shows: where
        their centres lie on it, (row, column) in 0..1, float64 [count, 2]. With repetition where
        the mask has fewer; [0, 2] where it has none."""
        axes = []  # of all rows, and of all columns: the position on the canvas; -1: not shown
        for side, resized, start, shown in zip(
            self.original, self.resized, (self.top, self.left), self.visible, strict=True
        ):
            position = (np.arange(side) + 0.5) * (resized / side) - 0.5 - start
            is_shown = (position > -0.5) & (position < shown - 0.5)
            axes.append(np.where(is_shown, position.clip(min=0), -1))
        rows, columns = axes
        inside = np.flatnonzero(mask & (rows >= 0)[:, None] & (columns >= 0))
        if not len(inside):
            return np.zeros((0, 2))
        chosen = inside[rng.choice(len(inside), count, replace=len(inside) < count)]
        row, column = np.divmod(chosen, mask.shape[1])
        return np.stack([rows[row], columns[column]], axis=1) / self.size


def seg_pixels(image: Image.Image, transform: ResizeAndPad) -> Tensor:
    """RGB image to the segmentation encoder's input: float32 [3, S, S], normalised, zero at
    padding."""
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
    """Normalises pixels [3, H, W] in place."""
    pixels -= np.float32(mean)[:, None, None]
    pixels /= np.float32(std)[:, None, None]


def image_pixels(
    image: Image.Image,
    size: int,
    mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    std: tuple[float, ...] = (0.5, 0.5, 0.5),
    resample: str = "bicubic",
) -> Tensor:
    """RGB image to the image encoder's input: float32 [3, size, size], whatever its proportions,
    normalised with mean and deviation of pixels in 0..1 (default: SigLIP's)."""
    resized = image.resize((size, size), Image.Resampling[resample.upper()])
    pixels = np.empty((3, size, size), np.float32)
    pixels[:] = np.asarray(resized).transpose(2, 0, 1)
    pixels /= np.float32(255)
    _normalise(pixels, mean, std)
    return torch.from_numpy(pixels)


# ---- from samples to batches ---------------------------------------------------------------------


class SampleTooLong(ValueError):
    """A sound sample that the model cannot be shown without losing an answer or a <SEG>."""


@dataclass
class EncodedSample:
    """What a sample adds to a batch; what follows `skipped` is empty without a tokenizer."""

    sample: Sample
    transform: ResizeAndPad
    seg_pixels: Tensor  # float32 [3, S, S]
    targets: Targets
    run_seed: int = 0  # of the random points in its losses
    skipped: list[str] = field(default_factory=list)  # why other records were not taken
    ids: list[int] = field(default_factory=list)  # N tokens, with placeholders
    labels: list[int] = field(default_factory=list)  # N tokens
    unknown: dict[str, str] = field(default_factory=dict)  # see Batch
    image_pixels: Tensor | None = None  # float32 [3, s, s]; None without image encoder
    # Of every visual prompt: (row, column) in 0..1, [P, 2], or None where it is empty; and the
    # pixels of the reference image that shows it, or None where the sample's own does.
    region_points: list[Tensor | None] = field(default_factory=list)
    reference_pixels: list[Tensor | None] = field(default_factory=list)


@dataclass
class Batch:
    """What one forward pass reads (the first block) and what its losses need."""

    task: str
    # The D reference images follow the B images in seg_pixels, or in image_pixels where regions are
    # read from image tokens (seg_tokens false).
    seg_pixels: Tensor  # float32 [B + D, 3, S, S]
    image_pixels: Tensor | None  # float32 [B, 3, s, s]; None without image encoder
    input_ids: Tensor | None  # int64 [B, N], with placeholders
    attention_mask: Tensor | None  # int64 [B, N], 0 at padding
    labels: Tensor | None  # int64 [B, N], IGNORE_LABEL but at answers
    region_points: Tensor | None  # float32 [G, P, 2], (row, column) in 0..1, of every <region>
    region_index: Tensor | None  # int64 [G], the row of these pixels that a <region> is read from
    runs: Runs | None  # what the tokens ask the decoder for; None in stage 1, or with open answers

    targets: list[Targets]  # of the R decoder runs
    run_seeds: list[int]  # of the random points in the losses of the R decoder runs
    transforms: list[ResizeAndPad]  # of the B images
    samples: list[Sample]  # B; of a Mixture without pictures and masks
    skipped: list[str]  # why other records are not in it: refused, or bad with --skip-bad
    # Words that the tokenizer lacks, and the sample where it is met; of training alone.
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def has_masks(self) -> bool:
        return TASKS[self.task].has_masks

    def to(self, device: torch.device) -> Batch:
        """The batch itself, its tensors moved to a device."""
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
    """Samples to batches for one model: sizes from its configuration, ids from its tokenizer.
    Without a tokenizer (stage 1) there is no text."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase | None):
        self.config, self.tokenizer = config, tokenizer
        model = config.model
        side = math.ceil(model.seg_image_size / model.seg_patch_size / 2) * model.seg_tokens
        self.num_visual_tokens = side**2  # of an image
        self.image_size = 0  # side of the image encoder's input; 0: there is none
        if model.image_encoder != "none" and model.image_encoder_config:
            self.image_size = model.image_encoder_config["image_size"]
            grid = self.image_size // model.image_encoder_config["patch_size"]
            self.num_visual_tokens += grid**2

    def place(
        self, sample: Sample, stage: Stage | None, rng: np.random.Generator | None
    ) -> ResizeAndPad:
        """Where the sample's image lies on the canvas: whole, or with a stage at its random scale
        and crop. A random flip is carried out on the sample itself."""
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
        """Where a whole image lies on the canvas."""
        size = self.config.model.seg_image_size
        return ResizeAndPad.fit((image.height, image.width), size, scale)

    def tokenize(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Ids and labels of a sample's conversation, [N] both. Raises SampleTooLong where they are
        more than `max_text_length`."""
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
        """The sample, without as many absent classes as the text has no room for, and its ids and
        labels. Only these words can go without losing an answer or a <SEG>: of all else
        SampleTooLong is raised."""
        while True:
            try:
                return sample, self.tokenize(sample)
            except SampleTooLong:
                absent = np.setdiff1d(np.arange(len(sample.names)), sample.labels)
                least = int(len(absent) == len(sample.names))  # one name has to stay
                if TASKS[sample.task].needs != "categories" or len(absent) <= least:
                    raise
                dropped = absent[len(absent) // 2 :]
                sample = keep_names(sample, np.setdiff1d(np.arange(len(sample.names)), dropped))

    def split(self, sample: Sample) -> list[tuple[list[int], Sample]]:
        """The sample in as few parts of equal length as its list of names has to be asked in: the
        indices of the names of a part, and the sample about these alone. Raises SampleTooLong where
        a prompt is too long that has no list to split."""
        indices = np.arange(len(sample.names))
        pieces = [(indices.tolist(), sample)]
        while self.tokenizer is not None:
            try:
                for _, piece in pieces:
                    self.tokenize(piece)
                break
            except SampleTooLong:
                if TASKS[sample.task].needs != "categories" or len(pieces) >= len(indices):
                    raise
            chunks = np.array_split(indices, len(pieces) + 1)
            pieces = [(chunk.tolist(), keep_names(sample, chunk)) for chunk in chunks]
        return pieces

    def targets(self, sample: Sample, transform: ResizeAndPad) -> Targets:
        """The sample's masks on the canvas. A mask that the crop cut away is dropped, unless it has
        a <SEG> of its own."""
        masks = transform.map_to_canvas(sample.masks)  # [T, S, S]
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
    ) -> EncodedSample:
        """Encodes one sample. With a `stage` it is for training: augmented by draws from `rng`, and
        shortened where it is too long. Raises SampleTooLong."""
        transform, is_training = self.place(sample, stage, rng), stage is not None
        if self.tokenizer is not None:
            sample, words = self.shorten(sample) if is_training else (sample, self.tokenize(sample))
        pixels, targets = seg_pixels(sample.image, transform), self.targets(sample, transform)
        encoded = EncodedSample(sample, transform, pixels, targets, run_seed)
        if self.tokenizer is None:
            return encoded
        encoded.ids, encoded.labels = words
        if is_training and self.tokenizer.unk_token_id in encoded.ids:
            lost = unknown_words(self.tokenizer, *itertools.chain(*sample.turns))
            encoded.unknown = dict.fromkeys(lost, sample.sample_id)
        if self.image_size:
            encoded.image_pixels = self.image_pixels(sample.image)
        encoded.region_points = self.region_points(sample, transform, rng)
        encoded.reference_pixels = [None] * len(encoded.region_points)
        if sample.region_images:
            encoded.reference_pixels = [
                seg_pixels(image, self.fit(image))
                if self.config.model.seg_tokens
                else self.image_pixels(image)
                for image in sample.region_images
            ]
        return encoded

    def image_pixels(self, image: Image.Image) -> Tensor:
        """The image encoder's input."""
        model = self.config.model
        statistics = model.image_mean, model.image_std, model.image_resample
        return image_pixels(image, self.image_size, *statistics)

    def region_points(
        self, sample: Sample, transform: ResizeAndPad, rng: np.random.Generator | None
    ) -> list[Tensor | None]:
        """Where the region sampler reads the visual prompts: (row, column) in 0..1, float32 [P, 2],
        of the canvas, or of the whole image where regions are read from image tokens. With
        repetition where a prompt has fewer pixels; None where it has none there. Raises
        SampleTooLong where all prompts are empty."""
        rng = rng or np.random.default_rng(0)
        count, is_on_canvas = self.config.model.num_region_points, self.config.model.seg_tokens
        transform = transform if is_on_canvas else self.fit(sample.image)
        regions = sample.regions if sample.regions is not None else ()
        transforms = [transform] * len(regions)
        if sample.region_images is not None:  # they are shown whole
            transforms = [self.fit(image) for image in sample.region_images]
        all_points: list[Tensor | None] = []
        for region, of_image in zip(regions, transforms, strict=True):
            points = of_image.draw_points(region, count, rng)
            if not is_on_canvas:
                points *= of_image.size / np.array(of_image.resized)
            all_points.append(torch.from_numpy(points).float() if len(points) else None)
        if all_points and all(points is None for points in all_points):
            raise SampleTooLong(f"{sample.sample_id}: no visual prompt has a pixel on the canvas")
        return all_points

    def fill_regions(
        self, encoded: list[EncodedSample], may_borrow: bool
    ) -> tuple[list[EncodedSample], Tensor, Tensor, list[Tensor]]:
        """The samples of a batch without the visual prompts that stay empty; the points [G, P, 2]
        of the others, and the row [G] of the batch's pixels that each is read from; the pixels of
        the D reference images, which follow those of the B images.

        Where it `may_borrow`, an empty prompt is that of the same category in another image of the
        batch. A category that no image shows leaves its sample.
        """
        prompts: list[list[tuple[Tensor, int] | None]] = []  # of every sample: points and row
        references: list[Tensor] = []
        for row, item in enumerate(encoded):
            prompts.append([])
            for points, pixels in zip(item.region_points, item.reference_pixels, strict=True):
                shown_in = row
                if points is not None and pixels is not None:
                    shown_in = len(encoded) + len(references)
                    references.append(pixels)
                prompts[row].append(None if points is None else (points, shown_in))
        lent: dict[str, tuple[Tensor, int]] = {}
        for item, own in zip(encoded, prompts, strict=True) if may_borrow else ():
            for name, prompt in zip(item.sample.names, own, strict=False):
                if prompt is not None:
                    lent.setdefault(name, prompt)
        kept_samples, kept_prompts = [], []
        for item, own in zip(encoded, prompts, strict=True):
            pairs = zip(item.sample.names, own, strict=False)  # most tasks have no prompts
            filled = [prompt or lent.get(name) for name, prompt in pairs]
            kept = [number for number, prompt in enumerate(filled) if prompt is not None]
            if len(kept) < len(filled):
                sample = keep_names(item.sample, np.array(kept))
                ids, labels = self.tokenize(sample)
                targets = self.targets(sample, item.transform)
                item = dataclasses.replace(
                    item, sample=sample, targets=targets, ids=ids, labels=labels
                )
            kept_samples.append(item)
            kept_prompts += [filled[number] for number in kept]
        empty = torch.zeros(0, self.config.model.num_region_points, 2)
        points = torch.cat([empty, *(points[None] for points, _ in kept_prompts)])
        rows = torch.tensor([row for _, row in kept_prompts], dtype=torch.long)
        return kept_samples, points, rows, references

    def collate(self, encoded: list[EncodedSample], pad_left: bool = False) -> Batch:
        """Encoded samples of one task to a batch, with padding at the right for training, or at the
        left for generation. Raises ValueError where texts and masks contradict each other."""
        name = encoded[0].sample.task
        task = TASKS[name]
        ids = attention_mask = labels = images = points = region_index = runs = None
        pixels = [item.seg_pixels for item in encoded]
        if self.tokenizer is not None:
            # Borrowed in training alone: no answer may depend on the batch.
            encoded, points, region_index, references = self.fill_regions(encoded, not pad_left)
            images = [item.image_pixels for item in encoded] if self.image_size else None
            if self.config.model.seg_tokens:
                pixels += references
            else:
                images += references
            pad_id = self.tokenizer.pad_token_id
            ids = _pad([item.ids for item in encoded], pad_id, pad_left)
            labels = _pad([item.labels for item in encoded], IGNORE_LABEL, pad_left)
            attention_mask = _pad([[1] * len(item.ids) for item in encoded], 0, pad_left)
            is_open = any(item.sample.turns[-1][1] is None for item in encoded)
            if task.has_masks and not is_open:
                is_per_phrase, special = task.is_per_phrase, special_ids(self.tokenizer)
                words = ids if task.is_grounded else without_marks(ids, special)  # of answers
                asked = torch.where(labels == IGNORE_LABEL, ids, words)
                runs = find_runs(asked, special, is_per_phrase, is_per_phrase)
        targets, run_seeds = run_targets(encoded)
        samples = [item.sample for item in encoded]
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
            transforms=[item.transform for item in encoded],
            samples=samples,
            skipped=[reason for item in encoded for reason in item.skipped],
            unknown={word: name for item in encoded for word, name in item.unknown.items()},
        )


def run_targets(encoded: list[EncodedSample]) -> tuple[list[Targets], list[int]]:
    """The targets of the decoder runs of a batch, and the seeds of their random points.

    Mostly an image is one run. Where a task has a run for every phrase that is answered by a <SEG>,
    the run has one target, whose class is the number of the phrase in the whole batch, or none
    where nothing fits the phrase. Chat has no runs.
    """
    targets, run_seeds, num_phrases = [], [], 0
    task = TASKS[encoded[0].sample.task]
    for item in encoded if task.has_masks else ():
        of_image = item.targets
        of_runs = [of_image]
        if task.is_per_phrase:
            masks, labels = of_image.masks, of_image.labels
            is_own = [labels == number for number in answered_phrases(item.sample)]
            of_runs = [
                Targets(masks[own], labels[own] + num_phrases, of_image.ignore) for own in is_own
            ]
            num_phrases += len(item.sample.names)
        targets += of_runs
        run_seeds += [item.run_seed + number for number in range(len(of_runs))]
    return targets, run_seeds


def answered_phrases(sample: Sample) -> list[int]:
    """In a task with a turn for every phrase: the numbers of the phrases whose answer has a
    <SEG>."""
    return [n for n, (_, answer) in enumerate(sample.turns) if SPECIAL_TOKENS[0] in (answer or "")]


def check_runs(runs: Runs, samples: list[Sample]) -> None:
    """Raises ValueError where the text of a sample asks for other decoder runs than its masks are
    for (`run_targets`)."""
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
    """The sample about the names at the indices `keep`, int64, alone; the masks of the others
    go."""
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
    """Rows of different lengths as int64 [B, N]."""
    length = max(len(row) for row in rows)
    gaps = [[value] * (length - len(row)) for row in rows]
    return torch.tensor(
        [gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)]
    )


# ---- sampling ------------------------------------------------------------------------------------

PICTURES = ("image", "masks", "ignore", "regions", "region_images")  # fields of a Sample

MOST_REPLACEMENTS = 100  # records in a row that may be left out before a run stops


@dataclass(frozen=True)
class Draw:
    """One place of an epoch: which record is there, and what its random numbers are drawn from."""

    dataset: int  # number in the mixture
    index: int  # of the record in the dataset
    epoch: int
    place: int  # among all draws of the dataset in the epoch


def repeat_factors(sizes: list[int], threshold: float) -> list[float]:
    """max(1, sqrt(threshold / share of all samples)) of datasets of these sizes (paper appendix A,
    "Dataset Balance Resampling")."""
    total = sum(sizes)
    return [max(1.0, math.sqrt(threshold * total / size)) for size in sizes]


def share_batches(sizes: list[int], factors: list[float], batch_size: int) -> list[int]:
    """Batches that datasets have in an epoch, at least one: the whole batches in size·factor
    samples, and one more where the largest fractions of a batch are left."""
    shares = np.array(sizes) * factors / batch_size
    total = max(1, round(shares.sum()))
    shares *= total / shares.sum()
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: total - counts.sum()]] += 1
    return np.maximum(counts, 1).tolist()


class Mixture(torch.utils.data.Dataset):
    """The datasets of a stage, resampled; every global batch comes from one of them (paper appendix
    A, "Stage 3: Mixed Fine-tuning").

    A dataset of n samples and factor r fills about n·r / batch size batches of an epoch, at least
    one: with all of its samples floor(r) times, then with a random part. Samples that are short of
    a whole batch are left out of the epoch.
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
        """A rank's micro-batches from global batch `first_step` on, without end. The micro-batches
        of a global batch go to the ranks in turn."""
        size = self.stage.micro_batch_size
        for epoch in itertools.count(first_step // len(self)):
            start = first_step % len(self) if epoch == first_step // len(self) else 0
            for batch in self.epoch(epoch)[start:]:
                pieces = [batch[at : at + size] for at in range(0, len(batch), size)]
                yield from pieces[rank::world_size]

    def __getitem__(self, draw: Draw) -> EncodedSample | ValueError:
        """The encoded sample of a draw. In place of one that is too long, or bad with `skip_bad`,
        another of its dataset is drawn, and `skipped` says why. Without `skip_bad` the error of a
        bad one is returned, not raised: a data loader would bury its message in a traceback."""
        dataset, index, skipped = self.datasets[draw.dataset], draw.index, []
        # Not place 0: numpy takes a last 0 for none, which is the generator of the epoch's shuffle.
        rng = np.random.default_rng([self.seed, draw.epoch, draw.dataset, draw.place + 1])
        while len(skipped) < MOST_REPLACEMENTS:
            try:
                sample = dataset.sample(index, rng)
                run_seed = int(rng.integers(2**62))
                encoded = self.processor.encode(sample, self.stage, rng, run_seed)
                return dataclasses.replace(encoded, skipped=skipped)
            except ValueError as error:
                if not (self.skip_bad or isinstance(error, SampleTooLong)):
                    return error
                skipped.append(str(error))
            index = int(rng.integers(len(dataset)))
        return ValueError(f"{len(skipped)} samples in a row cannot be used, first {skipped[0]}")

    def collate(self, items: list[EncodedSample | ValueError]) -> Batch | ValueError:
        """The batch of encoded samples, or the first error among them. The samples lose their
        pictures and masks, which no loss reads: megabytes that a loader process need not send."""
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
