"""Public folders and checkpoints load, strictly; ours come back as they were; what does not fit is
refused before anything is changed.

pytest tests/test_weights.py
"""

import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    SamConfig,
    SamModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
)
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerTransformerModule,
)

from xsam.config import Config
from xsam.decoder import MaskedAttentionDecoder, PixelDecoder
from xsam.encoders import ImageEncoder, SamEncoder, resize_positions
from xsam.inference import load_checkpoint
from xsam.llm import LanguageModel
from xsam.model import XSAM, Segmentor
from xsam.starts import load_init
from xsam.toy.preset import toy
from xsam.variants import SwinEncoder
from xsam.weights import (
    MODEL_FILE,
    complete_architecture,
    disk_name,
    list_tensors,
    load_folder,
    load_tensors,
    own_tensors,
    parameters_on_meta,
    read_tensors,
    read_tokenizer,
    save_model,
)

INDEX_FILE = f"{MODEL_FILE}.index.json"


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or folder."""
    found = list_tensors(path)
    return {stored.name: tensor.clone() for stored, tensor in read_tensors(list(found.values()))}


def split_in_two(folder: Path) -> None:
    """The folder's weights as large models have them: two files behind an index."""
    state = load_file(folder / MODEL_FILE)
    names = sorted(state)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / MODEL_FILE).unlink()


def to_bin(folder: Path) -> None:
    """The folder's weights as older models have them."""
    torch.save(load_file(folder / MODEL_FILE), folder / "pytorch_model.bin")
    (folder / MODEL_FILE).unlink()


