"""The command lines: flags from the configuration's dataclasses, and what a run needs on the disk.

Nothing here imports torch, so that a wrong flag or a missing file costs a second.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

from xsam.config import (
    Config,
    Dtype,
    LossConfig,
    ModelConfig,
    Stage,
    _build,
    stage_folder,
    xsam,
)
from xsam.datasets.sources import find_source, required_paths
from xsam.files import check_target
from xsam.toy.preset import toy

DEVICES = ("cpu", "cuda", "mps")


CONFIGS = {"xsam": xsam, "toy": toy}


def _parse(kind, text: str):
    """One flag's text as the type of its field: JSON for dicts, commas for tuples."""
    origin = typing.get_origin(kind) or kind
    if origin is Literal:
        if text not in typing.get_args(kind):
            choices = ", ".join(typing.get_args(kind))
            raise argparse.ArgumentTypeError(f"{text!r} is none of {choices}")
        return text
    if origin is bool:
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
        return text.lower() == "true"
    if origin is tuple:
        return tuple(typing.get_args(kind)[0](part) for part in text.split(",") if part)
    if origin is dict:
        try:
            return _build(kind, json.loads(text), "value")
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected a JSON object, not {text!r}") from error
    return kind(text)


def add_config_flags(parser: argparse.ArgumentParser) -> set[str]:
    """`--FIELD VALUE` for every field of the configuration; a stage's field goes to each stage of
    the run. Returns the fields."""
    names = set()
    for title, kind in (
        ("model", ModelConfig),
        ("stage", Stage),
        ("loss", LossConfig),
        ("run", Config),
    ):
        group = parser.add_argument_group(f"{title} fields (default: the value of --config)")
        hints = typing.get_type_hints(kind)
        for entry in dataclasses.fields(kind):
            if kind is Config and entry.name in ("name", "model", "stages", "loss", "categories"):
                continue
            convert = lambda text, hint=hints[entry.name]: _parse(hint, text)  # noqa: E731
            convert.__name__ = getattr(hints[entry.name], "__name__", str(hints[entry.name]))
            group.add_argument(
                f"--{entry.name}",
                type=convert,
                default=argparse.SUPPRESS,
                metavar=_metavar(hints[entry.name]),
            )
            names.add(entry.name)
    return names


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help="where to compute (default: cuda where there is a GPU, else cpu); mps is untested",
    )


def add_checkpoint_flags(parser: argparse.ArgumentParser, is_required: bool = True) -> None:
    """Which checkpoint a command reads, where to, and how it makes masks: the arguments of
    `inference.load_checkpoint`, and `inference_changes`."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=is_required,
        metavar="PATH",
        help="a step_N folder, one of save_pretrained, or a published X-SAM checkpoint",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="the language model's Hugging Face folder, for a published checkpoint without one",
    )
    parser.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="PREFIX",
        help="names of tensors, as on disk, that the checkpoint may lack; may be repeated",
    )
    add_device_flag(parser)
    parser.add_argument(
        "--dtype",
        choices=typing.get_args(Dtype),
        help="of the weights (default: as they are stored); bfloat16 computes under autocast",
    )
    parser.add_argument(
        "--panoptic-rule",
        choices=typing.get_args(Config.__annotations__["panoptic_rule"]),
        help="how panoptic masks are made: mask2former (default), or that of the published code, "
        "with a score threshold of 0",
    )


def inference_changes(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the configuration that the flags of `add_checkpoint_flags` change."""
    rule = options.panoptic_rule
    changes = {} if rule is None else {"panoptic_rule": rule}
    return changes | ({"score_threshold": 0.0} if rule == "published" else {})


def _metavar(hint) -> str:
    origin = typing.get_origin(hint) or hint
    if origin is Literal:
        return "|".join(typing.get_args(hint))
    if isinstance(hint, types.GenericAlias) and origin is tuple:
        return f"{typing.get_args(hint)[0].__name__.upper()},..."
    return {dict: "JSON", bool: "true|false"}.get(
        origin, getattr(origin, "__name__", "VALUE").upper()
    )


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        message = f"error: {message}\n{self.format_usage().rstrip()}"
        sys.exit(complain(message, is_met_by_all=True))


