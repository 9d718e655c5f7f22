"""Asking a model: requests, their answers as masks, and models from the disk.

`predict` is the whole of it (docs/predict.md). It makes a `Sample` of a request, `build_inputs`
makes batches of samples, `predict_inputs` runs the model and makes masks (postprocess.py).
`load_checkpoint` opens our checkpoints and the published ones.
"""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from xsam.checkpoints import (
    find_base,
    find_checkpoint,
    load_trained,
    read_header,
    write_header,
)
from xsam.cli import inference_changes
from xsam.config import SPECIAL_TOKENS, Config, xsam
from xsam.data import Batch, Processor, ResizeAndPad, Sample
from xsam.distributed import choose_device
from xsam.files import check_target
from xsam.images import Picture, read_image, viewed
from xsam.llm import add_special_tokens, unknown_words
from xsam.lora import add_adapters, attach, merge_adapters
from xsam.model import XSAM, ImageFeatures, Segmentor
from xsam.names import read_names
from xsam.optimizer import freeze
from xsam.postprocess import (
    Reading,
    instance_inference,
    interactive_inference,
    merge_parts,
    panoptic_inference,
    phrase_inference,
    semantic_inference,
    union_inference,
)
from xsam.prompts import ask, check_words, find_phrases, read_answer
from xsam.regions import KINDS, Mark, Region, draw_region, read_region
from xsam.results import SHOWN_SCORE, SegmentationResult
from xsam.tasks import TASKS, Request, requested_task, requests
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
    save_bin,
    save_model,
    weights_digest,
)

# The fields of Config that one request may change.
CHOICES = "score_threshold", "overlap_threshold", "presence", "panoptic_rule", "max_new_tokens"

# From class probabilities, mask logits and the image's transform, with the sample, the flags of its
# things and the configuration beside, to masks at the image's size, class numbers and scores.
POST_PROCESSING = {
    "panoptic": lambda outputs, sample, is_thing, config: panoptic_inference(
        *outputs, is_thing, config.score_threshold, config.overlap_threshold, config.panoptic_rule
    ),
    "instances": lambda outputs, *_: instance_inference(*outputs),
    "semantic": lambda outputs, *_: semantic_inference(*outputs),
    "phrases": lambda outputs, sample, _, config: phrase_inference(
        *outputs, presence=config.presence if TASKS[sample.task].is_per_phrase else 0.0
    ),
    "union": lambda outputs, sample, _, config: union_inference(*outputs, presence=config.presence),
    "interactive": lambda outputs, sample, *_: interactive_inference(*outputs, sample.regions[0]),
}


@dataclass
class Part:
    """One forward pass: rows of the samples asked, each about some of its names."""

    batch: Batch
    rows: list[int]
    indices: list[list[int]]  # of each row's names among its sample's


@dataclass
class Inputs:
    """Samples of one task, made ready for a model."""

    samples: list[Sample]
    parts: list[Part]  # more than one where a list of names does not fit one prompt


def build_inputs(processor: Processor, samples: list[Sample]) -> Inputs:
    """Samples whose answers are left open, as batches. A generic prompt that is too long is asked
    in several parts, whose classes are the sample's together."""
    pieces = [processor.split(sample) for sample in samples]
    parts = []
    for number in range(max(map(len, pieces))):
        rows = [row for row, each in enumerate(pieces) if number < len(each)]
        encoded = [processor.encode(pieces[row][number][1]) for row in rows]
        batch = processor.collate(encoded, pad_left=True)
        indices = []
        for row, kept in zip(rows, batch.samples, strict=True):
            index, piece = pieces[row][number]
            if len(kept.names) < len(piece.names):  # a visual prompt without a pixel is not asked
                index = [samples[row].names.index(name) for name in kept.names]
            indices.append(index)
        parts.append(Part(batch, rows, indices))
    return Inputs(samples, parts)


