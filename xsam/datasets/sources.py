"""Which datasets there are (paper table 10, appendix A) and where they lie under the data root.

Imported before torch, so that a missing file is reported before anything heavy happens: this file
knows paths, the readers know what is in the files. Paths follow the published folder tree; other
names that the same files go by are in `ALIASES`.
"""

import itertools
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from xsam.config import Config, stage_folder
from xsam.datasets.records import Flag, take
from xsam.files import read_json

PROMPT_TYPES = ("point", "scribble", "box", "mask")  # of visual prompts

PROMPT_RADII = {"point": 10, "scribble": 5}  # pixels of the disc that a thin prompt is grown by


@dataclass(frozen=True)
class Source:
    """One dataset on disk; paths are relative to the data root."""

    task: str  # what it asks of the model, of tasks.TASKS
    format: str  # a key of registry.READERS
    annotations: str
    images: str = ""
    masks: str = ""
    instances: str = ""  # masks or category names that are kept in a second file
    split: str = ""  # where one file holds several
    prompt: str = ""  # the visual prompt that is asked with; empty: a random one
    is_cross: bool = False  # the visual prompts are shown in other images of the set
    held_out: float = 0.0  # of a user's own: the share of its images that training leaves out
    part: str = ""  # "val": that share; "train": the other images; "": all
    seed: int = 0  # says which images
    scores: str = ""  # what it is scored as, a word of --tasks; "": it is not scored
    post_processing: str = ""  # of inference.POST_PROCESSING, where it is not the task's own
    about: str = ""

    def paths(self) -> list[str]:
        """Those of its files and folders that it has, relative to the data root."""
        paths = self.annotations, self.instances, self.masks, self.images
        return [path for path in paths if path]


_COCO, _REF, _ADE = "img_genseg/coco2017", "img_refseg/refcocos", "img_ovseg/ade20k"

_COCO_2014 = f"{_REF}/images/train2014"

_LLAVA, _REASON = "img_chat/llava", "img_reaseg/lisa"

_GCG, _INT, _VGD = "img_gcgseg/grand_f", "img_intseg/coco_int", "img_vgdseg/coco_vgd"

# Other names of a file or of a run of folders, each a whole part of a path. A set that brings no
# COCO images of its own reads those of the generic sets.
ALIASES: dict[str, tuple[str, ...]] = {
    f"{_INT}/coco2017": (_COCO,),
    f"{_VGD}/coco2017": (_COCO,),
    **{
        f"{_VGD}/annotations/{file}": (f"{_COCO}/annotations/{file}",)
        for file in ("instances_train2017.json", "instances_val2017.json")
    },
    f"{_GCG}/images/coco2017": (f"{_GCG}/images/coco_2017", _COCO),
    f"{_GCG}/images/coco2014/train2014": (_COCO_2014,),
    f"{_GCG}/images/flickr30k/images/train": (
        f"{_GCG}/images/flickr30k/Flickr30K",
        f"{_GCG}/images/flikcr_30k/train",
    ),
    _COCO_2014: (f"{_REF}/images/mscoco/images/train2014",),
    f"{_REF}/refcoco+": (f"{_REF}/refcocop",),
    "grefs(unc).json": ("grefs(unc).p", "refs(unc).p"),
    _ADE: (f"{_ADE}/ADEChallengeData2016",),
    **{
        f"img_{task}": (f"{task}_data",)  # of the archived release
        for task in ("genseg", "ovseg", "refseg", "reaseg", "gcgseg", "intseg", "vgdseg")
    },
    "img_chat": ("imgconv_data",),
}


def locate(root: Path, path: str) -> Path:
    """Where `path` lies under `root`, by this or another name; by this one if it is nowhere."""
    names = [path]
    for name, others in ALIASES.items():
        for known in list(names):
            if f"/{name}/" in f"/{known}/":
                names += [f"/{known}/".replace(f"/{name}/", f"/{o}/").strip("/") for o in others]
    return next((root / name for name in names if (root / name).exists()), root / path)


