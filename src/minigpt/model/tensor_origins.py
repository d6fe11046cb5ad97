"""Which of the decoder's tensors a stored tensor holds, by its name; no torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

# Buffers that older files carry: GPT-2's causal masks and Llama's rotary frequencies.
_NOT_WEIGHTS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")

GPT2_TOP = {
    "wte.weight": "model.embed_tokens.weight",
    "wpe.weight": "model.embed_positions.weight",
    "ln_f.weight": "model.norm.weight",
    "ln_f.bias": "model.norm.bias",
}
GPT2_NORMS = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
GPT2_LINEAR = {
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
QKV = ("q_proj", "k_proj", "v_proj")
MIXTRAL = {
    ".block_sparse_moe.": ".mlp.",
    ".w1.weight": ".gate_proj.weight",
    ".w2.weight": ".down_proj.weight",
    ".w3.weight": ".up_proj.weight",
}


class Origin(NamedTuple):
    """What a stored tensor is to the decoder."""

    names: tuple[str, ...]
    """The decoder's tensors that it holds: equal parts of its outputs, in this order."""
    transposed: bool = False
    """Whether it is stored (in, out), if it is a matrix."""


def find_origin(name: str, family: str) -> Origin | None:
    """Return what a stored tensor is, None if no weight.

    Args:
        name: With or without the prefix `model.` or `transformer.`.
        family: model_type of the `config.json` beside it.

    Returns:
        A name that the family does not have is its own origin, so that the caller can report it.
    """
    if _NOT_WEIGHTS.search(name):
        return None
    if family == "gpt2":
        return _find_gpt2(name)
    if family == "mixtral":
        name = replaced(name, MIXTRAL)
    if name.startswith(("layers.", "embed_tokens.", "norm.")):
        name = f"model.{name}"
    return Origin((name,))


def replaced(name: str, parts: Mapping[str, str]) -> str:
    """Replace parts of a name."""
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def _find_gpt2(name: str) -> Origin:
    bare = name.removeprefix("transformer.")
    if bare in GPT2_TOP:
        return Origin((GPT2_TOP[bare],))
    match = re.fullmatch(r"h\.(\d+)\.(.+)\.(weight|bias)", bare)
    if match is None:
        return Origin((name,))
    index, module, kind = match.groups()
    prefix = f"model.layers.{index}"
    if module == "attn.c_attn":
        return Origin(tuple(f"{prefix}.self_attn.{owner}.{kind}" for owner in QKV), transposed=True)
    if module in GPT2_LINEAR:
        return Origin((f"{prefix}.{GPT2_LINEAR[module]}.{kind}",), transposed=True)
    if module in GPT2_NORMS:
        return Origin((f"{prefix}.{GPT2_NORMS[module]}.{kind}",))
    return Origin((name,))