def train_parser() -> Parser:
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
    add_device_flag(parser)
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print parameters, memory per GPU, steps and time of the run, and exit; needs no data",
    )
    parser.add_argument("--gpus", type=int, default=8, help="of --plan (8)")
    parser.add_argument(
        "--gpu-memory", type=float, default=80.0, metavar="GB", help="of each, for --plan (80)"
    )
    parser.add_argument(
        "--images-per-second", type=float, metavar="X", help="of all GPUs, measured, for --plan"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="train without bad records; they are counted"
    )
    return parser


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """The flags of xsam/train.py, with the folders that they leave open, and the configuration."""
    parser = train_parser()
    fields = add_config_flags(parser)
    options = parser.parse_args(arguments)
    flags = {name: vars(options).pop(name) for name in fields & vars(options).keys()}
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
    try:
        config = CONFIGS[options.config]().resolve(options.stages, **flags)
    except ValueError as error:
        parser.error(str(error))
    if options.init:  # in place of what the first stage would start from
        config = config.resolve(options.stages[:1], starts_from=())
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
    folders = options.data, options.weights, options.out
    required = required_paths(config, options.stages, *folders, has_init=bool(options.init))
    made = [options.data] * options.makes_data + [options.weights] * options.makes_weights
    required += [(path, "the checkpoint of --init") for path in options.init]
    missing = [
        (path, about)
        for path, about in required
        if not path.exists() and not any(root in path.parents for root in made)
    ]
    if missing:
        lines = [f"{len(missing)} missing; put each where it belongs:"]
        lines += [f"  {path}\n      {about}" for path, about in missing]
        return "\n".join(lines)
    try:
        check_target(options.out, is_folder=True)
    except ValueError as error:
        return str(error)
    started = [n for n in options.stages if any(stage_folder(options.out, n).glob("step_*"))]
    if started and not options.resume:
        return (
            f"{stage_folder(options.out, started[0])} holds checkpoints already; "
            "go on with --resume or choose another --out"
        )
    return ""


def train_command(arguments: list[str] | None = None) -> int:
    """The command xsam/train.py, and the status that it ends with. Flags and paths are checked
    before what trains is imported."""
    options, config = parse(sys.argv[1:] if arguments is None else arguments)
    if options.plan:
        from xsam import plan

        limits = options.gpus, options.gpu_memory, options.images_per_second
        try:
            print(plan.report(config, options.stages, *limits, options.data))
        except (ValueError, OSError) as error:
            return complain(str(error))
        return 0
    if message := preflight(options, config):
        return complain(message, is_met_by_all=True)
    return run_training(options, config)


def run_training(options: argparse.Namespace, config: Config) -> int:
    """Trains, and turns what ends a run before its time into a message and a status."""
    from xsam import distributed, train

    try:
        train.run(options, config)
    except train.Stopped as stopped:
        name = signal.Signals(stopped.signal).name
        complain(f"{name}: {stopped}; go on with --resume", is_met_by_all=True)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        complain("interrupted, not in the middle of a stage", is_met_by_all=True)
        return 128 + signal.SIGINT
    except FloatingPointError as error:
        return complain(str(error), is_met_by_all=True)
    except (ValueError, OSError) as error:
        return complain(str(error))
    except RuntimeError as error:
        if not distributed.is_loss_of_a_rank(error):
            raise
        complain(f"lost contact with another rank: {error}")
        return 1
    finally:
        distributed.finish()
    return 0


def complain(message: str, is_met_by_all: bool = False) -> int:
    """Prints an error and returns the status 2. What all ranks meet is said by the first of each
    machine alone; of another the rank is named. Those that leave it to the first return 0: torchrun
    ends every rank as soon as one fails, and the first may not have spoken yet."""
    rank = int(os.environ.get("RANK", 0))
    if is_met_by_all and int(os.environ.get("LOCAL_RANK", 0)) > 0:
        return 0
    whose = f"rank {rank}: " if rank and not is_met_by_all else ""
    print(f"xsam/train.py: {whose}{message}", file=sys.stderr, flush=True)
    return 2
