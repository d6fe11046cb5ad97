"""What `/metrics` shows, under the names that dashboards for vLLM read.

Everything is counted in the API process, from the engine's deltas and stats. Latencies are of
sequences (a request with n = 2 counts twice), as vLLM's are.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from minigpt.api.requests import Delta, EngineStats, FinishReason, Ready, Request

_LABELS = ("model_name", "engine")
_LATENCY = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
_TOKEN_GAP = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))


@dataclass(slots=True)
class SequenceTimes:
    """When a sequence's tokens came, in seconds of the monotonic clock."""

    arrival: float
    first_token: float | None = None
    queued: float = 0.0
    """Seconds before its first step."""
    last_token: float = 0.0
    tokens: int = 0


class ServeMetrics:
    """All series of one served model.

    Args:
        model_name: Value of the label `model_name`.
        engine: Value of the label `engine`.
    """

    def __init__(self, model_name: str, engine: str = "0") -> None:
        self.registry = CollectorRegistry()
        self._labels = (model_name, engine)
        self._last = _NO_STATS
        self.http_requests = Counter(
            "http_requests", "HTTP requests answered.", ("method", "handler", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.http_seconds = Histogram(
            "http_request_duration_seconds", "HTTP requests from first byte in to last byte out.",
            ("method", "handler"), buckets=_LATENCY, registry=self.registry,
        )  # fmt: skip
        self._finished = Counter(
            "vllm:request_success", "Sequences finished.", (*_LABELS, "finished_reason"),
            registry=self.registry,
        )  # fmt: skip
        self._cache_config = Gauge(
            "vllm:cache_config_info", "Shape of the KV cache.",
            (*_LABELS, "block_size", "num_gpu_blocks"), registry=self.registry,
        )  # fmt: skip
        self._running = self._gauge("vllm:num_requests_running", "Sequences in the batch.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Sequences waiting for the batch.")
        self._cache_usage = self._gauge("vllm:kv_cache_usage_perc", "KV cache in use, 0 to 1.")
        self.engine_up = self._gauge("minigpt:engine_up", "1 while an engine process serves.")
        self.engine_restarts = self._counter(
            "minigpt:engine_restarts", "Engine processes started after one had died."
        )
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens computed.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._preemptions = self._counter("vllm:num_preemptions", "Sequences preempted.")
        self._prefix_queries = self._counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = self._counter(
            "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache."
        )
        self._drafted = self._counter(
            "vllm:spec_decode_num_draft_tokens", "Tokens drafted and verified."
        )
        self._accepted = self._counter(
            "vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were right."
        )
        self._bandwidth = Gauge(
            "minigpt:memory_bandwidth_utilization",
            "Bytes that recent steps read over what the machine can read, 0 to 1.",
            (*_LABELS, "phase"), registry=self.registry,
        )  # fmt: skip
        self._arithmetic = Gauge(
            "minigpt:arithmetic_utilization",
            "Operations of recent steps over what the machine can do, 0 to 1.",
            (*_LABELS, "phase"), registry=self.registry,
        )  # fmt: skip
        self._step_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Tokens computed in a step.", _TOKENS
        )
        self._ttft = self._histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token.", _LATENCY
        )
        self._inter_token = self._histogram(
            "vllm:inter_token_latency_seconds", "Gap between a sequence's tokens.", _TOKEN_GAP
        )
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "(Last token - first token) / (tokens - 1).", _TOKEN_GAP,
        )  # fmt: skip
        self._end_to_end = self._histogram(
            "vllm:e2e_request_latency_seconds", "Arrival to last token.", _LATENCY
        )
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "Arrival in the engine to first step.", _LATENCY
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "First step to first token.", _LATENCY
        )
        self._inference = self._histogram(
            "vllm:request_inference_time_seconds", "First step to last token.", _LATENCY
        )
        self._decode = self._histogram(
            "vllm:request_decode_time_seconds", "First token to last token.", _LATENCY
        )
        self._request_prompt = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS
        )
        self._request_generation = self._histogram(
            "vllm:request_generation_tokens", "Tokens generated for a sequence.", _TOKENS
        )
        self._params_n = self._histogram(
            "vllm:request_params_n", "Answers asked for.", (1.0, 2.0, 5.0, 10.0, 20.0, 128.0)
        )
        self._params_max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "Token limit of a request.", _TOKENS
        )

    def render(self) -> bytes:
        """Return the exposition in Prometheus' text format."""
        return generate_latest(self.registry)

    def engine_started(self, ready: Ready) -> None:
        """Begin anew with an engine process's counters."""
        self._last = _NO_STATS
        self._cache_config.clear()
        self._cache_config.labels(
            *self._labels, str(ready.block_size), str(ready.kv_blocks_total)
        ).set(1)
        self.engine_up.set(1)

    def engine_stopped(self) -> None:
        """Forget the gauges of an engine process that is gone."""
        for gauge in (self.engine_up, self._running, self._waiting, self._cache_usage):
            gauge.set(0)
        self._bandwidth.clear()
        self._arithmetic.clear()

    def observe_stats(self, stats: EngineStats, *, new_step: bool) -> None:
        """Take over the engine's gauges and what its counters gained."""
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._cache_usage.set(stats.kv_blocks_used / max(stats.kv_blocks_total, 1))
        self._prompt_tokens.inc(stats.prompt_tokens - self._last.prompt_tokens)
        self._generation_tokens.inc(stats.generation_tokens - self._last.generation_tokens)
        self._preemptions.inc(stats.preemptions - self._last.preemptions)
        self._prefix_queries.inc(stats.prefix_cache_queries - self._last.prefix_cache_queries)
        self._prefix_hits.inc(stats.prefix_cache_hits - self._last.prefix_cache_hits)
        self._drafted.inc(stats.drafted_tokens - self._last.drafted_tokens)
        self._accepted.inc(stats.accepted_tokens - self._last.accepted_tokens)
        for phase in stats.utilization:
            labels = (*self._labels, phase.phase)
            self._bandwidth.labels(*labels).set(phase.memory_bandwidth)
            self._arithmetic.labels(*labels).set(phase.arithmetic)
        self._last = stats
        if new_step:
            self._step_tokens.observe(
                stats.last_step_prefill_tokens + stats.last_step_decode_tokens
            )

    def observe_request(self, request: Request) -> None:
        """Count a request as it is handed to the engine."""
        self._request_prompt.observe(len(request.prompt_token_ids))
        self._params_n.observe(request.n)
        self._params_max_tokens.observe(request.sampling.max_tokens)

    def observe_delta(self, delta: Delta, times: SequenceTimes, now: float) -> None:
        """Time a delta's tokens; `times` is brought up to date."""
        if not (count := len(delta.token_ids)):
            return
        if times.first_token is None:
            times.first_token = now
            times.queued = delta.queue_seconds or 0.0
            self._ttft.observe(now - times.arrival)
            self._queue.observe(times.queued)
            self._prefill.observe(max(0.0, now - times.arrival - times.queued))
        else:
            for _ in range(count):
                self._inter_token.observe((now - times.last_token) / count)
        times.last_token = now
        times.tokens += count

    def observe_finish(self, reason: FinishReason, times: SequenceTimes, now: float) -> None:
        """Count a finished sequence; latencies only of those that ended as they should."""
        self._finished.labels(*self._labels, reason).inc()
        self._request_generation.observe(times.tokens)
        if reason not in ("stop", "length"):
            return
        self._end_to_end.observe(now - times.arrival)
        if times.first_token is not None:
            span = times.last_token - times.first_token
            self._decode.observe(span)
            self._inference.observe(max(0.0, now - times.arrival - times.queued))
            if times.tokens > 1:
                self._per_token.observe(span / (times.tokens - 1))

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(name, help_text, _LABELS, registry=self.registry).labels(*self._labels)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, _LABELS, registry=self.registry).labels(*self._labels)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, help_text, _LABELS, buckets=buckets, registry=self.registry)
        return histogram.labels(*self._labels)


_NO_STATS = EngineStats(
    step=0, running=0, waiting=0, kv_blocks_used=0, kv_blocks_total=0, prompt_tokens=0,
    generation_tokens=0, preemptions=0, last_step_seconds=0.0, last_step_prefill_tokens=0,
    last_step_decode_tokens=0,
)  # fmt: skip
