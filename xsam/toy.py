"""The toy world on disk: drawings in the public datasets' formats, and small starting weights.

Stands in for COCO, RefCOCO, LLaVA and the three pretrained models, so that readers, stages and
metrics run on a laptop without a download: it writes what `data.py` reads (paths: `SOURCES` of
config.py) and what the stages load from the weights root. Every scene comes from
`default_rng([seed, split, index])`, so the bytes are the same each time.

    python -m xsam.toy /tmp/toy --num_train 1600 --num_val 64
"""

import argparse
import colorsys
import contextlib
import io
import itertools
import json
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from xsam.config import SOURCES, ModelConfig, toy
from xsam.data import PHRASINGS, clean_name
from xsam.scenes import (
    CAPTION_REQUESTS,
    CLASSES,
    COLORS,
    DIALOGUE,
    EXPRESSIONS,
    FACTS,
    NUMBERS,
    RADII,
    STUFF_IDS,
    THING_IDS,
    Generator,
    Scene,
    Segment,
    caption_turn,
    dialogue,
    draw_scene,
    expressions,
    plural,
)

SPLITS = ("train", "val", "text", "sam")  # each draws from numbers of its own

# ---- the public formats --------------------------------------------------------------------------


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that takes its name only once it is complete, so a killed writer leaves no half."""
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already: delete it or name another folder")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(target)


def _write(path: Path, content: bytes | list | dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def _encode(image: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **options)
    return buffer.getvalue()


def categories(only_things: bool = False) -> list[dict]:
    """COCO's records, in order of id."""
    return [
        dict(
            id=number,
            name=name,
            supercategory="shape" if name in THING_IDS else "texture",
            isthing=int(name in THING_IDS),
            color=[int(255 * c) for c in colorsys.hsv_to_rgb(number * 0.381 % 1, 0.8, 0.9)],
        )
        for name, number in (THING_IDS if only_things else THING_IDS | STUFF_IDS).items()
    ]


def _segment_record(segment: Segment, mask: np.ndarray) -> dict:
    """What panoptic and instance files say alike of a segment; the box is [x, y, width, height]."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return dict(
        category_id=segment.category_id,
        area=int(mask.sum()),
        bbox=[x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        iscrowd=int(segment.is_crowd),
    )


def polygons(mask: np.ndarray) -> list[list[int]]:
    """Outlines [x0, y0, x1, y1, ...] along the pixel edges of [H, W] bool.

    COCO joins the polygons of an object and knows no holes, so the mask is cut into bands of rows
    with as many runs of pixels in each: a ring gives a cap, two sides and a bottom.
    """
    rows, edges = np.nonzero(np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1)))))
    runs = zip(rows[::2].tolist(), edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    bands: list[list[list[tuple[int, int, int]]]] = []  # bands of rows of (row, left, right)
    for _, group in itertools.groupby(runs, key=lambda run: run[0]):
        row, above = list(group), bands[-1][-1] if bands else []
        if len(row) == len(above) and all(map(_is_below, row, above)):
            bands[-1].append(row)
        else:
            bands.append([row])
    return [_outline(piece) for band in bands for piece in zip(*band, strict=True)]


def _is_below(run: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    return run[0] == other[0] + 1 and run[1] < other[2] and other[1] < run[2]


def _outline(runs: tuple[tuple[int, int, int], ...]) -> list[int]:
    down = [(right, y) for row, _, right in runs for y in (row, row + 1)]
    up = [(left, y) for row, left, _ in reversed(runs) for y in (row + 1, row)]
    return [number for point in down + up for number in point]


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed RLE: columns one after the other, the first run counts zeros."""
    changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
    counts = np.diff(changes, prepend=0, append=mask.size).tolist()
    return {"counts": counts, "size": list(mask.shape)}


@dataclass
class Drawing:
    """A scene on its way to the files; `rng` goes on where the drawing stopped."""

    image_id: int
    split: str
    scene: Scene
    jpeg: bytes
    rng: Generator

    def image_record(self, prefix: str = "") -> dict:
        height, width = self.scene.owner.shape
        name = f"{prefix}{self.image_id:012d}.jpg"
        return dict(id=self.image_id, file_name=name, height=height, width=width)

    def instance_records(self) -> list[dict]:
        """Things in COCO's instance format; their ids are 10 x image id + place in the scene."""
        records = []
        for index, segment in enumerate(self.scene.segments):
            if segment.is_thing:
                mask = self.scene.mask(index)
                shape = run_lengths(mask) if segment.is_crowd else polygons(mask)
                ids = dict(id=10 * self.image_id + index, image_id=self.image_id)
                records.append(ids | _segment_record(segment, mask) | dict(segmentation=shape))
        return records


