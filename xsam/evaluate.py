"""Scores a checkpoint on every benchmark.

    torchrun --nproc_per_node 8 xsam/evaluate.py --checkpoint runs/xsam/stage3 --data datas
    python xsam/evaluate.py --from-predictions runs/xsam/stage3 --data datas

For each dataset the model predicts first: predictions are written to disk as they come
(`evaluation/prediction_files.py`), and a command that was interrupted continues with the rest. Then
the predictions, of this model or of any other program, are scored (`evaluation/benchmarks.py`). The
batches of a dataset do not depend on the number of processes or on interruptions, so predictions
and figures are the same to the last digit.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from xsam import distributed
from xsam.checkpoints import last_stage
from xsam.cli import Parser, add_checkpoint_flags
from xsam.data import Processor, Sample
from xsam.datasets import sources
from xsam.datasets.base import Dataset, read_categories
from xsam.datasets.generic import Generic
from xsam.datasets.registry import open_dataset
from xsam.evaluation import benchmarks, metrics
from xsam.evaluation import prediction_files as files
from xsam.evaluation.benchmarks import Figures, task_of
from xsam.evaluation.prediction_files import SavedPredictions, keys_of, kind_of
from xsam.files import check_target, read_json, write_whole
from xsam.inference import Inputs, build_inputs, load_with_flags, predict_inputs, stored_stage
from xsam.model import XSAM, Segmentor
from xsam.names import read_names
from xsam.prompts import read_phrasings
from xsam.report.samples import draw_predictions
from xsam.tasks import TASKS
from xsam.weights import weights_digest

if __name__ == "__main__":  # a script's own folder must not shadow other packages' modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


FOLDER = "predictions"  # of a run or a checkpoint

HELD_BYTES = 2**25  # of the records of a set that stays open

SIMILAR_WORDS = 16  # prompts that differ in fewer may share a batch

FOR_PREDICTING = (  # flags that have no use for predictions that are there
    *("overwrite", "names", "phrasings", "batch_size", "tokenizer", "allow_missing", "device"),
    *("dtype", "llm_bits", "base", "panoptic_rule", "presence"),
)


# ---- predictions ---------------------------------------------------------------------------------


def post_processing_of(dataset: Dataset) -> str:
    """How masks are made of the decoder's outputs for a dataset (`inference.predict_inputs`)."""
    source, kind = dataset.source, kind_of(dataset)
    ways = [each.post_processing for each in TASKS[source.task].requests.values()]
    return source.post_processing or (kind if kind in ways else ways[0])


class _Inputs(torch.utils.data.Dataset):
    """A model's inputs for each batch of record indices. An error takes the place of the inputs, so
    that it is raised in the process that reads them."""

    def __init__(self, dataset: Dataset, batches: list[list[int]], processor: Processor):
        self.dataset, self.batches, self.processor = dataset, batches, processor

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Inputs | ValueError:
        try:
            samples = [self.dataset.inputs(index) for index in self.batches[number]]
            return build_inputs(self.processor, [_without_truth(sample) for sample in samples])
        except ValueError as error:
            return error


def _without_truth(sample: Sample) -> Sample:
    nothing = sample.masks[:0].copy()  # a view would keep the masks in memory
    return dataclasses.replace(sample, masks=nothing, labels=sample.labels[:0], ignore=None)


