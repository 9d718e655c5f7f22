"""From multi-scale features to masks: pixel decoder, masked-attention decoder, class heads.

Last box of the diagram (paper section 3.2, "Segmentation Decoder"): that of Mask2Former (Cheng
et al. 2022) with deformable attention (Zhu et al. 2021) in plain PyTorch, the <SEG> state added to
its queries, and class scores that are cosines between queries and condition embeddings. Parameter
names are those of transformers' Mask2Former.
Legend: B images, R decoder runs (one per <SEG>), Q queries, N tokens, C channels, c channels of a
head, S locations that a head reads for a token, K classes, L decoder outputs.
"""

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")


def sine_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Sine and cosine codes of the row and the column of every cell of a grid, both of which run to
    2π: [height·width, dim], rows first."""
    frequencies = 10000 ** (2 * (torch.arange(dim // 2, device=device) // 2) / (dim // 2))

    def codes(size: int) -> Tensor:
        position = torch.arange(1, size + 1, device=device) / (size + 1e-6) * 2 * math.pi
        angles = position[:, None] / frequencies  # [size, dim / 2]
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=-1).flatten(1)

    rows, columns = codes(height)[:, None], codes(width)[None]
    grid = [rows.expand(height, width, -1), columns.expand(height, width, -1)]
    return torch.cat(grid, dim=-1).flatten(0, 1)


def cell_centres(height: int, width: int, device: torch.device) -> Tensor:
    """(x, y) in 0..1 of the centre of every cell of a grid, rows first: [height·width, 2]."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).flatten(0, 1)


# ---- pixel decoder -------------------------------------------------------------------------------


class Atlas:
    """The levels of a pyramid, one below the other on one map.

    Two rows and columns of zeros lie before every level and after the last, so a location beyond
    the border of a level reads zero. The four cells around a location are then one index into four
    shifted views of the map.
    """

    def __init__(self, shapes: list[tuple[int, int]], device: torch.device):
        self.shapes = shapes
        self.width = max(width for _, width in shapes) + 2
        self.tops = [0]
        for height, _ in shapes:
            self.tops.append(self.tops[-1] + height + 2)
        self.height = self.tops[-1] + 3
        low = torch.tensor([(0, top) for top in self.tops[:-1]], device=device).float()
        sizes = torch.tensor([(w, h) for h, w in shapes], device=device).float()
        centres = torch.cat([cell_centres(h, w, device) for h, w in shapes])
        self.low, self.high = low, low + sizes + 2  # [levels, 2], (x, y) between which to read
        # Where the cells of all levels lie on every level, (x, y): [N, levels, 2].
        self.centres = centres[:, None] * sizes + low + 1.5

    def levels(self, maps: Tensor) -> list[Tensor]:
        """The levels on maps [..., height, width, c], as views [..., h_i, w_i, c]."""
        return [
            maps[..., top + 2 : top + 2 + h, 2 : 2 + w, :]
            for top, (h, w) in zip(self.tops, self.shapes, strict=False)
        ]


