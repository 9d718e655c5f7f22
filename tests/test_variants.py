"""Every alternative that the configuration offers, trained a step in each stage, from tiny folders
that transformers' own classes have written to a saved model that answers as before.

pytest tests/test_variants.py
"""

import argparse
import copy
import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SamConfig,
    SamModel,
    SamVisionConfig,
    SamVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
)

from xsam.checkpoints import load_trained, save_checkpoint
from xsam.cli import parse
from xsam.config import ARCHITECTURES, Config, ModelConfig, xsam
from xsam.data import Batch, Mixture, Processor, Sample
from xsam.datasets.generic import Generic
from xsam.datasets.registry import open_dataset
from xsam.datasets.sources import required_paths
from xsam.encoders import ImageEncoder
from xsam.llm import REGION_TOKEN, LanguageModel
from xsam.losses import Objective
from xsam.model import XSAM, Segmentor
from xsam.optimizer import build_optimizer, freeze
from xsam.results import SegmentationResult
from xsam.starts import init_parts, inspect_init, load_init
from xsam.toy.preset import toy
from xsam.train import (
    load_earlier_stage,
    pretrained_model,
    starting_model,
    step_normalisers,
)
from xsam.variants import SwinEncoder

# ---- folders as the hub has them -----------------------------------------------------------------

VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
VISION |= dict(image_size=32, patch_size=8)
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
TEXT |= dict(vocab_size=40, bos_token_id=1, eos_token_id=2)
LLM = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LLM |= dict(vocab_size=768, max_position_embeddings=512, pad_token_id=0)
LLM |= dict(bos_token_id=1, eos_token_id=2)
SWIN = dict(embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=4, image_size=64)
SMALL_VOCABULARY = 100  # fewer rows than the toy tokenizer has tokens


def sam_model() -> SamModel:
    vision = SamVisionConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_dim=48,
        image_size=64,
        patch_size=8,
        window_size=3,
        global_attn_indexes=[1],
        output_channels=32,
    )
    prompts = dict(hidden_size=32, image_size=64, patch_size=8, mask_input_channels=4)
    masks = dict(hidden_size=32, mlp_dim=32, num_hidden_layers=1, num_attention_heads=2)
    masks |= dict(iou_head_hidden_dim=32)
    configs = dict(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks)
    return SamModel(SamConfig(**configs))


def mask2former_model() -> Mask2FormerForUniversalSegmentation:
    backbone = SwinConfig(**SWIN, out_features=["stage1", "stage2", "stage3", "stage4"])
    sizes = dict(hidden_dim=32, feature_size=32, mask_feature_size=32, num_queries=3)
    sizes |= dict(encoder_layers=1, decoder_layers=2, num_attention_heads=2)
    sizes |= dict(encoder_feedforward_dim=32, dim_feedforward=32)
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, **sizes))


def language_model(model_type: str, **others) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **LLM | others))


MAKE: dict[str, Callable[[], nn.Module]] = {
    "sam": sam_model,
    "swin": mask2former_model,
    "clip": lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),  # the tower alone
    "siglip2": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)),
    "phi3": lambda: language_model("phi3", original_max_position_embeddings=512),
    "qwen3": lambda: language_model(
        "qwen3", num_key_value_heads=2, head_dim=16, rope_theta=5e4, tie_word_embeddings=True
    ).bfloat16(),  # as the hub's is
    "llama": lambda: language_model("llama", vocab_size=SMALL_VOCABULARY),
}
LLMS = ("phi3", "qwen3", "llama")


@pytest.fixture(scope="module")
def weights(world, tmp_path_factory) -> Path:
    """The weights root."""
    root = tmp_path_factory.mktemp("weights")
    tokenizer = AutoTokenizer.from_pretrained(world / "weights/phi3-toy")
    for name, make in MAKE.items():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():  # some start at zero
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
        if name in LLMS:
            tokenizer.save_pretrained(root / name)
    return root


