"""Phrasings: ours are well-formed, a user's are taken or refused with a reason.

pytest tests/test_prompts.py
"""

import copy
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from xsam import tasks
from xsam.config import SPECIAL_TOKENS
from xsam.datasets.sources import SOURCES
from xsam.prompts import (
    PLACEHOLDERS,
    ask,
    check_words,
    choice_question,
    clean_name,
    find_phrases,
    join_phrases,
    read_names,
    read_phrasings,
    reply,
    strip_marks,
)

TASKS = ("generic", "refer", "reason", "gcg", "interactive", "vgd")
PHRASINGS = read_phrasings("")
OPTION_REQUEST = "Answer with the letter of the right option."
TOKENS = ("<image>", "<region>", "<SEG>", "<p>", "</p>")


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed or 0)


# ---- ours ----------------------------------------------------------------------------------------


def test_every_task_of_the_sources_has_phrasings():
    assert tuple(PHRASINGS) == ("chat", *TASKS)
    assert {source.task for source in SOURCES.values()} == {*PHRASINGS}
    assert (*SPECIAL_TOKENS, *PLACEHOLDERS) == ("<SEG>", "<p>", "</p>", "<image>", "<region>")


@pytest.mark.parametrize("task", TASKS)
def test_our_phrasings_are_well_formed(task):
    kinds = PHRASINGS[task]
    assert set(kinds) == {"questions", "answers"} | ({"absent"} if task == "refer" else set())
    for texts in kinds.values():
        assert texts and len(set(texts)) == len(texts)
        assert all(text == text.strip() and text for text in texts)
    for text in kinds["questions"]:
        assert text.count("{phrases}") == (task != "gcg")
        assert not any(token in text for token in TOKENS)
    for text in kinds["answers"]:
        assert text.count("<SEG>") == 1 and text.count("{caption}") == (task == "gcg")
        assert not any(token in text.replace("<SEG>", "") for token in TOKENS)
    for text in kinds.get("absent", ()):
        assert not any(token in text for token in TOKENS)


def test_a_caption_comes_before_its_seg():
    """The <SEG> reads the phrases, so they have to be said by then."""
    for text in PHRASINGS["gcg"]["answers"]:
        assert text.index("{caption}") < text.index("<SEG>")


def test_our_phrasings_as_a_file_of_a_user_change_nothing(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(PHRASINGS))
    assert read_phrasings(tmp_path / "mine.json") == PHRASINGS == read_phrasings("")


# ---- a user's ------------------------------------------------------------------------------------


