"""A mixture of experts in place of the MLP: each token goes through a few of many small MLPs.

Shaped as Mixtral (https://arxiv.org/abs/2401.04088) and Qwen3-MoE are, and named as Qwen3-MoE
names its tensors. No token is ever dropped: an expert takes as many as choose it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model.config import ModelConfig
from minigpt.model.mlp import make_mlp


class Choice(NamedTuple):
    """The k experts of each of N tokens."""

    experts: Tensor
    """(N, k) int64."""
    weights: Tensor
    """(N, k), what each expert's output is multiplied with; float32 at least."""


class Router(nn.Module):
    """Chooses each token's experts: the k largest of a softmax over all of them.

    With `router_bias` a bias is added for the choice, though not to the weights: moving it evens
    out the load without a term in the loss (https://arxiv.org/abs/2408.15664). It is no parameter;
    `balance` moves it.

    Buffer: `bias` (E,), or None.
    """

    bias: Tensor | None
    load: Tensor | None
    """(E,) int64 choices counted in training since the last `balance`; None before the first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.k = config.experts_per_token
        self.normalize = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts) if config.router_bias else None
        self.register_buffer("bias", bias)
        self.load = None

    def forward(self, hidden: Tensor) -> Choice:
        """Route (N, C)."""
        # A token's experts should not turn on the rounding of bf16.
        accurate = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.to(accurate), self.weight.to(accurate))
        probabilities = logits.softmax(-1)
        steered = probabilities if self.bias is None else probabilities + self.bias
        experts = steered.topk(self.k, dim=-1).indices
        weights = probabilities.gather(-1, experts)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.bias is not None and torch.is_grad_enabled():
            counts = experts.flatten().bincount(minlength=self.bias.shape[0])
            self.load = counts if self.load is None else self.load + counts
        return Choice(experts, weights)

    @torch.no_grad()
    def balance(self, load: Tensor, rate: float) -> None:
        """Make overloaded experts less likely and the others more; forget the load.

        Args:
            load: (E,) choices since the last call, over all processes that share the experts.
            rate: By how much a bias moves, in units of probability.
        """
        assert self.bias is not None
        counts = load.to(self.bias.dtype)
        self.bias += rate * torch.sign(counts.mean() - counts)
        self.load = None


class Experts(nn.ModuleDict):
    """MLPs by their numbers, "0" to "E - 1"."""

    def __init__(self, modules: Mapping[str, nn.Module], num_experts: int) -> None:
        super().__init__(modules)
        self.num_experts = num_experts

    def forward(self, hidden: Tensor, choice: Choice) -> Tensor:
        """Add up, for each token of (N, C), the weighted outputs of its experts."""
        chosen = choice.experts.flatten()  # (N k,), a token's choices side by side
        order = chosen.argsort(stable=True)
        rows = hidden[order // choice.experts.shape[1]]  # (N k, C), by expert
        outputs = self.run_sorted(rows, chosen.bincount(minlength=self.num_experts))
        slots = outputs[order.argsort()].view(*choice.experts.shape, -1)  # (N, k, C)
        return (slots * choice.weights[..., None]).sum(1).to(hidden.dtype)

    def run_sorted(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Run rows that are sorted by expert, (E,) `counts` of them each; same order out."""
        # In training an idle expert runs on no rows, so that it too has a gradient: zeros.
        return run_experts(self.values(), rows, counts, skip_idle=not torch.is_grad_enabled())


def run_experts(
    experts: Iterable[nn.Module], rows: Tensor, counts: Tensor, *, skip_idle: bool
) -> Tensor:
    """Give each expert its `counts` of the (M, C) rows, in order; return their outputs, (M, C)."""
    parts = torch.split(rows, counts.tolist())
    pairs = zip(experts, parts, strict=True)
    return torch.cat([expert(part) for expert, part in pairs if part.shape[0] or not skip_idle])


class MixtureOfExperts(nn.Module):
    """A router and its experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        inner = config.expert_intermediate_size or config.intermediate_size
        experts = {str(i): make_mlp(config, inner) for i in range(config.num_experts)}
        self.experts = Experts(experts, config.num_experts)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        flat = hidden.flatten(0, -2)
        mixed: Tensor = self.experts(flat, self.gate(flat))
        return mixed.view_as(hidden)
