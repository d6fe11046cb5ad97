"""Whole updates over the axes: clipped, optimized and balanced as one process does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minigpt.core.config import from_mapping
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.train.config import MeshConfig, OptimizerConfig
from minigpt.train.mesh import Mesh
from minigpt.train.optimizer import Optimizer
from minigpt.train.parallelize import gathered, spread
from minigpt.train.processes import Ranks, mesh_of
from minigpt.train.step import StepOptions, TrainStep
from minigpt.train.verify_parallel import make_batch

MODEL = ModelConfig(
    vocab_size=48,
    num_layers=4,
    hidden_size=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    context_length=16,
    num_experts=4,
)
DENSE = MODEL.replace(num_experts=0)
Weights = dict[str, torch.Tensor]


def _train(mesh: Mesh, model_config: ModelConfig, count: int) -> tuple[list[Any], Weights]:
    """Run three updates of `count` micro-batches; return their results and the weights."""
    model = Decoder(model_config)
    model.init_weights(torch.Generator().manual_seed(0))
    laid = spread(model.double(), mesh, dtype=torch.float64)
    # A large eps: what is zero but for rounding must not become a full update.
    optimizer = Optimizer(laid.model, OptimizerConfig(kind="adamw", lr=0.01, muon_lr=0.01, eps=0.1))
    options = StepOptions(12, torch.float64, clip_norm=0.5, router_bias_rate=0.01)
    step = TrainStep(laid.model, optimizer, options, spread=laid)
    results = []
    for number in range(3):
        own = [number * count + index for index in mesh.micro_batches(count)]
        results.append(step.run([make_batch(model_config, one, 4) for one in own], 1.0))
    weights = gathered(laid.model, mesh).state_dict()
    return results, {name: tensor.clone() for name, tensor in weights.items()}


def _train_rank(
    config: MeshConfig, model_config: ModelConfig, count: int
) -> tuple[list[Any], Weights]:
    return _train(mesh_of(config), model_config, count)


@pytest.mark.parametrize(
    ("mesh", "model"),
    [
        ({"pp": 2}, DENSE),
        ({"pp": 2, "schedule": "zero-bubble", "virtual_stages": 2}, MODEL),
        ({"ep": 2}, MODEL),
        ({"cp": 2}, MODEL),
        ({"tp": 2}, MODEL),
    ],
    ids=["pp", "pp-zero-bubble-moe", "ep", "cp-moe", "tp-moe"],
)
def test_updates_are_those_of_one_process(
    mesh: dict[str, Any], model: ModelConfig, two_ranks: Ranks
) -> None:
    expected, weights = _train(Mesh(MeshConfig()), model, 4)
    for results, found in two_ranks.run(_train_rank, from_mapping(MeshConfig, mesh), model, 4):
        for ours, theirs in zip(results, expected, strict=True):
            assert ours[:2] == pytest.approx(theirs[:2], rel=1e-9)
        assert found.keys() == weights.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-9)
    assert all(result.grad_norm > 0.5 for result in expected)  # so that it was clipped
    if model.num_experts:
        assert weights["model.layers.0.mlp.gate.bias"].any()
