"""Another loss: the focal loss of masks (Lin et al. 2017) beside cross-entropy and dice.

    python docs/forks/loss.py

A loss of masks reads the values of matched pairs at points. In a fork the function and its row go
into losses.py, and its weight is a field of LossConfig in config.py, so also a flag,
`--focal_weight`. A row called "mask" takes the place of the cross-entropy and needs no field.

lines touched: 7
"""

import dataclasses

import torch
import torch.nn.functional as F
from own_loop import CLASSES, report, train
from torch import Tensor

from xsam.config import LossConfig
from xsam.losses import MASK_LOSSES
from xsam.model import Segmentor
from xsam.toy.preset import toy


# fork: begin
def focal(mask_logits: Tensor, target_values: Tensor, valid: Tensor) -> Tensor:
    """Focal loss [N] of point values [N, P] where `valid` [N, P] is one."""
    losses = F.binary_cross_entropy_with_logits(mask_logits, target_values, reduction="none")
    losses = losses * (mask_logits.sigmoid() - target_values).abs() ** 2
    return (losses * valid).sum(-1) / valid.sum(-1).clamp(min=1)


MASK_LOSSES["focal"] = focal
# fork: end


@dataclasses.dataclass(frozen=True)
class MyLossConfig(LossConfig):
    # fork: begin
    focal_weight: float = 20.0
    # fork: end


if __name__ == "__main__":
    torch.manual_seed(0)
    config = toy().resolve(**CLASSES)
    segmentor = Segmentor(config)
    config = dataclasses.replace(config, loss=MyLossConfig(**vars(config.loss)))
    report(segmentor, history := train(segmentor, config, num_steps=30))
    assert history[-1]["focal"] < history[0]["focal"] / 2
