from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.core.config import from_mapping, load_config, to_yaml
from minigpt.core.errors import ConfigError
from minigpt.model.config import ModelConfig
from minigpt.train.config import ModelOverrides, TrainConfig
from minigpt.train.resolve import Facts, resolve, with_steps
from minigpt.train.trackers import flatten

FACTS = Facts(
    vocab_size=8192,
    train_tokens=10_000_000,
    eos_token_id=0,
    bos_token_id=0,
    device="cpu",
    fast_bfloat16=True,
    compiler=True,
    threads=2,
    peak_flops=4e11,
)


def _config(**values: Any) -> TrainConfig:
    return from_mapping(TrainConfig, {"data": "data/x"} | values)


@given(
    size=st.integers(1, 40),
    kind=st.sampled_from(["muon", "adamw"]),
    budget=st.sampled_from([{}, {"max_tokens": 3_000_000}, {"steps": 700}, {"minutes": 5}]),
)
def test_any_size_resolves_completely(size: int, kind: str, budget: dict[str, Any]) -> None:
    resolved = resolve(_config(size=size, optimizer={"kind": kind}, **budget), FACTS)
    config = resolved.config if "minutes" not in budget else with_steps(resolved.config, 123)
    assert "auto" not in flatten(config.model_dump()).values()
    batch = config.batch
    assert isinstance(batch.tokens_per_step, int) and isinstance(batch.micro_batch_size, int)
    assert isinstance(batch.sequence_length, int)
    assert batch.tokens_per_step % (batch.micro_batch_size * batch.sequence_length) == 0
    assert resolved.model.num_layers == size
    again = resolve(_config(size=size, optimizer={"kind": kind}, **budget), FACTS)
    assert again == resolved


def test_a_resolved_config_survives_yaml_and_resolves_to_itself(tmp_path: Any) -> None:
    resolved = resolve(_config(steps=100), FACTS).config
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(resolved))
    assert load_config(TrainConfig, path) == resolved
    assert resolve(resolved, FACTS).config == resolved


def test_more_parameters_get_more_tokens_and_larger_batches() -> None:
    small, large = (resolve(_config(size=size), FACTS).config for size in (4, 24))
    for config in (small, large):
        assert isinstance(config.steps, int) and config.steps >= 900
    assert isinstance(small.batch.tokens_per_step, int)
    assert isinstance(large.batch.tokens_per_step, int)
    assert large.batch.tokens_per_step > small.batch.tokens_per_step


def test_the_size_is_what_the_budget_trains_well() -> None:
    def chosen(peak_flops: float = 4e11, **budget: Any) -> int:
        size = resolve(_config(**budget), replace(FACTS, peak_flops=peak_flops)).config.size
        assert isinstance(size, int)
        return size

    assert chosen() == chosen(steps=700) == 4
    assert chosen(minutes=3, size=7) == 7
    assert chosen(minutes=0.01) == 1
    by_time = [chosen(minutes=minutes) for minutes in (1, 10, 100, 1000)]
    assert by_time == sorted(by_time) and by_time[0] < by_time[-1]
    assert chosen(minutes=30) < chosen(minutes=30, peak_flops=4e14)
    assert chosen(minutes=30) < chosen(minutes=30, mesh={"dp": 4})  # four ranks' work
    assert chosen(max_tokens=10_000_000) < chosen(max_tokens=1_000_000_000)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.hidden_size", 192),
        ("model.num_kv_heads", 2),
        ("model.intermediate_size", 1000),
        ("batch.sequence_length", 128),
        ("batch.tokens_per_step", 65536),
        ("batch.micro_batch_size", 2),
        ("batch.loss_chunk_tokens", 77),
        ("optimizer.lr", 0.0123),
        ("optimizer.muon_lr", 0.0456),
        ("schedule.warmup_steps", 7),
        ("validation.every", 9),
        ("checkpoint.every", 11),
        ("steps", 321),
        ("compile", True),
        ("precision", "float32"),
        ("threads", 1),
    ],
)
def test_every_derived_value_can_be_given(key: str, value: Any) -> None:
    section, _, name = key.partition(".")
    given = {section: {name: value} if name else value}
    resolved = resolve(_config(**({"size": 4} | given)), FACTS).config
    assert flatten(resolved.model_dump())[key] == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"hidden_size": 100, "num_heads": 3}}, "hidden_size = 100"),
        ({"model": {"hidden_size": 96, "head_dim": 64}}, "hidden_size = 96"),
        ({"model": {"num_kv_heads": 3}}, "num_kv_heads = 3"),
        ({"model": {"vocab_size": 300}}, "vocab_size = 300"),
        ({"model": {"context_length": 64}, "batch": {"sequence_length": 128}}, "context of 64"),
        ({"batch": {"sequence_length": 100, "tokens_per_step": 250}}, "tokens_per_step = 250"),
        ({"batch": {"tokens_per_step": 2048, "micro_batch_size": 3}}, "micro_batch_size = 3"),
        ({"schedule": {"warmup_steps": 50}, "steps": 10}, "warmup_steps = 50"),
    ],
)
def test_values_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(_config(**values), FACTS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"lr": "high"}}, "optimizer.lr = 'high'"),
        ({"optimizer": {"lr": 3.0}}, "optimizer.lr"),
        ({"optimiser": {}}, "did you mean 'optimizer'"),
        ({"steps": 0}, "steps = 0"),
        ({"minutes": -1}, "minutes"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(**values)


def test_a_corpus_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="200 tokens"):
        resolve(_config(), replace(FACTS, train_tokens=200))
    with pytest.raises(ConfigError, match="fewer than one batch of 64 rows"):
        resolve(_config(batch={"tokens_per_step": 16384}), replace(FACTS, train_tokens=16384))


