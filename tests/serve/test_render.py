"""A whole answer is what the stream would have been, for any way of cutting it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.api.openai_responses import encode
from minigpt.api.requests import Delta, FinishReason, Ready, Request, TokenLogprob
from minigpt.core.clock import ManualClock
from minigpt.data.tokenizer import Tokenizer
from minigpt.data.tokenizer_build import bytes_tokenizer
from minigpt.serve.engine_client import EngineClient, Update
from minigpt.serve.health import ProgressMonitor
from minigpt.serve.metrics import ServeMetrics
from minigpt.serve.render import ChatRenderer, CompletionRenderer, Renderer
from minigpt.serve.service import Job

CHOICES = 3
READY = Ready(
    model_id="m", vocab_size=257, context_length=64, kv_blocks_total=4, block_size=16,
    eos_token_id=256, load_seconds=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return bytes_tokenizer()


def job(echo: tuple[str, ...] = ()) -> Job:
    clock = ManualClock()
    monitor = ProgressMonitor(clock, factor=10, floor_seconds=1, first_step_seconds=1)
    client = EngineClient(ServeMetrics("m"), monitor, clock)
    client.connect(lambda message: None, READY)
    generation = client.submit([Request(id="r", prompt_token_ids=[1, 2], n=CHOICES)])
    generation.weights = "0123456789ab"
    return Job("id", 1, "m", generation, echo)


@st.composite
def update_lists(draw: st.DrawFn, with_logprobs: bool) -> list[list[Update]]:
    """Each choice's tokens, cut into deltas and interleaved at will; all choices finish."""
    left = {choice: draw(st.integers(1, 6)) for choice in range(CHOICES)}
    batches = []
    while left:
        moving = draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
        batch = []
        for choice in sorted(moving):
            left[choice] -= 1
            text = draw(st.text("ab\u00e4", max_size=3))
            token = draw(st.integers(0, 255))
            logprobs = [TokenLogprob(token, text, -1.0, ((token, text, -1.0),))]
            reasons: list[FinishReason] = ["stop", "length"]
            reason = draw(st.sampled_from(reasons)) if not left[choice] else None
            delta = Delta(
                request_id="r", index=choice, token_ids=[token], text=text,
                finish_reason=reason, logprobs=logprobs if with_logprobs else None,
            )  # fmt: skip
            batch.append((choice, delta))
            if not left[choice]:
                del left[choice]
        batches.append(batch)
    return batches


def streamed(renderer: Renderer, batches: list[list[Update]]) -> list[dict[str, Any]]:
    """Return the stream's pieces, one choice each."""
    chunks = [json.loads(encode(c)) for batch in batches for c in renderer.chunks(batch)]
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    return [chunk["choices"][0] for chunk in chunks]


@given(batches=update_lists(with_logprobs=True), echo=st.sampled_from([(), ("prompt",)]))
def test_completion(
    tokenizer: Tokenizer, batches: list[list[Update]], echo: tuple[str, ...]
) -> None:
    pieces = streamed(CompletionRenderer(job(echo), tokenizer, include_usage=False), batches)
    whole_renderer = CompletionRenderer(job(echo), tokenizer, include_usage=False)
    whole = json.loads(encode(whole_renderer.whole([u for batch in batches for u in batch])))
    assert [choice["index"] for choice in whole["choices"]] == list(range(CHOICES))
    for choice in whole["choices"]:
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert choice["text"].startswith("".join(echo))
        reasons = [piece["finish_reason"] for piece in mine]
        assert reasons[:-1] == [None] * (len(reasons) - 1)
        assert reasons[-1] == choice["finish_reason"] is not None
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [entry for piece in mine for entry in piece["logprobs"][key]]
            assert joined == choice["logprobs"][key]
    tokens = sum(len(batch) for batch in batches)
    assert whole["usage"] == {
        "prompt_tokens": 2, "completion_tokens": tokens, "total_tokens": 2 + tokens,
    }  # fmt: skip


@given(data=st.data(), logprobs=st.booleans())
def test_chat(tokenizer: Tokenizer, data: st.DataObject, logprobs: bool) -> None:
    batches = data.draw(update_lists(with_logprobs=logprobs))
    pieces = streamed(ChatRenderer(job(), tokenizer, include_usage=True), batches)
    whole_renderer = ChatRenderer(job(), tokenizer, include_usage=True)
    whole = json.loads(encode(whole_renderer.whole([u for batch in batches for u in batch])))
    for choice in whole["choices"]:
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert [p["delta"].get("role") for p in mine] == ["assistant"] + [None] * (len(mine) - 1)
        joined = "".join(piece["delta"].get("content", "") for piece in mine)
        assert joined == choice["message"]["content"]
        assert [p["finish_reason"] for p in mine if p["finish_reason"]] == [choice["finish_reason"]]
        if logprobs:
            found = [t for p in mine if p["logprobs"] for t in p["logprobs"]["content"]]
            assert found == choice["logprobs"]["content"]


def test_usage_appears_only_where_it_was_asked_for(tokenizer: Tokenizer) -> None:
    updates: list[Update] = [(0, Delta(request_id="r", index=0, token_ids=[1], text="a"))]
    for asked in (True, False):
        renderers = (
            CompletionRenderer(job(), tokenizer, include_usage=asked),
            ChatRenderer(job(), tokenizer, include_usage=asked),
        )
        for renderer in renderers:
            chunk = json.loads(encode(renderer.chunks(updates)[-1]))
            assert ("usage" in chunk) == asked
            assert chunk.get("usage") is None
            last = json.loads(encode(renderer.usage_chunk()))
            assert last["choices"] == []
            assert last["usage"]["total_tokens"] == 3
