"""The series that dashboards read, first on their own and then after real requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from minigpt.api.requests import Delta, EngineStats, Ready, Utilization
from minigpt.serve.metrics import SequenceTimes, ServeMetrics

if TYPE_CHECKING:
    from tests.serve.conftest import ServerProcess

READY = Ready(
    model_id="m", vocab_size=8, context_length=64, kv_blocks_total=4, block_size=16,
    eos_token_id=0, load_seconds=0.1,
)  # fmt: skip


def stats(**changes: Any) -> EngineStats:
    values: dict[str, Any] = {
        "step": 1, "running": 0, "waiting": 0, "kv_blocks_used": 0, "kv_blocks_total": 4,
        "prompt_tokens": 0, "generation_tokens": 0, "preemptions": 0,
        "last_step_prefill_tokens": 0, "last_step_decode_tokens": 0,
    }  # fmt: skip
    return EngineStats(**(values | changes), last_step_seconds=0.01)


def value(metrics: ServeMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"model_name": "m", "engine": "0", **labels})


def test_counters_go_on_over_a_restart_and_gauges_start_anew() -> None:
    metrics = ServeMetrics("m")
    metrics.engine_started(READY)
    metrics.observe_stats(
        stats(prompt_tokens=10, generation_tokens=5, running=2, kv_blocks_used=3), new_step=True
    )
    metrics.observe_stats(
        stats(
            prompt_tokens=12, generation_tokens=9, running=2, kv_blocks_used=3,
            prefix_cache_queries=12, prefix_cache_hits=8, drafted_tokens=9, accepted_tokens=6,
        ),
        new_step=True,
    )  # fmt: skip
    assert value(metrics, "vllm:prompt_tokens_total") == 12
    assert value(metrics, "vllm:generation_tokens_total") == 9
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.75
    assert value(metrics, "vllm:prefix_cache_queries_total") == 12
    assert value(metrics, "vllm:prefix_cache_hits_total") == 8
    assert value(metrics, "vllm:spec_decode_num_draft_tokens_total") == 9
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_total") == 6
    metrics.engine_stopped()
    assert value(metrics, "vllm:num_requests_running") == 0
    assert value(metrics, "minigpt:engine_up") == 0
    metrics.engine_started(READY)
    metrics.observe_stats(stats(prompt_tokens=3, prefix_cache_hits=1), new_step=True)
    assert value(metrics, "vllm:prefix_cache_hits_total") == 9
    assert value(metrics, "vllm:prompt_tokens_total") == 15
    assert value(metrics, "vllm:cache_config_info", block_size="16", num_gpu_blocks="4") == 1


def test_latencies_of_a_sequence() -> None:
    metrics = ServeMetrics("m")
    times = SequenceTimes(arrival=100.0)
    for now, tokens in ((102.0, 1), (103.0, 1), (105.0, 4)):
        delta = Delta(request_id="r", index=0, token_ids=[1] * tokens, text="", queue_seconds=0.5)
        metrics.observe_delta(delta, times, now)
    metrics.observe_finish("stop", times, 105.0)
    sums = {
        "vllm:time_to_first_token_seconds": 2.0,
        "vllm:request_queue_time_seconds": 0.5,
        "vllm:request_prefill_time_seconds": 1.5,
        "vllm:request_decode_time_seconds": 3.0,
        "vllm:request_inference_time_seconds": 4.5,
        "vllm:e2e_request_latency_seconds": 5.0,
        "vllm:inter_token_latency_seconds": 3.0,
        "vllm:request_time_per_output_token_seconds": 3.0 / 5,
        "vllm:request_generation_tokens": 6.0,
    }
    assert {name: value(metrics, f"{name}_sum") for name in sums} == pytest.approx(sums)
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 5


def test_an_aborted_sequence_counts_but_is_not_timed() -> None:
    metrics = ServeMetrics("m")
    metrics.observe_finish("abort", SequenceTimes(arrival=1.0), 2.0)
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 0


def test_a_request_moves_the_series(server: ServerProcess) -> None:
    names = {
        "vllm:prompt_tokens_total": 6,
        "vllm:generation_tokens_total": 20,
        "vllm:time_to_first_token_seconds_count": 2,
        "vllm:request_queue_time_seconds_count": 2,
        "vllm:inter_token_latency_seconds_count": 18,
        "vllm:e2e_request_latency_seconds_count": 2,
        "vllm:request_params_n_sum": 2,
        "vllm:request_params_max_tokens_sum": 10,
        "vllm:request_prompt_tokens_sum": 6,
        "vllm:prefix_cache_queries_total": 12,
        "vllm:prefix_cache_hits_total": 5,
    }
    before = {name: server.metric(name) for name in names}
    finished = server.metric("vllm:request_success_total", finished_reason="length")
    body = {"model": "tiny", "prompt": "hello", "n": 2, "max_tokens": 10, "ignore_eos": True}
    server.http.post("/v1/completions", json=body).raise_for_status()
    gained = {name: server.metric(name) - before[name] for name in names}
    assert gained == names
    assert server.metric("vllm:request_success_total", finished_reason="length") == finished + 2
    assert server.metric("vllm:num_requests_running", model_name="tiny", engine="0") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert server.metric("vllm:iteration_tokens_total_count") > 0


def test_utilization_is_shown_by_phase_while_an_engine_serves() -> None:
    metrics = ServeMetrics("m")
    metrics.engine_started(READY)
    shown = [
        Utilization(phase="prefill", memory_bandwidth=0.1, arithmetic=0.6),
        Utilization(phase="decode", memory_bandwidth=0.8, arithmetic=0.05),
    ]
    metrics.observe_stats(stats(utilization=shown), new_step=True)
    for each in shown:
        for name in ("memory_bandwidth", "arithmetic"):
            series = f"minigpt:{name}_utilization"
            assert value(metrics, series, phase=each.phase) == getattr(each, name)
    metrics.engine_stopped()
    assert value(metrics, "minigpt:memory_bandwidth_utilization", phase="decode") is None
