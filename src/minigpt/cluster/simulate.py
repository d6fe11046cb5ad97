"""A training cluster with failures as discrete events: what share of the time is training.

Failures are exponential per node. Each one stops the whole job; it costs the work since the last
durable checkpoint, the detection, a node where a spare must take over (or one be repaired first),
and the restart. What comes out is simulated: `bench/cluster_simulator.py` compares it with real
processes on gloo, and with the closed form in `core.reliability`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field

from minigpt.core.config import Config
from minigpt.core.reliability import daly_interval, effective_share

HOUR, DAY = 3600.0, 86_400.0


class SimulationConfig(Config):
    """A cluster and a job that fills it. The defaults are those of a careful 8 x H100 node."""

    gpus: int = Field(default=1024, ge=1)
    """GPUs of the job."""
    gpus_per_node: int = Field(default=8, ge=1)
    """GPUs that fail together."""
    gpu_mtbf_hours: float = Field(default=50_700.0, gt=0)
    """Mean hours between failures that stop the job, of one GPU with its share of node, network
    and software; default: Llama 3's 419 unexpected interruptions on 16,384 GPUs in 54 days."""
    days: float = Field(default=54.0, gt=0)
    """Simulated time."""
    seeds: int = Field(default=20, ge=2)
    """Independent runs, for the confidence interval."""
    compute_seconds: float = Field(default=5.0, gt=0)
    """Of a step, without communication."""
    model_parallel: int = Field(default=1, ge=1)
    """GPUs that share one copy of the model; the others are data-parallel."""
    gradient_gib: float = Field(default=0.0, ge=0)
    """All-reduced by each GPU in a step over the data-parallel ring."""
    link_gib_per_second: float = Field(default=40.0, gt=0)
    """Bandwidth of a GPU's link in that ring."""
    link_latency_seconds: float = Field(default=1e-5, ge=0)
    """Of one message."""
    overlap: float = Field(default=0.0, ge=0, le=1)
    """Share of the communication that is hidden behind computation."""
    checkpoint_stall_seconds: float = Field(default=10.0, ge=0)
    """Training stands still this long for a save."""
    checkpoint_write_seconds: float = Field(default=0.0, ge=0)
    """From the end of the stall until the checkpoint is durable (asynchronous saves)."""
    checkpoint_interval_seconds: float | Literal["daly"] = "daly"
    """Work between two saves; daly: the optimum for the stall and the cluster's MTBF."""
    detection_seconds: float = Field(default=60.0, ge=0)
    """From a failure until it is noticed."""
    restart_seconds: float = Field(default=180.0, ge=0)
    """From then, with all nodes there, until training goes on."""
    node_loss: float = Field(default=0.6, ge=0, le=1)
    """Share of the failures after which the node must be replaced."""
    spare_nodes: int = Field(default=8, ge=0)
    """Nodes that stand by."""
    repair_hours: float = Field(default=24.0, ge=0)
    """Mean hours until a lost node is a spare again (exponential)."""

    @property
    def mtbf_seconds(self) -> float:
        """Mean time between failures of the whole cluster."""
        return self.gpu_mtbf_hours * HOUR / self.gpus

    @property
    def communication_seconds(self) -> float:
        """What the all-reduce adds to a step."""
        ring = max(1, self.gpus // self.model_parallel)
        gib = 2**30
        seconds = ring_all_reduce_seconds(
            ring,
            self.gradient_gib * gib,
            self.link_gib_per_second * gib,
            self.link_latency_seconds if self.gradient_gib else 0.0,
        )
        return seconds * (1 - self.overlap)


@dataclass(frozen=True)
class Timings:
    """What the event loop needs to know of a job, in seconds."""

    step: float
    steps_per_checkpoint: int
    stall: float
    write: float
    detection: float
    restart: float

    @property
    def interval(self) -> float:
        """Work between two saves."""
        return self.step * self.steps_per_checkpoint


@dataclass
class Ledger:
    """Where the wall clock went, in seconds; the parts sum to `total`."""

    useful: float = 0.0
    lost: float = 0.0
    checkpoint: float = 0.0
    detection: float = 0.0
    waiting_for_nodes: float = 0.0
    restart: float = 0.0
    interruptions: int = 0

    @property
    def total(self) -> float:
        """All of the wall clock."""
        down = self.detection + self.waiting_for_nodes + self.restart
        return self.useful + self.lost + self.checkpoint + down

    def parts(self) -> dict[str, float]:
        """Return the parts by name."""
        values: dict[str, float] = asdict(self)
        values.pop("interruptions")
        return values


class Failures(Protocol):
    """When the job fails, and what that takes besides detection and restart."""

    def uptime(self) -> float:
        """Return the seconds of running until the next failure; `inf` for none."""
        ...

    def during(self, downtime: float) -> float | None:
        """Return when within a downtime another failure begins it anew, None if none does."""
        ...

    def wait_for_node(self, now: float) -> float:
        """Return the seconds until every node is there again, after a failure at `now`."""
        ...


class RandomFailures:
    """Exponential failures, a pool of spares, exponential repairs."""

    def __init__(self, config: SimulationConfig, rng: np.random.Generator) -> None:
        self._config = config
        self._rng = rng
        self._spares = config.spare_nodes
        self._repairs: list[float] = []

    def uptime(self) -> float:
        return float(self._rng.exponential(self._config.mtbf_seconds))

    def during(self, downtime: float) -> float | None:
        at = self.uptime()
        return at if at < downtime else None

    def wait_for_node(self, now: float) -> float:
        if self._rng.random() >= self._config.node_loss:
            return 0.0
        while self._repairs and self._repairs[0] <= now:
            heapq.heappop(self._repairs)
            self._spares += 1
        heapq.heappush(
            self._repairs, now + float(self._rng.exponential(self._config.repair_hours * HOUR))
        )
        if self._spares:
            self._spares -= 1
            return 0.0
        return heapq.heappop(self._repairs) - now


class KnownFailures:
    """Failures after given seconds of running each; for comparison with real runs."""

    def __init__(self, uptimes: Sequence[float]) -> None:
        self._uptimes: Iterator[float] = iter(uptimes)

    def uptime(self) -> float:
        return next(self._uptimes, math.inf)

    def during(self, downtime: float) -> float | None:
        return None

    def wait_for_node(self, now: float) -> float:
        return 0.0


def run_job(
    timings: Timings, failures: Failures, *, horizon: float = math.inf, steps: float = math.inf
) -> Ledger:
    """Let one job run until a time or a number of steps is reached.

    Args:
        timings: Of the job.
        failures: When it fails.
        horizon: Seconds after which it is cut off.
        steps: Steps after which it is done.
    """
    assert horizon < math.inf or steps < math.inf
    ledger = Ledger()
    while ledger.total < horizon and ledger.useful < steps * timings.step * (1 - 1e-12):
        until_failure = failures.uptime()
        until_done = _seconds_for(timings, steps * timings.step - ledger.useful)
        until_end = min(until_done, horizon - ledger.total)
        if until_failure >= until_end:
            _run_to_end(ledger, timings, until_end)
            return ledger
        _run_until_failure(ledger, timings, until_failure)
        _go_down(ledger, timings, failures, horizon)
    return ledger


def _seconds_for(timings: Timings, work: float) -> float:
    """Return how long some work takes with its saves; the last one follows the last step."""
    if work == math.inf:
        return math.inf
    saves = math.floor(work / timings.interval + 1e-9)
    return work + saves * timings.stall


def _split(timings: Timings, elapsed: float) -> tuple[float, float]:
    """Return the work and the stalls within the first `elapsed` seconds after a start."""
    cycle = timings.interval + timings.stall
    cycles = math.floor(elapsed / cycle)
    rest = elapsed - cycles * cycle
    work = cycles * timings.interval + min(rest, timings.interval)
    return work, elapsed - work


def _run_to_end(ledger: Ledger, timings: Timings, elapsed: float) -> None:
    work, stalls = _split(timings, elapsed)
    ledger.useful += work
    ledger.checkpoint += stalls


def _run_until_failure(ledger: Ledger, timings: Timings, elapsed: float) -> None:
    """Keep the work up to the last checkpoint that was durable; the rest is lost."""
    work, stalls = _split(timings, elapsed)
    cycle = timings.interval + timings.stall
    durable = max(0, math.floor((elapsed - timings.write) / cycle)) * timings.interval
    ledger.useful += durable
    ledger.lost += work - durable
    ledger.checkpoint += stalls
    ledger.interruptions += 1


def _go_down(ledger: Ledger, timings: Timings, failures: Failures, horizon: float) -> None:
    """Detect, wait for nodes and restart; a failure meanwhile begins that anew."""
    while True:
        wait = failures.wait_for_node(ledger.total)
        phases = {
            "detection": timings.detection,
            "waiting_for_nodes": wait,
            "restart": timings.restart,
        }
        cut = failures.during(sum(phases.values()))
        left = min(math.inf if cut is None else cut, horizon - ledger.total)
        for name, seconds in phases.items():
            spent = min(seconds, max(0.0, left))
            setattr(ledger, name, getattr(ledger, name) + spent)
            left -= spent
        if cut is None or ledger.total >= horizon:
            return
        ledger.interruptions += 1


@dataclass(frozen=True)
class Simulation:
    """The runs of all seeds."""

    config: SimulationConfig
    timings: Timings
    ledgers: list[Ledger] = field(repr=False)

    @property
    def effective(self) -> float:
        """Mean effective training time: useful seconds per second."""
        return float(np.mean(self._shares("useful")))

    @property
    def effective_interval(self) -> tuple[float, float]:
        """95 % confidence interval of that mean over the seeds (normal)."""
        shares = self._shares("useful")
        margin = 1.96 * float(np.std(shares, ddof=1)) / math.sqrt(len(shares))
        return self.effective - margin, self.effective + margin

    @property
    def closed_form(self) -> float:
        """Daly's expectation; without shortage of nodes and with durable saves it is exact."""
        timings = self.timings
        downtime = timings.detection + timings.restart
        return effective_share(timings.interval, timings.stall, self.config.mtbf_seconds, downtime)

    def summary(self) -> dict[str, Any]:
        """Return the result as plain values."""
        config, timings = self.config, self.timings
        names = self.ledgers[0].parts()
        return {
            "simulated": True,
            "gpus": config.gpus,
            "mtbf_hours": config.mtbf_seconds / HOUR,
            "interruptions": float(np.mean([ledger.interruptions for ledger in self.ledgers])),
            "effective": self.effective,
            "effective_interval": list(self.effective_interval),
            "closed_form": self.closed_form,
            "checkpoint_interval_seconds": timings.interval,
            "checkpoint_stall_seconds": timings.stall,
            "step_seconds": timings.step,
            "communication_share_of_step": config.communication_seconds / timings.step,
            "shares": {name: float(np.mean(self._shares(name))) for name in names},
        }

    def _shares(self, part: str) -> list[float]:
        return [ledger.parts()[part] / ledger.total for ledger in self.ledgers]


def ring_all_reduce_seconds(
    ranks: int, size: float, bandwidth: float, latency: float = 0.0
) -> float:
    """Return the time of a ring all-reduce: 2 (N-1)/N S/bandwidth + 2 (N-1) latency.

    Args:
        ranks: N, participants.
        size: S, bytes of the buffer on each.
        bandwidth: Bytes per second of each link.
        latency: Seconds a message.
    """
    return 2 * (ranks - 1) / ranks * size / bandwidth + 2 * (ranks - 1) * latency


def simulate(config: SimulationConfig) -> Simulation:
    """Simulate the cluster for its days, once a seed."""
    step = config.compute_seconds + config.communication_seconds
    if config.checkpoint_interval_seconds == "daly":
        wanted = daly_interval(max(config.checkpoint_stall_seconds, 1e-3), config.mtbf_seconds)
    else:
        wanted = config.checkpoint_interval_seconds
    # A save must be durable before the next begins, and saves fall between steps.
    wanted = max(wanted, config.checkpoint_write_seconds, step)
    timings = Timings(
        step=step,
        steps_per_checkpoint=max(1, round(wanted / step)),
        stall=config.checkpoint_stall_seconds,
        write=config.checkpoint_write_seconds,
        detection=config.detection_seconds,
        restart=config.restart_seconds,
    )
    ledgers = [
        run_job(
            timings,
            RandomFailures(config, np.random.default_rng(seed)),
            horizon=config.days * DAY,
        )
        for seed in range(config.seeds)
    ]
    return Simulation(config, timings, ledgers)