def as_it_is(_: Path) -> None:
    pass


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MODEL_FILE, "pytorch_model.bin"])
def test_a_file_cut_short_anywhere_is_named(tmp_path, name):
    path = tmp_path / name
    write = save_file if name == MODEL_FILE else torch.save
    write({"weight": torch.randn(40)}, path)
    whole = path.read_bytes()
    assert read(path)["weight"].shape == (40,)
    for length in (0, 4, 8, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            list_tensors(path)
    with pytest.raises(ValueError, match="absent"):
        list_tensors(tmp_path / "absent")


STAND_INS = {
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5383948\n",
    "a web page": b"\n<HTML lang=en><head><title>Log in</title>",
    "it begins b'Entry not found'": b"Entry not found",
    "it begins b'{": b'{"error": "Access to this model is restricted"}',
    "empty": b"",
}


@pytest.mark.parametrize("about", STAND_INS)
@pytest.mark.parametrize("name", [MODEL_FILE, "pytorch_model.bin", "x.pth"])
def test_what_stands_in_for_weights_is_named(tmp_path, name, about):
    path = tmp_path / name
    path.write_bytes(STAND_INS[about])
    with pytest.raises(ValueError, match=re.escape(f"{path}: ") + ".*" + re.escape(about)) as error:
        load_checkpoint(path, report=print)
    assert not re.search("damaged|trusted copy", str(error.value))


@pytest.mark.parametrize("name", ["config.json", INDEX_FILE, "preprocessor_config.json"])
@pytest.mark.parametrize("about", ["git lfs pull", "a web page", "not valid JSON"])
def test_what_stands_in_for_a_folders_json_is_named(world, config, tmp_path, name, about):
    folder = shutil.copytree(world / "weights" / config.model.image_encoder, tmp_path / "eyes")
    if name == INDEX_FILE:
        (folder / MODEL_FILE).unlink()
    (folder / name).write_bytes(STAND_INS.get(about, b'{"model_type": '))
    with pytest.raises(ValueError, match=f"eyes/{re.escape(name)}: .*{about}"):
        complete_architecture(config, "image_encoder", folder)
        list_tensors(folder)


def test_a_file_is_what_its_content_says(tmp_path):
    state = {"weight": torch.randn(40)}
    save_file(state, tmp_path / "x.bin")
    assert same(read(tmp_path / "x.bin"), state)
    torch.save(nn.Linear(2, 2), tmp_path / "module.bin")
    with pytest.raises(ValueError, match=r"holds more than tensors \(torch\.nn.*trusted copy"):
        list_tensors(tmp_path / "module.bin")
    torch.save(state, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[: len(whole) // 2])
    for name in ("x.safetensors", "cut.bin"):
        with pytest.raises(ValueError, match=f"{name}: damaged, cut short or no weights; fetch"):
            list_tensors(tmp_path / name)


class Attack:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", ["torch", "bare pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path, protocol):
    path, victim = tmp_path / "pytorch_model.bin", tmp_path / "victim"
    content = {"weight": torch.zeros(3), "extra": Attack(victim)}
    if protocol == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: holds more than tensors"):
        list_tensors(tmp_path)
    assert not victim.exists()


def test_what_is_no_state_dict_is_named(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for content in ({"step": 3}, [torch.zeros(2)], torch.zeros(2)):
        torch.save(content, path)
        with pytest.raises(ValueError, match="not a state dict"):
            list_tensors(path)


def test_state_dicts_of_trainers_and_of_old_torch_are_read(tmp_path):
    state = {"a.weight": torch.randn(3), "b": torch.randn(2, 2).bfloat16()}
    path = tmp_path / "x.pth"
    for content, options in (
        (state, {}),
        ({"state_dict": state}, {}),
        ({"module": state, "step": 4}, {}),
        (state, {"_use_new_zipfile_serialization": False}),
    ):
        torch.save(content, path, **options)
        assert same(read(path), state)


def test_a_folder_of_several_files_is_read_like_one(world, config, tmp_path):
    folder = tmp_path / config.model.seg_encoder
    shutil.copytree(world / "weights" / config.model.seg_encoder, folder)
    before = read(folder)
    split_in_two(folder)
    assert same(read(folder), before)
    second = folder / "model-2.safetensors"
    state = load_file(second)
    lost = sorted(state)[0]
    save_file({name: state[name] for name in state if name != lost}, second)
    with pytest.raises(ValueError, match=f"names what is not there: {re.escape(lost)} in model-2"):
        list_tensors(folder)
    second.unlink()
    with pytest.raises(ValueError, match=r"model-2\.safetensors: cannot be read"):
        list_tensors(folder)
    for text, about in (("{", "not valid JSON"), ("{}", "not an index"), ("[]", "holds a list")):
        (folder / INDEX_FILE).write_text(text)
        with pytest.raises(ValueError, match=rf"index\.json: {about}"):
            list_tensors(folder)


# ---- strict loading ------------------------------------------------------------------------------


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def stored(state: dict[str, Tensor], path: Path) -> dict:
    save_file(state, path)
    return list_tensors(path)


def test_all_that_does_not_fit_is_listed_and_nothing_is_changed(tmp_path):
    module = small()
    before = snapshot(module)
    state = {name: tensor + 1 for name, tensor in before.items()}
    state["0.offset"] = state.pop("0.bias")  # one renamed
    state["1.weight"] = torch.zeros(5, 5)  # one of another shape
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError) as error:
        load_tensors(module, stored(state, path), path)
    assert str(error.value).splitlines() == [
        f"{path} does not fit the model:",
        f"  missing: 0.bias in {path}",
        f"  shape: 1.weight is [5, 5] in {path}, the model has [2, 4]",
        f"  unexpected: 0.offset in {path}",
    ]
    assert same(snapshot(module), before)


def test_a_long_list_of_problems_is_counted():
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    with pytest.raises(ValueError, match="and 20 more"):
        load_tensors(module, {}, "folder")


def test_what_may_be_missing_stays_and_is_told(tmp_path):
    module = small()
    before = snapshot(module)
    entries = stored({"1.weight": torch.ones(2, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"missing: 1\.bias"):
        load_tensors(module, entries, "x", allow_missing=("0.",))
    with pytest.raises(ValueError, match=r"no tensor of the model begins with 'llm\.'"):
        load_tensors(module, entries, "x", allow_missing=("0.", "1.bias", "llm."))
    line = load_tensors(module, entries, "x", allow_missing=("0.", "1.bias"))
    assert "3 missing, as allowed: 0.bias, 0.weight, 1.bias" in line
    assert same(snapshot(module), before | {"1.weight": torch.ones(2, 4)})


def test_only_narrows_what_is_filled(tmp_path):
    module = small()
    before = snapshot(module)
    state = {"1.weight": torch.ones(2, 4), "1.bias": torch.ones(2)}
    load_tensors(module, stored(state, tmp_path / "x.safetensors"), "x", only=("1.",))
    assert same(snapshot(module), before | state)
    state["0.bias"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"unexpected: 0\.bias"):
        load_tensors(module, stored(state, tmp_path / "x.safetensors"), "x", only=("1.",))


def test_one_tensor_under_two_public_names_is_refused(tmp_path):
    state = {"visual_encoder.x": torch.zeros(1), "vision_encoder.vision_model.x": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"twice: vision_encoder\.vision_model\.x, as"):
        load_tensors(small(), stored(state, tmp_path / "x.safetensors"), "x")


def test_parameters_on_meta_take_the_stored_type_or_the_asked(tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in snapshot(small()).items()}
    entries = stored(state, tmp_path / "x.safetensors")
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        with parameters_on_meta():
            module = small()
        assert all(parameter.is_meta for parameter in module.parameters())
        load_tensors(module, entries, "x", dtype=dtype)
        assert all(parameter.dtype == expected for parameter in module.parameters())
        assert same({name: x.bfloat16() for name, x in snapshot(module).items()}, state)
    assert not nn.Linear(2, 2).weight.is_meta  # outside nothing is different


def test_tied_weights_are_one_tensor_before_and_after(config, tmp_path):
    """The output head may be stored, as a second name, or not."""
    tied = config.model.llm_config | {"tie_word_embeddings": True}
    original = LanguageModel(tied)
    state = {f"llm.{name}": tensor for name, tensor in original.model.state_dict().items()}
    head = state.pop("llm.lm_head.weight")
    for more in ({}, {"llm.lm_head.weight": head.clone()}):
        with parameters_on_meta():
            loaded = LanguageModel(tied)
        path = tmp_path / "x.safetensors"
        load_tensors(loaded, stored(state | more, path), path, "llm.")
        assert same(snapshot(loaded), snapshot(original))
        tables = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
        assert tables[0].weight is tables[1].weight


# ---- Hugging Face folders ------------------------------------------------------------------------

DIMS = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
VISION = DIMS | dict(image_size=48, patch_size=16)
WORDS = DIMS | dict(vocab_size=80, num_key_value_heads=1, pad_token_id=0)
TOWER = dict(**DIMS, vocab_size=50, max_position_embeddings=8)


def hub_model(kind: str, size: int = 48) -> PreTrainedModel:
    """A small random model of transformers for images of `size`, every weight moved from its
    initial value."""
    torch.manual_seed(0)
    eyes = VISION | {"image_size": size}
    if kind in ("sam", "mask2former"):
        swin = SwinConfig(embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 2], window_size=4,
                          out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
        small = dict(hidden_dim=32, feature_size=32, mask_feature_size=32, num_attention_heads=2)
        vision = DIMS | dict(mlp_dim=48, image_size=size, window_size=3, global_attn_indexes=[1])
        decoder = dict(hidden_size=32, mlp_dim=32, num_attention_heads=2)
        model = {
            "sam": lambda: SamModel(SamConfig(vision_config=vision, mask_decoder_config=decoder)),
            "mask2former": lambda: Mask2FormerForUniversalSegmentation(
                Mask2FormerConfig(backbone_config=swin, encoder_layers=1, decoder_layers=2, **small)
            ),
        }[kind]()
    else:
        model = {
            "siglip": lambda: SiglipModel(SiglipConfig(text_config=TOWER, vision_config=eyes)),
            "siglip vision": lambda: SiglipVisionModel(SiglipVisionConfig(**eyes)),
            "clip": lambda: CLIPModel(CLIPConfig(text_config=TOWER, vision_config=eyes)),
            "clip vision": lambda: CLIPVisionModel(CLIPVisionConfig(**eyes)),
            "phi3": lambda: Phi3ForCausalLM(Phi3Config(**WORDS, sliding_window=5)),
            "qwen3": lambda: Qwen3ForCausalLM(
                Qwen3Config(**WORDS, head_dim=16, tie_word_embeddings=True)
            ),
            "llama": lambda: LlamaForCausalLM(LlamaConfig(**WORDS)),
        }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def load_part(part: str, folder: Path, config: Config) -> tuple[nn.Module, str, dict]:
    """A part built as training builds it: without values, then filled. With what was loaded and
    the architecture that the folder has."""
    unknown = config.resolve(**{f"{part}_config": {}})
    architecture = getattr(complete_architecture(unknown, part, folder).model, f"{part}_config")
    with parameters_on_meta():
        module = {"image_encoder": ImageEncoder, "llm": LanguageModel}[part](architecture)
    return module.eval(), load_folder(module, part, folder), architecture


@pytest.mark.parametrize("layout", [as_it_is, split_in_two, to_bin])
@pytest.mark.parametrize("kind", ["siglip", "siglip vision", "clip", "clip vision"])
@pytest.mark.parametrize("size", [48, 80])
@torch.no_grad()
def test_image_encoder_folders(size, kind, layout, config, tmp_path):
    """Whole models with a text tower, as the hub has them, and vision towers alone."""
    reference = hub_model(kind, size)
    reference.save_pretrained(tmp_path)
    layout(tmp_path)
    ours, report, architecture = load_part("image_encoder", tmp_path, config)
    tower = getattr(reference, "vision_model", reference)
    pixels = torch.randn(2, 3, size, size)
    hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    patches = hidden[:, -((size // 16) ** 2) :]
    torch.testing.assert_close(ours(pixels), patches, atol=1e-4, rtol=0)
    assert architecture["image_size"] == size
    assert ("text_model" in report) == (kind in ("siglip", "clip"))


@torch.no_grad()
def test_older_names_of_a_vision_tower(config, tmp_path):
    """Earlier releases of transformers wrote "vision_model." before every name, and buffers."""
    reference = hub_model("siglip vision")
    reference.save_pretrained(tmp_path)
    # Copies: some releases of safetensors map the file, which is written anew below.
    state = {name: tensor.clone() for name, tensor in load_file(tmp_path / MODEL_FILE).items()}
    older = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    older["vision_model.embeddings.position_ids"] = torch.arange(9)[None]
    save_file(older, tmp_path / MODEL_FILE)
    ours, report, _ = load_part("image_encoder", tmp_path, config)
    assert same(snapshot(ours.model), state)
    assert "1 not used: vision_encoder.vision_model.embeddings.position_ids" in report


@pytest.mark.parametrize("layout", [as_it_is, split_in_two, to_bin])
@pytest.mark.parametrize("kind", ["phi3", "qwen3", "llama"])
@torch.no_grad()
def test_language_model_folders(kind, layout, config, tmp_path):
    reference = hub_model(kind)
    reference.save_pretrained(tmp_path)
    layout(tmp_path)
    ours, report, _ = load_part("llm", tmp_path, config)
    ids = torch.randint(80, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = reference(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    states = ours(ours.model.get_input_embeddings()(ids), mask)
    logits = ours.model.get_output_embeddings()(states)
    torch.testing.assert_close(states, expected.hidden_states[-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    assert f"{sum(x.numel() for x in reference.parameters()):,} -> llm" in report


@pytest.mark.parametrize("layout", [as_it_is, split_in_two, to_bin])
@pytest.mark.parametrize("size", [64, 112])
@torch.no_grad()
def test_sam_folders(size, layout, tmp_path):
    reference = hub_model("sam", size)
    reference.save_pretrained(tmp_path)
    layout(tmp_path)
    with parameters_on_meta():
        ours = SamEncoder(size, 16, 32, 3, 2, 48, 3, (1,), 256)
    report = load_folder(ours, "seg_encoder", tmp_path)
    pixels = torch.randn(2, 3, size, size)
    expected = reference.vision_encoder(pixels, output_hidden_states=True)
    hidden_states = ours(pixels)
    for mine, theirs in zip(hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    neck = ours.neck(hidden_states[-1])
    torch.testing.assert_close(neck, expected.last_hidden_state, atol=1e-4, rtol=0)
    assert "left in the folder" in report and "mask_decoder" in report


@pytest.mark.parametrize("layout", [as_it_is, split_in_two, to_bin])
@torch.no_grad()
def test_swin_of_mask2former_folders(layout, tmp_path):
    reference = hub_model("mask2former")
    reference.save_pretrained(tmp_path)
    layout(tmp_path)
    with parameters_on_meta():
        ours = SwinEncoder(reference.config.backbone_config.to_diff_dict())
    report = load_folder(ours.eval(), "seg_encoder", tmp_path)
    for size in (64, 96):
        pixels = torch.randn(2, 3, size, size)
        output = reference.model.pixel_level_module.encoder(pixels, output_hidden_states=True)
        expected = [*output.feature_maps, *output.hidden_states[-2:]]
        for mine, theirs in zip(ours(pixels), expected, strict=True):
            torch.testing.assert_close(mine.permute(0, 3, 1, 2), theirs, atol=1e-4, rtol=0)
    assert re.search(r"left in the folder: .*model \(\d+\)", report)


@pytest.mark.parametrize("side", [16, 24])
@torch.no_grad()
def test_decoders_written_by_transformers(side, tmp_path):
    """Pixel decoder and masked-attention decoder at X-SAM's three scales, their tensors under the
    published names; `side` is that of the finest scale."""
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        feature_strides=[8, 16, 32], encoder_layers=2, decoder_layers=4, num_queries=10
    )
    theirs = {
        "segmentor.pixel_decoder.": Mask2FormerPixelDecoder(config, feature_channels=[8, 16, 32]),
        "segmentor.decoder.": Mask2FormerTransformerModule(in_features=256, config=config),
    }
    with parameters_on_meta():
        ours = [
            PixelDecoder([8, 16, 32], 256, num_layers=2, num_heads=8, num_points=4, mlp_dim=1024),
            MaskedAttentionDecoder(
                256, num_layers=3, num_heads=8, mlp_dim=2048, num_queries=10, num_levels=3
            ),
        ]
    for module, (prefix, reference) in zip(ours, theirs.items(), strict=True):
        for name, parameter in reference.eval().named_parameters():
            if name == "level_embed":  # transformers leaves it as the memory was
                parameter.zero_()
            parameter.add_(0.05 * torch.randn_like(parameter))
        state = {f"{prefix}{name}": tensor for name, tensor in reference.state_dict().items()}
        load_tensors(module.eval(), stored(state, tmp_path / "x.safetensors"), "x", prefix)
    features = [torch.randn(2, dim, side * 8 // dim, side * 8 // dim) for dim in (8, 16, 32)]
    options = dict(output_hidden_states=True, output_attentions=False)
    pixels, transformer = theirs.values()
    expected = pixels(features, **options)
    mask_features, levels = ours[0](features)
    torch.testing.assert_close(mask_features, expected.mask_features, atol=1e-4, rtol=0)
    for mine, reference in zip(levels, expected.multi_scale_features, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=0)
    expected = transformer(multi_scale_features=levels, mask_features=mask_features, **options)
    queries, mask_embeddings = ours[1](mask_features, levels)
    masks = torch.einsum("lrqc,rchw->lrqhw", mask_embeddings, mask_features)
    for mine, reference in (
        (queries, torch.stack(expected.intermediate_hidden_states).transpose(1, 2)),
        (masks, torch.stack(expected.masks_queries_logits)),
    ):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=0)


def test_sam_at_another_input_size_has_its_positions_interpolated(world, config):
    """The tables of a linear ramp are the same ramp, finer; all else is as it lies on disk."""
    folder = world / "weights" / config.model.seg_encoder
    larger = config.resolve(seg_image_size=256, seg_window_size=16)
    encoder = Segmentor(larger).encoder
    report = load_folder(encoder, "seg_encoder", folder)
    assert "9 resized" in report  # one embedding, four blocks with two axes
    assert encoder.pos_embed.shape == (1, 32, 32, larger.model.seg_dim)
    state, own = read(folder), encoder.state_dict()
    for name, tensor in own.items():
        if "pos" not in name:
            assert torch.equal(tensor, state[f"vision_encoder.{name}"])
    ramp = torch.linspace(0, 1, 7)[:, None].expand(-1, 4)
    finer = resize_positions(ramp, torch.Size((13, 4)))[:, 0]
    assert torch.all(finer.diff() >= 0) and abs(finer[6] - 0.5) < 1e-6
    encoder = Segmentor(config.resolve(seg_dim=32, seg_image_size=256)).encoder
    with pytest.raises(ValueError, match="sam-vit-toy does not fit"):
        load_folder(encoder, "seg_encoder", folder)


@pytest.mark.parametrize(
    ("part", "other"),
    [("seg_encoder", "siglip2-toy"), ("image_encoder", "phi3-toy"), ("llm", "sam-vit-toy")],
)
def test_a_folder_of_another_model_is_refused(world, config, segmentor, model, part, other):
    module = segmentor.encoder if part == "seg_encoder" else getattr(model, part)
    before = snapshot(module)
    with pytest.raises(ValueError, match=f"{other}: a .* model; as {part} known are"):
        load_folder(module, part, world / "weights" / other)
    if part != "seg_encoder":
        with pytest.raises(ValueError, match=f"{other}: a .* model"):
            complete_architecture(config, part, world / "weights" / other)
    assert same(snapshot(module), before)


@pytest.mark.parametrize("part", ["seg_encoder", "image_encoder", "llm"])
@pytest.mark.parametrize("damage", ["cut short", "absent", "no config.json"])
def test_a_damaged_folder_is_named(world, config, segmentor, model, tmp_path, part, damage):
    name = getattr(config.model, part)
    shutil.copytree(world / "weights" / name, tmp_path / name)
    path = tmp_path / name / ("config.json" if damage == "no config.json" else MODEL_FILE)
    content = path.read_bytes()[:-100]
    path.unlink()
    if damage == "cut short":
        path.write_bytes(content)
    module = copy.deepcopy(segmentor.encoder if part == "seg_encoder" else getattr(model, part))
    with pytest.raises(ValueError, match=name):
        load_folder(module, part, path.parent)


def test_a_folder_that_says_otherwise_than_the_configuration_is_refused(world, config):
    other = config.model.image_encoder_config | {"intermediate_size": 96}
    config = config.resolve(image_encoder_config=other)
    with pytest.raises(ValueError, match="intermediate_size is 128, the configuration has 96"):
        complete_architecture(
            config, "image_encoder", world / "weights" / config.model.image_encoder
        )


def test_a_folder_tells_what_the_configuration_does_not(world, config, tmp_path):
    """Numbers without a tensor (an epsilon, a window, how pixels are made) decide outcomes too."""
    shutil.copytree(world / "weights/phi3-toy", tmp_path / "llm")
    path = tmp_path / "llm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 77}))
    config = complete_architecture(config, "llm", tmp_path / "llm")
    assert config.model.llm_config["sliding_window"] == 77
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    shutil.copytree(world / "weights/siglip2-toy", tmp_path / "eyes")
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (tmp_path / "eyes/preprocessor_config.json").write_text(json.dumps(said))
    config = complete_architecture(config, "image_encoder", tmp_path / "eyes")
    assert config.model.image_mean == (0.1, 0.2, 0.3) and config.model.image_std[2] == 0.6
    assert config.model.image_resample == "bilinear"


def test_a_folder_without_a_tokenizer_or_its_template_is_named(world, config, tmp_path):
    with pytest.raises(ValueError, match="siglip2-toy"):
        read_tokenizer(world / "weights" / config.model.image_encoder)
    words = read_tokenizer(world / "weights" / config.model.llm)
    words.chat_template = None
    words.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no chat template; put .*chat_template\.jinja"):
        read_tokenizer(tmp_path)


# ---- published checkpoints -----------------------------------------------------------------------


def published(model: XSAM | Segmentor, generation: str) -> dict[str, Tensor]:
    """The model's tensors under the published names, written out here apart from the table of
    weights.py, with what the published files hold besides."""
    vision = "vision_encoder" if generation == "current" else "visual_encoder"
    head = "class_predictor." if generation == "current" else ""
    linear = "class_predictor.predictor" if generation == "current" else "class_predictor"
    prefixes = {
        "segmentor.connector.model.": "seg_connector.model.",
        "segmentor.class_head.logit_scale": f"segmentor.{head}logit_scale",
        "segmentor.class_head.predictor": f"segmentor.{linear}",
        "image_encoder.model.": f"{vision}.vision_model.",
        "llm.model.": "llm.",
        "image_projector.": "visual_projector.",
        "background_embedding.": "bg_embeds.",
    }
    state = {}
    for name, parameter in model.named_parameters():
        name = model.prefix + name
        for ours, theirs in prefixes.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        state[name] = parameter.detach().bfloat16()
    state["segmentor.criterion.empty_weight"] = torch.ones(4)
    state["segmentor.shared_image_embedding.positional_embedding"] = torch.randn(2, 8)
    return state


def write_published(state: dict[str, Tensor], folder: Path, kind: str) -> Path:
    folder.mkdir()
    if kind == "bin":
        torch.save({"state_dict": state}, folder / "pytorch_model.bin")
        return folder
    save_file(state, folder / MODEL_FILE)
    if kind == "sharded":
        split_in_two(folder)
    return folder / MODEL_FILE if kind == "file" else folder


@pytest.mark.parametrize("generation", ["current", "archived"])
@pytest.mark.parametrize("kind", ["folder", "file", "sharded", "bin"])
def test_a_published_model_comes_back_bit_by_bit(model, world, generation, kind, tmp_path):
    """Loaded, saved and read again, every tensor under a published name is the same bytes."""
    state = published(model, generation)
    path = write_published(state, tmp_path / "theirs", kind)
    tokenizer = world / "weights" / model.config.model.llm
    said = []
    loaded = XSAM.from_pretrained(path, config=toy(), tokenizer=tokenizer, report=said.append)
    assert f"published checkpoint of stage 3, {generation} generation" in said[0]
    assert "2 not used: segmentor.criterion.empty_weight, segmentor.shared_image_emb" in said[1]
    loaded.save_pretrained(tmp_path / "ours", max_shard_bytes=10**6)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    back = read(tmp_path / "ours")
    known = {
        name.replace("visual_encoder.", "vision_encoder.").replace(
            "segmentor.logit_scale", "segmentor.class_predictor.logit_scale"
        ): tensor
        for name, tensor in state.items()
        if "criterion" not in name and "shared_image" not in name
    }
    assert same(back, known)
    again = XSAM.from_pretrained(tmp_path / "ours", report=said.append)
    assert same(snapshot(again), snapshot(loaded))
    assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    assert again.config == loaded.config


def test_the_archived_generation_clamps_wider_and_pools_by_maximum(tmp_path, monkeypatch, model):
    """Without a configuration the preset is meant; here the toy stands in for it."""
    monkeypatch.setattr("xsam.inference.xsam", toy)
    for generation, clamp, pooling in (("current", 50.0, "mean"), ("archived", 500.0, "max")):
        folder = tmp_path / generation
        write_published(published(model, generation), folder, "folder")
        model.tokenizer.save_pretrained(folder)
        loaded = XSAM.from_pretrained(folder, report=lambda _: None)
        assert loaded.config.model.logit_clamp == loaded.segmentor.class_head.clamp == clamp
        assert loaded.config.model.region_pooling == pooling


def test_published_tables_may_end_with_the_three_tokens(model, world, tmp_path):
    """The published code cuts the tables to the tokenizer's length, and numbers <SEG> first."""
    words = read_tokenizer(world / "weights/phi3-toy")
    known = len(words)
    state = published(model, "current")
    for name in ("llm.model.embed_tokens.weight", "llm.lm_head.weight"):
        state[name] = state[name][: known + 3].clone()
    path = write_published(state, tmp_path / "theirs", "file")
    options = {"config": toy(), "report": lambda _: None}
    loaded = XSAM.from_pretrained(path, tokenizer=world / "weights/phi3-toy", **options)
    ids = loaded.llm.special_ids
    assert ids == (known, known + 1, known + 2)
    assert loaded.config.model.llm_config["vocab_size"] == known + 3
    words.add_tokens(["<another>"])
    words.save_pretrained(tmp_path / "longer")
    with pytest.raises(ValueError, match=r"longer: \d+ tokens with .*the tokenizer of another"):
        XSAM.from_pretrained(path, tokenizer=tmp_path / "longer", **options)
    with pytest.raises(ValueError, match="no tokenizer could be read"):
        XSAM.from_pretrained(path, **options)


@pytest.mark.parametrize("generation", ["current", "archived"])
def test_a_published_segmentor(segmentor, generation, tmp_path):
    path = write_published(published(segmentor, generation), tmp_path / "theirs", "bin")
    loaded, stage = load_checkpoint(path, config=toy(), dtype=torch.float32)
    assert stage == 1 and isinstance(loaded, Segmentor)
    expected = {name: x.bfloat16().float() for name, x in snapshot(segmentor).items()}
    assert same(snapshot(loaded), expected)
    with pytest.raises(ValueError, match="the segmentor of stage 1 alone"):
        XSAM.from_pretrained(path, config=toy())


@pytest.mark.parametrize("generation", ["current", "archived"])
def test_a_model_starts_from_published_parts(model, segmentor, generation, tmp_path):
    """--init: the segmentor of stage 1 without its linear head, then the projectors of stage 2."""
    one = write_published(published(segmentor, generation), tmp_path / "one", "bin")
    whole = published(model, generation)
    projectors = {name: x for name, x in whole.items() if re.match("(visual|seg)_projector", name)}
    two = write_published(projectors, tmp_path / "two", "folder")
    with pytest.raises(ValueError, match="stage 2 holds the projectors alone"):
        load_checkpoint(two, config=toy())

    fresh = XSAM(model.config)
    before = snapshot(fresh)
    for path in (one, two):
        assert "loaded" in load_init(fresh, path, ())
    after = snapshot(fresh)
    for name, tensor in after.items():
        if name.startswith(("image_projector", "seg_projector")):
            assert torch.equal(tensor, snapshot(model)[name].bfloat16().float())
        elif name.startswith("segmentor.") and "class_head" not in name:
            own = snapshot(segmentor)[name.removeprefix("segmentor.")]
            assert torch.equal(tensor, own.bfloat16().float())
        else:
            assert torch.equal(tensor, before[name])

    lacking = dict(projectors)
    lacking.pop("seg_projector.model.0.bias")
    path = write_published(lacking, tmp_path / "lacking", "folder")
    with pytest.raises(ValueError, match=r"missing: seg_projector\.model\.0\.bias"):
        load_init(fresh, path, ())
    assert "as allowed" in load_init(fresh, path, ("seg_projector.",))


def test_a_whole_published_model_may_lack_rows_that_no_token_has(model, tmp_path):
    state = published(model, "current")
    for name in ("llm.model.embed_tokens.weight", "llm.lm_head.weight"):
        state[name] = state[name][:200].clone()
    path = write_published(state, tmp_path / "theirs", "file")
    fresh = XSAM(model.config)
    before = snapshot(fresh)["llm.model.lm_head.weight"]
    line = load_init(fresh, path, ())
    assert "2 resized: llm.lm_head.weight, llm.model.embed_tokens.weight" in line
    head = snapshot(fresh)["llm.model.lm_head.weight"]
    assert torch.equal(head[:200], state["llm.lm_head.weight"].float())
    assert torch.equal(head[200:], before[200:])


@pytest.mark.parametrize("change", ["renamed", "another shape", "missing part"])
def test_a_published_model_that_does_not_fit_is_refused(model, world, change, tmp_path):
    state = published(model, "current")
    name = "segmentor.pixel_decoder.level_embed"
    if change == "renamed":
        state["segmentor.pixel_decoder.level_embeds"] = state.pop(name)
        expected = f"unexpected: {name}s in "
    elif change == "another shape":
        state[name] = torch.zeros(4, 64)
        expected = f"shape: {name} is [4, 64] in "
    else:
        state = {key: x for key, x in state.items() if not key.startswith("bg_embeds")}
        expected = "missing: bg_embeds.weight in "
    path = write_published(state, tmp_path / "theirs", "file")
    options = dict(tokenizer=world / "weights/phi3-toy", report=lambda _: None)
    with pytest.raises(ValueError) as error:
        XSAM.from_pretrained(path, config=toy(), **options)
    assert expected in str(error.value) and str(path) in str(error.value)
    if change == "missing part":
        torch.manual_seed(3)
        options |= dict(allow_missing=("bg_embeds.",))
        for dtype in (None, torch.bfloat16):
            loaded = XSAM.from_pretrained(path, config=toy(), dtype=dtype, **options)
            assert torch.isfinite(loaded.background_embedding.weight).all()
            assert not any(parameter.is_meta for parameter in loaded.parameters())
            assert {x.dtype for x in loaded.parameters()} == {dtype or torch.float32}


def test_what_is_no_checkpoint_is_named(world, config, tmp_path):
    with pytest.raises(ValueError, match="absent: no such file"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"phi3-toy: not a checkpoint"):
        load_checkpoint(world / "weights" / config.model.llm)
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors: neither .* such as encoder\.weight"):
        load_checkpoint(tmp_path / "x.safetensors")


# ---- written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["segmentor", "model"])
def test_names_on_disk_are_the_published_ones(request, kind, tmp_path):
    """And each is the name of one tensor."""
    model = request.getfixturevalue(kind)
    save_model(tmp_path, own_tensors(model), model.prefix)
    saved = load_file(tmp_path / MODEL_FILE)
    assert len(saved) == len(own_tensors(model))
    assert {disk_name(name) for name in saved} == set(saved)
    expected = published(model, "current")
    assert set(saved) == {name for name in expected if "crit" not in name and "shared" not in name}


def test_a_folder_is_not_written_over(segmentor, model, tmp_path):
    model.save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="new: not empty"):
        model.save_pretrained(tmp_path / "new")
    loaded = XSAM.from_pretrained(tmp_path / "new", dtype=torch.bfloat16, report=lambda _: None)
    assert all(parameter.dtype == torch.bfloat16 for parameter in loaded.parameters())
    assert not any(buffer.dtype == torch.bfloat16 for buffer in loaded.buffers())


# ---- memory --------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from pathlib import Path
from xsam.config import Config
from xsam.inference import load_checkpoint
from xsam.model import XSAM
from xsam.toy.preset import toy
from xsam.weights import parameters_on_meta

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

with parameters_on_meta():
    XSAM(toy())  # what the libraries import and allocate once
before = kilobytes("VmRSS")
config = Config.from_dict(eval(sys.argv[2]))
model, _ = load_checkpoint(sys.argv[1], config=config, tokenizer=sys.argv[3])
size = sum(parameter.nbytes for parameter in model.parameters())
print((kilobytes("VmHWM") - before) * 1024 / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["ours", "published bin"])
def test_loading_needs_little_more_memory_than_the_weights(world, config, kind, tmp_path):
    """Weights of 0.6 GB: the largest tensor is a small part of them, as in the full model."""
    large = dict(vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    config = config.resolve(llm_config=config.model.llm_config | large)
    words = world / "weights" / config.model.llm
    model = XSAM(config, read_tokenizer(words))
    if kind == "ours":
        model.save_pretrained(tmp_path / "model")
        path = tmp_path / "model"
    else:
        state = {disk_name(name): tensor for name, tensor in own_tensors(model).items()}
        path = tmp_path / "pytorch_model.bin"
        torch.save(state, path)
    del model
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), repr(config.to_dict()), str(words)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(result.stdout.split()[-1]) <= 1.15


def test_code_that_lies_in_a_folder_is_never_run(world, config, tmp_path, monkeypatch):
    """Nor is the user asked about it, as transformers does."""
    folder, ran = tmp_path / "phi3", tmp_path / "ran"
    shutil.copytree(world / "weights" / config.model.llm, folder)
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nclass Theirs: pass\n")
    for file, more in (
        ("config.json", {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Theirs"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}),
    ):
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(values | more))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="no tokenizer could be read"):
        read_tokenizer(folder)
    assert not ran.exists()
