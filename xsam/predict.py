"""One image and one request to a picture, JSON and an answer.

    python -m xsam.predict panoptic --checkpoint runs/toy/stage3 --image drawing.jpg
    python -m xsam.predict refer "the red circle" --checkpoint DIR --image drawing.jpg
    python -m xsam.predict instance --names names.txt --checkpoint DIR --image photo.jpg
    python -m xsam.predict vgd --region cat.png --checkpoint DIR --image photo.jpg

Writes OUT.png (masks, outlines, labels) and OUT.json (COCO RLE), beside the image unless --out says
where, in place of what an earlier command wrote there.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from xsam.cli import Parser, add_checkpoint_flags, inference_changes
from xsam.distributed import choose_device
from xsam.files import check_target, read_json, write_whole
from xsam.images import read_image, read_image_size, read_region
from xsam.inference import REQUESTS, check_request, load_checkpoint, predict, stored_stage
from xsam.names import read_names
from xsam.postprocess import SHOWN_SCORE
from xsam.prompts import PER_PHRASE_TASKS

OUTPUT = {"answer": "", "segments": []}  # of SegmentationResult.to_dict


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m xsam.predict",
        description="Segments an image, or answers a question about it.",
        epilog='example: python -m xsam.predict refer "the red circle" --image drawing.jpg '
        "--checkpoint runs/toy/stage3",
    )
    parser.add_argument("task", choices=REQUESTS)
    parser.add_argument("text", nargs="?", default="", help="the phrase or the question")
    add_checkpoint_flags(parser)
    parser.add_argument("--image", type=Path, required=True)
    lists = "names of any number of classes: a,b,c, or a file with one a line"
    parser.add_argument("--things", "--names", help=f"{lists}; instances are kept apart")
    parser.add_argument("--stuff", help=f"{lists}; each is one region")
    parser.add_argument(
        "--region",
        type=Path,
        action="append",
        default=[],
        metavar="PNG",
        help="interactive, vgd: a drawing on black, or on nothing, of where it points; may be "
        "repeated for vgd",
    )
    parser.add_argument(
        "--region-image", type=Path, help="vgd: the image that the regions are in, if another"
    )
    text = "path without suffix, or a folder that is there (default: IMAGE_TASK beside the image)"
    parser.add_argument("--out", type=Path, help=text)
    return parser


def read_pictures(
    options: argparse.Namespace,
) -> tuple[Image.Image, list[np.ndarray], Image.Image | None]:
    """The image, the regions, and the image that shows them where that is another. A photo is
    turned upright unless its regions are of its stored pixels."""
    size = read_image_size(options.region[0]) if options.region else None
    image = read_image(options.image, None if options.region_image else size)
    shown = read_image(options.region_image, size) if options.region_image else None
    size = (shown or image).height, (shown or image).width
    return image, [read_region(path, size) for path in options.region], shown


def output_files(options: argparse.Namespace) -> list[Path]:
    """The picture and the JSON to write: under another name, with the task's at its end, where that
    would replace what is read or another program's JSON. Raises ValueError where they cannot be."""
    stem, name = options.out, f"{options.image.stem}_{options.task}"
    if stem is None or stem.is_dir():
        stem = (stem or options.image.parent) / name
    stem = str(stem).removesuffix(".png").removesuffix(".json")
    given = options.image, options.region_image, *options.region, options.things, options.stuff
    inputs = [Path(path).resolve() for path in given if path]
    for name in (stem, f"{stem}_{options.task}"):
        paths = [Path(f"{name}{suffix}") for suffix in (".png", ".json")]
        for path in paths:
            check_target(path)
        there = read_json(paths[1]) if paths[1].exists() else OUTPUT
        is_ours = isinstance(there, dict) and there.keys() == OUTPUT.keys()
        if is_ours and not {path.resolve() for path in paths} & {*inputs}:
            return paths
    raise ValueError(f"{paths[0]} or {paths[1]} is read, or of another program: name another --out")


def read_request(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `predict` that the command line names, read and checked before a model is
    loaded. Raises ValueError where they are no request."""
    image, regions, shown = read_pictures(options)
    if options.panoptic_rule and options.task != "panoptic":
        raise ValueError("--panoptic-rule is for task panoptic")
    if options.presence is not None and REQUESTS[options.task].task not in PER_PHRASE_TASKS:
        raise ValueError("--presence is for tasks refer and reason")
    lists = {"things": options.things, "stuff": options.stuff}
    names = {kind: text if text is None else read_names(text) for kind, text in lists.items()}
    stage, texts = stored_stage(options.checkpoint), [options.text]
    check_request(options.task, stage, texts, *names.values(), regions, shown)
    about = {"image": image, "task": options.task, "text": options.text}
    return about | names | {"regions": regions, "region_image": shown}


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_intermixed_args(arguments)
    try:
        request = read_request(options)
        written = output_files(options) if options.task != "chat" or options.out else []
        model, _ = load_checkpoint(
            options.checkpoint,
            tokenizer=options.tokenizer,
            allow_missing=tuple(options.allow_missing),
            dtype=options.dtype and getattr(torch, options.dtype),
            device=choose_device(options.device),
            report=lambda line: print(line, file=sys.stderr),
        )
        model.config = model.config.resolve(**inference_changes(options))
        prediction = predict(model, **request)
    except (ValueError, OSError) as error:
        print(f"xsam.predict: {error}", file=sys.stderr)
        return 2
    if prediction.num_prompts > 1:
        print(f"the names did not fit one prompt: asked in {prediction.num_prompts}, and merged")
    if prediction.answer:
        print(prediction.answer)
    if written:
        picture, document = written
        least = SHOWN_SCORE if options.task in ("instance", "vgd") else 0.0
        content = io.BytesIO()
        prediction.draw(options.text, min_score=least).save(content, "PNG")
        write_whole(picture, content.getvalue())
        write_whole(document, json.dumps(prediction.to_dict(), indent=1))
        if options.task != "chat" and prediction.answer and not len(prediction.masks):
            print("no <SEG> in the answer or nothing above the threshold: no masks")
        print(f"{len(prediction.masks)} masks: {picture} {document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
