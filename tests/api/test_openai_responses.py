from __future__ import annotations

import json

import openai.types as public
import openai.types.chat as public_chat
import pytest

from minigpt.api.openai_responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Model,
    TopLogprob,
    Usage,
    encode,
    encode_event,
    error_body,
)
from minigpt.core.errors import RequestError


def test_the_public_clients_types_accept_every_answer() -> None:
    usage = Usage(1, 2, 3)
    logprobs = CompletionLogprobs(["a"], [-1.0], [{"a": -1.0}], [0])
    completion = Completion("i", 1, "m", "fp", [CompletionChoice(0, "a", logprobs, "stop")], usage)
    public.Completion.model_validate_json(encode(completion), strict=True)
    tokens = ChatLogprobs([ChatTokenLogprob("a", -1.0, [97], [TopLogprob("a", -1.0, [97])])])
    chat = ChatCompletion(
        "i", 1, "m", "fp", [ChatChoice(0, ChatMessage("a"), tokens, "length")], usage
    )
    public_chat.ChatCompletion.model_validate_json(encode(chat), strict=True)
    for delta in (ChatDelta(role="assistant", content=""), ChatDelta(content="a"), ChatDelta()):
        chunk = ChatCompletionChunk("i", 1, "m", "fp", [ChatChunkChoice(0, delta, tokens)])
        public_chat.ChatCompletionChunk.model_validate_json(encode(chunk), strict=True)
    public.Model.model_validate_json(encode(Model("m", 1, "root", None)), strict=True)


def test_an_event_is_one_line_whatever_the_text() -> None:
    event = encode_event(CompletionChoice(0, "a\n\nb\r\u2028"))
    assert event.startswith(b"data: ") and event.endswith(b"\n\n")
    assert b"\n" not in event[:-2] and b"\r" not in event
    assert json.loads(event[6:])["text"] == "a\n\nb\r\u2028"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "invalid_request_error"),
        (500, "server_error"),
        (503, "service_unavailable_error"),
    ],
)
def test_errors(status: int, kind: str) -> None:
    error = RequestError("no", param="p", status=status, code="c", remedy="do so")
    expected = {"message": "no (do so)", "type": kind, "param": "p", "code": "c"}
    assert error_body(error) == {"error": expected}
