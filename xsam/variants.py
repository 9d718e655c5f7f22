"""The alternatives of the paper's ablations: Swin encoders, the linear connector branch and SAM's
mask decoder.

The model imports this room where a configuration asks for one of them (docs/ablations.md)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone

from xsam.connector import pixel_shuffle
from xsam.decoder import cell_centres
from xsam.encoders import ChannelLayerNorm, transformers_config


class LinearBranch(nn.Module):
    """One scale without a look at the neighbours: two linear layers, then pixel shuffle (paper
    table 9, "MLP")."""

    def __init__(self, in_dim: int, hidden_dim: int, scale: float):
        super().__init__()
        self.scale = scale
        shuffled_dim = int(in_dim * scale)
        self.model = nn.Sequential(
            nn.Linear(in_dim, shuffled_dim, bias=False),
            nn.GELU(),
            nn.Linear(shuffled_dim, shuffled_dim, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, C/s, sH, sW]."""
        return pixel_shuffle(self.model(x), self.scale).permute(0, 3, 1, 2)


class ProjectedAttention(nn.Module):
    """Attention between two sets of tokens, at a width that may be narrower than theirs."""

    def __init__(self, dim: int, inner_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, inner_dim)
        self.k_proj = nn.Linear(dim, inner_dim)
        self.v_proj = nn.Linear(dim, inner_dim)
        self.out_proj = nn.Linear(inner_dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries [B, N, C], keys and values [B, M, C] to [B, N, C]."""
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class TwoWayLayer(nn.Module):
    """Tokens attend to each other and to the image, then the image to the tokens."""

    is_block = True  # see `model.is_block`

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, is_first: bool):
        super().__init__()
        self.is_first = is_first  # there the tokens are nothing but their positions yet
        self.self_attn = ProjectedAttention(dim, dim, num_heads)
        self.cross_attn_token_to_image = ProjectedAttention(dim, dim // 2, num_heads)
        self.cross_attn_image_to_token = ProjectedAttention(dim, dim // 2, num_heads)
        self.mlp = nn.Module()
        self.mlp.lin1, self.mlp.lin2 = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)
        self.layer_norm1, self.layer_norm2, self.layer_norm3, self.layer_norm4 = (
            nn.LayerNorm(dim, eps=1e-6) for _ in range(4)
        )

    def forward(
        self, tokens: Tensor, image: Tensor, token_positions: Tensor, image_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [R, N, C] and image [R, h·w, C] with their positions to both anew."""
        if self.is_first:
            tokens = self.layer_norm1(self.self_attn(tokens, tokens, tokens))
        else:
            x = tokens + token_positions
            tokens = self.layer_norm1(tokens + self.self_attn(x, x, tokens))
        keys = image + image_positions
        x = self.cross_attn_token_to_image(tokens + token_positions, keys, image)
        tokens = self.layer_norm2(tokens + x)
        tokens = self.layer_norm3(tokens + self.mlp.lin2(F.relu(self.mlp.lin1(tokens))))
        x = self.cross_attn_image_to_token(keys, tokens + token_positions, tokens)
        return tokens, self.layer_norm4(image + x)


class MaskMLP(nn.Module):
    """From a token to the weights of its mask."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(dim, dim), nn.Linear(dim, out_dim)
        self.layers = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [..., C] to the weights of their masks [..., C/8]."""
        return self.proj_out(F.relu(self.layers[0](F.relu(self.proj_in(x)))))


class SamMaskDecoder(nn.Module):
    """The mask decoder of Segment Anything (Kirillov et al. 2023) with a mask token for each query,
    where SAM has four: the first row of the paper's table 9. Class scores come from the tokens, so
    its head that estimates IoU is left out; names as in transformers."""

    def __init__(self, dim: int, num_layers: int, num_heads: int, mlp_dim: int, num_queries: int):
        super().__init__()
        self.iou_token = nn.Embedding(1, dim)  # attended to, as SAM's masks expect
        self.mask_tokens = nn.Embedding(num_queries, dim)
        self.no_mask_embed = nn.Embedding(1, dim)
        self.register_buffer("positional_embedding", torch.randn(2, dim // 2))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(
            TwoWayLayer(dim, num_heads, mlp_dim, is_first=index == 0) for index in range(num_layers)
        )
        self.transformer.final_attn_token_to_image = ProjectedAttention(dim, dim // 2, num_heads)
        self.transformer.layer_norm_final_attn = nn.LayerNorm(dim)
        self.upscale_conv1 = nn.ConvTranspose2d(dim, dim // 4, 2, 2)
        self.upscale_layer_norm = ChannelLayerNorm(dim // 4, eps=1e-6)
        self.upscale_conv2 = nn.ConvTranspose2d(dim // 4, dim // 8, 2, 2)
        self.output_hypernetworks_mlps = nn.ModuleList(
            MaskMLP(dim, dim // 8) for _ in range(num_queries)
        )

    def image_positions(self, height: int, width: int) -> Tensor:
        """Random Fourier codes of the cells' centres: [height·width, dim]."""
        centres = cell_centres(height, width, self.positional_embedding.device)
        codes = 2 * math.pi * (2 * centres.to(self.positional_embedding) - 1)
        codes = codes @ self.positional_embedding
        return torch.cat([codes.sin(), codes.cos()], dim=-1)

    def forward(
        self, image: Tensor, seg_embeddings: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Neck outputs [R, C, h, w] and <SEG> embeddings [R, C] or None to tokens [1, R, Q, C],
        mask embeddings [1, R, Q, C/8] and mask features [R, C/8, 4h, 4w]."""
        R, _, h, w = image.shape
        positions = self.image_positions(h, w).to(image)
        image = (image + self.no_mask_embed.weight[..., None, None]).flatten(2).transpose(1, 2)
        mask_tokens = self.mask_tokens.weight.expand(R, -1, -1)
        if seg_embeddings is not None:
            mask_tokens = mask_tokens + seg_embeddings[:, None]
        start = torch.cat([self.iou_token.weight.expand(R, -1, -1), mask_tokens], dim=1)

        tokens = start
        for layer in self.transformer.layers:
            tokens, image = layer(tokens, image, start, positions)
        x = self.transformer.final_attn_token_to_image(tokens + start, image + positions, image)
        tokens = self.transformer.layer_norm_final_attn(tokens + x)[:, 1:]  # [R, Q, C]

        image = image.transpose(1, 2).unflatten(2, (h, w))
        image = F.gelu(self.upscale_layer_norm(self.upscale_conv1(image)))
        mask_features = F.gelu(self.upscale_conv2(image))
        mlps = zip(self.output_hypernetworks_mlps, tokens.unbind(1), strict=True)
        mask_embeddings = torch.stack([mlp(token) for mlp, token in mlps], dim=1)
        return tokens[None], mask_embeddings[None], mask_features


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
        """Channels of the scales, the finest first."""
        return list(self.model.channels)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, S, S] normalised pixels to maps [B, h, w, C]: the normalised ones of every scale,
        finest first, then the last two without norm. So number -2 is what the language model is
        shown, as it is SAM's."""
        output = self.model(pixels, output_hidden_states=True)
        maps = [*output.feature_maps, *output.hidden_states[-2:]]
        return [x.permute(0, 2, 3, 1) for x in maps]
