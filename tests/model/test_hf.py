from __future__ import annotations

from typing import Any

import pytest

from minigpt.core.errors import ModelError
from minigpt.model.hf import config_from_hf
from minigpt.model.hf_write import config_to_hf

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 128,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
}
QWEN3 = LLAMA | {"model_type": "qwen3"}
SOME_LAYERS = {"use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, ["model_type = None", "one of gpt2, llama"]),
        ({"model_type": "bert"}, ["model_type = 'bert'"]),
        ({"model_type": ["llama"]}, ["model_type = ['llama']"]),
        (LLAMA | {"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "'silu'"]),
        (GPT2 | {"activation_function": "relu"}, ["activation_function = 'relu'", "gelu_new"]),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        (LLAMA | {"hidden_size": 65}, ["num_attention_heads = 4", "hidden_size = 65", "multiple"]),
        (GPT2 | {"n_head": 5}, ["n_head = 5 does not divide n_embd = 64"]),
        (LLAMA | {"num_key_value_heads": 3}, ["num_kv_heads = 3 must divide num_heads = 4"]),
        (LLAMA | {"num_hidden_layers": "two"}, ["num_hidden_layers = 'two'", "positive integer"]),
        ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, ["vocab_size = None"]),
        (LLAMA | {"max_position_embeddings": "long"}, ["context_length = 'long'"]),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_type = 'yarn'"]),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["rope_type = 'dynamic'"]),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor = None"]),
        (LLAMA | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        (LLAMA | {"rope_parameters": {"full_attention": {}}}, ["one set of parameters"]),
        (LLAMA | {"model_type": "mistral", "attention_bias": True}, ["attention_bias = True"]),
        (LLAMA | {"model_type": "mistral", "layer_types": ["x"]}, ["layer_types = ['x']"]),
        (QWEN3 | SOME_LAYERS, ["max_window_layers = 1 of 2 layers", "use_sliding_window"]),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, ["'gptq'", "compress"]),
        (
            {"model_type": "minigpt", "vocab_sise": 3},
            ["unknown key 'vocab_sise': did you mean 'vocab_size'?"],
        ),
    ],
)
def test_refuses_naming_key_and_value(tree: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        config_from_hf(tree)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reads_the_keys_of_older_and_newer_transformers_alike() -> None:
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    old = config_from_hf(LLAMA | {"rope_theta": 500_000.0, "rope_scaling": scaling})
    new = config_from_hf(LLAMA | {"rope_parameters": scaling | {"rope_theta": 500_000.0}})
    assert old == new
    assert old.rope_scaling is not None
    assert old.rope_scaling.kind == "llama3"
    assert old.rope_theta == 500_000.0


def test_several_ends_of_text_survive() -> None:
    config = config_from_hf(LLAMA | {"eos_token_id": [5, 6, 7]})
    assert (config.eos_token_id, config.stop_token_ids) == (5, (6, 7))
    assert config_to_hf(config)["eos_token_id"] == [5, 6, 7]


@pytest.mark.parametrize("first", [2, 5])
def test_a_window_that_begins_after_the_last_layer_is_none(first: int) -> None:
    config = config_from_hf(QWEN3 | {"use_sliding_window": True, "max_window_layers": first})
    assert config.sliding_window is None
