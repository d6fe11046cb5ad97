"""From updates of a generation to OpenAI's objects.

A whole answer is the sum of the pieces that a stream would have sent, so the two can't differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import UNSET, Struct, UnsetType

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
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
    Usage,
)
from minigpt.api.requests import Delta, TokenLogprob
from minigpt.data.tokenizer import Tokenizer
from minigpt.serve.engine_client import Update
from minigpt.serve.service import Job


class Renderer(Protocol):
    """Turns the updates of one job into what its client reads. Keeps state: one per job."""

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        ...

    def chunks(self, updates: Sequence[Update]) -> list[Struct]:
        """Return the stream's chunks for these updates."""
        ...

    def usage_chunk(self) -> Struct:
        """Return the chunk that ends a stream with usage."""
        ...

    def whole(self, updates: Sequence[Update]) -> Struct:
        """Return the complete answer, given all updates in order."""
        ...


class _Base:
    """What both renderers share."""

    def __init__(self, job: Job, tokenizer: Tokenizer, *, include_usage: bool) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._chunk_usage: UnsetType | None = None if include_usage else UNSET
        self._completion_tokens = 0

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        prompt = self._job.generation.prompt_tokens
        return Usage(prompt, self._completion_tokens, prompt + self._completion_tokens)

    def _count(self, updates: Sequence[Update]) -> None:
        self._completion_tokens += sum(len(delta.token_ids) for _, delta in updates)

    def _prompt_logprobs(self, delta: Delta) -> PromptLogprobs | UnsetType:
        """Render vLLM's `prompt_logprobs`, where the client asked for it."""
        if self._job.prompt_logprobs is None or delta.prompt_logprobs is None:
            return UNSET
        result: PromptLogprobs = [None]
        for token in delta.prompt_logprobs:
            top = token.top[: self._job.prompt_logprobs]
            entries = {token.token_id: PromptLogprob(token.logprob, token.token)}
            result.append(entries | {i: PromptLogprob(value, text) for i, text, value in top})
        return result