def tiny(**changes) -> Config:
    """The toy preset, smaller still. `changes` are fields of the model; the sizes of the language
    model come from its folder."""
    config = toy()
    sizes = dict(
        seg_encoder="sam",
        seg_image_size=64,
        seg_patch_size=8,
        seg_dim=32,
        seg_depth=3,
        seg_mlp_dim=48,
        seg_window_size=3,
        seg_global_blocks=(1,),
        seg_neck_dim=32,
        image_encoder="siglip2",
        image_encoder_config=dict(model_type="siglip_vision_model") | VISION,
        llm="phi3",
        llm_config={},
        connector_dim=16,
        connector_layers=(1, 2, 3),
        num_region_points=8,
        decoder_dim=32,
        pixel_decoder_mlp_dim=32,
        decoder_layers=2,
        decoder_mlp_dim=32,
        num_queries=12,
    )
    model = dataclasses.replace(config.model, **sizes | changes)
    return dataclasses.replace(config, model=model).resolve(
        num_points=64,
        max_new_tokens=2,
        presence=0.0,
        score_threshold=0.0,
        overlap_threshold=0.0,
        global_batch_size=4,
        micro_batch_size=2,
        weight_decay=0.0,  # so that nothing moves without a gradient
    )


# What changes in `tiny`.
VARIANTS = {
    "SAM, SigLIP2, Phi-3, conv, three scales, Mask2Former": {},
    "image encoder CLIP": dict(
        image_encoder="clip", image_encoder_config=dict(model_type="clip_vision_model") | VISION
    ),
    "image encoder SigLIP": dict(image_encoder="siglip", image_encoder_config={}),  # its folder's
    "image encoder none": dict(image_encoder="none", image_encoder_config={}),
    "Qwen3": dict(llm="qwen3"),
    "Llama": dict(llm="llama"),
    "Swin": dict(
        seg_encoder="swin",
        seg_backbone_config=dict(model_type="swin") | SWIN,
        seg_dim=4 * SWIN["embed_dim"],
        seg_patch_size=16,
    ),
    "connector linear": dict(connector="linear"),
    "one scale": dict(connector_scales=(1.0,), connector_layers=(3,)),
    "four scales": dict(connector_scales=(4.0, 2.0, 1.0, 0.5), connector_layers=(1, 2, 2, 3)),
    "image tokens alone": dict(seg_tokens=False),
    "two vectors a region": dict(num_region_vectors=2),
    "decoder SAM": dict(decoder="sam", num_queries=2),  # fewer than an image has masks
}
VARIANTS["Swin, image encoder none, Qwen3"] = (
    VARIANTS["Swin"] | VARIANTS["image encoder none"] | VARIANTS["Qwen3"]
)


def silent(_: str) -> None:
    pass


# ---- what is read from a folder ------------------------------------------------------------------


def reference_outputs(name: str, folder: Path, inputs: Tensor) -> list[Tensor]:
    """What transformers computes with the folder."""
    model = type(MAKE[name]()).from_pretrained(folder, dtype=torch.float32).eval()
    if name == "sam":
        return [model.vision_encoder(inputs).last_hidden_state]
    if name == "swin":
        return list(model.model.pixel_level_module.encoder(inputs).feature_maps)
    if name in LLMS:
        return [model(input_ids=inputs).logits]
    tower = model.vision_model if name != "siglip" else model
    layers = tower.encoder.layers
    seen = []
    layers[-1].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    tower(pixel_values=inputs)
    return [seen[0][:, -16:]]  # CLIP's class token is the first


def own_outputs(name: str, model: Segmentor | XSAM, inputs: Tensor) -> list[Tensor]:
    if name == "sam":
        return [model.encoder.neck(model.encoder(inputs)[-1])]
    if name == "swin":
        return [x.permute(0, 3, 1, 2) for x in model.encoder(inputs)[:4]]
    if name in LLMS:
        return [model.llm.model(input_ids=inputs).logits[..., :SMALL_VOCABULARY]]
    return [model.image_encoder(inputs)]


@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_a_folder_means_what_transformers_means_by_it(weights, name):
    part = {"sam": "seg_encoder", "swin": "seg_encoder"}.get(name, "image_encoder")
    part = "llm" if name in LLMS else part
    changes = VARIANTS["Swin"] if name == "swin" else {part: name, "image_encoder_config": {}}
    stage = 1 if part == "seg_encoder" else 3
    model = pretrained_model(stage, tiny(**changes), weights, silent).eval()
    generator = torch.Generator().manual_seed(0)
    side = 64 if stage == 1 else 32
    inputs = torch.randn(2, 3, side, side, generator=generator)
    if part == "llm":
        inputs = torch.randint(0, SMALL_VOCABULARY, (2, 9), generator=generator)
    expected = reference_outputs(name, weights / name, inputs)
    for ours, theirs in zip(own_outputs(name, model, inputs), expected, strict=True):
        theirs = theirs[..., :SMALL_VOCABULARY] if part == "llm" else theirs
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    if part == "llm":
        tables = model.llm.model.get_input_embeddings(), model.llm.model.get_output_embeddings()
        assert (tables[0].weight is tables[1].weight) == (name == "qwen3")


