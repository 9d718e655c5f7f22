"""The segmentation decoder against transformers' Mask2Former, <SEG> steering, and the class heads.

pytest tests/test_decoder.py
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)

from xsam.decoder import (
    CosineClassHead,
    LinearClassHead,
    MaskedAttentionDecoder,
    PixelDecoder,
    Predictions,
)

IN_DIMS, HEADS, QUERIES, OUTPUTS = [8, 16, 32], 8, 10, 6
DIM = 256  # the full width: only there do ours and theirs group channels alike


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Moves every weight, so that no initial zero hides a mistake in what it multiplies.

    The norms stay near one: with small ones all masks come out empty, and masking goes untested.
    """
    for parameter in module.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))


def pyramid(height: int, width: int, batch: int = 2) -> list[Tensor]:
    """Inputs of three scales, the finest, [height, width], first."""
    return [
        torch.randn(batch, dim, height >> level, width >> level)
        for level, dim in enumerate(IN_DIMS)
    ]


@pytest.fixture(scope="module")
def pixel_decoder() -> PixelDecoder:
    torch.manual_seed(0)
    module = PixelDecoder(
        IN_DIMS, DIM, num_layers=2, num_heads=HEADS, num_points=4, mlp_dim=48
    ).eval()
    randomise(module)
    return module


@pytest.fixture(scope="module")
def decoder() -> MaskedAttentionDecoder:
    torch.manual_seed(1)
    module = MaskedAttentionDecoder(
        DIM,
        num_layers=OUTPUTS - 1,
        num_heads=HEADS,
        mlp_dim=96,
        num_queries=QUERIES,
        num_levels=len(IN_DIMS),
    ).eval()
    randomise(module)
    return module


@pytest.fixture(scope="module")
def features() -> tuple[Tensor, list[Tensor]]:
    """Mask features and levels as the pixel decoder would hand them on, coarsest level first."""
    torch.manual_seed(2)
    levels = [torch.randn(3, DIM, side, side + 2) for side in (4, 8, 16)]
    return torch.randn(3, DIM, 16, 18), levels


# ---- the reference -------------------------------------------------------------------------------


def reference_config() -> Mask2FormerConfig:
    return Mask2FormerConfig(
        feature_strides=[8, 16, 32],  # one FPN level, as X-SAM's three connector scales give
        feature_size=DIM,
        mask_feature_size=DIM,
        hidden_dim=DIM,
        num_attention_heads=HEADS,
        encoder_layers=2,
        encoder_feedforward_dim=48,
        decoder_layers=OUTPUTS,  # theirs counts the prediction before the first layer
        dim_feedforward=96,
        num_queries=QUERIES,
    )


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 24)])
@torch.no_grad()
def test_decoders_equal_transformers(pixel_decoder, decoder, height, width):
    """Every level, the mask features, and all outputs' queries and masks, from one state dict."""
    config = reference_config()
    their_pixel_decoder = Mask2FormerPixelDecoder(config, feature_channels=IN_DIMS).eval()
    their_pixel_decoder.load_state_dict(pixel_decoder.state_dict())
    their_decoder = Mask2FormerTransformerModule(in_features=DIM, config=config).eval()
    their_decoder.load_state_dict(decoder.state_dict())

    torch.manual_seed(height)
    inputs = pyramid(height, width)
    expected = their_pixel_decoder(inputs, output_hidden_states=False, output_attentions=False)
    mask_features, levels = pixel_decoder(inputs)
    torch.testing.assert_close(mask_features, expected.mask_features, atol=1e-4, rtol=0)
    for mine, theirs in zip(levels, expected.multi_scale_features, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)

    expected = their_decoder(
        multi_scale_features=levels,
        mask_features=mask_features,
        output_hidden_states=True,
        output_attentions=False,
    )
    queries, mask_embeddings = decoder(mask_features, levels)
    masks = torch.einsum("lrqc,rchw->lrqhw", mask_embeddings, mask_features)
    their_queries = torch.stack(expected.intermediate_hidden_states).transpose(1, 2)
    torch.testing.assert_close(queries, their_queries, atol=1e-4, rtol=0)
    their_masks = torch.stack(expected.masks_queries_logits)
    torch.testing.assert_close(masks, their_masks, atol=1e-4, rtol=0)
    # The comparison means something only where masks steer: most are neither empty nor full.
    share = (masks > 0).float().mean(dim=(3, 4))  # [L, B, Q]
    assert ((share > 0.05) & (share < 0.95)).float().mean() > 0.5


def test_deformable_attention_starts_as_transformers():
    """Where heads look before training; everything else of that module is learned from noise."""
    config = reference_config()
    theirs = Mask2FormerPixelDecoder(config, feature_channels=IN_DIMS).encoder.layers[0].self_attn
    Mask2FormerPreTrainedModel._init_weights(SimpleNamespace(config=config), theirs)
    ours = PixelDecoder(IN_DIMS, DIM, 1, HEADS, 4, 48).encoder.layers[0].self_attn
    for part in ("sampling_offsets", "attention_weights"):
        mine, reference = getattr(ours, part), getattr(theirs, part)
        torch.testing.assert_close(mine.weight, reference.weight)
        torch.testing.assert_close(mine.bias, reference.bias)


def test_full_size_parameter_counts():
    with torch.device("meta"):
        pixel_decoder = PixelDecoder([512, 1024, 2048], 256, 6, 8, 4, 1024)
        decoder = MaskedAttentionDecoder(256, 9, 8, 2048, 200, 3)
    assert sum(x.numel() for x in pixel_decoder.parameters()) == 6_101_440
    assert sum(x.numel() for x in decoder.parameters()) == 14_509_824


