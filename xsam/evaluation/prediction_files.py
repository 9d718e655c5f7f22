"""What a model said of a dataset, on disk: written as it goes, read back with suspicion.

Between `model.py`, which answers, and `scoring.py`, which counts. Of each dataset a folder:

    predictions.json   COCO's result format of the task (`LAYOUTS`)
    panoptic/*.png     segments, of a panoptic set
    captions.json      COCO's caption results, of grounded conversation
    about.json         which records were asked, and of what model
    unfinished/        until all of them are: a line of JSON for each record that is done

Predictions of other programs are read as well; about.json may be absent where every record has an
entry. Legend: N masks, H W image size.
"""

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from xsam.data import Sample
from xsam.datasets.base import Dataset
from xsam.datasets.formats import (
    SEGMENT_IDS,
    checked_rle,
    decode_mask,
    encode_mask,
    read_json,
    read_segment_ids,
    take,
)
from xsam.postprocess import SegmentationResult
from xsam.prompts import strip_marks

PREDICTIONS_FILE, CAPTIONS_FILE, ABOUT_FILE = "predictions.json", "captions.json", "about.json"


PNG_FOLDER, UNFINISHED = "panoptic", "unfinished"


@dataclass(frozen=True)
class Layout:
    """How the predictions for one kind of set lie in its file."""

    key: str  # the field that says which record an entry is for
    is_single: bool  # every record has one entry, and one only


LAYOUTS = {
    "panoptic": Layout("image_id", True),  # {"file_name", "segments_info": [{"id", "category_id"}]}
    "instances": Layout("image_id", False),  # {"category_id", "segmentation", "score"}
    "semantic": Layout("image_id", False),  # {"category_id", "segmentation"}
    "grounded": Layout("image_id", False),  # instances of category 1, each with its "phrase"
    "mask": Layout("id", True),  # {"image_id", "segmentation" (null: nothing), "score"}
    "answer": Layout("question_id", True),  # {"answer"}
}


_KINDS = {"panoptic": "panoptic", "instance": "instances", "semantic": "semantic"}


_KINDS |= {"refs": "mask", "reason": "mask", "gcg_scored": "grounded", "tsv": "answer"}


def kind_of(dataset: Dataset) -> str:
    """Which of LAYOUTS its predictions have. Raises ValueError for a set that is not scored."""
    source = dataset.source
    if source.format == "visual_prompts":
        return "mask" if source.task == "interactive" else "instances"
    if source.format not in _KINDS:
        raise ValueError(f"{dataset.name}: a set to train on, not one that is scored")
    return _KINDS[source.format]


def keys_of(dataset: Dataset, num_samples: int | None = None) -> list[int | str]:
    """The keys of its (first) records, which must differ."""
    keys = [dataset.key(index) for index in range(len(dataset))][:num_samples]
    if len(set(keys)) < len(keys):
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise ValueError(f"{dataset.annotations}: {twice!r} is there more than once")
    return keys


def category_index(dataset: Dataset) -> dict[int, int]:
    """The place of each category id that predictions may name."""
    if kind_of(dataset) == "grounded":
        return {1: 0}
    if dataset.source.format == "visual_prompts":
        return {number: place for place, number in enumerate(sorted(dataset.category_names))}
    return dataset.category_index


# ---- writing -------------------------------------------------------------------------------------


def _entries(kind: str, key, sample: Sample, prediction: SegmentationResult) -> list[dict]:
    """A prediction as entries of its set's file; panoptic segments are numbered from 1."""
    entry = {LAYOUTS[kind].key: key}
    if kind == "answer":
        return [entry | {"answer": prediction.answer}]
    if kind == "mask":
        found = prediction.masks.any(axis=0) if len(prediction.masks) else None
        rle = encode_mask(found) if found is not None and found.any() else None
        score = max(prediction.scores, default=0.0)
        entry |= {"image_id": sample.image_id, "segmentation": rle, "score": score}
        return [entry | {"answer": prediction.answer}]
    if kind == "panoptic":
        numbers = [sample.category_ids[category] for category in prediction.categories]
        segments = [{"id": n, "category_id": number} for n, number in enumerate(numbers, 1)]
        return [entry | {"file_name": _png_name(key), "segments_info": segments}]
    entries = []
    found = zip(prediction.masks, prediction.categories, prediction.scores, strict=True)
    for place, (mask, category, score) in enumerate(found):
        number = 1 if kind == "grounded" else sample.category_ids[category]
        each = entry | {"category_id": number, "segmentation": encode_mask(mask)}
        if kind != "semantic":
            each["score"] = score
        if kind == "grounded":
            each["phrase"] = prediction.labels[place]
        entries.append(each)
    return entries