@pytest.mark.parametrize(("stage", "llm"), [(1, "phi3"), (3, "phi3"), (3, "qwen3")])
def test_parameters_alone_are_of_the_training_dtype(weights, stage, llm):
    """bfloat16 would bend the angles of the language model's positions."""
    models = []
    for dtype in ("float32", "bfloat16"):
        config = tiny(llm=llm).resolve(dtype=dtype)
        torch.manual_seed(0)
        models.append(pretrained_model(stage, config, weights, silent))
        assert {parameter.dtype for parameter in models[-1].parameters()} == {getattr(torch, dtype)}
    for name, parameter in models[1].named_parameters():
        assert torch.equal(parameter, models[0].get_parameter(name).bfloat16())
    buffers = dict(models[1].named_buffers())
    for name, buffer in models[0].named_buffers():
        assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer)
    if stage == 3:
        (angles,) = {name for name in buffers if name.endswith("rotary_emb.inv_freq")}
        assert buffers[angles].dtype == torch.float32
        assert not torch.equal(buffers[angles], buffers[angles].bfloat16().float())


def test_a_vocabulary_that_outgrows_its_table_grows_it(weights):
    """As that of Vicuna does; what the folder holds stays as it is."""
    config = tiny(llm="llama")
    model = pretrained_model(3, config, weights, silent)
    count = len(model.tokenizer)
    assert count > SMALL_VOCABULARY and model.config.model.llm_config["vocab_size"] == count
    assert config == tiny(llm="llama")  # the configuration that was given is as it was
    folder = AutoModelForCausalLM.from_pretrained(weights / "llama")
    for table in ("get_input_embeddings", "get_output_embeddings"):
        theirs = getattr(folder, table)().weight
        ours = getattr(model.llm.model, table)().weight
        assert ours.shape == (count, 32) and len(theirs) == SMALL_VOCABULARY
        assert torch.equal(ours[:SMALL_VOCABULARY], theirs)
        mean = theirs.mean(0).expand(count - SMALL_VOCABULARY, -1)
        torch.testing.assert_close(ours[SMALL_VOCABULARY:], mean)


def test_a_run_of_all_stages_meets_the_vocabulary_it_grew(weights):
    """The stages of one command share a configuration."""
    config = tiny(llm="llama")
    for stage in (2, 3):
        model = pretrained_model(stage, config, weights, silent)
        assert model.llm.model.get_input_embeddings().num_embeddings == len(model.tokenizer)


def test_stage_1_needs_no_image_encoder(world, weights):
    """Whose architecture, where the name says nothing of it, is read in the stage that uses it."""
    model = pretrained_model(
        1, tiny(image_encoder="my-model", image_encoder_config={}), weights, silent
    )
    train_step(model, 1, training_batches(model, 1, "coco_panoptic", world / "data"))


@pytest.mark.parametrize("frozen", ["segmentor.encoder", "llm"])
def test_a_stage_with_a_frozen_part_is_resumed(weights, tmp_path, frozen):
    config = tiny().resolve(learning_rates={"": 1e-3, frozen: 0.0})
    model, other = (pretrained_model(3, config, weights, silent) for _ in range(2))
    for each in (model, other):
        freeze(each, config.stages[3], "")
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    names = {name for name, _ in model.named_parameters()}
    assert trainable == names - under(names, f"{frozen}.")
    load_trained(other, save_checkpoint(tmp_path, model, config, model.tokenizer, 3, 1, {}))
    state, expected = other.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in trainable)


# ---- training ------------------------------------------------------------------------------------

