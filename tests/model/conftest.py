"""Tiny random models of each family, made and saved by transformers itself."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROTARY = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 160,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1000.0,
}
QWEN3_MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": False,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied-inner": ("GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 96}),
    "llama2": ("Llama", ROTARY | {"num_key_value_heads": 4}),
    "llama3": ("Llama", ROTARY | {"rope_parameters": LLAMA3}),
    "llama-linear-tied": (
        "Llama",
        ROTARY
        | {
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
            "tie_word_embeddings": True,
        },
    ),
    "llama-biases-head-dim": (
        "Llama",
        ROTARY | {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
    ),
    "mistral-window": ("Mistral", ROTARY | {"sliding_window": 7}),
    "mistral-no-window": ("Mistral", ROTARY | {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", ROTARY | {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        ROTARY | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", ROTARY | {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-biases-window": (
        "Qwen3",
        ROTARY
        | {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 0,
        },
    ),
    "qwen3-moe": ("Qwen3Moe", ROTARY | QWEN3_MOE),
    "qwen3-moe-scaled-window": (
        "Qwen3Moe",
        ROTARY
        | QWEN3_MOE
        | {
            "head_dim": 32,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 0,
        },
    ),
    "mixtral": ("Mixtral", ROTARY | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def build_reference(family: str, fields: dict[str, Any]) -> Any:
    """Return transformers' model with every parameter away from its initial value."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**fields)
    build: Any = transformers.AutoModelForCausalLM.from_config
    model = build(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def random_fields(family: str, seed: int) -> dict[str, Any]:
    """Draw a small configuration of a family."""
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3, 4, 6])
    width = heads * draw.choice([8, 12, 16])
    common: dict[str, Any] = {
        "vocab_size": 160,
        "tie_word_embeddings": draw.random() < 0.5,
        "bos_token_id": None,
        "eos_token_id": draw.choice([None, 3, [3, 4]]),
    }
    layers = draw.randint(1, 4)
    if family == "GPT2":
        inner = draw.choice([None, 40])
        shape = {"n_embd": width, "n_head": heads, "n_layer": layers, "n_inner": inner}
        eps = draw.choice([1e-5, 1e-3])
        return common | shape | {"n_positions": 64, "layer_norm_epsilon": eps}
    linear = {"rope_type": "linear", "factor": draw.uniform(1, 9)}
    rope: dict[str, Any] = draw.choice([{"rope_type": "default"}, linear, LLAMA3])
    rope = rope | {"rope_theta": draw.choice([100.0, 10_000.0, 500_000.0])}
    window = draw.choice([None, 1, 6, 100])
    fields = common | {
        "hidden_size": width,
        "intermediate_size": draw.choice([24, 50]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([k for k in range(1, heads + 1) if heads % k == 0]),
        "max_position_embeddings": 64,
        "rms_norm_eps": draw.choice([1e-6, 1e-3]),
        "rope_parameters": rope,
    }
    if family != "Qwen2":
        fields["head_dim"] = draw.choice([8, 10, 32])
    if family in ("Llama", "Qwen3"):
        fields["attention_bias"] = draw.random() < 0.5
    if family == "Llama":
        fields["mlp_bias"] = draw.random() < 0.5
    if family == "Mistral":
        fields["sliding_window"] = window
    if family.startswith("Qwen") and window:
        fields |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    return fields


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Any]:
    """Build a model by its name in `FAMILIES`, the same at each call."""
    return lambda name: build_reference(*FAMILIES[name])


@pytest.fixture(scope="session")
def random_reference() -> Callable[[str, int], Any]:
    """Build a random configuration of one of transformers' families."""
    return lambda family, seed: build_reference(family, random_fields(family, seed))


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save a family's model once and return its directory."""
    saved: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in saved:
            saved[name] = tmp_path_factory.mktemp(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                build_reference(*FAMILIES[name]).save_pretrained(saved[name])
        return saved[name]

    return save


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES)
