"""Next-token cross-entropy over a vocabulary that is spread over tensor parallel ranks.

As `train.objective`, a chunk of tokens is projected, scored and differentiated at a time; here
each rank does so for its own rows of the output projection. What the ranks exchange for a token
is two numbers each, never a row of logits (https://arxiv.org/abs/1909.08053, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from minigpt.train.objective import IGNORED_TARGET, scale_gradients, sum_chunks


def vocab_parallel_cross_entropy_sum(
    hidden: Tensor,
    output_weight: DTensor,
    targets: Tensor,
    *,
    chunk_tokens: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum the cross-entropy (nats) over valid targets, the same number on every rank.

    Args:
        hidden: (B, T / ranks, C) final hidden states, this rank's part of the sequence.
        output_weight: (V, C) output projection, sharded over its rows.
        targets: (B, T) token ids of the whole rows, `IGNORED_TARGET` where there are none.
        chunk_tokens: Rows of logits, V / ranks wide, that exist at a time.
        dtype: Of the matrix products; None is that of `output_weight`.

    Returns:
        Scalar, differentiable once with respect to `hidden` and `output_weight`.
    """
    tokens, weight, part = local_vocabulary(hidden, output_weight)
    loss: Tensor = _VocabParallelCrossEntropy.apply(  # type: ignore[no-untyped-call]
        tokens, weight, targets.flatten(), chunk_tokens, dtype or weight.dtype, part
    )
    return loss


@dataclass(frozen=True)
class VocabularyPart:
    """The tokens of the vocabulary that this rank scores, and sums over all ranks' parts."""

    group: dist.ProcessGroup | None = None
    """The ranks among which the vocabulary is spread, None where this one has all of it."""
    start: int = 0
    """The first of its tokens."""

    def find(self, targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return (N,) labels within a part of `size` tokens, 0 where none, and which are in it."""
        labels = targets - self.start
        mine = (targets != IGNORED_TARGET) & (labels >= 0) & (labels < size)
        return torch.where(mine, labels, 0), mine

    def sum(self, values: Tensor) -> Tensor:
        """Add (N, part) values up over the whole vocabulary, (N,)."""
        found = values.sum(-1)
        if self.group is not None:
            dist.all_reduce(found, group=self.group)
        return found

    def logsumexp(self, logits: Tensor) -> Tensor:
        """Return the normalizer of (N, part) logits over the whole vocabulary, (N,)."""
        found = logits.logsumexp(-1)
        if self.group is None:
            return found
        parts = [torch.empty_like(found) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, found, group=self.group)
        return torch.stack(parts).logsumexp(0)

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Normalize (N, part) logits over the whole vocabulary."""
        if self.group is None:
            return logits.log_softmax(-1)
        return logits - self.logsumexp(logits)[:, None]


WHOLE_VOCABULARY = VocabularyPart()


def local_vocabulary(
    hidden: Tensor, output_weight: Tensor
) -> tuple[Tensor, Tensor, VocabularyPart]:
    """Return what this rank scores: all tokens, against its own rows of the output projection.

    Args:
        hidden: (B, T, C) final hidden states; this rank's part of T where the projection's rows
            are spread over ranks.
        output_weight: (V, C), a DTensor where it is spread.

    Returns:
        (N, C) states of all tokens, each rank's gradient of which is its share; (V / ranks, C)
        rows; and which those are.
    """
    if not isinstance(output_weight, DTensor):
        return hidden.flatten(0, 1), output_weight, WHOLE_VOCABULARY
    mesh = output_weight.device_mesh
    assert output_weight.placements == (Shard(0),), output_weight.placements
    # Every rank needs all tokens, and adds its share to the gradient of each.
    whole = DTensor.from_local(hidden, mesh, [Shard(1)], run_check=False)
    tokens = whole.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    weight = output_weight.to_local()
    part = VocabularyPart(mesh.get_group(), mesh.get_local_rank() * len(weight))
    return tokens.flatten(0, 1), weight, part


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
        dtype: torch.dtype,
        part: VocabularyPart,
    ) -> Tensor:
        score = partial(_chunk, part=part)
        return sum_chunks(ctx, hidden, weight, targets, chunk_tokens, dtype, score)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        return *scale_gradients(ctx, loss_grad), *(None,) * 4


def _chunk(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    accurate: torch.dtype,
    part: VocabularyPart,
) -> tuple[Tensor, Tensor]:
    """Return one chunk's summed loss and its gradient with respect to this rank's logits."""
    valid = targets != IGNORED_TARGET
    labels, mine = part.find(targets, len(weight))
    wide = (states @ weight.T).to(accurate)
    label_logits = (states.to(accurate) * weight[labels].to(accurate)).sum(-1)
    label_logits = torch.where(mine, label_logits, 0.0)
    # One exchange: each rank's normalizer and its share of the label's logit.
    found = torch.stack([torch.logsumexp(wide, dim=-1), label_logits])
    parts = [torch.empty_like(found) for _ in range(dist.get_world_size(part.group))]
    dist.all_gather(parts, found, group=part.group)
    together = torch.stack(parts)  # (ranks, 2, N)
    normalizer = torch.logsumexp(together[:, 0], dim=0)
    loss = torch.where(valid, normalizer - together[:, 1].sum(0), 0.0).sum()
    gradient = ((wide - normalizer[:, None]).exp() * valid[:, None]).to(states.dtype)
    rows = torch.arange(labels.shape[0], device=labels.device)[mine]
    label_grad = (label_logits - normalizer).exp() - 1
    gradient[rows, labels[mine]] = label_grad[mine].to(states.dtype)
    return loss, gradient