def write_world(data: Path, num_train: int = 1600, num_val: int = 64, seed: int = 0) -> None:
    """Writes COCO panoptic and instances, RefCOCO and LLaVA under `data`, which must not exist.

    RefCOCO holds both splits, with the drawings and image ids of COCO; LLaVA the training split.
    The first scene of each split has a crowd. Raises FileExistsError.
    """
    with _new_folder(data) as root:
        splits = {"train": num_train, "val": num_val}
        drawings = {split: _draw(seed, split, count) for split, count in splits.items()}
        for split in splits:
            _write_coco(root, split, drawings[split])
        _write_refcoco(root, [each for split in splits for each in drawings[split]])
        _write_llava(root, drawings["train"])


def _draw(seed: int, split: str, count: int) -> list[Drawing]:
    drawings = []
    number = SPLITS.index(split)
    for index in tqdm(range(count), desc=f"draw {split}"):
        rng = np.random.default_rng([seed, number, index])
        scene = draw_scene(rng, has_crowd=index == 0 or rng.random() < 1 / 12)
        jpeg = _encode(scene.image, format="JPEG", quality=95, subsampling=0)
        drawings.append(Drawing(139 + 37 * index + 18 * number, split, scene, jpeg, rng))
    return drawings


def _write_coco(root: Path, split: str, drawings: list[Drawing]) -> None:
    source = SOURCES["coco_panoptic" if split == "train" else "coco_panoptic_val"]
    panoptic, instances = [], []
    for drawing in tqdm(drawings, desc=f"COCO {split}"):
        owner, segments = drawing.scene.owner, drawing.scene.segments
        # Any 24 bits but 0, which is void: most are over 65535 and so use all three channels.
        ids = 1 + drawing.rng.choice(2**24 - 1, size=len(segments), replace=False)
        colors = (np.concatenate([[0], ids])[owner][..., None] >> [0, 8, 16]) & 255  # [H, W, 3]
        info = [
            dict(id=number) | _segment_record(segment, drawing.scene.mask(index))
            for index, (number, segment) in enumerate(zip(ids.tolist(), segments, strict=True))
        ]
        image = drawing.image_record()
        name = image["file_name"].replace(".jpg", ".png")
        panoptic.append(dict(image_id=drawing.image_id, file_name=name, segments_info=info))
        instances += drawing.instance_records()
        _write(root / source.masks / name, _encode(colors.astype(np.uint8), format="PNG"))
        _write(root / source.images / image["file_name"], drawing.jpeg)
    # Not in the order of their ids, like COCO's.
    images = [drawing.image_record() for drawing in drawings[1::2] + drawings[::2]]
    both = dict(images=images, annotations=panoptic, categories=categories())
    _write(root / source.annotations, both)
    things = dict(images=images, annotations=instances, categories=categories(only_things=True))
    _write(root / source.annotations.replace("panoptic_", "instances_"), things)


def _write_refcoco(root: Path, drawings: list[Drawing]) -> None:
    source = SOURCES["refcoco"]
    refs, images, instances, num_sentences = [], [], [], 0
    for drawing in tqdm(drawings, desc="RefCOCO"):
        rng, stem = drawing.rng, f"COCO_train2014_{drawing.image_id:012d}"
        images.append(drawing.image_record(prefix="COCO_train2014_"))
        instances += drawing.instance_records()
        _write(root / source.images / f"{stem}.jpg", drawing.jpeg)
        for index, segment in enumerate(drawing.scene.segments):
            found = rng.permutation(expressions(drawing.scene, segment))[: rng.integers(1, 4)]
            if len(found):
                sentences = [
                    dict(sent_id=number, sent=text, raw=text.capitalize(), tokens=text.split())
                    for number, text in enumerate(found.tolist(), num_sentences)
                ]
                num_sentences += len(sentences)
                ref = dict(ref_id=len(refs), ann_id=10 * drawing.image_id + index)
                ref |= dict(image_id=drawing.image_id, category_id=segment.category_id)
                ref |= dict(split=drawing.split, file_name=f"{stem}_{index}.jpg")
                ref |= dict(sent_ids=[each["sent_id"] for each in sentences], sentences=sentences)
                refs.append(ref)
    _write(root / source.annotations, pickle.dumps(refs, protocol=2))
    things = dict(images=images, annotations=instances, categories=categories(only_things=True))
    _write(root / source.instances, things)