def test_a_file_replaces_only_what_it_names(tmp_path):
    path = tmp_path / "mine.json"
    mine = {
        "refer": {"questions": ["Can you segment {phrases}?"], "absent": ["Nothing."]},
        "gcg": {"answers": ["Look: {caption}\n<SEG>"], "questions": ["Tell me, with masks."]},
    }
    path.write_text(json.dumps(mine))
    before = json.dumps(PHRASINGS)
    phrasings = read_phrasings(str(path))
    assert phrasings["refer"] == PHRASINGS["refer"] | mine["refer"]
    assert phrasings["gcg"] == mine["gcg"]
    for task in set(TASKS) - set(mine):
        assert phrasings[task] == PHRASINGS[task]
    assert json.dumps(PHRASINGS) == before
    assert ask("refer", ["a cup"], rng(), phrasings) == "Can you segment <p>a cup</p>?"
    assert reply("refer", rng(), phrasings, "absent") == "Nothing."
    assert reply("gcg", rng(), phrasings, caption="a <p>cup</p>") == "Look: a <p>cup</p>\n<SEG>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds a list, expected a dict"),
        (
            {"refering": {"questions": ["{phrases}"]}},
            "unknown task 'refering'; known are chat, generic,",
        ),
        ({"chat": {"questions": ["?"]}}, "chat: questions: unknown; known .* are choices"),
        (
            {"chat": {"choices": ["{question} A or B?"]}},
            "chat: choices: .* {options} 0 times, not 1",
        ),
        ({"chat": {"choices": ["{options}"]}}, "has {question} 0 times, not 1"),
        ({"chat": {"choices": ["{question} {options} {phrases}"]}}, "has {phrases} 1 times, not 0"),
        ({"refer": {"questions": ["{phrases} {options}"]}}, "has {options} 1 times, not 0"),
        ({"refer": ["{phrases}"]}, "refer: expected dict"),
        ({"refer": {"question": ["{phrases}"]}}, "refer: question: unknown; known for this task"),
        ({"generic": {"absent": ["None."]}}, "generic: absent: unknown"),
        ({"refer": {"questions": []}}, "refer: questions: is empty"),
        ({"refer": {"questions": "{phrases}"}}, "refer: questions: expected list"),
        ({"refer": {"questions": [3]}}, "refer: questions: expected str"),
        ({"refer": {"questions": ["Segment it."]}}, r"'Segment it.' has {phrases} 0 times, not 1"),
        ({"vgd": {"questions": ["{phrases} or {phrases}"]}}, r"has {phrases} 2 times, not 1"),
        ({"gcg": {"questions": ["Describe {phrases}."]}}, r"has {phrases} 1 times, not 0"),
        ({"refer": {"answers": ["Sure."]}}, "refer: answers: 'Sure.' has <SEG> 0 times, not 1"),
        ({"vgd": {"answers": ["<SEG> <SEG>"]}}, "has <SEG> 2 times, not 1"),
        ({"refer": {"absent": ["None: <SEG>."]}}, "refer: absent: .* has <SEG> 1 times, not 0"),
        ({"gcg": {"answers": ["<SEG>"]}}, "has {caption} 0 times, not 1"),
        ({"gcg": {"answers": ["{caption} {caption} <SEG>"]}}, "has {caption} 2 times, not 1"),
        ({"refer": {"answers": ["{caption} <SEG>"]}}, "has {caption} 1 times, not 0"),
        ({"refer": {"answers": ["{phrases} or {phrases}: <SEG>"]}}, "has {phrases} 2 times, not 1"),
        ({"refer": {"absent": ["{phrases}{phrases}"]}}, "absent: .* has {phrases} 2 times, not 1"),
        ({"vgd": {"answers": ["{phrases} is <SEG>"]}}, "has {phrases} 1 times, not 0"),
        ({"interactive": {"answers": ["{phrases}: <SEG>"]}}, "has {phrases} 1 times, not 0"),
        ({"gcg": {"answers": ["{phrases}: {caption} <SEG>"]}}, "has {phrases} 1 times, not 0"),
    ],
)
def test_a_mistake_in_a_file_is_said(tmp_path, content, message):
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"mine\.json.*{message}"):
        read_phrasings(tmp_path / "mine.json")


@pytest.mark.parametrize(
    ("task", "kind", "text"),
    [
        ("refer", "questions", "<image>\nSegment {phrases}."),
        ("refer", "questions", "Segment <p>{phrases}</p>."),
        ("refer", "questions", "Segment {phrases}: <SEG>"),
        ("interactive", "questions", "Segment <region> {phrases}."),
        ("gcg", "questions", "<image> Describe it."),
        ("refer", "answers", "<image> <SEG>"),
        ("refer", "answers", "<p>it</p> is <SEG>"),
        ("gcg", "answers", "<p>{caption}</p> <SEG>"),
        ("refer", "absent", "No <p>it</p>."),
    ],
)
def test_a_token_of_the_prompt_format_in_a_file_is_refused(tmp_path, task, kind, text):
    """The image and the marks are put in for each sample; twice they would break the batch."""
    (tmp_path / "mine.json").write_text(json.dumps({task: {kind: [text]}}))
    with pytest.raises(ValueError, match=rf"mine\.json: {task}: {kind}"):
        read_phrasings(tmp_path / "mine.json")


def test_a_file_that_is_absent_or_damaged_is_named(tmp_path):
    (tmp_path / "cut.json").write_text('{"refer": ')
    for name in ("absent.json", "cut.json"):
        with pytest.raises(ValueError, match=name):
            read_phrasings(tmp_path / name)


