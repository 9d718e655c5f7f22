"""The dual encoders: SAM's ViT written out by hand, the image encoder through transformers.

First boxes of the diagram (paper section 3.2, "Dual Encoders"). The segmentation encoder gives fine
features to the connector and, pixel-shuffled, to the language model; the image encoder gives global
ones to the language model.
Legend: B batch, h w patch grid, C channels, N tokens, S side of the padded input and s side of the
image encoder's, in pixels.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# ---- segmentation encoder ------------------------------------------------------------------------


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """[B, 3, S, S] pixels to patches [B, h, w, C]."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.projection = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x).permute(0, 2, 3, 1)


def resize_positions(table: Tensor, shape: torch.Size) -> Tensor:
    """A position embedding [1, h, w, C], or relative positions [2L-1, c] of an axis of L patches,
    interpolated to `shape` as SAM does; a table of another width is given back as it is."""
    if table.shape == shape or table.shape[-1] != shape[-1]:
        return table
    if table.dim() == 4:
        channels_first = table.permute(0, 3, 1, 2).float()  # [1, C, h, w]
        resized = F.interpolate(channels_first, shape[1:3], mode="bilinear").permute(0, 2, 3, 1)
    else:
        resized = F.interpolate(table.T[None].float(), shape[0], mode="linear")[0].T
    return resized.to(table.dtype)


def relative_positions(table: Tensor, size: int) -> Tensor:
    """The row of `table` [2L-1, c] for every (query, key) pair of an axis of `size` patches:
    [size, size, c]."""
    table = resize_positions(table, torch.Size((2 * size - 1, table.shape[1])))
    index = torch.arange(size, device=table.device)
    return table[index[:, None] - index[None, :] + size - 1]


class Attention(nn.Module):
    """Self-attention over a grid [B, h, w, C] with decomposed relative positions (Li et al. 2022,
    MViTv2).

    The bias of query (i, j) and key (k, l) is q·R_h[i, k] + q·R_w[j, l]. It is a longer dot
    product: append the two rows of biases to the query and one-hot row and column codes to the key.
    So the fused kernel runs and the [heads, N, N] bias never exists.
    """

    def __init__(self, dim: int, num_heads: int, size: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, dim // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        B, h, w, C = x.shape
        heads, dim = self.num_heads, C // self.num_heads
        qkv = self.qkv(x).view(B, h * w, 3, heads, dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, dim]

        # Fused kernels want queries, keys and values of one width, a multiple of 8.
        spare = -(dim + h + w) % 8  # columns of zeros
        table_h = relative_positions(self.rel_pos_h, h).to(q)  # [h, h, dim]
        table_w = F.pad(relative_positions(self.rel_pos_w, w), (0, 0, 0, spare)).to(q)
        grid = q.reshape(B, heads, h, w, dim)
        bias_h = torch.einsum("bnhwc,hkc->bnhwk", grid, table_h).flatten(2, 3)  # [B, heads, N, h]
        bias_w = torch.einsum("bnhwc,wkc->bnhwk", grid, table_w).flatten(2, 3)
        q = torch.cat([q * dim**-0.5, bias_h, bias_w], dim=-1)  # [B, heads, N, dim + h + w + spare]
        like = dict(device=x.device, dtype=q.dtype)
        rows = torch.eye(h, **like).repeat_interleave(w, dim=0)  # [N, h]
        columns = torch.eye(w, w + spare, **like).repeat(h, 1)  # [N, w + spare]
        codes = torch.cat([rows, columns], dim=-1).expand(B, heads, -1, -1)
        k = torch.cat([k, codes], dim=-1)
        v = F.pad(v, (0, h + w + spare))

        x = F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :dim]
        return self.proj(x.transpose(1, 2).reshape(B, h, w, C))


class MLP(nn.Module):
    """Two linear layers with an exact GELU between, [..., dim] to [..., dim]."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden_dim)
        self.lin2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class Block(nn.Module):
    """Transformer block on [B, h, w, C]. It attends within windows of `window_size` patches a side,
    or over the whole grid where that is 0."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, window_size: int, grid_size: int):
        super().__init__()
        self.window_size = window_size
        self.layer_norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, window_size or grid_size)
        self.layer_norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        B, h, w, C = x.shape
        normed = self.layer_norm1(x)
        if self.window_size:
            size = self.window_size
            # SAM attends to this padding too.
            normed = F.pad(normed, (0, 0, 0, -w % size, 0, -h % size))
            rows, columns = normed.shape[1] // size, normed.shape[2] // size
            windows = normed.view(B, rows, size, columns, size, C).transpose(2, 3)
            windows = self.attn(windows.reshape(-1, size, size, C))  # [B·windows, size, size, C]
            windows = windows.view(B, rows, columns, size, size, C).transpose(2, 3)
            attended = windows.reshape(B, rows * size, columns * size, C)[:, :h, :w]
        else:
            attended = self.attn(normed)
        x = x + attended
        return x + self.mlp(self.layer_norm2(x))


class Neck(nn.Module):
    """SAM's reduction [B, h, w, C] to [B, C', h, w], the width of its own mask decoder. X-SAM's
    decoder does not read it; published weights have it."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, out_dim, 1, bias=False)
        self.layer_norm1 = ChannelLayerNorm(out_dim, eps=1e-6)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False)
        self.layer_norm2 = ChannelLayerNorm(out_dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm1(self.conv1(x.permute(0, 3, 1, 2)))
        return self.layer_norm2(self.conv2(x))


class SamEncoder(nn.Module):
    """Image encoder of Segment Anything (Kirillov et al. 2023); parameter names are those of
    transformers."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        window_size: int,
        global_blocks: tuple[int, ...],
        neck_dim: int,
    ):
        super().__init__()
        grid = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim))
        self.layers = nn.ModuleList(
            Block(dim, num_heads, mlp_dim, 0 if index in global_blocks else window_size, grid)
            for index in range(depth)
        )
        self.neck = Neck(dim, neck_dim)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, S, S] normalised pixels to depth+1 hidden states [B, h, w, C]; the patch embedding
        is number 0."""
        x = self.patch_embed(pixels)
        x = x + resize_positions(self.pos_embed, torch.Size((1, *x.shape[1:])))
        hidden_states = [x]
        for layer in self.layers:
            x = layer(x)
            hidden_states.append(x)
        return hidden_states


def transformers_config(values: dict) -> PreTrainedConfig:
    """The configuration of the transformers library with the values of a config.json."""
    from transformers import AutoConfig

    values = copy.deepcopy(values)  # the library writes into them
    return AutoConfig.for_model(values.pop("model_type"), **values)


# ---- image encoder -------------------------------------------------------------------------------


class ImageEncoder(nn.Module):
    """A vision model of transformers (SigLIP, SigLIP2, CLIP) by its config.json; its tokens are the
    input of its last layer, without further norm and without a class token."""

    def __init__(self, config: dict):
        super().__init__()
        from transformers import AutoModel

        self.num_patches = (config["image_size"] // config["patch_size"]) ** 2
        self.model = AutoModel.from_config(transformers_config(config))

    @property
    def dim(self) -> int:
        return self.model.config.hidden_size

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, s, s] normalised pixels to tokens [B, N, C], one for each patch."""
        output = self.model(pixel_values=pixels, output_hidden_states=True)
        return output.hidden_states[-2][:, -self.num_patches :]
