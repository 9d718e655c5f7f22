"""Learning rates, float32 masters of bfloat16 weights, and shards that equal the whole."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from xsam import distributed
from xsam.checkpoints import state_tensors
from xsam.config import Stage
from xsam.optimizer import (
    MasterAdamW,
    build_optimizer,
    freeze,
    gradient_norms,
    parameter_groups,
    schedule,
    update,
)
from xsam.toy.preset import toy
from xsam.train import pretrained_model

STAGE = Stage(learning_rates={"": 1e-3, "1": 3e-4}, datasets=(), weight_decay=0.05)


# ---- rates ---------------------------------------------------------------------------------------


def test_learning_rate_goes_by_the_longest_prefix_and_zero_freezes(world):
    model = pretrained_model(3, toy(), world / "weights")
    stage = Stage(learning_rates={"": 1e-3, "llm": 0.0, "segmentor.encoder": 2e-4}, datasets=())
    assert stage.learning_rate("segmentor.encoder.pos_embed") == 2e-4
    assert stage.learning_rate("segmentor.decoder.x") == 1e-3
    freeze(model, stage, "")
    optimizer = build_optimizer(model, stage, "")
    assert not any(parameter.requires_grad for parameter in model.llm.parameters())
    grouped = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(trainable)
    assert grouped[id(model.segmentor.encoder.pos_embed)]["peak_lr"] == 2e-4
    assert grouped[id(model.llm_projector.model[0].bias)]["weight_decay"] == 0
    assert grouped[id(model.llm_projector.model[0].weight)]["weight_decay"] == stage.weight_decay


def test_schedule_rises_to_the_peak_and_falls_to_zero():
    factors = [schedule(step, 100, 0.03) for step in range(101)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert max(factors) == 1.0 and factors[100] == pytest.approx(0.0)
    assert factors[3:] == sorted(factors[3:], reverse=True)


# ---- one process ---------------------------------------------------------------------------------


def test_bfloat16_weights_with_masters_move_where_pure_bfloat16_does_not():
    """At the learning rate of stage 3's encoders a step is a thirtieth of a weight's last bit."""
    torch.manual_seed(0)
    start = (torch.randn(64, 64) * 0.02 + 0.1).bfloat16()
    ours, pure, exact = map(nn.Parameter, (start.clone(), start.clone(), start.float()))
    optimizers = [
        MasterAdamW([ours], lr=4e-6),
        torch.optim.AdamW([pure], lr=4e-6, weight_decay=0.0),
        torch.optim.AdamW([exact], lr=4e-6, weight_decay=0.0),
    ]
    gradient = torch.randn(64, 64).bfloat16()
    for _ in range(500):
        for parameter, optimizer in zip((ours, pure, exact), optimizers, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    assert torch.equal(pure, start)
    master = optimizers[0].state[ours]["master"]
    torch.testing.assert_close(master, exact.detach(), rtol=0, atol=1e-7)
    assert torch.equal(ours, master.bfloat16())
    moved = (ours.detach() - start).float()
    assert (moved != 0).float().mean() > 0.99 and (moved * gradient.float() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_follow_adamw_on_float32_weights(dtype):
    """Beside torch's own AdamW on a float32 copy, fed with the same clipped gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(dtype)
    copies = [nn.Parameter(parameter.detach().float()) for parameter in model.parameters()]
    optimizer = build_optimizer(model, STAGE, "")
    groups = [
        {"params": [copy], "lr": rate, "weight_decay": decay}
        for copy, rate, decay in zip(
            copies, (1e-3, 1e-3, 3e-4, 3e-4), (0.05, 0.0, 0.05, 0.0), strict=True
        )
    ]
    reference = torch.optim.AdamW(groups)
    for _ in range(20):
        for parameter, copy in zip(model.parameters(), copies, strict=True):
            parameter.grad = torch.randn_like(parameter) * 3
            copy.grad = parameter.grad.float()
        norms = gradient_norms(model)
        total = nn.utils.clip_grad_norm_(copies, 1.0)
        assert torch.tensor([*norms.values()]).norm() == pytest.approx(float(total), rel=1e-5)
        update(optimizer, norms, clip_norm=1.0)
        reference.step()
    for parameter, copy in zip(model.parameters(), copies, strict=True):
        master = optimizer.state[parameter].get("master", parameter)
        torch.testing.assert_close(master.detach(), copy.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(parameter, master.to(dtype))
    assert all(
        ("master" in state) == (dtype != torch.float32) for state in optimizer.state.values()
    )


def test_norms_are_float32_whatever_the_gradient():
    parameters = nn.ParameterList([torch.zeros(2000, 500), torch.zeros(7), torch.zeros(())])
    for parameter in parameters.bfloat16():
        parameter.grad = torch.full_like(parameter, 0.01)
    for parameter, norm in gradient_norms(parameters).items():
        assert norm == pytest.approx(float(parameter.grad.double().norm()), rel=1e-5)


def test_a_gradient_of_zero_leaves_weight_and_moments_alone():
    """A step without a part (chat and the decoder) is none for it: no decay, no old momentum."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = build_optimizer(model, STAGE, "")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    update(optimizer, gradient_norms(model), clip_norm=1.0)
    model[1].weight.grad.zero_()
    before = [model[1].weight.detach().clone()]
    before += [state.clone() for state in optimizer.state[model[1].weight].values()]
    first = model[0].weight.detach().clone()
    update(optimizer, gradient_norms(model), clip_norm=1.0)
    after = [model[1].weight, *optimizer.state[model[1].weight].values()]
    assert all(map(torch.equal, before, after))
    assert not torch.equal(first, model[0].weight)


def test_what_is_never_used_has_no_states():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = build_optimizer(model, STAGE, "")
    model[0](torch.ones(1, 3)).sum().backward()
    update(optimizer, gradient_norms(model), clip_norm=1.0)
    assert set(optimizer.state) == set(model[0].parameters())


# ---- several -------------------------------------------------------------------------------------


def run_ranks(function, world_size: int, folder: Path, *arguments) -> list:
    """What `function(rank, *arguments)` returns on each rank of a gloo group."""
    spawned = (function, world_size, folder, arguments)
    multiprocessing.start_processes(_rank, spawned, world_size, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def _rank(rank: int, function, world_size: int, folder: Path, arguments) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    dist.barrier()
    distributed.finish()


class Parts(nn.Module):
    """Parameters of many sizes, and a part that every third step does without."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16), nn.LayerNorm(16))
        self.optional, self.never = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, use_optional: bool) -> torch.Tensor:
        x = self.body(x)
        return (self.optional(x) if use_optional else x).float().square().mean()


