from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.data.clean import (
    Cleaner,
    CleaningReport,
    duplicate_line_share,
    fix_mojibake,
    text_digest,
)
from minigpt.data.config import CleanConfig
from minigpt.data.documents import RawDocument

PROSE = "The quick brown fox jumps over the lazy dog while the moon climbs above the hill."


def clean(text: str, *, code: bool = False, **config: float) -> tuple[str | None, dict[str, int]]:
    report = CleaningReport()
    cleaner = Cleaner(CleanConfig.model_validate(config), report)
    document = cleaner.clean(RawDocument("name", text, code=code))
    return (document.text if document else None), dict(report.counts)


def test_sound_text_passes_unchanged() -> None:
    assert clean(PROSE) == (PROSE, {"read": 1})


def test_mojibake_is_undone_in_prose_only() -> None:
    broken = PROSE + " Caf\u00c3\u00a9, na\u00c3\u00afve."
    assert clean(broken) == (
        PROSE + " Caf\u00e9, na\u00efve.",
        {"read": 1, "repaired_mojibake": 1},
    )
    assert clean(broken, code=True) == (broken, {"read": 1})


@pytest.mark.parametrize(
    "text",
    [
        "\u201ccurly\u201d and \u2018single\u2019 quotes\u2014dashes\u2026",
        "\ufb01ne ligatures, \uff21\uff22 full width",
        "&lt;b&gt; html &amp; entities",
        "\x1b[31mred\x1b[0m and a tab\t and a form feed\x0c",
        "e\u0301 decomposed, \u00e9 composed",
    ],
)
def test_what_an_author_may_have_meant_stays(text: str) -> None:
    assert fix_mojibake(text) == text


def test_line_ends_become_newlines() -> None:
    text, _ = clean(PROSE + "\r\nsecond line\rthird")
    assert text == PROSE + "\nsecond line\nthird"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("too short", "dropped_short"),
        ("   \n" * 100, "dropped_short"),
        ((PROSE + "\n") * 10, "dropped_repeated_lines"),
        ("=-" * 5000, "dropped_repetitive"),
        (PROSE + "\0", "dropped_binary"),
    ],
)
def test_what_is_dropped_is_counted(text: str, reason: str) -> None:
    assert clean(text) == (None, {"read": 1, reason: 1})


def test_binary_files_are_named() -> None:
    report = CleaningReport()
    cleaner = Cleaner(CleanConfig(), report)
    assert cleaner.clean(RawDocument("photo.png", "", how="binary")) is None
    assert report.metrics() == {
        "counts": {"dropped_binary": 1, "read": 1},
        "examples": {"dropped_binary": ["photo.png"]},
    }


def test_exact_duplicates_are_dropped_whatever_their_white_space() -> None:
    report = CleaningReport()
    cleaner = Cleaner(CleanConfig(), report)
    assert cleaner.clean(RawDocument("a", PROSE)) is not None
    assert cleaner.clean(RawDocument("b", PROSE.replace(" ", "\n  ") + "\n")) is None
    assert report.counts["dropped_exact_duplicate"] == 1


@given(st.text(), st.text(" \t\n", min_size=1))
def test_digest_ignores_white_space_and_unicode_form(text: str, space: str) -> None:
    spaced = space + text.replace(" ", f" {space}")
    assert text_digest(spaced) == text_digest(text)
    assert text_digest("\u00e9" + text) == text_digest("e\u0301" + text)


def test_duplicate_line_share() -> None:
    assert duplicate_line_share("a\nb\nc\n") == 0
    assert duplicate_line_share("aa\n  aa\nbb\n") == pytest.approx(1 / 3)
    rng = random.Random(0)
    code = "".join(f"    return value_{rng.random()}\n\n" for _ in range(50))
    assert duplicate_line_share(code) == 0
