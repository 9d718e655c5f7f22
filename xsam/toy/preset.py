"""The configuration of the toy: the model of the paper with smaller numbers."""

from xsam.config import Config, ModelConfig, xsam


def toy() -> Config:
    """The same code for a laptop: 128-pixel drawings, 1.3 million parameters, minutes on two CPU
    cores."""
    config = xsam()
    config.name = "toy"
    config.model = toy_model()
    config.loss.num_points = 512
    config.loss.class_weight = 4.0  # shapes are learned later than masks
    config.score_threshold, config.overlap_threshold = 0.25, 0.6
    config.dtype, config.recompute = "float32", False  # small enough to need neither
    config.num_workers = 0
    config.save_every = 200
    config.eval_batch_size = 16
    config.max_new_tokens = 48
    config.eval_tasks = (
        "panoptic", "instance", "semantic", "openvocab", "refer", "grefer", "reason", "gcg",
        "interactive", "vgd", "chat",
    )  # fmt: skip
    one, two, three = config.stages[1], config.stages[2], config.stages[3]
    one.learning_rates = {"segmentor.encoder": 1e-3, "": 1e-3}
    one.scale_range = (0.8, 1.25)
    one.clip_norm = 1.0
    one.max_steps = 1000
    two.learning_rates = {"": 0.0, "image_projector": 5e-3, "seg_projector": 5e-3}
    two.max_steps = 80
    three.learning_rates = {
        "segmentor.encoder": 3e-4, "segmentor": 1e-3, "image_encoder": 5e-4, "": 1.5e-3,
    }  # fmt: skip
    # The mix of the paper, and the two sets that it scores without training on them.
    three.datasets = (
        "llava_instruct", "coco_panoptic", "coco_vgd", "refcoco", "grefcoco", "gcg_grandf",
        "gcg_refcocog", "gcg_psg", "gcg_flickr", "reasonseg", "coco_interactive",
    )  # fmt: skip
    three.max_steps = 1300
    three.repeat_threshold = 0.5  # the sets are small, and RefCOCO's combinations many
    for stage in config.stages.values():
        stage.global_batch_size, stage.micro_batch_size = 8, 4
    return config


def toy_model() -> ModelConfig:
    """Sizes of the three pretrained models, the connector and the decoder."""
    return ModelConfig(
        seg_encoder="sam-vit-toy",
        seg_image_size=128, seg_patch_size=8, seg_dim=64, seg_depth=4, seg_heads=2,
        seg_mlp_dim=192, seg_window_size=8, seg_global_blocks=(1, 3), seg_neck_dim=32,
        image_encoder="siglip2-toy",
        image_encoder_config=dict(
            model_type="siglip_vision_model", hidden_size=64, num_hidden_layers=3,
            num_attention_heads=2, intermediate_size=128, patch_size=16, image_size=96,
        ),
        llm="phi3-toy",
        llm_config=dict(
            model_type="phi3", vocab_size=512, hidden_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, intermediate_size=256,
            max_position_embeddings=512, original_max_position_embeddings=512,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        max_text_length=320,
        connector_dim=64, connector_layers=(2, 3, 4), num_region_points=32,
        decoder_dim=64, decoder_heads=4, pixel_decoder_layers=1, pixel_decoder_points=2,
        pixel_decoder_mlp_dim=128, decoder_layers=3, decoder_mlp_dim=128,
        num_queries=20, num_classes=12,
    )  # fmt: skip
