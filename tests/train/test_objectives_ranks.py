"""Objectives and adapters on a mesh: the gradients of one process, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError
from minigpt.data.loader import Batch
from minigpt.model.config import LoraConfig, ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.lora import add_adapters, merged_state, trained_state
from minigpt.train.config import MeshConfig, OptimizerConfig, TrainConfig
from minigpt.train.distillation import DistillationObjective
from minigpt.train.objective import IGNORED_TARGET, NextToken, Objective
from minigpt.train.optimizer import Optimizer
from minigpt.train.parallelize import gathered, spread
from minigpt.train.preference import AdaptersOff, FrozenCopy, PreferenceObjective
from minigpt.train.processes import Ranks, mesh_of
from minigpt.train.step import StepOptions, TrainStep
from minigpt.train.verify_parallel import make_batch

MODEL = ModelConfig(
    vocab_size=64,
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    context_length=32,
)
MICRO_BATCHES, STEPS = 4, 2


def _decoder(config: ModelConfig, seed: int) -> Decoder:
    model = Decoder(config).double()
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def adapted(config: ModelConfig, rank: int) -> Decoder:
    """Return a model, with adapters where their rank is not 0, that already do something."""
    model = _decoder(config, 5)
    if rank:
        add_adapters(model, LoraConfig(rank=rank), torch.Generator().manual_seed(1))
        model.double()
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # zero at first, which would hide errors
                torch.nn.init.normal_(
                    parameter, std=0.1, generator=torch.Generator().manual_seed(len(name))
                )
    return model


def objective_of(kind: str, rank: int, config: ModelConfig) -> Objective:
    """Return an objective; of distillation, "distill-" and the divergence, or the third one."""
    if kind == "dpo":
        reference = AdaptersOff() if rank else FrozenCopy(_decoder(config, 9))
        return PreferenceObjective(reference, beta=0.5, label_smoothing=0.1)
    if kind.startswith("distill"):
        divergence: Any = kind.removeprefix("distill").removeprefix("-") or "jsd"
        teacher = _decoder(config, 9)
        return DistillationObjective(teacher, divergence=divergence, temperature=2.0, weight=0.7)
    return NextToken()


def _batch(number: int) -> Batch:
    """Rows with some targets each; the second pair of every third batch is skipped."""
    made = make_batch(MODEL, number, 4)
    made.targets[1, 0] = 5
    if number % 3 == 0:
        made.targets[2:] = IGNORED_TARGET
    return made


def _run(config: MeshConfig, kind: str, rank: int) -> tuple[list[Any], dict[str, Tensor]]:
    """Return losses, norms and metrics of some steps, and what the model is after them."""
    mesh = mesh_of(config)
    model = adapted(MODEL, rank)
    laid = spread(model, mesh, dtype=torch.float64)
    rates = OptimizerConfig(kind="adamw", lr=0.01, muon_lr=0.02)
    options = StepOptions(16, torch.float64, clip_norm=0.05)
    step = TrainStep(
        laid.model,
        Optimizer(laid.model, rates),
        options,
        objective_of(kind, rank, MODEL),
        spread=laid,
    )
    told = []
    for number in range(STEPS):
        mine = [number * MICRO_BATCHES + m for m in mesh.micro_batches(MICRO_BATCHES)]
        result = step.run([_batch(m) for m in mine], 1.0)
        assert result is not None
        told.append((result.loss, result.grad_norm, dict(result.metrics)))
    saved = trained_state(laid.model)
    assert len(saved) == (2 * 2 * 7 if rank else len(model.state_dict()))
    assert all(isinstance(t, DTensor) == (config.fsdp > 1) for t in saved.values())
    return told, merged_state(gathered(laid.model, mesh))


@pytest.mark.parametrize(("kind", "rank"), [("dpo", 0), ("dpo", 3), ("distill", 0), ("sft", 3)])
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"fsdp": 2}, {"dp": 2, "reduce": "tree"}], ids=str)
def test_steps_end_where_one_process_ends(
    two_ranks: Ranks, mesh: dict[str, Any], kind: str, rank: int
) -> None:
    told, weights = _run(MeshConfig(), kind, rank)
    assert (told[0][2].keys() == {"margin", "accuracy"}) == (kind == "dpo")
    for found, after in two_ranks.run(_run, from_mapping(MeshConfig, mesh), kind, rank):
        for (loss, norm, metrics), expected in zip(found, told, strict=True):
            assert loss == pytest.approx(expected[0], abs=1e-10)
            assert norm == pytest.approx(expected[1], abs=1e-10)
            assert metrics == pytest.approx(expected[2], abs=1e-10)
        assert after.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"kind": "dpo"}, "mesh": {"pp": 2}}, r"kind = dpo with mesh\.pp = 2"),
        (
            {"objective": {"kind": "distill", "teacher": "x"}, "mesh": {"pp": 2}},
            r"kind = distill with mesh\.pp = 2",
        ),
        (
            {"lora": {"rank": 2, "dropout": 0.1}, "mesh": {"tp": 2}},
            r"lora\.dropout = 0\.1 with mesh\.tp = 2",
        ),
        ({"lora": {"rank": 2}, "precision": "float8"}, "precision = float8"),
        (
            {"lora": {"rank": 2, "dropout": 0.1}, "memory": {"checkpoint": "full"}},
            r"lora\.dropout = 0\.1 with memory\.checkpoint = full",
        ),
    ],
)
def test_what_can_not_be_spread_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(TrainConfig, {"data": "x", "initialize_from": "y"} | changes)
