"""The language model: special tokens, chat rendering, splicing visual tokens in, finding what the
tokens ask of the decoder, generation.

Middle box of the diagram (paper figure 3). Any causal model of transformers; the chat template and
the vocabulary come from its tokenizer.
Legend: B samples, N positions, T new tokens, C width, V visual tokens of a sample, G vectors of
regions, R decoder runs, K classes of a run.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerBase

from xsam.config import SPECIAL_TOKENS
from xsam.encoders import transformers_config

# Placeholders among the token ids, where visual tokens and region vectors are spliced in.
IMAGE_TOKEN, REGION_TOKEN = -200, -300

IGNORE_LABEL = -100  # of a position without loss; what `F.cross_entropy` ignores


# ---- tokenizer side ------------------------------------------------------------------------------


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Adds <SEG>, <p> and </p> to a tokenizer without them, and takes the end of the text as
    padding, which is always masked, where it has none. Returns the rows of embeddings that it
    needs: one more than its largest id, as ids may have gaps."""
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return max(tokenizer.get_vocab().values()) + 1


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """The ids of <SEG>, <p> and </p>."""
    return tuple(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str | None]]
) -> list[tuple[str, bool]]:
    """Turns of (question, answer) in the tokenizer's chat template, cut into pieces (text,
    is_answer); joined, these are the conversation.

    An answer's piece ends with its end-of-turn marker, which the model has to learn. A last answer
    of None leaves the conversation open for generation. Raises ValueError where the template
    changes a question or an answer by more than the white space around it, or where what it writes
    before an answer is not what it writes to ask for one.
    """
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    is_open = turns[-1][1] is None

    def apply(count: int, is_open: bool, **options) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=is_open, **options
        )

    # Without thinking, Qwen3's template opens an answer that it asks for with an empty thought, and
    # keeps that in the last answer alone. Other templates ignore the option.
    no_thought = {"enable_thinking": False}
    whole = apply(len(messages), is_open, **no_thought)
    marker = end_of_turn(tokenizer)
    pieces, position = [], 0
    for index, (question, answer) in enumerate(turns):
        start = len(whole)
        if answer is not None:
            prompt = apply(2 * index + 1, True, **no_thought)
            prompt = prompt if whole.startswith(prompt) else apply(2 * index + 1, True)
            start = len(prompt) if whole.startswith(prompt) else position
        if question.strip() not in whole[position:start]:
            raise ValueError(
                f"the chat template changes the question {question[:80]!r} or drops it, or opens "
                f"its answer otherwise than it asks for one: it writes {whole[position:][:200]!r}"
            )
        pieces.append((whole[position:start], False))
        if answer is not None:
            position = _answer_end(whole, start, answer)
            is_marked = whole.startswith(marker, position)
            pieces.append((whole[start:position] + marker, True))
            position += len(marker) if is_marked else 0
    return pieces