PROJECTORS = ("image_projector.", "seg_projector.")  # all that stage 2 trains
DATASETS = {
    "generic": "coco_panoptic",
    "refer": "refcoco",
    "reason": "reasonseg",
    "gcg": "gcg_grandf",
    "interactive": "coco_interactive",
    "vgd": "coco_vgd",
    "chat": "llava_instruct",
}

# A key's bias adds the same to all scores of a query, and softmax takes no notice: its gradient is
# rounding.
KEY_BIAS = re.compile(r"\.(k_proj|key)\.bias$")
# A query of SAM's decoder has a mask MLP of its own, which learns where the query is matched: in
# referring, with one mask for a phrase, not every query is.
MASK_MLPS = "segmentor.decoder.output_hypernetworks_mlps."


def under(names: Iterable[str], *prefixes: str) -> set[str]:
    return {name for name in names if name.startswith(prefixes)}


def unread(model: Segmentor | XSAM, task: str) -> tuple[str, ...]:
    """Beginnings of the names, in the whole model, that no loss of `task` reads."""
    segmentor = model if isinstance(model, Segmentor) else model.segmentor
    # The image tokens are the hidden state before the last layer.
    tower = "image_encoder.model."
    names = [tower + part for part in ("encoder.layers.2.", "post_layernorm.", "head.")]
    if segmentor.pixel_decoder is not None:
        names.append("segmentor.encoder.neck.")  # only SAM's decoder reads it
        layers = segmentor.pixel_decoder.encoder.layers
        if not any(layer.self_attn.sampling_offsets.weight.any() for layer in layers):
            # Before the first step: the codes of the levels steer where deformable attention looks
            # by weights that start at zero.
            names.append("segmentor.pixel_decoder.level_embed")
    if task == "chat":
        # The language model is shown the last hidden state but one.
        if isinstance(segmentor.encoder, SwinEncoder):
            swin = "segmentor.encoder.model."
            names += [f"{swin}hidden_states_norms.", f"{swin}swin.encoder.layers.2.downsample."]
            names.append(f"{swin}swin.encoder.layers.3.")
        else:
            names += ["segmentor.encoder.layers.2.", "segmentor.encoder.neck."]
        if model.stage == 3 and model.seg_projector is None:  # it is shown the image tokens alone
            names.append("segmentor.encoder.")
        names += [f"segmentor.{part}." for part in ("connector", "pixel_decoder", "decoder")]
        names += ["segmentor.class_head.", "llm_projector.", "background_embedding."]
    return tuple(names)


def training_batches(model: Segmentor | XSAM, number: int, dataset: str, data: Path) -> list[Batch]:
    """The micro-batches of a stage's first step, were `dataset` its only one."""
    opened, stage = open_dataset(dataset, data, number == 1), model.config.stages[number]
    if isinstance(opened, Generic):
        model.config = model.config.resolve(categories=opened.categories)
    processor = Processor(model.config, model.tokenizer)
    mixture = Mixture([opened], processor, stage, model.config.seed)
    draws = mixture.micro_batches(0, 0, 1)
    count = stage.global_batch_size // stage.micro_batch_size
    return [processor.collate([mixture[draw] for draw in next(draws)]) for _ in range(count)]


