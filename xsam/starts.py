"""What a stage of training begins with: the parts and where each is read from, said before anything
starts, and the checkpoints of --init, whole or in part (`train.starting_model` joins them)."""

import argparse
import dataclasses
import shutil
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import torch

from xsam import distributed, weights
from xsam.checkpoints import find_base, find_checkpoint, latest_checkpoint, read_header
from xsam.config import PARTS, Config, is_in, origins, part_name, part_names, stage_folder
from xsam.files import read_json
from xsam.lora import add_adapters
from xsam.model import XSAM, Segmentor
from xsam.optimizer import freeze
from xsam.tasks import TASKS


def outline(number: int, config: Config, options: argparse.Namespace) -> str:
    """A table of the parts that a stage begins with: their size, where they come from, and their
    peak learning rate. Raises ValueError where the configuration is of no model, or a file of one's
    own of no data set that the stage can train on."""
    from xsam.datasets.sources import find_source, recognise

    stage, is_first = config.stages[number], number == options.stages[0]
    for name in stage.datasets:
        task = (source := find_source(name)).task or recognise(source, options.data).task
        if number == 1 and TASKS[task].needs != "categories":
            raise ValueError(f"stage 1 learns classes from generic sets alone; {name} is of {task}")
    for part in ("image_encoder", "llm") if number > 1 else ():
        folder = options.weights / getattr(config.model, part)
        if folder.is_dir() and not (is_first and options.brought.get(part)):
            config = weights.complete_architecture(config, part, folder)
    with weights.parameters_on_meta():
        model = (Segmentor if number == 1 else XSAM)(config)
        if number > 1:
            model.llm.special_ids = (0, 1, 2)  # no tokenizer is read here
        freeze(model, stage, model.prefix)
        adapted = add_adapters(model, stage, model.prefix)
    parameters = {model.prefix + name: each for name, each in model.named_parameters()}
    if number == options.stages[-1]:  # an earlier stage may lack what the last one has
        _check_adapters(number, config, adapted, list(parameters))
    found = origins(config, number, options.brought if is_first else {})
    for path in filter(None, stage.learning_rates):
        is_there = any(is_in(name, path) for name in parameters)
        if part_name(path) in found and not is_there:
            raise ValueError(f"learning_rates: no module {path!r} in {part_name(path)}")
    sizes = Counter()
    for name, parameter in parameters.items():
        rate = stage.learning_rate(name) * parameter.requires_grad
        origin = "adapters" if ".lora." in name else found[part_name(name)] or "from nothing"
        sizes[part_name(name), rate, origin] += parameter.numel()
    still = {part_name(name) for name, each in parameters.items() if not each.requires_grad}
    if adapted and (new := sorted(part for part in still if not found[part])):
        raise ValueError(f"{', '.join(new)} starts from nothing: name it in lora_whole")
    lines = [f"stage {number} begins with"]
    for (part, rate, origin), size in sizes.items():
        rate = f"learning rate {rate:g}" if rate else "frozen"
        lines.append(f"  {part:24}{size / 1e6:9.2f} M  {rate:22}{origin}")
    trained, total = sum(n for (_, rate, _), n in sizes.items() if rate), sizes.total()
    lines.append(f"  trained: {trained / 1e6:.2f} of {total / 1e6:.2f} M ({trained / total:.1%})")
    return "\n".join(lines)


def _check_adapters(number: int, config: Config, adapted: bool, names: list[str]) -> None:
    """Raises ValueError where adapters are asked for and no layer has one, or something that is
    called by a name that none of the parameters' modules has."""
    stage, modules = config.stages[number], [name.rpartition(".")[0] for name in names]
    if stage.lora_rank and not adapted:
        targets = ", ".join(stage.lora_targets)
        raise ValueError(f"lora_targets {targets}: no linear layer of stage {number} to train")
    for path in (*stage.lora_targets, *stage.lora_whole) if adapted else ():
        if not any(is_in(name, path) or fnmatch(name, path) for name in modules):
            parts = ", ".join(part_names(config.model, number))
            message = f"lora_targets, lora_whole: nothing is called {path!r}; parts are {parts}"
            raise ValueError(message)


