from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tests.train.proof import EXPERTS, GROUPED, LEARNED, UNTIED, Case, name_of, prove

from minigpt.model.attention import CausalAttention
from minigpt.train.config import MeshConfig
from minigpt.train.context_parallel import ContextParallelAttention, own_columns
from minigpt.train.processes import Ranks, mesh_of

PAIR: list[Case] = [({"cp": 2}, kind) for kind in (GROUPED, UNTIED, LEARNED, EXPERTS)]
FOUR: list[Case] = [
    ({"cp": 4}, GROUPED),
    ({"cp": 4}, UNTIED),
    *(({"cp": 2, axis: 2}, kind) for axis in ("dp", "fsdp", "tp") for kind in (GROUPED, UNTIED)),
]


@pytest.mark.parametrize("case", PAIR, ids=name_of)
def test_two_ranks_compute_what_one_does(case: Case, two_ranks: Ranks) -> None:
    prove(case, two_ranks)


@pytest.mark.parametrize("case", FOUR, ids=name_of)
def test_four_ranks_compute_what_one_does(case: Case, four_ranks: Ranks) -> None:
    prove(case, four_ranks)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_columns_of_all_ranks_are_a_row(size: int) -> None:
    row = torch.arange(16)[None]
    shares = [own_columns(row, rank, size) for rank in range(size)]
    assert sorted(torch.cat(shares, 1).flatten().tolist()) == list(range(16))
    # Under a causal mask every rank has as many pairs of query and key.
    work = [int((share + 1).sum()) for share in shares]
    assert len(set(work)) == 1


def _attend(window: int | None, dtype: torch.dtype) -> list[float]:
    """Return the largest differences of output and gradients from those over whole rows."""
    group = mesh_of(MeshConfig(cp=2)).group("cp")
    assert group is not None
    generator = torch.Generator().manual_seed(0)
    documents = torch.tensor([[0] * 3 + [1] * 10 + [2] * 3, [0] * 16])
    shapes = [(2, 16, heads, 8) for heads in (4, 2, 2, 4)]
    *inputs, gradient = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    whole = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = CausalAttention(documents, window)(0, *whole)
    expected.backward(gradient)  # type: ignore[no-untyped-call]

    def own(tensor: torch.Tensor) -> torch.Tensor:
        return own_columns(tensor, dist.get_rank(), dist.get_world_size())

    parts = [own(tensor).clone().requires_grad_() for tensor in inputs]
    found = ContextParallelAttention(documents, window, group)(0, *parts)
    found.backward(own(gradient))  # type: ignore[no-untyped-call]
    assert found.dtype == dtype
    pairs = [(found, own(expected))]
    for part, tensor in zip(parts, whole, strict=True):
        assert part.grad is not None and tensor.grad is not None
        pairs.append((part.grad, own(tensor.grad)))
    return [float((a.double() - b.double()).abs().max()) for a, b in pairs]


@pytest.mark.parametrize(
    ("window", "dtype", "tolerance"),
    [(None, torch.float64, 1e-12), (5, torch.float64, 1e-12), (None, torch.bfloat16, 0.03)],
    ids=["causal", "window", "bfloat16"],
)
def test_attention_is_that_of_whole_rows(
    window: int | None, dtype: torch.dtype, tolerance: float, two_ranks: Ranks
) -> None:
    for differences in two_ranks.run(_attend, window, dtype):
        assert max(differences) <= tolerance
