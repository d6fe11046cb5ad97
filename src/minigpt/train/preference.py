"""Direct preference optimisation: raise the chosen answer over the rejected, near a reference.

For a prompt x with answers y+ and y-, policy p and frozen reference q,
    margin = beta [log p(y+|x) / q(y+|x) - log p(y-|x) / q(y-|x)],  loss = -log sigmoid(margin)
(Rafailov et al. 2023, https://arxiv.org/abs/2305.18290). With label smoothing s, the share of
pairs thought to be labelled the wrong way round, loss = -(1 - s) log sigmoid(margin) -
s log sigmoid(-margin) (https://ericmitchell.ai/cdpo.pdf).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.data.loader import Batch
from minigpt.model.decoder import Decoder
from minigpt.model.lora import adapters_off
from minigpt.train.objective import Compute, token_nll


class Reference(Protocol):
    """The model that a policy is held to; its log-likelihoods never change during a run."""

    @contextmanager
    def beside(self, policy: Decoder) -> Iterator[Decoder]:
        """Give the reference for the block; the policy is not to be used within it."""
        ...


class FrozenCopy:
    """A model of its own.

    Args:
        model: On the policy's device; frozen here.
    """

    def __init__(self, model: Decoder) -> None:
        self._model = model.requires_grad_(False).eval()

    @contextmanager
    def beside(self, policy: Decoder) -> Iterator[Decoder]:
        """See `Reference`."""
        yield self._model


class AdaptersOff:
    """The policy itself without its adapters: no second copy of the weights."""

    @contextmanager
    def beside(self, policy: Decoder) -> Iterator[Decoder]:
        """See `Reference`."""
        with adapters_off(policy):
            yield policy


class PreferenceObjective:
    """DPO over batches whose rows 2j and 2j + 1 are a pair's chosen and rejected answer."""

    def __init__(self, reference: Reference, *, beta: float, label_smoothing: float) -> None:
        self.reference = reference
        self.beta = beta
        self.label_smoothing = label_smoothing
        self._sums = {"margin": 0.0, "accuracy": 0.0}
        self._pairs = 0

    def count(self, batch: Batch) -> int:
        """Count the pairs."""
        rows = batch.tokens.shape[0]
        assert rows % 2 == 0, rows
        return rows // 2

    def loss_sum(self, model: Decoder, batch: Batch, compute: Compute) -> Tensor:
        """Sum the pairs' losses, nats."""
        policy = _log_likelihoods(model, batch, compute)
        with torch.no_grad(), self.reference.beside(model) as reference:
            frozen = _log_likelihoods(reference, batch, compute)
        margins = pair_margins(policy - frozen, self.beta)
        self._pairs += margins.numel()
        self._sums["margin"] += float(margins.detach().sum())
        self._sums["accuracy"] += float((margins.detach() > 0).sum())
        return preference_losses(margins, self.label_smoothing).sum()

    def metrics(self) -> Mapping[str, float]:
        """Return the mean margin, and the share of pairs with a positive one."""
        means = {name: total / max(1, self._pairs) for name, total in self._sums.items()}
        self._sums, self._pairs = dict.fromkeys(self._sums, 0.0), 0
        return means


def pair_margins(log_ratios: Tensor, beta: float) -> Tensor:
    """Map (2 P,) log p / q, chosen and rejected in turn, to (P,) margins of the implicit reward."""
    chosen, rejected = log_ratios.view(-1, 2).unbind(-1)
    return beta * (chosen - rejected)


def preference_losses(margins: Tensor, label_smoothing: float) -> Tensor:
    """Map (P,) margins to (P,) losses, nats."""
    right, wrong = F.logsigmoid(margins), F.logsigmoid(-margins)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def _log_likelihoods(model: Decoder, batch: Batch, compute: Compute) -> Tensor:
    """Return the log-likelihood of each row's targets, (B,), nats."""
    hidden = compute.hidden(model, batch)
    targets = batch.targets.to(hidden.device, non_blocking=True)
    nll = token_nll(
        hidden.flatten(0, 1),
        model.output_weight,
        targets.flatten(),
        chunk_tokens=compute.chunk_tokens,
        dtype=compute.dtype,
    )
    return -nll.view_as(targets).sum(-1)
