"""The encoders against transformers, and images and maps that must land on the same pixels.

pytest tests/test_encoders.py
"""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SamVisionConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionEncoder

from xsam.config import toy, xsam
from xsam.encoders import (
    SEG_MEAN,
    SEG_STD,
    ImageEncoder,
    Placement,
    SamEncoder,
    image_pixels,
    relative_positions,
    seg_pixels,
)
from xsam.model import Segmentor

# ---- segmentation encoder ------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [112, 160])
@torch.no_grad()
def test_sam_encoder_equals_transformers(image_size):
    """A grid of 7 is one window; a grid of 10 is padded to two, and SAM attends to the padding."""
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
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # zero position tables would hide mistakes
    ours = SamEncoder(image_size, 16, 32, 4, 2, 64, window_size, global_blocks, 16)
    ours.load_state_dict(reference.state_dict())

    pixels = torch.randn(2, 3, image_size, image_size)
    expected = reference(pixels, output_hidden_states=True)
    hidden_states = ours(pixels)
    assert len(hidden_states) == len(expected.hidden_states) == 5
    for mine, theirs in zip(hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    neck = ours.neck(hidden_states[-1])
    torch.testing.assert_close(neck, expected.last_hidden_state, atol=1e-4, rtol=0)


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


# ---- image encoder -------------------------------------------------------------------------------


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


def place_both(array: np.ndarray, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """The same content as an image and as a map: float [3, S, S] in 0..255, both."""
    pixels = seg_pixels(Image.fromarray(array), placement).numpy()
    outside = np.ones((placement.size, placement.size), bool)
    outside[: placement.visible[0], : placement.visible[1]] = False
    assert (pixels[:, outside] == 0).all()
    pixels = pixels * np.float32(SEG_STD)[:, None, None] + np.float32(SEG_MEAN)[:, None, None]
    placed = placement.place_map(array.transpose(2, 0, 1).astype(np.float32), fill=-1)
    assert (placed[:, outside] == -1).all()
    assert (placed[:, ~outside] >= 0).all()
    return pixels[:, ~outside], placed[:, ~outside]


@pytest.mark.parametrize("seed", range(4))
def test_image_and_map_land_on_the_same_pixels(seed):
    """At scale one nothing is interpolated, so a cropped image equals its map pixel for pixel."""
    array, size = position_image(60, 50), 40
    placement = Placement.fit((60, 50), size, scale=60 / size)
    assert placement.resized == placement.original
    placement = placement.crop(np.random.default_rng(seed))
    pixels, placed = place_both(array, placement)
    np.testing.assert_allclose(pixels, placed, atol=1e-3)
    assert placed[:2, 0].tolist() == [4 * placement.top, 3 * placement.left]


@pytest.mark.parametrize("original", [(60, 40), (33, 57), (50, 50)])
@pytest.mark.parametrize("scale", [0.4, 1.0, 1.7])
def test_image_and_map_agree_when_resized(original, scale):
    """They differ by no more than nearest and bilinear reading do, and by nothing on average."""
    size = 48
    placement = Placement.fit(original, size, scale).crop(np.random.default_rng(0))
    pixels, placed = place_both(position_image(*original), placement)
    for channel, step in ((0, 4), (1, 3)):
        factor = placement.resized[channel] / original[channel]
        offset = (pixels[channel] - placed[channel]) / step * factor  # in pixels of the canvas
        assert abs(offset.mean()) < 0.3
        assert np.abs(offset).max() < 0.5 * max(1, factor) + 0.5


def test_fit_keeps_the_shape():
    placement = Placement.fit((480, 640), 1024)
    assert placement.resized == (768, 1024) == placement.visible
    assert (placement.top, placement.left) == (0, 0)
    assert Placement.fit((640, 480), 1024, scale=0.5).visible == (512, 384)
    assert Placement.fit((1, 5000), 64).resized == (1, 64)  # never an empty image


def test_crop_stays_inside_and_reaches_every_edge():
    whole = Placement.fit((30, 10), 24, scale=28 / 24)
    crops = [whole.crop(np.random.default_rng(seed)) for seed in range(60)]
    assert {crop.top for crop in crops} == {0, 1, 2, 3, 4}
    assert {crop.left for crop in crops} == {0}  # narrower than the canvas: padded, not cropped
    assert {crop.visible for crop in crops} == {(24, whole.resized[1])}


def test_place_map_takes_stacks_and_keeps_the_type():
    masks = np.random.default_rng(0).random((3, 20, 30)) > 0.5
    placement = Placement.fit((20, 30), 60)
    placed = placement.place_map(masks)
    assert placed.dtype == bool and placed.shape == (3, 60, 60)
    assert (placed[:, :40:2, ::2] == masks).all() and (placed[:, 1:40:2, 1::2] == masks).all()
    assert not placed[:, 40:].any()
    assert (placement.place_map(masks[0].astype(np.uint8), fill=255)[40:] == 255).all()


def test_place_map_refuses_a_map_of_another_size():
    """Height and width exchanged is the usual mistake."""
    with pytest.raises(ValueError, match=r"\(30, 20\).*\(20, 30\)"):
        Placement.fit((20, 30), 60).place_map(np.zeros((30, 20)))


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
