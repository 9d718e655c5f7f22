"""Asks a model about pictures, each with one request, and writes pictures, JSON and COCO JSON.

    python -m xsam.predict panoptic --checkpoint runs/toy/stage3 --image drawing.jpg
    python -m xsam.predict refer "the red circle" --checkpoint DIR --image photos --out answers
    python -m xsam.predict interactive --point 120,80 --checkpoint DIR --image photo.jpg

Of one picture it writes OUT.png (masks, outlines, labels) and OUT.json (the answer, and each mask
as COCO RLE), beside the image unless --out says where, in place of what an earlier command wrote
there. Of several, both for each of them in the folder OUT, and OUT/coco.json, a file of COCO
instances that annotation tools open. Those that OUT holds already, of the same request, are not
asked again; a picture that cannot be asked about is told, and the others go on.
"""

import argparse
import glob
import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from xsam.checkpoints import find_checkpoint
from xsam.cli import Parser, add_checkpoint_flags, share
from xsam.files import IMAGE_SUFFIXES, check_target, list_files, read_json, write_whole
from xsam.images import read_image, read_image_size, read_region
from xsam.inference import check_request, load_with_flags, predict, stored_stage
from xsam.model import XSAM, Segmentor
from xsam.names import read_names
from xsam.regions import KINDS, draw_region
from xsam.regions import read_region as read_mark
from xsam.report.pictures import draw_prompts, side_by_side
from xsam.results import SegmentationResult, coco_instances
from xsam.tasks import requests

COCO_FILE = "coco.json"

OURS = {"answer", "segments"}  # keys that a JSON file of ours has


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    examples = [f"{word} {each.example}" for word, each in requests().items()]
    lines = [f"  python -m xsam.predict {each} --checkpoint DIR" for each in examples]
    parser = Parser(
        prog="python -m xsam.predict",
        description="Segments pictures, or answers a question about them.",
        epilog="an example of every task:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = f"what is asked of the model: {', '.join(requests())}"
    parser.add_argument("task", choices=requests(), metavar="TASK", help=tasks)
    text = "refer: the phrase; chat, reason: the question"
    parser.add_argument("text", nargs="?", default="", metavar="TEXT", help=text)
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--image",
        action="append",
        required=True,
        metavar="PATH",
        help="a picture, a folder of them, or a pattern in quotes; may be repeated",
    )
    lists = "names of any number of classes: a,b,c, or a file with one a line"
    parser.add_argument(
        "--things", "--names", metavar="LIST", help=f"{lists}; instances are kept apart"
    )
    parser.add_argument("--stuff", metavar="LIST", help=f"{lists}; each is one region")
    shapes = {"point": "X,Y", "box": "X0,Y0,X1,Y1", "scribble": "X,Y,X,Y,...", "lasso": "X,Y,..."}
    for kind in KINDS:
        parser.add_argument(
            f"--{kind}",
            dest="regions",
            action="append",
            type=lambda text, kind=kind: _coordinates(kind, text),
            metavar=shapes[kind],
            help=f"interactive, vgd: a {kind}, in pixels of the picture; may be repeated",
        )
    parser.add_argument(
        "--region",
        dest="regions",
        action="append",
        type=Path,
        metavar="PNG",
        help="interactive, vgd: a mask, white on black or opaque on nothing; may be repeated. All "
        "marks of interactive are of one object, every mark of vgd is of another kind of object",
    )
    parser.add_argument(
        "--region-image",
        type=Path,
        metavar="PATH",
        help="vgd: the image that the regions are in, if another",
    )
    parser.add_argument(
        "--threshold",
        type=share,
        metavar="SCORE",
        help="instance, vgd: masks from this score on are shown (0.3); panoptic: queries below it "
        "are dropped (0.8); refer, reason: a phrase below it is refused, as --presence",
    )
    text = "path without suffix, or a folder that is there (default: IMAGE_TASK beside the image); "
    text += "of several images the folder (default: xsam_TASK)"
    parser.add_argument("--out", type=Path, metavar="PATH", help=text)
    parser.add_argument(
        "--coco", type=Path, metavar="FILE", help="where to write COCO instances of all pictures"
    )
    parser.add_argument(
        "--polygons", action="store_true", help="polygons in place of RLE in COCO's file"
    )
    parser.add_argument(
        "--masks", action="store_true", help="also write each mask to OUT_masks/, white on black"
    )
    parser.add_argument(
        "--json", action="store_true", help="print a line of JSON for each picture, and no other"
    )
    return parser


