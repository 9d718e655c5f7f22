"""The full preset on one GPU that does the work of one of eight: training steps and inference.

    python benchmarks/full_model.py plan --out runs/full       # simulated on the CPU
    python benchmarks/full_model.py training --out runs/full   # compared with that plan
    python benchmarks/full_model.py inference --out runs/full
    python benchmarks/full_model.py adapters --out runs/full

Random weights of the preset's shapes and noise for images: no file is read. A training step is
forward, criterion, backward and AdamW for the fullest share of the parameters: what one of `--gpus`
spends on a micro-batch, but for what they send each other. The micro-batch is the largest that the
plan lets fit. Each kind of task has usual texts and the longest. `measured_gb` is the allocator's
peak after a first step, `planned_gb` the plan without its assumptions; `used_gb` is all that is
taken of the card, `planned_used_gb` the plan with context and fragmentation. TFLOP/s are the
model's, without recomputation, beside the card's published peak and a measured matrix product.

An untrained model does not answer with <SEG>. So the answers are scripted: the output head of the
language model runs, and its logits are replaced by the next token of the script.

`adapters` plans and trains stage 3 on one card of 24 GB: adapters in the large parts, and with
bitsandbytes installed the language model in 4 bits.
"""

import argparse
import gc
import importlib.util
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from measure import Report, ceilings, time_in_turns, wait
from PIL import Image
from torch import Tensor, nn

from xsam.cli import CONFIGS, add_device_flag
from xsam.config import Config
from xsam.data import Batch
from xsam.distributed import choose_device
from xsam.inference import predict, quantize
from xsam.model import checkpoint_activations, compile_blocks
from xsam.optimizer import build_optimizer, gradient_norms
from xsam.plan import (
    FlopCount,
    Plan,
    batch_loss,
    build,
    example_batch,
    peak_tflops,
    planned_samples,
)
from xsam.toy.weights import build_tokenizer
from xsam.weights import parameters_on_meta

STAGES = (3, 1, 2)  # the one that matters most first
WHAT = "plan", "training", "inference", "compiled_training", "adapters"
NUM_THINGS, NUM_STUFF = 80, 53  # COCO's
ANSWER_TOKENS, BATCH = 64, 8


def random_model(
    config: Config, stage: int, device: torch.device, backend: str | None = None
) -> nn.Module:
    """A stage's model: small noise in matrices, ones and zeros in norms and biases. `backend` of
    torch.compile for its blocks; None: eager."""
    with parameters_on_meta():
        model = build(config, stage)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and old not in made:
                new = torch.empty(old.shape, dtype=getattr(torch, config.dtype), device=device)
                if old.dim() > 1:
                    new.normal_(std=0.02)
                else:
                    new.fill_(float(name == "weight"))
                made[old] = nn.Parameter(new, old.requires_grad)
            module._parameters[name] = made.get(old)
    model.to(device)  # its buffers
    if config.llm_bits and stage > 1:
        quantize(model, config.llm_bits)
    if backend:
        compile_blocks(model, backend)
    return model


# ---- the plan ------------------------------------------------------------------------------------


def write_plan(
    report: Report, config: Config, stages: tuple[int, ...], gpus: int, memory_gb: float
) -> None:
    """The largest micro-batch of each stage, and for each of its batches the planned GB: of the
    activations, and of the whole GPU."""
    for stage in stages:
        with report.guard(f"plan of stage {stage}"):
            size = config.stages[stage].global_batch_size // gpus
            plan = Plan(config.resolve(micro_batch_size=size), stage, gpus)
            size = plan.largest_micro_batch(memory_gb)
            if size != plan.micro_batch_size:
                plan = Plan(config.resolve(micro_batch_size=size), stage, gpus)
            planned = {
                name: [size / 1e9, plan.peak(size) / 1e9] for name, size in plan.activations.items()
            }
            held = [size for name, (size, _) in plan.held.items() if name != "context"]
            report.add(
                f"plan of stage {stage}",
                micro_batch=plan.micro_batch_size,
                held_gb=sum(held) / 1e9,
                planned_gb=planned,
            )


