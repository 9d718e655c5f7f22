"""Point sampling, Hungarian matching and the segmentation losses at every decoder output.

The objective of Mask2Former (Cheng et al. 2022; paper equation 1). A mask is the product of a mask
embedding and the mask features, and reading a mask at points commutes with that product, so full
masks are made for matched queries only.
Legend: L decoder outputs, R decoder runs, Q queries, T targets of a run, M = min(Q, T) matched
pairs, P points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

if TYPE_CHECKING:
    from xsam.config import Config, LossConfig
    from xsam.data import Batch
    from xsam.decoder import DecoderOutput
    from xsam.model import XSAM, Segmentor


@dataclass
class Targets:
    """Ground truth of one decoder run on the square canvas."""

    masks: Tensor  # bool [T, S, S]
    labels: Tensor  # int64 [T], the index of each mask's class in the prompt
    ignore: Tensor | None = None  # bool [S, S], pixels that carry no mask loss


@dataclass
class Normalisers:
    """What the losses of a step are divided by, of the whole step as a mean over ranks: any split
    of a batch gives the same gradient, which is averaged over ranks too."""

    masks: float  # number of target masks
    class_weight: float  # sum of the weights of all queries in the class loss
    tokens: float  # number of labelled tokens


def random_points(
    num_sets: int, num_points: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Points [num_sets, num_points, 2] in 0..1, float32 on `device`, drawn on the generator's: a
    generator of the CPU draws the same points for every device."""
    shape = num_sets, num_points, 2
    return torch.rand(*shape, generator=generator, device=generator.device).to(device)


