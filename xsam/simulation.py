"""A training step on shapes alone: what it keeps in memory, without a GPU, weights or data.

`Simulation` runs the model and the criterion, forward and backward, on tensors that have a shape
and no values, and counts the bytes that are alive after each operation. No formula is kept by hand,
so every variant of the configuration is measured by the same code; `plan.py` makes a plan of it. On
a CPU the real step, by torch's profiler, is met within a hundredth (tests/test_plan.py).
Legend: L decoder outputs, Q queries, T targets, M matched pairs.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from xsam import losses
from xsam.config import Config
from xsam.data import Batch, Processor
from xsam.decoder import SamMaskDecoder
from xsam.encoders import SwinEncoder
from xsam.llm import IGNORE_LABEL, IMAGE_TOKEN
from xsam.losses import Normalisers, Targets
from xsam.model import BLOCKS, XSAM, Objective, Segmentor, checkpoint_activations
from xsam.optimizer import freeze
from xsam.prompts import PER_PHRASE_TASKS
from xsam.weights import parameters_on_meta

MOST_TARGETS = 60  # masks of a crowded COCO image

# ---- a batch and its loss ------------------------------------------------------------------------


def example_batch(
    config: Config, stage: int, task: str, size: int, num_text: int, num_answer: int, num_runs: int
) -> Batch:
    """Noise in the shape of `size` samples, each of num_text text tokens, the last num_answer of
    them labelled, and num_runs decoder runs with as many targets as an image can have.

    A generic prompt names as many classes as there are, or fit; a referring one a phrase a run.
    """
    model, canvas = config.model, config.model.seg_image_size
    processor = Processor(config, None)
    is_per_phrase = task in PER_PHRASE_TASKS
    num_classes, ids, labels, images, attention_mask = model.num_classes, *[None] * 4
    if stage > 1:
        rows = model.llm_config["vocab_size"]
        word, (seg, phrase, phrase_end) = rows // 2, special_rows(config)
        wanted = num_runs if is_per_phrase else num_classes if task == "generic" else 1
        num_classes = min(wanted, (num_text - 1) // 4)
        text = [phrase, word, phrase_end, *[seg] * is_per_phrase] * num_classes
        text += [seg] * (not is_per_phrase)
        text = [word] * num_text if task == "chat" else (text + [word] * num_text)[:num_text]
        ids = torch.tensor([[IMAGE_TOKEN] * processor.num_visual_tokens + text] * size)
        labels = ids.clone()
        labels[:, : labels.shape[1] - num_answer] = IGNORE_LABEL
        num_runs = num_classes if is_per_phrase else num_runs
        if processor.image_size:
            images = torch.rand(size, 3, processor.image_size, processor.image_size)
        attention_mask = torch.ones_like(ids)
        attention_mask[1:, -1] = 0  # as where lengths differ: without any padding no mask is made
    targets = []
    for run in range(size * num_runs):
        numbers = torch.arange(min(MOST_TARGETS, model.num_queries)) % num_classes
        numbers = torch.tensor([run]) if is_per_phrase else numbers
        masks = torch.zeros(len(numbers), canvas, canvas, dtype=torch.bool)
        targets.append(Targets(masks, numbers, torch.zeros(canvas, canvas, dtype=torch.bool)))
    return Batch(
        task=task,
        seg_pixels=torch.rand(size, 3, canvas, canvas),
        image_pixels=images,
        input_ids=ids,
        attention_mask=attention_mask,
        labels=labels,
        region_points=torch.zeros(0, model.num_region_points, 2),
        region_index=torch.zeros(0, dtype=torch.long),
        image_index=torch.arange(size).repeat_interleave(num_runs),
        targets=targets,
        run_seeds=list(range(len(targets))),
        placements=[],
        samples=[],
        left_out=[],
    )


def special_rows(config: Config) -> tuple[int, int, int]:
    """The last rows of the vocabulary, which are <SEG>, <p> and </p> where no tokenizer is."""
    rows = config.model.llm_config["vocab_size"]
    return rows - 3, rows - 2, rows - 1


def build(config: Config, stage: int) -> Segmentor | XSAM:
    """A stage's model as it is trained, with random weights and no tokenizer."""
    model = Segmentor(config) if stage == 1 else XSAM(config)
    if stage > 1:
        llm = model.llm
        llm.seg_id, llm.phrase_id, llm.phrase_end_id = special_rows(config)
    freeze(model, config.stages[stage], model.prefix)
    return model.train()


