"""Reading and writing weights: Hugging Face folders, the published X-SAM checkpoints, our own.

On disk every tensor has one name, that of the published checkpoints; `NAMES` is the table. Loading
is strict: whatever is missing, unexpected or of another shape is listed, and nothing is loaded.
Files are looked through first and then read memory-mapped, a few tensors at a time, straight into
parameters that may still be on the meta device: the host never holds the weights twice.
"""

import contextlib
import hashlib
import json
import pickle
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from xsam.config import Config, part_name
from xsam.encoders import resize_positions, transformers_config
from xsam.files import give_rights, read_bytes, read_json
from xsam.llm import render_conversation

MODEL_FILE, BIN_FILE, CONFIG_FILE = "model.safetensors", "pytorch_model.bin", "config.json"

SHARD_BYTES = 5 * 10**9  # largest file written

MAPPED_BYTES = 16 * 2**20  # of a file read before it is opened anew


# ---- names ---------------------------------------------------------------------------------------

# (pattern, replacement), applied in this order to a name of ours, or of any public file whose
# part's prefix has been put before it. The outcome is the name on disk.
ARCHIVED_NAMES = (  # what the archived release calls otherwise
    (r"^visual_encoder\.", "vision_encoder."),
    (r"^segmentor\.logit_scale$", "segmentor.class_predictor.logit_scale"),
    (r"^segmentor\.class_predictor\.(weight|bias)$", r"segmentor.class_predictor.predictor.\1"),
)

