"""The cluster simulator against real processes on gloo, then effective training time at scale.

1. At 2 ranks: real steps (matrix products, a gloo all-reduce, a synced checkpoint) are timed, and
   compute, link bandwidth and latency, save and restart times are fitted from that alone.
2. From these the simulator predicts what was not used: the step at 4 ranks, and whole runs of 2
   and 4 ranks in which a rank is killed at given moments and all start again from the checkpoint.
3. A table from 8 to 16,384 GPUs, simulated, with Daly's closed form beside it.

Processors are shared: more ranks than cores divide them, which the prediction allows for by the
factor ranks / cores on everything that the ranks do themselves.

Run it as `python -m bench.cluster_simulator`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.harness import environment, print_environment, print_table, spread, write_results
from minigpt.cluster.simulate import (
    KnownFailures,
    Ledger,
    SimulationConfig,
    Timings,
    ring_all_reduce_seconds,
    run_job,
    simulate,
)
from minigpt.core.machine import usable_cores

MIB = 2**20
DETECTION_POLL = 0.05


@dataclass(frozen=True)
class Work:
    """What each rank does in a step."""

    matrix: int = 512
    products: int = 4
    gradient: int = 8 * MIB
    checkpoint: int = 32 * MIB
    steps_per_checkpoint: int = 20
    steps: int = 200


@dataclass(frozen=True)
class Measured:
    """Medians of a run without failures, in seconds."""

    compute: float
    all_reduce: float
    save: float
    start: float
    """From spawning the processes to the first step."""
    step: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of each real run")
    parser.add_argument("--repeat", type=int, default=3, help="real runs of each kind")
    parser.add_argument("--seeds", type=int, default=40, help="simulated runs of each row")
    arguments = parser.parse_args()
    described = environment()
    print_environment(described)
    work = Work(steps=arguments.steps)
    results: dict[str, Any] = {"environment": described, "work": asdict(work)}
    with tempfile.TemporaryDirectory() as scratch:
        results["validation"] = validate(work, arguments.repeat, Path(scratch))
    results["scale"] = table(arguments.seeds)
    write_results("cluster_simulator", results)


def validate(work: Work, repeat: int, scratch: Path) -> list[dict[str, Any]]:
    """Fit at 2 ranks; predict, measure and print the rest."""
    small = Work(**(asdict(work) | {"gradient": work.gradient // 8}))
    runs: dict[str, list[Measured]] = {"two": [], "small": [], "four": []}
    for i in range(repeat):  # in turn, so that a busy machine slows all alike
        for name, (ranks, load) in {
            "two": (2, work),
            "small": (2, small),
            "four": (4, work),
        }.items():
            runs[name].append(run_plain(ranks, load, scratch / f"{name}-{i}"))
    two, two_small, four = median_of(runs["two"]), median_of(runs["small"]), runs["four"]
    # T(S) = S/bandwidth + 2 latency at N = 2; two sizes give both.
    per_byte = (two.all_reduce - two_small.all_reduce) / (work.gradient - small.gradient)
    if per_byte <= 0:
        raise SystemExit(
            "the larger all-reduce took no longer: this machine is too busy to measure"
        )
    latency = max(0.0, (two.all_reduce - work.gradient * per_byte) / 2)
    shared = max(1.0, 2 / usable_cores())
    print(
        f"\nfitted at 2 ranks: compute {two.compute * 1e3:.1f} ms, link "
        f"{1 / per_byte / MIB:,.0f} MiB/s and {latency * 1e6:.0f} us, save "
        f"{two.save * 1e3:.0f} ms, start {two.start:.2f} s"
    )
    rows: list[dict[str, Any]] = []

    def compare(name: str, predicted: float, measured: list[float]) -> None:
        middle = statistics.median(measured)
        error = predicted / middle - 1
        rows.append({"what": name, "predicted": predicted, "measured": measured, "error": error})

    def predict(ranks: int) -> tuple[Timings, Measured]:
        factor = max(1.0, ranks / usable_cores()) / shared
        all_reduce = ring_all_reduce_seconds(ranks, work.gradient, 1 / per_byte, latency) * factor
        compute, start = two.compute * factor, two.start * factor
        step = compute + all_reduce
        timings = Timings(step, work.steps_per_checkpoint, two.save, 0.0, DETECTION_POLL / 2, start)
        return timings, Measured(compute, all_reduce, two.save, start, step)

    expected = predict(4)[1]
    for name in ("compute", "all_reduce", "step", "start"):
        compare(f"4 ranks: {name}", getattr(expected, name), [getattr(m, name) for m in four])
    for ranks in (2, 4):
        timings, _ = predict(ranks)
        cycle = timings.interval + timings.stall
        uptimes = [1.7 * cycle, 2.4 * cycle, 0.6 * cycle]
        ledger = run_job(timings, KnownFailures(uptimes), steps=work.steps)
        real = [
            run_with_kills(ranks, work, uptimes, scratch / f"kills-{ranks}-{i}")
            for i in range(repeat)
        ]
        name = f"{ranks} ranks, 3 kills"
        compare(f"{name}: seconds in all", ledger.total, [r.total for r in real])
        share = ledger.useful / ledger.total
        compare(f"{name}: effective share", share, [r.useful / r.total for r in real])
        compare(f"{name}: lost seconds", ledger.lost, [r.lost for r in real])
    print()
    print_table(
        ("what", "predicted", "measured: median (least-largest)", "error"),
        [
            [r["what"], f"{r['predicted']:.4g}", spread(r["measured"]), f"{r['error']:+.1%}"]
            for r in rows
        ],
    )
    return rows


def median_of(runs: list[Measured]) -> Measured:
    """Return the median of each figure."""
    names = Measured.__dataclass_fields__
    return Measured(**{name: statistics.median(getattr(r, name) for r in runs) for name in names})


def spawn(ranks: int, work: Work, directory: Path) -> list[subprocess.Popen[bytes]]:
    """Start all ranks; they meet by a file of this attempt."""
    attempt = len(list(directory.glob("rendezvous-*")))
    rendezvous = directory / f"rendezvous-{attempt}"
    rendezvous.touch()
    program = "import sys; from bench import cluster_simulator as c; c.rank_main(sys.argv[1:])"
    words = [str(ranks), f"{rendezvous}-store", str(directory), json.dumps(asdict(work))]
    with (directory / "log").open("ab") as log:  # where survivors of a kill complain
        return [
            subprocess.Popen(
                [sys.executable, "-c", program, str(rank), *words],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stderr=log,
            )
            for rank in range(ranks)
        ]


def rank_main(arguments: list[str]) -> None:
    """Run one rank: from the checkpoint to the last step, each part timed."""
    import torch
    import torch.distributed as dist

    rank, ranks, directory = int(arguments[0]), int(arguments[1]), Path(arguments[3])
    work = Work(**json.loads(arguments[4]))
    torch.set_num_threads(1)
    meeting = f"file://{arguments[2]}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    a = torch.randn(work.matrix, work.matrix)
    gradient = torch.randn(work.gradient // 4)
    state = os.urandom(work.checkpoint) if rank == 0 else b""
    mark = directory / "checkpoint"
    step = int(mark.read_bytes()[:8]) if mark.exists() else 0
    lines: list[list[float]] = []
    dist.barrier()
    if rank == 0:
        (directory / "training").write_text(f"{time.time()}")
    while step < work.steps:
        begin = time.perf_counter()
        for _ in range(work.products):
            a @ a
        computed = time.perf_counter()
        dist.all_reduce(gradient)
        gradient.div_(ranks)
        reduced = time.perf_counter()
        step += 1
        saved = 0.0
        if step % work.steps_per_checkpoint == 0:
            if rank == 0:
                save(mark, f"{step:8}".encode() + state)
            dist.barrier()
            saved = time.perf_counter() - reduced
        lines.append([computed - begin, reduced - computed, saved])
        if rank == 0:
            with (directory / "progress").open("a") as file:
                file.write(f"{step} {time.time()}\n")
    if rank == 0:
        (directory / "timings.json").write_text(json.dumps(lines))
    dist.destroy_process_group()


def save(path: Path, content: bytes) -> None:
    """Write a checkpoint that is durable when this returns."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def run_plain(ranks: int, work: Work, directory: Path) -> Measured:
    """Run to the end without failures."""
    directory.mkdir()
    begin = time.time()
    processes = spawn(ranks, work, directory)
    for process in processes:
        if process.wait():
            raise SystemExit(f"a rank failed: {(directory / 'log').read_text()[-800:]}")
    start = float((directory / "training").read_text()) - begin
    lines = json.loads((directory / "timings.json").read_text())
    computes, reduces, saves = zip(*lines, strict=True)
    return Measured(
        compute=statistics.mean(computes[5:]),
        all_reduce=statistics.mean(reduces[5:]),
        save=statistics.mean(s for s in saves if s),
        start=start,
        step=statistics.mean(c + r for c, r, _ in lines[5:]),
    )


