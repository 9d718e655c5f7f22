"""What a run needs before it is started: memory of a GPU, disk, steps, time; and the floating point
operations of a batch, for the utilisation in the training log.

    python xsam/train.py --plan --stage 3 --gpus 8 --gpu-memory 80

Needs no weights, data or GPU. What is alive in a step is measured on shapes (`simulation.py`); what
is assumed stands below and is printed as such. A GB is 10^9 bytes.
"""

import contextlib
import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from xsam import losses
from xsam.config import Config
from xsam.data import Batch, Processor, repeat_factors, share_batches
from xsam.datasets.registry import open_dataset
from xsam.datasets.sources import find_source, locate
from xsam.encoders import Block
from xsam.llm import IGNORE_LABEL, IMAGE_TOKEN, find_runs
from xsam.losses import Normalisers, Objective, Targets
from xsam.model import BLOCKS, XSAM, Segmentor, checkpoint_activations
from xsam.optimizer import freeze
from xsam.prompts import PER_PHRASE_TASKS
from xsam.variants import SamMaskDecoder, SwinEncoder
from xsam.weights import parameters_on_meta

CONTEXT_BYTES = 2e9  # assumed: CUDA context, workspaces of its libraries, buffers of NCCL


FRAGMENTATION = 0.25  # of the activations: what the allocator holds and nothing uses, on an H100


MOST_PHRASES = 8  # of a referring sample (datasets_referring.MAX_TURNS)


ASSUMED_UTILISATION, ASSUMED_TFLOPS = 0.4, 312.0  # of an A100


# Dense TFLOP/s in bfloat16 (V100: float16) by a part of the GPU's name; the first that fits.
PEAK_TFLOPS = {"B200": 2250.0, "H100 PCIe": 756.0, "H100": 989.0, "H800": 989.0, "H200": 989.0}


PEAK_TFLOPS |= {"A100": 312.0, "A800": 312.0, "L40S": 362.0, "A6000": 155.0, "4090": 165.0}


PEAK_TFLOPS |= {"V100": 125.0}


# Training samples as our readers count them. The paper counts 301 K for RefCOCO/+/g, shared out by
# their expressions here (120,624, 120,191, 80,512); 40,688 of LLaVA-1.5's 665,298 have no image.
PUBLISHED_SIZES = {"coco_panoptic": 118287, "coco_vgd": 117266, "reasonseg": 239}


PUBLISHED_SIZES |= {"llava_pretrain": 558128, "llava_instruct": 624610}


PUBLISHED_SIZES |= {"refcoco": 113000, "refcoco+": 112600, "refcocog": 75400}


PUBLISHED_SIZES |= {"gcg_grandf": 1000, "gcg_refcocog": 19000, "gcg_psg": 28000}


PUBLISHED_SIZES |= {"gcg_flickr": 148000}


# Assumed of a usual sample of each task: text tokens, those of them in answers, decoder runs.
USUAL = {"generic": (600, 6, 1), "chat": (300, 150, 0), "refer": (150, 40, 3), "vgd": (60, 6, 1)}


USUAL |= {"reason": (80, 30, 1), "gcg": (80, 50, 1), "interactive": (30, 6, 1)}
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
    num_classes, ids, labels, images, attention_mask, runs = model.num_classes, *[None] * 5
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
    if stage > 1 and task != "chat" and not ids.is_meta:
        runs = find_runs(ids, special_rows(config), is_per_phrase, is_per_phrase)
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
        runs=runs,
        targets=targets,
        run_seeds=list(range(len(targets))),
        transforms=[],
        samples=[],
        skipped=[],
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


# ---- floating point operations -------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts the floating point operations of what runs inside, by torch's table."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        cost = flop_registry.get(func.overloadpacket)
        self.total += cost(*args, **(kwargs or {}), out_val=output) if cost else 0
        return output


