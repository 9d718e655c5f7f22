"""Chat rendering for several templates, and the model side against plain references.

pytest tests/test_llm.py
"""

import pytest
import torch
import torch.nn.functional as F
from families import word_tokenizer

from xsam.config import SPECIAL_TOKENS
from xsam.llm import (
    IGNORE_LABEL,
    IMAGE_TOKEN,
    REGION_TOKEN,
    LanguageModel,
    add_special_tokens,
    end_of_turn,
    find_runs,
    render_conversation,
    tokenize,
    unknown_words,
)
from xsam.toy import weights as toy

# ---- tokenizer side ------------------------------------------------------------------------------

# Layouts of other families, on the toy words: (template, added tokens, what closes an answer).
TEMPLATES = {
    "toy": (None, [], "<|end|>"),
    "ChatML": (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
    ),
    "Vicuna": (
        "{{ bos_token + 'A chat.' }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ ' USER: ' + m['content'] }}"
        "{% else %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
        [],
        "</s>",
    ),
    # As Qwen3: an empty thought before the last answer, none before earlier ones.
    "Qwen3": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
    ),
    # A character before the marker, as the space of Llama 2, but one that is a toy word.
    "newline before the end": (
        "{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + '\n' + eos_token }}{% endif %}{% endfor %}",
        [],
        "\n</s>",
    ),
}
CONVERSATIONS = [
    [("What color is the ring?", "The ring is red.")],
    # Answers that also stand in a question, in the template or in another answer.
    [("Is there a star?", "star"), ("Is it red? Yes or no?", "Yes"), ("red", "red")],
    [("Segment <p>the red circle</p>.", "Sure, <SEG>."), ("And <p>it</p>?", "Sure, <SEG>.")],
]


@pytest.fixture(params=TEMPLATES)
def chat(request, tokenizer):
    """(tokenizer with a template, what closes an answer in it)."""
    template, tokens, marker = TEMPLATES[request.param]
    if template is not None:
        tokenizer.chat_template = template
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    return tokenizer, marker


def whole_text(tokenizer, conversation, is_open: bool = False) -> str:
    messages = []
    for question, answer in conversation:
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=is_open, enable_thinking=False
    )


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_pieces_are_the_templates_text_and_answers_end_with_the_marker(chat, conversation):
    tokenizer, marker = chat
    assert end_of_turn(tokenizer) == marker
    pieces = render_conversation(tokenizer, conversation)
    whole = whole_text(tokenizer, conversation)
    joined = "".join(text for text, _ in pieces)
    assert whole.startswith(joined) and not whole[len(joined) :].strip()
    spoken = [text.lstrip() for text, is_answer in pieces if is_answer]
    assert spoken == [answer + marker for _, answer in conversation]
    asked = [text for text, is_answer in pieces if not is_answer]
    for text, (question, _) in zip(asked, conversation, strict=True):
        assert question in text


def test_an_open_conversation_ends_where_the_answer_begins(chat):
    tokenizer, _ = chat
    conversation = [("Is there a star?", "Yes."), ("What color is it?", None)]
    pieces = render_conversation(tokenizer, conversation)
    assert "".join(text for text, _ in pieces) == whole_text(tokenizer, conversation, is_open=True)
    assert [is_answer for _, is_answer in pieces] == [False, True, False]
    closed = render_conversation(tokenizer, [conversation[0], ("What color is it?", "Red.")])
    assert closed[:2] == pieces[:2]
    before = "".join(text for text, _ in pieces)
    assert "".join(text for text, _ in closed).startswith(before)


def test_only_the_marker_stops_an_answer(chat, config):
    """The first token of a marker may be one that stands in the middle of an answer too."""
    tokenizer, marker = chat
    llm = LanguageModel(config.model.llm_config)
    llm.set_tokenizer(tokenizer)
    stops = tokenizer.convert_ids_to_tokens(sorted(llm.stop_ids))
    assert set(stops) == {"</s>", marker.strip()}


def test_tokens_and_labels_of_pieces(tokenizer):
    pieces = [("<image>\nthe<region> ring", False), ("The ring is red.<|end|>", True)]
    ids, labels = tokenize(tokenizer, pieces, num_visual_tokens=3)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    asked = [IMAGE_TOKEN] * 3 + encode("\nthe") + [REGION_TOKEN] + encode("ring")
    answered = encode("The ring is red.<|end|>")
    assert ids == asked + answered
    assert labels == [IGNORE_LABEL] * len(asked) + answered


def test_words_that_the_tokenizer_lacks_are_named():
    tokenizer = word_tokenizer()
    add_special_tokens(tokenizer)
    question, answer = "Segment <p>the helmet</p>, a cup-helmet <region>.", "Sure, <SEG>. Cup!"
    assert unknown_words(tokenizer, question, answer) == ["helmet", "cup", "Cup"]
    assert unknown_words(tokenizer, "Segment <p>the red ring</p>.", "Sure, <SEG>.") == []
    assert unknown_words(tokenizer, "a ring \u2603") == ["\u2603"]
    assert unknown_words(toy.build_tokenizer(768), question) == []  # it has a token for each byte
    assert unknown_words(None, question) == unknown_words(tokenizer) == []


