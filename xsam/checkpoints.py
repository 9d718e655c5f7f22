"""What a training run leaves to go on from, or to ask: whole folders or none.

A checkpoint is a folder `step_N` with the model's weights, the optimizer's states as each rank kept
them (any number of ranks reads them), the tokenizer and `config.json`: stage, step, the whole
configuration and every other file with its size. It is written by all ranks under another name,
flushed to the disk and renamed, so a folder with that name is whole whenever a run is killed, and
what fails while writing leaves the one before. `latest` names the newest, for people and scripts.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from xsam import distributed, weights
from xsam.config import Config
from xsam.files import read_json
from xsam.lora import has_adapters
from xsam.optimizer import MasterAdamW, plain_states
from xsam.weights import CONFIG_FILE, Stored

LATEST_FILE = "latest"

STATES_FILE = "optimizer"  # what the names of the files with the optimizer's states begin with

STATES_BYTES = 10**9  # largest of them

LANGUAGE_FIELDS = (  # of ModelConfig, begin with; not in stage 1
    *("image_", "llm", "max_text", "num_region", "region_", "seg_tokens", "logit_"),
)


# ---- writing -------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    config: Config,
    tokenizer: PreTrainedTokenizerBase | None,
    stage: int,
    step: int,
    states: dict[str, Tensor],
    num_skipped: int = 0,
    base: dict[str, str] | None = None,
) -> Path:
    """Writes folder/step_N with what the stage trains, points `latest` at it and keeps the newest
    `config.keep_checkpoints`. All ranks call it; each writes its own optimizer `states`.

    Stage 2 writes the projectors alone: all else is as the folders it began with have it. A model
    with adapters writes what is trained, and the `base` that it began with (lora.py). Raises
    OSError on every rank where one could not write; then all is as it was before.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    target, temporary = folder / f"step_{step}", folder / f".step_{step}.tmp"
    failed = f"{target} could not be written", OSError, SafetensorError
    try:
        with distributed.together(*failed):
            if rank == 0:
                _clear(folder)
                temporary.mkdir(parents=True)
        with distributed.together(*failed):
            stem = f"{STATES_FILE}-{rank + 1:05d}-of-{world_size:05d}"
            weights.save_tensors(temporary, stem, states, STATES_BYTES)
            if rank == 0:
                weights.save_model(temporary, _trained(model, stage), model.prefix)
                if tokenizer is not None:
                    _save_tokenizer(tokenizer, temporary)
            for path in temporary.glob(f"{stem}*"):
                _flush(path)
        with distributed.together(*failed):
            if rank == 0:
                files = _sizes(temporary)
                write_header(temporary, config, stage, step, num_skipped, files, base)
                _finish(temporary, target)
    except OSError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    # No rank goes on before: it may look for a checkpoint that is not there yet.
    with distributed.together(f"{target} is written, but `latest` or an older one is not", OSError):
        if rank == 0:
            point_latest(target)
            for old in _steps(folder)[: -config.keep_checkpoints]:
                _remove(old)
    return target


def check_space(folder: Path, model: nn.Module, stage: int) -> str:
    """What a checkpoint takes and the disk of `folder` has left, as a line. Raises OSError where it
    has not enough for one."""
    trained = [each for each in model.parameters() if each.requires_grad]
    needed = sum(tensor.nbytes for tensor in _trained(model, stage).values())
    needed += sum(each.numel() * (8 if each.dtype == torch.float32 else 12) for each in trained)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    line = f"a checkpoint takes {needed / 1e9:.3g} GB; {folder} has {free / 1e9:.3g} GB left"
    if needed > free:
        raise OSError(f"{line}: make room, or choose another --out")
    return line


def write_header(
    folder: Path,
    config: Config,
    stage: int,
    step: int,
    num_skipped: int = 0,
    files: dict[str, int] | None = None,
    base: dict[str, str] | None = None,
) -> None:
    """config.json of a checkpoint; `files` are the others, with their sizes in bytes."""
    header = {"stage": stage, "step": step, "skipped": num_skipped, "files": files or {}}
    header |= {"base": base} if base else {}
    text = json.dumps(header | {"config": config.to_dict()}, indent=1)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def point_latest(checkpoint: Path) -> None:
    """Makes the file `latest` beside a checkpoint name it."""
    pointer = checkpoint.parent / f".{LATEST_FILE}.tmp"
    pointer.write_text(checkpoint.name, encoding="utf-8")
    _flush(pointer)
    os.replace(pointer, checkpoint.parent / LATEST_FILE)
    _flush(checkpoint.parent)


