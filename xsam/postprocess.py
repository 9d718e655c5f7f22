"""From logits to answers: masks at the original image's size, for every task.

Behind `model.py` in the pipeline: `XSAM.infer` gives class and mask logits, these readers choose
queries and resize what they chose (SPEC of each: paper section 4, evaluation). Legend: Q queries, K
classes without background, N masks read, h w mask logits, H W original image.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from xsam.draw import draw_segments
from xsam.encoders import Placement
from xsam.formats import encode_mask

Reading = tuple[np.ndarray, list[int], list[float]]  # masks bool [N, H, W], classes, scores


@dataclass
class Prediction:
    """What a model says of one image, at the image's own size."""

    image: Image.Image
    masks: np.ndarray  # bool [N, H, W]
    categories: list[int]  # index of each mask's class or phrase in the prompt
    labels: list[str]
    scores: list[float]
    answer: str

    def draw(self, title: str = "", min_score: float = 0.0) -> Image.Image:
        """The masks scored `min_score` or more, with outlines and labels over the image."""
        kept = [n for n, score in enumerate(self.scores) if score >= min_score]
        labels, scores = [self.labels[n] for n in kept], [self.scores[n] for n in kept]
        return draw_segments(self.image, self.masks[kept], labels, scores, title)

    def to_dict(self) -> dict:
        """JSON-ready: the answer, and each segment's label, score, box [x, y, w, h] and RLE."""
        segments = []
        for mask, label, score in zip(self.masks, self.labels, self.scores, strict=True):
            rle = encode_mask(mask)
            segments.append(
                {
                    "label": label,
                    "score": round(score, 4),
                    "area": int(mask.sum()),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "segmentation": rle,
                }
            )
        return {"answer": self.answer, "segments": segments}


def original_logits(mask_logits: Tensor, placement: Placement) -> Tensor:
    """Mask logits [N, h, w] of the canvas, read bilinearly at the pixels of the original image:
    [N, H, W]. The padding drops out; no mask of the canvas's full size is made."""
    axes = []
    for original, resized in zip(placement.original, placement.resized, strict=True):
        pixels = (torch.arange(original, device=mask_logits.device) + 0.5) * (resized / original)
        axes.append(2 * pixels / placement.size - 1)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)
    sampled = F.grid_sample(
        mask_logits[None].float(), grid[None], padding_mode="border", align_corners=False
    )
    return sampled[0]


def read_panoptic(
    class_logits: Tensor,
    mask_logits: Tensor,
    placement: Placement,
    is_thing: list[bool],
    score_threshold: float,
    overlap_threshold: float,
) -> Reading:
    """Panoptic reading of one run: class_logits [Q, K+1], mask_logits [Q, h, w].

    Queries above the score threshold compete for each pixel with score times mask probability; a
    segment of which too little stays visible is dropped; stuff of one class is fused. Returns
    disjoint masks bool [N, H, W], their classes and scores.
    """
    scores, categories = class_logits.float().softmax(-1).max(-1)
    keep = (categories < class_logits.shape[-1] - 1) & (scores > score_threshold)
    if not keep.any():
        return np.zeros((0, *placement.original), bool), [], []
    scores, categories = scores[keep], categories[keep].tolist()
    probabilities = original_logits(mask_logits[keep], placement).sigmoid()
    winner = (scores[:, None, None] * probabilities).argmax(0)
    masks, kept, stuff = [], [], {}
    for index, category in enumerate(categories):
        is_inside = probabilities[index] >= 0.5
        mask = (winner == index) & is_inside
        area, whole = int(mask.sum()), int(is_inside.sum())
        if area == 0 or area < overlap_threshold * whole:
            continue
        mask = mask.cpu().numpy()
        if category in stuff:
            masks[stuff[category]] |= mask
            continue
        if not is_thing[category]:
            stuff[category] = len(masks)
        masks.append(mask)
        kept.append(index)
    stacked = np.stack(masks) if masks else np.zeros((0, *placement.original), bool)
    return stacked, [categories[index] for index in kept], [float(scores[i]) for i in kept]


def read_instances(
    class_logits: Tensor, mask_logits: Tensor, placement: Placement, most: int = 200
) -> Reading:
    """Instance reading of one run, class_logits [Q, K+1]: the best (query, class) pairs, scored by
    class probability times the mean probability inside the mask. Empty masks are left out."""
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    K = probabilities.shape[1]
    scores, chosen = probabilities.flatten().topk(min(most, probabilities.numel()))
    queries, categories = chosen // max(K, 1), chosen % max(K, 1)
    used, place = queries.unique(return_inverse=True)
    inside = original_logits(mask_logits[used], placement).sigmoid()
    masks = inside > 0.5
    areas = masks.sum((1, 2))
    quality = (inside * masks).sum((1, 2)) / areas.clamp(min=1)
    is_kept = areas[place] > 0
    scores, categories, place = ((each[is_kept]) for each in (scores, categories, place))
    scores = scores * quality[place]
    order = scores.argsort(descending=True, stable=True)
    masks = masks.cpu().numpy()[place[order].cpu().numpy()]
    return masks, categories[order].tolist(), scores[order].tolist()


def read_phrases(class_logits: Tensor, mask_logits: Tensor, placement: Placement) -> Reading:
    """Referring reading of one run, class_logits [Q, K+1]: for each phrase the mask of the query
    that fits it best, bool [K, H, W], and its score."""
    scores, best = class_logits.float().softmax(-1)[:, :-1].max(0)
    masks = original_logits(mask_logits[best], placement) > 0
    return masks.cpu().numpy(), list(range(len(best))), scores.tolist()


def read_interactive(
    class_logits: Tensor,
    mask_logits: Tensor,
    placement: Placement,
    region: np.ndarray,
    score_threshold: float = 0.5,
) -> Reading:
    """Interactive reading of one run, class_logits [Q, 2]: among the instances above the threshold,
    or the best one, that whose mask has the best IoU with the prompt `region`, bool [H, W]."""
    masks, categories, scores = read_instances(class_logits, mask_logits, placement)
    if not len(masks):
        return masks, categories, scores
    candidates = [n for n, score in enumerate(scores) if score >= score_threshold] or [0]
    overlap = (masks[candidates] & region).sum(axis=(1, 2))
    ious = overlap / (masks[candidates] | region).sum(axis=(1, 2))
    best = candidates[int(ious.argmax())]
    return masks[best][None], [categories[best]], [scores[best]]
