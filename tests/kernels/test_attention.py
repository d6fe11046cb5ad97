"""Attention over the paged cache against torch, at every level that runs here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minigpt.kernels import attention, attention_reference
from minigpt.kernels.cache_format import CacheFormat
from minigpt.kernels.kv_layout import KVLayout, quantize_heads

QUIET = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FORMATS: list[CacheFormat] = ["float32", "bfloat16", "int8"]
# Weights are rounded to bfloat16 beside a bfloat16 cache, results beside bfloat16 queries.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}


@dataclass
class Case:
    """Some sequences' cached keys and values, and queries of their latest rows."""

    layout: KVLayout
    query: Tensor
    cache: Tensor
    chunks: Tensor
    tables: Tensor

    def attend(self, window: int | None = None) -> Tensor:
        return attention.paged_attention(
            self.query, self.cache, self.chunks, self.tables, self.layout, window=window
        )

    def expected(self, window: int | None = None) -> Tensor:
        scale = self.layout.head_dim**-0.5
        return attention_reference.paged_attention(
            self.query, self.cache, self.chunks, self.tables, self.layout.numbers(), window or 0,
            scale,
        )  # fmt: skip


def make_case(
    layout: KVLayout,
    lengths: list[tuple[int, int]],
    *,
    heads: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Make sequences of (cached length, latest rows queried) in blocks of any order."""
    made = torch.Generator().manual_seed(seed)
    counts = [-(-length // layout.block_size) for length, _ in lengths]
    blocks = torch.randperm(sum(counts) + 2, generator=made)[: sum(counts)]
    cache = layout.allocate(sum(counts) + 2)
    chunks, row, table = [], 0, 0
    for (length, rows), count in zip(lengths, counts, strict=True):
        tokens = torch.arange(length)
        slots = blocks[table + tokens // layout.block_size] * layout.block_size
        slots += tokens % layout.block_size
        shape = (2, length, layout.kv_heads, layout.head_dim)
        keys, values = torch.randn(shape, generator=made)
        layout.write(cache, slots, keys, values)
        chunks.append((row, rows, length - rows, table))
        row, table = row + rows, table + count
    query = torch.randn(row, heads, layout.head_dim, generator=made).to(dtype)
    return Case(
        layout,
        query,
        cache,
        torch.tensor(chunks, dtype=torch.int32),
        blocks.to(torch.int32),
    )


def check(case: Case, window: int | None = None) -> None:
    found, expected = case.attend(window), case.expected(window)
    coarse = case.layout.format == "bfloat16" or case.query.dtype == torch.bfloat16
    tolerance = TOLERANCE[torch.bfloat16 if coarse else torch.float32]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_the_reference_is_torchs() -> None:
    layout = KVLayout("float32", 16, 2, 32)
    case = make_case(layout, [(70, 70)], heads=4)
    keys, values = (x[:70].transpose(0, 1) for x in layout.read(case.cache, case.tables))
    expected = F.scaled_dot_product_attention(
        case.query.transpose(0, 1), keys, values, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(case.expected(), expected.transpose(0, 1))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 96, 128, 256])
def test_decode_and_prefill_are_the_reference(
    level: str, format: CacheFormat, dtype: torch.dtype, head_dim: int
) -> None:
    layout = KVLayout(format, 16, 2, head_dim)
    check(make_case(layout, [(300, 1), (1, 1), (530, 40), (37, 37)], heads=6, dtype=dtype))


@pytest.mark.usefixtures("threads", "level")
@given(
    lengths=st.lists(st.tuples(st.integers(1, 600), st.integers(1, 60)), min_size=1, max_size=5),
    shared=st.sampled_from([1, 2, 7, 32]),
    kv_heads=st.sampled_from([1, 3]),
    block_size=st.sampled_from([16, 32]),
    format=st.sampled_from(FORMATS),
    window=st.sampled_from([None, 1, 17, 256, 300]),
    threads=st.integers(1, 3),
)
@QUIET
def test_any_batch_is_the_reference(
    lengths: list[tuple[int, int]],
    shared: int,
    kv_heads: int,
    block_size: int,
    format: CacheFormat,
    window: int | None,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    lengths = [(length, min(length, rows)) for length, rows in lengths]
    layout = KVLayout(format, block_size, kv_heads, 32)
    check(make_case(layout, lengths, heads=kv_heads * shared), window)


@pytest.mark.usefixtures("threads", "level")
@given(
    length=st.integers(1, 1200),
    rows=st.integers(1, 70),
    others=st.lists(st.integers(1, 300), max_size=3),
    format=st.sampled_from(FORMATS),
    window=st.sampled_from([None, 100, 257]),
    threads=st.integers(1, 4),
)
@QUIET
def test_a_row_alone_has_the_same_bits(
    length: int, rows: int, others: list[int], format: CacheFormat, window: int | None, threads: int
) -> None:
    """Neither the rows of its chunk, nor other sequences, nor threads change a row's result."""
    rows = min(rows, length)
    layout = KVLayout(format, 16, 2, 32)
    case = make_case(layout, [*((n, 1) for n in others), (length, rows)], heads=4)
    torch.set_num_threads(threads)
    together = case.attend(window)[len(others) :]
    torch.set_num_threads(1)
    _, _, position, table = case.chunks[-1].tolist()
    for row in {0, rows // 2, rows - 1}:
        alone = attention.paged_attention(
            case.query[len(others) + row :][:1],
            case.cache,
            torch.tensor([[0, 1, position + row, table]], dtype=torch.int32),
            case.tables,
            layout,
            window=window,
        )
        assert torch.equal(together[row], alone[0])


def test_queries_may_lie_in_a_fused_projection(level: str) -> None:
    case = make_case(KVLayout("bfloat16", 16, 2, 32), [(40, 5)], heads=4, dtype=torch.bfloat16)
    expected = case.attend()
    fused = torch.randn(5, 8 * 32, dtype=torch.bfloat16)
    fused[:, : 4 * 32] = case.query.flatten(1)
    case.query = fused.view(5, 8, 32)[:, :4]
    assert torch.equal(case.attend(), expected)


def test_large_scores_do_not_overflow(level: str) -> None:
    case = make_case(KVLayout("float32", 16, 1, 32), [(300, 3)], heads=1)
    case.query *= 1e4
    check(case)


def test_a_nan_stays_in_its_sequence(level: str) -> None:
    layout = KVLayout("bfloat16", 16, 2, 32)
    case = make_case(layout, [(40, 1), (50, 1)], heads=2)
    slot = case.tables[:1] * 16 + 3
    nan = torch.full((1, 2, 32), math.nan)
    layout.write(case.cache, slot, nan, nan)
    found = case.attend()
    assert found[0].isnan().all() and found[1].isfinite().all()


# -- the fused projection ----------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("normed", "turned"), [(True, True), (False, True), (False, False)])
def test_qkv_is_the_reference(
    level: str, format: CacheFormat, dtype: torch.dtype, normed: bool, turned: bool
) -> None:
    made = torch.Generator().manual_seed(1)
    layout, heads, rows = KVLayout(format, 32, 2, 48), 6, 9
    fused = torch.randn(rows, (heads + 4) * 48, generator=made).to(dtype)
    slots = torch.randperm(96, generator=made)[:rows].to(torch.int32)
    weights = torch.rand(2, 48, generator=made).to(dtype)
    angles = torch.rand(rows, 24, generator=made) * 6
    norms = (weights[0], weights[1]) if normed else None
    rotation = (angles.cos(), angles.sin()) if turned else None
    copy, expected = fused.clone(), layout.allocate(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minigpt.kernels.library.loaded", lambda: None)
        attention.qkv(copy, expected, slots, layout, norms=norms, rotation=rotation, eps=1e-6)
    found = layout.allocate(3)
    attention.qkv(fused, found, slots, layout, norms=norms, rotation=rotation, eps=1e-6)
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(fused, copy, atol=tolerance, rtol=tolerance)
    step = {"float32": 1e-6, "bfloat16": 2.0**-7, "int8": 0.04}[format]
    blocks = torch.arange(3)
    for ours, theirs in zip(layout.read(found, blocks), layout.read(expected, blocks), strict=True):
        torch.testing.assert_close(ours, theirs, atol=step, rtol=step)


def test_written_values_are_the_projections_own(level: str) -> None:
    """In bfloat16 nothing is rounded twice: the cache holds the values' very bits."""
    layout = KVLayout("bfloat16", 16, 2, 32)
    fused = torch.randn(3, 6 * 32).bfloat16()
    cache = layout.allocate(1)
    attention.qkv(fused, cache, torch.tensor([4, 5, 6], dtype=torch.int32), layout)
    keys, values = layout.read(cache, torch.tensor([0]))
    assert torch.equal(keys[4:7].flatten(1).bfloat16(), fused[:, 64:128])
    assert torch.equal(values[4:7].flatten(1).bfloat16(), fused[:, 128:])
    assert not keys[:4].any() and not keys[7:].any() and not values[7:].any()


def test_a_number_that_int8_cannot_hold_shows(level: str) -> None:
    layout = KVLayout("int8", 16, 1, 32)
    fused = torch.randn(1, 3 * 32)
    fused[0, 40] = math.inf
    cache = layout.allocate(1)
    attention.qkv(fused, cache, torch.tensor([0], dtype=torch.int32), layout)
    keys, values = layout.read(cache, torch.tensor([0]))
    assert keys[0].isnan().all() and values[0].isfinite().all()


def test_int8_scales_are_those_of_the_reference() -> None:
    heads = torch.randn(5, 2, 32)
    heads[0, 0] = 0
    rounded, scale = quantize_heads(heads)
    torch.testing.assert_close(rounded * scale[..., None], heads, atol=0.02, rtol=0)
    assert scale[0, 0] == 1


def test_where_there_are_no_kernels_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(KVLayout("float32", 16, 1, 32), [(20, 2)], heads=1)
    expected = case.attend()
    monkeypatch.setattr("minigpt.kernels.library.loaded", lambda: None)
    torch.testing.assert_close(case.attend(), expected)
