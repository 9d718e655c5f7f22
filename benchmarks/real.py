"""What docs/real-photos.md needs beside the data: stand-ins of public folders, and a root on which
the training photographs are scored.

    python benchmarks/real.py weights --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out weights
    python benchmarks/real.py weights --flags benchmarks/overfit.flags \
        --tokenizer weights/SmolLM2-135M-Instruct --out weights/overfit
    python benchmarks/real.py root --data real --out runs/seen

`weights` writes the folders that `--config small`, or it with the flags of a file, reads where
nothing can be downloaded: SAM and SigLIP2 with random weights, and SmolLM2 from a GGUF file (needs
gguf and accelerate), or with --tokenizer a random language model with the words of that folder.
`root` links a data root whose validation sets are the training sets.
"""

import argparse
import json
import pickle
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, SamVisionModel

from xsam.cli import parse
from xsam.config import ModelConfig
from xsam.datasets.formats import read_refs
from xsam.datasets.sources import PROMPT_TYPES, SOURCES, locate
from xsam.encoders import transformers_config
from xsam.toy.weights import _random_encoder, sam_config


def write_weights(model: ModelConfig, out: Path, gguf: Path | None, words: Path | None) -> None:
    torch.manual_seed(0)
    sam = SamVisionModel(sam_config(model))
    sam.vision_encoder.load_state_dict(_random_encoder(model).state_dict())
    sam.save_pretrained(out / model.seg_encoder)
    if model.image_encoder != "none":
        encoder = AutoModel.from_config(transformers_config(model.image_encoder_config))
        encoder.save_pretrained(out / model.image_encoder)
    if gguf is None:
        llm = AutoModelForCausalLM.from_config(transformers_config(model.llm_config))
        tokenizer = AutoTokenizer.from_pretrained(words)
    else:
        source = dict(gguf_file=gguf.name)
        llm = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        del llm.config.quantization_config  # its matrices are plain numbers now
        llm.hf_quantizer, llm.is_quantized = None, False
        llm.config.rms_norm_eps = model.llm_config["rms_norm_eps"]  # a float32 in the file
        llm.to(torch.bfloat16)
    llm.save_pretrained(out / model.llm)
    tokenizer.save_pretrained(out / model.llm)


PAIRS = {  # a training set, and the sets that score its task
    **{f"coco_{kind}": (f"coco_{kind}_val",) for kind in ("panoptic", "instance", "semantic")},
    **{name: (f"{name}_val",) for name in ("refcoco", "grefcoco", "reasonseg")},
    **{
        name: tuple(f"{name}_val_{prompt}" for prompt in PROMPT_TYPES)
        for name in ("coco_interactive", "coco_vgd")
    },
}


def write_root(data: Path, out: Path) -> None:
    for name, scored in PAIRS.items():
        source, target = SOURCES[name], SOURCES[scored[0]]
        for field in ("annotations", "images", "masks", "instances"):
            path = out / getattr(target, field)
            if not getattr(target, field) or path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            found = locate(data, getattr(source, field)).absolute()
            if field == "annotations" and source.format == "refs":
                refs = [r | {"split": "val"} for r in read_refs(found) if r["split"] == "train"]
                is_json = path.suffix == ".json"
                path.write_bytes(json.dumps(refs).encode() if is_json else pickle.dumps(refs))
            else:
                path.symlink_to(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("weights", "root"), help="what to write")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--data", type=Path, help="root: the data root to link")
    parser.add_argument("--gguf", type=Path, help="weights: GGUF file of SmolLM2")
    text = "weights: folder of the words of a random language model, in place of --gguf"
    parser.add_argument("--tokenizer", type=Path, help=text)
    parser.add_argument("--flags", type=Path, help="weights: file of flags for --config small")
    options = parser.parse_args()
    if options.what == "root":
        write_root(options.data, options.out)
    else:
        flags = options.flags.read_text().split() if options.flags else []
        config = parse(["--config", "small", "--stage", "1", *flags])[1]
        write_weights(config.model, options.out, options.gguf, options.tokenizer)


if __name__ == "__main__":
    main()
