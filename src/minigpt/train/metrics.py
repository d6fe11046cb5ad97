"""`metrics.jsonl`, one line a step, and `events.jsonl`: whole after kills, full disks, resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minigpt.core.errors import ArtifactError
from minigpt.core.storage import storage_errors, write_atomic


class MetricsLog:
    """Appends JSON lines. A line that the disk has no room for waits for the next `flush`."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending; call `truncate` first when resuming."""
        self.path = path
        self._open()
        self._pending = b""

    def append(self, line: Mapping[str, Any]) -> bool:
        """Write one line; return False where it had to be kept back for want of space."""
        self._pending += json.dumps(line, allow_nan=True).encode() + b"\n"
        try:
            self._write_pending()
        except OSError:
            return False
        return True

    def flush(self) -> None:
        """Force every line to the disk.

        Raises:
            StorageError: It could not be; the lines are kept for the next call.
        """
        with storage_errors(f"write {self.path}"):
            self._write_pending()
            os.fsync(self._descriptor)

    def rewind(self, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop the lines that `keep` says no to, those that wait for room included.

        Raises:
            StorageError: The file could not be rewritten; it is as it was.
        """
        self._pending = b""
        truncate(self.path, keep)
        os.close(self._descriptor)
        self._open()

    def close(self) -> None:
        """Close the file; lines that never found room are lost."""
        os.close(self._descriptor)

    def _open(self) -> None:
        with storage_errors(f"write {self.path}"):
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self._size = os.fstat(self._descriptor).st_size

    def _write_pending(self) -> None:
        if not self._pending:
            return
        try:
            written = os.write(self._descriptor, self._pending)
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += written
        self._pending = self._pending[written:]
        if self._pending:  # a short write: the next attempt names the reason
            self._write_pending()


class SilentLog(MetricsLog):
    """The log of a rank that writes none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> bool:
        return True

    def flush(self) -> None:
        pass

    def rewind(self, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        pass

    def close(self) -> None:
        pass


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Write one line to a file that no `MetricsLog` of this process holds, and sync it.

    Raises:
        StorageError: It could not be written.
    """
    truncate(path, lambda line: True)  # a torn last line would swallow this one
    log = MetricsLog(path)
    try:
        log.append(line)
        log.flush()
    finally:
        log.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a metrics file; a torn last line is left out.

    Raises:
        ArtifactError: A line before the last is no JSON object.
    """
    if not path.exists():
        return
    with storage_errors(f"read {path}"):
        lines = path.read_bytes().split(b"\n")
    for number, text in enumerate(lines[:-1], start=1):
        try:
            line = json.loads(text)
            line["step"]
        except (ValueError, TypeError, KeyError):
            raise ArtifactError(f"{path} line {number} is no metrics line: {text[:80]!r}") from None
        yield line


def truncate(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Drop, atomically, the lines that `keep` says no to, and a torn last one.

    Raises:
        StorageError: The file could not be rewritten; it is as it was.
    """
    kept = [line for line in read_metrics(path) if keep(line)]
    text = "".join(json.dumps(line) + "\n" for line in kept).encode()
    if not path.exists() or path.read_bytes() != text:
        write_atomic(path, text)


def check_steps(path: Path, step: int) -> None:
    """Check that a metrics file has exactly one line for each step up to `step`.

    Raises:
        ArtifactError: A step has no line, or two; the file was edited.
    """
    if [line["step"] for line in read_metrics(path)] != list(range(1, step + 1)):
        raise ArtifactError(
            f"{path} does not hold exactly one line for each of steps 1 to {step}",
            remedy="restore the file, or remove the run's checkpoints to start over",
        )
