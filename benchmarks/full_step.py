"""A whole training step at full size, beside what the plan says of it: memory, time, utilisation.

    python benchmarks/full_step.py --gpus 8 --micro-batch 4
    python benchmarks/full_step.py --config toy --usual

Random weights of the preset's shapes and noise for a batch: no file is read. One GPU does the work
of one of `--gpus`: forward, criterion, backward, and AdamW for the fullest share of the parameters,
so a step costs what one of several GPUs spends on a micro-batch, but for what they send each other.
Each task has the longest texts that the configuration allows, or with `--usual` those of a usual
sample. Memory is the peak of torch's allocator after a first step; the ratio is to the plan without
its assumptions (context, unused blocks). On a CPU there is no such figure.
"""

import argparse
import copy
import time

import torch
from torch import nn

from xsam.config import CONFIGS, Config
from xsam.model import checkpoint_activations
from xsam.optimizer import build_optimizer, gradient_norms
from xsam.plan import USUAL, FlopCount, fullest_share, largest_samples, peak_tflops
from xsam.simulation import Simulation, batch_loss, build, example_batch
from xsam.weights import parameters_on_meta


def random_model(config: Config, stage: int, device: torch.device) -> nn.Module:
    """Small noise for matrices, ones and zeros for norms and biases; gradients are there."""
    with parameters_on_meta():
        model = build(copy.deepcopy(config), stage)
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
                made[old].grad = torch.zeros_like(new) if old.requires_grad else None
            module._parameters[name] = made.get(old)
    model.to(device)  # its buffers
    if config.recompute:
        checkpoint_activations(model)
    return model


def wait(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=tuple(CONFIGS), default="xsam")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--gpus", type=int, default=8, help="that share the optimizer's states")
    parser.add_argument("--micro-batch", type=int, help="samples (the stage's)")
    parser.add_argument("--tasks", nargs="+", choices=("generic", "chat", "refer"))
    parser.add_argument("--usual", action="store_true", help="usual lengths, not the longest")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    options = parser.parse_args()
    config, stage = CONFIGS[options.config](), options.stage
    size = options.micro_batch or config.stages[stage].micro_batch_size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)

    model = random_model(config, stage, device)
    optimizer = build_optimizer(model, config.stages[stage], model.prefix)
    own = set(fullest_share([p for p in model.parameters() if p.requires_grad], options.gpus))
    others = frozenset(set(model.parameters()) - own)
    simulation = Simulation(config, stage, is_cuda=device.type == "cuda")
    flops, tflops = FlopCount(config, stage), peak_tflops(config, device)
    parameters = list(model.parameters())
    held = sum(each.nbytes + (0 if each.grad is None else each.grad.nbytes) for each in parameters)
    states = sum(each.numel() for each in own) * (8 if config.dtype == "float32" else 12)
    print(f"{options.config}, stage {stage}, {config.dtype}, {device}, {size} samples")
    print(f"weights and gradients {held / 1e9:.2f} GB, states of a share {states / 1e9:.2f} GB")

    samples = largest_samples(config, stage)
    for task in options.tasks or samples:
        sizes = USUAL[task] if options.usual and stage > 1 else samples[task]
        batch = example_batch(config, stage, task, size, *sizes)
        cost, num_positions = flops.of(batch), 0 if stage == 1 else batch.input_ids.shape[1]
        planned = held + states + simulation.step(task, size, *sizes).peak
        batch.to(device)
        seconds = []
        for step in range(options.steps + 1):
            if device.type == "cuda" and step == 1:
                torch.cuda.reset_peak_memory_stats(device)
            started = wait(device)
            torch.autograd.backward(batch_loss(model, batch, config))
            norms = gradient_norms(model)
            unused = others | {parameter for parameter, norm in norms.items() if norm == 0}
            optimizer.step(scale=1e-6, unused=unused)
            for parameter in own | others:
                if parameter.grad is not None:
                    parameter.grad.zero_()
            seconds.append(wait(device) - started)
        each = sum(seconds[1:]) / options.steps
        line = f"{task:8} {size} x {num_positions} positions: {each:.3f} s, "
        line += f"{size / each:.2f} images/s, {cost / each / 1e12:.3g} TFLOP/s"
        if tflops:
            line += f" = {cost / each / 1e12 / tflops:.1%} of {tflops:g}"
        line += f"; planned {planned / 1e9:.3f} GB"
        if device.type == "cuda":
            peak, reserved = (
                read(device)
                for read in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
            )
            line += f", measured {peak / 1e9:.3f}: {peak / planned:.3f} of it"
            line += f" ({reserved / 1e9:.2f} GB reserved)"
        print(line, flush=True)


if __name__ == "__main__":
    main()
