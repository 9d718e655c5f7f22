"""What a run needs before it is started: memory of a GPU, disk, steps, time; and the floating point
operations of a batch, for the utilisation in the training log.

    python xsam/train.py --plan --stage 3 --gpus 8 --gpu-memory 80

Needs no weights, data or GPU. The memory of activations is measured: the real model and criterion
run forward and backward on tensors without values, and the bytes alive are counted. The rest is
arithmetic; what is assumed stands below and is printed as such. A GB is 10^9 bytes.
"""

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from xsam import decoder, losses
from xsam.config import Config
from xsam.data import Batch, Processor, repeat_factors, share_batches
from xsam.datasets.referring import MAX_TURNS
from xsam.datasets.registry import open_dataset
from xsam.datasets.sources import find_source, locate, recognise
from xsam.encoders import Block
from xsam.inference import is_quantizable
from xsam.llm import IGNORE_LABEL, IMAGE_TOKEN, find_runs
from xsam.lora import add_adapters, has_adapters
from xsam.losses import Normalisers, Objective, Targets
from xsam.model import XSAM, Segmentor, checkpoint_activations
from xsam.optimizer import BLOCK, freeze
from xsam.tasks import TASKS

CONTEXT_BYTES = 2e9  # assumed: CUDA context, workspaces of its libraries, buffers of NCCL
FRAGMENTATION = 0.25  # of the activations: what the allocator holds and nothing uses, on an H100
# Of a number held in 8 bits, and in 4 with the scales of its blocks (bitsandbytes, NF4).
QUANTIZED_BYTES = {8: 1.0, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}
ASSUMED_UTILISATION, ASSUMED_TFLOPS = 0.4, 312.0  # of an A100
# Dense TFLOP/s in bfloat16 (V100: float16) by a part of the GPU's name; the first that fits.
PEAK_TFLOPS = {"B200": 2250, "H100 PCIe": 756, "H100": 989, "H800": 989, "H200": 989, "A100": 312}
PEAK_TFLOPS |= {"A800": 312, "L40S": 362, "A6000": 155, "4090": 165, "V100": 125}
# Training samples as our readers count them. The paper counts 301 K for RefCOCO/+/g, shared out by
# their expressions here (120,624, 120,191, 80,512); 40,688 of LLaVA-1.5's 665,298 have no image.
PUBLISHED_SIZES = {"coco_panoptic": 118287, "coco_vgd": 117266, "reasonseg": 239}
PUBLISHED_SIZES |= {"llava_pretrain": 558128, "llava_instruct": 624610, "gcg_flickr": 148000}
PUBLISHED_SIZES |= {"llava_instruct_text": 40688}
PUBLISHED_SIZES |= {"refcoco": 113000, "refcoco+": 112600, "refcocog": 75400}
PUBLISHED_SIZES |= {"gcg_grandf": 1000, "gcg_refcocog": 19000, "gcg_psg": 28000}
MOST_TARGETS = 60  # masks of a crowded COCO image
WORD, SEG, PHRASE, PHRASE_END = range(4)  # token ids where no tokenizer is


# ---- a batch and its loss ------------------------------------------------------------------------