NAMES = (
    *ARCHIVED_NAMES,
    # our modules
    (r"^image_encoder\.model\.", "vision_encoder."),
    (r"^image_projector\.", "visual_projector."),
    (r"^segmentor\.connector\.", "seg_connector."),
    (r"^segmentor\.class_head\.", "segmentor.class_predictor."),
    (r"^background_embedding\.", "bg_embeds."),
    (r"^llm\.model\.(model|lm_head)\.", r"llm.\1."),
    (r"^segmentor\.encoder\.model\.", "segmentor.encoder."),
    # transformers, which has changed names inside its modules but not those of the public files
    (r"^vision_encoder\.(?!vision_model\.)", "vision_encoder.vision_model."),
    (r"^segmentor\.encoder\.swin\.", "segmentor.encoder."),
    (r"(\.blocks\.\d+\.attention)\.q_proj\.", r"\1.self.query."),
    (r"(\.blocks\.\d+\.attention)\.k_proj\.", r"\1.self.key."),
    (r"(\.blocks\.\d+\.attention)\.v_proj\.", r"\1.self.value."),
    (r"(\.blocks\.\d+\.attention)\.o_proj\.", r"\1.output.dense."),
    (r"(\.blocks\.\d+\.attention)\.relative_position_bias\.", r"\1.self."),
    (r"(\.blocks\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"(\.blocks\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
)

POSITIONS = ("pos_embed", "rel_pos_h", "rel_pos_w")  # ends of the names of SAM's position tables

EMBEDDING, OUTPUT = "llm.model.embed_tokens.weight", "llm.lm_head.weight"  # the vocabulary's tables

# Names on disk of what no model of ours has: buffers that are computed, the norm behind Swin's last
# scale, the position code of SAM's prompts and the class weights of the published criterion.
UNUSED = re.compile(
    r"\.(rotary_emb\.inv_freq|position_ids|relative_position_index)$"
    r"|^segmentor\.encoder\.layernorm\."
    r"|^segmentor\.(criterion|prompt_encoder|shared_image_embedding)\."
)

# What a part's names begin with in a Hugging Face folder, by the model_type of its config.json.
FOLDERS = {
    "seg_encoder": {
        "sam": "vision_encoder.",
        "sam_vision_model": "vision_encoder.",
        "mask2former": "model.pixel_level_module.encoder.",
        "swin": "",
    },
    "image_encoder": {
        "siglip": "vision_model.",
        "siglip_vision_model": "",
        "clip": "vision_model.",
        "clip_vision_model": "",
    },
    "llm": {"phi3": "", "qwen3": "", "llama": ""},
}

# What they begin with in the whole model.
PREFIXES = {"seg_encoder": "segmentor.encoder.", "image_encoder": "image_encoder.", "llm": "llm."}


def disk_name(name: str) -> str:
    """The name of a tensor on disk, from ours (whole model) or any public one."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


# ---- files ---------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor that lies in a file."""

    file: Path
    name: str
    shape: tuple[int, ...]


@contextlib.contextmanager
def open_tensors(file: Path) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """Names and memory-mapped tensors of a safetensors file or a pickled state dict, of which
    nothing but tensors is accepted. Raises ValueError that names the file and what it is."""
    start, unknown = read_bytes(file, 200), "damaged, cut short or no weights; fetch it again"
    if re.fullmatch(rb"[\s -~]+", start):
        raise ValueError(f"{file}: a text, no weights: it begins {start[:40]!r}")
    if file.suffix == ".safetensors" or start[8:9] == b"{":  # after the length of its header
        try:
            opened = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: {unknown} ({error})") from error
        with opened:
            yield {name: lambda n=name: opened.get_tensor(n) for name in opened.keys()}  # noqa: SIM118
        return
    try:
        is_zip = zipfile.is_zipfile(file)  # only torch's zip format can be mapped
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)", str(error))
        if what is None and (start[0] != 0x80 or "truncated" in str(error)):
            raise ValueError(f"{file}: {unknown}") from error
        what = f" ({what[1]})" if what else ""
        raise ValueError(
            f"{file}: holds more than tensors{what}; nothing of it was run. Have a trusted copy of "
            "it written as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{file}: {unknown} ({error})") from error
    for wrapper in ("state_dict", "module"):  # as trainers save it
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{file}: not a state dict: it holds more than named tensors")
    yield {name: lambda n=name: state[n] for name in state}


def list_tensors(path: Path) -> dict[str, Stored]:
    """What lies in a file, or in a folder's model.safetensors or pytorch_model.bin, in one piece or
    behind an index. Reads no values."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    files, placed = [path], {}
    if path.is_dir():
        candidates = [path / MODEL_FILE, path / BIN_FILE]
        indices = [file.with_name(f"{file.name}.index.json") for file in candidates]
        files = [file for file in candidates if file.is_file()][:1]
        index = next((index for index in indices if index.is_file()), None)
        if not files and index is not None:
            placed = read_json(index, dict).get("weight_map")
            if not isinstance(placed, dict):
                raise ValueError(f"{index}: not an index of weights, it has no weight_map")
            files = [path / file for file in sorted(set(placed.values()))]
        if not files:
            names = ", ".join(file.name for file in candidates)
            raise ValueError(f"{path}: no weights; looked for {names} and their .index.json")
    found = {}
    for file in files:
        with open_tensors(file) as tensors:
            for name, read in tensors.items():
                if placed.get(name, file.name) == file.name:
                    found[name] = Stored(file, name, tuple(read().shape))
    absent = [f"{name} in {file}" for name, file in placed.items() if name not in found]
    if absent:
        raise ValueError(f"{path}: its index names what is not there: {', '.join(absent[:5])}")
    return found


def read_tensors(wanted: list[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """Tensors one by one. A file is opened anew every so often, which gives its pages back."""
    wanted = sorted(wanted, key=lambda stored: (stored.file, stored.name))
    while wanted:
        size = 0
        with open_tensors(wanted[0].file) as tensors:
            file = wanted[0].file
            while wanted and wanted[0].file == file and size < MAPPED_BYTES:
                tensor = tensors[wanted[0].name]()
                size += tensor.nbytes
                yield wanted.pop(0), tensor
                del tensor


# ---- loading -------------------------------------------------------------------------------------


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have shapes instead of parameters, to be filled by `load_tensors`.
    Buffers are real: the computed ones are in no file."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def load_tensors(
    module: nn.Module,
    stored: dict[str, Stored],
    source: Path | str,
    prefix: str = "",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **rules,
) -> str:
    """Fills `module`, whose names begin with `prefix` in the whole model, strictly from `stored`.

    What has no values yet is made on `device` in `dtype` (None: as stored); what has them keeps its
    own. `rules` are those of `_match`. Returns lines that say what went where. Raises ValueError
    that lists what does not fit, before anything is changed.
    """
    fills, problems, notes = _match(module, stored, source, prefix, **rules)
    if problems:
        listed = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{source} does not fit the model:\n  {listed}{more}")
    for entry, tensor in read_tensors(list(fills)):
        _fill(module, fills[entry], tensor, dtype, device)

    counts, sizes = Counter(), Counter()
    for entry, names in fills.items():
        part = part_name(prefix + names[0])
        counts[part] += 1
        sizes[part] += torch.Size(entry.shape).numel()
    lines = [f"loaded {source}"]
    lines += [f"  {counts[part]:>5} tensors {sizes[part]:>13,} -> {part}" for part in counts]
    for what, names in notes.items():
        more = ", …" if len(names) > 5 else ""
        lines.append(f"  {len(names):>5} {what}: {', '.join(sorted(names)[:5])}{more}")
    return "\n".join(lines)


def _names_on_disk(
    targets: dict[str, Tensor], prefix: str, only: tuple[str, ...]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The names of a module's tensors by the name on disk that fills them (several where weights
    are tied), and the further names on disk of tied weights with the first."""
    first_name: dict[int, str] = {}  # of each parameter, on disk
    own: dict[str, list[str]] = {}
    tied: dict[str, str] = {}
    for name, target in targets.items():
        on_disk = disk_name(prefix + name)
        first = first_name.setdefault(id(target), on_disk)
        if on_disk.startswith(only or ""):
            own.setdefault(first, []).append(name)
        if first != on_disk:
            tied[on_disk] = first
    return own, tied


def _match(
    module: nn.Module,
    stored: dict[str, Stored],
    source: Path | str,
    prefix: str,
    only: tuple[str, ...] = (),
    allow_missing: tuple[str, ...] = (),
    resize: bool = False,
    short_vocabulary: bool = False,
) -> tuple[dict[Stored, list[str]], list[str], dict[str, list[str]]]:
    """Which stored tensor fills which of the module's (several names where weights are tied), what
    does not fit, and what a person should be told.

    `only`: beginnings of the names on disk that are to be filled, () for all. `allow_missing`:
    beginnings of names that may be absent and then stay as they are. `resize`: SAM's positions
    may be of another length. `short_vocabulary`: the tables of words may lack their last rows.
    """
    targets = module.state_dict(keep_vars=True)
    own, tied = _names_on_disk(targets, prefix, only)
    fills, problems, notes, seen = {}, [], defaultdict(list), {}
    for begin in allow_missing:
        if not any(disk_name(prefix + name).startswith(begin) for name in targets):
            problems.append(f"allow_missing: no tensor of the model begins with {begin!r}")
    for name, entry in stored.items():
        on_disk = disk_name(name)
        if UNUSED.search(on_disk) or tied.get(on_disk) in own:
            notes["not used"].append(on_disk)
            continue
        if on_disk in seen:
            problems.append(f"twice: {on_disk}, as {seen[on_disk]} and {name}")
        seen[on_disk] = name
        if on_disk not in own:
            problems.append(f"unexpected: {on_disk} in {entry.file}")
            continue
        fills[entry] = own[on_disk]
        shape = tuple(targets[own[on_disk][0]].shape)
        if entry.shape == shape or (entry.shape == () and shape == (1,)):
            continue
        is_table = short_vocabulary and on_disk in (EMBEDDING, OUTPUT) and entry.shape < shape
        is_position = resize and on_disk.endswith(POSITIONS)
        if entry.shape[-1:] == shape[-1:] and (is_table or is_position):
            notes["resized"].append(on_disk)
        else:
            problems.append(
                f"shape: {on_disk} is {list(entry.shape)} in {entry.file}, "
                f"the model has {list(shape)}"
            )
    for on_disk in own.keys() - seen.keys():
        if allow_missing and on_disk.startswith(allow_missing):
            notes["missing, as allowed"].append(on_disk)
        else:
            problems.append(f"missing: {on_disk} in {source}")
    return fills, sorted(problems), notes


@torch.no_grad()
def _fill(
    module: nn.Module,
    names: list[str],
    tensor: Tensor,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    owner, _, attribute = names[0].rpartition(".")
    target = getattr(module.get_submodule(owner), attribute)
    if target.is_meta:
        values = torch.empty(target.shape, dtype=dtype or tensor.dtype, device=device)
        target = nn.Parameter(values, target.requires_grad)
        for name in names:
            owner, _, attribute = name.rpartition(".")
            module.get_submodule(owner).register_parameter(attribute, target)
    if tensor.shape == target.shape or tensor.dim() == 0:  # [] fills [1]
        target.copy_(tensor)
    elif names[0].endswith(POSITIONS):  # [1, H, W, C] or [2L-1, C], of another length
        target.copy_(resize_positions(tensor, target.shape))
    else:  # [words, C]; the last rows stay as they are
        target[: len(tensor)] = tensor.to(target)


# ---- Hugging Face folders ------------------------------------------------------------------------


def read_model_type(folder: Path, part: str) -> str:
    """model_type of a folder's config.json, if it is one of a `part` ("seg_encoder", …)."""
    model_type = read_json(folder / CONFIG_FILE, dict).get("model_type")
    if model_type is None:
        raise ValueError(f"{folder / CONFIG_FILE}: not of a Hugging Face model, no model_type")
    if model_type not in FOLDERS[part]:
        known = ", ".join(FOLDERS[part])
        raise ValueError(f"{folder}: a {model_type} model; as {part} known are {known}")
    return model_type


def part_of_folder(folder: Path) -> str | None:
    """The part of the model whose Hugging Face folder this is; None where it is none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    model_type = read_json(path, dict).get("model_type")
    return next((part for part, types in FOLDERS.items() if model_type in types), None)


def complete_architecture(config: Config, part: str, folder: Path) -> Config:
    """`config` with what the folder of the image encoder or the language model says of itself: its
    config.json, and of its preprocessor_config.json mean, deviation and resampling. Raises
    ValueError where `config` says otherwise."""
    read_model_type(folder, part)
    theirs = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    values = getattr(theirs, "vision_config", theirs).to_diff_dict()
    configured = getattr(config.model, f"{part}_config")
    ours = transformers_config(configured).to_diff_dict() if configured else {}
    named = {"rope_parameters" if name == "rope_theta" else name for name in configured}
    named.discard("vocab_size")  # an earlier stage may have grown it for the special tokens
    different = [
        f"{name} is {values.get(name)!r}, the configuration has {ours[name]!r}"
        for name in sorted(named)
        if values.get(name) != ours[name]
    ]
    if different:
        raise ValueError(f"{folder}: another {part} than configured: {'; '.join(different[:5])}")
    for name in ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"):
        values.pop(name, None)
    changes = {f"{part}_config": values}

    path = folder / "preprocessor_config.json"
    if part == "image_encoder" and path.is_file():
        found = read_json(path, dict)
        for name in ("image_mean", "image_std"):
            changes[name] = tuple(found.get(name, getattr(config.model, name)))
        resample = {2: "bilinear", 3: "bicubic"}.get(found.get("resample"))
        changes["image_resample"] = resample or config.model.image_resample
    return config.resolve(**changes)


def load_folder(
    module: nn.Module, part: str, folder: Path, dtype: torch.dtype | None = None
) -> str:
    """Fills a part from its Hugging Face folder; what else the folder holds is counted. Returns the
    line that says so."""
    inside = FOLDERS[part][read_model_type(folder, part)]
    found = list_tensors(folder)
    stored = {
        f"{PREFIXES[part]}model.{name.removeprefix(inside)}": entry
        for name, entry in found.items()
        if name.startswith(inside)
    }
    others = Counter(name.split(".")[0] for name in found if not name.startswith(inside))
    if not stored:
        raise ValueError(f"{folder}: no tensor's name begins with {inside}")
    line = load_tensors(module, stored, folder, PREFIXES[part], dtype=dtype, resize=True)
    rest = ", ".join(f"{name} ({count})" for name, count in others.items())
    return line + (f"\n  {others.total():>5} left in the folder: {rest}" if rest else "")


TOKENIZER_FILES = (  # begin with
    *("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges"),
    *("config.json", "generation_config.json"),
)

# Vicuna's folders hold no template; this is FastChat's vicuna_v1.1, with which it was trained.
VICUNA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.{% endif %}{{ ' ' }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'] + ' ' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer with its chat template, or Vicuna's own where the folder is named after
    it and has none. Raises ValueError where it lacks words, a template or what reads them, or
    where the template changes what is said."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no tokenizer could be read (no such folder)")
    for file in sorted(folder.iterdir()):
        if file.name.startswith(TOKENIZER_FILES) and file.is_file():
            read_bytes(file, 200)  # says what is wrong with it
    model = folder / "tokenizer.model"
    try:
        if model.is_file() and not (folder / "tokenizer.json").is_file():
            import google.protobuf  # noqa: F401
            import sentencepiece

            sentencepiece.SentencePieceProcessor(model_file=str(model))
        names = {path.name for path in folder.iterdir()}
        if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}:
            raise ValueError("tokenizer.json, which has its words, is missing")
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{model}: is read by sentencepiece and protobuf: pip install 'xsam[sentencepiece]'"
        ) from error
    except Exception as error:  # the tokenizers library raises no other
        raise ValueError(f"{folder}: no tokenizer could be read ({error})") from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise ValueError(
            f"{folder}: its tokenizer has no words; tokenizer.json, or else tokenizer.model, or "
            "vocab.json and merges.txt, is missing or empty"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: its tokenizer names no eos_token (tokenizer_config.json)")
    if not tokenizer.chat_template and "vicuna" in folder.absolute().name.lower():
        tokenizer.chat_template = VICUNA_TEMPLATE
    if not tokenizer.chat_template:
        raise ValueError(
            f"{folder}: its tokenizer has no chat template; put the model's into "
            f"{folder / 'chat_template.jinja'}"
        )
    try:
        render_conversation(tokenizer, [("One?", "Two."), ("Three?", "Four."), ("Five?", None)])
    except Exception as error:  # a template is a program
        raise ValueError(f"{folder}: its chat template does not serve ({error})") from error
    return tokenizer


# ---- published checkpoints -----------------------------------------------------------------------


def read_published(stored: dict[str, Stored], path: Path) -> tuple[int, str, dict]:
    """Which published checkpoint lies in `path`: its stage (2: the projectors alone), its
    generation ("archived" or "current"), and the model fields in which its generation differs from
    the preset. Raises ValueError where it is none."""
    parts = {disk_name(name).split(".")[0] for name in stored}
    if "llm" in parts and "seg_connector" in parts:
        stage = 3
    elif "seg_connector" in parts:
        stage = 1
    elif parts <= {"visual_projector", "seg_projector", "segmentor"} and "seg_projector" in parts:
        stage = 2
    else:
        names = ", ".join(sorted(stored)[:3])
        raise ValueError(
            f"{path}: neither a checkpoint of ours (no {CONFIG_FILE}) nor a published X-SAM one; "
            f"its tensors have names such as {names}"
        )
    if any(re.match(pattern, name) for pattern, _ in ARCHIVED_NAMES for name in stored):
        return stage, "archived", {"logit_clamp": 500.0, "region_pooling": "max"}
    return stage, "current", {"num_region_vectors": 64}


# ---- writing -------------------------------------------------------------------------------------


def save_tensors(
    folder: Path, stem: str, tensors: dict[str, Tensor], max_shard_bytes: int = SHARD_BYTES
) -> dict[str, str]:
    """Tensors under the names given, in STEM.safetensors or, above the limit, in several files.
    Only one file's worth is copied to the host at a time. Returns the file of each name."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    placed = {}
    for number, names in enumerate(shards):
        part = f"-{number + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = folder / f"{stem}{part}.safetensors"
        on_host = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(on_host, file, metadata={"format": "pt"})
        give_rights(file)
        placed |= dict.fromkeys(names, file.name)
    return placed


def save_model(
    folder: Path, state: dict[str, Tensor], prefix: str = "", max_shard_bytes: int = SHARD_BYTES
) -> None:
    """A model's tensors under their names on disk, as model.safetensors or, above the limit, as
    several files and an index."""
    tensors = {disk_name(prefix + name): tensor for name, tensor in state.items()}
    placed = save_tensors(folder, MODEL_FILE.split(".")[0], tensors, max_shard_bytes)
    if len(set(placed.values())) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        text = json.dumps(index, indent=1)
        (folder / f"{MODEL_FILE}.index.json").write_text(text, encoding="utf-8")


def save_bin(
    folder: Path, model: nn.Module, prefix: str = "", num_words: int | None = None
) -> None:
    """A model's tensors as pytorch_model.bin, which the published code reads: one pickled dict,
    tied weights under both names. The tables of words are cut to `num_words` rows: that code passes
    over tables of another length than its tokenizer."""
    state = {disk_name(prefix + name): value.cpu() for name, value in model.state_dict().items()}
    for name in state.keys() & {EMBEDDING, OUTPUT}:
        state[name] = state[name][:num_words].clone()  # [num_words, C]; a view would bring all rows
    torch.save(state, folder / BIN_FILE)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds: parameters, those with two names once, and lasting buffers."""
    state = model.state_dict()
    twice = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    twice -= {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in state.items() if name not in twice}


def weights_digest(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A digest of the names, shapes and types of the weights, and of some 256 numbers of each. With
    a `dtype` numbers are rounded to it first, and copies in other types have the same digest."""
    digest = hashlib.sha256()
    for name, parameter in model.state_dict().items():
        flat = parameter.detach().flatten()  # [numbers]
        some = flat[:: max(1, len(flat) // 256)].to(dtype or flat.dtype).float().cpu().numpy()
        digest.update(f"{name} {list(parameter.shape)} {dtype or parameter.dtype}".encode())
        digest.update(some.tobytes())
    return digest.hexdigest()[:16]