def test_special_tokens_are_added_once_and_are_one_token_each(tokenizer):
    size = len(tokenizer)
    add_special_tokens(tokenizer)
    assert len(tokenizer) == size
    for token in SPECIAL_TOKENS:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1


# ---- embeddings ----------------------------------------------------------------------------------


def test_a_table_outgrown_by_the_vocabulary_gets_mean_rows(config, tokenizer):
    values = config.model.llm_config | {"vocab_size": len(tokenizer) - 5}
    llm = LanguageModel(values)
    old = [llm.model.get_input_embeddings().weight, llm.model.get_output_embeddings().weight]
    old = [weight.detach().clone() for weight in old]
    llm.set_tokenizer(tokenizer)
    llm.set_tokenizer(tokenizer)  # a second time changes nothing
    new = [llm.model.get_input_embeddings().weight, llm.model.get_output_embeddings().weight]
    for before, after in zip(old, new, strict=True):
        assert len(after) == len(tokenizer)
        assert torch.equal(after[: len(before)], before)
        assert torch.allclose(after[len(before) :], before.mean(0).expand(5, -1), atol=1e-6)


def test_a_table_with_spare_rows_stays(model, config):
    assert (
        model.llm.model.get_input_embeddings().num_embeddings
        == (config.model.llm_config["vocab_size"])
    )


def test_visual_tokens_and_regions_are_spliced_in_reading_order(model):
    llm = model.llm
    visual = torch.arange(2 * 3 * llm.dim, dtype=torch.float).view(2, 3, -1)
    regions = -torch.arange(1, 1 + 3 * llm.dim, dtype=torch.float).view(3, -1)
    V, R = IMAGE_TOKEN, REGION_TOKEN
    ids = torch.tensor([[7, V, V, V, R, 8, R], [V, V, V, 9, 10, R, 0]])
    x = llm.embed(ids, visual, regions)
    assert torch.equal(x[0, 1:4], visual[0]) and torch.equal(x[1, :3], visual[1])
    assert torch.equal(x[[0, 0, 1], [4, 6, 5]], regions)
    words = llm.model.get_input_embeddings()(torch.tensor([7, 8, 9, 10, 0]))
    assert torch.equal(x[[0, 0, 1, 1, 1], [0, 5, 3, 4, 6]], words)


# ---- losses and phrases --------------------------------------------------------------------------


def test_token_loss_is_the_cross_entropy_of_all_logits(model):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 12, model.llm.dim, generator=generator)
    labels = torch.randint(0, 137, (3, 12), generator=generator)
    labels[torch.rand(3, 12, generator=generator) < 0.6] = IGNORE_LABEL
    labels[:, 0] = 5  # nothing comes before the first position: it cannot be learned
    logits = model.llm.model.get_output_embeddings()(states)[:, :-1]
    expected = F.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_LABEL, reduction="sum"
    )
    assert torch.allclose(model.llm.token_loss(states, labels), expected, rtol=1e-5)


def test_token_loss_without_labels_is_zero_with_a_gradient(model):
    states = torch.randn(2, 5, model.llm.dim, requires_grad=True)
    loss = model.llm.token_loss(states, torch.full((2, 5), IGNORE_LABEL))
    loss.backward()
    assert loss == 0 and not states.grad.any()


def test_phrases_are_numbered_over_the_batch(model):
    (_, P, E), x = model.llm.special_ids, 20
    rows = [
        [x, P, x, x, E, x, P, x, E, P, E],
        [x, x, x, x, x, x, x, x, x, x, x],
        [P, x, E, P, x, x, E, x, x, x, x],
    ]
    expected, current, number = [], -1, -1
    for row in rows:
        for token in row:
            if token == P:
                number += 1
                current = number
            expected.append(current)
            current = -1 if token == E else current
    runs = find_runs(torch.tensor(rows), model.llm.special_ids)
    assert runs.phrase_number.flatten().tolist() == expected
    assert runs.num_phrases == 5 and len(runs.image_index) == 0


def test_runs_of_the_examples_in_the_docstring():
    seg, start, end, cat, sky, word = 1, 2, 3, 10, 11, 12
    ids = (seg, start, end)
    row = [start, cat, end, start, sky, end, word, seg, word, seg]
    runs = find_runs(torch.tensor([row]), ids)
    assert runs.image_index.tolist() == [0] and runs.seg_position.tolist() == [7]
    assert runs.phrase_index.tolist() == [-1] and runs.classes.tolist() == [[0, 1]]
    row = [start, cat, end, seg, start, sky, end, seg]
    runs = find_runs(torch.tensor([row, row]), ids, is_per_phrase=True)
    assert runs.image_index.tolist() == [0, 0, 1, 1] and runs.seg_position.tolist() == [3, 7] * 2
    assert runs.phrase_index.tolist() == [0, 1, 2, 3]
    assert runs.classes.tolist() == [[0], [1], [2], [3]]
    runs = find_runs(torch.tensor([row, row]), ids, is_per_phrase=True, shares_classes=True)
    assert runs.classes.tolist() == [[0, 1, 2, 3]] * 4


