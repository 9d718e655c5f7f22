"""The figures that a model is judged by: panoptic quality, mask AP, mIoU, cIoU and gIoU, grounded
captions, answers to questions.

Every metric has two steps: a small record of one sample, which any process can make, and the
summary of the records of all samples. Records put in one order give the same figure to the last
digit, however many processes made them. Figures are in percent; None stands where nothing was
there to count. Needs NumPy and pycocotools alone; captions need pycocoevalcap and Java too.

Legend: T true and N predicted masks of an image, K classes, H W pixels. A mask is bool [H, W], an
RLE COCO's compressed one.
"""

import contextlib
import importlib.util
import io
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Hashable
from itertools import takewhile

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval


def _percent(values: list | np.ndarray) -> float | None:
    """100 times the mean."""
    return float(100 * np.mean(values)) if len(values) else None


# ---- panoptic quality ----------------------------------------------------------------------------


def match_segments(
    ids: np.ndarray,
    truth: dict[int, tuple[int, bool]],
    guessed_ids: np.ndarray,
    guesses: dict[int, int],
) -> list[tuple[str, int, float]]:
    """One image's record, by Kirillov et al. 2019, section 4, as panopticapi counts: of each pair
    ("tp", class, IoU), of each missed segment ("fn", class, 0.0), of each invented one ("fp",
    class, 0.0).

    True segment ids [H, W] with their (class, is crowd) against guessed ids [H, W] with their
    class; 0 is void in both, and every other id of a map must be in its dict. A pair matches where
    the classes agree and IoU > 0.5, void pixels of the guess not counted in the union. A missed
    crowd region is no error, nor is an unmatched guess of which more than half is void or crowd of
    its class. A true segment without a pixel is missed; a guess without one does not count.

    Two choices differ from panopticapi. It knows one crowd region a class and image, the last one,
    where all are counted here; and it takes a true segment's area from the annotation file, where
    pixels are counted here (ADE20K's files hold areas from before one segment hid another).
    """
    assert ids.shape == guessed_ids.shape, f"{ids.shape} true, {guessed_ids.shape} guessed pixels"
    base = int(guessed_ids.max(initial=0)) + 1
    pairs, areas = np.unique(ids.astype(np.int64) * base + guessed_ids, return_counts=True)
    overlap = {
        divmod(pair, base): area for pair, area in zip(pairs.tolist(), areas.tolist(), strict=True)
    }
    true_area, guessed_area = defaultdict(int), defaultdict(int)
    for (true, guess), area in overlap.items():
        true_area[true] += area
        guessed_area[guess] += area

    record, found, explained = [], set(), set()
    for (true, guess), area in overlap.items():
        if true == 0 or guess == 0 or truth[true] != (guesses[guess], False):
            continue
        union = true_area[true] + guessed_area[guess] - area - overlap.get((0, guess), 0)
        if area / union > 0.5:
            record.append(("tp", guesses[guess], area / union))
            found.add(true)
            explained.add(guess)
    for true, (category, is_crowd) in truth.items():
        if true not in found and not is_crowd:
            record.append(("fn", category, 0.0))
    for guess, category in guesses.items():
        if guess in explained or not guessed_area[guess]:
            continue
        excused = [true for true, kind in truth.items() if kind == (category, True)]
        uncounted = sum(overlap.get((true, guess), 0) for true in [0, *excused])
        if uncounted / guessed_area[guess] <= 0.5:
            record.append(("fp", category, 0.0))
    return record


def panoptic_quality(
    records: list[list[tuple[str, int, float]]], is_thing: list[bool]
) -> dict[str, float | None]:
    """PQ, SQ and RQ over all classes, PQ_things and PQ_stuff, of the records of `match_segments`, a
    list an image. Each is the mean over the classes that occur, be it as a mistake."""
    true_positives, mistakes, iou = np.zeros((3, len(is_thing)))
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


# ---- mask AP -------------------------------------------------------------------------------------


