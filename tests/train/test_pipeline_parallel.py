from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.train.proof import EXPERTS, GROUPED, LEARNED, UNTIED, Case, name_of, prove
from torch.distributed.tensor import DTensor

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.train.config import MeshConfig
from minigpt.train.parallelize import gathered, spread
from minigpt.train.pipeline_parallel import balance_layers, count_pieces
from minigpt.train.processes import Ranks, mesh_of
from minigpt.train.step import StepOptions, make_passes
from minigpt.train.verify_parallel import make_batch

SCHEDULES: list[tuple[str, int]] = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("zero-bubble", 1),
    ("zero-bubble", 2),
]

MODEL = ModelConfig(
    vocab_size=48,
    num_layers=2,
    hidden_size=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    context_length=16,
)


def _mesh(schedule: str, virtual: int) -> dict[str, Any]:
    return {"pp": 2, "schedule": schedule, "virtual_stages": virtual}


PAIR: list[Case] = [
    *((_mesh(*schedule), kind) for schedule in SCHEDULES for kind in (GROUPED, UNTIED)),
    (_mesh("1f1b", 1), LEARNED),
    (_mesh("zero-bubble", 2), EXPERTS),
]
FOUR: list[Case] = [
    ({"pp": 4}, UNTIED),
    ({"pp": 4, "schedule": "zero-bubble"}, GROUPED),
    *(
        (_mesh(*schedule) | {axis: 2}, GROUPED)
        for axis in ("dp", "fsdp", "tp", "cp")
        for schedule in SCHEDULES[1:]
    ),
    (_mesh("zero-bubble", 2) | {"fsdp": 2, "reshard": "zero2"}, UNTIED),
]


@pytest.mark.parametrize("case", PAIR, ids=name_of)
def test_two_ranks_compute_what_one_does(case: Case, two_ranks: Ranks) -> None:
    prove(case, two_ranks)


@pytest.mark.parametrize("case", FOUR, ids=name_of)
def test_four_ranks_compute_what_one_does(case: Case, four_ranks: Ranks) -> None:
    prove(case, four_ranks)


def _hold(config: MeshConfig, model_config: ModelConfig) -> tuple[set[str], bool]:
    """Return the names that a rank holds, and whether gathering gives the whole model again."""
    mesh = mesh_of(config)
    model = Decoder(model_config)
    model.init_weights(torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    laid = spread(model, mesh)
    after = gathered(laid.model, mesh).state_dict()
    equal = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    return set(laid.model.state_dict()), equal


@pytest.mark.parametrize("tied", [True, False])
def test_ranks_hold_their_own_stages_and_gather_the_whole(tied: bool, two_ranks: Ranks) -> None:
    shape = dict.fromkeys(("hidden_size", "num_heads", "num_kv_heads", "head_dim"), 4)
    sizes = {"vocab_size": 8, "num_layers": 5, "intermediate_size": 8, "context_length": 8}
    model = ModelConfig.model_validate(shape | sizes | {"tie_embeddings": tied})
    config = MeshConfig(pp=2, schedule="interleaved", virtual_stages=2)
    (first, whole), (last, again) = two_ranks.run(_hold, config, model)
    assert whole and again
    assert first & last == ({"model.embed_tokens.weight"} if tied else set())
    assert "model.norm.weight" in last
    assert {name.split(".")[2] for name in first if ".layers." in name} == {"0", "1", "3"}


@given(
    layers=st.integers(1, 60),
    stages=st.integers(1, 16),
    extra=st.floats(0, 10),
)
def test_layers_are_dealt_out_evenly(layers: int, stages: int, extra: float) -> None:
    if layers < stages:
        with pytest.raises(ConfigError, match=f"model.num_layers = {layers} is fewer"):
            balance_layers(layers, stages, last_extra=extra)
        return
    parts = balance_layers(layers, stages, last_extra=extra)
    assert [layer for part in parts for layer in part] == list(range(layers))
    loads = [float(len(part)) for part in parts]
    loads[-1] += extra
    # No layer can move to a less loaded stage and lower the largest load.
    movable = [load for load, part in zip(loads, parts, strict=True) if len(part) > 1]
    assert all(load <= min(loads) + 1 for load in movable)


@pytest.mark.parametrize(
    ("schedule", "micro_batches", "rows", "pieces"),
    [
        ("gpipe", 1, 4, 1),
        ("1f1b", 1, 4, 4),
        ("1f1b", 6, 6, 6),
        ("interleaved", 4, 4, 4),
        ("interleaved", 9, 36, 36),
        ("zero-bubble", 1, 1, 1),
    ],
)
def test_too_few_micro_batches_are_cut_up(
    schedule: Any, micro_batches: int, rows: int, pieces: int
) -> None:
    assert count_pieces(MeshConfig(pp=4, schedule=schedule), micro_batches, rows) == pieces


def test_a_pipeline_that_cannot_be_filled_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        count_pieces(MeshConfig(pp=4, schedule="1f1b"), 3, 3)
    assert "mesh.schedule = 1f1b over mesh.pp = 4 ranks can't be fed" in str(caught.value)


def _narrow_gradients(config: MeshConfig, model_config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return a step's whole gradients, with products in bfloat16 and weights in float32."""
    mesh = mesh_of(config)
    model = Decoder(model_config)
    model.init_weights(torch.Generator().manual_seed(0))
    laid = spread(model, mesh, dtype=torch.bfloat16)
    passes = make_passes(laid, StepOptions(12, torch.bfloat16))
    passes.run(
        [make_batch(model_config, m % 2, 4) for m in mesh.micro_batches(32)], 1e3, lambda: False
    )
    found = {}
    for name, parameter in laid.model.named_parameters():
        assert parameter.grad is not None
        whole = parameter.grad
        found[name] = whole.full_tensor() if isinstance(whole, DTensor) else whole
    return found


def test_split_passes_over_shards_add_up_in_float32(four_ranks: Ranks) -> None:
    mesh = {"pp": 2, "schedule": "zero-bubble"}
    shards, copies = (
        four_ranks.run(_narrow_gradients, from_mapping(MeshConfig, mesh | {axis: 2}), MODEL)
        for axis in ("fsdp", "dp")
    )
    for found, expected in zip(shards, copies, strict=True):
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < 1e-5, (name, error)
