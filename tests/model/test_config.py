from __future__ import annotations

import subprocess
import sys

import pytest

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError
from minigpt.model.config import ModelConfig

FIELDS = {
    "vocab_size": 8192,
    "num_layers": 6,
    "hidden_size": 384,
    "num_heads": 6,
    "num_kv_heads": 6,
    "head_dim": 64,
    "intermediate_size": 1024,
    "context_length": 256,
}


def test_flops_follow_the_stated_convention() -> None:
    config = ModelConfig(**FIELDS)
    matmul = 6 * (4 * 384 * 384 + 3 * 384 * 1024) + 8192 * 384
    assert config.parameter_counts().matmul == matmul
    assert config.flops_per_token(256) == 6 * matmul + 12 * 6 * 384 * 256
    assert 3 * config.flops_per_token(256, training=False) == config.flops_per_token(256)


def test_gpt2s_size_is_the_published_one() -> None:
    config = ModelConfig(
        vocab_size=50257,
        num_layers=12,
        hidden_size=768,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        intermediate_size=3072,
        context_length=1024,
        norm="layernorm",
        position="learned",
        mlp="gelu",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        qk_norm=False,
    )
    assert config.parameter_counts().total == 124_439_808


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 4}, "num_kv_heads = 4 must divide num_heads = 6"),
        ({"head_dim": 63}, "head_dim = 63: rotary positions need an even width"),
        ({"num_layers": 0}, "num_layers = 0: must be at least 1"),
        ({"sliding_window": 0}, "sliding_window = 0: must be at least 1"),
        ({"rope_theta": 0}, "rope_theta = 0: must be greater than 0"),
        ({"num_experts": 4, "experts_per_token": 5}, "experts_per_token = 5 exceeds num_experts"),
        ({"norm": "batchnorm"}, "norm = 'batchnorm': must be 'rmsnorm' or 'layernorm'"),
        ({"hidden": 3}, "unknown key 'hidden': did you mean 'hidden_size'?"),
    ],
)
def test_refuses_in_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(ModelConfig, FIELDS | changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_importing_the_config_does_not_import_torch() -> None:
    code = "import sys, minigpt.model.hf, minigpt.model.hf_write; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