# ---- asking and answering ------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_questions_carry_their_phrases_and_all_are_drawn(task):
    names = ["red ring", "the {caption}, a {phrases}"]
    questions = {ask(task, names, rng(seed)) for seed in range(60)}
    marked = "<p>red ring</p>, <p>the {caption}, a {phrases}</p>"
    expected = {text.replace("{phrases}", marked) for text in PHRASINGS[task]["questions"]}
    assert questions == expected
    assert ask(task, names) == PHRASINGS[task]["questions"][0].replace("{phrases}", marked)


def test_answers_are_drawn_from_their_kind():
    for task in TASKS:
        if task != "gcg":
            assert {reply(task, rng(seed)) for seed in range(60)} == {*PHRASINGS[task]["answers"]}
    absent = {reply("refer", rng(seed), kind="absent") for seed in range(60)}
    assert absent == {*PHRASINGS["refer"]["absent"]}
    assert reply("gcg", rng(), caption="a <p>{caption}</p>.") == "a <p>{caption}</p>. <SEG>"


def test_the_same_generator_gives_the_same_words():
    for task in TASKS:
        assert ask(task, ["x"], rng(3)) == ask(task, ["x"], rng(3))
        assert reply(task, rng(3)) == reply(task, rng(3))


def test_join_phrases():
    assert join_phrases(["red ring", "sky"]) == "<p>red ring</p>, <p>sky</p>"
    assert join_phrases(["<region>"] * 2) == "<p><region></p>, <p><region></p>"
    assert join_phrases([]) == ""


def test_choices_are_asked_in_a_users_words(tmp_path):
    mine = ["{question}\nOptions:\n{options}\nWhich?", "{options}\n{question}"]
    (tmp_path / "mine.json").write_text(json.dumps({"chat": {"choices": mine}}))
    phrasings = read_phrasings(tmp_path / "mine.json")
    options = {"A": "a {question}", "B": "{options}"}  # what is filled in is not filled in again
    lines = "A. a {question}\nB. {options}"
    asked = {
        choice_question("Is {options} it?", options, "Look.", rng(n), phrasings) for n in range(9)
    }
    question = "Look.\nIs {options} it?"
    assert asked == {f"{question}\nOptions:\n{lines}\nWhich?", f"{lines}\n{question}"}
    assert choice_question("What?", {}, "Look.", rng(), phrasings) == "Look.\nWhat?"


def test_choice_questions():
    options = {"A": "a ring", "C": "a star"}
    lines = ["Look up.", "What is it?", "A. a ring", "C. a star", OPTION_REQUEST]
    assert choice_question("What is it?", options, "Look up.") == "\n".join(lines)
    assert choice_question("What is it?", {}) == "What is it?"


@pytest.mark.parametrize(
    ("answer", "phrases"),
    [
        ("A <p>ring</p> on <p> the sky </p>. <SEG>", ["ring", "the sky"]),
        ("no marks <SEG>", []),
        ("<p>not closed", []),
        ("not opened</p> <p>ring</p>", ["ring"]),
        ("<p>not closed <p>ring</p>", ["ring"]),
        ("<p>ring</p></p> <p>sky</p>", ["ring", "sky"]),
        ("<p></p><p>two\nlines</p>", ["", "two\nlines"]),
    ],
)
def test_find_phrases(answer, phrases):
    assert find_phrases(answer) == phrases


def test_found_phrases_are_those_that_were_joined():
    names = ["red ring", "a < b", "sky, blue"]
    assert find_phrases(f"See {join_phrases(names)}.") == names


@pytest.mark.parametrize("token", TOKENS)
def test_words_with_a_token_of_the_prompt_format_are_refused(token):
    assert check_words("a < b and seg", "record 3") == "a < b and seg"
    with pytest.raises(ValueError, match=f"record 3: contains {token}"):
        check_words(f"the {token} here", "record 3")


