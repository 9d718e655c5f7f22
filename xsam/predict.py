"""One image and one request to a picture, JSON and an answer.

    python -m xsam.predict panoptic --checkpoint runs/toy/stage3/step_1300 --image drawing.jpg
    python -m xsam.predict refer "the red circle" --checkpoint DIR --image drawing.jpg

Writes OUT.png (masks, outlines, labels) and OUT.json (COCO RLE), beside the image unless --out says
where.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from xsam.config import add_checkpoint_flags
from xsam.formats import read_image
from xsam.model import load_checkpoint, predict


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m xsam.predict",
        description="Segments an image, or answers a question about it.",
        epilog='example: python -m xsam.predict refer "the red circle" --image drawing.jpg '
        "--checkpoint runs/toy/stage3/step_1300",
    )
    parser.add_argument("task", choices=("panoptic", "refer", "chat"))
    parser.add_argument("text", nargs="?", default="", help="the phrase or the question")
    add_checkpoint_flags(parser)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--things", help="panoptic: names, comma-separated, instances kept apart")
    parser.add_argument("--stuff", help="panoptic: names, comma-separated, one region each")
    parser.add_argument("--out", type=Path, help="path without suffix (default: IMAGE_TASK)")
    options = parser.parse_args(arguments)
    try:
        image = read_image(options.image)
        model, _ = load_checkpoint(
            options.checkpoint,
            tokenizer=options.tokenizer,
            allow_missing=tuple(options.allow_missing),
            device="cuda" if torch.cuda.is_available() else "cpu",
            report=lambda line: print(line, file=sys.stderr),
        )
        names = {
            kind: [name.strip() for name in text.split(",")]
            for kind, text in (("things", options.things), ("stuff", options.stuff))
            if text
        }
        prediction = predict(model, image, options.task, options.text, **names)
    except ValueError as error:
        print(f"xsam.predict: {error}", file=sys.stderr)
        return 2
    if prediction.answer:
        print(prediction.answer)
    if options.task != "chat":
        stem = options.out or options.image.with_name(f"{options.image.stem}_{options.task}")
        picture, document = (Path(f"{stem}{suffix}") for suffix in (".png", ".json"))
        prediction.draw(options.text).save(picture)
        document.write_text(json.dumps(prediction.to_dict(), indent=1), encoding="utf-8")
        if prediction.answer and not len(prediction.masks):
            print("no <SEG> in the answer or nothing above the threshold: no masks")
        print(f"{len(prediction.masks)} masks: {picture} {document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
