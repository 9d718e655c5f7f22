"""The configuration of the toy: the model of the paper with smaller numbers."""

import dataclasses

from xsam.config import Config, ModelConfig, xsam


def toy() -> Config:
    """The same code for a laptop: 96-pixel drawings, 1.4 million parameters, minutes on two CPU
    cores."""
    config = dataclasses.replace(xsam(), name="toy", model=toy_model()).resolve(
        num_points=512,
        class_weight=4.0,  # shapes are learned later than masks
        score_threshold=0.25, overlap_threshold=0.6, presence=0.5,
        dtype="float32", recompute=False,  # small enough to need neither
        num_workers=0, save_every=200, eval_batch_size=32, max_new_tokens=48,
        eval_tasks=(
            "panoptic", "instance", "semantic", "openvocab", "refer", "grefer", "reason", "gcg",
            "interactive", "vgd", "chat",
        ),
        global_batch_size=8, micro_batch_size=4,
    )  # fmt: skip
    config = config.resolve(
        stages=(1,),
        learning_rates={"segmentor.encoder": 1e-3, "": 1e-3},
        scale_range=(0.8, 1.25),
        clip_norm=1.0,
        max_steps=400,
    )
    config = config.resolve(
        stages=(2,),
        datasets=("llava_pretrain", "llava_instruct"),  # captions alone take many pictures
        learning_rates={"": 0.0, "image_projector": 5e-3, "seg_projector": 5e-3},
        global_batch_size=16, micro_batch_size=8, max_steps=240,
    )  # fmt: skip
    return config.resolve(
        stages=(3,),
        learning_rates={
            "segmentor.encoder": 3e-4, "segmentor": 1e-3, "image_encoder": 5e-4, "": 1.5e-3,
        },
        # The mix of the paper, and the two sets that it scores without training on them.
        datasets=(
            "llava_instruct", "coco_panoptic", "coco_vgd", "refcoco", "grefcoco", "gcg_grandf",
            "gcg_refcocog", "gcg_psg", "gcg_flickr", "reasonseg", "coco_interactive",
        ),
        max_steps=1300,
        repeat_threshold=0.2,  # the sets are small
    )  # fmt: skip


def toy_model() -> ModelConfig:
    """Sizes of the three pretrained models, the connector and the decoder."""
    return ModelConfig(
        seg_encoder="sam-vit-toy",
        seg_image_size=96, seg_patch_size=8, seg_dim=64, seg_depth=4, seg_heads=2,
        seg_mlp_dim=192, seg_window_size=6, seg_global_blocks=(1, 3), seg_neck_dim=32,
        image_encoder="siglip2-toy",
        image_encoder_config=dict(
            model_type="siglip_vision_model", hidden_size=64, num_hidden_layers=3,
            num_attention_heads=2, intermediate_size=128, patch_size=16, image_size=96,
        ),
        llm="phi3-toy",
        llm_config=dict(
            model_type="phi3", vocab_size=768, hidden_size=96, num_hidden_layers=4,
            num_attention_heads=3, num_key_value_heads=3, intermediate_size=192,
            initializer_range=0.1, partial_rotary_factor=0.25,
            max_position_embeddings=512, original_max_position_embeddings=512,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        max_text_length=320,
        connector_dim=64, connector_layers=(2, 3, 4), num_region_points=32,
        decoder_dim=64, decoder_heads=4, pixel_decoder_layers=1, pixel_decoder_points=2,
        pixel_decoder_mlp_dim=128, decoder_layers=3, decoder_mlp_dim=128,
        num_queries=20, num_classes=12,
    )  # fmt: skip
