"""Tensor names and layouts of Hugging Face's files, to the decoder's own and back.

The decoder's names are Llama's (of experts Qwen3-MoE's), so little needs work. Mixtral's experts
are renamed. GPT-2's names differ, its linear weights are stored (in, out), and query, key and
value share one tensor. Everything here only renames,
transposes, splits and joins: no bit of a value changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

# Buffers that older files carry: GPT-2's causal masks and Llama's rotary frequencies.
_NOT_WEIGHTS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")

_GPT2_TOP = {
    "wte.weight": "model.embed_tokens.weight",
    "wpe.weight": "model.embed_positions.weight",
    "ln_f.weight": "model.norm.weight",
    "ln_f.bias": "model.norm.bias",
}
_GPT2_NORMS = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
_GPT2_LINEAR = {
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_QKV = ("q_proj", "k_proj", "v_proj")
_MIXTRAL = {
    ".block_sparse_moe.": ".mlp.",
    ".w1.weight": ".gate_proj.weight",
    ".w2.weight": ".down_proj.weight",
    ".w3.weight": ".up_proj.weight",
}


def from_hf(stored: Mapping[str, Tensor], family: str) -> Tensors:
    """Rename a file's tensors to the decoder's names.

    Args:
        stored: Tensors as the files have them, with or without the prefix `model.` or
            `transformer.`.
        family: model_type of the `config.json` beside them.

    Returns:
        The decoder's tensors. Names that the family does not have pass through unchanged, so
        that the caller can report them.
    """
    tensors: Tensors = {}
    for name, tensor in stored.items():
        if _NOT_WEIGHTS.search(name):
            continue
        if family == "gpt2":
            tensors |= _from_gpt2(name, tensor)
            continue
        if family == "mixtral":
            name = _replaced(name, _MIXTRAL)
        if name.startswith(("layers.", "embed_tokens.", "norm.")):
            name = f"model.{name}"
        tensors[name] = tensor
    return tensors


def to_hf(state: Mapping[str, Tensor], family: str) -> Tensors:
    """Rename a decoder's state dict to the names of a family's files."""
    if family == "mixtral":
        back = {ours: theirs for theirs, ours in _MIXTRAL.items()}
        return {_replaced(name, back): tensor for name, tensor in state.items()}
    if family != "gpt2":
        return dict(state)
    tensors: Tensors = {}
    parts: dict[str, list[Tensor]] = {}
    top = {ours: theirs for theirs, ours in _GPT2_TOP.items()}
    rest = {ours: theirs for theirs, ours in (_GPT2_NORMS | _GPT2_LINEAR).items()}
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
        if owner in _QKV:
            parts.setdefault(f"transformer.h.{index}.attn.c_attn.{kind}", []).append(stored)
        else:
            tensors[f"transformer.h.{index}.{rest[module]}.{kind}"] = stored
    for name, pieces in parts.items():
        tensors[name] = torch.cat(pieces, dim=-1)
    return tensors


def _replaced(name: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def _from_gpt2(name: str, tensor: Tensor) -> Tensors:
    bare = name.removeprefix("transformer.")
    if bare in _GPT2_TOP:
        return {_GPT2_TOP[bare]: tensor}
    match = re.fullmatch(r"h\.(\d+)\.(.+)\.(weight|bias)", bare)
    if match is None:
        return {name: tensor}
    index, module, kind = match.groups()
    prefix = f"model.layers.{index}"
    weight = tensor.T if tensor.dim() == 2 else tensor
    if module == "attn.c_attn":
        thirds = weight.chunk(3, dim=0)
        named = zip(_QKV, thirds, strict=True)
        return {f"{prefix}.self_attn.{owner}.{kind}": t.contiguous() for owner, t in named}
    if module in _GPT2_LINEAR:
        return {f"{prefix}.{_GPT2_LINEAR[module]}.{kind}": weight.contiguous()}
    if module in _GPT2_NORMS:
        return {f"{prefix}.{_GPT2_NORMS[module]}.{kind}": tensor}
    return {name: tensor}


def _split(name: str) -> tuple[str, str, str, str, str]:
    """Split `model.layers.3.mlp.up_proj.weight` at layer index, module and kind."""
    model, layers, index, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return model, layers, index, module, kind
