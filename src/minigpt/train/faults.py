"""Faults injected at a chosen place, for `minigpt chaos train` and tests; off unless asked for.

`MINIGPT_FAULTS` holds faults such as `kill:rank=1,step=5,phase=backward`, separated by `;`. Each
strikes once in a run, restarts included: a mark in the run's directory remembers it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minigpt.core.errors import ConfigError
from minigpt.train.progress import PHASES

VARIABLE = "MINIGPT_FAULTS"
KINDS = ("kill", "stop", "hang", "term", "raise", "slow", "nan", "flip")


class InjectedError(RuntimeError):
    """The exception of a `raise` fault."""


@dataclass(frozen=True)
class Fault:
    """What happens where: `rank` enters `phase` of the step after `step` steps are done."""

    kind: str
    """kill, stop (SIGSTOP), hang (a lock in C that nobody opens), term (SIGTERM to itself),
    raise, slow (a pause at each entry), nan (a gradient), flip (a bit of a weight)."""
    rank: int = 0
    step: int = 0
    phase: str = "forward"
    micro_batch: int = 0
    seconds: float = 0.5
    """Length of a slow fault's pauses."""
    times: int = 1
    """How often it strikes, from `step` on, before it is over."""

    def matches(self, step: int, phase: str, micro_batch: int) -> bool:
        """Tell whether this is the place."""
        return step >= self.step and (phase, micro_batch) == (self.phase, self.micro_batch)


def parse_faults(text: str) -> list[Fault]:
    """Read the faults of `MINIGPT_FAULTS`.

    Raises:
        ConfigError: An unknown kind, key or phase, or a value that is no number.
    """
    return [_parse(part.strip()) for part in text.split(";") if part.strip()]


def _parse(text: str) -> Fault:
    kind, _, rest = text.partition(":")
    convert: dict[str, Callable[[str], object]] = {
        "rank": int,
        "step": int,
        "phase": str,
        "micro_batch": int,
        "seconds": float,
        "times": int,
    }
    values: dict[str, object] = {}
    try:
        for assignment in filter(None, rest.split(",")):
            key, _, value = assignment.partition("=")
            values[key] = convert[key](value)
    except (KeyError, ValueError):
        raise ConfigError(
            f"{VARIABLE} has {text!r}", remedy=f"write kind:key=value,... with {', '.join(convert)}"
        ) from None
    fault = Fault(kind, **values)  # type: ignore[arg-type]
    if kind not in KINDS or fault.phase not in PHASES:
        raise ConfigError(
            f"{VARIABLE} has {text!r}",
            remedy=f"kinds are {', '.join(KINDS)}; phases are {', '.join(PHASES)}",
        )
    return fault


class Faults:
    """Strikes when the progress of this rank comes to a fault's place."""

    def __init__(self, faults: Sequence[Fault], rank: int, marks: Path) -> None:
        """Arm the faults of `rank`; `marks` is the directory that remembers what struck."""
        self._faults = [fault for fault in faults if fault.rank == rank]
        self._marks = marks
        self._left: dict[Fault, int] = {}
        self.weights: Callable[[], Sequence[Tensor]] = tuple
        """Returns the parameters that `nan` and `flip` spoil."""

    def strike(self, phase: str, step: int, micro_batch: int) -> None:
        """Do what is due at this place."""
        for fault in self._faults:
            if not fault.matches(step, phase, micro_batch):
                continue
            if fault not in self._left:
                self._left[fault] = fault.times if self._mark(fault) else 0
            if self._left[fault] > 0:
                self._left[fault] -= 1
                self._do(fault)

    def _mark(self, fault: Fault) -> bool:
        """Leave the fault's mark; tell whether no earlier process of the run had left it."""
        self._marks.mkdir(parents=True, exist_ok=True)
        name = f"{fault.kind}-{fault.rank}-{fault.step}-{fault.phase}-{fault.micro_batch}"
        try:
            os.close(os.open(self._marks / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _do(self, fault: Fault) -> None:
        match fault.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "term":
                os.kill(os.getpid(), signal.SIGTERM)
            case "hang":
                _hang()
            case "raise":
                raise InjectedError(f"injected in {fault.phase} of step {fault.step + 1}")
            case "slow":
                time.sleep(fault.seconds)
            case "nan":
                next(w for w in self.weights() if w.grad is not None).grad.fill_(torch.nan)  # type: ignore[union-attr]
            case "flip":
                _flip_bit(self.weights()[0])


def _hang() -> None:
    """Wait in C, as in a lost collective: no signal handler of Python's gets to run."""
    library = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(256)
    library.pthread_mutex_init(mutex, None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


@torch.no_grad()
def _flip_bit(weight: Tensor) -> None:
    weight.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 20)


def faults_from_environment(rank: int, run_dir: Path) -> Faults | None:
    """Arm what `MINIGPT_FAULTS` says, None where it says nothing."""
    text = os.environ.get(VARIABLE, "")
    return Faults(parse_faults(text), rank, run_dir / "ranks" / "struck") if text else None
