"""The training command with a fault in it.

Faults are a JSON object before the flags of xsam/train.py, {} for none:

    torchrun --nproc_per_node 2 tests/faulty_train.py '{"nan": "loss", "calls": [3], "rank": 1}' \
        --config toy --stage 1 --out runs/faulty

`nan` is what is not a number of the micro-batches `calls` (counted by each process) of `rank`: the
"loss", or with a loss that is finite the "gradient". `beat` and `lost` are seconds of
distributed.heartbeat. `hash` writes OUT/weights_RANK, a hash of each rank's weights at the end.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

from xsam import cli, distributed, train


def inject_nan(kind: str, calls: list[int], rank: int) -> None:
    """Spoils the micro-batches `calls` of `rank` and says which samples these are."""
    forward, count = train.Objective.forward, iter(range(10**9))

    def faulty(self, batch, normalisers):
        losses = forward(self, batch, normalisers)
        if batch is None or next(count) not in calls or distributed.rank() != rank:
            return losses
        name = list(losses)[-1]
        if kind == "loss":  # its gradient stays finite
            losses[name] = losses[name] + math.nan
        else:
            losses[name].register_hook(lambda gradient: gradient * math.nan)
        print(f"spoiled: {', '.join(sample.sample_id for sample in batch.samples)}", flush=True)
        return losses

    train.Objective.forward = faulty


def write_hash(out: Path) -> None:
    """Lets every rank write a hash of the weights that it has at a stage's end."""
    train_stage = train.train_stage

    def hashed(number, config, options, device):
        model = train_stage(number, config, options, device)
        digest = hashlib.sha256()
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        (out / f"weights_{distributed.rank()}").write_text(digest.hexdigest())
        return model

    train.train_stage = hashed


def main(faults: dict, arguments: list[str]) -> int:
    """What `python xsam/train.py` does, with `faults`; the status that it exits with."""
    options, config = cli.parse(arguments)
    if message := cli.preflight(options, config):
        return cli.complain(message, is_met_by_all=True)
    if "nan" in faults:
        inject_nan(faults["nan"], faults["calls"], faults.get("rank", 0))
    if "hash" in faults:
        write_hash(options.out)
    distributed.BEAT_SECONDS = faults.get("beat", distributed.BEAT_SECONDS)
    distributed.LOST_SECONDS = faults.get("lost", distributed.LOST_SECONDS)
    return cli.run_training(options, config)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))
