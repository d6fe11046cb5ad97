"""Whole steps on a mesh: clipping, optimizers, votes, compression, mixed precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError
from minigpt.model.attention import CausalAttention
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.train.config import MemoryConfig, MeshConfig, OptimizerConfig
from minigpt.train.mesh import Mesh
from minigpt.train.optimizer import Optimizer
from minigpt.train.parallelize import alone, check_compression, gathered, spread
from minigpt.train.processes import Ranks, mesh_of
from minigpt.train.step import NonFiniteError, StepOptions, TrainStep
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
MICRO_BATCHES, STEPS = 4, 3
# Long gradients, so that clipping decides the result.
CLIP = 0.05
Weights = dict[str, Tensor]

MESHES: list[dict[str, Any]] = [
    {"dp": 4},
    {"dp": 2, "fsdp": 2},
    {"fsdp": 4, "reshard": "zero2"},
    {"fsdp": 2, "tp": 2},
    {"dp": 2, "tp": 2},
]


def _step(
    mesh_config: MeshConfig,
    kind: str,
    dtype: torch.dtype,
    weights: torch.dtype,
    memory: MemoryConfig | None = None,
) -> tuple[TrainStep, Mesh, Decoder]:
    mesh = mesh_of(mesh_config)
    model = Decoder(MODEL).to(weights)
    model.init_weights(torch.Generator().manual_seed(5))
    laid = spread(model, mesh, dtype=dtype) if not mesh.is_single else alone(model)
    rates = OptimizerConfig.model_validate({"kind": kind, "lr": 0.01, "muon_lr": 0.02})
    options = StepOptions(16, dtype, clip_norm=CLIP, memory=memory or MemoryConfig())
    return TrainStep(model, Optimizer(model, rates), options, spread=laid), mesh, model


def _train(
    config: MeshConfig, kind: str, dtype: torch.dtype, weights: torch.dtype, steps: int = STEPS
) -> tuple[list[float], Weights]:
    step, mesh, model = _step(config, kind, dtype, weights)
    losses = []
    for number in range(steps):
        mine = [number * MICRO_BATCHES + m for m in mesh.micro_batches(MICRO_BATCHES)]
        result = step.run([make_batch(MODEL, m) for m in mine], 1.0)
        assert result is not None and result.grad_norm > CLIP
        losses += [result.loss, result.grad_norm]
    return losses, dict(gathered(model).state_dict())


def _id(value: Any) -> str | None:
    return "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize("mesh", MESHES, ids=_id)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_steps_end_where_one_process_ends(
    four_ranks: Ranks, mesh: dict[str, Any], kind: str
) -> None:
    wide = torch.float64
    losses, weights = _train(MeshConfig(), kind, wide, wide)
    # Muon iterates in bfloat16, where an error of rounding may show as one of 1/256.
    tolerance = 1e-9 if kind == "adamw" else 2e-3
    for found in four_ranks.run(_train, from_mapping(MeshConfig, mesh), kind, wide, wide):
        assert found[0] == pytest.approx(losses, rel=1e-9 if kind == "adamw" else 1e-2)
        assert found[1].keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=tolerance)


def _mixed(config: MeshConfig) -> tuple[list[float], set[torch.dtype]]:
    losses, _ = _train(config, "adamw", torch.bfloat16, torch.float32)
    step, _, model = _step(config, "adamw", torch.bfloat16, torch.float32)
    step.run([make_batch(MODEL, dist.get_rank())], 1.0)
    return losses, {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("mesh", [{"fsdp": 2}, {"dp": 2}, {"tp": 2}], ids=_id)
def test_mixed_precision_keeps_weights_wide(two_ranks: Ranks, mesh: dict[str, Any]) -> None:
    exact, _ = _train(MeshConfig(), "adamw", torch.float32, torch.float32)
    alone, _ = _train(MeshConfig(), "adamw", torch.bfloat16, torch.float32)
    for losses, dtypes in two_ranks.run(_mixed, from_mapping(MeshConfig, mesh)):
        assert dtypes == {torch.float32}
        assert losses != exact
        assert losses == pytest.approx(alone, rel=0.03)


def _poisoned(config: MeshConfig) -> bool:
    step, mesh, model = _step(config, "adamw", torch.float32, torch.float32)
    before = {name: _local(tensor).clone() for name, tensor in model.state_dict().items()}
    batches = [make_batch(MODEL, m) for m in mesh.micro_batches(MICRO_BATCHES)]
    passes = step._passes
    original = passes.run

    def run(*arguments: Any) -> float | None:
        total = original(*arguments)
        return float("nan") if dist.get_rank() == 1 else total

    passes.run = run  # type: ignore[method-assign, assignment]
    with pytest.raises(NonFiniteError):
        step.run(batches, 1.0)
    after = model.state_dict()
    same = all(torch.equal(_local(after[name]), tensor) for name, tensor in before.items())
    return same and all(parameter.grad is None for parameter in model.parameters())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _stopped_by_one(config: MeshConfig) -> bool:
    step, mesh, _ = _step(config, "adamw", torch.float32, torch.float32)
    batches = [make_batch(MODEL, m) for m in mesh.micro_batches(MICRO_BATCHES)]
    return step.run(batches, 1.0, lambda: dist.get_rank() == 1) is None


@pytest.mark.parametrize("mesh", [{"dp": 2}, {"fsdp": 2}, {"tp": 2}], ids=_id)
def test_what_one_rank_sees_all_decide(two_ranks: Ranks, mesh: dict[str, Any]) -> None:
    config = from_mapping(MeshConfig, mesh)
    assert two_ranks.run(_poisoned, config) == [True, True]
    assert two_ranks.run(_stopped_by_one, config) == [True, True]


def _compressed(kind: str) -> tuple[list[float], bool]:
    config = MeshConfig.model_validate({"dp": 2, "compress": kind})
    losses, weights = _train(config, "adamw", torch.float32, torch.float32, steps=12)
    flat = torch.cat([tensor.flatten() for _, tensor in sorted(weights.items())])
    other = flat.clone()
    dist.broadcast(other, src=0)
    return losses, torch.equal(flat, other)


@pytest.mark.parametrize("kind", ["fp16", "powersgd"])
def test_compressed_gradients_train_alike_on_all_replicas(two_ranks: Ranks, kind: str) -> None:
    exact, _ = _train(MeshConfig(), "adamw", torch.float32, torch.float32, steps=12)
    for losses, same in two_ranks.run(_compressed, kind):
        assert same
        assert losses != exact  # something was compressed
        assert losses[::2] == pytest.approx(exact[::2], rel=0.02)


def test_bf16_compression_needs_nccl() -> None:
    with pytest.raises(ConfigError, match=r"bf16 needs NCCL.*fp16 or powersgd"):
        check_compression("bf16", "cpu")
    check_compression("bf16", "cuda")


def _shares(config: MeshConfig) -> tuple[int, bool]:
    _, _, model = _step(config, "adamw", torch.float32, torch.float32)
    held = sum(_local(p.detach()).numel() for p in model.parameters())
    whole = gathered(model)
    tokens = torch.arange(8)[None]
    hidden = whole(tokens, tokens, CausalAttention())
    return held, bool(torch.isfinite(whole.logits(hidden)).all())


def test_ranks_hold_shares_and_can_gather_the_whole(two_ranks: Ranks, four_ranks: Ranks) -> None:
    total = MODEL.parameter_counts().total
    for held, finite in two_ranks.run(_shares, MeshConfig(fsdp=2)):
        assert finite and abs(held / total - 1 / 2) < 0.02
    for held, finite in four_ranks.run(_shares, MeshConfig(fsdp=2, tp=2)):
        assert finite and abs(held / total - 1 / 4) < 0.02
    for held, finite in two_ranks.run(_shares, MeshConfig(dp=2)):
        assert finite and held == total


def _recomputed(config: MeshConfig, memory: MemoryConfig) -> list[float]:
    step, mesh, _ = _step(config, "adamw", torch.float32, torch.float32, memory)
    batches = [make_batch(MODEL, m) for m in mesh.micro_batches(MICRO_BATCHES)]
    results = [step.run(batches, 1.0) for _ in range(2)]
    return [r.grad_norm for r in results if r is not None]


@pytest.mark.parametrize("mesh", [{"fsdp": 2}, {"dp": 2}, {"tp": 2}], ids=_id)
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputing_layers_changes_no_bit(
    two_ranks: Ranks, mesh: dict[str, Any], kind: str
) -> None:
    config = from_mapping(MeshConfig, mesh)
    kept = two_ranks.run(_recomputed, config, MemoryConfig())
    memory = MemoryConfig.model_validate({"checkpoint": kind})
    assert two_ranks.run(_recomputed, config, memory) == kept
