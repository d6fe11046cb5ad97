from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from minigpt.core.errors import ArtifactError, StorageError
from minigpt.train.metrics import MetricsLog, check_steps, read_metrics, truncate


def _line(step: int, kind: str = "train") -> dict[str, Any]:
    return {"kind": kind, "step": step, "loss": 1.0 / 3, "loss_hex": (1.0 / 3).hex()}


@contextmanager
def _disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _write(path: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def test_lines_come_back_exactly(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.append(_line(1)) and log.append(_line(2))
    log.close()
    again = MetricsLog(tmp_path / "metrics.jsonl")
    again.append(_line(3))
    again.flush()
    again.close()
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [_line(n) for n in (1, 2, 3)]


def test_truncation_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [_line(1), _line(2), _line(2, "validation"), _line(3), _line(4)]
    _write(path, lines, tail='{"kind": "train", "st')
    truncate(path, lambda line: line["step"] <= 3)
    assert list(read_metrics(path)) == lines[:4]
    truncate(path, lambda line: False)
    assert path.read_bytes() == b""


def test_no_file_is_right_for_step_zero_only(tmp_path: Path) -> None:
    truncate(tmp_path / "none.jsonl", lambda line: True)
    check_steps(tmp_path / "none.jsonl", 0)
    with pytest.raises(ArtifactError, match="steps 1 to 2"):
        check_steps(tmp_path / "none.jsonl", 2)


@pytest.mark.parametrize("steps", [[1, 3], [1, 2, 2, 3]])
def test_an_edited_file_is_refused(tmp_path: Path, steps: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, [_line(step) for step in steps])
    with pytest.raises(ArtifactError, match="exactly one line"):
        check_steps(path, 3)


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnonsense\n{"kind": "train", "step": 2}\n')
    with pytest.raises(ArtifactError, match="line 2"):
        list(read_metrics(path))


def test_lines_wait_out_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    assert log.append(_line(1))
    with _disk_of(path.stat().st_size + 10):
        assert not log.append(_line(2))
        assert not log.append(_line(3))
        with pytest.raises(StorageError, match=r"metrics\.jsonl"):
            log.flush()
        assert path.stat().st_size <= 200
    assert log.append(_line(4))
    log.close()
    assert list(read_metrics(path)) == [_line(n) for n in (1, 2, 3, 4)]
