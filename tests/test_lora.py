"""Adapters: what they change, what is trained, what is saved, and which base they belong to."""

import copy
import json
import shutil
from pathlib import Path

import faulty_train
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from xsam.checkpoints import read_header
from xsam.cli import parse
from xsam.config import Config, Stage
from xsam.data import Batch, Processor
from xsam.datasets.registry import open_dataset
from xsam.inference import load_checkpoint, quantize, save_pretrained
from xsam.llm import LanguageModel
from xsam.lora import Adapter, TokenRows, add_adapters, merge_adapters, target_layers
from xsam.losses import Normalisers, Objective
from xsam.model import XSAM
from xsam.optimizer import MasterAdamW, freeze
from xsam.plan import Plan
from xsam.starts import outline

EVERY = ("llm", "segmentor", "image_encoder", "image_projector", "seg_projector", "llm_projector")


def lora_stage(config: Config, **fields) -> Stage:
    return config.resolve((3,), lora_rank=4, **fields).stages[3]


def with_adapters(model: XSAM, config: Config, **fields) -> XSAM:
    adapted = copy.deepcopy(model)
    stage = lora_stage(config, **fields)
    freeze(adapted, stage, "")
    assert add_adapters(adapted, stage, "")
    return adapted


def adapters_of(model: nn.Module) -> list[nn.Module]:
    return [each for each in model.modules() if isinstance(each, (Adapter, TokenRows))]


