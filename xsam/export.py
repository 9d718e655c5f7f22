"""Handing a model on: a folder with its weights, words and configuration, and a card that says what
it is; with --push also on the Hugging Face hub.

    python -m xsam.export runs/mine/stage3 --out mine
    python -m xsam.export runs/mine/stage3 --out mine --push OWNER/NAME --private --license mit
    python -m xsam.export runs/mine/stage3 --out theirs --bin

`XSAM.from_pretrained` and --checkpoint read the folder, or OWNER/NAME. The published X-SAM code
reads one pickled file of tensors: --bin writes that, pytorch_model.bin, in place of safetensors.
Each figure of the card is from a header or a results.json of the run; it has none of the paper's.
"""

import argparse
import re
import sys
import tempfile
import typing
from pathlib import Path
from typing import Any

import torch

from xsam.checkpoints import find_checkpoint, is_on_hub, latest_checkpoint, read_header
from xsam.cli import Parser
from xsam.config import ARCHITECTURES, PARTS, Config, Dtype, part_name, stage_folder
from xsam.datasets.sources import file_name
from xsam.evaluate import FOLDER, result_notes
from xsam.evaluation.benchmarks import table
from xsam.evaluation.prediction_files import ABOUT_FILE
from xsam.files import read_json
from xsam.inference import check_new_folder, load_checkpoint, save_pretrained
from xsam.model import XSAM, Segmentor
from xsam.weights import CONFIG_FILE, weights_digest

CARD_FILE = "README.md"

TEMPLATE = Path(__file__).with_name("model_card.md")

SHOWN_CLASSES = 20

OWNERS = {  # on the hub, of the folders that `config.ARCHITECTURES` names, by how those begin
    **{"sam-vit-": "facebook", "mask2former-swin-": "facebook", "siglip": "google"},
    **{"clip-vit-": "openai", "Phi-3-": "microsoft", "Qwen3-": "Qwen", "vicuna-": "lmsys"},
}

TAGS = "x-sam", "panoptic-segmentation", "referring-segmentation", "visual-question-answering"

WHAT = {  # by stage
    1: """A segmentor of X-SAM's architecture (arXiv 2508.04655), of its stage 1: it segments the
classes that it was trained on, as panoptic, instance or semantic masks, and reads no text.""",
    3: """A model of X-SAM's architecture (arXiv 2508.04655): it answers requests about a picture in
words and masks. It segments named classes, the object that a phrase or a question means, objects
like those under a point, box, scribble or mask, and what it names in a caption.""",
}

PYTHON = {
    1: """from xsam.inference import load_checkpoint, predict

model, _ = load_checkpoint("{name}")
result = predict(model, "photo.jpg", task="panoptic")""",
    3: """from xsam.model import XSAM

model = XSAM.from_pretrained("{name}")
result = model.predict("photo.jpg", task="refer", text="the {noun}")""",
}


# ---- what the run left ---------------------------------------------------------------------------


def read_record(checkpoint: Path | str, model: Segmentor | XSAM) -> dict[str, Any]:
    """What the disk has on how a checkpoint was made and scored, for `model_card`: "headers", its
    own and those of earlier stages beside it, and "results", a table in Markdown.

    `model` is the checkpoint's as it is stored. Of evaluate's results.json those of these very
    weights are taken, of training's the stage's column, where the checkpoint is its newest and the
    predictions beside, if any, are of these weights. Raises ValueError at a results.json of
    something else."""
    checkpoint = find_checkpoint(Path(checkpoint)).resolve()
    folders, headers, results = (checkpoint, *checkpoint.parents[:2]), [], ""
    is_newest = latest_checkpoint(stage_folder(folders[-1], model.stage)) == checkpoint
    if (checkpoint / CONFIG_FILE).is_file():
        headers = [read_header(checkpoint)]
        for stage in sorted(_stages_before(headers[0]), reverse=True) if is_newest else ():
            if (earlier := latest_checkpoint(stage_folder(folders[-1], stage))) is not None:
                headers.append(read_header(earlier))
    for path in (folder / "results.json" for folder in folders):
        if path.is_file() and not results:
            merged = headers[0]["step"] if headers and headers[0]["base"] else None
            results = _read_results(path, model, is_newest, merged)
    return {"headers": headers, "results": results}


