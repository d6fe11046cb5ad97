from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.engine.prefix_cache import extend_hashes, prefix_root

ROOT = prefix_root("weights")


def _hashes(tokens: list[int], block_size: int = 4, root: bytes = ROOT) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, root, tokens, block_size)
    return hashes


@given(
    tokens=st.lists(st.integers(0, 3), max_size=40),
    other=st.lists(st.integers(0, 3), max_size=40),
    block_size=st.integers(1, 5),
)
def test_digests_are_equal_exactly_where_prefixes_are(
    tokens: list[int], other: list[int], block_size: int
) -> None:
    first, second = _hashes(tokens, block_size), _hashes(other, block_size)
    assert len(first) == len(tokens) // block_size
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        stop = (index + 1) * block_size
        assert (a == b) == (tokens[:stop] == other[:stop])
    assert len(set(first)) == len(first)


@given(tokens=st.lists(st.integers(0, 2**32 - 1), max_size=30), cut=st.integers(0, 30))
def test_extending_equals_hashing_at_once(tokens: list[int], cut: int) -> None:
    hashes = _hashes(tokens[:cut])
    extend_hashes(hashes, ROOT, tokens, 4)
    assert hashes == _hashes(tokens)


def test_weights_and_adapters_do_not_mix() -> None:
    roots = [
        prefix_root("weights"),
        prefix_root("other"),
        prefix_root("weights", "adapter"),
        prefix_root("weights", ""),
        prefix_root('weights", "adapter'),
    ]
    digests = {_hashes([1, 2, 3, 4], root=root)[0] for root in roots}
    assert len(digests) == len(roots)


def test_a_token_that_does_not_fit_is_no_other_token() -> None:
    with pytest.raises(OverflowError):
        _hashes([1, 2, 3, 2**32])
