"""A model as a Python object: generate, stream, score and embed without a server.

    with LLM("runs/quickstart/train/model") as llm:
        for completion in llm.generate(["def add(", "import "], SamplingParams(max_tokens=32)):
            print(completion.text)

The engine is the one that the server runs; calls from several threads share its batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt

from minigpt.api.requests import (
    Delta,
    FinishReason,
    Pooling,
    Request,
    SamplingParams,
    TokenLogprob,
)
from minigpt.core.errors import MinigptError, RequestError
from minigpt.data.chat_template import ChatTemplate, Message
from minigpt.data.tokenizer import Tokenizer
from minigpt.engine.background import EngineThread
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.engine.structured import check_structured

Prompt = str | Sequence[int]
"""A text, encoded as a document begins, or token ids, taken as they are."""


@dataclass(slots=True)
class Answer:
    """One of a prompt's `n` answers."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each token, where `logprobs` was asked for."""
    finish_reason: FinishReason | None = None
    error: str = ""
    """Why, where `finish_reason` is "error"."""


@dataclass(slots=True)
class Completion:
    """What became of a prompt."""

    prompt_token_ids: list[int]
    answers: list[Answer]
    prompt_logprobs: list[TokenLogprob] | None = None
    """Of the prompt's tokens from the second on, where asked for."""
    embedding: list[float] | None = None

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.answers[0].text


