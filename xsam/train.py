"""Trains stages 1, 2 and 3 (paper section 3.3), one after another with `--stage all`.

    torchrun --nproc_per_node 2 xsam/train.py --config toy --stage all --out runs/toy
    torchrun --nproc_per_node 8 xsam/train.py --stage 3 --data datas --weights weights

Works without torchrun as one process. Writes checkpoints OUT/stageN/step_M, OUT/metrics.jsonl with
a line a step, OUT/curves.png where matplotlib is installed, and where something is scored
OUT/results.json, OUT/results.md and OUT/pictures. At SIGTERM and Ctrl-C it saves and ends;
`--resume` goes on from the last checkpoint, on any number of processes. `--plan` says what a run
needs.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Flags and paths are checked before torch is imported. Python puts a script's own folder first
    # in sys.path, where our modules would shadow those of other packages.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from xsam.cli import train_command

    sys.exit(train_command())

import argparse
import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from xsam import distributed
from xsam.checkpoints import (
    check_checkpoint,
    check_space,
    fill_states,
    find_base,
    latest_checkpoint,
    list_states,
    load_trained,
    point_latest,
    read_header,
    save_checkpoint,
    state_tensors,
)
from xsam.config import Config, stage_folder
from xsam.data import Batch, Mixture, Processor
from xsam.encoders import ImageEncoder
from xsam.files import write_whole
from xsam.llm import LanguageModel
from xsam.lora import add_adapters, target_layers
from xsam.losses import Normalisers, Objective, count_targets
from xsam.model import XSAM, Segmentor, checkpoint_activations, compile_blocks
from xsam.optimizer import (
    build_optimizer,
    freeze,
    gradient_norms,
    schedule,
    update,
)
from xsam.prompts import read_phrasings
from xsam.starts import (
    has_tokenizer,
    init_parts,
    is_whole,
    load_init,
    name_base,
    outline,
    without_class_head,
)
from xsam.weights import (
    complete_architecture,
    list_tensors,
    load_folder,
    load_tensors,
    parameters_on_meta,
    read_tokenizer,
)

MOST_WORDS = 20  # words without a token that a run names


class Stopped(Exception):
    """The run was asked to end, and has saved; `signal` asked for it."""

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.signal = signal


# ---- where a stage begins ------------------------------------------------------------------------


def pretrained_model(
    stage: int,
    config: Config,
    weights: Path,
    report: Callable[[str], None] = print,
    has_encoder: bool = False,
) -> Segmentor | XSAM:
    """A stage's model with the public weights in a folder, of type `config.dtype`: in stage 1 those
    of the segmentation encoder, unless `has_encoder` says that they come from elsewhere, in stages
    2 and 3 those of image encoder and language model. All else is random; `starting_model` fills
    it. `report` is called with what was loaded."""
    dtype = getattr(torch, config.dtype)
    if stage == 1:
        model, folder = Segmentor(config), weights / config.model.seg_encoder
        if not has_encoder:
            report(load_folder(model.encoder, "seg_encoder", folder))
        return cast_parameters(model, dtype)
    parts = {}
    for part, kind in (("image_encoder", ImageEncoder), ("llm", LanguageModel)):
        folder = weights / getattr(config.model, part)
        if folder.name == "none":
            continue
        config = complete_architecture(config, part, folder)
        with parameters_on_meta():
            parts[part] = kind(getattr(config.model, f"{part}_config"))
        report(load_folder(parts[part], part, folder, dtype=dtype))
    model = XSAM(config, **parts)
    rows = config.model.llm_config["vocab_size"]
    model.set_tokenizer(read_tokenizer(weights / config.model.llm))
    if (grown := model.config.model.llm_config["vocab_size"]) != rows:
        report(f"vocabulary: {rows} rows grown to {grown}")
    return cast_parameters(model, dtype)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts the parameters, in place, and not the buffers: one may be a table of angles, which
    need float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def load_earlier_stage(model: XSAM, stage: int, out: Path) -> str:
    """Fills a model of stage 2 or 3 with what an earlier stage of the run trained: from stage 1 the
    segmentor without its class head, from stage 2 the projectors. Returns what was loaded."""
    folder = latest_checkpoint(stage_folder(out, stage))
    check_checkpoint(folder, model.config, stage)
    if find_base(folder) is not None:
        from xsam.inference import load_checkpoint

        lines: list[str] = []
        segmentor, _ = load_checkpoint(folder, config=model.config, report=lines.append)
        segmentor.class_head = model.segmentor.class_head
        model.segmentor.load_state_dict(segmentor.state_dict())
        return "\n".join(lines)
    stored = list_tensors(folder)
    if stage == 2:
        return load_tensors(model, stored, folder, only=("visual_projector.", "seg_projector."))
    parts = ("encoder.", "pixel_decoder.", "decoder.")
    only = ("seg_connector.", *(f"segmentor.{part}" for part in parts))
    return load_tensors(model, without_class_head(stored), folder, only=only)


# ---- many ranks ----------------------------------------------------------------------------------


def distribute(objective: Objective) -> nn.Module:
    """The objective with its gradients averaged over the ranks of the process group, if there is
    one.

    Gradients are views of the buffers that are sent, so that memory holds them once. The first
    synchronised backward pass makes them so, and a pass that only accumulates before it would hold
    them twice. So that pass is made here, for the sum of the parameters.
    """
    if not distributed.has_group():
        return objective
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():  # broadcast_buffers has another name from torch 2.13 on
        warnings.simplefilter("ignore", FutureWarning)
        ddp = DistributedDataParallel(
            objective,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=True,  # chat has no use for the decoder, nothing for SAM's neck
        )
    # DDP warns where it looks for unused parameters and finds none, so one is left out.
    objective.forward = lambda: sum(p.sum() for p in trained[1:])
    ddp().backward()
    del objective.forward
    for parameter in ddp.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    return ddp


def step_normalisers(batches: list[Batch], config: Config, device: torch.device) -> Normalisers:
    """The target masks, class weights and answer tokens of a step's micro-batches, as means over
    ranks."""
    totals = {"masks": 0.0, "class_weight": 0.0, "tokens": 0.0}
    for batch in batches:
        counts = [len(target.labels) for target in batch.targets]
        for name, value in count_targets(counts, config.model.num_queries, config.loss).items():
            totals[name] += value
        if batch.labels is not None:
            totals["tokens"] += int((batch.labels[:, 1:] >= 0).sum())
    totals = distributed.mean_over_ranks(totals, device)
    return Normalisers(**{name: max(value, 1e-6) for name, value in totals.items()})


# ---- a stage -------------------------------------------------------------------------------------


def train_stage(
    number: int, config: Config, options: argparse.Namespace, device: torch.device
) -> Segmentor | XSAM:
    """Trains one stage to its end and returns its model. Raises Stopped where a signal asked it to
    end, and FloatingPointError where too many steps had no finite loss or gradient."""
    from xsam import plan
    from xsam.report import monitor

    stage, out = config.stages[number], stage_folder(options.out, number)
    rank, world_size = distributed.rank(), distributed.world_size()
    report = print if rank == 0 else lambda *_: None

    # ---- model, and where it goes on
    model = starting_model(number, config, options, report)
    mixture = open_mixture(model, number, options, report)
    run_config, config = config, model.config  # the second with what folders and data add
    checkpoint = latest_checkpoint(out) if options.resume else None
    base = begin_adapters(model, number, options, device)
    first_step = num_skipped = 0
    if checkpoint is not None:
        first_step, num_skipped = load_progress(model, checkpoint, config, number, report, base)
    model.to(device)
    if config.compile:
        compile_blocks(model)
    if config.recompute:
        checkpoint_activations(model)
    objective = distribute(Objective(model, config))
    optimizer = build_optimizer(model, stage, model.prefix, config.optimizer_bits)
    if checkpoint is not None:
        fill_states(optimizer, model, model.prefix, list_states(checkpoint))
        report(f"resumed from {checkpoint}")
    report(check_space(options.out, model, number))
    peak_tflops = plan.peak_tflops(config, device)
    flops = plan.FlopCount(config, number) if peak_tflops else None

    # ---- data
    num_steps = stage.max_steps or math.ceil(len(mixture) * stage.epochs)
    size = stage.micro_batch_size
    accumulation = stage.global_batch_size // (size * world_size)
    report(f"\n---- stage {number}: {num_steps} steps of {stage.global_batch_size} samples")
    report(f"{world_size} processes x {size} samples x {accumulation} accumulated")
    loader = DataLoader(
        mixture,
        batch_sampler=mixture.micro_batches(first_step, rank, world_size),
        collate_fn=mixture.collate,
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )

    # ---- loop
    if rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        write_whole(options.out / "config.json", json.dumps(run_config.to_dict(), indent=1))
    progress = monitor.Monitor(options.out, number, num_steps, first_step, device, peak_tflops)
    batches = draw_batches(loader)
    with noted_signals() as signals, closing(progress), closing(batches), distributed.heartbeat():
        for step in progress:
            started = time.perf_counter()
            micro_batches = [next(batches) for _ in range(accumulation)]
            waited = time.perf_counter() - started
            normalisers = step_normalisers(micro_batches, config, device)

            # ---- forward and backward
            losses: list[dict[str, Tensor]] = []
            for index, batch in enumerate(micro_batches):
                seed_by(config.seed, number, step, rank + index * world_size)
                objective.require_backward_grad_sync = index == accumulation - 1  # DDP looks at it
                parts = objective(batch.to(device), normalisers)
                sum(parts.values()).backward()
                losses.append({name: part.detach() for name, part in parts.items()})

            # ---- update, on all ranks or on none
            norms = gradient_norms(model)
            costs = {"data_seconds": waited, "signals": len(signals)}
            if flops is not None:
                costs["flops"] = sum(map(flops.of, micro_batches))
            figures = add_up(losses, norms, micro_batches, costs, device)
            figures["lr"] = set_rate(optimizer, schedule(step, num_steps, stage.warmup_ratio))
            if math.isfinite(figures["loss"] + figures["grad_norm"]):
                update(optimizer, norms, stage.clip_norm)
            else:
                num_skipped += 1
                report_skipped(step, losses, micro_batches, num_skipped, config)
            optimizer.zero_grad(set_to_none=False)  # they stay views of what DDP sends

            # ---- report and save
            must_end, is_last = figures.pop("signals") > 0, step + 1 == num_steps
            figures |= {"seconds": time.perf_counter() - started, "skipped": num_skipped}
            progress.step(step, micro_batches, figures)
            if is_last or must_end or (step + 1) % config.save_every == 0:
                states = state_tensors(optimizer, model, model.prefix)
                about = config, model.tokenizer, number, step + 1
                saved = save_checkpoint(out, model, *about, states, num_skipped, base)
            if must_end:
                raise Stopped(max(signals, default=signal.SIGTERM), f"saved {saved}")
            if config.validate_every and (step + 1) % config.validate_every == 0 and not is_last:
                progress.validate(step, model, options.data, options.skip_bad)
    return model


def starting_model(
    number: int, config: Config, options: argparse.Namespace, report: Callable[[str], None]
) -> Segmentor | XSAM:
    """A stage's model before its first step, the same on every rank: with public weights, what
    earlier stages or --init bring, and frozen what the stage does not train."""
    torch.manual_seed(config.seed + number)
    earlier_stages = config.stages[number].starts_from
    inits = list(options.init) if number == options.stages[0] else []
    rules = {"allow_missing": tuple(options.allow_missing)}
    has_encoder = 1 in earlier_stages
    has_encoder |= any("segmentor.encoder" in init_parts(path, number) for path in inits)
    if number > 1 and inits and is_whole(inits[0]):
        from xsam.inference import load_checkpoint

        path, folder = inits.pop(0), options.weights / config.model.llm
        rules |= {"config": config, "dtype": getattr(torch, config.dtype), "report": report}
        rules["tokenizer"] = None if has_tokenizer(path) else folder
        model = load_checkpoint(path, **rules)[0].train()
    else:
        model = pretrained_model(number, config, options.weights, report, has_encoder)
    for earlier in earlier_stages:
        report(load_earlier_stage(model, earlier, options.out))
    for path in inits:
        report(load_init(model, path, rules["allow_missing"]))
    if number > 1 and not has_encoder:  # nothing before holds it (paper table 8, row "S3")
        folder = options.weights / config.model.seg_encoder
        dtype = getattr(torch, config.dtype)
        report(load_folder(model.segmentor.encoder, "seg_encoder", folder, dtype=dtype))
    freeze(model, config.stages[number], model.prefix)
    return model


def begin_adapters(
    model: Segmentor | XSAM, number: int, options: argparse.Namespace, device: torch.device
) -> dict[str, str] | None:
    """Adds the adapters of a stage to its model, and holds a frozen language model in fewer bits.
    Returns what the checkpoints say of the base of the adapters, None without any (lora.py)."""
    stage, bits = model.config.stages[number], model.config.llm_bits
    base = None
    if stage.lora_rank and target_layers(model, stage, model.prefix):
        base = name_base(model, number, options)
    if bits and number > 1:
        from xsam.inference import quantize

        quantize(model.to(device), bits)
    add_adapters(model, stage, model.prefix)
    return base


def load_progress(
    model: Segmentor | XSAM,
    checkpoint: Path,
    config: Config,
    number: int,
    report: Callable[[str], None],
    base: dict[str, str] | None = None,
) -> tuple[int, int]:
    """Loads the trained weights of a checkpoint. Returns its step, and how many steps before it
    were skipped. Raises ValueError where it has other adapters, or another `base` of them."""
    header = check_checkpoint(checkpoint, config, number)
    then, now = header["config"].stages[number], config.stages[number]
    for name in ("lora_rank", "lora_targets", "lora_whole"):
        if getattr(then, name) != getattr(now, name):
            raise ValueError(
                f"{checkpoint}: was trained with {name} {getattr(then, name)}, this run has "
                f"{getattr(now, name)}: resume it as it was begun, or choose another --out"
            )
    if header["base"].get("digest") != (base or {}).get("digest"):
        was = header["base"].get("path")
        raise ValueError(
            f"{checkpoint}: has adapters of {was}, which is another base than --init's"
        )
    report(load_trained(model, checkpoint))
    if distributed.rank() == 0:
        point_latest(checkpoint)
    changed = [
        f"{name} was {value!r}, is {getattr(now, name)!r}"
        for name, value in vars(then).items()
        if value != getattr(now, name)
    ]
    if header["config"].seed != config.seed:
        changed.append(f"seed was {header['config'].seed}, is {config.seed}")
    if changed:
        report(f"goes on as another run than it was: {'; '.join(changed)}")
    return header["step"], header["skipped"]


def open_mixture(
    model: Segmentor | XSAM,
    number: int,
    options: argparse.Namespace,
    report: Callable[[str], None],
) -> Mixture:
    """The stage's datasets as a Mixture, reported. The classes of its generic datasets become the
    categories of the model's configuration. Raises ValueError where stage 1's head cannot have
    them."""
    from xsam.datasets.generic import Generic
    from xsam.datasets.registry import open_dataset

    config = model.config
    stage, phrasings = config.stages[number], read_phrasings(config.phrasings)
    datasets = [
        open_dataset(name, options.data, number == 1, phrasings, options.skip_bad)
        for name in stage.datasets
    ]
    processor = Processor(config, model.tokenizer)
    mixture = Mixture(datasets, processor, stage, config.seed, options.skip_bad)
    for dataset, factor in zip(datasets, mixture.factors, strict=True):
        skipped = [f"{count} {reason}" for reason, count in (+dataset.skipped).items()]
        skipped += [f"{len(dataset.problems)} bad records"] if dataset.problems else []
        without = f"; left out: {', '.join(skipped)}" if skipped else ""
        report(f"{dataset.name}: {len(dataset)} samples x {factor:.2f}{without}")
    generic = [dataset for dataset in datasets if isinstance(dataset, Generic)]
    if generic:
        named: dict[str, dict] = {}
        for dataset in generic:
            for category in dataset.categories:
                named.setdefault(category["name"], category)
        model.config = config.resolve(categories=tuple(named.values()))
    for dataset in generic if number == 1 else ():
        if dataset.names != generic[0].names:
            raise ValueError(
                f"{dataset.annotations}: has other classes than {generic[0].annotations}, or in "
                "another order: one head cannot learn both"
            )
        if len(dataset.names) != config.model.num_classes:
            raise ValueError(
                f"{dataset.annotations} has {len(dataset.names)} categories, num_classes is "
                f"{config.model.num_classes}: --num_classes {len(dataset.names)} fits"
            )
    return mixture


def draw_batches(loader: DataLoader) -> Iterator[Batch]:
    """The micro-batches of a loader. Raises the ValueError of a bad record, which the loader hands
    on. Closing this iterator ends the loader's processes, which ignore signals. The first rank
    names the words of its samples that the tokenizer lacks, each once and at most MOST_WORDS."""
    named: set[str] = set()
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        new = [(word, name) for word, name in batch.unknown.items() if word not in named]
        for word, name in new[: MOST_WORDS - len(named)] if distributed.rank() == 0 else ():
            tqdm.write(f"{name}: the tokenizer lacks {word!r}: the model sees an unknown word")
            named.add(word)
        yield batch


def seed_by(*place: int) -> None:
    """Seeds torch by the place of a micro-batch in the run. What it draws depends on that alone: no
    generator has to be saved, and another number of ranks draws the same."""
    torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> float:
    """Sets the learning rates of all groups to a share of their peaks; returns the highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
    return max(group["lr"] for group in optimizer.param_groups)