def shake(model: nn.Module) -> None:
    """Adapters as after training: none of their numbers is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for adapter in adapters_of(model):
            for parameter in adapter.parameters():
                parameter.normal_(std=0.05)


def batch_of(name: str, world: Path, processor: Processor, count: int = 2) -> Batch:
    dataset = open_dataset(name, world / "data")
    samples = [dataset.sample(index, np.random.default_rng(index)) for index in range(count)]
    return processor.collate([processor.encode(sample) for sample in samples])


def outputs_of(model: XSAM, batch) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = model.eval()(batch)
    found = [outputs.token_loss]
    if outputs.predictions is not None:
        found += [outputs.predictions.class_logits, outputs.predictions.mask_embeddings]
    return found


# ---- what they change ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coco_panoptic", "refcoco", "gcg_psg", "llava_instruct"])
def test_at_the_first_step_they_change_nothing(model, world, config, processor, name):
    batch = batch_of(name, world, processor)
    adapted = with_adapters(model, config, lora_targets=EVERY)
    for one, other in zip(outputs_of(model, batch), outputs_of(adapted, batch), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["coco_panoptic", "refcoco", "coco_vgd"])
def test_merged_they_give_what_they_gave_before(model, world, config, processor, name):
    batch = batch_of(name, world, processor)
    adapted = with_adapters(model, config, lora_targets=EVERY)
    shake(adapted)
    before = outputs_of(adapted, batch)
    names = {name for name, _ in model.named_parameters()}
    merge_adapters(adapted)
    assert {name for name, _ in adapted.named_parameters()} == names and not adapters_of(adapted)
    for plain, one, other in zip(
        outputs_of(model, batch), before, outputs_of(adapted, batch), strict=True
    ):
        assert (one - other).abs().max() <= 1e-5 * max(1, one.abs().max())
        assert (one - plain).abs().max() > 1e-3  # so adapters were at work


@pytest.mark.parametrize("is_tied", [False, True])
def test_rows_of_new_tokens_are_those_of_the_tables(is_tied):
    """The language model alone, whose tables may be one."""
    torch.manual_seed(0)
    sizes = dict(model_type="llama", vocab_size=50, hidden_size=16, intermediate_size=32)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=is_tied)
    holder = nn.Module()
    holder.llm = LanguageModel(sizes).eval()
    holder.llm.special_ids = (47, 48, 49)
    stage = Stage(learning_rates={"": 1.0}, datasets=(), lora_rank=2)
    add_adapters(holder, stage, "")
    rows = [each for each in adapters_of(holder) if isinstance(each, TokenRows)]
    assert len(rows) == (1 if is_tied else 2)
    shake(holder)
    ids = torch.tensor([[3, 47, 49, 48, 5]])
    nothing = torch.zeros(1, 0, 16)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = holder.llm.embed(ids, nothing, nothing[0])
        states = holder.llm(embeddings, torch.ones_like(ids))
        return embeddings, holder.llm.model.get_output_embeddings()(states)

    before = run()
    merge_adapters(holder)
    for one, other in zip(before, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_dropout_is_of_training_alone(model, config):
    adapted = with_adapters(model, config, lora_dropout=0.5)
    shake(adapted)
    layer = next(iter(target_layers(adapted, lora_stage(config), "").values()))
    x = torch.randn(3, layer.in_features)
    adapted.eval()
    assert torch.equal(layer(x), layer(x))
    adapted.train()
    assert not torch.equal(layer(x), layer(x))


# ---- what is trained -----------------------------------------------------------------------------


def test_gradients_reach_adapters_alone(model, world, config, processor):
    config = config.resolve((3,), lora_rank=4, lora_targets=("llm", "segmentor.decoder"))
    adapted = with_adapters(
        model, config, lora_targets=("llm", "segmentor.decoder"), lora_whole=("llm_projector",)
    ).train()
    shake(adapted)  # at B = 0 nothing reaches A
    objective = Objective(adapted, config)
    for name in ("coco_panoptic", "refcoco", "llava_instruct"):
        sum(objective(batch_of(name, world, processor), Normalisers(1, 1, 1)).values()).backward()
    reached = {name for name, each in adapted.named_parameters() if each.grad is not None}
    meant = {name for name, _ in adapted.named_parameters() if ".lora." in name}
    meant |= {name for name, _ in adapted.named_parameters() if name.startswith("llm_projector")}
    assert reached == meant
    assert all(each.grad.abs().sum() > 0 for each in adapted.parameters() if each.grad is not None)
    parts = {name.split(".")[0] for name in meant}
    assert parts == {"llm", "segmentor", "llm_projector"}


def test_targets_are_parts_modules_or_patterns(model, config):
    def names(*targets: str, **fields) -> set[str]:
        stage = lora_stage(config, lora_targets=targets, **fields)
        return set(target_layers(model, stage, ""))

    every = names("llm")
    assert {name.split(".")[-1] for name in every} == {
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    }
    assert names("llm*.qkv_proj") == {name for name in every if name.endswith("qkv_proj")}
    assert names("llm.model.model.layers.0") == {name for name in every if ".layers.0." in name}
    assert not names("llm", learning_rates={"": 1e-3, "llm": 0.0})
    assert not names("llm", lora_whole=("llm",))
    # The image encoder pools by torch's attention, which calls no layer of its own.
    assert not any("head.attention" in name for name in names("image_encoder"))


def run(*flags: object) -> int:
    """The training command, in this process."""
    return faulty_train.main({}, list(map(str, flags)))


def flags_of(world: Path, out: Path, stage: int, datasets: str, *others: object) -> list[object]:
    flags = ["--config", "toy", "--stage", stage, "--data", world / "data", "--out", out]
    flags += ["--weights", world / "weights", "--eval_tasks", "", "--num_points", 64]
    flags += ["--global_batch_size", 4, "--micro_batch_size", 2, "--datasets", datasets]
    return [*flags, *others]


def lora_flags(world: Path, out: Path, *others: object) -> list[object]:
    return flags_of(world, out, 3, "refcoco,coco_panoptic", "--lora_rank", 4, *others)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """The checkpoint that adapters are trained on."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_pretrained(model, folder)
    return folder


