"""Training and answering on a device that is not the CPU, where no GPU is at hand.

The device is pretended: it computes on the CPU, but like a GPU it refuses operations that mix its
tensors with the CPU's, and like Apple's it knows no float64. Its tensors say that they are on
"meta", a device that autograd knows without a driver.

pytest tests/test_devices.py
"""

import contextlib
import copy
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from xsam.data import Mixture, Processor, ResizeAndPad
from xsam.datasets.registry import open_dataset
from xsam.evaluate import post_processing_of
from xsam.inference import build_inputs, predict_inputs
from xsam.model import checkpoint_activations
from xsam.optimizer import build_optimizer, freeze, gradient_norms, update
from xsam.plan import batch_loss
from xsam.postprocess import (
    instance_inference,
    interactive_inference,
    panoptic_inference,
    phrase_inference,
    semantic_inference,
    union_inference,
)
from xsam.toy.preset import toy
from xsam.train import pretrained_model

FAR = torch.device("meta")
ATEN = torch.ops.aten
MAY_MIX = {  # copies between devices, and places on the CPU where a GPU reads or writes
    ATEN._to_copy.default,
    ATEN.copy_.default,
    ATEN.index.Tensor,
    ATEN.index_put.default,
    ATEN.index_put_.default,
    ATEN._index_put_impl_.default,
}

# ---- the device ----------------------------------------------------------------------------------


class FarTensor(Tensor):
    """A tensor of the pretended device; its values are `near`, on the CPU."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "FarTensor":
        far = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FAR,
        )
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def tolist(self) -> list:
        return self.near.tolist()

    def __setitem__(self, index, value) -> None:
        """torch's own takes a list of places to the device without asking `compute`."""
        if isinstance(value, Tensor) and value.dim() and not isinstance(value, FarTensor):
            raise RuntimeError("a value on the CPU for a tensor of another device")
        self.near[tree_map(strip, index)] = strip(value)


def strip(each):
    return each.near if isinstance(each, FarTensor) else each


def compute(func, args: tuple, kwargs: dict):
    """Any operation, on tensors of either device. Raises RuntimeError where it mixes them."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    is_far = any(isinstance(each, FarTensor) for each in tensors)
    near = [each for each in tensors if not isinstance(each, FarTensor) and each.dim()]
    assert not any(each.device == FAR for each in near), f"{func}: a tensor that has no values"
    if func.namespace == "prim":  # asks for a tensor's device
        return FAR if is_far else func(*args, **kwargs)
    if is_far and near and func not in MAY_MIX:
        shapes = [list(each.shape) for each in near]
        raise RuntimeError(f"{func}: on the CPU among tensors of another device: {shapes}")
    device = kwargs.get("device")
    near_of = {id(each.near): each for each in tensors if isinstance(each, FarTensor)}
    args, kwargs = tree_map(strip, (args, kwargs))
    if device is not None:
        kwargs, is_far = kwargs | {"device": "cpu"}, torch.device(device) == FAR
    output = func(*args, **kwargs)

    def wrap(each):
        if not isinstance(each, Tensor):
            return each
        if each.dtype == torch.float64:
            raise RuntimeError(f"{func}: float64, which not every device has")
        return near_of.get(id(each)) if id(each) in near_of else FarTensor(each)

    return tree_map(wrap, output) if is_far else output


class Everywhere(TorchDispatchMode):
    """What makes new tensors reaches `compute` by this alone."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


@contextlib.contextmanager
def far_device() -> Iterator[None]:
    """Inside, "meta" is the pretended device."""
    new_tensor, new_generator = torch.tensor, torch.Generator

    def tensor(values, *, device=None, **options) -> Tensor:
        return new_tensor(values, **options).to(device or "cpu")  # torch's own needs a driver

    with (
        mock.patch("torch.tensor", tensor),
        mock.patch("torch.Generator", lambda device="cpu": new_generator("cpu")),
        mock.patch("torch.autocast", lambda *_, **__: contextlib.nullcontext()),
        Everywhere(),
    ):
        yield


def test_the_pretended_device_refuses_what_a_gpu_refuses():
    values = torch.arange(6.0).view(2, 3)
    with far_device():
        far = values.to(FAR).requires_grad_()
        assert far.device == FAR and torch.ones(2, device=FAR).device == FAR
        loss = (far.T @ far).square().sum()
        loss.backward()
        assert loss.item() == (values.T @ values).square().sum().item()
        assert isinstance(far.grad, FarTensor) and far.grad.cpu().shape == (2, 3)
        for mixed in (lambda: far + values, lambda: torch.cat([far, torch.zeros(1, 3)])):
            with pytest.raises(RuntimeError, match="on the CPU among tensors of another device"):
                mixed()
        with pytest.raises(RuntimeError, match="float64"):
            values.double().to(FAR)
        with pytest.raises((RuntimeError, TypeError)):
            far.detach().numpy()


