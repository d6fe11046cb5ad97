"""The first steps, before any request: they load what loads late and teach the cost model.

And what the machine can do at most, which steps are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minigpt.api.requests import Request, SamplingParams
from minigpt.core.clock import Clock
from minigpt.engine.batch import Batch, Chunk
from minigpt.engine.config import EngineConfig
from minigpt.engine.cost_model import StepCostModel
from minigpt.engine.sequence import Sequence
from minigpt.engine.utilization import Limits
from minigpt.kernels import library
from minigpt.kernels.roofline import Arithmetic, peak, read_bandwidth
from minigpt.model.decoder import Decoder

_PROMPT_TOKENS = 64
_ROUNDS = 3
_SPAN_BYTES = 256 << 20
"""More than a processor's caches hold, mostly."""


def warm_up(
    run: Callable[[list[Chunk]], Any],
    cost_model: StepCostModel,
    config: EngineConfig,
    weights: str,
    clock: Clock,
) -> None:
    """Time prefill and decode of a made-up sequence in the cache's first blocks.

    Without it the first prompts would teach prefill alone: what a decode costs beside them,
    and with it how much of a prompt a step may take in while streams run, would be a guess.

    Args:
        run: Computes chunks over a cache of which nothing is in use.
        cost_model: Learns from the steps.
        config: With every "auto" settled.
        weights: Digest of the weights to run.
        clock: For the durations.
    """
    assert config.context_length != "auto"
    assert config.max_batched_tokens != "auto"
    length = min(_PROMPT_TOKENS, config.context_length - 1, config.max_batched_tokens)
    request = Request(
        id="warm-up", prompt_token_ids=[0] * length, sampling=SamplingParams(max_tokens=1)
    )
    sequence = Sequence.from_request(request, 0, 0, 0, weights=weights)
    sequence.token_ids.append(0)
    sequence.block_table = list(range(-(-(length + 1) // config.block_size)))
    prefill = Batch([Chunk(sequence, 0, length, samples=True)])
    decode = Batch([Chunk(sequence, length, 1, samples=True)])
    for batch in [prefill, decode] * _ROUNDS:
        started = clock.monotonic()
        run(batch.chunks)
        cost_model.observe(batch.work, clock.monotonic() - started)


def measure_limits(config: EngineConfig) -> Limits | None:
    """Measure what the machine can do at most, in some 0.1 s; None where no kernels are."""
    kernels = library.loaded()
    if kernels is None or config.device != "cpu":
        return None
    arithmetic = (Arithmetic.FLOAT32, Arithmetic.BFLOAT16)
    peaks = [peak(kernels, kind, repeat=20) for kind in arithmetic]
    bandwidth = read_bandwidth(kernels, span=_SPAN_BYTES)
    return Limits(bandwidth, peaks[0] if config.dtype == "float32" else max(peaks))


def bytes_read(model: Decoder) -> int:
    """Return the bytes of a model that every step reads: not tables of which it reads rows."""
    shared = model.lm_head is None
    return sum(
        tensor.nbytes
        for name, tensor in model.state_dict().items()
        if "embed_positions" not in name and (shared or "embed_tokens" not in name)
    )