def test_a_resumed_run_equals_one_that_was_not_interrupted(world, whole, tmp_path):
    flags = ["--init", whole, "--lora_dropout", 0.2, "--lora_targets", "llm,segmentor.decoder"]
    flags += ["--lora_whole", "llm_projector"]
    assert run(*lora_flags(world, tmp_path / "one", *flags), "--max_steps", 4) == 0
    other = lora_flags(world, tmp_path / "two", *flags)
    assert run(*other, "--max_steps", 4, "--save_every", 2) == 0
    shutil.rmtree(tmp_path / "two/stage3/step_4")
    assert run(*other, "--max_steps", 4, "--resume") == 0
    for name in ("model.safetensors", "optimizer-00001-of-00001.safetensors"):
        one = load_file(tmp_path / "one/stage3/step_4" / name)
        two = load_file(tmp_path / "two/stage3/step_4" / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    trained = {key for key in load_file(tmp_path / "one/stage3/step_4/model.safetensors")}
    assert trained and all(".lora." in key or key.startswith("llm_projector") for key in trained)


# ---- what is saved, and its base -----------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(world, whole, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("lora")
    assert run(*lora_flags(world, out, "--init", whole), "--max_steps", 1) == 0
    return out / "stage3"


def test_it_is_small_names_its_base_and_comes_back_merged(trained, whole, model):
    folder = trained / "step_1"
    assert (folder / "model.safetensors").stat().st_size < 0.05 * 4 * sum(
        parameter.numel() for parameter in model.parameters()
    )
    header = json.loads((folder / "config.json").read_text())
    assert header["base"]["path"] == str(whole.resolve())
    merged, stage = load_checkpoint(trained, report=lambda _: None)
    assert stage == 3 and not adapters_of(merged)
    stored, base = load_file(folder / "model.safetensors"), dict(model.named_parameters())
    name = "llm.model.layers.0.self_attn.o_proj"
    update = 4.0 * stored[f"{name}.lora.B"] @ stored[f"{name}.lora.A"]  # alpha 16 / rank 4
    name = name.replace("llm.", "llm.model.", 1) + ".weight"
    expected = base[name] + update
    torch.testing.assert_close(dict(merged.named_parameters())[name], expected)
    untouched = "background_embedding.weight"
    assert torch.equal(dict(merged.named_parameters())[untouched], base[untouched])


def test_another_base_is_refused_and_a_moved_one_found(
    trained, whole, model, world, tmp_path, capsys
):
    moved = shutil.copytree(whole, tmp_path / "moved")
    here = shutil.copytree(trained, tmp_path / "stage3")
    header = json.loads((here / "step_1/config.json").read_text())
    header["base"]["path"] = str(tmp_path / "gone/away")
    (here / "step_1/config.json").write_text(json.dumps(header))
    with pytest.raises(
        ValueError, match="gone/away any more: put it there, or say where it is: --base"
    ):
        load_checkpoint(here, report=lambda _: None)
    load_checkpoint(here, base=moved, report=lambda _: None)

    other = copy.deepcopy(model)
    with torch.no_grad():
        other.background_embedding.weight.mul_(1.01)
    save_pretrained(other, tmp_path / "other")
    with pytest.raises(ValueError, match="trained on another base than"):
        load_checkpoint(here, base=tmp_path / "other", report=lambda _: None)
    with pytest.raises(ValueError, match="holds no adapters"):
        load_checkpoint(whole, base=moved, report=lambda _: None)
    # A run does not go on with another, either, nor without a rank.
    out = shutil.copytree(trained.parent, tmp_path / "run")
    flags = lora_flags(world, out, "--init", tmp_path / "other", "--max_steps", 2, "--resume")
    assert run(*flags) == 2 and "which is another base than --init's" in capsys.readouterr().err
    flags[flags.index("--init") + 1] = whole
    flags[flags.index("--lora_rank") + 1] = 0
    assert (
        run(*flags) == 2
        and "was trained with lora_rank 4, this run has 0" in capsys.readouterr().err
    )


def test_training_goes_on_from_merged_adapters_as_it_is_told(trained, world, tmp_path):
    flags = flags_of(world, tmp_path, 3, "reasonseg", "--init", trained, "--max_steps", 1)
    flags += ["--presence", 0.125, "--lora_rank", 2, "--lora_targets", "segmentor.decoder"]
    assert run(*flags) == 0
    config = read_header(tmp_path / "stage3/step_1")["config"]
    stage = config.stages[3]
    assert (config.presence, stage.datasets, stage.lora_rank) == (0.125, ("reasonseg",), 2)
    chain, _ = load_checkpoint(tmp_path / "stage3", report=lambda _: None)  # adapters on adapters
    assert chain.config.presence == 0.125 and not adapters_of(chain)
    one, two = load_checkpoint(trained, report=lambda _: None)[0].llm, chain.llm
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), two.parameters(), strict=True))


