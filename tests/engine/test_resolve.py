from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from minigpt.core.errors import ConfigError
from minigpt.core.machine import describe_machine
from minigpt.engine.config import EngineConfig
from minigpt.engine.resolve import (
    kv_bytes_per_token,
    resolve_memory,
    resolve_numerics,
)
from minigpt.model.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=100, num_layers=3, hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=8, context_length=100,
)  # fmt: skip
PER_TOKEN = 2 * 3 * 2 * 8 * 2
ONE_CONTEXT = 112 * PER_TOKEN  # 7 blocks of 16

MACHINE = replace(describe_machine(), cores=3, instruction_sets=("avx2", "avx512_bf16"))


def _config(**changes: Any) -> EngineConfig:
    settings = {"device": "cpu", "dtype": "bfloat16", "threads": 2, "max_batched_tokens": 64}
    return EngineConfig.model_validate(settings | changes)


def test_everything_is_settled_and_reported() -> None:
    lines: list[str] = []
    config = resolve_numerics(EngineConfig(), MACHINE, cuda=False, report=lines.append)
    config = resolve_memory(config, MODEL, available=1 << 30, report=lines.append)
    unsettled = [name for name, value in config.model_dump().items() if value == "auto"]
    assert unsettled == ["inter_token_target_ms"]  # it follows the steps as they are measured
    assert (config.device, config.dtype, config.threads) == ("cpu", "bfloat16", 3)
    named = {line.split(" = ")[0] for line in lines}
    assert named == {"device", "dtype", "threads", "max_batched_tokens", "kv_cache_bytes"}


def test_without_bfloat16_in_hardware_it_is_float32() -> None:
    plain = replace(MACHINE, instruction_sets=("avx2",))
    config = resolve_numerics(EngineConfig(), plain, cuda=False, report=lambda line: None)
    assert config.dtype == "float32"


def test_a_gpu_is_used_where_there_is_one() -> None:
    config = resolve_numerics(EngineConfig(), MACHINE, cuda=True, report=lambda line: None)
    assert (config.device, config.dtype, config.max_batched_tokens) == ("cuda", "bfloat16", 2048)


def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="device = cuda: this machine has none"):
        resolve_numerics(EngineConfig(device="cuda"), MACHINE, cuda=False, report=lambda line: None)


def test_the_budget_covers_every_sequence() -> None:
    wide = resolve_numerics(
        EngineConfig(max_num_seqs=999), MACHINE, cuda=False, report=lambda line: None
    )
    assert wide.max_batched_tokens == 999
    with pytest.raises(ValueError, match="must be at least max_num_seqs = 32"):
        EngineConfig(max_batched_tokens=31)


def test_the_cache_is_sized_from_need_and_memory() -> None:
    config = _config(max_num_seqs=4)
    assert kv_bytes_per_token(config, MODEL) == PER_TOKEN
    lines: list[str] = []
    roomy = resolve_memory(config, MODEL, available=1 << 30, report=lines.append)
    assert roomy.kv_cache_bytes == 4 * ONE_CONTEXT
    assert f"{PER_TOKEN} B/token in bfloat16 x 448 tokens" in lines[0]
    tight = resolve_memory(config, MODEL, available=3 * ONE_CONTEXT, report=lines.append)
    block = 16 * PER_TOKEN
    assert tight.kv_cache_bytes == int(3 * ONE_CONTEXT * 0.8) // block * block


@pytest.mark.parametrize("given", ["auto", ONE_CONTEXT - 1])
def test_a_cache_below_one_context_is_refused_with_the_shortfall(given: Any) -> None:
    config = _config(kv_cache_bytes=given, memory_fraction=1)
    block = 16 * PER_TOKEN
    with pytest.raises(ConfigError, match=f"one context of 100 .*short by {block} \\("):
        resolve_memory(config, MODEL, available=ONE_CONTEXT - 1, report=lambda line: None)
    shorter = config.replace(context_length=96)
    found = resolve_memory(shorter, MODEL, available=ONE_CONTEXT - 1, report=lambda line: None)
    assert found.kv_cache_bytes == ONE_CONTEXT - block


def test_more_than_the_memory_is_refused_with_the_shortfall() -> None:
    config = _config(kv_cache_bytes=2 * ONE_CONTEXT)
    with pytest.raises(ConfigError, match=f"short by {2 * ONE_CONTEXT - 5000} \\(lower"):
        resolve_memory(config, MODEL, available=5000, report=lambda line: None)


def test_a_longer_context_than_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="context_length = 101: the model's is 100"):
        resolve_memory(
            _config(context_length=101), MODEL, available=1 << 30, report=lambda line: None
        )
