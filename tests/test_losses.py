"""Reading at points, matching and the criterion: against grid_sample, brute force and transformers.

pytest tests/test_losses.py
"""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerHungarianMatcher,
    Mask2FormerLoss,
)

from xsam.config import LossConfig
from xsam.decoder import DecoderOutput
from xsam.losses import (
    MASK_LOSSES,
    Normalisers,
    Targets,
    count_targets,
    match,
    matching_cost,
    sample_features,
    sample_masks,
    segmentation_losses,
    uncertain_points,
)

L, Q, K, CANVAS = 3, 6, 4, 48
CONFIG = LossConfig(num_points=100)


def make_targets(num_targets: int, generator: torch.Generator) -> Targets:
    blocks = torch.randn(num_targets, 6, 6, generator=generator) > 0
    masks = blocks.repeat_interleave(CANVAS // 6, 1).repeat_interleave(CANVAS // 6, 2)
    return Targets(masks, torch.randint(K, (num_targets,), generator=generator))


def scene(*num_targets: int, seed: int = 0) -> tuple[DecoderOutput, list[Targets]]:
    """One run for each image; `num_targets` of each.

    Mask embeddings are one-hot, so the mask features are all outputs' mask logits, [B, L·Q, h, w].
    """
    generator = torch.Generator().manual_seed(seed)
    R = len(num_targets)
    mask_features = 3 * torch.randn(R, L * Q, 14, 10, generator=generator)
    mask_embeddings = torch.eye(L * Q).view(L, 1, Q, L * Q).repeat(1, R, 1, 1)
    class_logits = 2 * torch.randn(L, R, Q, K + 1, generator=generator)
    predictions = DecoderOutput(class_logits, mask_embeddings, mask_features, torch.arange(R))
    for x in (class_logits, mask_embeddings, mask_features):
        x.requires_grad_()
    return predictions, [make_targets(count, generator) for count in num_targets]


def normalisers_of(targets: list[Targets]) -> Normalisers:
    counts = count_targets([len(target.labels) for target in targets], Q, CONFIG)
    return Normalisers(**counts, tokens=1.0)


def losses_of(
    predictions: DecoderOutput,
    targets: list[Targets],
    config: LossConfig = CONFIG,
    seeds: list[int] | None = None,
    normalisers: Normalisers | None = None,
) -> dict[str, Tensor]:
    seeds = range(len(targets)) if seeds is None else seeds
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    normalisers = normalisers or Normalisers(masks=2.0, class_weight=3.0, tokens=1.0)
    return segmentation_losses(predictions, targets, generators, normalisers, config)


def select(predictions: DecoderOutput, runs: list[int]) -> DecoderOutput:
    """Some of the runs with their images, as another micro-batch would hold them."""
    return DecoderOutput(
        predictions.class_logits[:, runs],
        predictions.mask_embeddings[:, runs],
        predictions.mask_features[predictions.image_index[runs]],
        torch.arange(len(runs)),
    )


# ---- reading at points ---------------------------------------------------------------------------


def test_sample_masks_equals_grid_sample():
    """Also at the border and beyond it, where both read zero."""
    torch.manual_seed(0)
    masks = torch.rand(3, 9, 13) > 0.5
    index = torch.tensor([2, 0, 0, 1])
    edges = torch.tensor(list(itertools.product([0.0, 0.01, 0.5, 0.99, 1.0], repeat=2)))
    points = torch.cat([torch.rand(4, 200, 2) * 1.4 - 0.2, edges.expand(4, -1, -1)], dim=1)
    grid = 2 * points[:, :, None] - 1
    expected = F.grid_sample(masks[index][:, None].float(), grid, align_corners=False)
    torch.testing.assert_close(
        sample_masks(masks, index, points), expected[:, 0, :, 0], atol=1e-5, rtol=0
    )


def test_features_read_as_masks_do():
    """DecoderOutput and targets: 0 and 1 are the corners, centres of pixels half a pixel inside."""
    torch.manual_seed(0)
    masks = torch.rand(4, 8, 6) > 0.5
    points = torch.rand(4, 300, 2)
    values = sample_features(masks[:, None].float(), points)[:, 0]
    torch.testing.assert_close(values, sample_masks(masks, torch.arange(4), points))

    maps = torch.randn(1, 3, 8, 6)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(6), indexing="ij")
    centres = torch.stack([(columns + 0.5) / 6, (rows + 0.5) / 8], dim=-1).view(1, 48, 2)
    torch.testing.assert_close(sample_features(maps, centres), maps.flatten(2))


