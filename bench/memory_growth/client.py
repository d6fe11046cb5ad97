"""Sends the mixed requests and holds each answer to what it should be."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import aiohttp

from bench.memory_growth.workload import Call, encode, make_call

_IDLE_SECONDS = 30.0


class Client:
    """Closed loop of `concurrency` clients against one server.

    Args:
        session: Of aiohttp.
        url: Of the server.
        concurrency: Requests under way at a time.
        kinds: Of requests, see `workload.KINDS`.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, concurrency: int, kinds: Sequence[str]
    ) -> None:
        self._session = session
        self._url = url
        self._kinds = kinds
        self._concurrency = concurrency
        self.answered: Counter[str] = Counter()
        """Requests by kind."""
        self.finished: Counter[str] = Counter()
        """Choices by the reason that ended them."""

    async def send(self, first: int, count: int) -> None:
        """Send requests `first` to `first + count - 1`.

        Raises:
            RuntimeError: An answer is not what it should be.
        """
        numbers = iter(range(first, first + count))
        await asyncio.gather(*(self._work(numbers) for _ in range(self._concurrency)))

    async def idle(self) -> None:
        """Wait until the server holds no sequence and no block of one.

        Raises:
            RuntimeError: It still does after half a minute: something was lost.
        """
        left = {}
        for _ in range(int(_IDLE_SECONDS / 0.05)):
            async with self._session.get(f"{self._url}/metrics") as response:
                left = busy(await response.text())
            if not left:
                return
            await asyncio.sleep(0.05)
        raise RuntimeError(f"nobody asks, and after {_IDLE_SECONDS:g} s there are still {left}")

    async def _work(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            call = make_call(number, self._kinds)
            await self._ask(call)
            self.answered[call.kind] += 1

    async def _ask(self, call: Call) -> None:
        method = "GET" if call.body is None else "POST"
        asking = self._session.request(
            method, self._url + call.path, data=encode(call),
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        if call.leaves == "before the first token":
            await _hang_up(asking)
            return
        async with asking as response:
            if call.leaves:
                await response.content.readline()
                response.close()
                return
            text = await response.text()
        expected = "[DONE]" if call.stream else ""
        if response.status != call.status or expected not in text:
            raise RuntimeError(f"{call}: HTTP {response.status}: {text[:500]}")
        for reason in ("stop", "length"):
            self.finished[reason] += text.count(f'"finish_reason":"{reason}"')


async def _hang_up(asking: Any) -> None:
    """Send a request and close its connection when the server has read it, or is about to."""
    waiting = asyncio.ensure_future(asyncio.wait_for(asking, 0.02))
    with contextlib.suppress(TimeoutError):
        (await waiting).close()


def busy(metrics: str) -> dict[str, float]:
    """Return the gauges of work under way that are not zero, from Prometheus' text."""
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    values = {}
    for line in metrics.splitlines():
        name = line.partition("{")[0]
        if name in gauges:
            values[name] = float(line.rpartition(" ")[2])
    return {name: value for name, value in values.items() if value}
