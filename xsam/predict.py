"""One image and one request to a picture, JSON and an answer.

    python -m xsam.predict panoptic --checkpoint runs/toy/stage3/step_1300 --image drawing.jpg
    python -m xsam.predict refer "the red circle" --checkpoint DIR --image drawing.jpg
    python -m xsam.predict instance --names names.txt --checkpoint DIR --image photo.jpg
    python -m xsam.predict vgd --region cat.png --checkpoint DIR --image photo.jpg

Writes OUT.png (masks, outlines, labels) and OUT.json (COCO RLE), beside the image unless --out says
where.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from xsam.cli import Parser, add_checkpoint_flags, inference_changes
from xsam.datasets.formats import read_image, read_region
from xsam.distributed import choose_device
from xsam.inference import REQUESTS, check_request, load_checkpoint, predict, stored_stage
from xsam.postprocess import SHOWN_SCORE
from xsam.prompts import read_names


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m xsam.predict",
        description="Segments an image, or answers a question about it.",
        epilog='example: python -m xsam.predict refer "the red circle" --image drawing.jpg '
        "--checkpoint runs/toy/stage3/step_1300",
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
        help="interactive, vgd: an image that is bright where it points; may be repeated for vgd",
    )
    parser.add_argument(
        "--region-image", type=Path, help="vgd: the image that the regions are in, if another"
    )
    parser.add_argument("--out", type=Path, help="path without suffix (default: IMAGE_TASK)")
    return parser


def read_request(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `predict` that the command line names, read and checked before a model is
    loaded. Raises ValueError where they are no request."""
    image = read_image(options.image)
    lists = {"things": options.things, "stuff": options.stuff}
    names = {kind: text if text is None else read_names(text) for kind, text in lists.items()}
    shown = read_image(options.region_image) if options.region_image else None
    width, height = (shown or image).size
    for path in options.region:
        if (size := read_image(path).size) != (width, height):
            raise ValueError(
                f"{path}: a region of {size[0]}x{size[1]} (width x height) in "
                f"{options.region_image or options.image}, which is {width}x{height}"
            )
    regions = [read_region(path, (height, width)) for path in options.region]
    stage, texts = stored_stage(options.checkpoint), [options.text]
    check_request(options.task, stage, texts, *names.values(), regions, shown)
    if options.image in output_paths(options):
        raise ValueError(f"--out {options.out} would replace the image")
    about = {"image": image, "task": options.task, "text": options.text}
    return about | names | {"regions": regions, "region_image": shown}


def output_paths(options: argparse.Namespace) -> list[Path]:
    stem = options.out or options.image.with_name(f"{options.image.stem}_{options.task}")
    return [Path(f"{stem}{suffix}") for suffix in (".png", ".json")]


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_intermixed_args(arguments)
    try:
        request = read_request(options)
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
    except ValueError as error:
        print(f"xsam.predict: {error}", file=sys.stderr)
        return 2
    if prediction.num_prompts > 1:
        print(f"the names did not fit one prompt: asked in {prediction.num_prompts}, and merged")
    if prediction.answer:
        print(prediction.answer)
    if options.task != "chat":
        picture, document = output_paths(options)
        least = SHOWN_SCORE if options.task in ("instance", "vgd") else 0.0
        prediction.draw(options.text, min_score=least).save(picture)
        document.write_text(json.dumps(prediction.to_dict(), indent=1), encoding="utf-8")
        if prediction.answer and not len(prediction.masks):
            print("no <SEG> in the answer or nothing above the threshold: no masks")
        print(f"{len(prediction.masks)} masks: {picture} {document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