def _answer_end(whole: str, start: int, answer: str) -> int:
    """The position in `whole` where the answer ends that begins at `start`, white space aside. A
    template may strip the white space around it."""
    for text in (answer, answer.strip()):
        begin = whole.find(text, start)
        if begin >= 0 and not whole[start:begin].strip():
            return begin + len(text)
    raise ValueError(
        f"the chat template changes the answer {answer[:80]!r}: it writes {whole[start:][:200]!r}; "
        "write the answer as the template does, without <think> and the like, or mend the template"
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that closes an answer in the tokenizer's chat template, up to and with its first
    special or added token; the end-of-text token where the template has none."""
    question = {"role": "user", "content": "question"}
    answer = {"role": "assistant", "content": "answer"}
    rendered = tokenizer.apply_chat_template([question, answer], tokenize=False)
    tail = rendered[rendered.rindex("answer") + len("answer") :]
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    ends = [tail.find(token) + len(token) for token in tokens if token in tail]
    return tail[: min(ends)] if ends else tokenizer.eos_token


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    pieces: list[tuple[str, bool]],
    num_visual_tokens: int,
    num_region_vectors: int = 1,
) -> tuple[list[int], list[int]]:
    """Rendered pieces to token ids and labels, [N] both: <image> and <region> become as many
    placeholders as there are vectors for them, and only answers have labels."""
    ids: list[int] = []
    labels: list[int] = []
    for text, is_answer in pieces:
        for part in re.split(r"(<image>|<region>)", text):
            if part == "<image>":
                new = [IMAGE_TOKEN] * num_visual_tokens
            elif part == "<region>":
                new = [REGION_TOKEN] * num_region_vectors
            else:
                new = tokenizer.encode(part, add_special_tokens=False) if part else []
            ids += new
            labels += new if is_answer else [IGNORE_LABEL] * len(new)
    return ids, labels


def unknown_words(tokenizer: PreTrainedTokenizerBase | None, *texts: str) -> list[str]:
    """The words of `texts` that become the tokenizer's unknown token, so that the model cannot tell
    them apart, once each, in reading order. Marks such as <p> are no words. Empty without a
    tokenizer, or where it has no such token."""
    unknown = getattr(tokenizer, "unk_token_id", None)

    def is_lost(text: str) -> bool:
        return unknown in tokenizer.encode(text, add_special_tokens=False)

    text = re.sub(r"</?\w+>", " ", " ".join(texts))
    if unknown is None or not is_lost(text):
        return []
    lost = filter(is_lost, dict.fromkeys(text.split()))
    parts = [[x for x in re.findall(r"\w+", word) if is_lost(x)] or [word] for word in lost]
    return list(dict.fromkeys(part for of_word in parts for part in of_word))


# ---- decoder runs --------------------------------------------------------------------------------


@dataclass
class Runs:
    """The decoder runs that the tokens of a batch ask for, and the phrases that are their classes.
    Phrases are numbered over the whole batch, in reading order."""

    image_index: Tensor  # int64 [R], row of the image that a run segments
    seg_position: Tensor  # int64 [R], position of its <SEG> in that row
    phrase_index: Tensor  # int64 [R], the phrase that it answers; -1: all of its image
    classes: Tensor  # int64 [R, K], the phrases that are its classes; -1: padding
    phrase_number: Tensor  # int64 [B, N], the phrase that a token lies in; -1: none
    num_phrases: int  # of the whole batch


def find_runs(
    input_ids: Tensor,
    special_ids: tuple[int, int, int],
    is_per_phrase: bool = False,
    shares_classes: bool = False,
) -> Runs:
    """Finds the runs in input_ids [B, N]; `special_ids` are those of <SEG>, <p> and </p>.

    Most tasks have one run for an image, at its first <SEG>, and all phrases of the image are its
    classes. Two classes of one token each:

        position  0    1    2     3    4    5     6     7      8
        token     <p>  cat  </p>  <p>  sky  </p>  Sure  <SEG>  .
        phrase    0    0    0     1    1    1     -1    -1     -1

    This is one run: seg_position [7], classes [[0, 1]]. Referring and reasoning (`is_per_phrase`)
    have a run for each <SEG> that answers a phrase, the last one before it:

        position  0    1    2     3      4    5    6     7
        token     <p>  cat  </p>  <SEG>  <p>  sky  </p>  <SEG>

    These are two: seg_position [3, 7], phrase_index [0, 1], classes [[0], [1]]. In training they
    share their classes, [[0, 1], [0, 1]], so that the other phrases of the batch are negatives. At
    inference no answer may depend on the batch.
    """
    seg, phrase_start, phrase_end = special_ids
    phrase_number = torch.full(input_ids.shape, -1)
    runs: list[tuple[int, int, int]] = []  # (image, position of <SEG>, phrase)
    image_phrases: list[list[int]] = []
    num_phrases = 0
    for image, row in enumerate(input_ids.tolist()):
        start, is_answered = None, is_per_phrase  # there is no phrase to answer yet
        image_phrases.append([])
        for position, token in enumerate(row):
            if token == phrase_start:
                start = position
            elif token == phrase_end and start is not None:
                phrase_number[image, start : position + 1] = num_phrases
                image_phrases[image].append(num_phrases)
                num_phrases, start = num_phrases + 1, None
                if is_per_phrase:
                    is_answered = False
            elif token == seg and not is_answered:
                runs.append((image, position, num_phrases - 1 if is_per_phrase else -1))
                is_answered = True
    if is_per_phrase:
        every = list(range(num_phrases))
        classes = [every if shares_classes else [phrase] for *_, phrase in runs]
    else:
        classes = [image_phrases[image] for image, *_ in runs]
    width = max(map(len, classes), default=0)  # K
    classes = [row + [-1] * (width - len(row)) for row in classes]
    device = input_ids.device
    columns = torch.tensor(runs, device=device).view(-1, 3).unbind(1)  # three of [R]
    table = torch.tensor(classes, dtype=torch.long, device=device).view(len(runs), width)
    return Runs(*columns, table, phrase_number.to(device), num_phrases)


def without_marks(ids: Tensor, special_ids: tuple[int, int, int]) -> Tensor:
    """Ids of any shape with IGNORE_LABEL in place of <p> and </p>. `find_runs` is given an answer
    so where the classes are the question's phrases: what the answer repeats is no class."""
    marks = torch.tensor(special_ids[1:]).to(ids)
    return ids.masked_fill(torch.isin(ids, marks), IGNORE_LABEL)


# ---- model side ----------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """A causal language model of transformers, by its config.json, that reads embeddings and
    returns its last hidden states. `special_ids` and `stop_ids` come from the tokenizer."""

    special_ids: tuple[int, int, int]  # of <SEG>, <p> and </p>
    stop_ids: set[int]  # tokens that end an answer

    def __init__(self, config: dict):
        super().__init__()
        self.model = AutoModelForCausalLM.from_config(transformers_config(config))

    @property
    def dim(self) -> int:
        return self.model.config.hidden_size

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Takes the ids of special tokens from the tokenizer, which gains ours, and grows the input
        and output embeddings where its vocabulary is larger; a new row starts as the mean of the
        old ones. Returns the number of rows."""
        size = add_special_tokens(tokenizer)
        self.special_ids = special_ids(tokenizer)
        old_size = self.model.get_input_embeddings().num_embeddings
        if size > old_size:
            self.model.resize_token_embeddings(size, mean_resizing=False)
            with torch.no_grad():
                tables = self.model.get_input_embeddings(), self.model.get_output_embeddings()
                for table in tables:
                    table.weight[old_size:] = table.weight[:old_size].mean(dim=0)
        marker = tokenizer.encode(end_of_turn(tokenizer), add_special_tokens=False)
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        self.stop_ids = {tokenizer.eos_token_id} | (special & set(marker))
        return self.model.get_input_embeddings().num_embeddings

    def embed(self, input_ids: Tensor, visual_tokens: Tensor, regions: Tensor) -> Tensor:
        """Embeddings [B, N, C] of input_ids [B, N], with visual tokens [B, V, C] and region vectors
        [G, C] at the positions of IMAGE_TOKEN and REGION_TOKEN, in reading order. Rows of
        `visual_tokens` are those of the samples that have an image."""
        x = self.model.get_input_embeddings()(input_ids.clamp(min=0))  # [B, N, C]
        for token, vectors in ((IMAGE_TOKEN, visual_tokens), (REGION_TOKEN, regions)):
            x = x.masked_scatter((input_ids == token)[..., None], vectors.to(x.dtype))
        return x

    def forward(self, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings [B, N, C] and an attention mask [B, N], 0 at padding, to the hidden states
        [B, N, C] after the final norm."""
        decoder = self.model.get_decoder()
        output = decoder(inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False)
        return output.last_hidden_state

    def token_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the labelled tokens, summed (paper equation 2): states [B, N, C] predict
        labels [B, N] of the next position. Logits are made for these tokens alone."""
        is_labelled = labels[:, 1:] != IGNORE_LABEL
        logits = self.model.get_output_embeddings()(
            states[:, :-1][is_labelled]
        )  # [labelled, words]
        return F.cross_entropy(logits.float(), labels[:, 1:][is_labelled], reduction="sum")

    @torch.no_grad()
    def generate(
        self,
        embeddings: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        on_ids: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy answers to left-padded prompts [B, N, C] with their attention mask [B, N].
        `on_ids` is called with the new ids so far at every step; what it raises ends the
        generation.

        Returns new ids [B, T] (IGNORE_LABEL after a row's end), and the hidden states of the
        prompt [B, N, C] and of the new tokens [B, T, C].
        """
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        B, device = len(embeddings), embeddings.device
        stop_ids = torch.tensor(sorted(self.stop_ids), device=device)
        is_done = torch.zeros(B, dtype=torch.bool, device=device)
        new_ids = torch.zeros(B, 0, dtype=torch.long, device=device)
        inputs, states = embeddings, []
        cache = DynamicCache(config=self.model.config)
        while True:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
            # By position: releases of transformers differ in the name of the cache.
            output = decoder(None, attention_mask, positions, cache, inputs, use_cache=True)
            states.append(output.last_hidden_state)  # [B, N, C] of the prompt, then [B, 1, C]
            if new_ids.shape[1] == max_new_tokens:
                break
            ids = head(states[-1][:, -1]).argmax(-1)  # [B]
            is_done |= torch.isin(ids, stop_ids)
            if is_done.all():
                break
            new_ids = torch.cat([new_ids, ids.masked_fill(is_done, IGNORE_LABEL)[:, None]], 1)
            if on_ids is not None:
                on_ids(new_ids)
            inputs = self.model.get_input_embeddings()(ids)[:, None]  # [B, 1, C]
            attention_mask = torch.cat([attention_mask, (~is_done)[:, None].to(attention_mask)], 1)
        prompt_states, *new_states = states
        return new_ids, prompt_states, torch.cat([prompt_states[:, :0], *new_states], 1)
