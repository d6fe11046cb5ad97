from __future__ import annotations

from bench.memory_growth.client import busy


def test_only_work_under_way_is_busy() -> None:
    idle = (
        'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0\n'
        "# HELP vllm:num_requests_waiting Sequences waiting.\n"
        'vllm:num_requests_waiting{engine="0",model_name="tiny"} 0.0\n'
        'vllm:prompt_tokens_total{engine="0",model_name="tiny"} 7.0\n'
    )
    assert busy(idle) == {}
    lost = idle + 'vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25\n'
    assert busy(lost) == {"vllm:kv_cache_usage_perc": 0.25}
