"""Reading and writing weights: Hugging Face folders and our own checkpoints.

A checkpoint is a folder `step_N` with `model.safetensors`, `config.json` (stage, step and the whole
configuration), the tokenizer and `training.pt` (optimizer). It is written under another name and
renamed, so a folder that can be seen is whole. Loading is strict: every name that is missing,
unexpected or of another shape is listed, and nothing is loaded.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from xsam.config import Config
from xsam.encoders import ImageEncoder, SamEncoder, resize_positions
from xsam.llm import LanguageModel

MODEL_FILE, CONFIG_FILE, TRAINING_FILE, LATEST_FILE = (
    "model.safetensors",
    "config.json",
    "training.pt",
    "latest",
)


# ---- state dicts ---------------------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one file. Raises ValueError where the file is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from error


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Tensors of a Hugging Face folder, in one file or several behind an index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read_safetensors(folder / MODEL_FILE)
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    state = {}
    for file in sorted(set(names.values())):
        state |= read_safetensors(folder / file)
    return state


def load_state(module: nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """Strict load. Raises ValueError that lists what does not fit, before anything is changed.

    A tensor that the module knows by two names (tied embeddings) is expected under the first.
    """
    own = module.state_dict()
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tied = names - {name for name, _ in module.named_parameters()}
    problems = [f"missing: {name}" for name in own if name not in state and name not in tied]
    problems += [f"unexpected: {name}" for name in state if name not in own]
    problems += [
        f"shape: {name} is {list(tensor.shape)}, the model has {list(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        listed = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{source} does not fit the model:\n  {listed}{more}")
    module.load_state_dict(state, strict=False)


# ---- Hugging Face folders ------------------------------------------------------------------------


def load_sam_encoder(encoder: SamEncoder, folder: Path) -> None:
    """The vision encoder of a SAM folder; what belongs to SAM's own prompts and masks is left.

    For another input size the position embedding and the relative positions are interpolated.
    """
    prefix = "vision_encoder."
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in read_folder(folder).items()
        if name.startswith(prefix)
    }
    for name, own in encoder.state_dict().items():
        if name in state and state[name].shape != own.shape and "pos" in name:
            state[name] = resize_positions(state[name], own.shape)
    load_state(encoder, state, folder)


def load_transformers(part: ImageEncoder | LanguageModel, folder: Path) -> None:
    """Weights of a transformers folder into a part that wraps that model."""
    kind = type(part.model)
    try:
        model, report = kind.from_pretrained(folder, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder}: no weights of {kind.__name__} could be read ({error})"
        ) from error
    if report["missing_keys"] or report["mismatched_keys"]:
        names = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
        raise ValueError(f"{folder} does not fit {kind.__name__}; missing: {', '.join(names[:20])}")
    load_state(part.model, model.state_dict(), folder)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no tokenizer could be read ({error})") from error


# ---- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    config: Config,
    tokenizer: PreTrainedTokenizerBase | None,
    stage: int,
    step: int,
    training: dict,
) -> Path:
    """Writes folder/step_N with what the stage trains and points `latest` at it.

    Stage 2 writes the projectors alone: all else is as the folders it began with have it.
    """
    target = folder / f"step_{step}"
    temporary = folder / f".step_{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    state = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if stage != 2 or parameter.requires_grad
    }
    save_file(state, temporary / MODEL_FILE, metadata={"format": "pt"})
    torch.save(training, temporary / TRAINING_FILE)
    header = {"stage": stage, "step": step, "config": config.to_dict()}
    (temporary / CONFIG_FILE).write_text(json.dumps(header, indent=1), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)

    pointer = folder / f".{LATEST_FILE}.tmp"
    pointer.write_text(target.name, encoding="utf-8")
    os.replace(pointer, folder / LATEST_FILE)
    kept = sorted(folder.glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
    for old in kept[: -config.keep_checkpoints]:
        shutil.rmtree(old)
    return target


def load_trained(model: nn.Module, folder: Path) -> None:
    """What `save_checkpoint` wrote, over what the model holds."""
    state = read_safetensors(folder / MODEL_FILE)
    frozen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and name not in state
    }
    load_state(model, frozen | state, folder)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a stage's folder, None where there is none."""
    pointer = folder / LATEST_FILE
    if not pointer.is_file():
        return None
    return folder / pointer.read_text(encoding="utf-8").strip()


def read_header(folder: Path) -> dict:
    """{"stage", "step", "config"} of a checkpoint. Raises ValueError where it is none."""
    try:
        header = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return {
            "stage": int(header["stage"]),
            "step": int(header["step"]),
            "config": Config.from_dict(header["config"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not a checkpoint of this library ({error!r})") from error


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
    ]
    if different:
        raise ValueError(
            f"{folder}: a checkpoint of the preset {header['config'].name!r} with another model: "
            + "; ".join(different[:5])
        )
    return header
