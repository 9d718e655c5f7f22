"""What is asked and answered: phrasings of every task, and the words of one turn.

A question's {phrases} becomes "<p>name</p>, <p>name</p>", one phrase, or one "<p><region></p>" for
each visual prompt (paper section 3.1, figure 2). An answer may say the names again in the same way;
the classes stay the question's. The phrasings are ours; for weights that were trained with others,
a JSON file replaces them (`--phrasings`).
"""

import re
from pathlib import Path

import numpy as np

from xsam import former_names
from xsam.config import SPECIAL_TOKENS

PLACEHOLDERS = ("<image>", "<region>")

PER_PHRASE_TASKS = ("refer", "reason")  # a <SEG> for each phrase; elsewhere one for the image

_SEG_ANSWERS = ["Here is the segmentation: <SEG>.", "Sure, <SEG>.", "It is segmented: <SEG>."]

# Of each task: what is asked, what is answered, and what is answered where there is no such thing.
# Of chat: how a question with options is asked; {question} is its hint and itself, {options} has a
# line "A. text" for each.
PHRASINGS: dict[str, dict[str, list[str]]] = {
    "generic": {
        "questions": [
            "Segment everything in this image that belongs to one of: {phrases}.",
            "Give me a mask for each region of these categories: {phrases}.",
            "Which pixels show {phrases}? Please segment them.",
            "Find and segment all of the following: {phrases}.",
        ],
        "answers": [
            "Here is the segmentation: <SEG>.",
            "Sure, <SEG>.",
            "The regions are segmented: <SEG>.",
        ],
    },
    "refer": {
        "questions": [
            "Segment {phrases} in this image.",
            "Where is {phrases}? Answer with a mask.",
            "Please find {phrases} and segment it.",
            "Give me the mask of {phrases}.",
        ],
        "answers": _SEG_ANSWERS,
        "absent": ["There is no such thing in this image.", "This is not in the image."],
    },
    "reason": {
        "questions": [
            "{phrases} Answer with a mask.",
            "{phrases} Please segment what is meant.",
            "Segment what this asks for: {phrases}",
        ],
        "answers": _SEG_ANSWERS,
    },
    "gcg": {
        "questions": [
            "Describe this image and segment what you mention.",
            "Give a caption of this image with a mask for each part of it.",
            "What is in this image? Describe it, with masks.",
        ],
        "answers": ["{caption} <SEG>"],
    },
    "interactive": {
        "questions": [
            "Segment the object at {phrases}.",
            "Give me the mask of {phrases}.",
            "What is marked by {phrases}? Please segment it.",
        ],
        "answers": _SEG_ANSWERS,
    },
    "vgd": {
        "questions": [
            "Segment everything of the same kind as {phrases}.",
            "Find all objects that look like {phrases} and segment them.",
            "Give me a mask for each thing of the kinds shown by {phrases}.",
        ],
        "answers": ["Here is the segmentation: <SEG>.", "Sure, <SEG>."],
    },
    "chat": {"choices": ["{question}\n{options}\nAnswer with the letter of the right option."]},
}


def read_phrasings(path: Path | str) -> dict[str, dict[str, list[str]]]:
    """Our phrasings with those of a user's JSON file in their place: {task: {"questions": […],
    "answers": […], "absent": […]}, "chat": {"choices": […]}}; what the file leaves out stays ours.

    Raises ValueError at an unknown task or kind, an empty list, a question without {phrases} (but
    for gcg), an answer that has not exactly one <SEG>, {phrases} in an answer to a visual prompt,
    which no words can say again, or choices without {question} and {options}.
    """
    from xsam.datasets.records import expect
    from xsam.files import read_json

    phrasings = {task: dict(kinds) for task, kinds in PHRASINGS.items()}
    for task, kinds in read_json(Path(path), dict).items() if path else ():
        if task not in phrasings:
            raise ValueError(f"{path}: unknown task {task!r}; known are {', '.join(phrasings)}")
        for kind, texts in expect(kinds, dict, f"{path}: {task}").items():
            where = f"{path}: {task}: {kind}"
            if kind not in PHRASINGS[task]:
                known = ", ".join(PHRASINGS[task])
                raise ValueError(f"{where}: unknown; known for this task are {known}")
            if not expect(texts, list, where):
                raise ValueError(f"{where}: is empty")
            for text in texts:
                _check(expect(text, str, where), task, kind, where)
            phrasings[task][kind] = texts
    return phrasings


def _check(text: str, task: str, kind: str, where: str) -> None:
    """Raises ValueError where a phrasing has a token or field more or less often than its kind."""
    counts = dict.fromkeys((*SPECIAL_TOKENS, *PLACEHOLDERS, "{caption}"), 0)
    counts["{phrases}"] = int(kind == "questions" and task != "gcg")
    if kind in ("answers", "absent") and task in ("generic", "refer", "reason"):
        counts["{phrases}"] = min(text.count("{phrases}"), 1)
    counts["<SEG>"] = int(kind == "answers")
    counts["{caption}"] = int(kind == "answers" and task == "gcg")
    counts["{question}"] = counts["{options}"] = int(kind == "choices")
    for token, count in counts.items():
        if text.count(token) != count:
            found = text.count(token)
            raise ValueError(f"{where}: {text!r} has {token} {found} times, not {count}")


