"""Conversation: LLaVA's training sets and the benchmarks in VLMEvalKit's tables."""

import base64
import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from xsam.data import Sample
from xsam.datasets.base import Dataset
from xsam.datasets.formats import read_tsv
from xsam.datasets.records import expect, label, take, unpack
from xsam.files import IMAGE_SUFFIXES, find_file, read_json
from xsam.images import read_image
from xsam.prompts import check_words, choice_question

SHORTEST_IMAGE = 64  # characters; what is shorter is the index of another row

NO_TEXT = ("nan", "NaN", "N/A", "<NA>")  # in a table, for what is absent

YES_NO = ("pope", "mme")  # benchmarks of questions that ask for it

NO_IMAGE = (64, 64)  # width and height of the black image of a text, as any other encoded


def conversation(sample_id: str, image: Image.Image | None, turns: list, image_id: str) -> Sample:
    """The sample of a dialogue without masks, about no image where that is None."""
    is_text, image = image is None, image or Image.new("RGB", NO_IMAGE)
    masks, labels = np.zeros((0, image.height, image.width), bool), np.zeros(0, np.int64)
    return Sample(
        sample_id, "chat", image, turns, masks, labels, image_id=image_id, is_text=is_text
    )


class Llava(Dataset):
    """LLaVA conversations about one image, or where the source has no images, about none. Skipped
    are the others, those about several, and those without a turn or with an empty answer, as some
    of the published ones."""

    def index(self) -> None:
        for index, record in enumerate(read_json(self.annotations, list)):
            where = f"{self.annotations}: record {index}"
            with self.record():
                where += label(expect(record, dict, where), "id", ", id {}", "")
                names = record.get("image") or record.get("images") or []
                names = names if isinstance(names, list) else [names]
                turns, num_images = self.turns(record, where)
                is_video = any("<video>" in question for question, _ in turns)
                reasons = {  # to skip it: the first that holds
                    "records of a video": is_video or record.get("video") or record.get("videos"),
                    "records of several images": max(len(names), num_images) > 1,
                    "records whose <image> has no file": num_images and not names,
                    "text without an image": not names and self.source.images,
                    "records with an image": names and not self.source.images,
                    "conversations without an answer": not turns or not all(x for _, x in turns),
                }
                if reason := next((text for text, holds in reasons.items() if holds), None):
                    self.skipped[reason] += 1
                else:
                    name = expect(names[0], str, f"{where}: 'image'") if names else ""
                    self.records.append((record.get("id", index), name, turns))

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        number, name, turns = self.records[index]
        image = read_image(self.find(name)) if name else None
        return conversation(f"{self.name}/{number}", image, turns, name)

    def find(self, name: str) -> Path:
        """The path of an image, also where a download spells TextVQA's folder or a file's suffix
        in another way (OCR-VQA has some as .gif and .png)."""
        names = name, name.replace("textvqa/", "text_vqa/"), name.replace("text_vqa/", "textvqa/")
        others = [os.path.splitext(name)[0] + suffix for suffix in IMAGE_SUFFIXES]
        return find_file(self.images, *names, *others)

    def turns(self, record: dict, where: str) -> tuple[list[tuple[str, str]], int]:
        """(question, answer) pairs, without an answer that comes first and without <image>, and how
        often it is there."""
        turns, num_images = [], 0
        for turn in take(record, "conversations", list, where):
            speaker, text = unpack(turn, where, **{"from": str, "value": str})
            if speaker not in ("human", "gpt"):
                raise ValueError(f"{where}: turn from {speaker!r}; expected human or gpt")
            num_images += text.count("<image>")
            turns.append((speaker, text.replace("<image>", "").strip()))
            if turns[-1][1]:  # a question may be the image alone
                check_words(turns[-1][1], where, tokens=("<region>", "<SEG>"))
        if turns and turns[0][0] == "gpt":
            del turns[0]
        speakers, texts = [speaker for speaker, _ in turns], [text for _, text in turns]
        if speakers != ["human", "gpt"] * (len(speakers) // 2):
            raise ValueError(f"{where}: its turns do not alternate human and gpt: {speakers}")
        return list(zip(texts[0::2], texts[1::2], strict=True)), num_images


class Benchmark(Dataset):
    """A VLMEvalKit table: a question a row, with options or without, whose answer is compared to
    the letter. Images are base64 text; a short number stands for the image of the row with that
    index. Questions about a list of images are skipped."""

    OPTIONS = "ABCDEFGH"
    prediction_kind = "answer"

    def index(self) -> None:
        rows = read_tsv(self.annotations)
        for row in rows:  # pandas saves whole numbers with a point
            row["index"] = row.get("index", "").removesuffix(".0")
        images = {row["index"]: row.get("image", "") for row in rows}
        num_rows = Counter(row["index"] for row in rows)
        for number, row in enumerate(rows):
            with self.record():
                for key in ("index", "question", "answer"):
                    if not row.get(key, "").strip():
                        raise ValueError(f"{self.annotations}: row {number}: has no {key!r}")
                where, image = f"{self.annotations}: index {row['index']}", row.get("image", "")
                if "[" in (image[:1], row.get("image_path", "")[:1]):
                    self.skipped["questions about a list of images"] += 1
                    continue
                if num_rows[row["index"]] > 1:
                    raise ValueError(f"{where}: is there more than once")
                if not image and not row.get("image_path"):
                    raise ValueError(f"{where}: has neither image nor image_path")
                if 0 < len(image) < SHORTEST_IMAGE:
                    if len(images.get(image, "")) < SHORTEST_IMAGE:
                        raise ValueError(f"{where}: its image is row {image[:20]}, which has none")
                    image = images[image]
                if self.name in YES_NO and row["answer"].strip().lower() not in ("yes", "no"):
                    raise ValueError(f"{where}: its answer is {row['answer']!r}, not yes or no")
                self.records.append(row | {"image": image})

    def key(self, index: int) -> str:
        return self.records[index]["index"]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        row = self.records[index]
        where = f"{self.annotations}: index {row['index']}"
        image = self.image(row, where)
        options = self.options(row)
        answer = check_words(row["answer"].strip(), where)
        if options and answer not in options:
            raise ValueError(f"{where}: its answer {answer!r} is none of {list(options)}")
        hint = row.get("hint", "").strip()
        hint = "" if hint in NO_TEXT else hint
        question = choice_question(row["question"].strip(), options, hint, rng, self.phrasings)
        turns = [(check_words(question, where), answer)]
        return conversation(f"{self.name}/{row['index']}", image, turns, row["index"])

    def image(self, row: dict[str, str], where: str) -> Image.Image:
        """The image of a row, from its text or the file that the row names."""
        if not row["image"]:
            return read_image(find_file(self.annotations.parent, row["image_path"]))
        try:
            text = row["image"].removeprefix("data:").split(";base64,")[-1]
            content = base64.b64decode("".join(text.split()), validate=True)
            return read_image(io.BytesIO(content))
        except ValueError as error:
            raise ValueError(f"{where}: its image is no picture in base64 ({error})") from error

    def options(self, row: dict[str, str]) -> dict[str, str]:
        """The options of a question by letter; none of one that is open. A table that was saved by
        pandas has "nan" where there is none."""
        options = {letter: row.get(letter, "").strip() for letter in self.OPTIONS}
        right = row["answer"].strip()
        return {
            x: text for x, text in options.items() if text and (text not in NO_TEXT or x == right)
        }

    def num_words(self, index: int) -> int:
        row = self.records[index]
        return sum(len(row.get(key, "").split()) for key in ("question", "hint", *self.OPTIONS))
