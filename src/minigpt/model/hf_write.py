"""`ModelConfig` to `config.json` of a Hugging Face directory.

Written keys are those that transformers 4 and 5 both read.
"""

from __future__ import annotations

from typing import Any

from minigpt.model.config import ModelConfig, RopeScaling

_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate to `config.json`, in the first family that expresses the configuration.

    What no family expresses gets model_type "minigpt" and `ModelConfig`'s own fields.
    """
    family = family_of(config)
    if family == "minigpt":
        fields = config.model_dump(mode="json")
        return {"model_type": "minigpt", "architectures": ["Decoder"], **fields}
    eos: int | list[int] | None = config.eos_token_id
    if config.eos_token_id is not None and config.stop_token_ids:
        eos = [config.eos_token_id, *config.stop_token_ids]
    common = {
        "model_type": family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": eos,
        "bos_token_id": config.bos_token_id,
    }
    return common | (_write_gpt2(config) if family == "gpt2" else _write_rotary(config, family))


def family_of(config: ModelConfig) -> str:
    """Return the model_type under which `config_to_hf` writes a configuration."""
    square = config.num_heads * config.head_dim == config.hidden_size
    if config.stop_token_ids and config.eos_token_id is None:
        return "minigpt"
    if (config.norm, config.position, config.mlp) == ("layernorm", "learned", "gelu"):
        if config.num_experts:
            return "minigpt"
        biased = config.qkv_bias and config.output_bias and config.mlp_bias
        plain = not config.qk_norm and config.sliding_window is None
        multi_head = config.num_kv_heads == config.num_heads and square
        return "gpt2" if biased and plain and multi_head else "minigpt"
    if (config.norm, config.position, config.mlp) != ("rmsnorm", "rope", "swiglu"):
        return "minigpt"
    all_bias = config.qkv_bias == config.output_bias
    if config.num_experts:
        return _moe_family(config, all_bias and not config.mlp_bias)
    if config.qk_norm:
        return "qwen3" if all_bias and not config.mlp_bias else "minigpt"
    if config.qkv_bias and not config.output_bias and not config.mlp_bias and square:
        return "qwen2"
    # transformers' Llama insists that the heads divide the width; its Mistral does not.
    if all_bias and config.sliding_window is None and config.hidden_size % config.num_heads == 0:
        return "llama"
    return "minigpt" if config.qkv_bias or config.output_bias or config.mlp_bias else "mistral"


def _moe_family(config: ModelConfig, plain: bool) -> str:
    if config.router_bias or not plain:
        return "minigpt"
    if config.qk_norm:
        return "qwen3_moe"
    # Mixtral has one width for its experts and scales their weights always.
    narrow = config.expert_intermediate_size is not None or not config.norm_topk_prob
    return "minigpt" if narrow or config.qkv_bias else "mixtral"


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.context_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
    }


def _write_rotary(config: ModelConfig, family: str) -> dict[str, Any]:
    written: dict[str, Any] = {
        "architectures": [f"{_CLASSES[family]}ForCausalLM"],
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _write_scaling(config.rope_scaling),
    }
    if family in ("llama", "qwen3", "qwen3_moe"):
        written["attention_bias"] = config.qkv_bias
    if family == "llama":
        written["mlp_bias"] = config.mlp_bias
    if family in ("mistral", "mixtral"):
        written["sliding_window"] = config.sliding_window
    if family in ("qwen2", "qwen3", "qwen3_moe"):
        written["use_sliding_window"] = config.sliding_window is not None
        written["sliding_window"] = config.sliding_window
        written["max_window_layers"] = 0 if config.sliding_window else config.num_layers
    if config.num_experts:
        key = "num_experts" if family == "qwen3_moe" else "num_local_experts"
        written |= {key: config.num_experts, "num_experts_per_tok": config.experts_per_token}
    if family == "qwen3_moe":
        inner = config.expert_intermediate_size or config.intermediate_size
        written |= {"moe_intermediate_size": inner, "norm_topk_prob": config.norm_topk_prob}
        written |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return written


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context_length,
    }
