"""The dual encoders: SAM's ViT written out by hand, Swin and the image encoders through
transformers, and what both are fed.

First boxes of the diagram (paper section 3, "Dual Encoders"). The segmentation encoder gives fine
features to the connector and, pixel-shuffled, to the language model; the image encoder gives global
ones to the language model.
Legend: B batch, h w patch grid, C channels, N tokens, S side of the padded input in pixels.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModel, PreTrainedConfig

SEG_MEAN, SEG_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of pixels in 0..255


# ---- segmentation encoder ------------------------------------------------------------------------


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.projection = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x).permute(0, 2, 3, 1)  # [B, h, w, C]


def resize_positions(table: Tensor, shape: torch.Size) -> Tensor:
    """A position embedding [1, h, w, C] or relative positions [2L-1, c] at another size, as SAM
    resizes them; a table of another width is given back as it is."""
    if table.shape == shape or table.shape[-1] != shape[-1]:
        return table
    if table.dim() == 4:
        channels_first = table.permute(0, 3, 1, 2).float()
        resized = F.interpolate(channels_first, shape[1:3], mode="bilinear").permute(0, 2, 3, 1)
    else:
        resized = F.interpolate(table.T[None].float(), shape[0], mode="linear")[0].T
    return resized.to(table.dtype)


def relative_positions(table: Tensor, size: int) -> Tensor:
    """Rows of `table` [2L-1, c] for every (query, key) pair along one axis: [size, size, c]."""
    table = resize_positions(table, torch.Size((2 * size - 1, table.shape[1])))
    index = torch.arange(size, device=table.device)
    return table[index[:, None] - index[None, :] + size - 1]


class Attention(nn.Module):
    """Self-attention over a grid with decomposed relative positions (Li et al. 2022, MViTv2).

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
        q, k, v = (
            self.qkv(x).view(B, h * w, 3, heads, dim).permute(2, 0, 3, 1, 4)
        )  # [B, heads, N, dim]

        grid = q.reshape(B, heads, h, w, dim)
        table_h, table_w = (
            relative_positions(self.rel_pos_h, h),
            relative_positions(self.rel_pos_w, w),
        )
        spare = -(dim + h + w) % 8  # fused kernels want a multiple of 8: columns of zeros
        table_w = F.pad(table_w, (0, 0, 0, spare))
        bias_h = torch.einsum("bnhwc,hkc->bnhwk", grid, table_h.to(q))
        bias_w = torch.einsum("bnhwc,wkc->bnhwk", grid, table_w.to(q))
        q = torch.cat([q * dim**-0.5, bias_h.flatten(2, 3), bias_w.flatten(2, 3)], dim=-1)
        rows = torch.eye(h, device=x.device, dtype=q.dtype).repeat_interleave(w, dim=0)  # [N, h]
        columns = torch.eye(w, w + spare, device=x.device, dtype=q.dtype).repeat(
            h, 1
        )  # [N, w + spare]
        codes = torch.cat([rows, columns], dim=-1).expand(B, heads, -1, -1)
        k = torch.cat([k, codes], dim=-1)
        v = F.pad(v, (0, h + w + spare))  # and keys and values equally wide

        x = F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :dim]
        return self.proj(x.transpose(1, 2).reshape(B, h, w, C))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden_dim)
        self.lin2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class Block(nn.Module):
    """Transformer block; attends within `window_size` windows, or over the whole grid where it is
    0."""

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
            normed = F.pad(
                normed, (0, 0, 0, -w % size, 0, -h % size)
            )  # SAM attends to this padding too
            rows, columns = normed.shape[1] // size, normed.shape[2] // size
            windows = normed.view(B, rows, size, columns, size, C).transpose(2, 3)
            windows = self.attn(windows.reshape(-1, size, size, C))
            windows = windows.view(B, rows, columns, size, size, C).transpose(2, 3)
            attended = windows.reshape(B, rows * size, columns * size, C)[:, :h, :w]
        else:
            attended = self.attn(normed)
        x = x + attended
        return x + self.mlp(self.layer_norm2(x))


class Neck(nn.Module):
    """SAM's reduction to the width of its own mask decoder. X-SAM's decoder does not read it."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, out_dim, 1, bias=False)
        self.layer_norm1 = ChannelLayerNorm(out_dim, eps=1e-6)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False)
        self.layer_norm2 = ChannelLayerNorm(out_dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm1(self.conv1(x.permute(0, 3, 1, 2)))
        return self.layer_norm2(self.conv2(x))  # [B, C, h, w]


class SamEncoder(nn.Module):
    """Image encoder of Segment Anything (Kirillov et al. 2023), parameter names as in
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
    """A configuration of the transformers library from config.json values."""
    others = {name: value for name, value in values.items() if name != "model_type"}
    return AutoConfig.for_model(values["model_type"], **others)


class SwinEncoder(nn.Module):
    """Swin Transformer (Liu et al. 2021) as the backbone of Mask2Former, through transformers."""

    def __init__(self, config: dict):
        super().__init__()
        stages = [f"stage{number + 1}" for number in range(len(config["depths"]))]
        # Dropped paths would be drawn from the process's generator: another number of processes,
        # another result.
        config = transformers_config(config | {"out_features": stages, "drop_path_rate": 0.0})
        self.stride = config.patch_size * 2 ** (len(stages) - 2)  # of the last scale but one
        self.model = AutoBackbone.from_config(config)
        self.model.swin.layernorm = nn.Identity()  # nothing reads what it would normalise

    @property
    def dims(self) -> list[int]:
        return list(self.model.channels)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, S, S] normalised pixels to maps [B, h, w, C]: the normalised ones of every scale,
        finest first, then the last two without norm. So number -2 is what the language model is
        shown, as it is SAM's."""
        output = self.model(pixels, output_hidden_states=True)
        maps = [*output.feature_maps, *output.hidden_states[-2:]]
        return [x.permute(0, 2, 3, 1) for x in maps]


