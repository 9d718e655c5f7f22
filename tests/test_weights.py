"""Checkpoints come back as they were, and what does not fit is refused before anything is changed.

pytest tests/test_weights.py
"""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from xsam.config import xsam
from xsam.encoders import ImageEncoder, SamEncoder, resize_positions
from xsam.llm import LanguageModel
from xsam.model import XSAM, Segmentor, load_checkpoint
from xsam.train import build_optimizer
from xsam.weights import (
    MODEL_FILE,
    TRAINING_FILE,
    check_checkpoint,
    latest_checkpoint,
    load_sam_encoder,
    load_state,
    load_trained,
    load_transformers,
    read_folder,
    read_header,
    read_safetensors,
    read_tokenizer,
    save_checkpoint,
)


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- state dicts ---------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_listed_and_nothing_is_changed():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = snapshot(module)
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["0.bias"]
    state["1.weight"] = torch.zeros(5, 5)
    state["2.scale"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        load_state(module, state, "folder/file")
    for part in ("folder/file", "missing: 0.bias", "unexpected: 2.scale"):
        assert part in str(error.value)
    assert "shape: 1.weight is [5, 5], the model has [2, 4]" in str(error.value)
    assert same(snapshot(module), before)


def test_a_long_list_of_problems_is_counted():
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    with pytest.raises(ValueError, match="and 20 more"):
        load_state(module, {}, "folder")


def test_a_file_cut_short_anywhere_is_named(tmp_path):
    path = tmp_path / MODEL_FILE
    save_file({"weight": torch.randn(40)}, path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=MODEL_FILE):
            read_safetensors(path)
    with pytest.raises(ValueError, match="absent"):
        read_safetensors(tmp_path / "absent")


# ---- Hugging Face folders ------------------------------------------------------------------------


def split_in_two(folder) -> None:
    """The folder's weights as large models have them: two files behind an index."""
    state = load_file(folder / MODEL_FILE)
    names = sorted(state)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / f"{MODEL_FILE}.index.json").write_text(json.dumps(index))
    (folder / MODEL_FILE).unlink()