def name_base(model: Segmentor | XSAM, number: int, options: argparse.Namespace) -> dict[str, str]:
    """The base of the adapters that a stage is going to train, as a checkpoint's header has it: the
    path of the whole model that --init names, else of what the stage begins with, which is written
    to OUT/stageN/base once; and the digest of its weights."""
    about = {"digest": weights.weights_digest(model, torch.bfloat16)}
    inits = options.init if number == options.stages[0] else []
    if number == 3 and len(inits) == 1 and is_whole(inits[0]) and not options.allow_missing:
        path = inits[0]  # if it is not here, a Hugging Face repository's name
        return about | {"path": str(find_checkpoint(path).resolve() if path.exists() else path)}
    from xsam.inference import save_pretrained

    folder = stage_folder(options.out, number)
    with distributed.together(f"{folder / 'base'} could not be written", OSError):
        if distributed.rank() == 0 and latest_checkpoint(folder) is None:
            for each in (folder / "base", folder / ".base.tmp"):
                shutil.rmtree(each, ignore_errors=True)
            save_pretrained(model, folder / ".base.tmp")
            (folder / ".base.tmp").rename(folder / "base")
    return about | {"path": "../base"}


def inspect_init(
    preset: Config, paths: list[Path], stage: int
) -> tuple[Config, dict[str, str], set[str]]:
    """What the checkpoints of --init bring to a stage, from their names and headers: the preset,
    with the architecture of the first where that is a whole model, the path of each part, and the
    parts for which no public folder is needed any more."""
    brought = {part: str(path) for path in paths for part in init_parts(path, stage)}
    whole = [path for path in paths if is_whole(path)]
    if whole and whole != paths[:1]:
        raise ValueError(f"--init {whole[-1]} is a whole model: name it alone, or first and once")
    path = find_checkpoint(paths[0]) if paths else None
    if path and (header := own_header(path)):
        preset = dataclasses.replace(preset, model=header["config"].model)
    elif whole:
        preset = preset.resolve(**weights.read_published(weights.list_tensors(path), path)[2])
    if not whole:
        return preset, brought, {"segmentor.encoder"} & brought.keys()
    if stage == 1:  # its segmentor is taken out, without the class head
        brought = {part: brought[part] for part in PARTS[:4] if part in brought}
    return preset, brought, brought.keys() - ({"llm"} if not has_tokenizer(path) else set())


def follow_classes(config: Config, options: argparse.Namespace) -> Config:
    """For a stage 1 on a file of one's own: its categories, and as many classes. Where the
    checkpoint of --init has others, the class head is not among what that brings."""
    from xsam.datasets.base import read_categories
    from xsam.datasets.sources import find_source, locate, recognise

    source = find_source(config.stages[1].datasets[0])
    if 1 not in options.stages or source.format != "own":
        return config
    if recognise(source, options.data).task != "generic":
        return config  # `outline` says that it is of no use
    path = locate(options.data, source.annotations)
    records = read_categories(read_json(path, dict), str(path)).values()
    categories = tuple(category._asdict() for category in records)
    count, given = len(categories), config.model.num_classes
    if "num_classes" in options.given and given != count:
        raise ValueError(f"{path} has {count} categories, --num_classes is {given}: leave it out")
    config = config.resolve(categories=categories, num_classes=count)
    if options.init and not any(has_head(path, config) for path in options.init):
        options.brought.pop("segmentor.class_head", None)
    return config


def has_head(path: Path, config: Config) -> bool:
    """Whether a checkpoint of --init has the class head for a stage 1 whose classes are known."""
    header = own_header(find_checkpoint(path))
    is_first = header is not None and header["stage"] == 1
    return is_first and header["config"].categories == config.categories


