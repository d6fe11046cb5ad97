"""The data loader: what resuming costs at any step, and how fast batches come.

For windows, best-fit packing and a mixture of three sources it times (a) opening the data and
fetching the first batch at step 10 and at step 1,000,000, in turn, each in the state of a run
that resumes there, and (b) batches in sequence. The corpus is the standard library's sources,
prepared once in minigpt's home.

Run it as `python -m bench.loader`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from bench.harness import (
    environment,
    print_environment,
    print_table,
    ratio_interval,
    spread,
    write_results,
)
from minigpt.core.artifact import Artifact
from minigpt.core.config import from_mapping
from minigpt.data.config import DataConfig, MixtureConfig
from minigpt.data.loader import BatchLoader
from minigpt.data.training_data import open_training_data
from minigpt.pipeline import open_dataset

STEPS = (10, 1_000_000)
ROWS_PER_STEP = 64
KINDS = ("windows", "best-fit", "mixture")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    described = environment()
    print_environment(described)
    dataset = open_dataset(from_mapping(DataConfig, {"source": {"kind": "pystdlib"}}))
    results: dict[str, Any] = {}
    resume_rows, speed_rows = [], []
    for kind in KINDS:
        measured = measure(kind, dataset, arguments)
        results[kind] = measured
        near, far = measured["resume_seconds"]["10"], measured["resume_seconds"]["1000000"]
        ratio, low, high = ratio_interval(far, near)
        cells = [spread([1e3 * seconds for seconds in times]) for times in (near, far)]
        resume_rows.append([kind, *cells, f"{ratio:.2f} ({low:.2f}-{high:.2f})"])
        speed_rows.append([kind, spread(measured["tokens_per_second"]), measured["efficiency"]])
    print("\nresume and first batch, ms: median (least-largest)\n")
    print_table(("rows", "at step 10", "at step 1,000,000", "ratio"), resume_rows)
    print(f"\nbatches of {arguments.batch} x {arguments.length}, one thread\n")
    print_table(("rows", "tokens/s", "valid targets"), speed_rows)
    shape = {"batch": arguments.batch, "length": arguments.length, "rows_per_step": ROWS_PER_STEP}
    write_results("loader", {"environment": described, "shape": shape, **results})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default 15)")
    parser.add_argument("--batches", type=int, default=100, help="batches a turn (default 100)")
    parser.add_argument("--batch", type=int, default=16, help="rows a batch (default 16)")
    parser.add_argument("--length", type=int, default=256, help="tokens a row (default 256)")
    return parser.parse_args()


def make_loader(kind: str, dataset: Artifact, arguments: argparse.Namespace) -> BatchLoader:
    """Open the data and plan the rows, as a run does when it starts."""
    mixture = None
    if kind == "mixture":
        sources = [
            {"name": "a", "dataset": str(dataset.path), "weight": 0.7},
            {"name": "b", "dataset": str(dataset.path), "weight": 0.2},
            {
                "name": "c",
                "dataset": str(dataset.path),
                "weight": 0.1,
                "schedule": [{"at": 500_000, "weight": 1, "ramp": True}],
            },
        ]
        mixture = from_mapping(MixtureConfig, {"mixture": sources})
    data = open_training_data(mixture or str(dataset.path), dataset)
    loader = data.loader(
        batch_size=arguments.batch,
        sequence_length=arguments.length,
        samples_per_step=ROWS_PER_STEP,
        seed=0,
        packing="best-fit" if kind == "best-fit" else "windows",
    )
    assert isinstance(loader, BatchLoader)
    return loader


def measure(kind: str, dataset: Artifact, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time resumes at both steps in turn, then batches in sequence."""
    loader = make_loader(kind, dataset, arguments)  # a packing plan is made here, once
    resume: dict[str, list[float]] = {str(step): [] for step in STEPS}
    for _ in range(arguments.rounds):
        for step in STEPS:
            loader.next_sample = step * ROWS_PER_STEP
            state = loader.state()
            begin = time.perf_counter()
            resumed = make_loader(kind, dataset, arguments)
            resumed.load_state(state)
            resumed.next_batch()
            resume[str(step)].append(time.perf_counter() - begin)
    speeds = []
    loader.next_sample = 0
    valid = 0
    for _ in range(arguments.rounds):
        begin = time.perf_counter()
        batches = [loader.next_batch() for _ in range(arguments.batches)]
        seconds = time.perf_counter() - begin
        speeds.append(arguments.batches * arguments.batch * arguments.length / seconds)
        valid += sum(int((batch.targets >= 0).sum()) for batch in batches)
    tokens = arguments.rounds * arguments.batches * arguments.batch * arguments.length
    return {
        "resume_seconds": resume,
        "resume_median": {step: statistics.median(times) for step, times in resume.items()},
        "tokens_per_second": speeds,
        "efficiency": f"{valid / tokens:.2%}",
    }


if __name__ == "__main__":
    main()