@torch.no_grad()
def predict_inputs(
    model: Segmentor | XSAM,
    inputs: Inputs,
    post_processing: str,
    is_thing: list[bool] | None = None,
    config: Config | None = None,
    **options: Any,
) -> list[SegmentationResult]:
    """What a model predicts of `inputs`, its masks by an entry of POST_PROCESSING ("union" for
    expressions that may mean several objects).

    `is_thing` tells for each class of a panoptic prompt whether its instances are kept apart. A
    sample that the model answers without a <SEG> has no masks. `config` is taken in place of the
    model's, `options` are those of `model.infer`. Raises ValueError where POST_PROCESSING
    has no such entry.
    """
    if post_processing not in ("none", *POST_PROCESSING):
        known = ", ".join(POST_PROCESSING)
        raise ValueError(f"no post-processing {post_processing!r}; POST_PROCESSING has {known}")
    model.eval()
    config = config or model.config
    parameter = next(model.parameters())
    device, is_mixed = parameter.device, parameter.dtype != torch.float32  # as in training
    texts = [""] * len(inputs.samples)
    found = [[] for _ in inputs.samples]  # class probabilities, mask logits, indices of names
    transforms = [None] * len(inputs.samples)
    for part in inputs.parts:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
            batch = part.batch.to(device)
            answers, predictions = model.infer(batch, config.max_new_tokens, **options)
        runs, mask_logits = {}, None
        if predictions is not None:
            runs = {row: run for run, row in enumerate(predictions.image_index.tolist())}
            mask_logits = predictions.mask_logits()
        for number, (row, text) in enumerate(zip(part.rows, answers, strict=True)):
            texts[row], transforms[row] = texts[row] or text, part.batch.transforms[number]
            if number not in runs:
                continue
            sample, indices = part.batch.samples[number], part.indices[number]
            if TASKS[sample.task].is_grounded:
                indices = list(range(len(find_phrases(text))))
            logits = predictions.class_logits[-1, runs[number]].float()
            if isinstance(model, Segmentor):  # its classes are its own, however they are asked for
                columns = _own_columns(model, sample)
                probabilities = logits.softmax(-1)[:, [*columns, -1]]
            else:  # padded to the longest prompt
                logits = torch.cat([logits[:, : len(indices)], logits[:, -1:]], dim=1)
                probabilities = logits.softmax(-1)
            found[row].append((probabilities, mask_logits[runs[number]], indices))
    results = []
    for row, (sample, text) in enumerate(zip(inputs.samples, texts, strict=True)):
        names = find_phrases(text) if TASKS[sample.task].is_grounded else sample.names
        masks, categories, scores = post_process(
            post_processing, found[row], len(names), transforms[row], sample, is_thing, config
        )
        labels = [names[category] for category in categories]
        num_prompts = sum(row in part.rows for part in inputs.parts)
        results.append(
            SegmentationResult(
                sample.image, masks, categories, labels, scores, text, num_prompts, names
            )
        )
    return results


def _own_columns(model: Segmentor, sample: Sample) -> list[int]:
    """Which outputs of the linear head are the classes of a sample."""
    own = [category["name"] for category in model.config.categories]
    if unknown := [name for name in sample.names if name not in own]:
        raise ValueError(
            f"a stage-1 checkpoint segments the {len(own)} categories that it was trained on; "
            f"{unknown[0]!r} is none of them"
        )
    return [own.index(name) for name in sample.names]


def post_process(
    name: str,
    found: list[tuple[Tensor, Tensor, list[int]]],
    num_names: int,
    transform: ResizeAndPad,
    sample: Sample,
    is_thing: list[bool] | None,
    config: Config,
) -> Reading:
    """Masks at the image's size, their numbers among the names, and scores, from the class
    probabilities and mask logits of each prompt and the numbers of its names."""
    if name == "none" or not found or not num_names:
        return np.zeros((0, *transform.original), bool), [], []
    outputs = [(probabilities, mask_logits) for probabilities, mask_logits, _ in found]
    merged = merge_parts(outputs, [indices for *_, indices in found], num_names)
    return POST_PROCESSING[name]((*merged, transform), sample, is_thing, config)


@dataclass
class EncodedImage:
    """An image with what the encoders of a model make of it: `predict` takes it for an image, and
    saves that time for every further request."""

    image: Image.Image
    features: ImageFeatures


@torch.no_grad()
def encode_image(model: Segmentor | XSAM, image: Picture | Path | str) -> EncodedImage:
    """An image for several requests, as viewers show it (`viewed`)."""
    image = viewed(_open_image(image))
    task = "generic" if model.stage == 1 else "gcg"  # any, as none changes the pixels
    sample = build_sample(task, image, "", [], [], None)
    batch = build_inputs(Processor(model.config, model.tokenizer), [sample]).parts[0].batch
    parameter = next(model.parameters())
    is_mixed = parameter.dtype != torch.float32
    with torch.autocast(parameter.device.type, torch.bfloat16, enabled=is_mixed):
        return EncodedImage(image, model.eval().encode_images(batch.to(parameter.device)))


