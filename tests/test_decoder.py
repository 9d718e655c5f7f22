"""The segmentation decoders against transformers' Mask2Former and SAM, <SEG> steering, and class
heads.

pytest tests/test_decoder.py
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig, SamConfig, SamModel
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)

from xsam.decoder import (
    Atlas,
    CosineClassHead,
    DecoderOutput,
    LinearClassHead,
    MaskedAttentionDecoder,
    PixelDecoder,
    ReadAtlas,
    row_dots,
    row_dots_on_cpu,
)
from xsam.variants import SamMaskDecoder

IN_DIMS, HEADS, QUERIES, OUTPUTS = [8, 16, 32], 8, 10, 6
SWIN_DIMS = [4, *IN_DIMS]  # strides 4, 8, 16, 32: one finer than the levels of attention
DIM = 256  # the full width: only there do ours and theirs group channels alike


@torch.no_grad()
def randomise(module: nn.Module, scale: float = 0.05) -> None:
    """Moves every weight, so that no initial zero hides a mistake in what it multiplies.

    The norms stay near one: with small ones all masks come out empty, and masking goes untested.
    """
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn_like(parameter))


def pyramid(height: int, width: int, batch: int = 2, in_dims: list[int] = IN_DIMS) -> list[Tensor]:
    """Inputs of three scales, or of others, the finest, [height, width], first; odd sides are
    halved as Swin halves them."""
    return [
        torch.randn(batch, dim, -(-height // 2**level), -(-width // 2**level))
        for level, dim in enumerate(in_dims)
    ]


def make_pixel_decoder(in_dims: list[int]) -> PixelDecoder:
    torch.manual_seed(0)
    module = PixelDecoder(
        in_dims, DIM, num_layers=2, num_heads=HEADS, num_points=4, mlp_dim=48
    ).eval()
    randomise(module)
    return module


@pytest.fixture(scope="module")
def pixel_decoder() -> PixelDecoder:
    return make_pixel_decoder(IN_DIMS)


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


def reference_config(num_inputs: int = 3) -> Mask2FormerConfig:
    return Mask2FormerConfig(
        # One FPN level either way: X-SAM's three connector scales, or Swin's four.
        feature_strides=[4, 8, 16, 32][-num_inputs:],
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


@pytest.mark.parametrize(
    ("in_dims", "height", "width"),
    [(IN_DIMS, 16, 16), (IN_DIMS, 32, 24), (SWIN_DIMS, 32, 32), (SWIN_DIMS, 54, 38)],
)
@torch.no_grad()
def test_decoders_equal_transformers(decoder, in_dims, height, width):
    """Every level, the mask features, and all outputs' queries and masks, from one state dict."""
    config, pixel_decoder = reference_config(len(in_dims)), make_pixel_decoder(in_dims)
    their_pixel_decoder = Mask2FormerPixelDecoder(config, feature_channels=in_dims).eval()
    their_pixel_decoder.load_state_dict(pixel_decoder.state_dict())
    their_decoder = Mask2FormerTransformerModule(in_features=DIM, config=config).eval()
    their_decoder.load_state_dict(decoder.state_dict())

    torch.manual_seed(height)
    inputs = pyramid(height, width, in_dims=in_dims)
    expected = their_pixel_decoder(inputs, output_hidden_states=False, output_attentions=False)
    mask_features, levels = pixel_decoder(inputs)
    assert mask_features.shape == (2, DIM, height, width)
    assert [x.shape[2:] for x in levels] == [x.shape[2:] for x in inputs[:-4:-1]]
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


def readings(
    shapes: list[tuple[int, int]], num_points: int, dtype: torch.dtype
) -> tuple[Atlas, Tensor, Tensor, Tensor]:
    """An atlas, values, locations and weights of two images, two heads and three channels; of the
    locations some lie beyond the borders, some far beyond."""
    torch.manual_seed(0)
    atlas, levels = Atlas(shapes, torch.device("cpu")), len(shapes)
    N = sum(height * width for height, width in shapes)
    values = torch.randn(2, N, 2, 3, dtype=dtype)
    offsets = torch.randn(2, N, 2, levels, num_points, 2, dtype=dtype)
    offsets *= torch.tensor([1, 3, 30])[torch.randint(3, (*offsets.shape[:-1], 1))]
    locations = (atlas.centres[:, None, :, None] + offsets).flatten(3, 4)
    weights = torch.randn(2, N, 2, levels * num_points, dtype=dtype)
    return atlas, values, locations, weights


