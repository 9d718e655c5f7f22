"""The commands of docs/ablations.md: each is parsed, and in the slow part launched at toy size.

pytest -m slow tests/test_ablations.py
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from test_variants import MAKE, SWIN
from transformers import AutoTokenizer

from xsam.cli import parse, train_command
from xsam.config import ARCHITECTURES
from xsam.model import XSAM, Segmentor
from xsam.weights import parameters_on_meta

PAGE = Path(__file__).resolve().parent.parent / "docs" / "ablations.md"
COMMANDS = re.findall(r"^torchrun --nproc_per_node 8 xsam/train\.py (.*)$", PAGE.read_text(), re.M)
TABLES = (6, 7, 8, 9, 19, 20, 21, 22)
# Parts by name, as tiny folders that transformers' own classes have written.
TINY = {
    "mask2former-swin-large-coco-panoptic": "swin",
    "clip-vit-large-patch14-336": "clip",
    "siglip-so400m-patch14-384": "siglip",
    "Qwen3-1.7B": "qwen3",
    "vicuna-7b-v1.5": "llama",
}


def test_the_page_has_a_command_for_every_table():
    sections = re.split(r"^## Table (\d+)", PAGE.read_text(), flags=re.M)
    numbers, texts = map(int, sections[1::2]), sections[2::2]
    assert tuple(numbers) == TABLES
    assert all("xsam/train.py" in text for text in texts)
    assert len(COMMANDS) == len(set(COMMANDS)) == PAGE.read_text().count("xsam/train.py --")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_parsed_and_its_model_can_be_built(command):
    options, config = parse(shlex.split(command))
    with parameters_on_meta():
        model = (Segmentor if options.stages == [1] else XSAM)(config)
    if "seg_tokens false" in command:
        assert model.seg_projector is None


def test_the_values_of_a_command_reach_the_configuration():
    values = {}
    for command in COMMANDS:
        options, config = parse(shlex.split(command))
        values[options.out.name] = options, config
    assert values["specific-reason"][1].stages[3].datasets == ("reasonseg",)
    assert values["specific-reason"][1].stages[3].starts_from == ()
    assert values["mixed"][0].init == [Path("runs/xsam/stage1"), Path("runs/xsam/stage2")]
    assert values["s3"][1].stages[3].starts_from == () and values["s3"][0].init == []
    assert values["decoder-sam"][1].model.decoder_layers == 2
    assert values["linear"][1].model.connector_scales == (1.0,)
    assert values["t-0.01"][1].stages[3].repeat_threshold == 0.01
    assert values["vicuna"][1].model.llm_config["model_type"] == "llama"
    assert values["swin"][1].model.seg_backbone_config["embed_dim"] == 192


# ---- at toy size ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> Path:
    """A folder with toy weights, and stages 1 and 2 of a main run of a step each."""
    root = tmp_path_factory.mktemp("ablations")
    shutil.copytree(world / "weights", root / "weights")
    tokenizer = AutoTokenizer.from_pretrained(world / "weights/phi3-toy")
    for name, kind in TINY.items():
        torch.manual_seed(0)
        MAKE[kind]().save_pretrained(root / "weights" / name)
        if kind in ("qwen3", "llama"):
            tokenizer.save_pretrained(root / "weights" / name)
    for stage in ("1", "2"):
        assert launch(["--stage", stage, "--out", str(root / "main")], root, world) == 0
    return root


def launch(arguments: list[str], root: Path, world: Path) -> int:
    small = ["--config", "toy", "--data", str(world / "data"), "--weights", str(root / "weights")]
    small += ["--max_steps", "1", "--global_batch_size", "2", "--micro_batch_size", "2"]
    return train_command([*arguments, *small, "--eval_tasks", "", "--num_workers", "0"])


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_trains_at_toy_size(command, runs, world, tmp_path, monkeypatch, capsys):
    swin = dict(model_type="swin") | SWIN
    tiny = dict(seg_backbone_config=swin, seg_patch_size=16, seg_dim=4 * SWIN["embed_dim"])
    monkeypatch.setitem(ARCHITECTURES["seg_encoder"], "mask2former-swin-large-coco-panoptic", tiny)
    for part in ("image_encoder", "llm"):
        for name in TINY.keys() & ARCHITECTURES[part].keys():
            monkeypatch.setitem(ARCHITECTURES[part], name, {f"{part}_config": {}})
    arguments = shlex.split(command.replace("--connector_layers 24", "--connector_layers 4"))
    out = arguments[arguments.index("--out") + 1]
    own = tmp_path / Path(out).name
    for place, word in enumerate(arguments):
        if word == out or (word.startswith(f"{out}/") and out != "runs/xsam"):
            arguments[place] = word.replace(out, str(own))
        elif word.startswith("runs/xsam"):
            arguments[place] = word.replace("runs/xsam", str(runs / "main"))
    if any(f"{own}/stage2" == each for each in arguments):  # the stage before, of the same row
        before = ["--stage", "2", "--init", str(runs / "main/stage1"), "--out", str(own)]
        before += [
            each
            for flag in ("--image_encoder", "--llm")
            if flag in arguments
            for each in (flag, arguments[arguments.index(flag) + 1])
        ]
        assert launch(before, runs, world) == 0
    if "--decoder" in arguments:  # SAM's decoder is as wide as the neck of its encoder
        arguments += ["--decoder_dim", "32"]
    assert launch(arguments, runs, world) == 0
    stage = "3" if "all" in arguments else arguments[arguments.index("--stage") + 1]
    assert (own / f"stage{stage}" / "step_1" / "model.safetensors").is_file()
