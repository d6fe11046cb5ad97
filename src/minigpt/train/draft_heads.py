"""Draft heads learn what the frozen model says a few tokens ahead.

From the model's state at position t the heads go on over the text's own next tokens, i of them,
and the loss is KL(model at t + i || heads), the mean over i = 1 .. depth: drafts are right as
often as both distributions agree (Leviathan et al. 2023, arXiv 2211.17192, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minigpt.data.loader import Batch
from minigpt.model.decoder import Decoder
from minigpt.model.draft_heads import draft_heads_of
from minigpt.train.distillation import distillation_sum
from minigpt.train.objective import IGNORED_TARGET, Compute


class DraftHeadsObjective:
    """A mean over valid targets, as of `train.objective.NextToken`.

    The last tokens of a document or row, after which less than `depth` follow, add less.

    Args:
        depth: Most tokens ahead.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._sums = [0.0] * depth

    def count(self, batch: Batch) -> int:
        """Count the valid targets."""
        return int((batch.targets != IGNORED_TARGET).sum())

    def loss_sum(self, model: Decoder, batch: Batch, compute: Compute) -> Tensor:
        """Sum the divergences, nats, over targets; of the depths their mean."""
        heads = draft_heads_of(model)
        with torch.no_grad():
            hidden = compute.hidden(model, batch)
        device = hidden.device
        tokens, targets, documents = (
            tensor.to(device) for tensor in (batch.tokens, batch.targets, batch.documents)
        )
        weight = model.output_weight
        state, loss = hidden, hidden.new_zeros((), dtype=weight.dtype)
        for ahead in range(1, min(self._depth, tokens.shape[1] - 1) + 1):
            # Of every position t that has a token at t + ahead.
            with torch.autocast(device.type, compute.dtype, enabled=compute.dtype != weight.dtype):
                embedding = model.model.embed_tokens(tokens[:, ahead:])
                state = heads(state[:, :-1], embedding)
            same = documents[:, ahead:] == documents[:, :-ahead]
            divergence = distillation_sum(
                state.flatten(0, 1),
                weight,
                hidden[:, ahead:].flatten(0, 1),
                weight,
                targets[:, ahead:].where(same, IGNORED_TARGET).flatten(),
                divergence="forward-kl",
                temperature=1.0,
                mix=1.0,
                chunk_tokens=compute.chunk_tokens,
                dtype=compute.dtype,
            )
            self._sums[ahead - 1] += float(divergence.detach())
            loss = loss + divergence / self._depth
        return loss

    def take_sums(self) -> Mapping[str, float]:
        """Return the divergence at each depth."""
        taken = {f"kl_{ahead}": value for ahead, value in enumerate(self._sums, start=1)}
        self._sums = [0.0] * self._depth
        return taken
