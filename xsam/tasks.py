"""Every task in one table: what it asks and answers, what a request for it needs, how masks are
made of it. No torch.

The rest of the library asks TASKS, and compares no name of a task. What cannot stand here is found
by a key: a set and its reader by `Source.task` and `format` (datasets/), the masks by a name in
`inference.POST_PROCESSING`. docs/adding.md walks through a new one.

A question's {phrases} becomes "<p>name</p>, <p>name</p>", one phrase, or one "<p><region></p>" for
each visual prompt (paper section 3.1, figure 2). An answer may say the names again in the same way;
the classes stay the question's. The phrasings are ours; for weights that were trained with others,
a JSON file replaces them (`--phrasings`).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Request:
    """What a word of the command line `predict` asks of its task."""

    post_processing: str  # a key of inference.POST_PROCESSING; "none": the answer alone
    example: str  # what may follow the word on the command line
    threshold: str = ""  # what a threshold is of: a field of Config, or "shown"; "": there is none


@dataclass(frozen=True)
class Task:
    """What is special about a task. Its name is its key in TASKS, and `Sample.task`."""

    # "questions" and "answers"; of some tasks "absent", the answers where there is no such thing.
    # Of chat "choices": how a question with options is asked; {question} is the question after its
    # hint, {options} has a line "A. text" for every option.
    phrasings: dict[str, list[str]]
    needs: Literal["categories", "text", "regions", "image"]  # what a question is about
    requests: dict[str, Request]  # by the words of the command line that ask for it
    usual: tuple[int, int, int]  # what --plan assumes: text tokens, those in answers, decoder runs
    has_masks: bool = True  # else it is answered by words alone
    is_per_phrase: bool = False  # a <SEG> for each phrase; else one for the image
    is_grounded: bool = False  # the classes are the phrases of the answer; else of the question
    is_one_object: bool = False  # all regions mark one object; else every region another kind


_SEG_ANSWERS = ["Here is the segmentation: <SEG>.", "Sure, <SEG>.", "It is segmented: <SEG>."]

TASKS: dict[str, Task] = {
    "chat": Task(
        phrasings={
            "choices": ["{question}\n{options}\nAnswer with the letter of the right option."]
        },
        needs="text",
        requests={"chat": Request("none", '"what is in the picture?" --image photo.jpg')},
        usual=(300, 150, 0),
        has_masks=False,
    ),
    "generic": Task(
        phrasings={
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
        needs="categories",
        requests={
            "panoptic": Request(
                "panoptic",
                "--things person,dog --stuff sky,grass --image photo.jpg",
                "score_threshold",
            ),
            "instance": Request(
                "instances", "--names names.txt --threshold 0.5 --image photos --out found", "shown"
            ),
            "semantic": Request(
                "semantic", "--stuff sky,grass,road --image 'street/*.jpg' --out maps"
            ),
        },
        usual=(600, 6, 1),
    ),
    "refer": Task(
        phrasings={
            "questions": [
                "Segment {phrases} in this image.",
                "Where is {phrases}? Answer with a mask.",
                "Please find {phrases} and segment it.",
                "Give me the mask of {phrases}.",
            ],
            "answers": _SEG_ANSWERS,
            "absent": ["There is no such thing in this image.", "This is not in the image."],
        },
        needs="text",
        requests={"refer": Request("phrases", '"the red circle" --image drawing.jpg', "presence")},
        usual=(150, 40, 3),
        is_per_phrase=True,
    ),
    "reason": Task(
        phrasings={
            "questions": [
                "{phrases} Answer with a mask.",
                "{phrases} Please segment what is meant.",
                "Segment what this asks for: {phrases}",
            ],
            "answers": _SEG_ANSWERS,
        },
        needs="text",
        requests={
            "reason": Request("phrases", '"what can one sit on?" --image photo.jpg', "presence")
        },
        usual=(80, 30, 1),
        is_per_phrase=True,
    ),
    "gcg": Task(
        phrasings={
            "questions": [
                "Describe this image and segment what you mention.",
                "Give a caption of this image with a mask for each part of it.",
                "What is in this image? Describe it, with masks.",
            ],
            "answers": ["{caption} <SEG>"],
        },
        needs="image",
        requests={"gcg": Request("phrases", "--image photo.jpg")},
        usual=(80, 50, 1),
        is_grounded=True,
    ),
    "interactive": Task(
        phrasings={
            "questions": [
                "Segment the object at {phrases}.",
                "Give me the mask of {phrases}.",
                "What is marked by {phrases}? Please segment it.",
            ],
            "answers": _SEG_ANSWERS,
        },
        needs="regions",
        requests={"interactive": Request("interactive", "--point 120,80 --image photo.jpg")},
        usual=(30, 6, 1),
        is_one_object=True,
    ),
    "vgd": Task(
        phrasings={
            "questions": [
                "Segment everything of the same kind as {phrases}.",
                "Find all objects that look like {phrases} and segment them.",
                "Give me a mask for each thing of the kinds shown by {phrases}.",
            ],
            "answers": ["Here is the segmentation: <SEG>.", "Sure, <SEG>."],
        },
        needs="regions",
        requests={
            "vgd": Request(
                "instances", "--box 10,20,200,180 --region cat.png --image photo.jpg", "shown"
            ),
        },
        usual=(60, 6, 1),
    ),
}


def requests() -> dict[str, Request]:
    """What can be asked for, by the words of the command line."""
    return {word: each for task in TASKS.values() for word, each in task.requests.items()}


def requested_task(word: str) -> str:
    """The name of the task that a word of the command line asks for."""
    return next(name for name, task in TASKS.items() if word in task.requests)
