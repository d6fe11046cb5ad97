"""Forward and backward passes over a rank's micro-batches, up to the gradient of the global batch.

`Passes` is what a step needs to know. `LocalPasses` runs the whole model on each rank, sharded or
not; a pipeline has passes of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from minigpt.data.loader import Batch
from minigpt.model.attention import Attention, CausalAttention
from minigpt.model.decoder import Runner, call
from minigpt.train.activation import with_checkpoints
from minigpt.train.attention import MatmulAttention
from minigpt.train.config import MemoryConfig
from minigpt.train.mesh import LOSS_AXES
from minigpt.train.objective import cross_entropy_sum
from minigpt.train.parallelize import Spread
from minigpt.train.tree import TreeSum, butterfly_sum
from minigpt.train.vocab_parallel import vocab_parallel_cross_entropy_sum

# Longer rows on a CPU would spend their time and memory on the upper triangle.
_MATMUL_ATTENTION_TOKENS = 1024


class Passes(Protocol):
    """Runs a global batch's micro-batches forward and backward."""

    def run(
        self, batches: Sequence[Batch], divisor: float, should_stop: Callable[[], bool]
    ) -> float | None:
        """Leave in each parameter's `grad` the gradient of the global loss sum / `divisor`.

        "Global" is over the micro-batches of all data ranks; a sharded parameter's `grad` is its
        shard's, in the parameter's own layout. Every rank calls it at the same point.

        Args:
            batches: This data rank's micro-batches, in order.
            divisor: What the loss is divided by before it is differentiated.
            should_stop: Asked before each micro-batch; always false in a run of several
                processes, which agree on stopping before they begin.

        Returns:
            The loss summed over the valid targets of the global batch, the same on every rank,
            or None where stopped half way: then the gradients are worthless.
        """
        ...


class LocalPasses:
    """Passes through the model as this rank calls it; compiled on first use where asked for."""

    def __init__(
        self,
        spread: Spread,
        *,
        chunk_tokens: int,
        dtype: torch.dtype,
        compile: bool = False,
        memory: MemoryConfig = MemoryConfig(),  # noqa: B008 (frozen)
    ) -> None:
        """Prepare to run.

        Args:
            spread: The model, laid over its mesh.
            chunk_tokens: Tokens whose logits exist at once.
            dtype: Of matrix products.
            compile: Compile layers and loss.
            memory: What is kept of the forward pass.
        """
        self._spread = spread
        self._chunk_tokens = chunk_tokens
        self._dtype = dtype
        parameter = next(spread.model.parameters())
        self._device, self._weight_dtype = parameter.device, parameter.dtype
        run: Runner = call
        self._cross_entropy_sum = cross_entropy_sum
        if compile:
            # One layer is compiled and serves all: compiling the whole model takes as many
            # times longer as it has layers, and runs no faster.
            # dynamic=False: shapes are fixed, and code that depends on the history of shapes
            # would differ, in its last bits, after a resume.
            run = torch.compile(call, dynamic=False)
            self._cross_entropy_sum = torch.compile(cross_entropy_sum, dynamic=False)
        self._run = with_checkpoints(run, memory, spread.model.config.num_layers)

    def run(
        self, batches: Sequence[Batch], divisor: float, should_stop: Callable[[], bool]
    ) -> float | None:
        """See `Passes`."""
        if self._spread.mesh.config.reduce == "tree":
            return self._run_tree(batches, divisor, should_stop)
        total = 0.0
        for index, batch in enumerate(batches):
            if should_stop():
                return None
            with self._spread.micro_batch(is_last=index == len(batches) - 1):
                loss = self.loss_sum(batch)
                # Divided by the global count, not the micro-batch's: each token weighs the same.
                (loss / (divisor / self._spread.divides_by)).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self._spread.finish_gradients()
        mesh = self._spread.mesh
        if mesh.is_single:
            return total
        sums = torch.tensor(total, dtype=torch.float64, device=self._device)
        return float(mesh.sum(sums, *LOSS_AXES))

    def loss_sum(self, batch: Batch) -> Tensor:
        """Return the loss summed over a micro-batch's valid targets, to be differentiated."""
        tensors = (batch.tokens, batch.targets, batch.positions, batch.documents)
        tokens, targets, positions, documents = (
            t.to(self._device, non_blocking=True) for t in tensors
        )
        attention = self._attention(documents)
        dtype = self._dtype
        with torch.autocast(self._device.type, dtype, enabled=dtype != self._weight_dtype):
            hidden = self._spread.call(tokens, positions, attention, self._run)
        weight = self._spread.model.output_weight
        chunk = self._chunk_tokens
        if isinstance(weight, DTensor):
            return vocab_parallel_cross_entropy_sum(
                hidden, weight, targets, chunk_tokens=chunk, dtype=dtype
            )
        return self._cross_entropy_sum(
            hidden.flatten(0, 1), weight, targets.flatten(), chunk_tokens=chunk, dtype=dtype
        )

    def _run_tree(
        self, batches: Sequence[Batch], divisor: float, should_stop: Callable[[], bool]
    ) -> float | None:
        """As `run`, with sums whose order is that of the micro-batches; see `train.tree`."""
        parameters = list(self._spread.model.parameters())
        tree = TreeSum()
        for batch in batches:
            if should_stop():
                return None
            loss = self.loss_sum(batch)
            (loss / divisor).backward()  # type: ignore[no-untyped-call]
            tree.add([loss.detach().double(), *(_taken_gradient(p) for p in parameters)])
        total, *gradients = sums = tree.total()
        butterfly_sum(sums, self._spread.mesh.group("dp"))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return float(total)

    def _attention(self, documents: Tensor) -> Attention:
        window = self._spread.model.config.sliding_window
        if self._device.type == "cpu" and documents.shape[1] <= _MATMUL_ATTENTION_TOKENS:
            return MatmulAttention(documents, window)
        if bool((documents == documents[:, :1]).all()):
            return CausalAttention(None, window)  # the causal kernel needs no mask
        return CausalAttention(documents, window)


def _taken_gradient(parameter: torch.nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None, "a parameter that the loss does not depend on"
    parameter.grad = None
    return gradient
