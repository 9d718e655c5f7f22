"""What a stage of training begins with: the parts and where each is read from, said before anything
starts, and the checkpoints of --init, whole or in part (`train.starting_model` joins them)."""

import argparse
import dataclasses
from collections import Counter
from pathlib import Path

from xsam.checkpoints import find_checkpoint, read_header
from xsam.config import PARTS, Config, is_in, origins
from xsam.model import XSAM, Segmentor
from xsam.weights import (
    CONFIG_FILE,
    PREFIXES,
    Stored,
    complete_architecture,
    disk_name,
    list_tensors,
    load_folder,
    load_tensors,
    parameters_on_meta,
    part_name,
    part_of_folder,
    read_published,
)


def outline(number: int, config: Config, options: argparse.Namespace) -> str:
    """A table of the parts that a stage begins with: their size, where they come from, and their
    peak learning rate. Raises ValueError where the configuration is of no model, or a file of one's
    own of no data set that the stage can train on."""
    from xsam.datasets.registry import recognise
    from xsam.datasets.sources import find_source

    stage, is_first = config.stages[number], number == options.stages[0]
    for source in map(find_source, stage.datasets):
        task = source.task or recognise(source, options.data).task
        if number == 1 and task != "generic":
            raise ValueError(f"stage 1 learns classes from generic sets alone; {source.about}")
    for part in ("image_encoder", "llm") if number > 1 else ():
        folder = options.weights / getattr(config.model, part)
        if folder.is_dir() and not (is_first and options.brought.get(part)):
            config = complete_architecture(config, part, folder)
    with parameters_on_meta():
        model = (Segmentor if number == 1 else XSAM)(config)
    parameters = {model.prefix + name: size.numel() for name, size in model.named_parameters()}
    found = origins(config, number, options.brought if is_first else {})
    for path in filter(None, stage.learning_rates):
        is_there = any(is_in(name, path) for name in parameters)
        if part_name(path) in found and not is_there:
            raise ValueError(f"learning_rates: no module {path!r} in {part_name(path)}")
    sizes = Counter()
    for name, size in parameters.items():
        sizes[part_name(name), stage.learning_rate(name)] += size
    lines = [f"stage {number} begins with"]
    for (part, rate), size in sizes.items():
        rate = f"learning rate {rate:g}" if rate else "frozen"
        lines.append(f"  {part:24}{size / 1e6:9.2f} M  {rate:22}{found[part] or 'from nothing'}")
    return "\n".join(lines)


def inspect_init(
    preset: Config, paths: list[Path], stage: int
) -> tuple[Config, dict[str, str], set[str]]:
    """What the checkpoints of --init bring to a stage, from their names and headers: the preset,
    with the architecture of the first where that is a whole model, the path of each part, and the
    parts for which no public folder is needed any more."""
    brought = {part: str(path) for path in paths for part in init_parts(path, stage)}
    whole = [path for path in paths if is_whole(path)]
    if not whole:
        return preset, brought, {"segmentor.encoder"} & brought.keys()
    if whole != paths[:1]:
        raise ValueError(f"--init {whole[-1]} is a whole model: name it alone, or first and once")
    path = find_checkpoint(whole[0])
    if (path / CONFIG_FILE).is_file():
        preset = dataclasses.replace(preset, model=read_header(path)["config"].model)
    else:
        preset = preset.resolve(**read_published(list_tensors(path), path)[2])
    return preset, brought, brought.keys() - ({"llm"} if not has_tokenizer(path) else set())


def is_whole(path: Path) -> bool:
    """Whether a path of --init is a checkpoint with a language model, and so with all else."""
    return "llm" in init_parts(path, 3) and not part_of_folder(find_checkpoint(path))


def init_parts(path: Path, stage: int) -> set[str]:
    """The parts that a path of --init has for the model of a stage."""
    path = find_checkpoint(path)
    if part := part_of_folder(path):
        return {PREFIXES[part].removesuffix(".")}
    stored = list_tensors(path)
    stored = stored if stage == 1 else without_class_head(stored)
    ours = {part_name(disk_name(f"{part}.model.x")): part for part in PARTS}
    return {ours.get(each, each) for each in (part_name(disk_name(name)) for name in stored)}


def has_tokenizer(path: Path) -> bool:
    return any(find_checkpoint(path).glob("tokenizer*"))


def load_init(model: Segmentor | XSAM, path: Path, allow_missing: tuple[str, ...]) -> str:
    """What --init names, over what the model holds: a checkpoint, whole or a stage's part, of which
    every part must be there from its first tensor to its last, or the Hugging Face folder of an
    encoder or a language model. Returns the line that says so."""
    path = find_checkpoint(path)
    if part := part_of_folder(path):
        segmentor = model if model.stage == 1 else model.segmentor
        modules = {"seg_encoder": segmentor.encoder}
        if model.stage != 1:
            modules |= {"image_encoder": model.image_encoder, "llm": model.llm}
        if modules.get(part) is None:
            raise ValueError(f"--init {path}: this model has no {part}")
        dtype = next(model.parameters()).dtype
        return load_folder(modules[part], part, path, dtype=dtype)
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
