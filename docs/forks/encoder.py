"""Another segmentation encoder: DINOv2 of transformers in place of SAM's ViT.

    python docs/forks/encoder.py

An encoder gives its hidden states as maps [B, h, w, C], the patch embedding first. The connector
makes a pyramid of three of them, and the language model is shown the last but one. In a fork the
class goes into encoders.py, and `build_seg_encoder` in model.py returns a DinoEncoder where it
returns a SamEncoder. The rows in config.py and weights.py are for the commands:
`--seg_encoder dinov2-tiny` then reads the folder weights/dinov2-tiny, strictly.

lines touched: 21
"""

import tempfile
from pathlib import Path

import torch
from own_loop import CLASSES, report, train
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from xsam import config, model, weights
from xsam.toy.preset import toy
from xsam.train import pretrained_model


# fork: begin
class DinoEncoder(nn.Module):
    """DINOv2 (Oquab et al. 2023); the arguments are SamEncoder's."""

    def __init__(self, patch_size: int, dim: int, depth: int, num_heads: int, mlp_dim: int, **_):
        super().__init__()
        sizes = dict(hidden_size=dim, num_hidden_layers=depth, num_attention_heads=num_heads)
        sizes |= dict(mlp_ratio=mlp_dim // dim, patch_size=patch_size, image_size=518)
        self.model = Dinov2Model(Dinov2Config(**sizes))
        self.model.layernorm = nn.Identity()  # nothing reads what it would normalise

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, S, S] normalised pixels to depth+1 hidden states [B, h, w, C]."""
        side = pixels.shape[-1] // self.model.config.patch_size
        tokens = self.model(pixels, output_hidden_states=True).hidden_states  # [B, 1 + h·w, C]
        return [x[:, 1:].unflatten(1, (side, side)) for x in tokens]


model.SamEncoder = DinoEncoder  # model.py: build_seg_encoder
sizes = dict(seg_dim=64, seg_depth=4, seg_heads=2, seg_mlp_dim=128, connector_layers=(2, 3, 4))
config.ARCHITECTURES["seg_encoder"]["dinov2-tiny"] = dict(seg_patch_size=8, **sizes)
weights.FOLDERS["seg_encoder"]["dinov2"] = ""
weights.NAMES += (  # from those on disk to those of the modules
    (r"(\.layer\.\d+\.attention)\.attention\.([qkv])\w+\.", r"\1.\2_proj."),
    (r"(\.layer\.\d+\.attention)\.output\.dense\.", r"\1.o_proj."),
)
# fork: end


if __name__ == "__main__":
    torch.manual_seed(0)
    run = toy().resolve(seg_encoder="dinov2-tiny", **CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        dino = Dinov2Model(DinoEncoder(8, 64, 4, 2, 128).model.config).eval()
        dino.save_pretrained(Path(folder, "dinov2-tiny"))  # stands in for public weights
        segmentor = pretrained_model(1, run, Path(folder))
    segmentor.eval()
    pixels = torch.randn(1, 3, 96, 96)
    expected = dino(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    assert torch.equal(segmentor.encoder(pixels)[-1].flatten(1, 2), expected)
    report(segmentor, train(segmentor, run, num_steps=30))