def test_reading_an_atlas_equals_grid_sample():
    """Values and all gradients, inside, at the borders and beyond them."""
    shapes = [(2, 3), (5, 4), (6, 7)]
    atlas, values, locations, weights = readings(shapes, 4, torch.float32)
    locations[:, ::3] = locations[:, ::3].round()  # whole cells, borders among them
    leaves = [x.requires_grad_() for x in (values, locations, weights)]
    ours = ReadAtlas.apply(*leaves, atlas)

    expected = 0
    levels = values.split([h * w for h, w in shapes], dim=1)
    parts = zip(
        levels, locations.unflatten(3, (3, 4)).unbind(3), weights.split(4, dim=3), strict=True
    )
    for (height, width), low, (level, place, weight) in zip(shapes, atlas.low, parts, strict=True):
        maps = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (height, width))
        inside = place - low - 1.5  # from the corner of the level, in cells
        grid = 2 * inside.transpose(1, 2).flatten(0, 1) / torch.tensor([width, height]) - 1
        read = F.grid_sample(maps, grid, align_corners=False)  # [B·heads, c, N, points]
        read = read.unflatten(0, (2, 2)).permute(0, 3, 1, 2, 4)
        expected = expected + (read * weight[:, :, :, None]).sum(-1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)

    noise = torch.randn_like(ours)
    ours, expected = (torch.autograd.grad(x, leaves, noise) for x in (ours, expected))
    # Of a place on the line between two cells either slope is right.
    away = (locations - locations.round()).abs().amin(-1, keepdim=True) > 1e-3
    for mine, reference, mask in zip(ours, expected, (1, away, 1), strict=True):
        torch.testing.assert_close(mine * mask, reference * mask, atol=1e-4, rtol=1e-4)


def test_gradients_of_reading_an_atlas():
    atlas, *leaves = readings([(1, 2), (3, 2)], 1, torch.float64)
    leaves = [x.requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(lambda *x: ReadAtlas.apply(*x, atlas), leaves)


def test_row_dots_on_a_cpu_are_those_of_a_gpu():
    torch.manual_seed(0)
    rows, tables = torch.randn(9, 5), [torch.randn(20, 5), torch.randn(20, 5)]
    index = torch.randint(20, (9, 4), dtype=torch.int32)
    for dot in (row_dots, row_dots_on_cpu):
        for table, dots in zip(tables, dot(rows, tables, index), strict=True):
            torch.testing.assert_close(dots, torch.einsum("nc,nsc->ns", rows, table[index]))


def test_a_diverged_model_can_read_an_atlas():
    """The loop reports a loss that is not finite; reading must not fail before."""
    atlas, values, locations, weights = readings([(1, 2), (3, 2)], 1, torch.float32)
    locations[0, 0, 0, 0], locations[0, 0, 1, 0], locations[0, 1] = math.nan, math.inf, -math.inf
    read = ReadAtlas.apply(values, locations.requires_grad_(), weights, atlas)
    assert read[0, 0, 0].isnan().all() and read.isnan().sum() == 3
    read.sum().backward()


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


@pytest.mark.parametrize("in_dims", [[16], IN_DIMS, SWIN_DIMS])
def test_gradients_reach_every_parameter(in_dims):
    """Masks steer without gradient; only a loss on masks trains the features they are made of. A
    single scale is attended to and painted at."""
    torch.manual_seed(5)
    num_levels = min(3, len(in_dims))
    pixel_decoder = PixelDecoder(in_dims, DIM, 1, HEADS, 2, 48)
    decoder = MaskedAttentionDecoder(DIM, 3, HEADS, 96, QUERIES, num_levels)
    randomise(pixel_decoder)
    inputs = pyramid(16, 12, in_dims=in_dims)
    mask_features, levels = pixel_decoder(inputs)
    assert mask_features.shape == (2, DIM, 16, 12)
    assert [x.shape[2:] for x in levels] == [x.shape[2:] for x in inputs[::-1][:num_levels]]
    queries, mask_embeddings = decoder(mask_features, levels)
    assert queries.shape == mask_embeddings.shape == (4, 2, QUERIES, DIM)
    (steered,) = torch.autograd.grad(
        queries.square().sum(), mask_features, retain_graph=True, allow_unused=True
    )
    assert steered is None
    torch.einsum("lrqc,rchw->lrqhw", mask_embeddings, mask_features).square().sum().backward()
    for module in (pixel_decoder, decoder):
        for name, parameter in module.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name


# ---- SAM's mask decoder --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sam() -> tuple[SamMaskDecoder, SamModel]:
    """Ours with SAM's four mask tokens as queries, and transformers' of the same weights."""
    torch.manual_seed(7)
    dim, side = 32, 5
    vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_dim=16)
    vision |= dict(image_size=16 * side, output_channels=dim, num_pos_feats=dim // 2, scale=0.5)
    prompt = dict(hidden_size=dim, image_embedding_size=side, image_size=16 * side)
    masks = dict(hidden_size=dim, num_hidden_layers=2, num_attention_heads=4, mlp_dim=48)
    masks |= dict(num_multimask_outputs=3, iou_head_hidden_dim=16)
    theirs = SamModel(
        SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=masks)
    ).eval()
    randomise(theirs, scale=0.2)

    weights = {
        name: value
        for name, value in theirs.mask_decoder.state_dict().items()
        if not name.startswith("iou_prediction_head.")
    }
    weights["no_mask_embed.weight"] = theirs.prompt_encoder.no_mask_embed.weight
    weights["positional_embedding"] = theirs.shared_image_embedding.positional_embedding
    ours = SamMaskDecoder(dim, num_layers=2, num_heads=4, mlp_dim=48, num_queries=4).eval()
    ours.load_state_dict(weights)
    return ours, theirs


