"""Trains stages 1, 2 and 3, one after another with `--stage all`.

    torchrun --nproc_per_node 2 xsam/train.py --config toy --stage all --out runs/toy
    torchrun --nproc_per_node 8 xsam/train.py --stage 3 --data datas --weights weights

Works without torchrun as one process. Writes OUT/stageN/step_M checkpoints, OUT/metrics.jsonl with
a line a step, OUT/curves.png, and for a configuration with validation data OUT/results.json,
OUT/results.md and OUT/pictures. `--resume` goes on from the last checkpoint (paper section 4).
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder must not shadow other packages' modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import textwrap
import time

from xsam.config import CONFIGS, Config, add_config_flags, apply_flags, stage_folder
from xsam.sources import find_source, required_paths

# ---- command line: before torch is imported, so that a mistake costs a second --------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        leave(f"{self.format_usage()}{self.prog}: error: {message}")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    parser = Parser(
        prog="xsam/train.py",
        description="Trains X-SAM; runs under torchrun or alone.",
        epilog="example: torchrun --nproc_per_node 2 xsam/train.py --config toy --stage all "
        "--out runs/toy",
        allow_abbrev=False,
    )
    parser.add_argument("--stage", choices=("1", "2", "3", "all"), required=True)
    parser.add_argument("--config", choices=tuple(CONFIGS), default="xsam", help="preset")
    parser.add_argument("--data", type=Path, help="data root (default: datas; toy makes its own)")
    parser.add_argument("--weights", type=Path, help="folder of Hugging Face folders (weights)")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/CONFIG)")
    parser.add_argument(
        "--init",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="checkpoint to start from in place of the earlier stages' in --out, ours or a "
        "published X-SAM one, whole or a stage's part; may be repeated",
    )
    parser.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="PREFIX",
        help="names of tensors, as on disk, that an earlier stage's checkpoint may lack",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument(
        "--skip-bad", action="store_true", help="train without bad records; they are counted"
    )
    add_config_flags(parser)
    flags = vars(parser.parse_args(arguments))
    own = (
        "stage",
        "config",
        "data",
        "weights",
        "out",
        "init",
        "allow_missing",
        "resume",
        "skip_bad",
    )
    options = argparse.Namespace(**{name: flags.pop(name) for name in own})
    options.stages = [1, 2, 3] if options.stage == "all" else [int(options.stage)]
    options.out = options.out or Path("runs") / options.config
    # The toy preset draws its own world where the user points at none.
    options.world = options.out / "world" if options.config == "toy" else None
    options.makes_data = options.world is not None and options.data is None
    options.makes_weights = options.world is not None and options.weights is None
    options.data = options.data or (options.world / "data" if options.world else Path("datas"))
    options.weights = options.weights or (
        options.world / "weights" if options.world else Path("weights")
    )
    config = apply_flags(CONFIGS[options.config](), flags, options.stages)
    if options.init:  # in place of what the first stage would start from
        config.stages[options.stages[0]].starts_from = ()
    for number in options.stages:
        stage = config.stages[number]
        for name in stage.datasets:
            try:
                find_source(name)
            except ValueError as error:
                parser.error(f"stage {number}: {error}")
        chunk = stage.micro_batch_size * int(os.environ.get("WORLD_SIZE", 1))
        if stage.global_batch_size % chunk:
            parser.error(
                f"stage {number}: global_batch_size {stage.global_batch_size} is not a multiple of "
                f"micro_batch_size {stage.micro_batch_size} x {chunk // stage.micro_batch_size} "
                "processes"
            )
    return options, config


def preflight(options: argparse.Namespace, config: Config) -> str:
    """What stands in the way of the run, as one message; empty where nothing does."""
    required = required_paths(config, options.stages, options.data, options.weights, options.out)
    made = [options.data] * options.makes_data + [options.weights] * options.makes_weights
    required += [(path, "the checkpoint of --init") for path in options.init]
    missing = [
        (path, about)
        for path, about in required
        if not path.exists() and not any(root in path.parents for root in made)
    ]
    if missing:
        lines = [f"xsam/train.py: {len(missing)} missing; put each where it belongs:"]
        lines += [f"  {path}\n      {about}" for path, about in missing]
        return "\n".join(lines)
    started = [n for n in options.stages if (stage_folder(options.out, n) / "latest").exists()]
    if started and not options.resume:
        return (
            f"xsam/train.py: {stage_folder(options.out, started[0])} holds checkpoints already; "
            "go on with --resume or choose another --out"
        )
    return ""


def leave(message: str) -> None:
    """Exits with status 2; of several ranks the first prints, and dies first, so that torchrun
    does not end it before it has spoken."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(5)
    sys.exit(2)


