"""Pictures of samples: what is asked, the truth, and what a model says beside it.

Drawn with `pictures.py`, for the checks of data, the monitor of training and the worst of a set.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from xsam import distributed
from xsam.data import Sample
from xsam.evaluation.prediction_files import SavedPredictions
from xsam.prompts import strip_marks
from xsam.report.colours import number_colours
from xsam.report.letters import Text, colour_phrases, find_spans
from xsam.report.pictures import draw_prompts, draw_segments, side_by_side
from xsam.results import SHOWN_SCORE, SegmentationResult
from xsam.tasks import TASKS

MOST_TITLE = 500  # characters of a question or an answer above a picture


def read_words(text: str) -> str:
    """A question or an answer without the marks of the prompt format."""
    text = strip_marks(text.replace("<SEG>", "(mask)").replace("<region>", "this"))
    text = text.replace(" .", ".").replace(" ,", ",")  # as tokens were joined
    return textwrap.shorten(text, MOST_TITLE, placeholder=" …")


def _keys(sample: Sample, labels: list[str]) -> list[tuple[str, int]]:
    """What has a colour of its own: a class or phrase. Of a caption, in which phrases may be alike,
    every mask."""
    is_caption = TASKS[sample.task].is_grounded
    return [(label, labels[:n].count(label) * is_caption) for n, label in enumerate(labels)]


def _draw_truth(
    sample: Sample, found: Sequence[str] = ()
) -> tuple[list[Image.Image], list[str], list[list[int]]]:
    """What is asked (`draw_prompts`) and the truth beside it; the labels of its masks, their
    colours, and those of what a model `found`."""
    labels = [sample.names[label] for label in sample.labels]
    shown = sample.names[: len(sample.regions if sample.regions is not None else ())]
    keys = (_keys(sample, names) for names in (shown, labels, found))
    of_prompts, *colours = number_colours(*keys)
    regions = sample.regions, sample.region_images, shown, sample.region_kinds, of_prompts
    options = {"colours": colours[0], "ignore": sample.ignore}
    truth = draw_segments(sample.image, sample.masks, labels, **options)
    return [*draw_prompts(sample.image, *regions), truth], labels, colours


def draw_sample(sample: Sample) -> Image.Image:
    """What is asked, with its visual prompts, beside what is answered, with its targets."""
    pictures, labels, (colours, _) = _draw_truth(sample)
    question, answer = (read_words(" / ".join(texts)) for texts in zip(*sample.turns, strict=True))
    if TASKS[sample.task].is_grounded:
        answer = colour_phrases(answer, find_spans(answer, labels), colours)
    titles = [*[""] * (len(pictures) - 2), f"{sample.sample_id}\n{question}", answer]
    return side_by_side(pictures, titles)


def draw_prediction(
    sample: Sample, prediction: SegmentationResult, min_score: float = 0.0, note: str = ""
) -> Image.Image:
    """Truth beside prediction, one class in one colour; what is shown to the model before both.
    `note` stands in the prediction's title."""
    question, answer = (read_words(text or "") for text in sample.turns[0])
    said, note = read_words(prediction.answer), f" ({note})" if note else ""
    task = TASKS[sample.task]
    if not task.has_masks:
        lines = [question, f"truth: {answer}" if answer else "", f"prediction{note}: {said}"]
        title = "\n".join(filter(None, lines))
        return side_by_side([draw_segments(sample.image, sample.masks, [])], [title])
    found = prediction.labels
    pictures, labels, colours = _draw_truth(sample, found)
    pictures.append(prediction.draw(min_score=min_score, colours=colours[1]))
    asked = answer if task.is_grounded else "" if task.needs == "categories" else question
    titles: list[Text] = [f"truth: {asked}", f"prediction{note}: {said}"]
    titles = [title.removesuffix(": ") for title in titles]
    if task.is_grounded or task.is_per_phrase:
        told = zip(titles, (labels, found), colours, strict=True)
        titles = [colour_phrases(title, find_spans(title, names), c) for title, names, c in told]
    if sample.regions is None:
        return side_by_side(pictures[1:], titles)
    prompts = ["prompt"] * (len(pictures) - 2)
    if sample.region_images is not None:
        prompts[-1] = "image"
    return side_by_side(pictures, prompts + titles)


def draw_predictions(
    predictions: SavedPredictions, paths: dict[int, Path], notes: dict[int, str] | None = None
) -> None:
    """A picture of each of these records, with a note in its title; every rank draws its share."""
    min_score = SHOWN_SCORE if predictions.kind == "instances" else 0.0
    for index in list(paths)[distributed.rank() :: distributed.world_size()]:
        paths[index].parent.mkdir(parents=True, exist_ok=True)
        sample = predictions.dataset.sample(index, np.random.default_rng([0, index]))  # as asked
        prediction = predictions.prediction(index, sample)
        note = notes[index] if notes else ""
        draw_prediction(sample, prediction, min_score, note).save(paths[index])
