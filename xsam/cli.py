"""The command lines: flags from the configuration's dataclasses, and what a run needs on the disk.

Nothing here imports torch, so that a wrong flag or a missing file costs a second.
"""

import argparse
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from xsam.config import (
    ARCHITECTURES,
    NEW_PARTS,
    PARTS,
    Config,
    Dtype,
    ModelConfig,
    build_value,
    is_in,
    origins,
    part_names,
    small,
    stage_folder,
    xsam,
)
from xsam.datasets import sources
from xsam.files import check_target
from xsam.tasks import TASKS
from xsam.toy.preset import toy

DEVICES = ("cpu", "cuda", "mps")

CONFIGS = {"xsam": xsam, "small": small, "toy": toy}

KNOWN = {  # what a field may name, told in its help
    **{part: tuple(names) for part, names in ARCHITECTURES.items() if part != "decoder"},
    "learning_rates": PARTS,
    "eval_tasks": tuple(sources.sets_by_task()),
}

# Numbers of the configuration that have to be more than 0, and those that are 1 at most; none is
# negative.
POSITIVE = {
    *("global_batch_size", "micro_batch_size", "epochs", "clip_norm", "num_points", "num_queries"),
    *("oversample_ratio", "num_classes", "save_every", "keep_checkpoints", "num_validation"),
    *("eval_batch_size", "max_new_tokens", "seg_heads", "decoder_heads"),
}
SHARES = {"warmup_ratio", "lora_dropout", "flip_probability", "importance_ratio"}
SHARES |= {"score_threshold", "overlap_threshold", "presence", "held_out"}


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
        return tuple(typing.get_args(kind)[0](part.strip()) for part in text.split(",") if part)
    if origin is dict:
        try:
            return build_value(kind, json.loads(text), "value")
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected a JSON object, not {text!r}") from error
    return kind(text)


NO_FLAGS = ("name", "model", "stages", "loss", "categories", "init")  # fields of Config


def field_comments(kind: type) -> dict[str, str]:
    """The comment of each field of a dataclass in its source: that beside the field, or else the
    lines right above it."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        code, _, comment = line.partition("# ")
        if not code.strip() and comment and not comment.startswith("----"):
            above.append(comment)
            continue
        if entry := re.match(r" {4}(\w+): ", code):
            comments[entry[1]] = comment or " ".join(above)
        above = []
    return comments


def add_config_flags(parser: argparse.ArgumentParser, preset: Config) -> set[str]:
    """`--FIELD VALUE` for every field of the configuration, its help from the comment in config.py
    and the preset's value; a stage's field goes to each stage of the run. Returns the fields."""
    names = set()
    owners = {"model": [preset.model], "stage": [*preset.stages.values()]}
    owners |= {"loss": [preset.loss], "run": [preset]}
    for title, rows in owners.items():
        kind = type(rows[0])
        group = parser.add_argument_group(f"{title} fields")
        hints, comments = typing.get_type_hints(kind), field_comments(kind)
        for name in (name for name in hints if name not in NO_FLAGS):
            convert = lambda text, hint=hints[name]: _parse(hint, text)  # noqa: E731
            convert.__name__ = getattr(hints[name], "__name__", str(hints[name]))
            known = f"; known: {', '.join(KNOWN[name])}" if name in KNOWN else ""
            default = _default([getattr(row, name) for row in rows])
            group.add_argument(
                f"--{name}",
                type=convert,
                default=argparse.SUPPRESS,
                metavar=_metavar(hints[name]),
                help=f"{comments[name]}{known} (default: {default})".replace("%", "%%"),
            )
            names.add(name)
    return names


def _default(values: list) -> str:
    """A field's value as its flag takes it, or the values of the stages where they differ."""
    texts = [
        json.dumps(value) if isinstance(value, (dict, bool)) else
        ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for value in values
    ]  # fmt: skip
    if len(set(texts)) == 1:
        return texts[0] or "empty"
    return "; ".join(f"stage {n} {text or 'empty'}" for n, text in enumerate(texts, 1))


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """`--device`, as train, evaluate, predict and demo take it."""
    text = "where to compute (default: cuda where there is a GPU, else cpu); mps is untested"
    parser.add_argument("--device", choices=DEVICES, help=text)