class ReadAtlas(torch.autograd.Function):
    """Weighted sums of bilinear readings: a token reads S locations with every head, on the map of
    that head.

    A bag is what one token reads with one head. `embedding_bag` adds up its rows of c numbers, so
    no tensor of all readings is made, forward or backward.
    """

    @staticmethod
    def forward(ctx, values: Tensor, locations: Tensor, weights: Tensor, atlas: Atlas) -> Tensor:
        """values [B, N, heads, c]; locations [B, N, heads, S, 2] on the atlas, (x, y), float32 or
        float64; weights [B, N, heads, S]. The sums are [B, N, heads, c]."""
        B, N, heads, c = values.shape
        maps = locations.new_zeros(B, heads, atlas.height, atlas.width, c)
        levels = values.transpose(1, 2).split([h * w for h, w in atlas.shapes], dim=2)
        for target, level in zip(atlas.levels(maps), levels, strict=True):
            target.copy_(level.unflatten(2, target.shape[2:4]))
        num_points = locations.shape[3] // len(levels)
        low, high = (x.repeat_interleave(num_points, dim=0) for x in (atlas.low, atlas.high))
        locations = locations.clamp(low, high)  # to where all is zero, and its gradient too
        ctx.save_for_backward(maps, locations, weights)
        ctx.atlas, ctx.dtype = atlas, values.dtype
        cells, x, y = _find_cells(locations, atlas)  # [bags, S]
        sums = [
            F.embedding_bag(cells, table, mode="sum", per_sample_weights=share)
            for table, share in zip(_shift(maps, atlas), _share(weights, x, y), strict=True)
        ]  # four of [bags, c]
        return sum(sums[1:], sums[0]).view(B, N, heads, c)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, locations, weights = ctx.saved_tensors
        atlas = ctx.atlas
        grad = grad.to(maps.dtype).flatten(0, 2)  # [bags, c]
        cells, x, y = _find_cells(locations, atlas)
        shares = _share(weights, x, y)

        dot = row_dots_on_cpu if grad.device.type == "cpu" else row_dots
        dots = dot(grad, _shift(maps, atlas), cells)  # four of [bags, S]
        top, bottom = dots[0].lerp(dots[1], x), dots[2].lerp(dots[3], x)
        grad_weights = top.lerp(bottom, y)
        grad_x = (dots[1] - dots[0]).lerp(dots[3] - dots[2], y)
        grad_locations = torch.stack([grad_x, bottom - top], dim=-1) * weights.view_as(x)[..., None]
        grad_locations = grad_locations.view_as(locations)

        # A cell gathers from the bags that read it, in an order that serves all four shifts.
        grad_maps = torch.zeros_like(maps)
        targets = _shift(grad_maps, atlas)
        cells, order = cells.flatten().sort()
        bags = (order // x.shape[1]).int()
        rows = torch.arange(len(targets[0]) + 1, device=cells.device, dtype=cells.dtype)
        starts = torch.searchsorted(cells, rows, out_int32=True)
        for target, share in zip(targets, shares, strict=True):
            share = share.flatten().index_select(0, order)
            target += F.embedding_bag(
                bags, grad, starts, mode="sum", per_sample_weights=share, include_last_offset=True
            )
        grad_values = [x.flatten(2, 3) for x in atlas.levels(grad_maps)]
        grad_values = torch.cat(grad_values, dim=2).transpose(1, 2)  # [B, N, heads, c]
        return grad_values.to(ctx.dtype), grad_locations, grad_weights.view_as(weights), None


def _find_cells(locations: Tensor, atlas: Atlas) -> tuple[Tensor, Tensor, Tensor]:
    """The cells up left of locations [B, N, heads, S, 2] as rows of the maps, int32, and how far
    right and down of them the locations lie, in cells: all [B·N·heads, S]."""
    B, _, heads, S, _ = locations.shape
    corners = locations.nan_to_num().int()  # a diverged model gets as far as its loss
    size = atlas.height * atlas.width
    maps = torch.arange(B * heads, device=locations.device, dtype=torch.int32) * size
    cells = corners[..., 1] * atlas.width + corners[..., 0]
    cells += maps.view(B, 1, heads, 1)
    x, y = (locations - corners).unbind(-1)
    return cells.view(-1, S), x.reshape(-1, S), y.reshape(-1, S)


def _shift(maps: Tensor, atlas: Atlas) -> list[Tensor]:
    """Four views, equally long, of the cells of maps [B, heads, height, width, c] as rows [cells,
    c]: row i is cell i, its neighbour to the right, below, and below right."""
    rows = maps.flatten(0, 3)
    length = len(rows) - atlas.width - 1
    shifts = 0, 1, atlas.width, atlas.width + 1
    return [rows[shift : shift + length] for shift in shifts]


def _share(weights: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
    """Bilinear shares of the weights at the four cells, in the order of `_shift`: [bags, S]."""
    right = weights.view_as(x) * x
    left = weights.view_as(x) - right
    below_left, below_right = left * y, right * y
    return [left - below_left, right - below_right, below_left, below_right]


def row_dots(rows: Tensor, tables: list[Tensor], index: Tensor) -> list[Tensor]:
    """The products of row n of `rows` [n, c] with the rows index[n] of a table, for every table:
    [n, S]. `index` is int32 [n, S]."""
    n, S = index.shape
    bags = torch.arange(n, device=index.device, dtype=index.dtype)
    starts, owners = bags * S, bags.repeat_interleave(S)
    dot = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return [dot(rows, x, index.flatten(), starts, owners, 0).view(n, S) for x in tables]


def row_dots_on_cpu(rows: Tensor, tables: list[Tensor], index: Tensor) -> list[Tensor]:
    """`row_dots` in a third of the time, as a sparse matrix of the products that are wanted."""
    n, S = index.shape
    starts = torch.arange(0, n * S + 1, S, dtype=index.dtype)
    zeros, size = rows.new_zeros(n * S), (n, len(tables[0]))
    wanted = torch.sparse_csr_tensor(starts, index.flatten(), zeros, size, check_invariants=False)
    dots = [torch.sparse.sampled_addmm(wanted, rows, x.T, beta=0) for x in tables]
    return [x.values().view(n, S) for x in dots]


class DeformableAttention(nn.Module):
    """Every token reads a few points around itself on all levels of the pyramid."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    def initialise(self) -> None:
        """Heads look in different directions, points at growing distance, all with equal weight."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1)[:, None]
        offsets = directions[:, None, None] * distances  # [heads, 1, points, 2]
        offsets = offsets.expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())

    def forward(self, x: Tensor, positions: Tensor, atlas: Atlas) -> Tensor:
        """x [B, N, C], the tokens of all levels on the atlas, and their positions [N, C] to
        [B, N, C]."""
        B, N, C = x.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        queries = x + positions
        values = self.value_proj(x).view(B, N, heads, C // heads)
        weights = self.attention_weights(queries).view(B, N, heads, levels * points).softmax(-1)
        # In bfloat16 a location on a grid of 128 could be half a cell off: they stay in float32.
        locations = self.sampling_offsets(queries).float().view(B, N, heads, levels * points, 2)
        locations = locations + atlas.centres.repeat_interleave(points, dim=1)[:, None]
        x = ReadAtlas.apply(values, locations, weights.float(), atlas)
        return self.output_proj(x.view(B, N, C).to(queries.dtype))


class PixelDecoderLayer(nn.Module):
    """Deformable attention and MLP on x [B, N, C], a LayerNorm after either residual."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int, mlp_dim: int):
        super().__init__()
        self.self_attn = DeformableAttention(dim, num_heads, num_levels, num_points)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, positions: Tensor, atlas: Atlas) -> Tensor:
        x = self.self_attn_layer_norm(x + self.self_attn(x, positions, atlas))
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class PixelDecoder(nn.Module):
    """Exchanges information between the scales, and makes the mask features at the finest."""

    def __init__(
        self,
        in_dims: list[int],
        dim: int,
        num_layers: int,
        num_heads: int,
        num_points: int,
        mlp_dim: int,
    ):
        """`in_dims` are the widths of the scales, finest first; attention runs over the three
        coarsest."""
        super().__init__()
        self.num_levels = num_levels = min(3, len(in_dims))
        self.dim, num_groups = dim, dim // 8  # 32 groups at the full width
        self.input_projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(in_dim, dim, 1), nn.GroupNorm(num_groups, dim))
            for in_dim in reversed(in_dims[-num_levels:])
        )
        self.level_embed = nn.Parameter(torch.empty(num_levels, dim))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            PixelDecoderLayer(dim, num_heads, num_levels, num_points, mlp_dim)
            for _ in range(num_layers)
        )
        self.adapter_1 = nn.Sequential(
            nn.Conv2d(in_dims[0], dim, 1, bias=False), nn.GroupNorm(num_groups, dim)
        )
        self.layer_1 = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(num_groups, dim), nn.ReLU()
        )
        self.mask_projection = nn.Conv2d(dim, dim, 1)
        self.initialise()

    def initialise(self) -> None:
        nn.init.normal_(self.level_embed)
        for parameter in self.encoder.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for layer in self.encoder.layers:
            layer.self_attn.initialise()
        for convolution in (self.adapter_1[0], self.layer_1[0], self.mask_projection):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        for projection in self.input_projections:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Features [B, C_i, h_i, w_i], finest first, to mask features [B, C, h_0, w_0] and levels
        [B, C, h_i, w_i], coarsest first."""
        coarse = reversed(features[-self.num_levels :])
        levels = [
            project(feature)
            for project, feature in zip(self.input_projections, coarse, strict=True)
        ]
        shapes = [(level.shape[2], level.shape[3]) for level in levels]
        device = levels[0].device
        positions = torch.cat(
            [
                sine_positions(h, w, self.dim, device) + embed
                for (h, w), embed in zip(shapes, self.level_embed, strict=True)
            ]
        )  # [N, C]
        atlas = Atlas(shapes, device)

        x = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # [B, N, C]
        for layer in self.encoder.layers:
            x = layer(x, positions, atlas)
        split = x.transpose(1, 2).split([h * w for h, w in shapes], dim=2)
        levels = [level.unflatten(2, shape) for level, shape in zip(split, shapes, strict=True)]

        # One FPN step up to the finest input. Of up to three scales that is the last level's own
        # input, read again, and there is nothing to upsample.
        finest = F.interpolate(levels[-1], features[0].shape[2:], mode="bilinear")
        finest = self.layer_1(self.adapter_1(features[0]) + finest)
        return self.mask_projection(finest), levels


# ---- masked-attention decoder --------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Attention among the queries; positions are added to queries and keys, not to values."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x and positions [R, Q, C]."""
        placed = x + positions
        q, k, v = self.q_proj(placed), self.k_proj(placed), self.v_proj(x)
        return self.out_proj(_attention(q, k, v, self.num_heads))


class CrossAttention(nn.Module):
    """Attention to image features, with the packed weights of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """queries [R, Q, C], keys and values [R, N, C]; mask [R, Q, N] is True where to look."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        inputs = zip((queries, keys, values), weights, biases, strict=True)
        q, k, v = (F.linear(x, weight, bias) for x, weight, bias in inputs)
        return self.out_proj(_attention(q, k, v, self.num_heads, mask[:, None]))


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """q [R, Q, C], k and v [R, N, C] to [R, Q, C], with heads of equal width."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class DecoderLayer(nn.Module):
    """Cross-attention, self-attention and MLP, a LayerNorm after every residual."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.cross_attn = CrossAttention(dim, num_heads)
        self.cross_attn_layer_norm = nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim, num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, query_positions: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> Tensor:
        """x and query_positions [R, Q, C], keys and values [R, N, C], mask bool [R, Q, N]."""
        attended = self.cross_attn(x + query_positions, keys, values, mask)
        x = self.cross_attn_layer_norm(x + attended)
        x = self.self_attn_layer_norm(x + self.self_attn(x, query_positions))
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class MaskPredictor(nn.Module):
    """Three linear layers from queries [..., C] to mask embeddings [..., C]; the product of one
    with the mask features is a mask."""

    def __init__(self, dim: int):
        super().__init__()
        self.mask_embedder = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim)) for _ in range(3))

    def forward(self, queries: Tensor) -> Tensor:
        first, second, third = self.mask_embedder
        return third(F.relu(second(F.relu(first(queries)))))