def sample_features(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear reading of maps [N, C, h, w] at points [N, P, 2], (x, y) in 0..1 from corner to
    corner of the map: [N, C, P]."""
    grid = 2 * points[:, :, None] - 1  # [N, P, 1, 2]
    return F.grid_sample(maps, grid, align_corners=False)[..., 0]


def find_blocks(masks: Tensor, index: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The 2×2 pixels around points [N, P, 2], of the boolean masks [T, H, W] with the numbers
    index [N].

    Returns the pixels as four bits of a uint8 (upper left first, rows first; zero beyond the
    border), and how far right and down of the centre of the first pixel a point lies, in pixels;
    all [N, P].
    """
    height, width = masks.shape[1:]
    pixels = F.pad(masks, (1, 1, 1, 1)).view(torch.uint8)  # [T, H+2, W+2]
    pairs = pixels[:, :, :-1] | pixels[:, :, 1:] << 1  # [T, H+2, W+1]
    blocks = pairs[:, :-1] | pairs[:, 1:] << 2  # [T, H+1, W+1]
    x = (points[..., 0] * width + 0.5).clamp(0, width + 1)
    y = (points[..., 1] * height + 0.5).clamp(0, height + 1)
    column, row = x.long().clamp(max=width), y.long().clamp(max=height)
    cells = (index[:, None] * (height + 1) + row) * (width + 1) + column
    return blocks.take(cells), x - column, y - row


def sample_masks(masks: Tensor, index: Tensor, points: Tensor) -> Tensor:
    """Bilinear reading at points [N, P, 2], (x, y) in 0..1, of the boolean masks [T, H, W] with the
    numbers index [N]: float [N, P], zero beyond the border.

    Gathers four neighbours at once, and copies no mask for a set of points. No gradient.
    """
    block, x, y = find_blocks(masks, index, points)
    top = (block & 1) * (1 - x) + (block >> 1 & 1) * x
    bottom = (block >> 2 & 1) * (1 - x) + (block >> 3) * x
    return top.lerp(bottom, y)


def is_ignored(ignore: Tensor | None, points: Tensor) -> Tensor:
    """Whether a reading at points [N, P, 2] touches a pixel of `ignore`, bool [H, W]: bool
    [N, P]."""
    if ignore is None:
        return torch.zeros(points.shape[:2], dtype=torch.bool, device=points.device)
    only = torch.zeros(len(points), dtype=torch.long, device=points.device)
    return find_blocks(ignore[None], only, points)[0] > 0


def matching_cost(
    class_logits: Tensor,
    mask_logits: Tensor,
    target_values: Tensor,
    labels: Tensor,
    valid: Tensor,
    config: LossConfig,
) -> Tensor:
    """Matching cost [L, Q, T] of class logits [L, Q, K+1] and mask logits [L, Q, P] against T
    targets, given as values at the points [T, P] and labels [T]. `valid` [P] is 1, or 0 at points
    that are ignored."""
    num_valid = valid.sum().clamp(min=1)
    target_values = target_values * valid
    class_cost = -class_logits.softmax(-1)[:, :, labels]
    # Cross-entropy of a logit x and a target t is softplus(x) - x·t.
    mask_cost = (F.softplus(mask_logits) @ valid)[..., None] - mask_logits @ target_values.T
    probabilities = mask_logits.sigmoid() * valid
    overlap = probabilities @ target_values.T  # [L, Q, T]
    size = probabilities.sum(-1)[..., None] + target_values.sum(-1)
    dice_cost = 1 - (2 * overlap + 1) / (size + 1)
    return (
        config.class_weight * class_cost
        + config.mask_weight * mask_cost / num_valid
        + config.dice_weight * dice_cost
    )


@torch.no_grad()
def match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The assignment of least cost [L, Q, T] for every output: matched queries and their targets,
    both int64 [L, M], on the CPU."""
    # A diverged model must reach the loop's guard against non-finite losses, not fail here.
    cost = cost.nan_to_num(0.0, posinf=1e10, neginf=-1e10).cpu().numpy()
    pairs = [linear_sum_assignment(layer) for layer in cost]
    queries, targets = (
        torch.stack([torch.from_numpy(pair[side]) for pair in pairs]) for side in (0, 1)
    )
    return queries, targets


@torch.no_grad()
def uncertain_points(
    mask_logits: Tensor, ignore: Tensor | None, config: LossConfig, generator: torch.Generator
) -> Tensor:
    """Points [N, P, 2] for the loss of mask logits [N, h, w]: of random candidates those with the
    logits nearest to zero, and some more at random (PointRend, Kirillov et al. 2020). Pixels of
    `ignore` are chosen last."""
    N, device = len(mask_logits), mask_logits.device
    num_candidates = int(config.num_points * config.oversample_ratio)
    num_uncertain = int(config.num_points * config.importance_ratio)
    candidates = random_points(N, num_candidates, generator, device)
    certainty = sample_features(mask_logits[:, None], candidates)[:, 0].abs()  # [N, candidates]
    certainty = certainty.masked_fill(is_ignored(ignore, candidates), torch.inf)
    chosen = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
    uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    num_random = config.num_points - num_uncertain
    scattered = random_points(N, num_random, generator, device)
    return torch.cat([uncertain, scattered], dim=1)


def cross_entropy(mask_logits: Tensor, target_values: Tensor, valid: Tensor) -> Tensor:
    """Binary cross-entropy [N] of N masks and their targets at P points, as a mean over those where
    `valid` is 1, not 0; all [N, P]."""
    losses = F.binary_cross_entropy_with_logits(mask_logits, target_values, reduction="none")
    return (losses * valid).sum(-1) / valid.sum(-1).clamp(min=1)


def dice(mask_logits: Tensor, target_values: Tensor, valid: Tensor) -> Tensor:
    """Dice loss [N] of N masks and their targets at P points, of which those count where `valid` is
    1, not 0; all [N, P]."""
    probabilities, target_values = mask_logits.sigmoid() * valid, target_values * valid
    size = probabilities.sum(-1) + target_values.sum(-1)
    return 1 - (2 * (probabilities * target_values).sum(-1) + 1) / (size + 1)


# What a matched mask is trained with; the weight of each is LossConfig.NAME_weight.
MASK_LOSSES = {"mask": cross_entropy, "dice": dice}


def segmentation_losses(
    predictions: DecoderOutput,
    targets: list[Targets],
    generators: list[torch.Generator],
    normalisers: Normalisers,
    config: LossConfig,
) -> dict[str, Tensor]:
    """Unweighted losses, "class" and those of MASK_LOSSES (the terms of paper equation 1), summed
    over the decoder outputs: float32 scalars.

    `targets` and `generators` have an entry for every run; the points of a run depend on its
    generator alone. A run without targets gives class loss only.
    """
    class_logits = predictions.class_logits.float()
    mask_embeddings = predictions.mask_embeddings.float()
    L, R, Q, num_classes = class_logits.shape  # with the background
    device = class_logits.device
    classes = torch.full((L, R, Q), num_classes - 1, device=device)  # background
    # Zero, but in the graph: every parameter gets a gradient on every rank, targets or not.
    zero = mask_embeddings.sum() * 0 + predictions.mask_features.sum() * 0
    mask_sums = dict.fromkeys(MASK_LOSSES, zero)

    ignores = [target.ignore if config.ignore_unlabelled else None for target in targets]
    runs = [run for run, target in enumerate(targets) if len(target.labels) > 0]
    features = {run: predictions.features_of(run).float() for run in runs}  # of [C, h, w]

    costs = {}
    for run in runs:
        target = targets[run]
        with torch.no_grad():
            points = random_points(1, config.num_points, generators[run], device)
            values = sample_features(features[run][None], points)[0]  # [C, P]
            every = torch.arange(len(target.labels), device=device)
            target_values = sample_masks(target.masks, every, points.expand(len(every), -1, -1))
            valid = (~is_ignored(ignores[run], points)[0]).float()
            costs[run] = matching_cost(
                class_logits[:, run],
                mask_embeddings[:, run] @ values,
                target_values,
                target.labels,
                valid,
                config,
            )
    # Only now is a GPU waited for; from here on it has work without the CPU.
    matches = {run: [side.to(device) for side in match(cost)] for run, cost in costs.items()}

    layer = torch.arange(L, device=device)[:, None]
    for run, (queries, matched) in matches.items():  # [L, M]
        target = targets[run]
        classes[:, run].scatter_(1, queries, target.labels[matched])
        pairs = mask_embeddings[layer, run, queries].flatten(0, 1)  # [L·M, C]
        masks = torch.einsum("nc,chw->nhw", pairs, features[run])  # [L·M, h, w]
        points = uncertain_points(masks, ignores[run], config, generators[run])
        mask_logits = sample_features(masks[:, None], points)[:, 0]
        target_values = sample_masks(target.masks, matched.flatten(), points)
        valid = (~is_ignored(ignores[run], points)).float()
        for name, loss in MASK_LOSSES.items():
            mask_sums[name] = mask_sums[name] + loss(mask_logits, target_values, valid).sum()

    weights = torch.ones(num_classes, device=device)
    weights[-1] = config.background_weight
    class_sum = F.cross_entropy(
        class_logits.flatten(0, 2), classes.flatten(), weights, reduction="sum"
    )
    losses = {name: total / normalisers.masks for name, total in mask_sums.items()}
    return {"class": class_sum / normalisers.class_weight} | losses


def count_targets(num_targets: list[int], num_queries: int, config: LossConfig) -> dict[str, float]:
    """What the runs of a batch, with so many targets, add to the normalisers of one decoder output:
    "masks" and "class_weight"."""
    matched = sum(min(count, num_queries) for count in num_targets)
    others = num_queries * len(num_targets) - matched
    return {
        "masks": float(sum(num_targets)),
        "class_weight": matched + others * config.background_weight,
    }


class Objective(nn.Module):
    """The model and its criterion: what DistributedDataParallel wraps."""

    def __init__(self, model: Segmentor | XSAM, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: Batch, normalisers: Normalisers) -> dict[str, Tensor]:
        """The weighted losses of a micro-batch, by name; those of a step's micro-batches and ranks
        are to be added. They are the terms of paper equation 1 in stage 1, of equation 2 ("text")
        in stage 2 and of chat, and of equation 3 elsewhere, which is both. Raises ValueError where
        the model has more or fewer decoder runs than the batch has targets."""
        device, weights = batch.seg_pixels.device, self.config.loss
        is_mixed = self.config.dtype != "float32"
        with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
            outputs = self.model(batch)
        losses = {}
        if batch.has_masks:  # every rank has the same names, also where nothing is found
            losses = {name: torch.zeros((), device=device) for name in ("class", *MASK_LOSSES)}
        num_runs = 0 if outputs.predictions is None else len(outputs.predictions.image_index)
        if num_runs != len(batch.targets):
            raise ValueError(f"{num_runs} decoder runs for {len(batch.targets)} sets of targets")
        if outputs.predictions is not None:
            generators = [torch.Generator(device).manual_seed(seed) for seed in batch.run_seeds]
            parts = segmentation_losses(
                outputs.predictions, batch.targets, generators, normalisers, weights
            )
            losses = {name: getattr(weights, f"{name}_weight") * x for name, x in parts.items()}
        if outputs.token_loss is not None:
            losses["text"] = outputs.token_loss / normalisers.tokens
        return losses