def _coco_evaluation(num_categories: int, image_ids: list) -> COCOeval:
    """pycocotools' evaluation of masks of any area, up to the 100 best scored a class and image."""
    evaluation = COCOeval(iouType="segm")
    settings = evaluation.params
    settings.imgIds, settings.catIds = image_ids, list(range(num_categories))
    settings.areaRng, settings.areaRngLbl = settings.areaRng[:1], settings.areaRngLbl[:1]
    settings.maxDets = settings.maxDets[-1:]
    return evaluation


def match_instances(
    image_id: int | str,
    num_categories: int,
    truth: list[tuple[int, dict, bool]],
    found: list[tuple[int, dict, float]],
) -> dict:
    """One image's record: by class what pycocotools matched, without what the masks were.

    truth: (class 0..K-1, RLE, is crowd) of each true mask; found: (class, RLE, score) of each
    predicted one, of which the first counts first where scores are equal.
    """
    sizes = {tuple(rle["size"]) for _, rle, _ in [*truth, *found]}
    assert len(sizes) <= 1, f"masks of {sizes} in one image"
    evaluation = _coco_evaluation(num_categories, [image_id])
    for number, (category, rle, is_crowd) in enumerate(truth, 1):  # to pycocotools 0 is no match
        item = {"id": number, "segmentation": rle, "area": int(coco_mask.area(rle))}
        item |= {"iscrowd": int(is_crowd), "ignore": int(is_crowd)}
        evaluation._gts[image_id, category].append(item)
    for number, (category, rle, score) in enumerate(found, 1):
        item = {"id": number, "segmentation": rle, "area": int(coco_mask.area(rle))}
        evaluation._dts[image_id, category].append(item | {"score": float(score)})

    matches = {}
    area_range, limit = evaluation.params.areaRng[0], evaluation.params.maxDets[0]
    for category in sorted({category for category, *_ in [*truth, *found]}):
        assert 0 <= category < num_categories, f"class {category} of {num_categories}"
        evaluation.ious[image_id, category] = evaluation.computeIoU(image_id, category)
        match = evaluation.evaluateImg(image_id, category, area_range, limit)
        matches[category] = {
            "dtScores": np.array(match["dtScores"], np.float64),
            "dtMatches": match["dtMatches"] > 0,  # [10 thresholds, N]
            "dtIgnore": match["dtIgnore"].astype(bool),  # [10 thresholds, N]
            "gtIgnore": match["gtIgnore"].astype(bool),  # [T]
        }
    return {"image_id": image_id, "matches": matches}


def average_precision(records: list[dict], num_categories: int) -> dict[str, float | None]:
    """AP, the mean over the IoU thresholds 0.50 to 0.95, and AP50 of the records of
    `match_instances`: COCO's, the mean over the classes that have a true mask which is no crowd.

    Where scores are equal the image with the smaller id counts first, as in pycocotools.
    """
    records = sorted(
        records, key=lambda record: (isinstance(record["image_id"], str), record["image_id"])
    )
    evaluation = _coco_evaluation(num_categories, [record["image_id"] for record in records])
    evaluation.evalImgs = [
        record["matches"].get(category) for category in range(num_categories) for record in records
    ]
    evaluation._paramsEval = evaluation.params
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, 0]  # [10 thresholds, 101 recalls, K]
    at_half = precision[np.isclose(evaluation.params.iouThrs, 0.5)]
    return {"AP": _percent(precision[precision > -1]), "AP50": _percent(at_half[at_half > -1])}


# ---- semantic segmentation -----------------------------------------------------------------------


