"""The tokenizers of the language models that the README names, as their folders are.

pytest tests/test_tokenizers.py
"""

import json
import sys

import numpy as np
import pytest
import torch
from families import FAMILIES, write_phi3, write_qwen3, write_vicuna
from PIL import Image

from xsam.config import SPECIAL_TOKENS
from xsam.data import Processor, Sample
from xsam.inference import load_checkpoint, save_pretrained
from xsam.llm import (
    LanguageModel,
    add_special_tokens,
    end_of_turn,
    render_conversation,
    tokenize,
    unknown_words,
)
from xsam.model import XSAM
from xsam.weights import read_tokenizer

MARKERS = {"phi3": "<|end|>", "qwen3": "<|im_end|>", "llama": "</s>"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>"
TALK = [
    ("<image>\nWhat color is it?", "It's blue, not green."),
    ("Is there a star?", " Yes, <SEG>.\n"),  # as LLaVA's answers: with white space around
    ("Segment <p>the red ring</p>.", "no"),
]


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    path = tmp_path / request.param
    path.mkdir()
    FAMILIES[request.param](path)
    return path


def model_type(folder) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]


def text_of(tokenizer, turns) -> str:
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}] if answer is not None else []
    options = dict(add_generation_prompt=turns[-1][1] is None, enable_thinking=False)
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


# ---- every family --------------------------------------------------------------------------------


def test_a_conversation_is_that_of_the_template_and_every_answer_ends(folder):
    tokenizer, marker = read_tokenizer(folder), MARKERS[model_type(folder)]
    assert end_of_turn(tokenizer) == marker
    for count in range(1, len(TALK) + 1):
        pieces = render_conversation(tokenizer, TALK[:count])
        assert text_of(tokenizer, TALK[:count]).startswith("".join(text for text, _ in pieces))
        answers = [text for text, is_answer in pieces if is_answer]
        for text, (_, answer) in zip(answers, TALK, strict=False):
            assert text.strip().removesuffix(marker).strip() == answer.strip()
            assert text.endswith(marker)
        turns = [*TALK[: count - 1], (TALK[count - 1][0], None)]
        pieces = render_conversation(tokenizer, turns)
        assert "".join(text for text, _ in pieces) == text_of(tokenizer, turns)


def test_no_word_is_lost_where_letters_are_bytes(folder):
    assert unknown_words(read_tokenizer(folder), "a helmet, \u2603 <SEG>") == []


def test_tokens_have_one_start_where_the_family_has_one_and_give_the_words_back(folder):
    tokenizer = read_tokenizer(folder)
    add_special_tokens(tokenizer)
    ids, labels = tokenize(tokenizer, render_conversation(tokenizer, TALK), num_visual_tokens=2)
    starts = ids.count(tokenizer.bos_token_id)
    assert starts == (model_type(folder) == "llama") and (not starts or ids[0] == 1)
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
    said = tokenizer.decode([label for label in labels if label >= 0])
    first, second, third, rest = said.split(MARKERS[model_type(folder)])
    assert [first.strip(), third.strip(), rest] == ["It's blue, not green.", "no", ""]
    # Phi-3 puts a space after every token of ours.
    assert "".join(second.split()) == "Yes,<SEG>."


def test_own_tokens_come_after_the_familys_and_have_rows(folder):
    tokenizer = read_tokenizer(folder)
    before = max(tokenizer.get_vocab().values()) + 1
    config = dict(model_type=model_type(folder), hidden_size=16, intermediate_size=16)
    config |= dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    config |= dict(vocab_size=before, head_dim=8, pad_token_id=None)
    llm = LanguageModel(config)
    assert llm.set_tokenizer(tokenizer) == before + len(SPECIAL_TOKENS)
    assert llm.special_ids == tuple(range(before, before + 3))
    stops = set(tokenizer.convert_ids_to_tokens(sorted(llm.stop_ids)))
    assert stops == {tokenizer.eos_token, MARKERS[model_type(folder)]}


def test_answers_in_a_batch_are_the_answers_alone(folder, config, tmp_path):
    """Also of a family without a padding token, from the folder that the model is written to."""
    torch.manual_seed(0)
    kind, tokenizer = model_type(folder), read_tokenizer(folder)
    llm_config = dict(model_type=kind, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    llm_config |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    llm_config |= dict(vocab_size=len(tokenizer), pad_token_id=None)
    config = config.resolve(llm_config=llm_config, max_new_tokens=6)
    model = XSAM(config, tokenizer).eval()
    images = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")]
    questions = ["Is it?", "What color is the ring? Is there a star?", "Yes or no?"]
    pairs = zip(images, questions, strict=True)
    alone = [model.predict(image, "chat", question).answer for image, question in pairs]
    together = [result.answer for result in model.predict(images, "chat", questions)]
    assert together == alone and any(alone)
    save_pretrained(model, tmp_path / "written")
    again, _ = load_checkpoint(tmp_path / "written", report=lambda _: None)
    assert again.predict(images[1], "chat", questions[1]).answer == alone[1]


# ---- Vicuna --------------------------------------------------------------------------------------


def test_vicuna_speaks_in_its_own_template(tmp_path):
    folder = tmp_path / "vicuna-7b-v1.5"
    folder.mkdir()
    write_vicuna(folder)
    pieces = render_conversation(read_tokenizer(folder), [("Hi", "Hello."), ("Who?", None)])
    assert "".join(text for text, _ in pieces) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: Hi "
        "ASSISTANT: Hello.</s>USER: Who? ASSISTANT:"
    )
    folder = folder.rename(tmp_path / "llama-2-7b")  # of which no template is known
    with pytest.raises(ValueError, match="llama-2-7b: its tokenizer has no chat template"):
        read_tokenizer(folder)


