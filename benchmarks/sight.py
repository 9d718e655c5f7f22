"""What the toy says of validation pictures, and of other pictures in their place.

    python benchmarks/sight.py --checkpoint runs/toy/stage3 --out docs/sight.png

Asks for a caption of each of twelve pictures and three questions about it, then the same questions
about a picture for which another answer is right. Prints all of it and draws it (needs matplotlib).
"""

import argparse
import io
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image

from xsam.cli import add_device_flag
from xsam.model import XSAM
from xsam.toy import scenes
from xsam.toy.scenes import CAPTION_REQUESTS, CHECKS, THING_IDS, Scene
from xsam.toy.world import ONE_WORD, YES_OR_NO, draw_split

NUM_PICTURES = 12


def right_answers(scene: Scene) -> dict[str, str]:
    """To all questions about a shape that may be there, and those that take a word."""
    present = {segment.category for segment in scene.segments}
    answers = {
        f"{CHECKS['existence'].format(category=name)} {YES_OR_NO}": "Yes"
        if name in present
        else "No"
        for name in THING_IDS
    }
    words = {f"{question} {ONE_WORD}": answer for _, question, answer, _ in scenes.quizzes(scene)}
    return answers | words


def three_questions(rng: np.random.Generator, scene: Scene) -> list[str]:
    """One that is to be answered yes, one no, one with a color, or what else takes a word."""
    answers = right_answers(scene)
    kinds = [
        [question for question, answer in answers.items() if answer == "Yes"],
        [question for question, answer in answers.items() if answer == "No"],
        [question for question, answer in answers.items() if answer in scenes.COLORS]
        or [question for question in answers if ONE_WORD in question],
    ]
    return [kind[rng.integers(len(kind))] for kind in kinds]


def draw(path: Path, pictures: list[Image.Image], texts: list[str]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 13), layout="constrained")
    for axes, picture, text in zip(figure.subplots(3, 4).flat, pictures, texts, strict=True):
        axes.imshow(picture)
        axes.set_axis_off()
        lines = [textwrap.fill(line, 52) for line in text.splitlines()]
        axes.set_title("\n".join(lines), y=-0.02, va="top", fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="stage 3 of a toy run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the toy world (default: 0)")
    parser.add_argument("--out", type=Path, help="picture to write; needs matplotlib")
    add_device_flag(parser)
    options = parser.parse_args()
    model = XSAM.from_pretrained(options.checkpoint, device=options.device)
    drawings = draw_split(options.seed, "val", 64)
    pictures = [Image.open(io.BytesIO(drawing.jpeg)) for drawing in drawings]
    rng = np.random.default_rng(options.seed)
    captions = model.predict(pictures[:NUM_PICTURES], "chat", CAPTION_REQUESTS[0])
    texts, num_right, num_changed = [], [0, 0], 0
    for number in range(NUM_PICTURES):
        scene = drawings[number].scene
        lines = [captions[number].answer]
        print(f"\n{number}: {scenes.caption_phrases(scene)[0]}\n   {lines[0]}")
        for question in three_questions(rng, scene):
            own = right_answers(scene)[question]
            right = [right_answers(drawing.scene).get(question, own) for drawing in drawings]
            following = [*range(number + 1, len(drawings)), *range(number)]
            other = next(index for index in following if right[index] != own)
            pair = model.predict([pictures[number], pictures[other]], "chat", question)
            answers = [each.answer for each in pair]
            is_right = [answers[0] == own, answers[1] == right[other]]
            num_right = [a + b for a, b in zip(num_right, is_right, strict=True)]
            num_changed += answers[0] != answers[1]
            said = [each + ("" if so else " ✗") for each, so in zip(answers, is_right, strict=True)]
            lines.append(f"{question.partition('?')[0]}? {said[0]}; of another: {said[1]}")
            print(f"   {lines[-1]}")
        texts.append("\n".join(lines))
    told = [scenes.caption_phrases(drawing.scene)[0] for drawing in drawings[:NUM_PICTURES]]
    num_told = sum(each.answer == text for each, text in zip(captions, told, strict=True))
    print(f"\nright to the word: {num_told} of {NUM_PICTURES} captions")
    shares = f"{num_right[0]} right, {num_right[1]} right of the other picture"
    print(f"of {3 * NUM_PICTURES} answers: {shares}, {num_changed} changed with the picture")
    if options.out:
        draw(options.out, pictures[:NUM_PICTURES], texts)


if __name__ == "__main__":
    main()