def train_step(model: Segmentor | XSAM, number: int, batches: list[Batch]) -> None:
    """One step as `train_stage` makes it, but for clipping and schedule. Exactly what is not frozen
    and not `unread` gets a gradient and moves."""
    config, stage = model.config, model.config.stages[number]
    task, prefix = batches[0].task, "segmentor." if number == 1 else ""
    freeze(model, stage, prefix)
    optimizer = build_optimizer(model, stage, prefix)
    parameters = {prefix + name: parameter for name, parameter in model.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    read = set(parameters) - under(parameters, *unread(model, task))
    if number == 2:
        read = under(read, *PROJECTORS)
    either = {name for name in read if KEY_BIAS.search(name)}
    if task in ("refer", "reason", "interactive"):  # one mask for each <SEG>
        either |= under(read, MASK_MLPS)

    model.train()
    normalisers = step_normalisers(batches, config, torch.device("cpu"))
    expected = set() if task == "chat" else {"class", "mask", "dice"}
    expected |= {"text"} if number > 1 else set()
    for batch in batches:
        losses = Objective(model, config)(batch, normalisers)
        assert set(losses) == expected
        assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
        sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    optimizer.step()
    with_gradient = {name for name, grad in gradients.items() if grad is not None and grad.any()}
    moved = {name for name, value in parameters.items() if not torch.equal(value, before[name])}
    assert all(torch.isfinite(parameter).all() for parameter in parameters.values())
    assert with_gradient | either == read
    assert moved | either == read
    optimizer.zero_grad(set_to_none=True)


def check_beginning(model: XSAM, earlier: dict[int, nn.Module]) -> None:
    """Stages 2 and 3 go on with what the earlier ones trained, but for the class head."""
    state = model.state_dict()
    expected = {
        f"segmentor.{name}": value
        for name, value in earlier[1].state_dict().items()
        if not name.startswith("class_head.")
    }
    if 2 in earlier:
        trained = earlier[2].state_dict()
        expected |= {name: trained[name] for name in under(trained, *PROJECTORS)}
    different = [name for name, value in expected.items() if not torch.equal(state[name], value)]
    assert not different


def trained_stages(variant: str, world: Path, weights: Path, out: Path) -> XSAM:
    """Stages 1, 2 and 3, each begun anew as by its own command, a step for each of its tasks."""
    models = {}
    for number in (1, 2, 3):
        torch.manual_seed(number)
        config = tiny(**VARIANTS[variant])
        model = pretrained_model(number, config, weights, silent)
        for earlier in models:
            load_earlier_stage(model, earlier, out)
        if models:
            check_beginning(model, models)
        datasets = DATASETS.values() if number == 3 else config.stages[number].datasets
        for dataset in datasets:
            batches = training_batches(model, number, dataset, world / "data")
            train_step(model, number, batches)
        about = model.config, model.tokenizer, number, 1, {}
        save_checkpoint(out / f"stage{number}", model, *about)
        models[number] = model
    return models[3]


# ---- answers -------------------------------------------------------------------------------------


def same_answers(one: SegmentationResult, other: SegmentationResult) -> bool:
    return (
        one.answer == other.answer
        and one.labels == other.labels
        and one.scores == other.scores
        and np.array_equal(one.masks, other.masks)
    )


def replies(model: XSAM) -> list[SegmentationResult]:
    """To every kind of request, on pictures of two sizes: first as the model pleases, then as one
    that says <SEG>."""
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        for size in ((40, 64), (50, 30))
    ]
    found = model.predict(pictures, "chat", "What color is the ring?")
    found += model.predict(pictures, "refer", ["the ring", "the red star"])

    def say_seg(_: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., model.llm.special_ids[0]] = 1e4
        return logits

    hook = model.llm.model.get_output_embeddings().register_forward_hook(say_seg)
    segmented = model.predict(pictures, "refer", ["the ring", "the red star"])
    segmented += model.predict(pictures, "panoptic", things=["ring", "star"], stuff=["dots"])
    hook.remove()
    for prediction, name in zip(segmented, ("the ring", "the red star", None, None), strict=True):
        assert prediction.answer.startswith("<SEG>")
        assert prediction.masks.shape[1:] == prediction.image.size[::-1]
        assert np.isfinite(prediction.scores).all()
        assert name is None or prediction.labels == [name]
    return found + segmented


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_answers_and_comes_back(world, weights, tmp_path, variant):
    model = trained_stages(variant, world, weights, tmp_path / "run")
    said = replies(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = XSAM.from_pretrained(tmp_path / "saved", report=silent)
    assert loaded.config == model.config
    # Those that are tied count once.
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in loaded.named_parameters()] == names
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert all(map(same_answers, replies(loaded), said))


# ---- visual prompts ------------------------------------------------------------------------------


def region_batch(config: Config, tokenizer) -> Batch:
    """Two images with a visual prompt for each of their masks."""
    rng = np.random.default_rng(0)
    processor = Processor(config, tokenizer)
    encoded = []
    for count in (2, 1):
        masks = np.zeros((count, 64, 64), bool)
        for number, mask in enumerate(masks):
            mask[8 + 20 * number : 30 + 20 * number, 10 : 50 - 12 * number] = True
        question = "Segment " + ", ".join(["<p><region></p>"] * count)
        sample = Sample(
            sample_id="regions",
            task="vgd",
            image=Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)),
            turns=[(question, "Sure, <SEG>.")],
            masks=masks,
            labels=np.arange(count),
            names=[f"kind {number}" for number in range(count)],
            regions=masks,
        )
        encoded.append(processor.encode(sample))
    return processor.collate(encoded)