def run_with_kills(ranks: int, work: Work, uptimes: list[float], directory: Path) -> Ledger:
    """Run to the end, killing the last rank after each uptime; keep books of the wall clock."""
    directory.mkdir()
    ledger = Ledger()
    mark, training = directory / "checkpoint", directory / "training"
    uptime_left = list(uptimes)
    processes = spawn(ranks, work, directory)
    wait_for_training(training, processes)
    begin = resumed = time.time()
    resumed_step = 0
    while True:
        kill_at = resumed + uptime_left[0] if uptime_left else float("inf")
        while time.time() < kill_at and any(p.poll() is None for p in processes):
            time.sleep(min(DETECTION_POLL, max(0.001, kill_at - time.time())))
        if all(p.poll() == 0 for p in processes):
            break
        killed = time.time()
        processes[-1].send_signal(signal.SIGKILL)
        uptime_left.pop(0)
        while all(p.poll() is None for p in processes):
            time.sleep(DETECTION_POLL)
        for process in processes:
            process.kill()
            process.wait()
        noticed = time.time()
        saved_step = int(mark.read_bytes()[:8]) if mark.exists() else 0
        ledger.interruptions += 1
        account(ledger, directory, resumed, killed, resumed_step, saved_step)
        training.unlink()
        processes = spawn(ranks, work, directory)
        wait_for_training(training, processes)
        resumed, resumed_step = time.time(), saved_step
        ledger.detection += noticed - killed
        ledger.restart += resumed - noticed
    account(ledger, directory, resumed, time.time(), resumed_step, work.steps)
    assert abs(ledger.total - (time.time() - begin)) < 1.0
    return ledger