class FlopCount:
    """Model FLOPs of a stage's batches: forward and backward without recomputation, a multiply-add
    as two.

    Forward ones are counted on the meta device. The backward pass is twice as much where a part is
    trained, as much where a gradient passes through to one that is, and nothing elsewhere.
    Attention counts all pairs of positions, padded and hidden ones too. Left out, together below a
    hundredth: criterion, class scores, projected phrases, regions, reading at points.
    """

    def __init__(self, config: Config, stage: int):
        with parameters_on_meta():
            model = build(config, stage)
        model.to("meta", torch.float32)
        boxes, operations = parts(model), Operations()
        self.costs: dict[str, float] = dict.fromkeys(boxes, 0)  # of an image, a run or a token
        for name, box in boxes.items():

            def before(*_, name=name) -> None:
                self.costs[name] -= operations.total

            def after(*_, name=name) -> None:
                self.costs[name] += operations.total

            box.register_forward_pre_hook(before)
            box.register_forward_hook(after)
        lengths, totals = (128, 256), []
        with torch.device("meta"), torch.no_grad(), operations:
            batch = example_batch(config, stage, "generic", 1, lengths[1], 1, 1)
            if stage == 1:
                model(batch)
            else:
                embeddings, hidden_states = model.encode(batch)
                for length in lengths:  # a mask of pairs: one of positions would want values
                    pairs = torch.ones(1, 1, length, length, dtype=torch.bool)
                    states = model.llm(embeddings[:, :length], pairs)
                    totals.append(self.costs["language model"] - sum(totals))
                boxes["vocabulary head"](states[:, :1])
                condition = torch.empty(1, 1, config.model.decoder_dim)
                scores = condition, torch.zeros(1, 1, dtype=torch.bool)
                model.segmentor.decode(hidden_states, torch.arange(1), condition[0], *scores)
        self.costs["segmentation encoder"] -= bias_flops(boxes["segmentation encoder"])
        is_below = False  # is anything trained that comes before
        for name, box in boxes.items():
            is_trained = any(each.requires_grad for each in box.parameters())
            factor = 3 if is_trained else 1 + is_below
            self.costs[name] *= factor
            if name == "language model":
                # All positions cost the same, but for the attention between each two of them, whose
                # backward pass is twice its forward one with frozen weights too.
                short, long = (
                    total / length for total, length in zip(totals, lengths, strict=True)
                )
                of_pair = (long - short) / (lengths[1] - lengths[0])
                self.of_position = factor * (short - of_pair * lengths[0])
                self.of_pair = (3 if is_trained or is_below else 1) * of_pair
            is_below |= is_trained

    def count(self, size: int, num_positions: int, num_answer: int, num_runs: int) -> float:
        """FLOPs of `size` samples padded to num_positions; answer tokens and runs of them all."""
        times = {"mask decoder": num_runs, "vocabulary head": num_answer, "language model": 0}
        times |= dict.fromkeys(("connector", "pixel decoder"), size * (num_runs > 0))
        times |= dict.fromkeys(("llm projector", "class head"), 0)
        total = sum(cost * times.get(name, size) for name, cost in self.costs.items())
        if num_positions:
            total += size * num_positions * (self.of_position + self.of_pair * num_positions)
        return float(total)

    def of(self, batch: Batch) -> float:
        size, num_runs = len(batch.seg_pixels), len(batch.targets)
        if batch.input_ids is None:
            return self.count(size, 0, 0, num_runs)
        num_answer = int((batch.labels[:, 1:] >= 0).sum())
        return self.count(size, batch.input_ids.shape[1], num_answer, num_runs)


def bias_flops(encoder: nn.Module) -> int:
    """What SAM's encoder spends on an image beyond the model: `encoders.Attention` makes queries,
    keys and values longer, where a bias would do."""
    total = 0
    for block in encoder.modules():
        if isinstance(block, Block):
            grid = math.isqrt(encoder.pos_embed[0, ..., 0].numel())
            side = block.window_size or grid
            windows = math.ceil(grid / side) ** 2
            total += windows * block.attn.num_heads * side**4 * 2 * (2 * side) * 2
    return total


