"""What a model takes, from its headers, against what it takes once loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import parallel

from minigpt.core.errors import ConfigError, ModelError
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.engine.packing import pack_weights
from minigpt.engine.preflight import (
    plan_memory,
    preflight,
    rank_weight_bytes,
    read_model_config,
    weight_bytes,
)
from minigpt.model.linear import quantize_module
from minigpt.model.sharding import Shard
from minigpt.model.tensor_headers import read_headers, weight_files
from minigpt.model.weights import load_model, save_model


def _config(**changes: Any) -> EngineConfig:
    settings = {"device": "cpu", "dtype": "float32", "threads": 1, "max_batched_tokens": 64}
    return EngineConfig.model_validate(settings | changes)


@pytest.fixture(params=["plain", "int8", "int4", "sharded"])
def model(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    if request.param == "plain":
        return tiny_model
    loaded = load_model(tiny_model)
    if request.param in ("int8", "int4"):
        quantize_module(loaded.model, 32 if request.param == "int4" else None)
    shard = 20_000 if request.param == "sharded" else 1 << 30
    save_model(
        tmp_path / "m", loaded.model, loaded.config, tokenizer_dir=tiny_model, max_shard_bytes=shard
    )
    return tmp_path / "m"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_take_what_was_estimated(model: Path, dtype: str) -> None:
    loaded = load_model(model, dtype=dtype)
    actual = sum(t.numel() * t.element_size() for t in loaded.model.state_dict().values())
    headers = read_headers(weight_files(model))
    assert weight_bytes(headers, _config(dtype=dtype), read_model_config(model)) == actual


def test_a_tied_output_projection_is_packed_beside_the_embedding(tmp_path: Path) -> None:
    from minigpt.model.config import ModelConfig
    from minigpt.model.decoder import Decoder

    config = ModelConfig(
        vocab_size=300, num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=2, head_dim=16,
        intermediate_size=64, context_length=64, tie_embeddings=True,
    )  # fmt: skip
    save_model(tmp_path, Decoder(config).bfloat16(), config)
    headers = read_headers(weight_files(tmp_path))
    stored = sum(header.num_bytes for header in headers)
    assert weight_bytes(headers, _config(dtype="bfloat16"), config) == stored + 300 * 32 * 2
    loaded = load_model(tmp_path).model
    assert loaded.lm_head is None
    pack_weights(loaded)
    assert loaded.lm_head is not None


@pytest.mark.parametrize("group_size", [None, 32])
def test_quantized_weights_take_what_the_kernels_hold(
    group_size: int | None, tmp_path: Path
) -> None:
    """Tied too: the kernels pack an int8 copy of the embedding as output projection."""
    from minigpt.engine.native import NativeRunner
    from minigpt.kernels import library
    from minigpt.model.config import ModelConfig
    from minigpt.model.decoder import Decoder

    if library.loaded() is None:
        pytest.skip("no kernels here")
    config = ModelConfig(
        vocab_size=320, num_layers=1, hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=32,
        intermediate_size=256, context_length=64, tie_embeddings=True, qk_norm=False,
    )  # fmt: skip
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    quantize_module(model, group_size)
    save_model(tmp_path, model, config)
    counted = weight_bytes(read_headers(weight_files(tmp_path)), _config(dtype="bfloat16"), config)
    loaded = load_model(tmp_path, dtype="bfloat16").model
    runner = NativeRunner(loaded, num_blocks=1, block_size=16, dtype=torch.bfloat16)
    plan = runner._step._plan
    products = [getattr(plan.layers[0], name) for name in ("qkv", "output", "up", "down")]
    held = sum(product.nbytes for product in (*products, plan.head))
    held += sum(
        value.nbytes for value in loaded.state_dict().values() if value.device.type != "meta"
    )
    # Scales of int8 are bf16 in files and float32 in the kernels, the head's besides the
    # embedding's; two norms are the plan's now.
    columns = 0 if group_size else sum(product.out_features for product in products)
    assert held == counted + 2 * columns + 4 * config.vocab_size - 2 * 2 * config.hidden_size


def test_eight_bit_activations_need_integer_weights(tiny_model: Path, tmp_path: Path) -> None:
    config = _config(dtype="bfloat16", activation_bits=8)

    def plan(path: Path) -> Any:
        return plan_memory(path, config, available=1 << 30, report=lambda line: None)

    with pytest.raises(ModelError, match=r"activation_bits = 8 .* the model has none .*compress"):
        plan(tiny_model)
    loaded = load_model(tiny_model)
    quantize_module(loaded.model)
    save_model(tmp_path, loaded.model, loaded.config, tokenizer_dir=tiny_model)
    assert plan(tmp_path).activation_bits == 8
    config = config.replace(adapters=True)
    with pytest.raises(ModelError, match=r"torch serves here: .*dtype = bfloat16, adapters = true"):
        plan(tmp_path)


def test_the_plan_is_what_the_engine_does(tiny_model: Path) -> None:
    config = EngineConfig(device="cpu", dtype="float32", max_num_seqs=3, context_length=100)
    plan = preflight(tiny_model, config, report=lambda line: None)
    engine = Engine.load(tiny_model, config)
    ready = engine.ready()
    assert plan.kv_cache_bytes == engine.config.kv_cache_bytes
    assert plan.max_concurrent_tokens == ready.kv_blocks_total * ready.block_size == 3 * 112
    assert plan.context_length == ready.context_length == 100
    assert (plan.device, plan.dtype) == ("cpu", "float32")


def test_the_shortfall_is_exact(tiny_model: Path) -> None:
    def plan(available: int, **changes: Any) -> Any:
        config = _config(memory_fraction=1, **changes)
        return plan_memory(tiny_model, config, available=available, report=lambda line: None)

    roomy = plan(1 << 30)
    weights, context = roomy.weight_bytes, 512 * roomy.kv_bytes_per_token
    with pytest.raises(ModelError, match=f"{weights} bytes of weights .* short by 1 bytes"):
        plan(weights - 1)
    block = 16 * roomy.kv_bytes_per_token
    with pytest.raises(ConfigError, match=f"one context of 512 tokens .*short by {block} "):
        plan(weights + context - 1)
    assert plan(weights + context).max_concurrent_tokens == 512
    with pytest.raises(ConfigError, match="short by 1 "):
        plan(weights + context + block - 1, kv_cache_bytes=context + block)


def test_the_engine_refuses_before_it_loads(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt.engine.loading.free_memory", lambda config: 1000)
    monkeypatch.setattr("minigpt.engine.loading.load_model", None)
    with pytest.raises(ModelError, match="1000 are free"):
        Engine.load(tiny_model, _config())


def test_broken_directories_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    def check(message: str) -> None:
        with pytest.raises(ModelError, match=message):
            preflight(tmp_path, _config(), report=lambda line: None)

    check("no model at .*config.json")
    (tmp_path / "config.json").write_text("[]")
    check("holds a list, not an object")
    shutil.copy(tiny_model / "config.json", tmp_path)
    check("holds no weights")
    for content in (b"", b"\xff" * 64, (4).to_bytes(8, "little") + b"null"):
        (tmp_path / "model.safetensors").write_bytes(content)
        check("is no safetensors file")


@pytest.mark.parametrize("family", parallel.FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_largest_part_takes_what_was_estimated(family: str, dtype: str, tmp_path: Path) -> None:
    path = parallel.write_model(tmp_path, *parallel.make_model(family))
    config = _config(dtype=dtype, tensor_parallel_size=2)
    parts = [load_model(path, dtype=dtype, shard=Shard(rank, 2)).model for rank in range(2)]
    model = read_model_config(path)
    packed = 0  # a tied projection's copy in bfloat16
    if model.tie_embeddings and dtype == "bfloat16":
        packed = -(-model.vocab_size // 2) * model.hidden_size * 2
    held = [sum(t.nbytes for t in part.state_dict().values()) + packed for part in parts]
    assert rank_weight_bytes(path, read_headers(weight_files(path)), config, model) == max(held)
    plans = [
        plan_memory(path, _config(tensor_parallel_size=n), available=1 << 30, report=lambda _: None)
        for n in (1, 2)
    ]
    assert plans[1].kv_bytes_per_token * 2 == plans[0].kv_bytes_per_token
    assert plans[1].tensor_parallel_size == 2
    with pytest.raises(ModelError, match="short by 1 bytes, on each rank"):
        plan_memory(path, config, available=max(held) - 1, report=lambda line: None)