def _trained(model: nn.Module, stage: int) -> dict[str, Tensor]:
    """What the checkpoint of a stage holds of the model."""
    state = weights.own_tensors(model)
    if stage != 2 and not has_adapters(model):
        return state
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    return {name: tensor for name, tensor in state.items() if name in trained}


def _clear(folder: Path) -> None:
    """Deletes what runs left that were killed while they wrote or deleted a checkpoint."""
    for kind in ("tmp", "old"):
        for path in folder.glob(f".step_*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises no other of a full disk
        raise OSError(f"the tokenizer: {error}") from error


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder, by its path in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _finish(temporary: Path, target: Path) -> None:
    """Gives a checkpoint its name once all of it is on the disk."""
    for name in _sizes(temporary):
        _flush(temporary / name)
    _flush(temporary)
    if target.exists():
        _remove(target)
    temporary.rename(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    """Deletes a checkpoint; one that is half gone does not bear its name."""
    going = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.rename(going)
    shutil.rmtree(going)


def _steps(folder: Path) -> list[Path]:
    """The checkpoints of a stage, the newest last."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


# ---- reading -------------------------------------------------------------------------------------


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a stage's folder, None where there is none. A run that was killed
    between writing it and pointing `latest` at it has it all the same."""
    return (_steps(folder) or [None])[-1]


def last_stage(path: Path) -> Path:
    """The folder of a run's last stage with a checkpoint; of all that is no run, itself."""
    return max(filter(latest_checkpoint, path.glob("stage[123]")), default=path)


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run's last stage, or of a stage; the copy of a Hugging Face
    repository that OWNER/NAME means, where no such folder is here; of all else, itself."""
    if not path.exists() and is_on_hub(path.as_posix()):
        path = download(path.as_posix())
    path = last_stage(path)
    return latest_checkpoint(path) or path


def is_on_hub(name: str) -> bool:
    """Whether a name can be OWNER/NAME of a Hugging Face repository."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def download(name: str) -> Path:
    """A Hugging Face repository's folder, from the hub or from what was fetched before. Raises
    ValueError where it cannot be had."""
    from huggingface_hub import snapshot_download  # comes with transformers

    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:  # no such repository, no right, no network, full disk
        cause = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name}: no such folder here, and no repository that can be fetched ({cause})"
        ) from error


def load_trained(model: nn.Module, folder: Path) -> str:
    """What `save_checkpoint` wrote, over what the model holds."""
    header, only = read_header(folder), ()
    if header["stage"] == 2 or header["base"]:
        parameters = model.named_parameters()
        trained = (name for name, value in parameters if value.requires_grad)
        only = tuple(weights.disk_name(model.prefix + name) for name in trained)
    stored = weights.list_tensors(folder)
    return weights.load_tensors(model, stored, folder, model.prefix, only=only)


def list_states(folder: Path) -> dict[str, Stored]:
    """Where the optimizer's states lie in a checkpoint, of all ranks that wrote it. Raises
    ValueError where a file of the checkpoint is missing or has not the size it was written with."""
    for name, size in read_header(folder)["files"].items():
        file = folder / name
        found = f"{file.stat().st_size:,} bytes" if file.is_file() else "missing"
        if found != f"{size:,} bytes":
            raise ValueError(
                f"{file}: {found}, was written with {size:,} bytes; copy it again, or remove "
                f"{folder} to go on from the checkpoint before"
            )
    found = {}
    for file in sorted(folder.glob(f"{STATES_FILE}-*.safetensors")):
        found |= weights.list_tensors(file)
    if not found:
        raise ValueError(
            f"{folder}: no {STATES_FILE}-*.safetensors in it; without the optimizer's states it "
            "can be asked, or given to --init, but not resumed"
        )
    return found