def test_half_a_character_is_refused():
    assert check_words("café 🙂", "record 3") == "café 🙂"
    with pytest.raises(ValueError, match="record 3: holds a lone surrogate"):
        check_words(json.loads('"\\ud83d"'), "record 3")


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("sky-other-merged", "sky other"),
        ("door-stuff", "door"),
        ("floor-wood", "floor wood"),
        ("Hot Dog", "hot dog"),
        ("window ", "window"),
        ("road, route", "road, route"),
    ],
)
def test_clean_name(name, clean):
    assert clean_name(name) == clean


def test_the_tasks_with_a_seg_for_each_phrase():
    assert [name for name, task in tasks.TASKS.items() if task.is_per_phrase] == ["refer", "reason"]


# ---- lists of names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cup", ["cup"]),
        (" red ring,sky , Hot Dog,", ["red ring", "sky", "Hot Dog"]),
        ("background,cup,Background,invalid_class_id", ["cup"]),
        ("1:cup,sky", ["1:cup", "sky"]),  # numbers are for the lines of a file
    ],
)
def test_names_between_commas(text, names):
    assert read_names(text) == names


def test_a_list_between_commas_may_be_longer_than_the_name_of_any_file():
    names = [f"kind {number}" for number in range(40)]
    assert read_names(",".join(names)) == names


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        ("cup\n\n  hot dog \n", ["cup", "hot dog"]),
        ("0:invalid_class_id\n1:cup,mug,beaker\n2: road, route\n", ["cup", "road"]),
        ("0:background\n12 :cup\n", ["cup"]),
        ("Background\r\nroad, route\r\n", ["road, route"]),  # without a number it is one name
        ("ratio 1:2\nkind: cup\n", ["ratio 1:2", "kind: cup"]),
    ],
)
def test_names_of_a_file_are_one_a_line(tmp_path, lines, names):
    for name in ("names.txt", "names"):  # with a suffix and without
        (tmp_path / name).write_bytes(lines.encode())
        assert read_names(str(tmp_path / name)) == names


def test_lists_without_a_name_and_bad_names_are_refused(tmp_path):
    for text in ("", " , ,", "background"):
        with pytest.raises(ValueError, match="no names in it"):
            read_names(text)
    path = tmp_path / "names.txt"
    for content in (b" ,", b"\n\n#none\n", b"0:background\n", b"1:\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"names\.txt': no names in it"):
            read_names(str(path))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"names\.txt: it is empty"):
        read_names(str(path))
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"names\.txt: cannot be read as a list of names"):
        read_names(str(path))
    with pytest.raises(ValueError, match=r"absent\.txt: cannot be read as a list of names"):
        read_names(str(tmp_path / "absent.txt"))
    with pytest.raises(ValueError, match="name 'a <SEG>': contains <SEG>"):
        read_names("cup,a <SEG>")


CUP_AND_DOG = {
    "a.csv": "id,name\n1,cup\n2,hot dog\n",
    "b.csv": "cup\nhot dog\n",
    "c.csv": "id;class_name;colour\n1;cup;red\n2;hot dog;blue\n",
    "d.tsv": "0\tcup\n1\thot dog\n",
    "objectInfo150.txt": "Idx\tRatio\tName\n1\t0.5\tcup, mug\n2\t0.3\thot dog, sausage\n",
    "a.json": '["cup", "hot dog"]',
    "b.json": '{"0": "cup", "1": "hot dog"}',
    "c.json": '{"cup": 0, "hot dog": 1}',
    "d.json": '{"images": [], "categories": [{"id": 4, "name": "cup"}, {"name": "hot dog"}]}',
    "e.json": '[{"name": "cup", "color": [1, 2, 3]}, {"name": "hot dog"}]',
    "config.json": '{"model_type": "x", "id2label": {"0": "cup", "1": "hot dog"}}',
    "a.yaml": "path: ../data\nnc: 2\nnames:\n  0: cup\n  # not this\n  1: hot dog # or this\n",
    "b.yaml": "names: ['cup', \"hot dog\"]\nnc: 2\n",
    "c.yml": "train: x\r\nnames:\r\n- cup\r\n- hot dog\r\nval: y\r\n",
    "d.yml": "names: {0: cup, 1: hot dog}\n",
    "coco.names": "cup\nhot dog\n",
    # As they come from other programs and by hand.
    "f.json": '{"1": "hot dog", "0": "cup", "10": "background"}',
    "g.json": '{"hot dog": 1, "cup": 0}',
    "h.json": '{"categories": [{"id": 3, "name": "hot dog"}, {"id": 1, "name": "cup"}]}',
    "e.csv": "2,hot dog\n1,cup\n",
    "f.csv": "category,name\nthing,cup\nfood,hot dog\n",
    "e.yaml": "nc: 2\nnames: [ 'cup',\n         'hot dog' ]\n",
    "f.yaml": "names: # classes\n  '1': hot dog\n  '0': cup\n",
    "g.yaml": "names: ['cup', 'hot dog',]\nnc: 2\n",
    "a.txt": "cup,hot dog\n",
    "b.txt": "0 cup\n1 hot dog\n",
    "c.txt": "1) hot dog\n0) cup\n",
    "d.txt": "# my classes\n'cup',\n'hot dog',\n",
    "e.txt": "['cup', 'hot dog']",
    "f.txt": "- cup\n- hot dog\n",
    "g.txt": "__background__\ncup\nN/A\nhot dog\n\0\0",
    "h.txt": "name\ncup\nhot dog\n",
    "i.txt": "n03147509 cup, mug\nn07697537 hot dog, red hot\n",
    "names.txt": "\ufeff0:background\n1:cup,mug\n2:hot dog\n",
}