class LLM:
    """A loaded model with an engine in a thread of its own.

    Args:
        model: A model artifact or a Hugging Face directory, or an engine that is loaded.
        config: The engine's, where `model` is a directory.

    Raises:
        ModelError, ConfigError: As `Engine.load`.
    """

    def __init__(self, model: str | Path | Engine, config: EngineConfig | None = None) -> None:
        engine = model if isinstance(model, Engine) else Engine.load(model, config)
        assert isinstance(engine.vocabulary, Tokenizer), "texts need a tokenizer"
        self.tokenizer: Tokenizer = engine.vocabulary
        self._engine = engine
        self._thread = EngineThread(engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine; calls that still wait raise RequestError."""
        self._thread.close()
        self._engine.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        adapter: str | None = None,
        progress: bool = True,
    ) -> list[Completion]:
        """Answer prompts, as many at once as the engine has room for.

        Args:
            prompts: One or several.
            sampling: For all of them, or one for each; the defaults of `SamplingParams`.
            n: Answers to each prompt.
            adapter: The loaded adapter that answers; None is the model itself.
            progress: Show a bar on standard error, where that is a terminal.

        Returns:
            One for each prompt, in their order. An answer that failed on its way has the
            finish reason "error" and does not disturb the others.

        Raises:
            RequestError: A request can't be served; nothing is generated then.
        """
        several = _several(prompts)
        samplings = _spread(sampling or SamplingParams(), len(several))
        requests = [
            self._request(prompt, params, n, adapter)
            for prompt, params in zip(several, samplings, strict=True)
        ]
        return self._complete(requests, progress)

    def chat(
        self, messages: Sequence[Message], sampling: SamplingParams | None = None, *, n: int = 1
    ) -> Completion:
        """Answer a conversation, rendered by the model's chat template.

        Args:
            messages: Each with `role` and `content`.
            sampling: The defaults of `SamplingParams` where None.
            n: Answers.

        Raises:
            RequestError: As `generate`, or the template refuses the conversation.
        """
        prompt = ChatTemplate(self.tokenizer).encode(messages)
        return self.generate([prompt], sampling, n=n, progress=False)[0]

    def score(
        self, prompts: Prompt | Sequence[Prompt], *, alternatives: int = 0, progress: bool = True
    ) -> list[list[TokenLogprob]]:
        """Return the log-probability of each token of each prompt, from the second on.

        Args:
            prompts: One or several.
            alternatives: How many of the likeliest tokens to list at each place.
            progress: As for `generate`.

        Raises:
            RequestError: As `generate`, or a prompt's scores are not finite.
        """
        params = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=alternatives)
        requests = [self._request(prompt, params, 1) for prompt in _several(prompts)]
        return [_whole(c).prompt_logprobs or [] for c in self._complete(requests, progress)]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        progress: bool = True,
    ) -> npt.NDArray[np.float32]:
        """Return (prompts, hidden size) embeddings.

        Args:
            prompts: One or several.
            pooling: The mean of the last layer's normalised outputs, or the last token's.
            normalize: Divide each by its L2 norm.
            progress: As for `generate`.

        Raises:
            RequestError: As `generate`, or a prompt's embedding is not finite.
        """
        params = SamplingParams(max_tokens=0, temperature=0)
        requests = [
            msgspec.structs.replace(self._request(prompt, params, 1), pooling=pooling)
            for prompt in _several(prompts)
        ]
        rows = [_whole(completion).embedding for completion in self._complete(requests, progress)]
        vectors = np.array(rows, dtype=np.float64)
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return vectors.astype(np.float32)

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, n: int = 1
    ) -> AsyncIterator[Delta]:
        """Yield what each step adds to the answers; leaving the loop early drops the request.

        Raises:
            RequestError: It can't be served, or failed on its way.
        """
        request = self._request(prompt, sampling or SamplingParams(), n)
        arrived: asyncio.Queue[Delta | MinigptError] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._thread.submit(request, lambda item: _hand_over(loop, arrived, item))
        unfinished = n
        try:
            while unfinished:
                delta = await arrived.get()
                if isinstance(delta, MinigptError):
                    unfinished = 0
                    raise delta
                if delta.finish_reason == "error":
                    raise RequestError(delta.error, status=500)
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            if unfinished:
                self._thread.abort(request.id)

    def swap(self, model: str | Path) -> str:
        """Serve other weights; what runs finishes on the old ones. Returns the new ones' digest.

        Raises:
            ModelError, ArtifactError: As `Engine.swap`; nothing has changed then.
        """
        done = self._thread.call(lambda engine: engine.swap(model))
        return done.result().model_id

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Let `generate` name a LoRA adapter; errors as `Engine.load_adapter`."""
        self._thread.call(lambda engine: engine.load_adapter(name, path))

    def unload_adapter(self, name: str) -> None:
        """Drop an adapter; errors as `Engine.unload_adapter`."""
        self._thread.call(lambda engine: engine.unload_adapter(name))

    def _request(
        self, prompt: Prompt, sampling: SamplingParams, n: int, adapter: str | None = None
    ) -> Request:
        if sampling.structured is not None:
            check_structured(sampling.structured)
        tokens = list(prompt) if not isinstance(prompt, str) else self._encode(prompt)
        name = uuid.uuid4().hex
        request = Request(id=name, prompt_token_ids=tokens, sampling=sampling, n=n, adapter=adapter)
        self._engine.check(request)
        return request

    def _encode(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text, bos=True)
        eos = self.tokenizer.eos_token_id
        return tokens or ([] if eos is None else [eos])

    def _complete(self, requests: list[Request], progress: bool) -> list[Completion]:
        found = {
            request.id: Completion(request.prompt_token_ids, [Answer() for _ in range(request.n)])
            for request in requests
        }
        arrived: queue.SimpleQueue[Delta | MinigptError] = queue.SimpleQueue()
        unfinished = sum(request.n for request in requests)
        try:
            for request in requests:
                self._thread.submit(request, arrived.put)
            with _bar(unfinished, shown=progress) as advance:
                while unfinished:
                    delta = arrived.get()
                    if isinstance(delta, MinigptError):
                        raise delta
                    _extend(found[delta.request_id], delta)
                    unfinished -= delta.finish_reason is not None
                    advance(delta)
        finally:
            if unfinished:
                for request in requests:
                    self._thread.abort(request.id)
        return list(found.values())


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Tell one prompt from several: a text, or a list that begins with a number, is one."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [[token for token in prompts if isinstance(token, int)]]
    return [prompt for prompt in prompts if not isinstance(prompt, int)]


def _spread(
    sampling: SamplingParams | Sequence[SamplingParams], count: int
) -> Sequence[SamplingParams]:
    if isinstance(sampling, SamplingParams):
        return [sampling] * count
    if len(sampling) != count:
        raise RequestError(
            f"{len(sampling)} sampling parameters for {count} prompts: give one, or one for each",
            param="sampling",
        )
    return sampling


def _extend(completion: Completion, delta: Delta) -> None:
    """Take what a step added into the answer it belongs to."""
    answer = completion.answers[delta.index]
    answer.text += delta.text
    answer.token_ids += delta.token_ids
    answer.logprobs += delta.logprobs or ()
    answer.finish_reason = delta.finish_reason
    answer.error = delta.error
    if delta.prompt_logprobs is not None:
        completion.prompt_logprobs = delta.prompt_logprobs
    if delta.embedding is not None:
        completion.embedding = delta.embedding


def _whole(completion: Completion) -> Completion:
    """Return a completion that must not have failed."""
    (answer,) = completion.answers
    if answer.finish_reason == "error":
        raise RequestError(answer.error, status=500)
    return completion


def _hand_over(
    loop: asyncio.AbstractEventLoop,
    arrived: asyncio.Queue[Delta | MinigptError],
    item: Delta | MinigptError,
) -> None:
    """Put into a loop's queue from the engine's thread; a loop that is closed wants nothing."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(arrived.put_nowait, item)


@contextlib.contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[Delta], None]]:
    """Show how many answers are finished and how fast tokens come; yields what to tell of each."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[tokens]} tokens"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("", total=total, tokens=0)
        tokens = 0

        def advance(delta: Delta) -> None:
            nonlocal tokens
            tokens += len(delta.token_ids)
            bar.update(task, advance=int(delta.finish_reason is not None), tokens=tokens)

        yield advance
