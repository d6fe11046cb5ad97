"""One process against several that compute the model together: tokens/s, and time in exchanges.

A random bf16 model of the 124M or 429M shape, served from its files as `minigpt serve` does. At
each concurrency that many clients send one prompt after another, as in `bench.engine_throughput`.
One process is measured twice: as it serves by default, and with torch's operators, which are what
several processes serve with. Threads: all cores for one process, shared among several.

`exchange` is the share of the wall time that rank 0 is in all-reduce and gather, waiting for the
slowest rank included. `message us` is the time to tell a rank what to compute, there and back, over
the socket that does it, and for comparison by two broadcasts (length, then content) over gloo.

Run it as `python -m bench.tensor_parallel`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from bench.engine_throughput import measure
from bench.harness import environment, print_environment, print_table, write_results
from bench.serving.models import SHAPES, make_model
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.engine.parallel_runner import ParallelRunner

_MESSAGE = bytes(2000)
"""About a decode step of 16 streams."""


def main() -> None:
    arguments = parse_arguments()
    described = environment()
    print_environment(described)
    with tempfile.TemporaryDirectory() as directory:
        path = make_model(Path(directory) / arguments.shape, arguments.shape)
        rows = [
            row
            for name, changes in {
                "1 process": {},
                "1 process, torch": {"adapters": True},
                **{f"{n} ranks": {"tensor_parallel_size": n} for n in arguments.ranks},
            }.items()
            for row in run(name, path, changes, arguments)
        ]
    messages = {"socket": time_socket(), "gloo broadcast": time_gloo()}
    header = ("engine", "streams", "tokens/s", "TTFT p50 ms", "ITL p50 ms", "exchange")
    print_table(
        header,
        [
            (row["engine"], str(row["concurrency"]), f"{row['rate']:.1f}",
             f"{row['ttft_p50']:.1f}", f"{row['itl_p50']:.1f}", f"{row['exchange']:.0%}")
            for row in rows
        ],
    )  # fmt: skip
    print_table(("message us", "median"), [(k, f"{1e6 * v:.0f}") for k, v in messages.items()])
    result = {"environment": described, "settings": vars(arguments), "rows": rows}
    write_results("tensor_parallel", result | {"message_seconds": messages})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--output", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--requests", type=int, default=1, help="requests of each client")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args()


def run(
    name: str, path: Path, changes: dict[str, Any], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure one engine at each concurrency."""
    settings = {"dtype": arguments.dtype, "speculative": {"method": "none"}, **changes}
    engine = Engine.load(path, EngineConfig.model_validate(settings))
    runner = engine._weights.runner
    rows = []
    for concurrency in arguments.concurrency:
        spent = runner.exchange_seconds if isinstance(runner, ParallelRunner) else 0.0
        began = time.perf_counter()
        row = measure(engine, concurrency, arguments.prompt, arguments)
        seconds = time.perf_counter() - began
        if isinstance(runner, ParallelRunner):
            spent = runner.exchange_seconds - spent
        rows.append({"engine": name, "exchange": spent / seconds, **row})
    engine.close()
    return rows


def time_socket() -> float:
    """Return the seconds of a message to another process and its answer."""
    ours, theirs = socket.socketpair()
    with Connection(ours.detach()) as here, Connection(theirs.detach()) as there:
        process = _start(_echo, there)
        seconds = _time(lambda: _call(here))
        here.send_bytes(b"")
        process.join()
    return seconds


def time_gloo() -> float:
    """Return the seconds of two broadcasts from rank 0 and two back, as a length needs one too."""
    store = TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    process = _start(_broadcast, store.port)
    _join(store, 0)
    seconds = _time(lambda: _there_and_back(0))
    dist.destroy_process_group()
    process.join()
    return seconds


_ROUNDS = 300


def _time(exchange: Any) -> float:
    found = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        exchange()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _start(work: Any, argument: Any) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=work, args=(argument,))
    process.start()
    return process


def _call(pipe: Connection) -> None:
    pipe.send_bytes(_MESSAGE)
    pipe.recv_bytes()


def _echo(pipe: Connection) -> None:
    while message := pipe.recv_bytes():
        pipe.send_bytes(message)


def _join(store: Store, rank: int) -> None:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)


def _broadcast(port: int) -> None:
    _join(TCPStore("127.0.0.1", port, 2, is_master=False), 1)
    for _ in range(_ROUNDS):
        _there_and_back(1)
    dist.destroy_process_group()


def _there_and_back(rank: int) -> None:
    for source in (0, 1):
        dist.broadcast(torch.tensor([len(_MESSAGE)]), src=source)
        dist.broadcast(torch.zeros(len(_MESSAGE), dtype=torch.uint8), src=source)


if __name__ == "__main__":
    main()
