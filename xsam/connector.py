"""Between the encoders, the language model and the decoder: pixel shuffle, projectors, connector,
region sampler.

Paper section 3.2 ("Dual Projectors", "Segmentation Connector"), figure 4, and appendix A.
Legend: B batch, H W grid, C channels, N tokens, R regions, P points, s scale.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from xsam.encoders import ChannelLayerNorm


def pixel_shuffle(x: Tensor, scale: float) -> Tensor:
    """[B, H, W, C] to [B, sH, sW, C/s²]: trades channels for resolution (s > 1) or resolution for
    channels (s < 1). A grid that s < 1 does not divide is first padded with zeros, at the bottom
    and the right.

    Columns are folded before rows, which sets the order of the channels; published weights need
    this one.
    """
    if scale < 1:
        block = round(1 / scale)
        x = F.pad(x, (0, 0, 0, -x.shape[2] % block, 0, -x.shape[1] % block))
    B, H, W, C = x.shape
    x = x.reshape(B, H, int(W * scale), int(C / scale)).transpose(1, 2)  # [B, sW, H, C/s]
    x = x.reshape(B, int(W * scale), int(H * scale), int(C / scale**2))
    return x.transpose(1, 2)


class Projector(nn.Module):
    """Two linear layers with an exact GELU between, [..., in_dim] to [..., out_dim]: from visual
    tokens to the language model, and from its states to the decoder."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class ConvBranch(nn.Module):
    """One scale: three convolutions, a LayerNorm after each and no activation, then pixel shuffle
    (paper appendix A, "Model Framework")."""

    def __init__(self, in_dim: int, hidden_dim: int, scale: float):
        super().__init__()
        self.scale = scale
        shuffled_dim = int(in_dim * scale)
        self.model = nn.Sequential(
            nn.Conv2d(in_dim, hidden_dim, 1, bias=False),
            ChannelLayerNorm(hidden_dim, eps=1e-6),
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, bias=False),
            ChannelLayerNorm(hidden_dim, eps=1e-6),
            nn.Conv2d(hidden_dim, shuffled_dim, 1, bias=False),
            ChannelLayerNorm(shuffled_dim, eps=1e-6),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, C/s, sH, sW]."""
        x = self.model(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, H, W, sC]
        return pixel_shuffle(x, self.scale).permute(0, 3, 1, 2)


class SegmentationConnector(nn.Module):
    """A pyramid of features from a plain ViT (figure 4): branch i reads hidden state layers[i] and
    makes the scale scales[i], the finest first."""

    def __init__(
        self,
        kind: str,
        in_dim: int,
        hidden_dim: int,
        scales: tuple[float, ...],
        layers: tuple[int, ...],
    ):
        super().__init__()
        if len(scales) != len(layers):
            raise ValueError(
                f"connector_scales {scales} and connector_layers {layers} differ in length"
            )
        branch = ConvBranch
        if kind == "linear":
            from xsam.variants import LinearBranch as branch
        self.layers = layers
        self.model = nn.ModuleList(branch(in_dim, hidden_dim, scale) for scale in scales)
        self.dims = [int(int(in_dim * scale) / scale**2) for scale in scales]

    def forward(self, hidden_states: list[Tensor]) -> list[Tensor]:
        """All hidden states of the encoder, [B, H, W, C], to features [B, dims[i], sH, sW]."""
        return [
            branch(hidden_states[layer])
            for branch, layer in zip(self.model, self.layers, strict=True)
        ]


def sample_regions(
    tokens: Tensor,
    points: Tensor,
    image_index: Tensor,
    pooling: str = "mean",
    num_vectors: int = 1,
) -> Tensor:
    """Region sampler (paper appendix A, "Region Sampling"): reads visual tokens bilinearly at the
    points of every visual prompt, and pools equal shares of these, by mean or by maximum, into
    `num_vectors` vectors.

    tokens [B, H, W, C] are projected visual tokens; points [R, P, 2] are (row, column) in 0..1,
    where 0 and 1 are the centres of the outermost tokens; image_index [R] is the row of `tokens`
    that a prompt is read from. Returns [R·num_vectors, C].
    """
    grid = points.flip(-1)[:, :, None] * 2 - 1  # [R, P, 1, 2]; grid_sample wants (x, y) in -1..1
    maps = tokens.permute(0, 3, 1, 2)[image_index]  # [R, C, H, W]
    sampled = F.grid_sample(maps, grid.to(maps.dtype), align_corners=True)  # [R, C, P, 1]
    shares = sampled[..., 0].unflatten(2, (num_vectors, -1))  # [R, C, vectors, P / vectors]
    vectors = shares.mean(-1) if pooling == "mean" else shares.amax(-1)
    return vectors.transpose(1, 2).flatten(0, 1)
