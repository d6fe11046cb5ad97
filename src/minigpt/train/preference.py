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
from minigpt.train.objective import IGNORED_TARGET, Compute


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

    def count(self, batch: Batch) -> int:
        """Count the pairs that are not skipped."""
        return int(_is_counted(batch).sum())

    def loss_sum(self, model: Decoder, batch: Batch, compute: Compute) -> Tensor:
        """Sum the pairs' losses, nats."""
        # First the reference, which may be the policy itself: shards that are gathered for it
        # are let go of before the policy's, which the backward pass needs.
        with torch.no_grad(), self.reference.beside(model) as reference:
            frozen = _log_likelihoods(reference, batch, compute)
        policy = _log_likelihoods(model, batch, compute)
        margins = pair_margins(policy - frozen, self.beta)
        counted = _is_counted(batch).to(margins.device)
        found = margins.detach()[counted]
        self._sums["margin"] += float(found.sum())
        self._sums["accuracy"] += float((found > 0).sum())
        losses = preference_losses(margins, self.label_smoothing)[counted]
        return losses.sum() / compute.sharers

    def take_sums(self) -> Mapping[str, float]:
        """Return the sum of the margins, and how many pairs have a positive one."""
        sums, self._sums = self._sums, dict.fromkeys(self._sums, 0.0)
        return sums


def pair_margins(log_ratios: Tensor, beta: float) -> Tensor:
    """Map (2 P,) log p / q, chosen and rejected in turn, to (P,) margins of the implicit reward."""
    chosen, rejected = log_ratios.view(-1, 2).unbind(-1)
    return beta * (chosen - rejected)


def preference_losses(margins: Tensor, label_smoothing: float) -> Tensor:
    """Map (P,) margins to (P,) losses, nats."""
    right, wrong = F.logsigmoid(margins), F.logsigmoid(-margins)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def _is_counted(batch: Batch) -> Tensor:
    """Tell which pairs have targets, (P,); skipped ones have none."""
    assert batch.targets.shape[0] % 2 == 0, batch.targets.shape
    found: Tensor = (batch.targets != IGNORED_TARGET).any(-1).view(-1, 2).all(-1)
    return found


def _log_likelihoods(model: Decoder, batch: Batch, compute: Compute) -> Tensor:
    """Return the log-likelihood of each row's targets, (B,), nats."""
    hidden = compute.hidden(model, batch)
    targets = batch.targets.to(hidden.device, non_blocking=True)
    return -compute.row_nll(hidden, model.output_weight, targets)
