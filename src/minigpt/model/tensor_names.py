"""Tensor names and layouts of Hugging Face's files, to the decoder's own and back.

The decoder's names are Llama's (of experts Qwen3-MoE's), so little needs work. Mixtral's experts
are renamed. GPT-2's names differ, its linear weights are stored (in, out), and query, key and
value share one tensor. Everything here only renames,
transposes, splits and joins: no bit of a value changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minigpt.model.tensor_origins import (
    GPT2_LINEAR,
    GPT2_NORMS,
    GPT2_TOP,
    MIXTRAL,
    QKV,
    find_origin,
    replaced,
)

Tensors = dict[str, Tensor]


def from_hf(stored: Mapping[str, Tensor], family: str) -> Tensors:
    """Rename a file's tensors to the decoder's names.

    Args:
        stored: Tensors as the files have them, with or without the prefix `model.` or
            `transformer.`.
        family: model_type of the `config.json` beside them.

    Returns:
        The decoder's tensors, views of the stored ones. Names that the family does not have pass
        through unchanged, so that the caller can report them.
    """
    tensors: Tensors = {}
    for name, tensor in stored.items():
        origin = find_origin(name, family)
        if origin is None:
            continue
        turned = tensor.T if origin.transposed and tensor.dim() == 2 else tensor
        parts = turned.chunk(len(origin.names), dim=0) if len(origin.names) > 1 else (turned,)
        tensors |= dict(zip(origin.names, parts, strict=True))
    return tensors


def to_hf(state: Mapping[str, Tensor], family: str) -> Tensors:
    """Rename a decoder's state dict to the names of a family's files."""
    if family == "mixtral":
        back = {ours: theirs for theirs, ours in MIXTRAL.items()}
        return {replaced(name, back): tensor for name, tensor in state.items()}
    if family != "gpt2":
        return dict(state)
    tensors: Tensors = {}
    parts: dict[str, list[Tensor]] = {}
    top = {ours: theirs for theirs, ours in GPT2_TOP.items()}
    rest = {ours: theirs for theirs, ours in (GPT2_NORMS | GPT2_LINEAR).items()}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            tensors[name] = tensor
            continue
        if name in top:
            tensors[f"transformer.{top[name]}"] = tensor
            continue
        _, _, index, module, kind = _split(name)
        owner = module.removeprefix("self_attn.")
        stored = tensor.T if tensor.dim() == 2 else tensor
        if owner in QKV:
            parts.setdefault(f"transformer.h.{index}.attn.c_attn.{kind}", []).append(stored)
        else:
            tensors[f"transformer.h.{index}.{rest[module]}.{kind}"] = stored
    for name, pieces in parts.items():
        tensors[name] = torch.cat(pieces, dim=-1)
    return tensors


def _split(name: str) -> tuple[str, str, str, str, str]:
    """Split `model.layers.3.mlp.up_proj.weight` at layer index, module and kind."""
    model, layers, index, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return model, layers, index, module, kind