@pytest.fixture
def sam_encoder(segmentor) -> SamEncoder:
    """As the toy world's, but for its numbers."""
    encoder = copy.deepcopy(segmentor.encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    return encoder


def test_a_folder_of_several_files_is_read_like_one(world, config, sam_encoder, tmp_path):
    folder = tmp_path / config.model.seg_encoder
    shutil.copytree(world / "weights" / config.model.seg_encoder, folder)
    before = read_folder(folder)
    load_sam_encoder(sam_encoder, folder)
    whole = snapshot(sam_encoder)
    split_in_two(folder)
    assert same(read_folder(folder), before)
    for parameter in sam_encoder.parameters():
        parameter.data.zero_()
    load_sam_encoder(sam_encoder, folder)
    assert same(snapshot(sam_encoder), whole)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-2\.safetensors"):
        read_folder(folder)


@pytest.mark.parametrize("part", ["image_encoder", "llm"])
def test_a_transformers_folder_is_read_as_it_is(world, config, part):
    folder = world / "weights" / getattr(config.model, part)
    kinds = {"image_encoder": ImageEncoder, "llm": LanguageModel}
    module = kinds[part](getattr(config.model, f"{part}_config"))
    load_transformers(module, folder)
    assert same(snapshot(module.model), load_file(folder / MODEL_FILE))


@pytest.mark.parametrize("part", ["seg_encoder", "image_encoder", "llm"])
@pytest.mark.parametrize("damage", ["cut short", "absent"])
def test_a_damaged_folder_is_named(world, config, sam_encoder, model, tmp_path, part, damage):
    name = getattr(config.model, part)
    shutil.copytree(world / "weights" / name, tmp_path / name)
    path = tmp_path / name / MODEL_FILE
    content = path.read_bytes()[:-100]
    path.unlink()
    if damage == "cut short":
        path.write_bytes(content)
    with pytest.raises(ValueError, match=name):
        if part == "seg_encoder":
            load_sam_encoder(sam_encoder, path.parent)
        else:
            load_transformers(copy.deepcopy(getattr(model, part)), path.parent)


def test_a_folder_of_another_size_is_refused(world, config):
    encoder = ImageEncoder(config.model.image_encoder_config | {"intermediate_size": 96})
    before = snapshot(encoder)
    with pytest.raises(ValueError, match=r"siglip2-toy does not fit(.|\n)*is \[128, 64\]"):
        load_transformers(encoder, world / "weights" / config.model.image_encoder)
    assert same(snapshot(encoder), before)


def test_a_folder_without_a_tokenizer_is_named(world, config):
    with pytest.raises(ValueError, match="siglip2-toy"):
        read_tokenizer(world / "weights" / config.model.image_encoder)


# ---- checkpoints ---------------------------------------------------------------------------------


def save(folder, model: XSAM | Segmentor, step: int = 5, stage: int | None = None):
    stage = stage or (1 if isinstance(model, Segmentor) else 3)
    training = {"optimizer": {"step": step}}
    return save_checkpoint(folder, model, model.settings, model.tokenizer, stage, step, training)


@pytest.mark.parametrize("kind", ["segmentor", "model"])
def test_a_checkpoint_comes_back_as_it_was(request, kind, tmp_path):
    model = request.getfixturevalue(kind)
    folder = save(tmp_path, model)
    loaded, stage = load_checkpoint(folder)
    assert type(loaded) is type(model) and stage == (3 if kind == "model" else 1)
    assert same(snapshot(loaded), snapshot(model))
    assert loaded.settings == model.settings and not loaded.training
    assert read_header(folder)["step"] == 5
    assert torch.load(folder / TRAINING_FILE) == {"optimizer": {"step": 5}}
    if model.tokenizer is not None:
        assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
        assert vars(loaded.llm)["stop_ids"] == model.llm.stop_ids


@pytest.mark.parametrize("change", [{"vocab_size": 130}, {"tie_word_embeddings": True}], ids=str)
def test_other_embedding_tables_come_back_too(config, tokenizer, change, tmp_path):
    """A table that the special tokens made larger; one shared with the output, as Qwen3's."""
    config.model.llm_config = config.model.llm_config | change
    model = XSAM(config, tokenizer)
    loaded, _ = load_checkpoint(save(tmp_path, model))
    assert same(snapshot(loaded), snapshot(model))


def test_only_the_last_checkpoints_are_kept(segmentor, tmp_path):
    assert segmentor.settings.keep_checkpoints == 2
    for step in (8, 9, 10, 100):
        save(tmp_path, segmentor, step)
        assert latest_checkpoint(tmp_path).name == f"step_{step}"
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_10", "step_100"]
    assert {path.name for path in tmp_path.iterdir()} == {"step_10", "step_100", "latest"}


def test_a_half_written_checkpoint_is_never_picked_up(segmentor, tmp_path, monkeypatch):
    save(tmp_path, segmentor, 5)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, segmentor, 6)
    assert (tmp_path / ".step_6.tmp").is_dir()
    assert latest_checkpoint(tmp_path).name == "step_5"
    folder = save(tmp_path, segmentor, 6)
    assert not (tmp_path / ".step_6.tmp").exists()
    assert latest_checkpoint(tmp_path) == folder
    assert load_checkpoint(folder)[1] == 1


def test_a_step_written_twice_is_the_later_one(segmentor, tmp_path):
    save(tmp_path, segmentor)
    other = copy.deepcopy(segmentor)
    with torch.no_grad():
        other.class_head.predictor.bias += 1
    assert same(snapshot(load_checkpoint(save(tmp_path, other))[0]), snapshot(other))


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None


def test_a_checkpoint_of_another_stage_is_refused(segmentor, tmp_path):
    folder = save(tmp_path, segmentor)
    assert check_checkpoint(folder, segmentor.settings, 1)["step"] == 5
    with pytest.raises(ValueError, match=r"step_5: .* stage 1, .* stage 3"):
        check_checkpoint(folder, segmentor.settings, 3)