class MaskedAttentionDecoder(nn.Module):
    """Queries that attend, layer by layer, only where the mask of the layer before is positive."""

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        num_queries: int,
        num_levels: int,
    ):
        super().__init__()
        self.queries_features = nn.Embedding(num_queries, dim)
        self.queries_embedder = nn.Embedding(num_queries, dim)
        self.level_embed = nn.Embedding(num_levels, dim)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(
            DecoderLayer(dim, num_heads, mlp_dim) for _ in range(num_layers)
        )
        self.decoder.layernorm = nn.LayerNorm(dim)
        self.decoder.mask_predictor = MaskPredictor(dim)
        for parameter in self.decoder.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, mask_features: Tensor, levels: list[Tensor], seg_embeddings: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mask features [R, C, h, w], levels [R, C, h_i, w_i], coarsest first, and <SEG> embeddings
        [R, C] or None.

        Returns normalised queries and mask embeddings, both [L, R, Q, C]: before the first layer
        and after every layer. The mask logits of an output are the products of its mask embeddings
        with the mask features.
        """
        R = mask_features.shape[0]
        device = mask_features.device
        tokens = [level.flatten(2).transpose(1, 2) for level in levels]  # of [R, N, C]
        tokens = [x + embed for x, embed in zip(tokens, self.level_embed.weight, strict=True)]
        keys = [
            x + sine_positions(*level.shape[2:], level.shape[1], device).to(x)
            for x, level in zip(tokens, levels, strict=True)
        ]
        # Resizing is linear, so attention masks are made from resized features: Q·N products in
        # place of Q full masks that would be resized.
        attention_mask_features = [
            F.interpolate(mask_features.detach(), level.shape[2:], mode="bilinear").flatten(2)
            for level in levels
        ]  # of [R, C, N]

        query_positions = self.queries_embedder.weight.expand(R, -1, -1)
        x = self.queries_features.weight.expand(R, -1, -1)  # [R, Q, C]
        if seg_embeddings is not None:
            x = x + seg_embeddings[:, None]
        outputs = [self._predict(x)]
        for index, layer in enumerate(self.decoder.layers):
            level = index % len(levels)
            with torch.no_grad():
                mask = outputs[-1][1] @ attention_mask_features[level] >= 0  # [R, Q, N]
                mask |= ~mask.any(dim=-1, keepdim=True)  # a query without a mask looks everywhere
            x = layer(x, query_positions, keys[level], tokens[level], mask)
            outputs.append(self._predict(x))
        queries, mask_embeddings = zip(*outputs, strict=True)
        return torch.stack(queries), torch.stack(mask_embeddings)

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised queries and mask embeddings of x, all [R, Q, C]."""
        queries = self.decoder.layernorm(x)
        return queries, self.decoder.mask_predictor(queries)