def predict_dataset(
    model: Segmentor | XSAM,
    dataset: Dataset,
    folder: Path,
    num_samples: int | None = None,
    label: str = "",
    overwrite: bool = False,
) -> None:
    """Predicts the (first) records of a set of which `folder` has no predictions yet; all ranks
    take part. Raises ValueError where the folder holds predictions of other weights or settings,
    unless `overwrite` lets them be deleted."""
    kind, keys = kind_of(dataset), keys_of(dataset, num_samples)
    rank, config = distributed.rank(), model.config
    if rank == 0:
        files.begin(folder, kind, keys, made_by(model, dataset), overwrite)
    distributed.barrier()
    if files.is_complete(folder):
        return
    batches = _unfinished_batches(dataset, keys, folder, config.eval_batch_size)
    if rank == 0 and (num_before := len(keys) - sum(map(len, batches))):
        tqdm.write(f"{folder}: {num_before} of {len(keys)} were predicted before")
    batches = batches[rank :: distributed.world_size()]
    distributed.barrier()  # every rank has seen what is finished before one adds to it
    inputs = _Inputs(dataset, batches, Processor(config, model.tokenizer))
    loader = DataLoader(inputs, batch_size=None, num_workers=min(config.num_workers, len(batches)))
    is_thing = dataset.is_thing if isinstance(dataset, Generic) else None
    description, count = f"predict {label or dataset.name}", sum(map(len, batches))
    bar = tqdm(total=count, desc=description, disable=rank != 0, unit="image")
    num_prompts = 1
    with bar, files.Writer(folder, kind, rank) as writer:
        for batch, questions in zip(batches, loader, strict=True):
            if isinstance(questions, ValueError):
                raise questions
            if rank == 0 and num_prompts == 1 < len(questions.parts):
                num_prompts = len(questions.parts)
                tqdm.write(
                    f"{dataset.name}: {len(questions.samples[0].names)} names do not fit one "
                    f"prompt of {config.model.max_text_length} tokens; they are split into "
                    f"{num_prompts} prompts, whose masks are merged"
                )
            predictions = predict_inputs(model, questions, post_processing_of(dataset), is_thing)
            writer.write([keys[index] for index in batch], questions.samples, predictions)
            bar.update(len(batch))
    distributed.barrier()
    if rank == 0:
        files.complete(folder, kind, keys)
    distributed.barrier()


