"""The estimate's own rules; `bench/memory.py` checks it against measured peaks."""

from __future__ import annotations

from typing import Any

import pytest
from bench.memory import configs, measure

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError
from minigpt.model.config import ModelConfig
from minigpt.train.config import TrainConfig
from minigpt.train.memory import (
    check_fits,
    describe_workload,
    estimate_memory,
    kept_activations,
    layer_parameters,
    layers_to_recompute,
    root_parameters,
)

GPT2 = {
    "norm": "layernorm",
    "position": "learned",
    "mlp": "gelu",
    "qk_norm": False,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
}


def _case(**changes: Any) -> tuple[TrainConfig, ModelConfig]:
    return configs({"layers": 3, "width": 128, "heads": 2, "kv": 1, "length": 64} | changes)


def _peak(**changes: Any) -> int:
    return estimate_memory(describe_workload(*_case(**changes))).peak


@pytest.mark.parametrize("family", [{}, GPT2, {"tie_embeddings": False, "qkv_bias": True}])
def test_the_parts_count_every_parameter(family: dict[str, Any]) -> None:
    _, model = _case(family=family)
    layer = sum(layer_parameters(model, 1))
    assert model.num_layers * layer + root_parameters(model, 1) == model.parameter_counts().total


def test_what_saves_memory_lowers_the_estimate() -> None:
    base = _peak(rows=16)
    assert _peak(rows=8) < base
    assert _peak(rows=16, precision="bfloat16") < base
    assert _peak(rows=16, memory={"checkpoint": "full"}) < base
    assert _peak(rows=16, memory={"checkpoint": "selective"}) < base
    assert _peak(rows=16, mesh={"fsdp": 4}) < base
    assert _peak(rows=16, mesh={"tp": 2}, kv=2) < base
    assert _peak(rows=16, vocab=32768) > base
    assert _peak(rows=16, mesh={"dp": 2, "reduce": "tree"}, micro=4) > _peak(rows=16, micro=4)


def test_a_budget_recomputes_no_more_layers_than_it_must() -> None:
    budgeted = {"checkpoint": "budget", "budget_mb": 10}
    config, model = _case(rows=16, memory=budgeted, layers=6)
    work = describe_workload(config, model)
    counts = []
    for megabytes in (40, 60, 80, 200):
        count = layers_to_recompute(work, megabytes * 10**6)
        fixed = config.replace(memory=config.memory.replace(checkpoint_layers=count))
        assert kept_activations(describe_workload(fixed, model)) <= megabytes * 10**6
        counts.append(count)
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0 < counts[0]
    with pytest.raises(ConfigError, match=r"memory.budget_mb = 1, .* every layer recomputed"):
        layers_to_recompute(work, 10**6)


@pytest.mark.parametrize(
    ("changes", "part", "remedy"),
    [
        ({"rows": 64}, "activations", "micro_batch_size"),
        ({"vocab": 65536, "layers": 1, "rows": 2}, "weights, gradients", "mesh.fsdp=2"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_to_change(
    changes: dict[str, Any], part: str, remedy: str
) -> None:
    config, model = _case(**changes)
    with pytest.raises(ConfigError, match=rf"GB on a rank by the estimate.*{part}.*{remedy}"):
        check_fits(config, model, 10**7)
    assert check_fits(config, model, 10**12).peak > 10**7
    assert check_fits(config, model, None).peak > 10**7
    lenient = from_mapping(TrainConfig, config.model_dump() | {"memory": {"check": False}})
    check_fits(lenient, model, 10**7)
    limited = from_mapping(TrainConfig, config.model_dump() | {"memory": {"limit_mb": 10}})
    with pytest.raises(ConfigError, match=r"0.01 GB are available"):
        check_fits(limited, model, 10**12)


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": {"kind": "adamw"}, "rows": 8}, {"family": GPT2, "kv": 2}]
)
def test_the_estimate_is_near_the_measured_peak(changes: dict[str, Any]) -> None:
    config, model = _case(rows=changes.pop("rows", 4), **changes)
    _, measured = measure(config, model)
    estimated = estimate_memory(describe_workload(config, model)).peak
    assert estimated == pytest.approx(measured, rel=0.10)