def count_pixels(truth: np.ndarray, guess: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels of each true and guessed class, int64 [K, K+1]; records of images are simply added.

    truth, guess: classes, int [H, W]. A pixel whose truth is none of 0..K-1, as 255, is left out; a
    guess that is none of them goes to the last column.
    """
    assert truth.shape == guess.shape, f"{truth.shape} true, {guess.shape} guessed pixels"
    is_counted = (truth >= 0) & (truth < num_classes)
    truth, guess = truth[is_counted].astype(np.int64), guess[is_counted].astype(np.int64)
    guess[(guess < 0) | (guess >= num_classes)] = num_classes
    size = (num_classes, num_classes + 1)
    return np.bincount(truth * size[1] + guess, minlength=size[0] * size[1]).reshape(size)


def mean_iou(matrix: np.ndarray) -> dict[str, float | None]:
    """mIoU of the sum of the records of `count_pixels`: the mean over the classes that occur in the
    truth, as detectron2's evaluation takes it."""
    intersection, true_area = matrix.diagonal(), matrix.sum(axis=1)
    union = true_area + matrix[:, :-1].sum(axis=0) - intersection
    occurs = true_area > 0
    return {"mIoU": _percent(intersection[occurs] / union[occurs])}


# ---- one mask per question -----------------------------------------------------------------------


def mask_overlap(
    truth: np.ndarray, guess: np.ndarray, ignore: np.ndarray | None = None
) -> tuple[int, int, bool, bool]:
    """One sample's record: pixels of the intersection and of the union, whether there is a target
    and whether anything was predicted. All are masks; what `ignore` covers counts nowhere."""
    if ignore is not None:
        truth, guess = truth & ~ignore, guess & ~ignore
    intersection, union = np.count_nonzero(truth & guess), np.count_nonzero(truth | guess)
    return int(intersection), int(union), bool(truth.any()), bool(guess.any())


def mask_quality(records: list[tuple[int, int, bool, bool]]) -> dict[str, float | None]:
    """cIoU, the sum of intersections over the sum of unions, and gIoU, the mean IoU, of the records
    of `mask_overlap`; an empty union is an IoU of 1 (Lai et al. 2024, LISA)."""
    return {
        "cIoU": _cumulative_iou(records),
        "gIoU": _percent([each[0] / each[1] if each[1] else 1.0 for each in records]),
    }


def target_quality(records: list[tuple[int, int, bool, bool]]) -> dict[str, float | None]:
    """The protocol of gRefCOCO (Liu et al. 2023, GRES) of the records of `mask_overlap`.

    cIoU and gIoU are over all expressions. One without a target has an IoU of 1 where nothing was
    predicted; else 0, and its pixels are in the sum of unions. N_acc and T_acc are the shares of
    the expressions without and with a target that were told as such. cIoU_targets and gIoU_targets
    are over those with a target alone, which is what X-SAM reports: its code reads no others.
    """
    targets = [each for each in records if each[2]]
    others = [each for each in records if not each[2]]
    ious = [
        intersection / union if has_target else float(not is_found)
        for intersection, union, has_target, is_found in records
    ]
    return {
        "cIoU": _cumulative_iou(records),
        "gIoU": _percent(ious),
        "N_acc": _percent([not is_found for *_, is_found in others]),
        "T_acc": _percent([is_found for *_, is_found in targets]),
        "cIoU_targets": _cumulative_iou(targets),
        "gIoU_targets": _percent([each[0] / each[1] for each in targets]),
    }


def _cumulative_iou(records: list[tuple[int, int, bool, bool]]) -> float | None:
    union = sum(each[1] for each in records)
    return 100 * sum(each[0] for each in records) / union if union else None


# ---- grounded captions ---------------------------------------------------------------------------


def ground_masks(
    truth: list[dict],
    guess: list[dict],
    similarity: np.ndarray | None = None,
) -> tuple[float, int | None, int]:
    """One image's record: mean IoU of its pairs, number of phrases found, number of true masks, by
    the evaluation of GranD-f (Rasheed et al. 2024, GLaMM).

    truth, guess: T and N RLEs. similarity: of the true and predicted phrases, [T, N]; without it no
    phrase is looked for. Masks are paired one to one, the largest IoU first, while IoU > 0; without
    any pair the mean is 0. Phrases are found in the same order while a pair has IoU >= 0.5 and
    similarity >= 0.5. The first pair that lacks either ends the search, as in the published code:
    of two masks that fit, a wrong phrase on the better one hides the other.
    """
    ious = np.zeros((len(truth), len(guess)))
    if truth and guess:
        sizes = {tuple(rle["size"]) for rle in [*truth, *guess]}
        assert len(sizes) == 1, f"masks of {sizes} in one image"
        ious = coco_mask.iou(guess, truth, [0] * len(truth)).T  # [T, N]
    pairs = _pair(ious)
    positive = [iou for *_, iou in pairs if iou > 0]
    mean = float(np.mean(positive)) if positive else 0.0
    if similarity is None:
        return mean, None, len(truth)
    assert similarity.shape == ious.shape, f"{similarity.shape} for {ious.shape} masks"

    def is_found(pair: tuple[int, int, float]) -> bool:
        true, guessed, iou = pair
        return iou >= 0.5 and similarity[true, guessed] >= 0.5

    return mean, sum(1 for _ in takewhile(is_found, pairs)), len(truth)


def grounding_quality(
    records: list[tuple[float, int | None, int]],
) -> dict[str, float | None]:
    """mIoU, the mean over all images of the ground truth, and recall, the share of all true masks
    that were found with their phrase, of the records of `ground_masks`. Masks of an image without
    phrases are not found; where no image has any there is no recall."""
    counts = [found for _, found, _ in records if found is not None]
    num_true = sum(total for *_, total in records)
    return {
        "mIoU": _percent([mean for mean, *_ in records]),
        "recall": 100 * sum(counts) / num_true if counts and num_true else None,
    }


def _pair(ious: np.ndarray) -> list[tuple[int, int, float]]:
    """(row, column, IoU) one to one, the largest IoU first; of equal ones the first in the rows."""
    ious, pairs = ious.copy(), []
    for _ in range(min(ious.shape)):
        row, column = divmod(int(ious.argmax()), ious.shape[1])
        pairs.append((row, column, float(ious[row, column])))
        ious[row], ious[:, column] = -1, -1
    return pairs


def phrase_similarity(
    truth: list[str], guess: list[str], embed: Callable[[list[str]], np.ndarray] | None = None
) -> np.ndarray:
    """How like each true phrase is to each predicted one, float64 [T, N].

    `embed` gives the embeddings [n, d] of n phrases, whose cosine is taken (GLaMM: the mean of the
    last states of bert-base-uncased). Without it the similarity is 1 where phrases are equal but
    for case and outer spaces, else 0.
    """
    if embed is None:
        said = [phrase.strip().lower() for phrase in guess]
        rows = [[phrase.strip().lower() == other for other in said] for phrase in truth]
        return np.array(rows, np.float64).reshape(len(truth), len(guess))
    if not truth or not guess:
        return np.zeros((len(truth), len(guess)))
    embeddings = np.asarray(embed([*truth, *guess]), np.float64)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    embeddings = embeddings / np.where(lengths > 0, lengths, 1)
    return embeddings[: len(truth)] @ embeddings[len(truth) :].T


def caption_quality(
    truth: dict[Hashable, list[str]], guess: dict[Hashable, str]
) -> dict[str, float | None]:
    """METEOR (Banerjee and Lavie 2005) and CIDEr (Vedantam et al. 2015) of the true captions and
    the predicted one of each image, by pycocoevalcap; a caption may be empty.

    Raises ImportError where the package or Java is missing, ValueError where an image has no
    counterpart.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ImportError("captions are scored by pycocoevalcap: pip install 'xsam[captions]'")
    if shutil.which("java") is None:
        raise ImportError("captions are scored by Java programs: put a Java runtime on the PATH")
    if odd := [image for image in {**truth, **guess} if not (truth.get(image) and image in guess)]:
        raise ValueError(f"image {odd[0]!r} lacks its true or its predicted caption")
    if not truth:
        return {"METEOR": None, "CIDEr": None}
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # Both programs read a caption a line; METEOR parts the fields of a line with three bars.
    captions = {image: [*truth[image], guess[image]] for image in truth}
    tokens = PTBTokenizer().tokenize(
        {
            image: [{"caption": " ".join(text.replace("|||", " ").split())} for text in texts]
            for image, texts in captions.items()
        }
    )
    if [len(texts) for texts in tokens.values()] != [len(texts) for texts in captions.values()]:
        raise ValueError("a caption holds a character at which the tokenizer breaks its line")
    true = {image: texts[:-1] for image, texts in tokens.items()}
    said = {image: texts[-1:] for image, texts in tokens.items()}
    return {
        "METEOR": 100 * float(Meteor().compute_score(true, said)[0]),
        "CIDEr": 100 * float(Cider().compute_score(true, said)[0]),
    }


# ---- answers -------------------------------------------------------------------------------------

_PUNCTUATION = str.maketrans(dict.fromkeys(".,:;!*#()[]{}", " "))


_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene")


_PERCEPTION += ("landmark", "artwork", "ocr")


_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation")


_COGNITION += ("code_reasoning",)


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
    words = set(re.findall(r"[^\W_]+", answer.lower()))
    if ("yes" in words) == ("no" in words):
        return None
    return "Yes" if "yes" in words else "No"


def exact_match(answer: str, truth: str) -> bool:
    """Whether two answers are equal but for case, outer spaces and a final full stop."""
    said, true = (text.strip().removesuffix(".").rstrip().lower() for text in (answer, truth))
    return said == true


def choice_accuracy(records: list[tuple[Hashable, bool]]) -> dict[str, float | None]:
    """Share of the groups of which every row is right, of (group, is right) of each row. In MMBench
    (Liu et al. 2024) the rows of a question, whose options are rotated, share their index modulo
    1,000,000; elsewhere a row is a group."""
    return {"accuracy": _percent(list(_all_right(records).values()))}


def mme_score(records: list[tuple[str, Hashable, bool]]) -> dict[str, float | None]:
    """MME (Fu et al. 2023) of (category, image, is right) of each question: a category scores the
    percentage of questions that are right plus that of images of which every question is right.
    Perception and cognition are the sums over their categories that occur, at most 2000 and 800.

    Raises ValueError where a category is of neither kind.
    """
    categories = defaultdict(list)
    for category, image, is_right in records:
        categories[category.lower()].append((image, is_right))
    if unknown := sorted(set(categories).difference(_PERCEPTION, _COGNITION)):
        raise ValueError(f"MME has no category {', '.join(map(repr, unknown))}")
    scores = {
        category: _percent([is_right for _, is_right in rows])
        + _percent(list(_all_right(rows).values()))
        for category, rows in categories.items()
    }
    totals = {}
    for kind, members in (("perception", _PERCEPTION), ("cognition", _COGNITION)):
        present = [scores[category] for category in members if category in scores]
        totals[kind] = sum(present) if present else None
    return totals


def yes_no_quality(records: list[tuple[str, str | None]]) -> dict[str, float | None]:
    """F1 of Yes and accuracy of (true, said) of each question, "Yes", "No" or for what was said
    None, as VLMEvalKit rates POPE (Li et al. 2023): None is wrong, and no Yes. Without a right Yes
    F1 is 0. A question of several of POPE's three samplings is given once for each."""
    right = sum(true == said == "Yes" for true, said in records)
    num_yes = sum((true == "Yes") + (said == "Yes") for true, said in records)
    return {
        "F1": (200 * right / num_yes if num_yes else 0.0) if records else None,
        "accuracy": _percent([true == said for true, said in records]),
    }


def _all_right(rows: list[tuple[Hashable, bool]]) -> dict[Hashable, bool]:
    """Whether every row of a group is right."""
    groups: dict[Hashable, bool] = {}
    for group, is_right in rows:
        groups[group] = groups.get(group, True) and is_right
    return groups