def example_batch(
    config: Config, stage: int, size: int, task: str, num_text: int, num_answer: int, num_runs: int
) -> Batch:
    """Noise in the shape of `size` samples, each of num_text text tokens, the last num_answer of
    them labelled, and num_runs decoder runs with as many targets as an image can have.

    A generic prompt names as many classes as there are, or fit; a referring one a phrase a run.
    """
    model, canvas = config.model, config.model.seg_image_size
    processor = Processor(config, None)
    is_per_phrase, has_masks = TASKS[task].is_per_phrase, TASKS[task].has_masks
    num_classes, image_pixels, runs, text = model.num_classes, None, None, [None] * 3
    if stage > 1:
        has_list = TASKS[task].needs == "categories"
        wanted = num_runs if is_per_phrase else num_classes if has_list else 1
        num_classes = min(wanted, (num_text - 1) // 4)
        words = [PHRASE, WORD, PHRASE_END, *[SEG] * is_per_phrase] * num_classes
        words = words if is_per_phrase else [*words, SEG] * has_masks
        words = (words + [WORD] * num_text)[:num_text]
        ids = torch.tensor([[IMAGE_TOKEN] * processor.num_visual_tokens + words] * size)
        text = ids, torch.ones_like(ids), ids.clone()
        text[1][1:, -1] = 0  # as where lengths differ: without any padding no mask is made
        text[2][:, : ids.shape[1] - num_answer] = IGNORE_LABEL
        num_runs = num_classes if is_per_phrase else num_runs
        if processor.image_size:
            image_pixels = torch.rand(size, 3, processor.image_size, processor.image_size)
        if has_masks and not ids.is_meta:
            runs = find_runs(ids, (SEG, PHRASE, PHRASE_END), is_per_phrase, is_per_phrase)
    targets = []
    for run in range(size * num_runs):
        classes = torch.arange(min(MOST_TARGETS, model.num_queries)) % num_classes
        classes = torch.tensor([run]) if is_per_phrase else classes
        masks = torch.zeros(len(classes), canvas, canvas, dtype=torch.bool)
        targets.append(Targets(masks, classes, torch.zeros(canvas, canvas, dtype=torch.bool)))
    fields = {"transforms": [], "samples": [], "skipped": []}
    fields |= zip(("input_ids", "attention_mask", "labels"), text, strict=True)
    return Batch(
        task=task,
        seg_pixels=torch.rand(size, 3, canvas, canvas),
        image_pixels=image_pixels,
        region_points=torch.zeros(0, model.num_region_points, 2),
        region_index=torch.zeros(0, dtype=torch.long),
        runs=runs,
        targets=targets,
        run_seeds=list(range(len(targets))),
        **fields,
    )


def usual_sample(config: Config, task: str) -> tuple[str, int, int, int]:
    """As `example_batch` takes it: the task, text tokens, those of them in answers, runs."""
    num_text, num_answer, num_runs = TASKS[task].usual
    limit = config.model.max_text_length
    return task, min(num_text, limit), min(num_answer, limit), num_runs


def planned_samples(config: Config, stage: int) -> dict[str, tuple[str, int, int, int]]:
    """The samples that a stage is planned for: a usual one of each kind of task, then the longest.
    As in `usual_sample`."""
    if stage == 1:
        return {"panoptic": ("generic", 0, 0, 1)}
    limit, kinds = config.model.max_text_length, set()
    for task in (find_source(name).task for name in config.stages[stage].datasets):
        kind = TASKS.get(task, TASKS["generic"])  # of a file of one's own it is in the file
        kinds.add("refer" if kind.is_per_phrase else "generic" if kind.has_masks else "chat")
    longest = {"generic": (limit // 8, 1), "chat": (limit, 0), "refer": (limit // 8, MAX_TURNS)}
    samples = {f"{kind}, usual text": usual_sample(config, kind) for kind in longest}
    samples |= {f"{kind}, longest text": (kind, limit, *longest[kind]) for kind in longest}
    return {name: sample for name, sample in samples.items() if sample[0] in kinds}


def quantizable(model: XSAM, bits: int) -> list[nn.Parameter]:
    """The matrices that `inference.quantize` holds in fewer bits."""
    layers = model.llm.model.get_decoder().modules()
    return [each.weight for each in layers if is_quantizable(each, bits)]


def build(config: Config, stage: int) -> Segmentor | XSAM:
    """A stage's model as it is trained, with random weights and no tokenizer."""
    model = Segmentor(config) if stage == 1 else XSAM(config)
    if stage > 1:
        model.llm.special_ids = SEG, PHRASE, PHRASE_END
    freeze(model, config.stages[stage], model.prefix)
    add_adapters(model, config.stages[stage], model.prefix)
    return model.train()


def batch_loss(model: Segmentor | XSAM, batch: Batch, config: Config) -> Tensor:
    """The loss of a micro-batch as training has it."""
    return sum(Objective(model, config)(batch, Normalisers(1.0, 1.0, 1.0)).values())


# ---- activations: a step on tensors without values -----------------------------------------------


class Meter(TorchDispatchMode):
    """Counts the bytes alive of all that runs inside, where floating point tensors have no values.

    Integers and booleans that come from integers alone do have values, so that the positions of
    tokens, and how many there are, come out as in a real step.
    """

    def __init__(self, shapes: FakeTensorMode):
        super().__init__()
        self.shapes, self.known, self.live, self.peak = shapes, set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.index.Tensor and isinstance(args[0], FakeTensor):
            args = args[0], _as_positions(args[1])
        is_factory = not any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs)))
        with self.shapes if is_factory else contextlib.nullcontext():
            output = func(*args, **kwargs)
        if is_factory and isinstance(output, Tensor) and not output.is_floating_point():
            output = func(*args, **kwargs)
        tree_map_only(Tensor, self.count, output)
        return output

    def count(self, tensor: Tensor) -> None:
        """Adds a tensor's memory, once, until nothing holds it any more."""
        storage = tensor.untyped_storage()
        if id(storage) not in self.known:
            self.known.add(id(storage))
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, id(storage), storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        """Takes so many bytes, known by their key, off those that are held."""
        self.known.remove(key)
        self.live -= size