def account(
    ledger: Ledger, directory: Path, resumed: float, ended: float, first: int, saved: int
) -> None:
    """Split a stretch of running at the last checkpoint: what came before is kept, saves too."""
    progress = directory / "progress"
    lines = (
        [line.split() for line in progress.read_text().splitlines()] if progress.exists() else []
    )
    until_saved = max((float(at) for step, at in lines if int(step) <= saved), default=resumed)
    kept = max(0.0, min(ended, until_saved) - resumed) if saved > first else 0.0
    ledger.useful += kept
    ledger.lost += ended - resumed - kept
    progress.unlink(missing_ok=True)


def wait_for_training(training: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait for the first step."""
    while not training.exists():
        if any(p.poll() for p in processes):
            log = training.with_name("log").read_text()
            raise SystemExit(f"a rank failed before its first step: {log[-800:]}")
        time.sleep(0.005)


# Assumed at scale, none of it measured here: a save stalls 10 s, a failure is noticed in 60 s,
# a restart takes 240 s, 60 % of failures cost a node, 1 in 256 nodes is spare, a day's repair.
LLAMA_HOURS = 54 * 24 * 16_384


def table(seeds: int) -> list[dict[str, Any]]:
    """Simulate 8 to 16,384 GPUs at Llama 3's failure rate; print and return the rows."""
    rows = []
    for gpus in (8, 64, 512, 1024, 2048, 4096, 8192, 16_384):
        for stall in (60.0, 10.0, 1.0):
            config = SimulationConfig(
                gpus=gpus,
                gpu_mtbf_hours=LLAMA_HOURS / 466,
                checkpoint_stall_seconds=stall,
                restart_seconds=240,
                spare_nodes=max(1, gpus // 8 // 32),
                seeds=seeds,
            )
            rows.append(simulate(config).summary())
    print("\nsimulated, not measured: 54 days at the rate of Llama 3's 466 interruptions")
    print("(16,384 GPUs; published: more than 90 % effective training time)\n")
    header = ("GPUs", "MTBF h", "save s", "interval s", "interrupted", "effective", "Daly")
    cells = []
    for row in rows:
        low, high = row["effective_interval"]
        cells.append(
            [
                f"{row['gpus']:,}",
                f"{row['mtbf_hours']:,.1f}",
                f"{row['checkpoint_stall_seconds']:g}",
                f"{row['checkpoint_interval_seconds']:,.0f}",
                f"{row['interruptions']:,.1f}",
                f"{row['effective']:.2%} ({low:.2%}-{high:.2%})",
                f"{row['closed_form']:.2%}",
            ]
        )
    print_table(header, cells)
    return rows


if __name__ == "__main__":
    main()
