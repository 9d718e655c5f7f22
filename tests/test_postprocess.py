"""Masks read out at the original size: each reader beside a plain statement of its rule.

pytest tests/test_postprocess.py

The plain statements take every mask at the image's full size and follow the rule over all pixels.
Where transformers' Mask2Former processor has the same rule, its results are ours.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.mask2former.image_processing_pil_mask2former import (
    Mask2FormerImageProcessorPil,
    compute_segments,
)

from xsam import postprocess
from xsam.data import ResizeAndPad
from xsam.postprocess import (
    OriginalReader,
    Reading,
    instance_inference,
    interactive_inference,
    merge_parts,
    panoptic_inference,
    phrase_inference,
    semantic_inference,
    union_inference,
)

# Wide, tall, square, larger and smaller than the canvas, one pixel wide.
SIZES = [(24, 40), (40, 23), (32, 32), (71, 90), (130, 57), (9, 7), (1, 12), (33, 1)]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def original_logits(mask_logits: torch.Tensor, transform: ResizeAndPad) -> torch.Tensor:
    """The masks at the image's size, all at once."""
    height, width = transform.original
    return OriginalReader(mask_logits, transform)(mask_logits, (slice(0, height), slice(0, width)))


def random_case(
    seed: int, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, ResizeAndPad]:
    """Probabilities and smooth mask logits; every third case has doubles, which tie."""
    generator = torch.Generator().manual_seed(seed)
    Q = [1, 2, 7, 12][seed % 4]
    K = [1, 5, 3][seed % 3]
    probabilities = (3 * torch.randn(Q, K + 1, generator=generator)).softmax(-1)
    coarse = 5 * torch.randn(Q, 1, 4, 5, generator=generator) - 1
    mask_logits = F.interpolate(coarse, (16, 16), mode="bicubic")[:, 0]
    if seed % 3 == 0:
        probabilities[Q // 2 :] = probabilities[: Q - Q // 2].clone()
        mask_logits[Q // 2 :] = mask_logits[: Q - Q // 2].clone()
    return probabilities, mask_logits, ResizeAndPad.fit(size, 64)


NUM_CASES = 8  # of each size


@pytest.fixture(params=[100, postprocess.BAND_VALUES], ids=["bands", "whole"])
def band_values(request, monkeypatch):
    """What is read in bands of a few rows is what is read at once."""
    monkeypatch.setattr(postprocess, "BAND_VALUES", request.param)


# ---- plain statements ----------------------------------------------------------------------------


def sampled_logits(mask_logits: torch.Tensor, transform: ResizeAndPad) -> torch.Tensor:
    """float64 [N, H, W]"""
    starts = transform.top, transform.left
    axes = []
    for original, resized, start in zip(transform.original, transform.resized, starts, strict=True):
        pixels = (torch.arange(original).double() + 0.5) * resized / original - start
        axes.append(2 * pixels / transform.size - 1)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)
    options = dict(mode="bilinear", padding_mode="border", align_corners=False)
    return F.grid_sample(mask_logits[None].double(), grid[None], **options)[0]


def plain_panoptic(probabilities, logits, is_thing, score_threshold, overlap_threshold):
    scores, best = probabilities.max(-1)
    K = probabilities.shape[1] - 1
    kept = [q for q in range(len(scores)) if best[q] < K and scores[q] > score_threshold]
    masks, found, result_scores = [], [], []
    if not kept:
        return np.zeros((0, *logits.shape[1:]), bool), found, result_scores
    inside = logits[kept].sigmoid()
    winner = (scores[kept, None, None] * inside).numpy().argmax(0)
    for number, query in enumerate(kept):
        is_half = (inside[number] >= 0.5).numpy()
        mask = (winner == number) & is_half
        if not mask.any() or (winner == number).sum() / is_half.sum() < overlap_threshold:
            continue
        category = int(best[query])
        if not is_thing[category] and category in found:
            masks[found.index(category)] |= mask
            continue
        masks.append(mask)
        found.append(category)
        result_scores.append(float(scores[query]))
    masks = np.array(masks, bool).reshape(len(masks), *logits.shape[1:])
    return masks, found, result_scores


def plain_semantic(probabilities, logits):
    sums = torch.einsum("qc,qhw->chw", probabilities[:, :-1], logits.sigmoid()).numpy()
    category = sums.argmax(0)
    present = sorted(set(category.ravel().tolist()))
    masks = np.stack([category == c for c in present])
    shares = sums / sums.sum(0)
    return masks, present, [shares[c][category == c].mean() for c in present]


def plain_instances(probabilities, logits, most):
    K = probabilities.shape[1] - 1
    pairs = [(q, c) for q in range(len(logits)) for c in range(K)]
    pairs.sort(key=lambda pair: -float(probabilities[pair]))
    rows = []
    for query, category in pairs[:most]:
        mask = logits[query] > 0
        if mask.any():
            score = float(probabilities[query, category] * logits[query].sigmoid()[mask].mean())
            rows.append((score, category, mask.numpy()))
    rows.sort(key=lambda row: -row[0])
    masks = np.array([row[2] for row in rows], bool).reshape(len(rows), *logits.shape[1:])
    return masks, [row[1] for row in rows], [row[0] for row in rows]


def assert_same(ours: Reading, plain: Reading) -> None:
    masks, classes, scores = ours
    assert masks.dtype == bool and masks.shape == plain[0].shape
    assert np.array_equal(masks, plain[0])
    assert classes == plain[1]
    assert all(type(each) is int for each in classes)
    assert scores == pytest.approx(plain[2], abs=1e-5)


# ---- the original image --------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_original_logits_are_grid_samples(size, dtype):
    mask_logits = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = mask_logits.clone()
    transforms = [ResizeAndPad.fit(size, 64), ResizeAndPad.fit(size, 64, scale=0.6)]
    transforms.append(ResizeAndPad.fit(size, 64, scale=1.7).crop(np.random.default_rng(0)))
    for transform in transforms:
        logits = original_logits(mask_logits, transform)
        assert logits.shape == (3, *size) and logits.dtype == torch.float32
        expected = sampled_logits(mask_logits, transform).float()
        assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.equal(mask_logits, before)
    assert original_logits(mask_logits[:0], transform).shape == (0, *size)


@pytest.mark.parametrize("size", [(96, 160), (160, 90), (333, 500), (50, 37)])
def test_a_mask_comes_back_from_the_canvas(size):
    rows, columns = np.mgrid[: size[0], : size[1]]
    masks = np.stack(
        [
            np.hypot(rows / size[0] - 0.5, columns / size[1] - 0.5) < 0.3,
            (rows < 0.4 * size[0]) & (columns > 0.5 * size[1]),  # touches two edges
            rows > 0.8 * size[0],
        ]
    )
    transform = ResizeAndPad.fit(size, 128)
    on_canvas = torch.from_numpy(transform.map_to_canvas(masks)).float()
    at_mask_size = F.interpolate(on_canvas[None], size=(32, 32), mode="area")[0]
    back = (original_logits(at_mask_size * 2 - 1, transform) > 0).numpy()
    assert back.shape == masks.shape
    for mask, returned in zip(masks, back, strict=True):
        assert iou(mask, returned) > 0.93


def test_original_logits_are_the_resized_cropped_and_resized_ones():
    """The published way by three steps, for a transform where each of them is exact."""
    transform = ResizeAndPad.fit((64, 96), 96)
    logits = torch.randn(5, 24, 24, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(logits[None], (96, 96), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(original_logits(logits, transform), whole[:, :64], atol=1e-5)


# ---- each reader beside its rule -----------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("band_values")
def test_panoptic_is_its_rule(size):
    for seed in range(NUM_CASES):
        probabilities, mask_logits, transform = random_case(seed, size)
        is_thing = [number % 2 == seed % 2 for number in range(probabilities.shape[1] - 1)]
        logits = original_logits(mask_logits, transform)
        for thresholds in ((0.5, 0.8), (0.2, 0.0), (0.3, 1.0)):
            expected = plain_panoptic(probabilities, logits, is_thing, *thresholds)
            ours = panoptic_inference(probabilities, mask_logits, transform, is_thing, *thresholds)
            assert_same(ours, expected)
            assert ours[0].sum(axis=0).max(initial=0) <= 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("band_values")
def test_semantic_is_its_rule(size):
    for seed in range(NUM_CASES):
        probabilities, mask_logits, transform = random_case(seed, size)
        ours = semantic_inference(probabilities, mask_logits, transform)
        expected = plain_semantic(probabilities, original_logits(mask_logits, transform))
        assert_same(ours, expected)


@pytest.mark.parametrize("size", SIZES)
def test_instances_are_their_rule(size):
    for seed in range(NUM_CASES):
        probabilities, mask_logits, transform = random_case(seed, size)
        logits = original_logits(mask_logits, transform)
        for most in (200, 3):
            ours = instance_inference(probabilities, mask_logits, transform, most)
            assert_same(ours, plain_instances(probabilities, logits, most))


@pytest.mark.parametrize("size", SIZES)
def test_phrases_and_unions_are_their_rules(size):
    for seed in range(NUM_CASES):
        probabilities, mask_logits, transform = random_case(seed, size)
        masks = original_logits(mask_logits, transform).numpy() > 0
        scores, best = (each.numpy() for each in probabilities[:, :-1].max(0))
        phrases = list(range(len(best)))
        assert_same(
            phrase_inference(probabilities, mask_logits, transform),
            (masks[best], phrases, scores.tolist()),
        )
        for threshold in (0.6, 0.3):
            union = np.stack(
                [
                    masks[column >= threshold].any(0)
                    if (column >= threshold).any()
                    else masks[query]
                    for query, column in zip(best, probabilities.numpy()[:, :-1].T, strict=True)
                ]
            )
            ours = union_inference(probabilities, mask_logits, transform, threshold)
            assert_same(ours, (union, phrases, scores.tolist()))


@pytest.mark.parametrize("size", SIZES)
def test_interactive_is_its_rule(size):
    for seed in range(NUM_CASES):
        probabilities, mask_logits, transform = random_case(seed, size)
        probabilities = torch.stack([probabilities[:, 0], 1 - probabilities[:, 0]], dim=1)
        region = np.random.default_rng(seed).random(size) < 0.3
        ours = interactive_inference(probabilities, mask_logits, transform, region)
        masks, _, scores = plain_instances(
            probabilities, original_logits(mask_logits, transform), 200
        )
        candidates = [n for n, score in enumerate(scores) if score >= 0.5] or [0]
        if len(masks) == 0:
            assert ours[0].shape == (0, *size) and ours[1:] == ([], [])
            continue
        best = max(candidates, key=lambda n: iou(masks[n], region))  # the first of equals
        assert_same(ours, (masks[[best]], [0], [scores[best]]))


@pytest.mark.parametrize("reader", [phrase_inference, union_inference])
def test_a_phrase_below_presence_has_no_mask_and_the_others_stay(reader):
    for seed in range(NUM_CASES):
        case = random_case(seed, (20, 30))
        masks, phrases, scores = reader(*case)
        for presence in (0.0, *scores, 1.0):
            kept = [phrase for phrase in phrases if scores[phrase] >= presence]
            expected = masks[kept], kept, [scores[phrase] for phrase in kept]
            assert_same(reader(*case, presence=presence), expected)


def test_nothing_is_found_without_a_class_or_a_mask():
    transform = ResizeAndPad.fit((20, 30), 64)
    shape = (0, 20, 30)
    nothing = torch.tensor([[0.0, 1.0], [0.1, 0.9]]), torch.full((2, 16, 16), -3.0), transform
    for reading in (
        panoptic_inference(*nothing, [True], 0.5, 0.8),
        panoptic_inference(torch.tensor([[0.9, 0.1]] * 2), *nothing[1:], [True], 0.5, 0.8),
        instance_inference(*nothing),
        interactive_inference(*nothing, np.ones((20, 30), bool)),
        *(
            reader(torch.ones(2, 1), *nothing[1:])  # no names were asked for
            for reader in (
                semantic_inference,
                instance_inference,
                phrase_inference,
                union_inference,
            )
        ),
    ):
        assert reading[0].shape == shape and reading[0].dtype == bool
        assert reading[1:] == ([], [])
    assert not union_inference(*nothing)[0].any() and union_inference(*nothing)[1] == [0]


def test_bfloat16_masks_are_read_and_nothing_is_changed():
    probabilities, mask_logits, transform = random_case(7, (71, 90))
    mask_logits = mask_logits.bfloat16()
    before = probabilities.clone(), mask_logits.clone()
    region, is_thing = np.ones((71, 90), bool), [True, False, True, False, True]
    for reader, rest in (
        (panoptic_inference, (is_thing, 0.2, 0.5)),
        (semantic_inference, ()),
        (instance_inference, ()),
        (phrase_inference, ()),
        (union_inference, ()),
        (interactive_inference, (region,)),
    ):
        ours = reader(probabilities, mask_logits, transform, *rest)
        assert_same(ours, reader(probabilities, mask_logits.float(), transform, *rest))
    assert torch.equal(probabilities, before[0]) and torch.equal(mask_logits, before[1])


# ---- several prompts -----------------------------------------------------------------------------


def test_prompts_merged_are_one_prompt():
    """The numbers that one prompt would give, split by names and by queries among three."""
    generator = torch.Generator().manual_seed(3)
    places, counts = [[4, 0], [2], [1, 3]], [5, 3, 6]
    whole = torch.zeros(14, 6)
    mask_logits = F.interpolate(
        5 * torch.randn(14, 1, 4, 4, generator=generator), (16, 16), mode="bicubic"
    )[:, 0]
    parts, start = [], 0
    for indices, count in zip(places, counts, strict=True):
        part = (3 * torch.randn(count, len(indices) + 1, generator=generator)).softmax(-1)
        stop = start + count
        for column, index in enumerate([*indices, 5]):
            whole[start:stop, index] = part[:, column]
        parts.append((part, mask_logits[start:stop]))
        start = stop
    probabilities, logits = merge_parts(parts, places, 5)
    assert torch.equal(probabilities, whole) and torch.equal(logits, mask_logits)

    transform = ResizeAndPad.fit((50, 37), 64)
    asked = {index: range(sum(counts[:n]), sum(counts[: n + 1])) for n in range(3)
             for index in places[n]}  # fmt: skip
    masks, classes, _ = instance_inference(probabilities, logits, transform)
    shown = original_logits(logits, transform).numpy() > 0
    for mask, category in zip(masks, classes, strict=True):  # none of a name not asked of a query
        assert any(np.array_equal(mask, shown[query]) for query in asked[category])
    assert len(masks) == sum(int(shown[query].any()) for each in asked.values() for query in each)


def test_one_prompt_merged_is_itself():
    probabilities, mask_logits, _ = random_case(3, (24, 40))
    K = probabilities.shape[1] - 1
    merged = merge_parts([(probabilities, mask_logits)], [list(range(K))], K)
    assert torch.equal(merged[0], probabilities) and torch.equal(merged[1], mask_logits)


# ---- Mask2Former's processor ---------------------------------------------------------------------

SIDE = 384  # to which the processor resizes mask logits; at that size its resizing changes nothing


def sharp_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, ResizeAndPad]:
    """Class logits [Q, K+1] and confident masks of cells that cover the picture, [Q, 384, 384].
    Some cells are shown by two queries, one of them larger and less sure."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    centres = rng.uniform(0, SIDE, (8, 2))
    distance = [np.hypot(rows - y, columns - x) for y, x in centres]
    cells = np.argmin(distance, axis=0)
    doubles = [(cells == n) | (cells == n + 1) for n in range(3)]
    masks = np.stack([*doubles, *(cells == n for n in range(8))])
    mask_logits = torch.from_numpy(masks).float() * 40 - 20
    categories = rng.integers(0, 3, len(masks))
    categories[-2:] = 3  # the stuff comes last
    class_logits = rng.normal(size=(len(masks), 5))
    class_logits[np.arange(len(masks)), categories] += [*[4] * 3, *[9] * 8]
    class_logits = torch.from_numpy(class_logits).float()
    return class_logits, mask_logits, ResizeAndPad.fit((SIDE, SIDE), SIDE)


def peer_inputs(class_logits: torch.Tensor, mask_logits: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(
        class_queries_logits=class_logits[None], masks_queries_logits=mask_logits[None]
    )


@pytest.mark.parametrize("seed", range(3))
def test_panoptic_is_transformers(seed):
    """The same where masks are sharp and cover the picture. Elsewhere the processor differs from
    Mask2Former's own code and from us: it compares score times mask probability with a half where
    they compare the mask probability, a segment has all pixels that it wins, and one whose share is
    exactly the threshold is dropped. It lists every part of fused stuff, we the stuff once; after a
    fused part it gives numbers again that it has given, so here the stuff comes last."""
    class_logits, mask_logits, transform = sharp_case(seed)
    thresholds, stuff = (0.5, 0.8), {3}
    peer = Mask2FormerImageProcessorPil().post_process_panoptic_segmentation(
        peer_inputs(class_logits, mask_logits),
        threshold=thresholds[0],
        overlap_mask_area_threshold=thresholds[1],
        label_ids_to_fuse=stuff,
        target_sizes=[(SIDE, SIDE)],
    )[0]
    is_thing = [number not in stuff for number in range(4)]
    masks, classes, scores = panoptic_inference(
        class_logits.softmax(-1), mask_logits, transform, is_thing, *thresholds
    )
    first = {}
    for segment in peer["segments_info"]:
        first.setdefault(segment["id"], segment)
    assert classes == [segment["label_id"] for segment in first.values()]
    assert scores == pytest.approx([each["score"] for each in first.values()], abs=1e-6)
    ours = (masks * np.arange(1, len(masks) + 1)[:, None, None]).sum(0)
    assert np.array_equal(ours, peer["segmentation"].numpy())
    assert len(masks) > 3 and (ours > 0).mean() > 0.5


@pytest.mark.parametrize("seed", range(4))
def test_the_published_rule_is_that_of_transformers_segments(seed):
    """The published code takes its classes without the background and gives the rest to the rule
    that transformers keeps in `compute_segments`. Nothing is fused here, where the latter gives
    numbers twice."""
    generator = torch.Generator().manual_seed(seed)
    class_logits = 3 * torch.randn(12, 5, generator=generator)
    coarse = 4 * torch.randn(1, 12, 4, 4, generator=generator) - 3
    mask_logits = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear")[0]
    transform = ResizeAndPad.fit((SIDE, SIDE), SIDE)
    scores, labels = class_logits[:, :-1].softmax(-1).max(-1)
    found = 0
    for overlap in (0.0, 0.3, 0.8):
        segmentation, segments = compute_segments(
            mask_logits.sigmoid(), scores, labels, 0.5, overlap, set()
        )
        masks, classes, ours = panoptic_inference(
            class_logits.softmax(-1), mask_logits, transform, [True] * 4, 0.0, overlap, "published"
        )
        assert classes == [segment["label_id"] for segment in segments]
        assert ours == pytest.approx([segment["score"] for segment in segments], abs=1e-6)
        painted = (masks * np.arange(1, len(masks) + 1)[:, None, None]).sum(0)
        assert np.array_equal(painted, segmentation.numpy())
        found += len(masks)
    assert found > 5
    args = class_logits.softmax(-1), mask_logits, transform, [True] * 4, 0.0, 0.0
    ours, published = panoptic_inference(*args)[0], panoptic_inference(*args, "published")[0]
    assert published.any(axis=0).sum() > ours.any(axis=0).sum()


def test_semantic_is_transformers():
    """The same where no mask is resized; else the processor resizes the sums, we the masks."""
    class_logits, mask_logits, transform = sharp_case(0)
    peer = Mask2FormerImageProcessorPil().post_process_semantic_segmentation(
        peer_inputs(class_logits, mask_logits), target_sizes=[(SIDE, SIDE)]
    )[0]
    masks, classes, _ = semantic_inference(class_logits.softmax(-1), mask_logits, transform)
    ours = (masks * np.array(classes)[:, None, None]).sum(0)
    assert np.array_equal(ours, peer.numpy())


def test_instances_are_transformers():
    """The same where no mask is resized; else the processor resizes masks by nearest pixel, and
    scores them before. It takes as many pairs as there are queries, and does not sort them."""
    class_logits, mask_logits, transform = sharp_case(0)
    mask_logits = mask_logits + torch.linspace(-8, 8, SIDE)  # scores that differ
    peer = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        peer_inputs(class_logits, mask_logits),
        threshold=0.0,
        target_sizes=[(SIDE, SIDE)],
        return_binary_maps=True,
    )[0]
    masks, classes, scores = instance_inference(
        class_logits.softmax(-1), mask_logits, transform, len(class_logits)
    )
    order = sorted(range(len(scores)), key=lambda n: -peer["segments_info"][n]["score"])
    segments = [peer["segments_info"][n] for n in order]
    assert classes == [segment["label_id"] for segment in segments]
    assert scores == pytest.approx([segment["score"] for segment in segments], abs=2e-6)
    assert np.array_equal(masks, peer["segmentation"].bool().numpy()[order])


# ---- panoptic reading, case by case --------------------------------------------------------------

PLACEMENT = ResizeAndPad.fit((16, 32), 32)
HIGH = 8.0  # of a logit


def queries(*rows: tuple[int, float, slice, slice]) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and mask logits of (class of 0..2 or 3 for none, its logit, rows, columns) on a
    canvas of 32."""
    class_logits = torch.full((len(rows), 4), -HIGH)
    mask_logits = torch.full((len(rows), 32, 32), -HIGH)
    for index, (category, logit, vertical, horizontal) in enumerate(rows):
        class_logits[index, category] = logit
        mask_logits[index, vertical, horizontal] = HIGH
    return class_logits.softmax(-1), mask_logits


THINGS = [True, True, False]  # the third class is stuff
LEFT, RIGHT, ALL = slice(0, 16), slice(16, 32), slice(0, 32)


def read(*rows, score_threshold: float = 0.8, overlap_threshold: float = 0.8):
    thresholds = score_threshold, overlap_threshold
    return panoptic_inference(*queries(*rows), PLACEMENT, THINGS, *thresholds)


def test_stuff_is_fused_and_things_are_kept_apart():
    masks, categories, scores = read(
        (2, HIGH, ALL, slice(0, 8)),
        (0, HIGH, ALL, slice(8, 16)),
        (2, HIGH, ALL, slice(24, 32)),
        (0, HIGH, ALL, slice(16, 24)),
    )
    assert categories == [2, 0, 0] and len(scores) == 3
    assert masks.shape == (3, 16, 32) and masks.dtype == bool
    assert masks[0, :, :8].all() and masks[0, :, 24:].all() and not masks[0, :, 8:24].any()
    assert masks[1, :, 8:16].all() and masks[2, :, 16:24].all()
    assert (masks.sum(axis=0) == 1).all()


def test_a_segment_mostly_hidden_is_dropped():
    shown = (0, HIGH, ALL, slice(0, 20))
    hidden = (1, 6.0, ALL, slice(5, 25))  # 5 of its 20 columns remain
    assert read(shown, hidden)[1] == [0]
    assert read(shown, hidden, overlap_threshold=0.2)[1] == [0, 1]


def test_queries_below_the_threshold_and_background_say_nothing():
    masks, categories, scores = read((0, -7.0, ALL, LEFT), (3, HIGH, ALL, RIGHT))
    assert masks.shape == (0, 16, 32) and masks.dtype == bool and categories == scores == []
    assert read((0, HIGH, ALL, slice(0, 0)))[1] == []  # an empty mask
    assert read((0, HIGH, ALL, LEFT), (3, HIGH, ALL, RIGHT))[1] == [0]


def test_a_segment_in_the_padding_alone_is_dropped():
    """Of the canvas only the upper half shows the image."""
    assert read((0, HIGH, slice(20, 32), ALL))[1] == []


def test_panoptic_masks_never_overlap():
    generator = torch.Generator().manual_seed(0)
    class_logits = 4 * torch.randn(30, 4, generator=generator)
    mask_logits = 4 * torch.randn(30, 8, 8, generator=generator)
    mask_logits = F.interpolate(mask_logits[None], (32, 32), mode="bilinear")[0]
    masks, categories, scores = panoptic_inference(
        class_logits.softmax(-1), mask_logits, PLACEMENT, THINGS, 0.3, 0.0
    )
    assert len(masks) == len(categories) == len(scores) > 3
    assert masks.sum(axis=0).max() == 1 and masks.any(axis=(1, 2)).all()
    assert categories.count(2) <= 1 and min(scores) > 0.3


def test_a_phrase_takes_the_query_that_fits_it_best():
    class_logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0]])
    _, mask_logits = queries((0, 0, ALL, LEFT), (0, 0, ALL, RIGHT), (0, 0, ALL, ALL))
    masks, categories, scores = phrase_inference(class_logits.softmax(-1), mask_logits, PLACEMENT)
    assert categories == [0] and scores == pytest.approx([0.8808], abs=1e-4)
    assert masks.shape == (1, 16, 32) and masks[0, :, 16:].all() and not masks[0, :, :16].any()