def _as_positions(index: list[Tensor | None]) -> list[Tensor | None]:
    """An index whose boolean masks are the positions where they are true."""
    is_mask = lambda x: x is not None and x.dtype == torch.bool  # noqa: E731
    return [p for x in index for p in (x.nonzero(as_tuple=True) if is_mask(x) else [x])]


def _widened(function: Callable) -> Callable:
    def run(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            args = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, args)
        return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def autocast_of_gpus() -> Iterator[None]:
    """Norms and softmax are computed in float32, as under autocast on a GPU, and not on a CPU; nor
    does the pixel decoder use what is for CPUs alone."""
    norms = {name: _widened(getattr(F, name)) for name in ("layer_norm", "group_norm")}
    softmax = mock.patch.object(Tensor, "softmax", _widened(Tensor.softmax))
    row_dots = mock.patch.object(decoder, "row_dots_on_cpu", decoder.row_dots)
    with mock.patch.multiple(F, **norms), softmax, row_dots:
        yield


def any_pairs(cost: Tensor) -> tuple[Tensor, Tensor]:
    """In place of `losses.match`, which needs values."""
    pairs = torch.arange(min(cost.shape[1:])).expand(len(cost), -1)
    return pairs, pairs


def stand_in_for_repeated(model: nn.Module) -> list[nn.Parameter]:
    """Replaces all but the last two blocks of the encoders and the language model by something
    recomputed that is faster: until their backward passes they all keep their input alone, and in
    those of the last two the others are still alive. Returns what the blocks had to train."""
    trained = []
    for layers in (each for each in model.modules() if isinstance(each, nn.ModuleList)):
        is_swin = "Swin" in type(layers[0]).__name__  # its blocks differ, and return two tensors
        if isinstance(layers[0], (Block, GradientCheckpointingLayer)) and not is_swin:
            for block in layers[:-2]:
                own = [each for each in block.parameters() if each.requires_grad]
                stand_in = functools.partial(_stand_in, own[:1])
                block.forward = functools.partial(checkpoint, stand_in, use_reentrant=False)
                trained += own
    return trained


def _stand_in(own: list[nn.Parameter], x: Tensor, *_, **__) -> Tensor:
    """A block that trains something has a gradient for its output, whatever its input has."""
    return sum((parameter.sum() for parameter in own), x.relu())


class Simulation:
    """A stage's model without values, as a GPU would train it."""

    def __init__(self, config: Config, stage: int):
        self.config, self.stage = config, stage
        self.shapes = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            self.model = model = build(config, stage).to(getattr(torch, config.dtype))
        with self.shapes:
            model.to_empty(device="cpu")
            if stage > 1:
                model.llm.model.tie_weights()
        self.used: set[nn.Parameter] = set()  # trained ones that a loss so far depends on
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                parameter.register_post_accumulate_grad_hook(self.used.add)
        if config.recompute:
            checkpoint_activations(model)
            if config.dtype == "bfloat16":  # autocast keeps copies of others, those of each layer
                self.used.update(stand_in_for_repeated(model))

    def step(self, *sizes) -> int:
        """Most bytes alive at once, beyond weights and gradients, in the forward and backward pass
        of the `example_batch` of these sizes."""
        meter = Meter(self.shapes)
        for parameter in self.model.parameters():
            tree_map_only(Tensor, meter.count, (parameter, parameter.grad))
        held = meter.live
        with mock.patch.object(losses, "match", any_pairs), autocast_of_gpus(), meter:
            batch = example_batch(self.config, self.stage, *sizes)
            batch_loss(self.model, batch, self.config).backward()
        return meter.peak - held