# ---- xsam on it ----------------------------------------------------------------------------------


def flat_weights(model: nn.Module) -> Tensor:
    return torch.cat([each.detach().cpu().flatten() for each in model.parameters()])


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (1, "coco_panoptic"),
        (2, "llava_pretrain"),
        (3, "coco_vgd"),
        (3, "refcoco"),
    ],
)
def test_a_training_step_is_the_same_on_any_device(world, stage, name):
    """Loss, norms of the gradients, and where the weights go."""
    config, results = toy(), []
    for device in (torch.device("cpu"), FAR):
        torch.manual_seed(0)
        model = pretrained_model(stage, config, world / "weights", lambda _: None).train()
        freeze(model, config.stages[stage], model.prefix)
        start = flat_weights(model)
        with far_device() if device == FAR else contextlib.nullcontext():
            model.to(device)
            checkpoint_activations(model)
            optimizer = build_optimizer(model, config.stages[stage], model.prefix)
            dataset = open_dataset(name, world / "data", all_classes=stage == 1)
            processor = Processor(config, model.tokenizer)
            mixture = Mixture([dataset], processor, config.stages[stage], seed=0)
            places = next(iter(mixture.micro_batches(0, 0, 1)))
            batch = mixture.collate([mixture[place] for place in places]).to(device)
            loss = batch_loss(model, batch, config)
            loss.backward()
            norms = gradient_norms(model)
            update(optimizer, norms, clip_norm=1.0)
            results.append((loss.item(), list(norms.values()), flat_weights(model) - start))
    near, far = results  # attention has another kernel there
    assert near[0] > 0 and far[0] == pytest.approx(near[0], rel=1e-4)
    assert len(near[1]) > 1 and far[1] == pytest.approx(near[1], rel=1e-3, abs=1e-4)
    # A first step of AdamW is the sign of the gradient, which rounding may turn where it is tiny.
    assert near[2].abs().max() > 0 and (near[2] - far[2]).norm() < 0.05 * near[2].norm()


@pytest.mark.parametrize(
    "name",
    ["coco_panoptic_val", "coco_semantic_val", "refcoco_val", "coco_vgd_val_box_cross", "pope"],
)
def test_an_answer_is_the_same_on_any_device(speaking_model, world, name):
    """From questions to masks at the image's size."""
    dataset, results = open_dataset(name, world / "data", all_classes=True), []
    samples = [dataset.inputs(index) for index in range(2)]
    is_thing = getattr(dataset, "is_thing", None)
    for device in (torch.device("cpu"), FAR):
        with far_device() if device == FAR else contextlib.nullcontext():
            model = copy.deepcopy(speaking_model).to(device)
            questions = build_inputs(Processor(model.config, model.tokenizer), samples)
            results.append(predict_inputs(model, questions, post_processing_of(dataset), is_thing))
    for near, far in zip(*results, strict=True):
        assert (near.answer, near.labels) == (far.answer, far.labels)
        assert far.scores == pytest.approx(near.scores, abs=1e-4)
        assert np.mean(near.masks != far.masks) < 1e-3 if len(near.masks) else not len(far.masks)


def test_masks_are_read_out_the_same_on_any_device():
    """All readings, of outputs that give masks to each of them."""
    generator = torch.Generator().manual_seed(0)
    transform = ResizeAndPad.fit((60, 90), 128)
    probabilities = (4 * torch.randn(12, 5, generator=generator)).softmax(-1)
    logits = 4 * torch.randn(12, 4, 4, generator=generator)
    logits = torch.nn.functional.interpolate(logits[None], (32, 32), mode="bilinear")[0]
    region = np.zeros((60, 90), bool)
    region[10:40, 10:40] = True
    readings = {
        panoptic_inference: ([True, False, True, False], 0.1, 0.1),
        semantic_inference: (),
        instance_inference: (),
        phrase_inference: (),
        union_inference: (),
        interactive_inference: (region,),
    }
    for read, rest in readings.items():
        masks, classes, scores = read(probabilities, logits, transform, *rest)
        with far_device():
            far = read(probabilities.to(FAR), logits.to(FAR), transform, *rest)
        assert masks.any() and (classes, scores) == far[1:], read.__name__
        np.testing.assert_array_equal(masks, far[0])
