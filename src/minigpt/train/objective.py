"""What a step minimises: the protocol of an objective, and next-token cross-entropy.

The cross-entropy never holds the full logits, forward or backward. With a vocabulary of V, the
logits of N tokens are N x V, many times the hidden states. Here a chunk of tokens is projected,
scored and differentiated before the next one, so that only `chunk_tokens` x V numbers exist at
a time. The gradients are formed in the forward pass, where the logits already are, and scaled
in the backward pass: three matrix products in all, as many as without chunks (the idea of
Liger Kernel, https://arxiv.org/abs/2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from minigpt.data.loader import Batch
from minigpt.model.decoder import Decoder

IGNORED_TARGET = -1


class Compute(Protocol):
    """How a step computes: device, precision, compilation and mesh, so that no objective cares."""

    chunk_tokens: int
    """Tokens whose logits exist at once."""
    dtype: torch.dtype
    """Of matrix products."""
    sharers: int
    """Ranks that share rows, each with its part; the run's loss is the sum of theirs."""

    def own(self, tensor: Tensor) -> Tensor:
        """Take of whole rows, (B, T, ...), the part that `hidden` is for."""
        ...

    def hidden(self, model: Decoder, batch: Batch) -> Tensor:
        """Run a model over a batch; return its final hidden states, (B, T, C).

        Attention does not cross documents. Differentiable where gradients are enabled. Where a
        mesh cuts rows up, they are this rank's part.

        Args:
            model: The trained one, laid over the mesh, or a frozen one, whole on this rank.
            batch: Of whole rows, on the CPU.
        """
        ...

    def cross_entropy_sum(self, hidden: Tensor, output_weight: Tensor, targets: Tensor) -> Tensor:
        """Sum the cross-entropy over what `hidden` returned and (B, T) targets of whole rows.

        See `cross_entropy_sum`; perhaps compiled, over a vocabulary in shards or a rank's part
        of the rows.
        """
        ...

    def row_nll(self, hidden: Tensor, output_weight: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-likelihood of each whole row's targets, (B,), nats.

        Arguments as for `cross_entropy_sum`. All sharers get the same, so that each is to
        return the loss that it makes of it divided by `sharers`.
        """
        ...


class Objective(Protocol):
    """What a step minimises: a sum over a micro-batch, divided by the global batch's count."""

    def count(self, batch: Batch) -> int:
        """Count what the loss is a mean of: valid targets, or pairs; on the CPU, no forward."""
        ...

    def loss_sum(self, model: Decoder, batch: Batch, compute: Compute) -> Tensor:
        """Return a scalar whose backward pass gives the gradient of the micro-batch's sum."""
        ...

    def take_sums(self) -> Mapping[str, float]:
        """Return what is reported besides, summed over all that `loss_sum` saw since last asked.

        The reports are means over `count`. Always the same names; {} where there are none.
        """
        ...


class NextToken:
    """Cross-entropy over valid targets: pre-training, and fine-tuning on masked targets."""

    def count(self, batch: Batch) -> int:
        """Count the valid targets."""
        return int((batch.targets != IGNORED_TARGET).sum())

    def loss_sum(self, model: Decoder, batch: Batch, compute: Compute) -> Tensor:
        """Sum the cross-entropy, nats."""
        hidden = compute.hidden(model, batch)
        targets = batch.targets.to(hidden.device, non_blocking=True)
        return compute.cross_entropy_sum(hidden, model.output_weight, targets)

    def take_sums(self) -> Mapping[str, float]:
        """Return nothing: the loss says it all."""
        return {}


def cross_entropy_sum(
    hidden: Tensor,
    output_weight: Tensor,
    targets: Tensor,
    *,
    chunk_tokens: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum the cross-entropy (nats) over valid targets.

    Args:
        hidden: (N, C) final hidden states.
        output_weight: (V, C) output projection.
        targets: (N,) token ids, `IGNORED_TARGET` where there is nothing to predict.
        chunk_tokens: Rows of logits that exist at a time.
        dtype: Of the matrix products; None is that of `output_weight`. Softmax and sums are
            in float32 (float64 for float64 weights).

    Returns:
        Scalar, differentiable once with respect to `hidden` and `output_weight`.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, output_weight, targets, chunk_tokens, dtype or output_weight.dtype
    )
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> Tensor:
        return sum_chunks(ctx, hidden, weight, targets, chunk_tokens, dtype, _chunk)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        return *scale_gradients(ctx, loss_grad), None, None, None


ScoreChunk = Callable[[Tensor, Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]
"""(n, C) states, (V, C) weight, (n,) targets and the dtype of sums to the summed loss of a chunk
and its (n, V) gradient with respect to the logits."""


def sum_chunks(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    dtype: torch.dtype,
    score: ScoreChunk,
) -> Tensor:
    """Sum a loss chunk by chunk, its gradients beside it, so that no logits outlive their chunk.

    The forward pass of an autograd function whose backward pass is `scale_gradients`.

    Args:
        ctx: The function's; its first two inputs are `hidden` and `weight`.
        hidden: (N, C) final hidden states.
        weight: (V, C) output projection, or this rank's rows of it.
        targets: (N,).
        chunk_tokens: Rows of logits that exist at a time.
        dtype: Of the matrix products.
        score: A chunk's loss.
    """
    accurate = torch.promote_types(weight.dtype, torch.float32)
    needs_gradient = any(ctx.needs_input_grad)
    trains_weight = ctx.needs_input_grad[1]  # frozen under adapters
    with torch.autocast(hidden.device.type, enabled=False):
        product_weight = weight.to(dtype)
        loss = torch.zeros((), dtype=accurate, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_gradient else None
        weight_grad = torch.zeros_like(weight, dtype=accurate) if trains_weight else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            states = hidden[rows].to(dtype)
            chunk_loss, logits_grad = score(states, product_weight, targets[rows], accurate)
            loss = loss + chunk_loss
            if hidden_grad is not None:
                logits_grad = logits_grad.to(dtype)
                hidden_grad[rows] = logits_grad @ product_weight
                if weight_grad is not None:
                    weight_grad += logits_grad.T @ states
    if needs_gradient:
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
    return loss


def scale_gradients(ctx: Any, loss_grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradients that `sum_chunks` kept, times that of its loss."""
    hidden_grad, weight_grad = ctx.saved_tensors
    if weight_grad is not None:
        weight_grad = (weight_grad * loss_grad).to(ctx.weight_dtype)
    return hidden_grad * loss_grad.to(hidden_grad.dtype), weight_grad


def _chunk(
    states: Tensor, weight: Tensor, targets: Tensor, accurate: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return one chunk's summed loss and its gradient with respect to the logits."""
    valid = targets != IGNORED_TARGET
    labels = torch.where(valid, targets, 0)
    logits = states @ weight.T
    wide = logits.to(accurate)
    normalizer = torch.logsumexp(wide, dim=-1)
    label_logits = (states.to(accurate) * weight[labels].to(accurate)).sum(-1)
    loss = torch.where(valid, normalizer - label_logits, 0.0).sum()
    # The labels apart: a gather or a comparison inside would keep the passes over all logits
    # from being vectorised.
    gradient = ((wide - normalizer[:, None]).exp() * valid[:, None]).to(logits.dtype)
    rows = torch.arange(labels.shape[0], device=labels.device)
    label_grad = ((label_logits - normalizer).exp() - 1) * valid
    gradient[rows, labels] = label_grad.to(logits.dtype)
    return loss, gradient
