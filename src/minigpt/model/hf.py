"""`config.json` of Hugging Face directories to `ModelConfig`; `hf_write` is the way back.

What minigpt's decoder can't compute is refused by key and value; keys that don't change the
numbers (dropout, cache flags, initialisation) are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError, ModelError
from minigpt.model.config import ModelConfig

QUANT_METHOD = "minigpt"

Tree = Mapping[str, Any]


def config_from_hf(tree: Tree) -> ModelConfig:
    """Translate a parsed `config.json`.

    Raises:
        ModelError: An unknown model_type, a missing key, or a value that the decoder does not
            support; the message names the key and the value.
    """
    family = tree.get("model_type")
    if not isinstance(family, str) or family not in _READERS:
        raise ModelError(
            f"config.json: model_type = {family!r} is not supported",
            remedy=f"one of {', '.join(_READERS)}",
        )
    quantization = tree.get("quantization_config")
    if quantization is not None and not is_quantized(tree):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelError(
            f"config.json: quantization_config.quant_method = {method!r} is not supported",
            remedy="load the unquantized model and run `minigpt compress`",
        )
    try:
        return from_mapping(ModelConfig, _READERS[family](tree))
    except ConfigError as error:
        raise ModelError(f"config.json of a {family} model: {error}") from None


def is_quantized(tree: Tree) -> bool:
    """Tell whether a parsed `config.json` says that minigpt quantized the weights."""
    quantization = tree.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def quantization(tree: Tree) -> str:
    """Return how a parsed `config.json` says that the weights are kept: none, int8 or int4."""
    return f"int{tree['quantization_config'].get('bits')}" if is_quantized(tree) else "none"


def _read_gpt2(tree: Tree) -> dict[str, Any]:
    _only(tree, "activation_function", ("gelu_new", "gelu_pytorch_tanh"))
    _only(tree, "scale_attn_weights", (True,))
    _only(tree, "scale_attn_by_inverse_layer_idx", (False,))
    _only(tree, "add_cross_attention", (False,))
    width, heads = _integer(tree, "n_embd"), _integer(tree, "n_head")
    return {
        "vocab_size": _integer(tree, "vocab_size"),
        "num_layers": _integer(tree, "n_layer"),
        "hidden_size": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": _divide(width, heads, "n_embd", "n_head"),
        "intermediate_size": tree.get("n_inner") or 4 * width,
        "context_length": tree.get("n_positions", 1024),
        "norm": "layernorm",
        "norm_eps": tree.get("layer_norm_epsilon", 1e-5),
        "position": "learned",
        "mlp": "gelu",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "tie_embeddings": tree.get("tie_word_embeddings", True),
        **_special_tokens(tree, eos=50256, bos=50256),
    }


def _read_llama(tree: Tree) -> dict[str, Any]:
    biased = tree.get("attention_bias", False)
    return _rotary(tree, kv_heads=None, context=2048) | {
        "qkv_bias": biased,
        "output_bias": biased,
        "mlp_bias": tree.get("mlp_bias", False),
        "qk_norm": False,
        **_special_tokens(tree, eos=2, bos=1),
    }


def _read_mistral(tree: Tree) -> dict[str, Any]:
    _only(tree, "attention_bias", (False,))
    window = tree.get("sliding_window", 4096)
    if "layer_types" in tree:
        raise ModelError(
            f"config.json: layer_types = {tree['layer_types']!r} is not supported for mistral"
        )
    return _rotary(tree, kv_heads=8, context=131_072) | {
        "qk_norm": False,
        "sliding_window": window,
        **_special_tokens(tree, eos=2, bos=1),
    }


def _read_qwen2(tree: Tree) -> dict[str, Any]:
    return _rotary(tree, kv_heads=32, context=32_768) | {
        "qkv_bias": True,
        "qk_norm": False,
        "sliding_window": _qwen_window(tree),
        **_special_tokens(tree),
    }


def _read_qwen3(tree: Tree) -> dict[str, Any]:
    biased = tree.get("attention_bias", False)
    return _rotary({"head_dim": 128, **tree}, kv_heads=32, context=32_768) | {
        "qkv_bias": biased,
        "output_bias": biased,
        "qk_norm": True,
        "sliding_window": _qwen_window(tree),
        **_special_tokens(tree),
    }


def _read_qwen3_moe(tree: Tree) -> dict[str, Any]:
    _only(tree, "decoder_sparse_step", (1,))
    _only(tree, "mlp_only_layers", ([], None))
    biased = tree.get("attention_bias", False)
    sliding = tree.get("use_sliding_window", False)
    return _rotary(tree, kv_heads=4, context=32_768) | {
        "qkv_bias": biased,
        "output_bias": biased,
        "qk_norm": True,
        "sliding_window": tree.get("sliding_window", 4096) if sliding else None,
        "expert_intermediate_size": tree.get("moe_intermediate_size", 768),
        "norm_topk_prob": tree.get("norm_topk_prob", False),
        **_experts(tree, count=128, per_token=8),
        **_special_tokens(tree),
    }


def _read_mixtral(tree: Tree) -> dict[str, Any]:
    return _rotary(tree, kv_heads=8, context=131_072) | {
        "qk_norm": False,
        "sliding_window": tree.get("sliding_window"),
        **_experts(tree, count=8, per_token=2),
        **_special_tokens(tree, eos=2, bos=1),
    }


def _experts(tree: Tree, *, count: int, per_token: int) -> dict[str, Any]:
    return {
        "num_experts": tree.get("num_experts", tree.get("num_local_experts", count)),
        "experts_per_token": tree.get("num_experts_per_tok", per_token),
        "router_bias": False,
    }


def _read_minigpt(tree: Tree) -> dict[str, Any]:
    ours = ("model_type", "architectures", "torch_dtype", "quantization_config")
    return {key: value for key, value in tree.items() if key not in ours}


_READERS: dict[str, Callable[[Tree], dict[str, Any]]] = {
    "gpt2": _read_gpt2,
    "llama": _read_llama,
    "mistral": _read_mistral,
    "qwen2": _read_qwen2,
    "qwen3": _read_qwen3,
    "qwen3_moe": _read_qwen3_moe,
    "mixtral": _read_mixtral,
    "minigpt": _read_minigpt,
}


def _rotary(tree: Tree, *, kv_heads: int | None, context: int) -> dict[str, Any]:
    """Read what the families with RMSNorm, rotary positions and SwiGLU share."""
    _only(tree, "hidden_act", ("silu", "swish"))
    width, heads = _integer(tree, "hidden_size"), _integer(tree, "num_attention_heads")
    length = tree.get("max_position_embeddings", context)
    head_dim = tree.get("head_dim")
    if head_dim is None:
        head_dim = _divide(width, heads, "hidden_size", "num_attention_heads")
    return {
        "vocab_size": _integer(tree, "vocab_size"),
        "num_layers": _integer(tree, "num_hidden_layers"),
        "hidden_size": width,
        "num_heads": heads,
        "num_kv_heads": tree.get("num_key_value_heads", kv_heads) or heads,
        "head_dim": head_dim,
        "intermediate_size": _integer(tree, "intermediate_size"),
        "context_length": length,
        "norm_eps": tree.get("rms_norm_eps", 1e-6),
        "tie_embeddings": tree.get("tie_word_embeddings", False),
        **_rope(tree, length),
    }


def _rope(tree: Tree, context_length: Any) -> dict[str, Any]:
    """Read transformers 4's rope_theta and rope_scaling or 5's rope_parameters."""
    key = "rope_parameters" if tree.get("rope_parameters") else "rope_scaling"
    rope = tree.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        raise ModelError(
            f"config.json: {key} = {rope!r}: one set of parameters for all layers is supported"
        )
    partial = rope.get("partial_rotary_factor", tree.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ModelError(f"config.json: partial_rotary_factor = {partial!r}: only 1.0 is supported")
    read: dict[str, Any] = {"rope_theta": rope.get("rope_theta", tree.get("rope_theta", 10_000.0))}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return read
    if kind not in ("linear", "llama3"):
        raise ModelError(
            f"config.json: {key}.rope_type = {kind!r} is not supported",
            remedy="one of default, linear, llama3",
        )
    scaling: dict[str, Any] = {"kind": kind, "factor": rope.get("factor")}
    if kind == "llama3":
        scaling |= {k: rope[k] for k in ("low_freq_factor", "high_freq_factor") if k in rope}
        scaling["original_context_length"] = rope.get(
            "original_max_position_embeddings",
            tree.get("original_max_position_embeddings", context_length),
        )
    return read | {"rope_scaling": scaling}


def _qwen_window(tree: Tree) -> Any:
    """Return the window if all layers slide, None if none does; a mixture is refused."""
    if not tree.get("use_sliding_window", False):
        return None
    layers = _integer(tree, "num_hidden_layers")
    first = tree.get("max_window_layers", 28)
    kinds = tree.get("layer_types")
    if kinds is None and isinstance(first, int):
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if kinds == ["full_attention"] * layers:
        return None
    if kinds != ["sliding_attention"] * layers:
        raise ModelError(
            f"config.json: max_window_layers = {first!r} of {layers} layers: a sliding window in "
            "some layers only is not supported",
            remedy="set use_sliding_window to false if texts stay shorter than the window",
        )
    return tree.get("sliding_window", 4096)


def _special_tokens(tree: Tree, eos: int | None = None, bos: int | None = None) -> dict[str, Any]:
    found = tree.get("eos_token_id", eos)
    first, rest = (found[0], found[1:]) if isinstance(found, list) and found else (found, [])
    return {
        "eos_token_id": first,
        "stop_token_ids": tuple(rest),
        "bos_token_id": tree.get("bos_token_id", bos),
    }


def _integer(tree: Tree, key: str) -> int:
    value = tree.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json: {key} = {value!r} must be a positive integer")
    return value


def _divide(width: int, heads: int, width_key: str, heads_key: str) -> int:
    if width % heads:
        raise ModelError(
            f"config.json: {heads_key} = {heads} does not divide {width_key} = {width}",
            remedy=f"choose a {width_key} that is a multiple of {heads_key}",
        )
    return width // heads


def _only(tree: Tree, key: str, allowed: tuple[Any, ...]) -> None:
    if key in tree and tree[key] not in allowed:
        known = " or ".join(repr(value) for value in allowed)
        raise ModelError(f"config.json: {key} = {tree[key]!r} is not supported, only {known}")
