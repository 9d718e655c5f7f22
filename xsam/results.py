"""What a model predicts for one image, and the forms in which that leaves the library.

The last box of the pipeline: `postprocess.py` makes the masks, a `SegmentationResult` holds them
with their labels, scores and the answer; it is drawn, or handed to annotation tools as COCO JSON
and to `supervision`. Legend: N masks, H W the original image.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from xsam.datasets.formats import encode_mask, polygons
from xsam.files import write_whole
from xsam.prompts import find_phrases, read_answer
from xsam.report.colours import number_colours
from xsam.report.letters import Text, colour_phrases
from xsam.report.pictures import draw_segments

if TYPE_CHECKING:
    from supervision import Detections

# Of instances every pair of query and class is read, most with next to no score; those with this or
# more are shown.
SHOWN_SCORE = 0.3


@dataclass
class SegmentationResult:
    """What a model predicts for one image, at the image's own size."""

    image: Image.Image
    masks: np.ndarray  # bool [N, H, W]
    categories: list[int]  # index of each mask's class or phrase in the prompt
    labels: list[str]
    scores: list[float] | None  # None: of a file whose format has none
    answer: str  # as the model gave it, with <p>, </p> and <SEG>
    num_prompts: int = 1  # that the list of names was asked in
    names: list[str] = field(default_factory=list)  # all that were asked for
    threshold: float = 0.0  # the score from which a mask is shown

    @property
    def text(self) -> str:
        """The answer without its marks."""
        return read_answer(self.answer)[0]

    @property
    def spans(self) -> list[tuple[int, int] | None]:
        """For each mask where in `text` its phrase stands, as (start, end); None where the phrase
        is no part of the answer."""
        phrases, (_, spans) = find_phrases(self.answer), read_answer(self.answer)
        return [
            spans[number] if phrases[number : number + 1] == [label] else None
            for number, label in zip(self.categories, self.labels, strict=True)
        ]

    @property
    def boxes(self) -> np.ndarray:
        """float32 [N, 4]: left, top, right, bottom of each mask in pixels, 0 of an empty one."""
        boxes = [Image.fromarray(mask).getbbox() or (0, 0, 0, 0) for mask in self.masks]
        return np.array(boxes, np.float32).reshape(-1, 4)

    def shown(self, min_score: float | None = None) -> list[int]:
        """The numbers of the masks scored `min_score` (default: the threshold) or more."""
        least = self.threshold if min_score is None else min_score
        return [n for n in range(len(self.labels)) if not self.scores or self.scores[n] >= least]

    def draw(
        self,
        title: Text | None = None,
        min_score: float | None = None,
        colours: list[int] | None = None,
    ) -> Image.Image:
        """The `shown` masks with outlines and labels over the image. The title is by default the
        answer where it has their phrases, in their colours; `colours` are numbers as in
        `draw_segments`, by default those of the categories."""
        kept = self.shown(min_score)
        if colours is None:
            (colours,) = number_colours(self.categories)
        if title is None:
            has_phrases = any(self.spans)
            title = colour_phrases(self.text, self.spans, colours) if has_phrases else ""
        scores = self.scores and [self.scores[n] for n in kept]
        labels, colours = ([each[n] for n in kept] for each in (self.labels, colours))
        return draw_segments(self.image, self.masks[kept], labels, scores, title, colours)

    def save_masks(self, folder: Path) -> None:
        """Writes each of the `shown` masks to FOLDER/000_LABEL.png and so on, white on black."""
        folder.mkdir(parents=True, exist_ok=True)
        for n in self.shown():
            content, name = io.BytesIO(), re.sub(r"[^\w-]+", "_", self.labels[n])[:60]
            Image.fromarray(self.masks[n]).convert("L").save(content, "PNG")
            write_whole(folder / f"{n:03d}_{name}.png", content.getvalue())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the answer, and each segment's label, score, box [x, y, w, h] and RLE."""
        segments = []
        for mask, label, score in zip(self.masks, self.labels, self.scores, strict=True):
            rle = encode_mask(mask)
            segments.append(
                {
                    "label": label,
                    "score": round(score, 4),
                    "area": int(mask.sum()),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "segmentation": rle,
                }
            )
        return {"answer": self.answer, "segments": segments}

    def to_coco(self, file_name: str = "", use_polygons: bool = False) -> dict[str, Any]:
        """A file of COCO instances with this image alone: see `coco_instances`."""
        width, height = self.image.size
        image = {"file_name": file_name, "width": width, "height": height}
        about = {"image": image, "names": self.names, "threshold": self.threshold}
        return coco_instances([self.to_dict() | about], use_polygons)

    def to_supervision(self) -> Detections:
        """The `shown` masks as Roboflow's `supervision` takes them. Raises ImportError without that
        package."""
        try:
            from supervision import Detections
        except ImportError as error:
            raise ImportError("to_supervision needs: pip install 'xsam[supervision]'") from error

        kept = self.shown()
        return Detections(
            xyxy=self.boxes[kept],
            mask=self.masks[kept],
            confidence=None if self.scores is None else np.array(self.scores)[kept],
            class_id=np.array(self.categories, int)[kept],
            data={"class_name": np.array(self.labels)[kept]},
        )


def coco_instances(found: list[dict[str, Any]], use_polygons: bool = False) -> dict[str, Any]:
    """A file of COCO instances, which annotation tools open and our readers train on.

    `found` are results as `to_dict` gives them, each with its "image" (file_name, width, height),
    the "names" asked for and the "threshold" below which a mask is left out, as an empty one is.
    Categories are the names, then other labels, in their order; all numbers count from 1. Masks are
    RLE, or polygons along the edges of the same pixels. Beside COCO's keys an annotation has its
    score, and an image its answer.
    """
    names = [name for each in found for name in each["names"]]
    names += [segment["label"] for each in found for segment in each["segments"]]
    ids = {name: number for number, name in enumerate(dict.fromkeys(names), start=1)}
    images, annotations = [], []
    for image_id, each in enumerate(found, start=1):
        images.append({"id": image_id} | each["image"] | {"answer": each["answer"]})
        for segment in each["segments"]:
            if not segment["area"] or segment["score"] < each["threshold"]:
                continue
            rle = segment["segmentation"]
            shape = polygons(coco_mask.decode(rle).astype(bool)) if use_polygons else rle
            ours = {"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0}
            ours |= {"category_id": ids[segment["label"]], "segmentation": shape}
            annotations.append(ours | {key: segment[key] for key in ("area", "bbox", "score")})
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}
