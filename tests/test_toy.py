"""The toy world's weights and words: the same bytes each time, a tokenizer that lacks no word.

pytest tests/test_toy.py
"""

import csv
import hashlib
import json
import pickle
import re
from pathlib import Path

import pytest

from xsam.prompts import clean_name, read_phrasings
from xsam.toy import weights as toy
from xsam.toy.preset import toy as toy_config


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


# Of what is read in JSON files.
TEXT_KEYS = {"name", "sent", "text", "caption", "labels", "sentence", "query", "outputs", "value"}


def said(world: Path) -> list[str]:
    """Every text of every file of the world, and all phrasings, without placeholders."""
    csv.field_size_limit(2**24)
    texts = [
        text for task in read_phrasings("").values() for kind in task.values() for text in kind
    ]
    for path in world.rglob("*"):
        if path.suffix == ".tsv":
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file, delimiter="\t"))
            keys = ("question", "hint", "answer", *"ABCD")
            texts += [row[key] for row in rows for key in keys if row.get(key)]
        elif path.suffix in (".p", ".json"):
            content = path.read_bytes()
            texts += texts_in(pickle.loads(content) if path.suffix == ".p" else json.loads(content))
    plain = {" ".join(re.sub(r"<[^>]+>|\{\w+\}", " ", text).split()) for text in texts}
    return sorted(re.sub(r" (?=[.,:?])", "", text) for text in plain)


def texts_in(value, key: str = "") -> list[str]:
    if isinstance(value, dict):
        return [text for key, each in value.items() for text in texts_in(each, key)]
    if isinstance(value, list):
        return [text for each in value for text in texts_in(each, key)]
    if not isinstance(value, str) or key not in TEXT_KEYS:
        return []
    return [clean_name(value) if key == "name" else value]


def test_tokenizer_knows_every_word_and_gives_it_back(world):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "weights" / toy_config().model.llm)
    assert len(tokenizer) <= toy_config().model.llm_config["vocab_size"] - toy.SPARE_TOKENS
    built = toy.build_tokenizer(toy_config().model.llm_config["vocab_size"])
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    sentences = said(world / "data")
    assert len(sentences) > 300
    for sentence in sentences:
        ids = tokenizer(sentence).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == sentence
        assert ids == built(sentence).input_ids


def test_words_are_the_same_tokens_everywhere(world):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "weights" / toy_config().model.llm)
    tokenizer.add_tokens(["<p>", "</p>"], special_tokens=True)
    texts = ("circle", "a circle", "<|user|>circle", "\ncircle", "<p>circle</p>", "circle, ")
    (circle,) = tokenizer("circle").input_ids
    assert all(circle in tokenizer(text).input_ids for text in texts)
    assert tokenizer("<p> circle</p>").input_ids == tokenizer("<p>circle</p>").input_ids
    turns = [{"role": "user", "content": "circle"}, {"role": "assistant", "content": "ring"}]
    for count, end in ((1, "<|assistant|>"), (2, "<|assistant|>ring<|end|>")):
        text = tokenizer.apply_chat_template(
            turns[:count], tokenize=False, add_generation_prompt=count == 1
        )
        assert text == "<|user|>circle<|end|>" + end


def test_no_word_is_unknown():
    tokenizer = toy.build_tokenizer(toy_config().model.llm_config["vocab_size"])
    words = ["helmet", "cup", "Cat", "cat", "traffic light", "naïve", "茶", "1.5\tm", "two  spaces"]
    assert len({tuple(tokenizer(word).input_ids) for word in words}) == len(words)
    assert [tokenizer.decode(tokenizer(word).input_ids) for word in words] == words


def test_muon_is_torchs_but_for_rounding():
    import torch

    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon is there since PyTorch 2.9")
    rng = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=rng) for shape in ((12, 48), (64, 16))]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = toy.Muon(ours, 0.1), torch.optim.Muon(theirs, 0.1, weight_decay=0.05)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=rng)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, starts, strict=True):
        moved, expected = (each.detach() - start for each in (a, b))
        assert (moved - expected).abs().max() < 0.05 * expected.abs().max()


def test_weights_load_repeat_and_leave_torch_alone(world, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, SamVisionModel, SiglipVisionModel

    model = toy_config().model
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    toy.write_weights(tmp_path / "weights", model, steps=3, num_workers=2)
    assert hashes(tmp_path / "weights") == hashes(world / "weights")
    assert torch.equal(torch.random.get_rng_state(), state) and torch.get_num_threads() == threads
    kinds = (SamVisionModel, model.seg_encoder), (SiglipVisionModel, model.image_encoder)
    for kind, folder in (*kinds, (AutoModelForCausalLM, model.llm)):
        loaded, report = kind.from_pretrained(world / "weights" / folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert all(each.std() > 1e-3 for each in loaded.parameters() if each.dim() > 1)


def test_weights_have_the_rights_of_any_new_file(world, tmp_path):
    (tmp_path / "new").touch()
    rights = {path.stat().st_mode for path in (world / "weights").rglob("*") if path.is_file()}
    assert rights == {(tmp_path / "new").stat().st_mode}
