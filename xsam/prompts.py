"""The words of one turn: a question and an answer, drawn among the phrasings of a task (tasks.py)
and filled with names, and how an answer is read."""

import re
from pathlib import Path

import numpy as np

from xsam import former_names
from xsam.config import SPECIAL_TOKENS
from xsam.tasks import TASKS, Task

PLACEHOLDERS = ("<image>", "<region>")

Phrasings = dict[str, dict[str, list[str]]]  # of each task: as Task.phrasings


def read_phrasings(path: Path | str) -> Phrasings:
    """Our phrasings, with those of a user's JSON file, if any, in their place: {task: {"questions":
    […], "answers": […], "absent": […]}, "chat": {"choices": […]}}; what it leaves out stays ours.

    Raises ValueError at an unknown task or kind, an empty list, a question without {phrases} (but
    for gcg), an answer that has not exactly one <SEG>, {phrases} in an answer to a visual prompt,
    which no words can say again, or choices without {question} and {options}.
    """
    from xsam.datasets.records import expect
    from xsam.files import read_json

    phrasings = {name: dict(task.phrasings) for name, task in TASKS.items()}
    for task, kinds in read_json(Path(path), dict).items() if path else ():
        if task not in phrasings:
            raise ValueError(f"{path}: unknown task {task!r}; known are {', '.join(phrasings)}")
        for kind, texts in expect(kinds, dict, f"{path}: {task}").items():
            where = f"{path}: {task}: {kind}"
            if kind not in phrasings[task]:
                known = ", ".join(phrasings[task])
                raise ValueError(f"{where}: unknown; known for this task are {known}")
            if not expect(texts, list, where):
                raise ValueError(f"{where}: is empty")
            for text in texts:
                _check(expect(text, str, where), TASKS[task], kind, where)
            phrasings[task][kind] = texts
    return phrasings


def _check(text: str, task: Task, kind: str, where: str) -> None:
    """Raises ValueError where a phrasing has a token or field more or less often than its kind."""
    counts = dict.fromkeys((*SPECIAL_TOKENS, *PLACEHOLDERS, "{caption}"), 0)
    counts["{phrases}"] = int(kind == "questions" and task.needs != "image")
    if kind in ("answers", "absent") and task.needs in ("categories", "text"):
        counts["{phrases}"] = min(text.count("{phrases}"), 1)
    counts["<SEG>"] = int(kind == "answers" and task.has_masks)
    counts["{caption}"] = int(kind == "answers" and task.is_grounded)
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
    phrasings: Phrasings | None = None,
) -> Phrased:
    """The task's question about `names`: a random phrasing (default: of ours), or the first one
    without `rng`."""
    return Phrased(_draw(task, "questions", rng, phrasings), names)


def reply(
    task: str,
    rng: np.random.Generator,
    phrasings: Phrasings | None = None,
    kind: str = "answers",
    caption: str = "",
) -> str:
    """A random answer, its {phrases} not yet filled in; of kind "absent" where nothing fits the
    phrase. `caption` is that of GCG."""
    return _draw(task, kind, rng, phrasings).replace("{caption}", caption)


def _draw(
    task: str, kind: str, rng: np.random.Generator | None, phrasings: Phrasings | None
) -> str:
    texts = (phrasings[task] if phrasings else TASKS[task].phrasings).get(kind)
    if not texts:
        raise ValueError(f"tasks.TASKS[{task!r}] has no {kind} among its phrasings")
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
    phrasings: Phrasings | None = None,
) -> str:
    """A question with its hint before it and its options by letter, in a random phrasing of chat's
    choices, or the first one without `rng`; one without options stays as it is."""
    question = f"{hint}\n{question}" if hint else question
    if not options:
        return question
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    words = {"{question}": question, "{options}": lines}
    template = _draw("chat", "choices", rng, phrasings)
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