def add_checkpoint_flags(parser: argparse.ArgumentParser, is_required: bool = True) -> None:
    """Which checkpoint a command reads, where to, and how it makes masks: the arguments of
    `inference.load_checkpoint`, and `inference_changes`."""
    add, rules = parser.add_argument, typing.get_args(Config.__annotations__["panoptic_rule"])
    text = "a step_N folder, its stage's or its run's (the newest of the last stage), one of "
    text += "save_pretrained, or a published X-SAM checkpoint"
    add("--checkpoint", type=Path, required=is_required, metavar="PATH", help=text)
    text = "the language model's Hugging Face folder, for a published checkpoint without one"
    add("--tokenizer", type=Path, metavar="DIR", help=text)
    text = "names of tensors, as on disk, that the checkpoint may lack; may be repeated"
    add("--allow-missing", action="append", default=[], metavar="PREFIX", help=text)
    add_device_flag(parser)
    text = "of the weights (default: as they are stored); bfloat16 computes under autocast"
    add("--dtype", choices=typing.get_args(Dtype), help=text)
    text = "hold the language model's matrices in so many bits (needs bitsandbytes)"
    add("--llm-bits", type=int, choices=(4, 8), help=text)
    text = "of a checkpoint with adapters: where its base is, if not where it was"
    add("--base", type=Path, metavar="PATH", help=text)
    text = "how panoptic masks are made: mask2former (default), or that of the published code, "
    add("--panoptic-rule", choices=rules, help=f"{text}with a score threshold of 0")
    text = "refer, reason: a phrase whose best score is below it has no mask (default: the "
    text += "checkpoint's; of the paper 0: every phrase has one; of the toy 0.5)"
    add("--presence", type=share, metavar="SCORE", help=text)


def inference_changes(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the configuration that the flags of `add_checkpoint_flags` change."""
    rule = options.panoptic_rule
    changes = {} if rule is None else {"panoptic_rule": rule}
    changes |= {} if options.presence is None else {"presence": options.presence}
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


def count(text: str) -> int:
    """A flag's whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def share(text: str) -> float:
    """A flag's number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return float(text)


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, once for all ranks of a machine. A flag that is given twice is
    an error, since one of the two would be lost; but of a field of the configuration that takes
    one value the last counts, as scripts expect."""

    def parse_known_args(self, args=None, namespace=None):
        for stream in (sys.stdout, sys.stderr):  # of a terminal or file without all letters
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        args = sys.argv[1:] if args is None else list(args)
        given = Counter(arg.partition("=")[0] for arg in map(str, args))
        for action in self._actions:
            is_field = action.default is argparse.SUPPRESS and "," not in (action.metavar or "")
            may_repeat = is_field or isinstance(action, argparse._AppendAction)
            if not may_repeat and sum(given[flag] for flag in action.option_strings) > 1:
                self.error(f"{'/'.join(action.option_strings)} is given more than once")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"{self.prog}: {message} (--help has the flags)", file=sys.stderr, flush=True)
        sys.exit(2)


