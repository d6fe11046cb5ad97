"""Forward and backward passes over a rank's micro-batches, up to the gradient of the global batch.

`Passes` is what a step needs to know. `LocalPasses` runs the whole model on each rank, sharded or
not; a pipeline has passes of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import DTensor

from minigpt.data.loader import Batch
from minigpt.model.decoder import Decoder, Runner, call
from minigpt.model.moe import MixtureOfExperts
from minigpt.train.activation import with_checkpoints
from minigpt.train.config import MemoryConfig
from minigpt.train.context_parallel import choose_attention, own_columns
from minigpt.train.mesh import LOSS_AXES
from minigpt.train.objective import Objective, cross_entropy_sum
from minigpt.train.parallelize import Spread
from minigpt.train.pipeline_parallel import LossSum
from minigpt.train.token_likelihood import token_nll
from minigpt.train.tree import TreeSum, butterfly_sum
from minigpt.train.vocab_parallel import local_vocabulary, vocab_parallel_cross_entropy_sum


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
            The loss summed over the global batch, the same on every rank,
            or None where stopped half way: then the gradients are worthless.
        """
        ...


class LocalPasses:
    """Passes through the model as this rank calls it; compiled on first use where asked for.

    The objective's `Compute`. Attributes: see there.
    """

    def __init__(
        self,
        spread: Spread,
        objective: Objective,
        *,
        chunk_tokens: int,
        dtype: torch.dtype,
        compile: bool = False,
        memory: MemoryConfig = MemoryConfig(),  # noqa: B008 (frozen)
    ) -> None:
        """Prepare to run.

        Args:
            spread: The model, laid over its mesh.
            objective: What to minimise.
            chunk_tokens: Tokens whose logits exist at once.
            dtype: Of matrix products.
            compile: Compile layers and loss.
            memory: What is kept of the forward pass.
        """
        self._spread = spread
        self._objective = objective
        self.chunk_tokens = chunk_tokens
        self.dtype = dtype
        parameter = next(spread.model.parameters())
        self._device, self._weight_dtype = parameter.device, parameter.dtype
        self._run = layer_runner(spread.model.config.num_layers, memory, compile=compile)
        self._token_loss_sum = token_loss(chunk_tokens, dtype, compile=compile)
        self.sharers = spread.mesh.size("cp")

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
                loss = self._loss_sum(batch)
                # Divided by the global count, not the micro-batch's: each token weighs the same.
                (loss / (divisor / self._spread.divides_by)).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self._spread.finish_gradients()
        mesh = self._spread.mesh
        if mesh.is_single:
            return total
        sums = torch.tensor(total, dtype=torch.float64, device=self._device)
        return float(mesh.sum(sums, *LOSS_AXES))

    def hidden(self, model: Decoder, batch: Batch) -> Tensor:
        """See `train.objective.Compute`."""
        tensors = (batch.tokens, batch.positions, batch.documents)
        tokens, positions, documents = (t.to(self._device, non_blocking=True) for t in tensors)
        context, dtype = self._spread.mesh.group("cp"), self.dtype
        attention = choose_attention(documents, model.config.sliding_window, context)
        tokens, positions = self.own(tokens), self.own(positions)
        # A wrapper awaits a backward pass: what is frozen or not to be differentiated has none.
        learns = model is self._spread.model and torch.is_grad_enabled()
        forward = self._spread.call if learns else model
        with torch.autocast(self._device.type, dtype, enabled=dtype != self._weight_dtype):
            found: Tensor = forward(tokens, positions, attention, self._run)
        return found

    def cross_entropy_sum(self, hidden: Tensor, output_weight: Tensor, targets: Tensor) -> Tensor:
        """See `train.objective.Compute`."""
        return self._token_loss_sum(hidden, output_weight, self.own(targets))

    def row_nll(self, hidden: Tensor, output_weight: Tensor, targets: Tensor) -> Tensor:
        """See `train.objective.Compute`."""
        own = self.own(targets)
        states, weight, part = local_vocabulary(hidden, output_weight)
        nll = token_nll(
            states, weight, own.flatten(), part, chunk_tokens=self.chunk_tokens, dtype=self.dtype
        )
        sums = nll.view_as(own).sum(-1)
        context = self._spread.mesh.group("cp")
        return sums if context is None else all_reduce(sums, group=context)  # type: ignore[no-untyped-call]

    def own(self, tensor: Tensor) -> Tensor:
        """See `train.objective.Compute`."""
        mesh = self._spread.mesh
        return own_columns(tensor, mesh.rank("cp"), mesh.size("cp"))

    def _loss_sum(self, batch: Batch) -> Tensor:
        model = self._spread.model
        assert isinstance(model, Decoder)  # a pipeline's stages have passes of their own
        return self._objective.loss_sum(model, batch, self)

    def _run_tree(
        self, batches: Sequence[Batch], divisor: float, should_stop: Callable[[], bool]
    ) -> float | None:
        """As `run`, with sums whose order is that of the micro-batches; see `train.tree`."""
        parameters = [p for p in self._spread.model.parameters() if p.requires_grad]
        tree = TreeSum()
        for batch in batches:
            if should_stop():
                return None
            loss = self._loss_sum(batch)
            (loss / divisor).backward()  # type: ignore[no-untyped-call]
            tree.add([loss.detach().double(), *(_taken_gradient(p) for p in parameters)])
        total, *gradients = sums = tree.total()
        butterfly_sum(sums, self._spread.mesh.group("dp"))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return float(total)


def layer_runner(num_layers: int, memory: MemoryConfig, *, compile: bool) -> Runner:
    """Return how a model's layers are called."""
    # One layer is compiled and serves all: compiling the whole model takes as many times longer
    # as it has layers, and runs no faster.
    # dynamic=False: shapes are fixed, and code that depends on the history of shapes would
    # differ, in its last bits, after a resume.
    run: Runner = torch.compile(call, dynamic=False) if compile else call
    return with_checkpoints(run, memory, num_layers)


def keep_experts_uncompiled(model: nn.Module) -> None:
    """Let compiled layers call their mixtures of experts as they are.

    How many tokens an expert gets changes with each batch, and compiled code is for fixed shapes.
    """
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign, no-untyped-call]


def token_loss(chunk_tokens: int, dtype: torch.dtype, *, compile: bool) -> LossSum:
    """Return the summed cross-entropy, of a whole or a spread vocabulary.

    Args:
        chunk_tokens: Tokens whose logits exist at once.
        dtype: Of matrix products.
        compile: Compile it.
    """
    whole = torch.compile(cross_entropy_sum, dynamic=False) if compile else cross_entropy_sum

    def loss_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if isinstance(weight, DTensor):
            return vocab_parallel_cross_entropy_sum(
                hidden, weight, targets, chunk_tokens=chunk_tokens, dtype=dtype
            )
        return whole(
            hidden.flatten(0, 1), weight, targets.flatten(), chunk_tokens=chunk_tokens, dtype=dtype
        )

    return loss_sum


def _taken_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None, "a parameter that the loss does not depend on"
    parameter.grad = None
    return gradient