def train_parts(rank: int, dtype: torch.dtype, is_sharded: bool) -> dict[str, torch.Tensor]:
    """50 steps of two micro-batches on the rank's share of each batch of 16."""
    torch.manual_seed(0)
    model = Parts().to(dtype)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    wrapped, share = model, 16 // world_size
    if world_size > 1:
        wrapped = DistributedDataParallel(
            model, gradient_as_bucket_view=True, find_unused_parameters=True
        )
    stage = Stage(learning_rates={"": 3e-3, "body.0": 1e-3}, datasets=(), weight_decay=0.05)
    whole = MasterAdamW(parameter_groups(model, stage, ""))
    optimizer = build_optimizer(model, stage, "") if is_sharded else whole
    generator = torch.Generator().manual_seed(1)
    for step in range(50):
        data = torch.randn(16, 16, generator=generator).to(dtype)
        mine = data[rank * share : (rank + 1) * share].chunk(2)
        for index, half in enumerate(mine):
            wrapped.require_backward_grad_sync = index == len(mine) - 1
            (wrapped(half, step % 3 != 2) / len(mine)).backward()
        update(optimizer, gradient_norms(model), clip_norm=0.5)
        optimizer.zero_grad(set_to_none=False)
    states = state_tensors(optimizer, model, "")
    return {name: value.detach().clone() for name, value in (model.state_dict() | states).items()}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_equals_unsharded_to_the_last_bit(world_size, dtype, tmp_path):
    folders = [tmp_path / "sharded", tmp_path / "unsharded"]
    for folder in folders:
        folder.mkdir()
    sharded = run_ranks(train_parts, world_size, folders[0], dtype, True)
    unsharded = run_ranks(train_parts, world_size, folders[1], dtype, False)
    weights = Parts().state_dict().keys()
    for of_rank in (*sharded, *unsharded):  # all ranks have the same weights
        assert all(torch.equal(of_rank[name], unsharded[0][name]) for name in weights)
    # The shards are the whole: each state is on one rank, as the rank that has all has it.
    owned = [name for of_rank in sharded for name in of_rank.keys() - weights]
    assert sorted(owned) == sorted(unsharded[0].keys() - weights)
    assert all(len(of_rank) < len(unsharded[0]) for of_rank in sharded)
    for of_rank in sharded:
        assert all(torch.equal(value, unsharded[0][name]) for name, value in of_rank.items())
    assert not any("never" in name for name in owned)
    assert {int(unsharded[0][f"{part}.weight:step"]) for part in ("body.0", "body.3")} == {50}
    assert int(unsharded[0]["optional.weight:step"]) == 34  # two of three steps use it


def test_ranks_equal_one_process(tmp_path):
    alone = train_parts(0, torch.float32, True)
    for of_rank in run_ranks(train_parts, 2, tmp_path, torch.float32, True):
        for name in Parts().state_dict():
            torch.testing.assert_close(of_rank[name], alone[name], rtol=1e-4, atol=1e-5)
