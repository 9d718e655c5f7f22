"""Predictions for a dataset, on disk: written sample by sample, checked when they are read.

Stands between `inference.py`, which predicts, and `benchmarks.py`, which scores. Each dataset has a
folder:

    predictions.json   COCO's result format of the task (`LAYOUTS`)
    panoptic/*.png     segments, of a panoptic set
    captions.json      COCO's caption results, of grounded conversation
    about.json         which records were predicted, and by what model
    unfinished/        until all of them are: a line of JSON for each record that is done

Predictions of other programs are read as well; they need no about.json if every record has an
entry. Legend: N masks, H W image size.
"""

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
    read_segment_ids,
    segment_colours,
    take,
)
from xsam.files import partial_of, read_json, write_whole
from xsam.prompts import strip_marks
from xsam.results import SegmentationResult

PREDICTIONS_FILE, CAPTIONS_FILE, ABOUT_FILE = "predictions.json", "captions.json", "about.json"

PNG_FOLDER, UNFINISHED = "panoptic", "unfinished"


@dataclass(frozen=True)
class Layout:
    """The entries of a file of predictions."""

    key: str  # the field that says which record an entry is for
    is_single: bool  # every record has one entry, and one only
    fields: dict[str, type | tuple[type, ...]]  # the other fields that are read, and their types


_SHAPE = (dict, list)  # an RLE, or a list of polygons or RLEs
_INSTANCE = {"segmentation": _SHAPE, "category_id": int, "score": float}
_SEGMENTS = {"file_name": str, "segments_info": list}  # of these each has "id" and "category_id"

LAYOUTS = {  # by the kind of prediction (`Dataset.prediction_kind`)
    "panoptic": Layout("image_id", True, _SEGMENTS),
    "instances": Layout("image_id", False, _INSTANCE),
    "semantic": Layout("image_id", False, {"segmentation": _SHAPE, "category_id": int}),
    # Instances of category 1, each with its "phrase"; one that has none is scored without.
    "grounded": Layout("image_id", False, _INSTANCE),
    # null where nothing was found; "image_id", "score" and "answer" are written, but not needed.
    "mask": Layout("id", True, {"segmentation": (*_SHAPE, type(None))}),
    "answer": Layout("question_id", True, {"answer": str}),
}

CAPTIONS = Layout("image_id", True, {"caption": str})


def kind_of(dataset: Dataset) -> str:
    """Which of LAYOUTS its predictions have. Raises ValueError for a set that is not scored."""
    if not dataset.prediction_kind:
        raise ValueError(f"{dataset.name}: a set to train on, not one that is scored")
    return dataset.prediction_kind


def keys_of(dataset: Dataset, num_samples: int | None = None) -> list[int | str]:
    """The keys of its (first) records, which must differ."""
    keys = [dataset.key(index) for index in range(len(dataset))][:num_samples]
    if len(set(keys)) < len(keys):
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise ValueError(f"{dataset.annotations}: {twice!r} is there more than once")
    return keys


# ---- writing -------------------------------------------------------------------------------------


def _entries(kind: str, key, sample: Sample, prediction: SegmentationResult) -> list[dict]:
    """A prediction as entries of its set's file; panoptic segments are numbered from 1."""
    entry = {LAYOUTS[kind].key: key}
    if kind == "answer":
        return [entry | {"answer": prediction.answer}]
    if kind == "mask":
        mask = prediction.masks.any(axis=0)
        entry |= {"image_id": sample.image_id, "segmentation": None}
        if mask.any():
            entry["segmentation"] = encode_mask(mask)
        score = max(prediction.scores, default=0.0)
        return [entry | {"score": score, "answer": prediction.answer}]
    ids = [1 if kind == "grounded" else sample.category_ids[n] for n in prediction.categories]
    if kind == "panoptic":
        segments = [{"id": n, "category_id": category} for n, category in enumerate(ids, 1)]
        return [entry | {"file_name": _png_name(key), "segments_info": segments}]
    entries = []
    for index, mask in enumerate(prediction.masks):
        each = entry | {"category_id": ids[index], "segmentation": encode_mask(mask)}
        if kind != "semantic":
            each["score"] = prediction.scores[index]
        if kind == "grounded":
            each["phrase"] = prediction.labels[index]
        entries.append(each)
    return entries