def test_region_pooling_max_is_not_mean_and_both_train(weights):
    vectors, losses = {}, {}
    for pooling in ("mean", "max"):
        torch.manual_seed(0)
        config = tiny(region_pooling=pooling)
        model = pretrained_model(3, config, weights, silent)
        batch = region_batch(config, model.tokenizer)
        embeddings, _ = model.encode(batch)
        vectors[pooling] = embeddings[batch.input_ids == REGION_TOKEN]  # [3, C]
        vectors[pooling].square().sum().backward()  # of the regions alone
        parameters = dict(model.named_parameters())
        for name in under(parameters, "seg_projector.", "segmentor.encoder.patch_embed."):
            assert parameters[name].grad.any(), name
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            losses[pooling] = model(batch).token_loss
        train_step(model, 3, [batch])
    assert (vectors["max"] >= vectors["mean"]).all()
    assert (vectors["max"] > vectors["mean"]).any(dim=1).all()
    assert losses["max"] != losses["mean"]


# ---- where a stage begins ------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("init", ["none", "stage 2", "stage 1", "SAM's folder"])
def test_no_stage_begins_with_a_random_segmentation_encoder(weights, tmp_path, stage, init):
    """Without stage 1 the public folder is loaded (paper, table 8, row "S3")."""
    config, lines = tiny().resolve(stages=(stage,), starts_from=()), []
    public = pretrained_model(1, tiny(), weights, silent)
    expected, paths = public.encoder.state_dict(), []
    if init == "stage 1":
        with torch.no_grad():
            public.encoder.pos_embed.add_(1)
        paths = [save_checkpoint(tmp_path / "1", public, tiny(), None, 1, 1, {})]
    elif init == "stage 2":
        earlier = pretrained_model(2, tiny(), weights, silent)
        freeze(earlier, tiny().stages[2], "")
        about = earlier, tiny(), earlier.tokenizer, 2, 1, {}
        paths = [save_checkpoint(tmp_path / "2", *about)]
    elif init == "SAM's folder":
        paths = [weights / "sam"]
    options = argparse.Namespace(weights=weights, out=tmp_path, stages=[stage], init=paths)
    options.allow_missing = []
    model = starting_model(stage, config, options, lines.append)
    found = model.segmentor.encoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sum("segmentor.encoder" in line for line in lines) == 1
    _, brought, replaced = inspect_init(config, paths, stage)
    assert ("segmentor.encoder" in brought) == (init in ("stage 1", "SAM's folder"))
    required = required_paths(config, [stage], Path("d"), weights, tmp_path, replaced)
    assert ((weights / "sam") in dict(required)) == (init in ("none", "stage 2"))


def test_init_takes_the_folders_of_other_parts(weights):
    model = pretrained_model(3, tiny(), weights, silent)
    with torch.no_grad():
        for parameter in model.image_encoder.parameters():
            parameter.zero_()
    assert init_parts(weights / "siglip2", 3) == {"image_encoder"}
    assert "siglip2" in load_init(model, weights / "siglip2", ())
    assert all(parameter.any() for parameter in model.image_encoder.parameters())
    with pytest.raises(ValueError, match="this model has no image_encoder"):
        load_init(Segmentor(tiny()), weights / "siglip2", ())


def test_regions_of_image_tokens_are_read_where_they_are_in_the_image(world):
    """The image encoder squashes an image, the canvas pads it: a point in the middle of a wide
    image is in the middle of the tokens' grid."""
    config = tiny(seg_tokens=False, num_region_points=4)
    processor = Processor(config, AutoTokenizer.from_pretrained(world / "weights/phi3-toy"))
    mask = np.zeros((20, 60), bool)
    mask[10, 30] = True
    sample = Sample("wide", "vgd", Image.new("RGB", (60, 20)), [], mask[None], np.zeros(1, int))
    sample.regions = mask[None]
    (points,) = processor.region_points(sample, processor.fit(sample.image), None)
    assert torch.allclose(points, torch.full((4, 2), 0.5), atol=0.03)
    processor.config = config.resolve(seg_tokens=True)
    (points,) = processor.region_points(sample, processor.fit(sample.image), None)
    assert torch.allclose(points[:, 0], torch.full((4,), 0.5 / 3), atol=0.03)


