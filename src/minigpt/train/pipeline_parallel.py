"""Pipeline parallel: consecutive layers on different ranks, micro-batches passing through them.

The order of forward and backward passes is one of torch's schedules. Each rank reads all
micro-batches itself, so that only the residual stream and its gradient travel; a stage makes its
attention from the documents. Zero-bubble splits the backward pass of a stage in two, for its input
and for its weights: the second comes later and fills what would be idle time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from minigpt.core.errors import ConfigError
from minigpt.data.loader import Batch
from minigpt.model.decoder import Decoder, Runner, call
from minigpt.train.config import MeshConfig
from minigpt.train.context_parallel import choose_attention, own_columns
from minigpt.train.mesh import LOSS_AXES, Mesh

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}

LossSum = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Sums the loss of (B, T, C) hidden states, an output projection and (B, T) targets."""


class Stage(nn.Module):
    """Some layers of a decoder, by the decoder's names, sharing its parameters.

    Args:
        decoder: The whole; stays usable.
        layers: Ascending numbers of the layers.
        context: The ranks over which rows are cut, None where each has whole rows.

    Attributes:
        run: How layers and the final norm are called.
        dtype: Of matrix products; None is that of the weights.
        gradients_ready: Called after a step's last backward pass, before gradients are exchanged.
    """

    def __init__(
        self, decoder: Decoder, layers: Sequence[int], context: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.config = decoder.config
        self.is_first = layers[0] == 0
        self.is_last = layers[-1] == self.config.num_layers - 1
        self.model = _Part(decoder, layers, first=self.is_first, last=self.is_last)
        self.lm_head = decoder.lm_head if self.is_last else None
        self.run: Runner = call
        self.dtype: torch.dtype | None = None
        self.gradients_ready: Callable[[], None] = lambda: None
        self._context = context

    def forward(self, inputs: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        """Pass one micro-batch through the layers.

        Args:
            inputs: (B, T) tokens for the first stage, (B, T, C) the residual stream for others.
            positions: (B, T).
            documents: (B, T), of whole rows where context parallel cuts them.

        Returns:
            (B, T, C): the residual stream; of the last stage its norm.
        """
        part = self.model
        mixed = self.dtype not in (None, next(self.parameters()).dtype)
        with torch.autocast(inputs.device.type, dtype=self.dtype, enabled=mixed):
            hidden = part.embed(inputs, positions) if self.is_first else inputs
            rotation = part.rotary(positions) if part.rotary is not None else None
            attention = choose_attention(documents, self.config.sliding_window, self._context)
            for layer in part.layers.values():
                hidden = self.run(layer, hidden, rotation, attention)
            return self.run(part.norm, hidden) if part.norm is not None else hidden

    @property
    def output_weight(self) -> Tensor | None:
        """The last stage's (V, C) output projection."""
        if not self.is_last:
            return None
        owner = self.lm_head if self.lm_head is not None else self.model.embed_tokens
        assert owner is not None and isinstance(owner.weight, Tensor)
        return owner.weight


class _Part(nn.Module):
    """What a stage has of a decoder's trunk; a tied embedding is in the first and the last."""

    def __init__(self, decoder: Decoder, layers: Sequence[int], *, first: bool, last: bool) -> None:
        super().__init__()
        trunk = decoder.model
        tied = last and decoder.lm_head is None
        self.embed_tokens = trunk.embed_tokens if first or tied else None
        self.embed_positions = trunk.embed_positions if first else None
        self.rotary = trunk.rotary
        self.layers = nn.ModuleDict({str(number): trunk.layers[number] for number in layers})
        self.norm = trunk.norm if last else None

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        assert self.embed_tokens is not None
        hidden: Tensor = self.embed_tokens(tokens)
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(positions)
        return hidden


class Cut(NamedTuple):
    """What one rank has of a decoder that is cut into stages; the rest is free when dropped."""

    held: Stage
    """All of it, by the decoder's names: for the optimizer, for saving."""
    stages: list[Stage]
    """The same, stage by stage; where FSDP is to wrap them, before the first pass."""


def cut_stages(decoder: Decoder, mesh: Mesh) -> Cut:
    """Cut a decoder into stages of about equal work and take this rank's, every pp-th.

    Args:
        decoder: Initialised alike on all ranks; tensor and expert parallel already, if at all.
        mesh: With a pp axis.

    Raises:
        ConfigError: Fewer layers than stages.
    """
    config, context = decoder.config, mesh.group("cp")
    head = config.vocab_size * config.hidden_size
    per_layer = (config.parameter_counts().matmul - head) / config.num_layers
    count = mesh.size("pp") * mesh.config.virtual_stages
    parts = balance_layers(config.num_layers, count, last_extra=head / per_layer)
    own = parts[mesh.rank("pp") :: mesh.size("pp")]
    held = Stage(decoder, [layer for part in own for layer in part], context)
    return Cut(held, [Stage(decoder, part, context) for part in own])


class PipelinePasses:
    """Forward and backward passes of this rank's stages, in turn with the other ranks'."""

    def __init__(
        self,
        cut: Cut,
        mesh: Mesh,
        *,
        loss_sum: LossSum,
        dtype: torch.dtype,
        run: Runner = call,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare to run.

        Args:
            cut: This rank's stages.
            mesh: With a pp axis.
            loss_sum: The last stage's loss.
            dtype: Of matrix products.
            run: How layers and the final norm are called.
            finish: Sums gradients over other axes, called after the last backward pass.
        """
        group = mesh.group("pp")
        assert group is not None
        self._group, self._mesh = group, mesh
        self._rank, self._size = mesh.rank("pp"), mesh.size("pp")
        self._cut = cut
        for stage in cut.stages:
            stage.run, stage.dtype = run, dtype
        self._loss_sum = loss_sum
        self._finish = finish
        self._schedules: dict[tuple[int, ...], Any] = {}
        self._divisor = 1.0

    def run(
        self,
        batches: Sequence[Batch],
        divisor: float,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> float | None:
        """Leave in each parameter's `grad` the gradient of the global loss sum / `divisor`.

        Args:
            batches: This data rank's micro-batches, the same on every pipeline rank.
            divisor: What the loss is divided by before it is differentiated.
            should_stop: Asked once, before the first; every rank must hear the same.

        Returns:
            The loss summed over the targets of the global batch, the same on every rank; None
            where stopped.

        Raises:
            ConfigError: The rows can't be cut into as many pieces as the schedule needs.
        """
        if should_stop():
            return None
        self._divisor = divisor
        names = ("tokens", "targets", "positions", "documents")
        tokens, targets, positions, documents = (
            torch.cat([getattr(batch, name) for batch in batches]).to(self._mesh.device_type)
            for name in names
        )
        place = self._mesh.rank("cp"), self._mesh.size("cp")
        tokens, targets, positions = (own_columns(t, *place) for t in (tokens, targets, positions))
        pieces = count_pieces(self._mesh.config, len(batches), len(tokens))
        losses: list[Tensor] = []
        self._schedule(pieces, tokens).step(
            *([tokens] if self._rank == 0 else []),
            target=targets if self._rank == self._size - 1 else None,
            losses=losses,
            return_outputs=False,
            positions=positions,
            documents=documents,
        )
        self._cut.held.gradients_ready()
        self._finish()
        if self._cut.held.config.tie_embeddings:
            self._sum_tied_gradients()
        total = torch.zeros((), dtype=torch.float64, device=tokens.device)
        for loss in losses:
            total += loss.detach()
        return float(self._mesh.sum(self._mesh.sum(total, "pp"), *LOSS_AXES)) * divisor

    def _schedule(self, pieces: int, tokens: Tensor) -> Any:
        """Return torch's schedule for this many pieces of (rows, T) tokens, made once."""
        key = (pieces, *tokens.shape)
        if key not in self._schedules:
            kind = _SCHEDULES[self._mesh.config.schedule]
            stages = self._torch_stages(tokens.shape[0] // pieces, tokens)
            looped = issubclass(kind, PipelineScheduleMulti)
            self._schedules[key] = kind(
                stages if looped else stages[0], pieces, loss_fn=self._loss, scale_grads=False
            )
        return self._schedules[key]

    def _torch_stages(self, rows: int, tokens: Tensor) -> list[PipelineStage]:
        # Shapes are given: torch would find them by a forward pass of its own.
        held, length = self._cut.held, tokens.shape[1]
        dtype, width = next(held.parameters()).dtype, held.config.hidden_size
        first = torch.empty(rows, length, dtype=tokens.dtype, device="meta")
        stream = torch.empty(
            # Between layers, tensor parallel ranks have a part of the sequence each.
            (rows, length // self._mesh.size("tp"), width),
            dtype=dtype,
            device="meta",
            requires_grad=True,
        )
        count = self._size * self._mesh.config.virtual_stages
        numbers = range(self._rank, count, self._size)
        return [
            _TorchStage(
                stage,
                number,
                count,
                tokens.device,
                input_args=first if stage.is_first else stream,
                output_args=stream,
                group=self._group,
            )
            for number, stage in zip(numbers, self._cut.stages, strict=True)
        ]

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        weight = self._cut.held.output_weight
        assert weight is not None
        return self._loss_sum(hidden, weight, targets) / self._divisor

    def _sum_tied_gradients(self) -> None:
        """Give the first and the last rank the sum of what their copies of a weight gathered."""
        ends = {0: self._size - 1, self._size - 1: 0}
        if self._rank not in ends:
            return
        embedding = self._cut.held.model.embed_tokens
        assert embedding is not None
        gradient = embedding.weight.grad
        if not embedding.weight.requires_grad:  # frozen, beside adapters
            return
        assert gradient is not None
        own = _local(gradient)
        other = torch.empty_like(own)
        peer = dist.get_global_rank(self._group, ends[self._rank])
        exchange = [
            dist.P2POp(dist.isend, own, peer, self._group),
            dist.P2POp(dist.irecv, other, peer, self._group),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        own += other  # a + b and b + a are the same bits


class _TorchStage(PipelineStage):
    """Torch's stage, whose split backward pass finds weights that FSDP shards."""

    def backward_maybe_with_nosync(
        self, backward_type: str, *arguments: Any, **keywords: Any
    ) -> Any:
        """Gather the weights first where the backward pass is split.

        Torch looks the stage's parameters up before it enters autograd, whose hooks would gather
        them: it would find the shards (zero3), which no graph leads to, and leave the weights
        without a gradient.
        """
        if backward_type != "full":
            for module in self.submod.modules():
                if isinstance(module, FSDPModule):
                    module.unshard()
        return super().backward_maybe_with_nosync(backward_type, *arguments, **keywords)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, or a plain tensor as it is."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def count_pieces(config: MeshConfig, micro_batches: int, rows: int) -> int:
    """Return how many pieces pass through a pipeline: micro-batches, cut up where too few.

    Args:
        config: The mesh.
        micro_batches: Of a data rank.
        rows: In all of them.

    Raises:
        ConfigError: The rows can't be cut into as many pieces as the schedule needs.
    """
    for pieces in range(micro_batches, rows + 1, micro_batches):
        if rows % pieces == 0 and _fits(config, pieces):
            return pieces
    raise ConfigError(
        f"mesh.schedule = {config.schedule} over mesh.pp = {config.pp} ranks can't be fed from "
        f"{micro_batches} micro-batches of {rows // micro_batches} rows",
        remedy="use a multiple of mesh.pp micro-batches, or more rows in each",
    )


def _fits(config: MeshConfig, pieces: int) -> bool:
    if config.schedule == "gpipe":
        return True
    if config.schedule == "1f1b":
        return pieces >= config.pp
    return pieces % max(1, pieces // config.pp) == 0  # rounds of equally many


def balance_layers(num_layers: int, num_stages: int, *, last_extra: float = 0.0) -> list[list[int]]:
    """Deal layers out to stages in order, each at least one, so that the largest load is least.

    Args:
        num_layers: Layers, all of cost 1.
        num_stages: Stages.
        last_extra: What the last stage does besides.

    Raises:
        ConfigError: Fewer layers than stages.
    """
    if num_layers < num_stages:
        raise ConfigError(
            f"model.num_layers = {num_layers} is fewer than the pipeline's {num_stages} stages",
            remedy="lower mesh.pp or mesh.virtual_stages, or use more layers",
        )
    counts = [1] * num_stages
    for _ in range(num_layers - num_stages):
        loads = [count + last_extra * (i == num_stages - 1) for i, count in enumerate(counts)]
        counts[loads.index(min(loads))] += 1
    starts = [sum(counts[:i]) for i in range(num_stages)]
    return [list(range(start, start + n)) for start, n in zip(starts, counts, strict=True)]