def _write_llava(root: Path, drawings: list[Drawing]) -> None:
    pretrain, instruct = SOURCES["llava_pretrain"], SOURCES["llava_instruct"]
    captions, dialogues = [], []
    for index, drawing in enumerate(tqdm(drawings, desc="LLaVA")):
        rng, stem = drawing.rng, f"{drawing.image_id:09d}"
        name = f"{stem[:5]}/{stem}.jpg"
        turns = _conversation(rng, [caption_turn(rng, drawing.scene)])
        captions.append(dict(id=stem, image=name, conversations=turns))
        _write(root / pretrain.images / name, drawing.jpeg)

        if index % 3:  # fewer dialogues than pictures: most steps of stage 3 are for masks
            continue
        name = f"coco/train2017/{drawing.image_id:012d}.jpg"
        turns = _conversation(rng, dialogue(rng, drawing.scene))
        number = drawing.image_id if rng.random() < 0.5 else stem  # some datasets of it have ints
        dialogues.append(dict(id=number, image=name, conversations=turns))
        _write(root / instruct.images / name, drawing.jpeg)
        if rng.random() < 0.1:
            turns = _conversation(rng, [FACTS[rng.integers(len(FACTS))]], has_image=False)
            dialogues.append(dict(id=f"text{stem}", model="", conversations=turns))
    _write(root / pretrain.annotations, captions)
    _write(root / instruct.annotations, dialogues)


def _conversation(rng: Generator, turns: list[tuple[str, str]], has_image: bool = True) -> list:
    """LLaVA's turns; the image stands before or after the first question."""
    values = [text for turn in turns for text in turn]
    if has_image:
        values[0] = f"<image>\n{values[0]}" if rng.random() < 0.5 else f"{values[0]}\n<image>"
    speakers = itertools.cycle(("human", "gpt"))
    return [{"from": who, "value": value} for who, value in zip(speakers, values, strict=False)]


# ---- weights -------------------------------------------------------------------------------------

CHAT_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPARE_TOKENS = 8  # rows of the embedding left for the tokens that the model adds


def vocabulary() -> list[str]:
    """Every word that the world and the prompts of `data.py` can say, also lower-cased; sorted."""
    prompts = [text for task in PHRASINGS.values() for texts in task.values() for text in texts]
    dialogues = [text for pair in (*DIALOGUE.values(), *FACTS) for text in pair]
    names = [clean_name(name) for name in (*THING_IDS, *STUFF_IDS)] + [plural(n) for n in THING_IDS]
    texts = [*prompts, *dialogues, *names, *COLORS, *RADII, *NUMBERS, *EXPRESSIONS]
    texts += [*CAPTION_REQUESTS, "a an and in is it many no of on the this , . : ? !"]
    plain = re.sub(r"\{\w+\}|<[^>]+>", " ", " ".join(texts))  # without fields and tokens
    return sorted({"\n", *re.findall(r"\w+|[^\w\s]", plain + plain.lower())})