def _png_name(key: int | str) -> str:
    return f"{key:012d}.png" if isinstance(key, int) else f"{key}.png"


def write_segments(path: Path, masks: np.ndarray) -> None:
    """Disjoint masks bool [N, H, W] as a COCO panoptic PNG whose ids count from 1."""
    ids = np.zeros(masks.shape[1:], np.uint32)
    for number, mask in enumerate(masks, 1):
        ids[mask] = number
    colours = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1)
    Image.fromarray(colours.astype(np.uint8)).save(path)


class Writer:
    """The predictions of one process for one set, record by record. What was written stays where
    the run is killed; a line cut short is forgotten, and its record asked again."""

    def __init__(self, folder: Path, kind: str, rank: int):
        self.folder, self.kind = folder, kind
        unfinished = folder / UNFINISHED
        number = sum(1 for _ in unfinished.glob(f"{rank}_*.jsonl"))
        self.file = (unfinished / f"{rank}_{number}.jsonl").open("x", encoding="utf-8")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def write(
        self, keys: list, samples: list[Sample], predictions: list[SegmentationResult]
    ) -> None:
        lines = []
        for key, sample, prediction in zip(keys, samples, predictions, strict=True):
            if self.kind == "panoptic":
                write_segments(self.folder / PNG_FOLDER / _png_name(key), prediction.masks)
            record = {"key": key, "entries": _entries(self.kind, key, sample, prediction)}
            if self.kind == "grounded":
                record["caption"] = strip_marks(prediction.answer)
            lines.append(json.dumps(record) + "\n")
        self.file.write("".join(lines))
        self.file.flush()