def predict(
    model: Segmentor | XSAM,
    image: Picture | Path | str | EncodedImage | list,
    task: str,
    text: str | list[str] = "",
    things: list[str] | str | None = None,
    stuff: list[str] | str | None = None,
    regions: list[Region] | None = None,
    region_image: Picture | Path | str | None = None,
    threshold: float | None = None,
    on_text: Callable[[str], None] | None = None,
    **changes: Any,
) -> SegmentationResult | list[SegmentationResult]:
    """One request, or a list of images with the same one or a list of texts.

    Args:
        image: a path, a picture or array, or an image of `encode_image`. It is taken as viewers
            show it (`viewed`), upright unless a region has the size of the stored pixels; the
            result's `image` is that, and its masks are of it.
        task: of `tasks.requests`. "panoptic", "instance" and "semantic" segment the categories
            `things` and `stuff`, "refer" and "reason" what `text` refers to or asks for, "gcg" what
            the model says of the image, "interactive" the object that the `regions` together mark,
            "vgd" all objects of each region's kind; "chat" answers `text`.
        things, stuff: lists, or what `read_names` takes (default: those the model was trained on);
            any number of names, asked in several prompts where they do not fit one.
        regions: points (x, y), boxes (x0, y0, x1, y1), scribbles [(x, y), ...], ("lasso", points),
            or masks, bool [H, W] or any picture of one (`read_region`).
        region_image: for "vgd" the image that shows the regions, in place of the image itself.
        threshold: of panoptic the score below which a query is dropped (default 0.8), of refer and
            reason that below which a phrase is refused (`presence`; 0: never), of instance
            and vgd that from which a mask is shown (0.3; the result holds all).
        on_text: called with the answer of one image each time it grows, without marks; what it
            raises ends the request.
        changes: other values of the configuration's CHOICES, for this request.

    Warns of words that the tokenizer lacks. Raises ValueError at a picture or region that is none,
    and at what `check_request` refuses.
    """
    things, stuff = (read_names(x) if isinstance(x, str) else x for x in (things, stuff))
    numbered = enumerate([] if regions is None else regions, start=1)
    marks = [read_region(region, f"region {number}") for number, region in numbered]
    images = list(map(_open_image, image if isinstance(image, list) else [image]))
    region_image = _open_image(region_image)
    texts = text if isinstance(text, list) else [text] * len(images)
    if len(texts) != len(images):
        raise ValueError(f"{len(images)} images but {len(texts)} texts")
    if unknown := changes.keys() - {*CHOICES}:
        raise ValueError(f"{min(unknown)} is none of {', '.join(CHOICES)}")
    request = check_request(task, model.stage, texts, things, stuff, marks, region_image, threshold)
    name = requested_task(task)
    if request.threshold in CHOICES and threshold is not None:
        changes[request.threshold] = threshold
    names, is_thing = [], []
    if TASKS[name].needs == "categories":
        names, is_thing = chosen_categories(model.config, task, things, stuff)
    encoded = images[0] if isinstance(images[0], EncodedImage) and len(images) == 1 else None
    pictures = [each.image if isinstance(each, EncodedImage) else each for each in images]
    samples = [
        build_sample(name, picture, words, names, marks, region_image)
        for picture, words in zip(pictures, texts, strict=True)
    ]
    if lost := unknown_words(model.tokenizer, *texts, *names):
        words = ", ".join(map(repr, lost))
        warnings.warn(f"the tokenizer lacks {words}: the model sees an unknown word", stacklevel=2)
    inputs = build_inputs(Processor(model.config, model.tokenizer), samples)
    config = model.config.resolve(**changes)
    options = {"features": encoded and encoded.features}
    if on_text is not None and model.stage != 1:
        options["on_answers"] = lambda answers: on_text(read_answer(answers[0])[0])
    results = predict_inputs(model, inputs, request.post_processing, is_thing, config, **options)
    for result in results:
        if request.threshold == "shown":
            result.threshold = SHOWN_SCORE if threshold is None else threshold
    return results if isinstance(image, list) else results[0]


def _open_image(image: Any) -> Any:
    return read_image(Path(image)) if isinstance(image, (str, Path)) else image


