"""A server of the page in a thread, and something that answers in place of a model."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from xsam.demo.server import DemoServer, Question, pack_result
from xsam.regions import draw_region
from xsam.results import SegmentationResult
from xsam.tasks import TASKS

SAID = "an <i>ugly</i> disc and 𝒂 square"  # with a letter that JavaScript counts as two

MARKS = ((0, 19), (24, 32))  # where its phrases are


class StubResult(SegmentationResult):
    text, spans = "", ()  # which follow from no answer here


class StubEngine:
    """Segments what is bright in a picture, or what is marked on it. Texts make it slow ("wait"),
    refuse ("refuse") or fail ("break")."""

    def __init__(self):
        self.questions: list[Question] = []  # without the pictures, but the size of a second one

    def describe(self) -> dict:
        tasks = {
            word: {"needs": task.needs, "is_available": True}
            for task in TASKS.values()
            for word in task.requests
        }
        return {"tasks": tasks, "categories": ["ring", "</script><b>star</b>"], "stage": 3}

    def answer(self, question: Question, on_text: Callable[[str], None]) -> dict:
        size = question.region_image and question.region_image.size
        self.questions.append(dataclasses.replace(question, image=None, region_image=size))
        if question.text.startswith("wait"):
            for number in range(1000):
                on_text("so far " * number)
                time.sleep(0.01)
        if question.text == "refuse":
            raise ValueError("no such phrase: <img src=x onerror=alert(1)>")
        if question.text == "break":
            raise RuntimeError("broken")
        bright = np.asarray(question.image.convert("L")) > 127
        rest = ~bright
        rest[:, : rest.shape[1] // 2] = False
        masks, labels, scores = [bright, rest], ["bright <b>one</b>", "the rest"], [0.9, 0.2]
        spans: list = [None, None]
        if question.task == "gcg":
            spans = list(MARKS)
        elif question.task == "chat":
            masks, labels, scores, spans = [], [], [], []
        elif question.drawings and question.region_image is None:
            size = question.image.size[::-1]
            masks = [draw_region(drawing, size) for drawing in question.drawings]
            labels = [kind for kind, _ in question.drawings]
            scores, spans = [0.8] * len(masks), [None] * len(masks)
        elif question.text:
            labels[0] = question.text
        threshold = 0.3 if question.task in ("instance", "vgd") else 0.0
        if question.task == "panoptic":
            threshold = 0.5 if question.score_threshold is None else question.score_threshold
            kept = [n for n, score in enumerate(scores) if score >= threshold]
            columns = masks, labels, scores, spans
            masks, labels, scores, spans = ([each[n] for n in kept] for each in columns)
        masks = np.array(masks, bool).reshape(-1, *bright.shape)
        categories = list(range(len(labels)))
        result = StubResult(question.image, masks, categories, labels, scores, "")
        result.threshold, result.spans = threshold, spans
        result.text = SAID if question.task in ("gcg", "chat") else ""
        return pack_result(result, ["a note"] if question.text == "note" else [])


def picture_with_box(box: tuple[int, int, int, int], size=(60, 40), mode="RGB") -> Image.Image:
    """A dark picture of a size (width, height) with a bright box, [left, top, width, height]."""
    left, top, width, height = box
    image = Image.new(mode, size, "#203040")
    image.paste("#f0e0d0", (left, top, left + width, top + height))
    return image


@contextlib.contextmanager
def serve(engine, examples=None) -> Iterator[DemoServer]:
    """A server on a free port of this machine."""
    if examples is None:
        examples = [("</script><b>example.png", picture_with_box((10, 10, 20, 16)))]
    server = DemoServer(("127.0.0.1", 0), engine, examples, "a <b>model</b>")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
