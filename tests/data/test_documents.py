from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minigpt.data.documents import cut_stream, cut_text

LINES = st.lists(st.text("ab\xe9\u4e2d\U0001f600\n", max_size=30), max_size=20).map("".join)


@given(text=LINES, limit=st.integers(4, 50))
def test_pieces_concatenate_to_the_text_and_keep_characters_whole(text: str, limit: int) -> None:
    data = text.encode()
    pieces = list(cut_text(data, limit))
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= limit for piece in pieces) or not data
    for piece in pieces:
        piece.decode()


@given(text=LINES, limit=st.integers(4, 50))
def test_cuts_fall_after_line_ends_where_one_is_in_reach(text: str, limit: int) -> None:
    *cut, _ = cut_text(text.encode(), limit)
    assert all(piece.endswith(b"\n") or b"\n" not in piece for piece in cut)


@given(text=LINES, block=st.integers(1, 20), limit=st.integers(64, 100))
def test_how_a_stream_is_read_does_not_change_its_documents(
    text: str, block: int, limit: int
) -> None:
    data = text.encode()
    blocks = [data[i : i + block] for i in range(0, len(data), block)]
    separator = b"\n\n"
    expected = [d for whole in data.split(separator) for d in cut_text(whole, limit)]
    short = all(len(whole) <= limit for whole in data.split(separator))
    found = list(cut_stream(blocks, separator, limit))
    # The stream drops an empty last document, of which nobody can speak.
    assert b"".join(found) == b"".join(expected)
    if short:
        assert found == (expected if expected[-1] else expected[:-1])


def test_a_long_line_is_cut_quickly() -> None:
    data = b"x" * (1 << 22)
    assert sum(1 for _ in cut_stream([data], b"\n\n", 64)) == (1 << 22) // 64
