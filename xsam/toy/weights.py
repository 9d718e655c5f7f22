"""The toy world's weights and its words.

Small starting weights stand in for the three pretrained models, as the datasets of `world.py` stand
in for the public ones, so that all stages run on a laptop without a download.

Legend: B batch, N tokens, h w patches of the image's height and width.
"""

import functools
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

from xsam.config import ModelConfig
from xsam.data import ResizeAndPad, image_pixels, seg_pixels
from xsam.decoder import sine_positions
from xsam.encoders import transformers_config
from xsam.files import complete, give_rights
from xsam.llm import IGNORE_LABEL, LanguageModel, render_conversation, tokenize
from xsam.model import build_seg_encoder
from xsam.prompts import clean_name, read_phrasings
from xsam.toy import scenes, world
from xsam.toy.scenes import CLASSES, FACTS, RIDDLES, THING_IDS, Scene, plural

# ---- words ---------------------------------------------------------------------------------------

CHAT_TOKENS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")

CHAT_TEMPLATE = (  # Phi-3's without its line breaks
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

SPARE_TOKENS = 8  # rows of the embedding left for the tokens that the model adds


def vocabulary() -> list[str]:
    """Every word that the world and its questions can say, also lower-cased; sorted."""
    phrasings = read_phrasings("").values()
    prompts = [text for kinds in phrasings for texts in kinds.values() for text in texts]
    dialogues = [text for pair in (*scenes.DIALOGUE.values(), *FACTS) for text in pair]
    riddles = [text for r in RIDDLES.values() for text in (*r.questions, *r.phrases, r.explanation)]
    names = [clean_name(name) for name in CLASSES] + [plural(name) for name in THING_IDS]
    looks = [*scenes.COLORS, *scenes.RADII, *scenes.NUMBERS]
    texts = [*prompts, *dialogues, *riddles, *names, *looks, *world.ADE_NAMES, *scenes.EXPRESSIONS]
    texts += [text for text, _ in scenes.GROUPS]
    texts += [*scenes.CHECKS.values(), *scenes.CAPTION_REQUESTS]
    # Options of benchmarks, and what is added to their questions.
    texts += [world.HINT, world.ONE_WORD, world.OF_EACH, world.YES_OR_NO]
    texts += ["What shapes are there? A. B. C. D.", "a an and in is it many no of on the this"]
    texts += ["yes Yes No , . : ? !"]
    plain = re.sub(r"\{\w+\}|<[^>]+>", " ", " ".join(texts))  # without fields and tokens
    return sorted({*re.findall(r"\w+|[^\w\s]", plain + plain.lower())})


def build_tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (Radford et al. 2019) in the layout of Phi-3. Every word of the
    world is one token, every other text some; none is unknown. Raises ValueError if the words do
    not fit."""
    words, tokenizer = vocabulary(), Tokenizer(models.BPE())
    # A word is the same token after a space, at the start of a line and after a special token.
    lines = pre_tokenizers.Split("\n", behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, letters])
    spaces = [
        decoders.Replace(" \n ", "\n"),
        decoders.Replace(" \n", "\n"),
        decoders.Replace("> .", ">."),  # after a special token, where every word has its space
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), *spaces])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - SPARE_TOKENS,
        special_tokens=list(CHAT_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*words, "\n"], trainer)
    if lost := [word for word in words if len(tokenizer.encode(word).ids) > 1]:
        raise ValueError(f"{len(words)} toy words, {len(lost)} do not fit in {vocab_size} tokens")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(CHAT_TOKENS[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


# ---- weights -------------------------------------------------------------------------------------


def write_weights(
    weights: Path, model: ModelConfig, seed: int = 0, steps: int = 150, num_workers: int = 0
) -> None:
    """Writes what stands in for the pretrained models under `weights`, which must not exist: a SAM
    encoder (or a random Swin), an image encoder and a language model, trained for a few hundred
    steps in proportion to `steps`. With `num_workers` processes they are made side by side; the
    bytes are the same. Raises FileExistsError."""
    parts = [_write_sam, _write_language_model, _write_image_encoder]
    parts = parts[: 2 + (model.image_encoder != "none")]
    with complete(weights) as (root,):
        root.mkdir()
        write = functools.partial(_write_part, root=root, model=model, seed=seed, steps=steps)
        if num_workers:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(num_workers, mp_context=spawn) as pool:
                list(pool.map(write, parts))  # raises what one of them raised
        else:
            list(map(write, parts))
        give_rights(*root.rglob("*.safetensors"))


def _write_part(part: Callable, root: Path, model: ModelConfig, seed: int, steps: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, so that the bytes repeat
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            part(root, model, seed, steps)
    finally:
        torch.set_num_threads(threads)


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are all brought near one before a step (Jordan et al. 2024).

    With it a small transformer learns to look words up in a quarter of AdamW's steps. torch.optim's
    own, since 2.9, works in bfloat16, for which a CPU takes twenty times as long.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float = 0.05):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        """Moves every matrix by its gradient, without a closure."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state, (rows, columns) = self.state[matrix], matrix.shape
                momentum = state.setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 0.05)
                update = near_orthogonal(matrix.grad.lerp(momentum, 0.95))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(update, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def near_orthogonal(matrix: Tensor) -> Tensor:
    """The matrix [M, N] with its singular values moved to 0.7 ... 1.2, all but those near zero, by
    five steps of a polynomial (Newton and Schulz)."""
    x = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x if len(matrix) <= matrix.shape[1] else x.T


def _train(name: str, module: nn.Module, steps: int, loss_of_batch: Callable[[], Tensor]) -> None:
    """Muon for the linear maps of layers, AdamW for all else, both for one cycle."""
    matrices = [
        part.weight
        for path, part in module.named_modules()
        if isinstance(part, nn.Linear) and "layers." in path
    ]
    others = [p for p in module.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [Muon(matrices, 0.02), torch.optim.AdamW(others, 3e-3, weight_decay=0.05)]
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(
            each, each.defaults["lr"], max(steps, 2), pct_start=0.1, cycle_momentum=False
        )
        for each in optimizers
    ]
    for _ in (bar := tqdm(range(steps), desc=f"train the {name}")):
        loss = loss_of_batch()
        module.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for each in (*optimizers, *schedulers):
            each.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def _write_sam(root: Path, model: ModelConfig, seed: int, steps: int) -> None:
    """SAM has seen a billion masks before stage 1 begins; this one learns for two minutes to
    classify the patches of a scene. A ViT learns textures at once and shapes late."""
    if model.seg_backbone_config:
        build_seg_encoder(model).model.save_pretrained(root / model.seg_encoder)
        return
    steps = 4 * steps
    sam, encoder = transformers.SamVisionModel(sam_config(model)), _random_encoder(model)
    head = nn.Sequential(nn.LayerNorm(model.seg_dim), nn.Linear(model.seg_dim, len(CLASSES) + 1))
    drawn = _draw(seed, "sam", min(1400, 8 * steps), most_things=5)
    columns = zip(*(_patches(scene, model) for scene in drawn), strict=True)
    pixels, labels = map(torch.stack, columns)
    weights = torch.ones(len(CLASSES) + 1)
    weights[: len(THING_IDS)] = 3.0  # things cover little
    rng = np.random.default_rng(seed)

    def loss_of_batch() -> Tensor:
        chosen = rng.integers(len(drawn), size=16)
        x, target = pixels[chosen], labels[chosen]
        if rng.random() < 0.5:
            x, target = x.flip(-1), target.flip(-1)
        return F.cross_entropy(head(encoder(x)[-1]).flatten(0, 2), target.flatten(), weights)

    _train("segmentation encoder", nn.ModuleList([encoder, head]), steps, loss_of_batch)
    sam.vision_encoder.load_state_dict(encoder.state_dict())
    sam.save_pretrained(root / model.seg_encoder)


def _draw(seed: int, split: str, count: int, **options) -> list[Scene]:
    entropy = ([seed, world.SPLITS.index(split), index] for index in range(count))
    rngs = map(np.random.default_rng, entropy)
    return [scenes.draw_scene(rng, **options) for rng in tqdm(rngs, f"draw {split}", count)]


def sam_config(model: ModelConfig) -> transformers.SamVisionConfig:
    """The segmentation encoder's sizes as transformers has them."""
    return transformers.SamVisionConfig(
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
    """A scene as the encoder's pixels and the class of each patch's commonest segment [h, w], void
    last."""
    transform = ResizeAndPad.fit(scene.segment_index.shape, model.seg_image_size)
    numbers = torch.from_numpy(transform.map_to_canvas(scene.segment_index).astype(np.int64))
    votes = F.one_hot(numbers, len(scene.segments) + 1).float()  # [S, S, segments]
    void = len(CLASSES)
    of_patch = F.avg_pool2d(votes.permute(2, 0, 1), model.seg_patch_size).argmax(0)
    table = [void] + [void if s.is_crowd else CLASSES.index(s.category) for s in scene.segments]
    return seg_pixels(Image.fromarray(scene.image), transform), torch.tensor(table)[of_patch]


def _write_image_encoder(root: Path, model: ModelConfig, seed: int, steps: int) -> None:
    """SigLIP has learned from ten billion images which caption is whose; this one learns it of
    pictures of one or two things, with its loss (Zhai et al. 2023)."""
    encoder = transformers.AutoModel.from_config(transformers_config(model.image_encoder_config))
    tokenizer = build_tokenizer(model.llm_config["vocab_size"])
    dim, length = encoder.config.hidden_size, 40
    text_config = transformers.SiglipTextConfig(
        vocab_size=len(tokenizer), hidden_size=dim, projection_size=dim, intermediate_size=2 * dim,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=length,
    )  # fmt: skip
    reader = transformers.SiglipTextModel(text_config)
    scale_and_bias = nn.Parameter(torch.tensor([2.3, -6.0]))
    both = nn.ModuleList([encoder, reader])
    both.register_parameter("scale_and_bias", scale_and_bias)
    steps = 2 * steps
    drawn = _draw(seed, "pairs", min(1400, 8 * steps), least_things=1, most_things=2)
    how = encoder.config.image_size, model.image_mean, model.image_std, model.image_resample
    pictures = [Image.fromarray(scene.image) for scene in drawn]
    pixels = torch.stack([image_pixels(picture, *how) for picture in pictures])
    captions = [scenes.caption_phrases(scene)[0] for scene in drawn]
    options = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids = tokenizer(captions, **options).input_ids
    rng = np.random.default_rng(seed)

    def loss_of_batch() -> Tensor:
        chosen = rng.integers(len(drawn), size=64)
        images = F.normalize(encoder(pixel_values=pixels[chosen]).pooler_output, dim=-1)
        texts = F.normalize(reader(input_ids=ids[chosen]).pooler_output, dim=-1)
        scale, bias = scale_and_bias
        logits = scale.exp() * images @ texts.T + bias
        is_own = torch.from_numpy(chosen[:, None] == chosen)
        return -F.logsigmoid(torch.where(is_own, logits, -logits)).sum(1).mean()

    _train("image encoder", both, steps, loss_of_batch)
    encoder.save_pretrained(root / model.image_encoder)


def _conversation(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Turns of text alone: a scene told in words, then questions about it; now and then facts, or
    what the answer of a riddle has to do with it."""
    if rng.random() < 0.05:
        riddles = [(q, riddle.explanation) for riddle in RIDDLES.values() for q in riddle.questions]
        known = [*FACTS, *riddles]
        return [known[index] for index in rng.integers(len(known), size=4)]
    scene = scenes.imagine_scene(rng)
    (question, answer), *others = world.chat_turns(rng, scene)
    return [(f"{scenes.caption_phrases(scene)[0]}.\n{question}", answer), *others]


def _write_language_model(root: Path, model: ModelConfig, seed: int, steps: int) -> None:
    folder, config = root / model.llm, model.llm_config
    tokenizer = build_tokenizer(config["vocab_size"])
    language_model = LanguageModel(config)
    table, decoder = language_model.model.get_input_embeddings(), language_model.model.get_decoder()
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    language_model.model.generation_config.eos_token_id = ends
    for layer in decoder.layers:
        # A word attends first of all to the same word (Trockman and Kolter 2023).
        queries, keys, _ = layer.self_attn.qkv_proj.weight.data.chunk(3)
        queries.copy_(keys)
    steps = 5 * steps // 3  # with 4 // 3 it does not learn to compare
    rng = np.random.default_rng([seed, world.SPLITS.index("text")])
    batches: list[list[tuple[Tensor, Tensor]]] = []  # of ids and labels

    def draw_batches(count: int = 8, size: int = 32) -> None:
        """Conversations of a batch are of about one length."""
        pieces = [render_conversation(tokenizer, _conversation(rng)) for _ in range(count * size)]
        rows = [tuple(map(torch.tensor, tokenize(tokenizer, each, 0))) for each in pieces]
        rows.sort(key=lambda row: len(row[0]))
        batches.extend(rows[start : start + size] for start in range(0, len(rows), size))
        rng.shuffle(batches)

    def loss_of_batch() -> Tensor:
        if not batches:
            draw_batches()
        rows = batches.pop()
        ids, labels = (
            nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=IGNORE_LABEL)
            for column in zip(*rows, strict=True)
        )
        # Padding is at the end, where no token that counts looks.
        states = decoder(inputs_embeds=table(ids.clamp(min=0)), use_cache=False).last_hidden_state
        return language_model.token_loss(states, labels) / (labels >= 0).sum()

    _train("language model", language_model, steps, loss_of_batch)
    language_model.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
