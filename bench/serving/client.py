"""One client for every server: streamed completions over HTTP, each token's arrival timed.

Formulas: output tokens/s = all tokens of all answers / wall time from the first request's
start to the last answer's end; TTFT = from sending a request to its first event with a choice;
ITL = the gaps between events of a stream that each carry one token. Closed loop: `concurrency`
clients each send one request after another.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Answer:
    """When one request was sent and when each of its tokens came, in seconds."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    text: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True)
class Point:
    """One measured point: what a table row shows."""

    tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float

    @classmethod
    def of(cls, answers: Sequence[Answer], seconds: float) -> Point:
        """Summarise answers that took `seconds` of wall time; times become milliseconds."""
        ttft = sorted(1e3 * answer.ttft for answer in answers)
        gaps = sorted(1e3 * gap for answer in answers for gap in answer.gaps)
        tokens = sum(len(answer.arrivals) for answer in answers)
        return cls(
            tokens / seconds,
            statistics.median(ttft),
            quantile(ttft, 0.99),
            statistics.median(gaps),
            quantile(gaps, 0.99),
        )


def quantile(ordered: Sequence[float], q: float) -> float:
    """Return the smallest value that a share `q` of a sorted sample does not exceed."""
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


async def measure(
    url: str,
    model: str,
    texts: Iterator[str],
    *,
    concurrency: int,
    requests: int,
    max_tokens: int,
    extra: dict[str, Any],
) -> tuple[Point, list[Answer]]:
    """Send `requests` prompts a client and summarise; raises on any refused request."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    prompts = [[next(texts) for _ in range(requests)] for _ in range(concurrency)]
    answers: list[Answer] = []
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def client(mine: list[str]) -> None:
            for prompt in mine:
                body = {
                    "model": model,
                    "prompt": prompt,
                    "max_tokens": max_tokens,
                    "temperature": 0,
                    "stream": True,
                    **extra,
                }
                answers.append(await stream(session, url, body))

        begin = time.perf_counter()
        await asyncio.gather(*(client(mine) for mine in prompts))
        seconds = time.perf_counter() - begin
    return Point.of(answers, seconds), answers


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    """Send one streamed completion and time its events."""
    answer = Answer(time.perf_counter())
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{url}: HTTP {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            arrived = time.perf_counter()
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"{url}: {event['error']}")
            for choice in event.get("choices", ()):
                # A last event without text only names the finish reason.
                if choice.get("text") or choice.get("finish_reason") is None:
                    answer.arrivals.append(arrived)
                    answer.text += choice["text"]
    if not answer.arrivals:
        raise RuntimeError(f"{url} answered without a token")
    return answer