# ---- the command line ----------------------------------------------------------------------------


def parsed(*flags: str, config: str = "xsam") -> ModelConfig:
    _, settings = parse(["--stage", "1", "--config", config, *flags])
    return settings.model


NAMES = [(part, name) for part, known in ARCHITECTURES.items() for name in known]


@pytest.mark.parametrize(("part", "name"), NAMES)
def test_a_name_brings_its_architecture_and_nothing_else(part, name):
    expected = ARCHITECTURES[part][name] | {part: name}
    if part == "seg_encoder":
        expected = {"seg_backbone_config": {}} | expected
    assert parsed(f"--{part}", name) == dataclasses.replace(xsam().model, **expected)


def test_names_of_several_parts():
    """The README's examples, together."""
    model = parsed(
        "--llm", "Qwen3-1.7B", "--image_encoder", "none", "--seg_encoder", "sam-vit-base",
        "--decoder", "sam",
    )  # fmt: skip
    assert (model.llm_config["model_type"], model.llm_config["hidden_size"]) == ("qwen3", 2048)
    assert (model.image_encoder, model.image_encoder_config) == ("none", {})
    assert (model.seg_dim, model.seg_depth, model.seg_heads, model.seg_mlp_dim) == (
        768,
        12,
        12,
        3072,
    )
    assert model.connector_layers == (6, 9, 12) and model.seg_global_blocks == (2, 5, 8, 11)
    assert (model.decoder, model.decoder_layers) == ("sam", 2)
    assert model.seg_neck_dim == model.decoder_dim
    swin = parsed("--seg_encoder", "mask2former-swin-large-coco-panoptic")
    assert swin.seg_backbone_config["depths"] == [2, 2, 18, 2] and swin.seg_dim == 768


def test_an_unknown_segmentation_encoder_is_refused(capsys):
    """It would mean SAM-L otherwise."""
    with pytest.raises(SystemExit):
        parsed("--seg_encoder", "sam-vit-giant")
    message = capsys.readouterr().err
    assert "unknown seg_encoder sam-vit-giant; known are sam-vit-base, sam-vit-large" in message
    assert parsed("--seg_encoder", "sam-vit-toy", config="toy").seg_dim == 64


def test_a_flag_wins_over_what_a_name_brings():
    """Wherever it stands."""
    for flags in (
        ["--seg_encoder", "sam-vit-base", "--seg_depth", "15"],
        ["--seg_depth", "15", "--seg_encoder", "sam-vit-base"],
    ):
        model = parsed(*flags)
        assert (model.seg_depth, model.seg_dim) == (15, 768)
    assert parsed("--decoder", "sam", "--decoder_layers", "3").decoder_layers == 3
    model = parsed("--llm", "Qwen3-1.7B", "--llm_config", '{"model_type": "llama"}')
    assert model.llm_config == {"model_type": "llama"}


def test_sams_name_puts_an_end_to_swin():
    config = xsam().resolve(seg_backbone_config=dict(model_type="swin") | SWIN)
    assert config.resolve(seg_encoder="sam-vit-base").model.seg_backbone_config == {}


def test_a_name_leaves_the_table_of_architectures_as_it_is():
    before = copy.deepcopy(ARCHITECTURES)
    parsed("--llm", "Qwen3-1.7B").llm_config["vocab_size"] = 1  # nobody should
    assert before == ARCHITECTURES


@pytest.mark.parametrize("part", ["llm", "image_encoder"])
def test_the_architecture_of_an_unknown_name_is_left_to_its_folder(part):
    model = parsed(f"--{part}", "my-model")
    expected = {part: "my-model", f"{part}_config": {}}
    assert model == dataclasses.replace(xsam().model, **expected)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("connector", "mlp"),
        ("decoder", "mask2"),
        ("region_pooling", "median"),
        ("image_resample", "nearest"),
    ],
)
def test_a_value_that_is_none_of_a_fields_is_refused(flag, value, capsys):
    with pytest.raises(SystemExit) as leaving:
        parsed(f"--{flag}", value)
    assert leaving.value.code == 2
    message = capsys.readouterr().err
    assert f"--{flag}" in message and f"'{value}' is none of" in message
    values = xsam().to_dict()
    values["model"][flag] = value
    with pytest.raises(ValueError, match=rf"config\.model\.{flag}: '{value}' is none of"):
        Config.from_dict(values)


