"""Each target's negative log-likelihood, for losses that are no plain sum of them.

As `train.objective`, a chunk of tokens is projected and scored at a time. Here the logits are
formed again in the backward pass, where the weights of the tokens are known: four matrix products
in all. Over a spread vocabulary each rank scores its own part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minigpt.train.objective import IGNORED_TARGET
from minigpt.train.vocab_parallel import WHOLE_VOCABULARY, VocabularyPart


def token_nll(
    hidden: Tensor,
    output_weight: Tensor,
    targets: Tensor,
    part: VocabularyPart = WHOLE_VOCABULARY,
    *,
    chunk_tokens: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return each target's negative log-likelihood, nats.

    Args:
        hidden: (N, C) final hidden states.
        output_weight: (V, C) output projection, or this rank's rows of it.
        targets: (N,) token ids, `IGNORED_TARGET` where there is nothing to predict.
        part: Which rows those are.
        chunk_tokens: Rows of logits that exist at a time.
        dtype: Of the matrix products; None is that of `output_weight`. Softmax and sums are
            in float32 (float64 for float64 weights).

    Returns:
        (N,), 0 where there is no target, the same on all ranks that share the vocabulary;
        differentiable once.
    """
    nll: Tensor = _ChunkedNLL.apply(  # type: ignore[no-untyped-call]
        hidden, output_weight, targets, part, chunk_tokens, dtype or output_weight.dtype
    )
    return nll


class _ChunkedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        part: VocabularyPart,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> Tensor:
        accurate = torch.promote_types(weight.dtype, torch.float32)
        labels, mine = part.find(targets, len(weight))
        label_logits, normalizers = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            product_weight = weight.to(dtype)
            for start in range(0, hidden.shape[0], chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                logits = (hidden[rows].to(dtype) @ product_weight.T).to(accurate)
                label_logits.append(logits.gather(-1, labels[rows, None]))
                normalizers.append(part.logsumexp(logits))
        found = torch.cat(label_logits) * mine[:, None]
        normalizer = torch.cat(normalizers)
        ctx.save_for_backward(hidden, weight, targets, normalizer)
        ctx.part, ctx.chunk_tokens, ctx.dtype = part, chunk_tokens, dtype
        return torch.where(targets != IGNORED_TARGET, normalizer - part.sum(found), 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer = ctx.saved_tensors
        labels, mine = ctx.part.find(targets, len(weight))
        grad = torch.where(targets != IGNORED_TARGET, grad, 0.0)
        product_weight = weight.to(ctx.dtype)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = (
            torch.zeros_like(weight, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        )
        for start in range(0, hidden.shape[0], ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            states = hidden[rows].to(ctx.dtype)
            logits = (states @ product_weight.T).to(grad.dtype)
            logits_grad = (logits - normalizer[rows, None]).exp()
            logits_grad.scatter_add_(-1, labels[rows, None], -mine[rows, None].to(grad.dtype))
            logits_grad = (logits_grad * grad[rows, None]).to(ctx.dtype)
            hidden_grad[rows] = logits_grad @ product_weight
            if weight_grad is not None:
                weight_grad += logits_grad.T @ states
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        return hidden_grad, weight_grad, *(None,) * 4
