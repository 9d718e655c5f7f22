"""Parts in another package: a plain segmenter of SAM's encoder, connector, decoders and losses.

    python docs/forks/lift.py

Four files are copied into an empty folder. In their imports `xsam` becomes the new package's name:
that is one line, as connector.py takes its LayerNorm from encoders.py. They need torch and scipy.
All else, the segmenter and its training without text, data sets and configuration, is written anew.

lines touched: 35
"""
# ruff: noqa: E402

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

home = tempfile.TemporaryDirectory()
lifted = Path(home.name, "lifted")
lifted.mkdir()
for name in ("encoders.py", "connector.py", "decoder.py", "losses.py"):
    text = (Path(__file__).resolve().parents[2] / "xsam" / name).read_text(encoding="utf-8")
    (lifted / name).write_text(text.replace("from xsam.", "from lifted."), encoding="utf-8")
sys.path.insert(0, home.name)

from lifted.connector import SegmentationConnector
from lifted.decoder import DecoderOutput, LinearClassHead, MaskedAttentionDecoder, PixelDecoder
from lifted.encoders import SamEncoder
from lifted.losses import Normalisers, Targets, count_targets, segmentation_losses

SIZE, CLASSES, QUERIES = 96, 2, 10

# fork: begin
WEIGHTS = dict(class_weight=2.0, mask_weight=5.0, dice_weight=5.0, background_weight=0.1)
POINTS = dict(num_points=512, oversample_ratio=3.0, importance_ratio=0.75, ignore_unlabelled=True)
CONFIG = SimpleNamespace(**WEIGHTS, **POINTS)


class Segmenter(nn.Module):
    """Masks of a fixed list of classes, as X-SAM's stage 1."""

    def __init__(self, dim: int = 64):
        super().__init__()
        self.encoder = SamEncoder(SIZE, 8, dim, 4, 2, 2 * dim, 6, (1, 3), dim)
        self.connector = SegmentationConnector("conv", dim, dim, (2.0, 1.0, 0.5), (2, 3, 4))
        self.pixel_decoder = PixelDecoder(self.connector.dims, dim, 1, 4, 2, 2 * dim)
        self.decoder = MaskedAttentionDecoder(dim, 3, 4, 2 * dim, QUERIES, num_levels=3)
        self.class_head = LinearClassHead(dim, CLASSES)

    def forward(self, pixels: Tensor) -> DecoderOutput:
        """Pixels [B, 3, S, S]."""
        mask_features, levels = self.pixel_decoder(self.connector(self.encoder(pixels)))
        queries, mask_embeddings = self.decoder(mask_features, levels)
        image_index = torch.arange(len(pixels), device=pixels.device)
        return DecoderOutput(self.class_head(queries), mask_embeddings, mask_features, image_index)


def train(model: Segmenter, rng: np.random.Generator, num_steps: int) -> list[float]:
    """Trains with batches of four; the loss of every step."""
    optimizer, history = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(num_steps):
        pixels, masks = draw_images(rng, 4)
        targets = [Targets(each, torch.arange(CLASSES)) for each in masks]
        generators = [torch.Generator().manual_seed(int(rng.integers(2**62))) for _ in targets]
        sums = count_targets([len(each.labels) for each in targets], QUERIES, CONFIG)
        divisors = Normalisers(**sums, tokens=1)
        parts = segmentation_losses(model(pixels), targets, generators, divisors, CONFIG)
        loss = sum(getattr(CONFIG, f"{name}_weight") * part for name, part in parts.items())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append(loss.item())
    return history


# fork: end


def draw_images(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Images [B, 3, S, S] of a red circle and a blue square, and their masks, bool [B, 2, S, S]."""
    y, x = np.mgrid[:SIZE, :SIZE]
    masks = []
    for _ in range(count):
        circle = np.hypot(x - rng.integers(16, 32), y - rng.integers(16, 80)) < 14
        square = np.maximum(abs(x - rng.integers(64, 80)), abs(y - rng.integers(16, 80))) < 14
        masks.append(np.stack([circle, square]))
    masks = torch.from_numpy(np.stack(masks))
    colours = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])
    return torch.einsum("bthw,tc->bchw", masks.float(), colours), masks


if __name__ == "__main__":
    torch.manual_seed(0)
    model, rng = Segmenter(), np.random.default_rng(0)
    history = train(model, rng, num_steps=30)
    print(f"step 1: loss {history[0]:.2f}; step {len(history)}: loss {history[-1]:.2f}")
    pixels, masks = draw_images(rng, 1)
    with torch.no_grad():
        output = model.eval()(pixels)
    queries = output.class_logits[-1, 0].softmax(-1)[:, :CLASSES].argmax(0)  # the best of a class
    found = nn.functional.interpolate(output.mask_logits(), SIZE, mode="bilinear")[0, queries] > 0
    for name, mask, own in zip(("circle", "square"), found, masks[0], strict=True):
        iou = ((mask & own).sum() / (mask | own).sum()).item()
        print(f"IoU of the {name} in a new drawing: {iou:.2f}")
        assert iou > 0.5
    others = [name for name in sys.modules if name.partition(".")[0] in ("xsam", "transformers")]
    print(f"modules of xsam and transformers that were imported: {len(others)}")
    assert not others
