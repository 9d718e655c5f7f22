"""From probabilities to answers: masks at the original image's size, for every task.

Behind `model.py` in the pipeline: `XSAM.infer` gives class and mask logits, these readers choose
queries and resize what they chose, one mask at a time, so that what is at work fits a core's cache
and memory stays near that of the result. Every reader takes `probabilities` float32 [Q, K+1], the
last column that of no class, and `mask_logits` [Q, h, w] of the canvas, on any device. Legend: Q
queries, K classes, N masks read, h w mask logits, H W original image.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xsam.data import ResizeAndPad

Reading = tuple[np.ndarray, list[int], list[float]]  # masks bool [N, H, W], classes, scores

Box = tuple[slice, slice]  # rows and columns of the original image

BAND_VALUES = 2**22  # of float32 16 MB: near what caches hold, and few steps


# ---- the original image --------------------------------------------------------------------------


class Taps:
    """Which two rows (or columns) of a mask each row of the original image lies between, and how
    far from the first of them it is. Beyond the canvas its border goes on."""

    def __init__(
        self, side: int, resized: int, start: int, canvas: int, size: int, device: torch.device
    ):
        """An image's side, resized and shown from `start` on by the canvas, of which masks have
        `size` rows."""
        places = ((np.arange(side) + 0.5) * (resized / side) - start) * (size / canvas) - 0.5
        places = places.clip(0, size - 1)
        self.first = places.astype(np.int64)
        self.second = np.minimum(self.first + 1, size - 1)
        taps = self.first, self.second, (places - self.first).astype(np.float32)
        self.tensors = [torch.from_numpy(each).to(device) for each in taps]

    def reach(self, chosen: slice) -> slice:
        """The rows of the mask that the chosen rows of the image, at least one, lie between."""
        return slice(int(self.first[chosen.start]), int(self.second[chosen.stop - 1]) + 1)

    def reached(self, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start and stop of the image's rows that depend on any of the mask's rows first..last."""
        return self.second.searchsorted(first), self.first.searchsorted(last, side="right")


class OriginalReader:
    """Reads masks [h, w] of a canvas bilinearly at the pixels of the original image. The padding
    drops out, and no mask of the canvas's full size is made."""

    def __init__(self, mask_logits: Tensor, transform: ResizeAndPad):
        """For masks of the size and on the device of mask_logits [N, h, w]."""
        starts = transform.top, transform.left
        sizes = zip(transform.original, transform.resized, starts, strict=True)
        self.rows, self.columns = (
            Taps(*of_image, transform.size, size, mask_logits.device)
            for of_image, size in zip(sizes, mask_logits.shape[-2:], strict=True)
        )

    def __call__(self, mask_logits: Tensor, box: Box) -> Tensor:
        """float32 logits [N, height, width] of a box, not empty, of the original image."""
        reach = self.rows.reach(box[0])
        masks = mask_logits[:, reach].float()
        N, height, _ = masks.shape
        # [N·height, w]: index_select has a fast way along two dimensions alone
        masks = masks.flatten(0, 1)
        first, second, weight = (each[box[1]] for each in self.columns.tensors)
        masks = torch.lerp(masks.index_select(1, first), masks.index_select(1, second), weight)
        masks = masks.unflatten(0, (N, height))  # [N, height, width]
        first, second, weight = (each[box[0]] for each in self.rows.tensors)
        above, below = (masks.index_select(1, each - reach.start) for each in (first, second))
        return torch.lerp(above, below, weight[:, None], out=above)


def read_insides(mask_logits: Tensor, transform: ResizeAndPad) -> Iterator[tuple[Box, Tensor]]:
    """Of each mask [N, h, w] a box of the original image, outside of which no logit is positive,
    and its logits there; the box of a mask that is nowhere positive is empty."""
    read = OriginalReader(mask_logits, transform)
    limits = []  # of rows, then of columns: start and stop of each mask
    for taps, other in (read.rows, -1), (read.columns, -2):
        is_positive = (mask_logits.amax(other) > 0).cpu().numpy()  # [N, h] or [N, w]
        first = is_positive.argmax(1)
        last = is_positive.shape[1] - 1 - is_positive[:, ::-1].argmax(1)
        start, stop = taps.reached(first, last)
        limits += [start, np.where(is_positive.any(1), stop, start)]
    for number, (top, bottom, left, right) in enumerate(np.stack(limits, 1).tolist()):
        if top < bottom and left < right:
            box = slice(top, bottom), slice(left, right)
            yield box, read(mask_logits[number : number + 1], box)[0]
        else:
            yield (slice(0, 0), slice(0, 0)), torch.zeros(0, 0, device=mask_logits.device)