def check_request(
    task: str,
    stage: int | None,
    texts: list[str],
    things: list[str] | None,
    stuff: list[str] | None,
    regions: list,
    region_image: Any,
    threshold: float | None = None,
) -> Request:
    """The request of a task, known to be one that the model of a stage (None: not known yet) can
    answer. Raises ValueError at another task, one that needs a language model where there is none,
    a missing text or region, one that the task does not look at, and words of the prompt format."""
    if task not in requests():
        raise ValueError(f"unknown task {task!r}; known are {', '.join(requests())}")
    request, asked = requests()[task], TASKS[requested_task(task)]
    names = [*(things or []), *(stuff or [])]
    if stage == 1 and asked.needs != "categories":
        raise ValueError(f"a stage-1 checkpoint has no language model, which {task} needs")
    given = {"text": any(texts), "regions": bool(regions)}
    given["categories"] = things is not None or stuff is not None
    words = {"categories": "things or stuff", "image": "the image alone"}
    for kind, is_given in given.items():
        if is_given and kind != asked.needs:
            kind, needed = (words.get(each, each) for each in (kind, asked.needs))
            raise ValueError(f"task {task} takes no {kind}, but {needed}")
    if asked.needs == "text" and not all(texts):
        raise ValueError(f"task {task} needs a text")
    if asked.needs == "regions" and not regions:
        raise ValueError(f"task {task} needs regions: {', '.join(KINDS)} or mask")
    if region_image is not None and (asked.needs != "regions" or asked.is_one_object):
        raise ValueError(f"task {task} takes no region image: regions of the image itself, or none")
    if threshold is not None and not request.threshold:
        raise ValueError(f"task {task} has no threshold")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"a threshold is a score from 0 to 1, not {threshold}")
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise ValueError(f"{twice[0]!r} is named twice")
    for words in [*filter(None, texts), *names]:
        check_words(words, "a text or a name")
    return request


def chosen_categories(
    config: Config, task: str, things: list[str] | str | None, stuff: list[str] | str | None
) -> tuple[list[str], list[bool]]:
    """Names of categories, and which of them are things: those given, or the model's own."""
    things, stuff = (read_names(n) if isinstance(n, str) else n or [] for n in (things, stuff))
    categories = [(name, True) for name in things] + [(name, False) for name in stuff]
    if not categories:
        categories = [
            (category["name"], category["is_thing"])
            for category in config.categories
            if category["is_thing"] or requests()[task].post_processing != "instances"
        ]
    if not categories:
        raise ValueError("this model knows no categories of its own: name things or stuff")
    names, is_thing = map(list, zip(*categories, strict=True))
    return names, is_thing


def build_sample(
    name: str,
    image: Picture,
    text: str,
    names: list[str],
    marks: list[Mark | np.ndarray],
    region_image: Picture | None,
) -> Sample:
    """The sample whose question makes a request of the task `name`, its answer left to the
    model."""
    task = TASKS[name]
    size = next((mark.shape for mark in marks if isinstance(mark, np.ndarray)), None)
    if region_image is None:
        image = viewed(image, size)
    else:
        image, region_image = viewed(image), viewed(region_image, size, "region_image")
    shown = region_image or image
    size, regions = (shown.height, shown.width), []
    for number, mark in enumerate(marks, start=1):
        if not isinstance(mark, np.ndarray):
            mark = draw_region(mark, size, f"region {number}")
        elif mark.shape != size:
            raise ValueError(f"a region of {mark.shape} in an image of {size} (height, width)")
        regions.append(mark)
    if task.is_one_object and regions:
        regions = [np.any(regions, axis=0)]
    if task.needs == "text":
        names = [text] if task.has_masks else []
    elif task.needs != "categories":
        names = [f"region {number}" for number in range(1, len(regions) + 1)]
    words = ["<region>"] * len(regions) if task.needs == "regions" else names
    question = ask(name, words) if "questions" in task.phrasings else text
    return Sample(
        sample_id="request",
        task=name,
        image=image,
        turns=[(question, None)],
        masks=np.zeros((0, image.height, image.width), bool),
        labels=np.zeros(0, np.int64),
        names=names,
        regions=(regions if region_image else np.stack(regions)) if regions else None,
        region_images=[region_image] * len(regions) if region_image else None,
    )


# ---- models from disk ----------------------------------------------------------------------------


def check_new_folder(folder: Path) -> None:
    """Raises ValueError where a folder cannot be written, or holds something already."""
    check_target(folder, is_folder=True)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; choose a new folder")


