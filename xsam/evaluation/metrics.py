"""The metrics: panoptic quality, mask AP, mIoU, cIoU and gIoU, grounded captions, answers to
questions.

Every metric has two steps: a small record of one sample, which any process can make, and the
summary of the records of all samples. The summary depends on the order of the records alone, so
any number of processes gives the same figures to the last digit. Figures are in percent; None
means that there was nothing to count. Needs NumPy, SciPy and pycocotools; captions need
pycocoevalcap and Java as well.

Legend: T true and N predicted masks of an image, K classes, H W pixels. A mask is bool [H, W], an
RLE is COCO's compressed one.
"""

import contextlib
import importlib.util
import io
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment

Figures = dict[str, float | None]  # by metric; None where there is nothing to count
Overlap = tuple[int, int, bool, bool]  # see `mask_overlap`
Match = tuple[str, int, float]  # see `match_segments`
Embed = Callable[[list[str]], np.ndarray]  # embeddings [n, d] of n phrases


def _percent(values: list | np.ndarray) -> float | None:
    """100 times the mean."""
    return float(100 * np.mean(values)) if len(values) else None


# ---- panoptic quality ----------------------------------------------------------------------------


def match_segments(
    true_ids: np.ndarray,
    true_segments: dict[int, tuple[int, bool]],
    predicted_ids: np.ndarray,
    predicted_classes: dict[int, int],
    one_crowd_per_class: bool = False,
) -> list[Match]:
    """One image's record, by Kirillov et al. 2019, section 4, as panopticapi counts: ("tp", class,
    IoU) of each pair, ("fn", class, 0.0) of each true segment that is missed, ("fp", class, 0.0) of
    each predicted segment that matches none.

    True segment ids [H, W] with their (class, is crowd), predicted ids [H, W] with their class; 0
    is void in both, and every other id of a map must be in its dict. Two segments match where the
    classes agree and IoU > 0.5; the union leaves out the prediction's pixels on void. A missed
    crowd region is no error. Neither is an unmatched prediction of which more than half lies on
    void or on crowd of its class. A true segment without a pixel is missed; a predicted one without
    a pixel does not count.

    `one_crowd_per_class` decides what excuses a prediction where an image has several crowd regions
    of one class. By default (False) it is their union. True is panopticapi's rule, the last of them
    alone in the order of `true_segments`: it keeps one region for each class, so that each
    overwrites the one before it. Another difference to panopticapi always holds: it takes a true
    segment's area from the annotation file, where pixels are counted here, because ADE20K's files
    hold areas from before one segment hid another.
    """
    overlap, true_area, predicted_area = _overlaps(true_ids, predicted_ids)
    record, matched_true, matched_predicted = [], set(), set()
    for (true, predicted), area in overlap.items():
        if true and predicted and true_segments[true] == (predicted_classes[predicted], False):
            void = overlap.get((0, predicted), 0)
            iou = area / (true_area[true] + predicted_area[predicted] - area - void)
            if iou > 0.5:
                record.append(("tp", predicted_classes[predicted], iou))
                matched_true.add(true)
                matched_predicted.add(predicted)
    for true, (category, is_crowd) in true_segments.items():
        if true not in matched_true and not is_crowd:
            record.append(("fn", category, 0.0))
    for predicted, category in predicted_classes.items():
        crowds = [true for true, kind in true_segments.items() if kind == (category, True)]
        excused = [0, *(crowds[-1:] if one_crowd_per_class else crowds)]
        excused_area = sum(overlap.get((true, predicted), 0) for true in excused)
        area = predicted_area[predicted]
        if area and predicted not in matched_predicted and excused_area / area <= 0.5:
            record.append(("fp", category, 0.0))
    return record


def _overlaps(true_ids: np.ndarray, predicted_ids: np.ndarray) -> tuple[dict, Counter, Counter]:
    """Pixels of each pair of ids that share any, of each true id and of each predicted id."""
    assert true_ids.shape == predicted_ids.shape, f"{true_ids.shape}, {predicted_ids.shape} pixels"
    base = int(predicted_ids.max(initial=0)) + 1
    pairs, areas = np.unique(true_ids.astype(np.int64) * base + predicted_ids, return_counts=True)
    overlap = {
        divmod(pair, base): area for pair, area in zip(pairs.tolist(), areas.tolist(), strict=True)
    }
    true_area, predicted_area = Counter(), Counter()
    for (true, predicted), area in overlap.items():
        true_area[true] += area
        predicted_area[predicted] += area
    return overlap, true_area, predicted_area