def paths_of(source: Source, root: Path) -> list[Path]:
    """Where the files of a set lie, or should; of a user's own that are nowhere, as was typed."""
    found = [(Path(path), locate(root, path)) for path in source.paths()]
    if source.format == "own":
        found = [(typed, at if at.exists() else typed) for typed, at in found]
        if not found[0][1].exists():
            found = found[:1]  # its folders follow from it
    return [path for _, path in found]


# ---- the sets ------------------------------------------------------------------------------------


def _coco(kind: str, split: str) -> Source:
    """kind: panoptic, instance or semantic."""
    panoptic = f"{_COCO}/annotations/panoptic_{split}2017.json"
    annotations, masks, about = {
        "panoptic": (panoptic, f"{_COCO}/panoptic_{split}2017", "with panoptic annotations"),
        "instance": (f"{_COCO}/annotations/instances_{split}2017.json", "", "with instances"),
        "semantic": (
            panoptic,
            f"{_COCO}/panoptic_semseg_{split}2017",
            "with semantic PNGs (python -m xsam.data coco-semantic makes them)",
        ),
    }[kind]
    about, scores = f"COCO 2017 {split} images {about}", kind if split == "val" else ""
    files = annotations, f"{_COCO}/{split}2017", masks
    return Source("generic", kind, *files, split=split, scores=scores, about=about)


def _ade(kind: str) -> Source:
    panoptic = f"{_ADE}/ade20k_panoptic_val.json"
    annotations, masks = {
        "panoptic": (panoptic, f"{_ADE}/ade20k_panoptic_val"),
        "instance": (f"{_ADE}/ade20k_instance_val.json", ""),
        "semantic": (panoptic, f"{_ADE}/annotations_detectron2/validation"),
    }[kind]
    about = "ADE20K-150 validation, converted by python -m xsam.data ade20k"
    files = annotations, f"{_ADE}/images/validation", masks
    return Source("generic", kind, *files, split="val", scores="openvocab", about=about)


def _refer(folder: str, file: str, *splits: str) -> dict[str, Source]:
    """The sets of all splits, "train" being named by the folder alone."""
    annotations, instances = f"{_REF}/{folder}/{file}", f"{_REF}/{folder}/instances.json"
    about = f"{folder} expressions, its COCO instances and the COCO 2014 train images"
    source = Source("refer", "refs", annotations, _COCO_2014, instances=instances, about=about)
    scores = "refer"
    if folder == "grefcoco":  # an expression may mean several objects, or none
        source, scores = replace(source, post_processing="union"), "grefer"
    scored = {f"{folder}_{x}": replace(source, split=x, scores=scores) for x in splits}
    return {folder: replace(source, split="train")} | scored


def _reason(split: str) -> Source:
    about = f"ReasonSeg {split}: NAME.jpg beside NAME.json"
    source = Source("reason", "reason", f"{_REASON}/{split}", split=split, about=about)
    if split != "train":
        return replace(source, scores="reason")
    explanations = f"{_REASON}/explanatory/train.json"
    return replace(source, instances=explanations, about=f"{about}, and the explanations")


def _gcg(file: str, format: str, images: str, about: str) -> Source:
    annotations, images = f"{_GCG}/annotations/train/{file}", f"{_GCG}/images/{images}"
    return Source("gcg", format, annotations, images, about=f"GranD-f{about}")


def _gcg_scored(split: str) -> Source:
    masks = f"{_GCG}/annotations/val_test/{split}_gcg_coco_mask_gt.json"
    captions = f"{_GCG}/annotations/val_test/{split}_gcg_coco_caption_gt.json"
    images = f"{_GCG}/images/GranDf_HA_images/val_test"
    about = f"GranD-f {split} masks, captions and images"
    return Source("gcg", "gcg_scored", masks, images, instances=captions, scores="gcg", about=about)


def _interactive(split: str, prompt: str = "") -> Source:
    annotations = f"{_INT}/annotations/coco_interactive_{split}_psalm.json"
    files = "visual_prompts", annotations, f"{_INT}/coco2017/{split}2017"
    about = f"COCO-Interactive {split} of PSALM and the COCO 2017 images"
    scores = "interactive" if split == "val" else ""
    options = dict(split=split, prompt=prompt, scores=scores, about=about)
    return Source("interactive", *files, **options)