# ---- class heads and outputs ---------------------------------------------------------------------


class LinearClassHead(nn.Module):
    """The class head of stage 1 (paper section 3.3): a fixed list of classes, background last."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.predictor = nn.Linear(dim, num_classes + 1)

    def forward(self, queries: Tensor) -> Tensor:
        """[L, R, Q, C] to logits [L, R, Q, K+1]."""
        return self.predictor(queries)


class CosineClassHead(nn.Module):
    """The class head of stages 2 and 3: exp(scale)·cos(query, condition), clamped; the classes are
    whatever the prompt names (paper section 3.1, "Unified Formulation")."""

    def __init__(self, clamp: float):
        super().__init__()
        self.clamp = clamp
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self, queries: Tensor, condition_embeddings: Tensor, is_padding: Tensor) -> Tensor:
        """Queries [L, R, Q, C], condition embeddings [R, K+1, C], the background last, and
        is_padding, bool [R, K+1], to float32 logits [L, R, Q, K+1]."""
        queries = F.normalize(queries.float(), dim=-1)
        classes = F.normalize(condition_embeddings.float(), dim=-1)
        logits = self.logit_scale.float().exp() * (queries @ classes.transpose(1, 2))
        logits = logits.clamp(-self.clamp, self.clamp)
        return logits.masked_fill(is_padding[:, None], -1e4)


@dataclass
class DecoderOutput:
    """The decoder's outputs; a mask is the product of its mask embedding and the mask features."""

    class_logits: Tensor  # [L, R, Q, K+1], background last
    mask_embeddings: Tensor  # [L, R, Q, C]
    mask_features: Tensor  # [B, C, h, w], or [R, C, h, w] with a `feature_index`
    image_index: Tensor  # [R], the image of a run
    feature_index: Tensor | None = None  # [R], the mask features of a run; None: its image's

    def mask_logits(self) -> Tensor:
        """Mask logits of the last output, [R, Q, h, w]."""
        features = self.features_of(slice(None))
        return torch.einsum("rqc,rchw->rqhw", self.mask_embeddings[-1], features)

    def features_of(self, run: int | slice) -> Tensor:
        """Mask features of a run [C, h, w], or of several [R, C, h, w]."""
        index = self.image_index if self.feature_index is None else self.feature_index
        return self.mask_features[index[run]]
