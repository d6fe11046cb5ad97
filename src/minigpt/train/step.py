"""One optimizer update from the micro-batches of a global batch, alike on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch

from minigpt.data.loader import Batch
from minigpt.model.decoder import Decoder
from minigpt.train.config import MemoryConfig
from minigpt.train.expert_parallel import balance_experts
from minigpt.train.gradients import clip_gradients, gradient_norm
from minigpt.train.mesh import AXES, DATA_AXES
from minigpt.train.objective import NextToken, Objective
from minigpt.train.optimizer import Optimizer
from minigpt.train.parallelize import Spread, alone
from minigpt.train.passes import (
    LocalPasses,
    Passes,
    keep_experts_uncompiled,
    layer_runner,
    token_loss,
)
from minigpt.train.pipeline_parallel import PipelinePasses, Stage
from minigpt.train.precision import LossScale


class StepResult(NamedTuple):
    """What one update came to."""

    loss: float
    """The objective's mean over the global batch; nats per valid target, or per pair."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    metrics: Mapping[str, float] = MappingProxyType({})
    """Means over the global batch of what else the objective tells."""


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is NaN or infinite; the parameters are untouched.

    Raised on every rank of a run, whichever of them saw it.
    """


@dataclass(frozen=True)
class StepOptions:
    """How a step computes."""

    chunk_tokens: int
    """Tokens whose logits exist at once."""
    dtype: torch.dtype
    """Of matrix products."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; None never clips."""
    compile: bool = False
    """Compile layers and loss."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """What is kept of the forward pass."""
    router_bias_rate: float = 0.0
    """By how much a step moves the routers' biases."""


def make_passes(spread: Spread, options: StepOptions, objective: Objective | None = None) -> Passes:
    """Choose how the gradient of a global batch comes about on a mesh.

    Args:
        spread: The model, laid over its mesh.
        options: How to compute.
        objective: What to minimise; None is next-token cross-entropy, a pipeline's only one.
    """
    objective = objective or NextToken()
    if options.compile:
        keep_experts_uncompiled(spread.model)
    if spread.cut is not None:
        assert isinstance(objective, NextToken)
        num_layers = spread.model.config.num_layers
        return PipelinePasses(
            spread.cut,
            spread.mesh,
            loss_sum=token_loss(options.chunk_tokens, options.dtype, compile=options.compile),
            dtype=options.dtype,
            run=layer_runner(num_layers, options.memory, compile=options.compile),
            finish=spread.finish_gradients,
        )
    return LocalPasses(
        spread,
        objective,
        chunk_tokens=options.chunk_tokens,
        dtype=options.dtype,
        compile=options.compile,
        memory=options.memory,
    )


