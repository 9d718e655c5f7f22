"""Folders of small tokenizers, laid out as those of the language models that the README names."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from xsam.toy import weights as toy

TEXT = [
    "The ring is red. Is there a star? Yes, no. Segment the red circle, please.",
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: What color is it?\nASSISTANT: It's blue , not green.",
] * 3


def _write(folder: Path, model_type: str, template: str | None, **settings) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


def _special(content: str) -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **flags}


def write_phi3(folder: Path) -> None:
    """Pieces of SentencePiece in tokenizer.json, markers that take the space after them, and a
    template whose end of the whole is another token than that of an answer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    start = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(TEXT, BpeTrainer(vocab_size=400, special_tokens=start))
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    markers = ["<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    tokenizer.add_special_tokens(
        [AddedToken(marker, rstrip=True, normalized=False) for marker in markers]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    names = dict(bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    names |= dict(unk_token="<unk>", add_bos_token=False, tokenizer_class="LlamaTokenizer")
    _write(folder, "phi3", template, **names, legacy=False)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Of the toy's words alone: every other is its unknown token."""
    words = [*toy.CHAT_TOKENS, "<unk>", *toy.vocabulary()]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    names |= dict(additional_special_tokens=list(toy.CHAT_TOKENS[3:]))
    names |= dict(chat_template=toy.CHAT_TEMPLATE)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


QWEN3_MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"]


def write_qwen3(folder: Path, thinks: bool = True) -> None:
    """Pieces of bytes and no start token. The first models think: the template takes thoughts out
    of earlier answers and writes one before the last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(each, normalized=False) for each in QWEN3_MARKERS])
    tokenizer.add_tokens([AddedToken(each, normalized=False) for each in ("<think>", "</think>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    before = "{{ '<|im_start|>' + message['role'] + '\n' }}"
    content = "{{ message['content'] }}"
    prompt = "{{ '<|im_start|>assistant\n' }}"
    if thinks:
        content = (
            "{% if message['role'] == 'user' %}{{ message['content'] }}{% else %}"
            "{% set parts = message['content'].split('</think>') %}"
            "{% if loop.last %}{{ '<think>\n' }}{% if parts | length > 1 %}"
            "{{ parts[0].split('<think>')[-1].strip('\n') }}{% endif %}{{ '\n</think>\n\n' }}"
            "{% endif %}{{ parts[-1].lstrip('\n') }}{% endif %}"
        )
        prompt += (
            "{% if enable_thinking is defined and enable_thinking is false %}"
            "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        )
    template = (
        "{% for message in messages %}" + before + content + "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )
    names = dict(bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    names |= dict(additional_special_tokens=QWEN3_MARKERS[1:], tokenizer_class="Qwen2Tokenizer")
    _write(folder, "qwen3", template, **names, add_prefix_space=False)


def write_vicuna(folder: Path) -> None:
    """tokenizer.model alone, without a template or a padding token."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the extra xsam[sentencepiece]")
    pytest.importorskip("google.protobuf", reason="the extra xsam[sentencepiece]")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    texts = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    names = {f"{name}_token": _special(text) for name, text in texts.items()}
    names |= dict(add_bos_token=True, add_eos_token=False, pad_token=None, legacy=False)
    _write(folder, "llama", None, **names, tokenizer_class="LlamaTokenizer")


# The folder of each family, by the name that the README has.
FAMILIES = {
    "Phi-3-mini-4k-instruct": write_phi3,
    "Qwen3-1.7B": write_qwen3,
    "Qwen3-4B-Instruct-2507": lambda folder: write_qwen3(folder, thinks=False),
    "vicuna-7b-v1.5": write_vicuna,
}
