"""Distillation: a student learns a teacher's distribution besides the text itself.

For each valid target, with student s and teacher t softened by a temperature T,
    loss = w T^2 D(t, s) + (1 - w) cross-entropy
(Hinton et al. 2015, https://arxiv.org/abs/1503.02531; T^2 keeps the gradients' size). D is
KL(t || s), which covers all of the teacher's modes, KL(s || t), which settles on some, or the
Jensen-Shannon divergence with equal parts (https://arxiv.org/abs/2306.13649).
Like the cross-entropy, it forms logits and gradients a chunk of tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from minigpt.data.loader import Batch
from minigpt.model.decoder import Decoder
from minigpt.train.objective import IGNORED_TARGET, Compute
from minigpt.train.vocab_parallel import WHOLE_VOCABULARY, VocabularyPart, local_vocabulary

Divergence = Literal["forward-kl", "reverse-kl", "jsd"]


class DistillationObjective:
    """A mean over valid targets, as of `train.objective.NextToken`.

    Args:
        teacher: On the student's device; frozen here.
        divergence: D.
        temperature: T.
        weight: w, the share of the divergence; the rest is cross-entropy with the text.
    """

    def __init__(
        self, teacher: Decoder, *, divergence: Divergence, temperature: float, weight: float
    ) -> None:
        self._teacher = teacher.requires_grad_(False).eval()
        self._divergence = divergence
        self._temperature = temperature
        self._weight = weight

    def count(self, batch: Batch) -> int:
        """Count the valid targets."""
        return int((batch.targets != IGNORED_TARGET).sum())

    def loss_sum(self, model: Decoder, batch: Batch, compute: Compute) -> Tensor:
        """Sum the mixed loss, nats."""
        with torch.no_grad():
            teacher_hidden = compute.hidden(self._teacher, batch).flatten(0, 1)
        hidden = compute.hidden(model, batch)
        tokens, weight, part = local_vocabulary(hidden, model.output_weight)
        teacher_weight = self._teacher.output_weight[part.start : part.start + len(weight)]
        return distillation_sum(
            tokens,
            weight,
            teacher_hidden,
            teacher_weight,
            compute.own(batch.targets.to(hidden.device, non_blocking=True)).flatten(),
            part,
            divergence=self._divergence,
            temperature=self._temperature,
            mix=self._weight,
            chunk_tokens=compute.chunk_tokens,
            dtype=compute.dtype,
        )

    def take_sums(self) -> Mapping[str, float]:
        """Return nothing: validation measures the text's likelihood alone."""
        return {}


