"""Objectives and adapters over the axes that cut a model or its rows: one process's gradients.

In float64, with unequal numbers of targets in the micro-batches, one and four a rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.train.test_objectives_ranks import adapted, objective_of
from torch import Tensor
from torch.distributed.tensor import DTensor

from minigpt.core.config import from_mapping
from minigpt.data.loader import Batch
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.train.config import MeshConfig
from minigpt.train.gradients import gradient_norm
from minigpt.train.mesh import DATA_AXES
from minigpt.train.objective import IGNORED_TARGET
from minigpt.train.parallelize import spread
from minigpt.train.processes import Ranks, mesh_of
from minigpt.train.step import StepOptions, make_passes
from minigpt.train.verify_parallel import make_batch

MODEL = ModelConfig(
    vocab_size=48,
    num_layers=4,
    hidden_size=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    context_length=16,
)
EXPERTS = MODEL.replace(num_experts=4)
ZERO_BUBBLE = {"pp": 2, "schedule": "zero-bubble", "virtual_stages": 2}
Case = tuple[dict[str, Any], str, int, ModelConfig]
"""A mesh, an objective, the adapters' rank, 0 for none, and a model."""

PAIR: list[Case] = [
    *(({axis: 2}, "sft", 3, MODEL) for axis in ("tp", "pp", "cp")),
    (ZERO_BUBBLE, "sft", 3, MODEL),
    ({"tp": 2}, "sft", 3, MODEL.replace(tie_embeddings=False, qkv_bias=True)),
    ({"pp": 2}, "sft", 3, MODEL.replace(tie_embeddings=False)),
    *(({axis: 2}, "sft", 3, EXPERTS) for axis in ("ep", "tp", "pp")),
    *(({axis: 2}, "dpo", rank, MODEL) for axis in ("tp", "cp") for rank in (0, 3)),
    *(({"ep": 2}, "dpo", rank, EXPERTS) for rank in (0, 3)),
    *(
        ({"tp": 2}, kind, 0, MODEL.replace(tie_embeddings=False))
        for kind in ("distill", "distill-forward-kl", "distill-reverse-kl")
    ),
    *(({axis: 2}, "distill", rank, MODEL) for axis in ("tp", "cp") for rank in (0, 3)),
    ({"ep": 2}, "distill", 0, EXPERTS),
]
FOUR: list[Case] = [
    *(({"tp": 2, axis: 2}, "sft", 3, MODEL) for axis in ("dp", "fsdp", "cp", "pp")),
    *(({"pp": 2, axis: 2}, "sft", 3, MODEL) for axis in ("dp", "fsdp", "cp")),
    (ZERO_BUBBLE | {"fsdp": 2}, "sft", 3, MODEL),
    *(({"ep": 2, axis: 2}, "sft", 3, EXPERTS) for axis in ("dp", "fsdp", "cp", "tp", "pp")),
    *(({"tp": 2, axis: 2}, "dpo", 3, MODEL) for axis in ("dp", "fsdp", "cp")),
    *(({"cp": 2, axis: 2}, "dpo", 0, MODEL) for axis in ("dp", "fsdp")),
    *(({"tp": 2, axis: 2}, "distill", 0, MODEL) for axis in ("dp", "fsdp", "cp")),
]


def _name(case: Case) -> str:
    mesh, kind, rank, model = case
    words = [kind, *(f"{key}{size}" for key, size in mesh.items())]
    words += ["lora"] * bool(rank) + ["moe"] * bool(model.num_experts)
    return "-".join(words + ["untied"] * (not model.tie_embeddings))


def _batch(model: ModelConfig, number: int) -> Batch:
    """Rows with some targets each; the second pair of every third batch is skipped."""
    made = make_batch(model, number, 4)
    made.targets[1, 0] = 5
    if number % 3 == 0:
        made.targets[2:] = IGNORED_TARGET
    return made


def _gradients(
    config: MeshConfig, kind: str, rank: int, model_config: ModelConfig, count: int
) -> dict[str, Tensor]:
    """Return the loss, the norm and each trained parameter's gradient of a global batch."""
    mesh = mesh_of(config)
    laid = spread(adapted(model_config, rank), mesh, dtype=torch.float64)
    objective = objective_of(kind, rank, model_config)
    passes = make_passes(laid, StepOptions(12, torch.float64), objective)
    batches = [_batch(model_config, number) for number in mesh.micro_batches(count)]
    counted = torch.tensor(sum(objective.count(batch) for batch in batches))
    number = int(mesh.sum(counted, *DATA_AXES))
    total = passes.run(batches, number, lambda: False)
    assert total is not None
    sums = torch.tensor(list(objective.take_sums().values()), dtype=torch.float64)
    found = {
        "loss": torch.tensor(total / number),
        "norm": gradient_norm(laid.counted, mesh, laid.cuts),
        "metrics": mesh.sum(sums, *DATA_AXES) / number,
    }
    for name, parameter in laid.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            whole = parameter.grad
            found[name] = whole.full_tensor() if isinstance(whole, DTensor) else whole
    return found


def _prove(case: Case, ranks: Ranks) -> None:
    mesh, kind, rank, model = case
    config = from_mapping(MeshConfig, mesh)
    names = {name for name, p in Decoder(model).named_parameters()} if not rank else set()
    for accumulation in (1, 4):
        count = accumulation * config.data_size
        expected = _gradients(MeshConfig(), kind, rank, model, count)
        assert names <= expected.keys()
        everywhere = ranks.run(_gradients, config, kind, rank, model, count)
        # Stages and spread experts have theirs; together the ranks have all.
        assert set().union(*everywhere) == expected.keys()
        for found in everywhere:
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10, msg=name)
        # Gradients that are all but zero would agree with anything.
        assert all(value.abs().max() > 1e-7 for value in expected.values() if value.numel())


@pytest.mark.parametrize("case", PAIR, ids=_name)
def test_two_ranks_compute_what_one_does(case: Case, two_ranks: Ranks) -> None:
    _prove(case, two_ranks)


@pytest.mark.parametrize("case", FOUR, ids=_name)
def test_four_ranks_compute_what_one_does(case: Case, four_ranks: Ranks) -> None:
    _prove(case, four_ranks)
