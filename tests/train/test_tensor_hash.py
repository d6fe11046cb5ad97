"""The tensor hash: a plain reference, any cut, any change."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minigpt.train.checkpoint_storage import DTYPES
from minigpt.train.tensor_hash import fingerprint, partial_sums

SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)
MODULUS = 2**64
dtypes = st.sampled_from(["F64", "F32", "BF16", "F16", "I64", "I32", "U8", "BOOL"])
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


def _random(dtype: str, shape: tuple[int, ...], seed: int) -> Tensor:
    torch_dtype = DTYPES[dtype]
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=torch_dtype).element_size()
    count = int(torch.tensor(shape).prod()) if shape else 1
    high = 2 if dtype == "BOOL" else 256
    raw = torch.randint(0, high, (count * size,), dtype=torch.uint8, generator=generator)
    return raw.view(torch_dtype).reshape(shape)


def _whole(dtype: str, tensor: Tensor) -> str:
    sums = partial_sums(tensor, tensor.shape, [0] * tensor.ndim)
    return fingerprint(dtype, tensor.shape, [sums])


def _key(index: int, seed: int) -> int:
    z = (index * 0x9E3779B97F4A7C15 + seed) % MODULUS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % MODULUS
    return (z ^ (z >> 31)) | 1


@given(dtype=dtypes, shape=shapes, seed=st.integers(0, 99))
def test_it_is_the_documented_sum(dtype: str, shape: tuple[int, ...], seed: int) -> None:
    tensor = _random(dtype, shape, seed)
    size = min(tensor.element_size(), 4)
    raw = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    words = [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]
    expected = tuple(sum(_key(i, s) * w for i, w in enumerate(words)) % MODULUS for s in SEEDS)
    assert partial_sums(tensor, shape, [0] * len(shape)) == expected


@given(data=st.data(), dtype=dtypes, shape=shapes, seed=st.integers(0, 99))
@settings(max_examples=200)
def test_no_cut_into_boxes_changes_it(
    data: st.DataObject, dtype: str, shape: tuple[int, ...], seed: int
) -> None:
    tensor = _random(dtype, shape, seed)
    cuts = []
    for size in shape:
        inner = data.draw(st.lists(st.integers(0, size), max_size=3))
        edges = sorted([0, *inner, size])
        cuts.append(list(itertools.pairwise(edges)))
    parts = []
    for box in itertools.product(*cuts):
        part = tensor[tuple(slice(begin, end) for begin, end in box)].contiguous()
        parts.append(partial_sums(part, shape, [begin for begin, _ in box]))
    parts = data.draw(st.permutations(parts)) if len(parts) < 20 else parts
    assert fingerprint(dtype, shape, parts) == _whole(dtype, tensor)


def test_large_tensors_are_hashed_by_blocks_of_rows_and_columns() -> None:
    for shape in ((3, 70_000), (70_000, 3), (200_001,), (2, 3, 40_000)):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        halves = torch.chunk(tensor, 2, dim=-1)
        offset = [0] * len(shape)
        parts = []
        for half in halves:
            parts.append(partial_sums(half.contiguous(), shape, offset))
            offset = [*offset[:-1], offset[-1] + half.shape[-1]]
        assert fingerprint("F32", shape, parts) == _whole("F32", tensor)


@given(data=st.data(), dtype=dtypes, seed=st.integers(0, 99))
def test_any_flipped_bit_changes_it(data: st.DataObject, dtype: str, seed: int) -> None:
    tensor = _random(dtype, (5, 7), seed)
    before = _whole(dtype, tensor)
    raw = tensor.reshape(-1).view(torch.uint8)
    bit = 1 << data.draw(st.integers(0, 0 if dtype == "BOOL" else 7))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= bit
    assert _whole(dtype, tensor) != before


@given(data=st.data(), dtype=dtypes, seed=st.integers(0, 99))
def test_swapped_elements_change_it(data: st.DataObject, dtype: str, seed: int) -> None:
    tensor = _random(dtype, (5, 7), seed)
    before, flat = _whole(dtype, tensor), tensor.reshape(-1)
    first, second = data.draw(st.tuples(st.integers(0, 34), st.integers(0, 34)))
    pair = flat[[first, second]].clone()
    size = tensor.element_size()
    alike = torch.equal(
        pair.view(torch.uint8)[:size].clone(), pair.view(torch.uint8)[size:].clone()
    )
    flat[[first, second]] = pair.flip(0)
    assert (_whole(dtype, tensor) == before) == alike


def test_dtype_and_shape_are_part_of_it() -> None:
    zeros = torch.zeros(2, 6)
    found = {
        _whole("F32", zeros),
        _whole("F32", zeros.reshape(3, 4)),
        _whole("F32", zeros.reshape(12)),
        _whole("I32", zeros.view(torch.int32)),
        _whole("F32", torch.zeros(2, 7)),
        _whole("F32", torch.tensor([[-0.0] + [0.0] * 5, [0.0] * 6])),
    }
    assert len(found) == 6
    assert all(len(h) == 32 for h in found)