def add_up(
    losses: list[dict[str, Tensor]],
    norms: dict[nn.Parameter, float],
    batches: list[Batch],
    costs: dict[str, float],
    device: torch.device,
) -> dict[str, float]:
    """The figures of a step: its loss, and the losses by name; the norm of its gradient; its
    images, tokens and skipped samples, summed over ranks; and the `costs`, as means over ranks."""
    counts = {
        "images": sum(len(batch.samples) for batch in batches),
        "tokens": sum(int(b.attention_mask.sum()) for b in batches if b.attention_mask is not None),
        "skipped_samples": sum(len(batch.skipped) for batch in batches),
    }
    stacked = torch.stack([torch.stack(list(parts.values())) for parts in losses])
    named = dict(zip(losses[0], stacked.sum(dim=0).tolist(), strict=True))
    means = distributed.mean_over_ranks(named | counts | costs, device)
    figures = {"loss": sum(means[name] for name in named)} | {name: means[name] for name in named}
    figures["grad_norm"] = math.hypot(*norms.values())
    figures |= {name: round(means[name] * distributed.world_size()) for name in counts}
    return figures | {name: means[name] for name in costs}


def report_skipped(
    step: int,
    losses: list[dict[str, Tensor]],
    batches: list[Batch],
    num_skipped: int,
    config: Config,
) -> None:
    """Prints the samples of a step that was skipped: those of the micro-batches, on any rank, whose
    loss is not finite, or all where only the gradient is not. Raises FloatingPointError where
    more steps were skipped than `max_skipped_steps`."""
    culprits, others = [], []
    for parts, batch in zip(losses, batches, strict=True):
        is_sound = math.isfinite(float(sum(parts.values())))
        (others if is_sound else culprits).extend(sample.sample_id for sample in batch.samples)
    culprits, others = distributed.gather(culprits), distributed.gather(others)
    what = "its loss is not finite" if culprits else "its loss is finite, its gradient is not"
    message = f"step {step} is skipped, {what}; samples: {', '.join(culprits or others)}"
    if num_skipped > config.max_skipped_steps:
        limit = f"max_skipped_steps is {config.max_skipped_steps}"
        raise FloatingPointError(f"{num_skipped} steps were skipped, {limit}; the last: {message}")
    if distributed.rank() == 0:
        tqdm.write(f"{message} ({num_skipped} so far)")


