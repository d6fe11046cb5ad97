"""The estimate's own rules; `bench/memory.py` checks it against measured peaks."""

from __future__ import annotations

from typing import Any

import pytest
from bench.memory import configs, measure
from bench.memory_shapes import GPT2

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError
from minigpt.model.config import ModelConfig
from minigpt.train.config import TrainConfig
from minigpt.train.memory import (
    check_fits,
    estimate_memory,
    estimate_rank,
    kept_activations,
    layers_to_recompute,
)
from minigpt.train.workload import describe_workload, layer_parameters, root_parameters

DISTILL = {"kind": "distill", "teacher": "none"}
Case = tuple[TrainConfig, ModelConfig, ModelConfig | None]


def _case(**changes: Any) -> Case:
    return configs({"layers": 3, "width": 128, "heads": 2, "kv": 1, "length": 64} | changes)


def _peak(**changes: Any) -> int:
    return estimate_memory(*_case(**changes)).peak


@pytest.mark.parametrize("family", [{}, GPT2, {"tie_embeddings": False, "qkv_bias": True}])
def test_the_parts_count_every_parameter(family: dict[str, Any]) -> None:
    _, model, _ = _case(family=family)
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
    config, model, _ = _case(rows=16, memory=budgeted, layers=6)
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
        (
            {"teacher": {"width": 512, "heads": 8}, "objective": DISTILL},
            "the frozen model",
            "a smaller one",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_what_to_change(
    changes: dict[str, Any], part: str, remedy: str
) -> None:
    config, model, teacher = _case(**changes)
    with pytest.raises(ConfigError, match=rf"GB on a rank by the estimate.*{part}.*{remedy}"):
        check_fits(config, model, 10**7, teacher)
    assert check_fits(config, model, 10**12, teacher).peak > 10**7
    assert check_fits(config, model, None, teacher).peak > 10**7
    lenient = from_mapping(TrainConfig, config.model_dump() | {"memory": {"check": False}})
    check_fits(lenient, model, 10**7, teacher)
    limited = from_mapping(TrainConfig, config.model_dump() | {"memory": {"limit_mb": 10}})
    with pytest.raises(ConfigError, match=r"0.01 GB are available"):
        check_fits(limited, model, 10**12, teacher)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": {"kind": "adamw"}, "rows": 8},
        {"family": GPT2, "kv": 2},
        {"lora": {"rank": 8}, "rows": 6},
        {"objective": {"kind": "dpo"}},
        {"teacher": {"layers": 6}, "objective": DISTILL},
        {"family": {"num_experts": 4, "expert_intermediate_size": 64}},
    ],
)
def test_the_estimate_is_near_the_measured_peak(changes: dict[str, Any]) -> None:
    case = _case(**{"rows": 4} | changes)
    _, measured = measure(*case)
    assert estimate_memory(*case).peak == pytest.approx(measured, rel=0.10)


def test_adapters_take_no_gradients_or_moments_for_what_is_frozen() -> None:
    full, adapted = (estimate_memory(*_case(**c)) for c in ({}, {"lora": {"rank": 8}}))
    assert adapted.parameters > full.parameters  # the adapters come on top
    learning = adapted.parameters - full.parameters
    assert adapted.gradients == learning and adapted.optimizer == 2 * learning
    assert adapted.peak < full.peak


def test_a_second_model_is_counted_once_a_rank() -> None:
    _, model, _ = _case()
    copy = model.parameter_counts().total * 4
    dpo = {"objective": {"kind": "dpo"}}
    assert estimate_memory(*_case(**dpo)).frozen == copy
    assert estimate_memory(*_case(**dpo, mesh={"fsdp": 2})).frozen == copy
    assert estimate_memory(*_case(**dpo, lora={"rank": 4})).frozen == 0
    *_, teacher = case = _case(objective=DISTILL, teacher={"layers": 9})
    assert teacher is not None
    assert estimate_memory(*case).frozen == teacher.parameter_counts().total * 4


def test_a_pipeline_is_as_large_as_its_largest_rank() -> None:
    config, model, _ = _case(mesh={"pp": 2}, layers=6, micro=4)
    stages = [describe_workload(config, model, stage=stage) for stage in range(2)]
    assert sum(stage.layers for stage in stages) == 6
    assert [stage.live_passes for stage in stages] == [2, 1]
    peaks = [estimate_rank(stage).peak for stage in stages]
    assert estimate_memory(config, model).peak == max(peaks) > min(peaks)
    gpipe = _peak(mesh={"pp": 2, "schedule": "gpipe"}, layers=6, micro=4)
    assert gpipe > max(peaks)  # all four micro-batches at once