def begin(folder: Path, kind: str, keys: list, made_by: dict, overwrite: bool = False) -> None:
    """Makes the folder of a set that is going to be asked; goes on with one that was begun.

    Where it holds predictions that were made in another way, by other weights or settings, or for
    other records, they go if they may be overwritten. Raises ValueError if not.
    """
    about = json.loads(json.dumps({"keys": keys, "made_by": made_by}))
    path = folder / ABOUT_FILE
    if path.is_file():
        before = read_json(path, dict)
        if before != about and overwrite:
            stale = folder.with_name(f".{folder.name}.stale")  # whole or gone, if this is killed
            shutil.rmtree(stale, ignore_errors=True)
            folder.rename(stale)
            shutil.rmtree(stale)
        elif before != about:
            old, new = before.get("made_by", {}), about["made_by"]
            names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
            raise ValueError(
                f"{folder}: holds predictions made with another {', '.join(names) or 'set'}; "
                "give another --out, or --overwrite"
            )
    if not path.is_file():
        if folder.exists() and {*folder.iterdir()} - {_temporary(path)}:
            raise ValueError(f"{folder}: not empty, and no {ABOUT_FILE} in it; give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(path, about)
    if is_complete(folder):  # a run that was killed as it tidied up leaves something
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        return
    (folder / UNFINISHED).mkdir(exist_ok=True)
    if kind == "panoptic":
        (folder / PNG_FOLDER).mkdir(exist_ok=True)


def finished_records(folder: Path) -> dict:
    """{key: record} of what is done so far."""
    records = {}
    for path in sorted((folder / UNFINISHED).glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:  # the line that a killed run was writing
                continue
            records[record["key"]] = record
    return records


def is_complete(folder: Path) -> bool:
    """The file of the predictions is the last one to be written."""
    return (folder / PREDICTIONS_FILE).is_file()


def complete(folder: Path, kind: str, keys: list) -> None:
    """Joins what all ranks wrote, in the order of `keys`, into the files of the set."""
    records = finished_records(folder)
    entries = [entry for key in keys for entry in records[key]["entries"]]
    if kind == "grounded":
        captions = [{"image_id": key, "caption": records[key]["caption"]} for key in keys]
        _write_whole(folder / CAPTIONS_FILE, captions)
    content = {"annotations": entries} if kind == "panoptic" else entries
    _write_whole(folder / PREDICTIONS_FILE, content)
    shutil.rmtree(folder / UNFINISHED)


def _write_whole(path: Path, content) -> None:
    """A file with this content, or as it was, whenever the run is killed."""
    _temporary(path).write_text(json.dumps(content), encoding="utf-8")
    _temporary(path).replace(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


# ---- reading -------------------------------------------------------------------------------------


class SavedPredictions:
    """The predictions for a set, read from its folder and checked against the set.

    Raises ValueError that names file and entry at a record that the set lacks, one that is there
    twice, a category outside the list or a field of another type; and where some of the set's
    records have no prediction: partial predictions are not scored.
    """

    def __init__(self, folder: Path, dataset: Dataset, num_samples: int | None = None):
        """`num_samples`: the set's first records alone are wanted, others may be there too."""
        self.folder, self.kind = Path(folder), kind_of(dataset)
        self.dataset, self.every = dataset, keys_of(dataset)
        self.keys, layout = self.every[:num_samples], LAYOUTS[self.kind]
        self.categories = category_index(dataset) if self.kind not in ("mask", "answer") else {}
        if (self.folder / UNFINISHED).exists():
            raise ValueError(
                f"{self.folder}: not finished; the command that began it goes on with it"
            )
        path = self.folder / PREDICTIONS_FILE
        content = read_json(path, dict if self.kind == "panoptic" else list)
        if self.kind == "panoptic":
            content = take(content, "annotations", list, str(path))
        self.entries, self.captions = self._by_record(path, content, layout), {}
        for where, entry in itertools.chain(*self.entries.values()):
            self._check(entry, where)
        asked = self._asked()
        if self.kind == "grounded":  # what has a caption was asked
            captions_path = self.folder / CAPTIONS_FILE
            content = read_json(captions_path, list)
            captions = self._by_record(captions_path, content, Layout("image_id", True))
            self._refuse_missing(captions_path, [key for key in self.keys if not captions[key]])
            for key, where, entry in ((key, *captions[key][0]) for key in self.keys):
                self.captions[key] = take(entry, "caption", str, where)
            asked = asked or set(self.keys)
        if asked is None or layout.is_single:
            self._refuse_missing(path, [key for key in self.keys if not self.entries[key]])
        if asked is not None:
            self._refuse_missing(path, [key for key in self.keys if key not in asked])

    def _by_record(self, path: Path, content: list, layout: Layout) -> dict:
        """(where, entry) pairs of each record, in the order of the file."""
        found = {key: [] for key in self.every}
        for place, entry in enumerate(content):
            where = f"{path}: entry {place}"
            key = take(entry, layout.key, (int, str), where)
            key = str(key) if self.kind == "answer" else key  # a table's index is text
            if key not in found:
                raise ValueError(f"{where}: {layout.key} {key!r} is not in {self.dataset.name}")
            if layout.is_single and found[key]:
                raise ValueError(f"{where}: {layout.key} {key!r} is there more than once")
            found[key].append((where, entry))
        return found

    def _asked(self) -> set | None:
        """The records that about.json says were asked; None without it."""
        path = self.folder / ABOUT_FILE
        if not path.is_file():
            return None
        keys = take(read_json(path, dict), "keys", list, str(path))
        known = set(self.every)
        for key in keys:
            if not isinstance(key, int | str) or key not in known:
                raise ValueError(f"{path}: {key!r} is not in {self.dataset.name}")
        if len(set(keys)) < len(keys):
            raise ValueError(f"{path}: a record is there more than once")
        return set(keys)

    def _refuse_missing(self, path: Path, missing: list) -> None:
        if missing:
            raise ValueError(
                f"{path}: {len(missing)} of the {len(self.keys)} records of {self.dataset.name} "
                f"have no prediction, first {missing[0]!r}; partial predictions are not scored"
            )

    def _check(self, entry: dict, where: str) -> None:
        """That its fields are there and of the right types, and its categories known."""
        if self.kind == "answer":
            take(entry, "answer", str, where)
            return
        if self.kind == "panoptic":
            take(entry, "file_name", str, where)
            segments = take(entry, "segments_info", list, where)
            numbers = [take(segment, "id", int, where) for segment in segments]
            if len(set(numbers)) < len(numbers):
                raise ValueError(f"{where}: a segment id is there twice")
            if not all(0 < number < len(SEGMENT_IDS) for number in numbers):
                raise ValueError(f"{where}: a segment id is no colour")
            for segment in segments:
                self._category(segment, where)
            return
        may_be_nothing = (type(None),) if self.kind == "mask" else ()
        take(entry, "segmentation", (dict, list, *may_be_nothing), where)
        if self.kind == "mask":
            return
        self._category(entry, where)
        if self.kind != "semantic":
            take(entry, "score", float, where)

    def _category(self, record: dict, where: str) -> int:
        """The place of its category."""
        number = take(record, "category_id", int, where)
        if number not in self.categories:
            raise ValueError(
                f"{where}: category {number} is not in the list of {self.dataset.name}"
            )
        return self.categories[number]

    # What scoring asks for, of one record.

    def segments(self, key, size: tuple[int, int]) -> tuple[np.ndarray, dict[int, int]]:
        """Panoptic: the map of segment ids [H, W], 0 where there is none, and the place of each
        one's category. Every id of the map has to be listed, and every listed one to be there."""
        ((where, entry),) = self.entries[key]
        path = self.folder / PNG_FOLDER / entry["file_name"]
        ids = read_segment_ids(path, size)
        classes = {each["id"]: self._category(each, where) for each in entry["segments_info"]}
        drawn = set(np.unique(ids).tolist()) - {0}
        if drawn - set(classes):
            raise ValueError(f"{path}: segment {min(drawn - set(classes))} is not in {where}")
        if set(classes) - drawn:
            raise ValueError(f"{where}: segment {min(set(classes) - drawn)} is not in {path}")
        return ids, classes

    def instances(self, key, size: tuple[int, int]) -> list[tuple[int, dict, float]]:
        """(place of the category, RLE, score) of each instance."""
        return [
            (self._category(entry, where), self._rle(entry, size, where), float(entry["score"]))
            for where, entry in self.entries[key]
        ]

    def class_map(self, key, size: tuple[int, int]) -> np.ndarray:
        """Semantic: the place of each pixel's category, int32 [H, W]; -1 where it has none."""
        classes = np.full(size, -1, np.int32)
        for where, entry in self.entries[key]:
            mask = decode_mask(entry["segmentation"], size, where, may_be_empty=True)
            if (classes[mask] >= 0).any():
                raise ValueError(f"{where}: covers pixels that have another category already")
            classes[mask] = self._category(entry, where)
        return classes

    def mask(self, key, size: tuple[int, int]) -> np.ndarray:
        """The one mask, bool [H, W]; empty where nothing was found."""
        ((where, entry),) = self.entries[key]
        shape = entry["segmentation"]
        if shape is None:
            return np.zeros(size, bool)
        return decode_mask(shape, size, where, may_be_empty=True)

    def phrases(self, key) -> list[str]:
        """What each grounded mask is a mask of."""
        return [str(entry.get("phrase", "")) for _, entry in self.entries[key]]

    def answer(self, key) -> str:
        ((_, entry),) = self.entries[key]
        return entry["answer"]

    def _rle(self, entry: dict, size: tuple[int, int], where: str) -> dict:
        shape = entry["segmentation"]
        if isinstance(shape, dict):
            return checked_rle(shape, size, where)
        return encode_mask(decode_mask(shape, size, where, may_be_empty=True))

    def prediction(self, index: int, sample: Sample) -> SegmentationResult:
        """What was said of a record, as the model gave it: for a picture."""
        key, size = self.keys[index], (sample.image.height, sample.image.width)
        masks, places, scores, labels = [], [], [], []
        answer = self.captions.get(key, "")
        if self.kind == "answer":
            answer = self.answer(key)
        elif self.kind == "mask":
            mask = self.mask(key, size)
            masks, answer = [mask] if mask.any() else [], self.entries[key][0][1].get("answer", "")
            places, scores = [0] * len(masks), [self.entries[key][0][1].get("score")] * len(masks)
        elif self.kind == "panoptic":
            ids, classes = self.segments(key, size)
            masks, places = [ids == number for number in classes], list(classes.values())
            scores = [None] * len(masks)
        else:
            for where, entry in self.entries[key]:
                masks.append(decode_mask(entry["segmentation"], size, where, may_be_empty=True))
                places.append(self._category(entry, where))
                scores.append(entry.get("score"))
        if self.kind == "grounded":
            labels = self.phrases(key)
        else:
            order = sorted(zip(sample.category_ids, sample.names, strict=False))
            by_place = {self.categories[number]: name for number, name in order if self.categories}
            labels = [by_place.get(place, sample.names[0]) for place in places]
        stacked = np.stack(masks) if masks else np.zeros((0, *size), bool)
        scores = None if None in scores else scores  # its format has none
        return SegmentationResult(sample.image, stacked, places, labels, scores, answer)
