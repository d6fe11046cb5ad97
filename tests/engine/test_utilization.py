"""Shares of the machine's limits, against a model counted by hand."""

from __future__ import annotations

import pytest
from tests.engine.conftest import MakeModel

from minigpt.engine.cost_model import StepWork
from minigpt.engine.utilization import Limits, UtilizationMeter, WorkSize
from minigpt.engine.warmup import bytes_read
from minigpt.model.config import ModelConfig

# Width 32, 4 heads of 8 over 2, FFN 64, 2 layers, 100 tokens: a layer has 2 x 32 x 32 + 2 x 16 x 32
# + 3 x 32 x 64 = 9,216 weights, the output projection 3,200.
SHAPE = ModelConfig(
    vocab_size=100, num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=64, context_length=64,
)  # fmt: skip
SIZE = WorkSize.of(SHAPE, weight_bytes=10_000, token_bytes=128)


def test_work_is_what_the_shape_says() -> None:
    decode = StepWork(0, 0, decode_rows=2, decode_context=20)
    attention = 20 * 4 * 2 * 32
    assert SIZE.operations(decode) == 2 * (2 * 2 * 9_216 + 2 * 3_200) + attention
    assert SIZE.bytes(decode) == 10_000 + 20 * 128
    prefill = StepWork(prefill_tokens=5, prefill_pairs=15)
    assert SIZE.operations(prefill) == 5 * 2 * 2 * 9_216 + 15 * 4 * 2 * 32
    assert SIZE.bytes(prefill) == 10_000


def test_phases_are_kept_apart() -> None:
    meter = UtilizationMeter(SIZE, Limits(bytes_per_second=1e6, operations_per_second=1e9))
    assert meter.read() == []
    for _ in range(500):
        meter.observe(StepWork(0, 0, 1, 0), 0.02)
    meter.observe(StepWork(5, 15, 1, 0), 0.1)
    decode, prefill = meter.read()
    assert (decode.phase, prefill.phase) == ("decode", "prefill")
    assert decode.memory_bandwidth == pytest.approx(0.5)
    assert decode.arithmetic == pytest.approx((2 * 2 * 9_216 + 2 * 3_200) / 0.02 / 1e9)
    assert prefill.memory_bandwidth == pytest.approx(0.1)


def test_recent_steps_count_most() -> None:
    meter = UtilizationMeter(SIZE, Limits(1e6, 1e9))
    for seconds in (10.0, 0.01):
        for _ in range(1000):
            meter.observe(StepWork(0, 0, 1, 0), seconds)
    assert meter.read()[0].memory_bandwidth == pytest.approx(1.0, rel=1e-3)


def test_tables_of_which_rows_are_read_do_not_count(make_model: MakeModel) -> None:
    untied = make_model()
    tied = make_model(tie_embeddings=True)
    assert bytes_read(untied) == bytes_read(tied)
    table = untied.model.embed_tokens.weight
    assert bytes_read(untied) == sum(p.nbytes for p in untied.parameters()) - table.nbytes