def panoptic_quality(records: list[list[Match]], is_thing: list[bool]) -> Figures:
    """PQ, SQ and RQ over all classes, PQ over things and over stuff, of the records of
    `match_segments`, one list an image. Each is the mean over the classes that occur in the truth
    or in a prediction that counts."""
    true_positives, mistakes, iou = np.zeros((3, len(is_thing)))  # [K] each
    for kind, category, value in (match for record in records for match in record):
        if kind == "tp":
            true_positives[category] += 1
            iou[category] += value
        else:
            mistakes[category] += 1
    divisor = true_positives + mistakes / 2
    occurs, things = divisor > 0, np.array(is_thing, bool)
    quality = iou / np.maximum(divisor, 0.5)
    return {
        "PQ": _percent(quality[occurs]),
        "PQ_things": _percent(quality[occurs & things]),
        "PQ_stuff": _percent(quality[occurs & ~things]),
        "SQ": _percent((iou / np.maximum(true_positives, 1))[occurs]),
        "RQ": _percent((true_positives / np.maximum(divisor, 0.5))[occurs]),
    }


def segment_quality(record: list[Match]) -> float:
    """Panoptic quality of one image, 0 to 1, over its segments of all classes; 1 where there are
    none and none were predicted."""
    iou = sum(value for *_, value in record)
    num_pairs = sum(kind == "tp" for kind, *_ in record)
    return iou / ((num_pairs + len(record)) / 2) if record else 1.0


# ---- mask AP -------------------------------------------------------------------------------------


def collect_instances(
    image_id: int | str,
    num_categories: int,
    truth: list[tuple[int, dict, bool]],
    predicted: list[tuple[int, dict, float]],
) -> dict:
    """One image's record: its masks, checked.

    truth: (class 0..K-1, RLE, is crowd) of each true mask; predicted: (class, RLE, score) of each
    predicted one, of which the first counts first where scores are equal.
    """
    sizes = {tuple(rle["size"]) for _, rle, _ in [*truth, *predicted]}
    assert len(sizes) <= 1, f"masks of {sizes} in one image"
    for category, *_ in [*truth, *predicted]:
        assert 0 <= category < num_categories, f"class {category} of {num_categories}"
    return {"image_id": image_id, "truth": truth, "predicted": predicted}


def instance_quality(record: dict, least: float) -> float:
    """Panoptic quality of one image, 0 to 1, over the instances that are predicted with a score of
    `least` or more: AP says little of one image. Pairs have an IoU above 0.5 and the largest sum.
    Crowd regions are no target, and excuse predictions of their class that mostly lie on them."""
    found = [(category, rle) for category, rle, score in record["predicted"] if score >= least]
    classes, rles, is_crowd = zip(*record["truth"], strict=True) if record["truth"] else ([],) * 3
    is_target = ~np.array(is_crowd, bool)
    ious = np.zeros((len(found), len(rles)))  # [N, T]
    if ious.size:
        ious = np.array(coco_mask.iou([rle for _, rle in found], list(rles), list(is_crowd)))
        ious *= (np.array([c for c, _ in found])[:, None] == classes) & (ious > 0.5)
    is_excused = ious[:, ~is_target].any(axis=1)  # [N]
    ious = ious[:, is_target]  # [N, targets]
    pairs = np.transpose(linear_sum_assignment(ious, maximize=True))  # [pairs, 2]
    pairs = [(row, column) for row, column in pairs.tolist() if ious[row, column]]
    num_false = np.count_nonzero(~is_excused) - sum(not is_excused[row] for row, _ in pairs)
    mistakes = [("", 0, 0.0)] * (num_false + is_target.sum() - len(pairs))
    return segment_quality([*(("tp", 0, ious[pair]) for pair in pairs), *mistakes])


def average_precision(records: list[dict], num_categories: int) -> Figures:
    """AP, the mean over the IoU thresholds 0.50 to 0.95, and AP50 of the records of
    `collect_instances`, by pycocotools: masks of any area, up to the 100 best scored of a class and
    image, mean over the classes that have a true mask which is no crowd.

    Where scores are equal the image with the smaller id counts first, as in pycocotools.
    """
    records = sorted(records, key=lambda r: (isinstance(r["image_id"], str), r["image_id"]))
    tables = [_coco(records, masks, num_categories) for masks in ("truth", "predicted")]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(*tables, "segm")
        params = evaluation.params
        params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
        params.maxDets = params.maxDets[-1:]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, 0]  # [10 thresholds, 101 recalls, K]
    at_half = precision[np.isclose(params.iouThrs, 0.5)]  # [1, 101, K]
    return {"AP": _percent(precision[precision > -1]), "AP50": _percent(at_half[at_half > -1])}


