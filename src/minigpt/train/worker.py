"""One rank of a supervised run: `python -m minigpt.train.worker SPEC`.

The supervisor (`train.supervise`) starts it with torchrun's variables in its environment. It ends
with its parent, prints its stack on SIGUSR1 wherever it is, and leaves a line on why it failed.
"""

from __future__ import annotations

import ctypes
import faulthandler
import io
import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TextIO

import torch.distributed as dist

from minigpt.core.artifact import open_artifact
from minigpt.core.clock import SystemClock
from minigpt.core.config import Config, load_config
from minigpt.core.errors import MinigptError, StorageError
from minigpt.core.telemetry import configure_logging
from minigpt.train.config import TrainConfig
from minigpt.train.interrupt import TrainingInterruptedError
from minigpt.train.progress import process_start
from minigpt.train.run import train

LOST_PEER = 75
"""Exit code of a rank whose collective failed because another rank had gone (EX_TEMPFAIL)."""
LOST_STORAGE = 74
"""Exit code of a rank that could not read or write what it must (EX_IOERR)."""
STACK_SIGNAL = signal.SIGUSR1
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class WorkerSpec(Config):
    """What the supervisor tells its workers, in a file."""

    config: str
    """Path of the run's config as it was asked for."""
    dataset: str
    """URI of the dataset artifact."""
    run_dir: str
    json_logs: bool
    supervisor: int
    """Process id of the supervisor."""


def rank_file(run_dir: Path, rank: int, suffix: str) -> Path:
    """Return a rank's file: `log`, `stack` or `error`."""
    return run_dir / "ranks" / f"rank-{rank:05d}.{suffix}"


def main() -> NoReturn:
    """Train as one rank and exit with a code that tells the supervisor what to do."""
    spec = WorkerSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    run_dir, rank = Path(spec.run_dir), int(os.environ["RANK"])
    _end_with(spec.supervisor)
    if rank > 0:
        sys.stderr = _BestEffort(sys.stderr)
    with rank_file(run_dir, rank, "stack").open("w") as stack:
        faulthandler.register(STACK_SIGNAL, file=stack, all_threads=True)
        configure_logging(json=spec.json_logs)
        _exit(_train(spec, rank_file(run_dir, rank, "error")))


class _BestEffort(io.TextIOBase):
    """Standard error in a file that may lie on a full disk: what can't be written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
            self._stream.flush()
        return len(text)

    def fileno(self) -> int:
        return self._stream.fileno()


def _train(spec: WorkerSpec, error_file: Path) -> int:
    try:
        train(
            load_config(TrainConfig, spec.config),
            open_artifact(spec.dataset, kind="dataset"),
            Path(spec.run_dir),
            began=process_start(SystemClock()),
        )
    except TrainingInterruptedError as error:
        return error.exit_code
    except MinigptError as error:
        _leave(error_file, error.message, error.remedy)
        return LOST_STORAGE if isinstance(error, StorageError) else error.exit_code
    except Exception as error:  # reported, and restarted from the last checkpoint
        traceback.print_exc()
        _leave(error_file, f"{type(error).__name__}: {error}", "")
        return LOST_PEER if _is_lost_peer(error) else 1
    return 0


def _is_lost_peer(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def _leave(error_file: Path, message: str, remedy: str) -> None:
    content = {"message": " ".join(message.split()), "remedy": remedy}
    with suppress(OSError):  # a full disk: the exit code says the most of it
        error_file.write_text(json.dumps(content))


def _end_with(supervisor: int) -> None:
    """Get a SIGTERM, which saves, when the supervisor dies, however it does."""
    with suppress(OSError, AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != supervisor:
        _exit(1)


def _exit(code: int) -> NoReturn:
    """Exit at once: what a library does at exit may wait for ranks that have gone."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