@pytest.mark.parametrize("name", CUP_AND_DOG)
def test_names_are_read_from_the_forms_that_lists_have(tmp_path, name):
    (tmp_path / name).write_bytes(CUP_AND_DOG[name].encode())
    assert read_names(str(tmp_path / name)) == ["cup", "hot dog"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "a,b,c\n1,2,3\n"),
        ("b.csv", "id,name\n1,cup\n2\n"),
        ("a.json", "[1, 2]"),
        ("b.json", '{"a": {"b": 1}}'),
        ("c.json", '["cup", '),
        ("a.yaml", "path: ../data\n"),
        ("b.yaml", "nc: 3\nnames: [cup, hot dog]\n"),
        ("c.yaml", "names: [cup, {a: b}]\n"),
        ("d.yaml", "names: [cup\n"),
        ("map.txt", "item {\n  id: 1\n}\n"),
        ("map.pbtxt", "item {\n  id: 1\n}\n"),
        ("lines.jsonl", '{"name": "cup"}\n'),
        (".", None),
        ("a.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF"),
        ("names.txt", "<!DOCTYPE html><html>"),
        ("names.txt", None),
        ("folder/names", None),
        ("photo.jpg", None),
        ("C:\\lists\\classes.names", None),
    ],
)
def test_what_is_no_list_of_names_is_an_error_that_names_it(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: cannot be read as a list of names"):
        read_names(name)


def test_a_name_may_have_a_slash_or_a_dot_between_others():
    assert read_names("tv/monitor, St. Bernard,car") == ["tv/monitor", "St. Bernard", "car"]
    assert read_names("St. Bernard") == ["St. Bernard"]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("A <p>ring</p> on <p>the sky</p>. <SEG>", "A ring on the sky."),
        ("<p>Two</p>\n lines<SEG><SEG>", "Two lines"),
        ("<p>not closed <SEG>", "not closed"),
        ("nothing < marked >", "nothing < marked >"),
        ("<SEG>", ""),
    ],
)
def test_an_answer_without_its_marks(answer, text):
    assert strip_marks(answer) == text.strip()


def test_a_question_keeps_what_it_was_made_of():
    """Also through a copy and a pickle, as between the processes that load data."""
    question = ask("generic", ["cat", "sky", "a red"], np.random.default_rng(0))
    for other in (question, copy.deepcopy(question), pickle.loads(pickle.dumps(question))):
        assert other == question and other.names == ["cat", "sky", "a red"]
        assert other.template in PHRASINGS["generic"]["questions"]
        kept = other.keep([2, 0])
        assert kept == other.template.replace("{phrases}", "<p>a red</p>, <p>cat</p>")
        assert kept.keep([1]).names == ["cat"]