def test_a_base_is_known_in_every_type(trained):
    for dtype in (torch.float16, torch.bfloat16):
        model, _ = load_checkpoint(trained, dtype=dtype, report=lambda _: None)
        assert {each.dtype for each in model.parameters()} == {dtype}


def test_a_copy_of_the_base_in_another_type_is_the_same_base(trained, model, tmp_path):
    half = copy.deepcopy(model).to(torch.bfloat16)
    save_pretrained(half, tmp_path / "half")
    load_checkpoint(trained, base=tmp_path / "half", report=lambda _: None)


def test_a_missing_tensor_is_an_error(trained, tmp_path):
    here = shutil.copytree(trained, tmp_path / "stage3")
    file = here / "step_1/model.safetensors"
    tensors = load_file(file)
    gone = min(tensors)
    save_file({name: each for name, each in tensors.items() if name != gone}, file)
    with pytest.raises(ValueError, match=f"missing: {gone}"):
        load_checkpoint(here, report=lambda _: None)


def test_what_starts_from_parts_is_kept_as_its_base(world, config, tmp_path, capsys):
    """Stage 3 after stages 1 and 2: parts that start from nothing have to be trained whole."""
    for stage, name in ((1, "coco_panoptic"), (2, "llava_pretrain")):
        assert run(*flags_of(world, tmp_path, stage, name, "--max_steps", 1)) == 0
    flags = lora_flags(world, tmp_path, "--max_steps", 1)
    assert run(*flags) == 2
    assert "starts from nothing: name it in lora_whole" in capsys.readouterr().err
    flags += ["--lora_whole", "segmentor.class_head,llm_projector,background_embedding"]
    assert run(*flags) == 0
    assert (tmp_path / "stage3/base/model.safetensors").is_file()
    loaded, _ = load_checkpoint(tmp_path / "stage3", report=lambda _: None)
    stored = load_file(tmp_path / "stage3/step_1/model.safetensors")
    assert torch.equal(loaded.background_embedding.weight, stored["bg_embeds.weight"])


def test_adapters_of_a_part_are_no_part(world, whole, tmp_path, capsys):
    flags = flags_of(world, tmp_path, 1, "coco_panoptic", "--lora_rank", 2, "--max_steps", 1)
    flags += ["--lora_targets", "segmentor.encoder", "--lora_whole"]
    parts = "segmentor.connector,segmentor.pixel_decoder,segmentor.decoder,segmentor.class_head"
    assert run(*flags, parts) == 0
    segmentor, stage = load_checkpoint(tmp_path / "stage1", report=lambda _: None)
    assert stage == 1 and not adapters_of(segmentor)
    flags = flags_of(world, tmp_path / "other", 3, "refcoco", "--init", whole, "--max_steps", 1)
    assert run(*flags, "--init", tmp_path / "stage1") == 2
    assert "python -m xsam.export" in capsys.readouterr().err
    # After it in the same run they are merged.
    assert run(*flags_of(world, tmp_path, 2, "llava_pretrain", "--max_steps", 1)) == 0
    flags = lora_flags(world, tmp_path, "--max_steps", 1, "--lora_whole")
    assert run(*flags, "segmentor.class_head,llm_projector,background_embedding") == 0
    base, _ = load_checkpoint(tmp_path / "stage3/base", report=lambda _: None)
    one, two = segmentor.encoder, base.segmentor.encoder
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), two.parameters(), strict=True))