def test_runs_of_odd_texts():
    """A phrase that is not closed is none, a <SEG> before any phrase or after an answered one
    answers none, and shorter prompts are padded."""
    seg, start, end, x = 1, 2, 3, 10
    rows = [
        [seg, start, x, start, x, end, seg, seg],
        [x, x, end, x, x, start, x, x],
    ]
    runs = find_runs(torch.tensor(rows), (seg, start, end), is_per_phrase=True)
    assert runs.seg_position.tolist() == [6] and runs.classes.tolist() == [[0]]
    assert runs.phrase_number.tolist() == [[-1, -1, -1, 0, 0, 0, -1, -1], [-1] * 8]
    rows = [[start, x, end, start, x, end, seg], [start, x, end, seg, x, x, x]]
    runs = find_runs(torch.tensor(rows), (seg, start, end))
    assert runs.classes.tolist() == [[0, 1], [2, -1]]


# ---- generation ----------------------------------------------------------------------------------

LENGTHS = (9, 4, 6)


@pytest.fixture
def prompts(model) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, model.llm.dim, generator=generator) for length in LENGTHS]


def padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded with noise, which nothing may read."""
    width = max(len(prompt) for prompt in prompts)
    embeddings = torch.randn(len(prompts), width, prompts[0].shape[1])
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        embeddings[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return embeddings, mask


def greedy(llm: LanguageModel, prompt: torch.Tensor, count: int) -> tuple[list, torch.Tensor]:
    """Without cache and without padding: the ids, and the states of prompt and ids."""
    ids, table = [], llm.model.get_input_embeddings()
    while True:
        x = torch.cat([prompt, table(torch.tensor(ids, dtype=torch.long))])[None]
        states = llm(x, torch.ones(x.shape[:2], dtype=torch.long))
        logits = llm.model.get_output_embeddings()(states[0, -1])
        if len(ids) == count or int(logits.argmax()) in llm.stop_ids:
            return ids, states[0]
        ids.append(int(logits.argmax()))


@pytest.fixture
def stopping_llm(model, prompts, monkeypatch) -> LanguageModel:
    """Its answers to `prompts` end at different times, some at once and some not at all."""
    monkeypatch.setattr(model.llm, "stop_ids", {-1})
    with torch.no_grad():
        endless = [greedy(model.llm, prompt, 8)[0] for prompt in prompts]
    stops = {next(token for token in endless[0] if token != endless[0][0]), endless[1][0]}
    monkeypatch.setattr(model.llm, "stop_ids", stops)
    return model.llm


@torch.no_grad()
def test_generation_in_a_batch_is_generation_alone_and_is_the_plain_loop(stopping_llm, prompts):
    llm, count = stopping_llm, 8
    ids, prompt_states, new_states = llm.generate(*padded(prompts), count)
    assert ids.shape == new_states.shape[:2]
    expected = [greedy(llm, prompt, count) for prompt in prompts]
    assert len({len(answer) for answer, _ in expected}) > 1
    for row, (prompt, (answer, states)) in enumerate(zip(prompts, expected, strict=True)):
        alone, alone_prompt, alone_new = llm.generate(
            prompt[None], torch.ones(1, len(prompt), dtype=torch.long), count
        )
        assert alone[0].tolist() == answer
        assert ids[row, : len(answer)].tolist() == answer
        assert (ids[row, len(answer) :] == IGNORE_LABEL).all()
        for ours in (
            torch.cat([prompt_states[row, -len(prompt) :], new_states[row, : len(answer)]]),
            torch.cat([alone_prompt[0], alone_new[0]]),
        ):
            assert torch.allclose(ours, states, atol=1e-4)


@torch.no_grad()
def test_generation_looks_no_farther_back_than_the_window(config, tokenizer, prompts):
    """As Phi-3 does beyond 2,047 tokens: with cache and padding the same states as without."""
    torch.manual_seed(0)
    llm = LanguageModel(config.model.llm_config | {"sliding_window": 5}).eval()
    llm.set_tokenizer(tokenizer)
    llm.stop_ids = {-1}
    _, prompt_states, new_states = llm.generate(*padded(prompts), 6)
    for row, prompt in enumerate(prompts):
        _, states = greedy(llm, prompt, 6)
        ours = torch.cat([prompt_states[row, -len(prompt) :], new_states[row]])
        torch.testing.assert_close(ours, states, atol=1e-4, rtol=0)
    llm.model.config.sliding_window = None
    assert not torch.allclose(greedy(llm, prompts[0], 0)[1], prompt_states[0], atol=1e-3)


@torch.no_grad()
def test_generation_that_stops_at_once_or_may_say_nothing(model, prompts, monkeypatch):
    embeddings, mask = padded(prompts)
    ids, states, new_states = model.llm.generate(embeddings, mask, 0)
    assert ids.shape == (3, 0) and ids.dtype == torch.long
    assert states.shape == embeddings.shape and new_states.shape == (3, 0, model.llm.dim)
    monkeypatch.setattr(model.llm, "stop_ids", set(range(512)))
    assert model.llm.generate(embeddings, mask, 5)[0].shape == (3, 0)
