from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.engine.detokenizer import TextStream


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def _stream(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    stream = TextStream(stop)
    text = "".join([stream.push(piece) for piece in pieces])
    return text + stream.push(b"", final=True), stream.stopped


@given(st.binary(max_size=40), st.lists(st.integers(0, 40)))
def test_joined_text_is_the_decoded_whole(data: bytes, cuts: list[int]) -> None:
    text, stopped = _stream(_cut(data, cuts))
    assert text == data.decode("utf-8", "replace")
    assert not stopped


@given(st.text(max_size=20), st.lists(st.integers(0, 60)))
def test_never_half_a_character(text: str, cuts: list[int]) -> None:
    data = text.encode("utf-8", "replace")
    stream = TextStream()
    sent = ""
    for piece in _cut(data, cuts):
        sent += stream.push(piece)
        assert data.decode().startswith(sent)


_LETTERS = st.text(alphabet="abé", max_size=30)
_STOPS = st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3)


def _expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: the first end of the text at which a stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(_LETTERS, _STOPS, st.lists(st.integers(0, 60)))
def test_stop_strings_across_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    assert _stream(_cut(text.encode(), cuts), tuple(stops)) == _expected(text, stops)


@given(_LETTERS, _LETTERS, _STOPS)
def test_nothing_is_released_before_it_is_certain(text: str, more: str, stops: list[str]) -> None:
    """Whatever follows, what was released is a beginning of the answer."""
    stream = TextStream(stops)
    sent = "".join([stream.push(character.encode()) for character in text])
    assert _expected(text + more, stops)[0].startswith(sent)


def test_held_back_text_is_released_once_it_can_be_no_stop_string() -> None:
    stream = TextStream(["STOP"])
    assert stream.push(b"go ST") == "go "
    assert stream.push(b"O") == ""
    assert stream.push(b"RY") == "STORY"
    assert stream.push(b" STOP more") == " "
    assert stream.stopped
    assert stream.push(b"never") == ""


@pytest.mark.parametrize("data", [b"\xe2\x82", b"\xf0\x9f\x98"])
def test_an_unfinished_character_at_the_end_is_replaced(data: bytes) -> None:
    stream = TextStream()
    assert stream.push(data) == ""
    assert stream.push(b"", final=True) == "\ufffd"
