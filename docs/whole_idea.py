"""The idea of X-SAM on one page: names in, <SEG> out, masks by query.

X-SAM is one model that talks about a picture and segments it. A language model reads the picture,
as visual tokens, and a request in which every name stands between <p> and </p>. It answers with a
sentence that holds the token <SEG>, whose state is added to the queries of a segmentation decoder.
The decoder makes a mask of each query. A class is the mean of the states of a name, so the cosine
between a query and a class says what a mask shows, and the classes are whatever the request names.

    picture ─┬─ image encoder ── tokens ─┬─► LLM ─┬─ states of <p>name</p> ─► classes ─────┐ cosine
             └─ seg. encoder ─┬─ tokens ─┘        └─ state of <SEG> ─► + queries           │
                              └─ features ───────────────────────────► decoder ─► queries ─┴─► masks

`python docs/whole_idea.py` makes drawings of coloured shapes, trains on them for about a minute on
a CPU, segments drawings that it has not seen, and shows some of them in whole_idea.png. Requests,
model, losses, training and answers are about a hundred lines of code; drawing and showing are the
rest. What leads where is as in X-SAM; all sizes are small, and there is one stage of training
instead of three. Headings and comments name the files of xsam that hold the real parts.
Legend: B drawings, T things, N words, C channels, K names, Q queries, P pixels of a mask.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw
from scipy.optimize import linear_sum_assignment
from torch import nn

# ---- Drawings: xsam/datasets/ --------------------------------------------------------------------

COLOURS = ["red", "green", "blue", "yellow"]
SHAPES = {
    "ring": lambda x, y: abs(x**2 + y**2 - 0.6) < 0.35,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.95),
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.8,
    "triangle": lambda x, y: (y < 0.8) & (2 * abs(x) < y + 1),
}
THINGS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


def draw(rng):
    """A drawing of four things, [48, 48, 3] in 0..255, their masks [4, 48, 48], and their names."""
    y, x = np.mgrid[:48, :48] / 48
    waves = np.sin(x * rng.uniform(-60, 60) + y * rng.uniform(-60, 60))
    drawing = rng.uniform(90, 170) + rng.uniform(-20, 20, 3) + 15 * waves[..., None]
    things, masks = [THINGS[i] for i in rng.integers(len(THINGS), size=4)], []
    for (colour, shape), quarter in zip(things, np.ndindex(2, 2), strict=True):
        row, column = np.array(quarter) / 2 + rng.uniform(0.21, 0.29, 2)
        radius = rng.uniform(0.15, 0.21)
        masks.append(SHAPES[shape]((x - column) / radius, (y - row) / radius))
        drawing[masks[-1]] = ImageColor.getrgb(colour) + rng.uniform(-25, 25, 3)
    return drawing, masks, things


# ---- Requests: xsam/prompts.py, xsam/data.py -----------------------------------------------------

ANSWER = "here it is : <SEG> ."
WORDS = ["<p>", "</p>", "segment", ",", "?", "any", "thing", *ANSWER.split(), *COLOURS, *SHAPES]


def choose_names(things, count, rng):
    """Names by colour, by shape or by both, of things that are there and of others, and for every
    thing the index of its name among them, -1 where it is not asked for."""
    kind = rng.integers(3)
    phrases = [(f"{c} {s}", f"{c} thing", f"any {s}")[kind] for c, s in things + THINGS]
    names = [*rng.permutation(phrases[:4])[: rng.integers(3)], *rng.permutation(phrases)]
    names = rng.permutation(list(dict.fromkeys(names))[:count]).tolist()
    return names, [names.index(phrase) if phrase in names else -1 for phrase in phrases[:4]]


def make_batch(size, count, rng):
    """Drawings [B, 3, 48, 48], masks [B, T, 48, 48], K names for each drawing, labels [B, T]."""
    drawings, masks, things = zip(*[draw(rng) for _ in range(size)], strict=True)
    names, labels = zip(*[choose_names(four, count, rng) for four in things], strict=True)
    drawings, masks = (torch.tensor(np.array(each)).float() for each in (drawings, masks))
    return drawings.permute(0, 3, 1, 2) / 127.5 - 1, masks, names, torch.tensor(labels)


def tokenize(names, answer=""):
    """Requests for K names each, and what there is of the answers: ids [B, N]."""
    phrases = [" , ".join(f"<p> {name} </p>" for name in each) for each in names]
    texts = [f"segment {each} ? {answer}" for each in phrases]
    return torch.tensor([[WORDS.index(word) for word in text.split()] for text in texts])


# ---- The model: xsam/model.py --------------------------------------------------------------------

DIM, HEADS = 64, 4


def conv(c_in, c_out, stride=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.GroupNorm(8, c_out), nn.GELU())


class XSAM(nn.Module):
    def __init__(self):
        super().__init__()
        # encoders.py: SigLIP2 to understand the picture, SAM to segment it
        self.image_encoder = nn.Conv2d(3, DIM, 12, stride=12)
        blocks = conv(3, 32, 2), conv(32, DIM, 2), conv(DIM, DIM), conv(DIM, DIM)
        self.seg_encoder = nn.Sequential(*blocks)
        # connector.py: into the language model, out of it, and from encoder to decoder
        self.seg_projector, self.llm_projector = nn.Conv2d(DIM, DIM, 2, 2), nn.Linear(DIM, DIM)
        self.connector = nn.Sequential(nn.Conv2d(DIM, 4 * 32, 1), nn.PixelShuffle(2))
        # llm.py: Phi-3, a causal language model
        self.words, self.positions = nn.Embedding(len(WORDS), DIM), nn.Embedding(128, DIM)
        sizes = dict(d_model=DIM, nhead=HEADS, dim_feedforward=3 * DIM, dropout=0, batch_first=True)
        block = nn.TransformerEncoderLayer(**sizes, norm_first=True)
        self.llm = nn.TransformerEncoder(block, 2, nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.next_word = nn.Linear(DIM, len(WORDS))
        # decoder.py: pixel decoder, masked-attention decoder and class head: Mask2Former
        self.pixel_decoder, self.mask_embedder = conv(32, 32), nn.Linear(DIM, 32)
        self.places, self.queries = nn.Embedding(144, DIM), nn.Embedding(8, DIM)
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(**sizes) for _ in range(2))
        self.background, self.scale = nn.Embedding(1, DIM), nn.Parameter(torch.tensor(2.66))

    def forward(self, drawings, ids):
        """Drawings [B, 3, 48, 48] and ids [B, N] to the logits of the next words [B, N, V] and, of
        every output of the decoder, class logits [B, Q, K + 1] and mask logits [B, Q, P]."""
        grid = self.seg_encoder(drawings)  # [B, C, 12, 12]
        # The language model reads visual tokens, then words.
        visual = self.image_encoder(drawings), self.seg_projector(grid)
        tokens = torch.cat([*(x.flatten(2).mT for x in visual), self.words(ids)], dim=1)
        tokens = tokens + self.positions.weight[: tokens.shape[1]]  # [B, 16 + 36 + N, C]
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        states = self.llm(tokens, causal)[:, -ids.shape[1] :]  # [B, N, C]
        next_words, states = self.next_word(states), self.llm_projector(states)
        # A class is the mean of the states from <p> to </p>; one more, the background, is learned.
        is_open, is_close, is_seg = (ids == WORDS.index(mark) for mark in ("<p>", "</p>", "<SEG>"))
        opened, closed = is_open.cumsum(1), is_close.cumsum(1)
        spans = F.one_hot(opened * ((opened > closed) | is_close))[..., 1:].float()  # [B, N, K]
        classes = spans.mT @ states / spans.sum(1)[..., None]  # [B, K, C]
        classes = torch.cat([classes, self.background.weight.expand(len(ids), -1, -1)], dim=1)
        # Queries, with the state of <SEG> added, attend to the picture where their last mask is.
        features = self.pixel_decoder(self.connector(grid))  # [B, 32, 24, 24]
        small = F.avg_pool2d(features.detach(), 2).flatten(2)  # [B, 32, 144]
        memory = grid.flatten(2).mT + self.places.weight  # [B, 144, C]
        x = self.queries.weight + is_seg.float()[:, None] @ states  # [B, Q, C]
        outputs = []
        for layer in [*self.layers, None]:
            cosine = F.normalize(x, dim=-1) @ F.normalize(classes, dim=-1).mT
            masks = self.mask_embedder(x)  # [B, Q, 32]
            outputs.append((self.scale.exp() * cosine, masks @ features.flatten(2)))
            if layer:
                hidden = masks @ small < 0
                hidden &= ~hidden.all(-1, keepdim=True)  # with an empty mask, everywhere
                x = layer(x, memory, memory_mask=hidden.repeat_interleave(HEADS, 0))
        return next_words, outputs


# ---- Losses: xsam/losses.py ----------------------------------------------------------------------


def mask_loss(logits, truth):
    """Cross-entropy and dice over the pixels of masks, [..., P] to [...], weighted as in X-SAM."""
    mask = logits.sigmoid()
    dice = 1 - (2 * (mask * truth).sum(-1) + 1) / ((mask + truth).sum(-1) + 1)
    return 5 * (F.softplus(logits) - logits * truth).mean(-1) + 5 * dice


def segmentation_loss(class_logits, mask_logits, labels, masks):
    """Hungarian matching finds for the things that are asked for the queries that fit best; all
    other queries are background. labels [B, T], -1 where not asked for, and masks [B, T, P]."""
    asked, K = labels >= 0, class_logits.shape[2] - 1  # class K is the background
    with torch.no_grad():
        scores = class_logits.softmax(-1).mT[torch.arange(len(labels))[:, None], labels]
        costs = mask_loss(mask_logits[:, None], masks[:, :, None]) - 2 * scores  # [B, T, Q]
        costs = costs * asked[..., None]  # what is not asked for takes what is left
        matched = [linear_sum_assignment(cost)[1] for cost in costs]
        matched = torch.tensor(np.array(matched))  # [B, T]
    wanted = torch.full(class_logits.shape[:2], K).scatter(1, matched, labels.where(asked, K))
    class_loss = F.cross_entropy(class_logits.mT, wanted, torch.tensor([1.0] * K + [0.1]))
    logits = mask_logits.gather(1, matched[..., None].expand_as(masks))  # [B, T, P]
    return 2 * class_loss + mask_loss(logits[asked], masks[asked]).mean()


# ---- Training and answers: xsam/train.py, xsam/inference.py --------------------------------------


def train(model, steps, rng):
    """Every step has new drawings, and one to four names for each."""
    optimizer = torch.optim.AdamW(model.parameters(), 1.5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps)
    for step in range(1, steps + 1):
        drawings, masks, names, labels = make_batch(32, rng.choice([1, 2, 3, 4, 4, 4, 4]), rng)
        masks, ids = F.avg_pool2d(masks, 2).flatten(2), tokenize(names, ANSWER)
        next_words, outputs = model(drawings, ids)
        loss = sum(segmentation_loss(*each, labels, masks) for each in outputs) / len(outputs)
        loss += F.cross_entropy(next_words[:, -7:-1].mT, ids[:, -6:])  # the answer's six words
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step in (1, steps):
            print(f"step {step} of {steps}: loss {loss:.2f}", flush=True)


def join(masks, labels, count):
    """Masks [B, M, 48, 48] of equal labels [B, M] become one: bool [B, K, 48, 48]."""
    return torch.stack([(masks * (labels == k)[..., None, None]).any(1) for k in range(count)], 1)


@torch.no_grad()
def answer(model, drawings, names):
    """Answers as ids [B, 6], and a mask for every name, bool [B, K, 48, 48]."""
    ids = tokenize(names)
    for _ in ANSWER.split():
        ids = torch.cat([ids, model(drawings, ids)[0][:, -1:].argmax(-1)], dim=1)
    class_logits, mask_logits = model(drawings, ids)[1][-1]
    masks = F.interpolate(mask_logits.unflatten(2, (24, 24)), scale_factor=2, mode="bilinear") > 0
    return ids[:, -6:], join(masks, class_logits.argmax(-1), len(names[0]))


# ---- What is shown -------------------------------------------------------------------------------


def show(drawings, names, found, path):
    """Draws every drawing, beside it the masks that were found, and the names in their colours."""
    sheet = Image.new("RGB", (1090, 10 + len(drawings) // 3 * 130), "white")
    for i, drawing in enumerate(drawings):
        left, top = 10 + i % 3 * 360, 10 + i // 3 * 130
        pixels = (drawing.permute(1, 2, 0) * 127.5 + 127.5).clamp(0, 255).byte().numpy()
        picture = Image.fromarray(pixels).resize((120, 120))
        sheet.paste(picture, (left, top))
        sheet.paste(picture.convert("L").point(lambda x: 150 + x // 3), (left + 124, top))
        for k, (name, mask) in enumerate(zip(names[i], found[i].numpy(), strict=True)):
            ink = ["deeppink", "darkcyan", "darkorange"][k] if mask.any() else "silver"
            mask = Image.fromarray(mask).convert("L").resize((120, 120))
            sheet.paste(ink, (left + 124, top), mask)
            ImageDraw.Draw(sheet).text((left + 252, top + 14 + 26 * k), name, ink, font_size=15)
    sheet.quantize(128).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="whole_idea.png")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, rng = XSAM(), np.random.default_rng(args.seed)
    train(model, args.steps, rng)
    drawings, masks, names, labels = make_batch(200, 3, rng)  # not those of training
    words, found = answer(model, drawings, names)
    truth = join(masks, labels, 3)
    overlaps, unions = (truth & found).sum((2, 3)), (truth | found).sum((2, 3))
    show(drawings[:12], names, found, args.out)
    print("answer:", *(WORDS[i] for i in words[0]))
    # Of the names that are there or were found: a mask of what is not there has an IoU of 0.
    print(f"mean IoU in new drawings: {(overlaps / unions)[unions > 0].mean():.1%}")