def test_reading_commutes_with_painting():
    """What lets a query be judged at points without its mask."""
    torch.manual_seed(0)
    features, embeddings = torch.randn(1, 5, 8, 6), torch.randn(7, 5)
    points = torch.rand(1, 50, 2)
    masks = torch.einsum("qc,bchw->bqhw", embeddings, features)
    torch.testing.assert_close(
        embeddings @ sample_features(features, points), sample_features(masks, points)
    )


def test_uncertain_points_are_the_least_certain_candidates():
    """Three quarters of the points are sought near zero crossings, the rest scattered."""
    torch.manual_seed(0)
    masks = torch.randn(4, 14, 10) * 3
    config = dataclasses.replace(CONFIG, num_points=300)
    points = uncertain_points(masks, None, config, torch.Generator().manual_seed(0))
    assert points.shape == (4, 300, 2) and points.min() >= 0 and points.max() <= 1
    certainty = sample_features(masks[:, None], points)[:, 0].abs()
    sought, scattered = certainty[:, :225], certainty[:, 225:]
    assert (sought.amax(dim=1) < scattered.quantile(0.5, dim=1)).all()

    ignore = torch.zeros(CANVAS, CANVAS, dtype=torch.bool)
    ignore[:, : CANVAS // 2] = True
    points = uncertain_points(masks, ignore, config, torch.Generator().manual_seed(0))
    assert (points[:, :225, 0] >= 0.5).all()


# ---- matching ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_queries", "num_targets"), [(5, 3), (4, 4), (3, 5), (4, 1)])
def test_match_equals_brute_force(num_queries, num_targets):
    cost = torch.randn(4, num_queries, num_targets, generator=torch.Generator().manual_seed(0))
    queries, targets = match(cost)
    size = min(num_queries, num_targets)
    assert queries.shape == targets.shape == (4, size)
    for layer, rows, columns in zip(cost, queries, targets, strict=True):
        assert len(set(rows.tolist())) == len(set(columns.tolist())) == size
        best = min(
            layer[list(some), list(others)].sum()
            for some in itertools.combinations(range(num_queries), size)
            for others in itertools.permutations(range(num_targets), size)
        )
        torch.testing.assert_close(layer[rows, columns].sum(), best)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_targets", [1, 4, Q, Q + 3])
@pytest.mark.parametrize("shape", [(14, 10), (48, 48)])
def test_matching_equals_transformers(seed, num_targets, shape, monkeypatch):
    """The same points, the same pairs: every output's, which are theirs of a batch."""
    generator = torch.Generator().manual_seed(seed)
    class_logits = 2 * torch.randn(L, Q, K + 1, generator=generator)
    masks = 3 * torch.randn(L, Q, *shape, generator=generator)
    target = make_targets(num_targets, generator)
    points = torch.rand(1, CONFIG.num_points, 2, generator=generator)

    logits = sample_features(masks, points.expand(L, -1, -1))
    every = torch.arange(num_targets)
    values = sample_masks(target.masks, every, points.expand(num_targets, -1, -1))
    valid = torch.ones(CONFIG.num_points)
    cost = matching_cost(class_logits, logits, values, target.labels, valid, CONFIG)
    pairs = match(cost)

    weights = CONFIG.class_weight, CONFIG.mask_weight, CONFIG.dice_weight
    matcher = Mask2FormerHungarianMatcher(*weights, num_points=CONFIG.num_points)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: points.view(shape))
    theirs = matcher(masks, class_logits, L * [target.masks.float()], L * [target.labels])
    for layer, expected in enumerate(theirs):
        for mine, reference in zip(pairs, expected, strict=True):
            assert mine[layer].tolist() == reference.tolist()


def test_match_survives_a_diverged_model():
    """The loop reports a loss that is not finite; the matcher must not fail before."""
    cost = torch.randn(3, 4, 2)
    cost[0], cost[1, 2], cost[2, :, 0] = math.nan, math.inf, -math.inf
    queries, targets = match(cost)
    assert queries.shape == targets.shape == (3, 2)