def test_targets_that_match_nothing_are_an_error(world, whole, tmp_path):
    flags = lora_flags(world, tmp_path, "--init", whole, "--lora_targets")
    options, config = parse(list(map(str, [*flags, "image_encodr"])))
    with pytest.raises(ValueError, match="lora_targets image_encodr: no linear layer of stage 3"):
        outline(3, config, options)
    options, config = parse(list(map(str, [*flags, "llm,image_encodr"])))
    with pytest.raises(ValueError, match="nothing is called 'image_encodr'"):
        outline(3, config, options)


# ---- fewer bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_the_frozen_language_model_may_be_held_in_fewer_bits(model, world, config, processor, bits):
    pytest.importorskip("bitsandbytes", reason="the extra xsam[quantize]")
    config = config.resolve((3,), lora_rank=4)
    adapted, stage = copy.deepcopy(model), config.stages[3]
    freeze(adapted, stage, "")
    quantize(adapted, bits)
    add_adapters(adapted, stage, "")
    adapted.train()
    shake(adapted)
    batch = batch_of("refcoco", world, processor)
    sum(Objective(adapted, config)(batch, Normalisers(1, 1, 1)).values()).backward()
    reached = {name for name, each in adapted.named_parameters() if each.grad is not None}
    assert reached == {name for name, _ in adapted.named_parameters() if ".lora." in name}


def test_fewer_bits_are_for_what_is_frozen(world, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(["--config", "toy", "--stage", "3", "--llm_bits", "4"])
    assert "llm_bits is for a frozen llm" in capsys.readouterr().err


def test_moments_in_8_bits_follow_those_in_32_and_resume(tmp_path):
    pytest.importorskip("torchao", reason="the extra xsam[torchao]")
    from xsam.optimizer import plain_states

    def steps(optimizer, parameter, first: int, last: int) -> None:
        for number in range(first, last):
            torch.manual_seed(number)
            parameter.grad = parameter.detach() - 1 + 0.1 * torch.randn_like(parameter)
            optimizer.step()

    results = {}
    for bits in (32, 8):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(64, 64))
        optimizer = MasterAdamW([parameter], lr=0.05, bits=bits)
        steps(optimizer, parameter, 0, 40)
        results[bits] = parameter.detach().clone()
    state = plain_states(optimizer.state[parameter])
    assert state["exp_avg.codes"].dtype == torch.uint8 and "exp_avg" not in state
    error = (results[8] - results[32]).abs()
    assert 0 < error.mean() < 0.02 * (results[32] - torch.randn(64, 64)).abs().mean()

    other = nn.Parameter(parameter.detach().clone())
    resumed = MasterAdamW([other], lr=0.05, bits=8)
    for name, tensor in plain_states(resumed.start(other)).items():
        tensor.copy_(state[name])
    steps(optimizer, parameter, 40, 45)
    steps(resumed, other, 40, 45)
    assert torch.equal(parameter, other)


# ---- the plan ------------------------------------------------------------------------------------


def test_the_plan_counts_what_is_trained(config):
    config = config.resolve((3,), lora_rank=4, max_steps=1, datasets=("refcoco",), dtype="bfloat16")
    plan = Plan(config, 3, 1)
    adapted = [p for n, p in plan.simulation.model.named_parameters() if ".lora." in n]
    count = sum(parameter.numel() for parameter in adapted)
    assert plan.held["gradients"][0] == 2 * count
    assert plan.held["optimizer"][0] == 12 * count and plan.checkpoint == 14 * count
    fewer = Plan(config.resolve(llm_bits=4, optimizer_bits=8), 3, 1)
    assert fewer.held["optimizer"][0] == pytest.approx(6 * count, rel=0.01)
    assert fewer.peak() < plan.peak()