class TrainStep:
    """Runs updates of a model; every rank of its mesh calls it at the same point."""

    def __init__(
        self,
        model: Decoder | Stage,
        optimizer: Optimizer,
        options: StepOptions,
        objective: Objective | None = None,
        *,
        spread: Spread | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            model: Whose parameters learn.
            optimizer: Of those parameters.
            options: How a step computes.
            objective: What to minimise; None is next-token cross-entropy.
            spread: How the model is laid over a mesh; None is one process.
        """
        if spread is None:
            assert isinstance(model, Decoder)
            spread = alone(model)
        self._model, self._options = model, options
        self._counted = spread.counted
        self._mesh, self._cuts = spread.mesh, spread.cuts
        self._optimizer = optimizer
        self._objective = objective or NextToken()
        self._passes = make_passes(spread, options, self._objective)
        self._parameters = list(model.parameters())
        self._device = self._parameters[0].device
        self._count = 0  # of the last global batch
        self.loss_scale = LossScale() if options.dtype == torch.float16 else None

    def run(
        self,
        batches: Sequence[Batch],
        learning_rate_factor: float,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> StepResult | None:
        """Accumulate gradients over `batches`, clip them and update the parameters.

        Args:
            batches: This data rank's micro-batches of one global batch (`Mesh.micro_batches`).
            learning_rate_factor: Factor of the peak learning rates.
            should_stop: Asked before each micro-batch; with several processes once, before the
                first, and what one rank says all do.

        Returns:
            The result, or None where `should_stop` said so: then nothing has changed.

        Raises:
            NonFiniteError: Loss or gradient is not finite; nothing has changed.
        """
        result = self.compute(batches, should_stop)
        if result is None:
            return None
        if not self._all_finite(result.loss, result.grad_norm):
            self.discard()
            raise NonFiniteError(
                f"loss is {result.loss}, the gradient's norm is {result.grad_norm}"
            )
        self.update(learning_rate_factor)
        return result

    def compute(
        self, batches: Sequence[Batch], should_stop: Callable[[], bool] = lambda: False
    ) -> StepResult | None:
        """Form the clipped gradient of a global batch; `update` or `discard` comes next.

        The parameters are untouched. What float16 overflowed is computed again at a lower scale.

        Args:
            batches: As in `run`.
            should_stop: As in `run`.
        """
        loss = self.accumulate(batches, should_stop)
        if loss is None:
            self.discard()
            return None
        grad_norm = self.clip_gradients()
        while self._overflowed(loss, grad_norm):
            self.discard()
            # float16 overflowed: the same batches again, none is skipped.
            loss = self.accumulate(batches)
            assert loss is not None
            grad_norm = self.clip_gradients()
        return StepResult(loss, grad_norm, self._metrics())

    def update(self, learning_rate_factor: float) -> None:
        """Update the parameters from the gradient; the only place where they change."""
        self._optimizer.step(learning_rate_factor)
        self._optimizer.zero_grad()
        balance_experts(self._model, self._options.router_bias_rate, self._mesh)
        if self.loss_scale is not None:
            self.loss_scale.succeeded()

    def state(self) -> dict[str, float]:
        """Return what a resumed run needs besides weights and optimizer: the loss scale."""
        return {} if self.loss_scale is None else self.loss_scale.state()

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from a `state()`; from {} as at the beginning."""
        if self.loss_scale is not None:
            self.loss_scale = LossScale()
            if state:
                self.loss_scale.load_state(state)

    def discard(self) -> None:
        """Drop the gradient."""
        self._optimizer.zero_grad()

    def accumulate(
        self, batches: Sequence[Batch], should_stop: Callable[[], bool] = lambda: False
    ) -> float | None:
        """Form the gradient of the mean loss over all that counts in the global batch.

        Returns:
            The mean loss, or None where stopped half way.
        """
        self._objective.take_sums()  # of a try that was discarded
        count = sum(self._objective.count(batch) for batch in batches)
        if not self._mesh.is_single:
            stop = should_stop()
            count = self._sum(count, *DATA_AXES)
            if self._sum(stop, *AXES):
                return None
            should_stop = _never
        self._count = count
        assert count, "a global batch without a single target"
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        total = self._passes.run(batches, count / scale, should_stop)
        return None if total is None else total / count

    def clip_gradients(self) -> float:
        """Scale the gradient down to `clip_norm` where it is longer; return its norm before."""
        if self.loss_scale is not None:
            self.loss_scale.unscale(self._parameters)
        norm = gradient_norm(self._counted, self._mesh, self._cuts)
        if self._options.clip_norm is not None:
            clip_gradients(self._parameters, norm, self._options.clip_norm)
        return float(norm)

    def _metrics(self) -> Mapping[str, float]:
        """Divide the objective's sums over all data ranks by what they are means of."""
        sums = self._objective.take_sums()
        if not sums:
            return {}
        totals = torch.tensor(list(sums.values()), dtype=torch.float64, device=self._device)
        means = self._mesh.sum(totals, *DATA_AXES) / self._count
        return dict(zip(sums, means.tolist(), strict=True))

    def _overflowed(self, loss: float, grad_norm: float) -> bool:
        """Tell whether the loss scale was too large, and is lower now."""
        if self.loss_scale is None or self._all_finite(loss, grad_norm):
            return False
        return self.loss_scale.lower()

    def _all_finite(self, loss: float, grad_norm: float) -> bool:
        """Vote: a rank that alone went on, or alone stopped, would leave the others hanging."""
        return not self._sum(not (math.isfinite(loss) and math.isfinite(grad_norm)), *AXES)

    def _sum(self, value: int, *axes: str) -> int:
        if self._mesh.is_single:
            return int(value)
        return int(self._mesh.sum(torch.tensor(int(value), device=self._device), *axes))


def _never() -> bool:
    return False
