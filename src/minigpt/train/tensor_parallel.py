"""Tensor and sequence parallelism of an ordinary decoder, applied from outside.

Projections are cut by heads and by inner width (https://arxiv.org/abs/1909.08053); between them
the residual stream is cut along the sequence, so that norms and sums are not done twice
(https://arxiv.org/abs/2205.05198). The embedding, tied or not, and the head are cut along the
vocabulary; `train.vocab_parallel` computes the loss from them. An adapter is cut as the projection
that it lies beside.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from minigpt.model.decoder import Decoder
from minigpt.model.lora import LoraLinear
from minigpt.model.moe import MixtureOfExperts

_SEQUENCE, _HEADS = 1, 2


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Turn a decoder's parameters into shards, in place; its forward then talks to the other ranks.

    Afterwards the decoder maps whole rows of tokens to this rank's part of the sequence of
    hidden states: (B, T) to (B, T / ranks, C). Rank 0's weights are those that count.

    Args:
        model: With `num_heads`, `num_kv_heads`, `intermediate_size` and `vocab_size` divisible
            by the ranks (`train.mesh.check_model`). Parts that are None (pipeline stages) are
            passed over.
        mesh: One axis.
    """
    trunk = model.model
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    sequence = SequenceParallel(sequence_dim=_SEQUENCE, use_local_output=True)
    plan: dict[str, ParallelStyle] = {
        "embed_tokens": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(_SEQUENCE), use_local_output=True
        ),
        "embed_positions": _SequenceEmbedding(),
        "norm": sequence,
    }
    present = {name: style for name, style in plan.items() if getattr(trunk, name) is not None}
    parallelize_module(trunk, mesh, present)
    for layer in trunk.layers:
        parallelize_module(layer, mesh, _layer_plan(layer, sequence))
    if model.lm_head is not None:
        # The loss reads it, no forward of its module.
        _replace(model.lm_head, "weight", mesh, Shard(0))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)  # torch's sequence parallel style forgets it


def _layer_plan(layer: nn.Module, sequence: SequenceParallel) -> dict[str, ParallelStyle]:
    split = _Adapted(ColwiseParallel(), Replicate(), Shard(0))
    merge = _Adapted(RowwiseParallel(output_layouts=Shard(_SEQUENCE)), Shard(1), Replicate())
    heads = SequenceParallel(sequence_dim=_HEADS, use_local_output=True)
    # Gathered once for all projections that read it.
    gather_attention = PrepareModuleInput(
        input_layouts=(Shard(_SEQUENCE), None, None),
        desired_input_layouts=(Replicate(), None, None),
    )
    gather_mlp = PrepareModuleInput(
        input_layouts=(Shard(_SEQUENCE),), desired_input_layouts=(Replicate(),)
    )
    plan: dict[str, ParallelStyle] = {
        "input_layernorm": sequence,
        "self_attn": gather_attention,
        "self_attn.q_proj": split,
        "self_attn.k_proj": split,
        "self_attn.v_proj": split,
        "self_attn.q_norm": heads,
        "self_attn.k_norm": heads,
        "self_attn.o_proj": merge,
        "post_attention_layernorm": sequence,
        "mlp": gather_mlp,
        "mlp.gate_proj": split,
        "mlp.up_proj": split,
        "mlp.down_proj": merge,
    }
    known = {name for name, _ in layer.named_modules()}
    if isinstance(layer.get_submodule("mlp"), MixtureOfExperts):
        # Each rank routes its part of the sequence through whole experts; ep is to spread them.
        known -= {name for name in known if name.partition(".")[0] == "mlp"}
    return {name: style for name, style in plan.items() if name in known}


class _Adapted(ParallelStyle):
    """A projection's style, and how its adapter, if it has one, is cut.

    Args:
        style: The projection's.
        down: Of the adapter's A, which reads what the projection reads.
        up: Of its B, which writes what the projection writes.
    """

    def __init__(self, style: ParallelStyle, down: Placement, up: Placement) -> None:
        super().__init__()
        self._style, self._down, self._up = style, down, up

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LoraLinear):
            return self._style._apply(module, device_mesh)
        # Aside meanwhile: torch's styles would cut it as if it were part of the projection.
        down, up = module.lora_A, module.lora_B
        del module.lora_A, module.lora_B
        self._style._apply(module, device_mesh)
        module.lora_A, module.lora_B = down, up
        _replace(down, "weight", device_mesh, self._down)
        _replace(up, "weight", device_mesh, self._up)
        return module


class _SequenceEmbedding(ParallelStyle):
    """A replicated lookup of which each rank does its part of the sequence."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module,
            device_mesh,
            input_fn=_shard_positions,
            output_fn=_to_local,  # type: ignore[arg-type]
        )


def _shard_positions(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Any:
    positions = DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)
    return (positions.redistribute(placements=[Shard(_SEQUENCE)]),)


def _to_local(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
    return output.to_local()


def _replace(owner: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    parameter = getattr(owner, name)
    laid = distribute_tensor(parameter.detach(), mesh, [placement])
    owner.register_parameter(name, nn.Parameter(laid, parameter.requires_grad))