def _read_results(path: Path, model: Segmentor | XSAM, is_newest: bool, merged: int | None) -> str:
    """The table of a results.json, "" where it has no figures of these weights. Training scores
    adapters that are not merged yet, whose predictions have another digest: of a model with
    `merged` ones their step tells."""
    found, column, digest = read_json(path, dict), f"stage {model.stage}", weights_digest(model)
    scored = path.parent.glob(f"{FOLDER}/stage{model.stage}/*/{ABOUT_FILE}")
    try:
        about, columns = found.pop("about", {}), found.get("columns", {})
        if about.get("weights") == digest:
            return table({about["column"]: found}, result_notes(about), with_paper=False)
        weights = {read_json(each, dict)["made_by"]["weights"] for each in scored}
        is_same = weights <= {digest} if merged is None else found["steps"].get(column) == merged
        if is_newest and column in columns and is_same:
            return table({column: columns[column]}, with_paper=False)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no results of this library ({error!r}); move it away") from error
    return ""


def _stages_before(header: dict) -> set[int]:
    """The earlier stages that a checkpoint comes from."""
    stages = header["config"].stages
    found = stages[header["stage"]].starts_from
    return {*found}.union(*(stages[stage].starts_from for stage in found))


# ---- the card ------------------------------------------------------------------------------------


def model_card(
    model: Segmentor | XSAM,
    name: str,
    license: str = "",
    headers: list[dict] | None = None,
    results: str = "",
) -> str:
    """The Markdown that the hub shows of a model: what `read_record` found, and what the model says
    of itself. `name` is what `from_pretrained` is given."""
    if not re.fullmatch(r"[a-z][a-z0-9.-]*|", license):
        raise ValueError(f"license {license!r}: not a name of the hub, such as apache-2.0 or mit")
    config, stage = model.config, model.stage
    kinds = ("seg_encoder", "image_encoder", "llm")[:stage]
    names = {kind: getattr(config.model, kind) for kind in kinds}
    known = [each for kind, each in names.items() if each in ARCHITECTURES[kind]]
    bases = [f"{OWNERS[x]}/{each}" for each in known for x in OWNERS if each.startswith(x)]
    front = [f"license: {license}"] if license else []
    front += ["tags:", *(f"- {tag}" for tag in (TAGS[:2] if stage == 1 else TAGS))]
    front += ["base_model:", *(f"- {base}" for base in bases)] if bases else []
    nouns = [each["name"] for each in config.categories]  # words that its tokenizer has
    noun = next((each for each in nouns if re.fullmatch(r"[\w -]+", each)), "object")
    request = "panoptic" if stage == 1 else f'refer "the {noun}"'
    presence = "Every phrase gets a mask, also one that means nothing in the picture."
    if config.presence:
        presence = f"A phrase whose best score is below {config.presence:g} gets no mask."
    nothing = "None: no results.json with figures of these weights lay beside the checkpoint."
    return TEMPLATE.read_text(encoding="utf-8").format(
        front="\n".join(front),
        name=name,
        title=name.rpartition("/")[2],
        what=WHAT[stage],
        parts=", ".join(each for each in names.values() if each != "none"),
        python=PYTHON[stage].format(name=name, noun=noun),
        request=request,
        recipe=_recipe(headers) if headers else "How it was trained is not known here.",
        parameters=_parameters(model),
        classes=_classes(config),
        results=results or nothing,
        presence=presence if stage == 3 else "",
        license="" if license else "\n\nNo license was named when this card was written.",
    )


def _recipe(headers: list[dict]) -> str:
    """A row for each stage of which there is a header, the newest last."""
    config = headers[0]["config"]
    lines = ["| stage | starts from | data | steps | batch | peak learning rates |"]
    lines.append("|---" * 6 + "|")
    for header in reversed(headers):
        stage, inits = header["config"].stages[header["stage"]], header["config"].init
        start = [f"stage {earlier}" for earlier in stage.starts_from]
        start = start or [Path(path).name for path in inits]
        rates = (f"{part or 'others'} {x or 'frozen'}" for part, x in stage.learning_rates.items())
        cells = [header["stage"], ", ".join(start) or "its parts' own weights"]
        cells += [", ".join(map(file_name, stage.datasets)), header["step"] or "–"]
        cells += [stage.global_batch_size, ", ".join(rates)]
        cells[-1] += f"; adapters of rank {stage.lora_rank}" if stage.lora_rank else ""
        lines.append(f"| {' | '.join(map(str, cells))} |")
    text = (
        f"\nPreset `{config.name}`, seed {config.seed}, trained in {config.dtype}. Data are named "
    )
    text += "as in the library; what lay under these names is not recorded."
    if config.name == "toy":
        text += " The toy preset draws its own data: small pictures of shapes."
    for stage in sorted(_stages_before(headers[0]) - {header["stage"] for header in headers}):
        text += f"\nThe settings of stage {stage} are not known here: its checkpoint was not there."
    return "\n".join([*lines, text])


def _parameters(model: Segmentor | XSAM) -> str:
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_name(model.prefix + name)] += parameter.numel()
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    counts["all"] = sum(counts.values())
    rows = [f"| {part} | {count:,} |" for part, count in counts.items() if count]
    return "\n".join([f"| part | parameters ({', '.join(sorted(dtypes))}) |", "|---|---|", *rows])