def own_header(path: Path) -> dict | None:
    """The header of a checkpoint of ours; None of a published one, and of a part's folder."""
    is_ours = not weights.part_of_folder(path) and (path / weights.CONFIG_FILE).is_file()
    return read_header(path) if is_ours else None


def is_whole(path: Path) -> bool:
    """Whether a path of --init is a checkpoint with a language model, and so with all else."""
    return "llm" in init_parts(path, 3) and not weights.part_of_folder(find_checkpoint(path))


def init_parts(path: Path, stage: int) -> set[str]:
    """The parts that a path of --init has for the model of a stage."""
    path = find_checkpoint(path)
    if part := weights.part_of_folder(path):
        return {weights.PREFIXES[part].removesuffix(".")}
    stored, base = weights.list_tensors(path), find_base(path)
    if base is not None:
        stored = weights.list_tensors(base) | stored
    stored = stored if stage == 1 else without_class_head(stored)
    ours = {part_name(weights.disk_name(f"{part}.model.x")): part for part in PARTS}
    found = {part_name(weights.disk_name(name)) for name in stored}
    return {ours.get(part, part) for part in found}


def has_tokenizer(path: Path) -> bool:
    """Whether a checkpoint of --init holds the language model's words."""
    return any(find_checkpoint(path).glob("tokenizer*"))


def load_init(model: Segmentor | XSAM, path: Path, allow_missing: tuple[str, ...]) -> str:
    """What --init names, over what the model holds: a checkpoint, whole or a stage's part, of which
    every part must be there from its first tensor to its last, or the Hugging Face folder of an
    encoder or a language model. Returns the line that says so."""
    path = find_checkpoint(path)
    if part := weights.part_of_folder(path):
        segmentor = model if model.stage == 1 else model.segmentor
        modules = {"seg_encoder": segmentor.encoder}
        if model.stage != 1:
            modules |= {"image_encoder": model.image_encoder, "llm": model.llm}
        if modules.get(part) is None:
            raise ValueError(f"--init {path}: this model has no {part}")
        dtype = next(model.parameters()).dtype
        return weights.load_folder(modules[part], part, path, dtype=dtype)
    if find_base(path) is not None:
        raise ValueError(
            f"{path}: holds adapters, whose base has the rest; write the whole of it first: "
            f"python -m xsam.export {path} --out DIR"
        )
    stored, is_new = weights.list_tensors(path), False
    if model.stage != 1:
        stored = without_class_head(stored)
    elif is_whole(path) or (model.config.categories and not has_head(path, model.config)):
        is_new, stored = True, {name: at for name, at in stored.items() if is_below_head(name)}
    own = {weights.disk_name(model.prefix + name) for name in model.state_dict()}
    own = set(filter(is_below_head, own)) if is_new else own
    parts = {part_name(weights.disk_name(name)) for name in stored}
    only = tuple(name for name in own if part_name(name) in parts)
    options = {"only": only, "allow_missing": allow_missing, "short_vocabulary": True}
    said = weights.load_tensors(model, stored, path, model.prefix, **options)
    note = f"\n  the class head is new, of {model.config.model.num_classes} classes"
    return said + note * is_new


def is_below_head(name: str) -> bool:
    """Whether a tensor is of a segmentor, and not of its class head."""
    on_disk = weights.disk_name(name)
    is_head = ".class_predictor." in on_disk
    return on_disk.startswith(("segmentor.", "seg_connector.")) and not is_head


def without_class_head(stored: dict[str, weights.Stored]) -> dict[str, weights.Stored]:
    """The linear head of stage 1 has no place in stages 2 and 3."""
    linear, on_disk = "segmentor.class_predictor.predictor.", weights.disk_name
    return {name: at for name, at in stored.items() if not on_disk(name).startswith(linear)}