# ---- signals -------------------------------------------------------------------------------------


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Inside, SIGTERM and Ctrl-C do not end the process; their numbers come into the list that is
    yielded."""
    noted: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: noted.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(_: int) -> None:
    """For a process that loads data: a signal to all processes is for those that train."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# ---- the run -------------------------------------------------------------------------------------


def run(options: argparse.Namespace, config: Config) -> None:
    """Trains and scores the stages of `options`; the toy's data and weights are made first, where
    none are given. Raises as `train_stage` does."""
    from xsam.datasets.sources import run_sets
    from xsam.report import monitor
    from xsam.toy.weights import write_weights
    from xsam.toy.world import write_world

    device = distributed.start(options.device)
    # Of two ranks the second makes the toy world, and the first its weights.
    last_rank = distributed.world_size() - 1
    if options.makes_data and not options.data.exists() and distributed.rank() == min(1, last_rank):
        write_world(options.data, seed=config.seed)
    if options.makes_weights and not options.weights.exists() and distributed.rank() == 0:
        write_weights(options.weights, config.model, config.seed, num_workers=2)
    distributed.barrier()

    column = monitor.INIT if options.init else monitor.UNTRAINED
    sets = run_sets(config, options.stages, options.data)
    if sets and not monitor.is_scored(column, options.out):
        torch.manual_seed(config.seed)
        if options.init:
            model = starting_model(options.stages[0], config, options, lambda _: None)
        else:
            model = pretrained_model(options.stages[-1], config, options.weights, lambda _: None)
        if model.stage == 1:  # its classes are those of its data
            open_mixture(model, 1, options, lambda _: None)
        monitor.score(column, model.to(device), options.out, options.data, options.skip_bad)
    for number in options.stages:
        if number != options.stages[0] and distributed.rank() == 0:
            print(outline(number, config, options))
        model = train_stage(number, config, options, device)
        column, last = f"stage {number}", latest_checkpoint(stage_folder(options.out, number))
        step = read_header(last)["step"]
        if config.eval_tasks and number != 2 and not monitor.is_scored(column, options.out, step):
            monitor.score(column, model, options.out, options.data, options.skip_bad, step)
    if distributed.rank() == 0:
        monitor.draw_metrics(options.out)
        print(f"\nwrote {options.out}")