def _coordinates(kind: str, text: str) -> tuple:
    """The mark of a flag's text. Raises ArgumentTypeError."""
    try:
        numbers = [float(number) for number in text.split(",")]
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        return read_mark((kind, pairs), f"{kind} {text}")
    except ValueError as error:
        wrong = error if "points" in str(error) else f"{text!r}: numbers with commas between them"
        raise argparse.ArgumentTypeError(str(wrong)) from error


# ---- what is asked -------------------------------------------------------------------------------


def find_images(given: list[str]) -> tuple[list[Path], bool]:
    """The pictures that the paths, folders and patterns name, each once, and whether there may be
    several. Raises ValueError where one names none."""
    found: dict[Path, None] = {}
    for text in given:
        path = Path(text)
        if path.is_dir():
            paths = list_files(path, *IMAGE_SUFFIXES)
        elif path.exists() or not glob.has_magic(text):
            paths = [path]
        else:
            paths = [Path(each) for each in sorted(glob.glob(text, recursive=True))]
        if not paths:
            raise ValueError(f"{text}: no picture there")
        found |= dict.fromkeys(paths)
    return list(found), len(found) > 1 or Path(given[0]).is_dir()


def read_request(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `predict` that are the same for every picture, checked before a model is
    loaded. Raises ValueError where they are no request."""
    request = requests()[options.task]
    if options.panoptic_rule and request.post_processing != "panoptic":
        raise ValueError("--panoptic-rule is for task panoptic")
    if options.presence is not None and request.threshold != "presence":
        raise ValueError("--presence is for tasks refer and reason")
    if options.presence is not None and options.threshold is not None:
        raise ValueError("--presence and --threshold say the same here: give one of them")
    lists = {"things": options.things, "stuff": options.stuff}
    names = {kind: text if text is None else read_names(text) for kind, text in lists.items()}
    stage, regions = stored_stage(options.checkpoint), options.regions or []
    check_request(
        options.task,
        stage,
        [options.text],
        *names.values(),
        regions,
        options.region_image,
        options.threshold,
    )
    return {"task": options.task, "text": options.text, "threshold": options.threshold} | names


def read_pictures(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A picture with its regions, and the image that shows them where that is another. A photo is
    turned upright unless its regions are of its stored pixels."""
    regions, other = options.regions or [], options.region_image
    files = [region for region in regions if isinstance(region, Path)]
    size = read_image_size(files[0]) if files else None
    image = read_image(path, None if other else size)
    shown = read_image(other, size) if other else None
    size = (shown or image).height, (shown or image).width
    masks = [
        read_region(each, size) if isinstance(each, Path) else draw_region(each, size, "region")
        for each in regions
    ]
    return {"image": image, "regions": masks, "region_image": shown}


def fingerprint(request: dict[str, Any], options: argparse.Namespace) -> dict[str, str]:
    """What a result depends on beside the picture, as text: a result of the same is not made
    again."""
    flags = "regions", "region_image", "presence", "panoptic_rule", "dtype", "llm_bits"
    about = request | {name: getattr(options, name) for name in flags}
    about["checkpoint"] = find_checkpoint(options.checkpoint)
    return {name: str(value) for name, value in about.items() if value not in (None, [], "")}


# ---- where it goes -------------------------------------------------------------------------------


def output_files(options: argparse.Namespace, image: Path) -> list[Path]:
    """The picture and the JSON to write of one image: under another name, with the task's at its
    end, where that would replace what is read or another program's JSON. Raises ValueError where
    they cannot be."""
    stem, name = options.out, f"{image.stem}_{options.task}"
    if stem is None or stem.is_dir():
        stem = (stem or image.parent) / name
    stem = str(stem).removesuffix(".png").removesuffix(".json")
    files = [each for each in options.regions or [] if isinstance(each, Path)]
    given = image, options.region_image, *files, options.things, options.stuff
    inputs = [Path(path).resolve() for path in given if path]
    for name in (stem, f"{stem}_{options.task}"):
        paths = [Path(f"{name}{suffix}") for suffix in (".png", ".json")]
        for path in paths:
            check_target(path)
        there = read_json(paths[1]) if paths[1].exists() else dict.fromkeys(OURS)
        is_ours = isinstance(there, dict) and there.keys() >= OURS
        if is_ours and not {path.resolve() for path in paths} & {*inputs}:
            return paths
    raise ValueError(f"{paths[0]} or {paths[1]} is read, or of another program: name another --out")


def plan_files(options: argparse.Namespace, images: list[Path]) -> list[list[Path]]:
    """The picture and the JSON of each of several images, in the folder --out. Raises ValueError
    where that holds images, among which its own would be found the next time."""
    folder = options.out or Path(f"xsam_{options.task}")
    check_target(folder, is_folder=True)
    if folder.resolve() in {image.resolve().parent for image in images}:
        raise ValueError(f"{folder}: holds pictures that are asked about; name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    counts = Counter(image.stem for image in images)
    stems, seen = [], Counter()
    for image in images:  # a.jpg and a.png, or of two folders
        seen[image.stem] += 1
        is_alone = counts[image.stem] == 1
        stems.append(image.stem if is_alone else f"{image.stem}_{seen[image.stem]}")
    return [[folder / f"{stem}_{options.task}{x}" for x in (".png", ".json")] for stem in stems]


def result_there(path: Path, image: Path, request: dict[str, str]) -> dict[str, Any] | None:
    """The result that an earlier command wrote of the same image and request, if any. Raises
    ValueError where the file is of another program."""
    try:
        there = read_json(path) if path.exists() else dict.fromkeys(OURS)
    except ValueError:  # damaged
        return None
    if not isinstance(there, dict) or not there.keys() >= OURS:
        raise ValueError(f"{path}: is of another program; name another --out")
    is_same = there.get("request") == request
    return there if is_same and there["image"]["file_name"] == image.as_posix() else None


def is_live(options: argparse.Namespace) -> bool:
    """Whether an answer is shown as it grows."""
    is_text = requests()[options.task].post_processing == "none"
    return is_text and not options.json and sys.stdout.isatty()


def ask(
    model: Segmentor | XSAM, image: Path, request: dict[str, Any], options: argparse.Namespace
) -> tuple[SegmentationResult, Image.Image]:
    """What the model says of one picture, and that drawn; on a terminal the answer to a question is
    shown as it grows."""
    printed = 0

    def show(text: str) -> None:
        nonlocal printed
        print(text[printed:], end="", flush=True)
        printed = len(text)

    on_text = show if is_live(options) else None
    pictures = read_pictures(image, options)
    result = predict(model, **pictures, **request, on_text=on_text)
    if on_text:
        print()
    drawn, regions = result.draw(options.text or None), pictures["regions"]
    if regions:
        shown = pictures["region_image"] or result.image
        kinds = ["mask" if isinstance(each, Path) else each[0] for each in options.regions]
        kinds = ["mask" if kind == "lasso" else kind for kind in kinds]
        labels = [f"region {number}" for number in range(1, len(regions) + 1)]
        marked = draw_prompts(shown, np.stack(regions), None, labels, kinds)
        drawn = side_by_side([*marked, drawn], ["asked", "found"])
    return result, drawn


def write(
    result: SegmentationResult,
    drawn: Image.Image,
    image: Path,
    mark: dict[str, str],
    options: argparse.Namespace,
    paths: list[Path],
) -> dict[str, Any]:
    """Writes the picture and the JSON, if any, and prints what they hold; returns the JSON."""
    size = {"width": result.image.width, "height": result.image.height}
    document = {
        "image": {"file_name": image.as_posix()} | size,
        "request": mark,
        "names": result.names,
        "threshold": result.threshold,
    }
    document |= result.to_dict()
    if paths:
        content = io.BytesIO()
        drawn.save(content, "PNG")
        write_whole(paths[0], content.getvalue())
        if options.masks:
            result.save_masks(paths[0].with_name(f"{paths[0].stem}_masks"))
        write_whole(paths[1], json.dumps(document, indent=1))
    if options.json:
        tqdm.write(json.dumps(document))
        return document
    lines = summary(result, options.task, paths)
    tqdm.write("\n".join(lines[bool(result.answer) and is_live(options) :]))
    return document


def summary(result: SegmentationResult, task: str, paths: list[Path]) -> list[str]:
    """The lines that are printed of a picture."""
    lines = [result.answer] if result.answer else []
    if result.num_prompts > 1:
        lines.append(f"the names did not fit one prompt: asked in {result.num_prompts}, and merged")
    count, shown = len(result.masks), len(result.shown())
    if not count and result.answer and requests()[task].post_processing != "none":
        is_refused = "<SEG>" in result.answer
        why = "nothing scores as much as the threshold" if is_refused else "no <SEG> in the answer"
        lines.append(f"{why}: no masks")
    if paths:
        masks = "1 mask" if count == 1 else f"{count} masks"
        if shown < count:
            masks += f", {shown} with a score of {result.threshold:g} or more shown"
        lines.append(f"{masks}: {paths[0]} {paths[1]}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command: returns the exit status, 1 where a picture could not be read, 2 at bad input."""
    options = build_parser().parse_intermixed_args(arguments)
    try:
        return run(options)
    except (ValueError, OSError) as error:
        print(f"xsam.predict: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """The command; 1 where some of several pictures could not be asked about. Raises ValueError or
    OSError where nothing can be."""
    images, is_several = find_images(options.image)
    request, coco = read_request(options), options.coco
    mark = fingerprint(request, options)
    if is_several:
        paths = plan_files(options, images)
        coco = coco or paths[0][0].with_name(COCO_FILE)
        found = [
            result_there(each[1], image, mark) for image, each in zip(images, paths, strict=True)
        ]
    else:
        is_written = requests()[options.task].post_processing != "none" or options.out
        paths, found = [output_files(options, images[0]) if is_written else []], [None]
        read_pictures(images[0], options)
    if coco:
        check_target(coco)
        there = read_json(coco) if coco.exists() else {"annotations": []}
        if not isinstance(there, dict) or "annotations" not in there:
            raise ValueError(f"{coco}: is no file of COCO; name another --coco")
    kept = len(images) - found.count(None)
    if kept:
        print(f"{kept} of {len(images)} pictures are there already", file=sys.stderr)
    if None in found:
        model, _ = load_with_flags(options)
    failed = 0
    for number in tqdm(range(len(images)), options.task, unit="image", disable=not is_several):
        if found[number] is not None:
            continue
        try:
            result, drawn = ask(model, images[number], request, options)
        except (ValueError, OSError) as error:
            if not is_several:
                raise
            place = "" if str(images[number]) in str(error) else f"{images[number]}: "
            tqdm.write(f"xsam.predict: {place}{error}", file=sys.stderr)
            failed += 1
            continue
        found[number] = write(result, drawn, images[number], mark, options, paths[number])
    if coco:
        document = coco_instances(list(filter(None, found)), options.polygons)
        write_whole(coco, json.dumps(document))
        if not options.json:
            counts = [len(document[each]) for each in ("annotations", "images")]
            print("{} masks of {} pictures: {}".format(*counts, coco))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