def _classes(config: Config) -> str:
    if not config.categories:
        return "It brings no list of classes: name those to segment."
    names = [each["name"] for each in config.categories]
    things = sum(each["is_thing"] for each in config.categories)
    rest = f", and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
    counts = f"{len(names)} that it was trained on ({things} things, {len(names) - things} stuff)"
    return f"{counts}: {', '.join(names[:SHOWN_CLASSES])}{rest}."


# ---- the folder and the hub ----------------------------------------------------------------------


def export(
    model: Segmentor | XSAM, folder: Path, name: str = "", license: str = "", is_bin: bool = False,
    **record: Any,
) -> None:  # fmt: skip
    """Writes `save_pretrained`'s folder with a card, whose `record` is `read_record`'s. `name` is
    what the card tells to load (default: the folder's). Raises ValueError where the folder holds
    something already."""
    card = model_card(model, name or folder.absolute().name, license, **record)
    save_pretrained(model, folder, is_bin=is_bin)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def check_push(name: str) -> None:
    """Raises ValueError where `push` could not begin; looks at nothing outside of this machine."""
    from huggingface_hub import get_token  # comes with transformers

    if not is_on_hub(name):
        raise ValueError(f"{name!r}: a repository of the hub is named OWNER/NAME")
    if get_token() is None:
        raise ValueError(f"{name}: no token of the hub; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str, private: bool = False) -> str:
    """Uploads a folder to the hub's repository OWNER/NAME, which is made where there is none, and
    returns its address. Raises ValueError where that cannot be done, and where the repository is
    public although `private` is asked for."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_push(name)
    api = HfApi()
    try:
        url = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise ValueError("it is there and public; name another, or make it private")
        text = "Weights, configuration and card"
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=text)
    except Exception as error:  # the hub's, or its HTTP library's, which is another by version
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        if status in (401, 403):
            cause = "the token may not write there; make one that may, and `hf auth login`"
        raise ValueError(f"{name}: not uploaded: {cause}") from error
    return str(url)


def push_to_hub(
    model: XSAM, name: str, private: bool = False, license: str = "", checkpoint: Path | None = None
) -> str:
    """Uploads a model with a card, by way of a folder among the system's temporary ones; returns
    the address. `checkpoint`: where the model is from, unchanged, for the card's recipe and
    results."""
    check_push(name)
    record = read_record(checkpoint, model) if checkpoint else {}
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder), name, license, **record)
        return push(Path(folder), name, private)


# ---- the command ---------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = Parser(
        prog="python -m xsam.export",
        description="Writes a model's folder, with a card, and uploads it.",
        epilog="example: python -m xsam.export runs/mine/stage3 --out mine --push OWNER/NAME",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="as --checkpoint of xsam.predict takes it")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to write, new or empty")
    add("--tokenizer", type=Path, metavar="DIR", help="the tokenizer of a published checkpoint")
    dtypes = typing.get_args(Dtype)
    add("--base", type=Path, metavar="PATH", help="where the base of adapters is, if it was moved")
    add("--dtype", choices=dtypes, help="of the weights (default: as they are stored)")
    text = "write pytorch_model.bin, which the published code reads too, in place of safetensors"
    add("--bin", action="store_true", help=text)
    add(
        "--license",
        default="",
        metavar="NAME",
        help="license for the card, as the hub names it: mit, …",
    )
    add("--push", metavar="OWNER/NAME", help="upload the folder to this repository of the hub")
    add("--private", action="store_true", help="of --push: a repository that others do not see")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command: returns the exit status, 2 at bad input."""
    options = build_parser().parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"xsam.export: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Writes the folder that the flags ask for, and uploads it with --push. Raises ValueError where
    it cannot."""
    out = options.out
    if options.private and not options.push:
        raise ValueError("--private is of --push")
    if options.push:
        check_push(options.push)
    check_new_folder(out)
    rules = {"tokenizer": options.tokenizer, "base": options.base}
    model, _ = load_checkpoint(
        options.checkpoint, **rules, report=lambda x: print(x, file=sys.stderr)
    )
    record = read_record(options.checkpoint, model)
    if options.dtype:
        if record["results"]:
            record["results"] += f"\n\nMeasured before the weights were cast to {options.dtype}."
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, options.dtype))
    export(model, out, options.push or "", options.license, options.bin, **record)
    print("\n".join(f"{x}: {x.stat().st_size:,} bytes" for x in sorted(out.iterdir())))
    if options.push:
        try:
            print(push(out, options.push, options.private))
        except ValueError as error:
            raise ValueError(f"{error}. {out} is whole: hf upload {options.push} {out}") from error


if __name__ == "__main__":
    sys.exit(main())
