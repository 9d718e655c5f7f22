"""A task of one's own: counting. "How many rings are there?", "There are 3: <SEG>.", with a mask of
each.

    python docs/forks/new_task.py
    python docs/forks/new_task.py FOLDER

lines touched: 45

The task, its reader and sets, and how it is scored; none of the library's lines. The rest trains on
it with the toy preset, scores it and asks about a picture, in FOLDER or one that is deleted.
docs/adding.md has the walk.
"""

import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from xsam.cli import train_command
from xsam.data import Sample
from xsam.datasets.generic import Instances
from xsam.datasets.registry import READERS
from xsam.datasets.sources import SOURCES
from xsam.evaluation.benchmarks import BENCHMARKS, Benchmark, Figures, Scoring
from xsam.evaluation.prediction_files import SavedPredictions
from xsam.model import XSAM
from xsam.tasks import TASKS, Request, Task
from xsam.toy.preset import toy
from xsam.toy.weights import write_weights
from xsam.toy.world import write_world

# fork: begin
# ---- what the task is ----------------------------------------------------------------------------

TASKS["count"] = Task(
    phrasings={
        "questions": ["How many of these are there: {phrases}?", "Count {phrases} with masks."],
        "answers": ["There are {number}: <SEG>."],
    },
    needs="text",
    requests={"count": Request("instances", '"ring" --image drawing.jpg', "shown")},
    usual=(40, 10, 1),
)

# ---- what it is trained and scored on ------------------------------------------------------------


class Count(Instances):
    """COCO instances; a record is about the objects of one class in an image."""

    prediction_kind = "mask"  # of all that is counted together; the file has the answer too

    def index_images(self, images: dict, annotations: list) -> None:
        super().index_images(images, annotations)
        whole, self.records = self.records, []
        for image, objects in whole:
            objects = [each for each in objects if not each.iscrowd]
            for category in sorted({each.category_id for each in objects}):
                same = [each for each in objects if each.category_id == category]
                self.records.append((image, same))

    def key(self, index: int) -> str:
        image, objects = self.records[index]
        return f"{image.id}/{objects[0].category_id}"

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        picture, objects = self.read(index)
        name, masks = self.names[objects[0][0]], np.stack([mask for _, mask, _ in objects])
        masks, sample_id = masks[masks.any(axis=(1, 2))], f"{self.name}/{self.key(index)}"
        question, answer = self.turn([name], rng)
        turns = [(question, answer.replace("{number}", str(len(masks))))]
        labels = np.zeros(len(masks), np.int64)  # all are of the one name
        return Sample(sample_id, self.source.task, picture, turns, masks, labels, names=[name])


READERS["count"] = Count
changes = {"task": "count", "format": "count", "post_processing": "union"}
SOURCES["count"] = replace(SOURCES["coco_instance"], **changes)
SOURCES["count_val"] = replace(SOURCES["coco_instance_val"], **changes, scores="count")

# ---- how it is scored ----------------------------------------------------------------------------


def numbers(predictions: SavedPredictions, index: int) -> tuple[int, int]:
    """Of a record: how many there are, and how many the answer says (0 where it says no number)."""
    said = re.search(r"\d+", predictions.answer(index))
    return len(predictions.dataset.inputs(index).masks), int(said[0]) if said else 0


def count_figures(_: SavedPredictions, records: list[tuple[int, int]]) -> Figures:
    errors = np.array([abs(truth - said) for truth, said in records])
    return {"right": 100 * float((errors == 0).mean()), "error": float(errors.mean())}


protocols = {"right": "% of records with the right number", "error": "mean absolute difference"}
COUNT = Scoring(numbers, count_figures, lambda pair: pair[0] == pair[1], "", protocols)
BENCHMARKS["count_val"] = Benchmark("", COUNT, {})
# fork: end


# ---- a run with it -------------------------------------------------------------------------------


def main(folder: Path) -> None:
    if not (folder / "data").exists():
        write_world(folder / "data", num_train=8, num_val=2)
    if not (folder / "weights").exists():
        write_weights(folder / "weights", toy().model, steps=1)  # stand-ins of the pretrained ones
    flags = "--config toy --stage 3 --starts_from= --datasets count --eval_tasks count"
    flags += " --max_steps 3 --global_batch_size 4 --micro_batch_size 2 --max_new_tokens 8"
    folders = [f"--{name}={folder / name}" for name in ("data", "weights")]
    if status := train_command([*flags.split(), *folders, f"--out={folder / 'run'}"]):
        sys.exit(status)
    model = XSAM.from_pretrained(folder / "run/stage3")
    image = next((folder / "data" / SOURCES["count_val"].images).glob("*.jpg"))
    result = model.predict(image, "count", "ring", threshold=0.5)
    print(f"{result.text}: {len(result.shown())} masks")
    result.draw().save(folder / "answer.png")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1] if sys.argv[1:] else folder))
