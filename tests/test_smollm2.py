"""The smallest language model that the presets name is transformers' own, state for state and token
for token; a small random one of its kind everywhere, the real one where its folder is:

XSAM_SMOLLM2=weights/SmolLM2-135M-Instruct pytest tests/test_smollm2.py
"""

import os
from pathlib import Path

import pytest
import torch
from families import write_qwen3
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from xsam.config import small
from xsam.llm import LanguageModel, end_of_turn, render_conversation
from xsam.weights import complete_architecture, load_folder, parameters_on_meta, read_tokenizer

REAL = os.environ.get("XSAM_SMOLLM2", "")
PROMPTS = (
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Can you segment the zebra on the left?",
    "Is the sky blue?",
    "Write one sentence about a kitchen.",
)


@pytest.fixture(
    scope="module",
    params=["random", pytest.param("real", marks=pytest.mark.skipif(not REAL, reason="no folder"))],
)
def folder(request, tmp_path_factory) -> Path:
    if request.param == "real":
        return Path(REAL)
    path = tmp_path_factory.mktemp("llama")
    write_qwen3(path, thinks=False)  # pieces of bytes and <|im_start|>, as SmolLM2's
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True,
        initializer_range=0.2, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llm(folder) -> LanguageModel:
    config = small().resolve(llm=folder.name)
    with parameters_on_meta():
        model = LanguageModel(complete_architecture(config, "llm", folder).model.llm_config)
    load_folder(model, "llm", folder, dtype=torch.float32)
    model.set_tokenizer(read_tokenizer(folder))
    return model.eval()


def prompt_ids(folder: Path, question: str) -> torch.Tensor:
    tokenizer = read_tokenizer(folder)
    ((text, _),) = render_conversation(tokenizer, [(question, None)])
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])


def test_the_preset_is_what_the_folder_says(folder):
    if folder.name == "SmolLM2-135M-Instruct":  # raises where they differ
        complete_architecture(small(), "llm", folder)


def test_a_conversation_is_that_of_the_template(folder):
    tokenizer = read_tokenizer(folder)
    assert end_of_turn(tokenizer) == "<|im_end|>"
    pieces = render_conversation(tokenizer, [("<image>\nOne?", "Two."), ("Three?", None)])
    messages = [
        {"role": "user", "content": "<image>\nOne?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "".join(text for text, _ in pieces) == expected
    assert [text for text, is_answer in pieces if is_answer] == ["Two.<|im_end|>"]


@torch.no_grad()
def test_hidden_states_are_those_of_transformers(folder, llm):
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    for question in PROMPTS:
        ids = prompt_ids(folder, question)
        states = llm(llm.model.get_input_embeddings()(ids), torch.ones_like(ids))
        expected = theirs(input_ids=ids).last_hidden_state
        difference = (states - expected).abs().max().item()
        print(f"{ids.shape[1]} tokens, largest state {expected.abs().max():.1f}: {difference:.2g}")
        assert difference <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_greedy_answers_are_those_of_transformers(folder, llm):
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = read_tokenizer(folder)
    for question in PROMPTS:
        ids = prompt_ids(folder, question)
        mask = torch.ones_like(ids)
        ours, *_ = llm.generate(llm.model.get_input_embeddings()(ids), mask, 24)
        options = dict(max_new_tokens=24, do_sample=False, eos_token_id=sorted(llm.stop_ids))
        new = theirs.generate(ids, attention_mask=mask, pad_token_id=0, **options)[
            0, ids.shape[1] :
        ]
        assert ours[0].tolist() == [token for token in new.tolist() if token not in llm.stop_ids]
        answer = tokenizer.decode(ours[0])
        print(f"{question} {answer}")
        if REAL and question == PROMPTS[0] and folder == Path(REAL):
            assert answer == "The capital of France is Paris."