def _unfinished_batches(dataset: Dataset, keys: list, folder: Path, size: int) -> list[list[int]]:
    """Batches of records that are not all predicted yet. Records of similar length share a batch;
    which ones does not depend on the ranks or on what is finished. Lengths are compared coarsely:
    next to an image's tokens some words more cost nothing, and records of one image, which
    neighbour in a set, stay side by side to be encoded once (`XSAM.infer`)."""
    order = sorted(range(len(keys)), key=lambda n: (dataset.num_words(n) // SIMILAR_WORDS, n))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    finished = files.finished_records(folder)
    return [batch for batch in batches if not all(keys[index] in finished for index in batch)]


def made_by(model: Segmentor | XSAM, dataset: Dataset) -> dict[str, str]:
    """What predictions depend on: the dataset's name, and digests of weights and settings."""
    values = model.config.to_dict()
    names = "panoptic_rule", "score_threshold", "overlap_threshold", "presence", "max_new_tokens"
    settings = {name: values[name] for name in ("model", "eval_batch_size", *names)}
    settings |= {"phrasings": dataset.phrasings, "names": getattr(dataset, "names", [])}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return {"dataset": dataset.name, "weights": weights_digest(model), "settings": digest}


# ---- predictions and figures ---------------------------------------------------------------------


def evaluate(
    model: Segmentor | XSAM | None,
    names: list[str],
    data: Path,
    folder: Path,
    num_samples: int | None = None,
    class_names: list[str] | None = None,
    embed: Callable | None = None,
    on_scored: Callable[[str, SavedPredictions, dict[int, float]], None] | None = None,
    overwrite: bool = False,
    one_crowd_per_class: bool = False,
    skip_bad: bool = False,
) -> dict[str, dict[str, Figures]]:
    """{task: {figure's name: figure}} of the sets `names`, on all ranks.

    Predictions lie in `folder`, one folder for each set. The model makes those that are missing;
    without a model all have to be there. `num_samples`: only the first ones of each set.
    `class_names`: other names for the classes of open vocabulary (`rename_classes`). `on_scored` is
    called with the task, the predictions and the qualities of each set. `overwrite`: predictions of
    other weights or settings may be deleted. `skip_bad`: own files are scored without their bad
    records. `embed`, `one_crowd_per_class` and the qualities: see `score_dataset`.
    """
    phrasings = read_phrasings(model.config.phrasings if model is not None else "")
    opened = partial(
        _open_scored, data=data, phrasings=phrasings, class_names=class_names, skip_bad=skip_bad
    )
    # All sets are opened first, so that a missing or broken file is reported before hours of
    # prediction. Large ones are opened again then: some tables are gigabytes of images.
    held, has_captions = {}, False
    for name in names:
        dataset = opened(name)
        has_captions |= benchmarks.scoring_of(dataset) is benchmarks.GROUNDED
        if dataset.records.content.nbytes < HELD_BYTES:
            held[name] = dataset
    results: dict[str, dict[str, Figures]] = {}
    # METEOR gets ready while the model predicts.
    is_scorer = has_captions and distributed.rank() == 0 and not metrics.lacks_for_captions()
    with metrics.meteor() if is_scorer else contextlib.nullcontext():
        for number, name in enumerate(names, 1):
            label = f"{name} [{number}/{len(names)}]"
            dataset = held.pop(name) if name in held else opened(name)
            if model is not None:
                place = folder / sources.folder_name(name)
                predict_dataset(model, dataset, place, num_samples, label, overwrite)
            task, suffix = task_of(name)
            predictions = SavedPredictions(folder / sources.folder_name(name), dataset, num_samples)
            qualities: dict[int, float] = {}
            rules = embed, label, one_crowd_per_class, qualities
            figures = benchmarks.score_dataset(predictions, *rules)
            results.setdefault(task, {}).update(benchmarks.named(figures, suffix))
            if on_scored is not None:
                on_scored(task, predictions, qualities)
    return results


def _open_scored(
    name: str, data: Path, phrasings: dict, class_names: list[str] | None, skip_bad: bool
) -> Dataset:
    """See `evaluate`."""
    skips = skip_bad and sources.is_own(name)
    dataset = open_dataset(name, data, True, phrasings, skips, is_scored=True)
    if skips:
        dataset.leave_out_bad()
    if class_names is not None and task_of(name)[0] == "openvocab":
        rename_classes(dataset, class_names, data)
    return dataset


def draw_errors(
    predictions: SavedPredictions, qualities: dict[int, float], count: int, folder: Path
) -> None:
    """The worst `count` of a set's predictions that are not perfect, beside the truth: pictures
    000_INDEX.png and so on in `folder`, the worst first, in place of what an earlier command drew
    there. Every rank gives the qualities (`score_dataset`) that it knows and draws its share."""
    measure = benchmarks.scoring_of(predictions.dataset).measure
    pairs = sorted(distributed.gather([(quality, n) for n, quality in qualities.items()]))
    worst = {index: quality for quality, index in pairs[:count] if quality < 1}
    if distributed.rank() == 0:
        for path in folder.glob("[0-9]*_[0-9]*.png"):
            path.unlink()
    distributed.barrier()
    notes = {n: f"{measure} {quality:.2f}" if measure else "wrong" for n, quality in worst.items()}
    paths = {n: folder / f"{place:03d}_{n:06d}.png" for place, n in enumerate(worst)}
    draw_predictions(predictions, paths, notes)


def rename_classes(dataset: Generic, names: list[str], data: Path) -> None:
    """Gives the classes of a set other names, in the order of their ids. The classes of ADE20K's
    instance set are a part of those of its panoptic set: of a list for the whole set they take the
    names at their ids."""
    ids = list(dataset.category_index)
    if len(names) == len(ids):
        dataset.names = names
        return
    path = sources.locate(data, sources.SOURCES["ade20k_panoptic_val"].annotations)
    all_ids = list(read_categories(read_json(path, dict), str(path))) if path.is_file() else []
    if len(names) != len(all_ids) or not set(ids) <= set(all_ids):
        raise ValueError(f"{len(names)} names for the {len(ids)} classes of {dataset.name}")
    dataset.names = [names[all_ids.index(number)] for number in ids]


# ---- command line --------------------------------------------------------------------------------


def chosen_sets(tasks: str | None, data: Path, is_segmentor: bool = False) -> list[str]:
    """The sets of a comma-separated list of tasks, sets and files of one's own; of "all", or of
    none, all. Raises ValueError at an unknown one, or one that a stage-1 checkpoint cannot
    predict."""
    if tasks in (None, "", "all"):
        return sources.scored_sets(sources.sets_by_task(), data, is_segmentor)
    names = sources.scored_sets(tasks.split(","), data)
    if is_segmentor and len(sources.scored_sets(names, data, is_segmentor)) < len(names):
        known = ",".join(sources.SEGMENTOR_TASKS)
        raise ValueError(f"stage 1 has no language model; it is scored with --tasks {known}")
    return names


def check_paths(names: list[str], data: Path) -> None:
    """Raises ValueError that lists what the sets lack on disk."""
    paths = [path for name in names for path in sources.paths_of(sources.find_source(name), data)]
    if missing := sorted({str(path) for path in paths if not path.exists()}):
        raise ValueError(f"missing: {', '.join(missing)}; --tasks says what else to score")


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = Parser(
        prog="xsam/evaluate.py",
        description="Scores a checkpoint, or predictions, on the benchmarks; runs under torchrun "
        "or alone. The same command continues where it was interrupted.",
        epilog="example: python xsam/evaluate.py --checkpoint runs/toy/stage3 "
        "--data runs/toy/world/data --tasks panoptic,refcoco_val",
    )
    add_checkpoint_flags(parser, is_required=False)
    add = parser.add_argument
    add("--data", type=Path, default=Path("datas"), help="data root (default: datas)")
    text = (
        f"{', '.join(sources.sets_by_task())}, sets of these, files of your own, "
        "FILE.json[:IMAGES[:MASKS]], or all"
    )
    add("--tasks", metavar="NAME,...", help=f"{text} (default: all that can be)")
    add("--out", type=Path, metavar="DIR", help="where results go (default: the checkpoint)")
    text = "score the predictions in DIR, a folder for each set, without a model"
    add("--from-predictions", type=Path, metavar="DIR", help=text)
    text = "other names for the classes of open vocabulary: a,b,c, or a file with one a line"
    add("--names", metavar="LIST", help=text)
    add("--phrasings", metavar="FILE", help="JSON file of questions in place of ours")
    text = "folder of bert-base-uncased, which compares the phrases of gcg"
    add("--bert", type=Path, metavar="DIR", help=text)
    text = "panoptic quality: of an image's crowd regions of one class only the last counts, as in "
    text += "panopticapi (default: all of them)"
    add("--one-crowd-per-class", action="store_true", help=text)
    text = "images of one forward pass (default: as the model says)"
    add("--batch-size", type=int, metavar="N", help=text)
    add("--limit", type=int, metavar="N", help="score the first N samples of each set alone")
    text = "draw the N worst predictions of each set beside the truth, in OUT/errors/SET"
    add("--errors", type=int, metavar="N", help=text)
    text = "replace predictions of other weights or settings"
    add("--overwrite", action="store_true", help=text)
    return parser


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked before anything heavy is loaded. `names` is then the list of names
    and `bert` the embedder of phrases, or None."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if (options.checkpoint is None) == (options.from_predictions is None):
        parser.error("give --checkpoint or --from-predictions")
    for name in FOR_PREDICTING if options.from_predictions is not None else ():
        if getattr(options, name) not in (None, False, []):
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} is for predicting, so it goes with --checkpoint")
    for name in ("limit", "batch_size", "errors"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} has to be 1 or more")
    if options.checkpoint is not None:
        options.checkpoint = last_stage(options.checkpoint)
    source = options.checkpoint or options.from_predictions
    options.out = options.out or (source.parent if source.is_file() else source)
    try:
        check_target(options.out, is_folder=True)
        read_earlier(options.out)  # an error is reported before hours of prediction
        read_phrasings(options.phrasings or "")
        names = chosen_sets(options.tasks, options.data)
        options.names = read_names(options.names) if options.names else None
        options.bert = benchmarks.bert_embedder(options.bert) if options.bert else None
        chosen = {task_of(name)[0] for name in names}
        scored = [source for source in sources.SOURCES.values() if source.scores]
        panoptic = {each.scores for each in scored if each.format == "panoptic"}
        users = {"names": {"openvocab"}, "panoptic_rule": panoptic, "one_crowd_per_class": panoptic}
        users["presence"] = {each.scores for each in scored if TASKS[each.task].is_per_phrase}
        for flag, tasks in users.items():
            if getattr(options, flag) and not tasks & chosen:
                flag, tasks = flag.replace("_", "-"), " and ".join(sorted(tasks))
                raise ValueError(f"--{flag} is for the sets of {tasks}, none of which is chosen")
        stage = stored_stage(options.checkpoint) if options.checkpoint else None
        if stage is not None or options.tasks:
            check_paths(chosen_sets(options.tasks, options.data, stage == 1), options.data)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command: returns the exit status, 2 at bad input, 1 where another rank is lost."""
    options = parse_options(arguments)
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1 for several processes
        torch.set_num_threads(1)  # one process has to add up in the same order as they do
    try:
        run(options, distributed.start(options.device))
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


def run(options: argparse.Namespace, device: torch.device) -> None:
    """Evaluates as the command line says, and writes the results."""
    is_first, out = distributed.rank() == 0, options.out
    if options.from_predictions is not None:
        model, column, folder = None, "predictions", options.from_predictions
        folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
        names = chosen_sets(options.tasks, options.data)
        if not options.tasks:
            names = [name for name in names if (folder / sources.folder_name(name)).is_dir()]
        if not names:
            raise ValueError(f"{folder}: has no folder of a set that is scored")
    else:
        model, stage = load_model(options, device, print if is_first else lambda _: None)
        column, folder = f"stage {stage}", out / FOLDER
        names = chosen_sets(options.tasks, options.data, is_segmentor=stage == 1)
    check_paths(names, options.data)
    sets = {}

    def note(_: str, predictions: SavedPredictions, qualities: dict[int, float]) -> None:
        dataset = predictions.dataset
        sets[dataset.name] = {"records": len(predictions.keys), "skipped": dataset.skipped}
        if options.errors:
            place = out / "errors" / sources.folder_name(dataset.name)
            draw_errors(predictions, qualities, options.errors, place)

    results = evaluate(
        model, names, options.data, folder, options.limit, options.names, options.bert,
        note, options.overwrite, options.one_crowd_per_class,
    )  # fmt: skip
    if is_first:
        about = {"column": column, "weights": model and weights_digest(model)}
        about |= {"first_samples": options.limit, "sets": sets}
        if options.one_crowd_per_class:  # figures by the default rule are not mixed with these
            about["one_crowd_per_class"] = True
        write_results(out, results, about)


def load_model(
    options: argparse.Namespace, device: torch.device, report: Callable[[str], None]
) -> tuple[Segmentor | XSAM, int]:
    """The model and its stage, with the settings of the command line."""
    model, stage = load_with_flags(options, device=device, report=report)
    config, categories = model.config, model.config.categories
    if stage == 1 and not categories:  # a published checkpoint: the categories are COCO's
        check_paths(["coco_panoptic_val"], options.data)
        categories = open_dataset("coco_panoptic_val", options.data).categories
    model.config = config.resolve(
        eval_batch_size=options.batch_size or config.eval_batch_size,
        phrasings=options.phrasings or config.phrasings,
        categories=categories,
    )
    return model, stage


def read_earlier(out: Path) -> dict:
    """What an earlier command wrote to OUT/results.json, {} if none did. Raises ValueError where
    the file is one of training, or the results cannot be written."""
    path = out / "results.json"
    for each in (path, out / "results.md"):
        check_target(each)
    before = read_json(path, dict) if path.exists() else {"about": {}}
    if "about" not in before:
        raise ValueError(f"{path}: is not of this command; give another --out")
    return before


def result_notes(about: dict) -> str:
    """What is to be told above figures, by the "about" of their results.json."""
    notes = []
    if limit := about["first_samples"]:
        notes.append(f"The first {limit} samples of each set alone.")
    if "one_crowd_per_class" in about:
        notes.append("PQ: one crowd region of a class and image counts, as in panopticapi.")
    return " ".join(notes)


def write_results(out: Path, results: dict[str, dict[str, Figures]], about: dict) -> None:
    """Writes OUT/results.json and results.md, which is also printed. Figures of other sets that an
    earlier command wrote there for the same weights are kept."""
    before, sets = read_earlier(out), about["sets"]
    earlier = before.pop("about", {})
    if earlier | {"sets": {}} == about | {"sets": {}}:
        about = about | {"sets": earlier["sets"] | sets}
        tasks = [task for task in sources.sets_by_task() if task in before or task in results]
        tasks += [task for task in {**before, **results} if task not in tasks]
        results = {task: before.get(task, {}) | results.get(task, {}) for task in tasks}
    write_whole(out / "results.json", json.dumps(results | {"about": about}, indent=1))
    text = benchmarks.table({about["column"]: results}, result_notes(about))
    write_whole(out / "results.md", text + "\n")
    print(text)
    for name, each in sets.items():
        reasons = [f"{count} {reason}" for reason, count in each["skipped"].items() if count]
        if reasons:
            print(f"{name}: scored without {', '.join(reasons)}")
    rows = [(name, task) for task in results for name in sources.sets_by_task().get(task, [])]
    if missing := [f"{name} ({task})" for name, task in rows if name not in about["sets"]]:
        print(f"not scored: {', '.join(missing)}")


if __name__ == "__main__":
    sys.exit(main())
