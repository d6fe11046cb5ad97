"""What every benchmark here shares: the machine, its measured peak, peers in turn, tables.

A peer runs in a process of its own (settings of threads and memory do not leak from one to the
other) and the peers take turns, a few steps each, so that a busy machine slows all alike.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from minigpt.core.machine import describe_machine, usable_cores

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SHARED_DATA = Path(os.environ.get("MINIGPT_SHARED_DATA", ROOT.parent / "shared" / "data"))


class Gate(Protocol):
    """What a peer sees of the benchmark: when to work, and where to report."""

    def ready(self, **facts: Any) -> None:
        """Say what the peer is (parameters, FLOPs a token ...); call once, when warmed up."""

    def permits(self) -> bool:
        """Wait for leave to take a step; False means stop."""

    def took(self, seconds: float) -> None:
        """Report the step that `permits` allowed."""


Peer = Callable[..., None]
"""A module-level function `(gate, **options)` that steps as long as the gate permits."""


@dataclass
class Timing:
    """Seconds of each timed step, by round."""

    name: str
    facts: dict[str, Any]
    rounds: list[list[float]] = field(default_factory=list)

    @property
    def round_medians(self) -> list[float]:
        """Each round's median step, in seconds."""
        return [statistics.median(r) for r in self.rounds]


class _PipeGate:
    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._allowed = 0

    def ready(self, **facts: Any) -> None:
        self._pipe.send(facts)

    def permits(self) -> bool:
        if not self._allowed:
            self._allowed = int(self._pipe.recv())
        return self._allowed > 0

    def took(self, seconds: float) -> None:
        self._allowed -= 1
        self._pipe.send(seconds)


def _serve_peer(pipe: Connection, peer: Peer, options: Mapping[str, Any], threads: int) -> None:
    import torch

    sys.stdout = sys.stderr  # peers chatter; results alone go to stdout
    torch.set_num_threads(threads)
    peer(_PipeGate(pipe), **options)


def time_in_turn(
    peers: Mapping[str, tuple[Peer, Mapping[str, Any]]],
    *,
    rounds: int,
    steps: int,
    threads: int | None = None,
) -> list[Timing]:
    """Time steps of several peers, `steps` each in turn, `rounds` times.

    Args:
        peers: Name to (function, keyword options). Each starts in a fresh process, one after
            the other, and warms up before the first round.
        rounds: Turns a peer gets.
        steps: Steps a turn; one more runs first and is not counted, to fill the caches.
        threads: Of torch; None is one a core.

    Raises:
        RuntimeError: A peer died; its own traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    running: list[tuple[Timing, Connection, Any]] = []
    try:
        for name, (peer, options) in peers.items():
            ours, theirs = context.Pipe()
            arguments = (theirs, peer, dict(options), threads or usable_cores())
            process = context.Process(target=_serve_peer, args=arguments, daemon=True)
            process.start()
            theirs.close()
            begin = time.perf_counter()
            facts = _receive(ours, name)
            facts["warmup_seconds"] = time.perf_counter() - begin
            running.append((Timing(name, facts), ours, process))
        for _ in range(rounds):
            for timing, pipe, _process in running:
                pipe.send(steps + 1)
                seconds = [float(_receive(pipe, timing.name)) for _ in range(steps + 1)]
                timing.rounds.append(seconds[1:])
    finally:
        for _timing, _pipe, process in running:
            process.kill()
            process.join()
    return [timing for timing, _pipe, _process in running]


def _receive(pipe: Connection, name: str) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f"{name} died, see its traceback above") from None


# (rows, columns, inner): a large square, and the wide products in which oneDNN does best.
_PEAK_SHAPES = ((2048, 2048, 2048), (4096, 1152, 384), (4096, 1024, 1024))


def measured_peak_flops(seconds: float = 0.5) -> float:
    """Measure the best bf16 matrix product of a few shapes, in FLOP/s."""
    import torch

    torch.set_num_threads(usable_cores())
    peak = 0.0
    for rows, columns, inner in _PEAK_SHAPES:
        left, right = torch.randn(rows, inner).bfloat16(), torch.randn(inner, columns).bfloat16()
        out = torch.empty(rows, columns, dtype=torch.bfloat16)
        best, start = float("inf"), time.perf_counter()
        while time.perf_counter() - start < seconds:
            begin = time.perf_counter()
            torch.mm(left, right, out=out)
            best = min(best, time.perf_counter() - begin)
        peak = max(peak, 2 * rows * columns * inner / best)
    return peak


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, ...]:
    """Return (median, least, largest) of the paired ratios of two peers' rounds."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def spread(values: Sequence[float]) -> str:
    """Render a sample as `median (least-largest)`."""
    return f"{statistics.median(values):,.4g} ({min(values):,.4g}-{max(values):,.4g})"


def environment() -> dict[str, Any]:
    """Describe machine and libraries."""
    machine = asdict(describe_machine())
    machine["load_average"] = os.getloadavg()
    names = ("torch", "numpy", "tokenizers", "transformers", "accelerate", "minigpt")
    return {"machine": machine, "python": sys.version.split()[0], "versions": versions(names)}


def versions(names: Sequence[str]) -> dict[str, str]:
    """Return the installed version of each distribution, "absent" without."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def print_environment(described: Mapping[str, Any]) -> None:
    """Print what `environment` returned in a few lines."""
    machine = described["machine"]
    memory = machine["memory_total"] / 2**30
    print(f"machine  {machine['processor']}, {machine['cores']} cores, {memory:.0f} GiB")
    print(
        f"         {' '.join(machine['instruction_sets'])}; load {machine['load_average'][0]:.2f}"
    )
    print(f"python   {described['python']}; compiler {machine['compiler']}")
    print("versions " + ", ".join(f"{k} {v}" for k, v in described["versions"].items()))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print aligned columns, the first to the left, the rest to the right."""
    cells = [list(header)] + [[str(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        rest = (value.rjust(width) for value, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([row[0].ljust(widths[0]), *rest]))


def write_results(name: str, results: Mapping[str, Any]) -> Path:
    """Write `bench/results/<name>.json` and return its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(results, indent=2, default=str) + "\n")
    print(f"\nwrote {path.relative_to(ROOT)}")
    return path
