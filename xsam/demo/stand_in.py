"""The calls that the page makes of a model, over `inference.predict` as it is today."""

import contextlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from xsam import inference
from xsam.datasets.formats import dilate
from xsam.datasets.sources import PROMPT_RADII
from xsam.postprocess import SHOWN_SCORE
from xsam.prompts import find_phrases, strip_marks

KINDS = ("point", "box", "scribble", "lasso")


def draw_region(kind: str, points: list, size: tuple[int, int]) -> np.ndarray:
    needed = {"point": 1, "box": 2, "scribble": 2, "lasso": 3}[kind]
    if len(points) < needed:
        raise ValueError(f"a {kind} needs {needed} points")
    canvas = Image.new("1", size[::-1])
    draw, pairs = ImageDraw.Draw(canvas), [tuple(pair) for pair in points]
    if kind == "point":
        draw.point(pairs, 1)
    elif kind == "box":
        (left, right), (top, bottom) = (sorted(axis) for axis in zip(*pairs, strict=True))
        draw.rectangle((left, top, right, bottom), 1)
    elif kind == "scribble":
        draw.line(pairs, 1)
    else:
        draw.polygon(pairs, 1)
    region = dilate(np.array(canvas), PROMPT_RADII.get(kind, 0))
    if not region.any():
        raise ValueError(f"a {kind} outside the picture")
    return region


@dataclass
class EncodedImage:
    image: Image.Image


def encode_image(model, image: Image.Image) -> EncodedImage:
    return EncodedImage(image)


@contextlib.contextmanager
def heard(model, on_text):
    """`on_text` is called with the answer so far."""
    ids = []
    if model.tokenizer is None:
        yield
        return

    def hear(_, inputs, output):
        ids.append(output.argmax(-1).item())
        on_text(model.tokenizer.decode(ids))

    hook = model.llm.model.get_output_embeddings().register_forward_hook(hear)
    try:
        yield
    finally:
        hook.remove()


def predict(model, image, task, on_text=None, **request):
    changes = {key: request.pop(key) for key in ("presence", "score_threshold") if key in request}
    config, model.config = model.config, model.config.resolve(**changes)
    try:
        with heard(model, on_text):
            result = inference.predict(model, image.image, task, **request)
    finally:
        model.config = config
    result.text = strip_marks(result.answer)
    result.spans, start = [None] * len(result.masks), 0
    if task == "gcg":
        places = []
        for phrase in find_phrases(result.answer):
            start = result.text.index(phrase, start)
            places.append((start, start + len(phrase)))
            start += len(phrase)
        result.spans = [places[category] for category in result.categories]
    result.threshold = SHOWN_SCORE if task in ("instance", "vgd") else 0.0
    return result