def batch_loss(model: Segmentor | XSAM, batch: Batch, config: Config) -> Tensor:
    """The loss of a micro-batch as training has it."""
    return sum(Objective(model, config)(batch, Normalisers(1.0, 1.0, 1.0)).values())


# ---- running on shapes ---------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """Counts the bytes alive, of all that runs inside, on tensors without values.

    Integers and booleans that come from integers alone do have values, so that the places of
    tokens, and how many there are, come out as they will.
    """

    def __init__(self, shapes: FakeTensorMode):
        super().__init__()
        self.shapes = shapes
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}  # bytes of each live storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for a device: most calls, and nothing to count
            return func(*args, **kwargs)
        if func is torch.ops.aten.index.Tensor and isinstance(args[0], FakeTensor):
            args = (args[0], _as_places(args[1]))
        if any(isinstance(each, Tensor) for each in tree_leaves((args, kwargs))):
            output = func(*args, **kwargs)
        else:  # makes a tensor
            with self.shapes:
                output = func(*args, **kwargs)
            if isinstance(output, Tensor) and not output.is_floating_point():
                output = func(*args, **kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return output

    def count(self, tensor: Tensor, is_free: bool = False) -> None:
        """Notes a tensor's memory, once, until nothing holds it; 0 bytes where it `is_free`."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = 0 if is_free else storage.nbytes()
            self.live += self.sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def _as_places(index: list[Tensor | None]) -> list[Tensor | None]:
    """An index whose boolean masks are the places where they are true."""
    places: list[Tensor | None] = []
    for each in index:
        is_mask = each is not None and each.dtype == torch.bool
        places += each.nonzero(as_tuple=True) if is_mask else [each]
    return places


class StandIn(torch.autograd.Function):
    """What a recomputed block is to the memory until its turn in the backward pass comes: it keeps
    its inputs, and its output is like the first of them."""

    @staticmethod
    def forward(context, *inputs: Tensor) -> Tensor:
        context.save_for_backward(*inputs)
        return torch.empty_like(inputs[0])

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return torch.empty_like(gradient), *[None] * (len(context.saved_tensors) - 1)


def stand_in_for_repeated(model: nn.Module) -> set[nn.Module]:
    """Replaces all but the last two of a list's blocks of one kind and shape: where their backward
    passes run, all the others are still alive. Returns the blocks replaced."""
    two_outputs = (SwinEncoder, SamMaskDecoder)
    left = {m for each in model.modules() if isinstance(each, two_outputs) for m in each.modules()}
    replaced = set()
    for blocks in (each for each in model.modules() if isinstance(each, nn.ModuleList)):
        kinds: dict[tuple, list[nn.Module]] = {}
        for block in blocks:
            if isinstance(block, BLOCKS) and block not in left:
                shapes = tuple(parameter.shape for parameter in block.parameters())
                kinds.setdefault((type(block), shapes), []).append(block)
        replaced |= {block for same in kinds.values() for block in same[:-2]}
    for block in replaced:
        block.forward = lambda *inputs, **_: StandIn.apply(
            *(each for each in inputs if isinstance(each, Tensor))
        )
    return replaced


@contextlib.contextmanager
def without_values(is_cuda: bool) -> Iterator[None]:
    """Matching needs values: any pairs do instead. On a GPU (`is_cuda`), not on a CPU, autocast
    computes norms and softmax in float32."""

    def match(cost: Tensor) -> tuple[Tensor, Tensor]:
        pairs = torch.arange(min(cost.shape[1:])).expand(len(cost), -1)
        return pairs, pairs

    def widened(function: Callable) -> Callable:
        def run(*args, **kwargs):
            if torch.is_autocast_enabled("cpu"):
                widen = lambda x: x.float() if x.is_floating_point() else x  # noqa: E731
                args, kwargs = tree_map_only(Tensor, widen, (args, kwargs))
            return function(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(losses, "match", match))
        names = [(F, "layer_norm"), (F, "group_norm"), (F, "softmax"), (Tensor, "softmax")]
        for owner, name in names if is_cuda else ():
            patch = mock.patch.object(owner, name, widened(getattr(owner, name)))
            stack.enter_context(patch)
        yield