def _vgd(split: str, prompt: str = "", is_cross: bool = False) -> Source:
    return Source(
        "vgd",
        "visual_prompts",
        annotations=f"{_VGD}/annotations/img_vgdseg_coco_{split}.json",
        images=f"{_VGD}/coco2017/{split}2017",
        instances=f"{_VGD}/annotations/instances_{split}2017.json",
        split=split,
        prompt=prompt,
        is_cross=is_cross,
        scores="vgd" if split == "val" else "",
        about=f"COCO-VGD {split} (python -m xsam.data vgd makes one), COCO instances and images",
    )


_INSTRUCT = "LLaVA-Instruct-150K/llava_v1_5_mix665k.json"


def _chat(annotations: str, images: str, about: str) -> Source:
    return Source("chat", "llava", f"{_LLAVA}/{annotations}", f"{_LLAVA}/{images}", about=about)


def _benchmark(name: str, scores: str = "chat") -> Source:
    about = f"{name} of VLMEvalKit"
    return Source("chat", "tsv", f"LMUData/{name}.tsv", scores=scores, about=about)


SOURCES: dict[str, Source] = {
    "coco_panoptic": _coco("panoptic", "train"),
    "coco_instance": _coco("instance", "train"),
    "coco_semantic": _coco("semantic", "train"),
    "coco_panoptic_val": _coco("panoptic", "val"),
    "coco_instance_val": _coco("instance", "val"),
    "coco_semantic_val": _coco("semantic", "val"),
    "ade20k_panoptic_val": _ade("panoptic"),
    "ade20k_instance_val": _ade("instance"),
    "ade20k_semantic_val": _ade("semantic"),
    **_refer("refcoco", "refs(unc).p", "val", "testA", "testB"),
    **_refer("refcoco+", "refs(unc).p", "val", "testA", "testB"),
    **_refer("refcocog", "refs(umd).p", "val", "test"),
    **_refer("grefcoco", "grefs(unc).json", "val", "testA", "testB"),
    "reasonseg": _reason("train"),
    "reasonseg_val": _reason("val"),
    "reasonseg_test": _reason("test"),
    "gcg_grandf": _gcg(
        "GranDf_HA_GCG_train.json",
        "gcg_grounded",
        "GranDf_HA_images/train",
        ", annotated by people",
    ),
    "gcg_psg": _gcg(
        "OpenPsgGCG_train.json", "gcg_grounded", "coco2017", " from OpenPSG, COCO 2017 images"
    ),
    "gcg_refcocog": _gcg(
        "RefCOCOg_GCG_train.json",
        "gcg_refs",
        "coco2014/train2014",
        " from RefCOCOg, COCO 2014 train images",
    ),
    "gcg_flickr": _gcg(
        "flickr_mergedGT_GCG_train.json", "gcg_flickr", "flickr30k/images/train", " from Flickr30k"
    ),
    "gcg_val": _gcg_scored("val"),
    "gcg_test": _gcg_scored("test"),
    "coco_interactive": _interactive("train"),
    "coco_vgd": _vgd("train"),
    **{f"coco_interactive_val_{kind}": _interactive("val", kind) for kind in PROMPT_TYPES},
    **{f"coco_vgd_val_{kind}": _vgd("val", kind) for kind in PROMPT_TYPES},
    **{f"coco_vgd_val_{kind}_cross": _vgd("val", kind, True) for kind in PROMPT_TYPES},
    "llava_pretrain": _chat(
        "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        "LLaVA-Pretrain/images",
        "LLaVA 558K captions and their images",
    ),
    "llava_instruct": _chat(
        _INSTRUCT,
        "llava_images",
        "LLaVA-1.5 665K conversations and their images",
    ),
    "llava_instruct_text": Source(  # the 6 % that the paper leaves out
        "chat", "llava", f"{_LLAVA}/{_INSTRUCT}", about="LLaVA-1.5 665K conversations"
    ),
    "mme": _benchmark("MME"),
    "mmbench": _benchmark("MMBench_DEV_EN"),
    "seed": _benchmark("SEEDBench_IMG"),
    "pope": _benchmark("POPE"),
    "ai2d": _benchmark("AI2D_TEST"),
    "gqa": _benchmark("GQA_TestDev_Balanced", scores=""),
    "scienceqa_val": _benchmark("ScienceQA_VAL", scores=""),
    "scienceqa_test": _benchmark("ScienceQA_TEST", scores=""),
}