def test_a_small_corpus_gets_a_batch_that_it_fills() -> None:
    batch = resolve(_config(), replace(FACTS, train_tokens=1000)).config.batch
    assert batch.tokens_per_step == 3 * 256
    pairs = resolve(_config(batch={"micro_batch_size": 2}), replace(FACTS, train_tokens=1000))
    assert pairs.config.batch.tokens_per_step == 2 * 256


def test_what_is_only_unwise_is_warned_of() -> None:
    slow = replace(FACTS, fast_bfloat16=False, compiler=False, train_tokens=100_000)
    resolved = resolve(_config(precision="bfloat16", steps=1000, threads=64), slow)
    text = " ".join(resolved.warnings)
    for expected in ("overfitting", "bfloat16", "compiler", "threads = 64"):
        assert expected in text
    with pytest.raises(ConfigError, match="g\\+\\+"):
        resolve(_config(compile=True), slow)


def test_compiling_is_for_runs_that_are_long_enough() -> None:
    assert resolve(_config(max_tokens=20_000), FACTS).config.compile is False
    assert resolve(_config(minutes=5), FACTS).config.compile is True
    assert resolve(_config(minutes=5), replace(FACTS, compiler=False)).config.compile is False


def test_given_weights_decide_the_architecture() -> None:
    base = ModelConfig(
        vocab_size=8192,
        num_layers=3,
        hidden_size=48,
        num_heads=3,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=64,
        context_length=128,
        norm="layernorm",
    )
    facts = replace(FACTS, model=base)
    assert resolve(_config(initialize_from="x"), facts).config.size == 3
    resolved = resolve(_config(initialize_from="x", size=9), facts)
    assert resolved.model == base
    assert resolved.config.model.norm == "layernorm"
    assert resolved.config.batch.sequence_length == 128
    with pytest.raises(ConfigError, match="num_layers = 4"):
        resolve(_config(initialize_from="x", model={"num_layers": 4}), facts)


def test_overrides_mirror_the_model_config() -> None:
    mirrored = set(ModelConfig.model_fields) - {"eos_token_id", "bos_token_id", "stop_token_ids"}
    assert set(ModelOverrides.model_fields) == mirrored
    for name, info in ModelConfig.model_fields.items():
        if name in mirrored and not info.is_required():
            assert ModelOverrides.model_fields[name].default == info.default, name


def test_layers_with_experts_are_compiled_only_if_asked_for() -> None:
    experts = {"num_experts": 4, "expert_intermediate_size": 96}
    resolved = resolve(_config(minutes=5, model=experts), FACTS)
    assert resolved.config.compile is False
    assert resolved.model.num_experts == 4
    assert resolve(_config(compile=True, steps=10, model=experts), FACTS).config.compile is True
    split = {"pp": 2, "schedule": "zero-bubble"}
    with pytest.raises(ConfigError, match=r"compile = true with mesh\.schedule = zero-bubble"):
        resolve(_config(compile=True, steps=10, mesh=split), FACTS)
