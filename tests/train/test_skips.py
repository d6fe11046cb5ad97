from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from minigpt.train.skips import Skip, SkipList, read_skips, record_skip

ranges = st.lists(st.builds(Skip, st.integers(0, 60), st.integers(1, 10)), max_size=6)


@given(ranges)
def test_what_is_left_keeps_its_order(skips: list[Skip]) -> None:
    gone = {sample for skip in skips for sample in range(skip.first_sample, sum(skip))}
    left = [sample for sample in range(200) if sample not in gone][:100]
    listed = SkipList(skips)
    assert [listed.sample_at(position) for position in range(100)] == left
    assert listed.samples == len(gone)


def test_the_record_is_for_good(tmp_path: Path) -> None:
    assert read_skips(tmp_path).ranges == []
    record_skip(tmp_path, Skip(8, 4), step=3, reason="not finite")
    record_skip(tmp_path, Skip(20, 4), step=5, reason="spike")
    assert read_skips(tmp_path).ranges == [Skip(8, 4), Skip(20, 4)]