SEGMENTOR_TASKS = ("panoptic", "instance", "semantic")  # that the model of stage 1 can do


def sets_by_task() -> dict[str, list[str]]:
    """The sets that score each task of evaluation."""
    sets: dict[str, list[str]] = {}
    for name, source in SOURCES.items():
        if source.scores:
            sets.setdefault(source.scores, []).append(name)
    return sets


# ---- a user's own --------------------------------------------------------------------------------

# What other programs' own files have, of the whole or of the first record.
FOREIGN = {"_via_img_metadata": "VGG Image Annotator", "regions": "VGG Image Annotator"}
FOREIGN |= {"shapes": "labelme", "data": "Label Studio", "objects": "Supervisely"}
FOREIGN |= {"data_row": "Labelbox", "Label": "Labelbox", "items": "Datumaro"}

_OWN = re.compile(r"(.+?)(?:@(train|val)(0?\.\d*[1-9]\d*(?:/\d+)?))?")


def own_parts(name: str) -> tuple[str, str, str]:
    """FILE.json[:IMAGES[:MASKS]], "train" or "val", and SHARE[/SEED], of a user's own file; all are
    empty of a known set, and of what is neither."""
    match = _OWN.fullmatch(name)
    is_own = match and match[1].split(":")[0].lower().endswith(".json")
    return match.groups("") if is_own and name not in SOURCES else ("", "", "")


def is_own(name: str) -> bool:
    """Whether a name is that of a user's own file."""
    return own_parts(name)[0] != ""


def find_source(name: str) -> Source:
    """The set of that name, or a user's own: FILE.json, FILE.json:IMAGES or FILE.json:IMAGES:MASKS,
    whose images lie beside the file unless IMAGES says where. Paths are as the user typed them, or
    where there is no such FILE, relative to the data root, as is a folder that is not there.

    A share of the images is held out from training where @train0.2 follows, with a seed other than
    0 @train0.2/SEED; @val0.2 means that share.

    Raises ValueError at a name that is neither.
    """
    if name in SOURCES:
        return SOURCES[name]
    spec, part, cut = own_parts(name)
    file, *folders = spec.split(":")
    if not spec or len(folders) > 2:
        raise ValueError(
            f"unknown dataset {name!r}; known are {', '.join(SOURCES)}, and files of one's own as "
            "FILE.json, FILE.json:IMAGES or FILE.json:IMAGES:MASKS"
        )
    if Path(file).exists():  # else all of them are under the data root
        file, *folders = (
            str(Path(path).absolute()) if path and Path(path).exists() else path
            for path in (file, *folders)
        )
    images, masks = [*folders, "", ""][:2]
    images = images or str(Path(file).parent)
    about = f"a data set of your own, {name}: neither here nor under --data"
    share, _, seed = cut.partition("/")
    split = {"held_out": float(share or 0), "part": part, "seed": int(seed or 0)}
    return Source("", "own", file, images, masks, **split, about=about)


def hold_out(name: str, share: float, seed: int) -> str:
    """A set without the share of its images that is held out, where it is a user's own file, and
    has not said so itself."""
    spec, part, _ = own_parts(name)
    cut = f"{share:.6f}".rstrip("0") + f"/{seed}" * (seed > 0)
    return f"{spec}@train{cut}" if share and spec and not part else name


def with_held_out(name: str) -> list[str]:
    """A set, and what was held out of it."""
    spec, part, cut = own_parts(name)
    return [name, f"{spec}@val{cut}"] if part == "train" else [name]


