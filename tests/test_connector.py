"""Pixel shuffle in the published channel order, sizes of the full preset, and the region sampler.

pytest tests/test_connector.py
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xsam.config import xsam
from xsam.connector import Projector, SegmentationConnector, pixel_shuffle, sample_regions


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- pixel shuffle -------------------------------------------------------------------------------


def spread(x: Tensor, factor: int) -> Tensor:
    """What the published recipe does at scale `factor`, index by index.

    Columns are folded first and take the upper digit of the channel, rows the next one:
    out[factor·h + i, factor·w + j, c] = x[h, w, (j·factor + i)·C' + c], C' channels out.
    """
    B, H, W, C = x.shape
    out_dim = C // factor**2
    out = torch.empty(B, H * factor, W * factor, out_dim)
    for i in range(factor):
        for j in range(factor):
            first = (j * factor + i) * out_dim
            out[:, i::factor, j::factor] = x[..., first : first + out_dim]
    return out


def gather(x: Tensor, factor: int) -> Tensor:
    """The recipe at scale 1/factor.

    out[h, w, (i·factor + j)·C + c] = x[factor·h + i, factor·w + j, c].
    """
    parts = [x[:, i::factor, j::factor] for i in range(factor) for j in range(factor)]
    return torch.cat(parts, dim=-1)


def numbered(*shape: int) -> Tensor:
    """Every element its own number, so that equality is equality of indices."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_pixel_shuffle_equals_the_index_formula(factor):
    x = numbered(2, 8, 12, 32)
    assert torch.equal(pixel_shuffle(x, float(factor)), spread(x, factor))
    assert torch.equal(pixel_shuffle(x, 1 / factor), gather(x, factor))


def test_shuffle_and_unshuffle():
    """Both ways fold columns before rows, as published, so the way back is not the inverse.

    The input returns with its two middle channel quarters exchanged; a second trip puts them right.
    """
    x = numbered(2, 6, 4, 16)
    back = pixel_shuffle(pixel_shuffle(x, 2.0), 0.5)
    first, second, third, fourth = x.chunk(4, dim=-1)
    assert torch.equal(back, torch.cat([first, third, second, fourth], dim=-1))
    assert torch.equal(pixel_shuffle(pixel_shuffle(back, 2.0), 0.5), x)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize(("height", "width"), [(7, 5), (6, 9), (9, 4)])
def test_a_grid_that_does_not_divide_is_padded(factor, height, width):
    """Zeros below and to the right, so the result is as large as the grid rounded up.

    Down and up again leaves every block of the grid transposed; twice is the way back, and what it
    adds to the grid is the padding.
    """
    x = 1 + numbered(2, height, width, 3)
    padded = F.pad(x, (0, 0, 0, -width % factor, 0, -height % factor))
    shuffled = pixel_shuffle(x, 1 / factor)
    assert torch.equal(shuffled, gather(padded, factor))
    assert shuffled.shape == (2, -(-height // factor), -(-width // factor), 3 * factor**2)
    once = pixel_shuffle(shuffled, float(factor))
    assert not torch.equal(once, padded)
    assert torch.equal(pixel_shuffle(pixel_shuffle(once, 1 / factor), float(factor)), padded)


# ---- connector and projectors --------------------------------------------------------------------


def test_full_size_parameter_counts():
    config = xsam().model
    with torch.device("meta"):
        connector = SegmentationConnector(
            "conv",
            config.seg_dim,
            config.connector_dim,
            config.connector_scales,
            config.connector_layers,
        )
        image_projector = Projector(1152, 3072)
        seg_projector = Projector(4 * config.seg_dim, 3072)
        llm_projector = Projector(3072, config.decoder_dim)
    assert count(connector) == 10_499_072
    assert connector.dims == [512, 1024, 2048]
    assert count(image_projector) == 12_982_272
    assert count(seg_projector) == 22_026_240
    assert count(llm_projector) == 852_480


def test_connector_makes_a_pyramid_from_its_layers():
    """Each branch reads its own hidden state, and the promised widths are the true ones."""
    torch.manual_seed(0)
    connector = SegmentationConnector(
        "conv", 32, 16, scales=(4.0, 2.0, 1.0, 0.5), layers=(1, 1, 2, 4)
    )
    hidden_states = [torch.randn(2, 6, 4, 32) for _ in range(5)]
    features = connector(hidden_states)
    shapes = [(2, 8, 24, 16), (2, 16, 12, 8), (2, 32, 6, 4), (2, 64, 3, 2)]
    assert [x.shape for x in features] == shapes
    assert connector.dims == [shape[1] for shape in shapes]

    hidden_states[2] = torch.randn(2, 6, 4, 32)
    same = [torch.equal(*pair) for pair in zip(features, connector(hidden_states), strict=True)]
    assert same == [True, True, False, True]


def test_linear_branches_do_not_look_at_neighbours():
    """A cell of the grid moves the cells it is shuffled into, all their channels and no others."""
    torch.manual_seed(0)
    scales = (4.0, 2.0, 1.0, 0.5)
    connector = SegmentationConnector("linear", 32, 16, scales, layers=(1, 1, 1, 1))
    x = torch.randn(2, 5, 4, 32)
    features = connector([None, x])
    shapes = [(2, 8, 20, 16), (2, 16, 10, 8), (2, 32, 5, 4), (2, 64, 3, 2)]
    assert [tuple(feature.shape) for feature in features] == shapes
    assert connector.dims == [shape[1] for shape in shapes]

    moved = x.clone()
    moved[1, 3, 2] += torch.randn(32)
    for scale, before, after in zip(scales, features, connector([None, moved]), strict=True):
        reached = torch.zeros(2, *before.shape[2:], dtype=torch.bool)
        rows, columns = (
            slice(int(index * scale), math.ceil((index + 1) * scale)) for index in (3, 2)
        )
        reached[1, rows, columns] = True
        change = (after - before).abs()
        assert torch.equal(change.amax(dim=1) > 1e-6, reached)
        if scale >= 1:  # else only its own share of the channels
            assert (change.permute(0, 2, 3, 1)[reached] > 0).all()


def test_connector_refuses_scales_without_layers():
    with pytest.raises(ValueError, match="connector_scales"):
        SegmentationConnector("conv", 8, 8, scales=(2.0, 1.0), layers=(1,))


# ---- region sampler ------------------------------------------------------------------------------


def test_a_constant_map_gives_the_constant():
    """Also at the rim, where bilinear reading beyond the outermost tokens would mix in zeros."""
    tokens = torch.tensor([3.0, -2.0]).expand(1, 5, 7, 2)
    points = torch.cat([torch.rand(4, 6, 2), torch.tensor([0.0, 1.0]).expand(4, 6, 2)], dim=1)
    regions = sample_regions(tokens, points, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(regions, tokens[0, 0, 0].expand(4, 2))


def test_corners_read_corner_tokens():
    """Points are (row, column)."""
    tokens = numbered(1, 4, 6, 3)
    points = torch.tensor([[[0.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]], [[1.0, 1.0]]])
    regions = sample_regions(tokens, points, torch.zeros(4, dtype=torch.long))
    expected = torch.stack([tokens[0, i, j] for i, j in ((0, 0), (0, -1), (-1, 0), (-1, -1))])
    torch.testing.assert_close(regions, expected)


def test_regions_are_means_over_points_of_their_own_image():
    """Tokens that hold their own (row, column, image) return the mean point and the image."""
    num_images, height, width = 3, 9, 5
    rows, columns = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    number = torch.arange(num_images).float().view(-1, 1, 1, 1).expand(-1, height, width, 1)
    tokens = torch.cat([place.expand(num_images, -1, -1, -1), number], dim=-1)
    image_index = torch.tensor([2, 0, 0, 1])
    points = torch.rand(4, 10, 2)
    expected = torch.cat([points.mean(dim=1), image_index[:, None].float()], dim=1)
    torch.testing.assert_close(sample_regions(tokens, points, image_index), expected)


def test_a_region_may_be_several_vectors():
    """Each of as many points, in their order: 8 points as 4 vectors are those of 4 regions of 2."""
    torch.manual_seed(0)
    tokens, points = torch.randn(2, 6, 5, 7), torch.rand(3, 8, 2)
    image_index = torch.tensor([1, 0, 1])
    for pooling in ("mean", "max"):
        vectors = sample_regions(tokens, points, image_index, pooling, num_vectors=4)
        pairs = points.reshape(12, 2, 2), image_index.repeat_interleave(4)
        assert vectors.shape == (12, 7)
        torch.testing.assert_close(vectors, sample_regions(tokens, *pairs, pooling))


def test_regions_may_be_maxima():
    """Channel by channel, of the readings at the single points; all negative, so that a reading
    mixed with zeros would win."""
    torch.manual_seed(0)
    tokens, points = torch.randn(2, 6, 5, 7) - 5, torch.rand(3, 8, 2)
    points[:, 0] = torch.tensor([1.0, 0.0])  # a corner, where padding is near
    image_index = torch.tensor([1, 0, 1])
    expected = torch.full((3, 7), -torch.inf)
    for region, image in enumerate(image_index.tolist()):
        for row, column in points[region] * torch.tensor([5, 4]):  # in steps of the grid
            top, left = min(int(row), 4), min(int(column), 3)
            down, right = row - top, column - left
            upper, lower = tokens[image, top : top + 2, left : left + 2]
            reading = torch.stack([1 - down, down]) @ torch.stack(
                [torch.stack([1 - right, right]) @ pair for pair in (upper, lower)]
            )
            expected[region] = expected[region].maximum(reading)
    maxima = sample_regions(tokens, points, image_index, "max")
    torch.testing.assert_close(maxima, expected, atol=1e-4, rtol=0)