@dataclass
class Activations:
    """Bytes of one micro-batch beyond weights, gradients and states."""

    task: str
    size: int  # of the micro-batch
    num_positions: int  # of a sample, visual tokens included; 0 in stage 1
    peak: int
    kept: dict[str, int]  # by part, till the backward pass; the last is all else at the peak


class Simulation:
    """A stage's model without values. `is_cuda` False: as autocast on a CPU would have it."""

    def __init__(self, config: Config, stage: int, is_cuda: bool = True):
        self.config, self.stage, self.is_cuda = copy.deepcopy(config), stage, is_cuda
        self.shapes = FakeTensorMode(allow_non_fake_inputs=True)
        with parameters_on_meta():
            self.model = model = build(self.config, stage)
        replaced: set[nn.Module] = set()
        if config.recompute:
            checkpoint_activations(model)
            if config.dtype == "bfloat16":  # autocast keeps copies of others, those of each layer
                replaced = stand_in_for_repeated(model)
        made: dict[nn.Parameter, nn.Parameter] = {}  # two modules may share one
        with self.shapes:
            for module in model.modules():
                for name, old in module._parameters.items():
                    if old is not None and old not in made:
                        new = torch.empty(old.shape, dtype=getattr(torch, config.dtype))
                        made[old] = nn.Parameter(new, old.requires_grad)
                        if old.requires_grad:
                            made[old].grad = torch.empty_like(new)
                    module._parameters[name] = made.get(old)
        self.used = {each for layer in replaced for each in layer.parameters()}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.used.add)

    def step(
        self, task: str, size: int, num_text: int, num_answer: int, num_runs: int
    ) -> Activations:
        """Forward and backward pass of an `example_batch`."""
        meter, handles, kept = Meter(self.shapes), [], {"batch": 0}
        for parameter in self.model.parameters():
            for tensor in (parameter, parameter.grad):
                if tensor is not None:
                    meter.count(tensor, is_free=True)
        for name, part in parts(self.model).items():
            kept[name] = 0

            def before(*_, name=name) -> None:
                kept[name] -= meter.live

            def after(*_, name=name) -> None:
                kept[name] += meter.live

            handles += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
        with without_values(self.is_cuda), meter:
            sizes = task, size, num_text, num_answer, num_runs
            batch = example_batch(self.config, self.stage, *sizes)
            kept["batch"] = meter.live
            loss = batch_loss(self.model, batch, self.config)
            kept["criterion and the rest"] = meter.live - sum(kept.values())
            torch.autograd.backward(loss)
        for handle in handles:
            handle.remove()
        kept["passing, at the peak"] = meter.peak - sum(kept.values())
        num_positions = 0 if batch.input_ids is None else batch.input_ids.shape[1]
        return Activations(task, size, num_positions, meter.peak, kept)


def parts(model: Segmentor | XSAM) -> dict[str, nn.Module]:
    """The boxes of the diagram, in the order in which they run."""
    segmentor = model.segmentor if isinstance(model, XSAM) else model
    boxes = {"segmentation encoder": segmentor.encoder}
    if isinstance(model, XSAM):
        boxes |= {"segmentation projector": model.seg_projector}
        boxes |= {"image encoder": model.image_encoder, "image projector": model.image_projector}
        boxes |= {"language model": model.llm}
        boxes |= {"vocabulary head": model.llm.model.get_output_embeddings()}
        boxes |= {"llm projector": model.llm_projector}
    boxes |= {"connector": segmentor.connector, "pixel decoder": segmentor.pixel_decoder}
    boxes |= {"mask decoder": segmentor.decoder, "class head": segmentor.class_head}
    return {name: box for name, box in boxes.items() if box is not None}
