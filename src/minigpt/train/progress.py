"""Where a rank is: the phase it is in, published to whoever watches and timed for the ledger.

A process is in exactly one phase at any moment, so the times of its phases add up to its life.
Entering a phase writes a *beacon*, a small file mapped into memory that outlives `kill -9`; it
is also where `train.faults` strikes.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minigpt.core.clock import Clock

if TYPE_CHECKING:
    from minigpt.train.pipeline_parallel import Cut

PHASES = (
    "start",  # from the process's beginning to the first step
    "data",
    "forward",
    "backward",
    "reduce",
    "update",
    "vote",
    "report",
    "validate",
    "save",
    "finish",  # the model artifact and final.json
)
WAITING = frozenset({"reduce", "vote"})
"""Phases in which a rank waits for the others."""
COMPUTING = ("forward", "backward", "update")

# Sequence number, odd while the rest is written; process id, step, micro-batch, phase; monotonic
# time of entering, wall time of the process's beginning; seconds in each phase.
_LAYOUT = struct.Struct(f"<Qqqqqdd{len(PHASES)}d")
_SEQUENCE = struct.Struct("<Q")
_READ_ATTEMPTS = 100


@dataclass(frozen=True)
class Beacon:
    """One reading of a rank's progress."""

    pid: int
    step: int
    """Steps done."""
    micro_batch: int
    phase: str
    entered: float
    """`time.monotonic()` at which the phase began."""
    began: float
    """Unix time at which the process did."""
    seconds: Mapping[str, float]
    """In each phase so far, the present one up to its beginning."""

    def seconds_until(self, monotonic: float) -> dict[str, float]:
        """Return the seconds in each phase with the present one counted up to `monotonic`."""
        present = max(0.0, monotonic - self.entered)
        return {**self.seconds, self.phase: self.seconds[self.phase] + present}


class Progress:
    """Keeps one rank's phase and its beacon."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        began: float | None = None,
    ) -> None:
        """Begin in phase "start".

        Args:
            path: The beacon's file; None publishes nothing.
            began: Unix time at which the process began; None is now.
        """
        self._map = _reserve(path) if path is not None else None
        self.listeners: list[Callable[[str, int, int], None]] = []
        """Called with phase, step and micro-batch after each change."""
        self._began = time.time() if began is None else began
        self._sequence = 0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase = "start"
        self._entered = time.monotonic() - (time.time() - self._began)
        self.step = 0
        """Steps done; set by the loop."""
        self._publish(0)

    @property
    def phase(self) -> str:
        """The present phase."""
        return self._phase

    def enter(self, phase: str, micro_batch: int = 0) -> None:
        """Leave the present phase and enter another."""
        now = time.monotonic()
        self._seconds[self._phase] += now - self._entered
        self._phase, self._entered = phase, now
        self._publish(micro_batch)
        for listener in self.listeners:
            listener(phase, self.step, micro_batch)

    def follow(self, model: nn.Module) -> None:
        """Tell the phases of a step by hooks on the model: forward, backward, then reduce.

        The first parameter that learns gets its gradient last; what comes after it, up to the
        next phase, is the exchange of gradients.
        """
        micro_batch = -1

        def forward(*_: object) -> None:
            nonlocal micro_batch
            if torch.is_grad_enabled():
                micro_batch = micro_batch + 1 if self._phase == "reduce" else 0
                self.enter("forward", micro_batch)

        def backward(*_: object) -> None:
            if torch.is_grad_enabled():
                self.enter("backward", micro_batch)

        def reduce(_: Tensor) -> None:
            self.enter("reduce", micro_batch)

        model.register_forward_pre_hook(forward)
        model.register_forward_hook(backward)
        learning = next(p for p in model.parameters() if p.requires_grad)
        learning.register_post_accumulate_grad_hook(reduce)  # type: ignore[no-untyped-call]

    def follow_pipeline(self, cut: Cut) -> None:
        """Tell the phases of a step by hooks on this rank's stages of a pipeline.

        Passes of several pieces take turns: "backward" is all that is not a forward pass, waiting
        for other ranks included.
        """
        piece = -1

        def forward(*_: object) -> None:
            nonlocal piece
            piece = piece + 1 if self._phase == "backward" else 0
            self.enter("forward", piece)

        def backward(*_: object) -> None:
            self.enter("backward", piece)

        for stage in cut.stages:
            stage.register_forward_pre_hook(forward)
            stage.register_forward_hook(backward)
        cut.held.gradients_ready = lambda: self.enter("reduce")

    def seconds(self) -> dict[str, float]:
        """Return the seconds in each phase, up to now; they sum to the process's life."""
        present = time.monotonic() - self._entered
        return {**self._seconds, self._phase: self._seconds[self._phase] + present}

    def _publish(self, micro_batch: int) -> None:
        if self._map is None:
            return
        self._sequence += 2
        _SEQUENCE.pack_into(self._map, 0, self._sequence - 1)
        _LAYOUT.pack_into(
            self._map,
            0,
            self._sequence - 1,
            os.getpid(),
            self.step,
            micro_batch,
            PHASES.index(self._phase),
            self._entered,
            self._began,
            *self._seconds.values(),
        )
        _SEQUENCE.pack_into(self._map, 0, self._sequence)


def read_beacon(path: Path) -> Beacon | None:
    """Read a rank's beacon; None where there is none or it can't be read."""
    with suppress(OSError, struct.error, IndexError):
        content = b""
        for _ in range(_READ_ATTEMPTS):
            content = path.read_bytes()[: _LAYOUT.size]
            if _SEQUENCE.unpack_from(content)[0] % 2 == 0:
                break  # else it is being written, or its writer died over it
        _, pid, step, micro_batch, phase, entered, began, *seconds = _LAYOUT.unpack(content)
        if pid == 0:
            return None
        by_phase = dict(zip(PHASES, seconds, strict=True))
        return Beacon(pid, step, micro_batch, PHASES[phase], entered, began, by_phase)
    return None


def beacon_path(run_dir: Path, rank: int) -> Path:
    """Return where a rank of a run publishes its beacon."""
    return run_dir / "ranks" / f"rank-{rank:05d}.beacon"


def process_start(clock: Clock) -> float:
    """Return the Unix time at which this process began, or now where the system can't tell."""
    now = clock.now().timestamp()
    with suppress(OSError, ValueError, IndexError):
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        age = uptime - ticks / os.sysconf("SC_CLK_TCK")
        return min(now, now - age)
    return now


def _reserve(path: Path) -> mmap.mmap | None:
    """Map a file whose blocks are really there: a write to a full disk would be a SIGBUS."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, _LAYOUT.size)
            os.pwrite(descriptor, bytes(_LAYOUT.size), 0)
            return mmap.mmap(descriptor, _LAYOUT.size)
        finally:
            os.close(descriptor)
    return None
