"""One optimizer update: forward and backward over the micro-batches of a global batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minigpt.data.loader import Batch
from minigpt.model.attention import Attention, CausalAttention
from minigpt.model.decoder import Decoder, Runner, call
from minigpt.train.attention import MatmulAttention
from minigpt.train.mesh import DATA_AXES, Mesh
from minigpt.train.objective import IGNORED_TARGET, cross_entropy_sum
from minigpt.train.optimizer import Optimizer

# Longer rows on a CPU would spend their time and memory on the upper triangle.
_MATMUL_ATTENTION_TOKENS = 1024


class StepResult(NamedTuple):
    """What one update came to."""

    loss: float
    """Mean cross-entropy over the global batch's valid targets, nats."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""


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
    """Runs updates of a model; compiled on first use where asked for."""

    def __init__(
        self,
        model: Decoder,
        optimizer: Optimizer,
        options: StepOptions,
        mesh: Mesh | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._options = options
        self._mesh = mesh
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
            batches: The micro-batches of one global batch, or this rank's block of them.
            learning_rate_factor: Factor of the peak learning rates.
            should_stop: Asked before each micro-batch.

        Returns:
            The result, or None where `should_stop` said so: then nothing has changed.

        Raises:
            NonFiniteError: Loss or gradient is not finite; nothing has changed.
        """
        result = self.compute(batches, should_stop)
        if result is None:
            return None
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            self.discard()
            raise NonFiniteError(f"loss is {result.loss}, the gradient's norm {result.grad_norm}")
        self.update(learning_rate_factor)
        return result

    def compute(
        self, batches: Sequence[Batch], should_stop: Callable[[], bool] = lambda: False
    ) -> StepResult | None:
        """Compute loss and clipped gradient of a global batch; `update` or `discard` comes next.

        The parameters are untouched. All ranks get the same numbers.

        Args:
            batches: As in `run`.
            should_stop: As in `run`.
        """
        loss = self.accumulate(batches, should_stop)
        if loss is None:
            self.discard()
            return None
        return StepResult(loss, self.clip_gradients())

    def update(self, learning_rate_factor: float) -> None:
        """Update the parameters from the gradient; the only place where they change."""
        self._optimizer.step(learning_rate_factor)
        self._optimizer.zero_grad()

    def discard(self) -> None:
        """Drop the gradient."""
        self._optimizer.zero_grad()

    def accumulate(
        self, batches: Sequence[Batch], should_stop: Callable[[], bool] = lambda: False
    ) -> float | None:
        """Add the gradient of the mean loss over all valid targets of all `batches`.

        Returns:
            The mean loss, or None where stopped half way.
        """
        valid = self._sum(float(sum(int((b.targets != IGNORED_TARGET).sum()) for b in batches)))
        assert valid, "a global batch without a single target"
        total = 0.0
        for batch in batches:
            if should_stop():
                return None
            loss = self._loss_sum(batch)
            # Divided by the global count, not the micro-batch's: each token weighs the same.
            (loss / valid).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if self._mesh is not None and self._mesh.data_size > 1:
            self._sum_gradients()
        return self._sum(total) / valid

    def clip_gradients(self) -> float:
        """Scale the gradient down to `clip_norm` where it is longer; return its norm before."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._options.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._options.clip_norm, norm)
        return float(norm)

    def _sum_gradients(self) -> None:
        assert self._mesh is not None
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        flat = self._mesh.sum(torch.cat([g.reshape(-1) for g in gradients]), *DATA_AXES)
        parts = torch.split(flat, [g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _sum(self, value: float) -> float:
        """Add up a number over the ranks that see different micro-batches."""
        if self._mesh is None or self._mesh.data_size == 1:
            return value
        return float(self._mesh.sum(torch.tensor(value, dtype=torch.float64), *DATA_AXES))

    def _loss_sum(self, batch: Batch) -> Tensor:
        tensors = (batch.tokens, batch.targets, batch.positions, batch.documents)
        tokens, targets, positions, documents = (
            t.to(self._device, non_blocking=True) for t in tensors
        )
        attention = self._attention(documents)
        mixed = self._options.dtype != self._parameters[0].dtype
        with torch.autocast(self._device.type, dtype=self._options.dtype, enabled=mixed):
            hidden = self._model(tokens, positions, attention, self._run)
        return self._cross_entropy_sum(
            hidden.flatten(0, 1),
            self._model.output_weight,
            targets.flatten(),
            chunk_tokens=self._options.chunk_tokens,
            dtype=self._options.dtype,
        )

    def _attention(self, documents: Tensor) -> Attention:
        window = self._model.config.sliding_window
        if self._device.type == "cpu" and documents.shape[1] <= _MATMUL_ATTENTION_TOKENS:
            return MatmulAttention(documents, window)
        if bool((documents == documents[:, :1]).all()):
            return CausalAttention(None, window)  # the causal kernel needs no mask
        return CausalAttention(documents, window)
