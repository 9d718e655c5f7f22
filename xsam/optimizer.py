"""From gradients to new weights: learning rates, their schedule, and AdamW on float32 master
weights, sharded over the ranks.

Weights and gradients are bfloat16 in training. Its 8 bits of precision cannot hold a step of the
size of the learning rate, so the optimizer keeps every weight once more, in float32, beside the two
moments of AdamW (Loshchilov and Hutter 2019): 12 bytes a parameter. A rank keeps these states for
its share of the parameters alone, updates that share and sends it to the others: stage 1 of ZeRO
(Rajbhandari et al. 2020), by torch's ZeroRedundancyOptimizer. What else was measured is in LOG.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from xsam import distributed

if TYPE_CHECKING:
    from xsam.config import Stage

CHUNK = 2**24  # numbers that are updated in one call

MOMENTS = ("exp_avg", "exp_avg_sq")  # names of AdamW's states

BLOCK = 256  # numbers of a moment in 8 bits that share a scale

# ---- learning rates ------------------------------------------------------------------------------


def schedule(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at a step, from 0 on: a linear rise, then half a cosine down
    to zero (paper table 11)."""
    warmup = max(1, round(num_steps * warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


# ---- the update ----------------------------------------------------------------------------------


class MasterAdamW(torch.optim.Optimizer):
    """AdamW that adds its steps to float32 masters and rounds them to the parameters.

    A parameter that is float32 is its own master. States are made at a parameter's first step, so
    what is never used costs none.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bits: int = 32,
    ):
        """With 8 `bits` moments are kept in 8 bits, with a scale for every block (Dettmers et al.
        2022), and the update is in float32 all the same."""
        self.bits = bits
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def start(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The states of a parameter before its first step."""
        state = self.state[parameter]
        if parameter.dtype != torch.float32:
            state["master"] = parameter.detach().float()
        for name in MOMENTS:
            state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            if self.bits == 8 and parameter.numel() % BLOCK == 0:
                state[name] = in_8_bits(state[name], is_signed=name == MOMENTS[0])
        state["step"] = torch.zeros((), device=parameter.device)
        return state

    @torch.no_grad()
    def step(self, scale: float = 1.0, unused: frozenset[nn.Parameter] = frozenset()) -> None:
        """An update by `scale` times the gradients. Parameters in `unused` stay as they are, with
        their moments. Parameters are taken together up to CHUNK numbers, so that few float32
        copies of gradients exist at a time."""
        for group in self.param_groups:
            used = [x for x in group["params"] if x.grad is not None and x not in unused]
            for parameters in _chunks(used):
                self._update(parameters, scale, group)

    def _update(self, parameters: list[nn.Parameter], scale: float, group: dict) -> None:
        states = [self.state[parameter] or self.start(parameter) for parameter in parameters]
        pairs = list(zip(states, parameters, strict=True))
        masters = [state.get("master", parameter) for state, parameter in pairs]
        moments = [[whole(state[name]) for state in states] for name in MOMENTS]
        beta1, beta2 = group["betas"]
        adamw(
            masters,
            torch._foreach_mul([parameter.grad.float() for parameter in parameters], scale),
            *moments,
            [],  # of AMSGrad
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
        )
        for name, values in zip(MOMENTS, moments, strict=True):
            for state, value in zip(states, values, strict=True):
                if state[name] is not value:
                    state[name].copy_(value)
        for master, parameter in zip(masters, parameters, strict=True):
            if master is not parameter:
                parameter.copy_(master)


def in_8_bits(zeros: Tensor, is_signed: bool) -> Tensor:
    """A moment of zeros as torchao keeps it. Raises ValueError without torchao."""
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ValueError("optimizer_bits 8 needs torchao: pip install 'xsam[torchao]'") from error
    return OptimState8bit.zeros(zeros.shape, is_signed, BLOCK, zeros.device)


def whole(moment: Tensor) -> Tensor:
    """A moment in float32: itself, or a copy of one in 8 bits."""
    return moment.dequantize() if hasattr(moment, "codes") else moment


def plain_states(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's states as plain tensors, which files hold: of a moment in 8 bits its codes and
    scales."""
    plain = {}
    for name, state in states.items():
        names = ("codes", "scale") if hasattr(state, "codes") else ()
        plain |= {f"{name}.{part}": getattr(state, part) for part in names} or {name: state}
    return plain


def _chunks(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of at most CHUNK numbers together, or one that is larger."""
    chunk, size = [], 0
    for parameter in parameters:
        if chunk and size + parameter.numel() > CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(parameter)
        size += parameter.numel()
    if chunk:
        yield chunk


# ---- of a stage ----------------------------------------------------------------------------------


def freeze(model: nn.Module, stage: Stage, prefix: str) -> None:
    """Parameters with a learning rate of 0 get no gradient. `prefix` is put before their names, as
    stage 1 trains a segmentor by itself."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage.learning_rate(prefix + name) > 0)


def parameter_groups(model: nn.Module, stage: Stage, prefix: str) -> list[dict]:
    """The parameters that are not frozen, as the optimizer takes them, grouped by learning rate and
    weight decay: vectors, such as biases and norms, have none."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = stage.learning_rate(prefix + name)
            decay = stage.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def build_optimizer(
    model: nn.Module, stage: Stage, prefix: str, bits: int = 32
) -> torch.optim.Optimizer:
    """The stage's optimizer, with moments in 32 or 8 bits; in a process group its states are
    sharded over the ranks."""
    groups = parameter_groups(model, stage, prefix)
    if not distributed.has_group():
        return MasterAdamW(groups, bits=bits)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # compiles things for a second

    # Parameters become views of one buffer for every rank: one broadcast a rank, not a parameter.
    options = {"parameters_as_bucket_view": True, "bits": bits}
    return ZeroRedundancyOptimizer(groups, MasterAdamW, **options)


@torch.no_grad()
def gradient_norms(model: nn.Module) -> dict[nn.Parameter, float]:
    """L2 norms of the gradients, summed in float32 whatever the gradient's type. After DDP's
    all-reduce every rank has the same."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    # Large ones row by row: one sum of 10⁷ squares in float32 is a third of a percent off.
    rows = [
        torch.linalg.vector_norm(x.grad, dim=-1, dtype=torch.float32)
        if x.numel() > 2**16
        else x.grad
        for x in parameters
    ]
    norms = torch.stack(torch._foreach_norm(rows, 2, torch.float32))
    return dict(zip(parameters, norms.tolist(), strict=True))


def update(
    optimizer: torch.optim.Optimizer, norms: dict[nn.Parameter, float], clip_norm: float
) -> None:
    """A step with the gradients scaled down to a norm of `clip_norm`, all together, where it is
    larger. A parameter with a gradient of exactly zero had no part in the step (chat does not use
    the decoder): it is left as it is."""
    total = math.hypot(*norms.values())
    unused = frozenset(parameter for parameter, norm in norms.items() if norm == 0)
    optimizer.step(scale=min(1.0, clip_norm / (total + 1e-6)), unused=unused)