def _coco(records: list[dict], masks: str, num_categories: int) -> COCO:
    """The "truth" or the "predicted" masks of the records, images numbered in their order."""
    annotations = []
    for image, record in enumerate(records):
        for category, rle, value in record[masks]:
            item = {"image_id": image, "category_id": category, "segmentation": rle}
            item |= {"area": int(coco_mask.area(rle)), "id": len(annotations) + 1}  # 0: no match
            annotations.append(item | {"iscrowd" if masks == "truth" else "score": value})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": n, "height": 0, "width": 0} for n in range(len(records))],  # RLEs have it
        "categories": [{"id": n} for n in range(num_categories)],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


# ---- semantic segmentation -----------------------------------------------------------------------


def count_pixels(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels of each true and predicted class, int64 [K, K+1]; records of images are simply added.

    truth, predicted: classes, int [H, W]. A pixel whose truth is none of 0..K-1, as 255, is left
    out; a prediction that is none of them goes to the last column.
    """
    assert truth.shape == predicted.shape, f"{truth.shape}, {predicted.shape} pixels"
    is_counted = (truth >= 0) & (truth < num_classes)
    # [pixels that count]
    truth, predicted = truth[is_counted].astype(np.int64), predicted[is_counted].astype(np.int64)
    predicted[(predicted < 0) | (predicted >= num_classes)] = num_classes
    size = (num_classes, num_classes + 1)
    return np.bincount(truth * size[1] + predicted, minlength=size[0] * size[1]).reshape(size)


def mean_iou(matrix: np.ndarray) -> Figures:
    """mIoU of the sum of the records of `count_pixels`: the mean over the classes that occur in the
    truth, as detectron2's evaluation takes it."""
    intersection, true_area = matrix.diagonal(), matrix.sum(axis=1)  # [K]
    union = true_area + matrix[:, :-1].sum(axis=0) - intersection
    occurs = true_area > 0
    return {"mIoU": _percent(intersection[occurs] / union[occurs])}


# ---- one mask per question -----------------------------------------------------------------------


def mask_overlap(
    truth: np.ndarray, predicted: np.ndarray, ignore: np.ndarray | None = None
) -> Overlap:
    """One sample's record: pixels of the intersection and of the union, whether there is a target
    and whether anything was predicted. All are masks; pixels of `ignore` count nowhere."""
    if ignore is not None:
        truth, predicted = truth & ~ignore, predicted & ~ignore
    intersection = np.count_nonzero(truth & predicted)
    union = np.count_nonzero(truth | predicted)
    return int(intersection), int(union), bool(truth.any()), bool(predicted.any())


def mask_quality(records: list[Overlap]) -> Figures:
    """cIoU, the sum of intersections over the sum of unions, and gIoU, the mean IoU, of the records
    of `mask_overlap`; an empty union is an IoU of 1 (Lai et al. 2024, LISA)."""
    intersection, union = (sum(each[n] for each in records) for n in (0, 1))
    ious = [each[0] / each[1] if each[1] else 1.0 for each in records]
    return {"cIoU": 100 * intersection / union if union else None, "gIoU": _percent(ious)}


def target_quality(records: list[Overlap]) -> Figures:
    """The protocol of gRefCOCO (Liu et al. 2023, GRES) of the records of `mask_overlap`.

    cIoU and gIoU are over all expressions. One without a target has an IoU of 1 if nothing was
    predicted, for then its union is empty; else 0, and its pixels are in the sum of unions. N_acc
    and T_acc are the shares of the expressions without and with a target that were recognised as
    such. cIoU_targets and gIoU_targets are over the expressions with a target alone, which is what
    X-SAM reports: its code reads no others.
    """
    targets = [each for each in records if each[2]]
    is_refused = [not is_found for *_, has_target, is_found in records if not has_target]
    recognised = {
        "N_acc": _percent(is_refused),
        "T_acc": _percent([is_found for *_, is_found in targets]),
    }
    alone = {f"{name}_targets": figure for name, figure in mask_quality(targets).items()}
    return mask_quality(records) | recognised | alone


# ---- grounded captions ---------------------------------------------------------------------------


def ground_masks(
    truth: list[dict], predicted: list[dict], similarity: np.ndarray | None = None
) -> tuple[float, int | None, int]:
    """One image's record: mean IoU of its pairs, number of phrases found, number of true masks, by
    the evaluation of GranD-f (Rasheed et al. 2024, GLaMM).

    truth, predicted: T and N RLEs. similarity: of the true and predicted phrases, [T, N]; without
    it no phrases are compared. Masks are paired one to one, the largest IoU first (of equal ones
    the first in the rows), while IoU > 0; without any pair the mean is 0. Phrases are found in the
    same order while a pair has IoU >= 0.5 and similarity >= 0.5. The first pair that lacks either
    ends the search, as in the published code: of two masks that fit, a wrong phrase on the better
    one hides the other.
    """
    ious = np.zeros((len(truth), len(predicted)))
    if truth and predicted:
        sizes = {tuple(rle["size"]) for rle in [*truth, *predicted]}
        assert len(sizes) == 1, f"masks of {sizes} in one image"
        ious = coco_mask.iou(predicted, truth, [0] * len(truth)).T.copy()  # [T, N]
    assert similarity is None or similarity.shape == ious.shape, f"{similarity.shape} phrases"
    positive, num_found, is_searching = [], 0, similarity is not None
    for _ in range(min(ious.shape)):
        pair = np.unravel_index(ious.argmax(), ious.shape)
        iou = float(ious[pair])
        if iou <= 0:
            break
        positive.append(iou)
        is_searching = is_searching and iou >= 0.5 and similarity[pair] >= 0.5
        num_found += is_searching
        ious[pair[0]], ious[:, pair[1]] = -1, -1
    mean = float(np.mean(positive)) if positive else 0.0
    return mean, None if similarity is None else int(num_found), len(truth)


def grounding_quality(records: list[tuple[float, int | None, int]]) -> Figures:
    """mIoU, the mean over all images of the ground truth, and recall, the share of all true masks
    that were found with their phrase, of the records of `ground_masks`. Masks of an image without
    phrases are not found; where no image has any there is no recall."""
    counts = [found for _, found, _ in records if found is not None]
    num_true = sum(total for *_, total in records)
    return {
        "mIoU": _percent([mean for mean, *_ in records]),
        "recall": 100 * sum(counts) / num_true if counts and num_true else None,
    }


def phrase_similarity(
    truth: list[str], predicted: list[str], embed: Embed | None = None
) -> np.ndarray:
    """Similarity of each true phrase to each predicted one, float64 [T, N].

    `embed` gives the embeddings [n, d] of n phrases, whose cosine is taken (GLaMM: the mean of the
    last states of bert-base-uncased). Without it the similarity is 1 where phrases are equal but
    for case and outer spaces, else 0.
    """
    if not truth or not predicted:
        return np.zeros((len(truth), len(predicted)))
    if embed is None:
        rows, columns = ([text.strip().lower() for text in each] for each in (truth, predicted))
        return np.array([[row == column for column in columns] for row in rows], np.float64)
    embeddings = np.asarray(embed([*truth, *predicted]), np.float64)  # [T + N, d]
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    embeddings = embeddings / np.where(lengths > 0, lengths, 1)
    return embeddings[: len(truth)] @ embeddings[len(truth) :].T


def caption_quality(truth: dict[Hashable, list[str]], predicted: dict[Hashable, str]) -> Figures:
    """METEOR (Banerjee and Lavie 2005) and CIDEr (Vedantam et al. 2015) of the true captions and
    the predicted one of each image, by pycocoevalcap; a caption may be empty.

    Raises ImportError where the package or Java is missing, ValueError where an image has only
    true captions or only a predicted one.
    """
    if lack := lacks_for_captions():
        raise ImportError(lack)
    both = {image for image in truth if truth[image] and image in predicted}
    if odd := [image for image in {**truth, **predicted} if image not in both]:
        raise ValueError(f"image {odd[0]!r} lacks its true or its predicted caption")
    if not truth:
        return {"METEOR": None, "CIDEr": None}
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # Both programs read one caption a line; METEOR separates the fields of a line by three bars.
    captions = {image: [*truth[image], predicted[image]] for image in truth}
    tokens = PTBTokenizer().tokenize(
        {
            image: [{"caption": " ".join(text.replace("|||", " ").split())} for text in texts]
            for image, texts in captions.items()
        }
    )
    if [len(texts) for texts in tokens.values()] != [len(texts) for texts in captions.values()]:
        raise ValueError("a caption holds a character at which the tokenizer breaks its line")
    parts = slice(None, -1), slice(-1, None)  # the true ones, the predicted one
    pair = [{image: texts[part] for image, texts in tokens.items()} for part in parts]
    with meteor() as program:
        score = program.compute_score(*pair)[0]
    return {"METEOR": 100 * float(score), "CIDEr": 100 * float(Cider().compute_score(*pair)[0])}


def lacks_for_captions() -> str:
    """What `caption_quality` cannot do without; empty where all is there."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "captions are scored by pycocoevalcap: pip install 'xsam[captions]'"
    if shutil.which("java") is None:
        return "captions are scored by Java programs: put a Java runtime on the PATH"
    return ""


_METEOR = []  # the program that is running


@contextlib.contextmanager
def meteor() -> Iterator:
    """METEOR's program; the one of an outer `with` where there is one. It reads its tables from the
    moment it is started, for 15 seconds of a core, and then takes milliseconds a caption."""
    from pycocoevalcap.meteor.meteor import Meteor

    is_first = not _METEOR
    if is_first:
        _METEOR.append(Meteor())
    try:
        yield _METEOR[0]
    finally:
        if is_first:
            _METEOR.clear()  # which ends it


# ---- answers -------------------------------------------------------------------------------------

_PUNCTUATION = str.maketrans(dict.fromkeys(".,:;!*#()[]{}", " "))

_MME_KINDS = {
    "perception": "existence count position color posters celebrity scene landmark artwork ocr",
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning",
}


def read_choice(answer: str, options: dict[str, str]) -> str | None:
    """The letter of the option that an answer gives, by the exact matching of VLMEvalKit (Duan et
    al. 2024): the one letter, a capital, that stands alone as a word; else the one option whose
    text is in the answer, case aside; else None. A capital A that stands alone is a letter, never
    the article, as VLMEvalKit has it by default."""
    words = answer.translate(_PUNCTUATION).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        return letters[0]
    texts = {letter: text.strip().lower() for letter, text in options.items()}
    named = [letter for letter, text in texts.items() if text and text in answer.lower()]
    return named[0] if len(named) == 1 else None


def read_yes_no(answer: str) -> str | None:
    """Yes or No, whichever word is in the answer without the other; else None."""
    words = {"yes", "no"} & set(re.findall(r"[^\W_]+", answer.lower()))
    return words.pop().capitalize() if len(words) == 1 else None


def exact_match(answer: str, truth: str) -> bool:
    """Whether two answers are equal but for case, outer spaces and a final full stop."""
    first, second = (text.strip().removesuffix(".").rstrip().lower() for text in (answer, truth))
    return first == second


def choice_accuracy(records: list[tuple[Hashable, bool]]) -> Figures:
    """Share of the groups of which every row is right, of (group, is right) of each row. In MMBench
    (Liu et al. 2024) the rows of a question, whose options are rotated, share their index modulo
    1,000,000; elsewhere a row is a group."""
    return {"accuracy": _percent(list(_all_right(records).values()))}


def mme_score(records: list[tuple[str, Hashable, bool]]) -> Figures:
    """MME (Fu et al. 2023) of (category, image, is right) of each question: a category scores the
    percentage of questions that are right plus that of images of which every question is right.
    Perception and cognition are the sums over their categories that occur, at most 2000 and 800.

    Raises ValueError where a category is of neither kind.
    """
    categories = defaultdict(list)
    for category, image, is_right in records:
        categories[category.lower()].append((image, is_right))
    known = {name for names in _MME_KINDS.values() for name in names.split()}
    if unknown := sorted(set(categories) - known):
        raise ValueError(f"MME has no category {', '.join(map(repr, unknown))}")
    scores = {
        category: _percent([is_right for _, is_right in rows])
        + _percent(list(_all_right(rows).values()))
        for category, rows in categories.items()
    }
    return {
        kind: sum(scores[name] for name in names.split() if name in scores)
        if scores.keys() & set(names.split())
        else None
        for kind, names in _MME_KINDS.items()
    }


def yes_no_quality(records: list[tuple[str, str | None]]) -> Figures:
    """F1 of Yes and accuracy of (true, predicted) of each question, "Yes", "No" or, for a
    prediction, None, as VLMEvalKit rates POPE (Li et al. 2023): None is wrong, and no Yes. Without
    a right Yes F1 is 0. A question of several of POPE's three samplings is given once for each."""
    right = sum(true == predicted == "Yes" for true, predicted in records)
    num_yes = sum(answer == "Yes" for record in records for answer in record)
    return {
        "F1": (200 * right / num_yes if num_yes else 0.0) if records else None,
        "accuracy": _percent([true == predicted for true, predicted in records]),
    }


def _all_right(rows: list[tuple[Hashable, bool]]) -> dict[Hashable, bool]:
    """Whether every row of a group is right."""
    groups: dict[Hashable, bool] = {}
    for group, is_right in rows:
        groups[group] = groups.get(group, True) and is_right
    return groups
