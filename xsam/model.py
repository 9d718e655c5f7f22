"""X-SAM: the parts joined, trained by `Objective`, asked by `infer`, and read out as masks.

The whole diagram (paper section 3, figure 2). `Segmentor` alone is the model of stage 1; `XSAM`
adds the image encoder and the language model, whose condition and <SEG> states steer the segmentor.
Legend: B images, R decoder runs, P phrases, Q queries, K classes, C channels, V visual tokens.
"""

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from xsam.checkpoints import latest_checkpoint, read_header, write_header
from xsam.config import SPECIAL_TOKENS, Config, ModelConfig, xsam
from xsam.connector import (
    ConvBranch,
    Projector,
    SegmentationConnector,
    pixel_shuffle,
    sample_regions,
)
from xsam.data import Batch, Processor
from xsam.decoder import (
    CosineClassHead,
    DecoderLayer,
    LinearClassHead,
    MaskedAttentionDecoder,
    PixelDecoder,
    PixelDecoderLayer,
    Predictions,
    SamMaskDecoder,
    TwoWayLayer,
)
from xsam.encoders import Block, ImageEncoder, Placement, SamEncoder, SwinEncoder
from xsam.llm import IGNORE_LABEL, LanguageModel, add_special_tokens
from xsam.losses import Normalisers, segmentation_losses
from xsam.postprocess import (
    Prediction,
    Reading,
    merge_parts,
    read_instances,
    read_interactive,
    read_panoptic,
    read_phrases,
    read_semantic,
    read_union,
)
from xsam.prompts import PER_PHRASE_TASKS, ask, check_words, find_phrases
from xsam.samples import Sample
from xsam.weights import (
    CONFIG_FILE,
    EMBEDDING,
    SHARD_BYTES,
    complete_architecture,
    disk_name,
    list_tensors,
    load_tensors,
    own_tensors,
    parameters_on_meta,
    read_published,
    read_tokenizer,
    save_model,
)


@dataclass
class Outputs:
    """What a forward pass leaves for the losses."""

    predictions: Predictions | None  # None where nothing is segmented
    token_loss: Tensor | None  # summed over the labelled tokens; None in stage 1


def build_seg_encoder(config: ModelConfig) -> SamEncoder | SwinEncoder:
    """The segmentation encoder that a configuration asks for. Raises ValueError where it says of a
    backbone what that is not."""
    if not config.seg_backbone_config:
        return SamEncoder(
            image_size=config.seg_image_size,
            patch_size=config.seg_patch_size,
            dim=config.seg_dim,
            depth=config.seg_depth,
            num_heads=config.seg_heads,
            mlp_dim=config.seg_mlp_dim,
            window_size=config.seg_window_size,
            global_blocks=config.seg_global_blocks,
            neck_dim=config.seg_neck_dim,
        )
    encoder = SwinEncoder(config.seg_backbone_config)
    if (config.seg_patch_size, config.seg_dim) != (encoder.stride, encoder.dims[-2]):
        raise ValueError(
            f"the backbone's last scale but one has stride {encoder.stride} and width "
            f"{encoder.dims[-2]}: seg_patch_size and seg_dim must say so"
        )
    return encoder