# ---- invariants ----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_batch_equals_its_images_one_by_one(pixel_decoder, decoder):
    torch.manual_seed(3)
    inputs, seg_embeddings = pyramid(16, 24, batch=3), torch.randn(3, DIM)
    mask_features, levels = pixel_decoder(inputs)
    queries, mask_embeddings = decoder(mask_features, levels, seg_embeddings)
    for run in range(3):
        one = slice(run, run + 1)
        features, pyramids = pixel_decoder([x[one] for x in inputs])
        torch.testing.assert_close(features, mask_features[one], atol=1e-5, rtol=1e-5)
        alone = decoder(features, pyramids, seg_embeddings[one])
        torch.testing.assert_close(alone[0], queries[:, one], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(alone[1], mask_embeddings[:, one], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_seg_embedding_steers_its_own_run(decoder, features):
    mask_features, levels = features
    without = decoder(mask_features, levels)
    zero = decoder(mask_features, levels, torch.zeros(3, DIM))
    assert torch.equal(zero[0], without[0]) and torch.equal(zero[1], without[1])

    seg_embeddings = torch.zeros(3, DIM)
    seg_embeddings[1] = torch.randn(DIM)
    steered = decoder(mask_features, levels, seg_embeddings)[1]
    torch.testing.assert_close(steered[:, [0, 2]], without[1][:, [0, 2]])
    # Every output feels it, the one before the first layer included.
    change = (steered[:, 1] - without[1][:, 1]).abs().amax(dim=(1, 2))
    assert (change > 1e-3).all()


@torch.no_grad()
def test_an_empty_mask_looks_everywhere(features):
    """Of positive features and constant embeddings all masks are full, or all empty."""
    mask_features, levels = features
    torch.manual_seed(4)
    decoder = MaskedAttentionDecoder(DIM, 3, HEADS, 96, QUERIES, 3).eval()
    last = decoder.decoder.mask_predictor.mask_embedder[-1][0]
    nn.init.zeros_(last.weight)
    queries = []
    for sign in (1.0, -1.0):
        nn.init.constant_(last.bias, sign)
        queries.append(decoder(mask_features.abs() + 0.1, levels)[0])
    assert torch.isfinite(queries[1]).all()
    torch.testing.assert_close(*queries)


def test_gradients_reach_every_parameter():
    """Masks steer without gradient; only a loss on masks trains the features they are made of."""
    torch.manual_seed(5)
    pixel_decoder = PixelDecoder(IN_DIMS, DIM, 1, HEADS, 2, 48)
    decoder = MaskedAttentionDecoder(DIM, 3, HEADS, 96, QUERIES, 3)
    randomise(pixel_decoder)
    mask_features, levels = pixel_decoder(pyramid(16, 16))
    queries, mask_embeddings = decoder(mask_features, levels)
    (steered,) = torch.autograd.grad(
        queries.square().sum(), mask_features, retain_graph=True, allow_unused=True
    )
    assert steered is None
    torch.einsum("lrqc,rchw->lrqhw", mask_embeddings, mask_features).square().sum().backward()
    for module in (pixel_decoder, decoder):
        for name, parameter in module.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name


# ---- class heads and outputs ---------------------------------------------------------------------


@pytest.fixture
def scored() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, conditions with the background last, and which of them are padding."""
    torch.manual_seed(6)
    is_padding = torch.zeros(2, 5, dtype=torch.bool)
    is_padding[1, 2:4] = True
    return torch.randn(3, 2, 4, 8), torch.randn(2, 5, 8), is_padding


def test_class_logits_are_scaled_cosines(scored):
    queries, conditions, is_padding = scored
    head = CosineClassHead(clamp=50.0)
    assert head.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    expected = F.cosine_similarity(queries[:, :, :, None], conditions[:, None], dim=-1) / 0.07
    logits = head(queries, conditions, torch.zeros_like(is_padding))
    torch.testing.assert_close(logits, expected)
    longer = head(7 * queries, 0.1 * conditions, torch.zeros_like(is_padding))
    torch.testing.assert_close(longer, logits)


def test_class_logits_are_clamped_and_padding_cannot_win(scored):
    queries, conditions, is_padding = scored
    head = CosineClassHead(clamp=2.0)
    free = CosineClassHead(clamp=1e9)(queries, conditions, is_padding)
    logits = head(queries, conditions, is_padding)
    shown = ~is_padding[:, None].expand(2, 4, 5)
    torch.testing.assert_close(logits[:, shown], free[:, shown].clamp(-2, 2))
    # Far below the clamp: no softmax or arg-max sees a padded class, however low the others are.
    assert (logits[:, ~shown] < -1000).all()
    assert (logits.softmax(-1)[:, ~shown] == 0).all()
    # Padding lies before the background, which keeps its place and its score.
    assert torch.equal(logits[..., -1], free[..., -1].clamp(-2, 2))
    logits.logsumexp(-1).sum().backward()
    assert torch.isfinite(head.logit_scale.grad)


def test_linear_head_adds_the_background(scored):
    assert LinearClassHead(8, 133)(scored[0]).shape == (3, 2, 4, 134)


def test_runs_read_the_masks_of_their_own_image():
    """The last output's masks; several runs may share an image."""
    mask_embeddings, mask_features = torch.randn(2, 3, 4, 5), torch.randn(2, 5, 6, 7)
    image_index = torch.tensor([1, 0, 1])
    masks = Predictions(None, mask_embeddings, mask_features, image_index).mask_logits()
    assert masks.shape == (3, 4, 6, 7)
    for run, image in enumerate(image_index):
        pixels = mask_embeddings[-1, run] @ mask_features[image].flatten(1)
        torch.testing.assert_close(masks[run].flatten(1), pixels)