class CompletionRenderer(_Base):
    """Renders `/v1/completions`."""

    def __init__(self, job: Job, tokenizer: Tokenizer, *, include_usage: bool) -> None:
        super().__init__(job, tokenizer, include_usage=include_usage)
        self._per_prompt = job.generation.requests[0].n
        self._echo = {
            choice: job.echo[choice // self._per_prompt]
            for choice in range(job.generation.num_choices if job.echo else 0)
        }
        self._offsets = [0] * job.generation.num_choices

    def chunks(self, updates: Sequence[Update]) -> list[Struct]:
        return [
            self._completion([piece], self._chunk_usage)
            for piece in self._pieces(updates)
            if piece.text or piece.logprobs or piece.finish_reason
        ]

    def usage_chunk(self) -> Struct:
        return self._completion([], self.usage)

    def whole(self, updates: Sequence[Update]) -> Struct:
        choices: dict[int, CompletionChoice] = {}
        for piece in self._pieces(updates):
            choice = choices.setdefault(piece.index, piece)
            if choice is piece:
                continue
            choice.text += piece.text
            choice.finish_reason = piece.finish_reason
            if choice.logprobs is not None and piece.logprobs is not None:
                _extend(choice.logprobs, piece.logprobs)
        return self._completion([choices[index] for index in sorted(choices)], self.usage)

    def _pieces(self, updates: Sequence[Update]) -> list[CompletionChoice]:
        self._count(updates)
        return [
            CompletionChoice(
                index=index,
                logprobs=self._logprobs(index, delta),  # before the echo is taken
                text=self._echo.pop(index, "") + delta.text,
                finish_reason=delta.finish_reason,
                prompt_logprobs=self._prompt_logprobs(delta),
            )
            for index, delta in updates
        ]

    def _logprobs(self, index: int, delta: Delta) -> CompletionLogprobs | None:
        """Render a delta's log-probabilities, those of an echoed prompt first."""
        request = self._job.generation.requests[index // self._per_prompt]
        count = request.sampling.logprobs
        echoed = count is not None and index in self._echo and delta.prompt_logprobs is not None
        if not echoed and delta.logprobs is None:
            return None
        result = CompletionLogprobs([], [], [], [])
        if echoed:
            first = self._tokenizer.token_bytes(request.prompt_token_ids[0])
            self._append(result, index, first.decode("utf-8", "replace"), None, None)
            for token in delta.prompt_logprobs or ():
                self._append(result, index, token.token, token.logprob, token.top[:count])
            self._offsets[index] = len(self._echo[index])
        for token in delta.logprobs or ():
            self._append(result, index, token.token, token.logprob, token.top)
        return result

    def _append(
        self,
        result: CompletionLogprobs,
        index: int,
        text: str,
        logprob: float | None,
        top: Sequence[tuple[int, str, float]] | None,
    ) -> None:
        result.tokens.append(text)
        result.token_logprobs.append(logprob)
        if logprob is None or top is None:
            result.top_logprobs.append(None)
        else:
            # Several tokens may be spelled alike (pieces of characters): the likeliest counts.
            alternatives = {other: value for _, other, value in reversed(top)}
            alternatives[text] = max(logprob, alternatives.get(text, logprob))
            result.top_logprobs.append(alternatives)
        result.text_offset.append(self._offsets[index])
        self._offsets[index] += len(text)

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None
    ) -> Completion:
        job = self._job
        return Completion(job.id, job.created, job.model, job.fingerprint, choices, usage)


class ChatRenderer(_Base):
    """Renders `/v1/chat/completions`."""

    def __init__(self, job: Job, tokenizer: Tokenizer, *, include_usage: bool) -> None:
        super().__init__(job, tokenizer, include_usage=include_usage)
        self._introduced: set[int] = set()

    def chunks(self, updates: Sequence[Update]) -> list[Struct]:
        chunks: list[Struct] = []
        for piece in self._pieces(updates):
            if not (piece.delta.content or piece.logprobs or piece.finish_reason):
                continue
            if piece.index not in self._introduced:
                self._introduced.add(piece.index)
                role = ChatDelta(role="assistant", content="")
                chunks.append(self._chunk([ChatChunkChoice(piece.index, role)], self._chunk_usage))
            chunks.append(self._chunk([piece], self._chunk_usage))
        return chunks

    def usage_chunk(self) -> Struct:
        return self._chunk([], self.usage)

    def whole(self, updates: Sequence[Update]) -> Struct:
        choices: dict[int, ChatChoice] = {}
        for piece in self._pieces(updates):
            choice = choices.get(piece.index)
            if choice is None:
                choice = ChatChoice(piece.index, ChatMessage(""), logprobs=piece.logprobs)
                choices[piece.index] = choice
            elif choice.logprobs is not None and piece.logprobs is not None:
                choice.logprobs.content += piece.logprobs.content
            choice.message.content += piece.delta.content or ""
            choice.finish_reason = piece.finish_reason
        job = self._job
        ordered = [choices[index] for index in sorted(choices)]
        firsts = (self._prompt_logprobs(delta) for index, delta in updates if index == 0)
        prompt = next((entries for entries in firsts if entries is not UNSET), UNSET)
        return ChatCompletion(
            job.id, job.created, job.model, job.fingerprint, ordered, self.usage, prompt
        )

    def _pieces(self, updates: Sequence[Update]) -> list[ChatChunkChoice]:
        self._count(updates)
        return [
            ChatChunkChoice(
                index=index,
                delta=ChatDelta(content=delta.text) if delta.text else ChatDelta(),
                logprobs=None if delta.logprobs is None else self._logprobs(delta.logprobs),
                finish_reason=delta.finish_reason,
            )
            for index, delta in updates
        ]

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
        return ChatLogprobs(
            [
                ChatTokenLogprob(
                    token.token,
                    token.logprob,
                    self._bytes(token.token_id),
                    [
                        TopLogprob(text, logprob, self._bytes(token_id))
                        for token_id, text, logprob in token.top
                    ],
                )
                for token in tokens
            ]
        )

    def _bytes(self, token_id: int) -> list[int]:
        """A model's vocabulary may be padded beyond its tokenizer's."""
        if token_id >= self._tokenizer.vocab_size:
            return []
        return list(self._tokenizer.token_bytes(token_id))

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None
    ) -> ChatCompletionChunk:
        job = self._job
        return ChatCompletionChunk(job.id, job.created, job.model, job.fingerprint, choices, usage)


def _extend(first: CompletionLogprobs, second: CompletionLogprobs) -> None:
    first.tokens += second.tokens
    first.token_logprobs += second.token_logprobs
    first.top_logprobs += second.top_logprobs
    first.text_offset += second.text_offset
