"""What is asked by visual prompts: COCO-Interactive and COCO-VGD (paper section 3.1).

Legend: G visual prompts, H W image size.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from PIL import Image

from xsam.data import Sample
from xsam.datasets.base import Dataset, Packed, pack, read_categories
from xsam.datasets.formats import decode_mask, dilate, rle_area
from xsam.datasets.records import Flag, Id, Segmentation, Size, label, parse, take, unpack
from xsam.datasets.sources import PROMPT_RADII, PROMPT_TYPES
from xsam.files import find_file, read_json
from xsam.images import read_image
from xsam.tasks import TASKS


class PromptedObject(NamedTuple):
    """An object and those of its visual prompts that are not empty, RLEs by type."""

    where: str
    id: Id
    category: int
    segmentation: Segmentation
    is_crowd: bool
    prompts: dict[str, dict]


class PromptedImage(NamedTuple):
    """An image and the objects that a record of it is about."""

    id: Id
    file_name: str
    size: Size
    is_thin: bool  # its points and scribbles are stored one pixel wide
    objects: list[PromptedObject]


class VisualPrompts(Dataset):
    """COCO-Interactive (PSALM's file) and COCO-VGD: COCO annotations with four prompt masks each.

    Interactive asks for the one object that the prompt marks: in training one object of an image,
    drawn; in evaluation one sample for every object that has the prompt. VGD shows one object of
    every category present and asks for all of these categories. `source.prompt` is the type of
    prompt, "" a random one of those that are not empty. PSALM's file stores points and scribbles
    one pixel wide and has crowd regions, which are asked for in evaluation only.

    With `source.is_cross` VGD shows a category in another image of the set (paper figure 13),
    and does not ask for one that no other image shows.
    """

    prediction_kind = "instances"  # of interactive "mask"

    def index(self) -> None:
        self.is_interactive = TASKS[self.source.task].is_one_object
        if self.is_interactive:
            self.prediction_kind = "mask"
        self.is_training = self.source.split == "train"
        self.category_names = {}
        if self.source.instances:
            categories = read_categories(read_json(self.instances, dict), str(self.instances))
            self.category_names = {number: c.name for number, c in categories.items()}
            self.category_index = {number: index for index, number in enumerate(categories)}
        images = list(self.read_each(self.read_record))
        if self.source.is_cross:
            self.index_references(images)
        else:
            for image in images:
                self.index_image(image)

    def read_record(self, record: dict, where: str) -> PromptedImage:
        """A record of the file, in whichever of the two layouts it is."""
        is_thin = isinstance(record, dict) and "anns" in record
        keys = {"image": str, "image_info": dict, "anns": list}
        if not is_thin:
            keys = {"image_file": str, "image_info": dict, "annotations": list}
        file_name, info, annotations = unpack(record, where, **keys)
        size, objects = parse(Size, info, where), []
        for raw in annotations:
            name = label(raw, "id", "annotation {}", "")
            at = f"{self.annotations}: {name}" if name else where
            number, category, shape, is_crowd = unpack(
                raw, at, id=Id, category_id=int, segmentation=Segmentation, iscrowd=Flag
            )
            if self.source.instances and category not in self.category_names:
                raise ValueError(f"{at}: category {category} is not in {self.instances}")
            rles, suffix = raw, "_visual_prompt_mask"
            if not is_thin:
                rles, suffix = take(raw, "visual_prompts", dict, at), "_visual_prompt"
            found = {kind: take(rles, f"{kind}{suffix}", dict, at) for kind in PROMPT_TYPES}
            prompts = {x: y for x, y in found.items() if not is_empty_rle(y, size, f"{at}: {x}")}
            objects.append(PromptedObject(at, number, category, shape, is_crowd, prompts))
        return PromptedImage(take(info, "id", Id, where), file_name, size, is_thin, objects)

    def index_image(self, image: PromptedImage) -> None:
        """The records of one image."""
        objects = image.objects
        if self.is_interactive and self.is_training:
            objects = [o for o in objects if not o.is_crowd]
            self.skipped["crowd regions"] += len(image.objects) - len(objects)
        usable = kept = self.with_prompt(objects)
        if not self.is_interactive:  # one object shows all of its category
            shown = {o.category for o in usable}
            kept = [o for o in objects if self.is_training or o.category in shown]
        self.skipped["objects that no prompt shows"] += len(objects) - len(kept)
        if not usable:
            self.skipped["images without a prompt"] += 1
        elif self.is_interactive and not self.is_training:
            self.records += [image._replace(objects=[o]) for o in usable]
        else:
            self.records.append(image._replace(objects=kept))

    def with_prompt(self, objects: list[PromptedObject]) -> list[PromptedObject]:
        """Those that have a prompt of the type that is asked with."""
        kind = self.source.prompt
        return [o for o in objects if (kind in o.prompts if kind else o.prompts)]

    def index_references(self, images: list[PromptedImage]) -> None:
        """The records of sets across images. Of every category, `showing` are the ids of the images
        that show it, and `reference_images` are these images with the one object that does."""
        references, self.showing = defaultdict(list), defaultdict(list)
        for image in images:
            for shown in self.with_prompt(image.objects):
                reference = image._replace(objects=[shown._replace(segmentation=[])])
                references[shown.category].append(pack(reference, shown.where))
                self.showing[shown.category].append(image.id)
        self.reference_images = {number: Packed(packed) for number, packed in references.items()}
        for image in images:
            others = [any(i != image.id for i in self.showing[o.category]) for o in image.objects]
            kept = [o for o, is_shown in zip(image.objects, others, strict=True) if is_shown]
            self.skipped["objects that no other image shows"] += len(image.objects) - len(kept)
            if kept:
                self.records.append(image._replace(objects=kept))
            else:
                self.skipped["images that no other image shows a category of"] += 1

    def key(self, index: int) -> Id:
        image = self.records[index]
        return image.objects[0].id if self.is_interactive else image.id

    def num_words(self, index: int) -> int:
        """Categories that are shown."""
        return 1 if self.is_interactive else len({o.category for o in self.records[index].objects})

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image = self.records[index]
        picture = read_image(find_file(self.images, image.file_name), image.size)
        objects = image.objects
        if self.is_interactive:
            objects = [objects[rng.integers(len(objects))]]
        groups = defaultdict(list)  # of objects and their masks, by category
        for target in sorted(objects, key=lambda o: o.category):
            may_be_empty = not self.is_interactive
            mask = decode_mask(target.segmentation, image.size, target.where, may_be_empty)
            if mask.any():  # a few of COCO's objects are smaller than a pixel
                groups[target.category].append((target, mask))
        if not groups:
            raise ValueError(f"{self.annotations}: image {image.id}: no object has a pixel")
        shown = list(groups)
        if self.is_training:
            shown = rng.permutation(shown).tolist()
        region_images = None
        if self.source.is_cross:
            found = [self.region_elsewhere(category, image.id, rng) for category in shown]
            region_images, regions, kinds = map(list, zip(*found, strict=True))
        else:
            parts = [image._replace(objects=[o for o, _ in groups[c]]) for c in shown]
            regions, kinds = zip(*(self.region(part, rng) for part in parts), strict=True)
            regions = np.stack(regions)  # [G, H, W]
        return Sample(
            f"{self.name}/{image.id}/{index}",
            self.source.task,
            picture,
            turns=[self.turn(["<region>"] * len(shown), rng)],
            masks=np.stack([mask for category in shown for _, mask in groups[category]]),
            labels=np.repeat(np.arange(len(shown)), [len(groups[category]) for category in shown]),
            names=["object"] if self.is_interactive else [self.category_names[c] for c in shown],
            regions=regions,
            region_images=region_images,
            region_kinds=list(kinds),
            category_ids=shown,
            image_id=image.id,
        )

    def region(self, image: PromptedImage, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """A random prompt for one of the objects of `image`, bool [H, W], and its kind; empty where
        none of them has such a prompt."""
        usable = self.with_prompt(image.objects)
        if not usable:
            return np.zeros(image.size, bool), self.source.prompt
        chosen = usable[rng.integers(len(usable))]
        kind = self.source.prompt or list(chosen.prompts)[rng.integers(len(chosen.prompts))]
        region = decode_mask(chosen.prompts[kind], image.size, chosen.where)
        return dilate(region, PROMPT_RADII.get(kind, 0)) if image.is_thin else region, kind

    def region_elsewhere(
        self, category: int, number: Id, rng: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray, str]:
        """An image other than `number`, the prompt of one of its objects of `category`, drawn among
        all such objects, and the prompt's kind."""
        others = [i for i, image_id in enumerate(self.showing[category]) if image_id != number]
        image = self.reference_images[category][others[rng.integers(len(others))]]
        picture = read_image(find_file(self.images, image.file_name), image.size)
        return picture, *self.region(image, rng)


def is_empty_rle(rle: dict, size: Size, where: str) -> bool:
    """Whether a prompt has no pixel. Only short RLEs are decoded, since all would take minutes: an
    empty one is a single run."""
    return len(take(rle, "counts", list | str, where)) < 8 and not rle_area(rle, size, where)