if __name__ == "__main__":
    OPTIONS, CONFIG = parse(sys.argv[1:])
    if MESSAGE := preflight(OPTIONS, CONFIG):
        leave(MESSAGE)

import math
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from xsam import distributed, draw, toy
from xsam.config import Stage
from xsam.data import Batch, Mixture, Processor
from xsam.datasets import open_dataset
from xsam.datasets_generic import Generic
from xsam.encoders import ImageEncoder
from xsam.evaluate import evaluate, table
from xsam.llm import LanguageModel
from xsam.losses import Normalisers, count_targets, segmentation_losses
from xsam.model import XSAM, Segmentor
from xsam.postprocess import Prediction
from xsam.prompts import read_phrasings
from xsam.samples import Sample
from xsam.weights import (
    TRAINING_FILE,
    Stored,
    check_checkpoint,
    complete_architecture,
    disk_name,
    latest_checkpoint,
    list_tensors,
    load_folder,
    load_tensors,
    load_trained,
    parameters_on_meta,
    part_name,
    read_tokenizer,
    save_checkpoint,
)

MOST_REASONS = 20  # printed by a rank for samples that are left out
UNTRAINED = "untrained"  # the column of results before the first step

# ---- where a stage begins ------------------------------------------------------------------------


def pretrained_model(
    stage: int, config: Config, weights: Path, report: Callable[[str], None] = print
) -> Segmentor | XSAM:
    """A stage's model with the public weights: the segmentation encoder in stage 1, then image
    encoder and language model; all else is random. `report` is told what was loaded."""
    names = config.model
    if stage == 1:
        model = Segmentor(config)
        report(load_folder(model.encoder, "seg_encoder", weights / names.seg_encoder))
        return model
    parts = {}
    for part, kind in (("image_encoder", ImageEncoder), ("llm", LanguageModel)):
        folder = weights / getattr(names, part)
        if folder.name == "none":
            continue
        complete_architecture(names, part, folder)
        with parameters_on_meta():
            parts[part] = kind(getattr(names, f"{part}_config"))
        report(load_folder(parts[part], part, folder, dtype=torch.float32))
    model = XSAM(config, **parts)
    rows = names.llm_config["vocab_size"]
    model.set_tokenizer(read_tokenizer(weights / names.llm))
    if names.llm_config["vocab_size"] != rows:
        report(f"vocabulary: {rows} rows grown to {names.llm_config['vocab_size']}")
    return model


def load_earlier_stage(model: XSAM, stage: int, out: Path) -> str:
    """What an earlier stage trained: the segmentor of stage 1 without its class head, the
    projectors of stage 2."""
    folder = latest_checkpoint(stage_folder(out, stage))
    check_checkpoint(folder, model.settings, stage)
    stored = list_tensors(folder)
    if stage == 2:
        return load_tensors(model, stored, folder, only=("visual_projector.", "seg_projector."))
    parts = ("encoder.", "pixel_decoder.", "decoder.")
    only = ("seg_connector.", *(f"segmentor.{part}" for part in parts))
    return load_tensors(model, without_class_head(stored), folder, only=only)


