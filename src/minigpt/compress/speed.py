"""Decode speed of two models, timed in turns through the serving engine."""

from __future__ import annotations

from collections.abc import Sequence

from minigpt.api.requests import Request, SamplingParams
from minigpt.core.clock import Clock, SystemClock
from minigpt.core.telemetry import progress
from minigpt.engine.engine import Engine


def compare_decode_speed(
    engines: Sequence[Engine],
    prompt: Sequence[int],
    *,
    repeats: int,
    tokens: int,
    batch: int,
    clock: Clock | None = None,
) -> list[list[float]]:
    """Time each engine's decode steps, the engines in turns, after one turn of warming up.

    A step in which any prompt token is computed does not count, so that this is the speed
    between tokens and not that of the prompt.

    Args:
        engines: What to compare; idle.
        prompt: Token ids that fit every engine's vocabulary.
        repeats: Timings of each engine.
        tokens: Tokens a sequence generates, at least 4: they start up to two steps apart.
        batch: Sequences at once.
        clock: For durations.

    Returns:
        For each engine its tokens/s, all sequences together, in each of the repeats.
    """
    clock = clock or SystemClock()
    found: list[list[float]] = [[] for _ in engines]
    with progress("timing decode", total=(repeats + 1) * len(engines)) as bar:
        for repeat in range(repeats + 1):
            for engine, speeds in zip(engines, found, strict=True):
                speed = _decode_once(engine, prompt, tokens, batch, clock)
                if repeat:
                    speeds.append(speed)
                bar.advance()
    return found


def _decode_once(
    engine: Engine, prompt: Sequence[int], tokens: int, batch: int, clock: Clock
) -> float:
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    request = Request(id="decode-speed", prompt_token_ids=list(prompt), sampling=sampling, n=batch)
    engine.add(request)
    seconds, decoded = 0.0, 0
    while engine.has_work:
        started = clock.monotonic()
        engine.step()
        elapsed = clock.monotonic() - started
        stats = engine.stats()
        # Sequences start one step apart: only steps of the whole batch tell its speed.
        if stats.last_step_prefill_tokens == 0 and stats.last_step_decode_tokens == batch:
            seconds += elapsed
            decoded += batch
    assert decoded > 0 and seconds > 0, (decoded, seconds)
    return decoded / seconds