def with_adapters(config: Config) -> Config:
    """Stage 3 with what trains beside a frozen model, which is small."""
    return config.resolve(
        (3,),
        lora_rank=16,
        lora_targets=("llm", "segmentor", "image_encoder"),
        lora_whole=("llm_projector", "background_embedding", "segmentor.class_head"),
        llm_bits=4 if importlib.util.find_spec("bitsandbytes") else 0,
    )


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


def read_plan(path: Path, stage: int, patience: float) -> dict | None:
    """The record of a stage in plan.jsonl, which another process may still be writing; None where
    it is not there after `patience` seconds."""
    until = time.monotonic() + patience
    while True:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for record in map(json.loads, lines):
            if record["name"] == f"plan of stage {stage}":
                return record if "planned_gb" in record else None
        if time.monotonic() > until:
            return None
        time.sleep(1)


# ---- training ------------------------------------------------------------------------------------


class Trainer:
    """Steps of one stage on one of several GPUs."""

    def __init__(
        self, config: Config, stage: int, gpus: int, device: torch.device, backend: str | None
    ):
        self.config, self.stage, self.device = config, stage, device
        self.model = random_model(config, stage, device, backend)
        if config.recompute:
            checkpoint_activations(self.model)
        parameters = list(self.model.parameters())
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer = build_optimizer(self.model, config.stages[stage], self.model.prefix)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.others = frozenset(set(parameters) - set(fullest_share(trained, gpus)))
        self.flops = FlopCount(config, stage)

    def step(self, batch: Batch) -> None:
        torch.autograd.backward(batch_loss(self.model, batch, self.config))
        norms = gradient_norms(self.model)
        unused = self.others | {parameter for parameter, norm in norms.items() if norm == 0}
        self.optimizer.step(scale=1e-6, unused=unused)
        for parameter in norms:
            parameter.grad.zero_()

    def measure(self, size: int, sample: tuple, num_steps: int) -> dict[str, float]:
        """Mean time and peak memory of `num_steps` steps, after one for warm-up."""
        batch = example_batch(self.config, self.stage, size, *sample)
        cost = self.flops.of(batch)
        positions = 0 if batch.input_ids is None else batch.input_ids.shape[1]
        batch.to(self.device)
        started = wait(self.device)
        self.step(batch)
        first = wait(self.device) - started
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        started = wait(self.device)
        for _ in range(num_steps):
            self.step(batch)
        seconds = (wait(self.device) - started) / num_steps
        figures = {"samples": size, "positions": positions, "first_s": first, "s": seconds}
        figures |= {"images_per_s": size / seconds, "model_tflops": cost / seconds / 1e12}
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            figures["measured_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            figures["used_gb"] = (total - free) / 1e9
        return figures

    def profile(self, size: int, sample: tuple) -> list[tuple[str, float]]:
        """The ten most expensive kernels (on a CPU: operators) of a step, in milliseconds."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            activities = [torch.profiler.ProfilerActivity.CUDA]
        batch = example_batch(self.config, self.stage, size, *sample).to(self.device)
        with torch.profiler.profile(activities=activities) as profiler:
            self.step(batch)
            wait(self.device)
        name = "self_device_time_total" if is_cuda else "self_cpu_time_total"
        events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, name))
        return [(event.key[:90], getattr(event, name) / 1e3) for event in events[:10]]


def train(
    report: Report,
    config: Config,
    stages: tuple[int, ...],
    gpus: int,
    device: torch.device,
    plan_path: Path,
    num_steps: int,
    backend: str | None = None,
) -> None:
    """A record of each batch of each stage: all usual ones first, then the longest. With a
    `backend` of torch.compile, of the first batch alone."""
    limits = ceilings(device, 8192 if device.type == "cuda" else 512)
    suffix = ", compiled" if backend else ""
    limits["published_bf16_tflops"] = peak_tflops(config, device)
    report.add("ceilings", **limits)
    for is_usual in (True, False)[: 1 if backend else 2]:
        for stage in stages:
            trainer = None  # the memory of the stage before
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            with report.guard(f"stage {stage}"):
                plan, batches = (
                    read_plan(plan_path, stage, patience=60),
                    planned_samples(config, stage),
                )
                size = plan["micro_batch"] if plan else config.stages[stage].micro_batch_size
                usual = {name: each for name, each in batches.items() if "usual" in name} or batches
                batches = (
                    usual if is_usual else {n: b for n, b in batches.items() if n not in usual}
                )
                if not batches:
                    continue
                trainer = Trainer(config, stage, gpus, device, backend)
                if backend:
                    batches = dict(list(batches.items())[:1])
                for name, sample in batches.items():
                    with report.guard(f"stage {stage}, {name}{suffix}"):
                        figures = trainer.measure(size, sample, num_steps)
                        figures |= utilisation(figures["model_tflops"], limits)
                        if plan:
                            figures |= beside_plan(figures, plan, name)
                        report.add(f"stage {stage}, {name}{suffix}", **figures)
                if is_usual:
                    name, sample = next(iter(batches.items()))
                    kernels = trainer.profile(size, sample)
                    report.add(f"stage {stage}, {name}{suffix}, top kernels, ms", kernels=kernels)


def utilisation(tflops: float, limits: dict[str, float | None]) -> dict[str, float]:
    """Model FLOPs as a share of the measured matrix rate and of the published peak."""
    published = limits["published_bf16_tflops"]
    shares = {"of_matrix_rate": tflops / limits["product_tflops"]}
    return shares | ({"of_published_peak": tflops / published} if published else {})


def beside_plan(figures: dict[str, float], plan: dict, name: str) -> dict[str, float]:
    """The planned memory of a batch, and on a GPU measured / planned."""
    activations, used = plan["planned_gb"][name]
    planned = plan["held_gb"] + activations
    figures_of_plan = {"planned_gb": planned, "planned_used_gb": used}
    if "measured_gb" in figures:
        figures_of_plan["measured_by_planned"] = figures["measured_gb"] / planned
    return figures_of_plan


# ---- inference -----------------------------------------------------------------------------------


class Script:
    """Makes the output head of a language model predict these tokens, one after another."""

    def __init__(self, model: nn.Module):
        self.ids, self.place = [0], 0
        model.llm.model.get_output_embeddings().register_forward_hook(self)

    def __call__(self, head: nn.Module, inputs: tuple, logits: Tensor) -> Tensor:
        scripted = torch.zeros_like(logits)
        scripted[..., self.ids[min(self.place, len(self.ids) - 1)]] = 1
        self.place += 1
        return scripted


def build_requests() -> tuple[Image.Image, dict[str, dict]]:
    """An image, and for each task the arguments of `predict`."""
    noise = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
    region = np.zeros((480, 640), bool)
    region[100:300, 200:400] = True
    things = [f"thing {number}" for number in range(NUM_THINGS)]
    stuff = [f"stuff {number}" for number in range(NUM_STUFF)]
    return image, {
        "chat": dict(text="what is in the image ?"),
        "panoptic": dict(things=things, stuff=stuff),
        "instance": dict(things=things),
        "semantic": dict(things=things, stuff=stuff),
        "refer": dict(text="the red circle"),
        "reason": dict(text="which of them is red ?"),
        "gcg": {},
        "interactive": dict(regions=[region]),
        "vgd": dict(regions=[region, ~region]),
    }


def infer(report: Report, config: Config, device: torch.device, rounds: int) -> None:
    """Seconds and memory of one image for each task, tokens/s of an answer, images/s of a batch."""
    # Above a threshold an untrained model has no masks.
    config = config.resolve(score_threshold=0.0, overlap_threshold=0.0)
    model = random_model(config, 3, device).requires_grad_(False)
    model.set_tokenizer(build_tokenizer(config.model.llm_config["vocab_size"]))
    script, llm = Script(model), model.llm
    word, stop = model.tokenizer.convert_tokens_to_ids("circle"), min(llm.stop_ids)
    seg, phrase_start, phrase_end = llm.special_ids
    answers = {"chat": [word], "gcg": 2 * [phrase_start, word, phrase_end] + [seg]}
    image, requests = build_requests()

    def run(task: str, ids: list[int], images: Image.Image | list[Image.Image] = image):
        script.ids, script.place = [*ids, stop], 0
        return predict(model, images, task, **requests[task])

    def measure(call: Callable) -> dict[str, float]:
        timing = time_in_turns({"call": call}, device, rounds)["call"]
        memory = {} if timing.peak is None else {"gb_beyond_weights": timing.peak / 1e9}
        return {"s": timing.seconds} | memory

    report.add("weights", gb=sum(parameter.nbytes for parameter in model.parameters()) / 1e9)
    for task in requests:
        with report.guard(f"inference, {task}"):
            ids = answers.get(task, [seg])
            num_masks = len(run(task, ids).masks)
            figures = measure(lambda task=task, ids=ids: run(task, ids))
            report.add(
                f"inference, {task}", num_masks > 0 or task == "chat", masks=num_masks, **figures
            )
    with report.guard("inference, tokens of an answer"):
        model.config = model.config.resolve(max_new_tokens=ANSWER_TOKENS)
        lengths = 1, ANSWER_TOKENS - 1
        short, long = (measure(lambda n=n: run("chat", n * [word]))["s"] for n in lengths)
        rate = (lengths[1] - lengths[0]) / (long - short)
        report.add("inference, tokens of an answer", tokens_per_s=rate)
    with report.guard("inference, a batch of panoptic"):
        figures = measure(lambda: run("panoptic", [seg], [image] * BATCH))
        figures["images_per_s"] = BATCH / figures.pop("s")
        report.add("inference, a batch of panoptic", images=BATCH, **figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=WHAT, help="what to measure")
    parser.add_argument("--out", type=Path, required=True, help="folder for WHAT.jsonl")
    parser.add_argument("--small", action="store_true", help="measure the toy preset")
    parser.add_argument(
        "--gpus", type=int, default=8, help="GPUs that share AdamW's states (default: 8)"
    )
    memory = "memory of a GPU (default: 80)"
    parser.add_argument("--memory", type=float, default=80.0, metavar="GB", help=memory)
    parser.add_argument(
        "--steps", type=int, default=2, help="timed steps of each batch (default: 2)"
    )
    backend = "of compiled_training: torch.compile's (default: inductor)"
    parser.add_argument("--backend", default="inductor", help=backend)
    add_device_flag(parser)
    options = parser.parse_args()
    config = CONFIGS["toy" if options.small else "xsam"]()
    config = config.resolve(dtype="bfloat16", recompute=True)
    stages = STAGES[:2] if options.what == "compiled_training" else STAGES
    plan_path, gpus = options.out / "plan.jsonl", options.gpus
    report = Report(options.out / f"{options.what}.jsonl")
    torch.manual_seed(config.seed)
    if options.what == "plan":
        write_plan(report, config, stages, options.gpus, options.memory)
        return int(report.num_failed > 0)
    device = choose_device(options.device)
    if options.what == "inference":
        infer(report, config, device, rounds=options.steps)
    else:
        is_compiled = options.what == "compiled_training"
        if options.what == "adapters":
            config, stages, gpus = with_adapters(config), (3,), 1
            plan_path = options.out / "adapters_plan.jsonl"
            write_plan(Report(plan_path), config, stages, gpus, memory_gb=24.0)
        train(
            report,
            config,
            stages,
            gpus,
            device,
            plan_path,
            options.steps,
            options.backend if is_compiled else None,
        )
    return int(report.num_failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