# ---- full sizes ----------------------------------------------------------------------------------


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())  # tied ones once


# Of the public models; the segmentation encoders without what decodes, Swin with a norm for each
# scale in place of its last.
SIZES = {
    "sam-vit-base": 89_670_912,
    "sam-vit-large": 308_278_272,
    "sam-vit-huge": 637_026_048,
    "mask2former-swin-tiny-coco-panoptic": 27_520_698,
    "mask2former-swin-base-coco-panoptic": 86_880_376,
    "mask2former-swin-large-coco-panoptic": 195_201_204,
    "siglip2-so400m-patch14-384": 428_225_600,
    "siglip-so400m-patch14-384": 428_225_600,
    "siglip2-base-patch16-224": 92_884_224,
    "clip-vit-large-patch14-336": 303_507_456,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B-Instruct-2507": 4_022_468_096,
    "vicuna-7b-v1.5": 6_738_415_616,
    "SmolLM2-135M-Instruct": 134_515_008,
}


def test_every_named_architecture_has_its_public_size():
    assert {name for _, name in NAMES} == {*SIZES, "none", "mask2former", "sam"}
    for part, name in NAMES:
        if name not in SIZES:
            continue
        model = parsed(f"--{part}", name)
        with torch.device("meta"):
            if part == "llm":
                module = LanguageModel(model.llm_config)
            elif part == "image_encoder":
                module = ImageEncoder(model.image_encoder_config)
            else:
                module = Segmentor(dataclasses.replace(xsam(), model=model)).encoder
        assert num_parameters(module) == SIZES[name], name


SAM_SIZES = {  # hidden_size, num_hidden_layers, num_attention_heads, global_attn_indexes
    "sam-vit-base": (768, 12, 12, [2, 5, 8, 11]),
    "sam-vit-large": (1024, 24, 16, [5, 11, 17, 23]),
    "sam-vit-huge": (1280, 32, 16, [7, 15, 23, 31]),
}


@pytest.mark.parametrize("name", SAM_SIZES)
def test_sam_of_full_size_has_the_tensors_of_transformers(name):
    dim, depth, heads, global_blocks = SAM_SIZES[name]
    config = SamVisionConfig(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        global_attn_indexes=global_blocks,
        mlp_dim=4 * dim,
    )
    with torch.device("meta"):
        theirs = SamVisionModel(config).vision_encoder
        ours = Segmentor(dataclasses.replace(xsam(), model=parsed("--seg_encoder", name))).encoder
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


def test_clip_of_full_size_has_the_tensors_of_transformers():
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    model = parsed("--image_encoder", "clip-vit-large-patch14-336")
    with torch.device("meta"):
        theirs, ours = CLIPVisionModel(config), ImageEncoder(model.image_encoder_config).model
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--image_encoder", "none"], {"image_encoder", "image_projector"}),
        (["--decoder", "sam"], {"segmentor.connector", "segmentor.pixel_decoder"}),
        (["--seg_encoder", "mask2former-swin-large-coco-panoptic"], {"segmentor.connector"}),
        (["--connector_scales", "1", "--connector_layers", "24"], set()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_full_model_lacks_what_its_variant_does_without(flags, parts):
    with torch.device("meta"):
        model = XSAM(dataclasses.replace(xsam(), model=parsed(*flags)))
    optional = ("image_encoder", "image_projector", "segmentor.connector")
    optional += ("segmentor.pixel_decoder",)
    names = list(model.state_dict())
    lacking = {name for name in optional if not under(names, f"{name}.")}
    assert lacking == parts


@pytest.mark.parametrize(
    "flags",
    [
        ["--seg_encoder", "mask2former-swin-tiny-coco-panoptic"],
        ["--decoder_dim", "128"],
    ],
    ids=" ".join,
)
def test_sams_decoder_wants_sams_neck(flags):
    with torch.device("meta"), pytest.raises(ValueError, match="decoder sam"):
        Segmentor(dataclasses.replace(xsam(), model=parsed("--decoder", "sam", *flags)))
