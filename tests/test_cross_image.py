"""Visual prompts that other images show, through the whole model.

pytest tests/test_cross_image.py
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from xsam.data import Processor, Sample
from xsam.datasets.registry import open_dataset
from xsam.model import XSAM
from xsam.toy.preset import toy

KIND = "coco_vgd_val_mask"
SWIN = dict(model_type="swin", embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4])
SWIN |= dict(window_size=4, image_size=128)
VARIANTS = {  # what changes in the toy preset
    "Swin": dict(seg_backbone_config=SWIN, seg_dim=32, seg_patch_size=16),
    "SAM's decoder": dict(decoder="sam", decoder_dim=32),
    "no image encoder": dict(image_encoder="none", image_encoder_config={}),
}


@pytest.fixture(scope="module", params=["toy", *VARIANTS])
def any_model(request, model) -> XSAM:
    """The toy model, or a new one with another part."""
    if request.param == "toy":
        return model
    settings = toy().resolve(**VARIANTS[request.param])
    torch.manual_seed(0)
    return XSAM(settings, copy.deepcopy(model.tokenizer)).eval()


@pytest.fixture
def any_processor(any_model) -> Processor:
    return Processor(any_model.config, any_model.tokenizer)


def sample_of(world, name: str, index: int, is_answered: bool = True) -> Sample:
    """A sample, its answer the same whatever its index, or left open."""
    sample = open_dataset(name, world / "data").sample(index, np.random.default_rng(index))
    answer = "Sure, <SEG>." if is_answered else None
    return dataclasses.replace(sample, turns=[(sample.turns[0][0], answer)])


def from_copies(sample: Sample) -> Sample:
    """The same prompts, each in a copy of the image that counts as another."""
    copies = [sample.image.copy() for _ in sample.regions]
    return dataclasses.replace(sample, regions=list(sample.regions), region_images=copies)


def collate(processor: Processor, *samples: Sample, pad_left: bool = True):
    return processor.collate([processor.encode(each) for each in samples], pad_left)


@torch.no_grad()
def masks_of(model: XSAM, batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Class and mask logits of each image."""
    predictions = model(batch).predictions
    counts = [len(sample.names) for sample in batch.samples]
    classes = [
        torch.cat([logits[:, :count], logits[:, -1:]], dim=1)
        for logits, count in zip(predictions.class_logits[-1], counts, strict=True)
    ]
    return list(zip(classes, predictions.mask_logits(), strict=True))


def test_a_donor_that_is_the_image_itself_gives_the_same_answer(world, any_model, any_processor):
    sample = sample_of(world, KIND, 0)
    alone, crossed = collate(any_processor, sample), collate(any_processor, from_copies(sample))
    assert len(alone.seg_pixels) == 1 and len(crossed.seg_pixels) == 1 + len(sample.names)
    assert torch.equal(alone.region_points, crossed.region_points)
    with torch.no_grad():
        expected, hidden_states = any_model.encode(alone)
        found, states = any_model.encode(crossed)
    torch.testing.assert_close(found, expected)
    for one, other in zip(states, hidden_states, strict=True):
        torch.testing.assert_close(one, other)
    (one,), (other,) = masks_of(any_model, alone), masks_of(any_model, crossed)
    torch.testing.assert_close(one, other)


def test_what_the_donor_shows_reaches_the_answer(world, model, processor):
    sample = sample_of(world, f"{KIND}_cross", 0)
    other = dataclasses.replace(sample, region_images=[sample.image] * len(sample.names))
    other.regions = [np.ones(each.size[::-1], bool) for each in other.region_images]
    (one,), (changed,) = (masks_of(model, collate(processor, each)) for each in (sample, other))
    assert not torch.allclose(one[0], changed[0], atol=1e-3)


def test_an_answer_depends_on_no_other_sample_of_the_batch(world, any_model, any_processor):
    """Cross-image prompts and those in the image itself share the batch, images of several sizes
    and with several numbers of categories."""
    samples = [
        sample_of(world, f"{KIND}_cross", 0),
        sample_of(world, KIND, 1),
        sample_of(world, f"{KIND}_cross", 1),
    ]
    samples = [dataclasses.replace(each, task="vgd") for each in samples]
    batch = collate(any_processor, *samples)
    counts = [len(sample.names) for sample in samples]
    assert len(batch.seg_pixels) == 3 + counts[0] + counts[2]
    rows = [
        *range(3, 3 + counts[0]),
        *[1] * counts[1],
        *range(3 + counts[0], len(batch.seg_pixels)),
    ]
    assert batch.region_index.tolist() == rows
    assert len({each.image.size for each in samples}) + len(set(counts)) > 2
    together = masks_of(any_model, batch)
    for sample, (classes, masks) in zip(samples, together, strict=True):
        ((own_classes, own_masks),) = masks_of(any_model, collate(any_processor, sample))
        torch.testing.assert_close(classes, own_classes, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(masks, own_masks, atol=1e-3, rtol=1e-4)


def test_generation_goes_on_from_the_images_that_are_asked_about(world, any_model, any_processor):
    samples = [sample_of(world, f"{KIND}_cross", index, is_answered=False) for index in range(2)]
    together, _ = any_model.infer(collate(any_processor, *samples), 4)
    assert together == [any_model.infer(collate(any_processor, each), 4)[0][0] for each in samples]


@pytest.mark.parametrize(("height", "width"), [(200, 50), (10, 20)])
def test_points_lie_where_the_donors_own_canvas_has_them(processor, world, height, width):
    sample = sample_of(world, f"{KIND}_cross", 0)
    region = np.zeros((height, width), bool)
    region[-1, -1] = True
    reference_images = [sample.image.resize((width, height)) for _ in sample.names]
    shown = dataclasses.replace(
        sample, region_images=reference_images, regions=[region] * len(reference_images)
    )
    points = collate(processor, shown).region_points
    size, longest = processor.config.model.seg_image_size, max(height, width)
    corner = torch.tensor(
        [height / longest, width / longest]
    )  # of the reference_image on its canvas
    expected = corner - 0.5 / longest - 0.5 / size
    torch.testing.assert_close(points, expected.expand_as(points))


def test_a_training_batch_has_a_gradient_through_the_donors(world, model, processor):
    sample = sample_of(world, f"{KIND}_cross", 0)
    batch = collate(processor, sample, pad_left=False)
    batch.seg_pixels.requires_grad_()
    model(batch).predictions.class_logits[-1].square().sum().backward()
    reached = batch.seg_pixels.grad.flatten(1).abs().sum(1)
    assert (reached > 0).all() and len(reached) == 1 + len(sample.names)
    model.zero_grad()
