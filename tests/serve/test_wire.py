from __future__ import annotations

from minigpt.api.requests import (
    Abort,
    Delta,
    EngineStats,
    Ready,
    Request,
    SamplingParams,
    TokenLogprob,
)
from minigpt.serve.wire import (
    FromEngine,
    StartFailure,
    Stop,
    ToEngine,
    decode_from_engine,
    decode_to_engine,
    encode_from_engine,
    encode_to_engine,
)


def test_messages_to_the_engine_round_trip() -> None:
    sampling = SamplingParams(max_tokens=5, stop=("a", "\u00e4"), seed=2**63 - 1, logprobs=0)
    messages: list[ToEngine] = [
        Request(id="r", prompt_token_ids=[1, 2], sampling=sampling, n=3),
        Abort(id="r"),
        Stop(),
    ]
    for message in messages:
        assert decode_to_engine(encode_to_engine(message)) == message


def test_messages_from_the_engine_round_trip() -> None:
    logprobs = [TokenLogprob(1, "a", -0.5, ((1, "a", -0.5), (2, "\ufffd", -1.5)))]
    messages: list[FromEngine] = [
        Ready(
            model_id="x", vocab_size=9, context_length=8, kv_blocks_total=4, block_size=2,
            eos_token_id=None, load_seconds=0.5,
        ),
        StartFailure(message="no", exit_code=2),
        Delta(request_id="r", index=1, token_ids=[1], text="\u00e4", logprobs=logprobs),
        EngineStats(
            step=1, running=1, waiting=0, kv_blocks_used=1, kv_blocks_total=4, prompt_tokens=1,
            generation_tokens=1, preemptions=0, last_step_seconds=0.1,
            last_step_prefill_tokens=1, last_step_decode_tokens=0,
        ),
    ]  # fmt: skip
    assert decode_from_engine(encode_from_engine(messages)) == messages
