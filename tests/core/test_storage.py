from datetime import UTC, datetime
from pathlib import Path

import pytest

from minigpt.core.clock import ManualClock, SystemClock
from minigpt.core.errors import StorageError
from minigpt.core.storage import home, is_remote, write_atomic


def test_write_atomic_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_write_atomic_names_path_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"can't write .*file/below"):
        write_atomic(tmp_path / "file" / "below", b"x")


def test_remote_urls_are_told_from_paths() -> None:
    assert is_remote("s3://bucket/x")
    assert not is_remote("/tmp/x")
    assert not is_remote("file:///tmp/x")


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("MINIGPT_HOME")
    assert home() == Path.home() / ".minigpt"


def test_manual_clock_moves_only_when_told() -> None:
    clock = ManualClock(datetime(2026, 1, 1, tzinfo=UTC))
    before = clock.monotonic()
    clock.advance(90)
    assert clock.monotonic() - before == 90
    assert clock.now() == datetime(2026, 1, 1, 0, 1, 30, tzinfo=UTC)
    assert SystemClock().monotonic() <= SystemClock().monotonic()