# ---- floating point operations -------------------------------------------------------------------


class FlopCount:
    """Model FLOPs of a stage's batches: forward and backward without recomputation, a multiply-add
    as two.

    Counted by torch on the meta device, and linear in what a batch holds: images, positions and
    pairs of them, decoder runs. Padded and hidden positions count too. Left out, together about a
    hundredth: the vocabulary head, the criterion, projected phrases and regions.
    """

    def __init__(self, config: Config, stage: int):
        self.of_position = self.of_pair = 0.0
        with torch.device("meta"):
            model = build(config, stage)
            batch = example_batch(config, stage, 1, "generic", 256, 1, 1)
            segmentor, conditions = getattr(model, "segmentor", model), []
            if stage == 1:
                hidden_states, self.of_image = step_flops(model.encoder, batch.seg_pixels)
            else:
                (embeddings, hidden_states), self.of_image = step_flops(model.encode, batch)
                pairs = torch.ones(1, 1, 256, 256, dtype=torch.bool)  # of positions: needs values
                _, short = step_flops(model.llm, embeddings[:, :128], pairs[..., :128, :128])
                _, long = step_flops(model.llm, embeddings[:, :256], pairs)
                self.of_pair = (long - 2 * short) / (256**2 - 2 * 128**2)
                self.of_position = short / 128 - self.of_pair * 128
                condition = torch.empty(1, 1, config.model.decoder_dim)
                conditions = [condition[0], condition, torch.zeros(1, 1, dtype=torch.bool)]

            def decode(num_runs: int) -> dict:
                each = [x.expand(num_runs, *x.shape[1:]) for x in conditions] or [None]
                index = torch.zeros(num_runs, dtype=torch.long)
                return vars(segmentor.decode(hidden_states, index, *each))

            one, two = step_flops(decode, 1)[1], step_flops(decode, 2)[1]
        self.of_run, self.of_decoded_image = two - one, 2 * one - two
        is_trained = any(each.requires_grad for each in segmentor.encoder.parameters())
        self.of_image -= (3 if is_trained else 1) * bias_flops(segmentor.encoder)

    def of(self, batch: Batch) -> float:
        """The operations of a training step on a batch."""
        size, num_runs = len(batch.seg_pixels), len(batch.targets)
        num_positions = 0 if batch.input_ids is None else batch.input_ids.shape[1]
        of_sample = self.of_image + (num_runs > 0) * self.of_decoded_image
        of_sample += num_positions * (self.of_position + self.of_pair * num_positions)
        return float(size * of_sample + num_runs * self.of_run)


def step_flops(call: Callable, *inputs) -> tuple:
    """What a call returns, cut from its graph, and the FLOPs of its forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        outputs = call(*inputs)
        trained = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
        if trained:
            torch.autograd.backward(trained, [torch.empty_like(each) for each in trained])
    cut = lambda x: x.detach().requires_grad_(x.requires_grad)  # noqa: E731
    return tree_map_only(Tensor, cut, outputs), counter.get_total_flops()


def bias_flops(encoder: nn.Module) -> int:
    """What SAM's encoder spends on an image beyond the model: `encoders.Attention` makes queries,
    keys and values longer, where a bias would do."""
    total = 0
    for block in [each for each in encoder.modules() if isinstance(each, Block)]:
        grid = encoder.pos_embed.shape[1]
        side = block.window_size or grid
        total += math.ceil(grid / side) ** 2 * block.attn.num_heads * side**4 * 8 * side
    return total


def peak_tflops(config: Config, device: torch.device) -> float | None:
    """Dense bfloat16 TFLOP/s of a GPU: the configuration's, else by its name; None: not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return config.peak_tflops or next((x for part, x in PEAK_TFLOPS.items() if part in name), None)


