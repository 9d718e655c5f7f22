"""The toy world's weights and its words.

Small starting weights stand in for the three pretrained models, as the datasets of `world.py` stand
in for the public ones, so that all stages run on a laptop without a download.

Legend: B batch, N tokens, h w patches of the image's height and width.
"""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    SamVisionConfig,
    SamVisionModel,
)

from xsam.config import ModelConfig
from xsam.data import ResizeAndPad, seg_pixels
from xsam.decoder import sine_positions
from xsam.encoders import transformers_config
from xsam.files import give_rights
from xsam.model import build_seg_encoder
from xsam.prompts import PHRASINGS, clean_name
from xsam.toy import scenes
from xsam.toy.scenes import CLASSES, FACTS, RIDDLES, THING_IDS, Scene, plural
from xsam.toy.world import ADE_NAMES, HINT, SPLITS, YES_OR_NO, draw_split, new_folder

# ---- words ---------------------------------------------------------------------------------------

CHAT_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

SPARE_TOKENS = 8  # rows of the embedding left for the tokens that the model adds


def vocabulary() -> list[str]:
    """Every word that the world and its questions can say, also lower-cased; sorted."""
    prompts = [text for task in PHRASINGS.values() for texts in task.values() for text in texts]
    dialogues = [text for pair in (*scenes.DIALOGUE.values(), *FACTS) for text in pair]
    riddles = [text for r in RIDDLES.values() for text in (*r.questions, *r.phrases, r.explanation)]
    names = [clean_name(name) for name in CLASSES] + [plural(name) for name in THING_IDS]
    looks = [*scenes.COLORS, *scenes.RADII, *scenes.NUMBERS]
    texts = [*prompts, *dialogues, *riddles, *names, *looks, *ADE_NAMES, *scenes.EXPRESSIONS]
    texts += [text for text, _ in scenes.GROUPS]
    texts += [*scenes.CHECKS.values(), *scenes.CAPTION_REQUESTS]
    # Options of benchmarks, and what is added to their questions.
    texts += [HINT, YES_OR_NO, "A. B. C. D."]
    texts += ["a an and in is it many no of on the this yes Yes No , . : ? !"]
    plain = re.sub(r"\{\w+\}|<[^>]+>", " ", " ".join(texts))  # without fields and tokens
    return sorted({"\n", *re.findall(r"\w+|[^\w\s]", plain + plain.lower())})


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer in the layout of Phi-3. Raises ValueError if the words do not fit."""
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
            decoders.Replace(" :", ":"),
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


# ---- weights -------------------------------------------------------------------------------------


def write_weights(weights: Path, model: ModelConfig, seed: int = 0, steps: int = 150) -> None:
    """Writes a language model trained for `steps`, a SAM encoder for six times as many (or a random
    Swin), and a random image encoder, under `weights`, which must not exist. Raises
    FileExistsError."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, so that the bytes repeat
    try:
        with new_folder(weights) as root, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if model.seg_backbone_config:
                build_seg_encoder(model).model.save_pretrained(root / model.seg_encoder)
            else:
                _write_sam(root / model.seg_encoder, model, seed, 6 * steps)
            if model.image_encoder != "none":
                siglip = AutoModel.from_config(transformers_config(model.image_encoder_config))
                siglip.save_pretrained(root / model.image_encoder)
            _write_language_model(root / model.llm, model.llm_config, seed, steps)
            give_rights(*root.rglob("*.safetensors"))
    finally:
        torch.set_num_threads(threads)