class Segmentor(nn.Module):
    """Segmentation encoder, connector, segmentation decoder and class head."""

    stage, prefix = 1, "segmentor."  # of its checkpoints; what its names begin with on disk
    tokenizer = None  # this model reads no text

    def __init__(self, settings: Config, class_head: nn.Module | None = None):
        """`class_head` None: the linear head of stage 1."""
        super().__init__()
        self.settings, config = settings, settings.model
        self.encoder = build_seg_encoder(config)
        self.connector = self.pixel_decoder = None
        decoder_sizes = dict(
            dim=config.decoder_dim,
            num_layers=config.decoder_layers,
            num_heads=config.decoder_heads,
            mlp_dim=config.decoder_mlp_dim,
            num_queries=config.num_queries,
        )
        if config.decoder == "sam":
            if config.seg_backbone_config or config.seg_neck_dim != config.decoder_dim:
                raise ValueError(
                    "decoder sam reads the neck of SAM's encoder: it wants a SAM seg_encoder and "
                    "decoder_dim equal to seg_neck_dim"
                )
            self.decoder = SamMaskDecoder(**decoder_sizes)
        else:
            if not config.seg_backbone_config:
                self.connector = SegmentationConnector(
                    config.connector,
                    config.seg_dim,
                    config.connector_dim,
                    config.connector_scales,
                    config.connector_layers,
                )
            self.pixel_decoder = PixelDecoder(
                in_dims=(self.connector or self.encoder).dims,
                dim=config.decoder_dim,
                num_layers=config.pixel_decoder_layers,
                num_heads=config.decoder_heads,
                num_points=config.pixel_decoder_points,
                mlp_dim=config.pixel_decoder_mlp_dim,
            )
            num_levels = self.pixel_decoder.num_levels
            self.decoder = MaskedAttentionDecoder(**decoder_sizes, num_levels=num_levels)
        self.class_head = class_head or LinearClassHead(config.decoder_dim, config.num_classes)

    def decode(
        self,
        hidden_states: list[Tensor],
        image_index: Tensor,
        seg_embeddings: Tensor | None,
        *conditions: Tensor,
    ) -> Predictions:
        """Masks and class logits of each run. An image is decoded to features once, however many
        runs (image_index [R]) read them; `conditions` are the class head's."""
        feature_index = None
        if self.pixel_decoder is None:
            neck = self.encoder.neck(hidden_states[-1])[image_index]
            queries, mask_embeddings, mask_features = self.decoder(neck, seg_embeddings)
            feature_index = torch.arange(len(image_index), device=image_index.device)
        else:
            if self.connector is not None:
                scales = self.connector(hidden_states)
            else:
                scales = [x.permute(0, 3, 1, 2) for x in hidden_states[: len(self.encoder.dims)]]
            mask_features, levels = self.pixel_decoder(scales)
            levels = [level[image_index] for level in levels]
            queries, mask_embeddings = self.decoder(
                mask_features[image_index], levels, seg_embeddings
            )
        class_logits = self.class_head(queries, *conditions)
        return Predictions(class_logits, mask_embeddings, mask_features, image_index, feature_index)

    def forward(self, batch: Batch) -> Outputs:
        """Stage 1: one run for each image, classes of the linear head."""
        hidden_states = self.encoder(batch.seg_pixels)
        image_index = torch.arange(len(batch.seg_pixels), device=batch.seg_pixels.device)
        return Outputs(self.decode(hidden_states, image_index, None), None)

    @torch.no_grad()
    def infer(self, batch: Batch, max_new_tokens: int = 0) -> tuple[list[str], Predictions]:
        """Answers (none here) and predictions, as `XSAM.infer` gives them."""
        return [""] * len(batch.seg_pixels), self(batch).predictions


