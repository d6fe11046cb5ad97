"""What draft heads gain on a trained model and real text, and how often each draft is right.

In process. Prompts are the beginnings of held-out documents; greedy unless said. Three engines
answer the same requests in turns: without drafts, with heads as the engine decides (it stops
where they lose), and with heads that draft `--draft` tokens at every step.

Formulas: tokens/s = generated tokens / wall time, medians over the rounds; ratios are medians of
the rounds' ratios, in wall and in processor time. Right at i: verified drafts at place i that were
right, of those whose predecessors were, from the engine that always drafts. Share of drafting:
the time within the heads, their projections and draws, of that engine's steps.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigpt.api.requests import Request, SamplingParams
from minigpt.core.artifact import open_artifact
from minigpt.data.shards import TokenDataset
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.engine.sequence import Sequence

KINDS = ("without", "as it decides", "always")
_ids = itertools.count()


class Watched:
    """An engine with its drafts counted by place and its drafting timed."""

    def __init__(self, engine: Engine, *, always: bool) -> None:
        self.engine = engine
        self.verified: list[int] = []
        self.right: list[int] = []
        self.draft_seconds = 0.0
        speculator, drafter = engine._speculator, engine._executor._drafter
        if speculator is None or drafter is None:
            return
        observe, fill = speculator.observe, drafter.fill

        def watch(sequence: Sequence, drafted: int, accepted: int) -> None:
            for place in range(min(accepted + 1, drafted)):
                if place == len(self.verified):
                    self.verified.append(0)
                    self.right.append(0)
                self.verified[place] += 1
                self.right[place] += place < accepted
            observe(sequence, drafted, accepted)

        def timed(chunks: Any) -> Any:
            began = time.perf_counter()
            filled = fill(chunks)
            self.draft_seconds += time.perf_counter() - began
            return filled

        speculator.observe = watch  # type: ignore[method-assign]
        drafter.fill = timed  # type: ignore[method-assign]
        if always:
            every: Callable[..., Any] = lambda rows, proposals, work: {  # noqa: E731
                row: len(proposal) for row, proposal in proposals.items()
            }
            speculator._lengths = every  # type: ignore[method-assign]


def compare_heads(concurrency: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer the same requests with the three engines, in turns."""
    engines = [Watched(_load(kind, arguments), always=kind == "always") for kind in KINDS]
    prompts = read_prompts(Path(arguments.dataset), arguments)
    timings: list[list[tuple[float, float]]] = [[] for _ in KINDS]
    for number in range(arguments.rounds + 1):
        first = number * concurrency
        chosen = [prompts[(first + i) % len(prompts)] for i in range(concurrency)]
        for which in range(len(KINDS)) if number % 2 else reversed(range(len(KINDS))):
            if number == 1:
                engines[which].draft_seconds = 0.0
            timing, _ = answer(engines[which].engine, chosen, arguments)
            if number:
                timings[which].append(timing)
    wall, cpu = ([[t[i] for t in timing] for timing in timings] for i in (0, 1))
    always = engines[2]
    return {
        "concurrency": concurrency,
        "tokens_per_second": [
            concurrency * arguments.output / statistics.median(seconds) for seconds in wall
        ],
        "ratio": [_ratio(wall, which) for which in (1, 2)],
        "cpu_ratio": [_ratio(cpu, which) for which in (1, 2)],
        "right": [r / v for r, v in zip(always.right, always.verified, strict=True)],
        "verified": always.verified,
        "drafted": [watched.engine.stats().drafted_tokens for watched in engines],
        "draft_share": always.draft_seconds / sum(wall[2]),
        "runner": always.engine.runner_name,
    }


def _ratio(seconds: list[list[float]], which: int) -> float:
    return statistics.median(a / b for a, b in zip(seconds[0], seconds[which], strict=True))


def _load(kind: str, arguments: argparse.Namespace) -> Engine:
    speculative: dict[str, Any] = {"method": "none"}
    if kind != "without":
        speculative = {"method": "heads", "draft_heads": arguments.heads}
        speculative["max_draft_tokens"] = arguments.draft
        speculative["draft_vocabulary"] = arguments.draft_vocabulary
    return Engine.load(
        arguments.model,
        EngineConfig.model_validate(
            {"dtype": arguments.dtype, "threads": arguments.threads, "prefix_cache": False,
             "speculative": speculative}
        ),
    )  # fmt: skip


def read_prompts(path: Path, arguments: argparse.Namespace) -> list[list[int]]:
    """Return the first `--prompt` tokens of the held-out documents that are long enough."""
    held_out = TokenDataset.open(open_artifact(path, kind="dataset", verify=False).path, "val")
    documents = (held_out.document(number) for number in range(held_out.num_documents))
    return [d[: arguments.prompt].tolist() for d in documents if len(d) >= arguments.prompt]


def answer(
    engine: Engine, prompts: list[list[int]], arguments: argparse.Namespace
) -> tuple[tuple[float, float], list[list[int]]]:
    """Answer prompts at once; return seconds of wall and processor, and what was said."""
    sampling = SamplingParams(
        max_tokens=arguments.output,
        temperature=arguments.temperature,
        seed=0,
        ignore_eos=True,
    )
    requests = [Request(id=str(next(_ids)), prompt_token_ids=p, sampling=sampling) for p in prompts]
    for request in requests:
        engine.add(request)
    said: dict[str, list[int]] = {request.id: [] for request in requests}
    wall, cpu = time.perf_counter(), time.process_time()
    while engine.has_work:
        for delta in engine.step():
            said[delta.request_id] += delta.token_ids
    timing = time.perf_counter() - wall, time.process_time() - cpu
    assert all(len(tokens) == arguments.output for tokens in said.values())
    return timing, list(said.values())