def train_parser(arguments: list[str]) -> tuple[Parser, set[str], Config]:
    """The flags of xsam/train.py, those among them that are fields of the configuration, and the
    preset that `arguments` name, whose values are the defaults."""
    which = Parser(prog="xsam/train.py", add_help=False, allow_abbrev=False)
    which.add_argument(
        "--config",
        choices=tuple(CONFIGS),
        default="xsam",
        help="preset; with --help, whose values are listed (default: %(default)s)",
    )
    preset = CONFIGS[which.parse_known_args(arguments)[0].config]()
    parser = Parser(
        prog="xsam/train.py",
        usage="%(prog)s --stage {1,2,3,all} [--config PRESET] [--FLAG VALUE ...]",
        parents=[which],
        description="Trains X-SAM; runs under torchrun or alone.",
        epilog="example: torchrun --nproc_per_node 2 xsam/train.py --config toy --stage all "
        "--out runs/toy",
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = "what to train: segmentor, projectors, everything, or one after the other"
    add("--stage", choices=("1", "2", "3", "all"), required=True, help=text)
    add("--data", type=Path, metavar="DIR", help="data root (default: datas; toy makes its own)")
    text = "folder of Hugging Face folders (default: weights; toy makes its own)"
    add("--weights", type=Path, metavar="DIR", help=text)
    add("--out", type=Path, metavar="DIR", help="run folder (default: runs/CONFIG)")
    repeated = {"action": "append", "default": []}
    text = "checkpoint to start from in place of the earlier stages' in --out, ours or a published "
    text += "X-SAM one, whole or a stage's part; may be repeated"
    add("--init", type=Path, metavar="PATH", help=text, **repeated)
    text = "names of tensors, as on disk, that a checkpoint of --init may lack; may be repeated"
    add("--allow-missing", metavar="PREFIX", help=text, **repeated)
    add("--resume", action="store_true", help="go on from the last checkpoint, if any")
    add_device_flag(parser)
    text = "print parameters, memory per GPU, steps and time of the run, and exit; needs no data"
    add("--plan", action="store_true", help=text)
    add("--gpus", type=count, metavar="N", help="GPUs of --plan (default: 8)")
    add("--gpu-memory", type=float, metavar="GB", help="memory of a GPU of --plan (default: 80)")
    text = "of --plan: speed of all GPUs together, as measured (default: by their peak)"
    add("--images-per-second", type=float, metavar="X", help=text)
    add("--skip-bad", action="store_true", help="train without bad records; they are counted")
    return parser, add_config_flags(parser, preset), preset


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """The flags of xsam/train.py, with the folders that they leave open, and the configuration:
    checked as far as the command line alone, and the checkpoints of --init, can be."""
    parser, fields, preset = train_parser(arguments)
    options = parser.parse_args(arguments)
    flags = {name: vars(options).pop(name) for name in fields & vars(options).keys()}
    if flags.get("eval_tasks") == ("none",):
        flags["eval_tasks"] = ()
    options.given = set(flags)
    options.stages = [1, 2, 3] if options.stage == "all" else [int(options.stage)]
    options.out = options.out or Path("runs") / options.config
    # The toy preset draws its own world where the user points at none.
    is_toy, world = options.config == "toy", options.out / "world"
    options.makes_data = is_toy and options.data is None
    options.makes_weights = is_toy and options.weights is None
    options.data = options.data or (world / "data" if is_toy else Path("datas"))
    options.weights = options.weights or (world / "weights" if is_toy else Path("weights"))
    options.brought = {}  # the parts that --init gives to the first stage, and its paths
    options.replaced = set()  # those that no public folder is needed for
    try:
        check_flags(options, flags)
        config = configure(options, flags, preset)
        check_config(options, flags, config)
        if options.init and all(path.exists() for path in options.init):
            from xsam.starts import inspect_init  # the first that imports torch

            preset, options.brought, options.replaced = inspect_init(
                preset, options.init, options.stages[0]
            )
            config = configure(options, flags, preset)
        if options.brought or not options.init:  # else the missing paths are listed next
            check_beginnings(options, flags, config)
    except ValueError as error:
        parser.error(str(error))
    return options, config


def configure(options: argparse.Namespace, flags: dict[str, Any], preset: Config) -> Config:
    """The preset with the values of the flags."""
    config = preset.resolve(options.stages, **flags)
    first, *others = flags.get("datasets") or ("",)
    for number in options.stages if first.startswith("+") else ():
        names = *preset.stages[number].datasets, first.removeprefix("+"), *others
        config = config.resolve([number], datasets=tuple(dict.fromkeys(names)))
    if 2 in options.stages:  # it trains two small projectors, whole
        config = config.resolve([2], lora_rank=0)
    config = share_out(config, options.stages, flags)
    if options.init:  # in place of what the first stage would start from
        config = config.resolve(options.stages[:1], starts_from=())
        config = config.resolve(init=tuple(map(str, options.init)))
    return config


def share_out(config: Config, stages: list[int], flags: dict[str, Any]) -> Config:
    """The configuration with the share of own files that is held out, and with all of these among
    what is scored, unless --eval_tasks says what that is: in place of the preset's tasks, where
    they are trained on in place of its sets."""
    cut, own = (config.held_out, config.seed), []
    for number in stages:
        datasets = [sources.hold_out(name, *cut) for name in config.stages[number].datasets]
        config = config.resolve([number], datasets=tuple(datasets))
        own += filter(sources.is_own, datasets)
    names = []
    for name in config.eval_tasks:  # one of which a share is held out means both
        rest = sources.hold_out(name, *cut)
        names += sources.with_held_out(rest) if rest != name else [name]
    if own and "eval_tasks" not in flags:
        is_added = flags["datasets"][0].startswith("+")
        names = [*names * is_added, *(each for name in own for each in sources.with_held_out(name))]
    return config.resolve(eval_tasks=tuple(dict.fromkeys(names)))


def refuse(what: object, message: str) -> None:
    """Raises ValueError with a message where something is wrong, that is not empty or 0."""
    if what:
        raise ValueError(message)


def check_flags(options: argparse.Namespace, flags: dict[str, Any]) -> None:
    """Raises ValueError at a flag that the run would not look at, or look at another way."""
    for name in ("gpus", "gpu_memory", "images_per_second"):
        value, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        refuse(value is not None and not options.plan, f"{flag} is for --plan")
        wrong = value is not None and not 0 < value < math.inf
        refuse(wrong, f"{flag} is {value}; it has to be more than 0")
    unused = options.allow_missing and not options.init
    refuse(unused, "--allow-missing is for the checkpoints of --init")
    if starts_from := flags.get("starts_from"):
        refuse(options.init, "--init is in place of --starts_from: give one of them")
        earlier = set(range(1, min(3, options.stages[0])))
        refuse(set(starts_from) - earlier, f"--starts_from is {starts_from}: not earlier stages")


def check_config(options: argparse.Namespace, flags: dict[str, Any], config: Config) -> None:
    """Raises ValueError at a value that no run can have, or a name that matches nothing."""
    rows = config, config.model, config.loss, *(config.stages[each] for each in options.stages)
    for name, value in (item for row in rows for item in vars(row).items()):
        if isinstance(value, (int, float)):
            least = "more than 0" if name in POSITIVE else "0 or more"
            is_sound = (value > 0 or (value == 0 and name not in POSITIVE)) and value < math.inf
            refuse(not is_sound, f"{name} is {value}; it has to be {least}")
            refuse(name in SHARES and value > 1, f"{name} is {value}; it is 1 at most")
    is_idle = flags.get("eval_tasks") and not sources.run_sets(config, options.stages, options.data)
    refuse(is_idle, f"eval_tasks: stage {options.stage} is scored on none of these")
    is_idle = config.validate_every and not config.eval_tasks
    refuse(is_idle, "validate_every: name the tasks to validate with --eval_tasks")
    if config.phrasings:
        from xsam.prompts import read_phrasings

        read_phrasings(config.phrasings)
    refuse(config.llm_bits not in (0, 4, 8), f"llm_bits is {config.llm_bits}, not 0, 4 or 8")
    idle = config.llm_bits and options.stages == [1]
    refuse(idle, "llm_bits: stage 1 has no language model")
    ranks = [config.stages[number].lora_rank for number in options.stages]
    idle = [x for x in flags if x.startswith("lora_") and x != "lora_rank" and not any(ranks)]
    refuse(idle, f"{', '.join(idle)}: without --lora_rank there are no adapters")
    idle = flags.get("lora_rank") and not any(ranks)
    refuse(idle, "lora_rank: stage 2 trains its projectors whole")
    refuse(config.held_out == 1, "held_out is 1: nothing is left to train on")
    names = [name for number in options.stages for name in config.stages[number].datasets]
    idle = config.held_out and not any(map(sources.is_own, [*names, *config.eval_tasks]))
    refuse(idle, "held_out is for files of your own, and --datasets has none")
    wrong = config.optimizer_bits not in (8, 32)
    refuse(wrong, f"optimizer_bits is {config.optimizer_bits}, not 8 or 32")
    parts = part_names(config.model, options.stages[-1])
    for key in filter(None, flags.get("learning_rates", ())):
        wrong = f"learning_rates: no part {key!r}; parts are {', '.join(parts)}"
        refuse(key.endswith(".") or not _touches(key, parts), wrong)
    check_sizes(config.model)
    for number in options.stages:
        check_stage(number, config)


def check_sizes(model: ModelConfig) -> None:
    """Raises ValueError at sizes that contradict each other, which no part looks at before it
    runs."""
    own = () if model.seg_backbone_config else ("connector_layers", "seg_global_blocks")
    for name in own:
        most = model.seg_depth - (name == "seg_global_blocks")  # hidden state 0 is before block 0
        wrong = [index for index in getattr(model, name) if not 0 <= index <= most]
        refuse(wrong, f"{name} has {wrong}; of an encoder of depth {model.seg_depth} 0 to {most}")
    for part in ("seg", "decoder") if own else ("decoder",):
        dim, heads = getattr(model, f"{part}_dim"), getattr(model, f"{part}_heads")
        refuse(dim % heads, f"{part}_dim {dim} is not a multiple of {part}_heads {heads}")


def _touches(key: str, parts: Iterable[str]) -> bool:
    """Whether a key of `learning_rates` is of one of the parts, or of modules inside or around."""
    return any(is_in(part, key) or is_in(key, part) for part in parts)


def check_stage(number: int, config: Config) -> None:
    """Raises ValueError where a stage cannot train as it is configured."""
    stage, where = config.stages[number], f"stage {number}"
    is_whole = any(is_in(each, "llm") for each in stage.lora_whole) or not stage.lora_rank
    is_trained = number > 1 and is_whole and stage.learning_rate("llm") > 0
    refuse(config.llm_bits and is_trained, f"{where}: llm_bits is for a frozen llm: --lora_rank")
    refuse(not stage.datasets, f"{where}: datasets names none")
    scales = stage.scale_range
    wrong = scales and not (len(scales) == 2 and 0 < scales[0] <= scales[1] < math.inf)
    refuse(wrong, f"{where}: scale_range is {scales}, not a least and a largest scale, or empty")
    for name in stage.datasets:
        task = sources.find_source(name).task  # of a file of one's own it is in the file
        is_other = number == 1 and task and TASKS[task].needs != "categories"
        refuse(is_other, f"{where} learns classes from generic sets alone; {name} is of {task}")
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    refuse(
        stage.global_batch_size % (stage.micro_batch_size * num_processes),
        f"{where}: global_batch_size {stage.global_batch_size} is not a multiple of "
        f"micro_batch_size {stage.micro_batch_size} x {num_processes} processes",
    )
    rates, parts = stage.learning_rates, part_names(config.model, number)
    wrong = [rate for rate in rates.values() if not 0 <= rate < math.inf]
    refuse(wrong, f"{where}: a learning rate in {wrong}")
    bare = ", ".join(part for part in parts if not any(is_in(part, key) for key in rates))
    refuse(bare, f'{where}: learning_rates has none for {bare}; "" is for all others')
    used = [rate for key, rate in rates.items() if _touches(key, parts)]
    refuse(not any(used), f"{where}: learning_rates leaves nothing to train")


def check_beginnings(options: argparse.Namespace, flags: dict[str, Any], config: Config) -> None:
    """Raises ValueError where a stage would begin with a random part that it does not train, or not
    from nothing by design."""
    first = options.stages[0]
    strange = ", ".join(sorted(options.brought.keys() - set(part_names(config.model, first))))
    refuse(strange, f"--init holds {strange}, which stage {first} has not")
    for number in options.stages:
        stage, brought = config.stages[number], options.brought if number == first else {}
        new = [part for part, origin in origins(config, number, brought).items() if not origin]
        texts = {name for name, task in TASKS.items() if not task.has_masks}
        if number == 2 and {sources.find_source(name).task for name in stage.datasets} <= texts:
            new = []  # chat has no use for them, and a checkpoint of stage 2 does not hold them
        is_meant = flags.get("starts_from") == () and options.stage == "3"  # table 8, row "S3"
        allowed = new if is_meant else NEW_PARTS[number]
        wrong = [part for part in new if part not in allowed or not stage.learning_rate(part)]
        refuse(
            wrong,
            f"stage {number} begins with random {', '.join(wrong)}, and does not train that from "
            "nothing: give --init a checkpoint that has it (or --starts_from= where it is meant)",
        )


def preflight(options: argparse.Namespace, config: Config) -> str:
    """What stands in the way of the run, as one message; empty where nothing does."""
    try:
        check_target(options.out, is_folder=True)
    except ValueError as error:
        return str(error)
    folders = options.data, options.weights, options.out
    required = sources.required_paths(config, options.stages, *folders, options.replaced)
    options.makes_data &= any(options.data in path.parents for path, _ in required)
    options.makes_weights &= any(options.weights in path.parents for path, _ in required)
    made = [options.data] * options.makes_data + [options.weights] * options.makes_weights
    made = [root for root in made if not root.exists()]
    required += [(path, "the checkpoint of --init") for path in options.init]
    missing = [
        (path, about)
        for path, about in required
        if not path.exists()
        and ("your own" in about or not any(root in path.parents for root in made))
    ]
    if missing:
        lines = [f"{len(missing)} missing; put each where it belongs:"]
        lines += [f"  {path}\n      {about}" for path, about in missing]
        return "\n".join(lines)
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
        from xsam.starts import follow_classes

        limits = options.gpus or 8, options.gpu_memory or 80.0, options.images_per_second
        try:
            config = follow_classes(config, options)
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
    from xsam.checkpoints import find_checkpoint
    from xsam.starts import follow_classes, outline

    try:
        config = follow_classes(config, options)
        outlines = [outline(number, config, options) for number in options.stages]
    except (ValueError, OSError) as error:
        return complain(str(error), is_met_by_all=True)
    if int(os.environ.get("RANK", 0)) == 0:
        one = (config.resolve(eval_tasks=(word,)) for word in config.eval_tasks)
        words = [x.eval_tasks[0] for x in one if sources.run_sets(x, options.stages, options.data)]
        print("\n".join([*outlines, f"scored on: {', '.join(words) or 'nothing'}"]), flush=True)
        for number in options.stages if options.resume else ():
            last = find_checkpoint(stage_folder(options.out, number)).name
            last = last if last.startswith("step_") else "its beginning: no checkpoint yet"
            print(f"--resume: stage {number} goes on from {last}", flush=True)
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
    ends every rank as soon as one fails, and the first may not have printed it yet."""
    rank = int(os.environ.get("RANK", 0))
    if is_met_by_all and int(os.environ.get("LOCAL_RANK", 0)) > 0:
        return 0
    whose = f"rank {rank}: " if rank and not is_met_by_all else ""
    print(f"xsam/train.py: {whose}{message}", file=sys.stderr, flush=True)
    return 2