def test_vicuna_tokenizer_is_the_sentencepiece_models(tmp_path):
    write_vicuna(tmp_path)
    import sentencepiece

    (tmp_path / "chat_template.jinja").write_text(read_template())
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = read_tokenizer(tmp_path)
    for text in ("The ring is red.", "a  b", "It's\nblue, é 漢", "ASSISTANT: Yes"):
        assert tokenizer.encode(text, add_special_tokens=False) == model.encode(text)
        assert tokenizer.decode(model.encode(text)) == text


def read_template() -> str:
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] }}"
        "{% else %}{{ ' A: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' A:' }}{% endif %}"
    )


@pytest.mark.parametrize("absent", ["sentencepiece", "google.protobuf"])
def test_a_missing_package_is_named_and_no_other(tmp_path, monkeypatch, absent):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    for name in ("sentencepiece", "google.protobuf"):
        if name == absent or name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ValueError, match=r"sentencepiece and protobuf: .*xsam\[sentencepiece\]"
    ) as it:
        read_tokenizer(tmp_path)
    assert "tokenizer.model" in str(it.value) and "tiktoken" not in str(it.value)


# ---- what is no tokenizer ------------------------------------------------------------------------


@pytest.mark.parametrize("content, about", [(POINTER, "git lfs pull"), (PAGE, "a web page")])
def test_what_stands_in_for_a_file_of_a_tokenizer_is_named(folder, content, about):
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            before = path.read_bytes()
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"{name}: .*{about}"):
                read_tokenizer(folder)
            path.write_bytes(before)
    (folder / "done.txt").touch()  # what else lies there does not matter
    (folder / "old.json").mkdir(exist_ok=True)
    assert len(read_tokenizer(folder))


def test_a_file_of_words_that_is_cut_short_or_missing_is_named(folder):
    path = folder / ("tokenizer.model" if model_type(folder) == "llama" else "tokenizer.json")
    whole = path.read_bytes()
    for length in (0, 9, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=folder.name) as caught:
            read_tokenizer(folder)
        assert "tiktoken" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no words|which has its words, is missing"):
        read_tokenizer(folder)
    with pytest.raises(ValueError, match=r"absent: .*no such folder"):
        read_tokenizer(folder / "absent")


# ---- templates -----------------------------------------------------------------------------------


def with_template(tmp_path, template: str):
    write_qwen3(tmp_path, thinks=False)
    (tmp_path / "chat_template.jinja").write_text(template)
    return read_tokenizer(tmp_path)


CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "change",
    [
        ("m['content'] +", "m['content'] | upper +"),
        ("m['content'] +", "m['content'][:4] +"),
        ("in messages", "in messages[-2:]"),
        ("{% if add_generation_prompt", "{% if false"),
        ("assistant\n' }}", "assistant\n<think>\n' }}"),
        ("{{ '<|im_start|>' +", "{{ raise_exception('no') }}{{ '<|im_start|>' +"),
    ],
)
def test_a_template_that_does_not_serve_is_refused_when_it_is_read(tmp_path, change):
    assert with_template(tmp_path, CHAT)
    with pytest.raises(ValueError, match=r"its chat template does not serve"):
        with_template(tmp_path, CHAT.replace(*change))


def test_a_template_may_take_the_space_around_an_answer(tmp_path):
    tokenizer = with_template(tmp_path, CHAT.replace("m['content'] +", "m['content'] | trim +"))
    # The second answer with its space stands in the next question too.
    turns = [(" Is it? ", " star \n"), ("no star \nthere", "x"), ("And?", " ")]
    pieces = render_conversation(tokenizer, turns)
    answers = [text for text, is_answer in pieces if is_answer]
    assert answers == ["star<|im_end|>", "x<|im_end|>", "<|im_end|>"]
    assert "".join(text for text, _ in pieces) == text_of(tokenizer, turns).rstrip("\n")


def test_an_answer_ends_also_where_the_template_has_no_end(tmp_path):
    tokenizer = with_template(tmp_path, CHAT.replace("<|im_end|>", ""))
    pieces = render_conversation(tokenizer, [("One?", "Two."), ("Three?", "Four.")])
    assert [text for text, is_answer in pieces if is_answer] == [
        "Two.<|im_end|>",
        "Four.<|im_end|>",
    ]


@pytest.mark.parametrize("place", [0, 1])
def test_a_thought_that_the_template_moves_is_refused_with_its_record(tmp_path, config, place):
    write_qwen3(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    turns = [("Is it red?", "Yes."), ("What is it?", "no")]
    turns[place] = (turns[place][0], "<think>Look at it.</think> The ring.")
    no_masks = np.zeros((0, 8, 8), bool), np.zeros(0, np.int64)
    sample = Sample("talk 7", "chat", Image.new("RGB", (8, 8)), turns, *no_masks)
    with pytest.raises(ValueError, match=r"talk 7: the chat template changes the answer '<think>"):
        Processor(config, tokenizer).tokenize(sample)


def test_ids_may_have_gaps(tmp_path):
    write_phi3(tmp_path)
    path = tmp_path / "tokenizer.json"
    words = json.loads(path.read_text())
    words["model"]["vocab"]["▁far"] = 900
    path.write_text(json.dumps(words))
    tokenizer = read_tokenizer(tmp_path)
    assert add_special_tokens(tokenizer) > 900 > len(tokenizer)
