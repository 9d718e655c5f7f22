"""Scores a checkpoint on every benchmark.

    torchrun --nproc_per_node 8 xsam/evaluate.py --checkpoint runs/xsam/stage3 --data datas
    python xsam/evaluate.py --from-predictions runs/xsam/stage3 --data datas

Of each dataset the model is asked first: what it says is kept on disk as it comes
(`predictions.py`), and a command that was interrupted goes on with the rest. Then the predictions
are scored (`scoring.py`), whoever made them. Batches are made of a dataset's samples in one order,
so that any number of processes, and a run that was interrupted, predict and score the same to the
last digit.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from xsam import distributed
from xsam.checkpoints import latest_checkpoint, read_header
from xsam.cli import add_checkpoint_flags
from xsam.data import Processor
from xsam.datasets.base import Dataset, read_categories
from xsam.datasets.formats import read_json
from xsam.datasets.generic import Generic
from xsam.datasets.registry import open_dataset
from xsam.datasets.sources import SOURCES, locate
from xsam.evaluation.benchmarks import (
    SEGMENTOR_TASKS,
    TASKS,
    Figures,
    bert_embedder,
    named,
    score_dataset,
    table,
    task_of,
)
from xsam.evaluation.prediction_files import (
    SavedPredictions,
    Writer,
    begin,
    complete,
    finished_records,
    is_complete,
    keys_of,
    kind_of,
)
from xsam.inference import Questions, answer, load_checkpoint, prepare
from xsam.model import XSAM, Segmentor
from xsam.prompts import read_names, read_phrasings
from xsam.weights import CONFIG_FILE

if __name__ == "__main__":  # a script's own folder must not shadow other packages' modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


FOLDER = "predictions"  # of a run or a checkpoint


# ---- asking --------------------------------------------------------------------------------------


def reading_of(dataset: Dataset) -> str:
    """How the masks of an answer are read (`model.answer`)."""
    kind = kind_of(dataset)
    if kind == "mask":
        if dataset.source.task == "interactive":
            return "interactive"
        return "union" if dataset.name.startswith("grefcoco") else "phrases"
    return {"grounded": "phrases", "answer": "none"}.get(kind, kind)


class _Loader(torch.utils.data.Dataset):
    """Batches of questions by their place; an error is handed on as a value."""

    def __init__(self, dataset: Dataset, batches: list[list[int]], processor: Processor):
        self.dataset, self.batches, self.processor = dataset, batches, processor

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> Questions | ValueError:
        try:
            samples = [self.dataset.question(index) for index in self.batches[place]]
            nothing = [np.zeros((0, *sample.masks.shape[1:]), bool) for sample in samples]
            samples = [  # what is true is no business of the model's
                dataclasses.replace(sample, masks=masks, labels=np.zeros(0, np.int64), ignore=None)
                for sample, masks in zip(samples, nothing, strict=True)
            ]
            return prepare(self.processor, samples)
        except ValueError as error:
            return error


def ask_dataset(
    model: Segmentor | XSAM,
    dataset: Dataset,
    folder: Path,
    num_samples: int | None = None,
    label: str = "",
    overwrite: bool = False,
) -> None:
    """Asks the model about the (first) records of a set, as far as `folder` does not have its
    answers yet; all ranks take part. Raises ValueError where the folder holds those of other
    weights or settings, unless these may be overwritten."""
    config, kind, keys = model.config, kind_of(dataset), keys_of(dataset, num_samples)
    if distributed.rank() == 0:
        begin(folder, kind, keys, made_by(model, dataset), overwrite)
    distributed.barrier()
    if is_complete(folder):
        return
    size = config.eval_batch_size
    # Samples of about the same length share a batch; which ones does not depend on the ranks.
    order = sorted(range(len(keys)), key=lambda index: (dataset.num_words(index), index))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    finished = finished_records(folder)
    rest = [batch for batch in batches if not all(keys[index] in finished for index in batch)]
    mine = rest[distributed.rank() :: distributed.world_size()]
    distributed.barrier()  # every rank has seen what is finished before one adds to it
    loader = DataLoader(
        _Loader(dataset, mine, Processor(config, model.tokenizer)),
        batch_size=None,
        num_workers=min(config.num_workers, len(mine)),
    )
    is_thing = dataset.is_thing if isinstance(dataset, Generic) else None
    reading, is_first = reading_of(dataset), distributed.rank() == 0
    num_mine, num_before = sum(map(len, mine)), len(keys) - sum(map(len, rest))
    bar = tqdm(
        total=num_mine, desc=f"ask {label or dataset.name}", disable=not is_first, unit="image"
    )
    if is_first and num_before:
        tqdm.write(f"{folder}: {num_before} of {len(keys)} were asked before")
    is_told = False
    with Writer(folder, kind, distributed.rank()) as writer:
        for batch, questions in zip(mine, loader, strict=True):
            if isinstance(questions, ValueError):
                raise questions
            if is_first and not is_told and len(questions.parts) > 1:
                is_told = True
                tqdm.write(
                    f"{dataset.name}: {len(questions.samples[0].names)} names do not fit one "
                    f"prompt of {config.model.max_text_length} tokens; they are asked in "
                    f"{len(questions.parts)} parts, whose masks are merged"
                )
            predictions = answer(model, questions, reading, is_thing)
            writer.write([keys[index] for index in batch], questions.samples, predictions)
            bar.update(len(batch))
    bar.close()
    distributed.barrier()
    if is_first:
        complete(folder, kind, keys)
    distributed.barrier()


def made_by(model: Segmentor | XSAM, dataset: Dataset) -> dict[str, str]:
    """What predictions depend on, as digests."""
    values = model.config.to_dict()
    names = ("model", "score_threshold", "overlap_threshold", "eval_batch_size", "max_new_tokens")
    asked = {name: values[name] for name in names}
    asked["phrasings"] = dataset.phrasings
    asked["names"] = getattr(dataset, "names", [])
    settings = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    settings = settings.hexdigest()[:16]
    return {"dataset": dataset.name, "weights": weights_digest(model), "settings": settings}


def weights_digest(model: Segmentor | XSAM) -> str:
    """Of the names and types of the weights, and of some 256 numbers of each."""
    digest = hashlib.sha256()
    for name, parameter in model.state_dict().items():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 256)].float().cpu().numpy()
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        digest.update(some.tobytes())
    return digest.hexdigest()[:16]


# ---- asking and scoring --------------------------------------------------------------------------


def evaluate(
    model: Segmentor | XSAM | None,
    names: list[str],
    data: Path,
    folder: Path,
    num_samples: int | None = None,
    words: list[str] | None = None,
    embed: Callable | None = None,
    kept: Callable[[str, SavedPredictions], None] | None = None,
    overwrite: bool = False,
) -> dict[str, dict[str, Figures]]:
    """{task: {figure's name: figure}} of the sets `names`, on all ranks.

    Predictions lie in `folder`, one folder for each set; the model is asked for those that are not
    there, or without a model all have to be. `num_samples`: of each set the first ones alone.
    `words`: other names for the classes of open vocabulary (`rename`). `kept` is called with the
    task and the predictions of each set. `overwrite`: those made in another way may go.
    """
    phrasings = read_phrasings(model.config.phrasings if model is not None else "")

    def opened(name: str) -> Dataset:
        dataset = open_dataset(name, data, all_classes=True, phrasings=phrasings)
        if words is not None and task_of(name)[0] == "openvocab":
            rename(dataset, words, data)
        return dataset

    # Every set is opened here first, so that a missing or broken file is told before hours of
    # asking. They are not all kept: some tables are gigabytes of images.
    for name in names:
        opened(name)
    results: dict[str, dict[str, Figures]] = {}
    for number, name in enumerate(names, 1):
        label, dataset = f"{name} [{number}/{len(names)}]", opened(name)
        if model is not None:
            ask_dataset(model, dataset, folder / name, num_samples, label, overwrite)
        task, suffix = task_of(name)
        said = SavedPredictions(folder / name, dataset, num_samples)
        figures = score_dataset(said, embed, label)
        results.setdefault(task, {}).update(named(figures, suffix))
        if kept is not None:
            kept(task, said)
    return results


def rename(dataset: Generic, words: list[str], data: Path) -> None:
    """Asks for the classes of a set by other names, in the order of their ids. ADE20K's instances
    are a part of the classes of its panoptic set; of a list for those the names at their ids."""
    ids = list(dataset.category_index)
    if len(words) == len(ids):
        dataset.names = words
        return
    whole = locate(data, SOURCES["ade20k_panoptic_val"].annotations)
    known = list(read_categories(read_json(whole, dict), str(whole))) if whole.is_file() else []
    if len(words) != len(known) or not set(ids) <= set(known):
        raise ValueError(f"{len(words)} names for the {len(ids)} classes of {dataset.name}")
    dataset.names = [words[known.index(number)] for number in ids]


# ---- command line --------------------------------------------------------------------------------


def chosen_sets(tasks: str, is_segmentor: bool = False) -> list[str]:
    """The sets of a comma-separated list of tasks and sets, or of "all". Raises ValueError at an
    unknown one, or one that a stage-1 checkpoint cannot be asked."""
    known = SEGMENTOR_TASKS if is_segmentor else tuple(TASKS)
    of_task = {task: [name for _, name in TASKS[task].datasets] for task in TASKS}
    names: list[str] = []
    for word in known if tasks == "all" else tasks.split(","):
        if word not in TASKS and word not in itertools.chain(*of_task.values()):
            raise ValueError(f"unknown task {word}; known are {', '.join(TASKS)}, and their sets")
        found = of_task.get(word, [word])
        if is_segmentor and task_of(found[0])[0] not in known:
            raise ValueError(
                f"stage 1 has no language model; it is scored with --tasks {','.join(known)}"
            )
        names += [name for name in found if name not in names]
    return names


def check_paths(names: list[str], data: Path) -> None:
    """Raises ValueError that lists what the sets lack on disk."""
    paths = [locate(data, path) for name in names for path in SOURCES[name].paths()]
    if missing := sorted({str(path) for path in paths if not path.exists()}):
        raise ValueError(f"missing: {', '.join(missing)}; --tasks says what else to score")


def stored_stage(checkpoint: Path) -> int | None:
    """The stage that a checkpoint of ours is of; None of a published one, which does not say."""
    folder = latest_checkpoint(checkpoint) or checkpoint
    return read_header(folder)["stage"] if (folder / CONFIG_FILE).is_file() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="xsam/evaluate.py",
        description="Scores a checkpoint, or predictions, on the benchmarks; runs under torchrun "
        "or alone. The same command goes on where it was interrupted.",
        epilog="example: python xsam/evaluate.py --checkpoint runs/toy/stage3/step_1300 "
        "--data runs/toy/world/data --tasks panoptic,refcoco_val",
    )
    add_checkpoint_flags(parser, is_required=False)
    parser.add_argument("--data", type=Path, default=Path("datas"), help="data root")
    parser.add_argument(
        "--tasks", help=f"{', '.join(TASKS)}, sets of these, or all (default: all that can be)"
    )
    parser.add_argument("--out", type=Path, help="where results go (default: the checkpoint)")
    parser.add_argument(
        "--from-predictions",
        type=Path,
        metavar="DIR",
        help="score the predictions in DIR, a folder for each set, without a model",
    )
    parser.add_argument(
        "--names",
        metavar="LIST",
        help="other names for the classes of open vocabulary: a,b,c, or a file with one a line",
    )
    parser.add_argument("--phrasings", metavar="FILE", help="questions of your own")
    parser.add_argument(
        "--bert", type=Path, metavar="DIR", help="bert-base-uncased: compares GCG's phrases"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images of one forward pass")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N samples of each set")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace predictions of other weights or settings"
    )
    options = parser.parse_args(arguments)
    if (options.checkpoint is None) == (options.from_predictions is None):
        parser.error("give --checkpoint or --from-predictions")
    if options.overwrite and options.from_predictions is not None:
        parser.error("--overwrite asks a model again, so it goes with --checkpoint")
    if options.from_predictions is not None:
        for name in ("names", "phrasings", "batch_size", "device", "dtype"):
            if getattr(options, name) is not None:
                parser.error(
                    f"--{name.replace('_', '-')} asks a model, so it goes with --checkpoint"
                )
    for name in ("limit", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} has to be 1 or more")
    try:  # a wrong name is told before anything is loaded
        names = chosen_sets(options.tasks or "all")
        words = read_names(options.names) if options.names else None
        embed = bert_embedder(options.bert) if options.bert else None
        if options.names and "openvocab" not in {task_of(each)[0] for each in names}:
            raise ValueError("--names is for the sets of openvocab, none of which is chosen")
        stage = stored_stage(options.checkpoint) if options.checkpoint else None
        if stage is not None or options.tasks:
            check_paths(chosen_sets(options.tasks or "all", stage == 1), options.data)
    except ValueError as error:
        parser.error(str(error))
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1 for several processes
        torch.set_num_threads(1)  # one has to add up in the same order as they do
    try:
        run(options, distributed.start(options.device), words, embed)
    except ValueError as error:
        print(f"xsam/evaluate.py: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not distributed.is_loss_of_a_rank(error):
            raise
        rank = distributed.rank()
        print(f"xsam/evaluate.py: rank {rank} lost contact with another: {error}", file=sys.stderr)
        return 1
    finally:
        distributed.finish()
    return 0


def run(
    options: argparse.Namespace,
    device: torch.device,
    words: list[str] | None,
    embed: Callable | None,
) -> None:
    """What the command line asks for."""
    is_first = distributed.rank() == 0
    if options.from_predictions is not None:
        model, column = None, "predictions"
        folder = options.from_predictions
        if (folder / FOLDER).is_dir():
            folder = folder / FOLDER
        names = [name for name in chosen_sets("all") if (folder / name).is_dir()]
        if options.tasks:
            names = chosen_sets(options.tasks)
        if not names:
            raise ValueError(f"{folder}: has no folder of a set that is scored")
        out = options.out or options.from_predictions
    else:
        model, stage = load_checkpoint(
            options.checkpoint,
            tokenizer=options.tokenizer,
            allow_missing=tuple(options.allow_missing),
            dtype=options.dtype and getattr(torch, options.dtype),
            device=device,
            report=print if is_first else lambda _: None,
        )
        column = f"stage {stage}"
        names = chosen_sets(options.tasks or "all", is_segmentor=stage == 1)
        config = model.config
        config.eval_batch_size = options.batch_size or config.eval_batch_size
        config.phrasings = options.phrasings or config.phrasings
        if stage == 1 and not config.categories:  # a published one: those of COCO
            check_paths(["coco_panoptic_val"], options.data)
            config.categories = open_dataset("coco_panoptic_val", options.data).categories
        checkpoint = options.checkpoint
        out = options.out or (checkpoint if checkpoint.is_dir() else checkpoint.parent)
        folder = out / FOLDER
    check_paths(names, options.data)
    sets = {}  # what was counted

    def note(_: str, said: SavedPredictions) -> None:
        sets[said.dataset.name] = {"records": len(said.keys), "skipped": said.dataset.skipped}

    results = evaluate(
        model, names, options.data, folder, options.limit, words, embed, note, options.overwrite
    )
    if is_first:
        about = {"column": column, "weights": model and weights_digest(model)}
        write_results(out, results, about | {"first_samples": options.limit, "sets": sets})


def write_results(out: Path, results: dict[str, dict[str, Figures]], about: dict) -> None:
    """OUT/results.json and results.md, which is printed. Figures of other sets that an earlier
    command put there for the same weights stay. Raises ValueError where the file is of training."""
    out.mkdir(parents=True, exist_ok=True)
    path, sets = out / "results.json", about["sets"]
    if path.is_file():
        before = read_json(path, dict)
        if "about" not in before:
            raise ValueError(f"{path}: is not of this command; give another --out")
        earlier = before.pop("about")
        if earlier | {"sets": {}} == about | {"sets": {}}:
            about = about | {"sets": earlier["sets"] | sets}
            results = {
                task: before.get(task, {}) | results.get(task, {})
                for task in TASKS
                if task in before or task in results
            }
    path.write_text(json.dumps(results | {"about": about}, indent=1), encoding="utf-8")
    limit = about["first_samples"]
    note = f"The first {limit} samples of each set alone." if limit else ""
    text = table({about["column"]: results}, note)
    (out / "results.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    for name, each in sets.items():
        reasons = [f"{count} {reason}" for reason, count in each["skipped"].items() if count]
        if reasons:
            print(f"{name}: scored without {', '.join(reasons)}")
    missing = [
        f"{name} ({task})"
        for task in results
        for _, name in TASKS[task].datasets
        if name not in about["sets"]
    ]
    if missing:
        print(f"not scored: {', '.join(missing)}")


if __name__ == "__main__":
    sys.exit(main())
