"""A job's word to the queue above it."""

import time
from pathlib import Path

import pytest

from minigpt.core.job_status import STATUS_VARIABLE, JobStatus, read_status, report_saved


def test_a_report_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    monkeypatch.setenv(STATUS_VARIABLE, str(path))
    before = time.time()
    report_saved(safe_to_evict_in=20)
    status = read_status(path)
    assert status is not None and before <= status.saved_at <= time.time()
    assert status.unsaved_seconds(status.saved_at + 7) == 7
    assert status.safe_in(status.saved_at + 7) == pytest.approx(13)
    assert status.safe_in(status.saved_at + 30) == 0  # it should be saving right now
    assert status.safe_in(status.saved_at + 90) is None  # a promise that was not kept
    report_saved()
    later = read_status(path)
    assert later is not None
    assert later == JobStatus(later.saved_at) and later.saved_at >= status.saved_at


def test_without_a_queue_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STATUS_VARIABLE, raising=False)
    report_saved(safe_to_evict_in=1)


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"saved_at": "soon"}', '{"saved_at": null}']
)
def test_what_cannot_be_read_is_silence(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "status.json"
    if content is not None:
        path.write_text(content)
    assert read_status(path) is None
