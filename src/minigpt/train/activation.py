"""What is kept of a forward pass for the backward pass, and what is computed again.

Layers are recomputed whole, or all but their matrix products, or only as many of them as a
memory budget asks for. On a GPU, what is kept may wait in the CPU's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from minigpt.model.decoder import Runner
from minigpt.model.layers import DecoderLayer
from minigpt.train.config import MemoryConfig

_LINEAR_MAPS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
)


def with_checkpoints(run: Runner, memory: MemoryConfig, num_layers: int) -> Runner:
    """Return a runner that calls layers through `run`, keeping what `memory` says.

    Args:
        run: How a layer is called.
        memory: With `checkpoint` = budget, resolved: `checkpoint_layers` is a number.
        num_layers: Of the whole model.
    """
    if memory.offload_activations:
        run = partial(_offloaded, run)
    if memory.checkpoint == "none":
        return run
    recomputed = num_layers
    if memory.checkpoint == "budget":
        assert memory.checkpoint_layers is not None
        recomputed = memory.checkpoint_layers
    contexts = _keep_products if memory.checkpoint == "selective" else None
    return partial(_checkpointed, run, recomputed, contexts)


def _checkpointed(
    run: Runner,
    layers: int,
    contexts: Callable[[], tuple[Any, Any]] | None,
    part: nn.Module,
    *inputs: Any,
) -> Tensor:
    if not isinstance(part, DecoderLayer) or part.self_attn.layer >= layers:
        return run(part, *inputs)
    options: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}
    # No dropout, so that there is no random state to bring back.
    result: Tensor = checkpoint(
        run, part, *inputs, use_reentrant=False, preserve_rng_state=False, **options
    )
    return result


def _offloaded(run: Runner, part: nn.Module, *inputs: Any) -> Tensor:
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return run(part, *inputs)


def _keep_products() -> tuple[Any, Any]:
    """Keep the results of the linear maps, which take most of a layer's time.

    Attention's own products are not kept: their scores would be the largest tensors of all.
    """
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return contexts


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in _LINEAR_MAPS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