def _png_name(key: int | str) -> str:
    return f"{key:012d}.png" if isinstance(key, int) else f"{key}.png"


def write_segments(path: Path, masks: np.ndarray) -> None:
    """Disjoint masks bool [N, H, W] as a COCO panoptic PNG whose ids count from 1."""
    ids = np.zeros(masks.shape[1:], np.uint32)
    for number, mask in enumerate(masks, 1):
        ids[mask] = number
    Image.fromarray(segment_colours(ids)).save(path)


class Writer:
    """Writes the predictions of one process for one set, record by record. What was written stays
    if the run is killed; a line cut short is ignored, and its record predicted again."""

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
        """Appends the predictions of these records to the file of this process."""
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
    """Makes the folder for the predictions of a set, or finds the one that was begun.

    Raises ValueError where the folder holds predictions that were made by other weights, with other
    settings or for other records; `overwrite` deletes these instead.
    """
    about = json.loads(json.dumps({"keys": keys, "made_by": made_by}))
    path = folder / ABOUT_FILE
    if path.is_file():
        before = read_json(path, dict)
        if before != about and not overwrite:
            old, new = before.get("made_by", {}), about["made_by"]
            names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
            raise ValueError(
                f"{folder}: holds predictions made with other {', '.join(names) or 'records'}; "
                "give another --out, or --overwrite"
            )
        if before != about:
            stale = folder.with_name(f".{folder.name}.stale")  # whole or gone, if this is killed
            shutil.rmtree(stale, ignore_errors=True)
            folder.rename(stale)
            shutil.rmtree(stale)
    if not path.is_file():
        if folder.exists() and {*folder.iterdir()} - {partial_of(path)}:
            raise ValueError(f"{folder}: not empty, and no {ABOUT_FILE} in it; give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(about))
    if is_complete(folder):  # a run that was killed while it deleted this leaves some
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        return
    (folder / UNFINISHED).mkdir(exist_ok=True)
    if kind == "panoptic":
        (folder / PNG_FOLDER).mkdir(exist_ok=True)


def finished_records(folder: Path) -> dict:
    """{key: record} of what was predicted so far."""
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
    """Whether all is predicted: the file of the predictions is the last one to be written."""
    return (folder / PREDICTIONS_FILE).is_file()


def complete(folder: Path, kind: str, keys: list) -> None:
    """Joins the predictions of all ranks, in the order of `keys`, into the files of the set."""
    records = finished_records(folder)
    entries = [entry for key in keys for entry in records[key]["entries"]]
    if kind == "grounded":
        captions = [{"image_id": key, "caption": records[key]["caption"]} for key in keys]
        write_whole(folder / CAPTIONS_FILE, json.dumps(captions))
    content = {"annotations": entries} if kind == "panoptic" else entries
    write_whole(folder / PREDICTIONS_FILE, json.dumps(content))
    shutil.rmtree(folder / UNFINISHED)


# ---- reading -------------------------------------------------------------------------------------


class SavedPredictions:
    """The predictions for a set, read from its folder and checked against the set.

    Raises ValueError that names file and entry at a record that the set lacks, one that is there
    twice, a category outside the list or a field of another type; and where some of the set's
    records have no prediction: partial predictions are not scored. All but the masks is checked
    here; a mask is checked as it is decoded, when the size of its image is known.
    """

    def __init__(self, folder: Path, dataset: Dataset, num_samples: int | None = None):
        """`num_samples`: of the set's first records only; predictions of others may be there."""
        self.folder, self.kind = Path(folder), kind_of(dataset)
        self.dataset, self.all_keys = dataset, keys_of(dataset)
        self.keys, layout = self.all_keys[:num_samples], LAYOUTS[self.kind]
        self.categories = dataset.category_index
        if (self.folder / UNFINISHED).exists():
            raise ValueError(
                f"{self.folder}: not finished; the command that began it goes on with it"
            )
        path, captions_path = self.folder / PREDICTIONS_FILE, self.folder / CAPTIONS_FILE
        self.entries = self._read(path, layout)  # (where, entry) pairs of each record
        self.captions, predicted = {}, self._predicted_keys()
        if self.kind == "grounded":  # a record that has a caption was predicted
            captions = self._read(captions_path, CAPTIONS)
            self._require(captions_path, {key for key in self.keys if captions[key]})
            self.captions = {key: captions[key][0][1]["caption"] for key in self.keys}
            predicted = predicted or set(self.keys)
        if predicted is None or layout.is_single:
            self._require(path, {key for key in self.keys if self.entries[key]})
        if predicted is not None:
            self._require(path, predicted)

    def _read(self, path: Path, layout: Layout) -> dict:
        """(where, entry) pairs of each record, in the order of the file; their fields checked."""
        content = read_json(path, dict if self.kind == "panoptic" else list)
        if self.kind == "panoptic":
            content = take(content, "annotations", list, str(path))
        found = {key: [] for key in self.all_keys}
        for index, entry in enumerate(content):
            where = f"{path}: entry {index}"
            key = take(entry, layout.key, (int, str), where)
            key = str(key) if self.kind == "answer" else key  # a table's index is text
            if key not in found:
                raise ValueError(f"{where}: {layout.key} {key!r} is not in {self.dataset.name}")
            if layout.is_single and found[key]:
                raise ValueError(f"{where}: {layout.key} {key!r} is there more than once")
            for name, kind in layout.fields.items():
                entry[name] = take(entry, name, kind, where)
            self._check_categories(entry, layout, where)
            found[key].append((where, entry))
        return found

    def _check_categories(self, entry: dict, layout: Layout, where: str) -> None:
        """The category of an entry, or the categories and ids of its segments."""
        segments = entry["segments_info"] if "segments_info" in layout.fields else []
        ids = [take(segment, "id", int, where) for segment in segments]
        if len(set(ids)) < len(ids):
            raise ValueError(f"{where}: a segment id is there twice")
        if not all(0 < number < len(SEGMENT_IDS) for number in ids):
            raise ValueError(f"{where}: a segment id is no colour")
        for segment, number in zip(segments, ids, strict=True):
            segment["id"] = number
        for record in [entry] if "category_id" in layout.fields else segments:
            number = take(record, "category_id", int, where)
            record["category_id"] = number  # other programs may write it as a text
            if number not in self.categories:
                raise ValueError(
                    f"{where}: category {number} is not in the list of {self.dataset.name}"
                )

    def _predicted_keys(self) -> set | None:
        """The records that were predicted, by about.json; None without it."""
        path = self.folder / ABOUT_FILE
        if not path.is_file():
            return None
        keys, known = take(read_json(path, dict), "keys", list, str(path)), set(self.all_keys)
        for key in keys:
            if not isinstance(key, int | str) or key not in known:
                raise ValueError(f"{path}: {key!r} is not in {self.dataset.name}")
        if len(set(keys)) < len(keys):
            raise ValueError(f"{path}: a record is there more than once")
        return set(keys)

    def _require(self, path: Path, present: set) -> None:
        if missing := [key for key in self.keys if key not in present]:
            raise ValueError(
                f"{path}: {len(missing)} of the {len(self.keys)} records of {self.dataset.name} "
                f"have no prediction, first {missing[0]!r}; partial predictions are not scored"
            )

    # What scoring reads of the record `index` of `keys`; size: (height, width) of its image.

    def segments(self, index: int, size: tuple[int, int]) -> tuple[np.ndarray, dict[int, int]]:
        """Panoptic: the map of segment ids [H, W], 0 where there is none, and the index of each
        one's category. Every id of the map has to be listed, and every listed one in the map."""
        ((where, entry),) = self.entries[self.keys[index]]
        path, segments = self.folder / PNG_FOLDER / entry["file_name"], entry["segments_info"]
        ids = read_segment_ids(path, size)
        classes = {each["id"]: self.categories[each["category_id"]] for each in segments}
        drawn, listed = set(np.unique(ids).tolist()) - {0}, set(classes)
        if drawn - listed:
            raise ValueError(f"{path}: segment {min(drawn - listed)} is not in {where}")
        if listed - drawn:
            raise ValueError(f"{where}: segment {min(listed - drawn)} is not in {path}")
        return ids, classes

    def instances(self, index: int, size: tuple[int, int]) -> list[tuple[int, dict, float]]:
        """(index of the category, RLE, score) of each instance."""
        found = []
        for where, entry in self.entries[self.keys[index]]:
            rle = entry["segmentation"]
            if isinstance(rle, dict):
                rle = checked_rle(rle, size, where)
            else:
                rle = encode_mask(decode_mask(rle, size, where, may_be_empty=True))
            found.append((self.categories[entry["category_id"]], rle, float(entry["score"])))
        return found

    def class_map(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Semantic: the index of each pixel's category, int32 [H, W]; -1 where it has none."""
        classes = np.full(size, -1, np.int32)
        for where, entry in self.entries[self.keys[index]]:
            mask = decode_mask(entry["segmentation"], size, where, may_be_empty=True)
            if (classes[mask] >= 0).any():
                raise ValueError(f"{where}: covers pixels that have another category already")
            classes[mask] = self.categories[entry["category_id"]]
        return classes

    def mask(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """The one mask, bool [H, W]; empty where nothing was found."""
        ((where, entry),) = self.entries[self.keys[index]]
        if entry["segmentation"] is None:
            return np.zeros(size, bool)
        return decode_mask(entry["segmentation"], size, where, may_be_empty=True)

    def mask_score(self, index: int) -> float:
        """The score of the one mask; -inf where nothing was found. Raises ValueError where the file
        has none."""
        ((where, entry),) = self.entries[self.keys[index]]
        return -np.inf if entry["segmentation"] is None else take(entry, "score", float, where)

    def phrases(self, index: int) -> list[str]:
        """The phrase of each grounded mask."""
        return [str(entry.get("phrase", "")) for _, entry in self.entries[self.keys[index]]]

    def answer(self, index: int) -> str:
        """The text of the answer, or of the caption without its marks; empty where the format has
        none."""
        key = self.keys[index]
        if self.kind in ("answer", "mask"):
            return self.entries[key][0][1].get("answer", "")
        return self.captions.get(key, "")

    def prediction(self, index: int, sample: Sample) -> SegmentationResult:
        """The prediction of a record as the model gave it, to be drawn."""
        entries, size = self.entries[self.keys[index]], (sample.image.height, sample.image.width)
        if self.kind == "answer":
            masks, categories, scores = [], [], []
        elif self.kind == "panoptic":
            ids, classes = self.segments(index, size)
            masks, categories = [ids == number for number in classes], list(classes.values())
            scores = [None] * len(masks)
        elif self.kind == "mask":
            masks = [mask for mask in (self.mask(index, size),) if mask.any()]
            categories, scores = [0] * len(masks), [entries[0][1].get("score")] * len(masks)
        else:
            masks = [
                decode_mask(entry["segmentation"], size, where, may_be_empty=True)
                for where, entry in entries
            ]
            categories = [self.categories[entry["category_id"]] for _, entry in entries]
            scores = [entry.get("score") for _, entry in entries]
        pairs = zip(sample.category_ids, sample.names, strict=False)
        names = {self.categories.get(number): name for number, name in pairs}
        labels = [names.get(category, sample.names[0]) for category in categories]
        labels = self.phrases(index) if self.kind == "grounded" else labels
        stacked = np.stack(masks) if masks else np.zeros((0, *size), bool)
        scores = None if None in scores else scores  # its format has none
        answer = self.answer(index)
        return SegmentationResult(sample.image, stacked, categories, labels, scores, answer)