def recognise(source: Source, root: Path) -> Source:
    """What a user's own file is: a list is referring, a dict COCO's panoptic or instance layout; a
    panoptic file without a thing is of regions, one for each class."""
    path = locate(root, source.annotations)
    content = read_json(path)
    parts = list(content.values()) if isinstance(content, dict) else content
    keys = [key for part in (content, *parts[:1]) if isinstance(part, dict) for key in part]
    if programs := [program for sign, program in FOREIGN.items() if sign in keys]:
        mend = "export it in the COCO format"
        if programs[0] == "labelme":
            mend += f" (python -m xsam.data convert {path.parent} --out FILE.json does)"
        raise ValueError(f"{path}: is a file of {programs[0]}; {mend}")
    if isinstance(content, list):
        return replace(source, task="refer", format="own_refs")
    annotations = take(content, "annotations", list, str(path))
    if annotations and isinstance(annotations[0], dict) and "segments_info" in annotations[0]:
        if not source.masks:
            raise ValueError(f"{path}: panoptic, so name its PNGs: FILE.json:IMAGES:MASKS")
        categories = take(content, "categories", list, str(path))
        has_thing = any(
            take({"isthing": 1} | each, "isthing", Flag, str(path)) for each in categories
        )
        return replace(source, task="generic", format="panoptic" if has_thing else "regions")
    return replace(source, task="generic", format="instance")


def file_name(name: str) -> str:
    """A set's name for people: of a user's own file as it was typed, but of paths from the root the
    last names alone."""
    spec, part, cut = own_parts(name)
    paths = map(Path, spec.split(":"))
    short = ":".join(x.name if x.is_absolute() else str(x) * (x != Path()) for x in paths)
    return f"{short}{f'@{part}{cut}' * bool(part)}" if spec else name


def folder_name(name: str) -> str:
    """A set's name as that of a folder or file."""
    return name if name in SOURCES else re.sub(r"[^\w.@+-]+", "_", name).strip("._")


# ---- what a run needs ----------------------------------------------------------------------------


def scored_sets(words: Iterable[str], data: Path, is_segmentor: bool = False) -> list[str]:
    """The sets that `words` name, each once: tasks, sets that score one, files of a user's own. Of
    a segmentor, the model of stage 1, those that it can predict. Raises ValueError at an unknown
    word."""
    sets, found = sets_by_task(), []
    for word in words:
        if word not in {*sets, *itertools.chain(*sets.values())} and not is_own(word):
            known = ", ".join(sets)
            raise ValueError(f"unknown task {word}; known are {known}, their sets, and own files")
        found += sets.get(word, [word])

    def is_generic(name: str) -> bool:
        source = find_source(name)
        if source.scores or not locate(data, source.annotations).is_file():
            return (source.scores or "panoptic") in SEGMENTOR_TASKS
        return recognise(source, data).task == "generic"

    return [name for name in dict.fromkeys(found) if not is_segmentor or is_generic(name)]


def run_sets(config: Config, stages: Iterable[int], data: Path) -> list[str]:
    """The sets of `eval_tasks` that a run of these stages scores; after stage 2 there are none."""
    stages = {number for number in stages if number != 2 or config.validate_every}
    return scored_sets(config.eval_tasks, data, stages == {1}) if stages else []


def required_paths(
    config: Config,
    stages: list[int],
    data: Path,
    weights: Path,
    out: Path,
    brought: Collection[str] = (),
) -> list[tuple[Path, str]]:
    """(path, what belongs there) for all that the named stages read, to train and to score, and no
    earlier one of them makes. `brought`: the parts that --init gives to the first of them."""
    required: dict[Path, str] = {}
    names = [name for number in stages for name in config.stages[number].datasets]
    names += run_sets(config, stages, data)
    for source in map(find_source, names):
        required |= dict.fromkeys(paths_of(source, data), source.about)
    for number in stages:
        stage, model = config.stages[number], config.model
        here = set(brought) if number == stages[0] else set()
        here |= {"segmentor.encoder"} if 1 in stage.starts_from else set()
        for part in ("seg_encoder", "image_encoder", "llm")[: 1 if number == 1 else None]:
            folder = getattr(model, part)
            if folder != "none" and part.replace("seg_", "segmentor.") not in here:
                about = f"Hugging Face folder {folder} (config.json and safetensors)"
                required[weights / folder] = about
        for earlier in stage.starts_from:
            if earlier not in stages:
                about = f"a finished stage {earlier} (train --stage {earlier})"
                required[stage_folder(out, earlier) / "latest"] = about
    return list(required.items())