def build_tokenizer(vocab_size: int):
    """A word-level tokenizer in the layout of Phi-3. Raises ValueError if the words do not fit."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*CHAT_TOKENS, *vocabulary()]
    if len(words) > vocab_size - SPARE_TOKENS:
        raise ValueError(f"{len(words)} toy words, only {vocab_size} - {SPARE_TOKENS} fit")
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    # Spaces vanish, so a word is one token wherever it stands; newlines and punctuation stay.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), behavior="removed"),
            pre_tokenizers.Split(Regex(r"\n|[^\w\s]"), behavior="isolated"),
        ]
    )
    # Puts one space between words, none before punctuation or around a newline.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            decoders.Replace(Regex(" ?\n ?"), "\n"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(CHAT_TOKENS[4:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def write_weights(weights: Path, model: ModelConfig, seed: int = 0, steps: int = 150) -> None:
    """Writes a language model trained for `steps`, a SAM encoder for six times as many (or a random
    Swin), and a random image encoder.

    They lie under `weights`, which must not exist. Raises FileExistsError.
    """
    import torch
    from transformers import AutoModel

    from xsam.encoders import transformers_config
    from xsam.model import build_seg_encoder

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, so that the bytes repeat
    try:
        with _new_folder(weights) as root, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if model.seg_backbone_config:
                build_seg_encoder(model).model.save_pretrained(root / model.seg_encoder)
            else:
                _write_sam(root / model.seg_encoder, model, seed, 6 * steps)
            if model.image_encoder != "none":
                siglip = AutoModel.from_config(transformers_config(model.image_encoder_config))
                siglip.save_pretrained(root / model.image_encoder)
            _write_language_model(root / model.llm, model.llm_config, seed, steps)
    finally:
        torch.set_num_threads(threads)


def _write_sam(folder: Path, model: ModelConfig, seed: int, steps: int) -> None:
    """SAM has seen a billion masks before stage 1 begins; this one practises for a minute, telling
    for each patch what lies there. A ViT learns textures at once and shapes late."""
    import torch
    from torch import nn
    from transformers import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(
        hidden_size=model.seg_dim,
        num_hidden_layers=model.seg_depth,
        num_attention_heads=model.seg_heads,
        mlp_dim=model.seg_mlp_dim,
        image_size=model.seg_image_size,
        patch_size=model.seg_patch_size,
        window_size=model.seg_window_size,
        global_attn_indexes=list(model.seg_global_blocks),
        output_channels=model.seg_neck_dim,
    )
    sam, encoder = SamVisionModel(config), _random_encoder(model)
    head = nn.Sequential(nn.LayerNorm(model.seg_dim), nn.Linear(model.seg_dim, len(CLASSES) + 1))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, max(steps, 2), pct_start=0.05)
    number, count = SPLITS.index("sam"), min(700, 8 * steps)
    rngs = (np.random.default_rng([seed, number, index]) for index in range(count))
    scenes = [draw_scene(rng, most_things=8) for rng in tqdm(rngs, "draw sam", count)]
    pixels, labels = zip(*(_patches(scene, model) for scene in scenes), strict=True)
    weights = torch.ones(len(CLASSES) + 1)
    weights[: len(THING_IDS)] = 3.0  # things cover little
    rng = np.random.default_rng(seed)
    for _ in (bar := tqdm(range(steps), desc="train the segmentation encoder")):
        chosen = rng.integers(len(scenes), size=8)
        target = torch.stack([labels[index] for index in chosen])  # [B, h, w]
        logits = head(encoder(torch.stack([pixels[index] for index in chosen]))[-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 2), target.flatten(), weights)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    sam.vision_encoder.load_state_dict(encoder.state_dict())
    sam.save_pretrained(folder)


def _random_encoder(model: ModelConfig):
    """Each layer keeps the variance of its input, and the position embedding is a sine code (Beyer
    et al. 2022, "Better plain ViT baselines")."""
    import torch

    from xsam.decoder import sine_positions
    from xsam.model import build_seg_encoder

    encoder = build_seg_encoder(model)
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    grid = model.seg_image_size // model.seg_patch_size
    positions = sine_positions(grid, grid, model.seg_dim, torch.device("cpu"))
    with torch.no_grad():
        encoder.pos_embed.copy_(positions.view(1, grid, grid, -1))
    return encoder


def _patches(scene: Scene, model: ModelConfig):
    """A scene as the encoder's pixels and the commonest class of each patch [h, w], void last."""
    import torch

    from xsam.encoders import Placement, seg_pixels

    placement = Placement.fit(scene.owner.shape, model.seg_image_size)
    names = [*CLASSES, ""]
    table = [len(CLASSES)] + [
        len(CLASSES) if segment.is_crowd else names.index(segment.category)
        for segment in scene.segments
    ]
    classes = torch.from_numpy(placement.place_map(np.array(table)[scene.owner], len(CLASSES)))
    size = model.seg_patch_size
    votes = (
        torch.nn.functional.one_hot(classes, len(CLASSES) + 1)
        .unflatten(0, (-1, size))
        .unflatten(2, (-1, size))
    )
    return seg_pixels(Image.fromarray(scene.image), placement), votes.sum((1, 3)).argmax(-1)


def _language_model_texts(tokenizer, seed: int, num_scenes: int) -> list[str]:
    """Captions and dialogues of scenes that are in no split, in the chat layout."""
    conversations = [[fact] for fact in FACTS]
    for drawing in _draw(seed, "text", num_scenes):
        conversations.append([caption_turn(drawing.rng, drawing.scene)])
        conversations.append(dialogue(drawing.rng, drawing.scene))
    texts = []
    for turns in conversations:
        pairs = zip(itertools.cycle(("user", "assistant")), itertools.chain(*turns), strict=False)
        messages = [{"role": role, "content": content} for role, content in pairs]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    return texts


def _write_language_model(folder: Path, config: dict, seed: int, steps: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from xsam.encoders import transformers_config

    tokenizer = build_tokenizer(config["vocab_size"])
    language_model = AutoModelForCausalLM.from_config(transformers_config(config))
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    language_model.generation_config.eos_token_id = ends
    texts = _language_model_texts(tokenizer, seed, num_scenes=min(400, 8 * steps))
    optimizer = torch.optim.AdamW(language_model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    rng = np.random.default_rng(seed)
    for _ in (bar := tqdm(range(steps), desc="train the language model")):
        chosen = [texts[i] for i in rng.integers(len(texts), size=16)]
        batch = tokenizer(chosen, return_tensors="pt", padding=True)  # [B, N]
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = language_model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    language_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the toy world: FOLDER/data, FOLDER/weights")
    parser.add_argument("folder", type=Path, help="where to write; made if need be")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--num_train", type=int, default=1600, help="default: %(default)s")
    parser.add_argument("--num_val", type=int, default=64, help="default: %(default)s")
    arguments = parser.parse_args()
    folder = arguments.folder
    write_world(folder / "data", arguments.num_train, arguments.num_val, arguments.seed)
    write_weights(folder / "weights", toy().model, arguments.seed)


if __name__ == "__main__":
    main()