def peak_tflops(config: Config, device: torch.device) -> float | None:
    """Dense bfloat16 TFLOP/s of a GPU: the configuration's, else by its name; None: not known."""
    if config.peak_tflops:
        return config.peak_tflops
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((value for part, value in PEAK_TFLOPS.items() if part in name), None)


# ---- steps ---------------------------------------------------------------------------------------


def count_steps(config: Config, number: int, data: Path | None) -> tuple[int, dict[str, float]]:
    """Steps of a stage, and the share of its batches that each task has, as training samples them.

    Datasets under `data` are counted; others have their published sizes. Raises ValueError where
    neither is known and no max_steps is set.
    """
    stage, sizes = config.stages[number], []
    for name in stage.datasets:
        path = find_source(name).annotations
        if data is not None and locate(data, path).exists():
            sizes.append(len(open_dataset(name, data, number == 1)))
        elif name in PUBLISHED_SIZES:
            sizes.append(PUBLISHED_SIZES[name])
        elif stage.max_steps:
            sizes.append(stage.global_batch_size)  # its share is a guess, of a sum that is known
        else:
            raise ValueError(
                f"stage {number}: the size of {name} is not known; have it under --data, or say "
                "--max_steps"
            )
    factors = repeat_factors(sizes, stage.repeat_threshold)
    batches = share_batches(sizes, factors, stage.global_batch_size)
    shares: dict[str, float] = {}
    for name, count in zip(stage.datasets, batches, strict=True):
        task = find_source(name).task
        shares[task] = shares.get(task, 0.0) + count / sum(batches)
    return stage.max_steps or math.ceil(sum(batches) * stage.epochs), shares