# ---- the criterion -------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(3, 5), (1, 4, 6), (2, 9)])
def test_losses_equal_transformers(counts, monkeypatch):
    """All outputs' losses and their gradients, where both draw the same points for every mask.

    Theirs draws for a whole batch of one output, ours for all outputs of one run; so the patched
    draw repeats itself for every mask. The last case has more targets than queries.
    """

    def rand(number: int, *shape: int, **_) -> Tensor:
        drawn = torch.empty(shape).uniform_(generator=torch.Generator().manual_seed(shape[0]))
        return drawn.repeat(number, 1, 1)

    monkeypatch.setattr(torch, "rand", rand)
    predictions, targets = scene(*counts)
    ours = losses_of(predictions, targets, normalisers=normalisers_of(targets))

    criterion = Mask2FormerLoss(
        Mask2FormerConfig(
            num_labels=K,
            no_object_weight=CONFIG.background_weight,
            class_weight=CONFIG.class_weight,
            mask_weight=CONFIG.mask_weight,
            dice_weight=CONFIG.dice_weight,
            train_num_points=CONFIG.num_points,
            oversample_ratio=CONFIG.oversample_ratio,
            importance_sample_ratio=CONFIG.importance_ratio,
        ),
        weight_dict={},
    )
    masks = predictions.mask_features.unflatten(1, (L, Q)).transpose(0, 1)
    outputs = [
        {"masks_queries_logits": mask, "class_queries_logits": logits}
        for mask, logits in zip(masks, predictions.class_logits, strict=True)
    ]
    theirs = criterion(
        **outputs[-1],
        mask_labels=[target.masks.float() for target in targets],
        class_labels=[target.labels for target in targets],
        auxiliary_predictions=outputs[:-1],
    )
    leaves = (predictions.class_logits, predictions.mask_features)
    for mine, name in (
        ("class", "loss_cross_entropy"),
        ("mask", "loss_mask"),
        ("dice", "loss_dice"),
    ):
        parts = [loss for key, loss in theirs.items() if key.startswith(name)]
        assert len(parts) == L
        torch.testing.assert_close(ours[mine], sum(parts), atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(sum(losses.values()), leaves) for losses in (ours, theirs))
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-4)


def test_two_halves_add_up_to_the_whole():
    """The same divisors and each run its own generator: how a batch is split cannot be seen."""
    predictions, targets = scene(2, 0, 5, 9)
    normalisers = normalisers_of(targets)
    whole = losses_of(predictions, targets, normalisers=normalisers)
    halves = [
        losses_of(
            select(predictions, runs), [targets[run] for run in runs], CONFIG, runs, normalisers
        )
        for runs in ([0, 3], [1, 2])
    ]
    for name, loss in whole.items():
        torch.testing.assert_close(halves[0][name] + halves[1][name], loss, atol=1e-5, rtol=1e-5)


def test_runs_of_one_image_share_its_features():
    """Referring has a run for each phrase: the same as a copy of the image for each."""
    predictions, targets = scene(2, 3)
    index = torch.tensor([1, 1])
    shared = dataclasses.replace(predictions, image_index=index)
    copied = dataclasses.replace(predictions, mask_features=predictions.mask_features[index])
    losses = losses_of(shared, targets)
    assert losses == losses_of(copied, targets)
    assert losses["mask"] != losses_of(predictions, targets)["mask"]


def test_runs_may_have_mask_features_of_their_own():
    """Of one image, each with its own and in another order: the same losses and gradients as of an
    image for each."""
    predictions, targets = scene(2, 3, 0)
    order = torch.tensor([2, 0, 1])
    own = dataclasses.replace(
        predictions,
        mask_features=predictions.mask_features[order],
        image_index=torch.zeros(3, dtype=torch.long),
        feature_index=order.argsort(),
    )
    losses, expected = losses_of(own, targets), losses_of(predictions, targets)
    assert losses == expected
    leaves = (predictions.mask_embeddings, predictions.mask_features)
    gradients, references = (
        torch.autograd.grad(sum(x.values()), leaves) for x in (losses, expected)
    )
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("counts", [(0,), (2, 0), (2, 5, 0, Q), (Q + 3, 1)])
def test_count_targets_is_the_class_weight_used(counts):
    """Even logits cost log(K+1) whatever the class, and so does their weighted mean."""
    predictions, targets = scene(*counts)
    flat = dataclasses.replace(predictions, class_logits=torch.zeros(L, len(counts), Q, K + 1))
    loss = losses_of(flat, targets, normalisers=normalisers_of(targets))["class"]
    assert loss.item() == pytest.approx(L * math.log(K + 1), rel=1e-5)
    assert count_targets(list(counts), Q, CONFIG)["masks"] == sum(counts)