def test_a_checkpoint_of_another_model_is_refused(segmentor, config, tmp_path):
    folder = save(tmp_path, segmentor)
    with pytest.raises(ValueError, match=r"'toy'.*seg_image_size is 128, here 1024"):
        check_checkpoint(folder, xsam(), 1)
    config.model.num_queries = 33
    with pytest.raises(ValueError, match="num_queries is 20, here 33"):
        check_checkpoint(folder, config, 1)


def test_what_is_no_checkpoint_is_named(world, segmentor, config, tmp_path):
    for folder in (tmp_path / "absent", world / "weights" / config.model.llm):
        with pytest.raises(ValueError, match=f"{folder.name}: not a checkpoint"):
            load_checkpoint(folder)
    folder = save(tmp_path, segmentor)
    content = (folder / MODEL_FILE).read_bytes()
    (folder / MODEL_FILE).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=MODEL_FILE):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: {"config": header["config"]},
        lambda header: header | {"config": header["config"] | {"colour": 1}},
    ],
    ids=["no stage", "an unknown field"],
)
def test_a_header_that_is_none_names_its_folder(segmentor, tmp_path, change):
    folder = save(tmp_path, segmentor)
    header = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(header)))
    with pytest.raises(ValueError, match="step_5"):
        load_checkpoint(folder)


def test_stage_2_saves_the_projectors_alone(model, tmp_path):
    model = copy.deepcopy(model)
    build_optimizer(model, model.settings.stages[2], "")
    folder = save(tmp_path, model, stage=2)
    saved = load_file(folder / MODEL_FILE)
    assert {name.split(".")[0] for name in saved} == {"image_projector", "seg_projector"}
    whole = snapshot(model)
    assert all(torch.equal(saved[name], whole[name]) for name in saved)
    with torch.no_grad():
        model.image_projector.model[0].weight.zero_()
    load_trained(model, folder)
    assert same(snapshot(model), whole)
    with pytest.raises(ValueError, match="stage 2"):
        load_checkpoint(folder)


def test_a_resumed_stage_2_lacking_a_projector_is_refused(model, tmp_path):
    model = copy.deepcopy(model)
    build_optimizer(model, model.settings.stages[2], "")
    folder = save(tmp_path, model, stage=2)
    saved = load_file(folder / MODEL_FILE)
    saved.pop("image_projector.model.0.weight")
    save_file(saved, folder / MODEL_FILE)
    with pytest.raises(ValueError, match=r"missing: image_projector\.model\.0\.weight"):
        load_trained(model, folder)


def test_sam_at_another_input_size_has_its_positions_interpolated(world, config):
    """The tables of a linear ramp are the same ramp, finer; all else is as it lies on disk."""
    folder = world / "weights" / config.model.seg_encoder
    larger = dataclasses.replace(config.model, seg_image_size=256, seg_window_size=16)
    encoder = Segmentor(dataclasses.replace(config, model=larger)).encoder
    load_sam_encoder(encoder, folder)
    assert encoder.pos_embed.shape == (1, 32, 32, larger.seg_dim)
    state, own = read_folder(folder), encoder.state_dict()
    for name, tensor in own.items():
        if "pos" not in name:
            assert torch.equal(tensor, state[f"vision_encoder.{name}"])
    ramp = torch.linspace(0, 1, 7)[:, None].expand(-1, 4)
    finer = resize_positions(ramp, torch.Size((13, 4)))[:, 0]
    assert torch.all(finer.diff() >= 0) and abs(finer[6] - 0.5) < 1e-6
    narrower = dataclasses.replace(config.model, seg_dim=32, seg_image_size=256)
    with pytest.raises(ValueError, match="sam-vit-toy does not fit"):
        load_sam_encoder(Segmentor(dataclasses.replace(config, model=narrower)).encoder, folder)
