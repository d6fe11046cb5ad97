"""Next-token cross-entropy over a vocabulary that is spread over tensor parallel ranks.

As `train.objective`, a chunk of tokens is projected, scored and differentiated at a time; here
each rank does so for its own rows of the output projection. What the ranks exchange for a token
is two numbers each, never a row of logits (https://arxiv.org/abs/1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from minigpt.train.objective import IGNORED_TARGET


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
    mesh = output_weight.device_mesh
    assert output_weight.placements == (Shard(0),), output_weight.placements
    # Every rank needs all tokens, and adds its share to the gradient of each.
    whole = DTensor.from_local(hidden, mesh, [Shard(1)], run_check=False)
    tokens = whole.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    weight = output_weight.to_local()
    loss: Tensor = _VocabParallelCrossEntropy.apply(  # type: ignore[no-untyped-call]
        tokens.flatten(0, 1),
        weight,
        targets.flatten(),
        chunk_tokens,
        dtype or weight.dtype,
        mesh.get_group(),
    )
    return loss


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
        dtype: torch.dtype,
        group: dist.ProcessGroup,
    ) -> Tensor:
        accurate = torch.promote_types(weight.dtype, torch.float32)
        needs_gradient = any(ctx.needs_input_grad)
        with torch.autocast(hidden.device.type, enabled=False):
            product_weight = weight.to(dtype)
            loss = torch.zeros((), dtype=accurate, device=hidden.device)
            hidden_grad = torch.empty_like(hidden) if needs_gradient else None
            weight_grad = torch.zeros_like(weight, dtype=accurate) if needs_gradient else None
            for start in range(0, hidden.shape[0], chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                states = hidden[rows].to(dtype)
                chunk_loss, logits_grad = _chunk(
                    states, product_weight, targets[rows], accurate, group
                )
                loss = loss + chunk_loss
                if hidden_grad is not None and weight_grad is not None:
                    logits_grad = logits_grad.to(dtype)
                    hidden_grad[rows] = logits_grad @ product_weight
                    weight_grad += logits_grad.T @ states
        if needs_gradient:
            ctx.save_for_backward(hidden_grad, weight_grad)
            ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            hidden_grad * loss_grad.to(hidden_grad.dtype),
            (weight_grad * loss_grad).to(ctx.weight_dtype),
            *(None,) * 4,
        )


def _chunk(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    accurate: torch.dtype,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Return one chunk's summed loss and its gradient with respect to this rank's logits."""
    valid = targets != IGNORED_TARGET
    labels = targets - dist.get_rank(group) * weight.shape[0]
    mine = valid & (labels >= 0) & (labels < weight.shape[0])
    labels = torch.where(mine, labels, 0)
    wide = (states @ weight.T).to(accurate)
    label_logits = (states.to(accurate) * weight[labels].to(accurate)).sum(-1)
    label_logits = torch.where(mine, label_logits, 0.0)
    # One exchange: each rank's normalizer and its share of the label's logit.
    found = torch.stack([torch.logsumexp(wide, dim=-1), label_logits])
    parts = [torch.empty_like(found) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, found, group=group)
    together = torch.stack(parts)  # (ranks, 2, N)
    normalizer = torch.logsumexp(together[:, 0], dim=0)
    loss = torch.where(valid, normalizer - together[:, 1].sum(0), 0.0).sum()
    gradient = ((wide - normalizer[:, None]).exp() * valid[:, None]).to(states.dtype)
    rows = torch.arange(labels.shape[0], device=labels.device)[mine]
    label_grad = (label_logits - normalizer).exp() - 1
    gradient[rows, labels[mine]] = label_grad[mine].to(states.dtype)
    return loss, gradient
