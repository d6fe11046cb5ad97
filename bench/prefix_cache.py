"""What the engine's prefix cache is worth, and what it costs where nothing is shared.

In process, random bf16 weights of the 124M or 429M shape. Requests of `--prompt` tokens, of
which `--shared` are the same in all (a system prompt), come one after another; each is answered
with `--output` tokens before the next one.

- TTFT where the prefix is cached against where nothing is: medians over the requests.
- With nothing shared, the same requests with the cache on and off, in turns, so that what else
  the machine does meets both alike: the ratio of the medians of their processor times.
- The scheduler's own processor time a step, with the cache on and off, without any model.

Run it as `python -m bench.prefix_cache`.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from typing import Any

from bench.engine_throughput import make_engine
from bench.harness import environment, print_environment, print_table, write_results
from bench.serving.models import SHAPES
from minigpt.api.requests import Request, SamplingParams
from minigpt.engine.blocks import BlockManager
from minigpt.engine.engine import Engine
from minigpt.engine.scheduler import Scheduler
from minigpt.engine.sequence import Sequence

VOCAB_SIZE = 50257


def main() -> None:
    arguments = parse_arguments()
    described = environment()
    print_environment(described)
    result = {
        **shared_prefix(arguments), **nothing_shared(arguments), **scheduler_alone(arguments)
    }  # fmt: skip
    print_table(("measure", "value"), [(name, f"{value:.4g}") for name, value in result.items()])
    settings = vars(arguments)
    write_results(
        "prefix_cache", {"environment": described, "settings": settings, "result": result}
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens")
    parser.add_argument("--shared", type=int, default=461, help="of them the same in all")
    parser.add_argument("--output", type=int, default=8, help="tokens of each answer")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", default="auto")
    parser.add_argument("--budget", default="auto", help="max_batched_tokens")
    return parser.parse_args()


def shared_prefix(arguments: argparse.Namespace) -> dict[str, float]:
    """Return TTFT in milliseconds without and with a cached prefix, and their ratio."""
    engine, chance = make_engine(arguments), random.Random(0)
    system = tokens(chance, arguments.shared)
    own = arguments.prompt - arguments.shared
    answer(engine, tokens(chance, arguments.prompt), arguments.output)  # warm up
    answer(engine, system + tokens(chance, own), arguments.output)  # fills the cache
    cold, warm = [], []
    for _ in range(arguments.requests):
        cold.append(answer(engine, tokens(chance, arguments.prompt), arguments.output))
        warm.append(answer(engine, system + tokens(chance, own), arguments.output))
    before, after = statistics.median(cold), statistics.median(warm)
    return {
        "TTFT cold ms": 1e3 * before,
        "TTFT cached ms": 1e3 * after,
        "TTFT cold / cached": before / after,
    }


def nothing_shared(arguments: argparse.Namespace) -> dict[str, float]:
    """Return how many times more processor time requests take with the cache, sharing nothing.

    A cache of 4 contexts: at first its memory is written for the first time, which the system
    must supply; once it is full, blocks are evicted.
    """
    probe = make_engine(arguments)
    assert probe.config.kv_cache_bytes != "auto"
    size = probe.config.kv_cache_bytes * 4 // probe.config.max_num_seqs
    filling = size * probe.ready().kv_blocks_total // probe.config.kv_cache_bytes
    filling = filling * probe.ready().block_size // arguments.prompt
    del probe
    engines = [make_engine(arguments, prefix_cache=on, kv_cache_bytes=size) for on in (True, False)]
    chance = random.Random(1)
    spent: list[list[float]] = [[], []]
    for number in range(1 + filling + arguments.requests):
        prompt = tokens(chance, arguments.prompt)
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.process_time()
            answer(engines[which], prompt, arguments.output)
            spent[which].append(time.process_time() - began)
    first, later = slice(1, 1 + filling), slice(1 + filling, None)
    return {
        f"time with cache / without, nothing shared, {when}": statistics.median(spent[0][part])
        / statistics.median(spent[1][part])
        for when, part in (("memory new", first), ("memory in use", later))
    }


def scheduler_alone(arguments: argparse.Namespace) -> dict[str, float]:
    """Return microseconds of processor time a step, 16 streams of unlike prompts."""
    spent = {}
    for on in (True, False):
        runs = [schedule_only(arguments.prompt, prefix_cache=on) for _ in range(3)]
        spent[f"scheduler us a step, cache {'on' if on else 'off'}"] = 1e6 * min(runs)
    return spent


def schedule_only(prompt: int, *, prefix_cache: bool) -> float:
    """Return the seconds a step that scheduling alone takes, 64 answers of 128 tokens."""
    chance = random.Random(2)
    scheduler = Scheduler(BlockManager(4096, 16), 16, 256, prefix_cache=prefix_cache)
    sampling = SamplingParams(max_tokens=128)
    for arrival in range(64):
        request = Request(
            id=str(arrival), prompt_token_ids=tokens(chance, prompt), sampling=sampling
        )
        scheduler.add(Sequence.from_request(request, 0, arrival, seed=0))
    began, steps = time.process_time(), 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        scheduler.advance(batch.chunks)
        steps += 1
        for chunk in batch.chunks:
            if chunk.samples:
                chunk.sequence.token_ids.append(chance.randrange(VOCAB_SIZE))
                if chunk.sequence.num_output_tokens == sampling.max_tokens:
                    scheduler.finish(chunk.sequence)
    return (time.process_time() - began) / steps


_ids = itertools.count()


def answer(engine: Engine, prompt: list[int], output: int) -> float:
    """Answer one request; return the seconds to its first token."""
    sampling = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
    began, first = time.perf_counter(), 0.0
    engine.add(Request(id=str(next(_ids)), prompt_token_ids=prompt, sampling=sampling))
    while engine.has_work:
        deltas: list[Any] = engine.step()
        if deltas and not first:
            first = time.perf_counter() - began
    return first


def tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(VOCAB_SIZE) for _ in range(count)]


if __name__ == "__main__":
    main()
