"""A run's parts on a mesh, from a recipe and a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt.core.artifact import open_artifact
from minigpt.core.clock import SystemClock
from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError
from minigpt.train.build import (
    build,
    fit_minutes,
    micro_batches,
    open_sources,
    resolve_for,
    take_batches,
)
from minigpt.train.config import TrainConfig
from minigpt.train.processes import Ranks, mesh_of


def _recipe(dataset: Path, **changes: Any) -> TrainConfig:
    tree: dict[str, Any] = {
        "data": str(dataset),
        "size": 2,
        "model": {"hidden_size": 32, "head_dim": 16, "vocab_size": 260},
        "steps": 3,
        "batch": {"sequence_length": 32, "tokens_per_step": 512, "micro_batch_size": 2},
        "validation": {"every": 0, "tokens": 512, "sample_tokens": 0},
        "trackers": {"mlflow": False},
        "precision": "float32",
        "compile": False,
        "threads": 1,
        "device": "cpu",
    }
    return from_mapping(TrainConfig, tree | changes)


def _train(dataset: Path, mesh: dict[str, Any]) -> tuple[list[str], int, float]:
    torch.set_num_threads(1)
    recipe = _recipe(dataset, mesh=mesh)
    sources = open_sources(recipe, open_artifact(dataset))
    resolved = resolve_for(recipe, sources)
    parts = build(resolved.config, resolved.model, sources, mesh_of(recipe.mesh))
    losses = []
    for _ in range(3):
        batches = take_batches(parts.loader, parts.mesh, micro_batches(resolved.config))
        result = parts.step.run(batches, 1.0)
        assert result is not None
        losses.append(result.loss.hex())
    score = parts.validator.score(parts.whole_model())
    assert score is not None
    return losses, parts.loader.next_sample, score.bits_per_byte


def test_a_recipe_trains_alike_on_one_two_and_four_ranks(
    tiny_dataset: Path, two_ranks: Ranks, four_ranks: Ranks
) -> None:
    alone = _train(tiny_dataset, {"reduce": "tree"})
    assert alone[1] == 3 * 16
    for mesh, pool in (
        ({"dp": 2, "reduce": "tree"}, two_ranks),
        ({"dp": 4, "reduce": "tree"}, four_ranks),
    ):
        assert all(found == alone for found in pool.run(_train, tiny_dataset, mesh))


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tp": 2}, {"dp": 2, "fsdp": 2}])
def test_a_sharded_recipe_comes_close(
    tiny_dataset: Path, four_ranks: Ranks, mesh: dict[str, Any]
) -> None:
    losses, _, bits = _train(tiny_dataset, {})
    for found, samples, found_bits in four_ranks.run(_train, tiny_dataset, mesh):
        assert samples == 3 * 16
        exact = [float.fromhex(loss) for loss in losses]
        assert [float.fromhex(loss) for loss in found] == pytest.approx(exact, rel=1e-3)
        assert found_bits == pytest.approx(bits, rel=1e-2)


def _fitted_steps(dataset: Path) -> Any:
    torch.set_num_threads(1)
    recipe = _recipe(dataset, mesh={"dp": 2}, steps="auto", minutes=0.05)
    sources = open_sources(recipe, open_artifact(dataset))
    resolved = resolve_for(recipe, sources)
    parts = build(resolved.config, resolved.model, sources, mesh_of(recipe.mesh))
    clock = SystemClock()
    return fit_minutes(resolved.config, parts, clock, clock.monotonic()).steps


def test_ranks_agree_on_the_steps_that_fit(tiny_dataset: Path, two_ranks: Ranks) -> None:
    first, second = two_ranks.run(_fitted_steps, tiny_dataset)
    assert first == second >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"dp": 3}}, "not a multiple of data ranks"),
        ({"mesh": {"tp": 4}}, r"num_heads = 2 is not a multiple of mesh\.tp = 4"),
        ({"mesh": {"dp": 2, "compress": "bf16"}}, "needs NCCL"),
        ({"precision": "float16"}, "float16 on a CPU"),
        ({"precision": "float8"}, "Hopper"),
        ({"memory": {"offload_activations": True}}, "meaningless"),
        ({"memory": {"limit_mb": 1}}, "GB on a rank by the estimate"),
        (
            {
                "mesh": {"dp": 2, "reduce": "tree"},
                "batch": {"sequence_length": 32, "tokens_per_step": 384, "micro_batch_size": 2},
            },
            "power of two of micro-batches of a step, not 6",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_built(
    tiny_dataset: Path, changes: dict[str, Any], message: str
) -> None:
    recipe = _recipe(tiny_dataset, **changes)
    sources = open_sources(recipe, open_artifact(tiny_dataset))
    with pytest.raises(ConfigError, match=message):
        resolve_for(recipe, sources)