def check_split(config: Config, number: int, gpus: int, micro_batch_size: int) -> int:
    """How many micro-batches are accumulated. Raises ValueError where they make no global batch."""
    whole = config.stages[number].global_batch_size
    if min(gpus, micro_batch_size) < 1:
        raise ValueError(f"{gpus} GPUs with micro-batches of {micro_batch_size}: both start at 1")
    if whole % gpus:
        near = max(count for count in range(1, gpus) if whole % count == 0)
        raise ValueError(
            f"stage {number}: {gpus} GPUs do not divide global_batch_size {whole}; take {near}, or "
            f"--global_batch_size {math.ceil(whole / gpus) * gpus}"
        )
    if whole // gpus % micro_batch_size:
        fit = max(n for n in range(1, micro_batch_size) if whole // gpus % n == 0)
        raise ValueError(
            f"stage {number}: micro_batch_size {micro_batch_size} does not divide the "
            f"{whole // gpus} samples of a GPU ({whole} / {gpus}); take --micro_batch_size {fit}"
        )
    return whole // gpus // micro_batch_size


# ---- memory --------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What a stage takes; memory is in bytes, of the fullest GPU."""

    config: Config
    stage: int
    gpus: int
    micro_batch_size: int
    accumulation: int
    parameters: dict[str, tuple[int, int]]  # of each part, and of "all": all, trained
    num_used: int  # trained ones that a loss depends on: others never have states
    num_shared: int  # of these the fullest GPU's, with ZeRO
    weight_bytes: int  # of one parameter
    state_bytes: int  # of one parameter: moments, and a master where the weight is bfloat16
    update: int  # a gradient in float32, and it scaled: alive when no activations are
    longest: list[Activations]  # with the longest text, for each kind of task; the largest first
    usual: Activations  # of the same task as longest[0]
    num_steps: int
    checkpoint: int
    flops: float  # of the mean sample

    @property
    def weights(self) -> int:
        return self.weight_bytes * self.parameters["all"][0]

    @property
    def gradients(self) -> int:
        return self.weight_bytes * self.parameters["all"][1]

    @property
    def states(self) -> int:
        return self.state_bytes * self.num_shared

    @property
    def fixed(self) -> float:
        """All but the activations."""
        return self.weights + self.gradients + self.states + CONTEXT_BYTES

    def peak(self, activations: Activations | None = None) -> float:
        """With the longest batch, unless another is given."""
        activations = activations or self.longest[0]
        return self.fixed + max(activations.peak * (1 + FRAGMENTATION), self.update)


def fullest_share(parameters: Iterable[nn.Parameter], gpus: int) -> list[nn.Parameter]:
    """What the GPU with the most to update has, where each parameter, the largest first, goes to
    the one with the least; so does torch's ZeroRedundancyOptimizer."""
    shares: list[list[nn.Parameter]] = [[] for _ in range(gpus)]
    sizes = [0] * gpus
    for parameter in sorted(parameters, key=lambda each: -each.numel()):
        emptiest = sizes.index(min(sizes))
        shares[emptiest].append(parameter)
        sizes[emptiest] += parameter.numel()
    return shares[sizes.index(max(sizes))]


def largest_samples(config: Config, number: int) -> dict[str, tuple[int, int, int]]:
    """Of each kind of task of a stage the largest sample, as in USUAL."""
    if number == 1:
        return {"generic": (0, 0, 1)}
    text = config.model.max_text_length
    tasks = {find_source(name).task for name in config.stages[number].datasets}
    samples = {}
    if tasks - {"chat", *PER_PHRASE_TASKS}:
        samples["generic"] = text, text // 8, 1
    if "chat" in tasks:
        samples["chat"] = text, text, 0
    if tasks & set(PER_PHRASE_TASKS):
        samples["refer"] = text, text // 8, MOST_PHRASES
    return samples


def make_plan(
    config: Config,
    number: int,
    gpus: int,
    micro_batch_size: int | None = None,
    data: Path | None = None,
) -> Plan:
    """The plan of stage `number`; micro_batch_size None: the stage's. Raises ValueError where the
    numbers do not divide each other or the steps cannot be counted."""
    for part in ("image_encoder", "llm") if number > 1 else ():
        name = getattr(config.model, part)
        if name != "none" and not getattr(config.model, f"{part}_config"):
            raise ValueError(
                f"the architecture of {name} is read from its folder: to plan it, give the "
                f"values of its config.json as --{part}_config"
            )
    size = micro_batch_size or config.stages[number].micro_batch_size
    accumulation = check_split(config, number, gpus, size)
    num_steps, shares = count_steps(config, number, data)
    text_limit = config.model.max_text_length if number > 1 else 0
    usual = {
        task: (min(text, text_limit), min(answer, text_limit), runs)
        for task, (text, answer, runs) in USUAL.items()
    }
    simulation = Simulation(config, number)
    samples = largest_samples(config, number)
    longest = [simulation.step(task, size, *samples[task]) for task in samples]
    longest.sort(key=lambda each: -each.peak)
    task = longest[0].task

    counts, seen = {}, set()  # a parameter that two parts share is the first one's
    for name, part in {**parts(simulation.model), "others": simulation.model}.items():
        own = [each for each in part.parameters() if each not in seen]
        seen.update(own)
        trained = sum(each.numel() for each in own if each.requires_grad)
        counts[name] = sum(each.numel() for each in own), trained
    counts = {name: count for name, count in counts.items() if count[0]}
    num_all, num_trained = map(sum, zip(*counts.values(), strict=True))
    counts["all"] = num_all, num_trained
    used = [each for each in seen & simulation.used if each.requires_grad]
    num_used, num_shared = (
        sum(each.numel() for each in some) for some in (used, fullest_share(used, gpus))
    )
    width = torch.finfo(getattr(torch, config.dtype)).bits // 8
    state_bytes = 8 if width == 4 else 12

    flops = FlopCount(config, number)
    num_visual = Processor(config, None).num_visual_tokens if number > 1 else 0
    per_sample = 0.0
    for kind, share in shares.items():
        text, answer, runs = usual[kind]
        per_sample += share * flops.count(1, num_visual + text, answer, runs)
    return Plan(
        config=config,
        stage=number,
        gpus=gpus,
        micro_batch_size=size,
        accumulation=accumulation,
        parameters=counts,
        num_used=num_used,
        num_shared=num_shared,
        weight_bytes=width,
        state_bytes=state_bytes,
        update=(4 if width == 4 else 8) * max(each.numel() for each in used),
        longest=longest,
        usual=simulation.step(task, size, *usual[task]),
        num_steps=num_steps,
        checkpoint=width * (num_trained if number == 2 else num_all) + state_bytes * num_used,
        flops=per_sample,
    )


def largest_micro_batch(
    config: Config, number: int, gpus: int, gpu_memory_gb: float, plan: Plan | None = None
) -> int:
    """The largest micro-batch that divides a GPU's samples and fits with the longest text. Raises
    ValueError, with what would fit, where not even one sample does.

    Starts at `plan`, by default that of the largest such micro-batch up to the stage's own. Above
    it activations are taken as proportional to the samples, which is never too little.
    """
    check_split(config, number, gpus, 1)
    stage, limit = config.stages[number], gpu_memory_gb * 1e9
    share = stage.global_batch_size // gpus
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    if plan is None:
        size = max(size for size in sizes if size <= stage.micro_batch_size)
        plan = make_plan(config, number, gpus, size)
    while plan.peak() > limit:
        smaller = [size for size in sizes if size < plan.micro_batch_size]
        if not smaller:
            raise ValueError(what_would_fit(plan, limit))
        plan = make_plan(config, number, gpus, smaller[-1])
    of_one = plan.longest[0].peak * (1 + FRAGMENTATION) / plan.micro_batch_size
    return max(s for s in sizes if s <= plan.micro_batch_size or plan.fixed + s * of_one <= limit)


def what_would_fit(plan: Plan, limit: float) -> str:
    """Why one sample does not fit on a GPU of `limit` bytes, and what would."""
    whole, others = plan.config.stages[plan.stage].global_batch_size, plan.peak() - plan.states
    mends = [
        f"{gpus} GPUs, which share the optimizer's states"
        for gpus in range(plan.gpus + 1, whole + 1)
        if whole % gpus == 0 and others + plan.states * plan.gpus / gpus <= limit
    ][:1]
    if plan.fixed < limit:  # activations can help
        mends += [] if plan.config.recompute else ["--recompute true"]
        mends += ["a smaller --max_text_length"] if plan.stage > 1 else []
    mends += [f"GPUs of {math.ceil(plan.peak() / 1e9)} GB"]
    return (
        f"one sample takes {plan.peak() / 1e9:.1f} GB on {plan.gpus} GPUs, "
        f"{plan.fixed / 1e9:.1f} GB of it whatever the batch; {limit / 1e9:g} are there. What "
        f"would fit: {'; or '.join(mends)}"
    )


# ---- for people ----------------------------------------------------------------------------------


def format_plan(plan: Plan, images_per_second: float | None = None) -> str:
    """The plan as text, with its arithmetic. Time is at a measured throughput of all GPUs, or at an
    assumed utilisation."""
    whole = plan.config.stages[plan.stage].global_batch_size
    num_all, num_trained = plan.parameters["all"]
    lines = [
        f"stage {plan.stage} of {plan.config.name}: {whole} samples a step = {plan.gpus} GPUs x "
        f"micro-batches of {plan.micro_batch_size} x {plan.accumulation} accumulated",
        f"\n  {'parameters, million':<26}{'all':>10}{'trained':>10}",
    ]
    for name, (count, trained) in plan.parameters.items():
        if count < 5e3 and plan.parameters["all"][0] > 1e6:
            continue  # a scale, an embedding
        lines.append(f"  {name:<26}{count / 1e6:>10.2f}{trained / 1e6:>10.2f}")

    def row(name: str, reckoning: str, size: float) -> None:
        lines.append(f"  {name:<12}{reckoning:<72}{size / 1e9:>8.2f}")

    def sample(each: Activations) -> str:
        of_text = f" of {each.num_positions} positions" if each.num_positions else ""
        return f"{each.task}, {each.size} samples{of_text}"

    kinds = "two moments" if plan.state_bytes == 8 else "master weight, two moments"
    lines.append(f"\n  {'memory of a GPU':<84}{'GB':>8}")
    row("weights", f"{num_all / 1e9:.4f} B x {plan.weight_bytes} bytes", plan.weights)
    row("gradients", f"{num_trained / 1e9:.4f} B x {plan.weight_bytes} bytes", plan.gradients)
    shared = f"{plan.num_used / 1e9:.4f} B used / {plan.gpus}: at most {plan.num_shared / 1e9:.4f}"
    row("optimizer", f"{shared} B x {plan.state_bytes} bytes ({kinds})", plan.states)
    row("context", "assumed: CUDA, workspaces of its libraries, NCCL", CONTEXT_BYTES)
    longest = plan.longest[0]
    row("activations", f"of the longest batch ({sample(longest)}):", longest.peak)
    for name, size in longest.kept.items():
        if abs(size) > 0.002 * longest.peak:
            lines.append(f"{'':<18}{name:<26}{size / 1e9:>8.2f}")
    row("allocator", f"assumed: {FRAGMENTATION:.0%} of that", FRAGMENTATION * longest.peak)
    row("peak", "the sum", plan.peak())
    for each in plan.longest[1:]:
        row("", f"with {sample(each)}", plan.peak(each))
    row("", f"with a usual batch ({sample(plan.usual)})", plan.peak(plan.usual))
    row("update", "float32 copies of the largest gradient; no activations then", plan.update)

    samples, source = plan.num_steps * whole, "as given"
    if images_per_second is None:
        tflops = plan.config.peak_tflops or ASSUMED_TFLOPS
        images_per_second = plan.gpus * ASSUMED_UTILISATION * tflops * 1e12 / plan.flops
        source = f"ASSUMED: {ASSUMED_UTILISATION:.0%} of {tflops:g} TFLOP/s on {plan.gpus} GPUs"
    kept = plan.config.keep_checkpoints
    lines += [
        f"\n  checkpoint  {plan.checkpoint / 1e9:.2f} GB on disk; {kept} kept and one in the "
        f"making: {(kept + 1) * plan.checkpoint / 1e9:.1f} GB",
        f"  operations  {plan.flops / 1e12:.2f} TFLOP a sample (mean of the tasks, usual lengths), "
        f"{plan.flops * whole / 1e15:.3f} PFLOP a step; recomputation not counted",
        f"  steps       {plan.num_steps:,} x {whole} = {samples:,} samples",
        f"  time        {samples:,} samples / {images_per_second:.3g} images/s = "
        f"{samples / images_per_second / 3600:.1f} h ({source})",
    ]
    return "\n".join(lines)


def report(
    config: Config,
    stages: list[int],
    gpus: int,
    gpu_memory: float,
    images_per_second: float | None = None,
    data: Path | None = None,
) -> str:
    """What `--plan` prints: the plan of each stage, and the micro-batch that fits into GPUs of
    `gpu_memory` GB. Raises ValueError where the numbers do not divide each other."""
    texts = []
    for number in stages:
        plan = make_plan(config, number, gpus, data=data)
        try:
            best = largest_micro_batch(config, number, gpus, gpu_memory, plan)
            advice = f"the largest that fits: --micro_batch_size {best}"
        except ValueError as error:
            advice = str(error)
        verdict = "fits" if plan.peak() <= gpu_memory * 1e9 else "DOES NOT FIT"
        texts += [
            format_plan(plan, images_per_second),
            f"  verdict     micro-batches of {plan.micro_batch_size}: {plan.peak() / 1e9:.1f} GB "
            f"{verdict} into {gpu_memory:g} GB; {advice}",
            "",
        ]
    return "\n".join(texts) + (
        f"GB are 10^9 bytes, of GPUs too: one sold as 80 GB has 85, which are to spare. Longest "
        f"batch: {config.model.max_text_length} text tokens in every sample; {MOST_TARGETS} masks "
        f"an image, {MOST_PHRASES} phrases a referring sample.\nSizes of datasets that are not "
        "under the data root are the published ones."
    )