def test_without_targets_there_is_class_loss_only():
    """Every parameter still gets a gradient, or ranks would wait for each other."""
    predictions, targets = scene(0, 0)
    losses = losses_of(predictions, targets)
    assert losses["mask"] == losses["dice"] == 0 < losses["class"]
    leaves = (predictions.class_logits, predictions.mask_embeddings, predictions.mask_features)
    of_class, *of_masks = torch.autograd.grad(sum(losses.values()), leaves)
    assert torch.isfinite(of_class).all() and of_class.abs().sum() > 0
    assert all((gradient == 0).all() for gradient in of_masks)


# ---- unlabelled pixels ---------------------------------------------------------------------------


def ignored_scene() -> tuple[DecoderOutput, list[Targets], list[Targets]]:
    """A scene that ignores a rectangle, and the same with all targets flipped inside it.

    A bilinear reading just outside still sees the rim, so the flip keeps a pixel away from it.
    """
    predictions, targets = scene(3, 4)
    ignore = torch.zeros(CANVAS, CANVAS, dtype=torch.bool)
    ignore[10:40, 5:30] = True
    targets = [dataclasses.replace(target, ignore=ignore) for target in targets]
    flip = torch.zeros_like(ignore)
    flip[11:39, 6:29] = True
    flipped = [dataclasses.replace(target, masks=target.masks ^ flip) for target in targets]
    return predictions, targets, flipped


def test_points_without_a_label_are_as_good_as_not_drawn():
    """Matching costs and mask losses are those of the valid points alone."""
    torch.manual_seed(0)
    class_logits, mask_logits = torch.randn(L, Q, K + 1), torch.randn(L, Q, 40)
    target_values, labels = torch.rand(3, 40), torch.tensor([0, 3, 3])
    valid = torch.rand(40) > 0.4
    some, everything = valid.float(), torch.ones(int(valid.sum()))
    torch.testing.assert_close(
        matching_cost(class_logits, mask_logits, target_values, labels, some, CONFIG),
        matching_cost(
            class_logits,
            mask_logits[..., valid],
            target_values[:, valid],
            labels,
            everything,
            CONFIG,
        ),
    )
    # A mean over the valid ones: undecided masks cost log 2, whatever their number.
    only_masks = dataclasses.replace(CONFIG, class_weight=0.0, mask_weight=1.0, dice_weight=0.0)
    undecided = torch.zeros_like(mask_logits)
    cost = matching_cost(class_logits, undecided, target_values, labels, some, only_masks)
    torch.testing.assert_close(cost, torch.full((L, Q, 3), math.log(2)))
    pairs = mask_logits[0, :3]
    for loss in MASK_LOSSES.values():
        torch.testing.assert_close(
            loss(pairs, target_values, some.expand(3, -1)),
            loss(pairs[:, valid], target_values[:, valid], everything.expand(3, -1)),
        )


def test_ignored_pixels_change_nothing():
    predictions, targets, flipped = ignored_scene()
    assert losses_of(predictions, targets) == losses_of(predictions, flipped)


def test_ignored_pixels_are_negatives_as_published():
    """ignore_unlabelled=False: the mask losses no longer know of `ignore`."""
    predictions, targets, flipped = ignored_scene()
    config = dataclasses.replace(CONFIG, ignore_unlabelled=False)
    losses = losses_of(predictions, targets, config)
    plain = [dataclasses.replace(target, ignore=None) for target in targets]
    assert losses == losses_of(predictions, plain)
    assert losses["mask"] != losses_of(predictions, flipped, config)["mask"]


def test_an_image_ignored_throughout_has_no_mask_loss():
    predictions, targets = scene(2)
    ignore = torch.ones(CANVAS, CANVAS, dtype=torch.bool)
    losses = losses_of(predictions, [dataclasses.replace(targets[0], ignore=ignore)])
    assert losses["mask"] == losses["dice"] == 0
    gradient = torch.autograd.grad(losses["mask"] + losses["dice"], predictions.mask_features)[0]
    assert (gradient == 0).all()