def save_pretrained(
    model: Segmentor | XSAM,
    folder: Path,
    max_shard_bytes: int = SHARD_BYTES,
    is_bin: bool = False,
) -> None:
    """Writes a folder that `load_checkpoint` reads: weights in safetensors, in several files above
    `max_shard_bytes`, config.json and the tokenizer. `is_bin`: one pickled file in their place
    (`save_bin`). Raises ValueError where the folder holds something already."""
    check_new_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if is_bin:
        num_words = None if model.tokenizer is None else add_special_tokens(model.tokenizer)
        save_bin(folder, model, model.prefix, num_words)
    else:
        save_model(folder, own_tensors(model), model.prefix, max_shard_bytes)
    write_header(folder, model.config, model.stage, step=0)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def _published_config(changes: dict, tokenizer: Path | str | None) -> Config:
    """The full preset with what a generation changes, and the language model of a folder."""
    config = xsam().resolve(**changes)
    if not tokenizer or not (Path(tokenizer) / CONFIG_FILE).is_file():
        return config
    return complete_architecture(config.resolve(llm_config={}), "llm", Path(tokenizer))


def stored_stage(path: Path) -> int | None:
    """The stage of a checkpoint of ours; None for a published one, which does not say."""
    path = find_checkpoint(path)
    return read_header(path)["stage"] if (path / CONFIG_FILE).is_file() else None


def load_checkpoint(
    path: Path | str,
    *,
    config: Config | None = None,
    tokenizer: Path | str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    allow_missing: tuple[str, ...] = (),
    llm_bits: int | None = None,
    base: Path | str | None = None,
    report: Callable[[str], None] = print,
) -> tuple[Segmentor | XSAM, int]:
    """The model of a checkpoint and its stage (1: a `Segmentor`, 3: an `XSAM`), ready to answer.

    `path` is a folder that we wrote (a step_N, its stage's or its run's folder, or one of
    `save_pretrained`), or a published X-SAM checkpoint of either generation, a folder or a file. A
    published one says nothing of its architecture: `config` does (default: the full preset with the
    language model of the folder `tokenizer`), which is also taken in place of the one that is
    stored, and `tokenizer` is the one to use where `path` has none. `dtype` None keeps what is
    stored. Names that begin with one of `allow_missing` (as on disk, such as "llm.") may be
    absent and start as a new model's, in float32 unless `dtype` says otherwise, as all then is.
    `llm_bits` holds the matrices of the language model in 4 or 8 bits (`quantize`). Of a checkpoint
    with adapters the model is their base, where it was or at `base`, with them merged in.
    `report` is told what was loaded. Raises ValueError that names file and tensor where anything
    does not fit.
    """
    path = find_checkpoint(Path(path))
    base = find_checkpoint(Path(base)) if base is not None else find_base(path)
    rules = {"config": config, "tokenizer": tokenizer, "dtype": dtype, "report": report}
    if base is not None:
        if allow_missing:
            raise ValueError(f"{path}: holds adapters, of which none may be missing")
        model, stage = _load_adapters(path, base, **rules)
    else:
        model, stage = _load_whole(path, device=device, allow_missing=allow_missing, **rules)
    model = model.to(device).eval()
    if llm_bits is not None:
        quantize(model, llm_bits)
    return model, stage


def _load_whole(
    path: Path,
    config: Config | None,
    tokenizer: Path | str | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
    allow_missing: tuple[str, ...],
    report: Callable[[str], None],
) -> tuple[Segmentor | XSAM, int]:
    """See `load_checkpoint`."""
    stored = list_tensors(path)
    if (path / CONFIG_FILE).is_file():
        header = read_header(path)
        stage, config = header["stage"], config or header["config"]
    else:
        stage, generation, changes = read_published(stored, path)
        config = config or _published_config(changes, tokenizer)
        report(f"{path}: a published checkpoint of stage {stage}, {generation} generation")
    if stage == 2:
        raise ValueError(f"{path}: stage 2 holds the projectors alone; give a stage 1 or 3")
    table = next((entry for name, entry in stored.items() if disk_name(name) == EMBEDDING), None)
    if stage == 3 and table is not None:
        width = config.model.llm_config["hidden_size"]
        if table.shape[1] != width:
            raise ValueError(
                f"{path}: its embeddings are {table.shape[1]} wide, those of {config.model.llm} "
                f"{width}; {CONFIG_FILE} is missing, or config or tokenizer are of another model"
            )
        llm_config = config.model.llm_config | {"vocab_size": table.shape[0]}
        config = config.resolve(llm_config=llm_config)
    with contextlib.nullcontext() if allow_missing else parameters_on_meta():
        model = Segmentor(config) if stage == 1 else XSAM(config)
    options = {"allow_missing": allow_missing, "dtype": dtype, "device": device}
    report(load_tensors(model, stored, path, model.prefix, **options))
    if allow_missing:  # its parameters had values, and so a type, before
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype or parameter.dtype)
    if stage == 3:
        words = read_tokenizer(Path(tokenizer) if tokenizer else path)
        rows = add_special_tokens(words)
        if table is not None and rows > table.shape[0]:
            raise ValueError(
                f"{tokenizer or path}: {rows} tokens with {', '.join(SPECIAL_TOKENS)}, but "
                f"{path} has {table.shape[0]} rows of embeddings: the tokenizer of another model"
            )
        model.set_tokenizer(words)
    return model, stage


