"""A training loop of one's own around the parts, without train.py.

    python docs/forks/own_loop.py

Samples come from code of one's own; Processor, model, losses and learning rates are those of xsam,
the optimizer is torch's. No file of xsam changes: the loop is all that is written. The other
examples train with it.

lines touched: 37
"""

import numpy as np
import torch
from PIL import Image

from xsam.config import Config
from xsam.data import Processor, Sample
from xsam.inference import predict
from xsam.losses import Normalisers, Objective, count_targets
from xsam.model import XSAM, Segmentor
from xsam.optimizer import freeze, parameter_groups
from xsam.prompts import Phrased
from xsam.toy.preset import toy
from xsam.toy.weights import build_tokenizer

NAMES = ["circle", "square"]
CLASSES = {"num_classes": 2, "categories": [{"name": name, "is_thing": True} for name in NAMES]}


# fork: begin
def draw_sample(rng: np.random.Generator) -> Sample:
    """A red circle and a blue square on grey, 96 pixels wide, and their masks."""
    y, x = np.mgrid[:96, :96]
    circle = np.hypot(x - rng.integers(16, 32), y - rng.integers(16, 80)) < 14
    square = np.maximum(abs(x - rng.integers(64, 80)), abs(y - rng.integers(16, 80))) < 14
    pixels = np.full((96, 96, 3), 128, np.uint8)
    pixels[circle], pixels[square] = (222, 38, 38), (38, 84, 226)
    return Sample(
        sample_id="drawn",
        task="generic",
        image=Image.fromarray(pixels),
        turns=[(Phrased("Please segment {phrases}.", NAMES), "Sure, <SEG>.")],
        masks=np.stack([circle, square]),  # bool [T, H, W]
        labels=np.array([0, 1]),  # [T], of NAMES
        names=NAMES,
    )


def train(model: Segmentor | XSAM, config: Config, num_steps: int) -> list[dict[str, float]]:
    """Trains with batches of four drawn samples; the weighted losses of every step."""
    stage, device = config.stages[model.stage], next(model.parameters()).device
    processor, objective = Processor(config, model.tokenizer), Objective(model.train(), config)
    freeze(model, stage, model.prefix)
    optimizer = torch.optim.AdamW(parameter_groups(model, stage, model.prefix))
    rng, history = np.random.default_rng(0), []
    for _ in range(num_steps):
        samples = [draw_sample(rng) for _ in range(4)]
        encoded = [processor.encode(each, run_seed=int(rng.integers(2**62))) for each in samples]
        batch = processor.collate(encoded).to(device)
        num_targets = [len(targets.labels) for targets in batch.targets]
        sums = count_targets(num_targets, config.model.num_queries, config.loss)
        num_tokens = 1 if batch.labels is None else int((batch.labels >= 0).sum())
        losses = objective(batch, Normalisers(**sums, tokens=num_tokens))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip_norm)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    return history


# fork: end


def report(model: Segmentor | XSAM, history: list[dict[str, float]]) -> None:
    """Prints the first and the last losses, and how well the model segments a new drawing. Raises
    AssertionError where it has not learned to."""
    for step, losses in ((1, history[0]), (len(history), history[-1])):
        parts = ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items())
        print(f"step {step}: loss {sum(losses.values()):.2f} ({parts})")
    sample = draw_sample(np.random.default_rng(1))
    result = predict(model, sample.image, "panoptic", things=NAMES)
    for name, mask in zip(NAMES, sample.masks, strict=True):
        found = [m for m, label in zip(result.masks, result.labels, strict=True) if label == name]
        iou = max(((mask & m).sum() / (mask | m).sum() for m in found), default=0.0)
        print(f"IoU of the {name} in a new drawing: {iou:.2f}")
        assert iou > 0.5


if __name__ == "__main__":
    torch.manual_seed(0)
    model = XSAM(toy(), build_tokenizer(vocab_size=768))
    report(model, train(model, model.config, num_steps=30))