# ---- the plan ------------------------------------------------------------------------------------


def count_steps(config: Config, stage: int, data: Path | None) -> tuple[int, dict[str, float]]:
    """Steps of a stage, and the share of its batches that each task has, as training samples them.

    Datasets under `data` are counted; others have their published sizes. Raises ValueError where
    neither is known and no max_steps is set.
    """
    settings, sizes = config.stages[stage], []
    for name in settings.datasets:  # with max_steps an unknown share is a guess, of a known sum
        size = PUBLISHED_SIZES.get(name, settings.max_steps and settings.global_batch_size)
        if data is not None and locate(data, find_source(name).annotations).exists():
            size = len(open_dataset(name, data, stage == 1))
        if not size:
            raise ValueError(f"{name} is not under --data, its size not known: say --max_steps")
        sizes.append(size)
    factors = repeat_factors(sizes, settings.repeat_threshold)
    batches = share_batches(sizes, factors, settings.global_batch_size)
    shares: dict[str, float] = {}
    for name, count in zip(settings.datasets, batches, strict=True):
        source = find_source(name)
        task = source.task or (recognise(source, data).task if data else "generic")
        shares[task] = shares.get(task, 0.0) + count / sum(batches)
    return settings.max_steps or math.ceil(sum(batches) * settings.epochs), shares


