"""Every number of the model, of the three training stages and of the losses.

`xsam()` is the model of the paper, `small()` has smaller public parts, `toy.preset.toy()` small
numbers. Every field is a flag of the command line (`cli.py`), and the comment beside it, or else
the lines right above it, is the flag's help:

    python xsam/train.py --config toy --stage 1 --num_queries 40 --global_batch_size 8

A configuration never changes; `resolve` makes another one, from the same names:

    toy().resolve(stages=(1,), num_queries=40, global_batch_size=8)
"""

import copy
import dataclasses
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from xsam import former_names

Dtype = Literal["float32", "bfloat16"]

SPECIAL_TOKENS = ("<SEG>", "<p>", "</p>")  # in the order in which the published weights number them


# ---- architectures by name -----------------------------------------------------------------------


def _sam(dim: int, depth: int, heads: int, global_blocks: tuple[int, ...]) -> dict:
    return dict(
        seg_patch_size=16,
        seg_window_size=14,
        seg_dim=dim,
        seg_depth=depth,
        seg_heads=heads,
        seg_mlp_dim=4 * dim,
        seg_global_blocks=global_blocks,
        connector_layers=(depth // 2, 3 * depth // 4, depth),
    )


def _swin(embed_dim: int, depths: list[int], num_heads: list[int], window_size: int) -> dict:
    config = dict(model_type="swin", embed_dim=embed_dim, depths=depths, num_heads=num_heads)
    config |= dict(window_size=window_size, image_size=384 if window_size == 12 else 224)
    # The language model is shown the third of its four scales.
    return dict(seg_backbone_config=config, seg_patch_size=16, seg_dim=4 * embed_dim)


def _siglip(
    dim: int, depth: int, heads: int, mlp_dim: int, patch_size: int, image_size: int
) -> dict:
    config = dict(model_type="siglip_vision_model", hidden_size=dim, intermediate_size=mlp_dim)
    config |= dict(num_hidden_layers=depth, num_attention_heads=heads)
    config |= dict(patch_size=patch_size, image_size=image_size)
    return dict(image_encoder_config=config, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


def _siglip_so400m() -> dict:
    return _siglip(1152, 27, 16, 4304, 14, 384)


def _llm(model_type: str, dim: int, depth: int, heads: int, mlp_dim: int, **others) -> dict:
    config = dict(model_type=model_type, hidden_size=dim, num_hidden_layers=depth)
    config |= dict(num_attention_heads=heads, intermediate_size=mlp_dim)
    return dict(llm_config=config | others)


def _phi3_mini() -> dict:
    others = dict(vocab_size=32064, num_key_value_heads=32, sliding_window=2047)
    others |= dict(max_position_embeddings=4096, original_max_position_embeddings=4096)
    return _llm("phi3", 3072, 32, 32, 8192, **others)


_QWEN3 = dict(num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True)

# What the name of a part (a Hugging Face folder) brings: fields of ModelConfig. Of a folder that is
# not named here the image encoder and the language model are read from its config.json.
ARCHITECTURES: dict[str, dict[str, dict]] = {
    "seg_encoder": {
        "sam-vit-base": _sam(768, 12, 12, (2, 5, 8, 11)),
        "sam-vit-large": _sam(1024, 24, 16, (5, 11, 17, 23)),
        "sam-vit-huge": _sam(1280, 32, 16, (7, 15, 23, 31)),
        "mask2former-swin-tiny-coco-panoptic": _swin(96, [2, 2, 6, 2], [3, 6, 12, 24], 7),
        "mask2former-swin-base-coco-panoptic": _swin(128, [2, 2, 18, 2], [4, 8, 16, 32], 12),
        "mask2former-swin-large-coco-panoptic": _swin(192, [2, 2, 18, 2], [6, 12, 24, 48], 12),
    },
    "image_encoder": {
        "siglip2-so400m-patch14-384": _siglip_so400m(),
        "siglip-so400m-patch14-384": _siglip_so400m(),
        "siglip2-base-patch16-224": _siglip(768, 12, 12, 3072, 16, 224),
        "clip-vit-large-patch14-336": dict(
            image_encoder_config=dict(
                model_type="clip_vision_model",
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                intermediate_size=4096,
                patch_size=14,
                image_size=336,
            ),
            image_mean=(0.48145466, 0.4578275, 0.40821073),
            image_std=(0.26862954, 0.26130258, 0.27577711),
        ),
        "none": dict(image_encoder_config={}),
    },
    "llm": {
        "Phi-3-mini-4k-instruct": _phi3_mini(),
        "Qwen3-1.7B": _llm(
            "qwen3", 2048, 28, 16, 6144, max_position_embeddings=40960, rope_theta=1e6, **_QWEN3
        ),
        "Qwen3-4B-Instruct-2507": _llm(
            "qwen3", 2560, 36, 32, 9728, max_position_embeddings=262144, rope_theta=5e6, **_QWEN3
        ),
        "vicuna-7b-v1.5": _llm(
            "llama", 4096, 32, 32, 11008,
            vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5,
        ),
        "SmolLM2-135M-Instruct": _llm(
            "llama", 576, 30, 9, 1536, num_key_value_heads=3, vocab_size=49152,
            max_position_embeddings=8192, rope_theta=1e5, rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        ),
    },
    "decoder": {"mask2former": dict(decoder_layers=9), "sam": dict(decoder_layers=2)},
}  # fmt: skip


# ---- the model, the stages, the losses -----------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """Architecture (paper section 3.2, figure 3). Every alternative of paper tables 7, 9, 20 and 21
    is a value here; `ARCHITECTURES` says which fields the name of a part brings with it."""

    # ---- segmentation encoder
    seg_encoder: str = "sam-vit-large"  # its folder under the weights root; brings its sizes
    # config.json of a Swin of transformers in place of SAM's ViT (table 7), whose four scales go to
    # the pixel decoder without a connector; the name of a folder brings it
    seg_backbone_config: dict = field(default_factory=dict)
    seg_image_size: int = 1024  # side of the square padded input, in pixels
    seg_patch_size: int = 16  # stride in pixels of the features that the language model is shown
    seg_dim: int = 1024  # width of the features that the language model is shown
    seg_depth: int = 24  # transformer blocks of SAM's ViT
    seg_heads: int = 16  # attention heads of each block
    seg_mlp_dim: int = 4096  # hidden width of the MLP of each block
    seg_window_size: int = 14  # side of an attention window, in patches
    seg_global_blocks: tuple[int, ...] = (5, 11, 17, 23)  # blocks, from 0 on, without windows
    seg_neck_dim: int = 256  # width of SAM's neck, which decoder "sam" alone reads

    # ---- image encoder
    # its folder under the weights root (table 20); "none": the language model sees the segmentation
    # encoder alone
    image_encoder: str = "siglip2-so400m-patch14-384"
    # config.json of a vision model of transformers; the name of a folder brings it
    image_encoder_config: dict = field(
        default_factory=lambda: _siglip_so400m()["image_encoder_config"]
    )
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # mean of red, green, blue in 0..1
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)  # deviation of red, green, blue in 0..1
    image_resample: Literal["bicubic", "bilinear"] = "bicubic"  # of its resized input
    # false: the language model is shown the image encoder's tokens alone (table 7)
    seg_tokens: bool = True

    # ---- language model
    llm: str = "Phi-3-mini-4k-instruct"  # its folder under the weights root (table 21)
    # config.json of a causal language model of transformers; the name of a folder brings it
    llm_config: dict = field(default_factory=lambda: _phi3_mini()["llm_config"])
    max_text_length: int = 2319  # most text tokens of a sample; visual tokens do not count

    # ---- segmentation connector: from one encoder layer to one scale in each branch
    connector: Literal["conv", "linear"] = "conv"  # kind of each branch (table 9)
    connector_dim: int = 512  # bottleneck channels of a "conv" branch
    # multiples of the encoder's resolution, finest first; the pixel decoder attends over the three
    # coarsest, and masks have the resolution of the finest
    connector_scales: tuple[float, ...] = (2.0, 1.0, 0.5)
    # hidden state that each branch reads; 0 is the patch embedding, i the output of block i
    connector_layers: tuple[int, ...] = (12, 18, 24)

    # ---- region sampler
    num_region_points: int = 256  # points read inside each visual prompt
    # vectors of each <region>; the published code of 2026 has 64, of 4 points each
    num_region_vectors: int = 1
    region_pooling: Literal["mean", "max"] = "mean"  # how points become a vector

    # ---- segmentation decoder
    # Mask2Former's pixel decoder and masked-attention decoder, or SAM's mask decoder on the neck of
    # SAM's encoder (table 9)
    decoder: Literal["mask2former", "sam"] = "mask2former"
    decoder_dim: int = 256  # width of queries, mask features and condition embeddings
    decoder_heads: int = 8  # attention heads, of the pixel decoder too
    pixel_decoder_layers: int = 6  # layers of deformable attention between the scales
    pixel_decoder_points: int = 4  # points that a head reads on each scale
    pixel_decoder_mlp_dim: int = 1024  # hidden width of the MLP of such a layer
    decoder_layers: int = 9  # layers of masked attention from queries to the scales
    decoder_mlp_dim: int = 2048  # hidden width of the MLP of such a layer
    num_queries: int = 200  # masks that one decoder run predicts
    num_classes: int = 133  # classes of the linear head of stage 1, without background
    logit_clamp: float = 50.0  # largest absolute class logit of the cosine head


def is_in(name: str, path: str) -> bool:
    """Whether a parameter or module lies under a path of module names; all lie under ""."""
    return f"{name}.".startswith(f"{path}." * bool(path))


@dataclass(frozen=True)
class Stage:
    """One row of the recipe (paper figure 5, tables 10 and 11; ablations: tables 6, 8, 19 and
    22)."""

    # peak learning rates by part or module, of which the longest name counts; "" is all others, 0
    # freezes (table 11)
    learning_rates: dict[str, float]
    # names as `python -m xsam.data check` lists them, or files of your own,
    # FILE.json[:IMAGES[:MASKS]]; as a flag +NAME,... adds to the stage's own (table 10)
    datasets: tuple[str, ...]
    starts_from: tuple[int, ...] = ()  # earlier stages, read from their checkpoints (table 8)
    global_batch_size: int = 64  # samples of an update, on all GPUs together (table 11)
    micro_batch_size: int = 4  # samples of one forward pass; accumulation is derived
    epochs: float = 1.0  # passes over the resampled datasets (table 11)
    max_steps: int = 0  # steps in place of `epochs`; 0: as many as these need
    weight_decay: float = 0.05  # weight decay of AdamW; vectors have none (table 11)
    clip_norm: float = 1.0  # largest L2 norm of the whole gradient (table 11)
    warmup_ratio: float = 0.03  # share of the steps in which the learning rate rises (table 11)
    # least and largest random scale of the image, before a crop or padding; empty: none (table 11)
    scale_range: tuple[float, ...] = ()
    flip_probability: float = 0.0  # probability that image and masks are mirrored
    # t of a set's repeat factor max(1, sqrt(t / its share of all samples)) (appendix A, table 19)
    repeat_threshold: float = 0.1

    # ---- low-rank adapters (lora.py), in place of whole weights
    # rank of adapters; only these, at the learning rate of their part, and lora_whole are trained
    # then; 0: no adapters
    lora_rank: int = 0
    lora_alpha: float = 16.0  # an adapter's output is scaled by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # probability of dropout on an adapter's input
    lora_targets: tuple[str, ...] = ("llm",)  # parts, modules in them, or patterns of layers
    lora_whole: tuple[str, ...] = ()  # parts or modules that are trained whole beside adapters

    def learning_rate(self, name: str) -> float:
        """Peak learning rate of a parameter or module: that of the longest path in `learning_rates`
        that it lies under; 0 is frozen."""
        return self.learning_rates[max((x for x in self.learning_rates if is_in(name, x)), key=len)]


@dataclass(frozen=True)
class LossConfig:
    """Weights of the criterion (paper equation 1; Mask2Former, Cheng et al. 2022)."""

    class_weight: float = 2.0  # weight of the class term, in matching and loss
    mask_weight: float = 5.0  # weight of the masks' binary cross-entropy, in matching and loss
    dice_weight: float = 5.0  # weight of the masks' dice term, in matching and loss
    background_weight: float = 0.1  # weight of an unmatched query in the class loss
    num_points: int = 12544  # points at which a mask is compared, in matching and loss
    oversample_ratio: float = 3.0  # candidates for each point of the loss
    importance_ratio: float = 0.75  # share of the points that lie where a mask is least certain
    # no mask loss at void and crowd pixels; false: they are negatives, as in the published code
    ignore_unlabelled: bool = True


@dataclass(frozen=True)
class Config:
    """A whole run: enough to rebuild the model and to repeat the training."""

    name: str  # of the preset
    model: ModelConfig  # sizes and architectures
    stages: dict[int, Stage]  # the recipe, by number
    loss: LossConfig = field(default_factory=LossConfig)  # weights and points

    # ---- data
    categories: tuple[dict, ...] = ()  # {"name", "is_thing"} of the classes of training
    # share of the images of each of your own files, chosen by the seed, that training leaves out
    held_out: float = 0.0
    init: tuple[str, ...] = ()  # checkpoints of --init, in place of the earlier stages' own
    phrasings: str = ""  # JSON file of questions and answers in place of ours (tasks.py)

    # ---- training
    seed: int = 0  # seed of first weights, order of samples, augmentation and points
    # type of weights and gradients in training: bfloat16 computes under autocast and updates
    # float32 masters (optimizer.py), float32 is float32 throughout
    dtype: Dtype = "bfloat16"
    llm_bits: int = 0  # 8 or 4: bits of a frozen language model (bitsandbytes); 0: dtype
    optimizer_bits: int = 32  # bits of AdamW's moments, 32 or 8 (torchao)
    recompute: bool = True  # activation checkpointing: blocks run again in the backward pass
    # torch.compile for each block: on an H100 a fifth off a step of stage 3, after 1.5 minutes
    compile: bool = False
    num_workers: int = 4  # processes of each rank that load data
    save_every: int = 1000  # steps between checkpoints; the last step is always saved
    keep_checkpoints: int = 2  # newest checkpoints of each stage that are kept
    max_skipped_steps: int = 20  # steps without a finite loss or gradient that a stage may have
    validate_every: int = 0  # steps between validations within a stage; 0: none
    num_validation: int = 64  # samples of each set that such a validation scores
    peak_tflops: float = 0.0  # peak of one GPU in bfloat16, for the utilisation; 0: by its name

    # ---- inference and scores
    eval_batch_size: int = 8  # images of one forward pass
    max_new_tokens: int = 256  # most tokens of an answer
    # how panoptic masks are made, as Mask2Former or as the published code does (postprocess.py)
    panoptic_rule: Literal["mask2former", "published"] = "mask2former"
    score_threshold: float = 0.8  # panoptic: queries with a lower score are dropped
    overlap_threshold: float = 0.8  # panoptic: least visible share of a segment
    presence: float = 0.0  # referring, reasoning: a phrase whose best score is below it has no mask
    # tasks, sets or files of your own that are scored before the first stage and after each; as a
    # flag none, or '', for none; where own files are trained on, these by default
    eval_tasks: tuple[str, ...] = ()
    num_pictures: int = 8  # pictures of predictions for each task

    def to_dict(self) -> dict:
        """The values as dictionaries, tuples and plain values, all of which JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Inverse of `to_dict`, also after a trip through JSON. Raises ValueError at an unknown or
        missing name."""
        return build_value(cls, values, "config")

    def resolve(self, stages: Iterable[int] | None = None, **fields) -> "Config":
        """Another configuration, in which `fields` have these values. A field of the model, of the
        losses or of the run is given by its name alone; a field of a stage is set in all `stages`
        (None: in every stage). The name of a part brings its architecture (`ARCHITECTURES`); a
        field given beside it wins. Raises ValueError at an unknown name or a value of another
        type."""
        fields = _architectures(self.model, fields) | fields
        values = self.to_dict()
        parts = {name: values.pop(name) for name in ("model", "loss", "stages")}
        numbers = list(self.stages if stages is None else stages)
        if not set(numbers) <= set(self.stages):
            raise ValueError(f"stages {numbers}: there are {', '.join(map(str, self.stages))}")
        rows = [parts["stages"][number] for number in numbers]
        owners = [values, parts["model"], parts["loss"], *rows]
        known = {name for owner in owners for name in owner}
        if unknown := sorted(fields.keys() - known):
            names = ", ".join(sorted(known))
            raise ValueError(f"unknown field {', '.join(unknown)}; known are {names}")
        for owner in owners:
            owner.update({name: fields[name] for name in owner.keys() & fields.keys()})
        return Config.from_dict(values | parts)


def xsam() -> Config:
    """X-SAM of the paper: SAM ViT-L, SigLIP2-so400m, Phi-3-mini."""
    return Config(
        name="xsam",
        model=ModelConfig(),
        stages={
            1: Stage(
                learning_rates={"segmentor.encoder": 1e-5, "": 1e-4},
                datasets=("coco_panoptic",),
                epochs=36.0,
                clip_norm=0.01,
                scale_range=(0.1, 2.0),
            ),
            2: Stage(
                learning_rates={"": 0.0, "image_projector": 1e-3, "seg_projector": 1e-3},
                datasets=("llava_pretrain",),
                starts_from=(1,),
                global_batch_size=256,
                micro_batch_size=16,
                weight_decay=0.0,
            ),
            3: Stage(
                learning_rates={"segmentor.encoder": 4e-6, "image_encoder": 4e-6, "": 4e-5},
                datasets=(
                    "llava_instruct",
                    "coco_panoptic",
                    "coco_vgd",
                    "refcoco",
                    "refcoco+",
                    "refcocog",
                    "gcg_grandf",
                    "gcg_refcocog",
                    "gcg_psg",
                    "gcg_flickr",
                    "reasonseg",
                ),
                starts_from=(1, 2),
            ),
        },
    )


def small() -> Config:
    """The same shape around the smallest public parts, for a smoke run on real photographs: SAM
    ViT-B at 512 pixels, SigLIP2-base, SmolLM2-135M, half of the decoder's layers and queries."""
    config = dataclasses.replace(xsam(), name="small").resolve(
        seg_encoder="sam-vit-base", seg_image_size=512,
        image_encoder="siglip2-base-patch16-224", llm="SmolLM2-135M-Instruct",
        pixel_decoder_layers=3, decoder_layers=5, num_queries=100, num_points=4096,
        global_batch_size=1, micro_batch_size=1, max_steps=30,
        recompute=False, num_workers=1, max_new_tokens=96,
    )  # fmt: skip
    config = config.resolve(stages=(1,), clip_norm=1.0, scale_range=(0.8, 1.25))
    return config.resolve(
        stages=(3,),
        datasets=(
            "llava_instruct", "coco_panoptic", "coco_vgd", "refcoco", "grefcoco", "gcg_grandf",
            "reasonseg", "coco_interactive",
        ),
    )  # fmt: skip


# ---- the parts of a stage's model ----------------------------------------------------------------

# By the names that `learning_rates` and the log give them; the first five are stage 1's.
PARTS = (
    "segmentor.encoder", "segmentor.connector", "segmentor.pixel_decoder", "segmentor.decoder",
    "segmentor.class_head", "image_encoder", "image_projector", "seg_projector", "llm",
    "llm_projector", "background_embedding",
)  # fmt: skip
HANDED_ON = {1: PARTS[:4], 2: PARTS[6:8]}  # what later stages take from a stage
NEW_PARTS = {  # what a stage may train from random weights (table 8 has stage 3 without stage 2)
    1: PARTS[1:5],
    2: PARTS[6:8],
    3: (*PARTS[4:5], *PARTS[6:8], *PARTS[9:]),
}


def part_name(name: str) -> str:
    """The part that a tensor belongs to, by its name in the model or on disk: "llm" of
    "llm.model.norm.weight"."""
    return ".".join(name.split(".")[: 2 if name.startswith("segmentor.") else 1])


def part_names(model: ModelConfig, stage: int) -> list[str]:
    """The parts that a stage's model has, in the order of `PARTS`."""
    absent = set(PARTS[5:] if stage == 1 else ())
    if model.seg_backbone_config or model.decoder == "sam":
        absent |= {"segmentor.connector", "segmentor.pixel_decoder" * (model.decoder == "sam")}
    if model.image_encoder == "none":
        absent |= {"image_encoder", "image_projector"}
    if not model.seg_tokens:
        absent |= {"seg_projector"}
    return [part for part in PARTS if part not in absent]


def origins(config: Config, number: int, brought: dict[str, str]) -> dict[str, str]:
    """Where the parts of a stage's model are read from before its first step: a folder, "stage 1",
    a path of --init, or "" for a part that starts from random weights. `brought` has the parts that
    --init gives to this stage, with the paths that they come from."""
    found = {"segmentor.encoder": config.model.seg_encoder, "llm": config.model.llm}
    found["image_encoder"] = config.model.image_encoder
    for earlier in config.stages[number].starts_from:
        found |= dict.fromkeys(HANDED_ON[earlier], f"stage {earlier}")
    found |= brought
    return {part: found.get(part, "") for part in part_names(config.model, number)}


def stage_folder(out: Path, stage: int) -> Path:
    """Where a run in the folder `out` keeps the checkpoints of a stage."""
    return Path(out) / f"stage{stage}"


# ---- from dictionaries ---------------------------------------------------------------------------


def build_value(kind, values, where: str):
    """`values`, as JSON gives them, as `kind`: a dataclass, a tuple or dict type, or a plain type.
    Raises ValueError, which names `where` they stand, at an unknown name or another type."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Literal:
        if values not in arguments:
            raise ValueError(f"{where}: {values!r} is none of {', '.join(arguments)}")
        return values
    accepted = {float: (float, int), tuple: (tuple, list)}.get(origin, origin)
    if dataclasses.is_dataclass(kind):
        accepted = dict
    if not isinstance(values, accepted) or (isinstance(values, bool) and kind is not bool):
        raise ValueError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {values!r}")
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(values) - set(hints))
        if unknown:
            known = ", ".join(hints)
            raise ValueError(f"{where}: unknown name {', '.join(unknown)}; known are {known}")
        built = {
            name: build_value(hints[name], value, f"{where}.{name}")
            for name, value in values.items()
        }
        try:
            return kind(**built)
        except TypeError as error:  # a name without a default is missing
            raise ValueError(f"{where}: {error}") from error
    if origin is tuple:
        return tuple(build_value(arguments[0], value, where) for value in values)
    if origin is dict and arguments:
        try:
            keys = [arguments[0](key) for key in values]  # JSON makes numbers strings
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        items = zip(keys, values.values(), strict=True)
        return {key: build_value(arguments[1], value, f"{where}.{key}") for key, value in items}
    return float(values) if kind is float else copy.deepcopy(values)


def _architectures(model: ModelConfig, fields: dict) -> dict:
    """The fields that the names of parts among `fields` bring. Raises ValueError at an unknown
    seg_encoder."""
    brought = {}
    for part, known in ARCHITECTURES.items():
        if part in fields:
            if part == "seg_encoder":
                if fields[part] not in (*known, model.seg_encoder):
                    names = ", ".join(known)
                    raise ValueError(f"unknown seg_encoder {fields[part]}; known are {names}")
                brought["seg_backbone_config"] = {}
            unknown = {f"{part}_config": {}} if hasattr(model, f"{part}_config") else {}
            brought |= known.get(fields[part], unknown)
    return brought


__getattr__ = former_names(toy="xsam.former.presets")  # code written for version 0.1 finds it
