"""What only the full size can show: numbers and peak memory of SAM ViT-L at 1024², and of loading
the whole model. Minutes, and up to 10 GB of disk and of memory.

pytest -m slow -s tests/test_full_size.py
"""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from xsam.config import xsam
from xsam.model import XSAM
from xsam.weights import MODEL_FILE, disk_name, own_tensors, parameters_on_meta

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

COMMON = """
import re, sys, time
from pathlib import Path
import torch
from xsam.config import xsam
from xsam.inference import load_checkpoint
from xsam.model import XSAM, Segmentor
from xsam.toy.preset import toy
from xsam.weights import load_folder, parameters_on_meta

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder = Path(sys.argv[1])
"""

THEIRS = """
from transformers import SamVisionConfig, SamVisionModel

torch.manual_seed(0)
config = SamVisionConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                         global_attn_indexes=[5, 11, 17, 23], mlp_dim=4096)
model = SamVisionModel(config).eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # new ones are of size 1e-10 or zero, which would hide a mistake
            parameter.normal_(std=0.2 if "pos" in name else 0.03)
model.save_pretrained(folder / "sam")
run = lambda pixels: model(pixels, output_hidden_states=True)
read = lambda output: [*output.hidden_states, output.last_hidden_state]
"""

OURS = """
with parameters_on_meta():
    model = Segmentor(xsam()).encoder
print(load_folder(model, "seg_encoder", folder / "sam"))
run = model
read = lambda hidden_states: [*hidden_states, model.neck(hidden_states[-1])]
"""

FORWARD = """
pixels = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1))
before, started = kilobytes("VmRSS"), time.perf_counter()
with torch.inference_mode():
    outputs = read(run(pixels))
seconds = time.perf_counter() - started
peak = kilobytes("VmHWM")
print(f"{sys.argv[2]}: {seconds:.1f} s, {before / 1e6:.2f} GB before, peak {peak / 1e6:.2f} GB")
torch.save(outputs, folder / f"{sys.argv[2]}.pt")
"""


def run(source: str, *arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, "-c", COMMON + source, *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return result.stdout


def test_sam_vit_large_equals_transformers(tmp_path):
    """Every hidden state and the neck; each in its own process, whose peak memory is printed."""
    run(THEIRS + FORWARD, tmp_path, "transformers")
    run(OURS + FORWARD, tmp_path, "ours")
    theirs, ours = (torch.load(tmp_path / f"{name}.pt") for name in ("transformers", "ours"))
    assert len(theirs) == len(ours) == 26
    differences = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    print(
        f"largest difference {max(differences):.1e}, of values up to {theirs[-2].abs().max():.1f}"
    )
    assert max(differences) <= 1e-3
    assert min(float(x.std()) for x in theirs) > 0.1


LOAD = """
with parameters_on_meta():
    XSAM(toy())  # what the libraries import and allocate once
before = kilobytes("VmRSS")
model, _ = load_checkpoint(folder, tokenizer=sys.argv[2])
size = sum(parameter.nbytes for parameter in model.parameters())
peak = kilobytes("VmHWM")
print(f"{size / 1e9:.2f} GB of weights, {before / 1e6:.2f} GB before, peak {peak / 1e6:.2f} GB")
print("ratio", (peak - before) * 1024 / size)
"""


def test_the_full_model_loads_in_little_more_memory_than_its_weights(world, config, tmp_path):
    """Random values in bfloat16 under the published names, in files of 2.5 GB."""
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("wants 12 GB of disk")
    rows = {"vocab_size": 32014}  # as the published tables are cut
    settings = xsam().resolve(llm_config=xsam().model.llm_config | rows)
    with parameters_on_meta():
        names = {disk_name(name): x.shape for name, x in own_tensors(XSAM(settings)).items()}
    noise = (0.02 * torch.randn(1 << 24)).bfloat16()
    placed, shard = {}, {}
    for name, shape in names.items():
        count = shape.numel()
        shard[name] = noise.repeat(count // len(noise) + 1)[:count].view(shape).clone()
        if name == list(names)[-1] or sum(x.nbytes for x in shard.values()) > 2.5e9:
            file = f"model-{len(set(placed.values()))}.safetensors"
            save_file(shard, tmp_path / file)
            placed |= dict.fromkeys(shard, file)
            shard = {}
    (tmp_path / f"{MODEL_FILE}.index.json").write_text(json.dumps({"weight_map": placed}))
    words = tmp_path / "words"  # a tokenizer without a config.json, which would be believed
    shutil.copytree(world / "weights" / config.model.llm, words)
    (words / "config.json").unlink()
    said = run(LOAD, tmp_path, words)
    assert float(re.search(r"ratio (\S+)", said)[1]) <= 1.15
