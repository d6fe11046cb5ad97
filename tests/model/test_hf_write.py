from __future__ import annotations

import json
from typing import Any

import pytest

from minigpt.model.config import ModelConfig
from minigpt.model.hf import config_from_hf
from minigpt.model.hf_write import config_to_hf


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "qwen3"),
        ({"qk_norm": False}, "llama"),
        ({"qk_norm": False, "sliding_window": 8}, "mistral"),
        ({"qk_norm": False, "hidden_size": 66}, "mistral"),
        ({"qk_norm": False, "qkv_bias": True}, "qwen2"),
        ({"qk_norm": False, "qkv_bias": True, "output_bias": True}, "llama"),
        ({"qk_norm": False, "mlp_bias": True}, "llama"),
        ({"qk_norm": False, "mlp_bias": True, "sliding_window": 8}, "minigpt"),
        ({"mlp_bias": True}, "minigpt"),
        ({"norm": "layernorm"}, "minigpt"),
        ({"mlp": "gelu"}, "minigpt"),
        ({"position": "learned"}, "minigpt"),
        ({"stop_token_ids": (3,)}, "minigpt"),
    ],
)
def test_writes_the_family_that_expresses_a_configuration(
    changes: dict[str, Any], expected: str
) -> None:
    config = ModelConfig.model_validate(
        {
            "vocab_size": 128,
            "num_layers": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "intermediate_size": 96,
            "context_length": 32,
        }
        | changes
    )
    tree = json.loads(json.dumps(config_to_hf(config)))
    assert tree["model_type"] == expected
    assert config_from_hf(tree) == config