def _load_adapters(
    path: Path,
    base: Path,
    config: Config | None,
    tokenizer: Path | str | None,
    dtype: torch.dtype | None,
    report: Callable[[str], None],
) -> tuple[Segmentor | XSAM, int]:
    """The model of a checkpoint with adapters and its stage. Raises ValueError where `base` is not
    what they were trained on."""
    header = read_header(path)
    if not header["base"]:
        raise ValueError(f"{path}: holds no adapters, so --base has no use for it")
    trained, number = header["config"], header["stage"]
    model, _ = load_checkpoint(
        base,
        config=config or trained,
        tokenizer=None if number == 1 else tokenizer or path,
        dtype=getattr(torch, trained.dtype),
        report=report,
    )
    if weights_digest(model, torch.bfloat16) != header["base"]["digest"]:
        raise ValueError(f"{path}: its adapters were trained on another base than {base}")
    freeze(model, trained.stages[number], model.prefix)
    add_adapters(model, trained.stages[number], model.prefix)
    report(load_trained(model, path))
    merge_adapters(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    return model, number


def load_with_flags(options: argparse.Namespace, **others: Any) -> tuple[Segmentor | XSAM, int]:
    """`load_checkpoint` as the flags of `cli.add_checkpoint_flags` say; `others` are its further
    arguments, and any that are to be others."""
    flags = {
        "tokenizer": options.tokenizer,
        "allow_missing": tuple(options.allow_missing),
        "dtype": options.dtype and getattr(torch, options.dtype),
        "llm_bits": options.llm_bits,
        "base": options.base,
        "report": lambda line: print(line, file=sys.stderr),
    }
    if "device" not in others:
        flags["device"] = choose_device(options.device)
    model, stage = load_checkpoint(options.checkpoint, **flags | others)
    model.config = model.config.resolve(**inference_changes(options))
    return model, stage


BLOCK_4_BITS = 64  # numbers of a row that share a scale


def is_quantizable(layer: nn.Module, bits: int) -> bool:
    """Whether `quantize` holds a layer of the language model in fewer bits."""
    return type(layer) is nn.Linear and (bits == 8 or layer.in_features % BLOCK_4_BITS == 0)


def quantize(model: Segmentor | XSAM, bits: int) -> None:
    """From now on the matrices of the language model's layers are held in 8 bits (LLM.int8,
    Dettmers et al. 2022) or in 4 (NF4, Dettmers et al. 2023), if its blocks fit their rows;
    embeddings and output head stay as they are. They cannot be trained, but gradients pass. Raises
    ValueError without bitsandbytes, and for a model without a language model."""
    if model.stage == 1:
        raise ValueError("a stage-1 checkpoint has no language model to hold in fewer bits")
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ValueError("fewer bits need bitsandbytes: pip install 'xsam[quantize]'") from error
    for module in list(model.llm.model.get_decoder().modules()):
        for name, old in list(module.named_children()):
            if not is_quantizable(old, bits):
                continue
            sizes, weight = (old.in_features, old.out_features, old.bias is not None), old.weight
            if bits == 8:
                new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(weight.data, requires_grad=False)
            else:
                new = bnb.nn.Linear4bit(*sizes, compute_dtype=weight.dtype, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(weight.data, requires_grad=False, quant_type="nf4")
            new.bias = old.bias
            if hasattr(old, "lora"):
                attach(new, old.lora)
            setattr(module, name, new.to(weight.device))  # which rounds it
