"""Answer a logged request again and say whether the answer is the same, or what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from minigpt.api.requests import Request
from minigpt.core.config import from_mapping
from minigpt.core.errors import MinigptError
from minigpt.core.storage import storage_errors
from minigpt.engine.config import EngineConfig
from minigpt.serve.replay_log import FORMAT, AnswerLine, EngineLine, hash_tokens

if TYPE_CHECKING:
    from minigpt.engine.engine import Engine

_decoder: msgspec.json.Decoder[EngineLine | AnswerLine] = msgspec.json.Decoder(
    EngineLine | AnswerLine
)


class ReplayError(MinigptError):
    """A logged answer that can't be reproduced, for something is missing or another."""


@dataclass(frozen=True)
class Replayed:
    """One of a request's answers, computed again."""

    id: str
    index: int
    identical: bool
    difference: str
    """How it differs; empty where it doesn't."""
    text: str
    """What it is now."""


def find_answers(log: Path, name: str) -> list[tuple[AnswerLine, EngineLine]]:
    """Find what was answered to a call, with the engine that answered.

    Args:
        log: The server's `replay_log`; what was rotated to `.1` is looked through too.
        name: The id of a response, or of one of its prompts (the same with `-0`, `-1`, ...).

    Raises:
        ReplayError: Nothing of this id is there, or it is of another format.
        StorageError: There is no such file.
    """
    answers: list[AnswerLine] = []
    engines: dict[str, EngineLine] = {}
    for line in _lines(log):
        if isinstance(line, EngineLine):
            engines[line.digest] = line
        elif line.request.id == name or line.request.id.rpartition("-")[0] == name:
            answers.append(line)
    if not answers:
        raise ReplayError(
            f"{log} has no answer of id {name!r}",
            remedy="it may be older than the log reaches, or have ended with an error",
        )
    for answer in answers:
        if answer.format != FORMAT:
            raise ReplayError(f"{log}: {name} has format {answer.format}, not {FORMAT}")
        if answer.engine not in engines:
            raise ReplayError(f"{log} lacks the engine {answer.engine[:12]} that answered {name}")
    return [(answer, engines[answer.engine]) for answer in answers]


def replay(
    logged: list[tuple[AnswerLine, EngineLine]], model: str | Path, adapter: Path | None
) -> tuple[list[Replayed], list[str]]:
    """Answer the requests again, by the engine as it was.

    Args:
        logged: From `find_answers`.
        model: What was served.
        adapter: The adapter that answered, where one did.

    Returns:
        The answers, and what differs from then without being known to matter: versions,
        processor.

    Raises:
        ReplayError: Weights, tokenizer or adapter are missing or others; all that is wrong is in
            the one message.
        ModelError, ConfigError: The model can't be served here.
    """
    from minigpt.engine.engine import Engine

    _, line = logged[0]
    engine = Engine.load(model, from_mapping(EngineConfig, json.loads(line.config)))
    for answer, _ in logged:
        _check(answer, engine, model, adapter)
    now = engine.ready().environment
    notes = [
        f"{key} was {then!r}, is {now.get(key, '')!r}"
        for key, then in line.environment.items()
        if now.get(key) != then
    ]
    return [found for answer, _ in logged for found in _answer(engine, answer)], notes


def _check(answer: AnswerLine, engine: Engine, model: str | Path, adapter: Path | None) -> None:
    """Load the adapter and compare every digest."""
    ready, wrong = engine.ready(), []
    if ready.model_id != answer.weights:
        wrong.append(_differs(f"the weights of {model} are", ready.model_id, answer.weights))
    if (fingerprint := _fingerprint(engine)) != answer.tokenizer:
        wrong.append(_differs("its tokenizer is", fingerprint, answer.tokenizer))
    name = answer.request.adapter
    if name is not None and adapter is None:
        wrong.append(f"it was answered with the adapter {name!r}, {answer.adapter}: not given")
    elif name is not None and adapter is not None and not wrong:
        if name not in ready.adapters:
            ready = engine.load_adapter(name, adapter)
        if ready.adapters[name] != answer.adapter:
            wrong.append(_differs(f"{adapter} is", ready.adapters[name], str(answer.adapter)))
    if wrong:
        raise ReplayError(f"{answer.request.id} can't be replayed: {'; '.join(wrong)}")


def _fingerprint(engine: Engine) -> str:
    from minigpt.data.tokenizer import Tokenizer

    assert isinstance(engine.vocabulary, Tokenizer)
    return engine.vocabulary.fingerprint


def _differs(what: str, now: str, then: str) -> str:
    return f"{what} {now[:16]}, it was answered by {then[:16]}"


def _answer(engine: Engine, logged: AnswerLine) -> Iterator[Replayed]:
    request: Request = logged.request
    tokens: list[list[int]] = [[] for _ in range(request.n)]
    texts, ends = [""] * request.n, [""] * request.n
    engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.index] += delta.token_ids
            texts[delta.index] += delta.text
            ends[delta.index] = delta.error or delta.finish_reason or ""
    for index, then in enumerate(logged.answers):
        now = len(tokens[index]), ends[index]
        difference = ""
        if now != (then.tokens, then.finish_reason):
            difference = (
                f"{now[0]} tokens and {now[1]}, it had {then.tokens} and {then.finish_reason}"
            )
        elif hash_tokens(tokens[index]) != then.sha256:
            difference = f"as many tokens ({then.tokens}), but not the same ones"
        yield Replayed(request.id, index, not difference, difference, texts[index])


def _lines(log: Path) -> Iterator[EngineLine | AnswerLine]:
    """Read both files, the older first; a line that a crash cut off is passed over."""
    older = log.with_name(log.name + ".1")
    for path in (older, log) if older.exists() else (log,):
        with storage_errors(f"read {path}"), path.open("rb") as file:
            for line in file:
                try:
                    yield _decoder.decode(line)
                except msgspec.DecodeError:
                    continue
