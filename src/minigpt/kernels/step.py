"""One call for a whole step of a decoder; `csrc/step.h` has the same structures.

All layers run in one parallel region, the kernels' bodies with barriers between: a region for
each of some ten kernels a layer would cost a small model more than its arithmetic.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, addressof, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from minigpt.kernels import library
from minigpt.kernels.kv_layout import KVLayout
from minigpt.kernels.linear import PackedWeight, linear
from minigpt.kernels.ops import DTYPES, address


@dataclass(frozen=True)
class Norm:
    """Weight, (C,), and bias of a norm, of the plan's dtype."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """Attention and MLP, each behind a norm and added to the residual stream.

    Attributes:
        input_norm, inner_norm: Before attention and before the MLP.
        qkv: (C) to (heads + 2 * kv_heads) * head_dim: queries, keys, values.
        output: Attention's output projection.
        up: Into the MLP: gates first where it is gated, then what they gate.
        down: Out of the MLP.
        cache: From `KVLayout.allocate`.
        query_norm, key_norm: (head_dim,) weights of RMS norms over heads, if any.
    """

    input_norm: Norm
    inner_norm: Norm
    qkv: PackedWeight
    output: PackedWeight
    up: PackedWeight
    down: PackedWeight
    cache: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """A decoder, its weights packed and its caches allocated.

    Attributes:
        dtype: float32 or bfloat16: of the residual stream, activations, norms and embeddings.
        layout: Of the caches; its heads are the decoder's key and value heads.
        heads: Query heads.
        embedding: (V, C), of the dtype or int8.
        final_norm: Before the output projection.
        head: The output projection, (C) to (V).
        frequencies: (head_dim / 2,) float32 of rotary positions, or None.
        position_table: (context, C) of learned positions, or None.
        embedding_scales: (V,) float32 of an int8 embedding.
        window: A token sees this many latest ones, itself included; None is all.
        layer_norm: Norms over the stream are layer norms, not RMS norms.
        gated: The MLP is SiLU(gate) * up, not GELU.
        eps: Of all norms.
        activation_bits: To what the inputs of integer weights are rounded.
    """

    dtype: torch.dtype
    layout: KVLayout
    heads: int
    layers: Sequence[Layer]
    embedding: Tensor
    final_norm: Norm
    head: PackedWeight
    frequencies: Tensor | None
    position_table: Tensor | None
    embedding_scales: Tensor | None
    window: int | None
    layer_norm: bool
    gated: bool
    eps: float
    activation_bits: Literal[8, 16] = 16


class _Norm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", _Norm),
        ("inner_norm", _Norm),
        *((name, c_void_p) for name in ("query_norm", "key_norm", "qkv", "output", "up", "down")),
        ("cache", c_void_p),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        ("dtype", c_int32),
        ("layout", c_int32 * 4),
        *((name, c_int32) for name in ("num_layers", "heads", "window", "digits")),
        *((name, c_int32) for name in ("layer_norm", "gated")),
        *((name, c_float) for name in ("epsilon", "scale")),
        *((name, c_int64) for name in ("width", "inner", "vocabulary")),
        ("layers", POINTER(_Layer)),
        *((name, c_void_p) for name in ("embedding", "embedding_scales", "position_table")),
        ("frequencies", c_void_p),
        ("final_norm", _Norm),
        ("head", c_void_p),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("rows", c_int64),
        ("tokens", c_void_p),
        ("chunks", c_void_p),
        ("num_chunks", c_int64),
        ("tables", c_void_p),
        ("outputs", c_void_p),
        ("num_outputs", c_int64),
        ("num_logits", c_int64),
        ("logits", c_void_p),
        ("hidden", c_void_p),
    )


class Step:
    """Runs steps of a planned decoder.

    Args:
        plan: Kept, with all that its addresses point to.
        kernels: The library.
    """

    def __init__(self, plan: Plan, kernels: library.Kernels) -> None:
        assert plan.layout.fits(plan.heads), plan.layout
        self._plan = plan
        self._functions = kernels.functions
        self._layers = (_Layer * len(plan.layers))(*map(_layer, plan.layers))
        self._structure = _plan(plan, self._layers)
        self._vocabulary = plan.head.out_features
        self._width = plan.head.in_features

    def run(
        self,
        tokens: Sequence[int],
        chunks: Sequence[tuple[int, int, int, int]],
        tables: Sequence[int],
        outputs: Sequence[int],
        hidden_rows: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """Compute rows: their keys and values go to the caches, the results of some come back.

        Args:
            tokens: A token id for each row.
            chunks: As in `attention_reference.paged_attention`; they cover all rows.
            tables: Block tables, one after the other.
            outputs: Rows whose logits are wanted, each once.
            hidden_rows: Rows whose hidden states are wanted, after the final norm; others or the
                same.

        Returns:
            (len(outputs), V) float32 and (len(hidden_rows), C) of the plan's dtype.

        Raises:
            MemoryError: There is none for the step's activations.
        """
        logits = torch.empty(len(outputs), self._vocabulary)
        # A row that is wanted twice is named once: the norm adds to it in place.
        wanted = tuple(dict.fromkeys((*outputs, *hidden_rows)))
        hidden = torch.empty(len(wanted) if hidden_rows else 0, self._width, dtype=self._plan.dtype)
        arrays = [np.array(values, dtype=np.int32) for values in (tokens, chunks, tables, wanted)]
        token_ids, described, blocks, rows = (array.ctypes.data for array in arrays)
        batch = _Batch(
            len(tokens), token_ids, described, len(chunks), blocks, rows, len(wanted),
            len(outputs), logits.data_ptr(), hidden.data_ptr() if hidden_rows else None,
        )  # fmt: skip
        if self._functions.mg_step(addressof(self._structure), addressof(batch)):
            raise MemoryError(f"no memory for a step of {len(tokens)} rows")
        places = {row: place for place, row in enumerate(wanted)}
        return logits, hidden[[places[row] for row in hidden_rows]]

    def project(self, hidden: Tensor) -> Tensor:
        """Map (R, C) hidden states to (R, V) float32 logits."""
        return linear(hidden, self._plan.head, self._plan.activation_bits, torch.float32)


def _norm(norm: Norm) -> _Norm:
    return _Norm(address(norm.weight), address(norm.bias))


def _layer(layer: Layer) -> _Layer:
    return _Layer(
        _norm(layer.input_norm),
        _norm(layer.inner_norm),
        address(layer.query_norm),
        address(layer.key_norm),
        *(weight.address for weight in (layer.qkv, layer.output, layer.up, layer.down)),
        address(layer.cache),
    )


def _plan(plan: Plan, layers: ctypes.Array[_Layer]) -> _Plan:
    first = plan.layers[0]
    integers: dict[str, Any] = {
        "dtype": DTYPES[plan.dtype],
        "layout": (c_int32 * 4)(*plan.layout.numbers()),
        "num_layers": len(layers),
        "heads": plan.heads,
        "window": plan.window or 0,
        "digits": plan.activation_bits // 8,
        "layer_norm": plan.layer_norm,
        "gated": plan.gated,
        "width": first.qkv.in_features,
        "inner": first.down.in_features,
        "vocabulary": plan.head.out_features,
    }
    return _Plan(
        **integers,
        epsilon=plan.eps,
        scale=plan.layout.head_dim**-0.5,
        layers=layers,
        embedding=address(plan.embedding),
        embedding_scales=address(plan.embedding_scales),
        position_table=address(plan.position_table),
        frequencies=address(plan.frequencies),
        final_norm=_norm(plan.final_norm),
        head=plan.head.address,
    )