class Plan:
    """What a stage takes. Memory is in bytes, of the fullest GPU.

    `held`: by name what is there whatever the batch is, and how it is computed; `activations`: of
    a micro-batch of each of `planned_samples`, the largest of which is `largest`.
    """

    def __init__(self, config: Config, stage: int, gpus: int, data: Path | None = None):
        """Raises ValueError where GPUs and micro-batches do not divide the global batch, the steps
        cannot be counted or an architecture is not known."""
        self.config, self.stage, self.gpus = config, stage, gpus
        self.whole = whole = config.stages[stage].global_batch_size
        self.micro_batch_size = size = config.stages[stage].micro_batch_size
        if min(gpus, size) < 1 or whole % (gpus * size):
            raise ValueError(
                f"stage {stage}: global_batch_size {whole} is not a multiple of {gpus} GPUs x "
                f"micro_batch_size {size}: choose one that divides them"
            )
        self.accumulation, model = whole // (gpus * size), config.model
        is_image_known = model.image_encoder == "none" or model.image_encoder_config
        if stage > 1 and not (model.llm_config and is_image_known):
            raise ValueError("a plan wants --llm_config and --image_encoder_config of config.json")
        self.num_steps, shares = count_steps(config, stage, data)
        flops, self.flops = FlopCount(config, stage), 0.0  # of the mean sample
        for task, share in shares.items():
            with torch.device("meta"):
                batch = example_batch(config, stage, 1, *usual_sample(config, task))
            self.flops += share * flops.of(batch)

        self.simulation = simulation = Simulation(config, stage)
        self.samples = planned_samples(config, stage)
        self.activations = {name: simulation.step(size, *x) for name, x in self.samples.items()}
        self.largest = max(self.activations, key=self.activations.get)
        parameters, used = list(simulation.model.parameters()), simulation.used
        groups = parameters, [each for each in parameters if each.requires_grad], used
        num_all, num_trained, num_used = (sum(each.numel() for each in group) for group in groups)
        bits = config.llm_bits if stage > 1 else 0
        matrices = quantizable(simulation.model, bits) if bits else []
        num_quantized = sum(each.numel() for each in matrices)
        num_all -= num_quantized
        # ZeRO divides them, but no parameter.
        num_shared = max(math.ceil(num_used / gpus), *(each.numel() for each in used))
        width, states = (4, 8) if config.dtype == "float32" else (2, 12)  # moments, and a master
        if config.optimizer_bits == 8:
            states += 2 * (1 + 4 / BLOCK) - 8
        share = f"{num_used / 1e9:.4f} B used / {gpus}: {num_shared / 1e9:.4f} B"
        self.held = {
            "weights": (width * num_all, f"{num_all / 1e9:.4f} B x {width} bytes"),
            "gradients": (width * num_trained, f"{num_trained / 1e9:.4f} B x {width} bytes"),
            "optimizer": (states * num_shared, f"{share} x {states} bytes"),
            "context": (CONTEXT_BYTES, "assumed: CUDA, workspaces of its libraries, NCCL"),
        }
        if bits:
            size, largest = QUANTIZED_BYTES[bits], 2 * max(each.numel() for each in matrices)
            about = f"{num_quantized / 1e9:.4f} B x {size:.3f} bytes; the largest matrix whole"
            self.held["llm in bits"] = size * num_quantized + largest, about
        is_part = stage == 2 or has_adapters(simulation.model)
        self.checkpoint = width * (num_trained if is_part else num_all) + states * num_used

    def peak(self, activations: float | None = None) -> float:
        """With the largest of the batches, or given activations."""
        activations = activations or self.activations[self.largest]
        return sum(size for size, _ in self.held.values()) + (1 + FRAGMENTATION) * activations

    def largest_micro_batch(self, gpu_memory: float) -> int:
        """The largest micro-batch that divides a GPU's samples and fits into gpu_memory GB with
        the longest text; 0 where not even one sample does.

        Above the plan's own size activations are taken as proportional, which is never too little.
        """
        share, sample = self.whole // self.gpus, self.samples[self.largest]
        for size in [size for size in range(share, 0, -1) if share % size == 0]:
            activations = self.activations[self.largest] * size / self.micro_batch_size
            if size < self.micro_batch_size:
                activations = self.simulation.step(size, *sample)
            if self.peak(activations) <= gpu_memory * 1e9:
                return size
        return 0

    def text(self, gpu_memory: float, images_per_second: float | None = None) -> str:
        """The plan with its arithmetic, and the micro-batch that fits into GPUs of gpu_memory GB.
        Time is at a measured throughput of all GPUs, or at an assumed utilisation."""
        samples, source = self.num_steps * self.whole, "as given"
        if images_per_second is None:
            tflops = self.config.peak_tflops or ASSUMED_TFLOPS
            images_per_second = self.gpus * ASSUMED_UTILISATION * tflops * 1e12 / self.flops
            source = f"ASSUMED: {ASSUMED_UTILISATION:.0%} of {tflops:g} TFLOP/s on {self.gpus} GPUs"
        activations, kept = self.activations[self.largest], self.config.keep_checkpoints
        memory = self.held | {
            "activations": (activations, f"of the largest batch ({self.largest})"),
            "allocator": (FRAGMENTATION * activations, f"assumed: {FRAGMENTATION:.0%} of that"),
        }
        memory |= {f"peak, {name}": (self.peak(x), "") for name, x in self.activations.items()}
        memory["checkpoint"] = self.checkpoint, f"on disk, {kept + 1} of them at most"
        split = f"{self.gpus} GPUs x micro-batches of {self.micro_batch_size} x {self.accumulation}"
        title = f"stage {self.stage} of {self.config.name}: {self.whole} samples a step = {split}"
        rows = [f"{name:<28}{x / 1e9:>8.2f} GB  {about}" for name, (x, about) in memory.items()]
        verdict = "fits" if self.peak() <= gpu_memory * 1e9 else "DOES NOT FIT"
        rows += [
            f"operations  {self.flops / 1e12:.2f} TFLOP a sample (mean of tasks, usual lengths), "
            "recomputation not counted",
            f"steps       {self.num_steps:,} x {self.whole} = {samples:,} samples; published "
            "sizes of datasets that are not under --data",
            f"time        {samples:,} samples / {images_per_second:.3g} images/s = "
            f"{samples / images_per_second / 3600:.1f} h ({source})",
            f"verdict     {verdict} into {gpu_memory:g} GB; largest --micro_batch_size "
            f"that fits: {self.largest_micro_batch(gpu_memory)}",
        ]
        return "\n  ".join([title, *rows])


def report(
    config: Config,
    stages: list[int],
    gpus: int,
    gpu_memory: float,
    images_per_second: float | None = None,
    data: Path | None = None,
) -> str:
    """What `--plan` prints: the plan of each stage. Raises ValueError as `Plan` does."""
    plans = (Plan(config, stage, gpus, data) for stage in stages)
    return "\n\n".join(plan.text(gpu_memory, images_per_second) for plan in plans)
