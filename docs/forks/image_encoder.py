"""Another image encoder: a vision tower of transformers, by the name of its folder.

    python docs/forks/image_encoder.py

    python xsam/train.py --stage 3 --image_encoder dinov2-large ...

Architecture and normalisation are read from the folder's config.json and preprocessor_config.json.
The tokens are the hidden state before the last layer, one for each patch (`encoders.ImageEncoder`).
What has to be said is that the model_type is one of an image encoder and, where the names in the
folder are not those of transformers' modules, as with DINOv2, how they are changed.

lines touched: 5
"""

import tempfile
from pathlib import Path

import torch
from own_loop import report, train
from transformers import Dinov2Config, Dinov2Model

from xsam import weights
from xsam.encoders import ImageEncoder
from xsam.model import XSAM
from xsam.toy.preset import toy
from xsam.toy.weights import build_tokenizer

# fork: begin
weights.FOLDERS["image_encoder"]["dinov2"] = ""
weights.NAMES += (  # from those on disk to those of the modules
    (r"(\.layer\.\d+\.attention)\.attention\.([qkv])\w+\.", r"\1.\2_proj."),
    (r"(\.layer\.\d+\.attention)\.output\.dense\.", r"\1.o_proj."),
)
# fork: end


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2)
    dino = Dinov2Model(Dinov2Config(**sizes, patch_size=16, image_size=96)).eval()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder, "dinov2-tiny")
        dino.save_pretrained(folder)  # stands in for public weights
        config = toy().resolve(image_encoder="dinov2-tiny")
        config = weights.complete_architecture(config, "image_encoder", folder)
        image_encoder = ImageEncoder(config.model.image_encoder_config).eval()
        print(weights.load_folder(image_encoder, "image_encoder", folder))
    pixels = torch.randn(1, 3, 96, 96)
    expected = dino(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(image_encoder(pixels), expected)
    model = XSAM(config, build_tokenizer(vocab_size=768), image_encoder)
    report(model, train(model, model.config, num_steps=30))