class XSAM(nn.Module):
    """One multimodal model for every segmentation task and for chat."""

    stage, prefix = 3, ""

    def __init__(
        self,
        settings: Config,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_encoder: ImageEncoder | None = None,
        llm: LanguageModel | None = None,
    ):
        """`tokenizer` gains the special tokens; without one the model can be built and loaded, but
        not run (`set_tokenizer`). An image encoder or language model that is given is used, and not
        made anew."""
        super().__init__()
        self.settings, config = settings, settings.model
        self.segmentor = Segmentor(settings, CosineClassHead(config.logit_clamp))
        self.image_encoder = self.image_projector = None
        self.llm = llm or LanguageModel(config.llm_config)
        if config.image_encoder != "none":
            self.image_encoder = image_encoder or ImageEncoder(config.image_encoder_config)
            self.image_projector = Projector(self.image_encoder.dim, self.llm.dim)
        self.seg_projector = Projector(4 * config.seg_dim, self.llm.dim)
        self.llm_projector = Projector(self.llm.dim, config.decoder_dim)
        self.background_embedding = nn.Embedding(1, config.decoder_dim)
        if tokenizer is not None:
            self.set_tokenizer(tokenizer)

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes over the tokenizer; the configuration keeps the vocabulary's size."""
        self.tokenizer = tokenizer
        rows = self.llm.set_tokenizer(tokenizer)
        self.settings.model.llm_config = self.settings.model.llm_config | {"vocab_size": rows}

    def encode(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Embeddings [B, N, C] of the batch's words, visual tokens and regions, and the hidden
        states of the segmentation encoder for its images. Image tokens come before segmentation
        tokens. An image that only shows a region for another passes the segmentation encoder."""
        B = len(batch.input_ids)
        images, *donors = batch.seg_pixels.split(B)
        hidden_states = self.segmentor.encoder(images)
        shown = [hidden_states[-2], *(self.segmentor.encoder(each)[-2] for each in donors)]
        grid = self.seg_projector(pixel_shuffle(torch.cat(shown), 0.5))  # [B + D, H, W, C]
        visual_tokens = grid[:B].flatten(1, 2)
        if self.image_encoder is not None:
            image_tokens = self.image_projector(self.image_encoder(batch.image_pixels))
            visual_tokens = torch.cat([image_tokens, visual_tokens], dim=1)
        pooling = self.settings.model.region_pooling
        regions = sample_regions(grid, batch.region_points, batch.region_index, pooling)
        return self.llm.embed(batch.input_ids, visual_tokens, regions), hidden_states

    def forward(self, batch: Batch) -> Outputs:
        embeddings, hidden_states = self.encode(batch)
        states = self.llm(embeddings, batch.attention_mask)
        token_loss = self.llm.token_loss(states, batch.labels)
        if batch.task == "chat":
            return Outputs(None, token_loss)
        predictions = self.segment(batch.task, hidden_states, states, batch.input_ids)
        if predictions is None and self.training:
            # Nothing that is asked for is there. The segmentor takes part with a gradient of zero,
            # as it does on the ranks, and in the micro-batches, that find something.
            idle = (self.segmentor, self.llm_projector, self.background_embedding)
            parameters = [p for part in idle for p in part.parameters() if p.requires_grad]
            token_loss = token_loss + 0 * sum(parameter.sum() for parameter in parameters)
        return Outputs(predictions, token_loss)

    def segment(
        self, task: str, hidden_states: list[Tensor], states: Tensor, input_ids: Tensor
    ) -> Predictions | None:
        """Runs the segmentor once for each <SEG> among input_ids [B, N]; None where there is none.

        Most tasks have one run an image, whose classes are the image's phrases. Referring and
        reasoning have a run for each <SEG> that answers a phrase, the last one before it; in
        training the phrases of the whole batch are the classes, so that the others are negatives,
        at inference the phrase stands alone and no answer depends on the batch.
        """
        is_per_phrase = task in PER_PHRASE_TASKS
        number = self.llm.phrase_numbers(input_ids)
        phrases = self._phrase_means(states, number)  # [P, C]
        opens = input_ids == self.llm.phrase_id
        phrase_counts = opens.sum(1)  # [B]
        first_phrase = phrase_counts.cumsum(0) - phrase_counts

        image_index, position = (input_ids == self.llm.seg_id).nonzero(as_tuple=True)
        last_phrase = opens.flatten().cumsum(0).view_as(input_ids)[image_index, position] - 1
        # Of the <SEG>s of one phrase, or of one image, the first counts.
        owner = last_phrase if is_per_phrase else image_index
        is_run = owner != F.pad(owner, (1, 0), value=-1)[:-1]
        if is_per_phrase:
            is_run &= last_phrase >= first_phrase[image_index]
        image_index, position, last_phrase = (
            each[is_run] for each in (image_index, position, last_phrase)
        )  # [R]
        if len(image_index) == 0:
            return None

        if is_per_phrase and self.training:
            conditions = phrases.expand(len(image_index), -1, -1)
            is_padding = conditions.new_zeros(conditions.shape[:2], dtype=torch.bool)
        elif is_per_phrase:
            conditions = phrases[last_phrase][:, None]
            is_padding = conditions.new_zeros(conditions.shape[:2], dtype=torch.bool)
        else:
            column = torch.arange(int(phrase_counts.max()), device=states.device)
            is_padding = column >= phrase_counts[image_index][:, None]  # [R, K]
            rows = first_phrase[image_index][:, None] + column
            conditions = phrases[rows.clamp(max=max(len(phrases) - 1, 0))]
        background = self.background_embedding.weight.expand(len(image_index), 1, -1)
        conditions = torch.cat([conditions, background], dim=1)
        is_padding = F.pad(is_padding, (0, 1))

        seg_embeddings = self.llm_projector(states[image_index, position])
        return self.segmentor.decode(
            hidden_states, image_index, seg_embeddings, conditions, is_padding
        )

    def _phrase_means(self, states: Tensor, number: Tensor) -> Tensor:
        """Means of the projected states of each phrase: [P, C]."""
        inside = number >= 0
        projected = self.llm_projector(states[inside])
        index = number[inside]
        num_phrases = int(index.max()) + 1 if len(index) else 0
        sums = projected.new_zeros(num_phrases, projected.shape[-1]).index_add(0, index, projected)
        return sums / index.bincount(minlength=num_phrases)[:, None]

    @torch.no_grad()
    def infer(self, batch: Batch, max_new_tokens: int) -> tuple[list[str], Predictions | None]:
        """Greedy answers to a left-padded batch, and what their <SEG> tokens segment."""
        embeddings, hidden_states = self.encode(batch)
        new_ids, states, new_states = self.llm.generate(
            embeddings, batch.attention_mask, max_new_tokens
        )
        answers = [self.tokenizer.decode(row[row >= 0]).strip() for row in new_ids]
        if batch.task == "chat":
            return answers, None
        # The classes are the question's phrases, or where it has none (GCG) those of the answer.
        if batch.task == "gcg":
            new_ids = self.llm.keep_closed_phrases(new_ids)
        else:
            spans = torch.tensor([self.llm.phrase_id, self.llm.phrase_end_id]).to(new_ids)
            new_ids = new_ids.masked_fill(torch.isin(new_ids, spans), IGNORE_LABEL)
        input_ids = torch.cat([batch.input_ids, new_ids], dim=1)
        states = torch.cat([states, new_states], dim=1)
        return answers, self.segment(batch.task, hidden_states, states, input_ids)

    def predict(
        self, image: Image.Image | list[Image.Image], task: str, text: str | list[str] = "", **names
    ) -> "Prediction | list[Prediction]":
        """See `predict` below."""
        return predict(self, image, task, text, **names)

    @classmethod
    def from_pretrained(cls, path: Path | str, **options) -> "XSAM":
        """The whole model of a checkpoint, ours or a published one: see `load_checkpoint`."""
        model, _ = load_checkpoint(path, **options)
        if not isinstance(model, cls):
            raise ValueError(
                f"{path}: the segmentor of stage 1 alone; see xsam.model.load_checkpoint"
            )
        return model

    def save_pretrained(self, folder: Path | str, max_shard_bytes: int = SHARD_BYTES) -> None:
        """Writes a folder that `from_pretrained` reads: weights in safetensors, in several files
        above `max_shard_bytes`, config.json and the tokenizer. Raises ValueError where the folder
        holds something already."""
        save_pretrained(self, Path(folder), max_shard_bytes)


# ---- what is trained -----------------------------------------------------------------------------


class Objective(nn.Module):
    """The model and its criterion: what DistributedDataParallel wraps."""

    def __init__(self, model: Segmentor | XSAM, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: Batch | None, normalisers: Normalisers | None) -> dict[str, Tensor]:
        """Weighted losses of one micro-batch; over a step's micro-batches and ranks they add up.
        Without a batch: something that every trained parameter has a part in but the first (DDP
        warns where it has to look for unused ones and finds none)."""
        if batch is None:
            trained = [each for each in self.model.parameters() if each.requires_grad]
            return {"all": sum(each.sum() for each in trained[1:])}
        device, weights = batch.seg_pixels.device, self.config.loss
        is_mixed = self.config.dtype != "float32"
        with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
            outputs = self.model(batch)
        losses = {}
        if batch.task != "chat":  # every rank has the same names, also where nothing is found
            losses = {name: torch.zeros((), device=device) for name in ("class", "mask", "dice")}
        if outputs.predictions is not None:
            generators = [torch.Generator(device).manual_seed(seed) for seed in batch.run_seeds]
            parts = segmentation_losses(
                outputs.predictions, batch.targets, generators, normalisers, weights
            )
            losses = {name: getattr(weights, f"{name}_weight") * x for name, x in parts.items()}
        if outputs.token_loss is not None:
            losses["text"] = outputs.token_loss / normalisers.tokens
        return losses


# What the parts repeat; the last is the layer of every model of transformers.
BLOCKS = (
    Block,
    ConvBranch,
    PixelDecoderLayer,
    DecoderLayer,
    TwoWayLayer,
    GradientCheckpointingLayer,
)


def checkpoint_activations(model: nn.Module) -> None:
    """From now on every block keeps nothing but its input for the backward pass, and runs again in
    it (Chen et al. 2016): the same gradients for a third more work."""
    for module in model.modules():
        if isinstance(module, BLOCKS):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """From now on every block runs as torch.compile makes it; blocks of one kind share what is
    compiled. To be called before `checkpoint_activations`, which then repeats the compiled one."""
    for module in model.modules():
        if isinstance(module, BLOCKS):
            module.forward = torch.compile(module.forward, backend=backend)


# ---- asking -------------------------------------------------------------------------------------

# What is asked for, by the word of the command line: the task whose questions ask for it (of
# `prompts.PHRASINGS`), and how its masks are read.
REQUESTS = {
    "chat": ("chat", "nothing"),
    "panoptic": ("generic", "panoptic"),
    "instance": ("generic", "instances"),
    "semantic": ("generic", "semantic"),
    "refer": ("refer", "phrases"),
    "reason": ("reason", "phrases"),
    "gcg": ("gcg", "phrases"),
    "interactive": ("interactive", "interactive"),
    "vgd": ("vgd", "instances"),
}


@dataclass
class Part:
    """One forward pass: rows of the samples asked, each about some of its names."""

    batch: Batch
    rows: list[int]
    places: list[list[int]]  # of each row's names in its sample's


@dataclass
class Questions:
    """Samples of one task, made ready for a model."""

    samples: list[Sample]
    parts: list[Part]  # more than one where a list of names does not fit one prompt


def prepare(processor: Processor, samples: list[Sample]) -> Questions:
    """Samples whose answers are left open, as batches. A generic prompt that is too long is asked
    in several parts, whose classes are the sample's together."""
    pieces = [processor.split(sample) for sample in samples]
    parts = []
    for number in range(max(map(len, pieces))):
        rows = [row for row, each in enumerate(pieces) if number < len(each)]
        encoded = [processor.encode(pieces[row][number][1]) for row in rows]
        batch = processor.collate(encoded, pad_left=True)
        places = []
        for row, kept in zip(rows, batch.samples, strict=True):
            place, piece = pieces[row][number]
            if len(kept.names) < len(piece.names):  # a visual prompt without a pixel is not asked
                place = [samples[row].names.index(name) for name in kept.names]
            places.append(place)
        parts.append(Part(batch, rows, places))
    return Questions(samples, parts)


@torch.no_grad()
def answer(
    model: Segmentor | XSAM,
    questions: Questions,
    reading: str,
    is_thing: list[bool] | None = None,
) -> list[Prediction]:
    """What a model says of `questions`, its masks taken by `reading` (REQUESTS; "union" for
    expressions that may mean several objects).

    `is_thing` tells for each class of a panoptic prompt whether its instances are kept apart. A
    sample that the model answers without a <SEG> has no masks.
    """
    model.eval()
    settings = model.settings
    parameter = next(model.parameters())
    device, is_mixed = parameter.device, parameter.dtype != torch.float32  # as in training
    texts = [""] * len(questions.samples)
    found = [[] for _ in questions.samples]  # class probabilities, mask logits, places of names
    placements = [None] * len(questions.samples)
    for part in questions.parts:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
            answers, predictions = model.infer(part.batch.to(device), settings.max_new_tokens)
        runs, mask_logits = {}, None
        if predictions is not None:
            runs = {row: run for run, row in enumerate(predictions.image_index.tolist())}
            mask_logits = predictions.mask_logits()
        for number, (row, text) in enumerate(zip(part.rows, answers, strict=True)):
            texts[row], placements[row] = texts[row] or text, part.batch.placements[number]
            if number not in runs:
                continue
            sample, places = part.batch.samples[number], part.places[number]
            if sample.task == "gcg":
                places = list(range(len(find_phrases(text))))
            logits = predictions.class_logits[-1, runs[number]].float()
            if isinstance(model, Segmentor):  # its classes are its own, however they are asked for
                columns = _own_columns(model, sample)
                probabilities = logits.softmax(-1)[:, [*columns, -1]]
            else:  # padded to the longest prompt
                logits = torch.cat([logits[:, : len(places)], logits[:, -1:]], dim=1)
                probabilities = logits.softmax(-1)
            found[row].append((probabilities, mask_logits[runs[number]], places))
    results = []
    for row, (sample, text) in enumerate(zip(questions.samples, texts, strict=True)):
        names = find_phrases(text) if sample.task == "gcg" else sample.names
        masks, categories, scores = _read(
            reading, found[row], len(names), placements[row], sample, is_thing, settings
        )
        labels = [names[category] for category in categories]
        num_prompts = sum(row in part.rows for part in questions.parts)
        results.append(
            Prediction(sample.image, masks, categories, labels, scores, text, num_prompts)
        )
    return results


def _own_columns(model: Segmentor, sample: Sample) -> list[int]:
    """Which outputs of the linear head are the classes of a sample."""
    own = [category["name"] for category in model.settings.categories]
    if unknown := [name for name in sample.names if name not in own]:
        raise ValueError(
            f"a stage-1 checkpoint segments the {len(own)} categories that it was trained on; "
            f"{unknown[0]!r} is none of them"
        )
    return [own.index(name) for name in sample.names]


def _read(
    reading: str,
    found: list[tuple[Tensor, Tensor, list[int]]],
    num_names: int,
    placement: Placement,
    sample: Sample,
    is_thing: list[bool] | None,
    settings: Config,
) -> Reading:
    """Masks at the image's size, their places among the names, and scores."""
    if reading == "nothing" or not found or not num_names:
        return np.zeros((0, *placement.original), bool), [], []
    parts = [(probabilities, mask_logits) for probabilities, mask_logits, _ in found]
    outputs = (*merge_parts(parts, [places for *_, places in found], num_names), placement)
    if reading == "panoptic":
        return read_panoptic(
            *outputs, is_thing, settings.score_threshold, settings.overlap_threshold
        )
    if reading == "interactive":
        return read_interactive(*outputs, sample.regions[0])
    readers = {"instances": read_instances, "semantic": read_semantic}
    readers |= {"phrases": read_phrases, "union": read_union}
    return readers[reading](*outputs)


def predict(
    model: Segmentor | XSAM,
    image: Image.Image | list[Image.Image],
    task: str,
    text: str | list[str] = "",
    things: list[str] | None = None,
    stuff: list[str] | None = None,
    regions: list[np.ndarray] | None = None,
    region_image: Image.Image | None = None,
) -> Prediction | list[Prediction]:
    """One request, or a list of images with the same one or a list of texts.

    task (REQUESTS): "panoptic", "instance" and "semantic" segment the categories `things` and
    `stuff` (default: those the model was trained on; any number of names, asked in several prompts
    where they do not fit one), "refer" and "reason" what `text` refers to or asks for, "gcg" what
    the model says of the image, "interactive" and "vgd" what the `regions` mark, bool [H, W] each:
    one object, or all objects of their kinds, which `region_image` may show in place of the image
    itself; "chat" answers `text`. Raises ValueError at another task, a missing text or region, a
    text with tokens of the prompt format, or a task that needs a language model where there is
    none.
    """
    if task not in REQUESTS:
        raise ValueError(f"unknown task {task!r}; known are {', '.join(REQUESTS)}")
    kind, reading = REQUESTS[task]
    if isinstance(model, Segmentor) and kind != "generic":
        raise ValueError(f"a stage-1 checkpoint has no language model, which {task} needs")
    if kind in ("chat", "refer", "reason") and not text:
        raise ValueError(f"task {task} needs a text")
    if kind in ("interactive", "vgd") and not regions:
        raise ValueError(f"task {task} needs regions")
    if task == "interactive" and (len(regions) > 1 or region_image is not None):
        raise ValueError("task interactive takes one region, of the image itself")
    images = image if isinstance(image, list) else [image]
    texts = text if isinstance(text, list) else [text] * len(images)
    if len(texts) != len(images):
        raise ValueError(f"{len(images)} images but {len(texts)} texts")
    names, is_thing = [], []
    if kind == "generic":
        categories = [(name, True) for name in things or []] + [
            (name, False) for name in stuff or []
        ]
        categories = categories or [
            (each["name"], each["is_thing"])
            for each in model.settings.categories
            if each["is_thing"] or task != "instance"
        ]
        if not categories:
            raise ValueError("this model knows no categories of its own: name things or stuff")
        names, is_thing = map(list, zip(*categories, strict=True))
    for words in [*filter(None, texts), *names]:  # a generic request takes no text
        check_words(words, "a text or a name")
    region_image = region_image and region_image.convert("RGB")
    samples = []
    for picture, words in zip(images, texts, strict=True):
        picture = picture.convert("RGB")
        shape = (region_image or picture).size[::-1]
        if wrong := [region.shape for region in regions or () if region.shape != shape]:
            raise ValueError(f"a region of {wrong[0]} in an image of {shape} (height, width)")
        question, classes = words, []
        if kind == "generic":
            question, classes = ask(kind, names), names
        elif kind in ("refer", "reason"):
            question, classes = ask(kind, [words]), [words]
        elif kind != "chat":
            classes = [f"region {number}" for number in range(1, len(regions or ()) + 1)]
            question = ask(kind, ["<region>"] * len(classes))
        samples.append(
            Sample(
                sample_id="request",
                task=kind,
                image=picture,
                turns=[(question, None)],
                masks=np.zeros((0, picture.height, picture.width), bool),
                labels=np.zeros(0, np.int64),
                names=classes,
                regions=np.stack(regions) if regions and not region_image else regions,
                region_images=[region_image] * len(classes) if region_image else None,
            )
        )
    questions = prepare(Processor(model.settings, model.tokenizer), samples)
    predictions = answer(model, questions, reading, is_thing)
    return predictions if isinstance(image, list) else predictions[0]


# ---- models from disk ----------------------------------------------------------------------------


def save_pretrained(model: Segmentor | XSAM, folder: Path, max_shard_bytes: int) -> None:
    """See `XSAM.save_pretrained`."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, own_tensors(model), model.prefix, max_shard_bytes)
    write_header(folder, model.settings, model.stage, step=0)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def load_checkpoint(
    path: Path | str,
    *,
    config: Config | None = None,
    tokenizer: Path | str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    allow_missing: tuple[str, ...] = (),
    report: Callable[[str], None] = print,
) -> tuple[Segmentor | XSAM, int]:
    """The model of a checkpoint and its stage (1: a `Segmentor`, 3: an `XSAM`), ready to answer.

    `path` is a folder that we wrote (a step_N, its stage's folder, or one of `save_pretrained`), or
    a published X-SAM checkpoint of either generation, a folder or a file. A published one says
    nothing of its architecture: `config` does (default: the full preset with the language model of
    the folder `tokenizer`), and `tokenizer` has the words where `path` has none. `dtype` None keeps
    what is stored. Names that begin with one of `allow_missing` (as on disk, such as "llm.") may be
    absent and start as a new model's, in float32 unless `dtype` says otherwise, as all then is.
    `report` is told what was loaded. Raises ValueError that names file and tensor where anything
    does not fit.
    """
    path = Path(path)
    path = latest_checkpoint(path) or path
    if (path / CONFIG_FILE).is_file():
        header = read_header(path)
        stage, config = header["stage"], header["config"]
        stored = list_tensors(path)
    else:
        stored = list_tensors(path)
        stage, generation, changes = read_published(stored, path)
        if config is None:
            config = xsam()
            for name, value in changes.items():
                setattr(config.model, name, value)
            if tokenizer and (Path(tokenizer) / CONFIG_FILE).is_file():
                config.model.llm_config = {}
                complete_architecture(config.model, "llm", Path(tokenizer))
        config = copy.deepcopy(config)
        report(f"{path}: a published checkpoint of stage {stage}, {generation} generation")
    if stage == 2:
        raise ValueError(f"{path}: stage 2 holds the projectors alone; give a stage 1 or 3")
    table = next((entry for name, entry in stored.items() if disk_name(name) == EMBEDDING), None)
    if stage == 3 and table is not None:
        config.model.llm_config = config.model.llm_config | {"vocab_size": table.shape[0]}
    with contextlib.nullcontext() if allow_missing else parameters_on_meta():
        model = Segmentor(config) if stage == 1 else XSAM(config)
    options = {"allow_missing": allow_missing, "dtype": dtype, "device": device}
    report(load_tensors(model, stored, path, model.prefix, **options))
    if allow_missing:  # its parameters had values, and so a type, before
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype or parameter.dtype)
    if stage == 3:
        words = read_tokenizer(Path(tokenizer) if tokenizer else path)
        add_special_tokens(words)
        if table is not None and len(words) > table.shape[0]:
            raise ValueError(
                f"{tokenizer or path}: {len(words)} tokens with {', '.join(SPECIAL_TOKENS)}, but "
                f"{path} has {table.shape[0]} rows of embeddings: the tokenizer of another model"
            )
        model.set_tokenizer(words)
    return model.to(device).eval(), stage
