"""One optimizer update: forward and backward over the micro-batches of a global batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from minigpt.data.loader import Batch
from minigpt.model.attention import Attention, CausalAttention
from minigpt.model.decoder import Decoder, Runner, call
from minigpt.train.attention import MatmulAttention
from minigpt.train.objective import NextToken, Objective, cross_entropy_sum
from minigpt.train.optimizer import Optimizer

# Longer rows on a CPU would spend their time and memory on the upper triangle.
_MATMUL_ATTENTION_TOKENS = 1024


class StepResult(NamedTuple):
    """What one update came to."""

    loss: float
    """The objective's mean over the global batch; nats per valid target, or per pair."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    metrics: Mapping[str, float] = MappingProxyType({})
    """What else the objective tells of this process's micro-batches."""


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is NaN or infinite; the parameters are untouched."""


@dataclass(frozen=True)
class StepOptions:
    """How a step computes."""

    chunk_tokens: int
    """Tokens whose logits exist at once."""
    dtype: torch.dtype
    """Of matrix products."""
    clip_norm: float | None = None
    compile: bool = False


class TrainStep:
    """Runs updates of a model; compiled on first use where asked for.

    Args:
        model: Trained in place.
        optimizer: Over the parameters that are to learn.
        options: How to compute.
        objective: What to minimise; None is next-token cross-entropy.
    """

    def __init__(
        self,
        model: Decoder,
        optimizer: Optimizer,
        options: StepOptions,
        objective: Objective | None = None,
    ) -> None:
        self.chunk_tokens = options.chunk_tokens
        self.dtype = options.dtype
        self._model = model
        self._optimizer = optimizer
        self._options = options
        self._objective = objective or NextToken()
        self._parameters = list(model.parameters())
        self._device = self._parameters[0].device
        self._run: Runner = call
        self._cross_entropy_sum = cross_entropy_sum
        if options.compile:
            # One layer is compiled and serves all: compiling the whole model takes as many
            # times longer as it has layers, and runs no faster.
            # dynamic=False: shapes are fixed, and code that depends on the history of shapes
            # would differ, in its last bits, after a resume.
            self._run = torch.compile(call, dynamic=False)
            self._cross_entropy_sum = torch.compile(cross_entropy_sum, dynamic=False)

    def run(
        self,
        batches: Sequence[Batch],
        learning_rate_factor: float,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> StepResult | None:
        """Accumulate gradients over `batches`, clip them and update the parameters.

        Args:
            batches: The micro-batches of one global batch.
            learning_rate_factor: Factor of the peak learning rates.
            should_stop: Asked before each micro-batch.

        Returns:
            The result, or None where `should_stop` said so: then nothing has changed.

        Raises:
            NonFiniteError: Loss or gradient is not finite; nothing has changed.
        """
        loss = self.accumulate(batches, should_stop)
        if loss is None:
            self._optimizer.zero_grad()
            return None
        grad_norm = self.clip_gradients()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._optimizer.zero_grad()
            raise NonFiniteError(f"loss is {loss}, the gradient's norm is {grad_norm}")
        self._optimizer.step(learning_rate_factor)
        self._optimizer.zero_grad()
        return StepResult(loss, grad_norm, self._objective.metrics())

    def accumulate(
        self, batches: Sequence[Batch], should_stop: Callable[[], bool] = lambda: False
    ) -> float | None:
        """Add the gradient of the mean loss over all that counts in all `batches`.

        Returns:
            The mean loss, or None where stopped half way.
        """
        count = sum(self._objective.count(batch) for batch in batches)
        assert count, "a global batch without a single target"
        total = 0.0
        for batch in batches:
            if should_stop():
                return None
            loss = self._objective.loss_sum(self._model, batch, self)
            # Divided by the global count, not the micro-batch's: each token weighs the same.
            (loss / count).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total / count

    def clip_gradients(self) -> float:
        """Scale the gradient down to `clip_norm` where it is longer; return its norm before."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._options.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._options.clip_norm, norm)
        return float(norm)

    def hidden(self, model: Decoder, batch: Batch) -> Tensor:
        """See `train.objective.Compute`."""
        tensors = (batch.tokens, batch.positions, batch.documents)
        tokens, positions, documents = (t.to(self._device, non_blocking=True) for t in tensors)
        attention = self._attention(documents, model.config.sliding_window)
        mixed = self.dtype != self._parameters[0].dtype
        with torch.autocast(self._device.type, dtype=self.dtype, enabled=mixed):
            return model(tokens, positions, attention, self._run)  # type: ignore[no-any-return]

    def cross_entropy_sum(self, hidden: Tensor, output_weight: Tensor, targets: Tensor) -> Tensor:
        """See `train.objective.Compute`."""
        return self._cross_entropy_sum(
            hidden.flatten(0, 1),
            output_weight,
            targets.flatten(),
            chunk_tokens=self.chunk_tokens,
            dtype=self.dtype,
        )

    def _attention(self, documents: Tensor, window: int | None) -> Attention:
        if self._device.type == "cpu" and documents.shape[1] <= _MATMUL_ATTENTION_TOKENS:
            return MatmulAttention(documents, window)
        if bool((documents == documents[:, :1]).all()):
            return CausalAttention(None, window)  # the causal kernel needs no mask
        return CausalAttention(documents, window)
