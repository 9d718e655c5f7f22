"""A data set of one's own in a format of its own, for a task that is there: referring.

    python docs/forks/new_dataset.py
    python docs/forks/new_dataset.py FOLDER

lines touched: 32

A reader class and three entries; none of the library's lines. The rest draws such a set, trains on
it with the toy preset, scores it and asks about a picture, in FOLDER or one that is deleted.
docs/adding.md has the walk.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from xsam.cli import train_command
from xsam.data import Sample
from xsam.datasets.base import Dataset
from xsam.datasets.formats import decode_mask
from xsam.datasets.records import unpack
from xsam.datasets.registry import READERS
from xsam.datasets.sources import SOURCES, Source
from xsam.files import find_file, read_text
from xsam.images import read_image
from xsam.model import XSAM
from xsam.prompts import check_words
from xsam.toy.preset import toy
from xsam.toy.weights import write_weights

# fork: begin


class Phrases(Dataset):
    """A line of JSON for each phrase: {"image": FILE, "phrase": TEXT, "polygon": [x, y, …]}."""

    prediction_kind = "mask"  # one mask for each record

    def index(self) -> None:
        for number, line in enumerate(read_text(self.annotations).splitlines(), start=1):
            where = f"{self.annotations}: line {number}"
            with self.record():  # an error in a line is kept, and the others are read
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{where}: not valid JSON ({error})") from error
                fields = unpack(record, where, image=str, phrase=str, polygon=list)
                check_words(fields[1], where)
                self.records.append((where, *fields))

    def key(self, index: int) -> int:
        return index

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        where, image, phrase, polygon = self.records[index]
        picture = read_image(find_file(self.images, image))
        mask = decode_mask([polygon], (picture.height, picture.width), where)
        turns, labels = [self.turn([phrase], rng)], np.zeros(1, np.int64)  # a question, an answer
        return Sample(
            f"{self.name}/{index}", self.source.task, picture, turns, mask[None], labels,
            names=[phrase], image_id=image,
        )  # fmt: skip


READERS["phrases"] = Phrases
SOURCES["blocks"] = Source(
    "refer", "phrases", "blocks/train.jsonl", "blocks/images", about="blocks to train on"
)
SOURCES["blocks_val"] = Source(
    "refer", "phrases", "blocks/val.jsonl", "blocks/images", scores="refer", about="blocks to score"
)
# fork: end


# ---- a run with it -------------------------------------------------------------------------------


def draw_blocks(folder: Path, split: str, count: int) -> None:
    """Pictures of a red and a blue block, and the file that tells of them."""
    rng, lines = np.random.default_rng(len(split)), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture, name = Image.new("RGB", (96, 72), "gray"), f"{split}_{number}.png"
        for column, color in enumerate(rng.permutation(["red", "blue"]).tolist()):
            left, top, side = 48 * column + rng.integers(20), rng.integers(40), rng.integers(12, 28)
            right, bottom = left + side, top + side
            polygon = [int(x) for x in (left, top, right, top, right, bottom, left, bottom)]
            ImageDraw.Draw(picture).polygon(polygon, fill=color)
            lines.append({"image": name, "phrase": f"the {color} block", "polygon": polygon})
        picture.save(folder / "images" / name)
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def main(folder: Path) -> None:
    draw_blocks(folder / "data/blocks", "train", 8)
    draw_blocks(folder / "data/blocks", "val", 2)
    if not (folder / "weights").exists():
        write_weights(folder / "weights", toy().model, steps=1)  # stand-ins of the pretrained ones
    flags = "--config toy --stage 3 --starts_from= --datasets blocks --eval_tasks blocks_val"
    flags += " --max_steps 3 --global_batch_size 4 --micro_batch_size 2 --max_new_tokens 8"
    folders = [f"--{name}={folder / name}" for name in ("data", "weights")]
    if status := train_command([*flags.split(), *folders, f"--out={folder / 'run'}"]):
        sys.exit(status)
    model = XSAM.from_pretrained(folder / "run/stage3")
    result = model.predict(folder / "data/blocks/images/val_0.png", "refer", "the red block")
    result.draw().save(folder / "answer.png")
    print(f"{result.text}: {len(result.masks)} masks")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1] if sys.argv[1:] else folder))