def load_init(model: Segmentor | XSAM, path: Path, allow_missing: tuple[str, ...]) -> str:
    """A checkpoint named by --init, whole or a stage's part, over what the model holds: every part
    that it has must be there from its first tensor to its last."""
    path = latest_checkpoint(path) or path
    stored = list_tensors(path)
    if model.stage != 1:
        stored = without_class_head(stored)
    own = {disk_name(model.prefix + name) for name in model.state_dict()}
    parts = {part_name(disk_name(name)) for name in stored}
    only = tuple(name for name in own if part_name(name) in parts)
    options = {"only": only, "allow_missing": allow_missing, "short_vocabulary": True}
    return load_tensors(model, stored, path, model.prefix, **options)


def without_class_head(stored: dict[str, Stored]) -> dict[str, Stored]:
    """The linear head of stage 1 has no place in stages 2 and 3."""
    linear = "segmentor.class_predictor.predictor."
    return {name: at for name, at in stored.items() if not disk_name(name).startswith(linear)}


# ---- the optimizer's side of a stage -------------------------------------------------------------


def learning_rate(name: str, stage: Stage) -> float:
    """Peak learning rate of a parameter: that of the longest module path it lies under; 0 is
    frozen."""
    paths = [
        path for path in stage.learning_rates if f"{name}.".startswith(f"{path}." * bool(path))
    ]
    return stage.learning_rates[max(paths, key=len)]


