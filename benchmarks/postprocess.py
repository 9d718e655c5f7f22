"""Reading an image's masks out, ours and transformers' Mask2Former processor (compare.py runs it).

One image of 480x640 as the full preset segments it: 200 queries, 133 classes, mask logits of a
quarter of the 1024 canvas. Thirty queries are sure of a class and cover the picture with wavy
blobs, small before large; the rest are of no class and weak. The peer gets the part of the logits
that shows the image, and the same thresholds.

The rules are near each other, not the same (tests/test_postprocess.py says where they are): the
peer resizes logits to 384x384 and what follows from them to the image, its panoptic segments keep
pixels of a low mask probability, and its instance scores are of the small masks. Nothing is fused:
behind a fused part the peer gives segments numbers that it has given before.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from transformers.models.mask2former.image_processing_pil_mask2former import (
    Mask2FormerImageProcessorPil,
)

from xsam.data import ResizeAndPad
from xsam.postprocess import Reading, instance_inference, panoptic_inference, semantic_inference

SIZE, CANVAS, MASK_SIZE = (480, 640), 1024, 256
NUM_QUERIES, NUM_CLASSES, NUM_SURE = 200, 133, 30
SCORE_THRESHOLD, OVERLAP_THRESHOLD = 0.5, 0.8


def model_outputs(seed: int, transform: ResizeAndPad) -> tuple[torch.Tensor, torch.Tensor]:
    """Class logits [Q, K+1] and mask logits [Q, h, w] as a trained model gives them."""
    rng = np.random.default_rng(seed)
    class_logits = rng.normal(size=(NUM_QUERIES, NUM_CLASSES + 1))
    mask_logits = torch.empty(NUM_QUERIES, MASK_SIZE, MASK_SIZE)
    rows, columns = torch.meshgrid(*[torch.arange(MASK_SIZE) + 0.5] * 2, indexing="ij")
    shown = [side * MASK_SIZE / CANVAS for side in transform.resized]

    def blob(radius: float) -> torch.Tensor:
        """How far inside a wavy ellipse each place of the mask is."""
        y, x = (rng.uniform(0, side) for side in shown)
        noise = torch.from_numpy(rng.normal(size=(1, 1, 12, 12)).astype(np.float32))
        waves = F.interpolate(noise, (MASK_SIZE, MASK_SIZE), mode="bicubic")[0, 0]
        distance = torch.hypot((rows - y) / rng.uniform(0.7, 1.4), columns - x)
        return radius * (1 + 0.1 * waves) - distance

    # Sure queries share the picture: each has where it is the deepest, small ones before large.
    depths = torch.stack([blob(radius) for radius in np.geomspace(110, 16, NUM_SURE)])
    front = torch.full((MASK_SIZE, MASK_SIZE), -torch.inf)  # the best of the smaller ones
    for query in reversed(range(NUM_SURE)):
        mask_logits[query] = torch.minimum(depths[query], -front)
        front = torch.maximum(front, depths[query])
    mask_logits[:NUM_SURE] = mask_logits[:NUM_SURE].clamp(-12, 8)
    for query in range(NUM_SURE):
        class_logits[query, rng.integers(NUM_CLASSES)] += rng.uniform(8, 13)
    for query in range(NUM_SURE, NUM_QUERIES):
        class_logits[query, -1] += rng.uniform(7, 11)
        mask_logits[query] = blob(rng.uniform(4, 30)).clamp(-12, rng.uniform(-4, 2))
    order = torch.from_numpy(rng.permutation(NUM_QUERIES))
    return torch.from_numpy(class_logits).float()[order], mask_logits[order]


def class_map(masks: np.ndarray, classes: list[int]) -> np.ndarray:
    """Disjoint masks as a map of classes, -1 where there is none."""
    result = np.full(masks.shape[1:], -1)
    for mask, category in zip(masks, classes, strict=True):
        result[mask] = category
    return result


def agree_panoptic(ours: Reading, peer: dict) -> dict[str, float]:
    """Share of the pixels whose class is equal."""
    segments = {each["id"]: each["label_id"] for each in peer["segments_info"]}
    ids = peer["segmentation"].numpy()
    theirs = class_map(np.stack([ids == number for number in segments]), list(segments.values()))
    return {"equal": float((class_map(*ours[:2]) == theirs).mean())}


def agree_semantic(ours: Reading, peer: torch.Tensor) -> dict[str, float]:
    return {"equal": float((class_map(*ours[:2]) == peer.numpy()).mean())}


def agree_instances(ours: Reading, peer: dict) -> dict[str, float]:
    """Median IoU of the instances, those of one class paired by overlap, best scores first; 0 for
    one without a pair."""
    theirs = peer["segmentation"].bool().numpy()
    free = [
        (row["label_id"], mask) for row, mask in zip(peer["segments_info"], theirs, strict=True)
    ]
    ious = []
    for mask, category in zip(*ours[:2], strict=True):
        pairs = [
            ((mask & other).sum() / (mask | other).sum(), place)
            for place, (label, other) in enumerate(free)
            if label == category
        ]
        best, place = max(pairs, default=(0.0, None))
        ious.append(best)
        if best:
            del free[place]
    return {"equal": float(np.median(ious))}


AGREE = {"panoptic": agree_panoptic, "semantic": agree_semantic, "instances": agree_instances}


def floors(probabilities: torch.Tensor, mask_logits: torch.Tensor, transform: ResizeAndPad) -> dict:
    """What each reading cannot do without: bytes read and written, and operations.

    A bilinear read is six operations (three lines between two values), a mask probability four
    (exponential, sum, quotient, sign) where an exponential counts as one.
    """
    pixels, per_pixel = SIZE[0] * SIZE[1], 6 + 4
    shown = np.prod([side * MASK_SIZE // CANVAS for side in transform.resized])
    panoptic, _, _ = panoptic_inference(
        probabilities, mask_logits, transform, [True] * NUM_CLASSES, SCORE_THRESHOLD, 0.0
    )
    kept = int(
        ((probabilities.max(1).values > SCORE_THRESHOLD) & (probabilities.argmax(1) < NUM_CLASSES))
        .sum()
        .item()
    )
    instances, _, _ = instance_inference(probabilities, mask_logits, transform)
    inside = int(instances.sum())
    return {
        "panoptic": (4 * kept * shown + panoptic.size, kept * pixels * (per_pixel + 2)),
        "semantic": (
            4 * NUM_QUERIES * shown + pixels,
            NUM_QUERIES * pixels * (per_pixel + 2 * NUM_CLASSES),
        ),
        "instances": (4 * NUM_QUERIES * shown + inside, inside * (per_pixel + 1)),
    }


def build_pairs(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, transform: ResizeAndPad
) -> dict[str, tuple[Callable, Callable]]:
    """Of each reading our call and transformers', on the device of the logits."""
    height, width = (round(side * MASK_SIZE / CANVAS) for side in transform.resized)
    outputs = SimpleNamespace(
        class_queries_logits=class_logits[None],
        masks_queries_logits=mask_logits[None, :, :height, :width].contiguous(),
    )
    processor, sizes = Mask2FormerImageProcessorPil(), [SIZE]

    def read(reader: Callable, *rest) -> Reading:
        return reader(class_logits.softmax(-1), mask_logits, transform, *rest)

    is_thing = [True] * NUM_CLASSES
    return {
        "panoptic": (
            lambda: read(panoptic_inference, is_thing, SCORE_THRESHOLD, OVERLAP_THRESHOLD),
            lambda: processor.post_process_panoptic_segmentation(
                outputs,
                threshold=SCORE_THRESHOLD,
                overlap_mask_area_threshold=OVERLAP_THRESHOLD,
                label_ids_to_fuse=set(),
                target_sizes=sizes,
            )[0],
        ),
        "semantic": (
            lambda: read(semantic_inference),
            lambda: processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0],
        ),
        "instances": (
            lambda: read(instance_inference, NUM_QUERIES),
            lambda: processor.post_process_instance_segmentation(
                outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True
            )[0],
        ),
    }