class Phrased(str):
    """The words of a question or an answer, with the template and the names that made them."""

    template: str
    names: list[str]

    def __new__(cls, template: str, names: list[str]) -> "Phrased":
        phrased = super().__new__(cls, template.replace("{phrases}", join_phrases(names)))
        phrased.template, phrased.names = template, list(names)
        return phrased

    def __getnewargs__(self) -> tuple[str, list[str]]:  # of copies and pickles
        return self.template, self.names

    def keep(self, indices: list[int]) -> "Phrased":
        """The same words about the names at `indices` alone."""
        return Phrased(self.template, [self.names[index] for index in indices])


def ask(
    task: str,
    names: list[str],
    rng: np.random.Generator | None = None,
    phrasings: dict = PHRASINGS,
) -> Phrased:
    """The task's question about `names`: a random phrasing, or the first one without `rng`."""
    return Phrased(_draw(phrasings[task]["questions"], rng), names)


def reply(
    task: str,
    rng: np.random.Generator,
    phrasings: dict = PHRASINGS,
    kind: str = "answers",
    caption: str = "",
) -> str:
    """A random answer, its {phrases} not yet filled in; of kind "absent" where nothing fits the
    phrase. `caption` is that of GCG."""
    return _draw(phrasings[task][kind], rng).replace("{caption}", caption)


def _draw(texts: list[str], rng: np.random.Generator | None) -> str:
    return texts[rng.integers(len(texts)) if rng else 0]


def join_phrases(names: list[str]) -> str:
    """The names as a prompt has them: "<p>cat</p>, <p>sky</p>". "<region>" stands for a visual
    prompt."""
    return ", ".join(f"<p>{name}</p>" for name in names)


def choice_question(
    question: str,
    options: dict[str, str],
    hint: str = "",
    rng: np.random.Generator | None = None,
    phrasings: dict = PHRASINGS,
) -> str:
    """A question with its hint before it and its options by letter, in a random phrasing of chat's
    choices, or the first one without `rng`; one without options stays as it is."""
    question = f"{hint}\n{question}" if hint else question
    if not options:
        return question
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    words = {"{question}": question, "{options}": lines}
    template = _draw(phrasings["chat"]["choices"], rng)
    return re.sub("{question}|{options}", lambda field: words[field[0]], template)


def find_phrases(answer: str) -> list[str]:
    """The phrases that an answer marks, in its order; a mark that is not closed is none."""
    return [phrase.strip() for phrase in re.findall(r"<p>((?:(?!<p>).)*?)</p>", answer, re.DOTALL)]


def read_answer(answer: str) -> tuple[str, list[tuple[int, int]]]:
    """An answer without its marks, as a person reads it ("Sure, <SEG>." is "Sure."), and the
    (start, end) in it of each of its `find_phrases`."""
    text, spans = "", []
    answer = re.sub(r"[\s,:]*<SEG>(?:\s+(?=[.,]))?|\s+(?=</p>)", "", answer)
    pieces = re.split(r"(<p>(?:(?!<p>).)*?</p>)", answer, flags=re.DOTALL)
    for number, piece in enumerate(pieces):  # every second one is a phrase
        words = re.sub(r"\s+", " ", re.sub("</?p>", "", piece))
        words = words.lstrip() if text[-1:] in ("", " ") else words
        if number % 2:
            start = len(text) + len(words) - len(words.lstrip())
            spans.append((start, start + len(words.lstrip())))
        text += words
    return text.rstrip(), spans


def strip_marks(answer: str) -> str:
    """An answer without the marks of its phrases and masks."""
    for token in SPECIAL_TOKENS:
        answer = answer.replace(token, "")
    return " ".join(answer.split())


def check_words(
    text: str, where: str, tokens: tuple[str, ...] = (*SPECIAL_TOKENS, *PLACEHOLDERS)
) -> str:
    """Returns `text`. Raises ValueError where it is empty, or has one of `tokens` of the prompt
    format or a lone surrogate, half of a character."""
    if not text.strip():
        raise ValueError(f"{where}: is empty")
    for token in tokens:
        if token in text:
            raise ValueError(f"{where}: contains {token}, which belongs to the prompt format")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{where}: holds a lone surrogate, which is no character")
    return text


def clean_name(name: str) -> str:
    """A COCO category name as it stands in a prompt: "sky-other-merged" is "sky other"."""
    return name.replace("-merged", "").replace("-stuff", "").replace("-", " ").strip().lower()


__getattr__ = former_names(read_names="xsam.names")
