"""Short requests of every kind that the server takes, and of those that it refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MODEL = "tiny"
CONTEXT_LENGTH = 512
"""Of the model, in bytes of text."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz     "
_SHARED = "You answer shortly. " * 12
_LEAVES = ("before the first token", "during the stream")


@dataclass(frozen=True)
class Call:
    """One request and what should become of it."""

    kind: str
    path: str
    body: Any
    """Sent as JSON; None is a GET."""
    status: int = 200
    leaves: Literal["", "before the first token", "during the stream"] = ""
    """When the client hangs up."""

    @property
    def stream(self) -> bool:
        """Whether the answer comes as events."""
        return isinstance(self.body, dict) and bool(self.body.get("stream"))


def make_call(number: int, kinds: Sequence[str] | None = None) -> Call:
    """Return request `number`: kinds take turns, texts never repeat but where they should."""
    chance, kinds = random.Random(number), kinds or KINDS
    kind = kinds[number % len(kinds)]
    return _KINDS[kind](kind, number // len(kinds), chance)


def _text(chance: random.Random, least: int = 4, most: int = 80) -> str:
    return "".join(chance.choices(_LETTERS, k=chance.randint(least, most)))


def _completion(kind: str, chance: random.Random, **fields: Any) -> Call:
    body = {"model": MODEL, "prompt": _text(chance), "max_tokens": chance.randint(1, 12)}
    return Call(kind, "/v1/completions", body | {"temperature": 0} | fields)


def _sampled(kind: str, turn: int, chance: random.Random) -> Call:
    drawn = {"temperature": 1.0, "top_p": 0.9, "top_k": 40 * (turn % 2), "seed": turn % 5}
    return _completion(kind, chance, **drawn, stream=turn % 2 == 0)


def _penalties(kind: str, turn: int, chance: random.Random) -> Call:
    fields = {"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.1}
    return _completion(kind, chance, **fields, logit_bias={str(turn % 256): 5}, min_p=0.05)


def _stop(kind: str, turn: int, chance: random.Random) -> Call:
    stops = {"stop": ["e", "th", "ab"], "stop_token_ids": [turn % 256]}
    return _completion(kind, chance, **stops, temperature=1.0, max_tokens=16)


def _schema(kind: str, turn: int, chance: random.Random) -> Call:
    # Every other schema is a new one: what is kept of them must be bounded.
    name = f"field_{turn}" if turn % 2 else "name"
    schema = {
        "type": "object",
        "properties": {name: {"enum": ["red", "blue"]}, "size": {"type": "integer"}},
        "required": [name, "size"],
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return _completion(kind, chance, response_format=wanted, stream=turn % 3 == 0, max_tokens=24)


def _chat(kind: str, turn: int, chance: random.Random) -> Call:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": _text(chance)}],
        "max_tokens": 6,
        "stream": turn % 2 == 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    return Call(kind, "/v1/chat/completions", body)


def _several(kind: str, turn: int, chance: random.Random) -> Call:
    prompts = [_text(chance) for _ in range(1 + turn % 3)]
    return _completion(kind, chance, prompt=prompts, n=2, temperature=0.8, stream=turn % 2 == 0)


def _shared(kind: str, turn: int, chance: random.Random) -> Call:
    return _completion(kind, chance, prompt=_SHARED + _text(chance), stream=turn % 2 == 0)


def _score(kind: str, turn: int, chance: random.Random) -> Call:
    return _completion(kind, chance, echo=True, logprobs=2, max_tokens=4 * (turn % 2))


def _embedding(kind: str, turn: int, chance: random.Random) -> Call:
    body = {"model": MODEL, "input": [_text(chance), _text(chance)]}
    forms: dict[str, Any] = {"encoding_format": ("float", "base64")[turn % 2]}
    return Call(kind, "/v1/embeddings", body | forms | {"pooling": ("mean", "last")[turn % 2]})


def _left(kind: str, turn: int, chance: random.Random) -> Call:
    fields = {"max_tokens": 400, "ignore_eos": True, "stream": turn % 2 == 1, "n": 1 + turn % 3}
    call = _completion(kind, chance, **fields)
    return Call(kind, call.path, call.body, leaves=_LEAVES[turn % 2])  # type: ignore[arg-type]


def _refused(kind: str, turn: int, chance: random.Random) -> Call:
    body = {"model": MODEL, "prompt": _text(chance)}
    false = {"type": "object", "properties": {f"f{turn}": False}, "required": [f"f{turn}"]}
    wrong: list[tuple[dict[str, Any], int]] = [
        ({"top_p": 2}, 400),
        ({f"unknown_{turn}": 1}, 400),
        ({"prompt": "x" * (CONTEXT_LENGTH + turn)}, 400),
        ({"model": f"other-{turn}"}, 404),
        ({"guided_regex": f"({turn}"}, 400),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": false}}}, 400),
        ({"prompt": [[300]]}, 400),
    ]
    fields, status = wrong[turn % len(wrong)]
    return Call(kind, "/v1/completions", body | fields, status)


def _read(kind: str, turn: int, chance: random.Random) -> Call:
    if turn % 4 == 3:
        return Call(kind, f"/nowhere/{turn}", None, 404)
    return Call(kind, ("/metrics", "/v1/models", "/health")[turn % 4], None)


_KINDS: dict[str, Callable[[str, int, random.Random], Call]] = {
    "greedy": lambda kind, turn, chance: _completion(kind, chance),
    "greedy, streamed": lambda kind, turn, chance: _completion(kind, chance, stream=True),
    "sampled": _sampled,
    "penalties": _penalties,
    "stop": _stop,
    "JSON schema": _schema,
    "chat": _chat,
    "several answers": _several,
    "shared prefix": _shared,
    "score": _score,
    "embedding": _embedding,
    "client leaves": _left,
    "refused": _refused,
    "read": _read,
}
KINDS = tuple(_KINDS)


def encode(call: Call) -> bytes | None:
    """Return a call's body as it is sent."""
    return None if call.body is None else json.dumps(call.body).encode()