def _train(
    name: str,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    steps: int,
    loss_of_batch: Callable[[], Tensor],
    clip_norm: float = torch.inf,
) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in (bar := tqdm(range(steps), desc=f"train the {name}")):
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def _write_sam(folder: Path, model: ModelConfig, seed: int, steps: int) -> None:
    """SAM has seen a billion masks before stage 1 begins; this one learns for a minute to classify
    the patches of a scene. A ViT learns textures at once and shapes late."""
    sam, encoder = SamVisionModel(sam_config(model)), _random_encoder(model)
    head = nn.Sequential(nn.LayerNorm(model.seg_dim), nn.Linear(model.seg_dim, len(CLASSES) + 1))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, max(steps, 2), pct_start=0.05)
    number, count = SPLITS.index("sam"), min(700, 8 * steps)
    rngs = (np.random.default_rng([seed, number, index]) for index in range(count))
    drawn = [scenes.draw_scene(rng, most_things=8) for rng in tqdm(rngs, "draw sam", count)]
    pixels, labels = zip(*(_patches(scene, model) for scene in drawn), strict=True)
    weights = torch.ones(len(CLASSES) + 1)
    weights[: len(THING_IDS)] = 3.0  # things cover little
    rng = np.random.default_rng(seed)

    def loss_of_batch() -> Tensor:
        chosen = rng.integers(len(drawn), size=8)
        target = torch.stack([labels[index] for index in chosen])  # [B, h, w]
        logits = head(encoder(torch.stack([pixels[index] for index in chosen]))[-1])
        return nn.functional.cross_entropy(logits.flatten(0, 2), target.flatten(), weights)

    _train("segmentation encoder", optimizer, scheduler, steps, loss_of_batch, clip_norm=1.0)
    sam.vision_encoder.load_state_dict(encoder.state_dict())
    sam.save_pretrained(folder)


def sam_config(model: ModelConfig) -> SamVisionConfig:
    """The segmentation encoder's sizes as transformers has them."""
    return SamVisionConfig(
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


def _random_encoder(model: ModelConfig) -> nn.Module:
    """Layers keep the variance of their input, and the position embedding is a sine code (Beyer et
    al. 2022, "Better plain ViT baselines")."""
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


def _patches(scene: Scene, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """A scene as the encoder's pixels and the commonest class of its patches [h, w], void last."""
    transform = ResizeAndPad.fit(scene.segment_index.shape, model.seg_image_size)
    void = len(CLASSES)
    table = [void] + [void if s.is_crowd else CLASSES.index(s.category) for s in scene.segments]
    classes = torch.from_numpy(transform.map_to_canvas(np.array(table)[scene.segment_index], void))
    size = model.seg_patch_size
    votes = nn.functional.one_hot(classes, void + 1).unflatten(1, (-1, size))
    votes = votes.unflatten(0, (-1, size))  # [h, size, w, size, classes]
    return seg_pixels(Image.fromarray(scene.image), transform), votes.sum((1, 3)).argmax(-1)


def _language_model_texts(tokenizer, seed: int, num_scenes: int) -> list[str]:
    """Captions and dialogues of scenes that are in no split, facts and what the answers of riddles
    have to do with them, in the chat layout."""
    conversations = [[fact] for fact in FACTS]
    for riddle in RIDDLES.values():
        conversations += [[(question, riddle.explanation)] for question in riddle.questions]
    for drawing in draw_split(seed, "text", num_scenes):
        conversations.append([scenes.caption_turn(drawing.rng, drawing.scene)])
        conversations.append(scenes.dialogue(drawing.rng, drawing.scene))
    texts = []
    for turns in conversations:
        pairs = zip(itertools.cycle(("user", "assistant")), itertools.chain(*turns), strict=False)
        messages = [{"role": role, "content": content} for role, content in pairs]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    return texts


def _write_language_model(folder: Path, config: dict, seed: int, steps: int) -> None:
    tokenizer = build_tokenizer(config["vocab_size"])
    language_model = AutoModelForCausalLM.from_config(transformers_config(config))
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    language_model.generation_config.eos_token_id = ends
    texts = _language_model_texts(tokenizer, seed, num_scenes=min(400, 8 * steps))
    optimizer = torch.optim.AdamW(language_model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    rng = np.random.default_rng(seed)

    def loss_of_batch() -> Tensor:
        chosen = [texts[i] for i in rng.integers(len(texts), size=16)]
        batch = tokenizer(chosen, return_tensors="pt", padding=True)  # [B, N]
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        return language_model(**batch, labels=labels).loss

    _train("language model", optimizer, scheduler, steps, loss_of_batch)
    language_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