def read_header(folder: Path) -> dict:
    """{"stage", "step", "skipped", "files", "base", "config"} of a checkpoint; the base {"path",
    "digest"} of adapters, else {}. Raises ValueError where it is none."""
    header = None
    try:
        header = read_json(folder / CONFIG_FILE)
        return {
            "stage": int(header["stage"]),
            "step": int(header["step"]),
            "skipped": int(header.get("skipped", 0)),
            "files": dict(header.get("files", {})),
            "base": dict(header.get("base", {})),
            "config": Config.from_dict(header["config"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        if isinstance(header, dict) and "model_type" in header:
            reason = f"a Hugging Face folder of a {header['model_type']} model, a part at most"
        if isinstance(header, dict) and "stages" in header:
            reason = "a run's folder, without a checkpoint; those are in its stageN/step_M"
        raise ValueError(f"{folder}: not a checkpoint of this library ({reason})") from error


def find_base(folder: Path) -> Path | None:
    """The base of a checkpoint with adapters, None of one that is whole. Raises ValueError where it
    is not where it was."""
    base = read_header(folder)["base"] if (folder / CONFIG_FILE).is_file() else {}
    if not base:
        return None
    path = folder / base["path"]  # of one that is absolute, itself
    if path.exists() or is_on_hub(base["path"]):
        return find_checkpoint(path if path.exists() else Path(base["path"]))
    raise ValueError(
        f"{folder}: holds adapters, and their base is not at {base['path']} any more: put it "
        "there, or say where it is: --base of predict, evaluate and export, base= in Python"
    )


def check_checkpoint(folder: Path, config: Config, stage: int) -> dict:
    """The checkpoint's header, if it is of this stage and this model. Raises ValueError if not."""
    header = read_header(folder)
    if header["stage"] != stage:
        raise ValueError(
            f"{folder}: a checkpoint of stage {header['stage']}, needed is stage {stage}"
        )
    theirs, ours = header["config"].model, config.model
    different = [
        f"{name} is {value!r}, here {getattr(ours, name)!r}"
        for name, value in vars(theirs).items()
        if value != getattr(ours, name)
        and not (stage == 1 and name.startswith(LANGUAGE_FIELDS))
        and name != "num_classes"  # of a stage 1 that goes on, its own file says it
    ]
    if different:
        raise ValueError(
            f"{folder}: a checkpoint of the preset {header['config'].name!r} with another model: "
            + "; ".join(different[:5])
        )
    return header


# ---- the optimizer's states ----------------------------------------------------------------------


def own_shard(optimizer: torch.optim.Optimizer) -> MasterAdamW:
    """The part of the optimizer that this rank keeps."""
    return optimizer if isinstance(optimizer, MasterAdamW) else optimizer.optim


def state_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, prefix: str
) -> dict[str, Tensor]:
    """This rank's states under the names that they have on disk: "<parameter>:exp_avg", …"""
    shard = own_shard(optimizer)
    return {
        f"{weights.disk_name(prefix + name)}:{kind}": state
        for name, parameter in model.named_parameters()
        if parameter in shard.state
        for kind, state in plain_states(shard.state[parameter]).items()
    }


@torch.no_grad()
def fill_states(
    optimizer: torch.optim.Optimizer, model: nn.Module, prefix: str, stored: dict[str, Stored]
) -> None:
    """Fills this rank's states from files that any number of ranks wrote. A parameter of which none
    is stored had no step yet. Raises ValueError that names what is missing or of another shape."""
    shard = own_shard(optimizer)
    mine = {parameter for group in shard.param_groups for parameter in group["params"]}
    stepped, wanted = {name.rpartition(":")[0] for name in stored}, {}
    for name, parameter in model.named_parameters():
        on_disk = weights.disk_name(prefix + name)
        if parameter not in mine or on_disk not in stepped:
            continue
        for kind, state in plain_states(shard.start(parameter)).items():
            entry = stored.get(f"{on_disk}:{kind}")
            if entry is None or entry.shape != tuple(state.shape):
                found = "nothing" if entry is None else f"{list(entry.shape)} in {entry.file}"
                raise ValueError(f"{on_disk}:{kind} should be {list(state.shape)}, found {found}")
            wanted[entry] = state
    for entry, values in weights.read_tensors(list(wanted)):
        wanted[entry].copy_(values)