# ---- image encoder -------------------------------------------------------------------------------


class ImageEncoder(nn.Module):
    """A vision tower of transformers (SigLIP, SigLIP2, CLIP); its tokens are the hidden state
    before the last layer, without further norm and without a class token."""

    def __init__(self, config: dict):
        super().__init__()
        self.num_patches = (config["image_size"] // config["patch_size"]) ** 2
        self.model = AutoModel.from_config(transformers_config(config))

    @property
    def dim(self) -> int:
        return self.model.config.hidden_size

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, s, s] normalised pixels to tokens [B, N, C], one for each patch."""
        output = self.model(pixel_values=pixels, output_hidden_states=True)
        return output.hidden_states[-2][:, -self.num_patches :]


# ---- what the encoders are fed -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where an image lies on the square canvas of the segmentation encoder, in pixels.

    The image of `original` (height, width) is resized to `resized`; the canvas shows it from (top,
    left) on, and what it does not fill, at the right and the bottom, is padding.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    size: int
    top: int = 0
    left: int = 0

    @classmethod
    def fit(cls, original: tuple[int, int], size: int, scale: float = 1.0) -> "Placement":
        """The longest edge becomes size·scale."""
        factor = size * scale / max(original)
        return cls(original, tuple(max(1, round(side * factor)) for side in original), size)

    def crop(self, rng: np.random.Generator) -> "Placement":
        """A random window where the resized image is larger than the canvas."""
        top, left = (int(rng.integers(max(0, side - self.size) + 1)) for side in self.resized)
        return dataclasses.replace(self, top=top, left=left)

    @property
    def visible(self) -> tuple[int, int]:
        """Height and width of the canvas that shows the image."""
        corner = self.resized[0] - self.top, self.resized[1] - self.left
        return min(self.size, corner[0]), min(self.size, corner[1])

    def place_map(self, values: np.ndarray, fill: int = 0) -> np.ndarray:
        """Maps [..., H, W] of the original image on the canvas [..., S, S], by nearest pixel."""
        if values.shape[-2:] != self.original:
            raise ValueError(
                f"map of {values.shape} on an image of {self.original} (height, width)"
            )
        rows = (np.arange(self.visible[0]) + self.top + 0.5) * self.original[0] / self.resized[0]
        columns = (
            (np.arange(self.visible[1]) + self.left + 0.5) * self.original[1] / self.resized[1]
        )
        shown = (rows.astype(int), -2), (columns.astype(int), -1)
        visible = values
        for places, axis in shown if self.resized < self.original else shown[::-1]:
            visible = visible.take(places, axis)  # rows are whole lines of memory: the longer copy
        canvas = np.full((*values.shape[:-2], self.size, self.size), fill, values.dtype)
        canvas[..., : self.visible[0], : self.visible[1]] = visible
        return canvas

    def draw_points(self, mask: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """`count` random pixels of a mask, bool [H, W] of the original image, that the canvas
        shows: where they lie on it as (row, column) in 0..1, [count, 2]. With repetition where
        there are fewer; [0, 2] where there is none."""
        axes = []
        for side, resized, start, shown in zip(
            self.original, self.resized, (self.top, self.left), self.visible, strict=True
        ):
            place = (np.arange(side) + 0.5) * (resized / side) - 0.5 - start
            axes.append(np.where((place > -0.5) & (place < shown - 0.5), place.clip(min=0), -1))
        rows, columns = axes
        inside = np.flatnonzero(mask & (rows >= 0)[:, None] & (columns >= 0))
        if not len(inside):
            return np.zeros((0, 2))
        chosen = inside[rng.choice(len(inside), count, replace=len(inside) < count)]
        row, column = np.divmod(chosen, mask.shape[1])
        return np.stack([rows[row], columns[column]], axis=1) / self.size


def seg_pixels(image: Image.Image, placement: Placement) -> Tensor:
    """RGB image to the segmentation encoder's input: float [3, S, S], normalised, padding zero."""
    rows, columns = placement.visible
    box = None  # of the original image, where the canvas does not show all of it
    if (rows, columns) != placement.resized:
        y, x = np.array(placement.original) / placement.resized
        right, bottom = (placement.left + columns) * x, (placement.top + rows) * y
        box = (
            placement.left * x,
            placement.top * y,
            min(right, image.width),
            min(bottom, image.height),
        )
    resized = image.resize((columns, rows), Image.Resampling.BILINEAR, box)
    canvas = np.zeros((3, placement.size, placement.size), np.float32)
    shown = canvas[:, :rows, :columns]
    shown[:] = np.asarray(resized).transpose(2, 0, 1)
    _normalise(shown, SEG_MEAN, SEG_STD)
    return torch.from_numpy(canvas)


def _normalise(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Channels first [3, H, W], in place."""
    pixels -= np.float32(mean)[:, None, None]
    pixels /= np.float32(std)[:, None, None]


def image_pixels(
    image: Image.Image,
    size: int,
    mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    std: tuple[float, ...] = (0.5, 0.5, 0.5),
    resample: str = "bicubic",
) -> Tensor:
    """RGB image to the image encoder's input: squashed to float [3, size, size], normalised with
    mean and deviation of pixels in 0..1 (default: SigLIP's)."""
    resized = image.resize((size, size), Image.Resampling[resample.upper()])
    pixels = np.empty((3, size, size), np.float32)
    pixels[:] = np.asarray(resized).transpose(2, 0, 1)
    pixels /= np.float32(255)
    _normalise(pixels, mean, std)
    return torch.from_numpy(pixels)
