"""Whether a server's memory grows with the requests that it has answered.

A tiny model with random weights behind `minigpt serve` (two processes, the kernels where they
are built, a replay log that turns over), and requests of every kind over HTTP (workload.py):
drawn, penalised, structured, scored, embedded, streamed, left by the client, refused. After
each `--every` requests the server is let go idle, must hold no sequence and no block of one, and
its processes' memory is read. The first quarter warms up: the heap and the bounded caches fill.
Over the rest the growth per 1,000 requests is fitted (trend.py).

Verdict: a process grows where even the interval's low end is above `--tolerance`. The default
of 8 KiB per 1,000 requests is less than one small Python object a request.

Run it as `python -m bench.memory_growth`; exit code 1 where anything grows.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.harness import environment, print_environment, print_table, write_results
from bench.memory_growth.footprint import Footprint
from bench.memory_growth.trend import fit
from bench.memory_growth.workload import CONTEXT_LENGTH, KINDS, MODEL
from bench.serving.peers import minigpt, running

KIB = 1024
MIB = 1024**2
SETTINGS = (
    "engine.speculative.method=ngram",
    "engine.kv_cache_bytes=4000000",
    "replay_log_bytes=1000000",
)
WARM_UP = 0.25
"""Share of the requests."""


def main() -> None:
    arguments = parse_arguments()
    described = environment()
    print_environment(described)
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch) / MODEL)
        log = Path(scratch) / "serve.log"
        replay = f"replay_log={scratch}/replay.jsonl"
        server = minigpt(model, *SETTINGS, replay, *arguments.set)
        with running(server, log) as started:
            found = asyncio.run(measure(started.url, processes(started.pid), arguments))
    rows = judge(found["samples"], arguments.tolerance)
    print()
    print_table(("process", "KiB per 1,000 requests", "95 %", "first MiB", "last MiB", ""), rows)
    print(f"\n{found['requests_per_second']:.0f} requests/s; {found['answered']}")
    print(f"choices ended by {found['finished']}")
    write_results(
        "memory_growth",
        {"environment": described, "settings": vars(arguments), "trends": rows, **found},
    )
    if any(row[-1] == "GROWS" for row in rows):
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=12)
    parser.add_argument("--every", type=int, default=200, help="requests between two samples")
    parser.add_argument("--tolerance", type=float, default=8 * KIB, help="bytes per 1,000 requests")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="kinds of requests")
    parser.add_argument("--set", action="append", default=[], help="of minigpt serve")
    arguments = parser.parse_args()
    if arguments.requests * (1 - WARM_UP) < 3 * arguments.every:
        parser.error(
            f"--requests {arguments.requests} with --every {arguments.every}: fewer than 3 "
            "samples after the warm-up; ask more often or send more"
        )
    return arguments


def make_model(directory: Path) -> Path:
    """Write a model of 2 layers with random bf16 weights over bytes."""
    import torch

    from minigpt.data.tokenizer_build import bytes_tokenizer
    from minigpt.model.config import ModelConfig
    from minigpt.model.decoder import Decoder
    from minigpt.model.weights import save_model

    tokenizer = bytes_tokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        hidden_size=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        intermediate_size=128,
        context_length=CONTEXT_LENGTH,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    spelled = directory.with_name(f"{directory.name}-tokenizer")
    spelled.mkdir(parents=True)
    tokenizer.copy_to(spelled)
    save_model(directory, model.bfloat16(), config, spelled)
    return directory


def processes(pid: int) -> dict[str, int]:
    """Return the process ids of a server's API process, which is `pid`, and of its engine."""
    import psutil

    (engine,) = psutil.Process(pid).children()
    return {"API": pid, "engine": engine.pid}


async def measure(
    url: str, family: dict[str, int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Send all requests; return what was answered and the samples of each process."""
    import aiohttp

    from bench.memory_growth.client import Client

    samples: list[dict[str, Any]] = []
    began = time.perf_counter()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        client = Client(session, url, arguments.concurrency, arguments.only)
        for sent in range(0, arguments.requests, arguments.every):
            count = min(arguments.every, arguments.requests - sent)
            await client.send(sent, count)
            await client.idle()
            held = {name: asdict(Footprint.of(pid)) for name, pid in family.items()}
            samples.append({"requests": sent + count, **held})
            if len(samples) % 10 == 0:
                print_sample(samples[-1])
    seconds = time.perf_counter() - began
    return {
        "requests_per_second": arguments.requests / seconds,
        "answered": dict(client.answered),
        "finished": dict(client.finished),
        "samples": samples,
    }


def print_sample(sample: dict[str, Any]) -> None:
    held = (
        f"{name} {sample[name]['anonymous'] / MIB:.2f} MiB, {sample[name]['files']} files, "
        f"{sample[name]['threads']} threads"
        for name in ("API", "engine")
    )
    print(f"  {sample['requests']:6,} requests: {'; '.join(held)}", flush=True)


def judge(samples: list[dict[str, Any]], tolerance: float) -> list[tuple[Any, ...]]:
    """Return a row of the table for each process, from the samples after the warm-up."""
    begin = WARM_UP * samples[-1]["requests"]
    kept = [sample for sample in samples if sample["requests"] > begin]
    requests = [sample["requests"] for sample in kept]
    rows = []
    for name in ("API", "engine"):
        held = [sample[name]["anonymous"] for sample in kept]
        trend = fit(requests, held)
        interval = f"{trend.low / KIB:+.2f} to {trend.high / KIB:+.2f}"
        rows.append(
            (name, f"{trend.slope / KIB:+.2f}", interval, f"{held[0] / MIB:.2f}",
             f"{held[-1] / MIB:.2f}", trend.verdict(tolerance))
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