@pytest.mark.parametrize(("height", "width"), [(5, 5), (4, 7)])
@torch.no_grad()
def test_sam_mask_decoder_equals_transformers(sam, height, width):
    """Without a prompt, all four masks, and the tokens that the class head reads. Theirs codes the
    positions of squares only; those of a rectangle are made here, from the centres of its cells."""
    ours, theirs = sam
    y, x = (torch.arange(size).add(0.5) / size for size in (height, width))
    centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    positions = theirs.shared_image_embedding(centres).permute(2, 0, 1)[None]
    if height == width:
        torch.testing.assert_close(positions, theirs.get_image_wide_positional_embeddings())

    torch.manual_seed(height)
    image = torch.randn(3, 32, height, width)
    tokens, their_masks = [], []
    hook = theirs.mask_decoder.transformer.register_forward_hook(
        lambda _, __, output: tokens.append(output[0][:, 0, 1:5])
    )
    for multimask_output in (False, True):
        masks, _ = theirs.mask_decoder(
            image_embeddings=image,
            image_positional_embeddings=positions.expand(3, -1, -1, -1),
            sparse_prompt_embeddings=None,
            dense_prompt_embeddings=theirs.prompt_encoder.no_mask_embed.weight[..., None, None],
            multimask_output=multimask_output,
        )
        their_masks.append(masks[:, 0])
    hook.remove()
    queries, mask_embeddings, mask_features = ours(image)
    assert mask_features.shape == (3, 4, 4 * height, 4 * width)
    masks = torch.einsum("lrqc,rchw->lrqhw", mask_embeddings, mask_features)
    torch.testing.assert_close(masks, torch.cat(their_masks, dim=1)[None], atol=1e-4, rtol=0)
    torch.testing.assert_close(queries, tokens[0][None], atol=1e-4, rtol=0)


@torch.no_grad()
def test_seg_embedding_steers_its_own_run_of_sam(sam):
    """It is added to every mask token, and not to the token of the IoU."""
    ours, _ = sam
    torch.manual_seed(8)
    image, seg_embeddings = torch.randn(3, 32, 5, 4), torch.zeros(3, 32)
    without = ours(image)
    assert all(
        torch.equal(*pair) for pair in zip(ours(image, seg_embeddings), without, strict=True)
    )

    seg_embeddings[1] = torch.randn(32)
    shifted = copy.deepcopy(ours)
    shifted.mask_tokens.weight += seg_embeddings[1]
    steered = ours(image, seg_embeddings)
    for x, before, expected in zip(steered, without, shifted(image), strict=True):
        x, before, expected = (y.reshape(3, -1) for y in (x, before, expected))
        torch.testing.assert_close(x[[0, 2]], before[[0, 2]], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(x[1], expected[1], atol=1e-5, rtol=1e-5)
        assert (x[1] - before[1]).abs().max() > 1e-2


def test_gradients_reach_every_parameter_of_sam():
    torch.manual_seed(9)
    decoder = SamMaskDecoder(32, num_layers=2, num_heads=4, mlp_dim=48, num_queries=5)
    seg_embeddings = torch.randn(2, 32, requires_grad=True)
    _, mask_embeddings, mask_features = decoder(torch.randn(2, 32, 5, 4), seg_embeddings)
    torch.einsum("lrqc,rchw->lrqhw", mask_embeddings, mask_features).square().sum().backward()
    assert (seg_embeddings.grad != 0).any(dim=1).all()
    for name, parameter in decoder.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        # Softmax does not see what all keys have in common.
        assert name.endswith("k_proj.bias") or parameter.grad.abs().sum() > 0, name


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
    masks = DecoderOutput(None, mask_embeddings, mask_features, image_index).mask_logits()
    assert masks.shape == (3, 4, 6, 7)
    for run, image in enumerate(image_index):
        pixels = mask_embeddings[-1, run] @ mask_features[image].flatten(1)
        torch.testing.assert_close(masks[run].flatten(1), pixels)


def test_runs_may_have_mask_features_of_their_own():
    """As SAM's decoder makes them: a run's features, whatever image it is of and in any order."""
    mask_embeddings, mask_features = torch.randn(2, 3, 4, 5), torch.randn(3, 5, 6, 7)
    image_index, feature_index = torch.tensor([1, 0, 1]), torch.tensor([2, 0, 1])
    predictions = DecoderOutput(None, mask_embeddings, mask_features, image_index, feature_index)
    masks = predictions.mask_logits()
    assert masks.shape == (3, 4, 6, 7)
    for run, number in enumerate(feature_index):
        assert torch.equal(predictions.features_of(run), mask_features[number])
        pixels = mask_embeddings[-1, run] @ mask_features[number].flatten(1)
        torch.testing.assert_close(masks[run].flatten(1), pixels)
    several = predictions.features_of(slice(1, 3))
    assert torch.equal(several, mask_features[feature_index[1:]])
