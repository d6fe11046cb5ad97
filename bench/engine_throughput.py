"""The engine alone, in process: output tokens/s, TTFT and inter-token latency by concurrency.

A random model of 124M shape (12 layers, width 768, 12 heads, FFN 2048, GPT-2's vocabulary) or
429M (24 layers, width 1024, 16 heads, 8 KV heads, FFN 4096), made on the fly. At each
concurrency that many clients each send one prompt after another (closed loop). The prefix is
never shared and nothing is warm but the allocator: one request is answered before the clock.
Nothing is drafted, for what random weights say soon repeats itself: see `bench.speculative`.

Formulas: tokens/s = all generated tokens / wall time; TTFT = from add to the first token;
ITL = the gaps between a sequence's tokens. Shares of the machine's limits: engine/utilization.py.

Run it as `python -m bench.engine_throughput`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.harness import environment, print_environment, print_table, write_results
from bench.serving.models import SHAPES
from minigpt.api.requests import Request, SamplingParams
from minigpt.core.machine import describe_machine
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.engine.resolve import resolve_memory, resolve_numerics
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder


class Letters:
    """A vocabulary that spells every token with a letter: the text is not what is measured."""

    vocab_size = 50257
    eos_token_id: int | None = None

    def token_bytes(self, token_id: int) -> bytes:
        return b"a"


@dataclass
class Timeline:
    """When one request was added and when each of its tokens came, in seconds."""

    added: float
    tokens: list[float] = field(default_factory=list)


def main() -> None:
    arguments = parse_arguments()
    described = environment()
    print_environment(described)
    engine = make_engine(arguments, kv_cache_dtype=arguments.kv_cache_dtype)
    print(f"engine   {engine.config!r}")
    rows = [
        measure(engine, concurrency, prompt, arguments)
        for prompt in arguments.prompt
        for concurrency in arguments.concurrency
    ]
    header = ("concurrency x prompt", "tokens/s", "TTFT p50 ms", "TTFT p99 ms", "ITL p50 ms",
              "ITL p99 ms", "decode: bandwidth", "prefill: arithmetic")  # fmt: skip
    print_table(
        header,
        [
            (f"{row['concurrency']} x {row['prompt']}",
             *(f"{row[k]:.1f}" for k in ("rate", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99")),
             *(f"{row.get(k, 0):.0%}" for k in ("decode_bandwidth", "prefill_arithmetic")))
            for row in rows
        ],
    )  # fmt: skip
    settings = vars(arguments) | {"engine": engine.config.model_dump()}
    write_results(
        "engine_throughput", {"environment": described, "settings": settings, "rows": rows}
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, nargs="+", default=[128], help="prompt tokens")
    parser.add_argument("--output", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--requests", type=int, default=1, help="requests of each client")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--threads", default="auto")
    parser.add_argument("--budget", default="auto", help="max_batched_tokens")
    return parser.parse_args()


def make_engine(
    arguments: argparse.Namespace, kind: type[Decoder] = Decoder, **changes: Any
) -> Engine:
    config = EngineConfig.model_validate(
        {"dtype": arguments.dtype, "threads": arguments.threads,
         "max_batched_tokens": arguments.budget, "speculative": {"method": "none"}, **changes}
    )  # fmt: skip
    machine = describe_machine()
    config = resolve_numerics(
        config, machine, cuda=torch.cuda.is_available(), report=lambda line: None
    )
    assert config.threads != "auto"
    torch.set_num_threads(config.threads)
    model_config = ModelConfig(
        vocab_size=50257, context_length=1024, qk_norm=False, **SHAPES[arguments.shape]
    )
    config = resolve_memory(
        config, model_config, available=machine.memory_available, report=lambda line: None
    )
    model = kind(model_config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device=config.device, dtype=getattr(torch, config.dtype)).eval()
    engine = Engine(model, Letters(), config)
    engine.warm_up()
    return engine


def measure(
    engine: Engine, concurrency: int, prompt: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    sampling = SamplingParams(
        max_tokens=arguments.output, temperature=arguments.temperature, seed=0, ignore_eos=True
    )
    generator = torch.Generator().manual_seed(concurrency)
    ids = itertools.count()
    timelines: dict[str, Timeline] = {}

    def add() -> None:
        tokens = torch.randint(50257, (prompt,), generator=generator).tolist()
        request = Request(id=str(next(ids)), prompt_token_ids=tokens, sampling=sampling)
        timelines[request.id] = Timeline(time.perf_counter())
        engine.add(request)

    add()
    while engine.has_work:
        engine.step()
    timelines.clear()
    left = concurrency * arguments.requests
    begin = time.perf_counter()
    for _ in range(concurrency):
        add()
        left -= 1
    while engine.has_work:
        deltas = engine.step()
        now = time.perf_counter()
        for delta in deltas:
            assert delta.finish_reason != "error", delta.error
            timelines[delta.request_id].tokens += [now] * len(delta.token_ids)
            if delta.finish_reason and left:
                add()
                left -= 1
    seconds = time.perf_counter() - begin
    shares = {each.phase: each for each in engine.stats().utilization}
    reached = {}
    if shares:
        reached["decode_bandwidth"] = shares["decode"].memory_bandwidth
        reached["prefill_arithmetic"] = shares["prefill"].arithmetic
    found = summarize(timelines, seconds)
    return {"concurrency": concurrency, "prompt": prompt, **found, **reached}


def summarize(timelines: dict[str, Timeline], seconds: float) -> dict[str, float]:
    """Return tokens/s, and milliseconds of TTFT and ITL."""
    ttft = [1e3 * (t.tokens[0] - t.added) for t in timelines.values()]
    gaps = [1e3 * (b - a) for t in timelines.values() for a, b in itertools.pairwise(t.tokens)]
    return {
        "rate": sum(len(t.tokens) for t in timelines.values()) / seconds,
        "ttft_p50": statistics.median(ttft),
        "ttft_p99": percentile(ttft, 99),
        "itl_p50": statistics.median(gaps),
        "itl_p99": percentile(gaps, 99),
    }


def percentile(values: list[float], percent: int) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]


if __name__ == "__main__":
    main()
