"""Sums that do not depend on the number of ranks, down to the last bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minigpt.core.errors import ConfigError
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.train.config import MeshConfig, OptimizerConfig
from minigpt.train.finish import weights_sha256
from minigpt.train.optimizer import Optimizer
from minigpt.train.parallelize import spread
from minigpt.train.processes import Ranks, mesh_of
from minigpt.train.step import StepOptions, TrainStep
from minigpt.train.tree import TreeSum, butterfly_sum, check_tree
from minigpt.train.verify_parallel import make_batch

MICRO_BATCHES, STEPS = 8, 4
MODEL = ModelConfig(
    vocab_size=97,
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    context_length=24,
)


def _tree(leaves: list[Tensor]) -> Tensor:
    if len(leaves) == 1:
        return leaves[0]
    half = len(leaves) // 2
    return _tree(leaves[:half]) + _tree(leaves[half:])


@settings(max_examples=30)
@given(st.integers(0, 6), st.integers(0, 10_000))
def test_the_counter_sums_as_the_full_binary_tree(power: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(5, generator=generator) * 10.0 ** (i % 7) for i in range(2**power)]
    expected = _tree(leaves)
    tree = TreeSum()
    for number, leaf in enumerate(leaves):
        tree.add([leaf.clone()])
        assert len(tree._pending) <= math.log2(number + 1) + 1
    assert torch.equal(tree.total()[0], expected)


@settings(max_examples=30)
@given(st.integers(0, 5), st.integers(0, 3), st.integers(0, 10_000))
def test_blocks_and_then_the_climb_give_the_same_bits(power: int, split: int, seed: int) -> None:
    ranks = 2 ** min(split, power)
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(3, generator=generator) * 10.0 ** (i % 5) for i in range(2**power)]
    share = len(leaves) // ranks
    sums = []
    for rank in range(ranks):
        tree = TreeSum()
        for leaf in leaves[rank * share : (rank + 1) * share]:
            tree.add([leaf.clone()])
        sums.append(tree.total()[0])
    assert torch.equal(_tree(sums), _tree(leaves))


def test_a_number_that_makes_no_tree_is_refused() -> None:
    with pytest.raises(ConfigError, match="power of two of micro-batches of a step, not 6"):
        check_tree(6, 2)
    with pytest.raises(ConfigError, match="power of two of data ranks, not 3"):
        check_tree(8, 3)
    check_tree(8, 4)


def _climb() -> list[Tensor]:
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    tensors = [torch.randn(7, generator=generator), torch.randn(2, 3, generator=generator).double()]
    butterfly_sum(tensors, mesh_of(MeshConfig(dp=4)).group("dp"))
    return tensors


def test_every_rank_reaches_the_root(four_ranks: Ranks) -> None:
    leaves = []
    for rank in range(4):
        generator = torch.Generator().manual_seed(rank)
        first = torch.randn(7, generator=generator)
        leaves.append([first, torch.randn(2, 3, generator=generator).double()])
    for found in four_ranks.run(_climb):
        for index, tensor in enumerate(found):
            assert torch.equal(tensor, _tree([leaf[index] for leaf in leaves]))


def _train(
    mesh_config: MeshConfig, kind: str, steps: range, state: tuple[Any, Any] | None
) -> tuple[list[str], str, tuple[Any, Any]]:
    """Train some steps of a fixed run; return losses' bits, the weights' hash and the state."""
    torch.set_num_threads(1)
    mesh = mesh_of(mesh_config)
    model = Decoder(MODEL)
    model.init_weights(torch.Generator().manual_seed(3))
    laid = spread(model, mesh)
    rates = OptimizerConfig.model_validate({"kind": kind, "lr": 0.01, "muon_lr": 0.02})
    optimizer = Optimizer(model, rates)
    if state is not None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    step = TrainStep(model, optimizer, StepOptions(16, torch.float32, clip_norm=0.5), spread=laid)
    losses = []
    for number in steps:
        first = number * MICRO_BATCHES
        mine = mesh.micro_batches(MICRO_BATCHES)
        result = step.run([make_batch(MODEL, first + m) for m in mine], 1.0)
        assert result is not None
        losses.append(f"{result.loss.hex()} {result.grad_norm.hex()}")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    return losses, weights_sha256(weights), (weights, moments)


def _mesh(ranks: int) -> MeshConfig:
    return MeshConfig(dp=ranks, reduce="tree")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_one_two_and_four_ranks_give_the_same_bits(
    two_ranks: Ranks, four_ranks: Ranks, kind: str
) -> None:
    losses, weights, _ = _train(_mesh(1), kind, range(STEPS), None)
    assert len(set(losses)) == STEPS
    for ranks, pool in ((2, two_ranks), (4, four_ranks)):
        for found in pool.run(_train, _mesh(ranks), kind, range(STEPS), None):
            assert found[0] == losses and found[1] == weights, f"{ranks} ranks"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_number_of_ranks_may_change_in_the_middle(
    two_ranks: Ranks, four_ranks: Ranks, kind: str
) -> None:
    losses, weights, _ = _train(_mesh(1), kind, range(STEPS), None)
    first, _, state = four_ranks.run(_train, _mesh(4), kind, range(1), None)[0]
    second, _, state = two_ranks.run(_train, _mesh(2), kind, range(1, 3), state)[0]
    third, found, _ = _train(_mesh(1), kind, range(3, STEPS), state)
    assert first + second + third == losses and found == weights
