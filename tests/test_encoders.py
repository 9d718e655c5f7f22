"""The encoders against transformers, and images and maps that must land on the same pixels.

pytest tests/test_encoders.py
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    CLIPVisionModel,
    Mask2FormerConfig,
    SamVisionConfig,
    SiglipVisionModel,
    SwinConfig,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelLevelModule
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionEncoder
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from xsam.config import xsam
from xsam.data import SEG_MEAN, SEG_STD, ResizeAndPad, image_pixels, seg_pixels
from xsam.encoders import ImageEncoder, SamEncoder, relative_positions
from xsam.model import Segmentor
from xsam.toy.preset import toy
from xsam.variants import SwinEncoder

# ---- segmentation encoder ------------------------------------------------------------------------


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Zero biases and position tables and norms of one would hide mistakes."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)


def sam_and_reference(image_size: int) -> tuple[SamEncoder, SamVisionEncoder]:
    """Ours and transformers' of the same weights, patches of 16 pixels and windows of 7 patches."""
    torch.manual_seed(0)
    window_size, global_blocks = 7, (1, 3)
    config = SamVisionConfig(
        image_size=image_size,
        patch_size=16,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_dim=64,
        window_size=window_size,
        global_attn_indexes=list(global_blocks),
        output_channels=16,
    )
    reference = SamVisionEncoder(config).eval()
    randomise(reference)
    ours = SamEncoder(image_size, 16, 32, 4, 2, 64, window_size, global_blocks, 16)
    ours.load_state_dict(reference.state_dict())
    return ours, reference


