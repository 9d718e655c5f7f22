"""Low-rank adapters (LoRA, Hu et al. 2022): training a part by a few numbers beside its weights.

A linear layer W that is frozen gains an adapter, two thin matrices: it returns W x + α/r · B A x,
where A is [r, in] and B is [out, r]. B begins as zero, so that nothing changes before the first
step. What the language model learns of new tokens are rows of its embedding tables; the three that
`llm.add_special_tokens` added get an adapter of their own, a row to add to each.

`add_adapters` puts them in and freezes the rest, `merge_adapters` adds them to the weights and
takes them out. A checkpoint of a model with adapters holds what was trained alone and names its
base (`starts.name_base`, `inference.load_checkpoint`).
"""

from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from xsam.config import Stage, is_in


class Adapter(nn.Module):
    """What is added to the output of a linear layer."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.scale, self.dropout = alpha / rank, dropout
        device = layer.weight.device
        self.A = nn.Parameter(torch.empty(rank, layer.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)  # as the layer itself begins

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """[..., in] and the layer's output for it [..., out] to the sum [..., out]."""
        x = F.dropout(x, self.dropout, self.training)
        return output + self.scale * F.linear(F.linear(x, self.A), self.B)

    def merge(self, layer: nn.Linear) -> None:
        """Adds the product of the two matrices to the layer's weights [out, in], in place."""
        layer.weight += (self.scale * self.B.float() @ self.A.float()).to(layer.weight)


class TokenRows(nn.Module):
    """What is added to the rows of some tokens in the embedding table, or in the output head."""

    def __init__(self, table: nn.Embedding | nn.Linear, ids: tuple[int, ...]):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros_like(table.weight[: len(ids)]))
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        if not table.weight.is_meta:
            self.to(table.weight.device)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Of the embedding table x are ids [...] and the output is [..., C]; of the output head x
        are states [..., C] and the output is logits [..., vocabulary]."""
        if not x.is_floating_point():
            return output + (x[..., None] == self.ids).to(self.rows) @ self.rows
        return output.index_add(-1, self.ids, F.linear(x, self.rows).to(output))

    def merge(self, table: nn.Embedding | nn.Linear) -> None:
        """Adds the rows [tokens, C] to those of the table, in place."""
        table.weight[self.ids] += self.rows


def target_layers(model: nn.Module, stage: Stage, prefix: str) -> dict[str, nn.Linear]:
    """The linear layers that adapters are for, by their names in the whole model: those that lie
    under one of `lora_targets`, or are of one as a pattern such as "llm*.qkv_proj", except the
    language model's output head, what torch's own attention reads without a call, and what has no
    learning rate or is trained whole. `prefix` is put before each name."""
    found = {}
    for name, layer in model.named_modules():
        name = prefix + name
        is_meant = any(is_in(name, each) or fnmatch(name, each) for each in stage.lora_targets)
        is_linear = isinstance(layer, nn.Linear) and not name.endswith(".lm_head")
        is_called = not isinstance(layer, NonDynamicallyQuantizableLinear)
        is_trained = stage.learning_rate(name) > 0 and not is_whole(name, stage)
        if is_meant and is_linear and is_called and is_trained:
            found[name] = layer
    return found


def is_whole(name: str, stage: Stage) -> bool:
    """Whether a parameter or module lies under one of `lora_whole`."""
    return any(is_in(name, each) for each in stage.lora_whole)


def add_adapters(model: nn.Module, stage: Stage, prefix: str) -> bool:
    """Gives the `target_layers` their adapters, and the language model, if some are its own, rows
    for the special tokens; all else is frozen but `lora_whole`. Does nothing where the stage has
    no rank, or no such layer; returns whether it has."""
    layers = target_layers(model, stage, prefix) if stage.lora_rank else {}
    for name, parameter in model.named_parameters() if layers else ():
        if not is_whole(prefix + name, stage):
            parameter.requires_grad_(False)
    # Not the type of the layers themselves: they may be held in fewer bits.
    dtype = next(each.dtype for each in model.parameters() if each.is_floating_point())
    for layer in layers.values():
        adapter = Adapter(layer, stage.lora_rank, stage.lora_alpha, stage.lora_dropout)
        attach(layer, adapter.to(dtype))
    if any(is_in(name, "llm") for name in layers):
        llm = model.llm.model
        table, head = llm.get_input_embeddings(), llm.get_output_embeddings()
        rows = TokenRows(table, model.llm.special_ids)
        attach(table, rows)
        is_tied = head.weight is table.weight
        attach(head, rows if is_tied else TokenRows(head, model.llm.special_ids))
    return bool(layers)


def attach(layer: nn.Module, adapter: Adapter | TokenRows) -> None:
    """From now on a layer returns what its adapter makes of its output."""
    layer.lora = adapter
    layer.lora_hook = layer.register_forward_hook(_add_adapter)


def _add_adapter(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return layer.lora(inputs[0], output)


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has gained adapters that are not merged yet."""
    return any(isinstance(module, Adapter) for module in model.modules())


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Adds the adapters to the weights and takes them out: the same model without further products.
    Sums are rounded to the type of the weights."""
    merged = set()  # tied tables share their rows
    for layer in [each for each in model.modules() if hasattr(each, "lora_hook")]:
        if layer.lora not in merged:
            merged.add(layer.lora)
            layer.lora.merge(layer)
        layer.lora_hook.remove()
        del layer.lora, layer.lora_hook
