"""Freezing a part, or a module in it: a learning rate of 0.

    python docs/forks/freeze.py

    python xsam/train.py --config toy --stage 1 \\
        --learning_rates '{"segmentor.encoder": 0, "segmentor.connector.model.0": 0, "": 0.001}'

A key of `learning_rates` is a path of module names. The longest one that a parameter lies under
counts, and "" is for all others. What is frozen has no gradient and no state in the optimizer.

lines touched: 1
"""

import json

import torch
from own_loop import CLASSES, report, train

from xsam.cli import parse
from xsam.model import Segmentor
from xsam.toy.preset import toy

# fork: begin
RATES = {"segmentor.encoder": 0.0, "segmentor.connector.model.0": 0.0, "": 1e-3}
# fork: end


if __name__ == "__main__":
    torch.manual_seed(0)
    config = toy().resolve(stages=(1,), learning_rates=RATES)
    flags = ["--config", "toy", "--stage", "1", "--learning_rates", json.dumps(RATES)]
    assert parse(flags)[1].stages[1] == config.stages[1]

    config = config.resolve(**CLASSES)
    segmentor = Segmentor(config)
    before = {name: parameter.clone() for name, parameter in segmentor.named_parameters()}
    report(segmentor, train(segmentor, config, num_steps=30))
    frozen = ("encoder.", "connector.model.0.")
    for name, parameter in segmentor.named_parameters():
        is_frozen = name.startswith(frozen)
        assert (parameter.grad is None) == is_frozen, name
        assert torch.equal(parameter, before[name]) == is_frozen, name
    print(f"no gradient, and not changed: {', '.join(frozen)}")