def build_optimizer(model: nn.Module, stage: Stage, prefix: str) -> torch.optim.AdamW:
    """Freezes what has rate 0; a group for each rate, with and without weight decay (vectors, such
    as biases and norms, have none).

    `prefix` is put before each name: stage 1 trains a bare segmentor.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = learning_rate(prefix + name, stage)
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            decay = stage.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        betas=(0.9, 0.999),
    )


def schedule(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate: a linear rise, then half a cosine down to zero."""
    warmup = max(1, round(num_steps * warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


# ---- a stage -------------------------------------------------------------------------------------


def train_stage(
    number: int, config: Config, options: argparse.Namespace, device: torch.device
) -> nn.Module:
    """Trains one stage to its end and returns its model."""
    stage, out = config.stages[number], stage_folder(options.out, number)
    rank, world_size = distributed.rank(), distributed.world_size()
    is_main = rank == 0
    say = print if is_main else lambda *_: None

    # ---- model
    torch.manual_seed(config.seed + number)
    model = pretrained_model(number, config, options.weights, say)
    for earlier in stage.starts_from:
        say(load_earlier_stage(model, earlier, options.out))
    for path in options.init if number == options.stages[0] else []:
        say(load_init(model, path, tuple(options.allow_missing)))
    model.to(device)
    optimizer = build_optimizer(model, stage, "segmentor." if number == 1 else "")

    # ---- data
    processor = Processor(config, model.tokenizer)
    mixture = open_mixture(number, config, options, processor, say)
    num_steps = stage.max_steps or math.ceil(len(mixture) * stage.epochs)
    accumulation = stage.global_batch_size // (stage.micro_batch_size * world_size)
    say(f"\n---- stage {number}: {num_steps} steps of {stage.global_batch_size} samples")
    say(f"{world_size} processes x {stage.micro_batch_size} samples x {accumulation} accumulated")

    # ---- resume
    first_step = 0
    checkpoint = latest_checkpoint(out) if options.resume else None
    if checkpoint is not None:
        first_step = check_checkpoint(checkpoint, config, number)["step"]
        say(load_trained(model, checkpoint))
        training = torch.load(checkpoint / TRAINING_FILE, map_location=device, weights_only=True)
        optimizer.load_state_dict(training["optimizer"])
        say(f"resumed from {checkpoint}")
    if is_main:
        drop_metrics(options.out / "metrics.jsonl", number, first_step)

    # ---- loop
    ddp = model
    if world_size > 1:
        # Chat uses no decoder, nothing uses SAM's neck or the image encoder's last layer.
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
    ddp.train()
    loader = DataLoader(
        mixture,
        batch_sampler=mixture.micro_batches(first_step, rank, world_size),
        collate_fn=mixture.collate,
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader) if first_step < num_steps else iter(())
    bar = tqdm(
        range(first_step, num_steps), f"stage {number}", num_steps, initial=first_step,
        disable=not is_main, unit="step", dynamic_ncols=True,
    )  # fmt: skip
    num_left_out = 0  # of this rank
    for step in bar:
        started = time.perf_counter()
        micro_batches = [next_batch(batches) for _ in range(accumulation)]
        normalisers = step_normalisers(micro_batches, config, device)
        waited = time.perf_counter() - started

        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule(step, num_steps, stage.warmup_ratio)
        totals: dict[str, float] = {}
        for index, batch in enumerate(micro_batches):
            if world_size > 1:
                ddp.require_backward_grad_sync = index == accumulation - 1
            losses = micro_batch_losses(ddp, batch.to(device), normalisers, config)
            sum(losses.values()).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + float(loss.detach())
            report_left_out(batch, num_left_out)
            num_left_out += len(batch.left_out)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), stage.clip_norm)
        totals = distributed.sum_over_ranks(totals, device)
        totals = {name: total / world_size for name, total in totals.items()}
        check_finite(step, sum(totals.values()), grad_norm, micro_batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - started
        if is_main:
            record = {"stage": number, "step": step, "task": micro_batches[0].task}
            record |= {"loss": sum(totals.values())} | totals
            record |= {"grad_norm": float(grad_norm), "lr": optimizer.param_groups[-1]["lr"]}
            record |= {"images_per_second": stage.global_batch_size / seconds}
            record |= {"data_seconds": waited, "memory_gb": peak_memory(device)}
            with (options.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            bar.write(step_line(record))
        is_last = step + 1 == num_steps
        if is_main and ((step + 1) % config.save_every == 0 or is_last):
            training = {"optimizer": optimizer.state_dict()}
            save_checkpoint(out, model, config, model.tokenizer, number, step + 1, training)
    counts = distributed.sum_over_ranks({"left_out": float(num_left_out)}, device)
    if counts["left_out"]:
        say(f"{counts['left_out']:.0f} samples were left out, refused or bad, and others drawn")
    distributed.barrier()  # no rank may look for a checkpoint that is still being written
    return model


def open_mixture(
    number: int,
    config: Config,
    options: argparse.Namespace,
    processor: Processor,
    report: Callable[[str], None],
) -> Mixture:
    """The stage's datasets, reported, and the classes of the generic one noted in `config`."""
    stage, phrasings = config.stages[number], read_phrasings(config.phrasings)
    datasets = [
        open_dataset(name, options.data, number == 1, phrasings, options.skip_bad)
        for name in stage.datasets
    ]
    mixture = Mixture(datasets, processor, stage, config.seed, options.skip_bad)
    for dataset, factor in zip(datasets, mixture.factors, strict=True):
        left_out = [f"{count} {reason}" for reason, count in (+dataset.left_out).items()]
        left_out += [f"{len(dataset.problems)} bad records"] if dataset.problems else []
        without = f"; left out: {', '.join(left_out)}" if left_out else ""
        report(f"{dataset.name}: {len(dataset)} samples x {factor:.2f}{without}")
    generic = [dataset for dataset in datasets if isinstance(dataset, Generic)]
    if generic:
        config.categories = generic[0].categories
    for dataset in generic if number == 1 else ():
        if len(dataset.names) != config.model.num_classes:
            raise ValueError(
                f"{dataset.annotations} has {len(dataset.names)} categories, num_classes is "
                f"{config.model.num_classes}"
            )
    return mixture


def next_batch(batches: Iterator[Batch | ValueError]) -> Batch:
    """The next micro-batch; a bad record, which the loader hands on, ends the run."""
    batch = next(batches)
    if isinstance(batch, ValueError):
        raise batch
    return batch


def report_left_out(batch: Batch, num_before: int) -> None:
    """Says why records are not in a batch, for the first few; the end of the stage counts all."""
    for reason in batch.left_out[: max(0, MOST_REASONS - num_before)]:
        tqdm.write(f"left out: {reason}")


def step_normalisers(batches: list[Batch], config: Config, device: torch.device) -> Normalisers:
    """Targets, class weights and answer tokens of the whole step, as a mean over ranks."""
    totals = {"masks": 0.0, "class_weight": 0.0, "tokens": 0.0}
    for batch in batches:
        counts = [len(target.labels) for target in batch.targets]
        for name, value in count_targets(counts, config.model.num_queries, config.loss).items():
            totals[name] += value
        if batch.labels is not None:
            totals["tokens"] += int((batch.labels[:, 1:] >= 0).sum())
    totals = distributed.sum_over_ranks(totals, device)
    share = distributed.world_size()
    return Normalisers(**{name: max(value / share, 1e-6) for name, value in totals.items()})


def micro_batch_losses(
    model: nn.Module, batch: Batch, normalisers: Normalisers, config: Config
) -> dict[str, torch.Tensor]:
    """Weighted losses of one micro-batch; over a step's micro-batches and ranks they add up."""
    device = batch.seg_pixels.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        outputs = model(batch)
    weights = {
        "class": config.loss.class_weight,
        "mask": config.loss.mask_weight,
        "dice": config.loss.dice_weight,
    }
    # Every rank has the same names, also where no phrase of its batch is in the image.
    losses = (
        {} if batch.task == "chat" else {name: torch.zeros((), device=device) for name in weights}
    )
    if outputs.predictions is not None:
        generators = [torch.Generator(device).manual_seed(seed) for seed in batch.run_seeds]
        parts = segmentation_losses(
            outputs.predictions, batch.targets, generators, normalisers, config.loss
        )
        losses = {name: weights[name] * loss for name, loss in parts.items()}
    if outputs.token_loss is not None:
        losses["text"] = outputs.token_loss / normalisers.tokens
    return losses


def check_finite(step: int, loss: float, grad_norm: torch.Tensor, batches: list[Batch]) -> None:
    if not math.isfinite(loss) or not torch.isfinite(grad_norm):
        names = [sample.sample_id for batch in batches for sample in batch.samples]
        raise FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {float(grad_norm)}; its samples are "
            + ", ".join(names)
        )


# ---- what a person sees --------------------------------------------------------------------------


def step_line(record: dict) -> str:
    names = [name for name in ("class", "mask", "dice", "text") if name in record]
    losses = " ".join(f"{name} {record[name]:.3f}" for name in names)
    return (
        f"stage {record['stage']} step {record['step']} {record['task']}: "
        f"loss {record['loss']:.3f} ({losses}) norm {record['grad_norm']:.2f} "
        f"lr {record['lr']:.1e} {record['images_per_second']:.1f} images/s "
        f"data {record['data_seconds']:.2f} s memory {record['memory_gb']:.1f} GB"
    )


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GB: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak / 1e6


def drop_metrics(path: Path, stage: int, step: int) -> None:
    """Forgets the lines that a resumed run is going to write again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a killed run was writing
        if (record["stage"], record["step"]) < (stage, step):
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


def draw_metrics(out: Path) -> None:
    """OUT/curves.png: the losses of each stage."""
    charts = []
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for number in sorted({record["stage"] for record in records}):
        of_stage = [record for record in records if record["stage"] == number]
        series = {}
        for name in ("loss", "class", "mask", "dice", "text"):
            points = [(record["step"], record[name]) for record in of_stage if name in record]
            if points:
                series[name] = tuple(map(list, zip(*points, strict=True)))
        charts.append(draw.draw_curves(series, f"stage {number}", log_scale=True))
    draw.stack(charts).save(out / "curves.png")


def draw_prediction(sample: Sample, prediction: Prediction) -> Image.Image:
    """Ground truth beside prediction; what is shown to the model beside both."""
    question = textwrap.shorten(sample.turns[0][0], 200, placeholder=" …")
    if sample.task == "chat":
        picture = draw.draw_segments(sample.image, sample.masks, [])
        return draw.side_by_side([picture], [f"{question}\n{prediction.answer}"])
    labels = [sample.names[label] for label in sample.labels]
    # Of visual grounding every pair of query and class is predicted, most with next to no score.
    found = prediction.draw(min_score=0.3 if sample.task == "vgd" else 0.0)
    pictures = [draw.draw_segments(sample.image, sample.masks, labels), found]
    titles = [f"ground truth: {question}", f"prediction {prediction.answer}".strip()]
    if sample.regions is not None:
        shown = sample.names[: len(sample.regions)]
        pictures.insert(0, draw.draw_segments(sample.image, sample.regions, shown))
        titles.insert(0, "shown")
    return draw.side_by_side(pictures, titles)


def score(column: str, model: Segmentor | XSAM, options: argparse.Namespace) -> None:
    """Evaluates `model`, adds the column to OUT/results.json and results.md, draws pictures."""
    tasks = model.settings.eval_tasks if isinstance(model, XSAM) else ("panoptic",)
    results = read_results(options.out)
    results[column] = {}
    pictures = options.out / "pictures"
    pictures.mkdir(exist_ok=True)
    for task in tasks:
        count = math.ceil(model.settings.num_pictures / distributed.world_size())
        count = 0 if column == UNTRAINED else count
        results[column][task], kept = evaluate(model, task, options.data, num_kept=count)
        for index, sample, prediction in kept:
            name = f"{column.replace(' ', '')}_{task}_{index:05d}.png"
            draw_prediction(sample, prediction).save(pictures / name)
    if distributed.rank() == 0:
        # The last column's figures stand at the top level: {"panoptic": {"PQ": …}, …}.
        document = results[column] | {"columns": results}
        path = options.out / "results.json"
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")
        text = table(results)
        (options.out / "results.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}", flush=True)
    distributed.barrier()


def read_results(out: Path) -> dict:
    path = out / "results.json"
    return json.loads(path.read_text(encoding="utf-8"))["columns"] if path.is_file() else {}


# ---- the run -------------------------------------------------------------------------------------


def run(options: argparse.Namespace, config: Config) -> None:
    device = distributed.start()
    if distributed.rank() == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "config.json"
        path.write_text(json.dumps(config.to_dict(), indent=1), encoding="utf-8")
    # Two ranks make the toy world and its weights side by side; transformers writes on the first.
    last_rank = distributed.world_size() - 1
    if options.makes_data and not options.data.exists() and distributed.rank() == min(1, last_rank):
        toy.write_world(options.data, seed=config.seed)
    if options.makes_weights and not options.weights.exists() and distributed.rank() == 0:
        toy.write_weights(options.weights, config.model, seed=config.seed)
    distributed.barrier()

    if config.eval_tasks and UNTRAINED not in read_results(options.out):
        torch.manual_seed(config.seed)
        model = pretrained_model(options.stages[-1], config, options.weights, lambda _: None)
        score(UNTRAINED, model.to(device), options)
    for number in options.stages:
        model = train_stage(number, config, options, device)
        if config.eval_tasks and number != 2 and f"stage {number}" not in read_results(options.out):
            score(f"stage {number}", model, options)
    if distributed.rank() == 0:
        draw_metrics(options.out)
        print(f"\nwrote {options.out}")


def main(options: argparse.Namespace, config: Config) -> int:
    try:
        run(options, config)
    except (ValueError, FloatingPointError) as error:
        print(f"xsam/train.py: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        distributed.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main(OPTIONS, CONFIG))