def bands(transform: ResizeAndPad, depth: int) -> Iterator[Box]:
    """The original image from top to bottom, in bands of rows that have about BAND_VALUES values
    where each pixel has `depth` of them."""
    height, width = transform.original
    step = max(1, BAND_VALUES // max(1, depth * width))
    for top in range(0, height, step):
        yield slice(top, min(top + step, height)), slice(0, width)


def split_map(numbers: np.ndarray, count: int) -> np.ndarray:
    """The masks, bool [count, H, W], of 0..count-1 in a map [H, W]."""
    masks = np.empty((count, *numbers.shape), bool)
    for number, mask in enumerate(masks):
        np.equal(numbers, number, out=mask)
    return masks


# ---- readers -------------------------------------------------------------------------------------


def merge_parts(
    parts: list[tuple[Tensor, Tensor]], places: list[list[int]], num_classes: int
) -> tuple[Tensor, Tensor]:
    """One image asked in several prompts, each with some of the names, as if it were in one.

    `parts` are the probabilities [Q, Kg+1] and mask logits [Q, h, w] of each prompt, `places` the
    Kg indices of its names in the whole list. Returns probabilities [ΣQ, num_classes+1], zero for
    the names that a query was not asked about, and mask logits [ΣQ, h, w].
    """
    merged = []
    for (probabilities, _), indices in zip(parts, places, strict=True):
        whole = probabilities.new_zeros(len(probabilities), num_classes + 1)  # [Q, K+1]
        whole[:, [*indices, num_classes]] = probabilities
        merged.append(whole)
    return torch.cat(merged), torch.cat([mask_logits for _, mask_logits in parts])


def panoptic_inference(
    probabilities: Tensor,
    mask_logits: Tensor,
    transform: ResizeAndPad,
    is_thing: list[bool],
    score_threshold: float,
    overlap_threshold: float,
    rule: str = "mask2former",
) -> Reading:
    """Disjoint masks, by the rule of Mask2Former (Cheng et al. 2022) or of the published code.

    Queries whose best column is a class, with a probability above the score threshold, compete for
    each pixel with score times mask probability. A segment is what its query wins of the pixels
    where its mask probability is at least a half. It is dropped where that is nothing, and where
    what the query wins, at whatever mask probability, is less than the overlap threshold's share of
    the pixels at a half or more. Segments of one class that `is_thing` does not list are fused,
    with the score of the first.

    The rule "published" leaves the background out of the class probabilities, paints all that a
    query wins, and takes a half of score times mask probability where Mask2Former takes a half of
    the mask probability. Figures of released weights were made with it, on COCO with a score
    threshold of 0.
    """
    is_published = rule == "published"
    if is_published:
        probabilities = F.pad(probabilities[:, :-1], (0, 1))  # no query is background
        probabilities = probabilities / probabilities.sum(-1, keepdim=True).clamp(min=1e-12)
    scores, categories = probabilities.max(-1)  # [Q]
    is_kept = (categories < probabilities.shape[1] - 1) & (scores > score_threshold)
    scores, categories, mask_logits = (each[is_kept] for each in (scores, categories, mask_logits))
    if not len(scores):
        return np.zeros((0, *transform.original), bool), [], []
    scores, categories = scores.tolist(), categories.tolist()
    segments, won, shown, areas = compete(mask_logits, scores, transform, is_published)
    shares = won / np.maximum(areas, 1)
    is_kept = (shown > 0) & (areas > 0) & (shares >= overlap_threshold)
    places, chosen = place_segments(categories, is_kept, is_thing)
    masks = split_map(places[segments], len(chosen))  # [N, H, W]
    return masks, [categories[number] for number in chosen], [scores[number] for number in chosen]


def compete(
    mask_logits: Tensor, scores: list[float], transform: ResizeAndPad, is_published: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which of the N queries each pixel shows, int16 [H, W], -1 for none; and of each query, int64
    [N], the pixels that it wins, those that show it, and those where its own mask is a half or
    more. See `panoptic_inference`."""
    count = len(scores)
    read = OriginalReader(mask_logits, transform)
    areas = torch.zeros(count, dtype=torch.int64, device=mask_logits.device)
    won, shown = np.zeros((2, count), np.int64)
    segments = np.empty(transform.original, np.int16)  # [H, W]
    for band in bands(transform, 4):  # a mask, the best so far and what compares them
        size = segments[band].shape
        best = mask_logits.new_full(size, -1, dtype=torch.float32)
        winner = torch.zeros(size, dtype=torch.int16, device=mask_logits.device)
        is_inside = torch.zeros(size, dtype=torch.bool, device=mask_logits.device)
        for number, score in enumerate(scores):
            mask = read(mask_logits[number : number + 1], band)[0].sigmoid_()
            is_half = mask >= (0.5 / score if is_published else 0.5)
            areas[number] += is_half.count_nonzero()
            is_better = mask.mul_(score) > best  # the first of equals wins
            torch.maximum(best, mask, out=best)
            # Later numbers are larger. `where` would say the same, at ten times the time on a CPU.
            winner = torch.maximum(winner, is_better.to(torch.int16).mul_(number))
            is_inside = (is_inside & ~is_better) | (is_half & is_better)
        if is_published:
            is_inside.fill_(True)
        winner, is_inside = winner.cpu().numpy(), is_inside.cpu().numpy()
        won += np.bincount(winner.ravel(), minlength=count)
        shown += np.bincount(winner[is_inside], minlength=count)
        segments[band] = np.where(is_inside, winner, -1)
    return segments, won, shown, areas.cpu().numpy()


def place_segments(
    categories: list[int], is_kept: np.ndarray, is_thing: list[bool]
) -> tuple[np.ndarray, list[int]]:
    """Which mask the segment of each query belongs to, int16 [queries + 1], -1 for none (the last
    entry is that of pixels without a query), and the query whose score each mask has. Segments of
    one stuff class share a mask."""
    places = np.full(len(categories) + 1, -1, np.int16)
    chosen: list[int] = []
    stuff: dict[int, int] = {}
    for number in np.flatnonzero(is_kept).tolist():
        category = categories[number]
        if category in stuff:
            places[number] = stuff[category]
            continue
        places[number] = len(chosen)
        if not is_thing[category]:
            stuff[category] = len(chosen)
        chosen.append(number)
    return places, chosen


def semantic_inference(
    probabilities: Tensor, mask_logits: Tensor, transform: ResizeAndPad
) -> Reading:
    """Semantic reading: each pixel is of the class with the largest sum over queries of class times
    mask probability (Mask2Former, Cheng et al. 2022). A mask for each class that is present, in
    the order of classes; its score is the mean over its pixels of that sum's share of all classes'
    sums."""
    Q, K = len(probabilities), probabilities.shape[1] - 1
    if K == 0:
        return np.zeros((0, *transform.original), bool), [], []
    read = OriginalReader(mask_logits, transform)
    weights = probabilities[:, :-1].T.contiguous()  # [K, Q]
    classes = np.empty(transform.original, np.int64)
    areas, sums = np.zeros((2, K))
    for band in bands(transform, Q + K):
        masks = read(mask_logits, band).sigmoid_().flatten(1)  # [Q, pixels]
        sums_of_classes = weights @ masks  # [K, pixels]
        best, category = sums_of_classes.max(0)
        share = best / sums_of_classes.sum(0).clamp(min=1e-12)
        share, category = share.cpu().numpy(), category.cpu().numpy()
        classes[band] = category.reshape(classes[band].shape)
        areas += np.bincount(category, minlength=K)
        sums += np.bincount(category, weights=share, minlength=K)
    present = areas.nonzero()[0]
    places = np.full(K, -1, np.int16)
    places[present] = np.arange(len(present))
    masks = split_map(places[classes], len(present))  # [N, H, W]
    return masks, present.tolist(), (sums[present] / areas[present]).tolist()


def instance_inference(
    probabilities: Tensor, mask_logits: Tensor, transform: ResizeAndPad, most: int = 200
) -> Reading:
    """Instance reading: the best `most` (query, class) pairs, by class probability times the mean
    mask probability inside the mask, best first. Masks may overlap; empty ones are left out, and
    so are pairs of probability zero, those of names that a query was not asked about."""
    K = probabilities.shape[1] - 1
    if K == 0:
        return np.zeros((0, *transform.original), bool), [], []
    scores = probabilities[:, :-1].flatten()  # [Q·K]
    least = scores.topk(min(most, len(scores))).values[-1]
    chosen = ((scores >= least) & (scores > 0)).nonzero()[:, 0]  # of equals the first are taken
    scores, order = scores[chosen].sort(descending=True, stable=True)
    scores, chosen = scores[:most], chosen[order[:most]]
    queries, categories = chosen // K, chosen % K
    used, place = queries.unique(return_inverse=True)
    boxes, insides, areas, qualities = [], [], [], []
    for box, logits in read_insides(mask_logits[used], transform):
        is_inside = logits > 0
        area = is_inside.count_nonzero()
        boxes.append(box)
        insides.append(is_inside.cpu().numpy())
        areas.append(area)
        qualities.append(logits.sigmoid_().mul_(is_inside).sum() / area)
    if not boxes:
        return np.zeros((0, *transform.original), bool), [], []
    is_kept = torch.stack(areas)[place] > 0  # of each pair
    scores, categories, place = (each[is_kept] for each in (scores, categories, place))
    scores, order = (scores * torch.stack(qualities)[place]).sort(descending=True, stable=True)
    masks = np.zeros((len(order), *transform.original), bool)  # [N, H, W]
    for mask, number in zip(masks, place[order].tolist(), strict=True):
        mask[boxes[number]] = insides[number]
    return masks, categories[order].tolist(), scores.tolist()


def phrase_inference(
    probabilities: Tensor, mask_logits: Tensor, transform: ResizeAndPad, presence: float = 0.0
) -> Reading:
    """Referring reading: for each phrase, [K], the mask of the query that fits it best and its
    score; none for a phrase whose score is below `presence`. A mask may be empty."""
    scores, best = probabilities[:, :-1].max(0)  # [K]
    phrases = (scores >= presence).nonzero()[:, 0]  # [N]
    masks = np.zeros((len(phrases), *transform.original), bool)
    insides = read_insides(mask_logits[best[phrases]], transform)
    for mask, (box, logits) in zip(masks, insides, strict=True):
        mask[box] = (logits > 0).cpu().numpy()
    return masks, phrases.tolist(), scores[phrases].tolist()


def union_inference(
    probabilities: Tensor,
    mask_logits: Tensor,
    transform: ResizeAndPad,
    score_threshold: float = 0.6,
    presence: float = 0.0,
) -> Reading:
    """Generalised referring reading (gRefCOCO, Liu et al. 2023): for each phrase all that the
    queries at or above the threshold segment, [K, H, W], or what the best one does where there is
    none above it. The score is the best query's; below `presence` a phrase has no mask."""
    scores, best = probabilities[:, :-1].max(0)  # [K]
    is_chosen = probabilities[:, :-1] >= score_threshold  # [Q, K]
    is_chosen[best, torch.arange(len(best), device=best.device)] = True
    used = is_chosen.any(1).nonzero()[:, 0]
    masks = np.zeros((len(best), *transform.original), bool)  # [K, H, W]
    insides = read_insides(mask_logits[used], transform)
    for phrases, (box, logits) in zip(is_chosen[used].cpu().numpy(), insides, strict=True):
        is_inside = (logits > 0).cpu().numpy()
        for phrase in phrases.nonzero()[0]:
            masks[phrase][box] |= is_inside
    kept = (scores >= presence).nonzero()[:, 0]
    scores, kept = scores[kept].tolist(), kept.tolist()
    return masks[kept], kept, scores


def interactive_inference(
    probabilities: Tensor,
    mask_logits: Tensor,
    transform: ResizeAndPad,
    region: np.ndarray,
    score_threshold: float = 0.5,
) -> Reading:
    """Interactive reading (paper appendix A), probabilities [Q, 2]: among the instances at or above
    the threshold, or the best one, that whose mask has the best IoU with the prompt `region`, bool
    [H, W]."""
    masks, categories, scores = instance_inference(probabilities, mask_logits, transform)
    if not len(masks):
        return masks, categories, scores
    ious = []
    for mask, score in zip(masks, scores, strict=True):
        if ious and score < score_threshold:
            break  # the best come first
        overlap = np.count_nonzero(mask & region)
        ious.append(overlap / np.count_nonzero(mask | region))
    best = int(np.argmax(ious))
    return masks[best][None], [categories[best]], [scores[best]]  # [1, H, W]
