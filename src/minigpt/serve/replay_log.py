"""A durable log of answered requests, from which `minigpt replay` reproduces any of them.

Lines of JSON, in two files at most: PATH, and PATH.1 with what came before. A line of kind
"engine" holds a configuration and an environment, one of kind "answer" a request with all that
its answer followed from. Prompts are in it, as token ids: the files are readable by their owner
alone, and it is off unless asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from minigpt.api.requests import Delta, FinishReason, Ready, Request
from minigpt.core.storage import storage_errors
from minigpt.core.telemetry import get_logger

FORMAT = 1


class EngineLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="engine"):
    """An engine that answered."""

    digest: str
    """Of what follows; answers name their engine by it."""
    config: str
    """The EngineConfig with every "auto" settled, as JSON."""
    environment: dict[str, str]

    @classmethod
    def of(cls, ready: Ready) -> EngineLine:
        """Describe an engine by what it says of itself."""
        text = json.dumps([ready.engine_config, ready.environment], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(digest=digest, config=ready.engine_config, environment=ready.environment)


class AnswerHash(msgspec.Struct, frozen=True, kw_only=True):
    """One of a request's answers."""

    tokens: int
    sha256: str
    """Of its token ids, each as 32 bits, little-endian."""
    finish_reason: FinishReason


class AnswerLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="answer"):
    """A request that was answered whole."""

    format: int = FORMAT
    time: float
    """Seconds since 1970."""
    model: str
    """What clients call it."""
    weights: str
    adapter: str | None
    """Digests."""
    tokenizer: str
    """Fingerprint."""
    engine: str
    """Digest of an `EngineLine`."""
    request: Request
    """With the seed that it was answered with."""
    answers: list[AnswerHash]


def hash_tokens(token_ids: Sequence[int]) -> str:
    """Return what an `AnswerHash` holds of an answer."""
    return hashlib.sha256(_packed(token_ids)).hexdigest()


@dataclass
class _Answer:
    """One of a request's sequences, as far as it has come."""

    hash: Any = field(default_factory=hashlib.sha256)
    tokens: int = 0
    finish_reason: FinishReason | None = None


@dataclass
class _Open:
    """A request that is being answered."""

    request: Request
    engine: EngineLine
    answers: list[_Answer]
    weights: str = ""


class ReplayLog:
    """Watches requests and deltas and writes what was answered; nothing here waits for the disk.

    A write that fails is logged and its answers are missing; serving goes on.

    Args:
        path: The file; what is there is kept and continued.
        max_bytes: Of both files together.
        model: What clients call the model.
        tokenizer: The tokenizer's fingerprint.
        seed: Where the seeds of requests without one come from; None draws fresh ones.

    Raises:
        StorageError: The file can't be written.
    """

    def __init__(
        self, path: Path, max_bytes: int, *, model: str, tokenizer: str, seed: int | None
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._seeds = random.Random(seed)
        self._open: dict[str, _Open] = {}
        self._engine: tuple[Ready, EngineLine] | None = None
        self._writer = _Writer(path, max_bytes // 2)

    def begin(self, request: Request, ready: Ready) -> Request:
        """Watch a request; returns it with a seed, which its answer then follows from."""
        if request.sampling.seed is None:
            sampling = msgspec.structs.replace(request.sampling, seed=self._seeds.getrandbits(63))
            request = msgspec.structs.replace(request, sampling=sampling)
        if request.sampling.max_tokens:  # scores and embeddings are no answers
            answers = [_Answer() for _ in range(request.n)]
            self._open[request.id] = _Open(request, self._describe(ready), answers)
        return request

    def observe(self, delta: Delta) -> None:
        """Take in what a step added; the last one that a request waits for writes it down."""
        watched = self._open.get(delta.request_id)
        if watched is None:
            return
        watched.weights = delta.weights or watched.weights
        answer = watched.answers[delta.index]
        answer.hash.update(_packed(delta.token_ids))
        answer.tokens += len(delta.token_ids)
        answer.finish_reason = delta.finish_reason
        if all(each.finish_reason is not None for each in watched.answers):
            del self._open[delta.request_id]
            if all(each.finish_reason in ("stop", "length") for each in watched.answers):
                self._writer.write(watched.engine, self._answer_line(watched))

    def drop(self, request_id: str) -> None:
        """Forget a request that will not be answered."""
        self._open.pop(request_id, None)

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()

    def _describe(self, ready: Ready) -> EngineLine:
        """Describe an engine once, not for every request: it hardly ever changes."""
        if self._engine is None or self._engine[0] is not ready:
            self._engine = ready, EngineLine.of(ready)
        return self._engine[1]

    def _answer_line(self, watched: _Open) -> AnswerLine:
        weights, _, adapter = watched.weights.partition("+")
        return AnswerLine(
            time=time.time(),
            model=self._model,
            weights=weights,
            adapter=adapter or None,
            tokenizer=self._tokenizer,
            engine=watched.engine.digest,
            request=watched.request,
            answers=[
                AnswerHash(
                    tokens=each.tokens,
                    sha256=each.hash.hexdigest(),
                    finish_reason=each.finish_reason,
                )
                for each in watched.answers
                if each.finish_reason is not None
            ],
        )


_Pair = tuple[EngineLine, AnswerLine]


class _Writer:
    """Appends lines in a thread of its own, each batch synced, and bounds the file."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._queue: queue.SimpleQueue[_Pair | None] = queue.SimpleQueue()
        self._engines: set[str] = set()
        """Digests whose lines are in the file."""
        with storage_errors(f"write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._continue()
        self._thread = threading.Thread(target=self._run, name="replay-log", daemon=True)
        self._thread.start()

    def write(self, engine: EngineLine, answer: AnswerLine) -> None:
        """Queue an answer, and the engine's line in case the file has it not."""
        self._queue.put((engine, answer))

    def close(self) -> None:
        """Write what is queued and end the thread."""
        self._queue.put(None)
        self._thread.join()
        os.close(self._file)

    def _run(self) -> None:
        ended = False
        while not ended:
            # What came while the last batch was synced is the next batch.
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            ended = batch[-1] is None
            try:
                self._append([pair for pair in batch if pair is not None])
            except OSError as error:
                get_logger("replay").error("answers are not logged", reason=str(error))

    def _append(self, pairs: list[_Pair]) -> None:
        for engine, answer in pairs:
            line = msgspec.json.encode(answer) + b"\n"
            if os.fstat(self._file).st_size + len(line) > self._max_bytes:
                self._rotate()
            if engine.digest not in self._engines:
                _write(self._file, msgspec.json.encode(engine) + b"\n")
                self._engines.add(engine.digest)
            _write(self._file, line)
        os.fsync(self._file)

    def _rotate(self) -> None:
        os.close(self._file)
        self._path.replace(self._path.with_name(self._path.name + ".1"))
        self._file = self._continue()
        self._engines.clear()

    def _continue(self) -> int:
        """Open the file for appending; a line that a crash cut off is ended."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self._path, flags, 0o600)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")
        return descriptor


def _write(file: int, data: bytes) -> None:
    """Write all of it: a disk that is nearly full takes a part."""
    while data:
        data = data[os.write(file, data) :]


def _packed(token_ids: Sequence[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in token_ids)