def distillation_sum(
    hidden: Tensor,
    output_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    part: VocabularyPart = WHOLE_VOCABULARY,
    *,
    divergence: Divergence,
    temperature: float,
    mix: float,
    chunk_tokens: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum the distillation loss (nats) over valid targets.

    Args:
        hidden: (N, C) the student's final hidden states.
        output_weight: (V, C), or this rank's rows of it.
        teacher_hidden: (N, D) the teacher's; no gradient flows to it.
        teacher_weight: (V, D), the same rows.
        targets: (N,) token ids, `IGNORED_TARGET` where nothing counts.
        part: Which rows those are.
        divergence: Between teacher and student.
        temperature: Divides both models' logits, in the divergence alone.
        mix: Weight of the divergence; 1 - mix is the cross-entropy's.
        chunk_tokens: Rows of logits that exist at a time.
        dtype: Of the matrix products; None is that of `output_weight`.

    Returns:
        Scalar, differentiable once with respect to `hidden` and `output_weight`; the same on all
        ranks that share the vocabulary.
    """
    accurate = torch.promote_types(output_weight.dtype, torch.float32)
    gap = _GAPS[divergence]

    def chunk(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        product = teacher_hidden[rows].to(compute_dtype) @ teacher_product.T
        return _chunk(
            logits.to(accurate), product.to(accurate), targets[rows], part, gap, temperature, mix
        )

    compute_dtype = dtype or output_weight.dtype
    with torch.no_grad():
        teacher_product = teacher_weight.to(compute_dtype)
    loss: Tensor = _ChunkedSum.apply(  # type: ignore[no-untyped-call]
        hidden, output_weight, chunk, chunk_tokens, compute_dtype
    )
    return loss


class _ChunkedSum(torch.autograd.Function):
    """Sums `chunk(rows, logits) -> (loss, gradient of the logits)` over chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        chunk: Callable[[slice, Tensor], tuple[Tensor, Tensor]],
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> Tensor:
        accurate = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            product_weight = weight.to(dtype)
            loss = torch.zeros((), dtype=accurate, device=hidden.device)
            hidden_grad = torch.empty_like(hidden)
            trains_weight = ctx.needs_input_grad[1]
            weight_grad = torch.zeros_like(weight, dtype=accurate) if trains_weight else None
            for start in range(0, hidden.shape[0], chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                states = hidden[rows].to(dtype)
                chunk_loss, logits_grad = chunk(rows, states @ product_weight.T)
                loss = loss + chunk_loss
                logits_grad = logits_grad.to(dtype)
                hidden_grad[rows] = logits_grad @ product_weight
                if weight_grad is not None:
                    weight_grad += logits_grad.T @ states
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        if weight_grad is not None:
            weight_grad = (weight_grad * loss_grad).to(ctx.weight_dtype)
        return hidden_grad * loss_grad.to(hidden_grad.dtype), weight_grad, None, None, None


Total = Callable[[Tensor], Tensor]
"""Adds values of this rank's part of the vocabulary up over all of it, (n, v) to (n,)."""
Gap = Callable[[Tensor, Tensor, Total], tuple[Tensor, Tensor]]


def _chunk(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    part: VocabularyPart,
    gap: Gap,
    temperature: float,
    mix: float,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of (n, v) logits and its gradient for the student's."""
    labels, mine = part.find(targets, student.shape[1])
    labels, mine = labels[:, None], mine[:, None]
    distance, gradient = gap(
        part.log_softmax(student / temperature), part.log_softmax(teacher / temperature), part.sum
    )
    plain = part.log_softmax(student)
    entropy = -part.sum(plain.gather(-1, labels) * mine)
    entropy_grad = plain.exp().scatter_add(-1, labels, -mine.to(plain.dtype))
    loss = mix * temperature**2 * distance + (1 - mix) * entropy
    gradient = mix * temperature * gradient + (1 - mix) * entropy_grad
    valid = targets != IGNORED_TARGET
    return torch.where(valid, loss, 0.0).sum(), gradient * valid[:, None]


def _forward_kl(student: Tensor, teacher: Tensor, total: Total) -> tuple[Tensor, Tensor]:
    """KL(t || s) of (n, v) log-probabilities, and its gradient for the softened logits."""
    weights = teacher.exp()
    return total(weights * (teacher - student)), student.exp() - weights


def _reverse_kl(student: Tensor, teacher: Tensor, total: Total) -> tuple[Tensor, Tensor]:
    """KL(s || t), likewise."""
    ratio = student - teacher
    weights = student.exp()
    distance = total(weights * ratio)
    return distance, weights * (ratio - distance[:, None])


def _jsd(student: Tensor, teacher: Tensor, total: Total) -> tuple[Tensor, Tensor]:
    """Jensen-Shannon: the mean of both models' KL from their even mixture, likewise."""
    mixture = torch.logaddexp(student, teacher) - math.log(2)
    ratio = student - mixture
    weights = student.exp()
    own = total(weights * ratio)
    distance = 0.5 * own + 0.5 * total(teacher.exp() * (teacher - mixture))
    return distance, 0.5 * weights * (ratio - own[:, None])


_GAPS: Mapping[Divergence, Gap] = {
    "forward-kl": _forward_kl,
    "reverse-kl": _reverse_kl,
    "jsd": _jsd,
}
