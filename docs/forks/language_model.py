"""Another language model: any causal one of transformers, by the name of its folder.

    python docs/forks/language_model.py

    python xsam/train.py --stage 3 --llm OLMo-2-0425-1B-Instruct ...

The architecture is read from the folder's config.json, the chat template and the words from its
tokenizer. What has to be said is that the model_type of config.json is one of a language model, and
what the names of its tensors begin with beside those of transformers' class: nothing.

lines touched: 1
"""

import tempfile
from pathlib import Path

import torch
from own_loop import report, train
from transformers import AutoModelForCausalLM, Olmo2Config

from xsam.toy.preset import toy
from xsam.toy.weights import build_tokenizer
from xsam.train import pretrained_model
from xsam.weights import FOLDERS

# fork: begin
FOLDERS["llm"]["olmo2"] = ""
# fork: end


def write_folder(folder: Path) -> None:
    """Stands in for a public folder: random weights, the toy's words and chat template."""
    sizes = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(
        initializer_range=0.1, vocab_size=768, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    AutoModelForCausalLM.from_config(Olmo2Config(**sizes, **ids)).save_pretrained(folder)
    build_tokenizer(vocab_size=768).save_pretrained(folder)


if __name__ == "__main__":
    torch.manual_seed(0)
    config = toy().resolve(llm="olmo2-tiny", image_encoder="none")
    with tempfile.TemporaryDirectory() as weights:
        write_folder(Path(weights, config.model.llm))
        model = pretrained_model(3, config, Path(weights))
    report(model, train(model, model.config, num_steps=60))
