from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from tests.train.proof import EXPERTS, Case, name_of, prove

from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.moe import Router
from minigpt.train.attention import MatmulAttention
from minigpt.train.config import MeshConfig
from minigpt.train.expert_parallel import balance_experts
from minigpt.train.parallelize import alone, gathered, spread
from minigpt.train.processes import Ranks, mesh_of
from minigpt.train.step import StepOptions, make_passes
from minigpt.train.verify_parallel import make_batch

ONE_EACH = EXPERTS | {"num_experts": 2, "experts_per_token": 1, "norm_topk_prob": False}
PAIR: list[Case] = [
    ({"ep": 2}, EXPERTS),
    ({"ep": 2}, EXPERTS | {"norm_topk_prob": False, "router_bias": False}),
    ({"ep": 2}, ONE_EACH),
    *(({axis: 2}, EXPERTS) for axis in ("dp", "fsdp", "tp")),
]
FOUR: list[Case] = [
    ({"ep": 4}, EXPERTS),
    *(({"ep": 2, axis: 2}, EXPERTS) for axis in ("dp", "fsdp", "tp", "cp", "pp")),
    ({"pp": 2, "ep": 2, "schedule": "zero-bubble"}, EXPERTS),
]
MODEL = ModelConfig(
    vocab_size=48,
    num_layers=2,
    hidden_size=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    context_length=32,
    num_experts=8,
)


@pytest.mark.parametrize("case", PAIR, ids=name_of)
def test_two_ranks_compute_what_one_does(case: Case, two_ranks: Ranks) -> None:
    names = prove(case, two_ranks)
    assert "model.layers.1.mlp.gate.weight" in names
    assert "model.layers.1.mlp.experts.1.down_proj.weight" in names


@pytest.mark.parametrize("case", FOUR, ids=name_of)
def test_four_ranks_compute_what_one_does(case: Case, four_ranks: Ranks) -> None:
    prove(case, four_ranks)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_layers_around_experts_compile_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compiled)
    found = {}
    for compile in (False, True):
        model = _build().double()
        options = StepOptions(12, torch.float64, compile=compile)
        passes = make_passes(alone(model), options)
        for number in range(3):  # loads of experts that differ
            limit = torch.compiler.set_stance("fail_on_recompile") if number else nullcontext()
            model.zero_grad()
            with limit:
                passes.run([make_batch(MODEL, number, 4)], 100.0, lambda: False)
        found[compile] = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient, rtol=0, atol=1e-10)


def _build() -> Decoder:
    model = Decoder(MODEL)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def _hold() -> tuple[set[str], bool]:
    """Return the names that a rank holds, and whether gathering gives the whole model again."""
    mesh = mesh_of(MeshConfig(ep=2))
    before = _build().state_dict()
    laid = spread(_build(), mesh)
    after = gathered(laid.model, mesh).state_dict()
    equal = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    return set(laid.model.state_dict()), equal


def test_ranks_hold_their_own_experts_and_gather_the_whole(two_ranks: Ranks) -> None:
    (first, whole), (last, again) = two_ranks.run(_hold)
    assert whole and again
    assert not [name for name in first & last if ".experts." in name]
    own = {name.split(".")[5] for name in first if ".experts." in name}
    assert own == {"0", "1", "2", "3"}


def _balance(rounds: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Route the same batches, moving the bias after each; return how uneven the load was."""
    mesh = mesh_of(MeshConfig(ep=2))
    laid = spread(_build(), mesh)
    routers = [module for module in laid.model.modules() if isinstance(module, Router)]
    for router in routers:  # some experts start far ahead
        assert router.bias is not None
        router.bias[:2] = 0.2
    own = make_batch(MODEL, mesh.data_rank, 4)
    excess = []
    for _ in range(rounds):
        laid.call(own.tokens, own.positions, MatmulAttention(own.documents))
        counted = [router.load.clone() for router in routers if router.load is not None]
        loads = [mesh.sum(load, "ep") for load in counted]
        excess.append(max(float(load.max() / load.double().mean()) for load in loads))
        balance_experts(laid.model, 0.01, mesh)
    return excess, {n: b for n, b in laid.model.named_buffers() if n.endswith("gate.bias")}


def test_balancing_evens_out_the_load_alike_on_all_ranks(two_ranks: Ranks) -> None:
    (excess, biases), (again, others) = two_ranks.run(_balance, 60)
    assert excess == again
    assert excess[0] > 2
    assert excess[-1] < 1.5
    assert len(biases) == 2
    assert all(torch.equal(bias, others[name]) for name, bias in biases.items())