@torch.no_grad()
def assert_all_states_agree(
    ours: SamEncoder, reference: SamVisionEncoder, height: int, width: int
) -> None:
    pixels = torch.randn(2, 3, height, width)
    expected = reference(pixels, output_hidden_states=True)
    hidden_states = ours(pixels)
    assert len(hidden_states) == len(expected.hidden_states) == 5
    for mine, theirs in zip(hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    neck = ours.neck(hidden_states[-1])
    torch.testing.assert_close(neck, expected.last_hidden_state, atol=1e-4, rtol=0)


@pytest.mark.parametrize("image_size", [112, 160])
def test_sam_encoder_equals_transformers(image_size):
    """A grid of 7 is one window; a grid of 10 is padded to two, and SAM attends to the padding."""
    assert_all_states_agree(*sam_and_reference(image_size), image_size, image_size)


@pytest.mark.parametrize(("height", "width"), [(96, 160), (160, 64), (80, 80)])
def test_sam_encoder_of_another_size_equals_transformers(height, width):
    """Built for a square of 112, run on rectangles longer and shorter than it, and on a smaller
    square: theirs is handed the position embedding of that size, and the size."""
    ours, reference = sam_and_reference(112)
    reference.patch_embed.image_size = (height, width)
    table = reference.pos_embed.data.permute(0, 3, 1, 2)
    table = F.interpolate(table, (height // 16, width // 16), mode="bilinear", align_corners=False)
    reference.pos_embed.data = table.permute(0, 2, 3, 1)
    assert_all_states_agree(ours, reference, height, width)


@pytest.mark.parametrize("size", [5, 7, 9])
def test_relative_positions_of_another_size_equal_transformers(size):
    table = torch.randn(13, 3)  # of a window of 7
    expected = SamVisionAttention.get_rel_pos(None, size, size, table)
    torch.testing.assert_close(relative_positions(table, size), expected)


def test_sam_encoder_reads_another_image_size():
    """Trained on one square, run on a larger one; the tables are interpolated."""
    encoder = SamEncoder(64, 16, 16, 2, 2, 32, 3, (1,), 8)
    assert [x.shape for x in encoder(torch.randn(1, 3, 96, 96))] == [(1, 6, 6, 16)] * 3


def test_full_size_parameter_counts():
    with torch.device("meta"):
        segmentor = Segmentor(xsam())
        image_encoder = ImageEncoder(xsam().model.image_encoder_config)
    assert sum(x.numel() for x in segmentor.encoder.parameters()) == 308_278_272
    assert sum(x.numel() for x in image_encoder.parameters()) == 428_225_600


SWIN = dict(embed_dim=16, depths=[2, 2, 2, 1], num_heads=[1, 2, 2, 4], window_size=4, image_size=64)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 104)])
@torch.no_grad()
def test_swin_encoder_equals_transformers(height, width):
    """The backbone of their Mask2Former; the second size divides by no window and no stride."""
    torch.manual_seed(0)
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    config = Mask2FormerConfig(backbone_config=SwinConfig(**SWIN, out_features=stages))
    reference = Mask2FormerPixelLevelModule(config).encoder.eval()
    ours = SwinEncoder({"model_type": "swin", **SWIN}).eval()
    randomise(reference)
    missing, unexpected = ours.model.load_state_dict(reference.state_dict(), strict=False)
    assert not missing and set(unexpected) == {"swin.layernorm.weight", "swin.layernorm.bias"}

    pixels = torch.randn(2, 3, height, width)
    expected = reference(pixels, output_hidden_states=True)
    maps = ours(pixels)
    dims = [16, 32, 64, 128]
    assert ours.dims == dims and [x.shape[-1] for x in maps] == [*dims, 64, 128]
    sizes = [(-(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32, 16, 32)]
    assert [tuple(x.shape[1:3]) for x in maps] == sizes
    theirs = [*expected.feature_maps, *expected.hidden_states[-2:]]
    for mine, other in zip(maps, theirs, strict=True):
        torch.testing.assert_close(mine.permute(0, 3, 1, 2), other, atol=1e-4, rtol=0)
    # The last two are raw: their norms make the maps before them.
    norms = reference.hidden_states_norms
    torch.testing.assert_close(norms["stage3"](maps[-2]), maps[2], atol=1e-4, rtol=0)
    torch.testing.assert_close(norms["stage4"](maps[-1]), maps[3], atol=1e-4, rtol=0)


def test_swin_encoder_trains_without_chance():
    """No path is dropped, whatever config.json says; every weight of the kept ones is trained."""
    torch.manual_seed(0)
    encoder = SwinEncoder({"model_type": "swin", "drop_path_rate": 0.5, **SWIN}).train()
    pixels = torch.randn(2, 3, 64, 64)
    maps = encoder(pixels)
    assert all(torch.equal(*pair) for pair in zip(maps, encoder(pixels), strict=True))
    sum(x.pow(3).sum() for x in maps[:4]).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


# ---- image encoder -------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [42, 64])
@pytest.mark.parametrize("model_class", [SiglipVisionModel, CLIPVisionModel])
@torch.no_grad()
def test_image_encoder_equals_transformers(model_class, image_size):
    """What enters the last layer, without CLIP's class token. A patch that the border cuts is not
    read (of a side of 64, as of SigLIP's 384, 14 leaves a rest)."""
    torch.manual_seed(0)
    config = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    config |= dict(patch_size=14, image_size=image_size)
    config_class = model_class.config_class
    reference = model_class(config_class(**config)).eval()
    randomise(reference)
    ours = ImageEncoder({"model_type": config_class.model_type, **config}).eval()
    ours.model.load_state_dict(reference.state_dict())
    inputs = []
    reference.encoder.layers[-1].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))

    pixels = torch.randn(2, 3, image_size, image_size)
    expected = reference(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(expected, inputs[0])
    if model_class is CLIPVisionModel:
        expected = expected[:, 1:]
    tokens = ours(pixels)
    assert tokens.shape == (2, (image_size // 14) ** 2, ours.dim)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_image_tokens_come_from_before_the_last_layer():
    """No later weight may move them: not the last layer's, not the final norm's."""
    torch.manual_seed(0)
    encoder = ImageEncoder(toy().model.image_encoder_config).eval()
    pixels = torch.rand(2, 3, 96, 96) * 2 - 1
    tokens = encoder(pixels)
    assert tokens.shape == (2, 36, encoder.dim)

    def disturb(needle: str) -> torch.Tensor:
        names = [name for name, _ in encoder.named_parameters() if needle in name]
        assert names, needle
        for name in names:
            encoder.get_parameter(name).add_(0.1)
        return encoder(pixels)

    assert torch.equal(disturb("layers.2."), tokens)
    assert torch.equal(disturb("post_layernorm"), tokens)
    assert not torch.allclose(disturb("layers.1."), tokens)


# ---- what the encoders are fed -------------------------------------------------------------------


def position_image(height: int, width: int) -> np.ndarray:
    """Red tells the row, green the column, steps of 4 and 3 so that a shift of a pixel shows."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([4 * rows, 3 * columns, 0 * rows], axis=-1).astype(np.uint8)


def place_both(array: np.ndarray, transform: ResizeAndPad) -> tuple[np.ndarray, np.ndarray]:
    """The same content as an image and as a map: float [3, S, S] in 0..255, both."""
    pixels = seg_pixels(Image.fromarray(array), transform).numpy()
    outside = np.ones((transform.size, transform.size), bool)
    outside[: transform.visible[0], : transform.visible[1]] = False
    assert (pixels[:, outside] == 0).all()
    pixels = pixels * np.float32(SEG_STD)[:, None, None] + np.float32(SEG_MEAN)[:, None, None]
    placed = transform.map_to_canvas(array.transpose(2, 0, 1).astype(np.float32), fill=-1)
    assert (placed[:, outside] == -1).all()
    assert (placed[:, ~outside] >= 0).all()
    return pixels[:, ~outside], placed[:, ~outside]


@pytest.mark.parametrize("seed", range(4))
def test_image_and_map_land_on_the_same_pixels(seed):
    """At scale one nothing is interpolated, so a cropped image equals its map pixel for pixel."""
    array, size = position_image(60, 50), 40
    transform = ResizeAndPad.fit((60, 50), size, scale=60 / size)
    assert transform.resized == transform.original
    transform = transform.crop(np.random.default_rng(seed))
    pixels, placed = place_both(array, transform)
    np.testing.assert_allclose(pixels, placed, atol=1e-3)
    assert placed[:2, 0].tolist() == [4 * transform.top, 3 * transform.left]


@pytest.mark.parametrize("original", [(60, 40), (33, 57), (50, 50)])
@pytest.mark.parametrize("scale", [0.4, 1.0, 1.7])
def test_image_and_map_agree_when_resized(original, scale):
    """They differ by no more than nearest and bilinear reading do, and by nothing on average."""
    size = 48
    transform = ResizeAndPad.fit(original, size, scale).crop(np.random.default_rng(0))
    pixels, placed = place_both(position_image(*original), transform)
    for channel, step in ((0, 4), (1, 3)):
        factor = transform.resized[channel] / original[channel]
        offset = (pixels[channel] - placed[channel]) / step * factor  # in pixels of the canvas
        assert abs(offset.mean()) < 0.3
        assert np.abs(offset).max() < 0.5 * max(1, factor) + 0.5


def test_fit_keeps_the_shape():
    transform = ResizeAndPad.fit((480, 640), 1024)
    assert transform.resized == (768, 1024) == transform.visible
    assert (transform.top, transform.left) == (0, 0)
    assert ResizeAndPad.fit((640, 480), 1024, scale=0.5).visible == (512, 384)
    assert ResizeAndPad.fit((1, 5000), 64).resized == (1, 64)  # never an empty image


def test_crop_stays_inside_and_reaches_every_edge():
    whole = ResizeAndPad.fit((30, 10), 24, scale=28 / 24)
    crops = [whole.crop(np.random.default_rng(seed)) for seed in range(60)]
    assert {crop.top for crop in crops} == {0, 1, 2, 3, 4}
    assert {crop.left for crop in crops} == {0}  # narrower than the canvas: padded, not cropped
    assert {crop.visible for crop in crops} == {(24, whole.resized[1])}


def test_place_map_takes_stacks_and_keeps_the_type():
    masks = np.random.default_rng(0).random((3, 20, 30)) > 0.5
    transform = ResizeAndPad.fit((20, 30), 60)
    placed = transform.map_to_canvas(masks)
    assert placed.dtype == bool and placed.shape == (3, 60, 60)
    assert (placed[:, :40:2, ::2] == masks).all() and (placed[:, 1:40:2, 1::2] == masks).all()
    assert not placed[:, 40:].any()
    assert (transform.map_to_canvas(masks[0].astype(np.uint8), fill=255)[40:] == 255).all()


def test_place_map_refuses_a_map_of_another_size():
    """Height and width exchanged is the usual mistake."""
    with pytest.raises(ValueError, match=r"\(30, 20\).*\(20, 30\)"):
        ResizeAndPad.fit((20, 30), 60).map_to_canvas(np.zeros((30, 20)))


def test_seg_pixels_are_normalised_as_sam_expects():
    """ImageNet's mean and deviation, in 0..255."""
    np.testing.assert_allclose(np.array(IMAGENET_DEFAULT_MEAN) * 255, SEG_MEAN)
    np.testing.assert_allclose(np.array(IMAGENET_DEFAULT_STD) * 255, SEG_STD)


def test_image_pixels_size_and_range():
    """The whole image is squashed, whatever its shape."""
    array = np.zeros((20, 70, 3), np.uint8)
    array[:, 35:] = 255
    pixels = image_pixels(Image.fromarray(array), 48)
    assert pixels.shape == (3, 48, 48) and pixels.dtype == torch.float32
    assert pixels.min() == -1 and pixels.max() == 1
    assert (pixels[:, :, :20] == -1).all() and (pixels[:, :, -20:] == 1).all()


@pytest.mark.parametrize("size", [24, 96])
def test_image_pixels_equal_transformers(size):
    """Their processors with the whole image squashed: SigLIP's as it comes, CLIP's without crop."""
    array = np.random.default_rng(0).integers(0, 256, (37, 61, 3)).astype(np.uint8)
    image, shape = Image.fromarray(array), {"height": size, "width": size}
    siglip = SiglipImageProcessorPil(size=shape)
    clip = CLIPImageProcessorPil(size=shape, do_center_crop=False, resample=Image.BILINEAR)
    of_clip = image_pixels(image, size, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, "bilinear")
    for mine, processor in ((image_pixels(image, size), siglip), (of_clip, clip)):
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
